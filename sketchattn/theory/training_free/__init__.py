"""Training-free competitors: what is promised of them with constants, and what is not so.

Weighted coresets (WildCat), sorted blocks beside a sample (HyperAttention, KDEformer), thinning
(Thinformer), and keys drawn with known probabilities (MagicPIG, vAttention).

To check another implementation, hand it in as ``sketch``: it is called as
``sketch("tree", leaf, n_k, rng, problem=problem)`` and returns the causal output (n_q, d_v) of the
halving tree with exact blocks.
"""

from . import thinning_claims as thinning_claims
