"""Claims: estimates of exp(x.y) by random features, and their errors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ...problem import AttentionProblem
from ...zoo.performer import FEATURES, feature_mse, gaussian_directions
from ..engine.arguments import Array, ceil, real
from ..engine.instances import instance
from ..engine.observers import (
    EPS,
    few,
    implemented,
    is_default,
    problem_of,
    quotient,
)
from ..engine.records import Observations, Series
from ..engine.registry import Context, claim
from .features import (
    MOST_FEATURES,
    PAPER,
    SMALL,
    chebyshev_features,
    feature_kurtosis,
    smreg_ratio,
    theorem2_gain,
)
from .shared import DERIVED, PAIRS, scaled

# Sets of directions in one trial: independent ones are cheap, orthogonal ones need decompositions.
BATCH, BATCH_ORTHOGONAL = 200, 100


# --- instances -----------------------------------------------------------------------------------


def _pair(x: list[float], y: list[float]) -> AttentionProblem:
    return AttentionProblem(np.array([x]), np.array([y]), np.ones((1, 1)), scale=1.0)


@instance("golden-pair", "x = (.5,-.2,.1,.3), y = (.1,.2,-.2,.15): one weight, d = 4")
def _golden_pair() -> AttentionProblem:
    return _pair([0.5, -0.2, 0.1, 0.3], [0.1, 0.2, -0.2, 0.15])


@instance("opposite-pair", "x = -y = (.7,.2,-.3,.4): positive features have no error at all")
def _opposite_pair() -> AttentionProblem:
    return _pair([0.7, 0.2, -0.3, 0.4], [-0.7, -0.2, 0.3, -0.4])


@instance("diagonal-pair", "x = y = -(1,1,1,1)/4: where directions without their signs are seen")
def _diagonal_pair() -> AttentionProblem:
    return _pair([-0.25] * 4, [-0.25] * 4)


@instance("far-pair", "x = -y = (2,0,0,0): |x - y|^2 = 16, where cosines of chi variables add up")
def _far_pair() -> AttentionProblem:
    return _pair([2.0, 0.0, 0.0, 0.0], [-2.0, 0.0, 0.0, 0.0])


@instance("faint", "24 queries, 512 keys of size .2, d = 4: logits near zero, few features suffice")
def _faint() -> AttentionProblem:
    rng = np.random.default_rng(31)
    q, k = (0.2 * rng.standard_normal((n, 4)) for n in (24, 512))
    return AttentionProblem(q, k, rng.standard_normal((512, 3)), scale=0.5)


@instance("unit-gaussian", "512 queries and keys, d = 64, iid Gaussian: too much for features")
def _unit_gaussian() -> AttentionProblem:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((512, 64)) for _ in range(3))
    return AttentionProblem(q, k, v)


# --- what observers share ------------------------------------------------------------------------

PAIR_RECORD = {"golden-pair": "holds", "blocks": "holds", "heads": "holds"}


class _Pair(NamedTuple):
    """Hold ``x`` and ``y`` with ``x . y`` a logit, and the numbers that errors depend on."""

    x: Array
    y: Array

    @property
    def s(self) -> float:
        return float((self.x + self.y) @ (self.x + self.y))

    @property
    def t(self) -> float:
        return float((self.x - self.y) @ (self.x - self.y))

    @property
    def n2(self) -> float:
        return float(self.x @ self.x + self.y @ self.y)

    @property
    def kernel(self) -> float:
        return math.exp(float(self.x @ self.y))

    def shrunk(self, most: float) -> _Pair:
        """Return the pair, or where it is too long a multiple with |x +- y|^2 at most that."""
        size = max(self.s, self.t)
        factor = math.sqrt(most / size) if size > most else 1.0
        return _Pair(factor * self.x, factor * self.y)


def _first_pair(context: Context) -> _Pair:
    """Return a pair that does not depend on the draws: the first query, the middle key."""
    x, y = scaled(problem_of(context.instance))
    return _Pair(x[0], y[len(y) // 2])


def _some_pair(context: Context, rng: np.random.Generator) -> _Pair:
    x, y = scaled(problem_of(context.instance))
    return _Pair(x[rng.integers(len(x))], y[rng.integers(len(y))])


def _directions(
    context: Context, rng: np.random.Generator, r: int, d: int, batch: int, **form: bool
) -> Array:
    """Return omega (batch, r, d): each set in blocks of its own."""
    blocks = -(-r // d)
    orthogonal = form.get("orthogonal", True)
    rows = batch * blocks * d if orthogonal else batch * r
    if is_default(context):
        omega = gaussian_directions(rows, d, rng, **form)
    else:
        made = context.operator("directions", rows, d, rng, **form)
        omega = np.asarray(made, np.float64)
    return np.asarray(omega.reshape(batch, -1, d)[:, :r])


def _estimates(pair: _Pair, omega: Array, features: str) -> Array:
    """Return the estimate of exp(x.y) by each set of directions, written from the definition."""
    if features == "trigonometric":
        terms = math.exp(pair.n2 / 2) * np.cos(omega @ (pair.x - pair.y))
    else:
        u = omega @ (pair.x + pair.y)
        terms = math.exp(-pair.n2 / 2) * (np.exp(u) if features == "positive" else np.cosh(u))
    return np.asarray(terms.mean(axis=1))


def _mse(
    context: Context, pair: _Pair, r: int, features: str = "positive", *, orthogonal: bool = True
) -> float:
    """Return the mean square error by formula, or by the one that was handed in."""
    if is_default(context):
        return feature_mse(pair.x, pair.y, r, features, orthogonal=orthogonal)
    rng = np.random.default_rng(context.entropy)
    given = {"x": pair.x, "y": pair.y, "features": features, "orthogonal": orthogonal}
    return float(np.asarray(context.operator("feature_mse", r, len(pair.x), rng, **given)))


def _batch(d: int, *, orthogonal: bool = False, share: int = 1) -> int:
    """Return how many sets of directions one trial draws: fewer where they are long."""
    most = (BATCH_ORTHOGONAL if orthogonal else BATCH) // share
    return max(1, most if d <= 8 else most * 8 // d**2 if orthogonal else most * 8 // d)


# --- mean square errors --------------------------------------------------------------------------

_FORMULAS = {
    "positive": "SM^2 (e^s - 1)/r",
    "hyperbolic": "SM^2 (cosh s - 1)/r, from 2r features",
    "trigonometric": "e^n2 (1 - e^-t)^2/(2r)",
}


def _register_mse(features: str, orthogonal: bool) -> None:
    formula = _FORMULAS[features]
    if orthogonal:
        sign = ("e^n2", "e^-t", "-t/2") if features == "trigonometric" else ("e^-n2", "e^s", "s/2")
        formula += (
            ", for independent ones, less g sum_b r_b (r_b - 1)/r^2 with blocks of r_b rows and "
            f"g = {sign[0]} ({sign[1]} - 1F1(d; d/2; {sign[2]}))"
        )

    @claim(
        f"lowrank_baselines.mse_{features}" + ("_orthogonal" if orthogonal else ""),
        title=f"Mean square error of {features} features"
        + (", orthogonal directions" if orthogonal else ""),
        statement=f"""s = |x+y|^2, t = |x-y|^2, n2 = |x|^2 + |y|^2, r
            {"orthogonal" if orthogonal else "independent"} directions: the estimate of
            SM = exp(x.y) is unbiased with the mean square error {formula}.""",
        source=DERIVED if orthogonal else f"{PAPER}, Lemma 2",
        status="derived" if orthogonal else "published",
        kind="equality",
        observes="|estimate - SM|^2, mean over sets of directions; x, y shrunk to s, t <= .6",
        assumptions=PAIRS,
        recorded={"golden-pair": "holds", "blocks": "holds"} if orthogonal else PAIR_RECORD,
    )
    def observe(context: Context, *, rank: int | None = None) -> Observations:
        pair = _first_pair(context).shrunk(SMALL)
        d = len(pair.x)
        r = min(d, 4) if rank is None else rank
        batch = _batch(d, orthogonal=orthogonal)
        theory = _mse(context, pair, r, features, orthogonal=orthogonal)
        means, squares = [], []
        for rng in context.generators():
            omega = _directions(context, rng, r, d, batch, orthogonal=orthogonal)
            off = _estimates(pair, omega, features) - pair.kernel
            means.append(float(off.mean()) / pair.kernel)
            squares.append(float(off @ off) / batch)
        kurtosis = feature_kurtosis(pair.x, pair.y, features)
        spread = 0.0
        if not orthogonal and math.isfinite(kurtosis):
            spread = theory * math.sqrt(max((kurtosis - 3) / r + 2, 0.0) / batch)
        return Observations(
            squares,
            theory,
            rank=r,
            spread=spread,
            rounding=1e-13,
            series=(Series("estimate/SM - 1", means, 0.0),),
            notes=f"s = {pair.s:.3g}, t = {pair.t:.3g}, kurtosis {kurtosis:.3g}",
        )


for _features in FEATURES:
    for _orthogonal in (False, True):
        _register_mse(_features, _orthogonal)


@claim(
    "lowrank_baselines.hyperbolic",
    title="Two signs are better than two directions",
    statement="""MSE_hyp(r) = (1/2)(1 - e^-s) MSE_pos(r) for r independent directions; hence from 2r
        features MSE_hyp(r) <= MSE_pos(2r).""",
    source=f"{PAPER}, Lemma 2; the comparison derived",
    status="published",
    kind="inequality",
    observes="the larger of MSE_hyp(r)/MSE_pos(2r) and |MSE_hyp/((1 - e^-s) MSE_pos/2) - 1| + 1",
    assumptions=PAIRS,
    recorded=PAIR_RECORD,
)
def _hyperbolic(context: Context, *, rank: int = 4) -> Observations:
    values = []
    for rng in few(context, 100):
        pair = _some_pair(context, rng).shrunk(8.0 * rng.random())
        if pair.s < 1e-6:  # both errors are zero up to rounding
            continue
        hyp = _mse(context, pair, rank, "hyperbolic", orthogonal=False)
        once, twice = (_mse(context, pair, x, orthogonal=False) for x in (rank, 2 * rank))
        ratio = hyp / (-math.expm1(-pair.s) * once / 2)
        values += [hyp / twice, 1 + abs(ratio - 1)]
    context.require(bool(values), "x + y is zero for all pairs")
    return Observations(values, 1.0, rank=rank, rounding=1e-8)


def _mse_rounding(pair: _Pair, iid: float) -> float:
    """Return the rounding of both errors of a pair and of their difference.

    It is of the order s^2, and one of e^(s - n2) and a number near it.
    """
    return 8 * EPS * max(iid, math.exp(pair.s - pair.n2))


@claim(
    "lowrank_baselines.orthogonal_gain",
    title="Orthogonal directions never lose",
    statement="""Positive and hyperbolic features: MSE_ort(r) <= MSE(r) for every r, x and y, since
        g = e^-n2 sum_k (1 - a_k) s^k/k! with a_k = prod_(i<k) (d+i)/(d+2i) <= 1.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="MSE_ort/MSE, for pairs with s, t <= 8",
    assumptions=PAIRS,
    recorded={**PAIR_RECORD, "opposite-pair": "holds"},
)
def _orthogonal_gain(context: Context, *, rank: int = 6) -> Observations:
    values = []
    for rng in few(context, 100):
        pair = _some_pair(context, rng).shrunk(8.0 * rng.random())
        for features in ("positive", "hyperbolic"):
            ort, iid = (_mse(context, pair, rank, features, orthogonal=x) for x in (True, False))
            values.append(quotient(ort, iid, _mse_rounding(pair, iid)))
    return Observations(values, 1.0, rank=rank, rounding=1e-9)


