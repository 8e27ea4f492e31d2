"""Training-free competitors: what is promised of them with constants, and what is not so.

Weighted coresets (WildCat), sorted blocks beside a sample (HyperAttention, KDEformer), thinning
(Thinformer), the halving tree of causal problems, and keys drawn with known probabilities
(MagicPIG, vAttention).

To check another implementation, hand it in as ``sketch``.  It is called with a kind, a size, the
number of keys and a generator, and

* ``sketch("pivots", r, n_k, rng, problem=problem)`` returns r distinct keys, or fewer, for WildCat;
  with ``"weights"`` and ``pivots=`` W (r, n_k), with ``"wildcat"`` and ``pivots=`` Ahat (n_q, n_k);
* ``sketch("block_sample", s, n_k, rng, problem=problem, query_blocks=..., key_blocks=..., p=p)``
  returns (n_q, d_v + 1): the output and the log-normaliser of blocks and s keys drawn from p;
* ``sketch("mixed_sample", s, n_k, rng, a=A, v=V)`` an estimate of A V (n_q, d_v);
* ``sketch("approximate_normalizers", s, n_k, rng, problem=problem, query_blocks=...,
  key_blocks=..., rows=T, columns=l, eps=eps)`` ln D (n_q,);
* ``sketch("tree", leaf, n_k, rng, problem=problem)`` the causal output (n_q, d_v) of the halving
  tree with exact blocks;
* ``sketch("thinning", r, n_k, rng, problem=problem)`` kept keys and their weights (2, r_eff);
* ``sketch("stream", r, n_k, rng, problem=problem, block=B)`` the weights and keys of the cache
  before each block but the first, (2, blocks - 1).
"""

from . import blocks_claims as blocks_claims
from . import sampled_claims as sampled_claims
from . import thinning_claims as thinning_claims
from . import wildcat_claims as wildcat_claims
from .sampled import composed_error as composed_error
from .sampled import floor_mean as floor_mean
from .sampled import joint_probability as joint_probability
from .sampled import magicpig_variance as magicpig_variance
from .sampled import merged_mean as merged_mean
from .sampled import row_statistics as row_statistics
from .thinning import SignedSum as SignedSum
from .thinning import denominator_bound as denominator_bound
from .thinning import signed_sum as signed_sum
from .wildcat import trace_bound as trace_bound
from .wildcat import trace_share as trace_share

__all__ = [
    "SignedSum",
    "composed_error",
    "denominator_bound",
    "floor_mean",
    "joint_probability",
    "magicpig_variance",
    "merged_mean",
    "row_statistics",
    "signed_sum",
    "trace_bound",
    "trace_share",
]


def __dir__() -> list[str]:
    return __all__
