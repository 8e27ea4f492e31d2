"""Check the statements of informer.md, and write its tables and its figure."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from _chapter import Chapter, Checks, Factory, Table, curves, heads, number, worked_example
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn import theory
from sketchattn.theory import informer
from sketchattn.zoo.informer.lazy import lazy_errors
from sketchattn.zoo.informer.method import published_count
from sketchattn.zoo.informer.statistics import row_statistic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[Any]
CHAPTER = Chapter(__file__)
# The head of the figure.
HEAD = 8

# --- broken implementations ---------------------------------------------------------------------


def library(kind: str, r: int, n: int, rng: Any, **parameters: Any) -> Any:
    """Return what the library makes: a statistic, Ahat, sampled keys, or random rows."""
    problem = parameters.pop("problem")
    if kind == "statistic":
        return row_statistic(problem, parameters.pop("statistic"), **parameters)
    if kind == "key_samples":
        return rng.integers(0, n, (problem.n_q, r))
    if kind == "random_rows":
        return rng.permutation(problem.n_q)[:r]
    method = sa.Informer(max(len(parameters["rows"]), 1), fill="masked_mean")
    return method.approximate(problem, draw={"pilot_rows": parameters["rows"]}).to_dense()


def statistic(name: str, change: Callable[[Array], Array]) -> Factory:
    """Return an implementation with one statistic changed."""

    def broken(kind: str, r: int, n: int, rng: Any, **parameters: Any) -> Any:
        asked = parameters.get("statistic")
        found = library(kind, r, n, rng, **parameters)
        return change(found) if asked == name else found

    return broken


def released_divisor(kind: str, r: int, n: int, rng: Any, **parameters: Any) -> Any:
    """Divide every sampled sum by the number of keys."""
    if "key_samples" in parameters:
        parameters["mean_divisor"] = "n_keys"
    return library(kind, r, n, rng, **parameters)


def longer(kind: str, r: int, n: int, rng: Any, **parameters: Any) -> Any:
    """Return a matrix that is too large by a tenth."""
    found = library(kind, r, n, rng, **parameters)
    return 1.1 * found if kind == "informer" else found


def all_exact(kind: str, r: int, n: int, rng: Any, **parameters: Any) -> Any:
    """Use more rows than allowed."""
    if kind == "informer":
        parameters["rows"] = np.arange(parameters["problem"].n_q)
    return library(kind, r, n, rng, **parameters)


def shuffled(kind: str, r: int, n: int, rng: Any, **parameters: Any) -> Any:
    """Compute other rows than asked for."""
    if kind == "informer":
        parameters["rows"] = (np.asarray(parameters["rows"]) + 1) % parameters["problem"].n_q
    return library(kind, r, n, rng, **parameters)


def first_rows(kind: str, r: int, n: int, rng: Any, **parameters: Any) -> Any:
    """Draw the same rows always."""
    return np.arange(r) if kind == "random_rows" else library(kind, r, n, rng, **parameters)


def distinct_keys(kind: str, r: int, n: int, rng: Any, **parameters: Any) -> Any:
    """Draw keys without replacement."""
    rows = range(parameters["problem"].n_q)
    return np.array([rng.permutation(n)[:r] for _ in rows])


CONTROLS: dict[str, Factory | None] = {
    "informer.lemma1": statistic("m", lambda x: x - 0.1),
    "informer.sandwich": statistic("kl", lambda x: x - 0.1),
    "informer.key_shift": released_divisor,
    "informer.row_selection": longer,
    "informer.regret": all_exact,
    "informer.oracle": shuffled,
    "informer.random_rows": first_rows,
    "informer.variation": statistic("kl", lambda x: 0.5 * x),
    "informer.total_bound": statistic("kl", lambda x: 0.01 * x),
    "informer.total_bound_surrogate": statistic("max_mean", lambda x: 1e-3 * x),
    "informer.miss_rate": distinct_keys,
}

# --- verdicts -----------------------------------------------------------------------------------

CHAPTER.verdicts(
    "measures",
    [
        ("informer.lemma1", "worked"),
        ("informer.lemma1", "causal"),
        ("informer.sandwich", "worked"),
        ("informer.sandwich", "two-values"),
        ("informer.proposition1", "worked"),
        ("informer.proposition1", "skewed-rows"),
        ("informer.key_shift", "clusters"),
        ("informer.key_shift", "shifted-keys"),
        ("informer.measure_orders_rows", "two-rows"),
    ],
    controls=CONTROLS,
)
CHAPTER.verdicts(
    "selection",
    [
        ("informer.row_selection", "reference"),
        ("informer.row_selection", "causal"),
        ("informer.regret", "reference"),
        ("informer.oracle", "worked"),
        ("informer.random_rows", "reference"),
    ],
    controls=CONTROLS,
)
CHAPTER.verdicts(
    "divergence",
    [
        ("informer.variation", "two-values"),
        ("informer.total_bound", "lazy-queries"),
        ("informer.total_bound_surrogate", "lazy-queries"),
        ("informer.total_bound", "causal"),
    ],
    controls=CONTROLS,
)
CHAPTER.verdicts(
    "samples",
    [
        ("informer.miss_rate", "worked"),
        ("informer.miss_rate", "clusters"),
        ("informer.sampled_maximum", "clusters"),
        ("informer.divisor", "shifted-keys"),
    ],
    controls=CONTROLS,
)

# --- what tables share --------------------------------------------------------------------------


def top(found: Array, r: int) -> Array:
    """Return the r rows of largest statistic, ties by index."""
    out: Array = np.argsort(-found, kind="stable")[:r]
    return out


def recall(found: Array, want: Array, r: int) -> float:
    """Return the share of the r rows of largest ``want`` that are among those of ``found``."""
    return len(np.intersect1d(top(found, r), top(want, r))) / r


def left(errors: Array, chosen: Array) -> float:
    """Return the share of the squared error that is left by exact rows."""
    return float(np.delete(errors, chosen).sum()) / float(errors.sum())


def sampled(problem: sa.AttentionProblem, seed: int, **parameters: Any) -> Array:
    """Return the sampled statistic, as many keys as the public code takes."""
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, problem.n_k, (problem.n_q, published_count(problem.n_k)))
    return row_statistic(problem, key_samples=keys, **parameters)


# --- measures -----------------------------------------------------------------------------------


@CHAPTER.table("worked")
def worked(checks: Checks) -> Table:
    """Tabulate the statistics of the three rows of `worked`, and the regret of one exact row."""
    problem = worked_example()
    known = {
        "m": (1.2527630, 1.0986123, 1.2432338),
        "max_mean": (0.6931472, 0.0, 0.7324082),
        "kl": (0.1541507, 0.0, 0.1446215),
        "oracle": (0.1836735, 0.0, 0.16),
    }
    names = {"m": "M", "max_mean": "Mbar", "kl": "KL", "row_norm": "norm", "oracle": "e"}
    rows = []
    for name, shown in names.items():
        found = row_statistic(problem, name)
        for i, want in enumerate(known.get(name, ())):
            checks.equal(f"{shown} of row {i}", float(found[i]), want, relative=0, absolute=1e-7)
        chosen = int(np.argmax(found))
        regret = sa.selection_regret(problem, [chosen]).regret
        wanted = 0.0236735 if chosen == 2 else 0.0
        checks.equal(f"regret of {shown}", regret, wanted, relative=0, absolute=1e-7)
        rows.append((shown, *(number(float(x), 4) for x in found), str(chosen), number(regret, 4)))
    return Table(("measure", "row 0", "row 1", "row 2", "chosen", "regret"), rows)


@CHAPTER.table("agreement")
def agreement(checks: Checks) -> Table:
    """Tabulate how rows by Mbar agree with rows by M, whole and sampled, on bundled heads."""
    from scipy.stats import spearmanr

    rows = []
    for problem in heads():
        r = published_count(problem.n_q)
        exact, surrogate = (row_statistic(problem, x) for x in ("m", "max_mean"))
        found = informer.rank_agreement(problem, r)
        want = float(spearmanr(exact, surrogate).statistic)
        checks.equal(f"{problem.name}, Spearman", found.spearman, want, relative=1e-9)
        checks.equal(
            f"{problem.name}, recall", found.recall, recall(surrogate, exact, r), relative=1e-9
        )
        cells = [found.spearman, found.recall]
        for divisor in ("n_samples", "n_keys"):
            shares = [
                recall(sampled(problem, seed, mean_divisor=divisor), exact, r) for seed in range(8)
            ]
            cells.append(float(np.mean(shares)))
        rows.append((str(problem.name), *(number(x, 2) for x in cells), number(r / problem.n_q, 2)))
    header = (
        "head",
        "Spearman",
        "recall of Mbar",
        "recall, sampled, D = U",
        "recall, sampled, D = n_k",
        "by chance",
    )
    return Table(header, rows)


@CHAPTER.table("counterexample")
def counterexample(checks: Checks) -> Table:
    """Tabulate the two rows that M and the norm order differently."""
    a = theory.instances()["two-rows"].a
    problem = sa.AttentionProblem(np.log(a), np.eye(4), np.eye(4), scale=1.0)
    excess = row_statistic(problem, "m") - math.log(4)
    norms = row_statistic(problem, "row_norm")
    rows = []
    for i, (name, weights) in enumerate(
        (("(1, 1, 1, 1e-6)", [1.0, 1.0, 1.0, 1e-6]), ("(10, 1, 1, 1)", [10.0, 1.0, 1.0, 1.0]))
    ):
        total = sum(weights)
        want = math.log(total / 4) - sum(map(math.log, weights)) / 4
        checks.equal(f"ln(AM/GM) of {name}", float(excess[i]), want, relative=1e-9)
        norm = math.sqrt(sum(x * x for x in weights)) / total
        checks.equal(f"norm of {name}", float(norms[i]), norm, relative=1e-9)
        variation = float(np.abs(a[i] - 0.25).sum()) / 2
        error = math.sqrt(float(lazy_errors(problem)[i]))
        checks.equal(f"e of {name}", error**2, norm**2 - 0.25, relative=1e-6)
        rows.append((name, *(number(x, 4) for x in (float(excess[i]), norm, variation, error))))
    header = (
        "weights",
        "M - ln 4",
        "norm of the row",
        "total variation to uniform",
        "sqrt(e), V = I",
    )
    return Table(header, rows)


@CHAPTER.table("shift")
def shift(checks: Checks) -> Table:
    """Tabulate the recall of the top rows by M where t times a vector is added to all keys."""
    n, d = 512, 32
    r = published_count(n)
    cases = {
        "sampled, D = U": {"mean_divisor": "n_samples"},
        "sampled, D = n_k": {"mean_divisor": "n_keys"},
        "sampled KL": {"statistic": "kl"},
    }
    rows, first = [], None
    for t in (0.0, 1.0, 5.0, 20.0):
        found: dict[str, list[float]] = {"Mbar": [], **{name: [] for name in cases}}
        by_shift = []
        for seed in range(8):
            rng = np.random.default_rng(seed)
            q, k = rng.standard_normal((n, d)), rng.standard_normal((n, d))
            c = t * rng.standard_normal(d)
            problem = sa.AttentionProblem(q, k + c)
            exact = row_statistic(problem, "m")
            found["Mbar"].append(recall(row_statistic(problem, "max_mean"), exact, r))
            for name, parameters in cases.items():
                measure = sampled(problem, seed, **parameters)
                found[name].append(recall(measure, exact, r))
                if name == "sampled, D = n_k":
                    by_shift.append(recall(measure, q @ c, r) if t else math.nan)
        means = {name: float(np.mean(x)) for name, x in found.items()}
        first = means if first is None else first
        for name in ("Mbar", "sampled, D = U", "sampled KL"):
            checks.equal(f"{name}, t = {t:g}", means[name], first[name], relative=1e-6)
        cells = (*means.values(), float(np.mean(by_shift)))
        rows.append((number(t), *(number(x, 2) for x in cells)))
    header = ("t", *(f"{name}" for name in ("Mbar", *cases)), "D = n_k: rows by q.c")
    return Table(header, rows)


# --- selection ----------------------------------------------------------------------------------

SELECTORS = ("oracle", "row_norm", "m", "max_mean")


@CHAPTER.table("residual")
def residual(checks: Checks) -> Table:
    """Tabulate the share of the mean's squared error that r = 35 rows leave on bundled heads."""
    rows = []
    for problem in heads():
        r = published_count(problem.n_q)
        errors = lazy_errors(problem)
        total = float(errors.sum())
        oracle = left(errors, top(errors, r))
        method = sa.Informer(r, statistic="oracle", key_sampling="full")
        out = problem.output - method.attend(problem)
        checks.equal(
            f"{problem.name}, oracle", float(np.sum(out**2)) / total, oracle, relative=1e-6
        )
        cells = [left(errors, top(row_statistic(problem, x), r)) for x in SELECTORS]
        sample = [left(errors, top(sampled(problem, seed), r)) for seed in range(8)]
        cells.append(float(np.mean(sample)))
        for name, cell in zip((*SELECTORS, "sampled"), cells, strict=True):
            checks.at_most(f"{problem.name}, oracle against {name}", oracle, cell)
        rng = np.random.default_rng(0)
        random = [left(errors, rng.permutation(len(errors))[:r]) for _ in range(400)]
        want = 1 - r / problem.n_q
        spread = 5 * float(np.std(random, ddof=1)) / math.sqrt(400)
        mean = float(np.mean(random))
        checks.equal(f"{problem.name}, random rows", mean, want, relative=0, absolute=spread)
        rows.append((str(problem.name), *map(number, (*cells, want))))
    header = ("head", "oracle", "row norm", "M", "Mbar", "sampled, D = U", "random rows")
    return Table(header, rows)


