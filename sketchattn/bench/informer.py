"""Informer against exact attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from ..functional.batched import attention
from ..problem import AttentionProblem
from .harness import (
    Row,
    benchmark,
    compare,
    many_heads_row,
    normal,
    rounding_row,
    time_both,
)


@benchmark("informer", "informer against exact attention: time, and error of float32")
def _informer(quick: bool, rounds: int) -> Iterator[Row]:
    from ..zoo.informer.method import Informer

    n, r, u = (2048, 64, 16) if quick else (16384, 256, 64)
    q, k, v = (x[0] for x in normal(1, n, 64))
    size = f"1 head, n={n}, d=64, r={r}, U={u}"
    for sampling in ("per_query", "shared"):
        method = Informer(rank=r, samples=u, key_sampling=sampling)
        calls: dict[str, Callable[[], object]] = {
            "ours": partial(attention, q, k, v, method, rng=0),
            "exact": partial(attention, q, k, v),
        }
        seconds = time_both(calls, rounds)
        yield compare(
            "informer",
            f"{size}, {sampling}",
            seconds,
            "ours",
            "exact",
            target=1 / 8 if sampling == "per_query" else None,
        )
    method = Informer(rank=r, samples=u)
    yield rounding_row("informer", f"n={n}, r={r}, U={u}", method, AttentionProblem(q, k, v))
    yield many_heads_row("informer", Informer(rank=64, samples=32), rounds)
