"""Benchmarks against the real competitor: interleaved in one run, medians with spread, ratios."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..functional.batched import attention
from ..kernels._threads import thread_count
from ..problem import AttentionProblem

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


def time_interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time each call once a round, in turn: slow moments of the machine hit all alike.

    A pause before each lets the threads of the other library, which spin for a while after their
    work, go to sleep.  Waking up can cost more than a brief call (a scheduler may keep both threads
    on one core at first), and which call pays depends on what ran before it: each round starts
    with another call, and a brief one is repeated untimed until its threads are awake.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    brief = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        brief[name] = time.perf_counter() - start < BRIEF
    order = list(calls)
    for _ in range(rounds):
        for name in order:
            time.sleep(0.05)
            awake = time.perf_counter() + BRIEF
            while brief[name] and time.perf_counter() < awake:
                calls[name]()
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
        order.append(order.pop(0))
    return seconds


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
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    ratio = float(np.median(ratios))
    return {
        "benchmark": benchmark,
        "case": case,
        "ours": float(np.median(ours)),
        "ours_quartiles": [float(x) for x in np.percentile(ours, [25, 75])],
        "against": against,
        "theirs": float(np.median(theirs)),
        "theirs_quartiles": [float(x) for x in np.percentile(theirs, [25, 75])],
        "unit": unit,
        "ratio": ratio,
        "ratio_quartiles": [float(x) for x in np.percentile(ratios, [25, 75])],
        "target": target,
        "met": None if target is None else bool(ratio <= target),
        "rounds": len(ours),
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
    seconds = time_interleaved(calls, rounds)
    return make_row(
        benchmark,
        "12 heads in one call, n=512, d=64, r=64",
        seconds["together"],
        against="12 calls",
        theirs=seconds["apart"],
        target=None,
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
