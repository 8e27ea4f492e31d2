"""Repeat Figure 1 of the Skeinformer paper on real heads: spectral output error against rank.

    python examples/skeinformer_figure1.py
    python examples/skeinformer_figure1.py --heads heads.safetensors --out figure1

For every head, rank and seed: ``|A V - Ohat|_2`` of Skeinformer, Informer and Linformer (random
projection), beside the mean of V, which does not depend on the rank, and the floor ``A_r V`` with
the best matrix of rank r.  As in the paper the error is absolute; unlike there, the norm of A V
and the gain over the mean of V stand beside it, without which nothing can be read off it.
Informer's rank is its number of exact rows, with as many sampled keys for each query; Skeinformer
computes as many pilot rows as it samples columns.  Causal heads take the corrected causal forms of
the two, which the papers do not have, and leave Linformer out, which has none.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

import sketchattn as sa

METHODS: dict[str, Any] = {
    "skeinformer": lambda rank: sa.Skeinformer(rank),
    "informer": lambda rank: sa.Informer(rank, samples=rank),
    "linformer": lambda rank: sa.Linformer(rank),
}
# Linformer mixes keys before the softmax and has no causal form.  Few pilots see a late key, so a
# tenth of the columns is drawn uniformly.
CAUSAL_METHODS: dict[str, Any] = {
    "skeinformer": lambda rank: sa.Skeinformer(rank, causal_form="corrected", mix=0.1),
    "informer": lambda rank: sa.Informer(
        rank, samples=rank, statistic="kl", key_sampling="per_query", fill="cummean"
    ),
}
# Names with their colours; black is the floor, grey the predictor.
COLOURS = {
    "skeinformer": "C0",
    "informer": "C1",
    "linformer": "C3",
    "vmean": "0.5",
    "svd": "k",
}


def spectral_errors(
    problem: sa.AttentionProblem, ranks: list[int], seeds: int
) -> list[dict[str, Any]]:
    """Return one row for each method, rank and seed on one head."""
    truth = problem.output

    def error(method: Any, seed: int | None = None) -> float:
        return float(np.linalg.norm(method.attend(problem, seed) - truth, 2))

    rows = [{"method": "vmean", "rank": r, "error": error(sa.VMean())} for r in ranks]
    # From the largest rank down: the decomposition is kept, and cut off for smaller ones.
    rows += [{"method": "svd", "rank": r, "error": error(sa.SVDFloor(r))} for r in ranks[::-1]]
    for name, make in (CAUSAL_METHODS if problem.causal else METHODS).items():
        for rank in ranks:
            rows += [
                {"method": name, "rank": rank, "error": error(make(rank), seed)}
                for seed in range(seeds)
            ]
    norm = float(np.linalg.norm(truth, 2))
    return [{"head": problem.name, "norm": norm, **row} for row in rows]


def main() -> None:
    """Run the study, print its table and draw its picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", default="minilm", help="bundled heads or a file of heads")
    parser.add_argument("--ranks", default="16,32,64,128,256")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("skeinformer-figure1"))
    options = parser.parse_args()
    ranks = sorted(int(r) for r in options.ranks.split(","))
    bundled = not Path(options.heads).exists()
    heads = sa.load_heads(options.heads) if bundled else sa.read_heads(options.heads)

    import pandas as pd

    start = time.perf_counter()
    frame = pd.DataFrame([row for p in heads for row in spectral_errors(p, ranks, options.seeds)])
    options.out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(options.out / "errors.csv", index=False)

    predictor = frame[frame["method"] == "vmean"].set_index(["head", "rank"])["error"]
    keys = pd.MultiIndex.from_frame(frame[["head", "rank"]])
    frame["gain"] = 1 - frame["error"].to_numpy() / predictor.loc[keys].to_numpy()
    groups = frame.groupby(["method", "rank"])
    shown = [name for name in COLOURS if name in set(frame["method"])]
    table = groups["error"].median().unstack().loc[shown]
    gains = 100 * groups["gain"].median().unstack().loc[shown]
    norms = frame.groupby("head")["norm"].first()
    print(f"{len(norms)} heads, n = {heads[0].n_k}, d = {heads[0].d}, seeds 0..{options.seeds - 1}")
    print(f"|A V|_2: median {norms.median():.3g}, {norms.min():.3g} to {norms.max():.3g}\n")
    print("median of |A V - Ohat|_2 over heads and seeds, against rank")
    print(table.round(3).to_string(), "\n")
    print("median gain over the mean of V in percent: 100 (1 - error / error of the mean of V)")
    print(gains.round(1).to_string(), "\n")
    picture = options.out / "errors.png"
    draw(frame, picture)
    print(f"{picture}, {options.out / 'errors.csv'}; {time.perf_counter() - start:.0f} s")


def draw(frame: Any, path: Path) -> None:
    """Draw medians over heads and seeds with quartiles."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, colour in COLOURS.items():
        groups = frame[frame["method"] == name].groupby("rank")["error"]
        if len(groups) == 0:
            continue
        middle, low, high = (groups.quantile(x) for x in (0.5, 0.25, 0.75))
        style = "--" if name in ("vmean", "svd") else "-"
        axes.plot(middle.index, middle, style, color=colour, label=name, marker=".")
        if name not in ("vmean", "svd"):
            axes.fill_between(middle.index, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set(xscale="log", yscale="log", xlabel="rank", ylabel=r"$\|AV - \hat{O}\|_2$")
    axes.set_xticks(sorted(set(frame["rank"])), [str(r) for r in sorted(set(frame["rank"]))])
    axes.minorticks_off()
    axes.legend(frameon=False)
    axes.set_title("median over heads and seeds, quartiles shaded", fontsize=10)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
