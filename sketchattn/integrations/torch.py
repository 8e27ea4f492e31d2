"""``scaled_dot_product_attention`` of PyTorch, exact or approximate, with gradients, on the CPU.

Imports ``functional`` and what is below.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..base.arguments import as_precision, check_flag
from ..base.draws import Rng
from ..base.floating import without_floating_errors
from ..functional.approximate import (
    approximate,
    approximate_vjp,
    attend_at,
    check_approximate,
    draws_of,
)
from ..functional.call import Call, check_call
from ..functional.checks import check_foreign
from ..functional.exact import check_exact, exact, is_exact
from ..functional.vjp import exact_vjp, shaped
from ..operators.reference import to_bfloat16

if TYPE_CHECKING:
    from ..zoo.base import Method

try:
    torch: Any = importlib.import_module("torch")  # its types are there only where it is
except ImportError as error:
    raise ImportError(
        "sketchattn.integrations.torch needs PyTorch, which is not installed; "
        "run: python -m pip install torch"
    ) from error

Array = NDArray[Any]
Tensor = Any

# Options of ``sketchattn.attention`` that torch's function does not have.
OPTIONS: dict[str, Any] = {
    "causal": False,
    "offset": None,
    "key_mask": None,
    "softcap": 0.0,
    "window": (-1, -1),
    "compute_dtype": None,
}
NAMES = ("query", "key", "value", "attn_mask", "sink")
KINDS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    method: str | Method = "exact",
    rng: Rng = None,
    draw: Mapping[str, Any] | None = None,
    sink: Tensor | None = None,
    **parameters: Any,
) -> Tensor:
    """Compute attention of tensors on the CPU, exact or by a method, with gradients.

    ``A = rowsoftmax(scale Q K^T + bias)`` over the visible keys, ``O = A V``: what
    ``torch.nn.functional.scaled_dot_product_attention`` computes, and in its place.

    Parameters
    ----------
    query : Tensor (..., h, n_q, d)
        float64, float32, float16 or bfloat16; any strides.  Leading axes of length 1 are broadcast.
    key : Tensor (..., h_kv, n_k, d)
        Of the dtype of ``query``.
    value : Tensor (..., h_kv, n_k, d_v)
        Of the dtype of ``query``.
    attn_mask : Tensor broadcastable to (..., h, n_q, n_k), optional
        Boolean (True = attend), or floating point and added to the logits.
    dropout_p : float
        Must be 0: there is no dropout here.
    is_causal : bool
        Query i sees the keys j <= i, also where n_q != n_k; together with a mask, both hold.
    scale : float, optional
        ``None`` is ``1/sqrt(d)``.
    enable_gqa : bool
        Query head i reads key head ``i // (h / h_kv)``.  Not needed for one key head.
    method : str or Method, default "exact"
        As for ``sketchattn.attention``, whose parameters follow as keywords (``rank=64``).
    rng : None, int or numpy.random.Generator
        Randomness of the method, as for ``sketchattn.attention``.
    draw : mapping, optional
        One draw used for every head instead of ``rng``.
    sink : Tensor (h,), optional
        An extra logit of each head whose value is zero.
    **parameters
        ``causal`` with the alignment "bottom-right", ``offset``, ``key_mask``, ``softcap``,
        ``window``, ``compute_dtype``: as for ``sketchattn.attention``.  Others are parameters of
        the method.

    Returns
    -------
    Tensor (..., h, n_q, d_v)
        Of the dtype of ``query``; under ``torch.autocast``, of its dtype.  Rows that see no key are
        zero.

    Raises
    ------
    ValueError, TypeError
        For tensors that are not dense and on the CPU, dropout, and everything that
        ``sketchattn.attention`` refuses.
    RuntimeError
        Where a gradient is differentiated once more, and under ``torch.vmap``.

    Notes
    -----
    Tensors are read in place and the output is not copied, except that halves are widened to
    float32, in which they are computed, and rounded once.  ``query``, ``key``, ``value``, a
    floating-point ``attn_mask`` and ``sink`` have gradients with ``method="exact"``; with a method
    whose ``traits.differentiable`` is True the first three have, and backward uses the draw of
    forward.  ``torch.compile`` leaves its graph for this function and returns to it.  A function
    that is run again, as by ``torch.utils.checkpoint``, draws the same with an integer ``rng``.

    Examples
    --------
    >>> import torch
    >>> from sketchattn.integrations.torch import scaled_dot_product_attention
    >>> q, k, v = torch.randn(3, 2, 4, 16, 8, requires_grad=True)
    >>> scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
    >>> scaled_dot_product_attention(q, k, v, method="skeinformer", rank=4, rng=0).shape
    torch.Size([2, 4, 16, 8])
    """
    run = _outside_graphs() if torch.compiler.is_compiling() else _attend
    return run(
        (query, key, value, attn_mask, sink),
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
        method,
        rng,
        draw,
        parameters,
    )


_disabled: Any = None


def _outside_graphs() -> Any:
    """Return ``_attend`` as a function that torch.compile does not look into, always the same."""
    global _disabled
    if _disabled is None:
        _disabled = torch.compiler.disable(_attend)  # loads the compiler, which few need
    return _disabled


@dataclass
class _Run:
    """Hold what a forward pass is told, and the draws that it leaves to its backward pass."""

    options: dict[str, Any]
    method: str | Method
    rng: Rng
    draw: Mapping[str, Any] | None
    parameters: dict[str, Any]
    gradient: bool  # may be asked for
    draws: list[Mapping[str, Any]] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether the method is the exact one."""
        return is_exact(self.method)

    def made(self) -> Method:
        """Return the method object."""
        from ..zoo.base import make_method  # loads scikit-learn

        return make_method(self.method, self.parameters)

    def call(self, tensors: Sequence[Tensor | None]) -> Call:
        """Return the validated call of ``sketchattn.attention`` for these tensors."""
        wide = as_precision(self.options["compute_dtype"]) == np.float64
        q, k, v, mask, sink = (None if x is None else array_of(x, wide=wide) for x in tensors)
        return check_call(q, k, v, attn_mask=mask, sink=sink, return_lse=False, **self.options)


