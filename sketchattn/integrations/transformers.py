"""Attention of this library in models of transformers, and heads of their attention as data.

Imports ``functional`` and what is below.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.arguments import as_integer
from ..base.draws import Rng
from ..heads.container import Heads
from ..zoo.base import make_method
from .attention_interface import Registration, add, check_options, hf, quiet_logging
from .recording import LEFT_OUT, heads_of, record
from .torch import torch

if TYPE_CHECKING:
    from ..zoo.base import Method


def register(
    name: str = "sketchattn",
    method: str | Method = "exact",
    *,
    rng: Rng = None,
    decode: str = "method",
    model: Any = None,
    **parameters: Any,
) -> Registration:
    """Register attention, exact or approximate, and the mask it needs under one name.

    ``model.set_attn_implementation(name)`` makes a model compute ``O = Ahat V`` with it, and
    ``from_pretrained(..., attn_implementation=name)`` loads one that does.

    Parameters
    ----------
    name : str, default "sketchattn"
        Letters, digits, ``-`` and ``_``.  A name that was registered here before is replaced,
        for models that run it already too.
    method : str or Method, default "exact"
        As for ``sketchattn.attention``; parameters follow as keywords (``rank=64``).
    rng : None, int or numpy.random.Generator
        Randomness of the method.  With an integer every (layer, batch entry, head) has a stream
        of its own, the same in each forward pass; otherwise each call draws anew.
    decode : {"method", "exact"}
        What computes the steps of a decoder with fewer queries than keys (generation, the later
        chunks of a prompt): the method, or the exact attention.  ``exact_calls`` counts the
        latter.
    model : PreTrainedModel, optional
        A model to switch to ``name``.
    **parameters
        Parameters of the method.

    Returns
    -------
    Registration
        With ``calls``, the number of calls so far: 0 after a forward pass means that the model
        does not use it.  ``switch(model)`` switches another model.

    Raises
    ------
    ValueError, TypeError
        For a name that is taken or that transformers understands in its own way, for a model that
        has its own attention and would ignore this one, and for what the method refuses.  In a
        forward pass: for dropout, and for masks and options that the method cannot honour.

    Notes
    -----
    The exact method honours whatever models pass: masks, windows, packed sequences, static
    caches, ``softcap``, attention sinks, position biases and grouped keys.  Other methods get
    causality and key padding, which are read off the mask exactly, and refuse any other mask.
    Tensors are float32, float64, float16 or bfloat16 on the CPU; the output is (B, n_q, H, d_v).

    Examples
    --------
    >>> import torch, transformers
    >>> from sketchattn.integrations.transformers import register
    >>> size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> config = transformers.BertConfig(vocab_size=9, intermediate_size=16, **size)
    >>> model = transformers.BertModel(config).eval()
    >>> registered = register(method="skeinformer", rank=2, rng=0, model=model)
    >>> with torch.no_grad():
    ...     hidden = model(torch.arange(8)[None]).last_hidden_state
    >>> tuple(hidden.shape), registered.calls
    ((1, 8, 16), 1)
    """
    check_options(rng, decode)
    registration = Registration(name, make_method(method, parameters), rng, decode)
    add(registration)
    if model is not None:
        registration.switch(model)
    return registration


def capture(
    model: Any,
    inputs: Any,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    *,
    leave_out: Sequence[str] = (),
    description: str = "",
) -> Heads:
    """Run a model once and return the queries, keys and values of its attention as heads.

    They are what attention was asked: after projections, rotary embeddings and normalisation,
    with its scale, causality and key mask.  ``sketchattn.write_heads`` writes them, and
    ``sketchattn.study`` takes them as they are.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode.  It is as before afterwards.
    inputs : mapping, tensor or sequence of int
        Arguments of the model, as tokenizers make them, or token ids (n,) or (B, n).
    layers : sequence of int, optional
        By the number that the model gives them, or where it gives none or one twice (as with an
        encoder beside a decoder) by the order in which they run, from 0; all by default.
    heads : sequence of int, optional
        Query heads of each layer; all by default.
    leave_out : sequence of {"softcap", "sink", "bias"}
        Heads files do not know these; a layer that has one is refused unless it is named here.
        The heads are then those of the same queries, keys and values without it.
    description : str
        What the heads are.

    Returns
    -------
    Heads
        Named "layer3.head5"; with several batch entries, "entry0.layer3.head5".  A key head that
        is shared stands beside each of its query heads.  Padded tokens are there, masked as keys.
        Halves keep their precision, bfloat16 is widened to float32.  The metadata say which
        module a layer is, and ``key_heads``.

    Raises
    ------
    ValueError, TypeError
        For a model that is training or has its own attention, numbers of layers and heads that
        do not exist, layers that differ in shape, scale or causality, and attention that is more
        than a softmax of causal, padded or plain logits (windows, packed sequences).

    Examples
    --------
    >>> import transformers
    >>> from sketchattn.integrations.transformers import capture
    >>> size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    >>> size |= {"intermediate_size": 16, "num_key_value_heads": 2, "vocab_size": 9}
    >>> model = transformers.LlamaModel(transformers.LlamaConfig(**size)).eval()
    >>> heads = capture(model, [1, 5, 3, 8, 2, 7], layers=[1], heads=[0, 3])
    >>> heads.names, heads.causal, heads.metadata["key_heads"]
    (('layer1.head0', 'layer1.head3'), True, '2')
    """
    for word in leave_out:
        if word not in LEFT_OUT:
            raise ValueError(
                f"leave_out must hold some of {', '.join(LEFT_OUT)}, got {word!r}; drop it"
            )
    recorded = record(model, _inputs(inputs))
    name = str(getattr(model.config, "_name_or_path", ""))
    return heads_of(
        recorded,
        layers,
        heads,
        leave_out,
        description,
        {
            "model": Path(name).name if os.path.isdir(name) else name,
            "architecture": type(model).__name__,
            "transformers": str(hf.__version__),
            "torch": str(torch.__version__),
        },
    )


def capture_text(
    folder: str | PathLike[str],
    text: str,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    *,
    max_length: int = 512,
    leave_out: Sequence[str] = (),
) -> Heads:
    """Load a model and its tokenizer from a folder and return its heads on a text.

    Nothing is fetched: the folder holds what ``save_pretrained`` of both writes.  Of a model with
    encoder and decoder, the encoder runs.

    Parameters
    ----------
    folder : str or path
        With ``config.json``, weights and the files of a tokenizer.
    text : str
        Only its first tokens are read.
    layers, heads, leave_out
        As for `capture`.
    max_length : int, default 512
        Tokens to keep, those that the tokenizer adds included; at most the positions of the model.

    Returns
    -------
    Heads

    Raises
    ------
    ValueError, TypeError
        For a folder without a model, an empty text, a length that the model has no positions for,
        and what `capture` refuses.
    """
    path = Path(os.path.expanduser(folder))
    if not (path / "config.json").is_file():
        raise ValueError(
            f"the model must be a folder with config.json, got {str(path)!r}; "
            f"save one there with model.save_pretrained and tokenizer.save_pretrained"
        )
    length = as_integer(max_length, "max_length", "give a number of tokens")
    with quiet_logging():
        config = hf.AutoConfig.from_pretrained(path, local_files_only=True)
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if length < 1 or (most is not None and length > most):
        limit = "" if most is None else f" and at most {most}, the positions of this model"
        raise ValueError(f"max_length must be at least 1{limit}, got {length}; change it")
    with quiet_logging():
        tokenizer = hf.AutoTokenizer.from_pretrained(path, local_files_only=True)
        model = hf.AutoModel.from_pretrained(path, local_files_only=True).eval()
        tokens = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
    if not text.strip() or tokens["input_ids"].shape[1] == 0:
        raise ValueError("text must hold at least one token, got none; give another text")
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    return capture(
        model,
        tokens,
        layers,
        heads,
        leave_out=leave_out,
        description=f"{path.resolve().name}, {tokens['input_ids'].shape[1]} tokens of a text",
    )


def _inputs(inputs: Any) -> dict[str, Any]:
    """Return the arguments of a model."""
    if isinstance(inputs, Mapping):
        return dict(inputs)
    try:
        ids = torch.as_tensor(inputs)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"inputs must be a mapping of arguments or token ids, got {type(inputs).__name__}; "
            f"use what a tokenizer returns with return_tensors='pt'"
        ) from error
    if ids.ndim not in (1, 2):
        raise ValueError(
            f"inputs must be token ids (n,) or (batch, n), got shape {tuple(ids.shape)}; "
            f"pass a mapping of arguments for anything else"
        )
    return {"input_ids": ids[None] if ids.ndim == 1 else ids}


__all__ = [
    "Registration",
    "capture",
    "capture_text",
    "register",
]


def __dir__() -> list[str]:
    return __all__
