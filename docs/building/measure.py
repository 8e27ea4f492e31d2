"""Measure what the pages show: a study, times, and verdicts; each is one JSON file in docs/data."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import sketchattn as sa
from sketchattn.base.files import write_text
from sketchattn.base.machine import machine
from sketchattn.bench.harness import library_threads, time_both
from sketchattn.studies.columns import REFERENCES
from sketchattn.studies.grid import default_ranks

DATA = Path(__file__).resolve().parents[1] / "data"
Data = dict[str, Any]
ERROR = "output_fro_rel"
# The budget of the tables: keys, landmarks, features or regions a row, of 512.
RANK = 64
SEEDS = 4
# Heads that are long enough for approximations to pay, where no file of real ones is given.
MADE, MADE_N, MADE_D = "clustered", 4096, 64
# Rounds of every call on each of them.
ROUNDS = 3


def write(name: str, found: dict[str, Any]) -> Path:
    """Write what was measured, with the machine, in a form whose changes can be read."""
    DATA.mkdir(exist_ok=True)
    path = DATA / f"{name}.json"
    text = json.dumps({**found, "machine": machine()}, indent=1, allow_nan=False, sort_keys=True)
    write_text(path, text + "\n")
    return path


def read(name: str) -> dict[str, Any]:
    """Return what was measured."""
    found: dict[str, Any] = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    return found


def known(value: float, digits: int = 4) -> float | None:
    """Return a number in so many significant digits, None for what is not finite."""
    value = float(value)
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def points_of(study: Data, method: str) -> list[Data]:
    """Return the errors of a method or reference by rank, none where it is not in the study."""
    points: list[Data] = study["methods"].get(method) or study["references"].get(method) or []
    return points


def at_budget(study: Data, method: str) -> Data | None:
    """Return the errors of a method at the largest rank of the budget, if there are any."""
    allowed = [point for point in points_of(study, method) if point["rank"] <= study["rank"]]
    return max(allowed, key=lambda point: float(point["rank"])) if allowed else None


# --- the study ----------------------------------------------------------------------------------


def study() -> Path:
    """Measure every method on the bundled heads: error against rank, and against time."""
    heads = sa.load_heads("minilm")
    plain = {name: cls for name, cls in sa.methods().items() if name not in REFERENCES}
    # Studies leave out `compressed`, which is exact from rank d on.  Here it has a page.
    result = sa.study(heads, None, seeds=SEEDS, jobs=1, pictures=False, report=False)
    more = sa.study(
        heads,
        "compressed",
        ranks=[r for r in default_ranks(heads[0].n_k) if r <= heads[0].d],
        seeds=1,
        jobs=1,
        pictures=False,
        report=False,
        floors=False,
    )
    references = result.references
    exact = references[references["method"] == "exact"].groupby("head")["seconds"].median()
    frame = pd.concat([result.frame, more.frame], ignore_index=True)
    return write(
        "study",
        {
            "command": "python docs/refresh.py study",
            "heads": {str(problem.name): hardness(problem) for problem in heads},
            "n": heads[0].n_k,
            "d": heads[0].d,
            "seeds": SEEDS,
            "rank": RANK,
            "methods": curves(frame, exact),
            "references": curves(references, exact),
            "left_out": {
                name: result.left_out.get(name, "it looks at the exact matrix")
                for name in plain
                if name not in set(frame["method"])
            },
        },
    )


def hardness(problem: sa.AttentionProblem) -> dict[str, float | None]:
    """Return what the picture of failures puts errors against."""
    found = sa.describe(problem)
    return {
        "perplexity": known(found.perplexity_median),
        "rank_90": known(found.rank_90 or math.nan),
    }


def curves(frame: pd.DataFrame, exact: pd.Series[float]) -> dict[str, Any]:
    """Return by method and rank the median over heads, its spread, the worst head, and the cost."""
    made: dict[str, Any] = {}
    for method, rows in frame.groupby("method"):
        points = []
        for rank, group in rows.groupby("rank"):
            # Of a head the median over seeds counts.
            by_head = group.groupby("head")[[ERROR, "skill", "seconds", "work"]].median()
            errors = by_head[ERROR]
            low, middle, high = np.quantile(errors, [0.25, 0.5, 0.75])
            points.append(
                {
                    "rank": int(str(rank)),
                    "median": known(middle),
                    "low": known(low),
                    "high": known(high),
                    "worst": known(errors.max()),
                    "worst_head": str(errors.idxmax()),
                    "skill": known(by_head["skill"].median()),
                    "time": known(float((by_head["seconds"] / exact).median())),
                    "work": known(by_head["work"].median()),
                    "heads": {str(head): known(error) for head, error in errors.items()},
                }
            )
        made[str(method)] = points
    return made


# --- times --------------------------------------------------------------------------------------


def times(path: str | None = None) -> Path:
    """Measure the time of every method on long heads, in turn with exact attention."""
    heads = list(long_heads(path))
    found: dict[str, Any] = {}
    for name, cls in sa.methods().items():
        method = made(cls)
        # A form for causal heads is, on others, the method that it is made of.
        if name == "exact" or method.traits.oracle or method.traits.causal_form:
            continue
        try:
            method.check(heads[0])
        except ValueError as refused:
            found[name] = {"refused": str(refused).splitlines()[0]}
            continue
        rows = []
        for head in heads:
            # From arrays each time: a problem remembers what it computed.
            attend = partial(sa.attention, head.q, head.k, head.values, scale=head.scale)
            calls: dict[str, Callable[[], object]] = {
                "exact": partial(attend, "exact"),
                name: partial(attend, method, rng=0),
            }
            both = time_both(calls, ROUNDS)
            shares = [
                statistics.median(a / b for a, b in zip(x[name], x["exact"], strict=True))
                for x in (both, both.one_thread)
            ]
            output = method.attend(head, rng=0)
            error = np.linalg.norm(output - head.output) / np.linalg.norm(head.output)
            rows.append((*shares, float(error)))
        every, one, errors = zip(*rows, strict=True)
        found[name] = {
            "all": known(statistics.median(every), 3),
            "one": known(statistics.median(one), 3),
            "one_range": [known(min(one), 3), known(max(one), 3)],
            "error": known(statistics.median(errors), 3),
            "worst": known(max(errors), 3),
        }
    said = f"made, {MADE}" if path is None else Path(path).name
    return write(
        "times",
        {
            "command": f"python docs/refresh.py times{'' if path is None else f' --heads {said}'}",
            "heads": {"of": said, "count": len(heads), "n": heads[0].n_k, "d": heads[0].d},
            "rank": RANK,
            "rounds": ROUNDS,
            "threads": library_threads(),
            "methods": found,
        },
    )


def long_heads(path: str | None) -> Iterator[sa.AttentionProblem]:
    """Return the heads of a file, or a made one, in float32 and without a mask of order."""
    made = sa.make_heads(MADE, n=MADE_N, d=MADE_D, rng=0)
    heads: Iterable[Any] = made if path is None else sa.read_heads(path)
    for x in heads:
        arrays = (np.asarray(y, np.float32) for y in (x.q, x.k, x.values))
        yield sa.AttentionProblem(*arrays, scale=x.scale, name=x.name)


def made(cls: type[sa.Method]) -> sa.Method:
    """Return a method at the rank of the budget, if it has one."""
    takes = "rank" in cls._get_param_names()
    method: sa.Method = cls(**({"rank": RANK} if takes else {}))
    return method


def speed() -> Path | None:
    """Measure exact attention beside PyTorch's; nothing without PyTorch."""
    if find_spec("torch") is None:
        print("left as it is: PyTorch is not installed here; .venv-tests has it")
        return None
    from sketchattn.bench.runner import run

    rows = [
        x for x in run(["exact"], rounds=7) if x["against"] == "torch SDPA" and x["unit"] == "s"
    ]
    return write(
        "speed",
        {
            "command": "python docs/refresh.py speed",
            "rows": [
                {
                    "case": x["case"],
                    "milliseconds": known(1e3 * x["ours"], 3),
                    "all": known(x["ratio"], 3),
                    "spread": [known(y, 3) for y in x["ratio_quartiles"]],
                    "one": known(x["one_thread"]["ratio"], 3),
                }
                for x in rows
            ],
        },
    )


