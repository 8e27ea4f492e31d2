"""Check the statements of dba.md, and write its tables and its figure."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from _chapter import Chapter, Checks, Factory, Table, curves, heads, number
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn import theory
from sketchattn.errors import perturbation
from sketchattn.sampling.landmarks import pivoted_rows, segment_means
from sketchattn.sketches.compression import compress
from sketchattn.theory import dba
from sketchattn.theory.engine.checking import default_factory
from sketchattn.theory.engine.instances import as_instance
from sketchattn.theory.sketching.lowrank import eckart_young_floor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[Any]
CHAPTER = Chapter(__file__)
# The head of the figure, and of tables over widths.
HEAD = 3
# The one that is no product of rank r.
LAST = "logits of rank r, softmax last"

# --- broken implementations -----------------------------------------------------------------------


def softmax(logits: Array) -> Array:
    """Return the softmax of rows."""
    weights: Array = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def means(problem: Any, queries: Any, keys: Any, counts: bool = True) -> Array:
    """Return Ahat of means over clusters."""
    logits = problem.scale * queries.centers @ keys.centers.T
    core = softmax(logits + (np.log(keys.counts) if counts else 0.0))
    pack = np.eye(len(keys.counts))[keys.labels].T / keys.counts[:, None]
    return np.asarray(np.eye(len(queries.counts))[queries.labels] @ core @ pack)


def library(kind: str, r: int, n: int, rng: Any, **given: Any) -> Any:
    """Make what the library would, from the definitions."""
    made: dict[str, Callable[[], Any]] = {
        "pack": lambda: rng.standard_normal((r, n)),
        "decoder": lambda: dba.logit_decoder(given["keys"], given["packed"]),
        "softmax": lambda: softmax(given["logits"]),
        "oblique": lambda: dba.oblique_maps(given["q"], given["k"]),
        "projector": lambda: dba.exact_projector(given["q"], given["k"]),
        "compress": lambda: compress(given["q"], given["k"], r, given["how"], rng),
        "gaussian": lambda: default_factory(kind, r, n, rng).to_dense(),
        "approximation": lambda: truncated(given["problem"].exact.to_dense(), r),
        "means": lambda: means(**given),
        "compressed": lambda: sa.Compressed(r).approximate(given["problem"], rng=0).to_dense(),
        "best_output": lambda: truncated(given["output"], r) @ np.linalg.pinv(given["values"]),
        "rounded": lambda: perturbation.quantize(given["x"], given["dtype"]),
        "skeleton": lambda: np.array(dba.largest_volume(given["matrix"], r)),
        "columns": lambda: dba.strong_rrqr(given["matrix"], r, given["f"]),
        "volume_law": lambda: dba.volume_sampling(given["matrix"], r).law,
    }
    return made[kind]()


def changed(kind: str, change: Callable[..., Any]) -> Factory:
    """Return an implementation of which one part is changed."""

    def broken(asked: str, r: int, n: int, rng: Any, **given: Any) -> Any:
        found = library(asked, r, n, rng, **given)
        return change(found, r=r, n=n, rng=rng, **given) if asked == kind else found

    return broken


def times(kind: str, factor: float) -> Factory:
    """Return an implementation of which one part is too large."""
    return changed(kind, lambda found, **_: factor * np.asarray(found))


def heated(factor: float) -> Factory:
    """Return a softmax of another scale."""
    return changed("softmax", lambda _, logits, **__: softmax(factor * logits))


def other_rows(found: Array, **_: Any) -> Array:
    """Return the rows in the place of each other."""
    return np.roll(found, 1, axis=0)


def no_counts(_: Any, problem: Any, queries: Any, keys: Any, **__: Any) -> Array:
    """Forget how many keys a mean stands for."""
    return means(problem, queries, keys, counts=False)


def least_volume(_: Any, r: int, matrix: Array, **__: Any) -> Array:
    """Choose the rows and columns of least volume."""
    sets = list(combinations(range(len(matrix)), r))
    volumes = [[abs(np.linalg.det(matrix[np.ix_(i, j)])) for j in sets] for i in sets]
    i, j = np.unravel_index(int(np.argmin(volumes)), (len(sets), len(sets)))
    return np.array([sets[i], sets[j]])


def worst_set(law: Array, r: int, matrix: Array, **_: Any) -> Array:
    """Draw the columns that leave most, always."""
    worst = int(np.argmax(dba.volume_sampling(matrix, r).errors))
    return np.asarray(np.arange(len(law)) == worst, np.float64)


def smallest(_: Any, r: int, matrix: Array, **__: Any) -> Array:
    """Choose the shortest columns."""
    return np.asarray(np.argsort(np.linalg.norm(matrix, axis=0))[:r])


CONTROLS: dict[str, Factory | None] = {
    "dba.lossless_logits": times("decoder", 1.01),
    "dba.logit_rank": changed("pack", lambda _, r, n, rng, **__: rng.standard_normal((r + 1, n))),
    "dba.vandermonde": heated(1.01),
    "dba.total_positivity": heated(-1.0),
    "dba.circle": heated(0.95),
    "dba.oblique": changed("oblique", lambda x, **_: (x[0][:, :-1], x[1][:-1])),
    "dba.projector": times("projector", 1.01),
    "dba.svd_width": changed("compress", lambda x, **_: (1.1 * x[0], x[1])),
    "dba.jl_variance": times("gaussian", 1.5),
    "dba.jl_logits": changed("gaussian", lambda _, n, rng, **__: rng.standard_normal((4, n)) / 2),
    "dba.multiplicity": changed("means", no_counts),
    "dba.matrix_floor": changed("approximation", lambda _, problem, **__: problem.exact.to_dense()),
    "dba.output_floor": changed("approximation", lambda _, problem, **__: problem.exact.to_dense()),
    "dba.output_floor_attained": times("best_output", 1.01),
    "dba.logit_error": heated(1.1),
    "dba.block_form": changed("means", no_counts),
    "dba.cluster_apriori": changed("means", other_rows),
    "dba.compressed_logits": changed("compressed", other_rows),
    "dba.quantized_inputs": changed("rounded", lambda _, x, **__: np.rint(2 * x) / 2),
    "dba.lipschitz": changed("compressed", other_rows),
    "dba.skeleton": changed("skeleton", least_volume),
    "dba.volume_sampling": changed("volume_law", worst_set),
    "dba.volume_sampling_exact": changed("volume_law", lambda x, **_: np.full(len(x), 1 / len(x))),
    "dba.strong_rrqr": changed("columns", smallest),
}

# --- verdicts -------------------------------------------------------------------------------------

GROUPS: dict[str, list[tuple[str, str]]] = {
    "packs": [
        ("dba.lossless_logits", "oblique"),
        ("dba.lossless_logits", "clusters"),
        ("dba.logit_rank", "oblique"),
        ("dba.pivoted_decoder", "three-keys"),
    ],
    "commuting": [
        ("dba.vandermonde", "line-4"),
        ("dba.vandermonde", "line-6"),
        ("dba.total_positivity", "line-6"),
        ("dba.circle", "circle"),
        ("dba.softmax_commutes", "line-4"),
        ("dba.lossless_attention", "line-4"),
        ("dba.lossless_attention", "circle"),
    ],
    "exactness": [
        ("dba.multiplicity", "three-to-one"),
        ("dba.multiplicity", "duplicates"),
        ("dba.no_log_count", "three-to-one"),
        ("dba.no_log_count", "duplicates"),
    ],
    "bounds-below": [
        ("dba.matrix_floor", "gauss"),
        ("dba.output_floor", "gauss"),
        ("dba.output_floor_attained", "gauss"),
        ("dba.svd_output_floor", "gauss"),
        ("dba.svd_output_floor", "clusters"),
        ("dba.compressed_floor", "gauss"),
    ],
    "logit-errors": [
        ("dba.logit_error", "odds"),
        ("dba.logit_error", "reference"),
        ("dba.block_form", "duplicates"),
        ("dba.cluster_apriori", "ten-clusters"),
        ("dba.cluster_apriori", "clusters"),
        ("dba.compressed_logits", "ten-clusters"),
        ("dba.compressed_logits", "gauss"),
        ("dba.quantized_inputs", "ten-clusters"),
        ("dba.lipschitz", "worked"),
        ("dba.lipschitz", "ten-clusters"),
    ],
    "hidden": [
        ("dba.oblique", "oblique"),
        ("dba.projector", "oblique"),
        ("dba.projector_needs_more", "oblique"),
        ("dba.svd_width", "clusters"),
        ("dba.jl_variance", "clusters"),
        ("dba.jl_logits", "wide-rows"),
        ("dba.jl_logits", "clusters"),
    ],
    "pivots": [
        ("dba.skeleton", "gauss"),
        ("dba.volume_sampling", "gauss"),
        ("dba.volume_sampling_exact", "gauss"),
        ("dba.strong_rrqr", "gauss"),
    ],
}
for _group, _claims in GROUPS.items():
    CHAPTER.verdicts(_group, _claims, controls=CONTROLS)

# --- what tables share ----------------------------------------------------------------------------


def truncated(a: Array, r: int) -> Array:
    """Return the best matrix of rank r."""
    u, s, vt = np.linalg.svd(a, full_matrices=False)
    return np.asarray((u[:, :r] * s[:r]) @ vt[:r])


def off(found: Array, wanted: Array) -> float:
    """Return a relative Frobenius error."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def floor(sigma: Array, r: int) -> float:
    """Return the relative Frobenius error of the best matrix of rank r."""
    return float(np.asarray(eckart_young_floor(sigma, r))) / float(np.linalg.norm(sigma))


