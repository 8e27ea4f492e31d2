"""Training-free competitors against exact attention."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from ..functional.batched import attention
from .harness import Row, benchmark, make_row, normal, time_interleaved

# Share of the time of exact attention at n = 16384, d = 64, r = 256.
TARGETS = {
    "hyperattention": 0.10,
    "kdeformer": 0.15,
    "thinformer": 0.15,
    "wildcat": 0.25,
    "magicpig": None,
}


@benchmark("peers_training_free", "training-free competitors against exact attention")
def _training_free(quick: bool, rounds: int) -> Iterator[Row]:
    n, r = (1024, 32) if quick else (16384, 256)
    q, k, v = (x[0] for x in normal(1, n, 64))
    exact = partial(attention, q, k, v)
    for name, target in TARGETS.items():
        calls = {"ours": partial(attention, q, k, v, name, rank=r, rng=0), "exact": exact}
        seconds = time_interleaved(calls, rounds if name != "magicpig" else min(rounds, 3))
        yield make_row(
            "peers_training_free",
            f"{name}, 1 head, n={n}, d=64, r={r}",
            seconds["ours"],
            against="exact",
            theirs=seconds["exact"],
            target=target,
        )
    yield from _released(q, k, v, r, rounds)


def _released(q: Any, k: Any, v: Any, r: int, rounds: int) -> Iterator[Row]:
    """Yield the line of thinning by the package of its authors, where it is installed."""
    try:
        compress = importlib.import_module("goodpoints.compress")
    except ImportError:
        return
    n = len(k)
    size = 4 ** int(np.log(n) / np.log(4))
    g = max(0, int(np.log2(r / np.sqrt(size))))
    x = np.ascontiguousarray(k[:size], np.float64)

    def theirs() -> Any:
        return compress.compresspp(x, b"gaussian", np.array([64.0]), g, seed=0)

    ours = partial(attention, q, k, v, "thinformer", rank=r, rng=0)
    seconds = time_interleaved({"ours": ours, "theirs": theirs}, rounds)
    yield make_row(
        "peers_training_free",
        f"thinformer whole, against thinning alone, n={size}, d=64, r={r}",
        seconds["ours"],
        against="goodpoints",
        theirs=seconds["theirs"],
        target=None,
    )
