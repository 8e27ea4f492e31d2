"""Claims: products of sampled columns with weights, and what Proposition 1 covers."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import numpy as np

from ...problem import AttentionProblem
from ...zoo.base import Method
from ...zoo.column_sampling import ColumnSampling
from ...zoo.skeinformer.method import Skeinformer
from ..engine.arguments import Array, log_quotient
from ..engine.assumptions import PRODUCT, ROWS
from ..engine.audited import applied, errors, factors, law_of, sampled
from ..engine.instances import Instance
from ..engine.observers import (
    TAIL_RANKS,
    default_rank,
    few,
    is_default,
    on_heads,
    problem_of,
    square,
)
from ..engine.records import Observations, Series
from ..engine.registry import Context, claim
from ..sketching.moments import amm_expected_sqerr
from .column_bounds import (
    ProductBounds,
    break_even_rank,
    contributions,
    pilot_probabilities,
    product_bounds,
    realised_beta,
    sampled_sqerr,
    sampling_inflation,
)
from .scope import proposition1_scope, structural_facts
from .shared import DERIVED, PAPER, default_pilots, pilot_law_of, pilots_of

DKM = "Drineas, Kannan and Mahoney, SIAM J. Comput. 36 (2006)"
SQUARES = "|A S^T S V - A V|_F^2/(|A|_F^2 |V|_F^2)"
DRAWN = """S^T S = sum over r columns j, drawn independently with replacement by p and weighted by
    1/(r p_j); x_j = |A_:j| |V_j|, T = sum_j x_j:"""

# --- one simulation for all claims about it -----------------------------------------------------

DIRECTIONS = 4


class Sample(NamedTuple):
    """Hold squared errors, and the product along fixed directions, the output's own first."""

    squares: list[float]
    along: list[Array]


def _directions(instance: Instance) -> Array:
    """Return matrices G (1 + DIRECTIONS, m d_v), with ``<G, A V>`` 1 for the first."""

    def compute() -> Array:
        output = instance.product.ravel()
        rng = np.random.default_rng(instance.m)
        others = rng.standard_normal((DIRECTIONS, len(output))) / math.sqrt(len(output))
        size = float(output @ output)
        return np.concatenate([(output / size if size > 0 else output)[None], others])

    return instance.cached("directions", compute)


def _sample(context: Context, r: int, law: str | None = None, *, wor: bool = False) -> Sample:
    """Return one simulation of the product, which all claims on the same draws share.

    Their draws are those of one claim: the bounds are compared on the same errors.
    """
    kind = "sample_wor" if wor else "sample_wr"
    p = None if wor or law is None else _law(context.instance, law)
    key = (zlib.crc32(b"skeinformer.product"), context.key[-1])
    shared = replace(context, key=key, audits={}, fingerprints=[])
    size = context.instance.fro**2

    def simulate() -> tuple[Sample, Context]:
        directions = _directions(context.instance)
        found = Sample([], [])
        for err in _errors(shared, kind, r, p):
            found.squares.append(square(err) / size)
            found.along.append(directions @ err.ravel())
        return found, shared

    name = ("product", kind, law, r, context.trials, context.entropy)
    if is_default(context):
        found, audited = context.instance.cached(name, simulate)
    else:
        found, audited = simulate()
    context.audits.update(audited.audits)
    context.fingerprints.extend(audited.fingerprints)
    return found


def _errors(context: Context, kind: str, r: int, p: Array | None) -> Iterator[Array]:
    """Yield ``A S^T S V - A V``."""
    if p is None:
        yield from errors(context, kind, r)
        return
    m = context.instance.m
    for image in sampled(context, kind, r, factors(context.instance), p):
        yield image[:, :m].T @ image[:, m:] - context.instance.product


def _law(instance: Instance, name: str) -> Array:
    """Return a law of the sampling package; a pilot law of fixed rows; or one with zeros."""
    if name == "pilot":
        rows = np.random.default_rng(0).integers(0, instance.m, default_pilots(instance))
        # Half of the draws are uniform: no column that contributes is left out.
        pilot = pilot_probabilities(instance.a, instance.v, rows)
        return 0.5 * pilot + 0.5 / instance.n
    if name == "support":
        p = law_of(instance, "optimal").copy()
        p[::3] = 0
        total = float(p.sum())
        return np.asarray(p / total) if total > 0 else p
    return law_of(instance, name)


