"""One head: what is accepted, what is refused and with which words, and that it never changes."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import pickle
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from naive import naive_attention
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn import AttentionProblem
from sketchattn.base import arguments

Array = NDArray[Any]

pytestmark = pytest.mark.interpreted

BF16 = np.dtype(ml_dtypes.bfloat16)
NAN, INF = float("nan"), float("inf")


# Error of an output in units of eps = 2u: logits of at most |L| = 3 * 2 * 2 / sqrt(3) < 7 are off
# by 7u|L|, a weight by twice that and by 10u from its exponential, and |V| <= 2.
ROUNDING = 2 * (7 * 7 + 10)


def arrays(
    n_q: int = 4, n_k: int = 5, d: int = 3, d_v: int = 2, dtype: Any = np.float64, seed: int = 0
) -> tuple[Array, Array, Array]:
    """Return q, k and v whose numbers are exact in every precision that is accepted."""
    rng = np.random.default_rng(seed)
    shapes = ((n_q, d), (n_k, d), (n_k, d_v))
    q, k, v = (rng.integers(-16, 17, size=shape) / 8 for shape in shapes)
    return q.astype(dtype), k.astype(dtype), v.astype(dtype)


def answer(q: Array, k: Array, v: Array) -> Array:
    """Return the output of the loops for arrays of any precision."""
    return naive_attention(
        *(x.astype(np.float64) for x in (q, k, v)), scale=1 / math.sqrt(q.shape[1])
    )[1]


class OnlyArray:
    """What some libraries offer: a conversion to NumPy and nothing else."""

    def __init__(self, x: Array) -> None:
        self.x = x

    def __array__(self, dtype: Any = None, copy: Any = None) -> Array:
        return self.x


class OnlyDlpack:
    """The other protocol and nothing else."""

    def __init__(self, x: Any) -> None:
        self.x = x

    def __dlpack__(self, **options: Any) -> Any:
        return self.x.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self.x.__dlpack_device__()
        return device


class ElsewhereOnly:
    """Memory that the CPU cannot read, as an accelerator's array says it."""

    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("the data are on another device")

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)


def subclassed(x: Array) -> Array:
    """Return a matrix, for which ``*`` is a product and indexing never leaves two axes."""
    with pytest.warns(PendingDeprecationWarning, match="matrix subclass"):
        return np.matrix(x)


def read_only(x: Array) -> Array:
    out = x.copy()
    out.flags.writeable = False
    return out


def spaced(x: Array) -> Array:
    out = np.full((2 * x.shape[0], 3 * x.shape[1]), NAN).astype(x.dtype)
    out[::2, ::3] = x
    return out[::2, ::3]


def unaligned(x: Array) -> Array:
    raw = np.zeros(x.nbytes + 1, np.uint8)
    out = raw[1:].view(x.dtype).reshape(x.shape)
    out[:] = x
    return out


# --- what is accepted ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [
        (np.float16, np.float32),
        (BF16, np.float32),
        (np.float32, np.float32),
        (np.float64, np.float64),
        (">f2", np.float32),
        (">f4", np.float32),
        (">f8", np.float64),
    ],
)
def test_precisions(dtype: Any, computed: type) -> None:
    q, k, v = arrays(dtype=dtype)
    problem = AttentionProblem(q, k, v)
    for mine, given in zip(problem, (q, k, v), strict=True):
        assert mine is not None
        assert mine.dtype == computed
        assert mine.dtype.isnative
        assert np.array_equal(mine, given.astype(np.float64))
    assert problem.dtype == problem.output.dtype == problem.logsumexp.dtype == computed
    atol = ROUNDING * np.finfo(computed).eps
    assert np.allclose(problem.output, answer(q, k, v), rtol=0, atol=atol)


