"""What the scripts of the book share: checks, tables inside a chapter, figures, the command line.

A script makes one `Chapter`, adds tables and a figure to it, and ends with ``CHAPTER.main()``.
Each table has its place in the chapter between ``<!-- table NAME -->`` and ``<!-- end NAME -->``.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import sketchattn as sa
from sketchattn import theory
from sketchattn.base.files import write_bytes, write_text
from sketchattn.kernels._threads import limit_threads

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Numbers of a table may differ by this factor from one machine to another: their last digit.
TOLERANCE = 0.02
# Smaller numbers are rounding.
ROUNDING = 1e-9

Factory = Callable[..., Any]


class Table(NamedTuple):
    """Hold a table: names of the columns, and rows of cells."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def column(self, name: str) -> list[float]:
        """Return the numbers of a column as they are printed."""
        place = self.header.index(name)
        return [float(row[place]) for row in self.rows]

    def text(self) -> str:
        """Return the table in Markdown."""
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


class Statement(NamedTuple):
    """Name a claim, the instance that it is shown on, its parameters, and how it is broken.

    ``control`` makes the random operators, or the softmax, of the broken variant; None where the
    claim draws nothing.
    """

    claim: str
    on: str
    parameters: Mapping[str, Any]
    control: Factory | None


class Checks:
    """Compare numbers of a table with their theory, and collect what differs.

    A broken table has its theory scaled by 1.1, so that a comparison that cannot fail is seen.
    """

    def __init__(self, broken: bool) -> None:
        self.factor = 1.1 if broken else 1.0
        self.problems: list[str] = []

    def equal(
        self, what: str, found: float, wanted: float, *, relative: float, absolute: float = 0.0
    ) -> None:
        """Note where two numbers differ by more than a relative and an absolute tolerance."""
        target = self.factor * wanted
        if not abs(found - target) <= relative * abs(target) + absolute:
            self.problems.append(f"{what}: {found:.6g} and not {target:.6g}")

    def at_most(self, what: str, found: float, bound: float) -> None:
        """Note where a number exceeds a bound, or a broken bound of a hundredth."""
        limit = bound if self.factor == 1.0 else bound / 100
        if not found <= limit * (1 + ROUNDING):
            self.problems.append(f"{what}: {found:.6g} exceeds {limit:.6g}")


def number(x: float, digits: int = 3) -> str:
    """Return a number for a table: a few digits, 0 for what is rounding."""
    if math.isnan(x):
        return "-"
    if math.isinf(x):
        return "inf"
    if abs(x) < ROUNDING:
        return "0"
    return re.sub(r"e([+-])0*(\d)", r"e\1\2", f"{x:.{digits}g}").replace("e+", "e")


# --- problems -----------------------------------------------------------------------------------


def heads(step: int = 1) -> list[sa.AttentionProblem]:
    """Return bundled heads in float64."""
    return [problem.astype(np.float64) for problem in sa.load_heads("minilm")[::step]]


def worked_example() -> sa.AttentionProblem:
    """Return the instance "worked", three queries and keys whose numbers can be checked by hand."""
    problem = theory.instances()["worked"].problem
    assert problem is not None  # it is made of queries and keys
    return problem


# --- broken variants ----------------------------------------------------------------------------


def scaled(kind: str, r: int, n: int, rng: Any, **parameters: Any) -> Any:
    """Return an operator that is too long by a tenth."""
    return 1.1 * theory.default_factory(kind, r, n, rng, **parameters).to_dense()


# --- chapters -----------------------------------------------------------------------------------

VERDICTS = ("claim", "status", "on", "verdict", "r", "observed", "bound", "failures")


