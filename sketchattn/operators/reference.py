"""Exact attention in double precision, written to be read: the yardstick of every other path.

One row of one head, with position ``p_i = first_h + i`` and the kv head of its group::

    L_ij = scale q_i . k_j                          1. scaled logits
    L_ij = softcap tanh(L_ij / softcap)             2. softcap, if it is not zero
    L_ij = L_ij + b_ij                              3. additive mask
    L_ij = -inf where j is not visible              4. mask
    m_i  = max_j L_ij, and the sink                 5. 0 in an empty row
    e_ij = exp(L_ij - m_i),  den_i = sum_j e_ij     6. + exp(sink_h - m_i)
    A_ij = e_ij / den_i                             7. 0 where den_i = 0
    O_i  = sum_j A_ij v_j                           8.
    lse_i = m_i + log(den_i)                        9. -inf where den_i = 0

Everything is float64 and nothing is reordered behind the formula: no compiled code, no fast
mathematics.  A block of query rows is computed by one thread from start to end, and the size of
a block depends on ``n_k`` alone, so the bits do not depend on the number of threads.

The functions take arguments that `sketchattn.attention` has validated; they check nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Mask = BoolArray | FloatArray
T = TypeVar("T")
Stage = Literal["scaled", "capped", "masked"]

# Bytes of logits a block of rows may hold: enough rows for BLAS to be fast, and enough blocks
# at n = 1024 for two threads.
_BLOCK_BYTES = 4 * 2**20
# Bytes of logits that all running blocks may hold together.
_TOTAL_BYTES = 128 * 2**20


def visible(
    start: int,
    stop: int,
    n_k: int,
    *,
    first: int = 0,
    left: int | None = None,
    right: int | None = None,
    key_mask: BoolArray | None = None,
    mask: Mask | None = None,
) -> BoolArray:
    """Return which keys the query rows ``start <= i < stop`` of one head see.

    Row ``i`` has position ``p_i = first + i`` and sees key ``j`` if ``p_i - left <= j <= p_i +
    right``, ``key_mask[j]`` is true, and ``mask[i, j]`` is true or, for an additive mask, not
    ``-inf``: the intersection of everything given.

    Parameters
    ----------
    start, stop : int
        The block of query rows, ``0 <= start <= stop <= n_q``.
    n_k : int
        Number of keys.
    first : int, default 0
        Position of query row 0 among the keys; may be negative.
    left, right : int, optional
        Reach of a row to each side of its position, None for unbounded.  ``right=0`` is causal.
    key_mask : bool array of shape (n_k,), optional
        True keeps the key.
    mask : bool or float64 array of shape (n_q or 1, n_k or 1), optional
        True, or any number but ``-inf``, keeps the pair.

    Returns
    -------
    bool array of shape (stop - start, n_k)

    Examples
    --------
    >>> visible(0, 2, 5, first=3, right=0).astype(int)
    array([[1, 1, 1, 1, 0],
           [1, 1, 1, 1, 1]])
    """
    position = first + np.arange(start, stop, dtype=np.int64)[:, None]
    key = np.arange(n_k, dtype=np.int64)
    seen = np.ones((stop - start, n_k), dtype=np.bool_)
    if left is not None:
        seen &= key >= position - left
    if right is not None:
        seen &= key <= position + right
    if key_mask is not None:
        seen &= key_mask
    if mask is not None:
        rows = mask_rows(mask, start, stop)
        additive = rows.dtype != np.bool_
        seen &= rows != -np.inf if additive else rows.astype(np.bool_, copy=False)
    return seen


def mask_rows(mask: Mask, start: int, stop: int) -> Mask:
    """Return the rows ``start:stop`` of a mask whose only row may stand for all of them."""
    return mask if mask.shape[0] == 1 else mask[start:stop]


def masked_logits(
    q: FloatArray,
    k: FloatArray,
    *,
    scale: float,
    softcap: float = 0.0,
    bias: FloatArray | None = None,
    seen: BoolArray | None = None,
    stage: Stage = "masked",
) -> FloatArray:
    """Return the logits of a block of rows as they are after a stage (steps 1 to 4).

    Parameters
    ----------
    q : float64 array of shape (rows, d)
        Query rows.
    k : float64 array of shape (n_k, d)
        Keys.
    scale : float
        Factor of the dot products.
    softcap : float, default 0.0
        ``L`` becomes ``softcap tanh(L / softcap)``; 0 is off.
    bias : float64 array broadcastable to (rows, n_k), optional
        Added after the softcap.
    seen : bool array of shape (rows, n_k), optional
        Visible pairs; the others become ``-inf``, whatever their logit or bias was.
    stage : {"scaled", "capped", "masked"}, default "masked"
        Stop after step 1, after step 2, or after step 4.

    Returns
    -------
    float64 array of shape (rows, n_k)

    Examples
    --------
    >>> q, k = np.array([[2.0]]), np.array([[1.0], [3.0]])
    >>> masked_logits(q, k, scale=0.5, seen=np.array([[True, False]]))
    array([[  1., -inf]])
    """
    # Keys outside the visible set may hold anything: their logits are replaced below.
    with np.errstate(all="ignore"):
        logits: FloatArray = q @ k.T
        logits *= scale
        if stage == "scaled":
            return logits
        if softcap != 0.0:
            logits /= softcap
            np.tanh(logits, out=logits)
            logits *= softcap
        if stage == "capped":
            return logits
        if bias is not None:
            logits += bias
    if seen is not None:
        np.copyto(logits, -np.inf, where=~seen)
    return logits


def softmax_rows(
    logits: FloatArray, seen: BoolArray, sink: float | None = None
) -> tuple[FloatArray, FloatArray]:
    """Return the softmax of masked logits and its log-sum-exp, row by row (steps 5 to 7, 9).

    Parameters
    ----------
    logits : float64 array of shape (rows, n_k)
        Masked logits; overwritten by the weights.
    seen : bool array of shape (rows, n_k)
        Visible pairs.  A row is empty if it has none; its logits do not decide.
    sink : float, optional
        An extra logit without a key: it takes weight, so that rows sum to less than 1.

    Returns
    -------
    weights : float64 array of shape (rows, n_k)
        Zeros in an empty row.
    lse : float64 array of shape (rows,)
        ``-inf`` in an empty row, or the sink.

    Examples
    --------
    >>> weights, lse = softmax_rows(np.array([[0.0, 0.0]]), np.array([[True, True]]))
    >>> weights, lse
    (array([[0.5, 0.5]]), array([0.69314718]))
    """
    with np.errstate(all="ignore"):
        top = logits.max(axis=1, initial=-np.inf)
        empty = ~seen.any(axis=1)
        if sink is not None:
            top = np.maximum(top, sink)
            empty &= sink == -np.inf
        top[empty] = 0.0
        logits -= top[:, None]
        weights = np.exp(logits, out=logits)
        total = weights.sum(axis=1)
        if sink is not None:
            total += np.exp(sink - top)
        lse: FloatArray = top + np.log(total)
        total[total == 0.0] = 1.0  # an empty row: its weights are zeros already
        weights /= total[:, None]
    return weights, lse


def weighted_values(weights: FloatArray, seen: BoolArray, v: FloatArray) -> FloatArray:
    """Return ``O = A V`` (step 8) without reading the values of keys outside the visible set.

    A weight is 0 outside the visible set, and 0 times NaN is NaN.  Values with NaN or infinities
    are therefore split: their finite entries go through the product, and the others are added to
    the rows that see them.

    Parameters
    ----------
    weights : float64 array of shape (rows, n_k)
    seen : bool array of shape (rows, n_k)
    v : float64 array of shape (n_k, d_v)

    Returns
    -------
    float64 array of shape (rows, d_v)

    Examples
    --------
    >>> v = np.array([[1.0], [np.nan]])
    >>> weights = np.array([[1.0, 0.0], [0.5, 0.5]])
    >>> weighted_values(weights, weights > 0, v)
    array([[ 1.],
           [nan]])
    """
    with np.errstate(all="ignore"):
        finite = np.isfinite(v)
        if finite.all():
            product: FloatArray = weights @ v
            return product
        out: FloatArray = weights @ np.where(finite, v, 0.0)
        for j in np.flatnonzero(~finite.all(axis=1)):
            rows, columns = np.flatnonzero(seen[:, j]), np.flatnonzero(~finite[j])
            out[np.ix_(rows, columns)] += weights[rows, j, None] * v[j, columns]
    return out


def reference_attention(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    *,
    group: int,
    scale: float,
    first: IntArray,
    left: int | None,
    right: int | None,
    softcap: float,
    key_mask: BoolArray | None,
    key_slab: IntArray | None,
    mask: Mask | None,
    mask_slab: IntArray | None,
    sink: FloatArray | None,
) -> tuple[FloatArray, FloatArray]:
    """Return exact attention of all heads, and the log-sum-exp of their logits, in float64.

    ``O = A V`` with ``A = rowsoftmax(softcap(scale Q K^T) + bias)`` over the visible keys, by the
    nine steps at the top of this module.

    Parameters
    ----------
    q : float64 array of shape (H, n_q, d)
        Queries of H heads.
    k : float64 array of shape (H_kv, n_k, d)
        Keys; head ``h`` reads ``k[h // group]``.
    v : float64 array of shape (H_kv, n_k, d_v)
        Values; head ``h`` reads ``v[h // group]``.
    group : int
        Query heads a kv head, ``H = group H_kv``.
    scale : float
        Factor of the dot products; 0 is legal and means uniform attention.
    first : int64 array of shape (H,)
        Position of query row 0 of each head among the keys.
    left, right : int or None
        Row ``i`` sees ``first[h] + i - left <= j <= first[h] + i + right``; None is unbounded.
    softcap : float
        0 is off.
    key_mask : bool array of shape (S, n_k), or None
        True keeps the key.
    key_slab : int64 array of shape (H,), or None
        The row of ``key_mask`` that each head reads; unused without ``key_mask``.
    mask : bool or float64 array of shape (M, n_q or 1, n_k or 1), or None
        True keeps the pair; numbers are added to the logits, and ``-inf`` removes the pair.
    mask_slab : int64 array of shape (H,), or None
        The slab of ``mask`` that each head reads; unused without ``mask``.
    sink : float64 array of shape (H,), or None
        An extra logit a head, whose value is zero.

    Returns
    -------
    out : float64 array of shape (H, n_q, d_v)
        Zeros in empty rows.
    lse : float64 array of shape (H, n_q)
        Natural logarithm; ``-inf`` in empty rows, the sink's logit where there is one.

    Notes
    -----
    NaN or infinities in keys and values outside the visible set of a row do not reach it; inside
    they reach that row alone.  Memory beyond the arguments and results is one contiguous copy of
    arguments that are not contiguous, and a few blocks of rows, of 4 MiB of logits (or one
    row, if a row is larger); never n_q x n_k.

    Examples
    --------
    >>> one, zero = np.ones((1, 2, 1)), np.zeros(1, dtype=np.int64)
    >>> out, lse = reference_attention(
    ...     one, one, np.array([[[1.0], [2.0]]]), group=1, scale=1.0, first=zero, left=None,
    ...     right=0, softcap=0.0, key_mask=None, key_slab=None, mask=None, mask_slab=None,
    ...     sink=None)
    >>> out[0, :, 0]
    array([1. , 1.5])
    """
    # BLAS takes other paths, with other bits, for other memory layouts.
    q, k, v = (np.ascontiguousarray(x) for x in (q, k, v))
    heads, n_q, _ = q.shape
    n_k, d_v = v.shape[1:]
    out = np.empty((heads, n_q, d_v))
    lse = np.empty((heads, n_q))
    step = block_rows(n_k)

    def block(task: tuple[int, int]) -> None:
        h, start = task
        stop = min(start + step, n_q)
        seen, logits = block_logits(
            q[h, start:stop],
            k[h // group],
            h,
            start,
            scale=scale,
            first=first,
            left=left,
            right=right,
            softcap=softcap,
            key_mask=key_mask,
            key_slab=key_slab,
            mask=mask,
            mask_slab=mask_slab,
        )
        weights, lse[h, start:stop] = softmax_rows(
            logits, seen, None if sink is None else float(sink[h])
        )
        out[h, start:stop] = weighted_values(weights, seen, v[h // group])

    tasks = [(h, i) for h in range(heads) for i in range(0, n_q, step)]
    for _ in in_order(block, tasks, 8 * step * n_k):
        pass
    return out, lse


def block_rows(n_k: int) -> int:
    """Return how many query rows a block has, which depends on the number of keys alone."""
    return max(1, _BLOCK_BYTES // (8 * max(1, n_k)))


def block_logits(
    rows: FloatArray,
    k: FloatArray,
    h: int,
    start: int,
    *,
    scale: float,
    first: IntArray,
    left: int | None,
    right: int | None,
    softcap: float,
    key_mask: BoolArray | None,
    key_slab: IntArray | None,
    mask: Mask | None,
    mask_slab: IntArray | None,
) -> tuple[BoolArray, FloatArray]:
    """Return what some rows of head h see, and their masked logits, both (rows, n_k).

    ``rows`` are the queries from row ``start`` on, ``k`` the keys that the head reads; the options
    are those of ``reference_attention``.
    """
    stop = start + len(rows)
    slab = None if mask is None or mask_slab is None else mask[mask_slab[h]]
    keys = None if key_mask is None or key_slab is None else key_mask[key_slab[h]]
    seen = visible(
        start,
        stop,
        len(k),
        first=int(first[h]),
        left=left,
        right=right,
        key_mask=keys,
        mask=slab,
    )
    bias = _bias_rows(slab, start, stop)
    return seen, masked_logits(rows, k, scale=scale, softcap=softcap, bias=bias, seen=seen)


def _bias_rows(mask: Mask | None, start: int, stop: int) -> FloatArray | None:
    """Return the rows of an additive mask, and None for a boolean one."""
    if mask is None or mask.dtype == np.bool_:
        return None
    return mask_rows(mask, start, stop).astype(np.float64, copy=False)


def in_order(
    block: Callable[[tuple[int, int]], T], tasks: list[tuple[int, int]], size: int
) -> Iterator[T]:
    """Yield ``block`` of all tasks in their order, on several threads with single-threaded BLAS.

    ``size`` is the bytes that a running block holds; fewer threads run where blocks are large.
    No more results wait than there are threads.
    """
    from concurrent.futures import Future, ThreadPoolExecutor

    from ..kernels._threads import blas_single_thread, thread_count

    workers = min(thread_count(), len(tasks), max(1, _TOTAL_BYTES // max(1, size)))
    with blas_single_thread():
        if workers <= 1:
            yield from map(block, tasks)
            return
        with ThreadPoolExecutor(max_workers=workers) as pool:
            running: deque[Future[T]] = deque()
            for task in tasks:
                if len(running) > workers:
                    yield running.popleft().result()  # an exception of a block is raised here
                running.append(pool.submit(block, task))
            while running:
                yield running.popleft().result()


def merge(
    out1: FloatArray, lse1: FloatArray, out2: FloatArray, lse2: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return attention over two disjoint sets of keys from attention over each of them.

    ``l = log(e^l1 + e^l2)`` and ``O = e^(l1 - l) O1 + e^(l2 - l) O2``; a side whose log-sum-exp
    is ``-inf`` has seen no key and is dropped.

    Parameters
    ----------
    out1, out2 : float64 arrays of shape (..., n_q, d_v)
        Outputs over the two sets of keys.
    lse1, lse2 : float64 arrays of shape (..., n_q)
        Their log-sum-exp.

    Returns
    -------
    out : float64 array of shape (..., n_q, d_v)
    lse : float64 array of shape (..., n_q)

    Notes
    -----
    A sink belongs to one of the two sides only: merging counts it once for each side.

    Examples
    --------
    >>> merge(np.array([[1.0]]), np.array([0.0]), np.array([[3.0]]), np.array([0.0]))
    (array([[2.]]), array([0.69314718]))
    """
    with np.errstate(all="ignore"):
        lse: FloatArray = np.logaddexp(lse1, lse2)
        out = np.zeros(np.broadcast_shapes(np.shape(out1), np.shape(out2)))
        for part, part_lse in ((out1, lse1), (out2, lse2)):
            weight = np.exp(part_lse - lse)[..., None]
            out += np.where(np.isneginf(part_lse)[..., None], 0.0, weight * part)
    return out, lse


def round_to(x: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    """Round numbers once, to nearest with ties to even, to a floating type.

    Parameters
    ----------
    x : float64 or float32 array
        Any shape; NaN, infinities and signed zeros keep their kind.
    dtype : dtype
        float64, float32, float16, or any type whose name is ``bfloat16`` (NumPy has none of its
        own; ``ml_dtypes`` does).  Numbers beyond the largest finite one become infinite.

    Returns
    -------
    array of ``dtype``, of the shape of ``x``
        ``x`` itself if it has this dtype.

    Raises
    ------
    TypeError
        If ``dtype`` is none of these.

    Notes
    -----
    Going to bfloat16 by way of float32 rounds twice: ``1 + 2^-8 + 2^-40`` would first become the
    tie ``1 + 2^-8`` and then 1, although ``1 + 2^-7`` is nearer.  ``x`` is instead rounded to a
    multiple of the spacing of bfloat16 at ``x``, ``2^(max(floor(log2 |x|), -126) - 7)``, where
    scaling by a power of two is exact.

    Examples
    --------
    >>> round_to(np.array([1.0 + 2.0**-25, 1e6]), np.float16)
    array([ 1., inf], dtype=float16)
    """
    target = np.dtype(dtype)
    with np.errstate(all="ignore"):
        if target in (np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.float16)):
            return x.astype(target, copy=False)
        if target.name == "bfloat16":
            return to_bfloat16(x).astype(target)
    raise TypeError(
        "dtype must be float64, float32, float16 or bfloat16, "
        f"got {target.name}; choose one of these."
    )


def to_bfloat16(x: NDArray[Any]) -> NDArray[np.float32]:
    """Round numbers as ``round_to`` does to bfloat16, and return them as float32.

    Examples
    --------
    >>> to_bfloat16(np.array([1.0 + 2.0**-8 + 2.0**-40]))
    array([1.0078125], dtype=float32)
    """
    with np.errstate(all="ignore"):
        _, exponent = np.frexp(x)  # |x| = f 2^exponent with 1/2 <= f < 1
        places = np.maximum(exponent - 1, -126) - 7
        rounded: NDArray[Any] = np.ldexp(np.rint(np.ldexp(x, -places)), places)
        # Exact from here on: every number is a bfloat16, or the power of two above them.
        return rounded.astype(np.float32)
