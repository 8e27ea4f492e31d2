"""Check the statements of softmax.md, and write its tables and its figure."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from _chapter import Chapter, Checks, Factory, Table, new_figure, number

import sketchattn as sa
from sketchattn import theory
from sketchattn.operators.spectra import dense_spectral_norm
from sketchattn.theory.softmax.formulas import perturbation_bound

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHAPTER = Chapter(__file__)


# --- broken softmaxes ---------------------------------------------------------------------------


def softmax(logits: Any) -> Any:
    """Return the row softmax."""
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def scaled(factor: float) -> Factory:
    """Return a softmax whose rows sum to another number."""
    return lambda kind, r, n, rng, *, logits: factor * softmax(logits)


def heated(factor: float) -> Factory:
    """Return a softmax of logits at another scale."""
    return lambda kind, r, n, rng, *, logits: softmax(factor * logits)


def plus_one(kind: str, r: int, n: int, rng: Any, *, logits: Any) -> Any:
    """Return weights with one added to every denominator."""
    return np.exp(logits) / (1 + np.exp(logits).sum(axis=1, keepdims=True))


CONTROLS: dict[str, Factory | None] = {
    "softmax.stochastic": plus_one,
    "softmax.shift_invariance": plus_one,
    "softmax.merge": heated(1.1),
    "softmax.perturbation": heated(1.3),
    "softmax.output_perturbation": heated(1.1),
    "softmax.divergence": heated(1.1),
    "softmax.lipschitz": heated(1.1),
    "softmax.query_lipschitz": heated(2.2),
    "softmax.query_lipschitz_half": heated(1.1),
}

# --- verdicts -----------------------------------------------------------------------------------

CHAPTER.verdicts(
    "norms",
    [
        ("softmax.stochastic", "reference"),
        ("softmax.spectral_norm", "flat"),
        ("softmax.spectral_norm", "shared-key"),
        ("softmax.spectral_norm_one", "shared-key"),
        ("softmax.frobenius_norm", "shared-key"),
        ("softmax.frobenius_norm", "flat"),
        ("softmax.mean_identity", "reference"),
        ("softmax.printed_normalizer", "two-by-two"),
    ],
    controls={**CONTROLS, "softmax.spectral_norm": scaled(0.9)},
    control=scaled(1.1),
)
CHAPTER.verdicts(
    "outputs",
    [
        ("softmax.shift_invariance", "clusters"),
        ("softmax.hull", "shared-key"),
        ("softmax.merge", "clusters"),
        ("softmax.truncation", "reference"),
    ],
    controls=CONTROLS,
    control=scaled(1.1),
)
CHAPTER.verdicts(
    "changes",
    [
        ("softmax.perturbation", "two-keys"),
        ("softmax.perturbation", "reference"),
        ("softmax.output_perturbation", "two-keys"),
        ("softmax.divergence", "two-keys"),
        ("softmax.lipschitz", "two-keys"),
        ("softmax.query_lipschitz", "two-queries"),
        ("softmax.query_lipschitz_half", "two-queries"),
    ],
    controls=CONTROLS,
)
# --- numbers ------------------------------------------------------------------------------------


@CHAPTER.table("heads")
def heads(checks: Checks) -> Table:
    """Tabulate norms of the bundled heads against their limits."""
    rows = []
    for problem in sa.load_heads("minilm"):
        seen = theory.Instance(str(problem.name), problem)
        a = seen.a
        top = dense_spectral_norm(a)
        column = math.sqrt(float(a.sum(axis=0).max()))
        size = float(np.sum(a * a))
        mean = float(np.sum((a - 1 / seen.n) ** 2))
        checks.at_most(f"{problem.name}, spectral norm", top, column)
        checks.equal(
            f"{problem.name}, distance to the mean", mean, size - seen.m / seen.n, relative=1e-9
        )
        rows.append(
            (
                str(problem.name),
                number(top),
                number(column),
                number(size),
                number(mean / size),
                number(size / top**2),
            )
        )
    header = (
        "head",
        "spectral norm",
        "root of the largest column sum",
        "squared Frobenius norm",
        "share left by the mean",
        "stable rank",
    )
    return Table(header, rows)


@CHAPTER.table("perturbation")
def perturbation(checks: Checks) -> Table:
    """Tabulate how far a softmax moves for changes of width W."""
    problem = sa.load_heads("minilm")[0]
    a = theory.Instance("first head", problem).a
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(a.shape)
    noise /= np.ptp(noise, axis=1, keepdims=True)
    rows = []
    for width in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0):
        bound = float(np.asarray(perturbation_bound(width)))
        t = 1 / (1 + math.exp(width / 2))
        pair = softmax(np.log([[t, 1 - t]]) + np.array([[width, 0.0]]))
        moved = float(np.abs(pair - [t, 1 - t]).sum())
        checks.equal(f"two outcomes, W = {width}", moved, bound, relative=1e-9)
        found = theory.check("softmax.perturbation", problem, width=width)
        changed = softmax(np.log(a) + width * noise)
        random = float(np.abs(changed - a).sum(axis=1).max())
        checks.at_most(f"random changes, W = {width}", random, bound)
        worst = found.observed * bound
        checks.at_most(f"worst changes, W = {width}", worst, bound)
        rows.append(
            (
                number(width),
                number(bound),
                number(moved),
                number(worst),
                number(random),
                number(width / 2),
            )
        )
    header = (
        "W",
        "2 tanh(W/4)",
        "two outcomes",
        "worst found on a head",
        "random changes on a head",
        "W/2",
    )
    return Table(header, rows)


@CHAPTER.figure
def figure(tables: Mapping[str, Table]) -> Figure:
    """Draw the 1-norm by which a softmax moves against the width of the change."""
    table = tables["perturbation"]
    drawn = new_figure()
    axes = drawn.add_subplot()
    widths = table.column("W")
    axes.plot(widths, table.column("W/2"), ":", color="0.5", label="W/2, the slope at zero")
    axes.plot(widths, table.column("2 tanh(W/4)"), "-", color="black", label="bound 2 tanh(W/4)")
    for name, mark, size, colour in (
        ("two outcomes", "s", 7, "#009E73"),
        ("worst found on a head", "x", 5, "black"),
        ("random changes on a head", "o", 5, "#0072B2"),
    ):
        axes.plot(widths, table.column(name), mark, color=colour, label=name, markersize=size)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(0.02, 5)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.set_xlabel("W, range of the change of the logits")
    axes.set_ylabel("1-norm by which a row moves")
    axes.grid(True, color="0.9", linewidth=0.6)
    axes.legend(fontsize=8)
    return drawn


if __name__ == "__main__":
    sys.exit(CHAPTER.main())
