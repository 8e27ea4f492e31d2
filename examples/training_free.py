"""Compare training-free methods by error, by keys read and by time, ours beside the competitors.

    python examples/training_free.py
    python examples/training_free.py --heads heads.safetensors --ranks 64,256 --out training-free

Every method runs on every head, at every rank r, with every seed; causal heads take the methods
that are causal.  The error is that of the output, relative in the Frobenius norm: the median over
heads and seeds, and in brackets the least and the largest one.  The time is that of `attend` as a
share of exact attention, both measured in turn on one thread, median over heads.  The mean of V,
which every method must beat, and the two floors come first: truncated singular values, and the r
largest entries of each row.  VAttention looks at the exact logits as well: an oracle, not a method.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import sketchattn as sa
from sketchattn.kernels._threads import limit_threads

PREDICTORS = ("vmean",)
FLOORS = ("svd", "topk")
COMPETITORS = ("wildcat", "hyperattention", "kdeformer", "thinformer", "magicpig", "vattention")
CAUSAL = ("causal_tree", "stream_halving", "hyperattention", "magicpig", "vattention")
OURS = (
    *("uniform", "skeinformer", "informer", "nystromformer", "performer"),
    *("clustered", "dba", "combiner"),
)


def chosen(names: Sequence[str], causal: bool) -> list[str]:
    """Return the methods that honour such heads."""
    kept = []
    for name in dict.fromkeys(names):
        traits = sa.methods()[name](**arguments(name, 1)).traits
        if traits.causal or traits.oracle or not causal:
            kept.append(name)
    return kept


def arguments(name: str, rank: int) -> dict[str, Any]:
    """Return the parameters of a method at a rank."""
    return {"rank": rank} if "rank" in sa.methods()[name]._get_param_names() else {}


def compare(
    heads: Sequence[sa.AttentionProblem], names: Sequence[str], ranks: Sequence[int], seeds: int
) -> Any:
    """Return a frame with the error and the time share of every cell."""
    import pandas as pd

    rows = []
    for problem in heads:
        truth = problem.output
        size = float(np.linalg.norm(truth))
        for name in names:
            uses_rank = bool(arguments(name, 1))
            for rank in ranks if uses_rank else ranks[:1]:
                method = sa.methods()[name](**arguments(name, rank))
                for seed in range(seeds if method.traits.randomized else 1):
                    # The exact output is kept by a problem: time is that of a fresh one.
                    fresh = sa.AttentionProblem(
                        *problem.arrays, scale=problem.scale, causal=problem.causal
                    )
                    start = time.perf_counter()
                    sa.attention(
                        problem.q,
                        problem.k,
                        problem.values,
                        scale=problem.scale,
                        causal=problem.causal,
                    )
                    exact = time.perf_counter() - start
                    start = time.perf_counter()
                    found = method.attend(fresh, seed)
                    rows.append(
                        {
                            "head": problem.name,
                            "method": name,
                            "rank": rank if uses_rank else 1,
                            "seed": seed,
                            "error": float(np.linalg.norm(found - truth)) / size,
                            "time": (time.perf_counter() - start) / exact,
                        }
                    )
    return pd.DataFrame(rows)


def table(frame: Any) -> str:
    """Return errors and times, a line a method and a pair of columns a rank."""
    lines = []
    ranks = sorted(set(frame["rank"]) - {1}) or [1]
    lines.append(f"{'method':<15}" + "".join(f"{f'r = {r}: error':>26}{'time':>8}" for r in ranks))
    for name, part in frame.groupby("method", sort=False):
        line = f"{name:<15}"
        for r in ranks:
            cell = part[part["rank"].isin([r, 1])]
            if len(cell) == 0:
                continue
            low, middle, high = (float(cell["error"].quantile(x)) for x in (0, 0.5, 1))
            line += f"{f'{middle:.3f} [{low:.3f}, {high:.3g}]':>26}{cell['time'].median():>8.2f}"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    """Run the comparison, print its table and draw its picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", default="minilm", help="bundled heads or a file of heads")
    parser.add_argument("--ranks", default="32,64,128")
    parser.add_argument("--methods", default="", help="instead of all of the comparison")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--floors", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=Path("training-free"))
    options = parser.parse_args()
    bundled = not Path(options.heads).exists()
    heads = list(sa.load_heads(options.heads) if bundled else sa.read_heads(options.heads))
    ranks = [int(r) for r in options.ranks.split(",")]
    causal = bool(heads[0].causal)
    floors = FLOORS if options.floors else ()
    asked = [x for x in options.methods.split(",") if x]
    names = asked or [*PREDICTORS, *floors, *(CAUSAL if causal else COMPETITORS), *OURS]
    names = chosen(names, causal)

    start = time.perf_counter()
    with warnings.catch_warnings(), limit_threads(1):
        warnings.simplefilter("ignore")  # of clusters that found fewer distinct keys
        compare(heads[:1], names, ranks, 1)  # compiles, or loads, what is timed
        frame = compare(heads, names, ranks, options.seeds)
    options.out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(options.out / "errors.csv", index=False)
    first = heads[0]
    print(
        f"{len(heads)} {'causal ' if causal else ''}heads, n = {first.n_k}, d = {first.d}, "
        f"{options.seeds} seeds, {first.dtype}, one thread\n"
    )
    print(table(frame), "\n")
    picture = options.out / "errors.png"
    draw(frame, picture)
    print(f"{picture}, {options.out / 'errors.csv'}; {time.perf_counter() - start:.0f} s")


def draw(frame: Any, path: Path) -> None:
    """Draw the median error against the median time, a line a method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    medians = frame.groupby(["method", "rank"], sort=False)[["time", "error"]].median()
    for i, (name, part) in enumerate(medians.groupby(level=0, sort=False)):
        if name in FLOORS:
            continue
        marker = "osD^v<>PX*"[i % 10]
        style = "--" if name in OURS else "-"
        axes.plot(part["time"], part["error"], style, marker=marker, markersize=4, label=name)
    axes.axvline(1, color="0.6", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="time, exact = 1", ylabel="error of the output")
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
