"""The book: its scripts pass, fail when a statement is broken, and chapters name every claim."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from packaging_checks import ROOT

import sketchattn as sa
from sketchattn.theory.engine.registry import claims

BOOK = ROOT / "theory"
TOPICS = (
    *("softmax", "sketching", "sampling", "linformer", "skeinformer", "informer"),
    "dba",
    "lowrank_baselines",
    "combiner",
    "training_free",
    "nearfar",
)
# Scripts that take more than a few seconds.
LONG = frozenset(
    {
        *("sketching", "linformer", "skeinformer", "dba", "lowrank_baselines", "combiner"),
        *("training_free", "nearfar"),
    }
)
# What is broken by default: one statement of each table, and tables of numbers that are quick.
BROKEN = {
    "softmax": (
        *("softmax.stochastic", "softmax.spectral_norm", "softmax.hull", "softmax.merge"),
        *("softmax.perturbation", "softmax.query_lipschitz_half", "heads"),
    ),
    "sketching": (
        *("sketching.moment_countsketch", "sketching.eckart_young", "sketching.hutchinson_tail"),
        *("sketching.amm_markov", "enumeration", "points", "factors"),
    ),
    "sampling": ("sketching.moment_sample_uniform", "sketching.leverage_fast", "enumeration"),
    "linformer": ("linformer.oracle", "linformer.eckart_young", "pooling", "spiked", "ranks"),
    "skeinformer": (
        *("skeinformer.expected_error_exact", "skeinformer.mcdiarmid_T", "skeinformer.pilot_law"),
        *("skeinformer.identity_adaptive", "skeinformer.permutation"),
        *("enumeration", "scope", "unseen", "worked"),
    ),
    "informer": (
        *("informer.sandwich", "informer.regret", "informer.total_bound", "informer.miss_rate"),
        *("worked", "counterexample", "fills"),
    ),
    "dba": (
        *("dba.lossless_logits", "dba.circle", "dba.multiplicity", "dba.matrix_floor"),
        *("dba.logit_error", "dba.projector", "dba.skeleton", "dba.jl_logits"),
        *("line", "trap", "attained", "lemma", "enumeration"),
    ),
    "training_free": (
        *("training_free.wildcat_row_sums", "training_free.wildcat_exact"),
        *("training_free.block_sample_unbiased", "training_free.thinning_mass"),
        *("training_free.tree_exact", "training_free.vattention_merged_mean"),
        *("gray", "laws", "thinning_merge"),
    ),
    "nearfar": (
        *("nearfar.rows", "nearfar.exact_keys", "nearfar.jensen", "nearfar.interval"),
        *("nearfar.frozen", "nearfar.frozen_gap", "nearfar.first_order_rate", "nearfar.merge"),
        *("nearfar.causal", "normal", "rates", "estimate"),
    ),
    "lowrank_baselines": (
        *("lowrank_baselines.residual_recursion", "lowrank_baselines.queries_suffice"),
        *("lowrank_baselines.mse_positive", "lowrank_baselines.theorem2"),
        *("lowrank_baselines.favor_factors", "lowrank_baselines.clustered_proposition2"),
        *("lowrank_baselines.topk_floor", "filter", "medians", "regularised", "theorem2"),
    ),
    "combiner": (
        *("combiner.sandwich", "combiner.lossless_bias", "combiner.gibbs_identity"),
        *("combiner.mass_aware", "combiner.certificate_gap", "combiner.structural_floor"),
        *("combiner.alternating", "worked", "constants", "uniform"),
    ),
}


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Give the chapters, as their scripts make them, by topic."""
    monkeypatch.syspath_prepend(str(BOOK))
    names = {topic: f"verify_{topic}" for topic in TOPICS}
    yield {topic: import_module(name).CHAPTER for topic, name in names.items()}
    for name in (*names.values(), "_chapter"):
        sys.modules.pop(name, None)


