"""Pictures that compare methods, and what a result of a study can be asked for."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from test_plots import RANKS, bounds_of, error, frame_of, gids, line_of, references_of

import sketchattn as sa
from sketchattn.errors.reports import FIELDS
from sketchattn.studies.columns import BOUND_COLUMNS, COLUMNS
from sketchattn.studies.palette import DASHES, SYMBOLS, style_of
from sketchattn.studies.pictures.axes import scale_of
from sketchattn.studies.pictures.cost import draw_cost, without_the_useless
from sketchattn.studies.pictures.curves import Curve, Point, front_of, intervals_of
from sketchattn.studies.pictures.each_method import draw_each
from sketchattn.studies.pictures.layers import cells_of, draw_layers, place_of
from sketchattn.studies.pictures.one import draw_one
from sketchattn.studies.pictures.places import spread
from sketchattn.studies.pictures.spectra import draw_spectra
from sketchattn.studies.plots import PICTURES
from sketchattn.studies.summary import rank_lines

FIELD = "output_fro_rel"


def result_of(frame: pd.DataFrame, references: pd.DataFrame, **options: Any) -> sa.StudyResult:
    given: dict[str, Any] = {
        "left_out": {},
        "out": None,
        "pictures": (),
        "computed": 0,
        "reused": 0,
        "bounds": pd.DataFrame(columns=list(BOUND_COLUMNS)),
    }
    return sa.StudyResult(frame, references, **(given | options))


def texts_of(figure: Figure) -> list[str]:
    return [t.get_text() for axes in figure.axes for t in axes.texts]


# --- looks --------------------------------------------------------------------------------------


def test_no_two_of_24_methods_need_colour_to_be_told_apart() -> None:
    names = [f"m{i}" for i in range(24)]
    looks = [style_of(name, names) for name in names]
    assert len({(x.dash, x.marker) for x in looks}) == 24
    assert len({(x.colour, x.dash) for x in looks}) == 24
    assert {x.dash for x in looks} == set(DASHES)
    assert {x.marker for x in looks} == set(SYMBOLS)
    with pytest.raises(ValueError, match="not in list"):
        style_of("other", names)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_lines_can_be_seen_on_white() -> None:
    """WCAG asks 3:1 of what is drawn; the lightest two are marked and dashed, and above 2:1."""
    names = [f"m{i}" for i in range(24)]
    ratios = [1.05 / (luminance(style_of(x, names).colour) + 0.05) for x in names]
    assert min(ratios) > 2.0
    assert sorted(ratios)[len(ratios) // 2] > 3.0


# --- fronts and axes ----------------------------------------------------------------------------


def test_a_front_is_what_no_other_point_beats() -> None:
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 6, (40, 2)).astype(float)
    points = [Point("m", i, x, y) for i, (x, y) in enumerate(pairs)]
    front = front_of(points)
    for p in points:
        beaten = any(
            (q.cost, q.error) != (p.cost, p.error) and q.cost <= p.cost and q.error <= p.error
            for q in points
        )
        there = (p.cost, p.error) in {(q.cost, q.error) for q in front}
        assert there != beaten
    assert [p.cost for p in front] == sorted({p.cost for p in front})


def curve(name: str, values: list[float]) -> Curve:
    return Curve(name, list(range(1, len(values) + 1)), values, values, values)


def test_an_axis_ends_where_methods_live() -> None:
    many = [curve(f"m{i}", [0.5, 0.2, 0.1]) for i in range(20)]
    vmean = curve("vmean", [0.8, 0.8, 0.8])
    exact = curve("odd", [1e-7, 1e-7, 1e-7])
    whole = scale_of(FIELD, [*many, vmean])
    assert whole.bottom < 0.1
    cut = scale_of(FIELD, [*many, vmean, exact])
    assert 1e-3 < cut.bottom < 0.1  # a decade below, not seven
    # All that is much worse than predicting the mean is alike.
    bad = curve("bad", [50.0, 40.0, 30.0])
    wide = scale_of(FIELD, [*many, vmean, bad])
    assert wide.top > 50
    assert without_the_useless(wide, [*many, vmean, bad]).top == pytest.approx(2.4)
    # Unless that is where most methods are.
    alone = scale_of(FIELD, [vmean, bad])
    assert without_the_useless(alone, [vmean, bad]).top > 40


def test_heights_are_near_and_never_closer_than_a_line() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        wanted = np.sort(rng.random(12))
        found = spread(wanted, 0.05, 0.0, 1.0)
        assert (np.diff(found) >= 0.05 - 1e-12).all()
        assert found.min() >= 0
        assert found.max() <= 1 + 1e-12
    assert spread(np.array([0.1, 0.5, 0.9]), 0.05, 0, 1) == pytest.approx([0.1, 0.5, 0.9])
    assert spread(np.linspace(0.4, 0.5, 41), 0.05, 0, 1) == pytest.approx(np.linspace(0, 1, 41))


# --- error against cost -------------------------------------------------------------------------


def priced() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return three methods of which the last is best at no cost, and exact at 5 ms."""
    frame = frame_of(error, methods=3)
    ranks = frame["rank"].to_numpy()
    speed = frame["method"].map({"m0": 1e-4, "m1": 1e-5, "m2": 2e-4})
    frame["seconds"] = ranks * speed
    references = references_of()
    references.loc[references["method"] == "exact", "seconds"] = 5e-3
    references.loc[references["method"] == "exact", "work"] = 1.0
    return frame, references


