"""Attention in JAX programs: the numbers and gradients of JAX's own, and methods beside it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from naive import naive_attention
from numpy.typing import NDArray
from packaging_checks import ROOT

import sketchattn as sa

pytest.importorskip("jax")

from sketchattn.integrations import jax as room
from sketchattn.integrations.jax import dot_product_attention as ours
from sketchattn.integrations.jax import jax, jnp

Array = NDArray[Any]
Attention = Callable[..., Any]
Heads = tuple[Any, Any, Any]

B, N_Q, N_K, H, H_KV, D = 2, 5, 7, 6, 2, 8
RNG = np.random.default_rng(0)
Q = RNG.standard_normal((B, N_Q, H, D))
K, V = RNG.standard_normal((2, B, N_K, H_KV, D))
G = RNG.standard_normal((B, N_Q, H, D))  # cotangent
BIAS = RNG.standard_normal((1, H, N_Q, N_K))
MASK = RNG.random((B, 1, N_Q, N_K)) < 0.5
MASK[0, 0, 1] = False  # a row that sees no key, in every head

# What each call adds to query, key and value.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.7},
    "causal": {"is_causal": True},
    "mask": {"mask": MASK},
    "mask of two axes": {"mask": MASK[0, 0]},
    "bias": {"bias": BIAS},
    "bias of one row, and mask": {"bias": BIAS[:, :, :1], "mask": MASK},
    "lengths": {"query_seq_lengths": [3, 5], "key_value_seq_lengths": [4, 0]},
    "window": {"local_window_size": 1},
    "window to one side": {"local_window_size": (0, 2), "is_causal": True},
    "rows without a key by a window": {"local_window_size": 0, "key_value_seq_lengths": [3, 7]},
}
every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def arguments(dtype: Any, **options: Any) -> tuple[Heads, dict[str, Any]]:
    """Return query, key and value, and the options, as arrays of JAX."""
    made = {
        name: jnp.asarray(x, np.int32)
        if "lengths" in name
        else jnp.asarray(x, dtype if name == "bias" else None)
        if name in ("bias", "mask")
        else x
        for name, x in options.items()
    }
    return (jnp.asarray(Q, dtype), jnp.asarray(K, dtype), jnp.asarray(V, dtype)), made


def plain(q: Any, k: Any, v: Any, bias: Any, o: dict[str, Any]) -> tuple[Any, Any]:
    """Return output and logsumexp by the formula, with masks as JAX documents them."""
    batch, n_q, n_k = q.shape[0], q.shape[1], k.shape[1]
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = jnp.einsum("bthd,bshd->bhts", q, k) * o.get("scale", q.shape[3] ** -0.5)
    logits = logits if bias is None else logits + bias
    i, j = jnp.arange(n_q)[:, None], jnp.arange(n_k)
    seen = jnp.ones((batch, 1, n_q, n_k), bool) & o.get("mask", True)
    seen &= (j <= i) | (not o.get("is_causal", False))
    size = o.get("local_window_size", n_q + n_k)
    left, right = size if isinstance(size, tuple) else (size, size)
    seen &= (i - left <= j) & (j <= i + right)
    rows = i[:, 0] < jnp.reshape(o.get("query_seq_lengths", jnp.full(batch, n_q)), (-1, 1))
    keys = j < jnp.reshape(o.get("key_value_seq_lengths", jnp.full(batch, n_k)), (-1, 1))
    seen = seen & rows[:, None, :, None] & keys[:, None, None, :]
    weights = jax.nn.softmax(jnp.where(seen, logits, -1e300 if q.dtype == np.float64 else -1e38))
    out = jnp.einsum("bhts,bshd->bthd", weights, v) * rows[:, :, None, None]
    lse = jax.nn.logsumexp(jnp.where(seen, logits, -jnp.inf), axis=-1)
    return out, jnp.swapaxes(lse, 1, 2)


def roundings(dtype: Any) -> float:
    """Return how far a weight may be from its true value, relatively, in this precision.

    A logit carries d + 4 roundings of terms that add up to at most ``size``, so that exp and the
    sum of exponentials are off by twice that; sums over keys and products add 2 n_k + 2 d + 12.
    """
    repeated = np.repeat(np.abs(K), H // H_KV, axis=2)
    logits = np.einsum("bthd,bshd->bhts", np.abs(Q), repeated)
    size = 0.7 * logits.max() + np.abs(BIAS).max()  # the largest scale of the cases
    return float((2 * (D + 4) * size + 2 * N_K + 2 * D + 12) * np.finfo(dtype).eps / 2)


def output_bound(dtype: Any) -> float:
    return float(roundings(dtype) * np.abs(V).max())


def gradient_bound(dtype: Any) -> float:
    """Return the same for the gradients.

    ``|dL_ij| <= 2 A_ij max |G_i . v_j|``, and the weights of a query sum to 1: dQ is no larger than
    that times ``scale |K|``; n_q rows of every query head of a group add up in the others.
    """
    values = np.abs(G).max(axis=(0, 1, 2)) @ np.abs(V).max(axis=(0, 1, 2))
    factor = max(0.7 * np.abs(Q).max(), 0.7 * np.abs(K).max(), 1.0)
    return float(roundings(dtype) * 2 * values * factor * N_Q * (H // H_KV))


def gradients(
    f: Attention, tensors: tuple[Any, ...], bias: Any, options: dict[str, Any], g: Any = G
) -> Any:
    """Return those of ``sum(g * output)`` by query, key, value and, if there is one, bias."""

    def total(q: Any, k: Any, v: Any, bias: Any) -> Any:
        return (f(q, k, v, bias, **options) * jnp.asarray(g, q.dtype)).sum()

    wanted = (0, 1, 2) if bias is None else (0, 1, 2, 3)
    return jax.grad(total, wanted)(*tensors, bias)


def agrees_with_jax(f: Attention, name: str) -> None:
    """Assert that a function returns what JAX's own does, in float32: output, residual, gradients.

    Each of the two may be off by the bounds.
    """
    tensors, options = arguments(np.float32, **CASES[name])
    theirs = jax.nn.dot_product_attention
    got = f(*tensors, return_residual=True, **options)
    want = theirs(*tensors, return_residual=True, **options)
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in want]
    assert np.abs(got[0] - want[0]).max() <= 2 * output_bound(np.float32)
    lse = np.asarray(want[1], np.float64)
    assert np.array_equal(got[1] < -1e38, lse < -1e38)
    off = np.abs(np.asarray(got[1], np.float64) - lse) / np.maximum(np.abs(lse), 1)
    assert off.max() <= 2 * roundings(np.float32)
    bias = options.pop("bias", None)
    pairs = zip(
        gradients(f, tensors, bias, options), gradients(theirs, tensors, bias, options), strict=True
    )
    for x, y in pairs:
        assert x.shape == y.shape
        assert np.abs(x - y).max() <= 2 * gradient_bound(np.float32)


# --- exact, beside JAX's own ----------------------------------------------------------------------


@every_case
def test_output_residual_and_gradients_are_those_of_jax(name: str) -> None:
    agrees_with_jax(ours, name)


WRONG: dict[str, tuple[str, Callable[..., Any]]] = {
    # The case that sees it, and what is changed before the right function is called.
    "mask ignored": ("mask", lambda o: o | {"mask": None}),
    "mask inverted": ("mask", lambda o: o | {"mask": ~o["mask"]}),
    "bias ignored": ("bias", lambda o: o | {"bias": None}),
    "bias twice": ("bias", lambda o: o | {"bias": 2 * o["bias"]}),
    "causal ignored": ("causal", lambda o: o | {"is_causal": False}),
    "keys not hidden": ("lengths", lambda o: o | {"key_value_seq_lengths": None}),
    "rows not hidden": ("lengths", lambda o: o | {"query_seq_lengths": None}),
    "window to the left only": ("window", lambda o: o | {"local_window_size": (1, 0)}),
    "window ignored": ("window to one side", lambda o: o | {"local_window_size": None}),
    "scale 1 % off": ("plain", lambda o: o | {"scale": 1.01 * D**-0.5}),
}


@pytest.mark.parametrize("mutant", WRONG)
def test_a_wrong_option_is_seen(mutant: str) -> None:
    name, change = WRONG[mutant]

    def wrong(q: Any, k: Any, v: Any, bias: Any = None, **o: Any) -> Any:
        return ours(q, k, v, **change({"bias": bias} | o))

    with pytest.raises(AssertionError):
        agrees_with_jax(wrong, name)


def test_wrong_heads_rows_without_a_key_and_gradients_are_seen() -> None:
    def tiled(q: Any, k: Any, v: Any, bias: Any = None, **o: Any) -> Any:
        k, v = (jnp.tile(x, (1, 1, H // H_KV, 1)) for x in (k, v))
        return ours(q, k, v, bias, **o)

    def zeros(q: Any, k: Any, v: Any, bias: Any = None, **o: Any) -> Any:
        found = ours(q, k, v, bias, **o)
        empty = ~jnp.any(o["mask"], axis=-1)[:, 0, :, None, None]
        if not o.get("return_residual"):
            return jnp.where(empty, 0, found)
        return jnp.where(empty, 0, found[0]), found[1]

    def detached(q: Any, k: Any, v: Any, bias: Any = None, **o: Any) -> Any:
        return ours(q, jax.lax.stop_gradient(k), v, bias, **o)

    for wrong, name in ((tiled, "plain"), (zeros, "mask"), (detached, "causal")):
        with pytest.raises(AssertionError):
            agrees_with_jax(wrong, name)


@every_case
@pytest.mark.usefixtures("x64")
def test_double_precision_is_that_of_the_formula(name: str) -> None:
    # JAX's own takes its softmax in float32 whatever the inputs are.
    tensors, options = arguments(np.float64, **CASES[name])
    got, residual = ours(*tensors, return_residual=True, **options)
    bias = options.pop("bias", None)
    want, lse = plain(*tensors, bias, options)
    assert got.dtype == np.float64
    assert np.abs(got - want).max() <= 2 * output_bound(np.float64)
    some = np.isfinite(lse)
    assert np.array_equal(residual[~some], np.full((~some).sum(), room.HIDDEN))
    off = np.abs(residual - lse)[some] / np.maximum(np.abs(lse[some]), 1)
    assert off.max() <= 2 * roundings(np.float64)

    def formula(q: Any, k: Any, v: Any, bias: Any = None, **o: Any) -> Any:
        return plain(q, k, v, bias, o)[0]

    pairs = zip(
        gradients(ours, tensors, bias, options),
        gradients(formula, tensors, bias, options),
        strict=True,
    )
    for x, y in pairs:
        assert np.abs(x - y).max() <= 2 * gradient_bound(np.float64)


def test_the_formula_of_the_test_is_that_of_the_loops() -> None:
    with jax.enable_x64(True):
        tensors, options = arguments(np.float64, **CASES["bias of one row, and mask"])
        out, lse = (np.asarray(x) for x in plain(*tensors, options.pop("bias"), options))
    for b, h in ((0, 0), (0, 5), (1, 3)):
        bias = np.where(MASK[b, 0], BIAS[0, h, :1], -np.inf)
        head = Q[b, :, h], K[b, :, h // 3], V[b, :, h // 3]
        _, rows, sums = naive_attention(*head, scale=D**-0.5, mask=bias)
        some = np.isfinite(sums)
        assert np.abs(out[b, some, h] - rows[some]).max() < 1e-13
        assert np.abs(lse[b, some, h] - sums[some]).max() < 1e-13


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_halves_are_rounded_once(kind: str) -> None:
    tensors, _ = arguments(jnp.dtype(kind))
    wide = [np.asarray(x, np.float64) for x in tensors]
    q, k, v = (np.swapaxes(x, 1, 2) for x in wide)
    want = np.swapaxes(sa.attention(q, k, v, causal="top-left", enable_gqa=True), 1, 2)
    got = ours(*tensors, is_causal=True)
    assert got.dtype == kind
    half = float(jnp.finfo(kind).eps) / 2
    assert np.all(
        np.abs(np.asarray(got, np.float64) - want)
        <= half * np.abs(want) + (1 + half) * output_bound(np.float32) + 2.0**-24
    )
    g = jnp.asarray(G, kind)
    found = gradients(ours, tensors, None, {"is_causal": True}, g)
    exact = gradients(
        ours, tuple(x.astype(np.float32) for x in tensors), None, {"is_causal": True}, g
    )
    for x, y in zip(found, exact, strict=True):
        assert x.dtype == kind
        off = np.abs(np.asarray(x, np.float64) - y)
        assert np.all(off <= half * np.abs(y) + gradient_bound(np.float32) + 2.0**-24)


def test_three_axes_are_one_batch_entry_and_values_may_be_wider() -> None:
    tensors, _ = arguments(np.float32)
    q, k, v = (x[0] for x in tensors)
    wide = jnp.concatenate([v, v[..., :3]], axis=-1)
    out, lse = ours(q, k, wide, is_causal=True, return_residual=True)
    assert (out.shape, lse.shape) == ((N_Q, H, D + 3), (N_Q, H))
    whole, sums = ours(*tensors, is_causal=True, return_residual=True)
    assert np.array_equal(lse, sums[0])
    assert np.abs(out[..., :D] - whole[0]).max() <= 2 * output_bound(np.float32)
    assert np.array_equal(out[..., D:], out[..., :3])


def test_what_is_in_a_row_or_key_that_is_not_there_does_not_matter() -> None:
    tensors, options = arguments(np.float32, query_seq_lengths=[3, 5], key_value_seq_lengths=[4, 7])
    q, k, v = tensors
    want = ours(*tensors, **options), *gradients(ours, tensors, None, options)
    poisoned = q.at[0, 3:].set(jnp.nan), k.at[0, 4:].set(jnp.nan), v.at[0, 4:].set(jnp.nan)
    got = ours(*poisoned, **options), *gradients(ours, poisoned, None, options)
    for x, y in zip(got, want, strict=True):
        assert np.array_equal(x, y)


# --- transformations ------------------------------------------------------------------------------


def test_compiled_programs_return_the_same_bits() -> None:
    tensors, options = arguments(np.float32, **CASES["bias of one row, and mask"])
    bias = options.pop("bias")

    def both(q: Any, k: Any, v: Any, bias: Any) -> Any:
        return ours(q, k, v, bias, **options), gradients(ours, (q, k, v), bias, options)

    eager, compiled = both(*tensors, bias), jax.jit(both)(*tensors, bias)
    leaves = jax.tree_util.tree_leaves(eager), jax.tree_util.tree_leaves(compiled)
    assert all(np.array_equal(x, y) for x, y in zip(*leaves, strict=True))


def test_programs_are_compiled_once_for_equal_options_and_again_for_others() -> None:
    def plan(rank: Any, draw: Any = None, method: Any = "uniform") -> Any:
        fixed = None if draw is None else room._Fixed.draw(draw)
        chosen = room._Fixed.method(method, {"rank": rank})
        return room._Plan(1.0, False, (-1, -1), chosen, fixed)

    columns = np.arange(3)
    assert plan(3) == plan(3)
    assert hash(plan(3)) == hash(plan(3))
    assert plan(3, {"columns": columns}) == plan(3, {"columns": columns})
    different = [plan(4), plan(3.0), plan(np.array(3)), plan(3, method="jl")]
    different += [plan(3, {"columns": columns}), plan(3, {"columns": columns.copy()})]
    assert all(plan(3) != x for x in different)
    assert plan(3, {"columns": columns}) != plan(3, {"columns": columns.copy()})


def test_vmap_returns_what_each_entry_returns() -> None:
    tensors, options = arguments(np.float32, **CASES["bias of one row, and mask"])
    q, k, v = tensors
    bias, mask = options["bias"], options["mask"]
    many = jnp.stack([q, q[::-1], 0.5 * q])
    biases = jnp.stack([bias, -bias, 0 * bias])

    def f(q: Any, bias: Any) -> Any:
        return ours(q, k, v, bias, mask, return_residual=True)

    got = jax.vmap(f)(many, biases)
    want = [f(x, y) for x, y in zip(many, biases, strict=True)]
    for i in range(2):
        assert np.array_equal(got[i], jnp.stack([x[i] for x in want]))
    # Axes anywhere, twice, and operands without one.
    twice = jax.vmap(jax.vmap(f, (0, None)), (None, 3), 1)
    got = twice(many, jnp.stack([bias, -bias], axis=3))
    for i, j in np.ndindex(3, 2):
        assert np.array_equal(got[0][i, j], f(many[i], (-1) ** j * bias)[0])


def test_gradients_of_vmap_and_vmap_of_gradients() -> None:
    tensors, options = arguments(np.float32, **CASES["lengths"])
    q, k, v = tensors
    many = jnp.stack([q, 0.5 * q, -q])
    bias = jnp.asarray(BIAS, np.float32)

    def one(q: Any, k: Any, v: Any, bias: Any) -> Any:
        return (ours(q, k, v, bias, **options) * jnp.asarray(G, np.float32)).sum()

    def total(many: Any, k: Any, v: Any, bias: Any) -> Any:
        return jax.vmap(one, (0, None, None, None))(many, k, v, bias).sum()

    each = [jax.grad(one, (0, 1, 2, 3))(x, k, v, bias) for x in many]
    got = jax.grad(total, (0, 1, 2, 3))(many, k, v, bias)
    assert np.array_equal(got[0], jnp.stack([x[0] for x in each]))
    for i in (1, 2, 3):  # what the entries share has the sum of their gradients
        want = sum(np.asarray(x[i], np.float64) for x in each)
        size = max(np.abs(x[i]).max() for x in each)
        assert np.abs(got[i] - want).max() <= 6 * np.finfo(np.float32).eps * size
    mapped = jax.vmap(jax.grad(one, (0, 1, 2, 3)), (0, None, None, None))(many, k, v, bias)
    for i in range(4):
        assert np.array_equal(mapped[i], jnp.stack([x[i] for x in each]))


def test_the_residual_has_no_gradient() -> None:
    tensors, _ = arguments(np.float32)
    found = jax.grad(lambda q: ours(q, *tensors[1:], return_residual=True)[1].sum())(tensors[0])
    assert not found.any()


# --- methods --------------------------------------------------------------------------------------


def by_numpy(method: Any, rng: Any, tensors: tuple[Any, ...], **options: Any) -> Array:
    q, k, v = (np.swapaxes(np.asarray(x), -2, -3) for x in tensors)
    out = sa.attention(q, k, v, method, rng=rng, enable_gqa=True, **options)
    return np.swapaxes(out, -2, -3)


@pytest.mark.parametrize("method", ["skeinformer", "performer"])
def test_a_method_is_that_of_the_library(method: str) -> None:
    tensors, _ = arguments(np.float32)
    lengths = jnp.asarray([4, 0], np.int32)
    options: dict[str, Any] = {"method": method, "rank": 3, "key_value_seq_lengths": lengths}
    got = ours(*tensors, rng=5, **options)
    keys = np.arange(N_K) < np.asarray(lengths)[:, None]
    want = by_numpy(method, 5, tensors, rank=3, key_mask=keys)
    mean = np.repeat(V[1].mean(axis=0), H // H_KV, axis=0)
    assert np.array_equal(got[0], want[0])
    assert np.abs(got[1] - mean).max() < N_K * np.finfo(np.float32).eps * np.abs(V).max()
    found = gradients(ours, tensors, None, {"rng": 5, **options})
    assert np.array_equal(found[0][1], np.zeros((N_Q, H, D)))
    assert np.array_equal(found[1][1], np.zeros((N_K, H_KV, D)))
    each = np.repeat(G[1].reshape(N_Q, H_KV, -1, D).sum((0, 2))[None] / N_K, N_K, axis=0)
    assert np.abs(found[2][1] - each).max() < 30 * np.finfo(np.float32).eps * np.abs(each).max()


def test_seeds_keys_and_draws() -> None:
    tensors, _ = arguments(np.float32)
    base: dict[str, Any] = {"method": "uniform", "rank": 3}
    seeded = ours(*tensors, rng=2**40 + 7, **base)
    assert np.array_equal(seeded, by_numpy("uniform", 2**40 + 7, tensors, rank=3))
    key = jax.random.key(7)
    low, high = (int(x) for x in jax.random.key_data(key))
    want = by_numpy("uniform", low + (high << 32), tensors, rank=3)
    run = jax.jit(lambda rng, *x: ours(*x, rng=rng, **base))
    assert np.array_equal(run(key, *tensors), want)
    assert np.array_equal(run(jax.random.PRNGKey(7), *tensors), want)
    assert np.array_equal(run(jnp.int32(9), *tensors), by_numpy("uniform", 9, tensors, rank=3))
    keys = jax.random.split(key, 3)
    many = jax.vmap(run, (0, None, None, None))(keys, *tensors)
    assert all(np.array_equal(x, run(k, *tensors)) for x, k in zip(many, keys, strict=True))
    assert not np.array_equal(many[0], many[1])
    draw = {"columns": np.array([5, 0, 2])}
    got = ours(*tensors, method=sa.UniformColumns(rank=3), draw=draw)
    q, k, v = (np.swapaxes(np.asarray(x), 1, 2) for x in tensors)
    want = sa.attention(q, k, v, sa.UniformColumns(rank=3), draw=draw, enable_gqa=True)
    assert np.array_equal(got, np.swapaxes(want, 1, 2))


def test_entries_of_vmap_are_what_a_method_returns_for_each() -> None:
    tensors, _ = arguments(np.float32)
    many = jnp.stack([tensors[0], 0.5 * tensors[0]])

    def f(q: Any) -> Any:
        return ours(q, *tensors[1:], method="skeinformer", rank=3, rng=1)

    assert np.array_equal(jax.vmap(f)(many), jnp.stack([f(x) for x in many]))

    def slope(q: Any) -> Any:
        return jax.grad(lambda q: f(q).sum())(q)

    assert np.array_equal(jax.jit(jax.vmap(slope))(many), jnp.stack([slope(x) for x in many]))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", ["linformer", "performer"])
def test_gradients_of_a_method_are_differences_at_its_draw(method: str) -> None:
    # Draws that do not look at the inputs: the seed alone fixes them.
    tensors, _ = arguments(np.float64)
    g = jnp.asarray(G)

    def f(*x: Any, rng: int = 3) -> Any:
        return (ours(*x, method=method, rank=4, rng=rng) * g).sum()

    found = jax.grad(f, (0, 1, 2))(*tensors)
    # A central difference is off by h^2 / 6 of the third derivative and by eps / h of the value,
    # 1e-10 of their sizes each for h = 1e-5; f is a sum of B n_q h d numbers.
    h, size = 1e-5, float(jnp.abs(f(*tensors))) + B * N_Q * H * D
    for i in range(3):
        step = jnp.asarray(np.random.default_rng(i).standard_normal(tensors[i].shape))
        moved = [[*tensors[:i], tensors[i] + s * h * step, *tensors[i + 1 :]] for s in (1, -1)]
        slope = (f(*moved[0]) - f(*moved[1])) / (2 * h)
        assert abs(float(slope - (found[i] * step).sum())) < 1e-8 * size
        other = (f(*moved[0], rng=4) - f(*moved[1], rng=4)) / (2 * h)
        if i:  # another draw would be seen
            assert abs(float(other - slope)) > 1e-4


# --- refusals -------------------------------------------------------------------------------------

METHOD: dict[str, Any] = {"method": "skeinformer", "rank": 3, "rng": 0}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mask of numbers": ({"mask": np.ones((N_Q, N_K))}, "mask must be boolean"),
    "bias of booleans": ({"bias": MASK}, "bias must hold real numbers"),
    "shape of a mask": ({"mask": MASK[..., :2]}, r"broadcastable to .* \(2, 6, 5, 7\), got"),
    "lengths of the batch": ({"query_seq_lengths": [1]}, r"must have shape \(2,\), got \(1,\)"),
    "lengths in floats": ({"key_value_seq_lengths": [1.0, 2.0]}, "must hold integers"),
    "negative window": ({"local_window_size": (-1, 2)}, "local_window_size must be at least 0"),
    "three sides": ({"local_window_size": (1, 2, 3)}, "one or two integers"),
    "implementation": ({"implementation": "mosaic"}, "implementation must be None, 'xla' or"),
    "scale": ({"scale": np.inf}, "scale must be finite"),
    "causal": ({"is_causal": 1}, "is_causal must be a bool"),
    "parameters of exact": ({"rank": 3}, "rank"),
    "draw of exact": ({"draw": {}}, "draw must be None for method 'exact'"),
    "unknown method": ({"method": "skein"}, "method must be registered"),
    "unknown parameter": ({**METHOD, "ranks": 3}, "ranks must be a parameter"),
    "rank": ({**METHOD, "rank": 100}, "rank must be between 1 and n_k = 7"),
    "bias of a method": ({**METHOD, "bias": BIAS}, "bias must be left out for method 'skein"),
    "window of a method": ({**METHOD, "local_window_size": 0}, "local_window_size must be left"),
    "rows of a method": ({**METHOD, "query_seq_lengths": [1, 2]}, "query_seq_lengths must be left"),
    "residual of a method": ({**METHOD, "return_residual": True}, "return_residual must be left"),
    "causal method": ({"method": "linformer", "rank": 3, "rng": 0, "is_causal": True}, "causal"),
    "no seed": ({"method": "skeinformer", "rank": 3}, "rng must be given for method"),
    "negative seed": ({**METHOD, "rng": -1}, "rng must be at least 0"),
    "generator": ({**METHOD, "rng": np.random.default_rng(0)}, "rng must be an integer, a key"),
    "both": ({**METHOD, "draw": {}}, "rng must be None when draw is given"),
    "draw": ({**METHOD, "rng": None, "draw": 3}, "draw must be a mapping"),
    "dropout": ({"dropout_p": 0.1}, "dropout_p must be left out"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_do_not_fit_are_refused_in_one_line_while_traced(name: str) -> None:
    tensors, _ = arguments(np.float32)
    options, message = REFUSED[name]
    made = {x: jnp.asarray(y) if isinstance(y, np.ndarray | list) else y
            for x, y in options.items()}  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        jax.eval_shape(lambda *x: ours(*x, **made), *tensors)
    assert "\n" not in str(caught.value)


def test_arrays_that_do_not_fit_are_refused_in_one_line() -> None:
    (q, k, v), _ = arguments(np.float32)
    half = k.astype(np.float16)
    for arrays, message in (
        (
            (q.astype(np.int32), k, v),
            "query must be float16, bfloat16, float32 or float64, got int",
        ),
        ((q, half, v), "key must have the dtype float32 of query, got float16"),
        ((q[0, 0], k, v), "query must have shape"),
        ((q[:1], k, v), "key must have the batch and the width of query"),
        ((q[..., :3], k, v), "key must have the batch and the width of query"),
        ((q, k, v[:, 1:]), "value must have the batch, tokens and heads"),
        ((q[:, :, :5], k, v), "a number of heads that divides the 5 heads"),
    ):
        with pytest.raises((ValueError, TypeError), match=message) as caught:
            ours(*arrays)
        assert "\n" not in str(caught.value)
    traced = jax.jit(lambda x, scale: ours(x, x, x, scale=scale))
    with pytest.raises(TypeError, match="scale must be known when the program is traced"):
        traced(q, 0.5)


def test_gradients_that_do_not_exist_are_refused() -> None:
    tensors, _ = arguments(np.float32)

    def through(**options: Any) -> Any:
        return jax.grad(lambda q: ours(q, *tensors[1:], **options).sum())

    with pytest.raises(ValueError, match="method must be differentiable for a gradient, got"):
        through(method="topk", rank=3)(tensors[0])
    with pytest.raises(ValueError, match="must not be differentiated again"):
        jax.grad(lambda q: through()(q).sum())(tensors[0])


def test_values_that_do_not_fit_are_named_when_the_program_runs() -> None:
    tensors, _ = arguments(np.float32)
    poisoned = tensors[0].at[0, 0, 0, 0].set(jnp.nan)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"ValueError: q must be finite, got nan"):
        jax.block_until_ready(jax.jit(ours)(poisoned, *tensors[1:]))


def test_a_missing_package_is_one_line_with_the_command() -> None:
    code = "import sys; sys.modules['jax'] = None; import sketchattn.integrations.jax"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == (
        "ImportError: sketchattn.integrations.jax needs JAX, which is not installed; "
        "run: python -m pip install jax"
    )


def test_the_code_of_the_page_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "jax.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "text"]
    exec(blocks[0][1], {})
    # Digits of rounding errors, and the last ones of what they reach, are those of one machine.
    got, want = capsys.readouterr().out, blocks[1][1]
    number = r"\d[\d.]*(?:e-?\d+)?"
    assert re.sub(number, "x", got) == re.sub(number, "x", want)
    pairs = list(zip(*(map(float, re.findall(number, x)) for x in (got, want)), strict=True))
    assert pairs[0][0] < 2e-6
    assert all(x == pytest.approx(y, rel=0.1) for x, y in pairs[1:])
