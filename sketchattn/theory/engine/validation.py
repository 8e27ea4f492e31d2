"""Many claims on many problems: one table, its differences from the record, its pictures."""

from __future__ import annotations

import fnmatch
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...base.arguments import closest
from ...base.drawing import as_png, make_figure, plain_style
from ...base.draws import Rng, entropy_of
from ...base.files import make_folder, write_bytes
from ...base.parallel import check_jobs, check_progress, in_parallel
from ...kernels._threads import limit_threads
from ...problem import AttentionProblem
from .checking import check_confidence, check_trials, run, sample
from .instances import Instance, as_instance
from .records import HEADS, Claim, Observations, Verdict, plain
from .registry import claims as all_claims
from .registry import get_entry

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Array = NDArray[Any]
T = TypeVar("T")
R = TypeVar("R")

COLUMNS = (
    "claim",
    "instance",
    "source",
    "verdict",
    "recorded",
    "observed",
    "bound",
    "slack",
    "trials",
    "failures",
    "low",
    "high",
    "rank",
    "delta",
    "z",
    "notes",
)
# Seed, trials and confidence of the recorded verdicts: the defaults.
RECORDED_WITH = (0, 200, 0.95)
# Trials of each step of a picture.
PICTURE_TRIALS = 30


@dataclass(frozen=True)
class Row:
    """Pair a verdict with its claim and with the verdict that is recorded.

    Attributes
    ----------
    claim : Claim
    verdict : Verdict
    recorded : str or None
        None where nothing is recorded, as for a user's head.
    confidence : float
        Of the check.
    repeats : bool
        Whether seed, trials and confidence are those of the record.
    """

    claim: Claim
    verdict: Verdict
    recorded: str | None
    confidence: float
    repeats: bool

    @property
    def expected(self) -> bool:
        """Whether the verdict is the recorded one.

        Without a record everything but the violation of a claim that is not refuted is expected.
        With another seed, or other trials, "inconclusive" and "holds" do not contradict each
        other.
        """
        status = self.verdict.status
        if self.recorded is None:
            return status != "violated" or self.claim.status == "refuted"
        if status == self.recorded:
            return True
        return not self.repeats and {status, self.recorded} == {"inconclusive", "holds"}

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict with the source, the record and whether it is expected, for JSON."""
        return {
            **self.verdict.as_dict(),
            "source": self.claim.source,
            "claim_status": self.claim.status,
            "recorded": self.recorded,
            "expected": self.expected,
        }

    def cells(self) -> list[Any]:
        """Return the values of ``COLUMNS``."""
        v = self.verdict
        low, high = v.interval if v.interval is not None else (math.nan, math.nan)
        return [
            v.claim,
            v.instance,
            self.claim.source,
            v.status,
            self.recorded,
            v.observed,
            v.bound,
            v.slack,
            v.trials,
            v.failures,
            low,
            high,
            v.rank,
            v.delta,
            v.z,
            v.notes,
        ]


@dataclass(frozen=True)
class ValidationResult:
    """Hold the verdicts of many claims.

    Attributes
    ----------
    rows : tuple of Row
        By claim; named instances first, then heads.
    trials : int
    confidence : float
    """

    rows: tuple[Row, ...]
    trials: int
    confidence: float
    entropy: int
    _heads: dict[str, AttentionProblem] = field(repr=False)

    @property
    def frame(self) -> pd.DataFrame:
        """The rows as a pandas DataFrame with the columns ``COLUMNS``."""
        import pandas as pd

        frame = pd.DataFrame([row.cells() for row in self.rows], columns=list(COLUMNS))
        return frame.astype({"failures": "Int64", "rank": "Int64"})

    @property
    def unexpected(self) -> tuple[Row, ...]:
        """Rows whose verdict differs from the record."""
        return tuple(row for row in self.rows if not row.expected)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain Python objects, for JSON."""
        return {
            "trials": self.trials,
            "confidence": plain(self.confidence),
            "unexpected": len(self.unexpected),
            "rows": [row.as_dict() for row in self.rows],
        }

    def render(self) -> str:
        """Return a table as text: of heads with the same verdict the one with the least slack."""
        table = [["claim", "on", "source", "verdict", "observed", "bound", "slack", "fail", "rate"]]
        marks = [" "]
        for group in _groups(self.rows, self._heads):
            row = min(group, key=lambda x: x.verdict.slack if x.verdict.slack >= 0 else math.inf)
            v = row.verdict
            on = v.instance if len(group) == 1 else f"{len(group)} heads"
            table.append(
                [
                    v.claim,
                    on,
                    _short_source(row.claim),
                    v.status,
                    _number(v.observed),
                    _number(v.bound),
                    _number(v.slack),
                    "" if v.failures is None else f"{v.failures}/{v.trials}",
                    _interval(v),
                ]
            )
            marks.append("!" if not all(x.expected for x in group) else " ")
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = []
        for mark, cells in zip(marks, table, strict=True):
            parts = [
                cell.ljust(w) if i < 4 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
            ]
            lines.append(f"{mark} {'  '.join(parts)}".rstrip())
        counts: dict[str, int] = {}
        for row in self.rows:
            counts[row.verdict.status] = counts.get(row.verdict.status, 0) + 1
        listed = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
        lines += [
            "",
            f"{len(self.rows)} checks of {self.trials} trials: {listed}",
            f"rate: one-sided {100 * self.confidence:g} % limits of the rate of failure; for a "
            f"mean its interval",
        ]
        odd = self.unexpected
        if odd:
            lines += ["", f"{len(odd)} verdicts differ from the record:"]
            for row in odd:
                recorded = row.recorded or "anything but violated"
                lines.append(f"! {row.verdict} [recorded: {recorded}]")
        else:
            lines.append("all verdicts are the recorded ones")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.render()

    def plot(
        self, out: str | PathLike[str], jobs: int = 1, *, progress: bool | None = None
    ) -> list[Path]:
        """Draw one picture a claim: the observed distribution against the bound over r.

        Each picture shows the first named instance of the claim and the first head that it
        was checked on; observations are drawn again, 30 for each r.

        Parameters
        ----------
        out : path
            Folder; made if there is none.  ``<claim>.png`` is replaced in one step; those of
            claims without a row are deleted.
        jobs : int, default 1
            Claims that are drawn at the same time.
        progress : bool, optional
            Show a bar on stderr; by default where stderr is a terminal.

        Returns
        -------
        list of Path
            In the order of the rows.

        Warns
        -----
        RuntimeWarning
            If pictures are missing, and why the first is.
        """
        workers, show = check_jobs(jobs, "claim"), check_progress(progress)
        by_claim: dict[str, list[Verdict]] = {}
        for row in self.rows:
            by_claim.setdefault(row.claim.id, []).append(row.verdict)
        tasks = [_Picture(name, self._panels(x), self.entropy) for name, x in by_claim.items()]
        folder = make_folder(os.path.expanduser(out))
        for name in all_claims():  # of an earlier run
            if name not in by_claim:
                (folder / f"{name}.png").unlink(missing_ok=True)
        paths, missing = {name: folder / f"{name}.png" for name in by_claim}, {}
        for name, drawn in _in_parallel(_picture, tasks, workers, show, "pictures", "claim"):
            refused = drawn if isinstance(drawn, str) else _refusal(paths[name], drawn)
            if refused is not None:
                missing[name] = refused
                paths[name].unlink(missing_ok=True)
        if missing:
            first, *others = missing
            more = f" and {len(others)} more" if others else ""
            warnings.warn(
                f"pictures are missing beside the verdicts: {first} ({missing[first]}){more}",
                RuntimeWarning,
                stacklevel=2,
            )
        return [path for name, path in paths.items() if name not in missing]

    def _panels(self, verdicts: Sequence[Verdict]) -> tuple[_Panel, ...]:
        """Return the first named instance and the first head to which a claim applies."""
        named = [v for v in verdicts if v.instance not in self._heads]
        heads = [v for v in verdicts if v.instance in self._heads]
        shown = [
            next((v for v in group if v.status != "not applicable"), group[0])
            for group in (named, heads)
            if group
        ]
        return tuple(
            _Panel(self._heads.get(v.instance, v.instance), v.instance, v.status) for v in shown
        )


