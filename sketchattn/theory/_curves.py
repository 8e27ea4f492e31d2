"""Claims as curves over rank: which error measure a claim bounds, and of which method."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from ..problem import AttentionProblem
from ._engine import bound, claims, one_thread
from ._instances import Instance, as_instance

# From the units of a claim to those of a field of `ErrorReport`.
Convert = Callable[[float, Instance], float]


def _same(value: float, instance: Instance) -> float:
    return value


def _root(value: float, instance: Instance) -> float:
    return math.sqrt(value)


def _root_relative(value: float, instance: Instance) -> float:
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
    _convert: Convert = dataclasses.field(repr=False, default=_same)

    def __str__(self) -> str:
        listed = ", ".join(f"{name}={value!r}" for name, value in self.parameters.items())
        return f"{self.method}({listed})"

    def is_about(self, method: Any) -> bool:
        """Return whether the claim is about the approximations of a method, at any rank."""
        from ..methods import methods

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
        with one_thread():
            instance = as_instance(problem)
            if rank > instance.n:
                return math.nan
            value = bound(self.claim, problem, rank=rank)
            return self._convert(value, instance) if value >= 0 else math.nan


def _resolved(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters of a method with the defaults of its sketch in place.

    ``s`` of block sketches is left out: the exact moment is the same for every s.
    """
    from ..sketches import sketches

    found = dict(parameters)
    kind = found.get("sketch")
    if isinstance(kind, str) and kind in sketches():
        options = {**sketches()[kind].parameter_defaults, **(found["sketch_options"] or {})}
        if kind in ("sjlt", "osnap"):
            options.pop("s", None)
        found["sketch_options"] = options
    return found


def _equal(given: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Compare parameters, of which some may be arrays."""
    return set(given) == set(wanted) and all(
        type(x) is type(wanted[name]) and x == wanted[name]
        if isinstance(x, str | dict)
        else _plain_equal(x, wanted[name])
        for name, x in given.items()
    )


def _plain_equal(given: Any, wanted: Any) -> bool:
    if given is wanted:
        return True
    if not isinstance(given, bool | int | float) or not isinstance(wanted, bool | int | float):
        return False
    return given == wanted


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
    from ._moment_claims import MOMENT_FORMULAS, MOMENT_PARAMETERS

    def jl(kind: str) -> dict[str, Any]:
        options = {k: x for k, x in MOMENT_PARAMETERS.get(kind, {}).items() if k != "s"}
        return {"sketch": kind, **({"sketch_options": options} if options else {})}

    laws = {name: {"law": name} for name in ("uniform", "value_norm2", "optimal", "leverage")}
    draws: dict[str, dict[str, Any]] = {
        **laws,
        "without": {"law": "uniform", "replace": False},
        "gumbel": {"law": "optimal", "replace": False},
    }
    columns, optimal = "column_sampling", laws["optimal"]
    rows: list[tuple[str, str, dict[str, Any], Convert]] = [
        *((f"moment_{kind}", "jl", jl(kind), _root_relative) for kind in MOMENT_FORMULAS),
        *((f"moment_sample_{x}", columns, given, _root_relative) for x, given in draws.items()),
        ("amm_jl_moment", "jl", jl("gaussian"), _root),
        ("amm_markov", "jl", jl("countsketch"), _same),
        ("amm_sampling_tail", columns, optimal, _same),
        ("amm_sampling_tail_sharp", columns, optimal, _same),
        ("amm_bernstein_mean", columns, {"law": "spectral"}, _same),
        ("leverage_sampling", columns, laws["leverage"], _root),
        ("linformer.mean_square", "jl", jl("gaussian"), _root),
    ]
    known, found = claims(), {}
    for short, method, given, convert in rows:
        name = short if "." in short else f"sketching.{short}"
        delta = known[name].constants.get("delta")
        if delta is not None:
            what = f"{100 * (1 - delta):g} % of draws"
        else:
            what = "mean" if convert is _same else "root mean square"
        field = "output_spec_amm" if short == "amm_bernstein_mean" else "output_fro_amm"
        found[name] = ErrorBound(name, field, what, method, MappingProxyType(given), convert)
    # Certificates of rows, which are computed from the matrix of the method itself.
    name = "combiner.certificate"
    found[name] = ErrorBound(name, "row_tv_mean", "mean", "combiner", MappingProxyType({}))
    return dict(sorted(found.items()))
