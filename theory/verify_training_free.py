"""Check the statements of training_free.md, and write its tables and its figure."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from _chapter import Chapter, Checks, Factory, Table, curves, heads, number
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn import theory
from sketchattn.operators.merging import merge_shares
from sketchattn.theory.engine.decisions import clopper_pearson
from sketchattn.theory.training_free import (
    denominator_bound,
    sampled,
    sampled_claims,
    signed_sum,
    trace_bound,
    trace_share,
)
from sketchattn.theory.training_free.blocks import (
    alpha_kappa,
    mixed_law,
    normalizer_variance,
    product_error,
    published_samples,
)
from sketchattn.theory.training_free.wildcat import keys_of, projected, queries_of
from sketchattn.zoo.sorted_blocks.layout import gray_positions, sort_blocks, weighted_sample
from sketchattn.zoo.sorted_blocks.published import approximate_normalizers, value_shares
from sketchattn.zoo.vattention import clt_budget
from sketchattn.zoo.wildcat import Coreset

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[Any]
CHAPTER = Chapter(__file__)

# --- broken implementations: a weighted coreset ---------------------------------------------------


def wildcat(kind: str, r: int, rng: Any, problem: sa.AttentionProblem, pivots: Any = None) -> Any:
    """Return what the library makes: pivots, W, or Ahat."""
    if kind == "pivots":
        return sa.WildCat(r).draw(problem, rng)["pivots"]
    if kind == "weights":
        return Coreset.of(keys_of(problem), pivots).weights()
    return sa.WildCat(r).approximate(problem, draw={"pivots": pivots}).to_dense()


def not_divided(kind: str, r: int, n: int, rng: Any, **given: Any) -> Any:
    """Divide by the sum of the pivots' weights, as if W 1 were one."""
    if kind != "wildcat":
        return wildcat(kind, r, rng, **given)
    problem, pivots = given["problem"], given["pivots"]
    left = np.exp(problem.scale * (problem.q @ problem.k[pivots].T))
    return left / left.sum(axis=1, keepdims=True) @ wildcat("weights", r, rng, **given)


def too_few(kind: str, r: int, n: int, rng: Any, **given: Any) -> Any:
    """Leave out one distinct key."""
    found = wildcat(kind, r, rng, **given)
    return found[:7] if kind == "pivots" else found


def without_norms(kind: str, r: int, n: int, rng: Any, **given: Any) -> Any:
    """Take the Gaussian kernel for the exponential one."""
    found = wildcat(kind, r, rng, **given)
    half = keys_of(given["problem"]).half
    return found * np.exp(half[given["pivots"]][:, None] - half) if kind == "weights" else found


def uniform_pivots(kind: str, r: int, n: int, rng: Any, **given: Any) -> Any:
    """Draw pivots uniformly."""
    return rng.permutation(n)[:r] if kind == "pivots" else wildcat(kind, r, rng, **given)


CORESET_CONTROLS: dict[str, Factory | None] = {
    "training_free.wildcat_row_sums": not_divided,
    "training_free.wildcat_exact": too_few,
    "training_free.wildcat_certificate": without_norms,
    "training_free.wildcat_trace": uniform_pivots,
    "training_free.wildcat_rate": None,
}

CHAPTER.verdicts(
    "coreset",
    [
        ("training_free.wildcat_row_sums", "wildcat-golden"),
        ("training_free.wildcat_row_sums", "clusters"),
        ("training_free.wildcat_exact", "wildcat-golden"),
        ("training_free.wildcat_certificate", "wildcat-golden"),
        ("training_free.wildcat_certificate", "large-keys"),
        ("training_free.wildcat_trace", "large-keys"),
        ("training_free.wildcat_trace", "clusters"),
        ("training_free.wildcat_rate", "wildcat-golden"),
    ],
    controls=CORESET_CONTROLS,
)

# --- how near ------------------------------------------------------------------------------------