def _groups(rows: Sequence[Row], heads: Iterable[str]) -> Iterator[list[Row]]:
    """Yield rows one by one, but heads of a claim with one verdict together."""
    known = set(heads)
    together: dict[tuple[str, str, bool], list[Row]] = {}
    order: list[list[Row]] = []
    for row in rows:
        if row.verdict.instance not in known:
            order.append([row])
            continue
        key = (row.claim.id, row.verdict.status, row.expected)
        if key not in together:
            together[key] = []
            order.append(together[key])
        together[key].append(row)
    return iter(order)


def _number(x: float) -> str:
    if math.isnan(x):
        return "-"
    return re.sub(r"e([+-])0*(\d)", r"e\1\2", f"{x:.3g}").replace("e+", "e")


def _interval(verdict: Verdict) -> str:
    if verdict.interval is None:
        return ""
    low, high = verdict.interval
    return f"{_number(low)}..{_number(high)}"


def _short_source(claim: Claim) -> str:
    text = re.split(r"[:;,(]", claim.source)[0].strip()
    return text if len(text) <= 24 else f"{text[:21]}..."


def _wrap(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))


# --- pictures -----------------------------------------------------------------------------------


class _Panel(NamedTuple):
    problem: str | AttentionProblem
    name: str
    status: str


