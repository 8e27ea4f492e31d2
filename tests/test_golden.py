"""Golden vectors: their bytes do not depend on the machine, and they catch wrong programs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from packaging_checks import ROOT

import sketchattn as sa
from sketchattn.cli import main
from sketchattn.testing import GoldenCase, check_golden, read_golden, write_golden
from sketchattn.testing.inputs import rounded
from sketchattn.testing.lattice import (
    MARGIN,
    STEP,
    clearance,
    normals,
    on_lattice,
    raised,
    words,
)
from sketchattn.testing.settling import PINNED, Trial, make_case
from sketchattn.testing.vectors import case_bytes, exact_specs, specs

Array = NDArray[Any]

EXACT = [spec.name for spec in exact_specs()]
# A case of each kind of draw: none, indices, indices and numbers, dense matrices.
FEW = "exact-*,skeinformer-*,uniform-*,column_sampling-plain,jl-gqa,linformer-plain,topk-causal"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("golden")
    write_golden(path, cases=FEW)
    return path


@pytest.fixture(scope="module")
def cases(folder: Path) -> dict[str, GoldenCase]:
    return read_golden(folder)


def narrow(x: Array, dtype: str) -> Array:
    """Return numbers in a precision; bfloat16 as float32 with numbers that are exact in it."""
    return rounded(x, dtype) if dtype == "bfloat16" else x.astype(dtype)


def solve(case: GoldenCase, dtype: str = "float32", **changes: Any) -> Array:
    """Return what this library computes in a precision, with other options than the case's."""
    case = replace(case, **changes)
    kind = np.dtype("float32" if dtype == "bfloat16" else dtype)
    if case.method == "exact":
        q, k, v = (x.astype(kind) for x in (case.q, case.k, case.v))
        return narrow(sa.attention(q, k, v, **case.options()), dtype)
    method = sa.methods()[case.method](**case.parameters)
    pairs = zip(case.problems(kind), case.draws, strict=True)
    return narrow(np.stack([method.attend(p, draw=draw) for p, draw in pairs]), dtype)


# --- numbers that do not depend on the machine --------------------------------------------------


def test_raw_words_are_those_of_philox() -> None:
    # The known answers of the generator; the key of a name is the start of its digest.
    assert np.random.Philox(key=0).random_raw(2).tolist() == [
        0x02F4BA6408E4D89B,
        0x3DD62B0B9CA8C5B2,
    ]
    assert [hex(x) for x in words("sketchattn", 2)] == ["0xee42c7af79956d9f", "0x496d3cea70a509b0"]


def test_inputs_are_exact_in_every_precision_and_nearly_normal() -> None:
    x = normals("test", (400, 50))
    assert x.dtype == np.float64
    for dtype in ("float32", "float16", "bfloat16"):
        assert np.array_equal(narrow(x, dtype).astype(np.float64), x)
    # 20000 numbers: five standard errors of mean and variance.
    assert abs(x.mean()) < 5 / 20000**0.5
    assert abs(x.var() - 1) < 5 * (2 / 20000) ** 0.5
    assert 3 < np.abs(x).max() < 6


def test_results_lie_on_the_lattice_and_far_from_its_boundaries() -> None:
    x = np.array([0.3, -1.7, 0.0, np.inf])
    assert np.array_equal(on_lattice(x)[2:], x[2:])
    assert np.abs(on_lattice(x)[:2] - x[:2]).max() <= STEP / 2
    assert (on_lattice(x)[:2] / STEP % 1 == 0).all()
    assert clearance(np.array([0.0, np.inf])) == 0.5
    assert clearance(np.array([0.5 * STEP])) == 0.0
    assert raised(0.1) >= 0.1 > raised(0.1) * (1 - 2**-5)


@pytest.mark.parametrize("name", ["exact-everything", "skeinformer-key_mask", "jl-plain"])
def test_last_bits_do_not_show(name: str) -> None:
    spec = next(spec for spec in specs() if spec.name == name)
    case, attempt = make_case(spec)
    assert isinstance(case, GoldenCase)
    assert attempt == PINNED.get(name, 0)
    rng = np.random.default_rng(0)

    def moved(size: float) -> GoldenCase:
        trial = Trial(spec, attempt)
        for x in trial.results:
            if x is not None:
                x *= 1 + size * rng.uniform(-1, 1, x.shape)
        return trial.finished(case.step)

    for _ in range(5):
        other = moved(1e-13)
        for label in ("out", "lse", "matrix"):
            assert np.array_equal(getattr(other, label), getattr(case, label)) or (
                getattr(case, label) is None
            )
        assert other.tolerance == case.tolerance
    # What is not a last bit shows.
    assert not np.array_equal(moved(1e-8).out, case.out)


