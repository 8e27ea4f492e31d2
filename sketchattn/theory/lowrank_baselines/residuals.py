"""What low-rank baselines leave: the residual of the iteration, errors of many ways on one problem.

`residual_after` is the closed form; `median_errors` and `floor_errors` are the measurements that
the chapter lists.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from ...base.floating import without_floating_errors
from ...problem import AttentionProblem
from ...sampling.landmarks import segment_means
from ...zoo.baselines import TopK
from ...zoo.clustered import Clustered
from ...zoo.nystromformer import Nystromformer, filter_inverse, pseudo_inverse, small_softmax
from ...zoo.performer import Performer
from ..engine.arguments import Array, Float, floats, real, whole


@without_floating_errors
def residual_after(e: ArrayLike, iterations: int) -> Float:
    """Return ``f^(j)(e)``, ``f(e) = (3 e^3 + e^4)/4``: a residual after j steps of the iteration.

    Parameters
    ----------
    e : float or array
        Eigenvalues of ``I - M Z_0``, in [0, 1]: ``1 - s^2/c``.
    iterations : int
        j, at least 0.

    Returns
    -------
    float or ndarray

    Notes
    -----
    ``1 - f^(j)(1 - p) <= min(1, (13/4)^j p)``: six steps leave singular values of M below about
    ``0.03 sqrt(c)`` uninverted.  Derived.

    Examples
    --------
    >>> round(residual_after(0.5, 1), 9), round(residual_after(0.9991, 6), 3)
    (0.109375, 0.351)
    """
    x = real(e, "e", 0, 1, low_open=False, high_open=False)
    for _ in range(int(whole(iterations, "iterations", 0))):
        x = x**3 * (3 + x) / 4
    return floats(x)


def inverted_after(t: Array, iterations: int) -> Array:
    """Return ``1 - f^(j)(1 - t)``, with all digits however small t is.

    ``1 - f(1 - t) = t (13 - 15 t + 7 t^2 - t^3)/4`` has no difference of numbers near one.
    """
    for _ in range(iterations):
        t = t * (13 - t * (15 - t * (7 - t))) / 4
    return t


@without_floating_errors
def median_errors(seeds: range) -> dict[str, list[float]]:
    """Return ``|Ahat - A|_F/|A|_F`` of many ways to invert M, a list over seeds for each.

    n = 128, d = 16, r = 32, Q, K, V in this order iid Gaussian from ``default_rng(seed)``.

    Parameters
    ----------
    seeds : range

    Returns
    -------
    dict
        Keys ``"pseudo-inverse"``, ``"2 steps"`` and so on, ``"ridge 1e-06"`` and so on, and
        ``"uniform"``.
    """
    found: dict[str, list[float]] = {}
    for seed in seeds:
        rng = np.random.default_rng(seed)
        q, k, _ = (rng.standard_normal((128, 16)) for _ in range(3))
        problem = AttentionProblem(q, k)
        queries, keys = segment_means(q, 32), segment_means(k, 32)
        a, f, m, b = (
            small_softmax(x, y, problem.scale)
            for x, y in ((q, k), (q, keys), (queries, keys), (queries, k))
        )
        made = {"pseudo-inverse": pseudo_inverse(m)}
        made |= {f"{j} steps": filter_inverse(m, j) for j in (2, 4, 6, 8, 10, 14, 20)}
        made |= {
            f"ridge {x:.0e}": pseudo_inverse(m, x) for x in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
        }
        size = float(np.linalg.norm(a))
        for name, z in made.items():
            found.setdefault(name, []).append(float(np.linalg.norm(f @ z @ b - a)) / size)
        found.setdefault("uniform", []).append(float(np.linalg.norm(a - 1 / 128)) / size)
    return found


@without_floating_errors
def floor_errors(problem: AttentionProblem, rank: int) -> dict[str, float]:
    """Return ``|A - Ahat|_F/|A|_F`` of floors, predictors and three methods.

    Parameters
    ----------
    problem : AttentionProblem
    rank : int
        Keys a row, singular values, landmarks, directions or clusters.

    Returns
    -------
    dict
        Keys "uniform", "svd", "topk, raw", "topk, renormalised", "nystromformer", "performer",
        "clustered" and "clustered, improved"; draws from seed 0.
    """
    wide = problem.astype(np.float64)
    r = int(real(rank, "rank", 0))
    a = wide.exact.to_dense()
    sigma = np.linalg.svd(a, compute_uv=False)
    size = float(np.linalg.norm(a))
    made = {
        "topk, raw": TopK(r, renormalize=False).approximate(wide),
        "topk, renormalised": TopK(r).approximate(wide),
        "nystromformer": Nystromformer(r).approximate(wide),
        "performer": Performer(r).approximate(wide, 0),
        "clustered": Clustered(r).approximate(wide, 0),
        "clustered, improved": Clustered(r, improved=True).approximate(wide, 0),
    }
    found = {
        "uniform": float(np.linalg.norm(a - 1 / a.shape[1])) / size,
        "svd": math.sqrt(float(np.sum(sigma[r:] ** 2))) / size,
    }
    found |= {name: float(np.linalg.norm(a - x.to_dense())) / size for name, x in made.items()}
    return found
