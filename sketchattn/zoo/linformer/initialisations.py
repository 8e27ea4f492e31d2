"""How E and F are drawn: as published codes initialise them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from numpy.typing import NDArray

from ...base.arguments import check_integer, check_name
from ...base.draws import Rng, as_generator

Array = NDArray[Any]


class Initialisation(NamedTuple):
    """Describe how a published code fills E before training.

    Attributes
    ----------
    law : {"normal", "uniform"}
        Independent entries with mean zero.
    deviation : callable
        Their standard deviation from (r, n).
    factor : callable
        ``f`` of ``E |E x|^2 = f |x|^2``, from (r, n): r times the variance.
    source : str
    """

    law: str
    deviation: Callable[[int, int], float]
    factor: Callable[[int, int], float]
    source: str


INITIALISATIONS: dict[str, Initialisation] = {
    "paper": Initialisation(
        "normal", lambda r, n: r**-0.5, lambda r, n: 1.0, "analysis of arXiv 2006.04768"
    ),
    "lucidrains": Initialisation(
        "uniform",
        lambda r, n: (3 * r) ** -0.5,
        lambda r, n: 1 / 3,
        "lucidrains/linformer: uniform between -1/sqrt(r) and 1/sqrt(r)",
    ),
    "tatp22-no-params": Initialisation(
        "normal", lambda r, n: 1 / r, lambda r, n: 1 / r, "tatp22/linformer-pytorch, no_params"
    ),
    "tatp22-learnable": Initialisation(
        "normal",
        lambda r, n: math.sqrt(2 / (n + r)),
        lambda r, n: 2 * r / (n + r),
        "tatp22/linformer-pytorch, learnable: Xavier normal, without its bias",
    ),
    "fairseq": Initialisation(
        "normal", lambda r, n: 0.02, lambda r, n: 4e-4 * r, "fairseq, examples/linformer"
    ),
    "nystromformer": Initialisation(
        "normal", lambda r, n: 0.02, lambda r, n: 4e-4 * r, "mlpen/Nystromformer, LRA code"
    ),
    "long-range-arena": Initialisation(
        "normal",
        lambda r, n: n**-0.5,
        lambda r, n: r / n,
        "google-research/long-range-arena: variance 1/n; a normal law in place of a truncated one",
    ),
}


def initialise(init: str, r: int, n: int, rng: Rng = None) -> Array:
    """Draw E (r, n) as a published code initialises it.

    Parameters
    ----------
    init : str
        A key of ``INITIALISATIONS``.
    r, n : int
        Rows and columns, at least 1.
    rng : None, int or numpy.random.Generator

    Returns
    -------
    ndarray (r, n), float64

    Raises
    ------
    TypeError, ValueError
        For an unknown name or sizes out of range.

    Notes
    -----
    Codes with a bias in the projection are initialised without it: with a bias ``E 0`` is not 0
    and there is no ``Ahat``.

    Examples
    --------
    >>> initialise("lucidrains", 4, 8, rng=0).shape
    (4, 8)
    >>> INITIALISATIONS["fairseq"].factor(256, 512)
    0.1024
    """
    law = INITIALISATIONS[check_name(init, "init", tuple(INITIALISATIONS))]
    rows = check_integer(r, "r", 1, "ask for one row or more")
    columns = check_integer(n, "n", 1, "project one key or more")
    generator = as_generator(rng)
    deviation = law.deviation(rows, columns)
    if law.law == "uniform":
        half = math.sqrt(3) * deviation
        return generator.uniform(-half, half, (rows, columns))
    return deviation * generator.standard_normal((rows, columns))
