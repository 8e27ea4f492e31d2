"""What can be chosen of Combiner: names, presets, and how they are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...base.arguments import as_array, check_finite
from ...partitions.patterns import PATTERNS as POSITIONAL
from ...partitions.plans import Plan

Array = NDArray[Any]

PATTERNS = (*POSITIONAL, "routing", "labels")
REFERENCES = ("zero", "region_mean", "global_mean", "region_max", "column", "mass_weighted")
KEYS = ("expected", "mean", "max")
BIASES = ("entropy", "log_count", "none")
SECOND_ORDER = ("none", "diag")
METRICS = ("key", "query")
# References whose rows depend on no later position in any causal plan.
SAFE_REFERENCES = ("zero", "region_mean", "region_max", "column")
# Regions whose reference is a mean over so few rows are better left at the global mean.
LEAST_PILOTS = 64


class Choices(NamedTuple):
    """Name the choices that make one estimator; defaults are those without training."""

    pattern: Any = "fixed"
    reference: Any = None
    key: str = "expected"
    bias: str = "entropy"
    direct: str = "own"
    second_order: str = "none"
    split: bool = False


_PUBLISHED: dict[str, Any] = {"reference": "region_max", "key": "max", "bias": "none"}

# What each preset changes.  "training_free" are the defaults; "default" is the choice of
# examples/combiner_default.py at equal slots, among those that causal problems may take too.
PRESETS: dict[str, dict[str, Any]] = {
    "training_free": {},
    "default": {"direct": "own+top_mass(4)"},
    "paper": {**_PUBLISHED},
    "split_horizontal": {**_PUBLISHED, "pattern": "axial_horizontal", "split": True},
    "joint_mixture": {**_PUBLISHED, "pattern": "axial_joint"},
    "rowmajor_wsum": {"pattern": "axial_rowmajor", "reference": "column", "bias": "none"},
}


# About any summary, and about those that are the variational bound of a region's mass.
CLAIMS = (
    "combiner.sandwich",
    "combiner.chain_rules",
    "combiner.tanh_bound",
    "combiner.mass_aware",
    "combiner.structural_floor",
)
VARIATIONAL_CLAIMS = (
    "combiner.gibbs_identity",
    "combiner.kl_row_bound",
    "combiner.direct_weights",
    "combiner.bilinear",
    "combiner.certificate_gap",
    "combiner.certificate_range",
)


class Flags(NamedTuple):
    """Say which guarantees the choices keep.

    Attributes
    ----------
    lower_bound : bool
        ``Zhat_i <= Z_i``, and ``KL(Ahat_i || A_i) = log Z_i - log Zhat_i``.
    bilinear : bool
        The log-ratio error on a region is ``scale (q_i - q0_t) . (kappa_t - k_j)``.
    causal_safe : bool
        No row of a causal problem depends on later positions.
    """

    lower_bound: bool
    bilinear: bool
    causal_safe: bool


class Direct(NamedTuple):
    """Hold what is direct: the own region, how many of the heaviest, a window of positions."""

    own: bool
    top_mass: int = 0
    window: int | None = None


class MassWeighted(NamedTuple):
    """Hold how references are weighted by attention: iterations, and pilot rows or all."""

    iterations: int = 1
    pilots: int | None = None


def named(pattern: object) -> bool:
    """Say whether a pattern is given by its name."""
    return isinstance(pattern, str)


def list_patterns(pattern: Any) -> list[Any]:
    """Return the patterns that are averaged, a single one too as a list."""
    if isinstance(pattern, str | Plan) or not isinstance(pattern, Sequence):
        return [pattern]
    return list(pattern)


def name_of(value: object) -> str:
    """Return what a message calls an argument that may be an array."""
    return repr(value) if isinstance(value, str) or value is None else "given as an array"


_CALL = re.compile(r"^\s*([a-z_]+)\s*(?:\(([^()]*)\))?\s*$")


def read_direct(direct: object, strict: bool = True) -> Direct:
    """Return what a description such as "own+top_mass(2)" says."""
    found: dict[str, int | None] = {}
    if isinstance(direct, str):
        for term in direct.split("+"):
            match = _CALL.match(term)
            name, argument = match.groups() if match else (term, None)
            size = int(argument) if argument is not None and argument.strip().isdigit() else None
            least = {"top_mass": 1, "window": 0}.get(name)
            fine = name in ("own", "none") and argument is None
            if least is not None:
                fine = size is not None and size >= least
            if not fine or name in found:
                found = {}
                break
            found[name] = size
    if not found or ("none" in found and len(found) > 1):
        if strict:
            raise ValueError(
                f"direct must be 'none', or 'own', 'top_mass(t)' and 'window(w)' joined by '+', "
                f"each once, got {direct!r}; use for instance 'own+top_mass(2)'"
            )
        return Direct(True)
    return Direct("own" in found, found.get("top_mass") or 0, found.get("window"))


def read_mass_weighted(reference: str) -> MassWeighted | None:
    """Return what "mass_weighted(n_iter, pilots)" says; None for other references."""
    match = _CALL.match(reference)
    if match is None or match.group(1) != "mass_weighted":
        return None
    numbers = [x.strip() for x in (match.group(2) or "1").split(",")]
    if not (1 <= len(numbers) <= 2 and all(x.isdigit() for x in numbers)):
        raise ValueError(
            f"reference must be 'mass_weighted', 'mass_weighted(n_iter)' or 'mass_weighted(n_iter, "
            f"pilots)', got {reference!r}; give whole numbers"
        )
    pilots = int(numbers[1]) if len(numbers) == 2 else None
    if pilots is not None and pilots < LEAST_PILOTS:
        raise ValueError(
            f"reference must have at least {LEAST_PILOTS} pilots, got {pilots}; with fewer it can "
            f"be worse than the global mean"
        )
    return MassWeighted(int(numbers[0]), pilots)


def pilots_asked(reference: Any) -> int | None:
    """Return how many pilot rows a reference asks for; None: it draws none."""
    if not isinstance(reference, str):
        return None
    try:
        made = read_mass_weighted(reference)
    except ValueError:
        return None
    return None if made is None else made.pilots


def is_named(reference: Any, name: str) -> bool:
    """Say whether a reference is the one with this name; it may be an array."""
    return isinstance(reference, str) and reference == name


def by_position(reference: Any) -> bool:
    """Say whether reference queries belong to positions, which needs n_q = n_k."""
    return isinstance(reference, str) and reference in ("region_mean", "region_max", "column")


def given_queries(reference: Any) -> Array | None:
    """Return reference queries that are given, float64 (r, d)."""
    if reference is None or isinstance(reference, str):
        return None
    array = np.asarray(as_array(reference, "reference"), np.float64)
    if array.ndim not in (1, 2) or array.shape[0] == 0:
        raise ValueError(
            f"reference must be one query (d,) or one for each region (r, d), got shape "
            f"{array.shape}; or a name such as 'region_mean'"
        )
    check_finite(array, "reference")
    return np.atleast_2d(array)
