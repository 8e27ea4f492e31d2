"""Heads too long for their matrix: errors from a sample of rows, what is left out, what is said."""

from __future__ import annotations

import gc
import json
import math
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

import sketchattn as sa
from sketchattn.cli import main
from sketchattn.errors import sampled
from sketchattn.errors.reports import FIELDS
from sketchattn.problem import AttentionProblem
from sketchattn.studies import grid, plan
from sketchattn.studies.grid import LONG, default_ranks
from sketchattn.studies.plots import PICTURES
from sketchattn.studies.summary import COLUMNS, SAMPLED_COLUMNS, SHARE
from sketchattn.zoo import base as registry

MATRIX = ("matrix_fro_rel", "row_tv_mean", "row_kl_mean")
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "masked": {"key_mask": np.arange(96) % 3 > 0},
    "both": {"causal": True, "key_mask": np.arange(96) % 3 > 0},
    "rectangular": {"causal": "bottom-right"},
}


def head(case: str, n: int = 96, seed: int = 0) -> AttentionProblem:
    made = sa.make_heads("clustered", n=n, d=8, rng=seed)[0]
    q = made.q[:40] if case == "rectangular" else made.q
    return AttentionProblem(q, made.k, made.values, name=case, **CASES[case])


# --- the sample ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_exact_rows_and_means_are_those_of_the_matrix(case: str) -> None:
    problem = head(case)
    drawn = sampled.draw_rows(problem, 20)
    wide = problem.astype(np.float64)
    a = wide.exact.to_dense()
    # float64 all through: sums of n terms, each rounded.
    tolerance = 1e-12
    np.testing.assert_allclose(drawn.output, (a @ wide.values)[drawn.index], atol=tolerance)
    for part, rows in drawn.blocks():
        np.testing.assert_allclose(rows, a[drawn.index[part]], atol=tolerance)
    seen = problem.visible()[drawn.index]
    means = seen @ wide.values / seen.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(drawn.mean, means, atol=tolerance)
    assert len(set(drawn.index.tolist())) == 20
    assert sampled.draw_rows(problem, 20) is drawn
    assert problem.visible_counts()[drawn.index].min() > 0


@pytest.mark.parametrize("case", CASES)
def test_a_sample_of_all_but_one_row_is_nearly_the_report(case: str) -> None:
    problem = head(case)
    ahat = sa.UniformColumns(rank=24).approximate(problem, rng=0)
    whole = sa.error_report(problem, ahat)
    rows = sampled.seeing_rows(problem) - 1
    found = sampled.sampled_report(problem, rows, ahat)
    # The row that is missing is one of 40 or more, and none is ten times as wrong as the mean.
    for field in ("output_fro_rel", "output_fro_amm", "skill", *MATRIX):
        wanted = getattr(whole, field)
        assert getattr(found.report, field) == pytest.approx(wanted, rel=0.25), field
    assert found.low <= whole.output_fro_rel <= found.high
    assert all(math.isnan(getattr(found.report, field)) for field in sampled.UNKNOWN)
    without = sampled.sampled_report(problem, rows, output=ahat @ problem.values)
    assert (without.low, without.high) == (found.low, found.high)
    assert without.report.output_fro_amm == found.report.output_fro_amm
    assert all(math.isnan(getattr(without.report, field)) for field in MATRIX)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("renormalize", [True, False])
