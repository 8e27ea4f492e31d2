"""``dot_product_attention`` of JAX, exact or approximate, with gradients, computed on the host.

The computation is a callback from the JAX program: ``jit``, ``grad`` and ``vmap`` know its shapes
and its gradient, and nothing else of it.  Imports ``functional`` and what is below.
"""

from __future__ import annotations

import importlib
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..base.arguments import check_count, check_flag, check_scale, float_dtype
from ..base.draws import check_named
from ..base.floating import without_floating_errors
from ..functional.approximate import approximate_vjp, draws_of
from ..functional.batched import attention
from ..functional.call import check_call
from ..functional.checks import check_foreign
from ..functional.conventions import JAX_HIDDEN, with_means
from ..functional.exact import check_exact, is_exact
from ..functional.vjp import attention_vjp, shaped
from ..operators.reference import round_to
from ..problem import AttentionProblem

if TYPE_CHECKING:
    from ..zoo.base import Method

try:
    jax: Any = importlib.import_module("jax")  # its types are there only where it is
    jnp: Any = importlib.import_module("jax.numpy")
except ImportError as error:
    raise ImportError(
        "sketchattn.integrations.jax needs JAX, which is not installed; "
        "run: python -m pip install jax"
    ) from error

Array = NDArray[Any]
Traced = Any  # an array of JAX, or what stands for one while a program is traced

KINDS = ("float16", "bfloat16", "float32", "float64")
# What JAX writes into logits that are hidden: the logsumexp of a row that sees no key.
HIDDEN = np.float32(JAX_HIDDEN)
# Axes of query, key, value, bias, mask, query and key lengths, and seed, without those of vmap.
RANKS = (4, 4, 4, 4, 4, 1, 1, 1)


