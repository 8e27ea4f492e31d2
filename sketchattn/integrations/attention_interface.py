"""Attention of this library behind the interface of transformers.

What a model of transformers asks for, in its terms, is a `Request`; a `Registration` answers it
with the exact attention or with a method.
"""

from __future__ import annotations

import importlib
import re
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..base.draws import Rng, as_generator, entropy_of
from ..functional.exact import is_exact
from .masks import Seen, read_mask
from .torch import scaled_dot_product_attention as attend
from .torch import torch

if TYPE_CHECKING:
    from ..zoo.base import Method

try:
    hf: Any = importlib.import_module("transformers")
    masking: Any = importlib.import_module("transformers.masking_utils")
    modeling: Any = importlib.import_module("transformers.modeling_utils")
except ImportError as error:
    raise ImportError(
        f"sketchattn.integrations.transformers needs transformers 5, which cannot be imported "
        f"({error}); run: python -m pip install 'sketchattn[transformers]'"
    ) from error

Array = NDArray[Any]
Tensor = Any

# What models pass to every attention and what changes nothing here: a mask, if there is one,
# holds windows and packed sequences already, and positions are in the queries and keys.
HARMLESS = frozenset(
    {
        "cache_position",
        "encoder_hidden_states",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "sliding_window",
        "use_cache",
    }
)
DECODE = ("method", "exact")


