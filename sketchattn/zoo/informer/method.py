"""Informer (ProbSparse): some rows of A exactly, the mean of V for all others.

``Ahat_i = A_i`` for the r rows i in I, and ``Ahat_i`` = the uniform row over the keys that i sees
for the others: row selection.  Whatever I is, ``|A V - Ahat V|_F^2 = sum_(i not in I) e_i`` with
``e_i = |A_i V - fill_i|^2``: a choice of rows is as good as the ``e_i`` that it leaves, which
`selection_regret` measures.  No theorem bounds the error of the rows that the published statistic
picks.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...base.arguments import check_count, check_logits, check_name, check_rank, stacked
from ...base.draws import Draw, Rng, as_generator, check_draw
from ...operators.base import AttentionOperator
from ...operators.pullback import Gradient, rows_pullback
from ...operators.sampled import SampledAttention
from ...operators.solve import PART_KEYS, solve_rows_of_heads
from ...problem import AttentionProblem
from ..base import Method, Traits, check_problem, register
from .arguments import (
    DIVISORS,
    SAMPLINGS,
    SCOPES,
    check_pilots,
    check_samples,
)
from .choices import CLAIMS, PRESETS, Choices
from .lazy import CAUSAL_FILLS, FILLS, check_fill, fill_weights, lazy_operator, lazy_row
from .operator import InformerAttention
from .statistics import (
    DRAWN_ENTRIES,
    SAMPLED,
    STATISTICS,
    WHOLE,
    compute_statistic,
    draw_and_reduce,
    reach_counts,
    reduce_samples,
)

Array = NDArray[Any]


def published_count(n: int, factor: int = 5) -> int:
    """Return ``min(factor ceil(ln n), n)``, at least 1: the rows or samples of the public code.

    Parameters
    ----------
    n : int
        Number of queries (for rows) or of keys (for samples), at least 0.
    factor : int, default 5
        At least 1.

    Notes
    -----
    A budget of 256 expressed through ``factor = ceil(256 / ln n)`` is 259, 272 and 279 at
    n = 1024, 2048 and 4096.

    Examples
    --------
    >>> [published_count(n) for n in (0, 1, 96, 1024, 2048, 4096)]
    [0, 1, 25, 35, 40, 45]
    """
    return min(max(1, int(factor) * math.ceil(math.log(max(n, 1)))), n)


@register("informer")
class Informer(Method):
    """Compute r rows of A exactly and give all others the mean of V (ProbSparse).

    Rows are ranked by how far their logits are from flat, which a sample of U keys a row
    estimates; ties go to the smaller index.  ``Ahat V`` costs ``n_q U d + r n_k (d + d_v)``
    multiplications.

    Parameters
    ----------
    rank : int, optional
        Number of exact rows r, in 1..max(n_q, n_k); at most n_q are used, see ``effective_rank``.
        None takes ``factor``.
    samples : int, optional
        Keys U that a row looks at, drawn with replacement; more than there are keys is the number
        of keys.  None is the published U = r, or the formula of ``factor`` where that is given.
    mean_divisor : {"n_samples", "n_keys"}, optional
        What the sum of the sampled logits is divided by, by default their number.  "n_keys" is
        the public code: a vector added to all keys, which leaves A alone, then changes the rows.
    key_sampling : {"per_query", "per_head", "shared", "full"}, optional
        "per_query", the default, draws U keys for each row; "per_head" is another name for it,
        since each head has a stream of its own (the public code shares one over heads and
        batch: hand one draw to `attention`).  "shared": the same U keys for all rows, one
        product.  "full": all keys, nothing is drawn; ``O(n_q n_k d)``, a reference.
    fill : {"mean", "masked_mean", "cummean", "cumsum"}, optional
        What a lazy row gets: "mean", the default, the mean of V over the keys that are not
        masked; "masked_mean" over those that the row sees; "cummean", the same by its name for
        causal problems; "cumsum", their sum, which the public code uses there: rows of ``Ahat``
        then sum to i + 1, a wrong matrix by that factor.
    statistic : str, optional
        "max_mean", the default, "zero_filled", "m", "kl", "row_norm" or "oracle": see
        `row_statistic`; the last two look at all of A (``O(n_q n_k d)``, references), and the
        "oracle" at V.  "random" draws rows uniformly.
    scope : {"visible", "all"}, optional
        Whether the rows of a causal problem look at the keys that they see, the default, or at
        future ones too, as in the public code.
    factor : int, optional
        ``rank`` and ``samples`` that are None become ``min(factor ceil(ln n), n)`` with n = n_q
        and the number of keys; 5 in the public code.
    preset : {"paper", "released", "released_causal", "corrected", "corrected_causal"}, optional
        The choices of the paper's text, of the public code, and of this library, where
        parameters are None.  Its factor of 5 counts only where ``rank`` and ``factor`` are None.

    Raises
    ------
    TypeError, ValueError
        By `draw` and `approximate`: for parameters out of range, or that another one leaves
        without a meaning.

    Notes
    -----
    Zhou, Zhang, Peng, Zhang, Li, Xiong and Zhang, "Informer" (2021).  Its Lemma 1 is about the
    statistic alone; nothing bounds the error.  What can be said: the squared error is the sum of
    the e_i left (see `selection_regret`), and at most ``diam(V)^2 sum min(KL_i/2, 1 - e^-KL_i)``
    over the lazy rows.  A sampled maximum misses the largest key of a row with probability
    ``(1 - 1/n_k)^U``.  One very negative logit makes "m" large in a row that is nearly uniform;
    "row_norm" does not have this fault.

    Causal problems are honoured by "cummean", "cumsum" and "masked_mean": ``Ahat`` has no weight
    above the diagonal.  But whether a row is among the r on top still depends on later rows:
    this approximates the causal matrix and is no autoregressive decoder.  Compare rows by "kl"
    there, which allows for the number of keys that a row sees.

    Masked keys enter no maximum, mean or logsumexp, and not the mean of V; a row that sees no key
    is never selected and is zero.  Padded queries: cut them off, or hand in ``pilot_rows``.

    The draw holds ``key_samples``, int64 (n_q, U), or (U,) if shared, or ``pilot_rows`` for
    "random".  A draw that is handed in may hold ``pilot_rows``, the exact rows I, in place of the
    samples or beside them: then they are used, at most r of any number, without a ranking.

    Statistics are computed in float64: two rows whose order float32 cannot tell apart would
    make the result another one.  Without ``causal`` exact rows are streamed, never held.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=64, d=8, rng=0)[0]
    >>> method = sa.Informer(rank=16, samples=8)
    >>> draw = method.draw(problem, rng=0)
    >>> draw["key_samples"].shape
    (64, 8)
    >>> ahat = method.approximate(problem, draw=draw)
    >>> ahat.effective_rank, ahat.rank_bound
    (16, 17)
    >>> sa.Informer(preset="released").budget(problem)
    (25, 25)
    """

    draw_names = ("key_samples",)

    def __init__(
        self,
        rank: int | None = None,
        samples: int | None = None,
        mean_divisor: str | None = None,
        key_sampling: str | None = None,
        fill: str | None = None,
        statistic: str | None = None,
        scope: str | None = None,
        factor: int | None = None,
        preset: str | None = None,
    ) -> None:
        self.rank = rank
        self.samples = samples
        self.mean_divisor = mean_divisor
        self.key_sampling = key_sampling
        self.fill = fill
        self.statistic = statistic
        self.scope = scope
        self.factor = factor
        self.preset = preset

    @property
    def choices(self) -> Choices:
        """The choices that the parameters and the preset come to; not checked."""
        known = isinstance(self.preset, str) and self.preset in PRESETS
        preset = PRESETS[str(self.preset)] if known else {}

        def of(name: str, default: Any) -> Any:
            given = getattr(self, name)
            return preset.get(name, default) if given is None else given

        statistic = of("statistic", "max_mean")
        sampled = statistic in SAMPLED
        averaged = sampled and statistic != "zero_filled"
        sampling = "per_query" if sampled else ("full" if statistic in WHOLE else None)
        return Choices(
            statistic,
            of("mean_divisor", "n_samples") if averaged else None,
            sampling if self.key_sampling is None else self.key_sampling,
            of("scope", "visible") if sampled else None,
            of("fill", "mean" if statistic != "oracle" else "masked_mean"),
            of("factor", None) if self.factor is not None or self.rank is None else None,
        )

    @property
    def traits(self) -> Traits:
        """Causal problems by the fills that end with a row's sight; "cumsum" only plain ones."""
        c = self.choices
        oracle = c.statistic == "oracle"
        plain = c.fill != "cumsum"
        return Traits(
            causal=c.fill in CAUSAL_FILLS and not oracle,
            key_mask=plain,
            autoregressive=c.statistic == "random",
            rectangular=plain,
            randomized=c.key_sampling != "full",
            row_stochastic=plain,
            nonnegative=True,
            oracle=oracle,
            claims=CLAIMS,
            differentiable=True,
        )

    # --- arguments --------------------------------------------------------------------------

    def check(self, problem: AttentionProblem) -> None:
        """Refuse a problem that this method cannot honour, or hyper-parameters out of range."""
        check_problem(problem)
        c = self.choices
        if problem.causal and c.fill not in CAUSAL_FILLS:
            raise ValueError(
                f"causal must be False for method {self.name!r} with fill {c.fill!r}, got "
                f"{problem.causal!r}; use preset='corrected_causal'"
            )
        # A problem has n_q rows to choose from; more than n_k of them where there are more.
        tall = isinstance(self.rank, numbers.Integral) and problem.n_k < self.rank <= problem.n_q
        if not tall and not (self.rank is None and c.factor is not None):
            check_rank(self.rank, problem.n_k)
        self._check_parameters()
        check_fill(problem, c.fill)
        if c.statistic == "oracle":
            _ = problem.values

    def _check_parameters(self) -> None:
        if self.preset is not None:
            check_name(self.preset, "preset", tuple(PRESETS))
        c = self.choices
        check_name(c.statistic, "statistic", STATISTICS)
        for label, value, names in (
            ("mean_divisor", self.mean_divisor, DIVISORS),
            ("key_sampling", self.key_sampling, SAMPLINGS),
            ("fill", self.fill, FILLS),
            ("scope", self.scope, SCOPES),
        ):
            if value is not None:
                check_name(value, label, names)
        if c.statistic not in SAMPLED and self.key_sampling not in (
            (None, "full") if c.statistic in WHOLE else (None,)
        ):
            raise ValueError(
                f"key_sampling must be None for statistic {c.statistic!r}, which samples no keys, "
                f"got {self.key_sampling!r}; drop it"
            )
        for label, useful in (
            ("mean_divisor", c.mean_divisor is not None),
            ("scope", c.scope is not None),
            ("samples", c.key_sampling not in ("full", None)),
        ):
            given = getattr(self, label)
            if given is not None and not useful:
                raise ValueError(
                    f"{label} must be None for statistic {c.statistic!r} with key_sampling "
                    f"{c.key_sampling!r}, which has no use for it, got {given!r}; drop it"
                )
        if self.samples is not None:
            check_count(self.samples, "samples", "give the number of keys that a row looks at")
        if self.factor is not None:
            check_count(self.factor, "factor", "5 is the factor of the public code")
            drawn = self.samples is None and c.key_sampling not in ("full", None)
            if self.rank is not None and not drawn:
                raise ValueError(
                    f"factor must be None where rank and samples are given or not needed, got "
                    f"{self.factor!r}; drop it, or rank"
                )

    def budget(self, problem: AttentionProblem) -> tuple[int, int]:
        """Return how many rows are exact, if as many see a key, and how many keys each samples.

        Parameters
        ----------
        problem : AttentionProblem

        Returns
        -------
        (int, int)
            r and U; U is 0 for statistics that sample no keys.
        """
        self.check(problem)
        return self._budget(problem)

    def _budget(self, problem: AttentionProblem) -> tuple[int, int]:
        c = self.choices
        keys = len(problem.kept_keys)
        if self.rank is None:
            rows = published_count(problem.n_q, int(c.factor or 0))
        else:
            rows = min(int(self.rank), problem.n_q)
        if c.key_sampling in ("full", None):
            return rows, 0
        if self.samples is not None:
            return rows, min(int(self.samples), keys)
        if c.factor is not None:
            return rows, published_count(keys, int(c.factor))
        return rows, min(int(self.rank or 0), keys)

    # --- draw -------------------------------------------------------------------------------

    def _draw(self, problem: AttentionProblem, rng: np.random.Generator) -> Draw:
        c = self.choices
        rows, drawn = self._budget(problem)
        if c.statistic == "random":
            seen = np.flatnonzero(problem.visible_counts() > 0)
            return Draw(pilot_rows=rng.permutation(seen)[:rows])
        if c.key_sampling == "full":
            return Draw()
        kept = problem.kept_keys
        if c.key_sampling == "shared":
            positions = rng.integers(0, max(len(kept), 1), drawn)
        else:
            counts = reach_counts(problem, str(c.scope))
            # One bound for all rows is drawn several times faster than one for each.
            same = not problem.causal or c.scope == "all"
            bound: Any = max(len(kept), 1) if same else np.maximum(counts, 1)[:, None]
            positions = rng.integers(0, bound, (problem.n_q, drawn))
        # Positions among the keys that are not masked: masked keys might as well not exist.
        chosen = positions if problem.key_mask is None else kept[positions]
        return Draw(key_samples=chosen)

    def _check_draw(self, problem: AttentionProblem, draw: Mapping[str, Any]) -> Draw:
        c = self.choices
        sampled = c.key_sampling not in ("full", None)
        names: tuple[str, ...] = ("key_samples",) if sampled else ()
        if c.statistic == "random":
            names = ("pilot_rows",)
        elif isinstance(draw, Mapping) and "pilot_rows" in draw:
            names = tuple(x for x in names if x in draw) + ("pilot_rows",)
        checked = check_draw(draw, names)
        rows, drawn = self._budget(problem)
        if "key_samples" in checked:
            checked["key_samples"] = check_samples(
                problem, checked["key_samples"], c.key_sampling == "shared", str(c.scope), drawn
            )
        if "pilot_rows" in checked:
            pilots = check_pilots(checked["pilot_rows"], problem.n_q, "pilot_rows")
            if len(pilots) > rows:
                raise ValueError(
                    f"pilot_rows must hold at most {rows} rows for rank = {self.rank}, got "
                    f"{len(pilots)}; change rank or the draw"
                )
            blind = np.setdiff1d(pilots, np.flatnonzero(problem.visible_counts() > 0))
            if len(blind):
                raise ValueError(
                    f"pilot_rows must be rows that see a key, got {int(blind[0])}; its output is "
                    f"zero"
                )
            checked["pilot_rows"] = pilots
        return checked

    # --- what it makes ----------------------------------------------------------------------

    def select(
        self,
        problem: AttentionProblem,
        rng: Rng = None,
        *,
        draw: Mapping[str, Any] | None = None,
    ) -> Array:
        """Return the rows I that are computed exactly, int64, the highest statistic first.

        Parameters
        ----------
        problem, rng, draw
            As for `approximate`.

        Returns
        -------
        ndarray (r,)
            Fewer where fewer rows see a key.

        Examples
        --------
        >>> import sketchattn as sa
        >>> problem = sa.make_heads("gaussian", n=64, d=8, rng=0)[0]
        >>> rows = sa.Informer(rank=16, statistic="oracle").select(problem)
        >>> sa.selection_regret(problem, rows).regret
        0.0
        """
        return self._select(problem, self._checked(problem, rng, draw))

    def _select(self, problem: AttentionProblem, draw: Draw) -> Array:
        if "pilot_rows" in draw:
            return draw["pilot_rows"]
        return self._ranked(problem, draw.get("key_samples"))

    def _ranked(
        self, problem: AttentionProblem, samples: Array | None, reduced: Array | None = None
    ) -> Array:
        """Return the rows on top by their statistic, the highest first."""
        c = self.choices
        found = compute_statistic(
            problem,
            c.statistic,
            samples,
            c.mean_divisor or "n_samples",
            c.scope or "visible",
            c.fill,
            reduced,
        )
        seen = np.flatnonzero(problem.visible_counts() > 0)
        order = np.argsort(-found[seen], kind="stable")
        return seen[order[: self._budget(problem)[0]]]

    def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        rows = np.sort(self._select(problem, draw))
        if not problem.causal:
            return InformerAttention(problem, rows)
        lazy = lazy_operator(problem, self.choices.fill, problem.dtype)
        return SampledAttention(
            lazy.chosen,
            lazy.weights,
            problem.n_k,
            len(rows),
            fill=lazy.fill,
            keys=lazy.keys,
            offset=lazy.offset,
            rows=rows,
            row_weights=problem.exact.rows(rows),
        )

    def _vjp(self, problem: AttentionProblem, draw: Draw, cotangent: Array) -> Gradient:
        rows = np.sort(self._select(problem, draw))
        exact = rows_pullback(problem, rows, problem.values, cotangent[rows])
        others = cotangent.copy()
        others[rows] = 0
        lazy = lazy_operator(problem, self.choices.fill, np.float64)
        return exact._replace(v=exact.v + lazy.T @ others)

    def _run(self, problem: AttentionProblem, rng: Rng, draw: Mapping[str, Any] | None) -> Array:
        """Return ``Ohat``; rows that look at keys of their own are reduced while others draw."""
        c = self.choices
        if draw is not None or c.key_sampling != "per_query" or problem.causal:
            return super()._run(problem, rng, draw)
        _, drawn = self.budget(problem)
        if problem.n_q * drawn <= DRAWN_ENTRIES:
            return super()._run(problem, rng, draw)
        reduced = draw_and_reduce([problem], [as_generator(rng)], drawn, c.statistic)
        rows = np.sort(self._ranked(problem, None, reduced[0]))
        values = problem.arrays.v
        product = InformerAttention(problem, rows) @ (problem.values if values is None else values)
        return np.asarray(product)

    def _attend_heads(
        self,
        problems: Sequence[AttentionProblem],
        rngs: Sequence[Rng],
        draw: Mapping[str, Any] | None,
    ) -> Array:
        """Return ``Ohat`` (H, n_q, d_v) with few passes over all heads.

        Rows that look at keys of their own are ranked for all heads in one pass, and the exact
        rows of all heads are another; causal problems are computed one by one.
        """
        c, first = self.choices, problems[0]
        one_pass = c.key_sampling == "per_query" and not first.causal
        # Heads with few keys may look at fewer; a head with many fills the threads by itself.
        looks = {self.budget(problem)[1] for problem in problems}
        if not one_pass or len(looks) > 1 or first.n_k >= 2 * PART_KEYS:
            return super()._attend_heads(problems, rngs, draw)
        values = stacked([np.asarray(x.values) for x in problems])
        drawn = looks.pop()
        if draw is None and first.n_q * drawn > DRAWN_ENTRIES:
            generators = [as_generator(rng) for rng in rngs]
            reduced = draw_and_reduce(problems, generators, drawn, c.statistic)
            chosen = [self._ranked(x, None, y) for x, y in zip(problems, reduced, strict=True)]
        else:
            draws = [self._checked(x, rng, draw) for x, rng in zip(problems, rngs, strict=True)]
            if "pilot_rows" in draws[0]:
                chosen = [self._select(x, y) for x, y in zip(problems, draws, strict=True)]
            else:
                samples = [x["key_samples"] for x in draws]
                reduced = reduce_samples(problems, samples, c.statistic, c.scope or "visible")
                ranked = zip(problems, samples, reduced, strict=True)
                chosen = [self._ranked(x, y, z) for x, y, z in ranked]
        out = np.empty((len(problems), first.n_q, values.shape[2]), first.dtype)
        for head, problem, x in zip(out, problems, values, strict=True):
            fill = fill_weights(problem, c.fill).astype(first.dtype)
            head[:] = lazy_row(fill, problem.key_mask, x)
        sizes = np.array([len(rows) for rows in chosen])
        for size in np.unique(sizes[sizes > 0]):
            group = np.flatnonzero(sizes == size).tolist()
            rows = np.sort(np.stack([chosen[h] for h in group]), axis=1)
            exact, lse = solve_rows_of_heads([problems[h] for h in group], rows, values[group])
            for head in lse:
                check_logits(head)
            out[np.array(group)[:, None], rows] = exact
        return out
