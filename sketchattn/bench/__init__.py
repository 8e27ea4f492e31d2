"""Benchmarks against the real competitor: a harness, and a file a family.

Imports everything but ``studies`` and the command line.
"""
