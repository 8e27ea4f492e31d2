"""Gradients of exact attention: against differences, loops and another library's."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from naive import naive_vjp
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn.kernels._threads import limit_threads

Array = NDArray[Any]

INF = float("inf")
NAN = float("nan")

# name: heads of q and k, rows, keys, d, d_v, and the options of the call
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "plain": ((2, 2, 5, 7, 4, 3), {}),
    "scale 0": ((1, 1, 4, 6, 3, 2), {"scale": 0.0}),
    "top-left": ((2, 2, 6, 9, 4, 3), {"causal": "top-left"}),
    "bottom-right": ((2, 2, 9, 6, 4, 3), {"causal": "bottom-right"}),
    "offset": ((2, 2, 6, 6, 4, 3), {"causal": True, "offset": -2}),
    "window": ((1, 1, 8, 8, 4, 3), {"window": (2, 1)}),
    "key_mask": ((2, 2, 5, 7, 4, 3), {"key_mask": "random"}),
    "bool": ((2, 2, 5, 7, 4, 3), {"attn_mask": "bool"}),
    "bias": ((2, 2, 5, 7, 4, 3), {"attn_mask": "bias"}),
    "softcap": ((2, 2, 5, 7, 4, 3), {"softcap": 0.8}),
    "sink": ((2, 2, 5, 7, 4, 3), {"sink": "random"}),
    "grouped": ((6, 2, 5, 7, 4, 3), {"enable_gqa": True}),
    "all": (
        (4, 2, 7, 9, 4, 3),
        {
            "enable_gqa": True,
            "sink": "random",
            "softcap": 1.5,
            "attn_mask": "bias",
            "key_mask": "random",
            "causal": "bottom-right",
            "window": (4, 2),
            "scale": 0.7,
        },
    ),
}


def make(name: str, seed: int = 0) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
    """Return q, k, v, a cotangent and the options of a case: 2 batch entries."""
    (h, h_kv, n_q, n_k, d, d_v), given = CASES[name]
    rng = np.random.default_rng(seed)
    q, g = rng.standard_normal((2, h, n_q, d)), rng.standard_normal((2, h, n_q, d_v))
    k, v = rng.standard_normal((2, h_kv, n_k, d)), rng.standard_normal((2, h_kv, n_k, d_v))
    options = dict(given)
    if "key_mask" in options:
        options["key_mask"] = rng.random((2, n_k)) < 0.7
    mask = options.get("attn_mask")
    if mask == "bool":
        options["attn_mask"] = rng.random((h, n_q, n_k)) < 0.6
        options["attn_mask"][0, 1] = False  # a row that sees no key
    if mask == "bias":
        bias = rng.standard_normal((h, n_q, n_k))
        bias[rng.random(bias.shape) < 0.3] = -INF
        bias[-1, 2] = -INF
        options["attn_mask"] = bias
    if "sink" in options:
        options["sink"] = rng.standard_normal(h)
    return q, k, v, g, options


def extras(options: dict[str, Any]) -> dict[str, Any]:
    """Return the flags for every gradient there is."""
    mask = options.get("attn_mask")
    return {
        "return_bias": mask is not None and mask.dtype != np.bool_,
        "return_sink": "sink" in options,
    }


def by_loops(q: Array, k: Array, v: Array, g: Array, options: dict[str, Any]) -> list[Array]:
    """Return dq, dk, dv, and dbias and dsink where there are any, by ``naive_vjp``."""
    heads, n_q, n_k = q.shape[1], q.shape[2], k.shape[2]
    group = heads // k.shape[1]
    left, right = (None if x == -1 else x for x in options.get("window", (-1, -1)))
    first = 0
    if options.get("causal"):
        right = 0 if right is None else min(right, 0)
        first = n_k - n_q if options["causal"] == "bottom-right" else 0
    first = options.get("offset", first)
    mask, keys, sink = (options.get(x) for x in ("attn_mask", "key_mask", "sink"))
    d_q, d_k, d_v = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    d_bias, d_sink = np.zeros((heads, n_q, n_k)), np.zeros(heads)
    for b, h in np.ndindex(len(q), heads):
        of = h // group
        found = naive_vjp(
            q[b, h], k[b, of], v[b, of], g[b, h],
            scale=options.get("scale", q.shape[3] ** -0.5),
            softcap=options.get("softcap", 0.0),
            sink=None if sink is None else float(sink[h]),
            first=first, left=left, right=right,
            key_mask=None if keys is None else keys[b],
            mask=None if mask is None else mask[h],
        )  # fmt: skip
        d_q[b, h] = found[0]
        d_k[b, of] += found[1]
        d_v[b, of] += found[2]
        d_bias[h] += found[3]
        d_sink[h] += found[4]
    wanted = extras(options)
    more = [d_bias] * wanted["return_bias"] + [d_sink] * wanted["return_sink"]
    return [d_q, d_k, d_v, *more]


@pytest.mark.interpreted
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("grade", [None, np.float64])
def test_gradients_are_those_of_loops(name: str, grade: Any) -> None:
    q, k, v, g, options = make(name)
    wanted = by_loops(q, k, v, g, options)
    found = sa.attention_vjp(q, k, v, g, compute_dtype=grade, **options, **extras(options))
    assert len(found) == len(wanted)
    for x, y in zip(found, wanted, strict=True):
        # Every entry is a sum of at most 1000 terms below 10, each with a few roundings.
        np.testing.assert_allclose(x, y, rtol=0, atol=1000 * 10 * 2.0**-53)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_central_differences(name: str) -> None:
    q, k, v, g, options = make(name, seed=1)

    def value(moved: dict[str, Array]) -> float:
        given: dict[str, Any] = {"q": q, "k": k, "v": v, **options, **moved}
        return float((g * sa.attention(compute_dtype=np.float64, **given)).sum())

    names = ["q", "k", "v"]
    wanted = extras(options)
    names += ["attn_mask"] * wanted["return_bias"] + ["sink"] * wanted["return_sink"]
    found = sa.attention_vjp(q, k, v, g, compute_dtype=np.float64, **options, **wanted)
    rng, step = np.random.default_rng(2), 1e-5
    for label, gradient in zip(names, found, strict=True):
        x = {"q": q, "k": k, "v": v, **options}[label]
        for _ in range(3):
            way = rng.standard_normal(x.shape)
            up, down = (value({label: x + sign * step * way}) for sign in (1, -1))
            finite = np.where(np.isfinite(x), way, 0.0)
            # Truncation step^2 f'''/6 of about 1e-10 times 10, rounding 1e-16 * 100 / step.
            assert (up - down) / (2 * step) == pytest.approx((gradient * finite).sum(), abs=1e-8)


@pytest.mark.interpreted
@pytest.mark.parametrize("grade", [None, np.float64])
@pytest.mark.parametrize(
    "shape",
    [(), (1,), (7,), (5, 1), (1, 7), (1, 1, 7), (6, 5, 7), (2, 1, 5, 7), (1, 6, 1, 1), "expanded"],
)
def test_a_bias_gradient_has_the_shape_of_the_mask(shape: Any, grade: Any) -> None:
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((2, h, n, 4)) for h, n in ((6, 5), (2, 7), (2, 7)))
    g = rng.standard_normal((2, 6, 5, 4))
    if shape == "expanded":
        bias: Array = np.broadcast_to(rng.standard_normal((6, 1, 7)), (2, 6, 5, 7))
    else:
        bias = rng.standard_normal(shape)
    options: dict[str, Any] = {"enable_gqa": True, "return_bias": True, "compute_dtype": grade}
    full = sa.attention_vjp(
        q, k, v, g, attn_mask=np.broadcast_to(bias, (2, 6, 5, 7)).copy(), **options
    )[3]
    found = sa.attention_vjp(q, k, v, g, attn_mask=bias, **options)[3]
    assert found.shape == bias.shape
    padded = (1,) * (4 - bias.ndim) + bias.shape
    axes = tuple(a for a in range(4) if padded[a] == 1)
    summed = full.sum(axis=axes, keepdims=True).reshape(bias.shape)
    np.testing.assert_allclose(found, summed, rtol=0, atol=1e-13)  # 420 terms below 3


def test_what_is_hidden_does_not_reach_a_gradient() -> None:
    q, k, v, g, options = make("all", seed=4)
    calls: dict[str, Any] = {**options, **extras(options)}
    clean = sa.attention_vjp(q, k, v, g, compute_dtype=np.float64, **calls)
    hidden = ~options["key_mask"]
    assert hidden.any()
    dirty_k, dirty_v = k.copy(), v.copy()
    dirty_k.transpose(0, 2, 1, 3)[hidden] = NAN
    dirty_v.transpose(0, 2, 1, 3)[hidden] = INF
    for grade in (None, np.float64):
        found = sa.attention_vjp(q, dirty_k, dirty_v, g, compute_dtype=grade, **calls)
        for x, y in zip(found, clean, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_not_finite_reaches_the_rows_that_see_it(dtype: Any) -> None:
    rng = np.random.default_rng(5)
    q, k, v, g = (rng.standard_normal((1, 6, 4)).astype(dtype) for _ in range(4))
    clean = sa.attention_vjp(q, k, v, g, causal=True)
    v[0, 3, 1] = NAN  # seen by rows 3, 4 and 5, whose keys are 0 to 5
    dq, dk, dv = sa.attention_vjp(q, k, v, g, causal=True)
    np.testing.assert_allclose(dq[0, :3], clean[0][0, :3], rtol=1e-4, atol=1e-6)
    assert np.isnan(dq[0, 3:]).all()
    assert np.isnan(dk).all()
    np.testing.assert_allclose(dv, clean[2], rtol=1e-4, atol=1e-6)
    v[0, 3, 1] = 0.0
    g[0, 2] = INF  # a row that sees keys 0, 1 and 2
    dq, dk, dv = sa.attention_vjp(q, k, v, g, causal=True)
    assert np.isnan(dq[0, 2]).all()
    assert np.isfinite(dq[0, [0, 1, 3, 4, 5]]).all()
    assert np.isnan(dk[0, :3]).all()
    assert np.isfinite(dk[0, 3:]).all()
    assert (dv[0, :3] == INF).all()
    assert np.isfinite(dv[0, 3:]).all()


@pytest.mark.parametrize("grade", [None, np.float64])
@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (0, 0)])
def test_no_queries_or_no_keys(sizes: tuple[int, int], grade: Any) -> None:
    n_q, n_k = sizes
    q, k, v, g = (np.ones((2, n, m)) for n, m in ((n_q, 4), (n_k, 4), (n_k, 3), (n_q, 3)))
    found = sa.attention_vjp(q, k, v, g, compute_dtype=grade)
    assert [x.shape for x in found] == [q.shape, k.shape, v.shape]
    assert not any(x.any() for x in found)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_gradients_have_the_dtypes_of_their_arguments(dtype: Any) -> None:
    q, k, v, g, options = make("all")
    half = [x.astype(dtype) for x in (q, k, v, g)]
    options["attn_mask"] = options["attn_mask"].astype(np.float16)
    options["sink"] = options["sink"].astype(np.float64)
    found = sa.attention_vjp(*half, **options, return_bias=True, return_sink=True)
    assert [x.dtype for x in found] == [dtype, dtype, dtype, np.float16, np.float64]
    wide = [x.astype(np.float64) for x in half]
    exact = sa.attention_vjp(*wide, **options, return_bias=True, return_sink=True)
    for x, y in zip(found, exact, strict=True):
        unit = 2.0**-8 if x.dtype.name == "bfloat16" else 2.0**-11 if x.itemsize == 2 else 0.0
        slack = max(unit, 1e-5) * np.abs(y).max()  # one rounding, or 100 of float32
        np.testing.assert_allclose(x.astype(np.float64), y, rtol=0, atol=slack)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cotangent": np.ones((2, 5, 4))}, r"cotangent must have the shape \(2, 5, 3\)"),
        ({"cotangent": np.ones((2, 5, 3), int)}, "cotangent must be float16, bfloat16"),
        ({"return_bias": True}, "return_bias must be False without attn_mask"),
        ({"return_sink": True}, "return_sink must be False without sink"),
        ({"return_bias": 1}, "return_bias must be a bool"),
        (
            {"return_bias": True, "attn_mask": np.ones((5, 6), bool)},
            "attn_mask must be floating point for return_bias=True, got bool",
        ),
        ({"causal": True}, "top-left"),
        ({"q": np.full((2, 5, 4), NAN)}, "q must be finite"),
        ({"v": np.full((2, 6, 3), NAN)}, "v must be finite"),
        ({"q": np.full((2, 5, 4), 1e300), "k": np.full((2, 6, 4), 1e300)}, "overflow"),
    ],
)
@pytest.mark.parametrize("grade", [None, np.float64])
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str, grade: Any) -> None:
    given = {
        "q": np.ones((2, 5, 4)),
        "k": np.ones((2, 6, 4)),
        "v": np.ones((2, 6, 3)),
        "cotangent": np.ones((2, 5, 3)),
    }
    with pytest.raises((ValueError, TypeError), match=message):
        sa.attention_vjp(**{**given, **change}, compute_dtype=grade)


def test_inputs_are_not_written_and_any_strides_will_do() -> None:
    q, k, v, g, options = make("all")
    wanted = sa.attention_vjp(q, k, v, g, **options)
    turned = [np.asfortranarray(x)[:, :, ::-1][:, :, ::-1] for x in (q, k, v, g)]
    for x in turned:
        x.flags.writeable = False
    for x, y in zip(sa.attention_vjp(*turned, **options), wanted, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.threads
@pytest.mark.parametrize("grade", [None, np.float64])
@pytest.mark.parametrize("heads", [1, 3])
def test_the_bits_do_not_depend_on_the_threads(heads: int, grade: Any) -> None:
    rng = np.random.default_rng(6)
    q, k, v, g = (rng.standard_normal((heads, 700, 16)) for _ in range(4))
    bias = rng.standard_normal((700, 700))
    found = []
    for count in (1, 2, 3):
        with limit_threads(count):
            found.append(
                sa.attention_vjp(
                    q, k, v, g, causal=True, attn_mask=bias, return_bias=True, compute_dtype=grade
                )
            )
    for other in found[1:]:
        for x, y in zip(other, found[0], strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("size", [1e4, 1e8, 1e16])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_logits_have_the_gradients_of_float64(size: float, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    q, k, v, g = (rng.standard_normal((2, 24, 4)).astype(dtype) for _ in range(4))
    k[:, 1::2] = k[:, ::2]  # equal keys share their weight, whatever the logits
    found = sa.attention_vjp(dtype(size) * q, k, v, g, causal=True)
    wanted = sa.attention_vjp(dtype(size) * q, k, v, g, causal=True, compute_dtype=np.float64)
    for x, y in zip(found, wanted, strict=True):
        # Once rounded; sums of at most 24 terms, each below the largest.
        assert np.abs(x - y).max() <= 24 * np.finfo(dtype).eps * np.abs(y).max()
