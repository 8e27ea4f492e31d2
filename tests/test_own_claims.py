"""Claims of one's own: in one call, checked everywhere, drawn over studies, from a file."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sketchattn as sa
from sketchattn import theory
from sketchattn.cli import main
from sketchattn.theory.engine import registry, validation
from sketchattn.theory.engine.bounds import ERRORS
from sketchattn.theory.engine.decisions import decide
from sketchattn.theory.engine.instances import instance_names

HEAD = sa.make_heads("clustered", n=48, d=8, rng=0)[0]
PAIR = (np.full((4, 40), 1 / 40), np.random.default_rng(0).standard_normal((40, 3)))

Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Let claims without a record run on three instances, in place of all."""
    names = ("reference", "enumeration", "causal")
    monkeypatch.setattr(validation, "instance_names", lambda: names)
    return names


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Say:
    monkeypatch.delenv("SKETCHATTN_TRACEBACK", raising=False)

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(x) for x in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


class Reduced(sa.UniformColumns):
    """A method without a matrix."""

    @property
    def traits(self) -> sa.Traits:
        return dataclasses.replace(super().traits, matrix=False)


def root(problem: sa.AttentionProblem, r: int, c: float) -> float:
    return c / math.sqrt(r)


def mine(**changes: Any) -> theory.Claim:
    options: dict[str, Any] = {"bound": root, "method": sa.JL, "delta": 0.1, "c": 2.0}
    return theory.bound_claim("mine.amm", **{**options, **changes})


# --- one call -----------------------------------------------------------------------------------


def test_a_bound_is_a_claim_in_one_call() -> None:
    record = mine()
    assert theory.claims()["mine.amm"] == record
    assert (record.status, record.kind, record.source) == ("own", "tail", "own")
    assert dict(record.constants) == {"delta": 0.1, "c": 2.0}
    assert record.recorded == {}
    entry = registry.get_entry("mine.amm")
    assert [step["rank"] for step in entry.ladder] == [8, 16, 32, 64, 128, 256]
    assert theory.bound("mine.amm", HEAD, rank=16) == 0.5
    assert theory.bound("mine.amm", HEAD, rank=16, c=1.0) == 0.25
    json.dumps(record.as_dict(), allow_nan=False)


@pytest.mark.parametrize("error", ERRORS)
def test_observations_are_the_error_of_the_method(error: str) -> None:
    # The same draws by hand: the generators of the trials, the report of what they make.
    mine(error=error, delta=None)
    entry = registry.get_entry("mine.amm")
    problem = HEAD.astype(np.float64)
    from sketchattn.theory.engine.checking import _context, default_factory

    context = _context(entry, theory.Instance("one", HEAD), 3, 0, default_factory)
    seen = entry.observe(context, rank=8, c=2.0)
    again = [
        getattr(sa.error_report(problem, sa.JL(8).approximate(problem, rng)), error)
        for rng in context.generators()
    ]
    # The output alone and the dense product differ by rounding.
    np.testing.assert_allclose(seen.values, again, rtol=1e-9)
    wanted = {
        name: getattr(sa.error_report(problem, method.approximate(problem)), error)
        for name, method in (("zero", sa.Zero()), ("the mean of V", sa.VMean()))
    }
    if error.startswith("row_"):  # zero is no distribution
        del wanted["zero"]
    assert seen.trivial == pytest.approx(min(wanted.values()), rel=1e-9)
    assert seen.predictor == min(wanted, key=lambda name: wanted[name])
    assert theory.claims()["mine.amm"].kind == "expectation"


def test_false_and_true_bounds_get_their_verdicts() -> None:
    # E |err|^2 <= (2/r) |A|^2 |V|^2 for gaussian sketches: Markov gives sqrt(2/(delta r)).
    theory.bound_claim(
        "mine.markov", bound=lambda problem, r, delta: math.sqrt(2 / (delta * r)), method="jl",
        delta=0.1,
    )  # fmt: skip
    verdict = theory.check("mine.markov", HEAD, rank=16)
    assert verdict.status in ("holds", "vacuous")
    assert verdict.failures == 0
    assert verdict.bound == pytest.approx(math.sqrt(1.25))
    mine(c=0.01)
    assert theory.check("mine.amm", HEAD).status == "violated"
    # A method that draws nothing has one observation, which must obey.
    theory.bound_claim("mine.top", bound=lambda problem, r: 1.0, method=sa.TopK)
    assert theory.claims()["mine.top"].kind == "inequality"
    assert theory.check("mine.top", HEAD, trials=7).trials == 1


