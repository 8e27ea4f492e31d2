"""What every topic of the theory is tested for: recorded verdicts, controls and odd problems."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import sketchattn as sa
from sketchattn import theory
from sketchattn.theory import Claim, Verdict

# A stand-in for what a claim draws or computes; its arguments are those of the claim.
Factory = Callable[..., Any]
HONEST = ("holds", "vacuous")


def claims_of(topic: str) -> dict[str, Claim]:
    """Return the claims of a topic by their whole names."""
    return {name: c for name, c in theory.claims().items() if name.startswith(f"{topic}.")}


def recorded_pairs(claims: Mapping[str, Claim]) -> list[tuple[str, str]]:
    """Return every claim with each instance that its verdict is recorded on."""
    return [(name, on) for name, c in claims.items() for on in c.instances]


def refuted(claims: Mapping[str, Claim]) -> set[str]:
    return {name for name, c in claims.items() if c.status == "refuted"}


def on_heads(claims: Mapping[str, Claim]) -> list[str]:
    """Return the claims with a verdict recorded on the bundled heads."""
    return [name for name, c in claims.items() if "heads" in c.recorded]


def problem_on(name: str) -> sa.AttentionProblem:
    problem = theory.instances()[name].problem
    assert problem is not None
    return problem


def check_recorded(claims: Mapping[str, Claim], name: str, on: str, **options: Any) -> None:
    verdict = theory.check(name, on, **options)
    assert verdict.status == claims[name].recorded[on], str(verdict)
    written(verdict)


def check_statuses(claims: Mapping[str, Claim]) -> None:
    """A claim is refuted exactly where an instance is recorded that violates it."""
    for c in claims.values():
        assert (c.status == "refuted") == ("violated" in c.recorded.values())


def check_reported(name: str, on: str, broken: Factory, **options: Any) -> None:
    verdict = theory.check(name, on, sketch=broken, **options)
    assert verdict.status == "violated", str(verdict)


def check_not_reported(
    name: str, on: str, honest: Factory, allowed: Collection[str] = HONEST, **options: Any
) -> None:
    verdict = theory.check(name, on, sketch=honest, **options)
    assert verdict.status in allowed, str(verdict)


def check_repeats(claims: Mapping[str, Claim], name: str, **options: Any) -> None:
    """A seed gives one verdict, and a bound is a number without any draw."""
    on = claims[name].instances[0]
    first, again = (theory.check(name, on, rng=5, **options).as_dict() for _ in range(2))
    assert first == again
    assert isinstance(theory.bound(name, on), float)


def check_odd(claims: Mapping[str, Claim], problems: Iterable[Any], **options: Any) -> None:
    """Problems at the edge of a definition get a verdict, and no theorem fails on them."""
    for problem in problems:
        for name, c in claims.items():
            verdict = theory.check(name, problem, **options)
            written(verdict)
            if c.status != "refuted":
                assert verdict.status != "violated", f"{name} on {problem.name}: {verdict}"


def written(verdict: Verdict) -> str:
    """Return a verdict as JSON, which has no NaN and no infinity."""
    return json.dumps(verdict.as_dict(), allow_nan=False)