def test_inputs_whose_results_are_near_a_boundary_are_not_used() -> None:
    spec = next(spec for spec in exact_specs() if spec.name == "exact-gqa")
    assert PINNED["exact-gqa"] > 0
    for attempt in range(PINNED["exact-gqa"]):
        assert not Trial(spec, attempt).clear(STEP, MARGIN)
    # The search that made the table finds it again.
    assert make_case(spec, search=True)[1] == PINNED["exact-gqa"]


def test_the_same_files_with_other_threads_and_another_blas(folder: Path, tmp_path: Path) -> None:
    some = "exact-*,skeinformer-key_mask,jl-gqa"
    settings = {
        "NUMBA_NUM_THREADS": "3",
        "OPENBLAS_NUM_THREADS": "2",
        "OPENBLAS_CORETYPE": "Prescott",  # an x86 without AVX, where OpenBLAS can choose
    }
    code = f"import sys, sketchattn as sa; sa.testing.write_golden(sys.argv[1], cases={some!r})"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        check=True,
        env=os.environ | settings | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    written = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(written) > 20
    for name in written:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.slow
def test_the_whole_set_is_small_and_covers_every_method(tmp_path: Path) -> None:
    write_golden(tmp_path / "one")
    write_golden(tmp_path / "two")
    one, two = (sorted((tmp_path / x).iterdir()) for x in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))
    assert sum(path.stat().st_size for path in one) < 2_000_000
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert manifest["left_out"] == {}
    # All are as well conditioned as the finest lattice needs.
    assert {entry["step"] for entry in manifest["cases"]} == {STEP}
    assert {entry["method"] for entry in manifest["cases"]} == set(sa.methods())


def test_every_method_has_the_cases_that_its_traits_allow() -> None:
    names = {spec.name for spec in specs()}
    for name in sa.methods():
        assert {f"{name}-plain", f"{name}-gqa"} <= names
    assert {"skeinformer-causal", "performer-causal", "topk-causal"} <= names
    assert "linformer-causal" not in names


def test_a_new_method_enters_without_change(monkeypatch: pytest.MonkeyPatch) -> None:
    from sketchattn.zoo import base

    class Twice(sa.UniformColumns):
        pass

    monkeypatch.setitem(base._REGISTRY, "twice", Twice)
    monkeypatch.setattr(Twice, "name", "twice")
    spec = next(spec for spec in specs() if spec.name == "twice-key_mask")
    case, _ = make_case(spec)
    assert isinstance(case, GoldenCase)
    assert case_bytes(case) == case_bytes(make_case(spec)[0])  # type: ignore[arg-type]


def test_a_result_that_last_bits_decide_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from sketchattn.zoo import base

    class Steep(sa.UniformColumns):
        """Amplify whatever it is given."""

        def _attend(self, problem: Any, draw: Any) -> Array:
            return np.asarray(np.sin(1e9 * super()._attend(problem, draw)))

    monkeypatch.setitem(base._REGISTRY, "steep", Steep)
    monkeypatch.setattr(Steep, "name", "steep")
    spec = next(spec for spec in specs() if spec.name == "steep-gqa")
    case, _ = make_case(spec)
    assert isinstance(case, str)
    assert "amplified" in case


# --- what is in them ------------------------------------------------------------------------------


def test_results_are_those_of_the_library(cases: dict[str, GoldenCase]) -> None:
    for case in cases.values():
        assert np.abs(solve(case, "float64") - case.out).max() <= case.step, case.name
        if case.matrix is not None:
            assert np.abs(case.matrix @ case.v - case.out).max() < 50 * case.step, case.name


def test_results_of_exact_attention_are_those_of_the_formula(cases: dict[str, GoldenCase]) -> None:
    for name in EXACT:
        case = cases[name]
        assert case.lse is not None
        for h in range(len(case.q)):
            for i in range(case.q.shape[1]):
                out, lse = one_row(case, h, i)
                assert np.abs(out - case.out[h, i]).max() < 2 * case.step, name
                assert lse == case.lse[h, i] or abs(lse - case.lse[h, i]) < 2 * case.step, name


