"""What people read: records in words, names that tab completes, the summary of a validation."""

from __future__ import annotations

import ast
import html
import io
import json
import math
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from packaging_checks import ROOT

import sketchattn as sa
from sketchattn import theory
from sketchattn.base.parallel import check_jobs
from sketchattn.base.words import Phrase, Worded, html_table, number, shown, table
from sketchattn.cli import main
from sketchattn.kernels._threads import cpu_count
from sketchattn.theory.engine.validation import ValidationResult

NASTY = "<script>alert(1)</script>"
HEAD = sa.AttentionProblem(*sa.make_heads("clustered", n=48, d=8, rng=0)[0].arrays, name=NASTY)
AHAT = sa.Combiner("fixed", rank=4).approximate(HEAD)
TAIL, REFUTED = "sketching.posterior_hmt", "linformer.thm1_fixed"
# At most three digits of a number, after which comes its exponent or nothing.
LONG = re.compile(r"[1-9]\d*\.\d{3,}|\.0*[1-9]\d{3,}")


@pytest.fixture(scope="module")
def result() -> ValidationResult:
    return theory.validate([TAIL, REFUTED], HEAD, 60)


RECORDS: dict[str, Callable[[], Any]] = {
    "report": lambda: sa.error_report(HEAD, AHAT, spectral=False),
    "certificate": lambda: sa.certify(HEAD, AHAT @ HEAD.values, 16, rng=0),
    "exact": lambda: sa.certify(HEAD, AHAT @ HEAD.values, 48),
    "rows": lambda: sa.certify_rows(AHAT),
    "hardness": lambda: sa.describe(HEAD),
    "verdict": lambda: theory.check(TAIL, HEAD, trials=60),
    "claim": lambda: theory.claims()["sketching.amm_jl_moment"],
    "validation": lambda: theory.validate([TAIL, REFUTED], HEAD, 60),
}


