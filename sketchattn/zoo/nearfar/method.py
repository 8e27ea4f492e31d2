"""NearFar: own and near keys exactly, far clusters by count, mean key and variance."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...base.arguments import check_choice, check_count, check_not_negative
from ...base.draws import Draw
from ...operators.base import AttentionOperator
from ...operators.factored import zero_attention
from ...operators.nearfar import NearFarAttention, Solved, kept_rows, log_sums, solve
from ...operators.nearfar_levels import TwoLevelAttention, levels_of, solve_levels
from ...operators.steep import is_steep
from ...problem import AttentionProblem
from ..base import Method, Traits, check_preset, in_force, register
from ..decoding import DecodingState
from .levels import (
    LONG,
    TwoLevels,
    coarse_of,
    default_sizes,
    levels_in_blocks,
    levels_of_all_keys,
)
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
from .state import STEP_CLUSTERS, STEP_NEAR, STEP_TAU, NearFarState

Array = NDArray[Any]

REGIONS = ("auto", "blocks", "all")
METRICS = ("auto", "key", "query")
SECOND_ORDERS = ("frozen", "none")
# Share of their mass that rows put on their own block, above that of equal weights, from which on
# blocks are better than clusters of all keys: heads with rotary positions lie above, most others
# below.
LOCAL = 0.22
CLUSTERS, NEAR, TAU = 8, 16, 0.01
LEVELS = "2 is for long heads"
# The same of all keys, and of blocks without a mask of order, which have more far clusters: from
# so many keys on even more candidates.
ALL_NEAR, FULL_NEAR, FULL_TAU, MANY, MANY_NEAR = 12, 24, 0.015, 16384, 32


# Claims about every choice, and about those of phi and of the first order.
CLAIMS = (
    "nearfar.rows",
    "nearfar.exact_near",
    "nearfar.exact_keys",
    "nearfar.interval",
    "nearfar.tanh",
    "nearfar.merge",
    "nearfar.causal",
    "nearfar.estimate",
)
SECOND_ORDER_CLAIMS = {
    "frozen": ("nearfar.frozen", "nearfar.frozen_above", "nearfar.frozen_gap"),
    "none": ("nearfar.jensen", "nearfar.promotion"),
}
FIRST_ORDER_CLAIMS = ("nearfar.first_order_divergence", "nearfar.first_order_rate")


class Choices(NamedTuple):
    """Name the choices that make one estimator."""

    clusters: int | None = None
    near: int | None = None
    tau: float | None = None


PRESETS: dict[str, dict[str, Any]] = {
    "accurate": {"clusters": CLUSTERS, "near": NEAR, "tau": TAU},
    "fast": {"clusters": CLUSTERS, "tau": 0.04},
}


def default_choice(problem: AttentionProblem, blocks: bool, two: bool) -> tuple[int, float]:
    """Return how many clusters a row may choose, and what keeps them."""
    if two:
        return 2 * NEAR, TAU
    if not blocks:
        return ALL_NEAR, TAU
    if problem.causal:
        return NEAR, TAU
    return FULL_NEAR if problem.n_k < MANY else MANY_NEAR, FULL_TAU


class Plan(NamedTuple):
    """Hold everything that the choices come to on a problem."""

    regions: Regions | TwoLevels
    near: int
    tau: float


@register("nearfar")
class NearFar(Method):
    """Read own and near keys one by one, and far ones by the moments of their clusters.

    Keys form clusters.  A row reads its own block and the clusters that matter to it key by key,
    and of every other cluster c the logarithm of its mass,
    ``g_ic = ln m_c + scale q_i . kappa_c + phi(sigma_ic, m_c)``, from its count, mean key and
    ``sigma_ic^2 = scale^2 sum_t q_it^2 Var_c(k_t)``, and its mean value:
    ``Ahat_ij = exp(L_ij) / Zhat_i`` for keys that it reads, ``exp(g_ic) / (m_c Zhat_i)`` for the
    others.

    Parameters
    ----------
    rank : int, optional
        Budget of clusters and near keys of a row, own keys not counted, in 1..n_k: half of it at
        most is for clusters, what is left for near keys.  Fewer are read where tau says so; their
        mean is ``effective_rank``.  None: no budget.
    block : int, optional
        Keys B of a block, at least 1.  None: the power of two up to ``4 sqrt(n_k)``.
    clusters : int, optional
        Clusters C of a block, at least 1; of all n_k keys ``n_k C / B``.  None: 8.
    near : int, optional
        Clusters p that a row may read key by key: those of largest mass.  None: what the rank
        leaves; without one 12 for clusters of all keys, 16 for blocks of causal rows, 24 for those
        of others, and 32 from 16384 keys on.
    tau : float, optional
        Of these, the clusters are read whose share times ``sigma^2`` is at least tau; 0: all.
        None: 0.01, and 0.015 for blocks of rows that are not causal.
    first_order : int, optional
        Directions of the correction of mean values to first order,
        ``vbar_c + clip(scale q_i . p_c) beta_c``, at most d; the clip keeps weights nonnegative.
        None: 1 for clusters of all keys, 0 for those of blocks.
    regions : {"auto", "blocks", "all"}
        Clusters of each block of consecutive keys beside the exact own block, or of all keys
        without any own ones.  Causal rows have blocks.  "auto" takes blocks for other rows, too,
        where 64 of them have 22 % of their mass in their own block beyond what equal weights have.
    metric : {"auto", "key", "query"}
        Distances of keys in clusters: theirs, or those of ``K M^(1/2)`` with the second moment M
        of the queries.  "auto": "query" for clusters of all keys.  Causal rows take "key", for M
        would look ahead.
    second_order : {"frozen", "none"}
        phi: ``sigma^2/2``, frozen beyond the expected maximum of m_c normal numbers, and at most
        ``|scale q_i|`` times the radius of the cluster; or 0, with which every ``g_ic`` and the
        normaliser are lower bounds.
    levels : {None, 1, 2}
        2 groups clusters to coarse ones: a row sees the blocks beside its own directly, what is
        farther away as coarse clusters, and the clusters of a coarse one where its share asks for
        them, by the rule of near clusters and up to p; what a row reads then grows like sqrt(n),
        from little.  None: 2 from 65536 kept keys on, without a rank.
    preset : {None, "accurate", "fast"}
        ``clusters=8, near=16, tau=0.01``; ``clusters=8, tau=0.04``.

    Raises
    ------
    TypeError, ValueError
        For values out of range.

    Notes
    -----
    Ours, without a paper; relatives are treecodes, and Combiner with learned regions.  Nothing is
    drawn.  Blocks are clustered one by one, from the farthest keys and with four steps of Lloyd, so
    that no causal row depends on later keys; its block is that of the last key that it sees.  Rows
    that are not causal own the block of their position, if there is one query for each kept key.
    Exact where rows may choose all that they see and tau is 0, where n_k is at most B with a mask
    of order, and where keys are equal inside each cluster.

    Cost of a row: its own keys, R clusters with three products in place of two, and near keys; to
    find clusters, about ``10 n_k C d``.

    `state` has one level of blocks, and clusters each when it is complete.  With ``block`` given,
    its rows are those of a causal problem with the same parameters.  With ``block=None`` it is
    ``B = default_block(length)``, and what else is None is chosen for single rows, which cost what
    they read: 16 clusters, ``near = B / 8``, ``tau = 0.003``.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.load_heads("minilm")[5]
    >>> ahat = sa.NearFar(preset="fast").approximate(problem)
    >>> error = sa.error_report(problem, ahat, spectral=False).output_fro_rel
    >>> bool(error < 0.2), bool(ahat.work(problem) < 0.6)
    (True, True)
    """

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
        levels: int | None = None,
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
        self.levels = levels
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
            claims=self._claims(),
            decoding=True,
        )

    def _claims(self) -> tuple[str, ...]:
        first_order = FIRST_ORDER_CLAIMS if self.first_order in (None, 1) else ()
        return CLAIMS + SECOND_ORDER_CLAIMS.get(self.second_order, ()) + first_order

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
        if self.tau is not None:
            check_not_negative(self.tau, "tau", "0 reads all candidates")
        if self.clusters is not None and self.block is not None and self.clusters > self.block:
            raise ValueError(
                f"clusters must be at most block = {self.block}, got {self.clusters}; lower it"
            )
        check_choice(self.regions, "regions", REGIONS)
        check_choice(self.metric, "metric", METRICS)
        check_choice(self.second_order, "second_order", SECOND_ORDERS)
        if self.levels is not None and check_count(self.levels, "levels", LEVELS) > 2:
            raise ValueError(f"levels must be None, 1 or 2, got {self.levels}; {LEVELS}")

    def _plan(self, problem: AttentionProblem) -> Plan:
        """Return clusters, what rows see of them, and what they may choose."""
        c, n = self.choices, len(problem.kept_keys)
        two = self.levels == 2 or (self.levels is None and self.rank is None and n >= LONG)
        if two:
            block, clusters = default_sizes(n, self.block, c.clusters)
        else:
            block = min(default_block(n) if self.block is None else int(self.block), n)
            clusters = min(CLUSTERS if c.clusters is None else int(c.clusters), block)
        sizes = Sizes(block, clusters, NEAR if c.near is None else int(c.near))
        if self.rank is not None:
            fixed = self.block is not None or c.clusters is not None
            sizes = within_rank(n, int(self.rank), sizes, fixed, c.near)
        blocks = self._in_blocks(problem, sizes.block)
        near, tau = default_choice(problem, blocks, two)
        if c.near is None and self.rank is None:
            sizes = sizes._replace(near=near)
        tau = tau if c.tau is None else float(c.tau)
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
        count = -(-n * sizes.clusters // sizes.block)
        regions: Regions | TwoLevels
        if two:
            coarse = coarse_of(n, sizes.block, sizes.clusters, sizes.near)
            if blocks:
                regions = levels_in_blocks(problem, sizes, coarse, root, directions, second)
            else:
                regions = levels_of_all_keys(problem, count, coarse, root, directions, second)
        elif blocks:
            regions = in_blocks(problem, sizes, root, directions, second)
        else:
            regions = of_all_keys(problem, count, root, directions, second)
        return Plan(regions, min(sizes.near, regions.clusters.count), tau)

    def _in_blocks(self, problem: AttentionProblem, block: int) -> bool:
        """Say whether clusters are those of blocks, for which a causal row has no choice."""
        if problem.causal or self.regions != "auto":
            return bool(problem.causal) or self.regions == "blocks"
        if problem.n_q != len(problem.kept_keys):
            return False
        equal = block / problem.n_q
        return own_share(problem, block) >= equal + LOCAL * (1 - equal)

    def _state(self, problem: AttentionProblem, length: int) -> DecodingState:
        c, given = self.choices, self.block is not None
        block = default_block(length) if self.block is None else int(self.block)
        clusters, near, tau = CLUSTERS, NEAR, TAU
        if not given:
            clusters, near, tau = STEP_CLUSTERS, max(1, block // STEP_NEAR), STEP_TAU
        clusters = min(clusters if c.clusters is None else int(c.clusters), block)
        sizes = Sizes(block, clusters, near if c.near is None else int(c.near))
        if self.rank is not None:
            fixed = given or c.clusters is not None
            sizes = within_rank(length, int(self.rank), sizes, fixed, c.near)
        directions = 0 if self.first_order is None else min(int(self.first_order), problem.d)
        tau = tau if c.tau is None else float(c.tau)
        return NearFarState(problem, sizes, tau, directions, self.second_order == "frozen")

    def _attend_with_lse(self, problem: AttentionProblem, draw: Draw) -> tuple[Array, Array]:
        values = problem.arrays.v
        values = problem.values if values is None else values
        if len(problem.kept_keys) == 0:
            out = np.zeros((problem.n_q, values.shape[1]), problem.dtype)
            return out, np.full(problem.n_q, -np.inf, problem.dtype)
        if is_steep(problem):
            ahat = self._matrix(problem)
            return np.asarray(ahat @ values), ahat.log_normalizer
        made = solved(problem, kept_rows(problem, values), self._plan(problem))
        return made.out, log_sums(made.top, made.total)

    def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        if len(problem.kept_keys) == 0:
            return zero_attention(problem)
        return self._matrix(problem)

    def _matrix(self, problem: AttentionProblem) -> NearFarAttention:
        """Return the matrix of a problem with a key that is kept."""
        regions, near, tau = self._plan(problem)
        if isinstance(regions, TwoLevels):
            return TwoLevelAttention(problem, *regions, near, tau)
        return NearFarAttention(problem, *regions, near, tau)


def solved(problem: AttentionProblem, values: Array, plan: Plan) -> Solved:
    """Return the product with the values of kept keys; what rows choose is not kept."""
    regions, near, tau = plan
    k = kept_rows(problem, problem.arrays.k)
    m = regions.clusters.moments(k)
    if not isinstance(regions, TwoLevels):
        return solve(problem, k, values, m, regions.rows, near, tau)
    clusters, groups, rows = regions
    levels = levels_of(m, groups, clusters.second_order)
    chosen = np.empty((0, groups.most), np.int32), np.empty((0, near), np.int32)
    return solve_levels(problem, k, values, m, levels, rows, tau, chosen, choose=True)
