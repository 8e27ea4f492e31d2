"""vAttention: the largest weights exactly, and a sample of the rest whose size meets an error.

Sources: Desai et al., "vAttention: Verified Sparse Attention", arXiv 2510.05688; the public code
xAlg-ai/sparse-attention-hub @1a048c9.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..base.arguments import check_choice, check_count, check_flag, check_integer, check_positive
from ..base.draws import Draw
from ..kernels._threads import product
from ..operators.base import AttentionOperator
from ..operators.sparse import SparseAttention
from ..operators.steep import tiles_of
from ..problem import AttentionProblem
from .base import Method, Traits, check_preset, in_force, register

Array = NDArray[Any]

BUDGETS = ("fixed", "clt", "known", "hoeffding-serfling", "released")
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # The published budget: draws with replacement, which keep their repeats.
        "paper": {"budget": "clt", "replace": True, "pilot": 0.05},
        # sparse-attention-hub: see `_released`.
        "released": {"budget": "released", "replace": True, "pilot": 0.01},
    }
)

CLAIMS = (
    "training_free.vattention_unbiased",
    "training_free.vattention_known_coverage",
    "training_free.vattention_pilot_coverage",
    "training_free.vattention_hoeffding_coverage",
    "training_free.vattention_budget_order",
    "training_free.vattention_released_coverage",
    "training_free.vattention_merged_mean",
    "training_free.composition",
)


class Choices(NamedTuple):
    """What the parameters and the preset come to."""

    budget: str = "fixed"
    replace: bool = False
    pilot: float = 0.05


def clt_budget(
    size: Any, deviation: Any, total: Any, eps: float, delta: float, *, replace: bool = False
) -> Any:
    """Return the draws for which a sum is within ``eps total`` but for a share ``delta``, asked.

    With ``z = Phi^-1(1 - delta/2)``, n = ``size`` numbers of population deviation sigma:
    ``(z n sigma/(eps D))^2`` draws with replacement; without, and ``S^2 = n sigma^2/(n - 1)``,
    ``1/(1/n + (eps D/(z n S))^2)``, never more than n.  Normal tails are assumed of the sum.

    Parameters
    ----------
    size, deviation, total : float or array
        n, sigma of the numbers that are drawn from, and D, which the error is relative to.
    eps, delta : float
    replace : bool

    Returns
    -------
    float or array
        Not rounded.

    Examples
    --------
    >>> round(float(clt_budget(56, 0.2234512079, 15.2, 0.1, 0.1, replace=True)), 4) > 0
    True
    """
    from scipy.stats import norm

    z = float(norm.isf(delta / 2))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        n = np.asarray(size, np.float64)
        if replace:
            return np.square(z * n * deviation / (eps * np.asarray(total, np.float64)))
        spread = np.sqrt(n / np.maximum(n - 1, 1)) * deviation
        inverse = 1 / n + (eps * np.asarray(total, np.float64) / (z * n * spread)) ** 2
        return np.where(n > 0, 1 / inverse, 0.0)[()]


def hoeffding_serfling_budget(size: Any, reach: Any, known: Any, eps: float, delta: float) -> Any:
    """Return the draws without replacement that are enough whatever the numbers are.

    Of n = ``size`` numbers in an interval of length R = ``reach`` a sum with a known part D_f, all
    of it positive, is within eps of itself but for a probability of delta:
    ``b = a (1 + 1/n)/(1 + a/n)``, ``a = ln(2/delta) (n R)^2/(2 (eps D_f)^2)``, by the inequality of
    Hoeffding and Serfling.

    Examples
    --------
    >>> round(float(hoeffding_serfling_budget(56, 0.0, 1.0, 0.1, 0.1)), 4)
    0.0
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        n = np.asarray(size, np.float64)
        share = n * np.asarray(reach, np.float64) / (eps * np.asarray(known, np.float64))
        a = math.log(2 / delta) * share**2 / 2
        # (1 + 1/n)/(1/a + 1/n), without a ratio of infinities.
        return np.where(n > 0, (1 + 1 / n) / (1 / a + 1 / n), 0.0)[()]


