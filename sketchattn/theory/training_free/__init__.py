"""Training-free competitors: what is promised of them with constants, and what is not so.

Weighted coresets (WildCat), sorted blocks beside a sample (HyperAttention, KDEformer), thinning
(Thinformer), and keys drawn with known probabilities (MagicPIG, vAttention).

To check another implementation, hand it in as ``sketch``: it is called with a kind, a size, the
number of keys, a generator, and for WildCat

- ``"pivots"``: ``problem=``; r distinct keys, or fewer;
- ``"weights"``: ``problem=, pivots=``; W (r, n_k);
- ``"wildcat"``: ``problem=, pivots=``; Ahat (n_q, n_k).
"""

from __future__ import annotations

from . import wildcat_claims as wildcat_claims
from .wildcat import trace_bound as trace_bound
from .wildcat import trace_share as trace_share
