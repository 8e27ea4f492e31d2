"""Compiled kernels: elementary functions, fast-math semantics, and products against loops."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numba
import numpy as np
import pytest
from method_cases import CASES, IDS, MethodCase, make_problem, supports
from naive import naive_attention, naive_compare, naive_transposed
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn.kernels import _threads, comparison, softmax
from sketchattn.kernels._jit import FASTMATH, kernel
from sketchattn.kernels._threads import deal
from sketchattn.kernels.partitioned import line_means

Array = NDArray[Any]
COMPILED = not numba.config.DISABLE_JIT  # type: ignore[attr-defined]  # set at run time
INF = math.inf
PRECISIONS = [np.float32, np.float64]
# What the documentation of the kernels promises: relative errors of the exponential.
EXP = {np.float32: 6e-7, np.float64: 1e-15}


def u(dtype: Any) -> float:
    """Return the unit roundoff."""
    return float(np.finfo(dtype).eps) / 2


def compiled(source: str, **names: Any) -> Any:
    """Return ``f`` of a source text, compiled with the flags of the kernels and never cached.

    A cache would be stamped with the file of ``f`` alone and outlive a change of what it calls.
    """
    space: dict[str, Any] = dict(names)
    exec(source, space)
    return numba.njit(fastmath=set(FASTMATH), error_model="numpy")(space["f"])


MAP = """
def f(x, out):
    for i in range(x.size):
        out[i] = g(x[i])
"""
_maps: dict[Any, Any] = {}


def apply(function: Any, x: Array) -> Array:
    """Return ``function`` of every entry, in a compiled loop."""
    if function not in _maps:
        _maps[function] = compiled(MAP, g=function)
    out = np.empty_like(x)
    _maps[function](x, out)
    return out


def worst(actual: Array, expected: Array) -> float:
    """Return the largest relative error; NaN counts as infinite."""
    error = np.abs(actual.astype(np.float64) - expected) / np.abs(expected)
    return float(np.max(np.where(np.isnan(error), INF, error)))


# --- elementary functions -----------------------------------------------------------------------


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_exp2_over_its_whole_range(dtype: Any) -> None:
    lowest = np.finfo(dtype).minexp
    count = 100_000 if COMPILED else 2_000
    x = np.linspace(lowest, 0, count).astype(dtype)
    assert worst(apply(softmax.exp2, x), np.exp2(x.astype(np.float64))) <= EXP[dtype]
    # A row maximum is subtracted after rounding: arguments slightly above 0 happen.
    x = np.linspace(0, 1, 1_000).astype(dtype)
    assert worst(apply(softmax.exp2, x), np.exp2(x.astype(np.float64))) <= EXP[dtype]


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_exp2_at_special_values(dtype: Any) -> None:
    lowest = np.finfo(dtype).minexp
    below = np.nextafter(dtype(lowest), dtype(-INF))
    x = np.array([-INF, np.finfo(dtype).min, -1e30, 8 * lowest, below, -0.0, 0.0, np.nan], dtype)
    y = apply(softmax.exp2, x)
    assert y[:5].tolist() == [0.0] * 5
    assert y[5:7].tolist() == [1.0, 1.0]
    assert np.isnan(y[7])
    whole = np.arange(lowest, 1).astype(dtype)
    assert np.array_equal(apply(softmax.exp2, whole), np.ldexp(dtype(1), np.arange(lowest, 1)))


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_tanh(dtype: Any) -> None:
    # (1 - t)/(1 + t) with t = e^(-2x) <= e^(-5/4) moves by 2|dt|/((1 + t)^2 tanh x) < 0.63 rho
    # relative, rho that of t, plus five roundings; below 5/8 there are as many roundings.
    bound = 0.63 * (EXP[dtype] + 2 * u(dtype)) + 5 * u(dtype)
    count = 50_000 if COMPILED else 1_000
    x = np.concatenate([np.linspace(1e-6, 12, count), np.geomspace(1e-30, 1, 999)]).astype(dtype)
    y = apply(softmax.tanh, x)
    assert worst(y, np.tanh(x.astype(np.float64))) <= bound
    assert np.array_equal(apply(softmax.tanh, -x), -y)
    assert np.all(np.abs(y) <= 1)
    edge = apply(softmax.tanh, np.array([0, 20, 1e4, INF, -INF, np.nan], dtype))
    assert edge[:5].tolist() == [0.0, 1.0, 1.0, 1.0, -1.0]
    assert np.isnan(edge[5])


@pytest.mark.interpreted
def test_log2_over_all_numbers() -> None:
    rng = np.random.default_rng(0)
    count = 20_000 if COMPILED else 500
    x = np.ldexp(1.0 + rng.random(count), rng.integers(-1022, 1024, count))
    # Near 1 the logarithm vanishes: the error must vanish with it.
    near = 1.0 + np.concatenate([s * np.geomspace(2.0**-52, 0.5, 500) for s in (1, -1)])
    subnormal = np.ldexp(1.0 + rng.random(500), rng.integers(-1074, -1022, 500))
    x = np.concatenate([x, near, subnormal, [5e-324, 1.7e308, 1.4142135623730951, 0.70710678]])
    x = x[x != 1.0]
    # t is rounded twice, its polynomial and the product about five times, the reference once.
    assert worst(apply(comparison.log2, x), np.log2(x)) <= 8 * u(np.float64)
    powers = np.ldexp(1.0, np.arange(-1074, 1024))
    assert np.array_equal(apply(comparison.log2, powers), np.arange(-1074, 1024))


MAXIMA = """
def f(x, out):
    for i in range(x.shape[0]):
        out[i] = g(x[i])
