"""Skeinformer: what is proved of sampled columns, and what is true whatever is drawn.

Two estimators must not be confused.  Proposition 1 is about columns drawn with replacement, with
weights ``1/(r p_j)`` and exact normalisers: the method "column_sampling".  The published method
draws without replacement, without weights, and estimates the normalisers: no bound of its error is
known, and `check("skeinformer.proposition1", problem, method=...)` says so, with what can be
said after the fact.  The bounds are plain functions here; importing registers the claims.

To check another implementation, hand it in as ``sketch``: beside the draws of columns
("sample_wr", "sample_wor", as everywhere) it is called as ``sketch("pilot_rows", s, n_q, rng)``
for s rows, ``sketch("pilot_law", s, n_k, rng, source=(A, V), rows=I)`` for probabilities (n_k,),
and ``sketch("skeinformer", r, n_k, rng, problem=problem, draw=draw, **parameters)``, with
parameters of `Skeinformer` and a draw of it, for Ahat (n_q, n_k).
"""

from __future__ import annotations

from . import column_claims as column_claims
from . import pilot_claims as pilot_claims
from . import row_claims as row_claims
from .column_bounds import ProductBounds as ProductBounds
from .column_bounds import break_even_rank as break_even_rank
from .column_bounds import coherence_pilots as coherence_pilots
from .column_bounds import column_coherence as column_coherence
from .column_bounds import column_floor as column_floor
from .column_bounds import contributions as contributions
from .column_bounds import lemma1_pilots as lemma1_pilots
from .column_bounds import pilot_probabilities as pilot_probabilities
from .column_bounds import product_bounds as product_bounds
from .column_bounds import product_range as product_range
from .column_bounds import realised_beta as realised_beta
from .column_bounds import sampled_sqerr as sampled_sqerr
from .column_bounds import sampling_inflation as sampling_inflation
from .scope import StructuralFacts as StructuralFacts
from .scope import proposition1_scope as proposition1_scope
from .scope import structural_facts as structural_facts

__all__ = [
    "ProductBounds",
    "StructuralFacts",
    "break_even_rank",
    "coherence_pilots",
    "column_coherence",
    "column_floor",
    "contributions",
    "lemma1_pilots",
    "pilot_probabilities",
    "product_bounds",
    "product_range",
    "proposition1_scope",
    "realised_beta",
    "sampled_sqerr",
    "sampling_inflation",
    "structural_facts",
]


def __dir__() -> list[str]:
    return __all__