def dot_product_attention(
    query: Traced,
    key: Traced,
    value: Traced,
    bias: Traced | None = None,
    mask: Traced | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Traced | None = None,
    key_value_seq_lengths: Traced | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    method: str | Method = "exact",
    rng: Any = None,
    draw: Mapping[str, Any] | None = None,
    **parameters: Any,
) -> Any:
    """Compute attention of JAX arrays, exact or by a method, with gradients.

    ``A = rowsoftmax(scale Q K^T + bias)`` over the visible keys, ``O = A V``: what
    ``jax.nn.dot_product_attention`` computes, and in its place.

    Parameters
    ----------
    query : array (batch, n_q, h, d) or (n_q, h, d)
        float16, bfloat16, float32, or float64 where ``jax_enable_x64`` is set.
    key : array (batch, n_k, h_kv, d) or (n_k, h_kv, d)
        Of the dtype of ``query``; query head i reads key head ``i // (h / h_kv)``.
    value : array (batch, n_k, h_kv, d_v) or (n_k, h_kv, d_v)
        Of the dtype of ``query``.  JAX wants ``d_v = d``; here it may differ.
    bias : array broadcastable to (batch, h, n_q, n_k), optional
        Numbers that are added to the logits; ``-inf`` hides.
    mask : bool array broadcastable to (batch, h, n_q, n_k), optional
        True = attend.
    scale : float, optional
        ``None`` is ``1/sqrt(d)``.  Known when the program is traced.
    is_causal : bool
        Query i sees the keys j <= i, also where n_q != n_k.
    query_seq_lengths, key_value_seq_lengths : int array (batch,), optional
        Rows beyond the length are zero; keys beyond it are hidden.
    local_window_size : int or (int, int), optional
        Query i sees the keys ``i - left <= j <= i + right``; an integer is both.
    implementation : {None, "xla", "cudnn"}
        As for JAX; without influence.
    return_residual : bool
        Return the logsumexp of each row too.
    method : str or Method, default "exact"
        As for ``sketchattn.attention``, whose parameters follow as keywords (``rank=64``).
    rng : int, or a key of ``jax.random``, or a scalar integer array, optional
        Seed of the method, which a random one needs.  An integer gives the draws that
        ``sketchattn.attention`` makes of it; in a compiled program it never changes, so that
        steps with draws of their own take a key or an array as an argument.
    draw : mapping from names to arrays, optional
        One draw used for every head instead of ``rng``; known when the program is traced.
    **parameters
        Parameters of the method.

    Returns
    -------
    out : array (batch, n_q, h, d_v) or (n_q, h, d_v)
        Of the dtype of ``query``.  A row that sees no key is the mean of ``value`` over all keys.
    residual : array (batch, n_q, h) or (n_q, h)
        Only with ``return_residual``: of the dtype of ``query``, -2.38e38 for a row that sees no
        key, and without a gradient.

    Raises
    ------
    ValueError, TypeError
        While the program is traced, for shapes, dtypes and options that do not fit, an option that
        the method cannot honour, and a gradient of a method that has none or of a gradient.
    jax.errors.JaxRuntimeError
        While it runs, for values that ``sketchattn.attention`` refuses, such as queries that are
        not finite.  The last line says which.

    Notes
    -----
    The program calls back to the host: on another device than the CPU, arrays are moved there and
    back.  Halves are computed in float32 and rounded once, float64 in float64, where JAX takes its
    softmax in float32.

    ``query``, ``key``, ``value`` and ``bias`` have gradients with ``method="exact"``; with a method
    whose ``traits.differentiable`` is True the first three have, and backward uses the draw of
    forward.  The entries of a ``vmap`` are what the function returns for each of them.  Methods
    honour ``key_value_seq_lengths`` and ``is_causal`` as their traits say; ``bias``, ``mask``,
    ``query_seq_lengths``, ``local_window_size`` and ``return_residual`` need ``method="exact"``.

    Examples
    --------
    >>> import jax
    >>> from sketchattn.integrations.jax import dot_product_attention
    >>> x = jax.random.normal(jax.random.key(0), (2, 16, 4, 8))
    >>> loss = jax.jit(lambda x: dot_product_attention(x, x, x, is_causal=True).sum())
    >>> jax.grad(loss)(x).shape
    (2, 16, 4, 8)
    >>> dot_product_attention(x, x, x, method="skeinformer", rank=4, rng=0).shape
    (2, 16, 4, 8)
    """
    check_foreign(parameters)
    shape = jnp.shape(query)[:-1]
    q, k, v = (_heads(x, name) for x, name in ((query, "query"), (key, "key"), (value, "value")))
    _check_together(q, k, v)
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    bias = None if bias is None else _logits(bias, "bias", full)
    mask = None if mask is None else _logits(mask, "mask", full)
    lengths = [
        None if x is None else _lengths(x, name, q.shape[0])
        for x, name in (
            (query_seq_lengths, "query_seq_lengths"),
            (key_value_seq_lengths, "key_value_seq_lengths"),
        )
    ]
    if implementation not in (None, "xla", "cudnn"):
        raise ValueError(
            f"implementation must be None, 'xla' or 'cudnn', got {implementation!r}; leave it out"
        )
    plan = _Plan(
        scale=check_scale(_concrete(scale, "scale"), q.shape[3]),
        causal=check_flag(is_causal, "is_causal"),
        window=_window(local_window_size),
        method=None if is_exact(method) else _Fixed.method(method, parameters),
        draw=None if draw is None else _Fixed.draw(draw),
    )
    residual = check_flag(return_residual, "return_residual")
    if plan.method is None:
        check_exact(method, parameters, None, draw)
    else:
        refused = (
            ("bias", bias),
            ("mask", mask),
            ("query_seq_lengths", lengths[0]),
            ("local_window_size", local_window_size),
            ("return_residual", residual or None),
        )
        _check_method(plan, q, k, v, lengths[1] is not None, rng, dict(refused))
    if bias is not None:
        bias = bias.astype(jnp.promote_types(q.dtype, np.float32))  # that of the logits
    seed = None if rng is None else _words(rng)
    out, lse = _attend(plan, q, k, v, bias, mask, *lengths, seed)
    out = out.reshape((*shape, v.shape[3]))
    if not residual:
        return out
    lse = jnp.where(jnp.isneginf(lse), HIDDEN, lse).astype(q.dtype).reshape(shape)
    return out, jax.lax.stop_gradient(lse)


# --- arguments, while the program is traced -------------------------------------------------------


