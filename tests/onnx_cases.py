"""ONNX's conformance cases of the operator Attention, opsets 23 to 25, and how to answer them.

A case is data: `load_cases` reads it, `prepare` turns it into one call of attention on unpacked
heads, `answer` packs what a program returns for that call into the outputs of the operator, and
`mismatches` compares them with the expected ones under ONNX's own tolerances.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sketchattn.operators.reference import (
    Stage,
    masked_logits,
    round_to,
    softmax_rows,
    visible,
)

Array = NDArray[Any]

INPUTS = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
OUTPUTS = ("Y", "present_key", "present_value", "qk_matmul_output")
STAGES: tuple[Stage, ...] = ("scaled", "capped", "masked")


@dataclass(frozen=True)
class Case:
    """One case: arrays by the name of their slot, absent ones left out."""

    name: str
    opset: int
    attributes: dict[str, Any]
    inputs: dict[str, Array]
    outputs: dict[str, Array]
    rtol: float
    atol: float


@dataclass(frozen=True)
class Call:
    """One call of attention: q (B, H, n_q, d), k (B, H_kv, n_k, d), v (B, H_kv, n_k, d_v).

    Query row i of batch element b has position offset[b] + i, for causality and window alike.
    """

    q: Array
    k: Array
    v: Array
    scale: float
    causal: bool
    offset: Array  # (B,) int64
    window: tuple[int, int]
    softcap: float
    key_mask: Array | None  # (B, n_k) bool
    attn_mask: Array | None  # broadcastable to (B, H, n_q, n_k), bool or additive

    @property
    def left(self) -> int | None:
        return None if self.window[0] < 0 else self.window[0]

    @property
    def right(self) -> int | None:
        sides = [0] * self.causal + [side for side in self.window[1:] if side >= 0]
        return min(sides, default=None)

    @property
    def group(self) -> int:
        return int(self.q.shape[1] // self.k.shape[1])

    def mask_of(self, b: int, h: int) -> Array | None:
        """Return the mask (n_q, n_k) of one head; numbers are widened to float64."""
        if self.attn_mask is None:
            return None
        shape = (*self.q.shape[:3], self.k.shape[2])
        mask: Array = np.broadcast_to(self.attn_mask, shape)[b, h]
        return mask if mask.dtype == np.bool_ else mask.astype(np.float64)


def only_attention(package: ModuleType) -> None:
    importlib.import_module(f"{package.__name__}.attention")


def load_cases() -> list[Case]:
    """Return the cases of the operator itself, without their copies as decomposed graphs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case import node as nodes
        from onnx.helper import get_attribute_value

        # ONNX computes the cases of every operator that it imports.
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(nodes, "import_recursive", only_attention)
            collected = nodes.collect_testcases("Attention")
    cases = []
    for case in collected:
        if "expanded" in case.name:
            continue
        assert case.model is not None
        assert case.data_sets is not None
        (node,) = case.model.graph.node
        ((inputs, outputs),) = case.data_sets
        cases.append(
            Case(
                name=case.name,
                opset=case.model.opset_import[0].version,
                attributes={a.name: get_attribute_value(a) for a in node.attribute},
                inputs=_by_slot(INPUTS, node.input, inputs),
                outputs=_by_slot(OUTPUTS, node.output, outputs),
                rtol=case.rtol,
                atol=case.atol,
            )
        )
    return cases


def _by_slot(slots: tuple[str, ...], names: Any, arrays: Any) -> dict[str, Array]:
    # Arrays are listed for the slots that have a name; an empty name is an absent argument.
    present = [slot for slot, name in zip(slots, names, strict=False) if name]
    return {slot: np.asarray(x) for slot, x in zip(present, arrays, strict=True)}


