"""Made heads: families with known structure, each from a seed."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable

import numpy as np
from numpy.typing import DTypeLike

from ..base.arguments import closest, numpy_name
from ..base.draws import Rng, as_generator
from ..base.floating import without_floating_errors
from .container import Heads, Triple

# name -> recipe(rng, heads, n, d, *, parameters) that returns q, k, v in float64
FAMILIES: dict[str, Callable[..., Triple]] = {}


def _family(recipe: Callable[..., Triple]) -> Callable[..., Triple]:
    """Register a recipe under its name; its keyword-only arguments are the parameters."""
    FAMILIES[recipe.__name__.removeprefix("_")] = recipe
    return recipe


@without_floating_errors
def make_heads(
    family: str,
    n: int,
    d: int = 64,
    *,
    heads: int = 1,
    rng: Rng = None,
    dtype: DTypeLike = np.float32,
    **parameters: float,
) -> Heads:
    """Make heads with known structure: the same numbers for the same ``rng``.

    ``N`` is a fresh array of independent standard normal numbers; logits are
    ``L = Q K^T / sqrt(d)``.

    Parameters
    ----------
    family : str
        - "gaussian": ``q = sqrt(logit_std) N``, ``k = sqrt(logit_std) N``, so that the logits
          have the standard deviation ``logit_std`` (1); a temperature T is ``logit_std = 1/T``.
        - "peaked": "gaussian" with ``logit_std`` 4, which doubles q and k.
        - "clustered": ``q = c[t] + noise N``, ``k = c[t] + noise N``, ``v = u[t] + value_noise N``
          with random topics t, ``clusters`` (16) centres ``c = spread N`` (1.6), ``u = N``;
          ``noise`` 0.4, ``value_noise`` 0.5.
        - "ar1": q, k and v are stationary sequences ``x_t = rho x_(t-1) + sqrt(1 - rho^2) N`` with
          ``rho`` (0.95), so neighbouring tokens are similar; q and k times ``sqrt(logit_std)``
          (1).
        - "near_permutation": ``L_ij = sharpness u_p(i).u_j`` with random unit vectors u and a
          random permutation p; ``sharpness`` (20).
        - "low_rank": "gaussian" logits of rank ``logit_rank`` (4) and standard deviation
          ``logit_std`` (1).
        - "duplicates": ``k = c[t]`` with ``distinct`` (16) keys c, each repeated equally often
          up to one, in random order; q and v are N.
        - "attention_sink": "gaussian", and the first ``sinks`` (4) keys receive about ``mass``
          (0.9) of each row.
    n : int
        Number of tokens, of queries and keys.
    d : int, default 64
        Width of queries, keys and values.
    heads : int, default 1
        Number of heads.
    rng : None, int or numpy.random.Generator
        Source of all numbers.
    dtype : float16, float32 (default) or float64
        Draws are float64 and rounded to this.
    **parameters
        Those of the family, named above with their defaults in brackets.

    Returns
    -------
    Heads
        Named "gaussian/head0", ..., with the parameters as metadata.

    Raises
    ------
    TypeError
        For a parameter that the family does not have, and wrong types.
    ValueError
        For an unknown family, sizes below 1, and parameters out of range.

    Notes
    -----
    The recipes themselves are in ``sketchattn.heads.families.FAMILIES``; their docstrings say in
    which order the numbers are drawn.

    Examples
    --------
    >>> import sketchattn as sa
    >>> heads = sa.make_heads("clustered", n=512, d=64, heads=2, rng=0)
    >>> heads.names, round(float(heads.q[0, 0, 0]), 8)
    (('clustered/head0', 'clustered/head1'), 0.26763278)
    """
    if not isinstance(family, str):
        raise TypeError(
            f"family must be a string, got {type(family).__name__}; choose one of "
            f"{', '.join(sorted(FAMILIES))}"
        )
    if family not in FAMILIES:
        raise ValueError(
            f"family must be the name of a recipe, got {family!r}{closest(family, FAMILIES)}"
        )
    recipe = FAMILIES[family]
    known = {
        name: p.default
        for name, p in inspect.signature(recipe).parameters.items()
        if p.kind is p.KEYWORD_ONLY
    }
    for name in parameters:
        if name not in known:
            raise TypeError(
                f"parameters of {family!r} must be among {', '.join(sorted(known))}, got {name!r}"
                f"{closest(name, known)}"
            )
    sizes = [_count("heads", heads), _count("n", n), _count("d", d)]
    try:
        kind = np.dtype(numpy_name(dtype))
    except TypeError:
        kind = np.dtype(object)
    if kind.name not in ("float16", "float32", "float64"):
        raise TypeError(
            f"dtype must be float16, float32 or float64, got {dtype!r}; "
            f"the values are rounded to it"
        )
    chosen = known | parameters
    q, k, v = recipe(as_generator(rng), *sizes, **chosen)
    listed = ", ".join(f"{name}={value}" for name, value in chosen.items())
    metadata = {"family": family} | {name: str(value) for name, value in chosen.items()}
    if isinstance(rng, numbers.Integral):
        metadata["rng"] = str(int(rng))
    with np.errstate(over="ignore"):  # infinities are refused with their place
        q, k, v = q.astype(kind), k.astype(kind), v.astype(kind)
    return Heads(
        q,
        k,
        v,
        names=[f"{family}/head{i}" for i in range(sizes[0])],
        description=f"made heads, {family}({listed})",
        metadata=metadata,
    )


def _count(name: str, value: object, most: int | None = None, bound: str = "") -> int:
    """Return ``value`` as an integer in ``1..most``."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}; use int(...)")
    if int(value) < 1 or (most is not None and int(value) > most):
        allowed = "at least 1" if most is None else f"between 1 and {bound} = {most}"
        verb = "raise" if int(value) < 1 else "lower"
        raise ValueError(f"{name} must be {allowed}, got {int(value)}; {verb} {name}")
    return int(value)


