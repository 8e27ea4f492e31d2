"""The report of a study as text: what it says, what it holds, what names can do to it."""

from __future__ import annotations

import html
import json
import math
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import sketchattn as sa
from sketchattn.base.machine import command, typed_as
from sketchattn.base.pages import label, number, rounded, short, shorten
from sketchattn.heads.inputs import renamed
from sketchattn.studies.columns import BOUND_COLUMNS, COLUMNS, REFERENCES
from sketchattn.studies.report.figures import charts
from sketchattn.studies.report.hardness import measure_hardness, read_hardness
from sketchattn.studies.report.medians import Medians, front
from sketchattn.studies.report.page import report_page
from sketchattn.studies.report.words import findings, seconds
from sketchattn.theory.engine.page import verdicts_page

MOST = 6_000_000
HOSTILE = "</script><script>alert(1)</script><!--<script>\u2028"
NO_BOUNDS = pd.DataFrame(columns=list(BOUND_COLUMNS))


def rows(
    errors: dict[str, dict[str, list[float]]],
    ranks: list[int],
    costs: dict[str, float] | None = None,
) -> pd.DataFrame:
    """Return rows with one seed from errors by method, head and rank."""
    found = []
    for method, by_head in errors.items():
        for head, values in by_head.items():
            for rank, error in zip(ranks, values, strict=True):
                row = dict.fromkeys(COLUMNS, 0.0)
                cost = (costs or {}).get(method, 1.0)
                row |= {"head": head, "method": method, "rank": rank, "seed": 0}  # type: ignore[dict-item]
                row |= {"output_fro_rel": error, "seconds": cost, "work": 0.1}
                found.append(row)
    return pd.DataFrame(found)


def beside(heads: list[str], ranks: list[int], mean: float = 0.5) -> pd.DataFrame:
    """Return references: top-k has 0.1, exact takes 2 seconds."""
    levels = {"svd": 0.05, "topk": 0.1, "zero": 1.0, "vmean": mean, "exact": 1e-16}
    errors = {name: {h: [levels[name]] * len(ranks) for h in heads} for name in REFERENCES}
    return rows(errors, ranks, {"exact": 2.0})


def told(medians: Medians) -> str:
    return " ".join("".join(text for text, _ in sentence) for sentence in findings(medians))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study")
    heads = sa.make_heads("clustered", n=32, d=4, heads=2, rng=0)
    named = [renamed(p, name) for p, name in zip(heads, (HOSTILE, "b"), strict=True)]
    methods = [(HOSTILE, sa.ColumnSampling(rank=4)), ("jl", sa.JL(rank=4))]
    bounds = next(x for x, y in sa.theory.error_bounds().items() if y.is_about(sa.JL(rank=4)))
    sa.study(named, methods, [2, 4], seeds=2, out=out, pictures=False, bounds=bounds)
    return out


# --- words ----------------------------------------------------------------------------------------


def test_words_name_the_best_and_those_that_lose() -> None:
    ranks = [4, 8]
    frame = rows(
        {
            "good": {"a": [0.3, 0.2], "b": [0.4, 0.2]},
            "mixed": {"a": [0.3, 0.1], "b": [0.7, 0.8]},
            "bad": {"a": [0.9, 0.5], "b": [0.8, 0.6]},
        },
        ranks,
        {"good": 3.0, "mixed": 1.0},
    )
    medians = Medians(frame, beside(["a", "b"], ranks))
    assert medians.best(8) == ("good", 0.2)
    assert medians.best(8, worst_head=True) == ("good", 0.2)
    assert medians.lost("mixed", 8) == ["b"]
    text = told(medians)
    assert "good at rank 8 with 0.200 (the mean of V has 0.500)" in text
    assert "good at rank 4 with 0.350" in text
    assert "the best method is 2.0 times the first and 4.0 times the second" in text
    # As bad as the mean of V is not better than it.
    assert "Never better than the mean of V, at any rank: bad." in text
    assert "Not better than the mean of V at rank 8: mixed on 1 of 2 heads." in text
    # Of what is faster than exact only "mixed" beats the mean of V, at rank 8.
    assert "the best that is faster: mixed at rank 8, 1.00 s with an error of 0.450." in text


def test_words_say_so_where_all_are_good_and_none_is_fast() -> None:
    frame = rows({"good": {"a": [0.1]}}, [4], {"good": 5.0})
    text = told(Medians(frame, beside(["a"], [4])))
    assert "Every method beats the mean of V on every head at rank 4." in text
    assert "no method that beats the mean of V is faster." in text


