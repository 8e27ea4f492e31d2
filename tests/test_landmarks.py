"""Landmarks: segments, clusters, drawn and pivoted rows."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sketchattn.kernels._threads import limit_threads
from sketchattn.sampling import (
    chosen_rows,
    kmeans,
    nearest,
    pivoted_rows,
    segment_labels,
    segment_means,
)

Array = NDArray[Any]

pytestmark = pytest.mark.usefixtures("one_thread")


def blobs(n: int, clusters: int, seed: int, noise: float = 0.01, d: int = 6) -> tuple[Array, Array]:
    """Return rows near some centres (n, d), and which centre each is near."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(clusters), rng.integers(0, clusters, n - clusters)])
    return rng.standard_normal((clusters, d))[labels] + noise * rng.standard_normal((n, d)), labels


def same_partition(first: Array, second: Array) -> bool:
    """Say whether two labellings put the same rows together."""
    pairs = {*zip(first.tolist(), second.tolist(), strict=True)}
    return len(pairs) == len({*first.tolist()}) == len({*second.tolist()})


# --- segments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "r"), [(7, 3), (7, 7), (7, 1), (12, 5), (8, 4)])
def test_segments_by_loops(n: int, r: int) -> None:
    x = np.random.default_rng(0).standard_normal((n, 2))
    labels = segment_labels(n, r)
    sizes = [n // r + (1 if i < n % r else 0) for i in range(r)]
    assert labels.tolist() == [i for i in range(r) for _ in range(sizes[i])]
    means = np.array([x[labels == i].mean(axis=0) for i in range(r)])
    assert np.abs(segment_means(x, r) - means).max() <= 1e-14


# --- k-means ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [None, 120])
def test_separated_clusters_are_found(sample: int | None, global_random_seed: int) -> None:
    x, labels = blobs(400, 8, global_random_seed)
    # Centres may lie close to each other by chance: more of them than clusters cover all of them.
    found = kmeans(x, 40, global_random_seed, sample=sample)
    far = np.linalg.norm(x - found.centers[found.labels], axis=1)
    assert far.max() <= 0.2  # 20 standard deviations of the noise
    assert found.counts.sum() == 400
    assert (np.bincount(found.labels, minlength=len(found.counts)) == found.counts).all()
    # Fewer centres than clusters leave rows far away.
    assert np.linalg.norm(x - kmeans(x, 2, 0).centers[kmeans(x, 2, 0).labels], axis=1).max() > 0.2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sample", [None, 60])
def test_labels_are_the_nearest_centres(dtype: Any, sample: int | None) -> None:
    x = np.random.default_rng(1).standard_normal((3000, 5)).astype(dtype) + 3
    found = kmeans(x, 30, 4, sample=sample)
    wide = x.astype(np.float64)
    distances = ((wide[:, None, :] - found.centers[None]) ** 2).sum(axis=2)
    mine = distances[np.arange(len(x)), found.labels]
    # 2 (d + 4) roundings of products of sizes |x - 0| and |c - mean|, for two centres.
    slack = 40 * np.finfo(dtype).eps * (np.abs(wide).max() * 5) ** 2
    assert (mine <= distances.min(axis=1) + slack).all()
    assert found.centers.dtype == np.float64
    assert (found.counts > 0).all()
    assert found.labels.dtype == found.counts.dtype == np.int64


def test_nearest_centres_keep_their_digits_far_from_the_origin() -> None:
    """About the mean of centres rounding is relative to their distance, not to |c|^2."""
    shift = 1e4
    x = np.array([[0.0], [1.0], [2.0], [3.0]]) + shift
    centers = np.array([[0.0], [1.0], [2.0], [3.0]]) + shift
    assert nearest(x.astype(np.float32), centers).tolist() == [0, 1, 2, 3]
    # The formula without the shift loses them in float32: |c|^2 / 2 has a spacing of 4.
    a, c = x.astype(np.float32), centers.astype(np.float32)
    plain = (a @ c.T - 0.5 * (c**2).sum(axis=1)).argmax(axis=1)
    assert plain.tolist() != [0, 1, 2, 3]


def test_rows_that_repeat_are_the_centres(global_random_seed: int) -> None:
    rng = np.random.default_rng(global_random_seed)
    marks = rng.standard_normal((7, 3))
    labels = np.concatenate([np.arange(7), rng.integers(0, 7, 30)])
    for r in (7, 8, 20, 37):
        found = kmeans(marks[labels], r, global_random_seed)
        assert same_partition(found.labels, labels)
        assert np.abs(found.centers[found.labels] - marks[labels]).max() <= 1e-14
        assert np.array_equal(np.sort(found.counts), np.sort(np.bincount(labels)))
    assert len(kmeans(np.ones((9, 2)), 4, 0).counts) == 1


def test_the_same_seed_gives_the_same_bits_for_any_threads() -> None:
    x = np.random.default_rng(0).standard_normal((4000, 8)).astype(np.float32)
    for sample in (None, 500):
        made = []
        for count in (1, 2):
            with limit_threads(count):
                made.append(kmeans(x, 50, 3, sample=sample))
        assert all(np.array_equal(a, b) for a, b in zip(*made, strict=True))
        other = kmeans(x, 50, 4, sample=sample)
        assert other.centers.shape != made[0].centers.shape or (
            not np.array_equal(other.centers, made[0].centers)
        )


def test_steps_lower_the_distances() -> None:
    x, _ = blobs(600, 30, 5, noise=0.5)
    spread = []
    for steps in (1, 8, 50):
        found = kmeans(x, 20, 1, steps=steps)
        spread.append(((x - found.centers[found.labels]) ** 2).sum())
    assert spread[0] > spread[1] >= spread[2]


# --- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", ["random", "leverage", "pivoted"])
def test_rows_are_distinct_and_nested(law: str, global_random_seed: int) -> None:
    x = np.random.default_rng(global_random_seed).standard_normal((30, 4))

    def draw(r: int) -> Array:
        rng = np.random.default_rng(global_random_seed)
        return pivoted_rows(x, r, rng) if law == "pivoted" else chosen_rows(x, r, law, rng)

    large = draw(30)
    assert np.array_equal(np.sort(large), np.arange(30))
    for r in (1, 3, 4, 11):
        assert np.array_equal(draw(r), large[:r])
    assert large.dtype == np.int64


def test_rows_without_leverage_come_last() -> None:
    x = np.zeros((12, 3))
    x[[2, 5, 7]] = np.eye(3)
    for seed in range(20):
        rows = chosen_rows(x, 3, "leverage", np.random.default_rng(seed))
        assert sorted(rows.tolist()) == [2, 5, 7]
        if sorted(chosen_rows(x, 3, "random", np.random.default_rng(seed)).tolist()) != [2, 5, 7]:
            break
    else:
        pytest.fail("uniform draws were those by leverage")


def test_pivots_by_the_greedy_rule() -> None:
    """Each pivot is the row that is farthest from the span of those before it."""
    x = np.random.default_rng(2).standard_normal((40, 6))
    rows = pivoted_rows(x, 6, np.random.default_rng(0))
    rest = x.copy()
    for row in rows:
        size = np.linalg.norm(rest, axis=1)
        assert size[row] == size.max()
        unit = rest[row] / size[row]
        rest -= np.outer(rest @ unit, unit)
    assert np.abs(rest).max() <= 1e-13  # they span all rows


def test_beyond_the_rank_rows_are_drawn() -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((25, 2)) @ rng.standard_normal((2, 5))
    first, second = (pivoted_rows(x, 10, np.random.default_rng(seed)) for seed in (0, 1))
    assert np.array_equal(first[:2], second[:2])
    assert not np.array_equal(first[2:], second[2:])
    assert len(set(first.tolist())) == 10


ROWS, RNG = np.ones((3, 2)), np.random.default_rng(0)
BAD: list[tuple[Any, type[Exception], str]] = [
    (
        lambda: kmeans(ROWS, 4, 0),
        ValueError,
        "r must be in 1..n for x of shape (n, d), got 4 and (3, 2); lower r",
    ),
    (
        lambda: kmeans(ROWS, 2, 0, sample=1),
        ValueError,
        "sample must be at least 2, got 1; raise sample",
    ),
    (
        lambda: kmeans(ROWS, 2, 0, steps=0),
        ValueError,
        "steps must be at least 1, got 0; raise steps",
    ),
    (
        lambda: kmeans(ROWS, 2, 0, steps=1.5),  # type: ignore[arg-type]  # what is refused
        TypeError,
        "steps must be an integer, got float; it is at least 1",
    ),
    (
        lambda: kmeans(np.full((3, 2), np.nan), 2, 0),
        ValueError,
        "x must be finite, got nan at index (0, 0); replace it, or hide its key with a mask",
    ),
    (lambda: segment_labels(3, 0), ValueError, "r must be in 1..n = 3, got 0; raise r"),
    (lambda: segment_labels(3, 4), ValueError, "r must be in 1..n = 3, got 4; lower r"),
    (
        lambda: chosen_rows(ROWS, 2, "levrage", RNG),
        ValueError,
        "law must be one of random, leverage, got 'levrage'; did you mean 'leverage'?",
    ),
    (
        lambda: nearest(ROWS, np.ones((2, 3))),
        ValueError,
        "centers must have shape (m, d) with m >= 1 and d = 2, got (2, 3); give one row for each "
        "centre",
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD)
def test_refusals(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        call()
