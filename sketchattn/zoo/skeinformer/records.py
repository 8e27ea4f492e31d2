"""What a Skeinformer tells about itself: what it drew, and where its error comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class SkeinformerDetails:
    """Hold what a Skeinformer drew and computed on the way.

    Attributes
    ----------
    pilot_rows : int64 array (s,)
        I in drawing order, repeats kept; empty where no pilots are used.
    columns : int64 array (t,)
        J in drawing order.
    probabilities : float64 array (n_k,)
        The law that J was drawn from.
    log_fill : ndarray (n_q,)
        ``ln g_i`` with the logits as they are, -inf without a fill.
    log_total : ndarray (n_q,)
        ``ln D_i``.
    mass_outside : ndarray (n_q,)
        What ``Ahat_i`` puts on keys outside J, before pilot rows are put back.
    effective_rank : int
        Number of distinct columns.
    row_sums : (float, float)
        Smallest and largest row sum of ``Ahat``.
    """

    pilot_rows: Array
    columns: Array
    probabilities: Array
    log_fill: Array
    log_total: Array
    mass_outside: Array
    effective_rank: int
    row_sums: tuple[float, float]


@dataclass(frozen=True, eq=False)
class ErrorTerms:
    """Split the error of rows that are no pilots: ``A_i V - Ohat_i = normalizer_i + shape_i``.

    Attributes
    ----------
    normalizer : ndarray (n_q, d_v)
        ``(tau_i - tauhat_i)(vbar_i - h_i)``: the mass outside J is wrong.
    shape : ndarray (n_q, d_v)
        ``tau_i (t_i - vbar_i)``: the keys outside J are not equally important.
    mass, mass_hat : ndarray (n_q,)
        ``tau`` and ``tauhat``, the mass outside J of A and of ``Ahat``.
    """

    normalizer: Array
    shape: Array
    mass: Array
    mass_hat: Array
