"""Structured attention from its formulas: dense, on small problems, and what bounds it.

A `Case` is one problem with one plan and one set of reference queries.  Everything in it but
``ahat`` and ``log_normalizer`` is written from the definitions; these two are what is observed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ...base.floating import without_floating_errors
from ...errors.rows import mass_aware_bound
from ...operators.partitioned.operator import PartitionedAttention
from ...operators.partitioned.summaries import Reference, Rule
from ...partitions.patterns import label_plan, make_plan
from ...partitions.plans import Plan
from ...problem import AttentionProblem
from ..engine.arguments import Array, Float, floats, real
from ..engine.observers import logit_reach, logit_rounding
from ..informer.formulas import variation_bound

# --- formulas -------------------------------------------------------------------------------------


@without_floating_errors
def specht_log(spread: ArrayLike) -> Float:
    """Return ``ln S(e^R)``, the most that ``ln E e^X - E X`` can be for X with range R.

    ``S(h) = h^(1/(h-1)) / (e ln h^(1/(h-1)))`` is Specht's ratio of the arithmetic to the geometric
    mean of positive numbers whose quotients are at most h.

    Parameters
    ----------
    spread : float or array
        R, at least 0.

    Returns
    -------
    float or ndarray
        ``x - 1 - ln x`` with ``x = R/(e^R - 1)``; at most ``R^2/8``.

    Examples
    --------
    >>> round(specht_log(2.0), 6), round(specht_log(1e-5) / (1e-10 / 8), 6)
    (0.474475, 1.0)
    """
    r = real(spread, "spread", 0, low_open=False)
    usual = r > 1e-2
    safe = np.where(usual, r, 1.0)
    # x = R e^-R/(1 - e^-R), which does not overflow.
    x = safe * np.exp(-safe) / -np.expm1(-safe)
    log_x = np.log(safe) - safe - np.log(-np.expm1(-safe))
    # ln S = R^2/8 - R^4/576 + ...; the next term is below 1e-15 here.
    return floats(np.where(usual, x - 1 - log_x, r**2 / 8 - r**4 / 576))


def divergence(p: Array, log_ratio: Array) -> Array:
    """Return ``KL(p e^u | p)`` of rows p with log-ratios u, ``sum p e^u = sum p = 1``.

    ``sum_j p_j (u_j e^u_j - e^u_j + 1)``, whose terms are not negative.
    """
    u = np.where(p > 0, log_ratio, 0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        terms = np.where(np.abs(u) < 1e-4, u**2 / 2 + u**3 / 3, u * np.exp(u) - np.expm1(u))
        found = np.where(p > 0, p * terms, 0.0)
    return np.asarray(np.sum(found, axis=-1))


@without_floating_errors
def structural_floor(problem: AttentionProblem, plan: Plan) -> float:
    """Return the least ``|Ahat - A|_F`` of any structured attention with this plan, trained or not.

    ``sqrt(sum_t sum_{k>=2} sigma_k(A[I_t, Omega_t])^2)``, I_t the rows that use region t.

    Parameters
    ----------
    problem : AttentionProblem
        Small enough for its dense matrix.
    plan : Plan

    Returns
    -------
    float
        An error near it is limited by the plan, one far above by the summaries.

    Notes
    -----
    The blocks are disjoint and of rank 1 in Ahat; Eckart and Young.  Derived.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=32, d=4, rng=0)[0].astype(np.float64)
    >>> plan = sa.partitions.make_plan("fixed", 32, block=8)
    >>> error = np.linalg.norm(sa.PartitionedAttention(problem, plan).to_dense()
    ...                        - problem.exact.to_dense())
    >>> bool(0 < structural_floor(problem, plan) <= error)
    True
    """
    a = problem.exact.to_dense()
    return math.sqrt(sum(_tail(a[np.ix_(rows, keys)]) for rows, keys in blocks(plan)))


def _tail(block: Array) -> float:
    sigma = np.linalg.svd(block, compute_uv=False)
    return float(np.sum(sigma[1:] ** 2))


def blocks(plan: Plan) -> list[tuple[Array, Array]]:
    """Return for each region the rows that use it and its keys."""
    far = plan.row_regions
    order = np.argsort(far.items, kind="stable")
    ends = np.cumsum(np.bincount(far.items, minlength=len(plan.regions)))
    rows = np.split(far.owner[order], ends[:-1]) if len(plan.regions) else []
    return [(rows[t], plan.regions[t]) for t in range(len(plan.regions)) if len(rows[t])]


def log_sum(x: Array) -> Array:
    """Return ``ln sum_j exp(x_ij)`` of rows, -inf for a row of none."""
    top = x.max(axis=1, initial=-np.inf)
    shift = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.asarray(shift + np.log(np.exp(x - shift[:, None]).sum(axis=1)))


@without_floating_errors
def pair_span(block: Array) -> float:
    """Return ``max |x_ij - x_i'j - x_ij' + x_i'j'|`` of a block: 0 if and only if it is separable.

    Examples
    --------
    >>> pair_span(np.array([[1.0, 2.0], [3.0, 4.0]])), pair_span(np.eye(2))
    (0.0, 2.0)
    """
    worst = 0.0
    for j in range(block.shape[1] - 1):
        moved = block[:, j + 1 :] - block[:, j : j + 1]
        worst = max(worst, float((moved.max(axis=0) - moved.min(axis=0)).max()))
    return worst


# --- one problem, one plan ------------------------------------------------------------------------


class Setting(NamedTuple):
    """Name a plan with reference queries and the rest of a rule."""

    name: str
    plan: Plan
    reference: Reference
    rule: Rule = Rule()


class Case:
    """Hold the exact rows, the formulas of structured attention, and what is observed of it.

    Attributes
    ----------
    logits : ndarray (n_q, n_k)
        -inf where a row does not see a key.
    a, log_z : ndarray (n_q, n_k), (n_q,)
    region : int64 ndarray (n_q, n_k)
        The region that key j is in for row i, -1 if it is direct, -2 if it is not seen.
    lam, g, rho, pi : ndarray (r, n_k), (n_q, r), (n_q, r), (n_q, r)
    eta : ndarray (n_q, n_k)
        ``g_i(t) + ln lam_t(j) - L_ij``, 0 on direct keys.
    pairs : three int64 ndarrays
        Row, key and region of all entries in regions.
    ahat : ndarray (n_q, n_k)
    """

    def __init__(
        self,
        problem: AttentionProblem,
        setting: Setting,
        observe: Callable[[Case], tuple[Array, Array]] | None = None,
    ) -> None:
        self.problem, self.setting, self.plan = problem, setting, setting.plan
        self.operator = PartitionedAttention(problem, setting.plan, setting.reference, setting.rule)
        self.gibbs = bool(self.operator.lower_bound)
        self.q0: Array = np.array(self.operator.q0, np.float64)
        self._formulas()
        if observe is None:
            self.ahat = self.operator.to_dense()
            self.log_normalizer: Array = np.asarray(self.operator.log_normalizer, np.float64)
        else:
            self.ahat, self.log_normalizer = observe(self)

    def _formulas(self) -> None:
        problem, plan = self.problem, self.plan
        n_q, n_k, r = problem.n_q, problem.n_k, len(plan.regions)
        q, k, scale = problem.q, problem.k, float(problem.scale)
        full = scale * q @ k.T
        self.reach = logit_reach(problem)
        self.region = np.full((n_q, n_k), -2, np.int64)
        self.region[plan.direct.owner, plan.direct.items] = -1
        far = plan.row_regions
        inside = plan.regions.take(far.items)
        rows = np.repeat(far.owner, inside.sizes)
        self.region[rows, inside.items] = np.repeat(far.items, inside.sizes)
        self.logits = np.where(self.region > -2, full, -np.inf)
        top = self.logits.max(axis=1, keepdims=True)
        weights = np.exp(self.logits - top)
        total = weights.sum(axis=1, keepdims=True)
        self.a = weights / total
        self.log_z = (top + np.log(total))[:, 0]
        # Summaries.
        member = np.zeros((r, n_k), bool)
        member[plan.regions.owner, plan.regions.items] = True
        e = np.where(member, scale * self.q0 @ k.T, -np.inf)
        e -= e.max(axis=1, keepdims=True) if r else 0.0
        self.lam = np.exp(e)
        weight = self.lam.sum(axis=1, keepdims=True)
        self.lam /= weight
        log_lam = e - np.log(weight)
        entropy = -np.sum(
            np.where(self.lam > 0, self.lam * np.where(member, log_lam, 0), 0), axis=1
        )
        rule = self.setting.rule
        self.kappa = self.lam @ k
        counts = member.sum(axis=1)
        key = self.kappa
        if rule.key != "expected":
            pooled = [k[x].max(axis=0) if rule.key == "max" else k[x].mean(axis=0)
                      for x in plan.regions]  # fmt: skip
            key = np.array(pooled).reshape(r, problem.d)
        bias = {"entropy": entropy, "log_count": np.log(counts), "none": np.zeros(r)}[rule.bias]
        uses = np.zeros((n_q, r), bool)
        uses[far.owner, far.items] = True
        g = scale * q @ key.T + bias
        if rule.second_order == "diag":
            variance = self.lam @ k**2 - self.kappa**2
            for t in range(r):
                g[:, t] += 0.5 * scale**2 * ((q - self.q0[t]) ** 2 @ variance[t])
        self.g = np.where(uses, g, -np.inf)
        direct = np.where(self.region == -1, full, -np.inf)
        slots = np.concatenate([direct, self.g], axis=1)
        peak = slots.max(axis=1, keepdims=True)
        self.log_zhat = (peak + np.log(np.exp(slots - peak).sum(axis=1, keepdims=True)))[:, 0]
        self.rho = np.exp(self.g - self.log_zhat[:, None])
        i, j = np.nonzero(self.region >= 0)
        at = self.region[i, j]
        self.pairs = (i, j, at)
        self.pi = self.by_region(self.a[i, j])
        self.eta = np.zeros((n_q, n_k))
        self.eta[i, j] = self.g[i, at] + log_lam[at, j] - self.logits[i, j]

    def by_region(self, x: Array) -> Array:
        """Return the sums over each region of numbers of ``pairs`` (n_q, r)."""
        i, _, t = self.pairs
        n_q, r = self.g.shape
        found = np.bincount(i * r + t, weights=x, minlength=n_q * r)
        return np.asarray(found.reshape(n_q, r))

    # --- what is observed ---

    @cached_property
    def nothing(self) -> float:
        """What is rounding: of weights and of logarithms, three of them in a difference."""
        return max(1e-12 * (1 + self.reach), 3 * logit_rounding(self.problem))

    @cached_property
    def tv(self) -> Array:
        """``(1/2)|Ahat_i - A_i|_1``."""
        return np.asarray(np.abs(self.ahat - self.a).sum(axis=1) / 2)

    @cached_property
    def log_ratio(self) -> Array:
        """``ln(Ahat_ij/A_ij)``; 0 where either is too small to have digits."""
        some = (self.a > 1e-290) & (self.ahat > 1e-290)
        logs = np.log(np.where(some, self.ahat, 1.0)) - np.log(np.where(some, self.a, 1.0))
        return np.asarray(logs)

    @property
    def has_digits(self) -> Array:
        """Whether no weight of a row underflows, which would lose a part of its divergence."""
        some = (self.a > 1e-290) & (self.ahat > 1e-290)
        return np.asarray(((self.region == -2) | some).all(axis=1))

    @cached_property
    def kl(self) -> Array:
        """``KL(Ahat_i | A_i)``."""
        return divergence(self.a, self.log_ratio)

    @cached_property
    def kl_forward(self) -> Array:
        """``KL(A_i | Ahat_i)``."""
        return divergence(self.ahat, -self.log_ratio)

    # --- what bounds it ---

    @property
    def low(self) -> Array:
        """``lo_i = max(0, max_j -eta_ij)``."""
        return np.asarray(np.maximum(-self.eta.min(axis=1), 0.0))

    @property
    def high(self) -> Array:
        """``hi_i = max(0, max_j eta_ij)``."""
        return np.asarray(np.maximum(self.eta.max(axis=1), 0.0))

    @property
    def width(self) -> Array:
        """``Delta_i = lo_i + hi_i``."""
        return self.low + self.high

    @cached_property
    def gap(self) -> Array:
        """``ln Z_i(Omega_t) - g_i(t)`` (n_q, r); 0 where a row does not use a region."""
        used = np.isfinite(self.g)
        with np.errstate(divide="ignore"):
            masses = np.log(np.where(used, self.pi, 1.0)) + self.log_z[:, None]
        # A region whose mass underflows has no digits.
        used &= self.pi > 1e-290
        return np.where(used, masses - np.where(used, self.g, 0.0), 0.0)

    @cached_property
    def mass(self) -> Array:
        """``sum over direct keys of |Ahat - A| + sum_t |rho - pi|``, by the formulas."""
        direct = np.where(self.region == -1, self.logits, -np.inf)
        moved = np.abs(
            np.exp(direct - self.log_zhat[:, None]) - np.exp(direct - self.log_z[:, None])
        )
        return np.asarray(moved.sum(axis=1) + np.abs(self.rho - self.pi).sum(axis=1))

    @cached_property
    def local(self) -> Array:
        """``pi_i(t) |cond_i(.|t) - lam_t|_1`` (n_q, r)."""
        i, j, t = self.pairs
        return self.by_region(np.abs(self.a[i, j] - self.pi[i, t] * self.lam[t, j]))


# --- which plans are looked at --------------------------------------------------------------------

PATTERNS = ("fixed", "logsparse", "axial_vertical", "axial_horizontal")


def zero(problem: AttentionProblem) -> Reference:
    """Return the reference query 0."""
    return Reference("given", np.zeros((1, problem.d)))


def global_mean(problem: AttentionProblem) -> Reference:
    """Return the mean of all queries."""
    return Reference("given", np.asarray(problem.q.mean(axis=0, dtype=np.float64))[None])


def one_region(problem: AttentionProblem) -> Plan:
    """Return the plan of one region without direct keys."""
    return label_plan(np.zeros(problem.n_k, np.int64), n_q=problem.n_q, own=False)


def settings(problem: AttentionProblem) -> list[Setting]:
    """Return the plans on which claims look at a problem: more of them where it is small."""
    n, causal = problem.n_k, bool(problem.causal)
    small = problem.n_q * n <= 10**4
    nil, mean = zero(problem), global_mean(problem)
    made: list[Setting] = []
    if problem.n_q != n:
        spans = label_plan(
            np.arange(n) // max(1, round(math.sqrt(2 * n))), n_q=problem.n_q, own=False
        )
        made = [Setting("spans", spans, mean), Setting("spans, zero", spans, nil)]
    elif not small:
        made = [
            Setting("fixed", make_plan("fixed", n, block=16, causal=causal), mean),
            Setting("logsparse", make_plan("logsparse", n, causal=causal), nil),
        ]
    else:
        for pattern in PATTERNS:
            plan = make_plan(pattern, n, causal=causal)
            made.append(Setting(pattern, plan, Reference("mean")))
            made.append(Setting(f"{pattern}, zero", plan, nil))
    if small and not causal:
        whole = one_region(problem)
        opposite = Reference("given", -np.asarray(mean.q0))
        made += [Setting("one region", whole, nil), Setting("opposite", whole, opposite)]
    return [x._replace(plan=x.plan.keep(problem.key_mask)[0]) for x in made]


def other_rules(problem: AttentionProblem) -> list[Setting]:
    """Return settings of rules without a lower bound: the published one, and a second order."""
    base = settings(problem)[0]
    pooled = Reference("max") if problem.n_q == problem.n_k else base.reference
    return [
        Setting("published", base.plan, pooled, Rule("max", "none", "none")),
        Setting("diagonal", base.plan, base.reference, Rule("expected", "entropy", "diag")),
    ]


def merged_spans(n: int, block: int, n_q: int) -> Plan:
    """Return spans of ``block`` keys, none of them direct."""
    return label_plan(np.arange(n) // block, n_q=n_q, own=False)


def row_bounds(case: Case) -> dict[str, Array]:
    """Return the bounds of rows that need the exact row, by name: each at least TV_i."""
    lo, hi = case.low, case.high
    what = np.minimum(log_sum(case.g - case.log_zhat[:, None]), 0.0)
    inside = np.where(case.region >= 0, case.logits - case.log_z[:, None], -np.inf)
    true = np.minimum(log_sum(inside), 0.0)
    return {
        "tanh": np.tanh((lo + hi) / 4),
        "mass-aware": np.asarray(mass_aware_bound(true, lo, hi, log=True)),
        "mass-aware, a posteriori": np.asarray(mass_aware_bound(what, hi, lo, log=True)),
        "divergence": np.asarray(variation_bound(np.maximum(case.log_z - case.log_zhat, 0.0))),
    }