def test_objects_classes_and_names_are_methods() -> None:
    for method in (sa.JL, "jl", sa.JL(rank=3)):
        mine(method=method)
        curve = theory.error_bounds()["mine.amm"]
        assert (curve.method, curve.field) == ("jl", "output_fro_amm")
        assert curve.is_about(sa.JL(5))
        assert not curve.is_about(sa.JL(5, "countsketch"))
    mine(method=sa.JL(3, "countsketch"))
    curve = theory.error_bounds()["mine.amm"]
    assert curve.is_about(sa.JL(5, "countsketch"))
    assert str(curve) == "jl(sketch='countsketch')"
    assert curve.what == "90 % of draws"


def test_what_a_method_refuses_is_not_applicable() -> None:
    mine()
    causal = sa.AttentionProblem(*HEAD.arrays, causal=True)
    verdict = theory.check("mine.amm", causal)
    assert verdict.status == "not applicable"
    assert verdict.notes.startswith("causal must be False for method 'jl'")
    mine(bound=lambda problem, r, c: math.nan)
    assert theory.check("mine.amm", HEAD).notes == "the bound does not apply at rank 12"
    assert theory.check("mine.amm", "enumeration").status == "not applicable"


def test_masked_keys_do_not_exist() -> None:
    seen: list[tuple[int, int, Any]] = []

    def bound(problem: sa.AttentionProblem, r: int) -> float:
        seen.append((problem.n_k, r, problem.dtype))
        return 1.0

    theory.bound_claim("mine.seen", bound=bound, method="uniform", delta=0.5)
    masked = sa.AttentionProblem(*HEAD.arrays, key_mask=np.arange(48) < 20)
    theory.check("mine.seen", masked, trials=2)
    assert seen[0] == (20, 5, np.float64)


