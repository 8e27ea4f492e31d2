"""Sketches: their laws by enumeration and by moments, their products, bits, and errors."""

from __future__ import annotations

import itertools
import math
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from naive import naive_cosines, naive_hadamard, naive_sketch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from scipy.stats import chi2

import sketchattn as sa
from sketchattn.base.draws import Draw
from sketchattn.kernels import _threads, sketching
from sketchattn.kernels._threads import limit_threads
from sketchattn.sketches.base import Sketch, make_sketch, sketches
from sketchattn.sketches.dense import GivenSketch, check_sketch

Array = NDArray[Any]
ROOT = Path(sa.__file__).parent

KINDS = [
    "countsketch",
    "dct",
    "gaussian",
    "haar",
    "less_uniform",
    "osnap",
    "rademacher",
    "sjlt",
    "sparse",
    "srht",
    "uniform",
]
ORTHOGONAL = ["srht", "dct", "haar"]
HASHED = ["countsketch", "sjlt", "osnap"]
# Draws with more rows and the same seed start with the same rows, bit for bit.
EXTENDED = ["gaussian", "rademacher", "uniform", "sparse", "less_uniform", "srht", "dct"]


def test_kinds() -> None:
    assert list(sketches()) == KINDS
    for kind, cls in sketches().items():
        assert cls.kind == kind
        assert make_sketch(kind, 4, 8, rng=0).kind == kind


# --- laws, exactly: averages over all outcomes of a small instance ------------------------------

SMALL_A = np.array([[1.0, 2.0, 0.0], [0.5, -1.0, 3.0]])
SMALL_V = np.array([[1.0, -1.0], [2.0, 0.0], [-1.0, 1.0]])
Outcome = tuple[dict[str, Array], float]


def sign_patterns(count: int) -> Iterator[Array]:
    return (np.array(signs) for signs in itertools.product((1, -1), repeat=count))


