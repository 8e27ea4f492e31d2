"""Attention in the form that other libraries ask for: one module a library, imported by name.

Nothing is loaded before it is imported: ``from sketchattn.integrations.torch import ...``.  A
module says which package it needs where that is missing.  Imports ``functional`` and what is below.
"""
