"""Linformer: keys and values are projected along the sequence before the softmax.

``W = rowsoftmax(scale Q (E K)^T)``, ``Ohat = W (F V)``, ``Ahat = W F`` with E and F of shape
(r, n_k).  It is a trained architecture: for random E and F it has no guarantee, because E
multiplies the logits and the softmax does not commute with it.  What a random projection does
promise is about ``A S^T S V``, the method "jl".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..draws import Draw, Rng, as_generator, check_draw
from ..operators import AttentionOperator, FactoredAttention, Index, pick, zero_attention
from ..problem import (
    AttentionProblem,
    as_array,
    check_finite,
    check_rank,
    closest,
    float_dtype,
    prepare,
)
from ..sketches import Sketch, make_sketch, sketches
from ..sketches._base import integer, streams
from ._base import Method, Traits, register

Array = NDArray[Any]

POOLING = ("mean_pool", "max_pool")
FIXED = (*POOLING, "conv", "given")
SCALES = ("isometry", "average", "none")
SHARINGS = ("none", "headwise", "kv", "layerwise")


class Initialisation(NamedTuple):
    """Describe how a published code fills E before training.

    Attributes
    ----------
    law : {"normal", "uniform"}
        Independent entries with mean zero.
    deviation : callable
        Their standard deviation from (r, n).
    factor : callable
        ``f`` of ``E |E x|^2 = f |x|^2``, from (r, n): r times the variance.
    source : str
    """

    law: str
    deviation: Callable[[int, int], float]
    factor: Callable[[int, int], float]
    source: str


INITIALISATIONS: dict[str, Initialisation] = {
    "paper": Initialisation(
        "normal", lambda r, n: r**-0.5, lambda r, n: 1.0, "analysis of arXiv 2006.04768"
    ),
    "lucidrains": Initialisation(
        "uniform",
        lambda r, n: (3 * r) ** -0.5,
        lambda r, n: 1 / 3,
        "lucidrains/linformer: uniform between -1/sqrt(r) and 1/sqrt(r)",
    ),
    "tatp22-no-params": Initialisation(
        "normal", lambda r, n: 1 / r, lambda r, n: 1 / r, "tatp22/linformer-pytorch, no_params"
    ),
    "tatp22-learnable": Initialisation(
        "normal",
        lambda r, n: math.sqrt(2 / (n + r)),
        lambda r, n: 2 * r / (n + r),
        "tatp22/linformer-pytorch, learnable: Xavier normal, without its bias",
    ),
    "fairseq": Initialisation(
        "normal", lambda r, n: 0.02, lambda r, n: 4e-4 * r, "fairseq, examples/linformer"
    ),
    "nystromformer": Initialisation(
        "normal", lambda r, n: 0.02, lambda r, n: 4e-4 * r, "mlpen/Nystromformer, LRA code"
    ),
    "long-range-arena": Initialisation(
        "normal",
        lambda r, n: n**-0.5,
        lambda r, n: r / n,
        "google-research/long-range-arena: variance 1/n; a normal law in place of a truncated one",
    ),
}


def _name(value: object, label: str, known: Sequence[str]) -> str:
    if not isinstance(value, str):
        raise TypeError(
            f"{label} must be a string, got {type(value).__name__}; choose one of "
            f"{', '.join(known)}"
        )
    if value not in known:
        raise ValueError(f"{label} must be a known name, got {value!r}{closest(value, known)}")
    return value


def initialise(init: str, r: int, n: int, rng: Rng = None) -> Array:
    """Draw E (r, n) as a published code initialises it.

    Parameters
    ----------
    init : str
        A key of ``INITIALISATIONS``.
    r, n : int
        Rows and columns, at least 1.
    rng : None, int or numpy.random.Generator

    Returns
    -------
    ndarray (r, n), float64

    Raises
    ------
    TypeError, ValueError
        For an unknown name or sizes out of range.

    Notes
    -----
    Codes with a bias in the projection are initialised without it: with a bias ``E 0`` is not 0
    and there is no ``Ahat``.

    Examples
    --------
    >>> initialise("lucidrains", 4, 8, rng=0).shape
    (4, 8)
    >>> INITIALISATIONS["fairseq"].factor(256, 512)
    0.1024
    """
    law = INITIALISATIONS[_name(init, "init", tuple(INITIALISATIONS))]
    rows = integer(r, "r", 1, None, "", "ask for one row or more")
    columns = integer(n, "n", 1, None, "", "project one key or more")
    generator = as_generator(rng)
    deviation = law.deviation(rows, columns)
    if law.law == "uniform":
        half = math.sqrt(3) * deviation
        return generator.uniform(-half, half, (rows, columns))
    return deviation * generator.standard_normal((rows, columns))


# --- projections ------------------------------------------------------------------------------


def pool_starts(n: int, r: int) -> Array:
    """Return the first position of each of r blocks and n: block b is floor(bn/r)..floor((b+1)n/r).

    Examples
    --------
    >>> pool_starts(7, 3).tolist()
    [0, 2, 4, 7]
    """
    return np.arange(r + 1, dtype=np.int64) * n // r


class _Projection:
    """Apply E (r, n) to arrays whose first axis is the keys; masked keys count as zero."""

    def __init__(self, form: Array | Sketch, keep: Array | None, factor: float = 1.0) -> None:
        self.form, self.keep, self.factor = form, keep, factor
        self.shape: tuple[int, int] = (int(form.shape[0]), int(form.shape[1]))

    def _times(self, x: Array) -> Array:
        return x if self.factor == 1.0 else x.dtype.type(self.factor) * x

    def _shown(self, x: Array) -> Array:
        return x if self.keep is None else np.where(self.keep[:, None], x, x.dtype.type(0))

    def apply(self, x: Array) -> Array:
        shown = self._shown(x)
        if isinstance(self.form, np.ndarray):
            from ..kernels.sketching import dense_product

            product = dense_product(prepare(self.form, x.dtype), prepare(shown, x.dtype))
            return self._times(product)
        return self._times(np.asarray(self.form @ shown, x.dtype))

    def apply_transpose(self, y: Array) -> Array:
        return self._shown(self._times(np.asarray(self.form.T @ y, y.dtype)))

    def to_dense(self, dtype: Any) -> Array:
        form = self.form.to_dense() if isinstance(self.form, Sketch) else self.form
        dense = self.factor * np.asarray(form, np.float64)
        if self.keep is not None:
            dense = np.where(self.keep, dense, 0.0)
        return dense.astype(dtype)

    def wide(self) -> _Projection:
        """Return the projection in float64, from the same numbers."""
        form = self.form
        if not isinstance(form, Sketch):
            return _Projection(form.astype(np.float64), self.keep, self.factor)
        again = type(form).from_arrays(form.arrays, form.shape, dtype=np.float64, **form.parameters)
        return _Projection(again, self.keep, self.factor)

    @property
    def nbytes(self) -> int:
        return int(self.form.nbytes)


class _MeanPool(_Projection):
    """Average, or sum, the keys of each block that are not masked."""

    def __init__(self, n: int, r: int, keep: Array | None, average: bool) -> None:
        self.keep, self.average, self.shape = keep, average, (r, n)
        self.starts = pool_starts(n, r)
        ones = np.ones(n) if keep is None else keep.astype(np.float64)
        self.counts = np.add.reduceat(ones, self.starts[:-1])
        self.weights = 1 / np.maximum(self.counts, 1) if average else np.ones(r)

    def apply(self, x: Array) -> Array:
        sums = np.add.reduceat(self._shown(x), self.starts[:-1], axis=0)
        return np.asarray(self.weights[:, None] * sums, x.dtype)

    def apply_transpose(self, y: Array) -> Array:
        spread = np.asarray(self.weights[:, None] * y, y.dtype)
        return self._shown(np.repeat(spread, np.diff(self.starts), axis=0))

    def to_dense(self, dtype: Any) -> Array:
        return self.apply_transpose(np.eye(self.shape[0])).T.astype(dtype)

    def wide(self) -> _Projection:
        return self

    @property
    def nbytes(self) -> int:
        return int(self.starts.nbytes + self.weights.nbytes)


def _max_pool(x: Array, r: int, keep: Array | None) -> Array:
    """Return the maximum over each block of the rows that are not masked, zero where none is."""
    low = x.dtype.type(-np.inf)
    shown = x if keep is None else np.where(keep[:, None], x, low)
    out: Array = np.maximum.reduceat(shown, pool_starts(len(x), r)[:-1], axis=0)
    return np.where(out == low, x.dtype.type(0), out)


def _convolve(weights: Array, x: Array, r: int, keep: Array | None) -> Array:
    """Return ``sum_t w_t x_(bm+t)`` for weights (m,), (m, d) a channel or (m, d, d) mixing them."""
    m = len(x) // r
    shown = x if keep is None else np.where(keep[:, None], x, x.dtype.type(0))
    blocks = shown.reshape(r, m, x.shape[1])
    formula = {1: "t,bti->bi", 2: "ti,bti->bi", 3: "tij,bti->bj"}[weights.ndim]
    return np.ascontiguousarray(np.einsum(formula, weights.astype(x.dtype), blocks))


class ReducedAttention(AttentionOperator):
    """Represent ``Ahat = W F`` with ``W = rowsoftmax(scale Q C^T + 1 b^T)``, C = E K (r, d).

    A product is exact attention to the r compressed keys: W is never held.

    Parameters
    ----------
    problem : AttentionProblem
        Its queries, keys and scale.
    e : callable
        ``K -> E K``.
    f : projection
        F, with its products.
    bias : ndarray (r,), optional
        b.
    empty : bool ndarray (r,), optional
        Rows of E without a key, which get no weight.
    remake : callable, optional
        Returns the same operator in float64.
    """

    def __init__(
        self,
        problem: AttentionProblem,
        e: Callable[[Array], Array],
        f: _Projection,
        bias: Array | None = None,
        empty: Array | None = None,
        remake: Callable[[], ReducedAttention] | None = None,
    ) -> None:
        super().__init__((problem.n_q, problem.n_k), problem.dtype, f.shape[0])
        self.projection = f
        self._remake = remake
        q, k = problem.arrays.q, e(problem.arrays.k)
        scale = problem.scale
        if bias is not None:
            # One more feature carries the bias: scale Q C^T + 1 b^T = [scale Q, 1] [C, b]^T.
            ones = np.ones((len(q), 1), q.dtype)
            q = np.concatenate([q.dtype.type(scale) * q, ones], axis=1)
            k = np.concatenate([k, bias[:, None].astype(k.dtype)], axis=1)
            scale = 1.0
        keep = None if empty is None else ~empty
        if bias is None and keep is None:
            check_finite(k, "E k")
            self.compressed = AttentionProblem.adopt(q, k, scale=scale)
        else:
            self.compressed = AttentionProblem(q, k, scale=scale, key_mask=keep)

    @property
    def rank_bound(self) -> int:
        """The number of compressed keys, or the smaller side."""
        return min(*self.shape, self.projection.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the queries, the compressed keys and F."""
        return self.compressed.exact.nbytes + self.projection.nbytes

    def wide(self) -> AttentionOperator:
        """Return the same estimator of the same problem and draw in float64."""
        return self if self._remake is None else self._remake()

    @property
    def weights(self) -> Array:
        """``W`` as a dense array (n_q, r)."""
        return self.compressed.exact.to_dense()

    def factored(self) -> FactoredAttention:
        """Return the same matrix with its factors W (n_q, r) and F (r, n_k) in memory."""
        return FactoredAttention(self.weights, None, self.projection.to_dense(self.dtype))

    def _matmat(self, x: Array) -> Array:
        return np.asarray(self.compressed.exact @ self.projection.apply(self._cast(x)))

    def _rmatmat(self, y: Array) -> Array:
        return self.projection.apply_transpose(np.asarray(self.compressed.exact.T @ self._cast(y)))

    def rows(self, index: Index) -> Array:
        """Return chosen rows as a dense array (len(index), n_k)."""
        weights = self.compressed.exact.rows(pick(self.shape[0], index))
        return np.ascontiguousarray(self.projection.apply_transpose(weights.T.copy()).T)


