"""Combiner: exact weights on few direct keys, one weight on each region, one softmax over both.

With any local weights lam_t on region t, ``kappa_t = sum_j lam_t(j) k_j`` and ``b_t = H(lam_t)``
the region logit ``g_i(t) = scale q_i . kappa_t + b_t`` is the Gibbs variational lower bound of the
region's log mass.  The published rule pools keys by their maximum and has no bias, so that a
region of any number of equal keys weighs as much as one key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...base.arguments import check_choice, check_flag, check_rank, closest
from ...base.draws import Draw, check_draw
from ...kernels._threads import product
from ...operators.base import AttentionOperator
from ...operators.factored import zero_attention
from ...operators.partitioned.dyadic import Dyadic
from ...operators.partitioned.grid import Grid
from ...operators.partitioned.layouts import Layout
from ...operators.partitioned.operator import MixtureAttention, PartitionedAttention
from ...operators.partitioned.shared import Shared
from ...operators.partitioned.summaries import Reference, Rule, Summaries, is_variational
from ...operators.pullback import Gradient, zero_gradient
from ...partitions.patterns import PATTERNS as POSITIONAL
from ...partitions.patterns import (
    block_of_rank,
    check_block,
    check_labels,
    default_block,
    make_plan,
)
from ...partitions.plans import Plan
from ...problem import AttentionProblem
from ..base import InFloat64, Method, Traits, check_preset, in_force, register
from .choices import (
    BIASES,
    CLAIMS,
    KEYS,
    METRICS,
    PATTERNS,
    PRESETS,
    REFERENCES,
    SAFE_REFERENCES,
    SECOND_ORDER,
    VARIATIONAL_CLAIMS,
    Choices,
    Direct,
    Flags,
    by_position,
    given_queries,
    is_named,
    list_patterns,
    name_of,
    named,
    pilots_asked,
    read_direct,
    read_mass_weighted,
)
from .gradient import Made, gradient
from .pieces import (
    Base,
    column_reference,
    columns_plan,
    explicit,
    of_labels,
    promoted,
    reference_of,
    refined,
)

Array = NDArray[Any]


@register("combiner")
class Combiner(Method):
    """Attend to few keys one by one and to regions of keys through one summary each.

    ``Ahat_ij = exp(L_ij) / Zhat_i`` for direct keys, ``rho_i(t) lam_t(j)`` for keys of region t,
    ``rho_i(t) = exp(g_i(t)) / Zhat_i``, ``lam_t = softmax_j(scale q0_t . k_j)``,
    ``g_i(t) = scale q_i . key_t + bias_t``; ``Zhat_i`` is the sum over both kinds.

    Parameters
    ----------
    pattern : str, `Plan`, or sequence of these
        "fixed", "logsparse", "axial_vertical", "axial_horizontal", "axial_rowmajor",
        "axial_joint" (see `sketchattn.partitions.patterns.make_plan`); "routing": regions by
        k-means on keys; "labels": the regions given as ``labels``; or a plan of your own.
        Several: the average of their matrices.
    block : int, optional
        Length of a span ("fixed"), number of columns (axial patterns) or of direct keys around a
        position ("logsparse", a power of two).  By default what ``rank`` says, else
        `sketchattn.partitions.patterns.default_block`.
    rank : int, optional
        The budget in place of ``block``, in 1..n_k: number of spans, grid rows, grid columns
        ("axial_vertical") or clusters ("routing", by default ``round(sqrt(n_k))``), or of direct
        keys around a position ("logsparse", rounded up to a power of two).
    reference : str or array (d,) or (r, d), optional
        The query q0_t: "zero"; "region_mean", "region_max": of the queries at the region's
        positions; "global_mean": of all queries; "mass_weighted", "mass_weighted(n_iter)" or
        "mass_weighted(n_iter, pilots)": the mean of all queries weighted by what they put on the
        region, from "global_mean" on; "column" ("axial_rowmajor" only): the query of the row
        region in the own column; or the queries themselves.  None is "global_mean", or
        "region_mean" for causal problems.
    key : {"expected", "mean", "max"}
        ``sum_j lam_t(j) k_j``, or the mean or coordinate-wise maximum of the keys.
    bias : {"entropy", "log_count", "none"}
        ``H(lam_t)``, ``ln m_t``, or 0.
    direct : str
        "own" (own span, leaf, row and column, or label), "top_mass(t)" (the t regions of largest
        mass of each row), "window(w)" (positions up to w away), "none", or several joined by
        "+".  What a window leaves of a region, before and after it, are regions of their own,
        summarised anew.
    second_order : {"none", "diag"}
        "diag" adds half the variance of the logits in the region, from the variances of the
        coordinates of its keys.
    preset : str, optional
        A key of ``PRESETS``: "training_free", the defaults; "default", the best choice without
        training on the bundled heads, with the four heaviest regions of each row direct too;
        "paper", the published rule;
        "split_horizontal", "joint_mixture" and "rowmajor_wsum", variants of the released code.
    split : bool
        Whether the two sides of the own column ("axial_horizontal") or row ("axial_vertical",
        not causal) are two regions.
    labels : int array (n_k,), optional
        For "labels": the region of each key.
    row_labels : int array (n_q,), optional
        For "labels": the own region of each row, by default that of the key at its position.
    weights : sequence of float, optional
        Of the patterns that are averaged: positive, with sum 1; equal by default.
    metric : {"key", "query"}
        For "routing": cluster keys as they are, or as the covariance of the queries sees them.
    reference_is_causal : bool
        States that a given reference depends on no position after its region.
    allow_leak : bool
        Whether causal problems are accepted with choices that let rows see later positions: good
        for comparing matrices, not for a decoder.

    Raises
    ------
    ValueError, TypeError
        For choices that do not go together, options that would be ignored, and causal problems with
        choices that are not safe unless ``allow_leak``.

    Notes
    -----
    Ren, Dai, Dai, Yang, Leskovec, Schuurmans and Dai (2021), arXiv 2107.05768, equations (4) to
    (12); the bias, the reference queries other than "region_max", the bidirectional axial and
    logsparse plans and all guarantees are derived, not published.  Without training the published
    rule loses a factor of the size of a region from every far mass: use it to reproduce.

    Deviations of the released code.  "joint_mixture" is one softmax over vertical and split
    horizontal regions, which cover keys off the own row and column twice; a mixture in the
    paper is the average of two matrices, ``pattern=("axial_vertical", "axial_horizontal")``.
    "rowmajor_wsum" is the option `wsum` of its row-major layer.  Learned projections are left
    out, and so are the released log-sparse and bidirectional layers: the first leaves all but one
    key out of the last row at lengths ``2^k + 1``, the others count the own span twice.

    `sketchattn.certify_rows` bounds the error of every row from statistics of the regions, without
    knowing A.

    With pilot rows, which are drawn uniformly and should be 64 or more, weighted means are drawn
    towards the global mean by as much weight as a region has on average.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=64, d=4, rng=0)[0]
    >>> ahat = Combiner("fixed", block=8).approximate(problem)
    >>> ahat.lower_bound, bool(abs(ahat.row_sums() - 1).max() < 1e-6)
    (True, True)
    >>> Combiner("routing", rank=8, direct="top_mass(2)").attend(problem, rng=0).shape
    (64, 4)
    """

    def __init__(
        self,
        pattern: str | Plan | Sequence[Any] = "fixed",
        block: int | None = None,
        rank: int | None = None,
        reference: str | ArrayLike | None = None,
        key: str = "expected",
        bias: str = "entropy",
        direct: str = "own",
        second_order: str = "none",
        preset: str | None = None,
        *,
        split: bool = False,
        labels: ArrayLike | None = None,
        row_labels: ArrayLike | None = None,
        weights: Sequence[float] | None = None,
        metric: str = "key",
        reference_is_causal: bool = False,
        allow_leak: bool = False,
    ) -> None:
        self.pattern = pattern
        self.block = block
        self.rank = rank
        self.reference = reference
        self.key = key
        self.bias = bias
        self.direct = direct
        self.second_order = second_order
        self.preset = preset
        self.split = split
        self.labels = labels
        self.row_labels = row_labels
        self.weights = weights
        self.metric = metric
        self.reference_is_causal = reference_is_causal
        self.allow_leak = allow_leak

    # --- choices --------------------------------------------------------------------------

    @property
    def choices(self) -> Choices:
        """The choices in force: the arguments, and what the preset changes."""
        return in_force(self, Choices(), PRESETS)

    @property
    def flags(self) -> Flags:
        """Which guarantees the choices keep, whatever the problem."""
        c = self.choices
        patterns = list_patterns(c.pattern)
        reference = Reference("given", np.ones((1, 1)))
        if isinstance(c.reference, str) and c.reference == "zero":
            reference = Reference("given", np.zeros((1, 1)))
        single = len(patterns) == 1
        exact = single and is_variational(reference, Rule(c.key, c.bias, c.second_order))
        exact = exact and patterns[0] != "axial_joint"
        safe = c.reference is None or (
            c.reference in SAFE_REFERENCES
            if isinstance(c.reference, str)
            else bool(self.reference_is_causal)
        )
        return Flags(exact, exact, safe and "routing" not in [x for x in patterns if named(x)])

    @property
    def traits(self) -> Traits:
        """What the choices can do: see the parameters."""
        c = self.choices
        patterns = list_patterns(c.pattern)
        flags = self.flags
        direct = read_direct(c.direct, strict=False)
        names = [x if named(x) else "plan" for x in patterns]
        positions = by_position(c.reference) or direct.window is not None
        rectangular = not positions and all(
            name in ("routing", "fixed", "labels")
            and (not direct.own or (name == "labels" and self.row_labels is not None))
            for name in names
        )
        if names == ["plan"]:
            rectangular = not positions
        both = "axial_joint" not in names  # that plan is defined for causal problems only
        return Traits(
            causal=flags.causal_safe or bool(self.allow_leak),
            key_mask=True,
            rectangular=rectangular,
            randomized="routing" in names or pilots_asked(c.reference) is not None,
            row_stochastic=True,
            nonnegative=True,
            uses_rank=self.block is None and any(x not in ("labels", "plan") for x in names),
            exact_at_full_rank=both and all(x not in ("labels", "plan") for x in names),
            autoregressive=flags.causal_safe,
            differentiable=True,
            claims=CLAIMS + VARIATIONAL_CLAIMS if flags.lower_bound else CLAIMS,
        )

    @property
    def draw_names(self) -> tuple[str, ...]:  # type: ignore[override]  # they depend on parameters
        """Names of the arrays of a draw."""
        c = self.choices
        names = (
            ("labels",) if "routing" in [x for x in list_patterns(c.pattern) if named(x)] else ()
        )
        return (*names, "pilot_rows") if pilots_asked(c.reference) is not None else names

    # --- arguments ------------------------------------------------------------------------

    def check(self, problem: AttentionProblem) -> None:
        """Refuse a problem that this method cannot honour, or hyper-parameters out of range."""
        if not isinstance(problem, AttentionProblem):
            super().check(problem)
        self._check_parameters()
        c = self.choices
        if self.rank is not None:
            check_rank(self.rank, problem.n_k)
        if problem.causal:
            self._check_causal(problem, c)
        elif "axial_joint" in [x for x in list_patterns(c.pattern) if named(x)]:
            raise ValueError(
                "causal must be True for pattern 'axial_joint', which is released for causal "
                "problems only, got False; use a mixture of axial patterns"
            )
        if problem.n_q != problem.n_k and not self.traits.rectangular:
            raise ValueError(
                f"n_q and n_k must be equal for method 'combiner' with pattern {c.pattern!r}, "
                f"direct {c.direct!r} and reference {name_of(c.reference)}, which belong to "
                f"positions, got {problem.n_q} and {problem.n_k}; use direct='none' or "
                f"'top_mass(t)' with 'fixed', 'routing' or labels, and reference='global_mean'"
            )
        for pattern in list_patterns(c.pattern):
            if isinstance(pattern, Plan) and (
                (pattern.n_q, pattern.n_k) != (problem.n_q, problem.n_k)
                or pattern.causal != bool(problem.causal)
            ):
                kind = "causal" if problem.causal else "bidirectional"
                raise ValueError(
                    f"pattern must be a {kind} plan of {problem.n_q} rows and {problem.n_k} keys, "
                    f"got {pattern.n_q} rows, {pattern.n_k} keys and causal={pattern.causal}; "
                    f"make the plan for this problem"
                )
        if self.labels is not None:
            labels = check_labels(self.labels, "labels")
            if len(labels) != problem.n_k:
                raise ValueError(
                    f"labels must have shape (n_k,) = ({problem.n_k},), got {labels.shape}; give "
                    f"the region of each key"
                )
        if self.row_labels is not None:
            rows = check_labels(self.row_labels, "row_labels")
            if len(rows) != problem.n_q:
                raise ValueError(
                    f"row_labels must have shape (n_q,) = ({problem.n_q},), got {rows.shape}; "
                    f"give the own region of each row"
                )
        given = given_queries(c.reference)
        if given is not None and given.shape[1] != problem.d:
            raise ValueError(
                f"reference must have width d = {problem.d}, got {given.shape[1]}; give queries"
            )

    def _check_causal(self, problem: AttentionProblem, c: Choices) -> None:
        flags = self.flags
        if not flags.causal_safe and not self.allow_leak:
            routing = "routing" in [x for x in list_patterns(c.pattern) if named(x)]
            what = "pattern 'routing'" if routing else f"reference {name_of(c.reference)}"
            raise ValueError(
                f"causal must be False for method 'combiner' with {what}, which lets rows see "
                f"later positions, got {problem.causal!r}; use reference='region_mean' and another "
                f"pattern, or allow_leak=True to compare matrices"
            )
        if problem.n_q != problem.n_k:
            raise ValueError(
                f"n_q and n_k must be equal for method 'combiner' on causal problems, whose plans "
                f"give a row to each position, got {problem.n_q} and {problem.n_k}; use all queries"
            )

    def _check_parameters(self) -> None:
        check_preset(self, Choices(), PRESETS, show=name_of)
        c = self.choices
        patterns = list_patterns(c.pattern)
        if not patterns:
            raise ValueError("pattern must name at least one plan, got none; use 'fixed'")
        for pattern in patterns:
            if named(pattern):
                check_choice(pattern, "pattern", PATTERNS, ", or a plan")
            elif not isinstance(pattern, Plan):
                raise TypeError(
                    f"pattern must be a name, a Plan or a sequence of these, got "
                    f"{type(pattern).__name__}; see sketchattn.partitions.patterns.make_plan"
                )
        for label, known in (
            ("key", KEYS),
            ("bias", BIASES),
            ("second_order", SECOND_ORDER),
            ("metric", METRICS),
        ):
            check_choice(getattr(self if label == "metric" else c, label), label, known)
        for label in ("split", "reference_is_causal", "allow_leak"):
            check_flag(getattr(c if label == "split" else self, label), label)
        self._check_reference(c)
        direct = read_direct(c.direct)
        self._check_sizes(patterns)
        self._check_combination(c, patterns, direct)

    def _check_reference(self, c: Choices) -> None:
        if isinstance(c.reference, str):
            read_mass_weighted(c.reference)
            name = c.reference.partition("(")[0]
            if name not in REFERENCES or (c.reference != name and name != "mass_weighted"):
                raise ValueError(
                    f"reference must be one of {', '.join(REFERENCES)}, or queries, got "
                    f"{c.reference!r}{closest(name, REFERENCES)}"
                )
        elif c.reference is not None:
            given_queries(c.reference)
        if self.reference_is_causal and given_queries(c.reference) is None:
            raise ValueError(
                f"reference_is_causal must be False unless the reference is given as queries, got "
                f"True with {name_of(c.reference)}; drop it"
            )

    def _check_sizes(self, patterns: list[Any]) -> None:
        sized = [x for x in patterns if named(x) and x in POSITIONAL]
        if self.block is not None:
            for pattern in sized:
                check_block(pattern, self.block)
            if not sized:
                raise ValueError(
                    f"block must be None for pattern {patterns[0]!r}, which has no spans, got "
                    f"{self.block!r}; use rank for 'routing'"
                )
            if self.rank is not None:
                raise ValueError(
                    f"rank must be None where block is given, which says the same, got "
                    f"{self.rank}; drop one of them"
                )
        if self.rank is not None and not sized and "routing" not in patterns:
            raise ValueError(
                f"rank must be None for a plan or labels of your own, which say how many regions "
                f"there are, got {self.rank}; drop it"
            )

    def _check_combination(self, c: Choices, patterns: list[Any], direct: Direct) -> None:
        names = [x if named(x) else "plan" for x in patterns]
        if self.weights is not None:
            weights = np.asarray(self.weights, np.float64)
            if len(patterns) == 1 or weights.shape != (len(patterns),):
                raise ValueError(
                    f"weights must have one entry for each of several patterns, got "
                    f"{weights.shape} for {len(patterns)}; drop them for equal weights"
                )
            if not ((weights > 0).all() and abs(weights.sum() - 1) <= 1e-9):
                raise ValueError(
                    f"weights must be positive with sum 1, got {weights.tolist()}; divide them by "
                    f"their sum"
                )
        for label in ("labels", "row_labels"):
            if getattr(self, label) is not None and "labels" not in names:
                raise ValueError(
                    f"{label} must be None unless pattern is 'labels', got an array with "
                    f"{c.pattern!r}; use pattern='labels'"
                )
        if "labels" in names and self.labels is None:
            raise ValueError("labels must be given for pattern 'labels', got None; label each key")
        if self.row_labels is not None and not direct.own:
            raise ValueError(
                f"row_labels must be None unless own regions are direct, got an array with direct "
                f"{c.direct!r}; drop it"
            )
        if self.metric != "key" and "routing" not in names:
            raise ValueError(
                f"metric must be 'key' unless pattern is 'routing', got {self.metric!r}; drop it"
            )
        if c.split and not any(x in ("axial_horizontal", "axial_vertical") for x in names):
            raise ValueError(
                f"split must be False for pattern {c.pattern!r}, got True; use 'axial_horizontal'"
            )
        if is_named(c.reference, "column") and (names != ["axial_rowmajor"] or c.direct != "own"):
            raise ValueError(
                f"reference must be 'column' for pattern 'axial_rowmajor' with direct 'own' only, "
                f"got {c.pattern!r} and {c.direct!r}; use 'region_mean'"
            )
        for name in names:
            if name.startswith(("axial", "log", "plan")) and not direct.own:
                raise ValueError(
                    f"direct must contain 'own' for pattern {name!r}, whose other keys are no "
                    f"region, got {c.direct!r}; add '+'"
                )
        given = given_queries(c.reference)
        if given is not None and len(given) > 1:
            plain = direct.window is None and direct.top_mass == 0
            if len(names) > 1 or names[0] not in ("fixed", "routing", "labels", "plan") or (
                names[0] == "plan" and not plain
            ) or direct.window is not None:  # fmt: skip
                raise ValueError(
                    f"reference must be one query (d,) for pattern {c.pattern!r} and direct "
                    f"{c.direct!r}, whose regions have no promised order, got {given.shape}; "
                    f"give (r, d) with 'fixed', 'routing', 'labels' or a plan only"
                )

    # --- draw -----------------------------------------------------------------------------

    def _draw(self, problem: AttentionProblem, rng: np.random.Generator) -> Draw:
        out = Draw()
        if "labels" in self.draw_names:
            out["labels"] = self._cluster(problem, rng)
        if "pilot_rows" in self.draw_names:
            count = min(int(pilots_asked(self.choices.reference) or 0), problem.n_q)
            out["pilot_rows"] = np.sort(rng.permutation(problem.n_q)[:count]).astype(np.int64)
        return out

    def _cluster(self, problem: AttentionProblem, rng: np.random.Generator) -> Array:
        """Return the cluster of each key; a masked one has that of the kept key before it."""
        from ...sampling.clustering import kmeans

        kept = problem.kept_keys
        seed = int(rng.integers(2**31))
        labels = np.zeros(problem.n_k, np.int64)
        if not len(kept):
            return labels
        count = round(np.sqrt(problem.n_k)) if self.rank is None else int(self.rank)
        keys = problem.k if problem.key_mask is None else problem.k[kept]
        if self.metric == "query":
            keys = keys.astype(np.float64)
            queries = problem.q.astype(np.float64)
            queries = queries - queries.mean(axis=0)
            covariance = product(queries.T, queries) / len(queries)
            values, vectors = np.linalg.eigh(covariance)
            keys = product(keys, vectors * np.sqrt(np.maximum(values, 0)))
        found = kmeans(keys, min(max(count, 1), len(kept)), seed).labels
        before = np.maximum(np.searchsorted(kept, np.arange(problem.n_k), side="right") - 1, 0)
        return np.asarray(found[before], np.int64)

    def _check_draw(self, problem: AttentionProblem, draw: Mapping[str, Any]) -> Draw:
        checked = check_draw(draw, self.draw_names)
        out = Draw()
        if "labels" in checked:
            labels = check_labels(checked["labels"], "labels")
            if len(labels) != problem.n_k or (len(labels) and labels.max() >= problem.n_k):
                raise ValueError(
                    f"labels must be n_k = {problem.n_k} integers below n_k, got {len(labels)}, "
                    f"the largest {labels.max(initial=-1)}; use method.draw(problem, rng)"
                )
            out["labels"] = labels
        if "pilot_rows" in checked:
            rows = check_labels(checked["pilot_rows"], "pilot_rows")
            if not len(rows) or rows.max() >= problem.n_q:
                raise ValueError(
                    f"pilot_rows must be rows in 0..{problem.n_q - 1}, got {len(rows)} up to "
                    f"{rows.max(initial=-1)}; give indices of queries"
                )
            out["pilot_rows"] = rows
        return out

    # --- what it makes --------------------------------------------------------------------

    def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        if len(problem.kept_keys) == 0:
            return zero_attention(problem)
        patterns = list_patterns(self.choices.pattern)
        parts = [self._part(problem, pattern, draw) for pattern in patterns]
        if len(parts) == 1:
            return parts[0]
        weights = self._shares(len(parts))
        rank = min(part.effective_rank or 0 for part in parts)
        return MixtureAttention(parts, weights, rank)

    def _shares(self, count: int) -> Array:
        """Return the weights of the patterns that are averaged."""
        if self.weights is None:
            return np.full(count, 1 / count)
        return np.asarray(self.weights, np.float64)

    def _part(
        self, problem: AttentionProblem, pattern: str | Plan, draw: Draw
    ) -> PartitionedAttention:
        """Return the matrix of one pattern."""
        return self._made(problem, pattern, draw).ahat

    def _made(self, problem: AttentionProblem, pattern: str | Plan, draw: Draw) -> Made:
        """Return the matrix of one pattern, and how it came about."""
        c = self.choices
        direct = read_direct(c.direct)
        causal = bool(problem.causal)
        refine = read_mass_weighted(c.reference) if isinstance(c.reference, str) else None
        start = "global_mean" if refine is not None else c.reference
        if start is None:
            start = "region_mean" if causal else "global_mean"
        base = self._layout(problem, pattern, start, direct, draw, refine is None)
        reference = reference_of(problem, start, base.old)
        if is_named(start, "column"):
            reference = column_reference(problem, base)
        rule = Rule(c.key, c.bias, c.second_order)
        flags = self.flags
        budget = min(base.budget, len(problem.kept_keys))

        def make(
            layout: Layout, reference: Reference, summaries: Summaries | None = None
        ) -> PartitionedAttention:
            return PartitionedAttention(
                problem,
                layout,
                reference,
                rule,
                budget,
                lower_bound=is_variational(reference, rule) and pattern != "axial_joint",
                bilinear=is_variational(reference, rule) and pattern != "axial_joint",
                causal_safe=flags.causal_safe,
                remake=InFloat64(self._part, problem, (pattern, draw)),
                summaries=summaries,
            )

        layout, kept = base.layout, None
        ahat = make(layout, reference)
        before, regions = [], len(layout.lo)
        for _ in range(0 if refine is None else refine.iterations):
            before.append(ahat)
            q0 = refined(ahat, problem, draw.get("pilot_rows"))
            reference = Reference("given", q0)
            ahat = make(layout, reference)
        if direct.top_mass:
            chosen = layout.heaviest(ahat.data, direct.top_mass)
            layout, kept = promoted(layout, chosen)
            if reference.q0 is not None and not reference.shared and kept is not None:
                reference = Reference("given", reference.q0[kept])
            # Where regions are shared, those that some rows read key by key stay what they were.
            same = isinstance(layout, Shared)
            ahat = make(layout, reference, ahat.summaries if same else None)
        return Made(ahat, tuple(before), start, base.old, kept, regions)

    def _vjp(self, problem: AttentionProblem, draw: Draw, cotangent: Array) -> Gradient:
        total = zero_gradient(problem)
        if len(problem.kept_keys) == 0:
            return total
        patterns, pilots = list_patterns(self.choices.pattern), draw.get("pilot_rows")
        for pattern, weight in zip(patterns, self._shares(len(patterns)), strict=True):
            made = gradient(problem, self._made(problem, pattern, draw), pilots, weight * cotangent)
            for x, part in zip(total, made, strict=True):
                x += part
        return total

    def _size(self, pattern: str, n: int) -> int:
        if self.block is not None:
            return check_block(pattern, self.block)
        if self.rank is not None:
            return block_of_rank(pattern, n, int(self.rank))
        return default_block(pattern, n)

    def _layout(
        self,
        problem: AttentionProblem,
        pattern: str | Plan,
        reference: Any,
        direct: Direct,
        draw: Draw,
        mergeable: bool,
    ) -> Base:
        """Return the slots before any region of large mass is made direct."""
        c, causal, mask, n = self.choices, bool(problem.causal), problem.key_mask, problem.n_k
        if isinstance(pattern, Plan):
            return explicit(pattern, mask, direct, len(pattern.regions))
        if pattern in ("routing", "labels"):
            given = draw["labels"] if pattern == "routing" else self.labels
            labels = check_labels(given, "labels")
            own = None if self.row_labels is None else check_labels(self.row_labels, "row_labels")
            return of_labels(problem, labels, own, direct)
        size = self._size(pattern, n)
        budget = size if pattern in ("axial_vertical", "logsparse") else -(-n // size)
        columns = pattern == "axial_rowmajor" and is_named(reference, "column")
        if pattern == "fixed" or (pattern == "axial_rowmajor" and not columns):
            plain = mask is None and direct.window is None and (direct.own or not causal)
            if plain and problem.n_q == n > 0:
                return Base(Shared.spans(n, size, direct.own, causal), None, budget)
            return of_labels(problem, np.arange(n) // size, None, direct)
        # One reference query for all regions: what is merged need not be summarised anew.
        merged = (
            mergeable
            and not by_position(reference)
            and (c.key, c.second_order) == ("expected", "none")
        )
        if pattern == "logsparse" and direct == Direct(True):
            return Base(Dyadic(n, size, causal, mask, merged), None, budget)
        two_sided = pattern == "axial_horizontal" or (pattern == "axial_vertical" and not causal)
        split = c.split and two_sided
        if pattern == "axial_rowmajor":
            return explicit(columns_plan(n, size, causal), mask, direct, budget)
        if pattern in ("axial_vertical", "axial_horizontal") and direct.window is None:
            vertical = pattern == "axial_vertical"
            return Base(Grid(n, size, vertical, causal, split, mask, merged), None, budget)
        plan = make_plan(pattern, n, block=size, causal=causal, split=split)
        return explicit(plan, mask, direct, budget)
