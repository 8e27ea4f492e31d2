"""Benchmarks against the real competitor: interleaved in one run, medians with spread, ratios."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .problem import AttentionProblem, closest

Array = NDArray[Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """Name a question that a run answers, and the function that measures it."""

    name: str
    description: str
    run: Callable[[bool, int], Iterator[Row]]


BENCHMARKS: dict[str, Benchmark] = {}


def _benchmark(name: str, description: str) -> Callable[[Any], Any]:
    def add(function: Callable[[bool, int], Iterator[Row]]) -> Any:
        BENCHMARKS[name] = Benchmark(name, description, function)
        return function

    return add


# --- measuring ------------------------------------------------------------------------------


BRIEF = 0.05  # seconds; shorter calls are repeated untimed for so long before the timed one


def _interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
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


def _row(
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


def _normal(heads: int, n: int, d: int, seed: int = 0) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((heads, n, d), np.float32) for _ in range(3))
    return q, k, v


def _torch() -> Any | None:
    try:
        import torch
    except ImportError:
        return None
    # Setting the number it already has can split a shared OpenMP pool in two, which slows both.
    if torch.get_num_threads() != _threads():
        torch.set_num_threads(_threads())
    return torch


def _threads() -> int:
    from .kernels._threads import thread_count

    return thread_count()


def _sdpa(torch: Any, arrays: Sequence[Array], causal: bool = False) -> Callable[[], Any]:
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


def _gemm_rate(rounds: int, n: int) -> float:
    """Return GFLOP/s of a float32 product of square matrices, the machine's practical peak."""
    a = np.ones((n, n), np.float32)
    seconds = _interleaved({"gemm": lambda: a @ a}, rounds)["gemm"]
    return 2 * n**3 / float(np.median(seconds)) / 1e9


def _relative_error(out: Array, q: Array, k: Array, v: Array, rows: Array) -> float:
    """Return the relative Frobenius error of some rows of one head against float64."""
    from .operators import SoftmaxAttention

    sample = AttentionProblem(*(x.astype(np.float64) for x in (q[rows], k, v)))
    truth = SoftmaxAttention(sample).rows(slice(None)) @ sample.values
    return float(np.linalg.norm(out[rows] - truth) / np.linalg.norm(truth))


def _rounding(benchmark: str, case: str, method: Any, problem: AttentionProblem) -> Row:
    """Return the line of a method's error against itself in float64 with the same draw."""
    draw = method.draw(problem, rng=0)
    wide = method.attend(problem.astype(np.float64), draw=draw)
    error = np.linalg.norm(method.attend(problem, draw=draw) - wide) / np.linalg.norm(wide)
    return _row(
        benchmark,
        f"{case}: error against float64, same draw",
        [float(error)],
        against="limit",
        theirs=[1e-5],
        target=1.0,
        unit="rel",
    )


@_benchmark("exact", "exact attention, one head and many, against torch SDPA and plain NumPy")
def _exact(quick: bool, rounds: int) -> Iterator[Row]:
    from .attention import attention

    torch = _torch()
    gemm = _gemm_rate(rounds, 1024 if quick else 4096)
    n = 2048 if quick else 16384
    cases: list[tuple[str, int, int, bool, float | None]] = [
        (f"1 head, n={n}, d=64", 1, n, False, 1.15),
        (f"1 head, n={n}, d=64, causal", 1, n, True, None),
        ("12 heads, n=512, d=64", 12, 512, False, 1.5),
    ]
    for case, heads, length, causal, target in cases:
        q, k, v = _normal(heads, length, 64)
        calls: dict[str, Callable[[], Any]] = {"ours": partial(attention, q, k, v, causal=causal)}
        if torch is not None:
            calls["torch SDPA"] = _sdpa(torch, (q, k, v), causal)
        if not causal:
            calls["plain NumPy"] = partial(plain_numpy, q, k, v)
        repeats = rounds if length > 1024 else 10 * rounds
        seconds = _interleaved(calls, repeats)
        flops = 4.0 * heads * length**2 * 64 * (0.5 if causal else 1.0)
        rate = flops / float(np.median(seconds["ours"])) / 1e9
        rows = np.random.default_rng(1).choice(length, min(256, length), replace=False)
        for name in list(calls)[1:]:
            extra: Row = {"gflops": rate, "share_of_gemm": rate / gemm, "gemm_gflops": gemm}
            if not causal:
                theirs = np.asarray(calls[name]()).reshape(q.shape)
                errors = [
                    _relative_error(x[0], q[0], k[0], v[0], rows) for x in (calls["ours"](), theirs)
                ]
                extra |= {"error": errors[0], "their_error": errors[1]}
            yield _row(
                "exact",
                case,
                seconds["ours"],
                against=name,
                theirs=seconds[name],
                target=target if name == "torch SDPA" else None,
                **extra,
            )
            if name == "torch SDPA" and not causal:
                yield _row(
                    "exact",
                    f"{case}: error against float64",
                    [errors[0]],
                    against=name,
                    theirs=[errors[1]],
                    target=2.0,
                    unit="rel",
                )


