"""A causal form of any method that knows the normaliser of its rows: the halving tree.

Source: Han et al., "HyperAttention: long-context attention in near-linear time" (2024), section on
causal masking; any length, and normalisers merged by ``logaddexp``, which does not saturate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..base.arguments import Causal, check_count
from ..base.draws import Draw, check_draw
from ..operators.base import AttentionOperator
from ..operators.blocks import merged_blocks
from ..operators.merging import merge_into
from ..problem import AttentionProblem
from ..sketches.base import streams
from .base import Method, Traits, inner_method, register
from .baselines import Exact

Array = NDArray[Any]

CLAIMS = ("training_free.tree_exact", "softmax.merge")


class Node(NamedTuple):
    """Hold one block of the causal matrix.

    Attributes
    ----------
    name : str
        What stands behind the names of the arrays of its draw.
    rows : slice
        Its queries.
    keys : int array
        Its keys, none of them masked.
    problem : AttentionProblem
        Of these queries and keys.
    exact : bool
        A leaf: on the diagonal, causal.
    """

    name: str
    rows: slice
    keys: Array
    problem: AttentionProblem
    exact: bool


def spans(start: int, stop: int, leaf: int) -> Iterator[tuple[int, int, int]]:
    """Yield the nodes of the tree over tokens in preorder as (start, middle, stop).

    The queries of middle..stop meet the keys of start..middle; a leaf has middle = start.

    Examples
    --------
    >>> list(spans(0, 5, 2))
    [(0, 2, 5), (0, 0, 2), (2, 3, 5), (2, 2, 3), (3, 3, 5)]
    """
    if stop - start <= leaf:
        yield start, start, stop
        return
    middle = start + (stop - start) // 2
    yield start, middle, stop
    yield from spans(start, middle, leaf)
    yield from spans(middle, stop, leaf)


@register("causal_tree")
class CausalTree(Method):
    """Make causal attention of a method that is not: exact near the diagonal, halves below it.

    ``rec(a, z)`` of more than ``leaf`` tokens with the middle h: the rows a..h are ``rec(a, h)``,
    the rows h..z merge ``rec(h, z)`` with the inner method of the queries h..z and the keys a..h,
    which all of them see.  With the normalisers l1 and l2, ``l = ln(e^{l1} + e^{l2})``, the merger
    is ``e^{l1 - l} o1 + e^{l2 - l} o2``.

    Parameters
    ----------
    rank : int
        Budget of the inner method in each block, in 1..n_k; at most the keys of the block.
    inner : str or Method, default "wildcat"
        A method whose ``traits.logsumexp`` is True: a name, with its defaults, or an object with
        parameters of its own, whose rank, if it has one, is replaced by ``rank``.
    leaf : int, default 256
        Tokens up to which a part is exact; at least 1.

    Raises
    ------
    TypeError, ValueError
        For values out of range, and an inner method without a normaliser or for square problems
        only.

    Notes
    -----
    Exact where ``leaf >= n_q``, and ``path`` says so.  With more keys than queries the keys before
    the first query are one block more, and so are queries after the last key, which see all keys.
    Masked keys are deleted from each block.  Problems without a causal mask are one block: the
    inner method itself.

    The draw has the arrays of the inner method once a block, with its tokens in the name:
    "columns[0:512]" for the top of 512 keys, "columns[prefix]" for the block of keys before the
    first query, "columns[suffix]" for that of the queries after the last key.  Each block has a
    stream of its own.

    Traits are those of the inner method: no row depends on later tokens, queries among them, if
    the inner method computes a row from its own query and the keys alone (``autoregressive``).

    Depth ``log2(n/leaf)``; a row reads about ``rank log2(n/leaf)/2 + leaf/2`` keys.

    Examples
    --------
    >>> import sketchattn as sa
    >>> q, k, v = sa.make_heads("gaussian", n=16, d=4, rng=0)[0]
    >>> problem = sa.AttentionProblem(q, k, v, causal=True)
    >>> sa.CausalTree(rank=4).approximate(problem).path
    'exact'
    >>> method = sa.CausalTree(rank=2, inner="uniform", leaf=4)
    >>> list(method.draw(problem, rng=0))
    ['columns[0:16]', 'columns[0:8]', 'columns[8:16]']
    >>> method.attend(problem, rng=0).shape
    (16, 4)
    """

    def __init__(self, rank: int, inner: str | Method = "wildcat", leaf: int = 256) -> None:
        self.rank = rank
        self.inner = inner
        self.leaf = leaf

    @property
    def method(self) -> Method:
        """The inner method as an object, at ``rank`` where it has one."""
        return inner_method(self.inner, self.rank)

    @property
    def traits(self) -> Traits:
        """Those of the inner method, and causal."""
        return replace(
            self.method.traits,
            causal=True,
            key_mask=True,
            rectangular=True,
            claims=CLAIMS,
            uses_rank=True,
            differentiable=False,
            logsumexp=True,
            causal_form=True,
            decoding=False,
        )

    # --- arguments --------------------------------------------------------------------------

    def check(self, problem: AttentionProblem) -> None:
        """Refuse a problem that this method cannot honour, or hyper-parameters out of range."""
        super().check(problem)
        for node in self._nodes(problem):
            if not node.exact:
                self._at(node).check(node.problem)

    def _check_parameters(self) -> None:
        check_count(self.leaf, "leaf", "give the tokens up to which a part is exact")
        inner = self.method.traits
        if not inner.logsumexp:
            raise ValueError(
                f"inner must know the normaliser of its rows, got {self.inner!r}; use a method "
                f"whose traits.logsumexp is True"
            )
        if not inner.rectangular:
            raise ValueError(
                f"inner must take n_q != n_k, got {self.inner!r}; use a method whose "
                f"traits.rectangular is True"
            )

    # --- the tree ---------------------------------------------------------------------------

    def _nodes(self, problem: AttentionProblem) -> list[Node]:
        """Return the blocks with keys in preorder, the keys before the first query first."""
        leaf = int(self.leaf)
        return problem.cached(("causal_tree", leaf), lambda: list(_blocks(problem, leaf)))

    def _at(self, node: Node) -> Method:
        return inner_method(self.inner, min(int(self.rank), len(node.keys)))

    # --- draws ------------------------------------------------------------------------------

    def _draw(self, problem: AttentionProblem, rng: np.random.Generator) -> Draw:
        made = Draw()
        if not self.method.traits.randomized:
            return made
        nodes = [node for node in self._nodes(problem) if not node.exact]
        for node, stream in zip(nodes, streams(rng, len(nodes)), strict=True):
            drawn = self._at(node).draw(node.problem, stream)
            made.update({f"{name}{node.name}": x for name, x in drawn.items()})
        return made

    def _check_draw(self, problem: AttentionProblem, draw: Mapping[str, Any]) -> Draw:
        method = self.method
        wanted = method.draw_names if method.traits.randomized else ()
        nodes = [node for node in self._nodes(problem) if not node.exact]
        return check_draw(draw, tuple(f"{x}{node.name}" for node in nodes for x in wanted))

    def _call(self, node: Node, draw: Draw) -> tuple[Method, dict[str, Any]]:
        """Return the method of a node and its part of the draw, which that method checks."""
        if node.exact:
            return Exact(), {}
        method = self._at(node)
        names = method.draw_names if method.traits.randomized else ()
        return method, {"draw": {x: draw[f"{x}{node.name}"] for x in names}}

    # --- the approximation ------------------------------------------------------------------

    def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        parts, used = [], 0
        for node in self._nodes(problem):
            method, options = self._call(node, draw)
            ahat = method.approximate(node.problem, **options)
            _, lse = method.attend_with_lse(with_values(node.problem), **options)
            parts.append((node.rows, node.keys, ahat, lse))
            used = max(used, ahat.effective_rank or 0)
        return merged_blocks(problem, parts, used)

    def _attend_with_lse(self, problem: AttentionProblem, draw: Draw) -> tuple[Array, Array]:
        out = np.zeros((problem.n_q, problem.values.shape[1]), problem.dtype)
        lse = np.full(problem.n_q, -np.inf)
        for node in self._nodes(problem):
            method, options = self._call(node, draw)
            merge_into(out, lse, node.rows, *method.attend_with_lse(node.problem, **options))
        return out, lse.astype(problem.dtype)


def _blocks(problem: AttentionProblem, leaf: int) -> Iterator[Node]:
    """Yield the blocks of a problem that have queries and keys."""
    everything = problem.kept_keys
    if not problem.causal:
        if problem.n_q and len(everything):
            rows = slice(0, problem.n_q)
            yield Node("", rows, everything, part_of(problem, rows, everything, False), False)
        return
    offset = problem.offset
    # Tokens have a query and a key: those before the first are keys alone, which all queries see,
    # or queries alone, which see nothing; those after the last are the other way round.
    first, last = max(offset, 0), min(problem.n_k, problem.n_q + offset)
    for name, rows, keys in (
        ("[prefix]", slice(max(-offset, 0), last - offset), everything[everything < offset]),
        ("[suffix]", slice(max(last, 0) - offset, problem.n_q), everything),
    ):
        if rows.start < rows.stop and len(keys):
            yield Node(name, rows, keys, part_of(problem, rows, keys, False), False)
    for start, middle, stop in spans(first, last, leaf) if first < last else ():
        exact = middle == start
        low, high = np.searchsorted(everything, (start, stop if exact else middle))
        keys = everything[low:high]
        rows = slice(middle - offset, stop - offset)
        if not len(keys):
            continue
        # Masked keys of a leaf stay, since positions decide what its rows see.
        columns = np.arange(start, stop) if exact else keys
        name = f"[{start}:{stop}]"
        yield Node(name, rows, columns, part_of(problem, rows, columns, exact), exact)


def part_of(
    problem: AttentionProblem, rows: slice, keys: Array, causal: Causal
) -> AttentionProblem:
    """Return the problem of some queries and keys."""
    q, k, v = problem.arrays
    mask = None if problem.key_mask is None else problem.key_mask[keys]
    chosen: Any = slice(keys[0], keys[-1] + 1) if len(keys) == keys[-1] + 1 - keys[0] else keys
    values = [] if v is None else [v[chosen]]
    if mask is None or mask.all():
        return AttentionProblem.adopt(
            q[rows], k[chosen], *values, scale=problem.scale, causal=causal
        )
    return AttentionProblem(
        q[rows], k[chosen], *values, scale=problem.scale, causal=causal, key_mask=mask
    )


def with_values(problem: AttentionProblem) -> AttentionProblem:
    """Return a problem with values, which do not change its normalisers."""
    if problem.arrays.v is not None:
        return problem
    q, k, _ = problem.arrays
    v = np.zeros((problem.n_k, 1), problem.dtype)
    return AttentionProblem(
        q, k, v, scale=problem.scale, causal=problem.causal, key_mask=problem.key_mask
    )