@CHAPTER.table("certificate")
def certificate(checks: Checks) -> Table:
    """Tabulate errors of single weights of bundled heads, and what bounds them."""
    rows = []
    for problem in heads(2):
        wide = problem.astype(np.float64)
        keys = keys_of(wide)
        x = queries_of(wide, keys)
        half = 0.5 * np.einsum("ij,ij->i", x, x)
        pivots = sa.WildCat(64).draw(wide, 0)["pivots"]
        # Everything in units of e^{|x_i|^2/2 + h_j}.
        truth = np.exp(np.minimum(x @ keys.z.T - half[:, None] - keys.half, 0.0))
        weights = Coreset.of(keys, pivots).weights()
        made = truth[:, pivots] @ (weights * np.exp(keys.half[pivots][:, None] - keys.half))
        error = np.abs(truth - made)
        left, ahead = (projected(keys, y, pivots)[1] for y in (keys.z, x))
        bound = np.sqrt(np.outer(ahead + 1e-11, left + 1e-11))
        checks.at_most(f"{problem.name}, error over bound", float((error / bound).max()), 1.0)
        rest = np.setdiff1d(np.arange(wide.n_k), pivots)
        share = float(np.median((error / truth)[:, rest]))
        loose = float(np.median((bound / np.maximum(error, 1e-300))[:, rest]))
        # The norm of what is left of a key, by another factorisation.
        again = Coreset.of(keys, pivots).residuals()
        median = float(np.sqrt(np.median(left[rest])))
        checks.equal(
            f"{problem.name}, residual", median, float(np.sqrt(np.median(again[rest]))),
            relative=1e-6,
        )  # fmt: skip
        far = float(np.median(half + keys.half.mean() - (x @ keys.z.T).max(axis=1)))
        cells = (share, median, loose, far)
        rows.append((str(problem.name), *(number(c) for c in cells)))
    header = (
        "head",
        "relative error of e^L",
        "sqrt(res) of a key",
        "bound over error",
        "distance of a query, squared, halved",
    )
    return Table(header, rows)


@CHAPTER.table("trace")
def trace(checks: Checks) -> Table:
    """Tabulate the share of the trace that 64 pivots leave on bundled heads."""
    rows = []
    page = {0: (0.340, 0.619), 5: (0.286, 0.522), 8: (0.322, 0.558)}
    for h, problem in enumerate(heads()):
        keys = keys_of(problem.astype(np.float64))
        kernel = np.exp(keys.z @ keys.z.T - 2 * keys.half.max())
        eigenvalues = np.maximum(np.linalg.eigvalsh(kernel), 0.0)
        bound = trace_bound(eigenvalues, 64)
        best = float(np.sort(eigenvalues)[:-64].sum() / eigenvalues.sum())
        drawn = [
            trace_share(keys, sa.WildCat(64).draw(problem, seed)["pivots"]) for seed in range(20)
        ]
        even = [
            trace_share(keys, np.random.default_rng(seed).permutation(problem.n_k)[:64])
            for seed in range(20)
        ]
        mean = float(np.mean(drawn))
        checks.at_most(f"{problem.name}, mean", mean, bound)
        checks.at_most(f"{problem.name}, best", best, mean)
        if h in page:
            checks.equal(f"{problem.name}, share", mean, page[h][0], relative=0, absolute=0.01)
            checks.equal(f"{problem.name}, bound", bound, page[h][1], relative=0, absolute=6e-3)
        cells = best, mean, float(np.mean(even)), bound, bound / mean
        rows.append((str(problem.name), *(number(x) for x in cells)))
    header = ("head", "best rank 64", "drawn, mean of 20", "uniform pivots", "bound", "slack")
    return Table(header, rows)


VARIANTS: dict[str, dict[str, Any]] = {
    "WildCat": {},
    "qmax = max abs(q)": {"qmax": "data"},
    "tau by Lambert": {"tau": "lambert"},
    "pivots by res alone": {"pivots": "plain"},
    "uniform pivots": {"pivots": "uniform"},
    "tau = 1": {"tau": 1.0},
    "Nystroem": {"preset": "sklearn_nystroem"},
}


@CHAPTER.table("variants")
def variants(checks: Checks) -> Table:
    """Tabulate errors of the output on bundled heads, and rows without a denominator."""
    rows, first = [], dict[int, float]()
    for name, options in VARIANTS.items():
        cells, small = [], 0
        for r in (32, 64, 128):
            found = []
            for problem in heads():
                size = float(np.linalg.norm(problem.output))
                for seed in range(3):
                    method = sa.WildCat(r, **options)
                    out = method.attend(problem, seed)
                    found.append(float(np.linalg.norm(out - problem.output)) / size)
                if r == 64:
                    small += method.details(problem, 2).small
            cells.append(float(np.median(found)))
            first.setdefault(r, cells[-1])
            if name in ("uniform pivots", "tau = 1", "Nystroem"):
                checks.at_most(f"WildCat against {name}, r = {r}", first[r], cells[-1])
        rows.append((name, *(number(x) for x in cells), str(small)))
    checks.equal("WildCat, r = 64", first[64], 0.351, relative=0, absolute=0.02)
    return Table(("form", "r = 32", "r = 64", "r = 128", "small denominators, r = 64"), rows)