# --- verdicts -----------------------------------------------------------------------------------


def claims() -> Path:
    """Check every claim on the bundled heads and on the instances, with the seed of the record."""
    result = sa.theory.validate(None, progress=False)
    by_claim: dict[str, list[Any]] = {name: [] for name in sa.theory.claims()}
    names = {str(problem.name) for problem in sa.load_heads("minilm")}
    for row in result.rows:
        by_claim[row.claim.id].append(row.verdict)
    found = {}
    for name, verdicts in by_claim.items():
        heads = [x for x in verdicts if x.instance in names]
        found[name] = {
            "heads": dict(Counter(x.status for x in heads)),
            "slack": slack_of(heads),
            "instances": [brief(x) for x in verdicts if x.instance not in names],
            "violated": [brief(x) for x in heads if x.status == "violated"][:3],
        }
    return write(
        "claims",
        {
            "command": "python docs/refresh.py claims",
            "unexpected": [f"{x.claim.id} on {x.verdict.instance}" for x in result.unexpected],
            "claims": found,
        },
    )


def slack_of(verdicts: Iterable[Any]) -> float | None:
    """Return the median of bound over observed, of the heads where both are known."""
    known_ones = [x.slack for x in verdicts if x.slack is not None and math.isfinite(x.slack)]
    return known(statistics.median(known_ones), 3) if known_ones else None


def brief(verdict: Any) -> dict[str, Any]:
    """Return what a page says of a verdict."""
    return {
        "on": verdict.instance,
        "verdict": verdict.status,
        "observed": text(verdict.observed),
        "bound": text(verdict.bound),
        "trials": verdict.trials,
        "failures": verdict.failures,
    }


def text(value: float | None) -> str:
    """Return a number as a page has it."""
    if value is None or math.isnan(value):
        return ""
    return f"{value:.3g}"
