"""WildCat: attention over r keys whose weights make up for all others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...base.arguments import check_choice, check_count, check_flag, check_positive
from ...base.draws import Draw, Rng, as_generator, check_columns, check_draw
from ...operators.base import AttentionOperator
from ...operators.factored import FactoredAttention, zero_attention
from ...operators.solve import softmax_over, solution, solve_over
from ...operators.steep import norms_of
from ...problem import AttentionProblem
from ...sampling.pivoted import PivotedCholesky
from ..base import InFloat64, Method, Traits, check_preset, in_force, register
from .coreset import Coreset, KernelKeys, kernel_keys

Array = NDArray[Any]

PIVOTS = ("weighted", "plain", "uniform")
TEMPERATURES = ("constant", "lambert")
FALLBACKS = ("mean", "midrange", "divide")
# Of the sum of absolute values: below it the sign of a denominator is that of its rounding.
LIMIT, RELEASED_LIMIT = 1e-12, 1e-20
# A weight whose logarithm is below is zero, however large the values are.
LOWEST = -700.0

# Of any pivots; of those that cover all distinct keys, or that are drawn by what is left.
CLAIMS = (
    "training_free.wildcat_row_sums",
    "training_free.wildcat_certificate",
    "training_free.wildcat_rate",
)
PIVOT_CLAIMS = ("training_free.wildcat_exact", "training_free.wildcat_trace")


class Choices(NamedTuple):
    """Name the choices that make one estimator."""

    pivots: str = "weighted"
    tau: str | float = "constant"
    qmax: str | float = "keys"
    center: bool = True
    clip: bool = False
    fallback: str = "mean"
    bins: int = 1
    sinks: int = 0
    window: int = 0


# The theory's bound of the queries and its rule; what the public code computes; and scikit-learn's
# Nystroem as attention, which divides by whatever the denominator is.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"tau": "lambert", "qmax": "data"},
    "released": {"clip": True, "fallback": "midrange"},
    "sklearn_nystroem": {"pivots": "uniform", "tau": 1.0, "center": False, "fallback": "divide"},
}


class WildCatDetails(NamedTuple):
    """Say what became of the keys and rows of a problem.

    Attributes
    ----------
    path : str
        "exact" where the preset "released" returns exact attention, otherwise "sketch".
    keys : int
        Keys that queries read: pivots, sinks and window.
    skipped : int
        Pivots that others span already, which are not used.
    tau2 : float
        Square of the temperature.
    small : int
        Rows whose denominator is zero up to rounding, or negative.
    clipped : int
        Entries of the output outside of the range of the values.
    """

    path: str
    keys: int
    skipped: int
    tau2: float
    small: int
    clipped: int


class _Parts(NamedTuple):
    """Hold which keys are read as they are, and which are compressed, in bins."""

    exact: Array
    bins: list[Array]
    keys: KernelKeys


class _Rows(NamedTuple):
    """Hold quotients (n_q, m), their denominators, and which of these are too small."""

    quotient: Array
    lse: Array
    small: Array


@register("wildcat")
class WildCat(Method):
    """Attend to r keys with weights that project all keys on their span.

    ``Ahat = diag(1/den) E W``, ``E_is = e^{L_is}`` over the pivots J, ``den = E W 1``, and
    ``W = e^{-h_J} G_JJ^-1 G_J: e^h``: with the Gaussian kernel ``G_jl = e^{-c |k_j - k_l|^2 / 2}``
    and ``h_j = c |k_j|^2 / 2`` of the centred keys, ``c = |scale| / tau^2``, it is the projection
    of the exponential kernel of the keys.  J is drawn by randomly pivoted Cholesky.

    Parameters
    ----------
    rank : int
        Number of pivots r, in 1..n_k; fewer where fewer keys are distinct, which
        ``effective_rank`` says.
    pivots : {"weighted", "plain", "uniform"}
        The next pivot is drawn by what the pivots before leave of the diagonal of the exponential
        kernel, ``res_j e^{2 h_j}``, or of the Gaussian one, ``res_j``; or all of them uniformly.
    tau : {"constant", "lambert"} or float
        Temperature: ``tau^2 = 3.94582 kmax/qmax``, kmax the largest norm of a centred key; the
        rule ``tau^2 = (kmax/qmax) b / (2 W_0(b / 6.3832))`` with
        ``b = ln n_k/(|scale| qmax kmax) + 2``; or tau itself, positive.
    qmax : {"keys", "data"} or float
        The bound of the norms of queries: kmax, the largest norm of a query, or a number.  With
        "keys" the pivots and W do not depend on the queries.
    center : bool, default True
        Subtract the mean of the keys before the kernel is made.  A does not change; Ahat does.
    clip : bool, default False
        Clip every column of the output to the range of the values.  Not linear in V: `attend` gives
        the output, `approximate` refuses.
    fallback : {"mean", "midrange", "divide"}
        What rows get whose denominator is at most 1e-12 of its absolute terms (or their rounding):
        the mean of the values, their ``(max + min)/2``, which is not linear in V, or the quotient.
    bins : int, default 1
        Compress so many parts of consecutive keys one by one, with r/bins pivots each; at most r.
    sinks, window : int, default 0
        First and last keys that are read as they are, beside the r pivots.
    preset : {None, "paper", "released", "sklearn_nystroem"}
        The theory's temperature, by queries; the public code; and ``Nystroem`` of scikit-learn as
        attention: ``pivots="uniform", tau=1, center=False, fallback="divide"``.

    Raises
    ------
    TypeError, ValueError
        For values out of range, causal problems, and `approximate` with an output that is not
        linear in V.

    Notes
    -----
    Schroder and Mackey (2026), arXiv 2602.10056.  Rows sum to one, entries can be negative, and
    only ``clip=True`` keeps the output in the range of the values.  ``Ahat = A`` once r reaches the
    number of distinct keys, up to what residuals of 1e-12 leave.  Cost
    ``n_k r (d + r/2) + n_k r (d + d_v) + n_q r (d + d_v)``; `attend` never forms W.  The geometry
    of the keys is computed in float64, whatever the precision of the problem.

    Deviations from the released code: exact attention is not returned where r >= n_k (preset
    "released" does, and `details` says ``path="exact"``); pivoting stops where all residuals are
    1e-12; weights are not rounded to the precision of the input; rows without a denominator get
    the mean of V, and the output is not clipped, so that there is a matrix.

    A draw holds ``pivots``, int64, the keys J, those of each bin together in the order of drawing.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=64, d=4, rng=0)[0]
    >>> ahat = sa.WildCat(rank=16).approximate(problem, rng=0)
    >>> ahat.rank_bound, bool(abs(ahat.row_sums() - 1).max() < 1e-4)
    (16, True)
    >>> sa.WildCat(rank=64, preset="released").details(problem, rng=0).path
    'exact'
    """

    draw_names = ("pivots",)

    def __init__(
        self,
        rank: int,
        pivots: str = "weighted",
        tau: str | float = "constant",
        qmax: str | float = "keys",
        center: bool = True,
        clip: bool = False,
        fallback: str = "mean",
        bins: int = 1,
        sinks: int = 0,
        window: int = 0,
        preset: str | None = None,
    ) -> None:
        self.rank = rank
        self.pivots = pivots
        self.tau = tau
        self.qmax = qmax
        self.center = center
        self.clip = clip
        self.fallback = fallback
        self.bins = bins
        self.sinks = sinks
        self.window = window
        self.preset = preset

    @property
    def choices(self) -> Choices:
        """The choices in force: the arguments, and what the preset changes."""
        return in_force(self, Choices(), PRESETS)

    @property
    def traits(self) -> Traits:
        """Masks and shapes are honoured; rows sum to one, entries can be negative."""
        linear = not self.choices.clip and self.choices.fallback != "midrange"
        return Traits(
            key_mask=True,
            row_stochastic=linear,
            matrix=linear,
            logsumexp=True,
            claims=self._claims(linear),
        )

    def _claims(self, linear: bool) -> tuple[str, ...]:
        """Return the ids of what is claimed: little of an output that is not linear in V."""
        if not linear:
            return CLAIMS[-1:]
        return CLAIMS + PIVOT_CLAIMS if self.choices.pivots == "weighted" else CLAIMS

    # --- arguments --------------------------------------------------------------------------

    def _check_parameters(self) -> None:
        check_preset(self, Choices(), PRESETS)
        check_choice(self.pivots, "pivots", PIVOTS)
        for name, known in (("tau", TEMPERATURES), ("qmax", ("keys", "data"))):
            value = getattr(self, name)
            if isinstance(value, str):
                check_choice(value, name, known, ", or a positive number")
            else:
                check_positive(value, name)
        if not isinstance(self.tau, str) and self.qmax != "keys":
            raise ValueError(
                f"qmax must be left at 'keys' with a number for tau, which does not use it, got "
                f"{self.qmax!r}; drop one of them"
            )
        check_flag(self.center, "center")
        check_flag(self.clip, "clip")
        check_choice(self.fallback, "fallback", FALLBACKS)
        check_count(self.bins, "bins", "1 compresses all keys together")
        check_count(self.sinks, "sinks", "0 compresses the first keys as well", low=0)
        check_count(self.window, "window", "0 compresses the last keys as well", low=0)

    def _parts(self, problem: AttentionProblem) -> _Parts:
        """Return which keys are read as they are and which are compressed, with their geometry."""
        choices = self.choices
        kept = problem.kept_keys
        first = min(int(choices.sinks), len(kept))
        stop = max(len(kept) - int(choices.window), first)
        middle = kept[first:stop]
        bound: float | None = None
        if isinstance(choices.qmax, str):
            if choices.qmax == "data":
                bound = float(norms_of(problem.q).max(initial=0.0))
        else:
            bound = float(choices.qmax)
        keys = kernel_keys(
            problem.k[middle], problem.scale, choices.tau, bound, bool(choices.center)
        )
        count = max(1, min(int(choices.bins), int(self.rank), len(middle)))
        return _Parts(
            np.concatenate([kept[:first], kept[stop:]]), np.array_split(middle, count), keys
        )

    def _budgets(self, parts: _Parts) -> list[int]:
        """Return the number of pivots of each bin at most."""
        share, more = divmod(int(self.rank), len(parts.bins))
        return [min(share + (b < more), len(x)) for b, x in enumerate(parts.bins)]

    def _draw(self, problem: AttentionProblem, rng: np.random.Generator) -> Draw:
        return self._drawn(self._parts(problem), rng)

    def _drawn(self, parts: _Parts, rng: np.random.Generator) -> Draw:
        law = self.choices.pivots
        n, budgets = sum(map(len, parts.bins)), self._budgets(parts)
        if n == 0:
            return Draw(pivots=np.zeros(0, np.int64))
        starts = np.cumsum([0, *map(len, parts.bins)])
        pieces = [slice(a, b) for a, b in zip(starts[:-1], starts[1:], strict=True)]
        if law == "uniform":
            order = rng.permutation(n)
            found = [
                order[(order >= x.start) & (order < x.stop)][:budget]
                for x, budget in zip(pieces, budgets, strict=True)
            ]
        else:
            races = []
            for piece, budget in zip(pieces, budgets, strict=True):
                keys = parts.keys.part(piece)
                weight = 2 * keys.half if law == "weighted" else np.zeros(len(keys.half))
                races.append(PivotedCholesky(keys.z, weight, budget, keys.tolerance))
            u = np.empty(n)
            running = [budget > 0 for budget in budgets]
            # Row i of the uniforms is for step i, so that a larger rank extends a smaller one.
            while any(running):
                rng.random(out=u)
                for b, (piece, race) in enumerate(zip(pieces, races, strict=True)):
                    if running[b]:
                        running[b] = race.step(u[piece]) and len(race.pivots) < budgets[b]
            found = [
                np.array(race.pivots, np.int64) + piece.start
                for race, piece in zip(races, pieces, strict=True)
            ]
        return Draw(pivots=np.concatenate(parts.bins)[np.concatenate(found)])

    def _check_draw(self, problem: AttentionProblem, draw: Mapping[str, Any]) -> Draw:
        made = check_draw(draw, self.draw_names)
        if self._exact(problem):
            return made
        parts = self._parts(problem)
        middle = np.concatenate(parts.bins)
        pivots = check_columns(made["pivots"], middle)
        for b, (keys, budget) in enumerate(zip(parts.bins, self._budgets(parts), strict=True)):
            count = int(np.isin(pivots, keys).sum())
            if not min(1, budget) <= count <= budget:
                raise ValueError(
                    f"pivots must hold {min(1, budget)} to {budget} keys of part {b} for rank = "
                    f"{self.rank}, got {count}; change rank or the draw"
                )
        return Draw(pivots=pivots)

    # --- the approximation ------------------------------------------------------------------

    def _weighted(self, problem: AttentionProblem, draw: Draw) -> tuple[Array, Array]:
        """Return pivots, positions among the kept keys, and W (r, kept keys), with one bin."""
        parts = self._parts(problem)
        ((_, coreset),) = self._coresets(parts, draw)
        return coreset.chosen, coreset.weights()

    def _exact(self, problem: AttentionProblem) -> bool:
        """Say whether the released code would return exact attention."""
        return self.preset == "released" and len(problem.kept_keys) <= int(self.rank)

    def _coresets(self, parts: _Parts, draw: Draw) -> list[tuple[Array, Coreset]]:
        """Return the keys of each bin, and which of them stand for all."""
        made, start = [], 0
        positions = np.searchsorted(np.concatenate(parts.bins), draw["pivots"])
        for keys in parts.bins:
            stop = start + len(keys)
            own = positions[(positions >= start) & (positions < stop)] - start
            if len(own):
                made.append((keys, Coreset.of(parts.keys.part(slice(start, stop)), own)))
            start = stop
        return made

    def _limit(self, problem: AttentionProblem, keys: int) -> float:
        if self.preset == "released":
            return RELEASED_LIMIT
        return max(LIMIT, 4 * keys * float(np.finfo(problem.dtype).eps))

    def _quotients(
        self, problem: AttentionProblem, parts: _Parts, made: list[tuple[Array, Coreset]]
    ) -> _Rows:
        """Return ``E W V / E W 1``, the normalisers, and the rows that have none."""
        values = problem.values
        columns = [parts.exact, *(keys[x.chosen] for keys, x in made)]
        exact = np.ones((len(parts.exact), values.shape[1] + 1))
        exact[:, :-1] = values[parts.exact]
        rows = np.concatenate([exact, *(x.sums(values[keys]) for keys, x in made)])
        # Weights of any size go to the logits; what is left of them is at most 1.
        largest = float(np.abs(values[problem.kept_keys]).max(initial=0.0)) or 1.0
        size = np.maximum(
            np.abs(rows[:, -1]), np.abs(rows[:, :-1]).max(axis=1, initial=0) / largest
        )
        with np.errstate(divide="ignore"):
            logs = np.maximum(np.log(size), LOWEST)
        rows /= np.exp(logs)[:, None]
        x = np.concatenate([rows, np.abs(rows[:, -1:])], axis=1)
        columns_all = np.concatenate(columns)
        out, lse = solve_over(problem, columns_all, x, logs)
        den, absolute = out[:, -2], out[:, -1]
        small = ~(den > self._limit(problem, len(columns_all)) * absolute)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            quotient = out[:, :-2] / den[:, None]
            lse = np.where(small, -np.inf, lse + np.log(den))
        return _Rows(quotient, lse.astype(problem.dtype, copy=False), small)

    def _finished(self, problem: AttentionProblem, rows: _Rows) -> Array:
        """Return the output: rows without a denominator replaced, and clipped where asked for."""
        choices, out, kept = self.choices, rows.quotient, problem.kept_keys
        values = problem.values[kept]
        bad = rows.small
        if choices.fallback == "divide":
            bad = np.asarray(~np.isfinite(out).all(axis=1))
        if bad.any():
            if choices.fallback == "midrange":
                out[bad] = 0.5 * values.max(axis=0) + 0.5 * values.min(axis=0)
            else:
                out[bad] = values.mean(axis=0, dtype=np.float64)
        if choices.clip:
            np.clip(out, values.min(axis=0), values.max(axis=0), out=out)
        return out

    def _run(self, problem: AttentionProblem, rng: Rng, draw: Mapping[str, Any] | None) -> Array:
        if draw is not None:
            return self._solved(problem, self._handed_in(problem, rng, draw))[0]
        self.check(problem)
        return self._solved(problem, None, rng)[0]

    def _attend_with_lse(self, problem: AttentionProblem, draw: Draw) -> tuple[Array, Array]:
        output, lse = self._solved(problem, draw)
        output[lse == -np.inf] = 0  # nothing to merge: the normaliser is zero
        return output, lse

    def _solved(
        self, problem: AttentionProblem, draw: Draw | None, rng: Rng = None
    ) -> tuple[Array, Array]:
        """Return the output and the normalisers; the geometry of the keys is computed once."""
        if self._exact(problem) or len(problem.kept_keys) == 0:
            output, lse = solution(problem)
            return output.copy(), lse.copy()
        parts = self._parts(problem)
        made = self._drawn(parts, as_generator(rng)) if draw is None else draw
        rows = self._quotients(problem, parts, self._coresets(parts, made))
        return self._finished(problem, rows), rows.lse

    def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        if self._exact(problem):
            return problem.exact
        if not self.traits.matrix:
            raise ValueError(
                "clip must be False and fallback 'mean' or 'divide' for a matrix, since the "
                f"output is not linear in v otherwise, got {self!r}; use attend for the output"
            )
        return self._factored(problem, draw)

    def _factored(self, problem: AttentionProblem, draw: Draw) -> FactoredAttention:
        kept = problem.kept_keys
        if len(kept) == 0:
            return zero_attention(problem)
        parts = self._parts(problem)
        made = self._coresets(parts, draw)
        columns = np.concatenate([parts.exact, *(keys[x.chosen] for keys, x in made)])
        p = np.zeros((len(columns), problem.n_k))
        p[np.arange(len(parts.exact)), parts.exact] = 1
        start = len(parts.exact)
        for keys, x in made:
            p[start : start + len(x.chosen), keys] = x.weights()
            start += len(x.chosen)
        w = p.sum(axis=1)
        with np.errstate(divide="ignore"):
            logs = np.log(np.maximum(np.abs(w), np.abs(p).max(axis=1, initial=0.0)))
        logs = np.clip(logs, LOWEST, -LOWEST)
        p /= np.exp(logs)[:, None]
        w /= np.exp(logs)
        u: Array = softmax_over(problem, columns, np.exp(logs))
        den = u @ w.astype(problem.dtype)
        absolute = u @ np.abs(w).astype(problem.dtype)
        least = self._limit(problem, len(columns)) * absolute
        divide = self.choices.fallback == "divide"
        bad = np.asarray(den == 0 if divide else ~(den > least))
        u[~bad] /= den[~bad, None]
        if bad.any():
            u = np.concatenate([np.where(bad[:, None], 0, u), bad[:, None]], axis=1)
            mean = np.zeros((1, problem.n_k))
            mean[0, kept] = 1 / len(kept)
            p = np.concatenate([p, mean])
        u, p = (np.asarray(x, problem.dtype) for x in (u, p))
        return FactoredAttention(
            u, None, p, len(columns), remake=InFloat64(self._factored, problem, (draw,))
        )

    def details(
        self,
        problem: AttentionProblem,
        rng: Rng = None,
        *,
        draw: Mapping[str, Any] | None = None,
    ) -> WildCatDetails:
        """Return how many keys are read, and how many rows have no denominator.

        Parameters
        ----------
        problem : AttentionProblem
            With values.
        rng, draw
            As for `approximate`.

        Returns
        -------
        WildCatDetails

        Examples
        --------
        >>> import sketchattn as sa
        >>> problem = sa.make_heads("gaussian", n=64, d=4, rng=0)[0]
        >>> found = sa.WildCat(rank=16).details(problem, rng=0)
        >>> found.keys, found.small, round(found.tau2, 5)
        (16, 0, 3.94582)
        """
        made = self._checked(problem, rng, draw)
        kept, parts = problem.kept_keys, self._parts(problem)
        if self._exact(problem) or len(kept) == 0:
            path = "exact" if len(kept) else "sketch"
            return WildCatDetails(path, len(kept), 0, parts.keys.tau2, 0, 0)
        coresets = self._coresets(parts, made)
        rows = self._quotients(problem, parts, coresets)
        values = problem.values[kept]
        fine = rows.quotient[~rows.small]
        outside = (fine > values.max(axis=0)) | (fine < values.min(axis=0))
        count = sum(len(x.chosen) for _, x in coresets)
        return WildCatDetails(
            "sketch",
            len(parts.exact) + count,
            len(made["pivots"]) - count,
            parts.keys.tau2,
            int(rows.small.sum()),
            int(outside.sum()),
        )
