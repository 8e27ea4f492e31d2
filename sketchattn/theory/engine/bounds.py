"""A claim of one's own in one call: a bound of an error of a method."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Any

from sklearn.base import clone

from ...base.arguments import check_count, check_name
from ...errors.reports import FIELDS, error_report
from ...problem import AttentionProblem
from ...zoo.base import Method, make_method, methods
from ...zoo.baselines import VMean, Zero
from .arguments import real
from .instances import Instance
from .observers import ROUNDING, default_rank, problem_of
from .records import Claim, Curve, Observations
from .registry import Assumption, Context, Entry, check_fields, enter, numeric

# What a bound can be of: errors, which are small where an approximation is good.
ERRORS = tuple(name for name in FIELDS if name != "skill")
# Steps of the pictures, as far as a head has so many keys.
LADDER = (8, 16, 32, 64, 128, 256)

Bound = Callable[..., float]


def _test_values(seen: Instance) -> str | None:
    if not seen.has_values:
        return "needs values V"
    if seen.problem is None and (seen.a <= 0).any():
        return "has weights that are not positive, and no queries and keys"
    if seen.problem is None and not seen.stochastic:
        return "has rows that do not sum to one, and no queries and keys"
    return None


ATTENTION = Assumption("the problem is attention with values V", _test_values)


def bound_claim(
    id: str,  # noqa: A002  (the name of the field)
    *,
    bound: Bound,
    error: str = "output_fro_amm",
    method: str | Method | type[Method],
    delta: float | None = None,
    title: str | None = None,
    statement: str | None = None,
    source: str = "own",
    assumptions: Sequence[Assumption] = (),
    recorded: Mapping[str, str] | None = None,
    ranks: Sequence[int] = LADDER,
    **constants: Any,
) -> Claim:
    """Register a bound of an error of a method as a claim of your own.

    ``P(error > bound(problem, r)) <= delta`` over the draws of the method at rank r; without delta
    ``E error <= bound(problem, r)``, and ``error <= bound(problem, r)`` where nothing is drawn.
    It can be used wherever an id can: `check`, `bound`, `validate`, ``study(bounds=...)``, and
    the verbs ``validate`` and ``study`` with ``--import FILE.py``.

    Parameters
    ----------
    id : str
        ``topic.name``.  One of your own that is registered again takes the place of the first.
    bound : callable
        ``bound(problem, r, **constants)`` with an `AttentionProblem` in float64 returns the bound
        of the error at rank r, one number of at least 0; NaN where it does not apply.  It is given
        ``delta`` too if it has a parameter of that name.  The rank is a parameter of the claim: by
        default a quarter of the keys, at most 256.
    error : str, default "output_fro_amm"
        A field of `ErrorReport` other than ``skill``.
    method : name, class, or object
        Whose draws are observed; of an object the rank is replaced.
    delta : float, optional
        The rate of failure that is allowed, in (0, 1).
    title, statement, source : str, optional
        What stands in tables and over pictures.
    assumptions : sequence of Assumption, optional
        Beside what the method asks for: where it refuses a problem, the claim is not applicable.
    recorded : mapping, optional
        Verdicts that you expect, by instance; see `Claim`.  Without it all instances and the
        bundled heads are run, and nothing differs from a record.
    ranks : sequence of int, default (8, 16, 32, 64, 128, 256)
        Steps of the picture; those above the number of keys of a problem are left out.
    **constants
        Those of the bound: parameters of the claim, which `check` and `validate` can change.

    Returns
    -------
    Claim
        With the status "own".

    Raises
    ------
    TypeError, ValueError
        For a bound that cannot be called so, an unknown field or method, a delta out of range, or
        an id of a built-in claim.

    Examples
    --------
    >>> import math, sketchattn as sa
    >>> claim = sa.theory.bound_claim(
    ...     "mine.amm", bound=lambda problem, r, c: c / math.sqrt(r), method=sa.JL, delta=0.1, c=2.0
    ... )
    >>> claim.status, dict(claim.constants)
    ('own', {'delta': 0.1, 'c': 2.0})
    >>> head = sa.make_heads("clustered", n=64, d=8, rng=0)[0]
    >>> sa.theory.check("mine.amm", head, trials=100, rank=32).failures
    0
    >>> sa.theory.error_bounds()["mine.amm"].at(head, 16)
    0.5
    """
    check_name(error, "error", ERRORS)
    level = None if delta is None else float(real(delta, "delta", 0.0, 1.0))
    given = {} if level is None else {"delta": level}
    taken = {"rank", "delta"} & set(constants)
    if taken:
        raise TypeError(f"constants must have other names, got {taken.pop()!r}; rename it")
    wants_delta = _check_bound(bound, constants, given)
    maker = _maker(method)
    sample = maker(1)
    traits, curve = sample.traits, _curve(sample, error)
    if not traits.matrix and not error.startswith("output_"):
        raise ValueError(
            f"error must be one of the output for a method without a matrix, got {error!r}; for "
            f"instance 'output_fro_rel'"
        )
    steps = tuple({"rank": check_count(r, "ranks", "give ranks of at least 1")} for r in ranks)
    kind = "tail" if given else "expectation" if traits.randomized else "inequality"
    check_fields(id, "own", kind, recorded or {})
    parameters = {"rank": None, **given, **constants}

    def observe(context: Context, *, rank: int | None = None, **chosen: Any) -> Observations:
        problem, n = problem_of(context.instance), context.instance.n
        r, share = default_rank(context, rank, most=256), chosen.pop("delta", None)
        if wants_delta:
            chosen["delta"] = share
        limit = _number(bound(problem, r, **chosen), id)
        context.require(not math.isnan(limit), f"the bound does not apply at rank {r}")
        context.below(r, n, limit, share)
        observed = maker(r)
        try:
            observed.check(problem)
        except (TypeError, ValueError) as refused:
            context.require(False, str(refused))
        rngs = context.generators() if traits.randomized else islice(context.generators(), 1)
        values = [_error(observed, problem, rng, error) for rng in rngs]
        trivial, predictor = context.instance.cached(
            ("trivial", error), lambda: min(_trivials(problem, error))
        )
        return Observations(
            values, limit, share, rank=r, trivial=trivial, predictor=predictor, rounding=ROUNDING
        )

    record = Claim(
        id,
        title or f"A bound of {error} of {curve}",
        statement or _statement(error, str(curve), kind),
        source,
        "own",
        kind,
        error,
        (ATTENTION.text, *(a.text for a in assumptions)),
        MappingProxyType(dict(recorded or {})),
        MappingProxyType(numeric(parameters)),
        curve,
    )
    enter(Entry(record, observe, (ATTENTION, *assumptions), parameters, steps, {}, own=True))
    return record


def _statement(error: str, whose: str, kind: str) -> str:
    limit = "bound(problem, r)"
    if kind == "tail":
        return f"P({error} of {whose} at rank r > {limit}) <= delta."
    return f"{'E ' if kind == 'expectation' else ''}{error} of {whose} at rank r <= {limit}."


def _check_bound(bound: Bound, constants: Mapping[str, Any], given: Mapping[str, float]) -> bool:
    """Refuse what cannot be called as a bound is; return whether it is given delta too."""
    if not callable(bound):
        raise TypeError(
            f"bound must be callable, got {type(bound).__name__}; pass a function of problem and r"
        )
    try:
        signature = inspect.signature(bound)
    except ValueError:  # of a function that is not written in Python
        return False
    wants_delta = bool(given) and "delta" in signature.parameters
    try:
        signature.bind(None, 1, **constants, **(given if wants_delta else {}))
    except TypeError as error:
        names = ", ".join(["problem", "r", *constants])
        raise TypeError(
            f"bound must be callable as bound({names}), got one that is not ({error}); give its "
            f"constants by name"
        ) from None
    return wants_delta


def _number(value: object, whose: str) -> float:
    """Return what the bound of a claim returned."""
    if getattr(value, "size", None) == 1 and hasattr(value, "item"):  # an array of one number
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        kind, shape = type(value).__name__, getattr(value, "shape", None)
        of = "" if shape is None else f" of shape {tuple(shape)}"
        raise TypeError(
            f"bound must return a number, got {kind}{of} from that of claim {whose!r}; return a "
            f"float"
        )
    if float(value) < 0:
        raise ValueError(
            f"bound must return at least 0, got {float(value):g} from that of claim {whose!r}; "
            f"NaN says it is none"
        )
    return float(value)


def _maker(method: object) -> Callable[[int], Method]:
    """Return what makes a method at a rank."""
    if isinstance(method, str):
        make_method(method, {"rank": 1})  # refuses what is not registered
        method = methods()[method]
    if isinstance(method, Method):
        ranked = "rank" in method.get_params(deep=False)
        return lambda r: clone(method).set_params(**({"rank": r} if ranked else {}))
    if isinstance(method, type) and issubclass(method, Method):
        made, ranked = method, "rank" in method._get_param_names()
        return lambda r: made(**({"rank": r} if ranked else {}))
    raise TypeError(
        f"method must be a name, a class or an object of a method, got {type(method).__name__}; "
        f"see sketchattn.methods()"
    )


def _curve(method: Method, error: str) -> Curve:
    """Return which measured curve is bounded: that of the method with the same parameters."""
    cls = type(method)
    defaults = {name: p.default for name, p in inspect.signature(cls).parameters.items()}
    given = method.get_params(deep=False).items()
    other = {name: x for name, x in given if name != "rank" and x is not defaults.get(name)}
    return Curve(cls, other or None, error)


def _error(method: Method, problem: AttentionProblem, rng: Any, error: str) -> float:
    """Return the error of one draw."""
    spectral = "_spec_" in error
    if error.startswith("output_"):
        output = method.attend(problem, rng)
        report = error_report(problem, output=output, spectral=spectral)
    else:
        report = error_report(problem, method.approximate(problem, rng), spectral=spectral)
    return float(getattr(report, error))


def _trivials(problem: AttentionProblem, error: str) -> list[tuple[float, str]]:
    """Return the errors of the trivial predictors, with their names.

    Of measures of rows, as distributions, zero is none.
    """
    names: dict[str, Method] = {} if error.startswith("row_") else {"zero": Zero()}
    names["the mean of V"] = VMean()
    return [(_error(method, problem, None, error), name) for name, method in names.items()]
