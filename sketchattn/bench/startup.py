"""Import time, and the first kernel call."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import numpy as np

from ..problem import AttentionProblem
from .harness import Row, benchmark, child, make_row

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


@benchmark("import", "import time beyond NumPy's, and the first kernel call of a warm cache")
def _import(quick: bool, rounds: int) -> Iterator[Row]:
    scripts = {
        "numpy": _IMPORT.format("numpy"),
        "sketchattn": _IMPORT.format("numpy, sketchattn"),
        "first": _FIRST_CALL,
    }
    seconds: dict[str, list[float]] = {name: [] for name in scripts}
    for script in scripts.values():
        child(script)
    for _ in range(3 if quick else max(rounds, 5)):
        for name, script in scripts.items():
            seconds[name].append(float(child(script)))
    base = float(np.median(seconds["numpy"]))
    yield make_row(
        "import",
        "import sketchattn beyond import numpy",
        [x - base for x in seconds["sketchattn"]],
        against="limit",
        theirs=[0.15] * len(seconds["sketchattn"]),
        target=1.0,
        numpy_seconds=base,
    )
    yield make_row(
        "import",
        "first kernel call of a warm cache",
        seconds["first"],
        against="limit",
        theirs=[0.5] * len(seconds["first"]),
        target=1.0,
    )


def warmup(precisions: Iterable[str] = ("float32", "float64")) -> float:
    """Compile all kernels for these precisions, or load them from the cache; return the seconds."""
    from ..errors.reports import error_report
    from ..functional.vjp import attention_vjp
    from ..operators.spectra import dense_spectral_norm
    from ..zoo.combiner.method import Combiner
    from ..zoo.informer.method import Informer
    from ..zoo.nystromformer import Nystromformer
    from ..zoo.performer import Performer
    from ..zoo.skeinformer.method import Skeinformer

    start = time.perf_counter()
    rng = np.random.default_rng(0)
    for dtype in precisions:
        q, k, v = (rng.standard_normal((8, 4)).astype(dtype) for _ in range(3))
        problem = AttentionProblem(q, k, v)
        problem.exact.column_sums()
        attention_vjp(q, k, v, v)
        for path in ("streaming", "dense"):
            error_report(problem, problem.exact, path=path)
        dense_spectral_norm(np.eye(128))
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
        Performer(rank=2).vjp(causal, v, rng=0)
        for sampling in ("per_query", "shared"):
            Informer(rank=2, key_sampling=sampling).attend(problem, rng=0)
    return time.perf_counter() - start