# --- broken implementations: blocks beside a sample -----------------------------------------------


def counted_twice(kind: str, r: int, n: int, rng: Any, **given: Any) -> Any:
    """Count drawn keys of the own block again, as released codes do."""
    problem, p = given["problem"], given["p"]
    counts = np.bincount(rng.choice(n, r, p=p / p.sum()), minlength=n) / (r * p)
    own = given["query_blocks"][:, None] == given["key_blocks"]
    weights = np.exp(problem.scale * problem.q @ problem.k.T) * (own + counts)
    total = weights.sum(axis=1, keepdims=True)
    return np.hstack([weights @ problem.values / total, np.log(total)])


def fewer_draws(kind: str, r: int, n: int, rng: Any, **given: Any) -> Any:
    """Draw half of the keys, and count none twice."""
    problem, p, s = given["problem"], given["p"], r // 2
    counts = np.bincount(rng.choice(n, s, p=p / p.sum()), minlength=n) / (s * p)
    own = given["query_blocks"][:, None] == given["key_blocks"]
    weights = np.exp(problem.scale * problem.q @ problem.k.T) * np.where(own, 1.0, counts)
    total = weights.sum(axis=1, keepdims=True)
    return np.hstack([weights @ problem.values / total, np.log(total)])


def blocks_alone(kind: str, r: int, n: int, rng: Any, **given: Any) -> Any:
    """Forget the keys off the block."""
    problem = given["problem"]
    own = given["query_blocks"][:, None] == given["key_blocks"]
    weights = np.exp(problem.scale * problem.q @ problem.k.T)
    return np.log(np.where(own, weights, 0.0).sum(axis=1))


def uniform_keys(kind: str, r: int, n: int, rng: Any, **given: Any) -> Any:
    """Draw uniformly what is weighted by another law."""
    a, v = given["a"], given["v"]
    p = mixed_law(a, v)
    drawn = rng.integers(0, n, r)
    return (a[:, drawn] / (r * p[drawn])) @ v[drawn]


def one_key(kind: str, r: int, n: int, rng: Any, **given: Any) -> Any:
    """Draw one key."""
    a, v = given["a"], given["v"]
    p = mixed_law(a, v)
    drawn = rng.choice(n, 1, p=p)
    return (a[:, drawn] / p[drawn]) @ v[drawn]


BLOCK_CONTROLS: dict[str, Factory | None] = {
    "training_free.block_sample_unbiased": counted_twice,
    "training_free.block_sample_variance": fewer_draws,
    "training_free.approximate_normalizer": blocks_alone,
    "training_free.mixed_expected_error": uniform_keys,
    "training_free.mixed_bernstein": one_key,
}

CHAPTER.verdicts(
    "blocks",
    [
        ("training_free.block_sample_unbiased", "block-sample"),
        ("training_free.block_sample_unbiased", "reference"),
        ("training_free.block_sample_variance", "block-sample"),
        ("training_free.block_sample_variance", "reference"),
        ("training_free.alpha_kappa", "nearly-flat"),
        ("training_free.alpha_kappa", "block-sample"),
        ("training_free.approximate_normalizer", "nearly-flat"),
        ("training_free.mixed_expected_error", "half-read"),
        ("training_free.mixed_bernstein", "half-read"),
        ("training_free.value_norms_best", "block-sample"),
    ],
    controls=BLOCK_CONTROLS,
)

# --- Gray order -----------------------------------------------------------------------------------


@CHAPTER.table("gray")
def gray(checks: Checks) -> Table:
    """Tabulate in how many bits the codes at neighbouring positions differ."""
    rows = []
    known = {("forward", 7): (1.307, 4, 0.244), ("forward", 10): (1.328, 5, 0.249)}
    for order in ("inverse", "forward"):
        for planes in (3, 7, 10):
            place = np.argsort(gray_positions(np.arange(2**planes), order))
            found = np.array([int(x).bit_count() for x in place[1:] ^ place[:-1]])
            cells = float(found.mean()), int(found.max()), float(np.mean(found > 1))
            wanted = (1.0, 1, 0.0) if order == "inverse" else known.get((order, planes), cells)
            for name, one, other in zip(("mean", "most", "share"), cells, wanted, strict=True):
                what = f"{order}, P = {planes}, {name}"
                checks.equal(what, one, other, relative=0, absolute=6e-4)
            rows.append((order, str(planes), *(number(float(x)) for x in cells)))
    return Table(("order", "P", "mean distance", "largest", "share above one"), rows)


