"""A plain function in the place of a method."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from ..base.draws import Draw
from ..problem import AttentionProblem
from .base import Method, Traits
from .base import register as register_class

Array = NDArray[Any]
F = TypeVar("F", bound=Callable[..., Any])

_ARRAYS = ("q", "k", "v")
# What a function is told where it has a parameter of this name.
_OPTIONS = ("rank", "rng", "scale", "causal", "key_mask")


class Function(Method):
    """Attend by a plain function of arrays, or of a problem.

    ``f(q, k, v)`` gets arrays (n_q, d), (n_k, d), (n_k, d_v) and returns ``Ohat`` (n_q, d_v);
    ``f(problem, rank, rng)`` gets an `AttentionProblem` and returns ``Ohat``, or ``Ahat`` as a
    ``LinearOperator`` (n_q, n_k).  Of ``rank``, ``rng`` (a `numpy.random.Generator`), ``scale``,
    ``causal`` and ``key_mask`` either is told those that it has a parameter for.  Arrays alone do
    not tell about masks: a function of them that has no parameter ``causal`` is refused causal
    problems, and one without ``key_mask`` masked ones.  Nothing is promised about the output, and
    errors of the matrix are unknown.

    Parameters
    ----------
    function : callable
    rank : int, optional
        In 1..n_k; needed if the function has a parameter of this name.

    Raises
    ------
    TypeError
        If the function needs another argument.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=16, d=4, rng=0)[0]
    >>> method = sa.Function(lambda q, k, v: np.repeat(v.mean(0)[None], len(q), axis=0))
    >>> abs(sa.error_report(problem, output=method.attend(problem)).skill) < 1e-6
    True
    """

    name = "function"

    def __init__(self, function: Callable[..., Any], rank: int | None = None) -> None:
        self.function = function
        self.rank = rank

    @property
    def draw_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """A seed where the function has a parameter ``rng``."""
        return ("seed",) if "rng" in self._asked() else ()

    @property
    def traits(self) -> Traits:
        """What the parameters of the function say; nothing is promised about its output."""
        asked = self._asked()
        whole = "problem" in asked
        return Traits(
            causal=whole or "causal" in asked,
            key_mask=whole or "key_mask" in asked,
            randomized="rng" in asked,
            uses_rank="rank" in asked,
            autoregressive=False,
            matrix=False,
        )

    def _asked(self) -> tuple[str, ...]:
        """Return the names of what the function is told."""
        if not callable(self.function):
            raise TypeError(
                f"function must be callable, got {type(self.function).__name__}; give f(q, k, v) "
                f"or f(problem, rank, rng)"
            )
        known = list(inspect.signature(self.function).parameters.values())
        kinds = {p.name: p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in known}
        names = [p.name for p in known if not kinds[p.name]]
        first = ("problem",) if names[:1] == ["problem"] else _ARRAYS
        asked = [x for x in names if x in (*first, *_OPTIONS)]
        foreign = [
            p.name
            for p in known
            if p.name not in asked and p.default is p.empty and not kinds[p.name]
        ]
        if foreign or not set(first) <= set(asked):
            raise TypeError(
                f"function must be f(q, k, v) or f(problem, rank, rng), with any of "
                f"{', '.join(_OPTIONS)}, got {self.title}({', '.join(names)}); give the others "
                f"a default"
            )
        return tuple(asked)

    @property
    def title(self) -> str:
        """The name of the function."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    def check(self, problem: AttentionProblem) -> None:
        """Refuse a problem with a mask that the function is not told, or a missing rank."""
        for name, off in (("causal", False), ("key_mask", None)):
            if getattr(problem, name) is not off and not getattr(self.traits, name):
                raise ValueError(
                    f"{name} must be {off} for the function {self.title!r}, which has no "
                    f"parameter {name}, got a problem with one; give it the parameter"
                )
        super().check(problem)

    def _check_parameters(self) -> None:
        if "rank" in self._asked() and self.rank is None:
            raise TypeError(f"rank must be given for {self.title}, got none; pass rank=")

    def _draw(self, problem: AttentionProblem, rng: np.random.Generator) -> Mapping[str, Array]:
        seed = rng.integers(0, 2**63, size=1)
        return Draw({"seed": seed}) if self.draw_names else Draw()

    def _attend(self, problem: AttentionProblem, draw: Draw) -> Array:
        told: dict[str, Any] = {
            "problem": problem,
            "q": problem.q,
            "k": problem.k,
            "v": problem.values,
            "rank": self.rank,
            "scale": problem.scale,
            "causal": problem.causal,
            "key_mask": problem.key_mask,
        }
        if "seed" in draw:
            told["rng"] = np.random.default_rng(int(draw["seed"][0]))
        found = self.function(**{name: told[name] for name in self._asked()})
        return found @ problem.values if isinstance(found, LinearOperator) else found


def register(name: str) -> Callable[[F], F]:
    """Register a method class, or a plain function, under a lower-case name.

    The name then stands for it wherever a method is asked for, on the command line too
    (``--import FILE.py``).  What is defined again, as in a notebook, takes the place of its
    earlier self.

    Parameters
    ----------
    name : str
        Of no other method.

    Returns
    -------
    callable
        A decorator that returns what it gets: a class derived from `Method`, or a function as
        `Function` takes it.

    Raises
    ------
    TypeError
        For anything else.
    ValueError
        If another method has the name.

    Examples
    --------
    >>> import sketchattn as sa
    >>> @sa.register("first_key")
    ... def first_key(q, k, v):
    ...     return np.repeat(v[:1], len(q), axis=0)
    >>> q, k, v = np.ones((3, 4, 2))
    >>> float(sa.attention(q, k, v, "first_key")[0, 0])
    1.0
    >>> sa.methods()["first_key"]().title
    'first_key'
    """

    def add(given: F) -> F:
        if isinstance(given, type) and issubclass(given, Method):
            register_class(name)(given)
        elif callable(given) and not isinstance(given, type | Method):
            register_class(name)(_class_of(given, name))
        else:
            kind = given.__name__ if isinstance(given, type) else type(given).__name__
            raise TypeError(
                f"a registered method must be a class derived from sketchattn.Method or a plain "
                f"function, got {kind}; derive it, or register its class"
            )
        return given

    return add


def _class_of(function: Callable[..., Any], label: str) -> type[Function]:
    """Return the class of methods that attend by a function, with a rank if it asks for one."""

    def ranked(self: Function, rank: int) -> None:
        Function.__init__(self, function, rank)

    def plain(self: Function) -> None:
        Function.__init__(self, function)

    return type(
        getattr(function, "__name__", label),
        (Function,),
        {
            "__init__": ranked if "rank" in Function(function)._asked() else plain,
            "__module__": getattr(function, "__module__", __name__),
            "__qualname__": getattr(function, "__qualname__", label),
            "__doc__": function.__doc__,
            "title": label,
        },
    )