class Chapter:
    """Hold the tables of a chapter, its figure, and the commands of its script.

    Parameters
    ----------
    script : str
        ``__file__`` of ``verify_<topic>.py``; the chapter is ``<topic>.md`` beside it.
    """

    def __init__(self, script: str) -> None:
        path = Path(script).resolve()
        self.topic = path.stem.removeprefix("verify_")
        self.page = path.with_name(f"{self.topic}.md")
        self.picture = path.with_name(f"{self.topic}.svg")
        self.statements: dict[str, list[Statement]] = {}
        self.builders: dict[str, Callable[[Checks], Table]] = {}
        self.draw: Callable[[Mapping[str, Table]], Figure] | None = None

    def verdicts(
        self,
        name: str,
        claims: Sequence[tuple[str, str] | tuple[str, str, Mapping[str, Any]]],
        *,
        controls: Mapping[str, Factory | None] | None = None,
        control: Factory | None = scaled,
    ) -> None:
        """Add a table of verdicts: of each claim, on the instance that is named with it."""
        self.statements[name] = [
            Statement(id_, on, dict(rest[0]) if rest else {}, (controls or {}).get(id_, control))
            for id_, on, *rest in claims
        ]

    def table(self, name: str) -> Callable[[Callable[[Checks], Table]], Callable[[Checks], Table]]:
        """Add the table that a function builds and checks."""

        def register(build: Callable[[Checks], Table]) -> Callable[[Checks], Table]:
            self.builders[name] = build
            return build

        return register

    def figure(
        self, draw: Callable[[Mapping[str, Table]], Figure]
    ) -> Callable[[Mapping[str, Table]], Figure]:
        """Add the figure, drawn from the tables as they are printed."""
        self.draw = draw
        return draw

    # --- what is checked ---

    def breakable(self) -> list[str]:
        """Return what ``--break`` knows: claims with a broken variant, and tables of numbers."""
        claims = theory.claims()
        known = [
            s.claim
            for group in self.statements.values()
            for s in group
            if s.control is not None and claims[s.claim].status != "refuted"
        ]
        return list(dict.fromkeys(known)) + list(self.builders)

    def _verdict(
        self, statement: Statement, broken: bool
    ) -> tuple[theory.Claim, theory.Verdict, str]:
        """Return claim, verdict, and what is wrong with it, empty if nothing is."""
        claim = theory.claims()[statement.claim]
        sketch = statement.control if broken else None
        found = theory.check(statement.claim, statement.on, sketch=sketch, **statement.parameters)
        wanted = claim.recorded[statement.on]
        return claim, found, "" if found.status == wanted else f"{found} [recorded: {wanted}]"

    def broken(self, name: str) -> list[str]:
        """Return what is noticed when one statement is broken on purpose."""
        if name in self.builders:
            checks = Checks(True)
            with limit_threads(1):
                self.builders[name](checks)
            return checks.problems
        for group in self.statements.values():
            for statement in group:
                if statement.claim == name:
                    problem = self._verdict(statement, True)[2]
                    return [problem] if problem else []
        raise ValueError(f"--break must name one of {', '.join(self.breakable())}, got {name!r}")

    def compute(self) -> tuple[dict[str, Table], list[str]]:
        """Return all tables, and what differs from its record or its theory."""
        tables: dict[str, Table] = {}
        problems: list[str] = []
        for name, group in self.statements.items():
            rows = []
            for statement in group:
                claim, found, problem = self._verdict(statement, False)
                problems += [problem] if problem else []
                given = "".join(f", {key} = {x:g}" for key, x in statement.parameters.items())
                failures = "" if found.failures is None else f"{found.failures}/{found.trials}"
                rank = "" if found.rank is None else str(found.rank)
                rows.append(
                    (
                        f"`{claim.id}`",
                        claim.status,
                        f"{statement.on}{given}",
                        found.status,
                        rank,
                        number(found.observed),
                        number(found.bound),
                        failures,
                    )
                )
            tables[name] = Table(VERDICTS, rows)
        for name, build in self.builders.items():
            checks = Checks(False)
            with limit_threads(1):  # small matrices, and the same rounding everywhere
                tables[name] = build(checks)
            problems += checks.problems
        return tables, problems

    # --- what is written ---

    def printed(self) -> dict[str, Table]:
        """Return the tables that the chapter holds."""
        found = {}
        for name, body in _places(self.page.read_text(encoding="utf-8")):
            lines = [
                tuple(cell.strip() for cell in line.strip().strip("|").split("|"))
                for line in body.strip().splitlines()
            ]
            if len(lines) >= 2:
                found[name] = Table(lines[0], lines[2:])
        return found

    def stale(self, tables: Mapping[str, Table]) -> list[str]:
        """Return where chapter and figure differ from tables."""
        printed = self.printed()
        places = [name for name, _ in _places(self.page.read_text(encoding="utf-8"))]
        problems = [
            f"{self.page.name} has no place for table {x}" for x in set(tables) - set(places)
        ]
        problems += [
            f"{self.page.name} has a place for {x} alone" for x in set(places) - set(tables)
        ]
        for name in set(tables) & set(places):
            old, new = printed.get(name), tables[name]
            if old is None or old.header != new.header or len(old.rows) != len(new.rows):
                problems.append(f"table {name} is of another shape")
                continue
            problems += [
                f"table {name}, {now[0]}: {was} is printed, {now} is found"
                for was, now in zip(old.rows, new.rows, strict=True)
                if len(was) != len(now) or not all(map(_same, was, now))
            ]
        if not problems and self.draw is not None:
            mark = f"tables {_digest(printed)}".encode()
            if not self.picture.exists() or mark not in self.picture.read_bytes():
                problems.append(f"{self.picture.name} was drawn from other tables")
        return problems

    def write(self, tables: Mapping[str, Table]) -> None:
        """Write tables into the chapter, and the figure beside it.

        A table whose numbers are those that are printed already, up to their last digit, stays.
        """
        text = self.page.read_text(encoding="utf-8")
        printed = self.printed()
        for name, table in tables.items():
            start, end = f"<!-- table {name} -->", f"<!-- end {name} -->"
            if start not in text or end not in text:
                raise ValueError(f"{self.page.name} must hold {start} and {end}; add them")
            old = printed.get(name)
            if old is not None and old.header == table.header and len(old.rows) == len(table.rows):
                rows = [
                    was if len(was) == len(now) and all(map(_same, was, now)) else now
                    for was, now in zip(old.rows, table.rows, strict=True)
                ]
                table = Table(table.header, rows)
            before, rest = text.split(start, 1)
            after = rest.split(end, 1)[1]
            text = f"{before}{start}\n{table.text()}\n{end}{after}"
        write_text(self.page, text)
        if self.draw is not None:
            write_bytes(self.picture, self.svg())

    def svg(self) -> bytes:
        """Return the figure as SVG, the same bytes for the same printed tables."""
        import matplotlib

        assert self.draw is not None  # asked for where there is one
        printed = self.printed()
        buffer = BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": self.topic, "svg.fonttype": "none"}):
            figure = self.draw(printed)
            figure.savefig(
                buffer,
                format="svg",
                metadata={
                    "Date": None,
                    "Creator": None,
                    "Description": f"drawn from the tables {_digest(printed)}",
                },
            )
        lines = (line.rstrip() for line in buffer.getvalue().decode().splitlines())
        return ("\n".join(lines) + "\n").encode()

    # --- command line ---

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Run a command; return the exit status."""
        parser = argparse.ArgumentParser(
            description=f"Check the statements of {self.page.name}; write its tables and figure."
        )
        group = parser.add_mutually_exclusive_group()
        group.add_argument(
            "--check", action="store_true", help="write nothing; fail where a table is stale"
        )
        group.add_argument(
            "--break",
            dest="broken",
            metavar="STATEMENT",
            help="check one statement, broken on purpose: fails",
        )
        group.add_argument("--list", action="store_true", help="print what --break knows")
        given = parser.parse_args(arguments)
        if given.list:
            print(*self.breakable(), sep="\n")
            return 0
        if given.broken is not None:
            if given.broken not in self.breakable():
                parser.error(
                    f"--break must name a statement, got {given.broken!r}; --list prints them"
                )
            problems = self.broken(given.broken)
        else:
            tables, problems = self.compute()
            if not problems and given.check:
                problems = self.stale(tables)
            elif not problems:
                self.write(tables)
        for problem in problems:
            print(f"{self.topic}: {problem}", file=sys.stderr)
        return 1 if problems else 0


def _places(text: str) -> list[tuple[str, str]]:
    """Return the names of the tables of a chapter with what stands in their places."""
    return re.findall(r"<!-- table ([\w-]+) -->\n(.*?)<!-- end \1 -->", text, flags=re.DOTALL)


def _same(old: str, new: str) -> bool:
    """Return whether two cells are equal up to the last digit of a number."""
    if old == new:
        return True
    try:
        was, now = float(old), float(new)
    except ValueError:
        return False
    return abs(was - now) <= TOLERANCE * max(abs(was), abs(now))


def _digest(tables: Mapping[str, Table]) -> str:
    text = "\n".join(f"{name}\n{tables[name].text()}" for name in sorted(tables))
    return f"{zlib.crc32(text.encode()):08x}"


def new_figure(width: float = 6.4, height: float = 3.8) -> Figure:
    """Return an empty figure that belongs to no window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def curves(
    table: Table, x: str, lines: Sequence[tuple[str, str, str]], **labels: str
) -> tuple[Figure, Axes]:
    """Return a figure of columns of a table against its column ``x``, and its axes.

    ``lines`` are (column, style, colour); ``labels`` are those of the axes, xlabel and ylabel.
    """
    drawn = new_figure()
    axes = drawn.add_subplot()
    places = table.column(x)
    for name, style, colour in lines:
        axes.plot(places, table.column(name), style, color=colour, label=name, markersize=4)
    axes.set(**labels)
    axes.grid(True, which="both", color="0.92", linewidth=0.5)
    axes.legend(fontsize=8)
    return drawn, axes