class _Picture(NamedTuple):
    claim: str
    panels: tuple[_Panel, ...]
    entropy: int


def _picture(task: _Picture) -> tuple[str, bytes | str]:
    """Return the id of a claim and its picture as PNG, or why there is none."""
    claim = get_entry(task.claim).claim
    try:
        with limit_threads(1), plain_style():
            figure = make_figure(
                figsize=(5.4 * len(task.panels), 4.4), dpi=110, layout="constrained"
            )
            for i, panel in enumerate(task.panels):
                axes = figure.add_subplot(1, len(task.panels), i + 1)
                _draw(axes, claim, _steps(claim, as_instance(panel.problem), task.entropy))
                title = f"{panel.name}: {panel.status}"
                axes.set_title(title, fontsize=9, parse_math=False)
            title = f"{claim.id} ({claim.status} {claim.kind})\n{claim.title}"
            figure.suptitle(title, fontsize=10, parse_math=False)
            figure.supylabel(_wrap(claim.observes, 60), fontsize=8, parse_math=False)
            return task.claim, as_png(figure)
    except Exception as error:  # of the drawing, or of a claim at other parameters
        return task.claim, f"{type(error).__name__}: {error}"


def _refusal(path: Path, data: bytes) -> str | None:
    """Write a picture; return why it could not be written."""
    try:
        write_bytes(path, data)
    except OSError as error:
        return str(error)
    return None


class _Step(NamedTuple):
    rank: int
    seen: Observations


def _steps(claim: Claim, instance: Instance, entropy: int) -> list[_Step]:
    """Observe a claim at the parameters of its ladder that fit the problem."""
    entry = get_entry(claim.id)
    steps = []
    for extra in entry.ladder or ({},):
        if int(extra.get("rank", 1)) > instance.n:
            continue
        parameters = {**entry.parameters, **extra}
        seen = sample(entry, instance, PICTURE_TRIALS, entropy, parameters)
        if seen is not None and len(seen.values):
            steps.append(_Step(1 if seen.rank is None else seen.rank, seen))
    return sorted(steps, key=lambda step: step.rank)


