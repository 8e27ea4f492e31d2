"""Error reports and certificates against one exact product."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from ..problem import AttentionProblem
from .harness import Row, benchmark, compare, normal, time_both


@benchmark("report", "error_report by streaming, against one exact product")
def _report(quick: bool, rounds: int) -> Iterator[Row]:
    from ..errors.reports import ErrorReport, error_report
    from ..zoo.baselines import UniformColumns

    n = 2048 if quick else 16384
    q, k, v = normal(1, n, 64)
    rounds = min(rounds, 3)

    def fresh() -> AttentionProblem:
        return AttentionProblem(q[0], k[0], v[0])

    def report(spectral: bool) -> ErrorReport:
        return error_report(fresh(), ahat, path="streaming", spectral=spectral)

    ahat = UniformColumns(rank=256).approximate(fresh(), rng=0)
    for spectral, target in ((False, 4.0), (True, 15.0)):
        # A new problem each time: nothing exact is known before.
        seconds = time_both(
            {
                "report": partial(report, spectral),
                "exact": lambda: fresh().output,
            },
            rounds,
        )
        yield compare(
            "report",
            f"1 head, n={n}, d=64, {'with' if spectral else 'without'} spectral fields",
            seconds,
            "report",
            "exact",
            against="one exact product",
            target=target,
        )


@benchmark("certify", "certify from 256 exact rows, against one exact product")
def _certify(quick: bool, rounds: int) -> Iterator[Row]:
    from ..errors.certificates import certify

    n = 2048 if quick else 16384
    q, k, v = normal(1, n, 64)
    problem = AttentionProblem(q[0], k[0], v[0])
    output = problem.output + np.float32(1e-3)
    seconds = time_both(
        {
            "certify": lambda: certify(problem, output, rows=256, rng=0),
            "exact": lambda: AttentionProblem(q[0], k[0], v[0]).output,
        },
        rounds,
    )
    yield compare(
        "certify",
        f"1 head, n={n}, d=64, rows=256",
        seconds,
        "certify",
        "exact",
        against="one exact product",
        target=0.1,
    )