@CHAPTER.table("looseness")
def looseness(checks: Checks) -> Table:
    """Tabulate the bound by divergence on bundled heads, over the mean's squared error."""
    rows = []
    for problem in heads():
        r = published_count(problem.n_q)
        errors = lazy_errors(problem)
        total = float(errors.sum())
        chosen = top(row_statistic(problem, "kl"), r)
        found = left(errors, chosen)
        by_kl, by_bar = (
            informer.selection_bound(problem, chosen, measure=x) / total for x in ("kl", "max_mean")
        )
        kl = np.delete(row_statistic(problem, "kl"), chosen)
        want = sa.perturbation.value_diameter(problem.values) ** 2 / total
        want *= float(np.sum(np.minimum(kl / 2, 1 - np.exp(-kl))))
        checks.equal(f"{problem.name}, bound", by_kl, want, relative=1e-9)
        checks.at_most(f"{problem.name}, error", found, by_kl)
        checks.at_most(f"{problem.name}, bounds", by_kl, by_bar)
        cells = (found, by_kl, by_bar, by_kl / found, float(np.median(kl)))
        rows.append((str(problem.name), *map(number, cells)))
    header = (
        "head",
        "left by rows of largest KL",
        "bound by KL",
        "bound by Mbar",
        "bound by KL over what is left",
        "median KL",
    )
    return Table(header, rows)


