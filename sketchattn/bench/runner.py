"""Benchmarks by name, of all families; runs of them, and their table."""

from __future__ import annotations

from collections.abc import Sequence

from ..base.arguments import closest
from ..base.machine import machine
from . import (
    combiner,
    exact,
    informer,
    integrations,
    linformer,
    lowrank,
    peers,
    reports,
    skeinformer,
    sketching,
    startup,
)
from .harness import Benchmark, Row

# In the order in which they are listed and run.
_FAMILIES = (
    exact,
    reports,
    sketching,
    linformer,
    skeinformer,
    combiner,
    informer,
    lowrank,
    peers,
    integrations,
    startup,
)
BENCHMARKS: dict[str, Benchmark] = {
    found.name: found
    for family in _FAMILIES
    for found in vars(family).values()
    if isinstance(found, Benchmark)
}


def run(
    names: Sequence[str] | None = None, *, quick: bool = False, rounds: int | None = None
) -> list[Row]:
    """Run benchmarks and return one dictionary for each comparison.

    Parameters
    ----------
    names : sequence of str, optional
        Benchmarks to run, by default all of ``BENCHMARKS``.
    quick : bool
        Small sizes: shows that everything runs, measures nothing worth quoting.
    rounds : int, optional
        Interleaved repetitions, by default 7 (quick: 3).

    Returns
    -------
    list of dict
        ``ours`` and ``theirs`` are medians, ``ratio`` is the median of the paired ratios,
        ``target`` the largest ratio allowed (None: informative), ``met`` whether it is.

    Raises
    ------
    ValueError
        For unknown names and rounds below 1.
    """
    wanted = list(BENCHMARKS) if names is None else list(names)
    for name in wanted:
        if name not in BENCHMARKS:
            raise ValueError(f"name must be a benchmark, got {name!r}{closest(name, BENCHMARKS)}")
    repeats = (3 if quick else 7) if rounds is None else rounds
    if repeats < 1:
        raise ValueError(f"rounds must be at least 1, got {repeats}; 7 is the default")
    return [row for name in wanted for row in BENCHMARKS[name].run(quick, repeats)]


def _figure(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value * 1e3:.3g} ms" if abs(value) < 1 else f"{value:.3g} s"
    return f"{value:.3g} {unit}"


def render(rows: Sequence[Row]) -> str:
    """Return the results as a table with the machine below."""
    lines = [
        f"{'benchmark':<15}{'case':<58}{'ours':>11}  {'against':<18}{'theirs':>11}{'ratio':>8}"
        f"{'  [quartiles]':<16}{'target':>7}"
    ]
    for row in rows:
        low, high = row["ratio_quartiles"]
        goal = "" if row["target"] is None else f"{row['target']:g}"
        verdict = {None: "", True: " met", False: " MISSED"}[row["met"]]
        lines.append(
            f"{row['benchmark']:<15}{row['case']:<58}{_figure(row['ours'], row['unit']):>11}  "
            f"{row['against']:<18}{_figure(row['theirs'], row['unit']):>11}{row['ratio']:>8.3f}"
            f"  [{low:.2f}, {high:.2f}]".ljust(129)
            + f"{goal:>6}{verdict}"
        )
        if "gflops" in row:
            lines.append(
                f"{'':<15}{row['gflops']:.0f} GFLOP/s, {100 * row['share_of_gemm']:.0f} % of a "
                f"float32 GEMM ({row['gemm_gflops']:.0f} GFLOP/s)"
            )
    facts = machine()
    lines.append("")
    lines += [f"{name}: {value}" for name, value in facts.items()]
    return "\n".join(lines)
