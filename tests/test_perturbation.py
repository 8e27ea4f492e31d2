"""The step from logits to attention: constants, the attaining case, masks, clusters, rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import softmax

import sketchattn as sa
from sketchattn.errors.perturbation import (
    PRECISIONS,
    cluster_eta_apriori,
    compression_eta,
    kl_bound,
    lipschitz_bound,
    log_ratio_bound,
    logit_eta,
    output_bound,
    quantization_eta,
    quantize,
    tv_bound,
    value_diameter,
)
from sketchattn.theory.softmax.formulas import perturbation_bound

Array = NDArray[Any]

# What rounding of a softmax of 60 logits of size 20 can do to a total variation.
SLACK = 1e-12


def variation(logits: Array, change: Array) -> Array:
    moved = softmax(logits + change, axis=-1) - softmax(logits, axis=-1)
    return np.asarray(np.abs(moved).sum(axis=-1) / 2)


def attaining(eta: float) -> tuple[Array, Array]:
    """Return logits of two keys and their change, where the bound is attained."""
    p = 1 / (1 + math.exp(eta))
    return np.log([[p, 1 - p]]), np.array([[eta, -eta]])


def cases(seed: int) -> list[tuple[Array, Array, Array]]:
    """Return 100 random logits, changes and values, of small and large sizes."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(100):
        n_q, n_k, d_v = (int(x) for x in rng.integers(1, 60, 3))
        logits = float(rng.choice([0.0, 1.0, 5.0])) * rng.standard_normal((n_q, n_k))
        change = float(rng.choice([1e-3, 0.1, 1.0, 4.0])) * rng.standard_normal((n_q, n_k))
        found.append((logits, change, rng.standard_normal((n_k, d_v))))
    return found


# --- the lemma ------------------------------------------------------------------------------------


def test_constants() -> None:
    assert tv_bound(0.1) == pytest.approx(0.04995837, abs=1e-8)
    assert np.asarray(tv_bound([0.7, 2.0])) == pytest.approx([0.33637554, 0.76159416], abs=1e-8)
    assert (tv_bound(0), tv_bound(math.inf)) == (0.0, 1.0)
    assert (kl_bound(3.0), kl_bound(math.inf)) == (4.5, math.inf)
    assert log_ratio_bound(1.5) == 3.0
    assert isinstance(tv_bound(1), float)
    # The whole range W = 2 eta: the older form of the same statement.
    assert 2 * float(np.asarray(tv_bound(0.3))) == perturbation_bound(0.6)


@pytest.mark.parametrize("eta", [1e-3, 0.1, 0.7, 2.0, 6.0])
def test_the_bound_is_attained_and_no_smaller_constant_is_true(eta: float) -> None:
    logits, change = attaining(eta)
    assert logit_eta(change)[0] == pytest.approx(eta, rel=1e-12)
    moved = float(variation(logits, change)[0])
    assert moved == pytest.approx(math.tanh(eta / 2), abs=1e-12)
    # One per cent less would be violated here.
    assert moved > 0.99 * float(np.asarray(tv_bound(eta)))
    # Outputs of the values 0 and 1 move by as much, and the entries are that.
    found = output_bound(tv_bound(logit_eta(change)), [[0.0], [1.0]])
    out = (softmax(logits + change) - softmax(logits)) @ np.array([[0.0], [1.0]])
    assert abs(float(out[0, 0])) == pytest.approx(float(found.norms[0]), abs=1e-12)
    assert abs(float(out[0, 0])) == pytest.approx(float(found.entries[0, 0]), abs=1e-12)


def test_the_divergence_has_its_constant() -> None:
    # For a small change of (1/2, 1/2) both divergences are eta^2/2 up to order eta^4.
    p = softmax([0.0, 0.0])
    q = softmax([0.01, -0.01])
    kl = float(p @ np.log(p / q))
    assert 0.9999 * 0.01**2 / 2 < kl <= float(np.asarray(kl_bound(0.01)))
    # Nearly all weight at one end of the range: the other weight grows by nearly e^(2 eta).
    logits, change = np.array([0.0, -30.0]), np.array([-1.0, 1.0])
    ratio = np.log(softmax(logits + change)[1] / softmax(logits)[1])
    assert 1.999999 < ratio <= float(np.asarray(log_ratio_bound(1.0)))