# --- numbers and tables -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (1.0, "1"), (0.123456, "0.123"), (123456.0, "1.23e5"), (1e-05, "1e-5"),
        (1.5e100, "1.5e100"), (math.inf, "inf"), (-math.inf, "-inf"), (math.nan, "-"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == shown(value) == shown(np.float64(value)) == text
    if math.isfinite(value):
        assert float(text) == pytest.approx(value, rel=5e-3)


def test_values_are_shown() -> None:
    assert shown(None) == "-"
    assert shown((0.12345, 3, "x")) == "0.123, 3, x"
    assert table(["a", "n", "b"], [["x", "12", "y"]], left=1) == "a   n  b\nx  12  y"
    assert html_table(["<b>"], [["&"]]) == (
        "<table><tr><th>&lt;b&gt;</th></tr><tr><td>&amp;</td></tr></table>"
    )


def test_a_record_says_its_fields() -> None:
    class Two(Worded):
        _brief = ("b",)

        def _title(self) -> str:
            return "<two>"

        def _phrases(self) -> list[Phrase]:
            return [Phrase("a", "1", "the first"), Phrase("b", "22", "the second")]

    made: Any = Two()
    assert str(made) == "<two>\n  a  1   the first\n  b  22  the second"
    assert repr(made) == "<Two b=22>"
    assert "&lt;two&gt;" in made._repr_html_()


# --- the records of the library -----------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_records_are_short_in_terminals_and_tables_in_notebooks(name: str) -> None:
    record = RECORDS[name]()
    text, brief, page = str(record), repr(record), record._repr_html_()
    for said in (text, brief, page):
        assert not LONG.search(said), said
    assert len(brief) < 200
    assert "\n" not in brief
    assert brief.startswith(f"<{type(record).__name__}")
    assert len(max(text.splitlines(), key=len)) < 260
    assert NASTY not in page
    assert page.count("<table>") >= 1
    assert page.count("<table>") == page.count("</table>")
    if NASTY in text:
        assert html.escape(NASTY) in page


def test_a_report_has_a_phrase_for_each_field() -> None:
    report = sa.error_report(HEAD, AHAT)
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(report.as_dict())
    for line, value in zip(lines[1:], report.as_dict().values(), strict=True):
        assert line.split()[1] == number(value)
        assert len(line.split()) > 4
    assert lines[0] == "errors of an approximation, 0 is exact"
    part = sa.error_report(HEAD, output=AHAT @ HEAD.values, spectral=False)
    missing = [name for name, x in part.as_dict().items() if math.isnan(x)]
    assert str(part).splitlines()[0].endswith(f"without {', '.join(missing)}")
    assert len(str(part).splitlines()) == 1 + len(report.as_dict()) - len(missing)


def test_an_output_by_position_is_told_where_it_goes() -> None:
    message = r"got \(48, 8\), that of an output; an output goes in output=$"
    with pytest.raises(ValueError, match=message):
        sa.error_report(HEAD, AHAT @ HEAD.values)
    # Values that are as wide as there are keys make an output that is taken for a matrix.
    wide = sa.AttentionProblem(HEAD.q, HEAD.k, np.eye(48, dtype=np.float32))
    assert sa.error_report(wide, wide.output).output_fro_rel < 1e-6


def test_a_certificate_says_what_it_means() -> None:
    made = sa.ErrorCertificate(0.0017, 0.0016, 0.47, 256, 0.95, "finite-sample")
    assert str(made) == "error 0.0017; 95 %: 0.0016 to 0.47; from 256 rows, finite-sample"
    assert str(sa.certify(HEAD, HEAD.output, 48)).endswith("; exact: all 48 rows")


# --- validation ---------------------------------------------------------------------------------


def test_a_validation_is_a_line_a_topic(result: ValidationResult) -> None:
    lines = str(result).splitlines()
    assert len(lines) < 15
    assert lines[0].startswith(f"{len(result.rows)} checks of 60 trials: ")
    assert lines[2].split()[:3] == ["topic", "claims", "checks"]
    for line, topic in zip(lines[3:5], ("sketching", "linformer"), strict=True):
        rows = [x for x in result.rows if x.claim.id.startswith(f"{topic}.")]
        name, claims, checks, *counts = line.split()
        assert (name, int(claims), int(checks)) == (topic, 1, len(rows))
        assert sum(int(x) for x in counts if x != "-") == len(rows)
    assert lines[6] == "all verdicts are the recorded ones"
    assert lines[8] == "refuted claims, with a counterexample each:"
    (line,) = lines[10:]
    worst = theory.check(REFUTED, "identity", trials=60)
    assert line.split()[:4] == [REFUTED, "identity", number(worst.observed), number(worst.bound)]
    assert line.endswith(theory.claims()[REFUTED].title)


def test_heads_that_agree_are_one_line() -> None:
    heads = sa.make_heads("clustered", n=48, d=8, heads=3, rng=0)

    def broken(kind: str, r: int, n: int, rng: np.random.Generator, **_: Any) -> Any:
        return np.ones((r, n))

    from sketchattn.theory.engine import checking

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checking, "default_factory", broken)
        found = theory.validate("sketching.moment_countsketch", heads, 60)
    assert len(found.unexpected) == 5
    lines = [line for line in str(found).splitlines() if line.startswith("! ")]
    assert len(lines) == 3
    assert lines[-1].endswith("and 2 other heads [recorded: anything but violated]")
    assert "5 verdicts differ from the record:" in str(found)
    assert not found.passed


def test_refuted_claims_without_a_counterexample_say_why() -> None:
    few = theory.validate("sketching.sample_distinct_with_weights_of_repeated", HEAD, 20)
    assert re.search(r"needs \d+ trials  ", str(few))


def test_tables_can_be_read_and_printed(tmp_path: Path, result: ValidationResult) -> None:
    heads = "clustered:n=48,d=8"
    options = ("--claims", f"{TAIL},{REFUTED}", "--heads", heads, "--trials", "60")
    assert main(["validate", *options, "--out", str(tmp_path)]) == 0
    frame = pd.read_csv(tmp_path / "verdicts.csv")
    rows = json.loads((tmp_path / "verdicts.json").read_text())["rows"]
    assert frame["claim"].tolist() == [row["claim"] for row in rows]
    assert frame["observed"].tolist() == [row["observed"] for row in rows]  # to the last bit
    latex = result.frame[["claim", "verdict", "bound"]].to_latex(index=False)
    assert latex.startswith("\\begin{tabular}")
    assert "to_latex()" in (ValidationResult.frame.fget.__doc__ or "")  # type: ignore[attr-defined]


def test_a_figure_obeys_the_settings_of_its_user(result: ValidationResult) -> None:
    import matplotlib

    with matplotlib.rc_context({"axes.facecolor": "#ffeedd"}):
        figure = result.figure(TAIL)
    assert [axes.get_facecolor() for axes in figure.axes] == [(1.0, 238 / 255, 221 / 255, 1.0)] * 2
    for kind, start in (("pdf", b"%PDF"), ("svg", b"<?xml"), ("png", b"\x89PNG")):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind)
        assert buffer.getvalue().startswith(start)
    assert TAIL in figure.get_suptitle()
    with pytest.raises(ValueError, match="id must be that of a claim which was checked, got"):
        result.figure("sketching.amm_markov")
    with pytest.raises(ValueError, match="id must be that of a claim, got 'sketching.amm_markof'"):
        result.figure("sketching.amm_markof")


