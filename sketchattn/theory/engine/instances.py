"""Instances: what claims are checked on, as the matrices A (m, n) and V (n, d_v) in float64.

An attention problem becomes an instance of its dense exact matrix; others are built in, by name:
the ones with known numbers, and the ones that refute a claim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeGuard, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...base.arguments import as_array, check_finite, guesses
from ...base.floating import without_floating_errors
from ...heads.container import Heads
from ...kernels._threads import limit_threads
from ...problem import AttentionProblem
from .topics import load

Array = NDArray[Any]
T = TypeVar("T")
Made = AttentionProblem | tuple[Array, Array]

# Larger matrices are not formed: 2048 x 2048 in float64 is 32 MB.
DENSE_ENTRIES = 1 << 22


class Instance:
    """Hold the factors of one product ``A V``, and what is computed of them once.

    It is what an observer of a claim sees of a problem, as ``context.instance``: ``a`` (m, n) and
    ``v`` (n, d_v) in float64, their ``product``, and ``problem``, the queries, keys and options,
    which is None where only the matrices are known.

    Parameters
    ----------
    name : str
        What verdicts call it.
    made : AttentionProblem or pair (A, V)
        Of a problem A is the exact matrix and V the values, both in float64, without the keys
        that are masked.
    note : str
        What it is.

    Attributes
    ----------
    name, note : str
    problem : AttentionProblem or None

    Examples
    --------
    >>> instance = Instance("pair", (np.eye(2), np.ones((2, 1))))
    >>> instance.m, instance.n, instance.product.ravel().tolist()
    (2, 2, [1.0, 1.0])
    >>> instance.trivial, instance.predictor, instance.problem is None
    (0.0, 'the mean of V', True)
    """

    def __init__(self, name: str, made: Made, note: str = "") -> None:
        self.name = name
        self.note = note
        self._cache: dict[object, Any] = {}
        self.problem: AttentionProblem | None = None
        self._pair: tuple[Array, Array] | None = None
        if isinstance(made, AttentionProblem):
            self.problem = made
            return
        a, v = (
            np.array(as_array(x, label), np.float64) for x, label in zip(made, "AV", strict=True)
        )
        for x, label in ((a, "A"), (v, "V")):
            if x.ndim != 2:
                raise ValueError(f"{label} must have two axes, got shape {x.shape}; pass matrices")
            check_finite(x, label)
            x.flags.writeable = False
        if a.shape[1] != v.shape[0]:
            raise ValueError(
                f"V must have one row for each of the n = {a.shape[1]} columns of A, got "
                f"{v.shape[0]}; pass factors of one product"
            )
        self._pair = (a, v)

    def __repr__(self) -> str:
        return f"Instance({self.name!r}, m={self.m}, n={self.n})"

    @property
    def m(self) -> int:
        """Rows of A."""
        return self.problem.n_q if self._pair is None and self.problem else self.a.shape[0]

    @property
    def n(self) -> int:
        """Columns of A: keys that are not masked."""
        if self._pair is None and self.problem is not None:
            return len(self.problem.kept_keys)
        return int(self.a.shape[1])

    @cached_property
    def a(self) -> Array:
        """A, float64 (m, n), read-only."""
        if self._pair is not None:
            return self._pair[0]
        assert self.problem is not None  # one of the two is there
        wide = self.problem.astype(np.float64)
        dense: Array = wide.cached("dense", wide.exact.to_dense)
        kept = self.problem.kept_keys
        out = dense if len(kept) == self.problem.n_k else np.ascontiguousarray(dense[:, kept])
        out = out.view()
        out.flags.writeable = False
        return out

    @cached_property
    def v(self) -> Array:
        """V, float64 (n, d_v), read-only."""
        if self._pair is not None:
            return self._pair[1]
        assert self.problem is not None  # one of the two is there
        out = np.array(self.problem.values[self.problem.kept_keys], np.float64)
        out.flags.writeable = False
        return out

    @property
    def has_values(self) -> bool:
        """Whether there is a V with at least one column."""
        if self._pair is not None:
            return bool(self._pair[1].shape[1] > 0)
        return self.problem is not None and bool(self.problem.d_v)

    @property
    def is_dense(self) -> bool:
        """Whether A is small enough to be formed, and not empty."""
        return bool(0 < self.m * self.n <= DENSE_ENTRIES)

    @cached_property
    def product(self) -> Array:
        """A V, float64 (m, d_v)."""
        out: Array = self.a @ self.v
        return out

    @cached_property
    def stochastic(self) -> bool:
        """Whether all rows of A sum to one, so that the mean of V is a predictor."""
        return bool(np.all(np.abs(self.a.sum(axis=1) - 1) <= 1e-9))

    @cached_property
    def fro(self) -> float:
        """``|A|_F |V|_F``."""
        return float(np.linalg.norm(self.a)) * float(np.linalg.norm(self.v))

    @cached_property
    def _predictors(self) -> dict[str, float]:
        """Frobenius errors of the trivial predictors."""
        found = {"zero": float(np.linalg.norm(self.product))}
        if self.stochastic:
            centred = self.product - self.v.mean(axis=0)
            found["the mean of V"] = float(np.linalg.norm(centred))
        return found

    @property
    def trivial(self) -> float:
        """Frobenius error of the better trivial predictor: zero, or the mean of V."""
        return min(self._predictors.values())

    @property
    def predictor(self) -> str:
        """Which one that is."""
        return min(self._predictors, key=lambda name: self._predictors[name])

    @cached_property
    def svd(self) -> tuple[Array, Array, Array]:
        """Thin singular value decomposition ``(u, sigma, vt)`` of A."""
        from scipy.linalg import svd

        from ...kernels._threads import blas_single_thread

        with blas_single_thread():  # the same rounding whoever asks first
            u, sigma, vt = svd(self.a, full_matrices=False, check_finite=False)
        return u, sigma, vt

    @cached_property
    def value_basis(self) -> Array:
        """Orthonormal basis (n, q) of the range of V, q its numerical rank."""
        u, sigma, _ = np.linalg.svd(self.v, full_matrices=False)
        least = max(self.v.shape) * np.finfo(np.float64).eps * float(sigma[0]) if len(sigma) else 0
        basis: Array = np.ascontiguousarray(u[:, sigma > least])
        return basis

    def cached(self, key: object, compute: Callable[[], T]) -> T:
        """Return ``compute()``, computed once for each key."""
        if key not in self._cache:
            self._cache[key] = compute()
        value: T = self._cache[key]
        return value


# --- by name ------------------------------------------------------------------------------------

_BUILDERS: dict[str, tuple[Callable[[], Made], str]] = {}
_BUILT: dict[str, Instance] = {}


def instance(name: str, note: str) -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    """Register a function without arguments that makes a named instance.

    Parameters
    ----------
    name : str
        Without a slash, which names of heads have.
    note : str
        What it is, in one line.

    Returns
    -------
    callable
        Decorator of a function that returns an AttentionProblem or a pair (A, V).
    """
    if "/" in name:
        raise ValueError(f"name must not hold a slash, got {name!r}; heads have names with one")

    def register(build: Callable[[], Made]) -> Callable[[], Made]:
        if name in _BUILDERS:
            raise ValueError(f"name must be unique, got {name!r} twice; rename one")
        _BUILDERS[name] = (build, note)
        return build

    return register


def instance_names() -> tuple[str, ...]:
    """Return the names of the built-in instances, none of which is made for it."""
    load()
    return tuple(_BUILDERS)


def get_instance(name: str) -> Instance:
    """Return a named instance, made on first use."""
    load()
    if name not in _BUILDERS:
        raise ValueError(
            f"problem must be a named instance, got {name!r}{guesses(name, _BUILDERS)} Heads of a "
            f"file are sketchattn.read_heads(file), and heads[0] the first of them"
        )
    if name not in _BUILT:
        build, note = _BUILDERS[name]
        with limit_threads(1):
            _BUILT[name] = Instance(name, build(), note)
    return _BUILT[name]


@without_floating_errors
def instances() -> dict[str, Instance]:
    """Return the built-in instances as a dictionary from names.

    Examples
    --------
    >>> import sketchattn.theory
    >>> sketchattn.theory.instances()["enumeration"].a.tolist()
    [[1.0, 2.0, 0.0], [0.5, -1.0, 3.0]]
    """
    load()
    return {name: get_instance(name) for name in _BUILDERS}


def is_pair(problem: object) -> TypeGuard[tuple[Any, Any]]:
    """Return whether something is a pair of matrices (A, V)."""
    known = (AttentionProblem, Instance, str)
    if not isinstance(problem, tuple) or len(problem) != 2:
        return False
    return not any(isinstance(x, known) for x in problem)


def as_instance(problem: object) -> Instance:
    """Return what ``problem`` stands for: an instance or its name, one head, a pair (A, V)."""
    if isinstance(problem, Instance):
        return problem
    if isinstance(problem, str):
        return get_instance(problem)
    if isinstance(problem, AttentionProblem):
        found = problem
        return problem.cached("instance", lambda: Instance(found.name or "problem", found))
    if isinstance(problem, Heads):
        if len(problem) != 1:
            raise ValueError(
                f"problem must be one head, got {len(problem)} of them; pass heads[0], or all of "
                f"them to sketchattn.theory.validate"
            )
        return as_instance(problem[0])
    if is_pair(problem):
        return Instance("pair", problem)
    raise TypeError(
        f"problem must be an AttentionProblem, the name of an instance or a pair (A, V), got "
        f"{type(problem).__name__}; make one with sketchattn.AttentionProblem(q, k, v)"
    )


def cosines(n: int, d_v: int) -> Array:
    """Return ``V_jc = cos(0.7 (j+1)(c+1))``, indices from 0."""
    values: Array = np.cos(0.7 * (np.arange(n)[:, None] + 1) * (np.arange(d_v)[None] + 1))
    return values


@instance("reference", "L_ij = 3 sin(1 + (i+1)(j+1)), A = rowsoftmax(L), V = cosines; 6 x 64 x 5")
def _reference() -> Made:
    i, j = np.arange(6)[:, None], np.arange(64)[None]
    weights = np.exp(3 * np.sin(1 + (i + 1) * (j + 1)))
    return weights / weights.sum(axis=1, keepdims=True), cosines(64, 5)


@instance("enumeration", "three columns, for averages over all outcomes of a draw")
def _enumeration() -> Made:
    return (
        np.array([[1.0, 2.0, 0.0], [0.5, -1.0, 3.0]]),
        np.array([[1.0, -1.0], [2.0, 0.0], [-1.0, 1.0]]),
    )


@without_floating_errors
def spiked_attention(n: int, t: float) -> Array:
    """Return ``rowsoftmax(t I) = ((e^t - 1) I + 1 1^T)/(e^t + n - 1)``.

    Its singular values are 1, once, and ``(e^t - 1)/(e^t + n - 1)``; t = 0 is uniform attention
    and a large t the identity.

    Parameters
    ----------
    n : int
    t : float
        At least 0.

    Examples
    --------
    >>> sigma = np.linalg.svd(spiked_attention(64, 5.0), compute_uv=False)
    >>> sigma[:2].round(6).tolist()
    [1.0, 0.697275]
    """
    if n < 1 or t < 0:
        raise ValueError(f"n and t must be at least 1 and 0, got {n} and {t}; change them")
    small = math.exp(-t)  # no overflow for large t
    total = 1 + (n - 1) * small
    matrix = np.full((n, n), small / total)
    np.fill_diagonal(matrix, 1 / total)
    return matrix


@instance("spiked", "spiked attention with n = 64, t = 5: one large and many equal singular values")
def _spiked() -> Made:
    return spiked_attention(64, 5.0), cosines(64, 5)


@instance("clusters", "two well separated clusters, values constant in each: |A V| is not small")
def _clusters() -> Made:
    rng = np.random.default_rng(20)
    n_q, n_k, d = 64, 1024, 16
    sides = [np.where(np.arange(n) % 2 == 0, 1.0, -1.0) for n in (n_q, n_k)]
    q, k = (0.5 * rng.standard_normal((len(side), d)) for side in sides)
    q[:, 0] += 6 * sides[0]
    k[:, 0] += 6 * sides[1]
    v = sides[1][:, None] * np.array([1.0, -1.0, 1.0, 1.0]) + 0.1 * rng.standard_normal((n_k, 4))
    return AttentionProblem(q, k, v, name="clusters")


def _subspace(n: int, q: int) -> Made:
    basis = np.linalg.qr(np.random.default_rng(q).standard_normal((n, q)))[0]
    return basis.T, basis


@instance("subspace-512", "A = U^T, V = U with a random 5-dimensional subspace of 512 dimensions")
def _subspace_512() -> Made:
    return _subspace(512, 5)


@instance("subspace-1024", "the same of 1024 dimensions")
def _subspace_1024() -> Made:
    return _subspace(1024, 5)


@instance("subspace-4096", "the same of 4096 dimensions")
def _subspace_4096() -> Made:
    return _subspace(4096, 5)


@instance("spike", "x = e_1 with n = 4096: A = x^T, V = x, what sparse sketches miss")
def _spike() -> Made:
    x = np.zeros((4096, 1))
    x[0] = 1.0
    return x.T, x


@instance("rank-one", "A = u v^T: the worst case of norm estimates")
def _rank_one() -> Made:
    u, v = np.cos(np.arange(40.0)), np.cos(0.3 * np.arange(30.0))
    return np.outer(u, v), cosines(30, 2)
