"""Recommendations: the cheapest by brute force, what is certified, and what must not pass."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from naive import naive_attention
from numpy.typing import NDArray
from scipy.stats import binom

import sketchattn as sa
from sketchattn.cli import main
from sketchattn.errors.certificates import RememberedRows, certify_known
from sketchattn.studies import cheapest
from sketchattn.studies.recommend import COLUMNS, TRIED
from sketchattn.zoo.base import Method, Traits

Array = NDArray[Any]
Cost = Callable[[Any], float]

LEVEL = 1e-6  # false alarms of every statistical test in this file, at most


class Planted(Method):
    """Exact attention but for errors of a known size, on a share of the rows."""

    name = "planted"

    def __init__(self, size: float = 0.1, share: float = 1.0, cost: float = 0.5, salt: int = 0):
        self.size = size
        self.share = share
        self.cost = cost
        self.salt = salt

    @property
    def traits(self) -> Traits:
        return Traits(causal=True, key_mask=True, uses_rank=False, matrix=False)

    def _draw(self, problem: sa.AttentionProblem, rng: Any) -> Any:
        raise NotImplementedError

    def _approximate(self, problem: sa.AttentionProblem, draw: Any) -> Any:
        raise NotImplementedError

    def _run(self, problem: sa.AttentionProblem, rng: Any, draw: Any) -> Array:
        exact = np.array(problem.output, np.float64)
        generator = np.random.default_rng([self.salt, int(rng)])
        noise = generator.standard_normal(exact.shape)
        chosen = generator.permutation(len(exact))
        noise[chosen[max(1, round(self.share * len(exact))) :]] = 0.0
        return exact + self.size * np.linalg.norm(exact) / np.linalg.norm(noise) * noise


class Failing(Planted):
    """A method that accepts every head and then fails."""

    name = "failing"

    def _run(self, problem: sa.AttentionProblem, rng: Any, draw: Any) -> Array:
        raise np.linalg.LinAlgError("singular\nvalues")


def cost_of(method: Any) -> float:
    """Return made-up seconds: exact takes 1, a rank its share of 64 keys."""
    if method is None:
        return 1.0
    return float(getattr(method, "cost", getattr(method, "rank", 1) / 64))


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> Callable[[Cost], list[Any]]:
    """Replace the clock: seconds of a call are those that a function of the method says."""
    real = cheapest.run

    def replace(cost: Cost = cost_of) -> list[Any]:
        calls: list[Any] = []

        def run(problem: sa.AttentionProblem, method: Any, seed: int) -> tuple[Array, float]:
            calls.append(method)
            return real(problem, method, seed)[0], cost(method)

        monkeypatch.setattr(cheapest, "run", run)
        return calls

    return replace


def even(n: int = 96, seed: int = 0, **options: Any) -> sa.AttentionProblem:
    """Return a head whose values are close together, so that few rows certify much."""
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, n, 4))
    return sa.AttentionProblem(q, k, 1 + 0.05 * rng.standard_normal((n, 3)), **options)


def gaussian(n: int = 64, seed: int = 0, **options: Any) -> sa.AttentionProblem:
    q, k, v = np.random.default_rng(seed).standard_normal((3, n, 8))
    return sa.AttentionProblem(q, k, v + 0.5, **options)


def truth(problem: sa.AttentionProblem, output: Array) -> float:
    _, exact, _ = naive_attention(
        *(x.astype(np.float64) for x in (problem.q, problem.k, problem.values)),
        scale=problem.scale,
        first=problem.offset,
        right=0 if problem.causal else None,
        key_mask=problem.key_mask,
    )
    return float(np.linalg.norm(output - exact) / np.linalg.norm(exact))


def called(found: sa.Recommendation, problem: sa.AttentionProblem, head: str) -> Array:
    """Return the output of the recommended call, from its text."""
    call = found.frame.set_index("head").loc[head, "call"]
    q, k, v = problem
    names = {"q": q, "k": k, "v": v, "key_mask": problem.key_mask, "method": found.chosen[head]}
    output: Array = eval(str(call), {"sa": sa, **names})
    return output


# --- the search ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tolerance", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=["plain", "causal"])
def test_the_cheapest_is_that_of_brute_force(
    costs: Any, tolerance: float, options: dict[str, Any]
) -> None:
    costs()
    problem = gaussian(**options)
    methods = ["uniform", "combiner"] + ([] if options else ["wildcat", "thinformer", "dba"])
    found = sa.recommend(problem, tolerance, methods=methods, rng=3)
    row = found.frame.iloc[0]
    within = [
        (method.rank / 64, name)
        for name in methods
        for method in (sa.methods()[name](rank=2**i) for i in range(1, 6))
        if truth(problem, method.attend(problem, rng=3)) <= tolerance
    ]
    if not within:
        assert row["method"] == "exact"
        return
    # Ranks between powers of two may be cheaper, none of these is.
    assert row["seconds"] <= min(within)[0]
    assert row["certified_high"] <= tolerance
    assert row["seconds"] == row["rank"] / 64


def test_ranks_between_powers_of_two_are_tried(costs: Any) -> None:
    costs()
    found = sa.recommend(gaussian(), 0.5, methods="uniform")
    ranks = found.tried["rank"].tolist()
    row = found.frame.iloc[0]
    assert any(rank & (rank - 1) for rank in ranks)
    by_rank = found.tried.set_index("rank")["estimate"]
    assert by_rank[row["rank"]] <= 0.5
    assert by_rank[max(r for r in ranks if r < row["rank"])] > 0.5


def test_larger_blocks_at_smaller_ranks_are_found(costs: Any) -> None:
    # The error of spans that are exact inside rises with the rank.
    q, k, v = np.random.default_rng(0).standard_normal((3, 128, 8))
    position = np.repeat(np.eye(4), 32, axis=0) * 6
    problem = sa.AttentionProblem(np.hstack([q, position]), np.hstack([k, position]), v)
    costs(lambda method: 1.0 if method is None else 0.5)
    found = sa.recommend(problem, 0.3, methods=["combiner"])
    row, tried = found.frame.iloc[0], found.tried.set_index("rank")["estimate"]
    assert row["rank"] <= 4
    assert tried[2] < tried[8] < tried[16]
    # In time that falls with the rank, ranks above the last that holds are looked at.
    costs(lambda method: 1.0 if method is None else 0.9 - method.rank / 1000 * (method.rank < 9))
    tolerance = (tried[4] + tried[8]) / 2
    falling = sa.recommend(problem, tolerance, methods=["combiner"])
    assert set(falling.tried["rank"]) >= {2, 4, 6, 8}
    assert falling.frame["rank"][0] >= 4


def test_a_method_that_is_slower_than_exact_is_left_soon(costs: Any) -> None:
    calls = costs(lambda method: 1.0 if method is None else 3.0)
    found = sa.recommend(gaussian(256), 0.2, methods=["uniform"])
    assert found.frame["method"].tolist() == ["exact"]
    assert "no method of 1 is cheaper" in found.frame["reason"][0]
    assert max(m.rank for m in calls if m is not None) <= 4


def test_no_method_is_run_far_beyond_the_best(costs: Any) -> None:
    calls = costs()
    sa.recommend(gaussian(1024), 0.5, methods=["vmean", "uniform"])
    largest = max(getattr(m, "rank", 0) for m in calls if m is not None)
    assert largest <= 128  # 1 second, and one rank more


def test_nothing_cheaper_names_the_closest(costs: Any) -> None:
    costs()
    found = sa.recommend(gaussian(), 0.001, methods=["uniform", "wildcat"])
    row = found.frame.iloc[0]
    assert row["method"] == "exact"
    assert row["call"] == "sa.attention(q, k, v)"
    assert re.fullmatch(
        r"no method of 2 is cheaper within 0\.001 "
        r"\(closest: \w+, rank \d+, error [\d.e-]+\)",
        row["reason"],
    )
    assert row["parameters"] == {}
    assert row["seconds"] == row["exact_seconds"] == 1.0
    assert found.certificates[row["head"]] is not None
    assert row["certified_high"] < 1e-12  # of float64, from all rows


def test_a_winner_is_timed_again_beside_exact(costs: Any) -> None:
    """A setting that was quick by chance is not recommended."""
    seen: list[float] = []

    def cost(method: Any) -> float:
        if method is None:
            return 1.0
        seen.append(method.cost)
        return 0.1 if seen.count(method.cost) < 3 and method.cost == 2.0 else method.cost

    costs(cost)
    lucky = {"lucky": Planted(0.01, cost=2.0), "steady": Planted(0.01, cost=0.4)}
    row = sa.recommend(gaussian(), 0.05, methods=lucky).frame.iloc[0]
    assert (row["method"], row["seconds"]) == ("steady", 0.4)


def test_what_is_as_quick_as_exact_attention_is_not_quicker(costs: Any) -> None:
    count = 0

    def cost(method: Any) -> float:
        nonlocal count
        if method is None:
            return 1.0
        count += 1
        return 1.1 if count % 3 == 0 else 0.9  # quicker in two runs of three

    costs(cost)
    row = sa.recommend(gaussian(), 0.05, methods={"tie": Planted(0.01)}).frame.iloc[0]
    assert row["method"] == "exact"
    assert row["reason"] == "no method of 1 is cheaper at any rank"


def test_the_mean_of_v_is_enough_where_attention_is_flat(costs: Any) -> None:
    costs()
    q, k, v = gaussian().arrays
    flat = sa.AttentionProblem(np.zeros_like(q), k, v)
    assert sa.recommend(flat, 0.01).frame["method"].tolist() == ["vmean"]


# --- what is recommended ------------------------------------------------------------------------

HEADS: dict[str, Callable[[], sa.AttentionProblem]] = {
    "float32": lambda: gaussian().astype(np.float32),
    "float64": gaussian,
    "causal": lambda: gaussian(causal=True),
    "scaled": lambda: gaussian(scale=0.2),
    "masked": lambda: gaussian(key_mask=np.arange(64) % 5 != 0),
    "first rows see nothing": lambda: gaussian(causal=True, key_mask=np.arange(64) > 6),
    "rectangular": lambda: sa.AttentionProblem(
        gaussian().q[:40], gaussian().k, gaussian().v, causal="bottom-right"
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_call_computes_the_output_that_was_certified(costs: Any, name: str) -> None:
    costs(lambda method: 1.0 if method is None else 0.5)
    problem = HEADS[name]()
    found = sa.recommend(problem, 0.8, methods=["uniform"], rng=5)
    row = found.frame.iloc[0]
    assert row["method"] == "uniform"
    output = called(found, problem, row["head"])
    error = truth(problem, output)
    # The kernel's rounding is in both.
    assert row["certified_high"] == pytest.approx(error, rel=1e-9, abs=1e-12)
    assert row["kind"] == "exact"
    assert row["rows"] == problem.n_q
    repeated = sa.attention(
        *problem.arrays,
        found.chosen[row["head"]],
        rng=row["seed"],
        scale=problem.scale,
        causal=problem.causal,
        key_mask=problem.key_mask,
    )
    assert np.array_equal(output, repeated)


def test_the_call_of_a_method_with_parameters(costs: Any) -> None:
    costs(lambda method: 1.0 if method is None else 0.5)
    methods = {"own": sa.Skeinformer(rank=1, law="uniform", normalizer="sampled")}
    found = sa.recommend(gaussian(), 0.95, methods=methods)
    row = found.frame.iloc[0]
    assert row["method"] == "own"
    assert row["parameters"] == {"rank": row["rank"], "law": "uniform", "normalizer": "sampled"}
    assert row["call"].startswith('sa.attention(q, k, v, "skeinformer", ')
    assert truth(gaussian(), called(found, gaussian(), row["head"])) <= row["certified_high"] + 1e-9


def test_a_method_without_a_literal_is_the_object_itself(costs: Any) -> None:
    costs()
    found = sa.recommend(gaussian(), 0.2, methods={"mine": Planted(0.1)})
    row = found.frame.iloc[0]
    assert row["call"] == "sa.attention(q, k, v, method, rng=0)"
    assert found.chosen[row["head"]].size == 0.1
    assert truth(gaussian(), called(found, gaussian(), row["head"])) == pytest.approx(0.1)


def test_rng_is_the_seed_of_the_call(costs: Any) -> None:
    costs(lambda method: 1.0 if method is None else 0.5)

    def seed(rng: Any) -> Any:
        return sa.recommend(gaussian(), 0.8, methods="uniform", rng=rng).frame["seed"][0]

    assert seed(7) == 7
    assert seed(np.random.default_rng(1)) == seed(np.random.default_rng(1))
    assert seed(None) != seed(None)
    assert sa.recommend(gaussian(), 0.999, methods="vmean").frame["seed"][0] is None


def test_heads_of_all_kinds_beside_each_other(costs: Any) -> None:
    costs(lambda method: {"exact": 1.0, "vmean": 0.4}.get(getattr(method, "name", "exact"), 0.5))
    heads = [
        sa.AttentionProblem(*p.arrays, causal=p.causal, key_mask=p.key_mask, name=name)
        for name, p in {
            "a": gaussian(),
            "b": gaussian(48, 1, causal=True).astype(np.float32),
            "c": even(96, key_mask=np.arange(96) > 4),
        }.items()
    ]
    found = sa.recommend(heads, 0.5, methods=["uniform", "wildcat", "vmean"])
    assert found.frame["head"].tolist() == ["a", "b", "c"]
    assert tuple(found.frame.columns) == COLUMNS
    assert tuple(found.tried.columns) == TRIED
    assert list(found.left_out) == ["wildcat"]
    assert found.left_out["wildcat"].startswith("head 'b': causal must be False")
    for problem, row in zip(heads, found.frame.to_dict("records"), strict=True):
        error = truth(problem, called(found, problem, row["head"]))
        assert error <= row["certified_high"] * (1 + 1e-6) + 1e-6  # float32 beside float64
    assert found.frame["method"][2] == "vmean"


def same_from_several(backend: str) -> None:
    heads = sa.make_heads("clustered", n=64, d=8, heads=3, rng=0)
    one = sa.recommend(heads, 0.5, methods=["uniform"], progress=False)
    with joblib.parallel_config(backend=backend):
        two = sa.recommend(heads, 0.5, methods=["uniform"], jobs=2, progress=False)
    assert one.frame["head"].tolist() == two.frame["head"].tolist()
    both = one.tried.merge(two.tried, on=["head", "method", "rank"])
    assert len(both) >= 6
    assert both["estimate_x"].tolist() == both["estimate_y"].tolist()


def test_several_jobs_find_the_same() -> None:
    same_from_several("threading")


@pytest.mark.slow
def test_several_processes_find_the_same() -> None:
    same_from_several("loky")


@pytest.mark.parametrize("rows", [None, 160])
def test_what_is_recommended_holds_on_fresh_rows(costs: Any, rows: int | None) -> None:
    costs(lambda method: 1.0 if method is None else 0.5 + getattr(method, "rank", 0) / 1000)
    heads = [*sa.make_heads("clustered", n=256, d=8, heads=2, rng=0), even(256)]
    tolerance = 0.3 if rows is None else 0.1
    found = sa.recommend(heads, tolerance, methods=["uniform", "dba", "vmean"], rows=rows)
    assert (found.frame["method"] != "exact").any()
    for problem, row in zip(heads, found.frame.to_dict("records"), strict=True):
        if row["method"] == "exact":
            continue
        output = called(found, problem, row["head"])
        fresh = sa.certify(problem, output, rows=128, confidence=1 - 1e-6, rng=2**40)
        assert fresh.low <= row["certified_high"] <= tolerance
        assert truth(problem, output) <= row["certified_high"] * (1 + 1e-9)


def test_a_method_that_fails_is_named_and_costs_nothing_else(costs: Any) -> None:
    costs()
    found = sa.recommend(gaussian(), 0.2, methods={"bad": Failing(), "good": Planted(0.1)})
    assert found.frame["method"].tolist() == ["good"]
    assert found.left_out == {"bad": "head 'head0': failed at LinAlgError: singular values"}


# --- samples of rows ----------------------------------------------------------------------------


def optimistic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Certify by the estimate of the search, from the rows that chose the setting."""

    def certificate(self: Any, output: Array, estimate: float) -> sa.ErrorCertificate:
        self.attempts += 1
        return sa.ErrorCertificate(estimate, 0.0, estimate, self.task.rows, 0.95, "planted")

    monkeypatch.setattr(cheapest._Search, "certificate", certificate)


