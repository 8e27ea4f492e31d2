"""How hard a head is to approximate."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.floating import without_floating_errors
from ..base.words import Phrase, Worded, number, shown
from ..kernels._threads import product
from ..operators.steep import steep_rows, tiles_of
from ..problem import AttentionProblem

Array = NDArray[Any]

# Singular values that a report keeps.
_LEADING = 16
# Entries of a block of rows: 8 MB in float64.
_BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True, repr=False)
class HardnessReport(Worded):
    """Say what makes a problem easy or hard to approximate.

    Hidden entries, rows that see no key and keys that no row sees do not count.

    Attributes
    ----------
    name : str or None
        Of the problem.
    rows, keys : int
        Queries that see a key, and keys that a query sees.
    perplexity_median, perplexity_mean, perplexity_min, perplexity_max : float
        Of ``exp(H_i)`` over rows, ``H_i = -sum_j A_ij log A_ij``: the number of keys that a row
        attends to, 1 to ``keys``.  The mean is the geometric one, exp of the mean entropy.
    frobenius_norm, spectral_norm : float
        ``|A|_F`` and ``|A|_2``.
    stable_rank : float
        ``|A|_F^2 / |A|_2^2``.
    max_column_norm : float
        ``max_j |A e_j|_2``.
    alpha : float
        ``keys * max_j |A e_j|_2^2``.
    log_kappa, kappa : float
        ``kappa = max_i / min_i`` of the row sums of ``exp(L)``, and its natural logarithm; kappa
        is inf where it exceeds float64.
    max_logit : float
        ``max |L_ij|``.
    rank_90, rank_99 : int or None
        Smallest r such that the r largest singular values hold 90 or 99 % of ``|A|_F^2``; None
        for matrices that are too large for all singular values.
    singular_values : tuple of float or None
        The largest ones, at most 16; None like the ranks.

    Notes
    -----
    alpha and kappa are the quantities that HyperAttention (arXiv 2310.05869) assumes to be
    ``n^o(1)``.
    """

    name: str | None
    rows: int
    keys: int
    perplexity_median: float
    perplexity_mean: float
    perplexity_min: float
    perplexity_max: float
    frobenius_norm: float
    spectral_norm: float
    stable_rank: float
    max_column_norm: float
    alpha: float
    log_kappa: float
    kappa: float
    max_logit: float
    rank_90: int | None
    rank_99: int | None
    singular_values: tuple[float, ...] | None

    _brief = ("perplexity_median", "rank_90", "stable_rank")

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary of numbers, in their order."""
        return dataclasses.asdict(self)

    def _title(self) -> str:
        return f"how hard {self.name or 'a head'} is: {self.rows} queries, {self.keys} keys"

    def _phrases(self) -> list[Phrase]:
        kappa = f"e^{number(self.log_kappa)}"
        known = [
            Phrase("perplexity_median", number(self.perplexity_median), "keys that a row uses"),
            Phrase("perplexity_min", number(self.perplexity_min), "the row that uses the fewest"),
            Phrase("perplexity_max", number(self.perplexity_max), "the row that uses the most"),
            Phrase("rank_90", shown(self.rank_90), "rank that holds 90 % of |A|_F^2"),
            Phrase("rank_99", shown(self.rank_99), "and 99 %"),
            Phrase("stable_rank", number(self.stable_rank), "|A|_F^2 / |A|_2^2"),
            Phrase("alpha", number(self.alpha), "keys times the largest squared column norm"),
            Phrase("kappa", kappa, "largest over smallest row sum of exp(L)"),
            Phrase("max_logit", number(self.max_logit), "the largest |L_ij|"),
        ]
        return [x for x in known if x.value != "-"]