"""


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_row_maximum(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    tiny = float(np.finfo(dtype).smallest_subnormal)
    x = rng.standard_normal((40, 37)).astype(dtype)
    x[5] = -np.abs(x[5])
    x[6] = -INF
    x[7, :-1] = -INF
    x[8] = -np.geomspace(1e30, 1e-30, 37)
    x[9] = [tiny, -tiny] + 35 * [-1.0]
    x[10] = [-tiny] + 36 * [-2 * tiny]
    x[11] = 37 * [np.finfo(dtype).min]
    x[12, 30] = INF
    x[13] = 0.0
    run = compiled(MAXIMA, g=softmax.row_maximum)
    out = np.empty(len(x), dtype)
    run(x, out)
    assert np.array_equal(out, x.max(axis=1))
    assert not np.array_equal(out, x[:, :-1].max(axis=1))
    run(np.empty((len(x), 0), dtype), out)
    assert np.all(np.isneginf(out))


# --- compilation --------------------------------------------------------------------------------


def test_flags_reorder_but_keep_nan_and_infinity() -> None:
    space: dict[str, Any] = {}
    exec("def f(x, y):\n    return (x - y) + y\ndef g(x):\n    return x != x\n", space)
    shift, is_nan = kernel()(space["f"]), kernel()(space["g"])
    # x - inf + inf is NaN in order; what it is after reassociation is x, here 0.
    assert math.isnan(shift(0.0, INF)) != COMPILED
    assert shift(1.0, 3.0) == 1.0
    assert is_nan(math.nan)
    assert not is_nan(INF)
    assert {"nnan", "ninf", "fast"}.isdisjoint(FASTMATH)


def entries() -> dict[str, Any]:
    """Return the kernels that Python calls: those whose items are dealt."""
    named = vars(softmax) | vars(comparison)
    options = {name: getattr(f, "targetoptions", {}) for name, f in named.items()}
    return {x: named[x] for x, o in options.items() if o.get("forceinline") is False}


@pytest.mark.skipif(not COMPILED, reason="signatures exist where kernels are compiled")
def test_signatures_stay_within_two_precisions_of_contiguous_arrays() -> None:
    rng = np.random.default_rng(0)
    for dtype in (np.float16, np.float32, np.float64, np.dtype(np.float64).newbyteorder()):
        for layout in ("C", "F", "strided", "reversed", "read-only"):
            arrays: list[Array] = [rng.standard_normal((6, 4)).astype(dtype) for _ in range(3)]
            q, k, v = arrays
            if layout == "F":
                q, k, v = (np.asfortranarray(x) for x in (q, k, v))
            elif layout == "strided":
                q, k, v = (np.repeat(x, 2, axis=1)[:, ::2] for x in (q, k, v))
            elif layout == "reversed":
                q, k, v = (x[::-1] for x in (q, k, v))
            for x in (q, k, v):
                x.flags.writeable = layout != "read-only"
            mask = np.arange(6) != 2
            for problem in (
                sa.AttentionProblem(q, k, v),
                sa.AttentionProblem(q, k, v, causal=True, key_mask=mask),
            ):
                a = problem.exact
                wide: Array = problem.values.astype(np.float64)
                blocks: list[Array] = [problem.values, wide[:, ::-1], np.asfortranarray(wide)]
                for x in (*blocks, wide, wide[:, 0]):
                    assert (a @ x).dtype == (a.T @ x).dtype == problem.dtype
                a.column_norms()
                for path in ("streaming", "dense"):
                    sa.error_report(problem, sa.TopK(2).approximate(problem), path=path)
                    sa.error_report(problem, a.to_dense(), path=path)
                comparison.gram_product(np.asarray(a.to_dense(), np.float64), np.ones(6))
            sa.attention(q, k, v, attn_mask=np.ones((6, 6), bool), sink=np.zeros(1, dtype))
            sa.attention(q, k, v, attn_mask=np.zeros((6, 6), dtype), softcap=2.0)
    wanted = {"attend", "attend_transposed", "compare", "compare_dense", "gram_times"}
    assert wanted <= set(entries())
    for name, f in entries().items():
        assert 1 <= len(f.signatures) <= 2, name
        for signature in f.signatures:
            floats = set()
            for argument in signature:
                if isinstance(argument, numba.types.Array):
                    assert argument.layout == "C", (name, argument)
                    assert argument.mutable, (name, argument)
                    assert argument.aligned, (name, argument)
                    floats |= {argument.dtype} - {numba.types.boolean, numba.types.int64}
            assert floats <= {numba.types.float32, numba.types.float64}, (name, signature)


@pytest.mark.filterwarnings("ignore")  # of clusters with few distinct keys
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_kernels_of_every_method_see_arrays_of_one_layout(
    case: MethodCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another one, or one that may not be written to, would be compiled once more.
    shared, seen = _threads._shared, set()

    def watched(work: Any, arguments: Any, threads: int) -> None:
        for i, x in enumerate(arguments):
            if isinstance(x, np.ndarray) and not (x.flags.c_contiguous and x.flags.writeable):
                seen.add((getattr(work, "__name__", str(work)), i, x.dtype.name))
        shared(work, arguments, threads)

    monkeypatch.setattr(_threads, "_shared", watched)
    for options in ({}, {"causal": True}, {"key_mask": np.arange(30) % 3 > 0}):
        problem = make_problem(30, 30, np.float32, **options)
        if supports(case, problem):
            method = case(8)
            method.attend(problem, 0)
            ahat = method.approximate(problem, 0)
            assert (ahat.T @ (ahat @ problem.values)).shape == problem.values.shape
            if case.traits.logsumexp:
                method.attend_with_lse(problem, 0)
    assert seen == set()


# --- products against loops ---------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Arguments of the kernels' drivers for one head, and the loops' results."""

    q: Array
    k: Array
    v: Array
    scale: float
    first: int
    right: int | None
    left: int | None
    keys: Array | None
    softcap: float
    weights: Array
    out: Array
    lse: Array

    @property
    def sizes(self) -> Array:
        """Return ``scale |Q| |K|^T`` (n_q, n_k) in float64."""
        q, k = (np.abs(x.astype(np.float64)) for x in (self.q, self.k))
        size: Array = abs(self.scale) * q @ k.T
        return size

    def product(self, **changes: Any) -> tuple[Array, Array]:
        arguments: dict[str, Any] = {
            "scale": self.scale,
            "softcap": self.softcap,
            "first": np.array([self.first]),
            "left": self.left,
            "right": self.right,
            "key_mask": None if self.keys is None else self.keys[None].copy(),
        }
        arguments |= changes
        out, lse = softmax.softmax_product(self.q[None], self.k[None], self.v[None], **arguments)
        return out[0], lse[0]


