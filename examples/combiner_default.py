"""Choose the defaults of Combiner without training, on the bundled heads only.

    python examples/combiner_default.py

Spans of positions, on the 12 bundled heads as they are and with a causal mask, which they were not
trained with.  Four questions, the first three with all other choices at their defaults:

1. the reference query, whose softmax gives the weights inside a region;
2. the key and the bias of a region, and the second-order term;
3. what is direct, at equal numbers of slots: direct keys and regions of a row.  Each kind takes
   the span length and the size w or t of least median total variation within the budget;
4. the best of these together, at the same budgets.

Printed are the mean total variation of rows, ``TV = |Ahat_i - A_i|_1 / 2``, and the relative error
of the output: median over heads with quartiles; the median of the quotients of the error of a
head and that of the default; and on how many heads the default is worse.  In 1 and 2 slots are the
same, but a weighted reference reads regions and queries once more for each iteration.  Choices
that let a row of a causal problem see later positions are marked with a star: they are no
candidates there.

The script takes two minutes on one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sketchattn as sa

SPANS = (16, 32)
BUDGETS = (48, 64, 96, 128)
ERRORS = {"TV": "row_tv_mean", "output": "output_fro_rel"}

REFERENCES = (
    "zero",
    "region_mean",
    "region_max",
    "global_mean",
    "mass_weighted",
    "mass_weighted(2)",
)
RULES: dict[str, dict[str, str]] = {
    "expected key, entropy": {},
    "expected key, log count": {"bias": "log_count"},
    "expected key, no bias": {"bias": "none"},
    "mean key, entropy": {"key": "mean"},
    "mean key, log count": {"key": "mean", "bias": "log_count"},
    "mean key, no bias": {"key": "mean", "bias": "none"},
    "maximum, log count": {"key": "max", "bias": "log_count"},
    "maximum, no bias": {"key": "max", "bias": "none"},
    "expected key, entropy, second order": {"second_order": "diag"},
    "preset paper": {"preset": "paper"},
}
# What is direct, and the sizes in its place of braces.
DIRECT: dict[str, tuple[int, ...]] = {
    "own": (0,),
    "none": (0,),
    "window({})": (8, 16, 32),
    "own+window({})": (4, 8, 16, 32),
    "top_mass({})": (1, 2, 4, 6),
    "own+top_mass({})": (1, 2, 4, 6),
}
DIRECT_SPANS = (8, 16, 32, 64)
# With nothing but the own span direct a budget is filled by longer spans.
LONG_SPANS = (96, 120, 160, 200, 240)
TOGETHER = ("own", "own+window({})", "own+top_mass({})")
DEFAULT = "own"


def choices(causal: bool, spans: list[int]) -> Iterator[dict[str, Any]]:
    """Yield every choice: its table, its name there, its kind, and the arguments of Combiner."""
    for s in spans:
        for name in REFERENCES:
            star = "" if not causal or sa.Combiner(reference=name).flags.causal_safe else " *"
            arguments: dict[str, Any] = {"block": s, "reference": name}
            yield {"table": f"reference, spans of {s}", "choice": name + star} | {
                "kind": name + star,
                "arguments": arguments,
            }
        for name, rule in RULES.items():
            yield {"table": f"rule, spans of {s}", "choice": name} | {
                "kind": name,
                "arguments": {"block": s, **rule},
            }
    extras: dict[str, dict[str, str]] = {"": {}}
    if not causal:
        extras[", mass_weighted"] = {"reference": "mass_weighted"}
    extras[", second order"] = {"second_order": "diag"}
    if not causal:
        extras[", both"] = extras[", mass_weighted"] | extras[", second order"]
    for kind, sizes in DIRECT.items():
        for extra, more in extras.items():
            if extra and kind not in TOGETHER:
                continue
            for s in (*DIRECT_SPANS, *LONG_SPANS) if kind == DEFAULT else DIRECT_SPANS:
                for size in sizes:
                    direct = kind.format(size)
                    yield {
                        "table": "together" if extra else "direct",
                        "choice": f"{direct}{extra}, spans of {s}",
                        "kind": kind.format("w" if "window" in kind else "t") + extra,
                        "arguments": {"block": s, "direct": direct, **more},
                    }


def measure(problem: sa.AttentionProblem, arguments: dict[str, Any]) -> dict[str, float]:
    """Return the slots a row and the errors of one choice on one head."""
    method = sa.Combiner("fixed", **arguments, allow_leak=bool(problem.causal))
    ahat: Any = method.approximate(problem)
    report = sa.error_report(problem, ahat, spectral=False)
    errors = {name: float(getattr(report, field)) for name, field in ERRORS.items()}
    return {"slots": ahat.plan.slots / problem.n_q, **errors}


def compare(frame: Any, default: Any) -> Any:
    """Return medians, quartiles, quotients to the default and wins of each choice.

    ``frame`` has the columns choice, head and errors, and ``default`` the errors by head.
    """
    import pandas as pd

    rows = {}
    for choice, part in frame.groupby("choice", sort=False):
        part = part.set_index("head")
        row: dict[str, Any] = {"slots": f"{part['slots'].mean():.0f}"}
        for name in ERRORS:
            low, middle, high = part[name].quantile([0.25, 0.5, 0.75])
            quotient = part[name] / default[name]
            row[name] = f"{middle:.3f} ({low:.3f} to {high:.3f})"
            row[f"{name}/default"] = f"{quotient.median():.3f}"
            row[f"{name} better"] = f"{(quotient < 1 - 1e-6).sum()}/{len(part)}"
        rows[choice] = row
    return pd.DataFrame(rows).T


def best(frame: Any) -> str:
    """Return the choices with the least median of each error, but for those with a star."""
    medians = frame[~frame["choice"].str.endswith("*")]
    medians = medians.groupby("choice", sort=False)[list(ERRORS)].median()
    return "; ".join(f"least {x}: {medians[x].idxmin()}" for x in medians)


def at_budget(frame: Any, budget: int) -> Any:
    """Return the member of each kind that has the least median TV within the budget of slots."""
    import pandas as pd

    medians = frame.groupby(["kind", "choice"], sort=False)[["slots", "TV"]].median()
    fitting = medians[medians["slots"] <= budget].reset_index()
    chosen = fitting.loc[fitting.groupby("kind", sort=False)["TV"].idxmin(), "choice"]
    return pd.concat([frame[frame["choice"] == name] for name in chosen])


def show(title: str, frame: Any, default: Any) -> None:
    """Print one table."""
    print(title)
    print(compare(frame, default.set_index("head")).to_string())
    print(best(frame), "\n")


def main() -> None:
    """Run the study and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spans", default=",".join(map(str, SPANS)), help="of questions 1 and 2")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)), help="of 3 and 4")
    parser.add_argument("--first", type=int, default=None, help="heads to take, by default all")
    parser.add_argument("--out", type=Path, default=Path("combiner-default"))
    options = parser.parse_args()
    spans = [int(x) for x in options.spans.split(",")]
    budgets = [int(x) for x in options.budgets.split(",")]

    import pandas as pd

    start = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    given = list(sa.load_heads("minilm"))[: options.first]
    frames = []
    for causal in (False, True):
        problems = [
            sa.AttentionProblem(p.q, p.k, p.v, scale=p.scale, causal=causal, name=p.name)
            for p in given
        ]
        mask = "causal" if causal else "not causal"
        heads = f"{len(problems)} heads, n = {problems[0].n_k}, d = {problems[0].d}, {mask}"
        made = [
            {k: v for k, v in choice.items() if k != "arguments"}
            | {"head": p.name}
            | measure(p, choice["arguments"])
            for choice in choices(causal, spans)
            for p in problems
        ]
        frame = pd.DataFrame(made)
        name = "region_mean" if causal else "global_mean"
        for s in spans:
            mine = frame[frame["table"] == f"reference, spans of {s}"]
            default = mine[mine["choice"] == name]
            for question in ("reference", "rule"):
                table = f"{question}, spans of {s}"
                show(f"{heads}: {table}", frame[frame["table"] == table], default)
        direct = frame[frame["table"] == "direct"]
        both = frame[frame["table"].isin(["direct", "together"])]
        both = both[both["kind"].str.startswith(tuple(x.split("(")[0] for x in TOGETHER))]
        for budget in budgets:
            for question, part in (("direct", direct), ("together", both)):
                mine = at_budget(part, budget)
                title = f"{heads}: {question}, at most {budget} slots a row; the default is own"
                show(title, mine, mine[mine["kind"] == DEFAULT])
        frames.append(frame.assign(causal=causal))
    path = options.out / "errors.csv"
    pd.concat(frames).to_csv(path, index=False)
    print(f"{path}; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
