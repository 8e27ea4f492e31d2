"""The function under test: how a case becomes its arguments, and its result an array.

One entry for each convention says what the library's signature offers and how an option is
spelled; one for each kind of arrays says how they are made and read.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..functional.conventions import conventions
from ..operators.reference import round_to
from .inputs import Case, Setting

Array = NDArray[Any]
Options = dict[str, Any]


def load(name: str, why: str) -> Any:
    """Return an optional package, or say how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(
            f"{why} needs the package {name}, which is not installed; run: pip install {name}"
        ) from None


# --- arrays ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrays:
    """Hold how arrays of one library are made from NumPy's and read back.

    Attributes
    ----------
    floats : callable (float64 array, dtype) -> array of the dtype
    others : callable (bool or int array) -> array
    read : callable (array) -> float64 NumPy array
    dtype_of : callable (array) -> str
        "float32" and the like.
    """

    floats: Callable[[Array, str], Any]
    others: Callable[[Array], Any]
    read: Callable[[Any], Array]
    dtype_of: Callable[[Any], str]


def _numpy_dtype(dtype: str) -> np.dtype[Any]:
    if dtype == "bfloat16":
        found: np.dtype[Any] = np.dtype(load("ml_dtypes", "bfloat16 in NumPy arrays").bfloat16)
        return found
    return np.dtype(dtype)


def _numpy_floats(x: Array, dtype: str) -> Array:
    return np.array(round_to(np.ascontiguousarray(x), _numpy_dtype(dtype)))


def _read_numpy(x: Any) -> Array:
    return np.asarray(x).astype(np.float64)


def numpy_arrays() -> Arrays:
    """Return how NumPy arrays are made and read."""
    return Arrays(
        _numpy_floats, np.ascontiguousarray, _read_numpy, lambda x: np.asarray(x).dtype.name
    )


def torch_arrays(device: str | None) -> Arrays:
    """Return how tensors are made, on a device, and read."""
    torch = load("torch", "arrays='torch'")

    def tensor(x: Array) -> Any:
        # A copy: torch warns about memory that it must not write.
        return torch.from_numpy(np.array(x, order="C")).to(device or "cpu")

    def read(x: Any) -> Array:
        wide: Array = x.detach().to(torch.float64).cpu().numpy()
        return wide

    return Arrays(
        lambda x, dtype: tensor(x).to(getattr(torch, dtype)),
        tensor,
        read,
        lambda x: str(x.dtype).removeprefix("torch."),
    )


def jax_arrays() -> Arrays:
    """Return how arrays of jax are made and read."""
    jax = load("jax", "arrays='jax'")

    def floats(x: Array, dtype: str) -> Any:
        if dtype == "float64" and not jax.config.jax_enable_x64:
            raise ValueError(
                "dtypes must not hold 'float64' where jax has no doubles, got them with "
                "jax_enable_x64 off; call jax.config.update('jax_enable_x64', True) first"
            )
        return jax.numpy.asarray(_numpy_floats(x, dtype))

    def others(x: Array) -> Any:
        return jax.numpy.asarray(x if x.dtype == np.bool_ else x.astype(np.int32))

    return Arrays(floats, others, _read_numpy, lambda x: np.dtype(x.dtype).name)


# --- conventions ----------------------------------------------------------------------------------


def _mask(case: Case, to: Arrays, full: bool = False) -> Any:
    """Return the mask of a case, or None; boolean, or numbers of the dtype."""
    mask = case.mask
    if mask is None:
        return None
    if full and mask.ndim < 4:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    return to.others(mask) if mask.dtype == np.bool_ else to.floats(mask, case.dtype)


def _given(**options: Any) -> Options:
    """Return the options that are not None: others are not passed at all."""
    return {name: x for name, x in options.items() if x is not None}


def _lengths(case: Case, to: Arrays) -> Any:
    return None if case.key_mask is None else to.others(case.key_mask.sum(axis=1))


def _torch(case: Case, to: Arrays, lse: bool) -> Options:
    return _given(
        attn_mask=_mask(case, to),
        is_causal=case.causal or None,
        scale=case.scale,
        enable_gqa=case.group > 1 or None,
    )


