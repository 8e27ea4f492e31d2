"""Nystromformer, dba and performer against exact attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ..functional.batched import attention
from ..problem import AttentionProblem
from .harness import Row, benchmark, compare, normal, rounding_row, time_both


@benchmark("nystromformer", "nystromformer against exact attention: time, and error of float32")
def _nystromformer(quick: bool, rounds: int) -> Iterator[Row]:
    from ..zoo.nystromformer import Nystromformer

    n, r = (2048, 64) if quick else (16384, 256)
    yield from _against_exact("nystromformer", Nystromformer(rank=r), n, rounds, 1 / 8)


@benchmark("dba", "dba without training against exact attention: time, and error of float32")
def _dba(quick: bool, rounds: int) -> Iterator[Row]:
    from ..zoo.dba.method import DBA

    n, r = (2048, 64) if quick else (16384, 256)
    yield from _against_exact("dba", DBA(rank=r), n, rounds, 1 / 5)


@benchmark("performer", "performer against exact attention: time, and error of float32")
def _performer(quick: bool, rounds: int) -> Iterator[Row]:
    from ..zoo.performer import Performer

    n, r = (2048, 64) if quick else (16384, 256)
    yield from _against_exact("performer", Performer(rank=r), n, rounds, 1 / 8)
    yield from _against_exact("performer", Performer(rank=r), n, rounds, None, causal=True)


def _against_exact(
    benchmark: str, method: Any, n: int, rounds: int, target: float | None, *, causal: bool = False
) -> Iterator[Row]:
    """Measure a method at one head of width 64: its time, and its rounding in float32."""
    q, k, v = (x[0] for x in normal(1, n, 64))
    calls: dict[str, Callable[[], object]] = {
        "ours": partial(attention, q, k, v, method, rng=0, causal=causal),
        "exact": partial(attention, q, k, v, causal=causal),
    }
    seconds = time_both(calls, rounds)
    size = f"1 head, n={n}, d=64, r={method.rank}{', causal' if causal else ''}"
    yield compare(
        benchmark,
        size,
        seconds,
        "ours",
        "exact",
        target=target,
    )
    problem = AttentionProblem(q, k, v, causal=causal)
    yield rounding_row(benchmark, f"n={n}{', causal' if causal else ''}", method, problem)