@claim(
    "lowrank_baselines.orthogonal_trigonometric",
    title="Orthogonal directions of cosines can lose",
    statement="Trigonometric features: MSE_ort(r) <= MSE(r) for every r, x and y.",
    source=(
        "lowrank_baselines.orthogonal_gain, taken for all features; refuted: for d = 4 and "
        "t = |x-y|^2 = 16 two orthogonal directions have cosines of positive correlation"
    ),
    status="refuted",
    kind="inequality",
    observes="MSE_ort/MSE of d directions for one pair, shrunk to s, t <= 32",
    assumptions=PAIRS,
    recorded={"far-pair": "violated"},
)
def _orthogonal_trigonometric(context: Context) -> Observations:
    pair = _first_pair(context).shrunk(32.0)
    d = len(pair.x)
    name = "trigonometric"
    ort, iid = (_mse(context, pair, d, name, orthogonal=x) for x in (True, False))
    context.require(iid > 0, "x = y: the estimate is exact")
    return Observations([ort / iid], 1.0, rank=d, rounding=1e-9, notes=f"t = {pair.t:.3g}")


# --- directions and their signs ------------------------------------------------------------------


def _relative_estimates(context: Context, pair: _Pair, **form: bool) -> list[float]:
    """Return estimate/SM of d orthogonal directions, mean of a batch for each trial."""
    d = len(pair.x)
    batch = _batch(d, orthogonal=True, share=2)
    values = []
    for rng in context.generators():
        omega = _directions(context, rng, d, d, batch, **form)
        values.append(float(_estimates(pair, omega, "positive").mean()) / pair.kernel)
    return values


