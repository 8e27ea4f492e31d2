"""Reports: what was checked, what was wrong with it, and whether a mistake would have been seen."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

# Of the JSON that a report is written as.
SCHEMA = 1

# Failures that are printed.
_SHOWN = 20

PASS, FAIL, UNCERTIFIED = "PASS", "FAIL", "UNCERTIFIED"


@dataclass(frozen=True)
class CaseRecord:
    """Record one call of the function under test beside the truth.

    Attributes
    ----------
    id : str
        ``dtype/feature/kind of inputs/seed``.
    feature, dtype, shape : str
    status : {"pass", "suspect", "fail", "report"}
        Suspect is an error above the tolerance that rounding could still explain; "report" is
        not judged.
    err_max, err_rms, rel_fro : float
        Largest error, its root mean square, and ``|Ohat - O|_F / |O|_F``.
    corr : float
        Correlation of the entries of output and truth.
    worst_index : tuple of int
        (batch, head, row, column) of the largest error.
    got, want : float
        The two values there.
    e_lp, atol, tol : float
        Error of low-precision programs, the floor, and the tolerance made of them.
    ratio, ceiling_ratio : float
        ``err_max / tol``, and the largest error over its ceiling.
    wrong_share : float
        Tolerance over the error of the wrong answer that comes closest to passing: at 1 it would
        pass.  Wrong answers that are left to the matrix probe do not count.
    closest_wrong : str
        Which one that is.
    matches : str
        The wrong answer that the output is nearest to, of a case that fails.
    would_pass : mapping from str to bool
        By published tolerances.
    empty_rows : int
        Rows that see no key.
    message : str
        What was raised, or which result could not be compared.
    """

    id: str
    feature: str
    dtype: str
    shape: str
    status: str
    err_max: float = math.nan
    err_rms: float = math.nan
    rel_fro: float = math.nan
    corr: float = math.nan
    worst_index: tuple[int, ...] = ()
    got: float = math.nan
    want: float = math.nan
    e_lp: float = math.nan
    atol: float = math.nan
    tol: float = math.nan
    ratio: float = math.nan
    ceiling_ratio: float = math.nan
    wrong_share: float = math.nan
    closest_wrong: str = ""
    matches: str = ""
    would_pass: Mapping[str, bool] = field(default_factory=dict)
    empty_rows: int = 0
    message: str = ""

    def __str__(self) -> str:
        """Return one line in plain words."""
        start = f"{self.id} ({self.shape}): "
        if self.message:
            return start + self.message
        words = f"{start}error {self.err_max:.3g}, tolerance {self.tol:.3g}"
        if self.worst_index:
            words += (
                f", worst at {self.worst_index}: got {self.got:.6g}, want {self.want:.6g}"
                f"; correlation {self.corr:.6f}"
            )
        if self.status == "suspect":
            words += f"; rounding could explain it ({self.ceiling_ratio:.2g} of the ceiling)"
        if self.matches:
            words += f"; looks like: {self.matches}"
        if self.closest_wrong:
            words += (
                f"; a wrong answer ({self.closest_wrong}) would pass at "
                f"{1 / self.wrong_share if self.wrong_share else math.inf:.3g} times this tolerance"
            )
        return words


@dataclass(frozen=True)
class ProbeRecord:
    """Record one property of attention that needs no truth.

    Attributes
    ----------
    id : str
        "P1" to "P17", "lse", or "matrix".
    name : str
        The property in words; for the matrix, the feature.
    dtype : str
    status : {"pass", "fail", "skip", "report"}
    error, limit : float
        What was found, and what is allowed: 0 is bit for bit.
    message : str
    """

    id: str
    name: str
    dtype: str
    status: str
    error: float = math.nan
    limit: float = math.nan
    message: str = ""

    def __str__(self) -> str:
        """Return one line in plain words."""
        words = f"{self.id} {self.name} ({self.dtype})"
        if not math.isnan(self.error):
            allowed = "bit for bit" if self.limit == 0 else f"at most {self.limit:.3g}"
            words += f": off by {self.error:.3g}, {allowed} allowed"
        return words + (f": {self.message}" if self.message else "")


@dataclass(frozen=True)
class MutantRecord:
    """Record whether a wrong answer would have been seen.

    Attributes
    ----------
    name, dtype : str
    rho : float
        Its largest error over the tolerance, over all cases; 5 is needed.
    case : str
        Where that was, or "matrix probe".
    rejected : bool
    """

    name: str
    dtype: str
    rho: float
    case: str
    rejected: bool


@dataclass(frozen=True)
class AttentionReport:
    """Say whether a function computes attention, how wrong it is and where.

    Attributes
    ----------
    verdict : {"PASS", "FAIL", "UNCERTIFIED"}
        UNCERTIFIED: nothing was wrong, and a wrong program would have been let through as well.
    candidate, convention, kind : str
    dtypes, supports : tuple of str
    strict : bool
    skipped : mapping from str to str
        Features that were not checked, and why.
    notes : tuple of str
    cases : tuple of CaseRecord
    probes : tuple of ProbeRecord
    mutants : tuple of MutantRecord
    resolution : mapping
        Of each dtype: scale error, wrong visible pairs and sums of rows by the matrix probe.
    seeds : tuple of int
    tolerance : str or float
    versions : mapping from str to str

    Examples
    --------
    >>> import sketchattn as sa
    >>> report = sa.testing.check_attention(
    ...     sa.as_convention("flash"), convention="flash", supports=("causal",), seeds=(0,))
    >>> report.verdict, report.passed
    ('PASS', True)
    """

    verdict: str
    candidate: str
    convention: str
    kind: str
    dtypes: tuple[str, ...]
    supports: tuple[str, ...]
    strict: bool
    skipped: Mapping[str, str]
    notes: tuple[str, ...]
    cases: tuple[CaseRecord, ...]
    probes: tuple[ProbeRecord, ...]
    mutants: tuple[MutantRecord, ...]
    resolution: Mapping[str, Mapping[str, float]]
    seeds: tuple[int, ...]
    tolerance: str | float
    versions: Mapping[str, str]

    @property
    def passed(self) -> bool:
        """Whether the verdict is PASS; without ``strict`` UNCERTIFIED will do."""
        return self.verdict == PASS or (self.verdict == UNCERTIFIED and not self.strict)

    @property
    def failures(self) -> tuple[CaseRecord | ProbeRecord, ...]:
        """What made the verdict FAIL."""
        bad = ("fail", "suspect") if self.strict else ("fail",)
        return (
            *(x for x in self.cases if x.status in bad),
            *(x for x in self.probes if x.status in bad),
        )

    @property
    def unseen(self) -> tuple[MutantRecord, ...]:
        """Wrong answers that would have been let through."""
        return tuple(x for x in self.mutants if not x.rejected)

    def raise_for_failures(self) -> None:
        """Raise AssertionError with the report, unless it passed."""
        if not self.passed:
            raise AssertionError(str(self))

    def _first_line(self) -> str:
        judged = [x for x in self.cases if x.status != "report"]
        done = sum(x.status in ("pass", "fail", "suspect") for x in self.probes)
        line = (
            f"{self.verdict}: {self.candidate} as attention of {self.convention}, "
            f"{', '.join(self.dtypes)}: {len(judged)} cases, {done} properties, "
            f"{len(self.mutants)} wrong answers"
        )
        if self.verdict == FAIL:
            return f"{line}; {len(self.failures)} failures"
        if self.verdict == UNCERTIFIED:
            return f"{line}; {len(self.unseen)} of these would be let through"
        return line + ", all of which would be seen"

    def __str__(self) -> str:
        """Return the verdict, then a line for each failure."""
        lines = [self._first_line()]
        bad = self.failures
        lines += [f"  {x}" for x in bad[:_SHOWN]]
        if len(bad) > _SHOWN:
            lines.append(f"  and {len(bad) - _SHOWN} more in report.failures")
        if self.unseen:
            lines.append("  a check at this tolerance would let these through:")
            for x in self.unseen:
                lines.append(f"    {x.name} ({x.dtype}): {x.rho:.2g} tolerances away, 5 are needed")
        judged = [x for x in self.cases if math.isfinite(x.ratio)]
        if judged and self.verdict != FAIL:
            worst = max(judged, key=lambda x: x.ratio)
            lines.append(
                f"  largest error: {worst.ratio:.2f} of its tolerance {worst.tol:.3g}, in "
                f"{worst.id}; correlation {worst.corr:.6f}"
            )
        for dtype in self.dtypes:
            seen = [x for x in self.mutants if x.dtype == dtype and x.case != "matrix probe"]
            if seen and not self.unseen:
                near = min(seen, key=lambda x: x.rho)
                lines.append(
                    f"  {dtype}: the nearest wrong answer is {near.rho:.3g} tolerances away "
                    f"({near.name}): {100 / near.rho:.1f} % of that distance is allowed"
                )
        lines += [f"  not checked: {name} ({why})" for name, why in self.skipped.items()]
        lines += [f"  note: {x}" for x in self.notes]
        return "\n".join(lines)

    def __repr__(self) -> str:
        """Return the first line."""
        return f"<AttentionReport {self._first_line()}>"

    def _repr_html_(self) -> str:
        """Return the verdict and a table of the cases."""
        head = ("case", "status", "error", "tolerance", "error / tolerance", "correlation")
        rows = [
            (x.id, x.status, f"{x.err_max:.3g}", f"{x.tol:.3g}", f"{x.ratio:.2f}", f"{x.corr:.6f}")
            for x in self.cases
        ]
        cells = "".join(
            "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows
        )
        top = "".join(f"<th>{html.escape(c)}</th>" for c in head)
        return (
            f"<pre>{html.escape(str(self))}</pre>"
            f"<details><summary>{len(rows)} cases</summary>"
            f"<table><tr>{top}</tr>{cells}</table></details>"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data: NaN is None, and infinities are text."""
        plain = {"schema": SCHEMA, **asdict(self), "passed": self.passed}
        found: dict[str, Any] = _plain(plain)
        return found

    def to_json(self, indent: int | None = None) -> str:
        """Return everything as JSON, with the version of its schema."""
        return json.dumps(self.as_dict(), indent=indent, allow_nan=False)


def _plain(x: Any) -> Any:
    """Return data that JSON has words for."""
    if isinstance(x, Mapping):
        return {str(key): _plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(value) for value in x]
    if isinstance(x, float) and not math.isfinite(x):
        return None if math.isnan(x) else ("inf" if x > 0 else "-inf")
    return x