# --- mass, assumptions ----------------------------------------------------------------------------


def blocks_of(problem: sa.AttentionProblem, seed: int, align: str, order: str = "inverse") -> Any:
    """Return blocks of 32 keys."""
    planes = np.random.default_rng(seed).standard_normal((problem.d, 7))
    return sort_blocks(problem.q, problem.k, planes, 32, order=order, align=align)


@CHAPTER.table("mass")
def mass(checks: Checks) -> Table:
    """Tabulate the mass of A on the own block of 32 of 512 keys, means of four hashes."""
    rows = []
    for problem in heads():
        a = problem.exact.to_dense()
        cells = []
        for order, align in (("forward", "rank"), ("inverse", "rank"), ("inverse", "code")):
            found = [blocks_of(problem, seed, align, order) for seed in range(4)]
            on = [(a * (x.queries[:, None] == x.keys)).sum(axis=1).mean() for x in found]
            cells.append(float(np.mean(on)))
        off = [
            np.where(x.queries[:, None] == x.keys, 0.0, a).sum(axis=1).mean()
            for x in (blocks_of(problem, seed, "code") for seed in range(4))
        ]
        checks.equal(f"{problem.name}, mass", cells[-1] + float(np.mean(off)), 1.0, relative=1e-9)
        rows.append((str(problem.name), *(number(x, 2) for x in (*cells, 1 / 16))))
    return Table(("head", "rank, forward", "rank", "code", "by chance"), rows)


@CHAPTER.table("assumptions")
def assumptions(checks: Checks) -> Table:
    """Tabulate alpha, kappa without and with blocks, and the rows that the theorem asks for."""
    rows = []
    for problem in heads():
        found, blocks = alpha_kappa(problem), blocks_of(problem, 0, "rank")
        off = alpha_kappa(problem, blocks.queries, blocks.keys)
        a = problem.exact.to_dense()
        norms = float((np.linalg.norm(a, axis=0) ** 2).max()) * problem.n_k
        checks.equal(f"{problem.name}, alpha", found.alpha, norms, relative=1e-9)
        sums = np.exp(problem.logsumexp - problem.logsumexp.min())
        checks.equal(f"{problem.name}, kappa", found.kappa, float(sums.max()), relative=1e-9)
        cells = found.alpha, found.kappa, off.kappa, published_samples(found, problem.n_k, 0.5)
        rows.append((str(problem.name), *(number(x) for x in cells)))
    return Table(("head", "alpha", "kappa", "kappa off blocks", "log10 m"), rows)


# --- errors ---------------------------------------------------------------------------------------


@CHAPTER.table("approxd")
def approxd(checks: Checks) -> Table:
    """Tabulate the published estimate of D on bundled heads, 32 rows and draws, eps = 1/2."""
    rows = []
    for problem in heads(3):
        blocks = blocks_of(problem, 0, "rank")
        rng = np.random.default_rng(1)
        sample = weighted_sample(rng.random(32), None, problem.n_k)
        found = approximate_normalizers(
            problem, blocks, rng.permutation(problem.n_q)[:32], sample, 32
        )
        off = np.abs(np.expm1(found - problem.logsumexp))
        own = blocks.queries[:, None] == blocks.keys
        least = np.log(np.where(own, problem.exact.to_dense(), 0.0).sum(axis=1))
        # D is at least the sum on the block.
        gap = float((least - (found - problem.logsumexp)).max())
        checks.at_most(f"{problem.name}, sums on the block over D", math.exp(gap), 1.0)
        method = sa.HyperAttention(64, preset="paper")
        error = [
            np.linalg.norm(method.attend(problem, rng=seed) - problem.output) for seed in range(3)
        ]
        relative = float(np.median(error) / np.linalg.norm(problem.output))
        rows.append((str(problem.name), number(float(np.median(off)), 2), number(relative, 2)))
    return Table(("head", "median error of D", "error of the output"), rows)


