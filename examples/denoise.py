"""Denoise a photograph by non-local means, which is attention, and see what approximations cost.

    python examples/denoise.py
    python examples/denoise.py --small
    python examples/denoise.py --image flower.jpg --noise 0.15 --out denoise

Non-local means replaces every pixel by a mean of all pixels, weighted by how alike the patches
around the two are: ``sum_j exp(-|p_i - p_j|^2) c_j / sum_j exp(-|p_i - p_j|^2)``.  Here p is the
patch in the coordinates of its leading principal components, divided by a width, beside the
position of the pixel, divided by a reach.  The square of p_i is the same for all j and leaves the
quotient, so that this is softmax attention with one coordinate more: queries ``[2 p_i, 1]``, keys
``[p_j, -|p_j|^2]``, scale 1, and colours as values.

The second order of ``nearfar`` is left out, and its defaults are beside it to show why: it adds the
variances of a logit coordinate by coordinate, blind to what p_j and its square have in common, and
so takes clusters that hardly weigh anything for heavy ones.

Printed are, for exact attention and for approximations of it, the peak signal-to-noise ratio
against the clean picture, the relative error against exact attention, and processor time (of all
threads).  For the output of ``nearfar`` an interval is certified from some exact rows, as one
would do where exact attention is too long.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

import sketchattn as sa

# Pixels are taken tile by tile, so that neighbours in the picture are neighbours in the list.
TILE = 32
# Ranks of other methods, as a share of the keys.
RIVALS = {
    "nystromformer": 1 / 64,
    "clustered": 1 / 32,
    "hyperattention": 1 / 16,
    "uniform": 1 / 16,
    "wildcat": 1 / 256,
}
OURS = "nearfar, no second order"


def sample(name: str, height: int, width: int) -> Any:
    """Return the middle of a picture of scikit-learn at half its size, in [0, 1]."""
    from sklearn.datasets import load_sample_image

    whole = load_sample_image(name).astype(np.float64) / 255
    rows, columns = whole.shape[0] // 2, whole.shape[1] // 2
    half = whole[: 2 * rows, : 2 * columns].reshape(rows, 2, columns, 2, 3).mean(axis=(1, 3))
    top, left = max(0, rows - height) // 2, max(0, columns - width) // 2
    return half[top : top + height, left : left + width]


def features(
    picture: Any, radius: int = 1, components: int = 8, width: float = 0.3, reach: float = 40.0
) -> Any:
    """Return p, (pixels, components + 2), row by row: patches and positions, both scaled."""
    height, length, channels = picture.shape
    padded = np.pad(picture, ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    side = 2 * radius + 1
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), axis=(0, 1))
    patches = windows.reshape(height * length, channels * side**2)
    patches = patches - patches.mean(axis=0)
    directions = np.linalg.eigh(patches.T @ patches)[1][:, ::-1][:, :components]
    where = np.stack(np.mgrid[:height, :length], axis=-1).reshape(-1, 2)
    return np.hstack([patches @ directions / width, where / reach])


def attention_of(p: Any, colours: Any) -> sa.AttentionProblem:
    """Return the problem whose output is the mean of colours weighted by exp(-|p_i - p_j|^2)."""
    p = p - p.mean(axis=0)  # differences are the same, and squares stay small
    q = np.hstack([2 * p, np.ones((len(p), 1))])
    k = np.hstack([p, -np.sum(p**2, axis=1, keepdims=True)])
    return sa.AttentionProblem(
        *(np.asarray(x, np.float32) for x in (q, k, colours)), scale=1.0, name="patches"
    )


def tiles(height: int, width: int) -> Any:
    """Return the order of the pixels tile by tile."""
    y, x = (part.ravel() for part in np.mgrid[:height, :width])
    return np.lexsort((x, y, x // TILE, y // TILE))


def decibels(picture: Any, clean: Any) -> float:
    """Return the peak signal-to-noise ratio in dB, of pictures in [0, 1]."""
    return float(-10 * np.log10(np.mean((picture - clean) ** 2)))


def methods_for(n: int) -> dict[str, sa.Method]:
    """Return what is compared, exact attention first."""
    found: dict[str, sa.Method] = {
        "exact": sa.Exact(),
        OURS: sa.NearFar(second_order="none"),
        "nearfar, defaults": sa.NearFar(),
    }
    for name, share in RIVALS.items():
        rank = max(1, round(share * n))
        found[f"{name}, r = {rank}"] = sa.methods()[name](rank=rank)
    return found


def compare(clean: Any, noisy: Any, seed: int) -> tuple[list[dict[str, Any]], dict[str, Any], Any]:
    """Return a row a method, the pictures, and the problem; pictures are row by row again."""
    height, width, _ = clean.shape
    order = tiles(height, width)
    problem = attention_of(features(noisy)[order], noisy.reshape(-1, 3)[order])
    pictures, rows = {"clean": clean, "noisy": noisy}, []
    rows.append({"method": "noisy", "dB": decibels(noisy, clean)})
    truth = None
    for name, method in methods_for(problem.n_k).items():
        start = time.process_time()
        output = method.attend(problem, seed)
        seconds = time.process_time() - start
        truth = output if truth is None else truth
        picture = np.empty((height * width, 3))
        picture[order] = output
        pictures[name] = picture.reshape(clean.shape)
        rows.append(
            {
                "method": name,
                "dB": decibels(pictures[name], clean),
                "error": float(np.linalg.norm(output - truth) / np.linalg.norm(truth)),
                "CPU s": seconds,
            }
        )
    return rows, pictures, problem


def main() -> None:
    """Denoise, print the table and the certificate, and write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", default="china.jpg", help="china.jpg or flower.jpg")
    parser.add_argument("--height", type=int, default=213, help="pixels that are kept")
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--small", action="store_true", help="40 x 60 pixels")
    parser.add_argument("--noise", type=float, default=0.1, help="standard deviation; white is 1")
    parser.add_argument("--rows", type=int, default=4096, help="exact rows of the certificate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("denoise"))
    parser.add_argument("--picture", type=Path, help="default: denoise.png in the folder of --out")
    options = parser.parse_args()

    import pandas as pd

    begun = time.perf_counter()
    size = (40, 60) if options.small else (options.height, options.width)
    clean = sample(options.image, *size)
    rng = np.random.default_rng(options.seed)
    noisy = clean + options.noise * rng.standard_normal(clean.shape)
    little = (slice(0, 32), slice(0, 32))
    *_, few = compare(clean[little], noisy[little], options.seed)
    sa.NearFar(levels=2).attend(few)  # these two compile, or load, what is timed
    rows, pictures, problem = compare(clean, noisy, options.seed)

    frame = pd.DataFrame(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(options.out / "results.csv", index=False)
    height, width, _ = clean.shape
    print(
        f"{options.image}, {height} x {width}: n = {problem.n_k} queries and keys, "
        f"d = {problem.d}, {problem.dtype}, noise {options.noise:g}, seed {options.seed}\n"
    )
    shown = frame.round({"dB": 2, "error": 4, "CPU s": 1})
    print(shown.to_string(index=False, na_rep=""), "\n")
    ours = np.asarray(pictures[OURS].reshape(-1, 3)[tiles(height, width)], problem.dtype)
    reads = sa.NearFar(second_order="none").approximate(problem).work(problem)
    print(f"{OURS}: a row reads {100 * reads:.1f} % of the keys")
    start = time.process_time()
    certificate = sa.certify(problem, ours, rows=options.rows, rng=options.seed)
    print(f"certified, {time.process_time() - start:.1f} CPU s: {certificate}")
    picture = options.picture or options.out / "denoise.png"
    draw(pictures, frame, picture)
    print(f"{picture}, {options.out / 'results.csv'}; {time.perf_counter() - begun:.0f} s")


def draw(pictures: dict[str, Any], frame: Any, path: Path) -> None:
    """Draw a part of six pictures: clean, noisy, exact, ours, the best and the worst of others."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    ratios = frame.set_index("method")["dB"]
    others = ratios.drop(["noisy", "exact", OURS])
    names = ["clean", "noisy", "exact", OURS, others.idxmax(), others.idxmin()]
    height, width, _ = pictures["clean"].shape
    tall, wide = min(height, 96), min(width, 128)
    top, left = (height - tall) // 2, (width - wide) // 2
    figure = Figure(figsize=(9, 5), layout="constrained", dpi=100)
    canvas = FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(2, 3).ravel(), names, strict=True):
        part = pictures[name][top : top + tall, left : left + wide]
        axes.imshow(np.clip(part, 0, 1), interpolation="nearest")
        axes.set_title(name if name == "clean" else f"{name}: {ratios[name]:.2f} dB", fontsize=9)
        axes.axis("off")
    canvas.draw()
    # 255 colours are enough to see it, in a third of the bytes.
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.quantize(255).save(path, optimize=True)


if __name__ == "__main__":
    main()
