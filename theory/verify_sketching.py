"""Check the statements of sketching.md, and write its tables and its figure."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from _chapter import Chapter, Checks, Table, new_figure, number
from scipy.fft import dct

from sketchattn import theory
from sketchattn.theory import sketching

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHAPTER = Chapter(__file__)


def doubled(kind: str, r: int, n: int, rng: np.random.Generator, **parameters: Any) -> Any:
    """Return an operator that is twice too long, for claims that draw one vector a trial."""
    return 2.0 * theory.default_factory(kind, r, n, rng, **parameters).to_dense()


# --- verdicts -----------------------------------------------------------------------------------

KINDS = (
    *("gaussian", "rademacher", "uniform", "sparse", "less_uniform"),
    *("countsketch", "sjlt", "osnap", "srht", "dct", "haar"),
)
CHAPTER.verdicts(
    "moments",
    [
        *((f"sketching.moment_{kind}", "reference") for kind in KINDS),
        ("sketching.moment_dct_as_hadamard", "spike"),
    ],
)
CHAPTER.verdicts(
    "vectors",
    [
        *(
            (f"sketching.jl_norm_{kind}", "clusters")
            for kind in ("gaussian", "rademacher", "uniform", "sparse")
        ),
        *(
            (f"sketching.jl_norm_{kind}", "clusters")
            for kind in ("countsketch", "sjlt", "srht", "haar", "very_sparse")
        ),
        ("sketching.jl_sparse_without_dimension", "spike"),
        *(
            (f"sketching.jl_pairs_{kind}", "clusters")
            for kind in ("gaussian", "rademacher", "sparse", "exact_gaussian")
        ),
        ("sketching.jl_pairs_dasgupta_gupta", "clusters"),
        ("sketching.jl_pairs_achlioptas", "clusters"),
        ("sketching.jl_inner_gaussian", "clusters"),
        ("sketching.jl_inner_rademacher", "clusters"),
    ],
)
CHAPTER.verdicts(
    "subspaces",
    [
        ("sketching.ose_gaussian", "subspace-512"),
        ("sketching.ose_gaussian_loose", "subspace-1024"),
        ("sketching.ose_gaussian_sv", "subspace-512"),
        ("sketching.ose_markov_countsketch", "subspace-4096"),
        ("sketching.ose_markov_sjlt", "subspace-4096"),
        ("sketching.ose_markov_osnap", "subspace-4096"),
        ("sketching.ose_markov_srht", "subspace-4096"),
        # Fewer rows than by default: dense signs cost most.
        ("sketching.ose_markov_rademacher", "subspace-4096", {"eps": 0.9}),
        ("sketching.ose_srht", "subspace-4096"),
        ("sketching.ose_sjlt", "subspace-4096"),
    ],
    controls={"sketching.ose_sjlt": None},  # vacuous: nothing is drawn
)
CHAPTER.verdicts(
    "products",
    [
        ("sketching.amm_jl_moment", "clusters"),
        ("sketching.amm_markov", "clusters"),
        ("sketching.amm_entrywise", "clusters"),
        ("sketching.amm_gaussian_columns", "clusters"),
        ("sketching.amm_embedding", "reference"),
        ("sketching.amm_jl_moment", "reference"),
    ],
)
CHAPTER.verdicts(
    "lowrank",
    [
        ("sketching.eckart_young", "spectrum-exponential"),
        ("sketching.eckart_young_attained", "spectrum-exponential"),
        ("sketching.rsvd_structure", "spectrum-exponential"),
        ("sketching.rsvd_fro", "spectrum-exponential"),
        ("sketching.rsvd_fro", "spectrum-flat-tail"),
        ("sketching.rsvd_spectral", "spectrum-exponential"),
        ("sketching.rsvd_spectral_power", "spectrum-exponential"),
        ("sketching.rsvd_tail_fro", "spectrum-polynomial"),
        ("sketching.rsvd_tail_spectral", "spectrum-polynomial"),
    ],
    controls={"sketching.eckart_young_attained": None},  # nothing is drawn
)
CHAPTER.verdicts(
    "norms",
    [
        ("sketching.posterior_exact", "spectrum-exponential"),
        ("sketching.posterior_hmt", "spectrum-exponential"),
        ("sketching.posterior_rank_one", "rank-one"),
        ("sketching.power_lower", "spectrum-exponential"),
        ("sketching.hutchinson_mean", "rank-one"),
        ("sketching.hutchinson_tail", "rank-one"),
    ],
    controls={"sketching.power_lower": doubled},
)

# --- numbers ------------------------------------------------------------------------------------

SHOWN = ("gaussian", "countsketch", "srht")
Outcome = tuple[float, Any]


def signs(r: int, n: int) -> Iterator[Outcome]:
    """Yield every matrix of signs with its probability."""
    for bits in itertools.product((-1.0, 1.0), repeat=r * n):
        yield 2.0 ** (-r * n), np.reshape(bits, (r, n)) / math.sqrt(r)


def columns(r: int, n: int, s: int) -> Iterator[Outcome]:
    """Yield every matrix with s signs in distinct rows of each column, scaled."""
    one = [
        (rows, bits)
        for rows in itertools.combinations(range(r), s)
        for bits in itertools.product((-1.0, 1.0), repeat=s)
    ]
    for chosen in itertools.product(one, repeat=n):
        x = np.zeros((r, n))
        for j, (rows, bits) in enumerate(chosen):
            x[list(rows), j] = bits
        yield 1 / len(one) ** n, x / math.sqrt(s)


def cosines(r: int, n: int) -> Iterator[Outcome]:
    """Yield every choice of distinct rows of ``sqrt(n/r) C D``."""
    transform = dct(np.eye(n), axis=0, norm="ortho")
    rows = list(itertools.combinations(range(n), r))
    for picked in rows:
        for bits in itertools.product((-1.0, 1.0), repeat=n):
            yield (
                2.0**-n / len(rows),
                math.sqrt(n / r) * transform[list(picked)] * np.array(bits),
            )


@CHAPTER.table("enumeration")
def enumeration(checks: Checks) -> Table:
    """Average the square error over all outcomes of small operators."""
    seen = theory.instances()["enumeration"]
    a, v = seen.a, seen.v
    cases: list[tuple[str, int, dict[str, int], Iterator[Outcome]]] = [
        ("rademacher", 2, {}, signs(2, 3)),
        ("countsketch", 2, {}, columns(2, 3, 1)),
        ("sjlt", 3, {"s": 2}, columns(3, 3, 2)),
        ("dct", 2, {}, cosines(2, 3)),
    ]
    rows = []
    for kind, r, parameters, outcomes in cases:
        count, mean, bias = 0, 0.0, np.zeros((2, 2))
        for probability, s in outcomes:
            error = a @ s.T @ (s @ v) - a @ v
            mean += probability * float(np.sum(error**2))
            bias += probability * error
            count += 1
        formula = float(sketching.amm_expected_sqerr(kind, a, v, r, **parameters))
        checks.equal(f"mean square error of {kind}", mean, formula, relative=1e-12)
        checks.equal(f"bias of {kind}", float(np.abs(bias).max()), 0.0, relative=0, absolute=1e-12)
        rows.append((kind, str(r), str(count), number(mean, 6), number(formula, 6)))
    return Table(("kind", "r", "outcomes", "mean over all outcomes", "formula"), rows)


@CHAPTER.table("ranks")
def ranks(checks: Checks) -> Table:
    """Tabulate mean square errors over r: the formulas, and means of 400 draws."""
    rows = []
    for r in (4, 8, 16, 32, 48):
        cells = [str(r)]
        for kind in SHOWN:
            found = theory.check(f"sketching.moment_{kind}", "reference", rank=r, trials=400)
            # Six standard errors of the mean: 2e-9 for a normal one.
            assert found.interval is not None  # a mean has one
            error = (found.interval[1] - found.interval[0]) / (2 * 1.96)
            checks.equal(
                f"{kind}, r = {r}", found.observed, found.bound, relative=0, absolute=6 * error
            )
            cells += [number(found.bound), number(found.observed)]
        rows.append(tuple(cells))
    seen = theory.instances()["reference"]
    a, v = seen.a, seen.v
    s = sketching.amm_stats(a, v)
    exact = {"gaussian": (s.a + s.b) / 16, "countsketch": (s.a + s.b - 2 * s.c) / 16}
    exact["srht"] = 48 / 63 * exact["countsketch"]
    for kind, value in exact.items():
        formula = float(sketching.amm_expected_sqerr(kind, a, v, 16))
        checks.equal(f"formula of {kind}", formula, value, relative=1e-12)
    header = ("r", *(x for kind in SHOWN for x in (kind, f"{kind}, seen")))
    return Table(header, rows)


@CHAPTER.table("points")
def points(checks: Checks) -> Table:
    """Tabulate rows that keep all distances of N points, delta = 0.05."""
    rows = []
    for count in (512, 4096):
        for eps in (0.1, 0.3, 0.5):
            closed = int(sketching.jl_min_dim(count, eps, 0.05))
            rate = eps**2 / 4 - eps**3 / 6
            checks.equal(
                f"rows for N = {count}, eps = {eps}",
                closed,
                math.ceil(math.log(count * (count - 1) / 0.05) / rate),
                relative=1e-12,
            )
            found = (
                int(sketching.jl_min_dim_dg(count, eps)),
                closed,
                int(sketching.jl_min_dim(count, eps, 0.05, form="larger")),
                int(sketching.jl_min_dim(count, eps, 0.05, form="both")),
                int(sketching.jl_min_dim_exact_gaussian(count * (count - 1) // 2, eps, 0.05)),
                int(sketching.jl_min_dim_achlioptas(count, eps)),
            )
            checks.at_most(f"exact rows for N = {count}, eps = {eps}", found[4], found[3])
            rows.append((str(count), number(eps), *map(str, found)))
    header = (
        "N",
        "eps",
        "Dasgupta-Gupta, fails with 1 - 1/N",
        "closed form",
        "twice the upper tail",
        "both tails",
        "exact chi-square",
        "Achlioptas, beta = 1",
    )
    return Table(header, rows)


@CHAPTER.table("spike")
def spike(checks: Checks) -> Table:
    """Tabulate failures of a very sparse sketch on e_1, s = r, eps = 1/2."""
    rows = []
    for r in (16, 64, 256):
        exact = 1 - r * (1 / r) * (1 - 1 / r) ** (r - 1)
        claimed = float(sketching.jl_tail_gaussian(r, 0.5, form="closed"))
        vector = np.eye(512, 1)
        found = theory.check(
            "sketching.jl_sparse_without_dimension",
            (vector.T, vector),
            rank=r,
            s=float(r),
            trials=400,
        )
        assert found.failures is not None  # a tail counts them
        rate = found.failures / found.trials
        # Five standard deviations of a rate of 400 trials.
        checks.equal(
            f"rate at r = {r}", rate, exact, relative=0, absolute=5 * math.sqrt(0.25 / 400)
        )
        checks.equal(
            f"closed form at r = {r}",
            claimed,
            min(1.0, 2 * math.exp(-r * (1 / 16 - 1 / 48))),
            relative=1e-12,
        )
        chebyshev = int(sketching.jl_sparse_chebyshev([1.0], float(r), 0.5, 0.05))
        rows.append((str(r), number(claimed), number(exact), number(rate), str(chebyshev)))
    header = ("r = s", "claimed at most", "exact rate", "seen", "rows by Chebyshev, delta = 0.05")
    return Table(header, rows)


@CHAPTER.table("embeddings")
def embeddings(checks: Checks) -> Table:
    """Tabulate rows that embed q dimensions, eps = 1/2, delta = 0.05."""
    rows = []
    for q in (5, 16, 64):
        sharp = int(sketching.ose_gaussian(q, 0.5, 0.05))
        loose = int(sketching.ose_gaussian(q, 0.5, 0.05, sharp=False))
        checks.at_most(f"sharp rows for q = {q}", sharp, loose)
        markov = int(sketching.ose_countsketch(q, 0.5, 0.05))
        checks.equal(f"Markov, q = {q}", markov, (q * q + q) / (0.05 * 0.25), relative=1e-12)
        srht = int(sketching.ose_srht(4096, q, 0.5, 0.05, cap=False))
        leverage = int(sketching.ose_leverage(q, 1.0, 0.5, 0.05))
        sparse = sketching.ose_sjlt(q, 0.5, 0.05)
        rows.append((str(q), *map(str, (loose, sharp, markov, srht, leverage, sparse.r, sparse.s))))
    header = (
        "q",
        "gaussian, published",
        "gaussian, sharp",
        "Markov",
        "srht, n = 4096, before the cap",
        "leverage",
        "sjlt, rows",
        "sjlt, entries a column",
    )
    return Table(header, rows)


@CHAPTER.table("factors")
def factors(checks: Checks) -> Table:
    """Tabulate the factors of the norm estimates after the fact."""
    rows = []
    for r, delta in ((2, 0.25), (5, 0.01), (10, 0.1)):
        exact = float(sketching.posterior_factor(r, delta))
        hmt = float(sketching.posterior_factor(r, delta, form="hmt"))
        checks.at_most(f"exact factor, r = {r}", exact, hmt)
        # The exact factor is that with which r normal numbers are all below 1/factor.
        miss = math.erf(1 / (exact * math.sqrt(2))) ** r
        checks.equal(f"rate of the exact factor, r = {r}", miss, delta, relative=1e-9)
        rate = math.erf(1 / (hmt * math.sqrt(2))) ** r
        rows.append((str(r), number(delta), number(exact, 4), number(hmt, 4), number(rate, 4)))
    header = ("r", "delta", "exact factor", "published factor", "its rate for rank 1")
    return Table(header, rows)


@CHAPTER.figure
def figure(tables: Mapping[str, Table]) -> Figure:
    """Draw mean square errors over r: formulas as lines, means of draws as marks."""
    table = tables["ranks"]
    drawn = new_figure()
    axes = drawn.add_subplot()
    r = table.column("r")
    for kind, mark, colour in zip(SHOWN, "os^", ("#0072B2", "#D55E00", "#009E73"), strict=True):
        axes.plot(r, table.column(kind), "-", color=colour, label=f"{kind}: formula")
        seen = table.column(f"{kind}, seen")
        axes.plot(r, seen, mark, color=colour, markersize=5, label=f"{kind}: mean of 400 draws")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_xlabel("r")
    axes.set_ylabel("mean square error of A S^T S V")
    axes.grid(True, which="both", color="0.92", linewidth=0.5)
    axes.legend(fontsize=8)
    return drawn


if __name__ == "__main__":
    sys.exit(CHAPTER.main())
