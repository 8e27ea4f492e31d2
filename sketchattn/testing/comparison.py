"""One output against exact attention: how wrong, where, and which keys are lost or read twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.arguments import as_array, check_finite, closest
from ..base.floating import without_floating_errors
from ..problem import AttentionProblem
from .inputs import DTYPES, ROUNDOFF, dtype_name, rounded

Array = NDArray[Any]

# Keys are looked for in errors of more than this many floors.
_SEARCHED = 4.0
# A coefficient of a key counts from half of what a lost key has, if what the key contributes is
# this many times what is not explained.
_HALF = 0.5
_CLEAR = 8.0
# The share of the error that named keys may leave.
_REST = 0.1
# Steps of the solver; keys that are lost show after a few.
_STEPS = 60


@without_floating_errors
def rounding_floor(problem: AttentionProblem, dtype: Any) -> float:
    """Return the error of the best program of a precision: inputs and output rounded, no more.

    ``|round(attention(round(Q), round(K), round(V))) - O|_F/|O|_F``, where only the attention in
    the middle is exact.  A tolerance is a multiple of it: programs that also round logits or
    weights have 2 to 10 times as much.

    Parameters
    ----------
    problem : AttentionProblem
        With values.
    dtype : {"float16", "bfloat16", "float32", "float64"}
        What the program takes and returns: a name, or a dtype of NumPy, ml_dtypes, torch or jax.
        For float64, in which the truth is computed, it is the unit roundoff.

    Returns
    -------
    float
        0 where inputs and output are numbers of that precision.

    Raises
    ------
    TypeError, ValueError
        For anything else, a problem without values, and values or an output that overflow there.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=64, d=16, rng=0)[0]
    >>> half, single = (rounding_floor(problem, x) for x in ("bfloat16", "float32"))
    >>> bool(1e-3 < half < 2e-2 and 1e-8 < single < 1e-6)
    True
    """
    name = _named(dtype)
    wide = _wide(problem)
    if name == "float64":
        return ROUNDOFF[name]
    parts = [rounded(x, name).astype(np.float64) for x in (wide.q, wide.k, wide.values)]
    for label, x in zip("qkv", parts, strict=True):
        check_finite(x, f"{label} in {name}")
    coarse = AttentionProblem(*parts, scale=wide.scale, causal=wide.causal, key_mask=wide.key_mask)
    found = rounded(coarse.output, name).astype(np.float64)
    check_finite(found, f"the output in {name}")
    return _ratio(np.linalg.norm(found - wide.output), np.linalg.norm(wide.output))


def _named(dtype: Any) -> str:
    """Return the name of a precision."""
    name = dtype_name(dtype)
    if name not in DTYPES:
        raise ValueError(
            f"dtype must be one of {', '.join(DTYPES)}, got {name!r}{closest(name, DTYPES)}"
        )
    return name


def _wide(problem: AttentionProblem) -> AttentionProblem:
    if not isinstance(problem, AttentionProblem):
        raise TypeError(
            f"problem must be an AttentionProblem, got {type(problem).__name__}; "
            f"make one with sketchattn.AttentionProblem(q, k, v)"
        )
    wide = problem.astype(np.float64)
    _ = wide.values  # refuses a problem without them
    return wide


def _ratio(x: Any, y: Any) -> float:
    if y > 0:
        return float(x / y)
    return 0.0 if x == 0 else float("inf")


@dataclass(frozen=True)
class Comparison:
    """Say how an output differs from exact attention.

    Attributes
    ----------
    error : float
        ``|Ohat - O|_F/|O|_F``.
    floor : float
        What the best program of the precision below gets, `rounding_floor`.
    correlation : float
        Of the entries of Ohat and O about their means; NaN where one is constant.
    slope : float
        ``<Ohat, O>/|O|_F^2``, 1 without an error: outputs that are not divided by their
        normaliser, or by a wrong one, show here.
    worst_rows : tuple of (int, float)
        The five rows with the largest ``|Ohat_i - O_i|/|O_i|``, worst first.
    not_finite : int
        Entries of Ohat that are NaN or infinite; they count as zero in all else.
    lost, doubled : tuple of int
        Keys that the output does not have, or counts twice, where that explains its error.
    rest : float
        The error that is left without these keys.
    dtype : str
        The precision of the floor.
    """

    error: float
    floor: float
    correlation: float
    slope: float
    worst_rows: tuple[tuple[int, float], ...]
    not_finite: int
    lost: tuple[int, ...]
    doubled: tuple[int, ...]
    rest: float
    dtype: str

    def __str__(self) -> str:
        """Return all of it in words."""
        times = _ratio(self.error, self.floor)
        lines = [
            f"error {self.error:.3g}: {times:.3g} times what rounding costs in {self.dtype} "
            f"({self.floor:.2g})",
            f"correlation {self.correlation:.6f}, slope {self.slope:.4f}",
            "worst rows " + ", ".join(f"{i} ({x:.2g})" for i, x in self.worst_rows),
        ]
        if self.not_finite:
            lines.insert(0, f"{self.not_finite} entries are not finite")
        for keys, words in ((self.lost, "lost"), (self.doubled, "counted twice")):
            if keys:
                lines.append(f"{_ranges(keys)} {words}: the error without that is {self.rest:.2g}")
        if not self.lost and not self.doubled and times > _SEARCHED:
            lines.append(self._unexplained(times))
        return "\n".join(lines)

    def _unexplained(self, times: float) -> str:
        """Return why an error has no keys beside it."""
        if self.not_finite:
            return "no key was looked for: that needs an output that is finite"
        if times < 1 / _REST:  # what rounding leaves is more than named keys may leave
            return (
                f"no lost or doubled key could be named, so near to rounding it hides them; "
                f"compare what the program gives in a wider precision than {self.dtype}"
            )
        return "no lost or doubled keys explain the error: it is another mistake"


def _ranges(keys: tuple[int, ...]) -> str:
    """Return numbers in words: runs by their ends."""
    runs: list[list[int]] = []
    for j in keys:
        if runs and j == runs[-1][1] + 1:
            runs[-1][1] = j
        else:
            runs.append([j, j])
    shown = [f"{a}" if a == b else f"{a} to {b}" for a, b in runs[:6]]
    more = f" and {len(runs) - 6} more runs" if len(runs) > 6 else ""
    return f"key{'' if len(keys) == 1 else 's'} {', '.join(shown)}{more}"


@without_floating_errors
def compare(problem: AttentionProblem, output: object, *, dtype: Any = None) -> Comparison:
    """Say how the output of any program differs from exact attention, and which keys it lost.

    A program that leaves the keys T out gives ``Ohat_i (1 - sum_T A_ij) = O_i - sum_T A_ij V_j``,
    so that ``Ohat_i - O_i = sum_j c_j A_ij (Ohat_i - V_j)`` with c = 1 on T and 0 elsewhere; keys
    that are counted twice have c = -1.  The coefficients are those of least squares over all rows
    (LSQR, two exact products a step, nothing n x n).  ``c = 1`` for all keys always fits, so that
    coefficients cost something: ten times what rounding leaves, spread over all keys.  A key is
    named where its coefficient is beyond a half and what it contributes is clear of what stays
    unexplained, if the named keys together explain all but a tenth of the error.

    Parameters
    ----------
    problem : AttentionProblem
        With values.
    output : array (n_q, d_v)
        Floating point: of NumPy, of torch in CPU memory, or bfloat16 of ml_dtypes.  Entries that
        are not finite are counted.
    dtype : {"float16", "bfloat16", "float32", "float64"}, optional
        What the program rounds to, as for `rounding_floor`; None is the dtype of ``output``.  To
        be given where that was widened on its way here, by ``.float().cpu()`` for instance.

    Returns
    -------
    Comparison

    Raises
    ------
    TypeError, ValueError
        For another shape or dtype, and for a problem without values.

    Examples
    --------
    A program that drops the last three of 67 keys:

    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=67, d=16, rng=0)[0]
    >>> short = sa.AttentionProblem(problem.q, problem.k[:64], problem.v[:64])
    >>> found = compare(problem, short.output)
    >>> found.lost, found.doubled, found.rest < 1e-5 < found.error
    ((64, 65, 66), (), True)
    """
    wide = _wide(problem)
    given = as_array(output, "output")
    wanted = (wide.n_q, wide.values.shape[1])
    if given.shape != wanted:
        raise ValueError(
            f"output must have the shape (n_q, d_v) = {wanted} of the problem, got {given.shape}; "
            f"compare one head at a time"
        )
    if given.dtype.kind != "f" and given.dtype.name not in DTYPES:
        raise TypeError(
            f"output must be floating point, got {given.dtype}; give what the program returned"
        )
    # A tensor in bfloat16 has become an array in float32; what is wider than float64 has its floor.
    names = (dtype_name(getattr(output, "dtype", None) or given.dtype), given.dtype.name, "float64")
    precision = next(x for x in names if x in DTYPES) if dtype is None else _named(dtype)
    found = np.asarray(given, np.float64)
    finite = np.isfinite(found)
    found = np.where(finite, found, 0.0)
    right = wide.output
    size, gap = float(np.linalg.norm(right)), found - right
    rows = np.linalg.norm(gap, axis=1)
    sizes = np.linalg.norm(right, axis=1)
    relative = np.where(
        sizes > 0, rows / np.where(sizes > 0, sizes, 1.0), np.where(rows, np.inf, 0)
    )
    order = np.argsort(-relative, kind="stable")[:5]
    floor = rounding_floor(problem, precision)
    error = _ratio(float(np.linalg.norm(gap)), size)
    lost: tuple[int, ...] = ()
    doubled: tuple[int, ...] = ()
    rest = error
    if finite.all() and error > _SEARCHED * floor:
        lost, doubled, rest = _missing(wide, found, gap, size, floor)
    return Comparison(
        error,
        floor,
        _correlation(found, right),
        _ratio(float(np.sum(found * right)), size**2),
        tuple((int(i), float(relative[i])) for i in order),
        int((~finite).sum()),
        lost,
        doubled,
        rest,
        precision,
    )


def _correlation(x: Array, y: Array) -> float:
    x, y = x - x.mean(), y - y.mean()
    size = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(np.sum(x * y)) / size if size > 0 else float("nan")


def _missing(
    problem: AttentionProblem, found: Array, gap: Array, size: float, floor: float
) -> tuple[tuple[int, ...], tuple[int, ...], float]:
    """Return keys that are lost and doubled, and the relative error that is left without them."""
    from scipy.sparse.linalg import LinearOperator, lsqr

    a, v = problem.exact, problem.values
    weights = _contributions(problem, found)
    scales = np.where(weights > 0, 1 / np.where(weights > 0, weights, 1.0), 0.0)

    def ahead(c: Array) -> Array:
        """Return ``sum_j c_j A_ij (Ohat_i - V_j)``."""
        both = a @ np.concatenate([c[:, None], c[:, None] * v], axis=1)
        return np.asarray(found * both[:, :1] - both[:, 1:])

    def back(y: Array) -> Array:
        along = np.sum(y * found, axis=1, keepdims=True)
        both = a.T @ np.concatenate([along, y], axis=1)
        return np.asarray(both[:, 0] - np.sum(both[:, 1:] * v, axis=1))

    # Columns of length one: each key counts by what it can explain, whatever its weight.
    operator = LinearOperator(
        (gap.size, problem.n_k),
        matvec=lambda c: ahead(scales * np.ravel(c)).ravel(),
        rmatvec=lambda y: scales * back(np.reshape(y, gap.shape)),
        dtype=np.float64,
    )
    damp = np.sqrt(10) * floor * size / max(float(np.linalg.norm(weights)), 1e-300)
    solved = lsqr(operator, gap.ravel(), damp, atol=1e-10, btol=1e-10, iter_lim=_STEPS)
    c = scales * solved[0]
    whole = float(np.linalg.norm(gap))
    named = np.where(np.abs(c) > _HALF, np.sign(c), 0.0)
    left = float(np.linalg.norm(gap - ahead(named)))
    named = np.where(weights > _CLEAR * left / np.sqrt(gap.size), named, 0.0)
    left = float(np.linalg.norm(gap - ahead(named)))
    # An output without any key is zero, which needs no search to see.
    if not named.any() or named.all() or left > _REST * whole:
        return (), (), _ratio(whole, size)
    lost, doubled = (tuple(int(j) for j in np.flatnonzero(named == x)) for x in (1, -1))
    return lost, doubled, _ratio(left, size)


def _contributions(problem: AttentionProblem, found: Array) -> Array:
    """Return ``(sum_i A_ij^2 |Ohat_i - V_j|^2)^(1/2)`` of every key.

    ``A_ij^2`` are the weights of twice the logits, each row times ``e^(lse'_i - 2 lse_i)``.
    """
    twice = AttentionProblem(
        problem.q,
        problem.k,
        problem.values,
        scale=2 * problem.scale,
        causal=problem.causal,
        key_mask=problem.key_mask,
    )
    lse = problem.logsumexp
    seen = np.isfinite(lse)
    rows = np.exp(np.where(seen, twice.logsumexp - 2 * np.where(seen, lse, 0), -np.inf))[:, None]
    both = twice.exact.T @ np.concatenate(
        [rows * np.sum(found**2, axis=1, keepdims=True), rows * found, rows], axis=1
    )
    v = problem.values
    square = both[:, 0] - 2 * np.sum(both[:, 1:-1] * v, axis=1) + both[:, -1] * np.sum(v**2, axis=1)
    return np.asarray(np.sqrt(np.maximum(square, 0.0)))
