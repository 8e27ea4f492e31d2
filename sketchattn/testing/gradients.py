"""Gradients by random cotangents: the same rule of two, and the same proof by wrong programs.

For a cotangent ``G``: ``dV = A^T G``, ``dL = A (G V^T - delta)`` with ``delta_i = G_i . O_i``,
times the derivative of the softcap, ``dQ = scale dL K`` and ``dK = scale dL^T Q``, summed over the
query heads that share a key head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..functional.vjp import attention_vjp
from .dense import Parts, in_sequence, logits, scaled_logits, softmax, weights
from .inputs import Case, numbers, rounded
from .tolerance import base_two, floor, growth, low_logits, single, spread, units

Array = NDArray[Any]
Triple = tuple[Array, Array, Array]
Round = Callable[[Array], Array]

NAMES = ("dq", "dk", "dv")
# What a backward pass can forget of a feature, and the case that it then differentiates.
_IGNORED: dict[str, tuple[str, dict[str, Any]]] = {
    "causal": ("causal", {"causal": False}),
    "bool_mask": ("mask", {"mask": None}),
    "additive_mask": ("added mask", {"mask": None}),
    "key_mask": ("padding of keys", {"key_mask": None}),
    "window": ("window", {"window": None}),
}
# Orders of summation of a second pass: the largest error of one program is a matter of chance where
# one weight decides it.
_STRIDES = (1, -1, 2, -2, 4, -4, 8, -8)
# The factor of the rule of two for gradients, as in FlashAttention's tests.
FACTOR = 3.0


def cotangent(case: Case, seed: int) -> Array:
    """Return normal numbers of the dtype, (B, H, n_q, d_v)."""
    shape = (*case.q.shape[:3], case.v.shape[3])
    return numbers(np.random.default_rng((seed, 300)).standard_normal(shape), case.dtype)


def true_gradients(case: Case, g: Array) -> Triple:
    """Return dq, dk and dv in float64, by the reference."""
    dq, dk, dv = attention_vjp(
        case.q, case.k, case.v, g, compute_dtype=np.float64, **case.options()
    )
    return dq, dk, dv


def _transposed(x: Array) -> Array:
    return np.swapaxes(x, -1, -2)


def _grouped(x: Array, group: int) -> Array:
    """Return the sums over the query heads of each key head."""
    if group == 1:
        return x
    b, h, n, d = x.shape
    summed: Array = x.reshape(b, h // group, group, n, d).sum(axis=2)
    return summed


def _exact(x: Array) -> Array:
    return x


def backward(
    p: Parts,
    g: Array,
    group: int,
    a: Array,
    rnd: Round = _exact,
    *,
    delta: bool = True,
    scale: bool = True,
    cap: bool = True,
    summed: bool = True,
    keep: bool = False,
) -> Triple:
    """Return the gradients with every named array rounded; a flag that is off is a mistake.

    ``keep`` leaves the products of weights and their derivatives unrounded.
    """
    d_a = g @ _transposed(p.v)
    d_a = d_a if keep else rnd(d_a)
    centre = (a * d_a).sum(axis=-1, keepdims=True) if delta else d_a.dtype.type(0)
    d_l = a * (d_a - centre)
    if p.softcap and cap:
        d_l = d_l * (1 - np.tanh(scaled_logits(p) / d_l.dtype.type(p.softcap)) ** 2)
    d_l = rnd(d_l)
    s = d_l.dtype.type(p.scale if scale else 1.0)
    d_q, d_k = s * (d_l @ p.k), s * (_transposed(d_l) @ p.q)
    d_v = _transposed(a) @ g
    if not summed:
        return rnd(d_q), rnd(d_k[:, ::group]), rnd(d_v[:, ::group])
    return rnd(d_q), rnd(_grouped(d_k, group)), rnd(_grouped(d_v, group))


def _recomputed(first: Array, again: Array, seen: Array, exp: Round, log: Round) -> Array:
    """Return the weights as ``exp(L - lse)``, from a logsumexp that was kept in float32.

    ``again`` are the logits ``first`` as a pass with other tiles has them, which sums in another
    order.
    """
    shown = np.where(seen, first, np.float32(-np.inf))
    top = shown.max(axis=-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isneginf(top), np.float32(0), top)
    lse = top + log(exp(shown - top).sum(axis=-1, keepdims=True))
    a: Array = np.where(seen, exp(again - lse), np.float32(0))
    return a


def baselines(case: Case, g: Array) -> Iterator[Triple]:
    """Yield the gradients of correct programs in low precision."""
    p, small = single(case.parts()), g.astype(np.float32)

    def rnd(x: Array) -> Array:
        return rounded(x, case.dtype)

    for where in ("q", "k", "after"):
        a = rnd(softmax(low_logits(p, case.dtype, where), p.seen, p.sink))
        for keep in (False, True):
            yield backward(p, small, case.group, a, rnd, keep=keep)
    if case.dtype == "float32":
        a = softmax(low_logits(p, "float32", "after"), p.seen, p.sink)
        for of, exp, log in ((logits, np.exp, np.log), (base_two, np.exp2, np.log2)):
            first = of(p)
            for stride in _STRIDES:
                again = of(p, partial(in_sequence, stride=stride))
                kept = _recomputed(first, again, p.seen, exp, log)
                yield backward(p, small, case.group, kept)
        d_a = in_sequence(small, _transposed(p.v))
        d_l = a * (d_a - np.cumsum(a * d_a, axis=-1)[..., -1:])
        if p.softcap:
            d_l = d_l * (1 - np.tanh(scaled_logits(p) / np.float32(p.softcap)) ** 2)
        s = np.float32(p.scale)
        yield (
            s * in_sequence(d_l, p.k),
            _grouped(s * in_sequence(_transposed(d_l), p.q), case.group),
            _grouped(in_sequence(_transposed(a), small), case.group),
        )


def ceilings(case: Case, g: Array) -> Triple:
    """Bound what rounding can do to each gradient, entry by entry.

    Every weight, and every derivative of a logit through two of them, is off by factors as in the
    ceiling of the output; differences are replaced by sums of sizes, so that the factors bound
    them too.
    """
    p = case.parts()
    w, u = units(case.dtype)
    a, size = weights(p), np.abs(g)
    n = sum((*p.seen.shape[-2:], p.q.shape[-1], p.v.shape[-1]))
    eta = spread(p, case.dtype)[..., None]
    with np.errstate(over="ignore"):
        off = np.exp(6 * eta) * (1 + growth(4 * n + 40, w)) * (1 + 8 * u) - 1
    d_a = size @ _transposed(np.abs(p.v))
    d_l = off * a * (d_a + (a * d_a).sum(axis=-1, keepdims=True))
    s = abs(p.scale)
    return (
        s * (d_l @ np.abs(p.k)),
        _grouped(s * (_transposed(d_l) @ np.abs(p.q)), case.group),
        _grouped(_transposed(off * a) @ size, case.group),
    )


@dataclass(frozen=True)
class GradientTolerance:
    """Hold, for dq, dk and dv each, what their errors may be; see ``Tolerance``."""

    e_lp: tuple[float, float, float]
    floors: tuple[float, float, float]
    tol: tuple[float, float, float]
    ceilings: Triple


def gradient_tolerance(case: Case, g: Array, truth: Triple) -> GradientTolerance:
    """Return what the gradients of a case may be off by."""
    top = ceilings(case, g)
    if case.dtype == "float64":
        none = (0.0, 0.0, 0.0)
        largest = tuple(float(x.max(initial=0.0)) for x in top)
        return GradientTolerance(none, none, (largest[0], largest[1], largest[2]), top)
    e = np.zeros(3)
    with np.errstate(all="ignore"):
        for found in baselines(case, g):
            errors = [np.abs(x - y).max() for x, y in zip(found, truth, strict=True)]
            e = np.maximum(e, errors)
    a = np.array([floor(x, case.dtype) for x in truth])
    tol = FACTOR * e + a

    def three(x: Array) -> tuple[float, float, float]:
        return float(x[0]), float(x[1]), float(x[2])

    return GradientTolerance(three(e), three(a), three(tol), top)


# --- wrong programs -------------------------------------------------------------------------------


def wrong_gradients(case: Case, g: Array, truth: Triple) -> Iterator[tuple[str, Triple]]:
    """Yield the names and gradients of programs that differentiate wrongly."""
    p = case.parts()
    a = weights(p)
    dq, dk, dv = truth

    def without(**flags: Any) -> Triple:
        return backward(p, g, case.group, a, **flags)

    yield "gradient: delta dropped", without(delta=False)
    yield "gradient: scale missing", without(scale=False)
    if dq.shape == dk.shape:
        yield "gradient: dQ and dK swapped", (dk, dq, dv)
    if dk.shape == dv.shape:
        yield "gradient: dK and dV swapped", (dq, dv, dk)
    if case.softcap:
        yield "gradient: no derivative of the softcap", without(cap=False)
    if case.group > 1:
        yield "gradient: not summed over the group", without(summed=False)
    if case.feature in _IGNORED:
        name, neutral = _IGNORED[case.feature]
        yield f"gradient: {name} ignored", true_gradients(replace(case, **neutral), g)