def outcomes(kind: str, r: int, parameters: dict[str, Any]) -> Iterator[Outcome]:
    """Yield all draws of a discrete kind for n = 3, with their probabilities times a constant."""
    n = 3
    s, t = parameters.get("s", 1), parameters.get("t", 1)
    columns: list[Any]
    if kind == "rademacher":
        for signs in sign_patterns(r * n):
            yield {"sketch": signs.reshape(r, n)}, 1.0
    elif kind == "sparse":
        for entries in itertools.product((0, 1, -1), repeat=r * n):
            matrix = csr_array(np.array(entries).reshape(r, n))
            weight = (1 - 1 / s) ** entries.count(0) * (0.5 / s) ** (r * n - entries.count(0))
            yield {"starts": matrix.indptr, "columns": matrix.indices, "signs": matrix.data}, weight
    elif kind == "less_uniform":
        columns = list(itertools.combinations(range(n), t))
        for rows in itertools.product(columns, repeat=r):
            for signs in sign_patterns(r * t):
                yield {"columns": np.array(rows), "signs": signs.reshape(r, t)}, 1.0
    elif kind in HASHED:
        width = 1 if kind == "countsketch" else s
        if kind == "osnap":
            columns = list(
                itertools.product(*(range(k * r // s, (k + 1) * r // s) for k in range(s)))
            )
        else:
            columns = list(itertools.combinations(range(r), width))
        shape = (n,) if kind == "countsketch" else (n, s)
        for rows in itertools.product(columns, repeat=n):
            for signs in sign_patterns(n * width):
                yield {"hash": np.array(rows).reshape(shape), "signs": signs.reshape(shape)}, 1.0
    else:
        order = 4 if kind == "srht" else n
        if parameters.get("replace", False):
            columns = list(itertools.product(range(order), repeat=r))
        else:
            columns = list(itertools.permutations(range(order), r))
        for chosen in columns:
            for signs in sign_patterns(n):
                yield {"signs": signs, "rows": np.array(chosen)}, 1.0


ENUMERATED = [
    ("rademacher", 2, {}, 46.75, 64),
    ("sparse", 2, {"s": 3}, 87.25, 729),
    ("sparse", 2, {"s": 4}, 107.5, 729),
    ("countsketch", 2, {}, 46.75, 64),
    ("sjlt", 3, {"s": 2}, 187 / 6, 1728),
    ("osnap", 4, {"s": 2}, 23.375, 4096),
    ("srht", 2, {}, 187 / 6, 96),
    ("srht", 2, {"replace": True}, 46.75, 128),
    ("dct", 2, {}, 119 / 6, 48),
    # (n - r) / (n - 1) = 1/2 is the factor of distinct rows.
    ("dct", 2, {"replace": True}, 119 / 3, 72),
    ("less_uniform", 1, {"t": 2}, 87.375, 12),
]


@pytest.mark.interpreted
@pytest.mark.parametrize(("kind", "r", "parameters", "expected", "count"), ENUMERATED)
def test_averages_over_all_outcomes(
    kind: str, r: int, parameters: dict[str, Any], expected: float, count: int
) -> None:
    exact = SMALL_A @ SMALL_V
    total, error, mean, seen = 0.0, 0.0, np.zeros_like(exact), 0
    for arrays, weight in outcomes(kind, r, parameters):
        sketch = sketches()[kind].from_arrays(arrays, (r, 3), **parameters)
        product = sketch.apply(SMALL_A.T).T @ sketch.apply(SMALL_V)
        total += weight
        error += weight * float(np.square(product - exact).sum())
        mean += weight * product
        seen += 1
    assert seen == count
    assert error / total == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(mean / total, exact, rtol=0, atol=1e-12)


def test_the_average_reports_a_wrong_scale() -> None:
    error = []
    for arrays, _ in outcomes("rademacher", 2, {}):
        sketch = sketches()["rademacher"].from_arrays(arrays, (2, 3))
        product = 1.1**2 * sketch.apply(SMALL_A.T).T @ sketch.apply(SMALL_V)
        error.append(float(np.square(product - SMALL_A @ SMALL_V).sum()))
    assert np.mean(error) != pytest.approx(46.75, rel=0.1)


# --- laws, by moments ---------------------------------------------------------------------------


def reference_instance(n: int = 64) -> tuple[Array, Array]:
    """Return A (6, n), row-stochastic, and V (n, 5) without randomness."""
    i, j, c = np.arange(6)[:, None], np.arange(n), np.arange(5)
    logits = 3 * np.sin(1 + (i + 1) * (j + 1))
    weights = np.exp(logits)
    a: Array = weights / weights.sum(axis=1, keepdims=True)
    return a, np.cos(0.7 * (j[:, None] + 1) * (c + 1))


def amm_statistics(a: Array, v: Array) -> tuple[float, float, float]:
    """Return |A|^2 |V|^2, |A V|^2 and sum_j |A_:j|^2 |V_j|^2, all with Frobenius norms."""
    columns, rows = np.square(a).sum(axis=0), np.square(v).sum(axis=1)
    return (
        float(columns.sum() * rows.sum()),
        float(np.square(a @ v).sum()),
        float(columns @ rows),
    )


def alarms(draws: Iterator[Array], a: Array, v: Array, expected: float) -> list[str]:
    """Return what is wrong with the mean and the mean square error of A S^T S V.

    |z| > 5 is an alarm: level 5.7e-7 for each of the m d_v + 1 means if they are normal.
    """
    exact = a @ v
    products = np.array([(a @ s.T) @ (s @ v) for s in draws])
    errors = np.square(products - exact).sum(axis=(1, 2))
    samples = np.column_stack([errors, products.reshape(len(products), -1)])
    theory = np.append(expected, exact)
    spread = samples.std(axis=0, ddof=1) / math.sqrt(len(samples))
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.nan_to_num((samples.mean(axis=0) - theory) / spread, nan=math.inf)
    found = [f"mean square error: z = {z[0]:.1f}"] if abs(z[0]) > 5 else []
    return found + [f"bias: z = {x:.1f}" for x in z[1:] if abs(x) > 5]


A64, V64 = reference_instance()
R = 16
MOMENTS: list[tuple[str, dict[str, Any], float]] = [
    ("gaussian", {}, 2.6833788937),
    ("sparse", {"s": 3}, 2.6833788937),
    ("sparse", {"s": "sqrt"}, 2.8947945558),  # sqrt(64) = 8
    ("rademacher", {}, 2.5988126289),
    ("countsketch", {}, 2.5988126289),
    ("sjlt", {"s": 4}, 2.5988126289),
    ("osnap", {"s": 4}, 2.5988126289),
    ("uniform", {}, 2.6326391348),
    ("srht", {}, 1.9800477173),
    ("srht", {"replace": True}, 2.5988126289),
    ("dct", {}, 1.9818429276),
    ("dct", {"replace": True}, 1.9818429276 * 63 / 48),  # without the factor of distinct rows
    ("haar", {}, 1.9824549776),
    ("less_uniform", {"t": 4}, 2.6236375017),
    ("less_uniform", {"t": 64}, 2.5988126289),  # all columns: a Rademacher sketch
]


def drawn(
    kind: str, n: int, seed: int, count: int, r: int = R, **parameters: Any
) -> Iterator[Array]:
    # One generator for all: also the independence of draws that follow each other.
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield make_sketch(kind, r, n, rng, **parameters).to_dense()


def test_statistics_of_the_reference_instance() -> None:
    statistics = amm_statistics(A64, V64)
    assert statistics == pytest.approx((42.885368222125, 0.048694077461, 0.676530118649), rel=1e-11)


@pytest.mark.statistical
@pytest.mark.parametrize(("kind", "parameters", "expected"), MOMENTS)
def test_second_moments(
    kind: str, parameters: dict[str, Any], expected: float, global_random_seed: int
) -> None:
    draws = drawn(kind, 64, global_random_seed, 1000, **parameters)
    assert alarms(draws, A64, V64, expected) == []


@pytest.mark.slow
@pytest.mark.statistical
@pytest.mark.parametrize("kind", ["gaussian", "uniform", "haar"])
def test_second_moments_of_many_draws(kind: str, global_random_seed: int) -> None:
    # The kinds whose law is not enumerated above.
    expected = next(m for k, p, m in MOMENTS if k == kind)
    draws = drawn(kind, 64, 1000 + global_random_seed, 8000)
    assert alarms(draws, A64, V64, expected) == []


@pytest.mark.statistical
def test_second_moment_of_a_padded_transform(global_random_seed: int) -> None:
    a, v = reference_instance(48)
    size, product, columns = amm_statistics(a, v)
    expected = (64 - R) / 63 * (size + product - 2 * columns) / R
    draws = drawn("srht", 48, global_random_seed, 1000)
    assert alarms(draws, a, v, expected) == []


@pytest.mark.statistical
@pytest.mark.parametrize(
    "mutant", ["scaled by 1.1", "1/sqrt(r) missing", "sign dropped", "one seed"]
)
@pytest.mark.parametrize("kind", ["gaussian", "countsketch", "srht"])
def test_moments_report_wrong_sketches(mutant: str, kind: str, global_random_seed: int) -> None:
    # Values around 1: signs that are missing then shift all terms of a sum in one direction.
    v = 1 + V64
    size, product, columns = amm_statistics(A64, v)
    expected = {
        "gaussian": (size + product) / R,
        "countsketch": (size + product - 2 * columns) / R,
        "srht": 48 / 63 * (size + product - 2 * columns) / R,
    }[kind]
    seed = global_random_seed
    assert alarms(drawn(kind, 64, seed, 1000), A64, v, expected) == []
    draws = drawn(kind, 64, seed, 1000)
    wrong: dict[str, Callable[[Array], Array]] = {
        "scaled by 1.1": lambda s: 1.1 * s,
        "1/sqrt(r) missing": lambda s: math.sqrt(R) * s,
        "sign dropped": np.abs,
        "one seed": lambda s: make_sketch(kind, R, 64, seed).to_dense(),
    }
    found = alarms(map(wrong[mutant], draws), A64, v, expected)
    assert found
    assert found[0].startswith("mean square error")


@pytest.mark.statistical
def test_moments_tell_a_cosine_from_a_hadamard_transform() -> None:
    # On one concentrated row the two differ by far more than on the reference instance: with
    # A = e_1^T and V = e_1, M = E (|S_:1|^2 - 1)^2 is 0 for equal entries only.
    a = np.eye(1, 8)
    assert alarms(drawn("dct", 8, 0, 500, r=2), a, a.T, 0.0) != []
    deviations = [abs(s[0, 0] ** 2 + s[1, 0] ** 2 - 1) for s in drawn("srht", 8, 0, 20, r=2)]
    assert max(deviations) < 1e-15


# --- laws, by frequencies; every chi^2 test has level 1e-6 --------------------------------------


def deviates(observed: Array, expected: Array | float, freedom: int, factor: float = 1.0) -> bool:
    """Return whether Pearson's statistic times ``factor`` exceeds the level 1e-6."""
    statistic = factor * float((np.square(observed - expected) / expected).sum())
    return statistic > float(chi2.isf(1e-6, freedom))


def balanced(signs: Array) -> bool:
    ups, size = int((signs == 1).sum()), signs.size
    assert ups + int((signs == -1).sum()) == size
    return not deviates(np.array([ups, size - ups]), size / 2, 1)


N_MANY = 20_000


@pytest.mark.statistical
def test_frequencies_of_buckets_and_signs(global_random_seed: int) -> None:
    seed, r = global_random_seed, 12
    draw = make_sketch("countsketch", r, N_MANY, seed).arrays
    counts = np.bincount(draw["hash"], minlength=r)
    assert not deviates(counts, N_MANY / r, r - 1)
    assert balanced(draw["signs"])
    # Signs and rows are independent.
    joint = np.bincount(2 * draw["hash"] + (draw["signs"] == 1), minlength=2 * r)
    assert not deviates(joint, N_MANY / (2 * r), 2 * r - 1)
    # A negative control: buckets that skip one row.
    assert deviates(np.bincount(draw["hash"] % (r - 1), minlength=r), N_MANY / r, r - 1)


def dependence(rows: Array, signs: Array) -> float:
    """Return the largest correlation over draws of a row and a sign, in standard errors."""
    x, y = (np.asarray(z, np.float64).reshape(len(z), -1) for z in (rows, signs))
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    sizes = np.outer(np.linalg.norm(x, axis=0), np.linalg.norm(y, axis=0))
    return float(np.abs(x.T @ y / sizes).max()) * math.sqrt(len(x))


# Two rows a column, so that there is something to draw among eight.
SIGNED: list[tuple[str, dict[str, Any]]] = [
    ("countsketch", {}),
    ("sjlt", {"s": 2}),
    ("osnap", {"s": 2}),
    ("srht", {}),
    ("dct", {}),
]


# All kinds that draw two arrays.  A shuffle takes the low bits of a word and a sign the highest bit
# of a byte: only transforms of more than 128 rows, of which the last is taken, share a bit of it.
TWO_ARRAYS: list[tuple[str, int, dict[str, Any]]] = [
    ("countsketch", 8, {}),
    ("sjlt", 8, {"s": 2}),
    ("osnap", 8, {"s": 2}),
    ("srht", 256, {}),
    ("srht", 8, {"replace": True}),
    ("dct", 256, {}),
    ("dct", 8, {"replace": True}),
    ("less_uniform", 8, {"t": 2}),
    ("sparse", 8, {}),
]


def places_and_signs(
    kind: str, r: int, parameters: dict[str, Any], rng: np.random.Generator
) -> tuple[Array, Array]:
    """Return where entries are and their signs, a line for each of 500 draws."""
    n = 256 if r == 256 else 16
    draws = [make_sketch(kind, r, n, rng, **parameters).arrays for _ in range(500)]
    name = next(x for x in ("rows", "hash", "columns") if x in draws[0])
    # A sparse sketch has a random number of entries: as many as every draw has.
    sizes = {x: min(draw[x].size for draw in draws) for x in (name, "signs")}
    places, signs = (np.stack([draw[x].ravel()[: sizes[x]] for draw in draws]) for x in sizes)
    return places, signs


@pytest.mark.statistical
@pytest.mark.parametrize(("kind", "r", "parameters"), TWO_ARRAYS)
def test_signs_tell_nothing_about_rows(
    kind: str,
    r: int,
    parameters: dict[str, Any],
    global_random_seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All pairs of a place and a sign: generators of one seed give related numbers.

    65536 pairs at most, each correlation is normal with the standard error 1/sqrt(500): beyond 7
    for one of them has a chance of 2e-7.
    """
    rng = np.random.default_rng(global_random_seed)
    assert dependence(*places_and_signs(kind, r, parameters, rng)) < 7

    def one_seed(rng: np.random.Generator, count: int) -> list[np.random.Generator]:
        seed = int(rng.integers(2**63))
        return [np.random.default_rng(seed) for _ in range(count)]

    monkeypatch.setattr(sys.modules[sketches()[kind].__module__], "streams", one_seed)
    assert dependence(*places_and_signs(kind, r, parameters, rng)) > 10


@pytest.mark.parametrize(("kind", "parameters"), SIGNED)
def test_signs_do_not_depend_on_how_many_rows_were_drawn(
    kind: str, parameters: dict[str, Any]
) -> None:
    """Each array has a stream of its own, whatever is drawn beside it."""

    def signs(r: int, n: int) -> Array:
        return make_sketch(kind, r, n, 5, **parameters).arrays["signs"]

    few = signs(8, 16)
    assert np.array_equal(few, signs(8, 40)[:16])
    for other in (4, 16):
        assert np.array_equal(few, signs(other, 16))


@pytest.mark.statistical
def test_frequencies_of_distinct_rows(global_random_seed: int) -> None:
    seed, r, s = global_random_seed, 6, 3
    draw = make_sketch("sjlt", r, N_MANY, seed, s=s).arrays
    assert balanced(draw["signs"])
    # Each of the C(6, 3) = 20 sets of rows is as likely as any other.
    sets = (1 << draw["hash"].astype(np.int64)).sum(axis=1)
    values, counts = np.unique(sets, return_counts=True)
    assert len(values) == 20
    assert not deviates(counts, N_MANY / 20, 19)
    # The sign of an entry does not depend on its place in the set.
    assert all(balanced(draw["signs"][:, k]) for k in range(s))


@pytest.mark.statistical
def test_frequencies_of_one_row_a_block(global_random_seed: int) -> None:
    r, s = 12, 3
    draw = make_sketch("osnap", r, N_MANY, global_random_seed, s=s).arrays
    assert balanced(draw["signs"])
    patterns = draw["hash"] - 4 * np.arange(s)
    joint = np.bincount(patterns @ np.array([16, 4, 1]), minlength=64)
    assert not deviates(joint, N_MANY / 64, 63)


@pytest.mark.statistical
def test_frequencies_of_distinct_columns(global_random_seed: int) -> None:
    n, t = 9, 4
    draw = make_sketch("less_uniform", N_MANY, n, global_random_seed, t=t).arrays
    assert balanced(draw["signs"])
    _, counts = np.unique((1 << draw["columns"].astype(np.int64)).sum(axis=1), return_counts=True)
    assert len(counts) == math.comb(n, t)
    assert not deviates(counts, N_MANY / len(counts), len(counts) - 1)


@pytest.mark.statistical
@pytest.mark.parametrize("s", [1, 3, 25.0])
def test_frequencies_of_sparse_entries(s: float, global_random_seed: int) -> None:
    r, n = 200, 300
    sketch = make_sketch("sparse", r, n, global_random_seed, s=s)
    entries = np.rint(sketch.to_dense() / sketch.isometry_scale)
    counts = np.array([(entries == x).sum() for x in (1, -1, 0)])
    law = np.array([0.5 / s, 0.5 / s, 1 - 1 / s])
    assert counts.sum() == r * n
    possible = law > 0
    assert counts[~possible].sum() == 0
    assert not deviates(counts[possible], r * n * law[possible], int(possible.sum()) - 1)
    if s > 1:
        # Neighbours are independent: the four patterns of pairs have the product law.
        pairs = 2 * (entries[:, 0::2] != 0) + (entries[:, 1::2] != 0)
        p = 1 / s
        expected = pairs.size * np.array([(1 - p) ** 2, p * (1 - p), p * (1 - p), p * p])
        assert not deviates(np.bincount(pairs.astype(int).ravel(), minlength=4), expected, 3)


@pytest.mark.statistical
@pytest.mark.parametrize("kind", ["srht", "dct"])
def test_frequencies_of_rows_of_transforms(kind: str, global_random_seed: int) -> None:
    rng = np.random.default_rng(global_random_seed)
    n, r, draws = 8, 2, 3000
    drawn_arrays = [make_sketch(kind, r, n, rng).arrays for _ in range(draws)]
    pairs = np.array([x["rows"] for x in drawn_arrays])
    joint = np.bincount(pairs @ np.array([n, 1]), minlength=n * n).reshape(n, n)
    assert np.trace(joint) == 0
    off = joint[~np.eye(n, dtype=bool)]
    assert not deviates(off, draws / len(off), len(off) - 1)
    assert balanced(np.array([x["signs"] for x in drawn_arrays]))
    rows = make_sketch(kind, N_MANY, n, rng, replace=True).arrays["rows"]
    assert not deviates(np.bincount(rows, minlength=n), N_MANY / n, n - 1)


@pytest.mark.statistical
def test_laws_of_dense_entries(global_random_seed: int) -> None:
    from scipy.stats import kstest

    seed, shape = global_random_seed, (40, 500)
    for kind, law in (("gaussian", "norm"), ("uniform", "uniform")):
        entries = make_sketch(kind, *shape, seed).arrays["sketch"].ravel()
        entries = entries if kind == "gaussian" else (entries + 1) / 2
        assert kstest(entries, law).pvalue > 1e-6
        assert kstest(1.1 * entries, law).pvalue < 1e-6
    assert balanced(make_sketch("rademacher", *shape, seed).arrays["sketch"])


@pytest.mark.statistical
def test_haar_rows_have_the_law_of_a_sphere(global_random_seed: int) -> None:
    # A row of a Haar matrix of order 3 is uniform on the sphere: each entry is uniform on
    # [-1, 1] (Archimedes).  A QR factor without the sign fix has entries of one sign first.
    from scipy.stats import kstest

    rng = np.random.default_rng(global_random_seed)
    matrices = np.array([make_sketch("haar", 3, 3, rng).arrays["sketch"] for _ in range(1500)])
    for i, j in itertools.product(range(3), range(3)):
        assert kstest((matrices[:, i, j] + 1) / 2, "uniform").pvalue > 1e-6
    unfixed = np.array([np.linalg.qr(rng.standard_normal((3, 3)))[0] for _ in range(1500)])
    assert kstest((unfixed[:, 0, 0] + 1) / 2, "uniform").pvalue < 1e-6


# --- structure ----------------------------------------------------------------------------------


@pytest.mark.interpreted
@pytest.mark.parametrize("kind", KINDS)
def test_dense_form_is_the_definition(kind: str) -> None:
    for r, n in ((4, 8), (4, 5), (1, 1), (12, 13)):
        parameters: dict[str, Any] = {}
        if kind == "sparse":
            parameters["s"] = 2.5
        if kind in ("sjlt", "osnap"):
            parameters["s"] = 2 if r > 1 else 1
        if kind == "less_uniform":
            parameters["t"] = min(3, n)
        sketch = make_sketch(kind, r, n, rng=3, **parameters)
        expected = naive_sketch(kind, r, n, sketch.arrays, **parameters)
        np.testing.assert_allclose(sketch.to_dense(), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.interpreted
def test_columns_of_hashed_sketches() -> None:
    r, n, s = 12, 50, 4
    one = make_sketch("countsketch", r, n, rng=0).to_dense()
    assert ((one != 0).sum(axis=0) == 1).all()
    assert (np.abs(one).sum(axis=0) == 1).all()
    for kind in ("sjlt", "osnap"):
        dense = make_sketch(kind, r, n, rng=0, s=s).to_dense()
        assert ((dense != 0).sum(axis=0) == s).all()
        assert (np.abs(dense[dense != 0]) == 1 / math.sqrt(s)).all()
        if kind == "osnap":
            assert ((dense.reshape(s, r // s, n) != 0).sum(axis=1) == 1).all()
    rows = make_sketch("less_uniform", r, n, rng=0, t=s).to_dense()
    assert ((rows != 0).sum(axis=1) == s).all()


@pytest.mark.parametrize("kind", ORTHOGONAL)
@pytest.mark.parametrize("n", [64, 48])
def test_rows_of_transforms_are_orthogonal(kind: str, n: int) -> None:
    # S has rows of squared norm N / r; a padded transform is orthogonal before its columns are cut.
    if kind == "srht" and n == 48:
        dense = make_sketch(kind, 16, 64, rng=1).to_dense()
        cut = make_sketch(kind, 16, 48, rng=1)
        assert cut.isometry_scale == math.sqrt(64 / 16)
        order = cut.arrays["rows"]
        np.testing.assert_array_equal(order, make_sketch(kind, 16, 64, rng=1).arrays["rows"])
        np.testing.assert_allclose(dense @ dense.T, 4 * np.eye(16), rtol=0, atol=1e-12)
        return
    dense = make_sketch(kind, 16, n, rng=1).to_dense()
    np.testing.assert_allclose(dense @ dense.T, n / 16 * np.eye(16), rtol=0, atol=1e-12)


@pytest.mark.interpreted
@pytest.mark.parametrize("kind", ORTHOGONAL)
def test_as_many_rows_as_columns_are_exact(kind: str) -> None:
    sketch = make_sketch(kind, 64, 64, rng=0)
    product = sketch.apply(A64.T).T @ sketch.apply(V64)
    np.testing.assert_allclose(product, A64 @ V64, rtol=0, atol=1e-12)


def test_a_padded_transform_is_exact_at_its_own_order() -> None:
    a, v = reference_instance(48)
    for r, exact in ((48, False), (63, False), (64, True)):
        sketch = make_sketch("srht", r, 48, rng=0)
        error = np.abs(sketch.apply(a.T).T @ sketch.apply(v) - a @ v).max()
        assert (error < 1e-12) == exact
        assert exact or error > 1e-6


def test_transforms_are_those_of_scipy() -> None:
    from scipy.fft import dct
    from scipy.linalg import hadamard

    np.testing.assert_array_equal(naive_hadamard(16), hadamard(16))
    np.testing.assert_allclose(
        naive_cosines(12), dct(np.eye(12), axis=0, norm="ortho"), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize(
    ("kind", "scale", "parameters"),
    [
        ("gaussian", 1 / 4, {}),
        ("rademacher", 1 / 4, {}),
        ("uniform", math.sqrt(3 / 16), {}),
        ("sparse", math.sqrt(3 / 16), {}),
        ("sparse", math.sqrt(7 / 16), {"s": "sqrt"}),
        ("countsketch", 1.0, {}),
        ("sjlt", math.sqrt(1 / 8), {}),
        ("osnap", 1 / 2, {"s": 4}),
        ("less_uniform", math.sqrt(49 / (5 * 16)), {"t": 5}),
        ("srht", 2.0, {}),
        ("dct", 7 / 4, {}),
        ("haar", 7 / 4, {}),
    ],
)
def test_isometry_scales(kind: str, scale: float, parameters: dict[str, Any]) -> None:
    sketch = make_sketch(kind, 16, 49, rng=0, **parameters)
    assert sketch.isometry_scale == pytest.approx(scale, rel=1e-15)


def test_default_parameters_are_resolved() -> None:
    def of(kind: str, r: int, n: int, **parameters: Any) -> dict[str, Any]:
        return make_sketch(kind, r, n, rng=0, **parameters).parameters

    assert of("sparse", 4, 9) == {"s": 3.0}
    assert of("sparse", 4, 9, s="sqrt") == {"s": 3.0}
    assert (of("sjlt", 20, 9), of("sjlt", 5, 9)) == ({"s": 8}, {"s": 5})
    assert (of("osnap", 16, 9), of("osnap", 15, 9), of("osnap", 11, 9)) == (
        {"s": 8},
        {"s": 5},
        {"s": 1},
    )
    assert (of("less_uniform", 2, 20), of("less_uniform", 2, 5)) == ({"t": 8}, {"t": 5})
    assert of("srht", 2, 5) == of("dct", 2, 5) == {"replace": False}
    assert of("gaussian", 2, 5) == {}


# --- products -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A sketch, and why its sizes are interesting."""

    kind: str
    r: int
    n: int
    m: int
    parameters: dict[str, Any] = field(default_factory=dict)

    def make(self, dtype: Any = np.float64, seed: int = 5) -> Sketch:
        return make_sketch(self.kind, self.r, self.n, seed, dtype=dtype, **self.parameters)


def case(kind: str, r: int, n: int, m: int, reason: str = "", **parameters: Any) -> Any:
    label = f"{kind}-{r}x{n}x{m}" + (f" {reason}" if reason else "")
    return pytest.param(Case(kind, r, n, m, parameters), id=label)


PRODUCTS = [
    *(case(kind, 1, 1, 1, "smallest") for kind in KINDS),
    *(case(kind, 6, 40, 3) for kind in KINDS),
    *(case(kind, 24, 700, 70, "several tiles and threads") for kind in KINDS),
    *(case(kind, 12, 8, 2, "more rows than columns", s=2) for kind in ("sjlt", "osnap")),
    *(
        case(kind, 12, 8, 2, "more rows than columns")
        for kind in ("gaussian", "sparse", "countsketch", "less_uniform")
    ),
    case("srht", 5, 1025, 3, "one row beyond a power of two"),
    case("srht", 3, 9000, 9, "many blocks, the last cut"),
    case("srht", 4, 33000, 2, "the padding is longer than a chunk"),
    case("srht", 2000, 4000, 20, "few blocks, narrow tiles"),
    case("srht", 4096, 4096, 17, "one block"),
    case("srht", 64, 40, 3, "as many rows as the padded order"),
    case("srht", 50, 16, 3, "repeated rows", replace=True),
    case("dct", 50, 16, 3, "repeated rows", replace=True),
    case("countsketch", 3, 40000, 1, "several parts of a vector"),
    case("countsketch", 3000, 4000, 40, "more buckets than a cache holds"),
    case("sjlt", 64, 3000, 33, "all rows", s=64),
    case("sparse", 40, 5000, 60, "several blocks of columns", s=2),
    case("sparse", 30, 5000, 1, "a vector", s=2),
    case("sparse", 5, 3, 4, "empty rows", s=1e6),
    case("less_uniform", 300, 2000, 9, "all columns", t=2000),
    case("gaussian", 300, 5000, 4, "several pieces"),
]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("case", PRODUCTS)
def test_products_are_those_of_the_dense_form(case: Case, dtype: Any) -> None:
    sketch = case.make(dtype)
    rng = np.random.default_rng(0)
    dense = sketch.to_dense().astype(np.float64)
    exact = case.make(np.float64).to_dense()
    for apply, matrix, true in (
        (sketch.apply, dense, exact),
        (sketch.apply_transpose, dense.T, exact.T),
    ):
        x = rng.standard_normal((matrix.shape[1], case.m)).astype(dtype)
        actual = apply(x)
        assert (actual.dtype, actual.shape) == (np.dtype(dtype), (len(matrix), case.m))
        # |fl(S x) - S x| <= g |S| |x| for any order of the sums, g = k u, k = n or r terms; a
        # transform adds in log2 n stages, but on sums that cancel, so it gets the whole |S| |x|
        # of a row: k >= 20 covers its stages, its scale and the rounding of the dense form.
        u = float(np.finfo(dtype).eps) / 2
        k = max(20, min(matrix.shape[1], 5000))
        size = np.abs(true) @ np.abs(x.astype(np.float64))
        if case.kind == "dct":  # mixes all entries of a column: their norm bounds each
            size = np.maximum(size, np.linalg.norm(true, axis=1).max() * np.linalg.norm(x, axis=0))
        assert (np.abs(actual - true @ x) <= k * u * size).all()
        if dtype == np.float64:
            scale = np.abs(matrix).max() * np.linalg.norm(x) + 1e-300
            assert np.abs(actual - matrix @ x).max() <= 1e-12 * scale


@pytest.mark.interpreted
@pytest.mark.parametrize("kind", KINDS)
def test_small_products_are_those_of_the_loops(kind: str) -> None:
    rng = np.random.default_rng(1)
    for r, n in ((1, 1), (3, 7), (4, 11)):
        sketch = make_sketch(kind, r, n, rng=2)
        numbers = {k: v for k, v in sketch.parameters.items() if k in "st"}
        dense = naive_sketch(kind, r, n, sketch.arrays, **numbers)
        for m in (1, 2, 5):
            x, y = rng.standard_normal((n, m)), rng.standard_normal((r, m))
            np.testing.assert_allclose(sketch.apply(x), dense @ x, rtol=0, atol=1e-13)
            np.testing.assert_allclose(sketch.apply_transpose(y), dense.T @ y, rtol=0, atol=1e-13)


@pytest.mark.parametrize("broken", ["scale", "sign", "row", "transposed index"])
def test_the_comparison_with_the_dense_form_reports_errors(broken: str) -> None:
    sketch = make_sketch("srht", 6, 40, rng=0)
    arrays = dict(sketch.arrays)
    scale = 1.0
    if broken == "scale":
        scale = 1.1
    elif broken == "sign":
        arrays["signs"] = np.append(-arrays["signs"][:1], arrays["signs"][1:])
    elif broken == "row":
        arrays["rows"] = np.append(arrays["rows"][1:], arrays["rows"][:1])
    else:
        arrays["rows"] = arrays["rows"][::-1]
    other = sketches()["srht"].from_arrays(arrays, (6, 40))
    x = np.random.default_rng(0).standard_normal((40, 3))
    assert np.abs(scale * other.apply(x) - sketch.to_dense() @ x).max() > 1e-2


@pytest.mark.interpreted
@pytest.mark.parametrize("kind", KINDS)
def test_the_transpose_is_the_adjoint(kind: str) -> None:
    rng = np.random.default_rng(4)
    for r, n in ((4, 24), (16, 33)):
        sketch = make_sketch(kind, r, n, rng=0)
        x, y = rng.standard_normal((n, 3)), rng.standard_normal((r, 3))
        left, right = sketch.apply(x).T @ y, x.T @ sketch.apply_transpose(y)
        scale = np.linalg.norm(sketch.to_dense()) * np.linalg.norm(x) * np.linalg.norm(y)
        assert np.abs(left - right).max() <= 1e-14 * scale


@pytest.mark.parametrize("kind", KINDS)
def test_a_sketch_is_a_linear_operator(kind: str) -> None:
    sketch = make_sketch(kind, 6, 20, rng=0)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((20, 3)), rng.standard_normal((6, 3))
    assert isinstance(sketch, LinearOperator)
    np.testing.assert_array_equal(sketch @ x, sketch.apply(x))
    np.testing.assert_array_equal(sketch.T @ y, sketch.apply_transpose(y))
    np.testing.assert_array_equal(sketch.H @ y, sketch.apply_transpose(y))
    np.testing.assert_array_equal(sketch @ x[:, 0], sketch.apply(x[:, 0]))
    np.testing.assert_array_equal(sketch.T @ y[:, 0], sketch.apply_transpose(y[:, 0]))
    np.testing.assert_array_equal(sketch.matvec(x[:, :1]), sketch.apply(x[:, :1]))
    np.testing.assert_array_equal(sketch.rmatmat(y), sketch.apply_transpose(y))
    np.testing.assert_allclose((sketch.T @ sketch) @ x, sketch.T @ (sketch @ x), rtol=1e-14)
    np.testing.assert_allclose(sketch @ np.eye(20), sketch.to_dense(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_layouts_of_operands(kind: str) -> None:
    sketch = make_sketch(kind, 6, 20, rng=0)
    x = np.random.default_rng(0).standard_normal((20, 6))
    expected = sketch.apply(x)
    kept = x.copy()
    read_only = x.copy()
    read_only.flags.writeable = False
    for given in (np.asfortranarray(x), read_only, x.tolist(), np.repeat(x, 2, axis=1)[:, ::2]):
        np.testing.assert_array_equal(sketch.apply(given), expected)
    np.testing.assert_array_equal(x, kept)
    vector = sketch.apply(x[:, 2])
    assert vector.shape == (6,)
    np.testing.assert_allclose(vector, expected[:, 2], rtol=1e-13, atol=1e-14)
    assert sketch.apply_transpose(np.ones(6)).shape == (20,)
    assert sketch.apply(np.empty((20, 0))).shape == (6, 0)
    assert sketch.apply_transpose(np.empty((6, 0))).shape == (20, 0)
    whole = np.arange(20)
    np.testing.assert_array_equal(sketch.apply(whole), sketch.apply(whole.astype(float)))
    assert not np.shares_memory(sketch.apply(x), x)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_one_column(kind: str) -> None:
    zero = make_sketch(kind, 3, 9, rng=0).apply(np.zeros((9, 2)))
    assert not zero.any()
    single = make_sketch(kind, 1, 1, rng=0)
    if kind not in ("gaussian", "uniform", "sparse"):
        assert abs(float(single.apply(np.ones(1))[0])) == pytest.approx(1.0, rel=1e-15)
    many = make_sketch(kind, 1, 9, rng=0)
    assert np.isfinite(many.apply(np.ones((9, 1)))).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_stays_in_its_column(kind: str) -> None:
    sketch = make_sketch(kind, 5, 12, rng=0)
    x = np.random.default_rng(0).standard_normal((12, 3))
    clean = sketch.apply(x)
    x[:, 1] = np.nan
    dirty = sketch.apply(x)
    np.testing.assert_array_equal(dirty[:, [0, 2]], clean[:, [0, 2]])
    touched = (sketch.to_dense() != 0).any(axis=1)
    assert np.isnan(dirty[touched, 1]).all()


@pytest.mark.interpreted
def test_the_transform_in_place_of_every_size() -> None:
    rng = np.random.default_rng(0)
    for power in range(8):
        for width in (1, 3, 64):
            x = rng.standard_normal((2**power, width))
            data = x.ravel().copy()
            sketching._transform(data, 2**power, width)
            expected = naive_hadamard(2**power) @ x
            np.testing.assert_allclose(data.reshape(x.shape), expected, rtol=0, atol=1e-12)


# --- bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_gives_one_sketch(kind: str) -> None:
    first, again = (make_sketch(kind, 8, 40, rng=7) for _ in range(2))
    other = make_sketch(kind, 8, 40, rng=8)
    assert first.arrays.keys() == again.arrays.keys()
    for name, x in first.arrays.items():
        np.testing.assert_array_equal(x, again.arrays[name])
    assert not np.array_equal(first.to_dense(), other.to_dense())
    generator = np.random.default_rng(7)
    np.testing.assert_array_equal(make_sketch(kind, 8, 40, generator).to_dense(), first.to_dense())
    assert not np.array_equal(make_sketch(kind, 8, 40, generator).to_dense(), first.to_dense())
    assert make_sketch(kind, 8, 40).shape == (8, 40)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_the_same_draw_rounded_once(kind: str) -> None:
    wide, narrow = (make_sketch(kind, 8, 40, rng=7, dtype=t) for t in (np.float64, np.float32))
    assert (str(wide.dtype), str(narrow.dtype)) == ("float64", "float32")
    assert narrow.to_dense().dtype == np.float32
    for name, x in wide.arrays.items():
        kept = narrow.arrays[name]
        assert kept.dtype == (np.float32 if x.dtype == np.float64 else x.dtype)
        np.testing.assert_array_equal(kept, x.astype(kept.dtype))
    np.testing.assert_allclose(narrow.to_dense(), wide.to_dense(), rtol=3e-7, atol=1e-7)


def unscaled(sketch: Sketch) -> Array:
    return sketch.to_dense() / sketch.isometry_scale


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in HASHED])
def test_nested_draws_are_the_first_rows(kind: str) -> None:
    sketch = make_sketch(kind, 12, 40, rng=0)
    for r1 in (1, 5, 12):
        small = sketch.nested(r1)
        assert (small.shape, small.kind) == ((r1, 40), kind)
        assert small.parameters == sketch.parameters
        expected = sketch.to_dense()[:r1] * math.sqrt(12 / r1)
        np.testing.assert_allclose(small.to_dense(), expected, rtol=1e-14, atol=1e-15)
        x = np.arange(40.0)
        np.testing.assert_allclose(small.apply(x), expected @ x, rtol=1e-12, atol=1e-12)
        y = np.arange(float(r1))
        np.testing.assert_allclose(small.apply_transpose(y), expected.T @ y, rtol=1e-12, atol=1e-12)
    assert sketch.nested(12) is sketch


@pytest.mark.parametrize("kind", EXTENDED)
def test_larger_draws_extend_smaller_ones(kind: str) -> None:
    large = make_sketch(kind, 12, 50, rng=3)
    small = make_sketch(kind, 5, 50, rng=3)
    np.testing.assert_array_equal(
        small.to_dense(), large.nested(5).to_dense(), err_msg="same seed, fewer rows"
    )


def test_a_larger_haar_draw_extends_a_smaller_one_up_to_rounding() -> None:
    large, small = (make_sketch("haar", r, 50, rng=3) for r in (12, 5))
    np.testing.assert_allclose(
        small.arrays["sketch"], large.arrays["sketch"][:5], rtol=0, atol=1e-13
    )


def test_draws_longer_than_a_batch_extend_shorter_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sketchattn.sketches.sparse._BATCH", 7)
    monkeypatch.setattr("sketchattn.sketches.sparse._MARKED_BYTES", 100)
    monkeypatch.setattr("sketchattn.sketches.dense._DRAWN_BYTES", 1000)
    for kind in ("gaussian", "rademacher", "sparse", "less_uniform"):
        large, small = (make_sketch(kind, r, 50, rng=3) for r in (12, 5))
        np.testing.assert_array_equal(unscaled(small), unscaled(large.nested(5)))
        assert large.to_dense().any(axis=1).all()


def test_nested_buckets() -> None:
    sketch = make_sketch("countsketch", 12, 40, rng=0)
    for r1 in (1, 2, 3, 4, 6):
        small = sketch.nested(r1)
        np.testing.assert_array_equal(small.arrays["hash"], sketch.arrays["hash"] % r1)
        folded = sketch.to_dense().reshape(12 // r1, r1, 40).sum(axis=0)
        np.testing.assert_array_equal(small.to_dense(), folded)


@pytest.mark.statistical
@pytest.mark.parametrize("kind", ["gaussian", "srht", "countsketch"])
def test_nested_draws_keep_the_law(kind: str, global_random_seed: int) -> None:
    rng = np.random.default_rng(global_random_seed)
    draws = (make_sketch(kind, 64, 64, rng).nested(R).to_dense() for _ in range(1000))
    expected = next(m for k, p, m in MOMENTS if k == kind and not p)
    assert alarms(draws, A64, V64, expected) == []


INVARIANCE = """
import numpy as np
from sketchattn.kernels._threads import limit_threads, thread_count
from sketchattn.sketches import make_sketch, sketches

rng = np.random.default_rng(0)
r, n, m = 64, 20000, 70
x, y = rng.standard_normal((n, m)), rng.standard_normal((r, m))

def results(threads, dtype):
    with limit_threads(threads):
        assert thread_count() == threads
        for kind in sketches():
            sketch = make_sketch(kind, r, n, 5, dtype=dtype)
            yield from sketch.arrays.values()
            yield sketch.apply(x)
            yield sketch.apply(x[:, 0])
            yield sketch.apply_transpose(y)
            yield sketch.apply_transpose(y[:, 0])

for dtype in (np.float32, np.float64):
    one = list(results(1, dtype))
    assert len(one) > 50
    for threads in (2, 3, 4):
        for a, b in zip(one, results(threads, dtype), strict=True):
            assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), (dtype, threads)
"""


@pytest.mark.threads
@pytest.mark.slow
def test_bits_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INVARIANCE],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT.parent), "NUMBA_NUM_THREADS": "4"},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.threads
@pytest.mark.parametrize("kind", ["gaussian", "countsketch", "sparse", "srht", "dct"])
def test_calls_from_several_threads_agree(kind: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    sketch = make_sketch(kind, 16, 3000, rng=0)
    x, y = np.ones((3000, 40)), np.ones((16, 40))

    def both(_: int) -> bytes:
        return sketch.apply(x).tobytes() + sketch.apply_transpose(y).tobytes()

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(both, range(12)))) == 1


@pytest.mark.threads
def test_small_work_is_done_on_one_thread_with_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sketch_list = [make_sketch(kind, 16, 900, rng=0) for kind in KINDS]
    x, y = np.ones((900, 30)), np.ones((16, 30))
    bits = []
    for pays in (1, 1 << 40):
        monkeypatch.setattr(_threads, "PAYS", pays)
        bits.append([s.apply(x).tobytes() + s.apply_transpose(y).tobytes() for s in sketch_list])
    assert bits[0] == bits[1]


# --- objects ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_sketches_are_immutable(kind: str) -> None:
    sketch = make_sketch(kind, 4, 12, rng=0)
    with pytest.raises(
        AttributeError, match="^shape of a sketch cannot be changed; draw another sketch$"
    ):
        sketch.shape = (1, 1)  # type: ignore[misc]  # what must not be done
    with pytest.raises(AttributeError, match="^dtype of a sketch cannot be deleted$"):
        del sketch.dtype
    for x in sketch.arrays.values():
        assert not x.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            x[...] = 0
    sketch.parameters["s"] = 99
    sketch.arrays.clear()
    assert sketch.parameters.get("s") != 99
    assert sketch.nbytes == sum(x.nbytes for x in sketch.arrays.values()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_sketches_survive_pickling_and_saving(kind: str, tmp_path: Path) -> None:
    for dtype in (np.float32, np.float64):
        sketch = make_sketch(kind, 4, 12, rng=0, dtype=dtype)
        x = np.arange(24.0).reshape(12, 2)
        sketch.apply_transpose(np.ones(4))
        copy = pickle.loads(pickle.dumps(sketch))
        np.testing.assert_array_equal(copy.apply(x), sketch.apply(x))
        path = tmp_path / f"{kind}.safetensors"
        Draw(sketch.arrays).save(path)
        loaded = type(sketch).from_arrays(
            Draw.load(path), sketch.shape, dtype=dtype, **sketch.parameters
        )
        assert (loaded.dtype, repr(loaded)) == (sketch.dtype, repr(sketch))
        np.testing.assert_array_equal(loaded.apply(x), sketch.apply(x))
        np.testing.assert_array_equal(loaded.to_dense(), sketch.to_dense())


def test_given_arrays_are_copied() -> None:
    matrix = np.ones((2, 3))
    sketch = sketches()["gaussian"].from_arrays({"sketch": matrix}, (2, 3))
    given = check_sketch(matrix, 3)
    matrix[0] = 7.0
    for kept in (sketch, given):
        assert (kept.arrays["sketch"] == 1).all()


def test_repr() -> None:
    assert repr(make_sketch("srht", 2, 5, rng=0, dtype=np.float32)) == (
        "<sketch 'srht', r=2, n=5, dtype=float32, replace=False>"
    )


# --- sketches that a user gives -----------------------------------------------------------------


def test_given_sketches() -> None:
    rng = np.random.default_rng(0)
    matrix, x, y = rng.standard_normal((4, 9)), rng.standard_normal((9, 2)), np.ones((4, 2))
    own = make_sketch("srht", 4, 9, rng=0)
    assert check_sketch(own, 9) is own
    for given in (
        matrix,
        matrix.tolist(),
        aslinearoperator(matrix),
        aslinearoperator(csr_array(matrix)),
    ):
        sketch = check_sketch(given, 9)
        assert isinstance(sketch, GivenSketch)
        assert (sketch.kind, sketch.shape, sketch.isometry_scale) == ("given", (4, 9), 1.0)
        np.testing.assert_allclose(sketch.apply(x), matrix @ x, rtol=1e-13)
        np.testing.assert_allclose(sketch.apply_transpose(y), matrix.T @ y, rtol=1e-13)
        np.testing.assert_array_equal(sketch.to_dense(), matrix)
        np.testing.assert_array_equal(sketch.arrays["sketch"], matrix)
        assert sketch.nested(4) is sketch
        with pytest.raises(ValueError, match="^r1 must equal r = 4 for a given matrix"):
            sketch.nested(2)
    assert check_sketch(matrix.astype(np.float32), 9).dtype == np.float32
    assert check_sketch(aslinearoperator(matrix.astype(np.float32)), 9).dtype == np.float32
    assert "given" not in sketches()


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (
            np.ones((4, 8)),
            ValueError,
            "sketch must have shape (r, n) with r >= 1 and n = 9, got (4, 8); give one column for "
            "each entry that is sketched",
        ),
        (
            np.ones((0, 9)),
            ValueError,
            "sketch must have shape (r, n) with r >= 1 and n = 9, got (0, 9); give one column for "
            "each entry that is sketched",
        ),
        (
            make_sketch("srht", 4, 8, rng=0),
            ValueError,
            "sketch must have shape (r, n) with r >= 1 and n = 9, got (4, 8); give one column for "
            "each entry that is sketched",
        ),
        (
            np.ones(9),
            ValueError,
            "sketch must have two axes (r, n), got shape (9,); give one matrix",
        ),
        (
            np.full((2, 9), np.nan),
            ValueError,
            "sketch must be finite, got nan at index (0, 0); replace it, or hide its key with a "
            "mask",
        ),
        (
            csr_array(np.eye(9)),
            TypeError,
            "sketch must be a sketch, a linear operator or a dense array, got csr_array; wrap it "
            "with scipy.sparse.linalg.aslinearoperator",
        ),
        (
            aslinearoperator(np.ones((4, 9), complex)),
            TypeError,
            "sketch must be float32 or float64, got complex128; give its operator that dtype",
        ),
        (
            np.ones((4, 9), int),
            TypeError,
            "sketch must be float16, bfloat16, float32 or float64, got int64; convert it with "
            "astype(np.float32)",
        ),
    ],
)
def test_given_sketches_that_are_refused(given: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        check_sketch(given, 9)


# --- errors -------------------------------------------------------------------------------------

GAUSSIAN = sketches()["gaussian"]
GENERAL: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((3, 4, 8), {}, TypeError, "kind must be a name, got int; see sketchattn.sketches.sketches()"),
    (
        ("shrt", 4, 8),
        {},
        ValueError,
        "kind must be a known sketch, got 'shrt'; did you mean 'srht'?",
    ),
    (
        ("gaussian", 0, 8),
        {},
        ValueError,
        "r must be at least 1, got 0; ask for one row or more",
    ),
    (
        ("gaussian", 4, 0),
        {},
        ValueError,
        "n must be at least 1, got 0; sketch vectors of one entry or more",
    ),
    (
        ("gaussian", 4.0, 8),
        {},
        TypeError,
        "r must be an integer, got float; give one of at least 1",
    ),
    (
        ("gaussian", True, 8),
        {},
        TypeError,
        "r must be an integer, got bool; give one of at least 1",
    ),
    (
        ("gaussian", 4, 8),
        {"dtype": np.float16},
        TypeError,
        "dtype must be float32 or float64, got float16; use one of these",
    ),
    (
        ("gaussian", 4, 8),
        {"s": 2},
        TypeError,
        "s must be a parameter of kind 'gaussian'; it takes no parameters",
    ),
    (
        ("srht", 4, 8),
        {"replaced": True},
        TypeError,
        "replaced must be a parameter of kind 'srht'; did you mean 'replace'?",
    ),
    (
        ("srht", 65, 48),
        {},
        ValueError,
        "r must be between 1 and the 64 rows of the transform (n = 48 padded to a power of two) "
        "for kind 'srht' with distinct rows, got 65; lower r or pass replace=True",
    ),
    (
        ("dct", 9, 8),
        {},
        ValueError,
        "r must be between 1 and the 8 rows of the transform for kind 'dct' with distinct rows, "
        "got 9; lower r or pass replace=True",
    ),
    (
        ("dct", 4, 8),
        {"replace": 1},
        TypeError,
        "replace must be a bool, got int; False draws distinct rows",
    ),
    (
        ("haar", 9, 8),
        {},
        ValueError,
        "r must be between 1 and n = 8 for kind 'haar', whose rows are orthogonal, got 9; lower r "
        "or use kind 'gaussian'",
    ),
    (
        ("sparse", 4, 8),
        {"s": 0.5},
        ValueError,
        "s must be at least 1 and finite, got 0.5; an entry is nonzero with probability 1/s",
    ),
    (
        ("sparse", 4, 8),
        {"s": math.nan},
        ValueError,
        "s must be at least 1 and finite, got nan; an entry is nonzero with probability 1/s",
    ),
    (
        ("sparse", 4, 8),
        {"s": "log"},
        ValueError,
        "s must be a number or 'sqrt', got 'log'; 'sqrt' is sqrt(n)",
    ),
    (
        ("sparse", 4, 8),
        {"s": None},
        TypeError,
        "s must be a number or 'sqrt', got NoneType; use s=3",
    ),
    (
        ("sjlt", 4, 8),
        {"s": 5},
        ValueError,
        "s must be between 1 and r = 4, got 5; a column has s distinct rows",
    ),
    (
        ("osnap", 4, 8),
        {"s": 5},
        ValueError,
        "s must be between 1 and r = 4, got 5; a column has one entry in each of s blocks",
    ),
    (
        ("osnap", 4, 8),
        {"s": 3},
        ValueError,
        "s must divide r = 4, got 3; the rows are cut in s equal blocks: choose a divisor, or "
        "kind 'sjlt'",
    ),
    (
        ("less_uniform", 4, 8),
        {"t": 9},
        ValueError,
        "t must be between 1 and n = 8, got 9; a row has t distinct columns",
    ),
    (
        ("less_uniform", 4, 8),
        {"t": 2.0},
        TypeError,
        "t must be an integer, got float; give one of at least 1",
    ),
    (
        ("gaussian", 4, 8, -1),
        {},
        ValueError,
        "rng must be at least 0, got -1; give a non-negative seed",
    ),
]


