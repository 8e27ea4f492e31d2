"""HyperAttention: sorted blocks beside a uniform sample, and its published form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...base.arguments import check_integer
from ...base.draws import Draw, check_draw
from ...operators.base import AttentionOperator
from ...operators.factored import zero_attention
from ...operators.sampled import SampledAttention
from ...problem import AttentionProblem
from ...sketches.base import streams
from ..base import Traits, register
from .layout import weighted_sample
from .method import Choices, SortedBlocks, check_uniforms
from .published import approximate_normalizers, value_shares

Array = NDArray[Any]

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"align": "rank"},
    "released": {"order": "forward", "align": "rank", "mask_overlap": False},
}
PAPER_NAMES = ("planes", "rows", "uniforms", "value_uniforms")


@register("hyperattention")
class HyperAttention(SortedBlocks):
    """Attend to a block of sorted keys exactly and to a uniform sample, weighted (HyperAttention).

    Queries and keys have a block beta by their hashes.  With ``M_ij = [beta(q_i) = beta(k_j)]`` and
    keys l_1..l_s drawn with replacement from p

        N_i = sum_j M_ij e^{L_ij} v_j + sum_t (1 - M_{i l_t}) e^{L_{i l_t}} v_{l_t}/(s p_{l_t}),

    D_i the same with v = 1, and ``Ohat_i = N_i/D_i``.  N and D are unbiased for every p > 0, their
    quotient is not.

    Parameters
    ----------
    rank : int
        Keys r that a query reads, in 1..n_k.
    block : int, optional
        Keys of a block, at least 1; by default ``floor(r/2)`` and 1 at least, or all keys where r
        is their number and ``sample`` is not given.
    sample : int, optional
        Draws s with replacement, at least 0; by default ``floor(r/2)``.
    planes : int, default 7
        Signs P of a hash ``sum_t [x . w_t > 0] 2^t``, in 0..62.  0 leaves queries and keys in their
        order, aligned by rank.
    order : {"inverse", "forward"}
        Keys are sorted by the place of their hash in the Gray sequence: by "inverse" neighbours
        differ in one sign.  "forward" encodes where it should decode, as the public code does: a
        quarter of the neighbours differ in more.
    align : {"code", "rank"}
        "code": the block of a query is where its own hash lies among the keys.  "rank": queries
        are sorted too, and one of rank t among n_q has the block ``floor(t blocks/n_q)``, so that
        a row depends on the other queries, causal rows on later ones.
    probabilities : {"uniform", "value", "kde_released", "oracle"}
        See `KDEformer`.
    mask_overlap : bool, default True
        Whether a drawn key counts once for the queries of its own block; False is the public code,
        where D is too large by the factor one plus the mass on the block.
    leaf : int, default 256
        Tokens up to which a part of a causal problem is exact; see `CausalTree`.
    exact_below : int, default 0
        Problems with fewer queries are exact, and ``path`` says so.  The public code does this
        below 4096 queries without a word, in all parts of a causal problem too.
    preset : {"paper", "released"}, optional
        "released": the order "forward", ranks, drawn keys of the own block counted twice, and
        samples drawn among the sorted keys; exact only where ``exact_below`` says so, nothing is
        padded, and normalisers do not saturate.  "paper": the published algorithm, an analysis
        device, see Notes.

    Raises
    ------
    TypeError, ValueError
        By `draw` and `approximate`: for parameters out of range, and arguments that contradict the
        preset.

    Notes
    -----
    Han, Jayaram, Karbasi, Mirrokni, Woodruff and Zandieh, "HyperAttention: long-context attention
    in near-linear time" (2024).  Cost ``(n_q + n_k) P d + n_q r (d + d_v)``.

    "paper" estimates D by ApproxD, with blocks, s rows T of the queries, and kappa, the quotient of
    the largest and the smallest sum of a row off its block, which needs all of ``Q K^T``: an
    oracle.  The numerator is s keys drawn by ``|v_j|^2/|V|_F^2``, without blocks; rows do not sum
    to one, and errors of 15 times the output are usual.  eps is 1/2, the constant of its
    threshold 1.

    The draw holds ``planes`` (d, P) and ``uniforms`` (s,) in [0, 1): ``floor(u n_k)`` for the
    uniform law, otherwise the first j with ``p_0 + ... + p_j > u``; for "paper" also ``rows``,
    int64, and ``value_uniforms`` (s,).  Masked keys are deleted first.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=64, d=4, rng=0)[0]
    >>> sa.HyperAttention(rank=16).approximate(problem, rng=0).effective_rank  # a key came twice
    15
    >>> sa.HyperAttention(16, preset="released", exact_below=4096).approximate(problem, rng=0).path
    'exact'
    """

    _default = Choices()
    _presets = PRESETS
    _claims = (
        "training_free.block_sample_unbiased",
        "training_free.block_sample_variance",
        "training_free.tree_exact",
        "training_free.alpha_kappa",
        "training_free.approximate_normalizer",
        "training_free.value_norms_best",
    )

    def __init__(
        self,
        rank: int,
        block: int | None = None,
        sample: int | None = None,
        planes: int = 7,
        order: str = "inverse",
        align: str = "code",
        probabilities: str = "uniform",
        mask_overlap: bool = True,
        leaf: int = 256,
        exact_below: int = 0,
        preset: str | None = None,
    ) -> None:
        self.rank = rank
        self.block = block
        self.sample = sample
        self.planes = planes
        self.order = order
        self.align = align
        self.probabilities = probabilities
        self.mask_overlap = mask_overlap
        self.leaf = leaf
        self.exact_below = exact_below
        self.preset = preset

    @property
    def _is_paper(self) -> bool:
        return self.preset == "paper"

    @property
    def traits(self) -> Traits:
        """Those of sorted blocks beside a sample; the published form is an oracle."""
        made = super().traits
        if not self._is_paper:
            return made
        return replace(
            made,
            causal=False,
            row_stochastic=False,
            oracle=True,
            exact_at_full_rank=False,
            logsumexp=False,
        )

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_integer(self.exact_below, "exact_below", 0, "0 is never exact by length")

    def _is_exact(self, problem: AttentionProblem) -> bool:
        return problem.n_q < int(self.exact_below) or super()._is_exact(problem)

    def _draw(self, problem: AttentionProblem, rng: np.random.Generator) -> Draw:
        if not self._is_paper:
            return super()._draw(problem, rng)
        first, second, third, fourth = streams(rng, 4)
        _, count = self._sizes(len(problem.kept_keys))
        return Draw(
            planes=first.standard_normal((problem.d, int(self.planes))),
            rows=second.permutation(problem.n_q)[:count],
            uniforms=third.random(count),
            value_uniforms=fourth.random(count),
        )

    def _check_draw(self, problem: AttentionProblem, draw: Mapping[str, Any]) -> Draw:
        if not self._is_paper:
            return super()._check_draw(problem, draw)
        given = check_draw(draw, PAPER_NAMES)
        made = super()._check_draw(problem, {x: given[x] for x in self.draw_names})
        rows = given["rows"]
        if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
            raise TypeError(
                f"rows must be a one-dimensional integer array, got {rows.dtype} of shape "
                f"{rows.shape}; give indices of queries"
            )
        if len(rows) and not 0 <= rows.min() <= rows.max() < problem.n_q:
            raise ValueError(
                f"rows must be in 0..n_q - 1 = {problem.n_q - 1}, got {rows.min()} to "
                f"{rows.max()}; give indices of queries"
            )
        count = len(made["uniforms"])
        return Draw(
            **made,
            rows=rows.astype(np.int64),
            value_uniforms=check_uniforms(given, "value_uniforms", count),
        )

    def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        if not self._is_paper:
            return super()._approximate(problem, draw)
        if problem.n_q == 0 or not len(problem.kept_keys):
            return zero_attention(problem)
        kept = problem.kept_keys
        part, blocks = self._sort(problem, draw["planes"])
        drawn = weighted_sample(draw["uniforms"], None, len(kept))
        count = len(draw["uniforms"])
        log_d = approximate_normalizers(part, blocks, draw["rows"], drawn, count)
        chosen = weighted_sample(draw["value_uniforms"], value_shares(part.values), len(kept))
        q, k, _ = part.astype(np.float64).arrays
        with np.errstate(over="ignore", under="ignore"):
            weights = np.exp(part.scale * (q @ k[chosen.columns].T) - log_d[:, None])
            weights = (weights * chosen.weights).astype(problem.dtype)
        if not np.isfinite(weights).all():
            raise ValueError(
                f"weights of the published estimate must be finite in {problem.dtype}, got "
                f"{np.abs(weights).max()}: its normalisers are too small; leave preset at None"
            )
        columns = kept[chosen.columns]
        return SampledAttention(columns, weights, problem.n_k, len(columns))