def _jax(case: Case, to: Arrays, lse: bool) -> Options:
    additive = case.mask is not None and case.mask.dtype != np.bool_
    return _given(
        bias=_mask(case, to, full=True) if additive else None,
        mask=None if additive else _mask(case, to, full=True),
        is_causal=case.causal or None,
        scale=case.scale,
        key_value_seq_lengths=_lengths(case, to),
        local_window_size=case.window,
        return_residual=lse or None,
    )


def _onnx(case: Case, to: Arrays, lse: bool) -> Options:
    left, right = case.window or (None, None)
    return _given(
        attn_mask=_mask(case, to),
        nonpad_kv_seqlen=_lengths(case, to),
        is_causal=int(case.causal) or None,
        scale=case.scale,
        softcap=case.softcap or None,
        left_window_size=left,
        right_window_size=right,
    )


def _flash(case: Case, to: Arrays, lse: bool) -> Options:
    return _given(
        softmax_scale=case.scale,
        causal=case.causal or None,
        window_size=case.window,
        softcap=case.softcap or None,
        return_attn_probs=lse or None,
    )


def _hf(case: Case, to: Arrays, lse: bool) -> Options:
    sink = None if case.sink is None else to.floats(case.sink, case.dtype)
    return {"scaling": case.factor} | _given(softcap=case.softcap or None, s_aux=sink)


def _sketchattn(case: Case, to: Arrays, lse: bool) -> Options:
    return _given(
        scale=case.scale,
        causal=case.alignment if case.causal else None,
        key_mask=None if case.key_mask is None else to.others(case.key_mask),
        attn_mask=_mask(case, to),
        softcap=case.softcap or None,
        window=case.window,
        sink=None if case.sink is None else to.floats(case.sink, case.dtype),
        enable_gqa=case.group > 1 or None,
        return_lse=lse or None,
    )


@dataclass(frozen=True)
class Library:
    """Hold how one convention is called.

    Attributes
    ----------
    arrays : {"torch", "jax", "numpy"}
        What its users pass.
    features : set of str
        What its signature offers.
    setting : Setting
    options : callable
        The keywords of a case.
    """

    arrays: str
    features: frozenset[str]
    setting: Setting
    options: Callable[[Case, Arrays, bool], Options]


_MASKS = frozenset({"bool_mask", "additive_mask", "empty_row"})
_SHAPES = frozenset({"dv", "cross", "gqa", "scale"})
LIBRARIES: Mapping[str, Library] = {
    "torch": Library("torch", _SHAPES | _MASKS | {"causal"}, Setting(), _torch),
    "jax": Library(
        "jax",
        _MASKS | {"cross", "gqa", "scale", "causal", "key_mask", "window", "lse"},
        Setting(empty_row="mean", prefix_keys=True, both=True),
        _jax,
    ),
    "onnx": Library(
        "numpy",
        _SHAPES | _MASKS | {"causal", "key_mask", "window", "softcap"},
        Setting(prefix_keys=True, both=True),
        _onnx,
    ),
    "flash": Library(
        "numpy",
        _SHAPES | {"causal", "window", "softcap", "lse", "empty_row"},
        Setting(alignment="bottom-right"),
        _flash,
    ),
    "hf": Library("numpy", _SHAPES | {"additive_mask", "softcap", "sink"}, Setting(), _hf),
    "sketchattn": Library(
        "numpy",
        _SHAPES | _MASKS | {"causal", "key_mask", "window", "softcap", "sink", "lse"},
        Setting(both=True),
        _sketchattn,
    ),
}


