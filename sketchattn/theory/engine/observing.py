"""What an observer returned: refused in one line, by the name of its claim, where it is none."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

from .records import Claim, Observations
from .registry import Context, Entry

RETURNS = "sketchattn.theory.Observations(values, bound), a number a trial and what it must obey"


def observe(entry: Entry, context: Context, parameters: Mapping[str, Any]) -> Observations:
    """Let a claim observe, and refuse what are no observations.

    Raises
    ------
    TypeError, ValueError
        For no `Observations`, values that are no sequence of numbers, a tail without delta, and,
        of a claim of the user, NaN: a failure of the observer is no failure of the claim.
    """
    seen = entry.observe(context, **parameters)
    if not isinstance(seen, Observations):
        raise TypeError(
            f"the observer of claim {entry.claim.id!r} must return {RETURNS}, got "
            f"{type(seen).__name__}; return sketchattn.theory.Observations"
        )
    if entry.own:
        _check(entry.claim, seen, context.trials)
    return seen


def _check(claim: Claim, seen: Observations, trials: int) -> None:
    whose = f"the observer of claim {claim.id!r} must return"
    values = _numbers(seen.values, f"{whose} values that are numbers", "one number a trial")
    if values.ndim != 1:
        said = f"{values.item():g}" if values.ndim == 0 else f"an array of shape {values.shape}"
        raise TypeError(
            f"{whose} values of one axis, a number a trial, got {said}; put them into a list"
        )
    if trials and not len(values):
        raise ValueError(f"{whose} a value a trial, got none in {trials}; see context.generators()")
    what = "a bound that is a number, or one a trial"
    bounds = _numbers(seen.bound, f"{whose} {what}", "a float")
    if bounds.ndim and bounds.shape != values.shape:
        raise ValueError(
            f"{whose} {what}, got shape {bounds.shape} for {len(values)} values; return a float"
        )
    for name, x in (("values", values), ("a bound", bounds)):
        if np.isnan(x).any():
            raise ValueError(
                f"{whose} {name} without NaN, got NaN; where the claim does not apply call "
                f"context.require(False, reason)"
            )
    if claim.kind == "tail":
        delta = seen.delta
        if delta is None or isinstance(delta, bool) or not isinstance(delta, numbers.Real):
            raise TypeError(
                f"{whose} the rate of failure of its tail, got delta = {delta!r}; return "
                f"Observations(values, bound, delta=delta)"
            )
        if math.isnan(delta) or delta < 0:
            raise ValueError(
                f"{whose} a rate of failure of at least 0, got delta = {delta:g}; correct it"
            )


def _numbers(given: Any, must: str, remedy: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return real numbers as float64."""
    try:
        found = np.asarray(given)
    except ValueError:  # lists of several lengths
        found = np.array(None)
    if found.dtype.kind not in "biuf" and found.size:
        raise TypeError(f"{must}, got {_said(given)}; return {remedy}")
    return found.astype(np.float64)


def _said(given: object) -> str:
    text = repr(given)
    return text if len(text) <= 40 else f"{text[:37]}..."
