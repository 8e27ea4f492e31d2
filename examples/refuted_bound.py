"""Hold a published bound against what it is about, and a corrected one beside it.

    python examples/refuted_bound.py
    python examples/refuted_bound.py --heads heads.safetensors --trials 200 --out refuted

Theorem 1 of Linformer: for any column w of V and R (r, n) with independent N(0, 1/r) entries,
`|A R^T R w - A w| <= eps |A w|` but with probability `2 n^(-1/4)`, once
`r = 5 ln n / (eps^2 - eps^3)`.  It is refuted (`linformer.thm1`).  What holds is the mean square
(`linformer.mean_square`): relative to `|A w|` the root mean square error is exactly
`sqrt((1 + rho) / (rho r))` with `rho = |A w|^2 / (|A|_F |w|)^2`, so that a relative error of eps
takes `(1 + rho) / (rho eps^2)` rows; and, for all rows of the output at once
(`linformer.additive`), an error relative to `|A_i| |w|`, which says little where `|A w|` is small.

Both are checked by `sketchattn.theory.check` on a constructed instance, uniform attention and
w = e_1, for one n at growing ranks and for growing n at one eps, and on heads, each with the column
w of least `|A w| / |w|`; once more with the one of largest.  Observed are, at the rank that the
theorem asks for, the quantile of the error that the theorem bounds, and the root mean square.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

import sketchattn as sa
from sketchattn.base.drawing import make_figure, plain_style
from sketchattn.base.files import write_text

CLAIM, CORRECTED, EVERY_ROW = "linformer.thm1", "linformer.mean_square", "linformer.additive"


def spike(n: int) -> tuple[Any, Any]:
    """Return uniform attention and w = e_1; all rows are alike, and one of them is enough."""
    return np.full((1, n), 1 / n), np.eye(n, 1)


def columns(problem: sa.AttentionProblem) -> dict[str, tuple[Any, Any]]:
    """Return A with the column of V that has the least, and the largest, ``|A w| / |w|``."""
    wide = problem.astype(np.float64)
    a, v = wide.exact.to_dense(), np.asarray(wide.values)
    size = np.linalg.norm(v, axis=0)
    ratio = np.linalg.norm(a @ v, axis=0) / np.where(size > 0, size, np.inf)
    least, most = np.argmin(np.where(size > 0, ratio, np.inf)), np.argmax(ratio)
    return {"least": (a, v[:, [least]]), "most": (a, v[:, [most]])}


def compare(name: str, pair: tuple[Any, Any], eps: float, trials: int, every: bool) -> Any:
    """Return what both statements say of a pair (A, w) at the rank that the published one names.

    ``every``: check the corrected tail for all rows of the output as well.
    """
    a, w = pair
    rho = float((np.linalg.norm(a @ w) / np.linalg.norm(a) / np.linalg.norm(w)) ** 2)
    published = sa.theory.check(CLAIM, pair, trials=trials, eps=eps)
    row = {
        "on": name,
        "n": a.shape[1],
        "eps": eps,
        "r": published.rank,
        "rho": rho,
        "published": published.status,
        "failures": published.failures,
        "trials": published.trials,
        "claimed_rate": published.delta,
        "quantile": published.observed,
        "rank_for_eps": math.ceil((1 + rho) / (rho * eps**2)),
        "rank_for_zeros": math.ceil((1 + rho) / rho),
    }
    if not published.trials:  # the theorem asks for as many rows as there are keys
        return row
    mean = sa.theory.check(CORRECTED, pair, trials=trials, rank=published.rank)
    # Of squares relative to (|A|_F |w|)^2, as roots relative to |A w|.
    row |= {
        "corrected": mean.status,
        "observed_rms": math.sqrt(mean.observed / rho),
        "predicted_rms": math.sqrt(mean.bound / rho),
        "z": mean.z,
    }
    if every:
        tail = sa.theory.check(EVERY_ROW, pair, trials=trials, eps=eps)
        row |= {"every_row": tail.status, "every_row_failures": tail.failures}
        row |= {"every_row_rank": tail.rank}
    return row


def measure(heads: Any, options: argparse.Namespace) -> tuple[list[Any], list[Any], list[Any]]:
    """Return rows of the instance at one n, at one eps, and of the heads."""
    eps = sorted((float(x) for x in options.eps.split(",")), reverse=True)
    lengths = [int(x) for x in options.n.split(",")]
    middle, trials = options.one_eps, options.trials
    at_one_n = [compare("spike", spike(lengths[0]), x, trials, False) for x in eps]
    at_one_eps = [compare("spike", spike(n), middle, trials, True) for n in lengths]
    of_heads = []
    for problem in heads:
        pairs = columns(problem)
        of_heads += [
            compare(problem.name, pairs["least"], x, trials, x == middle)
            for x in sorted({*eps, middle}, reverse=True)
        ]
        best = sa.theory.check(CLAIM, pairs["most"], trials=trials, eps=middle)
        if best.trials:
            of_heads[-1]["failures_of_best"] = best.failures
    return at_one_n, at_one_eps, of_heads


def table(rows: list[Any]) -> str:
    """Return a line a row."""
    lines = [
        f"{'on':<22}{'n':>6}{'eps':>6}{'r':>6}{'failures':>10}{'claimed':>9}{'quantile':>10}"
        f"{'rms':>8}{'predicted':>11}{'r for eps':>11}{'beats zero':>12}"
    ]
    for x in rows:
        start = f"{x['on']:<22}{x['n']:>6}{x['eps']:>6.2f}{x['r']:>6}"
        if "corrected" not in x:
            lines.append(f"{start}  {x['published']}: it takes as many rows as there are keys")
            continue
        lines.append(
            f"{start}{x['failures'] / x['trials']:>10.0%}{x['claimed_rate']:>9.0%}"
            f"{x['quantile']:>10.3g}{x['observed_rms']:>8.3g}{x['predicted_rms']:>11.3g}"
            f"{x['rank_for_eps']:>11}{x['rank_for_zeros']:>12}"
        )
    return "\n".join(lines)


def draw(parts: tuple[list[Any], list[Any], list[Any]], path: Path) -> None:
    """Draw errors against rank: a panel for one n, one for growing n, one for heads."""
    import matplotlib

    titles = ("w = e_1, uniform A, n = {n}", "the same, eps = {eps:g}, n grows", "{count} heads")
    with plain_style():
        matplotlib.rcParams["svg.hashsalt"] = "refuted_bound"  # the same bytes every time
        figure = make_figure(figsize=(10, 4), layout="constrained")
        panels = figure.subplots(1, 3, sharey=True)
        for axes, rows, title in zip(panels, parts, titles, strict=True):
            groups: dict[str, list[Any]] = {}
            for x in rows:
                if "corrected" in x:
                    groups.setdefault(x["on"], []).append(x)
            width = 1.5 if len(groups) == 1 else 0.8
            for i, group in enumerate(groups.values()):
                r = [x["r"] for x in group]
                for field, style, colour, label in (
                    ("eps", "--", "0.1", "published bound"),
                    ("quantile", "o-", "C3", "observed, the quantile that it bounds"),
                    ("predicted_rms", "-", "C0", "corrected: root mean square"),
                    ("observed_rms", "x", "C0", "observed root mean square"),
                ):
                    y = [x[field] for x in group]
                    axes.plot(
                        r, y, style, color=colour, linewidth=width, markersize=4,
                        markerfacecolor="none", label=label if i == 0 else None,
                    )  # fmt: skip
            if title is titles[1]:
                for x in rows:
                    axes.annotate(
                        f"n = {x['n']}", (x["r"], x["eps"]), (0, -6), rotation=90,
                        textcoords="offset points", fontsize=8, ha="center", va="top",
                    )  # fmt: skip
            axes.axhline(1, color="0.6", linewidth=1, linestyle=":", label="zeros")
            first = rows[0]
            axes.set_title(
                title.format(n=first["n"], eps=first["eps"], count=len(groups)), fontsize=9
            )
            axes.set(yscale="log", xlabel="rank r that Theorem 1 asks for")
            ticks = (0.25, 0.5, 1, 2, 4, 8)
            axes.set_yticks(ticks, [f"{x:g}" for x in ticks])
            axes.set_yticks([], minor=True)
            axes.set_ylim(bottom=0.19)
        handles, labels = axes.get_legend_handles_labels()
        figure.axes[0].set_ylabel("error relative to |A w|")
        figure.legend(
            handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    """Check the claims, print the tables and draw the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--heads", default="minilm", help="bundled heads or a file of heads")
    parser.add_argument("--eps", default="0.66,0.5,0.4,0.3", help="ranks are those of these eps")
    parser.add_argument("--one-eps", type=float, default=0.5, help="where n grows")
    parser.add_argument("--n", default="512,1024,2048,4096,8192", help="n of the instance")
    parser.add_argument("--trials", type=int, default=80)
    parser.add_argument("--out", type=Path, default=Path("refuted-bound"))
    parser.add_argument("--picture", type=Path, help="refuted_bound.svg in the output folder")
    parser.add_argument("--small", action="store_true", help="seconds: two eps, n to 512, one head")
    options = parser.parse_args()
    bundled = not Path(options.heads).exists()
    heads = list(sa.load_heads(options.heads) if bundled else sa.read_heads(options.heads))
    if options.small:
        options.eps, options.n, options.trials, heads = "0.66,0.5", "256,512", 60, heads[:1]

    import pandas as pd

    start = time.perf_counter()
    parts = measure(heads, options)
    frame = pd.DataFrame([row | {"part": i} for i, rows in enumerate(parts) for row in rows])
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "verdicts.csv", frame.to_csv(index=False))

    for id_ in (CLAIM, CORRECTED):
        record = sa.theory.claims()[id_]
        print(f"{record.id} ({record.status}): {record.title}")
    print(f"\nuniform attention, w = e_1; {options.trials} trials, seed 0")
    print(table([*parts[0], *parts[1][1:]]))
    middle = [x for x in parts[2] if x["eps"] == options.one_eps]
    print(f"\n{len(heads)} heads, the column w of least |A w| / |w|, eps = {options.one_eps:g}")
    print(table(middle))
    print(f"\n{said_of(parts, options.one_eps)}")
    picture = options.picture or options.out / "refuted_bound.svg"
    draw(parts, picture)
    print(f"{picture}, {options.out / 'verdicts.csv'}; {time.perf_counter() - start:.0f} s")