# --- the exact error -----------------------------------------------------------------------------

EXACT = {"clusters": "holds", "reference": "holds", "worked": "holds"}


def _register_error(name: str, law: str, words: str, heads: bool) -> None:
    @claim(
        f"skeinformer.expected_error_{name}",
        title=f"The exact expected error, {words}",
        statement=f"""{DRAWN} E|A S^T S V - A V|_F^2 = (1/r)(sum_j x_j^2/p_j - |A V|_F^2); where
            p_j = 0 for columns that contribute, the same over the others plus their squared
            share of the product.""",
        source=f"{DKM}, Lemmas 3 and 4; with zeros derived",
        status="derived" if law in ("pilot", "support") else "published",
        kind="equality",
        observes=f"{SQUARES}, mean over draws by {words}",
        assumptions=PRODUCT,
        recorded={**EXACT, **({"heads": "holds"} if heads else {})},
        ladder=TAIL_RANKS,
    )
    def observe(context: Context, *, rank: int | None = None) -> Observations:
        instance = context.instance
        r = default_rank(context, rank, most=256)
        p = _law(instance, law)
        context.require(bool(p.any()), "needs a column that contributes")
        found = _sample(context, r, law)
        theory = sampled_sqerr(instance.a, instance.v, p, r) / instance.fro**2
        need = break_even_rank(instance.a, instance.v)
        note = f"draws by the optimal law beat the mean of V from r = {need:.4g} on"
        return Observations(found.squares, theory, rank=r, rounding=1e-13, notes=note)


_register_error("exact", "optimal", "the optimal law p_j = x_j/T", True)
_register_error("uniform", "uniform", "the uniform law", False)
_register_error("value", "value_norm", "p_j proportional to |V_j|", False)
_register_error("pilot", "pilot", "half a pilot law, half the uniform one, given the pilots", False)
_register_error("support", "support", "the optimal law without every third column", False)


@claim(
    "skeinformer.expected_error_without",
    title="The exact expected error, uniform without replacement",
    statement="""r distinct columns drawn uniformly of m, weighted by m/r:
        E|A S^T S V - A V|_F^2 = ((m-r)/(m-1)) (1/r) (m sum_j x_j^2 - |A V|_F^2).""",
    source=DERIVED,
    status="derived",
    kind="equality",
    observes=f"{SQUARES}, mean over draws",
    assumptions=PRODUCT,
    recorded=EXACT,
    ladder=TAIL_RANKS,
)
def _expected_error_without(context: Context, *, rank: int | None = None) -> Observations:
    instance = context.instance
    r = default_rank(context, rank, most=256)
    context.require(r <= instance.n, f"r = {r} distinct columns of {instance.n}")
    found = _sample(context, r, wor=True)
    theory = float(amm_expected_sqerr("sample_wor", instance.a, instance.v, r))
    return Observations(found.squares, theory / instance.fro**2, rank=r, rounding=1e-13)


@claim(
    "skeinformer.unbiased",
    title="The product of sampled columns is unbiased",
    statement=f"{DRAWN} E A S^T S V = A V for every p that is positive where x_j > 0.",
    source=f"{DKM}, Lemma 3",
    status="published",
    kind="equality",
    observes="<A S^T S V, A V>/|A V|_F^2, and four fixed random directions; p_j = x_j/T",
    assumptions=PRODUCT,
    recorded={**EXACT, "heads": "holds"},
    ladder=TAIL_RANKS,
)
def _unbiased(context: Context, *, rank: int | None = None) -> Observations:
    instance = context.instance
    context.require(bool(instance.product.any()), "needs a product that is not zero")
    r = default_rank(context, rank, most=256)
    along = np.array(_sample(context, r, "optimal").along).reshape(-1, 1 + DIRECTIONS)
    series = tuple(
        Series(f"error along direction {i}", along[:, i], 0.0) for i in range(1, 1 + DIRECTIONS)
    )
    return Observations(1 + along[:, 0], 1.0, rank=r, series=series, rounding=1e-12)


# --- Proposition 1 --------------------------------------------------------------------------------


Pick = Callable[[ProductBounds], float]