# --- the candidate --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """Hold the function under test, and call it as its convention says.

    Attributes
    ----------
    fn : callable
    convention : str
    arrays : {"numpy", "torch", "jax"}
    to : Arrays
    draws : mapping
        Keywords of every call.
    vjp : callable or None
        ``vjp(q, k, v, cotangent, **options) -> (dq, dk, dv)`` where autograd is not asked.
    """

    fn: Callable[..., Any]
    convention: str
    arrays: str
    to: Arrays
    draws: Mapping[str, Any]
    vjp: Callable[..., Any] | None = None

    @property
    def library(self) -> Library:
        """How the convention is called."""
        return LIBRARIES[self.convention]

    def _swaps(self, which: str) -> bool:
        record = conventions[self.convention]
        return (record.out_layout if which == "out" else record.layout) == "BNHD"

    def _float(self, x: Array, dtype: str, which: str = "in") -> Any:
        return self.to.floats(np.swapaxes(x, 1, 2) if self._swaps(which) else x, dtype)

    def _read(self, x: Any, shape: tuple[int, ...], which: str, name: str) -> Array:
        """Return a result as (B, H, n, d) in float64."""
        got = self.to.read(x)
        if got.ndim == 4 and self._swaps(which):
            got = np.swapaxes(got, 1, 2)
        if got.shape != shape:
            raise ShapeError(f"{name} must have shape {shape} as (b, h, n, d), got {got.shape}")
        return got

    def arguments(self, case: Case, lse: bool = False) -> tuple[list[Any], Options]:
        """Return the positional arguments and the keywords of a case."""
        tensors = [self._float(x, case.dtype) for x in (case.q, case.k, case.v)]
        options = self.library.options(case, self.to, lse) | dict(self.draws)
        if self.convention == "hf":
            # What an attention function of a model reads of its module.
            module = SimpleNamespace(
                num_key_value_groups=case.group,
                head_dim=case.q.shape[-1],
                scaling=case.factor,
                is_causal=False,
                training=False,
                layer_idx=0,
                sinks=options.get("s_aux"),
            )
            return [module, *tensors, self._lowest(case)], options
        return tensors, options

    def _lowest(self, case: Case) -> Any:
        """Return the mask (b, h, n_q, n_k) with the lowest finite number where a key is hidden."""
        if case.mask is None:
            return None
        lowest = {"float16": -65504.0, "bfloat16": -(2.0**128 - 2.0**120)}.get(case.dtype)
        number = float(np.finfo(case.dtype).min) if lowest is None else lowest
        if case.mask.dtype == np.bool_:
            return self.to.floats(np.where(case.mask, 0.0, number), case.dtype)
        return self.to.floats(np.where(case.mask == -np.inf, number, case.mask), case.dtype)

    def output_shape(self, case: Case) -> tuple[int, ...]:
        """Return (B, H, n_q, d_v)."""
        return (*case.q.shape[:3], case.v.shape[3])

    def run(self, case: Case) -> Array:
        """Return the output of a case in float64, or raise what the function raises."""
        positional, options = self.arguments(case)
        return self.read_output(self.fn(*positional, **options), case)

    def read_output(self, result: Any, case: Case) -> Array:
        """Return what a call returned as (B, H, n_q, d_v) in float64."""
        first = result[0] if isinstance(result, tuple | list) else result
        return self._read(first, self.output_shape(case), "out", "the output")

    def run_lse(self, case: Case) -> tuple[Array, Array]:
        """Return the output and the logsumexp (B, H, n_q)."""
        positional, options = self.arguments(case, lse=True)
        result = self.fn(*positional, **options)
        if not isinstance(result, tuple | list) or len(result) < 2:
            raise ShapeError("the logsumexp must come beside the output, got the output alone")
        lse = self.to.read(result[1])
        if self.convention == "jax":
            lse = np.swapaxes(lse, 1, 2)
        if lse.shape != case.q.shape[:3]:
            raise ShapeError(f"the logsumexp must have shape {case.q.shape[:3]}, got {lse.shape}")
        return self.read_output(result, case), lse

    def gradients(self, case: Case, cotangent: Array) -> tuple[Array, Array, Array]:
        """Return dq, dk and dv for a cotangent (B, H, n_q, d_v), by autograd or by ``vjp``."""
        positional, options = self.arguments(case)
        g = self._float(cotangent, case.dtype, "out")
        start = 1 if self.convention == "hf" else 0
        before, tensors, after = (
            positional[:start],
            positional[start : start + 3],
            positional[start + 3 :],
        )

        def forward(*inputs: Any) -> Any:
            result = self.fn(*before, *inputs, *after, **options)
            return result[0] if isinstance(result, tuple | list) else result

        if self.vjp is not None:
            found = self.vjp(*before, *tensors, *after, g, **options)
        elif self.arrays == "torch":
            torch = load("torch", "arrays='torch'")
            leaves = [x.clone().requires_grad_() for x in tensors]
            found = torch.autograd.grad(forward(*leaves), leaves, g)
        else:
            jax = load("jax", "arrays='jax'")
            found = jax.vjp(forward, *tensors)[1](g)
        dq, dk, dv = (
            self._read(x, y.shape, "in", name)
            for x, y, name in zip(found, (case.q, case.k, case.v), ("dq", "dk", "dv"), strict=True)
        )
        return dq, dk, dv


class ShapeError(Exception):
    """Raised for a result that cannot be compared."""