LAYOUTS: dict[str, Callable[[Array], Any]] = {
    "contiguous": lambda x: x,
    "read-only": read_only,
    "Fortran": np.asfortranarray,
    "spaced": spaced,
    "negative strides": lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
    "unaligned": unaligned,
    "stride zero": lambda x: np.broadcast_to(x[:1], x.shape),
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "nested lists": lambda x: x.tolist(),
    "nested tuples": lambda x: tuple(map(tuple, x.tolist())),
    "only __array__": OnlyArray,
    "only __dlpack__": OnlyDlpack,
    "matrix": subclassed,
    "list of rows": list,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_containers(layout: str) -> None:
    given = [LAYOUTS[layout](x) for x in arrays()]
    plain = arrays()
    if layout == "stride zero":
        plain = tuple(np.ascontiguousarray(x) for x in given)  # type: ignore[assignment]  # three
    problem, want = AttentionProblem(*given), AttentionProblem(*plain)
    for x in problem.arrays:
        assert type(x) is np.ndarray
        assert x.flags.c_contiguous
        assert x.flags.aligned
    assert problem.digest == want.digest
    assert np.array_equal(problem.output, want.output)


def test_byte_orders_may_be_mixed() -> None:
    q, k, v = arrays(dtype=np.float32)
    mixed = AttentionProblem(q.astype(">f4"), k, v.astype(">f4"))
    assert mixed.digest == AttentionProblem(q, k, v).digest


def test_float16_is_widened_exactly() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    every = bits[np.isfinite(bits)].reshape(-1, 16)
    problem = AttentionProblem(every, every)
    assert np.array_equal(problem.q, every.astype(np.float64))


def test_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    for dtype, computed in (
        (torch.float16, np.float32),
        (torch.bfloat16, np.float32),
        (torch.float32, np.float32),
        (torch.float64, np.float64),
    ):
        given = [torch.from_numpy(x).to(dtype) for x in arrays()]
        problem = AttentionProblem(*given, key_mask=torch.ones(5, dtype=torch.bool))
        assert problem.dtype == computed
        assert np.array_equal(problem.q, arrays()[0])
        given[0][0, 0] = 99.0  # a tensor shares its memory with the array that it becomes
        assert np.array_equal(problem.q, arrays()[0])
    transposed = torch.from_numpy(arrays()[0].T.copy()).T
    assert np.array_equal(AttentionProblem(transposed, arrays()[1]).q, arrays()[0])


def test_scale_default_and_zero() -> None:
    q, k, v = arrays(d=3)
    assert AttentionProblem(q, k, v).scale == 1 / math.sqrt(3)
    assert np.allclose(AttentionProblem(q, k, v, scale=0).output, v.mean(axis=0), rtol=1e-14)
    for given in (2, np.float32(2), np.int64(2), np.array(2.0), Fraction(2)):
        scale = AttentionProblem(q, k, v, scale=given).scale  # type: ignore[arg-type]  # any real
        assert type(scale) is float
        assert scale == 2.0


def test_causal_names_its_alignment() -> None:
    q, k, v = arrays(3, 5)
    assert AttentionProblem(q, k, v).causal is False
    assert AttentionProblem(q, k, v, causal=None).causal is False  # type: ignore[arg-type]  # None
    assert AttentionProblem(q, k, v, causal="top-left").offset == 0
    assert AttentionProblem(q, k, v, causal="bottom-right").offset == 2
    assert AttentionProblem(k, q, q, causal="bottom-right").offset == -2
    assert AttentionProblem(q, q, q, causal=np.True_).causal is True  # type: ignore[arg-type]


def picture(seen: Array) -> str:
    return "/".join("".join("01"[int(x)] for x in row) for row in seen)


@pytest.mark.parametrize(
    ("sizes", "options", "expected"),
    [
        ((2, 5), {"causal": "top-left"}, "10000/11000"),
        ((2, 5), {"causal": "bottom-right"}, "11110/11111"),
        ((5, 2), {"causal": "bottom-right"}, "00/00/00/10/11"),
        ((3, 3), {"causal": True}, "100/110/111"),
        ((2, 3), {}, "111/111"),
        ((2, 3), {"key_mask": [True, False, True]}, "101/101"),
        ((3, 3), {"key_mask": [False, True, True], "causal": True}, "000/010/011"),
    ],
)
def test_visible_sets(sizes: tuple[int, int], options: dict[str, Any], expected: str) -> None:
    q, k, v = arrays(*sizes)
    problem = AttentionProblem(q, k, v, **options)
    seen = problem.visible()
    assert picture(seen) == expected
    assert problem.visible_counts().tolist() == seen.sum(axis=1).tolist()
    assert np.array_equal(problem.exact.to_dense() > 0, seen)
    assert np.array_equal(np.isneginf(problem.logsumexp), ~seen.any(axis=1))
    n_q = sizes[0]
    for rows in ([0], [-1], [n_q - 1, 0], np.arange(n_q) > 0, np.array([], int)):
        assert np.array_equal(problem.visible(np.asarray(rows)), seen[np.asarray(rows)])


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (0, 3, 2, 2), (3, 0, 2, 2), (0, 0, 1, 1), (3, 2, 1, 0)]
)
def test_smallest_sizes(sizes: tuple[int, int, int, int]) -> None:
    n_q, n_k, d, d_v = sizes
    problem = AttentionProblem(*arrays(*sizes))
    assert (problem.n_q, problem.n_k, problem.d, problem.d_v) == sizes
    assert problem.output.shape == (n_q, d_v)
    assert problem.logsumexp.shape == (n_q,)
    if n_k == 0:
        assert not problem.output.any()
        assert np.all(np.isneginf(problem.logsumexp))
    if n_k == 1:
        assert problem.v is not None
        assert np.array_equal(problem.output[0], problem.v[0])