def _heads(x: object, name: str) -> Traced:
    """Return query, key or value with a batch axis."""
    array = jnp.asarray(x)
    if array.dtype.name not in KINDS:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {array.dtype}; "
            f"convert it with {name}.astype(jax.numpy.float32)"
        )
    if array.ndim not in (3, 4):
        raise ValueError(
            f"{name} must have shape (batch, tokens, heads, width) or (tokens, heads, width), "
            f"got {array.shape}; add or merge axes"
        )
    return array if array.ndim == 4 else array[None]


def _check_together(q: Traced, k: Traced, v: Traced) -> None:
    for name, x in (("key", k), ("value", v)):
        if x.dtype != q.dtype:
            raise TypeError(
                f"{name} must have the dtype {q.dtype} of query, got {x.dtype}; convert it"
            )
    if (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]) or not q.shape[3]:
        raise ValueError(
            f"key must have the batch and the width of query of shape {q.shape}, at least 1, "
            f"got {k.shape}; see the layout (batch, tokens, heads, width)"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"value must have the batch, tokens and heads {k.shape[:3]} of key, got "
            f"{v.shape[:3]}; pass key and value of the same tokens"
        )
    if q.shape[2] != k.shape[2] and (not k.shape[2] or q.shape[2] % k.shape[2]):
        raise ValueError(
            f"key must have a number of heads that divides the {q.shape[2]} heads of query, got "
            f"{k.shape[2]}; repeat or drop heads"
        )


def _logits(x: object, name: str, full: tuple[int, ...]) -> Traced:
    """Return a bias or a mask with four axes."""
    array = jnp.asarray(x)
    is_bool = array.dtype == np.bool_
    if name == "mask" and not is_bool:
        raise TypeError(f"mask must be boolean, got {array.dtype}; pass numbers to add as bias")
    if name == "bias" and (is_bool or jnp.issubdtype(array.dtype, np.complexfloating)):
        raise TypeError(f"bias must hold real numbers, got {array.dtype}; pass booleans as mask")
    array = array.reshape((1,) * (4 - array.ndim) + array.shape)
    if array.ndim != 4 or any(a not in (1, b) for a, b in zip(array.shape, full, strict=True)):
        raise ValueError(
            f"{name} must be broadcastable to (batch, heads, n_q, n_k) = {full}, got "
            f"{array.shape}; axes are aligned to the right"
        )
    return array


def _lengths(x: object, name: str, batch: int) -> Traced:
    array = jnp.asarray(x)
    if not jnp.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name} must hold integers, got {array.dtype}; give numbers of tokens")
    if array.shape != (batch,):
        raise ValueError(
            f"{name} must have shape ({batch},), got {array.shape}; give one length a batch entry"
        )
    return array


def _concrete(x: Any, name: str) -> Any:
    """Return a number or an array that is known while the program is traced."""
    if isinstance(x, jax.core.Tracer):
        remedy = "multiply query by it" if name == "scale" else "pass rng"
        raise TypeError(
            f"{name} must be known when the program is traced, got a traced array; {remedy} instead"
        )
    return np.asarray(x) if isinstance(x, jax.Array) else x


def _window(size: object) -> tuple[int, int]:
    if size is None:
        return (-1, -1)
    remedy = "give the reach to both sides, or None"
    sides = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(sides) != 2:
        raise ValueError(f"local_window_size must be one or two integers, got {size!r}; {remedy}")
    left, right = (check_count(side, "local_window_size", remedy, low=0) for side in sides)
    return left, right


