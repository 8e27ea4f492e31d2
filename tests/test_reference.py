"""The readable reference: against explicit loops, and against what its documentation promises."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import naive_attention
from numpy.typing import NDArray

from sketchattn.operators import reference
from sketchattn.operators.reference import (
    masked_logits,
    merge,
    reference_attention,
    round_to,
    softmax_rows,
    visible,
    weighted_values,
)

Array = NDArray[Any]
Result = tuple[Array, Array]

W = 2.0**-53  # unit roundoff of float64
INF = float("inf")
NAN = float("nan")


# --- a problem of several heads, and what two float64 computations of it may differ by ---------


@dataclass(frozen=True)
class Problem:
    """Prepared arguments of the reference: q (H, n_q, d), k (H_kv, n_k, d), v (H_kv, n_k, d_v)."""

    q: Array
    k: Array
    v: Array
    scale: float
    first: Array
    left: int | None = None
    right: int | None = None
    softcap: float = 0.0
    key_mask: Array | None = None
    mask: Array | None = None
    sink: Array | None = None
    key_slab: Array | None = None
    mask_slab: Array | None = None

    @property
    def heads(self) -> int:
        return len(self.q)

    @property
    def group(self) -> int:
        return len(self.q) // len(self.k)

    def solve(self) -> Result:
        return reference_attention(
            self.q,
            self.k,
            self.v,
            group=self.group,
            scale=self.scale,
            first=self.first,
            left=self.left,
            right=self.right,
            softcap=self.softcap,
            key_mask=self.key_mask,
            key_slab=self.key_slab,
            mask=self.mask,
            mask_slab=self.mask_slab,
            sink=self.sink,
        )

    def mask_of(self, h: int) -> Array | None:
        if self.mask is None or self.mask_slab is None:
            return None
        shape = (self.q.shape[1], self.k.shape[1])
        full: Array = np.broadcast_to(self.mask[self.mask_slab[h]], shape)
        return full

    def keys_of(self, h: int) -> Array | None:
        if self.key_mask is None or self.key_slab is None:
            return None
        keys: Array = self.key_mask[self.key_slab[h]]
        return keys

    def naive(self, h: int) -> tuple[Array, Array, Array]:
        return naive_attention(
            self.q[h],
            self.k[h // self.group],
            self.v[h // self.group],
            scale=self.scale,
            first=int(self.first[h]),
            left=self.left,
            right=self.right,
            softcap=self.softcap,
            key_mask=self.keys_of(h),
            mask=self.mask_of(h),
            sink=None if self.sink is None else float(self.sink[h]),
        )


def make(
    heads: tuple[int, int] = (2, 2),
    sizes: tuple[int, int] = (6, 7),
    widths: tuple[int, int] = (5, 3),
    *,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """Return a random problem with heads (H, H_kv), sizes (n_q, n_k) and widths (d, d_v).

    Logits have a standard deviation of about 2, so that rows are far from the mean of V.
    """
    rng = np.random.default_rng(seed)
    (h, h_kv), (n_q, n_k), (d, d_v) = heads, sizes, widths
    arguments: dict[str, Any] = {
        "q": np.sqrt(2.0) * rng.standard_normal((h, n_q, d)),
        "k": np.sqrt(2.0) * rng.standard_normal((h_kv, n_k, d)),
        "v": rng.standard_normal((h_kv, n_k, d_v)),
        "scale": d**-0.5,
        "first": np.zeros(h, dtype=np.int64),
    }
    if options.pop("keys", False):
        arguments["key_mask"] = rng.random((2, n_k)) < 0.7
        arguments["key_slab"] = rng.integers(0, 2, size=h)
    kind = options.pop("mask", None)
    if kind is not None:
        rows, columns = options.pop("mask_shape", (n_q, n_k))
        arguments["mask"] = rng.random((2, rows, columns)) < 0.6
        arguments["mask_slab"] = rng.integers(0, 2, size=h)
        if kind == "additive":
            bias = rng.standard_normal((2, rows, columns))
            arguments["mask"] = np.where(arguments["mask"], bias, -INF)
    if options.pop("sink", False):
        arguments["sink"] = rng.standard_normal(h)
    arguments.update(options)
    return Problem(**arguments)


def gamma(count: int) -> float:
    return count * W / (1.0 - count * W)


def bounds(problem: Problem, h: int, weights: Array) -> Result:
    """Bound the difference of two float64 computations of head h, for the output and the lse.

    A logit is off by at most eta_i = max_j [scale sum_t |q_it||k_jt| (gamma_(d+2) + 2w) + 4w|b_ij|]
    over the visible keys: the dot product and its scaling, and the rounding of L - m (at most
    2 max|L|); a bias takes part in the addition and in that subtraction.  A softcap adds the
    rounding of its division, product and tanh, 10 w |L| with tanh right to 4 units in the last
    place.  Every weight then moves by a factor within exp(+-2 eta_i), and exp, two sums and the
    division by gamma_(2 n_k + 12):
        |O - O*| <= [exp(2 eta_i) (1 + gamma_(2 n_k + 12)) - 1] sum_j A_ij |V_jc|,
        |lse - lse*| <= eta_i + gamma_(n_k + 10) + w |lse|.
    Both computations round, hence twice that.  A sink is one more term of the sums.
    """
    q, k = problem.q[h], problem.k[h // problem.group]
    n_k, d = k.shape
    size = abs(problem.scale) * np.abs(q) @ np.abs(k).T
    error = size * (gamma(d + 2) + 2 * W)
    if problem.softcap:
        error += 10 * W * np.minimum(size, problem.softcap)
    mask = problem.mask_of(h)
    if mask is not None and mask.dtype != np.bool_:
        error += 4 * W * np.where(mask == -INF, 0.0, np.abs(mask))
    eta = np.max(np.where(weights > 0.0, error, 0.0), axis=1, initial=0.0)
    growth = np.exp(2 * eta) * (1 + gamma(2 * (n_k + 1) + 12)) - 1
    _, _, lse = problem.naive(h)
    tail = np.where(np.isneginf(lse), 0.0, W * np.abs(lse))
    out_bound = 2 * growth[:, None] * (weights @ np.abs(problem.v[h // problem.group]))
    return out_bound, 2 * (eta + gamma(n_k + 11) + tail)


def complaints(problem: Problem, result: Result) -> list[str]:
    """Say where a result differs from the naive one by more than rounding; NaN always does."""
    found = []
    for h in range(problem.heads):
        weights, out, lse = problem.naive(h)
        out_bound, lse_bound = bounds(problem, h, weights)
        empty = np.isneginf(lse)
        with np.errstate(invalid="ignore"):
            fine = np.abs(result[0][h] - out) <= out_bound
            fine_lse = np.abs(result[1][h] - lse) <= lse_bound
        if not np.all(fine):
            found.append(f"output of head {h}")
        if not np.all(np.where(empty, np.isneginf(result[1][h]), fine_lse)):
            found.append(f"lse of head {h}")
    return found


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale zero": {"scale": 0.0},
    "scale negative": {"scale": -0.7},
    "causal": {"right": 0},
    "causal from 3": {"right": 0, "offset": 3},
    "causal from -2": {"right": 0, "offset": -2},
    "window": {"left": 2, "right": 1},
    "left window": {"left": 0},
    "window from 4": {"left": 1, "right": 0, "offset": 4},
    "softcap": {"softcap": 1.5},
    "key mask": {"keys": True},
    "bool mask": {"mask": "bool"},
    "additive mask": {"mask": "additive"},
    "sink": {"sink": True},
    "sink, window, mask": {"sink": True, "left": 1, "right": 0, "mask": "bool"},
    "everything": {
        "left": 4,
        "right": 2,
        "offset": 1,
        "softcap": 2.0,
        "keys": True,
        "mask": "additive",
        "sink": True,
    },
}
SHAPES: dict[str, tuple[tuple[int, int], tuple[int, int], tuple[int, int]]] = {
    "one": ((1, 1), (1, 1), (1, 1)),
    "square": ((2, 2), (7, 7), (5, 5)),
    "gqa wide": ((6, 2), (4, 9), (8, 2)),
    "mqa tall": ((3, 1), (9, 4), (3, 6)),
    "decode": ((2, 2), (1, 61), (16, 3)),
    "one key": ((1, 1), (5, 1), (4, 4)),
}


def build(shape: str, option: str, seed: int = 0) -> Problem:
    heads, sizes, widths = SHAPES[shape]
    options = dict(OPTIONS[option])
    offset = options.pop("offset", 0)
    return make(
        heads, sizes, widths, seed=seed, first=np.full(heads[0], offset, dtype=np.int64), **options
    )


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_loops(shape: str, option: str) -> None:
    problem = build(shape, option)
    assert complaints(problem, problem.solve()) == []


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("shape", [(1, 7), (6, 1), (1, 1)])
def test_mask_axes_of_length_one_are_broadcast(kind: str, shape: tuple[int, int]) -> None:
    for seed in range(4):
        problem = make(mask=kind, mask_shape=shape, seed=seed)
        assert complaints(problem, problem.solve()) == []


def test_each_head_has_its_own_position_and_slabs() -> None:
    problem = make(
        (4, 2),
        right=0,
        keys=True,
        mask="additive",
        first=np.array([-3, 0, 2, 9]),
        key_slab=np.array([0, 1, 1, 0]),
        mask_slab=np.array([1, 1, 0, 0]),
    )
    assert complaints(problem, problem.solve()) == []


@settings(max_examples=60, deadline=None, database=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    h_kv=st.integers(1, 2),
    group=st.integers(1, 3),
    sizes=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    widths=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    offset=st.integers(-7, 7),
    left=st.none() | st.integers(0, 5),
    right=st.none() | st.integers(0, 5),
    softcap=st.sampled_from([0.0, 0.5, 3.0]),
    keys=st.booleans(),
    mask=st.sampled_from([None, "bool", "additive"]),
    sink=st.booleans(),
)
def test_equals_the_loops_for_any_combination(
    seed: int,
    h_kv: int,
    group: int,
    sizes: tuple[int, int],
    widths: tuple[int, int],
    offset: int,
    **options: Any,
) -> None:
    first = np.full(h_kv * group, offset, dtype=np.int64)
    problem = make((h_kv * group, h_kv), sizes, widths, seed=seed, first=first, **options)
    assert complaints(problem, problem.solve()) == []


# --- the same comparison must report wrong programs --------------------------------------------


def softcap_after_mask(problem: Problem) -> Result:
    """Cap the masked logits, so that masked keys keep a weight of about exp(-softcap)."""
    out, lse = problem.solve()
    for h in range(problem.heads):
        n_q, n_k = problem.q.shape[1], problem.k.shape[1]
        seen = visible(0, n_q, n_k, mask=problem.mask_of(h))
        logits = masked_logits(
            problem.q[h], problem.k[h // problem.group], scale=problem.scale, seen=seen
        )
        logits = problem.softcap * np.tanh(logits / problem.softcap)
        weights, lse[h] = softmax_rows(logits, seen)
        out[h] = weights @ problem.v[h // problem.group]
    return out, lse


def change(**changes: Any) -> Callable[[Problem], Result]:
    return lambda problem: replace(problem, **changes).solve()


def times(factor: float) -> Callable[[Problem], Result]:
    def program(problem: Problem) -> Result:
        out, lse = problem.solve()
        return factor * out, factor * lse

    return program


MUTANTS: dict[str, tuple[str, Callable[[Problem], Result]]] = {
    "scale x 1.1": ("plain", lambda p: replace(p, scale=1.1 * p.scale).solve()),
    "scale x (1 + 1e-9)": ("plain", lambda p: replace(p, scale=(1 + 1e-9) * p.scale).solve()),
    "scale of zero replaced": ("scale zero", change(scale=0.5)),
    "causal off by one": ("causal", change(right=1)),
    "causal ignored": ("causal", change(right=None)),
    "position ignored": ("causal from 3", change(first=np.zeros(6, dtype=np.int64))),
    "window off by one": ("window", change(left=3)),
    "window ignored": ("window", change(left=None, right=None)),
    "softcap ignored": ("softcap", change(softcap=0.0)),
    "key mask ignored": ("key mask", change(key_mask=None)),
    "mask ignored": ("bool mask", change(mask=None)),
    "mask inverted": ("bool mask", lambda p: replace(p, mask=~np.asarray(p.mask)).solve()),
    "bias times scale": (
        "additive mask",
        lambda p: replace(p, mask=p.scale * np.asarray(p.mask)).solve(),
    ),
    "sink ignored": ("sink", change(sink=None)),
    "kv heads tiled": (
        "plain",
        lambda p: replace(p, k=np.tile(p.k, (3, 1, 1)), v=np.tile(p.v, (3, 1, 1))).solve(),
    ),
    "V rolled": ("plain", lambda p: replace(p, v=np.roll(p.v, 1, axis=1)).solve()),
    "last key dropped": ("plain", lambda p: replace(p, k=p.k[:, :-1], v=p.v[:, :-1]).solve()),
    "zeros": ("plain", times(0.0)),
    "NaN": ("plain", times(NAN)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_comparison_reports_wrong_programs(mutant: str) -> None:
    option, program = MUTANTS[mutant]
    problem = build("gqa wide", option)
    assert complaints(problem, problem.solve()) == []
    assert complaints(problem, program(problem))


def test_comparison_reports_softcap_after_the_mask() -> None:
    problem = make((6, 2), (4, 9), (8, 2), softcap=0.5, mask="bool")
    assert complaints(problem, problem.solve()) == []
    assert complaints(problem, softcap_after_mask(problem))


# --- visible sets -------------------------------------------------------------------------------


def picture(seen: Array) -> str:
    return "/".join("".join("01"[int(x)] for x in row) for row in seen)


@pytest.mark.parametrize(
    ("sizes", "options", "expected"),
    [
        ((2, 5), {"right": 0}, "10000/11000"),
        ((2, 5), {"right": 0, "first": 3}, "11110/11111"),
        ((5, 2), {"right": 0, "first": -3}, "00/00/00/10/11"),
        ((4, 6), {"left": 2, "right": 1}, "110000/111000/111100/011110"),
        ((4, 4), {"right": 0, "first": -2}, "0000/0000/1000/1100"),
        ((3, 3), {"left": 0}, "111/011/001"),
        ((2, 3), {}, "111/111"),
        ((2, 3), {"key_mask": np.array([True, False, True])}, "101/101"),
        ((2, 2), {"mask": np.array([[True, False], [False, True]]), "right": 0}, "10/01"),
        ((2, 3), {"mask": np.array([[0.0, -INF, -1e9]])}, "101/101"),
        ((2, 3), {"mask": np.array([[True], [False]])}, "111/000"),
    ],
)
def test_visible_sets(sizes: tuple[int, int], options: dict[str, Any], expected: str) -> None:
    n_q, n_k = sizes
    assert picture(visible(0, n_q, n_k, **options)) == expected


def test_visible_set_of_a_block_is_a_slice_of_the_whole() -> None:
    mask = np.random.default_rng(0).random((9, 11)) < 0.5
    whole = visible(0, 9, 11, first=2, left=4, right=3, mask=mask)
    block = visible(3, 7, 11, first=2, left=4, right=3, mask=mask)
    assert np.array_equal(block, whole[3:7])


# --- the order of operations --------------------------------------------------------------------


def test_stages_of_the_logits() -> None:
    problem = make((1, 1), (3, 4), (2, 2))
    q, k = problem.q[0], problem.k[0]
    bias = np.arange(12.0).reshape(3, 4)
    seen = visible(0, 3, 4, right=0)
    arguments: dict[str, Any] = {"scale": 0.5, "softcap": 2.0, "bias": bias, "seen": seen}
    scaled = masked_logits(q, k, stage="scaled", **arguments)
    capped = masked_logits(q, k, stage="capped", **arguments)
    masked = masked_logits(q, k, **arguments)
    assert np.array_equal(scaled, (q @ k.T) * 0.5)
    assert np.array_equal(capped, 2.0 * np.tanh(scaled / 2.0))
    assert np.array_equal(masked, np.where(seen, capped + bias, -INF))


def test_softcap_comes_before_the_mask() -> None:
    problem = make(sizes=(5, 6), softcap=0.5)
    mask = np.ones((1, 1, 6), dtype=np.bool_)
    mask[..., [2, 5]] = False
    v = problem.v.copy()
    v[:, [2, 5]] = 1000.0
    problem = replace(problem, v=v, mask=mask, mask_slab=np.zeros(2, dtype=np.int64))
    out, _ = problem.solve()
    others = np.abs(v[:, [0, 1, 3, 4]])
    # A convex combination, whose weights sum to 1 within gamma_(n_k + 2).
    assert np.all(np.abs(out) <= others.max(axis=(1, 2))[:, None, None] * (1 + gamma(8)))
    # The wrong order leaks: exp(-0.5) of a value of 1000.
    assert np.abs(softcap_after_mask(problem)[0]).max() > 100.0


def test_large_softcap_changes_nothing() -> None:
    problem = make()
    cap = 1e6
    plain, _ = problem.solve()
    capped, _ = replace(problem, softcap=cap).solve()
    # |c tanh(L/c) - L| <= |L|^3 / (3 c^2), and 10 roundings of L in the cap itself.
    largest = problem.scale * np.max(np.abs(problem.q @ np.swapaxes(problem.k, 1, 2)))
    eta = largest**3 / (3 * cap**2) + 10 * W * largest
    bound = 2 * (np.exp(2 * eta) - 1) * np.abs(problem.v).max() + gamma(40)
    assert bound < 1e-9
    assert np.all(np.abs(capped - plain) <= bound)


def test_grouped_heads_equal_repeated_heads_bit_for_bit() -> None:
    problem = make((6, 2), (4, 5), (3, 4))
    k, v = problem.k, problem.v
    repeated = replace(problem, k=np.repeat(k, 3, axis=0), v=np.repeat(v, 3, axis=0))
    tiled = replace(problem, k=np.tile(k, (3, 1, 1)), v=np.tile(v, (3, 1, 1)))
    assert all(map(np.array_equal, problem.solve(), repeated.solve()))
    assert not np.array_equal(problem.solve()[0], tiled.solve()[0])


# --- empty rows, soft-empty rows, no keys at all -----------------------------------------------


def rows_without_keys() -> dict[str, Problem]:
    """Return problems with 4 queries and 5 keys whose rows 0 and 1 see nothing."""
    zero = np.zeros(2, dtype=np.int64)
    allowed = np.ones((1, 4, 5), dtype=np.bool_)
    allowed[0, :2] = False
    base = make(sizes=(4, 5))
    far = np.zeros((1, 5), dtype=np.bool_)
    far[0, 4] = True
    return {
        "bool mask": replace(base, mask=allowed, mask_slab=zero),
        "additive mask": replace(base, mask=np.where(allowed, 0.0, -INF), mask_slab=zero),
        "key mask": replace(base, key_mask=far, key_slab=zero, right=0, first=zero + 2),
        "negative offset": replace(base, right=0, first=zero - 2),
    }


@pytest.mark.parametrize("which", ["bool mask", "additive mask", "key mask", "negative offset"])
def test_empty_rows(which: str) -> None:
    problem = rows_without_keys()[which]
    with np.errstate(all="raise"):
        out, lse = problem.solve()
    assert np.array_equal(out[:, :2], np.zeros((2, 2, 3)))
    assert np.all(np.isneginf(lse[:, :2]))
    assert np.all(np.isfinite(lse[:, 2:]))
    assert not np.any(np.isnan(out))

    sink = np.array([0.5, -2.0])
    with np.errstate(all="raise"):
        out, lse = replace(problem, sink=sink).solve()
    assert np.array_equal(out[:, :2], np.zeros((2, 2, 3)))
    assert np.array_equal(lse[:, :2], np.stack([sink, sink], axis=1))

    # A sink that removes itself is no sink.
    without = problem.solve()
    nothing = replace(problem, sink=np.full(2, -INF)).solve()
    assert all(map(np.array_equal, without, nothing))


def test_emptiness_is_decided_on_the_visible_set() -> None:
    problem = rows_without_keys()["bool mask"]
    k = problem.k.copy()
    k[:, 0] = INF
    mask = np.array(problem.mask)
    mask[:, :, 0] = False
    out, lse = replace(problem, k=k, mask=mask).solve()
    assert np.array_equal(out[:, :2], np.zeros((2, 2, 3)))
    assert np.all(np.isneginf(lse[:, :2]))
    assert np.all(np.isfinite(out))


def test_rows_of_very_negative_biases_are_taken_literally() -> None:
    problem = make(sizes=(3, 6))
    bias = np.full((1, 3, 6), -1e9)
    pushed = replace(problem, mask=bias, mask_slab=np.zeros(2, dtype=np.int64))
    out, lse = pushed.solve()
    plain, plain_lse = problem.solve()
    assert complaints(pushed, (out, lse)) == []
    # L - 1e9 is rounded to multiples of 2^-23: logits move by up to 2^-24, weights by a factor
    # within exp(+-2^-23).  In float32 the spacing is 64 and the row would be uniform.
    for h in range(2):
        weights, _, _ = problem.naive(h)
        bound = (np.expm1(2.0**-23) + gamma(50)) * (weights @ np.abs(problem.v[h]))
        assert np.all(np.abs(out[h] - plain[h]) <= bound)
    assert np.all(np.abs(lse + 1e9 - plain_lse) <= 2.0**-22)
    uniform = np.broadcast_to(problem.v.mean(axis=1, keepdims=True), out.shape)
    assert np.abs(uniform - plain).max() > 0.1


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("sizes", [(3, 0), (0, 3), (0, 0)])
def test_no_keys_or_no_queries(sizes: tuple[int, int], sink: bool) -> None:
    problem = make((4, 2), sizes, (3, 2), right=0, softcap=1.0, mask="additive", sink=sink)
    with np.errstate(all="raise"):
        out, lse = problem.solve()
    assert out.shape == (4, sizes[0], 2)
    assert np.array_equal(out, np.zeros_like(out))
    expected = problem.sink if problem.sink is not None else np.full(4, -INF)
    assert np.array_equal(lse, np.repeat(expected[:, None], sizes[0], axis=1))


# --- NaN and infinities -------------------------------------------------------------------------


def hidden_keys(n_k: int = 6) -> dict[str, tuple[Problem, list[int]]]:
    """Return problems with 3 queries, each with the keys that no row sees."""
    zero = np.zeros(2, dtype=np.int64)
    base = make(sizes=(3, n_k))
    keep = np.ones((1, 1, n_k), dtype=np.bool_)
    keep[..., [1, 4]] = False
    return {
        "bool mask": (replace(base, mask=keep, mask_slab=zero), [1, 4]),
        "additive mask": (replace(base, mask=np.where(keep, 0.3, -INF), mask_slab=zero), [1, 4]),
        "key mask": (replace(base, key_mask=keep[0], key_slab=zero), [1, 4]),
        "causal": (replace(base, right=0), [3, 4, 5]),
        "window": (replace(base, left=0, first=zero + 2), [0, 1]),
    }


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("which", ["bool mask", "additive mask", "key mask", "causal", "window"])
def test_hidden_keys_never_leak(which: str, where: str, poison: float, softcap: float) -> None:
    problem, hidden = hidden_keys()[which]
    problem = replace(problem, softcap=softcap)
    array = getattr(problem, where).copy()
    array[:, hidden, ::2] = poison
    with np.errstate(all="raise"):
        poisoned = replace(problem, **{where: array}).solve()
    assert all(map(np.array_equal, problem.solve(), poisoned))


@pytest.mark.parametrize(
    ("where", "piece", "leaky"),
    [
        ("v", "weighted_values", lambda weights, seen, v: weights @ v),
        (
            "k",
            "masked_logits",
            lambda q, k, *, seen, scale, **_: scale * (q @ k.T) + np.where(seen, 0.0, -INF),
        ),
    ],
)
def test_a_leak_is_seen(
    where: str, piece: str, leaky: Callable[..., Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, hidden = hidden_keys()["bool mask"]
    array = getattr(problem, where).copy()
    array[:, hidden] = NAN
    expected = problem.solve()
    monkeypatch.setattr(reference, piece, leaky)
    assert all(map(np.allclose, problem.solve(), expected))
    poisoned = replace(problem, **{where: array}).solve()
    assert not np.array_equal(poisoned[0], expected[0])


def test_visible_nan_reaches_only_the_rows_that_see_it() -> None:
    problem = make((1, 1), (5, 5), (4, 3), right=0)
    clean, clean_lse = problem.solve()
    for where in ("k", "v"):
        array = getattr(problem, where).copy()
        array[0, 2, 1] = NAN
        out, lse = replace(problem, **{where: array}).solve()
        assert np.array_equal(out[0, :2], clean[0, :2])
        if where == "k":
            assert np.all(np.isnan(out[0, 2:]))
            assert np.all(np.isnan(lse[0, 2:]))
        else:
            assert np.all(np.isnan(out[0, 2:, 1]))
            assert np.array_equal(out[0, :, [0, 2]], clean[0, :, [0, 2]])
            assert np.array_equal(lse, clean_lse)
    q = problem.q.copy()
    q[0, 3, 0] = NAN
    out, _ = replace(problem, q=q).solve()
    assert np.all(np.isnan(out[0, 3]))
    assert np.array_equal(out[0, [0, 1, 2, 4]], clean[0, [0, 1, 2, 4]])


def test_visible_infinite_values_follow_the_arithmetic() -> None:
    weights = np.array([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
    seen = np.array([[True, True, False], [False, True, False]])
    v = np.array([[INF, INF, 1.0], [2.0, -INF, 3.0], [NAN, NAN, NAN]])
    out = weighted_values(weights, seen, v)
    expected = np.array([[INF, NAN, 2.0], [2.0, -INF, 3.0]])
    assert np.array_equal(out, expected, equal_nan=True)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits_do_not_overflow(size: float) -> None:
    problem = make(sizes=(4, 9), scale=size)
    with np.errstate(all="raise"):
        out, lse = problem.solve()
    assert np.all(np.isfinite(out))
    assert np.all(np.isfinite(lse))
    assert complaints(problem, (out, lse)) == []


# --- what must not change, and what changes in a known way -------------------------------------


@pytest.mark.parametrize("option", OPTIONS)
def test_values_of_one_give_one(option: str) -> None:
    problem = build("gqa wide", option)
    problem = replace(problem, v=np.ones_like(problem.v))
    out, lse = problem.solve()
    share = np.ones_like(lse)
    if problem.sink is not None:  # 1 minus the weight of the sink
        share -= np.exp(problem.sink[:, None] - lse)
    share[np.isneginf(lse)] = 0.0
    # Rounding of the sums (1.2); for a sink, the rounding of lse in the expected value as well.
    bound = gamma(2 * 9 + 12) + (0 if problem.sink is None else 1e-14)
    assert np.all(np.abs(out - share[..., None]) <= bound)


def test_doubled_values_double_the_output_bit_for_bit() -> None:
    problem = build("square", "causal")
    assert np.array_equal(replace(problem, v=2 * problem.v).solve()[0], 2 * problem.solve()[0])


def test_output_lies_in_the_hull_of_the_visible_values() -> None:
    problem = build("square", "causal")
    out, _ = problem.solve()
    slack = gamma(2 * 7 + 12) * np.abs(problem.v).max()
    for i in range(7):
        values = problem.v[:, : i + 1]
        assert np.all(out[:, i] <= values.max(axis=1) + slack)
        assert np.all(out[:, i] >= values.min(axis=1) - slack)


def test_a_shift_of_all_keys_changes_nothing() -> None:
    rng = np.random.default_rng(3)
    problem = make(sizes=(5, 6), widths=(16, 3), scale=0.25)
    # Small integers: shifted keys and all dot products are exact, so only exp and sums round.
    q, k = (rng.integers(-2, 3, size=x.shape).astype(float) for x in (problem.q, problem.k))
    shift = rng.integers(-3, 4, size=16).astype(float)
    plain = replace(problem, q=q, k=k).solve()[0]
    shifted = replace(problem, q=q, k=k + shift).solve()[0]
    assert np.array_equal(shifted, plain)


def test_permuted_keys_permute_nothing_but_the_order_of_sums() -> None:
    problem = make(sizes=(5, 9), mask="additive", keys=True)
    order = np.random.default_rng(1).permutation(9)
    permuted = replace(
        problem,
        k=problem.k[:, order],
        v=problem.v[:, order],
        mask=np.asarray(problem.mask)[:, :, order],
        key_mask=np.asarray(problem.key_mask)[:, order],
    )
    assert complaints(problem, permuted.solve()) == []


@pytest.mark.parametrize("row", range(6))
def test_future_keys_do_not_matter(row: int) -> None:
    problem = make(sizes=(7, 7), right=0)
    k, v = problem.k.copy(), problem.v.copy()
    k[:, row + 1 :] = -3 * k[:, row + 1 :] + 1
    v[:, row + 1 :] = -3 * v[:, row + 1 :] + 1
    out, lse = problem.solve()
    changed, changed_lse = replace(problem, k=k, v=v).solve()
    assert np.array_equal(changed[:, : row + 1], out[:, : row + 1])
    assert np.array_equal(changed_lse[:, : row + 1], lse[:, : row + 1])
    assert not np.array_equal(changed[:, row + 1 :], out[:, row + 1 :])


def test_one_visible_key_gives_its_value() -> None:
    problem = make(sizes=(4, 4), right=0)
    assert np.array_equal(problem.solve()[0][:, 0], problem.v[:, 0])
    single = make(sizes=(4, 1))
    assert np.array_equal(single.solve()[0], np.repeat(single.v, 4, axis=1))


# --- bits, threads, memory ----------------------------------------------------------------------


def small_blocks(monkeypatch: pytest.MonkeyPatch, n_k: int, rows: int, threads: int) -> None:
    monkeypatch.setattr(reference, "_BLOCK_BYTES", 8 * n_k * rows)
    monkeypatch.setattr("sketchattn.kernels._threads.thread_count", lambda: threads)


@pytest.mark.threads
@pytest.mark.parametrize("option", ["plain", "everything"])
def test_bits_do_not_depend_on_threads(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(OPTIONS[option])
    options.pop("offset", None)
    problem = make((6, 2), (23, 17), (4, 3), **options)
    results = []
    for threads in (1, 2, 4, 4):
        small_blocks(monkeypatch, 17, 5, threads)
        results.append(problem.solve())
    assert complaints(problem, results[0]) == []
    for out, lse in results[1:]:
        assert np.array_equal(out, results[0][0])
        assert np.array_equal(lse, results[0][1])


@pytest.mark.threads
def test_blocks_run_at_the_same_time_with_one_blas_thread_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from threadpoolctl import threadpool_info

    problem = make((2, 2), (3, 4), (2, 2))
    small_blocks(monkeypatch, 4, 3, 2)
    together = threading.Barrier(2, timeout=600)
    blas_threads: list[int] = []

    def watched(*arguments: Any, **options: Any) -> Any:
        together.wait()  # passes only if two blocks are in progress
        blas_threads.extend(
            x["num_threads"] for x in threadpool_info() if x["user_api"] == "blas"
        )
        return visible(*arguments, **options)

    monkeypatch.setattr(reference, "visible", watched)
    problem.solve()
    assert set(blas_threads) == {1}


@pytest.mark.threads
def test_calls_from_several_threads_agree() -> None:
    problem = build("gqa wide", "everything")
    out, lse = problem.solve()
    with ThreadPoolExecutor(max_workers=4) as pool:
        for again, again_lse in pool.map(lambda _: problem.solve(), range(40)):
            assert np.array_equal(again, out)
            assert np.array_equal(again_lse, lse)


def test_an_error_in_a_block_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make((2, 2), (8, 4), (2, 2))

    def broken(*arguments: Any, **options: Any) -> Any:
        raise MemoryError("a block")

    monkeypatch.setattr(reference, "softmax_rows", broken)
    for threads in (1, 2):
        small_blocks(monkeypatch, 4, 2, threads)
        with pytest.raises(MemoryError, match="a block"):
            problem.solve()


def test_bits_do_not_depend_on_memory_layout_and_inputs_are_not_written() -> None:
    problem = build("gqa wide", "everything")
    expected = problem.solve()
    layouts: list[Callable[[Array], Array]] = [
        np.asfortranarray,
        lambda x: np.repeat(x, 2, axis=2)[:, :, ::2],
        lambda x: x[::-1, :, ::-1].copy()[::-1, :, ::-1],
    ]
    for layout in layouts:
        names = ("q", "k", "v", "mask")
        arrays: dict[str, Any] = {name: layout(getattr(problem, name)) for name in names}
        before = {name: x.copy() for name, x in arrays.items()}
        for x in arrays.values():
            x.setflags(write=False)
        assert all(map(np.array_equal, replace(problem, **arrays).solve(), expected))
        assert all(np.array_equal(arrays[name], before[name]) for name in arrays)


def peak_bytes(run: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_a_few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    n_q, n_k, threads = 1024, 20_000, 2
    problem = make((1, 1), (n_q, n_k), (2, 2), right=0)
    monkeypatch.setattr("sketchattn.kernels._threads.thread_count", lambda: threads)
    problem.solve()  # imports are not what is measured
    # A block: its logits, the visible set and two temporaries of its kind (1/8 each), and some
    # vectors of n_k.
    limit = threads * 1.5 * reference._BLOCK_BYTES + 4 * 2**20
    assert peak_bytes(problem.solve) <= limit
    monkeypatch.setattr(reference, "_BLOCK_BYTES", 8 * n_q * n_k)
    assert peak_bytes(problem.solve) > limit


@pytest.mark.slow
def test_memory_of_twenty_thousand_tokens() -> None:
    problem = make((1, 1), (20_000, 20_000), (64, 64))
    assert peak_bytes(problem.solve) < 2**30


# --- merging key blocks -------------------------------------------------------------------------


@pytest.mark.parametrize("cut", range(10))
def test_merged_key_blocks_equal_the_whole(cut: int) -> None:
    problem = make(sizes=(5, 9), mask="bool", seed=cut)
    mask = np.asarray(problem.mask)
    left = replace(problem, k=problem.k[:, :cut], v=problem.v[:, :cut], mask=mask[:, :, :cut])
    right = replace(problem, k=problem.k[:, cut:], v=problem.v[:, cut:], mask=mask[:, :, cut:])
    with np.errstate(all="raise"):
        parts = left.solve(), right.solve()
        out, lse = merge(*parts[0], *parts[1])
    whole, whole_lse = problem.solve()
    assert np.array_equal(np.isneginf(lse), np.isneginf(whole_lse))
    for h in range(2):
        weights, _, _ = problem.naive(h)
        out_bound, lse_bound = bounds(problem, h, weights)
        # The parts and the whole round as everywhere; merging subtracts and exponentiates lse.
        ends = np.stack([lse[h], whole_lse[h], *(part[1][h] for part in parts)])
        largest = np.max(np.abs(ends[np.isfinite(ends)]))
        eta = lse_bound + 4 * W * (1 + 2 * largest)
        bound = out_bound + np.expm1(2 * eta)[:, None] * (weights @ np.abs(problem.v[h]))
        assert np.all(np.abs(out[h] - whole[h]) <= bound)
        seen = np.isfinite(whole_lse[h])
        assert np.all(np.abs(lse[h] - whole_lse[h])[seen] <= eta[seen])
        wrong = parts[0][0][h] + parts[1][0][h]  # the weights of the two sides forgotten
        assert cut in (0, 9) or not np.all(np.abs(wrong - whole[h]) <= bound)


def test_merge_drops_a_side_that_saw_no_key() -> None:
    out, lse = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([0.5, -INF])
    nothing, empty = np.full((2, 2), NAN), np.full(2, -INF)
    for merged in (merge(out, lse, nothing, empty), merge(nothing, empty, out, lse)):
        assert np.array_equal(merged[0], [[1.0, 2.0], [0.0, 0.0]])
        assert np.array_equal(merged[1], lse)


def test_merge_of_logits_far_apart_does_not_overflow() -> None:
    with np.errstate(all="raise"):
        out, lse = merge(np.ones((1, 1)), np.array([1e4]), np.zeros((1, 1)), np.array([-1e4]))
    assert np.array_equal(out, [[1.0]])
    assert np.array_equal(lse, [1e4])


# --- rounding -----------------------------------------------------------------------------------

BF16 = np.dtype(ml_dtypes.bfloat16)
# significant bits, smallest and largest exponent of a normal number
FORMATS: dict[np.dtype[Any], tuple[int, int, int]] = {
    np.dtype(np.float16): (11, -14, 15),
    np.dtype(np.float32): (24, -126, 127),
    BF16: (8, -126, 127),
}


def nearest(x: float, bits: int, low: int, high: int) -> float:
    """Round x to nearest, ties to even, in exact rational arithmetic."""
    if not np.isfinite(x) or x == 0.0:
        return x
    exact = abs(Fraction(x))
    exponent = low
    while exact >= Fraction(2) ** (exponent + 1):
        exponent += 1
    spacing = Fraction(2) ** (exponent - bits + 1)
    units = round(exact / spacing)  # Python rounds fractions half to even
    result = units * spacing
    return float(np.copysign(INF if result >= Fraction(2) ** (high + 1) else float(result), x))


def misrounded(x: Array, rounded: Array, dtype: np.dtype[Any]) -> int:
    want = np.array([nearest(float(value), *FORMATS[dtype]) for value in x])
    got = rounded.astype(np.float64)
    same = (got == want) & (np.signbit(got) == np.signbit(want))
    return int(np.count_nonzero(~same))


def hard_numbers(dtype: np.dtype[Any]) -> Array:
    """Return random numbers of every size, ties of ``dtype``, and ties moved by one step."""
    bits, low, high = FORMATS[dtype]
    rng = np.random.default_rng(0)
    exponents = rng.integers(max(low - bits - 3, -1040), high + 3, size=300)
    units = rng.integers(2 ** (bits - 1), 2**bits, size=300) + 0.5  # half way
    ties = np.ldexp(units, exponents - bits + 1)
    small = np.ldexp(rng.integers(0, 2**bits, size=100) + 0.5, low - bits + 1)
    ties = np.concatenate([ties, small])
    random = np.ldexp(rng.random(300) + 1, exponents)
    steps = [np.nextafter(ties, 0.0), np.nextafter(ties, INF)]
    special = [0.0, -0.0, INF, -INF, 5e-324, -5e-324, 1.7e308]
    positive = np.concatenate([ties, *steps, random])
    return np.concatenate([positive, -positive[::7], special])


@pytest.mark.parametrize("dtype", FORMATS, ids=lambda x: x.name)
def test_rounding_is_to_nearest_even_and_happens_once(dtype: np.dtype[Any]) -> None:
    x = hard_numbers(dtype)
    with np.errstate(all="raise"):
        rounded = round_to(x, dtype)
    assert rounded.dtype == dtype
    assert misrounded(x, rounded, dtype) == 0


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BF16], ids=lambda x: x.name)
def test_rounding_twice_is_reported(dtype: np.dtype[Any]) -> None:
    x = hard_numbers(dtype)
    with np.errstate(all="ignore"):
        twice = x.astype(np.float32).astype(dtype)
    assert misrounded(x, twice, dtype) > 100


def test_bfloat16_known_values() -> None:
    x = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, 2.0**-134, 2.0**-133, 3.4e38, INF, -INF, NAN])
    want = np.array([1.0, 1.015625, 0.0, 2.0**-133, INF, INF, -INF, NAN])
    got = round_to(x, ml_dtypes.bfloat16)
    assert got.dtype.name == "bfloat16"
    assert np.array_equal(got.astype(np.float64), want, equal_nan=True)
    once = round_to(np.array([1 + 2.0**-8 + 2.0**-40]), BF16)
    assert float(once[0]) == 1 + 2.0**-7
    assert float(np.float32(1 + 2.0**-8 + 2.0**-40).astype(BF16)) == 1.0


def random_float32() -> Array:
    patterns = np.random.default_rng(0).integers(0, 2**32, size=100_000, dtype=np.uint32)
    return patterns.view(np.float32)


@pytest.mark.parametrize("source", [np.float32, np.float64])
def test_bfloat16_of_random_float32_patterns_equals_ml_dtypes(source: type[Any]) -> None:
    x = random_float32()
    with np.errstate(all="ignore"):
        want = x.astype(BF16)
        got = round_to(x.astype(source), BF16)
    numbers = ~np.isnan(x)
    assert np.array_equal(got.view(np.uint16)[numbers], want.view(np.uint16)[numbers])
    assert np.all(np.isnan(got[~numbers].astype(np.float32)))


def test_bfloat16_of_random_float32_patterns_equals_torch() -> None:
    torch = pytest.importorskip("torch")
    x = random_float32()
    x = x[~np.isnan(x)]
    want = torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy()
    assert np.array_equal(round_to(x.astype(np.float64), BF16).view(np.int16), want)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nothing_happens_where_nothing_is_to_round(dtype: type[Any]) -> None:
    x = np.linspace(-1, 1, 7, dtype=dtype)
    assert round_to(x, dtype) is x


def test_rounding_to_another_type_is_refused() -> None:
    message = (
        r"^dtype must be float64, float32, float16 or bfloat16, got int32; choose one of these\.$"
    )
    with pytest.raises(TypeError, match=message):
        round_to(np.zeros(2), np.int32)
