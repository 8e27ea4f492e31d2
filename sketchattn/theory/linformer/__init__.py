"""Linformer: its theorems with their constants, why they fail, and what holds instead.

Imports the engine and other topics' formulas.
"""

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
from .formulas import perturbation_bound as perturbation_bound
from .formulas import pooling_bound as pooling_bound
from .formulas import rate_of as rate_of
from .formulas import regime_flags as regime_flags
from .formulas import spectrum as spectrum
from .formulas import unreduced_vs_reduced_gap as unreduced_vs_reduced_gap
