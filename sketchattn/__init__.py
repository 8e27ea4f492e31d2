"""Attention as matrix approximation: study, validate, and serve as the CPU reference.

Softmax attention is a row-stochastic matrix ``A = rowsoftmax(scale Q K^T)`` and its output is
``O = A V``; every efficient attention replaces ``A`` by a cheaper ``Ahat``.  The public names stand
once, in ``__init__.pyi``, and are loaded on first use: importing the package costs no more than
importing NumPy.
"""

from .base.names import attach

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = attach(__name__)
