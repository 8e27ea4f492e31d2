"""Floating-point exceptions: a public function neither raises nor warns for input it accepts."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numpy as np

P = ParamSpec("P")
R = TypeVar("R")

# Where NumPy 2 keeps the settings that are in force; it puts another object there for each change.
_settings: Any = getattr(
    getattr(getattr(np, "_core", None), "umath", None), "_extobj_contextvar", None
)
# ``ignored``: the object that ignores everything, while a quiet function of this thread runs.
_local = threading.local()


def without_floating_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function as if NumPy ignored floating-point exceptions, whatever its caller set.

    Underflow in the tail of a softmax, or the division of a row that is empty, is part of the
    computation: it must not become an exception under ``np.seterr(all="raise")``.  Results are
    the same bits; what is not finite has to be looked for, as ever.  Threads that the function
    starts have settings of their own.

    Parameters
    ----------
    function : callable
        A public entry point.

    Returns
    -------
    callable
        With the name, signature and docstring of ``function``.

    Examples
    --------
    >>> import numpy as np
    >>> half = without_floating_errors(lambda x: np.float64(x) / 2)
    >>> with np.errstate(all="raise"):
    ...     float(half(5e-324))
    0.0
    """

    @functools.wraps(function)
    def quiet(*args: P.args, **kwargs: P.kwargs) -> R:
        before = getattr(_local, "ignored", None)
        # Quiet functions call each other often, and a setting takes as long as a small product.
        if before is not None and _settings.get(None) is before:
            return function(*args, **kwargs)
        with np.errstate(all="ignore"):  # one a call: NumPy 1 forgets nested settings otherwise
            _local.ignored = None if _settings is None else _settings.get(None)
            try:
                return function(*args, **kwargs)
            finally:
                _local.ignored = before

    return quiet
