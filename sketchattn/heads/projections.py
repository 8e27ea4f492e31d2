"""What the projections of a layer give, split into heads."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..base.arguments import as_arrays, check_count, check_key_mask

Array = NDArray[Any]


def split_projections(
    q: object,
    k: object,
    v: object,
    num_heads: object,
    num_kv_heads: object,
    key_mask: ArrayLike | None,
) -> tuple[list[Array], Array | None, list[str]]:
    """Return q, k and v of shape (batch * heads, n, d), the mask of each head, and names.

    Keys and values that several query heads share stand beside each of them.
    """
    heads = check_count(num_heads, "num_heads", "give the number of query heads")
    arrays = as_arrays(q, k, v)
    for label, x in zip("qkv", arrays, strict=True):
        if x.ndim not in (2, 3):
            raise ValueError(
                f"{label} must have the shape (n, heads * width) or (batch, n, heads * width), got "
                f"{x.shape}; heads that are apart already go into Heads(q, k, v)"
            )
        if x.ndim != arrays[0].ndim or (x.ndim == 3 and len(x) != len(arrays[0])):
            raise ValueError(
                f"{label} must have the batch of q, got shapes {arrays[0].shape} and {x.shape}; "
                f"pass all three with the same batch"
            )
    batched = arrays[0].ndim == 3
    wide = [x if batched else x[None] for x in arrays]
    width = _part(wide[0], "q", heads, "num_heads")
    if num_kv_heads is None:
        groups = wide[1].shape[2] // max(width, 1)
        if groups < 1 or groups * width != wide[1].shape[2] or heads % groups:
            raise ValueError(
                f"k must have as many columns as 1 to {heads} heads of width {width} do, got "
                f"{wide[1].shape[2]}; correct num_heads or pass num_kv_heads"
            )
    else:
        groups = check_count(num_kv_heads, "num_kv_heads", "give the number of key heads")
        if heads % groups:
            raise ValueError(
                f"num_kv_heads must divide num_heads = {heads}, got {groups}; each key head serves "
                f"as many query heads as the next"
            )
    counts = (heads, groups, groups)
    made = []
    for label, x, count in zip("qkv", wide, counts, strict=True):
        name = "num_heads" if label == "q" else "num_kv_heads"
        part = _part(x, label, count, name)
        apart = x.reshape(*x.shape[:2], count, part).transpose(0, 2, 1, 3)
        shared = np.repeat(apart, heads // count, axis=1)
        made.append(shared.reshape(-1, x.shape[1], part))
    batch, n_k = len(wide[0]), wide[1].shape[1]
    mask = None
    if key_mask is not None:
        checked = check_key_mask(key_mask, (batch,), n_k)
        mask = np.repeat(np.broadcast_to(checked, (batch, n_k)), heads, axis=0)
    names = [
        f"batch{b}.head{h}" if batched else f"head{h}" for b in range(batch) for h in range(heads)
    ]
    return made, mask, names


def _part(x: Array, label: str, count: int, name: str) -> int:
    """Return the width of one of ``count`` heads."""
    if x.shape[2] == 0 or x.shape[2] % count:
        raise ValueError(
            f"{label} must have columns for each of {name} = {count} heads, got {x.shape[2]}, "
            f"which {count} does not divide; correct {name}"
        )
    return int(x.shape[2]) // count
