"""Claims: what Skeinformer computes, whatever its draw."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ...base.draws import Draw
from ...problem import AttentionProblem
from ...zoo.skeinformer.method import Skeinformer
from ..engine.arguments import Array
from ..engine.assumptions import DENSE, NOT_CAUSAL, ROWS, VALUES
from ..engine.instances import Instance, instance
from ..engine.observers import (
    RANKS,
    ROUNDING,
    default_rank,
    few,
    implemented,
    is_default,
    largest,
    output_rounding,
    problem_of,
    quotient,
    spectral,
    square,
    weight_rounding,
)
from ..engine.records import Observations
from ..engine.registry import Context, claim
from .shared import DERIVED, default_pilots

ON = (DENSE, VALUES, NOT_CAUSAL, ROWS)
EVERYWHERE = {"clusters": "holds", "reference": "holds", "worked": "holds", "heads": "holds"}


@instance("heavy-keys", "4 of 64 keys hold nearly all weight, 48 queries: sampling finds them")
def _heavy_keys() -> tuple[Array, Array]:
    rng = np.random.default_rng(3)
    logits = np.zeros((48, 64))
    logits[:, :4] = 8 + 2 * rng.standard_normal((48, 4))
    weights = np.exp(logits)
    v = 0.3 * rng.standard_normal((64, 3))
    v[:4] += 3 * rng.standard_normal((4, 3))
    return weights / weights.sum(axis=1, keepdims=True), v


class Case(NamedTuple):
    """Hold one draw: pilot rows I and columns J by the published law."""

    rng: np.random.Generator
    problem: AttentionProblem
    draw: Draw
    rank: int

    @property
    def chosen(self) -> Array:
        """Whether a key is in J, bool (n_k,)."""
        out = np.zeros(self.problem.n_k, bool)
        out[self.draw["columns"]] = True
        return out


def _cases(context: Context, rank: int | None, most: int = 20) -> Iterator[Case]:
    """Yield a few draws."""
    problem = problem_of(context.instance)
    r = default_rank(context, rank)
    context.require(r <= problem.n_k, f"r = {r} columns of {problem.n_k} keys")
    for rng in few(context, most):
        method = Skeinformer(r, pilots=default_pilots(context.instance))
        yield Case(rng, problem, method.draw(problem, rng), r)


def _matrix(context: Context, case: Case, **parameters: Any) -> Array:
    """Return Ahat (n_q, n_k), by the implementation that was handed in if any."""
    given = {"pilots": len(case.draw["pilot_rows"]), **parameters}
    if is_default(context):
        method = Skeinformer(case.rank, **given)
        return method.approximate(case.problem, draw=case.draw).to_dense()
    return implemented(
        context, "skeinformer", case.rank, case.rng, problem=case.problem, draw=case.draw, **given
    )


def _output(context: Context, case: Case, **parameters: Any) -> Array:
    """Return Ohat (n_q, d_v), by the one pass that makes no matrix where there is one."""
    if is_default(context):
        given = {"pilots": len(case.draw["pilot_rows"]), **parameters}
        method = Skeinformer(case.rank, **given)
        return method.attend(case.problem, draw=case.draw)
    out: Array = _matrix(context, case, **parameters) @ case.problem.values
    return out


def _logits(context: Context) -> Array:
    """Return ``scale Q K^T``: weights that are zero in A still have an order in it."""
    problem = problem_of(context.instance)
    return context.instance.cached("logits", lambda: problem.scale * problem.q @ problem.k.T)


def _mean_over(context: Context, kept: Array) -> Array:
    """Return the mean of V over some keys, weighted by each row of A."""
    logits = _logits(context)[:, kept]
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    out: Array = weights @ context.instance.v[kept] / weights.sum(axis=1, keepdims=True)
    return out


def _scale(instance: Instance) -> float:
    """Return the largest value, in which errors of outputs are told."""
    return max(largest(instance.v), 1e-300)


# --- error identities -----------------------------------------------------------------------------


def _register_identity(normalizer: str, statement: str, fills: tuple[str, ...]) -> None:
    @claim(
        f"skeinformer.identity_{normalizer}",
        title=f"The error of a row, normaliser {normalizer!r}",
        statement=f"""Without weights, rows that are no pilots: tau and tauhat the mass of A_i and
            Ahat_i outside J, h and t the means of V in and outside J weighted by A_i, vbar the
            plain mean outside J.  {statement}""",
        source=DERIVED,
        status="derived",
        kind="inequality",
        observes="max_i of the difference of the two sides over max |V|, which must be zero",
        assumptions=ON,
        recorded=EVERYWHERE,
        ladder=RANKS,
    )
    def observe(context: Context, *, rank: int | None = None) -> Observations:
        a, v = context.instance.a, context.instance.v
        values = []
        for i, case in enumerate(_cases(context, rank)):
            kept = case.chosen
            context.require(not kept.all(), "needs a key outside J")
            parameters: dict[str, Any] = {"normalizer": normalizer, "pilot_reuse": False}
            if normalizer == "adaptive":
                parameters["fill"] = fills[i % len(fills)]
            ahat = _matrix(context, case, **parameters)
            inside, outside = (_mean_over(context, x) for x in (kept, ~kept))
            mean = v[~kept].mean(axis=0)
            tau = a[:, ~kept].sum(axis=1)[:, None]
            if normalizer == "exact":
                want = tau * outside
            else:
                given = ahat[:, ~kept].sum(axis=1)[:, None]
                want = (tau - given) * (mean - inside) + tau * (outside - mean)
                if normalizer == "sampled":
                    want = tau * (outside - inside)
            error = context.instance.product - ahat @ v
            values.append(largest(error - want) / _scale(context.instance))
        # Ahat, A, and the two means of V by their weights.
        rounding = 4 * weight_rounding(context.instance)
        return Observations(values, 0.0, rank=default_rank(context, rank), rounding=rounding)


_register_identity(
    "adaptive",
    "With any fill: A_i V - Ohat_i = (tau - tauhat)(vbar - h) + tau (t - vbar).",
    ("geometric", "arithmetic", "oracle"),
)
_register_identity("sampled", "A_i V - Ohat_i = tau (t - h).", ())
_register_identity(
    "exact", "A_i V - Ohat_i = tau t, which depends on the origin of the values.", ()
)


@claim(
    "skeinformer.fill_mass",
    title="How much mass a fill puts outside the sample",
    statement="""rho_i the arithmetic over the geometric mean of row i's r sampled entries, m keys:
        tauhat_i = (m-r)/(m - r + r rho_i) for the geometric fill, (m-r)/m for the arithmetic one,
        whatever the row is, and tau_i for the oracle.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="max_i |tauhat_i - formula| over the three fills, which must be zero",
    assumptions=ON,
    recorded=EVERYWHERE,
    ladder=RANKS,
)
def _fill_mass(context: Context, *, rank: int | None = None) -> Observations:
    a = context.instance.a
    values = []
    for case in _cases(context, rank, most=6):
        kept, n, r = case.chosen, case.problem.n_k, len(case.draw["columns"])
        logs = _logits(context)[:, kept]
        top = logs.max(axis=1, keepdims=True)
        # 1/rho_i, which cannot overflow.
        flat = np.exp((logs - top).mean(axis=1)) / np.exp(logs - top).mean(axis=1)
        formulas = {
            "geometric": (n - r) * flat / ((n - r) * flat + r),
            "arithmetic": np.full(len(a), (n - r) / n),
            "oracle": a[:, ~kept].sum(axis=1),
        }
        for fill, want in formulas.items():
            ahat = _matrix(context, case, fill=fill, pilot_reuse=False)
            values.append(largest(ahat[:, ~kept].sum(axis=1) - want))
    rounding = 2 * weight_rounding(context.instance)
    return Observations(values, 0.0, rank=default_rank(context, rank), rounding=rounding)


