"""Training-free competitors: what is promised of them with constants, and what is not so.

Weighted coresets (WildCat), sorted blocks beside a sample (HyperAttention, KDEformer), thinning
(Thinformer), and keys drawn with known probabilities (MagicPIG, vAttention).

To check another implementation, hand it in as ``sketch``: it is called as
``sketch("tree", leaf, n_k, rng, problem=problem)`` and returns the causal output (n_q, d_v) of the
halving tree with exact blocks; ``sketch("thinning", r, n_k, rng, problem=problem)`` returns kept
keys and their weights (2, r_eff); ``sketch("stream", r, n_k, rng, problem=problem, block=B)`` the
weights and keys of the cache before each block but the first, (2, blocks - 1).  For sorted blocks
beside a sample

* ``sketch("block_sample", s, n_k, rng, problem=problem, query_blocks=..., key_blocks=..., p=p)``
  returns (n_q, d_v + 1): the output and the log-normaliser of blocks and s keys drawn from p;
* ``sketch("mixed_sample", s, n_k, rng, a=A, v=V)`` an estimate of A V (n_q, d_v);
* ``sketch("approximate_normalizers", s, n_k, rng, problem=problem, query_blocks=...,
  key_blocks=..., rows=T, columns=l, eps=eps)`` ln D (n_q,).
"""

from . import blocks_claims as blocks_claims
from . import thinning_claims as thinning_claims
from .thinning import SignedSum as SignedSum
from .thinning import denominator_bound as denominator_bound
from .thinning import signed_sum as signed_sum