def test_a_problem_without_values_has_a_matrix_and_no_output() -> None:
    q, k, v = arrays()
    problem = AttentionProblem(q, k)
    assert problem.v is None
    assert problem.d_v is None
    assert list(problem)[2] is None
    assert np.array_equal(problem.logsumexp, AttentionProblem(q, k, v).logsumexp)
    for name in ("output", "values"):
        with pytest.raises(
            ValueError,
            match=exactly(
                "v must be given for an output, got None; make the problem with its values"
            ),
        ):
            getattr(problem, name)


# --- masked keys --------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["k", "v", "both"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_masked_keys_are_never_read(poison: float, where: str, dtype: Any) -> None:
    q, k, v = arrays(dtype=dtype)
    mask = np.array([True, False, True, True, False])
    want = AttentionProblem(q, k, v, key_mask=mask)
    for x in {"k": [k], "v": [v], "both": [k, v]}[where]:
        x[~mask] = poison
    got = AttentionProblem(q, k, v, key_mask=mask)
    assert np.array_equal(got.output, want.output)
    assert np.array_equal(got.logsumexp, want.logsumexp)
    assert np.array_equal(got.exact.to_dense(), want.exact.to_dense())
    short = AttentionProblem(q, k[mask], v[mask])
    atol = 2 * ROUNDING * np.finfo(got.dtype).eps
    assert np.allclose(got.output, short.output, rtol=0, atol=atol)


def test_a_poisoned_key_that_is_kept_is_refused() -> None:
    q, k, v = arrays()
    k[1] = NAN
    v[4, 1] = INF
    mask = np.array([True, False, True, True, True])
    with pytest.raises(
        ValueError,
        match=exactly(
            "v must be finite, got inf at index (4, 1); replace it, or hide its key with a mask"
        ),
    ):
        AttentionProblem(q, k, v, key_mask=mask)


def test_nothing_is_kept() -> None:
    q, k, v = arrays()
    k[:], v[:] = NAN, NAN
    problem = AttentionProblem(q, k, v, key_mask=np.zeros(5, bool))
    assert problem.kept_keys.tolist() == []
    assert not problem.output.any()
    assert np.all(np.isneginf(problem.logsumexp))


def test_kept_keys() -> None:
    q, k, v = arrays()
    assert AttentionProblem(q, k, v).kept_keys.tolist() == [0, 1, 2, 3, 4]
    problem = AttentionProblem(q, k, v, key_mask=[True, False, True, False, False])
    assert problem.kept_keys.tolist() == [0, 2]
    assert problem.key_mask is not None
    assert problem.key_mask.dtype == np.bool_


# --- what is refused ----------------------------------------------------------------------------


def exactly(text: str) -> str:
    return f"^{re.escape(text)}$"


def poisoned(index: tuple[int, int], value: float, which: int) -> tuple[Array, ...]:
    out = arrays()
    out[which][index] = value
    return out