_MEMORY = """
import resource, sys
import numpy as np
from sketchattn import attention
n = int(sys.argv[1])
small = np.ones((64, 64), np.float32)
attention(small, small, small)
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((n, 64), np.float32) for _ in range(3))
attention(q[:2048], k[:2048], v[:2048])
unit = 1 if sys.platform == "darwin" else 1024
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
out = attention(q, k, v)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
print(after - before - out.nbytes)
"""


@_benchmark("memory", "peak memory of exact attention beyond its inputs and output")
def _memory(quick: bool, rounds: int) -> Iterator[Row]:
    n = 4096 if quick else 32768
    extra = float(_child(_MEMORY, str(n))) / 2**20
    yield _row(
        "memory",
        f"1 head, n={n}, d=64: growth beyond inputs and output",
        [max(extra, 0.0)],
        against="limit",
        theirs=[64.0],
        target=1.0,
        unit="MB",
    )


@_benchmark("report", "error_report by streaming, against one exact product")
def _report(quick: bool, rounds: int) -> Iterator[Row]:
    from .methods import UniformColumns
    from .metrics import ErrorReport, error_report

    n = 2048 if quick else 16384
    q, k, v = _normal(1, n, 64)
    rounds = min(rounds, 3)

    def fresh() -> AttentionProblem:
        return AttentionProblem(q[0], k[0], v[0])

    def report(spectral: bool) -> ErrorReport:
        return error_report(fresh(), ahat, path="streaming", spectral=spectral)

    ahat = UniformColumns(rank=256).approximate(fresh(), rng=0)
    for spectral, target in ((False, 6.0), (True, 40.0)):
        # A new problem each time: nothing exact is known before.
        seconds = _interleaved(
            {
                "report": partial(report, spectral),
                "exact": lambda: fresh().output,
            },
            rounds,
        )
        yield _row(
            "report",
            f"1 head, n={n}, d=64, {'with' if spectral else 'without'} spectral fields",
            seconds["report"],
            against="one exact product",
            theirs=seconds["exact"],
            target=target,
        )


@_benchmark("certify", "certify from 256 exact rows, against one exact product")
def _certify(quick: bool, rounds: int) -> Iterator[Row]:
    from .metrics import certify

    n = 2048 if quick else 16384
    q, k, v = _normal(1, n, 64)
    problem = AttentionProblem(q[0], k[0], v[0])
    output = problem.output + np.float32(1e-3)
    seconds = _interleaved(
        {
            "certify": lambda: certify(problem, output, rows=256, rng=0),
            "exact": lambda: AttentionProblem(q[0], k[0], v[0]).output,
        },
        rounds,
    )
    yield _row(
        "certify",
        f"1 head, n={n}, d=64, rows=256",
        seconds["certify"],
        against="one exact product",
        theirs=seconds["exact"],
        target=0.1,
    )