def values_of(a: Array) -> Array:
    """Return singular values."""
    return np.asarray(np.linalg.svd(a, compute_uv=False))


def variation(a: Array, b: Array) -> Array:
    """Return the total variation of rows."""
    return np.asarray(np.abs(a - b).sum(axis=1) / 2)


# --- logits and attention -------------------------------------------------------------------------


@CHAPTER.table("ranks")
def ranks(checks: Checks) -> Table:
    """Tabulate the relative error of 256 x 256 Gaussian logits of rank 32 after packs of r rows."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((256, 32)), rng.standard_normal((256, 32))
    logits = q @ k.T
    sigma = values_of(logits)
    rows = []
    for r in (8, 16, 31, 32):
        i, j = pivoted_rows(q, r, rng), pivoted_rows(k, r, rng)
        packs = {"pivots": k[j], "G": rng.standard_normal((r, 256)) @ k, "m": segment_means(k, r)}
        cells = [off(q @ p.T @ dba.logit_decoder(k, p).T, logits) for p in packs.values()]
        left, right = dba.logit_decoder(q, q[i]), dba.logit_decoder(k, k[j])
        cells.append(off(left @ (q[i] @ k[j].T) @ right.T, logits))
        least = floor(sigma, r)
        for cell in cells:
            checks.at_most(f"floor, r = {r}", least if least > 1e-12 else 0.0, max(cell, 1e-12))
            if r == 32:
                checks.at_most("error at the rank", cell, 1e-12)
        rows.append((str(r), number(least), *(number(x) for x in cells)))
    header = ("r", "floor", "pivots", "Gaussian P", "means of segments", "pivots, both sides")
    return Table(header, rows)


@CHAPTER.table("line")
def line(checks: Checks) -> Table:
    """Tabulate determinants of exp(q_i k_j) on the line."""
    known = {4: 3907.534355129156, 5: 2015.1224386521, 6: 238.0182178980}
    rows = []
    for m, wanted in known.items():
        q, k = np.linspace(-2, 2, m), np.linspace(-1.5, 2.5, m)
        found = float(np.linalg.det(np.exp(np.outer(q, k))))
        formula = dba.exponential_determinant(q, k)
        checks.equal(f"formula, m = {m}", formula, wanted, relative=1e-10)
        checks.equal(f"determinant, m = {m}", found, wanted, relative=1e-10)
        a = softmax(np.outer(q, k))
        rank = int(np.linalg.matrix_rank(a))
        checks.equal(f"rank, m = {m}", rank, m, relative=0)
        cells = (number(formula, 6), number(found, 6), "1", str(rank))
        rows.append((str(m), *cells, number(floor(values_of(a), 1))))
    header = ("n", "formula", "determinant", "rank(L)", "rank(A)", "floor of rank 1")
    return Table(header, rows)


@CHAPTER.table("bundled")
def bundled(checks: Checks) -> Table:
    """Tabulate ranks of logits and of attention on bundled heads, d = 32."""
    rows = []
    for problem in heads():
        found = theory.check("dba.lossless_attention", problem).observed
        seen = as_instance(problem)
        a, sigma, d = seen.a, seen.svd[1], problem.d
        rank = dba.numerical_rank(problem.q @ problem.k.T)
        checks.equal(f"{problem.name}, rank of logits", rank, d, relative=0)
        least = floor(sigma, d)
        checks.equal(f"{problem.name}, floor", found, least, relative=1e-9)
        errors = [
            off(sa.Compressed(x).approximate(problem, rng=0).to_dense(), a) for x in (d // 2, d)
        ]
        checks.at_most(f"{problem.name}, all of the width", errors[1], 1e-9)
        full = int((sigma > 1e-12 * sigma[0]).sum())
        cells = (str(rank), str(full), number(least), number(floor(sigma, d // 2)))
        rows.append((str(problem.name), *cells, number(errors[0])))
    header = (
        "head",
        "rank(L)",
        "rank(A)",
        "floor of rank d",
        "floor of rank d/2",
        "softmax of logits of rank d/2",
    )
    return Table(header, rows)


# --- exactness and floors -------------------------------------------------------------------------


@CHAPTER.table("trap")
def trap(checks: Checks) -> Table:
    """Tabulate the core of three-to-one with and without the counts (3, 1)."""
    logits = np.eye(2) / math.sqrt(2)
    cores = {"with log c": softmax(logits + np.log([3, 1])), "without": softmax(logits)}
    known = {"with log c": (0.85884369, 0.14115631), "without": (0.66976155, 0.33023845)}
    problem = theory.instances()["three-to-one"].problem
    assert problem is not None
    a = problem.exact.to_dense()
    exact = np.stack([a[:, :3].sum(axis=1), a[:, 3]], axis=1)
    rows = []
    for name, core in cores.items():
        for x, wanted in zip(core[0], known[name], strict=True):
            checks.equal(f"core {name}", float(x), wanted, relative=0, absolute=1e-8)
        error = float(variation(core, exact).max())
        rows.append((name, *(number(float(x), 8) for x in core[0]), number(error)))
    return Table(("core", "S_11", "S_12", "largest total variation"), rows)


def data_sets() -> dict[str, sa.AttentionProblem]:
    """Return Gaussian and clustered problems, n = 256, d = 32."""
    rng = np.random.default_rng(0)
    n, d = 256, 32
    q, k, v = (rng.standard_normal((n, d)) for _ in range(3))
    x = rng.standard_normal((20, d))[rng.integers(0, 20, n)] + 0.3 * rng.standard_normal((n, d))
    g = [rng.standard_normal((d, d)) / math.sqrt(d) for _ in range(3)]
    near = (1.5 * x @ g[0], 1.5 * x @ (g[0] + 0.5 * g[1]), x @ g[2])
    return {"Gaussian": sa.AttentionProblem(q, k, v), "clustered": sa.AttentionProblem(*near)}


@CHAPTER.table("floors")
def floors(checks: Checks) -> Table:
    """Tabulate matrix and output errors of products of rank r = 24 and of compressed logits."""
    r, cells = 24, dict[str, list[str]]()
    for name, problem in data_sets().items():
        a, v, o = problem.exact.to_dense(), problem.values, problem.output
        best = dba.output_factors(o, v, r)
        made = {
            "truncated SVD of A": truncated(a, r),
            "O_r V^+": best.unpack @ best.pack,
            **{
                preset: sa.DBA(r, preset=preset).approximate(problem, rng=0).to_dense()
                for preset in ("clustered", "dba_means", "key_means", "nystrom")
            },
            LAST: sa.Compressed(r).approximate(problem, rng=0).to_dense(),
        }
        least, least_output = floor(values_of(a), r), floor(values_of(o), r)
        for label, ahat in made.items():
            matrix, output = off(ahat, a), off(ahat @ v, o)
            if label != LAST:
                checks.at_most(f"{name}, {label}, floor", least, matrix)
                checks.at_most(f"{name}, {label}, output floor", least_output, output)
            if label.startswith("O_r"):
                checks.equal(f"{name}, attained", output, least_output, relative=1e-9)
            cells.setdefault(label, []).extend((number(matrix), number(output)))
    header = ("Ahat", "Gaussian, matrix", "output", "clustered, matrix", "its output")
    return Table(header, [(label, *row) for label, row in cells.items()])


# --- errors of logits -----------------------------------------------------------------------------


@CHAPTER.table("attained")
def attained(checks: Checks) -> Table:
    """Tabulate the bounds where total variation attains its own."""
    known = {0.1: 0.04995837, 0.7: 0.33637554, 2.0: 0.76159416}
    rows = []
    for eta, wanted in known.items():
        p = 1 / (1 + math.exp(eta))
        logits, change = np.log([[p, 1 - p]]), np.array([[eta, -eta]])
        a, b = softmax(logits), softmax(logits + change)
        moved = float(variation(a, b)[0])
        checks.equal(f"TV, eta = {eta:g}", moved, wanted, relative=0, absolute=1e-8)
        bound = float(np.asarray(perturbation.tv_bound(perturbation.logit_eta(change)))[0])
        checks.equal(f"bound, eta = {eta:g}", bound, moved, relative=1e-12)
        kl = float(np.sum(a * np.log(a / b)))
        checks.at_most(f"KL, eta = {eta:g}", kl, float(np.asarray(perturbation.kl_bound(eta))))
        l2 = float(np.linalg.norm(a - b))
        lipschitz = float(perturbation.lipschitz_bound(change)[0])
        checks.at_most(f"2-norm, eta = {eta:g}", l2, lipschitz)
        cells = (moved, bound, kl, float(np.asarray(perturbation.kl_bound(eta))), l2, lipschitz)
        rows.append((number(eta), *map(number, cells)))
    header = ("eta", "total variation", "tanh(eta/2)", "KL", "eta^2/2", "2-norm", "its bound")
    return Table(header, rows)


@CHAPTER.table("clusters")
def clusters(checks: Checks) -> Table:
    """Tabulate means over ten planted clusters: the worst row, its bounds."""
    rows = []
    for noise in (0.02, 0.05, 0.2, 0.5):
        rng = np.random.default_rng(0)
        labels = np.arange(200) % 10
        centres = rng.standard_normal((2, 10, 16))
        q, k = (c[labels] + noise * rng.standard_normal((200, 16)) for c in centres)
        made = [np.array([x[labels == c].mean(axis=0) for c in range(10)]) for x in (q, k)]
        a, ahat = softmax(q @ k.T / 4), softmax(made[0][labels] @ made[1][labels].T / 4)
        found = variation(a, ahat)
        eta = perturbation.compression_eta(q, k, made[0][labels], made[1][labels])
        before = perturbation.cluster_eta_apriori(q, k, (made[0], labels), (made[1], labels))
        bounds = [np.asarray(perturbation.tv_bound(x)) for x in (eta, before)]
        checks.at_most(f"eta, noise {noise:g}", float((eta / before).max()), 1.0)
        for x in bounds:
            checks.at_most(f"variation, noise {noise:g}", float((found / x).max()), 1.0)
        trivial = variation(a, np.full_like(a, 1 / 200))
        cells = (float(x.max()) for x in (found, *bounds, trivial))
        rows.append((number(noise), *map(number, cells)))
    header = ("noise", "worst row", "tanh(eta/2)", "before any logit", "mean of V")
    return Table(header, rows)


@CHAPTER.table("rounding")
def rounding(checks: Checks) -> Table:
    """Tabulate the mean total variation of rows after rounding Q and K, four bundled heads."""
    rows = []
    for problem in heads()[::3]:
        a, cells = problem.exact.to_dense(), []
        for dtype, per in (("bfloat16", "tensor"), ("int8", "tensor"), ("int8", "row")):
            small = [perturbation.quantize(x, dtype, per=per) for x in (problem.q, problem.k)]
            ahat = softmax(problem.scale * small[0] @ small[1].T)
            found = variation(a, ahat)
            eta = perturbation.quantization_eta(
                problem.q, problem.k, dtype, scale=problem.scale, per=per
            )
            bound = np.asarray(perturbation.tv_bound(eta))
            checks.at_most(f"{problem.name}, {dtype}, {per}", float((found / bound).max()), 1.0)
            cells += [float(found.mean()), float(bound.mean())]
        cells.append(float(variation(a, np.full_like(a, 1 / problem.n_k)).mean()))
        rows.append((str(problem.name), *map(number, cells)))
    header = (
        "head",
        "bfloat16",
        "bound, bfloat16",
        "int8",
        "bound, int8",
        "int8 by rows",
        "bound, int8 by rows",
        "mean of V",
    )
    return Table(header, rows)


# --- widths ---------------------------------------------------------------------------------------


@CHAPTER.table("lemma")
def lemma(checks: Checks) -> Table:
    """Tabulate the width that projections need to keep all logits, delta = 0.1."""
    known = {512: (7185, 1380, 518), 4096: (9034, 1735, 651)}
    rows = []
    for n, wanted in known.items():
        found = np.asarray(dba.jl_logit_width(n, n, [0.1, 0.25, 0.5], 0.1))
        for x, want in zip(found.tolist(), wanted, strict=True):
            checks.equal(f"width, n = {n}", x, want, relative=0)
        rows.append((str(n), *map(str, found.tolist())))
    return Table(("n", "eps = 0.1", "eps = 0.25", "eps = 0.5"), rows)


@CHAPTER.table("curve")
def curve(checks: Checks) -> Table:
    """Tabulate relative matrix errors on one head against width of logits and rank of products."""
    problem = heads()[HEAD]
    a = problem.exact.to_dense()
    sigma = values_of(a)
    centred = problem.k - problem.k.mean(axis=0)
    logits = values_of(problem.q @ centred.T)
    trivial = off(np.full_like(a, 1 / problem.n_k), a)
    rows = []
    for r in (2, 4, 8, 12, 16, 20, 24, 28):
        cells = [floor(sigma, r)]
        for kind in ("svd", "pca_k", "gaussian"):
            method = sa.Compressed(r, kind=kind)
            cells.append(off(method.approximate(problem, rng=0).to_dense(), a))
        for preset in ("clustered", "dba_means"):
            ahat = sa.DBA(r, preset=preset).approximate(problem, rng=0).to_dense()
            cells.append(off(ahat, a))
            checks.at_most(f"floor of {preset}, r = {r}", cells[0], cells[-1])
        small = compress(problem.q, problem.k, r)
        left = problem.q @ centred.T - small[0] @ (small[1] - small[1].mean(axis=0)).T
        checks.equal(f"logits, r = {r}", values_of(left)[0], logits[r], relative=1e-8)
        rows.append((str(r), *map(number, (*cells, trivial))))
    header = (
        "r",
        "floor of rank r",
        "logits svd",
        "logits pca_k",
        "logits gaussian",
        "clustered",
        "dba_means",
        "mean of V",
    )
    return Table(header, rows)


@CHAPTER.table("enumeration")
def enumeration(checks: Checks) -> Table:
    """Tabulate volume sampling and skeletons of a 7 x 7 matrix exp(L), all subsets."""
    matrix = np.exp(np.random.default_rng(0).standard_normal((7, 7)))
    sigma = values_of(matrix)
    rows = []
    for k in (1, 2, 3):
        found = dba.volume_sampling(matrix, k)
        mean = float(found.law @ found.errors)
        checks.equal(f"mean, k = {k}", mean, found.mean, relative=1e-9)
        checks.at_most(f"bound, k = {k}", mean, found.bound)
        i, j = dba.largest_volume(matrix, k)
        left = float(np.abs(dba.skeleton_residual(matrix, i, j)).max())
        checks.at_most(f"skeleton, k = {k}", left, (k + 1) * float(sigma[k]))
        cells = (mean, found.bound, float(found.errors.min()), left, (k + 1) * float(sigma[k]))
        rows.append((str(k), *map(number, cells)))
    header = (
        "k",
        "volume sampling, mean",
        "(k + 1) tail",
        "best columns",
        "skeleton, largest entry",
        "(k + 1) sigma",
    )
    return Table(header, rows)


@CHAPTER.figure
def figure(tables: Mapping[str, Table]) -> Figure:
    """Draw matrix errors against the rank of products and the width of logits."""
    lines = (
        ("mean of V", ":", "0.3"),
        ("logits gaussian", "s-", "#E69F00"),
        ("dba_means", "o-", "#CC79A7"),
        ("clustered", "o-", "#56B4E9"),
        ("floor of rank r", "-", "black"),
        ("logits pca_k", "D-", "#009E73"),
        ("logits svd", "D-", "#0072B2"),
    )
    drawn, axes = curves(
        tables["curve"],
        "r",
        lines,
        xlabel="r: rank of a product U S P, or width of the logits",
        ylabel="error of the matrix over |A|",
    )
    axes.set_yscale("log")
    return drawn


if __name__ == "__main__":
    sys.exit(CHAPTER.main())
