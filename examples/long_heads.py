"""Measure approximations of heads that are too long for their matrix: n = 262144 by default.

    python examples/long_heads.py
    python examples/long_heads.py --n 65536 --methods uniform,hyperattention --ranks 256,1024
    python examples/long_heads.py --heads heads.safetensors --out long

Made heads are written to a file, which the study reads a head at a time.  Errors come from exact
rows at a random sample, the same rows for all methods, each with an interval that holds the error
of all rows with probability 0.95.  Printed at the end: time, and the most memory that was in use.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import sketchattn as sa

COLUMNS = ["head", "method", "rank", "output_fro_rel", "output_fro_rel_low", "output_fro_rel_high"]


def measure(options: argparse.Namespace, folder: Path) -> sa.StudyResult:
    """Return the study of the heads of a file, which is made where none is given."""
    path = options.heads
    if path is None:
        path = folder / "long.safetensors"
        heads = sa.make_heads(
            "clustered", n=options.n, d=options.d, heads=2, dtype="float16", rng=0
        )
        sa.write_heads(path, heads.replace(causal=options.causal))
    return sa.study(
        path,
        methods=options.methods.split(","),
        ranks=[int(x) for x in options.ranks.split(",")],
        seeds=1,
        rows=options.rows,
        floors=("topk",),
        jobs=1,  # one head at a time in memory, with all threads
        out=options.out,
    )


def peak() -> str:
    """Return the most memory that this process had in use."""
    if sys.platform == "win32":
        return "unknown"
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{most / (2**30 if sys.platform == 'darwin' else 2**20):.2f} GB"


def main() -> None:
    """Run the study and print its rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--heads", type=Path, help="file of heads in place of made ones")
    parser.add_argument("--n", type=int, default=262144, help="length of made heads")
    parser.add_argument("--d", type=int, default=64, help="width of made heads")
    parser.add_argument("--causal", action="store_true", help="with a causal mask")
    parser.add_argument("--methods", default="uniform,thinformer,nystromformer,skeinformer")
    parser.add_argument("--ranks", default="64,256")
    parser.add_argument("--rows", type=int, default=512, help="exact rows")
    parser.add_argument("--out", type=Path, help="folder for rows and pictures")
    parser.add_argument("--small", action="store_true", help="seconds: n = 2048, d = 16, 64 rows")
    options = parser.parse_args()
    if options.small:
        options.n, options.d, options.rows, options.ranks = 2048, 16, 64, "16,64"
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    print(result.frame[[*COLUMNS, "rows", "seconds"]].to_string(index=False))
    print(result.references[[*COLUMNS[:4], "rows"]].to_string(index=False))
    for note in result.notes:
        print(f"note: {note}")
    print(f"{time.perf_counter() - start:.0f} s, {peak()} at most")


if __name__ == "__main__":
    main()