def unpack(x: Array, heads: int | None) -> Array:
    """Return (B, h, n, d) from (B, n, h d), or from (B, h, n, d) as it is."""
    if x.ndim == 4:
        return x
    assert heads is not None
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def prepare(case: Case) -> Call:
    """Return the call of attention that a case asks for."""
    get, inputs = case.attributes.get, case.inputs
    q = unpack(inputs["Q"], get("q_num_heads"))
    k, v = (unpack(inputs[x], get("kv_num_heads")) for x in ("K", "V"))
    past = 0
    if "past_key" in inputs:
        past = inputs["past_key"].shape[2]
        k = np.concatenate([inputs["past_key"], k], axis=2)
        v = np.concatenate([inputs["past_value"], v], axis=2)
    (batch, _, n_q, d), n_k = q.shape, k.shape[2]

    offset = np.full(batch, past, dtype=np.int64)
    key_mask = None
    if "nonpad_kv_seqlen" in inputs:
        valid = inputs["nonpad_kv_seqlen"].reshape(batch)
        offset = valid - n_q
        key_mask = np.arange(n_k) < valid[:, None]

    mask = inputs.get("attn_mask")
    if mask is not None and mask.shape[-1] < n_k:  # padded, never broadcast along the keys
        fill: Any = False if mask.dtype == np.bool_ else -np.inf
        pad = np.full((*mask.shape[:-1], n_k - mask.shape[-1]), fill, dtype=mask.dtype)
        mask = np.concatenate([mask, pad], axis=-1)

    return Call(
        q=q,
        k=k,
        v=v,
        scale=float(get("scale", d**-0.5)),
        causal=bool(get("is_causal", 0)),
        offset=offset,
        window=(int(get("left_window_size", -1)), int(get("right_window_size", -1))),
        softcap=float(get("softcap", 0.0)),
        key_mask=key_mask,
        attn_mask=mask,
    )


def qk_output(call: Call, mode: int) -> Array:
    """Return qk_matmul_output in float64: logits scaled, capped, masked (0, 1, 2); softmax (3)."""
    batch, heads, n_q, _ = call.q.shape
    n_k = call.k.shape[2]
    result = np.empty((batch, heads, n_q, n_k))
    for b, h in np.ndindex(batch, heads):
        mask = call.mask_of(b, h)
        seen = visible(
            0,
            n_q,
            n_k,
            first=int(call.offset[b]),
            left=call.left,
            right=call.right,
            key_mask=None if call.key_mask is None else call.key_mask[b],
            mask=mask,
        )
        logits = masked_logits(
            call.q[b, h].astype(np.float64),
            call.k[b, h // call.group].astype(np.float64),
            scale=call.scale,
            softcap=call.softcap,
            bias=None if mask is None or mask.dtype == np.bool_ else mask,
            seen=seen,
            stage=STAGES[min(mode, 2)],
        )
        result[b, h] = softmax_rows(logits, seen)[0] if mode == 3 else logits
    return result


def answer(
    case: Case,
    attend: Callable[[Call], Array],
    mutate: Callable[[Call], Call] = lambda call: call,
) -> dict[str, Array]:
    """Return the outputs of the operator when ``attend`` computes (B, H, n_q, d_v).

    The attribute softmax_precision asks for a softmax in at least some precision; whether the
    answer is precise enough is for the comparison to say.
    """
    call = mutate(prepare(case))
    y = attend(call)
    if case.inputs["Q"].ndim == 3:
        y = y.swapaxes(1, 2).reshape(y.shape[0], y.shape[2], -1)
    outputs = {"Y": y}
    if "present_key" in case.outputs:
        outputs |= {"present_key": call.k, "present_value": call.v}
    if "qk_matmul_output" in case.outputs:
        mode = case.attributes.get("qk_matmul_output_mode", 0)
        outputs["qk_matmul_output"] = round_to(qk_output(call, mode), call.q.dtype)
    return outputs


def mismatches(case: Case, outputs: dict[str, Array]) -> list[str]:
    """Name the outputs that differ from the expected ones in dtype, shape or value."""
    assert outputs.keys() == case.outputs.keys()
    wrong = []
    for name, want in case.outputs.items():
        got = outputs[name]
        # Expected values of half precisions were computed in that precision; bfloat16 keeps 8 bits.
        rtol = max(case.rtol, 2.0**-6) if want.dtype.name == "bfloat16" else case.rtol
        if (
            got.dtype != want.dtype
            or got.shape != want.shape
            or not np.allclose(
                got.astype(np.float64), want.astype(np.float64), rtol=rtol, atol=case.atol
            )
        ):
            wrong.append(name)
    return wrong