def _attend(
    tensors: tuple[Any, ...],
    dropout_p: object,
    is_causal: object,
    scale: float | None,
    enable_gqa: object,
    method: str | Method,
    rng: Rng,
    draw: Mapping[str, Any] | None,
    parameters: dict[str, Any],
) -> Tensor:
    """Return what ``scaled_dot_product_attention`` returns."""
    options = {**OPTIONS, **{x: parameters.pop(x) for x in OPTIONS if x in parameters}}
    check_foreign(parameters)
    for name, x in zip(NAMES, tensors, strict=True):
        if x is not None or name in NAMES[:3]:
            _check_tensor(x, name)
    for name in ("key_mask", "offset"):
        if isinstance(options[name], torch.Tensor):
            _check_tensor(options[name], name)
            options[name] = array_of(options[name])
    if isinstance(dropout_p, bool) or dropout_p != 0:
        raise ValueError(
            f"dropout_p must be 0.0, got {dropout_p!r}; there is no dropout here, weights are "
            f"those of inference"
        )
    if check_flag(is_causal, "is_causal"):
        if options["causal"] is not False:
            raise ValueError(
                f"causal must be False beside is_causal=True, got {options['causal']!r}; pass one"
            )
        options["causal"] = "top-left"
    q, k, v, *rest = tensors
    if torch.is_autocast_enabled("cpu"):
        kind = torch.get_autocast_dtype("cpu")
        q, k, v = (x if x.dtype == torch.float64 else x.to(kind) for x in (q, k, v))
    q, k, v = _broadcast(q, k, v)
    shared = k.ndim > 2 and k.shape[-3] == 1
    options |= {"scale": scale, "enable_gqa": check_flag(enable_gqa, "enable_gqa") or shared}
    run = _Run(options, method, rng, draw, parameters, gradient=torch.is_grad_enabled())
    out: Tensor = _Attention.apply(q, k, v, *rest, run)[0]
    return out


def _check_tensor(x: object, name: str) -> None:
    """Refuse what is no dense tensor in the memory of the CPU."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(
            f"{name} must be a tensor, got {type(x).__name__}; pass torch.as_tensor({name}), or "
            f"arrays to sketchattn.attention"
        )
    device, dense = x.device.type, x.layout == torch.strided and not x.is_nested
    if device != "cpu":
        remedy = "give it data" if device == "meta" else f"pass {name}.cpu()"
        raise ValueError(f"{name} must be on the CPU, got a tensor on {x.device}; {remedy}")
    if not dense:
        kind = "nested" if x.is_nested else str(x.layout)
        raise ValueError(f"{name} must be dense, got a tensor that is {kind}; convert it first")
    if name in NAMES[:3] and x.dtype not in KINDS:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}; "
            f"pass {name}.float()"
        )


def _broadcast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return views whose leading axes agree as far as axes of length 1 allow.

    One key head under many query heads stays: it is shared without being repeated.
    """
    if not q.ndim == k.ndim == v.ndim or q.ndim < 3:
        return q, k, v
    try:
        batch = torch.broadcast_shapes(*(x.shape[:-3] for x in (q, k, v)))
        h_kv = torch.broadcast_shapes(k.shape[-3:-2], v.shape[-3:-2])[0]
    except RuntimeError:
        return q, k, v  # refused later, by its name
    h = h_kv if q.shape[-3] == 1 else q.shape[-3]
    q, k, v = (
        x.expand(*batch, heads, *x.shape[-2:]) for x, heads in ((q, h), (k, h_kv), (v, h_kv))
    )
    return q, k, v


