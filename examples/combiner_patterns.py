"""Measure every pattern of Combiner on real heads: error against slots a row.

    python examples/combiner_patterns.py
    python examples/combiner_patterns.py --heads heads.safetensors --first 2 --out patterns
    python examples/combiner_patterns.py --certificates

A row of Combiner has slots: keys that it attends to one by one, and regions of keys that it sees
through one summary each.  Their number is what a row costs.  The script sweeps the sizes of every
pattern, of contiguous spans and of clusters of keys (routing), and of what is direct: the own
region, a window of positions, the regions of largest mass.  Printed are, for each of them and
each budget of slots, the least medians over heads of the total variation of rows
``|Ahat_i - A_i|_1 / 2`` and of the relative error of the output, among the sizes that are within
the budget; all numbers are in a file.  For scale: the best that as many single keys can do, chosen
by looking at A ("top keys"), and the mean of V.

Clusters are computed from all keys, so on causal heads routing compares matrices and is no
decoder.  Nothing of size n x n is held for long heads: the errors come from tiles of exact rows.

``--certificates`` draws, in place of all this, the bound that `sketchattn.certify_rows` finds for
each row without knowing A against the total variation itself.

The bundled heads (12 of 512 tokens) take a minute or two on one core, and eight heads of 4096
tokens a quarter of an hour; ``--certificates`` takes as long as that on the bundled heads, and a
few minutes on the others.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import sketchattn as sa

BUDGETS = (16, 32, 64, 128, 256, 512)
FIELDS = ("row_tv_mean", "row_tv_max", "row_kl_mean", "output_fro_rel", "skill")
# Patterns of positions whose own part is direct; what names them in tables is the key.
PATTERNS: dict[str, dict[str, Any]] = {
    "fixed": {"pattern": "fixed"},
    "logsparse": {"pattern": "logsparse"},
    "axial vertical": {"pattern": "axial_vertical"},
    "axial horizontal": {"pattern": "axial_horizontal"},
    # With any other reference query this is the matrix of "fixed".
    "axial row-major": {"pattern": "axial_rowmajor", "reference": "column"},
    "axial mixture": {"pattern": ("axial_vertical", "axial_horizontal")},
    "routing": {"pattern": "routing"},
}
# What is direct beside or in place of the own region; w and t are swept.
DIRECT = ("window(w)", "own+window(w)", "own+top_mass(t)", "own+window(w)+top_mass(t)")
WINDOWS = (1, 4, 16)  # in eighths of sqrt(n)
HEAVY = (1, 2, 4)


def choices(n: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of each family and the arguments of its members, sizes around sqrt(n)."""
    root = 1 << round(np.log2(n) / 2)
    sizes = sorted({max(1, root * x // 4) for x in (1, 2, 4, 8, 16)})
    fitting = [s for s in sizes if s < n]
    # With nothing but the own part direct, long parts fill the larger budgets.
    long = [s for s in (7 * root, 15 * root) if s < n]
    for name, kind in PATTERNS.items():
        for s in [1, *fitting] if name == "logsparse" else [*fitting, *long]:
            yield name, kind | size_of(kind["pattern"], s, n)
    for name in ("fixed", "routing"):
        for text in DIRECT:
            for s in fitting[1:4]:
                for eighths, t in zip(WINDOWS, HEAVY, strict=True):
                    w = max(1, root * eighths // 8)
                    direct = text.replace("(w)", f"({w})").replace("(t)", f"({t})")
                    size = size_of(name, s, n)
                    yield f"{name}, {text}", {"pattern": name, "direct": direct} | size


def size_of(pattern: Any, s: int, n: int) -> dict[str, int]:
    """Return spans, columns or leaves of s positions, or as many clusters as spans of s."""
    return {"rank": -(-n // s)} if pattern == "routing" else {"block": s}


def slots_of(ahat: Any) -> float:
    """Return the mean number of direct keys and regions of a row."""
    parts = getattr(ahat, "parts", (ahat,))
    return float(sum(part.plan.slots for part in parts) / ahat.shape[0])


def measure(problem: sa.AttentionProblem, seed: int) -> list[dict[str, Any]]:
    """Return one row of errors for each choice on one head."""
    rows: list[dict[str, Any]] = []
    clusters: dict[int, Any] = {}

    def add(family: str, what: str, slots: float, ahat: Any) -> None:
        report = sa.error_report(problem, ahat, spectral=False)
        numbers = {name: getattr(report, name) for name in FIELDS}
        row = {"head": problem.name, "family": family, "choice": what, "slots": slots}
        rows.append(row | numbers)

    for family, arguments in choices(problem.n_k):
        leak = bool(problem.causal and arguments["pattern"] == "routing")
        method = sa.Combiner(**arguments, allow_leak=leak)
        # As many clusters are the same clusters, whatever is direct.
        count = arguments.get("rank", 0)
        if count not in clusters:
            clusters[count] = method.draw(problem, rng=seed)
        ahat = method.approximate(problem, draw=clusters[count])
        what = " ".join(f"{k}={v}" for k, v in arguments.items() if k != "pattern")
        add(family, what, slots_of(ahat), ahat)
    for r in BUDGETS:
        if r < problem.n_k:
            add("top keys", f"rank={r}", r, sa.TopK(r).approximate(problem))
    add("mean of V", "", 0, sa.VMean().approximate(problem))
    return rows


def best_within(medians: Any, field: str, budgets: list[int]) -> Any:
    """Return the least median of each family among choices of at most so many slots."""
    import pandas as pd

    found = {
        budget: medians[medians["slots"] <= budget].groupby("family", sort=False)[field].min()
        for budget in budgets
    }
    order = list(dict.fromkeys(medians["family"]))
    return pd.DataFrame(found).reindex(order)


# --- certificates ---------------------------------------------------------------------------------


def row_errors(problem: sa.AttentionProblem, ahat: Any) -> Any:
    """Return the total variation of each row, from tiles of exact rows."""
    wide = problem.astype(np.float64)
    step = max(1, (1 << 21) // problem.n_k)
    found = []
    for first in range(0, problem.n_q, step):
        rows = np.arange(first, min(first + step, problem.n_q))
        found.append(np.abs(ahat.rows(rows) - wide.exact.rows(rows)).sum(axis=1) / 2)
    return np.concatenate(found)


def certificates(problem: sa.AttentionProblem, seed: int) -> list[dict[str, Any]]:
    """Return, for regions of 4 to 32 keys, the truth and two bounds of every row.

    The second bound, ``min(sqrt(KL/2), sqrt(1 - exp(-KL)))``, takes the divergence from the exact
    normaliser of the row: ``KL(Ahat_i | A_i) = ln Z_i - ln Zhat_i``.
    """
    wide = problem.astype(np.float64)
    found = []
    for pattern in ("fixed", "routing"):
        for s in (4, 8, 16, 32):
            if s >= problem.n_k:
                continue
            leak = bool(problem.causal and pattern == "routing")
            size: dict[str, Any] = size_of(pattern, s, problem.n_k)
            method = sa.Combiner(pattern, **size, allow_leak=leak)
            ahat: Any = method.approximate(wide, rng=seed)
            kl = np.maximum(wide.logsumexp - ahat.log_normalizer, 0)
            found.append(
                {
                    "head": problem.name,
                    "regions": f"{pattern}, {s} keys",
                    "slots": slots_of(ahat),
                    "truth": row_errors(problem, ahat),
                    "by KL": np.sqrt(np.minimum(kl / 2, -np.expm1(-kl))),
                    "certificate": sa.certify_rows(ahat).tv,
                }
            )
    return found


def show_certificates(heads: Any, seed: int, out: Path) -> str:
    """Print a table over heads, draw all rows, and return the paths."""
    import pandas as pd

    names = ("truth", "by KL", "certificate")
    made = [row for p in heads for row in certificates(p, seed)]
    rows = pd.concat(
        [pd.DataFrame({k: x[k] for k in ("head", "regions", "slots", *names)}) for x in made]
    )
    rows.to_csv(out / "certificates.csv", index=False)
    broken = int((rows["truth"] > rows["certificate"] + 1e-9).sum())
    mean_of_v = {p.name: row_errors(p, sa.VMean().approximate(p)) for p in heads}
    rows["beats"] = rows["certificate"] < np.concatenate([mean_of_v[x["head"]] for x in made])
    groups = rows.groupby("regions", sort=False)
    table = groups[["slots", *names]].median()
    table["percent"] = 100 * groups["beats"].mean()
    means = rows.groupby(["regions", "head"], sort=False)["certificate"].mean()
    less = means < means.index.get_level_values("head").map(lambda x: mean_of_v[x].mean())
    table["heads"] = less.groupby("regions").sum()
    print("median over all rows of all heads of the total variation and of its bounds, the")
    print("percentage of certificates below the total variation of the mean of V in that row, and")
    print("the number of heads on which this is so in the mean over rows")
    print(table.round({"slots": 1, "percent": 0}).round(3).to_string(), "\n")
    print(f"rows whose certificate is below the truth: {broken} of {len(rows)}")
    picture = out / "certificates.png"
    draw_certificates(rows, picture)
    return f"{picture}, {out / 'certificates.csv'}"


# --- pictures -------------------------------------------------------------------------------------


def draw_certificates(rows: Any, path: Path) -> None:
    """Draw certificate against truth, a point a row, thinned to some thousands."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, pattern in zip(panels, ("fixed", "routing"), strict=True):
        mine = rows[rows["regions"].str.startswith(pattern)]
        for name, part in mine.groupby("regions", sort=False):
            some = part.iloc[:: max(1, len(part) // 1500)]
            axes.plot(some["truth"], some["certificate"], ".", markersize=2, label=name)
        axes.plot([0, 1], [0, 1], color="k", linewidth=0.8)
        axes.set(xlabel="total variation of the row", xlim=(0, 1), ylim=(0, 1.02))
        axes.legend(frameon=False, fontsize=8, markerscale=4, loc="lower right")
    panels[0].set_ylabel("certificate")
    figure.savefig(path, dpi=150)


def draw(medians: Any, path: Path) -> None:
    """Draw the least medians that each family reaches against slots."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    families = list(dict.fromkeys(medians["family"]))
    # The colour is that of the pattern, or of what is direct; clusters are dashed.
    panels = {
        "patterns, own part direct": [x for x in families if x in PATTERNS],
        "what is direct": [x for x in families if x.split(",")[0] in ("fixed", "routing")],
    }
    fields = {"row_tv_mean": "mean total variation", "output_fro_rel": "error of the output"}
    figure = Figure(figsize=(10, 8), layout="constrained")
    for line, (field, label) in zip(figure.subplots(2, 2), fields.items(), strict=True):
        level = float(medians[medians["family"] == "mean of V"][field].iloc[0])
        for axes, (title, shown) in zip(line, panels.items(), strict=True):
            kinds = list(dict.fromkeys(x.partition(", ")[2] for x in shown))
            for number, name in enumerate([*shown, "top keys"]):
                part = medians[medians["family"] == name].sort_values("slots")
                part = part[part[field] < part[field].cummin().shift(fill_value=np.inf)]
                if len(kinds) > 1:
                    number = kinds.index(name.partition(", ")[2])
                style: dict[str, Any] = {"color": f"C{number}", "linestyle": "-"}
                if name.startswith("routing"):
                    style["linestyle"] = "--"
                if name == "top keys":
                    style = {"color": "k", "linestyle": ":"}
                axes.plot(part["slots"], part[field], marker=".", label=name, **style)
            axes.axhline(level, color="0.5", linestyle=":", label="mean of V")
            axes.set(xscale="log", yscale="log", xlabel="slots a row", ylabel=label, title=title)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.minorticks_off()
            axes.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run the study, print its tables and draw its picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", default="minilm", help="bundled heads or a file of heads")
    parser.add_argument("--first", type=int, default=None, help="heads to take, by default all")
    parser.add_argument("--seed", type=int, default=0, help="of the clusters")
    parser.add_argument("--out", type=Path, default=Path("combiner-patterns"))
    parser.add_argument("--certificates", action="store_true", help="bounds of rows against truth")
    options = parser.parse_args()
    bundled = not Path(options.heads).exists()
    given = sa.load_heads(options.heads) if bundled else sa.read_heads(options.heads)
    heads = list(given)[: options.first]

    import pandas as pd

    start = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    kind = "causal" if heads[0].causal else "not causal"
    size = f"n = {heads[0].n_k}, d = {heads[0].d}"
    print(f"{len(heads)} heads, {size}, {kind}, seed {options.seed}\n")
    if options.certificates:
        paths = show_certificates(heads, options.seed, options.out)
    else:
        frame = pd.DataFrame([row for p in heads for row in measure(p, options.seed)])
        frame.to_csv(options.out / "errors.csv", index=False)
        keys = ["family", "choice"]
        medians = frame.groupby(keys, sort=False)[["slots", *FIELDS]].median().reset_index()
        budgets = [b for b in BUDGETS if b < heads[0].n_k]
        for field, label in (
            ("row_tv_mean", "mean total variation of rows"),
            ("output_fro_rel", "relative error of the output"),
        ):
            print(f"{label}, median over heads, least within a budget of slots a row")
            print(best_within(medians, field, budgets).round(3).to_string(na_rep="-"), "\n")
        if heads[0].causal:
            print("routing looks at later keys: for comparing matrices only\n")
        draw(medians, options.out / "errors.png")
        paths = f"{options.out / 'errors.png'}, {options.out / 'errors.csv'}"
    print(f"{paths}; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