@claim(
    "lowrank_baselines.signed_unbiased",
    title="Orthogonal directions with the sign fix are unbiased",
    statement="""G = Qm Rm Gaussian, Qm <- Qm diag(sign Rm_ii): rows of Qm^T times norms of Gaussian
        vectors are N(0, I), so that the estimate is unbiased.""",
    source=f"{DERIVED}; Qm diag(sign Rm_ii) is Haar distributed",
    status="derived",
    kind="equality",
    observes="estimate/SM of d positive features, mean over directions; x, y shrunk to s <= 1",
    assumptions=PAIRS,
    recorded={"golden-pair": "holds", "diagonal-pair": "holds", "blocks": "holds"},
)
def _signed_unbiased(context: Context) -> Observations:
    pair = _first_pair(context).shrunk(1.0)
    values = _relative_estimates(context, pair, orthogonal=True, sign_fix=True)
    return Observations(values, 1.0, rank=len(pair.x), rounding=1e-13)


@claim(
    "lowrank_baselines.unsigned_unbiased",
    title="Without the sign fix they are not",
    statement="""Directions from the Qm of a Householder QR as it is give an unbiased estimate.""",
    source=(
        "released codes of FAVOR+, which leave the signs as QR returns them; refuted: the diagonal "
        "entries of the reflected columns are never positive, so that the law of Qm is not Haar's"
    ),
    status="refuted",
    kind="equality",
    observes="estimate/SM of d positive features, mean over directions; x, y shrunk to s <= 1",
    assumptions=PAIRS,
    recorded={"diagonal-pair": "violated"},
)
def _unsigned_unbiased(context: Context) -> Observations:
    pair = _first_pair(context).shrunk(1.0)
    values = _relative_estimates(context, pair, orthogonal=True, sign_fix=False)
    return Observations(values, 1.0, rank=len(pair.x), rounding=1e-13)