def _words(rng: Any) -> Traced:
    """Return a seed as words of 32 bits, the lowest first."""
    if isinstance(rng, numbers.Integral) and not isinstance(rng, bool | np.bool_):
        number = check_count(rng, "rng", "give a non-negative seed", low=0)
        size = max(1, -(-number.bit_length() // 32))
        words = [number >> (32 * i) & 0xFFFFFFFF for i in range(size)]
        return jnp.asarray(np.array(words, np.uint32))
    if isinstance(rng, jax.Array | np.ndarray):
        if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
            if rng.shape == ():
                return jax.random.key_data(rng).reshape(-1)
        elif rng.shape == () and jnp.issubdtype(rng.dtype, np.integer):
            return jnp.asarray(rng).astype(np.uint32).reshape(1)
        elif rng.ndim == 1 and rng.dtype == np.uint32:  # jax.random.PRNGKey
            return jnp.asarray(rng)
    raise TypeError(
        f"rng must be an integer, a key of jax.random or a scalar integer array, got "
        f"{type(rng).__name__}; a program of JAX keeps no state, so that a generator has no place"
    )


def _check_method(
    plan: _Plan,
    q: Traced,
    k: Traced,
    v: Traced,
    masked: bool,
    rng: object,
    refused: Mapping[str, object],
) -> None:
    """Refuse what the method cannot honour, as far as shapes and options say it."""
    method = plan.made()
    for name, given in refused.items():
        if given is not None:
            raise ValueError(
                f"{name} must be left out for method {method.name!r}, which cannot honour it; "
                f"use method='exact'"
            )
    if rng is not None and plan.draw is not None:
        raise ValueError("rng must be None when draw is given, got both; pass one of them")
    if method.traits.randomized and rng is None and plan.draw is None:
        raise ValueError(
            f"rng must be given for method {method.name!r}, which is random, got None; pass an "
            f"integer or a key of jax.random"
        )
    if q.shape[1] and k.shape[1]:
        head = (np.zeros((x.shape[1], x.shape[3]), np.float32) for x in (q, k, v))
        method.check(
            AttentionProblem(
                *head,
                scale=plan.scale,
                causal="top-left" if plan.causal else False,
                key_mask=np.ones(k.shape[1], np.bool_) if masked else None,
            )
        )


# --- what the program knows -----------------------------------------------------------------------


class _Fixed:
    """Hold what compares as its key does, or by identity if the key cannot be hashed.

    Programs are compiled once for callbacks that are equal.
    """

    def __init__(self, value: Any, key: Any) -> None:
        try:
            hash(key)
        except TypeError:
            key = object()
        self.value, self.key = value, key
        self.kept: tuple[Any, ...] = ()

    @classmethod
    def method(cls, method: str | Method, parameters: Mapping[str, Any]) -> _Fixed:
        """Return a method by its name, or an object, and its parameters."""
        items = sorted(parameters.items())
        return cls((method, parameters), (method, *((name, type(x), x) for name, x in items)))

    @classmethod
    def draw(cls, draw: Mapping[str, Any]) -> _Fixed:
        """Return the arrays of a draw; they compare by identity, and are read at each run."""
        check_named(draw)
        found = cls(
            {name: _concrete(x, "draw") for name, x in draw.items()},
            tuple((name, id(x)) for name, x in draw.items()),
        )
        found.kept = tuple(draw.values())  # so that nothing else gets their identity
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Fixed) and bool(self.key == other.key)

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True)
class _Plan:
    """Hold what does not change from one run of a program to the next; no method is the exact."""

    scale: float
    causal: bool
    window: tuple[int, int]
    method: _Fixed | None
    draw: _Fixed | None

    def made(self) -> Method:
        """Return the method object."""
        from ..zoo.base import make_method  # loads scikit-learn

        assert self.method is not None
        return make_method(*self.method.value)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, *tensors: Traced) -> Traced:
    """Return the output and the logsumexp, -inf for a row that sees no key."""
    q, _, v = tensors[:3]
    out = jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), q.dtype)
    lse = jax.ShapeDtypeStruct(q.shape[:3], jnp.promote_types(q.dtype, np.float32))
    return jax.pure_callback(_Forward(plan), (out, lse), *tensors, vmap_method="expand_dims")


def _attend_forward(plan: _Plan, *tensors: Traced) -> tuple[Traced, Traced]:
    if plan.method is not None and not plan.made().traits.differentiable:
        raise ValueError(
            f"method must be differentiable for a gradient, got {plan.made()!r}; use a method "
            f"whose traits.differentiable is True, or jax.lax.stop_gradient"
        )
    out, lse = _attend(plan, *tensors)
    return (out, lse), (tensors, lse)


def _attend_backward(plan: _Plan, saved: Any, cotangents: Any) -> tuple[Traced | None, ...]:
    tensors, lse = saved
    found = _gradients(plan, cotangents[0], lse, *tensors)
    return (*found, *(None for _ in tensors[4:]))