@cache
def make(
    n_q: int,
    n_k: int,
    dtype: Any,
    *,
    d: int = 4,
    m: int = 3,
    spread: float = 2.0,
    first: int = 0,
    right: int | None = None,
    left: int | None = None,
    masked: bool = False,
    softcap: float = 0.0,
    seed: int = 0,
) -> Case:
    """Return a random case whose logits have a standard deviation of ``spread``."""
    rng = np.random.default_rng(seed)
    q = (spread * rng.standard_normal((n_q, d))).astype(dtype)
    k = rng.standard_normal((n_k, d)).astype(dtype)
    v = rng.standard_normal((n_k, m)).astype(dtype)
    keys = rng.random(n_k) < 0.7 if masked else None
    options: dict[str, Any] = {"first": first, "right": right, "left": left, "softcap": softcap}
    weights, out, lse = naive_attention(q, k, v, scale=d**-0.5, key_mask=keys, **options)
    return Case(
        q=q, k=k, v=v, scale=d**-0.5, keys=keys, weights=weights, out=out, lse=lse, **options
    )


def gamma(count: int, dtype: Any) -> float:
    return count * u(dtype) / (1 - count * u(dtype))


def logit_errors(case: Case) -> Array:
    """Bound what rounding does to each logit (n_q, n_k), in natural units.

    The sum of d products with a scaled query: gamma_(d+2) scale |q||k|; the factor scale log2(e)
    and its product with q: 2u more; the shift by the row maximum or the normaliser: u times its
    size, at most the largest |L| twice; a softcap contracts, and adds its own few roundings.
    """
    dtype = case.q.dtype
    size = case.sizes
    largest = size.max(axis=1, keepdims=True, initial=0.0)
    d = case.q.shape[1]
    errors: Array = gamma(d + 4, dtype) * size + 3 * u(dtype) * largest
    if case.softcap:
        errors += (8 * u(dtype) + 0.63 * EXP[dtype.type]) * min(case.softcap, largest.max())
    return errors