def run(topic: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", str(BOOK / f"verify_{topic}.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def page(topic: str) -> str:
    return (BOOK / f"{topic}.md").read_text(encoding="utf-8")


def prose(topic: str) -> str:
    """Return a chapter without its tables."""
    return re.sub(r"<!-- table ([\w-]+) -->.*?<!-- end \1 -->", "", page(topic), flags=re.DOTALL)


# --- scripts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "topic", [pytest.param(x, marks=[pytest.mark.slow] if x in LONG else []) for x in TOPICS]
)
def test_a_script_finds_what_its_chapter_says(topic: str) -> None:
    done = run(topic, "--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("topic", "name"), [(x, name) for x in TOPICS for name in BROKEN[x]])
def test_a_broken_statement_is_noticed(topic: str, name: str, scripts: dict[str, Any]) -> None:
    assert name in scripts[topic].breakable()
    assert scripts[topic].main(["--break", name]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("topic", TOPICS)
def test_all_broken_statements_are_noticed(topic: str, scripts: dict[str, Any]) -> None:
    chapter = scripts[topic]
    unnoticed = [name for name in chapter.breakable() if chapter.main(["--break", name]) != 1]
    assert unnoticed == []


def test_the_exit_status_is_that_of_the_process() -> None:
    done = run("softmax", "--break", "softmax.hull")
    assert done.returncode == 1
    assert "softmax.hull on shared-key: violated" in done.stderr


def test_what_cannot_be_broken_is_refused(
    scripts: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        scripts["softmax"].main(["--break", "softmax.hul"])
    assert stop.value.code == 2
    assert "got 'softmax.hul'; --list prints them" in capsys.readouterr().err
    assert scripts["softmax"].main(["--list"]) == 0
    assert "softmax.hull" in capsys.readouterr().out.split()


@pytest.mark.parametrize("topic", TOPICS)
def test_a_stale_number_is_noticed(topic: str, tmp_path: Path, scripts: dict[str, Any]) -> None:
    chapter = scripts[topic]
    printed = chapter.printed()
    assert len(printed) >= 4
    assert chapter.stale(printed) == []
    name = next(x for x, table in printed.items() if table.header[0] != "claim")
    table = printed[name]
    changed = [tuple(f"{float(x) * 1.1:.6g}" if _number(x) else x for x in r) for r in table.rows]
    assert chapter.stale({**printed, name: table._replace(rows=changed)}) != []
    assert chapter.stale({**printed, name: table._replace(rows=table.rows[1:])}) != []
    assert chapter.stale({x: y for x, y in printed.items() if x != name}) != []
    # The last digit of another machine is no change.
    close = [tuple(f"{float(x) * 1.001:.9g}" if _number(x) else x for x in r) for r in table.rows]
    assert chapter.stale({**printed, name: table._replace(rows=close)}) == []
    # A figure of other tables.
    chapter.picture = tmp_path / "other.svg"
    chapter.picture.write_text("<svg/>", encoding="utf-8")
    assert "drawn from other tables" in chapter.stale(printed)[0]


def _number(cell: str) -> bool:
    try:
        return float(cell) not in (0.0, float("inf"))
    except ValueError:
        return False


@pytest.mark.parametrize("topic", TOPICS)
def test_writing_what_is_printed_changes_nothing(
    topic: str, tmp_path: Path, scripts: dict[str, Any]
) -> None:
    chapter = scripts[topic]
    before = chapter.page.read_bytes()
    chapter.page = Path(shutil.copy(chapter.page, tmp_path))
    chapter.picture = tmp_path / "figure.svg"
    tables = chapter.printed()
    chapter.write(tables)
    assert chapter.page.read_bytes() == before
    first = chapter.picture.read_bytes()
    assert first.startswith(b"<?xml")
    assert first == chapter.svg()
    assert len(first) < 100_000
    # Numbers that do differ are written.
    name, table = next((x, t) for x, t in tables.items() if t.header[0] != "claim")
    rows = [tuple(f"{2 * float(x):g}" if _number(x) else x for x in row) for row in table.rows]
    chapter.write({name: table._replace(rows=rows)})
    assert chapter.printed()[name].rows == rows


def test_a_comparison_can_fail(scripts: dict[str, Any]) -> None:
    checks = import_module("_chapter").Checks
    for broken in (False, True):
        made = checks(broken)
        made.equal("x", 1.0, 1.0, relative=1e-9)
        made.at_most("x", 1.0, 1.0)
        assert len(made.problems) == (2 if broken else 0)
    made = checks(False)
    made.equal("x", float("nan"), 1.0, relative=1e-9)
    made.at_most("x", float("nan"), 1.0)
    made.equal("x", 1.1, 1.0, relative=0.05)
    assert len(made.problems) == 3


# --- chapters -------------------------------------------------------------------------------------


def test_every_chapter_has_its_script_and_its_figure() -> None:
    assert sorted(path.stem for path in BOOK.glob("*.md")) == sorted((*TOPICS, "README"))
    assert {path.stem for path in BOOK.glob("verify_*.py")} == {f"verify_{x}" for x in TOPICS}
    readme = page("README")
    for topic in TOPICS:
        text = page(topic)
        assert f"(verify_{topic}.py)" in text
        assert f"]({topic}.svg)" in text
        assert "## What is measured, and what that cannot show" in text
        assert f"({topic}.md)" in readme
        assert f"`verify_{topic}.py`" in readme
        assert (BOOK / f"{topic}.svg").exists()


NAME = re.compile(
    r"`((?:softmax|sketching|linformer|skeinformer|informer|dba|lowrank_baselines|combiner|"
    r"training_free|nearfar)"
    r"\.[A-Za-z0-9_]+)`"
)


def test_chapters_name_claims_that_exist_and_every_claim_is_named() -> None:
    known = set(claims())
    named: set[str] = set()
    for topic in TOPICS:
        found = set(NAME.findall(page(topic)))
        assert found <= known, topic
        named |= set(NAME.findall(prose(topic)))
    assert {x for x in known if NAME.fullmatch(f"`{x}`")} - named == set()


def test_every_claim_has_a_verdict_in_some_chapter(scripts: dict[str, Any]) -> None:
    shown = {
        statement.claim
        for chapter in scripts.values()
        for group in chapter.statements.values()
        for statement in group
    }
    assert {x for x in claims() if NAME.fullmatch(f"`{x}`")} == shown


def test_claims_of_methods_exist_and_are_about_them() -> None:
    known = claims()
    named: set[str] = set()
    for name, cls in sa.methods().items():
        rank = {"rank": 8} if "rank" in inspect.signature(cls).parameters else {}
        traits = cls(**rank).traits
        assert set(traits.claims) <= set(known), name
        assert len(set(traits.claims)) == len(traits.claims)
        named |= set(traits.claims)
    for name in (
        *("skeinformer", "informer", "column_sampling", "jl", "linformer"),
        *("nystromformer", "performer", "dba", "clustered", "compressed", "combiner"),
        "nearfar",
    ):
        assert sa.methods()[name](rank=8).traits.claims, name
    # Other components have other claims: Proposition 1 is about one choice of them only.
    weighted = sa.Skeinformer(8, replace=True, weights="importance", normalizer="exact")
    named |= set(weighted.traits.claims)
    for choice in ("sampled", "exact"):
        named |= set(sa.Skeinformer(8, normalizer=choice).traits.claims)
    named |= set(sa.ColumnSampling(8, law="uniform", replace=False).traits.claims)
    assert "skeinformer.proposition1" in weighted.traits.claims
    assert "skeinformer.proposition1" not in sa.Skeinformer(8).traits.claims
    assert sa.ColumnSampling(8, normalizer="sampled").traits.claims == ()
    topics = {x for x in known if x.startswith(("skeinformer.", "informer."))}
    assert topics - named == set()


def test_links_between_chapters_lead_somewhere() -> None:
    for topic in (*TOPICS, "README"):
        for target in re.findall(r"\]\(([^)#]+)\)", page(topic)):
            assert (BOOK / target).exists(), f"{topic}: {target}"
