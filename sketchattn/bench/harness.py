"""Benchmarks against the real competitor: interleaved in one run, medians with spread, ratios."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..functional.batched import attention
from ..kernels._threads import limit_threads, thread_count
from ..problem import AttentionProblem
from . import load

Array = NDArray[Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """Name a question that a run answers, and the function that measures it."""

    name: str
    description: str
    run: Callable[[bool, int], Iterator[Row]]


def benchmark(
    name: str, description: str
) -> Callable[[Callable[[bool, int], Iterator[Row]]], Benchmark]:
    """Make a benchmark of a function that yields its rows, given ``quick`` and ``rounds``."""
    return partial(Benchmark, name, description)


BRIEF = 0.05  # seconds; shorter calls are repeated untimed for so long before the timed one


class Timings(dict[str, list[float]]):
    """Seconds of each call by its name, a number a round, and what is known of the rounds.

    Attributes
    ----------
    one_thread : dict
        The same on one thread, empty where that was not measured.
    others : list of float
        How many CPUs other programs kept busy in each round, NaN where unknown.
    repeated : int
        Rounds that were disturbed and done again.
    """

    def __init__(self, seconds: Mapping[str, list[float]], others: list[float], repeated: int):
        super().__init__(seconds)
        self.one_thread: dict[str, list[float]] = {}
        self.others = others
        self.repeated = repeated

    @property
    def disturbed(self) -> int:
        """How many of the rounds that count were disturbed."""
        return sum(x > load.DISTURBED for x in self.others)


def time_interleaved(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    within: Callable[[str], AbstractContextManager[object]] = lambda _: nullcontext(),
) -> Timings:
    """Time each call once a round, in turn: slow moments of the machine hit all alike.

    A pause before each lets the threads of the other library, which spin for a while after their
    work, go to sleep.  Waking up can cost more than a brief call (a scheduler may keep both threads
    on one core at first), and which call pays depends on what ran before it: each round starts
    with another call, and a brief one is repeated untimed until its threads are awake.

    A round in which other programs used the machine is done again, up to as many times as there
    are rounds; if that does not help, the least disturbed ones count, and say so.  A call runs
    inside the context ``within(name)``, whose entering and leaving are not timed.
    """
    brief = {}
    for name, call in calls.items():
        with within(name):
            call()
            start = time.perf_counter()
            call()
            brief[name] = time.perf_counter() - start < BRIEF
    order = list(calls)
    found: list[tuple[float, dict[str, float]]] = []
    while len(found) < rounds or (
        len(found) < 2 * rounds and sum(not x[0] > load.DISTURBED for x in found) < rounds
    ):
        before, seconds = load.reading(), {}
        for name in order:
            time.sleep(0.05)
            with within(name):
                awake = time.perf_counter() + BRIEF
                while brief[name] and time.perf_counter() < awake:
                    calls[name]()
                start = time.perf_counter()
                calls[name]()
                seconds[name] = time.perf_counter() - start
        found.append((load.others(before, load.reading()), seconds))
        order.append(order.pop(0))
    # Unknown loads are NaN: as good as quiet ones.  Of equal ones the first stay.
    calmest = sorted(range(len(found)), key=lambda i: (found[i][0] > load.DISTURBED, found[i][0]))
    kept = [found[i] for i in sorted(calmest[:rounds])]
    return Timings(
        {name: [x[1][name] for x in kept] for name in calls},
        [x[0] for x in kept],
        len(found) - rounds,
    )


def time_both(calls: Mapping[str, Callable[[], object]], rounds: int) -> Timings:
    """Time each call on all threads and on one, all of them interleaved in one run."""
    every = library_threads()
    if every == 1:
        alone = time_interleaved(calls, rounds)
        alone.one_thread = dict(alone)
        return alone
    both = {f"{name}, {count}": call for name, call in calls.items() for count in (every, 1)}

    def within(name: str) -> AbstractContextManager[object]:
        return on_threads(1) if name.endswith(", 1") else nullcontext()

    seconds = time_interleaved(both, rounds, within)
    made = Timings(
        {name: seconds[f"{name}, {every}"] for name in calls}, seconds.others, seconds.repeated
    )
    made.one_thread = {name: seconds[f"{name}, 1"] for name in calls}
    return made


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Run this library on ``count`` threads while inside, and torch, if it is loaded."""
    torch: Any = sys.modules.get("torch")
    before = count if torch is None else torch.get_num_threads()
    if before != count:
        torch.set_num_threads(count)
    try:
        with limit_threads(count):
            yield
    finally:
        if before != count:
            torch.set_num_threads(before)