def product_bounds(case: Case, tiles: int) -> tuple[Array, Array]:
    """Return what the output and the logsumexp may be off: (2 delta + 2 rho + 2 g + ...)(A|V|)."""
    dtype = case.q.dtype
    rho = EXP[dtype.type]
    delta = np.max(np.where(case.weights > 0, logit_errors(case), 0), axis=1, initial=0.0)
    n_k = case.k.shape[0]
    relative = (
        np.expm1(2 * delta) + 2 * rho + 2 * gamma(n_k + 1, dtype) + 2 * tiles * (rho + u(dtype))
    )
    size = case.weights @ np.abs(case.v.astype(np.float64))
    lse = np.where(np.isfinite(case.lse), case.lse, 0)
    tail = delta + rho + gamma(n_k + 1, dtype) + tiles * (rho + u(dtype))
    return relative[:, None] * size, tail + 4 * u(dtype) * (np.abs(lse) + math.log(n_k + 1))


def wrong(case: Case, out: Array, lse: Array | None = None) -> bool:
    """Say whether a product differs from the loops' by more than rounding; NaN does."""
    out_bound, lse_bound = product_bounds(case, 1 + case.k.shape[0] // softmax.KEY_TILE)
    if not np.all(np.abs(out - case.out) <= out_bound):
        return True
    if lse is None:
        return False
    empty = np.isneginf(case.lse)
    with np.errstate(invalid="ignore"):
        return not np.all(np.where(empty, np.isneginf(lse), np.abs(lse - case.lse) <= lse_bound))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"right": 0},
    "bottom-right": {"right": 0, "first": 5},
    "negative": {"right": 0, "first": -4},  # the first rows see nothing
    "window": {"right": 1, "left": 2},
    "masked": {"masked": True},
    "masked causal": {"masked": True, "right": 0},
    "softcap": {"softcap": 3.0},
}
TINY = [(1, 1), (3, 5), (5, 2)]
# More rows than three tiles of 32, more keys than one tile of 512.
LARGE = [(70, 530)]


