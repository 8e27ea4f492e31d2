"""Studies: the full grid, the same numbers however it is computed, killed and continued."""

from __future__ import annotations

import collections
import contextlib
import copy
import csv
import dataclasses
import enum
import errno
import functools
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import ml_dtypes
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from sklearn.mixture import GaussianMixture

import sketchattn as sa
from sketchattn.base import parallel
from sketchattn.base.content import content
from sketchattn.base.draws import Draw
from sketchattn.base.files import decode, encode, write_bytes
from sketchattn.errors.reports import FIELDS
from sketchattn.heads.inputs import as_heads
from sketchattn.operators.base import AttentionOperator
from sketchattn.partitions import Plan, Ragged, label_plan
from sketchattn.problem import AttentionProblem
from sketchattn.studies import grid, measure
from sketchattn.studies import journal as journal_module
from sketchattn.studies import run as run_module
from sketchattn.studies.columns import (
    BOUND_COLUMNS,
    COLUMNS,
    REFERENCES,
    SAMPLED_COLUMNS,
    quantiles,
)
from sketchattn.studies.grid import default_methods, default_ranks, describe_method
from sketchattn.studies.plots import PICTURES
from sketchattn.zoo import base as _base

RANKS = [2, 4, 8]


def small_heads(heads: int = 3, n: int = 24, rng: int = 0) -> sa.Heads:
    return sa.make_heads("clustered", n=n, d=4, heads=heads, rng=rng)