def wrong(
    costs: Any, repeats: int, seed: int, *, kind: str = "finite-sample", share: float = 0.04
) -> tuple[int, int]:
    """Return how many of the repetitions recommend a setting above the tolerance, or any.

    Eight quick settings are slightly worse than the tolerance, with an error on few rows: some
    of them look good on some sample.  One that takes longer is good.
    """
    costs()
    tolerance = 0.1
    methods: dict[str, Any] = {
        f"bad{i}": Planted(1.1 * tolerance, share, cost=0.1 + i / 100, salt=i) for i in range(8)
    }
    methods["good"] = Planted(0.1 * tolerance, cost=0.6, salt=99)
    errors = kept = 0
    for repeat in range(repeats):
        problem = even(256, seed=1000 * seed + repeat)
        row = sa.recommend(
            problem, tolerance, methods=methods, rng=repeat, rows=160, kind=kind
        ).frame.iloc[0]
        kept += row["method"] != "exact"
        if row["method"] != "exact":
            assert row["certified_high"] <= tolerance
            assert row["kind"] != "exact"
            errors += row["method"] != "good"
    return errors, kept


def refuted(errors: int, repeats: int, probability: float = 0.05) -> bool:
    return errors > int(binom.isf(LEVEL, repeats, probability))


@pytest.mark.statistical
def test_recommendations_keep_their_confidence_level_1e_6(
    costs: Any, global_random_seed: int
) -> None:
    errors, kept = wrong(costs, 40, global_random_seed)
    assert not refuted(errors, 40)
    assert kept > 0


