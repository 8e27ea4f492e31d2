"""Fewer hidden dimensions: Q and K replaced by (n, d_in) arrays with almost the same logits.

``Qh = Q R`` and ``Kh = (K - 1 c^T) T`` with maps R, T (d, d_in), so that ``Qh Kh^T`` stands for
``Q K^T`` up to a constant in each row, which no softmax sees.  Any method can be run on the
compressed problem; what logits that are wrong by so much do to attention is said by
`sketchattn.errors.perturbation`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..base.arguments import as_array, check_choice, check_finite, check_integer
from ..base.draws import Rng
from ..base.floating import without_floating_errors
from ..problem import AttentionProblem

Array = NDArray[Any]

# Whether keys are centred before they are projected, where a caller does not say.
CENTERED = {"svd": True, "gaussian": False, "srht": False, "pca_k": True}
KINDS = tuple(CENTERED)
# Kinds that draw one matrix for both sides, blind to Q and K.
RANDOM_KINDS = ("gaussian", "srht")

# Rows of Q or K that are one piece of work, for each of their columns: what is done follows from
# the shapes alone, so that the number of threads does not change the bits.
_ROWS_A_COLUMN = 16


class Compression(NamedTuple):
    """Hold what compresses queries and keys: ``Qh = Q R``, ``Kh = (K - 1 c^T) T``.

    Attributes
    ----------
    query_map : ndarray (d, d_in), float64
        R.
    key_map : ndarray (d, d_in), float64
        T.
    shift : ndarray (d,), float64
        c, zeros where keys are not centred.
    """

    query_map: Array
    key_map: Array
    shift: Array


def largest_width(d: int, kind: str) -> int | None:
    """Return the largest d_in of a kind for width d, at which it loses nothing; None: no limit.

    Examples
    --------
    >>> largest_width(6, "svd"), largest_width(6, "srht"), largest_width(6, "gaussian")
    (6, 8, None)
    """
    check_kind(kind)
    if kind == "gaussian":
        return None
    return 1 << (d - 1).bit_length() if kind == "srht" else d


def check_kind(kind: object) -> str:
    """Return the name of a kind of compression, or refuse it."""
    if not isinstance(kind, str):
        raise TypeError(
            f"kind must be a name, got {type(kind).__name__}; choose one of {', '.join(KINDS)}"
        )
    check_choice(kind, "kind", KINDS)
    return kind


def check_center(center: object) -> bool | None:
    """Return True, False or None, or refuse it."""
    if center is not None and not isinstance(center, bool | np.bool_):
        raise TypeError(
            f"center must be a bool or None, got {type(center).__name__}; True subtracts the mean "
            f"key, which no softmax sees"
        )
    return None if center is None else bool(center)


def check_width_in(d_in: object, d: int, kind: str) -> int:
    """Return d_in as an integer that fits a kind of compression of width d."""
    most = largest_width(d, kind)
    limit = "d" if most == d else "the padded d"
    return check_integer(d_in, "d_in", 1, f"change d_in for kind {kind!r}", high=most, limit=limit)


# --- the maps -----------------------------------------------------------------------------------


@without_floating_errors
def draw_projection(d: int, d_in: int, kind: str, rng: Rng = None) -> Array:
    """Draw R (d, d_in) with ``E[R R^T] = I``, the map of both sides of a random kind.

    Parameters
    ----------
    d, d_in : int
        Widths before and after, at least 1; "srht" has d_in up to d padded to a power of two.
    kind : {"gaussian", "srht"}
        ``R^T`` is the sketch of that name: independent N(0, 1/d_in), or d_in sampled rows of a
        Hadamard matrix with random signs.
    rng : None, int or numpy.random.Generator

    Returns
    -------
    ndarray (d, d_in), float64
        A larger d_in with the same ``rng`` extends the columns, up to their scale.

    Raises
    ------
    TypeError, ValueError
        For sizes out of range, and kinds that draw nothing.

    Examples
    --------
    >>> import numpy as np
    >>> r = draw_projection(8, 8, "srht", rng=0)
    >>> bool(np.allclose(r @ r.T, np.eye(8)))
    True
    """
    from .base import make_sketch

    if check_kind(kind) not in RANDOM_KINDS:
        raise ValueError(
            f"kind must be one that draws, {' or '.join(RANDOM_KINDS)}, got {kind!r}; "
            f"use fit_compression"
        )
    wide = check_integer(d, "d", 1, "project vectors of one entry or more")
    width = check_width_in(d_in, wide, kind)
    return np.ascontiguousarray(make_sketch(kind, width, wide, rng).to_dense().T)


@without_floating_errors
def fit_compression(
    problem: AttentionProblem,
    d_in: int,
    kind: str = "svd",
    rng: Rng = None,
    *,
    center: bool | None = None,
) -> Compression:
    """Return the maps that compress the queries and keys of a problem to width d_in.

    Parameters
    ----------
    problem : AttentionProblem
        Masked keys decide nothing.
    d_in, kind, rng, center
        As for `compress`.

    Returns
    -------
    Compression

    Raises
    ------
    TypeError, ValueError
        As `compress`.

    Notes
    -----
    "svd": with ``Q = Q1 R_Q``, ``K_c = Q2 R_K`` and ``R_Q R_K^T = U diag(s) W^T``,
    ``R = R_K^T W_m s_m^(-1/2)`` and ``T = R_Q^T U_m s_m^(-1/2)``, m = d_in, so that
    ``Q R = Q1 U_m s_m^(1/2)``: the orthonormal factors Q1 and Q2 are never formed, and neither
    triangle is inverted.  Directions whose s is rounding, ``s <= d eps |R_Q|_F |R_K|_F``, get
    zeros.  R T^T is an oblique projector in general: below the rank the best logits are those of no
    orthogonal one.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=32, d=8, rng=0)[0]
    >>> fit_compression(problem, 3).query_map.shape
    (8, 3)
    """
    if not isinstance(problem, AttentionProblem):
        raise TypeError(
            f"problem must be an AttentionProblem, got {type(problem).__name__}; "
            f"make one with sketchattn.AttentionProblem(q, k, v)"
        )
    check_kind(kind)
    width = check_width_in(d_in, problem.d, kind)
    centered = check_center(center)
    centered = CENTERED[kind] if centered is None else centered
    shift = mean_key(problem) if centered else np.zeros(problem.d)
    if kind in RANDOM_KINDS:
        projection = draw_projection(problem.d, width, kind, rng)
        return Compression(projection, projection, shift)
    keys = problem.k if problem.key_mask is None else problem.k[problem.key_mask]
    right = _triangle(keys, shift)
    if kind == "pca_k":
        _, _, vt = _svd(right, "k")
        directions = np.ascontiguousarray(vt[:width].T)
        return Compression(directions, directions, shift)
    left = _triangle(problem.q, np.zeros(problem.d))
    with np.errstate(over="ignore", invalid="ignore"):
        u, s, vt = _svd(left @ right.T, "q @ k.T")
        size = float(np.linalg.norm(left) * np.linalg.norm(right))
    kept = s[:width] > problem.d * np.finfo(np.float64).eps * size
    factor = np.where(kept, 1 / np.sqrt(np.where(kept, s[:width], 1)), 0)
    return Compression((right.T @ vt[:width].T) * factor, (left.T @ u[:, :width]) * factor, shift)


def mean_key(problem: AttentionProblem) -> Array:
    """Return the mean of the keys that are not masked, float64 (d,); zeros if there are none."""
    keys = problem.k if problem.key_mask is None else problem.k[problem.key_mask]
    if not len(keys):
        return np.zeros(problem.d)
    return np.asarray(keys.mean(axis=0, dtype=np.float64))


def _svd(matrix: Array, name: str) -> tuple[Array, Array, Array]:
    from ..kernels._threads import blas_single_thread

    check_finite(matrix, name)
    with blas_single_thread():
        u, s, vt = np.linalg.svd(matrix)
    return u, s, vt


def _pieces(n: int, d: int) -> list[slice]:
    step = max(_ROWS_A_COLUMN * d, 512)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _upper(x: Array) -> Array:
    """Return the triangle of a QR factorisation."""
    made: Any = np.linalg.qr(x, mode="r")  # stubs of some releases know the other modes only
    return np.asarray(made)


def _triangle(x: Array, shift: Array) -> Array:
    """Return R (d, d) with ``R^T R = (X - 1 c^T)^T (X - 1 c^T)``, of a QR by pieces of rows.

    The triangles of all pieces, stacked, have the triangle of the whole: backward stable as one QR
    is, and it needs no Gram matrix, which would lose half of the digits.
    """
    from ..kernels._threads import blas_single_thread, map_pieces

    d = x.shape[1]

    def triangle(piece: slice) -> Array:
        return _upper(x[piece].astype(np.float64) - shift)

    parts = list(map_pieces(triangle, _pieces(len(x), d)))
    whole = np.zeros((d, d))
    with blas_single_thread():
        if len(parts) > 1:
            parts = [_upper(np.concatenate(parts))]
    if parts:
        whole[: len(parts[0])] = parts[0]
    return whole


# --- what they do -------------------------------------------------------------------------------


def _project(x: Array, shift: Array, matrix: Array, keep: Array | None) -> Array:
    """Return ``(X - 1 c^T) M`` in the precision of X, computed in float64; masked rows are zero."""
    from ..kernels._threads import map_pieces

    out = np.empty((len(x), matrix.shape[1]), x.dtype)
    rows = x if keep is None else x[keep]
    made = out if keep is None else np.empty((len(rows), matrix.shape[1]), x.dtype)
    pieces = _pieces(len(rows), x.shape[1])

    def product(piece: slice) -> None:
        made[piece] = (rows[piece].astype(np.float64) - shift) @ matrix

    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused
        for _ in map_pieces(product, pieces):
            pass
    if keep is not None:
        out[keep] = made
        out[~keep] = 0
    return out


@without_floating_errors
def apply_compression(problem: AttentionProblem, maps: Compression) -> AttentionProblem:
    """Return the problem with its queries and keys compressed by given maps.

    Parameters
    ----------
    problem : AttentionProblem
        Of width d.
    maps : Compression
        Maps (d, d_in) and a shift (d,).

    Returns
    -------
    AttentionProblem
        Of width d_in; scale, masks, values and precision are kept, masked keys are zero.

    Raises
    ------
    TypeError, ValueError
        For maps that do not fit, and results that overflow the precision of the problem.
    """
    query_map, key_map, shift = (
        np.asarray(as_array(x, name), np.float64)
        for x, name in zip(maps, Compression._fields, strict=True)
    )
    wanted = (problem.d, query_map.shape[-1] if query_map.ndim else 0)
    if query_map.shape != wanted or key_map.shape != wanted or shift.shape != wanted[:1]:
        raise ValueError(
            f"maps must have shapes (d, d_in), (d, d_in) and (d,) with d = {problem.d}, got "
            f"{query_map.shape}, {key_map.shape} and {shift.shape}; fit them to this problem"
        )
    keep = problem.key_mask
    q = _project(problem.q, np.zeros(problem.d), query_map, None)
    k = _project(problem.k, shift, key_map, keep)
    check_finite(q, "compressed q")
    check_finite(k, "compressed k")
    values = [] if problem.arrays.v is None else [problem.arrays.v]
    if keep is None:
        return AttentionProblem.adopt(q, k, *values, scale=problem.scale, causal=problem.causal)
    return AttentionProblem(
        q,
        k,
        *values,
        scale=problem.scale,
        causal=problem.causal,
        key_mask=keep,
        name=problem.name,
    )


@without_floating_errors
def compress_problem(
    problem: AttentionProblem,
    d_in: int,
    kind: str = "svd",
    rng: Rng = None,
    *,
    center: bool | None = None,
) -> AttentionProblem:
    """Return a problem of width d_in whose logits stand for those of a problem.

    Parameters
    ----------
    problem : AttentionProblem
    d_in, kind, rng, center
        As for `compress`.

    Returns
    -------
    AttentionProblem
        Scale, masks, values and precision are kept.

    Raises
    ------
    TypeError, ValueError
        As `compress`.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=32, d=8, rng=0)[0]
    >>> small = compress_problem(problem, 3)
    >>> small.d, small.scale == problem.scale
    (3, True)
    """
    maps = fit_compression(problem, d_in, kind, rng, center=center)
    return apply_compression(problem, maps)


@without_floating_errors
def compress(
    q: ArrayLike,
    k: ArrayLike,
    d_in: int,
    kind: str = "svd",
    rng: Rng = None,
    *,
    key_mask: ArrayLike | None = None,
    center: bool | None = None,
) -> tuple[Array, Array]:
    """Return ``Qh`` and ``Kh`` of width d_in with ``Qh Kh^T ~ Q K^T``, up to a constant a row.

    Parameters
    ----------
    q : array (n_q, d)
        Queries, as for `AttentionProblem`.
    k : array (n_k, d)
        Keys.
    d_in : int
        Width after, in 1..d; up to the next power of two for "srht", any for "gaussian".
    kind : {"svd", "gaussian", "srht", "pca_k"}
        "svd": the best logits of rank d_in, from the singular vectors of ``Q K_c^T``.
        "gaussian", "srht": ``Q R`` and ``K R`` with a random R, ``E[R R^T] = I``.
        "pca_k": projections on the first d_in principal axes of the keys.
    rng : None, int or numpy.random.Generator
        Of the random kinds.
    key_mask : bool array (n_k,), optional
        True for the keys that exist; only these decide, and the others become zeros.
    center : bool, optional
        Whether the mean key is subtracted first; None: for "svd" and "pca_k".

    Returns
    -------
    q, k : ndarray (n_q, d_in), (n_k, d_in)
        C-contiguous, in the precision of the input, to be used with the same scale.

    Raises
    ------
    TypeError, ValueError
        As `AttentionProblem`, and for d_in out of range or unknown kinds.

    Notes
    -----
    The mean key moves every logit of a row by the same, so centred logits give the same attention,
    and have a smaller rank and norm.  "svd" (Eckart, Young and Mirsky) is optimal for them in
    every unitarily invariant norm, ``|Q K_c^T - Qh Kh^T|_2 = s_(d_in + 1)(Q K_c^T)``, exact from
    ``d_in = rank(Q K_c^T)`` on, whatever the ranks of Q and K.  One logit of "gaussian" has the
    variance ``(|q|^2 |k|^2 + (q.k)^2) / d_in``; promises of the lemma of Johnson and Lindenstrauss
    need d_in beyond d at the sizes of heads.

    Cost ``O((n_q + n_k) d^2)`` for "svd" and "pca_k", ``O((n_q + n_k) d d_in)`` for the others;
    computed in float64, rounded once.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> q, k = rng.standard_normal((9, 4)), rng.standard_normal((7, 4))
    >>> small_q, small_k = compress(q, k, 2)
    >>> logits = q @ (k - k.mean(axis=0)).T
    >>> error = np.linalg.norm(logits - small_q @ small_k.T, 2)
    >>> bool(np.isclose(error, np.linalg.svd(logits)[1][2]))
    True
    """
    problem = AttentionProblem(q, k, key_mask=key_mask)
    made = compress_problem(problem, d_in, kind, rng, center=center)
    return made.arrays.q, made.arrays.k


__all__ = [
    "Compression",
    "apply_compression",
    "compress",
    "compress_problem",
    "draw_projection",
    "fit_compression",
    "largest_width",
    "mean_key",
]


def __dir__() -> list[str]:
    return __all__
