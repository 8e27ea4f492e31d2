"""Claims as curves over rank: which error measure a claim bounds, and of which method."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from ...kernels._threads import limit_threads
from ...problem import AttentionProblem
from .checking import bound
from .instances import as_instance
from .records import Claim, Curve, reduced, same
from .registry import claims


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
    _curve: Curve = dataclasses.field(repr=False, default=Curve(""))

    @classmethod
    def of(cls, claim: Claim, curve: Curve) -> ErrorBound:
        """Return the bound of a claim that can be drawn."""
        delta = claim.constants.get("delta")
        if delta is not None:
            what = f"{100 * (1 - delta):g} % of draws"
        else:
            what = "mean" if curve.convert is same else "root mean square"
        parameters = MappingProxyType(dict(curve.parameters or {}))
        return cls(claim.id, curve.field, what, curve.name, parameters, curve)

    def __reduce__(self) -> tuple[Any, ...]:
        return reduced(self)

    def __str__(self) -> str:
        return str(self._curve)

    def is_about(self, method: Any) -> bool:
        """Return whether the claim is about the approximations of a method, at any rank."""
        from ...zoo.base import methods

        wanted_cls = self._curve.method
        cls = methods()[wanted_cls] if isinstance(wanted_cls, str) else wanted_cls
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
            return self._curve.convert(value, instance) if value >= 0 else math.nan


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


def error_bounds() -> dict[str, ErrorBound]:
    """Return the claims that bound an error measure of a method at each rank, by id.

    Returns
    -------
    dict from str to ErrorBound
        Claims that have a ``curve``: their parameter ``rank`` is that of a method, and their
        observation a field of `ErrorReport` or the square of one.  It is what
        ``study(..., bounds=...)`` can draw over the measured curves.

    Examples
    --------
    >>> import sketchattn as sa
    >>> curve = sa.theory.error_bounds()["sketching.amm_jl_moment"]
    >>> curve.field, curve.what, str(curve)
    ('output_fro_amm', 'root mean square', "jl(sketch='gaussian')")
    >>> curve.at(sa.make_heads("gaussian", n=64, d=8, rng=0)[0], 32)
    0.25
    """
    known = claims().items()
    return {name: ErrorBound.of(x, x.curve) for name, x in known if x.curve is not None}
