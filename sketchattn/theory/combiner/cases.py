"""What the claims of this topic share: instances, and the plans that are looked at on each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from ...base.floating import without_floating_errors
from ...errors.rows import mass_aware_bound
from ...operators.partitioned.summaries import Reference
from ...partitions.patterns import make_plan
from ...partitions.plans import Plan
from ...problem import AttentionProblem
from ..engine.arguments import Array, real
from ..engine.assumptions import DENSE, ROWS
from ..engine.instances import instance
from ..engine.observers import implemented, is_default, problem_of
from ..engine.records import Observations
from ..engine.registry import Context
from .formulas import Case, Setting, merged_spans, one_region, other_rules, settings, zero

PAPER = "Ren et al., arXiv 2107.05768"
DERIVED = "derived: see the chapter on Combiner"
ON = (DENSE, ROWS)
EVERYWHERE = {
    "golden-spans": "holds",
    "causal": "holds",
    "clusters": "holds",
    "heads": "holds",
}

# --- instances ------------------------------------------------------------------------------------


def _from_logits(
    logits: object, v: Array | None = None, *, causal: bool = False
) -> AttentionProblem:
    """Return the problem of given logits: unit vectors as keys, so that lam can be anything."""
    x = np.asarray(logits, np.float64)
    return AttentionProblem(x, np.eye(x.shape[1]), v, scale=1.0, causal=causal)


@instance("golden-spans", "Q = (0, 1, 3, -1), K = (0, 1, -1, 2), d = 1, spans of 2: worked numbers")
def _golden_spans() -> AttentionProblem:
    q, k = np.array([[0.0], [1], [3], [-1]]), np.array([[0.0], [1], [-1], [2]])
    return AttentionProblem(q, k, np.eye(4), scale=1.0)


@instance("tilted-pair", "one query, two keys of weight .3775 and .6225, lam the other way round")
def _tilted_pair() -> AttentionProblem:
    k = np.array([[0.0], [1.0]])
    return AttentionProblem(np.array([[0.5]]), k, k.copy(), scale=1.0)


@instance("near-pair", "one query, two keys with logits -.001 and .001, lam uniform: second order")
def _near_pair() -> AttentionProblem:
    k = np.array([[-1.0], [1.0]])
    return AttentionProblem(np.array([[0.001]]), k, k.copy(), scale=1.0)


@instance("extreme-pair", "one query, two keys with logits 0 and 200, lam uniform: extreme weights")
def _far_pair() -> AttentionProblem:
    k = np.array([[0.0], [1.0]])
    return AttentionProblem(np.array([[200.0]]), k, k.copy(), scale=1.0)


@instance("three-logits", "logits (0, 0, 2), lam uniform: nearly the largest gap of a range of 2")
def _three_logits() -> AttentionProblem:
    return AttentionProblem(
        np.array([[2.0]]), np.array([[0.0], [0.0], [1.0]]), np.eye(3), scale=1.0
    )


@instance("one-part", "two rows, a direct key and a region of two that is tilted: B is attained")
def _one_part() -> AttentionProblem:
    return _from_logits([row.logits for row in _extremal_rows()])


@instance("checkerboard", "logits (1, -1) and (-1, 1), one region: as far from rank 1 as can be")
def _checkerboard() -> AttentionProblem:
    return AttentionProblem(np.array([[1.0], [-1.0]]), np.array([[1.0], [-1.0]]), scale=1.0)


@instance("separable", "24 keys, spans of 4 along a, queries with q.a constant: blocks of rank 1")
def _separable() -> AttentionProblem:
    rng = np.random.default_rng(25)
    a = np.array([1.0, 0.0, 0.0, 0.0])
    k = np.repeat(rng.standard_normal((6, 4)), 4, axis=0)
    k += rng.standard_normal((24, 1)) * a
    q = rng.standard_normal((24, 4))
    q[:, 0] = 1.5
    return AttentionProblem(q, k, rng.standard_normal((24, 3)), scale=1.0)


@instance(
    "equal-keys", "64 queries and keys, keys equal within spans of 8: what is called lossless"
)
def _equal_keys() -> AttentionProblem:
    rng = np.random.default_rng(26)
    q, v = rng.standard_normal((64, 8)), rng.standard_normal((64, 4))
    return AttentionProblem(q, np.repeat(rng.standard_normal((8, 8)), 8, axis=0), v)


@instance("no-queries", "Q = 0, 64 keys, spans of 8: uniform attention")
def _no_queries() -> AttentionProblem:
    rng = np.random.default_rng(27)
    k, v = rng.standard_normal((64, 8)), rng.standard_normal((64, 4))
    return AttentionProblem(np.zeros((64, 8)), k, v)


@instance("tight-spans", "32 queries, keys within .1 of the centres of spans of 8, d = 8, d_v = 4")
def _tight_spans() -> AttentionProblem:
    rng = np.random.default_rng(28)
    q, v = rng.standard_normal((32, 8)), rng.standard_normal((32, 4))
    k = np.repeat(rng.standard_normal((4, 8)), 8, axis=0) + 0.1 * rng.standard_normal((32, 8))
    return AttentionProblem(q, k, v)


class ExtremalRow(NamedTuple):
    """Hold a row that attains `mass_aware_bound`: one direct key, and a region of two.

    Attributes
    ----------
    logits, reference : ndarray (3,)
        Of the row, and of its reference query; key 0 is direct.
    mass, low, high : float
        Arguments of the bound.
    """

    logits: Array
    reference: Array
    mass: float
    low: float
    high: float


@without_floating_errors
def extremal_row(
    width: float, share: float, *, with_direct: bool = False, posterior: bool = False
) -> ExtremalRow:
    """Return a row that attains `mass_aware_bound` for a range ``lo + hi = width``.

    In the region ``eta = hi`` on the first key, of weight ``share`` under lam, and ``-lo`` on
    the second, ``lo = share width``, so that its mean is 0.  The mass of the region is the one
    for which this event is the best.

    Parameters
    ----------
    width : float
        In (0, 20]: beyond, the equation for the mass loses its digits.
    share : float
        In (0, 1), at most ``1 / (1 + exp(-width/2))`` and not far below: elsewhere no mass of the
        region makes the event the best one.
    with_direct : bool
        Whether the direct key is in the event.
    posterior : bool
        Whether the bound is attained that uses the mass of the region under Ahat; exactly one of
        the two is True.

    Raises
    ------
    TypeError, ValueError
        For a width or share outside of its range, and where no such row attains the bound.

    Examples
    --------
    >>> row = extremal_row(1.0, 0.55, with_direct=True)
    >>> p = np.exp(row.logits)
    >>> moved = p * np.exp([0.0, row.high, -row.low])
    >>> tv = abs(p - moved / moved.sum()).sum() / 2
    >>> from sketchattn.errors.rows import mass_aware_bound
    >>> bool(abs(tv - mass_aware_bound(row.mass, row.low, row.high)) < 1e-12)
    True
    """
    from scipy.optimize import brentq

    width = float(real(width, "width", 0, 20, high_open=False))
    share = float(real(share, "share", 0, 1))
    lam = np.array([share, 1 - share])
    lo, hi = share * width, (1 - share) * width
    tilt = np.array([hi, -lo])
    # Where p is what is tilted, by eta or back by -eta.
    sign = -1.0 if posterior else 1.0
    p = lam if posterior else lam * np.exp(-tilt) / float(lam @ np.exp(-tilt))
    t, a = math.exp(float((sign * tilt).max())), math.exp(float((sign * tilt).min()))
    rises = int(np.argmax(sign * tilt))

    def off(w: float) -> float:
        """Return by how much the share of the event in the region is not the best one."""
        if with_direct:
            c = 1 - w + w * t
            return (c - math.sqrt(a * c)) / (t - a) - w * float(p[1 - rises])
        c = 1 - w + w * a
        return (math.sqrt(t * c) - c) / (t - a) - w * float(p[rises])

    least, most = 1e-9, 1.0
    limit = 1 / (1 + math.exp(-width / 2))
    if with_direct == posterior or not off(least) > 0 > off(most - least):
        raise ValueError(
            f"share must be below {limit:.6g} for width = {width:g}, with one of with_direct and "
            f"posterior True, got share = {share:g}, {with_direct} and {posterior}; else no mass "
            f"of the region makes the event the best one"
        )
    w = float(brentq(off, least, most, xtol=1e-15))
    row = np.array([1 - w, *(w * p)])
    if posterior:
        row = row * np.exp([0.0, *(-tilt)])
    low, high = (hi, lo) if posterior else (lo, hi)
    moved = row * np.exp([0.0, *tilt])
    tv = float(np.abs(row / row.sum() - moved / moved.sum()).sum()) / 2
    reached = tv / float(np.asarray(mass_aware_bound(w, low, high)))
    if reached < 1 - 1e-6:
        raise ValueError(
            f"share must be near {limit:.6g} for width = {width:g}, got {share:g}, where another "
            f"event is better and the row has {reached:.3g} of the bound; raise share"
        )
    return ExtremalRow(np.log(row), np.array([0.0, *np.log(lam)]), w, low, high)


def _extremal_rows() -> list[ExtremalRow]:
    return [
        extremal_row(1.0, 0.55, with_direct=True),
        extremal_row(1.0, 0.5, posterior=True),
    ]


def _extremal(problem: AttentionProblem) -> list[Setting]:
    rows = _extremal_rows()
    plan = Plan.from_lists(3, [[0], [0]], [[1, 2], [1, 2]], [[0], [1]])
    given = Reference("given", np.array([row.reference for row in rows]))
    return [Setting("one part", plan, given)]


def _whole(problem: AttentionProblem) -> list[Setting]:
    return [Setting("one region", one_region(problem), zero(problem))]


def _opposite(problem: AttentionProblem) -> list[Setting]:
    return [Setting("opposite", one_region(problem), Reference("given", -problem.q[:1]))]


def _spans(block: int) -> Callable[[AttentionProblem], list[Setting]]:
    def make(problem: AttentionProblem) -> list[Setting]:
        plan = make_plan("fixed", problem.n_k, block=block)
        loose = merged_spans(problem.n_k, block, problem.n_q)
        mean = Reference("given", problem.q.mean(axis=0)[None])
        return [
            Setting("spans", plan, Reference("mean")),
            Setting("spans, global mean", plan, mean),
            Setting("spans, zero", plan, zero(problem)),
            Setting("spans, none direct", loose, mean),
        ]

    return make


# The plans of instances that are made for one.
SPECIAL: dict[str, Callable[[AttentionProblem], list[Setting]]] = {
    "golden-spans": _spans(2),
    "tilted-pair": _opposite,
    "near-pair": _whole,
    "extreme-pair": _whole,
    "three-logits": _whole,
    "one-part": _extremal,
    "separable": _spans(4),
    "equal-keys": _spans(8),
    "no-queries": _spans(8),
    "tight-spans": _spans(8),
    "checkerboard": _whole,
}

# --- what observers share -------------------------------------------------------------------------


def settings_of(context: Context) -> list[Setting]:
    """Return the plans that are looked at."""
    problem = problem_of(context.instance)
    special = SPECIAL.get(context.instance.name)
    return settings(problem) if special is None else special(problem)


def observed(context: Context) -> Callable[[Case], tuple[Array, Array]] | None:
    """Return how Ahat and log Zhat are made, None for the library's own."""
    if is_default(context):
        return None

    def observe(case: Case) -> tuple[Array, Array]:
        given = {
            "problem": case.problem,
            "plan": case.plan,
            "q0": case.q0,
            "rule": case.setting.rule,
        }
        rng = np.random.default_rng(context.entropy)
        r = len(case.plan.regions)
        return (
            implemented(context, "combiner", r, rng, **given),
            implemented(context, "log_normalizer", r, rng, **given),
        )

    return observe