def compare(
    benchmark: str,
    case: str,
    seconds: Timings,
    ours: str,
    theirs: str,
    *,
    against: str | None = None,
    factor: float = 1.0,
    target: float | None = None,
    one_target: float | None = None,
    **extra: Any,
) -> Row:
    """Return the line of two calls that were timed together, with all threads and with one.

    ``factor`` multiplies their seconds, where the other call did a part of the work; ``one_target``
    is the largest ratio allowed on one thread.
    """
    shown = theirs if against is None else against
    row = make_row(
        benchmark,
        case,
        seconds[ours],
        against=shown,
        theirs=[factor * x for x in seconds[theirs]],
        target=target,
        others=known(float(np.median(seconds.others))),
        disturbed=seconds.disturbed,
        repeated=seconds.repeated,
        **extra,
    )
    one = seconds.one_thread
    if one:
        scaled = [factor * x for x in one[theirs]]
        row["one_thread"] = statistics(one[ours], scaled, one_target)
    return row


def known(value: float) -> float | None:
    """Return a number for JSON: None for NaN."""
    return None if math.isnan(value) else value


def statistics(ours: list[float], theirs: list[float], target: float | None) -> Row:
    """Return medians, quartiles, and the median of the paired ratios beside its target."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    ratio = float(np.median(ratios))
    return {
        "ours": float(np.median(ours)),
        "ours_quartiles": [float(x) for x in np.percentile(ours, [25, 75])],
        "theirs": float(np.median(theirs)),
        "theirs_quartiles": [float(x) for x in np.percentile(theirs, [25, 75])],
        "ratio": ratio,
        "ratio_quartiles": [float(x) for x in np.percentile(ratios, [25, 75])],
        "target": target,
        "met": None if target is None else bool(ratio <= target),
    }


def make_row(
    benchmark: str,
    case: str,
    ours: list[float],
    *,
    against: str,
    theirs: list[float],
    target: float | None,
    unit: str = "s",
    **extra: Any,
) -> Row:
    """Return one line of the table: medians, quartiles, and the median of the paired ratios."""
    return {
        "benchmark": benchmark,
        "case": case,
        "against": against,
        "unit": unit,
        **statistics(ours, theirs, target),
        "rounds": len(ours),
        "one_thread": None,
        **extra,
    }


def normal(heads: int, n: int, d: int, seed: int = 0) -> tuple[Array, Array, Array]:
    """Return normal q, k and v (heads, n, d) in float32."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((heads, n, d), np.float32) for _ in range(3))
    return q, k, v


def import_torch() -> Any | None:
    """Return torch with as many threads as this library has, None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    # Setting the number it already has can split a shared OpenMP pool in two, which slows both.
    if torch.get_num_threads() != library_threads():
        torch.set_num_threads(library_threads())
    return torch


def library_threads() -> int:
    """Return the number of threads of this library's kernels."""
    return thread_count()


def sdpa(torch: Any, arrays: Sequence[Array], causal: bool = False) -> Callable[[], Any]:
    """Return the call of torch's own attention on these arrays, without gradients."""
    tensors = [torch.from_numpy(x)[None] for x in arrays]
    function = torch.nn.functional.scaled_dot_product_attention

    def call() -> Any:
        with torch.no_grad():
            return function(*tensors, is_causal=causal)

    return call