@pytest.mark.statistical
@pytest.mark.slow
@pytest.mark.parametrize("share", [0.004, 0.04, 1.0])
def test_recommendations_keep_their_confidence_over_200_level_1e_6(
    costs: Any, share: float, global_random_seed: int
) -> None:
    errors, kept = wrong(costs, 200, global_random_seed, share=share)
    assert not refuted(errors, 200)
    assert kept > 0


@pytest.mark.statistical
def test_the_rows_that_chose_a_setting_do_not_certify_it_level_1e_6(
    costs: Any, monkeypatch: pytest.MonkeyPatch, global_random_seed: int
) -> None:
    optimistic(monkeypatch)
    errors, kept = wrong(costs, 40, global_random_seed)
    assert refuted(errors, 40)


def test_few_wrong_rows_are_refused_by_a_sample(costs: Any) -> None:
    """One row of 256 has all of the error; samples that miss it show none."""
    costs()
    problem = even(256)
    missed = 0
    for seed in range(12):
        sneaky = Planted(0.12, 1e-9, salt=seed)
        found = sa.recommend(problem, 0.1, methods={"sneaky": sneaky}, rows=160)
        assert found.frame["method"].tolist() == ["exact"]
        missed += float(found.tried["estimate"].min()) < 0.01
        everything = sa.recommend(problem, 0.1, methods={"sneaky": sneaky})
        assert everything.frame["method"].tolist() == ["exact"]
    assert missed > 0