def untimed(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.drop(columns="seconds")


def same_rows(a: sa.StudyResult, b: sa.StudyResult) -> bool:
    return all(
        untimed(x).equals(untimed(y)) for x, y in ((a.frame, b.frame), (a.references, b.references))
    )


def read_rows(path: Path) -> pd.DataFrame:
    """Read what a study wrote, each number as Python reads it."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    kinds: dict[str, Callable[[str], Any]] = dict.fromkeys(("rank", "seed", "bytes", "rows"), int)
    kinds |= dict.fromkeys((*FIELDS, "seconds", "work", *SAMPLED_COLUMNS[:2]), float)
    kinds["effective_rank"] = lambda text: int(text) if text else None
    table = [[kinds.get(c, str)(x) for c, x in zip(rows[0], row, strict=True)] for row in rows[1:]]
    return pd.DataFrame(table, columns=rows[0]).astype({"effective_rank": "Int64"})


def journal_lines(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "cells").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def cell_keys(lines: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(x["problem"], x["method"], x["rank"], x["seed"], x["version"]) for x in lines]


# --- the grid -----------------------------------------------------------------------------------


def test_frame_is_the_full_grid_in_order() -> None:
    heads = small_heads()
    result = sa.study(heads, methods={"b": "uniform", "a": "exact"}, ranks=[8, 2], seeds=[3, 1])
    wanted = [
        (head, method, rank, seed)
        for head in heads.names
        for method in ("b", "a")
        for rank in (8, 2)
        for seed in (3, 1)
    ]
    assert tuple(result.frame.columns) == COLUMNS
    columns = ["head", "method", "rank", "seed"]
    assert list(result.frame[columns].itertuples(index=False, name=None)) == wanted
    wanted_references = [
        (head, method, rank, 3) for head in heads.names for method in REFERENCES for rank in (8, 2)
    ]
    assert tuple(result.references.columns) == COLUMNS
    assert list(result.references[columns].itertuples(index=False, name=None)) == wanted_references


def test_rows_are_error_reports_of_the_same_draw() -> None:
    heads = small_heads(2)
    result = sa.study(heads, methods="uniform", ranks=[4], seeds=[7])
    for i, problem in enumerate(heads):
        ahat = sa.UniformColumns(rank=4).approximate(problem, rng=7)
        wanted = sa.error_report(problem, ahat)
        row = result.frame.iloc[i]
        # One thread or several may round a decomposition differently in its last digits.
        for field, value in wanted.as_dict().items():
            assert row[field] == pytest.approx(value, rel=1e-12)
        assert row["bytes"] == ahat.nbytes
        assert row["effective_rank"] == ahat.effective_rank == 4
        assert row["seconds"] > 0


def test_deterministic_rows_are_repeated_and_random_rows_are_not() -> None:
    result = sa.study(small_heads(1), methods=["exact", "topk", "uniform"], ranks=[2, 4], seeds=3)
    by_method = dict(list(untimed(result.frame).groupby("method", sort=False)))
    values = [c for c in COLUMNS if c in FIELDS]
    assert len(by_method["exact"][values].drop_duplicates()) == 1
    assert len(by_method["topk"][values].drop_duplicates()) == 2
    assert len(by_method["uniform"][values].drop_duplicates()) == 6
    # exact (1), uniform (2 x 3), svd and topk (2 each), zero and vmean (1 each); topk is shared.
    assert result.computed == 13
    assert result.frame["effective_rank"].isna().sum() == 6


def test_variants_of_one_method_are_compared_under_their_labels() -> None:
    unbiased = sa.UniformColumns(rank=1, estimator="horvitz-thompson")
    pairs: list[tuple[str, str | sa.Method]] = [("biased", "uniform"), ("unbiased", unbiased)]
    result = sa.study(small_heads(1), methods=pairs, ranks=[4], seeds=1)
    assert result.frame["method"].tolist() == ["biased", "unbiased"]
    errors = result.frame["output_fro_rel"]
    assert errors[0] != errors[1]
    problem = small_heads(1)[0]
    ahat = sa.UniformColumns(rank=4, estimator="horvitz-thompson").approximate(problem, rng=0)
    assert errors[1] == pytest.approx(sa.error_report(problem, ahat).output_fro_rel, rel=1e-12)
    assert unbiased.rank == 1


def test_default_ranks() -> None:
    assert default_ranks(512) == [8, 16, 32, 64, 128, 256]
    assert default_ranks(16) == [8]
    assert default_ranks(15) == [7]
    assert default_ranks(1) == [1]
    heads = [AttentionProblem(*(np.eye(n, 4) for _ in range(3)), name=f"n{n}") for n in (40, 33)]
    assert sorted(set(sa.study(heads, seeds=1).frame["rank"])) == [8, 16]


def test_default_methods_are_those_of_the_registry() -> None:
    chosen = default_methods()
    assert "uniform" in chosen
    assert not {"exact", *REFERENCES} & set(chosen)
    # Exact from rank d on: it would squeeze all others into a corner of every picture.
    assert set(grid.NOT_COMPARED) == {"compressed"}
    assert "compressed" not in chosen


def square_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class SquareOnly(sa.UniformColumns):
        @property
        def traits(self) -> sa.Traits:
            return sa.Traits(rectangular=False)

    SquareOnly.name = "square"
    monkeypatch.setitem(_base._REGISTRY, "square", SquareOnly)


def test_default_methods_that_cannot_honour_a_head_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    square_only(monkeypatch)
    for name in default_methods():  # the others would only take time here
        if name not in ("square", "uniform"):
            monkeypatch.delitem(_base._REGISTRY, name)
    square = small_heads(1)[0]
    wide = AttentionProblem(np.eye(4), np.eye(6, 4), np.eye(6), name="wide")
    assert set(sa.study([square], ranks=[2], seeds=1).frame["method"]) == {"square", "uniform"}
    result = sa.study([square, wide], ranks=[2], seeds=1)
    assert set(result.frame["method"]) == {"uniform"}
    reason = (
        "head 'wide': n_q and n_k must be equal for method 'square', got 4 and 6; use a method "
        "whose traits.rectangular is True"
    )
    assert result.left_out == grid.NOT_COMPARED | {"square": reason}
    assert f"left out: square ({reason})" in str(result)


def test_no_default_method_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    square_only(monkeypatch)
    for name in default_methods():
        if name != "square":
            monkeypatch.delitem(_base._REGISTRY, name)
    wide = AttentionProblem(np.eye(4), np.eye(6, 4), np.eye(6), name="wide")
    message = (
        "methods must hold one that can honour all heads, got none by default: square (head "
        "'wide': n_q and n_k must be equal for method 'square', got 4 and 6; use a method whose "
        "traits.rectangular is True)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sa.study(wide, ranks=[2])


def test_heads_may_be_names_files_problems_and_unnamed(tmp_path: Path) -> None:
    heads = small_heads(2)
    path = tmp_path / "two.npz"
    sa.write_heads(path, heads)
    for given in (heads, list(heads), path, str(path), iter(heads)):
        assert [p.name for p in as_heads(given)] == list(heads.names)
    assert len(as_heads("minilm")) == 12
    assert [p.digest for p in as_heads(path)] == [p.digest for p in heads]
    unnamed = AttentionProblem(*heads[0])
    assert [p.name for p in as_heads([unnamed, heads[1], unnamed])] == [
        "head0",
        heads.names[1],
        "head2",
    ]
    assert unnamed.name is None


def test_causal_and_masked_heads() -> None:
    base = small_heads(1)[0]
    mask = np.arange(24) < 3
    problem = AttentionProblem(*base, causal=True, key_mask=mask, name="masked")
    result = sa.study(problem, methods="uniform", ranks=[8], seeds=1)
    assert result.frame["effective_rank"].tolist() == [3]


# --- the same numbers, however computed ---------------------------------------------------------


def test_two_jobs_give_the_numbers_of_one() -> None:
    heads = small_heads(3, n=48)
    one = sa.study(heads, methods="uniform", ranks=RANKS, seeds=3, jobs=1)
    two = sa.study(heads, methods="uniform", ranks=RANKS, seeds=3, jobs=2)
    assert same_rows(one, two)
    # The comparison sees other seeds and other heads.
    others = sa.study(heads, methods="uniform", ranks=RANKS, seeds=[0, 1, 3])
    assert not same_rows(one, others)


def test_files_hold_the_rows(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    result = sa.study(
        small_heads(2), methods=["uniform", "exact"], ranks=RANKS, seeds=2, out=folder
    )
    assert result.out == folder
    for name, frame in (("results", result.frame), ("references", result.references)):
        pd.testing.assert_frame_equal(read_rows(folder / f"{name}.csv"), frame, check_exact=True)
    # Infinities and missing ranks are in these rows, so the comparison above covers them.
    assert np.isinf(result.frame["row_kl_mean"]).any()
    assert result.frame["effective_rank"].isna().any()
    assert [p.name for p in result.pictures] == list(PICTURES)
    for path in result.pictures:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    settings = json.loads((folder / "study.json").read_text())
    assert settings["version"] == sa.__version__
    assert settings["ranks"] == RANKS
    assert settings["seeds"] == [0, 1]
    assert settings["methods"] == {
        "uniform": "sketchattn.zoo.baselines.UniformColumns(estimator='self-normalized', rank=2)",
        "exact": "sketchattn.zoo.baselines.Exact()",
    }
    assert [h["digest"] for h in settings["heads"]] == [p.digest for p in small_heads(2)]
    assert {"cpu", "threads", "python", "numpy", "numba"} <= set(settings["machine"])
    leftovers = {p.name for p in folder.iterdir()}
    assert leftovers == {
        "cells",
        "results.csv",
        "references.csv",
        "study.json",
        "hardness.json",
        "report.html",
        *(p.name for p in result.pictures),
    }


def test_not_finite_numbers_survive_the_journal() -> None:
    for x in (math.inf, -math.inf, 0.1, 0.0, 3, None):
        assert decode(json.loads(json.dumps(encode(x), allow_nan=False))) == x
    assert math.isnan(decode(encode(math.nan)))


# --- methods without a matrix -------------------------------------------------------------------

MATRIX_FIELDS = ("matrix_fro_rel", "matrix_spec_rel", "row_tv_mean", "row_tv_max", "row_kl_mean")


def test_a_method_without_a_matrix_is_measured_by_its_output(tmp_path: Path) -> None:
    heads = small_heads(2)
    methods: list[Any] = [("max", sa.Linformer(1, "max_pool")), "uniform"]
    options: dict[str, Any] = {"methods": methods, "ranks": [2, 4], "seeds": 2}
    result = sa.study(heads, **options, out=tmp_path)
    own = result.frame[result.frame["method"] == "max"]
    assert own[list(MATRIX_FIELDS)].isna().all(axis=None)
    assert own[["bytes", "effective_rank"]].isna().all(axis=None)
    others = result.frame[result.frame["method"] != "max"]
    assert others[list(FIELDS)].notna().all(axis=None)
    assert others["bytes"].tolist() == [
        sa.UniformColumns(r).approximate(p, rng=s).nbytes
        for p in heads
        for r in (2, 4)
        for s in (0, 1)
    ]
    for (_, row), (i, rank) in zip(
        own.iloc[::2].iterrows(), [(i, r) for i in range(2) for r in (2, 4)], strict=True
    ):
        output = sa.Linformer(rank, "max_pool").attend(heads[i])
        wanted = sa.error_report(heads[i], output=output)
        for field in set(FIELDS) - set(MATRIX_FIELDS):
            assert row[field] == pytest.approx(getattr(wanted, field), rel=1e-12)
    again = sa.study(heads, **options, out=tmp_path)
    assert again.computed == 0
    pd.testing.assert_frame_equal(again.frame, result.frame, check_exact=True)
    assert "nan" in result.render(every=True)
    with (tmp_path / "results.csv").open(newline="") as file:
        written = [row for row in csv.DictReader(file) if row["method"] == "max"]
    assert {(row["bytes"], row["matrix_fro_rel"]) for row in written} == {("", "nan")}


# --- bounds of claims ---------------------------------------------------------------------------

GAUSSIAN = "sketching.amm_jl_moment"


def test_bounds_are_those_of_the_claim_on_every_head_at_every_rank(tmp_path: Path) -> None:
    heads = small_heads(2)
    names = ["sketching.moment_gaussian", GAUSSIAN]
    result = sa.study(heads, methods={"mine": "jl"}, ranks=[8, 2], seeds=1, bounds=names)
    assert tuple(result.bounds.columns) == BOUND_COLUMNS
    places = result.bounds[["claim", "head", "rank"]].itertuples(index=False, name=None)
    assert list(places) == [(c, h, r) for c in names for h in heads.names for r in (8, 2)]
    assert set(result.bounds["method"]) == {"mine"}
    assert set(result.bounds["field"]) == {"output_fro_amm"}
    # eps = sqrt(2/r), whatever the head; the exact one is smaller on every head.
    sizes = result.bounds["bound"].to_numpy().reshape(2, 2, 2)
    assert sizes[1] == pytest.approx(np.sqrt([[2 / 8, 2 / 2]] * 2))
    assert (sizes[0] < sizes[1]).all()
    assert (sizes[0] > sizes[1] / math.sqrt(2)).all()  # (1 + rho)/r with 0 < rho < 1


def test_bounds_change_no_row_and_are_not_kept(tmp_path: Path) -> None:
    options: dict[str, Any] = {"methods": ["jl", "uniform"], "ranks": [2, 4], "seeds": 2}
    first = sa.study(small_heads(2), **options, out=tmp_path, bounds=GAUSSIAN)
    kept = {p: p.read_bytes() for p in (tmp_path / "cells").glob("*.jsonl")}
    tables = ["results.csv", "references.csv"]
    rows = [(tmp_path / name).read_bytes() for name in tables]
    pd.testing.assert_frame_equal(
        read_bounds(tmp_path / "bounds.csv"), first.bounds, check_exact=True
    )
    assert json.loads((tmp_path / "study.json").read_text())["bounds"] == [GAUSSIAN]
    amm = (tmp_path / "output_fro_amm.png").read_bytes()
    rel = (tmp_path / "output_fro_rel.png").read_bytes()
    second = sa.study(small_heads(2), **options, out=tmp_path)
    assert (second.computed, second.reused) == (0, first.computed)
    assert len(second.bounds) == 0
    assert not (tmp_path / "bounds.csv").exists()
    assert json.loads((tmp_path / "study.json").read_text())["bounds"] == []
    pd.testing.assert_frame_equal(first.frame, second.frame, check_exact=True)
    assert {p: p.read_bytes() for p in (tmp_path / "cells").glob("*.jsonl")} == kept
    assert [(tmp_path / name).read_bytes() for name in tables] == rows
    assert (tmp_path / "output_fro_amm.png").read_bytes() != amm
    assert (tmp_path / "output_fro_rel.png").read_bytes() == rel


def read_bounds(path: Path) -> pd.DataFrame:
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    kinds: dict[str, Callable[[str], Any]] = {"rank": int, "bound": float}
    table = [[kinds.get(c, str)(x) for c, x in zip(rows[0], row, strict=True)] for row in rows[1:]]
    return pd.DataFrame(table, columns=rows[0])


# --- resuming -----------------------------------------------------------------------------------


def run(folder: Path | None, heads: sa.Heads | None = None, **options: Any) -> sa.StudyResult:
    given: dict[str, Any] = {"methods": "uniform", "ranks": RANKS, "seeds": 3, "pictures": False}
    return sa.study(small_heads() if heads is None else heads, out=folder, **(given | options))


# 3 heads x (uniform 3 x 3, svd and topk 3 each, zero, vmean, exact)
CELLS = 3 * 18


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, one_thread: None
) -> tuple[Path, sa.StudyResult]:
    """Give the folder of a finished study, not to be written to, and its result."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(folder)


@pytest.fixture
def whole(finished: tuple[Path, sa.StudyResult], tmp_path: Path) -> sa.StudyResult:
    """Put a finished study into the folder of a test, and give its result."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    return finished[1]


def test_a_finished_study_is_reused_whole(tmp_path: Path) -> None:
    first = run(tmp_path)
    second = run(tmp_path)
    assert (first.computed, first.reused) == (CELLS, 0)
    assert (second.computed, second.reused) == (0, CELLS)
    pd.testing.assert_frame_equal(first.frame, second.frame, check_exact=True)
    fresh = run(tmp_path, resume=False)
    assert (fresh.computed, fresh.reused) == (CELLS, 0)
    assert same_rows(first, fresh)
    assert len(journal_lines(tmp_path)) == CELLS


def test_more_ranks_seeds_and_methods_reuse_what_is_there(tmp_path: Path) -> None:
    run(tmp_path, ranks=[2, 4], seeds=2)
    more = run(tmp_path)
    # uniform: ranks 2 and 4 at seeds 0 and 1; svd and topk at ranks 2 and 4; zero; vmean; exact
    assert more.reused == 3 * (4 + 4 + 3)
    assert same_rows(more, run(None))
    unbiased = {"uniform": sa.UniformColumns(rank=1, estimator="horvitz-thompson")}
    other = run(tmp_path, methods=unbiased)
    assert other.reused == 3 * 9  # the references only
    assert same_rows(other, run(None, methods=unbiased))


@pytest.mark.parametrize("cut", [1, 40, -1])
def test_a_truncated_last_line_is_repaired(tmp_path: Path, whole: sa.StudyResult, cut: int) -> None:
    victim = sorted((tmp_path / "cells").glob("*.jsonl"))[1]
    lines = victim.read_bytes().splitlines(keepends=True)
    # Cut inside the line, or only its newline: a line is whole if it ends.
    victim.write_bytes(b"".join(lines[:-1]) + lines[-1][:cut])
    again = run(tmp_path)
    assert (again.computed, again.reused) == (1, CELLS - 1)
    assert same_rows(whole, again)
    assert victim.read_bytes().splitlines(keepends=True)[:-1] == lines[:-1]
    keys = cell_keys(journal_lines(tmp_path))
    assert len(keys) == len(set(keys)) == CELLS


@pytest.mark.parametrize(
    "broken",
    [
        b"not json\n",
        b"[]\n",
        b"{}\n",
        b'{"values": {}}\n',
        b"\xff\xfe\n",
        b"\n",
        b"null\n",
    ],
)
def test_damaged_lines_are_computed_again(
    tmp_path: Path, whole: sa.StudyResult, broken: bytes
) -> None:
    victim = sorted((tmp_path / "cells").glob("*.jsonl"))[0]
    lines = victim.read_bytes().splitlines(keepends=True)
    lines[2] = broken
    victim.write_bytes(b"".join(lines))
    again = run(tmp_path)
    assert (again.computed, again.reused) == (1, CELLS - 1)
    assert same_rows(whole, again)
    assert len(journal_lines(tmp_path)) == CELLS  # all of them parse


@pytest.mark.usefixtures("whole")
def test_a_line_with_a_missing_value_is_computed_again(tmp_path: Path) -> None:
    victim = sorted((tmp_path / "cells").glob("*.jsonl"))[0]
    lines = victim.read_text().splitlines()
    record = json.loads(lines[0])
    record["values"]["skill"] = None
    victim.write_text("\n".join([json.dumps(record), *lines[1:]]) + "\n")
    assert run(tmp_path).computed == 1


def test_other_heads_of_the_same_name_are_not_mixed_in(
    tmp_path: Path, whole: sa.StudyResult
) -> None:
    other = run(tmp_path, small_heads(rng=1))
    assert other.frame["head"].equals(whole.frame["head"])
    assert other.reused == 0
    assert same_rows(other, run(None, small_heads(rng=1)))
    assert same_rows(run(tmp_path), whole)
    assert not same_rows(whole, other)


def test_cells_of_another_version_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path)
    monkeypatch.setattr(journal_module, "__version__", "0.0.0")
    assert run(tmp_path).reused == 0
    monkeypatch.undo()
    assert run(tmp_path).computed == 0


def test_equal_heads_under_two_names_have_two_journals(tmp_path: Path) -> None:
    arrays = small_heads(1)[0].arrays
    twins = [AttentionProblem(*arrays, name=name) for name in ("a/b", "a_b")]
    result = sa.study(twins, methods="uniform", ranks=[2], seeds=1, out=tmp_path, pictures=False)
    assert len(list((tmp_path / "cells").glob("*.jsonl"))) == 2
    assert result.frame["output_fro_rel"].nunique() == 1


def test_parameters_tell_methods_apart() -> None:
    class Weighted(sa.UniformColumns):
        def __init__(self, rank: int, weights: Any = None) -> None:
            super().__init__(rank)
            self.weights = weights

    texts = {
        describe_method(Weighted(2)),
        describe_method(Weighted(3)),
        describe_method(Weighted(2, np.zeros(3000))),
        describe_method(Weighted(2, np.r_[np.zeros(1500), 1.0, np.zeros(1499)])),
        describe_method(Weighted(2, np.zeros(3000, np.float32))),
        describe_method(sa.UniformColumns(2)),
    }
    assert len(texts) == 6
    assert describe_method(Weighted(2, np.zeros(3))) == describe_method(Weighted(2, np.zeros(3)))


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass
class Setting:
    weights: Any
    label: str = ""


class Point(NamedTuple):
    x: Any


class Spoken:
    """Has a representation of its own that leaves its content out."""

    def __init__(self, weights: Any) -> None:
        self.weights = weights

    def __repr__(self) -> str:
        return "Spoken(...)"


class Opaque:
    pass


def double(x: Any) -> Any:
    return 2 * x


def one_in(n: int, i: int) -> Any:
    x = np.zeros(n)
    x[i] = 1.0
    return x


BIG, OTHER = one_in(3000, 1500), one_in(3000, 1501)


def plan_of(n: int, swapped: bool) -> Plan:
    """Return spans of two keys; swapped, the first two rows see each other as a region."""
    keys = list(range(n))
    rest = [[j for j in keys if j != i] for i in range(n)]
    direct = [[i] for i in keys]
    if swapped:
        direct[0], rest[0] = rest[0], direct[0]
    return Plan.from_lists(n, direct, rest, [[i] for i in keys])


# Pairs of values that differ, of which most look alike.
UNLIKE: dict[str, tuple[Any, ...]] = {
    "numbers": (1, 1.0),
    "flags": (1, True),
    "zeros": (0.0, -0.0),
    "not numbers": (math.nan, math.inf),
    "arrays": (BIG, OTHER),
    "dtypes": (np.zeros(3), np.zeros(3, np.float32)),
    "shapes": (np.zeros((2, 3)), np.zeros((3, 2))),
    "objects": (np.array([1, BIG], object), np.array([1, OTHER], object)),
    "fields": (
        np.zeros(2000, [("a", "i4"), ("b", "f8")]),
        np.array([(0, 0.0)] * 1999 + [(0, 1.0)], [("a", "i4"), ("b", "f8")]),
    ),
    "masks": (np.ma.masked_array(BIG, BIG > 0), np.ma.masked_array(BIG, BIG > 1)),
    "halves": (np.ones(2, ml_dtypes.float8_e5m2).view("V1"), np.ones(2, ml_dtypes.float8_e4m3fn)),
    "lists": ([1, [BIG]], [1, [OTHER]]),
    "kinds of sequences": ([1], (1,)),
    "long lists": (list(range(3000)), [*range(2999), 0]),
    "mappings": ({"s": {"w": BIG}}, {"s": {"w": OTHER}}),
    "read-only mappings": (
        types.MappingProxyType({"w": BIG}),
        types.MappingProxyType({"w": OTHER}),
    ),
    "sets": ({1, 2}, {1, 3}),
    "deques": (collections.deque([BIG]), collections.deque([OTHER])),
    "tuples": (Point(BIG), Point(OTHER)),
    "dataclasses": (Setting(BIG), Setting(OTHER)),
    "plans": (plan_of(40, False), plan_of(40, True)),
    "ragged": (Ragged.of([[0]] * 2000), Ragged.of([[0]] * 1999 + [[1]])),
    "own representations": (Spoken(BIG), Spoken(OTHER)),
    "frames": (pd.DataFrame({"w": BIG}), pd.DataFrame({"w": OTHER})),
    "columns": (pd.DataFrame({"w": BIG}), pd.DataFrame({"v": BIG})),
    "kinds of columns": (pd.DataFrame({"w": [1], "v": [2]}), pd.DataFrame({"w": [1], "v": [2.0]})),
    "index": (pd.Series([1, 2], index=["a", "b"]), pd.Series([1, 2], index=["b", "a"])),
    "sparse": (scipy.sparse.diags_array(BIG), scipy.sparse.diags_array(OTHER)),
    "problems": (small_heads(1)[0], small_heads(1, rng=1)[0]),
    "heads": (small_heads(2), small_heads(2, rng=1)),
    "methods": (sa.Combiner(labels=BIG), sa.Combiner(labels=OTHER)),
    "estimators": (GaussianMixture(means_init=BIG), GaussianMixture(means_init=OTHER)),
    "functions": (double, one_in),
    "partial": (functools.partial(one_in, 3), functools.partial(one_in, 4)),
    "classes": (sa.JL, sa.TopK),
    "enumerations": (Colour.RED, Colour.BLUE),
    "paths": (Path("a"), Path("b")),
    "bytes": (b"a" * 100, b"a" * 99 + b"b"),
    "generators": (np.random.default_rng(0), np.random.default_rng(1)),
}


@pytest.mark.parametrize("kind", list(UNLIKE))
def test_the_content_of_a_parameter_decides_its_key(kind: str) -> None:
    first, second = UNLIKE[kind]
    assert content(first) != content(second)
    copied = types.MappingProxyType(dict(first)) if "read-only" in kind else copy.deepcopy(first)
    assert content(copied) == content(first)


def test_tensors_are_told_apart_by_their_content() -> None:
    torch = pytest.importorskip("torch")
    first, second = torch.tensor(BIG), torch.tensor(OTHER)
    assert content(first) != content(second)
    assert content(first) == content(first.clone().requires_grad_())
    assert content(torch.ones(2, dtype=torch.bfloat16)) != content(torch.ones(2))


def test_a_study_tells_plans_apart(tmp_path: Path) -> None:
    n = 1024  # NumPy prints arrays of so many entries in part
    head = sa.make_heads("clustered", n=n, d=4, rng=0)[0]
    # Positions in the middle change regions, which NumPy leaves out when it prints.
    labels = np.arange(n) // 32
    moved = labels.copy()
    moved[256:768] = labels[256:768].reshape(2, 256)[::-1].T.reshape(-1)
    first, second = (label_plan(x) for x in (labels, moved))
    assert repr(first) == repr(second)
    same_sizes = [sa.Combiner(pattern=plan) for plan in (first, second)]
    options: dict[str, Any] = {"ranks": [8], "seeds": 1, "pictures": False, "out": tmp_path}
    both = sa.study(head, methods={"a": same_sizes[0], "b": same_sizes[1]}, **options)
    for label, method in zip("ab", same_sizes, strict=True):
        wanted = sa.error_report(head, method.approximate(head)).output_fro_rel
        found = both.frame[both.frame["method"] == label]["output_fro_rel"].item()
        assert found == pytest.approx(wanted, rel=1e-12)


class Weights(list[int]):
    """A list that copies share."""

    def __deepcopy__(self, memo: object) -> Weights:
        return self


class Weighted(sa.UniformColumns):
    """Has a parameter of any kind."""

    def __init__(self, rank: int = 2, weights: Any = None) -> None:
        super().__init__(rank)
        self.weights = weights


def test_what_has_no_content_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: object) -> None:
        raise AssertionError("work began before the refusal")

    def local(x: Any) -> Any:
        return x

    monkeypatch.setattr(run_module, "run_head", work)
    held: list[Any] = []
    held.append(held)
    module = Opaque.__module__
    cases = {
        f"an object of {module}.Opaque as 'weights' of Weighted; make it a dataclass, or give it "
        f"__reduce__": Opaque(),
        "a lambda as 'weights' of Weighted; define it at the top level of a module": lambda x: x,
        f"{local.__qualname__!r}, which cannot be imported as 'weights' of Weighted; define it at "
        f"the top level of a module": [local],
        "generator, which can be read only once as 'weights' of Weighted; make it a list": (
            x for x in (1, 2)
        ),
        "list that holds itself as 'weights' of Weighted; unroll it": held,
    }
    for words, value in cases.items():
        message = f"methods must have parameters that are told apart by their content, got {words}"
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            sa.study(BASE, methods=Weighted(2, value), ranks=[2])


def test_rows_are_found_again_when_a_method_changes_its_parameters() -> None:
    class Counting(Weighted):
        def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
            self.weights.append(1)
            return super()._approximate(problem, draw)

    assert len(run(None, methods={"counting": Counting(2, Weights())}).frame) == 27


SCRIPT = """
import sys, time
import sketchattn as sa

class Slow(sa.UniformColumns):
    def _approximate(self, problem, draw):
        time.sleep(0.02)
        return super()._approximate(problem, draw)

heads = sa.make_heads("clustered", n=24, d=4, heads=3, rng=0)
result = sa.study(heads, methods={"slow": Slow(rank=4)}, ranks=[2, 4, 8], seeds=3,
                  jobs=int(sys.argv[2]), out=sys.argv[1], pictures=False)
print(result.computed, result.reused)
"""


def start(folder: Path, jobs: int) -> subprocess.Popen[str]:
    root = str(Path(sa.__file__).parents[1])
    paths = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), str(jobs)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
        start_new_session=True,
    )


def finished_lines(folder: Path) -> int:
    return sum(f.read_bytes().count(b"\n") for f in (folder / "cells").glob("*.jsonl"))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize(("jobs", "moment"), [(1, 1), (1, 30), (2, 12)])
def test_a_killed_study_continues_to_the_same_rows(tmp_path: Path, jobs: int, moment: int) -> None:
    process = start(tmp_path, jobs)
    deadline = time.monotonic() + 600
    while finished_lines(tmp_path) < moment:
        assert process.poll() is None, "the study ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()  # SIGKILL, to the study only: workers have to notice by themselves
    assert process.wait() == -signal.SIGKILL
    assert process.stdout is not None
    process.stdout.close()  # its workers hold the other end for as long as they live
    assert not (tmp_path / "results.csv").exists()
    time.sleep(0.2 if jobs > 1 else 0.0)  # a worker may still append the cell that it is at
    before = {f: f.read_bytes() for f in (tmp_path / "cells").glob("*.jsonl")}
    left = sum(x.count(b"\n") for x in before.values())
    assert moment <= left < CELLS

    again = start(tmp_path, jobs)
    try:
        output, _ = again.communicate(timeout=600)
    finally:
        for group in (process.pid, again.pid):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)  # idle workers of the killed study
    assert again.returncode == 0
    # Nothing that was finished is computed again: its lines stay, and no key appears twice.
    assert output.split() == [str(CELLS - left), str(left)]
    for file, old in before.items():
        assert file.read_bytes().startswith(old[: old.rfind(b"\n") + 1])
    keys = cell_keys(journal_lines(tmp_path))
    assert len(keys) == len(set(keys)) == CELLS

    whole = run(None, methods={"slow": sa.UniformColumns(rank=4)})
    for name, frame in (("results", whole.frame), ("references", whole.references)):
        read = read_rows(tmp_path / f"{name}.csv")
        pd.testing.assert_frame_equal(untimed(read), untimed(frame), check_exact=True)


class Failing(sa.UniformColumns):
    """Fails at rank 4 on the second head."""

    def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        if self.rank == 4 and str(problem.name).endswith("head1"):
            raise ZeroDivisionError("no luck")
        return super()._approximate(problem, draw)


def test_a_failing_method_is_named_and_finished_cells_stay(tmp_path: Path) -> None:
    message = (
        "method 'bad' failed on head 'clustered/head1', rank 4, seed 0: ZeroDivisionError: no luck"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        run(tmp_path, methods={"bad": Failing(rank=1)})
    # All of the first head; of the second the references (8) and rank 2 (3 seeds).
    assert len(journal_lines(tmp_path)) == 17 + 8 + 3 + 2
    assert not (tmp_path / "results.csv").exists()
    with pytest.raises(RuntimeError, match="no luck"):
        run(tmp_path, methods={"bad": Failing(rank=1)})
    assert len(journal_lines(tmp_path)) == 17 + 8 + 3 + 2


# --- one study a folder -------------------------------------------------------------------------


def test_two_studies_do_not_write_one_folder(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    message = (
        f"out must be a folder that no other study writes to, got {str(tmp_path)!r}, which "
        f"process {os.getpid()} holds; wait for it or name another folder"
    )
    with (
        journal_module.lock_folder(tmp_path / "cells" / ".lock", tmp_path),
        pytest.raises(ValueError, match=f"^{re.escape(message)}$"),
    ):
        run(tmp_path)
    assert run(tmp_path).computed == CELLS  # free again


def dead_process() -> int:
    """Return the number of a process that is over."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_lock_that_a_dead_process_left_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    lock = tmp_path / "cells" / ".lock"
    lock.write_bytes(b"")
    text = f"{'0' * 32} {journal_module._host()} {dead_process()}\n"
    journal_module.holder_of(lock).write_text(text)
    assert run(tmp_path).computed == CELLS
    assert not journal_module.holder_of(lock).exists()


def test_a_worker_stops_when_its_study_lost_the_folder(tmp_path: Path) -> None:
    lock = tmp_path / "cells" / ".lock"
    lock.parent.mkdir()
    problem = small_heads(1)[0]
    variant = grid.Variant.of("uniform", sa.UniformColumns(rank=2))
    cells = grid.make_cells([variant], [2], [0])
    journal = tmp_path / "cells" / "one.jsonl"
    message = (
        f"study must hold its folder {str(tmp_path)!r} while it runs, got a lock that is lost; "
        f"start it again to continue"
    )
    with journal_module.lock_folder(lock, tmp_path) as token:
        assert journal_module.is_held(lock, token)
        assert not journal_module.is_held(lock, "f" * 32)
        with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
            measure.run_head(measure.HeadTask(problem, cells, journal, lock, "f" * 32, 1))
        assert not journal.exists()
        name, found = measure.run_head(measure.HeadTask(problem, cells, journal, lock, token, 1))
        assert (name, len(found)) == (problem.name, 1)
        assert journal.read_bytes().count(b"\n") == 1
        text = journal_module.holder_of(lock).read_text()
    # As after SIGKILL: the token is there, its process is gone.
    gone = text.replace(str(os.getpid()), str(dead_process()))
    journal_module.holder_of(lock).write_text(gone)
    assert not journal_module.is_held(lock, token)
    elsewhere = text.replace(journal_module._host(), "another-machine")
    journal_module.holder_of(lock).write_text(elsewhere)
    assert journal_module.is_held(lock, token)  # whose processes are not seen from here
    assert not journal_module.is_held(tmp_path / "missing", token)


def test_a_worker_that_cannot_see_the_folder_still_computes(tmp_path: Path) -> None:
    problem = small_heads(1)[0]
    variant = grid.Variant.of("uniform", sa.UniformColumns(rank=2))
    cells = grid.make_cells([variant], [2], [0, 1])
    elsewhere = tmp_path / "not" / "here"
    task = measure.HeadTask(problem, cells, elsewhere / "a.jsonl", elsewhere / ".lock", "f" * 32, 1)
    assert len(measure.run_head(task)[1]) == 2
    assert not elsewhere.exists()


# --- file systems -------------------------------------------------------------------------------

fcntl: Any = None if sys.platform == "win32" else importlib.import_module("fcntl")
NO_LOCKS = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]


