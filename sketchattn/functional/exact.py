"""Exact attention of a call: the kernel, or the reference, and values that are not finite."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..base.arguments import check_logits, largest
from ..base.draws import Rng, as_generator
from ..operators.reference import reference_attention
from .call import Call
from .hidden import add_non_finite, lost_rows, without_hidden
from .steep import is_calm, is_small, solve_steep

if TYPE_CHECKING:
    from ..zoo.base import Method

Array = NDArray[Any]


class Flat(NamedTuple):
    """Hold q, k and v of flat heads, and what was seen when they were looked at.

    Attributes
    ----------
    clean : bool
        Whether every key and value that is seen is finite.
    most : float
        ``max |q| max |k|`` over all heads.
    """

    q: Array
    k: Array
    v: Array
    clean: bool
    most: float


def is_exact(method: object) -> bool:
    """Say whether a method, by name or as an object, is the exact one."""
    if isinstance(method, str):
        return method in ("exact", "Exact")
    if isinstance(method, type):
        return method.__name__ == "Exact" and getattr(method, "name", None) == "exact"
    return type(method).__name__ == "Exact" and getattr(method, "name", None) == "exact"


def check_exact(
    method: str | type[Method] | Method,
    parameters: Mapping[str, Any],
    rng: Rng,
    draw: Mapping[str, Any] | list[Any] | tuple[Any, ...] | None,
) -> None:
    """Refuse what the exact method has no use for: parameters, a draw, and a wrong ``rng``."""
    if parameters:
        from ..zoo.base import make_method  # loads scikit-learn

        make_method(method, parameters)
    if draw is not None:
        raise ValueError("draw must be None for method 'exact', got a draw; it draws nothing")
    if rng is not None:
        as_generator(rng)  # unused, but a wrong one would fail with any other method


def exact(call: Call, flat: Flat | None = None) -> tuple[Array, Array]:
    """Return the output (H, n_q, d_v) of flat heads and their logsumexp (H, n_q).

    Keys and values that are not finite reach the rows that see them, and no others.  ``flat`` is
    what ``arrays`` returns for this call, if it is known.
    """
    from ..kernels.softmax import softmax_product  # loads the compiler, which refusals do without

    q, k, v, clean, most = arrays(call) if flat is None else flat
    options = vars(call.terms)
    product = reference_attention if call.reference else softmax_product
    if clean:
        out, lse = product(q, k, v, **options)
        calm = is_calm(lse)
        if not calm:
            check_sums(call, lse)
        if not (call.reference or (calm and is_small(q.shape[2], most, call.terms))):
            solve_steep(out, lse, q, k, v, call.terms, most)
        return out, lse
    if call.reference:
        return product(q, k, v, **options)
    # 0 times NaN is NaN: the product runs on finite values, and what the others contribute is
    # added where their keys are seen.
    values = np.where(np.isfinite(v), v, v.dtype.type(0))
    out, lse = product(q, k, values, **options)
    solve_steep(out, lse, q, k, values, call.terms, most)
    add_non_finite(out, lse, q, k, v, call.terms)
    return out, lse


def arrays(call: Call) -> Flat:
    """Return q, k and v of flat heads; keys that no query sees are zero where one is not finite."""
    q, k, v = call.flat()
    most_k, most_v = largest(k), largest(v)
    if not (isfinite(most_k) and isfinite(most_v)):
        k, v = without_hidden(q.shape[1], k, v, call.terms)
        most_k, most_v = largest(k), largest(v)
    clean = isfinite(most_k) and isfinite(most_v)
    return Flat(q, k, v, clean, call.most_q * most_k)


def check_sums(call: Call, lse: Array) -> None:
    """Refuse logits that overflowed, which shows in their log-sum-exp."""
    check_logits(np.where(lost_rows(lse, call.layout.n_k, call.terms), np.nan, lse))