@pytest.mark.parametrize(("arguments", "options", "error", "text"), GENERAL)
def test_arguments_that_are_refused(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        make_sketch(*arguments, **options)


def test_limits_are_accepted() -> None:
    assert make_sketch("srht", 64, 48, rng=0).shape == (64, 48)
    assert make_sketch("srht", 65, 48, rng=0, replace=True).shape == (65, 48)
    assert make_sketch("dct", 8, 8, rng=0).shape == (8, 8)
    assert make_sketch("haar", 8, 8, rng=0).shape == (8, 8)
    assert make_sketch("sjlt", 4, 8, rng=0, s=4).shape == (4, 8)
    assert make_sketch("less_uniform", 4, 8, rng=0, t=8).shape == (4, 8)
    assert make_sketch("sparse", 4, 8, rng=0, s=1).arrays["columns"].size == 32
    assert make_sketch("sparse", 4, 8, rng=0, s=1e300).shape == (4, 8)
    numbers: list[Any] = [np.int64(3), np.int32(5), np.uint8(1)]
    assert make_sketch("gaussian", *numbers).shape == (3, 5)


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        (
            np.ones((7, 2)),
            ValueError,
            "x must have shape (n,) or (n, m) with n = 8, got (7, 2); sketches act on the first "
            "axis",
        ),
        (
            np.ones((8, 2, 1)),
            ValueError,
            "x must have shape (n,) or (n, m) with n = 8, got (8, 2, 1); sketches act on the "
            "first axis",
        ),
        (
            np.float64(3.0),
            ValueError,
            "x must have shape (n,) or (n, m) with n = 8, got (); sketches act on the first axis",
        ),
        (
            np.ones(8, complex),
            TypeError,
            "x must hold real numbers, got complex128; convert it to float64",
        ),
    ],
)
def test_operands_that_are_refused(x: Any, error: type[Exception], text: str) -> None:
    sketch = make_sketch("gaussian", 4, 8, rng=0)
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        sketch.apply(x)


