"""The grid of a study: methods under labels, and the distinct computations behind its rows."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sklearn.base import clone

from ..base.content import UnreadableError, content, function_content, qualified_name
from ..problem import AttentionProblem
from ..zoo.base import Method, make_method, method_class, parse_method
from ..zoo.base import methods as registered
from ..zoo.function import Function
from .columns import Key

# Heads of this many queries or keys are measured on a sample of rows, and larger ranks than those
# below are as dear as exact attention.
LONG = 1 << 16
LONG_RANKS = (64, 128, 256, 512, 1024)
LONG_ROWS = 512


def default_ranks(n_k: int) -> list[int]:
    """Return the powers of two from 8 to ``n_k / 2``; ``[max(1, n_k // 2)]`` if there is none.

    From 64 to 1024 for long heads.

    Examples
    --------
    >>> default_ranks(100), default_ranks(10)
    ([8, 16, 32], [5])
    """
    if n_k >= LONG:
        return list(LONG_RANKS)
    powers = [2**i for i in range(3, max(n_k // 2, 1).bit_length())]
    return powers or [max(1, n_k // 2)]


_PROCESS = f"function.{uuid.uuid4().hex}"


@dataclass(frozen=True)
class Variant:
    """A method under the label that it has in the study.

    ``text`` is the method with its parameters, ``texts`` the same by rank: made once, so that the
    row of a cell is found again whatever a method does to its parameters.
    """

    label: str
    method: Method
    ranked: bool
    randomized: bool
    oracle: bool
    text: str
    texts: dict[int | None, str] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, label: str, method: Method) -> Variant:
        """Return a method with what its traits say."""
        traits = method.traits
        ranked = traits.uses_rank and "rank" in method.get_params(deep=False)
        text = describe_method(method)
        return cls(label, method, ranked, traits.randomized, traits.oracle, text)

    def at(self, rank: int) -> Method:
        """Return the method with this rank, if it has one."""
        chosen: Method = clone(self.method)
        if self.ranked:
            chosen.set_params(rank=rank)
        return chosen

    def text_at(self, rank: int) -> str:
        """Return the method with this rank as text."""
        own = rank if self.ranked else None
        if own not in self.texts:
            self.texts[own] = describe_method(self.at(rank))
        return self.texts[own]

    def check(self, problem: AttentionProblem, ranks: Sequence[int]) -> None:
        """Refuse a head that the method cannot honour at one of the ranks."""
        for rank in ranks if self.ranked else ranks[:1]:
            self.at(rank).check(problem)


def by_name(given: str | type[Method], rank: int) -> Method:
    """Return a method of a name, ``name(parameter=value)`` or class, at this rank if it has one."""
    name, parameters = parse_method(given) if isinstance(given, str) else (given, {})
    cls = method_class(name) if isinstance(name, str) else name
    if issubclass(cls, Method) and "rank" in cls._get_param_names():
        parameters = {"rank": rank} | parameters
    return make_method(name, parameters)


def as_method(given: object, rank: int) -> Method:
    """Return a method that is given as an object, by name or class, or as a plain function."""
    if isinstance(given, str | type):
        return by_name(given, rank)
    if callable(given) and not isinstance(given, Method):
        made = Function(given)
        return Function(given, rank) if made.traits.uses_rank else made
    return make_method(given, {})  # type: ignore[arg-type]  # which refuses what is no method


# Methods that a study leaves out by default, and why: on request they run like all others.
NOT_COMPARED = {
    "compressed": "it reads all keys, and from rank d on it is exact; name it to compare it",
}


def default_methods() -> list[str]:
    """Return the registered methods that a study compares: no oracle, no predictor, not exact."""
    chosen = []
    for name in registered():
        traits = by_name(name, 1).traits
        ranked = traits.uses_rank and not traits.oracle
        if name != "exact" and ranked and name not in NOT_COMPARED:
            chosen.append(name)
    return chosen


def label_of(given: object, method: Method) -> str:
    """Return the label of a method for which none is given."""
    if isinstance(given, str) and "(" in given:
        return given
    if isinstance(method, Function):
        return method.title
    return str(getattr(method, "name", type(method).__name__))


class Cell(NamedTuple):
    """Name one computation on one head, which may stand behind several rows."""

    key: Key
    label: str
    method: Method
    rank: int | None
    seed: int
    # The method at the rank that is run first, untimed.
    first: Method
    # Rows that errors are from, all for None, and whether spectral norms are among them.
    rows: int | None = None
    spectral: bool = True


def describe_method(method: Method) -> str:
    """Return a method with the content of all its parameters, the same text in every process.

    Raises
    ------
    TypeError
        For a parameter whose content cannot be read: two of them could not be told apart.

    Examples
    --------
    >>> import sketchattn as sa
    >>> describe_method(sa.TopK(rank=4))
    'sketchattn.zoo.baselines.TopK(rank=4, renormalize=True)'
    """
    cls = type(method)
    if isinstance(method, Function):
        try:
            return f"{function_content(method.function)}(rank={method.rank})"
        except UnreadableError:  # what it does is not known: its cells belong to this process
            return f"{_PROCESS}.{id(method.function)}.{method.title}(rank={method.rank})"
    pairs = sorted(method.get_params(deep=False).items())
    listed = ", ".join(f"{name}={_content_of(cls, name, value)}" for name, value in pairs)
    return f"{qualified_name(cls)}({listed})"


def _content_of(cls: type[Method], name: str, value: object) -> str:
    try:
        return content(value)
    except UnreadableError as error:
        raise TypeError(
            f"methods must have parameters that are told apart by their content, got "
            f"{error.what} as {name!r} of {cls.__name__}; {error.remedy}"
        ) from error


def how_measured(rows: int | None, spectral: bool) -> str:
    """Return what keys say of how cells are measured, nothing where all of it is."""
    if rows is not None:
        return f" on {rows} rows"
    return "" if spectral else " without spectral norms"


def make_cells(
    variants: Sequence[Variant],
    ranks: list[int],
    seeds: list[int],
    rows: int | None = None,
    spectral: bool = True,
) -> list[Cell]:
    """Return the distinct computations behind the rows of one head, and of its references."""
    cells: dict[Key, Cell] = {}
    for variant in variants:
        # A truncated decomposition is computed at the largest rank and cut for the others, so
        # that rows do not depend on which cells an interrupted study had finished.
        order = sorted(ranks, reverse=True) if variant.oracle else ranks
        first = variant.at(order[0])
        for rank in order if variant.ranked else order[:1]:
            method = variant.at(rank)
            text = variant.text_at(rank) + how_measured(rows, spectral)
            for seed in seeds if variant.randomized else seeds[:1]:
                key = (text, seed if variant.randomized else None)
                cell = Cell(
                    key,
                    variant.label,
                    method,
                    rank if variant.ranked else None,
                    seed,
                    first if variant.oracle else method,
                    rows,
                    spectral,
                )
                cells.setdefault(key, cell)
    return list(cells.values())
