"""Floating-point exceptions: a public function neither raises nor warns for input it accepts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numpy as np

P = ParamSpec("P")
R = TypeVar("R")


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
        with np.errstate(all="ignore"):  # one a call: NumPy 1 forgets nested settings otherwise
            return function(*args, **kwargs)

    return quiet
