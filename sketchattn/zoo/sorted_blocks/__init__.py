"""Sorted blocks beside a sample: HyperAttention and KDEformer.

Imports what every method may.
"""

from .hyperattention import HyperAttention as HyperAttention
from .kdeformer import KDEformer as KDEformer
