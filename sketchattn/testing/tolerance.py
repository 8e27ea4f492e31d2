"""How far a correct program may be from the truth: derived from the input, never chosen.

``tol = c e_lp + a``: twice (three times with a softcap) the error of a program that computes the
same in low precision on the same input, the rule of two of FlashAttention's tests, and a floor of
two roundings of the output.  Beside it stands a ceiling that rounding cannot exceed: an error
between the two is suspect, one above it is a mistake.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dense import Parts, Product, combine, in_sequence, logits, softmax, weights
from .inputs import ROUNDOFF, Case, rounded

Array = NDArray[Any]

# Published tolerances (atol, rtol), reported beside the derived one and never used.
YARDSTICKS: dict[str, dict[str, tuple[float, float]]] = {
    "torch.testing": {
        "float64": (1e-7, 1e-7),
        "float32": (1e-5, 1.3e-6),
        "float16": (1e-5, 1e-3),
        "bfloat16": (1e-5, 1.6e-2),
    },
    "xformers": {
        "float32": (3e-4, 2e-5),
        "float16": (4e-3, 4e-4),
        "bfloat16": (2e-2, 5e-3),
    },
    "triton tutorial": dict.fromkeys(("float32", "float16", "bfloat16"), (1e-2, 0.0)),
    "kernelbench": dict.fromkeys(("float32", "float16", "bfloat16"), (1e-2, 1e-2)),
}


@dataclass(frozen=True)
class Tolerance:
    """Hold what the error of one output may be.

    Attributes
    ----------
    e_lp : float
        Largest error of the low-precision programs, 0 for float64.
    floor : float
        What is allowed where that is 0.
    tol : float
    ceiling : array of the shape of the output
        What rounding alone cannot exceed.
    """

    e_lp: float
    floor: float
    tol: float
    ceiling: Array


def growth(terms: int, unit: float) -> float:
    """Return ``gamma_N = N w / (1 - N w)``, the relative error of N roundings."""
    return terms * unit / (1 - terms * unit)


def units(dtype: str) -> tuple[float, float]:
    """Return the roundoff of the accumulator, and that of the dtype where it is larger, else 0."""
    w = ROUNDOFF["float64" if dtype == "float64" else "float32"]
    u = ROUNDOFF[dtype]
    return w, (u if u > w else 0.0)


def single(p: Parts) -> Parts:
    """Return the same parts in float32."""
    return Parts(
        q=p.q.astype(np.float32),
        k=p.k.astype(np.float32),
        v=p.v.astype(np.float32),
        scale=p.scale,
        softcap=p.softcap,
        bias=None if p.bias is None else p.bias.astype(np.float32),
        seen=p.seen,
        sink=None if p.sink is None else p.sink.astype(np.float32),
        empty_row=p.empty_row,
    )


def low_logits(p: Parts, dtype: str, where: str) -> Array:
    """Return logits with every named array rounded; the scale is on q, on k, or comes after."""
    s = np.float32(p.scale)
    q, k = p.q, np.swapaxes(p.k, -1, -2)
    if where == "q":
        x = rounded(rounded(s * q, dtype) @ k, dtype)
    elif where == "k":
        x = rounded(q @ rounded(s * k, dtype), dtype)
    else:
        x = rounded(rounded(q @ k, dtype) * s, dtype)
    if p.softcap:
        cap = np.float32(p.softcap)
        x = rounded(cap * rounded(np.tanh(rounded(x / cap, dtype)), dtype), dtype)
    return x if p.bias is None else rounded(x + p.bias, dtype)


def online(p: Parts) -> Array:
    """Return the output in float32 with sums one after the other, and the division at the end."""
    x = logits(p, in_sequence)
    shown = np.where(p.seen, x, np.float32(-np.inf))
    top = shown.max(axis=-1, keepdims=True, initial=-np.inf)
    if p.sink is not None:
        top = np.maximum(top, p.sink[:, None, None])
    top = np.where(np.isneginf(top), np.float32(0), top)
    powers = np.exp(shown - top)
    total = np.zeros_like(top)
    out = np.zeros((*p.seen.shape[:-1], p.v.shape[-1]), np.float32)
    for j in range(p.k.shape[-2]):
        total += powers[..., j, None]
        out += powers[..., j, None] * p.v[..., None, j, :]
    if p.sink is not None:
        total = total + np.exp(p.sink[:, None, None] - top)
    out = out / np.where(total == 0, np.float32(1), total)
    return combine(np.zeros_like(x), p) + out


def base_two(p: Parts, multiply: Product = np.matmul) -> Array:
    """Return the logits in float32 times log2(e): many kernels have ``exp2`` for ``exp``.

    The factor goes into the scale, and that on q, so that logits that were exact are rounded and
    those that were equal are not.
    """
    factor = np.log2(math.e)
    if p.softcap or p.bias is not None:
        return logits(p, multiply) * np.float32(factor)
    return multiply(np.float32(p.scale * factor) * p.q, np.swapaxes(p.k, -1, -2))


def baselines(case: Case) -> Iterator[Array]:
    """Yield the outputs of correct programs in low precision, none for float64."""
    if case.dtype == "float64":
        return
    p = single(case.parts())
    for where in ("q", "k", "after"):
        a = rounded(softmax(low_logits(p, case.dtype, where), p.seen, p.sink), case.dtype)
        yield rounded(combine(a, p), case.dtype)
    if case.dtype == "float32":
        yield online(p)
        sink = None if p.sink is None else p.sink * np.float32(np.log2(math.e))
        yield combine(softmax(base_two(p), p.seen, sink, np.exp2), p)


def spread(p: Parts, dtype: str) -> Array:
    """Bound the error of the logits of each row, (B, H, n_q)."""
    w, u = units(dtype)
    sizes = abs(p.scale) * (np.abs(p.q) @ np.swapaxes(np.abs(p.k), -1, -2))
    more = 3 * (u + w) if p.softcap else 0.0
    eta = sizes * (growth(p.q.shape[-1] + 2, w) + 3 * u + 2 * w + more)
    if p.bias is not None:
        eta = eta + (w + u) * np.abs(p.bias)
    bound: Array = np.where(p.seen, eta, 0.0).max(axis=-1, initial=0.0)
    return bound


def ceiling(case: Case) -> Array:
    """Bound what rounding can do to the output, entry by entry.

    ``[exp(2 eta_i) (1 + gamma_(2 n_k + 12)) (1 + 3 u') - 1] sum_j A_ij |V_jc|``: logits off by at
    most eta change a weight by a factor between ``exp(-2 eta)`` and ``exp(2 eta)``; gamma counts
    the exponential, two sums and the division, the last factor the roundings of P and O.
    """
    p = case.parts()
    w, u = units(case.dtype)
    n_k = p.k.shape[-2]
    with np.errstate(over="ignore"):
        factor = np.expm1(2 * spread(p, case.dtype))
    factor = (1 + factor) * (1 + growth(2 * n_k + 12, w)) * (1 + 3 * u) - 1
    size = combine(weights(p), Parts(**{**vars(p), "v": np.abs(p.v)}))
    bound: Array = factor[..., None] * size
    return bound


def floor(truth: Array, dtype: str) -> float:
    """Return twice the error of adding and subtracting 0.3, and of one rounding of the output."""
    if not truth.size:
        return 0.0
    near = rounded(truth, dtype)
    third = near.dtype.type(0.3)
    moved = np.abs(rounded(rounded(near + third, dtype) - third, dtype) - near).max()
    return max(2 * float(moved), 2 * ROUNDOFF[dtype] * float(np.abs(truth).max()))


def tolerance(case: Case, truth: Array) -> Tolerance:
    """Return what the output of a case may be off by."""
    top = ceiling(case)
    if case.dtype == "float64":
        return Tolerance(0.0, 0.0, float(top.max(initial=0.0)), top)
    with np.errstate(all="ignore"):
        e_lp = max(float(np.abs(out - truth).max(initial=0.0)) for out in baselines(case))
    a = floor(truth, case.dtype)
    return Tolerance(e_lp, a, (3 if case.softcap else 2) * e_lp + a, top)


def logsumexp_tolerance(case: Case, truth: Array) -> Array:
    """Bound what rounding can do to the logsumexp of each row, absolutely."""
    p = case.parts()
    w, _ = units(case.dtype)
    finite = np.where(np.isfinite(truth), np.abs(truth), 0.0)
    # A library may return it in the dtype of its inputs.
    bound: Array = (
        spread(p, case.dtype)
        + growth(p.k.shape[-2] + 10, w)
        + (2 * ROUNDOFF[case.dtype] + 4 * w) * (finite + 1)
    )
    return bound


def would_pass(case: Case, out: Array, truth: Array) -> dict[str, bool]:
    """Say by which published tolerances an output would pass."""
    verdicts = {}
    for name, table in YARDSTICKS.items():
        if case.dtype in table:
            atol, rtol = table[case.dtype]
            verdicts[name] = bool(np.all(np.abs(out - truth) <= atol + rtol * np.abs(truth)))
    return verdicts


def logits_of(case: Case) -> Array:
    """Return the logits of a case in float64, hidden ones included."""
    return logits(case.parts())
