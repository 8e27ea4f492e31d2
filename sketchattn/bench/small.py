"""Heads as small as those of most models, and what a second thread is worth on a busy machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from numpy.typing import NDArray

from ..functional.batched import attention
from .harness import Row, Timings, benchmark, compare, make_row, normal, time_both
from .load import busy_processes

Array = NDArray[Any]

# Clusterings have 64 clusters at every length, what samples or projects n / 16 rows.
CLUSTERS = 64
# On one thread, of the time of exact attention at n = 4096, for one head.
ONE_THREAD = {"clustered": 0.35, "combiner routing": 0.35, "combiner heavy": 0.35}
SAMPLERS = ("skeinformer", "uniform", "performer", "informer", "combiner fixed")
BUSY = 2
# All threads against one: where nothing else runs, and beside busy processes.
IDLE_TARGET, BUSY_TARGET = 0.7, 1.3


def _options(name: str, n: int) -> dict[str, Any]:
    """Return what ``attention`` is asked for, by the name of a row."""
    method, _, variant = name.partition(" ")
    if method == "combiner":
        variants: dict[str, dict[str, Any]] = {
            "fixed": {"method": method},
            "heavy": {"method": method, "direct": "own+top_mass(4)"},
            "logsparse": {"method": method, "pattern": "logsparse"},
            "routing": {"method": method, "pattern": "routing", "rank": CLUSTERS, "rng": 0},
        }
        return variants[variant]
    clusters = method in ("clustered", "dba", "nystromformer")
    return {"method": method, "rank": CLUSTERS if clusters else n // 16, "rng": 0}


NAMES = (
    *SAMPLERS,
    "combiner heavy",
    "combiner logsparse",
    "combiner routing",
    "clustered",
    "dba",
    "nystromformer",
)


def _calls(names: Sequence[str], arrays: Sequence[Array]) -> dict[str, Callable[[], object]]:
    n = arrays[0].shape[-2]
    return {name: partial(attention, *arrays, **_options(name, n)) for name in names}


@benchmark("small", "every approximation against exact attention at n = 512 to 4096, d = 32")
def _small(quick: bool, rounds: int) -> Iterator[Row]:
    for n in (128, 256) if quick else (512, 2048, 4096):
        for heads in (1, 12):
            q, k, v = normal(heads, n, 32)
            calls = _calls(NAMES, (q, k, v)) | {"exact": partial(attention, q, k, v)}
            seconds = time_both(calls, rounds)
            size = f"{heads} head{'s' * (heads > 1)}, n={n}, d=32"
            for name in NAMES:
                rank = _options(name, n).get("rank")
                yield compare(
                    "small",
                    f"{name}{'' if rank is None else f' r={rank}'}, {size}",
                    seconds,
                    name,
                    "exact",
                    one_target=ONE_THREAD.get(name) if (n, heads) == (4096, 1) else None,
                )


@benchmark("threads", "all threads against one, on a quiet machine and beside two busy processes")
def _threads(quick: bool, rounds: int) -> Iterator[Row]:
    n = 512 if quick else 4096
    calls = _calls(SAMPLERS, [x[0] for x in normal(1, n, 32)])
    # The quiet rounds are not interleaved with the others: only ratios inside a round are judged.
    quiet = time_both(calls, 3 * rounds)
    with busy_processes(BUSY):
        beside = time_both(calls, 3 * rounds)
    for name in SAMPLERS:
        rank = _options(name, n).get("rank")
        case = f"{name}{'' if rank is None else f' r={rank}'}, n={n}, d=32"
        yield _second_thread(f"{case}, quiet", quiet, quiet, name, IDLE_TARGET)
        case = f"{case}, {BUSY} busy processes"
        yield _second_thread(case, beside, beside, name, BUSY_TARGET)
        yield _second_thread(case, beside, quiet, name, None)


def _second_thread(case: str, every: Timings, one: Timings, name: str, target: float | None) -> Row:
    """Return the line of all threads against one, of the same rounds or of others."""
    alone = every.one_thread[name] == every[name]
    return make_row(
        "threads",
        case,
        every[name],
        against="one thread" if one is every else "one thread, quiet",
        theirs=one.one_thread[name],
        target=None if alone else target,
        disturbed=max(every.disturbed, one.disturbed),
        repeated=every.repeated,
    )