# --- samples, and the released code -------------------------------------------------------------


@CHAPTER.table("misses")
def misses(checks: Checks) -> Table:
    """Tabulate how often sampled keys miss the largest logit of a row."""
    rows = []
    for n in (64, 256, 1024, 4096):
        cells = []
        for drawn in (published_count(n), n):
            theory_ = float(np.asarray(informer.miss_probability(n, drawn)))
            rng = np.random.default_rng(n)
            hits = np.array([(rng.integers(0, n, drawn) == 0).any() for _ in range(2000)])
            seen = 1 - float(hits.mean())
            spread = 5 * math.sqrt(theory_ * (1 - theory_) / 2000)
            checks.equal(f"n = {n}, U = {drawn}", seen, theory_, relative=0, absolute=spread)
            cells += [number(theory_), number(seen)]
        rows.append((str(n), str(published_count(n)), *cells))
    header = ("n_k", "U", "missed", "of 2000 rows", "missed, U = n_k", "of 2000 rows, U = n_k")
    return Table(header, rows)


@CHAPTER.table("fills")
def fills(checks: Checks) -> Table:
    """Tabulate what causal fills leave if no row is exact: n Gaussian keys, d = 8."""
    rows = []
    for n in (16, 64, 256):
        rng = np.random.default_rng(n)
        q, k, v = (rng.standard_normal((n, 8)) for _ in range(3))
        problem = sa.AttentionProblem(q, k, v, causal=True)
        output = math.sqrt(float(np.sum(problem.output**2)))
        cells = [
            math.sqrt(float(lazy_errors(problem, fill=x).sum())) for x in ("cummean", "cumsum")
        ]
        direct = np.cumsum(v, axis=0) - problem.output
        checks.equal(f"cumsum, n = {n}", cells[1], float(np.linalg.norm(direct)), relative=1e-9)
        method = sa.Informer(1, fill="cumsum")
        ahat = method.approximate(problem, draw={"pilot_rows": np.array([0])})
        sums = float(np.max(ahat.row_sums()))
        checks.equal(f"largest row sum, n = {n}", sums, n, relative=1e-9)
        rows.append((str(n), *(number(x / output) for x in cells), number(sums)))
    header = ("n", "error of cummean", "error of cumsum", "largest row sum of cumsum")
    return Table(header, rows)


