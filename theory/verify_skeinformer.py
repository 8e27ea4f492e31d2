"""Check the statements of skeinformer.md, and write its tables and its figure."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from _chapter import Chapter, Checks, Factory, Table, curves, heads, number, worked_example
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn import theory
from sketchattn.theory import skeinformer
from sketchattn.zoo.skeinformer.components import PRESETS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[Any]
CHAPTER = Chapter(__file__)
DELTA = 0.1
# The head of the tables of bounds and of the figure.
HEAD = 8
# Fills, and the normaliser without one.
FORMS: dict[str, dict[str, Any]] = {
    "geometric": {},
    "arithmetic": {"fill": "arithmetic"},
    "oracle": {"fill": "oracle"},
    "sampled": {"normalizer": "sampled"},
}

# --- broken implementations ---------------------------------------------------------------------


def library(kind: str, r: int, n: int, rng: Any, **parameters: Any) -> Any:
    """Return what the library makes: columns, pilot rows, a pilot law, or Ahat."""
    if kind == "pilot_rows":
        return rng.integers(0, n, r)
    if kind == "pilot_law":
        a, v = parameters["source"]
        return skeinformer.pilot_probabilities(a, v, parameters["rows"])
    if kind == "softmax":
        weights = np.exp(parameters["logits"])
        return weights / weights.sum(axis=1, keepdims=True)
    if kind == "skeinformer":
        problem, draw = parameters.pop("problem"), parameters.pop("draw")
        return sa.Skeinformer(r, **parameters).approximate(problem, draw=draw).to_dense()
    return theory.default_factory(kind, r, n, rng, **parameters).to_dense()


def changed(part: str, change: Callable[..., Any]) -> Factory:
    """Return an implementation of which ``change(found, rng, n)`` changes one part."""

    def broken(kind: str, r: int, n: int, rng: Any, **parameters: Any) -> Any:
        problem = parameters.get("problem")
        found = library(kind, r, n, rng, **parameters)
        return change(found, problem, rng, n) if kind == part else found

    return broken


def longer(kind: str, r: int, n: int, rng: Any, **parameters: Any) -> Any:
    """Return operators and matrices that are too large by a tenth."""
    found = library(kind, r, n, rng, **parameters)
    return found if kind.startswith("pilot") else 1.1 * found


def arithmetic(kind: str, r: int, n: int, rng: Any, **parameters: Any) -> Any:
    """Fill with the arithmetic mean whatever is asked for."""
    if kind == "skeinformer":
        parameters["fill"] = "arithmetic"
    return library(kind, r, n, rng, **parameters)


def logits(problem: Any) -> Any:
    """Return the logits of a problem."""
    return problem.scale * problem.q @ problem.k.T


one_pilot = changed("pilot_rows", lambda x, problem, rng, n: 0 * x)
CONTROLS: dict[str, Factory | None] = {
    "skeinformer.bound_order": None,  # nothing random is drawn by it
    "skeinformer.posterior": None,  # on the instances here no error is that large
    "skeinformer.pilot_law": changed("pilot_law", lambda x, *_: x**2 / np.sum(x**2)),
    "skeinformer.inflation": changed("pilot_law", lambda x, *_: 1.5 * x),
    "skeinformer.lemma1": one_pilot,
    "skeinformer.coherence": one_pilot,
    "skeinformer.column_floor": changed("softmax", lambda x, *_: 1.1 * x),
    "skeinformer.fill_mass": arithmetic,
    "skeinformer.pilot_reuse_factor": changed(
        "pilot_rows", lambda x, problem, rng, n: rng.permutation(n)[: len(x)]
    ),
    "skeinformer.hull": changed("skeinformer", lambda x, *_: 3 * x - 2 / x.shape[1]),
    "skeinformer.key_shift": changed(
        "skeinformer", lambda x, problem, *_: x + 1e-3 * logits(problem)
    ),
    "skeinformer.permutation": changed(
        "skeinformer", lambda x, *_: x * (1 + 0.01 * np.arange(x.shape[1]))
    ),
    "skeinformer.rank_floor": changed(
        "skeinformer", lambda x, problem, *_: problem.exact.to_dense()
    ),
}

# --- verdicts -----------------------------------------------------------------------------------

CHAPTER.verdicts(
    "product",
    [
        *((f"skeinformer.expected_error_{x}", "clusters") for x in ("exact", "uniform", "value")),
        *((f"skeinformer.expected_error_{x}", "clusters") for x in ("pilot", "support")),
        ("skeinformer.expected_error_without", "clusters"),
        ("skeinformer.expected_error_exact", "worked"),
        ("skeinformer.unbiased", "clusters"),
    ],
    control=longer,
)
CHAPTER.verdicts(
    "tails",
    [
        ("skeinformer.proposition1", "clusters"),
        ("skeinformer.dkm_T", "clusters"),
        ("skeinformer.mcdiarmid_T", "clusters"),
        ("skeinformer.mcdiarmid_exact", "clusters"),
        ("skeinformer.markov", "clusters"),
        ("skeinformer.proposition1", "reference"),
        ("skeinformer.bound_order", "clusters"),
        ("skeinformer.proposition1_pilot", "clusters"),
    ],
    controls=CONTROLS,
    control=longer,
)
CHAPTER.verdicts(
    "laws",
    [
        ("skeinformer.pilot_law", "reference"),
        ("skeinformer.inflation", "clusters"),
        ("skeinformer.column_floor", "identity"),
        ("skeinformer.column_floor", "two-columns"),
        ("skeinformer.lemma1", "two-columns"),
        ("skeinformer.lemma1", "identity"),
        ("skeinformer.lemma1", "uniform-ones"),
        ("skeinformer.lemma1_logarithmic", "one-reader"),
        ("skeinformer.lemma1_logarithmic", "reference"),
        ("skeinformer.coherence", "two-columns"),
        ("skeinformer.coherence", "diffuse"),
        ("skeinformer.coherence", "identity"),
    ],
    controls=CONTROLS,
)
CHAPTER.verdicts(
    "method",
    [
        ("skeinformer.identity_adaptive", "worked"),
        ("skeinformer.identity_sampled", "reference"),
        ("skeinformer.identity_exact", "reference"),
        ("skeinformer.fill_mass", "reference"),
        ("skeinformer.pilot_reuse", "reference"),
        ("skeinformer.pilot_reuse_factor", "clusters"),
        ("skeinformer.stochastic", "worked"),
        ("skeinformer.hull", "reference"),
        ("skeinformer.value_shift", "reference"),
        ("skeinformer.key_shift", "reference"),
        ("skeinformer.permutation", "reference"),
        ("skeinformer.full_rank", "reference"),
        ("skeinformer.rank_floor", "reference"),
        ("skeinformer.posterior", "heavy-keys"),
        ("skeinformer.posterior", "clusters"),
    ],
    controls=CONTROLS,
    control=longer,
)

# --- what tables share --------------------------------------------------------------------------


def square(x: Any) -> float:
    """Return the sum of squares."""
    return float(np.sum(np.square(x)))


def gram(a: Array, v: Array) -> Array:
    """Return the inner products of the matrices ``A_:j V_j``."""
    out: Array = (a.T @ a) * (v @ v.T)
    return out


def simulated(pairs: Array, p: Array, r: int, trials: int, rng: Any) -> Array:
    """Return squared errors of products of r columns drawn by p, ``pairs`` being their `gram`."""
    away = rng.multinomial(r, p, size=trials) / (r * p) - 1
    out: Array = np.einsum("ti,ti->t", away @ pairs, away)
    return out


def optimal(a: Array, v: Array) -> Array:
    """Return the law of least expected error."""
    x = skeinformer.contributions(a, v)
    out: Array = x / x.sum()
    return out


def of_mean(problem: sa.AttentionProblem) -> float:
    """Return the squared error of the mean of V."""
    return square(problem.output - problem.values.mean(axis=0))


# --- the product --------------------------------------------------------------------------------


@CHAPTER.table("enumeration")
def enumeration(checks: Checks) -> Table:
    """Average the squared error over all draws of two of the three columns of `worked`."""
    seen = theory.instances()["worked"]
    a, v = seen.a, seen.v
    laws = {
        "optimal law": optimal(a, v),
        "pilot law, I = {0}": skeinformer.pilot_probabilities(a, v, [0]),
        "uniform law": np.full(3, 1 / 3),
        "law (0, .4, .6)": np.array([0.0, 0.4, 0.6]),
    }
    rows = []
    for name, p in laws.items():
        mean, middle, outcomes = 0.0, np.zeros_like(seen.product), 0
        support = np.flatnonzero(p)
        for pair in itertools.product(support, repeat=2):
            chosen = list(pair)
            out = (a[:, chosen] / (2 * p[chosen])) @ v[chosen]
            weight = float(np.prod(p[chosen]))
            mean += weight * square(out - seen.product)
            middle += weight * out
            outcomes += 1
        formula = skeinformer.sampled_sqerr(a, v, p, 2)
        checks.equal(f"mean squared error, {name}", mean, formula, relative=1e-12)
        bias = float(np.abs(middle - seen.product).max())
        left = seen.product - a[:, support] @ v[support]
        checks.equal(f"bias, {name}", bias, float(np.abs(left).max()), relative=1e-9, absolute=1e-9)
        rows.append((name, str(outcomes), number(mean, 5), number(formula, 5), number(bias)))
    return Table(("two draws by the", "outcomes", "mean", "formula", "largest bias"), rows)


@CHAPTER.table("bounds")
def bounds(checks: Checks) -> Table:
    """Tabulate the five bounds and the errors seen on one head, over ``|A V|_F^2``."""
    problem = heads()[HEAD]
    a, v = problem.exact.to_dense(), problem.values
    p, output = optimal(a, v), square(problem.output)
    pairs = gram(a, v)
    rows = []
    for r in (16, 64, 256, 512):
        found = skeinformer.product_bounds(a, v, p, r, DELTA, beta=1.0)
        error = skeinformer.sampled_sqerr(a, v, p, r)
        seen = simulated(pairs, p, r, 2000, np.random.default_rng(r))
        eta = 1 + math.sqrt(8 * math.log(1 / DELTA))
        published = eta**2 / r * square(a) * square(v)
        checks.equal(f"published bound, r = {r}", found.dkm, published, relative=1e-9)
        spread = 5 * float(seen.std(ddof=1)) / math.sqrt(len(seen))
        checks.equal(f"mean error, r = {r}", float(seen.mean()), error, relative=0, absolute=spread)
        quantile = float(np.quantile(seen, 1 - DELTA))
        for name, bound in zip(found._fields[:5], found[:5], strict=True):
            checks.at_most(f"quantile at r = {r} against {name}", quantile, bound)
        cells = (*found[:5], error, quantile, of_mean(problem))
        rows.append((str(r), *(number(x / output) for x in cells)))
    header = (
        *("r", "dkm", "dkm_T", "mcdiarmid_T", "mcdiarmid_exact", "markov"),
        *("E1", "90 % quantile seen", "mean of V"),
    )
    return Table(header, rows)


@CHAPTER.table("ranks")
def ranks(checks: Checks) -> Table:
    """Tabulate the ranks from which columns beat the mean of V, and bounds say anything."""
    rows = []
    for problem in heads():
        a, v = problem.exact.to_dense(), problem.values
        p, output, mean = optimal(a, v), square(problem.output), of_mean(problem)
        even = skeinformer.break_even_rank(a, v)
        error = skeinformer.sampled_sqerr(a, v, p, 64)
        checks.equal(f"{problem.name}, break-even rank", 64 * error / mean, even, relative=1e-9)
        found = skeinformer.product_bounds(a, v, p, 64, DELTA, beta=1.0)
        known = found.informative_rank
        checks.equal(f"{problem.name}, published", found.dkm / output, known / 64, relative=1e-9)
        rows.append(
            (
                str(problem.name),
                number(mean / output),
                number(error / output),
                number(even),
                number(64 * found.dkm / mean),
                number(64 * found.markov / mean),
            )
        )
    header = (
        "head",
        "mean of V",
        "E1 at r = 64",
        "r where E1 beats the mean",
        "r where dkm does",
        "r where markov does",
    )
    return Table(header, rows)


@CHAPTER.table("scope")
def scope(checks: Checks) -> Table:
    """Tabulate what Proposition 1 covers."""
    weighted: dict[str, Any] = {"replace": True, "weights": "importance"}
    methods: dict[str, Any] = {
        "`ColumnSampling`": sa.ColumnSampling(8),
        "`ColumnSampling`, law pilot": sa.ColumnSampling(8, law="pilot"),
        "`Skeinformer`, replace, importance, exact": sa.Skeinformer(
            8, normalizer="exact", **weighted
        ),
        "`Skeinformer`, replace, importance, sampled": sa.Skeinformer(
            8, normalizer="sampled", **weighted
        ),
        "`Skeinformer`": sa.Skeinformer(8),
        **{f"`Skeinformer`, preset {x}": sa.Skeinformer(8, preset=x) for x in PRESETS},
    }
    reasons = {name: skeinformer.proposition1_scope(method) for name, method in methods.items()}
    covered = sum(not reason for reason in reasons.values())
    checks.equal("methods that are covered", covered, 3, relative=0)
    rows = [(name, reason or "covered") for name, reason in reasons.items()]
    return Table(("method", "Proposition 1"), rows)


# --- pilots -------------------------------------------------------------------------------------


@CHAPTER.table("pilots")
def pilots(checks: Checks) -> Table:
    """Tabulate the pilot rows that Lemma 1 and its repair ask for, delta = 0.1."""
    rows = []
    for n in (10, 64, 512, 2048):
        log = math.log(2 * n / DELTA)
        found = []
        for name, matrix, c, mu in (
            ("A = I", np.eye(n), 1 / n, n),
            ("uniform A", np.full((n, n), 1 / n), 1 / n**2, 1),
        ):
            floor = skeinformer.column_floor(matrix)
            checks.at_most(f"C of {name}, n = {n}", floor, 1 / n)
            lemma = skeinformer.lemma1_pilots(matrix, DELTA)
            repaired = skeinformer.coherence_pilots(matrix, DELTA)
            checks.equal(f"Lemma 1 for {name}, n = {n}", lemma, 2 / c**2 * log, relative=1e-9)
            checks.equal(f"repair for {name}, n = {n}", repaired, 12 * mu * log, relative=1e-9)
            found += [lemma, repaired]
        rows.append((str(n), number(1 / n), *map(number, found)))
    header = (
        "n",
        "largest possible C",
        "Lemma 1, A = I",
        "repair, A = I",
        "Lemma 1, uniform A",
        "repair, uniform A",
    )
    return Table(header, rows)


@CHAPTER.table("unseen")
def unseen(checks: Checks) -> Table:
    """Tabulate the share of the 200 keys of A = I that pilot rows see."""
    n, trials = 200, 200
    rows = []
    for s in (20, 64, 200, 1000):
        rng = np.random.default_rng(s)
        drawn = [len(np.unique(rng.integers(0, n, s))) for _ in range(trials)]
        seen = float(np.mean(drawn)) / n
        share = 1 - (1 - 1 / n) ** s
        # Whether keys are seen is negatively correlated.
        spread = 5 * math.sqrt(share * (1 - share) / (n * trials))
        checks.equal(f"share seen, s = {s}", seen, share, relative=0, absolute=spread)
        rows.append((str(s), number(share), number(seen), str(sum(x == n for x in drawn))))
    header = ("s", "1 - (1 - 1/n)^s", "share seen", f"beta > 0, times of {trials}")
    return Table(header, rows)


@CHAPTER.table("beta")
def beta(checks: Checks) -> Table:
    """Tabulate coherence, pilot sizes and realised beta of the bundled heads."""
    rows = []
    for problem in heads():
        a, v = problem.exact.to_dense(), problem.values
        mu, floor = skeinformer.column_coherence(a), skeinformer.column_floor(a)
        log = math.log(2 * len(v) / DELTA)
        checks.at_most(f"{problem.name}, C n", floor * len(v), 1.0)
        checks.equal(
            f"{problem.name}, repair",
            skeinformer.coherence_pilots(a, DELTA),
            12 * mu * log,
            relative=1e-9,
        )
        cells = []
        for s in (16, 64, 256):
            rng = np.random.default_rng(s)
            laws = [
                skeinformer.pilot_probabilities(a, v, rng.integers(0, len(a), s)) for _ in range(9)
            ]
            betas = [skeinformer.realised_beta(p, a, v) for p in laws]
            costs = [skeinformer.sampling_inflation(p, a, v) for p in laws]
            for b, cost in zip(betas, costs, strict=True):
                checks.at_most(f"{problem.name}, beta times inflation", b * cost, 1.0)
            cells += [number(float(np.median(betas)), 2)]
        rows.append(
            (
                str(problem.name),
                number(mu),
                number(skeinformer.lemma1_pilots(a, DELTA)),
                number(12 * mu * log),
                *cells,
                number(float(np.median(costs))),
            )
        )
    header = (
        *("head", "mu", "s by Lemma 1", "s by coherence"),
        *("beta, s = 16", "beta, s = 64", "beta, s = 256", "inflation, s = 256"),
    )
    return Table(header, rows)


# --- the method ---------------------------------------------------------------------------------


@CHAPTER.table("worked")
def worked(checks: Checks) -> Table:
    """Tabulate the error of row 0 of `worked` for J = {1, 2}."""
    problem = worked_example()
    draw = {"columns": np.array([1, 2]), "pilot_rows": np.array([0])}
    exact = float(problem.output[0, 0])
    tau = float(problem.exact.to_dense()[0, 0])
    known = {"geometric": 2.1327046, "arithmetic": 19 / 9, "sampled": 8 / 3}
    rows = []
    for name, parameters in {**FORMS, "exact": {"normalizer": "exact"}}.items():
        method = sa.Skeinformer(2, pilots=1, pilot_reuse=False, **parameters)
        ahat = method.approximate(problem, draw=draw).to_dense()[0]
        out = float(method.attend(problem, draw=draw)[0, 0])
        if name == "exact":
            parts = (math.nan, math.nan)
            total = tau * 1.0  # t is the value of the one key outside J
        else:
            terms = method.error_terms(problem, draw=draw)
            parts = (float(terms.normalizer[0, 0]), float(terms.shape[0, 0]))
            total = sum(parts)
        checks.equal(f"error, {name}", exact - out, total, relative=1e-9, absolute=1e-12)
        if name in known:
            checks.equal(f"output, {name}", out, known[name], relative=1e-6)
        cells = (tau, float(ahat[0]), out, *parts, exact - out)
        rows.append((name, *(number(x, 5) for x in cells)))
    header = (
        "fill or normaliser",
        "tau",
        "tauhat",
        "output",
        "normaliser error",
        "shape error",
        "error",
    )
    return Table(header, rows)


@CHAPTER.table("terms")
def terms(checks: Checks) -> Table:
    """Tabulate both terms of the error on bundled heads, without pilot reuse, r = s = 64."""
    rows = []
    for problem in heads(4):
        output = square(problem.output)
        for name, parameters in FORMS.items():
            method = sa.Skeinformer(64, pilot_reuse=False, **parameters)
            sums = np.zeros(3)
            for seed in range(8):
                draw = method.draw(problem, seed)
                parts = method.error_terms(problem, draw=draw)
                error = problem.output - method.attend(problem, draw=draw)
                both = square(parts.normalizer + parts.shape)
                checks.equal(f"{problem.name}, {name}", square(error), both, relative=1e-6)
                sums += (square(error), square(parts.normalizer), square(parts.shape))
            cells = (*(sums / 8), of_mean(problem))
            rows.append((f"{problem.name}, {name}", *(number(x / output) for x in cells)))
    header = ("head, fill or normaliser", "error", "normaliser term", "shape term", "mean of V")
    return Table(header, rows)


@CHAPTER.table("reuse")
def reuse(checks: Checks) -> Table:
    """Tabulate what pilot reuse saves, and what pilots say of the error, r = s = 64."""
    rows, trials = [], 40
    for problem in heads(4):
        factor = (1 - 1 / problem.n_q) ** 64
        for law in ("uniform", "pilot"):
            method = sa.Skeinformer(64, law=law, pilots=64)
            plain = sa.Skeinformer(
                64, law=law, pilot_reuse=False, pilots=64 if law == "pilot" else None
            )
            found = np.empty((trials, 2))
            for seed in range(trials):
                draw = dict(method.draw(problem, seed))
                chosen = draw["pilot_rows"]
                given = draw if law == "pilot" else {"columns": draw["columns"]}
                difference = problem.output - plain.attend(problem, draw=given)
                errors = np.sum(difference**2, axis=1)
                reused = square(problem.output - method.attend(problem, draw=draw))
                total = float(errors.sum())
                saved = float(errors[np.unique(chosen)].sum())
                checks.equal(
                    f"{problem.name}, {law}, identity", reused, total - saved, relative=1e-6
                )
                found[seed] = reused / total, problem.n_q / 64 * errors[chosen].sum() / total
            means = found.mean(axis=0)
            spread = 5 * found.std(axis=0, ddof=1) / math.sqrt(trials)
            if law == "uniform":
                for i, (what, want) in enumerate((("saved", factor), ("estimate", 1.0))):
                    checks.equal(
                        f"{problem.name}, {what}",
                        float(means[i]),
                        want,
                        relative=0,
                        absolute=float(spread[i]),
                    )
            rows.append((f"{problem.name}, {law}", number(factor), *map(number, means)))
    header = (
        "head, law",
        "(1 - 1/n_q)^s",
        "error with reuse over error without",
        "error by pilot rows over error",
    )
    return Table(header, rows)


@CHAPTER.table("accumulation")
def accumulation(checks: Checks) -> Table:
    """Tabulate row sums of the released code with its sample drawn a-fold, r = 64."""
    problem = heads()[HEAD]
    scores = logits(problem)
    m, r = problem.n_k, 64
    rows = []
    for a in (1, 2, 3):
        columns = sa.Skeinformer(a * r, pilots=r).draw(problem, 0)["columns"]
        entries = scores[:, columns] - scores[:, columns].max(axis=1, keepdims=True)
        mass, fill = np.exp(entries).sum(axis=1), np.exp(entries.mean(axis=1))
        sums = (mass + (m - a * r) * fill) / (mass + (m - r) * fill)
        want = 1 - (a - 1) * r * fill / (mass + (m - r) * fill)
        checks.equal(
            f"smallest row sum, a = {a}", float(sums.min()), float(want.min()), relative=1e-9
        )
        rows.append((str(a), *(number(float(x)) for x in (sums.min(), sums.mean(), sums.max()))))
    return Table(("a", "smallest row sum", "mean", "largest"), rows)


@CHAPTER.table("curve")
def curve(checks: Checks) -> Table:
    """Tabulate errors on one head over ``|A V|_F`` against r, s = r pilots."""
    problem = heads()[HEAD]
    a, v = problem.exact.to_dense(), problem.values
    p, size = optimal(a, v), math.sqrt(square(problem.output))
    pairs = gram(a, v)
    u, sigma, vt = np.linalg.svd(a)
    mean = math.sqrt(of_mean(problem)) / size
    rows = []
    for r in (8, 16, 32, 64, 128, 256):
        rng = np.random.default_rng(r)
        pilot = skeinformer.pilot_probabilities(a, v, rng.integers(0, len(a), r))
        mixed = 0.9 * pilot + 0.1 / len(v)
        found = skeinformer.product_bounds(a, v, p, r, DELTA, beta=1.0)
        error = math.sqrt(skeinformer.sampled_sqerr(a, v, p, r)) / size
        weighted = math.sqrt(skeinformer.sampled_sqerr(a, v, mixed, r)) / size
        seen = simulated(pairs, p, r, 2000, rng)
        checks.equal(
            f"mean squared error, r = {r}",
            float(seen.mean()) / size**2,
            error**2,
            relative=0,
            absolute=5 * float(seen.std(ddof=1)) / math.sqrt(2000) / size**2,
        )
        adaptive = {}
        for name, preset in (("full", None), ("sampled", "sampled_normalizer")):
            method = sa.Skeinformer(r, preset=preset)
            squares = [square(problem.output - method.attend(problem, seed)) for seed in range(8)]
            adaptive[name] = math.sqrt(float(np.mean(squares))) / size
        floor = math.sqrt(square(problem.output - (u[:, :r] * sigma[:r]) @ (vt[:r] @ v))) / size
        cells = (
            *(math.sqrt(found.dkm) / size, math.sqrt(found.best) / size, error, weighted),
            *(adaptive["sampled"], adaptive["full"], mean, floor),
        )
        rows.append((str(r), *map(number, cells)))
    header = (
        *("r", "Proposition 1", "best bound", "optimal law, weighted", "pilot law, weighted"),
        *("sampled normaliser", "Skeinformer", "mean of V", "truncated svd"),
    )
    return Table(header, rows)


@CHAPTER.figure
def figure(tables: Mapping[str, Table]) -> Figure:
    """Draw bounds, what they cover, and what they do not cover, against r."""
    lines = (
        ("Proposition 1", "-", "black"),
        ("best bound", "--", "black"),
        ("optimal law, weighted", "o-", "#0072B2"),
        ("pilot law, weighted", "o-", "#56B4E9"),
        ("sampled normaliser", "s-", "#E69F00"),
        ("Skeinformer", "D-", "#D55E00"),
        ("mean of V", ":", "0.3"),
        ("truncated svd", "-.", "0.5"),
    )
    drawn, axes = curves(
        tables["curve"],
        "r",
        lines,
        xlabel="r, columns drawn",
        ylabel="Frobenius error of the output over |A V|_F",
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.legend(fontsize=7, ncols=2)
    return drawn


if __name__ == "__main__":
    sys.exit(CHAPTER.main())
