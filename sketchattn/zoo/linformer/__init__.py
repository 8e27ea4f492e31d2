"""Linformer: keys and values projected along the sequence before the softmax.

Imports what every method may.
"""

from .fit import LinformerFit as LinformerFit
from .fit import fit_linformer as fit_linformer
from .method import Linformer as Linformer
from .stack import linformer_projections as linformer_projections
