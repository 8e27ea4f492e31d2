"""What a study returns: its rows, the tables that sum them up, and its pictures."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.arguments import closest
from ..base.files import as_folder, make_folder
from ..errors.reports import FIELDS
from .columns import BOUND_COLUMNS as BOUND_COLUMNS
from .columns import COLUMNS as COLUMNS
from .columns import EXACT as EXACT
from .columns import FLOORS as FLOORS
from .columns import MAIN_FIELDS as MAIN_FIELDS
from .columns import PREDICTORS as PREDICTORS
from .columns import REFERENCES as REFERENCES
from .columns import ROLES
from .columns import SAMPLED_COLUMNS as SAMPLED_COLUMNS
from .columns import SHARE as SHARE
from .columns import Key as Key
from .columns import Values as Values
from .columns import quantiles as quantiles
from .folder import read_folder
from .pictures.words import seconds_as_text
from .plots import own_figure, plot_study
from .ranks import AT, Share, described, ranked, ranks_of, shares_of, text_of
from .report.page import write_report

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class StudyResult:
    """Hold the rows of a study and where they were written.

    Attributes
    ----------
    frame : pandas.DataFrame
        One row for each head, method, rank and seed, in this order; columns ``COLUMNS``, and where
        ranks were given as shares of the keys ``share``, NaN in rows of an integer: heads of other
        lengths have the share in common, not the rank, and whatever goes over heads goes by it.
        ``work`` is what a row of ``Ahat`` reads (keys, features, landmarks, clusters, regions; mean
        over rows) as a share of what exact attention reads, NaN where there is no matrix.
        ``rows`` are the exact rows that the errors of a row are from: n_q, or those of a sample,
        the same for all methods on a head.  Then ``output_fro_rel_low`` and
        ``output_fro_rel_high`` are the finite-sample interval at confidence 0.95, each by itself
        (NaN for ``topk``); otherwise both are the error.
    references : pandas.DataFrame
        The same columns for the floors ``svd`` and ``topk``, the predictors ``zero`` and
        ``vmean``, and ``exact`` attention, at all ranks and one seed.
    left_out : dict from str to str
        Methods that the default choice leaves out, and why.
    out : Path or None
        Folder with ``results.csv``, ``references.csv``, ``study.json`` and the pictures.
    pictures : tuple of Path
        The PNGs that were drawn, the first of them error against cost.
    computed, reused : int
        Cells that this call computed, and cells that it found in the folder.
    bounds : pandas.DataFrame
        Bounds of claims, those asked for, with the columns ``BOUND_COLUMNS``, and ``share`` as in
        ``frame``; ``bounds.csv`` in the folder.
    notes : tuple of str
        What was not measured, and why.
    """

    frame: pd.DataFrame
    references: pd.DataFrame
    left_out: dict[str, str]
    out: Path | None
    pictures: tuple[Path, ...]
    computed: int
    reused: int
    bounds: pd.DataFrame
    notes: tuple[str, ...] = ()

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> StudyResult:
        """Return what a study wrote into a folder, every number as it was.

        Parameters
        ----------
        folder : path
            ``out`` of a finished study.  Where studies of several methods were written to it, all
            of them are in the result.

        Raises
        ------
        ValueError
            If no finished study is there.

        Examples
        --------
        >>> import tempfile
        >>> import sketchattn as sa
        >>> heads = sa.make_heads("gaussian", n=16, d=4, rng=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = sa.study(heads, "uniform", [2], seeds=1, out=folder, pictures=False)
        ...     sa.StudyResult.load(folder).frame.equals(result.frame)
        True
        """
        path = as_folder(folder)
        assert path is not None
        found = read_folder(path)
        if found is None:
            raise ValueError(
                f"folder must hold a finished study (study.json, results.csv, references.csv), got "
                f"{str(folder)!r}; give the out= of sketchattn.study"
            )
        return cls(
            frame=found.frame,
            references=found.references,
            left_out=dict(found.settings.get("left_out", {})),
            out=path,
            pictures=found.pictures,
            computed=0,
            reused=0,
            bounds=found.bounds,
        )

    # --- pictures -------------------------------------------------------------------------------

    def plot(self, folder: str | PathLike[str] | None = None) -> list[Path]:
        """Draw all pictures as PNG and return their paths.

        Parameters
        ----------
        folder : path, optional
            Made if there is none; ``out`` of the study by default.

        Returns
        -------
        list of Path
            ``error_against_cost.png``, ``methods.png`` (a panel a method), ``heads.png`` (a panel a
            head), ``layers.png`` (layer by head), ``spectra.png``, and ``<field>.png`` for each
            error measure.

        Raises
        ------
        ValueError
            For a result without a folder, if none is given.

        Warns
        -----
        RuntimeWarning
            If pictures are missing, and why the first is.
        """
        path = self.out if folder is None else as_folder(folder)
        if path is None:
            raise ValueError(
                "folder must be given for a study that wrote none, got None; say where to draw"
            )
        return plot_study(self.frame, self.references, make_folder(path), self.bounds)

    def report(self, path: str | PathLike[str] = "report.html") -> Path:
        """Write everything as one page of HTML, and return its path.

        The page needs no network: what the study says in words, curves that answer the pointer,
        maps and tables that sort.  A study with a folder writes it there by itself.

        Parameters
        ----------
        path : path, default "report.html"
            Of the file, which is replaced in one step.

        Returns
        -------
        Path

        Raises
        ------
        OSError
            If the file cannot be written, or ``study.json`` in ``out`` cannot be read.

        Notes
        -----
        Settings and the hardness of heads are those in ``out``; a result without a folder has
        none.

        Examples
        --------
        >>> import tempfile
        >>> import sketchattn as sa
        >>> heads = sa.make_heads("gaussian", n=16, d=4, rng=0)
        >>> result = sa.study(heads, methods="uniform", ranks=[2, 4], seeds=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = result.report(f"{folder}/report.html")
        ...     path.stat().st_size < 6_000_000
        True
        """
        return write_report(path, self.frame, self.references, self.bounds, self.left_out, self.out)

    def figure(
        self,
        field: str = "output_fro_rel",
        methods: Mapping[str, str] | Sequence[str] | None = None,
        heads: str | Sequence[str] | None = None,
        floors: bool | Sequence[str] = True,
        bounds: str | Sequence[str] = (),
        ax: Axes | None = None,
    ) -> Figure:
        """Return error against rank as a Matplotlib figure in your own style.

        One panel: the median over heads of the median over seeds, with a band between the quartiles
        of heads; of one head the median over its seeds, with a band from the smallest to the
        largest.

        Parameters
        ----------
        field : str, default "output_fro_rel"
            A field of `ErrorReport`.
        methods : sequence of labels, or mapping from labels to names, optional
            Which methods, and what they are called; all by default.
        heads : sequence of names, or "each", optional
            Over which heads; all by default.  "each" is a panel a head.
        floors : bool or sequence, default True
            Whether floors and predictors are drawn, or which of ``svd``, ``topk``, ``zero``,
            ``vmean``.
        bounds : sequence of ids
            Claims among the bounds of this study that are about this field.
        ax : matplotlib.axes.Axes, optional
            Draw into these axes, without a legend: lines have their labels.

        Returns
        -------
        matplotlib.figure.Figure
            Of the size, fonts and line widths of ``matplotlib.rcParams``, for ``savefig`` in any
            format; that of ``ax`` where it is given.  It is made without pyplot.

        Raises
        ------
        ValueError
            For a field, method, head, floor or bound that is not in this result, and a bound of
            another field or of a method that is not drawn.

        Examples
        --------
        >>> import sketchattn as sa
        >>> heads = sa.make_heads("gaussian", n=16, d=4, rng=0)
        >>> result = sa.study(heads, ["uniform", "topk"], [2, 4], seeds=2)
        >>> figure = result.figure("skill", methods={"uniform": "Ours"}, floors=["vmean"])
        >>> [line.get_label() for line in figure.axes[0].lines]
        ['mean of V', 'Ours']
        """
        return own_figure(
            self.frame, self.references, self.bounds, field, methods, heads, floors, bounds, ax
        )

    # --- tables ---------------------------------------------------------------------------------

    def summary(self) -> pd.DataFrame:
        """Return medians and quartiles over heads and seeds, floors and predictors beside.

        Returns
        -------
        pandas.DataFrame
            One row for each method and rank: ``method``, ``role`` ("method", "floor", "predictor"
            or "exact"), ``rank`` (missing for predictors and exact, and where it differs between
            heads), ``share`` if ranks were given as shares of the keys, then for each of
            ``MAIN_FIELDS`` its median and, with the endings ``_q25`` and ``_q75``, its quartiles,
            and the medians of ``seconds`` and ``work``.  Infinite values count as larger than all
            others, NaN does not count.
        """
        import pandas as pd

        table = pd.DataFrame([row for _, row in self._summed()]).astype({"rank": "Int64"})
        return table if self._shares else table.drop(columns=SHARE)

    @property
    def _shares(self) -> dict[float, Share]:
        return shares_of(self.references)

    def _ranked(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return the rows of methods and of references with the ranks that heads share."""
        own = self.frame[~self.frame["method"].isin(REFERENCES)]
        return ranked(own, self._shares), ranked(self.references, self._shares)

    @property
    def _ranks(self) -> list[float]:
        """Ranks of all heads, in order."""
        return sorted(set(ranks_of(self.frame, self._shares)))

    def _sizes(self) -> dict[str, int]:
        """Return how many heads, methods, ranks and seeds there are."""
        sizes = {name: self.frame[name].nunique() for name in ("head", "method", "rank", "seed")}
        return sizes | {"rank": len(self._ranks)}

    def _counts(self) -> str:
        sizes = self._sizes().items()
        return ", ".join(f"{n} {word}{'' if n == 1 else 's'}" for word, n in sizes)

    def _summed(self) -> list[tuple[float | None, Values]]:
        """Return the rows of the summary, each with its rank as heads share it, None for all."""
        rows: list[tuple[float | None, Values]] = []
        for frame in self._ranked():
            for (method, _), part in frame.groupby(["method", AT], sort=False):
                at = part[AT].iloc[0]  # the key is a plain number
                role = ROLES.get(str(method), "method")
                alike = role in ("predictor", "exact")  # at every rank
                if alike and at != frame[AT].iloc[0]:
                    continue
                if alike:  # heads may have other ranks
                    part = frame[frame["method"] == method].drop_duplicates("head")
                own = None if alike else at
                row: Values = {"method": method, "role": role, **described(own, part["rank"])}
                for field in MAIN_FIELDS:
                    low, middle, high = quantiles(part[field].tolist(), (0.25, 0.5, 0.75))
                    row |= {field: middle, f"{field}_q25": low, f"{field}_q75": high}
                for name in ("seconds", "work"):
                    row[name] = quantiles(part[name].tolist(), (0.5,))[0]
                rows.append((own, row))
        return rows

    def rank_at(self, field: str, target: float) -> pd.DataFrame:
        """Return for each method the smallest rank that reaches a target, and what it costs there.

        A head reaches it at a rank where the median over its seeds is at most ``target``; at least,
        for ``skill``.

        Parameters
        ----------
        field : str
            A field of `ErrorReport`.
        target : float

        Returns
        -------
        pandas.DataFrame
            A row for each method, floors last: ``method``, ``role``, ``rank`` (the smallest at
            which half of the heads or more reach the target, missing if none is), ``heads`` (how
            many do at that rank; without any, the most that do at a rank), ``rank_all`` (the
            smallest at which all heads do, missing if none is), then medians at ``rank``:
            ``field`` itself, ``seconds`` and ``work``.  Where ranks were given as shares of the
            keys, ``share`` stands behind ``rank`` and ``share_all`` behind ``rank_all``, NaN for an
            integer or none; a rank that differs between heads is missing.

        Raises
        ------
        TypeError, ValueError
            For a field that is none, and a target that is no number.

        Examples
        --------
        >>> import sketchattn as sa
        >>> heads = sa.make_heads("gaussian", n=16, d=4, heads=2, rng=0)
        >>> found = sa.study(heads, "uniform", [4, 8, 16], seeds=1).rank_at("output_fro_rel", 1e-3)
        >>> found["method"][0], int(found["rank"][0]), int(found["heads"][0])
        ('uniform', 16, 2)
        """
        import pandas as pd

        if field not in FIELDS:
            raise ValueError(
                f"field must be an error measure, got {field!r}{closest(str(field), FIELDS)}"
            )
        if isinstance(target, bool) or not isinstance(target, int | float):
            raise TypeError(f"target must be a number, got {type(target).__name__}; give 0.1")
        if math.isnan(target):
            raise ValueError("target must be a number, got nan; give 0.1")
        sign = -1.0 if field == "skill" else 1.0
        rows: list[Values] = []
        own, beside = self._ranked()
        for frame in (own, beside[beside["method"].isin(FLOORS)]):
            for method, part in frame.groupby("method", sort=False):
                reached: dict[float, int] = {}
                heads = part["head"].nunique()
                found: dict[tuple[float, str], list[float]] = {}
                columns = (part[name].tolist() for name in (AT, "head", field))
                for r, head, x in zip(*columns, strict=True):
                    found.setdefault((r, head), []).append(x)
                for (r, _), values in found.items():
                    middle = quantiles(values, (0.5,))[0]
                    reached[r] = reached.get(r, 0) + int(sign * middle <= sign * target)
                half = next((r for r in sorted(reached) if 2 * reached[r] >= heads), None)
                every = next((r for r in sorted(reached) if reached[r] == heads), None)
                at = part[part[AT] == half]
                row: Values = {
                    "method": method,
                    "role": ROLES.get(str(method), "method"),
                    **described(half, at["rank"]),
                    "heads": max(reached.values()) if half is None else reached[half],
                    **described(every, part["rank"][part[AT] == every], "_all"),
                }
                for name in (field, "seconds", "work"):
                    row[name] = quantiles(at[name].tolist(), (0.5,))[0]
                rows.append(row)
        table = pd.DataFrame(rows).astype({"rank": "Int64", "rank_all": "Int64"})
        return table if self._shares else table.drop(columns=[SHARE, f"{SHARE}_all"])

    def render(self, *, every: bool = False) -> str:
        """Return the summary as text.

        Parameters
        ----------
        every : bool, default False
            A line for each method and rank, with quartiles and more measures; otherwise one for
            each method, at three ranks.
        """
        counts = self._counts()
        if every:
            lines = [f"{counts}: medians [quartiles] over heads and seeds", ""]
            lines += _table_lines(self.summary())
        else:
            given = bool(self._shares)
            lines = [f"{counts}: medians over heads and seeds", ""]
            lines += aligned(self._short())
            lines += [
                "",
                f"r=..: {MAIN_FIELDS[0]} at that rank; t(..): the time of one head; work: what a "
                "row reads,",
                "as a share of exact attention, and on how many heads the mean of V is beaten: at "
                "the last rank.",
                *(["r=.. %: a rank that is this share of the keys of its head."] * given),
            ]
        lines += [
            *([""] if every else []),
            "svd: the best matrix of this rank, blind to V; topk: the largest entries of each row;",
            "zero, vmean: what an approximation must beat (skill 0 is the mean of V).",
        ]
        lines += [f"left out: {name} ({reason})" for name, reason in self.left_out.items()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _short(self) -> list[list[str]]:
        """Return a header and a line a method: errors and times at three ranks, heads that win."""
        first = MAIN_FIELDS[0]
        ranks = _three(self._ranks)
        heads = self.frame["head"].nunique()
        wins = self._wins(ranks[-1])
        header = ["method", *(f"r={r}" for r in ranks), *(f"t(r={r})" for r in ranks)]
        rows = [[*header, "work", "beats mean of V"]]
        by_method: dict[str, dict[float | None, Values]] = {}
        for rank, row in self._summed():
            by_method.setdefault(row["method"], {})[rank] = row
        for method, by_rank in by_method.items():
            role = next(iter(by_rank.values()))["role"]
            found = [by_rank.get(r, by_rank.get(None)) for r in ranks]
            cells = [str(method)]
            cells += ["" if x is None else short_number(x[first]) for x in found]
            timed = role in ("method", "exact")  # the time of floors means nothing
            times = ["" if x is None else seconds_as_text(x["seconds"]) for x in found]
            cells += times if timed else [""] * len(ranks)
            work = None if found[-1] is None else found[-1]["work"]
            cells.append("" if work is None or math.isnan(work) else f"{100 * work:.3g} %")
            cells.append(f"{wins[str(method)]} of {heads}" if str(method) in wins else "")
            rows.append(cells)
        return rows

    def _wins(self, rank: float) -> dict[str, int]:
        """Return on how many heads the median skill of each method is above zero."""
        counts: dict[str, int] = {}
        own, _ = self._ranked()
        at = own[own[AT] == rank]
        for (method, _), values in at.groupby(["method", "head"], sort=False)["skill"]:
            better = quantiles(values.tolist(), (0.5,))[0] > 0
            counts[str(method)] = counts.get(str(method), 0) + int(better)
        return counts

    def __str__(self) -> str:
        return self.render()

    def __repr__(self) -> str:
        counts = ", ".join(f"{word}s={n}" for word, n in self._sizes().items())
        where = "" if self.out is None else f", out={str(self.out)!r}"
        return f"{type(self).__name__}({counts}{where})"

    def _repr_html_(self) -> str:
        """Return the short table for notebooks; names are text, whatever is in them."""
        counts = self._counts()
        header, *rows = self._short()
        cells = ["<tr>", *(f"<th>{html.escape(x)}</th>" for x in header), "</tr>"]
        for row in rows:
            cells += ["<tr>", *(f"<td>{html.escape(x)}</td>" for x in row), "</tr>"]
        caption = f"{MAIN_FIELDS[0]}: medians over heads and seeds ({counts})"
        return f"<table><caption>{html.escape(caption)}</caption>{''.join(cells)}</table>"


def _three(ranks: Sequence[float]) -> list[float]:
    """Return the smallest, the middle and the largest of ranks in order, fewer if there are."""
    return list(dict.fromkeys([ranks[0], ranks[len(ranks) // 2], ranks[-1]]))


def short_number(x: float, digits: int = 3) -> str:
    """Return a number with so many digits, and no zeros in its exponent.

    Examples
    --------
    >>> short_number(0.123456), short_number(1e-7), short_number(2.5e10)
    ('0.123', '1e-7', '2.5e10')
    """
    return re.sub(r"e([+-])0*(\d)", r"e\1\2", f"{x:.{digits}g}").replace("e+", "e")


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Return rows of cells as lines: the first ``left`` columns to the left, others to the right.

    Examples
    --------
    >>> aligned([["a", "10"], ["bb", "5"]])
    ['a   10', 'bb   5']
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        parts = [x.ljust(w) if i < left else x.rjust(w) for i, (x, w) in enumerate(cells)]
        lines.append("  ".join(parts).rstrip())
    return lines


def rank_lines(found: pd.DataFrame, field: str, target: float, heads: int) -> list[str]:
    """Return `StudyResult.rank_at` as aligned lines with a header."""
    sign = ">=" if field == "skill" else "<="
    rows = [["method", "rank", "heads", "all heads", field, "seconds", "work"]]
    for x in found.to_dict("records"):
        rank, every = (text_of(x, end, "-") for end in ("", "_all"))
        cells = [str(x["method"]), rank, f"{x['heads']} of {heads}", every]
        if rank == "-":
            cells += ["", "", ""]
        else:
            timed = x["role"] == "method"
            cells += [short_number(x[field]), seconds_as_text(x["seconds"]) if timed else ""]
            cells.append("" if math.isnan(x["work"]) else f"{100 * x['work']:.3g} %")
        rows.append(cells)
    title = f"smallest rank with {field} {sign} {target:g} on half of the heads, and on all:"
    return [title, "", *aligned(rows)]


def _table_lines(table: pd.DataFrame) -> list[str]:
    """Return the summary as aligned lines with a header."""
    first, *others = MAIN_FIELDS
    rows = [["method", "rank", first, *others, "seconds"]]
    groups = [""]
    for record in table.to_dict("records"):
        rank = text_of(record)
        spread = ", ".join(short_number(record[first + end], 2) for end in ("_q25", "_q75"))
        cells = [str(record["method"]), rank, f"{short_number(record[first])} [{spread}]"]
        for field in others:
            x = record[field]
            # A skill of 1e-11 is rounding, an error of this size is not.
            small = field == "skill" and abs(x) < 5e-4
            cells.append("0" if small else short_number(x))
        rows.append([*cells, short_number(record["seconds"])])
        alike = record["role"] in ("predictor", "exact")
        groups.append("predictors" if alike else f"{record['role']} {record['method']}")
    lines = aligned(rows)
    for i in range(len(rows) - 1, 1, -1):
        if groups[i] != groups[i - 1]:
            lines.insert(i, "")
    return lines