@CHAPTER.table("laws")
def laws(checks: Checks) -> Table:
    """Tabulate exact mean square errors of eight keys on `block-sample`, by their law."""
    seen = theory.instances()["block-sample"]
    known = {
        "value norms": (value_shares(seen.v), 79.4126557829),
        "uniform": (np.full(64, 1 / 64), 56.1138791507),
        "columns and values": (mixed_law(seen.a, seen.v), 44.0197563472),
    }
    rows = []
    for name, (law, wanted) in known.items():
        found = product_error(seen.a, seen.v, law, 8)
        checks.equal(name, found, wanted, relative=1e-9)
        rows.append((name, number(found), number(found / float(np.sum(seen.product**2)))))
    return Table(("law", "mean square error", "over the square of A V"), rows)


@CHAPTER.table("variance")
def variance(checks: Checks) -> Table:
    """Tabulate the relative deviation of D on bundled heads, s = 32 beside blocks of 32."""
    rows = []
    for problem in heads():
        a, blocks = problem.exact.to_dense(), blocks_of(problem, 0, "code")
        outside = blocks.queries[:, None] != blocks.keys
        p = np.full(problem.n_k, 1 / problem.n_k)
        exact = normalizer_variance(a, outside, p, 32)
        rest = np.where(outside, a, 0.0)
        wanted = (problem.n_k * (rest**2).sum(axis=1) - rest.sum(axis=1) ** 2) / 32
        checks.equal(
            f"{problem.name}, variance", float(exact.mean()), float(wanted.mean()), relative=1e-9
        )
        values = 0.5 * value_shares(problem.values) + 0.5 / problem.n_k
        other = normalizer_variance(a, outside, values, 32)
        cells = (float(np.median(np.sqrt(x))) for x in (exact, other))
        rows.append((str(problem.name), *(number(x) for x in cells)))
    return Table(("head", "uniform", "value norms and uniform"), rows)


# --- broken implementations: thinning and the halving tree ---------------------------------------


def tenth_more(kind: str, r: int, n: int, rng: Any, **given: Any) -> Any:
    """Weigh kept keys by a tenth too much."""
    problem = given["problem"]
    if kind == "stream":
        tokens = np.arange(given["block"], n, given["block"])
        return np.stack([1.1 * tokens, np.minimum(tokens, r)])
    draw = sa.Thinformer(r, bucket=2 * n).draw(problem, rng)
    return np.stack([draw["kept"], 1.1 * np.exp(draw["log_weights"])])


def leaf_alone(kind: str, r: int, n: int, rng: Any, **given: Any) -> Any:
    """Attend to the last tokens only."""
    problem = given["problem"]
    out = np.zeros((n, problem.values.shape[1]))
    for start in range(0, n, r):
        q, k, v = (x[start : start + r] for x in problem.arrays)
        out[start : start + r] = sa.AttentionProblem(
            q, k, v, scale=problem.scale, causal=True
        ).output
    return out


THINNING_CONTROLS: dict[str, Factory | None] = {
    "training_free.tree_exact": leaf_alone,
    "training_free.thinning_mass": tenth_more,
    "training_free.thinning_unbiased": tenth_more,
    "training_free.halving_bound": tenth_more,
    "training_free.stream_mass": tenth_more,
}

CHAPTER.verdicts(
    "thinning",
    [
        ("training_free.thinning_mass", "reference"),
        ("training_free.thinning_unbiased", "reference"),
        ("training_free.thinning_unbiased", "clusters"),
        ("training_free.halving_bound", "small-logits"),
        ("training_free.halving_bound", "thinned-keys"),
        ("training_free.tree_exact", "causal-keys"),
        ("training_free.stream_mass", "causal-keys"),
    ],
    controls=THINNING_CONTROLS,
)


@CHAPTER.table("thinning_constants")
def thinning_constants(checks: Checks) -> Table:
    """Tabulate the bound of one halving, keys centred, beside what is observed."""
    rows = []
    chosen = heads()
    for i in (0, 5, 8):
        head = chosen[i]
        q, k, v = head.arrays
        assert v is not None
        problem = sa.AttentionProblem(q, k - k.mean(axis=0), v, scale=head.scale)
        bounds = denominator_bound(problem, 0.05)
        shares = problem.exact.to_dense()
        off = []
        for seed in range(20):
            draw = sa.Thinformer(256, bucket=512).draw(problem, seed)
            off.append(np.abs(shares[:, draw["kept"]] @ np.exp(draw["log_weights"]) - 1))
        ratio = float(np.max(np.max(off, axis=0) / bounds))
        checks.at_most(f"{head.name}, largest share of the bound", ratio, 1.0)
        found = signed_sum(problem)
        rows.append(
            (
                str(head.name),
                number(found.ratio, 3),
                number(float(np.median(bounds)), 3),
                number(float(np.quantile(off, 0.95)), 2),
            )
        )
    return Table(("head", "sigma^2/b_max^2", "median bound", "95 % of abs(Dhat/D - 1)"), rows)