def test_all_inequalities_on_random_changes() -> None:
    for logits, change, v in cases(0):
        a, b = softmax(logits, axis=1), softmax(logits + change, axis=1)
        eta = logit_eta(change)
        tv = np.abs(a - b).sum(axis=1) / 2
        assert (np.asarray(tv_bound(eta)) - tv >= -SLACK).all()
        log = np.log(b / a)
        for kl in (-(a * log).sum(axis=1), (b * log).sum(axis=1)):
            assert (np.asarray(kl_bound(eta)) - kl >= -SLACK).all()
        assert (np.asarray(log_ratio_bound(eta)) - np.abs(log).max(axis=1) >= -SLACK).all()
        moved = np.abs((a - b) @ v)
        for reach in (np.minimum(tv, 1.0), tv_bound(eta)):
            bound = output_bound(reach, v)
            assert (bound.entries - moved >= -SLACK).all()
            assert (bound.norms - np.linalg.norm(moved, axis=1) >= -SLACK).all()
        assert (2 * np.tanh(eta / 2)[:, None] * np.abs(v).max() - moved >= -SLACK).all()
        rows = np.linalg.norm(a - b, axis=1)
        assert (lipschitz_bound(change) - rows >= -SLACK).all()
        whole = np.linalg.norm(change - change.mean(axis=1, keepdims=True)) / 2
        assert np.linalg.norm(lipschitz_bound(change)) == pytest.approx(whole)


def test_a_constant_of_a_row_changes_nothing() -> None:
    rng = np.random.default_rng(1)
    for _, change, _ in cases(1)[:20]:
        # Multiples of 1/8 up to 8 added to changes on a grid of 2^-40: no rounding at all.
        change = np.rint(change * 2**40) / 2**40
        shift = rng.integers(-64, 65, (len(change), 1)) / 8
        assert logit_eta(change + shift).tolist() == logit_eta(change).tolist()
        assert tv_bound(logit_eta(change + shift)) == pytest.approx(tv_bound(logit_eta(change)))
        assert lipschitz_bound(change + shift) == pytest.approx(lipschitz_bound(change), abs=1e-12)


# --- keys that are not seen -----------------------------------------------------------------------


def test_masked_keys_are_ignored_whatever_they_hold() -> None:
    rng = np.random.default_rng(2)
    logits, change = rng.standard_normal((6, 9)), rng.standard_normal((6, 9))
    keep = rng.random((6, 9)) < 0.6
    keep[0] = False
    keep[1] = np.arange(9) == 4
    hidden = np.where(keep, logits, -np.inf)
    with np.errstate(invalid="ignore"):
        difference = (hidden + change) - hidden  # NaN where both are -inf
    eta = logit_eta(difference, keep=keep)
    assert eta[:2].tolist() == [0.0, 0.0]
    for i in range(2, 6):
        seen = change[i, keep[i]]
        assert eta[i] == pytest.approx((seen.max() - seen.min()) / 2)
        moved = float(variation(logits[i, keep[i]], seen))
        assert moved <= float(np.asarray(tv_bound(eta[i])))
        half = np.linalg.norm(seen - seen.mean()) / 2
        assert lipschitz_bound(difference, keep=keep)[i] == pytest.approx(half)
    assert lipschitz_bound(difference, keep=keep)[0] == 0.0
    by_key = logit_eta(change, keep=np.arange(9) < 3)
    assert by_key == pytest.approx(np.ptp(change[:, :3], axis=1) / 2)


def test_keys_that_only_one_softmax_sees_are_beyond_any_bound() -> None:
    for row in ([-np.inf, 0.0], [np.inf, 0.0], [-np.inf, -np.inf], [-np.inf, np.inf]):
        eta = logit_eta([row])
        assert eta.tolist() == [math.inf]
        assert np.asarray(tv_bound(eta)).tolist() == [1.0]
        assert lipschitz_bound([row]).tolist() == [math.inf]
    assert logit_eta(np.zeros((3, 0))).tolist() == [0.0, 0.0, 0.0]
    assert logit_eta(np.zeros((0, 3))).shape == (0,)
    assert logit_eta(np.zeros((2, 4, 3))).shape == (2, 4)
    assert logit_eta([1.0, 4.0]).tolist() == 1.5


# --- outputs --------------------------------------------------------------------------------------


def test_value_diameter_is_that_of_all_pairs() -> None:
    rng = np.random.default_rng(3)
    v = rng.standard_normal((1500, 3))
    pairs = np.linalg.norm(v[:, None] - v[None], axis=2)
    assert value_diameter(v) == pytest.approx(pairs.max())
    assert value_diameter(v + 1e3) == pytest.approx(pairs.max())
    assert value_diameter(v[:1]) == 0.0
    one = output_bound(0.5, v)
    assert one.norms.shape == ()
    assert one.entries.shape == (3,)


