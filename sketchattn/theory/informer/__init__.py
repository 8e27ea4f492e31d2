"""Informer: its lemmas and proposition, and what a choice of rows costs.

Imports the engine and other topics' formulas.
"""

from . import selection_claims as selection_claims
from .formulas import DERIVED as DERIVED
from .formulas import PAPER as PAPER
from .formulas import RankAgreement as RankAgreement
from .formulas import miss_probability as miss_probability
from .formulas import rank_agreement as rank_agreement
from .formulas import selection_bound as selection_bound
from .formulas import variation_bound as variation_bound