def array_of(x: Tensor, *, wide: bool = False) -> Array:
    """Return the memory of a tensor as an array; bfloat16 is widened, which is exact."""
    x = x.detach().resolve_conj().resolve_neg()
    if x.dtype == torch.bfloat16:
        x = x.double() if wide else x.float()
    found: Array = x.numpy()
    return found


def _tensor(x: Array, dtype: Any) -> Tensor:
    """Return a tensor of the memory of a new array, which has ``dtype`` unless it is bfloat16."""
    if dtype == torch.bfloat16:
        return torch.from_numpy(to_bfloat16(x)).to(dtype)
    return torch.from_numpy(x)


class _Attention(torch.autograd.Function):  # type: ignore[misc]  # no types
    """The output; and for backward the log-sum-exp and, where it was rounded, the output before."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, run = arguments
        return _forward(tensors, run)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.run = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        found = _Gradient.apply(gradient, *ctx.saved_tensors, ctx.run, ctx.needs_input_grad[:5])
        return (*found, None)

    @staticmethod
    def vmap(*_: Any) -> Any:
        _refuse_vmap()


class _Gradient(torch.autograd.Function):  # type: ignore[misc]  # no types
    """The gradients of the five tensors, and None for those that are not needed."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor | None, ...]:
        gradient, *saved, run, needed = arguments
        return _backward(gradient, saved, run, needed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "gradients of attention must not be differentiated again, got a second backward pass; "
            "drop create_graph=True, or use torch.nn.functional.scaled_dot_product_attention"
        )

    @staticmethod
    def vmap(*_: Any) -> Any:
        _refuse_vmap()


def _refuse_vmap() -> None:
    raise RuntimeError(
        "attention must be called outside torch.vmap, got a batched tensor; pass the batch as "
        "leading axes of query, key and value, which take any number of them"
    )


@without_floating_errors
def _forward(tensors: Sequence[Tensor], run: _Run) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output and what backward needs of an exact one; empty tensors where nothing."""
    call, dtype, none = run.call(tensors), tensors[0].dtype, torch.empty(0)
    if not run.exact:
        method = run.made()
        if not (run.gradient and method.traits.differentiable):
            return _tensor(approximate(call, method, run.rng, run.draw), dtype), none, none
        check_approximate(call, method, run.rng, run.draw)
        run.draws[:] = draws_of(call, method, run.rng, run.draw)
        return _tensor(attend_at(call, method, run.draws), dtype), none, none
    check_exact(run.method, run.parameters, run.rng, run.draw)
    out, lse = exact(call)
    result = call.layout.output(out, call.q.dtype)
    rounded = dtype in (torch.float16, torch.bfloat16)
    return _tensor(result, dtype), torch.from_numpy(lse), torch.from_numpy(out) if rounded else none


@without_floating_errors
def _backward(
    gradient: Tensor, saved: Sequence[Any], run: _Run, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of q, k, v, the mask and the sink, where they are needed."""
    *tensors, result, lse, before = saved
    call = run.call(tensors)
    g = array_of(gradient, wide=call.reference)
    mask, sink = (None if x is None else array_of(x) for x in tensors[3:])
    if run.exact:
        out = array_of(before if before.numel() else result)
        forward = call.layout.flatten(out, call.computing), array_of(lse)
        shape = mask.shape if mask is not None and needed[3] else None
        found = exact_vjp(call, g, shape, forward)
        gradients = (found.q, found.k, found.v, found.bias, found.sink)
    else:
        method = run.made()
        if not method.traits.differentiable:
            raise ValueError(
                f"method must be differentiable for a backward pass, got {method!r}; use a method "
                f"whose traits.differentiable is True, or torch.no_grad()"
            )
        gradients = (*approximate_vjp(call, method, run.draws, g), None, None)
    arguments = (call.q, call.k, call.v, mask, sink)
    return tuple(
        _tensor(shaped(x, argument), tensor.dtype)
        if need and x is not None and argument is not None and tensor is not None
        else None
        for x, argument, tensor, need in zip(gradients, arguments, tensors, needed, strict=True)
    )


__all__ = [
    "scaled_dot_product_attention",
]


def __dir__() -> list[str]:
    return __all__
