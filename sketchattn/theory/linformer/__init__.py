"""Linformer: its two theorems as published, what refutes them, and what is true instead.

Two estimators must not be confused.  The *unreduced* ``A S^T S V`` is what random projections say
something about; the *reduced* ``rowsoftmax(L E^T) F V`` is what Linformer computes.  E and F are
(r, n) throughout; tails refer to a fixed matrix and a random projection.

To check another implementation, hand it in as ``sketch``: it is called for the projections alone,
as ``sketch("gaussian", r, n, rng)``.
"""

from ...zoo.linformer.fit import OracleFloor as OracleFloor
from ...zoo.linformer.fit import oracle_floor as oracle_floor
from ..sketching.lowrank import eckart_young_floor as eckart_young_floor
from ..softmax.formulas import perturbation_bound as perturbation_bound
from . import projection_claims as projection_claims
from .formulas import DERIVED as DERIVED
from .formulas import PAPER as PAPER
from .formulas import Gap as Gap
from .formulas import RegimeFlags as RegimeFlags
from .formulas import Spectrum as Spectrum
from .formulas import constant_value_invariance as constant_value_invariance
from .formulas import failure_of as failure_of
from .formulas import linformer_thm1_failure as linformer_thm1_failure
from .formulas import linformer_thm1_k as linformer_thm1_k
from .formulas import linformer_thm2_construction as linformer_thm2_construction
from .formulas import linformer_thm2_k as linformer_thm2_k
from .formulas import pooling_bound as pooling_bound
from .formulas import rate_of as rate_of
from .formulas import regime_flags as regime_flags
from .formulas import spectrum as spectrum
from .formulas import unreduced_vs_reduced_gap as unreduced_vs_reduced_gap
from .projection_claims import EPS as EPS
from .projection_claims import REDUCED as REDUCED

__all__ = [
    "DERIVED",
    "EPS",
    "Gap",
    "OracleFloor",
    "PAPER",
    "REDUCED",
    "RegimeFlags",
    "Spectrum",
    "constant_value_invariance",
    "eckart_young_floor",
    "failure_of",
    "linformer_thm1_failure",
    "linformer_thm1_k",
    "linformer_thm2_construction",
    "linformer_thm2_k",
    "oracle_floor",
    "perturbation_bound",
    "pooling_bound",
    "rate_of",
    "regime_flags",
    "spectrum",
    "unreduced_vs_reduced_gap",
]


def __dir__() -> list[str]:
    return __all__
