"""Check the statements of linformer.md, and write its tables and its figure."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from _chapter import Chapter, Checks, Table, new_figure, number
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn import theory
from sketchattn.theory import sketching
from sketchattn.theory.linformer.formulas import (
    linformer_thm1_failure,
    linformer_thm1_k,
    linformer_thm2_construction,
    linformer_thm2_k,
    pooling_bound,
    unreduced_vs_reduced_gap,
)
from sketchattn.zoo.linformer.initialisations import INITIALISATIONS, initialise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHAPTER = Chapter(__file__)
EPS = 0.5

# --- verdicts -----------------------------------------------------------------------------------

CHAPTER.verdicts(
    "lemma",
    [
        ("linformer.lemma1", "uniform-ones"),
        ("linformer.lemma1", "uniform-spike"),
        ("linformer.lemma1_relative", "uniform-spike"),
        ("linformer.lemma1_relative", "uniform-difference"),
    ],
)
CHAPTER.verdicts(
    "refuted",
    [
        ("linformer.thm1", "uniform-difference"),
        ("linformer.thm1", "uniform-spike"),
        ("linformer.thm1", "identity"),
        ("linformer.thm1_fixed", "identity"),
        ("linformer.thm1_fixed", "reference"),
        ("linformer.thm2", "uniform-ones"),
    ],
)
CHAPTER.verdicts(
    "corrected",
    [
        ("linformer.additive", "uniform-ones"),
        ("linformer.additive", "uniform-spike"),
        ("linformer.mean_square", "uniform-spike"),
        ("linformer.eckart_young", "blocks"),
        ("linformer.thm2_collapse", "blocks"),
        ("linformer.perturbation", "reference"),
        ("linformer.pooling", "blocks"),
        ("linformer.constant_values", "blocks"),
        ("linformer.oracle", "blocks"),
    ],
    controls={
        # Nothing random is drawn by these.
        "linformer.perturbation": None,
        "linformer.pooling": None,
        "linformer.constant_values": None,
    },
)

# --- numbers ------------------------------------------------------------------------------------


def success_of_spike(n: int, r: int, eps: float) -> float:
    """Return ``P(|u - 1 + sqrt((n-1) u/r) z| <= eps)`` for u of law chi^2_r/r, z normal."""
    from scipy.integrate import quad
    from scipy.stats import chi2, norm

    def given(u: float) -> float:
        s = math.sqrt((n - 1) * u / r)
        inside = norm.cdf((eps - u + 1) / s) - norm.cdf((-eps - u + 1) / s)
        return float(inside * chi2.pdf(u * r, r) * r)

    width = 12 * math.sqrt(2 / r)
    found, _ = quad(given, max(1 - width, 1e-6), 1 + width, limit=200, epsabs=1e-12)
    return float(found)


def success_of_ones(n: int, r: int, eps: float) -> float:
    """Return ``P(|z - 1| <= eps)`` for z of law N(0, n/r^2), the limit of a small delta."""
    from scipy.stats import norm

    s = math.sqrt(n) / r
    return float(norm.sf((1 - eps) / s) - norm.sf((1 + eps) / s))


@CHAPTER.table("probabilities")
def probabilities(checks: Checks) -> Table:
    """Tabulate what Theorems 1 and 2 claim against the true probabilities, eps = 1/2."""
    rows = []
    for n in (512, 1024, 4096, 16384, 65536):
        r = int(linformer_thm1_k(n, EPS))
        checks.equal(
            f"rank at n = {n}", r, math.ceil(5 * math.log(n) / (EPS**2 - EPS**3)), relative=1e-12
        )
        claimed = 1 - float(linformer_thm1_failure(n, EPS, r))
        spike, ones = success_of_spike(n, r, EPS), success_of_ones(n, r, EPS)
        checks.at_most(f"probability of C2 at n = {n}", spike, claimed)
        checks.at_most(f"probability of C5 at n = {n}", ones, claimed)
        rms = math.sqrt((n + 1) / r)
        x, y = np.ones((1, n)), np.eye(n, 1)
        moment = float(sketching.amm_expected_sqerr("gaussian", x, y, r))
        checks.equal(f"mean square of C2 at n = {n}", rms**2, moment, relative=1e-9)
        rows.append((str(n), str(r), *(number(x, 4) for x in (claimed, spike, rms, ones))))
    # The counterexamples again, drawn: 400 trials, five standard deviations of a rate.
    for claim, on, exact in (
        ("linformer.thm1", "uniform-spike", success_of_spike(512, 250, EPS)),
        ("linformer.thm2", "uniform-ones", success_of_ones(512, 250, EPS)),
    ):
        found = theory.check(claim, on)
        assert found.failures is not None  # a tail counts them
        rate = 1 - found.failures / found.trials
        spread = math.sqrt(max(exact * (1 - exact), 1e-9) / found.trials)
        checks.equal(f"{claim} on {on}", rate, exact, relative=0, absolute=5 * spread)
    header = (
        "n",
        "r",
        "claimed probability of success",
        "true, Theorem 1 on C2",
        "root mean square relative error on C2",
        "true, Theorem 2 on C5",
    )
    return Table(header, rows)


@CHAPTER.table("ranks")
def ranks(checks: Checks) -> Table:
    """Tabulate the ranks that the theorems and the corrected statements ask for."""
    lengths = (512, 1024, 4096, 16384, 65536)
    rows = []
    for eps in (2 / 3, 0.5, 0.3, 0.1):
        found = [int(linformer_thm1_k(n, eps)) for n in lengths]
        for n, r in zip(lengths, found, strict=True):
            wanted = math.ceil(5 * math.log(n) / (eps**2 - eps**3) * (1 - 1e-12))
            checks.equal(f"rank at n = {n}, eps = {eps}", r, wanted, relative=1e-12)
        additive = int(sketching.amm_entrywise_min_dim(512, 64, eps, 0.05))
        heuristic = int(linformer_thm2_k(512, 64, eps))
        mean = math.ceil(1 / eps**2)
        rows.append((number(eps), *map(str, found), str(heuristic), str(additive), str(mean)))
    header = (
        "eps",
        *(f"Theorem 1, n = {n}" for n in lengths),
        "Theorem 2, its Theta as 1, n = 512, d = 64",
        "additive, n = 512, d_v = 64",
        "root mean square, rho = 0, any n",
    )
    return Table(header, rows)


@CHAPTER.table("collapse")
def collapse(checks: Checks) -> Table:
    """Tabulate how much of the output of the construction differs from row to row."""
    rng = np.random.default_rng(0)
    problem = sa.AttentionProblem(*rng.standard_normal((3, 256, 32)))

    def spread(out: NDArray[Any]) -> float:
        return float(np.linalg.norm(out - out.mean(axis=0)) / np.linalg.norm(out))

    true = spread(problem.output)
    rows = []
    before = math.nan
    for step in (1.0, 0.1, 0.01, 0.001):
        ahat = linformer_thm2_construction(problem, 64, step, rng=1)
        out = ahat @ problem.values
        found = spread(out)
        error = float(np.linalg.norm(out - problem.output) / np.linalg.norm(problem.output))
        checks.at_most(f"spread at delta = {step}", found, 1.0)
        if step < 0.1:
            checks.equal(f"spread at delta = {step}", found, before / 10, relative=0.06)
        before = found
        rows.append((number(step), number(found), number(true), number(error)))
    header = (
        "delta",
        "share of the construction's output that varies over rows",
        "the same of the exact output",
        "relative error",
    )
    return Table(header, rows)


@CHAPTER.table("pooling")
def pooling(checks: Checks) -> Table:
    """Tabulate mean pooling for keys that are constant in blocks up to noise."""
    rng = np.random.default_rng(2)
    centres, noise = rng.standard_normal((8, 6)), rng.standard_normal((32, 6))
    q, v = rng.standard_normal((20, 6)), rng.standard_normal((32, 5))
    rows = []
    for size in (0.0, 0.01, 0.1, 0.5):
        problem = sa.AttentionProblem(q, np.repeat(centres, 4, axis=0) + size * noise, v)
        out = sa.Linformer(8, "mean_pool").attend(problem)
        errors = np.linalg.norm(out - problem.output, axis=1)
        bounds = pooling_bound(problem, 8)[1]
        for i, (error, bound) in enumerate(zip(errors, bounds, strict=True)):
            checks.at_most(f"row {i}, noise {size}", max(float(error) - 1e-12, 0.0), float(bound))
        if size == 0:
            checks.equal("exactness", float(errors.max()), 0.0, relative=0, absolute=1e-12)
        mean = np.linalg.norm(problem.output - v.mean(axis=0), axis=1)
        rows.append((number(size), *(number(float(x.max())) for x in (errors, bounds, mean))))
    # Blocks of different sizes, keys constant in each: exact with ln of the sizes, not without.
    counts = (1, 7, 3, 5, 4, 4, 6, 2)
    labels = np.repeat(np.arange(8), counts)
    problem = sa.AttentionProblem(q, centres[labels], v)
    e = np.equal.outer(np.arange(8), labels) / np.array(counts, float)[:, None]
    logits = problem.scale * problem.q @ (e @ problem.k).T
    for name, bias in (("unequal blocks, with ln m_b", np.log(counts)), ("without", np.zeros(8))):
        weights = np.exp(logits + bias)
        weights /= weights.sum(axis=1, keepdims=True)
        worst = float(np.linalg.norm(weights @ (e @ v) - problem.output, axis=1).max())
        if name == "without":
            checks.at_most("a thousandth against the error without the bias", 0.001, worst)
        else:
            checks.at_most("error with the bias", worst, 1e-12)
        rows.append((name, number(worst), "-", "-"))
    return Table(("noise of the keys", "largest error", "largest bound", "error of the mean"), rows)


@CHAPTER.table("forms")
def forms(checks: Checks) -> Table:
    """Tabulate relative output errors of the forms, for one Gaussian projection each."""
    rows = []
    problems = [("iid normal, n = 512", sa.make_heads("gaussian", n=512, d=64, rng=0)[0])]
    problems += [(str(p.name), p) for p in sa.load_heads("minilm")[:5:4]]
    for name, problem in problems:
        for r in (128,):
            gaps = [unreduced_vs_reduced_gap(problem, r, rng=seed) for seed in range(4)]
            mean = {
                x: math.sqrt(float(np.mean([getattr(g, x) ** 2 for g in gaps])))
                for x in ("unreduced", "predicted", "reduced", "oracle", "mean")
            }
            checks.at_most(f"{name}, r = {r}, oracle", mean["oracle"], mean["reduced"])
            # Four fixed draws: their mean square is near its mean, not at it.
            checks.equal(
                f"{name}, r = {r}, unreduced",
                mean["unreduced"] ** 2,
                mean["predicted"] ** 2,
                relative=0.5,
            )
            rows.append((name, str(r), *(number(x) for x in mean.values())))
    header = (
        "head",
        "r",
        "unreduced A S^T S V",
        "predicted",
        "reduced, E = F = S",
        "the same E, best F",
        "mean of V",
    )
    return Table(header, rows)


@CHAPTER.table("initialisations")
def initialisations(checks: Checks) -> Table:
    """Tabulate what published codes do to the norm of a vector, r = 64 and n = 256."""
    r, n, trials = 64, 256, 400
    x = np.cos(np.arange(1.0, n + 1))
    size = float(x @ x)
    rows = []
    for name, law in INITIALISATIONS.items():
        rng = np.random.default_rng(7)
        squares = np.array([np.sum((initialise(name, r, n, rng) @ x) ** 2) for _ in range(trials)])
        mean = float(squares.mean()) / size
        error = float(squares.std(ddof=1)) / size / math.sqrt(trials)
        factor = law.factor(r, n)
        checks.equal(f"factor of {name}", mean, factor, relative=0, absolute=6 * error)
        rows.append((name, law.source, number(factor), number(mean)))
    return Table(("name", "source", "factor f", "mean of 400 draws"), rows)


@CHAPTER.table("spiked")
def spiked(checks: Checks) -> Table:
    """Tabulate singular values of rowsoftmax(t I), n = 64, against their formula."""
    n, rows = 64, []
    for t in (0.0, 1.0, 3.0, 5.0, 10.0):
        a = theory.spiked_attention(n, t)
        s = (math.exp(t) - 1) / (math.exp(t) + n - 1)
        sigma = np.linalg.svd(a, compute_uv=False)
        checks.equal(f"first at t = {t}", float(sigma[0]), 1.0, relative=1e-10)
        checks.equal(f"others at t = {t}", float(sigma[1]), s, relative=1e-10, absolute=1e-12)
        floor = float(sketching.eckart_young_floor(sigma, 16))
        checks.equal(
            f"floor at t = {t}", floor, s * math.sqrt(n - 16), relative=1e-10, absolute=1e-10
        )
        size = math.sqrt(1 + (n - 1) * s**2)
        rows.append((number(t), number(s, 6), number(floor, 6), number(floor / size)))
    return Table(("t", "sigma_2 = ... = sigma_64", "floor of rank 16", "over the norm of A"), rows)


@CHAPTER.figure
def figure(tables: Mapping[str, Table]) -> Figure:
    """Draw claimed and true probabilities of success over n."""
    table = tables["probabilities"]
    drawn = new_figure()
    axes = drawn.add_subplot()
    n = table.column("n")
    for name, style, colour in (
        ("claimed probability of success", "-", "black"),
        ("true, Theorem 1 on C2", "o-", "#0072B2"),
        ("true, Theorem 2 on C5", "s-", "#D55E00"),
    ):
        axes.plot(n, table.column(name), style, color=colour, label=name, markersize=5)
    axes.set_xscale("log", base=2)
    axes.set_ylim(-0.03, 1.0)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_xlabel("n, with r = 5 ln n/(eps^2 - eps^3) and eps = 1/2")
    axes.set_ylabel("probability of a relative error of at most eps")
    axes.grid(True, color="0.9", linewidth=0.6)
    axes.legend(fontsize=8)
    return drawn


if __name__ == "__main__":
    sys.exit(CHAPTER.main())