@pytest.mark.skipif(fcntl is None, reason="simulates the locks of POSIX")
@pytest.mark.parametrize("code", NO_LOCKS)
def test_a_file_system_without_locks_holds_studies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert len(run(None).frame) == 27
    assert run(tmp_path).computed == CELLS
    assert run(tmp_path).reused == CELLS  # nothing is left behind that would look like a lock
    lock = tmp_path / "cells" / ".lock"
    with journal_module.lock_folder(lock, tmp_path) as token:
        assert journal_module.is_held(lock, token)
        with pytest.raises(ValueError, match=r"^out must be a folder that no other study writes"):
            run(tmp_path)
    assert run(tmp_path).reused == CELLS


def test_a_study_without_a_folder_needs_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a lock was asked for")

    monkeypatch.setattr(journal_module, "_acquire", refuse)
    assert run(None).computed == CELLS


@pytest.mark.parametrize("name", ["mkdir", "open", "write"])
def test_a_study_without_a_folder_needs_no_disk(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, real = run(None), getattr(os, name)

    def refuse(where: Any, *args: Any, **options: Any) -> Any:
        line = name == "write" and bytes(args[0]).startswith(b"{")
        if line or (name != "write" and "sketchattn-" in str(where)):
            refused.append(where)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(where, *args, **options)

    refused: list[Any] = []
    with monkeypatch.context() as full:
        full.setattr(os, name, refuse)
        found = run(None)
        assert run(None, resume=False).computed == CELLS
    assert refused
    assert same_rows(plain, found)


@pytest.mark.parametrize("digit", ["values", "seed", "rank"])
def test_a_changed_digit_is_computed_again(
    tmp_path: Path, whole: sa.StudyResult, digit: str
) -> None:
    victim = sorted((tmp_path / "cells").glob("*.jsonl"))[0]
    lines = victim.read_text().splitlines(keepends=True)
    record = json.loads(lines[12])
    if digit == "values":
        old, new = str(record["values"]["skill"]), str(record["values"]["skill"] / 2)
    else:
        old, new = f'"{digit}": {record[digit]}', f'"{digit}": {record[digit] + 1}'
    assert old in lines[12]
    lines[12] = lines[12].replace(old, new, 1)
    victim.write_text("".join(lines))
    again = run(tmp_path)
    assert (again.computed, again.reused) == (1, CELLS - 1)
    assert same_rows(whole, again)


def test_a_full_disk_names_the_file_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, ranks=[2], seeds=1)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    write = os.write

    def half(handle: int, data: bytes) -> int:
        return (
            write(handle, data[: len(data) // 2]) if data.startswith(b"{") else write(handle, data)
        )

    with monkeypatch.context() as full:
        full.setattr(os, "write", half)
        with pytest.raises(OSError, match=r"cells.*\.jsonl could not be written whole \(No space "):
            run(tmp_path)
    now = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert {p: now[p] for p in before} == before

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(os, "replace", refuse)
        with pytest.raises(OSError, match=r"free some space and start again$"):
            write_bytes(tmp_path / "results.csv", b"new")
    assert (tmp_path / "results.csv").read_bytes() == before[tmp_path / "results.csv"]
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == set(now)  # no temporary file
    assert same_rows(run(tmp_path), run(None))


def test_files_are_written_through_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "results.csv", tmp_path / "results.csv"
    for there in (False, True):  # to nothing yet, and to a file
        if not there:
            link.symlink_to(target)
        write_bytes(link, b"new" if there else b"first")
        assert link.is_symlink()
        assert target.read_bytes() == (b"new" if there else b"first")


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path: Path) -> None:
    write_bytes(tmp_path / ("x" * 255), b"new")
    assert [len(p.name) for p in tmp_path.iterdir()] == [255]
    with pytest.raises(OSError, match=r"could not be written whole .*; choose a shorter name$"):
        write_bytes(tmp_path / ("x" * 256), b"new")
    with pytest.raises(FileNotFoundError, match="; make its folder first$"):
        write_bytes(tmp_path / "no" / "x", b"new")


def test_what_is_in_a_folder_belongs_to_its_rows(tmp_path: Path) -> None:
    options: dict[str, Any] = {"ranks": [2], "seeds": 1, "out": tmp_path}
    first = sa.study(small_heads(1), methods="uniform", **options)
    (tmp_path / "mine.png").write_bytes(b"of somebody else")
    again = sa.study(small_heads(1), methods="uniform", pictures=False, **options)
    assert again.computed == 0
    assert all(path.exists() for path in first.pictures)  # the same rows
    sa.study(small_heads(1), methods="jl", pictures=False, **options)
    assert [p.name for p in tmp_path.glob("*.png")] == ["mine.png"]


# --- other backends, and workers without a parent -----------------------------------------------


# JAX, which another file of tests may have loaded, warns of every fork.
@pytest.mark.filterwarnings("ignore:.*fork:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
@pytest.mark.parametrize("backend", ["loky", "threading", "sequential", "multiprocessing"])
@pytest.mark.parametrize("jobs", [1, 2])
def test_backends_of_joblib_give_the_same_rows(backend: str, jobs: int) -> None:
    options: dict[str, Any] = {"ranks": [2], "seeds": 2}
    one = run(None, **options)
    with joblib.parallel_config(backend):
        found = run(None, jobs=jobs, **options)
        checked = sa.theory.validate("sketching.moment_countsketch", BASE, trials=9, jobs=jobs)
    assert same_rows(found, one)
    assert len(checked.rows) == 4


ORPHANS = """
import os, sys
import sketchattn as sa

class Slow(sa.UniformColumns):
    def _approximate(self, problem, draw):
        open(os.path.join(sys.argv[1], f"{os.getpid()}.worker"), "w").close()
        import time
        time.sleep(0.2)
        return super()._approximate(problem, draw)

heads = sa.make_heads("clustered", n=24, d=4, heads=3, rng=0)
sa.study(heads, methods={"slow": Slow(rank=4)}, ranks=[2], seeds=10000, jobs=2,
         out=sys.argv[1], pictures=False)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_workers_of_a_killed_study_end(tmp_path: Path) -> None:
    script = tmp_path / "own.py"
    script.write_text(ORPHANS.replace("sys.argv[1]", repr(str(tmp_path))))
    root = str(Path(sa.__file__).parents[1])
    paths = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": paths},
        start_new_session=True,
    )
    deadline = time.monotonic() + 600
    try:
        while len(list(tmp_path.glob("*.worker"))) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.wait()
        workers = [int(p.stem) for p in tmp_path.glob("*.worker")]
        assert process.pid not in workers
        deadline = time.monotonic() + 600
        while any(parallel.is_alive(worker) for worker in workers):
            assert time.monotonic() < deadline, "a worker outlived its study"
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


OWN = """
import dataclasses
import sketchattn as sa

@dataclasses.dataclass
class Setting:
    factor: int

def double(x):
    return 2 * x

class Own(sa.UniformColumns):
    def __init__(self, rank, setting=None, function=None):
        super().__init__(rank)
        self.setting = setting
        self.function = function

heads = sa.make_heads("clustered", n=24, d=4, heads=2, rng=0)
method = Own(rank=4, setting=Setting(3), function=double)
one, two = (sa.study(heads, methods={"own": method, "uniform": "uniform"}, ranks=[2], seeds=2,
                     jobs=jobs) for jobs in (1, 2))
errors = [x.frame["output_fro_rel"].tolist() for x in (one, two)]
assert errors[0] == errors[1]
print(two.computed)
"""


def test_a_method_of_a_script_runs_in_two_jobs(tmp_path: Path) -> None:
    script = tmp_path / "own.py"
    script.write_text(OWN)
    root = str(Path(sa.__file__).parents[1])
    paths = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    found = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.split() == [str(2 * (4 + 2 + 2 + 1))]


# --- what is refused ----------------------------------------------------------------------------


def empty() -> AttentionProblem:
    return AttentionProblem(np.zeros((0, 2)), np.ones((3, 2)), np.ones((3, 2)), name="none")


def hidden() -> AttentionProblem:
    mask = np.zeros(3, bool)
    return AttentionProblem(*(np.ones((3, 2)) for _ in range(3)), key_mask=mask, name="dark")


def narrow() -> AttentionProblem:
    return AttentionProblem(np.ones((3, 2)), np.ones((3, 2)), np.ones((3, 0)), name="thin")


BASE = small_heads(2)
PLAIN = AttentionProblem(*BASE[0].arrays, name="x")
ZERO = AttentionProblem(np.ones((4, 2)), np.ones((4, 2)), np.zeros((4, 2)), name="zero")

REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: sa.study(3),  # type: ignore[arg-type]  # wrong on purpose, as below
        TypeError,
        "heads must be Heads, problems, a file or the name of a bundled set, got int; make "
        "problems with sketchattn.AttentionProblem(q, k, v)",
    ),
    (lambda: sa.study([]), ValueError, "heads must hold at least one problem, got 0; give some"),
    (
        lambda: sa.study([PLAIN, 1]),  # type: ignore[list-item]
        TypeError,
        "heads must hold AttentionProblem objects, got int at position 1; make it with "
        "sketchattn.AttentionProblem(q, k, v)",
    ),
    (
        lambda: sa.study([PLAIN, PLAIN]),
        ValueError,
        "heads must have distinct names, got 'x' twice; give each problem a name of its own",
    ),
    (
        lambda: sa.study(AttentionProblem(*BASE[0].arrays[:2], name="bare")),
        ValueError,
        "heads must have values for a study, got v=None in 'bare'; make the problem with its "
        "values",
    ),
    (
        lambda: sa.study(empty()),
        ValueError,
        "heads must have a query that sees a key, and values of width 1 or more, got n_q = 0, 3 "
        "visible keys and d_v = 2 in 'none'; leave it out",
    ),
    (
        lambda: sa.study(hidden()),
        ValueError,
        "heads must have a query that sees a key, and values of width 1 or more, got n_q = 3, 0 "
        "visible keys and d_v = 2 in 'dark'; leave it out",
    ),
    (
        lambda: sa.study(narrow()),
        ValueError,
        "heads must have a query that sees a key, and values of width 1 or more, got n_q = 3, 3 "
        "visible keys and d_v = 0 in 'thin'; leave it out",
    ),
    (
        lambda: sa.study("minilmm"),
        ValueError,
        "name must be a bundled set of heads, got 'minilmm'; did you mean 'minilm'?",
    ),
    (
        lambda: sa.study("missing.npz"),
        ValueError,
        "path must be an existing file, got 'missing.npz'; check its folder and name",
    ),
    (
        lambda: sa.study(BASE, methods="unifrom"),
        ValueError,
        "method must be registered, got 'unifrom'; did you mean 'uniform'?",
    ),
    (
        lambda: sa.study(BASE, methods=3),  # type: ignore[arg-type]
        TypeError,
        "methods must be names, method objects or a mapping from labels to these, got int; see "
        "sketchattn.methods()",
    ),
    (
        lambda: sa.study(BASE, methods=[3]),  # type: ignore[list-item]
        TypeError,
        "method must be a name or a method object, got int; see sketchattn.methods()",
    ),
    (
        lambda: sa.study(BASE, methods=[("a", "uniform", 1)]),  # type: ignore[list-item]
        ValueError,
        "methods must be pairs (label, method) where they are tuples, got 3 entries; write "
        "('label', method)",
    ),
    (
        lambda: sa.study(BASE, methods={"": "uniform"}),
        TypeError,
        "methods must have labels that are strings, got ''; name the variant",
    ),
    (
        lambda: sa.study(BASE, methods={"svd": "uniform"}),
        ValueError,
        "methods must not use the label of a reference for another method, got 'svd'; choose "
        "another label",
    ),
    (
        lambda: sa.study(BASE, methods=["uniform", sa.UniformColumns(rank=2)]),
        ValueError,
        "methods must have distinct labels, got 'uniform' twice; pass pairs (label, method)",
    ),
    (
        lambda: sa.study(BASE, methods=[]),
        ValueError,
        "methods must hold at least one method, got none; leave methods out",
    ),
    (
        lambda: sa.study(BASE, methods=[sa.UniformColumns(rank=2, estimator="x")]),
        ValueError,
        "methods must honour all heads, got 'uniform' with head 'clustered/head0': estimator must "
        "be one of self-normalized, horvitz-thompson, got 'x'; choose one of horvitz-thompson, "
        "self-normalized",
    ),
    (
        lambda: sa.study(BASE, ranks=[2, 25]),
        ValueError,
        "ranks must be at most n_k = 24 of head 'clustered/head0', got 25; lower it or leave the "
        "head out",
    ),
    (
        lambda: sa.study(BASE, ranks=[0]),
        ValueError,
        "ranks must be at least 1, got 0; give ranks as integers, or as shares of n_k such as 0.1",
    ),
    (
        lambda: sa.study(BASE, ranks=[2.0]),
        ValueError,
        "ranks must be integers or shares in (0, 1] of the keys of each head, got 2.0; write a "
        "rank without a point",
    ),
    (
        lambda: sa.study(BASE, ranks=[]),
        ValueError,
        "ranks must hold at least one number, got none; leave ranks out",
    ),
    (
        lambda: sa.study(BASE, ranks=[4, 2, 4]),
        ValueError,
        "ranks must be distinct, got 4 twice; delete one of them",
    ),
    (
        lambda: sa.study(BASE, ranks="8"),  # type: ignore[arg-type]
        TypeError,
        "ranks must be a sequence of integers, got str; put it into a list",
    ),
    (
        lambda: sa.study(BASE, seeds=0),
        ValueError,
        "seeds must be at least 1, got 0; seeds=1 is one run a cell",
    ),
    (
        lambda: sa.study(BASE, seeds=[-1]),
        ValueError,
        "seeds must be at least 0, got -1; give seeds as integers",
    ),
    (
        lambda: sa.study(BASE, seeds=True),
        TypeError,
        "seeds must be an integer, got bool; seeds=1 is one run a cell",
    ),
    (
        lambda: sa.study(BASE, jobs=0),
        ValueError,
        "jobs must be at least 1, got 0; jobs=1 computes one head after the other",
    ),
    (
        lambda: sa.study(BASE, jobs=1.5),  # type: ignore[arg-type]
        TypeError,
        "jobs must be an integer, got float; jobs=1 computes one head after the other",
    ),
    (
        lambda: sa.study(BASE, out=3),  # type: ignore[arg-type]
        TypeError,
        "out must be a path, got int; name a folder",
    ),
    (
        lambda: sa.study(BASE, out=__file__),
        ValueError,
        f"out must be a folder, got the file {__file__!r}; name another",
    ),
    (
        lambda: sa.study(BASE, resume=1),  # type: ignore[arg-type]
        TypeError,
        "resume must be a bool, got int; give True or False",
    ),
    (
        lambda: sa.study(BASE, pictures=None),  # type: ignore[arg-type]
        TypeError,
        "pictures must be a bool, got NoneType; give True or False",
    ),
    (
        lambda: sa.study(BASE, progress="yes"),  # type: ignore[arg-type]
        TypeError,
        "progress must be a bool, got str; give True or False",
    ),
    (
        lambda: sa.study(BASE, methods="jl", bounds="sketching.amm_markof"),
        ValueError,
        "bounds must be ids of claims, got 'sketching.amm_markof'; did you mean "
        "'sketching.amm_markov', 'sketching.amm_jl_moment', 'sketching.moment_haar', "
        "'sketching.moment_sparse' or 'sketching.moment_rademacher'?",
    ),
    (
        lambda: sa.study(BASE, methods="jl", bounds="sketching.amm_entrywise"),
        ValueError,
        "bounds must be claims about an error measure at each rank, got "
        "'sketching.amm_entrywise', which is about max_ij |err_ij| / (|A_i| |V_:j|); choose one "
        "of sketchattn.theory.error_bounds()",
    ),
    (
        lambda: sa.study(BASE, methods=["jl", "uniform"], bounds=["sketching.amm_markov"]),
        ValueError,
        "bounds must be about a method of the study, got 'sketching.amm_markov', which is about "
        "jl(sketch='countsketch'); add that method or leave the bound out",
    ),
    (
        lambda: sa.study(ZERO, methods="jl", ranks=[2], bounds=GAUSSIAN),
        ValueError,
        "bounds must apply to a head at one of the ranks, got 'sketching.amm_jl_moment', which "
        "applies to none; sketchattn.theory.check says why",
    ),
    (
        lambda: sa.study(BASE, methods="jl", bounds=[]),
        ValueError,
        "bounds must hold at least one id, got none; leave bounds out",
    ),
    (
        lambda: sa.study(BASE, methods="jl", bounds=3),  # type: ignore[arg-type]
        TypeError,
        "bounds must be ids of claims, got int; see sketchattn.theory.error_bounds()",
    ),
    (
        lambda: sa.study(BASE, methods="jl", bounds=[3]),  # type: ignore[list-item]
        TypeError,
        "bounds must hold strings, got int; see sketchattn.theory.error_bounds()",
    ),
]


@pytest.mark.parametrize(
    ("call", "kind", "message"), REFUSED, ids=[f"{i}" for i in range(len(REFUSED))]
)
def test_refusals(
    call: Callable[[], Any], kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object) -> None:
        raise AssertionError("work began before the refusal")

    monkeypatch.setattr(run_module, "run_head", work)
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        call()


def test_nothing_is_written_before_a_refusal(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(ValueError, match="ranks must be at most"):
        sa.study(BASE, ranks=[25], out=folder)
    assert not folder.exists()


# --- what is printed ----------------------------------------------------------------------------


def test_progress_is_shown_on_stderr_if_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path)
    assert capsys.readouterr() == ("", "")
    run(tmp_path, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{CELLS}/{CELLS}" in captured.err
    run(None, progress=True, jobs=2)
    assert f"{CELLS}/{CELLS}" in capsys.readouterr().err
    run(None, progress=False)
    assert capsys.readouterr() == ("", "")


def test_quantiles_agree_with_numpy_and_keep_infinities() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 5, 10):
        values = rng.standard_normal(size)
        levels = (0.0, 0.25, 0.5, 0.75, 1.0)
        # Both interpolate between the same two values: a rounding of each product and sum.
        np.testing.assert_allclose(
            quantiles(values.tolist(), levels), np.quantile(values, levels), rtol=1e-14, atol=1e-15
        )
    inf, nan = math.inf, math.nan
    assert quantiles([1.0, inf], (0.0, 0.5, 1.0)) == [1.0, inf, inf]
    assert quantiles([-inf, 1.0], (0.0, 0.5, 1.0)) == [-inf, -inf, 1.0]
    assert quantiles([inf, inf, inf], (0.25, 0.5)) == [inf, inf]
    assert quantiles([nan, 2.0, nan], (0.5,)) == [2.0]
    assert all(math.isnan(x) for x in quantiles([nan], (0.25, 0.5)))


def test_summary_has_methods_floors_and_predictors() -> None:
    result = run(None, methods=["uniform", "svd"])
    table = result.summary()
    assert list(table["method"]) == ["uniform"] * 3 + ["svd"] * 3 + ["topk"] * 3 + [
        "zero", "vmean", "exact",
    ]  # fmt: skip
    roles = ["method"] * 3 + ["floor"] * 6 + ["predictor"] * 2 + ["exact"]
    assert list(table["role"]) == roles
    assert table["rank"].tolist()[:9] == RANKS * 3
    assert table["rank"].isna().tolist() == [False] * 9 + [True] * 3
    own = result.frame[(result.frame["method"] == "uniform") & (result.frame["rank"] == 4)]
    row = table.iloc[1]
    for field in ("output_fro_rel", "matrix_fro_rel", "row_tv_mean", "skill"):
        for level, name in ((0.25, f"{field}_q25"), (0.5, field), (0.75, f"{field}_q75")):
            assert row[name] == pytest.approx(np.quantile(own[field], level), rel=1e-12)
    assert table["output_fro_rel"].iloc[9] == 1.0


def test_rendering_is_readable() -> None:
    text = run(None).render(every=True)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0] == (
        "3 heads, 1 method, 3 ranks, 3 seeds: medians [quartiles] over heads and seeds"
    )
    assert lines[2].split() == [
        "method", "rank", "output_fro_rel", "matrix_fro_rel", "row_tv_mean", "skill", "seconds",
    ]  # fmt: skip
    starts = [line.split()[0] for line in lines[3:] if line]
    assert starts[:11] == ["uniform"] * 3 + ["svd"] * 3 + ["topk"] * 3 + ["zero", "vmean"]
    assert re.search(r"^zero +1 \[1, 1\] +1 +", text, flags=re.MULTILINE)
