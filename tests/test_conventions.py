"""Conventions: each record, and the function that computes it, beside the library itself."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn.functional.conventions import conventions_table

Array = NDArray[Any]

N_Q, N_K, D = 4, 6, 8
LOWEST = float(np.finfo(np.float32).min)
# float32 computed in another order: 8 products, 6 keys, values below 4.
CLOSE = 1e-5


def heads(
    h: int = 2, h_kv: int = 2, d_v: int = D, n_q: int = N_Q, batch: int = 2, seed: int = 0
) -> tuple[Array, Array, Array]:
    """Return q (B, h, n_q, d), k and v, in float32."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, h, n_q, D)).astype(np.float32)
    k = rng.standard_normal((batch, h_kv, N_K, D)).astype(np.float32)
    return q, k, rng.standard_normal((batch, h_kv, N_K, d_v)).astype(np.float32)


def turn(*arrays: Array) -> list[Array]:
    return [np.swapaxes(x, 1, 2) for x in arrays]


def wide(q: Array, k: Array, v: Array, **options: Any) -> Array:
    """Return our attention in reference grade."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out: Array = sa.attention(q, k, v, compute_dtype=np.float64, **options)
    return out


def first_row_hidden() -> Array:
    """Return a mask (n_q, n_k) whose row 1 sees nothing, and row 2 all but two keys."""
    mask = np.ones((N_Q, N_K), bool)
    mask[1] = False
    mask[2, [0, 3]] = False
    return mask


# --- the records ----------------------------------------------------------------------------------


def test_there_is_a_record_and_a_function_a_library() -> None:
    assert list(sa.conventions) == ["torch", "jax", "onnx", "flash", "hf", "sketchattn"]
    for name, record in sa.conventions.items():
        assert record.name == name
        assert record.empty_row in ("zero", "mean")
        assert callable(sa.as_convention(name))
        assert list(record.as_dict())[0] == "name"
    with pytest.raises(ValueError, match=r"convention must be a known name, got 'tensor'"):
        sa.as_convention("tensor")


def test_the_records_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        sa.conventions["torch"] = sa.conventions["jax"]  # type: ignore[index]
    with pytest.raises(AttributeError):
        sa.conventions["torch"].causal = "?"  # type: ignore[misc]


def test_the_table_has_a_row_a_library() -> None:
    lines = conventions_table().splitlines()
    assert len(lines) == 2 + len(sa.conventions)
    assert len({line.count("|") for line in lines}) == 1
    assert "| mean of V over all keys | -2.38e+38 |" in lines[3]


# Every function as one: heads (B, h, n, d) in, (B, h, n_q, d_v) out.


def call_torch(q: Array, k: Array, v: Array, mask: Array | None, causal: bool) -> Array:
    out: Array = sa.as_convention("torch")(q, k, v, attn_mask=mask, is_causal=causal)
    return out


def call_jax(q: Array, k: Array, v: Array, mask: Array | None, causal: bool) -> Array:
    shown = None if mask is None else mask[None, None]
    return turn(sa.as_convention("jax")(*turn(q, k, v), mask=shown, is_causal=causal))[0]


def call_onnx(q: Array, k: Array, v: Array, mask: Array | None, causal: bool) -> Array:
    out: Array = sa.as_convention("onnx")(q, k, v, mask, is_causal=int(causal))
    return out


def call_flash(q: Array, k: Array, v: Array, mask: Array | None, causal: bool) -> Array:
    assert mask is None
    return turn(sa.as_convention("flash")(*turn(q, k, v), causal=causal))[0]


def call_sketchattn(q: Array, k: Array, v: Array, mask: Array | None, causal: bool) -> Array:
    named = "top-left" if causal else False
    out: Array = sa.as_convention("sketchattn")(q, k, v, attn_mask=mask, causal=named)
    return out


def call_hf(q: Array, k: Array, v: Array, mask: Array | None, causal: bool) -> Array:
    assert not causal
    added = None if mask is None else np.where(mask, np.float32(0), np.float32(LOWEST))
    return turn(sa.as_convention("hf")(None, q, k, v, added)[0])[0]


CALLS: dict[str, Callable[..., Array]] = {
    "torch": call_torch,
    "jax": call_jax,
    "onnx": call_onnx,
    "flash": call_flash,
    "hf": call_hf,
    "sketchattn": call_sketchattn,
}


def test_every_convention_is_called() -> None:
    assert list(CALLS) == list(sa.conventions)


@pytest.mark.parametrize("name", [x for x in CALLS if x != "flash"])
def test_a_row_without_a_key_is_what_the_record_says(name: str) -> None:
    q, k, v = heads()
    out = CALLS[name](q, k, v, first_row_hidden(), False)
    mean = np.broadcast_to(v.mean(axis=2), out[:, :, 1].shape)
    want = mean if sa.conventions[name].empty_row == "mean" else np.zeros_like(mean)
    assert np.abs(out[:, :, 1] - want).max() <= 1e-6
    other = wide(q, k, v, attn_mask=first_row_hidden())
    assert np.abs(np.delete(out - other, 1, axis=2)).max() <= CLOSE


@pytest.mark.parametrize("name", [x for x in CALLS if x != "hf"])
@pytest.mark.parametrize("n_q", [4, 9])
def test_causality_begins_where_the_record_says(name: str, n_q: int) -> None:
    q, k, v = heads(n_q=n_q)
    out = CALLS[name](q, k, v, None, True)
    aligned = "bottom-right" if name == "flash" else "top-left"
    assert np.abs(out - wide(q, k, v, causal=aligned)).max() <= CLOSE
    other = {"top-left": "bottom-right", "bottom-right": "top-left"}[aligned]
    assert np.abs(out - wide(q, k, v, causal=other)).max() > 0.1


@pytest.mark.parametrize("name", ["jax", "onnx", "flash", "hf"])
def test_key_heads_are_shared_by_their_number(name: str) -> None:
    q, k, v = heads(h=6, h_kv=2)
    out = CALLS[name](q, k, v, None, False)
    assert np.abs(out - wide(q, k, v, enable_gqa=True)).max() <= CLOSE


def test_torch_shares_key_heads_where_told_and_a_single_one_always() -> None:
    torch_like = sa.as_convention("torch")
    q, k, v = heads(h=6, h_kv=2)
    with pytest.raises(ValueError, match="enable_gqa"):
        torch_like(q, k, v)
    assert torch_like(q, k, v, enable_gqa=True).shape == q.shape
    assert np.array_equal(
        torch_like(q, k[:, :1], v[:, :1]), torch_like(q, k[:, :1], v[:, :1], enable_gqa=True)
    )


@pytest.mark.parametrize("name", list(CALLS))
def test_the_width_of_values_is_free_where_the_record_says(name: str) -> None:
    q, k, v = heads(d_v=5)
    if sa.conventions[name].dv:
        assert CALLS[name](q, k, v, None, False).shape == (2, 2, N_Q, 5)
    else:
        with pytest.raises(ValueError, match="value must have the shape"):
            CALLS[name](q, k, v, None, False)


def test_the_logsumexp_of_a_row_without_a_key() -> None:
    q, k, v = heads(n_q=9)
    _, lse, nothing = sa.as_convention("flash")(*turn(q, k, v), causal=True, return_attn_probs=True)
    assert nothing is None
    assert lse.shape == (2, 2, 9)
    assert np.all(lse[:, :, :3] == sa.conventions["flash"].lse_empty)
    assert np.isposinf(lse[0, 0, 0])
    assert np.isfinite(lse[:, :, 3:]).all()
    q, k, v = heads()
    _, lse = sa.as_convention("jax")(
        *turn(q, k, v), mask=first_row_hidden()[None, None], return_residual=True
    )
    assert lse.shape == (2, N_Q, 2)
    assert np.all(lse[:, 1] == np.float32(sa.conventions["jax"].lse_empty))
    _, lse = sa.as_convention("sketchattn")(q, k, v, attn_mask=first_row_hidden(), return_lse=True)
    assert np.all(lse[:, :, 1] == sa.conventions["sketchattn"].lse_empty)


@pytest.mark.parametrize("name", list(CALLS))
def test_double_precision_is_given_where_asked_for(name: str) -> None:
    q, k, v = heads()
    given = [] if name != "hf" else [None]
    layout = turn if sa.conventions[name].layout == "BNHD" else lambda *x: list(x)
    wider = [x.astype(np.float64) for x in layout(q, k, v)]
    out = sa.as_convention(name)(*given, *wider, compute_dtype=np.float64)
    out = out[0] if name == "hf" else out
    want = wide(q, k, v)
    if sa.conventions[name].out_layout == "BNHD":
        out = turn(out)[0]
    assert np.array_equal(out, want)


# --- what is refused ------------------------------------------------------------------------------


def test_what_a_library_refuses_is_refused() -> None:
    q, k, v = heads()
    mask = first_row_hidden()
    torch_like, jax_like, onnx_like = map(sa.as_convention, ("torch", "jax", "onnx"))
    with pytest.raises(ValueError, match="dropout_p must be 0, got 0.5"):
        torch_like(q, k, v, dropout_p=0.5)
    with pytest.raises(ValueError, match="attn_mask must be None when is_causal"):
        torch_like(q, k, v, mask, is_causal=True)
    with pytest.raises(TypeError, match="attn_mask must be bool, float32 or float32"):
        torch_like(q, k, v, mask.astype(np.float64))
    with pytest.raises(ValueError, match="mask must be bool, got float32"):
        jax_like(*turn(q, k, v), mask=mask.astype(np.float32)[None, None])
    with pytest.raises(ValueError, match="query must have 3 or 4 axes"):
        jax_like(q[0, 0], k[0, 0], v[0, 0])
    with pytest.raises(ValueError, match="q_num_heads and kv_num_heads must be given for packed"):
        onnx_like(q[0], k[0], v[0])
    with pytest.raises(ValueError, match="for inputs with 3 axes and only"):
        onnx_like(q, k, v, q_num_heads=2, kv_num_heads=2)
    with pytest.raises(ValueError, match="past_key and past_value must be given together"):
        onnx_like(q, k, v, past_key=k)
    with pytest.raises(ValueError, match="nonpad_kv_seqlen must be None beside past_key"):
        onnx_like(q, k, v, None, k, v, np.array([3, 4]))
    with pytest.raises(ValueError, match=r"q must be \(batch, n, h, d\)"):
        sa.as_convention("flash")(q[0], k[0], v[0])
    with pytest.raises(TypeError, match="attention_mask must be floating point, got bool"):
        sa.as_convention("hf")(None, q, k, v, mask)
    with pytest.raises(TypeError, match="cache must be left out"):
        sa.as_convention("hf")(None, q, k, v, cache=object())


# --- beside the libraries -------------------------------------------------------------------------


@pytest.mark.parametrize("masked", ["none", "causal", "bool", "added", "lowest"])
def test_torch_itself(masked: str) -> None:
    torch = pytest.importorskip("torch")
    causal = masked == "causal"
    for n_q in (N_Q, 9):
        q, k, v = heads(h=6, h_kv=2, d_v=5, n_q=n_q)
        mask: Any = np.random.default_rng(1).random((n_q, N_K)) < 0.6
        mask[1] = False
        if masked in ("none", "causal"):
            mask = None
        elif masked == "added":
            mask = np.where(mask, np.float32(0.5), np.float32(-np.inf))
        elif masked == "lowest":
            mask = np.where(mask, np.float32(0), np.float32(LOWEST))
        theirs = torch.nn.functional.scaled_dot_product_attention(
            *(torch.from_numpy(x) for x in (q, k, v)),
            attn_mask=None if mask is None else torch.from_numpy(mask),
            is_causal=causal,
            enable_gqa=True,
        )
        ours = sa.as_convention("torch")(q, k, v, mask, is_causal=causal, enable_gqa=True)
        assert np.abs(theirs.numpy() - ours).max() <= CLOSE


def test_torch_in_double_precision() -> None:
    torch = pytest.importorskip("torch")
    worst = 0.0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        n_q, n_k = (int(x) for x in rng.integers(1, 40, 2))
        q = rng.standard_normal((2, 6, n_q, 8))
        k, v = rng.standard_normal((2, 2, n_k, 8)), rng.standard_normal((2, 2, n_k, 5))
        mask = rng.random((2, 1, n_q, n_k)) < 0.6
        mask[:, :, rng.integers(n_q)] = False
        for options in ({"attn_mask": mask}, {"is_causal": True}, {"scale": 0.0}):
            tensors = {
                name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x
                for name, x in options.items()
            }
            theirs = torch.nn.functional.scaled_dot_product_attention(
                *(torch.from_numpy(x) for x in (q, k, v)), enable_gqa=True, **tensors
            )
            ours = sa.as_convention("torch")(
                q, k, v, enable_gqa=True, compute_dtype=np.float64, **options
            )
            worst = max(worst, float(np.abs(theirs.numpy() - ours).max()))
    assert worst <= 1e-13


@pytest.mark.parametrize("case", ["plain", "causal", "mask", "bias", "window", "lengths", "one"])
def test_jax_itself(case: str) -> None:
    jax = pytest.importorskip("jax")
    for n_q in (N_Q, 9):
        arrays = turn(*heads(h=6, h_kv=2, n_q=n_q))
        mask = np.random.default_rng(1).random((2, 6, n_q, N_K)) < 0.6
        mask[:, :, 1] = False
        bias = np.random.default_rng(2).standard_normal((1, 6, n_q, N_K)).astype(np.float32)
        every: dict[str, dict[str, Any]] = {
            "plain": {"scale": 0.2},
            "causal": {"is_causal": True, "mask": mask},
            "mask": {"mask": mask, "bias": bias},
            "bias": {"bias": bias},
            "window": {"local_window_size": (1, 2)},
            "lengths": {
                "query_seq_lengths": np.array([2, 3], np.int32),
                "key_value_seq_lengths": np.array([4, 6], np.int32),
            },
            "one": {"local_window_size": 1, "is_causal": True},
        }
        options = every[case]
        theirs, their_lse = jax.nn.dot_product_attention(*arrays, return_residual=True, **options)
        ours, lse = sa.as_convention("jax")(*arrays, return_residual=True, **options)
        assert np.abs(np.asarray(theirs) - ours).max() <= CLOSE
        assert np.allclose(np.asarray(their_lse), lse, rtol=1e-6, atol=1e-5)
        alone = sa.as_convention("jax")(*arrays, **options)
        assert np.array_equal(alone, ours)
    one_head = [x[0] for x in arrays]
    theirs = jax.nn.dot_product_attention(*one_head, is_causal=True)
    ours = sa.as_convention("jax")(*one_head, is_causal=True)
    assert np.abs(np.asarray(theirs) - ours).max() <= CLOSE


@pytest.mark.parametrize("case", ["plain", "causal", "bool", "short", "past", "nonpad", "all"])
def test_onnx_itself(case: str) -> None:
    pytest.importorskip("onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.reference.ops.op_attention import _compute_attention

    q, k, v = heads(h=6, h_kv=2, d_v=5)
    rng = np.random.default_rng(3)
    mask = rng.random((N_Q, N_K)) < 0.6
    mask[1] = False
    every: dict[str, dict[str, Any]] = {
        "plain": {"scale": 0.2, "softcap": 1.5},
        "causal": {"is_causal": 1},
        "bool": {"attn_mask": mask, "is_causal": 1},
        "short": {"attn_mask": mask[:, :4]},
        "past": {"past_key": k, "past_value": v, "is_causal": 1, "left_window_size": 3},
        "nonpad": {"nonpad_kv_seqlen": np.array([3, 5]), "is_causal": 1},
        "all": {"left_window_size": 2, "right_window_size": 1, "softcap": 2.0},
    }
    options = every[case]
    with np.errstate(all="ignore"):
        theirs = np.asarray(_compute_attention(q, k, v, **options)[0])
    ours = sa.as_convention("onnx")(q, k, v, **options)
    assert np.abs(theirs - ours).max() <= CLOSE


def test_onnx_packs_heads_side_by_side() -> None:
    q, k, v = heads(h=6, h_kv=2, d_v=5)
    packed = [x.reshape(*x.shape[:2], -1) for x in turn(q, k, v)]
    out = sa.as_convention("onnx")(*packed, q_num_heads=6, kv_num_heads=2)
    whole = sa.as_convention("onnx")(q, k, v)
    assert np.array_equal(out, turn(whole)[0].reshape(2, N_Q, -1))


def test_flash_aligns_windows_and_slopes_to_the_last_key() -> None:
    q, k, v = heads()
    flash = sa.as_convention("flash")
    slopes = np.array([0.5, 0.25])
    out = turn(flash(*turn(q, k, v), window_size=(2, 0), alibi_slopes=slopes, softcap=2.0))[0]
    p = np.arange(N_Q)[:, None] + N_K - N_Q - np.arange(N_K)
    bias = np.where((p >= 0) & (p <= 2), -slopes[:, None, None] * np.abs(p), -np.inf)
    assert np.abs(out - wide(q, k, v, attn_mask=bias, softcap=2.0)).max() <= CLOSE


def test_hugging_face_eager_itself() -> None:
    torch = pytest.importorskip("torch")
    models = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")

    class Module:
        num_key_value_groups = 3
        training = False
        head_dim = D

    q, k, v = heads(h=6, h_kv=2, d_v=5)
    added = np.where(first_row_hidden(), np.float32(0), np.float32(LOWEST))[None, None]
    theirs, _ = models.eager_attention_forward(
        Module(), *(torch.from_numpy(x) for x in (q, k, v)), torch.from_numpy(added), softcap=2.0
    )
    ours, _ = sa.as_convention("hf")(
        None, q, k, v, added, softcap=2.0, sliding_window=3, is_causal=True
    )
    assert ours.shape == (2, N_Q, 6, 5)
    assert np.abs(theirs.numpy() - ours).max() <= CLOSE
    assert math.isclose(float(ours[0, 1, 0, 0]), float(v[0, 0, :, 0].mean()), abs_tol=1e-6)
    sinks = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], np.float32)
    biased = np.random.default_rng(4).standard_normal((6, N_Q, N_K)).astype(np.float32)
    ours, _ = sa.as_convention("hf")(None, q, k, v, added, s_aux=sinks, position_bias=biased)
    want = wide(q, k, v, attn_mask=added + biased.astype(float), sink=sinks, enable_gqa=True)
    assert np.abs(turn(ours)[0] - want).max() <= CLOSE
