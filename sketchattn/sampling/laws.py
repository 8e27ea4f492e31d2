"""Laws to draw columns by: from nothing, from V, from K, or from A itself.

With p and r draws with replacement the product ``A S^T S V`` has the mean square error
``(sum_j |A_:j|^2 |V_j|^2 / p_j - |A V|_F^2) / r``, smallest for ``p_j`` proportional to
``|A_:j| |V_j|`` (Cauchy-Schwarz).  All other laws are what can be had for less than all of A.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..base.arguments import as_array, as_real, closest, stacked
from ..base.draws import Rng, as_generator
from ..base.floating import without_floating_errors
from ..kernels._threads import blas_single_thread
from ..operators.steep import is_steep, tiles_of
from ..problem import AttentionProblem
from .draws import check_probabilities
from .leverage import as_matrix, leverage_scores, leverage_scores_fast
from .ridge import ExponentialKernel, ridge_leverage, ridge_leverage_recursive

Array = NDArray[Any]

# name -> p_j is proportional to
LAWS = {
    "uniform": "1",
    "value_norm": "|V_j|",
    "value_norm2": "|V_j|^2",
    "key_norm": "|K_j|",
    "key_norm2": "|K_j|^2",
    "column_norm2": "|A_:j|^2",
    "optimal": "|A_:j| |V_j|",
    "spectral": "|A_:j|^2 / |A|_2^2 + |V_j|^2 / |V|_2^2",
    "pilot": "(sum_{i in I} A_ij^2)^{1/2} |V_j| over pilot rows I",
    "leverage": "the leverage score of row j of V",
    "leverage_fast": "the same from a sketch of V",
    "leverage_keys": "the leverage score of row j of K",
    "ridge": "the ridge leverage score of key j in the matrix exp(scale K K^T)",
    "ridge_recursive": "the same by recursive sampling, without the matrix",
}
# Laws that need Q and K, and laws that need all of A.
PROBLEM_LAWS = frozenset({"key_norm", "key_norm2", "leverage_keys", "ridge", "ridge_recursive"})
EXACT_LAWS = frozenset({"column_norm2", "optimal", "spectral"})
RANDOM_LAWS = frozenset({"pilot", "leverage_fast", "ridge_recursive"})

# Entries of a block of logits or columns that is held at a time.
BLOCK_ENTRIES = 1 << 22


# Contributions below this, relative to the largest, cannot be told from zero: squares of such
# entries of A underflow, so that the laws themselves are zero there.
NEGLIGIBLE = 1e-150


def _norms(x: Array) -> Array:
    """Return the Euclidean norms of the rows of x (..., n, m), without underflow of squares."""
    from ..kernels.sampled import euclidean_norms

    dtype = np.float32 if x.dtype == np.float32 else np.float64
    made = euclidean_norms(np.require(x[None] if x.ndim == 2 else x, dtype, ["C", "W", "A"]))
    return made[0] if x.ndim == 2 else made


class _FromProblem:
    """What laws need of an attention problem, on its kept keys."""

    def __init__(self, problem: AttentionProblem) -> None:
        self.problem = problem
        self.n = problem.n_k
        self.keep = problem.kept_keys

    def values(self) -> Array:
        return self.problem.values[self.keep]

    def keys(self, law: str) -> Array:
        return self.problem.k[self.keep]

    def kernel(self, law: str) -> ExponentialKernel:
        return ExponentialKernel(self.keys(law), self.problem.scale)

    def column_norms(self) -> Array:
        problem = self.problem
        return problem.cached("column_norms", problem.exact.column_norms)[self.keep]

    def spectral_norm(self) -> float:
        from ..operators.spectra import exact_spectral_norm

        return exact_spectral_norm(self.problem)

    def n_rows(self) -> int:
        return self.problem.n_q

    def log_row_norms(self, rows: Array, counts: Array) -> Array:
        """Return ``(1/2) ln sum_i count_i A_ij^2`` over chosen rows."""
        from ..operators.solve import solve_rows

        wide = self.problem.astype(np.float64)
        lse = solve_rows(wide, rows, None)[1]
        return log_column_norms(wide, rows, lse, counts)[self.keep]

    def largest_entries(self, columns: Array) -> Array:
        """Return ``max_i A_ij`` of chosen columns, at most 1."""
        problem = self.problem
        largest = np.zeros(len(columns))
        block = max(1, BLOCK_ENTRIES // max(problem.n_q, 1))
        for start in range(0, len(columns), block):
            part = slice(start, start + block)
            largest[part] = problem.exact.columns(columns[part]).max(axis=0, initial=0.0)
        return largest

    def value_sizes(self) -> Array:
        """Return ``|V_j|/max |V|`` of all keys; ones for a problem without values."""
        v = self.problem.v
        return np.ones(self.n) if v is None else _ratio(_norms(v))


@without_floating_errors
def log_column_norms(
    problem: AttentionProblem, rows: Array, lse: Array, counts: Array | None = None
) -> Array:
    """Return ``(1/2) ln sum_{i in I} count_i A_ij^2``, the column norms of chosen rows.

    It is half the logsumexp over I of ``2 (L_ij - lse_i) + ln count_i``: attention of the keys to
    the pilot queries, so that no (s, n_k) array is formed.  In float32 A^2 is zero once
    ln A < -51, and a zero probability is a bias; a logarithm has no such limit.

    Parameters
    ----------
    problem : AttentionProblem
    rows : int array (s,)
        Rows I.
    lse : ndarray (s,)
        Their logsumexp, -inf for a row that sees no key.
    counts : array (s,), optional
        Multiplicities; None is 1.

    Returns
    -------
    ndarray, float64 (n_k,)
        -inf for keys that no chosen row sees.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=4, d=4, rng=0)[0]
    >>> norms = np.exp(log_column_norms(problem, np.arange(4), problem.logsumexp))
    >>> bool(np.allclose(norms, problem.exact.column_norms()))
    True
    """
    order = np.argsort(rows, kind="stable")
    multiple = None if counts is None else counts[order]
    norms = log_column_norms_of_heads([problem], rows[order][None], lse[order][None], multiple)
    return np.asarray(norms[0])


def log_column_norms_of_heads(
    problems: Sequence[AttentionProblem], rows: Array, lse: Array, counts: Array | None = None
) -> Array:
    """Return `log_column_norms` of heads that are alike, float64 (H, n_k), in one pass.

    Parameters
    ----------
    problems : sequence of AttentionProblem
        H problems that differ in their arrays and masks only.
    rows : int array (H, s)
        Ascending.
    lse : ndarray (H, s)
    counts : array (s,), optional
        Multiplicities; None is 1.
    """
    from ..kernels.sampled import log_column_norms as column_norms

    first = problems[0]
    norms = np.full((len(problems), first.n_k), -np.inf)
    if rows.size and first.n_k:
        norms = column_norms(
            stacked([x.arrays.k for x in problems]),
            np.stack([x.arrays.q[i] for x, i in zip(problems, rows, strict=True)]),
            lse.astype(np.float64),
            scale=first.scale,
            counts=np.ones(rows.shape[1]) if counts is None else counts,
            positions=rows + first.offset if first.causal else None,
        )
    for head, problem, chosen in zip(norms, problems, rows, strict=True):
        if is_steep(problem) and len(chosen):
            head[:] = _log_norms_of_steep(problem, chosen, counts)
        if problem.key_mask is not None:
            head[~problem.key_mask] = -np.inf
    return norms


def _log_norms_of_steep(problem: AttentionProblem, rows: Array, counts: Array | None) -> Array:
    """Return `log_column_norms` from rows that are formed: ``2 (L_ij - lse_i)`` has no digits."""
    norms = np.full(problem.n_k, -np.inf)
    log_counts = np.zeros(len(rows)) if counts is None else np.log(counts)
    for positions, logits in tiles_of(problem, rows):
        top = logits.max(axis=1, keepdims=True)
        seen = top[:, 0] > -np.inf
        if not seen.any():
            continue
        logits = logits[seen] - top[seen]
        with np.errstate(under="ignore"):
            logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
            pairs = 2 * logits + log_counts[positions[seen], None]
            norms = np.logaddexp(norms, np.logaddexp.reduce(pairs, axis=0))
    return 0.5 * norms


class _FromMatrices:
    """What laws need of two matrices A (m, n) and V (n, d_v)."""

    def __init__(self, a: Array, v: Array) -> None:
        self.a = a
        self.v = v
        self.n = len(v)
        self.keep = np.arange(self.n)

    def values(self) -> Array:
        return self.v

    def keys(self, law: str) -> NoReturn:
        raise ValueError(
            f"law must be about A and V where these two are given, got {law!r}, which needs "
            f"keys; pass an AttentionProblem"
        )

    kernel = keys

    def column_norms(self) -> Array:
        return _norms(self.a.T)

    def spectral_norm(self) -> float:
        from ..operators.spectra import dense_spectral_norm

        return dense_spectral_norm(self.a)

    def n_rows(self) -> int:
        return len(self.a)

    def log_row_norms(self, rows: Array, counts: Array) -> Array:
        with np.errstate(divide="ignore"):
            return np.log(_norms((np.sqrt(counts)[:, None] * self.a[rows]).T))

    def largest_entries(self, columns: Array) -> Array:
        top = float(np.max(np.abs(self.a), initial=0.0))
        largest: Array = np.abs(self.a[:, columns]).max(axis=0, initial=0.0)
        return largest / (top if top > 0 else 1.0)

    def value_sizes(self) -> Array:
        return _ratio(_norms(self.v))


_Source = _FromProblem | _FromMatrices


def _as_source(source: object) -> _Source:
    if isinstance(source, AttentionProblem):
        return _FromProblem(source)
    if not (isinstance(source, tuple | list) and len(source) == 2):
        raise TypeError(
            f"source must be an AttentionProblem or a pair (A, V) of matrices, got "
            f"{type(source).__name__}; pass (A, V) as a tuple"
        )
    a, v = as_matrix(source[0], "A"), as_matrix(source[1], "V")
    if a.shape[1] != v.shape[0]:
        raise ValueError(
            f"A and V must have shapes (m, n) and (n, d_v), got {a.shape} and {v.shape}; "
            f"the product is A V"
        )
    return _FromMatrices(a, v)


def check_law(law: object) -> None:
    """Refuse a law that is neither a registered name nor an array of probabilities.

    Examples
    --------
    >>> check_law("optmal")
    Traceback (most recent call last):
    ValueError: law must be a name or an array, got 'optmal'; did you mean 'optimal'?
    """
    if isinstance(law, str):
        if law not in LAWS:
            raise ValueError(f"law must be a name or an array, got {law!r}{closest(law, LAWS)}")
        return
    check_probabilities(as_array(law, "law"), name="law")


def check_mix(mix: object) -> float:
    """Return the share of the uniform law as a float in [0, 1]."""
    share = as_real(mix, "mix", "give one in [0, 1]")
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"mix must be in [0, 1], got {share:.6g}; 0 leaves the law alone")
    return share


def check_ridge(ridge: object) -> float:
    """Return the ridge relative to the trace as a float > 0."""
    lam = as_real(ridge, "ridge", "give one > 0")
    if not 0.0 < lam < np.inf:
        raise ValueError(f"ridge must be finite and positive, got {lam:.6g}; it is lam / tr K")
    return lam


def check_pilots(pilots: object) -> int | Array:
    """Return a number of pilot rows of at least 1, or an int64 array of row indices."""
    if isinstance(pilots, numbers.Integral) and not isinstance(pilots, bool | np.bool_):
        if int(pilots) < 1:
            raise ValueError(f"pilots must be at least 1, got {int(pilots)}; draw one row or more")
        return int(pilots)
    rows = as_array(pilots, "pilots")
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise TypeError(
            f"pilots must be an integer or a one-dimensional array of row indices, got "
            f"{rows.dtype} of shape {rows.shape}; give how many rows to draw, or which"
        )
    if len(rows) == 0:
        raise ValueError("pilots must name a row at least, got none; give indices of rows of A")
    return rows.astype(np.int64)


@without_floating_errors
def pilot_rows(source: Any, pilots: int | ArrayLike = 64, rng: Rng = None) -> Array:
    """Return pilot rows: drawn uniformly with replacement, or the given ones, checked.

    Parameters
    ----------
    source : AttentionProblem, or pair (A, V)
        Has n_q (or m) rows.
    pilots : int or int array (s,), default 64
        How many rows to draw, or which rows.
    rng : None, int or numpy.random.Generator

    Returns
    -------
    ndarray, int64 (s,)
        Empty where there is no row.

    Examples
    --------
    >>> import numpy as np
    >>> pilot_rows((np.eye(3), np.eye(3)), [2, 0]).tolist()
    [2, 0]
    """
    return _pilot_rows(_as_source(source), check_pilots(pilots), as_generator(rng))


def _pilot_rows(source: _Source, pilots: int | Array, rng: np.random.Generator) -> Array:
    n_rows = source.n_rows()
    if isinstance(pilots, int):
        return rng.integers(0, n_rows, size=pilots) if n_rows else np.zeros(0, np.int64)
    if not 0 <= pilots.min() <= pilots.max() < n_rows:
        raise ValueError(
            f"pilots must be row indices in 0..{n_rows - 1}, got {int(pilots.min())}.."
            f"{int(pilots.max())}; give indices of queries"
        )
    return pilots


def log_norms(x: Array) -> Array:
    """Return the natural logarithms of the norms of the rows of x (n, m) or (H, n, m)."""
    with np.errstate(divide="ignore"):
        return np.log(_norms(x))


def _pilot_law(source: _Source, pilots: int | Array, rng: np.random.Generator) -> Array:
    rows, counts = np.unique(_pilot_rows(source, pilots, rng), return_counts=True)
    log_p = source.log_row_norms(rows, counts.astype(np.float64)) + log_norms(source.values())
    top = float(log_p.max(initial=-np.inf))
    law: Array = np.exp(log_p - top) if np.isfinite(top) else np.zeros(len(log_p))
    return law


def _ratio(x: Array) -> Array:
    """Return ``x / max x``, whose powers neither overflow nor make everything zero."""
    top = float(x.max(initial=0.0))
    return x / top if top > 0 else x


def _unnormalized(
    law: str, source: _Source, pilots: int | Array, ridge: float, rng: np.random.Generator
) -> Array:
    """Return p up to a factor, on the kept keys; zero throughout where the law has no opinion."""
    if law == "uniform":
        return np.ones(len(source.keep))
    if law in ("value_norm", "value_norm2"):
        return _ratio(_norms(source.values())) ** (2 if law.endswith("2") else 1)
    if law in ("key_norm", "key_norm2"):
        return _ratio(_norms(source.keys(law))) ** (2 if law.endswith("2") else 1)
    if law == "column_norm2":
        return _ratio(source.column_norms()) ** 2
    if law == "optimal":
        return _ratio(source.column_norms()) * _ratio(_norms(source.values()))
    if law == "spectral":
        from ..operators.spectra import dense_spectral_norm

        total = np.zeros(len(source.keep))
        for norms, top in (
            (source.column_norms(), source.spectral_norm()),
            (_norms(source.values()), dense_spectral_norm(source.values())),
        ):
            total += (norms / top) ** 2 if top > 0 else 0.0
        return total
    if law == "pilot":
        return _pilot_law(source, pilots, rng)
    if law == "leverage":
        return leverage_scores(source.values())
    if law == "leverage_fast":
        return leverage_scores_fast(source.values(), rng=rng)
    if law == "leverage_keys":
        return leverage_scores(source.keys(law))
    kernel = source.kernel(law)
    if kernel.shape[0] == 0:
        return np.zeros(0)
    lam = ridge * float(kernel.diagonal().sum())
    if law == "ridge":
        return ridge_leverage(kernel, lam)
    return ridge_leverage_recursive(kernel, lam, rng=rng).scores


@without_floating_errors
def probabilities(
    law: str | ArrayLike,
    source: Any,
    *,
    mix: float = 0.0,
    pilots: int | ArrayLike = 64,
    ridge: float = 0.01,
    rng: Rng = None,
) -> Array:
    """Return the probabilities of a law: ``(1 - mix) p + mix/m`` on the m columns that exist.

    Parameters
    ----------
    law : str or array (n,)
        A name from ``LAWS``, which says what p is proportional to, or p itself.
    source : AttentionProblem, or pair (A, V) of arrays (m, n) and (n, d_v)
        What the law looks at.  Masked keys get probability zero.  Laws of keys need a problem.
    mix : float, default 0
        Share theta of the uniform law, in [0, 1]: keeps at least ``1 - theta`` of the quality
        beta of p, bounds the weights ``1/(r p_j)`` by ``m/(theta r)``, and leaves no column out.
    pilots : int or int array (s,), default 64
        For "pilot": how many rows of A to draw (with replacement), or which.
    ridge : float, default 0.01
        For "ridge" and "ridge_recursive": ``lam / tr K``, > 0; d_eff is at most ``1/ridge``.
    rng : None, int or numpy.random.Generator
        For "pilot", "leverage_fast" and "ridge_recursive".

    Returns
    -------
    ndarray, float64 (n,)
        With sum 1; zeros throughout if there is no column to draw.  Where the law gives zero
        everywhere (V = 0, say) it is uniform.

    Raises
    ------
    TypeError, ValueError
        For an unknown law, parameters out of range, or a law that the source has no data for.

    Notes
    -----
    Cost beside O(n d): "column_norm2", "optimal" and "spectral" O(n_q n d), all of A; "pilot"
    O(s n d); "ridge" O(n^3) and n^2 numbers in memory; "ridge_recursive" O(n s^2) for the s
    columns that it keeps.  "spectral" is ``(|A_:j|^2/|A|_2^2 + |V_j|^2/|V|_2^2)/(sr(A) + sr(V))``
    with the stable ranks sr, the law of the matrix Bernstein bound of the spectral error.

    Examples
    --------
    >>> import numpy as np
    >>> probabilities("optimal", (np.eye(2), np.diag([3.0, 1.0])), mix=0.5).tolist()
    [0.625, 0.375]
    """
    check_law(law)
    theta, count, relative = check_mix(mix), check_pilots(pilots), check_ridge(ridge)
    data = _as_source(source)
    p = np.zeros(data.n)
    if isinstance(law, str):
        if isinstance(data, _FromMatrices) and law in PROBLEM_LAWS:
            data.keys(law)
        generator = as_generator(rng)

        def compute() -> Array:
            # Threads of BLAS change the order of sums, and with it the last bits of a draw.
            with blas_single_thread():
                return _unnormalized(law, data, count, relative, generator)

        if isinstance(data, _FromProblem) and law not in RANDOM_LAWS:
            part = data.problem.cached(("law", law, relative if law == "ridge" else None), compute)
        else:
            part = compute()
        total = float(part.sum())
        p[data.keep] = part / total if total > 0 else 1.0 / max(len(part), 1)
    else:
        p = check_probabilities(law, data.n, "law")
        masked = np.delete(np.arange(data.n), data.keep)
        if len(masked) and p[masked].max() > 0:
            raise ValueError(
                f"law must be zero for masked keys, got {p[masked].max():.6g} for key "
                f"{int(masked[p[masked].argmax()])}; set it to zero and divide by the sum"
            )
    if theta > 0:
        p *= 1.0 - theta
        p[data.keep] += theta / max(len(data.keep), 1)
    return p


@without_floating_errors
def check_unbiased(p: ArrayLike, source: Any) -> None:
    """Refuse a law that never draws a column which contributes: the estimate would be biased.

    A column j contributes to ``A V`` where ``|A_:j| |V_j| > 0``, up to a relative 1e-150.

    Parameters
    ----------
    p : array (n,)
        Probabilities with sum 1.
    source : AttentionProblem, or pair (A, V)
        Without values every column that some query sees counts.

    Raises
    ------
    ValueError
        If ``p_j = 0`` for such a column; the message names one.

    Examples
    --------
    >>> import numpy as np
    >>> check_unbiased([1.0, 0.0], (np.eye(2), np.eye(2)))
    Traceback (most recent call last):
    ValueError: law must be positive wherever |A_:j| |V_j| > 0 for an unbiased estimate, got 0 for
    1 such column, for instance j = 1; mix in the uniform law (mix > 0)
    """
    data = _as_source(source)
    law = check_probabilities(p, data.n)
    doubtful = data.keep[law[data.keep] == 0]
    if len(doubtful) == 0:
        return
    sizes = data.value_sizes()[doubtful]
    doubtful, sizes = doubtful[sizes > NEGLIGIBLE], sizes[sizes > NEGLIGIBLE]
    left_out = doubtful[data.largest_entries(doubtful) * sizes > NEGLIGIBLE]
    if len(left_out):
        raise ValueError(
            f"law must be positive wherever |A_:j| |V_j| > 0 for an unbiased estimate, got 0 for "
            f"{len(left_out)} such column{'s' if len(left_out) > 1 else ''}, for instance "
            f"j = {int(left_out[0])}; mix in the uniform law (mix > 0)"
        )