@claim(
    "lowrank_baselines.unsigned_entry",
    title="The first entry of an orthogonal matrix without its signs",
    statement="""Householder QR of a Gaussian matrix as LAPACK has it, d >= 2: Qm_11 <= 0 with
        E Qm_11 = -Gamma(d/2)/(sqrt(pi) Gamma((d+1)/2)); with the sign fix E Qm_11 = 0.""",
    source=f"{DERIVED}; released behaviour",
    status="derived",
    kind="equality",
    observes="Qm_11 without the fix, mean over matrices; with it as a second mean",
    assumptions=PAIRS,
    recorded={"golden-pair": "holds", "blocks": "holds", "nystrom-gaussian": "holds"},
)
def _unsigned_entry(context: Context) -> Observations:
    d = problem_of(context.instance).d
    context.require(d >= 2, "needs two dimensions: a matrix of one entry is not reflected")
    theory = -math.exp(math.lgamma(d / 2) - math.lgamma((d + 1) / 2)) / math.sqrt(math.pi)
    batch = _batch(d, orthogonal=True, share=4)
    found: dict[bool, list[float]] = {False: [], True: []}
    for rng in context.generators():
        for fixed, values in found.items():
            omega = _directions(context, rng, 1, d, batch, orthogonal=True, sign_fix=fixed)[:, 0]
            values.append(float((omega[:, 0] / np.linalg.norm(omega, axis=1)).mean()))
    fixed_series = Series("Qm_11 with the sign fix", found[True], 0.0)
    return Observations(found[False], theory, rank=d, series=(fixed_series,))


