"""Clustering on a sample: against scikit-learn, at edges of tiles, balanced, and on odd rows."""

from __future__ import annotations

import os
import re
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn.heads.files import read_heads
from sketchattn.kernels._threads import limit_threads
from sketchattn.kernels.clustering import PIECE, nearest_centers
from sketchattn.sampling import around, kmeans
from sketchattn.sampling.clustering import _filled, _phases

Array = NDArray[Any]

pytestmark = pytest.mark.usefixtures("one_thread")

# A folder with more head files, such as longer ones.
MORE = os.environ.get("SKETCHATTN_TEST_HEADS", "")
FILES = sorted(Path(MORE).glob("*.safetensors")) if MORE else []


def inertia(x: Array, found: Any) -> float:
    """Return the sum of squared distances between rows and their centres."""
    return float(((x.astype(np.float64) - found.centers[found.labels]) ** 2).sum())


def blobs(n: int, clusters: int, seed: int, d: int = 6) -> Array:
    rng = np.random.default_rng(seed)
    marks = 3 * rng.standard_normal((clusters, d))
    return np.asarray(marks[rng.integers(0, clusters, n)] + rng.standard_normal((n, d)))


# --- as good as the reference -------------------------------------------------------------------


def quotients(rows: Iterator[Array], r: int) -> tuple[float, float]:
    """Return the mean inertia over that of scikit-learn, of kmeans and of rows drawn as centres."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    ours, drawn = [], []
    for x in rows:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            fits = [KMeans(r, n_init=1, max_iter=8, random_state=s).fit(x) for s in range(2)]
        wanted = np.mean([fit.inertia_ for fit in fits])
        ours.append(np.mean([inertia(x, kmeans(x, r, s)) for s in range(2)]) / wanted)
        some = np.random.default_rng(0).permutation(len(x))[:r]
        drawn.append(inertia(x, around(x, x[some])) / wanted)
    return float(np.mean(ours)), float(np.mean(drawn))


def sides(heads: Any, step: int) -> Iterator[Array]:
    for i in range(0, len(heads), step):
        problem = heads[i].astype(np.float32)
        yield from (problem.q, problem.k)


@pytest.mark.slow
@pytest.mark.parametrize("r", [16, 64, 256])
def test_within_five_percent_of_sklearn_on_bundled_heads(r: int) -> None:
    ours, drawn = quotients(sides(sa.load_heads("minilm"), 3), r)
    assert ours <= 1.05
    assert drawn > 1.05


@pytest.mark.slow
@pytest.mark.parametrize("r", [16, 64, 256])
@pytest.mark.parametrize("file", FILES, ids=[x.stem for x in FILES])
def test_within_five_percent_of_sklearn_on_more_heads(file: Path, r: int) -> None:
    assert quotients(sides(read_heads(file), 2), r)[0] <= 1.05


@pytest.mark.parametrize(("n", "r"), [(4096, 16), (4096, 64), (2000, 200)])
def test_within_five_percent_of_sklearn_on_samples(n: int, r: int) -> None:
    """Most of the steps see a part of the rows here."""
    assert _phases(n, r, 8, "auto")[0][0] < n
    x = blobs(n, 40, 3, d=16).astype(np.float32)
    ours, drawn = quotients(iter([x]), r)
    assert ours <= 1.05
    assert drawn > 1.05


# --- tiles, ties and precision ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("m", [1, 3, 4, 5, 127, 128, 129, 258])
@pytest.mark.parametrize("n", [1, 255, 256, 257, 520])
def test_nearest_at_edges_of_tiles_is_the_first_of_equals(n: int, m: int, dtype: Any) -> None:
    """Small integers: every product is exact, and many distances are equal."""
    rng = np.random.default_rng(n + m)
    x, centers = (rng.integers(-2, 3, (k, 3)).astype(dtype) for k in (n, m))
    labels, distance = nearest_centers(x, np.zeros(3, dtype), centers)
    wanted = ((x[:, None] - centers[None]) ** 2).sum(axis=2)
    assert np.array_equal(labels, wanted.argmin(axis=1))
    assert np.array_equal(distance, wanted.min(axis=1))
    if m > 100 and n > 100:
        last = m - 1 - wanted[:, ::-1].argmin(axis=1)
        assert not np.array_equal(labels, last)  # there are ties


def test_precisions_agree() -> None:
    x = blobs(5000, 30, 1)
    single, double = (kmeans(x.astype(t), 30, 2) for t in (np.float32, np.float64))
    assert single.centers.dtype == double.centers.dtype == np.float64
    # Steps may stop elsewhere, so labels need not be the same: both are as good.
    assert abs(inertia(x, single) / inertia(x, double) - 1) <= 0.05


@pytest.mark.parametrize("power", [-100, -70, 60, 100])
def test_powers_of_two_change_no_label(power: int) -> None:
    """Squares of the rows would leave the range of float32."""
    x = blobs(700, 9, 4).astype(np.float32)
    plain, scaled = kmeans(x, 12, 5), kmeans(np.ldexp(x, power), 12, 5)
    assert np.array_equal(plain.labels, scaled.labels)
    assert np.array_equal(np.ldexp(plain.centers, power), scaled.centers)


def test_rows_far_from_the_origin() -> None:
    x = blobs(3000, 8, 6)
    far = (x + 1000).astype(np.float32)
    plain, moved = kmeans(x.astype(np.float32), 8, 0), kmeans(far, 8, 0)
    assert inertia(far, moved) <= 1.05 * inertia(x, plain)


@pytest.mark.threads
def test_the_same_bits_for_any_threads_where_rows_are_dealt_in_pieces() -> None:
    x = np.random.default_rng(0).standard_normal((40000, 8)).astype(np.float32)
    assert len(x) > 2 * PIECE // (128 * 8)  # three pieces
    made = []
    for count in (1, 2, 3):
        with limit_threads(count):
            made.append(kmeans(x, 128, 3, balanced=True))
    for other in made[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(made[0], other, strict=True))


def test_no_array_of_rows_by_centres_is_held() -> None:
    n, r = 30000, 400
    x = np.random.default_rng(0).standard_normal((n, 4)).astype(np.float32)
    kmeans(x, r, 0)
    tracemalloc.start()
    kmeans(x, r, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= n * r * 4 / 3


# --- odd rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", ["auto", None, 40])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fewer_distinct_rows_than_centres(dtype: Any, sample: Any, global_random_seed: int) -> None:
    rng = np.random.default_rng(global_random_seed)
    marks = rng.standard_normal((7, 3)).astype(dtype)
    labels = np.concatenate([np.arange(7), rng.integers(0, 7, 3000)])
    found = kmeans(marks[labels], 20, global_random_seed, sample=sample)
    assert np.array_equal(found.centers[found.labels], marks[labels])
    assert np.array_equal(np.sort(found.counts), np.sort(np.bincount(labels)))


@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e30])
def test_rows_that_are_all_equal(value: float) -> None:
    found = kmeans(np.full((50, 3), value, np.float32), 5, 0)
    assert np.array_equal(found.centers, np.full((1, 3), np.float32(value)))
    assert found.counts.tolist() == [50]
    assert not found.labels.any()


def test_as_many_centres_as_rows_and_a_single_row() -> None:
    for n in (1, 2, 30, 1500):
        x = np.random.default_rng(n).standard_normal((n, 4))
        found = kmeans(x, n, 1)
        assert np.array_equal(np.sort(found.labels), np.arange(n))
        assert np.abs(found.centers[found.labels] - x).max() <= 1e-14
    one = kmeans([[2.0, 3.0]], 1, 0, balanced=True)
    assert one.centers.tolist() == [[2.0, 3.0]]


def test_centres_without_rows_move_to_the_rows_farthest_away() -> None:
    x = np.concatenate([np.zeros((20, 2)), np.ones((20, 2)), [[50.0, 0.0]], [[0.0, 60.0]]])
    start = np.array([[0.0, 0.0], [0.0, 0.0], [-900.0, 0.0], [1.0, 1.0]])
    assert len(around(x, start).counts) == 2
    found = _filled(x, start.copy())
    assert sorted(found.counts.tolist()) == [1, 1, 20, 20]
    assert inertia(x, found) == 0


def test_steps_fill_every_cluster(global_random_seed: int) -> None:
    x = blobs(2500, 3, global_random_seed)
    x[:4] += 1e3  # a seed each, and no other row near
    for r in (50, 300):
        assert len(kmeans(x, r, global_random_seed).counts) == r


@pytest.mark.parametrize("balanced", [False, True])
def test_steps_and_samples(balanced: bool) -> None:
    x = blobs(6000, 30, 2)
    few = inertia(x, kmeans(x, 30, 0, steps=1, sample=30, balanced=balanced))
    more = inertia(x, kmeans(x, 30, 0, balanced=balanced))
    assert more < few
    assert _phases(6000, 30, 8, None) == [(6000, 8)]
    assert _phases(6000, 30, 8, 100) == [(100, 8)]
    # Too few rows a centre for many steps.
    assert _phases(4096, 1024, 8, "auto") == [(2048, 2)]
    assert _phases(4096, 4096, 8, "auto") == [(4096, 2)]


# --- balance ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "r"), [(1, 1), (7, 5), (400, 16), (3000, 64), (64, 64)])
def test_balanced_clusters_have_at_most_twice_the_mean(n: int, r: int) -> None:
    rng = np.random.default_rng(n)
    x = rng.standard_normal((n, 3)) * np.where(rng.random(n) < 0.1, 30, 0.1)[:, None]
    free, found = kmeans(x, r, 0), kmeans(x, r, 0, balanced=True)
    m = len(found.counts)
    assert m == len(free.counts)
    assert found.counts.max() * m <= 2 * n
    assert np.array_equal(found.counts, np.bincount(found.labels, minlength=m))
    if n >= 400:
        assert free.counts.max() * m > 2 * n  # what the limit is for
    means = np.array([x[found.labels == c].mean(axis=0) for c in range(m)])
    assert np.abs(found.centers - means).max() <= 1e-13 * np.abs(x).max()


def test_balance_moves_only_what_does_not_fit() -> None:
    x = blobs(3000, 5, 8)
    free, found = kmeans(x, 5, 0), kmeans(x, 5, 0, balanced=True)
    assert free.counts.max() <= 1200
    assert np.array_equal(free.labels, found.labels)
    # Rows that repeat need room too.
    same = kmeans(np.repeat([[0.0], [1.0], [2.0]], [98, 1, 1], axis=0), 3, 0, balanced=True)
    assert same.counts.max() == 66


# --- methods ------------------------------------------------------------------------------------


def test_masked_keys_decide_no_cluster() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((300, 8)) for _ in range(3))
    keep = np.arange(300) % 5 != 2
    other = k.copy()
    other[~keep] = 1e6 * rng.standard_normal((60, 8))
    for method in (
        sa.Combiner("routing", rank=9),
        sa.Combiner("routing", rank=9, metric="query"),
        sa.DBA(9, preset="dba_means"),
        sa.Nystromformer(9, "kmeans"),
    ):
        plain, moved = (
            method.attend(sa.AttentionProblem(q, x, v, key_mask=keep), rng=1) for x in (k, other)
        )
        assert np.array_equal(plain, moved)
        whole = method.attend(sa.AttentionProblem(q, k, v), rng=1)
        assert not np.array_equal(whole, plain)


BAD: list[tuple[Any, type[Exception], str]] = [
    ({"sample": "all"}, ValueError, "sample must be 'auto', an integer or None, got 'all'; None"),
    ({"sample": 1}, ValueError, "sample must be at least 2, got 1; raise sample"),
    ({"sample": 2.5}, TypeError, "sample must be an integer, got float; it is at least 2"),
    (
        {"balanced": 1},
        TypeError,
        "balanced must be a bool, got int; True limits the size of a cluster",
    ),
]


@pytest.mark.parametrize(("options", "error", "text"), BAD)
def test_refusals(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(text)}"):
        kmeans(np.eye(3), 2, 0, **options)
    if options.get("sample") == "all":
        problem = sa.AttentionProblem(np.eye(3), np.eye(3))
        with pytest.raises(error, match=f"^{re.escape(text)}"):
            sa.Clustered(2, **options).draw(problem, 0)
