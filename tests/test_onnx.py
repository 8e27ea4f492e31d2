"""ONNX's conformance suite of Attention, through the public function and through the loops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from naive import naive_attention
from numpy.typing import NDArray
from onnx_cases import Call, Case, answer, load_cases, mismatches, prepare

import sketchattn as sa
from sketchattn.operators.reference import round_to

Array = NDArray[Any]

CASES = load_cases()


def public(call: Call, compute_dtype: Any) -> Array:
    positions = call.causal or call.window != (-1, -1)
    out: Array = sa.attention(
        call.q,
        call.k,
        call.v,
        "exact",
        scale=call.scale,
        causal="top-left" if call.causal else False,
        offset=call.offset if positions else None,
        window=call.window,
        softcap=call.softcap,
        key_mask=call.key_mask,
        attn_mask=call.attn_mask,
        enable_gqa=True,
        compute_dtype=compute_dtype,
    )
    return out


def reference_grade(call: Call) -> Array:
    return public(call, np.float64)


def fast(call: Call) -> Array:
    return public(call, None)


def loops(call: Call) -> Array:
    out = np.empty((*call.q.shape[:3], call.v.shape[3]))
    for b, h in np.ndindex(*call.q.shape[:2]):
        kv = h // call.group
        _, out[b, h], _ = naive_attention(
            call.q[b, h],
            call.k[b, kv],
            call.v[b, kv],
            scale=call.scale,
            first=int(call.offset[b]),
            left=call.left,
            right=call.right,
            softcap=call.softcap,
            key_mask=None if call.key_mask is None else call.key_mask[b],
            mask=call.mask_of(b, h),
        )
    return round_to(out, call.q.dtype)


def test_the_suite_is_complete() -> None:
    assert len(CASES) == 93
    assert Counter(case.opset for case in CASES) == {23: 69, 24: 13, 25: 11}
    kinds = Counter(case.inputs["Q"].dtype.name for case in CASES)
    assert kinds == {"float32": 82, "float16": 6, "bfloat16": 5}


@pytest.mark.interpreted
@pytest.mark.parametrize("attend", [reference_grade, fast, loops], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_conformance(case: Case, attend: Callable[[Call], Array]) -> None:
    assert mismatches(case, answer(case, attend)) == []


def change(**changes: Any) -> Callable[[Call], Call]:
    return lambda call: replace(call, **changes)


MUTANTS: dict[str, Callable[[Call], Call]] = {
    "mean of V": lambda call: replace(call, q=np.zeros_like(call.q)),
    "scale 1/d": lambda call: replace(call, scale=1.0 / call.q.shape[3]),
    "scale +1 %": lambda call: replace(call, scale=1.01 * call.scale),
    "softcap ignored": change(softcap=0.0),
    "causal ignored": change(causal=False),
    "offset always 0": lambda call: replace(call, offset=np.zeros_like(call.offset)),
    "mask ignored": change(attn_mask=None),
    "window ignored": change(window=(-1, -1)),
    "V rolled by one key": lambda call: replace(call, v=np.roll(call.v, 1, axis=2)),
    "kv heads rolled": lambda call: replace(
        call, k=np.roll(call.k, 1, axis=1), v=np.roll(call.v, 1, axis=1)
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_suite_rejects(mutant: str) -> None:
    # Judged on Y alone: a wrong program must not be rejected for an output that is beside it.
    passed = sum(
        "Y" not in mismatches(case, answer(case, reference_grade, MUTANTS[mutant]))
        for case in CASES
    )
    assert passed < len(CASES)


def test_offsets_and_masks_of_the_cases_are_what_the_operator_says() -> None:
    by_name = {case.name: prepare(case) for case in CASES}
    past = by_name["test_attention_4d_causal_with_past_and_present"]
    assert past.offset.tolist() == [3, 3]
    assert past.k.shape[2] == 7
    empty = by_name["test_attention_4d_causal_nonpad_negative_offset_structural_empty"]
    assert empty.offset.tolist() == [-2]
    padded = by_name["test_attention_4d_diff_heads_mask4d_padded_kv"]
    assert padded.attn_mask is not None
    assert padded.attn_mask.shape == (2, 3, 4, 6)
    assert np.all(np.isneginf(padded.attn_mask[..., 4:]))
