"""The step from an error of logits to an error of attention, with sharp constants.

Whatever approximates the logits (a hidden width that is compressed, a random projection, centres in
place of tokens, inputs in few bits) leaves ``Lhat = L + D`` and ``Ahat = rowsoftmax(Lhat)``.  All
that counts is the half-range of a row of D over the keys that it sees,

    eta_i = (max_j D_ij - min_j D_ij)/2,

since a softmax does not see a shift of a row.  Then

- total variation: ``TV(A_i, Ahat_i) = (1/2)|A_i - Ahat_i|_1 <= tanh(eta_i/2)``, attained;
- divergence: ``KL(A_i|Ahat_i)`` and ``KL(Ahat_i|A_i)`` are at most ``eta_i^2/2``;
- every weight: ``|ln(Ahat_ij/A_ij)| <= 2 eta_i``;
- outputs: ``|O_ic - Ohat_ic| <= TV_i (max_j V_jc - min_j V_jc)`` and
  ``|O_i - Ohat_i|_2 <= TV_i max_{j,l} |V_j - V_l|_2``.

`logit_eta` reads eta off a given D; `compression_eta` from factors of the logits, without forming
D; `cluster_eta_apriori` and `quantization_eta` bound it before any logit is computed.  Only NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..base.arguments import as_array, check_finite, check_key_mask, check_scale, closest
from ..base.floating import without_floating_errors
from ..kernels._threads import product

Array = NDArray[Any]
Float = float | NDArray[np.float64]

# Rows of logits, or of pairs of values, that are held at a time.
BLOCK = 1024


class Precision(NamedTuple):
    """Hold how far rounding to nearest moves a number: by ``u |x|`` or by ``floor``, the larger.

    Attributes
    ----------
    u : float
        Unit roundoff.
    floor : float
        Half of the distance of subnormal numbers.
    largest : float
        The largest finite number.
    """

    u: float
    floor: float
    largest: float


PRECISIONS: dict[str, Precision] = {
    "float16": Precision(2.0**-11, 2.0**-25, 65504.0),
    "bfloat16": Precision(2.0**-8, 2.0**-134, (2 - 2.0**-7) * 2.0**127),
    "float32": Precision(2.0**-24, 2.0**-150, (2 - 2.0**-23) * 2.0**127),
}
# Levels of a symmetric int8 on each side of zero.
_LEVELS = 127
_DTYPES = (*PRECISIONS, "int8")
_PER = ("tensor", "row")


# --- arguments ----------------------------------------------------------------------------------


def _at_least_zero(x: ArrayLike, name: str) -> Array:
    value = as_array(x, name)
    if value.dtype.kind not in "iuf":
        raise TypeError(f"{name} must be real, got dtype {value.dtype}; give a number")
    value = value.astype(np.float64)
    bad = ~(value >= 0)
    if bad.any():
        raise ValueError(
            f"{name} must be at least 0, got {float(value[bad].flat[0]):g}; "
            f"logit_eta computes it from the change of the logits"
        )
    return value


def _result(x: Array) -> Float:
    out: Float = x.item() if x.ndim == 0 else x
    return out


def _matrix(x: object, name: str, width: int | None = None) -> Array:
    array = as_array(x, name)
    if array.dtype.kind not in "iuf" and array.dtype.name != "bfloat16":
        raise TypeError(f"{name} must be real, got dtype {array.dtype}; convert it")
    if array.ndim != 2:
        raise ValueError(f"{name} must have two axes, got shape {array.shape}; pass one head")
    if width is not None and array.shape[1] != width:
        raise ValueError(
            f"{name} must have width {width}, got {array.shape[1]}; pass arrays of one head"
        )
    array = array.astype(np.float64)
    check_finite(array, name)
    return array


def _pair(q: object, k: object) -> tuple[Array, Array]:
    queries = _matrix(q, "q")
    return queries, _matrix(k, "k", queries.shape[1])


def _change(d: object, keep: ArrayLike | None) -> tuple[Array, Array]:
    """Return the change of the logits in float64, and which keys each row sees."""
    change = as_array(d, "D")
    if change.dtype.kind not in "iuf":
        raise TypeError(f"D must be real, got dtype {change.dtype}; pass Lhat - L")
    if change.ndim < 1:
        raise ValueError("D must have an axis of keys, got a number; pass Lhat - L")
    change = change.astype(np.float64)
    if keep is None:
        seen = np.ones(change.shape, bool)
    else:
        mask = as_array(keep, "keep")
        if mask.dtype != np.bool_:
            raise TypeError(
                f"keep must be boolean, True for the keys that a row sees, got {mask.dtype}; "
                f"convert it with astype(bool)"
            )
        try:
            seen = np.broadcast_to(mask, change.shape)
        except ValueError:
            raise ValueError(
                f"keep must fit D of shape {change.shape}, got {mask.shape}; "
                f"give one entry for each logit, or for each key"
            ) from None
    if np.isnan(change[seen]).any():
        raise ValueError(
            "D must not be NaN at keys that are seen, got NaN; "
            "hide keys that both softmaxes mask with keep"
        )
    return change, seen


# --- the lemma ----------------------------------------------------------------------------------


@without_floating_errors
def tv_bound(eta: ArrayLike) -> Float:
    """Return ``tanh(eta/2)``, the most that a row of a softmax can move in total variation.

    Parameters
    ----------
    eta : float or array
        Half-range of the change of the logits, at least 0; infinity is allowed.

    Returns
    -------
    float or ndarray of float64
        In [0, 1].

    Raises
    ------
    TypeError, ValueError
        For values that are not real, and negative ones.

    Notes
    -----
    A set of keys of weight x gets odds that change by a factor between 1/t and t,
    ``t = e^(2 eta)``; ``t x/(1 + (t - 1) x) - x`` is largest at ``x = 1/(1 + sqrt(t))``, where it
    is ``(sqrt(t) - 1)/(sqrt(t) + 1) = tanh(eta/2)``.  Attained by two keys of weights
    ``1/(1 + e^eta)`` and ``e^eta/(1 + e^eta)`` with the changes eta and -eta.  Derived; the form
    ``tanh(W/4)`` with the whole range W is the claim ``softmax.perturbation``.

    Examples
    --------
    >>> [round(tv_bound(eta), 8) for eta in (0.1, 0.7, 2.0)]
    [0.04995837, 0.33637554, 0.76159416]
    """
    return _result(np.tanh(_at_least_zero(eta, "eta") / 2))


@without_floating_errors
def kl_bound(eta: ArrayLike) -> Float:
    """Return ``eta^2/2``, the most that ``KL(A_i|Ahat_i)`` and ``KL(Ahat_i|A_i)`` can be.

    Parameters
    ----------
    eta : float or array
        Half-range of the change of the logits, at least 0.

    Returns
    -------
    float or ndarray of float64

    Raises
    ------
    TypeError, ValueError
        As for `tv_bound`.

    Notes
    -----
    ``KL(A|Ahat) = ln E_A e^D - E_A D <= (2 eta)^2/8`` by Hoeffding's lemma; the other order is the
    same statement for -D.  Derived.

    Examples
    --------
    >>> kl_bound(0.5)
    0.125
    """
    x = _at_least_zero(eta, "eta")
    return _result(x * x / 2)


@without_floating_errors
def log_ratio_bound(eta: ArrayLike) -> Float:
    """Return ``2 eta``, the most that ``|ln(Ahat_ij/A_ij)|`` can be.

    Parameters
    ----------
    eta : float or array
        Half-range of the change of the logits, at least 0.

    Returns
    -------
    float or ndarray of float64

    Raises
    ------
    TypeError, ValueError
        As for `tv_bound`.

    Notes
    -----
    ``ln(Ahat_j/A_j) = D_j - ln E_A e^D``, and the last term lies between min D and max D.  It is
    approached where all weight sits at one end of the range.  Derived.

    Examples
    --------
    >>> log_ratio_bound(0.5)
    1.0
    """
    return _result(2 * _at_least_zero(eta, "eta"))


@without_floating_errors
def logit_eta(D: object, keep: ArrayLike | None = None) -> NDArray[np.float64]:
    """Return ``eta_i = (max_j D_ij - min_j D_ij)/2`` over the keys that each row sees.

    Parameters
    ----------
    D : array (..., n_q, n_k)
        ``Lhat - L``; the last axis is the keys.
    keep : bool array, broadcastable to the shape of D, optional
        True for keys that a row sees.  Others may hold anything, such as the NaN of -inf - -inf.

    Returns
    -------
    ndarray (..., n_q), float64
        0 for a row that sees no key; infinity where one of the softmaxes hides a key that the
        other sees (D infinite at a seen key).

    Raises
    ------
    TypeError, ValueError
        For dtypes and shapes that do not fit, and NaN at a seen key.

    Notes
    -----
    A constant added to a row of D changes nothing.

    Examples
    --------
    >>> D = np.array([[0.5, -0.5, 0.1], [3.0, 3.0, 3.0]])
    >>> logit_eta(D).tolist(), logit_eta(D, keep=[True, False, True]).tolist()
    ([0.5, 0.0], [0.2, 0.0])
    """
    change, seen = _change(D, keep)
    top = np.max(change, axis=-1, where=seen, initial=-np.inf)
    low = np.min(change, axis=-1, where=seen, initial=np.inf)
    with np.errstate(invalid="ignore"):
        eta = (top - low) / 2
    # D = -inf at all keys of a row, or +inf: one of the softmaxes has no such row.
    eta = np.where(np.isnan(eta), np.inf, eta)
    out: NDArray[np.float64] = np.asarray(np.where(seen.any(axis=-1), eta, 0.0))
    return out


@without_floating_errors
def lipschitz_bound(D: object, keep: ArrayLike | None = None) -> NDArray[np.float64]:
    """Return ``(1/2)|D_i - mean(D_i)|_2``, at least ``|A_i - Ahat_i|_2``, for every row.

    The norm of all rows bounds ``|A - Ahat|_F = (1/2)|D (I - 1 1^T/n_k)|_F``.

    Parameters
    ----------
    D, keep
        As for `logit_eta`.

    Returns
    -------
    ndarray (..., n_q), float64

    Raises
    ------
    TypeError, ValueError
        As for `logit_eta`.

    Notes
    -----
    ``|diag p - p p^T|_2 <= 1/2``, and the softmax does not see the mean.  Derived (T6).  It grows
    with the number of keys, which total variation does not: where it exceeds
    ``sqrt(2) tv_bound(logit_eta(D))``, which bounds the same norm, it is of no use.

    Examples
    --------
    >>> lipschitz_bound([[0.1, -0.1]]).round(6).tolist()
    [0.070711]
    """
    change, seen = _change(D, keep)
    with np.errstate(invalid="ignore"):
        count = np.maximum(seen.sum(axis=-1, keepdims=True), 1)
        mean = np.sum(change, axis=-1, where=seen, keepdims=True) / count
        squares = np.sum((change - mean) ** 2, axis=-1, where=seen)
    squares = np.where(np.isnan(squares), np.inf, squares)
    out: NDArray[np.float64] = np.asarray(np.sqrt(squares) / 2)
    return out


# --- outputs ------------------------------------------------------------------------------------


class OutputBound(NamedTuple):
    """Hold how far outputs can be from the exact ones.

    Attributes
    ----------
    entries : ndarray (n_q, d_v)
        ``TV_i (max_j V_jc - min_j V_jc)``, at least ``|O_ic - Ohat_ic|``.
    norms : ndarray (n_q,)
        ``TV_i max_{j,l} |V_j - V_l|_2``, at least ``|O_i - Ohat_i|_2``.
    """

    entries: NDArray[np.float64]
    norms: NDArray[np.float64]


@without_floating_errors
def value_diameter(values: object) -> float:
    """Return ``max_{j,l} |V_j - V_l|_2``.

    Parameters
    ----------
    values : array (n_k, d_v)
        Of the keys that are seen; at least one row.

    Returns
    -------
    float

    Raises
    ------
    TypeError, ValueError
        For arrays that are not finite matrices, or empty.

    Notes
    -----
    All pairs, a block at a time: ``O(n_k^2 d_v)`` operations.

    Examples
    --------
    >>> value_diameter([[0.0, 0.0], [3.0, 4.0]])
    5.0
    """
    v = _matrix(values, "values")
    if len(v) == 0:
        raise ValueError("values must have a row, got none; give those of the keys that are seen")
    v = v - v.mean(axis=0)
    squares = np.einsum("ij,ij->i", v, v)
    best = 0.0
    for start in range(0, len(v), BLOCK):
        part = slice(start, start + BLOCK)
        pairs = squares[part, None] + squares - product(2 * v[part], v.T)
        best = max(best, float(pairs.max()))
    return math.sqrt(best)


@without_floating_errors
def output_bound(tv: ArrayLike, values: object) -> OutputBound:
    """Bound the change of outputs by that of the rows of A in total variation.

    ``|O_ic - Ohat_ic| <= TV_i (max_j V_jc - min_j V_jc)`` and
    ``|O_i - Ohat_i|_2 <= TV_i max_{j,l} |V_j - V_l|_2``.

    Parameters
    ----------
    tv : float or array (n_q,)
        Total variation of each row, or its bound; in [0, 1].
    values : array (n_k, d_v)
        V of the keys that are seen.

    Returns
    -------
    OutputBound
        ``entries`` (n_q, d_v) and ``norms`` (n_q,); without the axis n_q for a number.

    Raises
    ------
    TypeError, ValueError
        For values out of range, and arrays that are not finite matrices.

    Notes
    -----
    ``A_i - Ahat_i = TV_i (mu - nu)`` with two distributions, and ``(mu - nu) V`` is a mean of
    ``V_j - V_l``.  A constant added to all values changes nothing.  Derived.

    Examples
    --------
    >>> bound = output_bound([0.5, 0.1], [[0.0, 1.0], [3.0, -3.0]])
    >>> bound.entries.round(6).tolist(), bound.norms.round(6).tolist()
    ([[1.5, 2.0], [0.3, 0.4]], [2.5, 0.5])
    """
    moved = _at_least_zero(tv, "tv")
    if (moved > 1).any():
        raise ValueError(
            f"tv must be at most 1, got {float(moved.max()):g}; tv_bound(eta) gives one"
        )
    if moved.ndim > 1:
        raise ValueError(f"tv must have one axis, got shape {moved.shape}; give one a row of A")
    v = _matrix(values, "values")
    norms = np.asarray(moved * value_diameter(v))
    ranges = v.max(axis=0) - v.min(axis=0)
    return OutputBound(np.asarray(moved[..., None] * ranges), norms)


# --- where eta comes from -----------------------------------------------------------------------


@without_floating_errors
def compression_eta(
    q: object,
    k: object,
    qh: object,
    kh: object,
    *,
    scale: float | None = None,
    key_mask: ArrayLike | None = None,
) -> NDArray[np.float64]:
    """Return the half-range of ``D = scale (Qh Kh^T - Q K^T)`` for every query.

    For a hidden width that is compressed, by the SVD or by a random projection, for centres in
    place of tokens, and for rounded inputs: whatever keeps the logits a product.

    Parameters
    ----------
    q, k : array (n_q, d), (n_k, d)
    qh, kh : array (n_q, d_in), (n_k, d_in)
        What stands in their place; any common width.
    scale : float, optional
        None is ``1/sqrt(d)``, of the width of q.
    key_mask : bool array (n_k,), optional
        True for the keys that exist.

    Returns
    -------
    ndarray (n_q,), float64

    Raises
    ------
    TypeError, ValueError
        For arrays that do not fit or are not finite.

    Notes
    -----
    ``O(n_q n_k (d + d_in))`` operations, a block of rows at a time: a check of an approximation,
    no part of one.

    Examples
    --------
    >>> q, k = np.eye(2), np.array([[1.0, 2.0], [0.0, 4.0]])
    >>> compression_eta(q, k, q[:, :1], k[:, :1], scale=1.0).tolist()
    [0.0, 1.0]
    """
    queries, keys = _pair(q, k)
    low_q = _matrix(qh, "qh")
    low_k = _matrix(kh, "kh", low_q.shape[1])
    for name, new, old in (("qh", low_q, queries), ("kh", low_k, keys)):
        if len(new) != len(old):
            raise ValueError(
                f"{name} must have one row for each of the {len(old)} of {name[0]}, got {len(new)};"
                f" pass what stands in their place"
            )
    factor = check_scale(scale, queries.shape[1])
    if key_mask is not None:
        kept = check_key_mask(key_mask, (), len(keys)).reshape(-1)
        keys, low_k = keys[kept], low_k[kept]
    eta = np.zeros(len(queries))
    for start in range(0, len(queries) if len(keys) else 0, BLOCK):
        part = slice(start, start + BLOCK)
        changed = product(low_q[part], low_k.T) - product(queries[part], keys.T)
        eta[part] = np.ptp(changed, axis=1)
    return eta * (abs(factor) / 2)


def _centred(x: Array, clusters: Sequence[Any] | None, name: str) -> Array:
    """Return the centre of every row, or the rows themselves."""
    if clusters is None:
        return x
    if len(clusters) < 2:
        raise ValueError(
            f"{name} must hold centres and labels, got {len(clusters)} items; pass both"
        )
    centers = _matrix(clusters[0], f"centres of {name}", x.shape[1])
    labels = as_array(clusters[1], f"labels of {name}")
    if labels.dtype.kind not in "iu" or labels.shape != (len(x),):
        raise ValueError(
            f"labels of {name} must be integers of shape ({len(x)},), got {labels.dtype} of shape "
            f"{labels.shape}; give the cluster of each row"
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(centers):
        raise ValueError(
            f"labels of {name} must be in 0..{len(centers) - 1}, got {int(labels.min())} to "
            f"{int(labels.max())}; one for each centre"
        )
    return np.asarray(centers[labels])


@without_floating_errors
def cluster_eta_apriori(
    q: object,
    k: object,
    queries: Sequence[Any] | None = None,
    keys: Sequence[Any] | None = None,
    *,
    scale: float | None = None,
    shift: ArrayLike | None = None,
) -> NDArray[np.float64]:
    """Bound the half-range of the logit error where centres stand in the place of tokens.

    ``eta_i <= |scale| (rho_i max_j |k_j - c| + |qc_i|_2 max_j rho'_j)`` for every c: ``qc_i`` the
    centre of query i and ``rho_i = |q_i - qc_i|``, ``kc_j`` that of key j and
    ``rho'_j = |k_j - kc_j|``.

    Parameters
    ----------
    q, k : array (n_q, d), (n_k, d)
        Without masked keys.
    queries, keys : (centers, labels, ...), optional
        Centres (m, d) and the cluster of each row, such as `sketchattn.sampling` returns; None
        where rows stand for themselves.
    scale : float, optional
        None is ``1/sqrt(d)``.
    shift : array (d,), optional
        The point c; None is the mean of the keys.  Zero is the formula without it.

    Returns
    -------
    ndarray (n_q,), float64

    Raises
    ------
    TypeError, ValueError
        For arrays that do not fit or are not finite, and labels out of range.

    Notes
    -----
    ``D_ij = scale ((qc_i - q_i).k_j + qc_i.(kc_j - k_j))``; the half-range of the first summand is
    that of ``(qc_i - q_i).(k_j - c)``.  Cauchy-Schwarz.  ``O((n_q + n_k) d)`` operations.  Derived.

    Examples
    --------
    >>> q, k = np.array([[1.0], [2.0]]), np.array([[0.0], [1.0]])
    >>> clusters = (np.array([[1.5]]), np.array([0, 0]))
    >>> cluster_eta_apriori(q, k, queries=clusters, scale=1.0).tolist()
    [0.25, 0.25]
    """
    rows, columns = _pair(q, k)
    factor = abs(check_scale(scale, rows.shape[1]))
    if shift is None:
        c = columns.mean(axis=0) if len(columns) else np.zeros(rows.shape[1])
    else:
        c = as_array(shift, "shift")
        if c.shape != (rows.shape[1],) or c.dtype.kind not in "iuf":
            raise ValueError(
                f"shift must be a real vector of length {rows.shape[1]}, got {c.dtype} of shape "
                f"{c.shape}; give a point among the keys"
            )
        check_finite(c.astype(np.float64), "shift")
    centre_q, centre_k = _centred(rows, queries, "queries"), _centred(columns, keys, "keys")
    reach = float(np.linalg.norm(columns - c, axis=1).max(initial=0.0))
    radius = float(np.linalg.norm(columns - centre_k, axis=1).max(initial=0.0))
    first = np.linalg.norm(rows - centre_q, axis=1) * reach
    out: NDArray[np.float64] = factor * (first + np.linalg.norm(centre_q, axis=1) * radius)
    return out


# --- rounding -----------------------------------------------------------------------------------


def _rounding(dtype: str, per: str) -> None:
    for value, name, known in ((dtype, "dtype", _DTYPES), (per, "per", _PER)):
        if not isinstance(value, str):
            raise TypeError(
                f"{name} must be a string, got {type(value).__name__}; choose one of "
                f"{', '.join(known)}"
            )
        if value not in known:
            raise ValueError(
                f"{name} must be one of {', '.join(known)}, got {value!r}{closest(value, known)}"
            )


def _steps(x: Array, per: str) -> Array:
    """Return the step of a symmetric int8 with 127 levels a side, of all or of each row."""
    axis = None if per == "tensor" else 1
    size = np.max(np.abs(x), axis=axis, keepdims=True, initial=0.0)
    return np.asarray(size / _LEVELS)


def _error(x: Array, dtype: str, per: str, name: str) -> Array:
    """Return how far rounding can move each entry of x."""
    if dtype == "int8":
        return np.broadcast_to(_steps(x, per) / 2, x.shape)
    known = PRECISIONS[dtype]
    if (np.abs(x) > known.largest).any():
        raise ValueError(
            f"{name} must be at most {known.largest:g} in {dtype}, got "
            f"{float(np.abs(x).max()):g}; scale it down, or use bfloat16"
        )
    return np.maximum(known.u * np.abs(x), known.floor)


@without_floating_errors
def quantize(x: object, dtype: str, *, per: str = "tensor") -> NDArray[np.float64]:
    """Round to another number format and return the rounded numbers, widened exactly.

    Parameters
    ----------
    x : array (n, d)
    dtype : {"float16", "bfloat16", "float32", "int8"}
        int8 is symmetric with 127 levels a side: ``step round(x/step)``,
        ``step = max|x|/127``.
    per : {"tensor", "row"}
        One step of int8 for all rows, or one a row.

    Returns
    -------
    ndarray (n, d), float64

    Raises
    ------
    TypeError, ValueError
        For arrays that are not finite matrices, unknown formats, and numbers out of their range.

    Notes
    -----
    Round to nearest, ties to even.

    Examples
    --------
    >>> quantize([[1.0, 1.001]], "bfloat16").tolist(), quantize([[1.27, 0.514]], "int8").tolist()
    ([[1.0, 1.0]], [[1.27, 0.51]])
    """
    _rounding(dtype, per)
    values = _matrix(x, "x")
    if dtype == "int8":
        step = _steps(values, per)
        return np.asarray(step * np.rint(values / np.where(step > 0, step, 1.0)))
    _error(values, dtype, per, "x")  # refuses what the format cannot hold
    if dtype == "bfloat16":
        # 8 significant bits, fewer below 2^-126: the distance of neighbours is a power of two.
        exponent = np.maximum(np.frexp(values)[1], -125)
        return np.asarray(np.ldexp(np.rint(np.ldexp(values, 8 - exponent)), exponent - 8))
    with np.errstate(under="ignore"):
        rounded = values.astype(np.float16 if dtype == "float16" else np.float32)
    return rounded.astype(np.float64)


@without_floating_errors
def quantization_eta(
    q: object, k: object, dtype: str, *, scale: float | None = None, per: str = "tensor"
) -> NDArray[np.float64]:
    """Bound the half-range of the logit error of queries and keys that are rounded.

    With ``|q_ic - fl(q_ic)| <= e_ic``, ``|k_jc - fl(k_jc)| <= e'_jc`` and the half-ranges
    ``h_c = (max_j k_jc - min_j k_jc)/2``::

        eta_i <= |scale| sum_c (e_ic h_c + (|q_ic| + e_ic) max_j e'_jc).

    Parameters
    ----------
    q, k : array (n_q, d), (n_k, d)
        Before rounding.
    dtype : {"float16", "bfloat16", "float32", "int8"}
        For floats ``e = max(u |x|, floor)`` with the unit roundoff u of `PRECISIONS`, for int8
        half a step (see `quantize`).
    scale : float, optional
        None is ``1/sqrt(d)``.
    per : {"tensor", "row"}
        One step of int8 for all rows, or one a row.

    Returns
    -------
    ndarray (n_q,), float64

    Raises
    ------
    TypeError, ValueError
        As for `quantize`.

    Notes
    -----
    ``D_ij = scale (dq_i.k_j + (q_i + dq_i).dk_j)``: a constant vector added to the keys does not
    change the range of the first summand, hence h.  The second is at most its absolute value.  The
    logits of the rounded arrays are meant exactly: what a kernel rounds on its way comes on top.
    ``O((n_q + n_k) d)`` operations.  Derived.

    Examples
    --------
    >>> q, k = np.array([[1.0, 2.0]]), np.array([[0.5, -1.0], [0.25, 1.0]])
    >>> eta = quantization_eta(q, k, "bfloat16", scale=1.0)
    >>> eta.round(6).tolist()
    [0.018105]
    >>> rounded = compression_eta(q, k, quantize(q, "bfloat16"), quantize(k, "bfloat16"), scale=1.0)
    >>> bool((rounded <= eta).all())
    True
    """
    _rounding(dtype, per)
    queries, keys = _pair(q, k)
    factor = abs(check_scale(scale, queries.shape[1]))
    e_q, e_k = _error(queries, dtype, per, "q"), _error(keys, dtype, per, "k")
    if len(keys) == 0:
        return np.zeros(len(queries))
    half = np.ptp(keys, axis=0) / 2
    out: NDArray[np.float64] = factor * (
        product(e_q, half) + product(np.abs(queries) + e_q, e_k.max(axis=0))
    )
    return out


__all__ = [
    "OutputBound",
    "PRECISIONS",
    "Precision",
    "cluster_eta_apriori",
    "compression_eta",
    "kl_bound",
    "lipschitz_bound",
    "log_ratio_bound",
    "logit_eta",
    "output_bound",
    "quantization_eta",
    "quantize",
    "tv_bound",
    "value_diameter",
]


def __dir__() -> list[str]:
    return __all__
