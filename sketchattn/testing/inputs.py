"""Inputs that tell right from wrong: cases of every option, at sizes that fill no tile.

Random inputs have logits of deviation 2, so that rows differ from the mean of V.  Lattice inputs
are small integers of width 16, so that the scale 1/4 and every logit is exact in float16 and
bfloat16 in any order of summation: what remains is the rounding of the softmax and of ``P V``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.arguments import numpy_name
from ..functional.batched import attention
from .dense import Parts

Array = NDArray[Any]

DTYPES = ("float16", "bfloat16", "float32", "float64")
# Unit roundoffs.
ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}


def dtype_name(dtype: Any) -> str:
    """Return the name of a dtype of NumPy, ml_dtypes, torch or jax; anything else as text."""
    if isinstance(dtype, str):
        return dtype
    try:
        return str(np.dtype(dtype).name)
    except TypeError:
        return str(numpy_name(dtype))


# What a candidate can support; each has cases of its own.
FEATURES = (
    "dv", "cross", "scale", "causal", "bool_mask", "empty_row", "additive_mask", "key_mask",
    "window", "softcap", "gqa", "sink", "lse",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Hold one call of attention: numbers of the dtype, widened to float64.

    Attributes
    ----------
    id : str
        ``dtype/feature/kind of inputs/seed``.
    dtype : str
    feature : str
        What it is there for: "plain" or one of ``FEATURES``.
    q, k, v : float64 array (B, H, n, d)
        ``k`` and ``v`` have H_kv heads.
    alignment : {"top-left", "bottom-right"}
        Of ``causal`` and ``window``.
    empty_row : {"zero", "mean"}
        What a row without a key returns.
    causal : bool
    mask : array broadcastable to (B, H, n_q, n_k), or None
        Boolean, or numbers to add whose -inf hides.
    key_mask : bool array (B, n_k), or None
    window : (int, int) or None
    softcap : float
    scale : float or None
    sink : float64 array (H,), or None
    """

    id: str
    dtype: str
    feature: str
    q: Array
    k: Array
    v: Array
    alignment: str = "top-left"
    empty_row: str = "zero"
    causal: bool = False
    mask: Array | None = None
    key_mask: Array | None = None
    window: tuple[int, int] | None = None
    softcap: float = 0.0
    scale: float | None = None
    sink: Array | None = None

    @property
    def group(self) -> int:
        """Query heads a key head."""
        return int(self.q.shape[1] // self.k.shape[1])

    @property
    def first(self) -> int:
        """Position of query 0 among the keys."""
        n_q, n_k = self.q.shape[2], self.k.shape[2]
        return n_k - n_q if self.alignment == "bottom-right" else 0

    @property
    def factor(self) -> float:
        """The scale as a number."""
        return float(self.q.shape[-1] ** -0.5 if self.scale is None else self.scale)

    @property
    def shape(self) -> str:
        """The sizes in words."""
        (b, h, n_q, d), (_, h_kv, n_k, d_v) = self.q.shape, self.v.shape
        heads = f"h {h}" if h == h_kv else f"h {h}/{h_kv}"
        return f"b {b}, {heads}, n {n_q} x {n_k}, d {d}, d_v {d_v}"

    def options(self) -> dict[str, Any]:
        """Return the options of ``sketchattn.attention``."""
        return {
            "scale": self.scale,
            "causal": self.alignment if self.causal else False,
            "offset": self.first,
            "key_mask": self.key_mask,
            "attn_mask": self.mask,
            "softcap": self.softcap,
            "window": (-1, -1) if self.window is None else self.window,
            "sink": self.sink,
            "enable_gqa": self.group > 1,
        }

    def truth(self) -> tuple[Array, Array]:
        """Return output (B, H, n_q, d_v) and logsumexp in float64, by the reference."""
        found: tuple[Array, Array] = attention(
            self.q, self.k, self.v, compute_dtype=np.float64, return_lse=True, **self.options()
        )
        out, lse = found
        if self.empty_row == "mean" and self.v.shape[2]:
            mean = np.repeat(self.v.mean(axis=2, keepdims=True), self.group, axis=1)
            out = np.where(np.isneginf(lse)[..., None], mean, out)
        return out, lse

    def seen(self) -> Array:
        """Return the visible set (B, H, n_q, n_k)."""
        b, h, n_q, n_k = *self.q.shape[:3], self.k.shape[2]
        position, key = self.first + np.arange(n_q)[:, None], np.arange(n_k)
        seen = np.ones((b, h, n_q, n_k), bool)
        if self.causal:
            seen &= key <= position
        if self.window is not None:
            left, right = self.window
            seen &= (key >= position - left) | (left < 0)
            seen &= (key <= position + right) | (right < 0)
        if self.key_mask is not None:
            seen &= self.key_mask[:, None, None, :]
        if self.mask is not None:
            seen &= self.mask if self.mask.dtype == np.bool_ else self.mask != -np.inf
        return seen

    def parts(self) -> Parts:
        """Return what the output is made of."""
        bias = None
        if self.mask is not None and self.mask.dtype != np.bool_:
            bias = np.where(self.mask == -np.inf, 0, self.mask)
        return Parts(
            q=self.q,
            k=np.repeat(self.k, self.group, axis=1),
            v=np.repeat(self.v, self.group, axis=1),
            scale=self.factor,
            softcap=self.softcap,
            bias=bias,
            seen=self.seen(),
            sink=self.sink,
            empty_row=self.empty_row,
        )


def rounded(x: Array, dtype: str) -> Array:
    """Round to a dtype, ties to even, and return the numbers in float32 (float64 for float64)."""
    if dtype == "float64":
        return np.asarray(x, np.float64)
    with np.errstate(all="ignore"):
        single = np.ascontiguousarray(x, np.float32)
        if dtype == "float32":
            return single
        if dtype == "float16":
            return single.astype(np.float16).astype(np.float32)
        # bfloat16 is the upper half of float32.
        bits = single.view(np.uint32)
        up = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
        up = (up & np.uint32(0xFFFF0000)).view(np.float32)
        return np.where(np.isfinite(single), up, single)


def numbers(x: Array, dtype: str) -> Array:
    """Round inputs to a dtype and return them in float64."""
    return rounded(x, dtype).astype(np.float64)


# --- q, k and v -----------------------------------------------------------------------------------

Sizes = tuple[int, int, int, int, int, int, int]  # b, h, h_kv, n_q, n_k, d, d_v
Heads = tuple[Array, Array, Array]


def normal(rng: np.random.Generator, sizes: Sizes) -> Heads:
    """Return normal q and k of variance 2, so that logits have deviation 2, and normal v."""
    b, h, h_kv, n_q, n_k, d, d_v = sizes
    q = rng.normal(0, 2**0.5, (b, h, n_q, d))
    k = rng.normal(0, 2**0.5, (b, h_kv, n_k, d))
    return q, k, rng.standard_normal((b, h_kv, n_k, d_v))


def lattice(rng: np.random.Generator, sizes: Sizes, reach: int = 2) -> Heads:
    """Return integers in -reach..reach, and v in -2..2; d should be 16."""
    b, h, h_kv, n_q, n_k, d, d_v = sizes
    q = rng.integers(-reach, reach + 1, (b, h, n_q, d)).astype(np.float64)
    k = rng.integers(-2, 3, (b, h_kv, n_k, d)).astype(np.float64)
    return q, k, rng.integers(-2, 3, (b, h_kv, n_k, d_v)).astype(np.float64)


def staircase(rng: np.random.Generator, sizes: Sizes, rising: bool = True) -> Heads:
    """Return lattice inputs with keys sorted so that the running maximum of rows moves all along.

    It rescales online softmax at every tile, or never after the first.
    """
    q, k, v = lattice(rng, sizes, reach=1)
    direction = rng.choice([-1.0, 1.0], size=sizes[5])
    q = np.clip(q + direction, -2, 2)
    order = np.argsort(k @ direction, axis=-1)
    if not rising:
        order = order[..., ::-1]
    return q, np.take_along_axis(k, order[..., None], axis=2), v


def overflowing(rng: np.random.Generator, sizes: Sizes) -> Heads:
    """Return lattice inputs whose logits reach hundreds: exp overflows without its maximum."""
    q, k, v = lattice(rng, sizes)
    return 32 * q, k, v


_PLAIN: tuple[Sizes, ...] = (
    (1, 2, 2, 130, 130, 64, 64),
    (2, 3, 3, 97, 97, 16, 16),
    (1, 2, 2, 67, 67, 64, 64),
)
_WIDTHS: tuple[Sizes, ...] = (
    (1, 3, 3, 130, 130, 64, 16),
    (1, 2, 2, 97, 97, 64, 8),
    (2, 2, 2, 60, 60, 16, 24),
)
_CROSS: tuple[Sizes, ...] = (
    (2, 3, 3, 60, 131, 16, 16),
    (1, 2, 2, 1, 131, 64, 64),
    (1, 1, 1, 130, 1, 16, 16),
)
_LATTICE: Sizes = (2, 2, 2, 97, 97, 16, 16)
_LATTICE_CROSS: Sizes = (1, 2, 2, 67, 131, 16, 16)
_LATTICE_TALL: Sizes = (1, 2, 2, 131, 67, 16, 16)
_GROUPED: Sizes = (2, 6, 2, 67, 67, 16, 16)


# --- cases ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """Hold what all cases of a convention have in common.

    Attributes
    ----------
    alignment, empty_row : str
        See ``Case``.
    prefix_keys : bool
        Key masks are lengths: the first keys are valid.
    both : bool
        A mask and the causal flag go together.
    """

    alignment: str = "top-left"
    empty_row: str = "zero"
    prefix_keys: bool = False
    both: bool = False


# Values of masked keys.
_POISON = 1000.0

Build = Callable[[np.random.Generator, Setting, Heads], Mapping[str, Any]]


def _shape(x: Heads) -> tuple[int, int, int, int]:
    b, h, n_q, _ = x[0].shape
    return b, h, n_q, x[1].shape[2]


def random_mask(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Return a boolean mask of which two thirds are visible, in every row at least one."""
    mask: Array = rng.random(shape) < 0.67
    mask |= np.arange(shape[-1]) == rng.integers(0, shape[-1], (*shape[:-1], 1))
    return mask


def _bool_mask(rng: np.random.Generator, setting: Setting, x: Heads) -> Mapping[str, Any]:
    b, h, n_q, n_k = _shape(x)
    return {"mask": random_mask(rng, (b, h, n_q, n_k))}


def _empty_row(rng: np.random.Generator, setting: Setting, x: Heads) -> Mapping[str, Any]:
    b, _, n_q, n_k = _shape(x)
    mask = random_mask(rng, (b, 1, n_q, n_k))
    mask[:, :, [0, n_q // 2, n_q - 1]] = False
    return {"mask": mask}


def _mask_and_causal(rng: np.random.Generator, setting: Setting, x: Heads) -> Mapping[str, Any]:
    b, h, n_q, n_k = _shape(x)
    mask = random_mask(rng, (b, h, n_q, n_k))
    mask[..., 0] = True  # no row is empty
    return {"mask": mask, "causal": True}


def _additive_mask(rng: np.random.Generator, setting: Setting, x: Heads) -> Mapping[str, Any]:
    b, h, n_q, n_k = _shape(x)
    bias = rng.standard_normal((b, h, n_q, n_k))
    return {"mask": np.where(random_mask(rng, bias.shape), bias, -np.inf)}


def _key_mask(rng: np.random.Generator, setting: Setting, x: Heads) -> Mapping[str, Any]:
    b, _, _, n_k = _shape(x)
    if setting.prefix_keys:
        keep = np.arange(n_k) < rng.integers(n_k // 2, n_k - 1, (b, 1))
    else:
        keep = random_mask(rng, (b, n_k))
        keep[:, : n_k // 8] = False  # padding to the left
    return {"key_mask": keep, "v": np.where(keep[:, None, :, None], x[2], _POISON)}


def _constant(**options: Any) -> Build:
    return lambda rng, setting, x: options


def _sink(rng: np.random.Generator, setting: Setting, x: Heads) -> Mapping[str, Any]:
    return {"sink": rng.integers(5, 9, x[0].shape[1]).astype(np.float64)}


def _wider(rng: np.random.Generator, setting: Setting, x: Heads) -> Mapping[str, Any]:
    return {"scale": 1.5 * x[0].shape[-1] ** -0.5}


# Feature, how its cases are told apart, sizes, what is added, and the features it needs too.
_CASES: tuple[tuple[str, str, Sizes, Build, tuple[str, ...]], ...] = (
    ("scale", "", _LATTICE, _wider, ()),
    ("causal", "", _LATTICE, _constant(causal=True), ()),
    ("causal", "long", _LATTICE_CROSS, _constant(causal=True), ("cross",)),
    ("bool_mask", "", _LATTICE, _bool_mask, ()),
    ("bool_mask", "causal", _LATTICE, _mask_and_causal, ("causal", "both")),
    ("empty_row", "", _LATTICE, _empty_row, ("bool_mask",)),
    ("empty_row", "tall", _LATTICE_TALL, _constant(causal=True), ("causal", "cross", "last")),
    ("additive_mask", "", _LATTICE, _additive_mask, ()),
    ("key_mask", "", _LATTICE, _key_mask, ()),
    ("window", "(3, 0)", _LATTICE, _constant(window=(3, 0)), ()),
    ("window", "(2, 5)", _LATTICE_CROSS, _constant(window=(2, 5)), ("cross",)),
    ("softcap", "", _LATTICE, _constant(softcap=4.0), ()),
    ("gqa", "", _GROUPED, _constant(), ()),
    ("sink", "", _LATTICE, _sink, ()),
)


def _case(name: str, feature: str, dtype: str, setting: Setting, x: Heads, **options: Any) -> Case:
    """Return a case whose numbers are those of the dtype."""
    q, k, v = (numbers(options.pop(label, y), dtype) for label, y in zip("qkv", x, strict=True))
    mask = options.pop("mask", None)
    if mask is not None and mask.dtype != np.bool_:
        mask = numbers(mask, dtype)
    return Case(
        id=f"{dtype}/{feature}/{name}",
        dtype=dtype,
        feature=feature,
        q=q,
        k=k,
        v=v,
        alignment=setting.alignment,
        empty_row=setting.empty_row,
        mask=mask,
        **options,
    )


def make_cases(
    dtype: str, setting: Setting, supports: frozenset[str], seeds: Sequence[int]
) -> Iterator[Case]:
    """Yield the cases of a dtype: inputs of every kind, then every supported feature.

    Parameters
    ----------
    dtype : str
    setting : Setting
    supports : set of str
        Of ``FEATURES``.
    seeds : sequence of int
        The first one has the kinds of inputs that need no repetition.
    """
    given = set(supports)
    if setting.both:
        given.add("both")
    if setting.alignment == "bottom-right":  # the first of more queries than keys see none
        given.add("last")
    for place, seed in enumerate(seeds):
        rng = np.random.default_rng((seed, 0))
        sizes = _PLAIN[place % len(_PLAIN)]
        yield _case(f"random/{seed}", "plain", dtype, setting, normal(rng, sizes))
        yield _case(f"lattice/{seed}", "plain", dtype, setting, lattice(rng, _LATTICE))
        if place == 0:
            for name, made in (
                ("rising", staircase(rng, _LATTICE)),
                ("falling", staircase(rng, _LATTICE, rising=False)),
                ("overflow", overflowing(rng, _LATTICE)),
            ):
                yield _case(f"{name}/{seed}", "plain", dtype, setting, made)
        for feature, table in (("dv", _WIDTHS), ("cross", _CROSS)):
            if feature in supports:
                made = normal(rng, table[place % len(table)])
                yield _case(f"random/{seed}", feature, dtype, setting, made)
        for number, (feature, name, sizes, build, needs) in enumerate(_CASES):
            if feature not in supports or not given.issuperset(needs):
                continue
            rng = np.random.default_rng((seed, 1 + number))
            kind = "random" if place % 2 else "lattice"
            made = normal(rng, sizes) if place % 2 else lattice(rng, sizes)
            label = f"{kind}/{seed}" if not name else f"{name} {kind}/{seed}"
            yield _case(label, feature, dtype, setting, made, **build(rng, setting, made))
            if feature == "softcap" and place == 0:
                for other in ("causal", "bool_mask"):
                    if other in supports:
                        more = {"causal": True} if other == "causal" else build_mask(rng, made)
                        joined = f"{other} {kind}/{seed}"
                        yield _case(joined, feature, dtype, setting, made, softcap=4.0, **more)


def build_mask(rng: np.random.Generator, x: Heads) -> dict[str, Any]:
    """Return a boolean mask for heads, as an option of a case."""
    return {"mask": random_mask(rng, _shape(x))}


def given_cases(
    dtype: str, setting: Setting, inputs: Sequence[tuple[Any, Any, Any]]
) -> Iterator[Case]:
    """Yield a plain case for each (q, k, v) of shape (B, H, n, d) that a caller brings."""
    for i, x in enumerate(inputs):
        q, k, v = (np.asarray(y, np.float64) for y in x)
        if not q.ndim == k.ndim == v.ndim == 4:
            raise ValueError(
                f"inputs must hold q, k and v of shape (batch, heads, n, d), got {q.shape}, "
                f"{k.shape} and {v.shape}; add axes"
            )
        yield _case(f"given/{i}", "plain", dtype, setting, (q, k, v))


def replaced(case: Case, name: str, **changes: Any) -> Case:
    """Return a case with other parts, under another name."""
    return replace(case, id=f"{case.id} {name}", **changes)
