"""NearFar: own and near keys exactly, far clusters by count, mean key and variance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...base.arguments import check_choice, check_count
from ...base.draws import Draw
from ...operators.base import AttentionOperator
from ...operators.factored import zero_attention
from ...operators.nearfar import NearFarAttention, kept_rows, log_sums, solve
from ...problem import AttentionProblem
from ..base import Method, Traits, check_preset, in_force, register
from .regions import (
    Regions,
    Sizes,
    default_block,
    in_blocks,
    metric_root,
    of_all_keys,
    own_share,
    within_rank,
)

Array = NDArray[Any]

REGIONS = ("auto", "blocks", "all")
METRICS = ("auto", "key", "query")
SECOND_ORDERS = ("frozen", "none")
# What rows of A put on their own block, from which on blocks are better than clusters of all keys.
LOCAL = 0.3
CLUSTERS, NEAR, TAU = 8, 16, 0.01


class Choices(NamedTuple):
    """Name the choices that make one estimator."""

    clusters: int | None = None
    near: int | None = None
    tau: float | None = None


PRESETS: dict[str, dict[str, Any]] = {
    "accurate": {"clusters": CLUSTERS, "near": NEAR, "tau": TAU},
    "fast": {"clusters": 4, "near": 8, "tau": 0.03},
}


class Plan(NamedTuple):
    """Hold everything that the choices come to on a problem."""

    regions: Regions
    near: int
    tau: float


@register("nearfar")
class NearFar(Method):
    """Read own and near keys one by one, and far ones by the moments of their clusters."""

    def __init__(
        self,
        rank: int | None = None,
        block: int | None = None,
        clusters: int | None = None,
        near: int | None = None,
        tau: float | None = None,
        first_order: int | None = None,
        regions: str = "auto",
        metric: str = "auto",
        second_order: str = "frozen",
        preset: str | None = None,
    ) -> None:
        self.rank = rank
        self.block = block
        self.clusters = clusters
        self.near = near
        self.tau = tau
        self.first_order = first_order
        self.regions = regions
        self.metric = metric
        self.second_order = second_order
        self.preset = preset

    @property
    def choices(self) -> Choices:
        """The choices in force: the arguments, and what the preset sets."""
        return in_force(self, Choices(), PRESETS)

    @property
    def traits(self) -> Traits:
        """Every shape and mask; rows sum to one, entries are not negative."""
        return Traits(
            causal=True,
            key_mask=True,
            randomized=False,
            row_stochastic=True,
            nonnegative=True,
            logsumexp=True,
        )

    def _check_parameters(self) -> None:
        check_preset(self, Choices(), PRESETS)
        for name, what, low in (
            ("block", "it is the number of keys of a block", 1),
            ("clusters", "1 makes one cluster of a block", 1),
            ("near", "0 reads no far key", 0),
            ("first_order", "0 leaves the correction out", 0),
        ):
            value = getattr(self, name)
            if value is not None:
                check_count(value, name, what, low=low)
        check_choice(self.regions, "regions", REGIONS)
        check_choice(self.metric, "metric", METRICS)
        check_choice(self.second_order, "second_order", SECOND_ORDERS)

    def _plan(self, problem: AttentionProblem) -> Plan:
        """Return clusters, what rows see of them, and what they may choose."""
        c, n = self.choices, len(problem.kept_keys)
        block = min(default_block(n) if self.block is None else int(self.block), n)
        clusters = min(CLUSTERS if c.clusters is None else int(c.clusters), block)
        near = NEAR if c.near is None else int(c.near)
        sizes = Sizes(block, clusters, near)
        if self.rank is not None:
            fixed = self.block is not None or c.clusters is not None
            sizes = within_rank(n, int(self.rank), sizes, fixed, c.near)
        blocks = self._in_blocks(problem, sizes.block)
        tau = TAU if c.tau is None else float(c.tau)
        metric = self.metric
        if metric == "auto":
            metric = "key" if blocks else "query"
        if problem.causal:
            metric = "key"
        root = metric_root(problem) if metric == "query" else None
        order = self.first_order
        directions = int(not blocks) if order is None else int(order)
        directions = min(directions, problem.d)
        second = self.second_order == "frozen"
        if blocks:
            regions = in_blocks(problem, sizes, root, directions, second)
        else:
            count = -(-n * sizes.clusters // sizes.block)
            regions = of_all_keys(problem, count, root, directions, second)
        return Plan(regions, min(sizes.near, regions.clusters.count), tau)

    def _in_blocks(self, problem: AttentionProblem, block: int) -> bool:
        """Say whether clusters are those of blocks, for which a causal row has no choice."""
        if problem.causal or self.regions != "auto":
            return bool(problem.causal) or self.regions == "blocks"
        if problem.n_q != len(problem.kept_keys):
            return False
        return own_share(problem, block) >= LOCAL

    def _attend_with_lse(self, problem: AttentionProblem, draw: Draw) -> tuple[Array, Array]:
        values = problem.arrays.v
        values = problem.values if values is None else values
        if len(problem.kept_keys) == 0:
            out = np.zeros((problem.n_q, values.shape[1]), problem.dtype)
            return out, np.full(problem.n_q, -np.inf, problem.dtype)
        (clusters, rows), near, tau = self._plan(problem)
        k = kept_rows(problem, problem.arrays.k)
        made = solve(
            problem, k, kept_rows(problem, values), clusters.moments(k), rows, near, tau
        )
        return made.out, log_sums(made.top, made.total)

    def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        if len(problem.kept_keys) == 0:
            return zero_attention(problem)
        (clusters, rows), near, tau = self._plan(problem)
        return NearFarAttention(problem, clusters, rows, near, tau)