def test_words_survive_numbers_that_are_none() -> None:
    frame = rows({"odd": {"a": [math.nan], "b": [math.inf]}}, [4])
    medians = Medians(frame, beside(["a", "b"], [4]))
    assert medians.over("output_fro_rel", "odd", 4).middle == math.inf
    assert "odd" in told(medians)
    none = Medians(rows({"odd": {"a": [math.nan]}}, [4]), beside(["a"], [4]))
    assert "No method has a number" in told(none)


def test_heads_may_have_ranks_of_their_own() -> None:
    frame = pd.concat([rows({"m": {"a": [0.2]}}, [4]), rows({"m": {"b": [0.4]}}, [16])])
    other = pd.concat([beside(["a"], [4]), beside(["b"], [16])])
    medians = Medians(frame, other)
    assert medians.ranks == [4, 16]
    assert medians.curve("output_fro_rel", "m", "b")[1] == 0.4
    assert medians.typical("output_fro_rel", "m") == [0.2, 0.4]
    assert "m" in report_page(frame, other, NO_BOUNDS, {}, {}, {})


def test_the_front_is_what_nothing_beats() -> None:
    rng = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in rng.random((40, 2))]
    kept = front(points)
    for i, (x, y) in enumerate(points):
        beaten = any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
        assert (i in kept) != beaten
    assert [points[i][0] for i in kept] == sorted(points[i][0] for i in kept)
    assert front([(math.nan, 0.0), (1.0, math.inf)]) == []


# --- the page -------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Collect what a browser would run or fetch, and the text that it would show."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.fetched: list[str] = []
        self.handlers: list[str] = []
        self.text: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        self.fetched += [str(x) for name, x in attrs if name in ("src", "data", "srcset")]
        self.fetched += [str(x) for name, x in attrs if name == "href" and tag == "link"]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            attributes, before = self.scripts[-1]
            self.scripts[-1] = (attributes, before + data)
        else:
            self.text.append(data)


