"""Nystromformer: three small softmax matrices in place of A, joined by a pseudo-inverse.

With r landmark queries Qc and keys Kc: ``F = rowsoftmax(scale Q Kc^T)``,
``M = rowsoftmax(scale Qc Kc^T)``, ``B = rowsoftmax(scale Qc K^T)`` and ``Ahat = F Z B``, Z close to
the pseudo-inverse of M.  It is no CUR decomposition of A: the three softmaxes are normalised over
different sets, so landmarks among the keys do not make it exact, landmarks among the queries do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..base.arguments import (
    as_array,
    as_real,
    check_choice,
    check_count,
    check_finite,
    check_flag,
    float_dtype,
)
from ..base.draws import Draw, Rng, check_draw
from ..operators.base import AttentionOperator, Index, pick
from ..operators.factored import FactoredAttention, zero_attention
from ..problem import AttentionProblem
from ..sampling.landmarks import chosen_rows, kmeans, segment_means
from ..sketches.base import streams
from .base import Method, Traits, check_preset, in_force, register

Array = NDArray[Any]

LANDMARKS = ("segment_means", "kmeans", "random", "leverage")
MASKING = ("delete", "zero")
KMEANS_STEPS = 10
# About the iteration, about the inverse that it stands for, and about any product of so few
# factors.
ITERATION_CLAIMS = (
    "lowrank_baselines.residual_recursion",
    "lowrank_baselines.residual_norm",
    "lowrank_baselines.iteration_filter",
    "lowrank_baselines.iteration_order",
    "lowrank_baselines.iteration_norm",
    "lowrank_baselines.row_sums_iterated",
    "lowrank_baselines.more_accurate",
)
INVERSE_CLAIMS = (
    "lowrank_baselines.all_landmarks",
    "lowrank_baselines.all_landmarks_singular",
    "lowrank_baselines.queries_suffice",
    "lowrank_baselines.keys_suffice",
    "lowrank_baselines.every_token",
    "lowrank_baselines.row_sums",
)
FACTOR_CLAIMS = ("lowrank_baselines.rank_floor", "dba.matrix_floor", "dba.output_floor")
# Up to here an error of eps c in an eigenvalue of M M^T grows to 3.25^8 eps = 3e-12 at most.
GRAM_STEPS = 8
# Row sums up to here are not divided by: they can be zero or negative.
LEAST_ROW_SUM = 0.1


class Core(NamedTuple):
    """Name the choices that make one estimator; defaults are those of the paper."""

    landmarks: str | ArrayLike = "segment_means"
    iterations: int | None = 6
    ridge: float = 0.0
    masking: str = "delete"


# What each released variant changes; both are the paper's where r divides n and no key is masked.
PRESETS: dict[str, dict[str, Any]] = {
    "original": {"iterations": 6, "masking": "zero"},
    "nystrom-attention": {"iterations": 6},
}


# --- the pseudo-inverse -------------------------------------------------------------------------


def iterate_inverse(m: ArrayLike, iterations: int = 6) -> Array:
    """Approximate the pseudo-inverse of one matrix by the published iteration.

    ``Z_0 = M^T / (|M|_1 |M|_inf)``, ``Z <- Z (13 I - X (15 I - X (7 I - X))) / 4``, ``X = M Z``.

    Parameters
    ----------
    m : array (r, r)
    iterations : int
        At least 0.

    Returns
    -------
    ndarray (r, r), float64

    Raises
    ------
    TypeError, ValueError
        For arrays that are no finite square matrix, and counts below 0.

    Notes
    -----
    With ``E = I - M Z`` one step is ``E <- (3 E^3 + E^4) / 4`` exactly: third order where it
    converges.  The start is scaled by the norms of this matrix alone; released codes take the
    largest of all heads, so that the result of one head depends on the others.

    Examples
    --------
    >>> iterate_inverse([[0.5]], 8).round(12).tolist()
    [[2.0]]
    """
    from ..kernels._threads import blas_single_thread

    matrix = _square(m)
    steps = _count(iterations)
    z = np.ascontiguousarray(matrix.T) / _start_scale(matrix)
    unit = np.eye(len(matrix))
    with blas_single_thread():  # the same bits for any number of threads
        for _ in range(steps):
            x = matrix @ z
            z = 0.25 * z @ (13 * unit - x @ (15 * unit - x @ (7 * unit - x)))
    return np.asarray(z)


def filter_inverse(m: ArrayLike, iterations: int = 6) -> Array:
    """Evaluate the same iteration from one decomposition, in half the time.

    ``Z_j = W diag((1 - f^(j)(1 - s^2/c)) / s) P^T`` for ``M = P diag(s) W^T``,
    ``c = |M|_1 |M|_inf`` and ``f(e) = (3 e^3 + e^4) / 4``: the iteration is a spectral filter.
    It lets singular values below about ``3.25^(-j/2) sqrt(c)`` go to zero in place of inverting
    them.

    Parameters
    ----------
    m, iterations
        As for `iterate_inverse`.

    Returns
    -------
    ndarray (r, r), float64

    Notes
    -----
    ``Z_j = M^T g(M M^T / c) / c`` with ``g = prod_i (13 - 15 p_i + 7 p_i^2 - p_i^3) / 4`` and
    ``p_(i+1)`` the factor times ``p_i``, ``p_0`` the eigenvalue; nothing is divided by.  Few steps
    do not see what squaring singular values loses; many do, and then take these themselves.

    Examples
    --------
    >>> filter_inverse([[0.5]], 8).round(12).tolist()
    [[2.0]]
    """
    from ..kernels._threads import blas_single_thread

    matrix = _square(m)
    steps = _count(iterations)
    scale = _start_scale(matrix)
    with blas_single_thread():  # the same bits for any number of threads
        if steps <= GRAM_STEPS:
            values, p = np.linalg.eigh((matrix @ matrix.T) / scale)
            gain = _filter(np.maximum(values, 0), steps) / scale
            return np.asarray(((matrix.T @ p) * gain) @ p.T)
        p, s, wt = np.linalg.svd(matrix)
        gain = s * _filter(s**2 / scale, steps) / scale
        return np.asarray((wt.T * gain) @ p.T)


def _filter(p: Array, steps: int) -> Array:
    """Return ``g(p) = (1 - f^(j)(1 - p)) / p`` without the division."""
    gain = np.ones_like(p)
    for _ in range(steps):
        factor = 0.25 * (13 - p * (15 - p * (7 - p)))
        gain, p = gain * factor, p * factor
    return gain


def pseudo_inverse(m: ArrayLike, ridge: float = 0.0, rcond: float | None = None) -> Array:
    """Return the pseudo-inverse with a cut-off, or the ridge inverse, of one matrix.

    Singular values up to ``rcond s_1`` give zero, others ``1/s``, or with a ridge
    ``s / (s^2 + ridge s_1^2)``, which is ``(M^T M + ridge s_1^2 I)^-1 M^T``.

    Parameters
    ----------
    m : array (r, r)
    ridge : float, default 0
        At least 0, relative to ``s_1^2``.
    rcond : float, optional
        In [0, 1); by default ``r eps`` of float64.

    Returns
    -------
    ndarray (r, r), float64

    Examples
    --------
    >>> pseudo_inverse([[0.5, 0.0], [0.0, 0.0]]).tolist()
    [[2.0, 0.0], [0.0, 0.0]]
    """
    from ..kernels._threads import blas_single_thread

    matrix = _square(m)
    extra = _fraction(ridge, "ridge", math.inf)
    cut = len(matrix) * float(np.finfo(np.float64).eps)
    cut = cut if rcond is None else _fraction(rcond, "rcond", 1.0)
    with blas_single_thread():  # the same bits for any number of threads
        p, s, wt = np.linalg.svd(matrix)
        high = s.max(initial=0.0)
        size = s**2 + extra * high**2
        gain = np.divide(s, size, out=np.zeros_like(s), where=s > cut * high)
        return np.asarray((wt.T * gain) @ p.T)


def _start_scale(matrix: Array) -> float:
    """Return ``|M|_1 |M|_inf``, at least ``s_1^2``; 1 for a zero matrix."""
    size = np.abs(matrix)
    scale = size.sum(axis=0).max(initial=0.0) * size.sum(axis=1).max(initial=0.0)
    return float(scale) if scale > 0 else 1.0


def _square(m: ArrayLike) -> Array:
    matrix = np.ascontiguousarray(as_array(m, "m"), dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"m must be a square matrix, got shape {matrix.shape}; pass (r, r)")
    check_finite(matrix, "m")
    return matrix


def _count(iterations: object) -> int:
    remedy = "the paper takes 6, None is the exact pseudo-inverse"
    return check_count(iterations, "iterations", remedy, 0, " or None")


def _fraction(value: object, label: str, below: float) -> float:
    number = as_real(value, label, "0 is none")
    if not 0 <= number < below:
        raise ValueError(
            f"{label} must be finite and in [0, {below:g}), got {number}; 0 switches it off"
        )
    return number


# --- landmarks ----------------------------------------------------------------------------------


def _centers(x: Array, r: int, seed: int) -> Array:
    """Return r centroids, float64 (r, d); equal rows may leave fewer, which are then repeated."""
    centers = kmeans(x, r, seed, steps=KMEANS_STEPS).centers
    return centers[np.arange(r) % len(centers)]


def small_softmax(queries: Array, keys: Array, scale: float, counts: Array | None = None) -> Array:
    """Return ``rowsoftmax(scale Qc Kc^T + 1 log(c)^T)`` (m_q, m_k) in float64.

    A core is small, and a pseudo-inverse of it needs digits.  ``counts`` (m_k,) are positive.
    """
    from ..kernels._threads import blas_single_thread

    with blas_single_thread(), np.errstate(over="ignore", invalid="ignore"):
        logits = scale * (queries.astype(np.float64) @ keys.astype(np.float64).T)
    check_finite(logits, "scale * landmark queries @ landmark keys.T")
    if counts is not None:
        logits += np.log(counts)
    logits -= logits.max(axis=1, keepdims=True)
    weights: Array = np.exp(logits)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


# --- rows that sum to one -----------------------------------------------------------------------


class RenormalizedAttention(FactoredAttention):
    """Represent ``diag(1/w) U S P``: w is the row sum where it exceeds 0.1, and 1 elsewhere.

    Parameters
    ----------
    u, s, p, effective_rank, remake
        As for `FactoredAttention`; rows of ``p`` sum to one.

    Attributes
    ----------
    sums : ndarray (n_q,)
        Row sums of ``U S P``.
    divisor : ndarray (n_q,)
        ``w``.
    """

    def __init__(
        self,
        u: Array | AttentionOperator,
        s: Array,
        p: Array | AttentionOperator,
        effective_rank: int | None = None,
        *,
        remake: Any = None,
    ) -> None:
        super().__init__(u, s, p, effective_rank, remake=remake)
        self.sums = np.asarray(self.u @ s.sum(axis=1, dtype=np.float64).astype(self.dtype))
        self.divisor = np.where(self.sums > LEAST_ROW_SUM, self.sums, self.dtype.type(1))

    def _matmat(self, x: Array) -> Array:
        return super()._matmat(x) / self.divisor[:, None]

    def _rmatmat(self, y: Array) -> Array:
        return super()._rmatmat(self._cast(y) / self.divisor[:, None])

    def rows(self, index: Index) -> Array:
        """Return chosen rows as a dense array (len(index), n_k)."""
        chosen = pick(self.shape[0], index)
        return super().rows(chosen) / self.divisor[chosen, None]


class NystromDetails(NamedTuple):
    """Hold how far the rows of ``Ahat`` are from summing to one, before they are divided.

    Attributes
    ----------
    least_sum, largest_sum : float
        Range of the row sums of ``F Z B``.
    not_renormalized : int
        Rows that ``renormalize=True`` leaves as they are, since they sum to 0.1 or less.
    """

    least_sum: float
    largest_sum: float
    not_renormalized: int


# --- the method ---------------------------------------------------------------------------------


@register("nystromformer")
class Nystromformer(Method):
    """Join three small softmax matrices: ``Ahat = F Z B`` with Z close to the pseudo-inverse of M.

    ``F = rowsoftmax(scale Q Kc^T)``, ``M = rowsoftmax(scale Qc Kc^T)``,
    ``B = rowsoftmax(scale Qc K^T)`` for landmarks Qc, Kc (r, d).

    Parameters
    ----------
    rank : int
        Number of landmarks r, in 1..n_k; where there are fewer queries or keys, as many as these,
        which ``effective_rank`` says.
    landmarks : {"segment_means", "kmeans", "random", "leverage"} or array (2, r, d)
        Means of r segments of consecutive queries and keys; centroids of k-means (k-means++, 10
        Lloyd steps) on each; rows drawn without replacement, uniformly or by leverage scores of Q
        and of K; or the landmark queries and keys themselves.
    iterations : int or None, default 6
        Steps of the published iteration, as `filter_inverse` evaluates them; None: the
        pseudo-inverse by singular values.
    ridge : float, default 0
        With ``iterations=None``: ``Z = (M^T M + ridge s_1^2 I)^-1 M^T``.
    rcond : float, optional
        With ``iterations=None``: singular values up to ``rcond s_1`` count as zero.
    masking : {"delete", "zero"}
        Masked keys are deleted before the segments are made, or, as in the original code, count as
        zeros in their means, and so do the queries at masked positions where n_q = n_k.
    preset : {None, "original", "nystrom-attention"}
        A released variant: 6 iterations on segment means, for the first with ``masking="zero"``.
    renormalize : bool, default False
        Divide rows by their sums where these exceed 0.1; `details` counts the others.
    convolution : array (m,), optional
        Weights w of the depthwise convolution that released codes add, m odd:
        ``Ohat_i = (Ahat V)_i + sum_t w_t v_(i + t - (m - 1)/2)``, zeros beyond the ends and at
        masked keys; n_q = n_k.  It approximates nothing: `attend` gives the output, `approximate`
        refuses.

    Raises
    ------
    TypeError, ValueError
        For values out of range, options that would be ignored, and causal problems.

    Notes
    -----
    Xiong, Zeng, Chakraborty, Tan, Fung, Li and Singh (2021), arXiv 2102.03902.  Rows need not sum
    to one and entries can be negative: six steps are a regularised inverse, and more accurate is
    not better, since M is ill-conditioned.  ``Ahat = A`` where every query is a landmark and M is
    inverted exactly, whatever the landmark keys.

    Deviations from released codes: nothing is shared between heads (they scale the start of the
    iteration by a maximum over all heads and entries of the batch); segments differ in length by
    one where r does not divide n ("nystrom-attention" pads in front with tokens that take part);
    r = n is not replaced by exact attention; the convolution of V, of length 33, 35 or 65 there, is
    off by default.

    Cost ``O((n_q + n_k) r (d + d_v) + r^3)``; F and B are never held.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=16, d=4, rng=0)[0]
    >>> ahat = sa.Nystromformer(rank=4).approximate(problem)
    >>> ahat.rank_bound, (ahat @ problem.v).shape
    (4, (16, 4))
    >>> more = sa.Nystromformer(rank=4, convolution=[0.0, 1.0, 0.0]).attend(problem)
    >>> bool(abs(more - (ahat @ problem.v + problem.v)).max() < 1e-5)
    True
    """

    def __init__(
        self,
        rank: int,
        landmarks: str | ArrayLike = "segment_means",
        iterations: int | None = 6,
        ridge: float = 0.0,
        rcond: float | None = None,
        masking: str = "delete",
        preset: str | None = None,
        renormalize: bool = False,
        convolution: ArrayLike | None = None,
    ) -> None:
        self.rank = rank
        self.landmarks = landmarks
        self.iterations = iterations
        self.ridge = ridge
        self.rcond = rcond
        self.masking = masking
        self.preset = preset
        self.renormalize = renormalize
        self.convolution = convolution

    @property
    def core(self) -> Core:
        """The choices in force: the arguments, and what the preset changes."""
        return in_force(self, Core(), PRESETS)

    @property
    def _draws(self) -> bool:
        landmarks = self.core.landmarks
        return isinstance(landmarks, str) and landmarks != "segment_means"

    @property
    def traits(self) -> Traits:
        """Masks and shapes are honoured; rows do not sum to one, entries can be negative."""
        plain = self.convolution is None
        inverse = INVERSE_CLAIMS if self.core.iterations is None else ITERATION_CLAIMS
        return Traits(
            key_mask=True,
            rectangular=plain,
            randomized=self._draws,
            matrix=plain,
            claims=inverse + FACTOR_CLAIMS if plain else (),
        )

    @property
    def draw_names(self) -> tuple[str, ...]:  # type: ignore[override]  # they depend on parameters
        """``("landmarks",)`` where they are drawn."""
        return ("landmarks",) if self._draws else ()

    # --- arguments --------------------------------------------------------------------------

    def check(self, problem: AttentionProblem) -> None:
        """Refuse a problem that this method cannot honour, or hyper-parameters out of range."""
        super().check(problem)
        if not isinstance(self.landmarks, str):
            self._check_landmarks(self.landmarks, problem, "landmarks", int(self.rank))

    def _check_parameters(self) -> None:
        check_preset(self, Core(), PRESETS, whole=True)
        check_flag(self.renormalize, "renormalize")
        if self.convolution is not None:
            weights = as_array(self.convolution, "convolution")
            float_dtype(weights, "convolution")
            if weights.ndim != 1 or len(weights) % 2 == 0:
                raise ValueError(
                    f"convolution must have shape (m,) with m odd, got {weights.shape}; give one "
                    f"weight for each neighbour and one for the token itself"
                )
            check_finite(weights, "convolution")
        if isinstance(self.landmarks, str):
            check_choice(self.landmarks, "landmarks", LANDMARKS, ", or an array (2, r, d)")
        if self.iterations is not None:
            _count(self.iterations)
        ridge = _fraction(self.ridge, "ridge", math.inf)
        if self.rcond is not None:
            _fraction(self.rcond, "rcond", 1.0)
        for label, used in (("ridge", ridge > 0), ("rcond", self.rcond is not None)):
            if used and self.iterations is not None:
                raise ValueError(
                    f"{label} must be left out with iterations = {self.iterations}, which do not "
                    f"use it, got {getattr(self, label)!r}; pass iterations=None"
                )
        check_choice(self.masking, "masking", MASKING)
        if self.masking == "zero" and not (
            isinstance(self.landmarks, str) and self.landmarks == "segment_means"
        ):
            raise ValueError(
                "masking must be 'delete' unless landmarks are segment means, got 'zero'; "
                "masked keys are never drawn"
            )

    def _check_landmarks(
        self, given: ArrayLike, problem: AttentionProblem, label: str, most: int
    ) -> Array:
        array = as_array(given, label)
        float_dtype(array, label)
        wanted = (2, most, problem.d)
        if array.shape != wanted:
            raise ValueError(
                f"{label} must have shape (2, r, d) = {wanted}, got {array.shape}; "
                f"landmark queries first, landmark keys second"
            )
        check_finite(array, label)
        return array

    def _check_draw(self, problem: AttentionProblem, draw: Mapping[str, Any]) -> Draw:
        made = check_draw(draw, self.draw_names)
        if self._draws:
            self._check_landmarks(made["landmarks"], problem, "landmarks", self._budget(problem))
        return made

    def _budget(self, problem: AttentionProblem) -> int:
        return min(int(self.rank), problem.n_q, len(problem.kept_keys))

    # --- the approximation ------------------------------------------------------------------

    def _draw(self, problem: AttentionProblem, rng: np.random.Generator) -> Draw:
        if not self._draws:
            return Draw()
        law, r = str(self.landmarks), self._budget(problem)
        if r == 0:
            return Draw(landmarks=np.zeros((2, 0, problem.d)))
        sides = (problem.q, problem.k[problem.kept_keys])
        if law == "kmeans":
            made = [_centers(x, r, int(rng.integers(2**31))) for x in sides]
        else:
            # A stream for each side, so that a larger rank extends the draw of both.
            made = [
                np.asarray(x[chosen_rows(x, r, law, stream)], np.float64)
                for x, stream in zip(sides, streams(rng, 2), strict=True)
            ]
        return Draw(landmarks=np.stack(made))

    def _landmarks(self, problem: AttentionProblem, draw: Draw) -> tuple[Array, Array]:
        """Return the landmark queries and keys, float64 (r, d)."""
        core, keep = self.core, problem.key_mask
        if not isinstance(core.landmarks, str):
            queries, keys = np.asarray(as_array(core.landmarks, "landmarks"), np.float64)
            return queries, keys
        if core.landmarks != "segment_means":
            queries, keys = np.asarray(draw["landmarks"], np.float64)
            return queries, keys
        q, k, r = problem.q, problem.k, self._budget(problem)
        if core.masking == "zero" and keep is not None:
            k = np.where(keep[:, None], k, 0)
            q = np.where(keep[:, None], q, 0) if problem.n_q == problem.n_k else q
        elif keep is not None:
            k = k[keep]
        return segment_means(q, r), segment_means(k, r)

    def inverse(self, m: ArrayLike) -> Array:
        """Return the Z that this method takes for a matrix M (r, r), float64."""
        core = self.core
        if core.iterations is not None:
            return filter_inverse(m, core.iterations)
        return pseudo_inverse(m, core.ridge, self.rcond)

    def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        if self.convolution is not None:
            raise ValueError(
                "convolution must be None for a matrix, got weights, which approximate nothing; "
                "use Nystromformer(...).attend(problem) for the output"
            )
        return self._factored(problem, draw, bool(self.renormalize))

    def _factored(
        self, problem: AttentionProblem, draw: Draw, renormalize: bool
    ) -> FactoredAttention:
        if self._budget(problem) == 0:
            return zero_attention(problem)
        wide = self._landmarks(problem, draw)
        queries, keys = (np.require(x, problem.dtype, ["C", "W"]) for x in wide)
        q, k, _ = problem.arrays
        left = AttentionProblem.adopt(q, keys, scale=problem.scale)
        if problem.key_mask is None:
            right = AttentionProblem.adopt(queries, k, scale=problem.scale)
        else:
            right = AttentionProblem(queries, k, scale=problem.scale, key_mask=problem.key_mask)
        z = self.inverse(small_softmax(queries, keys, problem.scale)).astype(problem.dtype)

        def remake() -> FactoredAttention:
            return self._factored(problem.astype(np.float64), draw, renormalize)

        budget = min(len(queries), self._budget(problem))
        kind = RenormalizedAttention if renormalize else FactoredAttention
        return kind(left.exact, z, right.exact, budget, remake=remake)

    def _attend(self, problem: AttentionProblem, rng: Rng, draw: Mapping[str, Any] | None) -> Array:
        """Return ``Ahat V``, with the convolution of V added where there is one."""
        if self.convolution is None:
            return super()._attend(problem, rng, draw)
        from scipy.ndimage import correlate1d

        made = self._checked(problem, rng, draw)
        values = problem.values
        out = np.asarray(self._factored(problem, made, bool(self.renormalize)) @ values)
        keep = problem.key_mask
        shown = values if keep is None else np.where(keep[:, None], values, 0)
        weights = np.asarray(as_array(self.convolution, "convolution"), np.float64)
        near = correlate1d(shown.astype(np.float64), weights, axis=0, mode="constant")
        return np.asarray(out + near, problem.dtype)

    def details(
        self,
        problem: AttentionProblem,
        rng: Rng = None,
        *,
        draw: Mapping[str, Any] | None = None,
    ) -> NystromDetails:
        """Return the range of the row sums, and how many rows are too small to be divided by.

        Parameters
        ----------
        problem : AttentionProblem
        rng, draw
            As for `approximate`.

        Returns
        -------
        NystromDetails
            NaN for the sums where there is no query.

        Examples
        --------
        >>> import sketchattn as sa
        >>> problem = sa.make_heads("gaussian", n=16, d=4, rng=0)[0]
        >>> sa.Nystromformer(rank=4).details(problem).not_renormalized
        0
        """
        made = self._checked(problem, rng, draw)
        sums = self._factored(problem, made, False).row_sums()
        low, high = (float(f(sums)) if len(sums) else math.nan for f in (np.min, np.max))
        return NystromDetails(low, high, int((sums <= LEAST_ROW_SUM).sum()))
