"""What a study, a check or a table is asked to run on, as problems with names of their own."""

from __future__ import annotations

import os
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

from ..problem import AttentionProblem
from .container import Heads
from .files import BUNDLED, is_pattern, load_heads, read_heads
from .stored import MixedHeads, StoredProblem, joined


def as_heads(heads: Any, *, stored: bool = False) -> list[AttentionProblem]:
    """Return what ``heads`` stands for as problems with distinct names.

    Parameters
    ----------
    heads : Heads, AttentionProblem, sequence of AttentionProblem, path, name, or several of these
        A string is a file, a folder or a pattern of files as `read_heads` takes them, if there is
        one or if it ends in ``.safetensors`` or ``.npz``, otherwise the name of a bundled set.
    stored : bool, default False
        Leave heads that are in files there, as problems that read themselves when they are used.

    Raises
    ------
    TypeError, ValueError
        For anything else, an empty problem, a problem without values, or repeated names.
    """
    if isinstance(heads, str | PathLike):
        heads = _named(heads)
    elif isinstance(heads, list | tuple) and all(isinstance(x, str | PathLike) for x in heads):
        heads = joined([(str(x), _named(x)) for x in heads]) if heads else heads
    if isinstance(heads, AttentionProblem):
        heads = [heads]
    if not isinstance(heads, Iterable):
        raise TypeError(
            f"heads must be Heads, problems, a file or the name of a bundled set, got "
            f"{type(heads).__name__}; make problems with sketchattn.AttentionProblem(q, k, v)"
        )
    problems = list(heads.problems if stored and isinstance(heads, MixedHeads) else heads)
    if not problems:
        raise ValueError("heads must hold at least one problem, got 0; give some")
    seen: set[str] = set()
    named = []
    for i, problem in enumerate(problems):
        if not isinstance(problem, AttentionProblem):
            raise TypeError(
                f"heads must hold AttentionProblem objects, got {type(problem).__name__} at "
                f"position {i}; make it with sketchattn.AttentionProblem(q, k, v)"
            )
        name = f"head{i}" if problem.name is None else problem.name
        if name in seen:
            raise ValueError(
                f"heads must have distinct names, got {name!r} twice; "
                f"give each problem a name of its own"
            )
        seen.add(name)
        if problem.d_v is None:  # v of a stored head would be read
            raise ValueError(
                f"heads must have values for a study, got v=None in {name!r}; "
                f"make the problem with its values"
            )
        if problem.d_v == 0 or not problem.visible_counts().any():
            raise ValueError(
                f"heads must have a query that sees a key, and values of width 1 or more, got "
                f"n_q = {problem.n_q}, {len(problem.kept_keys)} visible keys and "
                f"d_v = {problem.d_v} in {name!r}; leave it out"
            )
        named.append(problem if problem.name is not None else renamed(problem, name))
    return named


def _named(text: str | PathLike[str]) -> Heads:
    """Return the heads of files, or the bundled ones of a name."""
    if isinstance(text, PathLike):
        return read_heads(text)
    return read_heads(text) if names_files(text) else load_heads(text)


def names_files(text: str) -> bool:
    """Say whether a text is a file, a folder or a pattern of files, not the name of a set."""
    path = Path(os.path.expanduser(text))
    if path.suffix in (".safetensors", ".npz") or path.is_file():
        return True
    return text not in BUNDLED and (path.is_dir() or is_pattern(path))


def renamed(problem: AttentionProblem, name: str) -> AttentionProblem:
    """Return a problem of the same arrays under a name; exact quantities are not taken along."""
    if isinstance(problem, StoredProblem):
        return problem.replaced(name=name).load()
    return AttentionProblem(
        *problem.arrays,
        scale=problem.scale,
        causal=problem.causal,
        key_mask=problem.key_mask,
        name=name,
    )
