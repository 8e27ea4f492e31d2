"""Combiner: what direct keys and region summaries lose of A, row by row.

``Ahat_ij = exp(L_ij)/Zhat_i`` on direct keys and ``rho_i(t) lam_t(j)`` on regions.  The published
paper states no bound of its error.  The claims of this topic say what it is made of (masses and
local distributions), when it is zero, how a row is bounded sharply by the log-ratio error eta, what
can be certified without forming the logits, what no choice of summaries can undercut, and which
algebra plans obey.

To check another implementation, hand it in as ``sketch``: it is called as
``sketch("combiner", r, n_k, rng, problem=problem, plan=plan, q0=q0, rule=rule)`` and returns Ahat
(n_q, n_k), and as ``sketch("log_normalizer", ...)`` with the same arguments, which returns log Zhat
(n_q,); ``sketch("certificate", r, n_k, rng, operator=ahat)`` returns a mapping from names to bounds
of rows as `sketchattn.certify_rows` does, ``sketch("mixture", ...)`` (``parts``, ``weights``) the
average of matrices, and ``sketch("merge", ...)`` (``e``, ``keys``, ``parts``) the expected key
and the entropy (d + 1,) of a region in parts.
"""

from __future__ import annotations

from . import bound_claims as bound_claims
from . import row_claims as row_claims
from .cases import extremal_row as extremal_row
from .formulas import Case as Case
from .formulas import Setting as Setting
from .formulas import pair_span as pair_span
from .formulas import specht_log as specht_log
from .formulas import structural_floor as structural_floor

__all__ = [
    "Case",
    "Setting",
    "extremal_row",
    "pair_span",
    "specht_log",
    "structural_floor",
]


def __dir__() -> list[str]:
    return __all__
