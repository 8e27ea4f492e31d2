"""The examples whose kernel matrix is attention, beside loops over pixels and points."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from packaging_checks import ROOT
from test_examples import Run, load, run

import sketchattn as sa

__all__ = ["run"]


def nlm(picture: Any, width: float, reach: float) -> Any:
    """Return non-local means with patches of 3 x 3, pixel by pixel."""
    height, length, _ = picture.shape
    padded = np.pad(picture, ((1, 1), (1, 1), (0, 0)), mode="reflect")
    made = np.empty_like(picture)
    for y in range(height):
        for x in range(length):
            total, weights = np.zeros(3), 0.0
            for v in range(height):
                for u in range(length):
                    patch = padded[y : y + 3, x : x + 3] - padded[v : v + 3, u : u + 3]
                    square = np.sum(patch**2) / width**2
                    square += ((y - v) ** 2 + (x - u) ** 2) / reach**2
                    weight = math.exp(-square)
                    total += weight * picture[v, u]
                    weights += weight
            made[y, x] = total / weights
    return made


def test_non_local_means_is_attention() -> None:
    module = load("denoise")
    picture = np.random.default_rng(0).random((9, 11, 3))
    # All 27 principal components keep all distances of patches.
    p = module.features(picture, components=27, width=1.5, reach=8.0)
    output = module.attention_of(p, picture.reshape(-1, 3)).output
    expected = nlm(picture, 1.5, 8.0)
    assert np.abs(output.reshape(picture.shape) - expected).max() < 1e-5
    assert np.abs(expected - picture.mean(axis=(0, 1))).max() > 0.05
    # Fewer of them shorten distances, the leading ones least.
    distance = [
        np.square(
            module.features(picture, components=c)[:1] - module.features(picture, components=c)
        )
        .sum(axis=1)
        .mean()
        for c in (2, 8, 27)
    ]
    assert distance[0] < distance[1] < distance[2]


def test_tiles_are_an_order_of_all_pixels() -> None:
    module = load("denoise")
    order = module.tiles(40, 70)
    assert sorted(order) == list(range(40 * 70))
    y, x = np.divmod(order[: 32 * 32], 70)
    assert (y.max(), x.max()) == (31, 31)


def test_the_sample_is_half_as_large() -> None:
    from sklearn.datasets import load_sample_image

    module = load("denoise")
    whole = load_sample_image("china.jpg") / 255
    assert module.sample("china.jpg", 999, 999).shape == (213, 320, 3)
    part = module.sample("china.jpg", 8, 10)
    top, left = 204, 310
    for a, b in np.ndindex(8, 10):
        cell = whole[top + 2 * a : top + 2 * a + 2, left + 2 * b : left + 2 * b + 2]
        assert part[a, b] == pytest.approx(cell.mean(axis=(0, 1)))


def test_a_photograph_is_denoised(run: Run) -> None:
    said = run("denoise", "--height", "36", "--width", "34", "--rows", "64", "--out", "made")
    frame: Any = pd.read_csv(run.folder / "made/results.csv").set_index("method")
    module = load("denoise")
    clean = module.sample("china.jpg", 36, 34)
    noisy = clean + 0.1 * np.random.default_rng(0).standard_normal(clean.shape)
    assert frame.loc["noisy", "dB"] == pytest.approx(-10 * np.log10(np.mean((noisy - clean) ** 2)))
    p = module.features(noisy)
    weights = np.exp(-np.square(p[:, None] - p[None]).sum(axis=2))
    exact = (weights / weights.sum(axis=1, keepdims=True)) @ noisy.reshape(-1, 3)
    ratio = -10 * np.log10(np.mean((exact.reshape(clean.shape) - clean) ** 2))
    assert frame.loc["exact", "dB"] == pytest.approx(ratio, abs=1e-3)
    assert ratio > frame.loc["noisy", "dB"] + 2
    # The order of the pixels, and that the error is that of the picture.
    order = module.tiles(36, 34)
    ours = sa.NearFar(second_order="none").attend(
        module.attention_of(p[order], noisy.reshape(-1, 3)[order]), 0
    )
    error = np.linalg.norm(ours - exact[order]) / np.linalg.norm(exact)
    assert frame.loc[module.OURS, "error"] == pytest.approx(error, abs=1e-5)
    assert error < frame.loc["nearfar, defaults", "error"]
    assert "34: n = 1224 queries and keys, d = 11, float32" in said
    assert f"{frame.loc['exact', 'dB']:.2f}" in said
    assert "from 64 rows, finite-sample" in said
    assert 1000 < (run.folder / "made/denoise.png").stat().st_size < 200_000


def test_kernel_smoothing_is_attention() -> None:
    module = load("kernel_smoothing")
    points, values = module.scattered(200, 0.5, np.random.default_rng(0))
    queries = module.grid(5)
    output = module.smoothing(queries, points, values, 0.1).output[:, 0]
    for x, found in zip(queries, output, strict=True):
        weights = [math.exp(-(math.dist(x, z) ** 2) / (2 * 0.1**2)) for z in points]
        assert found == pytest.approx(np.dot(weights, values) / sum(weights), abs=1e-5)


def test_points_are_listed_tile_by_tile() -> None:
    module = load("kernel_smoothing")
    points = np.random.default_rng(0).random((4000, 2))
    listed = module.listed(points)
    assert np.array_equal(np.sort(listed, axis=0), np.sort(points, axis=0))
    tile = (module.TILES * listed).astype(int)
    # No tile is left and entered again, and the next one is beside it.
    steps = np.abs(np.diff(tile, axis=0)).sum(axis=1)
    assert (steps > 0).sum() == module.TILES**2 - 1
    assert steps.max() == 1


def test_scattered_data_are_smoothed(run: Run) -> None:
    options = ("--n", "1000", "--side", "8", "--rank", "32", "--bandwidth", "0.1", "--seed", "3")
    said = run("kernel_smoothing", *options, "--out", "made", "--picture", "made/here.png")
    frame: Any = pd.read_csv(run.folder / "made/results.csv").set_index("method")
    module = load("kernel_smoothing")
    points, values = module.scattered(1000, 2.0, np.random.default_rng(3))
    queries = module.listed(module.grid(8))
    weights = np.exp(-np.square(queries[:, None] - points[None]).sum(axis=2) / (2 * 0.1**2))
    exact = weights @ values / weights.sum(axis=1)
    against = np.sqrt(np.mean((exact - module.truth(queries)) ** 2))
    assert frame.loc["exact", "against truth"] == pytest.approx(against, abs=1e-4)
    assert frame.loc["exact", "against exact"] == 0
    # Uniform keys by their definition: the drawn ones, with their own weights.
    problem = module.smoothing(queries, points, values, 0.1)
    keys = sa.UniformColumns(rank=32).draw(problem, 3)["columns"]
    few = weights[:, keys] @ values[keys] / weights[:, keys].sum(axis=1)
    error = np.linalg.norm(few - exact) / np.linalg.norm(exact)
    assert frame.loc["uniform", "against exact"] == pytest.approx(error, rel=1e-3)
    assert frame.loc["nearfar, no second order", "against exact"] < error
    assert "1000 points, 64 queries, bandwidth 0.1, noise 2, rank 32, float32, seed 3" in said
    assert 1000 < (run.folder / "made/here.png").stat().st_size < 200_000


@pytest.mark.parametrize("name", ["denoise", "kernel_smoothing"])
def test_pictures_of_the_pages_are_small(name: str) -> None:
    picture = ROOT / "docs" / "pictures" / f"{name}.png"
    assert 1000 < picture.stat().st_size < 200_000
    page = ROOT / "docs" / "examples" / f"{name.replace('_', '-')}.md"
    assert f"(../pictures/{name}.png)" in page.read_text(encoding="utf-8")
