"""Vector-Jacobian products of structured attention: of the slots of rows, and of summaries.

A row is a softmax over its direct keys and its regions, so that a cotangent of its output first
becomes one of the logits of its slots.  Those of direct keys go to Q and K.  Those of regions go to
Q and to the summaries of the regions, and from these, together with what reaches the means of the
values, through the local weights to K, V and the reference queries.

Slots and members of regions are listed in pieces; nothing as large as all of them is held.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...partitions.ragged import Ragged
from ..pullback import Gradient, pair_dots
from .layouts import weights_of
from .operator import PartitionedAttention

Array = NDArray[Any]

# Slots of rows, or members of regions, that are listed at a time.
LISTED = 1 << 19


class OfRegions(NamedTuple):
    """Hold cotangents of what regions are summarised by, float64.

    Attributes
    ----------
    keys : ndarray (r, d) or (r, 2 d)
    bias : ndarray (r,)
        Of ``logit_keys`` and ``logit_bias`` of the summaries.
    values : ndarray (r, m)
        Of the means of the values.
    """

    keys: Array
    bias: Array
    values: Array


def slots_pullback(
    ahat: PartitionedAttention,
    rows: Array,
    g: Array,
    x: Array | None,
    xhat: Array,
    out: Gradient,
) -> OfRegions:
    """Return what a cotangent G (s, m) of rows of ``Ahat X`` is at the summaries.

    Adds what it is at the queries, keys and X to ``out``.

    Parameters
    ----------
    ahat : PartitionedAttention
        In float64.
    rows : int array (s,)
    g : ndarray (s, m)
    x : ndarray (n_k, m), optional
        None is zero, and its cotangent is left out.
    xhat : ndarray (r, m)
        Means of X over the regions.
    out : Gradient
    """
    data, layout, d = ahat.data, ahat.layout, ahat.problem.d
    keys, bias = np.zeros(data.keys.shape), np.zeros(len(data.bits))
    values = np.zeros(xhat.shape)
    step = max(1, LISTED // max(layout.slot_bound, 1))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        mine, theirs, _ = weights_of(layout, data, part)
        weight, q = g[start : start + step], data.q[part]
        changes, shift = [], np.zeros(len(part))
        for w, value in ((mine, x), (theirs, xhat)):
            change = np.zeros(len(w.data))
            if value is not None:
                change = pair_dots(weight, value, _owner(w), w.indices)
            shift += np.bincount(_owner(w), w.data * change, minlength=len(part))
            changes.append(change)
        near, far = (
            _like(w, w.data * (change - shift[_owner(w)]))
            for w, change in zip((mine, theirs), changes, strict=True)
        )
        df = data.scale * (far @ data.keys)
        dq = df[:, :d] + data.scale * (near @ data.k)
        if df.shape[1] > d:  # features are q and its squares
            dq += 2 * q * df[:, d:]
        np.add.at(out.q, part, dq)
        out.k[:] += data.scale * (near.T @ q)
        keys += data.scale * (far.T @ data.f[part])
        bias += np.bincount(far.indices, far.data, minlength=len(bias))
        values += theirs.T @ weight
        if x is not None:
            out.v[:] += mine.T @ weight
    return OfRegions(keys, bias, values)


def summaries_pullback(
    ahat: PartitionedAttention, of: OfRegions, values: Array | None, out: Gradient
) -> Array | None:
    """Return what cotangents of summaries are at the reference queries, (r, d) or (1, d).

    Adds what they are at the queries, keys and values to ``out``; reference queries that are means
    or maxima of queries go there too, and the result is None.  ``values`` None: their means have
    no cotangent.
    """
    problem, layout, rule, reference = ahat.problem, ahat.layout, ahat.rule, ahat.reference
    scale, k, d = problem.scale, problem.arrays.k, problem.d
    q0 = np.asarray(ahat.q0)
    dkeys, dq0 = of.keys[:, :d], np.zeros(q0.shape)
    dvariance = None
    variance = ahat.summaries.variance
    if variance is not None:
        bias = of.bias[:, None]
        dvariance = (
            0.5 * scale * of.keys[:, d:] - scale * q0 * dkeys + 0.5 * scale**2 * q0**2 * bias
        )
        dq0 += scale * variance * (scale * q0 * bias - dkeys)
    for index in _pieces(layout.sizes):
        members, lam = layout.region_keys(index), layout.local_weights(index)
        owner, items = members.owner, members.items
        sizes = members.sizes[:, None]
        change = np.zeros(len(items))
        if values is not None:
            change += pair_dots(of.values[index], values, owner, items)
            out.v[:] += lam.T @ of.values[index]
        if rule.key == "expected":
            change += pair_dots(dkeys[index], k, owner, items)
            out.k[:] += lam.T @ dkeys[index]
        elif rule.key == "mean":
            out.k[:] += _like(lam, np.ones(len(items))).T @ (dkeys[index] / sizes)
        else:
            _at_maxima(k, members, dkeys[index], out.k)
        if dvariance is not None:
            # About the mean under lam, whose own change has no effect.
            mean = lam @ k
            for c in range(d):
                apart = k[items, c] - mean[owner, c]
                slope = dvariance[index, c][owner]
                change += slope * apart**2
                np.add.at(out.k[:, c], items, 2 * lam.data * slope * apart)
        change *= lam.data
        if rule.bias == "entropy":
            some = np.where(lam.data > 0, lam.data, 1.0)
            change -= of.bias[index][owner] * lam.data * (np.log(some) + 1)
        total = np.bincount(owner, change, minlength=len(index))
        local = _like(lam, change - lam.data * total[owner])
        out.k[:] += scale * (local.T @ q0[index])
        dq0[index] += scale * (local @ k)
        if reference.kind == "mean":
            out.q[:] += _like(lam, np.ones(len(items))).T @ (dq0[index] / sizes)
        elif reference.kind == "max":
            _at_maxima(problem.arrays.q, members, dq0[index], out.q)
    if reference.kind != "given":
        return None
    return dq0.sum(axis=0, keepdims=True) if reference.shared else dq0


def _pieces(sizes: Array) -> Iterator[Array]:
    """Yield the regions that have a key, so many at a time that their members can be listed."""
    some = np.flatnonzero(sizes)
    bound = np.cumsum(sizes[some]) // LISTED
    for piece in np.split(some, np.flatnonzero(np.diff(bound)) + 1):
        if len(piece):
            yield piece


def _at_maxima(x: Array, members: Ragged, g: Array, out: Array) -> None:
    """Add G (r, d) where the coordinates of members of each region are largest, first of equals."""
    rows, starts = members.items, members.starts[:-1]
    place = np.arange(len(rows))
    for c in range(x.shape[1]):
        column = x[rows, c]
        top = np.maximum.reduceat(column, starts)
        hit = np.where(column == top[members.owner], place, len(rows))
        np.add.at(out[:, c], rows[np.minimum.reduceat(hit, starts)], g[:, c])


def _owner(w: Any) -> Array:
    """Return the row of each entry of a sparse matrix."""
    return np.repeat(np.arange(w.shape[0]), np.diff(w.indptr))


def _like(w: Any, data: Array) -> Any:
    """Return a sparse matrix with other entries at the same places."""
    return type(w)((data, w.indices, w.indptr), shape=w.shape)