@claim(
    "lowrank_baselines.smreg",
    title="Directions of one length",
    statement="""All directions on the sphere of radius sqrt(d), in place of Gaussian lengths:
        E estimate = SM 0F1(; d/2; d s/4) e^(-s/2).""",
    source=DERIVED,
    status="derived",
    kind="equality",
    observes="estimate/SM of d positive features, mean over directions; x, y shrunk to s <= 1",
    assumptions=PAIRS,
    recorded=PAIR_RECORD,
)
def _smreg(context: Context) -> Observations:
    pair = _first_pair(context).shrunk(1.0)
    d = len(pair.x)
    values = _sphere_estimates(context, pair)
    theory = float(np.asarray(smreg_ratio(d, pair.s)))
    return Observations(values, theory, rank=d, rounding=1e-13)


def _sphere_estimates(context: Context, pair: _Pair) -> list[float]:
    d = len(pair.x)
    values = []
    for rng in context.generators():
        omega = _directions(context, rng, d, d, _batch(d, share=8), orthogonal=False)
        omega = math.sqrt(d) * omega / np.linalg.norm(omega, axis=2, keepdims=True)
        values.append(float(_estimates(pair, omega, "positive").mean()) / pair.kernel)
    return values


@claim(
    "lowrank_baselines.smreg_upper",
    title="The regularised kernel is below the softmax kernel",
    statement="""SMREG <= SM, at every s and d: 0F1(; d/2; d s/4) <= e^(s/2).""",
    source=f"{PAPER}, Theorem 1, the upper side; the lower side has a remainder o(.) that is not "
    "specified",
    status="published",
    kind="inequality",
    observes="SMREG/SM for pairs of queries and keys, shrunk to s <= 64",
    assumptions=PAIRS,
    recorded={**PAIR_RECORD, "opposite-pair": "holds"},
)
def _smreg_upper(context: Context) -> Observations:
    values = []
    for rng in few(context, 100):
        pair = _some_pair(context, rng).shrunk(64.0)
        d = len(pair.x)
        if is_default(context):
            values.append(float(np.asarray(smreg_ratio(d, pair.s))))
        else:
            found = context.operator("smreg_ratio", d, d, rng, s=pair.s)
            values.append(float(np.asarray(found)))
    return Observations(values, 1.0, rounding=1e-12)


# --- the theorem on orthogonal features ----------------------------------------------------------


