"""NearFar: near keys exactly, far keys by the moments of their clusters.

``Ahat_ij = exp(L_ij)/Zhat_i`` for own and near keys, ``exp(g_ic)/Zhat_i (1 + y_ic z_j)/m_c`` for
those of far clusters.  The claims of this topic say what its rows are, when they are exact, between
which ends masses and shares lie, what the frozen second order and the first order do, that moments
merge, that no causal row depends on later ones, and that the estimate of the error is no bound.

To check another implementation, hand it in as ``sketch``: it is called as ``sketch("nearfar", R,
n_k, rng, problem=problem, form=form, labels=labels, direct=direct, far=far, scores=z)`` and returns
Ahat (n_q, n_k): labels (n_k,) are the R clusters, ``direct`` (n_q, n_k) the keys that rows read one
by one, ``far`` (n_q, R) the clusters whose moments they read, and ``scores`` (h, n_k) those of the
keys along h directions; ``form.second_order`` is "frozen" or "none".  With the same arguments
``sketch("log_normalizer", ...)`` returns log Zhat (n_q,).  ``sketch("output", ...)`` (``problem``,
``form``) returns the output (n_q, d_v) with clusters of its own, ``sketch("merge", ...)``
(``keys``, ``values``, ``parts``) size, mean key, variances, mean value and radius of a union as one
vector, and ``sketch("estimate", ...)`` (``problem``, ``operator``) an estimate of the error.
"""

from __future__ import annotations

from . import mass_claims as mass_claims
from . import row_claims as row_claims
from .formulas import ClusterMoments as ClusterMoments
from .formulas import cluster_moments as cluster_moments
from .formulas import frozen_second_order as frozen_second_order
from .formulas import frozen_window as frozen_window
from .formulas import merged_moments as merged_moments
from .formulas import normal_maximum as normal_maximum
from .formulas import tilted_remainder as tilted_remainder

__all__ = [
    "ClusterMoments",
    "cluster_moments",
    "frozen_second_order",
    "frozen_window",
    "merged_moments",
    "normal_maximum",
    "tilted_remainder",
]


def __dir__() -> list[str]:
    return __all__
