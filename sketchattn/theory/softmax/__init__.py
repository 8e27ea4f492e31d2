"""Softmax attention as a row-stochastic matrix: its norms, and what a change of logits does.

Imports the engine and other topics' formulas.
"""

from . import norm_claims as norm_claims
