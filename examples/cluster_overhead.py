"""What a cluster costs: a study by local processes, and by as many Dask workers of this machine.

Both are done once to compile, then in turn; medians and the median of the paired ratios are
printed, and whether all rows are equal bit for bit.

    python examples/cluster_overhead.py --heads 12 --n 512 --seeds 4 --workers 2 --rounds 3
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

from distributed import Client, LocalCluster

import sketchattn as sa

METHODS = "uniform,jl,column_sampling,linformer,skeinformer,informer,nystromformer,performer"


def main() -> None:
    """Print seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--n", type=int, default=512)
    parser.add_argument("--methods", default=f"{METHODS},dba,clustered")
    parser.add_argument("--ranks", default="8,16,32,64,128,256")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()

    heads = sa.make_heads("clustered", n=given.n, d=32, heads=given.heads, rng=0)
    heads = [head.astype("float32") for head in heads]
    options: dict[str, Any] = {
        "methods": given.methods.split(","),
        "ranks": [int(x) for x in given.ranks.split(",")],
        "seeds": given.seeds,
    }
    seconds: dict[str, list[float]] = {"local": [], "dask": []}
    rows = []
    with (
        LocalCluster(
            n_workers=given.workers,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
        ) as cluster,
        Client(cluster) as client,
    ):
        where: dict[str, dict[str, Any]] = {
            "local": {"jobs": given.workers},
            "dask": {"dask": client},
        }
        for i in range(given.rounds + 1):
            for name, options_there in where.items():
                start = time.perf_counter()
                result = sa.study(heads, **options, **options_there)
                if i > 0:
                    seconds[name].append(time.perf_counter() - start)
                rows.append(result.frame.drop(columns="seconds"))
    for name, times in seconds.items():
        print(f"{name}: {median(times):.2f} s ({min(times):.2f} to {max(times):.2f})")
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    print(f"dask / local: {median(ratios):.3f} ({', '.join(f'{x:.3f}' for x in ratios)})")
    print(f"rows equal: {all(x.equals(rows[0]) for x in rows)}")


if __name__ == "__main__":
    main()
