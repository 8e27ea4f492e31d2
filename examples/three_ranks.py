"""Show, head by head, what matrix rank, logit rank and output error have to do with each other.

    python examples/three_ranks.py
    python examples/three_ranks.py --heads heads.safetensors --rank 16 --out ranks

Logits ``L = scale Q K^T`` have rank d at most, and a softmax makes of them a matrix A that has full
rank to rounding.  Two things of rank r are compared with A: its best approximation A_r (truncated
singular values), and the softmax of the best approximation of rank r of the logits, which costs
n x n but reads r columns of queries and keys in place of d.  For each: the error of the matrix and
of the output, relative in the Frobenius norm.  Beside them, for the second, the total variation of
its rows and the bound ``tanh(eta/2)`` that the half-range eta of the error of the logits gives.

A row of logits may be shifted without a change of A, so L is that of the keys less their mean.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

import sketchattn as sa
from sketchattn.errors.perturbation import logit_eta, tv_bound

# Singular values above this part of the largest one count for the rank.
TOLERANCE = 1e-2
# Part of the sum of their squares that the values counted as "99 %" make up.
SHARE = 0.99


def compare(
    problem: sa.AttentionProblem, ranks: list[int]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the spectra of L and A with their counts, and a row of errors for each rank."""
    wide = problem.astype(np.float64)
    q, k, v = (np.asarray(x) for x in (wide.q, wide.k, wide.values))
    logits = wide.scale * q @ (k - k.mean(axis=0)).T
    a, o = wide.exact.to_dense(), wide.output
    left, sigma, right = np.linalg.svd(a)
    spectrum: dict[str, Any] = {}
    for name, values in (("L", np.linalg.svd(logits, compute_uv=False)), ("A", sigma)):
        squares = np.cumsum(values**2) / np.sum(values**2)
        spectrum[f"sigma {name}"] = values
        spectrum[f"rank {name}"] = int((values > TOLERANCE * values[0]).sum())
        spectrum[f"{100 * SHARE:g} % of {name}"] = int(np.searchsorted(squares, SHARE)) + 1

    def relative(x: Any, truth: Any) -> float:
        return float(np.linalg.norm(x - truth) / np.linalg.norm(truth))

    mean, seen = relative(sa.VMean().attend(wide), o), wide.visible()
    rows = []
    for r in ranks:
        floor = (left[:, :r] * sigma[:r]) @ right[:r]
        ahat = sa.Compressed(rank=min(r, wide.d)).approximate(wide)
        dense, small = ahat.to_dense(), ahat.problem  # the compressed queries and keys
        change = small.scale * np.asarray(small.q) @ np.asarray(small.k).T - logits
        rows.append(
            {
                "head": problem.name,
                "rank": r,
                "A_r": relative(floor, a),
                "L_r": relative(dense, a),
                "A_r output": relative(floor @ v, o),
                "L_r output": relative(dense @ v, o),
                "mean of V": mean,
                "L_r TV": float(np.abs(dense - a).sum(axis=1).mean() / 2),
                "bound": float(np.mean(tv_bound(logit_eta(change, seen)))),
            }
        )
    return spectrum, rows


def main() -> None:
    """Run the study, print its tables and draw its picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", default="minilm", help="bundled heads or a file of heads")
    parser.add_argument("--ranks", default="1,2,4,8,16,24,32")
    parser.add_argument("--rank", type=int, default=8, help="rank of the table of heads")
    parser.add_argument("--out", type=Path, default=Path("three-ranks"))
    options = parser.parse_args()
    ranks = sorted({int(r) for r in options.ranks.split(",")} | {options.rank})
    bundled = not Path(options.heads).exists()
    heads = sa.load_heads(options.heads) if bundled else sa.read_heads(options.heads)

    import pandas as pd

    start = time.perf_counter()
    made = {p.name: compare(p, ranks) for p in heads}
    spectra = {name: spectrum for name, (spectrum, _) in made.items()}
    frame = pd.DataFrame([row for _, rows in made.values() for row in rows])
    options.out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(options.out / "errors.csv", index=False)

    counts = pd.DataFrame(spectra).T.drop(columns=["sigma L", "sigma A"]).astype(int)
    one = frame[frame["rank"] == options.rank].set_index("head").drop(columns="rank")
    print(f"{len(heads)} heads, n = {heads[0].n_k}, d = {heads[0].d}\n")
    print(f"each head: singular values above {TOLERANCE:g} of the largest, how many make up")
    print(f"{100 * SHARE:g} % of the sum of squares, and relative errors at rank {options.rank}")
    print(counts.join(one.round(3)).to_string(), "\n")
    print("medians over heads, against rank")
    medians = frame.drop(columns="head").groupby("rank").median()
    print(medians.map(lambda x: f"{x:.2g}").to_string(), "\n")
    varied = counts["rank A"].nunique() > 1
    for column in ("A_r output", "L_r output") if varied else ():
        correlation = np.corrcoef(counts["rank A"], np.log(one[column]))[0, 1]
        print(f"rank A and the log of the error of {column}: correlation {correlation:.2f}")
    picture = options.out / "ranks.png"
    draw(frame, spectra, picture)
    print(f"{picture}, {options.out / 'errors.csv'}; {time.perf_counter() - start:.0f} s")


def draw(frame: Any, spectra: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the decay of both spectra, and errors of outputs against rank, a line a head."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, item in enumerate(spectra.values()):
        for name, colour in (("L", "C0"), ("A", "C3")):
            values = item[f"sigma {name}"]
            label = f"singular values of {name}" if i == 0 else None
            x = np.arange(1, len(values) + 1)
            left.plot(x, values / values[0], color=colour, linewidth=0.8, label=label)
    left.axhline(TOLERANCE, color="0.5", linestyle=":")
    left.set(xscale="log", yscale="log", ylim=(1e-6, 1.5), xlabel="index", ylabel="of the largest")
    for i, (_, head) in enumerate(frame.groupby("head", sort=False)):
        shown = (
            ("A_r output", "C3", "$A_r V$"),
            ("L_r output", "C0", r"softmax of $L_r$, times V"),
        )
        for column, colour, label in shown:
            text = label if i == 0 else None
            # The last point, at rank d, is rounding.
            part = head[head[column] > 1e-8]
            right.plot(part["rank"], part[column], color=colour, linewidth=0.8, label=text)
    middle = float(frame.groupby("head")["mean of V"].first().median())
    right.axhline(middle, color="0.5", linestyle="--", label="mean of V, median")
    right.set(xscale="log", yscale="log", xlabel="rank r", ylabel="relative error of the output")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
