"""What is measured of one head, measured of many: a frame with a row a head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeGuard

from ..base.arguments import as_array
from ..heads.container import Heads
from ..heads.inputs import as_heads
from ..heads.stored import StoredProblem
from ..problem import AttentionProblem

if TYPE_CHECKING:
    import pandas as pd


def is_many(heads: object) -> TypeGuard[Heads]:
    """Say whether an argument stands for heads, not for one problem."""
    return isinstance(heads, Heads | list | tuple | str | PathLike)


def by_head(
    heads: Any, given: Any, name: str, measure: Callable[[AttentionProblem, Any], dict[str, Any]]
) -> pd.DataFrame:
    """Return a row for each head: its name, and what is measured of it and of its part.

    Parameters
    ----------
    heads : as `as_heads` takes them
    given : array (heads, n_q, d_v), or a sequence with one entry a head
    name : str
        What ``given`` is called.
    measure : callable
        From a problem and its part to the other columns.
    """
    import pandas as pd

    problems = as_heads(heads, stored=True)
    rows = []
    for problem, part in zip(problems, _parts(given, name, len(problems)), strict=True):
        head = problem.load() if isinstance(problem, StoredProblem) else problem
        try:
            rows.append({"head": problem.name} | measure(head, part))
        except (TypeError, ValueError) as error:
            raise type(error)(f"head {problem.name!r}: {error}") from error
    return pd.DataFrame(rows)


def _parts(given: Any, name: str, count: int) -> Iterator[Any]:
    """Yield what belongs to each head."""
    if not isinstance(given, list | tuple):
        given = as_array(given, name)
        if given.ndim != 3:
            raise ValueError(
                f"{name} must have shape (heads, n_q, d_v) for heads, got {given.shape}; pass one "
                f"array for each head"
            )
    if len(given) != count:
        raise ValueError(
            f"{name} must have one entry for each of the {count} heads, got {len(given)}; pass "
            f"those of all heads in their order"
        )
    yield from given
