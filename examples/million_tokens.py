"""Attend with a million queries to a million keys that lie in files, and certify the result.

    python examples/million_tokens.py
    python examples/million_tokens.py --d 32 --largest 524288 --no-causal --out million

A made text is written to files piece by piece: pieces of 16384 tokens, each with topics of its own,
so that queries find their topic in one piece and something like it elsewhere.  Heads are the first
n tokens, mapped for reading, n from 2^14 to 2^20.  `nearfar` makes all n rows of the output, with
its defaults.  Certified is `|Ohat - O|_F / |O|_F`: from exact rows in float64 at random positions,
the interval holds for every head with probability 0.95.  Beside it stands the mean of the values
that a row sees, whose error is estimated from fewer rows.

What exact attention takes is extrapolated: a few groups of rows at evenly spaced positions are
timed, and the time is multiplied by n over their number.  At the smallest n all rows are timed too.

Times are those of the processor, of one thread for both methods, of all threads together for the
certificates, so that other programs change them little.  Memory is the peak of the process, with
the pages of mapped files that are in memory.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import sketchattn as sa
from sketchattn.base.drawing import make_figure, plain_style
from sketchattn.base.files import write_text
from sketchattn.base.machine import machine
from sketchattn.kernels._threads import limit_threads

PIECE = 16384
# Groups of exact rows that are timed, and rows of each: with fewer a row takes longer.
GROUPS, GROUP = 4, 1024


def write_text_head(folder: Path, n: int, d: int) -> None:
    """Write q, k and v of a made text, float32 (n, d) each, holding one piece in memory."""
    files = {name: (folder / name).open("wb") for name in "qkv"}
    for i in range(-(-n // PIECE)):
        piece = sa.make_heads("clustered", n=min(PIECE, n), d=d, rng=i)[0]
        for name, x in zip("qkv", (piece.q, piece.k, piece.values), strict=True):
            x[: n - i * PIECE].tofile(files[name])
    for file in files.values():
        file.close()


def head(folder: Path, n: int, d: int) -> list[Any]:
    """Return q, k and v of the first n tokens, mapped for reading."""
    return [np.memmap(folder / name, np.float32, "r", shape=(n, d)) for name in "qkv"]


def memory() -> float:
    """Return the most memory that this process had in use, in bytes."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024.0 * int(re.findall(r"VmHWM:\s*(\d+)", status)[0])
    except (OSError, IndexError):
        if sys.platform == "win32":
            return math.nan
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return float(most * (1 if sys.platform == "darwin" else 1024))


def approximate(folder: Path, n: int, d: int, causal: bool) -> dict[str, Any]:
    """Write the output of nearfar for the first n tokens, and return what that took."""
    q, k, v = head(folder, n, d)
    start = time.process_time()
    out = sa.attention(q, k, v, "nearfar", causal=causal)
    seconds = time.process_time() - start
    peak = memory()
    np.save(folder / f"out{n}.npy", out)
    return {"n": n, "seconds": seconds, "row_us": 1e6 * seconds / n, "peak_gb": peak / 1e9}


