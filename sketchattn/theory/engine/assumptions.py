"""Assumptions that claims of several topics share: of the matrix, the values, the problem."""

from __future__ import annotations

from .instances import Instance
from .registry import Assumption

# --- the matrix A and the values V --------------------------------------------------------------


def _test_dense(instance: Instance) -> str | None:
    if instance.is_dense:
        return None
    return f"needs the dense matrix, at most 2^22 entries, got {instance.m} x {instance.n}"


def _test_values(instance: Instance) -> str | None:
    return None if instance.has_values else "needs values V"


def _test_product(instance: Instance) -> str | None:
    if not instance.fro > 0:
        return "needs A and V that are not zero"
    if not 1e-150 < instance.fro < 1e150:  # no error has a square then
        return f"needs |A|_F |V|_F between 1e-150 and 1e150, got {instance.fro:.3g}"
    return None


def _test_distributions(seen: Instance) -> str | None:
    if (seen.a < 0).any():
        return "has negative weights"
    return None if seen.stochastic else "has rows that do not sum to one"


def _test_rows(seen: Instance) -> str | None:
    if seen.problem is not None:
        return None if (seen.problem.visible_counts() > 0).all() else "has rows without a key"
    if (seen.a <= 0).any():
        return "has weights that are not positive, and no queries and keys"
    return None if seen.stochastic else "has rows that do not sum to one"


DENSE = Assumption("A is not empty and small enough to be formed", _test_dense)
VALUES = Assumption("there are values V", _test_values)
NONZERO = Assumption("neither A nor V is zero", _test_product)
PRODUCT = (DENSE, VALUES, NONZERO)
STOCHASTIC = Assumption("rows of A are distributions", _test_distributions)
ROWS = Assumption("queries and keys are known, or all weights are positive", _test_rows)

# --- queries and keys ---------------------------------------------------------------------------


def _test_keys(seen: Instance) -> str | None:
    if seen.problem is None:
        return "needs queries and keys, not only their matrix"
    return "is causal: its rows see different keys" if seen.problem.causal else None


def _test_causal(seen: Instance) -> str | None:
    causal = seen.problem is not None and seen.problem.causal
    return "is causal: its rows see different keys" if causal else None


KEYS = Assumption("queries and keys are known, attention is not causal", _test_keys)
NOT_CAUSAL = Assumption("all rows see the same keys", _test_causal)
