"""DBA and the algebra ``Ahat = U S P``: what is lossless, what a floor is, what logits cost.

Pack-core-unpack attention compresses the sequence, the hidden width, or both.  A pack of as many
rows as the logits have rank loses nothing of the *logits*, and nothing like it is true of
attention: the softmax makes new rank.  The claims of this topic say what holds in its place: when
``U S P`` is A exactly, which floors bind, what an error of the logits costs (with
`sketchattn.errors.perturbation`), how many hidden dimensions the logits need, and what pivots
guarantee.

To check another implementation, hand it in as ``sketch``.  It is called as
``sketch(kind, r, n_k, rng, **given)``, by kind:

- "pack" (``keys``) returns P (r, n_k), "decoder" (``keys``, ``packed``) W (n_k, r);
- "softmax" (``logits``) returns the weights;
- "oblique" (``q``, ``k``) returns R and T, "projector" (``q``, ``k``) orthonormal columns;
- "compress" (``q``, ``k``, ``how``) returns Qh and Kh of width r, "gaussian" R^T (r, d);
- "approximation" (``problem``) returns Ahat of rank r, "means" (``problem``, ``queries``,
  ``keys``) that of given clusters, "compressed" (``problem``) that of logits of width r;
- "best_output" (``output``, ``values``) returns a matrix of rank r;
- "rounded" (``x``, ``dtype``) returns x rounded;
- "skeleton" (``matrix``) returns rows and columns, "columns" (``matrix``, ``f``) k of them, and
  "volume_law" (``matrix``, ``subsets``) the probabilities of sets of columns.
"""

from __future__ import annotations

from . import factor_claims as factor_claims
from . import logit_claims as logit_claims
from . import skeleton_claims as skeleton_claims
from .formulas import Oblique as Oblique
from .formulas import OutputFactors as OutputFactors
from .formulas import VolumeSampling as VolumeSampling
from .formulas import exact_projector as exact_projector
from .formulas import exponential_determinant as exponential_determinant
from .formulas import jl_logit_width as jl_logit_width
from .formulas import largest_volume as largest_volume
from .formulas import logit_decoder as logit_decoder
from .formulas import minors as minors
from .formulas import numerical_rank as numerical_rank
from .formulas import oblique_maps as oblique_maps
from .formulas import output_factors as output_factors
from .formulas import rrqr_factor as rrqr_factor
from .formulas import skeleton_residual as skeleton_residual
from .formulas import strong_rrqr as strong_rrqr
from .formulas import volume_sampling as volume_sampling

__all__ = [
    "Oblique",
    "OutputFactors",
    "VolumeSampling",
    "exact_projector",
    "exponential_determinant",
    "jl_logit_width",
    "largest_volume",
    "logit_decoder",
    "minors",
    "numerical_rank",
    "oblique_maps",
    "output_factors",
    "rrqr_factor",
    "skeleton_residual",
    "strong_rrqr",
    "volume_sampling",
]


def __dir__() -> list[str]:
    return __all__
