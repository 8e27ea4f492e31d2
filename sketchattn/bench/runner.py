"""Benchmarks by name, of all families; runs of them, and their table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..base.arguments import closest
from ..base.machine import machine
from . import (
    combiner,
    decode,
    exact,
    informer,
    integrations,
    linformer,
    load,
    lowrank,
    peers,
    reports,
    skeinformer,
    sketching,
    small,
    startup,
    training_free,
)
from .harness import Benchmark, Row, known

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
    small,
    peers,
    training_free,
    decode,
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
        ``target`` the largest ratio allowed (None: informative), ``met`` whether it is: all with
        as many threads as kernels use.  ``one_thread`` has the same on one thread, timed in the
        same rounds (None where that has no meaning).  ``others`` is the median over the rounds of
        the CPUs that other programs kept busy, ``disturbed`` how many of the ``rounds`` had more
        than 0.2, ``repeated`` how many such rounds were done again.

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


def _verdict(found: Row) -> str:
    """Return what a ratio may be at most, and whether it is more."""
    goal = "" if found["target"] is None else f"{found['target']:.3g}"
    return goal + {None: "", True: " met", False: " MISSED"}[found["met"]]


def render(rows: Sequence[Row], around: Mapping[str, float | None] | None = None) -> str:
    """Return the results as a table with the machine below.

    ``around`` has the load before and after, as `measure_load` gives it.
    """
    form = "{:<20}{:<58}{:>10}  {:<18}{:>10}{:>9}  {:<15}{:<16}{:>10}{:>9}  {}"
    titles = ["benchmark", "case", "ours", "against", "theirs", "ratio", "[quartiles]", "target"]
    lines = [form.format(*titles, "1 thread", "ratio", "target").rstrip()]
    for row in rows:
        low, high = row["ratio_quartiles"]
        one, unit = row["one_thread"], row["unit"]
        alone = ("", "") if one is None else (_figure(one["ours"], unit), f"{one['ratio']:.3f}")
        remarks = [] if one is None else [_verdict(one)]
        if row.get("disturbed"):
            remarks.append(f"~ {row['disturbed']} of {row['rounds']} rounds")
        lines.append(
            form.format(
                row["benchmark"],
                row["case"],
                _figure(row["ours"], unit),
                row["against"],
                _figure(row["theirs"], unit),
                f"{row['ratio']:.3f}",
                f"[{low:.2f}, {high:.2f}]",
                _verdict(row),
                *alone,
                " ".join(remarks).strip(),
            ).rstrip()
        )
        if "gflops" in row:
            lines.append(
                f"{'':<14}{row['gflops']:.0f} GFLOP/s, {100 * row['share_of_gemm']:.0f} % of a "
                f"float32 GEMM ({row['gemm_gflops']:.0f} GFLOP/s)"
            )
    lines.append("")
    if any(row.get("disturbed") for row in rows):
        lines.append(
            f"~: rounds that count though other programs kept more than {load.DISTURBED:g} CPUs "
            "busy; do not quote them"
        )
    for when, value in ({} if around is None else around).items():
        said = "unknown" if value is None else f"{value:.2f}"
        lines.append(f"CPUs kept busy by other programs {when}: {said}")
    lines += [f"{name}: {value}" for name, value in machine().items()]
    return "\n".join(lines)


def measure_load() -> float | None:
    """Return how many CPUs other programs keep busy now, None where that is not told."""
    return known(load.measure())