# --- the method -------------------------------------------------------------------------------


def _array(value: object, name: str, axes: tuple[int, ...] = (2,)) -> Array:
    """Return a checked array of floating-point numbers."""
    array = as_array(value, name)
    float_dtype(array, name)
    if array.ndim not in axes:
        raise ValueError(
            f"{name} must have {' or '.join(map(str, axes))} axes, got shape {array.shape}; "
            f"matrices are (r, n_k), convolution weights (m,), (m, d) or (m, d, d)"
        )
    check_finite(array, name)
    return array


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
        _name(self.projection, "projection", kinds)
        if self.sharing in ("headwise", "layerwise"):
            raise ValueError(
                f"sharing must be 'none' or 'kv' in one head, got {self.sharing!r}; pass the E and "
                f"F of linformer_projections(..., sharing={self.sharing!r}) to every head"
            )
        _name(self.sharing, "sharing", ("none", "kv"))
        if self.scale is not None:
            _name(self.scale, "scale", SCALES)
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
            _name(self.init, "init", tuple(INITIALISATIONS))
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
                _array(x, label, axes)

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
                out[label] = _Projection(drawn, None, self._factor(drawn)).to_dense(problem.dtype)
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
            matrix = _array(checked[label], label)
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
    ) -> tuple[_Projection | None, _Projection | None]:
        """Return E and F, None where they are no matrices."""
        r, n, dtype = int(self.rank), problem.n_k, problem.dtype
        keep = problem.key_mask
        if self.projection == "max_pool":
            return None, None
        if self.projection == "mean_pool":
            pool = _MeanPool(n, r, keep, self.scale != "none")
            return pool, pool
        made: dict[str, _Projection | None] = {}
        if self.projection in ("given", "conv"):
            for label, x in self._given().items():
                made[label] = self._matrix(x, r, n, dtype, keep, label)
        else:
            for label in ("E", "F"):
                if label in draw:
                    made[label] = _Projection(draw[label].astype(dtype), keep)
                    continue
                prefix = f"{label}_"
                arrays = {k[len(prefix) :]: x for k, x in draw.items() if k.startswith(prefix)}
                if arrays:
                    cls = sketches()[self.projection]
                    options = dict(self.sketch_options or {})
                    drawn = cls.from_arrays(arrays, (r, n), dtype=dtype, **options)
                    made[label] = _Projection(drawn, keep, self._factor(drawn))
        return made["E"], made.get("F", made["E"])

    def _matrix(
        self, x: Array, r: int, n: int, dtype: Any, keep: Array | None, label: str
    ) -> _Projection | None:
        if self.projection == "conv":
            if x.ndim > 1:
                return None
            # E_(b, bm+t) = w_t.
            return _Projection(np.kron(np.eye(r, dtype=dtype), x.astype(dtype)[None]), keep)
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
        return _Projection(matrix, keep)

    def _keys(self, problem: AttentionProblem, e: _Projection | None) -> Callable[[Array], Array]:
        if e is not None:
            return e.apply
        r, keep = int(self.rank), problem.key_mask
        if self.projection == "max_pool":
            return lambda k: _max_pool(k, r, keep)
        weights = self._given()["E"]
        return lambda k: _convolve(weights, k, r, keep)

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
        self, problem: AttentionProblem, e: _Projection | None, f: _Projection
    ) -> ReducedAttention:
        bias, empty = self._blocks(problem)

        def remake() -> ReducedAttention:
            again = None if e is None else e.wide()
            return self._reduced(problem.astype(np.float64), again, f.wide())

        wide = problem.dtype == np.float64
        return ReducedAttention(
            problem, self._keys(problem, e), f, bias, empty, None if wide else remake
        )

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

    def attend(
        self,
        problem: AttentionProblem,
        rng: Rng = None,
        *,
        draw: Mapping[str, Any] | None = None,
    ) -> Array:
        """Return ``Ohat`` (n_q, d_v), also where the projection is no matrix.

        Parameters
        ----------
        problem : AttentionProblem
            With values.
        rng, draw
            As for `approximate`.

        Raises
        ------
        TypeError, ValueError
            As `approximate`, but for projections that are no matrix.

        Examples
        --------
        >>> import sketchattn as sa
        >>> problem = sa.make_heads("gaussian", n=16, d=4, rng=0)[0]
        >>> sa.Linformer(rank=4, projection="max_pool").attend(problem).shape
        (16, 4)
        """
        if self.is_linear:
            return super().attend(problem, rng, draw=draw)
        self.check(problem)
        if draw is not None:
            self._handed_in(problem, rng, draw)
        v = problem.values
        if len(problem.kept_keys) == 0:
            return np.zeros((problem.n_q, v.shape[1]), problem.dtype)
        r, keep = int(self.rank), problem.key_mask
        if self.projection == "max_pool":
            values = _max_pool(v, r, keep)
        else:
            given = self._given()
            values = _convolve(given.get("F", given["E"]), v, r, keep)
        # W alone: the r compressed keys are the columns, and F is the identity on them.
        e, _ = self._projections(problem, Draw())
        bias, empty = self._blocks(problem)
        identity = _Projection(np.eye(r, dtype=problem.dtype), None)
        reduced = ReducedAttention(problem, self._keys(problem, e), identity, bias, empty)
        return np.asarray(reduced.compressed.exact @ values)


