"""What HyperAttention and KDEformer share: sorted blocks exactly, a weighted sample beside them."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...base.arguments import check_choice, check_count, check_finite, check_flag, check_integer
from ...base.draws import Draw, check_draw
from ...operators.base import AttentionOperator
from ...operators.factored import zero_attention
from ...operators.solve import row_softmax
from ...operators.sparse import SparseAttention
from ...problem import AttentionProblem
from ...sketches.base import check_shape, streams
from ..base import Method, Traits, check_preset, in_force
from ..baselines import Exact
from ..causal_tree import CausalTree
from .laws import LAWS, key_probabilities
from .layout import ALIGNMENTS, MOST_PLANES, ORDERS, Blocks, Sample, sort_blocks, weighted_sample
from .passes import Table, attend, row_pieces, table

Array = NDArray[Any]


class Choices(NamedTuple):
    """Hold how keys are sorted, aligned, drawn and counted."""

    order: str = "inverse"
    align: str = "code"
    probabilities: str = "uniform"
    mask_overlap: bool = True


class Reading(NamedTuple):
    """Hold the keys that exist, as a problem of their own, and what each query reads of them."""

    problem: AttentionProblem
    kept: Array
    blocks: Blocks
    sample: Sample
    table: Table


class SortedBlocks(Method):
    """Attend to the own block of sorted keys exactly and to a sample of the others, weighted."""

    draw_names = ("planes", "uniforms")

    _default = Choices()
    _presets: Mapping[str, Mapping[str, Any]] = {}
    _claims: tuple[str, ...] = ()

    rank: int
    block: int | None
    sample: int | None
    planes: int
    leaf: int
    preset: str | None

    # --- what it promises -------------------------------------------------------------------

    @property
    def _choices(self) -> Choices:
        return in_force(self, self._default, self._presets)

    @property
    def traits(self) -> Traits:
        """Everything is honoured; ranks of queries among others are not autoregressive."""
        choices = self._choices
        return Traits(
            causal=True,
            key_mask=True,
            randomized=self.planes != 0 or self.sample != 0,
            row_stochastic=True,
            nonnegative=True,
            claims=self._claims,
            oracle=choices.probabilities == "oracle",
            exact_at_full_rank=self.block is None and self.sample is None,
            autoregressive=choices.align == "code" or self.planes == 0,
            logsumexp=True,
        )

    def check(self, problem: AttentionProblem) -> None:
        """Refuse a problem that this method cannot honour, or hyper-parameters out of range."""
        super().check(problem)
        if self._is_causal(problem):
            self._tree.check(problem)

    def _check_parameters(self) -> None:
        if self.block is not None:
            check_count(self.block, "block", "give the keys of a block")
        if self.sample is not None:
            check_integer(self.sample, "sample", 0, "give the number of draws")
        check_integer(
            self.planes, "planes", 0, "a code is one integer", high=MOST_PLANES, limit="MOST_PLANES"
        )
        check_count(self.leaf, "leaf", "give the tokens up to which a causal part is exact")
        check_preset(self, self._default, self._presets)
        choices = self._choices
        check_choice(choices.order, "order", ORDERS)
        check_choice(choices.align, "align", ALIGNMENTS)
        check_choice(choices.probabilities, "probabilities", LAWS)
        check_flag(choices.mask_overlap, "mask_overlap", "False counts keys of the block twice")

    def _sizes(self, keys: int) -> tuple[int, int]:
        """Return the keys of a block and the draws, of so many keys that are not masked."""
        half = int(self.rank) // 2
        whole = self.block is None and self.sample is None and int(self.rank) >= keys
        block = max(keys if whole else half, 1) if self.block is None else int(self.block)
        return block, half if self.sample is None else int(self.sample)

    def _is_exact(self, problem: AttentionProblem) -> bool:
        """Say whether one block holds all keys."""
        keys = len(problem.kept_keys)
        return self._sizes(keys)[0] >= keys

    @property
    def _tree(self) -> CausalTree:
        """The causal form, of blocks below the diagonal that this method approximates."""
        return CausalTree(int(self.rank), inner=self, leaf=int(self.leaf))

    def _is_causal(self, problem: AttentionProblem) -> bool:
        return bool(problem.causal) and self.traits.causal

    # --- draws ------------------------------------------------------------------------------

    def _draw(self, problem: AttentionProblem, rng: np.random.Generator) -> Draw:
        if self._is_causal(problem):
            return self._tree._draw(problem, rng)
        if not self.traits.randomized:
            return Draw()
        first, second = streams(rng, 2)
        _, count = self._sizes(len(problem.kept_keys))
        planes = first.standard_normal((problem.d, int(self.planes)))
        return Draw(planes=planes, uniforms=second.random(count))

    def _check_draw(self, problem: AttentionProblem, draw: Mapping[str, Any]) -> Draw:
        if self._is_causal(problem):
            return self._tree._check_draw(problem, draw)
        if not self.traits.randomized:
            return check_draw(draw, ())
        checked = check_draw(draw, self.draw_names)
        planes = checked["planes"].astype(np.float64)
        check_shape(planes, "planes", (problem.d, int(self.planes)), "(d, planes)")
        check_finite(planes, "planes")
        _, count = self._sizes(len(problem.kept_keys))
        return Draw(planes=planes, uniforms=check_uniforms(checked, "uniforms", count))

    # --- the approximation ------------------------------------------------------------------

    @property
    def _by_place(self) -> bool:
        """Whether a number draws a place among the sorted keys, as in released codes."""
        return self.preset == "released"

    def _sort(self, problem: AttentionProblem, planes: Array) -> tuple[AttentionProblem, Blocks]:
        """Return the problem without its masked keys, and its blocks."""
        q, k, v = problem.arrays
        if problem.key_mask is not None:
            kept = problem.kept_keys
            arrays = [q, k[kept]] if v is None else [q, k[kept], v[kept]]
            problem = AttentionProblem.adopt(*arrays, scale=problem.scale)
        choices = self._choices
        size, _ = self._sizes(problem.n_k)
        _, k, _ = problem.arrays
        made = sort_blocks(q, k, planes, size, order=choices.order, align=choices.align)
        return problem, made

    def _reading(self, problem: AttentionProblem, draw: Draw) -> Reading:
        kept, choices = problem.kept_keys, self._choices
        planes, uniforms = np.empty((problem.d, 0)), np.empty(0)
        if draw:
            planes, uniforms = draw["planes"], draw["uniforms"]
        problem, blocks = self._sort(problem, planes)
        p = key_probabilities(problem, choices.probabilities)
        if self._by_place:
            by_place = None if p is None else p[blocks.sorted_keys]
            drawn = weighted_sample(uniforms, by_place, len(kept))
            columns = blocks.sorted_keys[drawn.columns]
            order = np.argsort(columns)
            sample = Sample(columns[order], drawn.weights[order])
        else:
            sample = weighted_sample(uniforms, p, len(kept))
        read = table(blocks, sample, choices.mask_overlap)
        return Reading(problem, kept, blocks, sample, read)

    def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        if problem.n_q == 0 or not len(problem.kept_keys):
            return zero_attention(problem)
        if self._is_causal(problem):
            return self._tree._approximate(problem, draw)
        if self._is_exact(problem):
            found = copy(problem.exact)
            found.effective_rank = len(problem.kept_keys)
            return found
        seen = self._reading(problem, draw)
        every = np.arange(problem.n_q)
        pieces = list(row_pieces(seen.problem, seen.blocks, seen.table, every))
        lengths = np.empty(problem.n_q, np.int64)
        for rows, columns, _ in pieces:
            lengths[rows] = len(columns)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        chosen, weights = np.empty(starts[-1], np.int64), np.empty(starts[-1])
        for rows, columns, logits in pieces:
            places = starts[rows][:, None] + np.arange(len(columns))
            chosen[places], weights[places] = seen.kept[columns], row_softmax(logits)
        budget = min(seen.blocks.size + len(seen.sample.columns), len(seen.kept))
        return SparseAttention(starts, chosen, weights.astype(problem.dtype), problem.n_k, budget)

    def _attend_with_lse(self, problem: AttentionProblem, draw: Draw) -> tuple[Array, Array]:
        if self._is_causal(problem):
            return self._tree._attend_with_lse(problem, draw)
        if self._is_exact(problem) or problem.n_q == 0:
            return Exact().attend_with_lse(problem)
        seen = self._reading(problem, draw)
        values = seen.problem.arrays.v
        # Reading the values of a problem without them says what is missing.
        values = problem.values if values is None else values
        return attend(seen.problem, values, seen.blocks, seen.table)


def check_uniforms(draw: Draw, name: str, count: int) -> Array:
    """Return numbers of a draw in [0, 1), one for each key drawn, float64."""
    found = draw[name].astype(np.float64)
    check_shape(found, name, (count,), "(sample,)")
    if not ((found >= 0) & (found < 1)).all():
        raise ValueError(
            f"{name} must be at least 0 and below 1, got {found.min()} to {found.max()}; draw them "
            f"with numpy.random.Generator.random"
        )
    return found