@_benchmark("sketch", "applying sketches, against a dense product, SciPy and scikit-learn")
def _sketch(quick: bool, rounds: int) -> Iterator[Row]:
    from scipy.linalg import clarkson_woodruff_transform
    from sklearn.random_projection import SparseRandomProjection

    from .sketches import make_sketch

    n, m, r = (4096, 64, 64) if quick else (65536, 64, 512)
    x = np.random.default_rng(0).standard_normal((n, m), np.float32)
    made = {
        kind: make_sketch(kind, r, n, 0, dtype=np.float32, **parameters)
        for kind, parameters in (
            ("gaussian", {}),
            ("srht", {}),
            ("countsketch", {}),
            ("sjlt", {"s": 8}),
        )
    }
    # Rows are scikit-learn's samples, and it multiplies them from the right.
    sparse = SparseRandomProjection(r, density=8 / r, random_state=0).fit(x[:, :1].T)
    sparse.components_ = sparse.components_.astype(np.float32)
    size = f"{n} x {m}, r={r}"
    cases: list[tuple[str, Callable[[], Any], str, Callable[[], Any], float | None]] = [
        (
            f"srht apply, {size}",
            partial(made["srht"].apply, x),
            "dense gaussian",
            partial(made["gaussian"].apply, x),
            1 / 3,
        ),
        (
            f"countsketch apply, {size}",
            partial(made["countsketch"].apply, x),
            "SciPy",
            partial(clarkson_woodruff_transform, x, r, 0),
            1 / 5,
        ),
        (
            f"countsketch draw and apply, {size}",
            lambda: make_sketch("countsketch", r, n, 0, dtype=np.float32).apply(x),
            "SciPy",
            partial(clarkson_woodruff_transform, x, r, 0),
            None,
        ),
        (
            f"sjlt s=8 apply, {size}",
            partial(made["sjlt"].apply, x),
            "scikit-learn",
            partial(sparse.transform, x.T),
            1.0,
        ),
    ]
    for case, ours, against, theirs, target in cases:
        seconds = _interleaved({"ours": ours, "theirs": theirs}, 3 * rounds)
        yield _row(
            "sketch",
            case,
            seconds["ours"],
            against=against,
            theirs=seconds["theirs"],
            target=target,
        )


@_benchmark("leverage", "fast leverage scores at 10 % error, against the exact ones")
def _leverage(quick: bool, rounds: int) -> Iterator[Row]:
    from .sampling import leverage_scores, leverage_scores_fast

    n, d = (4096, 16) if quick else (65536, 64)
    x = np.random.default_rng(0).standard_normal((n, d), np.float32)
    exact = leverage_scores(x, method="svd")
    fast = leverage_scores_fast(x, rng=0)
    error = float(np.abs(fast / exact - 1).max())
    calls: dict[str, Callable[[], Any]] = {"fast": partial(leverage_scores_fast, x, rng=0)}
    # "gram" does matrix products only: at this width a sketch saves too little to beat it, which
    # `leverage_scores_fast` explains.
    calls |= {name: partial(leverage_scores, x, method=name) for name in ("gram", "svd", "qr")}
    seconds = _interleaved(calls, rounds)
    for name in list(calls)[1:]:
        yield _row(
            "leverage",
            f"{n} x {d}, largest error {100 * error:.0f} %",
            seconds["fast"],
            against=f"exact, {name}",
            theirs=seconds[name],
            target=None if name == "gram" else 1.0,
        )


@_benchmark("linformer", "linformer with given E and F, against its products alone")
def _linformer(quick: bool, rounds: int) -> Iterator[Row]:
    from .attention import attention

    n, r = (2048, 64) if quick else (16384, 256)
    q, k, v = (x[0] for x in _normal(1, n, 64))
    rng = np.random.default_rng(1)
    e, f = (rng.standard_normal((r, n), np.float32) / np.float32(math.sqrt(n)) for _ in range(2))

    def products() -> Array:
        out: Array = (q @ (e @ k).T) @ (f @ v)
        return out

    options: Any = {"rank": r, "projection": "given", "E": e, "F": f}
    seconds = _interleaved(
        {"ours": partial(attention, q, k, v, "linformer", **options), "products": products},
        3 * rounds,
    )
    yield _row(
        "linformer",
        f"given E and F, 1 head, n={n}, d=64, r={r}",
        seconds["ours"],
        against="its products",
        theirs=seconds["products"],
        target=1.6,
    )


