"""Claims as curves over rank: which error measure a claim bounds, and of which method."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from ...kernels._threads import limit_threads
from ...problem import AttentionProblem
from .checking import bound
from .instances import Instance, as_instance
from .records import reduced
from .registry import get_record
from .topics import load

# From the units of a claim to those of a field of `ErrorReport`.
Convert = Callable[[float, Instance], float]


def same(value: float, instance: Instance) -> float:
    """Take a bound as it stands."""
    return value


def root(value: float, instance: Instance) -> float:
    """Turn a bound of a square into one of its root."""
    return math.sqrt(value)


def root_relative(value: float, instance: Instance) -> float:
    """Turn a bound of ``|Ahat V - A V|_F^2`` into one of its root relative to ``|A|_F |V|_F``."""
    return math.sqrt(value) / instance.fro


@dataclasses.dataclass(frozen=True)
class ErrorBound:
    """Say which measured curve a claim bounds.

    Attributes
    ----------
    claim : str
        Id of a claim whose parameter ``rank`` is that of the method.
    field : str
        The field of `ErrorReport` that it is about.
    what : str
        What lies below: "root mean square" or "mean" over draws, or the share of them.
    method : str
        Name of the method.
    parameters : mapping
        Those that the method must have; the others as by default.
    """

    claim: str
    field: str
    what: str
    method: str
    parameters: Mapping[str, Any]
    _convert: Convert = dataclasses.field(repr=False, default=same)

    def __reduce__(self) -> tuple[Any, ...]:
        return reduced(self)

    def __str__(self) -> str:
        listed = ", ".join(f"{name}={value!r}" for name, value in self.parameters.items())
        return f"{self.method}({listed})"

    def is_about(self, method: Any) -> bool:
        """Return whether the claim is about the approximations of a method, at any rank."""
        from ...zoo.base import methods

        cls = methods()[self.method]
        if type(method) is not cls:
            return False
        given = _resolved(method.get_params(deep=False))
        wanted = _resolved({**cls(rank=1).get_params(deep=False), **self.parameters})
        return _equal(
            {name: x for name, x in given.items() if name != "rank"},
            {name: x for name, x in wanted.items() if name != "rank"},
        )

    def at(self, problem: AttentionProblem, rank: int) -> float:
        """Return the bound of ``field`` on a problem at a rank.

        Parameters
        ----------
        problem : AttentionProblem
        rank : int

        Returns
        -------
        float
            NaN where the claim is not applicable, as for a rank above the number of keys that are
            not masked.
        """
        with limit_threads(1):
            instance = as_instance(problem)
            if rank > instance.n:
                return math.nan
            value = bound(self.claim, problem, rank=rank)
            return self._convert(value, instance) if value >= 0 else math.nan


def _resolved(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters of a method with the defaults of its sketch in place.

    ``s`` of block sketches is left out: the exact moment is the same for every s.
    """
    from ...sketches.base import sketches

    found = dict(parameters)
    kind = found.get("sketch")
    if isinstance(kind, str) and kind in sketches():
        options = {**sketches()[kind].parameter_defaults, **(found["sketch_options"] or {})}
        if kind in ("sjlt", "osnap"):
            options.pop("s", None)
        found["sketch_options"] = options
    return found


def _equal(given: Any, wanted: Any) -> bool:
    """Compare parameters: equal names and numbers, mappings by what they hold; no arrays."""
    if given is wanted:
        return True
    if isinstance(given, Mapping) and isinstance(wanted, Mapping):
        return set(given) == set(wanted) and all(_equal(x, wanted[n]) for n, x in given.items())
    if isinstance(given, str) or isinstance(wanted, str):
        return type(given) is type(wanted) and bool(given == wanted)
    plain = (bool, int, float, np.bool_, np.number)
    return isinstance(given, plain) and isinstance(wanted, plain) and bool(given == wanted)


_CURVES: dict[str, ErrorBound] = {}


def curve(
    name: str,
    method: str,
    parameters: Mapping[str, Any] | None = None,
    *,
    convert: Convert = same,
    field: str = "output_fro_amm",
) -> None:
    """Register that a claim bounds an error measure of a method at each rank.

    Parameters
    ----------
    name : str
        Id of a registered claim whose parameter ``rank`` is that of the method.
    method : str
        Registered name of the method.
    parameters : mapping, optional
        Those that the method must have; the others as by default.
    convert : callable, default `same`
        From the units of the claim to those of ``field``: `same`, `root` or `root_relative`.
    field : str, default "output_fro_amm"
        Field of `ErrorReport`.
    """
    delta = get_record(name).constants.get("delta")
    if delta is not None:
        what = f"{100 * (1 - delta):g} % of draws"
    else:
        what = "mean" if convert is same else "root mean square"
    _CURVES[name] = ErrorBound(
        name, field, what, method, MappingProxyType(dict(parameters or {})), convert
    )


def error_bounds() -> dict[str, ErrorBound]:
    """Return the claims that bound an error measure of a method at each rank, by id.

    Returns
    -------
    dict from str to ErrorBound
        Claims with the parameter ``rank`` whose observation is a field of `ErrorReport`, or the
        square of one: what ``study(..., bounds=...)`` can draw over the measured curves.

    Examples
    --------
    >>> import sketchattn as sa
    >>> curve = sa.theory.error_bounds()["sketching.amm_jl_moment"]
    >>> curve.field, curve.what, str(curve)
    ('output_fro_amm', 'root mean square', "jl(sketch='gaussian')")
    >>> curve.at(sa.make_heads("gaussian", n=64, d=8, rng=0)[0], 32)
    0.25
    """
    load()
    return dict(sorted(_CURVES.items()))
