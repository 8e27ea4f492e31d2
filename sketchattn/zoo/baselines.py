"""Floors and predictors: what nobody can beat, and what everybody must beat.

Sources and identities: the floors and trivial predictors that error curves are drawn against;
``|A - 11^T/n_k|_F^2 = |A|_F^2 - n_q/n_k`` for the mean of V, total variation ``1 - m_i`` for the
renormalised top-k whose kept mass is ``m_i``, Eckart-Young for the truncated SVD.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..base.arguments import check_choice, check_flag
from ..base.draws import Draw, check_columns
from ..operators.base import AttentionOperator
from ..operators.factored import FactoredAttention, zero_attention
from ..operators.pullback import (
    Gradient,
    chosen_pullback,
    columns_pullback,
    rows_pullback,
    zero_gradient,
)
from ..operators.sampled import SampledAttention
from ..operators.solve import softmax_over, solution, solve_over
from ..operators.visible_mean import VisibleMean
from ..problem import AttentionProblem
from .base import Method, Traits, register

if TYPE_CHECKING:
    from .decoding import DecodingState

Array = NDArray[Any]

# Rows of the exact matrix that an oracle looks at in one piece, in entries.
BLOCK_ENTRIES = 1 << 22


@register("exact")
class Exact(Method):
    """Return the exact matrix ``A = rowsoftmax(scale Q K^T)`` as an operator.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=8, d=4, rng=0)[0]
    >>> sa.Exact().approximate(problem).path
    'exact'
    """

    @property
    def traits(self) -> Traits:
        """Everything is honoured; nothing is approximated."""
        return Traits(
            causal=True,
            key_mask=True,
            randomized=False,
            row_stochastic=True,
            nonnegative=True,
            uses_rank=False,
            exact_at_full_rank=True,
            differentiable=True,
            logsumexp=True,
            quadratic=True,
            decoding=True,
        )

    def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        return problem.exact

    def _state(self, problem: AttentionProblem, length: int) -> DecodingState:
        from .decoding import ExactState  # loads the compiler

        return ExactState(problem)

    def _attend_with_lse(self, problem: AttentionProblem, draw: Draw) -> tuple[Array, Array]:
        output, lse = solution(problem)
        return output.copy(), lse.copy()

    def _vjp(self, problem: AttentionProblem, draw: Draw, cotangent: Array) -> Gradient:
        return rows_pullback(problem, None, problem.values, cotangent)


@register("zero")
class Zero(Method):
    """Predict zero: relative output error exactly 1.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=8, d=4, rng=0)[0]
    >>> sa.Zero().approximate(problem).rank_bound
    0
    """

    @property
    def traits(self) -> Traits:
        """A predictor: no rank, no randomness, no rows that sum to one."""
        return Traits(
            causal=True,
            key_mask=True,
            randomized=False,
            nonnegative=True,
            uses_rank=False,
            differentiable=True,
        )

    def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        return zero_attention(problem)

    def _vjp(self, problem: AttentionProblem, draw: Draw, cotangent: Array) -> Gradient:
        return zero_gradient(problem)


@register("vmean")
class VMean(Method):
    """Predict the mean of the values that a row sees: ``Ahat_ij = 1 / (visible keys of row i)``.

    Without a causal mask this is ``11^T/n_k`` and
    ``|A - Ahat|_F^2 = |A|_F^2 - n_q/n_k`` exactly.  A method that does not beat it is worthless.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=8, d=4, rng=0)[0]
    >>> sa.VMean().approximate(problem).rows(0)[0, 0].item()
    0.125
    """

    @property
    def traits(self) -> Traits:
        """A predictor: no rank, no randomness."""
        return Traits(
            causal=True,
            key_mask=True,
            randomized=False,
            row_stochastic=True,
            nonnegative=True,
            uses_rank=False,
            differentiable=True,
        )

    def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        return VisibleMean(problem)

    def _vjp(self, problem: AttentionProblem, draw: Draw, cotangent: Array) -> Gradient:
        return zero_gradient(problem)._replace(v=VisibleMean(problem).T @ cotangent)


@register("svd")
class SVDFloor(Method):
    """Return the best rank-r matrix: the truncated singular value decomposition of A.

    ``|A - Ahat|_2 = sigma_{r+1}`` and ``|A - Ahat|_F^2 = sum_{j>r} sigma_j^2`` (Eckart-Young).
    It does not look at V, so its *output* error is a reference line and no lower bound; rows do
    not sum to one, and on causal problems it has entries above the diagonal.

    Parameters
    ----------
    rank : int
        Number of singular triplets, in 1..n_k.

    Notes
    -----
    Computed once a problem, in float64: LAPACK where the smaller side is at most 2048,
    otherwise randomized block Krylov iteration on the streaming operator.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=8, d=4, rng=0)[0]
    >>> sa.SVDFloor(rank=2).approximate(problem).rank_bound
    2
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank

    @property
    def traits(self) -> Traits:
        """An oracle: it looks at the exact matrix."""
        return Traits(
            key_mask=True,
            randomized=False,
            oracle=True,
            exact_at_full_rank=True,
            quadratic=True,
        )

    def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        from ..operators.spectra import truncated_svd

        rank = min(self.rank, *problem.exact.shape)
        u, s, vt = truncated_svd(problem, rank)
        if problem.key_mask is not None:  # zero up to rounding, and zero it should be
            vt = np.where(problem.key_mask, vt, 0)
        dtype = problem.dtype
        return FactoredAttention(u.astype(dtype), s.astype(dtype), vt.astype(dtype), rank)