# --- a stack of layers and heads ----------------------------------------------------------------


class Projections(NamedTuple):
    """Pair the E and the F of one head, float64 (r, n); the same object where they are shared."""

    E: Array
    F: Array


def rank_schedule(layers: int, rank: int, step: int) -> list[int]:
    """Return a rank a layer, ``max(1, rank - l step)`` for layer l = 0, 1, ...

    Notes
    -----
    The paper recommends smaller ranks in higher layers, without an experiment; this rule is the
    one of tatp22/linformer-pytorch.

    Examples
    --------
    >>> rank_schedule(4, 10, 4)
    [10, 6, 2, 1]
    """
    count = integer(layers, "layers", 1, None, "", "ask for one layer or more")
    first = integer(rank, "rank", 1, None, "", "ask for one row or more")
    fall = integer(step, "step", 0, None, "", "ranks do not grow")
    return [max(1, first - layer * fall) for layer in range(count)]


def linformer_projections(
    layers: int,
    heads: int,
    n: int,
    ranks: int | Sequence[int],
    sharing: str = "none",
    *,
    projection: str = "gaussian",
    init: str | None = None,
    rng: Rng = None,
    **options: Any,
) -> list[list[Projections]]:
    """Draw the E and F of every layer and head of a model.

    Parameters
    ----------
    layers, heads : int
    n : int
        Length: columns of E and F.
    ranks : int or sequence of int (layers,)
        A rank for all layers, or one a layer.
    sharing : {"none", "headwise", "kv", "layerwise"}
        "headwise": one E and one F a layer; "kv": one matrix a layer, E = F; "layerwise": one
        matrix for everything.  Of 12 layers of 12 heads these are 288, 24, 12 and 1 matrices.
    projection : str
        A kind of ``sketchattn.sketches.sketches()`` or "mean_pool".
    init : str, optional
        A key of ``INITIALISATIONS``, in place of ``projection``.
    rng : None, int or numpy.random.Generator
    **options
        Parameters of the sketch.

    Returns
    -------
    list of lists of Projections
        ``out[layer][head].E`` and ``.F``; shared ones are the same object.

    Raises
    ------
    TypeError, ValueError
        For unknown names, sizes out of range, or ranks that differ with "layerwise".

    Examples
    --------
    >>> stack = linformer_projections(2, 3, 16, [4, 2], "kv", rng=0)
    >>> stack[0][1].E is stack[0][2].F, stack[1][0].E.shape
    (True, (2, 16))
    """
    count = integer(layers, "layers", 1, None, "", "ask for one layer or more")
    width = integer(heads, "heads", 1, None, "", "ask for one head or more")
    length = integer(n, "n", 1, None, "", "project one key or more")
    given = list(ranks) if isinstance(ranks, Sequence | np.ndarray) else [ranks] * count
    if len(given) != count:
        raise ValueError(
            f"ranks must hold one rank for each of the {count} layers, got {len(given)}; "
            f"an integer is a rank for all"
        )
    every = [check_rank(r, length) for r in given]
    _name(sharing, "sharing", SHARINGS)
    if sharing == "layerwise" and len(set(every)) > 1:
        raise ValueError(
            f"ranks must be equal with sharing='layerwise', got {every}; share within layers only"
        )
    _name(projection, "projection", (*sketches(), "mean_pool"))
    if init is not None:
        _name(init, "init", tuple(INITIALISATIONS))
    if options and (init is not None or projection == "mean_pool"):
        raise TypeError(
            f"options must be empty for this projection, got {sorted(options)}; drop them"
        )
    generator = as_generator(rng)

    def make(r: int) -> Array:
        if init is not None:
            return initialise(init, r, length, generator)
        if projection == "mean_pool":
            return _MeanPool(length, r, None, True).to_dense(np.float64)
        return make_sketch(projection, r, length, generator, **options).to_dense()

    if sharing == "layerwise":
        one = make(every[0])
        return [[Projections(one, one)] * width for _ in range(count)]
    out: list[list[Projections]] = []
    for r in every:
        if sharing == "none":
            out.append([Projections(make(r), make(r)) for _ in range(width)])
            continue
        e = make(r)
        out.append([Projections(e, e if sharing == "kv" else make(r))] * width)
    return out


