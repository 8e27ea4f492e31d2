"""NearFar: own and near keys exactly, far clusters by count, mean key and variance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...base.arguments import (
    check_choice,
    check_count,
    check_not_negative,
    check_positive,
    stacked,
)
from ...base.draws import Draw, Rng
from ...errors.certificates import check_confidence, check_kind
from ...operators.base import AttentionOperator
from ...operators.factored import zero_attention
from ...operators.nearfar import Moments, NearFarAttention, Solved, kept_rows, log_sums, solve
from ...operators.nearfar_coreset import CoresetNearFarAttention, attend_once
from ...operators.nearfar_levels import TwoLevelAttention, levels_of, solve_levels
from ...operators.solve import solution
from ...operators.steep import is_steep
from ...problem import AttentionProblem
from ..base import Method, Traits, check_preset, in_force, register
from ..decoding import DecodingState
from ..wildcat import WildCat
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
    spent,
    within_rank,
)
from .state import STEP_CLUSTERS, STEP_NEAR, STEP_TAU, NearFarState
from .tolerance import (
    NAMES,
    CertifiedExact,
    CertifiedNearFar,
    Found,
    Search,
    check_rows,
    draw_rows,
    marked,
)

Array = NDArray[Any]

REGIONS = ("auto", "blocks", "all")
METRICS = ("auto", "key", "query")
SECOND_ORDERS = ("frozen", "none")
FARS = ("moments", "coreset")
# Share of their mass that rows put on their own block, above that of equal weights, from which on
# blocks are better than clusters of all keys: heads with rotary positions lie above, most others
# below.
LOCAL = 0.22
CLUSTERS, NEAR, TAU = 8, 16, 0.01
LEVELS = "2 is for long heads"
# The same of all keys, and of blocks without a mask of order, which have more far clusters: from
# so many keys on even more candidates.
ALL_NEAR, FULL_NEAR, FULL_TAU, MANY, MANY_NEAR = 12, 24, 0.015, 16384, 32
# Beside a coreset, which has one pivot for so many keys.
CORESET_NEAR, CORESET_TAU, A_PIVOT = 4, 0.0, 32


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
    room: int | None


class Table(NamedTuple):
    """Hold all of that which is made of keys."""

    plan: Plan
    k: Array
    moments: Moments


class Layout(NamedTuple):
    """Hold the choices as they are made on a problem, before any cluster is."""

    sizes: Sizes
    tau: float
    blocks: bool
    metric: str
    directions: int
    two: bool


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
        Budget of clusters and near keys of a row, own keys not counted, in 1..n_k: no row has more
        of both together.  All of it is for clusters below ``sqrt(8 n_k)``, from there on half, and
        what is left for near keys: the clusters of largest mass that fit.  Fewer are read where tau
        says so; the mean of what is used is ``effective_rank``.  None: no budget.
    block : int, optional
        Keys B of a block, at least 1; more where a rank asks for it.  None: the power of two up to
        ``4 sqrt(n_k)``.
    clusters : int, optional
        Clusters C of a block, at least 1; of all n_k keys ``n_k C / B``; fewer where a rank asks
        for it.  None: 8.
    near : int, optional
        Clusters p that a row may read key by key: those of largest mass.  None: as many as the rank
        has room for; without one 12 for clusters of all keys, 16 for blocks of causal rows, 24 for
        those of others, and 32 from 16384 keys on.
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
        from little.  None: 2 from 65536 kept keys on, without a rank or a tolerance.
    tolerance : float, optional
        Above 0: an error ``|Ohat - O|_F / |O|_F`` of the output that is accepted.  near and tau are
        found for it, on a few rows that are drawn and computed exactly; the output is certified
        from others, and is exact attention where nothing cheaper has a certificate.  See Notes.
        Not with rank, near, tau or a preset; all other parameters hold for what is tried.
    confidence : float, default 0.95
        In (0, 1): the probability, over the draw of rows, that the certificate is true.
    kind : {"finite-sample", "approximate"}
        Of the certificate, as for `certify`: always true, but from some of the rows never small; or
        tight, and silent about few rows that are wrong where others are right.
    far : {"moments", "coreset"}
        What stands for keys that a row does not read: the moments of their clusters; or pivots of
        WildCat, weighted for all keys, less what these say of the near clusters.  For rows of few
        reads, below some 5 % of the keys, on diffuse heads.  Not causal.  See Notes.
    pivots : int, optional
        Pivots of the coreset, in 1..n_k.  None: ``n_k / 32``; with a rank half of it.
    preset : {None, "accurate", "fast"}
        ``clusters=8, near=16, tau=0.01``; ``clusters=8, tau=0.04``.

    Raises
    ------
    TypeError, ValueError
        For values out of range.

    Notes
    -----
    Ours, without a paper; relatives are treecodes, and Combiner with learned regions.  Nothing is
    drawn without a tolerance or a coreset.  Blocks are clustered one by one, from the farthest keys
    and with four steps of Lloyd, so that no causal row depends on later keys; its block is that of
    the last key that it sees.  Rows that are not causal own the block of their own key if n_q is
    n_k, and that of the last kept key before it where it is hidden.
    Exact where rows may choose all that they see and tau is 0, where n_k is at most B with a mask
    of order, and where keys are equal inside each cluster.

    Cost of a row: its own keys, R clusters with three products in place of two, and near keys; to
    find clusters, about ``10 n_k C d``.

    `state` has one level of blocks, and clusters each when it is complete.  With ``block`` given,
    its rows are those of a causal problem with the same parameters.  With ``block=None`` it is
    ``B = default_block(length)``, and what else is None is chosen for single rows, which cost what
    they read: 16 clusters, ``near = B / 8``, ``tau = 0.003``.

    **With a coreset** of r pivots s and weights W (`WildCat` with its defaults, and its draw),
    ``Zhat_i ohat_i = sum_s e_is (W V)_s + sum_{c near} [sum_{j in c} exp(L_ij) v_j - sum_s e_is
    (W_c V_c)_s]``, ``e_is = exp(L_is)``, and Zhat_i is the same with V = 1.  Near clusters, of all
    keys, are the p of largest mean weight ``exp(g_ic) / m_c``, by moments, of which tau keeps those
    whose share of Zhat_i before asks for it; near is 4 by default and tau 0.  Rows sum to one, up
    to the rounding of their absolute terms; entries may be negative, as those of W.  A row whose
    Zhat_i would be at most 1e-12 of its absolute terms (or their rounding), or half of the mass
    that it reads key by key, and one whose logits are too large for one normaliser in several
    products, has moments for its far clusters.
    Exact where all clusters are near, WildCat without any.  A rank is pivots and near keys.  A draw
    holds ``pivots``, as that of `WildCat` with as many.

    **With a tolerance** the operator of `approximate` has, beside its products, ``certificate``, an
    `ErrorCertificate` of ``Ahat V``; ``setting``, the parameters that make the same bits without
    a tolerance, None for exact attention; ``refused``, certificates of earlier attempts that were
    above the tolerance; ``tried``, upper ends in the trial; and ``seconds`` of its parts.

    *What the confidence covers.*  For this one head, given Q, K and V, and over the rows that are
    drawn: with this probability the error of the output that was delivered lies in the interval of
    ``certificate``, whose upper end is at most the tolerance.  The choice of the setting is
    accounted for: certificates are from rows of their own, independent of all that led to the
    output, and each of two attempts at most has the level ``(1 - confidence) / 2``.  In the trial
    the upper ends of all K settings hold together, asymptotically, each at
    ``(1 - confidence) / K``; they only decide what is run.  Other heads, of one call too, have
    confidences of their own.  Exact rows have the rounding of the problem's precision, and so has
    exact attention, whose certificate says 0.

    With the kind "finite-sample" all this is true for every head.  An upper end is then at least
    about ``sqrt(log(4 / (1 - confidence)) b / (m |o|^2))`` from m rows, b the most that a row can
    be off in the hull of the values and ``|o|^2`` the size of a row of O: on real heads 0.05 takes
    tens of thousands of rows, so that up to n = 16384 the answer to small tolerances is exact
    attention, without any trial.  "approximate" takes ``max(256, n_q / 32)`` rows, holds
    asymptotically, and takes the rows that it saw for typical.  **This method does err on few
    rows**, those that look for one key in a far cluster which does not show it: on two of 24 real
    heads one row in a thousand holds a third or more of the squared error, and up to a third of
    such certificates missed it.

    *Later positions.*  A causal row reads earlier keys only, but the setting was chosen by rows
    that see later ones: ``traits.autoregressive`` is False with a tolerance.  A decoder runs with
    the ``setting`` that was found.  The setting depends on V too.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.load_heads("minilm")[5]
    >>> ahat = sa.NearFar(preset="fast").approximate(problem)
    >>> error = sa.error_report(problem, ahat, spectral=False).output_fro_rel
    >>> bool(error < 0.2), bool(ahat.work(problem) < 0.6)
    (True, True)
    >>> print(sa.NearFar(tolerance=0.05).approximate(problem, rng=0).certificate)
    error 0; exact: all 512 rows
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
        tolerance: float | None = None,
        confidence: float = 0.95,
        kind: str = "finite-sample",
        far: str = "moments",
        pivots: int | None = None,
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
        self.tolerance = tolerance
        self.confidence = confidence
        self.kind = kind
        self.far = far
        self.pivots = pivots
        self.preset = preset

    @property
    def choices(self) -> Choices:
        """The choices in force: the arguments, and what the preset sets."""
        return in_force(self, Choices(), PRESETS)

    @property
    def traits(self) -> Traits:
        """Every shape and mask; rows sum to one, entries are not negative.

        With a tolerance rows are drawn, and the setting that all rows have looks at later ones.
        With a coreset pivots are drawn, rows are not causal, and entries may be negative.
        """
        if self.far == "coreset":
            return Traits(key_mask=True, row_stochastic=True, logsumexp=True)
        return Traits(
            causal=True,
            key_mask=True,
            randomized=self.tolerance is not None,
            autoregressive=self.tolerance is None,
            row_stochastic=True,
            nonnegative=True,
            logsumexp=True,
            claims=self._claims(),
            decoding=True,
        )

    @property
    def draw_names(self) -> tuple[str, ...]:  # type: ignore[override]  # they depend on parameters
        """Names of the arrays of a draw."""
        if self.far == "coreset":
            return WildCat.draw_names
        return () if self.tolerance is None else NAMES

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
        check_choice(self.far, "far", FARS)
        if self.levels is not None and check_count(self.levels, "levels", LEVELS) > 2:
            raise ValueError(f"levels must be None, 1 or 2, got {self.levels}; {LEVELS}")
        check_confidence(self.confidence)
        check_kind(self.kind)
        if self.tolerance is not None:
            check_positive(self.tolerance, "tolerance")
            for name in ("rank", "near", "tau", "preset"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} must be None with a tolerance, which finds near and tau itself, "
                        f"got {getattr(self, name)!r}; drop one of them"
                    )
            if self.levels == 2:
                raise ValueError(
                    "levels must be None or 1 with a tolerance, whose settings have one level, got "
                    "2; drop one of them"
                )

        if self.far == "coreset":
            self._check_coreset()
        elif self.pivots is not None:
            raise ValueError(
                f"pivots must be None with far='moments', which has none, got {self.pivots}; pass "
                "far='coreset'"
            )

    def _check_coreset(self) -> None:
        """Refuse what has no meaning beside pivots that stand for all keys."""
        if self.pivots is not None:
            count = check_count(self.pivots, "pivots", "they stand for all keys")
            if self.rank is not None and count > int(self.rank):
                raise ValueError(
                    f"pivots must be at most rank = {self.rank}, the budget of pivots and near "
                    f"keys, got {count}; raise rank or lower pivots"
                )
        for name, known, why in (
            ("levels", (None, 1), "which has one level"),
            ("first_order", (None, 0), "which has no mean values to correct"),
            ("regions", ("auto", "all"), "whose clusters are those of all keys"),
            ("tolerance", (None,), "for which no setting is found"),
        ):
            value = getattr(self, name)
            if value not in known:
                wanted = " or ".join(repr(x) for x in known)
                raise ValueError(
                    f"{name} must be {wanted} with far='coreset', {why}, got {value!r}; drop one "
                    "of them"
                )

    def _check_for(self, problem: AttentionProblem, keys: int) -> None:
        if self.far == "coreset" and problem.causal:
            raise ValueError(
                f"causal must be False for method {self.name!r} with far='coreset', whose pivots "
                f"stand for all keys, got {problem.causal!r}; take far='moments'"
            )
        super()._check_for(problem, keys)

    # --- a coreset ------------------------------------------------------------------------

    def _pivots(self, n: int) -> int:
        """Return how many of n kept keys are pivots at most."""
        count = max(1, n // A_PIVOT if self.rank is None else (int(self.rank) + 1) // 2)
        return max(1, min(count if self.pivots is None else int(self.pivots), n))

    def _wildcat(self, problem: AttentionProblem) -> WildCat:
        """Return the method that draws the pivots and weighs them."""
        return WildCat(rank=self._pivots(len(problem.kept_keys)))

    def _coreset(self, problem: AttentionProblem, draw: Draw) -> tuple[Any, ...]:
        """Return what an operator with pivots is made of: those, clusters, rows and choices."""
        regions, near, tau, room = self._plan(problem)
        assert isinstance(regions, Regions)
        pivots, weights = self._wildcat(problem)._weighted(problem, draw)
        return pivots, weights, *regions, near, tau, room

    # --- a tolerance ----------------------------------------------------------------------

    def _draw(self, problem: AttentionProblem, rng: np.random.Generator) -> Draw:
        if self.far == "coreset":
            return self._wildcat(problem)._draw(problem, rng)
        return Draw() if self.tolerance is None else draw_rows(problem, rng)

    def _check_draw(self, problem: AttentionProblem, draw: Mapping[str, Any]) -> Draw:
        if self.far == "coreset":
            return self._wildcat(problem)._check_draw(problem, draw)
        if self.tolerance is None:
            return super()._check_draw(problem, draw)
        return check_rows(problem, draw)

    def _within(self, problem: AttentionProblem, draw: Draw) -> tuple[Found, dict[str, Any]]:
        """Return what answers the tolerance, and the parameters of what is tried."""
        assert self.tolerance is not None
        _ = problem.values
        search = Search(problem, float(self.tolerance), float(self.confidence), self.kind, draw)
        n = len(problem.kept_keys)
        size = min(default_block(n) if self.block is None else int(self.block), max(n, 1))
        count = min(CLUSTERS if self.clusters is None else int(self.clusters), size)
        if not search.worth(size, count, bool(problem.causal) or self.regions != "all"):
            return search.exact(), {}
        shared: dict[str, Any] = {"second_order": self.second_order, "levels": 1}

        def regions() -> Regions:
            layout = self._layout(problem)
            shared.update(
                block=layout.sizes.block,
                clusters=layout.sizes.clusters,
                first_order=layout.directions,
                regions="blocks" if layout.blocks else "all",
                metric=layout.metric,
            )
            made = self._regions(problem, layout)
            assert isinstance(made, Regions)
            return made

        return search.answer(regions), shared

    def _certified(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        """Return the operator that answers the tolerance."""
        found, shared = self._within(problem, draw)
        if found.rung is None or found.regions is None:
            return marked(CertifiedExact(problem), found, None)
        near, tau = found.rung
        made = CertifiedNearFar(problem, *found.regions, near, tau)
        return marked(made, found, {**shared, "near": near, "tau": tau})

    # --- what it makes --------------------------------------------------------------------

    def _plan(self, problem: AttentionProblem) -> Plan:
        """Return clusters, what rows see of them, and what they may choose."""
        layout = self._layout(problem)
        regions = self._regions(problem, layout)
        sizes = layout.sizes
        return Plan(regions, min(sizes.near, regions.clusters.count), layout.tau, sizes.room)

    def _table(self, problem: AttentionProblem) -> Table:
        """Return the same with kept keys and their moments."""
        plan, k = self._plan(problem), kept_rows(problem, problem.arrays.k)
        return Table(plan, k, plan.regions.clusters.moments(k))

    def _layout(self, problem: AttentionProblem) -> Layout:
        """Return what is chosen where the caller chose nothing."""
        c, n = self.choices, len(problem.kept_keys)
        # Settings for a tolerance are compared on one level.
        free = self.levels is None and self.rank is None and self.tolerance is None
        coreset = self.far == "coreset"
        two = self.levels == 2 or (free and n >= LONG and not coreset)
        if two:
            block, clusters = default_sizes(n, self.block, c.clusters)
        else:
            block = min(default_block(n) if self.block is None else int(self.block), n)
            clusters = min(CLUSTERS if c.clusters is None else int(c.clusters), block)
        sizes = Sizes(block, clusters, NEAR if c.near is None else int(c.near))
        blocks = not coreset and self._in_blocks(problem, sizes.block)
        if coreset:
            sizes = self._sizes_beside(n, sizes)
        elif self.rank is not None:
            sizes = within_rank(n, int(self.rank), sizes, c.near, blocks)
        near, tau = default_choice(problem, blocks, two)
        if coreset:
            near, tau = CORESET_NEAR, CORESET_TAU
        if c.near is None and self.rank is None:
            sizes = sizes._replace(near=near)
        tau = tau if c.tau is None else float(c.tau)
        metric = self.metric
        if metric == "auto":
            metric = "key" if blocks else "query"
        if problem.causal:
            metric = "key"
        order = self.first_order
        directions = int(not blocks and not coreset) if order is None else int(order)
        return Layout(sizes, tau, blocks, metric, min(directions, problem.d), two)

    def _regions(self, problem: AttentionProblem, layout: Layout) -> Regions | TwoLevels:
        """Return clusters, and what rows see of them."""
        sizes, n = layout.sizes, len(problem.kept_keys)
        root = metric_root(problem) if layout.metric == "query" else None
        second = self.second_order == "frozen"
        count = -(-n * sizes.clusters // sizes.block)
        if layout.two:
            coarse = coarse_of(n, sizes.block, sizes.clusters, sizes.near)
            if layout.blocks:
                return levels_in_blocks(problem, sizes, coarse, root, layout.directions, second)
            return levels_of_all_keys(problem, count, coarse, root, layout.directions, second)
        if layout.blocks:
            return in_blocks(problem, sizes, root, layout.directions, second)
        return of_all_keys(problem, count, root, layout.directions, second)

    def _sizes_beside(self, n: int, sizes: Sizes) -> Sizes:
        """Return sizes with near keys within what the pivots leave of a rank."""
        if self.rank is None:
            return sizes
        return spent(sizes, n, int(self.rank) - self._pivots(n), self.choices.near)

    def _in_blocks(self, problem: AttentionProblem, block: int) -> bool:
        """Say whether clusters are those of blocks, for which a causal row has no choice."""
        if problem.causal or self.regions != "auto":
            return bool(problem.causal) or self.regions == "blocks"
        if problem.n_q != problem.n_k:
            return False
        equal = block / len(problem.kept_keys)
        return own_share(problem, block) >= equal + LOCAL * (1 - equal)

    def _state(self, problem: AttentionProblem, length: int) -> DecodingState:
        if self.tolerance is not None:
            raise ValueError(
                f"tolerance must be None for a decoder, whose later rows nobody can try, got "
                f"{self.tolerance}; pass the setting that a finished head was given"
            )
        if self.levels == 2:
            raise ValueError("levels must be None or 1 for a decoder, got 2; its state has one")
        c, given = self.choices, self.block is not None
        block = default_block(length) if self.block is None else int(self.block)
        clusters, near, tau = CLUSTERS, NEAR, TAU
        if not given:
            clusters, near, tau = STEP_CLUSTERS, max(1, block // STEP_NEAR), STEP_TAU
        clusters = min(clusters if c.clusters is None else int(c.clusters), block)
        sizes = Sizes(block, clusters, near if c.near is None else int(c.near))
        if self.rank is not None:
            sizes = within_rank(length, int(self.rank), sizes, c.near, True)
        directions = 0 if self.first_order is None else min(int(self.first_order), problem.d)
        tau = tau if c.tau is None else float(c.tau)
        return NearFarState(problem, sizes, tau, directions, self.second_order == "frozen")

    def _attend_with_lse(self, problem: AttentionProblem, draw: Draw) -> tuple[Array, Array]:
        if self.tolerance is not None:
            found, _ = self._within(problem, draw)
            if found.out is not None and found.lse is not None:
                return found.out, found.lse
            output, lse = solution(problem)
            return output.copy(), lse.copy()
        values = problem.arrays.v
        values = problem.values if values is None else values
        if len(problem.kept_keys) == 0:
            out = np.zeros((problem.n_q, values.shape[1]), problem.dtype)
            return out, np.full(problem.n_q, -np.inf, problem.dtype)
        if self.far == "coreset":
            kept = kept_rows(problem, values)
            return attend_once(problem, kept, *self._coreset(problem, draw))
        if is_steep(problem):
            ahat = self._matrix(problem, draw)
            return np.asarray(ahat @ values), ahat.log_normalizer
        made = solved(problem, kept_rows(problem, values), self._table(problem))
        return made.out, log_sums(made.top, made.total)

    def _attend_heads(
        self,
        problems: Sequence[AttentionProblem],
        rngs: Sequence[Rng],
        draw: Mapping[str, Any] | None,
    ) -> Array:
        """Return ``Ohat`` of heads; causal ones that share keys share clusters, made of keys."""
        out: list[Array] = []
        held: tuple[AttentionProblem, Table] | None = None
        for problem, rng in zip(problems, rngs, strict=True):
            alone = not problem.causal or self.tolerance is not None
            if alone or len(problem.kept_keys) == 0 or is_steep(problem):
                out.append(self.attend(problem, rng, draw=draw))
                continue
            self._checked(problem, rng, draw)
            if held is None or not same_keys(problem, held[0]):
                held = problem, self._table(problem)
            values = problem.arrays.v
            values = problem.values if values is None else values
            out.append(solved(problem, kept_rows(problem, values), held[1]).out)
        return stacked(out)

    def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        if self.tolerance is not None:
            return self._certified(problem, draw)
        if len(problem.kept_keys) == 0:
            return zero_attention(problem)
        return self._matrix(problem, draw)

    def _matrix(
        self, problem: AttentionProblem, draw: Draw
    ) -> NearFarAttention | CoresetNearFarAttention:
        """Return the matrix of a problem with a key that is kept."""
        if self.far == "coreset":
            return CoresetNearFarAttention(problem, *self._coreset(problem, draw))
        regions, near, tau, room = self._plan(problem)
        if isinstance(regions, TwoLevels):
            return TwoLevelAttention(problem, *regions, near, tau, room=room)
        return NearFarAttention(problem, *regions, near, tau, room=room)


def same_keys(one: AttentionProblem, other: AttentionProblem) -> bool:
    """Say whether two causal heads have the same keys, of which they see the same."""
    k, other_k = one.arrays.k, other.arrays.k
    alike = one.n_q == other.n_q and one.causal == other.causal and k.shape == other_k.shape
    # Heads with a mask have copies of their keys.
    if not alike or not (k.ctypes.data == other_k.ctypes.data or np.array_equal(k, other_k)):
        return False
    mask, other_mask = one.key_mask, other.key_mask
    if mask is None or other_mask is None:
        return mask is other_mask
    return bool(np.array_equal(mask, other_mask))


def solved(problem: AttentionProblem, values: Array, table: Table) -> Solved:
    """Return the product with the values of kept keys; what rows choose is not kept."""
    (regions, near, tau, room), k, m = table
    if not isinstance(regions, TwoLevels):
        return solve(problem, k, values, m, regions.rows, near, tau, room=room)
    clusters, groups, rows = regions
    levels = levels_of(m, groups, clusters.second_order)
    chosen = np.empty((0, groups.most), np.int32), np.empty((0, near), np.int32)
    return solve_levels(problem, k, values, m, levels, rows, tau, chosen, choose=True, room=room)
