"""KDEformer: sorted blocks beside a sample by norms of values, or of columns too."""

from __future__ import annotations

from ..base import register
from .method import Choices, SortedBlocks

CHOICES = Choices(probabilities="value")
PRESETS = {
    "paper": {"align": "rank", "probabilities": "oracle"},
    "released": {"order": "forward", "align": "rank", "probabilities": "kde_released"},
}


@register("kdeformer")
class KDEformer(SortedBlocks):
    """Attend to a block of sorted keys exactly and to a sample by norms, weighted (KDEformer).

    As `HyperAttention`, with keys of the sample drawn by p, by default
    ``p_j = |v_j|^2/(2 |V|_F^2) + 1/(2 n_k)``: numerator and denominator are unbiased for every
    p > 0.

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
        Signs of a hash, in 0..62.  0 leaves queries and keys in their order.
    order : {"inverse", "forward"}
        See `HyperAttention`.
    align : {"code", "rank"}
        See `HyperAttention`.
    probabilities : {"value", "uniform", "kde_released", "oracle"}
        "value" as above.  "oracle": ``|A e_j|^2/(2 |A|_F^2) + |v_j|^2/(2 |V|_F^2)``, which looks
        at all of A: for this law the error of a sampled product is bounded by stable ranks
        (`training_free.mixed_bernstein`), and the published method estimates it by kernel
        densities.  "kde_released": proportional to ``|v_j|/s + 1/n_k`` with a one beside each
        value and s the largest eigenvalue of ``V^T V``: nearly uniform, since the square stands
        where the norm belongs.
    mask_overlap : bool, default True
        Whether a drawn key counts once for the queries of its own block.
    leaf : int, default 256
        Tokens up to which a part of a causal problem is exact; see `CausalTree`.
    preset : {"paper", "released"}, optional
        "paper": ranks and "oracle", the published law known exactly.  "released": the order
        "forward", ranks, and "kde_released", drawn among the sorted keys.

    Raises
    ------
    TypeError, ValueError
        By `draw` and `approximate`: for parameters out of range, arguments that contradict the
        preset, and problems without values unless ``probabilities`` is "uniform".

    Notes
    -----
    Zandieh, Han, Daliri and Karbasi, "KDEformer: accelerating transformers via kernel density
    estimation" (2023).  The public code estimates no density.  It has neither scale nor shift: its
    exponentials overflow, block sizes that do not divide n_k are refused, and its buffer of masks
    is changed by the first call.  None of that is copied here.

    The draw holds ``planes`` (d, P) and ``uniforms`` (s,) in [0, 1): each is the first j with
    ``p_0 + ... + p_j > u``.  So the matrix depends on V by p, unless p is uniform.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=64, d=4, rng=0)[0]
    >>> sa.KDEformer(rank=16).approximate(problem, rng=0).path
    'sketch'
    """

    _default = CHOICES
    _presets = PRESETS
    _claims = (
        "training_free.block_sample_unbiased",
        "training_free.block_sample_variance",
        "training_free.tree_exact",
        "training_free.mixed_bernstein",
        "training_free.mixed_expected_error",
    )

    def __init__(
        self,
        rank: int,
        block: int | None = None,
        sample: int | None = None,
        planes: int = 7,
        order: str = "inverse",
        align: str = "code",
        probabilities: str = "value",
        mask_overlap: bool = True,
        leaf: int = 256,
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
        self.preset = preset