# --- fitted to heads ----------------------------------------------------------------------------


class OracleFloor(NamedTuple):
    """Hold what the best F leaves for a given E.

    Attributes
    ----------
    error : float
        ``|(I - W W^+) O|_F``.
    relative : float
        Over ``|O|_F``; 0 for a zero output.
    values : ndarray (r, d_v)
        ``Z = W^+ O``, the best F V.
    """

    error: float
    relative: float
    values: Array


def oracle_floor(weights: ArrayLike, output: ArrayLike) -> OracleFloor:
    """Return the least ``|W Z - O|_F`` over all Z: what no F can get below.

    Where V has full column rank it is attained by ``F = Z V^+``.

    Parameters
    ----------
    weights : array (n_q, r)
        ``W`` of `ReducedAttention.weights`.
    output : array (n_q, d_v)
        The exact output O.

    Examples
    --------
    >>> oracle_floor(np.full((2, 1), 1.0), np.array([[1.0], [3.0]])).error
    1.4142135623730951
    """
    w, o = (
        np.asarray(as_array(x, s), np.float64)
        for x, s in ((weights, "weights"), (output, "output"))
    )
    for x, label in ((w, "weights"), (o, "output")):
        if x.ndim != 2 or len(x) != len(w):
            raise ValueError(
                f"{label} must have shape (n_q, m) with n_q = {len(w)}, got {x.shape}; "
                f"pass W and O of one head"
            )
    values = np.linalg.lstsq(w, o, rcond=None)[0]
    error = float(np.linalg.norm(w @ values - o))
    size = float(np.linalg.norm(o))
    return OracleFloor(error, error / size if size else 0.0, values)


