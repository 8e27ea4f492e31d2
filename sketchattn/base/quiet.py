"""Classes whose public functions neither raise nor warn by floating-point exceptions."""

from __future__ import annotations

from types import FunctionType
from typing import Any

from .floating import without_floating_errors


def quiet(cls: type[Any], *private: str) -> None:
    """Wrap what a class itself defines: its public functions, properties, and some private ones.

    Parameters
    ----------
    cls : type
        Changed in place; what it inherits is left alone.
    *private : str
        Names of functions that begin with an underscore, wrapped where the class defines them.

    Examples
    --------
    >>> import numpy as np
    >>> class Half:
    ...     def of(self, x):
    ...         return np.float64(x) / 2
    >>> quiet(Half)
    >>> with np.errstate(all="raise"):
    ...     float(Half().of(5e-324))
    0.0
    """
    for name, value in list(vars(cls).items()):
        if name.startswith("_") and name not in private:
            continue
        made: Any = None
        if isinstance(value, FunctionType):
            made = without_floating_errors(value)
        elif isinstance(value, classmethod):
            made = classmethod(without_floating_errors(value.__func__))
        elif isinstance(value, property) and value.fget is not None and value.fset is None:
            made = property(without_floating_errors(value.fget), doc=value.__doc__)
        if made is not None:
            setattr(cls, name, made)