def _draw(axes: Axes, claim: Claim, steps: Sequence[_Step]) -> None:
    if not steps:
        axes.text(
            0.5,
            0.5,
            "nothing to draw: not applicable, or r >= n\nfor all parameters of the picture",
            ha="center",
            va="center",
            transform=axes.transAxes,
            fontsize=9,
        )
        axes.set_axis_off()
        return
    ranks = [step.rank for step in steps]
    means = claim.kind in ("equality", "expectation")
    bounds = [float(np.median(np.asarray(step.seen.bound, np.float64))) for step in steps]
    middle: list[float] = []
    low: list[float] = []
    high: list[float] = []
    for step in steps:
        values = np.asarray(step.seen.values, np.float64)
        if means:
            spread = 5 * float(values.std(ddof=1)) / math.sqrt(len(values))
            centre = float(values.mean())
            triple = (centre, centre - spread, centre + spread)
        else:
            centre, below, above = (float(x) for x in np.quantile(values, (0.5, 0.05, 0.95)))
            triple = (centre, below, above)
        for kept, x in zip((middle, low, high), triple, strict=True):
            kept.append(x)
    what = "mean, 5 standard errors" if means else "median, 5 % to 95 %"
    errors = np.array([np.subtract(middle, low), np.subtract(high, middle)])
    axes.errorbar(
        ranks,
        middle,
        yerr=np.maximum(errors, 0.0),
        fmt="o",
        color="#0072B2",
        capsize=3,
        label=f"observed: {what}",
        zorder=3,
    )
    if not means:
        for step in steps:
            values = np.asarray(step.seen.values, np.float64)
            axes.plot([step.rank] * len(values), values, ".", color="#56B4E9", markersize=2)
    label = "theory" if claim.kind == "equality" else "bound"
    axes.plot(ranks, bounds, "-", color="black", marker="_", label=label, zorder=2)
    trivial = [step.seen.trivial for step in steps if step.seen.trivial is not None]
    if len(trivial) == len(ranks):
        axes.plot(ranks, trivial, "--", color="0.45", label="trivial predictor", zorder=1)
    axes.set_xlabel("r", fontsize=9)
    axes.set_xscale("log", base=2)
    shown = [*bounds, *(x for x in middle if math.isfinite(x))]
    if min(shown) > 0 and max(shown) < math.inf:
        axes.set_yscale("log", nonpositive="clip")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.grid(True, which="major", color="0.9", linewidth=0.6)
    axes.tick_params(which="both", labelsize=8)
    axes.legend(fontsize=7)


# --- validating ---------------------------------------------------------------------------------


class _Task(NamedTuple):
    problem: str | AttentionProblem
    claims: tuple[str, ...]
    trials: int
    confidence: float
    entropy: int


def _run(task: _Task) -> list[Verdict]:
    """Check the claims of one problem, whose matrix is computed once."""
    instance = as_instance(task.problem)
    found = []
    with limit_threads(1):
        for name in task.claims:
            entry = get_entry(name)
            try:
                verdict = run(
                    entry, instance, task.trials, task.confidence, task.entropy, entry.parameters
                )
            except Exception as error:
                raise RuntimeError(
                    f"claim {name!r} failed on {instance.name!r}: {type(error).__name__}: {error}"
                ) from error
            found.append(verdict)
    return found


def _chosen(claims: Any) -> dict[str, Claim]:
    """Return claims by ids, topics or patterns."""
    known = all_claims()
    if claims is None:
        return known
    names = [claims] if isinstance(claims, str) else claims
    if not isinstance(names, Iterable):
        raise TypeError(
            f"claims must be ids or topics, got {type(claims).__name__}; "
            f"see sketchattn.theory.claims()"
        )
    topics = {name.split(".")[0] for name in known}
    found: dict[str, Claim] = {}
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"claims must hold strings, got {type(name).__name__}; "
                f"see sketchattn.theory.claims()"
            )
        if name in topics:
            found.update({x: y for x, y in known.items() if x.split(".")[0] == name})
        elif name in known:
            found[name] = known[name]
        elif any(sign in name for sign in "*?["):
            matching = fnmatch.filter(known, name)
            if not matching:
                raise ValueError(
                    f"claims must match at least one id, got the pattern {name!r}; "
                    f"see sketchattn.theory.claims()"
                )
            found.update({x: known[x] for x in matching})
        else:
            hint = closest(name, {*known, *topics}) if "." in name else closest(name, topics)
            raise ValueError(f"claims must hold ids or topics, got {name!r}{hint}")
    if not found:
        raise ValueError("claims must hold at least one id, got none; leave claims out")
    return found


def _bundled() -> set[tuple[str | None, str]]:
    from ...heads.files import BUNDLED, load_heads

    return {(problem.name, problem.digest) for name in BUNDLED for problem in load_heads(name)}


