"""``check_attention``: is a function attention, and would a mistake have been seen."""

from __future__ import annotations

import importlib
import math
import numbers
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.arguments import check_choice, check_flag, check_name, check_positive
from ..base.floating import without_floating_errors
from .candidate import (
    LIBRARIES,
    Arrays,
    Candidate,
    ShapeError,
    jax_arrays,
    numpy_arrays,
    torch_arrays,
)
from .gradients import (
    NAMES,
    cotangent,
    gradient_tolerance,
    true_gradients,
    wrong_gradients,
)
from .inputs import DTYPES, FEATURES, Case, given_cases, make_cases
from .matrix_probe import matrix_cases, measured_matrix, mutant_matrix, record, resolve
from .mutants import MUTANTS, REJECTS, nearest, relevant
from .probes import CONTRACTS, PROBES, first_line, make_stage, run_probes
from .report import FAIL, PASS, UNCERTIFIED, AttentionReport, CaseRecord, MutantRecord, ProbeRecord
from .tolerance import Tolerance, logsumexp_tolerance, tolerance, would_pass

Array = NDArray[Any]

# Wrong answers that outputs in half precision cannot show: the matrix probe does.
_BELOW_ROUNDING = ("last key dropped", "last incomplete tile dropped", "scale wrong by 1 %")
# Options that a function may take and ignore, and the wrong program that it then is.
_IGNORED = {
    "scale": "scale ignored",
    "causal": "causal ignored",
    "bool_mask": "mask ignored",
    "additive_mask": "added mask ignored",
    "key_mask": "padding of keys ignored",
    "window": "window ignored",
    "softcap": "softcap ignored",
    "sink": "sink ignored",
}
# Features whose gradients are checked.
_DIFFERENTIATED = (
    "plain", "dv", "cross", "scale", "causal", "bool_mask", "additive_mask", "key_mask", "window",
    "softcap", "gqa",
)  # fmt: skip