# --- where eta comes from -------------------------------------------------------------------------


def clustered(noise: float) -> tuple[Array, Array, Array, Array, Array]:
    """Return queries and keys around ten centres each, and their labels."""
    rng = np.random.default_rng(4)
    centres = rng.standard_normal((2, 10, 16))
    labels = rng.integers(0, 10, (2, 200))
    q, k = (
        c[x] + noise * rng.standard_normal((200, 16)) for c, x in zip(centres, labels, strict=True)
    )
    return q, k, centres, labels[0], labels[1]


def means(x: Array, labels: Array) -> Array:
    return np.array([x[labels == c].mean(axis=0) for c in range(labels.max() + 1)])


@pytest.mark.parametrize("noise", [0.05, 0.2, 0.5])
def test_clusters_are_bounded_beforehand(noise: float) -> None:
    q, k, _, a, b = clustered(noise)
    qc, kc = means(q, a), means(k, b)
    scale = 1 / math.sqrt(16)
    logits = scale * q @ k.T
    rng = np.random.default_rng(5)
    for queries, keys in (((qc, a), (kc, b)), (None, (kc, b)), ((qc, a), None), (None, None)):
        hat_q = q if queries is None else qc[a]
        hat_k = k if keys is None else kc[b]
        change = scale * hat_q @ hat_k.T - logits
        eta = logit_eta(change)
        assert compression_eta(q, k, hat_q, hat_k) == pytest.approx(eta, abs=1e-12)
        for shift in (None, np.zeros(16), rng.standard_normal(16)):
            most = cluster_eta_apriori(q, k, queries, keys, shift=shift)
            assert (most >= eta - SLACK).all()
        tv = variation(logits, change)
        assert (tv <= np.asarray(tv_bound(eta)) + SLACK).all()
    # With no centre there is no change; and a shift of the keys is seen through by default.
    assert (cluster_eta_apriori(q, k) == 0).all()
    moved = cluster_eta_apriori(q, k + 1e3, (qc, a), (means(k + 1e3, b), b))
    assert moved == pytest.approx(cluster_eta_apriori(q, k, (qc, a), (kc, b)), rel=1e-9)


def test_the_cluster_bound_is_not_that_of_smaller_clusters() -> None:
    # One query in place of two at distance 1, keys 0 and 1: the half-range is 1/4 exactly.
    q, k = np.array([[1.0], [2.0]]), np.array([[0.0], [1.0]])
    centres = (np.array([[1.5]]), np.array([0, 0]))
    eta = compression_eta(q, k, np.full((2, 1), 1.5), k, scale=1.0)
    assert eta.tolist() == [0.25, 0.25]
    assert cluster_eta_apriori(q, k, centres, scale=1.0).tolist() == [0.25, 0.25]
    assert (0.99 * cluster_eta_apriori(q, k, centres, scale=1.0) < eta).all()


def test_compressed_logits_with_a_mask_and_in_blocks() -> None:
    rng = np.random.default_rng(6)
    q, k = rng.standard_normal((1100, 6)), rng.standard_normal((30, 6))
    keep = rng.random(30) < 0.5
    r = rng.standard_normal((6, 3))
    change = (q @ r @ (k @ r).T - q @ k.T) * -0.7
    assert compression_eta(q, k, q @ r, k @ r, scale=-0.7) == pytest.approx(logit_eta(change))
    masked = compression_eta(q, k, q @ r, k @ r, scale=-0.7, key_mask=keep)
    assert masked == pytest.approx(logit_eta(change, keep=keep))
    nothing = compression_eta(q, k, q @ r, k @ r, key_mask=np.zeros(30, bool))
    assert (nothing == 0).all()


