"""Many claims on many problems: their verdicts, what differs from the record, the pictures."""

from __future__ import annotations

import fnmatch
import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from numpy.typing import NDArray

from ...base.arguments import closest, guesses
from ...base.draws import Rng, entropy_of
from ...base.files import make_folder, write_bytes, write_text
from ...base.floating import without_floating_errors
from ...base.parallel import check_jobs, check_progress, in_parallel
from ...base.words import Phrase, Worded
from ...kernels._threads import limit_threads
from ...problem import AttentionProblem
from .checking import check_confidence, check_parameters, check_trials, run
from .inputs import Problem, as_problems
from .instances import as_instance, instance_names
from .page import verdicts_page
from .pictures import Panel, Picture, figure_of, picture
from .records import HEADS, Claim, Verdict, plain
from .registry import Entry, adopt, get_entry, how_to_import, own_entries
from .registry import claims as all_claims
from .summary import as_html, as_text, headline
from .table import COLUMNS, RECORDED_WITH, Row, render

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Array = NDArray[Any]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, repr=False)
class ValidationResult(Worded):
    """Hold the verdicts of many claims.

    Printed it is what a person asks first: topics with their counts of verdicts, what differs from
    the record, and the refuted claims with their counterexamples; ``render(every=True)`` is the
    table of all checks.

    Attributes
    ----------
    rows : tuple of Row
        By claim; named instances first, then heads.
    trials : int
    confidence : float
    parameters : mapping
        Those that were given in place of the defaults.
    """

    rows: tuple[Row, ...]
    trials: int
    confidence: float
    entropy: int
    _heads: Mapping[str, Problem] = field(repr=False)
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def frame(self) -> pd.DataFrame:
        """The rows as a pandas DataFrame with the columns ``COLUMNS``.

        ``frame.to_csv(path)`` writes what ``validate --out`` calls verdicts.csv, and
        ``frame.to_latex()``, or that of some columns of it, a table for a paper.
        """
        import pandas as pd

        frame = pd.DataFrame([row.cells() for row in self.rows], columns=list(COLUMNS))
        return frame.astype({"failures": "Int64", "rank": "Int64"})

    @property
    def unexpected(self) -> tuple[Row, ...]:
        """Rows whose verdict differs from the record."""
        return tuple(row for row in self.rows if not row.expected)

    @property
    def checked(self) -> tuple[Row, ...]:
        """Rows in which something was checked, or is recorded as not applicable."""
        return tuple(row for row in self.rows if row.checked)

    @property
    def passed(self) -> bool:
        """Whether there is no bad news.

        Something was checked, every verdict is the recorded one, and no claim of your own without
        a record is violated.
        """
        return bool(self.checked) and all(row.expected and not row.lost for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain Python objects, for JSON."""
        return {
            "trials": self.trials,
            "confidence": plain(self.confidence),
            "parameters": plain(self.parameters),
            "unexpected": len(self.unexpected),
            "passed": self.passed,
            "rows": [row.as_dict() for row in self.rows],
        }

    def render(self, *, every: bool = False) -> str:
        """Return the result as text.

        Parameters
        ----------
        every : bool, default False
            A line for every check, but of heads with the same verdict the one with the least
            slack; otherwise a line a topic, what differs from the record, and counterexamples.
        """
        if every:
            return render(self.rows, self._names, self.trials, self.confidence)
        return as_text(self.rows, self._names, self.trials)

    def __str__(self) -> str:
        return self.render()

    def __repr__(self) -> str:
        return f"<ValidationResult: {headline(self.rows, self.trials)}>"

    def _phrases(self) -> list[Phrase]:
        return []

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return as_html(self.rows, self._names, self.trials)

    def figure(self, id: str) -> Figure:  # noqa: A002  (the name of the field)
        """Return the picture of a claim as a Matplotlib figure, drawn with your own settings.

        Observations over r against the bound and the trivial predictor, on the first named
        instance and the first head that the claim was checked on; 30 trials for each r.  Size,
        letters and grid are those of ``matplotlib.rcParams``, as of `StudyResult.figure`.

        Parameters
        ----------
        id : str
            Of a claim that was checked.

        Returns
        -------
        matplotlib.figure.Figure
            ``figure.savefig("claim.pdf")`` writes it in any format.

        Raises
        ------
        TypeError, ValueError
            For an id that was not checked.

        Examples
        --------
        >>> import sketchattn as sa
        >>> head = sa.make_heads("clustered", n=64, d=8, rng=0)
        >>> result = sa.theory.validate("sketching.amm_jl_moment", head, trials=20)
        >>> len(result.figure("sketching.amm_jl_moment").axes)
        2
        """
        by_claim = self._by_claim()
        get_entry(id)  # refuses what is no claim
        if id not in by_claim:
            raise ValueError(
                f"id must be that of a claim which was checked, got {id!r}{guesses(id, by_claim)}"
            )
        return figure_of(Picture(id, self._panels(by_claim[id]), self.entropy))

    @property
    def _names(self) -> set[str]:
        """Names of heads, which are put together in tables."""
        return {name for name, x in self._heads.items() if isinstance(x, AttentionProblem)}

    def _by_claim(self) -> dict[str, list[Verdict]]:
        found: dict[str, list[Verdict]] = {}
        for row in self.rows:
            found.setdefault(row.claim.id, []).append(row.verdict)
        return found

    def plot(
        self, out: str | PathLike[str], jobs: int | None = None, *, progress: bool | None = None
    ) -> list[Path]:
        """Draw one picture a claim: the observed distribution against the bound over r.

        Each picture shows the first named instance of the claim and the first head that it
        was checked on; observations are drawn again, 30 for each r.

        Parameters
        ----------
        out : path
            Folder; made if there is none.  ``<claim>.png`` is replaced in one step; those of
            claims without a row are deleted.
        jobs : int, optional
            Claims that are drawn at the same time, -1 for as many as there are CPUs; by default 1,
            and -1 for 20 claims and more.
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
        by_claim = self._by_claim()
        workers = check_jobs(jobs, "claim", long=len(by_claim) >= 20)
        show = check_progress(progress)
        tasks = [
            Picture(name, self._panels(x), self.entropy, own_entries([name]))
            for name, x in by_claim.items()
        ]
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

    def report(self, path: str | PathLike[str] = "verdicts.html") -> Path:
        """Write everything as one page of HTML: what differs, refuted claims, a table that sorts.

        Parameters
        ----------
        path : path
            Of the file, which is replaced in one step.  The page shows the pictures that `plot`
            has drawn into the same folder.

        Returns
        -------
        Path
        """
        target = Path(os.path.expanduser(path))
        names = {row.claim.id: f"{row.claim.id}.png" for row in self.rows}
        drawn = {x: name for x, name in names.items() if (target.parent / name).is_file()}
        page = verdicts_page(self.rows, list(self._heads), self.trials, self.confidence, drawn)
        write_text(target, page)
        return target

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
    problem: str | Problem
    claims: tuple[str, ...]
    trials: int
    confidence: float
    entropy: int
    parameters: Mapping[str, Any]
    own: tuple[Entry, ...]


def _run(task: _Task) -> list[Verdict]:
    """Check the claims of one problem, whose matrix is computed once."""
    adopt(task.own)
    instance = as_instance(task.problem)
    found = []
    with limit_threads(1):
        for name in task.claims:
            entry = get_entry(name)
            try:
                chosen = _changed(entry, task.parameters)[0]
                verdict = run(entry, instance, task.trials, task.confidence, task.entropy, chosen)
            except Exception as error:
                raise RuntimeError(
                    f"claim {name!r} failed on {instance.name!r}: {type(error).__name__}: {error}"
                ) from error
            found.append(verdict)
    return found


def _changed(entry: Entry, given: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return the parameters of a claim with those given that it has, and whether one differs."""
    known = {name: x for name, x in given.items() if name in entry.parameters}
    changed = any(entry.parameters[name] != x for name, x in known.items())
    return check_parameters(entry, known), changed


def _check_given(given: Any, chosen: Collection[str]) -> dict[str, Any]:
    """Return parameters, each of which one of the claims has."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(
            f"parameters must be a mapping from names to values, got {type(given).__name__}; for "
            f"instance parameters={{'eps': 0.9}}"
        )
    known = {name for claim in chosen for name in get_entry(claim).parameters}
    for name in given:
        if name not in known:
            hint = closest(str(name), known) if known else "; they take none"
            raise TypeError(f"parameters must be those of a claim, got {name!r}{hint}")
    for claim in chosen:
        _changed(get_entry(claim), given)  # refuses values that are none
    return dict(given)


def choose(claims: Any) -> dict[str, Claim]:
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
            hint = guesses(name, [*known, *topics]) if "." in name else closest(name, topics)
            raise ValueError(
                f"claims must hold ids or topics, got {name!r}{hint}{how_to_import(name)}"
            )
    if not found:
        raise ValueError("claims must hold at least one id, got none; leave claims out")
    return found


def find(words: Sequence[str] | None) -> dict[str, Claim]:
    """Return claims by ids, topics, patterns, and by what titles, statements and sources say.

    A word without a wildcard and without a point, which ids have, is looked for anywhere; upper
    and lower case are the same.
    """
    known = all_claims()
    topics = {name.partition(".")[0] for name in known}
    found: dict[str, Claim] = {}
    for word in words or ():
        pattern, saying = word.lower(), {}
        if not any(sign in word for sign in "*?["):
            pattern = "" if "." in word or word in topics else f"*{pattern}*"
        if pattern:
            saying = {name: x for name, x in known.items() if _says(x, pattern)}
        found.update(saying or choose(word))  # which refuses what is none
    return found or choose(words)


def _says(claim: Claim, pattern: str) -> bool:
    """Return whether id, title, statement or source of a claim matches, without case."""
    said = (claim.id, claim.title, claim.statement, claim.source)
    return any(fnmatch.fnmatchcase(text.lower(), pattern) for text in said)


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
    jobs: int | None = None,
    *,
    progress: bool | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> ValidationResult:
    """Check claims on heads and on the built-in instances, counterexamples among them.

    Parameters
    ----------
    claims : id, topic, pattern, or sequence of these, optional
        A topic is what stands before the point; a pattern has ``*``, ``?`` or ``[...]``, as
        "sketching.amm_*".  By default all claims.
    heads : Heads, AttentionProblem, Instance, pair (A, V), path, name, or sequence of these
        A name is that of a bundled set or of an instance.  By default the bundled heads.  Claims
        that are about instances only are not checked on heads.
    trials : int, default 200
        Independent draws for each check.
    confidence : float, default 0.95
        Of the limits of rates, each one-sided.
    rng : None, int or numpy.random.Generator
        The same integer gives the same verdicts, whatever ``jobs``.
    jobs : int, optional
        Problems that are checked at the same time, -1 for as many as there are CPUs; by default 1,
        and -1 for 500 checks and more.
    progress : bool, optional
        Show a bar on stderr; by default where stderr is a terminal.
    parameters : mapping, optional
        Parameters of claims, such as ``{"eps": 0.9}``: each claim takes those that it has, and
        where one is not the default its verdict has no record.

    Returns
    -------
    ValidationResult
        ``rows``, ``frame``, ``unexpected``, ``passed``, ``render()``, ``figure(id)``,
        ``plot(out)``, ``report(path)``.

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
    chosen = choose(claims)
    given = _check_given(parameters, chosen)
    count, level = check_trials(trials), check_confidence(confidence)
    check_jobs(jobs, "problem")
    show = check_progress(progress)
    problems = as_problems("minilm" if heads is None else heads)
    entropy = entropy_of(rng)
    bundled = _bundled()

    work: dict[str, list[str]] = {}
    for name, record in chosen.items():
        for instance in record.instances if record.recorded else instance_names():
            work.setdefault(instance, []).append(name)
    everywhere = [name for name, x in chosen.items() if HEADS in x.recorded or not x.recorded]
    for name, problem in problems.items():
        if isinstance(problem, str):  # a named instance is checked anyway, if not by all of these
            work[name] = list(dict.fromkeys([*work.get(name, []), *everywhere]))
        elif name in work:
            raise ValueError(
                f"heads must not have the name of an instance, got {name!r}; give it another name"
            )
        elif everywhere:
            work[name] = everywhere
    tasks = [
        _Task(
            problems.get(name, name), tuple(names), count, level, entropy, given, own_entries(names)
        )
        for name, names in work.items()
    ]
    workers = check_jobs(jobs, "problem", long=sum(map(len, work.values())) >= 500)
    # Heads first: they take longest.
    tasks.sort(key=lambda task: isinstance(task.problem, str))
    done = _in_parallel(_run, tasks, workers, show, "validate", "problem")
    verdicts = {(v.claim, v.instance): v for found in done for v in found}
    repeats = (entropy, count, level) == RECORDED_WITH
    rows = []
    for name, record in chosen.items():
        changed = _changed(get_entry(name), given)[1]
        for instance in work:
            if (name, instance) not in verdicts:
                continue
            seen, recorded = problems.get(instance, instance), None
            if changed:
                recorded = None
            elif isinstance(seen, str):
                recorded = record.recorded.get(seen)
            elif isinstance(seen, AttentionProblem) and (seen.name, seen.digest) in bundled:
                recorded = record.recorded.get(instance, record.recorded.get(HEADS))
            rows.append(Row(record, verdicts[name, instance], recorded, level, repeats))
    own = {name: x for name, x in problems.items() if not isinstance(x, str)}
    return ValidationResult(tuple(rows), count, level, entropy, own, given)


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
