"""E and F fitted to heads, and the floor that no F can undercut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...base.arguments import as_array, check_integer, check_name, check_rank
from ...base.floating import without_floating_errors
from ...kernels._threads import blas_single_thread
from ...problem import AttentionProblem
from .method import Linformer
from .projections import MeanPool

Array = NDArray[Any]


class OracleFloor(NamedTuple):
    """Hold what the best F leaves for a given E.

    Attributes
    ----------
    error : float
        ``|(I - W W^+) O|_F``.
    relative : float
        Over ``|O|_F``; 0 for a zero output.
    values : ndarray (r, d_v)
        ``Z = W^+ O``, the best F V.
    """

    error: float
    relative: float
    values: Array


@blas_single_thread()
def oracle_floor(weights: ArrayLike, output: ArrayLike) -> OracleFloor:
    """Return the least ``|W Z - O|_F`` over all Z: what no F can get below.

    Where V has full column rank it is attained by ``F = Z V^+``.

    Parameters
    ----------
    weights : array (n_q, r)
        ``W`` of `ReducedAttention.weights`.
    output : array (n_q, d_v)
        The exact output O.

    Examples
    --------
    >>> oracle_floor(np.full((2, 1), 1.0), np.array([[1.0], [3.0]])).error
    1.4142135623730951
    """
    w, o = (
        np.asarray(as_array(x, s), np.float64)
        for x, s in ((weights, "weights"), (output, "output"))
    )
    for x, label in ((w, "weights"), (o, "output")):
        if x.ndim != 2 or len(x) != len(w):
            raise ValueError(
                f"{label} must have shape (n_q, m) with n_q = {len(w)}, got {x.shape}; "
                f"pass W and O of one head"
            )
    values = np.linalg.lstsq(w, o, rcond=None)[0]
    error = float(np.linalg.norm(w @ values - o))
    size = float(np.linalg.norm(o))
    return OracleFloor(error, error / size if size else 0.0, values)


@dataclass(frozen=True)
class LinformerFit:
    """Hold E and F fitted to heads, and what they reach.

    Attributes
    ----------
    E, F : ndarray (r, n_k), float64
    errors : tuple of float
        ``|Ohat - O|_F / |O|_F`` of each head.
    floors : tuple of float
        The same for this E with the best ``F V`` of each head alone; see `oracle_floor`.
    history : tuple of float
        Sum of squared relative errors after each step, never rising for "least-squares".
    how : str
    """

    E: Array
    F: Array
    errors: tuple[float, ...]
    floors: tuple[float, ...]
    history: tuple[float, ...]
    how: str

    def method(self) -> Linformer:
        """Return the method with these matrices."""
        return Linformer(len(self.E), "given", E=self.E, F=self.F)


class _Head(NamedTuple):
    q: Array  # with the scale
    k: Array
    v: Array
    output: Array
    size: float


def _softmax(logits: Array) -> Array:
    weights: Array = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


def _weights_of(head: _Head, e: Array) -> Array:
    return _softmax(head.q @ (e @ head.k).T)


def _loss(heads: Sequence[_Head], e: Array, f: Array) -> float:
    return sum(
        float(np.sum((_weights_of(h, e) @ (f @ h.v) - h.output) ** 2)) / h.size**2 for h in heads
    )


def _best_f(heads: Sequence[_Head], e: Array, start: Array | None) -> Array:
    """Return the F with the least ``sum_h |W_h F V_h - O_h|^2/|O_h|^2`` for this E."""
    from scipy.sparse.linalg import LinearOperator, lsqr

    weights = [_weights_of(h, e) for h in heads]
    if len(heads) == 1:  # F = W^+ O V^+
        h = heads[0]
        z = np.linalg.lstsq(weights[0], h.output, rcond=None)[0]
        return np.asarray(z @ np.linalg.pinv(h.v))
    shape = (len(e), heads[0].k.shape[0])

    def forward(x: Array) -> Array:
        f = np.reshape(x, shape)
        parts = [(w @ (f @ h.v)) / h.size for w, h in zip(weights, heads, strict=True)]
        return np.concatenate([p.ravel() for p in parts])

    def backward(y: Array) -> Array:
        out, at = np.zeros(shape), 0
        y = np.ravel(y)
        for w, h in zip(weights, heads, strict=True):
            block = y[at : at + h.output.size].reshape(h.output.shape)
            at += h.output.size
            out += (w.T @ block) @ h.v.T / h.size
        return out.ravel()

    target = np.concatenate([(h.output / h.size).ravel() for h in heads])
    operator: Any = LinearOperator(
        (len(target), shape[0] * shape[1]), matvec=forward, rmatvec=backward, dtype=np.float64
    )
    begin = np.zeros(shape[0] * shape[1]) if start is None else start.ravel()
    found = lsqr(operator, target, x0=begin, atol=1e-12, btol=1e-12, iter_lim=200)[0]
    return np.asarray(found).reshape(shape)


def _better_e(heads: Sequence[_Head], e: Array, f: Array, steps: int) -> Array:
    """Return E after some L-BFGS steps on the loss with F held."""
    from scipy.optimize import minimize

    shape = e.shape

    def loss(x: Array) -> tuple[float, Array]:
        total, gradient = 0.0, np.zeros(shape)
        now = x.reshape(shape)
        for h in heads:
            w, z = _weights_of(h, now), f @ h.v
            rest = (w @ z - h.output) / h.size**2
            total += float(np.sum(rest * rest)) * h.size**2
            # d softmax: W o (G - (W o G) 1 1^T), G = 2 rest Z^T.
            g = 2 * rest @ z.T
            g = w * (g - np.sum(w * g, axis=1, keepdims=True))
            gradient += (g.T @ h.q) @ h.k.T
        return total, gradient.ravel()

    found = minimize(loss, e.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": steps})
    return np.asarray(found.x).reshape(shape)


@without_floating_errors
@blas_single_thread()
def fit_linformer(
    problems: AttentionProblem | Sequence[AttentionProblem],
    rank: int,
    how: str = "least-squares",
    *,
    iterations: int = 4,
    steps: int = 25,
) -> LinformerFit:
    """Fit one E and one F to given heads: what the form can do, without a random projection.

    "low-rank" picks r keys by pivoted QR of the r largest right singular vectors of the stacked
    matrices A, E selects them, and ``F = W^+ A`` is the best matrix for this E.  "least-squares"
    starts there or at the means of blocks, whichever is better, and alternates: the best F for
    this E in closed form (``W^+ O V^+`` for one head, LSQR for several), then L-BFGS on E.

    Parameters
    ----------
    problems : AttentionProblem or sequence of them
        Heads with values and equally many keys; masked keys are refused.
    rank : int
        In 1..n_k.
    how : {"least-squares", "low-rank"}
    iterations : int, default 4
        Alternations; 0 leaves E where it starts.
    steps : int, default 25
        L-BFGS iterations in each.

    Returns
    -------
    LinformerFit

    Raises
    ------
    TypeError, ValueError
        For other arguments, causal problems, masks, and heads of different lengths.

    Notes
    -----
    The problem in E is not convex: the result is what the scheme finds, an upper bound of what
    the form can do.  Errors are those on the heads that it was fitted to.

    Examples
    --------
    >>> import sketchattn as sa
    >>> head = sa.make_heads("clustered", n=32, d=4, rng=0)[0]
    >>> fit = fit_linformer(head, 8)
    >>> fit.E.shape, fit.history[-1] <= fit.history[0]
    ((8, 32), True)
    """
    from scipy.linalg import qr

    listed = [problems] if isinstance(problems, AttentionProblem) else list(problems)
    if not listed or not all(isinstance(p, AttentionProblem) for p in listed):
        raise TypeError("problems must be AttentionProblems, at least one, got others; pass heads")
    check_name(how, "how", ("least-squares", "low-rank"))
    n = listed[0].n_k
    r = check_rank(rank, n)
    rounds = check_integer(iterations, "iterations", 0, "0 keeps E")
    inner = check_integer(steps, "steps", 1, "take one step or more")
    for p in listed:
        if p.causal or p.key_mask is not None or p.n_k != n or p.n_q == 0:
            raise ValueError(
                f"problems must be neither causal nor masked, with a query and n_k = {n} keys "
                f"each, got {p!r}; delete masked keys first"
            )
        _ = p.values
    heads = []
    for p in listed:
        wide = p.astype(np.float64)
        size = float(np.linalg.norm(wide.output)) or 1.0
        heads.append(_Head(wide.scale * wide.q, wide.k, np.asarray(wide.values), wide.output, size))
    stacked = np.concatenate([p.astype(np.float64).exact.to_dense() for p in listed])
    right = np.linalg.svd(stacked, full_matrices=False)[2][:r]
    order = qr(right, mode="r", pivoting=True)[1][:r]
    e = np.zeros((r, n))
    e[np.arange(r), np.sort(order)] = 1.0
    if how == "low-rank":
        weights = np.concatenate([_weights_of(h, e) for h in heads])
        f = np.linalg.lstsq(weights, stacked, rcond=None)[0]
        history = [_loss(heads, e, f)]
    else:
        starts = [e, MeanPool(n, r, None, True).to_dense(np.float64)]
        fitted = [(x, _best_f(heads, x, None)) for x in starts]
        e, f = min(fitted, key=lambda pair: _loss(heads, *pair))
        history = [_loss(heads, e, f)]
        for _ in range(rounds):
            new_e = _better_e(heads, e, f, inner)
            new_f = _best_f(heads, new_e, f)
            loss = min((_loss(heads, new_e, x), i) for i, x in enumerate((new_f, f)))
            if loss[0] >= history[-1]:
                break
            e, f = new_e, (new_f, f)[loss[1]]
            history.append(loss[0])
    every = [(_weights_of(h, e), h) for h in heads]
    errors = [float(np.linalg.norm(w @ (f @ h.v) - h.output)) / h.size for w, h in every]
    floors = [oracle_floor(w, h.output).relative for w, h in every]
    return LinformerFit(e, f, tuple(errors), tuple(floors), tuple(history), how)
