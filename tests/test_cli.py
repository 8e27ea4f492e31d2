"""The command line: every verb, one-line errors, exit codes, JSON that parses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sketchattn as sa
from sketchattn.bench import harness, runner, startup
from sketchattn.cli import main, parse_heads, read_output
from sketchattn.cli.application import print_json
from sketchattn.studies import run
from sketchattn.studies.plots import PICTURES

MADE = "clustered:n=24,d=4,heads=2"


class Said:
    """What a command printed, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command line in this process."""
    monkeypatch.delenv("SKETCHATTN_TRACEBACK", raising=False)

    def run(*arguments: object) -> Said:
        code = main([str(x) for x in arguments])
        captured = capsys.readouterr()
        return Said(code, captured.out, captured.err)

    return run


def child(
    code: str, *arguments: str, environment: dict[str, str] | None = None, **options: Any
) -> subprocess.Popen[str]:
    root = str(Path(sa.__file__).parents[1])
    paths = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    return subprocess.Popen(
        [sys.executable, *(["-c", code] if code else []), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths} | (environment or {}),
        **options,
    )


def only_line(said: Said, message: str) -> None:
    assert said.err == f"sketchattn: {message}\n"
    assert said.out == ""
    assert said.code == 2


# --- help and version ---------------------------------------------------------------------------

VERBS = [
    "study", "recommend", "validate", "claims", "certify", "golden", "check", "capture", "bench",
    "conformance", "methods", "warmup",
]  # fmt: skip


def test_help_lists_the_verbs_and_each_explains_itself(say: Any) -> None:
    for arguments in (["--help"], ["-h"], []):
        said = say(*arguments)
        assert (said.code, said.err) == (0, "")
        listed = re.findall(r"^  (\w+)  +\S", said.out.split("Commands:")[1], flags=re.MULTILINE)
        assert listed == VERBS
        assert "..." not in said.out.split("Commands:")[1]
    for verb in VERBS:
        said = say(verb, "--help")
        assert (said.code, said.err) == (0, "")
        assert said.out.startswith(f"Usage: sketchattn {verb} ")


def test_version(say: Any) -> None:
    assert say("--version").out == f"sketchattn {sa.__version__}\n"


HEAVY = (
    "numpy", "scipy", "numba", "sklearn", "matplotlib", "pandas", "joblib", "tqdm", "torch",
    "safetensors", "rich", "plotly", "jinja2",
)  # fmt: skip

LOADED = """
import sys
from sketchattn.cli import main
code = main(sys.argv[1:])
print("LOADED", *sys.modules)
sys.exit(code)
"""


def loaded_by(*arguments: str) -> set[str]:
    out, err = child(LOADED, *arguments).communicate(timeout=600)
    assert err == ""
    return {name for name in out.split("LOADED ")[1].split() if name in HEAVY}


def test_help_loads_nothing_heavy() -> None:
    assert loaded_by("study", "--help") == set()
    # The check sees heavy modules where there are some.
    assert {"numpy", "sklearn"} <= loaded_by("methods")


def test_runs_as_a_module() -> None:
    process = child("", "-m", "sketchattn", "methods", "--jsn")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 2
    assert out == ""
    assert err.startswith("sketchattn: No such option: --jsn")
    assert err.count("\n") == 1
    process = child("", "-m", "sketchattn", "--version")
    assert process.communicate(timeout=600)[0] == f"sketchattn {sa.__version__}\n"
    assert process.returncode == 0


# --- study --------------------------------------------------------------------------------------


def test_study_prints_the_table_and_the_pictures(say: Any, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    arguments = ("study", "--heads", MADE, "--methods", "uniform", "--ranks", "2,4")
    said = say(*arguments, "--seeds", 2, "--jobs", 1, "--out", folder)
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("2 heads, 1 method, 2 ranks, 2 seeds: medians over heads")
    pictures = [folder / name for name in PICTURES]
    *_, rows = said.out.splitlines()[: -len(pictures) - 1]
    assert rows == f"rows: {folder / 'results.csv'}, {folder / 'references.csv'}"
    *paths, report = said.out.splitlines()[-len(pictures) - 1 :]
    assert paths[0] == f"pictures: {pictures[0]}"
    assert [x.strip() for x in paths[1:]] == [str(p) for p in pictures[1:]]
    assert report == f"report: {folder / 'report.html'}"
    assert all(p.stat().st_size > 0 for p in [*pictures, folder / "report.html"])
    options: dict[str, Any] = {"methods": ["uniform"], "ranks": [2, 4], "seeds": 2}
    result = sa.study(parse_heads(MADE), **options, out=folder, pictures=False)
    assert result.computed == 0
    assert result.render() in said.out
    assert (folder / "results.csv").read_text().count("\n") == 1 + 2 * 2 * 2


def test_study_prints_every_rank_or_the_rank_of_a_target(say: Any, tmp_path: Path) -> None:
    arguments = ("study", "--heads", MADE, "--methods", "uniform", "--ranks", "2,4", "--seeds", 1)
    options = ("--jobs", 1, "--out", tmp_path, "--no-pictures")
    every = say(*arguments, *options, "--all")
    assert (every.code, every.err) == (0, "")
    result = sa.StudyResult.load(tmp_path)
    assert result.render(every=True) in every.out
    assert "medians [quartiles]" in every.out
    target = say(*arguments, *options, "--target", 0.1).out
    assert result.render() in target
    assert "smallest rank with output_fro_rel <= 0.1 on half of the heads" in target
    assert target.splitlines()[-2].startswith("rows: ")  # paths are last
    assert target.splitlines()[-1] == f"report: {tmp_path / 'report.html'}"
    found = json.loads(say(*arguments, *options, "--target", 0.1, "--json").out)["target"]
    table = result.rank_at("output_fro_rel", 0.1)
    assert [x["method"] for x in found] == table["method"].tolist() == ["uniform", "svd", "topk"]
    assert [x["heads"] for x in found] == table["heads"].tolist()
    assert found[0]["rank"] is None  # no rank of 2 or 4 reaches it


def test_study_json(say: Any, tmp_path: Path) -> None:
    arguments = ("study", "--heads", MADE, "--ranks", 2, "--methods", "uniform", "--seeds", 1)
    options = ("--jobs", 1, "--out", tmp_path, "--no-pictures", "--json")
    said = say(*arguments, *options)
    assert (said.code, said.err) == (0, "")
    found = json.loads(said.out)
    assert found["results"] == str(tmp_path / "results.csv")
    assert found["pictures"] == []
    assert (found["computed"], found["reused"]) == (12, 0)
    by_method = {row["method"]: row for row in found["summary"]}
    assert list(by_method) == ["uniform", "svd", "topk", "zero", "vmean", "exact"]
    assert by_method["zero"]["rank"] is None
    assert by_method["zero"]["output_fro_rel"] == 1.0
    assert by_method["uniform"]["rank"] == 2
    again = json.loads(say(*arguments, *options).out)
    assert (again["computed"], again["reused"]) == (0, 12)
    assert again["summary"] == found["summary"]
    assert json.loads(say(*arguments, *options, "--fresh").out)["computed"] == 12


def test_study_draws_bounds(say: Any, tmp_path: Path) -> None:
    name = "sketching.moment_gaussian"
    arguments = ("study", "--heads", MADE, "--ranks", 2, "--methods", "jl", "--seeds", 1)
    options = ("--jobs", 1, "--out", tmp_path, "--no-pictures", "--bounds", name)
    said = say(*arguments, *options)
    assert (said.code, said.err) == (0, "")
    files = (tmp_path / f"{x}.csv" for x in ("results", "references", "bounds"))
    assert said.out.splitlines()[-2] == "rows: " + ", ".join(map(str, files))
    found = json.loads(say(*arguments, *options, "--json").out)
    assert found["bounds"] == str(tmp_path / "bounds.csv")
    lines = (tmp_path / "bounds.csv").read_text().splitlines()
    limit = sa.theory.error_bounds()[name].at(parse_heads(MADE)[0], 2)
    assert lines[1] == f"{name},jl,clustered/head0,2,output_fro_amm,root mean square,{limit}"


def test_study_without_arguments_takes_the_bundled_heads(
    say: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    given: dict[str, Any] = {}

    def refuse(heads: sa.Heads, **options: Any) -> None:
        given.update(options, heads=heads.names)
        raise ValueError("enough")

    monkeypatch.setattr(run, "study", refuse)
    only_line(say("study"), "enough")
    assert given == {
        "heads": sa.load_heads("minilm").names,
        "methods": None,
        "ranks": None,
        "seeds": 4,
        "jobs": None,
        "out": Path("sketchattn-study"),
        "dask": None,
        "report": True,
        "resume": True,
        "pictures": True,
        "progress": None,
        "bounds": None,
        "floors": True,
        "spectral": True,
        "rows": None,
    }


def test_infinities_are_strings_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"a": [float("inf"), float("nan"), np.float64(1.5)], "b": Path("x"), "c": np.int64(2)}
    print_json(values)
    assert json.loads(capsys.readouterr().out) == {"a": ["inf", "nan", 1.5], "b": "x", "c": 2}


# --- heads --------------------------------------------------------------------------------------


def test_heads_are_files_names_or_families(tmp_path: Path) -> None:
    made = parse_heads("gaussian:n=8,d=4,heads=2,rng=3,logit_std=2.5,dtype=float64")
    wanted = sa.make_heads("gaussian", n=8, d=4, heads=2, rng=3, logit_std=2.5, dtype=np.float64)
    np.testing.assert_array_equal(made.q, wanted.q)
    assert made.dtype == np.float64
    np.testing.assert_array_equal(parse_heads("ar1:n=8").q, sa.make_heads("ar1", n=8, rng=0).q)
    assert parse_heads("minilm").names == sa.load_heads("minilm").names
    path = tmp_path / "with:colon.npz"
    sa.write_heads(path, made)
    assert parse_heads(str(path)).names == made.names


REFUSED = [
    (
        ["study", "--heads", "minlm"],
        "heads must be a file, a bundled set or a family, got 'minlm'; did you mean 'minilm'?",
    ),
    (
        ["study", "--heads", "peaked"],
        "heads must say how many tokens to make, got 'peaked'; write 'peaked:n=512'",
    ),
    (
        ["study", "--heads", "peaked:d=4"],
        "heads must say how many tokens to make, got 'peaked:d=4'; add n=512",
    ),
    (
        ["study", "--heads", "peaked:n=x"],
        "n must be a number, got 'x'; correct it",
    ),
    (
        ["study", "--heads", "peaked:n=8,d"],
        "heads must be written as family:name=number,..., each name once, got 'd' in "
        "'peaked:n=8,d'; for instance 'peaked:n=512,d=64'",
    ),
    (
        ["study", "--heads", "peaked:n=8,n=9"],
        "heads must be written as family:name=number,..., each name once, got 'n=9' in "
        "'peaked:n=8,n=9'; for instance 'peaked:n=512,d=64'",
    ),
    (
        ["study", "--heads", "paeked:n=8"],
        "family must be the name of a recipe, got 'paeked'; did you mean 'peaked'?",
    ),
    (
        ["study", "--heads", "missing.npz"],
        "path must be an existing file, got 'missing.npz'; check its folder and name",
    ),
    (
        ["study", "--heads", MADE, "--methods", "unifrom"],
        "method must be registered, got 'unifrom'; did you mean 'uniform'?",
    ),
    (
        ["study", "--heads", MADE, "--methods", ","],
        "methods must hold at least one method, got none; leave methods out",
    ),
    (
        ["study", "--heads", MADE, "--ranks", "8;16"],
        "ranks must be integers, or shares such as 0.25, separated by commas, got '8;16'; for "
        "instance 8,16,32",
    ),
    (
        ["study", "--heads", MADE, "--ranks", "8,64"],
        "ranks must be at most n_k = 24 of head 'clustered/head0', got 64; lower it or leave the "
        "head out",
    ),
    (
        ["study", "--heads", MADE, "--jobs", "0"],
        "jobs must be at least 1, got 0; jobs=1 computes one head after the other",
    ),
    (
        ["study", "--heads", MADE, "--methods", "jl", "--bounds", "sketching.amm_markof"],
        "bounds must be ids of claims, got 'sketching.amm_markof'; did you mean "
        "'sketching.amm_markov', 'sketching.amm_jl_moment', 'sketching.moment_haar', "
        "'sketching.moment_sparse' or 'sketching.moment_rademacher'?",
    ),
    (
        ["validate", "--claims", "sketching.amm_markof"],
        "claims must hold ids or topics, got 'sketching.amm_markof'; did you mean "
        "'sketching.amm_markov', 'sketching.amm_jl_moment', 'sketching.moment_haar', "
        "'sketching.ose_markov_srht' or 'sketching.ose_markov_sjlt'?",
    ),
    (
        ["validate", "--claims", "sketching.nothing*"],
        "claims must match at least one id, got the pattern 'sketching.nothing*'; see "
        "sketchattn.theory.claims()",
    ),
    (
        ["validate", "--claims", ","],
        "claims must hold at least one id, got none; leave claims out",
    ),
    (
        ["validate", "--heads", "minlm"],
        "heads must be a file, a bundled set or a family, got 'minlm'; did you mean 'minilm'?",
    ),
    (
        ["validate", "--trials", "0"],
        "trials must be at least 1, got 0; 200 is usual",
    ),
    (
        ["validate", "--confidence", "1"],
        "confidence must be in (0, 1), got 1.0; 0.95 is usual",
    ),
    (
        ["validate", "--seed", "-1"],
        "rng must be at least 0, got -1; give a non-negative seed",
    ),
    (
        ["validate", "--jobs", "0"],
        "jobs must be at least 1, got 0; jobs=1 computes one problem after the other",
    ),
    (
        ["validate", "--out", __file__],
        f"out must be a folder, got the file {__file__!r}; name another",
    ),
    (
        ["certify", MADE, "missing.npy"],
        "output must be an existing file, got 'missing.npy'; check its name",
    ),
    (
        ["certify", MADE, "missing.txt"],
        "output must end in .npy, .npz or .safetensors, got 'missing.txt'; write it in one of "
        "these formats",
    ),
    (
        ["bench", "exakt"],
        "name must be a benchmark, got 'exakt'; did you mean 'exact'?",
    ),
    (
        ["bench", "--rounds", "0"],
        "rounds must be at least 1, got 0; 7 is the default",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_refusals_are_one_line(
    say: Any, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    only_line(say(*arguments), message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["stduy"], "No such command 'stduy'"),
        (["study", "--nothing"], "No such option: --nothing"),
        (["study", "--seeds", "x"], "Invalid value for '--seeds'"),
        (["certify", "minilm"], "Missing argument 'OUTPUT'"),
        (["methods", "extra"], "Got unexpected extra argument"),
    ],
)
def test_usage_errors_are_one_line(say: Any, arguments: list[str], start: str) -> None:
    said = say(*arguments)
    assert said.code == 2
    assert said.out == ""
    assert said.err.startswith(f"sketchattn: {start}")
    assert said.err.endswith("; see sketchattn --help\n")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ImportError("torch must be installed;\n  pip install torch"), None),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (RuntimeError("singular values must settle"), None),
        (ValueError(), "ValueError"),
        (KeyError("x"), "KeyError: 'x'; SKETCHATTN_TRACEBACK=1 shows where"),
        (MemoryError(), "MemoryError: ; SKETCHATTN_TRACEBACK=1 shows where"),
    ],
)
def test_any_error_is_one_line_and_can_be_traced(
    say: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, text: str | None
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(startup, "warmup", fail)
    only_line(say("warmup"), " ".join(str(error).split()) if text is None else text)
    monkeypatch.setenv("SKETCHATTN_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main(["warmup"])


def test_interruption_says_so(say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(startup, "warmup", interrupt)
    said = say("warmup")
    assert (said.code, said.out) == (130, "")
    assert said.err.strip() == "sketchattn: interrupted"


INTERRUPTIBLE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell may ignore it
from sketchattn.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal to a process group")
def test_ctrl_c_ends_a_parallel_study_without_a_traceback(tmp_path: Path) -> None:
    process = child(
        INTERRUPTIBLE,
        *("study", "--heads", MADE, "--seeds", "100000", "--ranks", "2", "--jobs", "2"),
        *("--out", str(tmp_path)),
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 600  # of a machine on which others have all cores
        while not any(f.stat().st_size > 3000 for f in (tmp_path / "cells").glob("*.jsonl")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
        out, err = process.communicate(timeout=600)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert out == ""
    assert err.strip() == "sketchattn: interrupted; the same command continues"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_a_closed_pipe_is_no_error() -> None:
    process = child("", "-m", "sketchattn", "methods", "--json")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process:
        assert process.stderr.read() == ""


# --- consoles, backends and names that fail -----------------------------------------------------

SMALL = ("--methods", "uniform", "--ranks", "2", "--seeds", "1", "--jobs", "1")


@pytest.mark.skipif(sys.platform == "win32", reason="closes a stream as a POSIX shell does")
def test_a_closed_stdout_is_no_error() -> None:
    command = [sys.executable, "-m", "sketchattn", "methods"]
    words = "import os, sys; os.close(1); os.execv(sys.argv[1], sys.argv[1:])"
    process = child(words, *command)
    out, err = process.communicate(timeout=600)
    assert (process.returncode, out, err) == (0, "", "")


def test_a_console_that_cannot_print_a_name_costs_nothing(tmp_path: Path) -> None:
    heads = sa.make_heads("clustered", n=24, d=4, rng=0)
    arrays = heads[0].arrays
    named = sa.AttentionProblem(*arrays, name="\u6ce8\u610f")
    sa.write_heads(tmp_path / "named.npz", named)
    code = "import sys; from sketchattn.cli import main; sys.exit(main(sys.argv[1:]))"
    np.save(tmp_path / "output.npy", named.output)
    for words in (
        ("study", "--heads", str(tmp_path / "named.npz"), *SMALL, "--out", str(tmp_path / "out")),
        ("certify", str(tmp_path / "named.npz"), str(tmp_path / "output.npy"), "--rows", "8"),
    ):
        process = child(code, *words, environment={"PYTHONIOENCODING": "cp1252"})
        out, err = process.communicate(timeout=600)
        assert (process.returncode, err) == (0, "")
        assert "warning" not in out
    assert "\\u6ce8\\u610f" in out
    assert (tmp_path / "out" / "study.json").exists()


@pytest.mark.parametrize("backend", ["module://no_such_module.backend", "no such backend"])
def test_the_backend_of_the_user_costs_no_study(tmp_path: Path, backend: str) -> None:
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    code = "import sys; from sketchattn.cli import main; sys.exit(main(sys.argv[1:]))"
    process = child(
        code,
        *("study", "--heads", MADE, *SMALL, "--out", str(tmp_path / "out")),
        environment={"MPLBACKEND": backend, "MATPLOTLIBRC": str(tmp_path)},
    )
    out, err = process.communicate(timeout=600)
    assert (process.returncode, err) == (0, "")
    assert len(list((tmp_path / "out").glob("*.png"))) == len(PICTURES)
    assert (tmp_path / "out" / "study.json").exists()


def test_a_study_without_pictures_is_a_study(
    say: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sketchattn.studies import plots

    def fail(*_: object) -> None:
        raise ValueError("no ink")

    monkeypatch.setattr(plots, "_draw_figure", fail)
    said = say("study", "--heads", MADE, *SMALL, "--out", tmp_path)
    assert said.code == 0
    first = "pictures are missing beside the results: output_fro_rel (ValueError: no ink)"
    assert said.err == f"sketchattn: warning: {first} and 9 more\n"
    assert said.out.startswith("2 heads, 1 method")
    assert (tmp_path / "study.json").exists()


def test_verdicts_come_before_pictures(
    say: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    def fail(*_: object, **__: object) -> None:
        assert (tmp_path / "verdicts.json").exists()
        raise ValueError("no ink")

    (tmp_path / "sketching.amm_markov.png").write_bytes(b"of an earlier run")
    (tmp_path / "mine.png").write_bytes(b"of somebody else")
    monkeypatch.setattr(Figure, "savefig", fail)
    claim = "sketching.moment_countsketch"
    said = say("validate", "--claims", claim, "--heads", MADE, "--trials", 20, "--jobs", 1,
               "--out", tmp_path)  # fmt: skip
    assert said.code in (0, 1)  # so few trials may say anything
    start = f"sketchattn: warning: pictures are missing beside the verdicts: {claim} (ValueError: "
    assert said.err.startswith(start)
    assert said.err.count("\n") == 1
    kept = ["mine.png", "verdicts.csv", "verdicts.html", "verdicts.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == kept
    assert "<img" not in (tmp_path / "verdicts.html").read_text()


def test_a_tilde_is_the_home_folder(
    say: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    sa.write_heads("~/two.npz", parse_heads(MADE))
    assert (tmp_path / "two.npz").is_file()
    said = say("study", "--heads", "~/two.npz", *SMALL, "--no-pictures", "--out", "~/out")
    assert (said.code, said.err) == (0, "")
    assert str(tmp_path / "out" / "results.csv") in said.out
    assert (tmp_path / "out" / "results.csv").is_file()
    assert not (tmp_path / "~").exists()


# --- certify ------------------------------------------------------------------------------------


def outputs() -> tuple[sa.Heads, np.ndarray[Any, np.dtype[Any]]]:
    heads = parse_heads("gaussian:n=48,d=4,heads=3")
    found = [sa.UniformColumns(rank=16).approximate(p, rng=0) @ p.values for p in heads]
    return heads, np.stack(found)


def test_certify_prints_a_row_for_each_head(say: Any, tmp_path: Path) -> None:
    heads, stack = outputs()
    path = tmp_path / "all.npy"
    np.save(path, stack)
    arguments = ("gaussian:n=48,d=4,heads=3", path, "--rows", 16, "--confidence", 0.9)
    said = say("certify", *arguments, "--kind", "approximate", "--seed", 5)
    assert (said.code, said.err) == (0, "")
    rows = said.out.splitlines()
    for i, row in enumerate(rows):
        wanted = sa.certify(heads[i], stack[i], 16, 0.9, 5, kind="approximate")
        found = re.fullmatch(
            rf"{heads.names[i]}  error (\S+); 90 %: (\S+) to (\S+); from 16 rows, approximate; "
            rf"rows = 48 for exact",
            row,
        )
        assert found, row
        numbers = [wanted.estimate, wanted.low, wanted.high]
        # Three digits are shown.
        assert [float(x) for x in found.groups()] == pytest.approx(numbers, rel=5.1e-3)
        assert wanted.width > 1.1  # three numbers, not one
    assert len(rows) == 3


def test_certify_judges_the_largest_error_to_accept(say: Any, tmp_path: Path) -> None:
    heads, stack = outputs()
    np.save(tmp_path / "all.npy", stack)
    arguments = ("certify", "gaussian:n=48,d=4,heads=3", tmp_path / "all.npy", "--seed", 5)
    sampled = [sa.certify(heads[i], stack[i], 16, rng=5) for i in range(3)]
    low, high = min(x.low for x in sampled), max(x.high for x in sampled)
    for most, code, said_of_it in (
        (1.01 * high, 0, f": at most {1.01 * high:g}"),
        ((low + high) / 2, 1, ": NOT KNOWN to be at most "),
        (low / 2, 1, f": ABOVE {low / 2:g}"),
    ):
        said = say(*arguments, "--rows", 16, "--max-error", most)
        assert (said.code, said.err) == (code, "")
        assert said_of_it in said.out
        again = say(*arguments, "--rows", 16, "--max-error", most, "--json")
        assert (again.code, len(json.loads(again.out))) == (code, 3)
        records = json.loads(again.out)
        assert [x["max_error"] for x in records] == 3 * [most]
        for x, one in zip(records, sampled, strict=True):
            word = "not known" if one.high > most else "at most"
            assert x["verdict"] == ("above" if one.low > most else word)
    for x in json.loads(say(*arguments, "--rows", 16, "--json").out):
        assert (x["max_error"], x["verdict"]) == (None, None)
    said = say(*arguments, "--rows", 48)
    assert said.out.splitlines()[0].endswith("; exact: all 48 rows")
    only_line(
        say(*arguments, "--max-error", -1), "max-error must be at least 0, got -1.0; 0.05 is 5 %"
    )


def test_certify_says_that_rows_are_few_where_the_estimate_is_small(
    say: Any, tmp_path: Path
) -> None:
    heads, _ = outputs()
    np.save(tmp_path / "right.npy", np.stack([p.output for p in heads]))
    arguments = ("certify", "gaussian:n=48,d=4,heads=3", tmp_path / "right.npy")
    said = say(*arguments, "--rows", 16, "--max-error", 0.01)
    assert said.code == 1
    assert said.out.count("though the estimate is: 16 rows leave the interval wide") == 3
    assert said.out.count("more --rows narrow it") == 3
    assert say(*arguments, "--rows", 48, "--max-error", 0.01).code == 0
    # Half of the estimate is above the lower end: a reason of another kind.
    np.save(tmp_path / "wrong.npy", np.stack([1.5 * p.output for p in heads]))
    most = min(sa.certify(p, 1.5 * p.output, 16).estimate for p in heads) * 0.999
    arguments = ("certify", "gaussian:n=48,d=4,heads=3", tmp_path / "wrong.npy")
    said = say(*arguments, "--rows", 16, "--max-error", most, "--seed", 0)
    assert (said.code, "though the estimate is" in said.out) == (1, False)
    assert "and the estimate is not; more --rows may tell" in said.out


def test_certify_json_of_one_head(say: Any, tmp_path: Path) -> None:
    heads, stack = outputs()
    sa.write_heads(tmp_path / "heads.npz", heads)
    np.savez(tmp_path / "one.npz", output=stack[1], other=np.zeros(3))
    wanted = sa.certify(heads[1], stack[1], rows=48)
    for head in ("1", "gaussian/head1"):
        said = say(
            *("certify", tmp_path / "heads.npz", tmp_path / "one.npz", "--head", head),
            *("--rows", 48, "--json"),
        )
        assert (said.code, said.err) == (0, "")
        (found,) = json.loads(said.out)
        assert found["head"] == "gaussian/head1"
        assert found["kind"] == wanted.kind
        for name in ("estimate", "low", "high", "width", "rows", "confidence"):
            assert found[name] == pytest.approx(getattr(wanted, name), rel=1e-12)
    # One head of an output of all heads is the same.
    np.save(tmp_path / "all.npy", stack)
    said = say(
        *("certify", tmp_path / "heads.npz", tmp_path / "all.npy", "--head", "1"),
        *("--rows", 48, "--json"),
    )
    assert json.loads(said.out) == [found]


def test_outputs_are_read_in_every_format(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.save(tmp_path / "a.npy", x)
    np.savez(tmp_path / "b.npz", anything=x)
    save_file({"output": x, "lse": x[0].copy()}, tmp_path / "c.safetensors")
    for name in ("a.npy", "b.npz", "c.safetensors"):
        np.testing.assert_array_equal(read_output(tmp_path / name), x)


def test_outputs_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", a=np.zeros(2), b=np.zeros(2))
    message = (
        "output must be an array named 'output' or the only one in its file, got a, b; rename it"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read_output(tmp_path / "two.npz")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    for name, content in (
        ("empty.npy", b""),
        ("text.npy", b"hello"),
        ("text.npz", b"hello"),
        ("objects.npy", None),
        ("half.npz", (tmp_path / "two.npz").read_bytes()[:150]),
    ):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        start = f"output must be a whole {path.suffix} file, got {str(path)!r}, which is not ("
        with pytest.raises(ValueError, match=f"^{re.escape(start)}.*; write it again$"):
            read_output(path)
    (tmp_path / "text.safetensors").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"must be a whole \.safetensors file"):
        read_output(tmp_path / "text.safetensors")


def test_outputs_and_heads_must_belong_together(say: Any, tmp_path: Path) -> None:
    heads, stack = outputs()
    words = "gaussian:n=48,d=4,heads=3"
    np.save(tmp_path / "one.npy", stack[0])
    np.save(tmp_path / "two.npy", stack[:2])
    only_line(
        say("certify", words, tmp_path / "one.npy"),
        "head must be given for an output of one head, got 3 heads; add --head NAME or "
        "--head NUMBER",
    )
    only_line(
        say("certify", words, tmp_path / "two.npy"),
        "output must have the shape (48, 4) of one head or (3, 48, 4) of all, got (2, 48, 4); "
        "check that it belongs to these heads",
    )
    only_line(
        say("certify", words, tmp_path / "one.npy", "--head", 3),
        "head must be a name or a number in 0..2, got 3; numbers start at 0",
    )
    only_line(
        say("certify", words, tmp_path / "one.npy", "--head", "gaussian/haed1"),
        "head must be a name or a number in 0..2, got 'gaussian/haed1'; did you mean "
        "'gaussian/head1'?",
    )


# --- methods, bench, warmup ---------------------------------------------------------------------


def test_methods_lists_the_registry(say: Any) -> None:
    said = say("methods")
    assert (said.code, said.err) == (0, "")
    lines = said.out.split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(sa.methods())
    row = next(line for line in lines if line.startswith("uniform"))
    assert row.split()[1:6] == ["UniformColumns", "yes", "yes", "yes", "yes"]
    assert "estimator=self-normalized" in row
    found = json.loads(say("methods", "--json").out)
    assert [x["name"] for x in found] == list(sa.methods())
    for x in found:
        cls = sa.methods()[x["name"]]
        assert x["class"] == cls.__name__
        assert set(x["parameters"]) == set(cls._get_param_names())
        assert {"causal", "key_mask", "rectangular", "oracle", "target"} <= set(x["traits"])


def test_bench_runs_what_is_named(say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, int]] = []

    def tiny(quick: bool, rounds: int) -> Any:
        asked.append((quick, rounds))
        ours, theirs = [1.0] * rounds, [2.0] * rounds
        yield harness.make_row("tiny", "nothing", ours, against="air", theirs=theirs, target=1.0)

    monkeypatch.setitem(runner.BENCHMARKS, "tiny", harness.Benchmark("tiny", "A tiny one.", tiny))
    said = say("bench", "--list")
    assert (said.code, said.err) == (0, "")
    listed = [line.split()[0] for line in said.out.splitlines()]
    assert listed == ["name", *runner.BENCHMARKS]
    assert json.loads(say("bench", "--list", "--json").out)[-1] == {
        "name": "tiny",
        "description": "A tiny one.",
    }
    said = say("bench", "tiny", "--rounds", 2)
    assert (said.code, said.err) == (0, "")
    assert "nothing" in said.out
    for when in ("before", "after"):
        assert re.search(rf"^CPUs kept busy by other programs {when}: [\d.]+$", said.out, re.M)
    found = json.loads(say("bench", "tiny", "--quick", "--json").out)
    assert [row["case"] for row in found["rows"]] == ["nothing"]
    assert "cpu" in found["machine"]
    assert found["load"].keys() == {"before", "after"}
    assert asked == [(False, 2), (True, 3)]


def test_warmup_says_how_long_and_where(say: Any) -> None:
    said = say("warmup")
    assert (said.code, said.err) == (0, "")
    assert re.fullmatch(r"kernels ready in \d+\.\d\d s, (cached in .+|not cached: .+)\n", said.out)
    found = json.loads(say("warmup", "--json").out)
    assert found["seconds"] >= 0
    if os.environ.get("NUMBA_DISABLE_JIT", "0") == "0" and found["cache"] is not None:
        assert list(Path(found["cache"]).glob("*.nbi"))
