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

from ...base.arguments import (
    as_array,
    check_choice,
    check_finite,
    check_flag,
    float_dtype,
)
from ...base.draws import Draw, Rng, check_draw
from ...operators.base import AttentionOperator
from ...operators.factored import FactoredAttention, zero_attention
from ...operators.pullback import Gradient, zero_gradient
from ...problem import AttentionProblem
from ...sampling.clustering import kmeans
from ...sampling.landmarks import chosen_rows, segment_means
from ...sketches.base import streams
from ..base import InFloat64, Method, Traits, check_preset, in_force, register
from .choices import (
    FACTOR_CLAIMS,
    INVERSE_CLAIMS,
    ITERATION_CLAIMS,
    LANDMARKS,
    MASKING,
    PRESETS,
    Core,
)
from .inverse import (
    check_fraction,
    check_iterations,
    filter_inverse,
    inverse_cut,
    pseudo_inverse,
    small_softmax,
)
from .renormalized import LEAST_ROW_SUM, RenormalizedAttention

Array = NDArray[Any]

KMEANS_STEPS = 10


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
        Means of r segments of consecutive queries and keys; centroids of k-means (10 steps of
        `sketchattn.sampling.kmeans`) on each; rows drawn without replacement, uniformly or by
        leverage scores of Q and of K; or the landmark queries and keys themselves.
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

    A draw holds ``landmarks``, Qc and Kc, float64 (2, r, d); nothing for segment means and for
    landmarks that are given.

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
            differentiable=True,
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
            check_iterations(self.iterations)
        ridge = check_fraction(self.ridge, "ridge", math.inf)
        if self.rcond is not None:
            check_fraction(self.rcond, "rcond", 1.0)
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

        remake = InFloat64(self._factored, problem, (draw, renormalize))
        budget = min(len(queries), self._budget(problem))
        kind = RenormalizedAttention if renormalize else FactoredAttention
        return kind(left.exact, z, right.exact, budget, remake=remake)

    def _attend(self, problem: AttentionProblem, draw: Draw) -> Array:
        """Return ``Ahat V``, with the convolution of V added where there is one."""
        if self.convolution is None:
            return super()._attend(problem, draw)
        from scipy.ndimage import correlate1d

        values = problem.values
        out = np.asarray(self._factored(problem, draw, bool(self.renormalize)) @ values)
        keep = problem.key_mask
        shown = values if keep is None else np.where(keep[:, None], values, 0)
        weights = np.asarray(as_array(self.convolution, "convolution"), np.float64)
        near = correlate1d(shown.astype(np.float64), weights, axis=0, mode="constant")
        return np.asarray(out + near, problem.dtype)

    def _vjp(self, problem: AttentionProblem, draw: Draw, cotangent: Array) -> Gradient:
        from .gradient import convolution_pullback, gradient

        if self._budget(problem) == 0:
            return zero_gradient(problem)
        marks = self._landmarks(problem, draw)
        z = self.inverse(small_softmax(*marks, problem.scale))
        cut = inverse_cut(len(z), self.rcond)
        made = gradient(self.core, problem, marks, z, cut, cotangent, bool(self.renormalize))
        if self.convolution is not None:
            weights = np.asarray(as_array(self.convolution, "convolution"), np.float64)
            made.v[:] += convolution_pullback(weights, cotangent, problem.key_mask)
        return made

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


def _centers(x: Array, r: int, seed: int) -> Array:
    """Return r centroids, float64 (r, d); equal rows may leave fewer, which are then repeated."""
    centers = kmeans(x, r, seed, steps=KMEANS_STEPS).centers
    return centers[np.arange(r) % len(centers)]
