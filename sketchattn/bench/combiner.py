"""Combiner against exact attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ..functional.batched import attention
from ..problem import AttentionProblem
from .harness import Row, benchmark, compare, memory_row, normal, rounding_row, time_both


@benchmark("combiner", "combiner against exact attention: time, growth to 1M, memory, error")
def _combiner(quick: bool, rounds: int) -> Iterator[Row]:
    from ..zoo.combiner.method import Combiner

    n, block = (2048, 64) if quick else (16384, 128)
    q, k, v = (x[0] for x in normal(1, n, 64))
    longer = [x[0] for x in normal(1, 4 * n, 64)]
    calls: dict[str, Callable[[], object]] = {
        "fixed": partial(attention, q, k, v, "combiner", block=block),
        "logsparse": partial(attention, *longer, "combiner", pattern="logsparse"),
        "exact": partial(attention, q, k, v),
    }
    seconds = time_both(calls, rounds)
    size = f"fixed, 1 head, n={n}, d=64, block={block}"
    yield compare(
        "combiner",
        size,
        seconds,
        "fixed",
        "exact",
        target=1 / 8,
    )
    yield compare(
        "combiner",
        f"logsparse, 1 head, n={4 * n}, d=64",
        seconds,
        "logsparse",
        "exact",
        against="16 x exact, n/4",
        factor=16,
        target=1 / 40,
    )
    yield rounding_row("combiner", size, Combiner(block=block), AttentionProblem(q, k, v))
    # From here on causal, as a model of a million tokens would be.
    m, spans = (4 * n, (64, 128)) if quick else (1 << 18, (512, 1024))
    short, long = ([x[0] for x in normal(1, size, 64)] for size in (m, 4 * m))
    for pattern, blocks, target in (("logsparse", (1, 1), 4.6), ("fixed", spans, 8.5)):
        options: list[Any] = [{"pattern": pattern, "block": x, "causal": True} for x in blocks]
        calls = {
            "long": partial(attention, *long, "combiner", **options[1]),
            "short": partial(attention, *short, "combiner", **options[0]),
        }
        seconds = time_both(calls, min(rounds, 5))
        name = pattern if pattern == "logsparse" else f"{pattern}, block={blocks[1]}"
        yield compare(
            "combiner",
            f"{name}, causal, 1 head, n={4 * m}, d=64",
            seconds,
            "long",
            "short",
            against=f"n={m}",
            target=target,
        )
        yield memory_row(
            "combiner", f"{name}, n={4 * m}", 4 * m, 1000.0, method="combiner", **options[1]
        )