@pytest.mark.interpreted
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("sizes", TINY)
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_product_of_small_sizes_is_that_of_the_loops(
    dtype: Any, sizes: tuple[int, int], name: str
) -> None:
    case = make(*sizes, dtype, **OPTIONS[name])
    out, lse = case.product()
    assert out.dtype == lse.dtype == dtype
    assert not wrong(case, out, lse)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_product_over_several_tiles_is_that_of_the_loops(dtype: Any, name: str) -> None:
    for sizes in LARGE:
        options = {**OPTIONS[name]}
        if name == "window":
            options = {"right": 500, "left": 30}
        if name == "bottom-right":
            options["first"] = sizes[1] - sizes[0]
        case = make(*sizes, dtype, **options)
        out, lse = case.product()
        assert not wrong(case, out, lse)
        assert wrong(case, 1.01 * out), "the tolerance bites"
        assert wrong(case, out, lse + 1e-3)
        assert wrong(case, case.product(right=1)[0]) or name in ("plain", "masked", "softcap")


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_wide_values_are_multiplied_in_pieces(dtype: Any) -> None:
    case = make(4, 6, dtype, m=2 * softmax.WIDEST + 3)
    out, lse = case.product()
    assert not wrong(case, out, lse)
    rolled = np.roll(out, softmax.WIDEST, axis=1)
    assert wrong(case, rolled)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_products_of_nothing_are_empty_or_zero(dtype: Any) -> None:
    none = make(3, 4, dtype, m=0)
    out, lse = none.product()
    assert out.shape == (3, 0)
    assert not wrong(none, out, lse)
    q, k, v = (np.ones(s, dtype) for s in ((1, 3, 4), (1, 0, 4), (1, 0, 2)))
    out, lse = softmax.softmax_product(q, k, v, scale=1.0)
    assert out.tolist() == [[[0, 0]] * 3]
    assert np.all(np.isneginf(lse))
    out, lse = softmax.softmax_product(q[:, :0], q, q, scale=1.0)
    assert (out.shape, lse.shape) == ((1, 0, 4), (1, 0))


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_nan_logits_give_nan_rows_and_no_others(dtype: Any) -> None:
    case = make(5, 4, dtype)
    q = case.q.copy()
    q[2, 1] = np.nan
    out, lse = softmax.softmax_product(q[None], case.k[None], case.v[None], scale=case.scale)
    assert np.all(np.isnan(out[0, 2]))
    assert np.isnan(lse[0, 2])
    others = np.arange(5) != 2
    clean, clean_lse = case.product()
    assert np.array_equal(out[0, others], clean[others])
    assert np.array_equal(lse[0, others], clean_lse[others])


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_fully_masked_row_is_zero(dtype: Any) -> None:
    case = make(4, 3, dtype)
    visible = np.ones((1, 4, 3), bool)
    visible[0, 1] = False
    bias = np.where(visible, 0, -INF).astype(dtype)
    for mask in (visible, bias):
        out, lse = case.product(mask=mask)
        assert out[1].tolist() == [0, 0, 0]
        assert np.isneginf(lse[1])
        assert np.array_equal(out[[0, 2, 3]], case.product()[0][[0, 2, 3]])
    out, lse = case.product(key_mask=np.zeros((1, 3), bool))
    assert not out.any()
    assert np.all(np.isneginf(lse))
    y = np.ones((4, 2), dtype)
    arguments: dict[str, Any] = {"scale": case.scale, "first": 0, "right": None}
    hidden = np.zeros((1, 3), bool)
    assert not softmax.transposed_product(
        case.q, case.k, y, lse, key_mask=hidden, **arguments
    ).any()


def transposed(case: Case, y: Array) -> Array:
    return softmax.transposed_product(
        case.q,
        case.k,
        y,
        case.lse.astype(case.q.dtype),
        scale=case.scale,
        first=case.first,
        right=case.right,
        key_mask=None if case.keys is None else case.keys[None].copy(),
    )


def transposed_wrong(case: Case, y: Array, result: Array) -> bool:
    """Say whether ``A^T Y`` differs from the loops' by more than rounding; NaN does.

    Entries move by exp of the error of the logit and of the normaliser, 3u |lse| with its storage,
    and by rho; sums of n_q terms by gamma.
    """
    dtype = case.q.dtype
    lse = np.where(np.isfinite(case.lse), np.abs(case.lse), 0)
    delta = logit_errors(case) + 3 * u(dtype) * lse[:, None]
    factor = np.expm1(delta) + EXP[dtype.type] + gamma(len(y) + 2, dtype)
    bound = naive_transposed(case.weights * factor, np.abs(y))
    return not np.all(np.abs(result - naive_transposed(case.weights, y)) <= bound)