# --- pilot rows that are put back -----------------------------------------------------------------


@claim(
    "skeinformer.pilot_reuse",
    title="What pilot reuse saves",
    statement="""For one draw, |A V - Ohat|_F^2 with the pilot rows put back is that without less
        sum over distinct i in I of |(A_i - Ahat_i) V|^2: never more.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="the difference of the two sides over |A V|_F^2, which must be zero",
    assumptions=ON,
    recorded=EVERYWHERE,
    ladder=RANKS,
)
def _pilot_reuse(context: Context, *, rank: int | None = None) -> Observations:
    instance = context.instance
    size = max(square(instance.product), 1e-300)
    values, worst = [], 0.0
    for case in _cases(context, rank):
        without, reused = (
            instance.product - _output(context, case, pilot_reuse=x) for x in (False, True)
        )
        saved = square(without[np.unique(case.draw["pilot_rows"])])
        values.append(abs(square(without) - saved - square(reused)) / size)
        worst = max(worst, square(without))
    # Squares of sums of all rows, each row rounded.
    off = 2 * math.sqrt(instance.m) * output_rounding(instance)
    rounding = (2 * math.sqrt(worst) + off) * off / size + ROUNDING * worst / size
    return Observations(values, 0.0, rank=default_rank(context, rank), rounding=rounding)


@claim(
    "skeinformer.pilot_reuse_factor",
    title="What pilot reuse saves on average",
    statement="""Where the s pilot rows are independent of J (every law but the pilot law),
        E|A V - Ohat|_F^2 with pilot reuse is (1 - 1/n_q)^s times that without.""",
    source=DERIVED,
    status="derived",
    kind="equality",
    observes="the quotient of the two for one J drawn uniformly, mean over pilot rows",
    assumptions=ON,
    recorded={"reference": "holds", "clusters": "holds", "heads": "holds"},
)
def _pilot_reuse_factor(
    context: Context, *, rank: int | None = None, pilots: int | None = None
) -> Observations:
    instance, problem = context.instance, problem_of(context.instance)
    r = default_rank(context, rank)
    count = default_pilots(instance) if pilots is None else pilots
    method = Skeinformer(r, law="uniform", pilots=count)
    draw = Draw(columns=method.draw(problem, 0)["columns"])
    if is_default(context):
        plain = Skeinformer(r, law="uniform", pilot_reuse=False)
        out = plain.attend(problem, draw=draw)
    else:
        given = {"law": "uniform", "pilot_reuse": False, "problem": problem, "draw": draw}
        rng = np.random.default_rng(context.entropy)
        out = implemented(context, "skeinformer", r, rng, **given) @ problem.values
    squares = np.sum((instance.product - out) ** 2, axis=1)
    total = float(squares.sum())
    context.require(total > 0, "needs an error that is not zero")
    values = []
    for rng in context.generators():
        if is_default(context):
            drawn = method.draw(problem, rng)["pilot_rows"]
        else:
            made = context.operator("pilot_rows", count, instance.m, rng)
            drawn = np.asarray(made, np.int64)
        values.append(1 - float(squares[np.unique(drawn)].sum()) / total)
    return Observations(values, (1 - 1 / instance.m) ** count, rank=r, rounding=1e-12)


# --- convexity and symmetries ---------------------------------------------------------------------


@claim(
    "skeinformer.stochastic",
    title="Rows of Ahat are distributions",
    statement="""With adaptive or sampled normalisers, any fill and any law: Ahat >= 0,
        Ahat 1 = 1.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="the larger of max_i |sum_j Ahat_ij - 1| and -min_ij Ahat_ij, which must be zero",
    assumptions=ON,
    recorded=EVERYWHERE,
    ladder=RANKS,
)
def _stochastic(context: Context, *, rank: int | None = None) -> Observations:
    forms: tuple[dict[str, Any], ...] = (
        {},
        {"fill": "arithmetic"},
        {"normalizer": "sampled", "pilot_reuse": False},
    )
    values = []
    for i, case in enumerate(_cases(context, rank)):
        ahat = _matrix(context, case, **forms[i % len(forms)])
        values.append(max(largest(ahat.sum(axis=1) - 1), float(-ahat.min()), 0.0))
    rounding = weight_rounding(context.instance)
    return Observations(values, 0.0, rank=default_rank(context, rank), rounding=rounding)