_attend.defvjp(_attend_forward, _attend_backward)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gradients(plan: _Plan, cotangent: Traced, lse: Traced, *tensors: Traced) -> Traced:
    """Return the gradients of query, key, value and bias."""
    shapes = tuple(
        None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype) for x in tensors[:4]
    )
    return jax.pure_callback(
        _Backward(plan), shapes, cotangent, lse, *tensors, vmap_method="expand_dims"
    )


def _refuse(*_: Any) -> Any:
    raise ValueError(
        "gradients of attention must not be differentiated again, got a second derivative; use "
        "jax.nn.dot_product_attention for it"
    )


_gradients.defjvp(_refuse)


# --- the computation, on the host -----------------------------------------------------------------


@dataclass(frozen=True)
class _Forward:
    """Compute the output and the logsumexp; the callback of a plan."""

    plan: _Plan

    @without_floating_errors
    def __call__(self, *tensors: Traced) -> tuple[Array, Array]:
        """Return (..., batch, n_q, h, d_v) and (..., batch, n_q, h)."""
        host = _Host.of(tensors)
        out: Array
        lse: Array
        if self.plan.method is None:
            out, lse = attention(host.q, host.k, host.v, **host.options(self.plan), return_lse=True)
        else:
            out, lse = _approximate(self.plan, host)
        empty = np.isneginf(lse)
        out = with_means(out, empty, host.v)
        if host.rows is not None:
            rows = host.rows[..., None, :]
            out = np.where(rows[..., None], out, out.dtype.type(0))
            lse = np.where(rows, lse, lse.dtype.type(-np.inf))
        return np.swapaxes(out, -2, -3), np.swapaxes(lse, -1, -2)


@dataclass(frozen=True)
class _Backward:
    """Compute the gradients; the callback of a plan."""

    plan: _Plan

    @without_floating_errors
    def __call__(self, cotangent: Traced, lse: Traced, *tensors: Traced) -> tuple[Any, ...]:
        """Return those of query, key, value and bias, in their shapes."""
        host = _Host.of(tensors, (cotangent, lse))
        g = np.swapaxes(host.more[0], -2, -3)
        empty = np.isneginf(np.swapaxes(host.more[1], -1, -2))
        if host.rows is not None:
            shown = host.rows[..., None, :]
            g, empty = np.where(shown[..., None], g, g.dtype.type(0)), empty & shown
        bias = None
        if self.plan.method is None:
            options = host.options(self.plan)
            wanted = host.bias is not None
            q, k, v, *rest = attention_vjp(host.q, host.k, host.v, g, **options, return_bias=wanted)
            if host.bias is not None:
                axes = tuple(i for i, n in enumerate(host.bias.shape) if n != rest[0].shape[i])
                bias = rest[0].sum(axis=axes, keepdims=True)
        else:
            q, k, v = _approximate_vjp(self.plan, host, g)
        if empty.any() and v.shape[-2]:  # the mean of the values
            part = np.where(empty[..., None], g, 0).astype(np.float64).sum(axis=-2)
            part = part.reshape((*v.shape[:-2], host.group, v.shape[-1])).sum(axis=-2)
            wide = v.astype(np.float64) + part[..., None, :] / v.shape[-2]
            v = round_to(wide, v.dtype)
        q, k, v = (np.swapaxes(x, -2, -3) for x in (q, k, v))
        return q, k, v, bias