def _law_of_draw(method: Method, problem: AttentionProblem, seed: int) -> Array:
    """Return the law that a covered method draws columns by with a seed."""
    rng = np.random.default_rng(seed)
    if isinstance(method, Skeinformer):
        return method.details(problem, rng).probabilities
    from ...sampling.laws import probabilities

    assert isinstance(method, ColumnSampling)  # the scope covers no other
    # The method draws its law first: the same seed gives the same pilot rows.
    ridge = 1.0 / method.rank if method.ridge is None else method.ridge
    return probabilities(
        method.law, problem, mix=method.mix, pilots=method.pilots, ridge=ridge, rng=rng
    )


def _of_method(context: Context, method: Method, delta: float, pick: Pick) -> Observations:
    """Observe a method where Proposition 1 covers it; otherwise say why it does not."""
    instance, reason = context.instance, proposition1_scope(method)
    lack = ROWS.test(instance)
    context.require(lack is None, f"a method needs a problem; this one {lack}")
    problem = problem_of(instance)
    if reason:
        facts = structural_facts(problem, method, context.entropy)
        context.require(False, f"not covered: {reason}; what holds for one draw: {facts}")
    rank = int(method.get_params()["rank"])
    # Each draw has its bound, whose range costs a product of all columns.
    most = context.trials if instance.m * instance.n <= 10**4 else min(context.trials, 60)
    values, bounds, betas = [], [], []
    for rng in islice(context.generators(), most):
        seed = int(rng.integers(2**63))
        p = _law_of_draw(method, problem, seed)
        out = method.attend(problem, np.random.default_rng(seed))
        found = product_bounds(instance.a, instance.v, p, rank, delta)
        values.append(square(out - instance.product) / instance.fro**2)
        bounds.append(pick(found) / instance.fro**2)
        betas.append(found.beta)
    note = f"beta realised in each draw, smallest {min(betas):.3g}" if betas else ""
    return Observations(
        values,
        bounds if bounds else math.nan,
        delta=delta,
        rank=rank,
        predictor=instance.predictor,
        trivial=(instance.trivial / instance.fro) ** 2,
        rounding=1e-13,
        notes=note,
    )


def _bounds(context: Context, r: int, delta: float) -> ProductBounds:
    instance = context.instance
    name = ("product bounds", r, delta)
    p = _law(instance, "optimal")
    return instance.cached(
        name, lambda: product_bounds(instance.a, instance.v, p, r, delta, beta=1.0)
    )


def _against(
    context: Context, rank: int | None, delta: float, method: Method | None, pick: Pick
) -> Observations:
    if method is not None:
        if rank is not None:
            raise ValueError(f"rank must be None with a method, got {rank}; set that of the method")
        return _of_method(context, method, delta, pick)
    instance = context.instance
    r = default_rank(context, rank, most=256)
    found = _bounds(context, r, delta)
    note = ", ".join(
        f"{name} {value / instance.fro**2:.3g}"
        for name, value in zip(ProductBounds._fields[:5], found, strict=False)
    )
    return Observations(
        _sample(context, r, "optimal").squares,
        pick(found) / instance.fro**2,
        delta=delta,
        rank=r,
        predictor=instance.predictor,
        trivial=(instance.trivial / instance.fro) ** 2,
        rounding=1e-13,
        notes=f"{note}; dkm below |A V|_F^2 from r = {found.informative_rank:.3g} on",
    )


LAW = "here p_j = x_j/T, beta = 1."


@claim(
    "skeinformer.proposition1",
    title="Columns drawn with replacement, Frobenius norm (Proposition 1)",
    statement=f"""{DRAWN} if p_j >= beta x_j/T for all j, with probability at least 1 - delta
        |A V - A S^T S V|_F^2 <= (eta^2/(beta r)) |A|_F^2 |V|_F^2,
        eta = 1 + sqrt((8/beta) ln(1/delta)); {LAW}  Not covered: draws without replacement, other
        weights, estimated normalisers.""",
    source=f"{PAPER}, Proposition 1; {DKM}, Theorem 1",
    status="published",
    kind="tail",
    observes=SQUARES,
    assumptions=PRODUCT,
    recorded={"clusters": "holds", "worked": "vacuous", "reference": "vacuous", "heads": "vacuous"},
    constants={"beta": 1.0, "factor": 8.0},
    ladder=TAIL_RANKS,
)
def _proposition1(
    context: Context,
    *,
    rank: int | None = None,
    delta: float = 0.1,
    method: Method | None = None,
) -> Observations:
    return _against(context, rank, delta, method, lambda b: b.dkm)