@dataclass(frozen=True)
class LinformerFit:
    """Hold E and F fitted to heads, and what they reach.

    Attributes
    ----------
    E, F : ndarray (r, n_k), float64
    errors : tuple of float
        ``|Ohat - O|_F / |O|_F`` of each head.
    floors : tuple of float
        The same for this E with the best ``F V`` of each head alone; see `oracle_floor`.
    history : tuple of float
        Sum of squared relative errors after each step, never rising for "least-squares".
    how : str
    """

    E: Array
    F: Array
    errors: tuple[float, ...]
    floors: tuple[float, ...]
    history: tuple[float, ...]
    how: str

    def method(self) -> Linformer:
        """Return the method with these matrices."""
        return Linformer(len(self.E), "given", E=self.E, F=self.F)


class _Head(NamedTuple):
    q: Array  # with the scale
    k: Array
    v: Array
    output: Array
    size: float


def _softmax(logits: Array) -> Array:
    weights: Array = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


def _weights_of(head: _Head, e: Array) -> Array:
    return _softmax(head.q @ (e @ head.k).T)


def _loss(heads: Sequence[_Head], e: Array, f: Array) -> float:
    return sum(
        float(np.sum((_weights_of(h, e) @ (f @ h.v) - h.output) ** 2)) / h.size**2 for h in heads
    )


