"""Attention through regions: summaries, records that merge, layouts in memory, and the operator.

Imports ``partitions``, ``base``, ``kernels`` and its siblings.
"""
