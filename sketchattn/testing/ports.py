"""Other implementations of approximate methods: with our draws to rounding error, or by law.

A method is a deterministic function of its inputs and its draw.  A port that takes the draw is
compared entry by entry; one that can only draw its own is compared by its law.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.arguments import check_choice
from ..problem import AttentionProblem
from ..zoo.base import Method, make_method, methods
from .inputs import DTYPES, ROUNDOFF
from .precision import method_errors, run, unit_of, wrong_answers
from .report import FAIL, PASS, UNCERTIFIED, AttentionReport, CaseRecord, MutantRecord, ProbeRecord
from .samples import TESTS, comparisons, p_value
from .tolerance import floor
from .vectors import ONE_HEAD, RANK, GoldenCase, Spec, make_inputs, storable, versions

Array = NDArray[Any]

# Distance, in tolerances, at which a wrong answer is seen beyond doubt.
FAR = 5.0
OPTIONS = ("cross", "causal", "key_mask", "scale")


@dataclass(frozen=True)
class Trial:
    """Hold one head, one draw of ours, and our output.

    Attributes
    ----------
    name : str
        ``option/seed``.
    problem : AttentionProblem
        In float64.
    options : mapping
        What the implementation is called with beside q, k, v and the draw.
    draw : mapping from names to arrays
        Floating point is exact in float32.
    out : float64 array (n_q, d_v)
    """

    name: str
    case: GoldenCase
    problem: AttentionProblem
    options: Mapping[str, Any]
    draw: Mapping[str, Array] = field(default_factory=dict)
    out: Array = field(default_factory=lambda: np.zeros(0))

    @property
    def shape(self) -> str:
        """The sizes in words."""
        p = self.problem
        return f"n {p.n_q} x {p.n_k}, d {p.d}, d_v {p.d_v}"


@dataclass(frozen=True)
class MethodReport(AttentionReport):
    """Say whether a function computes an approximate method, how wrong it is and where.

    Attributes
    ----------
    draws : {"given", "own"}
        "own": ``probes`` are permutation tests, and ``rho`` of a wrong law is five times the level
        over its p-value, so that 5 is needed here too.
    convention : str
        The method.
    kind : str
        "approx".

    Notes
    -----
    The other attributes are those of AttentionReport.
    """

    draws: str = "given"

    def __str__(self) -> str:
        """Return the verdict, then a line for each failure."""
        if self.draws == "given":
            return super().__str__()
        lines = [self._first_line(), *(f"  {x}" for x in self.failures)]
        lines += [f"  would be let through: samples {x.name} ({x.dtype})" for x in self.unseen]
        lines += [f"  not checked: {name} ({why})" for name, why in self.skipped.items()]
        return "\n".join(lines + [f"  note: {x}" for x in self.notes])

    def __repr__(self) -> str:
        """Return the first line."""
        return f"<MethodReport {self._first_line()}>"


def check_method(
    fn: Callable[..., Any],
    method: str | Method,
    *,
    draws: str = "given",
    dtypes: Sequence[str] = ("float32",),
    supports: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1),
    repeats: int = 100,
    level: float = 1e-3,
    strict: bool = True,
    **parameters: Any,
) -> MethodReport:
    """Check another implementation of an approximate method.

    With ``draws="given"`` it is handed our draw as arrays and compared to our float64 output,
    entry by entry: the tolerance is twice the error that roundings of inputs and draw cause, and
    a floor.  With ``draws="own"`` it draws itself, and ``repeats`` of its outputs are compared to
    as many of ours by permutation tests.

    Parameters
    ----------
    fn : callable
        ``fn(q, k, v, draw=draw, **options)``: NumPy arrays (n_q, d), (n_k, d), (n_k, d_v) of one
        head, a dictionary of arrays, and of the options ``causal=True``, ``key_mask=`` and
        ``scale=`` those that a case needs.  Deterministic methods get no draw.  bfloat16 comes as
        float32 with numbers that are exact in it; draws are float32, for float64 float64.
        For ``draws="own"``: no draw, and ``seed=``, another integer each time, if it has a
        parameter of this name.
    method : str or Method
        What it implements: any registered name, or an object.
    draws : {"given", "own"}
    dtypes : sequence of {"float64", "float32", "float16", "bfloat16"}
        Precisions of its inputs.
    supports : sequence of {"cross", "causal", "key_mask", "scale"}, optional
        Options that it has; all that the method's traits allow by default.  "cross" is
        n_q != n_k.
    seeds : sequence of int
        Of inputs and draws.
    repeats : int, default 100
        Outputs of each sample for ``draws="own"``.
    level : float, default 1e-3
        Probability that a right implementation with draws of its own fails, all tests together.
    strict : bool
        Whether a check that would have let a wrong answer through does not count as passed.
    **parameters
        Of the method, for a name; ``rank`` is 8 unless given.

    Returns
    -------
    MethodReport
        ``mutants`` say which wrong answers would have been seen: zeros,
        the mean of V, rows in reverse, exact attention, another draw, a draw with other numbers.

    Raises
    ------
    TypeError, ValueError
        For arguments out of range.

    Examples
    --------
    >>> import sketchattn as sa
    >>> def mine(q, k, v, draw, scale=None, key_mask=None):
    ...     kept = draw["columns"]
    ...     scale = q.shape[1] ** -0.5 if scale is None else scale
    ...     weights = np.exp(scale * q @ k[kept].T)
    ...     return weights @ v[kept] / weights.sum(axis=1, keepdims=True)
    >>> report = sa.testing.check_method(mine, "uniform", supports=("cross", "key_mask", "scale"))
    >>> report.passed
    True
    >>> wrong = sa.testing.check_method(
    ...     lambda *x, **options: 1.01 * mine(*x, **options), "uniform", supports=())
    >>> wrong.verdict
    'FAIL'
    """
    if not callable(fn):
        raise TypeError(f"fn must be callable, got {type(fn).__name__}; pass a function")
    check_choice(draws, "draws", ("given", "own"))
    for dtype in dtypes:
        check_choice(dtype, "dtypes", DTYPES)
    if not dtypes or not seeds:
        raise ValueError(
            f"dtypes and seeds must not be empty, got {tuple(dtypes)} and {tuple(seeds)}; give one"
        )
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}; 1e-3 is usual")
    if repeats < 20:
        raise ValueError(f"repeats must be at least 20, got {repeats}; fewer say nothing")
    for option in supports or ():
        check_choice(option, "supports", OPTIONS)
    one = as_method(method, parameters)
    own = draws == "own" and one.traits.randomized
    trials = list(_trials(one, supports, seeds))
    check = _Check(fn, one, strict)
    for dtype in dtypes:
        if own:
            check.by_law(trials, dtype, repeats, level / (TESTS * len(trials) * len(dtypes)))
        else:
            check.by_entry(trials, dtype)
    notes = []
    if own:
        notes.append(
            f"permutation tests of {repeats} outputs on either side, at level {level:g} together"
        )
    allowed = [x for x in OPTIONS if any(t.name.startswith(x) for t in trials)]
    return MethodReport(
        verdict=check.verdict,
        candidate=getattr(fn, "__name__", type(fn).__name__),
        convention=repr(one),
        kind="approx",
        dtypes=tuple(dtypes),
        supports=tuple(allowed),
        strict=strict,
        skipped={} if supports is None else _skipped(one, supports),
        notes=tuple(notes),
        cases=tuple(check.cases),
        probes=tuple(check.probes),
        mutants=tuple(check.mutants),
        resolution={},
        seeds=tuple(seeds),
        tolerance="derived",
        versions=versions(),
        draws="own" if own else "given",
    )


def as_method(method: str | Method, parameters: Mapping[str, Any]) -> Method:
    """Return the method; a name gets a rank where it has one and none is given."""
    if isinstance(method, str) and method in methods() and "rank" not in parameters:
        known = inspect.signature(methods()[method]).parameters
        if "rank" in known:
            parameters = {"rank": RANK, **parameters}
    return make_method(method, parameters)


def _allowed(method: Method) -> dict[str, bool]:
    traits = method.traits
    return {
        "cross": traits.rectangular,
        "causal": traits.causal or traits.oracle,
        "key_mask": traits.key_mask,
        "scale": True,
    }


def _skipped(method: Method, supports: Sequence[str]) -> dict[str, str]:
    """Return the options that the method has and the implementation was not asked for."""
    return {
        name: "not in supports"
        for name, has in _allowed(method).items()
        if has and name not in supports
    }


def _trials(
    method: Method, supports: Sequence[str] | None, seeds: Sequence[int]
) -> Iterator[Trial]:
    """Yield heads of each option, with our draw and our output."""
    allowed = _allowed(method)
    chosen = [x for x in OPTIONS if allowed[x]] if supports is None else list(supports)
    rank = getattr(method, "rank", None)
    n = max(33, 4 * int(rank)) if isinstance(rank, int | np.integer) else 33
    tables: dict[str, tuple[tuple[int, int, int, int], dict[str, Any], tuple[str, ...]]] = {
        "plain": ((1, 1, n, n), {}, ()),
        "cross": ((1, 1, n, n + ONE_HEAD[3] - ONE_HEAD[2]), {}, ()),
        "causal": ((1, 1, n, n), {"causal": True}, ()),
        "key_mask": ((1, 1, n, n), {}, ("key_mask",)),
        "scale": ((1, 1, n, n), {"scale": 0.375}, ()),
    }
    for option in ("plain", *chosen):
        sizes, options, masks = tables[option]
        for seed in seeds:
            name = f"check_method/{method.name}/{option}"
            spec = Spec(name, sizes=sizes, options=options, masks=masks, spread=2)
            case = make_inputs(spec, int(seed))
            problem = case.problems()[0]
            given: dict[str, Any] = dict(options)
            if case.key_mask is not None:
                given["key_mask"] = case.key_mask
            draw = storable(method.draw(problem, rng=int(seed)))
            out = run(method, problem, draw)
            yield Trial(f"{option}/{seed}", case, problem, given, draw, out)


def _inputs(trial: Trial, dtype: str) -> tuple[Array, Array, Array]:
    """Return q, k and v in a precision in which they are exact."""
    kind = np.dtype("float32" if dtype == "bfloat16" else dtype)
    q, k, v = (x[0].astype(kind) for x in (trial.case.q, trial.case.k, trial.case.v))
    return q, k, v


def handed(draw: Mapping[str, Array], dtype: str) -> dict[str, Array]:
    """Return a draw as it is given to an implementation: copies, in float32 but for float64."""
    kind = np.float64 if dtype == "float64" else np.float32
    return {
        name: x.astype(kind) if np.issubdtype(x.dtype, np.floating) else x.copy()
        for name, x in draw.items()
    }


def _read(x: Any, want: tuple[int, ...]) -> Array | str:
    """Return an output in float64, or what is wrong with it."""
    if hasattr(x, "detach"):
        x = x.detach().to("cpu")
        x = x.double() if hasattr(x, "double") else x
    out = np.asarray(x)
    if out.shape != want:
        return f"must return shape {want}, got {out.shape}"
    return out.astype(np.float64)


class _Check:
    """Gather what one check finds.

    Parameters
    ----------
    fn : callable
    method : Method
    strict : bool
    """

    def __init__(self, fn: Callable[..., Any], method: Method, strict: bool) -> None:
        self.fn, self.method, self.strict = fn, method, strict
        self.cases: list[CaseRecord] = []
        self.probes: list[ProbeRecord] = []
        self.mutants: list[MutantRecord] = []

    @property
    def verdict(self) -> str:
        statuses = [x.status for x in self.cases] + [x.status for x in self.probes]
        if "fail" in statuses:
            return FAIL
        return PASS if all(x.rejected for x in self.mutants) else UNCERTIFIED

    def _call(self, trial: Trial, dtype: str, more: Mapping[str, Any]) -> Array | str:
        try:
            made = self.fn(*_inputs(trial, dtype), **more, **trial.options)
        except Exception as error:  # whatever the implementation raises is its failure
            return f"raised {type(error).__name__}: {error}"
        return _read(made, trial.out.shape)

    # --- with our draw ------------------------------------------------------------------------

    def by_entry(self, trials: Sequence[Trial], dtype: str) -> None:
        """Compare outputs for our draws."""
        nearest: dict[str, tuple[float, str]] = {}
        for trial in trials:
            e_lp, atol = self._error(trial, dtype), floor(trial.out, dtype)
            tol = 2 * e_lp + max(atol, 2 * ROUNDOFF[dtype] * float(np.abs(trial.out).max()))
            wrong = self._wrong(trial)
            for name, x in wrong.items():
                rho = float(np.abs(x - trial.out).max()) / tol if tol else math.inf
                if rho >= nearest.get(name, (-1.0, ""))[0]:
                    nearest[name] = (rho, trial.name)
            more = {"draw": handed(trial.draw, dtype)} if self.method.traits.randomized else {}
            made = self._call(trial, dtype, more)
            self.cases.append(_compared(trial, dtype, made, wrong, (e_lp, atol, tol)))
        for name, (rho, where) in nearest.items():
            self.mutants.append(MutantRecord(name, dtype, rho, where, rho >= FAR))

    def _error(self, trial: Trial, dtype: str) -> float:
        """Return the error of correct programs in a precision."""
        unit = unit_of(dtype, trial.problem.d)
        error = method_errors(self.method, [trial.problem], [trial.draw], trial.out[None], unit)
        if dtype == "float32":
            single = run(self.method, trial.problem.astype(np.float32), trial.draw)
            error = max(error, float(np.abs(single - trial.out).max(initial=0.0)))
        return error

    def _wrong(self, trial: Trial) -> dict[str, Array]:
        """Return wrong answers: of other programs, and of ours with another draw."""
        v = np.asarray(trial.problem.v, np.float64)
        wrong = wrong_answers(trial.out, v, np.asarray(trial.problem.output))
        if not self.method.traits.randomized:
            return wrong
        other = self.method.draw(trial.problem, rng=12345)
        found = {"another draw": run(self.method, trial.problem, other)}
        scaled = {
            name: 1.25 * x if np.issubdtype(x.dtype, np.floating) else x
            for name, x in trial.draw.items()
        }
        with suppress(TypeError, ValueError):  # what the method itself refuses is no draw
            found["a draw 1.25 times as large"] = run(self.method, trial.problem, scaled)
        for name, x in found.items():
            if np.abs(x - trial.out).max(initial=0.0) > 1e-6:
                wrong[name] = x
        return wrong

    # --- with draws of its own ----------------------------------------------------------------

    def by_law(self, trials: Sequence[Trial], dtype: str, repeats: int, level: float) -> None:
        """Compare samples of outputs; the level is that of one test."""
        best: dict[str, tuple[float, str]] = {}
        for number, trial in enumerate(trials):
            theirs = self._sample(trial, dtype, repeats)
            if isinstance(theirs, str):
                self.probes.append(
                    ProbeRecord(trial.name, "outputs", dtype, "fail", message=theirs)
                )
                continue
            rng = np.random.default_rng((number, repeats))
            ours, fresh = (self._ours(trial, rng, repeats) for _ in range(2))
            exact = np.asarray(trial.problem.output).ravel()
            slack = 2 * self._error(trial, dtype) + floor(trial.out, dtype)
            for name, statistic in comparisons(theirs, ours, exact, slack):
                p = p_value(statistic, repeats, 2 * repeats, level / 2, rng)
                self.probes.append(
                    ProbeRecord(
                        trial.name,
                        name,
                        dtype,
                        "pass" if p > level else "fail",
                        message=f"p = {p:.2g}, more than {level:.2g} needed",
                    )
                )
            v = np.asarray(trial.problem.v, np.float64)
            for label, other in _wrong_laws(fresh, v, exact).items():
                p = 1.0
                for _, statistic in comparisons(other, ours, exact, slack):
                    p = min(p, p_value(statistic, repeats, 2 * repeats, level / 2, rng))
                    if p <= level:
                        break
                rho = FAR * level / p
                if rho >= best.get(label, (-1.0, ""))[0]:
                    best[label] = (rho, trial.name)
        for name, (rho, where) in best.items():
            self.mutants.append(MutantRecord(name, dtype, rho, where, rho >= FAR))

    def _sample(self, trial: Trial, dtype: str, repeats: int) -> Array | str:
        """Return outputs (repeats, n_q d_v) of the implementation, or what is wrong with one."""
        seeded = "seed" in _parameters(self.fn)
        rows = []
        for seed in range(repeats):
            made = self._call(trial, dtype, {"seed": seed} if seeded else {})
            if isinstance(made, str):
                return made
            if not np.isfinite(made).all():
                return f"is not finite in {int((~np.isfinite(made)).sum())} entries"
            rows.append(made.ravel())
        return np.stack(rows)

    def _ours(self, trial: Trial, rng: np.random.Generator, repeats: int) -> Array:
        rows = [self.method.attend(trial.problem, rng=rng) for _ in range(repeats)]
        return np.stack([np.asarray(x, np.float64).ravel() for x in rows])


def _parameters(fn: Callable[..., Any]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(fn).parameters)
    except (TypeError, ValueError):  # of compiled code
        return ()


def _wrong_laws(fresh: Array, v: Array, exact: Array) -> dict[str, Array]:
    """Return samples of wrong laws, made of a sample (R, n_q d_v) of the right one."""
    mean = fresh.mean(axis=0)
    middle = np.broadcast_to(v.mean(axis=0), (len(exact) // v.shape[1], v.shape[1])).ravel()
    return {
        "a quarter larger": 1.25 * fresh,
        "halfway to the mean of V": (fresh + middle) / 2,
        "half the spread": mean + (fresh - mean) / 2,
        "no spread": np.broadcast_to(mean, fresh.shape).copy(),
    }


def _compared(
    trial: Trial,
    dtype: str,
    made: Array | str,
    wrong: Mapping[str, Array],
    limits: tuple[float, float, float],
) -> CaseRecord:
    """Return the record of one output."""
    e_lp, atol, tol = limits
    option, seed = trial.name.split("/")
    label = f"{dtype}/{option}/{seed}"
    if isinstance(made, str):
        return CaseRecord(label, option, dtype, trial.shape, "fail", message=made)
    want = trial.out
    error = np.abs(made - want)
    lost = ~np.isfinite(error)
    index = np.unravel_index(np.argmax(lost if lost.any() else error), want.shape)
    worst = float(error[index])
    right = bool(not lost.any() and worst <= tol)
    gaps = {name: float(np.abs(x - want).max()) for name, x in wrong.items()}
    closest = min(gaps, key=lambda name: gaps[name]) if gaps else ""
    matches = ""
    if not right and not lost.any():
        near = {name: float(np.abs(x - made).max()) for name, x in wrong.items()}
        best = min(near, key=lambda name: near[name]) if near else ""
        matches = best if best and near[best] <= max(tol, worst / 10) else ""
    size = float(np.linalg.norm(want))
    with np.errstate(all="ignore"):
        corr = float(np.corrcoef(made.ravel(), want.ravel())[0, 1])
    return CaseRecord(
        id=label,
        feature=option,
        dtype=dtype,
        shape=trial.shape,
        status="pass" if right else "fail",
        err_max=worst,
        err_rms=float(np.sqrt(np.mean(error**2))),
        rel_fro=float(np.linalg.norm(error)) / size if size else math.nan,
        corr=corr,
        worst_index=tuple(int(i) for i in index),
        got=float(made[index]),
        want=float(want[index]),
        e_lp=e_lp,
        atol=atol,
        tol=tol,
        ratio=worst / tol if tol else (math.inf if worst else 0.0),
        wrong_share=tol / gaps[closest] if closest else math.nan,
        closest_wrong=closest,
        matches=matches,
        message=f"{int(lost.sum())} entries are not finite" if lost.any() else "",
    )
