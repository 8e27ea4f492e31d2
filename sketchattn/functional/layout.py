"""The layout of one call, and the moves between it and the flat heads that kernels see."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.arguments import Causal, prepare
from ..operators.reference import round_to

Array = NDArray[Any]


@dataclass(frozen=True)
class Layout:
    """Hold the shapes of q (*lead, n_q, d), k (..., n_k, d) and v (..., n_k, d_v).

    The last axis of ``lead`` are the query heads, which share key heads in groups; the others are
    the batch.  Without any, q is one head.  Kernels see all heads in one axis, batch by batch.
    """

    lead: tuple[int, ...]
    group: int
    n_q: int
    n_k: int
    d: int
    d_v: int

    @property
    def batch(self) -> tuple[int, ...]:
        """The batch axes."""
        return self.lead[:-1]

    @property
    def entries(self) -> int:
        """Number of batch entries."""
        return math.prod(self.batch)

    @property
    def h(self) -> int:
        """Number of query heads of a batch entry."""
        return self.lead[-1] if self.lead else 1

    def flatten(self, x: Array, dtype: np.dtype[Any]) -> Array:
        """Return q, k or v as contiguous (H, n, d) in the computing precision."""
        return prepare(x.reshape((math.prod(x.shape[:-2]), *x.shape[-2:])), dtype)

    def per_head(self, x: Array) -> Array:
        """Return one entry for each flat head of an array over heads (h,)."""
        return np.ascontiguousarray(np.tile(x, self.entries))

    def first(self, offset: Array | None, alignment: Causal) -> Array:
        """Return the position of query 0 among the keys for each flat head, int64 (H,)."""
        if offset is None:
            start = self.n_k - self.n_q if alignment == "bottom-right" else 0
            return np.full(self.entries * self.h, start, np.int64)
        full = np.broadcast_to(offset, self.batch).reshape(-1)
        return np.ascontiguousarray(np.repeat(full.astype(np.int64), self.h))

    def keep(self, x: Array, keys: Array) -> Array:
        """Return keys or values (..., h_kv, n_k, m) with zeros where a key is masked."""
        shown = np.expand_dims(keys, -2) if self.lead else keys
        return np.where(shown[..., None], x, x.dtype.type(0))

    def key_slabs(self, keys: Array) -> tuple[Array, Array]:
        """Return the masks (S, n_k) and the slab of each flat head."""
        lead = keys.shape[:-1]
        slabs = keys.reshape((math.prod(lead), self.n_k))
        of_batch = np.broadcast_to(np.arange(math.prod(lead)).reshape(lead), self.batch)
        return (
            np.require(slabs, requirements=["C", "W"]),
            np.repeat(of_batch.reshape(-1), self.h).astype(np.int64),
        )

    def mask_slabs(self, mask: Array, dtype: np.dtype[Any]) -> tuple[Array, Array]:
        """Return the mask (M, m_q, m_k) and the slab of each flat head; broadcast axes stay 1."""
        mask = mask.reshape((1,) * (2 - mask.ndim) + mask.shape) if mask.ndim < 2 else mask
        lead = mask.shape[:-2]
        flat = mask.reshape((math.prod(lead), *mask.shape[-2:]))
        if flat.dtype != np.bool_:
            flat = narrow_logits(flat, dtype)
        return np.require(flat, requirements=["C", "W"]), self.slab_of_head(lead)

    def slab_of_head(self, lead: tuple[int, ...]) -> Array:
        """Return which of the slabs over leading axes, of length 1 or whole, a flat head reads."""
        of_head = np.broadcast_to(np.arange(math.prod(lead)).reshape(lead), self.lead)
        return np.ascontiguousarray(of_head.reshape(-1).astype(np.int64))

    def output(self, flat: Array, dtype: np.dtype[Any]) -> Array:
        """Return an output (H, n_q, d_v) as (*lead, n_q, d_v), rounded once to ``dtype``."""
        shape = (*self.lead, self.n_q, self.d_v)
        return round_to(flat, dtype.newbyteorder("=")).reshape(shape)


def narrow_logits(x: Array, dtype: np.dtype[Any]) -> Array:
    """Return a copy of logits in ``dtype``; finite ones stay finite, so that only -inf hides."""
    limit = dtype.type(np.finfo(dtype).max / 2)
    with np.errstate(over="ignore", under="ignore"):
        narrow = x.astype(dtype)
    np.clip(narrow, -limit, limit, out=narrow)
    np.copyto(narrow, -np.inf, where=x == -np.inf)
    return narrow
