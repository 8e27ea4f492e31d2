"""Pictures of a study: what is on them, and that nothing is dropped silently."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import sketchattn as sa
from sketchattn.errors.reports import FIELDS
from sketchattn.studies import plots
from sketchattn.studies.columns import BOUND_COLUMNS, COLUMNS, EXACT
from sketchattn.studies.palette import (
    COLOURS,
    DASHES,
    MARKERS,
    REFERENCES_LOOK,
)
from sketchattn.studies.pictures import axes as axes_module
from sketchattn.studies.pictures.words import MEASURES, shorten
from sketchattn.studies.plots import OVERVIEWS, PICTURES, plot_study, study_figure

RANKS = (8, 16, 32)
BESIDE = ("svd", "topk", "zero", "vmean")


def frame_of(
    value: Any, heads: int = 2, methods: int = 1, ranks: tuple[int, ...] = RANKS, seeds: int = 3
) -> pd.DataFrame:
    """Return a frame whose fields all are ``value(head, method, rank, seed)``."""
    rows = [
        [f"h{h}", f"m{m}", r, s, *([value(h, m, r, s)] * len(FIELDS)), 1e-3, 8, r, r / 64]
        + [value(h, m, r, s)] * 2
        + [64]
        for h in range(heads)
        for m in range(methods)
        for r in ranks
        for s in range(seeds)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def references_of(heads: int = 2, ranks: tuple[int, ...] = RANKS) -> pd.DataFrame:
    level = {"svd": 0.1, "topk": 0.2, "zero": 1.0, "vmean": 0.8, EXACT: 1e-7}
    rows = [
        [f"h{h}", name, r, 0, *([level[name] / (r if name in ("svd", "topk") else 1)] * 10)]
        + [1e-3, 8, None, r / 64, math.nan, math.nan, 64]
        for h in range(heads)
        for name in (*BESIDE, EXACT)
        for r in ranks
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def error(h: int, m: int, r: int, s: int) -> float:
    return (1 + h) * (1 + 0.1 * m) * (1 + 0.01 * s) / r


def gids(axes: Axes) -> list[str]:
    return [str(line.get_gid()) for line in axes.lines]


def line_of(axes: Axes, gid: str) -> Any:
    (line,) = (x for x in axes.lines if x.get_gid() == gid)
    return line


def legend_of(figure: Figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def title_of(figure: Figure) -> str:
    return figure.get_suptitle()


def test_every_panel_has_the_floors_and_predictors() -> None:
    figure = study_figure(frame_of(error), references_of(), "output_fro_rel")
    assert len(figure.axes) == 3
    for axes in figure.axes:
        assert sorted(gids(axes)) == sorted([*BESIDE, "m0"])
        assert axes.get_xscale() == axes.get_yscale() == "log"
    assert [axes.get_title() for axes in figure.axes] == [
        "median of 2 heads (band: quartiles over heads)",
        "h0",
        "h1",
    ]
    assert legend_of(figure) == [
        "m0",
        "best rank-r A (SVD, V-blind)",
        "r largest entries a row (top-k)",
        "zero output",
        "mean of V",
    ]
    assert title_of(figure).startswith("output_fro_rel: relative output error, ")


def test_lines_are_medians_and_bands_are_spreads() -> None:
    figure = study_figure(frame_of(error), references_of(), "matrix_fro_rel")
    summary, first, second = figure.axes
    for axes, head in ((first, 0), (second, 1)):
        line = line_of(axes, "m0")
        assert line.get_xdata().tolist() == list(RANKS)
        assert line.get_ydata() == pytest.approx([error(head, 0, r, 1) for r in RANKS])
        (band,) = axes.collections
        low, high = band.get_paths()[0].get_extents().intervaly
        assert low == pytest.approx(error(head, 0, 32, 0))
        assert high == pytest.approx(error(head, 0, 8, 2))
    medians = [[error(h, 0, r, 1) for h in range(2)] for r in RANKS]
    assert line_of(summary, "m0").get_ydata() == pytest.approx(np.median(medians, axis=1))
    (band,) = summary.collections
    low, high = band.get_paths()[0].get_extents().intervaly
    assert low == pytest.approx(np.quantile(medians[-1], 0.25))
    assert high == pytest.approx(np.quantile(medians[0], 0.75))
    assert line_of(first, "svd").get_ydata() == pytest.approx([0.1 / r for r in RANKS])
    assert line_of(first, "zero").get_ydata() == pytest.approx([1.0, 1.0])


def test_ranks_are_plain_numbers() -> None:
    figure = study_figure(frame_of(error), references_of(), "output_fro_rel")
    figure.canvas.draw()
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["8", "16", "32"]
    for label in axes.get_yticklabels():
        assert re.fullmatch(r"[0-9.]+", label.get_text())
    many = tuple(range(1, 200))
    thinned = axes_module.spread_ranks(many)
    assert len(thinned) <= 9
    assert thinned[0] == 1
    assert set(thinned) <= set(many)


def test_zeros_and_infinities_sit_on_the_edges_and_are_named() -> None:
    def value(h: int, m: int, r: int, s: int) -> float:
        if m == 1 and r == 8:
            return math.inf
        if m == 2 and r == 32:
            return 0.0
        return error(h, m, r, s)

    figure = study_figure(frame_of(value, methods=3), references_of(), "output_fro_rel")
    for axes in figure.axes:
        bottom, top = axes.get_ylim()
        assert line_of(axes, "m1").get_ydata()[0] == top
        assert line_of(axes, "m1:top").get_xdata() == [8]
        assert line_of(axes, "m1:top").get_marker() == "^"
        assert line_of(axes, "m2").get_ydata()[-1] == bottom
        assert line_of(axes, "m2:bottom").get_xdata() == [32]
        assert line_of(axes, "m2:bottom").get_marker() == "v"
        # All that is finite and positive lies inside.
        for line in axes.lines:
            values = np.asarray(line.get_ydata(), float)
            assert np.all((values >= bottom) & (values <= top))
    assert [t.get_text() for t in figure.axes[0].texts] == ["infinite: m1", "zero: m2"]
    assert legend_of(figure)[-2:] == ["on the upper edge: infinite", "on the lower edge: zero"]
    figure.canvas.draw()


def test_gaps_are_named() -> None:
    frame = frame_of(lambda h, m, r, s: math.nan if r == 16 else 0.5)
    figure = study_figure(frame, references_of(), "row_tv_mean")
    assert legend_of(figure)[-1] == "gaps: not a number"
    assert np.isnan(line_of(figure.axes[1], "m0").get_ydata()[1])
    assert "gaps: not a number" not in legend_of(
        study_figure(frame_of(error), references_of(), "row_tv_mean")
    )


def test_everything_may_be_infinite_or_zero() -> None:
    for x, gid in ((math.inf, "m0:top"), (0.0, "m0:bottom"), (math.nan, "m0")):
        references = references_of()
        references[list(FIELDS)] = x
        figure = study_figure(frame_of(lambda *_, x=x: x), references, "row_kl_mean")
        assert gid in gids(figure.axes[0])
        figure.canvas.draw()


def test_negative_divergences_are_shown() -> None:
    frame = frame_of(lambda h, m, r, s: -0.01 if r == 32 else 1.0)
    figure = study_figure(frame, references_of(), "row_kl_mean")
    axes = figure.axes[0]
    assert axes.get_yscale() == "symlog"
    assert axes.get_ylim()[0] < -0.01
    assert line_of(axes, "m0").get_ydata()[-1] == -0.01
    assert "m0:bottom" not in gids(axes)
    figure.canvas.draw()


@pytest.mark.parametrize(("worst", "scale"), [(-1.5, "linear"), (-40.0, "symlog")])
def test_skill_is_linear_around_zero(worst: float, scale: str) -> None:
    frame = frame_of(lambda h, m, r, s: worst if r == 8 else 0.5)
    figure = study_figure(frame, references_of(), "skill")
    axes = figure.axes[0]
    assert axes.get_yscale() == scale
    bottom, top = axes.get_ylim()
    assert bottom < worst
    assert top > 1
    figure.canvas.draw()
    labels = [t.get_text() for t in axes.get_yticklabels()]
    assert {"0", "1"} <= set(labels)
    frame.loc[frame["rank"] == 8, "skill"] = -math.inf
    lost = study_figure(frame, references_of(), "skill")
    assert line_of(lost.axes[1], "m0").get_ydata()[0] == lost.axes[1].get_ylim()[0]
    assert legend_of(lost)[-1] == "on the lower edge: minus infinity"


def test_fifteen_methods_look_different() -> None:
    figure = study_figure(frame_of(error, methods=15), references_of(), "output_fro_rel")
    lines = [line_of(figure.axes[0], f"m{i}") for i in range(15)]
    looks = {(x.get_color(), str(x._unscaled_dash_pattern)) for x in lines}  # no public getter
    assert len(looks) == 15
    assert len({x.get_marker() for x in lines}) == 15
    assert len(COLOURS) * len(DASHES) >= 15
    assert len(set(MARKERS)) == len(MARKERS) == 15
    assert not {"^", "v"} & set(MARKERS)  # these mean infinite and zero
    neutral = {REFERENCES_LOOK[name].colour for name in BESIDE}
    assert not neutral & set(COLOURS)


@pytest.mark.parametrize("heads", [1, 2, 4, 5, 12, 13, 15])
def test_each_head_has_a_panel(heads: int) -> None:
    figure = study_figure(
        frame_of(error, heads=heads, seeds=1), references_of(heads), "output_fro_rel"
    )
    assert [a.get_title() for a in figure.axes[1:]] == [f"h{i}" for i in range(heads)]
    assert "drawn" not in title_of(figure)
    figure.canvas.draw()
    boxes = [a.get_position() for a in figure.axes]
    for i, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[:i])
        assert one.y0 > 0
        assert one.y1 < 1


def test_heads_that_are_left_out_are_counted_and_still_in_the_median() -> None:
    figure = study_figure(frame_of(error, heads=20), references_of(20), "output_fro_rel")
    assert len(figure.axes) == 16
    assert title_of(figure).endswith("\n15 of 20 heads drawn, evenly spaced")
    assert figure.axes[1].get_title() == "h0"
    assert figure.axes[-1].get_title() == "h19"
    assert figure.axes[0].get_title() == "median of 20 heads (band: quartiles over heads)"
    wanted = np.median([error(h, 0, 8, 1) for h in range(20)])
    assert line_of(figure.axes[0], "m0").get_ydata()[0] == pytest.approx(wanted)


def test_one_rank_and_references_only() -> None:
    one = study_figure(frame_of(error, ranks=(8,)), references_of(ranks=(8,)), "output_fro_rel")
    one.canvas.draw()
    left, right = one.axes[0].get_xlim()
    assert left < 8 < right
    references = references_of()
    alone = study_figure(references, references, "output_fro_rel")
    assert sorted(gids(alone.axes[0])) == sorted(BESIDE)


def test_long_names_are_shortened_in_the_middle() -> None:
    name = "a-very-long-model-name-that-goes-on/layer12.head34"
    short = shorten(name, 30)
    assert len(short) <= 30
    assert short.startswith("a-very")
    assert short.endswith("head34")
    assert shorten("short", 30) == "short"


def test_every_field_has_words_and_a_picture(tmp_path: Path) -> None:
    assert tuple(MEASURES) == FIELDS
    heads = sa.make_heads("gaussian", n=16, d=4, rng=0)
    result = sa.study(heads, methods=["uniform", "exact"], ranks=[4, 16], seeds=2)
    paths = plot_study(result.frame, result.references, tmp_path)
    assert tuple(p.name for p in paths) == PICTURES
    assert PICTURES[len(OVERVIEWS) :] == tuple(f"{field}.png" for field in FIELDS)
    before = {p: p.read_bytes() for p in paths}
    assert all(x[:8] == b"\x89PNG\r\n\x1a\n" for x in before.values())
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in paths}
    # Drawn again, the same bytes: no dates, no state.
    again = plot_study(result.frame, result.references, tmp_path)
    assert {p: p.read_bytes() for p in again} == before


def bounds_of(heads: int = 2, fields: tuple[str, ...] = ("output_fro_amm",)) -> pd.DataFrame:
    rows = [
        [f"a.{field}", "m0", f"h{h}", r, field, "mean", (h + 1) / math.sqrt(r)]
        for field in fields
        for h in range(heads)
        for r in RANKS
    ]
    return pd.DataFrame(rows, columns=list(BOUND_COLUMNS))


def test_bounds_are_drawn_on_the_measure_that_they_bound_and_on_no_other() -> None:
    bounds = bounds_of(fields=("output_fro_amm", "output_spec_amm"))
    for field in FIELDS:
        figure = study_figure(frame_of(error), references_of(), field, bounds)
        drawn = [gid for gid in gids(figure.axes[0]) if gid.startswith("a.")]
        wanted = [f"a.{field}"] if field in ("output_fro_amm", "output_spec_amm") else []
        assert drawn == wanted
        assert [x for x in legend_of(figure) if x.startswith("a.")] == [
            f"{x} (mean)" for x in drawn
        ]


def test_a_bound_is_its_number_on_a_head_and_the_median_over_heads() -> None:
    heads = 3
    figure = study_figure(
        frame_of(error, heads), references_of(heads), "output_fro_amm", bounds_of(heads)
    )
    summary, *single = figure.axes
    wanted = [[(h + 1) / math.sqrt(r) for r in RANKS] for h in range(heads)]
    for axes, values in zip((summary, *single), (wanted[1], *wanted), strict=True):
        line = line_of(axes, "a.output_fro_amm")
        assert line.get_xdata().tolist() == list(RANKS)
        assert line.get_ydata() == pytest.approx(values)
        bottom, top = axes.get_ylim()  # vacuous or not, a bound is on the picture
        assert bottom < min(values)
        assert max(values) < top
        assert line.get_color() == line_of(axes, "m0").get_color()
        assert line.get_marker() in ("None", "none", "", None)


def test_bounds_that_do_not_apply_leave_gaps() -> None:
    bounds = bounds_of()
    bounds.loc[bounds["rank"] == 8, "bound"] = math.nan
    figure = study_figure(frame_of(error), references_of(), "output_fro_amm", bounds)
    for axes in figure.axes:
        assert np.isnan(line_of(axes, "a.output_fro_amm").get_ydata()[0])
    figure.canvas.draw()


def test_the_longest_names_of_bounds_stay_inside_the_picture() -> None:
    claims = sorted(sa.theory.error_bounds().values(), key=lambda x: -len(x.claim + x.what))[:6]
    parts = [bounds_of().assign(claim=x.claim, what=x.what) for x in claims]
    figure = study_figure(
        frame_of(error, methods=3), references_of(), "output_fro_amm", pd.concat(parts)
    )
    (legend,) = figure.legends
    box = legend.get_window_extent(figure.canvas.get_renderer())  # type: ignore[attr-defined]  # Agg has one
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= figure.bbox.x1
    looks = {str(line_of(figure.axes[0], x.claim)._unscaled_dash_pattern) for x in claims[:3]}
    assert len(looks) == 3


def test_a_label_that_is_too_long_is_cut_in_its_middle() -> None:
    long, short = "uniform(estimator=horvitz-thompson)", "uniform(mix=0.25)"
    frame = frame_of(error, methods=2).replace({"method": {"m0": long, "m1": short}})
    figure = plots._draw_figure(frame, references_of(), "output_fro_rel", None)
    labels = {str(x.get_gid()): x for x in figure.axes[0].texts}
    assert labels[f"{short}:label"].get_text() == short
    cut = labels[f"{long}:label"].get_text()
    assert cut.startswith("uniform(")
    assert "..." in cut
    assert cut.endswith("thompson)")
    assert all(x.get_window_extent().x1 <= figure.bbox.x1 for x in labels.values())


def test_no_global_state_of_matplotlib() -> None:
    source = Path(plots.__file__).read_text()
    imports = re.findall(r"^\s*(?:from|import) .*", source, flags=re.MULTILINE)
    assert not [line for line in imports if "pyplot" in line]
    assert "rcParams" not in source


NAMES = ["$x_1$", "_private", "a^b_c", "\u6ce8\u610f", "50 % \\frac{", "$unclosed"]


def named(frame: pd.DataFrame, column: str, start: str) -> pd.DataFrame:
    old = [f"{start}{i}" for i in range(len(NAMES))]
    return frame.replace({column: dict(zip(old, NAMES, strict=True))})


def test_names_of_the_user_are_text_as_it_stands(tmp_path: Path) -> None:
    count = len(NAMES)
    rows = named(named(frame_of(error, heads=count, methods=count), "head", "h"), "method", "m")
    references = named(references_of(count), "head", "h")
    figure = study_figure(rows, references, "output_fro_rel")
    assert [axes.get_title() for axes in figure.axes[1:]] == NAMES
    assert legend_of(figure)[:count] == NAMES
    (legend,) = figure.legends
    texts = [axes.title for axes in figure.axes] + legend.get_texts()
    assert not any(text.get_parse_math() for text in texts)
    assert len(plot_study(rows, references, tmp_path)) == len(PICTURES)  # no warning either


def test_edges_name_methods_as_they_stand() -> None:
    rows = frame_of(lambda *_: math.inf).replace({"method": {"m0": "$unclosed"}})
    figure = study_figure(rows, references_of(), "row_kl_mean")
    texts = [text for axes in figure.axes for text in axes.texts]
    assert any("$unclosed" in text.get_text() for text in texts)
    assert not any(text.get_parse_math() for text in texts)
    figure.canvas.draw()


def test_pictures_do_not_depend_on_settings_of_the_user(tmp_path: Path) -> None:
    import matplotlib

    rows, references = frame_of(error), references_of()
    plain, styled = tmp_path / "plain", tmp_path / "styled"
    for folder in (plain, styled):
        folder.mkdir()
    plot_study(rows, references, plain)
    settings: Any = {
        "text.usetex": True,
        "axes.facecolor": "red",
        "font.size": 30.0,
        "savefig.dpi": 17,
        "savefig.transparent": True,
        "lines.linewidth": 9.0,
        "axes.formatter.use_locale": True,
    }
    with matplotlib.rc_context(settings):
        plot_study(rows, references, styled)
        left: Any = matplotlib.rcParams
        assert all(left[name] == value for name, value in settings.items())
    for name in PICTURES:
        assert (styled / name).read_bytes() == (plain / name).read_bytes()


def test_a_picture_that_fails_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = plots._draw_figure

    def fail(frame: Any, references: Any, field: str, bounds: Any) -> Figure:
        if field in ("skill", "row_kl_mean"):
            raise RuntimeError("no ink")
        return whole(frame, references, field, bounds)

    monkeypatch.setattr(plots, "_draw_figure", fail)
    message = (
        "pictures are missing beside the results: row_kl_mean (RuntimeError: no ink) and 1 more"
    )
    with pytest.warns(RuntimeWarning, match=f"^{re.escape(message)}$"):
        paths = plot_study(frame_of(error), references_of(), tmp_path)
    assert len(paths) == len(PICTURES) - 2
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in paths)
