"""Reports as people see them: in the Chromium of the system, wide and narrow, light and dark."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import sketchattn as sa
from sketchattn.heads.inputs import renamed
from sketchattn.studies.run import study

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
if CHROMIUM is None:
    pytest.skip("no Chromium is installed here; .ci/run installs it", allow_module_level=True)
api = pytest.importorskip("playwright.sync_api", reason="no playwright is installed here")

# Each would do something if it were not text: in HTML, inside a script, in a label of plotly.
HOSTILE = (
    "<script>window.pwned = 1</script>",
    "</script><script>window.pwned = 2</script>",
    "<!--<script>",
    '"><img src=x onerror="window.pwned = 3">',
    "<b>bold</b> <a href='javascript:window.pwned=4'>link</a> &lt;i&gt; %{x} {{ 7 * 7 }}",
)
WIDE, NARROW = 1280, 390
PATIENCE = 600_000  # milliseconds, of a machine on which others have all cores
VIEWS = [(WIDE, "light"), (WIDE, "dark"), (NARROW, "light"), (NARROW, "dark")]


class View(NamedTuple):
    """A page that is open, and what went wrong on it."""

    page: Any
    wrong: list[str]


def until(page: Any, truth: str) -> None:
    """Wait for an expression to be true; the policy of a page refuses what asks in the page."""
    for _ in range(PATIENCE // 50):
        if page.evaluate(truth):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never true: {truth}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE
        )
        yield found
        found.close()


@pytest.fixture
def show(browser: Any) -> Iterator[Callable[..., View]]:
    """Open a file; whatever is not a file is refused and counts as wrong."""
    contexts = []

    def opened(path: Path, width: int = WIDE, scheme: str = "light") -> View:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page, wrong = context.new_page(), []

        def route(request: Any) -> None:
            if request.request.url.startswith("file:"):
                request.continue_()
            else:
                wrong.append(f"asks for {request.request.url}")
                request.abort()

        page.route("**/*", route)
        page.on("console", lambda x: wrong.append(x.text) if x.type in ("error", "warning") else 0)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(path.as_uri())
        until(
            page,
            "[...document.querySelectorAll('[data-figure]')]"
            ".every((x) => x.querySelector('.main-svg'))",
        )
        return View(page, wrong)

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study")
    heads = sa.make_heads("clustered", n=48, d=8, heads=4, rng=0)
    study(
        heads,
        ["skeinformer", "uniform", "linformer", "performer"],
        [4, 8, 16],
        seeds=2,
        out=out,
        pictures=False,
    )
    return out / "report.html"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hostile")
    made = sa.make_heads("clustered", n=32, d=8, heads=len(HOSTILE), rng=0)
    heads = [renamed(p, name) for p, name in zip(made, HOSTILE, strict=True)]
    methods = [(name, sa.ColumnSampling(rank=4)) for name in HOSTILE]
    study(heads, methods, [4, 8], seeds=1, out=out, pictures=False)
    return out / "report.html"


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verdicts")
    heads = sa.make_heads("clustered", n=32, d=8, heads=2, rng=0)
    named = [renamed(p, name) for p, name in zip(heads, HOSTILE[:2], strict=True)]
    result = sa.theory.validate("linformer", named, trials=10, progress=False)
    for name in {row.claim.id for row in result.rows}:  # what plot draws, in less time
        (out / f"{name}.png").write_bytes(PIXEL)
    return result.report(out / "verdicts.html")


PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c489"
    "0000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
)


# --- what holds in every view ---------------------------------------------------------------------


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
@pytest.mark.parametrize("which", ["report", "verdicts"])
def test_nothing_goes_wrong_and_nothing_is_asked_for(
    show: Callable[..., View],
    which: str,
    width: int,
    scheme: str,
    request: pytest.FixtureRequest,
) -> None:
    view = show(request.getfixturevalue(which), width, scheme)
    view.page.wait_for_timeout(200)
    assert view.wrong == []
    # No part of the page is beside it: what is wider scrolls in a box of its own.
    widths = view.page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert widths[0] == widths[1] == width


def test_what_is_wrong_is_noticed(show: Callable[..., View], tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text("<img src='http://example.org/x.png'><script>undefined.x</script>")
    view = show(path)
    view.page.wait_for_timeout(200)
    assert any("example.org" in x for x in view.wrong)
    assert any("undefined" in x for x in view.wrong)


# Luminance and contrast as WCAG 2 defines them; 4.5 is its level AA for text.
CONTRAST = """
(selector) => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((c) => c / 255)
      .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const ground = (element) => {
    for (let x = element; x; x = x.parentElement) {
      const found = channels(getComputedStyle(x).backgroundColor);
      if (found.length === 3 || found[3] > 0) return found;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll(selector)].map((element) => {
    const style = getComputedStyle(element);
    const text = element instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [luminance(channels(text)), luminance(ground(element))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  });
}
"""
TEXTS = (
    "h1", "h2", "h3", "p", "li", "a", "td", "th button", "summary", "dd", "dt", ".fact span",
    ".fact b", ".xtick text", ".ytick text", ".legendtext", ".xtitle", ".ytitle",
    ".updatemenu-item-text", ".cbaxis text",
)  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(
    show: Callable[..., View], report: Path, scheme: str
) -> None:
    page = show(report, WIDE, scheme).page
    page.evaluate("document.querySelectorAll('details').forEach((x) => { x.open = true; })")
    found = {selector: page.evaluate(CONTRAST, selector) for selector in TEXTS}
    assert [selector for selector, ratios in found.items() if not ratios] == []
    assert {x: min(ratios) for x, ratios in found.items() if min(ratios) < 4.5} == {}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_of_verdicts_stands_out(
    show: Callable[..., View], verdicts: Path, scheme: str
) -> None:
    page = show(verdicts, NARROW, scheme).page
    for selector in ("p", "td", "th button", "summary", "output", "input", "select", "a"):
        assert min(page.evaluate(CONTRAST, selector)) >= 4.5, selector


def test_contrast_is_computed_as_defined(show: Callable[..., View], tmp_path: Path) -> None:
    path = tmp_path / "grey.html"
    path.write_text("<body style='background:#fff'><p style='color:#777'>grey</p></body>")
    # #777 on white is the usual example of what just fails.
    assert show(path).page.evaluate(CONTRAST, "p") == [pytest.approx(4.48, abs=0.005)]


# --- what can be done -----------------------------------------------------------------------------


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_a_click_on_a_name_switches_its_curve(
    show: Callable[..., View], report: Path, width: int
) -> None:
    page = show(report, width).page
    lines = page.locator("#against-rank .scatterlayer .js-line:visible")
    before = lines.count()
    entry = page.locator("#against-rank .legend .traces").filter(has_text="skeinformer")
    entry.locator(".legendtoggle").click()
    # Plotly waits whether a second click follows.
    until(
        page,
        "document.querySelector('#against-rank .plot').data"
        ".some((x) => x.name === 'skeinformer' && x.visible === 'legendonly')",
    )
    assert lines.count() < before
    entry.locator(".legendtoggle").click()
    until(
        page,
        "document.querySelector('#against-rank .plot').data"
        ".every((x) => x.name !== 'skeinformer' || x.visible === true)",
    )
    assert lines.count() == before


def test_the_menu_shows_one_head_and_keeps_what_is_off(
    show: Callable[..., View], report: Path
) -> None:
    view = show(report)
    page = view.page
    curve = (
        "(() => document.querySelector('#against-rank .plot').data"
        ".find((x) => x.name === 'skeinformer'))()"
    )
    page.evaluate(
        "(() => { const plot = document.querySelector('#against-rank .plot');"
        "Plotly.restyle(plot, {visible: 'legendonly'}, [0]); })()"
    )
    before = page.evaluate(f"[...{curve}.y]")
    page.locator("#against-rank .updatemenu-header").click()
    entry = page.locator("#against-rank .updatemenu-dropdown-button").nth(2)
    # It can be read: the curves do not show through.
    ground = "(x) => getComputedStyle(x.querySelector('rect')).fillOpacity"
    assert entry.evaluate(ground) == "1"
    entry.click()
    until(page, f"({before}).join() !== [...{curve}.y].join()")
    assert page.evaluate("document.querySelector('#against-rank .plot').data[0].visible") == (
        "legendonly"
    )
    assert view.wrong == []


def test_every_menu_entry_of_every_figure_works(show: Callable[..., View], report: Path) -> None:
    view = show(report)
    done = view.page.evaluate(
        """async () => {
          let count = 0;
          for (const plot of document.querySelectorAll(".plot")) {
            for (const menu of plot.layout.updatemenus) {
              for (const button of menu.buttons) {
                await Plotly[button.method](plot, ...structuredClone(button.args));
                count += 1;
              }
            }
          }
          return count;
        }"""
    )
    # All heads and each of four, three times; three ranks, twice; nine further measures.
    assert done == 3 * 5 + 2 * 3 + 9
    assert view.wrong == []


def test_hovering_names_the_curve(show: Callable[..., View], report: Path) -> None:
    page = show(report).page
    page.locator("#against-rank").scroll_into_view_if_needed()
    page.evaluate(
        "Plotly.Fx.hover(document.querySelector('#against-rank .plot'),"
        "[{curveNumber: 4, pointNumber: 1}])"
    )
    text = page.locator("#against-rank .hoverlayer").text_content()
    assert "rank 8" in text
    assert "error" in text
    assert "worst head" in text


def column(page: Any, table: str, title: str) -> list[float]:
    found: list[float] = page.evaluate(
        """([table, title]) => {
          const all = document.getElementById(table);
          const names = [...all.tHead.rows[0].cells].map((x) => x.textContent.trim());
          return [...all.tBodies[0].rows]
            .map((row) => Number.parseFloat(row.cells[names.indexOf(title)].dataset.value));
        }""",
        [table, title],
    )
    return found


def test_tables_sort_by_value_and_back(show: Callable[..., View], report: Path) -> None:
    page = show(report).page
    head = page.locator("#everything th").filter(has_text="worst head")
    start = column(page, "everything", "worst head")
    assert start != sorted(start)
    head.locator("button").click()
    assert column(page, "everything", "worst head") == sorted(start)
    assert head.get_attribute("aria-sort") == "ascending"
    head.locator("button").click()
    assert column(page, "everything", "worst head") == sorted(start, reverse=True)
    page.locator("#everything th").first.locator("button").click()
    names = page.locator("#everything tbody tr td:first-child").all_text_contents()
    assert names == sorted(names, key=str.lower)
    assert head.get_attribute("aria-sort") is None


def test_missing_numbers_stay_last(show: Callable[..., View], report: Path) -> None:
    page = show(report).page
    button = page.locator("#everything th").filter(has_text="time").locator("button")
    for _ in range(2):
        button.click()
        found = column(page, "everything", "time")
        numbers = [x for x in found if x == x]
        assert len(numbers) < len(found)
        assert found[: len(numbers)] == numbers


def test_rows_of_verdicts_are_filtered(show: Callable[..., View], verdicts: Path) -> None:
    page = show(verdicts).page
    rows = page.locator("#verdicts tbody tr:visible")
    every = rows.count()
    page.get_by_role("searchbox").fill("linformer.thm1 identity")
    few = rows.all_text_contents()
    assert 0 < len(few) < every
    assert all("linformer.thm1" in x and "identity" in x for x in few)
    assert page.locator("output").text_content() == f"{len(few)} of {every} rows"
    page.get_by_role("searchbox").fill("")
    page.get_by_label("verdict", exact=True).select_option("violated")
    statuses = page.locator("#verdicts tbody tr:visible td:nth-child(5)").all_text_contents()
    assert statuses
    assert set(statuses) == {"violated"}


def test_a_claim_opens_with_its_picture(show: Callable[..., View], verdicts: Path) -> None:
    page = show(verdicts).page
    page.locator("#claims summary").first.click()
    picture = page.locator("#claims img").first
    until(page, "document.querySelector('#claims img').naturalWidth === 1")
    assert "/" not in picture.get_attribute("src")


# --- names that are not harmless ------------------------------------------------------------------


@pytest.mark.parametrize("which", ["hostile", "verdicts"])
def test_names_run_nothing(
    show: Callable[..., View], which: str, request: pytest.FixtureRequest
) -> None:
    view = show(request.getfixturevalue(which))
    page = view.page
    page.wait_for_timeout(300)
    assert page.evaluate("window.pwned") is None
    assert view.wrong == []  # the policy of the page had nothing to stop
    assert page.locator("img[src=x]").count() == 0
    assert page.locator("a[href^='javascript']").count() == 0
    if which == "hostile":
        told = page.locator("#by-head tbody tr td:first-child").all_text_contents()
        assert told == list(HOSTILE)


def test_names_are_text_in_labels_of_plotly(show: Callable[..., View], hostile: Path) -> None:
    page = show(hostile).page
    svg = "[...document.querySelectorAll('.plot svg')]"
    assert page.evaluate(f"{svg}.flatMap((x) => [...x.querySelectorAll('a')]).length") == 0
    legend = page.locator("#against-rank .legendtext").all_text_contents()
    assert HOSTILE[2] in legend
    bold = page.evaluate(
        f"{svg}.flatMap((x) => [...x.querySelectorAll('tspan')])"
        ".filter((x) => x.textContent === 'bold').length"
    )
    assert bold == 0
    page.locator("#against-rank .updatemenu-header").click()
    entries = page.locator("#against-rank .updatemenu-dropdown-button").all_text_contents()
    assert HOSTILE[0] in entries
    page.evaluate(
        "Plotly.Fx.hover(document.querySelector('#against-rank .plot'),"
        "[{curveNumber: 7, pointNumber: 0}])"
    )
    assert "<!--<script>" in page.locator("#against-rank .hoverlayer").text_content()
