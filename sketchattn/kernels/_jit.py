"""The one place that touches Numba decorators.

Kernels are compiled lazily, cached on disk where a location is writable, and use a fast-math
set without ``nnan`` and ``ninf``: NaN and infinities keep their meaning, sums may be reordered.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import numba
from numba import prange as prange
from numba.core import types
from numba.extending import overload

FASTMATH = frozenset({"nsz", "arcp", "contract", "afn", "reassoc"})

F = TypeVar("F", bound=Callable[..., Any])


def _can_cache() -> bool:
    """Say whether the folder that ``NUMBA_CACHE_DIR`` names can be written, if it names one.

    Numba takes it on trust and fails at the first call of a kernel, not at its decoration.
    """
    folder = os.environ.get("NUMBA_CACHE_DIR")
    if not folder:
        return True
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


CACHE = _can_cache()


def kernel(*, parallel: bool = False) -> Callable[[F], F]:
    """Decorate a kernel: nopython, no exceptions for division by zero, GIL released.

    A serial kernel is inlined wherever another one calls it.  Every object file would otherwise
    hold a weak copy of it under one name, optimised beside other code and so with other
    rounding, and the copy that a process loads first would serve all its callers: results would
    depend on which kernels were called before, and on which came from the cache.

    Caching needs a writable folder (beside the source, or ``NUMBA_CACHE_DIR``, or the user's
    cache folder); where there is none Numba raises at decoration, and the kernel is compiled
    once a process instead.
    """

    def wrap(function: F) -> F:
        make = partial(
            numba.njit,
            parallel=parallel,
            forceinline=not parallel,
            fastmath=set(FASTMATH),
            error_model="numpy",
            nogil=True,
        )
        try:
            return cast(F, make(cache=CACHE)(function))
        except RuntimeError:
            return cast(F, make(cache=False)(function))

    return wrap


def by_precision(generic: F, *, float32: Callable[..., Any], float64: Callable[..., Any]) -> F:
    """Give ``generic`` one compiled body a precision, chosen by its argument ``x``.

    ``generic`` itself is what runs when compilation is disabled, so it has to be the readable
    formula.  ``x`` is a scalar or an array of float32 or float64.
    """

    def choose(x: Any) -> Callable[..., Any] | None:
        dtype = x.dtype if isinstance(x, types.Array) else x
        if dtype == types.float32:
            return float32
        if dtype == types.float64:
            return float64
        return None

    overload(
        generic,
        jit_options={"fastmath": set(FASTMATH), "error_model": "numpy", "forceinline": True},
    )(choose)
    return generic