def one_row(case: GoldenCase, h: int, i: int) -> tuple[Array, float]:
    """Return a row of the output and its logsumexp, written from the definition."""
    logits, seen = [], []
    for j in range(case.k.shape[1]):
        p = i + case.first
        visible = not case.causal or j <= p
        visible &= case.window[0] < 0 or j >= p - case.window[0]
        visible &= case.window[1] < 0 or j <= p + case.window[1]
        visible &= case.key_mask is None or bool(case.key_mask[j])
        visible &= case.mask is None or bool(case.mask[i, j])
        x = case.scale * np.dot(case.q[h, i].astype(float), case.k[h // case.group, j])
        if case.softcap:
            x = case.softcap * np.tanh(x / case.softcap)
        if case.bias is not None:
            x, visible = x + case.bias[i, j], visible and case.bias[i, j] > -np.inf
        if visible:
            logits.append(x)
            seen.append(j)
    total = np.sum(np.exp(logits)) + (0 if case.sink is None else np.exp(float(case.sink[h])))
    if not logits:
        return np.zeros(case.v.shape[2]), float(np.log(total)) if total else -np.inf
    return np.exp(logits) @ case.v[h // case.group, seen].astype(float) / total, float(
        np.log(total)
    )


def test_there_are_empty_rows(cases: dict[str, GoldenCase]) -> None:
    case = cases["exact-causal-empty-rows"]
    assert case.lse is not None
    assert np.isneginf(case.lse[0, :15]).all()
    assert (case.out[0, :15] == 0).all()
    assert np.isfinite(cases["exact-sink-empty-rows"].lse).all()  # type: ignore[arg-type]


# --- checking -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_right_programs_pass(folder: Path, cases: dict[str, GoldenCase], dtype: str) -> None:
    outputs = {name: solve(case, dtype) for name, case in cases.items()}
    report = check_golden(folder, outputs, dtype=dtype)
    assert report.passed, str(report)
    report.raise_for_failures()


Mutant = Callable[[GoldenCase], Array]


def _tiled(case: GoldenCase) -> Array:
    """Return the output where query heads read key heads in turn, not in groups."""
    order = np.arange(len(case.q)) % len(case.k)
    return solve(case, k=case.k[order], v=case.v[order])


MUTANTS: dict[str, tuple[str, Mutant]] = {
    "mean of V": ("exact-plain", lambda c: solve(c, q=0 * c.q)),
    "scale 1/d": ("exact-plain", lambda c: solve(c, scale=1 / 16)),
    "scale 1 % larger": ("exact-plain", lambda c: solve(c, scale=1.01 * c.scale)),
    "V rolled": ("exact-plain", lambda c: solve(c, v=np.roll(c.v, 1, axis=1))),
    "last key dropped": ("exact-plain", lambda c: solve(c, key_mask=np.arange(48) < 47)),
    "scale ignored": ("exact-scale", lambda c: solve(c, scale=0.25)),
    "causal ignored": ("exact-causal", lambda c: solve(c, causal=False)),
    "off by one": ("exact-causal", lambda c: solve(c, first=-1)),
    "other alignment": ("exact-causal-bottom-right", lambda c: solve(c, first=0)),
    "key mask ignored": ("exact-key_mask", lambda c: solve(c, key_mask=None)),
    "mask ignored": ("exact-mask", lambda c: solve(c, mask=None)),
    "mask inverted": ("exact-mask", lambda c: solve(c, mask=~c.mask)),  # type: ignore[operator]
    "bias ignored": ("exact-bias", lambda c: solve(c, bias=None)),
    "window ignored": ("exact-window", lambda c: solve(c, window=(-1, -1))),
    "window off by one": ("exact-window", lambda c: solve(c, window=(6, 3))),
    "softcap ignored": ("exact-softcap", lambda c: solve(c, softcap=0.0)),
    "heads in turn": ("exact-gqa", _tiled),
    "sink ignored": ("exact-sink", lambda c: solve(c, sink=None)),
    "columns of another draw": (
        "uniform-plain",
        lambda c: solve(c, draws=({"columns": c.draws[0]["columns"] + 1},)),
    ),
    "pilots forgotten": (
        "skeinformer-plain",
        lambda c: np.stack(
            [
                sa.Skeinformer(8, pilot_reuse=False).attend(
                    c.problems(np.float32)[0], draw=dict(c.draws[0])
                )
            ]
        ),
    ),
    "an unscaled sketch": (
        "jl-gqa",
        lambda c: solve(c, draws=tuple({"sketch": 8**0.5 * x["sketch"]} for x in c.draws)),
    ),
}
# What half precision cannot tell from rounding.
FINE = ("scale 1 % larger", "last key dropped")


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_programs_fail(folder: Path, cases: dict[str, GoldenCase], mutant: str) -> None:
    name, change = MUTANTS[mutant]
    wrong = change(cases[name])
    dtypes = ("float32",) if mutant in FINE else ("float32", "float16", "bfloat16")
    for dtype in dtypes:
        report = check_golden(folder, {name: narrow(wrong, dtype)}, cases=name, dtype=dtype)
        assert not report.passed, (mutant, dtype)
        record = report.records[0]
        assert record.status == "fail"
        assert record.err_max > record.tol
        head, row, column = record.worst_index
        assert record.want == cases[name].out[head, row, column]
        with pytest.raises(AssertionError, match=f"{name}.*worst at"):
            report.raise_for_failures()


def test_what_is_missing_or_no_answer_is_named(folder: Path, cases: dict[str, GoldenCase]) -> None:
    right = {name: cases[name].out.astype(np.float32) for name in ("exact-plain", "exact-gqa")}
    some = "exact-plain,exact-gqa"
    assert check_golden(folder, right, cases=some).passed
    report = check_golden(folder, {"exact-gqa": right["exact-gqa"]}, cases=some)
    assert [x.status for x in report.records] == ["missing", "pass"]
    assert "exact-plain: missing" in str(report)
    report = check_golden(folder, right | {"exact-plain": np.zeros((33, 9))}, cases=some)
    assert "must have shape (1, 33, 8), got (33, 9)" in str(report)
    lost = right["exact-plain"].copy()
    lost[0, 3, 1] = np.nan
    report = check_golden(folder, right | {"exact-plain": lost}, cases=some)
    assert "1 entries are not finite" in str(report)
    assert report.failures[0].worst_index == (0, 3, 1)
    assert json.loads(report.to_json())["cases"][0]["got"] == "nan"
    report = check_golden(folder, right | {"exact-plain": np.zeros((33, 8), np.int64)}, cases=some)
    assert not report.passed
    assert "convert it, or say dtype" in str(report)
    # One head may come without its axis, and many with a batch axis.
    loose = {"exact-plain": right["exact-plain"][0], "exact-gqa": right["exact-gqa"][None]}
    assert check_golden(folder, loose, cases=some).passed
    assert "<table>" in report._repr_html_()
    assert repr(report).startswith("<GoldenReport FAIL")


def test_the_logsumexp_is_checked_where_it_is_given(
    folder: Path, cases: dict[str, GoldenCase]
) -> None:
    name = "exact-causal-empty-rows"
    case = cases[name]
    assert case.lse is not None
    right = {name: case.out.astype(np.float32), f"{name}.lse": case.lse.astype(np.float32)}
    assert check_golden(folder, right, cases=name).passed
    for wrong in (np.nan_to_num(case.lse, neginf=0.0), case.lse / np.log(2)):
        report = check_golden(folder, right | {f"{name}.lse": wrong}, cases=name)
        assert [x.status for x in report.records] == ["pass", "fail"]


def test_files_of_outputs(folder: Path, cases: dict[str, GoldenCase], tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    outputs = {"exact-plain": cases["exact-plain"].out.astype(ml_dtypes.bfloat16)}
    (tmp_path / "x.safetensors").write_bytes(safetensors.save(outputs))
    report = check_golden(folder, tmp_path / "x.safetensors", cases="exact-plain")
    assert (report.passed, report.records[0].dtype) == (True, "bfloat16")
    save(tmp_path / "x.npz", {"exact-plain": cases["exact-plain"].out.astype(np.float16)})
    report = check_golden(folder, str(tmp_path / "x.npz"), cases="exact-plain")
    assert (report.passed, report.records[0].dtype) == (True, "float16")
    for name, data in (("y.npz", b"PK\x03\x04no"), ("y.safetensors", b"12345678no")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=r"whole \.(npz|safetensors) file"):
            check_golden(folder, tmp_path / name)
    with pytest.raises(ValueError, match=r"must end in \.npz or \.safetensors"):
        check_golden(folder, tmp_path / "x.csv")
    with pytest.raises(ValueError, match="must be an existing file"):
        check_golden(folder, tmp_path / "z.npz")
    with pytest.raises(TypeError, match="outputs must be a mapping"):
        check_golden(folder, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="named like cases, got 'exact-plane'.*exact-plain"):
        check_golden(folder, {"exact-plane": np.zeros(3)})
    with pytest.raises(ValueError, match="cases must match the name of a case, got 'exactly'"):
        check_golden(folder, {}, cases="exactly")
    with pytest.raises(ValueError, match="dtype must be one of"):
        check_golden(folder, {}, dtype="float8")


def save(path: Path, arrays: dict[str, Any]) -> None:
    np.savez(path, **arrays)


def damaged(folder: Path, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Yield damaged copies of golden vectors and what is said about them."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    path = copy("flipped")
    raw = bytearray((path / "exact-plain.safetensors").read_bytes())
    raw[-100] ^= 1
    (path / "exact-plain.safetensors").write_bytes(bytes(raw))
    yield path, "must have the SHA-256"
    path = copy("gone")
    (path / "exact-plain.safetensors").unlink()
    yield path, "got no such file"
    path = copy("short")
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text[: len(text) // 2])
    yield path, "must be a whole manifest"
    path = copy("older")
    manifest = json.loads(text) | {"schema": 0}
    (path / "manifest.json").write_text(json.dumps(manifest))
    yield path, "must have schema 1, got 0"
    path = copy("none")
    (path / "manifest.json").unlink()
    yield path, "has no manifest.json"


def test_damaged_golden_vectors_are_refused(folder: Path, tmp_path: Path) -> None:
    for path, message in damaged(folder, tmp_path):
        with pytest.raises(ValueError, match=message):
            check_golden(path, {}, cases="exact-plain")


# --- the command line, and a program in C++ -------------------------------------------------------


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, file = str(tmp_path / "golden"), tmp_path / "mine.npz"
    assert main(["golden", place, "--cases", "exact-causal,exact-gqa"]) == 0
    assert "2 cases in" in capsys.readouterr().out
    found = read_golden(place)
    save(file, {name: case.out.astype(np.float32) for name, case in found.items()})
    assert main(["check", place, "--output", str(file)]) == 0
    assert "PASS: 2 of 2 cases right" in capsys.readouterr().out
    save(file, {"exact-causal": 1.001 * found["exact-causal"].out.astype(np.float32)})
    assert main(["check", place, "--output", str(file), "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert [x["status"] for x in answer["cases"]] == ["fail", "missing"]
    assert main(["check", place, "--output", str(tmp_path / "no.npz")]) == 2
    assert "must be an existing file" in capsys.readouterr().err
    assert main(["golden", place, "--cases", "exact-causal", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cases"][0]["method"] == "exact"
    # What the manifest before listed is gone, so that a pattern for all files means this set.
    assert [path.name for path in Path(place).glob("*.safetensors")] == ["exact-causal.safetensors"]


def compiler() -> str:
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    pytest.skip("no C++ compiler")


def test_a_program_in_cpp(folder: Path, tmp_path: Path) -> None:
    source = (ROOT / "examples" / "cpp" / "attention.cpp").read_text()
    chosen = [p for kind in ("exact-*", "skeinformer-*") for p in sorted(folder.glob(kind))]
    # The program, and one whose scale is 1 % too large.
    wrong = source.replace("x *= scale;", "x *= scale * 1.01f;")
    assert wrong != source
    for name, text, code in (("right", source, 0), ("wrong", wrong, 1)):
        (tmp_path / f"{name}.cpp").write_text(text)
        binary, output = str(tmp_path / name), str(tmp_path / f"{name}.safetensors")
        build = [compiler(), "-std=c++17", "-O0", "-o", binary, str(tmp_path / f"{name}.cpp")]
        subprocess.run(build, check=True, timeout=300)
        subprocess.run([binary, output, *map(str, chosen)], check=True, timeout=60)
        arguments = ["check", str(folder), "--output", output]
        assert main([*arguments, "--cases", "exact-*,skeinformer-*"]) == code
    assert subprocess.run([binary], capture_output=True, timeout=60).returncode == 2
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(chosen[0].read_bytes()[:500])
    done = subprocess.run([binary, output, str(broken)], capture_output=True, timeout=60)
    assert (done.returncode, b"attention: " in done.stderr) == (2, True)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "golden.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert names["report"].passed
    # The numbers of the page.
    assert f"{len(specs())} cases" in text
    assert f"{len(EXACT)} cases" in text
