"""Sketching and sampling: the bounds as plain functions, and the claims made of them.

The product ``A V`` is approximated by ``A S^T S V`` with a random ``S`` (r, n) and
``E[S^T S] = I``.  For every operator that the library draws the mean square error is known
exactly (``amm_expected_sqerr``); around these equalities stand the published and derived bounds:
Johnson-Lindenstrauss dimensions (``jl_*``), subspace embeddings (``ose_*``), approximate matrix
multiplication (``amm_*``), randomized SVD (``rsvd_*``) and norm estimates after the fact.

In statements about norms and subspaces ``eps`` refers to SQUARED norms,
``| |Sx|^2 - |x|^2 | <= eps |x|^2``; functions about the singular values themselves end in
``_sv``.  Dimensions are rounded up.  Functions broadcast over numbers and arrays and give a
number for numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._embeddings import inner_product_min_dim as inner_product_min_dim
from ._embeddings import inner_product_tail as inner_product_tail
from ._embeddings import jl_min_dim as jl_min_dim
from ._embeddings import jl_min_dim_achlioptas as jl_min_dim_achlioptas
from ._embeddings import jl_min_dim_chebyshev as jl_min_dim_chebyshev
from ._embeddings import jl_min_dim_dg as jl_min_dim_dg
from ._embeddings import jl_min_dim_exact_gaussian as jl_min_dim_exact_gaussian
from ._embeddings import jl_sparse_chebyshev as jl_sparse_chebyshev
from ._embeddings import jl_tail_gaussian as jl_tail_gaussian
from ._embeddings import ose_countsketch as ose_countsketch
from ._embeddings import ose_gaussian as ose_gaussian
from ._embeddings import ose_gaussian_sv as ose_gaussian_sv
from ._embeddings import ose_leverage as ose_leverage
from ._embeddings import ose_sjlt as ose_sjlt
from ._embeddings import ose_srht as ose_srht
from ._embeddings import ose_uniform as ose_uniform
from ._engine import Assumption, Context, Observations, Series, claim
from ._instances import Instance
from ._lowrank import eckart_young_floor as eckart_young_floor
from ._lowrank import hutchinson_fro as hutchinson_fro
from ._lowrank import hutchinson_min_dim as hutchinson_min_dim
from ._lowrank import hutchinson_tail as hutchinson_tail
from ._lowrank import known_spectrum as known_spectrum
from ._lowrank import posterior_factor as posterior_factor
from ._lowrank import posterior_spectral_bound as posterior_spectral_bound
from ._lowrank import power_lower_bound as power_lower_bound
from ._lowrank import rsvd_expected as rsvd_expected
from ._lowrank import rsvd_tail as rsvd_tail
from ._moments import AmmStats as AmmStats
from ._moments import amm_expected_sqerr as amm_expected_sqerr
from ._moments import amm_stats as amm_stats
from ._moments import gumbel_moment, square_norms
from ._products import amm_entrywise_min_dim as amm_entrywise_min_dim
from ._products import amm_fro_markov as amm_fro_markov
from ._products import amm_fro_sampling_tail as amm_fro_sampling_tail
from ._products import amm_gaussian_tail as amm_gaussian_tail
from ._products import amm_spectral_bernstein as amm_spectral_bernstein
from ._products import amm_spectral_expected as amm_spectral_expected
from ._products import amm_spectral_min_dim as amm_spectral_min_dim

Array = NDArray[Any]
Parameters = Mapping[str, Any]

NLALIB = "NLAlib (Lean library tchen-research/NLAlib)"
HMT = "Halko, Martinsson and Tropp, SIAM Review 53 (2011)"
DERIVED = "derived: see the chapter on sketching"

# Probes of every operator: the vector of ones, which sees missing signs, and Gaussian ones.
PROBES = 4

# --- assumptions ----------------------------------------------------------------------------


def _test_dense(instance: Instance) -> str | None:
    if instance.is_dense:
        return None
    return f"needs the dense matrix, at most 2^22 entries, got {instance.m} x {instance.n}"


def _test_values(instance: Instance) -> str | None:
    return None if instance.has_values else "needs values V"


def _test_product(instance: Instance) -> str | None:
    return None if instance.fro > 0 else "needs A and V that are not zero"


DENSE = Assumption("A is not empty and small enough to be formed", _test_dense)
VALUES = Assumption("there are values V", _test_values)
NONZERO = Assumption("neither A nor V is zero", _test_product)
PRODUCT = (DENSE, VALUES, NONZERO)


# --- random operators and their audit ---------------------------------------------------------


def _probes(n: int) -> Array:
    """Return the vector of ones and fixed Gaussian vectors, each of norm one, (n, 1 + PROBES)."""
    rng = np.random.default_rng(n)
    columns = np.concatenate([np.ones((n, 1)), rng.standard_normal((n, PROBES))], axis=1)
    out: Array = columns / np.linalg.norm(columns, axis=0)
    return out


def _applied(operator: Any, x: Array) -> Array:
    return np.asarray(operator.apply(x) if hasattr(operator, "apply") else operator @ x, np.float64)


def _sketched(
    context: Context, kind: str, r: int, x: Array, key: object, **parameters: Any
) -> Iterator[Array]:
    """Yield S X for one random S a trial, and audit ``E |S w|^2 = |w|^2`` on the way.

    X (n, c) is cached with the probes beside it under ``key``.
    """
    n, c = x.shape
    wide = context.instance.cached(
        ("wide", key), lambda: np.ascontiguousarray(np.concatenate([x, _probes(n)], axis=1))
    )
    for rng in context.generators():
        image = _applied(context.operator(kind, r, n, rng, **parameters), wide)
        ones, others = image[:, c], image[:, c + 1 :]
        context.audit("|S 1|^2/n", float(ones @ ones), 1.0)
        context.audit("|S w|^2/|w|^2", float(np.sum(others * others)) / PROBES, 1.0)
        context.fingerprint(float(np.sin(np.arange(1.0, len(image) + 1)) @ image[:, -1]))
        yield image[:, :c]


def _sampled(
    context: Context, kind: str, r: int, x: Array, key: object, law: Array
) -> Iterator[Array]:
    """Yield S X for one draw of columns a trial, and audit ``E |S w|^2 = 1`` for ``w^2 = p``.

    With replacement ``|S w|^2`` is exactly one; for other probes its law could be too heavy.
    """
    n, c = x.shape
    parameters = {} if kind == "sample_wor" else {"p": law}
    # The index beside the root of p tells draws of equal weight from each other.
    mark = np.sqrt(law) * np.cos(np.arange(n))
    wide = np.concatenate([x, np.sqrt(law)[:, None], mark[:, None]], axis=1)
    for rng in context.generators():
        image = _applied(context.operator(kind, r, n, rng, **parameters), wide)
        context.audit("sum_j w_j p_j", float(image[:, c] @ image[:, c]), 1.0)
        context.fingerprint(float(np.sin(np.arange(1.0, len(image) + 1)) @ image[:, c + 1]))
        yield image[:, :c]


def _law(instance: Instance, name: str) -> Array:
    from ..sampling import probabilities

    return instance.cached(("law", name), lambda: probabilities(name, (instance.a, instance.v)))


def _factors(instance: Instance) -> Array:
    """Return ``[A^T | V]`` (n, m + d_v)."""
    return instance.cached("factors", lambda: np.concatenate([instance.a.T, instance.v], axis=1))


def _errors(
    context: Context, kind: str, r: int, law: str | None = None, **parameters: Any
) -> Iterator[Array]:
    """Yield ``A S^T S V - A V`` for one random S a trial."""
    instance = context.instance
    x, m = _factors(instance), instance.m
    if kind.startswith("sample_"):
        images = _sampled(context, kind, r, x, "factors", _law(instance, law or "uniform"))
    else:
        images = _sketched(context, kind, r, x, "factors", **parameters)
    for image in images:
        yield image[:, :m].T @ image[:, m:] - instance.product


def _square(x: Array) -> float:
    return float(np.sum(x * x))


def _spectral(x: Array) -> float:
    return float(np.linalg.norm(x, 2)) if min(x.shape) > 1 else float(np.linalg.norm(x))


def _rank(context: Context, rank: int | None, most: int = 64, multiple: int = 1) -> int:
    """Return ``rank``, by default a quarter of the columns, at most ``most``."""
    if rank is not None:
        return rank
    r = max(1, min(most, context.instance.n // 4))
    return max(multiple, r - r % multiple)


def _relative_trivial(instance: Instance) -> float:
    """Return the error of the better trivial predictor over ``|A|_F |V|_F``."""
    return instance.trivial / instance.fro


# --- exact second moments -------------------------------------------------------------------

MOMENT_FORMULAS = {
    "gaussian": "(a + b)/r",
    "rademacher": "(a + b - 2c)/r",
    "uniform": "(a + b - 1.2 c)/r",
    "sparse": "(a + b + (s - 3) c)/r, s = 3",
    "countsketch": "(a + b - 2c)/r",
    "sjlt": "(a + b - 2c)/r, for every s (4)",
    "osnap": "(a + b - 2c)/r, for every s (4)",
    "less_uniform": ("(theta (a + 2b - 3c) + (n/t) c - b)/r with theta = n(t-1)/(t(n-1)), t = 4"),
    "srht": "((N-r)/(N-1)) (a + b - 2c)/r, N = 2^ceil(log2 n), distinct rows",
    "dct": (
        "((n-r)/(r(n-1))) ((1/n) sum_i [alpha_i beta_i + 2 Gam_i - 2 gam_i] - b) with "
        "w_ij = n C_ij^2, alpha_i = sum_j w_ij |A_:j|^2, beta_i = sum_j w_ij |V_j|^2, "
        "Gam_i = |A diag(w_i) V|_F^2, gam_i = sum_j w_ij^2 |A_:j|^2 |V_j|^2, distinct rows"
    ),
    "haar": "(n-r)(n a + (n-2) b)/(r(n-1)(n+2))",
}
# Parameters of the operators; s of the block sketches has to be at most r.
MOMENT_PARAMETERS: dict[str, dict[str, Any]] = {
    "sparse": {"s": 3.0},
    "sjlt": {"s": 4},
    "osnap": {"s": 4},
    "less_uniform": {"t": 4},
}
RANKS = tuple({"rank": r} for r in (8, 16, 32, 64))
SQUARE_ERROR = "|A S^T S V - A V|_F^2, absolute; mean over draws"


def _directions(m: int, d_v: int) -> tuple[Array, Array]:
    """Return fixed directions x (m, 8) and y (d_v, 8) that a bias would show along."""
    rng = np.random.default_rng([m, d_v])
    return rng.standard_normal((m, 8)), rng.standard_normal((d_v, 8))


def _moment(
    context: Context,
    kind: str,
    r: int,
    theory: float,
    *,
    law: str | None = None,
    error: float = 0.0,
    weights: Array | None = None,
    **parameters: Any,
) -> Observations:
    """Observe the square error of ``A S^T S V`` and its bias.

    With ``weights``, the probabilities of draws with replacement, the spread of one trial is
    known, and heavy tails cannot pass for a wrong mean.
    """
    instance = context.instance
    x, y = _directions(instance.m, instance.v.shape[1])
    spread, spreads = 0.0, np.zeros(x.shape[1])
    if weights is not None:
        spread, spreads = _sampling_spread(instance, weights, r, x, y)
    values: list[float] = []
    along: list[Array] = []
    for err in _errors(context, kind, r, law, **parameters):
        values.append(_square(err))
        along.append(np.einsum("ik,ik->k", x, err @ y))
    bias = np.array(along).reshape(-1, x.shape[1])
    series = tuple(
        Series(f"bias along direction {k}", bias[:, k], 0.0, float(spreads[k]))
        for k in range(bias.shape[1])
    )
    return Observations(
        values,
        theory,
        rank=r,
        rounding=1e-12 * instance.fro**2,
        bound_error=error,
        spread=spread,
        series=series if values else (),
    )


def _sampling_spread(
    instance: Instance, p: Array, r: int, x: Array, y: Array
) -> tuple[float, Array]:
    """Return standard deviations for r columns drawn with replacement by p.

    Of ``|err|_F^2`` at most, and of ``x_k^T err y_k``.  ``err`` is the mean of r independent
    ``Y_j = A_:j V_j / p_j - A V``, so that ``Var |err|^2 <= E|Y|^4/r^3 + 2 (E|Y|^2)^2/r^2``.
    """
    kept = p > 0
    law, a, v = p[kept], instance.a[:, kept], instance.v[kept]
    columns, rows = square_norms(a, v)
    cross = np.einsum("ij,ij->j", a, instance.product @ v.T)
    squares = columns * rows / law**2 - 2 * cross / law + _square(instance.product)
    second, fourth = float(law @ squares), float(law @ squares**2)
    along = (x.T @ a) * (v @ y).T / law
    exact = np.einsum("ik,ik->k", x, instance.product @ y)
    variances = np.maximum(along**2 @ law - exact**2, 0.0) / r
    return math.sqrt(fourth / r**3 + 2 * second**2 / r**2), np.sqrt(variances)


def _register_moment(kind: str) -> None:
    parameters = MOMENT_PARAMETERS.get(kind, {})

    @claim(
        f"sketching.moment_{kind}",
        title=f"Exact mean square error of {kind} sketches",
        statement=f"""For all A (m, n), V (n, d_v) and r: E[A S^T S V] = A V and
            E |A S^T S V - A V|_F^2 = {MOMENT_FORMULAS[kind]}, where a = |A|_F^2 |V|_F^2,
            b = |A V|_F^2, c = sum_j |A_:j|^2 |V_j|^2.""",
        source=DERIVED,
        status="derived",
        kind="equality",
        observes=SQUARE_ERROR,
        assumptions=PRODUCT,
        recorded={"reference": "holds", "clusters": "holds", "heads": "holds"},
        constants=parameters,
        ladder=RANKS,
    )
    def observe(context: Context, *, rank: int | None = None) -> Observations:
        instance = context.instance
        multiple = parameters["s"] if kind in ("sjlt", "osnap") else 1
        r = _rank(context, rank, multiple=multiple)
        # The formula of a transform costs n^3: once for all r.
        one = instance.cached(
            ("moment", kind, r),
            lambda: float(amm_expected_sqerr(kind, instance.a, instance.v, r, **parameters)),
        )
        return _moment(context, kind, r, one, **parameters)


for _kind in MOMENT_FORMULAS:
    _register_moment(_kind)


SAMPLERS: dict[str, tuple[str, str | None, str, str]] = {
    "uniform": ("sample_wr", "uniform", "p_j = 1/n, with replacement", "(n c - b)/r"),
    "value_norm2": (
        "sample_wr",
        "value_norm2",
        "p_j = |V_j|^2/|V|_F^2, with replacement",
        "(a - b)/r, less the share of a of zero rows of V",
    ),
    "optimal": (
        "sample_wr",
        "optimal",
        "p_j = |A_:j| |V_j|/T, with replacement",
        "(T^2 - b)/r, T = sum_j |A_:j| |V_j|, the least of all laws",
    ),
    "leverage": (
        "sample_wr",
        "leverage",
        "p_j = l_j(V)/q, with replacement",
        "(sum_j |A_:j|^2 |V_j|^2/p_j - b)/r <= (q |A|_F^2 |V|_2^2 - b)/r",
    ),
    "without": ("sample_wor", None, "distinct columns, uniformly", "((n-r)/(n-1)) (n c - b)/r"),
    "poisson": (
        "sample_poisson",
        "optimal",
        "j kept independently with pi_j = min(1, tau p_j), sum_j pi_j = r, p optimal",
        "sum_j (1/pi_j - 1) |A_:j|^2 |V_j|^2",
    ),
}


def _register_sampler(name: str) -> None:
    kind, law, how, formula = SAMPLERS[name]

    @claim(
        f"sketching.moment_sample_{name}",
        title=f"Exact mean square error of sampled columns, {name}",
        statement=f"""Columns drawn by {how}, weighted by the inverse of their probability:
            E[A S^T S V] = A V and E |A S^T S V - A V|_F^2 = {formula}, where
            a = |A|_F^2 |V|_F^2, b = |A V|_F^2, c = sum_j |A_:j|^2 |V_j|^2.""",
        source=DERIVED,
        status="derived",
        kind="equality",
        observes=SQUARE_ERROR,
        assumptions=PRODUCT,
        recorded={"reference": "holds", "clusters": "holds", "heads": "holds"},
        ladder=RANKS,
    )
    def observe(context: Context, *, rank: int | None = None) -> Observations:
        instance = context.instance
        r = _rank(context, rank)
        given: dict[str, Any] = {} if law is None else {"p": _law(instance, law)}
        if kind == "sample_poisson":
            possible = int(np.count_nonzero(given["p"]))
            context.require(r <= possible, f"r = {r} columns of {possible} that can be drawn")
        theory = float(amm_expected_sqerr(kind, instance.a, instance.v, r, **given))
        # Without replacement the spread is not larger than with.
        weights = None if kind == "sample_poisson" else _law(instance, law or "uniform")
        return _moment(context, kind, r, theory, law=law, weights=weights)


for _name in SAMPLERS:
    _register_sampler(_name)


@claim(
    "sketching.moment_sample_gumbel",
    title="Mean square error of sequential sampling with priority weights",
    statement="""r >= 2 distinct columns drawn one after another by p_j = |A_:j| |V_j|/T, the r
        largest g_j = ln p_j + Gumbel_j, weighted by w_j = 1/(1 - exp(-exp(ln p_j - tau))) with tau
        the (r+1)-th largest: E[A S^T S V] = A V and E |A S^T S V - A V|_F^2 =
        sum_j |A_:j|^2 |V_j|^2 (E[1/P(g_j > tau_j)] - 1), tau_j the r-th largest of the others.""",
    source=DERIVED,
    status="derived",
    kind="equality",
    observes=SQUARE_ERROR + "; the right side is simulated",
    assumptions=PRODUCT,
    recorded={"reference": "holds", "clusters": "holds", "heads": "holds"},
    ladder=RANKS,
)
def _moment_gumbel(
    context: Context, *, rank: int | None = None, simulations: int = 2048
) -> Observations:
    instance = context.instance
    r, law = _rank(context, rank), _law(instance, "optimal")
    possible = int(np.count_nonzero(law))
    context.require(2 <= r < possible, f"needs 2 <= r < {possible} drawable columns, got r = {r}")
    columns, rows = square_norms(instance.a, instance.v)
    theory, error = gumbel_moment(law, columns * rows, r, simulations, 1)
    return _moment(context, "sample_gumbel", r, theory, law="optimal", error=error)


class _Reweighted:
    """Distinct columns of one law under weights that belong to another sampler."""

    def __init__(self, columns: Array, weights: Array) -> None:
        self.columns, self.weights = columns, weights

    def apply(self, x: Array) -> Array:
        out: Array = np.sqrt(self.weights)[:, None] * x[self.columns]
        return out


@claim(
    "sketching.sample_distinct_with_weights_of_repeated",
    title="Distinct columns by p with the weights of draws with replacement",
    statement="""r distinct columns drawn one after another by p (rng.choice(replace=False, p=p)),
        weighted by 1/(r p_j): E[A S^T S V] = A V and the mean square error is that of draws
        with replacement, (sum_j |A_:j|^2 |V_j|^2/p_j - b)/r.""",
    source=(
        "common in published code; refuted: the probability to be among r distinct columns is "
        "not r p_j"
    ),
    status="refuted",
    kind="equality",
    observes=SQUARE_ERROR,
    assumptions=PRODUCT,
    recorded={"reference": "violated"},
    ladder=({"rank": 8}, {"rank": 16}, {"rank": 32}),
)
def _distinct_as_repeated(context: Context, *, rank: int = 16) -> Observations:
    instance = context.instance
    law = _law(instance, "value_norm2")
    possible = int(np.count_nonzero(law))
    context.require(rank <= possible, f"r = {rank} columns of {possible} that can be drawn")
    theory = float(amm_expected_sqerr("sample_wr", instance.a, instance.v, rank, p=law))
    x, y = _directions(instance.m, instance.v.shape[1])
    values, along = [], []
    for rng in context.generators():
        columns = rng.choice(instance.n, rank, replace=False, p=law)
        image = _Reweighted(columns, 1 / (rank * law[columns])).apply(_factors(instance))
        err = image[:, : instance.m].T @ image[:, instance.m :] - instance.product
        values.append(_square(err))
        along.append(np.einsum("ik,ik->k", x, err @ y))
    bias = np.array(along).reshape(-1, x.shape[1])
    series = tuple(Series(f"bias along direction {k}", bias[:, k], 0.0) for k in range(8))
    return Observations(values, theory, rank=rank, series=series if values else ())


@claim(
    "sketching.moment_dct_as_hadamard",
    title="The Hadamard formula for the cosine transform",
    statement="""For S = sqrt(n/r) P C D with the orthonormal DCT C:
        E |A S^T S V - A V|_F^2 = ((n-r)/(n-1)) (a + b - 2c)/r.""",
    source="the formula of srht; refuted: entries of C do not have equal squares",
    status="refuted",
    kind="equality",
    observes=SQUARE_ERROR,
    assumptions=PRODUCT,
    recorded={"spike": "violated"},
    ladder=tuple({"rank": r} for r in (16, 64, 256)),
)
def _dct_as_hadamard(context: Context, *, rank: int = 64) -> Observations:
    instance = context.instance
    s, n = amm_stats(instance.a, instance.v), instance.n
    context.require(rank <= n, f"r = {rank} distinct rows of {n}")
    theory = (n - rank) / max(n - 1, 1) * (s.a + s.b - 2 * s.c) / rank
    return _moment(context, "dct", rank, theory)


# --- Johnson-Lindenstrauss ------------------------------------------------------------------


def _spikiest_row(instance: Instance) -> Array:
    """Return the row of A whose square is most concentrated, as a column of norm one (n, 1)."""

    def compute() -> Array:
        squares = instance.a**2
        total = squares.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            spikes = np.where(total > 0, (squares**2).sum(axis=1) / total**2, 0.0)
        row = instance.a[int(np.argmax(spikes))]
        out: Array = (row / np.linalg.norm(row))[:, None]
        return out

    return instance.cached("spikiest row", compute)


def _norm_errors(
    context: Context, kind: str, r: int, eps: float, delta: float, **parameters: Any
) -> Observations:
    """Observe ``| |Sx|^2/|x|^2 - 1 |`` for the spikiest row x of A."""
    context.below(r, context.instance.n, eps, delta)
    x = _spikiest_row(context.instance)
    values = [
        abs(_square(image) - 1.0)
        for image in _sketched(context, kind, r, x, "spikiest row", **parameters)
    ]
    return Observations(values, eps, delta=delta, rank=r, trivial=1.0)


EPS_LADDER = tuple({"eps": e} for e in (0.9, 0.7, 0.5, 0.35))
NORM_ERROR = "| |Sx|^2 - |x|^2 | / |x|^2 for the row x of A with the largest |x|_4^4/|x|_2^4"
VECTOR = "for a fixed x: P(| |Sx|^2 - |x|^2 | > eps |x|^2) <= delta once"
LIGHT_SOURCE = "derived: moment generating functions; for s = 1, 3 Achlioptas, JCSS 66 (2003)"

# kind -> parameters, right side of "r >=", rows, status, source
NORM_CLAIMS: dict[str, tuple[Parameters, str, Callable[[float, float], int], str, str]] = {
    "gaussian": (
        {},
        "exp(-(r/2)(eps - ln(1+eps))) + exp(-(r/2)(-eps - ln(1-eps))) <= delta",
        lambda eps, delta: int(jl_min_dim(2, eps, delta, form="both")),
        "published",
        f"Chernoff's bound for chi^2; {NLALIB}, JL.lean, for a weaker form",
    ),
    **{
        kind: (
            parameters,
            "r >= ln(2/delta)/(eps^2/4 - eps^3/6)",
            lambda eps, delta: int(jl_min_dim(2, eps, delta)),
            "derived",
            LIGHT_SOURCE,
        )
        for kind, parameters in (("rademacher", {}), ("uniform", {}), ("sparse", {"s": 3.0}))
    },
    **{
        kind: (
            parameters,
            "r >= 2/(eps^2 delta)",
            lambda eps, delta: int(jl_min_dim_chebyshev(eps, delta)),
            "derived",
            "derived: Chebyshev with Var |Sx|^2 <= 2 |x|^4/r; SciPy documents it for countsketch",
        )
        for kind, parameters in (
            ("countsketch", {}),
            ("sjlt", {"s": 4}),
            ("srht", {}),
            ("haar", {}),
        )
    },
}


def _register_norm(kind: str) -> None:
    parameters, condition, rows, status, source = NORM_CLAIMS[kind]

    @claim(
        f"sketching.jl_norm_{kind}",
        title=f"Norm of one vector, {kind}",
        statement=f"S {kind}{_listed(parameters)}; {VECTOR} {condition}.",
        source=source,
        status=status,
        kind="tail",
        observes=NORM_ERROR,
        assumptions=PRODUCT,
        recorded={"clusters": "holds", "heads": "holds"},
        constants=parameters,
        ladder=EPS_LADDER,
    )
    def observe(context: Context, *, eps: float = 0.5, delta: float = 0.05) -> Observations:
        return _norm_errors(context, kind, rows(eps, delta), eps, delta, **parameters)


def _listed(parameters: Parameters) -> str:
    return "".join(f", {name} = {value:g}" for name, value in parameters.items())


for _kind in NORM_CLAIMS:
    _register_norm(_kind)


@claim(
    "sketching.jl_norm_very_sparse",
    title="Norm of one vector, very sparse, by Chebyshev",
    statement=f"""S sparse with density 1/s; {VECTOR}
        r >= (2 + (s-3) |x|_4^4/|x|_2^4)/(eps^2 delta).""",
    source="derived: Var |Sx|^2 = (2 + (s-3) |x|_4^4/|x|_2^4) |x|^4/r",
    status="derived",
    kind="tail",
    observes=NORM_ERROR,
    assumptions=PRODUCT,
    recorded={"clusters": "holds", "spike": "vacuous", "heads": "vacuous"},
    ladder=EPS_LADDER,
)
def _norm_very_sparse(
    context: Context, *, s: float = 64.0, eps: float = 0.5, delta: float = 0.05
) -> Observations:
    x = _spikiest_row(context.instance)
    r = int(jl_sparse_chebyshev(x[:, 0], s, eps, delta))
    return _norm_errors(context, "sparse", r, eps, delta, s=s)


@claim(
    "sketching.jl_sparse_without_dimension",
    title="A tail without dimension for any sparsity",
    statement="""S sparse with density 1/s, any s: P(| |Sx|^2 - |x|^2 | > eps |x|^2) <=
        2 exp(-r (eps^2/4 - eps^3/6)) for every fixed x.""",
    source=(
        "the bound for s <= 3 taken for all s; refuted: for x = e_1 and s = r = 64 a row hits the "
        "entry with probability 1/64, and P = .629"
    ),
    status="refuted",
    kind="tail",
    observes=NORM_ERROR,
    assumptions=PRODUCT,
    recorded={"spike": "violated"},
    ladder=tuple({"rank": r} for r in (16, 64, 256)),
)
def _sparse_without_dimension(
    context: Context, *, s: float = 64.0, eps: float = 0.5, rank: int = 64
) -> Observations:
    delta = float(jl_tail_gaussian(rank, eps, form="closed"))
    return _norm_errors(context, "sparse", rank, eps, delta, s=s)


def _points(instance: Instance, count: int) -> tuple[Array, Array]:
    """Return distinct rows of A as columns (n, N), N <= count, and their distances (pairs,)."""

    def compute() -> tuple[Array, Array]:
        rows = np.unique(np.linspace(0, instance.m - 1, min(count, instance.m)).astype(int))
        points = np.unique(instance.a[rows], axis=0).T
        first, second = np.triu_indices(points.shape[1], 1)
        difference = points[:, first] - points[:, second]
        return np.ascontiguousarray(points), np.linalg.norm(difference, axis=0)

    return instance.cached(("points", count), compute)


def _pair_errors(
    context: Context,
    kind: str,
    points: int,
    rows: Callable[[int], int],
    eps: float,
    delta: Callable[[int], float],
    **parameters: Any,
) -> Observations:
    """Observe the largest ``| |S(x-y)|^2/|x-y|^2 - 1 |`` over the pairs of rows of A."""
    x, distances = _points(context.instance, points)
    count = x.shape[1]
    context.require(count >= 2, "needs two distinct rows of A")
    # Differences of this size are rounding.
    context.require(
        bool(distances.min() > 1e-7 * np.linalg.norm(x, axis=0).max()),
        "needs rows of A that differ by more than rounding",
    )
    r, failure = rows(count), delta(count)
    context.below(r, context.instance.n, eps, failure)
    first, second = np.triu_indices(count, 1)
    values = []
    for image in _sketched(context, kind, r, x, ("points", points), **parameters):
        difference = image[:, first] - image[:, second]
        ratios = np.einsum("ij,ij->j", difference, difference) / distances**2
        values.append(float(np.abs(ratios - 1).max()))
    return Observations(values, eps, delta=failure, rank=r, trivial=1.0)


PAIR_ERROR = "max over pairs of 32 rows x, y of A of | |S(x-y)|^2 - |x-y|^2 | / |x-y|^2"
PAIRS = "for N fixed points: P(some | |S(x-y)|^2 - |x-y|^2 | > eps |x-y|^2) <="


def _register_pairs(kind: str, parameters: Parameters, status: str, source: str) -> None:
    @claim(
        f"sketching.jl_pairs_{kind}",
        title=f"All distances of N points, {kind}",
        statement=f"""S {kind}{_listed(parameters)}; {PAIRS} delta once
            r >= ln(N(N-1)/delta)/(eps^2/4 - eps^3/6).""",
        source=source,
        status=status,
        kind="tail",
        observes=PAIR_ERROR,
        assumptions=PRODUCT,
        recorded={"clusters": "holds", "heads": "holds"},
        constants=parameters,
        ladder=EPS_LADDER,
    )
    def observe(
        context: Context, *, eps: float = 0.5, delta: float = 0.05, points: int = 32
    ) -> Observations:
        return _pair_errors(
            context,
            kind,
            points,
            lambda count: int(jl_min_dim(count, eps, delta)),
            eps,
            lambda count: delta,
            **parameters,
        )


_register_pairs("gaussian", {}, "published", f"{NLALIB}, JL.lean, with 2N^2 for N(N-1)")
_register_pairs("rademacher", {}, "derived", LIGHT_SOURCE)
_register_pairs("sparse", {"s": 3.0}, "derived", LIGHT_SOURCE)


@claim(
    "sketching.jl_pairs_exact_gaussian",
    title="All distances of N points, Gaussian, from the exact law",
    statement=f"""S gaussian; {PAIRS} delta once
        M (P(chi2_r > r(1+eps)) + P(chi2_r < r(1-eps))) <= delta, M = N(N-1)/2.""",
    source="derived: r |Sx|^2/|x|^2 is chi^2 with r degrees of freedom",
    status="derived",
    kind="tail",
    observes=PAIR_ERROR,
    assumptions=PRODUCT,
    recorded={"clusters": "holds", "heads": "holds"},
    ladder=EPS_LADDER,
)
def _pairs_exact(
    context: Context, *, eps: float = 0.5, delta: float = 0.05, points: int = 32
) -> Observations:
    return _pair_errors(
        context,
        "gaussian",
        points,
        lambda count: int(jl_min_dim_exact_gaussian(count * (count - 1) // 2, eps, delta)),
        eps,
        lambda count: delta,
    )


@claim(
    "sketching.jl_pairs_dasgupta_gupta",
    title="All distances of N points, the existence lemma",
    statement=f"""S gaussian; {PAIRS} 1 - 1/N once r >= 4 ln N/(eps^2/2 - eps^3/3): with
        probability 1/N all distances are kept, so that such a map exists.""",
    source="Dasgupta and Gupta, Random Structures and Algorithms 22 (2003), Theorem 2.1",
    status="published",
    kind="tail",
    observes=PAIR_ERROR,
    assumptions=PRODUCT,
    recorded={"clusters": "holds", "heads": "holds"},
    ladder=EPS_LADDER,
)
def _pairs_dg(context: Context, *, eps: float = 0.5, points: int = 32) -> Observations:
    return _pair_errors(
        context,
        "gaussian",
        points,
        lambda count: int(jl_min_dim_dg(count, eps)),
        eps,
        lambda count: 1 - 1 / count,
    )


@claim(
    "sketching.jl_pairs_achlioptas",
    title="All distances of N points, Achlioptas",
    statement=f"""S with independent entries sqrt(3/r) times +1, 0, -1 with probabilities 1/6,
        2/3, 1/6; {PAIRS} N^-beta once r >= (4 + 2 beta) ln N/(eps^2/2 - eps^3/3).""",
    source="Achlioptas, JCSS 66 (2003), Theorem 1.1",
    status="published",
    kind="tail",
    observes=PAIR_ERROR,
    assumptions=PRODUCT,
    recorded={"clusters": "holds", "heads": "holds"},
    ladder=EPS_LADDER,
)
def _pairs_achlioptas(
    context: Context, *, eps: float = 0.5, beta: float = 1.0, points: int = 32
) -> Observations:
    return _pair_errors(
        context,
        "sparse",
        points,
        lambda count: int(jl_min_dim_achlioptas(count, eps, beta)),
        eps,
        lambda count: count**-beta,
        s=3.0,
    )


def _nearest_pair(instance: Instance) -> Array:
    """Return the row of A and the column of V with the largest cosine, each of norm one (n, 2)."""

    def compute() -> Array:
        norms = np.outer(np.linalg.norm(instance.a, axis=1), np.linalg.norm(instance.v, axis=0))
        cosines = np.divide(
            np.abs(instance.product), norms, out=np.full(norms.shape, -1.0), where=norms > 0
        )
        i, j = np.unravel_index(int(np.argmax(cosines)), cosines.shape)
        pair = np.stack([instance.a[i], instance.v[:, j]], axis=1)
        out: Array = pair / np.linalg.norm(pair, axis=0)
        return out

    return instance.cached("nearest pair", compute)


def _register_inner(kind: str) -> None:
    gaussian = kind == "gaussian"
    condition = (
        "r >= 2 ln(2/delta)/(eps - ln(1+eps)), any eps > 0"
        if gaussian
        else "r >= ln(4/delta)/(eps^2/4 - eps^3/6), eps <= 1"
    )

    @claim(
        f"sketching.jl_inner_{kind}",
        title=f"Inner product of two vectors, {kind}",
        statement=f"""S {kind}; for fixed x, y: P(|<Sx, Sy> - <x, y>| > eps |x| |y|) <= delta once
            {condition}.  Additive: no version relative to |<x, y>| exists.""",
        source=(
            "derived: the moment generating function is largest for parallel vectors"
            if gaussian
            else "derived: polarization of the tail of norms"
        ),
        status="derived",
        kind="tail",
        observes="|<Sx, Sy> - <x, y>| / (|x| |y|), x a row of A and y a column of V",
        assumptions=PRODUCT,
        recorded={"clusters": "holds", "heads": "vacuous"},
        ladder=EPS_LADDER,
    )
    def observe(context: Context, *, eps: float = 0.5, delta: float = 0.05) -> Observations:
        # Two tails of norms, of x + y and x - y, for one of an inner product.
        r = int(inner_product_min_dim(1, eps, delta) if gaussian else jl_min_dim(2, eps, delta / 2))
        context.below(r, context.instance.n, eps, delta)
        pair = _nearest_pair(context.instance)
        exact = float(pair[:, 0] @ pair[:, 1])
        values = [
            abs(float(image[:, 0] @ image[:, 1]) - exact)
            for image in _sketched(context, kind, r, pair, "nearest pair")
        ]
        # Zero is off by |<x, y>|.
        return Observations(values, eps, delta=delta, rank=r, trivial=abs(exact))


for _kind in ("gaussian", "rademacher"):
    _register_inner(_kind)


# --- approximate matrix multiplication --------------------------------------------------------

FRO_ERROR = "|A S^T S V - A V|_F / (|A|_F |V|_F)"
AMM_RECORD = {"clusters": "holds", "reference": "vacuous", "heads": "vacuous"}
TAIL_RANKS = tuple({"rank": r} for r in (32, 64, 128, 256))


def _fro_errors(context: Context, kind: str, r: int, **parameters: Any) -> list[float]:
    fro = context.instance.fro
    return [math.sqrt(_square(err)) / fro for err in _errors(context, kind, r, **parameters)]


@claim(
    "sketching.amm_jl_moment",
    title="From the moment of norms to matrix products",
    statement="""If E(|Sx|^2 - |x|^2)^2 <= eps^2 |x|^4 for all x, then
        E |A S^T S V - A V|_F^2 <= eps^2 |A|_F^2 |V|_F^2.  For gaussian S eps^2 = 2/r.""",
    source=f"{NLALIB}, ApproxMultiplication; Woodruff (2014), Theorem 2.8, has 3 eps",
    status="published",
    kind="expectation",
    observes="|A S^T S V - A V|_F^2 / (|A|_F^2 |V|_F^2), mean over draws",
    assumptions=PRODUCT,
    recorded=AMM_RECORD,
    ladder=TAIL_RANKS,
)
def _amm_jl_moment(context: Context, *, rank: int | None = None) -> Observations:
    r = _rank(context, rank, most=256)
    values = [x**2 for x in _fro_errors(context, "gaussian", r)]
    trivial = _relative_trivial(context.instance) ** 2
    return Observations(values, 2 / r, rank=r, trivial=trivial)


@claim(
    "sketching.amm_markov",
    title="Matrix product, by Markov on the second moment",
    statement="""P(|A S^T S V - A V|_F > eps |A|_F |V|_F) <= M/(eps^2 a) for every operator whose
        mean square error M is known; here countsketch, M = (a + b - 2c)/r, with
        eps^2 = M/(delta a).""",
    source=DERIVED,
    status="derived",
    kind="tail",
    observes=FRO_ERROR,
    assumptions=PRODUCT,
    recorded={"clusters": "vacuous", "reference": "vacuous", "heads": "vacuous"},
    ladder=TAIL_RANKS,
)
def _amm_markov(context: Context, *, rank: int | None = None, delta: float = 0.05) -> Observations:
    instance = context.instance
    r = _rank(context, rank, most=256)
    moment = float(amm_expected_sqerr("countsketch", instance.a, instance.v, r))
    eps = math.sqrt(moment / delta) / instance.fro
    values = _fro_errors(context, "countsketch", r)
    return Observations(values, eps, delta=delta, rank=r, trivial=_relative_trivial(instance))


def _register_sampling_tail(sharp: bool) -> None:
    factor, scale = ("2", "T") if sharp else ("8", "|A|_F |V|_F")

    @claim(
        "sketching.amm_sampling_tail" + ("_sharp" if sharp else ""),
        title="Columns drawn with replacement, Frobenius norm",
        statement=f"""Columns drawn with replacement by p_j >= beta |A_:j| |V_j|/T,
            T = sum_j |A_:j| |V_j|, weighted by 1/(r p_j): with probability at least 1 - delta
            |A S^T S V - A V|_F <= (eta/sqrt(beta r)) {scale} with
            eta = 1 + sqrt(({factor}/beta) ln(1/delta)); here beta = 1.""",
        source=(
            "derived: McDiarmid with differences bounded by 2T/(beta r)"
            if sharp
            else "Drineas, Kannan and Mahoney, SIAM J. Comput. 36 (2006), as quoted in arXiv "
            "2112.05359, Proposition 1"
        ),
        status="derived" if sharp else "published",
        kind="tail",
        observes=FRO_ERROR,
        assumptions=PRODUCT,
        recorded=(
            AMM_RECORD
            if sharp
            else {"clusters": "holds", "reference": "vacuous", "heads": "vacuous"}
        ),
        constants={"beta": 1.0, "factor": float(factor)},
        ladder=TAIL_RANKS,
    )
    def observe(context: Context, *, rank: int | None = None, delta: float = 0.05) -> Observations:
        instance = context.instance
        r = _rank(context, rank, most=256)
        bound = float(amm_fro_sampling_tail(1.0, r, delta, sharp=sharp))
        if sharp:
            columns, rows = square_norms(instance.a, instance.v)
            bound *= float(np.sqrt(columns) @ np.sqrt(rows)) / instance.fro
        values = _fro_errors(context, "sample_wr", r, law="optimal")
        trivial = _relative_trivial(instance)
        return Observations(values, bound, delta=delta, rank=r, trivial=trivial)


_register_sampling_tail(False)
_register_sampling_tail(True)


@claim(
    "sketching.amm_entrywise",
    title="Every entry of the product, Gaussian",
    statement="""S gaussian: with probability at least 1 - delta all
        |(A S^T S V - A V)_ij| <= eps |A_i| |V_:j|, hence |err|_F <= eps |A|_F |V|_F, once
        r >= 2 ln(2 m d_v/delta)/(eps - ln(1+eps)).""",
    source="derived: the tail of inner products for m d_v pairs",
    status="derived",
    kind="tail",
    observes="max_ij |err_ij| / (|A_i| |V_:j|)",
    assumptions=PRODUCT,
    recorded=AMM_RECORD,
    ladder=EPS_LADDER,
)
def _amm_entrywise(context: Context, *, eps: float = 0.5, delta: float = 0.05) -> Observations:
    instance = context.instance
    r = int(amm_entrywise_min_dim(instance.m, instance.v.shape[1], eps, delta))
    context.below(r, instance.n, eps, delta)
    norms = np.outer(np.linalg.norm(instance.a, axis=1), np.linalg.norm(instance.v, axis=0))
    scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    values = [float(np.abs(err * scale).max()) for err in _errors(context, "gaussian", r)]
    trivial = float(np.abs(instance.product * scale).max())
    if instance.stochastic:
        centred = instance.product - instance.v.mean(axis=0)
        trivial = min(trivial, float(np.abs(centred * scale).max()))
    return Observations(values, eps, delta=delta, rank=r, trivial=trivial)


@claim(
    "sketching.amm_gaussian_columns",
    title="Columns of the product without any dimension, Gaussian",
    statement="""S gaussian: with probability at least 1 - delta, for all d_v columns w of V,
        |err| <= t |A w| + sqrt((1+t)/r) |w| (|A|_F + |A|_2 sqrt(2 ln(2/delta'))) with
        delta' = delta/d_v and 2 exp(-(r/2)(t - ln(1+t))) = delta'/2.""",
    source="derived: the exact law of the error of one column",
    status="derived",
    kind="tail",
    observes="max over columns of |err_:j| over its bound",
    assumptions=PRODUCT,
    recorded=AMM_RECORD,
    ladder=TAIL_RANKS,
)
def _amm_gaussian_columns(
    context: Context, *, rank: int | None = None, delta: float = 0.05
) -> Observations:
    instance = context.instance
    r = _rank(context, rank, most=256)
    bounds = amm_gaussian_tail(instance.a, instance.v, r, delta)
    scale = np.divide(1.0, bounds, out=np.zeros_like(bounds), where=bounds > 0)
    values = [
        float((np.linalg.norm(err, axis=0) * scale).max())
        for err in _errors(context, "gaussian", r)
    ]
    # Where the trivial predictor is within the bound for every column, it says nothing.
    exact = np.linalg.norm(instance.product, axis=0)
    if instance.stochastic:
        centred = np.linalg.norm(instance.product - instance.v.mean(axis=0), axis=0)
        exact = np.minimum(exact, centred)
    trivial = float((exact * scale).max())
    return Observations(values, 1.0, delta=delta, rank=r, trivial=trivial)


@claim(
    "sketching.amm_embedding",
    title="Spectral norm from an embedding of both factors",
    statement="""If S is a gam-embedding of range([A^T V]), |U^T S^T S U - I|_2 = gam, then
        |A S^T S V - A V|_2 <= gam |A|_2 |V|_2.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="|A S^T S V - A V|_2 / (|A|_2 |V|_2) against gam of the same draw",
    assumptions=PRODUCT,
    recorded={"reference": "holds", "clusters": "holds"},
    ladder=tuple({"rank": r} for r in (16, 32, 48)),
)
def _amm_embedding(context: Context, *, rank: int | None = None) -> Observations:
    instance = context.instance
    r = _rank(context, rank, most=256)
    factors = _factors(instance)
    # The embedding costs the cube of the dimension of the range, for every draw.
    u, sigma, _ = instance.cached(
        "factors svd", lambda: np.linalg.svd(factors, full_matrices=False)
    )
    basis = u[:, sigma > 1e-10 * sigma[0]]
    context.require(basis.shape[1] <= 256, f"range([A^T V]) has dimension {basis.shape[1]} > 256")
    size = _spectral(instance.a) * _spectral(instance.v)
    m, both = instance.m, np.concatenate([factors, basis], axis=1)
    values, bounds = [], []
    for image in _sketched(context, "gaussian", r, both, "factors and basis"):
        err = image[:, :m].T @ image[:, m : factors.shape[1]] - instance.product
        values.append(_spectral(err) / size)
        bounds.append(_distortion(image[:, factors.shape[1] :]))
    return Observations(values, bounds, rank=r, rounding=1e-10)


def _bernstein(instance: Instance) -> tuple[float, float]:
    """Return the mean stable rank and ``|A|_2 |V|_2``."""

    def compute() -> tuple[float, float]:
        sizes = [_spectral(x) for x in (instance.a, instance.v)]
        stable = [_square(x) / s**2 for x, s in zip((instance.a, instance.v), sizes, strict=True)]
        return sum(stable) / 2, sizes[0] * sizes[1]

    return instance.cached("stable ranks", compute)


BERNSTEIN_LAW = """A and V scaled to spectral norm 1, asr = (sr(A) + sr(V))/2; columns drawn with
    replacement by p_j = (|A_:j|^2 + |V_j|^2)/(2 asr), weighted by 1/(r p_j):"""
SPECTRAL_ERROR = "|A S^T S V - A V|_2 / (|A|_2 |V|_2)"


@claim(
    "sketching.amm_bernstein",
    title="Spectral norm, columns drawn by joint norms",
    statement=f"""{BERNSTEIN_LAW} P(|err|_2 >= t) <= (m+d_v) exp(-r t^2/(4 asr (1+t/3))); at most
        delta once r >= 4 asr (1+t/3) ln((m+d_v)/delta)/t^2.""",
    source="derived: matrix Bernstein, summands <= asr, second moments <= 2 asr",
    status="derived",
    kind="tail",
    observes=SPECTRAL_ERROR,
    assumptions=PRODUCT,
    recorded={"clusters": "holds", "heads": "vacuous"},
    ladder=tuple({"t": t} for t in (0.9, 0.7, 0.5, 0.35)),
)
def _amm_bernstein(context: Context, *, t: float = 0.5, delta: float = 0.05) -> Observations:
    instance = context.instance
    asr, size = _bernstein(instance)
    r = int(amm_spectral_min_dim(asr, instance.m, instance.v.shape[1], t, delta))
    context.below(r, instance.n, t, delta)
    values = [_spectral(e) / size for e in _errors(context, "sample_wr", r, law="spectral")]
    trivial = _spectral(instance.product) / size
    return Observations(values, t, delta=delta, rank=r, trivial=trivial)


@claim(
    "sketching.amm_bernstein_mean",
    title="Mean of the spectral norm, columns drawn by joint norms",
    statement=f"""{BERNSTEIN_LAW} E|err|_2 <= sqrt(4 asr ln(m+d_v)/r) + 2 asr ln(m+d_v)/(3r).""",
    source="derived: matrix Bernstein",
    status="derived",
    kind="expectation",
    observes=SPECTRAL_ERROR + ", mean over draws",
    assumptions=PRODUCT,
    recorded={"clusters": "holds", "heads": "vacuous"},
    ladder=TAIL_RANKS,
)
def _amm_bernstein_mean(context: Context, *, rank: int | None = None) -> Observations:
    instance = context.instance
    asr, size = _bernstein(instance)
    r = _rank(context, rank, most=256)
    bound = float(amm_spectral_expected(asr, instance.m, instance.v.shape[1], r))
    values = [_spectral(e) / size for e in _errors(context, "sample_wr", r, law="spectral")]
    return Observations(values, bound, rank=r, trivial=_spectral(instance.product) / size)


# --- subspace embeddings ----------------------------------------------------------------------


def _distortion(image: Array) -> float:
    """Return ``|U^T S^T S U - I|_2`` from S U, exactly, by eigenvalues."""
    values = np.linalg.eigvalsh(image.T @ image - np.eye(image.shape[1]))
    return float(max(-values[0], values[-1], 0.0))


def _embedding(
    context: Context,
    kind: str,
    rows: int,
    eps: float,
    delta: float,
    *,
    law: str | None = None,
    observe: Callable[[Array], float] = _distortion,
    **parameters: Any,
) -> Observations:
    """Observe the distortion of range(V)."""
    instance = context.instance
    context.below(rows, instance.n, eps, delta)
    basis = instance.value_basis
    if kind.startswith("sample_"):
        images = _sampled(context, kind, rows, basis, "basis", _law(instance, law or "uniform"))
    else:
        images = _sketched(context, kind, rows, basis, "basis", **parameters)
    values = [observe(image) for image in images]
    return Observations(values, eps, delta=delta, rank=rows, trivial=1.0)


DISTORTION = "|U^T S^T S U - I|_2 for an orthonormal basis U of range(V), by eigenvalues"
EMBEDS = "with probability at least 1 - delta |U^T S^T S U - I|_2 <= eps for U (n, q) orthonormal"
SUBSPACE_RECORD = {"subspace-512": "holds", "heads": "vacuous"}
OSE_LADDER = tuple({"eps": e} for e in (0.9, 0.7, 0.5))


def _q(instance: Instance) -> int:
    return int(instance.value_basis.shape[1])


def _register_ose_gaussian(sharp: bool) -> None:
    @claim(
        "sketching.ose_gaussian" + ("" if sharp else "_loose"),
        title="Subspace embedding, Gaussian",
        statement=f"""S gaussian: {EMBEDS} once r >= """
        + (
            "(sqrt(q) + sqrt(2 ln(2/delta)))^2/(sqrt(1+eps) - 1)^2."
            if sharp
            else "18 (q + 2 ln(2/delta))/eps^2."
        ),
        source=(
            "derived: extreme singular values of Gaussian matrices"
            if sharp
            else f"{NLALIB}, GaussianEmbedding"
        ),
        status="derived" if sharp else "published",
        kind="tail",
        observes=DISTORTION,
        assumptions=PRODUCT,
        recorded=SUBSPACE_RECORD if sharp else {"subspace-1024": "holds", "heads": "vacuous"},
        constants={} if sharp else {"factor": 18.0},
        ladder=OSE_LADDER,
    )
    def observe(context: Context, *, eps: float = 0.5, delta: float = 0.05) -> Observations:
        rows = int(ose_gaussian(_q(context.instance), eps, delta, sharp=sharp))
        return _embedding(context, "gaussian", rows, eps, delta)


_register_ose_gaussian(True)
_register_ose_gaussian(False)


def _norm_distortion(image: Array) -> float:
    sigma = np.linalg.svd(image, compute_uv=False)
    return float(np.abs(sigma - 1).max())


@claim(
    "sketching.ose_gaussian_sv",
    title="Singular values of a sketched basis, Gaussian",
    statement="""S gaussian: with probability at least 1 - delta all singular values of S U are in
        [1-eps, 1+eps] for U (n, q) orthonormal once
        r >= (sqrt(q) + sqrt(2 ln(2/delta)))^2/eps^2.""",
    source="derived: extreme singular values of Gaussian matrices",
    status="derived",
    kind="tail",
    observes="max |sigma_i(S U) - 1| for an orthonormal basis U of range(V)",
    assumptions=PRODUCT,
    recorded={"subspace-512": "holds", "heads": "holds"},
    ladder=OSE_LADDER,
)
def _ose_gaussian_sv(context: Context, *, eps: float = 0.5, delta: float = 0.05) -> Observations:
    rows = int(ose_gaussian_sv(_q(context.instance), eps, delta))
    return _embedding(context, "gaussian", rows, eps, delta, observe=_norm_distortion)


MARKOV_EMBEDDINGS: dict[str, Parameters] = {
    "countsketch": {},
    "sjlt": {"s": 4},
    "osnap": {"s": 4},
    "rademacher": {},
    "srht": {},
}


def _register_ose_markov(kind: str) -> None:
    parameters = MARKOV_EMBEDDINGS[kind]
    published = kind == "countsketch"

    @claim(
        f"sketching.ose_markov_{kind}",
        title=f"Subspace embedding, {kind}, by Markov",
        statement=f"""S {kind}{_listed(parameters)}: {EMBEDS} once
            r >= (q^2 + q - 2 sum_j l_j^2)/(delta eps^2), l_j the leverage scores; in particular
            once r >= (q^2 + q)/(delta eps^2), which is used here.""",
        source=f"{NLALIB}, CountSketchTail" if published else "derived: the exact second moment",
        status="published" if published else "derived",
        kind="tail",
        observes=DISTORTION,
        assumptions=PRODUCT,
        recorded={"subspace-4096": "holds", "heads": "vacuous"},
        constants=parameters,
        ladder=OSE_LADDER,
    )
    def observe(context: Context, *, eps: float = 0.5, delta: float = 0.05) -> Observations:
        rows = int(ose_countsketch(_q(context.instance), eps, delta))
        rows += -rows % 4  # osnap needs a multiple of s
        return _embedding(context, kind, rows, eps, delta, **parameters)


for _kind in MARKOV_EMBEDDINGS:
    _register_ose_markov(_kind)


@claim(
    "sketching.ose_srht",
    title="Subspace embedding, subsampled randomized Hadamard transform",
    statement=f"""S srht with distinct rows, n a power of two: {EMBEDS} once
        r >= (3 Lam/eps^2) ln(4q/delta), Lam = (sqrt(q) + sqrt(8 ln(2n/delta)))^2; r = n is
        exact.""",
    source=f"{NLALIB}, SRHT",
    status="published",
    kind="tail",
    observes=DISTORTION,
    assumptions=PRODUCT,
    recorded={"subspace-4096": "holds", "heads": "vacuous"},
    constants={"factor": 3.0, "inner": 8.0},
    ladder=({"eps": 0.99}, {"eps": 0.95}, {"eps": 0.9}),
)
def _ose_srht(context: Context, *, eps: float = 0.9, delta: float = 0.05) -> Observations:
    instance = context.instance
    padded = 1 << (instance.n - 1).bit_length()
    rows = int(ose_srht(padded, _q(instance), eps, delta))
    return _embedding(context, "srht", rows, eps, delta)


def _register_ose_sampling(uniform: bool) -> None:
    @claim(
        "sketching.ose_" + ("uniform" if uniform else "leverage"),
        title=f"Subspace embedding, columns drawn {'uniformly' if uniform else 'by leverage'}",
        statement="""Rows of U drawn with replacement by """
        + ("p_j = 1/n" if uniform else "p_j >= beta l_j/q (here beta = 1)")
        + f""", weighted by 1/(r p_j): {EMBEDS} once r >= """
        + (
            "3 n max_j l_j ln(2q/delta)/eps^2."
            if uniform
            else "(3q/(beta eps^2)) ln(2q/delta); the failure is 2q exp(-beta r eps^2/(3q))."
        ),
        source=(
            "derived: the same with beta = q/(n max_j l_j)"
            if uniform
            else f"{NLALIB}; matrix Chernoff with summands <= q/(beta r)"
        ),
        status="derived" if uniform else "published",
        kind="tail",
        observes=DISTORTION,
        assumptions=PRODUCT,
        recorded={"subspace-4096": "holds", "heads": "vacuous"},
        constants={"factor": 3.0, **({} if uniform else {"beta": 1.0})},
        ladder=OSE_LADDER,
    )
    def observe(context: Context, *, eps: float = 0.5, delta: float = 0.05) -> Observations:
        instance = context.instance
        basis = instance.value_basis
        q = basis.shape[1]
        if uniform:
            top = float(np.einsum("ij,ij->i", basis, basis).max())
            rows = int(ose_uniform(instance.n, min(top, 1.0), q, eps, delta))
        else:
            rows = int(ose_leverage(q, 1.0, eps, delta))
        law = "uniform" if uniform else "leverage"
        return _embedding(context, "sample_wr", rows, eps, delta, law=law)


_register_ose_sampling(False)
_register_ose_sampling(True)


@claim(
    "sketching.ose_sjlt",
    title="Subspace embedding, sparse, machine-checked constants",
    statement=f"""S sjlt: {EMBEDS} with s = ceil(1356 Q/eps) nonzeros a column and
        r = ceil(306456 (q + Q)/eps^2) rows, Q = max(1, ceil(log2(q/delta))).""",
    source=f"{NLALIB}, SparseEmbedding",
    status="published",
    kind="tail",
    observes=DISTORTION,
    assumptions=PRODUCT,
    recorded={"subspace-4096": "vacuous", "heads": "vacuous"},
    constants={"s_factor": 1356.0, "r_factor": 306456.0},
)
def _ose_sjlt(context: Context, *, eps: float = 0.5, delta: float = 0.05) -> Observations:
    size = ose_sjlt(_q(context.instance), eps, delta)
    return _embedding(context, "sjlt", int(size.r), eps, delta, s=int(size.s))


# --- leverage scores --------------------------------------------------------------------------


def _fast_scores(context: Context, rank: int | None) -> tuple[int, list[tuple[float, Array]]]:
    """Return r, and gam with ``l~/l`` for one sketch of V a trial.

    gam is the distortion of range(V) by Pi, and ``l~_i = |(V R^-1)_i|^2`` with R of ``Pi V``.
    In an orthonormal basis U of range(V) these are ``|(U R^-1)_i|^2`` with R of ``Pi U``.
    """
    instance = context.instance
    basis = instance.value_basis
    q = basis.shape[1]
    r = min(8 * q, instance.n) if rank is None else rank
    context.require(r >= q, f"r = {r} rows for a subspace of dimension q = {q}")
    scores = np.einsum("ij,ij->i", basis, basis)
    kept = scores > 1e-14
    found = []
    for image in _sketched(context, "gaussian", r, basis, "basis"):
        upper = np.linalg.qr(image)[1]
        fast = np.linalg.solve(upper.T, basis[kept].T)
        found.append((_distortion(image), np.einsum("ij,ij->j", fast, fast) / scores[kept]))
    return r, found


LEVERAGE_RANKS = tuple({"rank": r} for r in (64, 128, 256, 448))


@claim(
    "sketching.leverage_fast",
    title="Leverage scores from a sketch",
    statement="""If Pi is a gam-embedding of range(X), Z = Pi X = Q R, then
        l_i/(1+gam) <= |(X R^-1)_i|^2 <= l_i/(1-gam) for all rows i.""",
    source=(
        "derived; the algorithm is of Drineas, Magdon-Ismail, Mahoney and Woodruff, JMLR 13 (2012)"
    ),
    status="derived",
    kind="inequality",
    observes="max_i of l~_i (1-gam)/l_i and l_i/(l~_i (1+gam)), X = V, Pi gaussian",
    assumptions=PRODUCT,
    recorded={"reference": "holds", "subspace-512": "holds", "heads": "holds"},
    ladder=LEVERAGE_RANKS,
)
def _leverage_fast(context: Context, *, rank: int | None = None) -> Observations:
    r, found = _fast_scores(context, rank)
    values = [
        max(float(ratio.max()) * max(1 - gam, 0.0), 1 / (float(ratio.min()) * (1 + gam)))
        for gam, ratio in found
    ]
    return Observations(values, 1.0, rank=r)


@claim(
    "sketching.leverage_beta",
    title="Realised quality of fast leverage scores as probabilities",
    statement="""With scores l~_i from a gam-embedding and p_i = l~_i / sum l~: p_i >= beta l_i/q
        with beta = (1-gam)/(1+gam).""",
    source="derived: the two sides of the fast scores",
    status="derived",
    kind="inequality",
    observes="(1-gam)/(1+gam) over the realised beta = min_i p_i q/l_i, X = V, Pi gaussian",
    assumptions=PRODUCT,
    recorded={"reference": "holds", "subspace-512": "holds", "heads": "holds"},
    ladder=LEVERAGE_RANKS,
)
def _leverage_beta(context: Context, *, rank: int | None = None) -> Observations:
    from ..sampling import leverage_quality

    r, found = _fast_scores(context, rank)
    basis = context.instance.value_basis
    scores = np.einsum("ij,ij->i", basis, basis)
    scores = scores[scores > 1e-14]
    values = []
    for gam, ratio in found:
        fast = ratio * scores
        beta = leverage_quality(fast / fast.sum(), scores * (basis.shape[1] / scores.sum()))
        values.append(max(1 - gam, 0.0) / (1 + gam) / beta)
    return Observations(values, 1.0, rank=r)


@claim(
    "sketching.leverage_sampling",
    title="Mean square error of leverage sampling",
    statement="""Columns drawn with replacement by p_j = l_j(V)/q, weighted by 1/(r p_j):
        E |A S^T S V - A V|_F^2 <= (q |A|_F^2 |V|_2^2 - |A V|_F^2)/r.""",
    source="derived: |V_j|^2 <= l_j |V|_2^2 in the exact moment",
    status="derived",
    kind="expectation",
    observes="|A S^T S V - A V|_F^2 / (|A|_F^2 |V|_F^2), mean over draws",
    assumptions=PRODUCT,
    recorded=AMM_RECORD,
    ladder=TAIL_RANKS,
)
def _leverage_sampling(context: Context, *, rank: int | None = None) -> Observations:
    instance = context.instance
    r = _rank(context, rank, most=256)
    size = _square(instance.a) * _spectral(instance.v) ** 2
    bound = (_q(instance) * size - _square(instance.product)) / (r * instance.fro**2)
    values = [x**2 for x in _fro_errors(context, "sample_wr", r, law="leverage")]
    return Observations(values, bound, rank=r, trivial=_relative_trivial(instance) ** 2)


@claim(
    "sketching.ridge_columns",
    title="Columns drawn by ridge leverage scores",
    statement="""K positive semidefinite (n, n), l_i = (K (K + lam I)^-1)_ii, d_eff = sum l_i;
        columns J drawn with replacement by p_i = l_i/d_eff, Kt = K_:J (K_JJ)^+ K_J::
        0 <= K - Kt always, and K - Kt <= 2 lam I with probability at least 1 - delta once
        r >= 8 d_eff ln(n/delta).  Here K = A^T A, where K - Kt = A^T (I - C C^+) A for the
        drawn columns C of A.""",
    source="derived: matrix Chernoff; compare Musco and Musco, NeurIPS 2017",
    status="derived",
    kind="tail",
    observes="|A - C C^+ A|_2^2 / lam, lam such that d_eff = size",
    assumptions=(DENSE,),
    recorded={"clusters": "holds", "heads": "holds"},
    ladder=tuple({"size": d} for d in (1.5, 2.0, 3.0, 4.0)),
)
def _ridge_columns(context: Context, *, size: float = 4.0, delta: float = 0.05) -> Observations:
    instance = context.instance
    _, sigma, vt = instance.svd
    squares = sigma[sigma > 1e-12 * sigma[0]] ** 2
    context.require(size < len(squares), f"d_eff = {size:g} of a matrix of rank {len(squares)}")
    lam = _ridge_of_size(squares, size)
    law = (vt[: len(squares)] ** 2).T @ (squares / (squares + lam))
    law /= law.sum()
    r = math.ceil(8 * size * math.log(instance.n / delta))
    context.below(r, instance.n, 2.0, delta)
    # Columns of A in the coordinates of its left singular vectors.
    columns = np.ascontiguousarray(vt.T * sigma)
    values = []
    for image in _sampled(context, "sample_wr", r, columns, "columns", law):
        distinct = np.unique(image, axis=0).T
        values.append(_residual_norms(sigma, _range(distinct))[1] ** 2 / lam)
    return Observations(values, 2.0, delta=delta, rank=r, trivial=float(squares[0]) / lam)


def _ridge_of_size(squares: Array, size: float) -> float:
    """Return lam with ``sum_i s_i/(s_i + lam) = size``."""
    from scipy.optimize import brentq

    top = math.log(float(squares[0]))

    def excess(log: float) -> float:
        return float(np.sum(squares / (squares + math.exp(log)))) - size

    return math.exp(float(brentq(excess, top - 60, top + math.log(len(squares)) + 10)))


# --- low rank: all in the coordinates of the singular vectors of A ----------------------------


def _range(y: Array) -> Array:
    """Return an orthonormal basis of the range of Y, whose rank may be below its width."""
    from scipy.linalg import qr

    q, r, _ = qr(y, mode="economic", pivoting=True, check_finite=False)
    sizes = np.abs(np.diag(r))
    out: Array = q[:, : int(np.count_nonzero(sizes > 1e-13 * sizes.max(initial=0.0)))]
    return out


def _residual_norms(sigma: Array, q: Array) -> tuple[float, float]:
    """Return Frobenius and spectral norm of ``(I - Q Q^T) diag(sigma)``.

    The first up to 1e-8 relative to ``|sigma|``.
    """
    leverage = np.einsum("ij,ij->i", q, q)
    fro = math.sqrt(float(np.sum(sigma**2 * np.maximum(1 - leverage, 0.0))))
    scaled = sigma[:, None] * q  # diag(sigma) (I - Q Q^T) diag(sigma) = diag(sigma^2) - S S^T
    k = len(sigma)
    if k <= 128:
        top = float(np.linalg.eigvalsh(np.diag(sigma**2) - scaled @ scaled.T)[-1])
        return fro, math.sqrt(max(top, 0.0))
    from scipy.sparse.linalg import LinearOperator, eigsh

    squares = sigma**2
    gram = LinearOperator(
        (k, k), matvec=lambda x: squares * x - scaled @ (scaled.T @ x), dtype=np.float64
    )
    # A start that depends on the problem only: the same norm for the same range.
    start = np.random.default_rng(k).standard_normal(k)
    top = float(eigsh(gram, 1, which="LA", v0=start, tol=1e-10, return_eigenvectors=False)[0])
    return fro, math.sqrt(max(top, 0.0))


def _matrix_trivial(instance: Instance) -> tuple[float, float]:
    """Return Frobenius and spectral error of the better of the zero and the mean matrix."""

    def compute() -> tuple[float, float]:
        sigma = instance.svd[1]
        fro, top = float(np.linalg.norm(sigma)), float(sigma[0])
        if instance.stochastic:
            centred = instance.a - 1 / instance.n
            fro, top = min(fro, float(np.linalg.norm(centred))), min(top, _spectral(centred))
        return fro, top

    return instance.cached("matrix trivial", compute)


def _test_matrices(context: Context, width: int) -> Iterator[Array]:
    """Yield ``V^T Omega`` (min(m, n), width) for Gaussian test matrices Omega (n, width)."""
    right = np.ascontiguousarray(context.instance.svd[2].T)
    for image in _sketched(context, "gaussian", width, right, "right"):
        yield math.sqrt(width) * image.T


def _ranges(context: Context, k: int, o: int, power: int = 0) -> Iterator[tuple[Array, Array]]:
    """Yield the test matrix and the basis that a randomized range finder makes of it."""
    sigma = context.instance.svd[1]
    smaller = len(sigma)
    context.require(k + o < smaller, f"k + o = {k + o} columns of at most {smaller} - 1")
    for omega in _test_matrices(context, k + o):
        q = _range(sigma[:, None] * omega)
        for _ in range(power):
            q = _range(sigma[:, None] * _range(sigma[:, None] * q))
        yield omega, q


SPECTRA_RECORD = {
    "spectrum-exponential": "holds",
    "spectrum-polynomial": "holds",
    "spectrum-step": "holds",
    "spectrum-exact-rank": "holds",
    "spectrum-flat-tail": "vacuous",
    "spectrum-kahan": "vacuous",
    "heads": "holds",
}
LOW_RANK_LADDER = tuple({"k": k} for k in (4, 8, 16, 32))
RANGE = """Y = A Omega with Omega (n, k+o) standard normal, Q an orthonormal basis of range(Y),
    E = A - Q Q^T A, tau^2 = sum_{j>k} sigma_j^2:"""
FRO_LOW = "|A - Q Q^T A|_F / |A|_F"
SPECTRAL_LOW = "|A - Q Q^T A|_2 / |A|_2"


@claim(
    "sketching.rsvd_fro",
    title="Randomized range finder, mean Frobenius error",
    statement=f"{RANGE} E |E|_F^2 <= (1 + k/(o-1)) tau^2 for o >= 2.",
    source=f"{HMT}, Theorem 10.5",
    status="published",
    kind="expectation",
    observes="|A - Q Q^T A|_F^2 / |A|_F^2, mean over draws",
    assumptions=(DENSE,),
    recorded=SPECTRA_RECORD,
    ladder=LOW_RANK_LADDER,
)
def _rsvd_fro(context: Context, *, k: int = 10, o: int = 10) -> Observations:
    instance = context.instance
    sigma = instance.svd[1]
    size = float(np.linalg.norm(sigma))
    values = [(_residual_norms(sigma, q)[0] / size) ** 2 for _, q in _ranges(context, k, o)]
    bound = (rsvd_expected(sigma, k, o) / size) ** 2
    trivial = (_matrix_trivial(instance)[0] / size) ** 2
    return Observations(values, bound, rank=k + o, trivial=trivial, rounding=1e-14)


def _register_rsvd_spectral(power: int) -> None:
    @claim(
        "sketching.rsvd_spectral" + ("_power" if power else ""),
        title="Randomized range finder, mean spectral error" + (", power scheme" if power else ""),
        statement=(
            f"{RANGE} E |E|_2 <= (1 + sqrt(k/(o-1))) sigma_(k+1) + (e sqrt(k+o)/o) tau."
            if not power
            else f"""{RANGE} but Y = (A A^T)^j A Omega: E |E|_2 <= [(1 + sqrt(k/(o-1)))
                sigma_(k+1)^q + (e sqrt(k+o)/o) (sum_(i>k) sigma_i^(2q))^(1/2)]^(1/q),
                q = 2j + 1; here j = 1."""
        ),
        source=f"{HMT}, " + ("Corollary 10.10" if power else f"Theorem 10.6; {NLALIB}"),
        status="published",
        kind="expectation",
        observes=SPECTRAL_LOW + ", mean over draws",
        assumptions=(DENSE,),
        recorded=SPECTRA_RECORD,
        constants={"j": float(power)},
        ladder=LOW_RANK_LADDER,
    )
    def observe(context: Context, *, k: int = 10, o: int = 10) -> Observations:
        instance = context.instance
        sigma = instance.svd[1]
        top = float(sigma[0])
        values = [_residual_norms(sigma, q)[1] / top for _, q in _ranges(context, k, o, power)]
        bound = rsvd_expected(sigma, k, o, "spectral", power=power) / top
        trivial = _matrix_trivial(instance)[1] / top
        return Observations(values, bound, rank=k + o, trivial=trivial, rounding=1e-7)


_register_rsvd_spectral(0)
_register_rsvd_spectral(1)


def _register_rsvd_tail(norm: str) -> None:
    fro = norm == "fro"

    @claim(
        f"sketching.rsvd_tail_{norm}",
        title=f"Randomized range finder, {'Frobenius' if fro else 'spectral'} error, tail",
        statement=f"{RANGE} for o >= 4 and t, u >= 1 "
        + (
            "|E|_F <= (1 + t sqrt(3k/(o+1))) tau + u t e sqrt(k+o)/(o+1) sigma_(k+1)"
            if fro
            else "|E|_2 <= (1 + t sqrt(3k/(o+1))) sigma_(k+1) + t e sqrt(k+o)/(o+1) tau "
            "+ u t e sqrt(k+o)/(o+1) sigma_(k+1)"
        )
        + ", failing with at most 2 t^-o + exp(-u^2/2).",
        source=f"{HMT}, Theorem {'10.7' if fro else '10.8'}",
        status="published",
        kind="tail",
        observes=FRO_LOW if fro else SPECTRAL_LOW,
        assumptions=(DENSE,),
        recorded=SPECTRA_RECORD,
        ladder=LOW_RANK_LADDER,
    )
    def observe(
        context: Context, *, k: int = 10, o: int = 10, t: float = 1.5, u: float = 3.0
    ) -> Observations:
        instance = context.instance
        sigma = instance.svd[1]
        which = 0 if fro else 1
        size = float(np.linalg.norm(sigma)) if fro else float(sigma[0])
        values = [_residual_norms(sigma, q)[which] / size for _, q in _ranges(context, k, o)]
        tail = rsvd_tail(sigma, k, o, t, u, norm)
        return Observations(
            values,
            tail.bound / size,
            delta=tail.failure,
            rank=k + o,
            trivial=_matrix_trivial(instance)[which] / size,
            rounding=1e-7,
        )


_register_rsvd_tail("fro")
_register_rsvd_tail("spectral")

FLOOR_RECORD = {
    "reference": "holds",
    "spiked": "holds",
    **dict.fromkeys(
        (x for x in SPECTRA_RECORD if x != "heads"),
        "holds",
    ),
    "heads": "holds",
}


@claim(
    "sketching.rsvd_structure",
    title="Randomized range finder, every draw",
    statement=f"""{RANGE} with Omega1 = V_k^T Omega of full row rank and Omega2 the rest of
        V^T Omega, |E|_F^2 <= |Sigma2|_F^2 + |Sigma2 Omega2 Omega1^+|_F^2.""",
    source=f"{HMT}, Theorem 9.1; {NLALIB}",
    status="published",
    kind="inequality",
    observes="|A - Q Q^T A|_F^2 / |A|_F^2 against the right side of the same draw",
    assumptions=(DENSE,),
    recorded={name: x for name, x in FLOOR_RECORD.items() if name != "reference"},
    ladder=LOW_RANK_LADDER,
)
def _rsvd_structure(context: Context, *, k: int = 10, o: int = 10) -> Observations:
    sigma = context.instance.svd[1]
    size = float(np.sum(sigma**2))
    values, bounds = [], []
    for omega, q in _ranges(context, k, o):
        rest = sigma[k:, None] * (omega[k:] @ np.linalg.pinv(omega[:k]))
        values.append(_residual_norms(sigma, q)[0] ** 2 / size)
        bounds.append((_square(sigma[k:]) + _square(rest)) / size)
    return Observations(values, bounds, rank=k + o, rounding=1e-14)


@claim(
    "sketching.eckart_young",
    title="Nothing of rank r beats the truncated decomposition",
    statement="""For every M of rank at most r: |A - M|_F >= (sum_{j>r} sigma_j^2)^(1/2) and
        |A - M|_2 >= sigma_(r+1).""",
    source="Eckart and Young, Psychometrika 1 (1936); Mirsky (1960)",
    status="published",
    kind="inequality",
    observes=(
        "floor over error, the larger of the two norms, for M = Q Q^T A, Q a basis of A S^T, "
        "S gaussian (r, n)"
    ),
    assumptions=(DENSE,),
    recorded=FLOOR_RECORD,
    ladder=tuple({"rank": r} for r in (4, 8, 16, 32)),
)
def _eckart_young(context: Context, *, rank: int = 4) -> Observations:
    sigma = context.instance.svd[1]
    context.require(rank < len(sigma), f"r = {rank} of at most {len(sigma)} - 1")
    floors = [float(eckart_young_floor(sigma, rank, norm)) for norm in ("fro", "spectral")]
    sizes = (float(np.linalg.norm(sigma)), float(sigma[0]))
    values = []
    for omega in _test_matrices(context, rank):
        errors = _residual_norms(sigma, _range(sigma[:, None] * omega))
        # Floors of this size are the rounding of an error of zero.
        values.append(
            max(
                f / e if f > 1e-7 * size else 0.0
                for f, e, size in zip(floors, errors, sizes, strict=True)
            )
        )
    return Observations(values, 1.0, rank=rank, rounding=1e-6)


@claim(
    "sketching.eckart_young_attained",
    title="The truncated decomposition attains the floor",
    statement="""M = sum_{j<=r} sigma_j u_j v_j^T has rank r,
        |A - M|_F = (sum_{j>r} sigma_j^2)^(1/2) and |A - M|_2 = sigma_(r+1).""",
    source="Eckart and Young, Psychometrika 1 (1936); Mirsky (1960)",
    status="published",
    kind="existence",
    observes="|A - M|_F and |A - M|_2 over |A|_F, from the dense matrices",
    assumptions=(DENSE,),
    recorded=FLOOR_RECORD,
    ladder=tuple({"rank": r} for r in (4, 8, 16, 32)),
)
def _eckart_young_attained(context: Context, *, rank: int = 4) -> Observations:
    instance = context.instance
    u, sigma, vt = instance.svd
    context.require(rank < len(sigma), f"r = {rank} of at most {len(sigma)} - 1")
    rest = instance.a - (u[:, :rank] * sigma[:rank]) @ vt[:rank]
    size = float(np.linalg.norm(sigma))
    values = [float(np.linalg.norm(rest)) / size, _spectral(rest) / size]
    bounds = [float(eckart_young_floor(sigma, rank, x)) / size for x in ("fro", "spectral")]
    return Observations(values, bounds, rank=rank, rounding=1e-12)


# --- norms after the fact ---------------------------------------------------------------------


def _rest(instance: Instance) -> Array:
    """Return the singular values of ``B = A - A_k``, padded in front: k = 8 where there are more.

    B is what a truncated decomposition leaves, A itself where the rank is one.
    """
    sigma = instance.svd[1]
    rank = int(np.count_nonzero(sigma > 1e-10 * sigma[0]))
    k = min(8, rank - 1)
    out: Array = np.where((np.arange(len(sigma)) < k) | (np.arange(len(sigma)) >= rank), 0.0, sigma)
    return out


def _images(context: Context, r: int, rest: Array) -> Iterator[Array]:
    """Yield ``|B w_i|`` (r,) for standard normal w_i."""
    for omega in _test_matrices(context, r):
        yield np.linalg.norm(rest[:, None] * omega, axis=0)


REST = "B = A - A_8, what a truncated decomposition leaves (A itself where it has rank 1)"
PROBE_LADDER = tuple({"r": r} for r in (2, 4, 8, 16))


def _register_posterior(form: str) -> None:
    exact = form == "exact"

    @claim(
        f"sketching.posterior_{form}",
        title=f"Upper bound of a spectral norm after the fact, {form}",
        statement="""w_1, ..., w_r standard normal: |B|_2 <= """
        + (
            "max_i |B w_i|/u with u = sqrt(2) erfinv(delta^(1/r))"
            if exact
            else "alpha sqrt(2/pi) max_i |B w_i|, alpha = delta^(-1/r),"
        )
        + " with probability at least 1 - delta.",
        source=(
            "derived: |B w| >= sigma_1 |g|" if exact else f"{HMT}, Lemma 4.1 and equation (4.3)"
        ),
        status="derived" if exact else "published",
        kind="tail",
        observes=f"|B|_2 over the bound; {REST}",
        assumptions=(DENSE,),
        recorded={"spectrum-exponential": "holds", "heads": "holds"},
        ladder=PROBE_LADDER,
    )
    def observe(context: Context, *, r: int = 8, delta: float = 0.05) -> Observations:
        rest = _rest(context.instance)
        factor = float(posterior_factor(r, delta, form=form))
        top = float(rest.max())
        values = [top / (factor * float(x.max())) for x in _images(context, r, rest)]
        return Observations(values, 1.0, delta=delta, rank=r)


_register_posterior("exact")
_register_posterior("hmt")


@claim(
    "sketching.posterior_rank_one",
    title="The bound after the fact is exact for rank one",
    statement="""B of rank 1, w_1, ..., w_r standard normal:
        P(|B|_2 > max_i |B w_i|/u) = delta for u = sqrt(2) erfinv(delta^(1/r)).""",
    source="derived: |B w| = sigma_1 |g|",
    status="derived",
    kind="equality",
    observes="rate at which |B|_2 exceeds the bound",
    assumptions=(DENSE,),
    recorded={"rank-one": "holds"},
    ladder=PROBE_LADDER,
)
def _posterior_rank_one(context: Context, *, r: int = 2, delta: float = 0.25) -> Observations:
    rest = _rest(context.instance)
    context.require(np.count_nonzero(rest) == 1, "needs a matrix of rank 1")
    factor, top = float(posterior_factor(r, delta)), float(rest.max())
    values = [float(top > factor * float(x.max())) for x in _images(context, r, rest)]
    return Observations(values, delta, rank=r)


@claim(
    "sketching.power_lower",
    title="Power iteration never exceeds the norm",
    statement="|B x|/|x| <= |B|_2 for the iterates x = (B^T B)^j w of any w.",
    source="definition of the norm",
    status="derived",
    kind="inequality",
    observes=f"power iteration over |B|_2; {REST}",
    assumptions=(DENSE,),
    recorded={"rank-one": "holds", "spectrum-exponential": "holds", "heads": "holds"},
    ladder=tuple({"iterations": j} for j in (1, 2, 4, 8)),
)
def _power_lower(context: Context, *, iterations: int = 8) -> Observations:
    rest = _rest(context.instance)
    top = float(rest.max())
    values = []
    for omega in _test_matrices(context, 1):
        x = omega[:, 0]
        best = 0.0
        for _ in range(iterations):
            x = x / np.linalg.norm(x)
            best = max(best, float(np.linalg.norm(rest * x)))
            x = rest * rest * x
        values.append(best / top)
    return Observations(values, 1.0, rank=iterations)


@claim(
    "sketching.hutchinson_mean",
    title="Frobenius norm from products, mean",
    statement="F = mean_i |B w_i|^2 with w_1, ..., w_r standard normal: E F = |B|_F^2.",
    source="Hutchinson (1990); derived",
    status="published",
    kind="equality",
    observes=f"F / |B|_F^2, mean over draws; {REST}",
    assumptions=(DENSE,),
    recorded={"rank-one": "holds", "spectrum-exponential": "holds", "heads": "holds"},
    ladder=PROBE_LADDER,
)
def _hutchinson_mean(context: Context, *, r: int = 16) -> Observations:
    rest = _rest(context.instance)
    size = _square(rest)
    values = [_square(x) / r / size for x in _images(context, r, rest)]
    return Observations(values, 1.0, rank=r)


@claim(
    "sketching.hutchinson_tail",
    title="Frobenius norm from products, tail",
    statement="""F = mean_i |B w_i|^2 with w_1, ..., w_r standard normal, any B:
        P(|F - |B|_F^2| >= eps |B|_F^2) <= 2 exp(-(r/2)(eps - ln(1+eps))), eps <= 1; at most delta
        once r >= 2 ln(2/delta)/(eps - ln(1+eps)).""",
    source="derived: a matrix of rank 1 is the worst",
    status="derived",
    kind="tail",
    observes=f"|F/|B|_F^2 - 1|; {REST}",
    assumptions=(DENSE,),
    recorded={"rank-one": "holds", "spectrum-exponential": "holds", "heads": "holds"},
    ladder=EPS_LADDER,
)
def _hutchinson_tail(context: Context, *, eps: float = 0.5, delta: float = 0.05) -> Observations:
    rest = _rest(context.instance)
    size = _square(rest)
    r = int(hutchinson_min_dim(eps, delta))
    values = [abs(_square(x) / r / size - 1) for x in _images(context, r, rest)]
    return Observations(values, eps, delta=delta, rank=r, trivial=1.0)