# --- jobs ---------------------------------------------------------------------------------------


def test_jobs_are_those_of_scikit_learn() -> None:
    assert check_jobs(-1, "head") == cpu_count()
    assert check_jobs(3, "head") == check_jobs(3, "head", long=True) == 3
    assert check_jobs(None, "head") == 1
    assert check_jobs(None, "head", long=True) == cpu_count()
    for wrong in (0, -2):
        with pytest.raises(ValueError, match=f"^jobs must be at least 1, got {wrong}"):
            check_jobs(wrong, "head")


def test_commands_have_the_default_of_their_functions() -> None:
    import inspect

    from typer.main import get_command

    from sketchattn.cli.application import app

    commands: Any = get_command(app)
    for verb, function in (("study", sa.study), ("validate", theory.validate)):
        (option,) = [x for x in commands.commands[verb].params if x.name == "jobs"]
        assert option.default == inspect.signature(function).parameters["jobs"].default is None


# --- names --------------------------------------------------------------------------------------

INTEGRATIONS = ("jax", "onnx", "torch", "transformers")


def public_modules() -> dict[str, ModuleType]:
    """Return every module that can be reached from the package by public names."""
    found = {"sketchattn": sa}
    queue: list[ModuleType] = [sa]
    while queue:
        module = queue.pop()
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, ModuleType) and value.__name__ not in found:
                found[value.__name__] = value
                queue.append(value)
    return found


@pytest.mark.parametrize("name", sorted(public_modules()))
def test_public_modules_complete_to_their_own_names(name: str) -> None:
    module = public_modules()[name]
    listed = module.__all__
    assert len(set(listed)) == len(listed)
    for word in ("np", "Any", "annotations", "math", "NDArray"):
        assert word not in dir(module)
    if name == "sketchattn.integrations":
        assert sorted(dir(module)) == sorted(INTEGRATIONS)
        return
    assert set(dir(module)) == set(listed)
    for entry in listed:
        value = getattr(module, entry)
        home = getattr(value, "__module__", None) or getattr(value, "__name__", "sketchattn")
        assert str(home).startswith(("sketchattn", "builtins")), (name, entry)
    # What is public in a room is all of what it imports under its own name.
    path = Path(str(module.__file__))
    if path.name == "__init__.py" and not path.with_suffix(".pyi").exists():
        imports = [x for x in ast.parse(path.read_text()).body if isinstance(x, ast.ImportFrom)]
        names = {a.asname for x in imports if x.module for a in x.names if a.asname}
        assert names <= set(listed)


def test_all_public_modules_are_meant() -> None:
    found = set(public_modules())
    topics = {f"sketchattn.theory.{name}" for name in ("sketching", "dba", "training_free")}
    others = {"sampling", "sketches", "testing", "partitions", "integrations", "theory"}
    assert topics | {f"sketchattn.{name}" for name in others} < found
    assert {"sketchattn.errors.perturbation", "sketchattn.sketches.compression"} < found
    assert len(found) >= 18


@pytest.mark.parametrize("name", INTEGRATIONS)
def test_integrations_complete_to_their_own_names(name: str) -> None:
    needs = {"transformers": "transformers", "torch": "torch"}.get(name, name)
    pytest.importorskip(needs)
    module = import_module(f"sketchattn.integrations.{name}")
    assert dir(module) == module.__all__
    assert all(hasattr(module, entry) for entry in module.__all__)


# --- the page -----------------------------------------------------------------------------------


def test_the_page_about_claims_runs(capsys: pytest.CaptureFixture[str]) -> None:
    from sketchattn.theory.engine import registry

    theory.claims()
    before = dict(registry._ENTRIES)
    page = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    space: dict[str, Any] = {}
    try:
        for block in blocks:
            exec(compile(block, "docs/claims.md", "exec"), space)
    finally:
        registry._ENTRIES.clear()
        registry._ENTRIES.update(before)
    assert len(blocks) == 3
    assert space["verdict"].failures == 0
    assert len(space["study"].bounds) == 2
    assert "refuted claims, with a counterexample each:" in capsys.readouterr().out
