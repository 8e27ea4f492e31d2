"""The published patterns as plans, and plans made of labels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.arguments import closest
from .plans import Plan
from .ragged import Ragged

Array = NDArray[Any]

# Patterns of positions; those of labels are made by `label_plan`.
PATTERNS = (
    "fixed",
    "logsparse",
    "axial_vertical",
    "axial_horizontal",
    "axial_rowmajor",
    "axial_joint",
)


def _plan(
    n: int,
    causal: bool,
    direct: tuple[Array, Array],
    keys: tuple[Array, Array],
    uses: tuple[Array, Array],
    n_q: int | None = None,
) -> Plan:
    """Return the plan of pairs (row, key), (region, key), (row, region) with any region numbers."""
    names, region = np.unique(keys[0], return_inverse=True)
    regions = Ragged.grouped(region.reshape(-1), keys[1], len(names))
    where = np.searchsorted(names, uses[1])
    known = where < len(names)
    known[known] = names[where[known]] == uses[1][known]
    rows = n if n_q is None else n_q
    row_regions = Ragged.grouped(uses[0][known], where[known], rows)
    plan = Plan(n, Ragged.grouped(*direct, rows), regions, row_regions, causal)
    return plan.used()[0]


# --- sizes --------------------------------------------------------------------------------------


def default_block(pattern: str, n: int) -> int:
    """Return the span length or the number of columns that a pattern takes when none is given.

    Notes
    -----
    ``sqrt(2 n)`` minimises ``s + 2 n / s``, the cost of spans whose summaries are refined once;
    ``sqrt(n)`` would minimise the slots, of which there are then 6 % fewer.

    Examples
    --------
    >>> default_block("fixed", 512), default_block("axial_vertical", 512)
    (32, 16)
    """
    if pattern == "logsparse":
        return 1
    size = n / 2 if pattern in ("axial_vertical", "axial_joint") else 2 * n
    return max(1, round(math.sqrt(size)))


def block_of_rank(pattern: str, n: int, rank: int) -> int:
    """Return the block of a pattern for a budget: regions of a row, or direct keys of a leaf.

    Examples
    --------
    >>> block_of_rank("fixed", 10, 6), block_of_rank("axial_vertical", 10, 6)
    (2, 6)
    >>> block_of_rank("logsparse", 10, 6)
    8
    """
    if pattern == "axial_vertical":
        return rank
    if pattern == "logsparse":
        return 1 << (rank - 1).bit_length()
    return -(-n // rank)


def check_block(pattern: str, block: object) -> int:
    """Return ``block`` as an integer that the pattern can use."""
    if isinstance(block, bool | np.bool_) or not isinstance(block, int | np.integer):
        raise TypeError(
            f"block must be an integer, got {type(block).__name__}; it is the length of a span or "
            f"the number of columns"
        )
    size = int(block)
    if size < 1:
        raise ValueError(f"block must be at least 1, got {size}; None is the default of the plan")
    if pattern == "logsparse" and size & (size - 1):
        raise ValueError(
            f"block must be a power of two for pattern 'logsparse', whose leaves are dyadic, got "
            f"{size}; use {1 << size.bit_length()}"
        )
    return size


# --- builders -----------------------------------------------------------------------------------


def make_plan(
    pattern: str,
    n: int,
    *,
    block: int | None = None,
    causal: bool = False,
    split: bool = False,
) -> Plan:
    """Return the plan of a pattern of positions, with explicit lists.

    Parameters
    ----------
    pattern : str
        "fixed": spans of ``block`` positions, the own span direct.  "logsparse": for each bit of
        the position the sibling block of that size; the own leaf of ``block`` keys direct.
        "axial_vertical", "axial_horizontal", "axial_rowmajor": positions in a grid of ``block``
        columns; own row and own column direct and columns, or rows, as regions; or the own
        row direct and rows as regions.  "axial_joint": vertical and split horizontal regions
        together, so that keys off the own row and column are covered twice (released code).
    n : int
        Number of positions, at least 1.
    block : int, optional
        At least 1; by default `default_block`.  A block of n or more is one span: all direct.
    causal : bool
    split : bool
        Whether what lies on the two sides of the own column (row) are two regions.

    Returns
    -------
    Plan

    Raises
    ------
    ValueError, TypeError

    Examples
    --------
    >>> plan = make_plan("logsparse", 9, causal=True)
    >>> [plan.direct[7].tolist(), *(plan.regions[t].tolist() for t in plan.row_regions[7])]
    [[6, 7], [4, 5], [0, 1, 2, 3]]
    """
    if pattern not in PATTERNS:
        raise ValueError(
            f"pattern must be a known plan, got {pattern!r}{closest(str(pattern), PATTERNS)}"
        )
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
        raise ValueError(f"n must be a positive integer, got {n!r}; a plan needs a position")
    n = int(n)
    size = default_block(pattern, n) if block is None else check_block(pattern, block)
    if split and not (
        pattern == "axial_horizontal" or (pattern == "axial_vertical" and not causal)
    ):
        raise ValueError(
            f"split must be False for pattern {pattern!r}{' (causal)' if causal else ''}, whose "
            f"regions have one side, got True; use axial_horizontal"
        )
    if pattern in ("fixed", "axial_rowmajor"):
        return _fixed(n, size, causal)
    if pattern == "logsparse":
        return _logsparse(n, size, causal)
    if pattern == "axial_vertical":
        return _vertical(n, size, causal, split)
    if pattern == "axial_horizontal":
        return _horizontal(n, size, causal, split)
    if not causal:
        raise ValueError(
            "causal must be True for pattern 'axial_joint', which is released for causal problems "
            "only, got False; use a mixture of 'axial_vertical' and 'axial_horizontal'"
        )
    return _union(_vertical(n, size, True, False), _horizontal(n, size, True, True))


def _fixed(n: int, s: int, causal: bool) -> Plan:
    i, spans = np.arange(n), -(-n // s)
    own = i // s
    direct = Ragged.ranges(own * s, i + 1 if causal else np.minimum(own * s + s, n))
    starts = np.arange(spans) * s
    regions = Ragged.ranges(starts, np.minimum(starts + s, n))
    t = np.arange(spans)
    seen = t < own[:, None] if causal else t != own[:, None]
    row, region = np.nonzero(seen)
    return Plan(n, direct, regions, Ragged.grouped(row, region, n), causal).used()[0]


def _logsparse(n: int, leaf: int, causal: bool) -> Plan:
    i, e0 = np.arange(n), leaf.bit_length() - 1
    first = (i >> e0) << e0
    own = Ragged.ranges(first, i + 1 if causal else np.minimum(first + leaf, n))
    d_rows, d_keys = [own.owner], [own.items]
    rows: list[Array] = [np.zeros(0, np.int64)]
    names: list[Array] = [np.zeros(0, np.int64)]
    r_keys: list[Array] = [np.zeros(0, np.int64)]
    r_names: list[Array] = [np.zeros(0, np.int64)]
    base = 0
    for e in range(e0, (n - 1).bit_length()):
        b = i >> e
        low = (b ^ 1) << e
        some = (b & 1 == 1) if causal else low < n
        high = np.minimum(low + (1 << e), n)
        single = some & (high - low == 1)
        d_rows.append(i[single])
        d_keys.append(low[single])
        far = some & (high - low > 1)
        rows.append(i[far])
        names.append(base + (b ^ 1)[far])
        blocks = np.unique((b ^ 1)[far])
        inside = Ragged.ranges(blocks << e, np.minimum((blocks + 1) << e, n))
        r_names.append(base + blocks[inside.owner])
        r_keys.append(inside.items)
        base += (n >> e) + 2
    join = np.concatenate
    return _plan(
        n,
        causal,
        (join(d_rows), join(d_keys)),
        (join(r_names), join(r_keys)),
        (join(rows), join(names)),
    )


def _cross(n: int, m: int, causal: bool) -> tuple[Array, Array]:
    """Return the pairs (row, key) of own row and own column in a grid of m columns."""
    i = np.arange(n)
    a, c = np.divmod(i, m)
    row = Ragged.ranges(a * m, i + 1 if causal else np.minimum(a * m + m, n))
    length = -(-(n - c) // m)  # rows that have column c
    column = Ragged.ranges(np.zeros(n, np.int64), a if causal else length)
    keys = column.items * m + c[column.owner]
    other = column.items != a[column.owner]
    return (
        np.concatenate([row.owner, column.owner[other]]),
        np.concatenate([row.items, keys[other]]),
    )


def _vertical(n: int, m: int, causal: bool, split: bool) -> Plan:
    i = np.arange(n)
    a, c = np.divmod(i, m)
    rows, width = -(-n // m), min(m, n)
    # Region (a, y, side): the keys of column y above row a, below it, or both.
    below = [] if causal else [1]
    x, y = np.divmod(i, m)
    parts = []
    for side in (0, *below):
        lows = x + 1 if side == 0 else np.zeros(n, np.int64)
        highs = np.full(n, rows) if side == 0 else x
        owners = Ragged.ranges(lows, highs)  # the rows a that key (x, y) is above, or below, of
        name = (owners.items * width + y[owners.owner]) * 2 + (side if split else 0)
        parts.append((name, owners.owner))
    keys = tuple(np.concatenate([p[z] for p in parts]) for z in (0, 1))
    row, column = np.nonzero(np.arange(width) != c[:, None])
    names = (a[row] * width + column) * 2
    uses = (np.concatenate([row, row]), np.concatenate([names, names + 1]))
    return _plan(n, causal, _cross(n, m, causal), (keys[0], keys[1]), uses)


def _horizontal(n: int, m: int, causal: bool, split: bool) -> Plan:
    i = np.arange(n)
    a, c = np.divmod(i, m)
    rows = -(-n // m)
    length = np.minimum(np.arange(rows) * m + m, n) - np.arange(rows) * m
    # Region (x, z, side): row x without column z, or its sides; z = length where there is none.
    x = np.repeat(np.arange(rows), length + 1)
    z = np.arange(len(x)) - np.repeat(np.cumsum(length + 1) - length - 1, length + 1)
    left = Ragged.ranges(x * m, x * m + z)
    right = Ragged.ranges(x * m + z + 1, x * m + length[x])
    name = (x * (m + 1) + z) * 2
    keys = (
        np.concatenate([name[left.owner], name[right.owner] + (1 if split else 0)]),
        np.concatenate([left.items, right.items]),
    )
    grid = np.arange(rows)
    row, other = np.nonzero(grid < a[:, None] if causal else grid != a[:, None])
    names = (other * (m + 1) + np.minimum(c[row], length[other])) * 2
    uses = (np.concatenate([row, row]), np.concatenate([names, names + 1]))
    return _plan(n, causal, _cross(n, m, causal), keys, uses)


def _union(first: Plan, second: Plan) -> Plan:
    """Return the plan with the direct keys of the first and the regions of both."""
    shift = len(first.regions)
    starts = first.regions.starts[-1] + second.regions.starts[1:]
    regions = Ragged(
        np.concatenate([first.regions.starts, starts]),
        np.concatenate([first.regions.items, second.regions.items]),
    )
    rows = Ragged.grouped(
        np.concatenate([first.row_regions.owner, second.row_regions.owner]),
        np.concatenate([first.row_regions.items, shift + second.row_regions.items]),
        first.n_q,
    )
    return Plan(first.n_k, first.direct, regions, rows, first.causal)


def label_plan(
    labels: Array,
    *,
    row_labels: Array | None = None,
    n_q: int | None = None,
    own: bool = True,
    causal: bool = False,
) -> Plan:
    """Return the plan whose regions are the keys of equal label.

    Parameters
    ----------
    labels : int array (n_k,)
        At least 0; labels that no key has are dropped.
    row_labels : int array (n_q,), optional
        The own label of each row; by default that of the key at its position.
    n_q : int, optional
        Number of rows, by default n_k.
    own : bool
        Whether keys of the own label are direct; otherwise they are a region like the others.
    causal : bool
        Row i then uses of every label the keys up to position i: prefixes of its list of keys,
        n_k distinct ones at most.

    Returns
    -------
    Plan

    Examples
    --------
    >>> plan = label_plan(np.array([0, 1, 0, 1]), causal=True)
    >>> plan.direct[3].tolist(), [plan.regions[t].tolist() for t in plan.row_regions[3]]
    ([1, 3], [[0, 2]])
    """
    labels = check_labels(labels, "labels")
    n_k = len(labels)
    rows = n_k if n_q is None else n_q
    mine = labels if row_labels is None else check_labels(row_labels, "row_labels")
    if own and len(mine) != rows:
        raise ValueError(
            f"row_labels must have shape (n_q,) = ({rows},), got {mine.shape}; label each row"
        )
    names, label = np.unique(labels, return_inverse=True)
    label = label.reshape(-1)
    order = np.argsort(label, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(label, minlength=len(names)))])
    if causal:
        # Prefix p ends with the p-th key of the list ordered by label, then position.
        rank_of = np.empty(n_k, np.int64)
        rank_of[order] = np.arange(n_k)
        prefix = Ragged.ranges(starts[label[order]], np.arange(1, n_k + 1))
        keys = (prefix.owner, order[prefix.items])
        seen = np.zeros((rows, len(names)), np.int64)
        seen[np.arange(n_k), label] = 1
        counts = np.cumsum(seen, axis=0)
        row, group = np.nonzero(counts)
        name = starts[group] + counts[row, group] - 1
    else:
        keys = (label, np.arange(n_k))
        row = np.repeat(np.arange(rows), len(names))
        group = name = np.tile(np.arange(len(names)), rows)
    is_own = np.zeros(len(row), bool)
    if own:
        is_own = names[group] == mine[row]
    whole = Ragged.grouped(keys[0], keys[1], n_k if causal else len(names))
    near = whole.take(name[is_own])
    direct = (np.repeat(row[is_own], near.sizes), near.items)
    return _plan(n_k, causal, direct, keys, (row[~is_own], name[~is_own]), rows)


def check_labels(labels: object, name: str) -> Array:
    """Return labels as int64 (n,), at least 0."""
    array = np.asarray(labels)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise TypeError(
            f"{name} must be a one-dimensional integer array, got {array.dtype} of shape "
            f"{array.shape}; give the region of each position"
        )
    if len(array) and array.min() < 0:
        raise ValueError(f"{name} must be at least 0, got {array.min()}; count from 0")
    return array.astype(np.int64)
