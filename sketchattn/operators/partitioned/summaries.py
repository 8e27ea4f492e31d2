"""What a region keeps of its keys: reference queries, rules and summaries."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Reference(NamedTuple):
    """Say which query the local weights of a region are computed with.

    Attributes
    ----------
    kind : {"given", "mean", "max"}
        The rows of ``q0``; the mean or coordinate-wise maximum of the queries at the region's
        positions.
    q0 : float64 array (1, d) or (r, d), optional
    """

    kind: str
    q0: Array | None = None

    @property
    def shared(self) -> bool:
        """Whether all regions have the same reference query."""
        return self.q0 is not None and len(self.q0) == 1


class Rule(NamedTuple):
    """Name the rest of a summary: region key, bias, second-order term."""

    key: str = "expected"
    bias: str = "entropy"
    second_order: str = "none"


class Summaries(NamedTuple):
    """Hold what all regions are replaced by.

    Attributes
    ----------
    kappa : ndarray (r, d)
        Region keys.
    bias : float64 array (r,)
        ``g_i(t) = scale q_i . kappa_t + bias_t``, before a second-order term; -inf for a region
        without keys.
    entropy : float64 array (r,)
        H(lam_t).
    logit_keys : ndarray (r, d) or (r, 2 d)
        ``g_i(t) = scale f_i . logit_keys_t + logit_bias_t`` with ``f = q``, or q and its squares.
    logit_bias : ndarray (r,)
    variance : ndarray (r, d), optional
        Of the coordinates of k under lam, for the second-order term.
    """

    kappa: Array
    bias: Array
    entropy: Array
    logit_keys: Array
    logit_bias: Array
    variance: Array | None = None


def is_variational(reference: Reference, rule: Rule) -> bool:
    """Say whether region logits are Gibbs lower bounds: expected key and entropy of one lam."""
    if rule.second_order != "none":
        return False
    if rule.key == "expected" and rule.bias == "entropy":
        return True
    uniform = reference.kind == "given" and not np.any(reference.q0)
    return uniform and rule.key in ("expected", "mean") and rule.bias in ("entropy", "log_count")
