"""Models of transformers: attention of ours computes what theirs does; heads are what it was asked."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sketchattn as sa
from sketchattn.integrations.masks import Seen, read_mask

torch: Any = pytest.importorskip("torch")
hf: Any = pytest.importorskip("transformers")
ours: Any = importlib.import_module("sketchattn.integrations.transformers")
interface: Any = importlib.import_module("sketchattn.integrations.attention_interface")
masking: Any = importlib.import_module("transformers.masking_utils")

pytestmark = pytest.mark.usefixtures("one_thread")

# Hidden states have size one after the last normalisation; each of two layers rounds a few times.
CLOSE = 1e-5
SIZE = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.25,  # so that attention is far from uniform
    "pad_token_id": 0,
}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 4}),
    "gemma2": (
        "Gemma2",
        {
            "sliding_window": 4,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 2.0,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {"sliding_window": 4, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
}


def decoder(name: str, **changes: Any) -> Any:
    """Return a small decoder with random weights."""
    prefix, special = DECODERS[name]
    torch.manual_seed(0)
    config = getattr(hf, f"{prefix}Config")(**(SIZE | special | changes))
    return getattr(hf, f"{prefix}Model")(config).eval()


def encoder(**changes: Any) -> Any:
    """Return a small encoder with random weights."""
    torch.manual_seed(0)
    size = {k: x for k, x in SIZE.items() if k != "num_key_value_heads"}
    return hf.BertModel(hf.BertConfig(**(size | changes))).eval()


def ids(batch: int = 2, n: int = 10) -> Any:
    return torch.randint(1, 99, (batch, n), generator=torch.Generator().manual_seed(3))


PADDED = torch.tensor([[1] * 10, [0, 0, 0] + [1] * 7])
MODES = ("full", "padded", "chunks", "decode", "packed", "static")


def hidden(model: Any, mode: str) -> Any:
    """Return the hidden states of unpadded positions, one after another."""
    tokens = ids()
    keep = PADDED.bool() if mode in ("padded", "decode") else torch.ones(2, 10, dtype=torch.bool)
    with torch.no_grad():
        if mode in ("full", "padded"):
            mask = PADDED if mode == "padded" else None
            return model(tokens, attention_mask=mask).last_hidden_state[keep]
        if mode == "packed":
            places = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]] * 2)
            return model(tokens, position_ids=places, use_cache=False).last_hidden_state[keep]
        known = inspect.signature(model.forward).parameters
        argument = "cache" if "cache" in known else "past_key_values"
        if mode == "static":
            cache = hf.StaticCache(config=model.config, max_cache_len=16)
        else:
            cache = hf.DynamicCache(config=model.config)
        steps = {"chunks": [6, 4], "decode": [7, 1, 1, 1], "static": [7, 2, 1]}[mode]
        found, start = [], 0
        for step in steps:
            mask = PADDED[:, : start + step] if mode == "decode" else None
            part = model(
                tokens[:, start : start + step],
                attention_mask=mask,
                use_cache=True,
                **{argument: cache},
            )
            found.append(part.last_hidden_state)
            start += step
        return torch.cat(found, dim=1)[keep]


@pytest.fixture(scope="module")
def eager() -> Any:
    """Return what the eager attention of a decoder gives in a mode."""
    known: dict[tuple[str, str], Any] = {}

    def of(name: str, mode: str) -> Any:
        if (name, mode) not in known:
            model = decoder(name)
            model.set_attn_implementation("eager")
            known[name, mode] = hidden(model, mode)
        return known[name, mode]

    return of


@pytest.mark.parametrize("mask", ["sdpa_mask", "eager_mask"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_compute_what_eager_attention_does(
    eager: Any, name: str, mode: str, mask: str
) -> None:
    model = decoder(name)
    registered = ours.register("ours", model=model)
    hf.AttentionMaskInterface.register("ours", getattr(masking, mask))
    gap = (hidden(model, mode) - eager(name, mode)).abs().max()
    assert gap <= CLOSE
    assert registered.calls >= 2
    assert registered.exact_calls == 0


def test_the_modes_are_different_problems(eager: Any) -> None:
    # What is compared above depends on the padding, on the window, the cap and the sinks.
    assert (eager("llama", "full") - eager("llama", "packed")).abs().max() > 1e-2
    for name, change in (
        ("mistral", {"sliding_window": None}),
        ("gemma2", {"attn_logit_softcapping": None}),
    ):
        model = decoder(name, **change)
        model.set_attn_implementation("eager")
        assert (hidden(model, "full") - eager(name, "full")).abs().max() > 1e-2
    model = decoder("gpt_oss")
    model.set_attn_implementation("eager")
    for layer in model.layers:
        layer.self_attn.sinks.data.fill_(-1e4)
    assert (hidden(model, "full") - eager("gpt_oss", "full")).abs().max() > 1e-2


def test_attention_without_its_mask_drops_padding(eager: Any) -> None:
    # What `register` does in one step, done by hand and half.
    both = ours.register("ours")
    hf.AttentionInterface.register("half", both)
    model = decoder("llama")
    model.set_attn_implementation("half")
    assert (hidden(model, "full") - eager("llama", "full")).abs().max() <= CLOSE
    assert (hidden(model, "padded") - eager("llama", "padded")).abs().max() > 1e-2