Q, K, V = arrays()
F32 = arrays(dtype=np.float32)
REFUSALS: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "many heads": (
        (Q[None], K[None], V[None]), {}, ValueError,
        "q must have two axes (tokens, width), got shape (1, 4, 3); "
        "a problem is one head, use attention for many",
    ),
    "one vector": (
        (Q, K[0], V), {}, ValueError,
        "k must have two axes (tokens, width), got shape (3,); "
        "a problem is one head, use attention for many",
    ),
    "a number": (
        (Q, K, 1.0), {}, ValueError,
        "v must have two axes (tokens, width), got shape (); "
        "a problem is one head, use attention for many",
    ),
    "integers": (
        (Q.astype(int), K, V), {}, TypeError,
        "q must be float16, bfloat16, float32 or float64, got int64; "
        "convert it with astype(np.float32)",
    ),
    "booleans": (
        (Q > 0, K > 0, V), {}, TypeError,
        "q must be float16, bfloat16, float32 or float64, got bool; "
        "convert it with astype(np.float32)",
    ),
    "complex": (
        (Q + 0j, K, V), {}, TypeError,
        "q must be float16, bfloat16, float32 or float64, got complex128; "
        "convert it with astype(np.float32)",
    ),
    "float8": (
        (Q.astype(ml_dtypes.float8_e4m3fn), K, V), {}, TypeError,
        "q must be float16, bfloat16, float32 or float64, got float8_e4m3fn; "
        "convert it with astype(np.float32)",
    ),
    "objects": (
        (Q.astype(object), K, V), {}, TypeError,
        "q must be float16, bfloat16, float32 or float64, got object; "
        "convert it with astype(np.float32)",
    ),
    "mixed k": (
        (Q, F32[1], V), {}, TypeError,
        "k must have the dtype float64 of q, got float32; convert q, k and v to one dtype",
    ),
    "mixed v": (
        (F32[0], F32[1], V), {}, TypeError,
        "v must have the dtype float32 of q, got float64; convert q, k and v to one dtype",
    ),
    "mixed halves": (
        (Q.astype(np.float16), K.astype(BF16), V.astype(np.float16)), {}, TypeError,
        "k must have the dtype float16 of q, got bfloat16; convert q, k and v to one dtype",
    ),
    "integer k": (
        (Q, K.astype(int), V), {}, TypeError,
        "k must have the dtype float64 of q, got int64; convert q, k and v to one dtype",
    ),
    "no width": (
        (Q[:, :0], K[:, :0], V), {}, ValueError,
        "q must have a head width d of at least 1, got d = 0; pass q of (n_q, d)",
    ),
    "widths": (
        (Q, K[:, :2], V), {}, ValueError,
        "k must have the head width d = 3 of q, got 2; project q and k to one width",
    ),
    "lengths": (
        (Q, K, V[:4]), {}, ValueError,
        "v must have one row for each of the n_k = 5 keys, got 4; pass k and v of equal length",
    ),
    "NaN in q": (
        poisoned((2, 1), NAN, 0), {}, ValueError,
        "q must be finite, got nan at index (2, 1); replace it, or hide its key with a mask",
    ),
    "infinity in k": (
        poisoned((4, 0), -INF, 1), {}, ValueError,
        "k must be finite, got -inf at index (4, 0); replace it, or hide its key with a mask",
    ),
    "infinity in v": (
        poisoned((0, 1), INF, 2), {}, ValueError,
        "v must be finite, got inf at index (0, 1); replace it, or hide its key with a mask",
    ),
    "masked query": (
        poisoned((2, 1), NAN, 0), {"key_mask": np.zeros(5, bool)}, ValueError,
        "q must be finite, got nan at index (2, 1); replace it, or hide its key with a mask",
    ),
    "masked array": (
        (np.ma.masked_array(Q), K, V), {}, TypeError,
        "q must be a plain array, got a masked array; pass its data and use key_mask",
    ),
    "another device": (
        (Q, K, ElsewhereOnly()), {}, TypeError,
        "v must be an array in CPU memory, got ElsewhereOnly which cannot be read "
        "(the data are on another device); convert it to a NumPy array first",
    ),
    "scale NaN": (
        (Q, K, V), {"scale": NAN}, ValueError,
        "scale must be finite, got nan; None is 1/sqrt(d) = 0.57735",
    ),
    "scale infinite": (
        (Q, K, V), {"scale": -INF}, ValueError,
        "scale must be finite, got -inf; None is 1/sqrt(d) = 0.57735",
    ),
    "scale beyond float": (
        (Q, K, V), {"scale": -(10**400)}, ValueError,
        "scale must be finite, got -inf; None is 1/sqrt(d) = 0.57735",
    ),
    "scale text": (
        (Q, K, V), {"scale": "0.5"}, TypeError,
        "scale must be a real number or None, got str; None is 1/sqrt(d) = 0.57735",
    ),
    "scale bool": (
        (Q, K, V), {"scale": True}, TypeError,
        "scale must be a real number or None, got bool; None is 1/sqrt(d) = 0.57735",
    ),
    "scale array": (
        (Q, K, V), {"scale": np.ones(1)}, TypeError,
        "scale must be a real number or None, got ndarray; None is 1/sqrt(d) = 0.57735",
    ),
    "scale complex": (
        (Q, K, V), {"scale": 1j}, TypeError,
        "scale must be a real number or None, got complex; None is 1/sqrt(d) = 0.57735",
    ),
    "causal rectangle": (
        (Q, K, V), {"causal": True}, ValueError,
        "causal=True must have n_q = n_k, got n_q = 4 and n_k = 5; name the alignment: "
        "causal='top-left' or causal='bottom-right'",
    ),
    "causal misspelt": (
        (Q, K, V), {"causal": "bottom_right"}, ValueError,
        "causal must be False, True, 'top-left' or 'bottom-right', got 'bottom_right'; "
        "did you mean 'bottom-right'?",
    ),
    "causal word": (
        (Q, K, V), {"causal": ""}, ValueError,
        "causal must be False, True, 'top-left' or 'bottom-right', got ''; "
        "choose one of bottom-right, top-left",
    ),
    "causal number": (
        (Q, K, V), {"causal": 1}, TypeError,
        "causal must be a bool, 'top-left' or 'bottom-right', got int; "
        "an explicit position of the first query is the argument offset of attention",
    ),
    "mask of numbers": (
        (Q, K, V), {"key_mask": np.ones(5)}, TypeError,
        "key_mask must be boolean, True for the keys to keep, got float64; "
        "convert it with astype(bool)",
    ),
    "mask of 0 and 1": (
        (Q, K, V), {"key_mask": [1, 0, 1, 1, 1]}, TypeError,
        "key_mask must be boolean, True for the keys to keep, got int64; "
        "convert it with astype(bool)",
    ),
    "mask too short": (
        (Q, K, V), {"key_mask": np.ones(4, bool)}, ValueError,
        "key_mask must have shape (5,), got (4,); give one entry for each key",
    ),
    "mask of one": (
        (Q, K, V), {"key_mask": np.ones(1, bool)}, ValueError,
        "key_mask must have shape (5,), got (1,); give one entry for each key",
    ),
    "mask matrix": (
        (Q, K, V), {"key_mask": np.ones((1, 5), bool)}, ValueError,
        "key_mask must have shape (5,), got (1, 5); give one entry for each key",
    ),
    "mask scalar": (
        (Q, K, V), {"key_mask": True}, ValueError,
        "key_mask must have shape (5,), got (); give one entry for each key",
    ),
    "mask masked": (
        (Q, K, V), {"key_mask": np.ma.masked_array(np.ones(5, bool))}, TypeError,
        "key_mask must be a plain array, got a masked array; pass its data and use key_mask",
    ),
    "name": (
        (Q, K, V), {"name": 3}, TypeError,
        "name must be a string or None, got int; it labels the head",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    given, options, error, text = REFUSALS[case]
    with pytest.raises(error, match=exactly(text)):
        AttentionProblem(*given, **options)


def test_every_refusal_is_caused_by_what_it_names() -> None:
    # The arrays of the table are fine on their own; the one changed thing is what is refused.
    assert AttentionProblem(Q, K, V, key_mask=np.ones(5, bool), name="x", scale=0.5).n_k == 5
    assert AttentionProblem(*F32).dtype == np.float32


def test_arguments_after_v_are_keywords() -> None:
    with pytest.raises(TypeError, match="positional argument"):
        AttentionProblem(Q, K, V, 0.5)  # type: ignore[call-arg]  # what is tested


@pytest.mark.parametrize("ragged", [[[1.0], [1.0, 2.0]], [[[1.0]], [2.0]]])
def test_ragged_lists_are_refused(ragged: list[Any]) -> None:
    with pytest.raises(
        TypeError,
        match=r"^k must be an array in CPU memory, got list which cannot be read "
        r"\(setting an array element with a sequence.*\); convert it to a NumPy array first$",
    ):
        AttentionProblem(Q, ragged, V)


def test_tensors_that_cannot_be_read() -> None:
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(Q)
    with pytest.raises(
        TypeError,
        match=exactly("q must not require a gradient, since none is computed; pass q.detach()"),
    ):
        AttentionProblem(x.clone().requires_grad_(), K, V)
    for other in (x.to("meta"), x.to_sparse(), x.to(torch.float8_e4m3fn)):
        with pytest.raises(
            TypeError,
            match=r"^q must be an array in CPU memory, got Tensor which cannot be read \(.+\); "
            r"convert it to a NumPy array first$",
        ):
            AttentionProblem(other, K, V)


def test_overflowing_logits_are_refused_when_they_are_met() -> None:
    q, k, v = (np.float32(1e20) * x for x in arrays(dtype=np.float32))
    text = (
        "scale * q @ k.T must be finite in float32, got an overflow in row (0,); "
        "make scale, q or k smaller, or compute in float64"
    )
    problem = AttentionProblem(q, k, v)
    for name in ("output", "logsumexp"):
        with pytest.raises(ValueError, match=exactly(text)):
            getattr(problem, name)
    assert np.isfinite(problem.astype(np.float64).output).all()


# --- it never changes ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q", "k", "v", "scale", "causal", "key_mask", "n_k", "other"])
def test_attributes_cannot_be_changed(name: str) -> None:
    problem = AttentionProblem(*arrays())
    with pytest.raises(
        AttributeError,
        match=exactly(f"{name} of an AttentionProblem cannot be changed; make another problem"),
    ):
        setattr(problem, name, None)
    with pytest.raises(
        AttributeError, match=exactly(f"{name} of an AttentionProblem cannot be deleted")
    ):
        delattr(problem, name)


def test_arrays_cannot_be_written() -> None:
    problem = AttentionProblem(*arrays(), key_mask=np.ones(5, bool))
    assert problem.v is not None
    assert problem.key_mask is not None
    for x in (problem.q, problem.k, problem.v, problem.key_mask, problem.output, problem.logsumexp):
        with pytest.raises(ValueError, match="read-only"):
            x[0] = 0


@pytest.mark.parametrize(
    ("wrap", "dtype"),
    [
        (wrap, dtype)
        for wrap in (np.asarray, OnlyArray, OnlyDlpack)
        for dtype in (np.float16, BF16, np.float32, np.float64, ">f8")
        # DLPack of NumPy has neither bfloat16 nor another byte order.
        if wrap is not OnlyDlpack or dtype not in (BF16, ">f8")
    ],
)
def test_nothing_is_shared_with_the_caller(wrap: Callable[[Array], Any], dtype: Any) -> None:
    mine = arrays(dtype=dtype)
    mask = np.array([True, True, False, True, True])
    before = [hashlib.sha256(x.tobytes()).hexdigest() for x in (*mine, mask)]
    problem = AttentionProblem(*map(wrap, mine), key_mask=mask)
    digest, output = problem.digest, problem.output.copy()
    assert [hashlib.sha256(x.tobytes()).hexdigest() for x in (*mine, mask)] == before
    assert all(x.flags.writeable for x in (*mine, mask))
    for x in mine:
        x[:] = 7
    mask[:] = False
    fresh = AttentionProblem(*problem.arrays, key_mask=problem.key_mask)
    assert fresh.digest == digest
    assert np.array_equal(fresh.output, output)


def test_one_array_in_three_roles_is_three_arrays() -> None:
    x = arrays()[0]
    problem = AttentionProblem(x, x, x)
    q, k, v = problem.arrays
    assert v is not None
    assert not any(np.shares_memory(a, b) for a, b in ((q, k), (q, v), (k, v), (q, x)))


# --- it unpacks, prints, pickles and has a digest -----------------------------------------------


def test_unpacks_like_the_triple_that_it_holds() -> None:
    problem = AttentionProblem(*arrays())
    q, k, v = problem
    assert (q is problem.q, k is problem.k, v is problem.v) == (True, True, True)


def test_representation() -> None:
    q, k, v = arrays()
    assert repr(AttentionProblem(q, k, v)) == (
        "AttentionProblem(n_q=4, n_k=5, d=3, d_v=2, dtype=float64, scale=0.57735, causal=False)"
    )
    masked = AttentionProblem(
        q, k, causal="top-left", key_mask=[True, False, True, True, False], name="layer0.head1"
    )
    assert repr(masked) == (
        "AttentionProblem('layer0.head1', n_q=4, n_k=5, d=3, d_v=None, dtype=float64, "
        "scale=0.57735, causal='top-left', kept_keys=3)"
    )


VARIANTS: dict[str, Callable[[], AttentionProblem]] = {
    "plain": lambda: AttentionProblem(*arrays()),
    "no values": lambda: AttentionProblem(*arrays()[:2]),
    "float32": lambda: AttentionProblem(*arrays(dtype=np.float32)),
    "scale": lambda: AttentionProblem(*arrays(), scale=0.5),
    "causal": lambda: AttentionProblem(*arrays(5), causal=True),
    "top-left": lambda: AttentionProblem(*arrays(), causal="top-left"),
    "bottom-right": lambda: AttentionProblem(*arrays(), causal="bottom-right"),
    "square": lambda: AttentionProblem(*arrays(5)),
    "key mask": lambda: AttentionProblem(*arrays(), key_mask=[True, False, True, True, True]),
    "all kept": lambda: AttentionProblem(*arrays(), key_mask=[True] * 5),
    "other numbers": lambda: AttentionProblem(*arrays(seed=1)),
    "q and k swapped": lambda: AttentionProblem(arrays(5)[1], arrays(5)[0], arrays(5)[2]),
    "one bit": lambda: AttentionProblem(
        arrays()[0], np.nextafter(arrays()[1], INF), arrays()[2]
    ),
    "no keys": lambda: AttentionProblem(*arrays(4, 0)),
    "no queries": lambda: AttentionProblem(*arrays(0, 4)),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "through",
    [
        lambda x: pickle.loads(pickle.dumps(x)),
        lambda x: pickle.loads(pickle.dumps(x, protocol=2)),
        copy.copy,
        copy.deepcopy,
    ],
    ids=["pickle", "old pickle", "copy", "deepcopy"],
)
def test_pickles(variant: str, through: Callable[[Any], Any]) -> None:
    problem = VARIANTS[variant]()
    size = len(pickle.dumps(problem))
    logsumexp = problem.logsumexp
    assert len(pickle.dumps(problem)) == size  # what was computed stays behind
    twin = through(problem)
    assert twin.digest == problem.digest
    assert (twin.scale, twin.causal, twin.name) == (problem.scale, problem.causal, problem.name)
    assert np.array_equal(twin.logsumexp, logsumexp)
    assert twin.logsumexp is not logsumexp
    assert not twin.q.flags.writeable


def test_pickling_keeps_the_name() -> None:
    problem = AttentionProblem(*arrays(), name="layer0.head1")
    assert pickle.loads(pickle.dumps(problem)).name == "layer0.head1"


def test_digests_tell_problems_apart() -> None:
    digests = {name: make().digest for name, make in VARIANTS.items()}
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests.values())
    assert len(set(digests.values())) == len(VARIANTS)
    assert {name: make().digest for name, make in VARIANTS.items()} == digests


