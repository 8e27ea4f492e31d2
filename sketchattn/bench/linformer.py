"""Linformer against its products alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..functional.batched import attention
from .harness import Row, benchmark, compare, normal, time_both

Array = NDArray[Any]


@benchmark("linformer", "linformer with given E and F, against its products alone")
def _linformer(quick: bool, rounds: int) -> Iterator[Row]:
    n, r = (2048, 64) if quick else (16384, 256)
    q, k, v = (x[0] for x in normal(1, n, 64))
    rng = np.random.default_rng(1)
    e, f = (rng.standard_normal((r, n), np.float32) / np.float32(math.sqrt(n)) for _ in range(2))

    def products() -> Array:
        out: Array = (q @ (e @ k).T) @ (f @ v)
        return out

    options: Any = {"rank": r, "projection": "given", "E": e, "F": f}
    seconds = time_both(
        {"ours": partial(attention, q, k, v, "linformer", **options), "products": products},
        3 * rounds,
    )
    yield compare(
        "linformer",
        f"given E and F, 1 head, n={n}, d=64, r={r}",
        seconds,
        "ours",
        "products",
        against="its products",
        target=1.6,
    )