def _best_f(heads: Sequence[_Head], e: Array, start: Array | None) -> Array:
    """Return the F with the least ``sum_h |W_h F V_h - O_h|^2/|O_h|^2`` for this E."""
    from scipy.sparse.linalg import LinearOperator, lsqr

    weights = [_weights_of(h, e) for h in heads]
    if len(heads) == 1:  # F = W^+ O V^+
        h = heads[0]
        z = np.linalg.lstsq(weights[0], h.output, rcond=None)[0]
        return np.asarray(z @ np.linalg.pinv(h.v))
    shape = (len(e), heads[0].k.shape[0])

    def forward(x: Array) -> Array:
        f = np.reshape(x, shape)
        parts = [(w @ (f @ h.v)) / h.size for w, h in zip(weights, heads, strict=True)]
        return np.concatenate([p.ravel() for p in parts])

    def backward(y: Array) -> Array:
        out, at = np.zeros(shape), 0
        y = np.ravel(y)
        for w, h in zip(weights, heads, strict=True):
            block = y[at : at + h.output.size].reshape(h.output.shape)
            at += h.output.size
            out += (w.T @ block) @ h.v.T / h.size
        return out.ravel()

    target = np.concatenate([(h.output / h.size).ravel() for h in heads])
    operator: Any = LinearOperator(
        (len(target), shape[0] * shape[1]), matvec=forward, rmatvec=backward, dtype=np.float64
    )
    begin = np.zeros(shape[0] * shape[1]) if start is None else start.ravel()
    found = lsqr(operator, target, x0=begin, atol=1e-12, btol=1e-12, iter_lim=200)[0]
    return np.asarray(found).reshape(shape)