def test_certificates_are_of_fresh_rows(costs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    costs()
    drawn: list[Array] = []
    real = certify_known

    def certify(known: Any, solve: Any, rows: int, *rest: Any) -> Any:
        def spy(index: Array) -> Array:
            if isinstance(solve, RememberedRows):
                drawn.append(np.sort(index))
            result: Array = solve(index)
            return result

        return real(known, spy, rows, *rest)

    monkeypatch.setattr(cheapest, "certify_known", certify)
    chosen: list[Array] = []
    rows = RememberedRows.__call__

    def first(self: Any, index: Array) -> Array:
        chosen.append(np.sort(index))
        found: Array = rows(self, index)
        return found

    monkeypatch.setattr(RememberedRows, "__call__", first)
    methods = {f"bad{i}": Planted(0.105, 0.01, cost=0.1 + i / 100, salt=i) for i in range(30)}
    found = sa.recommend(even(256), 0.1, methods=methods, rows=160)
    attempts = int(found.frame["attempts"][0])
    assert len(drawn) == attempts > 1
    samples = [chosen[0], *drawn]
    assert all(len(x) == 160 for x in samples)
    for i, one in enumerate(samples):
        for other in samples[:i]:
            assert not np.array_equal(one, other)


def test_attempts_end(costs: Any) -> None:
    costs()
    methods = {f"bad{i}": Planted(0.108, 0.02, cost=0.1 + i / 100, salt=i) for i in range(30)}
    for seed in range(4):
        found = sa.recommend(even(256, seed), 0.1, methods=methods, rows=160)
        assert found.frame["attempts"][0] <= cheapest.ATTEMPTS
        assert found.frame["method"][0] == "exact"
        assert np.isnan(found.frame["certified_high"][0])


def test_the_certificate_is_at_its_share_of_the_confidence(costs: Any) -> None:
    costs()
    found = sa.recommend(even(256), 0.1, 0.9, methods={"good": Planted(0.01)}, rows=160)
    certificate = found.certificates["head0"]
    assert certificate is not None
    assert certificate.confidence == pytest.approx(1 - 0.1 / cheapest.ATTEMPTS)
    assert (certificate.rows, certificate.kind) == (160, "finite-sample")
    assert found.frame["certified_high"][0] == certificate.high
    assert certificate.estimate == pytest.approx(0.01, rel=0.2)


def test_too_few_rows_are_named_before_an_attempt(costs: Any) -> None:
    costs()
    found = sa.recommend(gaussian(256), 0.1, methods={"good": Planted(0.01)}, rows=32)
    row = found.frame.iloc[0]
    assert (row["method"], row["attempts"]) == ("exact", 0)
    assert re.match(
        r"from 32 rows not even an exact output has a certificate below [\d.]+; raise rows",
        row["reason"],
    )
    # What it says is so.
    least = sa.certify(gaussian(256), gaussian(256).output, rows=32, confidence=0.9875)
    assert least.high > 0.1


def test_rows_are_as_many_as_the_tolerance_needs(
    costs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs()
    monkeypatch.setattr(cheapest, "ALL_ENTRIES", 0)
    monkeypatch.setattr(cheapest, "COMPARED_ROWS", 64)
    good = {"good": Planted(0.01)}
    few = sa.recommend(even(512), 0.2, methods=good).frame.iloc[0]
    more = sa.recommend(even(512), 0.04, methods=good).frame.iloc[0]
    every = sa.recommend(even(512), 0.012, methods=good).frame.iloc[0]
    assert few["method"] == more["method"] == every["method"] == "good"
    assert 64 <= few["rows"] < more["rows"] < every["rows"] == 512
    assert every["kind"] == "exact"


def test_approximate_certificates(costs: Any) -> None:
    costs()
    found = sa.recommend(
        gaussian(256), 0.1, methods={"good": Planted(0.05)}, rows=64, kind="approximate"
    )
    row = found.frame.iloc[0]
    assert (row["method"], row["kind"]) == ("good", "approximate")
    assert "asymptotically" in str(found)


# --- refusals, text and the command line --------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"tolerance": 0}, ValueError, "tolerance must be between 0 and 1, both excluded, got 0;"),
        ({"tolerance": 1.5}, ValueError, "tolerance must be between 0 and 1"),
        ({"tolerance": math.nan}, ValueError, "tolerance must be between 0 and 1"),
        ({"tolerance": "0.1"}, TypeError, "tolerance must be a real number, got str"),
        ({"confidence": 1.0}, ValueError, "confidence must be between 0 and 1"),
        ({"kind": "exact"}, ValueError, "kind must be 'finite-sample' or 'approximate'"),
        ({"rows": 0}, ValueError, "rows must be at least 1"),
        ({"rng": -1}, ValueError, "rng must be at least 0"),
        ({"jobs": 0}, ValueError, "jobs must be at least 1"),
        ({"methods": []}, ValueError, "methods must hold at least one method"),
        ({"methods": ["unifrom"]}, ValueError, "method must be registered, got 'unifrom'"),
        ({"methods": ["exact"]}, ValueError, "methods must be cheaper than the exact matrix"),
        ({"methods": ["topk"]}, ValueError, "methods must be cheaper than the exact matrix"),
    ],
)
def test_bad_arguments_are_refused_in_a_line(
    arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(text)}") as raised:
        sa.recommend(gaussian(), **{"methods": ["uniform"]} | arguments)
    assert "\n" not in str(raised.value)


