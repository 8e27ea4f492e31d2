"""How far a softmax can move, and how far apart the values are that it averages."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from ...base.floating import without_floating_errors
from ...errors.perturbation import tv_bound
from ..engine.arguments import Array, Float, floats, real


@without_floating_errors
def perturbation_bound(width: ArrayLike) -> Float:
    """Return ``2 tanh(width/4)``, the most that a softmax can move in the 1-norm.

    Parameters
    ----------
    width : float or array
        ``max_j delta_j - min_j delta_j`` of the change of the logits, at least 0.

    Notes
    -----
    The ratio of the two distributions lies in an interval ``[x, x e^W]``; the total variation is
    at most ``(e^(W/2) - 1)/(e^(W/2) + 1)``.  Attained by two outcomes with probability
    ``1/(1 + e^(W/2))``.

    Examples
    --------
    >>> round(perturbation_bound(1.0), 6)
    0.489837
    """
    return floats(2 * np.asarray(tv_bound(real(width, "width", 0, low_open=False) / 2)))


def diameter(points: Array) -> float:
    """Return the largest distance of two rows."""
    x = points - points.mean(axis=0)
    squares = np.einsum("ij,ij->i", x, x)
    return math.sqrt(max(float((squares[:, None] + squares - 2 * x @ x.T).max()), 0.0))