def test_the_transpose_names_its_own_argument() -> None:
    text = "y must have shape (r,) or (r, m) with r = 4, got (8,); sketches act on the first axis"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        make_sketch("gaussian", 4, 8, rng=0).apply_transpose(np.ones(8))


@pytest.mark.parametrize(
    ("kind", "r1", "text"),
    [
        ("gaussian", 0, "r1 must be between 1 and r = 8, got 0; draw a sketch with more rows"),
        ("gaussian", 9, "r1 must be between 1 and r = 8, got 9; draw a sketch with more rows"),
        (
            "countsketch",
            3,
            "r1 must divide r = 8 for kind 'countsketch', whose bucket h becomes h mod r1, got 3; "
            "choose a divisor, or draw a sketch with a multiple of r1 rows",
        ),
        (
            "sjlt",
            4,
            "r1 must equal r = 8 for kind 'sjlt', since fewer rows hold a random number of the 8 "
            "entries of a column, got 4; draw a sketch with r = 4",
        ),
        (
            "osnap",
            4,
            "r1 must equal r = 8 for kind 'osnap', since fewer rows hold a random number of the 8 "
            "entries of a column, got 4; draw a sketch with r = 4",
        ),
    ],
)
def test_nested_draws_that_are_refused(kind: str, r1: int, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        make_sketch(kind, 8, 20, rng=0).nested(r1)


FOREIGN: list[tuple[str, dict[str, Any], dict[str, Any], type[Exception], str]] = [
    ("gaussian", {"sketch": np.ones((2, 3))}, {}, ValueError,
     "sketch must have shape (r, n) = (2, 4), got (2, 3)"),
    ("gaussian", {"sketch": np.full((2, 4), np.inf)}, {}, ValueError, "sketch must be finite"),
    ("gaussian", {"sketch": np.ones((2, 4), complex)}, {}, TypeError,
     "sketch must hold real numbers, got complex128"),
    ("gaussian", {"matrix": np.ones((2, 4))}, {}, ValueError,
     "arrays must be ['sketch'] for kind 'gaussian', got ['matrix']"),
    ("rademacher", {"sketch": np.full((2, 4), 0.5)}, {}, ValueError,
     "sketch must hold +1 and -1, got 0.5"),
    ("uniform", {"sketch": np.full((2, 4), -1.5)}, {}, ValueError,
     "sketch must be in [-1, 1], got 1.5 in absolute value"),
    ("haar", {"sketch": np.ones((2, 4))}, {}, ValueError, "sketch must have orthonormal rows"),
    ("countsketch", {"hash": np.array([0, 1, 2, 0]), "signs": np.ones(4)}, {}, ValueError,
     "hash must be in 0..1, got 2"),
    ("countsketch", {"hash": np.array([0, 1, -1, 0]), "signs": np.ones(4)}, {}, ValueError,
     "hash must be in 0..1, got -1"),
    ("countsketch", {"hash": np.zeros(4), "signs": np.ones(4)}, {}, TypeError,
     "hash must hold integers, got float64"),
    ("countsketch", {"hash": np.zeros(4, int), "signs": np.zeros(4)}, {}, ValueError,
     "signs must be +1 or -1, got 0.0"),
    ("countsketch", {"hash": np.zeros(3, int), "signs": np.ones(4)}, {}, ValueError,
     "hash must have shape (n,) = (4,), got (3,)"),
    ("sjlt", {"hash": np.zeros((4, 2), int), "signs": np.ones((4, 2))}, {"s": 2}, ValueError,
     "hash must hold distinct rows for each column"),
    ("osnap", {"hash": np.tile([1, 0], (4, 1)), "signs": np.ones((4, 2))}, {"s": 2}, ValueError,
     "hash must hold one row of each block of r / s = 1 rows"),
    ("less_uniform", {"columns": np.array([[1, 0], [0, 1]]), "signs": np.ones((2, 2))},
     {"t": 2}, ValueError, "columns must ascend within each row"),
    ("sparse", {"starts": np.array([0, 2, 2]), "columns": np.array([1, 1]), "signs": np.ones(2)},
     {}, ValueError, "columns must ascend within each row"),
    ("sparse", {"starts": np.array([0, 2, 1]), "columns": np.array([1, 2]), "signs": np.ones(2)},
     {}, ValueError, "starts must ascend from 0 to the number of entries 2, got 0 to 1"),
    ("srht", {"rows": np.array([1, 1]), "signs": np.ones(4)}, {}, ValueError,
     "rows must be distinct, got 1 repeated"),
    ("srht", {"rows": np.array([1, 4]), "signs": np.ones(4)}, {}, ValueError,
     "rows must be in 0..3, got 4"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "arrays", "parameters", "error", "text"), FOREIGN)
def test_arrays_that_no_draw_has_are_refused(
    kind: str,
    arrays: dict[str, Any],
    parameters: dict[str, Any],
    error: type[Exception],
    text: str,
) -> None:
    with pytest.raises(error, match=f"^{re.escape(text)}.*; "):
        sketches()[kind].from_arrays(arrays, (2, 4), **parameters)


def test_shapes_and_arrays_of_the_wrong_type_are_refused() -> None:
    shape: Any = 8
    with pytest.raises(TypeError, match=r"^shape must be the pair \(r, n\), got 8; "):
        GAUSSIAN.from_arrays({"sketch": np.ones((2, 4))}, shape)
    arrays: Any = [np.ones((2, 4))]
    with pytest.raises(TypeError, match="^arrays must be a mapping from names to arrays, got list"):
        GAUSSIAN.from_arrays(arrays, (2, 4))
    with pytest.raises(TypeError, match="^kind must be a known sketch for a draw, got 'given'; "):
        GivenSketch.draw(2, 4)


def test_a_kind_is_registered_once() -> None:
    from sketchattn.sketches import base as _base

    with pytest.raises(ValueError, match=r"^kind 'srht' must be unique; it is taken$"):
        _base.register("srht")(GAUSSIAN)
    assert GAUSSIAN.kind == "gaussian"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("r", "n", "m"), [(0, 3, 2), (1, 1, 1), (3, 0, 2), (70, 9, 5), (300, 7, 3), (3, 4100, 2)]
)
def test_dense_products_are_the_sums_of_the_formula(r: int, n: int, m: int, dtype: Any) -> None:
    rng = np.random.default_rng(r)
    a, x = rng.standard_normal((r, n)).astype(dtype), rng.standard_normal((n, m)).astype(dtype)
    expected = np.array(
        [[math.fsum(a[i].astype(np.float64) * x[:, c]) for c in range(m)] for i in range(r)]
    )
    found = sketching.dense_product(a, x)
    assert found.dtype == dtype
    # n products and n - 1 sums, each rounded once, of terms below |a| |x|.
    slack = 2 * n * np.finfo(dtype).eps * np.abs(a) @ np.abs(x)
    assert (np.abs(found - expected.reshape(r, m)) <= slack).all()
    with limit_threads(1):
        assert np.array_equal(sketching.dense_product(a, x), found)


