"""Skeinformer and Informer against exact attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ..problem import AttentionProblem
from .harness import Row, child, make_row, normal, register, rounding_row, time_interleaved

# Where Linux tells it, the peak of this program's own memory: the maximum that getrusage gives
# starts from that of the process which started this one.
SKEINFORMER_MEMORY = """
import re, resource, sys
import numpy as np
from sketchattn import attention
def peak():
    try:
        with open("/proc/self/status") as file:
            return int(re.search(r"VmHWM:\\s*(\\d+)", file.read()).group(1)) * 1024
    except (OSError, AttributeError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
n = int(sys.argv[1])
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((n, 64), np.float32) for _ in range(3))
attention(q[:2048], k[:2048], v[:2048], "skeinformer", rank=256, rng=0)
before = peak()
out = attention(q, k, v, "skeinformer", rank=256, rng=0)
print(peak() - before - out.nbytes)
"""


@register("skeinformer", "skeinformer against exact attention: time, growth, memory, error")
def _skeinformer(quick: bool, rounds: int) -> Iterator[Row]:
    from ..functional.batched import attention
    from ..zoo.skeinformer.method import Skeinformer

    n, r = (2048, 64) if quick else (16384, 256)
    q, k, v = (x[0] for x in normal(1, n, 64))
    calls: dict[str, Callable[[], object]] = {
        "ours": partial(attention, q, k, v, "skeinformer", rank=r, rng=0),
        "exact": partial(attention, q, k, v),
    }
    seconds = time_interleaved(calls, rounds)
    size = f"1 head, n={n}, d=64, r={r}"
    yield make_row(
        "skeinformer",
        size,
        seconds["ours"],
        against="exact",
        theirs=seconds["exact"],
        target=1 / 12,
    )
    longer = [x[0] for x in normal(1, 8 * n, 64)]
    calls = {
        "long": partial(attention, *longer, "skeinformer", rank=r, rng=0),
        "short": partial(attention, q, k, v, "skeinformer", rank=r, rng=0),
    }
    seconds = time_interleaved(calls, rounds)
    yield make_row(
        "skeinformer",
        f"1 head, n={8 * n}, d=64, r={r}",
        seconds["long"],
        against=f"n={n}",
        theirs=seconds["short"],
        target=9.0,
    )
    extra = float(child(SKEINFORMER_MEMORY, str(8 * n))) / 2**20
    yield make_row(
        "skeinformer",
        f"1 head, n={8 * n}: growth beyond inputs and output",
        [max(extra, 0.0)],
        against="limit",
        theirs=[200.0],
        target=1.0,
        unit="MB",
    )
    yield rounding_row("skeinformer", size, Skeinformer(rank=r), AttentionProblem(q, k, v))
    yield _many_heads("skeinformer", Skeinformer(rank=64), rounds)


@register("informer", "informer against exact attention: time, and error of float32")
def _informer(quick: bool, rounds: int) -> Iterator[Row]:
    from ..functional.batched import attention
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
        seconds = time_interleaved(calls, rounds)
        yield make_row(
            "informer",
            f"{size}, {sampling}",
            seconds["ours"],
            against="exact",
            theirs=seconds["exact"],
            target=1 / 8 if sampling == "per_query" else None,
        )
    method = Informer(rank=r, samples=u)
    yield rounding_row("informer", f"n={n}, r={r}, U={u}", method, AttentionProblem(q, k, v))
    yield _many_heads("informer", Informer(rank=64, samples=32), rounds)


def _many_heads(benchmark: str, method: Any, rounds: int) -> Row:
    """Compare small heads in one call with the same heads in calls of their own."""
    from ..functional.batched import attention

    q, k, v = normal(12, 512, 64)

    def one_at_a_time() -> None:
        for head in zip(q, k, v, strict=True):
            attention(*head, method, rng=0)

    calls: dict[str, Callable[[], object]] = {
        "together": partial(attention, q, k, v, method, rng=0),
        "apart": one_at_a_time,
    }
    seconds = time_interleaved(calls, rounds)
    return make_row(
        benchmark,
        "12 heads in one call, n=512, d=64, r=64",
        seconds["together"],
        against="12 calls",
        theirs=seconds["apart"],
        target=None,
    )
