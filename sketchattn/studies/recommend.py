"""Recommendations: on each head the cheapest setting whose error is certified to be small."""

from __future__ import annotations

import ast
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.arguments import as_real, check_scale
from ..base.draws import Rng, entropy_of
from ..base.floating import without_floating_errors
from ..base.parallel import check_jobs, check_progress, in_parallel
from ..errors.certificates import ErrorCertificate, check_confidence, check_kind, check_rows
from ..heads.inputs import as_heads, renamed
from ..problem import AttentionProblem
from ..zoo.base import Method
from .cheapest import Found, HeadTask, Setting, find, ladder, refusal_of, search
from .grid import Variant, by_name, default_methods
from .plan import MethodsLike, as_variants

if TYPE_CHECKING:
    import pandas as pd

    from ..heads.container import Heads

COLUMNS = (
    "head",
    "method",
    "parameters",
    "rank",
    "certified_high",
    "seconds",
    "exact_seconds",
    "estimate",
    "rows",
    "kind",
    "attempts",
    "seed",
    "call",
    "reason",
)
TRIED = ("head", "method", "rank", "seconds", "estimate")


@dataclass(frozen=True)
class Recommendation:
    """Hold what `recommend` found, one row a head; prints as a table.

    Attributes
    ----------
    frame : pandas.DataFrame
        ``head``; ``method``, "exact" where no approximation is recommended; ``parameters``, those
        that are not defaults, ``rank`` among them; ``rank``, missing for methods without one;
        ``certified_high``, the upper end of the certificate of the error; ``seconds`` and
        ``exact_seconds``, of one call each, measured in turn; ``estimate``, the error on the rows
        by which settings were compared; ``rows`` and ``kind`` of the certificate; ``attempts``,
        certificates from samples that were made; ``seed`` of the draw, missing for methods
        without one; ``call``, Python that computes the output for ``q``, ``k`` and ``v`` of this
        head; and the ``reason`` where exact attention is recommended.
    tried : pandas.DataFrame
        The settings that were run: ``head``, ``method``, ``rank``, ``seconds``, ``estimate``.
    left_out : dict from str to str
        Methods that do not honour a head or failed on it, and why.
    certificates : dict from str to ErrorCertificate or None
        By head, of the output that ``call`` computes; None where nothing was certified.
    chosen : dict from str to Method
        The method object of each head, exact or not.
    tolerance, confidence : float
        As asked for.
    """

    frame: pd.DataFrame
    tried: pd.DataFrame
    left_out: dict[str, str]
    certificates: dict[str, ErrorCertificate | None]
    chosen: dict[str, Method]
    tolerance: float
    confidence: float

    def render(self) -> str:
        """Return the table as text, with the calls and what the error promises."""
        lines = [self._headline(), ""]
        header = ["head", "method", "rank", "error <=", "seconds", "exact", "times faster"]
        rows = [[*cells, note] for cells, note in self._cells()]
        lines += _aligned([[*header, ""], *rows])
        lines += ["", "calls, q, k, v = heads[name]:"]
        heads_of: dict[str, list[str]] = {}
        for head, call in zip(self.frame["head"], self.frame["call"], strict=True):
            heads_of.setdefault(call, []).append(head)
        for call, heads in heads_of.items():
            more = f" and {len(heads) - 2} more" if len(heads) > 2 else ""
            lines.append(f"  {call}  # {', '.join(heads[:2])}{more}")
        lines += ["", self._promise()]
        if self.left_out:
            lines.append(f"left out: {', '.join(self.left_out)}; result.left_out says why")
        return "\n".join(lines)

    def _headline(self) -> str:
        """Return what was found in a line."""
        count = len(self.frame)
        cheaper = int((self.frame["method"] != "exact").sum())
        heads = f"{count} head{'' if count == 1 else 's'}"
        if not cheaper:
            return f"{heads}: none cheaper than exact attention within {self.tolerance:g}"
        return f"{heads}: {cheaper} cheaper than exact attention within {self.tolerance:g}"

    def _promise(self) -> str:
        """Return what the column of errors means."""
        kinds = [kind for kind in self.frame["kind"] if kind]
        if all(kind == "exact" for kind in kinds):
            return "error: |Ohat - O|_F / |O|_F of the output of that call, from all exact rows"
        asked = "asymptotically, " if "approximate" in kinds else ""
        return (
            f"error: |Ohat - O|_F / |O|_F of the output of that call; below the bound "
            f"{asked}with probability {self.confidence:g} for each head, over the rows drawn"
        )

    def _cells(self) -> list[tuple[list[str], str]]:
        """Return the cells of each head and the reason beside them."""
        found = []
        for row in self.frame.to_dict("records"):
            exact = row["method"] == "exact"
            rank = "" if row["rank"] is None or row["rank"] != row["rank"] else str(row["rank"])
            high = row["certified_high"]
            cells = [
                str(row["head"]),
                str(row["method"]),
                rank,
                "" if math.isnan(high) else f"{high:.2g}",
                f"{row['seconds']:.2g}",
                f"{row['exact_seconds']:.2g}",
                "" if exact else f"{row['exact_seconds'] / row['seconds']:.2g}",
            ]
            found.append((cells, str(row["reason"])))
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the objects, for JSON; numbers that are missing are None."""
        records = self.frame.astype(object).where(self.frame.notna(), None).to_dict("records")
        return {
            "tolerance": self.tolerance,
            "confidence": self.confidence,
            "promise": "each head",
            "heads": records,
            "left_out": self.left_out,
        }

    def __str__(self) -> str:
        return self.render()

    def __repr__(self) -> str:
        return f"<Recommendation, {self._headline()}>"

    def _repr_html_(self) -> str:
        """Return the table for notebooks; names are text."""
        header = ("head", "method", "rank", "error &le;", "seconds", "exact", "times faster", "")
        lines = ["<table>", "<thead><tr>", *(f"<th>{x}</th>" for x in header), "</tr></thead>"]
        calls = self.frame["call"]
        for (cells, reason), call in zip(self._cells(), calls, strict=True):
            texts = [html.escape(x) for x in cells]
            texts.append(html.escape(reason) if reason else f"<code>{html.escape(call)}</code>")
            lines.append(f"<tr>{''.join(f'<td>{x}</td>' for x in texts)}</tr>")
        said = html.escape(self._headline()), html.escape(self._promise())
        return "\n".join([f"<p>{said[0]}</p>", *lines, "</table>", f"<p>{said[1]}</p>"])


@without_floating_errors
def recommend(
    heads: Heads | AttentionProblem | Sequence[AttentionProblem] | str | PathLike[str],
    tolerance: float = 0.05,
    confidence: float = 0.95,
    methods: MethodsLike = None,
    rng: Rng = 0,
    *,
    rows: int | None = None,
    kind: str = "finite-sample",
    jobs: int = 1,
    progress: bool | None = None,
) -> Recommendation:
    """Find, for each head, the cheapest method and rank whose error is certified to be small.

    The error is ``|Ohat - O|_F / |O|_F`` of the output of one call of ``attention`` with a named
    seed; cheaper means in less time than exact attention, both measured here and now.  Where
    nothing is, exact attention is recommended, with the reason: a normal answer at n = 512.

    Parameters
    ----------
    heads : Heads, AttentionProblem, sequence of AttentionProblem, path, or name
        As for `study`; heads of different sizes, masks and precisions may stand beside each other.
    tolerance : float, default 0.05
        In (0, 1): the largest error that is accepted.  The output zero has the error 1.
    confidence : float, default 0.95
        In (0, 1): for each head by itself, the probability over the draw of rows that the error
        of what is recommended is below its bound.  It does not cover all heads at once.
    methods : names, method objects, pairs (label, method), or mapping from labels, optional
        The candidates; their ranks are replaced.  By default those of a study, and the mean of V.
        For each head those that honour it, by its mask, shape and causality.
    rng : None, int or numpy.random.Generator, default 0
        The seed of methods that draw, which the recommended call names; a number from the
        generator where none is given.  Rows are drawn from other streams.
    rows : int, optional
        Exact rows of a certificate.  By default all of them up to 2^28 entries (n = 16384), where
        they take the time of a few runs of exact attention; beyond, as many as the tolerance
        needs, which may be all of them.
    kind : {"finite-sample", "approximate"}
        As for `certify`.  An approximate certificate takes 1024 rows by default.
    jobs : int, default 1
        Heads that are computed at the same time.  Each has its share of the threads, and so do
        the times that are compared: 1 measures what one head takes on the whole machine.
    progress : bool, optional
        Show a bar on stderr; by default where stderr is a terminal.

    Returns
    -------
    Recommendation
        ``frame``, with one row for each head; prints as a table.

    Raises
    ------
    TypeError, ValueError
        Before any work for arguments that do not fit, a method that honours no head, or exact
        attention or a floor among the methods; and for a head without an error to certify, such
        as one whose output is zero.

    Notes
    -----
    **What is promised.**  With probability ``confidence``, over the rows that are drawn, the call
    that is recommended for a head has an error of at most ``certified_high <= tolerance``.  It is
    about the output of that call, bit for bit: same q, k, v of this one head, same seed.  Another
    seed, other tokens, or the head as one of many in an array, where each has a draw of its own,
    are other outputs.

    **Why it holds.**  The search looks at dozens of settings and takes the one that seems best: its
    estimated error is too small by selection.  So nothing of the search is in the certificate.
    Settings are compared on one random sample of exact rows; the one that is chosen is certified
    from rows that are drawn anew, independently of the draw of the method, of the search, and of
    earlier certificates.  Given all of these the output is fixed, which is all that a certificate
    asks for.  If its upper end is above the tolerance, the search goes on with a smaller one and
    there is another attempt, with fresh rows: at most 4 a head, each at the confidence
    ``1 - (1 - confidence) / 4``.  An attempt that is accepted though the error is above its bound
    has at most the probability ``(1 - confidence) / 4`` given what was before it, so that the sum
    over attempts bounds the probability of a wrong recommendation.  Exact rows are computed once
    a head and shared, which changes no draw.  Where all rows are known (by default, up to 2^28
    entries) nothing is left to chance: errors are computed, the kind is ``exact``.

    The finite-sample certificate allows for unseen rows that are wholly wrong, and from n rows it
    is not below about ``sqrt(log(80 / (1 - confidence)) b N / (n |O|_F^2))``, whatever the output;
    see `certify`.  A tolerance of 0.05 takes tens of thousands of rows.  ``rows=None`` asks before
    it computes any what this output would be certified from how many rows if it were exact.  Where
    ``rows`` are given and are too few for that, the reason says so, and no attempt is made.

    **The search** takes ranks that are powers of two, all methods from the quickest on, and
    leaves a method where it takes longer than exact attention or than the best found, or where its
    error would have to fall faster than ``1 / rank^2``; then ranks in between, by halving.  It may
    miss a cheaper setting, never an error: it rests on times and estimates, and the certificate on
    neither.  Times are medians of warm calls; that of the winner is measured again, in turn with
    exact attention.

    Examples
    --------
    >>> import sketchattn as sa
    >>> heads = sa.make_heads("gaussian", n=64, d=8, rng=0)
    >>> found = sa.recommend(heads, tolerance=0.05, methods=["uniform"])
    >>> found.frame[["head", "method"]].values.tolist()
    [['gaussian/head0', 'exact']]
    """
    problems = as_heads(heads)
    wanted = _check_tolerance(tolerance)
    level = check_confidence(confidence)
    kind = check_kind(kind)
    count = None if rows is None else check_rows(rows)
    workers = check_jobs(jobs, "head")
    show = check_progress(progress)
    seed = entropy_of(rng)
    choices, left_out = _candidates(methods, problems)
    tasks = [
        HeadTask(
            # A copy leaves the exact quantities of one head behind when its search is done.
            renamed(problem, str(problem.name)),
            choice,
            wanted,
            level,
            count,
            kind,
            seed,
            min(workers, len(problems)),
        )
        for problem, choice in zip(problems, choices, strict=True)
    ]
    found = _run(tasks, show)
    failures = _failures([found[str(p.name)] for p in problems])
    for label, why in failures.items():
        left_out[label] = f"{left_out[label]}; {why}" if label in left_out else why
    return _collect(problems, [found[str(p.name)] for p in problems], left_out, wanted, level, seed)


def _check_tolerance(tolerance: object) -> float:
    number = as_real(tolerance, "tolerance", "give an error such as 0.05")
    if not 0.0 < number < 1.0:
        raise ValueError(
            f"tolerance must be between 0 and 1, both excluded, got {number:.6g}; exact attention "
            f"has no error, and the output zero the error 1"
        )
    return number


# --- candidates ---------------------------------------------------------------------------------

Choice = list[tuple[Variant, list[int]]]


def _candidates(
    methods: MethodsLike, problems: Sequence[AttentionProblem]
) -> tuple[list[Choice], dict[str, str]]:
    """Return the methods that honour each head with their ranks, and the others with reasons."""
    if methods is None:
        variants = [Variant.of(name, by_name(name, 1)) for name in (*default_methods(), "vmean")]
    else:
        variants = as_variants(methods, 1)
    for variant in variants:
        if variant.oracle or getattr(variant.method, "name", None) == "exact":
            raise ValueError(
                f"methods must be cheaper than the exact matrix, got {variant.label!r}, which "
                f"looks at it; leave it out"
            )
    choices: list[Choice] = [[] for _ in problems]
    refusals: dict[str, list[tuple[str, Exception]]] = {}
    for variant in variants:
        for problem, choice in zip(problems, choices, strict=True):
            ranks, error = _ranks(variant, problem)
            if methods is None and variant.method.traits.causal_form and not problem.causal:
                ranks, error = [], ValueError("it makes another method causal")
            if ranks:
                choice.append((variant, ranks))
            elif error is not None:
                refusals.setdefault(variant.label, []).append((str(problem.name), error))
    for label, refused in refusals.items():
        head, error = refused[0]
        if methods is not None and len(refused) == len(problems):
            error_type = TypeError if isinstance(error, TypeError) else ValueError
            raise error_type(
                f"methods must honour a head, got {label!r} with head {head!r}: {error}"
            ) from error
    return choices, {
        label: _on_heads([head for head, _ in refused], str(refused[0][1]))
        for label, refused in refusals.items()
    }


def _ranks(variant: Variant, problem: AttentionProblem) -> tuple[list[int], Exception | None]:
    """Return the ranks at which a method honours a head, and why it refuses one."""
    every = ladder(problem.n_k) if variant.ranked else [1]
    refusals = {rank: refusal_of(variant, problem, rank) for rank in every}
    accepted = [rank for rank, error in refusals.items() if error is None]
    return accepted, next((error for error in refusals.values() if error is not None), None)


def _on_heads(heads: Sequence[str], why: str) -> str:
    """Return a reason with the heads that it is about."""
    more = f" and {len(heads) - 1} more" if len(heads) > 1 else ""
    return f"head {heads[0]!r}{more}: {why}"


def _failures(found: Sequence[Found]) -> dict[str, str]:
    """Return the methods that failed while they ran, and why."""
    heads: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    for one in found:
        for label, why in one.failures.items():
            heads.setdefault(label, []).append(one.head)
            reasons.setdefault(label, why)
    return {label: _on_heads(heads[label], f"failed at {why}") for label, why in reasons.items()}


# --- work and results ---------------------------------------------------------------------------


def _run(tasks: Sequence[HeadTask], show: bool) -> dict[str, Found]:
    """Return what was found on each head, by its name; the bar counts methods."""
    from tqdm import tqdm

    total = sum(max(1, len(task.variants)) for task in tasks)
    share = {str(t.problem.name): max(1, len(t.variants)) for t in tasks}
    found: dict[str, Found] = {}
    with tqdm(
        total=total, desc="recommend", unit="method", dynamic_ncols=True, disable=not show
    ) as bar:

        def show_up_to(count: int) -> None:
            bar.n = count
            bar.refresh()

        def tell() -> None:
            running = share[str(tasks[len(found)].problem.name)]
            most = sum(share[name] for name in found) + running - 1
            show_up_to(min(int(bar.n) + 1, most))  # a search may be repeated

        if tasks[0].jobs == 1:
            results = (search(task, tell if show else lambda: None) for task in tasks)
        else:
            results = in_parallel(find, tasks, tasks[0].jobs)
        for one in results:
            found[one.head] = one
            show_up_to(sum(share[name] for name in found))
    return found


def _collect(
    problems: Sequence[AttentionProblem],
    found: Sequence[Found],
    left_out: dict[str, str],
    tolerance: float,
    confidence: float,
    seed: int,
) -> Recommendation:
    """Return the result."""
    import pandas as pd

    rows: list[list[Any]] = []
    tried: list[list[Any]] = []
    chosen: dict[str, Method] = {}
    for problem, one in zip(problems, found, strict=True):
        best = one.best
        method = by_name("exact", 1) if best is None else best.method
        chosen[one.head] = method
        randomized = method.traits.randomized
        certificate = one.certificate
        rows.append(
            [
                one.head,
                "exact" if best is None else best.label,
                _parameters(method),
                None if best is None else best.rank,
                math.nan if certificate is None else certificate.high,
                one.exact_seconds if best is None else best.seconds,
                one.exact_seconds,
                math.nan if certificate is None else certificate.estimate,
                None if certificate is None else certificate.rows,
                None if certificate is None else certificate.kind,
                one.attempts,
                seed if randomized else None,
                _call(problem, method, seed),
                one.reason + _nearest(one.closest, bool(one.reason)),
            ]
        )
        tried += [[one.head, s.label, s.rank, s.seconds, s.estimate] for s in one.tried]
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    frame = frame.astype({"rank": "Int64", "rows": "Int64", "seed": object})
    runs = pd.DataFrame(tried, columns=list(TRIED)).astype({"rank": "Int64"})
    certificates = {one.head: one.certificate for one in found}
    return Recommendation(frame, runs, left_out, certificates, chosen, tolerance, confidence)


def _nearest(closest: Setting | None, wanted: bool) -> str:
    """Return the setting of the smallest error in less time than exact attention."""
    if closest is None or not wanted or math.isinf(closest.estimate):
        return ""
    rank = "" if closest.rank is None else f", rank {closest.rank}"
    return f" (closest: {closest.label}{rank}, error {closest.estimate:.2g})"


def _parameters(method: Method) -> dict[str, Any]:
    """Return the parameters of a method that are not defaults."""
    defaults = {
        name: x.default for name, x in _signature(type(method)).items() if x.default is not x.empty
    }
    return {
        name: value
        for name, value in method.get_params(deep=False).items()
        if name not in defaults or not _alike(value, defaults[name])
    }


def _signature(cls: type[Method]) -> Mapping[str, Any]:
    import inspect

    return inspect.signature(cls).parameters


def _alike(one: object, other: object) -> bool:
    """Say whether two parameters are the same; arrays never are."""
    return one is other or (
        type(one) is type(other) and not isinstance(one, np.ndarray) and repr(one) == repr(other)
    )


def _call(problem: AttentionProblem, method: Method, seed: int) -> str:
    """Return Python that computes the output for ``q``, ``k``, ``v`` of the head.

    Parameters that have no literal stand in the object itself: ``method`` is then
    ``result.chosen[head]``.
    """
    words = ["q", "k", "v"]
    parameters = _parameters(method)
    name = getattr(method, "name", None)
    if _registered(method) and all(map(_literal, parameters.values())):
        if name != "exact":
            words.append(_quoted(str(name)))
        words += [f"{key}={_text(value)}" for key, value in parameters.items()]
    else:
        words.append("method")
    if method.traits.randomized:
        words.append(f"rng={seed}")
    if problem.scale != check_scale(None, problem.d):
        words.append(f"scale={problem.scale!r}")
    if problem.causal:
        aligned = problem.causal is True
        words.append(f"causal={'True' if aligned else _quoted(str(problem.causal))}")
    if problem.key_mask is not None:
        words.append("key_mask=key_mask")
    return f"sa.attention({', '.join(words)})"


def _registered(method: Method) -> bool:
    from ..zoo.base import methods

    return methods().get(getattr(method, "name", "")) is type(method)


def _literal(value: object) -> bool:
    """Say whether the text of a parameter stands for it."""
    try:
        return bool(ast.literal_eval(_text(value)) == value)
    except (ValueError, SyntaxError, TypeError):
        return False


def _text(value: object) -> str:
    if isinstance(value, str):
        return _quoted(value)
    return repr(value.item()) if isinstance(value, np.generic) else repr(value)


def _quoted(text: str) -> str:
    """Return a string as Python, in the quotes of the documentation."""
    return f'"{text}"' if repr(text) == f"'{text}'" else repr(text)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of aligned columns: the first two and the last to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if i < 2 or i == last else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
