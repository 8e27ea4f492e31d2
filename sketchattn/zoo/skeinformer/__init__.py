"""Skeinformer: pilot rows give a law, columns are drawn by it, rows are normalised adaptively.

Imports what every method may.
"""

from .method import Skeinformer as Skeinformer