def _register_bound(
    name: str, title: str, formula: str, source: str, pick: Pick, recorded: dict[str, str]
) -> None:
    @claim(
        f"skeinformer.{name}",
        title=title,
        statement=f"""{DRAWN} if p_j >= beta x_j/T for all j, with probability at least 1 - delta
            |A V - A S^T S V|_F^2 <= {formula}; {LAW}""",
        source=source,
        status="derived",
        kind="tail",
        observes=SQUARES,
        assumptions=PRODUCT,
        recorded=recorded,
        constants={"beta": 1.0},
        ladder=TAIL_RANKS,
    )
    def observe(
        context: Context,
        *,
        rank: int | None = None,
        delta: float = 0.1,
        method: Method | None = None,
    ) -> Observations:
        return _against(context, rank, delta, method, pick)


NEARLY = {
    "clusters": "holds",
    "worked": "vacuous",
    "reference": "vacuous",
    **on_heads("vacuous", holds="5.4"),
}
LOOSE = {"clusters": "holds", "worked": "vacuous", "reference": "vacuous", "heads": "vacuous"}

_register_bound(
    "dkm_T",
    "Proposition 1 with the norms of columns",
    "(eta^2/(beta r)) T^2, eta = 1 + sqrt((8/beta) ln(1/delta))",
    "derived: T <= |A|_F |V|_F in the proof of Proposition 1",
    lambda b: b.dkm_T,
    LOOSE,
)
_register_bound(
    "mcdiarmid_T",
    "Proposition 1 by McDiarmid",
    "(eta'^2/(beta r)) T^2, eta' = 1 + sqrt((2/beta) ln(1/delta))",
    "derived: McDiarmid's inequality, one column moves the error by at most 2T/(beta r)",
    lambda b: b.mcdiarmid_T,
    LOOSE,
)
_register_bound(
    "mcdiarmid_exact",
    "McDiarmid with the exact mean and the exact range",
    "(sqrt(E1) + D sqrt(ln(1/delta)/(2r)))^2, E1 = (1/r)(sum_j x_j^2/p_j - |A V|_F^2) and "
    "D = max_{j,l} |A_:j V_j/p_j - A_:l V_l/p_l|_F",
    "derived: McDiarmid's inequality",
    lambda b: b.mcdiarmid_exact,
    NEARLY,
)
_register_bound(
    "markov",
    "Markov on the exact expected error",
    "E1/delta, E1 = (1/r)(sum_j x_j^2/p_j - |A V|_F^2)",
    "derived: Markov's inequality",
    lambda b: b.markov,
    NEARLY,
)


# Two ways to the same number agree to this: the distance of two outcomes that are nearly equal has
# half of the digits.
_AGREE = 1e-6


def _disagree(found: Iterable[float], wanted: Iterable[float], nothing: float = 0.0) -> float:
    """Return the largest quotient of numbers that must be equal, 0 where they are.

    What is at most ``nothing`` is rounding.
    """
    pairs = zip(found, wanted, strict=True)
    worst = max((max(x, y) + nothing) / (min(x, y) + nothing) if x != y else 1.0 for x, y in pairs)
    return worst if worst > 1 + _AGREE else 0.0


def _outcomes(instance: Instance, p: Array) -> tuple[Array, Array]:
    """Return the columns that can be drawn, and ``|A_:j V_j/p_j - A V|_F^2`` for each of them.

    From the product alone, without ``x_j = |A_:j| |V_j|``.
    """
    drawn = np.flatnonzero(p > 0)
    squares = np.empty(len(drawn))
    for i, j in enumerate(drawn):
        outcome = np.outer(instance.a[:, j] / p[j], instance.v[j])
        squares[i] = square(outcome - instance.product)
    return drawn, squares