def test_the_digest_is_about_the_problem_not_its_label() -> None:
    q, k, v = arrays()
    assert AttentionProblem(q, k, v, name="x").digest == AttentionProblem(q, k, v).digest
    named = AttentionProblem(q, k, v, scale=1 / math.sqrt(3))
    assert named.digest == AttentionProblem(q, k, v).digest


# --- precision and quantities that are kept -----------------------------------------------------


def test_astype() -> None:
    narrow = AttentionProblem(
        *arrays(5, dtype=np.float32),
        scale=0.3,
        causal=True,
        key_mask=[True] * 4 + [False],
        name="x",
    )
    assert narrow.astype(np.float32) is narrow
    wide = narrow.astype("float64")
    assert wide is narrow.astype(float)
    assert wide.dtype == np.float64
    assert (wide.scale, wide.causal, wide.name) == (0.3, True, "x")
    assert np.array_equal(wide.q, narrow.q)
    assert np.array_equal(wide.visible(), narrow.visible())
    assert wide.astype(np.float32).digest == narrow.digest
    assert AttentionProblem(*arrays()[:2]).astype(np.float32).v is None


@pytest.mark.parametrize("dtype", [np.float16, int, ">f8", "foo", None, BF16], ids=repr)
def test_astype_refuses(dtype: Any) -> None:
    with pytest.raises(
        TypeError,
        match=exactly(f"dtype must be float32 or float64, got {dtype!r}; use one of these"),
    ):
        AttentionProblem(*arrays()).astype(dtype)