@CHAPTER.table("thinning_pairs")
def thinning_pairs(checks: Checks) -> Table:
    """Tabulate one halving of 512 keys by each rule, and by chance, as rms of Dhat/D - 1."""
    rows = []
    chosen = heads()
    for i in (0, 5, 8):
        problem = chosen[i]
        shares, cells = problem.exact.to_dense(), []
        for rule in ("uniform", "pairs", "simple", "kt"):
            off = []
            for seed in range(20):
                if rule == "uniform":
                    kept = sa.UniformColumns(256).draw(problem, seed)["columns"]
                elif rule == "pairs":
                    bits = np.random.default_rng(seed).integers(0, 2, 256)
                    kept = 2 * np.arange(256) + bits
                else:
                    kept = sa.Thinformer(256, rule=rule, bucket=512).draw(problem, seed)["kept"]
                off.append(2 * shares[:, kept].sum(axis=1) - 1)
            cells.append(float(np.sqrt(np.mean(np.square(off)))))
        # Halvings are no worse than a random key of each pair, up to the noise of 20 draws.
        checks.at_most(f"{problem.name}, simple against pairs", cells[2], 1.25 * cells[1])
        rows.append((str(problem.name), *(number(x, 2) for x in cells)))
    return Table(("head", "uniform", "random pairs", "simple", "kt"), rows)


@CHAPTER.table("thinning_merge")
def thinning_merge(checks: Checks) -> Table:
    """Tabulate mergers of normalisers 0 and l by logaddexp, and as released in float32."""
    rows = []
    for gap in (5.0, 10.0, 15.0, 20.0, 40.0):
        found = float(merge_shares(np.zeros(1), np.array([gap]))[2][0])
        checks.equal(f"ln(1 + e^{gap:g})", found, gap + np.log1p(np.exp(-gap)), relative=1e-14)
        c = 1 / (1 + np.exp(gap))
        released = -np.log(c + float(np.finfo(np.float32).eps))
        rows.append((number(gap), number(found, 5), number(released, 4)))
    return Table(("l", "ln(1 + e^l)", "released"), rows)


# --- broken implementations: keys drawn with known probabilities ----------------------------------


def with_other(**changes: Any) -> Factory:
    """Return the library with parameters that are not those of the claim."""

    def broken(kind: str, r: int, n: int, rng: Any, **given: Any) -> Any:
        return sampled_claims.library(kind, r, n, rng, **{**given, **changes})

    return broken


