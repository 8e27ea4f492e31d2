"""Rounding floors and comparisons of outputs: planted mistakes are named, honest errors are not."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn import sketches
from sketchattn.testing import compare, rounding_floor
from sketchattn.testing.inputs import rounded

Array = NDArray[Any]


def head(n: int = 67, d: int = 16, seed: int = 0, **options: Any) -> sa.AttentionProblem:
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((n, d)) for _ in range(3))
    return sa.AttentionProblem(2 * q, k, v, **options)


def with_weights(problem: sa.AttentionProblem, times: Array) -> Array:
    """Return the output of a program that counts each key as often as ``times`` says."""
    a = problem.exact.to_dense() * times
    return np.asarray(a / a.sum(axis=1, keepdims=True) @ problem.values)


# --- floors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "u"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_the_floor_of_numbers_that_are_exact_is_that_of_the_output(dtype: str, u: float) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rounded(rng.standard_normal((50, 8)), dtype) for _ in range(3))
    problem = sa.AttentionProblem(q, k, v).astype(np.float64)
    right = problem.output
    wanted = np.linalg.norm(rounded(right, dtype) - right) / np.linalg.norm(right)
    assert rounding_floor(problem, dtype) == pytest.approx(wanted, rel=1e-12)
    # Half an ulp is at most u of the number.
    assert 0 < wanted <= u


def test_no_program_of_a_precision_is_below_its_floor_by_much() -> None:
    """Rounding the logits and the weights as well can only add to it."""
    problem = head()
    for dtype in ("float16", "bfloat16", "float32"):
        floor = rounding_floor(problem, dtype)
        q, k, v = (rounded(np.asarray(x), dtype).astype(np.float64) for x in problem.arrays)
        logits = rounded(q @ k.T * problem.scale, dtype).astype(np.float64)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        weights = rounded(weights / weights.sum(axis=1, keepdims=True), dtype).astype(np.float64)
        out = rounded(weights @ v, dtype).astype(np.float64)
        error = np.linalg.norm(out - problem.output) / np.linalg.norm(problem.output)
        assert error > 0.9 * floor
        assert error < 30 * floor


def test_the_floor_takes_dtypes_and_names_and_refuses_others() -> None:
    problem = head()
    assert rounding_floor(problem, np.float16) == rounding_floor(problem, "float16")
    assert rounding_floor(problem, "float64") == 2**-53
    with pytest.raises(ValueError, match="dtype must be one of"):
        rounding_floor(problem, "float8")
    with pytest.raises(ValueError, match="float16"):
        rounding_floor(sa.AttentionProblem(problem.q, problem.k, 1e6 * problem.values), "float16")
    with pytest.raises(ValueError, match="v must be given"):
        rounding_floor(sa.AttentionProblem(problem.q, problem.k), "float16")
    with pytest.raises(ValueError, match="dtype must be one of"):
        rounding_floor(problem, object())


def test_the_floor_takes_the_dtypes_of_other_libraries() -> None:
    problem = head()
    torch = pytest.importorskip("torch")
    for name in ("float16", "bfloat16", "float32", "float64"):
        assert rounding_floor(problem, getattr(torch, name)) == rounding_floor(problem, name)
    assert rounding_floor(problem, ml_dtypes.bfloat16) == rounding_floor(problem, "bfloat16")
    with pytest.raises(ValueError, match="dtype must be one of .*, got 'int8'"):
        rounding_floor(problem, torch.int8)


def test_dtypes_of_torch_are_taken_wherever_one_is_asked_for() -> None:
    torch = pytest.importorskip("torch")
    problem = head()
    assert problem.astype(torch.float32).dtype == np.float32
    q, k, v = problem.astype(np.float32).arrays
    for dtype in (torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")
        wanted = sa.attention(q, k, v, compute_dtype=name)
        assert np.array_equal(sa.attention(q, k, v, compute_dtype=dtype), wanted)
        made = sa.make_heads("gaussian", n=8, d=4, rng=0, dtype=dtype)
        assert made.dtype == name
        assert sketches.make_sketch("gaussian", 4, 8, rng=0, dtype=dtype).dtype == name
    for wrong in (torch.float16, "no such thing"):
        with pytest.raises(TypeError, match="dtype must be float32 or float64"):
            sketches.make_sketch("gaussian", 4, 8, rng=0, dtype=wrong)


# --- comparisons --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"key_mask": np.arange(67) != 3}])
@pytest.mark.parametrize("keys", [(40,), (64, 65, 66), (0, 9)])
@pytest.mark.parametrize("times", [0.0, 2.0])
def test_keys_that_are_lost_or_doubled_are_named(
    options: dict[str, Any], keys: tuple[int, ...], times: float
) -> None:
    if options.get("causal") and 0 in keys and times == 0:
        pytest.skip("row 0 would see no key")
    problem = head(**options)
    counts = np.ones(67)
    counts[list(keys)] = times
    found = compare(problem, with_weights(problem, counts))
    assert found.lost == (keys if times == 0 else ())
    assert found.doubled == (keys if times == 2 else ())
    assert found.rest < 1e-6 < found.error
    assert ("lost" if times == 0 else "counted twice") in str(found)


def test_a_lost_key_is_named_in_half_precision() -> None:
    problem = head()
    counts = np.ones(67)
    counts[11] = 0
    out = with_weights(problem, counts).astype(np.float16)
    assert compare(problem, out).lost == (11,)


def test_outputs_of_every_precision_are_judged_by_their_own_floor() -> None:
    torch = pytest.importorskip("torch")
    problem = head()
    floor = rounding_floor(problem, "bfloat16")
    counts = np.ones(67)
    counts[64:] = 0
    for out, lost in ((problem.output, ()), (with_weights(problem, counts), (64, 65, 66))):
        half = torch.tensor(out).to(torch.bfloat16)
        numpy = half.double().numpy().astype(ml_dtypes.bfloat16)
        found = compare(problem, half)
        assert (found.lost, found.floor, found.dtype) == (lost, floor, "bfloat16")
        assert "in bfloat16" in str(found)
        if not lost:  # the floor has inputs rounded too
            assert found.error <= 2 * floor
        assert compare(problem, numpy) == found
        # On the way here it was widened, which the dtype undoes.
        for dtype in ("bfloat16", torch.bfloat16, ml_dtypes.bfloat16):
            assert compare(problem, half.float().numpy(), dtype=dtype) == found
    assert compare(problem, half.float().numpy()).floor == rounding_floor(problem, "float32")
    assert compare(problem, problem.output.tolist()).dtype == "float64"
    assert compare(problem, problem.output.astype(np.longdouble)).dtype == "float64"
    with pytest.raises(ValueError, match="dtype must be one of"):
        compare(problem, half, dtype="float8")


def test_where_no_key_is_named_it_is_said_why() -> None:
    problem = head()
    exact, floor = problem.output, rounding_floor(problem, "float16")
    noise = np.random.default_rng(2).standard_normal(exact.shape)
    noise *= np.linalg.norm(exact) / np.linalg.norm(noise)
    # Rounding adds a floor to 6.5 of them, at right angles, and leaves the error within 4 and 10.
    near = str(compare(problem, (exact + 6.5 * floor * noise).astype(np.float16)))
    assert "so near to rounding it hides them" in near
    assert "wider precision than float16" in near
    assert "it is another mistake" in str(compare(problem, 1.01 * exact))
    wrong = 1.01 * exact
    wrong[0, 0] = np.nan
    assert "that needs an output that is finite" in str(compare(problem, wrong))
    counts = np.ones(67)
    counts[11] = 2
    for out in (exact.astype(np.float16), with_weights(problem, counts)):
        said = str(compare(problem, out))
        assert "no " not in said
        assert "mistake" not in said


def test_a_tile_that_is_lost_from_a_real_head_is_named() -> None:
    problem = sa.load_heads()[0]
    counts = np.ones(problem.n_k)
    counts[448:] = 0
    found = compare(problem, with_weights(problem, counts).astype(np.float32))
    assert found.lost == tuple(range(448, 512))
    assert "keys 448 to 511 lost" in str(found)


def test_other_mistakes_name_no_key() -> None:
    problem = head()
    exact = problem.output
    rng = np.random.default_rng(1)
    for wrong in (
        exact + 0.01 * rng.standard_normal(exact.shape),
        sa.AttentionProblem(problem.q, problem.k, problem.v, scale=0.3).output,
        np.zeros_like(exact),
        exact[::-1],
        1.01 * exact,
    ):
        found = compare(problem, wrong)
        assert (found.lost, found.doubled) == ((), ())
        assert found.rest == found.error


def test_what_is_right_is_said_to_be() -> None:
    problem = head()
    found = compare(problem, problem.output.astype(np.float32))
    assert found.error <= 2 * found.floor
    assert found.correlation == pytest.approx(1)
    assert found.slope == pytest.approx(1)
    assert (found.lost, found.doubled, found.not_finite) == ((), (), 0)


def test_rows_slopes_and_entries_that_are_not_finite() -> None:
    problem = head()
    out = np.array(problem.output)
    out[7] *= 1.5
    row, worst = compare(problem, out).worst_rows[0]
    assert row == 7
    assert worst == pytest.approx(0.5)
    assert compare(problem, 3 * problem.output).slope == pytest.approx(3)
    out[9, 2] = np.nan
    found = compare(problem, out)
    assert found.not_finite == 1
    assert "1 entries are not finite" in str(found)


def test_outputs_of_other_shapes_and_kinds_are_refused() -> None:
    problem = head()
    with pytest.raises(ValueError, match="output must have the shape"):
        compare(problem, np.zeros((3, 3)))
    with pytest.raises(TypeError, match="floating point"):
        compare(problem, np.zeros((67, 16), int))
