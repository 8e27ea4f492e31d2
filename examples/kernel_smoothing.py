"""Smooth scattered data with a Gaussian kernel, which is attention, and see approximations of it.

    python examples/kernel_smoothing.py
    python examples/kernel_smoothing.py --small
    python examples/kernel_smoothing.py --n 262144 --bandwidth 0.06 --out kernel-smoothing

Nadaraya and Watson estimate a function at x from noisy values y_j at points x_j by the mean
``sum_j w_j y_j / sum_j w_j`` with ``w_j = exp(-|x - x_j|^2 / (2 h^2))``.  The square of x is the
same for all j and leaves the quotient: this is softmax attention with queries ``[x/h, 1]``, keys
``[x_j/h, -|x_j|^2/(2 h^2)]``, scale 1, and values y_j.  Every operator of the library applies,
with a million keys and one value column.

Printed are, over a grid of queries, the root mean square error of the estimate against the true
function, which exact attention has as well (noise, and the bandwidth, which blurs), the relative
error against exact attention, and processor time (of all threads).  An approximation is good
enough where the first number is that of exact attention.

The second order of ``nearfar`` is left out.  It adds the variances of a logit coordinate by
coordinate, blind to what x_j and its square have in common: inside a cluster the logit of a query
nearby hardly varies, and the sum of variances is large.

This is not the regression of a Gaussian process: that has the same kernel matrix, but solves a
linear system with it, and says how uncertain it is.  Here is a mean with weights, nothing more.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

import sketchattn as sa

# The square is cut into so many tiles a side, in whose order points and queries are listed:
# neighbours in a list are neighbours in the square, which methods with segments of a list need.
TILES = 16


def truth(x: Any) -> Any:
    """Return the function that is to be found, at points (m, 2) of the unit square."""
    a, b = x[:, 0], x[:, 1]
    return np.sin(5 * a) * np.cos(4 * b) + np.exp(-((a - 0.7) ** 2 + (b - 0.3) ** 2) / 0.05)


def scattered(n: int, noise: float, rng: np.random.Generator) -> tuple[Any, Any]:
    """Return points (n, 2), denser in the middle, tile by tile, and noisy values there."""
    x = listed(rng.beta(2, 2, size=(n, 2)))
    return x, truth(x) + noise * rng.standard_normal(n)


def listed(x: Any) -> Any:
    """Return points tile by tile."""
    tile = np.minimum((TILES * x).astype(int), TILES - 1)
    # Rows of tiles, every other one backwards.
    across = np.where(tile[:, 1] % 2, TILES - 1 - tile[:, 0], tile[:, 0])
    return x[np.lexsort((across, tile[:, 1]))]


def grid(side: int) -> Any:
    """Return side^2 points (m, 2) of the square that is a twentieth away from the edges."""
    ticks = np.linspace(0.05, 0.95, side)
    return np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)


def smoothing(queries: Any, points: Any, values: Any, bandwidth: float) -> sa.AttentionProblem:
    """Return the problem whose output is the mean of values by a Gaussian kernel."""
    centre = points.mean(axis=0)  # differences are the same, and squares stay small
    q, k = (queries - centre) / bandwidth, (points - centre) / bandwidth
    q = np.hstack([q, np.ones((len(q), 1))])
    k = np.hstack([k, -np.sum(k**2, axis=1, keepdims=True) / 2])
    arrays = (np.asarray(x, np.float32) for x in (q, k, values[:, None]))
    return sa.AttentionProblem(*arrays, scale=1.0, name="smoothing")


def methods_for(rank: int) -> dict[str, sa.Method]:
    """Return what is compared, exact attention first."""
    return {
        "exact": sa.Exact(),
        "nearfar, no second order": sa.NearFar(second_order="none"),
        "nearfar, defaults": sa.NearFar(),
        "nystromformer": sa.Nystromformer(rank=rank),
        "wildcat": sa.WildCat(rank=rank),
        "performer": sa.Performer(rank=rank),
        "uniform": sa.UniformColumns(rank=rank),
    }


def compare(
    problem: sa.AttentionProblem, target: Any, rank: int, seed: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return a row a method, and what each estimates at the queries."""
    rows, found = [], {}
    for name, method in methods_for(rank).items():
        start = time.process_time()
        found[name] = np.asarray(method.attend(problem, seed)[:, 0], np.float64)
        seconds = time.process_time() - start
        exact = found["exact"]
        rows.append(
            {
                "method": name,
                "against truth": float(np.sqrt(np.mean((found[name] - target) ** 2))),
                "against exact": float(np.linalg.norm(found[name] - exact) / np.linalg.norm(exact)),
                "CPU s": seconds,
            }
        )
    return rows, found