def test_the_first_picture_has_both_costs_fronts_and_exact_at_its_time() -> None:
    frame, references = priced()
    figure = draw_cost(frame, references, FIELD)
    time, work = figure.axes
    for axes in (time, work):
        assert {"m0", "m1", "m2", "vmean", "exact", "svd", "front"} <= set(gids(axes))
        assert axes.get_xscale() == axes.get_yscale() == "log"
        for name in ("m0", "m1", "m2"):
            assert name in [t.get_text() for t in axes.texts]
    assert line_of(time, "exact").get_xdata()[0] == 5e-3
    assert line_of(work, "exact").get_xdata()[0] == 1.0
    # Median over heads and seeds of error against that of the cost.
    line = line_of(time, "m0")
    assert line.get_xdata().tolist() == pytest.approx([r * 1e-4 for r in RANKS])
    wanted = [np.median([error(h, 0, r, 1) for h in range(2)]) for r in RANKS]
    assert line.get_ydata().tolist() == pytest.approx(wanted)
    assert line_of(work, "m0").get_xdata().tolist() == pytest.approx([r / 64 for r in RANKS])
    assert any("exact: 5 ms" in text for text in texts_of(figure))
    # m1 is the fastest at every error, and m0 is a little better at the largest rank.
    front = line_of(time, "front").get_xdata()
    assert front[0] == pytest.approx(8e-5) or front[0] == pytest.approx(16e-5)
    assert line_of(time, "m1").get_alpha() == 1.0
    assert line_of(time, "m2").get_alpha() < 1.0  # never best
    figure.canvas.draw()


def test_ranks_that_cost_more_and_give_less_are_points_and_no_line() -> None:
    frame, references = priced()
    slow = (frame["method"] == "m1") & (frame["rank"] == 8)
    frame.loc[slow, "seconds"] = 1.0
    axes = draw_cost(frame, references, FIELD).axes[0]
    assert line_of(axes, "m1").get_xdata().tolist() == pytest.approx([16e-5, 32e-5])
    assert line_of(axes, "m1:rest").get_xdata().tolist() == [1.0]


def test_methods_without_a_matrix_have_no_work_and_a_time() -> None:
    frame, references = priced()
    frame.loc[frame["method"] == "m2", "work"] = math.nan
    figure = draw_cost(frame, references, FIELD)
    assert len(line_of(figure.axes[0], "m2").get_xdata()) == 3
    assert len(line_of(figure.axes[1], "m2").get_xdata()) == 0
    figure.canvas.draw()


def test_labels_stay_inside_and_apart() -> None:
    frame = frame_of(error, methods=18)
    frame["seconds"] = frame["rank"] * 1e-4 * (1 + frame["method"].str[1:].astype(int))
    figure = draw_cost(frame, references_of(), FIELD)
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]  # Agg has one
    figure.canvas.draw()
    for axes in figure.axes:
        own = [t for t in axes.texts if str(t.get_gid()).endswith(":label")]
        assert len(own) == 18
        boxes = [Text.get_window_extent(t, renderer) for t in own]  # without leaders
        for box in boxes:
            assert box.x0 >= 0
            assert box.x1 <= figure.bbox.x1
        # 18 curves side by side: what labels share is a corner here or there.
        shared = [Bbox.intersection(a, b) for a, b in itertools.combinations(boxes, 2)]
        area = sum(x.width * x.height for x in boxes)
        assert sum(x.width * x.height for x in shared if x is not None) < 0.05 * area