@dataclass(frozen=True)
class Request:
    """What a model asks of attention in one call of one layer.

    Attributes
    ----------
    query, key, value : Tensor (B, H, n_q, d), (B, H_kv, n_k, d), (B, H_kv, n_k, d_v)
    mask : Tensor (B or 1, H or 1, n_q, n_k) or None
        Boolean, True where a query sees a key, or added to the logits.  It is the whole truth:
        causality, windows, padding and packed sequences are in it.
    decoder : bool
        Whether this attention is causal by nature.
    causal : bool
        Whether, without a mask, query i sees the keys j <= i only.
    scale : float or None
    softcap : float
    sink : Tensor (H,) or None
    bias : Tensor or None
        Added to the logits, beside the mask.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    decoder: bool
    causal: bool
    scale: float | None
    softcap: float
    sink: Tensor | None
    bias: Tensor | None

    def seen(self) -> Seen | None:
        """Return what queries see as causality and padding; None if it is something else."""
        n_q, n_k = self.query.shape[-2], self.key.shape[-2]
        if self.mask is not None:
            return _read(self.mask, self.decoder)
        if not self.causal:
            return Seen(False, None, n_k)
        # Aligned at the top left: the keys after the last query are unused slots of a cache.
        return Seen(True, None, n_q) if n_q <= n_k else Seen("top-left", None, n_k)


def read_request(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    rest: Mapping[str, Any],
) -> Request:
    """Return what the arguments of an attention function of transformers ask for.

    Raises
    ------
    ValueError, TypeError
        For dropout, a paged cache, a mask of another kind, and every argument that is not known.
    """
    if dropout:
        raise ValueError(
            f"dropout must be 0, got {dropout}: there is none here; call model.eval(), or set "
            f"the dropout of attention to 0 in the configuration of the model"
        )
    if rest.get("output_attentions"):
        raise ValueError(
            "output_attentions must be False, got True: no matrix of weights is formed; "
            "use sketchattn.integrations.transformers.capture"
        )
    own = ("is_causal", "position_bias", "s_aux", "softcap", "output_attentions")
    for name, x in rest.items():
        if x is not None and name not in HARMLESS and name not in own:
            raise TypeError(
                f"{name} must be None for this attention, got {type(x).__name__}, which it does "
                f"not know; run this model with another implementation of attention"
            )
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 4):
        shape = f" of shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else ""
        raise TypeError(
            f"attention_mask must be a tensor (batch, heads or 1, n_q, n_k), got "
            f"{type(mask).__name__}{shape}; register attention and mask under one name, with "
            f"sketchattn.integrations.transformers.register"
        )
    flag = rest.get("is_causal")
    decoder = bool(getattr(module, "is_causal", True) if flag is None else flag)
    cap = rest.get("softcap")
    return Request(
        query,
        key,
        value,
        mask,
        decoder,
        # One query is the last one: it sees every key.
        decoder and mask is None and query.shape[-2] > 1,
        None if scaling is None else float(scaling),
        0.0 if cap is None else float(cap),
        rest.get("s_aux"),
        rest.get("position_bias"),
    )


# The mask of a forward pass is one tensor for all layers of a kind, and reading it costs n_q n_k.
_last: tuple[Any, tuple[int, bool], Seen | None] | None = None


def _read(mask: Tensor, cached: bool) -> Seen | None:
    """Return `read_mask` of a tensor; the answer for the last tensor is kept."""
    global _last
    key = (0 if mask.is_inference() else mask._version, cached)
    last = _last
    if last is not None and last[0]() is mask and last[1] == key:
        return last[2]
    found = None
    if mask.shape[1] == 1 and (shown := _as_bool(mask.detach()[:, 0])) is not None:
        found = read_mask(shown.numpy(), cached=cached)
    _last = (weakref.ref(mask), key, found)
    return found


def _as_bool(mask: Tensor) -> Tensor | None:
    """Return a mask as True for visible pairs; None if it adds something else to logits."""
    if mask.dtype == torch.bool:
        return mask
    hidden = mask <= torch.finfo(mask.dtype).min
    return None if bool(((mask != 0) & ~hidden).any()) else ~hidden


class Registration:
    """Attention under a name that models of transformers know; what `register` returns.

    Attributes
    ----------
    name : str
        For ``model.set_attn_implementation(name)`` or ``attn_implementation=name``.
    method : Method
        What is computed.
    rng : None, int or numpy.random.Generator
        Its randomness.
    decode : {"method", "exact"}
        What computes the steps of a decoder with fewer queries than keys.
    calls : int
        Calls so far, one a layer and forward pass.
    exact_calls : int
        How many of them ``decode="exact"`` gave to the exact attention.
    """

    def __init__(self, name: str, method: Method, rng: Rng = None, decode: str = "method") -> None:
        self.name, self.method, self.rng, self.decode = name, method, rng, decode
        self.calls = self.exact_calls = 0
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __repr__(self) -> str:
        return (
            f"Registration({self.name!r}, {self.method!r}, decode={self.decode!r}, "
            f"calls={self.calls}, exact_calls={self.exact_calls})"
        )

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        """Return the output (B, n_q, H, d_v), contiguous, and no weights."""
        asked = read_request(module, query, key, value, attention_mask, scaling, dropout, rest)
        # A compiled model leaves its graph for this, and returns to it.
        compiling = torch.compiler.is_compiling()
        answer = torch.compiler.disable(self.answer) if compiling else self.answer
        found: tuple[Tensor, None] = answer(module, asked)
        return found

    def answer(self, module: Any, asked: Request) -> tuple[Tensor, None]:
        """Return the output (B, n_q, H, d_v) for a request, and no weights."""
        out = exact(asked) if is_exact(self.method) else self._approximate(module, asked)
        self.calls += 1
        return out.transpose(1, 2).contiguous(), None

    def switch(self, model: Any) -> None:
        """Make a model use this attention.

        Raises
        ------
        ValueError
            If a part of the model does not take its attention from the interface of
            transformers, and so would ignore this one.  The model is then as before.
        """
        if not isinstance(model, modeling.PreTrainedModel):
            raise TypeError(
                f"model must be a model of transformers, got {type(model).__name__}; "
                f"use its method, or pass the model inside"
            )
        before = implementations(model)
        with quiet_logging():
            model.set_attn_implementation(self.name)
        ignoring = sorted(
            {
                type(part).__name__
                for part in model.modules()
                if isinstance(part, modeling.PreTrainedModel)
                and part.config._attn_implementation != self.name
            }
        )
        if ignoring:
            restore(before)
            raise ValueError(
                f"model must take its attention from the interface of transformers, got "
                f"{', '.join(ignoring)}, which has its own and would ignore {self.name!r}; "
                f"use a model whose attention calls ALL_ATTENTION_FUNCTIONS"
            )

    def _approximate(self, module: Any, asked: Request) -> Tensor:
        seen, n_q = asked.seen(), asked.query.shape[-2]
        keys = asked.key.shape[-2] if seen is None else seen.keys
        if self.decode == "exact" and asked.decoder and n_q < keys:
            self.exact_calls += 1
            return exact(asked)
        if seen is None:
            raise ValueError(
                f"attention_mask must hide padded keys, later keys, or both, for method "
                f"{self.method.name!r}, got another pattern, such as a window, packed sequences "
                f"or a bias; use method='exact'"
            )
        return attend(
            asked.query,
            asked.key[:, :, :keys],
            asked.value[:, :, :keys],
            None if asked.bias is None else asked.bias[..., :keys],
            scale=asked.scale,
            causal=seen.causal,
            key_mask=seen.key_mask,
            softcap=asked.softcap,
            sink=asked.sink,
            enable_gqa=asked.key.shape[1] != asked.query.shape[1],
            method=self.method,
            rng=self._stream(module),
        )

    def _stream(self, module: Any) -> Rng:
        """Return the randomness of a layer; heads and batch entries split it further."""
        if not self.method.traits.randomized:
            return None
        if self.rng is None or isinstance(self.rng, np.random.Generator):
            return self.rng
        layer = getattr(module, "layer_idx", None)
        if layer is None:  # modules without a number are counted as they come
            layer = self._numbers.setdefault(module, len(self._numbers))
        seeds = np.random.SeedSequence(int(self.rng), spawn_key=(layer,))
        return entropy_of(np.random.default_rng(seeds))


def exact(asked: Request) -> Tensor:
    """Return the exact output (B, H, n_q, d_v) of a request."""
    mask, causal = asked.mask, "top-left" if asked.causal else False
    if asked.bias is not None:
        if mask is None:
            mask = asked.bias
        elif mask.dtype == torch.bool:
            mask = torch.where(mask, asked.bias, float("-inf"))
        else:
            mask = mask + asked.bias
    return attend(
        asked.query,
        asked.key,
        asked.value,
        mask,
        scale=asked.scale,
        causal=causal,
        softcap=asked.softcap,
        sink=asked.sink,
        enable_gqa=asked.key.shape[1] != asked.query.shape[1],
    )


# --- names, and what models run -------------------------------------------------------------------

REGISTERED: dict[str, Registration] = {}


def add(registration: Registration) -> None:
    """Make attention and its mask known to transformers under one name."""
    name = registration.name
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][\w-]*", name):
        raise ValueError(
            f"name must be letters, digits, - and _, got {name!r}; for instance 'sketchattn'"
        )
    # Transformers asks for these words inside a name and then takes another path.
    word = next((x for x in ("eager", "sdpa", "flash", "flex", "paged") if x in name), None)
    if word is not None:
        raise ValueError(
            f"name must not hold {word!r}, which transformers understands in its own way, got "
            f"{name!r}; for instance 'sketchattn'"
        )
    if name not in REGISTERED and name in modeling.ALL_ATTENTION_FUNCTIONS:
        raise ValueError(f"name must be free, got {name!r}, which is taken; choose another")
    put(name, registration)
    REGISTERED[name] = registration


def put(name: str, function: Any) -> None:
    """Register an attention function and the boolean mask that it needs.

    Without the second, models pass no mask at all: padding and packing would be dropped.
    """
    hf.AttentionInterface.register(name, function)
    hf.AttentionMaskInterface.register(name, masking.sdpa_mask)


def implementations(model: Any) -> list[tuple[Any, Any]]:
    """Return the configurations inside a model, outer ones first, with their attention."""
    found: dict[int, tuple[Any, Any]] = {}

    def visit(config: Any) -> None:
        if id(config) not in found:
            found[id(config)] = config, config._attn_implementation
            for name in config.sub_configs:
                if getattr(config, name, None) is not None:
                    visit(getattr(config, name))

    for part in model.modules():
        if isinstance(part, modeling.PreTrainedModel):
            visit(part.config)
    return list(found.values())


def restore(before: list[tuple[Any, Any]]) -> None:
    """Give configurations the attention back that they had."""
    for config, name in before:  # setting an outer one sets inner ones too, which follow
        config._attn_implementation = name


@contextmanager
def quiet_logging() -> Iterator[None]:
    """Keep transformers from warning of what is raised here, and from drawing bars."""
    log = hf.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def check_options(rng: Rng, decode: object) -> None:
    """Refuse a wrong source of randomness and an unknown way to decode."""
    if rng is not None:
        as_generator(rng)
    if decode not in DECODE:
        raise ValueError(f"decode must be 'method' or 'exact', got {decode!r}; choose one")
