"""Attention of many heads: against loops, against torch, against algebra, and every refusal."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
import subprocess
import sys
import textwrap
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import naive_attention
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn import AttentionProblem
from sketchattn.operators.factored import FactoredAttention
from sketchattn.operators.reference import merge, round_to
from sketchattn.zoo.base import Method, Traits

Array = NDArray[Any]
Result = tuple[Array, Array]

# Called with whatever a hostile user passes: its signature is for the others.
attention: Callable[..., Any] = sa.attention

ROOT = Path(__file__).parents[1]
BF16 = np.dtype(ml_dtypes.bfloat16)
NAN, INF = float("nan"), float("inf")

KEY_TILE = 512  # keys that the kernel takes at a time
UNIT = {"float32": 2.0**-24, "float64": 2.0**-53}  # unit roundoff
EXP = {"float32": 6e-7, "float64": 1e-15}  # relative error of the kernel's exponential

FAST = None
GRADE = np.float64  # compute_dtype of the reference grade


def exactly(text: str) -> str:
    return f"^{re.escape(text)}$"


# --- a call, its answer by loops, and by how much rounding may change it -------------------------


@dataclass(frozen=True)
class Case:
    """One call: q (B, H, n_q, d), k (B, H_kv, n_k, d), v (B, H_kv, n_k, d_v) and its options."""

    q: Array
    k: Array
    v: Array
    options: dict[str, Any]

    @property
    def group(self) -> int:
        return int(self.q.shape[1]) // int(self.k.shape[1])

    @property
    def full(self) -> tuple[int, ...]:
        return (*self.q.shape[:3], self.k.shape[2])

    @property
    def scale(self) -> float:
        given = self.options.get("scale")
        return self.q.shape[3] ** -0.5 if given is None else float(given)

    def change(self, **changes: Any) -> Case:
        return replace(self, options={**self.options, **changes})

    def solve(self) -> Result:
        options = {"enable_gqa": True, **self.options}
        out, lse = attention(self.q, self.k, self.v, return_lse=True, **options)
        return out, lse

    def loops(self) -> tuple[Array, Array, Array]:
        """Return (A, out, lse) of every head by explicit loops, in float64."""
        options, (batch, heads, n_q, n_k) = self.options, self.full
        causal = options.get("causal", False)
        start = n_k - n_q if causal == "bottom-right" else 0
        given = options.get("offset")
        first = np.broadcast_to(start if given is None else given, (batch,))
        left, right = (None if side == -1 else side for side in options.get("window", (-1, -1)))
        if causal:
            right = 0 if right is None else min(right, 0)
        keys, mask, sink = (options.get(name) for name in ("key_mask", "attn_mask", "sink"))
        parts = [
            naive_attention(
                self.q[b, h].astype(np.float64),
                self.k[b, h // self.group].astype(np.float64),
                self.v[b, h // self.group].astype(np.float64),
                scale=self.scale,
                first=int(first[b]),
                left=left,
                right=right,
                softcap=options.get("softcap", 0.0),
                key_mask=None if keys is None else np.broadcast_to(keys, (batch, n_k))[b],
                mask=None if mask is None else np.broadcast_to(mask, self.full)[b, h],
                sink=None if sink is None else float(sink[h]),
            )
            for b, h in itertools.product(range(batch), range(heads))
        ]
        weights, out, lse = (np.array([part[i] for part in parts]) for i in range(3))
        return (
            weights.reshape(self.full),
            out.reshape((batch, heads, n_q, self.v.shape[3])),
            lse.reshape((batch, heads, n_q)),
        )

    def bounds(self, seen: Array, mass: Array, lse: Array) -> Result:
        """Bound what rounding may change in the output and in the lse.

        ``seen`` (B, H, n_q, n_k) are the visible entries, or more, ``mass`` is A |V|.

        A logit is off by at most
            delta_i = max_j [gamma_(d+4) s_ij + 2u (s_ij + |b_ij|) + 4u |b_ij|],
        ``s = |scale| |Q| |K|^T``: the products and sums of d terms, the scale and log2(e) folded
        into q, the rounding of L - m, and log2(e) b.  A softcap adds its tanh, which is off by
        rho + 10u of the capped logit.  Each weight then moves by a factor within exp(+-2 delta),
        the exponential by 1 +- rho in numerator and denominator, two sums of n_k terms by gamma,
        and each of T tiles of keys rescales by another rho + u:
            |O - O*| <= [exp(2 delta) (1 + 2 rho + 2 gamma_(n_k+4) + 2T(rho + u)) - 1] A|V|,
            |lse - lse*| <= delta + (1 + T)(rho + u) + gamma_(n_k+10) + 4u |lse|.
        Weights below the normal numbers count as zero: n_k tiny max|V| more.  The reference grade
        computes in float64 and rounds the output once.
        """
        narrow = self.q.dtype == np.float32 and self.options.get("compute_dtype") is None
        name = "float32" if narrow else "float64"
        u, rho = UNIT[name], EXP[name]
        q, k, v = (np.abs(x.astype(np.float64)) for x in (self.q, self.k, self.v))
        k = np.repeat(k, self.group, axis=1)
        n_k, d = k.shape[2:]
        size = abs(self.scale) * (q @ k.swapaxes(2, 3))
        error = size * gamma(d + 4, u)
        cap = self.options.get("softcap", 0.0)
        if cap:
            size = np.minimum(size, cap)
            error += (rho + 10 * u) * size
        mask = self.options.get("attn_mask")
        if mask is not None and mask.dtype != np.bool_:
            bias = np.broadcast_to(np.abs(np.where(mask == -INF, 0, mask)), self.full)
            error += 4 * u * bias
            size = size + bias
        error += 2 * u * size
        delta = np.max(np.where(seen, error, 0), axis=3, initial=0)
        if self.options.get("sink") is not None:
            delta += 4 * u * np.abs(self.options["sink"])[:, None]
        tiles = 1 + n_k // KEY_TILE
        growth = 1 + 2 * rho + 2 * gamma(n_k + 4, u) + 2 * tiles * (rho + u)
        out = (np.exp(2 * delta) * growth - 1)[..., None] * mass
        out += n_k * float(np.finfo(name).tiny) * np.max(v, initial=0)
        if self.q.dtype == np.float32 and not narrow:
            out += UNIT["float32"] * mass
        tail = np.where(np.isneginf(lse), 0, 4 * u * np.abs(lse))
        return out, delta + (1 + tiles) * (rho + u) + gamma(n_k + 10, u) + tail

    def bounds_of(self, weights: Array, lse: Array) -> Result:
        """Return the bounds from the weights themselves."""
        v = np.repeat(np.abs(self.v.astype(np.float64)), self.group, axis=1)
        return self.bounds(weights > 0, weights @ v, lse)

    def complaints(self, result: Result) -> list[str]:
        """Say where a result differs from the loops by more than rounding; NaN always does."""
        weights, out, lse = self.loops()
        out_bound, lse_bound = self.bounds_of(weights, lse)
        empty = np.isneginf(lse)
        with np.errstate(invalid="ignore"):
            fine = np.abs(result[0] - out) <= out_bound
            fine &= ~empty[..., None] | (result[0] == 0)
            fine_lse = np.where(empty, np.isneginf(result[1]), np.abs(result[1] - lse) <= lse_bound)
        found = [] if fine.all() else [f"output at {np.argwhere(~fine)[0]}"]
        return found if fine_lse.all() else [*found, f"lse at {np.argwhere(~fine_lse)[0]}"]


def normal(*shapes: tuple[int, ...], dtype: Any = np.float64, seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def gamma(count: int, u: float) -> float:
    return count * u / (1 - count * u)


# (B, H, H_kv, n_q, n_k, d, d_v); row tiles are 32 or more queries, key tiles 512 keys
SHAPES: dict[str, tuple[int, int, int, int, int, int, int]] = {
    "one": (1, 1, 1, 1, 1, 1, 1),
    "square": (2, 2, 2, 7, 7, 5, 5),
    "gqa wide": (2, 6, 2, 4, 9, 8, 2),
    "mqa tall": (1, 3, 1, 9, 4, 3, 6),
    "one key": (1, 2, 2, 5, 1, 4, 4),
    "decode": (2, 2, 1, 1, 61, 16, 3),
    "row tiles": (1, 1, 1, 70, 33, 4, 3),
    "a full tile": (1, 1, 1, 3, 512, 3, 2),
    "a key more": (1, 1, 1, 3, 513, 3, 2),
    "key tiles": (1, 2, 1, 5, 1100, 3, 2),
    "wide values": (1, 1, 1, 3, 5, 2, 300),  # values are multiplied 256 columns at a time
}
SMALL = ("one", "square", "gqa wide", "mqa tall", "one key")

# What follows an @ is made by build: masks need the sizes.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale zero": {"scale": 0},
    "scale negative": {"scale": -0.7},
    "top-left": {"causal": "top-left"},
    "bottom-right": {"causal": "bottom-right"},
    "causal from 3": {"causal": True, "offset": 3},
    "causal from -2": {"causal": True, "offset": -2},
    "causal from the middle": {"causal": True, "@offset": "middle"},
    "a start for each batch": {"causal": True, "@offset": "batch"},
    "window": {"window": (2, 1)},
    "left window": {"window": (3, -1)},
    "right window": {"window": (-1, 0)},
    "window from the end": {"causal": "bottom-right", "window": (530, 4)},
    "softcap": {"softcap": 1.5},
    "key mask": {"@keys": "one"},
    "a key mask for each batch": {"@keys": "batch"},
    "keys of whole tiles": {"@keys": "tiles"},
    "bool mask": {"@mask": (bool, "full")},
    "bool mask of queries and keys": {"@mask": (bool, "matrix")},
    "bool mask of keys": {"@mask": (bool, "keys")},
    "bool mask of queries": {"@mask": (bool, "queries")},
    "bool mask of heads": {"@mask": (bool, "heads")},
    "bias": {"@mask": (float, "full")},
    "bias of queries and keys": {"@mask": (float, "matrix")},
    "bias of queries": {"@mask": (float, "queries")},
    "bias of keys": {"@mask": (float, "keys")},
    "sink": {"@sink": True},
    "sink of rows without keys": {"@sink": True, "causal": True, "offset": -3},
    "masks of every kind": {
        "causal": "bottom-right", "window": (6, -1), "@keys": "batch", "@mask": (bool, "matrix"),
    },
    "everything": {
        "window": (40, 2), "offset": 1, "softcap": 2.0, "@keys": "batch",
        "@mask": (float, "full"), "@sink": True, "scale": 0.9,
    },
}  # fmt: skip


def build(shape: str, option: str, dtype: Any = np.float64, seed: int = 0, **more: Any) -> Case:
    """Return a random call; logits have a standard deviation of about 2."""
    rng = np.random.default_rng([seed, *map(ord, shape + option)])
    b, h, h_kv, n_q, n_k, d, d_v = SHAPES[shape]
    q = math.sqrt(2) * rng.standard_normal((b, h, n_q, d))
    k = math.sqrt(2) * rng.standard_normal((b, h_kv, n_k, d))
    v = rng.standard_normal((b, h_kv, n_k, d_v))
    options = dict(OPTIONS[option])
    offset = options.pop("@offset", None)
    if offset is not None:
        options["offset"] = n_k // 2 if offset == "middle" else rng.integers(-2, n_k, size=b)
    keys = options.pop("@keys", None)
    if keys == "tiles":
        options["key_mask"] = np.arange(n_k) >= min(KEY_TILE, n_k - 1)
    elif keys is not None:
        options["key_mask"] = rng.random((b, n_k) if keys == "batch" else n_k) < 0.7
    kind, axes = options.pop("@mask", (None, None))
    if kind is not None:
        size = {
            "full": (b, h, n_q, n_k),
            "matrix": (n_q, n_k),
            "keys": (n_k,),
            "queries": (n_q, 1),
            "heads": (h, 1, n_k),
        }[axes]
        seen = rng.random(size) < 0.6
        options["attn_mask"] = seen if kind is bool else np.where(seen, rng.normal(size=size), -INF)
    if options.pop("@sink", False):
        options["sink"] = rng.standard_normal(h)
    for name in ("attn_mask", "sink"):  # the numbers that are computed with, not others
        if name in options and options[name].dtype == np.float64:
            options[name] = options[name].astype(dtype)
    return Case(q.astype(dtype), k.astype(dtype), v.astype(dtype), {**options, **more})


def compiled(case: str) -> Any:
    """Run small cases once more without compilation."""
    return pytest.param(case, marks=[pytest.mark.interpreted] if case in SMALL else [])


# --- the answer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", [compiled(shape) for shape in SHAPES])
def test_equals_the_loops(shape: str, option: str, dtype: type) -> None:
    case = build(shape, option, dtype)
    out, lse = case.solve()
    assert out.dtype == lse.dtype == dtype
    assert out.shape == (*case.full[:3], case.v.shape[3])
    assert lse.shape == case.full[:3]
    assert case.complaints((out, lse)) == []
    without = attention(case.q, case.k, case.v, **{"enable_gqa": True, **case.options})
    assert np.array_equal(without, out)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("option", OPTIONS)
def test_reference_grade_equals_the_loops(option: str, dtype: type) -> None:
    case = build("gqa wide", option, dtype, compute_dtype=GRADE)
    out, lse = case.solve()
    assert out.dtype == dtype
    assert lse.dtype == np.float64
    assert case.complaints((out, lse)) == []


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("option", "heads"),
    [
        ("plain", 8),
        ("top-left", 8),
        ("window", 2),
        ("key mask", 2),
        ("bias of keys", 2),
        ("softcap", 2),
        ("sink", 2),
    ],
)
def test_many_tiles_equal_the_reference_grade(option: str, heads: int, dtype: type) -> None:
    # 8 x 1100 and 2 x 1100 queries: row tiles of 512 and 256, which smaller cases do not reach.
    n_q, n_k = 1100, 600
    q, k, v = normal((1, heads, n_q, 8), (1, heads, n_k, 8), (1, heads, n_k, 3), dtype=dtype)
    options = dict(OPTIONS[option])
    if options.pop("@sink", False):
        options["sink"] = np.linspace(-2, 2, heads)
    if options.pop("@keys", False):
        options["key_mask"] = np.arange(n_k) % 3 > 0
    if options.pop("@mask", False):
        options["attn_mask"] = normal((n_k,), dtype=dtype)[0]
    case = Case(q, k, v, options)
    out, lse = case.solve()
    exact, exact_lse = case.change(compute_dtype=GRADE).solve()
    mass = attention(q, k, np.abs(v), **options, compute_dtype=GRADE).astype(np.float64)
    out_bound, lse_bound = case.bounds(np.array(True), mass, exact_lse)
    # Twice: the reference rounds too.
    assert np.all(np.abs(out - exact) <= 2 * out_bound)
    empty = np.isneginf(exact_lse)
    assert np.array_equal(np.isneginf(lse), empty)
    assert np.all(np.abs(lse[~empty] - exact_lse[~empty]) <= 2 * lse_bound[~empty])


@settings(max_examples=50, deadline=None, database=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([np.float32, np.float64]),
    grade=st.sampled_from([FAST, GRADE]),
    batch=st.integers(0, 2),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    sizes=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    widths=st.tuples(st.integers(1, 5), st.integers(0, 4)),
    causal=st.sampled_from([False, "top-left", "bottom-right"]),
    offset=st.none() | st.integers(-10, 10),
    window=st.tuples(st.integers(-1, 6), st.integers(-1, 6)),
    softcap=st.sampled_from([0, 0.5, 3]),
    keys=st.sampled_from([None, "one", "batch"]),
    mask=st.sampled_from([None, bool, float]),
    broadcast=st.tuples(*[st.booleans()] * 4),
    sink=st.booleans(),
)
def test_equals_the_loops_for_any_combination(
    seed: int,
    dtype: Any,
    grade: Any,
    batch: int,
    heads: tuple[int, int],
    sizes: tuple[int, int],
    widths: tuple[int, int],
    keys: str | None,
    mask: Any,
    broadcast: tuple[bool, ...],
    sink: bool,
    **options: Any,
) -> None:
    rng = np.random.default_rng(seed)
    (group, h_kv), (n_q, n_k), (d, d_v) = heads, sizes, widths
    full = (batch, group * h_kv, n_q, n_k)
    q = rng.standard_normal((*full[:3], d)).astype(dtype)
    k = rng.standard_normal((batch, h_kv, n_k, d)).astype(dtype)
    v = rng.standard_normal((batch, h_kv, n_k, d_v)).astype(dtype)
    if keys is not None:
        options["key_mask"] = rng.random((batch, n_k) if keys == "batch" else n_k) < 0.7
    if mask is not None:
        size = [1 if one else n for one, n in zip(broadcast, full, strict=True)]
        seen = rng.random(size) < 0.7
        bias = np.where(seen, rng.normal(size=size), -INF).astype(dtype)
        options["attn_mask"] = seen if mask is bool else bias
    if sink:
        options["sink"] = rng.standard_normal(group * h_kv).astype(dtype)
    case = Case(q, k, v, {**options, "compute_dtype": grade})
    assert case.complaints(case.solve()) == []


# --- the same comparison reports wrong programs -------------------------------------------------


def change(**changes: Any) -> Callable[[Case], Result]:
    return lambda case: case.change(**changes).solve()


def other_values(make: Callable[[Array], Array]) -> Callable[[Case], Result]:
    return lambda case: replace(case, v=make(case.v)).solve()


def tiled_heads(case: Case) -> Result:
    k, v = (np.tile(x, (1, case.group, 1, 1)) for x in (case.k, case.v))
    return replace(case, k=k, v=v).solve()


def last_key_dropped(case: Case) -> Result:
    return replace(case, k=case.k[:, :, :-1], v=case.v[:, :, :-1]).solve()


def scaled_bias(case: Case) -> Result:
    return case.change(attn_mask=(case.scale * case.options["attn_mask"])).solve()


def times(factor: float) -> Callable[[Case], Result]:
    def program(case: Case) -> Result:
        out, lse = case.solve()
        return out * np.asarray(factor, out.dtype), lse * np.asarray(factor, lse.dtype)

    return program


MUTANTS: dict[str, tuple[str, str, Callable[[Case], Result]]] = {
    "scale x 1.1": ("gqa wide", "plain", lambda c: c.change(scale=1.1 * c.scale).solve()),
    "scale 1/d": ("gqa wide", "plain", lambda c: c.change(scale=c.scale**2).solve()),
    "scale of zero replaced": ("gqa wide", "scale zero", change(scale=None)),
    "causal off by one": ("square", "top-left", change(offset=1)),
    "causal off by one, many keys": ("key tiles", "bottom-right", change(offset=1096)),
    "causal ignored": ("square", "top-left", change(causal=False)),
    "the other alignment": ("gqa wide", "bottom-right", change(causal="top-left")),
    "position ignored": ("gqa wide", "causal from the middle", change(offset=0)),
    "window off by one": ("gqa wide", "window", change(window=(3, 1))),
    "window ignored": ("gqa wide", "window", change(window=(-1, -1))),
    "softcap ignored": ("gqa wide", "softcap", change(softcap=0.0)),
    "key mask ignored": ("gqa wide", "key mask", change(key_mask=None)),
    "mask ignored": ("gqa wide", "bool mask", change(attn_mask=None)),
    "mask inverted": (
        "gqa wide", "bool mask", lambda c: c.change(attn_mask=~c.options["attn_mask"]).solve(),
    ),
    "bias times scale": ("gqa wide", "bias", scaled_bias),
    "sink ignored": ("gqa wide", "sink", change(sink=None)),
    "heads tiled": ("gqa wide", "plain", tiled_heads),
    "V rolled": ("gqa wide", "plain", other_values(lambda v: np.roll(v, 1, axis=2))),
    "V rolled, many keys": ("key tiles", "plain", other_values(lambda v: np.roll(v, 1, axis=2))),
    "mean of V": (
        "gqa wide", "plain",
        other_values(lambda v: np.broadcast_to(v.mean(axis=2, keepdims=True), v.shape)),
    ),
    "last key dropped": ("gqa wide", "plain", last_key_dropped),
    "last key of a new tile dropped": ("a key more", "plain", last_key_dropped),
    "last key of many dropped": ("key tiles", "plain", last_key_dropped),
    "zeros": ("gqa wide", "plain", times(0.0)),
    "NaN": ("gqa wide", "plain", times(NAN)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_comparison_reports_wrong_programs(mutant: str, dtype: type) -> None:
    shape, option, program = MUTANTS[mutant]
    case = build(shape, option, dtype)
    assert case.complaints(case.solve()) == []
    assert case.complaints(program(case)) != []


# --- torch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("grade", [FAST, GRADE])
@pytest.mark.parametrize("seed", range(20))
def test_float64_equals_torch(seed: int, grade: Any) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    n_q, n_k = (int(n) for n in rng.integers(1, 40, size=2))
    q = rng.standard_normal((2, 6, n_q, 8))
    k, v = (rng.standard_normal((2, 2, n_k, width)) for width in (8, 5))
    mask = rng.random((2, 6, n_q, n_k)) < 0.5
    mask[0, 1, n_q // 2] = False
    options: dict[str, Any]
    for options, theirs in (
        ({}, {}),
        ({"attn_mask": mask}, {"attn_mask": torch.from_numpy(mask)}),
        ({"causal": "top-left"}, {"is_causal": True}),
        ({"scale": 0.3}, {"scale": 0.3}),
    ):
        want = torch.nn.functional.scaled_dot_product_attention(
            *map(torch.from_numpy, (q, k, v)), enable_gqa=True, **theirs
        ).numpy()
        got = attention(q, k, v, enable_gqa=True, compute_dtype=grade, **options)
        assert np.max(np.abs(got - want)) <= 1e-13


def test_conventions_of_torch() -> None:
    torch = pytest.importorskip("torch")
    sdpa = torch.nn.functional.scaled_dot_product_attention
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((1, 2, n, 8)).astype(np.float32) for n in (4, 6))
    v = rng.standard_normal((1, 2, 6, 3)).astype(np.float32)
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    seen = np.ones((4, 6), bool)
    seen[1] = False
    removed = np.where(seen, 0, -INF).astype(np.float32)
    lowest = np.where(seen, 0, np.finfo(np.float32).min).astype(np.float32)
    mean = v.mean(axis=2)
    for mask, row in ((seen, np.zeros_like(mean)), (removed, np.zeros_like(mean)), (lowest, mean)):
        theirs = sdpa(*tensors, attn_mask=torch.from_numpy(mask)).numpy()
        ours, lse = attention(q, k, v, attn_mask=mask, return_lse=True)
        for out in (theirs, ours):
            assert np.allclose(out[:, :, 1], row, rtol=0, atol=1e-6)
        assert np.allclose(ours, theirs, rtol=0, atol=1e-6)
        assert np.isneginf(lse[:, :, 1]).all() == (mask is not lowest)
    assert np.allclose(
        attention(q, k, v, causal="top-left"),
        sdpa(*tensors, is_causal=True).numpy(),
        rtol=0,
        atol=1e-6,
    )
    nothing = sdpa(tensors[0], tensors[1][:, :, :0], tensors[2][:, :, :0]).numpy()
    assert np.array_equal(attention(q, k[:, :, :0], v[:, :, :0]), nothing)
    assert not nothing.any()
    wide = torch.from_numpy(np.repeat(q, 2, axis=1))
    with pytest.raises(RuntimeError):
        sdpa(wide, *tensors[1:])
    with pytest.raises(ValueError, match="enable_gqa=True"):
        attention(wide, k, v)


def test_tensors_of_torch_are_accepted() -> None:
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((2, 3, 5, 4), generator=generator) for _ in range(3))
    mask = torch.rand((5, 5), generator=generator) < 0.5
    got = attention(q, k, v, attn_mask=mask, key_mask=torch.tensor([True] * 4 + [False]))
    want = attention(
        *(x.numpy() for x in (q, k, v)), attn_mask=mask.numpy(), key_mask=[True] * 4 + [False]
    )
    assert type(got) is np.ndarray
    assert np.array_equal(got, want)
    half = [x.to(torch.bfloat16) for x in (q, k, v)]
    got = attention(*half)
    assert got.dtype == np.float32  # NumPy has no bfloat16 of its own
    assert np.array_equal(got, attention(*(x.float().numpy() for x in half)))
    assert attention(*(x.half() for x in (q, k, v))).dtype == np.float16
    with pytest.raises(
        TypeError,
        match=exactly("v must not require a gradient, since none is computed; pass v.detach()"),
    ):
        attention(q, k, v.requires_grad_())


@pytest.mark.parametrize("label", ["q", "k", "v"])
@pytest.mark.parametrize("other", ["float64", "float16", "bfloat16"])
def test_tensors_of_mixed_precision_are_refused(label: str, other: str) -> None:
    torch = pytest.importorskip("torch")
    given = {name: torch.ones((1, 4, 3)) for name in "qkv"}
    given[label] = given[label].to(getattr(torch, other))
    q = other if label == "q" else "float32"
    refused, got = ("k", "float32") if label == "q" else (label, other)
    message = f"{refused} must have the dtype {q} of q, got {got}; convert q, k and v to one dtype"
    with pytest.raises(TypeError, match=exactly(message)):
        attention(**given)
    with pytest.raises(TypeError, match=exactly(message)):
        attention(**given, method="uniform", rank=2, rng=0)
    with pytest.raises(TypeError, match=exactly(message)):
        sa.AttentionProblem(**{name: x[0] for name, x in given.items()})
    with pytest.raises(TypeError, match=exactly(message)):
        sa.Heads(**given)
    alike = {name: x.to(getattr(torch, other)) for name, x in given.items()}
    assert attention(**alike).dtype == ("float32" if other == "bfloat16" else other)


# --- empty rows, hidden keys, visible NaN, large logits ------------------------------------------


EMPTY: dict[str, tuple[dict[str, Any], list[int]]] = {
    "bool": ({"attn_mask": np.arange(6)[:, None] != 2}, [2]),
    "bool, full": ({"attn_mask": np.broadcast_to(np.arange(6)[:, None] != 2, (6, 8))}, [2]),
    "-inf": ({"attn_mask": np.where(np.arange(6)[:, None] == 2, -INF, 0)}, [2]),
    "-inf, full": ({"attn_mask": np.where(np.outer(np.arange(6) == 2, np.ones(8)), -INF, 0)}, [2]),
    "key mask": ({"key_mask": np.zeros(8, bool)}, [0, 1, 2, 3, 4, 5]),
    "negative offset": ({"causal": True, "offset": -2}, [0, 1]),
    "far offset": ({"causal": True, "offset": -100}, [0, 1, 2, 3, 4, 5]),
    "window": ({"window": (1, 1), "offset": 5}, [4, 5]),
    "key mask and window": ({"window": (0, 0), "key_mask": np.arange(8) != 3}, [3]),
    "bottom-right": ({"causal": "bottom-right", "key_mask": np.arange(8) > 3}, [0, 1]),
}


@pytest.mark.parametrize("grade", [FAST, GRADE])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("which", EMPTY)
def test_empty_rows(which: str, dtype: type, grade: Any) -> None:
    q, k, v = normal((2, 6, 4), (2, 8, 4), (2, 8, 4), dtype=dtype)
    options, rows = EMPTY[which]
    with np.errstate(all="raise"):
        out, lse = attention(q, k, v, compute_dtype=grade, return_lse=True, **options)
    empty = np.isin(np.arange(6), rows)
    assert np.array_equal(np.isneginf(lse), np.broadcast_to(empty, (2, 6)))
    assert np.array_equal(np.any(out, axis=2), np.broadcast_to(~empty, (2, 6)))
    assert np.isfinite(out).all()
    assert not np.signbit(out[:, rows]).any()


def test_a_sink_gives_empty_rows_its_own_logit() -> None:
    x = np.random.default_rng(0).standard_normal((2, 4, 3))
    sink = np.array([0.5, -3.0])
    for grade in (FAST, GRADE):
        out, lse = attention(
            x, x, x, key_mask=[False] * 4, sink=sink, return_lse=True, compute_dtype=grade
        )
        assert not out.any()
        # Through base 2 and back: two roundings of a number below 4.
        assert np.allclose(lse, sink[:, None], rtol=0, atol=16 * UNIT["float64"])
        out, _ = attention(x, x, x, sink=np.array([1e30, 1e300]), return_lse=True)
        assert not out.any()
    narrow = attention(*[x.astype(np.float32)] * 3, sink=np.array([1e300, 1e300]))
    assert not narrow.any()


# name: options, keys that no query may see, and the rows that are compared
HIDING: dict[str, tuple[dict[str, Any], list[int]]] = {
    "bool": ({"attn_mask": ~np.isin(np.arange(8), [2, 7])}, [2, 7]),
    "bool, full": ({"attn_mask": np.outer(np.ones(8), ~np.isin(np.arange(8), [2, 7])) > 0}, [2, 7]),
    "-inf": ({"attn_mask": np.where(np.isin(np.arange(8), [0, 5]), -INF, 0.25)}, [0, 5]),
    "-inf, full": ({"attn_mask": np.where(np.arange(8) == 5, -INF, np.ones((8, 1)))}, [5]),
    "causal": ({"causal": True, "offset": -3}, [5, 6, 7]),
    "key mask": ({"key_mask": ~np.isin(np.arange(8), [0, 3, 7])}, [0, 3, 7]),
    "window": ({"window": (0, 1), "offset": 1}, [0]),
    "all": ({"key_mask": np.zeros(8, bool)}, list(range(8))),
}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("poison", [NAN, -NAN, INF, -INF])
@pytest.mark.parametrize("which", HIDING)
def test_hidden_keys_never_leak(which: str, poison: float, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 8, 4)).astype(dtype) for _ in range(3))
    options, keys = HIDING[which]
    for grade, cap, names in itertools.product((FAST, GRADE), (0.0, 2.0), ("k", "v", "kv")):
        more: dict[str, Any] = {"compute_dtype": grade, "softcap": cap, "return_lse": True}
        want = attention(q, k, v, **more, **options)
        bad_k, bad_v = k.copy(), v.copy()
        for name, x in (("k", bad_k), ("v", bad_v)):
            if name in names:
                x[:, keys] = poison
        with np.errstate(all="raise"):
            got = attention(q, bad_k, bad_v, **more, **options)
        assert np.isfinite(got[0]).all()
        assert np.array_equal(got[0], want[0])
        assert np.array_equal(got[1], want[1])


@pytest.mark.parametrize("option", ["causal", "bool", "-inf", "window"])
@pytest.mark.parametrize("grade", [FAST, GRADE])
def test_visible_nan_reaches_exactly_the_rows_that_see_it(option: str, grade: Any) -> None:
    rng = np.random.default_rng(0)
    n, key = 40, 21
    q, k, v = (rng.standard_normal((2, n, 4)).astype(np.float32) for _ in range(3))
    seen = rng.random((n, n)) < 0.5
    row = np.arange(n)
    hiding: dict[str, tuple[dict[str, Any], Array]] = {
        "causal": ({"causal": True}, row >= key),
        "bool": ({"attn_mask": seen}, seen[:, key]),
        "-inf": ({"attn_mask": np.where(seen, 0.5, -INF)}, seen[:, key]),
        "window": ({"window": (3, 2)}, (row - 3 <= key) & (key <= row + 2)),
    }
    options, sees = hiding[option]
    options |= {"compute_dtype": grade, "return_lse": True}
    want, want_lse = attention(q, k, v, **options)
    for name, poison in itertools.product("kv", (NAN, -NAN, INF, -INF)):
        bad_k, bad_v = k.copy(), v.copy()
        (bad_k if name == "k" else bad_v)[1, key, 2] = poison
        with np.errstate(all="raise"):
            out, lse = attention(q, bad_k, bad_v, **options)
        assert np.array_equal(out[0], want[0])
        assert np.array_equal(out[1, ~sees], want[1, ~sees])
        assert np.array_equal(lse[1, ~sees], want_lse[1, ~sees])
        if name == "v":
            assert np.array_equal(
                np.isfinite(out[1, sees]), np.tile(np.arange(4) != 2, (sees.sum(), 1))
            )
            assert np.array_equal(out[1][:, [0, 1, 3]], want[1][:, [0, 1, 3]])
            assert np.array_equal(lse, want_lse)
            column = out[1, sees, 2]
            assert np.all(np.isnan(column) if math.isnan(poison) else column == poison)
        elif math.isnan(poison):
            assert np.isnan(out[1, sees]).all()
            assert np.isnan(lse[1, sees]).all()
        else:
            # A logit of +inf takes all the weight and is NaN after the shift; -inf hides the key.
            with np.errstate(invalid="ignore"):
                sign = np.sign(q[1, :, 2]) * np.sign(poison)
            assert np.array_equal(np.isnan(out[1]).all(axis=1), sees & (sign > 0))
            assert np.array_equal(np.isnan(out[1]).any(axis=1), sees & (sign > 0))


@pytest.mark.parametrize("grade", [FAST, GRADE])
def test_visible_infinities_follow_the_arithmetic(grade: Any) -> None:
    zero = np.zeros((1, 4, 1))
    v = np.array([[[1.0], [INF], [2.0], [-INF]]])
    out = attention(zero, zero, v, causal=True, compute_dtype=grade)
    assert out[0, 0, 0] == 1
    assert np.all(out[0, 1:3, 0] == INF)
    assert np.isnan(out[0, 3, 0])  # inf - inf
    q = np.full((1, 4, 1), 1e4)
    k = np.array([[[0.0], [-1.0], [0.0], [0.0]]])
    out = attention(q, k, v, causal=True, window=(1, 0), compute_dtype=grade)
    assert np.isnan(out[0, 1, 0])  # the weight of the infinity is 0
    assert np.isnan(out[0, 2, 0])
    assert out[0, 3, 0] == -INF


@pytest.mark.parametrize("grade", [FAST, GRADE])
def test_rows_whose_logits_are_all_minus_infinity_are_not_empty(grade: Any) -> None:
    x = np.ones((1, 4, 2))
    k = x.copy()
    k[0, 2] = -INF
    out, lse = attention(x, k, x, window=(0, 0), return_lse=True, compute_dtype=grade)
    assert np.isnan(out[0, 2]).all()
    assert np.isnan(lse[0, 2])
    assert np.isfinite(np.delete(out, 2, axis=1)).all()


@pytest.mark.parametrize("grade", [FAST, GRADE])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"attn_mask": np.ones((6, 6), bool)}])
@pytest.mark.parametrize(("name", "where"), [("k", (1, 4, 0)), ("v", (0, 3, 2))])
def test_values_that_all_see_must_be_finite(
    name: str, where: tuple[int, int, int], options: dict[str, Any], grade: Any
) -> None:
    arrays = {label: np.ones((2, 6, 4)) for label in "kv"}
    arrays[name][where] = INF
    text = (
        f"{name} must be finite where every query sees it, got a non-finite entry at key "
        f"{where[1]} of key head {where[0]}; replace it, or hide the key with a mask"
    )
    with pytest.raises(ValueError, match=exactly(text)):
        attention(np.ones((4, 6, 4)), **arrays, enable_gqa=True, compute_dtype=grade, **options)


@pytest.mark.parametrize(
    ("window", "everyone"),
    [((1, -1), [1, 2, 3, 4, 5]), ((-1, 2), [0, 1, 2]), ((1, 3), [1, 2, 3]), ((0, 0), [])],
)
def test_keys_that_every_row_of_a_window_sees(window: tuple[int, int], everyone: list[int]) -> None:
    q, k = np.ones((1, 3, 2)), np.ones((1, 6, 2))
    refused = []
    for key in range(6):
        v = k.copy()
        v[0, key] = NAN
        try:
            attention(q, k, v, window=window)
        except ValueError:
            refused.append(key)
    assert refused == everyone


def test_a_key_that_one_of_the_grouped_heads_does_not_see_is_computed_with() -> None:
    q, k = np.ones((4, 3, 2)), np.ones((2, 3, 2))
    v = k.copy()
    v[1, 2] = NAN
    mask = np.ones((4, 3, 3), bool)
    mask[3, 1, 2] = False
    out = attention(q, k, v, attn_mask=mask, enable_gqa=True)
    want = np.zeros((4, 3), bool)
    want[2:] = True
    want[3, 1] = False
    assert np.array_equal(np.isnan(out).all(axis=2), want)
    assert np.array_equal(np.isnan(out).any(axis=2), want)


def test_padding_of_nan_costs_little_more_than_padding() -> None:
    # Work per hidden key in Python took minutes here; blocks of work take none.
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((64, 6, 128, 8)).astype(np.float32) for _ in range(3))
    keep = np.arange(128) < 64
    want = attention(q, k, v, key_mask=keep)
    k[:, :, 64:], v[:, :, 64:] = NAN, NAN
    assert np.array_equal(attention(q, k, v, key_mask=keep), want)
    half = attention(q, k, v, causal=True)
    assert np.array_equal(np.isnan(half).any(axis=3), np.broadcast_to(~keep, (64, 6, 128)))


@pytest.mark.parametrize("grade", [FAST, GRADE])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits_do_not_overflow(size: float, dtype: type, grade: Any) -> None:
    eye: Array = np.eye(6, 8, dtype=dtype)[None]
    (v,) = normal((1, 6, 3), dtype=dtype)
    with np.errstate(all="raise", under="ignore"):
        out, lse = attention(eye, eye, v, scale=size, compute_dtype=grade, return_lse=True)
    assert np.isfinite(lse).all()
    want = v if size > 0 else (v.sum(axis=1, keepdims=True) - v) / dtype(5)
    # One-hot rows, or the mean of the five others.
    assert np.allclose(out, want, rtol=0, atol=20 * np.finfo(dtype).eps)
    q, k = normal(*[(2, 20, 16)] * 2, dtype=dtype)
    case = Case(dtype(size) * q[None], k[None], k[None], {"compute_dtype": grade})
    assert np.isfinite(case.solve()[0]).all()
    assert case.complaints(case.solve()) == []


@pytest.mark.parametrize(
    ("change", "row"),
    [
        ({"scale": 1e39}, "(0, 0)"),
        ({"attn_mask": np.eye(5) > 0}, None),
        ({}, "(0, 0)"),
        ({"window": (-1, 0), "offset": -2}, "(0, 2)"),
    ],
)
def test_logits_that_overflow_are_refused(change: dict[str, Any], row: str | None) -> None:
    x = np.full((2, 5, 3), 1e20, np.float32)
    if row is None:
        row = "(0, 0)"
    text = (
        f"scale * q @ k.T must be finite in float32, got an overflow in row {row}; "
        f"make scale, q or k smaller, or compute in float64"
    )
    with pytest.raises(ValueError, match=exactly(text)):
        attention(x, x, x, **change)
    assert np.isfinite(attention(x, x, x, compute_dtype=np.float64)).all()


@pytest.mark.parametrize("mask_dtype", [np.float16, BF16, np.float32, np.float64])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_masks_of_the_lowest_number(dtype: Any, mask_dtype: Any) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 5, 4)).astype(dtype) for _ in range(3))
    seen = rng.random((5, 5)) < 0.5
    seen[:, 0] = True
    lowest = ml_dtypes.finfo(mask_dtype).min  # type: ignore[no-untyped-call]  # no types there
    mask = np.where(seen, np.zeros((), mask_dtype), lowest).astype(mask_dtype)
    got, want = (attention(q, k, v, attn_mask=m) for m in (mask, seen))
    assert np.array_equal(got, want)
    mask[2] = lowest  # literally, a row of equal and very negative biases is a softmax
    got, lse = attention(q, k, v, attn_mask=mask, return_lse=True)
    assert np.isfinite(lse).all()
    if float(lowest) < -1e30:  # the bias swallows the logits
        mean = v.astype(np.float64).mean(axis=1)
        assert np.allclose(got[:, 2], mean, rtol=0, atol=4 * float(np.finfo(dtype).eps))


@pytest.mark.parametrize("grade", [FAST, GRADE])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_extreme_softcaps(dtype: Any, grade: Any) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 5, 4)).astype(dtype) for _ in range(3))
    free = attention(q, k, v, compute_dtype=grade)
    for cap in (1e6, 1e30, 3e38, 1e39, 1e300, 1.7e308, 10**300):
        out = attention(q, k, v, softcap=cap, compute_dtype=grade)
        # L^3 / (3 c^2) of logits below 10, and the rounding of two computations.
        atol = 1e-9 + 100 * np.finfo(dtype).eps
        assert np.allclose(out, free, rtol=0, atol=atol)
    mean = np.broadcast_to(v.mean(axis=1, keepdims=True), v.shape)
    for cap in (1e-30, 1e-40, 1e-46, 1e-300, 5e-324):
        out = attention(q, k, v, softcap=cap, compute_dtype=grade)
        assert np.allclose(out, mean, rtol=0, atol=20 * np.finfo(dtype).eps)


def test_softcap_comes_before_the_mask() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 5, 4)) for _ in range(3))
    v[:, 3:] = 1000
    mask = np.where(np.arange(5) >= 3, -INF, 0)
    for grade in (FAST, GRADE):
        out = attention(q, k, v, softcap=0.5, attn_mask=mask, compute_dtype=grade)
        assert np.abs(out).max() <= np.abs(v[:, :3]).max()


def test_unbounded_windows() -> None:
    x = np.random.default_rng(0).standard_normal((2, 5, 4))
    want = attention(x, x, x)
    for side in (-1, 5, 2**40, 2**63 - 1, 10**30):
        for grade in (FAST, GRADE):
            got = attention(x, x, x, window=(side, side), compute_dtype=grade)
            assert np.allclose(got, want, rtol=0, atol=1e-14)
    assert np.array_equal(
        attention(x, x, x, window=np.array([10, 0])), attention(x, x, x, causal=True)
    )


def test_offsets_far_away() -> None:
    x = np.random.default_rng(0).standard_normal((2, 5, 4))
    want = attention(x, x, x)
    for far in (2**32 - 1, np.int64(2**32 - 1), np.array(2**32 - 1, np.uint64)):
        assert np.array_equal(attention(x, x, x, causal=True, offset=far), want)
        assert not attention(x, x, x, window=(3, 3), offset=far).any()
    assert not attention(x, x, x, causal=True, offset=1 - 2**32).any()


def test_an_offset_overrides_the_alignment() -> None:
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((2, n, 4)) for n in (3, 7))
    want = attention(q, k, k, causal="bottom-right")
    for causal in (True, "top-left", "bottom-right"):
        assert np.array_equal(attention(q, k, k, causal=causal, offset=4), want)


# --- grouped heads ------------------------------------------------------------------------------


@pytest.mark.parametrize("grade", [FAST, GRADE])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_grouped_heads_are_repeated_heads(dtype: type, grade: Any) -> None:
    q, k, v = normal((2, 6, 9, 4), *[(2, 2, 9, 4)] * 2, dtype=dtype)
    options: dict[str, Any]
    for options in ({}, {"causal": True, "sink": np.arange(6.0)}):
        more: dict[str, Any] = {"compute_dtype": grade, **options}
        got = attention(q, k, v, enable_gqa=True, **more)
        repeated = attention(q, *(np.repeat(x, 3, axis=1) for x in (k, v)), **more)
        tiled = attention(q, *(np.tile(x, (1, 3, 1, 1)) for x in (k, v)), **more)
        assert np.array_equal(got, repeated)
        assert not np.allclose(got, tiled, rtol=0, atol=0.1)


def test_enable_gqa_with_equal_heads_changes_nothing() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 4))
    assert np.array_equal(attention(x, x, x, enable_gqa=True), attention(x, x, x))


# --- layouts, sizes and precisions --------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3), (1, 2, 1, 2, 3)])
def test_leading_axes(lead: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((*lead, n, w)) for n, w in ((4, 3), (6, 3), (6, 2)))
    keep = rng.random((*lead[:-1], 6)) < 0.7
    mask = rng.random((*lead, 4, 6)) < 0.7
    offset = rng.integers(0, 4, size=lead[:-1])
    out, lse = attention(
        q, k, v, key_mask=keep, attn_mask=mask, causal=True, offset=offset, return_lse=True
    )
    assert out.shape == (*lead, 4, 2)
    assert lse.shape == (*lead, 4)
    for i in np.ndindex(lead):
        one, one_lse = attention(
            q[i], k[i], v[i], key_mask=keep[i[:-1]], attn_mask=mask[i], causal=True,
            offset=offset[i[:-1]], return_lse=True,
        )  # fmt: skip
        assert np.array_equal(out[i], one)
        assert np.array_equal(lse[i], one_lse)


def test_many_small_heads() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((40, 25, 3, 2)) for _ in range(3))
    got = attention(q, k, v, scale=1.0)
    weights = np.exp(q @ k.swapaxes(2, 3))
    want = weights @ v / weights.sum(axis=3, keepdims=True)
    assert np.allclose(got, want, rtol=0, atol=1e-13)  # |L| < 30: 1e-13 is 900u


@pytest.mark.parametrize("grade", [FAST, GRADE])
@pytest.mark.parametrize(
    "sizes",
    [
        (0, 3, 4, 5, 2), (2, 0, 4, 5, 2), (2, 3, 0, 5, 2), (2, 3, 4, 0, 2), (2, 3, 4, 5, 0),
        (0, 0, 0, 0, 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("masked", [False, True])
def test_sizes_of_zero(sizes: tuple[int, ...], masked: bool, grade: Any) -> None:
    b, h, n_q, n_k, d_v = sizes
    options: dict[str, Any] = {}
    if masked:
        options = {
            "key_mask": np.ones((b, n_k), bool),
            "attn_mask": np.zeros((b, h, n_q, n_k)),
            "causal": "bottom-right",
            "window": (1, 1),
            "softcap": 2.0,
        }
    q, k, v = np.ones((b, h, n_q, 4)), np.ones((b, h, n_k, 4)), np.ones((b, h, n_k, d_v))
    with np.errstate(all="raise"):
        out, lse = attention(q, k, v, return_lse=True, compute_dtype=grade, **options)
    assert out.shape == (b, h, n_q, d_v)
    assert lse.shape == (b, h, n_q)
    if n_k == 0:
        assert not out.any()
        assert np.isneginf(lse).all()
        sink = np.arange(h) / 4
        _, lse = attention(q, k, v, sink=sink, return_lse=True, compute_dtype=grade, **options)
        assert np.allclose(lse, sink[:, None], rtol=0, atol=16 * UNIT["float64"])
    for name, rank in (("vmean", {}), ("uniform", {"rank": 1})):
        keep = options.get("key_mask")
        got = attention(q, k, v, name, rng=0, key_mask=keep, **rank)
        assert got.shape == out.shape
        assert not (n_k == 0 and got.any())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_visible_key_gives_its_value_bit_for_bit(dtype: type) -> None:
    q, k, v = normal(*[(2, 9, 4)] * 3, dtype=dtype)
    for grade in (FAST, GRADE):
        one = attention(q, k[:, :1], v[:, :1], compute_dtype=grade)
        assert np.array_equal(one, np.broadcast_to(v[:, :1], one.shape))
        assert np.array_equal(attention(q, k, v, causal=True, compute_dtype=grade)[:, 0], v[:, 0])
        assert np.array_equal(attention(q, k, v, window=(0, 0), compute_dtype=grade), v)


def halves(dtype: Any, seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((2, 3, 7, 8)).astype(dtype) for _ in range(3)]


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BF16], ids=str)
def test_half_precision_is_one_rounding_of_the_computation(dtype: np.dtype[Any]) -> None:
    given = halves(dtype)
    narrow = [x.astype(np.float32) for x in given]
    wide = [x.astype(np.float64) for x in given]
    options: dict[str, Any] = {"causal": True, "return_lse": True}
    for mine, arrays, grade in (
        (FAST, narrow, FAST),
        (np.float32, narrow, FAST),
        (GRADE, wide, GRADE),
    ):
        out, lse = attention(*given, compute_dtype=mine, **options)
        want, want_lse = attention(*arrays, compute_dtype=grade, **options)
        assert out.dtype == dtype
        assert lse.dtype == want_lse.dtype
        assert np.array_equal(lse, want_lse)
        assert np.array_equal(out, round_to(want, dtype))
        assert np.max(np.abs(out.astype(float) - want)) > 0  # there is something to round
    # bfloat16 through float32 would round twice, float16 through bfloat16 would lose digits
    assert dtype != BF16 or np.array_equal(
        attention(*given).view(np.int16), attention(*narrow).astype(BF16).view(np.int16)
    )


def test_compute_dtype() -> None:
    narrow = halves(np.float32)
    wide = [x.astype(np.float64) for x in narrow]
    out, lse = attention(*narrow, compute_dtype=np.float64, return_lse=True)
    want, want_lse = attention(*wide, compute_dtype=np.float64, return_lse=True)
    assert (out.dtype, lse.dtype) == (np.float32, np.float64)
    assert np.array_equal(lse, want_lse)
    assert np.array_equal(out, want.astype(np.float32))
    assert np.array_equal(attention(*narrow, compute_dtype=np.float32), attention(*narrow))
    for same in ("float64", float, np.dtype(np.float64)):
        assert np.array_equal(attention(*narrow, compute_dtype=same), out)
    # The grade is another computation than the fast path in float64, and close to it.
    fast = attention(*wide)
    assert np.allclose(fast, want, rtol=0, atol=1e-14)
    assert np.max(np.abs(attention(*narrow) - want)) > np.max(np.abs(out - want))


def test_byte_order_and_subclasses() -> None:
    plain = halves(np.float32)
    want = attention(*plain)
    for grade in (FAST, GRADE):
        swapped = attention(*(x.astype(">f4") for x in plain), compute_dtype=grade)
        assert swapped.dtype == np.float32
        assert swapped.dtype.isnative
        assert np.array_equal(swapped, attention(*plain, compute_dtype=grade))
    mixed = attention(plain[0].astype(">f4"), *plain[1:], attn_mask=np.zeros((7, 7), ">f8"))
    assert np.array_equal(mixed, want)
    with pytest.warns(PendingDeprecationWarning, match="matrix subclass"):
        matrices = [np.matrix(x[0, 0]) for x in plain]
    out = attention(*matrices)
    assert type(out) is np.ndarray
    assert np.array_equal(out, attention(*(x[0, 0] for x in plain)))
    assert np.array_equal(
        attention(*matrices, "uniform", rank=2, rng=0),
        attention(*(x[0, 0] for x in plain), "uniform", rank=2, rng=0),
    )


@pytest.mark.parametrize("grade", [FAST, GRADE])
@pytest.mark.parametrize("dtype", [np.float16, BF16, np.float32, np.float64])
def test_views_give_the_same_bits_and_inputs_are_not_written(dtype: Any, grade: Any) -> None:
    rng = np.random.default_rng(0)
    plain = [rng.standard_normal((2, 3, 7, 4)).astype(dtype) for _ in range(3)]
    options: dict[str, Any] = {
        "attn_mask": rng.standard_normal((7, 7)),
        "key_mask": rng.random((2, 7)) < 0.8,
        "compute_dtype": grade,
    }
    want = attention(*plain, **options)
    before = [hashlib.sha256(x.tobytes()).digest() for x in (*plain, *list(options.values())[:2])]
    assert np.array_equal(attention(*plain, **options), want)
    views: list[list[Array]] = [
        [np.asfortranarray(x) for x in plain],
        [x[:, :, ::-1].copy()[:, :, ::-1] for x in plain],
        [x.swapaxes(1, 2).copy().swapaxes(1, 2) for x in plain],  # heads in the last axis but one
        [np.repeat(x, 2, axis=3)[..., ::2] for x in plain],
        [x.copy() for x in plain],
    ]
    for x in views[-1]:
        x.flags.writeable = False
    for arrays in views:
        got = attention(
            *arrays,
            attn_mask=np.asfortranarray(options["attn_mask"]),
            key_mask=np.asfortranarray(options["key_mask"]),
            compute_dtype=grade,
        )
        assert np.array_equal(got, want)
    after = [hashlib.sha256(x.tobytes()).digest() for x in (*plain, *list(options.values())[:2])]
    assert after == before
    assert not any(np.shares_memory(want, x) for x in plain)


@pytest.mark.parametrize("kind", [bool, float])
def test_expanded_masks_are_not_copied_whole(kind: type) -> None:
    rng = np.random.default_rng(0)
    n = 300
    q = rng.standard_normal((16, 4, n, 4)).astype(np.float32)
    small = rng.random((n, n)) < 0.9 if kind is bool else rng.standard_normal((n, n))
    full = np.broadcast_to(small, (16, 4, n, n))
    want = attention(q, q, q, attn_mask=small)
    tracemalloc.start()
    try:
        got = attention(q, q, q, attn_mask=full)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(got, want)
    # Three results of the size of q, the masks of one head, and never 64 of them.
    assert peak < 3 * q.nbytes + 16 * n * n < full.size
    only_queries = np.broadcast_to(small[:, :1], (16, 4, n, n))
    assert np.array_equal(
        attention(q, q, q, attn_mask=only_queries), attention(q, q, q, attn_mask=small[:, :1])
    )


# --- algebra ------------------------------------------------------------------------------------


def lattice(dtype: Any, n_q: int = 9, n_k: int = 11, seed: int = 0, **options: Any) -> Case:
    """Return a call whose dot products are exact: integers, and a scale that is a power of two."""
    rng = np.random.default_rng(seed)
    q, k = (rng.integers(-2, 3, size=(1, 2, n, 16)).astype(dtype) for n in (n_q, n_k))
    v = rng.standard_normal((1, 2, n_k, 3)).astype(dtype)
    return Case(q, k, v, options)


DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
GRADES = pytest.mark.parametrize("grade", [FAST, GRADE])


def differ(case: Case, got: Result, want: Result) -> list[str]:
    """Say where two computed results of one problem differ by more than twice the rounding."""
    weights, _, lse = case.loops()
    names = ("output", "lse")
    return [
        name
        for name, a, b, bound in zip(names, got, want, case.bounds_of(weights, lse), strict=True)
        if not np.all(np.where(a == b, 0, np.abs(a - b)) <= 2 * bound)
    ]


@DTYPES
@GRADES
@pytest.mark.parametrize("option", OPTIONS)
def test_values_of_one_give_one(option: str, dtype: Any, grade: Any) -> None:
    if "@sink" in OPTIONS[option]:
        option = "plain"  # a sink keeps weight for itself
    case = build("gqa wide", option, dtype, compute_dtype=grade)
    out, lse = replace(case, v=np.ones_like(case.v)).solve()
    # The same weights are summed above and below the line, each sum of n_k + 1 terms.
    bound = 2 * gamma(case.k.shape[2] + 4, UNIT[np.dtype(dtype).name])
    assert np.all(np.abs(out - ~np.isneginf(lse)[..., None]) <= bound)


@DTYPES
@GRADES
def test_doubled_values_double_the_output_bit_for_bit(dtype: Any, grade: Any) -> None:
    case = build("gqa wide", "everything", dtype, compute_dtype=grade)
    doubled = replace(case, v=dtype(2) * case.v)
    assert np.array_equal(doubled.solve()[0], dtype(2) * case.solve()[0])


@DTYPES
@GRADES
def test_a_shift_of_all_keys_changes_nothing(dtype: Any, grade: Any) -> None:
    case = lattice(dtype, compute_dtype=grade)
    shift = np.random.default_rng(1).integers(-3, 4, size=16).astype(dtype)
    moved = replace(case, k=case.k + shift)
    out, lse = moved.solve()
    lse = lse - case.scale * (case.q @ shift)
    assert differ(moved, (out, lse), case.solve()) == []
    assert differ(moved, (out, lse + 0.01), case.solve()) == ["lse"]


@DTYPES
@GRADES
def test_permuted_keys_change_nothing(dtype: Any, grade: Any) -> None:
    case = build("gqa wide", "bias", dtype, compute_dtype=grade)
    order = np.random.default_rng(1).permutation(case.k.shape[2])
    mask = case.options["attn_mask"][..., order]
    moved = replace(case, k=case.k[:, :, order], v=case.v[:, :, order]).change(attn_mask=mask)
    assert differ(case, moved.solve(), case.solve()) == []
    wrong = replace(moved, v=case.v)
    assert "output" in differ(case, wrong.solve(), case.solve())


@DTYPES
@GRADES
def test_permuted_queries_permute_the_rows(dtype: Any, grade: Any) -> None:
    case = build("row tiles", "bool mask", dtype, compute_dtype=grade)
    order = np.random.default_rng(1).permutation(case.q.shape[2])
    mask = case.options["attn_mask"][:, :, order]
    out, lse = replace(case, q=case.q[:, :, order]).change(attn_mask=mask).solve()
    back = np.argsort(order)
    assert differ(case, (out[:, :, back], lse[:, :, back]), case.solve()) == []


@DTYPES
@GRADES
def test_a_query_alone_gives_its_row(dtype: Any, grade: Any) -> None:
    case = build("row tiles", "plain", dtype, compute_dtype=grade)
    rows = [replace(case, q=case.q[:, :, [i]]).solve() for i in range(case.q.shape[2])]
    together = tuple(np.concatenate([row[i] for row in rows], axis=2) for i in range(2))
    assert differ(case, (together[0], together[1]), case.solve()) == []


@DTYPES
@GRADES
@pytest.mark.parametrize("n", [40, 600])
def test_future_keys_do_not_matter(n: int, dtype: Any, grade: Any) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, 4)).astype(dtype) for _ in range(3))
    options: dict[str, Any] = {"causal": True, "return_lse": True, "compute_dtype": grade}
    want = attention(q, k, v, **options)
    for row in (0, 1, n // 2, n - 2):
        changed = [x.copy() for x in (k, v)]
        for x in changed:
            x[:, row + 1 :] = -3 * x[:, row + 1 :] + 1
        got = attention(q, *changed, **options)
        for a, b in zip(got, want, strict=True):
            assert np.array_equal(a[:, : row + 1], b[:, : row + 1])
            assert not np.array_equal(a[:, row + 1], b[:, row + 1])


@DTYPES
@GRADES
def test_output_lies_in_the_hull_of_the_visible_values(dtype: Any, grade: Any) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (3 * rng.standard_normal((1, 1, n, 4)).astype(dtype) for n in (50, 40, 40))
    seen = rng.random((50, 40)) < 0.3
    seen[:, 7] = True
    out = attention(q, k, v, attn_mask=seen, compute_dtype=grade)[0, 0]
    values = np.broadcast_to(v[0, 0], (50, 40, 4))
    lowest = np.min(values, axis=1, where=seen[..., None], initial=INF)
    highest = np.max(values, axis=1, where=seen[..., None], initial=-INF)
    # Weights that sum to 1 within two sums of n_k terms.
    slack = 2 * gamma(44, UNIT[np.dtype(dtype).name]) * np.abs(v).max()
    assert np.all(out >= lowest - slack)
    assert np.all(out <= highest + slack)
    outside = attention(q, k, v, compute_dtype=grade)[0, 0]
    assert not np.all((outside >= lowest - slack) & (outside <= highest + slack))


@DTYPES
@GRADES
def test_keys_twice_change_nothing(dtype: Any, grade: Any) -> None:
    case = build("gqa wide", "plain", dtype, compute_dtype=grade)
    twice = replace(case, k=np.tile(case.k, (1, 1, 2, 1)), v=np.tile(case.v, (1, 1, 2, 1)))
    out, lse = twice.solve()
    weights, _, lse_twice = twice.loops()
    bounds = twice.bounds_of(weights, lse_twice)
    want = case.solve()
    assert np.all(np.abs(out - want[0]) <= 2 * bounds[0])
    assert np.all(np.abs(lse - math.log(2) - want[1]) <= 2 * bounds[1])


@DTYPES
@GRADES
@pytest.mark.parametrize("shape", ["gqa wide", "key tiles"])
@pytest.mark.parametrize("cut", [0, 1, 5, 512, 9999])
def test_blocks_of_keys_merge_to_the_whole(cut: int, shape: str, dtype: Any, grade: Any) -> None:
    case = build(shape, "bool mask", dtype, compute_dtype=grade)
    key = np.arange(case.k.shape[2])
    parts = [case.change(key_mask=keep).solve() for keep in (key < cut, key >= cut)]
    (out1, lse1), (out2, lse2) = ([x.astype(np.float64) for x in part] for part in parts)
    assert differ(case, merge(out1, lse1, out2, lse2), case.solve()) == []


def test_a_sink_is_a_key_of_value_zero() -> None:
    case = build("gqa wide", "plain")
    sink = np.linspace(-2, 2, 6)
    out, lse = case.solve()
    got, got_lse = case.change(sink=sink).solve()
    want = merge(out, lse, np.zeros_like(out), np.broadcast_to(sink[:, None], lse.shape))
    assert np.allclose(got, want[0], rtol=0, atol=1e-14)
    assert np.allclose(got_lse, want[1], rtol=0, atol=1e-14)


# --- threads ------------------------------------------------------------------------------------


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, with warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.threads
def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    done = run_python(
        """
        import numba, numpy as np, sketchattn as sa
        from sketchattn.kernels import _threads

        _threads.PAYS = 1
        rng = np.random.default_rng(0)
        calls = 0
        for dtype, grade, (h, n_q, n_k) in [
            (np.float32, None, (3, 700, 1100)), (np.float64, None, (3, 700, 1100)),
            (np.float32, None, (5, 33, 70)), (np.float64, None, (1, 1, 600)),
            (np.float16, None, (2, 130, 130)), (np.float64, np.float64, (3, 300, 1100)),
        ]:
            q, k, v = (rng.standard_normal((h, n, 8)).astype(dtype) for n in (n_q, n_k, n_k))
            for options in (
                {}, {"causal": "bottom-right", "sink": np.ones(h), "softcap": 2.0},
                {"attn_mask": rng.standard_normal((n_q, n_k)), "key_mask": rng.random(n_k) < 0.5},
            ):
                results = []
                for threads in (1, 2, 3, 4):
                    numba.set_num_threads(threads)
                    results.append(
                        sa.attention(q, k, v, return_lse=True, compute_dtype=grade, **options)
                    )
                    assert numba.get_num_threads() == threads
                assert np.isfinite(results[0][0]).all()
                for out, lse in results[1:]:
                    assert np.array_equal(out, results[0][0])
                    assert np.array_equal(lse, results[0][1])
                calls += 1
            numba.set_num_threads(1)
            one = sa.attention(q, k, v, "uniform", rank=5, rng=0)
            numba.set_num_threads(4)
            assert np.array_equal(sa.attention(q, k, v, "uniform", rank=5, rng=0), one)
        print(calls, numba.config.NUMBA_NUM_THREADS)
        """,
        NUMBA_NUM_THREADS="4",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["18", "4"]


CONCURRENT = """
    import sys, numpy as np, numba, sketchattn as sa
    from sketchattn.kernels import _threads
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    _threads.PAYS = 1
    rng = np.random.default_rng(0)
    inputs = [
        [rng.standard_normal((2, 65, 4)).astype(dtype) for _ in range(3)]
        for dtype in (np.float32, np.float64, np.float16, np.float32)
    ]
    grades = (None, None, None, np.float64)
    start = Barrier(4)

    def call(i):
        x = inputs[i]
        out = sa.attention(*x, causal=True, compute_dtype=grades[i])
        problem = sa.AttentionProblem(*(y[0] for y in x))
        return out, problem.output, problem.exact.T @ np.ones(65, problem.dtype)

    def repeat(i):
        start.wait()  # the first calls of the process, at the same time
        return [call(i) for _ in range(50)]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(repeat, range(4)))
    for i in range(4):
        want = call(i)
        for got in found[i]:
            for a, b in zip(got, want):
                assert np.array_equal(a, b)
    print("done")
    """


@pytest.mark.threads
def test_calls_from_python_threads_at_the_same_time() -> None:
    done = run_python(CONCURRENT, NUMBA_NUM_THREADS="4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["done"]


@pytest.mark.threads
def test_two_threads_of_this_process_agree_with_one() -> None:
    cases = [build("key tiles", option, np.float32) for option in ("top-left", "bias", "softcap")]
    want = [case.solve() for case in cases]
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(lambda i: cases[i % 3].solve(), range(30)))
    for i, result in enumerate(got):
        for a, b in zip(result, want[i % 3], strict=True):
            assert np.array_equal(a, b)


def thread_counts() -> tuple[int, list[int]]:
    import numba
    import scipy.linalg.cython_blas  # noqa: F401  (loads the BLAS that kernels call)
    from threadpoolctl import threadpool_info

    pools = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
    return numba.get_num_threads(), pools


@pytest.mark.threads
@pytest.mark.parametrize("grade", [FAST, GRADE])
def test_thread_counts_are_restored(grade: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from threadpoolctl import threadpool_limits

    from sketchattn.kernels import softmax
    from sketchattn.operators import reference

    x = np.random.default_rng(0).standard_normal((2, 40, 4))
    inside = []

    def fail(*arguments: Any) -> Any:
        inside.append(thread_counts()[1])
        raise MemoryError("in the middle of a call")

    thread_counts()
    with threadpool_limits(2, user_api="blas"):
        before = thread_counts()
        assert set(before[1]) == {2}
        attention(x, x, x, compute_dtype=grade)
        assert thread_counts() == before
        with pytest.raises(ValueError, match="overflow"):
            attention(1e200 * x, 1e200 * x, x, compute_dtype=grade)
        assert thread_counts() == before
        monkeypatch.setattr(softmax, "attend", fail)
        monkeypatch.setattr(reference, "weighted_values", fail)
        with pytest.raises(MemoryError):
            attention(x, x, x, compute_dtype=grade)
        assert thread_counts() == before
    assert set(inside[0]) == {1}  # and BLAS did run on one thread


@pytest.mark.slow
def test_memory_of_twenty_thousand_tokens() -> None:
    pytest.importorskip("resource")
    done = run_python(
        """
        import resource, numpy as np, sketchattn as sa

        rng = np.random.default_rng(0)
        q, k, v = (rng.standard_normal((20_000, 64)).astype(np.float32) for _ in range(3))
        sa.attention(q[:100], k[:100], v[:100])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        out = sa.attention(q, k, v)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert np.isfinite(out).all()
        print(grown * (1 if __import__("sys").platform == "darwin" else 1024) - out.nbytes)
        """
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64 * 2**20  # a dense matrix would be 1.6e9 bytes


# --- methods that approximate -------------------------------------------------------------------

APPROXIMATE = [name for name in sa.methods() if name != "exact"]


def method_of(name: str, rank: int = 4) -> tuple[Method, dict[str, Any]]:
    cls = sa.methods()[name]
    parameters = {"rank": rank} if "rank" in cls._get_param_names() else {}
    return cls(**parameters), parameters


def triple(h: int = 3, n: int = 12, dtype: Any = np.float32, seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((2, h, n, 4)).astype(dtype) for _ in range(3)]


@pytest.mark.parametrize("dtype", [np.float16, BF16, np.float32, np.float64])
@pytest.mark.parametrize("name", APPROXIMATE)
def test_one_head_is_the_method_of_that_head(name: str, dtype: Any) -> None:
    q, k, v = (x[0, 0] for x in triple(dtype=dtype))
    method, parameters = method_of(name)
    problem = AttentionProblem(q, k, v)
    want = method.attend(problem, 7)
    for chosen in (name, method):
        more = parameters if chosen is name else {}
        out = attention(q, k, v, chosen, rng=7, **more)
        assert out.dtype == dtype
        assert np.array_equal(out, round_to(want, dtype))
    # A method may compute its output by a path of its own: n weights of a row, each rounded.
    product = method.approximate(problem, 7) @ problem.values
    size = np.abs(want).max() + np.abs(problem.values).max()
    assert np.abs(want - product).max() <= 64 * np.finfo(problem.dtype).eps * size
    draw = method.draw(problem, 7)
    assert np.array_equal(attention(q, k, v, method, draw=draw), round_to(want, dtype))
    wide = AttentionProblem(*(x.astype(np.float64) for x in (q, k, v)))
    want = method.attend(wide, 7)
    out = attention(q, k, v, method, rng=7, compute_dtype=np.float64)
    assert np.array_equal(out, round_to(want, dtype))


@pytest.mark.parametrize("name", APPROXIMATE)
def test_the_same_rng_gives_the_same_bits(name: str, global_random_seed: int) -> None:
    given = triple()
    method, _ = method_of(name)
    want = attention(*given, method, rng=global_random_seed)
    assert want.shape == (2, 3, 12, 4)
    assert np.array_equal(attention(*given, method, rng=np.int64(global_random_seed)), want)
    generators = [np.random.default_rng(global_random_seed) for _ in range(2)]
    first, second = (attention(*given, method, rng=generator) for generator in generators)
    assert np.array_equal(first, second)
    again = attention(*given, method, rng=generators[0])
    other = attention(*given, method, rng=global_random_seed + 1)
    unseeded = attention(*given, method)
    if method.traits.randomized:
        for x in (again, other, unseeded):
            assert not np.array_equal(x, first)
            assert not np.array_equal(x, want)
    else:
        for x in (again, other, unseeded):
            assert np.array_equal(x, want)


@pytest.mark.parametrize("name", APPROXIMATE)
def test_a_head_does_not_depend_on_the_others(name: str, global_random_seed: int) -> None:
    q, k, v = triple()
    method, _ = method_of(name)
    rng = global_random_seed
    whole = attention(q, k, v, method, rng=rng)
    for h, b in itertools.product((1, 2), (1, 2)):
        part = attention(*(x[:b, :h] for x in (q, k, v)), method, rng=rng)
        assert np.array_equal(part, whole[:b, :h])
    scaled = [x.copy() for x in (q, k, v)]
    for x in scaled:
        x[1, 2] *= 3
    changed = attention(*scaled, method, rng=rng)
    assert np.array_equal(np.delete(changed.reshape(6, 12, 4), 5, 0), whole.reshape(6, 12, 4)[:5])
    grouped = attention(q, k[:, :1], v[:, :1], method, rng=rng, enable_gqa=True)
    repeated = attention(q, *(np.repeat(x[:, :1], 3, 1) for x in (k, v)), method, rng=rng)
    assert np.array_equal(grouped, repeated)


def test_heads_have_streams_of_their_own(global_random_seed: int) -> None:
    # Six copies of one head: equal draws of 8 keys of 64 would have probability 2e-10 each.
    x = np.random.default_rng(0).standard_normal((64, 4))
    heads = np.broadcast_to(x, (2, 3, 64, 4))
    out = attention(heads, heads, heads, "uniform", rank=8, rng=global_random_seed)
    alone = attention(x, x, x, "uniform", rank=8, rng=global_random_seed)
    every = [*out.reshape(6, 64, 4), alone]
    for a, b in itertools.combinations(every, 2):
        assert not np.array_equal(a, b)
    draw = {"columns": np.arange(8)}
    out = attention(heads, heads, heads, "uniform", rank=8, draw=draw)
    for head in out.reshape(6, 64, 4):
        assert np.array_equal(head, attention(x, x, x, "uniform", rank=8, draw=draw))


def test_masks_of_approximations() -> None:
    q, k, v = triple()
    keep = np.random.default_rng(1).random((2, 12)) < 0.7
    for options in (
        {"key_mask": keep},
        {"key_mask": keep[0]},
        {"causal": True},
        {"causal": True, "key_mask": keep},
    ):
        want = attention(q, k, v, "vmean", **options)
        seen = np.broadcast_to(np.array(options.get("key_mask", True)), (2, 12))[:, None, None, :]
        seen = seen & (np.tri(12, dtype=bool) if "causal" in options else True)
        count = np.broadcast_to(seen, (2, 3, 12, 12)).sum(axis=3, keepdims=True)
        mean = np.broadcast_to(seen, (2, 3, 12, 12)) @ v / np.maximum(count, 1)
        # Two sums of at most 12 terms, in float64 and float32.
        assert np.allclose(
            want, mean, rtol=0, atol=2 * gamma(14, UNIT["float32"]) * np.abs(v).max()
        )
    got = attention(q, k, v, "uniform", rank=3, rng=0, key_mask=keep)
    hidden = np.broadcast_to(~keep[:, None], (2, 3, 12))
    for x in (k, v):
        x[hidden] = NAN
    assert np.array_equal(attention(q, k, v, "uniform", rank=3, rng=0, key_mask=keep), got)
    assert np.array_equal(attention(q, k, v, "vmean", key_mask=keep), attention(
        q, np.nan_to_num(k), np.nan_to_num(v), "vmean", key_mask=keep
    ))  # fmt: skip


def test_the_exact_method_as_an_object() -> None:
    given = triple()
    want = attention(*given, causal=True)
    assert np.array_equal(attention(*given, "exact", causal=True), want)
    assert np.array_equal(attention(*given, sa.Exact(), causal=True, rng=3), want)


class Plain(Method):
    """A method that honours as little as a method can."""

    name = "plain"

    @property
    def traits(self) -> Traits:
        return Traits(rectangular=False, randomized=False, uses_rank=False)

    def _approximate(self, problem: AttentionProblem, draw: Any) -> Any:
        return FactoredAttention(
            np.zeros((problem.n_q, 1), problem.dtype),
            None,
            np.zeros((1, problem.n_k), problem.dtype),
        )


# --- refusals -----------------------------------------------------------------------------------

X = np.random.default_rng(0).standard_normal((2, 4, 5, 3))


def with_entry(index: tuple[int, ...], value: float) -> Array:
    out = X.copy()
    out[index] = value
    return out


Refusal = tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]

ARRAYS: dict[str, Refusal] = {
    "one axis": (
        (X, X[0, 0, 0], X), {}, ValueError,
        "k must have shape (..., heads, tokens, width), got (3,); two axes are one head",
    ),
    "integers": (
        (X, X, X.astype(int)), {}, TypeError,
        "v must be float16, bfloat16, float32 or float64, got int64; "
        "convert it with astype(np.float32)",
    ),
    "mixed": (
        (X, X, X.astype(np.float32)), {}, TypeError,
        "v must have the dtype float64 of q, got float32; convert q, k and v to one dtype",
    ),
    "masked array": (
        (X, np.ma.masked_array(X), X), {}, TypeError,
        "k must be a plain array, got a masked array; pass its data and use key_mask",
    ),
    "no width": (
        (X[..., :0], X[..., :0], X), {}, ValueError,
        "q must have a head width d of at least 1, got d = 0; pass q of (n_q, d)",
    ),
    "widths": (
        (X, X[..., :2], X), {}, ValueError,
        "k must have the head width d = 3 of q, got 2; project q and k to one width",
    ),
    "lengths": (
        (X, X, X[:, :, :4]), {}, ValueError,
        "v must have one row for each of the n_k = 5 keys, got 4; pass k and v of equal length",
    ),
    "axes": (
        (X, X[0], X[0]), {}, ValueError,
        "k must have as many axes as q of shape (2, 4, 5, 3), got (4, 5, 3); "
        "add axes of length 1 and broadcast them",
    ),
    "axes of v": (
        (X, X, X[0]), {}, ValueError,
        "v must have as many axes as q of shape (2, 4, 5, 3), got (4, 5, 3); "
        "add axes of length 1 and broadcast them",
    ),
    "heads of v": (
        (X, X, X[:, :2]), {}, ValueError,
        "v must have the batch and head axes (2, 4) of k, got (2, 2); pass k and v of equal heads",
    ),
    "batch": (
        (X, X[:1], X[:1]), {}, ValueError,
        "k must have the batch axes (2,) of q, got (1,); broadcast them first",
    ),
    "heads without the flag": (
        (X, X[:, :2], X[:, :2]), {}, ValueError,
        "k must have the 4 heads of q, got 2; pass enable_gqa=True to share key heads",
    ),
    "one head without the flag": (
        (X, X[:, :1], X[:, :1]), {}, ValueError,
        "k must have the 4 heads of q, got 1; pass enable_gqa=True to share key heads",
    ),
    "heads that do not divide": (
        (X, X[:, :3], X[:, :3]), {"enable_gqa": True}, ValueError,
        "k must have a number of heads that divides the 4 heads of q, got 3; repeat or drop heads",
    ),
    "more key heads": (
        (X[:, :2], X, X), {"enable_gqa": True}, ValueError,
        "k must have a number of heads that divides the 2 heads of q, got 4; repeat or drop heads",
    ),
    "no key heads": (
        (X, X[:, :0], X[:, :0]), {"enable_gqa": True}, ValueError,
        "k must have a number of heads that divides the 4 heads of q, got 0; repeat or drop heads",
    ),
    "enable_gqa": (
        (X, X, X), {"enable_gqa": 1}, TypeError,
        "enable_gqa must be a bool, got int; pass True or False",
    ),
    "NaN in q": (
        (with_entry((1, 2, 3, 0), NAN), X, X), {}, ValueError,
        "q must be finite, got nan at index (1, 2, 3, 0); replace it, or hide its key with a mask",
    ),
}  # fmt: skip

CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "scale": (
        {"scale": INF}, ValueError, "scale must be finite, got inf; None is 1/sqrt(d) = 0.57735",
    ),
    "scale type": (
        {"scale": [1.0]}, TypeError,
        "scale must be a real number or None, got list; None is 1/sqrt(d) = 0.57735",
    ),
    "causal name": (
        {"causal": "bottom"}, ValueError,
        "causal must be False, True, 'top-left' or 'bottom-right', got 'bottom'; "
        "did you mean 'bottom-right'?",
    ),
    "causal name with an offset": (
        {"causal": "lower", "offset": 0}, ValueError,
        "causal must be False, True, 'top-left' or 'bottom-right', got 'lower'; "
        "choose one of bottom-right, top-left",
    ),
    "causal type with an offset": (
        {"causal": 1, "offset": 0}, TypeError,
        "causal must be a bool, 'top-left' or 'bottom-right', got int; "
        "an explicit position of the first query is the argument offset of attention",
    ),
    "offset type": (
        {"causal": True, "offset": 1.0}, TypeError,
        "offset must hold integers, got float64; it is the position of query 0",
    ),
    "offset bool": (
        {"causal": True, "offset": True}, TypeError,
        "offset must hold integers, got bool; it is the position of query 0",
    ),
    "offset shape": (
        {"causal": True, "offset": [0, 1, 2]}, ValueError,
        "offset must be broadcastable to the batch axes (2,), got shape (3,); "
        "give one integer or one a batch entry",
    ),
    "offset size": (
        {"causal": True, "offset": [0, 2**32]}, ValueError,
        "offset must be below 2^32 in size, got 4294967296; check its units",
    ),
    "offset smallest": (
        {"causal": True, "offset": np.array(-(2**63))}, ValueError,
        "offset must be below 2^32 in size, got -9223372036854775808; check its units",
    ),
    "window number": (
        {"window": 3}, TypeError,
        "window must be a pair (left, right), got 3; (-1, -1) is unbounded",
    ),
    "window of one": (
        {"window": (3,)}, TypeError,
        "window must be a pair (left, right), got (3,); (-1, -1) is unbounded",
    ),
    "window None": (
        {"window": None}, TypeError,
        "window must be a pair (left, right), got None; (-1, -1) is unbounded",
    ),
    "window fraction": (
        {"window": (3, 0.5)}, TypeError,
        "window must hold two integers, got right = 0.5; -1 is unbounded",
    ),
    "window bool": (
        {"window": (True, 0)}, TypeError,
        "window must hold two integers, got left = True; -1 is unbounded",
    ),
    "window text": (
        {"window": "ab"}, TypeError,
        "window must hold two integers, got left = 'a'; -1 is unbounded",
    ),
    "window negative": (
        {"window": (0, -2)}, ValueError,
        "window must hold integers of at least -1, got right = -2; -1 is unbounded",
    ),
    "softcap type": (
        {"softcap": None}, TypeError,
        "softcap must be a real number, got NoneType; 0 turns it off",
    ),
    "softcap bool": (
        {"softcap": True}, TypeError, "softcap must be a real number, got bool; 0 turns it off",
    ),
    "softcap negative": (
        {"softcap": -1}, ValueError,
        "softcap must be finite and at least 0, got -1.0; 0 turns it off",
    ),
    "softcap NaN": (
        {"softcap": NAN}, ValueError,
        "softcap must be finite and at least 0, got nan; 0 turns it off",
    ),
    "softcap beyond float": (
        {"softcap": 10**400}, ValueError,
        "softcap must be finite and at least 0, got inf; 0 turns it off",
    ),
    "return_lse": (
        {"return_lse": "yes"}, TypeError, "return_lse must be a bool, got str; pass True or False",
    ),
    "key mask type": (
        {"key_mask": np.ones(5, int)}, TypeError,
        "key_mask must be boolean, True for the keys to keep, got int64; "
        "convert it with astype(bool)",
    ),
    "key mask shape": (
        {"key_mask": np.ones((3, 5), bool)}, ValueError,
        "key_mask must have shape (5,) or (2, 5), got (3, 5); give one entry for each key",
    ),
    "key mask of heads": (
        {"key_mask": np.ones((2, 4, 5), bool)}, ValueError,
        "key_mask must have shape (5,) or (2, 5), got (2, 4, 5); give one entry for each key",
    ),
    "key mask of one key": (
        {"key_mask": np.ones((2, 1), bool)}, ValueError,
        "key_mask must have shape (5,) or (2, 5), got (2, 1); give one entry for each key",
    ),
    "mask type": (
        {"attn_mask": np.ones((5, 5), int)}, TypeError,
        "attn_mask must be boolean or floating point, got int64; "
        "convert it with astype(bool) if True means attend",
    ),
    "mask shape": (
        {"attn_mask": np.ones((5, 4), bool)}, ValueError,
        "attn_mask must be broadcastable to (2, 4, 5, 5), got (5, 4); "
        "axes are aligned to the right",
    ),
    "mask of batch and keys": (
        {"attn_mask": np.ones((2, 5), bool)}, ValueError,
        "attn_mask must be broadcastable to (2, 4, 5, 5), got (2, 5); "
        "axes are aligned to the right",
    ),
    "mask of three axes is heads": (
        {"attn_mask": np.ones((2, 5, 5), bool)}, ValueError,
        "attn_mask must be broadcastable to (2, 4, 5, 5), got (2, 5, 5); "
        "axes are aligned to the right",
    ),
    "mask axes": (
        {"attn_mask": np.ones((1, 1, 1, 5, 5), bool)}, ValueError,
        "attn_mask must be broadcastable to (2, 4, 5, 5), got (1, 1, 1, 5, 5); "
        "axes are aligned to the right",
    ),
    "mask NaN": (
        {"attn_mask": np.where(np.eye(5) > 0, NAN, 0)}, ValueError,
        "attn_mask must hold no NaN and no +inf, got nan at index (0, 0); -inf hides a key",
    ),
    "mask infinite": (
        {"attn_mask": np.broadcast_to(np.array([0, 0, 0, INF, 0], np.float16), (2, 4, 5, 5))},
        ValueError,
        "attn_mask must hold no NaN and no +inf, got inf at index (0, 0, 0, 3); -inf hides a key",
    ),
    "mask number": (
        {"attn_mask": NAN}, ValueError,
        "attn_mask must hold no NaN and no +inf, got nan at index (); -inf hides a key",
    ),
    "sink shape": (
        {"sink": np.ones(1)}, ValueError,
        "sink must have shape (4,), got (1,); give one logit for each head",
    ),
    "sink type": (
        {"sink": np.ones(4, int)}, TypeError,
        "sink must be float16, bfloat16, float32 or float64, got int64; "
        "convert it with astype(np.float32)",
    ),
    "sink infinite": (
        {"sink": [0.0, -INF, 0.0, 0.0]}, ValueError,
        "sink must be finite, got -inf at index (1,); replace it, or hide its key with a mask",
    ),
    "compute_dtype half": (
        {"compute_dtype": np.float16}, TypeError,
        "compute_dtype must be None, numpy.float32 or numpy.float64, got "
        "<class 'numpy.float16'>; None computes in float64",
    ),
    "compute_dtype word": (
        {"compute_dtype": "fast"}, TypeError,
        "compute_dtype must be None, numpy.float32 or numpy.float64, got 'fast'; "
        "None computes in float64",
    ),
    "compute_dtype narrow": (
        {"compute_dtype": np.float32}, ValueError,
        "compute_dtype must not be narrower than the inputs, got float32 for float64; "
        "convert q, k and v first",
    ),
    "parameter of the exact method": (
        {"rank": 3}, TypeError,
        "rank must be a parameter of method 'exact', got 'rank'; it takes no parameters",
    ),
    "misspelt option": (
        {"attnmask": None}, TypeError,
        "attnmask must be a parameter of method 'exact', got 'attnmask'; it takes no parameters",
    ),
    "draw of the exact method": (
        {"draw": {}}, ValueError,
        "draw must be None for method 'exact', got a draw; it draws nothing",
    ),
    "rng of the exact method": (
        {"rng": "0"}, TypeError,
        "rng must be None, an integer or a numpy.random.Generator, got str; "
        "use numpy.random.default_rng",
    ),
}  # fmt: skip

UNIFORM = {"method": "uniform", "rank": 2}
METHODS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown": (
        {"method": "unifrom"}, ValueError,
        "method must be registered, got 'unifrom'; did you mean 'uniform'?",
    ),
    "unknown, with an option": (
        {"method": "exat", "softcap": 1.0}, ValueError,
        "method must be registered, got 'exat'; did you mean 'exact'?",
    ),
    "nothing": (
        {"method": None}, TypeError,
        "method must be a name or a method object, got NoneType; see sketchattn.methods()",
    ),
    "class": (
        {"method": dict}, TypeError,
        "method must be a name or a method object, got the class dict; see sketchattn.methods()",
    ),
    "parameter": (
        {"method": "uniform", "rnak": 2}, TypeError,
        "rnak must be a parameter of method 'uniform', got 'rnak'; did you mean 'rank'?",
    ),
    "parameter beside an object": (
        {"method": sa.UniformColumns(2), "rank": 3}, ValueError,
        "parameters must be given to the method object itself, got ['rank'] beside "
        "UniformColumns(rank=2); use set_params",
    ),
    "no rank": (
        {"method": "uniform"}, TypeError, "rank must be given for method 'uniform', got none; "
        "pass rank=",
    ),
    "rank too large": (
        {"method": "uniform", "rank": 6}, ValueError,
        "rank must be between 1 and n_k = 5, got 6; lower rank or use method='exact'",
    ),
    "rank too small": (
        {"method": "topk", "rank": 0}, ValueError,
        "rank must be between 1 and n_k = 5, got 0; raise rank or use method='exact'",
    ),
    "rank type": (
        {"method": "svd", "rank": 2.0}, TypeError,
        "rank must be an integer, got float; give one in 1..n_k = 5",
    ),
    "attn_mask": (
        {**UNIFORM, "attn_mask": np.ones((5, 5), bool)}, ValueError,
        "attn_mask must be None for method 'uniform', which cannot honour it, got an array; "
        "use method='exact'",
    ),
    "offset": (
        {**UNIFORM, "offset": 0}, ValueError,
        "offset must be None for method 'uniform', which cannot honour it, got 0; "
        "use method='exact'",
    ),
    "softcap": (
        {**UNIFORM, "softcap": 30.0}, ValueError,
        "softcap must be 0 for method 'uniform', which cannot honour it, got 30.0; "
        "use method='exact'",
    ),
    "window": (
        {**UNIFORM, "window": [4, -1]}, ValueError,
        "window must be (-1, -1) for method 'uniform', which cannot honour it, got (4, -1); "
        "use method='exact'",
    ),
    "sink": (
        {**UNIFORM, "sink": np.zeros(4)}, ValueError,
        "sink must be None for method 'uniform', which cannot honour it, got an array; "
        "use method='exact'",
    ),
    "return_lse": (
        {"method": "svd", "rank": 2, "return_lse": True}, ValueError,
        "return_lse must be False for method 'svd', which does not know the normaliser of its "
        "rows, got True; use a method whose traits.logsumexp is True",
    ),
    "causal": (
        {"method": "svd", "rank": 2, "causal": True}, ValueError,
        "causal must be False for method 'svd', which sees all keys, got True; "
        "use a method whose traits.causal is True",
    ),
    "causal of a method object": (
        {"method": Plain(), "causal": "top-left"}, ValueError,
        "causal must be False for method 'plain', which sees all keys, got 'top-left'; "
        "use a method whose traits.causal is True",
    ),
    "key mask": (
        {"method": Plain(), "key_mask": np.ones(5, bool)}, ValueError,
        "key_mask must be None for method 'plain', got a mask; delete the masked keys first",
    ),
    "rng": (
        {**UNIFORM, "rng": -1}, ValueError,
        "rng must be at least 0, got -1; give a non-negative seed",
    ),
    "rng type": (
        {**UNIFORM, "rng": 1.0}, TypeError,
        "rng must be None, an integer or a numpy.random.Generator, got float; "
        "use numpy.random.default_rng",
    ),
    "rng of the old kind": (
        {**UNIFORM, "rng": np.random.RandomState(0)}, TypeError,
        "rng must be None, an integer or a numpy.random.Generator, got RandomState; "
        "use numpy.random.default_rng",
    ),
    "rng bool": (
        {**UNIFORM, "rng": True}, TypeError,
        "rng must be None, an integer or a numpy.random.Generator, got bool; "
        "use numpy.random.default_rng",
    ),
    "rng and draw": (
        {**UNIFORM, "rng": 0, "draw": {"columns": [0, 1]}}, ValueError,
        "rng must be None when draw is given, got both; pass one of them",
    ),
    "draw type": (
        {**UNIFORM, "draw": [0, 1]}, TypeError,
        "draw must be a mapping from names to arrays, got list; use method.draw(problem, rng)",
    ),
    "draw names": (
        {**UNIFORM, "draw": {"rows": [0, 1]}}, ValueError,
        "draw must hold the arrays ['columns'], got ['rows']; use method.draw(problem, rng)",
    ),
    "draw size": (
        {**UNIFORM, "draw": {"columns": [0, 1, 2]}}, ValueError,
        "columns must hold 2 keys for rank = 2, got 3; change rank or the draw",
    ),
    "draw range": (
        {**UNIFORM, "draw": {"columns": [0, 5]}}, ValueError,
        "columns must be indices of visible keys, got 5; "
        "draw from the 5 keys that are not masked",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ARRAYS)
def test_refused_arrays(case: str) -> None:
    given, options, error, text = ARRAYS[case]
    for method in ({}, {"method": "vmean"}):
        with pytest.raises(error, match=exactly(text)):
            attention(*given, **method, **options)


@pytest.mark.parametrize("case", CALLS)
def test_refused_options(case: str) -> None:
    options, error, text = CALLS[case]
    with pytest.raises(error, match=exactly(text)):
        attention(X, X, X, **options)


@pytest.mark.parametrize("case", METHODS)
def test_refused_methods(case: str) -> None:
    options, error, text = METHODS[case]
    with pytest.raises(error, match=exactly(text)):
        attention(X, X, X, **options)


def test_the_causal_refusal_names_both_alignments() -> None:
    text = (
        "causal=True must have n_q = n_k, got n_q = 4 and n_k = 5; name the alignment: "
        "causal='top-left' or causal='bottom-right'"
    )
    with pytest.raises(ValueError, match=exactly(text)):
        attention(X[:, :, :4], X, X, causal=True)


def test_rectangles_are_refused_by_a_method_that_cannot() -> None:
    text = (
        "n_q and n_k must be equal for method 'plain', got 4 and 5; "
        "use a method whose traits.rectangular is True"
    )
    with pytest.raises(ValueError, match=exactly(text)):
        attention(X[:, :, :4], X, X, Plain())


@pytest.mark.parametrize(("name", "which"), [("k", 1), ("v", 2)])
def test_approximations_refuse_visible_values_before_any_work(
    name: str, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("work began")

    monkeypatch.setattr(sa.UniformColumns, "approximate", never)
    keep = np.ones((2, 5), bool)
    keep[0, 3] = False
    given = [X, X, X]
    given[which] = with_entry((1, 2, 3, 0), NAN)
    given[which][0, :, 3] = INF  # hidden
    text = f"{name} must be finite, got nan at index (1, 2, 3, 0); "
    with pytest.raises(ValueError, match="^" + re.escape(text)):
        attention(*given, "uniform", rank=2, rng=0, key_mask=keep)
    with pytest.raises(
        ValueError, match=re.escape(f"{name} must be finite, got inf at index (0, ")
    ):
        attention(*given, "uniform", rank=2, rng=0)


def test_what_the_tables_change_is_what_is_refused() -> None:
    assert attention(X, X, X).shape == X.shape
    assert attention(X, X, X, **UNIFORM, rng=0).shape == X.shape
    assert attention(X, X, X, Plain()).shape == X.shape


def test_arguments_of_other_libraries_are_pointed_to_ours() -> None:
    x = np.ones((3, 2))
    text = (
        "is_causal must be given as causal, got is_causal=True; pass causal=True, or 'top-left' or "
        "'bottom-right' where n_q != n_k"
    )
    more: dict[str, Any] = {"is_causal": True}
    for method in ("exact", "uniform"):
        with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
            sa.attention(x, x, x, method, **more)
    text = (
        "dropout_p must be left out, got 0.0; there is no dropout here, weights are those of "
        "inference"
    )
    more = {"dropout_p": 0.0}
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        sa.attention(x, x, x, **more)