@without_floating_errors
def describe(problem: AttentionProblem) -> HardnessReport:
    """Measure how hard a problem is to approximate.

    Parameters
    ----------
    problem : AttentionProblem
        With at least one visible entry; values are not needed.

    Returns
    -------
    HardnessReport
        Computed in float64.

    Raises
    ------
    TypeError
        For anything that is not a problem.
    ValueError
        For a problem in which no query sees a key.

    Notes
    -----
    Rows are streamed in blocks, ``O(n_q n_k d)``; all singular values only up to
    ``n_q n_k = 2048^2``, the norm ``|A|_2`` above from products with A.

    Examples
    --------
    >>> import numpy as np, sketchattn as sa
    >>> report = sa.describe(sa.AttentionProblem(np.zeros((4, 2)), np.zeros((8, 2))))
    >>> round(report.perplexity_median, 6), round(report.stable_rank, 6), report.max_logit
    (8.0, 1.0, 0.0)
    """
    from ..operators.spectra import DENSE_LIMIT, exact_spectral_norm, singular_values

    if not isinstance(problem, AttentionProblem):
        raise TypeError(
            f"problem must be an AttentionProblem, got {type(problem).__name__}; "
            f"take one of the heads, such as heads[0]"
        )
    counts = problem.visible_counts()
    if not counts.any():
        raise ValueError(
            f"problem must have a visible entry, got none in {problem.n_q} queries and "
            f"{problem.n_k} keys; unmask some keys"
        )
    keys = len(_seen_keys(problem))
    entropy, max_logit = _stream_rows(problem, np.flatnonzero(counts))
    exact = problem.exact
    frobenius = exact.frobenius_norm()
    column = float(exact.column_norms().max())
    lse = problem.astype(np.float64).logsumexp[counts > 0]
    log_kappa = float(lse.max() - lse.min())
    leading: tuple[float, ...] | None = None
    ranks: list[int] | list[None] = [None, None]
    if problem.n_q * problem.n_k <= DENSE_LIMIT**2 and min(problem.n_q, problem.n_k) <= DENSE_LIMIT:
        sigma = singular_values(problem)
        energy = np.cumsum(sigma**2)
        ranks = [int(np.searchsorted(energy, share * energy[-1])) + 1 for share in (0.9, 0.99)]
        leading = tuple(sigma[:_LEADING].tolist())
        spectral = leading[0]
    else:
        spectral = exact_spectral_norm(problem)
    return HardnessReport(
        name=problem.name,
        rows=int(np.count_nonzero(counts)),
        keys=keys,
        perplexity_median=float(np.median(np.exp(entropy))),
        perplexity_mean=math.exp(entropy.mean()),
        perplexity_min=math.exp(entropy.min()),
        perplexity_max=math.exp(entropy.max()),
        frobenius_norm=frobenius,
        spectral_norm=spectral,
        stable_rank=(frobenius / spectral) ** 2,
        max_column_norm=column,
        alpha=keys * column**2,
        log_kappa=log_kappa,
        kappa=float(np.exp(log_kappa)) if log_kappa < 709 else math.inf,
        max_logit=max_logit,
        rank_90=ranks[0],
        rank_99=ranks[1],
        singular_values=leading,
    )


def _seen_keys(problem: AttentionProblem) -> Array:
    """Return the keys that some query sees: with causal order, those before the last query."""
    kept = problem.kept_keys
    return kept[kept < problem.n_q + problem.offset] if problem.causal else kept


def _stream_rows(problem: AttentionProblem, rows: Array) -> tuple[Array, float]:
    """Return the entropies of some rows that see a key, and ``max |L_ij|`` over all they see.

    ``H_i = sum_j exp(-g_ij) g_ij`` with ``g_ij = lse_i - L_ij = -log A_ij``, a sum without
    cancellation.  Rows that are steep take the gap from their largest logit, so that a large one
    is in no sum.
    """
    wide = problem.astype(np.float64)
    hides = problem.key_mask is not None or bool(problem.causal)
    entropy = np.empty(len(rows))
    top = 0.0
    is_steep = np.isin(rows, steep_rows(wide))
    places = np.flatnonzero(is_steep)
    for positions, logits in tiles_of(wide, rows[is_steep]):
        seen = logits > -np.inf
        top = max(top, float(np.abs(logits, where=seen, out=np.zeros_like(logits)).max()))
        gap = logits.max(axis=1, keepdims=True) - logits
        gap += np.log(np.exp(-gap).sum(axis=1, keepdims=True))
        entropy[places[positions]] = _entropies(gap, seen)
    places = np.flatnonzero(~is_steep)
    block = max(_BLOCK // problem.n_k, 1)
    for start in range(0, len(places), block):
        pick = rows[places[start : start + block]]
        logits = product(wide.scale * wide.q[pick], wide.k.T)
        shown = problem.visible(pick) if hides else None
        if shown is not None:
            logits[~shown] = 0.0
        top = max(top, float(logits.max()), -float(logits.min()))
        gap = np.subtract(wide.logsumexp[pick][:, None], logits, out=logits)
        entropy[places[start : start + block]] = _entropies(gap, shown)
    return entropy, top


def _entropies(gap: Array, seen: Array | None) -> Array:
    """Return ``sum_j exp(-g_ij) g_ij`` over the keys that are seen; changes the gaps."""
    if seen is not None:  # hidden logits may be above all that a row sees
        gap[~seen] = 0.0
    weights = np.exp(-gap)
    if seen is not None:
        weights[~seen] = 0.0
    # Rounding can leave an entropy of -1e-16 where one key has all the mass.
    return np.asarray(np.maximum(np.einsum("ij,ij->i", weights, gap), 0.0))