@register("topk")
class TopK(Method):
    """Keep the r largest entries of every row of A: the best that r keys a row can do.

    ``renormalize=True`` divides by the kept mass ``m_i``, and the total variation of the row is
    ``1 - m_i`` exactly; ``False`` keeps the entries as they are, the Frobenius floor over
    matrices with r entries a row.  Neither is of low rank.

    Parameters
    ----------
    rank : int
        Keys a row, in 1..n_k; rows that see fewer keep all of them.
    renormalize : bool, default True
        Whether rows sum to one.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=8, d=4, rng=0)[0]
    >>> (sa.TopK(rank=3).approximate(problem).to_dense() > 0).sum(axis=1).tolist()
    [3, 3, 3, 3, 3, 3, 3, 3]
    """

    def __init__(self, rank: int, renormalize: bool = True) -> None:
        self.rank = rank
        self.renormalize = renormalize

    @property
    def traits(self) -> Traits:
        """An oracle: it looks at the exact matrix."""
        return Traits(
            causal=True,
            key_mask=True,
            randomized=False,
            row_stochastic=bool(self.renormalize),
            nonnegative=True,
            oracle=True,
            exact_at_full_rank=True,
            quadratic=True,
        )

    def _check_parameters(self) -> None:
        check_flag(self.renormalize, "renormalize", "True makes rows sum to one")

    def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        n_q, n_k, r = problem.n_q, problem.n_k, int(self.rank)
        columns = np.empty((n_q, r), np.int64)
        weights = np.empty((n_q, r), problem.dtype)
        block = max(1, BLOCK_ENTRIES // max(n_k, 1))
        for start in range(0, n_q, block):
            part = slice(start, min(start + block, n_q))
            rows = problem.exact.rows(part)
            chosen = np.argpartition(rows, n_k - r, axis=1)[:, n_k - r :]
            columns[part] = np.sort(chosen, axis=1)
            weights[part] = np.take_along_axis(rows, columns[part], axis=1)
        if self.renormalize:
            mass = weights.sum(axis=1, keepdims=True)
            np.divide(weights, mass, out=weights, where=mass > 0)
        return SampledAttention(columns, weights, n_k, min(r, len(problem.kept_keys)))


ESTIMATORS = ("self-normalized", "horvitz-thompson")


@register("uniform")
class UniformColumns(Method):
    """Attend to r keys drawn uniformly without replacement, nested in r.

    ``self-normalized``: ``rowsoftmax`` over the drawn keys, row-stochastic and biased; a row that
    sees none of them is zero.  ``horvitz-thompson``: ``Ahat_{:,J} = (n/r) A_{:,J}`` with the exact
    normalisers, unbiased, and with n the number of keys that are not masked
    ``E |Ohat - O|_F^2 = (n^2/r)(1 - r/n) S^2``, ``S^2 = sum_j |x_j - xbar|_F^2 / (n - 1)``,
    ``x_j = A_{:,j} v_j^T``.

    Parameters
    ----------
    rank : int
        Number of keys, in 1..n_k; where fewer are not masked, ``effective_rank`` says so.
    estimator : {"self-normalized", "horvitz-thompson"}
        How the drawn keys are weighted.

    Notes
    -----
    A draw holds ``columns``, int64 (r,), the keys J in the order of drawing.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=8, d=4, rng=0)[0]
    >>> sa.UniformColumns(rank=3).draw(problem, rng=0)["columns"].shape
    (3,)
    """

    draw_names = ("columns",)

    def __init__(self, rank: int, estimator: str = "self-normalized") -> None:
        self.rank = rank
        self.estimator = estimator

    @property
    def traits(self) -> Traits:
        """Everything is honoured; rows sum to one where the drawn keys are normalised."""
        return Traits(
            causal=True,
            key_mask=True,
            row_stochastic=self.estimator == "self-normalized",
            nonnegative=True,
            exact_at_full_rank=True,
            differentiable=True,
            logsumexp=self.estimator == "self-normalized",
        )

    def _check_parameters(self) -> None:
        check_choice(self.estimator, "estimator", ESTIMATORS)

    def _draw(self, problem: AttentionProblem, rng: np.random.Generator) -> Draw:
        return Draw(columns=rng.permutation(problem.kept_keys)[: self.rank])

    def _check_draw(self, problem: AttentionProblem, draw: Mapping[str, Any]) -> Draw:
        checked = super()._check_draw(problem, draw)
        columns = check_columns(checked["columns"], problem.kept_keys)
        wanted = min(int(self.rank), len(problem.kept_keys))
        if len(columns) != wanted:
            raise ValueError(
                f"columns must hold {wanted} keys for rank = {self.rank}, got {len(columns)}; "
                f"change rank or the draw"
            )
        return Draw(columns=columns)

    def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        columns = draw["columns"]
        if self.estimator == "self-normalized":
            weights = softmax_over(problem, columns)
        else:
            kept = len(problem.kept_keys)
            weights = problem.exact.columns(columns)
            weights *= problem.dtype.type(kept / max(len(columns), 1))
        return SampledAttention(columns, weights, problem.n_k, len(columns))

    def _attend_with_lse(self, problem: AttentionProblem, draw: Draw) -> tuple[Array, Array]:
        columns = draw["columns"]
        output, lse = solve_over(problem, columns, problem.values[columns])
        # Each drawn key stands for n_k/r of those that are not masked.
        share = len(problem.kept_keys) / max(len(columns), 1)
        return output, lse + problem.dtype.type(np.log(max(share, 1.0)))

    def _vjp(self, problem: AttentionProblem, draw: Draw, cotangent: Array) -> Gradient:
        columns = draw["columns"]
        if self.estimator == "self-normalized":
            return columns_pullback(problem, columns, cotangent)
        factor = len(problem.kept_keys) / max(len(columns), 1)
        return chosen_pullback(problem, columns, np.full(len(columns), factor), cotangent)
