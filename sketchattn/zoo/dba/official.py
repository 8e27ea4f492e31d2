"""DBA as published, with weights handed in: a learned layer, no approximation of softmax attention.

Pack, core and unpack are softmax matrices made by trained linear maps; what comes out is compared
with other implementations of the same layer, not with ``rowsoftmax(scale Q K^T)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...base.arguments import (
    as_array,
    as_float,
    check_choice,
    check_finite,
    check_integer,
    check_key_mask,
    closest,
    float_dtype,
)
from ...base.floating import without_floating_errors
from ...operators.factored import FactoredAttention

Array = NDArray[Any]

ACTIVATIONS = ("gelu", "relu")


def _as_weights(record: Any, shapes: Mapping[str, str], sizes: dict[str, int]) -> None:
    """Replace the arrays of a record by checked ones; ``shapes`` are names of sizes."""
    for name, axes in shapes.items():
        x = as_array(getattr(record, name), name)
        float_dtype(x, name)
        labels = axes.split()
        if x.ndim == len(labels):
            for label, size in zip(labels, x.shape, strict=True):
                sizes.setdefault(label, int(size))
        wanted = tuple(sizes.get(label, 0) for label in labels)
        if x.ndim != len(labels) or x.shape != wanted or 0 in x.shape:
            listed = ", ".join(labels) + ("," if len(labels) == 1 else "")
            raise ValueError(
                f"{name} must have shape ({listed}) = {wanted}, got {x.shape}; weights are stored "
                f"as (out, in)"
            )
        check_finite(x, name)
        object.__setattr__(record, name, x)
    eps = as_float(record.eps)
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be finite and at least 0, got {eps}; released code has 1e-5")


@dataclass(frozen=True)
class DBAWeights:
    """Hold the weights of one DBA attention layer, each stored as (out, in).

    Attributes
    ----------
    w_pq, w_q, w_pk, w_k : ndarray (d_in, d)
        Maps of the state to pack queries, of the compressed sequence to queries, of the sequence to
        pack keys, of the compressed sequence to keys; ``b_pq, b_q, b_pk, b_k`` (d_in,).
    w_pv, w_v, w_out : ndarray (d, d)
        Maps to pack values, values and the output; ``b_pv, b_v, b_out`` (d,).
    w_len : ndarray (r H, d)
        Map of the sequence to unpack logits; ``b_len`` (r H,).
    ln_g, ln_b : ndarray (d,)
        Gain and bias of the layer norm.
    eps : float, default 1e-5
        Of the layer norm.

    Raises
    ------
    TypeError, ValueError
        For arrays that are not floating point, not finite, or of shapes that do not fit.

    Notes
    -----
    The published classifier has ``r = 16`` and ``d_in = 24`` for every d.
    """

    w_pq: Array
    b_pq: Array
    w_q: Array
    b_q: Array
    w_pk: Array
    b_pk: Array
    w_k: Array
    b_k: Array
    w_pv: Array
    b_pv: Array
    w_v: Array
    b_v: Array
    w_out: Array
    b_out: Array
    w_len: Array
    b_len: Array
    ln_g: Array
    ln_b: Array
    eps: float = 1e-5

    _shapes: ClassVar[dict[str, str]] = {
        **{f"w_{x}": "d_in d" for x in ("pq", "q", "pk", "k")},
        **{f"b_{x}": "d_in" for x in ("pq", "q", "pk", "k")},
        **{f"w_{x}": "d d" for x in ("pv", "v", "out")},
        **{f"b_{x}": "d" for x in ("pv", "v", "out")},
        "w_len": "rH d",
        "b_len": "rH",
        "ln_g": "d",
        "ln_b": "d",
    }

    def __post_init__(self) -> None:
        """Check the arrays."""
        _as_weights(self, self._shapes, {})

    @classmethod
    def from_state_dict(cls, state: Mapping[str, ArrayLike], prefix: str = "") -> DBAWeights:
        """Make weights from arrays under the parameter names of the published module.

        Parameters
        ----------
        state : mapping from names to arrays
            ``pq_proj.weight``, ``pq_proj.bias`` and so on for ``q``, ``pk``, ``k``, ``pv``, ``v``,
            ``out`` and ``q_len`` (which is ``w_len`` here), ``self_attn_layer_norm1.weight`` and
            ``.bias``; others are ignored.
        prefix : str
            Where these names start, for instance ``"encoder_layers.0.self_attn."``.

        Returns
        -------
        DBAWeights

        Raises
        ------
        KeyError
            For a name that is missing.
        """
        modules = {x: f"{x}_proj" for x in ("pq", "q", "pk", "k", "pv", "v", "out")}
        modules["len"] = "q_len_proj"
        names = {f"w_{x}": f"{module}.weight" for x, module in modules.items()}
        names |= {f"b_{x}": f"{module}.bias" for x, module in modules.items()}
        norm = "self_attn_layer_norm1"
        names |= {"ln_g": f"{norm}.weight", "ln_b": f"{norm}.bias"}
        return cls(**_pick(state, names, prefix))


@dataclass(frozen=True)
class DBABlockWeights:
    """Hold what a transformer layer has beside its attention: two layer norms and two maps.

    Attributes
    ----------
    w_1 : ndarray (d_ff, d)
    b_1 : ndarray (d_ff,)
    w_2 : ndarray (d, d_ff)
    b_2 : ndarray (d,)
    ln1_g, ln1_b, ln2_g, ln2_b : ndarray (d,)
        Gains and biases of the layer norms after attention and after the maps.
    eps : float, default 1e-5

    Raises
    ------
    TypeError, ValueError
        As `DBAWeights`.
    """

    w_1: Array
    b_1: Array
    w_2: Array
    b_2: Array
    ln1_g: Array
    ln1_b: Array
    ln2_g: Array
    ln2_b: Array
    eps: float = 1e-5

    _shapes: ClassVar[dict[str, str]] = {
        "w_1": "d_ff d",
        "b_1": "d_ff",
        "w_2": "d d_ff",
        "b_2": "d",
        **{f"ln{i}_{x}": "d" for i in (1, 2) for x in "gb"},
    }

    def __post_init__(self) -> None:
        """Check the arrays."""
        _as_weights(self, self._shapes, {})

    @classmethod
    def from_state_dict(cls, state: Mapping[str, ArrayLike], prefix: str = "") -> DBABlockWeights:
        """Make weights from ``linear1``, ``linear2``, ``norm1``, ``norm2`` (weight and bias).

        Parameters
        ----------
        state : mapping from names to arrays
        prefix : str
            Where these names start, for instance ``"encoder_layers.0."``.

        Returns
        -------
        DBABlockWeights

        Raises
        ------
        KeyError
            For a name that is missing.
        """
        names: dict[str, str] = {}
        for i in (1, 2):
            names |= {f"w_{i}": f"linear{i}.weight", f"b_{i}": f"linear{i}.bias"}
            names |= {f"ln{i}_g": f"norm{i}.weight", f"ln{i}_b": f"norm{i}.bias"}
        return cls(**_pick(state, names, prefix))


def _pick(state: Mapping[str, ArrayLike], names: Mapping[str, str], prefix: str) -> dict[str, Any]:
    made = {}
    for field, name in names.items():
        if prefix + name not in state:
            raise KeyError(
                f"state must hold {prefix + name!r}, got no such name"
                f"{closest(prefix + name, state)}"
            )
        made[field] = state[prefix + name]
    return made


@dataclass(frozen=True)
class DBAResult:
    """Hold what one layer gives.

    Attributes
    ----------
    output : ndarray (..., n_q, d)
    state : ndarray (..., r, d)
        The compressed sequence: the state of the next layer, as it is.
    unpack : ndarray (..., H, n_q, r)
        U, a softmax over r.
    core : ndarray (..., H, r, r)
        S.
    pack : ndarray (..., H, r, n_k)
        P, a softmax over the sequence.
    target : str
        ``"learned"``: no matrix that is approximated; errors against softmax say nothing about it.
    """

    output: Array
    state: Array
    unpack: Array
    core: Array
    pack: Array
    target: ClassVar[str] = "learned"

    @property
    def factors(self) -> tuple[Array, Array, Array]:
        """Unpack, core and pack, (U, S, P)."""
        return self.unpack, self.core, self.pack

    def matrix(self, head: int, batch: tuple[int, ...] | int = ()) -> FactoredAttention:
        """Return ``U_h S_h P_h`` of one head of one sequence as an operator (n_q, n_k).

        Row-stochastic, non-negative, of non-negative rank r at most.  It is the map of the layer
        up to maps of widths if its layer norm, which joins heads, is left out.
        """
        at = (*((batch,) if isinstance(batch, int) else batch), head)
        if len(at) != self.core.ndim - 2:
            raise ValueError(
                f"batch must have {self.core.ndim - 3} indices, got {len(at) - 1}; one for each "
                f"leading axis"
            )
        return FactoredAttention(self.unpack[at], self.core[at], self.pack[at])


@without_floating_errors
def dba_layer(
    x: ArrayLike,
    state: ArrayLike,
    weights: DBAWeights,
    *,
    heads: int,
    rank: int | None = None,
    key_mask: ArrayLike | None = None,
    target: ArrayLike | None = None,
) -> DBAResult:
    """Compute one attention layer of DBA as published.

    With head slices of width d_in/H for queries and keys and d/H for values::

        P_h = rowsoftmax((C W_pq^T + b_pq)_h ((X W_pk^T + b_pk)_h)^T / sqrt(d_in/H))   (r, n_k)
        Y   = concat_h P_h (X W_pv^T + b_pv)_h                                         (r, d)
        S_h = rowsoftmax((Y W_q^T + b_q)_h ((Y W_k^T + b_k)_h)^T / sqrt(d_in/H))       (r, r)
        Z   = LayerNorm(concat_h S_h (Y W_v^T + b_v)_h)                                (r, d)
        U_h = rowsoftmax((T W_len^T + b_len)_h)                                        (n_q, r)
        out = concat_h (U_h Z_h) W_out^T + b_out                                       (n_q, d)

    Parameters
    ----------
    x : array (..., n_k, d)
        Sequences X; float32 or float64, in which everything is computed (halves in float32).
    state : array (r, d) or (..., r, d)
        C: learned for a first layer (initially independent N(0, 1/d)), after that the state that
        the layer before returned.
    weights : DBAWeights
    heads : int
        H, which has to divide d_in and d.
    rank : int, optional
        r, only checked: weights and state have it.
    key_mask : bool array (n_k,) or (..., n_k), optional
        True for the positions that exist; padding gets no weight in P.
    target : array (..., n_q, d), optional
        T, whose positions get the output; None is X.

    Returns
    -------
    DBAResult

    Raises
    ------
    TypeError, ValueError
        For arrays that do not fit, heads that do not divide the widths, and a sequence without a
        position that exists.

    Notes
    -----
    Qin et al., IEEE TNNLS 2025, doi 10.1109/TNNLS.2025.3527046, in the form of the code released
    with it, without dropout.  Output rows of padding are computed like all others: the caller
    drops them.  Where released code gives NaN (a sequence of padding only) this raises.  A target
    other than X is not in released code: P is made from the source, U from the target.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> shapes = {"pq": (6, 4), "q": (6, 4), "pk": (6, 4), "k": (6, 4), "pv": (4, 4), "v": (4, 4)}
    >>> shapes |= {"out": (4, 4), "len": (6, 4)}
    >>> maps = {f"w_{x}": rng.standard_normal(s) for x, s in shapes.items()}
    >>> maps |= {f"b_{x}": np.zeros(s[0]) for x, s in shapes.items()}
    >>> weights = DBAWeights(**maps, ln_g=np.ones(4), ln_b=np.zeros(4))
    >>> made = dba_layer(rng.standard_normal((9, 4)), np.ones((3, 4)), weights, heads=2)
    >>> made.output.shape, made.state.shape, made.matrix(0).row_stochastic
    ((9, 4), (3, 4), True)
    """
    from ...kernels._threads import blas_single_thread

    if not isinstance(weights, DBAWeights):
        raise TypeError(
            f"weights must be DBAWeights, got {type(weights).__name__}; make them from arrays"
        )
    d_in, d = weights.w_pq.shape
    count = check_integer(heads, "heads", 1, "raise heads")
    for label, size in (("d_in", d_in), ("d", d), ("the rows of w_len", len(weights.w_len))):
        if size % count:
            raise ValueError(
                f"heads must divide {label} = {size}, got {count}; choose a divisor of it"
            )
    r = len(weights.w_len) // count
    if rank is not None and check_integer(rank, "rank", 1, "raise rank") != r:
        raise ValueError(
            f"rank must be the rows of w_len over heads = {r}, got {int(rank)}; leave it out"
        )
    source = _sequence(x, "x", d)
    dtype = float_dtype(source, "x")
    source = source.astype(dtype, copy=False)
    queries = source if target is None else _sequence(target, "target", d).astype(dtype)
    lead = source.shape[:-2]
    if queries.shape[:-2] != lead:
        raise ValueError(
            f"target must have the leading axes {lead} of x, got {queries.shape[:-2]}; give one "
            f"for each sequence"
        )
    c = _sequence(state, "state", d).astype(dtype)
    if c.shape not in ((r, d), (*lead, r, d)):
        raise ValueError(
            f"state must have shape (r, d) = {(r, d)} or {(*lead, r, d)}, got {c.shape}; a first "
            f"layer has one for all sequences"
        )
    mask = None if key_mask is None else check_key_mask(key_mask, lead, source.shape[-2])
    if source.shape[-2] == 0 or (mask is not None and not mask.any(axis=-1).all()):
        raise ValueError(
            "key_mask must keep a position of each sequence, got a sequence without any; drop "
            "empty sequences"
        )
    w = {x.name: getattr(weights, x.name) for x in fields(weights)}
    w = {name: x.astype(dtype) for name, x in w.items() if isinstance(x, np.ndarray)}

    def apply(rows: Array, name: str) -> Array:
        """Return the map ``rows W^T + b``, cut into heads (..., H, n, width)."""
        made = rows @ w[f"w_{name}"].T + w[f"b_{name}"]
        cut = made.reshape(*made.shape[:-1], count, made.shape[-1] // count)
        return np.ascontiguousarray(np.moveaxis(cut, -2, -3))

    scale = dtype.type(1 / math.sqrt(d_in // count))
    with blas_single_thread():  # the same bits for any number of threads
        logits = scale * apply(c, "pq") @ np.swapaxes(apply(source, "pk"), -1, -2)
        if mask is not None:
            logits = np.where(mask[..., None, None, :], logits, dtype.type(-np.inf))
        pack = _row_softmax(logits)
        short = _joined(pack @ apply(source, "pv"))
        core = _row_softmax(scale * apply(short, "q") @ np.swapaxes(apply(short, "k"), -1, -2))
        mixed = _joined(core @ apply(short, "v"))
        mixed = _layer_norm(mixed, w["ln_g"], w["ln_b"], weights.eps)
        of_heads = np.moveaxis(mixed.reshape(*lead, r, count, d // count), -2, -3)
        unpack = _row_softmax(apply(queries, "len"))
        output = _joined(unpack @ of_heads) @ w["w_out"].T + w["b_out"]
    return DBAResult(output, short, unpack, core, pack)


@without_floating_errors
def dba_block(
    x: ArrayLike,
    state: ArrayLike,
    weights: DBAWeights,
    block: DBABlockWeights,
    *,
    heads: int,
    key_mask: ArrayLike | None = None,
    activation: str = "gelu",
) -> tuple[Array, Array]:
    """Compute a whole transformer layer around `dba_layer`, with layer norms after the sums.

    ``x1 = LN(x + out)`` and ``x2 = LN(x1 + W_2 act(W_1 x1 + b_1) + b_2)``.

    Parameters
    ----------
    x, state, weights, heads, key_mask
        As for `dba_layer`.
    block : DBABlockWeights
    activation : {"gelu", "relu"}
        "gelu" is the exact one, ``x (1 + erf(x / sqrt 2)) / 2``.

    Returns
    -------
    x2 : ndarray (..., n, d)
    state : ndarray (..., r, d)
        Of the next layer.

    Raises
    ------
    TypeError, ValueError
        As `dba_layer`.
    """
    from scipy.special import erf

    from ...kernels._threads import blas_single_thread

    check_choice(activation, "activation", ACTIVATIONS)
    if not isinstance(block, DBABlockWeights) or block.w_1.shape[1] != weights.w_out.shape[0]:
        width = getattr(getattr(block, "w_1", None), "shape", type(block).__name__)
        raise ValueError(
            f"block must be DBABlockWeights of width d = {weights.w_out.shape[0]}, got {width}; "
            f"take both from one layer"
        )
    made = dba_layer(x, state, weights, heads=heads, key_mask=key_mask)
    dtype = made.output.dtype
    b = {f.name: np.asarray(getattr(block, f.name), dtype) for f in fields(block)}
    with blas_single_thread():
        first = _layer_norm(as_array(x, "x") + made.output, b["ln1_g"], b["ln1_b"], block.eps)
        inner = first @ b["w_1"].T + b["b_1"]
        if activation == "relu":
            inner = np.maximum(inner, 0)
        else:
            inner = 0.5 * inner * (1 + erf(inner / math.sqrt(2)))
        second = first + inner @ b["w_2"].T + b["b_2"]
        out = _layer_norm(second, b["ln2_g"], b["ln2_b"], block.eps)
    return out.astype(dtype, copy=False), made.state


def _sequence(x: ArrayLike, label: str, d: int) -> Array:
    rows = as_array(x, label)
    float_dtype(rows, label)
    if rows.ndim < 2 or rows.shape[-1] != d:
        raise ValueError(
            f"{label} must have shape (..., n, d) with the d = {d} of the weights, got "
            f"{rows.shape}; tokens are rows"
        )
    check_finite(rows, label)
    return rows


def _row_softmax(logits: Array) -> Array:
    """Return ``rowsoftmax(logits)`` over the last axis; no row is all -inf."""
    weights: Array = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def _layer_norm(x: Array, gain: Array, bias: Array, eps: float) -> Array:
    """Return ``(x - mean) / sqrt(variance + eps) gain + bias`` over the last axis."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return np.asarray(centred / np.sqrt(variance + x.dtype.type(eps)) * gain + bias)


def _joined(x: Array) -> Array:
    """Return heads (..., H, n, w) side by side, (..., n, H w)."""
    moved = np.moveaxis(x, -3, -2)
    return np.ascontiguousarray(moved.reshape(*moved.shape[:-2], -1))