def test_a_claim_of_ones_own_can_be_replaced_and_no_other() -> None:
    mine()
    assert mine(c=3.0).constants["c"] == 3.0
    with pytest.raises(ValueError, match="id must be unique, got 'sketching.amm_markov' twice"):
        theory.bound_claim("sketching.amm_markov", bound=root, method="jl", c=1.0)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"error": "skill"}, ValueError, "error must be a known name, got 'skill'"),
        ({"error": "output_fro"}, ValueError, "did you mean 'output_fro_"),
        ({"method": "jll"}, ValueError, "method must be registered, got 'jll'; did you mean 'jl'"),
        ({"method": 3}, TypeError, "method must be a name, a class or an object of a method, got"),
        ({"delta": 1.5}, ValueError, r"delta must be in \(0, 1\), got 1.5"),
        ({"bound": 0.5}, TypeError, "bound must be callable, got float"),
        ({"bound": lambda problem, r: 1.0}, TypeError, r"bound must be callable as bound\(problem"),
        ({"ranks": [0]}, ValueError, "ranks must be at least 1, got 0"),
        ({"rank": 3}, TypeError, "constants must have other names, got 'rank'; rename it"),
        ({"recorded": {"reference": "fine"}}, ValueError, "recorded must hold verdicts"),
        ({"method": Reduced, "error": "row_tv_mean"}, ValueError, "for a method without a matrix"),
    ],
)
def test_registration_refuses_what_is_wrong(
    changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        mine(**changes)


def test_a_bound_returns_a_number_of_at_least_zero() -> None:
    mine(bound=lambda problem, r, c: -1.0)
    with pytest.raises(ValueError, match="^bound must return at least 0, got -1"):
        theory.check("mine.amm", HEAD)
    mine(bound=lambda problem, r, c: None)
    with pytest.raises(TypeError, match="^bound must return a number, got NoneType"):
        theory.check("mine.amm", HEAD)
    mine(bound=lambda problem, r, c: np.float32(0.5))
    assert theory.check("mine.amm", HEAD, trials=2).bound == 0.5


# --- without a record ---------------------------------------------------------------------------


def test_without_a_record_everything_is_run_and_nothing_differs(few: tuple[str, ...]) -> None:
    mine(c=0.01)
    result = theory.validate("mine", HEAD, trials=20)
    found = {row.verdict.instance: row.verdict.status for row in result.rows}
    assert set(found) == {*few, "clustered/head0"}
    assert found["clustered/head0"] == "violated"
    assert result.unexpected == ()
    assert not result.passed  # a claim of one's own that fails is no good news
    assert "your own claims have no record" in str(result)
    assert "your own claims are violated:" in str(result)
    assert [row.recorded for row in result.rows] == [None] * 4


def test_all_instances_are_meant_and_the_bundled_heads() -> None:
    names = instance_names()
    assert len(names) > 60
    assert set(theory.claims()["sketching.amm_markov"].instances) < set(names)
    mine()
    assert theory.check("mine.amm", trials=1, rank=8).instance == sa.load_heads().names[0]


def test_with_a_record_it_is_compared() -> None:
    mine(c=0.01, recorded={"reference": "violated"})
    result = theory.validate("mine.amm", HEAD, trials=20)
    assert [row.verdict.instance for row in result.rows] == ["reference"]
    assert result.passed
    mine(c=0.01, recorded={"reference": "holds"})
    result = theory.validate("mine.amm", HEAD, trials=20)
    assert [row.recorded for row in result.unexpected] == ["holds"]
    assert not result.passed


def test_nothing_checked_is_said(few: tuple[str, ...], say: Say, tmp_path: Path) -> None:
    mine(bound=lambda problem, r, c: math.nan)
    result = theory.validate("mine.amm", HEAD, trials=20)
    assert not result.passed
    for text in (str(result), result.render(every=True)):
        assert "nothing was checked: no claim applies to a problem (the bound does not" in text
        assert "recorded ones" not in text
    code, out, err = say("validate", "--claims", "mine.amm", "--heads", "clustered:n=48,d=8",
                         "--trials", 20)  # fmt: skip
    assert (code, err) == (1, "")
    assert "nothing was checked" in out

    # Nor does a claim whose record is on a head alone, which is not given, pass for checked.
    @theory.claim(
        "mine.elsewhere", title="t", statement="s", kind="inequality", observes="x",
        recorded={"minilm/layer0.head0": "holds"},
    )  # fmt: skip
    def observe(context: theory.Context) -> theory.Observations:
        raise AssertionError("not called")

    result = theory.validate("mine.elsewhere", HEAD, trials=20)
    assert (len(result.rows), result.passed) == (0, False)
    assert "0 checks of 20 trials\n\nnothing was checked" in str(result)


def test_an_observer_of_ones_own_needs_no_record() -> None:
    @theory.claim("mine.rows", title="t", statement="s", kind="inequality", observes="max |A_ij|")
    def observe(context: theory.Context, *, most: float = 1.0) -> theory.Observations:
        return theory.Observations([float(context.instance.a.max())], most)

    assert theory.check("mine.rows").status == "holds"
    assert theory.check("mine.rows", PAIR, most=0.01).status == "violated"


def test_two_jobs_know_the_claims_of_one(few: tuple[str, ...], tmp_path: Path) -> None:
    mine()
    result = theory.validate("mine.amm", HEAD, trials=20, jobs=2)
    wanted = theory.check("mine.amm", HEAD, trials=20)
    assert {row.verdict for row in result.rows if row.verdict.instance == HEAD.name} == {wanted}
    (path,) = result.plot(tmp_path, 2)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_claims_without_lambdas_can_be_pickled() -> None:
    record = mine()
    assert pickle.loads(pickle.dumps(record)) == record
    bound = theory.error_bounds()["mine.amm"]
    assert pickle.loads(pickle.dumps(bound)).at(HEAD, 16) == 0.5


# --- the same inputs and parameters in check and validate ---------------------------------------


def test_validate_takes_what_check_takes() -> None:
    name = "sketching.moment_countsketch"
    given = [PAIR, "spiked", HEAD, theory.Instance("own", PAIR)]
    result = theory.validate(name, given, trials=60)
    rows = {row.verdict.instance: row for row in result.rows}
    names = ("pair", "spiked", "clustered/head0", "own")
    assert set(rows) == {"reference", "clusters", *names}
    for problem, on in zip(given, names, strict=True):
        assert rows[on].verdict == theory.check(name, problem, trials=60)
    for problem in (PAIR, "spiked", theory.Instance("own", PAIR)):
        assert len(theory.validate(name, problem, trials=60).rows) == 3
    # A named instance that the claim has a record for is checked once.
    assert len(theory.validate(name, "reference", trials=60).rows) == 2
    two = theory.validate(name, [PAIR, PAIR], trials=60)
    assert {"pair0", "pair1"} < {row.verdict.instance for row in two.rows}
    with pytest.raises(ValueError, match="heads must have distinct names, got 'spiked' twice"):
        theory.validate(name, ["spiked", "spiked"], trials=60)
    assert result.render(every=True).count("\n") > 6
    with pytest.raises(ValueError, match="^V must have one row for each of the n = 40"):
        theory.validate(name, (PAIR[0], PAIR[1][:3]))


def test_validate_takes_the_parameters_of_check() -> None:
    names = ["sketching.amm_entrywise", "sketching.amm_jl_moment"]
    given: dict[str, Any] = {"eps": 0.9, "delta": 0.2}
    result = theory.validate(names, HEAD, trials=60, parameters=given)
    rows = {(row.claim.id, row.verdict.instance): row for row in result.rows}
    assert rows[names[0], "clusters"].verdict == theory.check(
        names[0], "clusters", trials=60, **given
    )
    assert rows[names[0], "clusters"].recorded is None  # the record is of the defaults
    assert rows[names[1], "clusters"].recorded == "holds"  # has neither of them
    assert result.as_dict()["parameters"] == given
    same = theory.validate(names[0], HEAD, trials=60, parameters={"eps": 0.5})
    assert all(row.recorded for row in same.rows if row.verdict.instance == "clusters")
    with pytest.raises(TypeError, match="parameters must be those of a claim, got 'epps'; did you"):
        theory.validate(names, HEAD, parameters={"epps": 1})
    with pytest.raises(TypeError, match="parameters must be a mapping from names to values, got"):
        theory.validate(names, HEAD, parameters=0.9)  # type: ignore[arg-type]  # on purpose


# --- studies and the command line ---------------------------------------------------------------


def test_a_study_draws_it(tmp_path: Path) -> None:
    mine()
    result = sa.study(
        HEAD, methods=["jl"], ranks=[8, 16], seeds=1, bounds="mine.amm", pictures=False
    )
    assert result.bounds["bound"].tolist() == pytest.approx([2 / math.sqrt(8), 0.5])
    assert set(result.bounds["method"]) == {"jl"}


FILE = """
import math
import sketchattn as sa
from sketchattn.zoo.base import register


@register("halfway")
class Halfway(sa.UniformColumns):
    pass


sa.theory.bound_claim(
    "mine.file", bound=lambda problem, r, c: c / math.sqrt(r), method=Halfway, delta=0.5, c=9.0,
    recorded={"reference": "vacuous", "heads": "vacuous"},
)
"""


def test_a_file_brings_methods_and_claims(say: Say, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    options = ("--heads", "clustered:n=48,d=8,heads=2", "--import", path, "--jobs", 2)
    code, out, err = say("validate", "--claims", "mine", *options, "--trials", 20)
    assert (code, err) == (0, ""), out
    assert "3 vacuous" in out
    code, out, err = say(
        *("study", *options, "--methods", "halfway", "--ranks", "4,8", "--seeds", 1),
        *("--bounds", "mine.file", "--out", tmp_path / "out", "--no-pictures", "--json"),
    )
    assert (code, err) == (0, "")
    assert json.loads(out)["bounds"] == str(tmp_path / "out" / "bounds.csv")
    code, out, err = say("claims", "mine.*", "--import", path)
    assert out.splitlines()[1].split()[:2] == ["mine.file", "own"]


def test_files_that_cannot_be_imported_are_refused(say: Say, tmp_path: Path) -> None:
    missing = tmp_path / "gone.py"
    code, out, err = say("claims", "--import", missing)
    assert (code, out) == (2, "")
    said = f"import must be an existing .py file, got {str(missing)!r}; check it"
    assert err == f"sketchattn: {said}\n"
    wrong = tmp_path / "wrong.py"
    wrong.write_text("x = 1\nraise KeyError('no')\n")
    code, out, err = say("claims", "--import", wrong)
    assert (code, out) == (2, "")
    assert err == f"sketchattn: {wrong} could not be imported: KeyError: 'no' (line 2)\n"


def test_set_changes_parameters(say: Say) -> None:
    name = "sketching.amm_entrywise"
    options = ("--claims", name, "--heads", "clustered:n=48,d=8", "--trials", 60, "--json")
    code, out, err = say("validate", *options, "--set", "eps=0.9", "--set", "delta=0.2")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["parameters"] == {"eps": 0.9, "delta": 0.2}
    rows = {row["instance"]: row for row in found["rows"]}
    verdict = theory.check(name, "clusters", trials=60, eps=0.9, delta=0.2)
    assert rows["clusters"]["observed"] == verdict.observed
    for text in ("eps", "=3", "eps=", "eps=1 --set eps=2"):
        words = [x for part in text.split(" --set ") for x in ("--set", part)]
        code, out, err = say("validate", *options, *words)
        assert (code, out) == (2, "")
        assert err.startswith("sketchattn: set must be written as name=value, each name once, got")


def test_claims_lists_ids_titles_status_and_parameters(say: Say) -> None:
    code, out, err = say("claims")
    assert (code, err) == (0, "")
    header, *lines = out.splitlines()
    assert header.split() == ["id", "status", "title", "parameters"]
    known = theory.claims()
    assert [line.split()[0] for line in lines] == list(known)
    assert [line.split()[1] for line in lines] == [x.status for x in known.values()]
    code, out, err = say("claims", "sketching.amm_entry*")
    (line,) = out.splitlines()[1:]
    assert line.endswith("eps=0.5, delta=0.05")
    assert known["sketching.amm_entrywise"].title in line
    (found,) = json.loads(say("claims", "sketching.amm_entrywise", "--json")[1])
    assert (found["id"], found["status"]) == ("sketching.amm_entrywise", "derived")
    assert found["parameters"] == {"eps": 0.5, "delta": 0.05}
    code, out, err = say("claims", "sketching.amm_entri")
    assert (code, out) == (2, "")


def test_a_wrong_id_gets_five_guesses() -> None:
    for call in (
        lambda: theory.check("sketching.moment_gausian"),
        lambda: theory.check("nothing.like.it"),
        lambda: theory.validate("sketching.moment_gausian", HEAD),
        lambda: sa.study(HEAD, methods="jl", bounds="sketching.moment_gausian"),
    ):
        with pytest.raises(ValueError, match="got 'nothing|got 'sketching") as refused:
            call()
        guessed = re.findall(r"'([^']+)'", str(refused.value).split("; did you mean ")[1])
        assert len(guessed) == 5
        assert set(guessed) <= set(theory.claims())
        assert len(str(refused.value)) < 300


# --- what is vacuous ----------------------------------------------------------------------------


def test_a_vacuous_verdict_names_predictor_error_and_rank() -> None:
    error = "output_fro_amm"
    report = {
        name: getattr(sa.error_report(HEAD, method.approximate(HEAD)), error)
        for name, method in (("zero", sa.Zero()), ("the mean of V", sa.VMean()))
    }
    best = min(report, key=lambda name: report[name])
    # 3.1/sqrt(r) is below 1 at r = 16, not yet at 8; the four largest entries of a row do better.
    mine(method=sa.TopK, delta=None, c=3.1 * report[best])
    verdict = theory.check("mine.amm", HEAD, rank=4)
    assert verdict.status == "vacuous"
    assert verdict.notes == (
        f"the bound {1.55 * report[best]:.3g} is not below {report[best]:.3g}, the error of "
        f"{best}; it is at rank 16"
    )
    assert verdict.vacuous == verdict.notes
    late = theory.check("mine.amm", HEAD, rank=4, c=90.0)
    assert late.notes.endswith("; it is at no rank below n = 48")

    @theory.claim("mine.drawn", title="t", statement="s", kind="tail", observes="nothing")
    def observe(context: theory.Context, *, rank: int = 4) -> theory.Observations:
        seen, limit = [0.0] * context.trials, 3.1 / math.sqrt(rank)
        return theory.Observations(seen, limit, delta=0.5, rank=rank, trivial=1.0, predictor="zero")

    drawn = theory.check("mine.drawn", HEAD, trials=20)
    said = "the bound 1.55 is not below 1, the error of zero; it is from rank 10 on"
    assert (drawn.status, drawn.notes) == ("vacuous", said)
    # The library's own claims say it too.
    own = theory.check("sketching.amm_jl_moment", "reference", trials=60)
    assert "the error of the mean of V; it is at no rank below n = 64" in own.notes


def test_the_predictor_is_visible_in_a_picture_with_one_rank() -> None:
    from matplotlib.figure import Figure

    from sketchattn.theory.engine.pictures import draw, steps_of

    mine(ranks=[8])
    record = theory.claims()["mine.amm"]
    axes = Figure().add_subplot()
    steps = steps_of(record, theory.Instance("one", HEAD), 0)
    assert [step.rank for step in steps] == [8]
    draw(axes, record, steps)
    lines: dict[str, Any] = {str(line.get_label()): line for line in axes.get_lines()}
    predictor = lines[steps[0].seen.predictor]
    assert predictor.get_linestyle() == "--"
    left, right = predictor.get_xdata()
    assert right > left  # a line, not a point
    assert predictor.get_ydata()[0] == steps[0].seen.trivial


def test_decisions_name_the_predictor() -> None:
    record = dataclasses.replace(mine(), kind="inequality")
    seen = theory.Observations([0.1], 1.0, trivial=0.5, predictor="zero")
    assert decide(record, seen, 0.95).vacuous == "the bound 1 is not below 0.5, the error of zero"


# --- what an author of a theorem meets ----------------------------------------------------------


def observer(returned: Callable[[theory.Context], Any], kind: str = "inequality") -> None:
    """Register ``mine.seen`` with an observer that returns this."""

    @theory.claim("mine.seen", title="t", statement="s", kind=kind, observes="x")
    def observe(context: theory.Context, *, rank: int = 4) -> Any:
        return returned(context)


def observed(values: Any, bound: Any = 1.0, **more: Any) -> Callable[[theory.Context], Any]:
    return lambda context: theory.Observations(values, bound, **more)


@pytest.mark.parametrize(
    ("returned", "kind", "message"),
    [
        (lambda context: 1.0, "inequality", "Observations.values, bound.*, got float; return"),
        (observed(0.5), "inequality", "values of one axis, a number a trial, got 0.5; put them"),
        (observed(np.ones((2, 3))), "expectation", r"got an array of shape \(2, 3\); put"),
        (observed(["a"]), "inequality", r"values that are numbers, got \['a'\]; return one"),
        (observed([[1.0], [1.0, 2.0]]), "inequality", "values that are numbers, got"),
        (observed([]), "inequality", "a value a trial, got none in 200"),
        (observed([1.0, math.nan]), "inequality", "values without NaN, got NaN; where the claim"),
        (observed([1.0, math.nan]), "equality", "values without NaN, got NaN; where the claim"),
        (observed([1.0], math.nan), "inequality", "a bound without NaN, got NaN"),
        (observed([1.0], [1.0, 2.0]), "inequality", r"got shape \(2,\) for 1 values; return"),
        (observed([1.0], None), "inequality", "a bound that is a number, or one a trial, got None"),
        (observed([1.0]), "tail", "the rate of failure of its tail, got delta = None; return"),
        (observed([1.0], delta=-0.1), "tail", "a rate of failure of at least 0, got delta = -0.1"),
    ],
)
def test_what_is_no_observation_is_refused_in_one_line(
    returned: Callable[[theory.Context], Any], kind: str, message: str, few: tuple[str, ...]
) -> None:
    observer(returned, kind)
    with pytest.raises((TypeError, ValueError), match=message) as refused:
        theory.check("mine.seen", HEAD)
    text = str(refused.value)
    assert text.startswith("the observer of claim 'mine.seen' must return ")
    assert "\n" not in text
    with pytest.raises(RuntimeError, match="claim 'mine.seen' failed on .*: the observer of claim"):
        theory.validate("mine.seen", HEAD)


def test_infinite_observations_and_bounds_keep_their_verdicts() -> None:
    observer(observed([math.inf]))
    assert theory.check("mine.seen", HEAD).status == "violated"
    observer(observed([1.0], math.inf))
    assert theory.check("mine.seen", HEAD).status == "holds"
    observer(observed(np.ones(3, np.float32), np.float64(1.0), delta=np.float64(0.9)), "tail")
    assert theory.check("mine.seen", HEAD, confidence=0.5).status == "holds"


def test_a_bound_that_returns_an_array_is_named() -> None:
    mine(bound=lambda problem, r, c: np.ones(3))
    said = r"^bound must return a number, got ndarray of shape \(3,\) from that of claim 'mine.amm'"
    with pytest.raises(TypeError, match=said):
        theory.check("mine.amm", HEAD)
    mine(bound=lambda problem, r, c: np.full((1, 1), 0.5))
    assert theory.check("mine.amm", HEAD, trials=2).bound == 0.5


def test_a_parameter_that_is_no_number_is_named(say: Say, few: tuple[str, ...]) -> None:
    mine()
    said = "c must be a number for claim 'mine.amm', got 'big'; by default it is 2"
    with pytest.raises(TypeError, match=f"^{said}"):
        theory.check("mine.amm", HEAD, c="big")
    with pytest.raises(TypeError, match=f"^{said}"):
        theory.validate("mine.amm", HEAD, parameters={"c": "big"})
    code, out, err = say("validate", "--claims", "mine.amm", "--heads", "clustered:n=48,d=8",
                         "--set", "c=big")  # fmt: skip
    assert (code, out) == (2, "")
    assert err.startswith(f"sketchattn: {said}")
    with pytest.raises(TypeError, match="^rank must be a number for claim 'mine.amm', got 'few'"):
        theory.check("mine.amm", HEAD, rank="few")
    assert theory.check("mine.amm", HEAD, rank=None, trials=2).rank == 12


@pytest.mark.parametrize(
    ("curve", "kind", "message"),
    [
        (theory.Curve("topk", {}, "row_tvmax"), ValueError, "field of curve .*mean 'row_tv_max'"),
        (theory.Curve("topkk", {}, "row_tv_max"), ValueError, "method of curve .*mean 'topk'"),
        (theory.Curve("jl", {"skech": "srht"}), ValueError, "'jl', got 'skech'; .* 'sketch'"),
        (theory.Curve(int), TypeError, "curve must be of a method, got type"),
    ],
)
def test_curves_are_checked_when_the_claim_is_made(
    curve: theory.Curve, kind: type[Exception], message: str
) -> None:
    options: dict[str, Any] = {"title": "t", "statement": "s", "kind": "tail", "observes": "x"}

    def observe(context: theory.Context, *, rank: int = 4) -> theory.Observations:
        return theory.Observations([0.0], 1.0, delta=0.1, rank=rank)

    with pytest.raises(kind, match=message):
        theory.claim("mine.curve", curve=curve, **options)(observe)
    assert "mine.curve" not in theory.claims()

    def without(context: theory.Context) -> theory.Observations:
        return theory.Observations([0.0], 1.0, delta=0.1)

    right = theory.Curve("topk", {}, "row_tv_max")
    with pytest.raises(TypeError, match="with the parameter rank, got none; write observe"):
        theory.claim("mine.curve", curve=right, **options)(without)
    theory.claim("mine.curve", curve=right, **options)(observe)
    assert theory.error_bounds()["mine.curve"].at(HEAD, 8) == 1.0


def test_check_takes_heads_of_one_head() -> None:
    name = "sketching.moment_countsketch"
    one = sa.make_heads("clustered", n=48, d=8, rng=0)
    assert theory.check(name, one, trials=60) == theory.check(name, one[0], trials=60)
    assert theory.bound(name, one, rank=8) == theory.bound(name, one[0], rank=8)
    two = sa.make_heads("clustered", n=48, d=8, heads=2, rng=0)
    said = r"^problem must be one head, got 2 of them; pass heads\[0\], or .*validate"
    with pytest.raises(ValueError, match=said):
        theory.check(name, two)
    said = "got 'referense'; did you mean 'reference'.*sketchattn.read_heads"
    with pytest.raises(ValueError, match=said) as refused:
        theory.check(name, "referense")
    assert len(str(refused.value)) < 300  # the nearest, not all


def test_a_bound_over_a_floor_is_drawn() -> None:
    for name, error in (("mine.top", "row_tv_max"), ("mine.mean", "output_fro_rel")):
        theory.bound_claim(name, bound=lambda problem, r: 8 / r, method="topk", error=error)
    result = sa.study(HEAD, ["topk", "uniform"], ranks=[8, 16], seeds=1, floors=True,
                      bounds=["mine.top", "mine.mean"], pictures=False)  # fmt: skip
    axes = result.figure("row_tv_max", bounds=["mine.top"]).axes[0]
    lines = {line.get_gid(): line for line in axes.lines}
    assert lines["mine.top"].get_ydata() == pytest.approx([1.0, 0.5])
    assert lines["mine.top"].get_color() == lines["topk"].get_color()
    from sketchattn.studies.plots import _draw_figure, study_figure

    for draw in (study_figure, _draw_figure):  # of the command line
        picture = draw(result.frame, result.references, "row_tv_max", result.bounds)
        gids = [line.get_gid() for line in picture.axes[0].lines]
        assert gids.count("mine.top") == 1
        assert "mine.mean" not in gids


def test_a_bound_that_cannot_be_drawn_is_refused() -> None:
    mine()
    result = sa.study(HEAD, ["jl", "uniform"], ranks=[8, 16], seeds=1, bounds="mine.amm",
                      pictures=False)  # fmt: skip
    said = "^bounds must be about 'output_fro_rel', got 'mine.amm', which is about 'output_fro_amm'"
    with pytest.raises(ValueError, match=said):
        result.figure("output_fro_rel", bounds=["mine.amm"])
    said = "^bounds must be about a method that is drawn, got 'mine.amm', which is about 'jl'"
    with pytest.raises(ValueError, match=said):
        result.figure("output_fro_amm", methods=["uniform"], bounds="mine.amm")
    result.figure("output_fro_amm", methods={"jl": "Ours"}, bounds="mine.amm")


def test_all_says_why(few: tuple[str, ...], say: Say) -> None:
    mine(c=60.0)
    theory.bound_claim("mine.tail", bound=lambda problem, r: 1.5 / r, method="uniform", delta=0.01)
    heads = ("--heads", "clustered:n=48,d=8,heads=2")
    code, out, err = say("validate", "--claims", "mine", *heads, "--trials", 20, "--all")
    lines = out.splitlines()
    vacuous = next(x for x in lines if "mine.amm" in x and "2 heads" in x)
    assert re.search(r"vacuous .*the bound .* is not below .*, the error of ", vacuous)
    assert "; it is at no rank below n = 48" in vacuous
    verdicts = theory.validate("mine.amm", HEAD, trials=20)
    for row in verdicts.rows:
        assert row.verdict.notes
        assert row.verdict.notes in verdicts.render(every=True)
    observer(observed([0.0], delta=0.1), "tail")
    said = theory.validate("mine.seen", HEAD, trials=1).render(every=True)
    assert re.search(r"inconclusive .*1 trials cannot certify delta = 0.1; needs 29 trials", said)


def test_a_verdict_names_its_rank() -> None:
    mine()
    assert " bound 0.5 at rank 16, 0 failures in 20 trials" in str(
        theory.check("mine.amm", HEAD, rank=16, trials=20)
    )
    observer(observed([0.5]))
    assert "at rank" not in str(theory.check("mine.seen", HEAD))


def test_the_worst_three_problems_of_a_claim_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("reference", "enumeration", "causal", "spiked", "rank-one")
    monkeypatch.setattr(validation, "instance_names", lambda: names)
    worst = dict(zip(names, (2.0, 5.0, 3.0, 7.0, 4.0), strict=True))
    observer(lambda context: theory.Observations([worst.get(context.instance.name, 0.0)], 1.0))
    result = theory.validate("mine.seen", HEAD, trials=20)
    said = str(result).split("your own claims are violated:")[1]
    lines = [line.split() for line in said.splitlines() if "mine.seen" in line]
    assert [line[1] for line in lines[:3]] == ["spiked", "enumeration", "rank-one"]
    assert " ".join(lines[3]).startswith("mine.seen and on 2 more: --all")
    assert len(lines) == 4
    assert result._repr_html_().count("<td>mine.seen</td>") == 4
    assert "causal" in result.render(every=True)


def test_the_picture_of_a_claim_is_as_its_user_wants_it(few: tuple[str, ...]) -> None:
    import matplotlib

    mine(ranks=[8, 16])
    result = theory.validate("mine.amm", HEAD, trials=20)
    for grid in (True, False):
        with matplotlib.rc_context({"figure.figsize": (3, 2), "axes.grid": grid, "figure.dpi": 90}):
            figure = result.figure("mine.amm")
            assert figure.get_size_inches().tolist() == [3.0, 2.0]
            assert figure.dpi == 90
            assert len(figure.axes) == 2
            for axes in figure.axes:
                assert any(line.get_visible() for line in axes.get_xgridlines()) == grid
            figure.canvas.draw()
            (legend,) = figure.legends  # one for all panels, inside
            box = legend.get_window_extent()
            assert box.x0 >= 0
            assert box.x1 <= figure.bbox.x1
            frames = [axes.get_window_extent() for axes in figure.axes]
            assert all(frame.y0 > box.y1 and frame.height > 0.2 * 90 for frame in frames)
    from sketchattn.theory.engine.pictures import Picture, figure_of

    task = Picture("mine.amm", result._panels([row.verdict for row in result.rows]), 0)
    assert figure_of(task, (10.8, 4.4)).get_size_inches().tolist() == [10.8, 4.4]


def test_claims_are_found_by_words_of_titles_and_statements(say: Say) -> None:
    mine(title="A Theorem of Lindenstrauss", statement="P(zig > zag) <= delta.")
    for word in ("*lindenstrauss*", "LINDENSTRAUSS", "lindenstr", "a theorem", "zig >", "ne.AMM*"):
        code, out, err = say("claims", word.replace("ne.AMM", "mine.AMM"))
        assert (code, err) == (0, "")
        assert "mine.amm" in [line.split()[0] for line in out.splitlines()[1:]]
    for word in ("Johnson", "*lindenstrauss*", "jl"):  # the library's own
        out = say("claims", word)[1]
        listed = [line.split()[0] for line in out.splitlines()[1:]]
        assert {"sketching.jl_pairs_gaussian", "dba.jl_logits"} <= set(listed)
        assert "sketching.moment_gaussian" not in listed
    # A topic is a topic, and what has a point an id.
    listed = [line.split()[0] for line in say("claims", "sketching")[1].splitlines()[1:]]
    assert listed == [name for name in theory.claims() if name.startswith("sketching.")]
    assert say("claims", "mine.am")[0] == 2
    assert say("claims", "no such words,zig")[0] == 2
    assert say("claims", "*no such words*")[0] == 2


def test_an_unknown_topic_mentions_the_import(say: Say) -> None:
    for verb, option in (("validate", "--claims"), ("study", "--bounds")):
        code, out, err = say(verb, option, "author.ht_mean", "--heads", "clustered:n=48,d=8")
        assert (code, out) == (2, "")
        assert "'author.ht_mean'" in err
        assert "--import FILE.py" in err
        assert err.count("\n") == 1
    with pytest.raises(ValueError, match="--import FILE.py"):
        theory.check("author.ht_mean")
    with pytest.raises(ValueError, match="got 'sketching.moment_gausian'") as known:
        theory.check("sketching.moment_gausian")
    assert "--import" not in str(known.value)