@claim(
    "skeinformer.hull",
    title="Outputs are averages of values",
    statement="""Ohat_i is in the convex hull of the rows of V: for every u,
        min_j V_j.u <= Ohat_i.u <= max_j V_j.u.""",
    source="derived: Ahat >= 0 and Ahat 1 = 1",
    status="derived",
    kind="inequality",
    observes="max_i |Ohat_i.u - middle|/half the range of V u, over 8 random u",
    assumptions=ON,
    recorded=EVERYWHERE,
    ladder=RANKS,
)
def _hull(context: Context, *, rank: int | None = None) -> Observations:
    v = context.instance.v
    values = []
    for case in _cases(context, rank):
        u = case.rng.standard_normal((v.shape[1], 8))
        seen, got = v @ u, _output(context, case) @ u
        low, high = seen.min(axis=0), seen.max(axis=0)
        # Rounding counts as range: constant values must not blow it up.
        half = (high - low) / 2 + weight_rounding(context.instance) * np.abs(seen).max(axis=0)
        away = np.abs(got - (low + high) / 2).max(axis=0)
        values.append(float(np.max(away / np.maximum(half, 1e-300))))
    return Observations(values, 1.0, rank=default_rank(context, rank), rounding=ROUNDING)


def _with(problem: AttentionProblem, **arrays: Array) -> AttentionProblem:
    parts = {"q": problem.q, "k": problem.k, "v": problem.values, **arrays}
    return AttentionProblem(parts["q"], parts["k"], parts["v"], scale=problem.scale)