# Where Linux tells it, the peak of this program's own memory: the maximum that getrusage gives
# starts from that of the process which started this one.
_SKEINFORMER_MEMORY = """
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


@_benchmark("skeinformer", "skeinformer against exact attention: time, growth, memory, error")
def _skeinformer(quick: bool, rounds: int) -> Iterator[Row]:
    from .attention import attention
    from .methods import Skeinformer

    n, r = (2048, 64) if quick else (16384, 256)
    q, k, v = (x[0] for x in _normal(1, n, 64))
    calls: dict[str, Callable[[], object]] = {
        "ours": partial(attention, q, k, v, "skeinformer", rank=r, rng=0),
        "exact": partial(attention, q, k, v),
    }
    seconds = _interleaved(calls, rounds)
    size = f"1 head, n={n}, d=64, r={r}"
    yield _row(
        "skeinformer",
        size,
        seconds["ours"],
        against="exact",
        theirs=seconds["exact"],
        target=1 / 12,
    )
    longer = [x[0] for x in _normal(1, 8 * n, 64)]
    calls = {
        "long": partial(attention, *longer, "skeinformer", rank=r, rng=0),
        "short": partial(attention, q, k, v, "skeinformer", rank=r, rng=0),
    }
    seconds = _interleaved(calls, rounds)
    yield _row(
        "skeinformer",
        f"1 head, n={8 * n}, d=64, r={r}",
        seconds["long"],
        against=f"n={n}",
        theirs=seconds["short"],
        target=9.0,
    )
    extra = float(_child(_SKEINFORMER_MEMORY, str(8 * n))) / 2**20
    yield _row(
        "skeinformer",
        f"1 head, n={8 * n}: growth beyond inputs and output",
        [max(extra, 0.0)],
        against="limit",
        theirs=[200.0],
        target=1.0,
        unit="MB",
    )
    yield _rounding("skeinformer", size, Skeinformer(rank=r), AttentionProblem(q, k, v))
    yield _many_heads("skeinformer", Skeinformer(rank=64), rounds)


_COMBINER_MEMORY = _SKEINFORMER_MEMORY.partition("attention(q[:2048]")[0] + """
options = {"pattern": sys.argv[2], "block": int(sys.argv[3])}
attention(q[:2048], k[:2048], v[:2048], "combiner", causal=True, **options)
before = peak()
out = attention(q, k, v, "combiner", causal=True, **options)
print(peak() - before - out.nbytes)
"""


@_benchmark("combiner", "combiner against exact attention: time, growth to 1M, memory, error")
def _combiner(quick: bool, rounds: int) -> Iterator[Row]:
    from .attention import attention
    from .methods import Combiner

    n, block = (2048, 64) if quick else (16384, 128)
    q, k, v = (x[0] for x in _normal(1, n, 64))
    longer = [x[0] for x in _normal(1, 4 * n, 64)]
    calls: dict[str, Callable[[], object]] = {
        "fixed": partial(attention, q, k, v, "combiner", block=block),
        "logsparse": partial(attention, *longer, "combiner", pattern="logsparse"),
        "exact": partial(attention, q, k, v),
    }
    seconds = _interleaved(calls, rounds)
    size = f"fixed, 1 head, n={n}, d=64, block={block}"
    yield _row(
        "combiner",
        size,
        seconds["fixed"],
        against="exact",
        theirs=seconds["exact"],
        target=1 / 8,
    )
    yield _row(
        "combiner",
        f"logsparse, 1 head, n={4 * n}, d=64",
        seconds["logsparse"],
        against="16 x exact, n/4",
        theirs=[16 * x for x in seconds["exact"]],
        target=1 / 40,
    )
    yield _rounding("combiner", size, Combiner(block=block), AttentionProblem(q, k, v))
    # From here on causal, as a model of a million tokens would be.
    m, spans = (4 * n, (64, 128)) if quick else (1 << 18, (512, 1024))
    short, long = ([x[0] for x in _normal(1, size, 64)] for size in (m, 4 * m))
    for pattern, blocks, target in (("logsparse", (1, 1), 4.6), ("fixed", spans, 8.5)):
        options: list[Any] = [{"pattern": pattern, "block": x, "causal": True} for x in blocks]
        calls = {
            "long": partial(attention, *long, "combiner", **options[1]),
            "short": partial(attention, *short, "combiner", **options[0]),
        }
        seconds = _interleaved(calls, min(rounds, 5))
        name = pattern if pattern == "logsparse" else f"{pattern}, block={blocks[1]}"
        yield _row(
            "combiner",
            f"{name}, causal, 1 head, n={4 * m}, d=64",
            seconds["long"],
            against=f"n={m}",
            theirs=seconds["short"],
            target=target,
        )
        extra = float(_child(_COMBINER_MEMORY, str(4 * m), pattern, str(blocks[1]))) / 2**20
        yield _row(
            "combiner",
            f"{name}, n={4 * m}: growth beyond inputs and output",
            [max(extra, 0.0)],
            against="limit",
            theirs=[1000.0],
            target=1.0,
            unit="MB",
        )


@_benchmark("informer", "informer against exact attention: time, and error of float32")
def _informer(quick: bool, rounds: int) -> Iterator[Row]:
    from .attention import attention
    from .methods import Informer

    n, r, u = (2048, 64, 16) if quick else (16384, 256, 64)
    q, k, v = (x[0] for x in _normal(1, n, 64))
    size = f"1 head, n={n}, d=64, r={r}, U={u}"
    for sampling in ("per_query", "shared"):
        method = Informer(rank=r, samples=u, key_sampling=sampling)
        calls: dict[str, Callable[[], object]] = {
            "ours": partial(attention, q, k, v, method, rng=0),
            "exact": partial(attention, q, k, v),
        }
        seconds = _interleaved(calls, rounds)
        yield _row(
            "informer",
            f"{size}, {sampling}",
            seconds["ours"],
            against="exact",
            theirs=seconds["exact"],
            target=1 / 8 if sampling == "per_query" else None,
        )
    method = Informer(rank=r, samples=u)
    yield _rounding("informer", f"n={n}, r={r}, U={u}", method, AttentionProblem(q, k, v))
    yield _many_heads("informer", Informer(rank=64, samples=32), rounds)


def _many_heads(benchmark: str, method: Any, rounds: int) -> Row:
    """Compare small heads in one call with the same heads in calls of their own."""
    from .attention import attention

    q, k, v = _normal(12, 512, 64)

    def one_at_a_time() -> None:
        for head in zip(q, k, v, strict=True):
            attention(*head, method, rng=0)

    calls: dict[str, Callable[[], object]] = {
        "together": partial(attention, q, k, v, method, rng=0),
        "apart": one_at_a_time,
    }
    seconds = _interleaved(calls, rounds)
    return _row(
        benchmark,
        "12 heads in one call, n=512, d=64, r=64",
        seconds["together"],
        against="12 calls",
        theirs=seconds["apart"],
        target=None,
    )


@_benchmark("nystromformer", "nystromformer against exact attention: time, and error of float32")
def _nystromformer(quick: bool, rounds: int) -> Iterator[Row]:
    from .methods import Nystromformer

    n, r = (2048, 64) if quick else (16384, 256)
    yield from _against_exact("nystromformer", Nystromformer(rank=r), n, rounds, 1 / 8)


@_benchmark("dba", "dba without training against exact attention: time, and error of float32")
def _dba(quick: bool, rounds: int) -> Iterator[Row]:
    from .methods import DBA

    n, r = (2048, 64) if quick else (16384, 256)
    yield from _against_exact("dba", DBA(rank=r), n, rounds, 1 / 5)


@_benchmark("performer", "performer against exact attention: time, and error of float32")
def _performer(quick: bool, rounds: int) -> Iterator[Row]:
    from .methods import Performer

    n, r = (2048, 64) if quick else (16384, 256)
    yield from _against_exact("performer", Performer(rank=r), n, rounds, 1 / 8)
    yield from _against_exact("performer", Performer(rank=r), n, rounds, None, causal=True)


def _against_exact(
    benchmark: str, method: Any, n: int, rounds: int, target: float | None, *, causal: bool = False
) -> Iterator[Row]:
    """Measure a method at one head of width 64: its time, and its rounding in float32."""
    from .attention import attention

    q, k, v = (x[0] for x in _normal(1, n, 64))
    calls: dict[str, Callable[[], object]] = {
        "ours": partial(attention, q, k, v, method, rng=0, causal=causal),
        "exact": partial(attention, q, k, v, causal=causal),
    }
    seconds = _interleaved(calls, rounds)
    size = f"1 head, n={n}, d=64, r={method.rank}{', causal' if causal else ''}"
    yield _row(
        benchmark,
        size,
        seconds["ours"],
        against="exact",
        theirs=seconds["exact"],
        target=target,
    )
    problem = AttentionProblem(q, k, v, causal=causal)
    yield _rounding(benchmark, f"n={n}{', causal' if causal else ''}", method, problem)


# Packages that compute what a method of ours computes: module and class.
PEERS = {
    "nystrom-attention": ("nystrom_attention", "NystromAttention"),
    "performer-pytorch": ("performer_pytorch", "FastAttention"),
    "linformer": ("linformer", "LinformerSelfAttention"),
}


def _peer(package: str) -> Any | None:
    """Return the class of attention of a package, None where it is not installed."""
    import importlib
    import warnings

    module, name = PEERS[package]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they import has been deprecated since
            return getattr(importlib.import_module(module), name)
    except ImportError:
        warnings.warn(
            f"{package} is not installed, so it is left out; pip install 'sketchattn[peers]'",
            stacklevel=2,
        )
        return None


def _peer_calls(
    torch: Any, q: Array, k: Array, v: Array, r: int
) -> Iterator[tuple[str, Any, Mapping[str, Any] | None, Callable[[], Array]]]:
    """Yield package, method of ours, its draw, and the attention of the package, without gradients.

    Linear layers before and after the attention are replaced by modules that hand on what they are
    given.  One head: with several, nystrom-attention scales each by all.
    """
    from .methods import Linformer, Nystromformer, Performer

    n, d = q.shape
    queries, keys, values = (torch.from_numpy(x)[None] for x in (q, k, v))

    class Given(torch.nn.Module):  # type: ignore[misc]  # torch may be absent
        def __init__(self, output: Any) -> None:
            super().__init__()
            self.output = output

        def forward(self, _: Any) -> Any:
            return self.output

    def without_gradients(module: Any, *arguments: Any) -> Callable[[], Array]:
        def call() -> Array:
            with torch.no_grad():
                out: Array = module(*arguments).numpy().reshape(n, d)
                return out

        return call

    same = torch.nn.Identity()
    kind = _peer("nystrom-attention")
    if kind is not None:
        module = kind(d, dim_head=d, heads=1, num_landmarks=r, residual=False)
        module.to_qkv = Given(torch.cat([queries, keys, values], dim=-1))
        module.to_out = same
        theirs = without_gradients(module, queries)
        yield "nystrom-attention", Nystromformer(r), None, theirs
    kind = _peer("performer-pytorch")
    if kind is not None:
        module = kind(d, nb_features=r)
        draw = {"features": module.projection_matrix.numpy()}
        theirs = without_gradients(module, *(x[None] for x in (queries, keys, values)))
        yield "performer-pytorch", Performer(r, preset="performer-pytorch"), draw, theirs
        yield "performer-pytorch", Performer(r), draw, theirs
    kind = _peer("linformer")
    if kind is not None:
        module = kind(d, n, k=r, heads=1)
        module.to_q, module.to_out = same, same
        module.to_k, module.to_v = Given(keys), Given(values)
        e, f = (np.ascontiguousarray(x.detach().numpy().T) for x in (module.proj_k, module.proj_v))
        theirs = without_gradients(module, queries)
        yield "linformer", Linformer(r, "given", E=e, F=f), None, theirs


@_benchmark("peers", "nystromformer, performer, linformer against packages of the same methods")
def _peers(quick: bool, rounds: int) -> Iterator[Row]:
    from .attention import attention

    torch = _torch()
    if torch is None:
        import warnings

        warnings.warn(
            "torch is not installed, so peers are left out; pip install 'sketchattn[peers]'",
            stacklevel=2,
        )
        return
    n, r = (1024, 32) if quick else (8192, 256)
    q, k, v = (x[0] for x in _normal(1, n, 64))
    for package, method, draw, theirs in _peer_calls(torch, q, k, v, r):
        ours = partial(attention, q, k, v, method, draw=draw)
        difference = float(np.linalg.norm(ours() - theirs()) / np.linalg.norm(theirs()))
        seconds = _interleaved({"ours": ours, "theirs": theirs}, 3 * rounds)
        preset = f", {method.preset}" if getattr(method, "preset", None) else ""
        yield _row(
            "peers",
            f"{method.name}{preset}, 1 head, n={n}, d=64, r={r}",
            seconds["ours"],
            against=package,
            theirs=seconds["theirs"],
            target=1 / 1.5,
            difference=difference,
        )


_FIRST_CALL = """
import time
import numpy as np
x = np.ones((128, 64), np.float32)
import sketchattn
start = time.perf_counter()
sketchattn.attention(x, x, x)
print(time.perf_counter() - start)
"""
_IMPORT = "import time; s = time.perf_counter(); import {}; print(time.perf_counter() - s)"


@_benchmark("import", "import time beyond NumPy's, and the first kernel call of a warm cache")
def _import(quick: bool, rounds: int) -> Iterator[Row]:
    scripts = {
        "numpy": _IMPORT.format("numpy"),
        "sketchattn": _IMPORT.format("numpy, sketchattn"),
        "first": _FIRST_CALL,
    }
    seconds: dict[str, list[float]] = {name: [] for name in scripts}
    for script in scripts.values():
        _child(script)
    for _ in range(3 if quick else max(rounds, 5)):
        for name, script in scripts.items():
            seconds[name].append(float(_child(script)))
    base = float(np.median(seconds["numpy"]))
    yield _row(
        "import",
        "import sketchattn beyond import numpy",
        [x - base for x in seconds["sketchattn"]],
        against="limit",
        theirs=[0.15] * len(seconds["sketchattn"]),
        target=1.0,
        numpy_seconds=base,
    )
    yield _row(
        "import",
        "first kernel call of a warm cache",
        seconds["first"],
        against="limit",
        theirs=[0.5] * len(seconds["first"]),
        target=1.0,
    )


def _child(script: str, *arguments: str) -> str:
    """Return what a script prints in a new process of this Python."""
    environment = {**os.environ, "NUMBA_NUM_THREADS": str(_threads())}
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


# --- machine, table, warm-up ----------------------------------------------------------------


def machine() -> Row:
    """Return what a number depends on: CPU, threads, thread layer, BLAS, versions."""
    import numba
    import scipy
    from threadpoolctl import threadpool_info

    from .kernels._threads import cpu_count, load_blas, threading_layer

    load_blas()  # or it would be missing from the list below
    small = np.ones((1, 8, 8), np.float32)
    from .kernels.softmax import softmax_product

    softmax_product(small, small, small, scale=1.0)  # Numba chooses its layer at the first call
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line[:10] == "model name"]
        model = names[0] if names else model
    except OSError:
        pass
    torch = sys.modules.get("torch")
    return {
        "cpu": model,
        "cpus": cpu_count(),
        "threads": _threads(),
        "thread_layer": threading_layer(),
        "blas": sorted(
            {f"{x['internal_api']} {x['version']} ({x.get('architecture', '?')})"
             for x in threadpool_info() if x["user_api"] == "blas"}
        ),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "numba": numba.__version__,
        "torch": None if torch is None else str(torch.__version__),
    }  # fmt: skip


def run(
    names: Sequence[str] | None = None, *, quick: bool = False, rounds: int | None = None
) -> list[Row]:
    """Run benchmarks and return one dictionary for each comparison.

    Parameters
    ----------
    names : sequence of str, optional
        Benchmarks to run, by default all of ``BENCHMARKS``.
    quick : bool
        Small sizes: shows that everything runs, measures nothing worth quoting.
    rounds : int, optional
        Interleaved repetitions, by default 7 (quick: 3).

    Returns
    -------
    list of dict
        ``ours`` and ``theirs`` are medians, ``ratio`` is the median of the paired ratios,
        ``target`` the largest ratio allowed (None: informative), ``met`` whether it is.

    Raises
    ------
    ValueError
        For unknown names and rounds below 1.
    """
    wanted = list(BENCHMARKS) if names is None else list(names)
    for name in wanted:
        if name not in BENCHMARKS:
            raise ValueError(f"name must be a benchmark, got {name!r}{closest(name, BENCHMARKS)}")
    repeats = (3 if quick else 7) if rounds is None else rounds
    if repeats < 1:
        raise ValueError(f"rounds must be at least 1, got {repeats}; 7 is the default")
    return [row for name in wanted for row in BENCHMARKS[name].run(quick, repeats)]


def _figure(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value * 1e3:.3g} ms" if abs(value) < 1 else f"{value:.3g} s"
    return f"{value:.3g} {unit}"


def render(rows: Sequence[Row]) -> str:
    """Return the results as a table with the machine below."""
    lines = [
        f"{'benchmark':<15}{'case':<58}{'ours':>11}  {'against':<18}{'theirs':>11}{'ratio':>8}"
        f"{'  [quartiles]':<16}{'target':>7}"
    ]
    for row in rows:
        low, high = row["ratio_quartiles"]
        goal = "" if row["target"] is None else f"{row['target']:g}"
        verdict = {None: "", True: " met", False: " MISSED"}[row["met"]]
        lines.append(
            f"{row['benchmark']:<15}{row['case']:<58}{_figure(row['ours'], row['unit']):>11}  "
            f"{row['against']:<18}{_figure(row['theirs'], row['unit']):>11}{row['ratio']:>8.3f}"
            f"  [{low:.2f}, {high:.2f}]".ljust(129)
            + f"{goal:>6}{verdict}"
        )
        if "gflops" in row:
            lines.append(
                f"{'':<15}{row['gflops']:.0f} GFLOP/s, {100 * row['share_of_gemm']:.0f} % of a "
                f"float32 GEMM ({row['gemm_gflops']:.0f} GFLOP/s)"
            )
    facts = machine()
    lines.append("")
    lines += [f"{name}: {value}" for name, value in facts.items()]
    return "\n".join(lines)


def warmup() -> float:
    """Compile all kernels for both precisions, or load them from the cache; return the seconds."""
    from .methods import Combiner, Informer, Nystromformer, Performer, Skeinformer
    from .metrics import error_report

    start = time.perf_counter()
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        q, k, v = (rng.standard_normal((8, 4)).astype(dtype) for _ in range(3))
        problem = AttentionProblem(q, k, v)
        problem.exact.column_sums()
        error_report(problem, problem.exact, path="streaming")
        Skeinformer(rank=2).attend(problem, rng=0)
        for pattern in ("fixed", "logsparse", "axial_vertical"):
            method = Combiner(pattern, block=2)
            np.asarray(method.approximate(problem).T @ method.attend(problem))
        Nystromformer(rank=2).attend(problem)
        Performer(rank=2).attend(problem, rng=0)
        Performer(rank=2, eps=1e-4).attend(problem, rng=0)
        causal = AttentionProblem(q, k, v, causal=True)
        Performer(rank=2).approximate(causal, rng=0).rows(slice(2))
        Performer(rank=2).attend(causal, rng=0)
        for sampling in ("per_query", "shared"):
            Informer(rank=2, key_sampling=sampling).attend(problem, rng=0)
    return time.perf_counter() - start
