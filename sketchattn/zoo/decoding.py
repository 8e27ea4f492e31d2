"""What a method holds of a decoder's keys and values, to which new ones are appended."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..base.arguments import as_array, check_finite, check_logits, float_dtype, prepare
from ..base.quiet import quiet
from ..kernels._threads import PRODUCT, deal_without_blas, product
from ..kernels.decoding import exact_rows
from ..kernels.softmax import LOG2E
from ..operators.solve import row_softmax
from ..operators.steep import is_harmless
from ..problem import AttentionProblem

Array = NDArray[Any]

# Rows of which there is room at first, at least.
ROOM = 16
# Entries of few rows, and squares of norms to which no entry has underflowed.
FEW, TINY = 4096, 1e-30


def with_room(x: Array, count: int, axis: int = 0) -> Array:
    """Return an array with room for ``count`` entries of an axis: itself, or twice as long a copy.

    New entries are zero.
    """
    before = x.shape[axis]
    if count <= before:
        return x
    shape = list(x.shape)
    shape[axis] = max(count, 2 * before, ROOM)
    grown = np.zeros(shape, x.dtype)
    grown[(slice(None),) * axis + (slice(before),)] = x
    return grown


def reach_of(x: Array, name: str) -> float:
    """Return a bound of ``|x|`` by entries; refuse what is not finite.

    The norm of a row is found in one call; the largest entry takes ten microseconds.
    """
    if x.size <= FEW:
        square = float(np.vdot(x, x))
        if TINY < square < math.inf:
            return math.sqrt(square)
    return check_finite(x, name)


class DecodingState(ABC):
    """Hold the keys and values of one head as a decoder appends them; `Method.state` makes it.

    What a KV cache holds of one key head.  `append` adds what the model computed for the next
    positions, `attend` gives the rows of the newest ones.  A state is copied by ``copy.deepcopy``,
    for the beams of a search, and pickled.

    Parameters
    ----------
    problem : AttentionProblem
        The prompt, causal and with values; of its queries only the width counts.

    Attributes
    ----------
    scale : float
        Factor of the logits, that of the prompt.
    d, d_v : int
        Widths of keys and values.
    dtype : numpy.dtype
        Precision, that of the prompt.

    Examples
    --------
    >>> import numpy as np, sketchattn as sa
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 12, 4))
    >>> state = sa.Exact().state(sa.AttentionProblem(q[:10], k[:10], v[:10], causal=True))
    >>> for i in (10, 11):
    ...     state.append(k[i], v[i])
    ...     row = state.attend(q[i])
    >>> len(state), bool(np.allclose(row, sa.AttentionProblem(q, k, v, causal=True).output[11]))
    (12, True)
    """

    def __init__(self, problem: AttentionProblem) -> None:
        values = problem.values
        self.scale, self.dtype = problem.scale, problem.dtype
        self.d, self.d_v = problem.d, values.shape[1]
        self._keys = np.zeros((0, self.d), self.dtype)
        self._values = np.zeros((0, self.d_v), self.dtype)
        self._held = 0
        self._positions = problem.n_k
        # How many keys of the prompt are kept before each position, where some are not.
        mask = problem.key_mask
        self._before = None if mask is None else np.concatenate([[0], np.cumsum(mask)])
        self._largest = 0.0
        kept = problem.kept_keys
        if len(kept):
            all_ = len(kept) == problem.n_k
            k, v = (x if all_ else np.ascontiguousarray(x[kept]) for x in (problem.k, values))
            self._largest = check_finite(k, "k")
            self._hold(k, v)

    def __len__(self) -> int:
        """Return the number of positions, removed keys of the prompt counted."""
        return self._positions

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self)} positions, d={self.d}, d_v={self.d_v}, "
            f"dtype={self.dtype}, scale={self.scale:.6g})"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, with the room for keys to come: at most twice what is held."""
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, np.ndarray))

    def append(self, k: ArrayLike, v: ArrayLike) -> None:
        """Add the keys and values of the next position, or of several.

        Parameters
        ----------
        k : array (d,) or (t, d)
            Finite, of the precision of the state; float16 and bfloat16 become float32.
        v : array (d_v,) or (t, d_v)

        Raises
        ------
        TypeError, ValueError
            For other shapes or precisions, and for what is not finite; nothing is added then.
        """
        keys, values = self._given(k, "k", self.d, 2), self._given(v, "v", self.d_v, 2)
        if keys.shape[:-1] != values.shape[:-1]:
            raise ValueError(
                f"v must have one row for each key, got k of shape {keys.shape} and v of "
                f"{values.shape}; append both of the same positions"
            )
        most = reach_of(keys, "k")
        reach_of(values, "v")
        keys, values = keys.reshape(-1, self.d), values.reshape(-1, self.d_v)
        self._hold(keys, values)
        self._largest = max(self._largest, most)
        self._positions += len(keys)

    def attend(self, q: ArrayLike) -> Array:
        """Return the output of the newest positions: the last rows of the causal output.

        Parameters
        ----------
        q : array (d,), (t, d) or (..., t, d)
            Queries of the last position, or of the last t, whose keys have been appended: row i of
            t sees all keys but those of the last ``t - 1 - i`` positions.  Axes in front are query
            heads that share these keys: ``q[:, None]`` of (g, d) are those of one position.

        Returns
        -------
        ndarray (d_v,), (t, d_v) or (..., t, d_v)
            Zero for a row that sees no key.

        Raises
        ------
        TypeError, ValueError
            For other shapes or precisions, more rows than positions, what is not finite, and
            logits beyond the precision.
        """
        given = self._given(q, "q", self.d, None)
        most = reach_of(given, "q")
        lead, t = given.shape[:-1], given.shape[-2] if given.ndim > 1 else 1
        if t > self._positions:
            raise ValueError(
                f"q must have at most one row for each of the {self._positions} positions, got "
                f"{t}; append the keys first"
            )
        rows = given.reshape(-1, self.d)
        out = np.empty((len(rows), self.d_v), self.dtype)
        if len(rows):
            self._attend(rows, self._stops(t, len(rows)), most * self._largest, out)
        return out.reshape((*lead, self.d_v))

    def _given(self, x: ArrayLike, name: str, width: int, most: int | None) -> Array:
        """Return an array of an argument, in the precision of the state, its shape checked."""
        made = as_array(x, name)
        if made.dtype != self.dtype and float_dtype(made, name) != self.dtype:
            raise TypeError(
                f"{name} must have the precision of the state, {self.dtype}, got {made.dtype}; "
                f"convert it with astype"
            )
        if made.ndim < 1 or made.shape[-1] != width or (most is not None and made.ndim > most):
            wanted = f"({width},) or (t, {width})"
            if most is None:
                wanted = f"({width},), (t, {width}) or (..., t, {width})"
            raise ValueError(
                f"{name} must have shape {wanted}, got {made.shape}; a state is of one key head"
            )
        ready = made.dtype == self.dtype and made.flags.carray
        return made if ready else prepare(made, self.dtype)

    def _stops(self, t: int, rows: int) -> Array:
        """Return how many kept keys each row sees, for heads of t rows."""
        low = self._positions - t + 1
        if t == 1 and (self._before is None or low >= len(self._before)):
            return np.full(rows, self._held)
        seen = np.arange(low, self._positions + 1)
        if self._before is not None:
            prompt = len(self._before) - 1
            seen = self._before[np.minimum(seen, prompt)] + np.maximum(seen - prompt, 0)
        return np.tile(seen, rows // t)

    @abstractmethod
    def _hold(self, k: Array, v: Array) -> None:
        """Add kept keys (t, d) and values (t, d_v), which are checked, and may be read-only."""

    @abstractmethod
    def _attend(self, q: Array, stops: Array, most: float, out: Array) -> None:
        """Write the rows ``out (m, d_v)`` of ``q (m, d)``, which see ``stops (m,)`` keys.

        ``most`` is the product of the largest entries of q and k.
        """

    def _store(self, k: Array, v: Array) -> None:
        """Write keys and values behind those that are held."""
        n, total = self._held, self._held + len(k)
        self._keys, self._values = with_room(self._keys, total), with_room(self._values, total)
        self._keys[n:total], self._values[n:total] = k, v
        self._held = total

    def _wide_logits(self, q: Array, stops: Array, place: Array) -> Iterator[tuple[int, Array]]:
        """Yield the rows and their logits in float64, -inf for keys whose place is too late.

        Raises ValueError for a row with logits that overflow the precision, in base 2.
        """
        k, most = self._keys[: self._held].astype(np.float64), float(np.finfo(self.dtype).max) / 2
        for i, row in enumerate(q.astype(np.float64)):
            logits = self.scale * product(k, row)
            seen = place < stops[i]
            if not np.abs(logits[seen]).max(initial=0.0) <= most:
                found = np.zeros(len(q), self.dtype)
                found[i] = np.nan
                check_logits(found)
            logits[~seen] = -np.inf
            yield i, logits

    def _work(self, keys: float) -> float:
        """Return the work of rows that read so many keys, as `deal` counts it."""
        a_key: float = 0.5 + 4 * PRODUCT * (self.d + self.d_v)
        return keys * a_key


class ExactState(DecodingState):
    """Hold keys and values for exact rows; each reads all of them.

    Rows whose logits may be large are computed in float64.
    """

    def _hold(self, k: Array, v: Array) -> None:
        self._store(k, v)

    def _attend(self, q: Array, stops: Array, most: float, out: Array) -> None:
        if is_harmless(self.scale, self.d, 1.0, most):
            work = self._work(float(stops.sum()))
            factor = float(self.scale * LOG2E)
            deal_without_blas(
                exact_rows, q, stops, self._keys, self._values, factor, out, work=work
            )
            return
        values = self._values[: self._held].astype(np.float64)
        for i, logits in self._wide_logits(q, stops, np.arange(self._held)):
            out[i] = product(row_softmax(logits[None]), values)[0]


quiet(DecodingState)
