"""Claims about halvings and causal forms: constants, record, broken versions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from claim_cases import (
    Factory,
    check_not_reported,
    check_odd,
    check_recorded,
    check_repeats,
    check_reported,
    claims_of,
    on_heads,
    problem_on,
    recorded_pairs,
)
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn.theory.engine.checking import check
from sketchattn.theory.training_free import denominator_bound, signed_sum

Array = NDArray[Any]

NAMES = ("tree_exact", "thinning_mass", "thinning_unbiased", "halving_bound", "stream_mass")
CLAIMS = {
    name: c
    for name, c in claims_of("training_free").items()
    if name.removeprefix("training_free.") in NAMES
}
RECORDED = recorded_pairs(CLAIMS)


# --- constants ------------------------------------------------------------------------------------


def test_constants_of_one_halving() -> None:
    problem = problem_on("thinned-keys")
    found = signed_sum(problem)
    c = 0.5 + math.log(256)
    assert found.c == pytest.approx(c)
    assert found.ratio == pytest.approx(c * c / (2 * c - 1)) == pytest.approx(3.3, abs=0.01)
    k, v = problem.k, problem.values
    b = np.abs(v).max()
    kernel = np.exp(0.5 * k @ k.T) * (v @ v.T + b * b)
    sizes = [kernel[i, i] - 2 * kernel[i, i + 1] + kernel[i + 1, i + 1] for i in range(0, 64, 2)]
    assert math.exp(found.log_size) == pytest.approx(math.sqrt(max(sizes) * found.ratio))
    bound = denominator_bound(problem, 0.05)
    denominators = np.exp(0.5 * problem.q @ k.T).sum(axis=1)
    direct = np.exp(0.25 * (problem.q**2).sum(axis=1)) / (b * denominators)
    direct *= math.exp(found.log_size) * math.sqrt(2 * math.log(40))
    assert bound == pytest.approx(direct)
    assert 5 < np.median(bound) < 15  # it says nothing: a weight is 2 at most


def test_512_keys_have_the_constant_of_the_page() -> None:
    problem = sa.make_heads("gaussian", n=512, d=4, rng=0)[0]
    assert signed_sum(problem).ratio == pytest.approx(4.3, abs=0.05)


def test_no_row_exceeds_its_bound_in_500_draws() -> None:
    problem = problem_on("thinned-keys")
    bound = denominator_bound(problem, 0.05)
    shares = problem.exact.to_dense()
    off = []
    for seed in range(500):
        draw = sa.Thinformer(32, bucket=64).draw(problem, seed)
        dhat = shares[:, draw["kept"]] @ np.exp(draw["log_weights"])
        off.append(np.abs(dhat - 1))
    assert np.all(np.max(off, axis=0) <= bound)
    assert 0.1 < np.quantile(off, 0.95) < 0.5  # and it is far from 9.4


# --- the record -----------------------------------------------------------------------------------


@pytest.mark.statistical
@pytest.mark.parametrize(("name", "on"), RECORDED)
def test_recorded_verdicts(name: str, on: str, global_random_seed: int) -> None:
    # Means alarm at |z| > 5; the rest is deterministic or far from its limit.
    check_recorded(CLAIMS, name, on, rng=global_random_seed)


@pytest.mark.statistical
@pytest.mark.parametrize("name", on_heads(CLAIMS))
def test_recorded_verdicts_on_bundled_heads(name: str, global_random_seed: int) -> None:
    head = sa.load_heads()[global_random_seed % 12]
    verdict = check(name, head, trials=60, rng=global_random_seed)
    assert verdict.status == CLAIMS[name].recorded["heads"], str(verdict)


# --- negative controls ----------------------------------------------------------------------------


def halved(problem: Any, keys: Array, rng: np.random.Generator) -> Array:
    """Return one key of each pair, by a matrix of the kernel."""
    k, v = problem.k[keys], problem.values[keys]
    inner = abs(problem.scale) * k @ k.T
    kernel = np.exp(inner - np.diag(inner).max()) * (v @ v.T + np.abs(v).max() ** 2)
    rows = kernel[0::2] - kernel[1::2]
    f = rows[:, 0::2] - rows[:, 1::2]
    pairs, largest = len(keys) // 2, 0.0
    signs = np.zeros(pairs)
    for i, u in enumerate(rng.random(pairs)):
        length = math.sqrt(max(f[i, i], 0.0))
        largest = max(largest, length)
        a = length * largest * (0.5 + math.log(4 * len(keys)))
        signs[i] = -1 if i and (2 * u - 1) * a <= signs @ f[i] else 1
    second = (signs < 0) ^ bool(rng.integers(2))
    return np.asarray(np.where(second, keys[1::2], keys[0::2]))


def thinned(problem: Any, r: int, rng: np.random.Generator, join: bool = True) -> Array:
    """Return kept keys and weights, by rounds over one bucket."""
    keys, weights = np.arange(problem.n_k), np.ones(problem.n_k)
    while len(keys) > r:
        pairs = len(keys) // 2
        kept = halved(problem, keys[: 2 * pairs], rng)
        sums = weights[0 : 2 * pairs : 2] + weights[1 : 2 * pairs : 2]
        if len(keys) % 2 == 0 and weights[-1] != weights[-2]:
            share = weights[-2] / sums[-1]
            kept[-1] = keys[-2] if rng.random() < share else keys[-1]
        rest = slice(2 * pairs, len(keys))
        old = weights[np.searchsorted(keys, kept)]
        keys = np.concatenate([kept, keys[rest]])
        weights = np.concatenate([sums if join else old, weights[rest]])
    return np.stack([keys, weights])


def merged(problem: Any, start: int, stop: int, leaf: int, saturates: bool = False) -> Any:
    """Return output and lse of the recursion, as published."""
    q, k, v = problem.q, problem.k, problem.values
    if stop - start <= leaf:
        part = slice(start, stop)
        one = sa.AttentionProblem(q[part], k[part], v[part], scale=problem.scale, causal=True)
        return np.array(one.output), np.array(one.logsumexp)
    middle = start + (stop - start) // 2
    out, lse = merged(problem, start, middle, leaf, saturates)
    low, l1 = merged(problem, middle, stop, leaf, saturates)
    keys = slice(start, middle)
    block = sa.AttentionProblem(q[middle:stop], k[keys], v[keys], scale=problem.scale)
    l2 = block.logsumexp
    share = 1 / (1 + np.exp(l2 - l1))
    total = np.logaddexp(l1, l2)
    if saturates:  # a normaliser that forgets the second block
        total, share = l1, np.full(len(l1), 0.5)
    low = share[:, None] * low + (1 - share)[:, None] * block.output
    return np.concatenate([out, low]), np.concatenate([lse, total])


def stream(problem: Any, r: int, block: int, rng: np.random.Generator, join: bool = True) -> Array:
    """Return weights and keys of caches in which any key may take the weight of its neighbour."""
    rows, cache = [], np.zeros(0)
    for _ in range(block, problem.n_k, block):
        cache = np.concatenate([cache, np.ones(block)])
        while len(cache) > r:
            pairs = len(cache) // 2
            sums = cache[0 : 2 * pairs : 2] + cache[1 : 2 * pairs : 2] * join
            cache = np.concatenate([sums, cache[2 * pairs :]])
        rows.append([cache.sum(), len(cache)])
    return np.array(rows).T


def honest(kind: str, r: int, n: int, rng: np.random.Generator, **parameters: Any) -> Array:
    """Write everything from its definition."""
    problem = parameters["problem"]
    if kind == "tree":
        made: Array = merged(problem, 0, n, r)[0]
        return made
    if kind == "stream":
        return stream(problem, r, parameters["block"], rng)
    assert kind == "thinning"
    return thinned(problem, r, rng)


def without_flips(kind: str, r: int, n: int, rng: np.random.Generator, **more: Any) -> Array:
    """Keep the first of the first pair always."""
    problem = more["problem"]
    keys = np.arange(n)
    while len(keys) > r:
        keys = keys[: 2 * (len(keys) // 2) : 2]
    return np.stack([keys, np.full(len(keys), problem.n_k / len(keys))])


def own_weights(kind: str, r: int, n: int, rng: np.random.Generator, **more: Any) -> Array:
    """Forget the weight of the key that goes."""
    if kind == "stream":
        return stream(more["problem"], r, more["block"], rng, join=False)
    return thinned(more["problem"], r, rng, join=False)


def dropped(kind: str, r: int, n: int, rng: np.random.Generator, **more: Any) -> Array:
    """Read a power of four of the keys."""
    kept = np.arange(0, 4 ** ((n.bit_length() - 1) // 2), 2)[:r]
    return np.stack([kept, np.full(len(kept), 2.0)])


def too_many(kind: str, r: int, n: int, rng: np.random.Generator, **more: Any) -> Array:
    """Keep everything."""
    if kind == "stream":
        tokens = np.arange(more["block"], n, more["block"])
        return np.stack([tokens, tokens])
    return np.stack([np.arange(n), np.ones(n)])


def forgetful(kind: str, r: int, n: int, rng: np.random.Generator, **more: Any) -> Array:
    """Merge two outputs by halves."""
    made: Array = merged(more["problem"], 0, n, r, saturates=True)[0]
    return made


CONTROLS: list[tuple[str, str, Factory]] = [
    ("tree_exact", "causal-keys", forgetful),
    ("thinning_mass", "reference", own_weights),
    ("thinning_mass", "small-logits", dropped),
    ("thinning_mass", "reference", too_many),
    ("thinning_unbiased", "reference", without_flips),
    ("thinning_unbiased", "clusters", own_weights),
    ("halving_bound", "small-logits", own_weights),
    ("stream_mass", "causal-keys", own_weights),
    ("stream_mass", "causal-keys", too_many),
]


@pytest.mark.parametrize(("name", "on", "broken"), CONTROLS)
def test_broken_implementations_are_reported(name: str, on: str, broken: Factory) -> None:
    check_reported(f"training_free.{name}", on, broken, trials=80)


@pytest.mark.parametrize(("name", "on"), sorted({(name, on) for name, on, _ in CONTROLS}))
def test_an_implementation_from_the_definition_is_not_reported(name: str, on: str) -> None:
    trials = 10 if on == "small-logits" else 40
    allowed = ("holds", "vacuous", "inconclusive")
    check_not_reported(f"training_free.{name}", on, honest, allowed, trials=trials)


def test_every_theorem_has_a_control() -> None:
    assert {f"training_free.{name}" for name, _, _ in CONTROLS} == set(CLAIMS)


# --- odd problems ---------------------------------------------------------------------------------


def test_odd_problems_get_a_verdict() -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((5, 3)), rng.standard_normal((9, 3)), rng.standard_normal((9, 2))
    mask = np.arange(9) % 3 > 0
    odd = [
        sa.AttentionProblem(q[:1], k[:1], v[:1], name="one"),
        sa.AttentionProblem(q, k, v, key_mask=mask, name="masked"),
        sa.AttentionProblem(q, k, np.zeros((9, 2)), name="zero values"),
        sa.AttentionProblem(q, k[:8], np.zeros((8, 2)), name="pairs of zero values"),
        sa.AttentionProblem(q, k, name="no values"),
        sa.AttentionProblem(k, k, v, causal=True, name="causal"),
        sa.AttentionProblem(k, k, v, causal=True, key_mask=mask, name="causal and masked"),
        sa.AttentionProblem(1e3 * q, k[:8], v[:8], name="large logits"),
        sa.AttentionProblem(0 * q, k, v, name="uniform"),
        sa.AttentionProblem(q, k, v, key_mask=np.zeros(9, bool), name="no keys"),
    ]
    check_odd(CLAIMS, odd, trials=60)


@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_verdicts_repeat_and_bounds_need_no_draw(name: str) -> None:
    check_repeats(CLAIMS, name, trials=20)
