"""A step of a decoder against exact attention of one row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..heads.families import make_heads
from ..problem import AttentionProblem
from .harness import Row, benchmark, compare, import_torch, make_row, sdpa, time_both

if TYPE_CHECKING:
    from ..zoo.decoding import DecodingState

Array = NDArray[Any]

# Rows of a call: each reads keys of its own choice.
STEPS = 16
# Share of the time of exact attention at 65536 keys; the error that it is for.
LENGTH, TARGET, ERROR = 65536, 0.15, 0.05
# Heads with topics, whose rows read few keys; and diffuse ones, whose rows read all that they may.
TOPICS: dict[str, Any] = {"family": "clustered", "clusters": 64, "noise": 0.7}
DIFFUSE: dict[str, Any] = {"family": "ar1"}


@benchmark("decode", "a step of a decoder, one query row, against exact attention")
def _decode(quick: bool, rounds: int) -> Iterator[Row]:
    from ..zoo.baselines import Exact
    from ..zoo.nearfar import NearFar

    torch = import_torch()
    lengths = (256, 1024) if quick else (4096, 16384, LENGTH, 262144)
    heads = [(n, TOPICS) for n in lengths] + [(1024 if quick else LENGTH, DIFFUSE)]
    for n, recipe in heads:
        head = make_heads(n=n, d=64, rng=0, **recipe)[0]
        prompt = AttentionProblem(head.q, head.k, head.v, causal=True)
        q, k, v = (x.copy() for x in (head.q, head.k, head.values))
        near, exact = NearFar().state(prompt), Exact().state(prompt)
        last = q[-STEPS:]
        calls: dict[str, Callable[[], object]] = {
            "nearfar": partial(_steps, near.attend, last),
            "exact": partial(_steps, exact.attend, last),
            "NumPy": partial(_steps, partial(_row, k, v), last),
        }
        if torch is not None:
            one = [sdpa(torch, (x[None, None], k[None], v[None])) for x in last]
            calls["torch SDPA"] = partial(_each, one)
        seconds = time_both(calls, rounds)
        size = f"n={n}, d=64, {recipe['family']}"
        target = TARGET if n == LENGTH and recipe is TOPICS else None
        for name in list(calls)[1:]:
            yield compare(
                "decode",
                f"{STEPS} steps, {size}",
                seconds,
                "nearfar",
                name,
                target=target,
                one_target=target,
            )
        # What becomes of keys as they come: a block is clustered when it is complete.
        count = min(n, 2048)
        empty = AttentionProblem(q[:0], k[:0], v[:0], scale=head.scale, causal=True)
        appended: dict[str, Callable[[], object]] = {
            "append": partial(_append, partial(NearFar().state, empty, n), k[:count], v[:count]),
            "exact": calls["exact"],
        }
        yield compare(
            "decode",
            f"append {count} of {size}, against steps",
            time_both(appended, rounds),
            "append",
            "exact",
            factor=count / STEPS,
        )
        truth = exact.attend(last)
        error = np.linalg.norm(near.attend(last) - truth) / np.linalg.norm(truth)
        yield make_row(
            "decode",
            f"error of {STEPS} rows, {size}",
            [float(error)],
            against="limit",
            theirs=[ERROR],
            target=None,
            unit="rel",
        )


def _steps(attend: Callable[[Array], object], rows: Array) -> None:
    for row in rows:
        attend(row)


def _each(calls: list[Callable[[], object]]) -> None:
    for call in calls:
        call()


def _append(make: Callable[[], DecodingState], k: Array, v: Array) -> None:
    state = make()
    for key, value in zip(k, v, strict=True):
        state.append(key, value)


def _row(k: Array, v: Array, q: Array) -> Array:
    """Return a row by the plain formula: two products of a matrix and a vector."""
    logits = k @ q
    logits *= np.float32(1 / math.sqrt(len(q)))
    logits -= logits.max()
    weights = np.exp(logits, out=logits)
    weights /= weights.sum()
    out: Array = weights @ v
    return out
