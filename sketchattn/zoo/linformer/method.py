"""Linformer: keys and values are projected along the sequence before the softmax.

``W = rowsoftmax(scale Q (E K)^T)``, ``Ohat = W (F V)``, ``Ahat = W F`` with E and F of shape
(r, n_k).  It is a trained architecture: for random E and F it has no guarantee, because E
multiplies the logits and the softmax does not commute with it.  What a random projection does
promise is about ``A S^T S V``, the method "jl".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...base.arguments import as_array, check_name
from ...base.draws import Draw, check_draw
from ...operators.base import AttentionOperator
from ...operators.factored import zero_attention
from ...operators.pullback import Gradient, softmax_pullback, zero_gradient
from ...problem import AttentionProblem
from ...sketches.base import Sketch, make_sketch, sketches, streams
from ..base import InFloat64, Method, Traits, register
from .initialisations import INITIALISATIONS, initialise
from .projections import (
    FIXED,
    POOLING,
    SCALES,
    MeanPool,
    Projection,
    ReducedAttention,
    check_array,
    convolve,
    max_pool_rows,
    pool_starts,
)

Array = NDArray[Any]


@register("linformer")
class Linformer(Method):
    """Project keys and values along the sequence: ``Ohat = rowsoftmax(scale Q (E K)^T) F V``.

    Parameters
    ----------
    rank : int
        Rows r of E and F, in 1..n_k.
    projection : str
        A kind of ``sketchattn.sketches.sketches()``; "mean_pool", the mean over r blocks of
        consecutive keys; "max_pool", their maximum; "conv", one convolution with kernel and
        stride ``n_k/r``, whose weights are ``E`` and ``F``; "given", the matrices ``E`` and ``F``.
    sharing : {"none", "kv"}
        Whether F is E.  To share over heads and layers take the matrices of
        `linformer_projections` and pass them as ``E`` and ``F``.
    scale : {None, "isometry", "average", "none"}
        "isometry" (the default of random projections): ``E[E^T E] = I``; "average" (of pooling):
        rows sum to one, which keeps the range of the logits; "none": as defined or given, sums in
        place of means for "mean_pool".
    init : str, optional
        A key of ``INITIALISATIONS``: E and F as a published code initialises them; only with
        ``projection="gaussian"`` and ``scale=None``.
    E, F : arrays, optional
        For "given" (r, n_max) with n_max >= n_k: the first n_k columns are used.  For "conv"
        weights (m,), m = n_k/r, for each channel (m, d), or mixing channels (m, d, d).  Without F
        it is E.
    block_bias : bool, optional
        Add ``ln m_b`` to the logits of a mean over ``m_b`` keys; None does where counts differ.
    sketch_options : mapping, optional
        Parameters of the kind of sketch, such as ``{"s": 8}``.

    Notes
    -----
    Wang, Li, Khabsa, Fang and Ma, "Linformer: Self-Attention with Linear Complexity" (2020),
    equation (7); there E and F are printed (n, k) and used as (k, n).  Masked keys are zeroed
    before the projection, means run over the keys that are not masked, and a block without any
    is hidden.  Never causal: every row of E K mixes all positions, so that no mask on (n_q, r)
    logits hides the future.  "max_pool", and "conv" with weights by channel in F, are no matrix:
    `attend` computes their output, `approximate` refuses.  ``Ahat V`` costs
    ``O(n_k r (d + d_v) + n_q r (d + d_v))`` and holds nothing of size n_q x r.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=16, d=4, rng=0)[0]
    >>> ahat = sa.Linformer(rank=4, projection="mean_pool").approximate(problem)
    >>> ahat.rank_bound, bool(abs(ahat.row_sums() - 1).max() < 1e-6)
    (4, True)
    >>> sa.Linformer(rank=4, projection="max_pool").attend(problem).shape
    (16, 4)
    """

    def __init__(
        self,
        rank: int,
        projection: str = "gaussian",
        sharing: str = "none",
        scale: str | None = None,
        init: str | None = None,
        E: ArrayLike | None = None,  # noqa: N803  (the letter of the paper)
        F: ArrayLike | None = None,  # noqa: N803  (the letter of the paper)
        block_bias: bool | None = None,
        sketch_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.rank = rank
        self.projection = projection
        self.sharing = sharing
        self.scale = scale
        self.init = init
        self.E = E
        self.F = F
        self.block_bias = block_bias
        self.sketch_options = sketch_options

    @property
    def traits(self) -> Traits:
        """Masks and shapes are honoured, ``causal`` is not; means of blocks are row-stochastic.

        Maxima, and values mixed by channel, have no matrix.
        """
        means = self.projection == "mean_pool" and self.scale in (None, "average")
        return Traits(
            key_mask=True,
            randomized=self.projection not in FIXED,
            row_stochastic=means,
            nonnegative=means,
            exact_at_full_rank=means,
            matrix=self.is_linear,
            differentiable=True,
            claims=(
                "linformer.thm1",
                "linformer.thm2",
                "linformer.pooling",
                "linformer.oracle",
                "linformer.eckart_young",
            ),
        )

    # --- arguments --------------------------------------------------------------------------

    def check(self, problem: AttentionProblem) -> None:
        """Refuse a problem that this method cannot honour, or hyper-parameters out of range."""
        if isinstance(problem, AttentionProblem) and problem.causal:
            raise ValueError(
                f"causal must be False for method 'linformer', got {problem.causal!r}: every row "
                f"of E K mixes all positions, so that a mask on (n_q, r) logits does not hide the "
                f"future; use a method whose traits.causal is True"
            )
        super().check(problem)
        if self.projection == "conv":
            self._check_convolution(problem)
        elif self.projection == "given":
            for label, matrix in self._given().items():
                if matrix.shape[0] != self.rank or matrix.shape[1] < problem.n_k:
                    raise ValueError(
                        f"{label} must have shape (rank, n_max) with rank = {self.rank} and "
                        f"n_max >= n_k = {problem.n_k}, got {matrix.shape}; its first n_k columns "
                        f"are used"
                    )

    def _check_parameters(self) -> None:
        kinds = (*sketches(), *FIXED)
        check_name(self.projection, "projection", kinds)
        if self.sharing in ("headwise", "layerwise"):
            raise ValueError(
                f"sharing must be 'none' or 'kv' in one head, got {self.sharing!r}; pass the E and "
                f"F of linformer_projections(..., sharing={self.sharing!r}) to every head"
            )
        check_name(self.sharing, "sharing", ("none", "kv"))
        if self.scale is not None:
            check_name(self.scale, "scale", SCALES)
            allowed = {"conv": ("none",), "given": ("average", "none")}.get(
                self.projection,
                ("average", "none") if self.projection in POOLING else ("isometry", "none"),
            )
            if self.projection == "max_pool":
                allowed = ("none",)
            if self.scale not in allowed:
                raise ValueError(
                    f"scale must be {' or '.join(map(repr, allowed))} for projection "
                    f"{self.projection!r}, got {self.scale!r}; None takes its default"
                )
        if self.init is not None:
            check_name(self.init, "init", tuple(INITIALISATIONS))
            if self.projection != "gaussian" or self.scale is not None:
                raise ValueError(
                    f"init must come with projection='gaussian' and scale=None, which it replaces, "
                    f"got {self.projection!r} and {self.scale!r}; drop one of them"
                )
        if not (self.sketch_options is None or isinstance(self.sketch_options, Mapping)):
            raise TypeError(
                f"sketch_options must be a mapping or None, got "
                f"{type(self.sketch_options).__name__}; pass for instance {{'s': 8}}"
            )
        if self.sketch_options and (self.projection in FIXED or self.init is not None):
            raise ValueError(
                f"sketch_options must be None for projection {self.projection!r} with init "
                f"{self.init!r}, got {sorted(self.sketch_options)}; it is no sketch"
            )
        if not (self.block_bias is None or isinstance(self.block_bias, bool | np.bool_)):
            raise TypeError(
                f"block_bias must be a bool or None, got {type(self.block_bias).__name__}; "
                f"None adds it where blocks differ in size"
            )
        if self.block_bias and not (
            self.projection == "mean_pool" and self.scale in (None, "average")
        ):
            raise ValueError(
                f"block_bias must be None or False unless blocks are averaged, got True for "
                f"projection {self.projection!r} and scale {self.scale!r}; use means"
            )
        takes = self.projection in ("given", "conv")
        if takes and self.E is None:
            raise ValueError(
                f"E must be given for projection {self.projection!r}, got None; pass an array"
            )
        for label, x in (("E", self.E), ("F", self.F)):
            if x is not None and not takes:
                raise ValueError(
                    f"{label} must be None for projection {self.projection!r}, got an array; "
                    f"use projection='given'"
                )
        if self.F is not None and self.sharing == "kv":
            raise ValueError(
                "F must be None with sharing='kv', where it is E, got an array; drop F"
            )
        axes = (1, 2, 3) if self.projection == "conv" else (2,)
        for label, x in (("E", self.E), ("F", self.F)):
            if x is not None:
                check_array(x, label, axes)

    def _given(self) -> dict[str, Array]:
        """Return E, and F where it is another array; `_check_parameters` has checked them."""
        pairs = (("E", self.E), ("F", self.F))
        return {label: as_array(x, label) for label, x in pairs if x is not None}

    def _check_convolution(self, problem: AttentionProblem) -> None:
        r, n = int(self.rank), problem.n_k
        if n % r:
            raise ValueError(
                f"rank must divide n_k = {n} for projection 'conv', got {r}: a stride of "
                f"int(n_k/rank) = {n // r} gives {(n - n // r) // (n // r) + 1} rows; pad the keys "
                f"or change rank"
            )
        given = self._given()
        for label, width in (("E", problem.d), ("F", problem.d_v)):
            w = given.get(label, given["E"])
            wanted = (n // r, *(width,) * (w.ndim - 1))
            if width is not None and w.shape != wanted:
                raise ValueError(
                    f"{label} must have shape {wanted} as weights of n_k/rank = {n // r} taps for "
                    f"{width} channels, got {w.shape}; pass F for values of another width"
                )

    @property
    def is_linear(self) -> bool:
        """Whether there is a matrix ``Ahat``: not for maxima and for values mixed by channel."""
        if self.projection == "max_pool":
            return False
        if self.projection == "conv":
            weights = self.E if self.F is None else self.F
            return weights is None or np.ndim(weights) <= 1  # None is refused, with the reason
        return True

    # --- draw -------------------------------------------------------------------------------

    def _draw(self, problem: AttentionProblem, rng: np.random.Generator) -> Draw:
        if self.projection in FIXED:
            return Draw()
        r, n = int(self.rank), problem.n_k
        labels = ("E",) if self.sharing == "kv" else ("E", "F")
        out = Draw()
        for label, stream in zip(labels, streams(rng, 2), strict=False):
            if self.init is not None:
                out[label] = initialise(self.init, r, n, stream).astype(problem.dtype)
                continue
            drawn = self._make(r, n, stream, problem.dtype)
            if drawn.array_names == ("sketch",):
                out[label] = Projection(drawn, None, self._factor(drawn)).to_dense(problem.dtype)
            else:
                out.update({f"{label}_{name}": x for name, x in drawn.arrays.items()})
        return out

    def _make(self, r: int, n: int, rng: np.random.Generator, dtype: Any) -> Sketch:
        options = dict(self.sketch_options or {})
        return make_sketch(self.projection, r, n, rng, dtype=dtype, **options)

    def _factor(self, drawn: Sketch) -> float:
        return 1 / drawn.isometry_scale if self.scale == "none" else 1.0

    def _check_draw(self, problem: AttentionProblem, draw: Mapping[str, Any]) -> Draw:
        if self.projection in FIXED:
            return check_draw(draw, ())
        labels = ("E",) if self.sharing == "kv" else ("E", "F")
        names = sketches()[self.projection].array_names
        structured = self.init is None and names != ("sketch",)
        if structured and not (isinstance(draw, Mapping) and set(draw) == set(labels)):
            return check_draw(draw, tuple(f"{a}_{b}" for a in labels for b in names))
        checked = check_draw(draw, labels)
        wanted = (int(self.rank), problem.n_k)
        for label in labels:
            matrix = check_array(checked[label], label)
            if matrix.shape != wanted:
                raise ValueError(
                    f"draw[{label!r}] must have shape (rank, n_k) = {wanted}, got {matrix.shape}; "
                    f"use method.draw(problem, rng)"
                )
            checked[label] = matrix
        return checked

    # --- what it makes ----------------------------------------------------------------------

    def _projections(
        self, problem: AttentionProblem, draw: Draw
    ) -> tuple[Projection | None, Projection | None]:
        """Return E and F, None where they are no matrices."""
        r, n, dtype = int(self.rank), problem.n_k, problem.dtype
        keep = problem.key_mask
        if self.projection == "max_pool":
            return None, None
        if self.projection == "mean_pool":
            pool = MeanPool(n, r, keep, self.scale != "none")
            return pool, pool
        made: dict[str, Projection | None] = {}
        if self.projection in ("given", "conv"):
            for label, x in self._given().items():
                made[label] = self._matrix(x, r, n, dtype, keep, label)
        else:
            for label in ("E", "F"):
                if label in draw:
                    made[label] = Projection(draw[label].astype(dtype), keep)
                    continue
                prefix = f"{label}_"
                arrays = {k[len(prefix) :]: x for k, x in draw.items() if k.startswith(prefix)}
                if arrays:
                    cls = sketches()[self.projection]
                    options = dict(self.sketch_options or {})
                    drawn = cls.from_arrays(arrays, (r, n), dtype=dtype, **options)
                    made[label] = Projection(drawn, keep, self._factor(drawn))
        return made["E"], made.get("F", made["E"])

    def _matrix(
        self, x: Array, r: int, n: int, dtype: Any, keep: Array | None, label: str
    ) -> Projection | None:
        if self.projection == "conv":
            if x.ndim > 1:
                return None
            # E_(b, bm+t) = w_t.
            return Projection(np.kron(np.eye(r, dtype=dtype), x.astype(dtype)[None]), keep)
        matrix = np.ascontiguousarray(x[:, :n], dtype)
        if self.scale == "average":
            shown = matrix if keep is None else np.where(keep, matrix, 0)
            sums = shown.sum(axis=1, keepdims=True, dtype=np.float64)
            if (sums == 0).any():
                raise ValueError(
                    f"{label} must have rows that do not sum to 0 for scale='average', got 0 in "
                    f"row {int(np.argmax(sums[:, 0] == 0))}; use scale='none'"
                )
            matrix = (matrix / sums).astype(dtype)
        return Projection(matrix, keep)

    def _keys(self, problem: AttentionProblem, e: Projection | None) -> Callable[[Array], Array]:
        if e is not None:
            return e.apply
        r, keep = int(self.rank), problem.key_mask
        if self.projection == "max_pool":
            return lambda k: max_pool_rows(k, r, keep)
        weights = self._given()["E"]
        return lambda k: convolve(weights, k, r, keep)

    def _values(self, problem: AttentionProblem, f: Projection | None) -> Array:
        """Return the compressed values ``F V``, or what stands for them."""
        v = problem.arrays.v
        assert v is not None
        if f is not None:
            return f.apply(v)
        r, keep = int(self.rank), problem.key_mask
        if self.projection == "max_pool":
            return max_pool_rows(v, r, keep)
        given = self._given()
        return convolve(given.get("F", given["E"]), v, r, keep)

    def _blocks(self, problem: AttentionProblem) -> tuple[Array | None, Array | None]:
        """Return the bias ``ln m_b``, where it is added, and the blocks without a key."""
        if self.projection not in FIXED[:-1]:
            return None, None
        keep = problem.key_mask
        starts = pool_starts(problem.n_k, int(self.rank))
        counts = np.diff(starts) if keep is None else np.add.reduceat(keep.astype(int), starts[:-1])
        empty = counts == 0
        bias = None
        means = self.projection == "mean_pool" and self.scale != "none"
        uneven = len(set(counts[~empty].tolist())) > 1
        if means and (self.block_bias or (self.block_bias is None and uneven)):
            bias = np.log(np.maximum(counts, 1))
        return bias, empty if empty.any() else None

    def _reduced(
        self, problem: AttentionProblem, e: Projection | None, f: Projection
    ) -> ReducedAttention:
        bias, empty = self._blocks(problem)
        wide = problem.dtype == np.float64
        remake = None if wide else InFloat64(self._reduced_wide, problem, (e, f))
        return ReducedAttention(problem, self._keys(problem, e), f, bias, empty, remake)

    def _reduced_wide(
        self, problem: AttentionProblem, e: Projection | None, f: Projection
    ) -> ReducedAttention:
        return self._reduced(problem, None if e is None else e.wide(), f.wide())

    def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        if not self.is_linear:
            raise ValueError(
                f"projection must be linear for a matrix, got {self.projection!r}, which has no "
                f"Ahat; use Linformer(...).attend(problem) for its output"
            )
        if len(problem.kept_keys) == 0:
            return zero_attention(problem)
        e, f = self._projections(problem, draw)
        assert f is not None  # is_linear
        return self._reduced(problem, e, f)

    def _attend(self, problem: AttentionProblem, draw: Draw) -> Array:
        """Return ``Ohat``, also where the projection is no matrix."""
        if self.is_linear:
            return super()._attend(problem, draw)
        v = problem.values
        if len(problem.kept_keys) == 0:
            return np.zeros((problem.n_q, v.shape[1]), problem.dtype)
        # W alone: the r compressed keys are the columns, and F is the identity on them.
        e, _ = self._projections(problem, Draw())
        bias, empty = self._blocks(problem)
        identity = Projection(np.eye(int(self.rank), dtype=problem.dtype), None)
        reduced = ReducedAttention(problem, self._keys(problem, e), identity, bias, empty)
        return np.asarray(reduced.compressed.exact @ self._values(problem, None))

    def _vjp(self, problem: AttentionProblem, draw: Draw, cotangent: Array) -> Gradient:
        from .gradient import spread

        if len(problem.kept_keys) == 0:
            return zero_gradient(problem)
        e, f = self._projections(problem, draw)
        keys, values = self._keys(problem, e)(problem.arrays.k), self._values(problem, f)
        bias, empty = self._blocks(problem)
        there = np.arange(len(keys)) if empty is None else np.flatnonzero(~empty)
        made = softmax_pullback(
            problem.q,
            keys[there],
            values[there],
            cotangent,
            problem.scale,
            bias=None if bias is None else bias[there],
        )
        dkeys, dvalues = np.zeros(keys.shape), np.zeros(values.shape)
        dkeys[there], dvalues[there] = made.k, made.x
        given, keep = self._given(), problem.key_mask
        weights = given.get("E"), given.get("F", given.get("E"))
        dk = spread(e, weights[0], problem.k, dkeys, keep)
        return Gradient(made.q, dk, spread(f, weights[1], problem.values, dvalues, keep))