# --- a panel a method ---------------------------------------------------------------------------


def test_each_method_has_a_panel_with_its_spread_and_all_others_in_grey() -> None:
    frame = frame_of(error, heads=4, methods=5)
    figure = draw_each(frame, references_of(4), FIELD)
    panels = figure.axes
    assert [axes.get_title() for axes in panels] == [f"m{i}" for i in range(5)]
    medians = {r: [error(h, 2, r, 1) for h in range(4)] for r in RANKS}
    axes = panels[2]
    assert {"svd", "topk", "zero", "vmean", "m2", "m2:worst"} == set(gids(axes))
    line = line_of(axes, "m2")
    assert line.get_ydata() == pytest.approx([np.median(medians[r]) for r in RANKS])
    assert line_of(axes, "m2:worst").get_ydata() == pytest.approx([max(medians[r]) for r in RANKS])
    band = axes.collections[-1].get_paths()[0].get_extents().intervaly
    assert band[0] == pytest.approx(np.quantile(medians[32], 0.25))
    assert band[1] == pytest.approx(np.quantile(medians[8], 0.75))
    (others,) = (c for c in axes.collections if hasattr(c, "get_segments"))
    assert len(others.get_segments()) == 4
    limits = {axes.get_ylim() for axes in panels}
    assert len(limits) == 1
    figure.canvas.draw()


def test_what_lies_outside_is_said_at_the_edge() -> None:
    def value(h: int, m: int, r: int, s: int) -> float:
        return 70.0 if m == 3 else error(h, m, r, s)

    figure = draw_each(frame_of(value, methods=6), references_of(), FIELD)
    assert figure.axes[3].get_ylim()[1] < 10
    assert [t.get_text() for t in figure.axes[3].texts] == ["above the axis: 70"]
    assert line_of(figure.axes[3], "m3:above").get_marker() == "^"
    assert not figure.axes[0].texts
    one = draw_one(frame_of(value, methods=6), references_of(), FIELD, None)
    assert "above the axis: m3" in texts_of(one)


# --- heads --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("minilm/layer3/head5", (3, 5)),
        ("minilm/layer10.head6", (10, 6)),
        ("model.layers.7.self_attn/head11", (7, 11)),
        ("h.2.attn.3", (2, 3)),
        ("clustered/head1", None),
        ("peaked", None),
    ],
)
def test_names_give_layer_and_head(name: str, place: tuple[int, int] | None) -> None:
    assert place_of(name) == place


def test_layers_are_rows_and_other_heads_a_strip() -> None:
    whole = [f"m/layer{i}/head{j}" for i in range(2) for j in range(3)]
    where, rows, columns = cells_of(whole)
    assert (rows, columns) == (["layer 0", "layer 1"], ["head 0", "head 1", "head 2"])
    assert where["m/layer1/head2"] == (1, 2)
    chosen = [f"m/layer{i}/head{i * 3}" for i in range(6)]  # a diagonal of a full map
    where, rows, columns = cells_of(chosen)
    assert (len(rows), columns) == (6, [""])
    assert where["m/layer5/head15"] == (5, 0)
    where, rows, columns = cells_of([f"h{i}" for i in range(30)])
    assert (len(rows), len(columns)) == (3, 12)
    assert len(set(where.values())) == 30


def test_the_map_names_the_best_method_of_each_head() -> None:
    frame = frame_of(lambda h, m, r, s: 0.5 if m == h else 2.0, heads=2, methods=2)
    names = {"h0": "x/layer0/head0", "h1": "x/layer1/head0"}
    references = references_of()
    figure = draw_layers(frame.replace({"head": names}), references.replace({"head": names}), FIELD)
    assert texts_of(figure)[:2] == ["m0\n0.5", "m1\n0.5"]
    lost = draw_layers(frame_of(lambda *_: 3.0), references, FIELD)
    assert texts_of(lost)[0].endswith("3 > mean of V")
    for odd in (math.nan, math.inf, 0.0):
        draw_layers(frame_of(lambda *_, x=odd: x), references, FIELD).canvas.draw()


