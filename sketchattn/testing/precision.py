"""What correct programs of lower precision get wrong, computed without low precision.

Arithmetic in float32 and float16 differs from machine to machine.  Roundings are made on purpose
instead: of every named array of exact attention, or as changes of one roundoff of the inputs of a
method.  The errors that these cause depend on the inputs alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..problem import AttentionProblem
from ..zoo.base import Method
from .dense import Parts, combine, softmax
from .inputs import ROUNDOFF, rounded
from .lattice import signs

Array = NDArray[Any]
Given = Mapping[str, Array]

# Independent patterns of signs that inputs of a method are changed by.
PATTERNS = 4


# --- exact attention ------------------------------------------------------------------------------


def low_logits(p: Parts, dtype: str) -> Iterator[Array]:
    """Yield logits in which every named array is rounded; the scale is on q, on k, or after."""

    def r(x: Array) -> Array:
        return rounded(x, dtype).astype(np.float64)

    q, k, s = p.q, np.swapaxes(p.k, -1, -2), p.scale
    for x in (r(r(s * q) @ k), r(q @ r(s * k)), r(r(q @ k) * s)):
        if p.softcap:
            x = r(p.softcap * r(np.tanh(r(x / p.softcap))))
        yield x if p.bias is None else r(x + p.bias)


def low_outputs(p: Parts, dtype: str) -> Iterator[Array]:
    """Yield outputs of correct programs in low precision."""
    for x in low_logits(p, dtype):
        weights = rounded(softmax(x, p.seen, p.sink), dtype).astype(np.float64)
        yield rounded(combine(weights, p), dtype).astype(np.float64)
    if dtype == "float32":
        yield _in_sequence(p)


def _in_sequence(p: Parts) -> Array:
    """Return the output with sums one after the other, each rounded to float32."""

    def r(x: Array) -> Array:
        return np.asarray(x, np.float64).astype(np.float32).astype(np.float64)

    x = np.zeros(p.seen.shape)
    for t in range(p.q.shape[-1]):
        x = r(x + r(p.q[..., :, t, None] * p.k[..., None, :, t]))
    x = r(x * p.scale)
    if p.softcap:
        x = r(p.softcap * r(np.tanh(r(x / p.softcap))))
    if p.bias is not None:
        x = r(x + p.bias)
    shown = np.where(p.seen, x, -np.inf)
    top = shown.max(axis=-1, keepdims=True, initial=-np.inf)
    extra = None if p.sink is None else p.sink[:, None, None]
    if extra is not None:
        top = np.maximum(top, extra)
    top = np.where(np.isneginf(top), 0.0, top)
    powers = r(np.exp(r(shown - top)))
    total = np.zeros_like(top)
    out = np.zeros((*p.seen.shape[:-1], p.v.shape[-1]))
    for j in range(p.k.shape[-2]):
        total = r(total + powers[..., j, None])
        out = r(out + r(powers[..., j, None] * p.v[..., None, j, :]))
    if extra is not None:
        total = r(total + r(np.exp(r(extra - top))))
    return r(out / np.where(total == 0, 1.0, total))


# --- any method -----------------------------------------------------------------------------------


def unit_of(dtype: str, d: int) -> float:
    """Return what inputs are changed by: the roundoff, and what a sum of d terms gathers of it.

    Roundings of a sum one after the other add up like a random walk, to ``sqrt(d)`` of them; the
    sums of half precisions are kept in float32, where they do not count.
    """
    return ROUNDOFF[dtype] * (d**0.5 if dtype in ("float32", "float64") else 1.0)


def changed(
    problem: AttentionProblem, draw: Given, unit: float, name: str
) -> tuple[AttentionProblem, dict[str, Array]]:
    """Return a problem and a draw in which everything is off by one roundoff, up or down.

    Queries and keys change by a factor a row, so that logits are off by ``unit |L_ij|`` each as if
    they had been rounded; values change by a factor a row, as if weights had been.
    """

    def by_row(x: Array, label: str) -> Array:
        return x * (1 + unit * signs(f"{name}/{label}", (len(x), 1)))

    off = AttentionProblem(
        by_row(problem.q, "q"),
        by_row(problem.k, "k"),
        by_row(problem.values, "v"),
        scale=problem.scale,
        causal=problem.causal,
        key_mask=problem.key_mask,
    )
    moved = {
        label: x * (1 + unit * signs(f"{name}/{label}", x.shape))
        if np.issubdtype(x.dtype, np.floating)
        else x
        for label, x in draw.items()
    }
    return off, moved


def run(method: Method, problem: AttentionProblem, draw: Given) -> Array:
    """Return the output of a method for a draw."""
    return np.asarray(method.attend(problem, draw=draw))


def run_changed(
    method: Method, problem: AttentionProblem, draw: Given, unit: float, name: str
) -> Array:
    """Return the output for changed inputs; of a draw that must not change only the inputs do."""
    off, moved = changed(problem, draw, unit, name)
    try:
        return run(method, off, moved)
    except (TypeError, ValueError):
        return run(method, off, draw)


def method_errors(
    method: Method,
    problems: Sequence[AttentionProblem],
    draws: Sequence[Given],
    out: Array,
    unit: float,
) -> float:
    """Return the largest error that roundings of the inputs and the draw cause.

    Parameters
    ----------
    method : Method
    problems, draws : sequences, one entry a head
        In float64.
    out : float64 array (H, n_q, d_v)
        The outputs without them.
    unit : float
        The roundoff.
    """
    worst = 0.0
    for h, (problem, draw) in enumerate(zip(problems, draws, strict=True)):
        for pattern in range(PATTERNS):
            made = run_changed(method, problem, draw, unit, f"{unit}/{pattern}/{h}")
            worst = max(worst, float(np.abs(made - out[h]).max(initial=0.0)))
    return worst


def wrong_answers(out: Array, v: Array, exact: Array | None) -> dict[str, Array]:
    """Return what programs that are wrong give in the place of ``out`` (..., n_q, d_v)."""
    wrong = {
        "zeros": np.zeros_like(out),
        "mean of V": np.broadcast_to(v.mean(axis=-2, keepdims=True), out.shape),
        "rows in reverse": out[..., ::-1, :],
    }
    if exact is not None:
        wrong["exact attention"] = exact
    # An answer that happens to be right is not wrong.
    return {name: x for name, x in wrong.items() if np.abs(x - out).max(initial=0.0) > 1e-6}