def _written_out(instance: Instance, p: Array, r: int, delta: float) -> list[float]:
    """Return the four forms of Proposition 1 from averages and maxima over outcomes of one draw.

    beta is the largest number with ``p_j >= beta x_j/T``; the range D is the largest distance of
    two outcomes, by the norms and inner products of their factors.
    """
    a, v = instance.a, instance.v
    drawn, squares = _outcomes(instance, p)
    size = np.sqrt(np.einsum("ij,ij->j", a, a) * np.einsum("jk,jk->j", v, v))
    total = math.fsum(size)
    beta = min(1.0, min(p[j] * total / size[j] for j in np.flatnonzero(size > 1e-150 * total)))
    gram = (a.T @ a) * (v @ v.T)
    gram = gram[np.ix_(drawn, drawn)] / np.outer(p[drawn], p[drawn])
    apart = np.add.outer(np.diag(gram), np.diag(gram)) - 2 * gram
    spread = math.sqrt(max(float(apart.max()), 0.0))
    mean = math.fsum(p[drawn] * squares) / r
    log = math.log(1 / delta)
    sizes = math.fsum((a * a).ravel()) * math.fsum((v * v).ravel())
    azuma = (1 + math.sqrt(8 * log / beta)) ** 2
    mcdiarmid = (1 + math.sqrt(2 * log / beta)) ** 2
    return [
        azuma * sizes / (beta * r),
        azuma * total**2 / (beta * r),
        mcdiarmid * total**2 / (beta * r),
        (math.sqrt(mean) + spread * math.sqrt(log / (2 * r))) ** 2,
    ]


@claim(
    "skeinformer.bound_order",
    title="Each form of Proposition 1 is tighter than the one before",
    statement="""dkm >= dkm_T >= mcdiarmid_T >= mcdiarmid_exact for every law p and its realised
        beta, at every r and delta.""",
    source="derived: T <= |A|_F |V|_F, sqrt(E1) <= T/sqrt(beta r), D <= 2T/beta",
    status="derived",
    kind="inequality",
    observes=(
        "the largest quotient of neighbours, r and delta at random, half a pilot law; of each form "
        "and what all outcomes of a draw give, where these differ"
    ),
    assumptions=PRODUCT,
    recorded={**EXACT, "heads": "holds"},
)
def _bound_order(context: Context) -> Observations:
    instance = context.instance
    values = []
    for rng in few(context):
        rows = pilots_of(context, default_pilots(instance), rng)
        p = 0.5 * pilot_law_of(context, rows, rng) + 0.5 / instance.n
        r, delta = int(rng.integers(1, instance.n + 1)), float(rng.uniform(0.01, 0.9))
        chain = product_bounds(instance.a, instance.v, p, r, delta)[:4]
        most = max(b / a if a > 0 else 0.0 for a, b in zip(chain, chain[1:], strict=False))
        wanted = _written_out(instance, p, r, delta)
        values.append(max(most, _disagree(chain, wanted, 1e-9 * wanted[1])))
    return Observations(values, 1.0, rounding=1e-9)


@claim(
    "skeinformer.proposition1_pilot",
    title="Proposition 1 with a pilot law and its realised beta",
    statement=f"""{DRAWN} given the pilot rows, with probability at least 1 - delta
        |A V - A S^T S V|_F^2 <= (eta^2/(beta r)) |A|_F^2 |V|_F^2, for the beta that the pilot law
        turns out to have; a share of p is uniform, so that beta > 0.""",
    source=f"{PAPER}, Proposition 1 given the pilots; the realised beta derived",
    status="derived",
    kind="tail",
    observes=SQUARES,
    assumptions=PRODUCT,
    recorded={"clusters": "holds", "worked": "vacuous", "reference": "vacuous"},
    ladder=TAIL_RANKS,
)
def _proposition1_pilot(
    context: Context,
    *,
    rank: int | None = None,
    delta: float = 0.1,
    pilots: int = 256,
    mix: float = 0.1,
) -> Observations:
    instance = context.instance
    a, v, m = instance.a, instance.v, instance.m
    r = default_rank(context, rank, most=256)
    sizes, wide = instance.fro**2, factors(instance)
    values, bounds = [], []
    for rng in context.generators():
        rows = pilots_of(context, pilots, rng)
        p = (1 - mix) * pilot_law_of(context, rows, rng) + mix / instance.n
        beta = realised_beta(p, a, v)
        drawn = context.operator("sample_wr", r, instance.n, rng, p=p)
        mark = np.sqrt(p)[:, None]
        image = applied(drawn, np.concatenate([wide, mark], axis=1))
        context.audit("sum_j w_j p_j", float(image[:, -1] @ image[:, -1]), 1.0)
        values.append(square(image[:, :m].T @ image[:, m:-1] - instance.product) / sizes)
        eta = 1 + math.sqrt(8 / beta * float(log_quotient(1, delta)))
        bounds.append(eta**2 / (beta * r))
    trivial = (instance.trivial / instance.fro) ** 2
    return Observations(
        values,
        bounds if bounds else math.nan,
        delta=delta,
        rank=r,
        predictor=instance.predictor,
        trivial=trivial,
    )