def main() -> None:
    """Smooth, print the table, and draw data, estimates and errors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=1 << 20, help="points with values")
    parser.add_argument("--side", type=int, default=64, help="queries are side x side")
    parser.add_argument("--bandwidth", type=float, default=0.04, help="h; the square has side 1")
    parser.add_argument("--noise", type=float, default=2.0, help="standard deviation")
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--small", action="store_true", help="4096 points, 16 x 16 queries")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("kernel-smoothing"))
    parser.add_argument("--picture", type=Path, help="default: in the folder of --out")
    options = parser.parse_args()
    if options.small:
        options.n, options.side, options.rank, options.bandwidth = 4096, 16, 64, 0.08

    import pandas as pd

    begun = time.perf_counter()
    rng = np.random.default_rng(options.seed)
    points, values = scattered(options.n, options.noise, rng)
    queries = listed(grid(options.side))
    target = truth(queries)
    problem = smoothing(queries, points, values, options.bandwidth)
    few = slice(None, None, max(1, options.n // 2048))
    little = smoothing(queries[:64], points[few], values[few], options.bandwidth)
    compare(little, target[:64], 32, options.seed)  # compiles, or loads, what is timed
    sa.NearFar(levels=2, second_order="none").attend(little)  # two, as long lists have
    rows, found = compare(problem, target, options.rank, options.seed)

    frame = pd.DataFrame(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(options.out / "results.csv", index=False)
    print(
        f"{problem.n_k} points, {problem.n_q} queries, bandwidth {options.bandwidth:g}, noise "
        f"{options.noise:g}, rank {options.rank}, {problem.dtype}, seed {options.seed}\n"
    )
    shown = frame.round({"against truth": 4, "CPU s": 1})
    print(shown.to_string(index=False, formatters={"against exact": "{:.2g}".format}), "\n")
    size = float(np.sqrt(np.mean(target**2)))
    print(f"the true function has a root mean square of {size:.4f}")
    picture = options.picture or options.out / "kernel_smoothing.png"
    # The pixels of the pictures are the queries row by row.
    pixels = np.lexsort((queries[:, 0], queries[:, 1]))
    images = {name: found[name][pixels].reshape(options.side, -1) for name in found}
    draw(points, values, images, frame, picture)
    print(f"{picture}, {options.out / 'results.csv'}; {time.perf_counter() - begun:.0f} s")


def draw(points: Any, values: Any, images: dict[str, Any], frame: Any, path: Path) -> None:
    """Draw some of the data, what exact attention and each method make of it, and differences."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    exact = images["exact"]
    limit = float(np.abs(exact).max())
    figure = Figure(figsize=(10, 3.4), layout="constrained", dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(images))
    options = {"extent": (0.05, 0.95, 0.05, 0.95), "origin": "lower", "cmap": "RdBu_r"}
    some = np.arange(0, len(points), max(1, len(points) // 1000))
    colours = {"c": values[some], "cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    axes[1, 0].scatter(*points[some].T, s=1, **colours)
    axes[1, 0].set(xlim=(0, 1), ylim=(0, 1), aspect="equal", title="some of the data")
    errors = frame.set_index("method")["against exact"]
    for i, (name, image) in enumerate(images.items()):
        top = axes[0, i].imshow(image, vmin=-limit, vmax=limit, **options)
        axes[0, i].set_title(name)
        if i:
            change = image - exact
            low = axes[1, i].imshow(change, vmin=-limit / 10, vmax=limit / 10, **options)
            axes[1, i].set_title(f"error {errors[name]:.2g}")
    figure.colorbar(top, ax=axes[0], shrink=0.8)
    figure.colorbar(low, ax=axes[1], shrink=0.8)
    for one in axes.ravel():
        one.set(xticks=[], yticks=[])
        one.title.set_fontsize(7)
    canvas.draw()
    # 255 colours are enough to see it, in a third of the bytes.
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.quantize(255).save(path, optimize=True)


if __name__ == "__main__":
    main()
