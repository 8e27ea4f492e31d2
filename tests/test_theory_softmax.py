"""Claims about softmax and norms: the record, broken softmaxes, counterexamples, odd problems."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from claim_cases import (
    check_not_reported,
    check_recorded,
    check_reported,
    claims_of,
    on_heads,
    recorded_pairs,
    refuted,
)
from numpy.typing import NDArray
from scipy.special import softmax as scipy_softmax

import sketchattn as sa
from sketchattn.theory.engine.checking import check
from sketchattn.theory.engine.instances import Instance, instances

Array = NDArray[Any]
Broken = Callable[..., Array]

CLAIMS = claims_of("softmax")
RECORDED = recorded_pairs(CLAIMS)
REFUTED = refuted(CLAIMS)


# --- the record -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "on"), RECORDED)
def test_recorded_verdicts(name: str, on: str, global_random_seed: int) -> None:
    # Every statement is deterministic: there is no level, any seed must give the record.
    check_recorded(CLAIMS, name, on, trials=60, rng=global_random_seed)


@pytest.mark.parametrize("name", on_heads(CLAIMS))
def test_recorded_verdicts_on_bundled_heads(name: str, global_random_seed: int) -> None:
    heads = sa.load_heads()
    for number in (global_random_seed % len(heads), (global_random_seed + 7) % len(heads)):
        verdict = check(name, heads[number], trials=20, rng=global_random_seed)
        assert verdict.status == CLAIMS[name].recorded["heads"], str(verdict)


# --- negative controls ----------------------------------------------------------------------------


def honest(kind: str, r: int, n: int, rng: np.random.Generator, *, logits: Array) -> Array:
    assert kind == "softmax"
    assert logits.shape == (r, n)
    weights: Array = scipy_softmax(logits, axis=1)
    return weights


def scaled(factor: float) -> Broken:
    """Give weights that sum to another number."""
    return lambda kind, r, n, rng, *, logits: factor * honest(kind, r, n, rng, logits=logits)


def heated(factor: float) -> Broken:
    """Use another scale of the logits."""
    return lambda kind, r, n, rng, *, logits: honest(kind, r, n, rng, logits=factor * logits)


def shifted(kind: str, r: int, n: int, rng: np.random.Generator, *, logits: Array) -> Array:
    """Add one to every denominator, which no shift of the logits leaves alone."""
    return np.asarray(np.exp(logits) / (1 + np.exp(logits).sum(axis=1, keepdims=True)))


CONTROLS: list[tuple[str, str, Broken]] = [
    ("stochastic", "reference", scaled(1.001)),
    ("stochastic", "reference", shifted),
    ("spectral_norm", "shared-key", scaled(1.1)),
    ("spectral_norm", "flat", scaled(0.9)),
    ("frobenius_norm", "shared-key", scaled(1.1)),
    ("frobenius_norm", "flat", scaled(0.9)),
    ("mean_identity", "reference", scaled(1.1)),
    ("mean_identity", "identity", scaled(1.001)),
    ("shift_invariance", "blocks", shifted),
    ("merge", "reference", heated(1.1)),
    ("merge", "clusters", shifted),
    ("hull", "shared-key", scaled(1.1)),
    ("truncation", "reference", scaled(1.1)),
    ("perturbation", "two-keys", heated(1.3)),
    ("output_perturbation", "two-keys", heated(1.1)),
    ("divergence", "two-keys", heated(1.1)),
    ("lipschitz", "two-keys", heated(1.1)),
    ("query_lipschitz", "two-queries", heated(2.2)),
    ("query_lipschitz_half", "two-queries", heated(1.1)),
]


@pytest.mark.parametrize(("name", "on", "broken"), CONTROLS)
def test_a_broken_softmax_is_reported(name: str, on: str, broken: Broken) -> None:
    check_reported(f"softmax.{name}", on, broken, trials=20)


@pytest.mark.parametrize(("name", "on", "broken"), CONTROLS)
def test_an_honest_softmax_is_not(name: str, on: str, broken: Broken) -> None:
    check_not_reported(f"softmax.{name}", on, honest, allowed=["holds"], trials=20)


def test_every_theorem_has_a_control() -> None:
    assert {f"softmax.{name}" for name, _, _ in CONTROLS} == set(CLAIMS) - REFUTED


@pytest.mark.parametrize(
    ("name", "on", "parameters"),
    [
        ("spectral_norm_one", "identity", {}),
        ("printed_normalizer", "two-queries", {}),
    ],
)
def test_refuted_statements_are_not_violated_by_everything(
    name: str, on: str, parameters: dict[str, Any]
) -> None:
    assert check(f"softmax.{name}", on, **parameters).status == "holds"


# --- values ---------------------------------------------------------------------------------------


def test_counterexamples_have_the_values_of_their_proofs() -> None:
    assert check("softmax.spectral_norm_one", "shared-key").observed == pytest.approx(12**0.5)
    assert check("softmax.printed_normalizer", "two-by-two").observed == pytest.approx(0.25)


def test_bounds_are_attained_where_the_statements_say_so() -> None:
    for name, on in (
        ("spectral_norm", "flat"),
        ("spectral_norm", "shared-key"),
        ("frobenius_norm", "flat"),
        ("frobenius_norm", "shared-key"),
    ):
        assert check(f"softmax.{name}", on).observed == pytest.approx(1.0, abs=1e-12), name
    # Rows of the bundled heads have sets of nearly any weight.
    assert check("softmax.perturbation", sa.load_heads()[0], trials=20).observed > 0.999
    # 2 tanh(x)/(2x) for small changes of (1/2, 1/2), x = .05 of both.
    exact = math.tanh(0.1) / 0.1
    assert check("softmax.lipschitz", "two-keys").observed == pytest.approx(exact, rel=1e-12)


def test_key_shifts_of_any_size_are_seen_through() -> None:
    for size in (1e-3, 1.0, 1e3):
        assert check("softmax.shift_invariance", "blocks", size=size, trials=20).status == "holds"


# --- assumptions ----------------------------------------------------------------------------------


def test_matrices_that_are_not_attention_are_told_why() -> None:
    for a, reason in (
        (np.array([[2.0, -1.0]]), "negative weights"),
        (np.array([[0.5, 0.6]]), "do not sum to one"),
    ):
        for name in ("mean_identity", "hull", "divergence"):
            verdict = check(f"softmax.{name}", (a, np.eye(2)))
            assert verdict.status == "not applicable"
            assert reason in verdict.notes
    pair = (np.eye(3), np.eye(3))
    assert "needs queries and keys" in check("softmax.shift_invariance", pair).notes
    q = np.ones((3, 2))
    causal = sa.AttentionProblem(q, q, q, causal=True)
    assert "causal" in check("softmax.query_lipschitz", causal).notes
    with pytest.raises(ValueError, match="^width must be in"):
        check("softmax.perturbation", width=0.0)


def test_theorems_hold_on_odd_problems() -> None:
    rng = np.random.default_rng(5)
    mask = np.arange(9) % 3 > 0

    def normal(n_q: int, n_k: int, **options: Any) -> sa.AttentionProblem:
        q, k, v = (rng.standard_normal((n, 4)) for n in (n_q, n_k, n_k))
        return sa.AttentionProblem(q, k, v, **options)

    problems = {
        "one key": sa.AttentionProblem(np.ones((3, 2)), np.ones((1, 2)), np.ones((1, 1))),
        "one query": normal(1, 9),
        "masked": normal(5, 9, key_mask=mask),
        "causal": normal(8, 8, causal=True),
        "identity": sa.AttentionProblem(300 * np.eye(12), np.eye(12), rng.standard_normal((12, 2))),
        "peaked": sa.AttentionProblem(
            90 * rng.standard_normal((8, 4)), 9 * rng.standard_normal((8, 4)), np.ones((8, 2))
        ),
        "zero values": sa.AttentionProblem(
            rng.standard_normal((8, 4)), rng.standard_normal((8, 4)), np.zeros((8, 2))
        ),
    }
    for label, problem in problems.items():
        made = Instance(label, problem)
        for name in set(CLAIMS) - REFUTED:
            verdict = check(name, made, trials=30)
            assert verdict.status in ("holds", "not applicable"), f"{label}: {verdict}"


def test_instances_are_what_their_notes_say() -> None:
    found = instances()
    assert np.allclose(found["two-keys"].a, 0.5)
    assert np.allclose(found["two-by-two"].a, [[0.5, 0.5], [0.25, 0.75]])
    assert np.allclose(found["flat"].a.sum(axis=1), 1)
    assert np.linalg.matrix_rank(found["shared-key"].a) == 1