def make_cases(context: Context, found: Iterable[Setting]) -> list[Case]:
    """Return the cases of settings, with what the implementation that was handed in makes."""
    problem = problem_of(context.instance)
    return [Case(problem, setting, observed(context)) for setting in found]


def cases(context: Context) -> list[Case]:
    """Return the cases of the Gibbs rule, computed once for the library's own."""
    if not is_default(context):
        return make_cases(context, settings_of(context))
    return context.instance.cached(
        "combiner cases", lambda: make_cases(context, settings_of(context))
    )


def other_cases(context: Context) -> list[Case]:
    """Return cases of rules without a lower bound."""
    if context.instance.name in SPECIAL:
        return []

    def compute() -> list[Case]:
        return make_cases(context, other_rules(problem_of(context.instance)))

    if not is_default(context):
        return compute()
    return context.instance.cached("combiner cases of other rules", compute)


def largest_ratio(found: Array, bound: Array, nothing: float) -> float:
    """Return the largest quotient, where differences up to ``nothing`` are none."""
    if not np.size(found):
        return 0.0
    with np.errstate(invalid="ignore"):
        # An infinite bound says nothing.
        ratios = np.where(np.isinf(bound), 0.0, found / (bound + nothing))
    return float(np.max(ratios)) if not np.isnan(ratios).any() else math.nan


