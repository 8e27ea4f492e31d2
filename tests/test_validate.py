"""The verb ``validate``: its table, its exit code, its pictures, and whose heads it checks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sketchattn as sa
from sketchattn import theory
from sketchattn.cli import main
from sketchattn.theory.engine import checking, registry, validation
from sketchattn.theory.engine.registry import get_entry
from sketchattn.theory.engine.validation import choose

MADE = "clustered:n=48,d=8,heads=2"
EXACT = "sketching.moment_countsketch"
REFUTED = "linformer.thm1_fixed"
TAIL = "sketching.posterior_hmt"

Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Say:
    """Run ``validate`` in this process; return exit code, output and errors."""
    monkeypatch.delenv("SKETCHATTN_TRACEBACK", raising=False)

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main(["validate", "--jobs", "1", *(str(x) for x in arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_table_has_source_verdict_numbers_and_failures(say: Say) -> None:
    names = [TAIL, REFUTED]
    code, out, err = say("--claims", ",".join(names), "--heads", MADE, "--trials", 60, "--all")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    columns = ["claim", "on", "source", "verdict", "observed", "bound", "slack", "fail", "rate"]
    assert lines[0].split() == columns
    result = theory.validate(names, sa.make_heads("clustered", n=48, d=8, heads=2, rng=0), 60)
    assert out == result.render(every=True) + "\n"
    assert "2 heads" in out
    assert "0/60" in out
    assert lines[-1] == "all verdicts are the recorded ones"


def test_json_holds_every_verdict(say: Say) -> None:
    code, out, err = say("--claims", EXACT, "--heads", MADE, "--trials", 60, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["trials"], found["unexpected"], found["out"], found["pictures"]) == (
        60, 0, None, [],
    )  # fmt: skip
    instances = [*theory.claims()[EXACT].instances, "clustered/head0", "clustered/head1"]
    assert [row["instance"] for row in found["rows"]] == instances
    keys = {"claim", "source", "status", "observed", "bound", "slack", "trials", "failures"}
    for row in found["rows"]:
        assert keys | {"interval", "recorded", "expected"} <= set(row)
    assert [row["recorded"] for row in found["rows"]] == ["holds", "holds", None, None]


def test_seed_and_trials_are_those_of_the_checks(say: Say) -> None:
    found = [
        json.loads(say("--claims", EXACT, "--heads", MADE, "--trials", n, "--seed", s, "--json")[1])
        for n, s in ((60, 0), (60, 0), (60, 1), (61, 0))
    ]
    observed = [[row["observed"] for row in x["rows"]] for x in found]
    assert observed[0] == observed[1]
    assert observed[0] != observed[2]
    assert found[3]["rows"][0]["trials"] == 61


def test_heads_may_be_a_file(say: Say, tmp_path: Path) -> None:
    heads = sa.make_heads("gaussian", n=32, d=8, rng=3)
    sa.write_heads(tmp_path / "mine.safetensors", heads)
    for name in ("mine.safetensors", "mine.npz"):
        sa.write_heads(tmp_path / name, heads)
        options = ("--heads", tmp_path / name, "--trials", 60, "--json")
        code, out, _ = say("--claims", REFUTED, *options)
        rows = {row["instance"]: row for row in json.loads(out)["rows"]}
        assert code == 0
        assert rows[heads.names[0]]["recorded"] is None
        # A refuted claim is violated on the counterexamples, as recorded.
        assert rows["identity"]["status"] == rows["identity"]["recorded"] == "violated"


def test_bundled_heads_are_checked_by_default(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def refuse(claims: Any, heads: sa.Heads, *numbers: Any, progress: Any, parameters: Any) -> None:
        assert parameters == {}
        given.update(claims=claims, heads=heads.names, numbers=numbers, progress=progress)
        raise ValueError("enough")

    monkeypatch.setattr(validation, "validate", refuse)
    assert say() == (2, "", "sketchattn: enough\n")
    assert given == {
        "claims": None,
        "heads": sa.load_heads("minilm").names,
        "numbers": (200, 0.95, 0, 1),
        "progress": None,
    }


def test_a_verdict_that_is_not_the_recorded_one_gives_exit_code_1(
    say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = get_entry(EXACT)
    recorded = {**entry.claim.recorded, "clusters": "violated"}
    changed = dataclasses.replace(entry.claim, recorded=recorded)
    monkeypatch.setitem(registry._ENTRIES, EXACT, entry._replace(claim=changed))
    code, out, err = say("--claims", EXACT, "--heads", MADE, "--trials", 60)
    assert (code, err) == (1, "")
    assert "1 verdicts differ from the record" in out
    assert out.splitlines()[-1].endswith("[recorded: violated]")
    code, out, _ = say("--claims", EXACT, "--heads", MADE, "--trials", 60, "--json")
    assert code == 1
    assert json.loads(out)["unexpected"] == 1


# Kinds of verdicts that few trials cannot give: a mean, a rate, single observations.
SLOW_TO_SEE = (
    "sketching.sample_distinct_with_weights_of_repeated",
    "lowrank_baselines.keys_suffice",
    "informer.sampled_maximum",
    "skeinformer.lemma1_logarithmic",
)


@pytest.mark.parametrize("trials", [1, 2, 5, 20, 59, 60, 100, 150, 199])
def test_too_few_trials_are_no_news(say: Say, trials: int) -> None:
    names = ",".join(SLOW_TO_SEE)
    code, out, err = say("--claims", names, "--heads", MADE, "--trials", trials, "--json")
    assert (code, err) == (0, "")
    rows = json.loads(out)["rows"]
    for row in rows:
        if row["status"] == "inconclusive":
            assert row["needs"] > row["trials"]
            assert f"needs {row['needs']} trials" in row["notes"]
        else:
            assert row["needs"] is None
    found = {row["claim"]: row for row in rows if row["instance"] in ("reference", "blocks")}
    assert (found[SLOW_TO_SEE[0]]["status"] == "violated") == (trials > 100)
    assert (found[SLOW_TO_SEE[1]]["status"] == "violated") == (trials > 2)


def test_a_refuted_claim_that_is_right_after_all_is_news(
    say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = get_entry(SLOW_TO_SEE[0])
    honest = get_entry("sketching.moment_sample_value_norm2").observe
    monkeypatch.setitem(registry._ENTRIES, SLOW_TO_SEE[0], entry._replace(observe=honest))
    for trials, code in ((100, 1), (59, 0)):
        found = say("--claims", SLOW_TO_SEE[0], "--heads", MADE, "--trials", trials)
        assert found[0] == code, found[1]


@pytest.mark.slow
@pytest.mark.parametrize("trials", [1, 2, 20, 60, 100])
def test_no_number_of_trials_contradicts_the_record(trials: int) -> None:
    heads = sa.make_heads("clustered", n=32, d=4, rng=0)
    result = theory.validate(heads=heads, trials=trials)
    assert not result.unexpected, result.render()


def test_a_broken_sketch_gives_exit_code_1(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = checking.default_factory

    def scaled(kind: str, r: int, n: int, rng: np.random.Generator, **parameters: Any) -> Any:
        return 1.1 * honest(kind, r, n, rng, **parameters).to_dense()

    monkeypatch.setattr(checking, "default_factory", scaled)
    code, out, err = say("--claims", EXACT, "--heads", MADE, "--trials", 100)
    assert (code, err) == (1, "")
    assert "4 verdicts differ from the record" in out
    # On the user's heads, without a record, a theorem that fails is news too.
    assert out.splitlines()[-1].endswith("[recorded: anything but violated]")


def test_out_gets_the_verdicts_and_a_picture_a_claim(say: Say, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    names = [TAIL, REFUTED]
    options = ("--heads", MADE, "--trials", 60, "--out", folder)
    code, out, err = say("--claims", ",".join(names), *options)
    assert (code, err) == (0, "")
    pictures = [folder / f"{name}.png" for name in names]
    assert out.splitlines()[-5:] == [
        f"verdicts: {folder / 'verdicts.json'}, {folder / 'verdicts.csv'}",
        "pictures:",
        *(f"  {path}" for path in pictures),
        f"report: {folder / 'verdicts.html'}",
    ]
    for path in pictures:
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    written = {"verdicts.json", "verdicts.csv", "verdicts.html", *(p.name for p in pictures)}
    assert {p.name for p in folder.iterdir()} == written
    page = (folder / "verdicts.html").read_text()
    assert all(f'src="{p.name}"' in page for p in pictures)
    code, out, _ = say("--claims", ",".join(names), *options, "--json")
    found = json.loads(out)
    assert found["out"] == str(folder)
    assert found["pictures"] == [str(p) for p in pictures]
    written = json.loads((folder / "verdicts.json").read_text())
    assert written["rows"] == found["rows"]


def test_pictures_need_a_number_of_jobs(tmp_path: Path) -> None:
    heads = sa.make_heads("gaussian", n=16, d=4, rng=0)
    result = theory.validate("sketching.posterior_rank_one", heads, 2)
    with pytest.raises(ValueError, match="^jobs must be at least 1, got 0"):
        result.plot(tmp_path / "never", 0)
    with pytest.raises(TypeError, match="^progress must be a bool, got int"):
        result.plot(tmp_path / "never", progress=1)  # type: ignore[arg-type]  # on purpose
    assert not (tmp_path / "never").exists()


@pytest.mark.slow
def test_pictures_do_not_depend_on_jobs(tmp_path: Path) -> None:
    heads = sa.make_heads("clustered", n=48, d=8, heads=2, rng=0)
    result = theory.validate([TAIL, REFUTED], heads, 60)
    one, two = (result.plot(tmp_path / str(jobs), jobs) for jobs in (1, 2))
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]


def test_claims_are_ids_topics_or_patterns() -> None:
    known = theory.claims()
    assert list(choose("sketching.amm_*")) == [x for x in known if x.startswith("sketching.amm_")]
    assert set(choose("linformer*")) == set(choose("linformer"))
    both = choose(["linformer.thm[12]", EXACT, "linformer.thm1"])
    assert list(both) == ["linformer.thm1", "linformer.thm2", EXACT]
    assert list(choose("*.moment_sjl?")) == ["sketching.moment_sjlt"]
    with pytest.raises(ValueError, match=r"^claims must match at least one id, got the pattern"):
        choose("*.nothing*")
    assert choose(None) == known
