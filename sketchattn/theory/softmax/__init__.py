"""Softmax and norms: what every attention matrix satisfies, and two things that it does not.

``A = rowsoftmax(L)`` is non-negative with rows that sum to one.  The claims of this topic are
about A itself, its norms, its dependence on the logits L, and outputs ``A V``.  Where an instance
is a pair (A, V), its logits are ``ln A``, which differ from any others by a shift of each row.

To check another softmax, hand it in as ``sketch``: it is called as
``sketch("softmax", rows, columns, rng, logits=L)`` and returns the weights (rows, columns).
"""

from ..engine.assumptions import KEYS as KEYS
from ..engine.assumptions import STOCHASTIC as STOCHASTIC
from . import norm_claims as norm_claims
from .formulas import perturbation_bound as perturbation_bound
from .norm_claims import DERIVED as DERIVED
from .norm_claims import MATRIX as MATRIX
from .norm_claims import ROUNDING as ROUNDING
from .norm_claims import ROWS as ROWS
from .norm_claims import VYAS as VYAS

__all__ = [
    "DERIVED",
    "KEYS",
    "MATRIX",
    "ROUNDING",
    "ROWS",
    "STOCHASTIC",
    "VYAS",
    "perturbation_bound",
]


def __dir__() -> list[str]:
    return __all__