@without_floating_errors
def check_attention(
    fn: Callable[..., Any],
    *,
    convention: str = "torch",
    dtypes: Sequence[str] = ("float32",),
    backward: bool | Callable[..., Any] = False,
    supports: Iterable[str] | None = None,
    kind: str = "exact",
    contract: Mapping[str, str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    tolerance: str | float = "derived",
    strict: bool = True,
    draws: Mapping[str, Any] | None = None,
    arrays: str | None = None,
    device: str | None = None,
    inputs: Sequence[tuple[Any, Any, Any]] | None = None,
) -> AttentionReport:
    """Check a function that should compute attention, and prove that a wrong one would fail.

    The truth is float64.  The tolerance is twice the error of a program that computes the same
    input in the given precision, plus two roundings; every listed wrong answer must be at least
    five tolerances away from the truth on some case, or the report is UNCERTIFIED.  What rounding
    hides from outputs, a dropped key or a scale that is off by 1 %, is looked for in the matrix
    itself, which values from the identity show.

    Parameters
    ----------
    fn : callable
        Called with arguments and layout of the convention.
    convention : {"torch", "jax", "onnx", "flash", "hf", "sketchattn"}
        A key of ``sketchattn.conventions``.
    dtypes : sequence of {"float16", "bfloat16", "float32", "float64"}
        Of the inputs; float64 is judged by the ceiling of what rounding can do.
    backward : bool or callable
        True differentiates ``fn`` by autograd, of torch or jax.  A callable
        ``vjp(q, k, v, cotangent, **options) -> (dq, dk, dv)`` in the layout of the convention is
        checked instead, and is what NumPy functions need.
    supports : iterable of str, optional
        Of "dv" (d_v != d), "cross" (n_q != n_k), "scale", "causal", "bool_mask", "empty_row",
        "additive_mask", "key_mask", "window", "softcap", "gqa", "sink" and "lse".  None tries all
        that the convention offers and skips what raises.  Given ones must work; of the others one
        that raises is not checked, one that works is noted, and one that is taken and ignored is a
        failure.
    kind : {"exact", "approx"}
        Outputs of an approximation are reported and not judged; see ``contract``.
    contract : mapping, optional
        For properties "P1" to "P17" of an approximation: "exact" (bit for bit), "tol" or
        "not_claimed", which others are.
    seeds : sequence of int
    tolerance : "derived" or float
        With a number, outputs are judged as ever, and wrong answers by the number: whether a test
        with this tolerance could fail.  Properties and matrices are then left out.
    strict : bool
        Whether an error above the tolerance that rounding could explain fails, and whether
        UNCERTIFIED is not a pass.
    draws : mapping, optional
        Keywords of every call: the fixed draws of a randomised method.
    arrays : {"numpy", "torch", "jax"}, optional
        What ``fn`` is given; None is what users of the convention pass: tensors for "torch", arrays
        of jax for "jax", NumPy arrays for the others (bfloat16 by ``ml_dtypes``).
    device : str, optional
        Where tensors of torch are made, "cpu" by default.
    inputs : sequence of (q, k, v), optional
        Arrays (batch, heads, n, d), whatever the layout of the convention, that take the place of
        all cases.  They make plain calls: no option, property or matrix is judged, and the report
        lists the options among those that were not checked.

    Returns
    -------
    AttentionReport
        ``print`` it; ``raise_for_failures()`` inside a test.

    Raises
    ------
    ValueError, TypeError, ImportError
        For arguments that are not as above, and packages that are not installed.  What ``fn``
        raises is in the report.

    Examples
    --------
    >>> import sketchattn as sa
    >>> def kernel(q, k, v, softmax_scale=None):
    ...     return v.mean(axis=1, keepdims=True) + 0 * q
    >>> report = sa.testing.check_attention(
    ...     kernel, convention="flash", supports=(), seeds=(0,))
    >>> report.verdict, report.failures[0].matches
    ('FAIL', 'mean of V')
    """
    check_name(convention, "convention", tuple(LIBRARIES))
    check_choice(kind, "kind", ("exact", "approx"))
    check_flag(strict, "strict")
    names = (dtypes,) if isinstance(dtypes, str) else tuple(dtypes)
    for dtype in names:
        check_name(dtype, "dtypes", DTYPES)
    if not names or not len(seeds):
        raise ValueError("dtypes and seeds must not be empty, got none; give at least one of each")
    library = LIBRARIES[convention]
    wanted = library.features if supports is None else frozenset(supports)
    for feature in sorted(wanted):
        check_choice(feature, "supports", sorted(FEATURES))
        if feature not in library.features:
            raise ValueError(
                f"supports must hold what the convention {convention!r} offers, got {feature!r}; "
                f"it offers {', '.join(sorted(library.features))}"
            )
    number = _check_tolerance(tolerance)
    if contract is not None:
        if inputs is not None:
            raise ValueError(
                f"contract must be None beside inputs, on which no property is tried, got "
                f"{contract!r}; leave one out"
            )
        for probe, claim in contract.items():
            check_choice(probe, "contract", sorted({x.id for x in PROBES}))
            check_choice(claim, "contract", CONTRACTS)
    run = _Run(
        candidate=_make_candidate(fn, convention, arrays, device, draws, backward),
        wanted=wanted,
        declared=supports is not None,
        exact=kind == "exact",
        number=number,
    )
    for dtype in names:
        run.candidate.to.floats(np.zeros(1), dtype)  # says what is not installed
    if inputs is not None:
        # Given arrays make the plain call, and nothing else is known of the options.
        options = sorted(wanted - {"lse"})
        run.skipped |= dict.fromkeys(options, "given inputs make plain calls alone")
    for dtype in names:
        if inputs is not None:
            given = list(given_cases(dtype, library.setting, inputs))
            run.cases(dtype, given)
            if backward is not False:
                run.gradients(dtype, given)
        else:
            run.cases(dtype, list(make_cases(dtype, library.setting, wanted, seeds)))
            if backward is not False:
                run.gradients(dtype, list(make_cases(dtype, library.setting, wanted, seeds[:1])))
            if number is None:
                run.matrices(dtype, seeds[0])
                run.properties(dtype, seeds[0], contract)
            if supports is not None:
                run.undeclared(dtype, seeds[0])
    return run.report(
        dtypes=names,
        convention=convention,
        kind=kind,
        strict=strict,
        seeds=tuple(int(x) for x in seeds),
        tolerance="derived" if number is None else number,
    )


def _check_tolerance(tolerance: object) -> float | None:
    """Return a number, or None for the derived tolerance."""
    if isinstance(tolerance, str):
        if tolerance != "derived":
            raise ValueError(f"tolerance must be 'derived' or a number, got {tolerance!r}")
        return None
    if isinstance(tolerance, bool) or not isinstance(tolerance, numbers.Real):
        raise TypeError(
            f"tolerance must be 'derived' or a number, got {type(tolerance).__name__}; give one"
        )
    return check_positive(tolerance, "tolerance")


def _make_candidate(
    fn: Callable[..., Any],
    convention: str,
    arrays: str | None,
    device: str | None,
    draws: Mapping[str, Any] | None,
    backward: bool | Callable[..., Any],
) -> Candidate:
    """Return the function under test with what it takes to call it."""
    for name, x in (("fn", fn), ("backward", backward)):
        if not callable(x) and (name == "fn" or not isinstance(x, bool)):
            raise TypeError(f"{name} must be callable, got {type(x).__name__}; pass a function")
    kind = LIBRARIES[convention].arrays if arrays is None else arrays
    check_choice(kind, "arrays", ("numpy", "torch", "jax"))
    if device is not None and kind != "torch":
        raise ValueError(
            f"device must be None for arrays of {kind}, got {device!r}; move them inside fn"
        )
    if backward is True and kind == "numpy":
        raise ValueError(
            "backward must be a function vjp(q, k, v, cotangent, **options) for NumPy arrays, got "
            "True; only torch and jax differentiate"
        )
    vjp = backward if callable(backward) else None
    return Candidate(fn, convention, kind, _maker(kind, device), dict(draws or {}), vjp)


def _maker(kind: str, device: str | None) -> Arrays:
    """Return how arrays of a library are made and read."""
    makers = {
        "numpy": numpy_arrays,
        "torch": lambda: torch_arrays(device),
        "jax": jax_arrays,
    }
    return makers[kind]()


@dataclass
class _Run:
    """Hold what a check has found so far."""

    candidate: Candidate
    wanted: frozenset[str]
    declared: bool
    exact: bool
    number: float | None
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    records: list[CaseRecord] = field(default_factory=list)
    probes: list[ProbeRecord] = field(default_factory=list)
    wrong: dict[tuple[str, str], tuple[float, str]] = field(default_factory=dict)
    resolution: dict[str, dict[str, float]] = field(default_factory=dict)
    worked: set[str] = field(default_factory=set)

    # --- outputs ----------------------------------------------------------------------------------

    def cases(self, dtype: str, cases: list[Case]) -> None:
        """Judge the outputs of cases."""
        for case in cases:
            if case.feature in self.skipped:
                continue
            truth, lse = case.truth()
            tol = tolerance(case, truth)
            far = self.reject(case, truth, tol) if self.exact else {}
            try:
                out = self.candidate.run(case)
            except ShapeError as wrong:
                self.fail(case, str(wrong))
                continue
            except Exception as wrong:  # noqa: BLE001  # a candidate may raise anything
                self.raised(case, wrong)
                continue
            self.worked.add(case.feature)
            self.records.append(self.judge(case, out, truth, tol, far))
            if case.feature == "plain" and "lse" in self.wanted and "lse" not in self.skipped:
                self.logsumexp(case, lse)

    def raised(self, case: Case, wrong: Exception) -> None:
        """Skip a feature that raises at once where nobody promised it; fail otherwise."""
        said = f"raised {type(wrong).__name__}: {first_line(wrong)}"
        if case.feature == "plain" and not self.records:  # nothing worked: once is enough
            said += self.other_arrays(case)
        if self.declared or case.feature == "plain" or case.feature in self.worked:
            self.fail(case, said)
        else:
            self.skipped[case.feature] = said
            for key in [x for x in self.wrong if MUTANTS[x[1]].feature == case.feature]:
                del self.wrong[key]

    def other_arrays(self, case: Case) -> str:
        """Say which arrays a function takes that raises for those that it is given."""
        given = self.candidate.arrays
        # A function of torch has loaded torch.
        for kind in (x for x in ("torch", "jax", "numpy") if x != given and x in sys.modules):
            try:
                replace(self.candidate, arrays=kind, to=_maker(kind, None)).run(case)
            except Exception:  # noqa: BLE001, S112  # a candidate may raise anything
                continue
            return f"; it takes arrays of {kind}: pass arrays={kind!r}"
        if given == "numpy" and "torch" in sys.modules:
            return "; it was given NumPy arrays, and tensors only with arrays='torch'"
        return ""

    def fail(self, case: Case, message: str) -> None:
        """Record a case that has no output."""
        self.records.append(
            CaseRecord(case.id, case.feature, case.dtype, case.shape, "fail", message=message)
        )

    def reject(self, case: Case, truth: Array, tol: Tolerance) -> dict[str, float]:
        """Return how many tolerances wrong answers are away, and remember the largest."""
        far: dict[str, float] = {}
        allowed = tol.tol if self.number is None else self.number
        for mutant in relevant(case):
            key = case.dtype, mutant.name
            rho, _ = self.wrong.get(key, (-1.0, ""))
            if rho >= REJECTS and not case.id.endswith("/0"):
                continue
            error = float(np.abs(mutant.answer(case) - truth).max(initial=0.0))
            far[mutant.name] = error / allowed if allowed > 0 else math.inf * (error > 0)
            if far[mutant.name] > rho:
                self.wrong[key] = far[mutant.name], case.id
        return far

    def judge(
        self,
        case: Case,
        out: Array,
        truth: Array,
        tol: Tolerance,
        far: Mapping[str, float],
        gradient: bool = False,
    ) -> CaseRecord:
        """Compare an output, or a gradient, with the truth."""
        gap = np.abs(out - truth)
        gap = np.where(np.isnan(gap), np.inf, gap)
        where = tuple(int(i) for i in np.unravel_index(int(gap.argmax()), gap.shape))
        error, finite = float(gap.max()), bool(np.isfinite(gap).all())
        over = float((gap / np.maximum(tol.ceiling, np.finfo(float).tiny)).max())
        status = "pass" if error <= tol.tol else "suspect" if over <= 1 else "fail"
        clear = {x: y for x, y in far.items() if x not in _BELOW_ROUNDING and y >= REJECTS}
        closest = min(clear, key=lambda x: clear[x], default="")
        matches = ""
        if self.exact and status != "pass" and not gradient:
            near = nearest(case, out, truth)
            if near is not None and near[1] < 0.5:
                matches = near[0]
        size = float(np.linalg.norm(truth))
        return CaseRecord(
            id=case.id,
            feature=case.feature,
            dtype=case.dtype,
            shape=case.shape,
            status=status if self.exact else "report",
            err_max=error,
            err_rms=float(np.sqrt(np.mean(gap**2))),
            rel_fro=float(np.linalg.norm(gap)) / size if size else math.inf,
            corr=_correlation(out, truth) if finite else math.nan,
            worst_index=where,
            got=float(out[where]),
            want=float(truth[where]),
            e_lp=tol.e_lp,
            atol=tol.floor,
            tol=tol.tol,
            ratio=error / tol.tol if tol.tol > 0 else math.inf * (error > 0),
            ceiling_ratio=over,
            wrong_share=1 / clear[closest] if closest else math.nan,
            closest_wrong=closest,
            matches=matches,
            would_pass={} if gradient else would_pass(case, out, truth),
            empty_rows=int((~case.seen().any(axis=-1)).sum()),
        )

    def logsumexp(self, case: Case, truth: Array) -> None:
        """Judge the logsumexp of a plain case."""
        name = "logsumexp of the logits"
        try:
            _, lse = self.candidate.run_lse(case)
        except Exception as wrong:  # noqa: BLE001  # a candidate may raise anything
            said = f"raised {type(wrong).__name__}: {first_line(wrong)}"
            if self.declared or "lse" in self.worked or isinstance(wrong, ShapeError):
                self.probes.append(ProbeRecord("lse", name, case.dtype, "fail", message=said))
            else:
                self.skipped["lse"] = said
            return
        self.worked.add("lse")
        limit = logsumexp_tolerance(case, truth)
        gap = np.abs(lse - truth)
        good = bool((gap <= limit).all())
        self.probes.append(
            ProbeRecord(
                "lse",
                name,
                case.dtype,
                "pass" if good else "fail",
                float(gap.max()) if np.isfinite(gap).all() else math.inf,
                float(limit.max()),
            )
        )

    # --- gradients --------------------------------------------------------------------------------

    def gradients(self, dtype: str, cases: list[Case]) -> None:
        """Judge the gradients of one case for each feature, and of all plain ones."""
        seen: set[str] = set()
        for number, case in enumerate(cases):
            if (
                case.feature not in _DIFFERENTIATED
                or case.feature in self.skipped
                or (case.feature in seen and case.feature not in ("plain", "softcap"))
            ):
                continue
            seen.add(case.feature)
            g = cotangent(case, number)
            truth = true_gradients(case, g)
            tol = gradient_tolerance(case, g, truth)
            allowed = tol.tol if self.number is None else (self.number,) * 3
            for name, wrong in wrong_gradients(case, g, truth):
                rho = max(
                    float(np.abs(x - y).max()) / t if t > 0 else 0.0
                    for x, y, t in zip(wrong, truth, allowed, strict=True)
                )
                if rho > self.wrong.get((dtype, name), (-1.0, ""))[0]:
                    self.wrong[dtype, name] = rho, case.id
            case = replace(case, id=f"{case.id} gradient")
            try:
                found = self.candidate.gradients(case, g)
            except Exception as wrong:  # noqa: BLE001  # a candidate may raise anything
                said = f"raised {type(wrong).__name__}: {first_line(wrong)}"
                self.fail(case, str(wrong) if isinstance(wrong, ShapeError) else said)
                continue
            for i, name in enumerate(NAMES):
                one = Tolerance(tol.e_lp[i], tol.floors[i], tol.tol[i], tol.ceilings[i])
                named = replace(case, id=f"{case.id} {name}")
                entry = self.judge(named, found[i], truth[i], one, {}, gradient=True)
                matches = ""
                if entry.status != "pass":
                    matches = _nearest_gradient(found[i], truth[i], i, case, g, truth)
                self.records.append(replace(entry, matches=matches))

    # --- matrices, properties, options that are not declared --------------------------------------

    def matrices(self, dtype: str, seed: int) -> None:
        """Look at the matrix itself, for the wrong answers too that outputs do not show."""
        setting = self.candidate.library.setting
        supports = self.wanted - self.skipped.keys()
        left = {
            name: rho
            for (of, name), (rho, _) in self.wrong.items()
            if of == dtype and rho < REJECTS and name in MUTANTS
        }
        found: dict[str, float] = {"scale": 0.0, "row_sum": 0.0, "mismatches": 0.0}
        for case in matrix_cases(dtype, setting, supports, seed):
            for name in [x for x in left if MUTANTS[x].feature in ("plain", case.feature)]:
                mutant = MUTANTS[name]
                if mutant.matters(case) and not resolve(mutant_matrix(mutant, case), case).right:
                    self.wrong[dtype, name] = left.pop(name), "matrix probe"
            try:
                matrix = measured_matrix(self.candidate, case)
            except Exception as wrong:  # noqa: BLE001  # a candidate may raise anything
                said = f"raised {type(wrong).__name__}: {first_line(wrong)}"
                status = "fail" if self.exact else "report"
                self.probes.append(ProbeRecord("matrix", case.feature, dtype, status, message=said))
                continue
            seen = resolve(matrix, case)
            for key, value in (
                ("scale", abs(seen.scale)),
                ("row_sum", seen.row_sum),
                ("mismatches", float(seen.mismatches)),
            ):
                found[key] = max(found[key], value) if value == value else found[key]
            entry = record(case, seen)
            self.probes.append(entry if self.exact else replace(entry, status="report"))
        self.resolution[dtype] = found

    def properties(self, dtype: str, seed: int, contract: Mapping[str, str] | None) -> None:
        """Check the properties that need no truth."""
        supports = self.wanted - self.skipped.keys()
        try:
            stage = make_stage(
                self.candidate, dtype, self.candidate.library.setting, supports, seed
            )
        except Exception as wrong:  # noqa: BLE001  # a candidate may raise anything
            said = f"raised {type(wrong).__name__}: {first_line(wrong)}"
            self.probes.append(ProbeRecord("P1", "values of 1 give 1", dtype, "fail", message=said))
            return
        claims = contract if self.exact or contract is not None else {}
        self.probes += run_probes(stage, supports, claims)

    def undeclared(self, dtype: str, seed: int) -> None:
        """Pass every option that is not declared once: it must raise, or work."""
        library = self.candidate.library
        for feature in sorted((library.features - self.wanted) & {*_IGNORED, "gqa"}):
            cases = make_cases(dtype, library.setting, frozenset({feature}), (seed,))
            case = next(x for x in cases if x.feature == feature)
            try:
                out = self.candidate.run(case)
            except Exception as wrong:  # noqa: BLE001  # it should raise
                self.skipped[feature] = (
                    f"not declared; raised {type(wrong).__name__}: {first_line(wrong)}"
                )
                continue
            truth, _ = case.truth()
            tol = tolerance(case, truth)
            entry = self.judge(case, out, truth, tol, {})
            if entry.status == "pass":
                self.notes.append(f"{feature} is not declared and works")
                continue
            mutant = MUTANTS.get(_IGNORED.get(feature, ""))
            answer = None if mutant is None else mutant.answer(case)
            ignored = answer is not None and np.abs(out - answer).max() <= 2 * tol.tol
            said = "is taken and ignored" if ignored else "is taken and the answer is wrong"
            self.records.append(
                replace(
                    entry,
                    status="fail",
                    message=f"{feature} is not declared, {said} (error {entry.err_max:.3g}); "
                    f"raise an error for it",
                )
            )

    # --- verdict ----------------------------------------------------------------------------------

    def report(self, **known: Any) -> AttentionReport:
        """Return the report."""
        if not self.exact:
            self.wrong.clear()
        mutants = tuple(
            MutantRecord(name, dtype, rho, case, rho >= REJECTS or case == "matrix probe")
            for (dtype, name), (rho, case) in self.wrong.items()
        )
        bad = ("fail", "suspect") if known["strict"] else ("fail",)
        statuses = [x.status for x in self.records] + [x.status for x in self.probes]
        wrong = any(x in bad for x in statuses)
        seen = all(x.rejected for x in mutants)
        fn = self.candidate.fn
        return AttentionReport(
            verdict=FAIL if wrong else PASS if seen else UNCERTIFIED,
            candidate=getattr(fn, "__qualname__", type(fn).__qualname__),
            supports=tuple(x for x in FEATURES if x in self.wanted and x not in self.skipped),
            skipped=dict(self.skipped),
            notes=tuple(dict.fromkeys(self.notes)),
            cases=tuple(self.records),
            probes=tuple(self.probes),
            mutants=mutants,
            resolution=dict(self.resolution),
            versions=_versions(self.candidate.arrays),
            **known,
        )


def _correlation(x: Array, y: Array) -> float:
    """Return the correlation of the entries, NaN for constants."""
    a, b = x - x.mean(), y - y.mean()
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum()) / size if size > 0 else math.nan


def _nearest_gradient(
    found: Array, right: Array, i: int, case: Case, g: Array, truth: tuple[Array, Array, Array]
) -> str:
    """Return the wrong program whose gradient is closest, where it is closer than the truth."""
    best, name = 0.5, ""
    if not np.isfinite(found).all():
        return name
    for label, wrong in wrong_gradients(case, g, truth):
        far = float(np.linalg.norm(wrong[i] - right))
        distance = float(np.linalg.norm(wrong[i] - found)) / far if far > 0 else math.inf
        if distance < best:
            best, name = distance, label
    return name


def _versions(arrays: str) -> dict[str, str]:
    """Return what the numbers depend on."""
    from ..kernels._threads import thread_count

    found = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(thread_count()),
    }
    for name in ("sketchattn", "numpy", "numba", *((arrays,) if arrays != "numpy" else ())):
        found[name] = str(getattr(importlib.import_module(name), "__version__", "unknown"))
    return found