def said_of(parts: tuple[list[Any], list[Any], list[Any]], eps: float) -> str:
    """Return how often each statement failed, and what the corrected one costs."""
    rows = [x for part in (parts[0], parts[1][1:], parts[2]) for x in part if "corrected" in x]
    one = [x for x in parts[2] if x["eps"] == eps and "corrected" in x]
    every = [x for part in parts for x in part if "every_row" in x]
    lines = [
        f"published: violated in {sum(x['published'] == 'violated' for x in rows)} of {len(rows)} "
        f"checks; {sum(x['failures'] for x in rows)} of {sum(x['trials'] for x in rows)} trials "
        "are above the bound",
        f"corrected mean square: violated in "
        f"{sum(x['corrected'] == 'violated' for x in rows)} of {len(rows)} checks, not below the "
        f"error of zeros in {sum(x['predicted_rms'] >= 1 for x in rows)} of them; largest |z| "
        f"{max(abs(x['z']) for x in rows if x['z'] is not None):.1f}",
        f"corrected tail for every row: {sum(x['every_row_failures'] or 0 for x in every)} "
        f"failures; " + ", ".join(
            f"{status} in {sum(x['every_row'] == status for x in every)}"
            for status in sorted({x["every_row"] for x in every})
        ),
    ]  # fmt: skip
    if one:
        cost = sorted(x["rank_for_eps"] for x in one)
        best = [x["failures_of_best"] for x in parts[2] if "failures_of_best" in x]
        middle = statistics.median(cost)
        lines.append(
            f"heads at eps = {eps:g}: the theorem asks for {one[0]['r']} rows of {one[0]['n']}, "
            f"the corrected one for {cost[0]} to {cost[-1]} (median {middle:.0f})\n"
            f"with the column of largest |A w| / |w|: {min(best)} to {max(best)} of "
            f"{one[0]['trials']} trials are above the bound"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
