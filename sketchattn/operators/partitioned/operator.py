"""The operator of structured attention, direct keys and region summaries, and mixtures of it.

A row of ``Ahat`` is ``exp(L_ij) / Zhat_i`` on its direct keys and ``rho_i(t) lam_t(j)`` on region
t, ``rho_i(t) = exp(g_i(t)) / Zhat_i``.  Four layouts compute its products: spans or labels that
all rows share, a dyadic tree, lines of a grid, and any explicit plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...base.arguments import check_logits
from ...base.head import Head
from ...partitions.plans import Plan
from ..base import AttentionOperator, Index, pick
from ..steep import is_steep
from .explicit import Explicit
from .layouts import CHUNK_SLOTS, Layout, weights_of
from .passes import LOG2E, Data
from .summaries import Reference, Rule, Summaries, is_variational

Array = NDArray[Any]


class PartitionedAttention(AttentionOperator):
    """Represent ``Ahat`` by direct keys and shared region summaries under one softmax.

    ``Ahat_ij = exp(L_ij) / Zhat_i`` for direct keys j of row i, and ``rho_i(t) lam_t(j)`` for j in
    a region t of the row, ``rho_i(t) = exp(g_i(t)) / Zhat_i``,
    ``Zhat_i = sum_j exp(L_ij) + sum_t exp(g_i(t))``, ``g_i(t) = scale q_i . kappa_t + b_t``.

    Parameters
    ----------
    problem : AttentionProblem
    layout : Plan or Layout
        Which keys are direct and which regions a row has.  Keys that the problem masks must not
        be in it: see `Plan.keep`.
    reference : Reference or array (d,) or (r, d), optional
        Reference queries of the regions; zeros by default.
    rule : Rule
        Region key, bias and second-order term.
    effective_rank : int, optional
    lower_bound, bilinear, causal_safe : bool, optional
        What is known of the choices; see the attributes.
    remake : callable, optional
        Returns the same operator in float64.
    summaries : Summaries, optional
        What ``layout.summarize`` gave for these regions; computed by default.

    Attributes
    ----------
    summaries : Summaries
        Region keys, biases, entropies.
    reference : Reference
    lower_bound : bool
        ``Zhat_i <= Z_i``, and ``KL(Ahat_i || A_i) = log Z_i - log Zhat_i``.
    bilinear : bool
        The log-ratio error is ``scale (q_i - q0_t) . (kappa_t - k_j)``.
    causal_safe : bool
        No row depends on later positions.

    Notes
    -----
    Weights are recomputed in every product: nothing of the size of the slots is held, except for
    explicit plans.

    Examples
    --------
    >>> import numpy as np, sketchattn as sa
    >>> from sketchattn.partitions.patterns import make_plan
    >>> problem = sa.make_heads("gaussian", n=12, d=4, rng=0)[0]
    >>> ahat = sa.PartitionedAttention(problem, make_plan("fixed", 12, block=4))
    >>> ahat.summaries.kappa.shape, bool(abs(ahat.row_sums() - 1).max() < 1e-6)
    ((3, 4), True)
    >>> bool((ahat.log_normalizer <= problem.logsumexp + 1e-5).all())
    True
    """

    def __init__(
        self,
        problem: Head,
        layout: Plan | Layout,
        reference: Reference | Array | None = None,
        rule: Rule = Rule(),  # noqa: B008  (a tuple: immutable)
        effective_rank: int | None = None,
        *,
        lower_bound: bool | None = None,
        bilinear: bool | None = None,
        causal_safe: bool | None = None,
        remake: Callable[[], AttentionOperator] | None = None,
        summaries: Summaries | None = None,
    ) -> None:
        super().__init__((problem.n_q, problem.n_k), problem.dtype, effective_rank)
        self.layout = Explicit(layout) if isinstance(layout, Plan) else layout
        if reference is None:
            reference = np.zeros(problem.d)
        if not isinstance(reference, Reference):
            reference = Reference("given", np.atleast_2d(np.asarray(reference, np.float64)))
        if reference.q0 is not None and reference.q0.shape not in (
            (1, problem.d),
            (len(self.layout.lo), problem.d),
        ):
            raise ValueError(
                f"reference must have shape (d,) = ({problem.d},) or (r, d) = "
                f"({len(self.layout.lo)}, {problem.d}), got {reference.q0.shape}; give one query "
                f"for each region"
            )
        self.problem, self.reference, self.rule = problem, reference, rule
        self.layout.dtype = problem.dtype
        if summaries is None:
            summaries = self.layout.summarize(problem, reference, rule)
        self.summaries = summaries
        exact_rule = is_variational(reference, rule)
        self.lower_bound = exact_rule if lower_bound is None else lower_bound
        self.bilinear = exact_rule if bilinear is None else bilinear
        self.causal_safe = (
            reference.kind != "given" or not np.any(reference.q0)
            if causal_safe is None
            else causal_safe
        )
        self._remake = remake
        self._lse: Array | None = None
        self._wide_lse: Array | None = None

    # --- what it is made of ---------------------------------------------------------------------

    @property
    def data(self) -> Data:
        """What kernels need."""
        q, k, _ = self.problem.arrays
        s = self.summaries
        wide = s.logit_keys.shape[1] > q.shape[1]
        f = np.concatenate([q, q * q], axis=1) if wide else q
        bits = s.logit_bias * self.problem.dtype.type(LOG2E)
        return Data(q, k, f, s.logit_keys, bits, self.problem.scale)

    @property
    def plan(self) -> Plan:
        """The plan with explicit lists, which are as large as there are slots.

        Region t is that of all other arrays; some may have no key, or no row that uses them.
        """
        return self.layout.plan()

    @property
    def q0(self) -> Array:
        """Reference query of each region, float64 (r, d)."""
        return self.layout.reference_queries(self.problem, self.reference)

    @property
    def local_weights(self) -> Any:
        """The local weights lam_t(j) as a sparse matrix (r, n_k)."""
        return self.layout.local_weights(np.arange(len(self.layout.lo)))

    @property
    def log_normalizer(self) -> Array:
        """Natural logarithm of ``Zhat_i`` (n_q,), -inf for a row without keys."""
        if self._lse is None:
            none = np.empty((self.shape[1], 0), self.dtype)
            regions = np.empty((len(self.layout.lo), 0), self.dtype)
            self._lse = self.layout.solve(self.data, none, regions)[1]
            check_logits(self._lse)
        return self._lse

    @property
    def direct_mass(self) -> Array:
        """What each row puts on its direct keys, (n_q,)."""
        return self._mass(1, 0)

    @property
    def far_mass(self) -> Array:
        """What each row puts on its regions, (n_q,)."""
        return self._mass(0, 1)

    def _mass(self, direct: int, far: int) -> Array:
        x = np.full((self.shape[1], 1), direct, self.dtype)
        xhat = np.full((len(self.layout.lo), 1), far, self.dtype)
        return self.layout.solve(self.data, x, xhat)[0][:, 0]

    def region_masses(self, index: Index | None = None) -> Any:
        """Return ``rho_i(t)`` of chosen rows (all by default), sparse (len(index), r)."""
        rows = pick(self.shape[0], slice(None) if index is None else index)
        return weights_of(self.layout, self.data, rows)[1]

    def region_values(self, x: Array) -> Array:
        """Return ``xhat_t = sum_j lam_t(j) x_j`` (r, m) of x (n_k, m)."""
        return self.layout.spread(self._cast(x))

    @property
    def rank_bound(self) -> int:
        """The number of regions where no key is direct, else the smaller dimension."""
        if self.layout.count_direct:
            return min(self.shape)
        return min(*self.shape, int(self.layout.nonempty.sum()))

    @property
    def nbytes(self) -> int:
        """Bytes of queries, keys, summaries and plan."""
        held = self.layout.nbytes + self.problem.q.nbytes + self.problem.k.nbytes
        s = self.summaries
        own = [s.kappa, s.bias, s.entropy, s.logit_bias]
        own += [] if s.logit_keys is s.kappa else [s.logit_keys]
        own += [] if s.variance is None else [s.variance]
        return held + sum(x.nbytes for x in own)

    def wide(self) -> AttentionOperator:
        """Return the operator of the same plan in float64."""
        if self.dtype == np.float64 or self._remake is None:
            return self
        return self._remake()

    def reads(self, problem: Head) -> Array:
        """Return how many direct keys and regions each row has."""
        found = np.empty(self.shape[0])
        for rows in self.layout.chunks():
            direct, regions = self.layout.slots(rows)
            found[rows] = direct.sizes + regions.sizes
        return found

    # --- products -------------------------------------------------------------------------------

    def _matmat(self, x: Array) -> Array:
        x = self._cast(x)
        if self.problem.key_mask is not None:
            x = np.where(self.problem.key_mask[:, None], x, self.dtype.type(0))
        out, self._lse = self.layout.solve(self.data, x, self.layout.spread(x))
        check_logits(self._lse)
        return out

    def _rmatmat(self, y: Array) -> Array:
        out, z = self._transposed(y, only_far=False)
        self.layout.gather(z, out)
        return out

    def _transposed(self, y: Array, *, only_far: bool) -> tuple[Array, Array]:
        """Return the parts of ``Ahat^T Y`` in keys and in regions.

        Logits less their normaliser have its rounding: both are in float64, and rows whose logits
        are too large for that are divided by their own sums.
        """
        if is_steep(self.problem):
            return self.layout.transposed_by_rows(self.data, self._cast(y), only_far=only_far)
        q, k, f, keys, bits = (np.asarray(x, np.float64) for x in self.data[:-1])
        data = Data(q, k, f, keys, bits, self.problem.scale)
        if self._wide_lse is None:
            none = (np.empty((n, 0)) for n in (self.shape[1], len(self.layout.lo)))
            self._wide_lse = self.layout.solve(data, *none)[1]
        wide = np.require(y, np.float64, ["C", "W", "A"])
        out, z = self.layout.transposed(data, wide, self._wide_lse, only_far=only_far)
        return out.astype(self.dtype, copy=False), z.astype(self.dtype, copy=False)

    def rows(self, index: Index) -> Array:
        """Return chosen rows as a dense array (len(index), n_k)."""
        chosen = pick(self.shape[0], index)
        out = np.zeros((len(chosen), self.shape[1]), self.dtype)
        step = max(1, CHUNK_SLOTS // max(self.layout.slot_bound, 1))
        for start in range(0, len(chosen), step):
            part = slice(start, start + step)
            mine, theirs, _ = weights_of(self.layout, self.data, chosen[part])
            used, where = np.unique(theirs.indices, return_inverse=True)
            theirs = type(theirs)(
                (theirs.data, where.reshape(-1), theirs.indptr), shape=(theirs.shape[0], len(used))
            )
            out[part] = (mine + theirs @ self.layout.local_weights(used)).toarray()
        return out

    def columns(self, index: Index) -> Array:
        """Return chosen columns as a dense array (n_q, len(index))."""
        chosen = pick(self.shape[1], index)
        unit = np.zeros((self.shape[1], len(chosen)), self.dtype)
        unit[chosen, np.arange(len(chosen))] = 1
        return self._matmat(unit)

    def far_sums(self, y: Array, rows: Array | None = None) -> Array:
        """Return ``sum_i rho_i(t) y_i`` (r, m) over all rows, or over some; y (n_q, m)."""
        if rows is not None:
            return np.asarray(self.region_masses(rows).T @ y[rows])
        return self._transposed(y, only_far=True)[1]


class MixtureAttention(AttentionOperator):
    """Represent a weighted average of matrices: ``Ahat = sum_c w_c Ahat^(c)``.

    Parameters
    ----------
    parts : sequence of AttentionOperator
        Of one shape and precision.
    weights : array (number of parts,)
        Non-negative, with sum 1.

    Examples
    --------
    >>> import numpy as np, sketchattn as sa
    >>> from sketchattn.operators.wrapped import DenseAttention
    >>> mix = MixtureAttention([DenseAttention(np.eye(2)), DenseAttention(np.ones((2, 2)) / 2)],
    ...                        np.array([0.5, 0.5]))
    >>> mix.to_dense().tolist()
    [[0.75, 0.25], [0.25, 0.75]]
    """

    # A mixture keeps neither identity of its components.
    lower_bound = bilinear = False

    def __init__(
        self,
        parts: Sequence[AttentionOperator],
        weights: Array,
        effective_rank: int | None = None,
    ) -> None:
        super().__init__(parts[0].shape, parts[0].dtype, effective_rank)
        self.parts = tuple(parts)
        self.weights = np.asarray(weights, self.dtype)
        self.causal_safe = all(bool(getattr(part, "causal_safe", False)) for part in parts)

    def reads(self, problem: Head) -> Array:
        """Return the sum over the parts."""
        found = np.zeros(self.shape[0])
        for part in self.parts:
            found += part.reads(problem)
        return found

    def _sum(self, products: list[Array]) -> Array:
        out = self.weights[0] * products[0]
        for w, x in zip(self.weights[1:], products[1:], strict=True):
            out += w * x
        return np.asarray(out)

    def _matmat(self, x: Array) -> Array:
        return self._sum([part @ x for part in self.parts])

    def _rmatmat(self, y: Array) -> Array:
        return self._sum([part.T @ y for part in self.parts])

    def rows(self, index: Index) -> Array:
        """Return chosen rows as a dense array (len(index), n_k)."""
        return self._sum([part.rows(index) for part in self.parts])

    @property
    def rank_bound(self) -> int:
        """The sum of the bounds, at most the smaller dimension."""
        return int(min(*self.shape, sum(part.rank_bound for part in self.parts)))

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    def wide(self) -> AttentionOperator:
        """Return the average of the parts in float64."""
        if self.dtype == np.float64:
            return self
        parts = [part.wide() for part in self.parts]
        return MixtureAttention(parts, self.weights.astype(np.float64), self.effective_rank)
