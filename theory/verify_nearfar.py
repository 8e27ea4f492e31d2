"""Check the statements of nearfar.md, and write its tables and its figure."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from _chapter import Chapter, Checks, Factory, Table, heads, new_figure, number
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn import theory
from sketchattn.operators.nearfar import NearFarAttention
from sketchattn.theory import nearfar
from sketchattn.theory.nearfar.cases import given_clusters, matrix_of
from sketchattn.theory.nearfar.formulas import Case, Form, forms
from sketchattn.zoo.nearfar import regions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[Any]
CHAPTER = Chapter(__file__)

# --- broken implementations -----------------------------------------------------------------------


def made(
    kind: str,
    r: int,
    n: int,
    rng: Any,
    *,
    count: bool = True,
    parabola: bool = False,
    slope: float = 1.0,
    **given: Any,
) -> Any:
    """Make what the library would, with parts of the formula changed."""
    if kind == "merge":
        k, v = given["keys"], given["values"]
        whole = nearfar.cluster_moments(k, v)
        return np.array([len(k), *whole.key, *whole.variance, *whole.value, whole.radius])
    problem, form = given["problem"], given["form"]
    if kind == "output":
        return form.method().attend(problem)
    labels, far, scores = given["labels"], given["far"], given["scores"]
    scale, q, k = float(problem.scale), problem.q, problem.k
    logits = np.where(given["direct"], scale * q @ k.T, -np.inf)
    weights = np.zeros(logits.shape)
    for c in range(far.shape[1]):
        members = np.flatnonzero(labels == c)
        if not len(members):
            continue
        kappa = k[members].mean(axis=0)
        away = k[members] - kappa
        sigma = abs(scale) * np.sqrt(q**2 @ (away**2).mean(axis=0))
        width = abs(scale) * np.linalg.norm(q, axis=1) * np.linalg.norm(away, axis=1).max()
        phi = np.zeros(len(q))
        if form.second_order == "frozen":
            phi = np.minimum(nearfar.frozen_second_order(sigma, len(members)), width)
        g = scale * q @ kappa + (sigma**2 / 2 if parabola else phi)
        share = np.ones((len(q), len(members)))
        for z in scores[:, members]:
            top = float(np.abs(z).max())
            if top > 0:
                y = slope * scale * q @ (away.T @ z / (z @ z))
                most = 1 / (len(scores) * top)
                share += np.clip(y, -most, most)[:, None] * z
        rows = np.ix_(far[:, c], members)
        each = g - (0.0 if count else math.log(len(members)))
        logits[rows] = each[far[:, c], None]
        weights[rows] = np.log(np.maximum(share[far[:, c]], 1e-300))
    top = logits.max(axis=1, keepdims=True)
    total = np.exp(logits - top).sum(axis=1, keepdims=True)
    log_zhat = top + np.log(total)
    return np.exp(logits + weights - log_zhat) if kind == "nearfar" else log_zhat[:, 0]


def changed(**options: Any) -> Factory:
    """Return an implementation with parts of the formula changed."""

    def broken(kind: str, r: int, n: int, rng: Any, **given: Any) -> Any:
        return made(kind, r, n, rng, **options, **given)

    return broken


def after(wanted: str, change: Callable[..., Any]) -> Factory:
    """Return an implementation of which one part is changed afterwards."""

    def broken(kind: str, r: int, n: int, rng: Any, **given: Any) -> Any:
        found = made(kind, r, n, rng, **given)
        return change(found, **given) if kind == wanted else found

    return broken


def moved(found: Array, problem: Any, **_: Any) -> Array:
    """Return rows that are a hundredth farther from the exact ones."""
    a = problem.exact.to_dense()
    return np.asarray(a + 1.01 * (found - a))


def drifting() -> Factory:
    """Return an implementation that loses a little more of the normaliser at every call."""
    calls = [0]

    def change(found: Array, **_: Any) -> Array:
        calls[0] += 1
        return found - 0.5 * calls[0]

    return after("log_normalizer", change)


def without_between(found: Array, keys: Array, parts: Any, **_: Any) -> Array:
    """Average the variances of parts, and forget how far apart they are."""
    d = keys.shape[1]
    found[d + 1 : 2 * d + 1] = sum(len(x) * keys[x].var(axis=0) for x in parts) / len(keys)
    return found


def leaky(_: Any, problem: Any, form: Any, **__: Any) -> Any:
    """Cluster in a metric of all queries."""
    sizes = regions.Sizes(form.block, 2, 1)
    found = regions.in_blocks(problem, sizes, regions.metric_root(problem), 0, True)
    return NearFarAttention(problem, found.clusters, found.rows, 1, 0.0) @ problem.values


def plain(kind: str, r: int, n: int, rng: Any, **given: Any) -> Any:
    """Forget phi."""
    given["form"] = given["form"]._replace(second_order="none")
    return made(kind, r, n, rng, **given)


def rolled(found: Array, **_: Any) -> Array:
    """Give a tenth of what a row reads to the keys after."""
    return np.asarray(0.9 * found + 0.1 * np.roll(found, 1, axis=1))


CONTROLS: dict[str, Factory | None] = {
    "nearfar.rows": after("nearfar", lambda x, **_: 1.01 * x),
    "nearfar.exact_near": after("nearfar", rolled),
    "nearfar.exact_keys": changed(count=False),
    "nearfar.jensen": changed(parabola=True),
    "nearfar.promotion": drifting(),
    "nearfar.interval": changed(parabola=True),
    "nearfar.tanh": after("nearfar", moved),
    "nearfar.frozen": changed(parabola=True),
    "nearfar.frozen_above": plain,
    "nearfar.frozen_gap": changed(parabola=True),
    "nearfar.first_order_divergence": changed(slope=-1.0),
    "nearfar.first_order_rate": changed(slope=1.01),
    "nearfar.merge": after("merge", without_between),
    "nearfar.causal": after("output", leaky),
}

# --- verdicts -------------------------------------------------------------------------------------

GROUPS: dict[str, list[tuple[str, str] | tuple[str, str, Mapping[str, Any]]]] = {
    "exactness": [
        ("nearfar.rows", "nearfar-golden"),
        ("nearfar.rows", "causal"),
        ("nearfar.exact_near", "nearfar-golden"),
        ("nearfar.exact_near", "causal"),
        ("nearfar.exact_keys", "nearfar-golden"),
        ("nearfar.exact_keys", "causal"),
    ],
    "bounds": [
        ("nearfar.jensen", "nearfar-golden"),
        ("nearfar.jensen", "far-shares"),
        ("nearfar.promotion", "nearfar-golden"),
        ("nearfar.interval", "far-shares"),
        ("nearfar.interval", "causal"),
        ("nearfar.tanh", "near-pair"),
        ("nearfar.tanh", "nearfar-golden"),
    ],
    "second-order": [
        ("nearfar.frozen", "nearfar-golden"),
        ("nearfar.frozen", "near-pair"),
        ("nearfar.frozen_above", "reference"),
        ("nearfar.frozen_gap", "reference"),
        ("nearfar.frozen_gap", "reference", {"m": 8}),
    ],
    "first-order": [
        ("nearfar.first_order_divergence", "nearfar-golden"),
        ("nearfar.first_order_divergence", "across"),
        ("nearfar.first_order_rate", "nearfar-golden"),
        ("nearfar.first_order_rate", "causal"),
    ],
    "algebra": [
        ("nearfar.merge", "nearfar-golden"),
        ("nearfar.merge", "far-shares"),
        ("nearfar.causal", "nearfar-golden"),
        ("nearfar.causal", "causal"),
    ],
    "refuted": [("nearfar.estimate", "unseen-key")],
}
for _group, _claims in GROUPS.items():
    CHAPTER.verdicts(_group, _claims, controls=CONTROLS)

# --- heads ----------------------------------------------------------------------------------------


def case_of(problem: sa.AttentionProblem, **options: Any) -> Case:
    """Return a case with 64 clusters of all keys and no near one, or other options."""
    form = forms(problem)[-1]._replace(near=0, **options)
    return Case(form, matrix_of(problem, form))


@CHAPTER.table("masses")
def masses(checks: Checks) -> Table:
    """Tabulate how far logarithms of masses are off, by their second-order term."""
    rows = []
    for problem in heads(2):
        cases = {x: case_of(problem, second_order=x) for x in ("none", "frozen")}
        case = cases["none"]
        share = np.exp(case.mass - case.log_z[:, None])

        def mean(x: Array, weights: Array = share) -> float:
            return float((weights * x).sum() / weights.sum())

        seen = case.mass - cases["none"].g
        half = case.sigma**2 / 2
        off = (seen, np.abs(seen - half), np.abs(case.mass - cases["frozen"].g))
        width, sigma = mean(case.width), mean(case.sigma)
        name = str(problem.name)
        for kind, x in zip(("none", "frozen"), (off[0], off[2]), strict=True):
            checks.at_most(f"ln mass - g with {kind}, {name}", mean(x), width)
        checks.at_most(f"lower bounds of {name}", max(-float(seen.min()), 0.0), 1e-9)
        rows.append((name, *(number(x) for x in (width, sigma, *map(mean, off)))))
    return Table(("head", "w", "sigma", "phi = 0", "sigma^2/2", "frozen"), rows)


@CHAPTER.table("rows")
def rows_of_heads(checks: Checks) -> Table:
    """Tabulate errors of rows with and without second and first order, and what bounds them."""
    rows = []
    for problem in heads(2):
        none, one, frozen = (
            case_of(problem, second_order=second, first_order=order)
            for second, order in (("none", 0), ("none", 1), ("frozen", 1))
        )
        bound = np.tanh(none.width.max(axis=1) / 4)
        name = str(problem.name)
        gap = none.log_z - none.log_normalizer
        checks.at_most(f"shares of {name}", float((none.share_tv / bound).max()), 1.0)
        checks.equal(f"KL of {name}", float(none.kl.mean()), float(gap.mean()), relative=1e-9)
        checks.at_most(f"KL with a direction of {name}", float((one.kl / none.kl).max()), 1.0)
        cells = (
            2 * none.share_tv.mean(), 2 * bound.mean(), none.kl.mean(), one.kl.mean(),
            frozen.kl.mean(), 2 * none.tv.mean(), 2 * frozen.tv.mean(),
        )  # fmt: skip
        rows.append((name, *(number(float(x)) for x in cells)))
    header = (
        "head", "error of shares", "2 tanh(W/4)", "KL", "KL, one direction", "KL, frozen too",
        "error of a row", "frozen, one direction",
    )  # fmt: skip
    return Table(header, rows)


# --- the second order -----------------------------------------------------------------------------

SIGMAS = (0.5, 1.0, 2.0, 4.0, 6.0, 10.0)


@CHAPTER.table("normal")
def normal(checks: Checks) -> Table:
    """Tabulate phi beside the mean log-mean-exp of normal logits."""
    rows = []
    draws = 20_000
    for m in (8, 32, 64):
        g = np.random.default_rng(m).standard_normal((draws, m))
        for sigma in SIGMAS:
            x = sigma * g
            top = x.max(axis=1)
            mean = float((top + np.log(np.exp(x - top[:, None]).mean(axis=1))).mean())
            phi = float(np.asarray(nearfar.frozen_second_order(sigma, m)))
            low, high = nearfar.frozen_window(sigma, m)
            # Five standard errors of the mean, whose variance is at most sigma^2.
            chance = 5 * sigma / math.sqrt(draws)
            what = f"m = {m}, sigma = {sigma:g}"
            checks.at_most(f"phi above the mean, {what}", phi - mean - chance, high)
            checks.at_most(f"phi below the mean, {what}", mean - phi - chance, -low)
            cells = (sigma, mean, phi, phi - mean, sigma**2 / 2)
            rows.append((str(m), *(number(y) for y in cells), number(low, 2), number(high)))
    header = ("m", "sigma", "mean", "phi", "phi - mean", "sigma^2/2", "at least", "at most")
    return Table(header, rows)


# --- the first order ------------------------------------------------------------------------------


@CHAPTER.table("rates")
def rates(checks: Checks) -> Table:
    """Tabulate the error of rows of one cluster of 64 keys in six dimensions as it shrinks."""
    rng = np.random.default_rng(3)
    k, q = rng.standard_normal((64, 6)), rng.standard_normal((20, 6))
    one = np.zeros(64, np.int64)
    form = Form("one", 64, 1)
    base = given_clusters(sa.AttentionProblem(q, k, scale=1.0), one, form._replace(first_order=1))
    z = base.moments.z[0]
    # The direction of the scores, which the clusters keep as they shrink.
    direction = np.linalg.lstsq(k - k.mean(axis=0), z, rcond=None)[0]
    direction /= np.linalg.norm(direction)
    families = {
        "line": (np.outer(k[:, 0], q[0] / np.linalg.norm(q[0])), q),
        "along": (k, np.outer(q @ direction, direction)),
        "any": (k, q),
    }
    sizes = [0.64 / 2**i for i in range(7)]
    found: dict[tuple[str, int], list[float]] = {}
    for name, (keys, queries) in families.items():
        for order in (0, 1):
            errors = []
            for size in sizes:
                problem = sa.AttentionProblem(queries, size * keys, scale=1.0)
                ahat = given_clusters(problem, one, form._replace(first_order=order))
                off = np.abs(ahat.to_dense() - problem.exact.to_dense())
                errors.append(float(off.sum(axis=1).mean()))
            found[name, order] = errors
    wanted = {("line", 1): 4.0, ("along", 1): 4.0, ("line", 0): 2.0, ("along", 0): 2.0,
              ("any", 0): 2.0, ("any", 1): 2.0}  # fmt: skip
    for key, rate in wanted.items():
        before, last = found[key][-2:]
        checks.equal(f"rate of {key}", before / last, rate, relative=0.05)
    columns = [("line", 0), ("line", 1), ("along", 0), ("along", 1), ("any", 0), ("any", 1)]
    rows = [
        (number(size), *(number(found[key][i]) for key in columns)) for i, size in enumerate(sizes)
    ]
    header = ("size", *(f"{name}, {('none', 'one')[order]}" for name, order in columns))
    return Table(header, rows)


# --- the estimate ---------------------------------------------------------------------------------


@CHAPTER.table("estimate")
def estimate(checks: Checks) -> Table:
    """Tabulate the estimate of the error beside the error."""
    rows = []
    unseen = theory.instances()["unseen-key"].problem
    assert unseen is not None
    given = [(p, sa.NearFar(near=4, first_order=0)) for p in heads(2)]
    given.append((unseen, sa.NearFar(block=32, clusters=4, near=1, tau=0.0, regions="blocks")))
    for problem, method in given:
        ahat: Any = method.approximate(problem)
        error = sa.error_report(problem, ahat, spectral=False).output_fro_rel
        found = ahat.estimated_error(problem.values)
        name = str(problem.name or "unseen-key")
        if problem is unseen:
            # Three rows of four do not see the key that has all of the value.
            checks.equal(f"error of {name}", error, math.sqrt(0.75), relative=1e-6)
            checks.at_most(f"estimate of {name}", 20 * found, error)
        rows.append((name, number(error), number(found), number(error / found)))
    return Table(("head", "error", "estimate", "error / estimate"), rows)


# --- figure ---------------------------------------------------------------------------------------


@CHAPTER.figure
def draw(tables: Mapping[str, Table]) -> Figure:
    """Draw phi beside normal logits, and the rates of the first order."""
    figure = new_figure(8.4, 3.6)
    axes = figure.add_subplot(1, 2, 1)
    table = tables["normal"]
    sigma = np.array(table.column("sigma"))
    counts = np.array(table.column("m"))
    for m, colour in ((8, "#0072B2"), (32, "#D55E00"), (64, "#009E73")):
        chosen = counts == m
        x = sigma[chosen]
        axes.plot(x, np.array(table.column("phi"))[chosen], color=colour, linewidth=1.2,
                  label=f"phi, m = {m}")  # fmt: skip
        axes.plot(x, np.array(table.column("mean"))[chosen], color=colour, linestyle="",
                  marker="o", markersize=4)  # fmt: skip
    chosen = counts == 8
    axes.plot(sigma[chosen], np.array(table.column("sigma^2/2"))[chosen], color="black",
              linestyle=":", linewidth=1.2, label="sigma^2/2")  # fmt: skip
    axes.set_ylim(0, 20)
    axes.set_xlabel("standard deviation of logits")
    axes.set_ylabel("log-mean-exp of m normal logits (dots)")
    axes.legend(fontsize=7)
    axes = figure.add_subplot(1, 2, 2)
    table = tables["rates"]
    styles = {
        "line, none": ("keys on a line, none", "#0072B2", "--", "s"),
        "line, one": ("keys on a line, one direction", "#0072B2", "-", "s"),
        "along, one": ("queries along it, one direction", "#D55E00", "-", "o"),
        "any, one": ("any queries, one direction", "#009E73", ":", "v"),
    }
    for column, (label, colour, dash, mark) in styles.items():
        axes.plot(table.column("size"), table.column(column), color=colour, linestyle=dash,
                  marker=mark, markersize=4, linewidth=1.2, label=label)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("size of the cluster")
    axes.set_ylabel("mean 1-norm of the error of a row")
    axes.legend(fontsize=7)
    for part in figure.axes:
        part.grid(True, color="0.9", linewidth=0.6)
    return figure


if __name__ == "__main__":
    sys.exit(CHAPTER.main())