class Kept(NamedTuple):
    """Hold what is kept of some rows: weights before normalising, zero for keys that are not.

    Attributes
    ----------
    factors : float64 array (rows, n_k)
        What ``e^{L_ij}`` is multiplied by.
    whole : bool array (rows,)
        Rows that a released rule reads whole.
    """

    factors: Array
    whole: Array


@register("vattention")
class VAttention(Method):
    """Read the largest logits of a row exactly, and weigh a sample of the other keys.

    Row i keeps a set F of keys, sinks, a window and the ``top`` largest logits, and of the n_s
    others b drawn uniformly: ``Ahat_i`` is the softmax of ``L_ij`` on F and ``L_ij + ln(n_s/b)`` on
    the draws.  Numerator and denominator are unbiased, their ratio is not.  The largest logits are
    those of the exact matrix: an oracle.

    Parameters
    ----------
    rank : int
        Keys that a row reads, in 1..n_k, with ``budget="fixed"``; otherwise only what ``top`` is
        taken from.
    top : int, optional
        Largest logits in F, of the keys that are no sinks and not in the window; None is
        ``rank // 2``.
    sinks, window : int, default 0
        First and last keys that a row sees, in F.
    eps, delta : float, default 0.1
        The denominator is asked to be within ``eps`` of itself but with probability ``delta``.
    budget : {"fixed", "clt", "known", "hoeffding-serfling", "released"}
        b: "fixed" is ``rank - |F|``, at least 1.  "clt": `clt_budget` with deviation and sum
        estimated by a pilot sample, which is not used again.  "known": the same with the true
        ones, another oracle.  "hoeffding-serfling": valid for any weights, and nearly always all
        keys.  "released": what the public code computes; with ``replace=True``.
    pilot : float, default 0.05
        Share of the n_s keys in the pilot sample, which has at least two.
    replace : bool, default False
        Draw with replacement; repeats count as often as they are drawn.
    preset : {"paper", "released"}, optional
        "paper": the published budget, with replacement.  "released": see Notes.

    Notes
    -----
    The number of keys follows from ``ceil(b)``, at most n_s, where all keys are read.  The pilot
    underestimates heavy tails, and "clt" then misses more often than delta; only the denominator is
    looked at.

    Released code (xAlg-ai/sparse-attention-hub @1a048c9): draws with replacement whose repeats are
    merged, so that the sum is too small by ``(n/b)(1 - (1 - 1/n)^b)``; a one-sided quantile; an
    empty F counts as the sum over all keys; the largest logits are among the keys drawn from, and
    counted once; weights ``1/(1e-6 + b/n_s)``; fewer than two keys to draw from: all are read.

    A draw holds ``order`` (n_q, m), int32: keys that row i sees, in random order, of which it draws
    the first b that are not in F, and -1 beyond them; with replacement float32 uniforms that choose
    keys.  ``pilot`` (n_q, s), float32, are uniforms that choose the pilot sample, s = 0 where there
    is none.  For budgets other than "fixed" these are n_q n_k numbers of four bytes.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=32, d=4, rng=0)[0]
    >>> ahat = sa.VAttention(rank=8).approximate(problem, rng=0)
    >>> (ahat.to_dense() > 0).sum(axis=1).tolist() == [8] * 32
    True
    """

    draw_names = ("pilot", "order")

    def __init__(
        self,
        rank: int,
        top: int | None = None,
        sinks: int = 0,
        window: int = 0,
        eps: float = 0.1,
        delta: float = 0.1,
        budget: str = "fixed",
        pilot: float = 0.05,
        replace: bool = False,
        preset: str | None = None,
    ) -> None:
        self.rank = rank
        self.top = top
        self.sinks = sinks
        self.window = window
        self.eps = eps
        self.delta = delta
        self.budget = budget
        self.pilot = pilot
        self.replace = replace
        self.preset = preset

    @property
    def choices(self) -> Choices:
        """What the parameters and the preset come to."""
        return in_force(self, Choices(), PRESETS)

    @property
    def traits(self) -> Traits:
        """An oracle; everything is honoured."""
        budget, replace, _ = self.choices
        return Traits(
            causal=True,
            key_mask=True,
            row_stochastic=True,
            nonnegative=True,
            claims=CLAIMS,
            oracle=True,
            exact_at_full_rank=budget == "fixed" and not replace and self.top is None,
            logsumexp=True,
        )

    def _check_parameters(self) -> None:
        check_preset(self, Choices(), PRESETS)
        budget, replace, pilot = self.choices
        check_choice(budget, "budget", BUDGETS)
        check_flag(replace, "replace", "True draws a key again and again")
        if budget == "released" and not replace:
            raise ValueError(
                "replace must be True with budget 'released', got False; use preset='released'"
            )
        if budget == "hoeffding-serfling" and replace:
            raise ValueError(
                "replace must be False with budget 'hoeffding-serfling', got True; it is about "
                "draws without replacement"
            )
        check_positive(pilot, "pilot", below=1.0)
        check_positive(self.eps, "eps")
        check_positive(self.delta, "delta", below=1.0)
        for name in ("sinks", "window"):
            check_count(getattr(self, name), name, "give a number of keys", low=0)
        if self.top is not None:
            check_integer(self.top, "top", 0, "give a number of keys")

    @property
    def _top(self) -> int:
        return int(self.rank) // 2 if self.top is None else int(self.top)

    @property
    def _fixed(self) -> int:
        """How many keys F holds where there are enough."""
        return self._top + int(self.sinks) + int(self.window)

    # --- the draw ---

    def _widths(self, problem: AttentionProblem) -> tuple[int, int]:
        """Return the columns of ``pilot`` and ``order`` that are enough for every row."""
        budget, replace, pilot = self.choices
        most = int(problem.visible_counts().max(initial=0))
        pilots = max(2, int(pilot * most)) if budget in ("clt", "released") else 0
        if budget != "fixed":
            return pilots, most
        b = max(1, int(self.rank) - self._fixed)
        return pilots, min(most, b if replace else b + self._fixed)

    def _draw(self, problem: AttentionProblem, rng: np.random.Generator) -> Draw:
        pilots, width = self._widths(problem)
        n_q, kept = problem.n_q, problem.kept_keys.astype(np.int32)
        pilot = rng.random((n_q, pilots), np.float32)
        if self.choices.replace:
            return Draw(pilot=pilot, order=rng.random((n_q, width), np.float32))
        order = np.full((n_q, width), -1, np.int32)
        for i, count in enumerate(problem.visible_counts()):
            chosen = rng.permutation(count)[:width]
            order[i, : len(chosen)] = kept[chosen]
        return Draw(pilot=pilot, order=order)

    def _check_draw(self, problem: AttentionProblem, draw: Mapping[str, Any]) -> Draw:
        checked = super()._check_draw(problem, draw)
        pilots, width = self._widths(problem)
        wanted = {"pilot": (pilots, "f"), "order": (width, "f" if self.choices.replace else "iu")}
        for name, (columns, kinds) in wanted.items():
            x = checked[name]
            if x.dtype.kind not in kinds:
                what = "floating-point numbers" if kinds == "f" else "integers"
                raise TypeError(f"{name} must hold {what}, got {x.dtype}; convert them")
            if x.ndim != 2 or len(x) != problem.n_q or x.shape[1] < columns:
                raise ValueError(
                    f"{name} must have shape ({problem.n_q}, {columns}) or more columns, got "
                    f"{x.shape}; use method.draw(problem, rng)"
                )
            if kinds == "f" and not ((x >= 0) & (x < 1)).all():
                raise ValueError(f"{name} must be in [0, 1), got other numbers; draw uniforms")
        if not self.choices.replace:
            _check_order(problem, checked["order"], width)
        return checked

    # --- rows ---

    def _kept(self, problem: AttentionProblem, rows: Array, logits: Array, draw: Draw) -> Kept:
        """Return what rows keep, for their logits in float64, -inf where hidden."""
        seen, fixed = problem.visible(rows), self._fixed_keys(problem, rows, logits)
        budget, replace, _ = self.choices
        if budget == "released":
            return self._released(seen, fixed, rows, logits, draw)
        rest = seen & ~fixed
        sizes = rest.sum(axis=1)
        b = self._budgets(problem, rest, fixed, rows, logits, draw["pilot"])
        if replace:
            order = draw["order"][rows]
            counts = _drawn(rest, order, b)
        else:
            counts = _first(rest, draw["order"][rows], b)
        scaled = counts * (sizes / np.maximum(b, 1))[:, None]
        if not replace or budget != "fixed":
            scaled[rest & (b >= sizes)[:, None]] = 1.0  # as many as there are: all are read
        return Kept(np.where(fixed, 1.0, scaled), np.zeros(len(rows), bool))

    def _ends(self, seen: Array) -> Array:
        """Return the sinks and the window of rows that see what they see, bool (rows, n_k)."""
        place = np.cumsum(seen, axis=1)
        last = place[:, -1:] - int(self.window)
        return np.asarray(seen & ((place <= int(self.sinks)) | (place > last)))

    def _fixed_keys(self, problem: AttentionProblem, rows: Array, logits: Array) -> Array:
        """Return F of some rows, bool (rows, n_k)."""
        seen = problem.visible(rows)
        fixed = self._ends(seen)
        top = min(self._top, problem.n_k)
        if top:
            others = np.where(fixed, -np.inf, logits)
            chosen = np.argpartition(others, problem.n_k - top, axis=1)[:, problem.n_k - top :]
            best = np.zeros_like(fixed)
            np.put_along_axis(best, chosen, True, axis=1)
            fixed |= best & seen
        return fixed

    def _budgets(
        self,
        problem: AttentionProblem,
        rest: Array,
        fixed: Array,
        rows: Array,
        logits: Array,
        pilot: Array,
    ) -> Array:
        """Return how many of the other keys each row draws, int64."""
        name, replace, share = self.choices
        sizes = rest.sum(axis=1)
        if name == "fixed":
            b = np.maximum(1, int(self.rank) - fixed.sum(axis=1))
            return np.where(sizes > 0, b, 0) if replace else np.minimum(b, sizes)
        x = _exponentials(logits)
        known = np.where(fixed, x, 0).sum(axis=1)
        eps, delta = float(self.eps), float(self.delta)
        if name == "hoeffding-serfling":
            # Of the weights outside of F none is above the smallest of the largest, or one.
            at_most = np.where(rest, x, 0).max(axis=1, initial=0.0)
            reach = np.minimum(1.0, np.where(fixed & (x >= at_most[:, None]), x, 1.0).min(axis=1))
            b = hoeffding_serfling_budget(sizes, reach, known, eps, delta)
        else:
            if name == "known":
                mean = np.where(rest, x, 0).sum(axis=1) / np.maximum(sizes, 1)
                square = np.where(rest, (x - mean[:, None]) ** 2, 0).sum(axis=1)
                deviation = np.sqrt(square / np.maximum(sizes, 1))
            else:
                mean, deviation = _pilot(x, rest, pilot[rows], share)
            b = clt_budget(sizes, deviation, known + sizes * mean, eps, delta, replace=replace)
        # A budget without a number (nothing known, nothing to draw from) reads all.
        b = np.where(np.isnan(b), np.inf, b)
        return np.asarray(np.minimum(np.ceil(np.maximum(b, 1.0)), sizes), np.int64)

    def _released(self, seen: Array, fixed: Array, rows: Array, logits: Array, draw: Draw) -> Kept:
        """Return what the public code keeps: see Notes of the class."""
        from scipy.stats import norm

        x = _exponentials(logits)
        domain = seen & ~self._ends(seen)
        sizes = domain.sum(axis=1)
        n = np.maximum(sizes, 1).astype(np.float64)
        share = self.choices.pilot
        pilots = np.maximum(2, (share * sizes).astype(np.int64))
        uniforms = draw["pilot"][rows]
        places = _pick(domain, uniforms)
        used = np.arange(uniforms.shape[1]) < pilots[:, None]
        found = np.where(used, np.take_along_axis(x, places, axis=1), 0)
        mean = found.sum(axis=1) / pilots
        spread = np.where(used, (found - mean[:, None]) ** 2, 0).sum(axis=1) / (pilots - 1)
        deviation = np.maximum(np.sqrt(spread), 1e-8)
        merged = _drawn(domain, uniforms, pilots) > 0
        sampled = np.where(merged, x, 0).sum(axis=1) / (pilots / n + 1e-6)
        static = np.where(fixed.any(axis=1), np.where(fixed, x, 0).sum(axis=1), x.sum(axis=1))
        allowed = np.maximum(float(self.eps) * (static + sampled), 1e-8)
        b = (float(norm.isf(float(self.delta))) * deviation * n / allowed) ** 2
        b = np.floor(np.clip(b, 1.0, n)).astype(np.int64)
        kept = _drawn(domain, draw["order"][rows], np.minimum(b, draw["order"].shape[1])) > 0
        data = np.minimum(1.0, fixed + np.where(kept, (b / n)[:, None], 0))
        whole = sizes < 2
        data[whole] = seen[whole]
        return Kept(np.where(data > 0, 1.0 / (data + 1e-6), 0), whole)

    def _tiles(
        self, problem: AttentionProblem, draw: Draw
    ) -> Iterator[tuple[Array, Array, Array, Array]]:
        """Yield rows, their weights (rows, n_k), log-sum-exps, and which are read whole."""
        for rows, logits in tiles_of(problem, np.arange(problem.n_q)):
            kept = self._kept(problem, rows, logits, draw)
            top = np.where(kept.factors > 0, logits, -np.inf).max(axis=1, initial=-np.inf)
            some = top > -np.inf
            logits -= np.where(some, top, 0)[:, None]
            with np.errstate(under="ignore", over="ignore", divide="ignore", invalid="ignore"):
                weights = np.where(kept.factors > 0, np.exp(np.minimum(logits, 0.0)), 0.0)
                weights *= kept.factors
                total = weights.sum(axis=1)
                weights /= np.where(some, total, 1)[:, None]
                lse = np.where(some, top + np.log(total), -np.inf)
            yield rows, weights, lse, kept.whole

    def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        counts = np.zeros(problem.n_q, np.int64)
        columns, weights, whole = [np.empty(0, np.int64)], [np.empty(0)], []
        for rows, entries, _, read in self._tiles(problem, draw):
            places, keys = np.nonzero(entries)
            counts[rows] = np.bincount(places, minlength=len(rows))
            columns.append(keys)
            weights.append(entries[places, keys])
            whole.append(read & (entries > 0).any(axis=1))
        made = SparseAttention(
            np.concatenate([[0], np.cumsum(counts)]),
            np.concatenate(columns),
            np.concatenate(weights).astype(problem.dtype),
            problem.n_k,
            round(float(counts.mean())) if problem.n_q else 0,
        )
        if whole and np.concatenate(whole).all():
            made.path = "exact"
        return made

    def _attend_with_lse(self, problem: AttentionProblem, draw: Draw) -> tuple[Array, Array]:
        values = problem.values.astype(np.float64)
        out = np.empty((problem.n_q, values.shape[1]), problem.dtype)
        lse = np.empty(problem.n_q, problem.dtype)
        for rows, weights, normalizers, _ in self._tiles(problem, draw):
            out[rows] = product(weights, values)
            lse[rows] = normalizers
        return out, lse


