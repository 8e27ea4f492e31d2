"""Ranks as shares of the keys: heads of several lengths stand side by side by their shares."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import sketchattn as sa
from sketchattn.cli import main
from sketchattn.errors.reports import FIELDS
from sketchattn.heads.inputs import renamed
from sketchattn.studies.columns import BOUND_COLUMNS, COLUMNS, REFERENCES, SHARE
from sketchattn.studies.pictures.cost import draw_cost
from sketchattn.studies.pictures.each_method import draw_each
from sketchattn.studies.pictures.layers import draw_layers
from sketchattn.studies.pictures.spectra import draw_spectra
from sketchattn.studies.plots import study_figure
from sketchattn.studies.ranks import Share, asked_of, rank_of, ranks_of, shares_of
from sketchattn.studies.report.figures import charts
from sketchattn.studies.report.medians import Medians
from sketchattn.studies.report.tables import all_table, budget_table, head_table, work_table
from sketchattn.studies.summary import StudyResult, rank_lines

LENGTHS = {"a/head0": 40, "a/head1": 40, "b/head0": 60, "b/head1": 60}
SHARES = [0.1, 0.25, 0.5]
MIXED = [4, 0.1, 8, 0.5]
FIELD = "output_fro_rel"
BOUND = "sketching.moment_gaussian"


def made(lengths: dict[str, int], ranks: list[float], error: Any) -> StudyResult:
    """Return a result of one seed whose fields all are ``error(head, method, rank)``."""
    asked = asked_of(ranks, lengths)

    def rows(methods: tuple[str, ...]) -> pd.DataFrame:
        found = [
            [head, method, rank, 0, *([error(head, method, rank)] * len(FIELDS))]
            + [1e-3 * rank, 8, rank, rank / lengths[head]]
            + [error(head, method, rank)] * 2
            + [lengths[head], share]
            for head in lengths
            for method in methods
            for rank, share in asked[head]
        ]
        return pd.DataFrame(found, columns=[*COLUMNS, SHARE])

    bounds = pd.DataFrame(columns=list(BOUND_COLUMNS))
    return StudyResult(rows(("m",)), rows(REFERENCES), {}, None, (), 0, 0, bounds)


def heads() -> list[sa.AttentionProblem]:
    """Return two heads of 40 keys and two of 60."""
    found: list[sa.AttentionProblem] = []
    for name, n in LENGTHS.items():
        (problem,) = sa.make_heads("clustered", n=n, d=4, rng=len(found))
        found.append(renamed(problem, name))
    return found


@pytest.fixture(scope="module", params=["shares", "mixed"])
def result(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    out = tmp_path_factory.mktemp(request.param)
    ranks = SHARES if request.param == "shares" else MIXED
    return sa.study(heads(), ["uniform", "jl"], ranks, 2, out=out, pictures=False, bounds=BOUND)


def words(result: StudyResult) -> list[str]:
    return ["10 %", "25 %", "50 %"] if "shares" in str(result.out) else ["4", "10 %", "8", "50 %"]


def at(result: StudyResult) -> list[float]:
    """Return the ranks of all heads in order."""
    found = sorted(set(ranks_of(result.references)))
    # 10 % are 4 and 6 keys, half of them 20 and 30: 5 and 25 in the median.
    assert [float(x) for x in found] == (SHARES if len(found) == 3 else [4, 5, 8, 25])
    assert list(map(str, found)) == words(result)
    return found


def across(line: Any) -> list[float]:
    """Return where the points of a line are."""
    return [float(x) for x in line.get_xdata()]


def same(a: pd.DataFrame, b: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(a, b, check_exact=True)


# --- rows ---------------------------------------------------------------------------------------


def test_a_row_knows_its_share(result: StudyResult) -> None:
    given = SHARES if "shares" in str(result.out) else MIXED
    for frame, names in ((result.frame, ["uniform", "jl"]), (result.references, [*REFERENCES])):
        assert list(frame.columns) == [*COLUMNS, SHARE]
        assert frame[SHARE].dtype == np.float64
        for (head, method), part in frame.groupby(["head", "method"], sort=False):
            assert method in names
            n = LENGTHS[str(head)]
            seeds = len(set(part["seed"]))
            assert part["rank"].tolist() == [rank_of(x, n) for x in given for _ in range(seeds)]
            want = [x if isinstance(x, float) else math.nan for x in given for _ in range(seeds)]
            np.testing.assert_array_equal(part[SHARE], want)
    per_head = result.bounds.groupby("head")[SHARE].apply(list)
    for shares in per_head:
        np.testing.assert_array_equal(shares, [x if x < 1 else math.nan for x in given])


def test_integers_alone_have_no_shares() -> None:
    found = sa.study(heads(), "uniform", [4, 8], 1, floors=False)
    assert list(found.frame.columns) == list(COLUMNS)
    assert SHARE not in found.summary()
    assert SHARE not in found.rank_at(FIELD, 0.5)
    assert ranks_of(found.frame) == found.frame["rank"].tolist()


def test_ranks_that_agree_on_all_heads_are_one_and_on_some_they_are_not() -> None:
    both = sa.study(heads(), "uniform", [0.1, 0.11, 4], 1, floors=False)
    # 4, 4.4 and 4 of 40 keys; 6, 6.6 and 4 of 60.
    assert both.frame["rank"].tolist() == [4, 4, 4] * 2 + [6, 7, 4] * 2
    assert both.rank_at(FIELD, math.inf).iloc[0]["heads"] == 4
    for head, rows in both.frame.groupby("head"):  # one computation stands behind equal ranks
        assert rows.groupby("rank")[FIELD].nunique().max() == 1, head
    short = sa.study(heads()[:2], "uniform", [0.1, 0.11, 4], 1, floors=False)
    assert short.frame["rank"].tolist() == [4, 4]
    assert short.frame[SHARE].tolist() == [0.1, 0.1]
    first = sa.study(heads()[:2], "uniform", [4, 0.1], 1, floors=False)
    assert list(first.frame.columns) == list(COLUMNS)


def test_places_among_integers_are_apart() -> None:
    # 1, 8 and 25 keys; 1, 8 and 26: the median of both is the integer beside them.
    result = made({"a": 4, "b": 30, "c": 101}, [0.25, 0.26, 8], lambda *_: 0.5)
    shares = shares_of(result.frame)
    assert [str(x) for x in shares.values()] == ["25 %", "26 %"]
    places = [8.0, *map(float, shares.values())]
    assert places == sorted(set(places))
    assert places == pytest.approx([8.0, 8.0, 8.0], rel=1e-12)
    assert result.rank_at(FIELD, 0.5).iloc[0]["heads"] == 3


# --- what goes over heads -----------------------------------------------------------------------


def test_rank_at_counts_all_heads_at_a_share() -> None:
    lengths = {f"h{i}": 20 if i < 6 else 100 for i in range(12)}
    # The error is 1 / (10 share): 1, 0.4 and 0.2 on heads of both lengths.
    result = made(lengths, SHARES, lambda head, _, rank: lengths[head] / rank / 10)
    table = result.rank_at(FIELD, 0.4)
    assert list(table.columns) == [
        "method", "role", "rank", "share", "heads", "rank_all", "share_all", FIELD, "seconds",
        "work",
    ]  # fmt: skip
    row = table.iloc[0]
    assert (row["share"], row["heads"], row["share_all"]) == (0.25, 12, 0.25)
    assert pd.isna(row["rank"])  # 5 or 25
    assert pd.isna(row["rank_all"])
    assert row[FIELD] == pytest.approx(0.4)
    assert row["seconds"] == pytest.approx(0.015)  # the median of 5 and 25 ms
    assert row["work"] == 0.25
    lines = rank_lines(table, FIELD, 0.4, 12)
    assert lines[3].split()[:7] == ["m", "25", "%", "12", "of", "12", "25"]
    none = result.rank_at(FIELD, 0.1)
    assert none[["rank", "share", "rank_all", "share_all"]].isna().all(axis=None)
    assert rank_lines(none, FIELD, 0.1, 12)[3].split()[:5] == ["m", "-", "0", "of", "12"]
    # The heads of 100 keys need half of them for twice the error.
    uneven = made(lengths, SHARES, lambda head, _, rank: (lengths[head] / 20) ** 0.5 / rank)
    row = uneven.rank_at(FIELD, 1 / 5).iloc[0]
    assert (row["share"], row["heads"], row["share_all"]) == (0.25, 12, 0.25)
    row = uneven.rank_at(FIELD, 0.5).iloc[0]  # 1/2 of 20 keys; 2.236/10 of 100
    assert (row["share"], row["heads"], row["share_all"]) == (0.1, 12, 0.1)
    row = uneven.rank_at(FIELD, 0.21).iloc[0]
    assert (row["share"], row["heads"]) == (0.25, 12)


def test_heads_of_one_length_have_a_rank_beside_their_share() -> None:
    lengths = {"a": 40, "b": 40}
    result = made(lengths, SHARES, lambda _, __, rank: 1 / rank)
    row = result.rank_at(FIELD, 0.1).iloc[0]
    assert (row["rank"], row["share"], row["rank_all"], row["share_all"]) == (10, 0.25, 10, 0.25)
    summary = result.summary()
    own = summary[summary["method"] == "m"]
    assert own["rank"].tolist() == [4, 10, 20]
    assert own[SHARE].tolist() == SHARES


def test_mixed_ranks_are_in_the_order_of_their_medians() -> None:
    result = made({"a": 40, "b": 120}, [32, 0.25, 0.5], lambda _, __, rank: 1 / rank)
    # 32, 32; 10, 30; 20, 60: in the median 32, 20 and 40.
    row = result.rank_at(FIELD, 1 / 11).iloc[0]  # 10 keys are too few
    assert (row["share"], row["heads"], row["rank_all"]) == (0.25, 1, 32)
    assert pd.isna(row["rank"])
    assert pd.isna(row["share_all"])
    result = made({"a": 40, "b": 120}, [16, 0.25], lambda _, __, rank: 1 / rank)
    row = result.rank_at(FIELD, 1 / 16).iloc[0]
    assert (row["rank"], row["rank_all"], row["heads"]) == (16, 16, 2)
    assert row[["share", "share_all"]].isna().all()


def test_the_table_has_a_column_a_share(result: StudyResult) -> None:
    found = [f"r={x}" for x in words(result)]
    shown = found if len(found) == 3 else [found[0], found[2], found[3]]
    lines = str(result).splitlines()
    assert lines[0].startswith(f"4 heads, 2 methods, {len(found)} ranks, 2 seeds")
    header = re.split(r"  +", lines[2])
    assert header == ["method", *shown, *(f"t({x})" for x in shown), "work", "beats mean of V"]
    body = {re.split(r"  +", line)[0]: line for line in lines[3 : lines.index("", 3)]}
    skill = result.frame[result.frame[SHARE] == 0.5].groupby(["method", "head"])["skill"].median()
    for method in ("uniform", "jl"):
        assert body[method].endswith(f"  {(skill[method] > 0).sum()} of 4")
    half = result.frame[(result.frame["method"] == "uniform") & (result.frame[SHARE] == 0.5)]
    assert len(half) == 8
    assert f"  {half[FIELD].median():.3g}  " in body["uniform"]
    assert max(map(len, lines)) <= 100
    every = result.render(every=True).splitlines()
    own = [re.split(r"  +", line)[1] for line in every if line.startswith("uniform")]
    given = SHARES if len(found) == 3 else MIXED
    assert own == [str(Share(x)) if isinstance(x, float) else str(x) for x in given]
    assert "r=10 %" in result._repr_html_() or len(found) == 4
    assert repr(result).startswith(f"StudyResult(heads=4, methods=2, ranks={len(found)}, seeds=2")


def test_the_summary_goes_over_all_heads(result: StudyResult) -> None:
    table = result.summary()
    assert list(table.columns[:4]) == ["method", "role", "rank", SHARE]
    row = table[(table["method"] == "uniform") & (table[SHARE] == 0.5)]
    assert len(row) == 1
    assert row["rank"].isna().all()
    half = result.frame[(result.frame["method"] == "uniform") & (result.frame[SHARE] == 0.5)]
    assert row[FIELD].iloc[0] == half[FIELD].median()
    alike = table[table["role"] == "predictor"]
    assert len(alike) == 2
    assert alike[["rank", SHARE]].isna().all(axis=None)


# --- pictures -----------------------------------------------------------------------------------


def test_curves_go_from_left_to_right(result: StudyResult) -> None:
    places = [float(x) for x in at(result)]
    figures = [
        study_figure(result.frame, result.references, FIELD, result.bounds),
        draw_each(result.frame, result.references, FIELD),
        result.figure("output_fro_amm", bounds=BOUND),
        result.figure("output_fro_amm", heads="each", bounds=BOUND),
    ]
    for figure in figures:
        lines = [
            line
            for axes in figure.axes
            for line in axes.lines
            if line.get_gid() in ("uniform", "jl", "svd", "topk", BOUND)
        ]
        assert len(lines) >= 4
        for line in lines:
            assert across(line) == places, line.get_gid()
        first = figure.axes[0]
        figure.canvas.draw()
        ticks = [t.get_text() for t in first.get_xticklabels()]
        assert ticks
        assert set(ticks) <= set(words(result))
        told = [*(text.get_text() for text in figure.texts), figure.get_supxlabel()]
        told += [axes.get_xlabel() for axes in figure.axes]
        kind = "% of the n keys of a head"
        assert any(text.endswith(kind) and text.startswith("rank") for text in told)


def test_the_median_of_a_curve_is_that_of_all_heads(result: StudyResult) -> None:
    figure = result.figure(FIELD)
    (line,) = (x for x in figure.axes[0].lines if x.get_gid() == "uniform")
    own = result.frame[result.frame["method"] == "uniform"]
    half = own[own[SHARE] == 0.5].groupby("head")[FIELD].median()
    assert len(half) == 4
    assert np.asarray(line.get_ydata(), float)[-1] == half.median()


def test_other_pictures_say_shares(result: StudyResult) -> None:
    at(result)
    cost = draw_cost(result.frame, result.references, FIELD)
    for axes in cost.axes:
        points = [
            len(across(line))
            for line in axes.lines
            if line.get_gid() in ("uniform", "uniform:rest")
        ]
        assert sum(points) == len(words(result))
    texts = [text.get_text() for axes in cost.axes for text in axes.texts]
    assert "50 % of n" in texts or "floor: best matrix of rank 50 % of n" in texts
    middle = words(result)[len(words(result)) // 2]
    layers = draw_layers(result.frame, result.references, FIELD)
    assert layers.get_suptitle().endswith(f"at rank {middle}{' of n' if '%' in middle else ''}")
    assert len(layers.axes[0].texts) == 4
    left, right = draw_spectra(result.references).axes
    assert left.get_xlabel() == "index"  # a singular value has its own on every head
    assert right.get_xlabel().endswith("% of the n keys of a head")
    for axes in (left, right):
        assert len(axes.lines) == 4
        for line in axes.lines:
            assert (np.diff(across(line)) > 0).all()
    assert across(right.lines[0]) == [float(x) for x in at(result)]


def test_bounds_of_some_heads_stand_where_their_method_does() -> None:
    # The longer heads are measured on a sample of rows and have no bounds.
    found = sa.study(heads(), "jl", MIXED, 1, bounds=BOUND, rows=50, floors=False)
    assert set(found.bounds["head"]) == {"a/head0", "a/head1"}
    axes = found.figure("output_fro_amm", bounds=BOUND).axes[0]
    x = {line.get_gid(): across(line) for line in axes.lines}
    assert x[BOUND] == x["jl"] == [4, 5, 8, 25]
    medians = Medians(found.frame, found.references)
    (chart,) = [c for c in charts(medians, found.bounds, {}) if c.name == "measures"]
    (bound,) = [t for t in chart.figure["data"] if t["name"].startswith("bound")]
    assert None not in bound["y"]


# --- the report ---------------------------------------------------------------------------------


def test_the_tables_of_the_report_know_all_heads(result: StudyResult) -> None:
    medians = Medians(result.frame, result.references)
    assert medians.ranks == at(result)
    for row in head_table(medians, {}).rows:
        assert "-" not in [cell.text for cell in row]
    assert head_table(medians, {}).columns[1].title == "best at rank 50 % of n"
    budgets = budget_table(medians).rows
    assert [row[0].text for row in budgets] == words(result)
    assert [row[0].value for row in budgets] == [float(x) for x in at(result)]
    beaten = [row[5].text for row in all_table(medians).rows if row[0].text == "uniform"]
    assert len(beaten) == len(words(result))
    assert all(text.endswith(" of 4") for text in beaten)
    work = work_table(medians)
    assert work is not None
    assert {row[2].text for row in work.rows} <= set(words(result))


def test_the_page_has_shares_and_no_gaps(result: StudyResult) -> None:
    assert result.out is not None
    page = (result.out / "report.html").read_text(encoding="utf-8")
    assert "best at rank 50 % of n" in page
    heads_of = re.search(r'<table[^>]*id="by-head".*?</table>', page, re.DOTALL)
    assert heads_of is not None
    cells = re.findall(r"<td[^>]*>(.*?)</td>", heads_of[0], re.DOTALL)
    assert len(cells) >= 4 * 4
    assert "-" not in cells
    medians = Medians(result.frame, result.references)
    for chart in charts(medians, result.bounds, {}):
        json.dumps(chart.figure, allow_nan=False)
    (chart,) = [c for c in charts(medians, result.bounds, {}) if c.name == "against-rank"]
    (own,) = [t for t in chart.figure["data"] if t["name"] == "uniform"]
    assert own["x"] == sorted(own["x"])
    assert len(own["x"]) == len(words(result))
    assert None not in own["y"]
    assert own["customdata"] == [f"{x} of n" if "%" in x else int(x) for x in words(result)]
    axis = chart.figure["layout"]["xaxis"]
    assert axis["ticktext"] == words(result)
    for menu in chart.figure["layout"]["updatemenus"]:  # a head alone has no gaps either
        for button in menu["buttons"]:
            for ys in button["args"][0].get("y", ()):
                assert None not in ys


# --- folders ------------------------------------------------------------------------------------


def without_shares(folder: Path) -> None:
    """Make a folder what it was before rows had their shares: rows of one rank were one."""
    for name in ("results.csv", "references.csv", "bounds.csv"):
        path = folder / name
        if path.is_file():
            header, *lines = path.read_text().splitlines()
            assert header.endswith(f",{SHARE}")
            kept = dict.fromkeys(line.rsplit(",", 1)[0] for line in (header, *lines))
            path.write_text("\n".join(kept) + "\n")


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("ranks", [SHARES, [4, 0.1, 0.11, 0.5]])
def test_a_folder_gives_the_same(older: bool, ranks: list[float], tmp_path: Path) -> None:
    options: dict[str, Any] = {"pictures": False, "report": False}
    methods = ["uniform", "jl"]
    done = sa.study(heads(), methods, ranks, 2, out=tmp_path, bounds=BOUND, **options)
    if older:
        without_shares(tmp_path)
    found = sa.StudyResult.load(tmp_path)
    for name in ("frame", "references", "bounds"):
        same(getattr(found, name), getattr(done, name))
    assert str(found) == str(done)
    same(found.rank_at(FIELD, 0.5), done.rank_at(FIELD, 0.5))
    # Other methods stand beside those that are there.
    later = sa.study(heads(), "clustered", ranks, 2, out=tmp_path, floors=False, **options)
    assert later.computed > 0
    both = sa.StudyResult.load(tmp_path)
    own = both.frame[both.frame["method"].isin(methods)].reset_index(drop=True)
    same(own, done.frame)
    same(both.bounds, done.bounds)
    table = both.rank_at(FIELD, math.inf)
    assert table[table["role"] == "method"]["heads"].tolist() == [4, 4, 4]
    again = sa.study(heads(), methods, ranks, 2, out=tmp_path, bounds=BOUND, **options)
    assert again.computed == 0
    same(again.frame, done.frame)


def test_a_folder_that_does_not_say_what_was_asked_is_read_as_it_is(tmp_path: Path) -> None:
    done = sa.study(heads(), "uniform", SHARES, 1, out=tmp_path, pictures=False, report=False)
    without_shares(tmp_path)
    path = tmp_path / "study.json"
    settings = json.loads(path.read_text())
    changes: list[dict[str, Any]] = [{"ranks": None}, {"heads": []}, {"ranks": [0.2]}]
    for change in changes:
        path.write_text(json.dumps(settings | change))
        same(sa.StudyResult.load(tmp_path).frame, done.frame.drop(columns=SHARE))


def test_cells_of_integers_stand_behind_shares(tmp_path: Path) -> None:
    options: dict[str, Any] = {"out": tmp_path, "pictures": False, "report": False}
    first = sa.study(heads(), "uniform", [4, 6], 2, **options)
    assert first.computed > 0
    second = sa.study(heads(), "uniform", [0.1], 2, **options)
    assert second.computed == 0
    assert second.frame["rank"].tolist() == [4] * 4 + [6] * 4
    same(sa.StudyResult.load(tmp_path).frame, second.frame)


def test_all_keys_are_not_one_key(tmp_path: Path) -> None:
    options: dict[str, Any] = {"out": tmp_path, "pictures": False, "report": False}
    sa.study(heads()[:1], "uniform", [1.0], 1, **options)
    with pytest.raises(ValueError, match="other methods have the same ranks"):
        sa.study(heads()[:1], "jl", [1], 1, **options)


def test_the_command_prints_shares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n in (40, 60):
        (problem,) = sa.make_heads("clustered", n=n, d=4, rng=n)
        sa.write_heads(tmp_path / f"h{n}.npz", sa.Heads.from_problems([problem]))
    files = [str(tmp_path / f"h{n}.npz") for n in (40, 60)]
    words = ["study", *files, "--methods", "uniform", "--ranks", "0.5,1.0", "--seeds", "1"]
    words += ["--no-pictures", "--no-report", "--out", str(tmp_path / "made"), "--target", "1e-3"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "r=50 %  r=100 %" in printed
    (line,) = [x for x in printed.splitlines() if x.startswith("uniform") and " of " in x][1:]
    assert line.split()[:7] == ["uniform", "100", "%", "2", "of", "2", "100"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    row = found["target"][0]
    assert (row["rank"], row["share"], row["rank_all"], row["share_all"]) == (None, 1.0, None, 1.0)
    shares = [x["share"] for x in found["summary"] if x["method"] in ("uniform", "vmean")]
    assert shares == [0.5, 1.0, None]