NO_WINDOW = [name for name in OPTIONS if name not in ("window", "softcap")]


@pytest.mark.interpreted
@pytest.mark.parametrize("name", NO_WINDOW)
@pytest.mark.parametrize("sizes", TINY)
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_transposed_product_of_small_sizes_is_that_of_the_loops(
    dtype: Any, sizes: tuple[int, int], name: str
) -> None:
    case = make(*sizes, dtype, **OPTIONS[name])
    y = np.random.default_rng(1).standard_normal((sizes[0], 2)).astype(dtype)
    result = transposed(case, y)
    assert result.dtype == dtype
    assert not transposed_wrong(case, y, result)


@pytest.mark.parametrize("name", NO_WINDOW)
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_transposed_product_over_several_tiles_is_that_of_the_loops(dtype: Any, name: str) -> None:
    case = make(530, 70, dtype, **OPTIONS[name])
    y = np.random.default_rng(1).standard_normal((530, 2)).astype(dtype)
    result = transposed(case, y)
    assert not transposed_wrong(case, y, result)
    assert transposed_wrong(case, y, 1.01 * result)
    assert transposed_wrong(case, y, np.roll(result, 1, axis=0))
    assert transposed_wrong(case, y, np.full_like(result, np.nan))


def test_transposed_product_of_a_wide_block_equals_its_columns() -> None:
    case = make(6, 5, np.float64)
    y = np.random.default_rng(1).standard_normal((6, softmax.WIDEST + 40))
    result = transposed(case, y)
    assert not transposed_wrong(case, y, result)
    assert transposed(case, y[:, :0]).shape == (5, 0)


def compared(case: Case, other: Array, start: int = 0) -> Array:
    """Return the sums of ``compare`` from the wide case; rows before ``start`` are NaN.

    Normalisers and the exact output are found beside them; with these given the bits are the same.
    """
    n_q = len(case.q)
    made: list[Array] = []
    lse, product = np.full(n_q, np.nan), np.full((n_q, case.v.shape[1]), np.nan)
    for known in (False, True):
        out = np.full((n_q, 4), np.nan)
        comparison.compare_rows(
            case.q,
            case.k,
            case.v,
            other[start:].copy(),
            start,
            lse,
            product,
            out,
            known=known,
            scale=case.scale,
            first=case.first,
            right=case.right,
            key_mask=None if case.keys is None else case.keys[None].copy(),
        )
        made.append(out)
    assert np.array_equal(made[0], made[1], equal_nan=True)
    assert np.all(np.isnan(lse[:start]))
    assert np.all(np.isnan(product[:start]))
    assert not lse_wrong(case, lse, start)
    # Weights with the errors of their logits, then a sum of n_k terms.
    delta = logit_errors(case) + 4 * u(np.float64) * sizes_of(case.lse)[:, None]
    moved = np.expm1(delta) + EXP[np.float64] + gamma(len(case.k) + 3, np.float64)
    exact, bound = case.weights @ case.v, (case.weights * moved) @ np.abs(case.v)
    assert np.all(np.abs(product - exact)[start:] <= bound[start:] + 1e-300)
    return made[0]


def sizes_of(lse: Array) -> Array:
    """Return the sizes of normalisers, 0 for rows that see nothing."""
    return np.where(np.isfinite(lse), np.abs(lse), 0.0)


def lse_wrong(case: Case, lse: Array, start: int) -> bool:
    """Say whether normalisers differ by more than the errors of their logits and of a sum."""
    seen = np.isfinite(case.lse)[start:]
    if not np.array_equal(np.isfinite(lse[start:]), seen):
        return True
    room = logit_errors(case).max(axis=1, initial=0.0) + gamma(len(case.k) + 8, np.float64)
    room += EXP[np.float64] + 4 * u(np.float64) * sizes_of(case.lse)
    found, wanted = lse[start:][seen], case.lse[start:][seen]
    return not np.all(np.abs(found - wanted) <= room[start:][seen])