def _better_e(heads: Sequence[_Head], e: Array, f: Array, steps: int) -> Array:
    """Return E after some L-BFGS steps on the loss with F held."""
    from scipy.optimize import minimize

    shape = e.shape

    def loss(x: Array) -> tuple[float, Array]:
        total, gradient = 0.0, np.zeros(shape)
        now = x.reshape(shape)
        for h in heads:
            w, z = _weights_of(h, now), f @ h.v
            rest = (w @ z - h.output) / h.size**2
            total += float(np.sum(rest * rest)) * h.size**2
            # d softmax: W o (G - (W o G) 1 1^T), G = 2 rest Z^T.
            g = 2 * rest @ z.T
            g = w * (g - np.sum(w * g, axis=1, keepdims=True))
            gradient += (g.T @ h.q) @ h.k.T
        return total, gradient.ravel()

    found = minimize(loss, e.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": steps})
    return np.asarray(found.x).reshape(shape)


def fit_linformer(
    problems: AttentionProblem | Sequence[AttentionProblem],
    rank: int,
    how: str = "least-squares",
    *,
    iterations: int = 4,
    steps: int = 25,
) -> LinformerFit:
    """Fit one E and one F to given heads: what the form can do, without a random projection.

    "low-rank" picks r keys by pivoted QR of the r largest right singular vectors of the stacked
    matrices A, E selects them, and ``F = W^+ A`` is the best matrix for this E.  "least-squares"
    starts there or at the means of blocks, whichever is better, and alternates: the best F for
    this E in closed form (``W^+ O V^+`` for one head, LSQR for several), then L-BFGS on E.

    Parameters
    ----------
    problems : AttentionProblem or sequence of them
        Heads with values and equally many keys; masked keys are refused.
    rank : int
        In 1..n_k.
    how : {"least-squares", "low-rank"}
    iterations : int, default 4
        Alternations; 0 leaves E where it starts.
    steps : int, default 25
        L-BFGS iterations in each.

    Returns
    -------
    LinformerFit

    Raises
    ------
    TypeError, ValueError
        For other arguments, causal problems, masks, and heads of different lengths.

    Notes
    -----
    The problem in E is not convex: the result is what the scheme finds, an upper bound of what
    the form can do.  Errors are those on the heads that it was fitted to.

    Examples
    --------
    >>> import sketchattn as sa
    >>> head = sa.make_heads("clustered", n=32, d=4, rng=0)[0]
    >>> fit = fit_linformer(head, 8)
    >>> fit.E.shape, fit.history[-1] <= fit.history[0]
    ((8, 32), True)
    """
    from scipy.linalg import qr

    listed = [problems] if isinstance(problems, AttentionProblem) else list(problems)
    if not listed or not all(isinstance(p, AttentionProblem) for p in listed):
        raise TypeError("problems must be AttentionProblems, at least one, got others; pass heads")
    _name(how, "how", ("least-squares", "low-rank"))
    n = listed[0].n_k
    r = check_rank(rank, n)
    rounds = integer(iterations, "iterations", 0, None, "", "0 keeps E")
    inner = integer(steps, "steps", 1, None, "", "take one step or more")
    for p in listed:
        if p.causal or p.key_mask is not None or p.n_k != n or p.n_q == 0:
            raise ValueError(
                f"problems must be neither causal nor masked, with a query and n_k = {n} keys "
                f"each, got {p!r}; delete masked keys first"
            )
        _ = p.values
    heads = []
    for p in listed:
        wide = p.astype(np.float64)
        size = float(np.linalg.norm(wide.output)) or 1.0
        heads.append(_Head(wide.scale * wide.q, wide.k, np.asarray(wide.values), wide.output, size))
    stacked = np.concatenate([p.astype(np.float64).exact.to_dense() for p in listed])
    right = np.linalg.svd(stacked, full_matrices=False)[2][:r]
    order = qr(right, mode="r", pivoting=True)[1][:r]
    e = np.zeros((r, n))
    e[np.arange(r), np.sort(order)] = 1.0
    if how == "low-rank":
        weights = np.concatenate([_weights_of(h, e) for h in heads])
        f = np.linalg.lstsq(weights, stacked, rcond=None)[0]
        history = [_loss(heads, e, f)]
    else:
        starts = [e, _MeanPool(n, r, None, True).to_dense(np.float64)]
        fitted = [(x, _best_f(heads, x, None)) for x in starts]
        e, f = min(fitted, key=lambda pair: _loss(heads, *pair))
        history = [_loss(heads, e, f)]
        for _ in range(rounds):
            new_e = _better_e(heads, e, f, inner)
            new_f = _best_f(heads, new_e, f)
            loss = min((_loss(heads, new_e, x), i) for i, x in enumerate((new_f, f)))
            if loss[0] >= history[-1]:
                break
            e, f = new_e, (new_f, f)[loss[1]]
            history.append(loss[0])
    every = [(_weights_of(h, e), h) for h in heads]
    errors = [float(np.linalg.norm(w @ (f @ h.v) - h.output)) / h.size for w, h in every]
    floors = [oracle_floor(w, h.output).relative for w, h in every]
    return LinformerFit(e, f, tuple(errors), tuple(floors), tuple(history), how)
