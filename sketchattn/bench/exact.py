"""Exact attention against its competitors: time and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from ..functional.batched import attention
from .harness import (
    Row,
    benchmark,
    compare,
    gemm_rate,
    import_torch,
    make_row,
    memory_row,
    normal,
    plain_numpy,
    relative_error,
    sdpa,
    time_both,
)


@benchmark("exact", "exact attention, one head and many, against torch SDPA and plain NumPy")
def _exact(quick: bool, rounds: int) -> Iterator[Row]:
    torch = import_torch()
    gemm = gemm_rate(rounds, 1024 if quick else 4096)
    n = 2048 if quick else 16384
    small = n // 4
    cases: list[tuple[int, int, int, bool, type[np.floating[Any]]]] = [
        (1, n, 64, False, np.float32),
        (1, n, 64, True, np.float32),
        (1, small, 64, False, np.float32),
        (1, small, 128, False, np.float32),
        (1, small, 64, True, np.float32),
        (1, small, 64, False, np.float64),
        (12, 512, 64, False, np.float32),
    ]
    for heads, length, d, causal, dtype in cases:
        case = f"{heads} head{'s' * (heads > 1)}, n={length}, d={d}"
        case += f"{', causal' * causal}{', float64' * (dtype is np.float64)}"
        q, k, v = (x.astype(dtype) for x in normal(heads, length, d))
        calls: dict[str, Callable[[], Any]] = {"ours": partial(attention, q, k, v, causal=causal)}
        if torch is not None:
            calls["torch SDPA"] = sdpa(torch, (q, k, v), causal)
        if not causal and length != small:
            calls["plain NumPy"] = partial(plain_numpy, q, k, v)
        repeats = rounds if length > 1024 else 10 * rounds
        seconds = time_both(calls, repeats)
        flops = 4.0 * heads * length**2 * d * (0.5 if causal else 1.0)
        rate = flops / float(np.median(seconds["ours"])) / 1e9
        rows = np.random.default_rng(1).choice(length, min(256, length), replace=False)
        for name in list(calls)[1:]:
            extra: Row = {"gflops": rate, "share_of_gemm": rate / gemm, "gemm_gflops": gemm}
            if not causal:
                theirs = np.asarray(calls[name]()).reshape(q.shape)
                errors = [
                    relative_error(x[0], q[0], k[0], v[0], rows) for x in (calls["ours"](), theirs)
                ]
                extra |= {"error": errors[0], "their_error": errors[1]}
            yield compare(
                "exact",
                case,
                seconds,
                "ours",
                name,
                target=1.0 if name == "torch SDPA" else None,
                **extra,
            )
            if name == "torch SDPA" and not causal:
                yield make_row(
                    "exact",
                    f"{case}: error against float64",
                    [errors[0]],
                    against=name,
                    theirs=[errors[1]],
                    target=2.0,
                    unit="rel",
                )


@benchmark("memory", "peak memory of exact attention beyond its inputs and output")
def _memory(quick: bool, rounds: int) -> Iterator[Row]:
    n = 4096 if quick else 32768
    yield memory_row("memory", f"1 head, n={n}, d=64", n, 64.0)