@claim(
    "skeinformer.value_shift",
    title="A shift of all values shifts the output",
    statement="Given I and J: Ohat(V + 1 c^T) = Ohat(V) + 1 c^T for every c.",
    source="derived: Ahat 1 = 1, and given I and J Ahat does not depend on V",
    status="derived",
    kind="inequality",
    observes="max |difference| over max |V| + max |c|, one random c a draw, which must be zero",
    assumptions=ON,
    recorded=EVERYWHERE,
    ladder=RANKS,
)
def _value_shift(context: Context, *, rank: int | None = None) -> Observations:
    size = _scale(context.instance)
    values = []
    for case in _cases(context, rank):
        shift = np.asarray(3 * size * case.rng.standard_normal(context.instance.v.shape[1]))
        moved = case._replace(problem=_with(case.problem, v=case.problem.values + shift))
        off = _output(context, moved) - _output(context, case) - shift
        values.append(largest(off) / (size + largest(shift)))
    rounding = 2 * weight_rounding(context.instance)
    return Observations(values, 0.0, rank=default_rank(context, rank), rounding=rounding)


@claim(
    "skeinformer.key_shift",
    title="A shift of all keys changes nothing",
    statement="Given I and J: Ahat of K + 1 c^T is Ahat of K for every c.",
    source="derived: a constant added to a row of logits multiplies its entries and its fill alike",
    status="derived",
    kind="inequality",
    observes="max |difference of outputs| over max |V|, one random c a draw, which must be zero",
    assumptions=ON,
    recorded=EVERYWHERE,
    ladder=RANKS,
)
def _key_shift(context: Context, *, rank: int | None = None) -> Observations:
    problem = problem_of(context.instance)
    size = max(largest(problem.k), 1e-300)
    values, rounding = [], 0.0
    for case in _cases(context, rank):
        shift = size * case.rng.standard_normal(problem.d)
        moved = case._replace(problem=_with(case.problem, k=case.problem.k + shift))
        off = _output(context, moved) - _output(context, case)
        values.append(largest(off) / _scale(context.instance))
        rounding = max(rounding, weight_rounding(problem) + weight_rounding(moved.problem))
    return Observations(values, 0.0, rank=default_rank(context, rank), rounding=rounding)


