"""Any method on queries and keys of fewer hidden dimensions.

``Ahat = method(Qh, Kh, V)`` with ``Qh Kh^T`` in place of ``Q K^T``, compressed from width d to d_in
by `sketchattn.sketches.compression`.  With the exact matrix inside it is
``Ahat = rowsoftmax(scale Qh Kh^T)``: logits of rank d_in, all n_q n_k of them, softmax last.  No
factorisation of A bounds its error, since the softmax makes new rank: it may lie far below the best
matrix of that rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.arguments import check_finite, float_dtype
from ..base.draws import Draw, Rng, as_generator, check_draw
from ..base.head import Head
from ..kernels._threads import product
from ..operators.base import AttentionOperator
from ..operators.pullback import Gradient
from ..operators.softmax import SoftmaxAttention
from ..problem import AttentionProblem
from ..sketches.base import streams
from ..sketches.compression import (
    CENTERED,
    RANDOM_KINDS,
    Compression,
    apply_compression,
    check_center,
    check_kind,
    check_width_in,
    draw_projection,
    fit_compression,
    largest_width,
    mean_key,
)
from .base import Method, Traits, inner_method, register

Array = NDArray[Any]

# The array of a draw that is the map of both sides; the others are those of the inner method.
PROJECTION = "projection"

# About the exact matrix of compressed logits, and about kinds of compression.
CLAIMS = ("dba.compressed_logits", "dba.compressed_floor", "dba.lipschitz", "dba.logit_error")
KIND_CLAIMS = {
    "svd": ("dba.svd_width", "dba.oblique"),
    "gaussian": ("dba.jl_variance", "dba.jl_logits"),
}


class CompressedAttention(SoftmaxAttention):
    """Represent ``rowsoftmax(scale Qh Kh^T)`` of compressed queries and keys.

    Parameters
    ----------
    problem : AttentionProblem
        The compressed one.
    effective_rank : int
        How much of the rank the logits have.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=8, d=4, rng=0)[0]
    >>> sa.Compressed(rank=2).approximate(problem).problem.d
    2
    """

    path = "sketch"

    def __init__(self, problem: Head, effective_rank: int) -> None:
        super().__init__(problem)
        self.effective_rank = effective_rank

    def wide(self) -> AttentionOperator:
        """Return the operator in float64, of the same compressed queries and keys."""
        if self.dtype == np.float64:
            return self
        return CompressedAttention(self.problem.astype(np.float64), int(self.effective_rank or 0))


@register("compressed")
class Compressed(Method):
    """Compress Q and K from width d to d_in, then let another method approximate.

    Parameters
    ----------
    rank : int
        In 1..n_k.  For an inner method with a rank, its rank.  For one without, such as "exact",
        the width d_in itself, at most the d of the problem (its next power of two for "srht").
    inner : str or Method, default "exact"
        The method that sees the compressed problem: a name, with its defaults, or an object with
        parameters of its own, whose rank, if it has one, is replaced by ``rank``.
    d_in : int, optional
        Width after compression, needed for an inner method with a rank and only there.
    kind : {"svd", "gaussian", "srht", "pca_k"}
        How Q and K are compressed, see `sketchattn.sketches.compression.compress`.
    center : bool, optional
        Whether the mean key is subtracted first; None: for "svd" and "pca_k".

    Raises
    ------
    TypeError, ValueError
        For values out of range, a d_in that is missing or has no use, and whatever the inner
        method refuses.

    Notes
    -----
    The training-free form of what DBA (Qin et al. 2025) does to the hidden width.  "svd" is the
    best approximation of the centred logits; of attention it is not exact below the rank of the
    logits, but with logits wrong by a half-range eta_i a row is wrong by at most ``tanh(eta_i/2)``
    in total variation, see `sketchattn.errors.perturbation`.

    Traits are those of the inner method, but for the compression: a kind that fits itself to Q and
    K, or centres keys, has looked at later ones (``autoregressive`` is False), and a random one
    draws.  Where a projection is drawn, the draw is ``projection`` (d, d_in) beside what the inner
    method draws; otherwise it is the inner draw.

    Compression costs ``O((n_q + n_k) d^2)``, or ``O((n_q + n_k) d d_in)`` where random; a product
    with the exact matrix inside ``O(n_q n_k (d_in + d_v))``.  `attend` takes the inner method's.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=16, d=4, rng=0)[0]
    >>> round(sa.error_report(problem, sa.Compressed(rank=4).approximate(problem)).skill, 5)
    1.0
    >>> method = sa.Compressed(rank=8, inner=sa.Nystromformer(8, "kmeans"), d_in=2)
    >>> method.approximate(problem, rng=0).rank_bound
    8
    >>> method.get_params()["inner__landmarks"]
    'kmeans'
    """

    def __init__(
        self,
        rank: int,
        inner: str | Method = "exact",
        d_in: int | None = None,
        kind: str = "svd",
        center: bool | None = None,
    ) -> None:
        self.rank = rank
        self.inner = inner
        self.d_in = d_in
        self.kind = kind
        self.center = center

    # --- what is inside ---------------------------------------------------------------------

    @property
    def method(self) -> Method:
        """The inner method as an object, at ``rank`` where it has one."""
        return inner_method(self.inner, self.rank)

    @property
    def _random(self) -> bool:
        return self.kind in RANDOM_KINDS

    @property
    def traits(self) -> Traits:
        """Those of the inner method, as far as the compression leaves them."""
        method = self.method
        inner = method.traits
        centered = CENTERED.get(str(self.kind), False) if self.center is None else self.center
        return replace(
            inner,
            logsumexp=False,
            decoding=False,
            randomized=inner.randomized or self._random,
            claims=CLAIMS + KIND_CLAIMS.get(str(self.kind), ()) if method.name == "exact" else (),
            uses_rank=True,
            # Whole width, where the rank of an inner method is not the width.
            exact_at_full_rank=(
                inner.exact_at_full_rank and not inner.uses_rank and not self._random
            ),
            autoregressive=inner.autoregressive and self._random and not centered,
            differentiable=inner.differentiable and self._random,
        )

    def width(self, d: int) -> int:
        """Return the width after compression for queries and keys of width d."""
        if self.d_in is not None:
            return int(self.d_in)
        most = largest_width(d, self.kind)
        return int(self.rank) if most is None else min(int(self.rank), most)

    # --- arguments --------------------------------------------------------------------------

    def check(self, problem: AttentionProblem) -> None:
        """Refuse a problem that this method cannot honour, or hyper-parameters out of range."""
        super().check(problem)
        inner = self.method
        if inner.traits.uses_rank and self.d_in is None:
            raise ValueError(
                f"d_in must be given with inner {inner.name!r}, whose budget is rank, got None; "
                f"pass the width after compression, in 1..d = {problem.d}"
            )
        if not inner.traits.uses_rank and self.d_in is not None:
            raise ValueError(
                f"d_in must be None with inner {inner.name!r}, for which rank is the width, got "
                f"{self.d_in!r}; drop it"
            )
        if self.d_in is not None:
            check_width_in(self.d_in, problem.d, self.kind)
        inner.check(self._stand_in(problem))

    def _check_parameters(self) -> None:
        check_kind(self.kind)
        check_center(self.center)

    def _stand_in(self, problem: AttentionProblem) -> AttentionProblem:
        """Return a problem of the shape of the compressed one: checks come before any work."""
        width = self.width(problem.d)
        q, k = (np.zeros((n, width), problem.dtype) for n in (problem.n_q, problem.n_k))
        values = [] if problem.arrays.v is None else [problem.arrays.v]
        if problem.key_mask is None:
            return AttentionProblem.adopt(q, k, *values, scale=problem.scale, causal=problem.causal)
        return AttentionProblem(
            q, k, *values, scale=problem.scale, causal=problem.causal, key_mask=problem.key_mask
        )

    # --- draws ------------------------------------------------------------------------------

    def _split(
        self, problem: AttentionProblem, rng: np.random.Generator
    ) -> tuple[Array | None, np.random.Generator]:
        """Return the projection, if one is drawn, and the stream of the inner method."""
        if not self._random:
            return None, rng
        # Streams of their own: the inner draw does not depend on d_in, nor the other way round.
        first, second = streams(rng, 2)
        return draw_projection(problem.d, self.width(problem.d), self.kind, first), second

    def _small(self, problem: AttentionProblem, projection: Array | None) -> AttentionProblem:
        """Return the compressed problem."""
        if projection is None:
            maps = fit_compression(problem, self.width(problem.d), self.kind, center=self.center)
        else:
            shift = mean_key(problem) if self.center else np.zeros(problem.d)
            maps = Compression(projection, projection, shift)
        return apply_compression(problem, maps)

    def _draw(self, problem: AttentionProblem, rng: np.random.Generator) -> Draw:
        projection, stream = self._split(problem, rng)
        inner = self.method
        if not inner.traits.randomized:
            drawn = Draw()
        else:
            drawn = inner.draw(self._small(problem, projection), stream)
        return drawn if projection is None else Draw(drawn, projection=projection)

    def _check_draw(self, problem: AttentionProblem, draw: Mapping[str, Any]) -> Draw:
        inner = self.method
        names: tuple[str, ...] = inner.draw_names
        if inner.traits.randomized and not (names and self._random):
            # The inner method knows its own arrays, and checks them.
            names = tuple(draw) if isinstance(draw, Mapping) else ()
        if self._random:
            names = tuple(dict.fromkeys((*names, PROJECTION)))
        made = check_draw(draw, names)
        if self._random:
            projection = made[PROJECTION]
            float_dtype(projection, PROJECTION)
            wanted = (problem.d, self.width(problem.d))
            if projection.shape != wanted:
                raise ValueError(
                    f"{PROJECTION} must have shape (d, d_in) = {wanted}, got {projection.shape}; "
                    f"draw it for this width"
                )
            check_finite(projection, PROJECTION)
        return made

    # --- the approximation ------------------------------------------------------------------

    def _finish(
        self, small: AttentionProblem, inner: Method, options: Mapping[str, Any]
    ) -> AttentionOperator:
        made = inner.approximate(small, **options)
        if isinstance(made, SoftmaxAttention):
            return CompressedAttention(small, min(small.d, len(small.kept_keys)))
        if not inner.traits.uses_rank:
            made.effective_rank = min(small.d, len(small.kept_keys))
        return made

    def _given(
        self, problem: AttentionProblem, draw: Mapping[str, Any]
    ) -> tuple[AttentionProblem, dict[str, Any]]:
        """Return the compressed problem and the options of the inner method for a checked draw."""
        rest = {name: x for name, x in draw.items() if not (self._random and name == PROJECTION)}
        projection = np.asarray(draw[PROJECTION], np.float64) if self._random else None
        return self._small(problem, projection), {"draw": rest}

    def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        small, options = self._given(problem, draw)
        return self._finish(small, self.method, options)

    def approximate(
        self,
        problem: AttentionProblem,
        rng: Rng = None,
        *,
        draw: Mapping[str, Any] | None = None,
    ) -> AttentionOperator:
        """Return ``Ahat`` for a problem: what the inner method makes of the compressed one.

        Parameters
        ----------
        problem, rng, draw
            As for `Method.approximate`.

        Returns
        -------
        AttentionOperator
            Of shape (n_q, n_k).

        Raises
        ------
        TypeError, ValueError
            As `Method.approximate`, of this method or the inner one.
        """
        if draw is not None:
            return super().approximate(problem, rng, draw=draw)
        small, stream = self._prepared(problem, rng)
        return self._finish(small, self.method, {"rng": stream})

    def _run(self, problem: AttentionProblem, rng: Rng, draw: Mapping[str, Any] | None) -> Array:
        """Return ``Ohat`` by the inner method's own path."""
        return np.asarray(self._attend_heads([problem], [rng], draw)[0])

    def _attend_heads(
        self,
        problems: Sequence[AttentionProblem],
        rngs: Sequence[Rng],
        draw: Mapping[str, Any] | None,
    ) -> Array:
        """Return ``Ohat`` (H, n_q, d_v) of heads that are compressed each on its own."""
        inner = self.method
        if draw is None:
            pairs = zip(problems, rngs, strict=True)
            made = [self._prepared(problem, rng) for problem, rng in pairs]
            return inner.attend_heads([small for small, _ in made], [rng for _, rng in made])
        given = []
        for problem, rng in zip(problems, rngs, strict=True):
            self.check(problem)
            given.append(self._given(problem, self._handed_in(problem, rng, draw)))
        return inner.attend_heads(
            [small for small, _ in given], [None] * len(given), draw=given[0][1]["draw"]
        )

    def _prepared(
        self, problem: AttentionProblem, rng: Rng
    ) -> tuple[AttentionProblem, np.random.Generator]:
        """Return the compressed problem and the stream of the inner method, after all checks."""
        self.check(problem)
        projection, stream = self._split(problem, as_generator(rng))
        return self._small(problem, projection), stream

    def _vjp(self, problem: AttentionProblem, draw: Draw, cotangent: Array) -> Gradient:
        small, options = self._given(problem, draw)
        found = self.method.vjp(small, cotangent, **options)
        back = np.asarray(draw[PROJECTION], np.float64).T
        dk = product(found[1], back)
        kept = problem.kept_keys
        if self.center and len(kept):
            dk[kept] -= dk[kept].mean(axis=0)
        return Gradient(product(found[0], back), dk, found[2])
