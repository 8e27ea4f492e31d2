"""What the attention of a model was asked in one forward pass, as heads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.arguments import as_integer
from ..heads.container import Heads
from ..zoo.base import make_method
from .attention_interface import (
    REGISTERED,
    Registration,
    Request,
    implementations,
    modeling,
    put,
    restore,
)
from .torch import array_of, torch

Array = NDArray[Any]
Tensor = Any

# Parts of a request that heads cannot hold.
LEFT_OUT = ("softcap", "sink", "bias")
_NAME = "sketchattn_capture"


@dataclass(frozen=True)
class Layer:
    """Hold one call of attention: the number of its layer, the name of its module, the request."""

    number: int
    module: str
    asked: Request


class _Recorder(Registration):
    """Answer as another registration does, and keep what was asked."""

    def __init__(self, runs: Registration) -> None:
        super().__init__(_NAME, runs.method, runs.rng, runs.decode)
        self.runs = runs
        self.asked: list[tuple[Any, Request]] = []

    def answer(self, module: Any, asked: Request) -> tuple[Tensor, None]:
        self.asked.append((module, asked))
        return self.runs.answer(module, asked)


def record(model: Any, inputs: Mapping[str, Any]) -> list[Layer]:
    """Run a model once and return its calls of attention, in order.

    It computes exact attention, or what it runs already if that is one of ours.
    """
    if isinstance(model, modeling.PreTrainedModel) and model.training:
        raise ValueError("model must be in evaluation mode, got training; call model.eval()")
    plain = Registration(_NAME, make_method("exact", {}))
    before = implementations(model) if isinstance(model, modeling.PreTrainedModel) else []
    running = before[0][1] if before else None
    recorder = _Recorder(REGISTERED.get(str(running), plain))
    put(_NAME, recorder)
    try:
        recorder.switch(model)
        with torch.no_grad():
            model(**inputs)
    finally:
        restore(before)
        put(_NAME, plain)  # what was recorded is not kept alive
    if not recorder.asked:
        raise ValueError(
            f"model must take its attention from the interface of transformers, got "
            f"{type(model).__name__}, which did not ask for any; use another model"
        )
    names = {part: name for name, part in model.named_modules()}
    numbers: list[Any] = [getattr(module, "layer_idx", None) for module, _ in recorder.asked]
    if None in numbers or len(set(numbers)) < len(numbers):
        numbers = list(range(len(numbers)))
    return [
        Layer(number, names.get(module, ""), asked)
        for number, (module, asked) in zip(numbers, recorder.asked, strict=True)
    ]


def heads_of(
    recorded: Sequence[Layer],
    layers: Sequence[int] | None,
    heads: Sequence[int] | None,
    leave_out: Sequence[str],
    description: str,
    metadata: Mapping[str, str],
) -> Heads:
    """Return the chosen layers and heads of what was recorded."""
    by_number = {layer.number: layer for layer in recorded}
    wanted = list(by_number) if layers is None else _numbers(layers, "layers", by_number)
    problems = [_problem(by_number[number], heads, leave_out) for number in wanted]
    for number, problem in zip(wanted, problems, strict=True):
        for what, first, this in zip(
            ("shape", "scale", "causality"), problems[0].signature, problem.signature, strict=True
        ):
            if this != first:
                raise ValueError(
                    f"layers must share one {what}, got {first} in layer {wanted[0]} and {this} "
                    f"in layer {number}; capture them apart, with layers=[...]"
                )
    entries = problems[0].q.shape[0]
    names = [
        f"{f'entry{entry}.' if entries > 1 else ''}layer{number}.head{head}"
        for entry in range(entries)
        for number, problem in zip(wanted, problems, strict=True)
        for head in problem.heads
    ]
    q, k, v, masks = (
        np.stack([getattr(problem, name) for problem in problems], axis=1)
        for name in ("q", "k", "v", "key_mask")
    )
    q, k, v, masks = (x.reshape((-1, *x.shape[3:])) for x in (q, k, v, masks))
    left = sorted({word for problem in problems for word in problem.left_out})
    modules = {f"layer{number}": by_number[number].module for number in wanted}
    return Heads(
        q,
        k,
        v,
        scale=problems[0].scale,
        causal=problems[0].causal,
        key_mask=None if masks.all() else masks,
        names=names,
        description=description,
        metadata={
            **metadata,
            "key_heads": str(problems[0].key_heads),
            "modules": json.dumps(modules),
            **({"left_out": ", ".join(left)} if left else {}),
        },
    )


@dataclass(frozen=True)
class _Problem:
    """Hold the chosen heads of one layer: q (B, h, n_q, d), k, v, key_mask (B, h, n_k)."""

    q: Array
    k: Array
    v: Array
    key_mask: Array
    scale: float
    causal: Any
    heads: list[int]
    key_heads: int
    left_out: list[str]

    @property
    def signature(self) -> tuple[object, ...]:
        return (self.q.shape, self.k.shape, self.v.shape), self.scale, self.causal


def _problem(layer: Layer, heads: Sequence[int] | None, leave_out: Sequence[str]) -> _Problem:
    """Return the heads of a layer; refuse what heads cannot hold."""
    asked = layer.asked
    present = {"softcap": asked.softcap > 0, "sink": asked.sink is not None}
    present["bias"] = asked.bias is not None
    for word in LEFT_OUT:
        if present[word] and word not in leave_out:
            raise ValueError(
                f"attention must be a softmax of scaled logits, got a {word} in layer "
                f"{layer.number}, which heads do not hold; pass leave_out=[{word!r}] for heads "
                f"without it, or choose other layers"
            )
    seen = asked.seen()
    if seen is None:
        raise ValueError(
            f"attention must be causal, padded or plain, got another mask in layer "
            f"{layer.number}, such as a window or packed sequences; choose other layers, or "
            f"inputs that fit into the window"
        )
    entries, h, _, d = asked.query.shape
    chosen = list(range(h)) if heads is None else _numbers(heads, "heads", range(h))
    shared = np.asarray(chosen) // (h // asked.key.shape[1])
    q = array_of(asked.query)[:, chosen]
    k, v = (array_of(x)[:, shared, : seen.keys] for x in (asked.key, asked.value))
    kept = np.ones((1, seen.keys), bool) if seen.key_mask is None else seen.key_mask
    return _Problem(
        q,
        k,
        v,
        np.broadcast_to(kept[:, None], (entries, len(chosen), seen.keys)),
        d**-0.5 if asked.scale is None else asked.scale,
        seen.causal,
        chosen,
        asked.key.shape[1],
        [word for word in LEFT_OUT if present[word]],
    )


def _numbers(wanted: Sequence[int], name: str, known: Any) -> list[int]:
    """Return distinct numbers that exist."""
    found = [as_integer(x, name, "give numbers from 0") for x in wanted]
    for x in found:
        if x not in known:
            raise ValueError(
                f"{name} must be among {', '.join(map(str, known))}, got {x}; numbers start at 0"
            )
    if not found or len(set(found)) < len(found):
        raise ValueError(f"{name} must be distinct and at least one, got {found}; correct them")
    return found