# --- rounding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rounding_is_that_of_the_format(dtype: str) -> None:
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    rng = np.random.default_rng(7)
    small = {"float16": -26, "bfloat16": -136, "float32": -152}[dtype]
    x = rng.standard_normal((40, 50)) * 2.0 ** rng.integers(small, 14, (40, 50))
    got = quantize(x, dtype)
    # float32 first, as conversions of other libraries do, rounds twice: compare those that do not.
    direct = x.astype(np.float32).astype(np.float64) == x if dtype == "bfloat16" else x == x
    assert (got == x.astype(kind).astype(np.float64))[direct].all()
    from_single = x.astype(np.float32)
    single = quantize(from_single, dtype)
    assert (single == from_single.astype(kind).astype(np.float64)).all()
    known = PRECISIONS[dtype]
    assert (np.abs(got - x) <= np.maximum(known.u * np.abs(x), known.floor)).all()
    # The unit roundoff is needed up to the last bit: just above the middle between 1 and its next.
    middle = 1 + known.u * (1 + 1e-6)
    assert abs(float(quantize([[middle]], dtype)[0, 0]) - middle) > 0.999 * known.u
    assert quantize([[known.largest]], dtype).tolist() == [[known.largest]]
    with pytest.raises(ValueError, match=r"must be at most .* in"):
        quantize([[1.001 * known.largest]], dtype)


def test_int8_has_its_levels() -> None:
    x = np.array([[12.7, -0.26], [0.0, 0.127]])
    assert quantize(x, "int8") == pytest.approx(np.array([[12.7, -0.3], [0.0, 0.1]]))
    assert quantize(x, "int8", per="row")[1] == pytest.approx([0.0, 0.127])
    assert (quantize(np.zeros((2, 3)), "int8", per="row") == 0).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
@pytest.mark.parametrize("per", ["tensor", "row"])
def test_rounded_inputs_are_bounded_beforehand(dtype: str, per: str) -> None:
    rng = np.random.default_rng(8)
    for size in (1e-6, 1.0, 30.0):
        q = size * rng.standard_normal((40, 16))
        k = size * (rng.standard_normal((50, 16)) + rng.standard_normal(16))
        most = quantization_eta(q, k, dtype, per=per)
        eta = compression_eta(q, k, quantize(q, dtype, per=per), quantize(k, dtype, per=per))
        assert (eta <= most * (1 + 1e-12) + 1e-15 * size**2).all()
        # Not a bound that is far from everything: errors of 16 entries add at random.
        assert (most < 40 * eta.max()).all()
        logits = q @ k.T / 4
        rounded = quantize(q, dtype, per=per) @ quantize(k, dtype, per=per).T / 4
        tv = variation(logits, rounded - logits)
        assert (tv <= np.asarray(tv_bound(most)) + SLACK).all()


def test_the_rounding_bound_is_attained() -> None:
    # One query of one entry just below the middle of two bfloat16 numbers, and exact keys.
    q, k = np.array([[1 + 2.0**-8 * 0.999999]]), np.array([[1.0], [-1.0]])
    eta = compression_eta(q, k, quantize(q, "bfloat16"), k, scale=1.0)
    only_queries = 2.0**-8 * float(q[0, 0])
    assert eta[0] == pytest.approx(only_queries, rel=0.005)
    # All of it: both moved away from each other by nearly u.
    low = 1 + 2.0**-8 * 0.999999
    q, k = np.array([[low]]), np.array([[low], [-low]])
    eta = compression_eta(q, k, quantize(q, "bfloat16"), quantize(k, "bfloat16"), scale=1.0)
    most = quantization_eta(q, k, "bfloat16", scale=1.0)
    assert 0.99 * most[0] < eta[0] <= most[0]


# --- heads ----------------------------------------------------------------------------------------


def test_halves_of_a_bundled_head_are_bounded() -> None:
    problem = sa.load_heads()[0].astype(np.float64)
    q, k = problem.q[:64], problem.k
    part = sa.AttentionProblem(q, k, problem.values, scale=problem.scale)
    half = quantize(q, "bfloat16"), quantize(k, "bfloat16")
    rounded = sa.AttentionProblem(half[0], half[1], problem.values, scale=problem.scale)
    tv = np.abs(part.exact.to_dense() - rounded.exact.to_dense()).sum(axis=1) / 2
    eta = compression_eta(q, k, *half, scale=problem.scale)
    assert (tv <= np.asarray(tv_bound(eta)) + SLACK).all()
    assert (eta <= quantization_eta(q, k, "bfloat16", scale=problem.scale)).all()
    bound = output_bound(tv_bound(eta), problem.values)
    assert (np.abs(part.output - rounded.output) <= bound.entries + SLACK).all()
    assert (np.linalg.norm(part.output - rounded.output, axis=1) <= bound.norms + SLACK).all()


# --- refusals -------------------------------------------------------------------------------------