def test_the_floor_is_exact_on_the_sampled_rows(case: str, renormalize: bool) -> None:
    problem = head(case)
    found = sampled.sampled_topk(problem, 20, 8, renormalize=renormalize)
    ahat = sa.TopK(rank=8, renormalize=renormalize).approximate(problem.astype(np.float64))
    again = sampled.sampled_report(problem.astype(np.float64), 20, ahat)
    for field in ("output_fro_rel", "output_fro_amm", "skill", *MATRIX):
        # The same rows; a float32 input is widened exactly.
        assert getattr(found.report, field) == pytest.approx(
            getattr(again.report, field), rel=1e-9, abs=1e-12
        )
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_estimates_are_unbiased_and_intervals_hold_level_1e_6(global_random_seed: int) -> None:
    """Totals over all rows from samples; and no more misses than the confidence allows."""
    problem = head("causal", seed=global_random_seed)
    ahat = sa.UniformColumns(rank=16).approximate(problem, rng=global_random_seed)
    truth = sa.error_report(problem, ahat)
    a = problem.astype(np.float64).exact.to_dense()
    square = float((a * a).sum())
    trials, misses, totals = 200, 0, []
    for seed in range(trials):
        fresh = AttentionProblem(*problem.arrays, causal=True)
        drawn = sampled.draw_rows(fresh, 24, seed)
        totals.append(drawn.total((a[drawn.index] ** 2).sum(axis=1)))
        fresh._cache["row sample", 24, 0] = drawn  # the sample that the report takes
        found = sampled.sampled_report(fresh, 24, ahat, confidence=0.8)
        misses += not found.low <= truth.output_fro_rel <= found.high
    assert binomtest(misses, trials, 0.2, alternative="greater").pvalue > 1e-6
    error = np.std(totals) / math.sqrt(trials)
    assert abs(np.mean(totals) - square) < 6 * error


def test_what_cannot_be_measured_is_refused() -> None:
    problem = head("plain")
    bad = np.full((96, 96), np.nan)
    with pytest.raises(ValueError, match="must be finite"):
        sampled.sampled_report(problem, 20, bad)
    nothing = AttentionProblem(problem.q, problem.k, np.zeros_like(problem.values))
    with pytest.raises(ValueError, match="must not be zero"):
        sampled.sampled_report(nothing, 20, output=np.zeros((96, 8), np.float32))


# --- in a study ---------------------------------------------------------------------------------


def test_columns_at_the_end() -> None:
    assert COLUMNS[-3:] == SAMPLED_COLUMNS
    heads = [head("plain"), head("causal", n=96)]
    result = sa.study(heads, "uniform", [8], seeds=1)
    for frame in (result.frame, result.references):
        assert (frame["rows"] == 96).all()
        assert (frame["output_fro_rel_low"] == frame["output_fro_rel"]).all()
        assert (frame["output_fro_rel_high"] == frame["output_fro_rel"]).all()
    assert result.notes == ()


def test_rows_are_sampled_where_there_are_more(tmp_path: Path) -> None:
    short, long = head("plain", n=24), head("causal")
    options: dict[str, Any] = {"ranks": [4, 16], "seeds": 2, "out": tmp_path, "pictures": False}
    result = sa.study([short, long], "uniform", rows=40, **options)
    by_head = {name: part for name, part in result.frame.groupby("head")}
    assert by_head["plain"]["rows"].unique().tolist() == [24]
    assert by_head["causal"]["rows"].unique().tolist() == [40]
    for _, row in by_head["causal"].iterrows():
        ahat = sa.UniformColumns(rank=row["rank"]).approximate(long, rng=row["seed"])
        truth = sa.error_report(long, ahat).output_fro_rel
        assert row["output_fro_rel_low"] <= truth <= row["output_fro_rel_high"]
        assert row["output_fro_rel_low"] < row["output_fro_rel"] < row["output_fro_rel_high"]
        assert math.isnan(row["output_spec_rel"])
    floors = result.references.groupby("head")["method"].unique().apply(set).to_dict()
    assert floors["plain"] - floors["causal"] == {"svd", "exact"}
    assert "topk" in floors["causal"]
    assert any("svd is left out on the longer heads" in note for note in result.notes)
    assert "note: errors of the longer heads are from 40 exact rows" in str(result)
    assert json.loads((tmp_path / "study.json").read_text())["heads"][1]["rows"] == 40
    # Other ways to measure are other cells; the same way is the same rows.
    again = sa.study([short, long], "uniform", rows=40, **options)
    assert again.computed == 0
    assert again.frame.equals(result.frame)
    assert sa.study([short, long], "uniform", **options).computed > 0


