"""Many claims on many problems: their verdicts, what differs from the record, the pictures."""

from __future__ import annotations

import fnmatch
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from numpy.typing import NDArray

from ...base.arguments import closest
from ...base.draws import Rng, entropy_of
from ...base.files import make_folder, write_bytes
from ...base.floating import without_floating_errors
from ...base.parallel import check_jobs, check_progress, in_parallel
from ...kernels._threads import limit_threads
from ...problem import AttentionProblem
from .checking import check_confidence, check_trials, run
from .instances import as_instance
from .pictures import Panel, Picture, draw_claim, picture
from .records import HEADS, Claim, Verdict, plain
from .registry import claims as all_claims
from .registry import get_entry
from .table import COLUMNS, RECORDED_WITH, Row, render

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Array = NDArray[Any]
T = TypeVar("T")
R = TypeVar("R")


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
        return render(self.rows, self._heads, self.trials, self.confidence)

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
        tasks = [Picture(name, self._panels(x), self.entropy) for name, x in by_claim.items()]
        folder = make_folder(os.path.expanduser(out))
        for name in all_claims():  # of an earlier run
            if name not in by_claim:
                (folder / f"{name}.png").unlink(missing_ok=True)
        paths, missing = {name: folder / f"{name}.png" for name in by_claim}, {}
        for name, drawn in _in_parallel(picture, tasks, workers, show, "pictures", "claim"):
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

    def figure(self, claim: str) -> Figure:
        """Return the picture of one claim as a Matplotlib figure, as `plot` draws it.

        Parameters
        ----------
        claim : str
            The id of a claim among the rows.

        Returns
        -------
        matplotlib.figure.Figure
            Made without pyplot, for ``savefig`` in any format; lines, ticks and fonts that the
            picture does not set are those of ``matplotlib.rcParams``.

        Raises
        ------
        ValueError
            For a claim without a row.

        Examples
        --------
        >>> import sketchattn as sa
        >>> name = "sketching.moment_countsketch"
        >>> heads = sa.make_heads("gaussian", n=16, d=4, rng=0)
        >>> result = sa.theory.validate(name, heads, trials=20, progress=False)
        >>> result.figure(name).get_suptitle().startswith(name)
        True
        """
        verdicts = [row.verdict for row in self.rows if row.claim.id == claim]
        if not verdicts:
            known = {row.claim.id for row in self.rows}
            raise ValueError(
                f"claim must be the id of a claim with a row, got {claim!r}{closest(claim, known)}"
            )
        with limit_threads(1):
            return draw_claim(Picture(claim, self._panels(verdicts), self.entropy))

    def _panels(self, verdicts: Sequence[Verdict]) -> tuple[Panel, ...]:
        """Return the first named instance and the first head to which a claim applies."""
        named = [v for v in verdicts if v.instance not in self._heads]
        heads = [v for v in verdicts if v.instance in self._heads]
        shown = [
            next((v for v in group if v.status != "not applicable"), group[0])
            for group in (named, heads)
            if group
        ]
        return tuple(
            Panel(self._heads.get(v.instance, v.instance), v.instance, v.status) for v in shown
        )


def _refusal(path: Path, data: bytes) -> str | None:
    """Write a picture; return why it could not be written."""
    try:
        write_bytes(path, data)
    except OSError as error:
        return str(error)
    return None


# --- running ------------------------------------------------------------------------------------


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


@without_floating_errors
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
