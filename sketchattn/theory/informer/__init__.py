"""Informer: what its statistics say of rows, what its choice of rows leaves, and what is not so.

``Ahat`` has r exact rows I and the mean of V for the others, so that its squared error is exactly
``sum_{i not in I} e_i``, ``e_i = |A_i V - fill_i|^2``.  No published theorem bounds it; what can
be proved of a choice of rows goes by the divergence ``KL_i = KL(uniform | A_i)``.

To check another implementation, hand it in as ``sketch``: it is called as
``sketch("statistic", n_q, n_k, rng, problem=problem, statistic=name, **parameters)`` with the
arguments of `row_statistic` and returns (n_q,), and as
``sketch("informer", r, n_k, rng, problem=problem, rows=I)``, which returns Ahat (n_q, n_k);
``sketch("key_samples", U, n_k, rng, problem=problem)`` draws keys (n_q, U), and
``sketch("random_rows", r, n_k, rng, problem=problem)`` rows (r,).
"""

from ...errors.perturbation import value_diameter as value_diameter
from . import selection_claims as selection_claims
from .formulas import DERIVED as DERIVED
from .formulas import PAPER as PAPER
from .formulas import RankAgreement as RankAgreement
from .formulas import miss_probability as miss_probability
from .formulas import rank_agreement as rank_agreement
from .formulas import selection_bound as selection_bound
from .formulas import variation_bound as variation_bound
from .selection_claims import EVERYWHERE as EVERYWHERE
from .selection_claims import ON as ON
from .selection_claims import WITH_VALUES as WITH_VALUES

__all__ = [
    "DERIVED",
    "EVERYWHERE",
    "ON",
    "PAPER",
    "RankAgreement",
    "WITH_VALUES",
    "miss_probability",
    "rank_agreement",
    "selection_bound",
    "value_diameter",
    "variation_bound",
]


def __dir__() -> list[str]:
    return __all__
