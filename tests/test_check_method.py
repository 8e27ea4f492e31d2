"""Other implementations of approximate methods: right ones pass, with our draws or their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn.testing import check_method
from sketchattn.testing.inputs import rounded
from sketchattn.testing.ports import as_method
from sketchattn.testing.samples import comparisons, energy, means, p_value, ranks, scores

Array = NDArray[Any]
Port = Callable[..., Array]

DTYPES = ("float32", "float16", "bfloat16")
PLAIN: dict[str, Any] = {"supports": ("cross", "scale"), "seeds": (0,)}


# --- ports: the formulas, with the roundings of a program in low precision ------------------------


def rounding(dtype: str) -> Callable[[Array], Array]:
    return lambda x: rounded(np.asarray(x, np.float32), dtype)


def weights_of(q: Array, k: Array, scale: float | None, r: Callable[[Array], Array]) -> Array:
    """Return the softmax with rounded logits."""
    logits = r(r(q * np.float32(q.shape[1] ** -0.5 if scale is None else scale)) @ k.T)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def ports(dtype: str) -> dict[str, tuple[str, Port]]:
    """Return programs with the name of their method, which round every array to a precision."""
    r = rounding(dtype)

    def uniform(q: Array, k: Array, v: Array, draw: Any, scale: float | None = None) -> Array:
        kept = draw["columns"]
        return r(r(weights_of(q, k[kept], scale, r)) @ v[kept])

    def jl(q: Array, k: Array, v: Array, draw: Any, scale: float | None = None) -> Array:
        s = r(draw["sketch"] / np.float32(8**0.5))  # drawn with entries of variance 1
        return r(r(r(weights_of(q, k, scale, r)) @ s.T) @ r(s @ v))

    def linformer(q: Array, k: Array, v: Array, draw: Any, scale: float | None = None) -> Array:
        small = weights_of(q, r(r(draw["E"]) @ k), scale, r)
        return r(r(small) @ r(r(draw["F"]) @ v))

    def sampled(q: Array, k: Array, v: Array, draw: Any, scale: float | None = None) -> Array:
        kept = draw["columns"]
        return r(r(weights_of(q, k, scale, r)[:, kept]) @ r(r(draw["weights"])[:, None] * v[kept]))

    def performer(q: Array, k: Array, v: Array, draw: Any, scale: float | None = None) -> Array:
        return r(_performer(q, k, v, r(draw["features"]), scale, 0.0, r))

    return {
        "uniform": ("uniform", uniform),
        "jl": ("jl", jl),
        "linformer": ("linformer", linformer),
        "column_sampling": ("column_sampling", sampled),
        "performer": ("performer", performer),
    }


def _performer(
    q: Array,
    k: Array,
    v: Array,
    omega: Array,
    scale: float | None,
    eps: float,
    r: Callable[[Array], Array],
) -> Array:
    root = (q.shape[1] ** -0.5 if scale is None else scale) ** 0.5
    x, y = np.float32(root) * q, np.float32(root) * k
    # Exponents stay in float32: rounded ones would be no program that anybody writes.
    left, right = x @ omega.T, y @ omega.T - 0.5 * (y**2).sum(axis=1, keepdims=True)
    left = r(np.exp(left - left.max(axis=1, keepdims=True)) + np.float32(eps))
    right = r(np.exp(right - right.max()) + np.float32(eps))
    return np.asarray((left @ (right.T @ v)) / (left @ right.sum(axis=0))[:, None])


# --- with our draw --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(sa.methods()))
def test_every_method_in_float32_passes(name: str) -> None:
    one = as_method(name, {})

    def mine(q: Array, k: Array, v: Array, draw: Any = None, **options: Any) -> Array:
        return np.asarray(one.attend(sa.AttentionProblem(q, k, v, **options), draw=draw))

    report = check_method(mine, name, seeds=(0,))
    assert report.passed, str(report)
    assert report.kind == "approx"
    assert max(x.ratio for x in report.cases) < 1
    features = {x.feature for x in report.cases}
    traits = one.traits
    assert ("causal" in features) == (traits.causal or traits.oracle)
    assert ("key_mask" in features) == traits.key_mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(ports("float32")))
def test_programs_of_low_precision_pass(name: str, dtype: str) -> None:
    method, port = ports(dtype)[name]
    report = check_method(port, method, dtypes=(dtype,), **(PLAIN | {"seeds": range(5)}))
    assert report.passed, str(report)
    assert report.mutants


def changed(name: str, **arrays: Callable[[Array], Array]) -> Port:
    """Return a program of float32 whose draw is changed before it is used."""
    port = ports("float32")[name][1]

    def wrong(q: Array, k: Array, v: Array, draw: Any, scale: float | None = None) -> Array:
        given = {x: arrays[x](y) if x in arrays else y for x, y in draw.items()}
        return port(q, k, v, given, scale)

    return wrong


def merged(q: Array, k: Array, v: Array, draw: Any, scale: float | None = None) -> Array:
    """Take every drawn column once, with the weight 1/(r p) of a single draw."""
    _, place = np.unique(draw["columns"], return_index=True)
    once = {"columns": draw["columns"][place], "weights": draw["weights"][place]}
    return ports("float32")["column_sampling"][1](q, k, v, once, scale)


def collapsed(q: Array, k: Array, v: Array, draw: Any, scale: float | None = None) -> Array:
    """Add an epsilon to features that is larger than most of them."""
    return _performer(q, k, v, draw["features"], scale, 0.1, rounding("float32"))


WRONG: dict[str, tuple[str, Port]] = {
    "an unscaled sketch": ("jl", changed("jl", sketch=lambda s: 8**0.5 * s)),
    "weights missing": ("column_sampling", changed("column_sampling", weights=np.ones_like)),
    "merged duplicates": ("column_sampling", merged),
    "eps-collapsed features": ("performer", collapsed),
    "the draw ignored": ("uniform", changed("uniform", columns=lambda j: np.arange(len(j)))),
    "E and F swapped": (
        "linformer",
        lambda q, k, v, draw, scale=None: ports("float32")["linformer"][1](
            q, k, v, {"E": draw["F"], "F": draw["E"]}, scale
        ),
    ),
    "the scale ignored": (
        "uniform",
        lambda q, k, v, draw, scale=None: ports("float32")["uniform"][1](q, k, v, draw),
    ),
    "one per cent": (
        "jl",
        lambda q, k, v, draw, scale=None: 1.01 * ports("float32")["jl"][1](q, k, v, draw, scale),
    ),
    "not a number": ("uniform", lambda q, k, v, draw, scale=None: np.nan * q[:, :8]),
    "another shape": ("uniform", lambda q, k, v, draw, scale=None: q),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_programs_fail(wrong: str) -> None:
    method, port = WRONG[wrong]
    seeds = range(4)  # some draws have no duplicates
    for dtype in DTYPES[:1] if wrong == "one per cent" else DTYPES:
        report = check_method(port, method, dtypes=(dtype,), **(PLAIN | {"seeds": seeds}))
        assert report.verdict == "FAIL", (wrong, dtype, str(report))
        with pytest.raises(AssertionError):
            report.raise_for_failures()


def test_the_report_names_what_was_wrong() -> None:
    def mean(q: Array, k: Array, v: Array, draw: Any, scale: float | None = None) -> Array:
        return np.repeat(v.mean(axis=0, keepdims=True), len(q), axis=0)

    report = check_method(mean, "uniform", **PLAIN)
    assert "looks like: mean of V" in str(report)
    assert "not checked: key_mask (not in supports)" in str(report)
    assert json.loads(report.to_json())["kind"] == "approx"
    report = check_method(WRONG["another shape"][1], "uniform", **PLAIN)
    assert "must return shape (33, 8), got (33, 16)" in str(report)

    def refuses(q: Array, k: Array, v: Array, draw: Any) -> Array:
        return ports("float32")["uniform"][1](q, k, v, draw)

    report = check_method(refuses, "uniform", **PLAIN)
    assert "raised TypeError" in str(report)
    assert check_method(refuses, "uniform", supports=("cross",), seeds=(0,)).passed


def test_a_check_that_could_not_tell_is_not_passed() -> None:
    """Where the answer is the mean of V to rounding, a program that gives it is not seen."""

    class Dull(sa.UniformColumns):
        def _attend(self, problem: Any, draw: Any) -> Array:
            mean = np.asarray(problem.v).mean(axis=0, keepdims=True)
            return np.asarray(mean + 1e-4 * super()._attend(problem, draw))

    method = Dull(rank=8)

    def mine(q: Array, k: Array, v: Array, draw: Any) -> Array:
        return np.asarray(method.attend(sa.AttentionProblem(q, k, v), draw=draw))

    report = check_method(mine, method, dtypes=("bfloat16",), supports=())
    assert report.verdict == "UNCERTIFIED"
    assert {"mean of V", "another draw"} <= {x.name for x in report.unseen}
    assert not report.passed
    assert check_method(mine, method, dtypes=("bfloat16",), supports=(), strict=False).passed


# --- with draws of its own ------------------------------------------------------------------------


def own(name: str, **changes: Callable[[Array], Array]) -> Port:
    """Return a program that draws for itself, perhaps wrongly."""
    cls, port = sa.methods()[name], changed(name, **changes)

    def draws(q: Array, k: Array, v: Array, seed: int, scale: float | None = None) -> Array:
        problem = sa.AttentionProblem(q, k, v, scale=scale)
        # Streams of its own, which no seed of ours is.
        draw = cls(8).draw(problem, rng=np.random.default_rng((seed, 77)))
        return port(q, k, v, dict(draw), scale)

    return draws


OWN: dict[str, Any] = {"draws": "own", "supports": (), "seeds": (0,)}


@pytest.mark.parametrize("name", ["uniform", "jl", "column_sampling", "linformer"])
def test_programs_with_draws_of_their_own_pass(name: str) -> None:
    """At level 1e-3, with the seeds here always or never."""
    report = check_method(own(name), name, **OWN)
    assert report.passed, str(report)
    assert {x.name for x in report.mutants} >= {"a quarter larger", "no spread"}


def own_merged(q: Array, k: Array, v: Array, seed: int) -> Array:
    rng = np.random.default_rng((seed, 77))
    draw = sa.ColumnSampling(8).draw(sa.AttentionProblem(q, k, v), rng=rng)
    return merged(q, k, v, draw)


def own_collapsed(q: Array, k: Array, v: Array, seed: int) -> Array:
    rng = np.random.default_rng((seed, 77))
    return collapsed(q, k, v, sa.Performer(8).draw(sa.AttentionProblem(q, k, v), rng=rng))


def one_draw(q: Array, k: Array, v: Array) -> Array:
    return own("uniform")(q, k, v, seed=0)


OWN_WRONG: dict[str, tuple[str, Port]] = {
    "an unscaled sketch": ("jl", own("jl", sketch=lambda s: 8**0.5 * s)),
    "weights missing": ("column_sampling", own("column_sampling", weights=np.ones_like)),
    "merged duplicates": ("column_sampling", own_merged),
    "eps-collapsed features": ("performer", own_collapsed),
    "half the rank": ("uniform", own("uniform", columns=lambda j: j[:4])),
    "always one draw": ("uniform", one_draw),
}


@pytest.mark.parametrize("wrong", OWN_WRONG)
def test_wrong_programs_with_draws_of_their_own_fail(wrong: str) -> None:
    method, port = OWN_WRONG[wrong]
    report = check_method(port, method, **OWN)
    assert report.verdict == "FAIL", str(report)
    assert any("more than" in x.message for x in report.failures)
    assert report.draws == "own"
    assert "p = " in str(report)


# --- the tests themselves -------------------------------------------------------------------------


def test_p_values_of_all_assignments() -> None:
    """With four outputs and two programs there are six assignments, and they are counted."""
    x = np.array([0.0, 1.0, 5.0, 9.0])
    statistic = scores(x)
    assignments = np.zeros((6, 4))
    for row, chosen in zip(assignments, combinations(range(4), 2), strict=True):
        row[list(chosen)] = 1
    values = np.sort(statistic(assignments))
    assert np.allclose(values, [1.5, 1.5, 2.5, 2.5, 6.5, 6.5])
    p = p_value(statistic, 2, 4, 1e-4, np.random.default_rng(0))
    assert abs(p - 2 / 6) < 0.3  # settled after ten exceedances
    assert np.array_equal(ranks(np.array([3.0, 1.0, 3.0])), [2.5, 1.0, 2.5])


@pytest.mark.statistical
def test_the_level_is_kept() -> None:
    """Of 400 comparisons of equal laws at 5 %, at most 40 are rejected (probability 1e-5)."""
    rng = np.random.default_rng(1)
    rejected = np.zeros(4)
    for _ in range(400):
        x, y = rng.standard_normal((2, 20, 3)) ** 3  # heavy tails
        for i, (_, statistic) in enumerate(comparisons(x, y, np.zeros(3), 0.0)):
            rejected[i] += p_value(statistic, 20, 40, 0.01, rng) <= 0.05
    assert (rejected <= 40).all(), rejected
    assert rejected.sum() > 0


def test_laws_that_differ_in_spread_alone_are_told_apart() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((50, 4)), 2.5 * rng.standard_normal((50, 4))
    pooled = np.concatenate([x, y])
    assert p_value(energy(pooled), 50, 100, 1e-3, rng) < 0.01
    assert p_value(means(pooled, 0.0), 50, 100, 1e-3, rng) > 0.01
    # What rounding explains is no difference.
    assert p_value(means(np.concatenate([x, x + 3.0]), 5.0), 50, 100, 1e-3, rng) > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": "mine"}, "draws must be one of given, own"),
        ({"dtypes": ("float8",)}, "dtypes must be one of"),
        ({"dtypes": ()}, "dtypes and seeds must not be empty"),
        ({"level": 0.0}, "level must be between 0 and 1"),
        ({"repeats": 3}, "repeats must be at least 20"),
        ({"supports": ("gqa",)}, "supports must be one of"),
        ({"rank": 0}, "rank must be"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_method(lambda *x, **y: x[0], "uniform", **options)


def test_other_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="fn must be callable"):
        check_method(3, "uniform")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="method must be registered"):
        check_method(print, "uniformly")
    with pytest.raises(ValueError, match="causal"):
        check_method(print, "linformer", supports=("causal",))
