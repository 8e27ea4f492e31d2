"""No claim takes rounding for a violation, however ill-conditioned a head is; small errors show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import test_theory_combiner
import test_theory_dba
import test_theory_informer
import test_theory_lowrank_baselines
import test_theory_nearfar
import test_theory_skeinformer
import test_theory_softmax
from claim_cases import HONEST as HONEST_VERDICTS
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn import theory
from sketchattn.theory.engine.checking import run
from sketchattn.theory.engine.instances import Instance, get_instance
from sketchattn.theory.engine.records import Observations
from sketchattn.theory.engine.registry import get_entry
from sketchattn.theory.lowrank_baselines import nystrom_claims
from sketchattn.theory.lowrank_baselines.residuals import inverted_after

Array = NDArray[Any]

pytestmark = pytest.mark.usefixtures("one_thread")

Named = tuple[str, sa.AttentionProblem]
DTYPES = (np.float32, np.float64)

# Families at the temperatures where cores are ill-conditioned, weights underflow or rows are equal.
HARD: tuple[tuple[str, dict[str, float]], ...] = (
    ("ar1", {"logit_std": 20.0}),
    ("gaussian", {"logit_std": 30.0}),
    ("near_permutation", {"sharpness": 60.0}),
    ("low_rank", {"logit_std": 10.0}),
    ("duplicates", {}),
)
FAMILIES = (
    "gaussian",
    "peaked",
    "clustered",
    "ar1",
    "near_permutation",
    "low_rank",
    "duplicates",
    "attention_sink",
)


def made(n: int, d: int, families: Any) -> Iterator[Named]:
    for i, (family, parameters) in enumerate(families):
        dtype = DTYPES[i % 2]
        heads = sa.make_heads(family, n=n, d=d, rng=8 + 10 * i, dtype=dtype, **parameters)
        yield f"{family} {parameters} n={n} {np.dtype(dtype)}", heads[0]


def heated() -> Iterator[Named]:
    """Yield all families with logits multiplied by 1, 10, 100 and 1000, and nearly uniform ones."""
    cases = [*product(FAMILIES, (1.0, 10.0, 100.0, 1e3)), *product(FAMILIES[:3], (1e-4, 1e-9))]
    for i, (family, times) in enumerate(cases):
        n, d, dtype = (17, 48, 128)[i % 3], (4, 16, 32)[i // 3 % 3], DTYPES[i // 2 % 2]
        p = sa.make_heads(family, n=n, d=d, rng=100 + i, dtype=dtype)[0]
        yield (
            f"{family} x{times:g} n={n} d={d} {np.dtype(dtype)}",
            sa.AttentionProblem(p.q, p.k, p.v, scale=times * p.scale),
        )


def gaussian(n: int = 48, d: int = 8, m: int | None = None, seed: int = 0) -> tuple[Array, ...]:
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((x, d)) for x in (n if m is None else m, n, n))


def shaped() -> Iterator[Named]:
    """Yield causal and masked heads, and others with more queries than keys or fewer."""
    for i, (m, n, d, times) in enumerate(
        (
            (5, 48, 4, 1),
            (48, 5, 4, 10),
            (17, 128, 16, 100),
            (96, 17, 32, 1),
            (1, 48, 4, 1),
            (48, 1, 4, 1),
        )
    ):
        q, k, v = (x.astype(DTYPES[i % 2]) for x in gaussian(n, d, m))
        yield f"{m} queries, {n} keys, x{times}", sa.AttentionProblem(times * q, k, v)
    for i, times in enumerate((1, 100, 10**6)):
        q, k, v = (x.astype(DTYPES[i % 2]) for x in gaussian())
        yield f"causal x{times}", sa.AttentionProblem(times * q, k, v, causal=True)
        mask = np.arange(48) % 3 != 0
        yield f"masked x{times}", sa.AttentionProblem(times * q, k, v, key_mask=mask)
    q, k, v = gaussian(seed=1)
    yield "two keys left", sa.AttentionProblem(3 * q, k, v, key_mask=np.arange(48) < 2)


def valued() -> Iterator[Named]:
    """Yield heads with odd values: equal, far from zero, nearly dependent, of any size."""
    q, k, v = gaussian(seed=2)
    one = np.eye(8)[0]
    values = {
        "half zero": np.where(np.arange(48)[:, None] % 2, v, 0.0),
        "constant": np.full_like(v, 1 / 3),
        "all but one equal": np.where(np.arange(48)[:, None], v[0], v[1]),
        "zero": 0 * v,
        "x 1e-12": 1e-12 * v,
        "x 1e12": 1e12 * v,
        "x 1e150": 1e150 * v,
        "far from zero": v + 1e10,
        "one column far": v + 1e8 * one,
        "one large row": np.where(np.arange(48)[:, None], v, 1e10 * v),
        "nearly dependent": v @ (one[:, None] + 1e-9 * np.eye(8)),
    }
    for name, x in values.items():
        yield f"values {name}", sa.AttentionProblem(q, k, x)


def odd() -> Iterator[Named]:
    """Yield heads where little but rounding is left of logits, of their rank or of differences."""
    q, k, v = gaussian(seed=3)
    decay, half = 10.0 ** -np.arange(8), np.where(np.arange(8) < 4, 1.0, 1e-7)
    pairs = {
        "no queries": (0 * q, k),
        "equal keys": (10 * q, np.broadcast_to(k[0], k.shape)),
        "keys far from zero": (q, k + 1e4),
        "pairs of keys": (30 * q, np.repeat(k[::2], 2, axis=0) * (1 + 1e-15 * k)),
        "pairs of queries": (300 * np.repeat(q[::2], 2, axis=0) * (1 + 1e-15 * q), k),
        "one large logit": (np.where(np.arange(48)[:, None], q, 1e4 * q), k),
        "logits of 1e6": (1e5 * q, k),
        "logits of 1e9": (1e8 * q, k),
        "queries nearly orthogonal to keys": (q * half, k * half[::-1]),
        "decaying columns": (q * decay, k * decay),
        "decaying queries": (10 * q * decay**2, k),
        "decaying keys": (q, 10 * k * decay**2),
        "both far from zero": (q + 1e3 * np.eye(8)[0], k + 1e3 * np.eye(8)[1]),
        "six tokens": (300 * np.repeat(q[:6], 8, axis=0), np.repeat(k[:6], 8, axis=0)),
    }
    for name, (x, y) in pairs.items():
        yield name, sa.AttentionProblem(x, y, v)
    line = np.linspace(-2, 2, 8)[:, None]
    for times in (0.01, 1, 10):
        yield f"line x{times}", sa.AttentionProblem(times * line, line + 0.5, v[:8], scale=1.0)
    angles = 2 * np.pi * np.arange(12)[:, None] / 12
    circle = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    for times in (0.1, 1e6):
        yield f"circle x{times:g}", sa.AttentionProblem(circle, circle, circle, scale=times)


def cut(n: int, which: range) -> Iterator[Named]:
    """Yield the first tokens of bundled heads."""
    for i in which:
        head = sa.load_heads()[i]
        q, k, v = (np.asarray(x, DTYPES[i % 2])[:n] for x in head.arrays)
        yield f"{head.name}, {n} tokens", sa.AttentionProblem(q, k, v, scale=head.scale)


def violations(name: str, problem: sa.AttentionProblem) -> list[str]:
    """Return theorems that are reported as violated on a head, of a few trials."""
    seen = Instance(name, problem)
    verdicts = {claim: theory.check(claim, seen, trials=4) for claim in theory.claims()}
    proven = {claim for claim, record in theory.claims().items() if record.status != "refuted"}
    return [str(verdicts[x]) for x in proven if verdicts[x].status == "violated"]


WORST = (
    "decaying queries",
    "pairs of queries",
    "values far from zero",
    "causal x1000000",
    "queries nearly orthogonal to keys",
    "clustered x100 n=48 d=16 float64",
)
MANY = [
    *heated(),
    *shaped(),
    *valued(),
    *odd(),
    *made(48, 8, HARD),
    *made(64, 16, HARD),
    *cut(96, range(12)),
]
SMALL = [case for case in MANY if case[0] in WORST]


@pytest.mark.parametrize(("name", "problem"), SMALL, ids=[name for name, _ in SMALL])
def test_rounding_violates_no_theorem(name: str, problem: sa.AttentionProblem) -> None:
    assert not violations(name, problem)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "problem"), MANY, ids=[name for name, _ in MANY])
def test_rounding_violates_no_theorem_on_many_heads(
    name: str, problem: sa.AttentionProblem
) -> None:
    assert not violations(name, problem)


# --- what is computed of ill-conditioned cores ------------------------------------------------


def test_the_filter_keeps_its_digits_where_singular_values_are_small() -> None:
    # 1 - f(1 - t) by exact fractions: for t of 1e-14 all digits of the difference would be lost.
    from fractions import Fraction

    for start in (1e-30, 1e-14, 1e-6, 0.3, 1.0):
        t = Fraction(start)
        for j in range(4):
            found = float(inverted_after(np.array(start), j))
            assert found == pytest.approx(float(t), rel=1e-14)
            e = 1 - t
            t = 1 - (3 * e**3 + e**4) / 4


def test_of_violations_one_beyond_rounding_is_named() -> None:
    entry = get_entry("lowrank_baselines.iteration_filter")
    seen = Observations([1e-11, 3e-6, 1e-6], 0.0, rounding=1e-8)
    broken = entry._replace(observe=lambda context: seen)
    verdict = run(broken, get_instance("worked"), 4, 0.95, 0, {})
    assert (verdict.status, verdict.failures, verdict.observed) == ("violated", 2, 3e-6)


# --- small errors are still seen ----------------------------------------------------------------

MILLIONTH = 1e-6
DETERMINISTIC = [
    name
    for name, record in theory.claims().items()
    if record.kind in ("inequality", "existence")
    and record.status != "refuted"
    # A statement without constants is nowhere applicable: there is no bound to go beyond.
    and set(record.recorded.values()) != {"not applicable"}
]


def small(name: str) -> list[str]:
    """Return the instances of a claim, those with few entries first."""
    found = theory.instances()
    return sorted(theory.claims()[name].instances, key=lambda on: found[on].m * found[on].n)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_what_is_one_in_a_million_beyond_its_bound_is_reported(name: str) -> None:
    # Whatever the slack of a claim, and so also where no error of a program would reach its bound.
    entry = get_entry(name)

    def beyond(context: Any, **parameters: Any) -> Observations:
        seen = entry.observe(context, **parameters)
        bounds = np.broadcast_to(np.asarray(seen.bound, np.float64), np.shape(seen.values))
        return replace(seen, values=bounds + MILLIONTH * np.where(bounds >= 0.01, bounds, 1.0))

    for on in small(name):
        verdict = run(
            entry._replace(observe=beyond), get_instance(on), 3, 0.95, 0, entry.parameters
        )
        if verdict.status == "violated":
            return
    pytest.fail(f"{name} allows for more than it should: {verdict}")


# Implementations that are written from the definitions, by topic.
HONEST: dict[str, Callable[..., Any]] = {
    "combiner": test_theory_combiner.honest,
    "dba": test_theory_dba.library,
    "informer": test_theory_informer.honest,
    "lowrank_baselines": test_theory_lowrank_baselines.honest,
    "nearfar": test_theory_nearfar.honest,
    "skeinformer": test_theory_skeinformer.honest,
    "softmax": test_theory_softmax.honest,
}


def larger(x: Array) -> Array:
    return np.asarray(x * (1 + MILLIONTH))


def smaller(x: Array) -> Array:
    return np.asarray(x * (1 - MILLIONTH))


def one_larger(x: Array) -> Array:
    """Change the largest number alone."""
    out = np.array(x)
    if out.size:
        out[np.unravel_index(np.argmax(np.abs(out)), out.shape)] *= 1 + MILLIONTH
    return out


def planted(topic: str, change: Callable[[Array], Array]) -> Callable[..., Any]:
    """Return an honest implementation with every array of floats that it hands out changed."""

    def changed(found: Any) -> Any:
        if isinstance(found, dict):
            return {name: changed(x) for name, x in found.items()}
        if isinstance(found, tuple):
            return tuple(changed(x) for x in found)
        x = np.asarray(found)
        return change(x) if x.dtype.kind == "f" else found

    def factory(kind: str, r: int, n: int, rng: np.random.Generator, **given: Any) -> Any:
        return changed(HONEST[topic](kind, r, n, rng, **given))

    return factory


# Not here: claims that hold with more slack than this on all of their instances, claims on
# quotients of what is handed in, and claims that ask for no implementation.
PLANTED = [
    "combiner.bilinear",
    "combiner.certificate_bennett",
    "combiner.certificate_gap",
    "combiner.certificate_hoeffding",
    "combiner.certificate_order",
    "combiner.certificate_output",
    "combiner.certificate_range",
    "combiner.certificate_split",
    "combiner.chain_rules",
    "combiner.direct_weights",
    "combiner.exactness",
    "combiner.gibbs_identity",
    "combiner.kl_row_bound",
    "combiner.log_ratio",
    "combiner.lossless_bias",
    "combiner.mass_aware",
    "combiner.merge",
    "combiner.mixture",
    "combiner.output",
    "combiner.refinement",
    "combiner.sandwich",
    "combiner.spread",
    "combiner.tanh_bound",
    "dba.block_form",
    "dba.circle",
    "dba.logit_error",
    "dba.lossless_logits",
    "dba.matrix_floor",
    "dba.multiplicity",
    "dba.oblique",
    "dba.projector",
    "dba.vandermonde",
    "dba.volume_sampling_exact",
    "informer.lemma1",
    "informer.oracle",
    "informer.regret",
    "informer.row_selection",
    "informer.sandwich",
    "lowrank_baselines.all_landmarks",
    "lowrank_baselines.clustered_full",
    "lowrank_baselines.clustered_geometric",
    "lowrank_baselines.clustered_lipschitz",
    "lowrank_baselines.clustered_perturbation",
    "lowrank_baselines.clustered_proposition2",
    "lowrank_baselines.clustered_stochastic",
    "lowrank_baselines.every_token",
    "lowrank_baselines.favor_factors",
    "lowrank_baselines.favor_stochastic",
    "lowrank_baselines.iteration_filter",
    "lowrank_baselines.iteration_norm",
    "lowrank_baselines.iteration_order",
    "lowrank_baselines.queries_suffice",
    "lowrank_baselines.residual_norm",
    "lowrank_baselines.residual_recursion",
    "lowrank_baselines.row_sums",
    "lowrank_baselines.smreg_upper",
    "lowrank_baselines.theorem2_coefficients",
    "lowrank_baselines.topk_renormalised",
    "nearfar.exact_keys",
    "nearfar.exact_near",
    "nearfar.frozen",
    "nearfar.interval",
    "nearfar.jensen",
    "nearfar.merge",
    "nearfar.promotion",
    "nearfar.rows",
    "nearfar.tanh",
    "skeinformer.fill_mass",
    "skeinformer.full_rank",
    "skeinformer.identity_adaptive",
    "skeinformer.identity_exact",
    "skeinformer.identity_sampled",
    "skeinformer.key_shift",
    "skeinformer.permutation",
    "skeinformer.pilot_reuse",
    "skeinformer.stochastic",
    "skeinformer.value_shift",
    "softmax.frobenius_norm",
    "softmax.hull",
    "softmax.mean_identity",
    "softmax.merge",
    "softmax.spectral_norm",
    "softmax.stochastic",
    "softmax.truncation",
]


@pytest.mark.parametrize("name", PLANTED)
def test_an_error_of_one_in_a_million_is_seen(name: str) -> None:
    topic = name.split(".")[0]
    for on in small(name):
        honest = theory.check(name, on, trials=3, sketch=planted(topic, np.asarray))
        if honest.status == "not applicable":
            continue
        assert honest.status in HONEST_VERDICTS, str(honest)
        for change in (larger, smaller, one_larger):
            broken = theory.check(name, on, trials=3, sketch=planted(topic, change))
            if broken.status == "violated":
                return
    pytest.fail(f"{name} does not see an error of one in a million")


def test_the_tolerance_of_the_filter_does_not_grow_with_the_condition() -> None:
    hard = next(made(48, 8, HARD))[1]
    name = "lowrank_baselines.iteration_filter"
    core = nystrom_claims._core(_context_of(name, hard), None)
    assert np.linalg.cond(core) > 1e10
    assert theory.check(name, hard).status == "holds"
    assert (
        theory.check(name, hard, sketch=planted("lowrank_baselines", larger)).status == "violated"
    )


def _context_of(name: str, problem: sa.AttentionProblem) -> Any:
    from sketchattn.theory.engine.checking import _context

    return _context(get_entry(name), Instance("hard", problem), 1, 0, None)