def test_astype_refuses_numbers_that_overflow() -> None:
    q, k, v = arrays()
    k[3, 1] = 1e300
    with pytest.raises(
        ValueError,
        match=exactly(
            "k must be finite, got inf at index (3, 1); replace it, or hide its key with a mask"
        ),
    ):
        AttentionProblem(q, k, v).astype(np.float32)


def test_exact_quantities_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from sketchattn.operators import solve as operators

    calls = []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return solve(*arguments)

    solve = operators.solve
    monkeypatch.setattr(operators, "solve", counted)
    problem = AttentionProblem(*arrays())
    assert calls == []  # nothing is computed before it is asked for
    assert problem.output is problem.output
    assert problem.logsumexp is problem.logsumexp
    assert problem.exact is problem.exact
    assert problem.digest is problem.digest
    assert len(calls) == 1  # one pass gives the output and the logsumexp


def test_cached_values_have_one_key_each() -> None:
    problem, other = AttentionProblem(*arrays()), AttentionProblem(*arrays())
    made: list[str] = []

    def make(label: str) -> Callable[[], str]:
        def compute() -> str:
            made.append(label)
            return label

        return compute

    assert problem.cached("a", make("first")) == "first"
    assert problem.cached("a", make("again")) == "first"
    assert problem.cached(("a", 1), make("second")) == "second"
    assert other.cached("a", make("third")) == "third"
    assert made == ["first", "second", "third"]


