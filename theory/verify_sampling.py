"""Check the statements of sampling.md, and write its tables and its figure."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from _chapter import Chapter, Checks, Table, new_figure, number, scaled

import sketchattn as sa
from sketchattn import sampling, theory
from sketchattn.theory import sketching

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHAPTER = Chapter(__file__)

# --- verdicts -----------------------------------------------------------------------------------

LAWS = ("uniform", "value_norm2", "optimal", "leverage")
CHAPTER.verdicts(
    "moments",
    [
        *((f"sketching.moment_sample_{law}", "reference") for law in LAWS),
        ("sketching.moment_sample_without", "reference"),
        ("sketching.moment_sample_poisson", "reference"),
        ("sketching.moment_sample_gumbel", "reference"),
        ("sketching.sample_distinct_with_weights_of_repeated", "reference"),
    ],
)
CHAPTER.verdicts(
    "tails",
    [
        ("sketching.amm_sampling_tail", "clusters"),
        ("sketching.amm_sampling_tail_sharp", "clusters"),
        ("sketching.amm_sampling_tail", "reference"),
        ("sketching.amm_bernstein", "clusters"),
        ("sketching.amm_bernstein_mean", "clusters"),
    ],
)
CHAPTER.verdicts(
    "leverage",
    [
        ("sketching.ose_leverage", "subspace-4096"),
        ("sketching.ose_uniform", "subspace-4096"),
        ("sketching.leverage_sampling", "clusters"),
        ("sketching.leverage_fast", "subspace-512"),
        ("sketching.leverage_fast", "reference"),
        ("sketching.leverage_beta", "subspace-512"),
        ("sketching.ridge_columns", "clusters"),
    ],
    control=scaled,
)

# --- numbers ------------------------------------------------------------------------------------


@CHAPTER.table("enumeration")
def enumeration(checks: Checks) -> Table:
    """Average the square error over all draws of two of three columns."""
    seen = theory.instances()["enumeration"]
    a, v, p = seen.a, seen.v, np.array([0.2, 0.5, 0.3])
    keep = np.array([0.4, 1.0, 0.6])

    def error(columns: Any, weights: Any) -> tuple[float, Any]:
        columns = list(columns)
        err = (a[:, columns] * np.asarray(weights)) @ v[columns] - a @ v
        return float(np.sum(err**2)), err

    repeated = [
        (p[i] * p[j], error((i, j), (1 / (2 * p[i]), 1 / (2 * p[j]))))
        for i, j in itertools.product(range(3), repeat=2)
    ]
    distinct = [(1 / 3, error(pair, (1.5, 1.5))) for pair in itertools.combinations(range(3), 2)]
    poisson = []
    for bits in itertools.product((0, 1), repeat=3):
        chosen = [j for j in range(3) if bits[j]]
        probability = float(np.prod([keep[j] if bits[j] else 1 - keep[j] for j in range(3)]))
        poisson.append((probability, error(chosen, 1 / keep[chosen])))
    # Drawn one after another by p, with the weights of draws with replacement: biased.
    wrong = [
        (p[i] * p[j] / (1 - p[i]), error((i, j), (1 / (2 * p[i]), 1 / (2 * p[j]))))
        for i, j in itertools.permutations(range(3), 2)
    ]
    formulas = (
        float(sketching.amm_expected_sqerr("sample_wr", a, v, 2, p=p)),
        float(sketching.amm_expected_sqerr("sample_wor", a, v, 2)),
        float(sketching.amm_expected_sqerr("sample_poisson", a, v, 2, pi=keep)),
        math.nan,
    )
    rows = []
    for name, outcomes, formula in zip(
        (
            "with replacement, p = (.2, .5, .3)",
            "distinct, uniform",
            "independent, pi = (.4, 1, .6)",
            "distinct by p, weights 1/(r p_j): wrong",
        ),
        (repeated, distinct, poisson, wrong),
        formulas,
        strict=True,
    ):
        mean = sum(q * e[0] for q, e in outcomes)
        bias = float(np.abs(sum(q * e[1] for q, e in outcomes)).max())
        if math.isnan(formula):
            checks.at_most(f"a hundredth against the bias of {name}", 0.01, bias)
        else:
            checks.equal(f"mean square error, {name}", mean, formula, relative=1e-12)
            checks.at_most(f"bias, {name}", bias, 1e-12)
        rows.append((name, str(len(outcomes)), number(mean, 5), number(formula, 5), number(bias)))
    header = ("draws, r = 2", "outcomes", "mean over all outcomes", "formula", "largest bias")
    return Table(header, rows)


@CHAPTER.table("laws")
def laws(checks: Checks) -> Table:
    """Tabulate the mean square error of one bundled head for each law, over that of zero."""
    heads = sa.load_heads("minilm")
    names = ("uniform", "value_norm2", "leverage", "optimal")
    rows = []
    for problem in heads[::4]:
        seen = theory.Instance(str(problem.name), problem)
        a, v = seen.a, seen.v
        b = float(np.sum(seen.product**2))
        moments = {
            law: float(sketching.amm_expected_sqerr("sample_wr", a, v, 64, p=law)) for law in names
        }
        moments["distinct"] = float(sketching.amm_expected_sqerr("sample_wor", a, v, 64))
        moments["poisson"] = float(
            sketching.amm_expected_sqerr("sample_poisson", a, v, 64, p="optimal")
        )
        sizes = np.linalg.norm(a, axis=0) * np.linalg.norm(v, axis=1)
        least = (float(sizes.sum()) ** 2 - b) / 64
        checks.equal(f"{problem.name}, optimal law", moments["optimal"], least, relative=1e-9)
        for law in names:
            checks.at_most(f"{problem.name}, least of all laws", least, moments[law])
        mean = float(np.sum((seen.product - v.mean(axis=0)) ** 2))
        rows.append(
            (
                str(problem.name),
                *(number(math.sqrt(moments[law] / b)) for law in (*names, "distinct", "poisson")),
                number(math.sqrt(mean / b)),
            )
        )
    header = (
        "head, r = 64",
        *names,
        "distinct, uniform",
        "independent, optimal",
        "mean of V",
    )
    return Table(header, rows)


@CHAPTER.table("bounds")
def bounds(checks: Checks) -> Table:
    """Tabulate tail bounds over |A|_F |V|_F against draws, delta = 0.05, optimal law."""
    seen = theory.instances()["clusters"]
    s = sketching.amm_stats(seen.a, seen.v)
    rows = []
    for r in (16, 32, 64, 128, 256):
        published = theory.check("sketching.amm_sampling_tail", seen, rank=r)
        sharp = theory.check("sketching.amm_sampling_tail_sharp", seen, rank=r)
        moment = float(sketching.amm_expected_sqerr("sample_wr", seen.a, seen.v, r, p="optimal"))
        markov = math.sqrt(moment / 0.05 / s.a)
        eta = 1 + math.sqrt(8 * math.log(20))
        checks.equal(f"published, r = {r}", published.bound, eta / math.sqrt(r), relative=1e-9)
        checks.at_most(f"quantile, r = {r}", published.observed, sharp.bound)
        checks.at_most(f"sharp, r = {r}", sharp.bound, published.bound)
        rows.append(
            (
                str(r),
                number(published.bound),
                number(sharp.bound),
                number(markov),
                number(math.sqrt(moment / s.a)),
                number(published.observed),
            )
        )
    header = (
        "r",
        "published",
        "McDiarmid",
        "Markov",
        "root mean square",
        "95 % quantile seen",
    )
    return Table(header, rows)


@CHAPTER.table("scores")
def scores(checks: Checks) -> Table:
    """Tabulate fast leverage scores of a basis of 4096 x 5: distortion, error, realised beta."""
    basis = theory.instances()["subspace-4096"].v
    exact = sampling.leverage_scores(basis)
    checks.equal("sum of the scores", float(exact.sum()), 5.0, relative=1e-9)
    rows = []
    for r in (64, 256, 1024):
        rng = np.random.default_rng(r)
        sketch = rng.standard_normal((r, len(basis))) / math.sqrt(r)
        image = sketch @ basis
        values = np.linalg.eigvalsh(image.T @ image - np.eye(5))
        gam = float(np.abs(values).max())
        fast = np.sum(np.linalg.solve(np.linalg.qr(image)[1].T, basis.T) ** 2, axis=0)
        ratio = fast / exact
        checks.at_most(f"largest quotient, r = {r}", float(ratio.max()), 1 / (1 - gam))
        checks.at_most(f"smallest quotient, r = {r}", 1 / (1 + gam), float(ratio.min()))
        beta = float(sampling.leverage_quality(fast / fast.sum(), exact))
        factor = float(sampling.leverage_approx_factor(gam))
        checks.at_most(f"promised beta, r = {r}", factor, beta)
        rows.append(
            (
                str(r),
                number(gam),
                number(float(ratio.min())),
                number(float(ratio.max())),
                number(factor),
                number(beta),
            )
        )
    uniform = float(sampling.leverage_quality(np.full(len(basis), 1 / len(basis)), exact))
    rows.append(("uniform law", "-", "-", "-", "-", number(uniform)))
    header = (
        "r",
        "gam",
        "smallest quotient",
        "largest quotient",
        "(1-gam)/(1+gam)",
        "realised beta",
    )
    return Table(header, rows)


@CHAPTER.figure
def figure(tables: Mapping[str, Table]) -> Figure:
    """Draw the bounds of column sampling over r against what draws give."""
    table = tables["bounds"]
    drawn = new_figure()
    axes = drawn.add_subplot()
    r = table.column("r")
    for name, style, colour in (
        ("published", "-", "black"),
        ("McDiarmid", "--", "black"),
        ("Markov", ":", "black"),
        ("root mean square", "-", "#0072B2"),
        ("95 % quantile seen", "o", "#D55E00"),
    ):
        axes.plot(r, table.column(name), style, color=colour, label=name, markersize=5)
    axes.axhline(1.0, color="0.6", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_xlabel("r, columns drawn")
    axes.set_ylabel("Frobenius error over |A|_F |V|_F")
    axes.grid(True, which="both", color="0.92", linewidth=0.5)
    axes.legend(fontsize=8)
    return drawn


if __name__ == "__main__":
    sys.exit(CHAPTER.main())