def test_spectra_are_what_the_floor_says() -> None:
    heads = sa.make_heads("clustered", n=24, d=4, heads=2, rng=0)
    result = sa.study(heads, methods="uniform", ranks=[2, 8], seeds=1)
    left, right = draw_spectra(result.references).axes
    for problem in heads:
        sizes = np.linalg.svd(problem.exact.to_dense().astype(float), compute_uv=False)
        line = line_of(left, str(problem.name))
        assert list(line.get_xdata()) == [1.0, 3.0, 9.0]
        assert line.get_ydata() == pytest.approx(sizes[[0, 2, 8]] / sizes[0], rel=1e-4)
        shares = np.cumsum(sizes**2)[[1, 7]] / np.sum(sizes**2)
        assert line_of(right, str(problem.name)).get_ydata() == pytest.approx(shares, rel=1e-5)


# --- what a result can be asked for -------------------------------------------------------------


def test_a_figure_is_in_the_style_of_its_user() -> None:
    result = result_of(frame_of(error, methods=2), references_of(), bounds=bounds_of())
    settings: Any = {"lines.linewidth": 3.5, "figure.figsize": (4.0, 3.0), "font.size": 7.0}
    with matplotlib.rc_context(settings):
        figure = result.figure(FIELD, methods={"m1": "Ours"})
        (axes,) = figure.axes
        assert figure.get_size_inches().tolist() == [4.0, 3.0]
        assert line_of(axes, "m1").get_linewidth() == 3.5
        assert axes.xaxis.label.get_fontsize() == 7.0
        legend = axes.get_legend()
        assert legend is not None
        assert [t.get_text() for t in legend.get_texts()][0] == "Ours"
    assert sorted(gids(axes)) == ["m1", "svd", "topk", "vmean", "zero"]
    wanted = np.median([[error(h, 1, r, 1) for r in RANKS] for h in range(2)], axis=0)
    assert line_of(axes, "m1").get_ydata() == pytest.approx(wanted)