def test_a_failed_computation_is_not_kept() -> None:
    problem = AttentionProblem(*arrays())

    def fail() -> int:
        raise MemoryError

    with pytest.raises(MemoryError):
        problem.cached("a", fail)
    assert problem.cached("a", lambda: 3) == 3


# --- the shared checks --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "error", "text"),
    [
        (0, ValueError, "between 1 and n_k = 7, got 0; raise rank or use method='exact'"),
        (-3, ValueError, "between 1 and n_k = 7, got -3; raise rank or use method='exact'"),
        (8, ValueError, "between 1 and n_k = 7, got 8; lower rank or use method='exact'"),
        (2.0, TypeError, "an integer, got float; give one in 1..n_k = 7"),
        (True, TypeError, "an integer, got bool; give one in 1..n_k = 7"),
        (None, TypeError, "an integer, got NoneType; give one in 1..n_k = 7"),
        ("3", TypeError, "an integer, got str; give one in 1..n_k = 7"),
    ],
)
def test_rank_is_checked(rank: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=exactly(f"rank must be {text}")):
        arguments.check_rank(rank, 7)


def test_ranks_at_the_boundary_are_fine() -> None:
    assert [arguments.check_rank(r, 7) for r in (1, 7, np.int32(7))] == [1, 7, 7]


