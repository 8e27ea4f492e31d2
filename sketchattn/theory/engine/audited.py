"""Random operators, audited as they are drawn, and the errors of the products made with them.

A claim about draws of the wrong law is no claim: every draw says beside its image what the mean
over draws must be, and a number that two independent draws do not share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .arguments import Array
from .instances import Instance
from .observers import square
from .registry import Context

Parameters = Mapping[str, Any]

# Probes of every operator: the vector of ones, which sees missing signs, and Gaussian ones.
PROBES = 4


def _probes(n: int) -> Array:
    """Return the vector of ones and fixed Gaussian vectors, each of norm one, (n, 1 + PROBES)."""
    rng = np.random.default_rng(n)
    columns = np.concatenate([np.ones((n, 1)), rng.standard_normal((n, PROBES))], axis=1)
    out: Array = columns / np.linalg.norm(columns, axis=0)
    return out


def applied(operator: Any, x: Array) -> Array:
    """Return S X of an operator, a sketch or an array, as float64."""
    return np.asarray(operator.apply(x) if hasattr(operator, "apply") else operator @ x, np.float64)


def _likeliest(kind: str, r: int, n: int, parameters: Parameters) -> float:
    """Return an upper bound of the probability of the likeliest outcome of a draw."""
    if kind == "sample_poisson":
        from ...sampling.draws import inclusion_probabilities

        keep = inclusion_probabilities(parameters["p"], r)
        return float(np.prod(np.maximum(keep, 1 - keep)))
    if kind.startswith("sample_"):  # without replacement the order is random
        top = float(np.max(parameters["p"]))
        return top ** (r if kind == "sample_wr" else 1)
    if kind == "sparse":
        return float(max(0.5, 1 - 1 / parameters["s"]) ** (r * n))
    return 0.5**n  # all others have a sign for each column at least


def _differ(context: Context, likeliest: float) -> bool:
    """Return whether independent trials of a draw are not all equal, but with chance 1e-9."""
    return bool(likeliest ** max(context.trials - 1, 0) < 1e-9)


def sketched(
    context: Context, kind: str, r: int, x: Array, key: object, **parameters: Any
) -> Iterator[Array]:
    """Yield S X for one random S a trial, and audit ``E |S w|^2 = |w|^2`` on the way.

    X (n, c) is cached with the probes beside it under ``key``.
    """
    n, c = x.shape
    wide = context.instance.cached(
        ("wide", key), lambda: np.ascontiguousarray(np.concatenate([x, _probes(n)], axis=1))
    )
    told_apart = _differ(context, _likeliest(kind, r, n, parameters))
    for rng in context.generators():
        image = applied(context.operator(kind, r, n, rng, **parameters), wide)
        ones, others = image[:, c], image[:, c + 1 :]
        context.audit("|S 1|^2/n", float(ones @ ones), 1.0)
        context.audit("|S w|^2/|w|^2", float(np.sum(others * others)) / PROBES, 1.0)
        if told_apart:
            context.fingerprint(float(np.sin(np.arange(1.0, len(image) + 1)) @ image[:, -1]))
        yield image[:, :c]


def sampled(context: Context, kind: str, r: int, x: Array, law: Array) -> Iterator[Array]:
    """Yield S X for one draw of columns a trial, and audit ``E |S w|^2 = 1`` for ``w^2 = p``.

    With replacement ``|S w|^2`` is exactly one; for other probes its law could be too heavy.
    """
    n, c = x.shape
    parameters = {} if kind == "sample_wor" else {"p": law}
    # The index beside the root of p tells draws of equal weight from each other.
    mark = np.sqrt(law) * np.cos(np.arange(n))
    wide = np.concatenate([x, np.sqrt(law)[:, None], mark[:, None]], axis=1)
    told_apart = _differ(context, _likeliest(kind, r, n, {"p": law}))
    for rng in context.generators():
        image = applied(context.operator(kind, r, n, rng, **parameters), wide)
        context.audit("sum_j w_j p_j", float(image[:, c] @ image[:, c]), 1.0)
        if told_apart:
            context.fingerprint(float(np.sin(np.arange(1.0, len(image) + 1)) @ image[:, c + 1]))
        yield image[:, :c]


# --- products, vectors and subspaces -------------------------------------------------------------


def law_of(instance: Instance, name: str) -> Array:
    """Return the probabilities of a law of ``sketchattn.sampling`` (n,)."""
    from ...sampling.laws import probabilities

    return instance.cached(("law", name), lambda: probabilities(name, (instance.a, instance.v)))


def factors(instance: Instance) -> Array:
    """Return ``[A^T | V]`` (n, m + d_v)."""
    return instance.cached("factors", lambda: np.concatenate([instance.a.T, instance.v], axis=1))


def errors(
    context: Context, kind: str, r: int, law: str | None = None, **parameters: Any
) -> Iterator[Array]:
    """Yield ``A S^T S V - A V`` for one random S a trial."""
    instance = context.instance
    x, m = factors(instance), instance.m
    if kind.startswith("sample_"):
        images = sampled(context, kind, r, x, law_of(instance, law or "uniform"))
    else:
        images = sketched(context, kind, r, x, "factors", **parameters)
    for image in images:
        yield image[:, :m].T @ image[:, m:] - instance.product


def relative_trivial(instance: Instance) -> float:
    """Return the error of the better trivial predictor over ``|A|_F |V|_F``."""
    return instance.trivial / instance.fro


def distortion(image: Array) -> float:
    """Return ``|U^T S^T S U - I|_2`` from S U, exactly, by eigenvalues."""
    values = np.linalg.eigvalsh(image.T @ image - np.eye(image.shape[1]))
    return float(max(-values[0], values[-1], 0.0))


def listed(parameters: Parameters) -> str:
    """Return parameters of an operator as a part of a sentence."""
    return "".join(f", {name} = {value:g}" for name, value in parameters.items())


def fro_errors(context: Context, kind: str, r: int, **parameters: Any) -> list[float]:
    """Return ``|A S^T S V - A V|_F / (|A|_F |V|_F)`` for one random S a trial."""
    fro = context.instance.fro
    return [math.sqrt(square(err)) / fro for err in errors(context, kind, r, **parameters)]


def subspace_dimension(instance: Instance) -> int:
    """Return the numerical rank q of V."""
    return int(instance.value_basis.shape[1])
