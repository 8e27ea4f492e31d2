"""Attention in the form that other libraries ask for: one module a library, imported by name.

Nothing is loaded before a module is imported (``import sketchattn.integrations.torch``), which
says which package it needs where that is missing.  Imports ``functional`` and what is below.
"""

__all__: list[str] = []  # a module needs the package that it is named after


def __dir__() -> list[str]:
    return ["jax", "onnx", "torch", "transformers"]