def plain_numpy(q: Array, k: Array, v: Array) -> Array:
    """Return attention by the plain formula, n_q x n_k in memory for each head."""
    logits = (q * (1 / math.sqrt(q.shape[-1]))) @ np.swapaxes(k, -1, -2)
    logits -= logits.max(axis=-1, keepdims=True)
    weights: Array = np.exp(logits)
    weights /= weights.sum(axis=-1, keepdims=True)
    out: Array = weights @ v
    return out


def gemm_rate(rounds: int, n: int) -> float:
    """Return GFLOP/s of a float32 product of square matrices, the machine's practical peak."""
    a = np.ones((n, n), np.float32)
    seconds = time_interleaved({"gemm": lambda: a @ a}, rounds)["gemm"]
    return 2 * n**3 / float(np.median(seconds)) / 1e9


def relative_error(out: Array, q: Array, k: Array, v: Array, rows: Array) -> float:
    """Return the relative Frobenius error of some rows of one head against float64."""
    from ..operators.softmax import SoftmaxAttention

    sample = AttentionProblem(*(x.astype(np.float64) for x in (q[rows], k, v)))
    truth = SoftmaxAttention(sample).rows(slice(None)) @ sample.values
    return float(np.linalg.norm(out[rows] - truth) / np.linalg.norm(truth))


def rounding_row(benchmark: str, case: str, method: Any, problem: AttentionProblem) -> Row:
    """Return the line of a method's error against itself in float64 with the same draw."""
    draw = method.draw(problem, rng=0)
    wide = method.attend(problem.astype(np.float64), draw=draw)
    error = np.linalg.norm(method.attend(problem, draw=draw) - wide) / np.linalg.norm(wide)
    return make_row(
        benchmark,
        f"{case}: error against float64, same draw",
        [float(error)],
        against="limit",
        theirs=[1e-5],
        target=1.0,
        unit="rel",
    )


def many_heads_row(benchmark: str, method: Any, rounds: int) -> Row:
    """Return the line of small heads in one call, against the same heads in calls of their own."""
    q, k, v = normal(12, 512, 64)

    def one_at_a_time() -> None:
        for head in zip(q, k, v, strict=True):
            attention(*head, method, rng=0)

    calls: dict[str, Callable[[], object]] = {
        "together": partial(attention, q, k, v, method, rng=0),
        "apart": one_at_a_time,
    }
    return compare(
        benchmark,
        "12 heads in one call, n=512, d=64, r=64",
        time_both(calls, rounds),
        "together",
        "apart",
        against="12 calls",
    )


# Where Linux tells it, the peak of this program's own memory: the maximum that getrusage gives
# starts from that of the process which started this one.
_MEMORY = """
import json, re, resource, sys
import numpy as np
from sketchattn import attention
def peak():
    try:
        with open("/proc/self/status") as file:
            return int(re.search(r"VmHWM:\\s*(\\d+)", file.read()).group(1)) * 1024
    except (OSError, AttributeError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
n, options = int(sys.argv[1]), json.loads(sys.argv[2])
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((n, 64), np.float32) for _ in range(3))
attention(q[:2048], k[:2048], v[:2048], **options)
before = peak()
out = attention(q, k, v, **options)
print(peak() - before - out.nbytes)
"""


def memory_row(benchmark: str, case: str, n: int, limit: float, **options: Any) -> Row:
    """Return the line of the memory, in MB, that one head of width 64 takes in a new process.

    ``options`` are those of ``attention``; inputs and output do not count.
    """
    extra = float(child(_MEMORY, str(n), json.dumps(options))) / 2**20
    return make_row(
        benchmark,
        f"{case}: growth beyond inputs and output",
        [max(extra, 0.0)],
        against="limit",
        theirs=[limit],
        target=1.0,
        unit="MB",
    )


def child(script: str, *arguments: str) -> str:
    """Return what a script prints in a new process of this Python."""
    environment = {**os.environ, "NUMBA_NUM_THREADS": str(library_threads())}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message"
        raise ValueError(f"a measuring process must succeed, got: {reason}; run it by hand")
    return done.stdout.strip()
