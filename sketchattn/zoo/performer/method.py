"""Performer: the exponential kernel by random features, in logarithms from end to end.

With ``x = sqrt(scale) q``, ``y = sqrt(scale) k`` and rows omega of a Gaussian matrix,
``E exp(omega . (x + y) - |x|^2/2 - |y|^2/2) = exp(x . y)``.  For positive features the
self-normalised estimator is a product of two row-stochastic matrices, ``Ahat = U P`` with
``N_jl = omega_l . y_j - |y_j|^2/2``, ``a_l = logsumexp_j N_jl``, ``P_lj = exp(N_jl - a_l)`` and
``U = rowsoftmax_l(omega_l . x_i + a_l)``: both are softmax attention, to the keys and to the
features, so that nothing overflows and no small constant is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...base.arguments import (
    check_choice,
    check_finite,
    check_flag,
    check_not_negative,
    float_dtype,
    largest,
)
from ...base.draws import Draw, Rng, check_draw
from ...kernels._threads import product
from ...operators.base import AttentionOperator
from ...operators.factored import FactoredAttention, zero_attention
from ...operators.pullback import Gradient, zero_gradient
from ...operators.softmax import SoftmaxAttention
from ...operators.solve import solution
from ...operators.steep import extent_of
from ...problem import AttentionProblem
from ..base import InFloat64, Method, Traits, check_preset, in_force, register
from .choices import PRESETS, Form, claims_of
from .features import FEATURES, gaussian_directions
from .prefix import PrefixAttention

Array = NDArray[Any]


class FeatureDetails(NamedTuple):
    """Hold what the features of a problem are like.

    Attributes
    ----------
    nonpositive : int
        Rows whose estimated normaliser is not positive: 0 for positive features, by construction.
    largest_sum : float
        An upper bound of ``s = |x + y|^2`` over all pairs, ``(max |x| + max |y|)^2``.
    relative_variance : float
        ``(e^s - 1)/r`` at that s, of one unnormalised entry with independent positive features.
    """

    nonpositive: int
    largest_sum: float
    relative_variance: float


@register("performer")
class Performer(Method):
    """Estimate the softmax kernel by random features: ``Ahat = U P``, both row-stochastic.

    ``P_lj = exp(N_jl - a_l)``, ``U = rowsoftmax_l(omega_l . x_i + a_l)``,
    ``N_jl = omega_l . y_j - |y_j|^2/2``, ``a_l = logsumexp_j N_jl``, for ``x = sqrt(scale) q`` and
    ``y = sqrt(scale) k``.

    Parameters
    ----------
    rank : int
        Number of random directions r, in 1..n_k.
    features : {"positive", "hyperbolic", "trigonometric"}
        One feature a direction, ``exp(omega . x - |x|^2/2)``; two, with omega and -omega; or two,
        ``exp(|x|^2/2) (cos, sin)(omega . x)``, whose normaliser can be zero or negative: a baseline
        for study only, see `details`.
    orthogonal : bool, default True
        Directions are orthogonal within blocks of d.
    eps : float, default 0
        Added to features as released codes do, after these are divided by their maxima; only for
        positive features and problems that are not causal.  With ``eps > 0`` and logits that are
        not small, ``Ahat V`` tends to the mean of V as r grows.
    sign_fix : bool, default True
        See `gaussian_directions`.
    center_keys : bool, default False
        Subtract the mean of the keys first: A is the same, the estimator is not.
    preset : {None, "google", "performer-pytorch"}
        A released variant: no sign fix, and ``eps`` 1e-6 or 1e-4.

    Raises
    ------
    TypeError, ValueError
        For values out of range, and options that would be ignored.

    Notes
    -----
    Choromanski et al. (2021), arXiv 2009.14794: FAVOR+.  Positive and hyperbolic features:
    rows of ``Ahat`` sum to one, entries are positive, outputs stay in the hull of V.  Causal
    problems: the same with prefix sums over the keys, each row from its own past alone.
    Trigonometric features: rows sum to one where the normaliser is not zero, entries have signs.

    The relative variance of an entry before normalisation is ``(e^s - 1)/r``, ``s = |x + y|^2``:
    for unit Gaussian queries and keys of width 64 it is 9e6/r.  See `feature_mse`.

    Cost ``O((n_q + n_k) r (d + d_v))``; the factors are not held unless the problem is causal,
    features are trigonometric or eps > 0.  `attend` passes over the keys once in place of twice,
    and holds no features for eps > 0 either.

    A draw holds ``features``, the directions omega, float64 (r, d), a row each.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=16, d=4, rng=0)[0]
    >>> ahat = sa.Performer(rank=8).approximate(problem, rng=0)
    >>> ahat.rank_bound, bool(abs(ahat.row_sums() - 1).max() < 1e-6)
    (8, True)
    """

    draw_names = ("features",)

    def __init__(
        self,
        rank: int,
        features: str = "positive",
        orthogonal: bool = True,
        eps: float = 0.0,
        sign_fix: bool = True,
        center_keys: bool = False,
        preset: str | None = None,
    ) -> None:
        self.rank = rank
        self.features = features
        self.orthogonal = orthogonal
        self.eps = eps
        self.sign_fix = sign_fix
        self.center_keys = center_keys
        self.preset = preset

    @property
    def form(self) -> Form:
        """The choices in force: the arguments, and what the preset changes."""
        return in_force(self, Form(), PRESETS)

    @property
    def traits(self) -> Traits:
        """Causal problems need eps = 0 and no signs; trigonometric features bring signs."""
        form = self.form
        signed = form.features == "trigonometric"
        return Traits(
            causal=not signed and form.eps == 0 and not self.center_keys,
            key_mask=True,
            row_stochastic=not signed,
            nonnegative=not signed,
            differentiable=True,
            claims=claims_of(form),
        )

    # --- arguments --------------------------------------------------------------------------

    def check(self, problem: AttentionProblem) -> None:
        """Refuse a problem that this method cannot honour, or hyper-parameters out of range."""
        if isinstance(problem, AttentionProblem) and problem.causal and not self.traits.causal:
            raise ValueError(
                f"causal must be False for method 'performer' with features = "
                f"{self.form.features!r}, eps = {self.form.eps:g} and center_keys = "
                f"{self.center_keys!r}, got {problem.causal!r}: normalisers change sign, or a "
                f"maximum or mean over all keys reads later ones; use the defaults"
            )
        super().check(problem)

    def _check_parameters(self) -> None:
        check_preset(self, Form(), PRESETS, whole=True)
        check_choice(self.features, "features", FEATURES)
        for label in ("orthogonal", "sign_fix", "center_keys"):
            check_flag(getattr(self, label), label)
        check_not_negative(self.eps, "eps", "0 is none")
        form = self.form
        if form.eps > 0 and form.features != "positive":
            raise ValueError(
                f"eps must be 0 for {form.features} features, to which no released code adds it, "
                f"got {form.eps:g}; use features='positive'"
            )
        if not form.sign_fix and not form.orthogonal:
            raise ValueError(
                "sign_fix must be True with orthogonal=False, which has no signs to fix, "
                "got False; drop it"
            )

    def _check_draw(self, problem: AttentionProblem, draw: Mapping[str, Any]) -> Draw:
        made = check_draw(draw, self.draw_names)
        omega = made["features"]
        float_dtype(omega, "features")
        if omega.shape != (self.rank, problem.d):
            raise ValueError(
                f"features must have shape (rank, d) = {(self.rank, problem.d)}, got "
                f"{omega.shape}; change rank or the draw"
            )
        check_finite(omega, "features")
        return made

    # --- the approximation ------------------------------------------------------------------

    def _draw(self, problem: AttentionProblem, rng: np.random.Generator) -> Draw:
        form = self.form
        omega = gaussian_directions(
            int(self.rank),
            problem.d,
            rng,
            orthogonal=bool(form.orthogonal),
            sign_fix=bool(form.sign_fix),
        )
        return Draw(features=omega)

    def _scaled(self, problem: AttentionProblem) -> tuple[Array, Array]:
        """Return x (n_q, d) and y (n_k, d) with ``x . y = scale q . k``; masked keys are zeros."""
        q, k, _ = problem.arrays
        if problem.key_mask is not None:
            k = np.where(problem.key_mask[:, None], k, k.dtype.type(0))
        if self.center_keys and len(problem.kept_keys):
            mean = k[problem.kept_keys].mean(axis=0, dtype=np.float64)
            k = (k - mean).astype(k.dtype)
            if problem.key_mask is not None:
                k = np.where(problem.key_mask[:, None], k, k.dtype.type(0))
        root = math.sqrt(abs(problem.scale))
        return q.dtype.type(root) * q, k.dtype.type(math.copysign(root, problem.scale)) * k

    def _omega(self, problem: AttentionProblem, draw: Draw) -> Array:
        omega = np.ascontiguousarray(draw["features"], problem.dtype)
        if self.form.features == "hyperbolic":
            omega = np.concatenate([omega, -omega])
        return omega

    def _keys(self, problem: AttentionProblem, y: Array, omega: Array) -> AttentionProblem:
        """Return the attention of features to keys, with the values: logits ``N^T``."""
        # One more column carries the bias: [omega, 1] . [y, -|y|^2/2].
        half = -0.5 * np.einsum("ij,ij->i", y, y)[:, None]
        keys = np.concatenate([y, half], axis=1)
        asked = np.concatenate([omega, np.ones((len(omega), 1), omega.dtype)], axis=1)
        values = [] if problem.arrays.v is None else [problem.arrays.v]
        if problem.key_mask is None:
            extent = largest(asked), check_finite(keys, "scale * k @ k.T")
            return AttentionProblem.adopt(asked, keys, *values, scale=1.0, extent=extent)
        return AttentionProblem(asked, keys, *values, scale=1.0, key_mask=problem.key_mask)

    def _queries(self, x: Array, most: float, omega: Array, bias: Array) -> AttentionProblem:
        """Return the attention of queries to features: logits ``T + 1 bias^T``, bias (R,).

        ``most`` is a bound of the entries of x.
        """
        # One more column carries the bias: [x, 1] . [omega, bias].
        asked = np.concatenate([x, np.ones((len(x), 1), x.dtype)], axis=1)
        features = np.concatenate([omega, bias[:, None]], axis=1)
        extent = max(most, 1.0), largest(features)
        return AttentionProblem.adopt(asked, features, scale=1.0, extent=extent)

    def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        budget = min(int(self.rank), len(problem.kept_keys))
        if budget == 0 or problem.n_q == 0:
            return zero_attention(problem)

        remake = InFloat64(self._approximate, problem, (draw,))
        form = self.form
        if form.features == "trigonometric" or form.eps > 0:
            left, right = self._dense(problem, draw)
            total = product(left, right.sum(axis=1))
            with np.errstate(over="ignore"):
                inverse = np.divide(1, total, out=np.zeros_like(total), where=total != 0)
            u = left * np.where(np.isfinite(inverse), inverse, 0)[:, None]
            return FactoredAttention(u, None, right, budget, remake=remake)
        if problem.causal:
            from ...kernels.sketching import dense_product

            x, y = self._scaled(problem)
            across = np.ascontiguousarray(self._omega(problem, draw).T)
            n = dense_product(y, across)
            n -= (0.5 * np.einsum("ij,ij->i", y, y))[:, None]
            check_finite(n, "scale * k @ k.T")
            t = dense_product(x, across)
            check_finite(t, "features @ q.T")
            keep = np.ones(problem.n_k, bool) if problem.key_mask is None else problem.key_mask
            return PrefixAttention(t, n, keep.copy(), problem.offset, budget, remake)
        (x, y), omega = self._scaled(problem), self._omega(problem, draw)
        keys = self._keys(problem, y, omega)
        # Products with the root are rounded, upwards perhaps.
        most = (1 + 1e-6) * math.sqrt(abs(problem.scale)) * extent_of(problem)[0]
        queries = self._queries(x, most, omega, keys.logsumexp)
        return FactoredAttention(queries.exact, None, keys.exact, budget, remake=remake)

    def _dense(self, problem: AttentionProblem, draw: Draw) -> tuple[Array, Array]:
        """Return features of queries (n_q, R) and keys (R, n_k), up to a factor a query and one."""
        from ...kernels.sketching import dense_product

        x, y = self._scaled(problem)
        omega = self._omega(problem, draw)
        across = np.ascontiguousarray(omega.T)
        t, n = dense_product(x, across), dense_product(y, across)
        half = 0.5 * np.einsum("ij,ij->i", y, y)
        kept = problem.kept_keys
        hidden = np.ones(problem.n_k, bool)
        hidden[kept] = False
        if self.form.features == "trigonometric":
            size = np.exp(np.where(hidden, -np.inf, half - half[kept].max()))[:, None]
            keys = np.concatenate([np.cos(n), np.sin(n)], axis=1) * size.astype(n.dtype)
            queries = np.concatenate([np.cos(t), np.sin(t)], axis=1)
        else:
            eps = n.dtype.type(self.form.eps)
            keys = np.exp(n - half[:, None] - n[kept].max()) + eps
            keys[hidden] = 0
            own = 0.5 * np.einsum("ij,ij->i", x, x)
            queries = np.exp(t - own[:, None] - t.max(axis=1, keepdims=True)) + eps
        for made, label in ((queries, "features of q"), (keys, "features of k")):
            check_finite(made, label)
        return queries, np.ascontiguousarray(keys.T)

    def _attend_eps(self, problem: AttentionProblem, draw: Draw) -> Array:
        """Return ``Ahat V`` for eps > 0 without holding features.

        Those of keys are ``exp(N_jl - m) + eps``, ``m = max_jl omega_l . y_j``, so that their sum
        is ``sum_j exp(N_jl - m) + eps n``, and that of their products with V alike.
        """
        from ...kernels.features import feature_means, feature_sums

        (x, y), omega = self._scaled(problem), self._omega(problem, draw)
        _ = problem.values  # refuses a problem without
        v, kept, eps = problem.arrays.v, problem.kept_keys, float(self.form.eps)
        assert v is not None
        keep = np.ones(len(y), bool) if problem.key_mask is None else problem.key_mask.copy()
        top, total, packed = feature_sums(y, keep, omega, v)
        check_finite(np.asarray(top), "features @ k.T")
        total = total + eps * len(kept)
        packed = packed + eps * v[kept].sum(axis=0, dtype=np.float64)
        out, highest = feature_means(x, omega, total, packed, eps)
        check_finite(highest, "features @ q.T")
        return out

    def _attend(self, problem: AttentionProblem, draw: Draw) -> Array:
        """Return ``Ahat V`` with one pass over the keys in place of two."""
        values = problem.values
        if self.form.eps > 0 and len(problem.kept_keys) and problem.n_q:
            return self._attend_eps(problem, draw)
        ahat = self._approximate(problem, draw)
        if isinstance(ahat, FactoredAttention) and isinstance(ahat.p, SoftmaxAttention):
            # The pass that gave the normalisers of the keys gave their products too.
            return np.asarray(ahat.u @ solution(ahat.p.problem)[0])
        return np.asarray(ahat @ values)

    def _vjp(self, problem: AttentionProblem, draw: Draw, cotangent: Array) -> Gradient:
        from .gradient import causal_gradient, dense_gradient, softmax_gradient

        if len(problem.kept_keys) == 0 or problem.n_q == 0:
            return zero_gradient(problem)
        (x, y), omega = self._scaled(problem), self._omega(problem, draw)
        form = self.form
        if form.features == "trigonometric" or form.eps > 0:
            signed = form.features == "trigonometric"
            made = dense_gradient(problem, x, y, omega, cotangent, float(form.eps), signed)
        elif problem.causal:
            ahat = self._approximate(problem, draw)
            assert isinstance(ahat, PrefixAttention)
            made = causal_gradient(problem, ahat.u, ahat.beta, y, omega, cotangent)
        else:
            made = softmax_gradient(problem, x, y, omega, cotangent)
        root = math.sqrt(abs(problem.scale))
        dk = math.copysign(root, problem.scale) * made.k
        if self.center_keys:
            kept = problem.kept_keys
            dk[kept] -= dk[kept].mean(axis=0)
        return Gradient(root * made.q, dk, made.v)

    def details(
        self,
        problem: AttentionProblem,
        rng: Rng = None,
        *,
        draw: Mapping[str, Any] | None = None,
    ) -> FeatureDetails:
        """Return how far the features can be trusted on a problem.

        Parameters
        ----------
        problem : AttentionProblem
        rng, draw
            As for `approximate`.

        Returns
        -------
        FeatureDetails

        Examples
        --------
        >>> import sketchattn as sa
        >>> problem = sa.make_heads("gaussian", n=16, d=4, rng=0)[0]
        >>> sa.Performer(rank=4).details(problem, rng=0).nonpositive
        0
        """
        made = self._checked(problem, rng, draw)
        wrong = 0
        kept = problem.kept_keys
        if self.form.features == "trigonometric" and len(kept):
            left, right = self._dense(problem, made)
            wrong = int((product(left, right.sum(axis=1)) <= 0).sum())
        x, y = (z.astype(np.float64) for z in self._scaled(problem))
        sizes = [np.linalg.norm(z, axis=1).max(initial=0.0) for z in (x, y[kept])]
        largest = float(sum(sizes) ** 2)
        variance = math.expm1(largest) / int(self.rank) if largest < 700 else math.inf
        return FeatureDetails(wrong, largest, variance)
