"""Sketches and leverage scores against dense products and other libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from .harness import Row, benchmark, compare, time_both


@benchmark("sketch", "applying sketches, against a dense product, SciPy and scikit-learn")
def _sketch(quick: bool, rounds: int) -> Iterator[Row]:
    from scipy.linalg import clarkson_woodruff_transform
    from sklearn.random_projection import SparseRandomProjection

    from ..sketches.base import make_sketch

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
        seconds = time_both({"ours": ours, "theirs": theirs}, 3 * rounds)
        yield compare(
            "sketch",
            case,
            seconds,
            "ours",
            "theirs",
            against=against,
            target=target,
        )


@benchmark("leverage", "fast leverage scores at 10 % error, against the exact ones")
def _leverage(quick: bool, rounds: int) -> Iterator[Row]:
    from ..sampling.leverage import leverage_scores, leverage_scores_fast

    n, d = (4096, 16) if quick else (65536, 64)
    x = np.random.default_rng(0).standard_normal((n, d), np.float32)
    exact = leverage_scores(x, method="svd")
    fast = leverage_scores_fast(x, rng=0)
    error = float(np.abs(fast / exact - 1).max())
    calls: dict[str, Callable[[], Any]] = {"fast": partial(leverage_scores_fast, x, rng=0)}
    # "gram" does matrix products only: at this width a sketch saves too little to beat it, which
    # `leverage_scores_fast` explains.
    calls |= {name: partial(leverage_scores, x, method=name) for name in ("gram", "svd", "qr")}
    seconds = time_both(calls, rounds)
    for name in list(calls)[1:]:
        yield compare(
            "leverage",
            f"{n} x {d}, largest error {100 * error:.0f} %",
            seconds,
            "fast",
            name,
            against=f"exact, {name}",
            target=None if name == "gram" else 1.0,
        )