def _real(name: str, value: object, low: float, high: float, *, strict: bool = False) -> float:
    """Return ``value`` as a float in [low, high], or in (low, high) if ``strict``."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}; use float(...)")
    number = float(value)
    fits = low < number < high if strict else low <= number <= high
    if not fits or not math.isfinite(number):
        allowed = "finite and at least 0" if math.isinf(high) else f"above {low} and below {high}"
        verb = "raise" if number <= low else "lower"
        raise ValueError(f"{name} must be {allowed}, got {number}; {verb} {name}")
    return number


@_family
def _gaussian(
    rng: np.random.Generator, heads: int, n: int, d: int, *, logit_std: float = 1.0
) -> Triple:
    """Draw ``q, k, v = N, N, N`` in this order; q and k times ``sqrt(logit_std)``.

    A logit ``q.k / sqrt(d)`` of independent standard normal vectors has variance 1.
    """
    factor = math.sqrt(_real("logit_std", logit_std, 0, math.inf))
    q, k, v = (rng.standard_normal((heads, n, d)) for _ in range(3))
    return factor * q, factor * k, v


@_family
def _peaked(
    rng: np.random.Generator, heads: int, n: int, d: int, *, logit_std: float = 4.0
) -> Triple:
    """Draw as "gaussian", by default ``q = 2 N``, ``k = 2 N``, ``v = N``: few keys win a row."""
    return _gaussian(rng, heads, n, d, logit_std=logit_std)


@_family
def _clustered(
    rng: np.random.Generator,
    heads: int,
    n: int,
    d: int,
    *,
    clusters: int = 16,
    spread: float = 1.6,
    noise: float = 0.4,
    value_noise: float = 0.5,
) -> Triple:
    """Draw tokens of ``clusters`` topics t, whose queries and keys share a centre.

    ``c = spread N``, ``t``, ``q = c[t] + noise N``, ``k = c[t] + noise N``, ``u = N``,
    ``v = u[t] + value_noise N``, drawn in this order.
    """
    clusters = _count("clusters", clusters)
    spread = _real("spread", spread, 0, math.inf)
    noise = _real("noise", noise, 0, math.inf)
    value_noise = _real("value_noise", value_noise, 0, math.inf)
    centres = spread * rng.standard_normal((heads, clusters, d))
    topic = rng.integers(0, clusters, (heads, n))[:, :, None]
    q, k = (
        np.take_along_axis(centres, topic, 1) + noise * rng.standard_normal((heads, n, d))
        for _ in range(2)
    )
    values = rng.standard_normal((heads, clusters, d))
    v = np.take_along_axis(values, topic, 1) + value_noise * rng.standard_normal((heads, n, d))
    return q, k, v


@_family
def _ar1(
    rng: np.random.Generator,
    heads: int,
    n: int,
    d: int,
    *,
    rho: float = 0.95,
    logit_std: float = 1.0,
) -> Triple:
    """Draw q, k and v, in this order, as stationary autoregressive sequences of order 1.

    ``x_0 = N``, ``x_t = rho x_(t-1) + sqrt(1 - rho^2) N``: every ``x_t`` is standard normal and
    ``E x_s x_t = rho^|s-t|``.  q and k are multiplied by ``sqrt(logit_std)``.
    """
    rho = _real("rho", rho, -1, 1, strict=True)
    factor = math.sqrt(_real("logit_std", logit_std, 0, math.inf))
    triple = [rng.standard_normal((heads, n, d)) for _ in range(3)]
    for x in triple:
        x[:, 1:] *= math.sqrt(1 - rho * rho)
        for t in range(1, n):
            x[:, t] += rho * x[:, t - 1]
    return factor * triple[0], factor * triple[1], triple[2]


@_family
def _near_permutation(
    rng: np.random.Generator, heads: int, n: int, d: int, *, sharpness: float = 20.0
) -> Triple:
    """Draw keys of one length and point each query at its own key.

    ``u = N / |N|``, a permutation p of each head, ``v = N``, in this order;
    ``k_j = d^(1/4) u_j`` and ``q_i = sharpness d^(1/4) u_p(i)``, so ``L_ij = sharpness
    u_p(i).u_j``: sharpness at ``j = p(i)``, and about ``sharpness N / sqrt(d)`` elsewhere.  A tends
    to the permutation matrix as sharpness grows; small d needs a larger one.
    """
    sharpness = _real("sharpness", sharpness, 0, math.inf)
    unit = rng.standard_normal((heads, n, d))
    unit /= np.linalg.norm(unit, axis=2, keepdims=True)
    target = rng.permuted(np.tile(np.arange(n), (heads, 1)), axis=1)[:, :, None]
    k = d**0.25 * unit
    return sharpness * np.take_along_axis(k, target, 1), k, rng.standard_normal((heads, n, d))


@_family
def _low_rank(
    rng: np.random.Generator,
    heads: int,
    n: int,
    d: int,
    *,
    logit_rank: int = 4,
    logit_std: float = 1.0,
) -> Triple:
    """Draw q and k with ``logit_rank`` coordinates that are not zero, then ``v = N``.

    These are ``sqrt(logit_std) (d / logit_rank)^(1/4) N``, so that the logits have the standard
    deviation ``logit_std`` and, also after rounding, rank at most ``logit_rank``.
    """
    logit_rank = _count("logit_rank", logit_rank, d, "d")
    logit_std = _real("logit_std", logit_std, 0, math.inf)
    factor = math.sqrt(logit_std) * (d / logit_rank) ** 0.25
    q, k = np.zeros((2, heads, n, d))
    for x in (q, k):
        x[:, :, :logit_rank] = factor * rng.standard_normal((heads, n, logit_rank))
    return q, k, rng.standard_normal((heads, n, d))


@_family
def _duplicates(
    rng: np.random.Generator, heads: int, n: int, d: int, *, distinct: int = 16
) -> Triple:
    """Draw ``c = N`` (distinct, d), the key t of each token, ``q = N`` and ``v = N``; ``k = c[t]``.

    t is a random order of ``0, 1, ..., distinct - 1, 0, 1, ...``, so every key occurs.
    """
    distinct = _count("distinct", distinct, n, "n")
    keys = rng.standard_normal((heads, distinct, d))
    label = rng.permuted(np.tile(np.arange(n) % distinct, (heads, 1)), axis=1)[:, :, None]
    q = rng.standard_normal((heads, n, d))
    return q, np.take_along_axis(keys, label, 1), rng.standard_normal((heads, n, d))


@_family
def _attention_sink(
    rng: np.random.Generator, heads: int, n: int, d: int, *, sinks: int = 4, mass: float = 0.9
) -> Triple:
    """Draw as "gaussian", then raise the logits of the first ``sinks`` keys by one number.

    With ``b = log((n - sinks) mass / (sinks (1 - mass)))`` the first coordinate is
    ``d^(1/4) sqrt(|b|)`` in all queries, the same with the sign of b in the sinks, and 0 in the
    other keys: ``L_ij = b [j < sinks] + N sqrt(1 - 1/d)``.  The expected sums of ``exp(L)`` over
    sinks and others are then as ``mass`` to ``1 - mass``.
    """
    if n < 2:
        raise ValueError(f"n must be at least 2 for sinks and other keys, got {n}; raise n")
    sinks = _count("sinks", sinks, n - 1, "n - 1")
    mass = _real("mass", mass, 0, 1, strict=True)
    q, k, v = _gaussian(rng, heads, n, d)
    raised = math.log((n - sinks) * mass / (sinks * (1 - mass)))
    length = d**0.25 * math.sqrt(abs(raised))
    q[:, :, 0] = length
    k[:, :, 0] = 0.0
    k[:, :sinks, 0] = math.copysign(length, raised)
    return q, k, v
