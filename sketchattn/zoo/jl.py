"""The product sketch ``A S^T S V``: the estimator that the theory of random projections is about.

It needs the exact matrix, so it saves nothing; it is what the published bounds speak of, and what
a reduced form (softmax of sketched logits) has to be compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.arguments import check_flag, closest
from ..base.draws import Draw
from ..operators.base import AttentionOperator
from ..operators.factored import zero_attention
from ..operators.product import ProductSketch
from ..operators.pullback import Gradient, zero_gradient
from ..problem import AttentionProblem
from ..sketches.base import make_sketch, sketches
from .base import Method, Traits, register

Array = NDArray[Any]

# Families whose rows are orthogonal: S^T S = I at r = n.
_EXACT = ("dct", "haar")


@register("jl")
class JL(Method):
    """Sketch the keys of the exact matrix: ``Ahat = A S^T S`` with ``E[S^T S] = I``.

    Unbiased, ``E Ahat = A``.  With ``center=True`` the mean of V is taken out first,
    ``Ahat V = 1 mu^T + A S^T S (V - 1 mu^T)``: unbiased too, rows sum to one, and the error is that
    of the centred values.

    Parameters
    ----------
    rank : int
        Rows of the sketch, in 1..n_k; where fewer keys are not masked, ``effective_rank`` says so.
    sketch : str
        Kind of sketch, one of ``sketchattn.sketches.sketches()``.
    sketch_options : mapping, optional
        Parameters of the kind, such as ``{"s": 8}`` of "sjlt".
    center : bool, default False
        Whether the mean of V is exact.

    Notes
    -----
    Never causal: row i of ``A S^T S V`` depends on all values through the off-diagonal entries of
    ``S^T S``, even where A is triangular.  Exact second moments of the error are the equalities M1
    to M4 of the chapter on sketching.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=16, d=4, rng=0)[0]
    >>> sa.JL(rank=4, sketch="srht").approximate(problem, rng=0).rank_bound
    4
    """

    def __init__(
        self,
        rank: int,
        sketch: str = "gaussian",
        sketch_options: Mapping[str, Any] | None = None,
        center: bool = False,
    ) -> None:
        self.rank = rank
        self.sketch = sketch
        self.sketch_options = sketch_options
        self.center = center

    @property
    def traits(self) -> Traits:
        """Unbiased, neither causal nor nonnegative; rows sum to one where the mean is exact."""
        return Traits(
            key_mask=True,
            row_stochastic=bool(self.center),
            exact_at_full_rank=self.sketch in _EXACT,
            claims=self._claims(),
            differentiable=True,
            quadratic=True,
        )

    def _claims(self) -> tuple[str, ...]:
        """Return the ids of what is proved of products with this sketch."""
        if not (isinstance(self.sketch, str) and self.sketch in sketches()):
            return ()
        gaussian = ("linformer.mean_square", "linformer.additive", "sketching.amm_gaussian_columns")
        return (
            f"sketching.moment_{self.sketch}",
            "sketching.amm_markov",
            *(gaussian if self.sketch == "gaussian" else ()),
        )

    def _check_parameters(self) -> None:
        if not isinstance(self.sketch, str):
            raise TypeError(
                f"sketch must be a name, got {type(self.sketch).__name__}; "
                f"see sketchattn.sketches.sketches()"
            )
        known = sketches()
        if self.sketch not in known:
            raise ValueError(
                f"sketch must be a known kind, got {self.sketch!r}{closest(self.sketch, known)}"
            )
        if not (self.sketch_options is None or isinstance(self.sketch_options, Mapping)):
            raise TypeError(
                f"sketch_options must be a mapping or None, got "
                f"{type(self.sketch_options).__name__}; pass for instance {{'s': 8}}"
            )
        check_flag(self.center, "center", "True keeps the mean of V exact")

    def _size(self, problem: AttentionProblem) -> tuple[int, int]:
        keys = len(problem.kept_keys)
        return min(int(self.rank), keys), keys

    def _draw(self, problem: AttentionProblem, rng: np.random.Generator) -> Draw:
        r, n = self._size(problem)
        if n == 0:
            return Draw()
        options = dict(self.sketch_options or {})
        drawn = make_sketch(self.sketch, r, n, rng, dtype=problem.dtype, **options)
        return Draw(drawn.arrays)

    def _check_draw(self, problem: AttentionProblem, draw: Mapping[str, Any]) -> Draw:
        from ..base.draws import check_draw

        if self._size(problem)[1] == 0:
            return check_draw(draw, ())
        return check_draw(draw, sketches()[self.sketch].array_names)

    def _product(self, problem: AttentionProblem, draw: Draw) -> ProductSketch:
        r, n = self._size(problem)
        options = dict(self.sketch_options or {})
        cls = sketches()[self.sketch]
        drawn = cls.from_arrays(draw, (r, n), dtype=problem.dtype, **options)
        return ProductSketch(problem, drawn, center=bool(self.center))

    def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        empty = len(problem.kept_keys) == 0
        return zero_attention(problem) if empty else self._product(problem, draw)

    def _vjp(self, problem: AttentionProblem, draw: Draw, cotangent: Array) -> Gradient:
        if len(problem.kept_keys) == 0:
            return zero_gradient(problem)
        return self._product(problem, draw).pullback(problem.values, cotangent)