def test_a_head_that_is_done_takes_no_memory() -> None:
    seen: list[weakref.ref[AttentionProblem]] = []
    ended: list[bool] = []

    class Watching(sa.UniformColumns):
        def _approximate(self, problem: AttentionProblem, draw: Any) -> Any:
            if not seen or seen[-1]() is not problem:
                ended.extend(x() is None for x in seen)
                seen.append(weakref.ref(problem))
            return super()._approximate(problem, draw)

    gc.disable()
    try:
        heads = [head(case) for case in ("plain", "causal", "masked")]
        options: dict[str, Any] = {"ranks": [4], "seeds": 1, "rows": 40, "jobs": 1}
        sa.study(heads, {"watching": Watching(rank=1)}, **options)
    finally:
        gc.enable()
    # Of two earlier heads the last may still be in the hands of what runs them.
    assert len(seen) == 3
    assert ended[1]


def test_floors_and_spectral_norms_may_be_left_out(tmp_path: Path) -> None:
    problem = head("plain")
    options = {"ranks": [8], "seeds": 1, "out": tmp_path, "pictures": False}
    whole = sa.study(problem, "uniform", **options)  # type: ignore[arg-type]
    for floors, wanted in ((False, set()), (("topk",), {"topk"}), ("svd", {"svd"})):
        found = sa.study(problem, "uniform", floors=floors, **options)  # type: ignore[arg-type]
        methods = set(found.references["method"])
        assert methods & {"svd", "topk"} == wanted
        assert {"zero", "vmean"} <= methods
        assert found.computed == 0  # cells that are there are taken
    bare = sa.study(problem, "uniform", floors=False, **(options | {"pictures": True}))  # type: ignore[arg-type]
    assert len(bare.pictures) == len(PICTURES)
    flat = sa.study(problem, "uniform", spectral=False, **options)  # type: ignore[arg-type]
    spectra = [field for field in FIELDS if "spec" in field]
    assert flat.frame[spectra].isna().all(axis=None)
    others = [field for field in FIELDS if field not in spectra]
    assert flat.frame[others].equals(whole.frame[others])
    assert not whole.frame[spectra].isna().any(axis=None)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"floors": 3}, TypeError, "floors must be True, False or names, got int; "),
        ({"floors": ("svdd",)}, ValueError, "floors must be a known name, got 'svdd'; did you"),
        ({"spectral": "no"}, TypeError, "spectral must be a bool, got str; "),
        ({"rows": 0}, ValueError, "rows must be at least 1, got 0; rows=512 samples"),
        ({"ranks": [0.0]}, ValueError, "ranks must be integers or shares in \\(0, 1\\]"),
        ({"ranks": [0.5, 0.5]}, ValueError, "ranks must be distinct, got 0.5 twice"),
        ({"ranks": [math.nan]}, ValueError, "ranks must be integers or shares in"),
        ({"ranks": [0.5, 1000]}, ValueError, "ranks must be at most n_k = 96 of head 'plain'"),
        ({"rows": 8, "methods": "jl", "bounds": "sketching.moment_gaussian"}, ValueError,
         "bounds must be of heads that are measured whole"),
    ],
)  # fmt: skip
def test_arguments_are_checked(options: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=f"^{text}"):
        sa.study(head("plain"), **({"methods": "uniform"} | options))


def test_shares_are_rounded_to_ranks_of_each_head() -> None:
    heads = [head("plain", n=10), head("causal", n=96)]
    result = sa.study(heads, "uniform", [0.01, 0.25, 1.0, 8], seeds=1, floors=False)
    ranks = result.frame.groupby("head", sort=False)["rank"].apply(list).to_dict()
    assert ranks == {"plain": [1, 3, 10, 8], "causal": [1, 24, 96, 8]}  # 2.5 becomes 3
    assert sa.study(heads[0], "uniform", 0.5, seeds=1, floors=False).frame["rank"].tolist() == [5]
    # Shares that are one rank on a head are one row.
    assert len(sa.study(heads[0], "uniform", [0.25, 0.3], seeds=1, floors=False).frame) == 1