def compare_wrong(case: Case, other: Array, result: Array) -> bool:
    """Say whether sums over rows differ from the loops' by more than rounding; NaN does.

    An entry a of A moves by e = a (expm1(delta) + rho): its square by 2ae, that of the difference
    by 2|a - b|e + e^2, the modulus by e, a log(a/b) by e (1 + |log(a/b)|) + a (delta + 16u
    |log|), the last term for the two logarithms; a sum of n_k terms by gamma times its terms.
    """
    a, b = case.weights, other.astype(np.float64)
    delta = (
        logit_errors(case)
        + 4 * u(np.float64) * np.where(np.isfinite(case.lse), np.abs(case.lse), 0)[:, None]
    )
    e = a * (np.expm1(delta) + EXP[np.float64])
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = (a > 0) & (b > 0)
        logs = np.where(inside, np.abs(np.log(a)) + np.abs(np.log(b)), 0)
    gap = np.abs(a - b)
    g = gamma(a.shape[1] + 3, np.float64)
    bounds = np.stack(
        [
            (2 * a * e + e * e + g * a * a).sum(axis=1),
            (2 * gap * e + e * e + g * gap * gap).sum(axis=1),
            (e + g * gap).sum(axis=1),
            (e * (1 + logs) + a * (delta + (16 * u(np.float64) + g) * logs)).sum(axis=1),
        ],
        axis=1,
    )
    expected = naive_compare(a, b)
    with np.errstate(invalid="ignore"):
        fine = np.where(np.isinf(expected), result == expected, np.abs(result - expected) <= bounds)
    return not fine.all()


def another(case: Case, dtype: Any, kind: str) -> Array:
    """Return a matrix to compare with: positive, with zeros, or with negative entries."""
    rng = np.random.default_rng(2)
    other = rng.random(case.weights.shape) + 0.01
    other /= other.sum(axis=1, keepdims=True)
    if kind == "zeros":
        other[rng.random(other.shape) < 0.1] = 0
    if kind == "negative":
        other[rng.random(other.shape) < 0.1] *= -1
    if kind == "near":
        other = case.weights * (1 + 1e-6 * rng.standard_normal(other.shape))
    return other.astype(dtype)


@pytest.mark.interpreted
@pytest.mark.parametrize("kind", ["positive", "zeros", "negative", "near"])
@pytest.mark.parametrize("name", NO_WINDOW)
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_comparison_of_small_sizes_is_that_of_the_loops(dtype: Any, name: str, kind: str) -> None:
    for sizes in TINY:
        case = make(*sizes, np.float64, **OPTIONS[name])
        other = another(case, dtype, kind)
        assert not compare_wrong(case, other, compared(case, other))


@pytest.mark.parametrize("kind", ["positive", "zeros"])
@pytest.mark.parametrize("name", NO_WINDOW)
def test_comparison_over_several_tiles_is_that_of_the_loops(name: str, kind: str) -> None:
    for sizes in ((70, 530), (150, 40)):
        case = make(*sizes, np.float64, **OPTIONS[name])
        other = another(case, np.float64, kind)
        result = compared(case, other)
        assert not compare_wrong(case, other, result)
        for column in range(4):
            spoilt = result.copy()
            spoilt[-1, column] = spoilt[-1, column] * 1.001 + 1e-6 if kind == "positive" else np.nan
            assert compare_wrong(case, other, spoilt)
        late = compared(case, other, start=33)
        assert np.all(np.isnan(late[:33]))
        full = np.isfinite(result[33:, 3])
        assert np.allclose(late[33:][full], result[33:][full], rtol=1e-12, atol=0)


@pytest.mark.interpreted
@pytest.mark.parametrize("kind", ["positive", "zeros", "negative", "near"])
@pytest.mark.parametrize("name", NO_WINDOW)
def test_comparison_of_matrices_is_that_of_the_loops(name: str, kind: str) -> None:
    for sizes in (*TINY, (70, 1030)) if COMPILED else TINY:
        case = make(*sizes, np.float64, **OPTIONS[name])
        other = another(case, np.float64, kind)
        difference, result = comparison.compare_matrices(case.weights, other)
        assert np.array_equal(difference, other - case.weights)
        assert not compare_wrong(case, other, result)
        result[-1] = result[-1] * 1.001 + 1e-6
        assert compare_wrong(case, other, np.where(np.isinf(result), 0.0, result))