# --- sparse input -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", sketches())
def test_sparse_input_gives_what_dense_input_gives(
    kind: str, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sketch = make_sketch(kind, 4, 12, rng=0, dtype=dtype)
    x = np.random.default_rng(0).integers(-1, 2, (12, 5)).astype(dtype)
    wanted, back = sketch @ x, sketch.T @ x[:4]
    for entries in (1 << 22, 24):  # all columns at once, two at a time
        monkeypatch.setattr("sketchattn.sketches.base.SPARSE_ENTRIES", entries)
        for form in ("csr", "csc", "coo"):
            for make in (scipy.sparse.csr_matrix, scipy.sparse.csr_array):
                given: Any = make(x).asformat(form)  # stubs of SciPy know dense input only
                fewer: Any = make(x[:4]).asformat(form)
                product, transposed = sketch @ given, sketch.T @ fewer
                assert isinstance(product, np.ndarray)
                assert isinstance(transposed, np.ndarray)
                bound = 12 * 12 * np.finfo(dtype).eps * np.abs(sketch.to_dense()).max()
                assert np.abs(product - wanted).max() <= bound
                assert np.abs(transposed - back).max() <= bound
        assert np.array_equal(sketch.apply(scipy.sparse.csr_matrix((12, 0))), np.empty((4, 0)))
    with pytest.raises(ValueError, match=re.escape("x must have shape (n,) or (n, m) with n = 12")):
        sketch.apply(scipy.sparse.csr_matrix((5, 2)))
    with pytest.raises(TypeError, match="x must hold real numbers, got complex128"):
        sketch.apply(scipy.sparse.csr_matrix(np.zeros((12, 2), np.complex128)))
