"""Compiled kernels: they take prepared arrays, never validate, never raise, never draw."""