def test_weights_below_the_normal_range_have_no_divergence() -> None:
    exact, other = np.array([[1.0, 1e-310]]), np.array([[1.0, 0.0]])
    assert comparison.compare_matrices(exact, other)[1][0, 3] == 0.0
    assert comparison.compare_matrices(np.array([[1.0, 1e-300]]), other)[1][0, 3] == INF


@pytest.mark.interpreted
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (130, 7), (300, 256)])
def test_gram_product_is_that_of_the_loops(shape: tuple[int, int]) -> None:
    m, n = shape if COMPILED else (min(shape[0], 20), min(shape[1], 9))
    rng = np.random.default_rng(0)
    x, v = rng.standard_normal((m, n)), rng.standard_normal(n)
    found = comparison.gram_product(x, v)
    bound = gamma(m + n + 2, np.float64) * (np.abs(x).T @ (np.abs(x) @ np.abs(v)))
    assert np.all(np.abs(found - x.T @ (x @ v)) <= 2 * bound)
    x[-1, -1] += 1e-6
    assert not np.all(np.abs(found - x.T @ (x @ v)) <= 2 * bound)


def test_divergence_is_infinite_only_on_the_support() -> None:
    case = make(6, 6, np.float64, right=0)
    other = np.tril(np.full((6, 6), 0.5))
    assert np.all(np.isfinite(compared(case, other)))
    other[4, 2] = 0.0
    assert np.flatnonzero(np.isinf(compared(case, other)[:, 3])).tolist() == [4]
    other[5, 0] = -1e-30
    assert np.flatnonzero(np.isinf(compared(case, other)[:, 3])).tolist() == [4, 5]


# --- lines of regions -------------------------------------------------------------------------


def line_parts(mode: int, low: int, cut: int, past: int, high: int) -> list[int]:
    """Return the slots of a line before, after or without a place."""
    before, after = list(range(low, cut)), list(range(past, high))
    return {1: before, 2: after, 3: before + after}[mode]


@pytest.mark.interpreted
@pytest.mark.parametrize("mode", [1, 2, 3])
@pytest.mark.parametrize("size", [0.0, 1.0, 30.0])
def test_lines_have_the_mean_the_weight_and_the_entropy_of_their_keys(
    mode: int, size: float
) -> None:
    """Each region against its keys: two lines of ten and six keys in random order, five places."""
    rng = np.random.default_rng(mode)
    x, e = rng.standard_normal((16, 3)), size * rng.standard_normal(16)
    items = rng.permutation(16)
    low, high, sites = np.array([0, 10]), np.array([10, 16]), 5
    cut = np.concatenate([np.minimum(low + 2 * g, high) for g in range(sites)])
    past = np.concatenate([np.minimum(low + 2 * (g + 1), high) for g in range(sites)])
    out, log_weight, entropy = np.empty((10, 3)), np.empty(10), np.empty(10)
    deal(line_means, x, e, items, low, high, cut, past, sites, mode,
         out, log_weight, entropy, work=0)  # fmt: skip
    for t in range(10):
        keys = items[line_parts(mode, low[t % 2], cut[t], past[t], high[t % 2])]
        if not len(keys):
            assert log_weight[t] == entropy[t] == -np.inf
            assert not out[t].any()
            continue
        weights = np.exp(e[keys] - e[keys].max())
        total = weights.sum()
        weights /= total
        # Logarithms of up to 2 size 3 are rounded in sums of ten terms.
        allowed = 1e-14 * (1 + 10 * size)
        inside = -np.sum(np.where(weights > 0, weights * np.log(np.maximum(weights, 1e-300)), 0))
        assert abs(log_weight[t] - (e[keys].max() + np.log(total))) <= allowed
        assert abs(entropy[t] - inside) <= allowed
        assert np.abs(out[t] - weights @ x[keys]).max() <= allowed