def ratios(found: Iterable[float], constant: float, names: Iterable[str] = ()) -> Observations:
    """Return quotients that must be at most 1, or a smaller constant."""
    listed = ", ".join(dict.fromkeys(names))
    return Observations(list(found), float(constant), notes=f"plans: {listed}" if listed else "")


def over_cases(
    some: Iterable[Case], constant: float, compare: Callable[[Case], Iterable[float]]
) -> Observations:
    """Return the quotients of all cases, as `ratios`, with the names of their plans."""
    some = list(some)
    return ratios([x for case in some for x in compare(case)], constant, names_of(some))


def names_of(some: Iterable[Case]) -> list[str]:
    """Return the names of plans."""
    return [case.setting.name for case in some]


def query_distances(case: Case) -> Array:
    """Return ``scale |q_i - q0_t|`` (n_q, r)."""
    q = case.problem.q
    found = np.empty(case.rho.shape)
    for t in range(found.shape[1]):
        found[:, t] = np.linalg.norm(q - case.q0[t], axis=1)
    return abs(float(case.problem.scale)) * found


def ranges(case: Case) -> Array:
    """Return ``max_j L_ij - min_j L_ij`` over the keys of a region, 0 where it is not used."""
    found = np.zeros(case.rho.shape)
    for t, keys in enumerate(case.plan.regions):
        rows = np.flatnonzero(np.isfinite(case.g[:, t]))
        block = case.logits[np.ix_(rows, keys)]
        found[rows, t] = block.max(axis=1) - block.min(axis=1)
    return found