@claim(
    "skeinformer.permutation",
    title="The order of keys and queries does not matter",
    statement="""Given I and J: permuting keys and values together with J changes nothing in the
        output, and permuting queries together with I permutes its rows.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="max |difference| over max |V|, random permutations, which must be zero",
    assumptions=ON,
    recorded=EVERYWHERE,
    ladder=RANKS,
)
def _permutation(context: Context, *, rank: int | None = None) -> Observations:
    values = []
    for case in _cases(context, rank):
        problem = case.problem
        keys, queries = case.rng.permutation(problem.n_k), case.rng.permutation(problem.n_q)
        moved = _with(problem, q=problem.q[queries], k=problem.k[keys], v=problem.values[keys])
        draw = Draw(
            pilot_rows=np.argsort(queries)[case.draw["pilot_rows"]],
            columns=np.argsort(keys)[case.draw["columns"]],
        )
        off = _output(context, case._replace(problem=moved, draw=draw))
        values.append(largest(off - _output(context, case)[queries]) / _scale(context.instance))
    rounding = weight_rounding(context.instance)
    return Observations(values, 0.0, rank=default_rank(context, rank), rounding=rounding)


@claim(
    "skeinformer.full_rank",
    title="All columns are exact",
    statement="J all keys: Ahat = A, for adaptive, sampled and exact normalisers.",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="max_ij |Ahat_ij - A_ij| over the three, which must be zero",
    assumptions=ON,
    recorded=EVERYWHERE,
)
def _full_rank(context: Context) -> Observations:
    values = []
    for case in _cases(context, context.instance.n, most=1):
        for normalizer in ("adaptive", "sampled", "exact"):
            ahat = _matrix(context, case, normalizer=normalizer, pilot_reuse=False)
            values.append(largest(ahat - context.instance.a))
    rounding = weight_rounding(context.instance)
    return Observations(values, 0.0, rank=context.instance.n, rounding=rounding)


# --- after the fact -------------------------------------------------------------------------------


@claim(
    "skeinformer.rank_floor",
    title="The spectral error that no draw can avoid",
    statement="""|A - Ahat|_2 >= sigma_{r+2}(A) without pilot reuse, where rank(Ahat) <= r + 1, and
        >= sigma_{r+s'+2}(A) with s' distinct pilot rows put back.""",
    source="Eckart and Young, Psychometrika 1 (1936), for the rank of Ahat",
    status="derived",
    kind="inequality",
    observes="the floor over |A - Ahat|_2, in turn without and with pilot reuse",
    assumptions=ON,
    recorded=EVERYWHERE,
    ladder=RANKS,
)
def _rank_floor(context: Context, *, rank: int | None = None) -> Observations:
    instance = context.instance
    sigma = instance.svd[1]
    r = max(1, min(16, instance.m // 4, instance.n // 4)) if rank is None else rank
    values = []
    for i, case in enumerate(_cases(context, r, most=2)):
        reuse = i % 2 == 1
        distance = spectral(instance.a - _matrix(context, case, pilot_reuse=reuse))
        place = r + 1 + (len(np.unique(case.draw["pilot_rows"])) if reuse else 0)
        floor = float(sigma[place]) if place < len(sigma) else 0.0
        # Singular values are rounded in the size of the first one, and Ahat is, and its rank.
        room = ROUNDING * float(sigma[0]) + math.sqrt(instance.m) * weight_rounding(instance)
        values.append(quotient(floor, distance, room))
    return Observations(values, 1.0, rank=r)


@claim(
    "skeinformer.posterior",
    title="The only bound of the output error, after the fact",
    statement="""Ahat 1 = 1: |A V - Ohat|_2 <= |A - Ahat|_2 |V - 1 vbar^T|_2, vbar the mean of V.
        Nothing published bounds the right side for the adaptive normaliser.""",
    source="derived: (A - Ahat) V = (A - Ahat)(V - 1 c^T) for every c",
    status="derived",
    kind="inequality",
    observes="|A V - Ohat|_2 against the bound of the same draw",
    assumptions=ON,
    recorded={"heavy-keys": "holds", "clusters": "vacuous", "heads": "vacuous"},
    ladder=RANKS,
)
def _posterior(context: Context, *, rank: int | None = None) -> Observations:
    instance = context.instance
    centred = spectral(instance.v - instance.v.mean(axis=0))
    trivial = spectral(instance.product - instance.v.mean(axis=0))
    values, bounds = [], []
    for case in _cases(context, rank, most=2):
        difference = instance.a - _matrix(context, case)
        values.append(spectral(difference @ instance.v))
        bounds.append(spectral(difference) * centred)
    return Observations(
        values,
        bounds if bounds else math.nan,
        rank=default_rank(context, rank),
        predictor="the mean of V",
        trivial=trivial,
        rounding=math.sqrt(instance.m) * output_rounding(instance),
    )