# --- the law that pilot rows give -----------------------------------------------------------------


@claim(
    "skeinformer.pilot_law",
    title="The law that pilot rows give",
    statement="""p_j = (sum_{i in I} A_ij^2)^(1/2) |V_j| over its sum, repeats in I counted; with
        I all rows it is the optimal law.""",
    source=f"{PAPER}, equation (5)",
    status="published",
    kind="inequality",
    observes="max_j |p_j - formula|, for random I and for all rows, which must be zero",
    assumptions=PRODUCT,
    recorded={**EXACT, "heads": "holds"},
)
def _pilot_law_formula(context: Context) -> Observations:
    instance = context.instance
    values = []
    everything = np.arange(instance.m)
    count = max(8, default_pilots(instance))
    for i, rng in enumerate(few(context)):
        rows = everything if i == 0 else pilots_of(context, count, rng)
        want = pilot_probabilities(instance.a, instance.v, rows)
        values.append(float(np.abs(pilot_law_of(context, rows, rng) - want).max()))
        if i == 0:
            x = contributions(instance.a, instance.v)
            values.append(float(np.abs(want - x / x.sum()).max()) if x.any() else 0.0)
    return Observations(values, 0.0, rounding=1e-12)


@claim(
    "skeinformer.inflation",
    title="What a law costs lies between one and its worst column",
    statement="""p* = x/T: 1 <= sum_j p*_j^2/p_j = 1 + chi^2(p*|p) <= 1/beta with
        beta = min_j p_j/p*_j <= 1.  The expected error of p is T^2 times this less |A V|_F^2,
        over r.""",
    source="derived: Cauchy-Schwarz, and p*_j/p_j <= 1/beta in the sum",
    status="derived",
    kind="inequality",
    observes=(
        "the largest of beta, beta times the sum, and one over the sum, p a pilot law; of the sum "
        "and the mean over all outcomes of a draw, where these differ"
    ),
    assumptions=PRODUCT,
    recorded={**EXACT, "heads": "holds"},
)
def _inflation(context: Context, *, pilots: int | None = None) -> Observations:
    instance = context.instance
    count = default_pilots(instance) if pilots is None else pilots
    x = contributions(instance.a, instance.v)
    best = x / float(x.sum())
    seen = best > 1e-150
    values, betas = [], []
    for rng in few(context):
        p = pilot_law_of(context, pilots_of(context, count, rng), rng)
        if is_default(context):
            beta = realised_beta(p, instance.a, instance.v)
            total = sampling_inflation(p, instance.a, instance.v)
        else:  # a law that is none must not be normalised on the way
            with np.errstate(divide="ignore"):
                beta, total = (
                    float((p / best)[seen].min()),
                    float(np.sum(best[seen] ** 2 / p[seen])),
                )
        betas.append(beta)
        most = max(beta, 0.0 if beta == 0 else beta * total, 1 / total)
        drawn, squares = _outcomes(instance, p)
        if beta > 0 and math.isfinite(total):
            # The mean over outcomes of one draw, with |A V|^2 added, is T^2 times the sum.
            mean = math.fsum(p[drawn] * squares) + square(instance.product)
            wanted = (mean / math.fsum(x) ** 2, min(float((p / best)[seen].min()), 1.0))
            most = max(most, _disagree((total, beta), wanted))
        values.append(most)
    note = f"smallest beta {min(betas):.3g}" if betas else ""
    return Observations(values, 1.0, rank=count, rounding=1e-9, notes=note)