def exact_seconds(folder: Path, n: int, d: int, causal: bool) -> float:
    """Return the seconds of exact attention, from evenly spaced groups of rows."""
    q, k, v = head(folder, n, d)
    rows = min(GROUP, n // GROUPS)
    seconds = 0.0
    for i in range(GROUPS):
        stop = (2 * i + 1) * n // (2 * GROUPS) + rows // 2
        keys = stop if causal else n
        # Checks of the keys are once a head, not once a group.
        part = sa.AttentionProblem(
            q[stop - rows : stop], k[:keys], v[:keys], causal="bottom-right" if causal else False
        )
        start = time.process_time()
        sa.Exact().attend(part)
        seconds += time.process_time() - start
    return seconds * n / (rows * GROUPS)


def whole_seconds(folder: Path, n: int, d: int, causal: bool) -> float:
    """Return the seconds of exact attention of all rows."""
    q, k, v = head(folder, n, d)
    start = time.process_time()
    sa.attention(q, k, v, causal=causal)
    return time.process_time() - start


def certificates(folder: Path, n: int, d: int, causal: bool, rows: int) -> dict[str, float]:
    """Return the certified error of the output that was written, and that of means of V."""
    problem = sa.AttentionProblem(*head(folder, n, d), causal=causal)
    start = time.process_time()
    found = sa.certify(problem, np.load(folder / f"out{n}.npy", mmap_mode="r"), rows=rows, rng=0)
    seconds = time.process_time() - start
    mean = sa.certify(problem, sa.VMean().attend(problem), rows=max(rows // 8, 16), rng=0)
    return {
        "error": found.estimate,
        "low": found.low,
        "high": found.high,
        "rows": found.rows,
        "certify_s": seconds,
        "mean_of_v": mean.estimate,
    }


def warm_up(d: int, causal: bool) -> None:
    """Compile, or load, what will be timed."""
    x = np.random.default_rng(0).standard_normal((3, 2048, d), dtype=np.float32)
    problem = sa.AttentionProblem(*x, causal=causal)
    for method in (sa.NearFar(levels=1), sa.NearFar(levels=2), sa.Exact(), sa.VMean()):
        method.attend(problem)
    sa.certify(problem, x[2], rows=16)


def hours(seconds: float) -> str:
    """Return a time in its own unit."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw times, and certified errors, against n."""
    import matplotlib

    with plain_style():
        matplotlib.rcParams["svg.hashsalt"] = "million_tokens"  # the same bytes every time
        figure = make_figure(figsize=(9, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        n = [x["n"] for x in rows]
        left.plot(n, [x["seconds"] for x in rows], "o-", color="C0", label="nearfar, all rows")
        left.plot(
            n, [x["exact_s"] for x in rows], "s--", color="C3", markerfacecolor="none",
            label=f"exact, extrapolated from {GROUPS * GROUP} rows",
        )  # fmt: skip
        left.plot(n[:1], [rows[0]["whole_s"]], "x", color="C3", markersize=9, label="exact, all")
        left.plot(
            n, [x["certify_s"] for x in rows], ".:", color="0.5",
            label=f"certificate, {max(x['rows'] for x in rows):.0f} exact rows",
        )  # fmt: skip
        left.set(yscale="log", ylabel="processor time in seconds")
        middle = np.array([x["error"] for x in rows])
        ends = np.array([[x["error"] - x["low"], x["high"] - x["error"]] for x in rows]).T
        right.errorbar(
            n, middle, ends, fmt="o-", color="C0", capsize=3, label="nearfar, 95 % interval"
        )
        right.plot(n, [x["mean_of_v"] for x in rows], "x--", color="0.5", label="mean of V")
        right.axhline(1, color="0.7", linewidth=1, label="zeros")
        right.set(yscale="log", ylabel="relative error of the output")
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set(xlabel="n, queries and keys")
        left.legend(frameon=False, fontsize=8)
        right.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.92))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    """Measure all lengths, print a table and draw the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smallest", type=int, default=2**14, help="lengths double from here")
    parser.add_argument("--largest", type=int, default=2**20)
    parser.add_argument("--d", type=int, default=64, help="width of queries, keys and values")
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--rows", type=int, default=1024, help="exact rows of a certificate")
    parser.add_argument("--out", type=Path, default=Path("million-tokens"))
    parser.add_argument("--picture", type=Path, help="million_tokens.svg in the output folder")
    parser.add_argument("--small", action="store_true", help="seconds: n = 512 to 2048, d = 16")
    options = parser.parse_args()
    if options.small:
        options.smallest, options.largest, options.d, options.rows = 512, 2048, 16, 256
    lengths = [options.smallest]
    while 2 * lengths[-1] <= options.largest:
        lengths.append(2 * lengths[-1])
    start = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    warm_up(options.d, options.causal)
    given = options.d, options.causal
    with tempfile.TemporaryDirectory(dir=options.out) as name:
        folder = Path(name)
        write_text_head(folder, lengths[-1], options.d)
        # Peaks only grow: outputs first, the largest last, then what takes more memory.
        with limit_threads(1):  # so that processor time is the time of an idle processor
            rows = [approximate(folder, n, *given) for n in lengths]
            for row in rows:
                row["exact_s"] = exact_seconds(folder, row["n"], *given)
                row["whole_s"] = math.nan
            rows[0]["whole_s"] = whole_seconds(folder, lengths[0], *given)
        for row in rows:
            row |= certificates(folder, row["n"], *given, options.rows)

    import pandas as pd

    frame = pd.DataFrame(rows)
    write_text(options.out / "results.csv", frame.to_csv(index=False))
    here = machine()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(
        f"d = {options.d}, float32, {'causal' if options.causal else 'no mask'}; "
        f"{here['cpu']}, processor time of one thread{load}\n"
    )
    print(f"{'n':>8}{'nearfar':>10}{'us/row':>8}{'peak':>9}{'exact':>10}"
          f"{'error':>9}{'95 % interval':>18}{'mean of V':>11}")  # fmt: skip
    for x in rows:
        interval = f"{x['low']:.3f} to {x['high']:.3f}"
        print(
            f"{x['n']:>8}{hours(x['seconds']):>10}{x['row_us']:>8.1f}{x['peak_gb']:>6.2f} GB"
            f"{hours(x['exact_s']):>10}{x['error']:>9.4f}{interval:>18}{x['mean_of_v']:>11.3f}"
        )
    first, last = rows[0], rows[-1]
    tokens = 4e-9 * last["n"] * options.d
    print(
        f"\nexact attention: extrapolated from {GROUPS} groups of rows; at n = {first['n']} all of "
        f"them took {hours(first['whole_s'])}, extrapolated {hours(first['exact_s'])}\n"
        f"inputs at n = {last['n']}: {3 * tokens:.2f} GB, mapped; output {tokens:.2f} GB; "
        f"certificates from {last['rows']:.0f} exact rows, {hours(last['certify_s'])}; "
        f"peak of everything {memory() / 1e9:.2f} GB"
    )
    picture = options.picture or options.out / "million_tokens.svg"
    draw(rows, picture)
    print(f"{picture}, {options.out / 'results.csv'}; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