def _theorem2_cases(context: Context) -> Iterator[tuple[_Pair, int]]:
    """Yield pairs and r in 2..d."""
    d = problem_of(context.instance).d
    context.require(d >= 2, "needs two dimensions: r <= d directions, and one has no gain")
    for rng in context.generators():
        pair = _some_pair(context, rng).shrunk(0.05 + 8.0 * rng.random())
        yield pair, int(rng.integers(2, d + 1))


# Gains with a larger relative rounding are not looked at.
_GAIN = 1e-5


@claim(
    "lowrank_baselines.theorem2",
    title="What orthogonal directions save at least",
    statement="""Positive features, r <= d: MSE_ort <= MSE_pos - (2(r-1)/(r(d+2)))
        (SM - e^(-n2/2))^2.""",
    source=f"{PAPER}, Theorem 2 as corrected after the proceedings; proved in the chapter",
    status="published",
    kind="inequality",
    observes="the gain that is claimed over MSE_pos - MSE_ort, for pairs with s, t <= 8",
    assumptions=PAIRS,
    recorded={**PAIR_RECORD, "nystrom-gaussian": "holds"},
)
def _theorem2(context: Context) -> Observations:
    values, bounds = [], []
    for pair, r in _theorem2_cases(context):
        claimed = theorem2_gain(pair.x, pair.y, r)
        iid, ort = (_mse(context, pair, r, orthogonal=x) for x in (False, True))
        rounded = _mse_rounding(pair, iid)
        digits = claimed > max(1e-9 * iid, rounded / _GAIN)
        values.append(claimed / max(iid - ort, 1e-300) if digits else 0.0)
        bounds.append(1 + rounded / claimed if digits else 1.0)
    return Observations(values, bounds if bounds else 1.0)


