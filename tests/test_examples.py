"""The examples: what they print is what they computed, and they run on a file of heads."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from method_cases import dense_attention
from packaging_checks import ROOT

import sketchattn as sa
from sketchattn.zoo import base as registry


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def some_heads(folder: Path, causal: bool = False) -> Path:
    made = sa.make_heads("clustered", n=24, d=4, heads=2, rng=0)
    heads = [sa.AttentionProblem(*p.arrays, causal=causal) for p in made]
    path = folder / "heads.safetensors"
    sa.write_heads(path, heads)
    return path


class Run:
    """Run an example as its command does, in an empty folder, and return what it prints."""

    def __init__(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys

    def __call__(self, name: str, *arguments: str) -> str:
        self.monkeypatch.chdir(self.folder)
        self.monkeypatch.setattr(sys, "argv", [name, *arguments])
        load(name).main()
        return self.capsys.readouterr().out


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("causal", [False, True])
def test_three_ranks_by_their_formulas(causal: bool) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (1.5 * rng.standard_normal((20, 4)) for _ in range(3))
    problem = sa.AttentionProblem(q, k, v, causal=causal, name="one")
    module = load("three_ranks")
    spectrum, rows = module.compare(problem, [1, 2, 4, 6])
    a = dense_attention(problem)
    logits = q @ (k - k.mean(axis=0)).T / 2
    sigma = np.linalg.svd(a, compute_uv=False)
    assert np.allclose(spectrum["sigma A"], sigma, rtol=0, atol=1e-13)
    assert spectrum["rank A"] == np.linalg.matrix_rank(a, tol=0.01 * sigma[0])
    assert spectrum["rank L"] == 4
    count = spectrum["99 % of A"]
    squares = np.cumsum(sigma**2) / np.sum(sigma**2)
    assert squares[count - 1] >= 0.99 > (0 if count == 1 else squares[count - 2])
    left, s, right = np.linalg.svd(logits)
    see = np.tril(np.ones((20, 20), bool)) if causal else np.ones((20, 20), bool)
    for row in rows:
        r = row["rank"]
        assert row["A_r"] == pytest.approx(np.sqrt(np.sum(sigma[r:] ** 2) / np.sum(sigma**2)))
        # The best logits of rank r, from their decomposition as a matrix; from rank d on, all.
        best = (left[:, :r] * s[:r]) @ right[:r]
        weights = np.where(see, np.exp(best), 0)
        weights /= weights.sum(axis=1, keepdims=True)
        assert row["L_r"] == pytest.approx(
            np.linalg.norm(weights - a) / np.linalg.norm(a), abs=1e-12
        )
        assert row["L_r output"] == pytest.approx(
            np.linalg.norm(weights @ v - a @ v) / np.linalg.norm(a @ v), abs=1e-12
        )
        assert row["L_r TV"] == pytest.approx(np.abs(weights - a).sum(axis=1).mean() / 2, abs=1e-12)
        change = best - logits
        high, low = (f(np.where(see, change, np.nan), axis=1) for f in (np.nanmax, np.nanmin))
        assert row["bound"] == pytest.approx(np.tanh((high - low) / 4).mean(), abs=1e-12)
        assert row["L_r TV"] <= row["bound"] + 1e-12
    # Both are exact at the end, the logits at d = 4 and the matrix at n = 20 only.
    assert rows[2]["L_r"] < 1e-12 < rows[2]["A_r"]


@pytest.mark.parametrize("causal", [False, True])
def test_three_ranks_runs(tmp_path: Path, run: Run, causal: bool) -> None:
    import pandas as pd

    path = some_heads(tmp_path, causal)
    printed = run("three_ranks", "--heads", str(path), "--ranks", "1,4", "--rank", "2")
    frame: Any = pd.read_csv(tmp_path / "three-ranks" / "errors.csv")
    assert sorted(set(frame["rank"])) == [1, 2, 4]
    assert len(frame) == 2 * 3
    assert "2 heads, n = 24, d = 4" in printed
    assert (tmp_path / "three-ranks" / "ranks.png").stat().st_size > 10_000
    one = frame[(frame["rank"] == 2)].iloc[0]
    assert f"{one['A_r']:.3f}" in printed


def test_skeinformer_figure_runs(tmp_path: Path, run: Run) -> None:
    path = some_heads(tmp_path)
    options = ["--heads", str(path), "--ranks", "4,8", "--seeds", "1", "--out", "figure"]
    printed = run("skeinformer_figure1", *options)
    assert "2 heads, n = 24, d = 4" in printed
    assert (tmp_path / "figure" / "errors.png").stat().st_size > 10_000


@pytest.mark.parametrize("causal", [False, True])
def test_combiner_patterns_runs(tmp_path: Path, run: Run, causal: bool) -> None:
    import pandas as pd

    path = some_heads(tmp_path, causal)
    printed = run("combiner_patterns", "--heads", str(path))
    assert "2 heads, n = 24, d = 4" in printed
    frame: Any = pd.read_csv(tmp_path / "combiner-patterns" / "errors.csv")
    assert {"fixed", "routing", "axial mixture", "top keys", "mean of V"} <= set(frame["family"])
    assert (tmp_path / "combiner-patterns" / "errors.png").stat().st_size > 10_000
    # Spans of all keys are exact, and slots are those of the plan.
    first = sa.read_heads(path)[0]
    one = frame[(frame["family"] == "fixed") & (frame["choice"] == "block=4")].iloc[0]
    ahat: Any = sa.Combiner(block=4).approximate(first)
    assert one["slots"] == pytest.approx(ahat.plan.slots / 24)
    gap = np.abs(ahat.to_dense() - dense_attention(first)).sum(axis=1).mean() / 2
    assert one["row_tv_mean"] == pytest.approx(gap, rel=1e-3)


def test_certificates_of_combiner_patterns_are_above_the_truth(tmp_path: Path, run: Run) -> None:
    import pandas as pd

    printed = run("combiner_patterns", "--heads", str(some_heads(tmp_path)), "--certificates")
    assert "rows whose certificate is below the truth: 0 of" in printed
    frame: Any = pd.read_csv(tmp_path / "combiner-patterns" / "certificates.csv")
    assert (frame["truth"] <= frame["certificate"] + 1e-9).all()
    assert (tmp_path / "combiner-patterns" / "certificates.png").stat().st_size > 10_000


def test_combiner_default_compares_with_the_default(tmp_path: Path, run: Run) -> None:
    printed = run("combiner_default", "--first", "1", "--spans", "32", "--budgets", "64")
    assert "1 heads, n = 512, d = 32, causal: reference, spans of 32" in printed
    line = next(x for x in printed.splitlines() if x.startswith("global_mean "))
    assert " 1.000 " in line
    assert "global_mean *" in printed
    assert (tmp_path / "combiner-default" / "errors.csv").exists()


# --- the code of the documentation ----------------------------------------------------------------


def test_the_code_of_the_page_on_low_rank_methods_prints_what_it_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (ROOT / "docs" / "low-rank.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "python", "text"]
    exec(blocks[0][1], {})
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == [
        "nystromformer", "performer", "clustered", "dba", "compressed", "compressed",
    ]  # fmt: skip
    exec(blocks[1][1], {})
    assert capsys.readouterr().out == blocks[2][1]


def test_the_code_of_the_page_on_combiner_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "combiner.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    exec(blocks[0], {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 5
    assert printed[0].startswith("47 slots a row")


def test_training_free_methods_are_compared(run: Run) -> None:
    heads = str(some_heads(run.folder))
    out = run("training_free", "--heads", heads, "--ranks", "4,8", "--seeds", "1", "--out", "made")
    assert (run.folder / "made/errors.png").stat().st_size > 0
    lines = {line.split()[0]: line for line in out.splitlines() if line[:1].isalpha()}
    assert {"vmean", "topk", "wildcat", "hyperattention", "skeinformer"} <= set(lines)
    assert all("-" not in line.split("[")[1] for line in (lines["wildcat"], lines["thinformer"]))
    problem = sa.read_heads(heads)[0]
    frame = pd.read_csv(run.folder / "made/errors.csv")
    found = frame[(frame["method"] == "vmean") & (frame["head"] == problem.name)]["error"].iloc[0]
    truth = dense_attention(problem) @ problem.values
    wanted = np.linalg.norm(problem.values.mean(axis=0) - truth) / np.linalg.norm(truth)
    assert abs(found - wanted) <= 1e-5


def test_causal_heads_are_compared_by_causal_methods(run: Run) -> None:
    heads = str(some_heads(run.folder, causal=True))
    out = run("training_free", "--heads", heads, "--ranks", "4", "--seeds", "1", "--no-floors")
    assert "causal_tree" in out
    assert "wildcat" not in out.replace("causal_tree", "")
    assert "svd" not in out


def test_long_heads_are_measured_on_a_sample(run: Run) -> None:
    said = run("long_heads", "--small", "--methods", "uniform", "--out", "o")
    frame = pd.read_csv(run.folder / "o" / "results.csv")
    assert frame["rows"].unique().tolist() == [64]
    assert (frame["output_fro_rel_low"] <= frame["output_fro_rel"]).all()
    assert (frame["output_fro_rel"] <= frame["output_fro_rel_high"]).all()
    beside = pd.read_csv(run.folder / "o" / "references.csv")
    assert {"topk", "zero", "vmean"} <= set(beside["method"])
    assert "svd" not in set(beside["method"])
    assert "note: errors of all heads are from 64 exact rows" in said
    assert re.search(r"^\d+ s, .+ at most$", said, flags=re.MULTILINE)


# --- the frontier ---------------------------------------------------------------------------------


def read_frontier(folder: Path) -> Any:
    frame = pd.read_csv(folder / "results.csv")
    frame["reason"] = frame["reason"].astype(object).fillna("")
    return frame


def test_every_registered_method_is_on_the_frontier_or_listed(run: Run) -> None:
    class Tomorrow(sa.UniformColumns):
        pass

    run.monkeypatch.setitem(registry._REGISTRY, "tomorrow", Tomorrow)
    heads = str(some_heads(run.folder))
    said = run("frontier", "--quick", "--heads", heads, "--n", "24", "--out", "made")
    frame = read_frontier(run.folder / "made")
    for causal in (False, True):
        here = frame[frame["causal"] == causal]
        assert set(here["method"]) == set(sa.methods())
        assert "tomorrow" in set(here[here["status"] == "measured"]["method"])
    measured = frame["status"] == "measured"
    assert (frame["reason"][~measured] != "").all()
    refused = frame[(frame["method"] == "wildcat") & frame["causal"]]
    assert refused["reason"].str.startswith("causal must be False").all()
    assert np.isfinite(frame[measured & (frame["role"] != "floor")]["share"]).all()
    for label in ("nearfar(preset=fast)", "wildcat(preset=paper)", "causal_tree(inner=uniform)"):
        assert label in set(frame["setting"])
    assert "there is nothing of clustered (causal must be False" in said
    assert "heads, n = 24, causal" in said
    assert (run.folder / "made/heads.svg").stat().st_size > 10_000
    # What it measures is the error of the output, against the plain formula.
    wanted = []
    for problem in sa.read_heads(heads):
        truth = dense_attention(problem) @ problem.values
        wanted.append(np.linalg.norm(problem.values.mean(axis=0) - truth) / np.linalg.norm(truth))
    own = frame[(frame["method"] == "vmean") & ~frame["causal"]].iloc[0]
    assert abs(own["error"] - np.median(wanted)) <= 1e-5
    assert abs(own["worst"] - max(wanted)) <= 1e-5


def test_a_method_with_presets_says_what_they_are() -> None:
    module = load("frontier")
    for name, cls in sa.methods().items():
        if "preset" in cls._get_param_names():
            assert len(module.labels_of(name, causal=False)) > 1, name


def planted(name: str, share: float, error: float, **more: Any) -> dict[str, Any]:
    row = {"set": "s", "n": 4096, "causal": True, "rotary": True, "made": "", "d": 4, "heads": 2}
    row |= {"method": name, "setting": name, "rank": math.nan, "role": "method", "reason": ""}
    row |= {"status": "measured", "share": share, "share_one": share, "error": error}
    return row | {"worst": 2 * error} | more


def test_the_front_is_what_no_other_setting_beats() -> None:
    module, rng = load("frontier"), np.random.default_rng(0)
    for _ in range(20):
        # Few values, so that there are ties in time, in error and in both.
        points = rng.integers(1, 6, (12, 2)) / 8
        rows = [planted(f"m{i}", *map(float, p)) for i, p in enumerate(points)]
        found = {(x["share"], x["error"]) for x in module.pareto(rows)}
        beaten = [
            any((q <= p).all() and (q < p).any() for q in points) for p in points
        ]  # fmt: skip
        assert found == {tuple(p) for p, b in zip(points.tolist(), beaten, strict=True) if not b}


def test_verdicts_compare_with_the_best_in_no_more_time() -> None:
    module = load("frontier")
    rows = [
        planted("nearfar", 0.3, 0.02),
        planted("quick", 0.1, 0.2),
        planted("good", 0.29, 0.08, worst=0.9),
        planted("slower", 0.4, 0.001),
        planted("left", 0.2, 0.001, status="slow"),
        planted("topk", 0.2, 0.001, role="floor"),
        planted("exact", 1.0, 0.0, role="exact"),
    ]
    (row,) = module.verdicts(rows)
    assert (row["rival"], row["least_worst_rival"]) == ("good", "quick")
    assert row["ratio"] == pytest.approx(0.25)
    assert row["ratio_worst"] == pytest.approx(0.1)
    assert (row["verdict"], row["met"]) == ("wins", "met")
    # Half the error is enough for an encoder, and not with a mask of order.
    rows[0] |= {"error": 0.035}
    assert module.verdicts(rows)[0]["met"] == "missed"
    encoder = [row | {"causal": False, "rotary": False} for row in rows]
    assert module.verdicts(encoder)[0]["met"] == "met"
    # One thread is enough to be as quick.
    rows[3] |= {"share_one": 0.3}
    assert module.verdicts(rows)[0]["verdict"] == "loses"
    rows[3] |= {"error": 0.02, "worst": 0.3, "share_one": 0.4}
    rows[0] |= {"error": 0.0795, "worst": 0.9}
    assert module.verdicts(rows)[0]["verdict"] == "ties (worst head loses)"


@pytest.mark.parametrize("fault", ["slow", "wrong"])
def test_a_bad_nearfar_loses(run: Run, fault: str) -> None:
    attend = sa.NearFar._attend_with_lse

    def bad(self: sa.NearFar, problem: sa.AttentionProblem, draw: Any) -> Any:
        if fault == "slow":
            time.sleep(0.02)
            return attend(self, problem, draw)
        out, lse = attend(self, problem, draw)
        return 10 * out, lse

    run.monkeypatch.setattr(sa.NearFar, "_attend_with_lse", bad)
    heads = str(some_heads(run.folder))
    options = ("--quick", "--heads", heads, "--n", "24", "--methods", "vmean")
    said = run("frontier", *options, "--out", "made")
    found = pd.read_csv(run.folder / "made/verdicts.csv")
    assert found["verdict"].tolist() == ["loses"] * len(found)
    assert f"does not win, in {len(found)} of the {len(found)} lines" in said


def test_what_is_slower_than_exact_attention_is_listed_with_its_time(run: Run) -> None:
    attend = sa.UniformColumns.attend

    def slow(self: sa.UniformColumns, *arguments: Any, **options: Any) -> Any:
        time.sleep(0.05)
        return attend(self, *arguments, **options)

    run.monkeypatch.setattr(sa.UniformColumns, "attend", slow)
    options = ("--n", "24", "--methods", "uniform", "--rounds", "1", "--out", "made")
    said = run("frontier", "--heads", str(some_heads(run.folder)), *options)
    frame = read_frontier(run.folder / "made")
    for _, part in frame[frame["method"] == "uniform"].groupby("causal"):
        assert part["status"].tolist() == ["slow"] * 4
        assert re.fullmatch(r"takes [\d.e+]+ of exact's time", part["reason"].iloc[0])
        assert part["share"].iloc[0] > 1.5
        assert part["reason"].iloc[1] == "at rank 1 it takes more than 1.5 of exact's time"
    # Settings of nearfar, exact attention and predictors are there whatever they take.
    assert set(frame["method"]) == {"nearfar", "exact", "vmean", "zero", "uniform"}
    assert (frame[frame["method"] != "uniform"]["status"] == "measured").all()
    assert "there is nothing of uniform (takes" in said
    assert "8 settings were left because they take 1.5 times as long" in said


def test_only_what_is_far_from_the_front_is_measured_less() -> None:
    module = load("frontier")
    rows = [planted("a", 0.1, 0.1), planted("nearfar", 0.01, 0.01)]
    assert module.is_beaten(planted("b", 0.21, 0.16), rows)
    assert not module.is_beaten(planted("b", 0.19, 0.16), rows)
    assert not module.is_beaten(planted("b", 0.21, 0.14), rows)
    assert not module.is_beaten(planted("nearfar", 1.0, 1.0), rows)
    # A round a head and number of threads; more seeds where heads are few.
    assert list(module.visits_of(2, 1, [1, 2])) == [(0, 0, 1), (0, 1, 2), (1, 0, 1), (1, 1, 2)]
    assert len(list(module.visits_of(1, 3, [1, 2]))) == 6
    assert {seed for _, seed, _ in module.visits_of(1, 3, [1, 2])} == set(range(6))


def test_lengths_of_the_frontier_are_there_or_made_or_left_out() -> None:
    module = load("frontier")
    heads = list(sa.make_heads("gaussian", n=8, d=4, heads=5, rng=0))
    causal = [sa.AttentionProblem(*p.arrays, causal=True) for p in heads]
    assert [x.n_k for x in module.made_of({8: heads}, 8)[0]] == [8] * 5
    short, made = module.made_of({8: heads, 16: heads}, 6)
    assert [x.n_k for x in short] == [6] * 5
    assert made == "the first 6 positions of 8"
    assert module.made_of({8: heads}, 16)[0] == []
    long, made = module.made_of({8: causal}, 16)
    assert [x.n_k for x in long] == [16] * 2
    assert made == "2 heads of 8 in a row"
    assert np.array_equal(long[1].k, np.concatenate([causal[2].k, causal[3].k]))
    assert module.made_of({8: causal}, 100)[0] == []


def test_the_page_of_the_frontier_is_written_between_its_marks(run: Run) -> None:
    heads = str(some_heads(run.folder))
    page = run.folder / "page.md"
    page.write_text("before\n<!-- frontier -->\nold\n<!-- end -->\nafter\n", encoding="utf-8")
    run("frontier", "--quick", "--heads", heads, "--n", "24", "--methods", "vmean", "--out", "made")
    run("frontier", "--results", "made", "--page", str(page))
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- frontier -->\n| heads | time of `nearfar` |")
    assert "\n**heads, n = 24, no mask**: 2 heads, d = 4\n" in text
    assert text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text
    assert page.with_suffix(".svg").read_text(encoding="utf-8").count("nearfar") >= 1


def test_the_page_of_the_frontier_has_what_the_command_writes() -> None:
    text = (ROOT / "docs" / "frontier.md").read_text(encoding="utf-8")
    inside = text.partition("<!-- frontier -->")[2].partition("<!-- end -->")[0]
    assert "| nearfar | time [one thread] |" in inside
    assert "python examples/frontier.py" in inside
    assert (ROOT / "docs" / "frontier.svg").stat().st_size < 150_000
