"""Nystromformer: three small softmax matrices in place of A, joined by a pseudo-inverse.

Imports what every method may.
"""

from .inverse import filter_inverse as filter_inverse
from .inverse import iterate_inverse as iterate_inverse
from .inverse import pseudo_inverse as pseudo_inverse
from .inverse import small_softmax as small_softmax
from .method import Nystromformer as Nystromformer
from .renormalized import RenormalizedAttention as RenormalizedAttention