def _exponentials(logits: Array) -> Array:
    """Return ``e^(L - max)`` of rows, 0 where hidden."""
    top = logits.max(axis=1, keepdims=True, initial=-np.inf)
    with np.errstate(under="ignore", invalid="ignore"):
        return np.asarray(np.exp(logits - np.where(np.isfinite(top), top, 0)))


def _pick(rest: Array, uniforms: Array) -> Array:
    """Return the keys that uniforms (rows, w) stand for among those of ``rest (rows, n_k)``."""
    sizes = rest.sum(axis=1, keepdims=True)
    ranks = np.floor(uniforms.astype(np.float64) * sizes).astype(np.int64)
    members = np.argsort(~rest, axis=1, kind="stable")
    return np.take_along_axis(members, np.minimum(ranks, np.maximum(sizes - 1, 0)), axis=1)


def _drawn(rest: Array, uniforms: Array, b: Array) -> Array:
    """Return how often each key is among the first b draws with replacement, (rows, n_k)."""
    rows, n_k = rest.shape
    used = (np.arange(uniforms.shape[1]) < b[:, None]) & (rest.sum(axis=1) > 0)[:, None]
    flat = (np.arange(rows)[:, None] * n_k + _pick(rest, uniforms))[used]
    return np.bincount(flat, minlength=rows * n_k).reshape(rows, n_k).astype(np.float64)


