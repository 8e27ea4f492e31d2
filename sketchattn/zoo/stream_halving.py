"""A causal form of thinning that reads tokens once: a cache of keys that is halved when it is full.

Source: derived here from the halvings of Dwivedi and Mackey.  It is not the algorithm of "Express"
(arXiv 2606.10944), whose recursion is not in its abstract.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..base.arguments import check_count
from ..base.draws import Draw, check_columns
from ..operators.base import AttentionOperator
from ..operators.blocks import merged_blocks
from ..operators.merging import merge_into
from ..operators.sampled import SampledAttention
from ..operators.solve import softmax_over, solve_over
from ..problem import AttentionProblem
from ..sampling.halving import Weighted, halve
from .base import Method, Traits, register
from .baselines import Exact
from .causal_tree import part_of, with_values
from .thinformer import check_halving, check_log_weights, kernel_of

Array = NDArray[Any]

CLAIMS = ("training_free.stream_mass", "softmax.merge")


class Part(NamedTuple):
    """Hold a block of queries and what they attend to.

    Attributes
    ----------
    rows : slice
    start, stop : int
        The tokens of the block.
    """

    rows: slice
    start: int
    stop: int


@register("stream_halving")
class StreamHalving(Method):
    """Attend to a block of last tokens exactly, and to at most r weighted keys before it.

    For each block of B tokens: the output merges exact causal attention inside the block with
    ``softmax(L_ij + ln w_j)`` over the cache, by their normalisers.  Then the block is halved t
    times and joins the cache with weights ``2^t``.  While the cache and the share ``B/2^t`` of the
    next block exceed r, the cache is halved and t grows by one.

    Parameters
    ----------
    rank : int
        Number r of cached keys, in 1..n_k.
    block : int, default 256
        Tokens B of a block; at least 1.
    rule, value_factor, delta
        How a halving chooses, as for `Thinformer`.

    Raises
    ------
    TypeError, ValueError
        For values out of range, and problems without values unless ``value_factor`` is False.

    Notes
    -----
    Online: memory for ``r + B`` keys, and the rows of a token do not depend on later ones, nor on
    how many there are.  Exact for at most B tokens, and ``path`` says so.  Weights always sum to
    the keys that were read and that are not masked: where lengths do not halve evenly an odd key
    waits with its weight, and of two keys with different weights one stays with probability
    proportional to its own.

    Without a causal mask all queries attend to the last cache.

    The draw holds the caches that blocks attend to, one after the other: ``kept``,
    ``log_weights``, and ``starts`` (blocks + 1,), where each begins.

    Examples
    --------
    >>> import numpy as np, sketchattn as sa
    >>> q, k, v = sa.make_heads("gaussian", n=40, d=4, rng=0)[0]
    >>> problem = sa.AttentionProblem(q, k, v, causal=True)
    >>> draw = sa.StreamHalving(rank=8, block=8).draw(problem, rng=0)
    >>> draw["starts"].tolist()
    [0, 0, 4, 8, 14, 18]
    >>> weights = np.exp(draw["log_weights"])
    >>> [round(float(x.sum()), 9) for x in np.split(weights, draw["starts"][2:-1])]
    [8.0, 16.0, 24.0, 32.0]
    """

    draw_names = ("kept", "log_weights", "starts")

    def __init__(
        self,
        rank: int,
        block: int = 256,
        rule: str = "simple",
        value_factor: bool = True,
        delta: float = 0.5,
    ) -> None:
        self.rank = rank
        self.block = block
        self.rule = rule
        self.value_factor = value_factor
        self.delta = delta

    @property
    def traits(self) -> Traits:
        """Causal, and no row depends on later tokens."""
        return Traits(
            causal=True,
            key_mask=True,
            row_stochastic=True,
            nonnegative=True,
            claims=CLAIMS,
            logsumexp=True,
        )

    # --- arguments --------------------------------------------------------------------------

    def check(self, problem: AttentionProblem) -> None:
        """Refuse a problem that this method cannot honour, or hyper-parameters out of range."""
        super().check(problem)
        if self.value_factor:
            _ = problem.values

    def _check_parameters(self) -> None:
        check_halving(self)
        check_count(self.block, "block", "give the tokens of a block")

    # --- draws ------------------------------------------------------------------------------

    def _parts(self, problem: AttentionProblem) -> list[Part]:
        """Return what attends to each cache of a draw."""
        if not problem.causal:
            return [Part(slice(0, problem.n_q), 0, 0)]
        offset, end, parts = problem.offset, _end(problem), []
        for start in range(0, end, int(self.block)):
            stop = min(start + int(self.block), end)
            rows = slice(max(start - offset, 0), max(stop - offset, 0))
            parts.append(Part(rows, start, stop))
        if end < problem.n_q + offset:  # queries after the last key
            parts.append(Part(slice(end - offset, problem.n_q), end, end))
        return parts

    def _caches(self, problem: AttentionProblem, rng: np.random.Generator) -> Iterator[Weighted]:
        """Yield what is cached before each block, and at the end."""
        kernel, s, size = kernel_of(self, problem), int(self.rank), int(self.block)
        keys = problem.kept_keys
        # Tokens of a block are positions where a mask knows of them, otherwise keys that exist.
        places = keys if problem.causal else np.arange(len(keys))
        end = _end(problem) if problem.causal else len(keys)
        cache = Weighted(keys[:0], np.zeros(0))
        halvings = 0
        while _share(size, halvings) > s:
            halvings += 1
        for start in range(0, end, size):
            yield cache
            low, high = np.searchsorted(places, (start, start + size))
            points = Weighted(keys[low:high], np.ones(high - low))
            for _ in range(halvings):
                points = halve(points, kernel, _even(points), rng)
            cache = Weighted(
                np.concatenate([cache.positions, points.positions]),
                np.concatenate([cache.weights, points.weights]),
            )
            # At the end there is no next block, for which there must be room.
            last = not problem.causal and start + size >= end
            while len(cache.positions) + (0 if last else _share(size, halvings)) > s:
                if len(cache.positions) <= 1 and _share(size, halvings) == 1:
                    break
                cache = halve(cache, kernel, _even(cache), rng)
                halvings += 1
        yield cache

    def _draw(self, problem: AttentionProblem, rng: np.random.Generator) -> Draw:
        caches = list(self._caches(problem, rng))
        caches = caches[: len(self._parts(problem))] if problem.causal else caches[-1:]
        starts = np.concatenate([[0], np.cumsum([len(x.positions) for x in caches])])
        none = Weighted(np.zeros(0, np.int64), np.zeros(0))
        return Draw(
            kept=np.concatenate([x.positions for x in (none, *caches)]),
            log_weights=np.log(np.concatenate([x.weights for x in (none, *caches)])),
            starts=starts.astype(np.int64),
        )

    def _check_draw(self, problem: AttentionProblem, draw: Mapping[str, Any]) -> Draw:
        made = super()._check_draw(problem, draw)
        kept, starts = made["kept"], made["starts"]
        parts, keys = self._parts(problem), problem.kept_keys
        whole = starts.ndim == 1 and np.issubdtype(starts.dtype, np.integer)
        if not (
            whole
            and len(starts) == len(parts) + 1
            and starts[0] == 0
            and starts[-1] == len(kept)
            and (np.diff(starts) >= 0).all()
        ):
            raise ValueError(
                f"starts must hold {len(parts) + 1} integers that rise from 0 to len(kept) = "
                f"{len(kept)}, got {starts.dtype} of shape {starts.shape}; draw it for this block"
            )
        for part, low, high in zip(parts, starts[:-1], starts[1:], strict=True):
            known = keys[keys < part.start] if problem.causal else keys
            check_columns(kept[low:high], known)
        log_weights = check_log_weights(made["log_weights"], len(kept))
        return Draw(kept=kept.astype(np.int64), log_weights=log_weights, starts=starts)

    # --- the approximation ------------------------------------------------------------------

    def _pieces(
        self, problem: AttentionProblem, draw: Draw
    ) -> Iterator[tuple[slice, Array, AttentionProblem, Array | None]]:
        """Yield rows, keys, their problem, and log-weights of a cache or None for a block."""
        starts = draw["starts"]
        for i, (rows, start, stop) in enumerate(self._parts(problem)):
            if rows.stop <= rows.start:
                continue
            chosen = slice(starts[i], starts[i + 1])
            kept = draw["kept"][chosen]
            if len(kept):
                part = part_of(problem, rows, kept, False)
                yield rows, kept, part, draw["log_weights"][chosen]
            if stop > start:
                keys = np.arange(start, stop)
                causal: Any = True if rows.stop - rows.start == stop - start else "bottom-right"
                yield rows, keys, part_of(problem, rows, keys, causal), None

    def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        parts, used = [], 0
        for rows, keys, part, log_weights in self._pieces(problem, draw):
            ahat: AttentionOperator = part.exact
            _, lse = _attended(with_values(part), log_weights)
            if log_weights is not None:
                columns = np.arange(len(keys))
                weights = softmax_over(part, columns, np.exp(log_weights))
                ahat = SampledAttention(columns, weights, len(keys))
                used = max(used, len(keys))
            parts.append((rows, keys, ahat, lse))
        return merged_blocks(problem, parts, used)

    def _attend_with_lse(self, problem: AttentionProblem, draw: Draw) -> tuple[Array, Array]:
        out = np.zeros((problem.n_q, problem.values.shape[1]), problem.dtype)
        lse = np.full(problem.n_q, -np.inf)
        for rows, _, part, log_weights in self._pieces(problem, draw):
            merge_into(out, lse, rows, *_attended(part, log_weights))
        return out, lse.astype(problem.dtype)


def _attended(part: AttentionProblem, log_weights: Array | None) -> tuple[Array, Array]:
    """Return output and logsumexp of a block, or of a cache."""
    if log_weights is None:
        return Exact().attend_with_lse(part)
    return solve_over(part, np.arange(part.n_k), part.values, log_weights)


def _end(problem: AttentionProblem) -> int:
    """Return the number of keys that some query of a causal problem sees."""
    return max(0, min(problem.n_k, problem.n_q + problem.offset))


def _share(block: int, halvings: int) -> int:
    """Return how many keys of a block are left."""
    return -(-block >> halvings)


def _even(points: Weighted) -> int:
    """Return the size of one bucket for all points."""
    return max(2, len(points.positions) + len(points.positions) % 2)
