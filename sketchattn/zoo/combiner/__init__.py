"""Combiner: structured factorisation with full support.

Imports what every method may.
"""

from .method import Combiner as Combiner