def test_refusals() -> None:
    x = np.ones((3, 2))
    two = (np.ones((1, 2)), np.zeros(3, int))
    wrong: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (ValueError, "eta must be at least 0, got -1", lambda: tv_bound(-1.0)),
        (ValueError, "eta must be at least 0, got nan", lambda: kl_bound([0.0, np.nan])),
        (TypeError, "eta must be real", lambda: log_ratio_bound(1j)),
        (ValueError, "D must not be NaN", lambda: logit_eta([[np.nan, 1.0]])),
        (ValueError, "D must have an axis", lambda: logit_eta(1.0)),
        (TypeError, "D must be real", lambda: logit_eta(["a"])),
        (TypeError, "keep must be boolean", lambda: logit_eta(x, keep=np.array([1, 0]))),
        (ValueError, "keep must fit D", lambda: logit_eta(x, keep=np.ones(5, bool))),
        (ValueError, "tv must be at most 1", lambda: output_bound(1.5, x)),
        (ValueError, "tv must have one axis", lambda: output_bound(0.5 * x, x)),
        (ValueError, "values must have a row", lambda: value_diameter(np.empty((0, 2)))),
        (ValueError, "values must have two axes", lambda: value_diameter(np.ones(3))),
        (TypeError, "values must be real", lambda: value_diameter(1j * x)),
        (ValueError, "k must have width 2", lambda: compression_eta(x, np.ones((3, 4)), x, x)),
        (ValueError, "kh must have width 1", lambda: compression_eta(x, x, x[:, :1], x)),
        (ValueError, "qh must have one row", lambda: compression_eta(x, x, x[:2], x)),
        (ValueError, "queries must hold", lambda: cluster_eta_apriori(x, x, (x,))),
        (ValueError, "labels of keys must be", lambda: cluster_eta_apriori(x, x, None, (x, x))),
        (
            ValueError,
            "labels of queries must be in",
            lambda: cluster_eta_apriori(x, x, (two[0], two[1] + 1)),
        ),
        (ValueError, "shift must be", lambda: cluster_eta_apriori(x, x, two, shift=[1.0])),
        (ValueError, "dtype must be one of .*did you mean", lambda: quantize(x, "float61")),
        (TypeError, "dtype must be a string", lambda: quantize(x, np.float16)),  # type: ignore[arg-type]  # refused on purpose
        (ValueError, "per must be one of", lambda: quantization_eta(x, x, "int8", per="column")),
        (ValueError, "k must be at most", lambda: quantization_eta(x, 1e9 * x, "float16")),
    ]
    for kind, message, call in wrong:
        with pytest.raises(kind, match=message):
            call()


def test_empty_problems() -> None:
    none = np.empty((0, 4))
    some = np.ones((3, 4))
    assert compression_eta(none, some, none, some).shape == (0,)
    assert quantization_eta(some, none, "int8").tolist() == [0.0, 0.0, 0.0]
    assert cluster_eta_apriori(some, none).tolist() == [0.0, 0.0, 0.0]


def test_it_is_reached_from_the_package() -> None:
    assert sa.perturbation.tv_bound is tv_bound
    assert "perturbation" in dir(sa)


def test_settings_of_the_caller_change_nothing() -> None:
    tiny = 5e-324
    calls: list[Callable[[], Any]] = [
        lambda: tv_bound([tiny, 0.0, math.inf]),
        lambda: kl_bound([tiny, 1e200, math.inf]),
        lambda: log_ratio_bound([1e308, tiny]),
        lambda: logit_eta([[math.inf, math.inf], [1e308, -1e308]]),
        lambda: lipschitz_bound([[1e200, -1e200], [math.inf, 0.0], [1e-200, 0.0]]),
        lambda: output_bound([tiny, 1.0], [[1e-200, 0.0], [0.0, 1e-200]]),
        lambda: value_diameter([[1e-200], [-1e-200]]),
        lambda: compression_eta([[1e-200]], [[1e-200], [0.0]], [[0.0]], [[0.0], [0.0]]),
        lambda: cluster_eta_apriori([[1e-200]], [[1e-200], [0.0]]),
        lambda: quantize([[1e-60, 1.0]], "float32"),
        lambda: quantize([[1e-60, 1.0]], "bfloat16"),
        lambda: quantization_eta([[1e-200]], [[1e-200], [0.0]], "int8"),
    ]
    for call in calls:
        made = []
        for setting in ("ignore", "raise"):
            with np.errstate(all=setting):
                made.append(call())
        first, second = (x if isinstance(x, tuple) else (x,) for x in made)
        assert all(map(np.array_equal, first, second))
