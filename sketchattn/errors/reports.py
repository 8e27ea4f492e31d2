"""Errors of an approximation, each with its denominator in its name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from os import PathLike
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..base.arguments import as_array, check_finite, check_logits, float_dtype
from ..base.floating import without_floating_errors
from ..base.words import Phrase, Worded, number
from ..kernels._threads import blas_single_thread
from ..operators.base import AttentionOperator
from ..operators.sampled import SampledAttention
from ..operators.solve import keep_solution, solution, solve_rows
from ..operators.spectra import dense_spectral_norm, difference_norm, exact_spectral_norm
from ..operators.steep import steep_rows
from ..operators.wrapped import DenseAttention, as_operator
from ..problem import AttentionProblem
from .certificates import ErrorCertificate as ErrorCertificate
from .certificates import certify as certify
from .frames import by_head, is_many

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[Any]

# Above this many entries the matrix is never formed: 2048 x 2048 in float64 is 32 MB.
DENSE_ENTRIES = 1 << 22
# Entries of the block of rows of Ahat that is compared in one piece: larger ones leave the cache,
# and are given back to the system and asked for again, page by page.
BLOCK_ENTRIES = 1 << 20


@dataclass(frozen=True, repr=False)
class ErrorReport(Worded):
    """Record how far ``Ahat`` is from ``A`` and ``Ohat = Ahat V`` from ``O = A V``.

    Attributes
    ----------
    output_fro_rel : float
        ``|Ohat - O|_F / |O|_F``.
    output_fro_amm : float
        ``|Ohat - O|_F / (|A|_F |V|_F)``, the denominator of approximate matrix multiplication.
    output_spec_rel : float
        ``|Ohat - O|_2 / |O|_2``.
    output_spec_amm : float
        ``|Ohat - O|_2 / (|A|_2 |V|_2)``.
    matrix_fro_rel : float
        ``|Ahat - A|_F / |A|_F``.
    matrix_spec_rel : float
        ``|Ahat - A|_2 / |A|_2``.
    row_tv_mean, row_tv_max : float
        Mean and maximum over rows of ``(1/2) sum_j |Ahat_ij - A_ij|``, the total variation.
    row_kl_mean : float
        Mean over rows of ``sum_j A_ij log(A_ij / Ahat_ij)``, infinite where ``Ahat`` is not
        positive on the support of A.
    skill : float
        ``1 - |Ohat - O|_F / |Omean - O|_F`` with the mean of V as ``Omean``: 0 is worth nothing.

    Notes
    -----
    Norms of V run over the keys that are not masked; means over the rows that see a key.  A
    quotient 0/0 is 0.  Fields that were not asked for, or that need values the problem does not
    have, are NaN.
    """

    output_fro_rel: float
    output_fro_amm: float
    output_spec_rel: float
    output_spec_amm: float
    matrix_fro_rel: float
    matrix_spec_rel: float
    row_tv_mean: float
    row_tv_max: float
    row_kl_mean: float
    skill: float

    _brief = ("output_fro_rel", "matrix_fro_rel", "skill")

    def as_dict(self) -> dict[str, float]:
        """Return the fields by name, in order."""
        return asdict(self)

    def _title(self) -> str:
        missing = [name for name, x in self.as_dict().items() if math.isnan(x)]
        rest = f", without {', '.join(missing)}" if missing else ""
        return f"errors of an approximation, 0 is exact{rest}"

    def _phrases(self) -> list[Phrase]:
        held = {name: x for name, x in self.as_dict().items() if not math.isnan(x)}
        return [Phrase(name, number(x), _ABOUT[name]) for name, x in held.items()]


_ABOUT = {
    "output_fro_rel": "of the output: |Ohat - O|_F / |O|_F",
    "output_fro_amm": "of the output as a product: |Ohat - O|_F / (|A|_F |V|_F)",
    "output_spec_rel": "of the output, spectral: |Ohat - O|_2 / |O|_2",
    "output_spec_amm": "of the output as a product, spectral: |Ohat - O|_2 / (|A|_2 |V|_2)",
    "matrix_fro_rel": "of the weights: |Ahat - A|_F / |A|_F",
    "matrix_spec_rel": "of the weights, spectral: |Ahat - A|_2 / |A|_2",
    "row_tv_mean": "share of its mass that a row has at wrong keys, mean over rows",
    "row_tv_max": "the same, the worst row",
    "row_kl_mean": "divergence of a row, mean over rows; inf where a visible key has no weight",
    "skill": "1 is exact, 0 is the mean of V for every query, less is worse than that",
}
FIELDS = tuple(f.name for f in fields(ErrorReport))


def _ratio(numerator: float, denominator: float) -> float:
    """Return the quotient, 0 for 0/0 and infinity for other divisions by zero."""
    if numerator == 0.0:
        return 0.0
    return numerator / denominator if denominator > 0.0 else math.inf


@dataclass(frozen=True)
class _Rows:
    """Sums over rows: squares of A and of the difference, total variation, divergence."""

    exact_square: Array
    square: Array
    variation: Array
    divergence: Array


def _sums(out: Array) -> _Rows:
    """Return the columns (n, 4) that kernels fill."""
    return _Rows(out[:, 0], out[:, 1], 0.5 * out[:, 2], out[:, 3])


def _dense_rows(exact: Array, other: Array) -> tuple[Array, _Rows]:
    """Return ``Ahat - A`` and the sums, from rows of A and Ahat, float64 (b, n_k) each."""
    from ..kernels.comparison import compare_matrices

    exact, other = (np.require(x, np.float64, ["C", "W", "A"]) for x in (exact, other))
    difference, out = compare_matrices(exact, other)
    return difference, _sums(out)


def _streamed_rows(
    wide: AttentionProblem, ahat: AttentionOperator
) -> tuple[AttentionProblem, _Rows]:
    """Return the exact side and the sums from blocks of rows of Ahat, beside tiles of A.

    Output and normalisers are found in the same pass, and kept in a problem that belongs to
    reports: those of ``wide`` come from another kernel, with other rounding, and its bits must not
    depend on whether a report came first.  A block with a steep row takes A as the exact side has
    it: tiles are ``exp(L - lse)``.
    """
    from ..kernels.comparison import compare_rows

    q, k, v = wide.arrays
    v = np.empty((wide.n_k, 0)) if v is None else v
    mask = wide.key_mask
    sums = np.empty((wide.n_q, 4))
    kept: list[AttentionProblem] = wide.cached("report", list)
    known = len(kept) > 0
    if known:
        output, lse = (x.copy() for x in solution(kept[0]))
    else:
        output, lse = np.empty((wide.n_q, v.shape[1])), np.empty(wide.n_q)
    steep = np.isin(np.arange(wide.n_q), steep_rows(wide))
    block = max(1, BLOCK_ENTRIES // wide.n_k)
    for start in range(0, wide.n_q, block):
        part = slice(start, min(start + block, wide.n_q))
        rows = ahat.rows(part)
        if steep[part].any():
            if not known:
                output[part], lse[part] = solve_rows(wide, np.arange(wide.n_q)[part], v)
            found = _dense_rows(wide.exact.rows(part), rows)[1]
            sums[part] = np.stack(
                [found.exact_square, found.square, 2.0 * found.variation, found.divergence], axis=1
            )
            continue
        compare_rows(
            q,
            k,
            v,
            np.require(rows, requirements=["C", "W"]),
            start,
            lse,
            output,
            sums,
            known=known,
            scale=wide.scale,
            first=wide.offset,
            right=0 if wide.causal else None,
            key_mask=None if mask is None else mask[None].copy(),
        )
    if not known:
        check_logits(lse)
        twin = type(wide)(*wide, scale=wide.scale, causal=wide.causal, key_mask=mask)
        keep_solution(twin, output, lse)
        kept.append(twin)
    return kept[0], _sums(sums)


@blas_single_thread()
def value_norms(problem: AttentionProblem) -> tuple[float, float]:
    """Return ``(|V|_F, |V|_2)`` over the keys that are not masked."""

    def compute() -> tuple[float, float]:
        v = np.asarray(problem.values[problem.kept_keys], np.float64)
        return float(np.linalg.norm(v)), dense_spectral_norm(v)

    return problem.cached("value_norms", compute)


# What two computations of one output in float64 differ by where it is the mean of V.
ROUNDING = 4 * float(np.finfo(np.float64).eps)


def _mean_error(problem: AttentionProblem, exact: Array) -> float:
    """Return ``|Omean - O|_F``, the error of the mean of the visible values; 0 for rounding."""
    from ..operators.visible_mean import VisibleMean

    def compute() -> float:
        wide = problem.astype(np.float64)
        gap = float(np.linalg.norm(VisibleMean(wide) @ wide.values - exact))
        return 0.0 if gap <= ROUNDING * float(np.linalg.norm(exact)) else gap

    return problem.cached("mean_error", compute)


def _check_output(problem: AttentionProblem, output: ArrayLike) -> Array:
    """Return an output array (n_q, d_v) of finite numbers."""
    array = as_array(output, "output")
    float_dtype(array, "output")
    wanted = (problem.n_q, problem.values.shape[1])
    if array.shape != wanted:
        raise ValueError(
            f"output must have shape (n_q, d_v) = {wanted}, got {array.shape}; pass that of one "
            f"head"
        )
    check_finite(array, "output")
    return array


def _refuse_output(problem: AttentionProblem, ahat: object) -> None:
    """Refuse an output in the place of a matrix; one that is as wide as there are keys is taken."""
    shape = tuple(getattr(ahat, "shape", ()))
    if problem.v is not None and shape == (problem.n_q, problem.d_v) and shape[1] != problem.n_k:
        raise ValueError(
            f"ahat must have the shape (n_q, n_k) = {(problem.n_q, problem.n_k)} of a matrix, got "
            f"{shape}, that of an output; an output goes in output="
        )


def _output_fields(
    problem: AttentionProblem,
    output: Array,
    exact: Array,
    exact_fro: float,
    spectral: bool,
    which: str,
) -> dict[str, float]:
    """Return the fields of an output against the exact one (n_q, d_v), with ``|A|_F``.

    ``which`` of the computations of the exact output it is: its norms are kept under this name.
    """
    error = np.asarray(output, np.float64) - exact
    size, base = float(np.linalg.norm(error)), _mean_error(problem, exact)
    v_fro, v_spec = value_norms(problem)
    fro = problem.cached(("output_fro", which), lambda: float(np.linalg.norm(exact)))
    found = {
        "output_fro_rel": _ratio(size, fro),
        "output_fro_amm": _ratio(size, exact_fro * v_fro),
        "skill": 0.0 if base == 0.0 and size <= ROUNDING * fro else 1.0 - _ratio(size, base),
    }
    if spectral:
        size = dense_spectral_norm(error)
        spec = problem.cached(("output_spec", which), lambda: dense_spectral_norm(exact))
        found["output_spec_rel"] = _ratio(size, spec)
        found["output_spec_amm"] = _ratio(size, exact_spectral_norm(problem) * v_spec)
    return found


def _dense_output(wide: AttentionProblem) -> Array:
    """Return ``A V`` from the dense matrix: a second computation, not the streamed output."""
    return wide.cached(
        "dense_output", lambda: wide.cached("dense", wide.exact.to_dense) @ wide.values
    )


@overload
def error_report(
    problem: AttentionProblem,
    ahat: object = None,
    *,
    output: ArrayLike | None = None,
    path: str | None = None,
    spectral: bool = True,
) -> ErrorReport: ...
@overload
def error_report(
    problem: Sequence[AttentionProblem] | str | PathLike[str],
    ahat: Sequence[object] | None = None,
    *,
    output: object = None,
    path: str | None = None,
    spectral: bool = True,
) -> pd.DataFrame: ...
@without_floating_errors
@blas_single_thread()
def error_report(
    problem: AttentionProblem | Sequence[AttentionProblem] | str | PathLike[str],
    ahat: object = None,
    *,
    output: Any = None,
    path: str | None = None,
    spectral: bool = True,
) -> ErrorReport | pd.DataFrame:
    """Measure how far an approximation is from exact attention, in every norm.

    Parameters
    ----------
    problem : AttentionProblem, or Heads, problems, files or the name of a set as for `study`
        The exact side, evaluated in float64 and computed once.
    ahat : AttentionOperator, LinearOperator, or array (n_q, n_k); of many heads a list of these
        The approximation, in whatever precision it is.
    output : array (n_q, d_v); of many heads (heads, n_q, d_v) or a list of such arrays
        In place of ``ahat``: the output of a method without a matrix, as `Method.attend` returns
        it.  Fields of the matrix are NaN.
    path : {None, "dense", "streaming"}
        ``dense`` forms both matrices; ``streaming`` compares tiles and takes spectral norms from
        block Krylov iterations, never n_q x n_k.  None is dense up to 2^22 entries.
    spectral : bool, default True
        Compute the fields with spectral norms; otherwise they are NaN.

    Returns
    -------
    ErrorReport
        Of many heads a frame with a row for each: ``head`` and the fields.

    Raises
    ------
    TypeError, ValueError
        For an empty problem, an unknown path, an approximation or an output of another shape or
        not finite, both of them or none, and an output of a problem without values.

    Notes
    -----
    ``Ohat`` is the product that the operator computes, in its precision; matrix norms are those
    of the numbers that it holds.  The two paths agree to 1e-6 relative, except where an error is
    itself of the size of the rounding that they measure.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=16, d=4, rng=0)[0]
    >>> sa.error_report(problem, sa.Zero().approximate(problem)).output_fro_rel
    1.0
    """
    if is_many(problem):
        if (ahat is None) == (output is None):
            raise TypeError(
                f"error_report must be given ahat or output, got "
                f"{'none' if ahat is None else 'both'}; pass one of them"
            )
        name, parts = ("ahat", ahat) if output is None else ("output", output)
        settings: dict[str, Any] = {"path": path, "spectral": spectral}
        return by_head(
            problem,
            parts,
            name,
            lambda head, part: error_report(head, **{name: part}, **settings).as_dict(),
        )
    if not isinstance(problem, AttentionProblem):
        raise TypeError(
            f"problem must be an AttentionProblem, got {type(problem).__name__}; "
            f"make one with sketchattn.AttentionProblem(q, k, v)"
        )
    if path not in (None, "dense", "streaming"):
        raise ValueError(f"path must be None, 'dense' or 'streaming', got {path!r}; None chooses")
    if problem.n_q == 0 or len(problem.kept_keys) == 0:
        raise ValueError(
            f"problem must have a query and a visible key, got n_q = {problem.n_q} and "
            f"{len(problem.kept_keys)} keys; there is nothing to report"
        )
    if (ahat is None) == (output is None):
        raise TypeError(
            f"error_report must be given ahat or output, got {'none' if ahat is None else 'both'}; "
            f"pass one of them"
        )
    found = None if output is None else _check_output(problem, output)
    wide = problem.astype(np.float64)
    dense = problem.n_q * problem.n_k <= DENSE_ENTRIES if path is None else path == "dense"
    if found is not None:
        if dense:
            exact = wide.cached("dense", wide.exact.to_dense)
            fro = wide.cached("dense_fro", lambda: float(np.linalg.norm(exact)))
            product, which = _dense_output(wide), "dense"
        else:
            fro, product, which = wide.exact.frobenius_norm(), wide.output, "solution"
        made = _output_fields(problem, found, product, fro, spectral, which)
        return ErrorReport(**dict.fromkeys(FIELDS, math.nan) | made)
    _refuse_output(problem, ahat)
    operator = as_operator(ahat, problem)

    difference: Any
    if dense:
        exact = wide.cached("dense", wide.exact.to_dense)
        difference, rows = _dense_rows(exact, operator.wide().to_dense())
    else:
        # Rows of numbers that are held have no rounding: half the memory to go through.
        held = type(operator) in (SampledAttention, DenseAttention)
        wide, rows = _streamed_rows(wide, operator if held else operator.wide())
    spoilt = np.flatnonzero(~np.isfinite(rows.variation))
    if len(spoilt):
        raise ValueError(
            f"ahat must be finite, got NaN or infinity in {len(spoilt)} rows, the first is row "
            f"{spoilt[0]}; correct the approximation"
        )
    seen = problem.visible_counts() > 0
    exact_fro = math.sqrt(float(rows.exact_square.sum()))
    matrix_fro = math.sqrt(float(rows.square.sum()))

    matrix_spec_rel = math.nan
    if spectral:
        if dense:
            size = dense_spectral_norm(difference)
        else:
            size = difference_norm(problem, operator.wide(), wide=wide)
        matrix_spec_rel = _ratio(size, exact_spectral_norm(problem))
    values = dict.fromkeys(FIELDS, math.nan)
    if problem.v is not None:
        product = _dense_output(wide) if dense else wide.output
        which = "dense" if dense else "streaming"
        values |= _output_fields(
            problem, operator @ problem.values, product, exact_fro, spectral, which
        )
    return ErrorReport(
        **values
        | {
            "matrix_fro_rel": _ratio(matrix_fro, exact_fro),
            "matrix_spec_rel": matrix_spec_rel,
            "row_tv_mean": float(rows.variation[seen].mean()) if seen.any() else 0.0,
            "row_tv_max": float(rows.variation[seen].max(initial=0.0)),
            "row_kl_mean": float(rows.divergence[seen].mean()) if seen.any() else 0.0,
        }
    )


def row_sums(exact: Array, other: Array) -> _Rows:
    """Return the sums of rows of A and Ahat, float64 (b, n_k) each, that reports are made of."""
    return _dense_rows(exact, other)[1]
