"""Skeinformer against exact attention."""

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
    memory_row,
    normal,
    rounding_row,
    time_both,
)


@benchmark("skeinformer", "skeinformer against exact attention: time, growth, memory, error")
def _skeinformer(quick: bool, rounds: int) -> Iterator[Row]:
    from ..zoo.skeinformer.method import Skeinformer

    n, r = (2048, 64) if quick else (16384, 256)
    q, k, v = (x[0] for x in normal(1, n, 64))
    calls: dict[str, Callable[[], object]] = {
        "ours": partial(attention, q, k, v, "skeinformer", rank=r, rng=0),
        "exact": partial(attention, q, k, v),
    }
    seconds = time_both(calls, rounds)
    size = f"1 head, n={n}, d=64, r={r}"
    yield compare(
        "skeinformer",
        size,
        seconds,
        "ours",
        "exact",
        target=1 / 12,
    )
    longer = [x[0] for x in normal(1, 8 * n, 64)]
    calls = {
        "long": partial(attention, *longer, "skeinformer", rank=r, rng=0),
        "short": partial(attention, q, k, v, "skeinformer", rank=r, rng=0),
    }
    seconds = time_both(calls, rounds)
    yield compare(
        "skeinformer",
        f"1 head, n={8 * n}, d=64, r={r}",
        seconds,
        "long",
        "short",
        against=f"n={n}",
        target=9.0,
    )
    yield memory_row(
        "skeinformer", f"1 head, n={8 * n}", 8 * n, 200.0, method="skeinformer", rank=256, rng=0
    )
    yield rounding_row("skeinformer", size, Skeinformer(rank=r), AttentionProblem(q, k, v))
    yield many_heads_row("skeinformer", Skeinformer(rank=64), rounds)
