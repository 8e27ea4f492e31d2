"""Low-rank baselines: Nystromformer, random features, clustered attention, and their floors.

The iteration of Nystromformer is a spectral filter whose residual is known in closed form; random
features have exact mean square errors of single weights, and of normalised weights none;
clustered attention moves a row by what the range of its logits allows.  The formulas are plain
functions here; importing registers the claims.

To check another implementation, hand it in as ``sketch``: it is called with a kind, a size, the
number of keys (the width d for the kinds of features), a generator, and

- ``"inverse"``: ``m=M, iterations=j``; returns ``Z_j`` (r, r);
- ``"nystromformer"``: ``problem=, landmarks=(2, r, d), iterations=j or None``; Ahat (n_q, n_k);
- ``"directions"``: ``orthogonal=, sign_fix=``; omega (rows, d) in blocks of d rows;
- ``"feature_mse"``: ``x=, y=, features=, orthogonal=``; a mean square error;
- ``"smreg_ratio"``: ``s=``; the ratio of the kernels; ``"coefficients"``: ``d=``; a_1 .. a_60;
- ``"performer"``: ``problem=, omega=, features=`` and ``eps=`` where there is one; Ahat;
- ``"clustered"``: ``problem=, labels=, top_keys=`` (None for the plain form); Ahat;
- ``"rank"``: ``problem=``; Ahat of rank r; ``"topk"``: ``problem=, renormalize=``; Ahat.
"""

from __future__ import annotations

from . import clustered_claims as clustered_claims
from . import feature_claims as feature_claims
from . import nystrom_claims as nystrom_claims
from . import performer_claims as performer_claims
from .features import chebyshev_features as chebyshev_features
from .features import feature_kurtosis as feature_kurtosis
from .features import smreg_ratio as smreg_ratio
from .features import theorem2_gain as theorem2_gain
from .features import uniform_convergence_scale as uniform_convergence_scale
from .residuals import floor_errors as floor_errors
from .residuals import median_errors as median_errors
from .residuals import residual_after as residual_after

__all__ = [
    "chebyshev_features",
    "feature_kurtosis",
    "floor_errors",
    "median_errors",
    "residual_after",
    "smreg_ratio",
    "theorem2_gain",
    "uniform_convergence_scale",
]


def __dir__() -> list[str]:
    return __all__
