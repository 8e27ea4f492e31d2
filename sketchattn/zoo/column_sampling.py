"""Column sampling with weights: the estimator that the theory of matrix multiplication is about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..base.arguments import check_choice, check_flag
from ..base.draws import Draw, check_columns
from ..operators.base import AttentionOperator
from ..operators.pullback import Gradient, chosen_pullback, columns_pullback
from ..operators.sampled import SampledAttention
from ..operators.solve import softmax_over
from ..problem import AttentionProblem
from ..sampling.draws import ColumnDraw, sample_columns
from ..sampling.laws import (
    check_law,
    check_mix,
    check_pilots,
    check_ridge,
    check_unbiased,
    probabilities,
)
from .base import Method, Traits, register

Array = NDArray[Any]

NORMALIZERS = ("exact", "sampled")

# What is proved of columns drawn with replacement and weighted, the exact matrix given.
PRODUCT_CLAIMS = (
    "skeinformer.unbiased",
    "skeinformer.expected_error_exact",
    "skeinformer.expected_error_uniform",
    "skeinformer.expected_error_value",
    "skeinformer.expected_error_pilot",
    "skeinformer.expected_error_support",
    "skeinformer.proposition1",
    "skeinformer.proposition1_pilot",
    "skeinformer.dkm_T",
    "skeinformer.mcdiarmid_T",
    "skeinformer.mcdiarmid_exact",
    "skeinformer.markov",
    "skeinformer.bound_order",
)

# A draw may have been stored in float32: its weights agree with its probabilities this far.
WEIGHT_TOLERANCE = 1e-5


@register("column_sampling")
class ColumnSampling(Method):
    """Sample columns of A by a law and weigh them: ``Ahat = A S^T S``, unbiased.

    ``S^T S = sum_t w_t e_{j_t} e_{j_t}^T`` with r indices drawn from p with replacement and
    ``w = 1/(r p_j)``.  Then ``E[Ahat] = A`` on all columns with p > 0, and
    ``E |Ahat V - A V|_F^2 = (sum_j |A_:j|^2 |V_j|^2 / p_j - |A V|_F^2)/r``.

    Parameters
    ----------
    rank : int
        Number of draws r, in 1..n_k.
    law : str or array (n_k,)
        A name from ``sketchattn.sampling.LAWS``, or probabilities that sum to one.  "optimal"
        (``|A_:j| |V_j|``, the minimum of the error) looks at all of A; "pilot" at some rows.
    replace : bool, default True
        False draws distinct columns: uniformly with the weights ``m/r`` where all positive p are
        equal, otherwise one after another with priority weights (``sample_gumbel``).  Unbiased
        too, with another variance.
    normalizer : {"exact", "sampled"}
        "exact" takes entries of A, with the normalisers of the full rows.  "sampled" normalises
        over the drawn columns, ``w_j A_ij / sum_l w_l A_il``: row-stochastic, no need of the full
        rows, and biased; no formula above holds for it.
    mix : float, default 0
        Share of the uniform law, in [0, 1].
    pilots : int or int array (s,), default 64
        For law "pilot": how many rows of A to draw with replacement, or which rows.
    ridge : float, optional
        For the laws "ridge" and "ridge_recursive": ``lam / tr K``; None is ``1/rank``, which
        bounds the effective dimension by the rank.

    Notes
    -----
    Drineas, Kannan and Mahoney, "Fast Monte Carlo algorithms for matrices I" (2006).  Repeated
    draws of a column are merged and their weights add up; ``effective_rank`` is the number of
    distinct columns.  With law="uniform" or given probabilities a row depends on the tokens that
    it sees only, and causal problems are honoured; all other laws look at all tokens, the
    future of a query included, and refuse them.

    A draw holds ``columns``, int64, the keys in the order of drawing, and for each of them
    ``weights``, float64, its w, and ``probabilities``, its p.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=8, d=4, rng=0)[0]
    >>> method = ColumnSampling(rank=4, law="value_norm")
    >>> draw = method.draw(problem, rng=0)
    >>> sorted(draw)
    ['columns', 'probabilities', 'weights']
    >>> method.approximate(problem, draw=draw).effective_rank == len(set(draw["columns"].tolist()))
    True
    """

    draw_names = ("columns", "weights", "probabilities")

    def __init__(
        self,
        rank: int,
        law: str | ArrayLike = "optimal",
        replace: bool = True,
        normalizer: str = "exact",
        mix: float = 0.0,
        pilots: int | ArrayLike = 64,
        ridge: float | None = None,
    ) -> None:
        self.rank = rank
        self.law = law
        self.replace = replace
        self.normalizer = normalizer
        self.mix = mix
        self.pilots = pilots
        self.ridge = ridge

    @property
    def traits(self) -> Traits:
        """Masks and shapes are honoured; causal problems only by laws that see no token."""
        return Traits(
            causal=not isinstance(self.law, str) or self.law == "uniform",
            key_mask=True,
            row_stochastic=self.normalizer == "sampled",
            nonnegative=True,
            exact_at_full_rank=(
                not self.replace and isinstance(self.law, str) and self.law == "uniform"
            ),
            claims=self._claims(),
            differentiable=True,
            quadratic=(
                self.normalizer != "sampled"
                or (isinstance(self.law, str) and self.law == "optimal")
            ),
        )

    def _claims(self) -> tuple[str, ...]:
        """Return the ids of what is proved of this estimator: nothing if it renormalises."""
        if self.normalizer != "exact":
            return ()
        if self.replace:
            return PRODUCT_CLAIMS
        if isinstance(self.law, str) and self.law == "uniform":
            return ("skeinformer.expected_error_without", "sketching.moment_sample_without")
        return ("sketching.moment_sample_gumbel",)

    def _check_parameters(self) -> None:
        check_law(self.law)
        check_flag(self.replace, "replace", "True draws a column again and again")
        check_choice(self.normalizer, "normalizer", NORMALIZERS)
        check_mix(self.mix)
        check_pilots(self.pilots)
        if self.ridge is not None:
            check_ridge(self.ridge)

    def _draw(self, problem: AttentionProblem, rng: np.random.Generator) -> Draw:
        p = probabilities(
            self.law,
            problem,
            mix=self.mix,
            pilots=self.pilots,
            ridge=1.0 / self.rank if self.ridge is None else self.ridge,
            rng=rng,
        )
        if self.normalizer == "exact":
            check_unbiased(p, problem)
        drawn = sample_columns(p, int(self.rank), rng, replace=bool(self.replace))
        return Draw(columns=drawn.columns, weights=drawn.weights, probabilities=drawn.probabilities)

    def _check_draw(self, problem: AttentionProblem, draw: Mapping[str, Any]) -> Draw:
        checked = super()._check_draw(problem, draw)
        rank, replace = int(self.rank), bool(self.replace)
        columns = check_drawn(checked["columns"], problem.kept_keys, rank, replace)
        weights, p = (
            check_drawn_numbers(checked[name], name, len(columns))
            for name in ("weights", "probabilities")
        )
        if len(p) and p.max() > 1 + WEIGHT_TOLERANCE:
            raise ValueError(
                f"probabilities must be at most 1, got {p.max():.6g}; give those of the columns"
            )
        check_weights(weights, p, rank, replace)
        return Draw(columns=columns, weights=weights, probabilities=p)

    def _merged(self, problem: AttentionProblem, draw: Draw) -> tuple[Array, Array]:
        """Return the distinct columns of a draw and the sums of their weights."""
        return ColumnDraw(
            draw["columns"].copy(),
            draw["weights"].copy(),
            draw["probabilities"].copy(),
            problem.n_k,
            int(self.rank),
            bool(self.replace),
        ).merged()

    def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        columns, weights = self._merged(problem, draw)
        if self.normalizer == "exact":
            entries = problem.exact.columns(columns)
            entries *= weights.astype(problem.dtype)
        else:
            entries = softmax_over(problem, columns, weights)
        return SampledAttention(columns, entries, problem.n_k, len(columns))

    def _vjp(self, problem: AttentionProblem, draw: Draw, cotangent: Array) -> Gradient:
        columns, weights = self._merged(problem, draw)
        if self.normalizer == "exact":
            return chosen_pullback(problem, columns, weights, cotangent)
        return columns_pullback(problem, columns, cotangent, weights)


def check_drawn(columns: Array, keys: Array, rank: int, replace: bool) -> Array:
    """Return columns of a draw by a law as int64: keys, as many as ``rank`` draws may be."""
    if replace:
        # Repeats are part of the law; everything else is checked on the distinct ones.
        check_columns(np.unique(columns) if columns.ndim == 1 else columns, keys)
        columns = columns.astype(np.int64)
    else:
        columns = check_columns(columns, keys)
    most = rank if len(keys) else 0
    if len(columns) > most or (replace and len(columns) != most):
        wanted = "" if replace else "at most "
        raise ValueError(
            f"columns must hold {wanted}{most} keys for rank = {rank}, got {len(columns)}; "
            f"change rank or the draw"
        )
    return columns


def check_weights(weights: Array, p: Array, rank: int, replace: bool) -> None:
    """Refuse weights of drawn columns that their probabilities p do not make unbiased."""
    unbiased = 1.0 / (rank * p) if replace else 1.0 / p
    wrong = np.abs(weights - unbiased) > WEIGHT_TOLERANCE * unbiased
    if wrong.any():
        t = int(wrong.argmax())
        formula = "1/(rank p)" if replace else "1/p"
        raise ValueError(
            f"weights must be {formula} = {unbiased[t]:.9g} at position {t} for the "
            f"probabilities of the draw, got {weights[t]:.9g}; other weights are biased"
        )


def check_drawn_numbers(x: Array, name: str, length: int) -> Array:
    """Return positive finite numbers, one for each drawn column, as float64."""
    if x.dtype.kind != "f":
        raise TypeError(f"{name} must hold floating-point numbers, got {x.dtype}; convert them")
    if x.shape != (length,):
        raise ValueError(
            f"{name} must have shape ({length},), got {x.shape}; give one for each drawn column"
        )
    wrong = ~(np.isfinite(x) & (x > 0))
    if wrong.any():
        t = int(wrong.argmax())
        raise ValueError(
            f"{name} must be finite and positive, got {x[t]} at position {t}; a column with "
            f"probability zero cannot be drawn"
        )
    return x.astype(np.float64)
