"""Formulas about halvings: the size of a signed sum, and what it is for attention."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ...base.floating import without_floating_errors
from ...problem import AttentionProblem
from ..engine.arguments import Array

PAPER = "Carrell et al., arXiv 2502.12063, and Dwivedi and Mackey on kernel halving"

# Logarithm of the largest bound that is told from others: all of them say nothing.
LARGEST = 600.0


class SignedSum(NamedTuple):
    """Hold the constants of one halving.

    Attributes
    ----------
    c : float
        ``1/2 + ln(2 S/delta)``, the factor of the threshold.
    ratio : float
        ``C^2/(2 C - 1)``: the square of the size over that of the largest difference.
    log_size : float
        ``ln sigma``, ``sigma = b_max C/sqrt(2 C - 1)``, for the kernel without any shift.
    """

    c: float
    ratio: float
    log_size: float


@without_floating_errors
def signed_sum(problem: AttentionProblem, delta: float = 0.5) -> SignedSum:
    """Return the constants of one halving of all keys in one bucket.

    ``kappa(x, y) = exp(|scale| k_x . k_y)(v_x . v_y + b^2)``, ``b = max |v_jl|``; ``b_max`` is the
    largest ``|kappa(x_2i, .) - kappa(x_(2i+1), .)|`` of a pair of neighbours.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=64, d=4, rng=0)[0]
    >>> round(signed_sum(problem).ratio, 3)
    3.295
    """
    k, v = (np.asarray(x, np.float64) for x in (problem.k, problem.values))
    n = len(k) - len(k) % 2
    c = 0.5 + math.log(2 * len(k) / delta)
    factor, b = abs(problem.scale), float(np.abs(v).max(initial=0.0))
    shift = factor * float((k * k).sum(axis=1).max(initial=0.0))
    even, odd = (slice(i, n, 2) for i in (0, 1))

    def kernel(left: slice, right: slice) -> Array:
        inner = (k[left] * k[right]).sum(axis=1)
        of_values: Array = (v[left] * v[right]).sum(axis=1) + b * b
        made: Array = np.exp(factor * inner - shift) * of_values
        return made

    squares = kernel(even, even) - 2 * kernel(even, odd) + kernel(odd, odd)
    largest = float(squares.max(initial=0.0))
    log_b = 0.5 * (math.log(largest) + shift) if largest > 0 else -math.inf
    ratio = c * c / (2 * c - 1)
    return SignedSum(c, ratio, log_b + 0.5 * math.log(ratio))


@without_floating_errors
def denominator_bound(problem: AttentionProblem, failure: float, delta: float = 0.5) -> Array:
    """Return what ``|Dhat_i/D_i - 1|`` exceeds with probability ``failure + delta/2`` at most.

    ``exp(|scale| |q_i|^2/2)/(b D_i) sigma sqrt(2 ln(2/failure))`` for one halving, (n_q,).
    """
    q = np.asarray(problem.q, np.float64)
    b = float(np.abs(problem.values).max(initial=0.0))
    if b == 0:
        return np.full(problem.n_q, math.exp(LARGEST))
    logs = 0.5 * abs(problem.scale) * (q * q).sum(axis=1) - math.log(b) - problem.logsumexp
    logs += signed_sum(problem, delta).log_size + 0.5 * math.log(2 * math.log(2 / failure))
    bound: Array = np.exp(np.minimum(logs, LARGEST))
    return bound
