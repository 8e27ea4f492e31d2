"""Claims: how many pilot rows are enough, as published, refuted and repaired."""

from __future__ import annotations

import math
from itertools import islice

import numpy as np

from ..engine.arguments import Array, log_quotient, real
from ..engine.assumptions import DENSE, PRODUCT, STOCHASTIC
from ..engine.checking import default_factory
from ..engine.instances import instance
from ..engine.observers import implemented
from ..engine.records import Observations
from ..engine.registry import Context, claim
from .column_bounds import (
    coherence_pilots,
    column_coherence,
    column_floor,
    lemma1_pilots,
    realised_beta,
)
from .shared import DERIVED, PAPER, pilot_law_of, pilots_of

BETA = math.sqrt(1 / 3)

# --- instances ---------------------------------------------------------------------------------


@instance("one-reader", "A = I, n = 200, V = 1: a key that one query reads, unseen by other pilots")
def _one_reader() -> tuple[Array, Array]:
    return np.eye(200), np.ones((200, 1))


@instance("two-columns", "rows (.9, .1) and (.1, .9) in turn, 200 x 2: many queries, few keys")
def _two_columns() -> tuple[Array, Array]:
    a = np.where(np.arange(200)[:, None] % 2 == np.arange(2), 0.9, 0.1)
    return a, np.array([[1.0, 0.5], [-1.0, 2.0]])


@instance("diffuse", "logits .05 N(0, 1), 512 x 32: attention that a few pilot rows know well")
def _diffuse() -> tuple[Array, Array]:
    rng = np.random.default_rng(12)
    weights = np.exp(0.05 * rng.standard_normal((512, 32)))
    return weights / weights.sum(axis=1, keepdims=True), rng.standard_normal((32, 4))


# --- claims ------------------------------------------------------------------------------------


def _inverse_betas(context: Context, s: int) -> list[float]:
    """Return 1/beta of a pilot law from s rows, one a trial."""
    found = []
    # 60 trials without a failure certify the delta of 0.1; more are dear on large matrices.
    most = context.trials if context.instance.m * context.instance.n <= 10**5 else 60
    for rng in islice(context.generators(), most):
        p = pilot_law_of(context, pilots_of(context, s, rng), rng)
        beta = realised_beta(p, context.instance.a, context.instance.v)
        found.append(1 / beta if beta > 0 else math.inf)
    return found


def _enough(context: Context, need: float, delta: float) -> int:
    """Return the number of pilots that is asked for, or end where it is that of the rows."""
    m = context.instance.m
    context.require(math.isfinite(need), "a column is zero: C = 0")
    s = math.ceil(need)
    context.below(s, m, 1 / BETA, delta)
    return s


@claim(
    "skeinformer.lemma1",
    title="How many pilot rows Lemma 1 asks for",
    statement="""If |A_:j|^2/n_q >= C for all columns j, s pilot rows drawn uniformly with
        replacement and s >= (2/C^2) ln(2 n_k/delta), then with probability at least 1 - delta
        p_j >= beta p*_j for all j, with beta = sqrt(1/3) = 0.577.  C is at most 1/n_k, so that s
        is above 2 n_k^2 ln(2 n_k/delta): more than there are rows whenever n_q = n_k.""",
    source=f"{PAPER}, Lemma 1 with the constants of its proof",
    status="published",
    kind="tail",
    observes="1/beta with beta = min_j p_j/p*_j; C is that of A",
    assumptions=PRODUCT,
    recorded={
        "two-columns": "holds",
        "worked": "vacuous",
        "identity": "vacuous",
        "uniform-ones": "vacuous",
        "diffuse": "vacuous",
        "heads": "vacuous",
    },
    constants={"beta": BETA},
)
def _lemma1(context: Context, *, delta: float = 0.1) -> Observations:
    s = _enough(context, lemma1_pilots(context.instance.a, delta), delta)
    return Observations(_inverse_betas(context, s), 1 / BETA, delta=delta, rank=s)


@claim(
    "skeinformer.lemma1_logarithmic",
    title="A logarithmic number of pilot rows",
    statement="""s = factor ln(n/delta) pilot rows give beta = sqrt(1/3) with probability at least
        1 - delta, whatever A is, so that the method costs O(n log n).""",
    source=(
        f"{PAPER}, Lemma 1 with C a constant, and the cost that is concluded from it; refuted: "
        "for A = I with fewer than n pilots some column has p_j = 0, and beta = 0"
    ),
    status="refuted",
    kind="tail",
    observes="1/beta with beta = min_j p_j/p*_j",
    assumptions=PRODUCT,
    recorded={"one-reader": "violated", "reference": "violated", "heads": "violated"},
    ladder=tuple({"factor": f} for f in (1.0, 2.0, 4.0, 8.0)),
)
def _lemma1_logarithmic(
    context: Context, *, factor: float = 2.0, delta: float = 0.1
) -> Observations:
    real(factor, "factor", 0)
    s = math.ceil(factor * float(log_quotient(context.instance.n, delta)))
    return Observations(_inverse_betas(context, s), 1 / BETA, delta=delta, rank=s)


@claim(
    "skeinformer.column_floor",
    title="The C of Lemma 1 is no constant",
    statement="C = min_j |A_:j|^2/n_q <= |A|_F^2/(n_q n_k) <= 1/n_k for every attention matrix.",
    source="derived: sum_j |A_:j|^2 = |A|_F^2 <= n_q, rows being distributions",
    status="derived",
    kind="inequality",
    observes="the larger of C n_q n_k/|A|_F^2 and |A|_F^2/n_q",
    assumptions=(DENSE, STOCHASTIC),
    recorded={
        "worked": "holds",
        "uniform-ones": "holds",
        "identity": "holds",
        "two-columns": "holds",
        "heads": "holds",
    },
)
def _column_floor(context: Context) -> Observations:
    a = context.instance.a
    if context.factory is not default_factory:
        rng = np.random.default_rng(context.entropy)
        with np.errstate(divide="ignore"):
            a = implemented(context, "softmax", len(a), rng, logits=np.log(a))
    m, n = a.shape
    size = float(np.sum(a * a))
    note = f"C = {column_floor(a):.4g}, 1/n_k = {1 / n:.4g}, mu = {column_coherence(a):.4g}"
    return Observations([column_floor(a) * m * n / size, size / m], 1.0, rounding=1e-11, notes=note)


@claim(
    "skeinformer.coherence",
    title="Enough pilot rows, by the coherence of the columns",
    statement="""mu = max_j n_q max_i A_ij^2/|A_:j|^2: with s >= 12 mu ln(2 n_k/delta) pilot rows,
        drawn uniformly with replacement, with probability at least 1 - delta p_j >= beta p*_j for
        all j, beta = sqrt(1/3).""",
    source=f"{DERIVED}; multiplicative Chernoff for each column, in place of Lemma 1",
    status="derived",
    kind="tail",
    observes="1/beta with beta = min_j p_j/p*_j",
    assumptions=PRODUCT,
    recorded={
        "diffuse": "holds",
        "two-columns": "holds",
        "identity": "vacuous",
        "heads": "vacuous",
    },
    constants={"beta": BETA, "factor": 12.0},
)
def _coherence(context: Context, *, delta: float = 0.1) -> Observations:
    s = _enough(context, coherence_pilots(context.instance.a, delta), delta)
    return Observations(_inverse_betas(context, s), 1 / BETA, delta=delta, rank=s)