def test_heads_are_long_from_a_length_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_ranks(LONG) == [64, 128, 256, 512, 1024]
    assert default_ranks(LONG - 1)[-1] == LONG // 4
    monkeypatch.setattr(plan, "LONG", 64)
    monkeypatch.setattr(plan, "LONG_ROWS", 32)
    for name in grid.default_methods():  # the others would only take time here
        if name not in ("uniform", "jl"):
            monkeypatch.delitem(registry._REGISTRY, name)
    result = sa.study(head("plain"), ranks=[8], seeds=1)
    assert result.frame["rows"].tolist() == [32]
    assert set(result.frame["method"]) == {"uniform"}
    assert result.left_out["jl"] == (
        "it computes all 96 x 96 logits of 'plain'; name it in methods to run it all the same"
    )
    assert sa.study(head("plain"), "jl", [8], seeds=1).frame["rows"].tolist() == [32]


def test_quadratic_methods_say_so() -> None:
    said = {name for name in sa.methods() if grid.by_name(name, 8).traits.quadratic}
    assert said >= {"exact", "svd", "topk", "jl", "column_sampling", "compressed", "magicpig"}
    assert not said & {"uniform", "skeinformer", "nystromformer", "performer", "vmean", "zero"}
    assert not sa.ColumnSampling(rank=8, law="uniform", normalizer="sampled").traits.quadratic


def test_causal_heads_choose_causal_methods() -> None:
    heads = [head("plain"), head("causal")]
    result = sa.study(heads, ranks=[8], seeds=1, floors=False, spectral=False)
    chosen = set(result.frame["method"])
    assert chosen
    assert all(grid.by_name(name, 8).traits.causal for name in chosen)
    assert result.left_out["linformer"] == "it sees all keys, and 'causal' is causal"
    assert "causal_tree" in chosen
    only = sa.study(head("plain"), ranks=[8], seeds=1, floors=False, spectral=False)
    assert "linformer" in set(only.frame["method"])
    assert "causal_tree" in only.left_out


# --- what is said -------------------------------------------------------------------------------


def test_a_large_head_is_told_what_takes_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "LARGE", 64)
    options: dict[str, Any] = {"ranks": [8], "seeds": 1, "progress": True}
    sa.study(head("plain"), "uniform", **options)
    assert capsys.readouterr().err.startswith(
        "study: each cell compares all 96 x 96 entries of 'plain'; svd, topk, spectral norms take "
        "longest: rows=512 (--rows 512) takes a sample of rows and floors=False (--no-floors) and "
        "spectral=False (--no-spectral) leave out what is dearest\n"
    )
    sa.study(head("plain"), "uniform", floors=False, spectral=False, **options)
    assert "take longest" not in capsys.readouterr().err
    for quiet in ({"rows": 20}, {"progress": False}):
        sa.study(head("plain"), "uniform", **(options | quiet))
        assert "each cell compares" not in capsys.readouterr().err
    monkeypatch.setattr(plan, "LARGE", 96)
    sa.study(head("plain"), "uniform", **options)
    assert "each cell compares" not in capsys.readouterr().err


class Slow(sa.UniformColumns):
    """Takes two looks of the bar."""

    def _draw(self, problem: AttentionProblem, rng: np.random.Generator) -> sa.Draw:
        time.sleep(0.5)
        return super()._draw(problem, rng)


@pytest.mark.parametrize("out", [False, True])
def test_the_bar_names_what_is_in_work(
    out: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path if out else None
    options: dict[str, Any] = {"ranks": [8], "seeds": 1, "pictures": False}
    sa.study(head("plain"), {"slow": Slow(rank=8)}, out=folder, progress=True, **options)
    assert "plain: slow at rank 8" in capsys.readouterr().err
    assert not list(tmp_path.glob("cells/*.now"))


def test_options_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["study", "clustered:n=96,d=8", "--methods", "uniform", "--ranks", "8,.25"]
    rest = ["--seeds", "1", "--jobs", "1", "--no-pictures", "--json", "--out", str(tmp_path)]
    assert main([*words, *rest, "--rows", "24"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "from 24 exact rows" in found["notes"][0]
    assert {row["rank"] for row in found["summary"]} >= {8, 24}
    assert main([*words, *rest, "--no-floors", "--no-spectral"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["method"] for row in found["summary"]}.isdisjoint({"svd", "topk"})
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert lines[0].split(",") == [*COLUMNS, SHARE]
    assert lines[1].split(",")[COLUMNS.index("output_spec_rel")] == "nan"