def test_a_page_stands_alone_and_is_small(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert len(page.encode()) < MOST
    tags = Tags()
    tags.feed(page)
    assert tags.fetched == []
    assert tags.handlers == []
    # Its own three, and figures as data.
    assert len([x for x, _ in tags.scripts if not x]) == 3
    assert {x.get("type") for x, _ in tags.scripts} == {None, "application/json"}
    assert page.count("plotly.js v") == 1


def test_names_are_text_wherever_they_stand(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert HOSTILE not in page
    tags = Tags()
    tags.feed(page)
    assert any(HOSTILE in x for x in tags.text)
    figures = [json.loads(x) for attributes, x in tags.scripts if attributes]
    assert len(figures) == 5  # too few heads for their hardness
    names = [trace.get("name", "") for figure in figures for trace in figure["data"]]
    assert any(x.startswith("&lt;/script&gt;") for x in names)

    def labels(x: Any, key: str = "") -> list[str]:
        if isinstance(x, dict):
            return [y for k, v in x.items() for y in labels(v, k)]
        if isinstance(x, list):
            return [y for v in x for y in labels(v, key)]
        return [x] if isinstance(x, str) and key not in ("hovertemplate", "texttemplate") else []

    # Plotly reads entities and some tags; of our own there are only line breaks.
    for text in labels(figures):
        assert "<" not in text.replace("<br>", "")


def test_the_policy_allows_the_scripts_of_the_page_alone(folder: Path) -> None:
    import base64
    import hashlib

    page = (folder / "report.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    policy = html.unescape(re.search(r'Policy" content="([^"]*)"', page).group(1))  # type: ignore[union-attr]
    own = [text for attributes, text in tags.scripts if not attributes]
    hashes = [base64.b64encode(hashlib.sha256(x.encode()).digest()).decode() for x in own]
    (allowed,) = [x for x in policy.split("; ") if x.startswith("script-src")]
    assert allowed.split()[1:] == [f"'sha256-{x}'" for x in hashes]
    assert "default-src 'none'" in policy


def test_figures_are_figures_of_plotly(folder: Path) -> None:
    # Plotly's own classes refuse attributes and values that it does not know.
    from plotly.graph_objects import Figure

    tags = Tags()
    tags.feed((folder / "report.html").read_text(encoding="utf-8"))
    for attributes, text in tags.scripts:
        if attributes:
            figure = json.loads(text)
            Figure(data=figure["data"], layout=figure["layout"])


def test_a_large_study_is_small_enough() -> None:
    ranks = [8, 16, 32, 64, 128, 256]
    heads = [f"model/layer{i // 12}.head{i % 12}" for i in range(144)]
    rng = np.random.default_rng(0)
    errors = {
        f"method number {i}": {h: rng.random(len(ranks)).tolist() for h in heads} for i in range(24)
    }
    page = report_page(rows(errors, ranks), beside(heads, ranks), NO_BOUNDS, {}, {}, {})
    assert len(page.encode()) < MOST


def test_bounds_are_drawn_and_listed(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    bounds = pd.read_csv(folder / "bounds.csv")
    claim = bounds["claim"][0]
    tags = Tags()
    tags.feed(page)
    figures = [json.loads(x) for attributes, x in tags.scripts if attributes]
    (measures,) = [x for x in figures if any("total" in y["label"] for y in _entries(x))]
    (line,) = [x for x in measures["data"] if x["name"].startswith("bound ")]
    by_rank = bounds.groupby("rank")["bound"].median()
    assert line["y"] == pytest.approx(by_rank.tolist(), rel=1e-4)
    assert f">{claim}</td>" in page


def _entries(figure: dict[str, Any]) -> list[dict[str, Any]]:
    return [x for menu in figure["layout"]["updatemenus"] for x in menu["buttons"]]


def test_intervals_of_sampled_rows_are_error_bars() -> None:
    frame = rows({"m": {"a": [0.5, 0.4]}}, [4, 8])
    other = beside(["a"], [4, 8])
    for each in (frame, other):
        each["output_fro_rel_low"] = each["output_fro_rel"]
        each["output_fro_rel_high"] = each["output_fro_rel"]
    frame["output_fro_rel_high"] = [0.75, 0.4]
    (chart,) = [x for x in charts(Medians(frame, other), NO_BOUNDS, {}) if x.name == "against-rank"]
    bars = {x["name"]: x["error_y"] for x in chart.figure["data"] if x["name"]}
    assert bars["m"]["array"] == [0.25, 0.0]
    assert bars["m"]["arrayminus"] == [0.0, 0.0]
    assert bars["mean of V"] == {"visible": False}


def test_many_heads_are_shown_in_part_and_the_page_says_so() -> None:
    heads = [f"h{i}" for i in range(400)]
    frame = rows({"m": {h: [0.2] for h in heads}}, [4])
    found = charts(Medians(frame, beside(heads, [4])), NO_BOUNDS, {})
    (chart,) = [x for x in found if x.name == "heads-map"]
    assert len(chart.figure["data"][0]["x"]) == 150
    assert "150 of 400 heads" in chart.about


# --- hardness -------------------------------------------------------------------------------------


def test_hardness_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sketchattn.studies.report import hardness

    heads = list(sa.make_heads("clustered", n=16, d=4, heads=2, rng=0))
    found = measure_hardness(heads, tmp_path, 1)
    expected = sa.describe(heads[0])
    kept = found[str(heads[0].name)]
    assert kept["perplexity_median"] == expected.perplexity_median
    assert kept["digest"] == heads[0].digest
    assert read_hardness(tmp_path) == found

    seen: list[str | None] = []

    def described(problem: sa.AttentionProblem) -> Any:
        seen.append(problem.name)
        return expected

    monkeypatch.setattr(hardness, "describe", described)
    assert measure_hardness(heads, tmp_path, 1) == found
    other = renamed(sa.make_heads("gaussian", n=16, d=4, rng=1)[0], str(heads[1].name))
    measure_hardness([heads[0], other], tmp_path, 1)
    assert seen == [heads[1].name]


def test_large_and_blind_heads_have_no_hardness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sketchattn.studies.report import hardness

    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 8, 4))
    heads = [
        sa.AttentionProblem(q, k, k, name="sees"),
        sa.AttentionProblem(q, k, k, key_mask=np.zeros(8, bool), name="blind"),
    ]
    assert list(measure_hardness(heads, tmp_path, 1)) == ["sees"]
    monkeypatch.setattr(hardness, "MOST_ENTRIES", 63)
    assert measure_hardness(heads, tmp_path, 1) == {}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": "0", "heads": {}}', "\x00"])
def test_a_damaged_file_of_hardness_is_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "hardness.json").write_text(text)
    assert read_hardness(tmp_path) == {}


# --- of a study -----------------------------------------------------------------------------------


def tiny(**options: Any) -> Any:
    heads = sa.make_heads("gaussian", n=16, d=4, rng=0)
    return sa.study(heads, ["uniform"], [2, 4], seeds=1, pictures=False, **options)


def test_a_report_that_fails_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(out=tmp_path)
    assert (tmp_path / "report.html").is_file()

    def fail(*_: object, **__: object) -> None:
        raise ValueError("no ink")

    monkeypatch.setattr("sketchattn.studies.report.page.render_page", fail)
    with pytest.warns(RuntimeWarning, match=r"^report is missing: ValueError: no ink$") as noted:
        result = tiny(out=tmp_path)
    assert len(noted) == 1
    assert noted[0].filename == __file__
    assert len(result.frame) == 2
    assert not (tmp_path / "report.html").exists()  # that of an earlier study is not that of this


