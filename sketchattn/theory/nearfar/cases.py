"""What the claims of this topic share: instances, the forms that are looked at, and cases."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from ...operators.nearfar import Clusters, NearFarAttention, rows_in_tiles
from ...problem import AttentionProblem
from ..engine.arguments import Array
from ..engine.assumptions import DENSE, ROWS
from ..engine.instances import instance
from ..engine.observers import implemented, is_default, problem_of
from ..engine.registry import Context
from .formulas import Case, Form, forms

ON = (DENSE, ROWS)
EVERYWHERE = {
    "nearfar-golden": "holds",
    "causal": "holds",
    "heads": "holds",
}

# --- instances ------------------------------------------------------------------------------------


@instance("nearfar-golden", "48 queries and keys in six groups, d = 4, d_v = 3: moments that say")
def _golden() -> AttentionProblem:
    rng = np.random.default_rng(51)
    centres = 1.5 * rng.standard_normal((6, 4))
    k = centres[rng.integers(0, 6, 48)] + 0.5 * rng.standard_normal((48, 4))
    return AttentionProblem(2 * rng.standard_normal((48, 4)), k, rng.standard_normal((48, 3)))


@instance("far-shares", "one query; logits -400 and 400, which share a cluster, and 200, alone")
def _far_shares() -> AttentionProblem:
    k = np.array([[-400.0], [400.0], [200.0]])
    return AttentionProblem(np.ones((1, 1)), k, k / 400, scale=1.0)


@instance("across", "one query across the long side of four keys: no slope of the first order")
def _across() -> AttentionProblem:
    k = np.array([[-2.0, -1.0], [-2.0, 1.0], [2.0, -1.0], [2.0, 1.0]])
    return AttentionProblem(np.array([[0.0, 1.0]]), k, k.copy(), scale=1.0)


@instance(
    "unseen-key", "128 keys, one of logit 30 among seven of -30, 120 of 24: no moment says so"
)
def _unseen_key() -> AttentionProblem:
    # Four clusters a block, as far apart in a coordinate that no query looks at.
    place = np.arange(128)
    k = np.stack([np.full(128, 0.8), 100.0 * (place // 8 % 4)], axis=1)
    k[:8, 0] = -1.0
    k[3, 0] = 1.0
    q = np.tile([30.0, 0.0], (128, 1))
    v = np.zeros((128, 1))
    v[3] = 1.0
    return AttentionProblem(q, k, v, scale=1.0)


# The forms of instances that are made for one.
SPECIAL: dict[str, tuple[Form, ...]] = {
    "far-shares": (Form("blocks", 2, 1),),
    "unseen-key": (Form("blocks", 32, 4, near=1, tau=0.0),),
    "near-pair": (Form("one cluster", 2, 1, regions="all"),),
    "across": (Form("one cluster", 4, 1, regions="all", metric="key"),),
}

# --- what observers share -------------------------------------------------------------------------


def forms_of(context: Context, **options: Any) -> list[Form]:
    """Return the forms that are looked at, with some of their arguments replaced."""
    problem, name = problem_of(context.instance), context.instance.name
    some = SPECIAL.get(name) or forms(problem)
    return [form._replace(**options) for form in some]


def matrix_of(problem: AttentionProblem, form: Form) -> NearFarAttention:
    """Return what the library makes of a form."""
    made = form.method().approximate(problem)
    assert isinstance(made, NearFarAttention)  # a problem without keys is not applicable
    return made


def given_clusters(
    problem: AttentionProblem, ids: Array, form: Form, root: Array | None = None
) -> NearFarAttention:
    """Return the operator of given clusters: ``ids (N,)`` below ``form.clusters`` in each block.

    Causal rows own the block of their last key and see the clusters of those before; other rows
    see all clusters from far.
    """
    n, (_, b, c, *_) = len(problem.kept_keys), form
    labels = np.arange(n) // b * c + ids
    count = -(-n // b) * c
    if problem.causal:
        stops = problem.visible_counts()
        block = np.maximum(stops - 1, 0) // b
        own, ends = block * b, block * c
    else:
        own = stops = np.zeros(problem.n_q, np.int64)
        ends = np.full(problem.n_q, count)
    clusters = Clusters(labels, count, root, form.first_order, form.second_order == "frozen")
    rows = rows_in_tiles(stops, own, ends, None)
    return NearFarAttention(problem, clusters, rows, min(form.near, count), form.tau)


def make_case(context: Context, form: Form, ahat: NearFarAttention) -> Case:
    """Return the case of an operator, with what the implementation that was handed in makes."""
    if is_default(context):
        return Case(form, ahat)

    def observe(kind: str, case: Case) -> Array:
        rng = np.random.default_rng(context.entropy)
        return implemented(context, kind, len(case.counts), rng, **given_of(case))

    return Case(form, ahat, observe)


def given_of(case: Case) -> dict[str, Any]:
    """Return what an implementation that is handed in is given."""
    return {"problem": case.problem, "form": case.form, **case.structure._asdict()}


def cases(context: Context, **options: Any) -> list[Case]:
    """Return the cases of the forms, computed once for the library's own."""
    problem = problem_of(context.instance)

    def compute() -> list[Case]:
        some = forms_of(context, **options)
        return [make_case(context, form, matrix_of(problem, form)) for form in some]

    if not is_default(context):
        return compute()
    return context.instance.cached(("nearfar cases", *sorted(options.items())), compute)


def names_of(some: Iterable[Case]) -> str:
    """Return the names of forms, for notes."""
    return "forms: " + ", ".join(dict.fromkeys(case.form.name for case in some))
