"""Claims: randomized range finders, floors, and norms estimated after the fact."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ..engine.arguments import Array
from ..engine.assumptions import DENSE
from ..engine.audited import sketched
from ..engine.instances import Instance, Made, cosines, instance
from ..engine.observers import (
    BETTER,
    ROUNDING,
    on_heads,
    quotient,
    spectral,
    square,
)
from ..engine.records import Observations
from ..engine.registry import Context, claim
from .lowrank import (
    eckart_young_floor,
    hutchinson_min_dim,
    known_spectrum,
    posterior_factor,
    rsvd_expected,
    rsvd_tail,
)
from .shared import EPS_LADDER, HMT, NLALIB, range_basis, residual_norms


def _spectrum(name: str) -> None:
    @instance(f"spectrum-{name}", f"80 x 60 with the {name} spectrum of known_spectrum")
    def build() -> Made:
        return known_spectrum(name)[0], cosines(60, 4)


for _name in ("polynomial", "exponential", "step", "spiked", "flat-tail", "exact-rank", "kahan"):
    _spectrum(_name)

# --- low rank: all in the coordinates of the singular vectors of A --------------------------


def _matrix_trivial(instance: Instance) -> tuple[float, float]:
    """Return Frobenius and spectral error of the better of the zero and the mean matrix."""

    def compute() -> tuple[float, float]:
        sigma = instance.svd[1]
        fro, top = float(np.linalg.norm(sigma)), float(sigma[0])
        if instance.stochastic:
            centred = instance.a - 1 / instance.n
            fro, top = min(fro, float(np.linalg.norm(centred))), min(top, spectral(centred))
        return fro, top

    return instance.cached("matrix trivial", compute)


def _test_matrices(context: Context, width: int) -> Iterator[Array]:
    """Yield ``V^T Omega`` (min(m, n), width) for Gaussian test matrices Omega (n, width)."""
    right = np.ascontiguousarray(context.instance.svd[2].T)
    for image in sketched(context, "gaussian", width, right, "right"):
        yield math.sqrt(width) * image.T


def _ranges(context: Context, k: int, o: int, power: int = 0) -> Iterator[tuple[Array, Array]]:
    """Yield the test matrix and the basis that a randomized range finder makes of it."""
    sigma = context.instance.svd[1]
    smaller = len(sigma)
    context.require(k + o < smaller, f"k + o = {k + o} columns of at most {smaller} - 1")
    for omega in _test_matrices(context, k + o):
        q = range_basis(sigma[:, None] * omega)
        for _ in range(power):
            q = range_basis(sigma[:, None] * range_basis(sigma[:, None] * q))
        yield omega, q


SPECTRA_RECORD = {
    "spectrum-exponential": "holds",
    "spectrum-polynomial": "holds",
    "spectrum-step": "holds",
    "spectrum-exact-rank": "holds",
    "spectrum-kahan": "holds",
    "spectrum-flat-tail": "vacuous",
}
TAIL_RECORD = {**SPECTRA_RECORD, "spectrum-exponential": "vacuous", "spectrum-kahan": "vacuous"}
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
    recorded={**SPECTRA_RECORD, **on_heads("holds", vacuous="1.9 2.1")},
    ladder=LOW_RANK_LADDER,
)
def _rsvd_fro(context: Context, *, k: int = 10, o: int = 10) -> Observations:
    instance = context.instance
    sigma = instance.svd[1]
    size = float(np.linalg.norm(sigma))
    values = [(residual_norms(sigma, q)[0] / size) ** 2 for _, q in _ranges(context, k, o)]
    bound = (rsvd_expected(sigma, k, o) / size) ** 2
    trivial = (_matrix_trivial(instance)[0] / size) ** 2
    return Observations(
        values, bound, rank=k + o, predictor=BETTER, trivial=trivial, rounding=1e-14
    )


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
        recorded={
            **SPECTRA_RECORD,
            **(
                on_heads("holds")
                if power
                else on_heads("vacuous", holds="2.6 3.4 4.1 4.8 5.4 5.11")
            ),
        },
        constants={"j": float(power)},
        ladder=LOW_RANK_LADDER,
    )
    def observe(context: Context, *, k: int = 10, o: int = 10) -> Observations:
        instance = context.instance
        sigma = instance.svd[1]
        top = float(sigma[0])
        values = [residual_norms(sigma, q)[1] / top for _, q in _ranges(context, k, o, power)]
        bound = rsvd_expected(sigma, k, o, "spectral", power=power) / top
        trivial = _matrix_trivial(instance)[1] / top
        return Observations(
            values, bound, rank=k + o, predictor=BETTER, trivial=trivial, rounding=1e-7
        )


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
        recorded={
            **TAIL_RECORD,
            **on_heads("vacuous", holds=("" if fro else "2.6 ") + "3.4 4.8 5.4 5.11"),
        },
        ladder=LOW_RANK_LADDER,
    )
    def observe(
        context: Context, *, k: int = 10, o: int = 10, t: float = 1.5, u: float = 3.0
    ) -> Observations:
        instance = context.instance
        sigma = instance.svd[1]
        which = 0 if fro else 1
        size = float(np.linalg.norm(sigma)) if fro else float(sigma[0])
        values = [residual_norms(sigma, q)[which] / size for _, q in _ranges(context, k, o)]
        tail = rsvd_tail(sigma, k, o, t, u, norm)
        return Observations(
            values,
            tail.bound / size,
            delta=tail.failure,
            rank=k + o,
            predictor=BETTER,
            trivial=_matrix_trivial(instance)[which] / size,
            rounding=1e-7,
        )


_register_rsvd_tail("fro")
_register_rsvd_tail("spectral")

FLOOR_RECORD = {
    "reference": "holds",
    "spiked": "holds",
    **dict.fromkeys(SPECTRA_RECORD, "holds"),
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
        values.append(residual_norms(sigma, q)[0] ** 2 / size)
        bounds.append((square(sigma[k:]) + square(rest)) / size)
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
        errors = residual_norms(sigma, range_basis(sigma[:, None] * omega))
        # Both are rounded in the size of A.
        each = zip(floors, errors, sizes, strict=True)
        values.append(max(quotient(f, e, ROUNDING * size) for f, e, size in each))
    return Observations(values, 1.0, rank=rank)


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
    values = [float(np.linalg.norm(rest)) / size, spectral(rest) / size]
    bounds = [float(eckart_young_floor(sigma, rank, x)) / size for x in ("fro", "spectral")]
    return Observations(values, bounds, rank=rank, rounding=1e-12)


# --- norms after the fact -------------------------------------------------------------------


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
    size = square(rest)
    values = [square(x) / r / size for x in _images(context, r, rest)]
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
    size = square(rest)
    r = int(hutchinson_min_dim(eps, delta))
    values = [abs(square(x) / r / size - 1) for x in _images(context, r, rest)]
    return Observations(values, eps, delta=delta, rank=r, predictor="zero", trivial=1.0)
