"""What Combiner is made of: layouts of plans and labels, and reference queries."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...operators.partitioned.layouts import Layout
from ...operators.partitioned.operator import PartitionedAttention
from ...operators.partitioned.shared import Shared
from ...operators.partitioned.summaries import Reference
from ...partitions.patterns import label_plan, make_plan
from ...partitions.plans import Plan
from ...partitions.ragged import Ragged
from ...problem import AttentionProblem
from .choices import Direct, given_queries

Array = NDArray[Any]


# Mass of a region from which a mean weighted by it is taken.
LEAST_MASS = 1e-300


class Base(NamedTuple):
    """Hold a layout, the old numbers of its regions where some were dropped, and the budget."""

    layout: Layout
    old: Array | None
    budget: int


def explicit(plan: Plan, mask: Array | None, direct: Direct, budget: int) -> Base:
    """Return the layout of a plan, without masked keys and with a window of direct ones."""
    from ...operators.partitioned.explicit import Explicit

    kept, old = plan.keep(mask)
    if direct.window is not None:
        kept = kept.with_window(direct.window)
    return Base(Explicit(kept), old, budget)


def of_labels(
    problem: AttentionProblem, labels: Array, row_labels: Array | None, direct: Direct
) -> Base:
    """Return the layout of label classes, or of spans, which are labels that ascend."""
    causal, mask = bool(problem.causal), problem.key_mask
    count = int(labels.max()) + 1
    spans = bool((np.diff(labels) >= 0).all())
    # Causal classes are prefixes, one for each position, unless a class is over before the next.
    shared = not causal or (spans and direct.own and row_labels is None)
    if shared and direct.window is None:
        kept = labels if mask is None else np.where(mask, labels, -1)
        mine = None
        if direct.own:
            mine = labels if row_labels is None else np.where(row_labels < count, row_labels, -1)
        layout = Shared(kept, count, problem.n_q, mine, causal)
        return Base(layout, None, count)
    own = row_labels if direct.own else None
    plan = label_plan(labels, row_labels=own, n_q=problem.n_q, own=direct.own, causal=causal)
    return explicit(plan, mask, direct, count)


def columns_plan(n: int, m: int, causal: bool) -> Plan:
    """Return the row-major plan with a region for each row and column that looks at it."""
    spans = make_plan("fixed", n, block=m, causal=causal)
    rows = -(-n // m)
    t = np.arange(rows)
    starts = np.repeat(t * m, m)
    regions = Ragged.ranges(starts, np.minimum(starts + m, n))
    a, c = np.divmod(np.arange(n), m)
    row, other = np.nonzero(t < a[:, None] if causal else t != a[:, None])
    uses = Ragged.grouped(row, other * m + c[row], n)
    return Plan(n, spans.direct, regions, uses, causal)


def column_positions(problem: AttentionProblem, old: Array) -> Array:
    """Return whose query is that of row x in the column that looks at it, or its last column."""
    # Region x columns + c: its number is the position, but for the end of the last row.
    return np.minimum(old, problem.n_k - 1)


def column_reference(problem: AttentionProblem, base: Base) -> Reference:
    """Return the query of row x in the column that looks at it, or in the row's last column."""
    assert base.old is not None
    where = column_positions(problem, base.old)
    return Reference("given", problem.q[where].astype(np.float64))


def reference_of(problem: AttentionProblem, name: Any, old: Array | None) -> Reference:
    """Return the reference queries that a name, or given queries, stand for."""
    given = given_queries(name)
    if given is None:
        if name == "zero":
            return Reference("given", np.zeros((1, problem.d)))
        if name == "global_mean":
            return Reference("given", problem.q.mean(axis=0, dtype=np.float64)[None])
        return Reference("max" if name == "region_max" else "mean")
    if len(given) > 1 and old is not None:
        given = given[old]
    return Reference("given", given)


def reference_sums(
    ahat: PartitionedAttention, problem: AttentionProblem, pilots: Array | None
) -> tuple[Array, Array, float]:
    """Return ``sum_i rho_i(t) q_i`` (r, d), ``sum_i rho_i(t)`` (r,), and what was added to these.

    With pilot rows these are mass as much as a region has on average, at the mean of all queries.
    """
    q = problem.arrays.q
    y = np.concatenate([q, np.ones((len(q), 1), q.dtype)], axis=1)
    sums = ahat.far_sums(y, pilots).astype(np.float64)
    mass, extra = sums[:, -1], 0.0
    sums = sums[:, :-1]
    if pilots is not None:
        extra = float(mass.sum() / max(np.count_nonzero(ahat.layout.nonempty), 1))
        mean = problem.q.mean(axis=0, dtype=np.float64)
        sums = sums + extra * mean
        mass = mass + extra
    return sums, mass, extra


def refined(ahat: PartitionedAttention, problem: AttentionProblem, pilots: Array | None) -> Array:
    """Return the means of the queries weighted by what they put on each region, (r, d).

    ``q0_t = sum_i rho_i(t) q_i / sum_i rho_i(t)``, as it was where the denominator vanishes.
    """
    sums, mass, _ = reference_sums(ahat, problem, pilots)
    some = mass >= LEAST_MASS
    divisor = np.where(some, mass, 1)[:, None]
    return np.where(some[:, None], sums / divisor, ahat.q0)


def promoted(layout: Layout, chosen: Array) -> tuple[Layout, Array | None]:
    """Return the layout with regions (n_q, t) direct, and which are left if their numbers moved."""
    from ...operators.partitioned.explicit import Explicit

    if isinstance(layout, Shared):
        return layout.promoted(chosen), None
    plan = layout.plan()
    far = plan.row_regions
    picked = (chosen[far.owner] == far.items[:, None]).any(axis=1)
    more, kept = plan.promote(picked)
    return Explicit(more), kept