def test_a_named_method_that_honours_no_head_is_refused() -> None:
    with pytest.raises(ValueError, match="^methods must honour a head, got 'wildcat' with head"):
        sa.recommend(gaussian(causal=True), methods=["wildcat"])


def test_the_default_methods_of_a_causal_head(costs: Any) -> None:
    costs(lambda method: 1.0 if method is None else 2.0)
    found = sa.recommend(gaussian(causal=True), 0.5)
    tried = set(found.tried["method"])
    assert {"uniform", "combiner", "causal_tree", "vmean"} <= tried
    assert {"wildcat", "linformer"} <= set(found.left_out)
    assert not tried & set(found.left_out)
    plain = sa.recommend(gaussian(), 0.5)
    assert "it makes another method causal" in plain.left_out["causal_tree"]


def test_text_and_notebooks_name_heads_as_text(costs: Any) -> None:
    costs()
    q, k, v = gaussian()
    problem = sa.AttentionProblem(q, k, v, name="<script>alert(1)</script>")
    found = sa.recommend(problem, 0.2, methods={"<b>mine": Planted(0.1)})
    page = found._repr_html_()
    assert "<script>" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;alert(1)" in page
    text = str(found)
    assert "1 head: 1 cheaper than exact attention within 0.2" in text
    assert "sa.attention(q, k, v, method, rng=0)" in text
    assert "from all exact rows" in text
    assert repr(found) == "<Recommendation, 1 head: 1 cheaper than exact attention within 0.2>"
    assert not re.search(r"\d\.\d{6}", text)


MADE = "clustered:n=48,d=8,heads=2"


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recommend", MADE, "--tolerance", "0.3", "--methods", "uniform,vmean"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith("2 heads: ")
    assert "clustered/head1" in said.out
    assert "sa.attention(q, k, v" in said.out


def test_command_line_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recommend", MADE, "--methods", "uniform", "--seed", "4", "--json", "--rows", "16"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tolerance"] == 0.05
    assert found["promise"] == "each head"
    assert [x["head"] for x in found["heads"]] == ["clustered/head0", "clustered/head1"]
    assert set(found["heads"][0]) == set(COLUMNS)
    assert found["heads"][0]["method"] == "exact"


def test_command_line_refuses_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recommend", MADE, "--tolerance", "0"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("sketchattn: tolerance must be between 0 and 1")
    assert said.err.count("\n") == 1


def test_a_bar_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recommend", MADE, "--methods", "uniform,vmean", "--progress"]) == 0
    assert re.search(r"recommend: +100%.*4/4", capsys.readouterr().err)
