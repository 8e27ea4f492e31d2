"""Wrong programs: what each would answer, so that a check can prove that it would see them.

Each is the right program with one part replaced, and stands for a mistake that was made somewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dense import Parts, combine, logits, output, scaled_logits, softmax
from .inputs import Case

Array = NDArray[Any]

# A case rejects a wrong answer that is this many tolerances away.
REJECTS = 5.0
# Keys of a tile, whose last and incomplete one a kernel may drop.
TILE = 64


@dataclass(frozen=True)
class Mutant:
    """Hold one wrong program.

    Attributes
    ----------
    name : str
    feature : str
        The feature that it gets wrong, "plain" for attention itself.
    matters : callable
        Whether it differs from the right program on a case.
    answer : callable
        Its output.
    """

    name: str
    feature: str
    matters: Callable[[Case], bool]
    answer: Callable[[Case], Array]


def _always(case: Case) -> bool:
    return bool(case.k.shape[2] > 1)


def _of_parts(
    name: str,
    feature: str,
    change: Callable[[Case, Parts], Parts],
    matters: Callable[[Case], bool] = _always,
) -> Mutant:
    """Return the program that takes other parts."""
    return Mutant(name, feature, matters, lambda c: output(change(c, c.parts())))


def _of_matrix(
    name: str,
    feature: str,
    matrix: Callable[[Case, Parts], Array],
    matters: Callable[[Case], bool] = _always,
) -> Mutant:
    """Return the program that computes another matrix of the same keys."""

    def answer(case: Case) -> Array:
        p = case.parts()
        return combine(matrix(case, p), p)

    return Mutant(name, feature, matters, answer)


def _seen(name: str, feature: str, change: Callable[[Case], Case]) -> Mutant:
    """Return the program that runs a case with other options."""
    return _of_parts(
        name,
        feature,
        lambda c, p: change(c).parts(),
        lambda c: bool(np.any(change(c).seen() != c.seen())),
    )


def _without_tail(case: Case, p: Parts, count: int) -> Parts:
    seen = p.seen.copy()
    seen[..., p.k.shape[-2] - count :] = False
    return replace(p, seen=seen)


def _tail(case: Case) -> int:
    return int(case.k.shape[2] % TILE) if case.k.shape[2] > TILE else 0


def _columns(case: Case, p: Parts) -> Array:
    """Return the softmax over queries instead of keys."""
    x = np.swapaxes(logits(p), -1, -2)
    return np.swapaxes(softmax(x, np.swapaxes(p.seen, -1, -2)), -1, -2)


def _unnormalised(case: Case, p: Parts) -> Array:
    """Return exponentials, shifted by the largest of each row, that nothing divides."""
    x = np.where(p.seen, logits(p), -np.inf)
    top = x.max(axis=-1, keepdims=True, initial=-np.inf)
    powers: Array = np.exp(x - np.where(np.isneginf(top), 0, top))
    return powers


def _swapped(case: Case, p: Parts) -> Parts:
    return replace(p, q=p.k, k=p.q)


def _tiled(case: Case, p: Parts) -> Parts:
    repeats = (1, case.group, 1, 1)
    return replace(p, k=np.tile(case.k, repeats), v=np.tile(case.v, repeats))


def _cap_after_mask(case: Case, p: Parts) -> Array:
    """Cap logits that are -inf already: hidden keys get the weight of -c."""
    x = np.where(p.seen, scaled_logits(p), -np.inf)
    return softmax(p.softcap * np.tanh(x / p.softcap), np.ones_like(p.seen), p.sink)


def _shifted(case: Case, by: int) -> Case:
    """Return a case whose causal rows see keys further on, as a mask."""
    n_q, n_k = case.q.shape[2], case.k.shape[2]
    seen = np.arange(n_k) <= np.arange(n_q)[:, None] + case.first + by
    mask = case.mask
    both = seen if mask is None else np.where(seen, mask, False if mask.dtype == bool else -np.inf)
    return replace(case, causal=False, mask=both)


def _other(case: Case) -> Case:
    other = "top-left" if case.alignment == "bottom-right" else "bottom-right"
    return replace(case, alignment=other)


def _wider_window(case: Case) -> Case:
    left, right = case.window or (0, 0)
    return replace(case, window=(left + 1, right))


def _inverted(case: Case) -> Case:
    return replace(case, mask=None if case.mask is None else ~case.mask)


def _has(feature: str) -> Callable[[Case], bool]:
    return lambda case: case.feature == feature


def _is_bool(case: Case) -> bool:
    return case.mask is not None and case.mask.dtype == np.bool_


def _other_rows(case: Case) -> str:
    return "mean" if case.empty_row == "zero" else "zero"


def _times(factor: float) -> Callable[[Case, Parts], Parts]:
    return lambda c, p: replace(p, scale=p.scale * factor)


def _base_two(case: Case, p: Parts) -> Array:
    return softmax(np.log(2.0) * logits(p), p.seen, p.sink)


_ALL: tuple[Mutant, ...] = (
    _of_matrix("zeros", "plain", lambda c, p: np.zeros(p.seen.shape)),
    _of_matrix("mean of V", "plain", lambda c, p: softmax(np.zeros(p.seen.shape), p.seen)),
    _of_parts("scale 1/d", "plain", lambda c, p: replace(p, scale=1 / p.q.shape[-1])),
    _of_parts("scale 1", "plain", lambda c, p: replace(p, scale=1.0)),
    _of_parts("scale wrong by 1 %", "plain", _times(1.01)),
    _of_matrix("exp2 for exp", "plain", _base_two),
    _of_parts("V shifted by a row", "plain", lambda c, p: replace(p, v=np.roll(p.v, 1, axis=-2))),
    _of_parts(
        "Q and K swapped",
        "plain",
        _swapped,
        lambda c: _always(c) and c.q.shape[2] == c.k.shape[2],
    ),
    _of_matrix("softmax over queries", "plain", _columns),
    _of_matrix("rows not normalised", "plain", _unnormalised),
    _of_parts("last key dropped", "plain", lambda c, p: _without_tail(c, p, 1)),
    _of_parts(
        "last incomplete tile dropped",
        "plain",
        lambda c, p: _without_tail(c, p, _tail(c)),
        lambda c: _tail(c) > 0,
    ),
    _of_parts(
        "heads of K and V rolled",
        "plain",
        lambda c, p: replace(p, k=np.roll(p.k, 1, axis=1), v=np.roll(p.v, 1, axis=1)),
        lambda c: c.q.shape[1] > 1 and c.group == 1,
    ),
    _of_parts(
        "batches mixed",
        "plain",
        lambda c, p: replace(p, k=np.roll(p.k, 1, axis=0), v=np.roll(p.v, 1, axis=0)),
        lambda c: c.q.shape[0] > 1,
    ),
    _of_parts(
        "scale ignored",
        "scale",
        lambda c, p: replace(p, scale=p.q.shape[-1] ** -0.5),
        lambda c: c.scale is not None,
    ),
    _seen("causal ignored", "causal", lambda c: replace(c, causal=False)),
    _seen("causal one key further", "causal", lambda c: _shifted(c, 1) if c.causal else c),
    _seen("causal one key short", "causal", lambda c: _shifted(c, -1) if c.causal else c),
    _seen("causal at the other corner", "causal", _other),
    _seen("mask ignored", "bool_mask", lambda c: replace(c, mask=None) if _is_bool(c) else c),
    _seen("mask inverted", "bool_mask", lambda c: _inverted(c) if _is_bool(c) else c),
    _of_parts(
        "added mask ignored",
        "additive_mask",
        lambda c, p: replace(c, mask=None).parts(),
        _has("additive_mask"),
    ),
    _of_parts(
        "bias multiplied by the scale",
        "additive_mask",
        lambda c, p: replace(p, bias=None if p.bias is None else p.scale * p.bias),
        _has("additive_mask"),
    ),
    _seen("padding of keys ignored", "key_mask", lambda c: replace(c, key_mask=None)),
    _seen("window ignored", "window", lambda c: replace(c, window=None)),
    _seen("window one key wider", "window", lambda c: c if c.window is None else _wider_window(c)),
    _of_parts(
        "softcap ignored",
        "softcap",
        lambda c, p: replace(p, softcap=0.0),
        _has("softcap"),
    ),
    _of_matrix(
        "softcap after the mask",
        "softcap",
        _cap_after_mask,
        lambda c: c.softcap > 0 and not c.seen().all(),
    ),
    _of_parts("key heads tiled", "gqa", _tiled, lambda c: c.group > 1),
    _of_parts(
        "key heads rolled",
        "gqa",
        lambda c, p: replace(p, k=np.roll(p.k, c.group, axis=1), v=np.roll(p.v, c.group, axis=1)),
        lambda c: c.group > 1,
    ),
    _of_parts(
        "empty rows the other way",
        "empty_row",
        lambda c, p: replace(p, empty_row=_other_rows(c)),
        lambda c: not c.seen().any(axis=-1).all(),
    ),
    _of_parts("sink ignored", "sink", lambda c, p: replace(p, sink=None), _has("sink")),
)

MUTANTS: dict[str, Mutant] = {x.name: x for x in _ALL}


def relevant(case: Case) -> Iterator[Mutant]:
    """Yield the wrong programs that a case could tell from the right one.

    Those of attention itself, on plain cases, and those of the options that a case uses.
    """
    for mutant in _ALL:
        if mutant.feature == "plain":
            if case.feature in ("plain", "dv", "cross") and mutant.matters(case):
                yield mutant
        elif mutant.matters(case):
            yield mutant


def nearest(case: Case, out: Array, truth: Array) -> tuple[str, float] | None:
    """Return the wrong program whose answer is closest to an output, and how close.

    The distance is relative to how far that answer is from the truth: 0 is the same program,
    and 1 is no better than the truth itself.
    """
    best: tuple[str, float] | None = None
    if not np.isfinite(out).all():
        return None
    for mutant in _ALL:
        if not mutant.matters(case):
            continue
        with np.errstate(all="ignore"):
            answer = mutant.answer(case)
        far = float(np.linalg.norm(answer - truth))
        if far > 0:
            distance = float(np.linalg.norm(answer - out)) / far
            if best is None or distance < best[1]:
                best = (mutant.name, distance)
    return best