def validate(
    claims: str | Sequence[str] | None = None,
    heads: Any = None,
    trials: int = 200,
    confidence: float = 0.95,
    rng: Rng = 0,
    jobs: int = 1,
    *,
    progress: bool | None = None,
) -> ValidationResult:
    """Check claims on heads and on the built-in instances, counterexamples among them.

    Parameters
    ----------
    claims : id, topic, pattern, or sequence of these, optional
        A topic is what stands before the point; a pattern has ``*``, ``?`` or ``[...]``, as
        "sketching.amm_*".  By default all claims.
    heads : Heads, AttentionProblem, sequence of AttentionProblem, path, or name, optional
        By default the bundled heads.  Claims that are about instances only are not checked on
        heads.
    trials : int, default 200
        Independent draws for each check.
    confidence : float, default 0.95
        Of the limits of rates, each one-sided.
    rng : None, int or numpy.random.Generator
        The same integer gives the same verdicts, whatever ``jobs``.
    jobs : int, default 1
        Problems that are checked at the same time.
    progress : bool, optional
        Show a bar on stderr; by default where stderr is a terminal.

    Returns
    -------
    ValidationResult
        ``rows``, ``frame``, ``unexpected``, ``render()``, ``plot(out)``.

    Raises
    ------
    TypeError, ValueError
        Before any work, for unknown claims, heads that are none, and numbers out of range.
    RuntimeError
        If a check fails with an error.

    Examples
    --------
    >>> import sketchattn as sa
    >>> heads = sa.make_heads("clustered", n=64, d=8, rng=0)
    >>> result = sa.theory.validate("sketching.moment_countsketch", heads, trials=60)
    >>> [(row.verdict.instance, row.verdict.status) for row in result.rows]
    [('reference', 'holds'), ('clusters', 'holds'), ('clustered/head0', 'holds')]
    >>> len(result.unexpected)
    0
    """
    from ...heads.inputs import as_heads

    chosen = _chosen(claims)
    count, level = check_trials(trials), check_confidence(confidence)
    workers, show = check_jobs(jobs, "problem"), check_progress(progress)
    problems = {str(p.name): p for p in as_heads("minilm" if heads is None else heads)}
    entropy = entropy_of(rng)
    bundled = _bundled()

    work: dict[str, list[str]] = {}
    for name, record in chosen.items():
        for instance in record.instances:
            work.setdefault(instance, []).append(name)
    for name in [name for name in problems if name in work]:
        raise ValueError(
            f"heads must not have the name of an instance, got {name!r}; give it another name"
        )
    on_heads = [name for name, record in chosen.items() if HEADS in record.recorded]
    work |= {name: on_heads for name in problems if on_heads}
    tasks = [
        _Task(problems.get(name, name), tuple(names), count, level, entropy)
        for name, names in work.items()
    ]
    # Heads first: they take longest.
    tasks.sort(key=lambda task: isinstance(task.problem, str))
    done = _in_parallel(_run, tasks, workers, show, "validate", "problem")
    verdicts = {(v.claim, v.instance): v for found in done for v in found}
    repeats = (entropy, count, level) == RECORDED_WITH
    rows = []
    for name, record in chosen.items():
        for instance in work:
            if (name, instance) not in verdicts:
                continue
            problem = problems.get(instance)
            if problem is None:
                recorded: str | None = record.recorded[instance]
            elif (problem.name, problem.digest) in bundled:
                recorded = record.recorded.get(instance, record.recorded[HEADS])
            else:
                recorded = None
            rows.append(Row(record, verdicts[name, instance], recorded, level, repeats))
    return ValidationResult(tuple(rows), count, level, entropy, problems)


def _in_parallel(
    work: Callable[[T], R], tasks: Sequence[T], jobs: int, show: bool, what: str, unit: str
) -> Iterator[R]:
    """Yield the results of tasks as they are finished, counted by a bar."""
    bar: Any = None
    if show:
        from tqdm import tqdm

        bar = tqdm(total=len(tasks), desc=what, unit=unit, file=sys.stderr)
    results = in_parallel(work, tasks, min(jobs, max(1, len(tasks))))
    try:
        for found in results:
            if bar is not None:
                bar.update(1)
            yield found
    finally:
        results.close()  # an interruption ends the workers too
        if bar is not None:
            bar.close()