def test_a_figure_shows_what_is_asked_for(tmp_path: Path) -> None:
    bounds = bounds_of(heads=3)
    result = result_of(frame_of(error, 3, 2), references_of(3), bounds=bounds)
    plain = result.figure(FIELD, floors=False)
    assert gids(plain.axes[0]) == ["m0", "m1"]
    assert gids(result.figure(FIELD, floors=["svd"]).axes[0]) == ["svd", "m0", "m1"]
    one = result.figure(FIELD, heads=["h2"], floors=False).axes[0]
    assert line_of(one, "m0").get_ydata() == pytest.approx([error(2, 0, r, 1) for r in RANKS])
    each = result.figure(FIELD, heads="each")
    assert [axes.get_title() for axes in each.axes] == ["h0", "h1", "h2"]
    field = "output_fro_amm"
    assert "a.output_fro_amm" not in gids(result.figure(field).axes[0])
    limited = result.figure(field, bounds="a.output_fro_amm").axes[0]
    values = line_of(limited, "a.output_fro_amm").get_ydata()
    assert values == pytest.approx([2 / math.sqrt(r) for r in RANKS])
    assert limited.get_ylim()[1] > max(values)
    own = Figure()
    axes = own.subplots()
    assert result.figure("skill", ax=axes) is own
    assert axes.get_legend() is None
    for ending in ("pdf", "svg"):
        plain.savefig(tmp_path / f"x.{ending}")
        assert (tmp_path / f"x.{ending}").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"field": "output_fro_rle"}, "field must be an error measure, got 'output_fro_rle'"),
        ({"methods": ["m7"]}, "methods must be among those of this result, got 'm7'"),
        ({"heads": ["x"]}, "heads must be among those of this result, got 'x'"),
        ({"floors": ["mean"]}, "floors must be among those of this result, got 'mean'"),
        ({"bounds": ["a.b"]}, "bounds must be among those of this result, got 'a.b'"),
    ],
)
def test_a_figure_refuses_what_is_not_there(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        result_of(frame_of(error), references_of()).figure(**options)


def test_rank_at_is_the_smallest_rank_that_reaches_a_target() -> None:
    # Head h has the error (1 + h) / r: 1/8, 2/8, 3/8; 1/16 ...; target 0.1 needs r = 16, 32, 32.
    frame = frame_of(lambda h, m, r, s: (1 + h) / r if m == 0 else 5.0, heads=3, methods=2)
    frame["seconds"] = frame["rank"] * 1e-3
    result = result_of(frame, references_of(3))
    table = result.rank_at(FIELD, 0.1)
    first, second, svd, topk = table.to_dict("records")
    assert list(table.columns) == [
        "method", "role", "rank", "heads", "rank_all", FIELD, "seconds", "work",
    ]  # fmt: skip
    assert (first["rank"], first["heads"], first["rank_all"]) == (32, 3, 32)
    assert first["seconds"] == pytest.approx(0.032)
    assert first[FIELD] == pytest.approx(2 / 32)
    assert (first["role"], svd["role"], topk["method"]) == ("method", "floor", "topk")
    assert pd.isna(second["rank"])
    assert pd.isna(second["rank_all"])
    assert (second["heads"], math.isnan(second["seconds"])) == (0, True)
    some = result.rank_at(FIELD, 0.125).iloc[0]  # 1/8 <= 1/8; 2/16 <= 1/8; 3/32
    assert (some["rank"], some["heads"], some["rank_all"]) == (16, 2, 32)
    assert result.rank_at("skill", 1.0).iloc[1]["heads"] == 3  # at least, and 5 is
    lines = rank_lines(table, FIELD, 0.1, 3)
    assert lines[0].startswith("smallest rank with output_fro_rel <= 0.1 on half of the heads")
    assert lines[3].split()[:6] == ["m0", "32", "3", "of", "3", "32"]
    with pytest.raises(ValueError, match="field must be an error measure"):
        result.rank_at("error", 0.1)
    with pytest.raises(TypeError, match="target must be a number, got str"):
        result.rank_at(FIELD, "0.1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="target must be a number, got nan"):
        result.rank_at(FIELD, math.nan)


def test_a_result_prints_a_line_a_method_at_three_ranks() -> None:
    ranks = (2, 4, 8, 16, 32)
    frame = frame_of(error, methods=3, ranks=ranks)
    frame["skill"] = np.where(frame["method"] == "m1", -1.0, 0.5)
    result = result_of(frame, references_of(ranks=ranks))
    lines = str(result).splitlines()
    assert lines[0] == "2 heads, 3 methods, 5 ranks, 3 seeds: medians over heads and seeds"
    assert lines[2].split()[:7] == ["method", "r=2", "r=8", "r=32", "t(r=2)", "t(r=8)", "t(r=32)"]
    table = [line.split() for line in lines[3 : lines.index("", 3)]]
    assert [row[0] for row in table] == [
        "m0", "m1", "m2", "svd", "topk", "zero", "vmean", "exact",
    ]  # fmt: skip
    wanted = [
        np.median([error(h, 0, r, s) for h in range(2) for s in range(3)]) for r in (2, 8, 32)
    ]
    assert [float(x) for x in table[0][1:4]] == pytest.approx(wanted, rel=5e-3)
    assert [row[-3:] for row in table[:3]] == [
        ["2", "of", "2"], ["0", "of", "2"], ["2", "of", "2"],
    ]  # fmt: skip
    assert max(map(len, lines)) <= 100
    assert repr(result) == "StudyResult(heads=2, methods=3, ranks=5, seeds=3)"
    assert len(result.render(every=True).splitlines()) > len(lines) + 10


def test_names_are_text_in_html() -> None:
    frame = frame_of(error).replace({"method": {"m0": "<script>alert(1)</script>"}})
    found = result_of(frame, references_of())._repr_html_()
    assert "<script>" not in found
    assert "&lt;script&gt;" in found
    assert found.count("<tr>") == 1 + 1 + 5


def same(a: pd.DataFrame, b: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(a, b, check_exact=True)


def heads() -> sa.Heads:
    return sa.make_heads("clustered", n=24, d=4, heads=2, rng=0)


BOUND = "sketching.moment_gaussian"


def test_a_folder_is_read_as_it_was_written(tmp_path: Path) -> None:
    options: dict[str, Any] = {"ranks": [2, 4], "seeds": 2, "out": tmp_path, "pictures": False}
    made = sa.study(heads(), ["jl", "exact"], bounds=BOUND, **options)
    found = sa.StudyResult.load(tmp_path)
    for name in ("frame", "references", "bounds"):
        same(getattr(found, name), getattr(made, name))
    assert (found.left_out, found.out, found.pictures) == (made.left_out, tmp_path, ())
    assert str(found) == str(made)
    with pytest.raises(ValueError, match="folder must hold a finished study"):
        sa.StudyResult.load(tmp_path / "cells")
    with pytest.raises(ValueError, match="folder must be given"):
        result_of(made.frame, made.references).plot()
    # Older versions had no such columns.
    newer = list(COLUMNS[-4:])
    rows = [line.rsplit(",", 4)[0] for line in (tmp_path / "results.csv").read_text().splitlines()]
    assert newer[0] == "work"
    (tmp_path / "results.csv").write_text("\n".join(rows) + "\n")
    old = sa.StudyResult.load(tmp_path).frame
    same(old.drop(columns=newer), made.frame.drop(columns=newer))
    assert old[newer].isna().all().all()


def test_other_methods_of_a_folder_stay_beside_those_of_a_new_study(tmp_path: Path) -> None:
    options: dict[str, Any] = {"ranks": [2, 4], "seeds": 2, "pictures": False}
    first = sa.study(heads(), ["jl"], out=tmp_path, bounds=BOUND, **options)
    second = sa.study(heads(), ["uniform"], out=tmp_path, **options)
    assert set(second.frame["method"]) == {"uniform"}
    there = sa.StudyResult.load(tmp_path)
    both = sa.study(heads(), ["jl", "uniform"], **options)
    clock = ["seconds"]
    same(there.frame.drop(columns=clock), both.frame.drop(columns=clock))
    own = there.frame[there.frame["method"] == "jl"].reset_index(drop=True)
    same(own, first.frame)  # the very rows, seconds too
    same(there.bounds, first.bounds)
    # Again, with another parameter: its own rows are replaced, the others stay.
    other = {"uniform": sa.UniformColumns(1, estimator="horvitz-thompson")}
    sa.study(heads(), other, out=tmp_path, **options)
    again = sa.StudyResult.load(tmp_path)
    assert list(dict.fromkeys(again.frame["method"])) == ["jl", "uniform"]
    assert not again.frame["output_fro_rel"].equals(there.frame["output_fro_rel"])
    same(again.frame[again.frame["method"] == "jl"].reset_index(drop=True), first.frame)


@pytest.mark.parametrize(
    ("change", "what"),
    [({"ranks": [2]}, "ranks"), ({"seeds": 3}, "seeds"), ({"heads": 3}, "heads")],
)
def test_a_folder_of_another_grid_is_refused_before_any_work(
    tmp_path: Path, change: dict[str, Any], what: str
) -> None:
    options: dict[str, Any] = {"ranks": [2, 4], "seeds": 2, "pictures": False, "out": tmp_path}
    sa.study(heads(), ["jl"], **options)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    given = heads()
    if "heads" in change:
        given = sa.make_heads("clustered", n=24, d=4, heads=3, rng=1)
        change = {}
    with pytest.raises(ValueError, match=f"^out must be a folder whose other methods have the same "
                       f"{what}, got .* with jl "):  # fmt: skip
        sa.study(given, ["uniform"], **(options | change))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    # The same methods may go on to more ranks and seeds.
    sa.study(given, ["jl"], **(options | change))


def test_every_picture_has_a_name_of_its_own() -> None:
    assert len(set(PICTURES)) == len(PICTURES) == 5 + len(FIELDS)
    assert PICTURES[0] == "error_against_cost.png"


def test_the_picture_of_one_claim_is_a_figure() -> None:
    name = "sketching.moment_countsketch"
    made = sa.make_heads("gaussian", n=16, d=4, rng=0)
    result = sa.theory.validate(name, made, trials=20, progress=False)
    figure = result.figure(name)
    assert figure.get_suptitle().startswith(name)
    assert any(axes.get_title().startswith("gaussian") for axes in figure.axes)
    with pytest.raises(ValueError, match="id must be"):
        result.figure("x")


# --- errors of sampled rows ---------------------------------------------------------------------


def test_intervals_of_sampled_rows_are_bars() -> None:
    heads = sa.make_heads("clustered", n=128, d=8, heads=2, rng=0)
    result = sa.study(heads, ["uniform"], [8, 32], seeds=2, rows=64, pictures=False)
    whole = sa.study(heads, ["uniform"], [8, 32], seeds=2, pictures=False)
    for found, bars in ((result, 2), (whole, 0)):
        for draw in (draw_each, draw_cost):
            figure = draw(found.frame, found.references, "output_fro_rel")
            lines = [
                line
                for axes in figure.axes
                for line in axes.lines
                if line.get_gid() == "uniform:interval"
            ]
            assert len(lines) >= bars if bars else not lines
    spans = intervals_of(result.frame, "uniform")
    rows = result.frame[result.frame["rank"] == 8]
    assert spans[8] == (
        np.median(rows["output_fro_rel_low"]), np.median(rows["output_fro_rel_high"])
    )  # fmt: skip
    assert intervals_of(whole.frame, "uniform") == {}
