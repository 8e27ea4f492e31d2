"""The site: every method, claim and public name has its place; wrong pages are found out.

The site itself is built and opened by ``./run docs``; here are the parts that need no Sphinx.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from packaging_checks import ROOT

import sketchattn as sa

sys.path.insert(0, str(ROOT / "docs"))

import check
from building import claims, measure, methods, pictures, readme
from building.names import public_names
from building.tables import cell, short, table

STUDY, TIMES, VERDICTS = (measure.read(name) for name in ("study", "times", "claims"))
SITE = """<!doctype html><html><head><title>x</title></head>
<body><h1 id="top">x</h1><a href="{}">y</a>{}</body></html>"""


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# --- what is measured is of the library as it is --------------------------------------------------


def test_the_data_has_every_method_and_claim() -> None:
    every = set(sa.methods())
    assert every == {*STUDY["methods"], *STUDY["references"], *STUDY["left_out"]}
    oracles = {name for name in every if measure.made(sa.methods()[name]).traits.oracle}
    forms = {name for name in every if measure.made(sa.methods()[name]).traits.causal_form}
    assert set(TIMES["methods"]) == every - oracles - forms - {"exact"}
    assert set(VERDICTS["claims"]) == set(sa.theory.claims())
    assert VERDICTS["unexpected"] == []
    for data in (STUDY, TIMES, VERDICTS):
        assert {"cpu", "threads", "python", "numpy", "numba"} <= set(data["machine"])


def test_the_verdicts_of_the_data_are_the_recorded_ones() -> None:
    named = {str(problem.name) for problem in sa.load_heads("minilm")}
    for name, claim in sa.theory.claims().items():
        seen = {x["on"]: x["verdict"] for x in VERDICTS["claims"][name]["instances"]}
        wanted = {on: v for on, v in claim.recorded.items() if on in seen and on not in named}
        assert wanted == {on: seen[on] for on in wanted}, name


# --- pages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(sa.methods()))
def test_every_method_has_its_page(name: str) -> None:
    text = read(f"docs/methods/{name}.md")
    assert methods.problems(text) == []
    page = methods.page(name, text, STUDY, TIMES, VERDICTS)
    assert f"sketchattn.{sa.methods()[name].__name__}" in page
    assert "None" not in re.sub(r"`[^`]*`", "", page.partition("## Parameters")[0])
    for claim in measure.made(sa.methods()[name]).traits.claims:
        assert f"`{claim}`" in page


def test_pages_of_methods_are_of_methods() -> None:
    assert {path.stem for path in (ROOT / "docs/methods").glob("*.md")} == set(sa.methods())


def test_a_page_that_lacks_something_is_reported() -> None:
    text = read("docs/methods/nearfar.md")
    assert len(methods.problems(text.replace("## Cost", "## Costs"))) == 1
    assert len(methods.problems(re.sub(r"(?s)(## Cost\n).*?(?=\n## )", r"\1", text))) == 1
    assert methods.problems("## Formula\n\nx\n") != []


@pytest.mark.parametrize("topic", claims.topics())
def test_every_claim_stands_on_the_page_of_its_topic(topic: str) -> None:
    assert f"<!-- site: claims {topic} -->" in read(f"docs/claims/{topic}.md")
    page = claims.topic_page(topic, VERDICTS)
    mine = [name for name in sa.theory.claims() if name.startswith(f"{topic}.")]
    assert all(f"({claims.anchor(name)})=" in page for name in mine)


def test_anchors_of_claims_differ() -> None:
    anchors = [claims.anchor(name) for name in sa.theory.claims()]
    assert len({x.lower() for x in anchors}) == len(anchors)
    assert all(re.fullmatch(r"[a-z0-9-]+", x) for x in anchors)


def test_every_refuted_claim_has_a_counterexample() -> None:
    refuted = [name for name, claim in sa.theory.claims().items() if claim.status == "refuted"]
    assert len(refuted) > 30
    shown = claims.refuted(VERDICTS)
    assert all(f"`{name}`" in shown for name in refuted)
    lacking = [x for x in refuted if claims.counterexample(VERDICTS["claims"][x]) is None]
    assert lacking == []


def test_every_public_name_is_in_the_list_of_the_api() -> None:
    listed, room = set(), ""
    for line in read("docs/api.md").splitlines():
        if found := re.match(r"\.\. currentmodule:: (\S+)", line):
            room = found[1]
        elif found := re.match(r"   ([\w.]+)$", line):
            listed.add(f"{room}.{found[1]}")
    wanted = set(public_names().values())
    assert wanted - listed == set()
    for name in listed:
        module, _, attribute = name.rpartition(".")
        if not module.startswith("sketchattn.integrations"):
            assert hasattr(import_module(module), attribute), name


def test_the_readme_has_the_table_of_the_data() -> None:
    text = read("README.md")
    assert readme.filled(text) == text
    with pytest.raises(ValueError, match="one pair of marks"):
        readme.filled("x")


def test_pictures_are_the_same_bytes_each_time() -> None:
    first = pictures.method("nearfar", STUDY)
    assert first is not None
    assert b"<svg" in first
    assert first == pictures.method("nearfar", STUDY)
    assert pictures.method("causal_only", STUDY) is None


# --- tables ---------------------------------------------------------------------------------------


def test_cells_hold_bars_and_numbers_stay_short() -> None:
    assert table(["a"], [["|x|\ny"]]).splitlines()[-1] == r"| \|x\| y |"
    assert cell(" a\n b ") == "a b"
    assert [short(x) for x in (None, 0.0, 4e-7, 0.123, 12.3)] == [
        "-",
        "0.00",
        "4e-07",
        "0.12",
        "12",
    ]
    assert claims.plain("a_b [c] |x| <y, z>") == r"a\_b \[c\] |x| \<y, z\>"


# --- what looks at the site -----------------------------------------------------------------------


def site(folder: Path, link: str = "#top", more: str = "") -> Path:
    (folder / "docs").mkdir(exist_ok=True)
    (folder / "docs" / "index.html").write_text(SITE.format(link, more), encoding="utf-8")
    return folder


def test_dead_links_are_found(tmp_path: Path) -> None:
    assert check.dead_links(site(tmp_path)) == []
    assert check.dead_links(site(tmp_path, "index.html#top")) == []
    assert check.dead_links(site(tmp_path, "https://example.org/x")) == []
    assert len(check.dead_links(site(tmp_path, "gone.html"))) == 1
    assert len(check.dead_links(site(tmp_path, "#gone"))) == 1
    assert len(check.dead_links(site(tmp_path, more='<img src="gone.png">'))) == 1


@pytest.fixture(scope="module")
def browser() -> str:
    pytest.importorskip("playwright")
    found = check.find_browser()
    if found is None:
        pytest.skip("no Chromium is installed")
    return str(found)


@pytest.mark.parametrize(
    ("more", "wrong"),
    [
        ("", 0),
        ("<script>console.error('oh')</script>", 2),
        ("<script>throw new Error('oh')</script>", 2),
        ('<div style="width: 1300px">x</div>', 2),
        ('<div style="width: 700px">x</div>', 1),
        ("<style>h1 {display: none}</style>", 2),
        ('<img src="https://localhost:1/x.png">', 6),
    ],
)
def test_wrong_pages_are_found_in_a_browser(
    tmp_path: Path, browser: str, more: str, wrong: int
) -> None:
    # Each window says it once; what cannot be loaded is foreign, an error, and no picture.
    found = list(check.in_browser(site(tmp_path, more=more), browser, ("docs/index.html",)))
    assert len(found) == wrong, found


def test_a_folder_without_a_site_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[Any]
) -> None:
    with pytest.raises(SystemExit):
        check.main([str(tmp_path)])
    assert "docs/index.html" in capsys.readouterr().err