@CHAPTER.table("curve")
def curve(checks: Checks) -> Table:
    """Tabulate the share of the mean's squared error that r rows leave on one head."""
    problem = heads()[HEAD]
    errors = lazy_errors(problem)
    measures = {name: row_statistic(problem, name) for name in SELECTORS}
    samples = [sampled(problem, seed) for seed in range(8)]
    rows = []
    for r in (8, 16, 32, 64, 128, 256, 384):
        cells = [left(errors, top(measures[name], r)) for name in SELECTORS]
        cells.append(float(np.mean([left(errors, top(x, r)) for x in samples])))
        for name, cell in zip((*SELECTORS, "sampled"), cells, strict=True):
            checks.at_most(f"oracle against {name}, r = {r}", cells[0], cell)
        found = sa.selection_regret(problem, top(measures["m"], r))
        checks.equal(f"regret, r = {r}", found.relative, cells[2] - cells[0], relative=1e-6)
        rows.append((str(r), *map(number, (*cells, 1 - r / problem.n_q))))
    header = ("r", "oracle", "row norm", "M", "Mbar", "sampled, D = U", "random rows")
    return Table(header, rows)


@CHAPTER.figure
def figure(tables: Mapping[str, Table]) -> Figure:
    """Draw the share of the squared error that is left against the number of exact rows."""
    lines = (
        ("random rows", ":", "0.3"),
        ("sampled, D = U", "s-", "#E69F00"),
        ("Mbar", "o-", "#56B4E9"),
        ("M", "o-", "#0072B2"),
        ("row norm", "D-", "#009E73"),
        ("oracle", "-", "black"),
    )
    drawn, axes = curves(
        tables["curve"],
        "r",
        lines,
        xlabel="r, exact rows of 512",
        ylabel="share of the squared error of the mean of V",
    )
    axes.set_ylim(0, 1.02)
    return drawn


if __name__ == "__main__":
    sys.exit(CHAPTER.main())