def fewer_tables(kind: str, r: int, n: int, rng: Any, **given: Any) -> Any:
    """Hash with half of the tables."""
    return sampled_claims.library(kind, r // 2, n, rng, **given)


def too_long(kind: str, r: int, n: int, rng: Any, **given: Any) -> Any:
    """Weigh all keys by a tenth too much."""
    return 1.1 * sampled_claims.library(kind, r, n, rng, **given)


def other_tables(kind: str, r: int, n: int, rng: Any, **given: Any) -> Any:
    """Take one table for two."""
    problem, row = given.pop("problem"), given.pop("row")
    return sampled.magicpig_variance(problem, row, **given, least=3 - r)[1]


def distinct_draws(kind: str, r: int, n: int, rng: Any, **given: Any) -> Any:
    """Draw without replacement."""
    return rng.permutation(n)[:r]


def one_sided(kind: str, r: int, n: int, rng: Any, **given: Any) -> Any:
    """Take the quantile of a one-sided event."""
    size, deviation, total = (given.pop(x) for x in ("size", "deviation", "total"))
    given["delta"] *= 2
    return clt_budget(size, deviation, total, **given)


def longer_ratio(kind: str, r: int, n: int, rng: Any, **given: Any) -> Any:
    """Divide by a tenth too little."""
    return 1.1 * given["numerator"] / given["denominator"][:, None]


SAMPLED_CONTROLS: dict[str, Factory | None] = {
    "training_free.magicpig_unbiased": with_other(floor=0.1),
    "training_free.magicpig_joint": fewer_tables,
    "training_free.magicpig_variance": fewer_tables,
    "training_free.magicpig_floor_bias": with_other(floor=0.0),
    "training_free.magicpig_two_tables": other_tables,
    "training_free.vattention_unbiased": too_long,
    "training_free.vattention_known_coverage": with_other(eps=0.3),
    "training_free.vattention_hoeffding_coverage": with_other(budget="known", eps=1.0),
    "training_free.vattention_merged_mean": distinct_draws,
    "training_free.vattention_budget_order": one_sided,
    "training_free.composition": longer_ratio,
}

CHAPTER.verdicts(
    "sampled",
    [
        ("training_free.magicpig_unbiased", "gaussian-64"),
        ("training_free.magicpig_joint", "gaussian-64"),
        ("training_free.magicpig_variance", "gaussian-64"),
        ("training_free.magicpig_two_tables", "gaussian-64"),
        ("training_free.magicpig_ratio_unbiased", "gaussian-64"),
        ("training_free.magicpig_floor_bias", "gaussian-64"),
        ("training_free.magicpig_floor_unbiased", "gaussian-64"),
        ("training_free.vattention_unbiased", "gaussian-64"),
        ("training_free.composition", "gaussian-64"),
        ("training_free.vattention_budget_order", "gaussian-64"),
        ("training_free.vattention_known_coverage", "gaussian-64"),
        ("training_free.vattention_hoeffding_coverage", "gaussian-64"),
        ("training_free.vattention_pilot_coverage", "gaussian-64"),
        ("training_free.vattention_merged_mean", "gaussian-64"),
        ("training_free.vattention_released_coverage", "gaussian-64"),
    ],
    controls=SAMPLED_CONTROLS,
)


# --- deviations, biases, coverage -----------------------------------------------------------------


@CHAPTER.table("sampled_deviation")
def sampled_deviation(checks: Checks) -> Table:
    """Tabulate exact deviations of the denominator of one row, and those of 4000 draws."""
    whole = theory.instances()["gaussian-64"].problem
    assert whole is not None  # it is made of queries and keys
    problem = sa.AttentionProblem(np.asarray(whole.q)[:1], whole.k, whole.v)
    total = math.exp(problem.logsumexp[0])
    known = {1: (17.1658634105, 12.7092470250), 2: (198.1025551680, None)}
    rows = []
    for least, (want, want_part) in known.items():
        joint = sampled.joint_probability(problem, 0, bits=4, tables=16, least=least)
        made = sampled.magicpig_variance(problem, 0, bits=4, tables=16, least=least)
        exact, part = (math.sqrt(x) * total for x in made)
        checks.equal(f"deviation, t = {least}", exact, want, relative=1e-7)
        if want_part is not None:
            checks.equal(f"part of single keys, t = {least}", part, want_part, relative=1e-7)
        method = sa.MagicPIG(1, bits=4, tables=16, least=least)
        rng = np.random.default_rng(0)
        draws = [method.draw(problem, rng) for _ in range(4000)]
        found = np.array([math.exp(method.attend_with_lse(problem, draw=x)[1][0]) for x in draws])
        smallest = float(joint.diagonal().min())
        cells = (smallest, exact, part, float(found.std()), float(found.mean()))
        rows.append((str(least), *map(number, cells)))
    header = ("t", "smallest u", "sd of Dhat", "of single keys", "sd of 4000 draws", "their mean")
    return Table(header, rows)


@CHAPTER.table("sampled_floor")
def sampled_floor(checks: Checks) -> Table:
    """Tabulate the mean of the released denominator on bundled heads."""
    rows = []
    problems = heads()
    for i in (0, 3, 5, 8, 11):
        mean = sampled.floor_mean(problems[i], bits=10, tables=150)
        checks.at_most(f"E Dhat/D on head {i}", float(mean.max()), 1.0)
        rows.append((str(i), number(float(mean.mean())), number(float(mean.min()))))
    return Table(("head", "mean over rows of E Dhat/D", "least row"), rows)


@CHAPTER.table("sampled_coverage")
def sampled_coverage(checks: Checks) -> Table:
    """Tabulate how often budgets miss eps = .1 where delta = .1 is asked, and what they read."""
    forms: dict[str, dict[str, Any]] = {
        "known": {"budget": "known"},
        "pilot": {"budget": "clt"},
        "Hoeffding": {"budget": "hoeffding-serfling"},
        "released": {"preset": "released"},
    }
    rows = []
    problems = heads()
    for i in (0, 3, 5, 8, 11):
        whole = problems[i]
        problem = sa.AttentionProblem(np.asarray(whole.q)[::4], whole.k, whole.v)
        cells = []
        for name, options in forms.items():
            method = sa.VAttention(52, top=26, **options)
            rng = np.random.default_rng(i)
            off, read = [], []
            for _ in range(4):
                draw = method.draw(problem, rng)
                off.append(
                    np.expm1(method.attend_with_lse(problem, draw=draw)[1] - problem.logsumexp)
                )
                made = method.approximate(problem, draw=draw)
                assert isinstance(made, sa.SparseAttention)  # rows with keys of their own
                read.append(len(made.chosen) / (problem.n_q * problem.n_k))
            errors = np.concatenate(off)
            failures = int((np.abs(errors) > 0.1).sum())
            low, high = clopper_pearson(failures, len(errors), 0.999)
            if name in ("known", "Hoeffding"):
                checks.at_most(f"{name} on head {i}", low, 0.1)
            cells += [number(failures / len(errors)), number(float(np.mean(read)), 2)]
            if name == "released":
                cells += [number(low), number(float(errors.mean()))]
        rows.append((str(i), *cells))
    header = ["head"]
    for name in forms:
        header += [name, f"{name}: read"]
    return Table((*header, "released: at least", "released: bias"), rows)


@CHAPTER.table("sampled_forms")
def sampled_forms(checks: Checks) -> Table:
    """Tabulate relative errors of the output on bundled heads."""
    forms: dict[str, sa.Method] = {
        "MagicPIG, two tables": sa.MagicPIG(64),
        "one table": sa.MagicPIG(64, least=1),
        "one table, lifted": sa.MagicPIG(64, least=1, lift=True),
        "hub": sa.MagicPIG(64, preset="hub"),
        "vAttention, 32 + 32": sa.VAttention(64),
        "uniform keys": sa.UniformColumns(64),
        "mean of V": sa.VMean(),
    }
    known = {"MagicPIG, two tables": (0.30, 0.35), "mean of V": (0.75, 0.85)}
    rows = []
    for name, method in forms.items():
        errors = [
            float(np.linalg.norm(method.attend(x, seed) - x.output) / np.linalg.norm(x.output))
            for x in heads()
            for seed in range(3)
        ]
        median = float(np.median(errors))
        if name in known:
            low, high = known[name]
            checks.equal(name, median, (low + high) / 2, relative=0, absolute=(high - low) / 2)
        rows.append((name, number(median), number(min(errors)), number(max(errors))))
    return Table(("method, 64 keys a row of 512", "median", "least", "largest"), rows)


# --- all of them ----------------------------------------------------------------------------------

METHODS: dict[str, Any] = {
    "WildCat": sa.WildCat,
    "MagicPIG": sa.MagicPIG,
    "HyperAttention": sa.HyperAttention,
    "KDEformer": sa.KDEformer,
    "Thinformer": sa.Thinformer,
    "uniform keys": sa.UniformColumns,
}


@CHAPTER.table("curve")
def curve(checks: Checks) -> Table:
    """Tabulate the relative error of the output against the keys that are read, bundled heads."""
    rows = []
    problems = heads()
    sizes = [float(np.linalg.norm(x.output)) for x in problems]
    mean = [
        float(np.linalg.norm(sa.VMean().attend(x) - x.output)) / size
        for x, size in zip(problems, sizes, strict=True)
    ]
    for r in (16, 32, 64, 128):
        cells = []
        for make in METHODS.values():
            errors = [
                float(np.linalg.norm(make(r).attend(x, 0) - x.output)) / size
                for x, size in zip(problems, sizes, strict=True)
            ]
            cells.append(float(np.median(errors)))
        checks.at_most(f"WildCat against uniform keys, r = {r}", cells[0], cells[-1])
        rows.append((str(r), *map(number, cells), number(float(np.median(mean)))))
    return Table(("r", *METHODS, "mean of V"), rows)


@CHAPTER.figure
def figure(tables: Mapping[str, Table]) -> Figure:
    """Draw the error of the output against the keys that are read."""
    styles = (
        *(("WildCat", "o-", "#0072B2"), ("MagicPIG", "s-", "#009E73")),
        *(("HyperAttention", "D-", "#D55E00"), ("KDEformer", "v-", "#CC79A7")),
        *(("Thinformer", "^-", "#E69F00"), ("uniform keys", "x--", "0.4")),
        ("mean of V", ":", "black"),
    )
    drawn, axes = curves(
        tables["curve"],
        "r",
        styles,
        xlabel="r, keys that a query reads, of 512",
        ylabel="|Ahat V - A V|_F / |A V|_F",
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.legend(fontsize=8)
    return drawn


if __name__ == "__main__":
    sys.exit(CHAPTER.main())
