"""Projections along the sequence: fixed, random, and as published codes initialise them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...base.arguments import as_array, check_finite, check_rank, closest, float_dtype, prepare
from ...base.draws import Rng, as_generator
from ...kernels._threads import product
from ...operators.base import AttentionOperator, Index, pick
from ...operators.factored import FactoredAttention
from ...problem import AttentionProblem
from ...sketches.base import Sketch, integer, make_sketch, sketches

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


def check_name(value: object, label: str, known: Sequence[str]) -> str:
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
    law = INITIALISATIONS[check_name(init, "init", tuple(INITIALISATIONS))]
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


class Projection:
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
            from ...kernels.sketching import dense_product

            return self._times(dense_product(prepare(self.form, x.dtype), prepare(shown, x.dtype)))
        return self._times(np.asarray(self.form @ shown, x.dtype))

    def apply_transpose(self, y: Array) -> Array:
        return self._shown(self._times(np.asarray(product(self.form.T, y), y.dtype)))

    def to_dense(self, dtype: Any) -> Array:
        form = self.form.to_dense() if isinstance(self.form, Sketch) else self.form
        dense = self.factor * np.asarray(form, np.float64)
        if self.keep is not None:
            dense = np.where(self.keep, dense, 0.0)
        return dense.astype(dtype)

    def wide(self) -> Projection:
        """Return the projection in float64, from the same numbers."""
        form = self.form
        if not isinstance(form, Sketch):
            return Projection(form.astype(np.float64), self.keep, self.factor)
        again = type(form).from_arrays(form.arrays, form.shape, dtype=np.float64, **form.parameters)
        return Projection(again, self.keep, self.factor)

    @property
    def nbytes(self) -> int:
        return int(self.form.nbytes)


class MeanPool(Projection):
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

    def wide(self) -> Projection:
        return self

    @property
    def nbytes(self) -> int:
        return int(self.starts.nbytes + self.weights.nbytes)


def max_pool_rows(x: Array, r: int, keep: Array | None) -> Array:
    """Return the maximum over each block of the rows that are not masked, zero where none is."""
    low = x.dtype.type(-np.inf)
    shown = x if keep is None else np.where(keep[:, None], x, low)
    out: Array = np.maximum.reduceat(shown, pool_starts(len(x), r)[:-1], axis=0)
    return np.where(out == low, x.dtype.type(0), out)


def convolve(weights: Array, x: Array, r: int, keep: Array | None) -> Array:
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
        f: Projection,
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


def check_array(value: object, name: str, axes: tuple[int, ...] = (2,)) -> Array:
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
    check_name(sharing, "sharing", SHARINGS)
    if sharing == "layerwise" and len(set(every)) > 1:
        raise ValueError(
            f"ranks must be equal with sharing='layerwise', got {every}; share within layers only"
        )
    check_name(projection, "projection", (*sketches(), "mean_pool"))
    if init is not None:
        check_name(init, "init", tuple(INITIALISATIONS))
    if options and (init is not None or projection == "mean_pool"):
        raise TypeError(
            f"options must be empty for this projection, got {sorted(options)}; drop them"
        )
    generator = as_generator(rng)

    def make(r: int) -> Array:
        if init is not None:
            return initialise(init, r, length, generator)
        if projection == "mean_pool":
            return MeanPool(length, r, None, True).to_dense(np.float64)
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