@dataclass(frozen=True)
class _Host:
    """Hold the arrays of a call, heads in front of tokens, and in front of all the axes of vmap."""

    q: Array
    k: Array
    v: Array
    bias: Array | None
    mask: Array | None
    rows: Array | None  # (..., batch, n_q): False beyond the length
    keys: Array | None  # (..., batch, n_k)
    seed: Array | None  # (..., words)
    more: tuple[Array, ...]

    @classmethod
    def of(cls, tensors: tuple[Traced, ...], more: tuple[Traced, ...] = ()) -> _Host:
        """Return the arrays of the operands, all of them with all axes of vmap."""
        ranks = (*RANKS, *(4, 3)[: len(more)])
        arrays = [None if x is None else np.asarray(x) for x in (*tensors, *more)]
        lead = np.broadcast_shapes(
            *(x.shape[: x.ndim - r] for x, r in zip(arrays, ranks, strict=True) if x is not None)
        )
        full = [
            None if x is None else np.broadcast_to(x, lead + x.shape[x.ndim - r :])
            for x, r in zip(arrays, ranks, strict=True)
        ]
        q, k, v, bias, mask, n_q, n_k, seed, *others = full
        assert q is not None
        assert k is not None
        assert v is not None
        rows = None if n_q is None else np.arange(q.shape[-3]) < n_q[..., None]
        keys = None if n_k is None else np.arange(k.shape[-3]) < n_k[..., None]
        q, k, v = (np.swapaxes(x, -2, -3) for x in (q, k, v))
        if rows is not None:  # whatever is in a row that is not there
            q = np.where(rows[..., None, :, None], q, q.dtype.type(0))
        return cls(q, k, v, bias, mask, rows, keys, seed, tuple(x for x in others if x is not None))

    @property
    def group(self) -> int:
        """Query head h reads key head ``h // group``."""
        return int(self.q.shape[-3] // max(self.k.shape[-3], 1))

    def options(self, plan: _Plan) -> dict[str, Any]:
        """Return the options of exact attention."""
        added = self.bias if self.mask is None else self.mask
        if self.bias is not None and self.mask is not None:
            added = np.where(self.mask, self.bias, self.bias.dtype.type(-np.inf))
        return {
            "scale": plan.scale,
            "causal": "top-left" if plan.causal else False,
            "key_mask": self.keys,
            "attn_mask": added,
            "window": plan.window,
            "enable_gqa": True,
        }


def _entry(plan: _Plan, host: _Host, index: tuple[int, ...]) -> tuple[dict[str, Any], Any, Any]:
    """Return q, k, v and the options of one entry of vmap, the rng and the draw."""
    keys = None if host.keys is None else host.keys[index]
    options = {
        "q": host.q[index],
        "k": host.k[index],
        "v": host.v[index],
        "scale": plan.scale,
        "causal": "top-left" if plan.causal else False,
        "key_mask": keys,
        "enable_gqa": True,
    }
    rng = None
    if host.seed is not None:
        rng = sum(int(word) << (32 * i) for i, word in enumerate(host.seed[index]))
    return options, rng, None if plan.draw is None else plan.draw.value


def _approximate(plan: _Plan, host: _Host) -> tuple[Array, Array]:
    """Return the output of the method, and in place of a logsumexp which rows see no key."""
    method, lead = plan.made(), host.q.shape[:-4]
    out = np.empty((*host.q.shape[:-1], host.v.shape[-1]), host.q.dtype)
    for index in np.ndindex(lead):
        options, rng, draw = _entry(plan, host, index)
        out[index] = attention(**options, method=method, rng=rng, draw=draw)
    lse = np.zeros(host.q.shape[:-1], float_dtype(host.q, "query"))
    if host.keys is not None:
        lse[~host.keys.any(axis=-1)] = -np.inf
    return out, lse


def _approximate_vjp(plan: _Plan, host: _Host, g: Array) -> tuple[Array, Array, Array]:
    """Return the gradients of the method at the draw of the forward pass."""
    method = plan.made()
    q, k, v = (np.empty(x.shape, x.dtype) for x in (host.q, host.k, host.v))
    for index in np.ndindex(host.q.shape[:-4]):
        options, rng, draw = _entry(plan, host, index)
        call = check_call(**options, **NEUTRAL)
        draws = draws_of(call, method, rng, draw)
        flat = approximate_vjp(call, method, draws, g[index])
        for result, part, x in zip((q, k, v), flat, (call.q, call.k, call.v), strict=True):
            result[index] = shaped(part, x)
    return q, k, v


# What a method is never asked for.
NEUTRAL: dict[str, Any] = {
    "offset": None,
    "attn_mask": None,
    "softcap": 0.0,
    "window": (-1, -1),
    "sink": None,
    "compute_dtype": None,
    "return_lse": False,
}


__all__ = [
    "dot_product_attention",
]


def __dir__() -> list[str]:
    return __all__
