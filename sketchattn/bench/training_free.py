"""Training-free competitors against exact attention."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from ..functional.batched import attention
from .harness import Row, benchmark, compare, normal, time_both

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
        ours = partial(attention, q, k, v, name, rank=r, rng=0)
        # Hashing for hundreds of keys takes as long as exact attention, many times.
        seconds = time_both({"ours": ours, "exact": exact}, rounds if target else 1)
        case = f"{name}, 1 head, n={n}, d=64, r={r}"
        yield compare("peers_training_free", case, seconds, "ours", "exact", target=target)
    theirs = _goodpoints(k, r)
    if theirs is not None:
        ours = partial(attention, q, k, v, "thinformer", rank=r, rng=0)
        calls: dict[str, Callable[[], object]] = {"ours": ours, "theirs": theirs}
        yield compare(
            "peers_training_free",
            f"thinformer, against the choice of keys alone, n={n}, d=64",
            time_both(calls, rounds),
            "ours",
            "theirs",
            against="goodpoints",
        )


def _goodpoints(k: Any, r: int) -> Callable[[], object] | None:
    """Return the thinning of keys by the package of its authors, None where it is missing.

    Its kernel is Gaussian and it keeps ``sqrt(n)`` keys of a power of four: what it is timed for is
    a part of the work, not the same.
    """
    try:
        compress = importlib.import_module("goodpoints.compress")
    except ImportError:
        return None
    points = np.ascontiguousarray(k, np.float64)
    width = np.array([2 * math.sqrt(k.shape[1])])
    return partial(compress.compresspp_kt, points, b"gaussian", width, g=2, seed=0)