def _first(rest: Array, order: Array, b: Array) -> Array:
    """Return 1 for the first b keys of ``rest`` in the order of each row, else 0, (rows, n_k)."""
    free = (order >= 0) & np.take_along_axis(rest, np.maximum(order, 0), axis=1)
    chosen = free & (np.cumsum(free, axis=1) <= b[:, None])
    out = np.zeros(rest.shape)
    places, columns = np.nonzero(chosen)
    out[places, order[places, columns]] = 1.0
    return out


def _pilot(x: Array, rest: Array, uniforms: Array, share: float) -> tuple[Array, Array]:
    """Return mean and deviation of x over draws of ``rest``, a share of it and at least two."""
    sizes = rest.sum(axis=1)
    count = np.maximum(2, (share * sizes).astype(np.int64))
    used = np.arange(uniforms.shape[1]) < count[:, None]
    found = np.where(used, np.take_along_axis(x, _pick(rest, uniforms), axis=1), 0)
    mean = found.sum(axis=1) / count
    square = np.where(used, (found - mean[:, None]) ** 2, 0).sum(axis=1) / (count - 1)
    return mean, np.sqrt(square)


def _check_order(problem: AttentionProblem, order: Array, width: int) -> None:
    """Refuse rows of an order that repeat a key, or hold too few keys in sight."""
    n_k = problem.n_k
    if order.size and (order.min() < -1 or order.max() >= n_k):
        raise ValueError(
            f"order must hold keys in 0..n_k - 1 = {n_k - 1}, or -1, got {order.min()} to "
            f"{order.max()}; use method.draw(problem, rng)"
        )
    counts = problem.visible_counts()
    for start in range(0, len(order), 64):
        part = order[start : start + 64]
        rows = np.arange(start, start + len(part))
        listed = np.zeros((len(part), n_k), np.int64)
        places, columns = np.nonzero(part >= 0)
        np.add.at(listed, (places, part[places, columns]), 1)
        if (listed > 1).any():
            raise ValueError("order must hold distinct keys in each row, got one twice; drop it")
        found = (listed * problem.visible(rows)).sum(axis=1)
        short = found < np.minimum(counts[rows], width)
        if short.any():
            i = int(short.argmax())
            raise ValueError(
                f"order must hold {min(int(counts[rows[i]]), width)} keys that row {rows[i]} sees, "
                f"got {found[i]}; use method.draw(problem, rng)"
            )