def test_no_report_is_written_unless_there_is_a_folder_that_wants_one(tmp_path: Path) -> None:
    tiny()
    tiny(out=tmp_path, report=False)
    assert not (tmp_path / "report.html").exists()
    assert not (tmp_path / "hardness.json").exists()
    with pytest.raises(TypeError, match="^report must be"):
        tiny(report="no")


def test_other_rows_delete_the_report(tmp_path: Path) -> None:
    tiny(out=tmp_path)
    tiny(out=tmp_path, report=False)
    assert (tmp_path / "report.html").exists()  # the same rows
    heads = sa.make_heads("gaussian", n=16, d=4, rng=1)
    sa.study(heads, ["uniform"], [2], seeds=1, pictures=False, out=tmp_path, report=False)
    assert not (tmp_path / "report.html").exists()


def test_the_page_says_how_it_was_made(tmp_path: Path) -> None:
    tiny(out=tmp_path)
    page = html.unescape((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "sa.study(heads, methods=['uniform'], ranks=[2, 4], seeds=1" in page
    for text in (np.__version__, sa.__version__, "UniformColumns(estimator='self-normalized'"):
        assert text in page
    with typed_as(["study", "two words.npz"]):
        tiny(out=tmp_path)
    page = html.unescape((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "sketchattn study 'two words.npz'" in page
    assert command() == ""


def test_a_report_of_the_same_study_is_the_same_page(folder: Path) -> None:
    frame, other = (pd.read_csv(folder / f"{name}.csv") for name in ("results", "references"))
    settings = json.loads((folder / "study.json").read_text())
    bounds = pd.read_csv(folder / "bounds.csv")
    pages = {
        report_page(frame, other, bounds, {}, settings, read_hardness(folder)) for _ in range(2)
    }
    assert len(pages) == 1


# --- numbers and names ----------------------------------------------------------------------------


def test_numbers_are_short() -> None:
    cases = {0.0: "0", 1.0: "1.00", 0.0999999: "0.100", 99999.0: "100000", 123456.0: "1.23e5"}
    assert {x: short(x) for x in cases} == cases
    assert [short(x) for x in (-0.25, 5e-324, -math.inf)] == ["-0.250", "4.94e-324", "-inf"]
    assert number(7).text == "7"
    assert number(None).text == number(math.nan).text == "-"
    assert rounded([1.23456789, math.inf, math.nan]) == [1.2346, None, None]
    assert [seconds(x) for x in (1.0, 0.999e-3, math.nan)] == ["1.00 s", "999 µs", "-"]


def test_labels_are_short_and_text() -> None:
    assert label("a\n b & <i>") == "a b &amp; &lt;i&gt;"
    assert len(shorten("x" * 100, 40)) <= 40
    assert label("<" * 100, 9) == "&lt;&lt;&lt;&lt;…&lt;&lt;&lt;&lt;"


# --- verdicts -------------------------------------------------------------------------------------


def test_verdicts_are_one_page(tmp_path: Path) -> None:
    heads = sa.make_heads("clustered", n=16, d=4, heads=3, rng=0)
    named = [renamed(p, f"{HOSTILE}{i}") for i, p in enumerate(heads)]
    result = sa.theory.validate(["linformer.thm1", "linformer.pooling"], named, trials=10)
    (tmp_path / "linformer.thm1.png").write_bytes(b"")
    path = result.report(tmp_path / "v.html")
    assert path == tmp_path / "v.html"
    page = path.read_text(encoding="utf-8")
    assert HOSTILE not in page
    tags = Tags()
    tags.feed(page)
    assert tags.fetched == ["linformer.thm1.png"]  # the other claim has no picture
    assert all(row.claim.statement in html.unescape(page) for row in result.rows)
    every = verdicts_page(result.rows, [], result.trials, result.confidence)
    together = verdicts_page(result.rows, list(result._heads), result.trials, result.confidence)
    assert every.count("<tr>") > together.count("<tr>")
    assert "3 heads" in together


def test_verdicts_that_differ_are_named(tmp_path: Path) -> None:
    import dataclasses

    result = sa.theory.validate("linformer.pooling", "minilm", trials=5)
    with warnings.catch_warnings():
        odd = [dataclasses.replace(row, recorded="violated", repeats=True) for row in result.rows]
    page = verdicts_page(odd, [], result.trials, result.confidence)
    assert "Verdicts that differ from the record" in page
    assert "recorded: violated" in page
    assert "All verdicts are the recorded ones." not in page