@claim(
    "lowrank_baselines.theorem2_coefficients",
    title="The theorem, coefficient by coefficient",
    statement="""a_k = prod_(i<k) (d+i)/(d+2i): 1 - a_k >= (2/(d+2))(1 - 2^(1-k)) for all k >= 1 and
        d >= 2, with equality for k = 1 and k = 2.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="the right side over the left, k = 2..60; d is that of the problem",
    assumptions=PAIRS,
    recorded=PAIR_RECORD,
)
def _theorem2_coefficients(context: Context) -> Observations:
    d = problem_of(context.instance).d
    context.require(d >= 2, "needs two dimensions")
    if is_default(context):
        i = np.arange(60.0)
        a = np.cumprod((d + i) / (d + 2 * i))  # a_1, a_2, ...
    else:
        rng = np.random.default_rng(context.entropy)
        a = implemented(context, "coefficients", 60, rng, d=d)
    k = np.arange(2, 61)
    values = 2 / (d + 2) * (1 - 2.0 ** (1 - k)) / (1 - a[k - 1])
    return Observations(values.tolist(), 1.0, rounding=1e-12)


@claim(
    "lowrank_baselines.theorem2_camera_ready",
    title="The theorem as it was printed in the proceedings",
    statement="""Positive features, r <= d: MSE_ort <= MSE_pos - (1 - 1/r)(2/(d+2)) SM^2.""",
    source=(
        f"{PAPER}, Theorem 2 in the proceedings (ICLR 2021); refuted: at x = -y the estimate is "
        "exact and the bound negative"
    ),
    status="refuted",
    kind="inequality",
    observes="MSE_ort less the bound, over SM^2, for one pair shrunk to s, t <= 4; r = min(d, 4)",
    assumptions=PAIRS,
    recorded={"golden-pair": "violated", "opposite-pair": "violated"},
)
def _theorem2_camera_ready(context: Context) -> Observations:
    pair = _first_pair(context).shrunk(4.0)
    d = len(pair.x)
    context.require(d >= 2, "needs two dimensions")
    r = min(d, 4)
    iid, ort = (_mse(context, pair, r, orthogonal=x) for x in (False, True))
    bound = iid - (1 - 1 / r) * 2 / (d + 2) * pair.kernel**2
    return Observations(
        [(ort - bound) / pair.kernel**2],
        0.0,
        rank=r,
        rounding=1e-12,
        notes=f"MSE_ort = {ort:.6g}, bound {bound:.6g}",
    )


# --- how many features ---------------------------------------------------------------------------


def _largest_pair(context: Context) -> _Pair:
    """Return the pair of largest ``|x + y|^2``."""
    x, y = scaled(problem_of(context.instance))

    def compute() -> tuple[int, int]:
        sums = np.einsum("ij,ij->i", x, x)[:, None] + np.einsum("ij,ij->i", y, y) + 2 * x @ y.T
        place = np.unravel_index(int(np.argmax(sums)), sums.shape)
        return int(place[0]), int(place[1])

    i, j = context.instance.cached("largest pair", compute)
    return _Pair(x[i], y[j])


@claim(
    "lowrank_baselines.chebyshev",
    title="How many positive features a relative accuracy asks for",
    statement="""r >= (e^s - 1)/(eps^2 delta) independent directions: for every entry with
        |x+y|^2 <= s, |estimate/SM - 1| <= eps with probability at least 1 - delta.""",
    source="derived: Chebyshev's inequality with the exact variance",
    status="derived",
    kind="tail",
    observes="|estimate/SM - 1| for the pair of largest s",
    assumptions=PAIRS,
    recorded={
        "faint": "holds",
        "clusters": "vacuous",
        "unit-gaussian": "vacuous",
        "heads": "vacuous",
    },
)
def _chebyshev(context: Context, *, eps: float = 0.5, delta: float = 0.1) -> Observations:
    pair = _largest_pair(context)
    need = float(np.asarray(chebyshev_features(pair.s, eps, delta)))
    r = int(np.asarray(ceil(need))) if need < MOST_FEATURES else MOST_FEATURES
    context.below(r, context.instance.n, eps, delta)
    values = []
    for rng in context.generators():
        omega = _directions(context, rng, r, len(pair.x), 1, orthogonal=False)
        values.append(abs(float(_estimates(pair, omega, "positive")[0]) / pair.kernel - 1))
    return Observations(values, eps, delta=delta, rank=r, notes=f"s = {pair.s:.3g}")


@claim(
    "lowrank_baselines.fourier_tail",
    title="The tail of trigonometric features",
    statement="""D = 2r features (cosine and sine of r independent directions):
        P(|estimate - SM| >= eps e^(n2/2)) <= 2 exp(-D eps^2/4), at every single pair.  The error is
        relative to e^(n2/2), and not to SM.""",
    source=(
        "Rahimi and Recht, NeurIPS 2007, Claim 1 [recalled]; here Hoeffding's inequality for r "
        "cosines"
    ),
    status="published",
    kind="tail",
    observes="|estimate - SM| e^(-n2/2) for one pair; the trivial estimate of SM is zero",
    assumptions=PAIRS,
    recorded={
        "golden-pair": "holds",
        "faint": "holds",
        "far-pair": "vacuous",
        "heads": "vacuous",
    },
)
def _fourier_tail(context: Context, *, rank: int = 64, delta: float = 0.05) -> Observations:
    pair = _first_pair(context)
    eps = math.sqrt(2 * math.log(2 / float(real(delta, "delta", 0, 1))) / rank)
    values = []
    for rng in context.generators():
        omega = _directions(context, rng, rank, len(pair.x), 1, orthogonal=False)
        found = float(np.cos(omega[0] @ (pair.x - pair.y)).mean())
        values.append(abs(found - math.exp(-pair.t / 2)))
    return Observations(
        values,
        eps,
        delta=delta,
        rank=rank,
        predictor="zero",
        trivial=math.exp(-pair.t / 2),
        notes=f"t = {pair.t:.3g}",
    )
