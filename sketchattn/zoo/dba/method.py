"""DBA without training: pack keys, mix in the short length, unpack to queries, ``Ahat = U S P``.

The three factors are chosen from Q and K: landmarks of either side, a pack P (r, n_k) that reads
the values, a core S of the size of the landmarks, and an unpack U (n_q, r).  The published layer,
whose factors are made by trained weights, is `sketchattn.dba_layer`; it does not approximate
softmax attention.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...base.arguments import (
    check_choice,
    check_finite,
    check_integer,
    check_not_negative,
    closest,
    float_dtype,
)
from ...base.draws import Draw, check_columns, check_draw
from ...kernels._threads import product
from ...operators.base import AttentionOperator
from ...operators.factored import Assignment, FactoredAttention, zero_attention
from ...operators.pullback import Gradient, zero_gradient
from ...operators.softmax import SoftmaxAttention
from ...problem import AttentionProblem
from ...sampling.clustering import Clusters, around, kmeans
from ...sampling.landmarks import chosen_rows, pivoted_rows, segment_labels, segment_means
from ...sketches.base import streams
from ...sketches.compression import (
    KINDS,
    RANDOM_KINDS,
    Compression,
    apply_compression,
    check_width_in,
    draw_projection,
    fit_compression,
)
from ..base import InFloat64, Method, Traits, check_preset, in_force, register
from ..nystromformer import filter_inverse, pseudo_inverse, small_softmax
from ..nystromformer.inverse import inverse_cut, pseudo_inverse_of
from .choices import (
    CORES,
    FACTOR_CLAIMS,
    LANDMARKS,
    MEANINGFUL,
    MEANS_CLAIMS,
    PACKS,
    PRESETS,
    UNPACKS,
    Choices,
    not_meaningful,
)
from .gradient import Numbers, Parts, Side, gradient

Array = NDArray[Any]


# Columns of A that least squares look at for each landmark, and what they are damped with.
LSQ_COLUMNS, LSQ_RIDGE = 4, 1e-3


@register("dba")
class DBA(Method):
    """Pack, mix and unpack by landmarks of Q and K: ``Ahat = U S P``, by default row-stochastic.

    Parameters
    ----------
    rank : int
        Number of landmarks r, in 1..n_k; where there are fewer queries, keys or distinct rows, as
        many as these, which ``effective_rank`` says.
    landmarks : {"kmeans", "segment_means", "pivoted_qr", "leverage"}
        Qc and Kc: centres of k-means; means of r segments of consecutive rows; rows that are the
        first pivots of a QR factorisation of Q^T (K^T), beyond the rank drawn uniformly; rows drawn
        by leverage scores.  Each row belongs to the nearest landmark, or to its segment.
    pack : {"exact_rows", "mean"}
        ``P = rowsoftmax(scale Qc K^T)``, or the means over the keys of each landmark.
    core : {"identity", "softmax_logcount", "pinv", "softmax_nocount"}
        ``S = I``; ``rowsoftmax(scale Qc Kc^T + 1 log(c)^T)`` with c keys a landmark; the
        pseudo-inverse of Nystromformer; or the softmax without counts, which is wrong and warns.
    unpack : {"onehot", "softmax", "softmax_keys", "lsq"}
        U takes the row of each query's landmark; ``rowsoftmax(tau scale Q Qc^T)``;
        ``rowsoftmax(scale Q Kc^T)``, with ``+ 1 log(c)^T`` for means; or the least-squares fit of
        U P to ``4 r`` uniformly drawn columns of A, which needs exact row normalisers
        (``O(n_q n_k d)``), is signed and whose rows do not sum to one: experimental.
    hidden : {None, "svd", "gaussian", "srht", "pca_k"}
        Compress Q and K to width ``d_in`` first, as `sketchattn.sketches.compression.compress`
        does; landmarks are then those of the compressed rows.
    d_in : int, optional
        Width after; given alone it means ``hidden="svd"``.
    tau : float, default 1
        Factor of the logits of ``unpack="softmax"``, at least 0.
    steps : int, default 8
        Steps of Lloyd of ``landmarks="kmeans"``.
    sample : "auto", int or None
        Rows on which k-means finds the centres before all rows are assigned, as for
        `sketchattn.sampling.kmeans`; None is all.
    iterations : int or None, default 6
        Of ``core="pinv"``, as for `Nystromformer`; None is the exact pseudo-inverse.
    ridge : float, optional
        Relative to the largest squared singular value: of ``core="pinv"`` with ``iterations=None``
        (0 by default), and of the least squares of ``unpack="lsq"`` (1e-3 by default).
    preset : {None, "clustered", "dba_means", "key_means", "nystrom", "softmax_interp"}
        A named combination of landmarks, pack, core and unpack.

    Raises
    ------
    TypeError, ValueError
        For values out of range, combinations whose factors do not belong together, options that
        would be ignored, and causal problems, which no such product can honour.

    Notes
    -----
    After the pack, core and unpack of DBA (Qin et al., IEEE TNNLS 2025, doi
    10.1109/TNNLS.2025.3527046), whose own factors are trained.  The combinations named by presets
    are clustered attention (Vyas, Katharopoulos and Fleuret 2020), Nystromformer, and means of keys
    with exact or clustered queries.

    If U, S and P are row-stochastic, so is ``Ahat``, and each row of the output is in the convex
    hull of the values; this holds for all but "pinv" and "lsq".  A mean over the c keys of a
    cluster stands for c keys, so that its logit needs ``+ log c``: with it, and as many landmarks
    as distinct rows, ``Ahat = A`` for any multiplicities; without, only if they are all equal.

    Cost ``O(r (n_q + n_k)(d + d_v))`` and less where a factor is one-hot; no factor with a softmax
    over all queries or keys is held.

    A draw holds of these what the factors read: ``landmarks``, the rows of Qc above those of Kc;
    ``labels``, int64, the row of ``landmarks`` that each query, then each key belongs to (-1 for
    masked keys); ``columns``, int64, the keys of "lsq"; and ``sketch``, the projection (d_in, d) of
    "gaussian" and "srht".

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("clustered", n=64, d=8, rng=0)[0]
    >>> ahat = sa.DBA(rank=16).approximate(problem, rng=0)
    >>> ahat.row_stochastic, ahat.rank_bound, (ahat @ problem.v).shape
    (True, 16, (64, 8))
    """

    def __init__(
        self,
        rank: int,
        landmarks: str = "kmeans",
        pack: str = "exact_rows",
        core: str = "identity",
        unpack: str = "onehot",
        hidden: str | None = None,
        d_in: int | None = None,
        tau: float = 1.0,
        steps: int = 8,
        sample: int | str | None = "auto",
        iterations: int | None = 6,
        ridge: float | None = None,
        preset: str | None = None,
    ) -> None:
        self.rank = rank
        self.landmarks = landmarks
        self.pack = pack
        self.core = core
        self.unpack = unpack
        self.hidden = hidden
        self.d_in = d_in
        self.tau = tau
        self.steps = steps
        self.sample = sample
        self.iterations = iterations
        self.ridge = ridge
        self.preset = preset

    @property
    def choices(self) -> Choices:
        """The combination in force: that of the preset, or of the arguments."""
        return in_force(self, Choices(), PRESETS)

    @property
    def kind(self) -> str | None:
        """The kind of compression in force; None: Q and K are taken as they are."""
        return "svd" if self.hidden is None and self.d_in is not None else self.hidden

    @property
    def traits(self) -> Traits:
        """Masks and shapes are honoured; rows are averages unless something is inverted."""
        choice = self.choices
        averages = choice.core != "pinv" and choice.unpack != "lsq"
        return Traits(
            key_mask=True,
            randomized=bool(self.draw_names),
            row_stochastic=averages,
            nonnegative=averages,
            # As many landmark keys as keys, and queries as they are.
            exact_at_full_rank=self.kind is None
            and (choice.pack, choice.core, choice.unpack) == ("mean", "identity", "softmax_keys"),
            # A compression that is fitted to Q and K is no part of the draw.
            differentiable=self.kind is None or self.kind in RANDOM_KINDS,
            claims=FACTOR_CLAIMS + (MEANS_CLAIMS if choice.core == "softmax_logcount" else ()),
        )

    @property
    def draw_names(self) -> tuple[str, ...]:  # type: ignore[override]  # they depend on parameters
        """What is drawn: ``landmarks`` and ``labels``, ``sketch``, ``columns``.

        ``landmarks`` (m_q + m_k, d) are landmark queries and then landmark keys, where they are
        used; ``labels`` are indices of them for each query ("onehot") and then for each key
        ("mean"), -1 for masked keys.  ``sketch`` (d_in, d) is the transpose of the projection of a
        random ``hidden``, ``columns`` the keys that "lsq" looks at.
        """
        choice = self.choices
        names = []
        if choice.landmarks != "segment_means":
            names.append("landmarks")
            if choice.unpack == "onehot" or choice.pack == "mean":
                names.append("labels")
        if self.kind in RANDOM_KINDS:
            names.append("sketch")
        if choice.unpack == "lsq":
            names.append("columns")
        return tuple(names)

    @property
    def _used(self) -> tuple[bool, bool]:
        """Whether landmark queries and landmark keys are used."""
        choice = self.choices
        both = choice.core != "identity"
        return (
            both or choice.pack == "exact_rows",
            both or choice.pack == "mean",
        )

    # --- arguments --------------------------------------------------------------------------

    def check(self, problem: AttentionProblem) -> None:
        """Refuse a problem that this method cannot honour, or hyper-parameters out of range."""
        super().check(problem)
        if self.kind is not None:
            check_width_in(self.d_in, problem.d, self.kind)

    def _check_parameters(self) -> None:
        known = {"landmarks": LANDMARKS, "pack": PACKS, "core": CORES, "unpack": UNPACKS}
        for label, names in known.items():
            check_choice(getattr(self, label), label, names)
        check_preset(self, Choices(), PRESETS, whole=True)
        choice = self.choices
        if choice[1:] not in MEANINGFUL:
            raise ValueError(not_meaningful(choice))
        if self.hidden is not None:
            if self.hidden not in KINDS:
                raise ValueError(
                    f"hidden must be None or one of {', '.join(KINDS)}, got {self.hidden!r}"
                    f"{closest(str(self.hidden), KINDS)}"
                )
            if self.d_in is None:
                raise ValueError(
                    f"d_in must be given with hidden = {self.hidden!r}, got None; it is the width "
                    f"after compression"
                )
        check_not_negative(self.tau, "tau", "0 weighs all landmarks alike")
        check_integer(self.steps, "steps", 1, "raise steps")
        if self.sample is not None and self.sample != "auto":
            if isinstance(self.sample, str):
                raise ValueError(
                    f"sample must be 'auto', an integer or None, got {self.sample!r}; None is all "
                    f"rows"
                )
            check_integer(self.sample, "sample", int(self.rank), "centres are found on them")
        if self.iterations is not None:
            check_integer(self.iterations, "iterations", 0, "Nystromformer takes 6")
        if self.ridge is not None:
            check_not_negative(self.ridge, "ridge", "0 switches it off")
        pinv, lsq = choice.core == "pinv", choice.unpack == "lsq"
        for label, standard, used, where in (
            ("tau", 1.0, choice.unpack == "softmax", "unpack 'softmax'"),
            ("steps", 8, choice.landmarks == "kmeans", "landmarks 'kmeans'"),
            ("sample", "auto", choice.landmarks == "kmeans", "landmarks 'kmeans'"),
            ("iterations", 6, pinv, "core 'pinv'"),
            (
                "ridge",
                None,
                lsq or (pinv and self.iterations is None),
                "unpack 'lsq', or core 'pinv' and iterations=None",
            ),
        ):
            if not used and getattr(self, label) != standard:
                raise ValueError(
                    f"{label} must be left at {standard!r} without {where}, which alone uses it, "
                    f"got {getattr(self, label)!r}; drop it"
                )

    def _check_draw(self, problem: AttentionProblem, draw: Mapping[str, Any]) -> Draw:
        made = check_draw(draw, self.draw_names)
        width = problem.d if self.d_in is None else int(self.d_in)
        if "sketch" in made:
            _check_real(made["sketch"], "sketch", (width, problem.d))
        if "columns" in made:
            made["columns"] = check_columns(made["columns"], problem.kept_keys)
            if len(made["columns"]) < 1 and len(problem.kept_keys):
                raise ValueError("columns must be one at least, got none; draw some of the keys")
        if "landmarks" in made:
            marks = made["landmarks"]
            most = sum(self._budgets(problem))
            if marks.ndim != 2 or not min(most, 1) <= len(marks) <= most:
                raise ValueError(
                    f"landmarks must have shape (m, {width}) with m in 1..{most}, got "
                    f"{marks.shape}; landmark queries first, landmark keys second"
                )
            _check_real(marks, "landmarks", (len(marks), width))
            if "labels" in made:
                self._check_labels(problem, made["labels"], len(marks))
            elif all(self._used) and len(marks) % 2:
                raise ValueError(
                    f"landmarks must be as many queries as keys, got {len(marks)} rows; give an "
                    f"even number"
                )
        return made

    def _check_labels(self, problem: AttentionProblem, labels: Array, m: int) -> None:
        choice = self.choices
        queries = problem.n_q if choice.unpack == "onehot" else 0
        keys = problem.n_k if choice.pack == "mean" else 0
        if labels.shape != (queries + keys,) or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"labels must be integers of shape ({queries + keys},), got {labels.dtype} of "
                f"shape {labels.shape}; give an index of landmarks for each row that has one"
            )
        if not problem.n_q or not len(problem.kept_keys):
            return
        of_queries, of_keys = labels[:queries], labels[queries:]
        if keys:
            of_keys = of_keys[problem.kept_keys]
        first = int(of_keys.min()) if keys else m
        fits = (not keys or (first >= 0 and (first > 0) == self._used[0])) and (
            not queries or (of_queries.min() >= 0 and of_queries.max() < first)
        )
        budgets = self._budgets(problem)
        fits = fits and first <= budgets[0] and m - first <= budgets[1]
        if not fits or (keys and not np.array_equal(np.unique(of_keys), np.arange(first, m))):
            raise ValueError(
                f"labels must be indices of the {m} landmarks, those of queries below those of "
                f"keys, and each landmark key must have a key, got labels from "
                f"{int(labels.min())} to {int(labels.max())}; drop landmarks without keys"
            )

    def _budgets(self, problem: AttentionProblem) -> tuple[int, int]:
        """Return how many landmark queries and keys there are at most; 0 where none are used."""
        sizes = problem.n_q, len(problem.kept_keys)
        if self.choices.core == "pinv" or 0 in sizes:
            sizes = min(sizes), min(sizes)
        queries, keys = (
            min(int(self.rank), n) if used else 0 for n, used in zip(sizes, self._used, strict=True)
        )
        return queries, keys

    # --- the draw ---------------------------------------------------------------------------

    def _draw(self, problem: AttentionProblem, rng: np.random.Generator) -> Draw:
        names, choice = self.draw_names, self.choices
        draw = Draw()
        if not names:
            return draw
        of_queries, of_keys, of_sketch, of_columns = streams(rng, 4)
        kept = problem.kept_keys
        if "sketch" in names and self.d_in is not None:
            made = draw_projection(problem.d, int(self.d_in), str(self.kind), of_sketch)
            draw["sketch"] = np.ascontiguousarray(made.T)
        if "columns" in names:
            count = min(LSQ_COLUMNS * int(self.rank), len(kept))
            draw["columns"] = kept[of_columns.permutation(len(kept))[:count]]
        if "landmarks" not in names:
            return draw
        small = self._compressed(problem, draw)
        labelled = choice.unpack == "onehot", choice.pack == "mean"
        marks: list[Array] = [np.zeros((0, small.d))]
        labels: list[Array] = [np.zeros(0, np.int64)]
        # Each side: its rows that there are, and the length of its part of the labels.
        sides = ((np.arange(small.n_q), small.q), (kept, small.k))
        for (there, rows), r, stream, wanted in zip(
            sides, self._budgets(problem), (of_queries, of_keys), labelled, strict=True
        ):
            mine = np.full(len(rows), -1)
            if r:
                found = self._cluster(rows[there], r, stream, wanted)
                if wanted:
                    mine[there] = sum(map(len, marks)) + found.labels
                marks.append(found.centers)
            if wanted:
                labels.append(mine)
        draw["landmarks"] = np.concatenate(marks)
        if "labels" in names:
            draw["labels"] = np.concatenate(labels)
        return draw

    def _cluster(self, x: Array, r: int, rng: np.random.Generator, wanted: bool) -> Clusters:
        """Return landmarks of the rows of x, with their labels if they are wanted."""
        law = self.choices.landmarks
        if law == "kmeans":
            seed = int(rng.integers(2**31))
            found = kmeans(x, r, seed, steps=int(self.steps), sample=self.sample)
            if self.choices.core != "pinv":
                return found
            # An inverse needs as many queries as keys: of equal rows there are fewer.
            return found._replace(centers=found.centers[np.arange(r) % len(found.centers)])
        index = pivoted_rows(x, r, rng) if law == "pivoted_qr" else chosen_rows(x, r, law, rng)
        marks = np.asarray(x[index], np.float64)
        if wanted:
            return around(x, marks)
        return Clusters(marks, np.zeros(0, np.int64), np.ones(r, np.int64))

    # --- the approximation ------------------------------------------------------------------

    def _compressed(self, problem: AttentionProblem, draw: Draw) -> AttentionProblem:
        """Return the problem whose Q and K the factors are made of."""
        kind, d_in = self.kind, self.d_in
        if kind is None or d_in is None:
            return problem
        if kind in RANDOM_KINDS:
            projection = np.asarray(draw["sketch"], np.float64).T
            return apply_compression(
                problem, Compression(projection, projection, np.zeros(problem.d))
            )
        return problem.cached(
            ("compressed", kind, int(d_in)),
            lambda: apply_compression(problem, fit_compression(problem, int(d_in), kind)),
        )

    def _sides(self, problem: AttentionProblem, draw: Draw) -> tuple[Side | None, Side | None]:
        """Return the landmarks of queries and of the keys that are not masked."""
        choice, used = self.choices, self._used
        kept = problem.kept_keys
        if choice.landmarks == "segment_means":
            both = (problem.q, problem.k[kept])
            made = [
                Side(segment_means(x, r), segment_labels(len(x), r)) if r else None
                for x, r in zip(both, self._budgets(problem), strict=True)
            ]
            return made[0], made[1]
        marks = np.asarray(draw["landmarks"], np.float64)
        labels = np.asarray(draw.get("labels", np.zeros(0)), np.int64)
        queries = problem.n_q if choice.unpack == "onehot" else 0
        of_queries = labels[:queries] if queries else None
        of_keys = labels[queries:][kept] if choice.pack == "mean" else None
        if not used[1]:
            split = len(marks)
        elif of_keys is not None:
            split = int(of_keys.min())
        else:
            split = len(marks) // 2
        return (
            Side(marks[:split], of_queries) if used[0] else None,
            Side(marks[split:], None if of_keys is None else of_keys - split) if used[1] else None,
        )

    def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        if problem.n_q == 0 or not len(problem.kept_keys):
            return zero_attention(problem)
        if self.choices.core == "softmax_nocount":
            warnings.warn(
                "core 'softmax_nocount' leaves out the number of keys that a mean stands for, and "
                "is wrong even if all keys of a cluster are equal; use 'softmax_logcount'",
                UserWarning,
                stacklevel=3,
            )
        return self._build(problem, draw)

    def _parts(self, problem: AttentionProblem, draw: Draw) -> Parts:
        """Return what the factors are made of, and those that no other one is needed for."""
        small = self._compressed(problem, draw)
        queries, keys = self._sides(small, draw)
        counts = None
        if self.choices.pack == "mean" and keys is not None and keys.labels is not None:
            counts = np.bincount(keys.labels, minlength=len(keys.marks))
        pack = self._pack(small, queries, keys, counts)
        core = self._core_matrix(small, queries, keys, counts)
        return Parts(small, queries, keys, counts, pack, core)

    def _build(self, problem: AttentionProblem, draw: Draw) -> FactoredAttention:
        small, queries, keys, counts, pack, core = self._parts(problem, draw)
        unpack = self._unpack(problem, small, queries, keys, counts, pack, draw)

        remake = InFloat64(self._build, problem, (draw,))
        sizes = [len(side.marks) for side in (queries, keys) if side is not None]
        return FactoredAttention(unpack, core, pack, min(sizes), remake=remake)

    def _pack(
        self,
        small: AttentionProblem,
        queries: Side | None,
        keys: Side | None,
        counts: Array | None,
    ) -> AttentionOperator:
        if counts is not None and keys is not None and keys.labels is not None:
            labels = np.zeros(small.n_k, np.int64)
            weights = np.zeros(small.n_k, small.dtype)
            labels[small.kept_keys] = keys.labels
            weights[small.kept_keys] = 1.0 / counts[keys.labels]
            return Assignment(labels, len(keys.marks), weights, transpose=True)
        assert queries is not None
        marks = np.require(queries.marks, small.dtype, ["C", "W"])
        return _softmax(marks, small.arrays.k, small.scale, small.key_mask)

    def _core_matrix(
        self,
        small: AttentionProblem,
        queries: Side | None,
        keys: Side | None,
        counts: Array | None,
    ) -> Array | None:
        core = self.choices.core
        if core == "identity":
            return None
        assert queries is not None
        assert keys is not None
        # From what the other factors see.
        left, right = (np.asarray(side.marks, small.dtype) for side in (queries, keys))
        if core == "pinv":
            matrix = small_softmax(left, right, small.scale)
            if self.iterations is not None:
                return filter_inverse(matrix, self.iterations).astype(small.dtype)
            return pseudo_inverse(matrix, self.ridge or 0.0).astype(small.dtype)
        if core == "softmax_nocount":
            counts = None
        return small_softmax(left, right, small.scale, counts).astype(small.dtype)

    def _unpack(
        self,
        problem: AttentionProblem,
        small: AttentionProblem,
        queries: Side | None,
        keys: Side | None,
        counts: Array | None,
        pack: AttentionOperator,
        draw: Draw,
    ) -> Array | AttentionOperator:
        unpack = self.choices.unpack
        if unpack == "lsq":
            return self._least_squares(problem, pack, draw)
        side = keys if unpack == "softmax_keys" else queries
        assert side is not None
        if unpack == "onehot":
            assert side.labels is not None
            return Assignment(side.labels, len(side.marks), dtype=small.dtype)
        marks, q = np.require(side.marks, small.dtype, ["C", "W"]), small.arrays.q
        if unpack == "softmax":
            return _softmax(q, marks, float(self.tau) * small.scale)
        if counts is None or (counts == counts[0]).all():
            return _softmax(q, marks, small.scale)
        # scale q.k + log c = (scale q, 1).(k, log c)
        wide_q = np.ones((len(q), small.d + 1), small.dtype)
        np.multiply(q, small.dtype.type(small.scale), out=wide_q[:, :-1])
        return _softmax(wide_q, np.column_stack([marks, np.log(counts)]).astype(small.dtype), 1.0)

    def _least_squares(
        self, problem: AttentionProblem, pack: AttentionOperator, draw: Draw
    ) -> Array:
        """Return ``argmin_U |U P_J - A_J|_F^2 + ridge |P_J|_2^2 |U|_F^2`` (n_q, r)."""
        columns = draw["columns"]
        wanted = problem.exact.columns(columns)
        p = pack.columns(columns).astype(np.float64)
        return np.asarray(wanted @ pseudo_inverse_of(p, *self._lsq(p)).astype(wanted.dtype))

    def _lsq(self, p: Array) -> tuple[float, float]:
        """Return the ridge of the least squares, and the share of s_1 that counts as zero."""
        ridge = LSQ_RIDGE if self.ridge is None else float(self.ridge)
        return ridge, max(p.shape) * float(np.finfo(np.float64).eps)

    def _vjp(self, problem: AttentionProblem, draw: Draw, cotangent: Array) -> Gradient:
        if problem.n_q == 0 or not len(problem.kept_keys):
            return zero_gradient(problem)
        parts, columns = self._parts(problem, draw), draw.get("columns")
        shape = np.zeros((0 if columns is None else len(columns), parts.pack.shape[0]))
        size = 0 if parts.core is None else len(parts.core)
        numbers = Numbers(
            float(self.tau),
            self.iterations,
            self.ridge or 0.0,
            inverse_cut(size, None),
            columns,
            self._lsq(shape),
        )
        own, inside = gradient(self.choices, problem, parts, numbers, cotangent)
        dq, dk = inside.q, inside.k
        if self.kind is not None:
            back = np.asarray(draw["sketch"], np.float64)
            dq, dk = product(dq, back), product(dk, back)
        return Gradient(own.q + dq, own.k + dk, own.v)


def _softmax(q: Array, k: Array, scale: float, key_mask: Array | None = None) -> SoftmaxAttention:
    """Return ``rowsoftmax(scale Q K^T)`` of prepared arrays as an operator."""
    if key_mask is None:
        return AttentionProblem.adopt(q, k, scale=scale).exact
    return AttentionProblem(q, k, scale=scale, key_mask=key_mask).exact


def _check_real(x: Array, label: str, shape: tuple[int, ...]) -> None:
    float_dtype(x, label)
    if x.shape != shape:
        raise ValueError(
            f"{label} must have shape {shape}, got {x.shape}; use method.draw(problem, rng)"
        )
    check_finite(x, label)
