"""E and F of a whole model: a rank a layer, shared or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...base.arguments import check_integer, check_name, check_rank
from ...base.draws import Rng, as_generator
from ...sketches.base import make_sketch, sketches
from .initialisations import INITIALISATIONS, initialise
from .projections import MeanPool

Array = NDArray[Any]

SHARINGS = ("none", "headwise", "kv", "layerwise")


class Projections(NamedTuple):
    """Pair the E and the F of one head, float64 (r, n); the same object where they are shared."""

    E: Array
    F: Array


def rank_schedule(layers: int, rank: int, step: int) -> list[int]:
    """Return a rank a layer, ``max(1, rank - l step)`` for layer l = 0, 1, ...

    Notes
    -----
    The paper recommends smaller ranks in higher layers, without an experiment; this rule is the
    one of tatp22/linformer-pytorch.

    Examples
    --------
    >>> rank_schedule(4, 10, 4)
    [10, 6, 2, 1]
    """
    count = check_integer(layers, "layers", 1, "ask for one layer or more")
    first = check_integer(rank, "rank", 1, "ask for one row or more")
    fall = check_integer(step, "step", 0, "ranks do not grow")
    return [max(1, first - layer * fall) for layer in range(count)]


def linformer_projections(
    layers: int,
    heads: int,
    n: int,
    ranks: int | Sequence[int],
    sharing: str = "none",
    *,
    projection: str = "gaussian",
    init: str | None = None,
    rng: Rng = None,
    **options: Any,
) -> list[list[Projections]]:
    """Draw the E and F of every layer and head of a model.

    Parameters
    ----------
    layers, heads : int
    n : int
        Length: columns of E and F.
    ranks : int or sequence of int (layers,)
        A rank for all layers, or one a layer.
    sharing : {"none", "headwise", "kv", "layerwise"}
        "headwise": one E and one F a layer; "kv": one matrix a layer, E = F; "layerwise": one
        matrix for everything.  Of 12 layers of 12 heads these are 288, 24, 12 and 1 matrices.
    projection : str
        A kind of ``sketchattn.sketches.sketches()`` or "mean_pool".
    init : str, optional
        A key of ``INITIALISATIONS``, in place of ``projection``.
    rng : None, int or numpy.random.Generator
    **options
        Parameters of the sketch.

    Returns
    -------
    list of lists of Projections
        ``out[layer][head].E`` and ``.F``; shared ones are the same object.

    Raises
    ------
    TypeError, ValueError
        For unknown names, sizes out of range, or ranks that differ with "layerwise".

    Examples
    --------
    >>> stack = linformer_projections(2, 3, 16, [4, 2], "kv", rng=0)
    >>> stack[0][1].E is stack[0][2].F, stack[1][0].E.shape
    (True, (2, 16))
    """
    count = check_integer(layers, "layers", 1, "ask for one layer or more")
    width = check_integer(heads, "heads", 1, "ask for one head or more")
    length = check_integer(n, "n", 1, "project one key or more")
    given = list(ranks) if isinstance(ranks, Sequence | np.ndarray) else [ranks] * count
    if len(given) != count:
        raise ValueError(
            f"ranks must hold one rank for each of the {count} layers, got {len(given)}; "
            f"an integer is a rank for all"
        )
    every = [check_rank(r, length) for r in given]
    check_name(sharing, "sharing", SHARINGS)
    if sharing == "layerwise" and len(set(every)) > 1:
        raise ValueError(
            f"ranks must be equal with sharing='layerwise', got {every}; share within layers only"
        )
    check_name(projection, "projection", (*sketches(), "mean_pool"))
    if init is not None:
        check_name(init, "init", tuple(INITIALISATIONS))
    if options and (init is not None or projection == "mean_pool"):
        raise TypeError(
            f"options must be empty for this projection, got {sorted(options)}; drop them"
        )
    generator = as_generator(rng)

    def make(r: int) -> Array:
        if init is not None:
            return initialise(init, r, length, generator)
        if projection == "mean_pool":
            return MeanPool(length, r, None, True).to_dense(np.float64)
        return make_sketch(projection, r, length, generator, **options).to_dense()

    if sharing == "layerwise":
        one = make(every[0])
        return [[Projections(one, one)] * width for _ in range(count)]
    out: list[list[Projections]] = []
    for r in every:
        if sharing == "none":
            out.append([Projections(make(r), make(r)) for _ in range(width)])
            continue
        e = make(r)
        out.append([Projections(e, e if sharing == "kv" else make(r))] * width)
    return out
