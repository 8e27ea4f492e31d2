"""What claims are checked on: heads, named instances, and pairs of matrices."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...heads.files import BUNDLED
from ...heads.inputs import as_heads
from ...problem import AttentionProblem
from .instances import Instance, instance_names, is_pair

Problem = AttentionProblem | Instance | str


def as_problems(heads: Any) -> dict[str, Problem]:
    """Return what is to be checked beside the built-in instances, by name.

    Parameters
    ----------
    heads : Heads, AttentionProblem, Instance, pair (A, V), path, name, or sequence of these
        The name of a built-in instance stands for itself.

    Raises
    ------
    TypeError, ValueError
        For anything else, and for repeated names.
    """
    if _is_matrix(heads):
        heads = [heads]
    mixed = isinstance(heads, Sequence) and not isinstance(heads, str)
    if not mixed or not any(map(_is_matrix, heads)):
        return {str(p.name): p for p in as_heads(heads)}
    pairs = sum(map(is_pair, heads))
    found: dict[str, Problem] = {}
    for i, given in enumerate(heads):
        made: Sequence[Problem] = [given]
        if is_pair(given):
            made = [Instance("pair" if pairs == 1 else f"pair{i}", given)]
        elif not _is_matrix(given):
            made = as_heads(given)
        for problem in made:
            name = problem if isinstance(problem, str) else str(problem.name)
            if name in found:
                raise ValueError(
                    f"heads must have distinct names, got {name!r} twice; give each problem a "
                    f"name of its own"
                )
            found[name] = problem
    return found


def _is_matrix(given: object) -> bool:
    """Return whether something is an instance, the name of one, or a pair of matrices."""
    if isinstance(given, str):
        file = given in BUNDLED or Path(os.path.expanduser(given)).is_file()
        return given in instance_names() and not file
    return isinstance(given, Instance) or is_pair(given)