def test_closest_names() -> None:
    known = ("exact", "uniform", "vmean")
    assert arguments.closest("exat", known) == "; did you mean 'exact'?"
    assert arguments.closest("linformer", ("zero", "exact")) == "; choose one of exact, zero"


def test_arrays_are_not_copied_without_need() -> None:
    x = arrays()[0]
    assert arguments.as_array(x, "x") is x
    assert arguments.prepare(x, np.dtype(np.float64)) is x
    assert np.shares_memory(arguments.as_array(OnlyArray(x), "x"), x)
    assert np.shares_memory(arguments.as_array(OnlyDlpack(x), "x"), x)


def test_bfloat16_tensors_are_widened_exactly() -> None:
    torch = pytest.importorskip("torch")
    x = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[torch.isfinite(x)]
    wide = arguments.as_array(x, "x")
    assert wide.dtype == np.float32
    assert np.array_equal(wide, x.double().numpy())


def test_an_adopted_problem_is_the_same_without_copies() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((5, 3)) for _ in range(3))
    adopted = AttentionProblem.adopt(q, k, v, scale=0.5, causal=True)
    assert adopted.arrays.q is q
    assert adopted.arrays.k is k
    assert adopted.arrays.v is v
    own = AttentionProblem(q, k, v, scale=0.5, causal=True)
    assert np.array_equal(adopted.output, own.output)
    assert repr(adopted) == repr(own)
    assert not adopted.q.flags.writeable
    assert AttentionProblem.adopt(q, k).scale == AttentionProblem(q, k).scale
    assert AttentionProblem.adopt(q, k).v is None


# Windows neither replaces nor removes a file that is mapped.
MAPS = ["r", "c"] if os.name == "nt" else ["r", "c", "replaced", "gone"]


@pytest.mark.parametrize("mode", MAPS)
def test_files_mapped_for_reading_are_not_copied(tmp_path: Path, mode: str) -> None:
    wanted = np.random.default_rng(0).standard_normal((3, 40, 4)).astype(np.float32)
    path = tmp_path / "heads.npy"
    np.save(path, wanted)
    stack = np.load(path, mmap_mode="c" if mode == "c" else "r")
    if mode == "replaced":
        np.save(tmp_path / "other.npy", wanted + 1)
        os.replace(tmp_path / "other.npy", path)
    if mode == "gone":
        path.unlink()
    problem = sa.AttentionProblem(stack[0, 8:], np.asarray(stack[1, 8:]), stack[2, 8:])
    for own, given, right in zip(problem.arrays, stack, wanted, strict=True):
        assert own is not None
        assert np.array_equal(own, right[8:])
        assert own.flags.writeable
        assert not np.shares_memory(own, given)
        assert isinstance(own.base, np.memmap) == (mode == "r")
    if mode == "c":  # which its owner may change
        stack[1] = 0
    assert np.array_equal(pickle.loads(pickle.dumps(problem)).k, wanted[1, 8:])
    assert np.array_equal(sa.attention(*stack[:, 8:]), sa.attention(*np.asarray(stack[:, 8:])))
