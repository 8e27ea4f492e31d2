"""The pass over sampled columns: what the components make of it, for one head or for many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...base.arguments import check_logits, stacked
from ...base.draws import Draw
from ...problem import AttentionProblem
from .components import Components
from .laws import stacked_values

if TYPE_CHECKING:
    from ...kernels.sampled import SampledProduct

Array = NDArray[Any]


class Product(NamedTuple):
    """Hold the sampled part of one head: see `kernels.sampled.SampledProduct`."""

    columns: Array
    weights: Array
    fill: Array
    rest: Array
    log_fill: Array
    log_total: Array

    @property
    def mass_outside(self) -> Array:
        """What a row puts on keys that were not drawn."""
        return self.rest.astype(self.fill.dtype) * self.fill


def merged(draw: Draw) -> tuple[Array, Array | None]:
    """Return the distinct columns, ascending, and their factors where these are not 1."""
    columns, where = np.unique(draw["columns"], return_inverse=True)
    factors = draw.get("weights")
    if factors is None and len(columns) == len(where):
        return columns, None
    return columns, np.bincount(where, factors, minlength=len(columns))


def stored_product(c: Components, problem: AttentionProblem, draw: Draw) -> Product:
    """Return one pass over the sampled columns that stores their weights."""
    columns, factors = merged(draw)
    made, rest = sampled_products(c, [problem], [columns], [factors], False)
    return Product(
        columns,
        made.weights[0],
        made.fill[0],
        rest[0],
        made.log_fill[0],
        made.log_total[0],
    )


def sampled_products(
    c: Components,
    problems: Sequence[AttentionProblem],
    columns: Sequence[Array],
    factors: Sequence[Array | None],
    multiply: bool,
) -> tuple[SampledProduct, Array]:
    """Return the pass over equally many columns of heads that are alike, and key counts.

    ``multiply``: the product with V; otherwise the weights are stored.
    """
    from ...kernels.sampled import sampled_product

    first = problems[0]
    heads, chosen = len(problems), np.stack(columns)
    keep = np.ones((heads, first.n_k), bool)
    visible = np.empty((heads, first.n_q), np.int64)
    for h, problem in enumerate(problems):
        if problem.key_mask is not None:
            keep[h] = problem.key_mask
        visible[h] = problem.visible_counts()
    keep[np.arange(heads)[:, None], chosen] = False
    ends = None
    seen = np.full((heads, first.n_q), chosen.shape[1])
    if first.causal:
        ends = np.clip(np.arange(first.n_q) + first.offset + 1, 0, first.n_k)
        seen = np.stack([np.searchsorted(x, ends) for x in chosen])
    rest = visible - seen
    tail = None
    if c.normalizer == "adaptive" and c.fill == "oracle":
        others = zip(problems, keep, strict=True)
        tail = np.stack([restricted(x, j, with_values=False).logsumexp for x, j in others])
    bias = None
    if any(x is not None for x in factors):
        ones = np.ones(chosen.shape[1])
        logs = [np.log(ones if x is None else x) for x in factors]
        bias = np.stack(logs).astype(first.dtype)
    v = np.empty((heads, first.n_k, 0), first.dtype)
    made = sampled_product(
        stacked([x.arrays.q for x in problems]),
        stacked([x.arrays.k for x in problems]),
        stacked_values(problems) if multiply else v,
        chosen,
        scale=first.scale,
        kind=c.fill if c.normalizer == "adaptive" else "none",
        seen=seen,
        rest=rest,
        keep=keep,
        bias=bias,
        tail=tail,
        ends=ends,
        store=not multiply,
    )
    for log_total in made.log_total:
        check_logits(log_total)
    return made, rest


def restricted(problem: AttentionProblem, keys: Array, *, with_values: bool) -> AttentionProblem:
    """Return the problem in which only some keys are left."""
    return AttentionProblem(
        problem.q,
        problem.k,
        problem.v if with_values else None,
        scale=problem.scale,
        causal=problem.causal,
        key_mask=keys,
    )
