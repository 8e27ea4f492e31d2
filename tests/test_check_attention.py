"""check_attention: correct programs pass, every wrong one fails, and a blunt check says so."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn.functional.conventions import conventions_table
from sketchattn.operators.reference import round_to
from sketchattn.testing import gradients, inputs, matrix_probe, tolerance
from sketchattn.testing.candidate import LIBRARIES
from sketchattn.testing.dense import logits, output, softmax
from sketchattn.testing.inputs import FEATURES, Case, Setting, make_cases, rounded
from sketchattn.testing.mutants import MUTANTS, Mutant
from sketchattn.testing.report import SCHEMA, AttentionReport

Array = NDArray[Any]
Function = Callable[..., Any]

check = sa.testing.check_attention
ALL = frozenset(FEATURES)
NARROW = ("float32", "float16", "bfloat16")
DTYPES = (*NARROW, "float64")
EVERYTHING = Setting(both=True)


def name_of(x: Array) -> str:
    return str(x.dtype.name)


def wide(*arrays: Array) -> list[Array]:
    return [x.astype(np.float64) for x in arrays]


def case_of(q: Array, k: Array, v: Array, feature: str = "plain", **options: Any) -> Case:
    """Return the case that a call with the convention of the library is."""
    mask, sink = options.get("attn_mask"), options.get("sink")
    q_wide, k_wide, v_wide = wide(q, k, v)
    return Case(
        id="call",
        dtype=name_of(q),
        feature=feature,
        q=q_wide,
        k=k_wide,
        v=v_wide,
        causal=bool(options.get("causal")),
        mask=mask if mask is None or mask.dtype == np.bool_ else mask.astype(np.float64),
        key_mask=options.get("key_mask"),
        window=options.get("window"),
        softcap=options.get("softcap", 0.0),
        scale=options.get("scale"),
        sink=None if sink is None else sink.astype(np.float64),
    )


def with_lse(out: Any, case: Case, options: dict[str, Any]) -> Any:
    return (out, case.truth()[1]) if options.get("return_lse") else out


def low(variant: int) -> Function:
    """Return a baseline of the tolerance as a candidate; float64 is computed in float64."""

    def candidate(q: Array, k: Array, v: Array, **options: Any) -> Any:
        case = case_of(q, k, v, **options)
        outputs = list(tolerance.baselines(case)) or [output(case.parts())]
        return with_lse(round_to(outputs[variant % len(outputs)], q.dtype), case, options)

    return candidate


def tiled(q: Array, k: Array, v: Array, **options: Any) -> Any:
    """Compute online softmax in float32, 64 keys at a time, weights rounded to the dtype."""
    case = case_of(q, k, v, **options)
    dtype = case.dtype
    p = tolerance.single(case.parts())
    x = logits(p)
    top = np.full((*x.shape[:-1], 1), -np.inf, np.float32)
    total, out = np.zeros_like(top), np.zeros((*x.shape[:-1], v.shape[-1]), np.float32)
    if p.sink is not None:
        top = np.broadcast_to(p.sink[:, None, None], top.shape)
        total = np.ones_like(top)
    for start in range(0, x.shape[-1], 64):
        keys = slice(start, start + 64)
        shown = np.where(p.seen[..., keys], x[..., keys], -np.inf)
        new = np.maximum(top, shown.max(axis=-1, keepdims=True))
        safe = np.where(np.isneginf(new), 0, new)
        factor = np.exp(top - safe)
        powers = np.exp(shown - safe)
        total = factor * total + powers.sum(axis=-1, keepdims=True)
        out = factor * out + rounded(powers, dtype) @ p.v[..., keys, :]
        top = new
    out = out / np.where(total == 0, 1, total)
    return with_lse(round_to(out, q.dtype), case, options)


@contextlib.contextmanager
def backend(name: str) -> Any:
    """Choose the implementation behind torch's function."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, name)):
        yield


def torch_function(name: str) -> Function:
    torch = pytest.importorskip("torch")

    def candidate(*arguments: Any, **options: Any) -> Any:
        with backend(name):
            return torch.nn.functional.scaled_dot_product_attention(*arguments, **options)

    return candidate


def ml_dtypes() -> None:
    pytest.importorskip("ml_dtypes")


def assert_passed(report: AttentionReport) -> None:
    assert report.verdict == "PASS", str(report)
    assert report.passed


# --- the right ones pass --------------------------------------------------------------------------

HONEST: dict[str, Function] = {
    "scale on q": low(0),
    "scale on k": low(1),
    "scale after": low(2),
    "in sequence": low(3),
    "base two": low(4),
    "tiled": tiled,
    "ours": sa.attention,
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("scale on q", "float16"),
        ("scale on k", "bfloat16"),
        ("scale after", "float32"),
        ("in sequence", "float32"),
        ("base two", "float32"),
        ("tiled", "bfloat16"),
        ("ours", "float16"),
    ],
)
def test_correct_programs_pass(name: str, dtype: str, global_random_seed: int) -> None:
    ml_dtypes()
    report = check(
        HONEST[name], convention="sketchattn", dtypes=(dtype,), seeds=(global_random_seed,)
    )
    assert_passed(report)
    assert report.skipped == {}
    assert set(report.supports) == ALL


@pytest.mark.parametrize("name", ["MATH", "FLASH_ATTENTION"])
def test_torch_passes(name: str, global_random_seed: int) -> None:
    report = check(torch_function(name), dtypes=NARROW, seeds=(global_random_seed,))
    assert_passed(report)
    # The fused kernel of the CPU wants d_v = d, and raises.
    assert report.skipped.keys() == ({"dv"} if name == "FLASH_ATTENTION" else set())
    assert set(report.supports) == LIBRARIES["torch"].features - report.skipped.keys()
    assert report.convention == "torch"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MATH", "FLASH_ATTENTION"])
def test_torch_passes_fifty_times_in_a_row(name: str) -> None:
    for seed in range(50):
        assert_passed(check(torch_function(name), dtypes=("float16", "bfloat16"), seeds=(seed,)))


@pytest.mark.slow
@pytest.mark.parametrize("name", HONEST)
def test_correct_programs_pass_twenty_times_in_a_row(name: str) -> None:
    ml_dtypes()
    dtypes = ("float32",) if name in ("in sequence", "base two") else NARROW
    for seed in range(20):
        assert_passed(check(HONEST[name], convention="sketchattn", dtypes=dtypes, seeds=(seed,)))


@pytest.mark.parametrize("name", ["torch", "jax", "onnx", "flash", "hf"])
def test_our_functions_for_other_libraries_pass(name: str) -> None:
    report = check(sa.as_convention(name), convention=name, arrays="numpy", seeds=(0,))
    assert_passed(report)
    assert report.skipped == {}


def test_functions_are_given_arrays_of_jax() -> None:
    jax = pytest.importorskip("jax")

    def candidate(*arguments: Any, **options: Any) -> Any:
        assert all(isinstance(x, jax.Array) for x in arguments)
        out = sa.as_convention("jax")(*arguments, **options)
        return tuple(map(jax.numpy.asarray, out)) if isinstance(out, tuple) else out

    report = check(candidate, convention="jax", dtypes=("bfloat16",), seeds=(0,))
    assert_passed(report)
    assert report.skipped == {}


@pytest.mark.slow
def test_jax_passes() -> None:
    jax = pytest.importorskip("jax")
    report = check(
        jax.nn.dot_product_attention,
        convention="jax",
        dtypes=("bfloat16",),
        backward=True,
        seeds=(0,),
    )
    assert_passed(report)
    assert report.skipped == {}


@pytest.mark.slow
def test_the_eager_function_of_transformers_passes() -> None:
    models = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    report = check(
        models.eager_attention_forward, convention="hf", arrays="torch", dtypes=NARROW,
        supports=LIBRARIES["hf"].features - {"sink"}, seeds=(0,),
    )  # fmt: skip
    # It takes every keyword, that of the sink too.
    assert [x.feature for x in report.cases if x.status == "fail"] == ["sink"] * 3


# --- the wrong ones fail --------------------------------------------------------------------------


# The options of a call, by the feature that asks for them.
OPTIONS = {"attn_mask": {"bool_mask", "additive_mask"}, "enable_gqa": {"gqa"}}


def wrong_program(mutant: Mutant) -> Function:
    """Return a wrong answer as a candidate, right wherever it does not differ."""
    takes = supported(mutant)

    def candidate(q: Array, k: Array, v: Array, **options: Any) -> Any:
        for option in options:
            if not takes & OPTIONS.get(option, {option}):
                raise TypeError(option)
        case = case_of(q, k, v, mutant.feature, **options)
        answer = mutant.answer(case) if mutant.matters(case) else output(case.parts())
        return round_to(np.asarray(answer), q.dtype)

    return candidate


def supported(mutant: Mutant) -> set[str]:
    """Return what a wrong program has to be asked."""
    return {
        "plain": {"cross"},
        "empty_row": {"bool_mask", "empty_row"},
        "softcap": {"softcap", "causal"},
        "causal": {"causal", "cross"},
    }.get(mutant.feature, {mutant.feature})


def found_out(mutant: Mutant, dtypes: tuple[str, ...], **options: Any) -> AttentionReport:
    report = check(
        wrong_program(mutant), convention="sketchattn", dtypes=dtypes, seeds=(0,), **options
    )
    for dtype in dtypes:
        assert any(x.dtype == dtype for x in report.failures), (mutant.name, dtype, str(report))
    return report


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_every_wrong_answer_fails_in_every_dtype(name: str) -> None:
    ml_dtypes()
    found_out(MUTANTS[name], DTYPES, supports=supported(MUTANTS[name]))


@pytest.mark.parametrize("name", MUTANTS)
def test_every_wrong_answer_fails(name: str) -> None:
    mutant = MUTANTS[name]
    report = found_out(mutant, ("float32",), supports=supported(mutant))
    named = [x.matches for x in report.cases if x.dtype == "float32" and x.status != "pass"]
    assert name in named, str(report)
    with pytest.raises(AssertionError, match="^FAIL: "):
        report.raise_for_failures()


@pytest.mark.parametrize("name", ["last key dropped", "scale wrong by 1 %"])
def test_the_matrix_shows_what_outputs_hide(name: str) -> None:
    ml_dtypes()
    report = found_out(MUTANTS[name], DTYPES, supports=supported(MUTANTS[name]))
    if name == "scale wrong by 1 %":
        outputs = [x for x in report.cases if x.dtype == "bfloat16" and x.feature == "plain"]
        assert {x.status for x in outputs} == {"pass"}
    for dtype in DTYPES:
        (matrix,) = (x for x in report.probes if x.id == "matrix" and x.dtype == dtype)
        assert matrix.status == "fail"
        found = report.resolution[dtype]
        if name == "last key dropped":
            assert found["mismatches"] == 2 * 67  # two heads
            assert "key 66" in matrix.message
        else:
            assert abs(found["scale"] - 0.01) < 1e-3
            assert re.search(r"the scale is wrong by \+(1\.0|0\.9[5-9])", matrix.message)


def collapsed_features(q: Array, k: Array, v: Array) -> Array:
    """Compute positive random features with a constant that drowns them."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((q.shape[-1], 256))
    factor = q.shape[-1] ** -0.25
    a, b = (
        np.exp(x @ w - np.square(x).sum(axis=-1, keepdims=True) / 2 - 8) + 1
        for x in (factor * q, factor * k)
    )
    weights = a @ np.swapaxes(b, -1, -2)
    out: Array = weights @ v / weights.sum(axis=-1, keepdims=True)
    return out


def unscaled_sketch(q: Array, k: Array, v: Array) -> Array:
    """Sketch keys and values with signs whose squares are not normalised."""
    n = k.shape[-2]
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(n, n))
    a = softmax(q @ np.swapaxes(k, -1, -2) / q.shape[-1] ** 0.5, np.ones((1, 1, 1, 1), bool))
    out: Array = (a @ signs) @ (signs.T @ v)
    return out


def planted(wrong: str) -> Function:
    """Return one of ten planted bugs, as a function with torch's arguments on NumPy arrays."""
    of = {
        "Q and K swapped": "Q and K swapped",
        "V shifted by a row": "V shifted by a row",
        "mask dropped": "mask ignored",
        "causal flag dropped": "causal ignored",
        "causal off by one": "causal one key further",
    }.get(wrong, wrong)

    def candidate(
        q: Array, k: Array, v: Array, attn_mask: Array | None = None, is_causal: bool = False
    ) -> Array:
        case = case_of(q, k, v, attn_mask=attn_mask, causal=is_causal)
        out = output(case.parts())
        plain = attn_mask is None and not is_causal
        if wrong == "random features collapsed":
            out = collapsed_features(*wide(q, k, v)) if plain else out
        elif wrong == "sketch not scaled":
            out = unscaled_sketch(*wide(q, k, v)) if plain else out
        elif MUTANTS[of].matters(case):
            out = MUTANTS[of].answer(case)
        return round_to(np.ascontiguousarray(out), q.dtype)

    return candidate


@pytest.mark.parametrize(
    "wrong",
    [
        "mean of V",
        "scale 1/d",
        "Q and K swapped",
        "V shifted by a row",
        "mask dropped",
        "causal flag dropped",
        "causal off by one",
        "rows not normalised",
        "random features collapsed",
        "sketch not scaled",
    ],
)
@pytest.mark.parametrize(
    "dtypes", [("bfloat16",), pytest.param(DTYPES, marks=pytest.mark.slow)], ids=["one", "all"]
)
def test_ten_planted_bugs_are_caught_in_every_dtype(wrong: str, dtypes: tuple[str, ...]) -> None:
    ml_dtypes()
    report = check(
        planted(wrong),
        arrays="numpy",
        dtypes=dtypes,
        supports={"causal", "bool_mask"},
        seeds=(0,),
    )
    for dtype in dtypes:
        # By outputs alone, at the derived tolerance: no probe is needed.
        assert [x for x in report.cases if x.dtype == dtype and x.status == "fail"], dtype


def test_the_right_program_around_the_bugs_passes() -> None:
    ml_dtypes()
    report = check(
        planted("key heads tiled"),  # there are no key heads to share in its cases
        arrays="numpy",
        dtypes=DTYPES,
        supports={"causal", "bool_mask"},
        seeds=(0,),
    )
    assert_passed(report)
    assert "not declared; raised TypeError" in report.skipped["gqa"]


# --- a check that could not fail says so ----------------------------------------------------------


def test_uniform_inputs_and_a_loose_tolerance_are_not_certified() -> None:
    rng = np.random.default_rng(0)
    x = [rng.random((1, 1, 1024, 64)) for _ in range(3)]
    report = check(
        sa.attention, convention="sketchattn", tolerance=1e-2, inputs=[(x[0], x[1], x[2])]
    )
    assert report.verdict == "UNCERTIFIED"
    assert not report.passed
    let_through = {x.name for x in report.unseen}
    assert let_through & {
        "zeros", "mean of V", "scale 1/d", "Q and K swapped", "V shifted by a row", "scale 1",
    } == {"mean of V", "scale 1/d", "Q and K swapped", "V shifted by a row"}  # fmt: skip
    assert "would be let through" in str(report)
    assert "mean of V (float32): " in str(report)
    # The same inputs at the derived tolerance tell most of them apart.
    derived = check(sa.attention, convention="sketchattn", inputs=[(x[0], x[1], x[2])])
    assert not {"mean of V", "scale 1/d"} & {x.name for x in derived.unseen}
    lenient = replace(report, strict=False)
    assert lenient.passed


def test_given_inputs_say_nothing_of_options() -> None:
    rng = np.random.default_rng(0)
    x = tuple(rng.standard_normal((1, 2, 40, 8)) for _ in range(3))

    def blind(q: Any, k: Any, v: Any, causal: bool = False, scale: Any = None) -> Any:
        return sa.attention(q, k, v)

    options: dict[str, Any] = {
        "convention": "sketchattn",
        "supports": {"causal", "scale"},
        "inputs": [x],
    }
    report = check(blind, **options)
    assert_passed(report)
    assert report.supports == ()
    assert set(report.skipped) == {"causal", "scale"}
    assert "not checked: causal (given inputs make plain calls alone)" in str(report)
    # Gradients of given inputs are judged where they are asked for.
    right = check(blind, backward=sa.attention_vjp, **options)
    assert_passed(right)
    assert any("given/0" in x.id and "dq" in x.id for x in right.cases)

    def halved(q: Any, k: Any, v: Any, g: Any, **more: Any) -> Any:
        return tuple(x / 2 for x in sa.attention_vjp(q, k, v, g, **more))

    assert check(blind, backward=halved, **options).verdict == "FAIL"
    with pytest.raises(ValueError, match="contract must be None beside inputs"):
        check(blind, contract={"P1": "tol"}, **options)


def test_usual_inputs_are_certified_at_a_usual_tolerance() -> None:
    report = check(
        sa.attention, convention="sketchattn", tolerance=1e-2, supports={"causal"}, seeds=(0,)
    )
    assert {x.name for x in report.unseen} <= {"scale wrong by 1 %", "last key dropped"}
    assert report.tolerance == 1e-2


# --- options that are taken and ignored -----------------------------------------------------------


def ignoring(*names: str) -> Function:
    def candidate(q: Array, k: Array, v: Array, **options: Any) -> Any:
        return sa.attention(q, k, v, **{x: y for x, y in options.items() if x not in names})

    return candidate


def test_an_option_that_is_ignored_fails_whether_declared_or_not() -> None:
    declared = check(ignoring("causal"), convention="sketchattn", supports={"causal"}, seeds=(0,))
    assert declared.verdict == "FAIL"
    assert declared.failures[0].matches == "causal ignored"  # type: ignore[union-attr]
    tried = check(ignoring("causal"), convention="sketchattn", seeds=(0,))
    assert tried.verdict == "FAIL"
    silent = check(ignoring("causal"), convention="sketchattn", supports=(), seeds=(0,))
    assert silent.verdict == "FAIL"
    messages = [x.message for x in silent.failures]
    assert len(messages) == 1
    assert messages[0].startswith("causal is not declared, is taken and ignored")
    # What it honours without having said so is no failure.
    assert "window is not declared and works" in silent.notes


def test_a_function_that_takes_other_arrays_is_told_of_them() -> None:
    torch = pytest.importorskip("torch")

    def tensors(q: Any, k: Any, v: Any, softmax_scale: Any = None) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scaled = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=softmax_scale)
        return scaled.transpose(1, 2)

    def numpy(q: Any, k: Any, v: Any) -> Any:
        logits = np.einsum("...id,...jd->...ij", q.view(np.ndarray), k) / q.shape[-1] ** 0.5
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True) @ v

    for fn, convention, arrays in ((tensors, "flash", "torch"), (numpy, "torch", "numpy")):
        options: dict[str, Any] = {"convention": convention, "supports": (), "seeds": (0,)}
        found = sa.testing.check_attention(fn, **options)
        said = [x.message for x in found.cases]
        assert said[0].startswith("raised ")
        assert said[0].endswith(f"; it takes arrays of {arrays}: pass arrays={arrays!r}")
        assert not any("arrays=" in x for x in said[1:])  # once
        assert sa.testing.check_attention(fn, arrays=arrays, **options).passed

    def neither(q: Any, k: Any, v: Any) -> Any:
        raise RuntimeError("no kernel")

    found = sa.testing.check_attention(neither, convention="flash", supports=(), seeds=(0,))
    assert found.cases[0].message == (
        "raised RuntimeError: no kernel; it was given NumPy arrays, and tensors only with "
        "arrays='torch'"
    )


def test_an_option_that_raises_is_skipped_where_nobody_promised_it() -> None:
    def candidate(q: Array, k: Array, v: Array, scale: float | None = None) -> Any:
        return sa.attention(q, k, v, scale=scale)

    report = check(candidate, convention="sketchattn", seeds=(0,))
    assert_passed(report)
    assert set(report.supports) == {"dv", "cross", "scale"}
    assert "raised TypeError" in report.skipped["causal"]
    assert "not checked: causal (raised TypeError" in str(report)
    assert not any("causal" in x.name for x in report.mutants)
    promised = check(candidate, convention="sketchattn", supports={"causal"}, seeds=(0,))
    assert promised.verdict == "FAIL"
    assert "raised TypeError" in str(promised)


# --- gradients ------------------------------------------------------------------------------------


def test_gradients_of_torch_pass() -> None:
    torch = pytest.importorskip("torch")
    report = check(
        torch.nn.functional.scaled_dot_product_attention,
        seeds=(0,),
        backward=True,
    )
    assert_passed(report)
    judged = {x.id.split()[-1] for x in report.cases if "gradient" in x.id}
    assert judged == {"dq", "dk", "dv"}
    names = {x.name for x in report.mutants if x.name.startswith("gradient")}
    assert names >= {
        "gradient: delta dropped",
        "gradient: scale missing",
        "gradient: dQ and dK swapped",
        "gradient: not summed over the group",
        "gradient: causal ignored",
    }


def our_vjp(q: Array, k: Array, v: Array, g: Array, **options: Any) -> Any:
    return sa.attention_vjp(q, k, v, g, **options)


@pytest.mark.parametrize("seed", range(3))
def test_our_own_gradients_pass(seed: int) -> None:
    ml_dtypes()
    report = check(
        sa.attention,
        convention="sketchattn",
        dtypes=("float16", "float32", "float64"),
        seeds=(seed,),
        backward=our_vjp,
    )
    assert_passed(report)
    names = {x.name for x in report.mutants}
    assert "gradient: no derivative of the softcap" in names


@pytest.mark.parametrize("seed", range(6))
def test_a_second_pass_with_other_sums_has_tolerable_gradients(seed: int) -> None:
    # In base 2, with a log-sum-exp from logits that BLAS summed: what kernels do.  Largest errors
    # are a matter of chance, so a fifth of a tolerance is left to other ways of rounding.
    rng = np.random.default_rng(seed)
    case = next(
        x
        for x in make_cases("float32", LIBRARIES["sketchattn"].setting, frozenset(), (seed,))
        if x.id == f"float32/plain/overflow/{seed}"
    )
    g = gradients.cotangent(case, seed)
    truth = gradients.true_gradients(case, g)
    order = rng.permutation(case.q.shape[-1])
    q, k, v, small = (x.astype(np.float32) for x in (case.q, case.k, case.v, g))
    scaled = np.float32(case.factor * np.log2(np.e)) * q
    first = scaled @ np.swapaxes(k, -1, -2)
    again = np.zeros_like(first)
    for t in order:
        again += scaled[..., t, None] * k[..., None, :, t]
    top = first.max(axis=-1, keepdims=True)
    a = np.exp2(again - (top + np.log2(np.exp2(first - top).sum(axis=-1, keepdims=True))))
    dv = np.swapaxes(a, -1, -2) @ small
    allowed = gradients.gradient_tolerance(case, g, truth).tol[2]
    assert np.abs(dv - truth[2]).max() < 0.8 * allowed


WRONG_GRADIENTS: dict[str, str] = {
    "gradient: delta dropped": "plain",
    "gradient: scale missing": "plain",
    "gradient: dQ and dK swapped": "plain",
    "gradient: dK and dV swapped": "plain",
    "gradient: no derivative of the softcap": "softcap",
    "gradient: not summed over the group": "gqa",
    "gradient: causal ignored": "causal",
    "gradient: mask ignored": "bool_mask",
    "gradient: added mask ignored": "additive_mask",
    "gradient: padding of keys ignored": "key_mask",
    "gradient: window ignored": "window",
}


def wrong_gradients_fail(wrong: str, dtypes: tuple[str, ...]) -> None:
    feature = WRONG_GRADIENTS[wrong]
    allowed = {"bool_mask": "attn_mask", "additive_mask": "attn_mask", "gqa": "enable_gqa"}

    def forward(q: Array, k: Array, v: Array, **options: Any) -> Any:
        if options.keys() - {allowed.get(feature, feature)}:
            raise TypeError("not declared")
        return sa.attention(q, k, v, **options)

    def vjp(q: Array, k: Array, v: Array, g: Array, **options: Any) -> Any:
        case = case_of(q, k, v, feature if options else "plain", **options)
        wide_g = g.astype(np.float64)
        truth = gradients.true_gradients(case, wide_g)
        found = dict(gradients.wrong_gradients(case, wide_g, truth)).get(wrong, truth)
        return [round_to(np.ascontiguousarray(x), q.dtype) for x in found]

    report = check(
        forward,
        convention="sketchattn",
        dtypes=dtypes,
        supports={feature} - {"plain"},
        seeds=(0,),
        backward=vjp,
    )
    for dtype in dtypes:
        failed = [x for x in report.cases if x.dtype == dtype and x.status != "pass"]
        assert failed, (wrong, dtype)
        assert all("gradient" in x.id for x in failed)
        assert wrong in {x.matches for x in failed}
    assert report.verdict == "FAIL"
    assert not [x for x in report.mutants if not x.rejected]


@pytest.mark.parametrize("wrong", WRONG_GRADIENTS)
def test_wrong_gradients_fail(wrong: str) -> None:
    ml_dtypes()
    wrong_gradients_fail(wrong, ("bfloat16",))


@pytest.mark.slow
@pytest.mark.parametrize("wrong", WRONG_GRADIENTS)
def test_wrong_gradients_fail_in_every_dtype(wrong: str) -> None:
    ml_dtypes()
    wrong_gradients_fail(wrong, DTYPES)


# --- properties -----------------------------------------------------------------------------------


def changed(change: Callable[[Array, Case], Array]) -> Function:
    """Return attention whose output something is done to."""

    def candidate(q: Array, k: Array, v: Array, **options: Any) -> Any:
        case = case_of(q, k, v, **options)
        out = round_to(change(output(case.parts()), case), q.dtype)
        return (out, 1.001 * case.truth()[1]) if options.get("return_lse") else out

    return candidate


def other_heads(out: Array, case: Case) -> Array:
    leak: Array = out + 1e-3 * case.v.mean(axis=(1, 2), keepdims=True)
    return leak


def other_entries(out: Array, case: Case) -> Array:
    leak: Array = out + 1e-3 * case.v.mean(axis=(0, 2), keepdims=True)
    return leak


def future_keys(out: Array, case: Case) -> Array:
    leak: Array = out + 1e-9 * case.k.mean() if case.causal else out
    return leak


def hidden_keys(out: Array, case: Case) -> Array:
    leak: Array = out + 1e-9 * case.k.mean() if case.mask is not None else out
    return leak


def padded_keys(out: Array, case: Case) -> Array:
    leak: Array = out + 1e-9 * case.k.mean() if case.key_mask is not None else out
    return leak


# The property, what breaks it, and the line that must name it.
BREAKS: dict[str, tuple[str, Callable[[Array, Case], Array]]] = {
    "sums": ("P1", lambda out, c: 1.0001 * out),
    "doubling": ("P2", lambda out, c: out + 1e-9 * c.v.max() ** 2),
    "addition": ("P3", lambda out, c: out + 1e-3 * np.square(c.v).mean()),
    "hull": ("P4", lambda out, c: 3 * out),
    "shift of keys": ("P5", lambda out, c: out + 1e-3 * c.k.mean()),
    "order of keys": ("P6", lambda out, c: out + 1e-3 * c.k[:, :1, :1, :1]),
    "order of queries": ("P7", lambda out, c: out + 1e-3 * np.arange(out.shape[2])[:, None]),
    "one query": ("P8", lambda out, c: out * (1 + 1e-3 * (out.shape[2] == 1))),
    "heads": ("P9", other_heads),
    "entries": ("P10", other_entries),
    "future": ("P11", future_keys),
    "masked": ("P12", hidden_keys),
    "padding": ("P12", padded_keys),
    "duplicates": ("P13", lambda out, c: out + 1e-4 * c.k.shape[2]),
    "one key": ("P16", lambda out, c: out * (1 + 1e-9)),
    "logsumexp": ("P17", lambda out, c: out),
}


@pytest.mark.parametrize("name", BREAKS)
def test_every_property_can_fail(name: str) -> None:
    which, change = BREAKS[name]
    supports = {"cross", "causal", "bool_mask", "key_mask", "lse"}
    report = check(
        changed(change),
        convention="sketchattn",
        dtypes=("float64",),
        supports=supports,
        seeds=(0,),
    )
    failed = {x.id for x in report.probes if x.status == "fail"}
    assert which in failed, str(report)


def test_inputs_that_are_written_are_reported() -> None:
    def candidate(q: Array, k: Array, v: Array, **options: Any) -> Any:
        out = sa.attention(q, k, v, **options)
        if q.flags.writeable:
            q *= 2
        return out

    report = check(candidate, convention="sketchattn", supports=(), seeds=(0,))
    assert [str(x) for x in report.failures] == [
        "P15 inputs are left as they are (float32): an input was written"
    ]

    def picky(q: Array, k: Array, v: Array, **options: Any) -> Any:
        if not q.flags.c_contiguous:
            raise ValueError("only contiguous")
        return sa.attention(q, k, v, **options)

    report = check(picky, convention="sketchattn", supports=(), seeds=(0,))
    assert_passed(report)
    (strided,) = (x for x in report.probes if x.id == "P15" and x.status == "report")
    assert strided.message == "raised ValueError: only contiguous"


# --- approximations -------------------------------------------------------------------------------


def test_approximations_are_reported_and_judged_by_their_contract() -> None:
    def candidate(q: Array, k: Array, v: Array) -> Any:
        return sa.attention(q, k[:, :, ::2], v[:, :, ::2])

    report = check(
        candidate,
        convention="sketchattn",
        kind="approx",
        contract={"P4": "tol", "P2": "exact"},
        supports=(),
        seeds=(0,),
    )
    assert report.verdict == "PASS", str(report)
    assert report.mutants == ()
    assert {x.status for x in report.cases} == {"report"}
    assert all(0.1 < x.rel_fro < math.inf for x in report.cases)
    claimed = {x.id: x.status for x in report.probes if x.id in ("P4", "P2", "P6")}
    assert claimed == {"P4": "pass", "P2": "pass", "P6": "report"}
    broken = check(
        candidate,
        convention="sketchattn",
        kind="approx",
        contract={"P6": "exact"},
        supports=(),
        seeds=(0,),
    )
    assert broken.verdict == "FAIL"


def test_draws_reach_the_function() -> None:
    seen = []

    def candidate(q: Array, k: Array, v: Array, draw: Any, **options: Any) -> Any:
        seen.append(draw)
        return sa.attention(q, k, v, **options)

    check(candidate, convention="sketchattn", supports=(), seeds=(0,), draws={"draw": "given"})
    assert set(seen) == {"given"}


# --- what the tolerance is made of ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_programs_begin_with_the_right_one(dtype: str) -> None:
    for setting in (EVERYTHING, Setting("bottom-right", "mean", prefix_keys=True)):
        for case in make_cases(dtype, setting, ALL, (3,)):
            truth, _ = case.truth()
            assert np.abs(output(case.parts()) - truth).max() < 1e-13 * np.abs(case.v).max()


def test_inputs_are_numbers_of_their_dtype() -> None:
    for dtype in ("float16", "bfloat16", "float32"):
        for case in make_cases(dtype, EVERYTHING, ALL, (0, 1)):
            for x in (case.q, case.k, case.v):
                assert np.array_equal(rounded(x, dtype), x)
            sizes = (*case.q.shape[2:], *case.k.shape[2:], case.v.shape[3])
            assert case.k.shape[2] == 1 or all(n % 32 or n in (16, 64) for n in sizes)
            if "lattice" in case.id:
                assert case.q.shape[3] == 16
                exact = logits(Case("", "", "", case.q, case.k, case.v).parts())
                assert np.array_equal(rounded(exact, "bfloat16"), exact)


def test_rounding_is_that_of_the_library(global_random_seed: int) -> None:
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    bits = np.random.default_rng(global_random_seed).integers(0, 2**32, 100_000, np.uint32)
    x = bits.view(np.float32)
    with np.errstate(all="ignore"):
        for dtype, kind in (("bfloat16", bfloat16), ("float16", np.float16)):
            want = x.astype(kind).astype(np.float32)
            assert np.array_equal(rounded(x, dtype), want, equal_nan=True)


def below_the_ceiling(seeds: range) -> float:
    """Return the largest error of honest programs over the ceiling, on random shapes."""
    worst = 0.0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        n_q, n_k = (int(x) for x in rng.integers(1, 300, 2))
        sizes = (1, 1, 1, n_q, n_k, int(rng.integers(1, 129)), int(rng.integers(1, 65)))
        for dtype in NARROW:
            made = inputs.normal(rng, sizes)
            q, k, v = (inputs.numbers(x, dtype) for x in made)
            case = Case("", dtype, "plain", q, k, v, causal=bool(seed % 2))
            truth, _ = case.truth()
            top = tolerance.ceiling(case)
            found = tolerance.tolerance(case, truth)
            for out in (*tolerance.baselines(case), np.asarray(rounded(truth, dtype))):
                worst = max(worst, float((np.abs(out - truth) / top).max()))
            assert found.e_lp <= top.max()
    return worst


def test_no_honest_program_is_above_the_ceiling() -> None:
    assert 0.01 < below_the_ceiling(range(10)) <= 1


@pytest.mark.slow
def test_no_honest_program_is_above_the_ceiling_of_two_hundred_shapes() -> None:
    assert below_the_ceiling(range(200)) <= 1


def test_an_error_that_rounding_could_explain_is_suspect() -> None:
    def candidate(q: Array, k: Array, v: Array) -> Array:
        out = sa.attention(q, k, v)
        return out + np.float32(4e-6)

    report = check(candidate, convention="sketchattn", supports=(), seeds=(0,))
    suspect = [x for x in report.cases if x.status == "suspect"]
    assert suspect
    assert all(x.ratio > 1 >= x.ceiling_ratio for x in suspect)
    assert "rounding could explain it" in str(suspect[0])


def test_the_matrix_probe_measures_the_scale() -> None:
    (case, *_) = matrix_probe.matrix_cases("float64", EVERYTHING, frozenset(), 0)
    p = case.parts()
    for t in (-0.3, 0.0, 0.02):
        found = matrix_probe.resolve(softmax((1 + t) * logits(p), p.seen), case)
        assert abs(found.scale - t) < 1e-12
        assert found.right == (t == 0)
    unnormalised = matrix_probe.resolve(1.001 * softmax(logits(p), p.seen), case)
    assert not unnormalised.right
    assert "rows sum to 1 only within 0.001" in str(unnormalised)


# --- reports --------------------------------------------------------------------------------------


def test_a_report_is_short_text_html_and_json() -> None:
    def mean(q: Array, k: Array, v: Array, **options: Any) -> Array:
        return np.broadcast_to(v.mean(axis=2, keepdims=True), q.shape).copy()

    mean.__qualname__ = "<mean> & more"
    report = check(mean, convention="sketchattn", supports=(), seeds=(0,))
    text = str(report)
    assert text.splitlines()[0].startswith("FAIL: <mean> & more as attention of sketchattn")
    assert "looks like: mean of V" in text
    assert "worst at (" in text
    assert "correlation" in text
    assert "times this tolerance" in text
    assert len(repr(report)) < 200
    assert "\n" not in repr(report)
    page = report._repr_html_()
    assert "&lt;mean&gt; &amp; more" in page
    assert "<mean>" not in page
    data = json.loads(report.to_json())
    assert data["schema"] == SCHEMA
    assert data["verdict"] == "FAIL"
    assert data["passed"] is False
    assert data["cases"][0]["worst_index"]
    assert data["cases"][0]["would_pass"].keys() == {
        "torch.testing", "xformers", "triton tutorial", "kernelbench",
    }  # fmt: skip
    assert data["versions"]["numpy"] == np.__version__
    with pytest.raises(AssertionError):
        report.raise_for_failures()


def test_outputs_that_are_not_numbers_fail() -> None:
    def candidate(q: Array, k: Array, v: Array) -> Array:
        out: Array = sa.attention(q, k, v)
        out[0, 0, 3, 2] = np.nan
        return out

    report = check(candidate, convention="sketchattn", supports=(), seeds=(0,))
    first = report.cases[0]
    assert (first.status, first.err_max, first.worst_index) == ("fail", math.inf, (0, 0, 3, 2))
    assert json.loads(report.to_json())["cases"][0]["err_max"] == "inf"


def test_shapes_that_are_wrong_and_exceptions_fail() -> None:
    report = check(lambda q, k, v: v[:, :, :5], convention="sketchattn", supports=(), seeds=(0,))
    assert "the output must have shape (1, 2, 130, 64) as (b, h, n, d)" in str(report)

    def broken(q: Array, k: Array, v: Array) -> Array:
        raise RuntimeError("no kernel\nfor this")

    report = check(broken, convention="sketchattn", supports=(), seeds=(0,))
    assert report.verdict == "FAIL"
    assert "raised RuntimeError: no kernel" in str(report)
    assert "for this" not in str(report)


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"convention": "tensor"}, "convention must be a known name, got 'tensor'"),
        ({"dtypes": ("float8",)}, "dtypes must be a known name, got 'float8'"),
        ({"dtypes": ()}, "dtypes and seeds must not be empty"),
        ({"seeds": ()}, "dtypes and seeds must not be empty"),
        ({"supports": ("softcap",)}, "supports must hold what the convention 'torch' offers"),
        ({"supports": ("causality",)}, "supports must be one of"),
        ({"kind": "near"}, "kind must be one of exact, approx"),
        ({"tolerance": "loose"}, "tolerance must be 'derived' or a number"),
        ({"tolerance": True}, "tolerance must be 'derived' or a number, got bool"),
        ({"tolerance": 0.0}, "tolerance must be positive"),
        ({"contract": {"P99": "exact"}}, "contract must be one of"),
        ({"contract": {"P1": "yes"}}, "contract must be one of exact, tol, not_claimed"),
        ({"arrays": "cupy"}, "arrays must be one of numpy, torch, jax"),
        ({"arrays": "numpy", "device": "cpu"}, "device must be None for arrays of numpy"),
        ({"arrays": "numpy", "backward": True}, "backward must be a function vjp"),
        ({"arrays": "numpy", "backward": 3}, "backward must be callable, got int"),
        ({"strict": 1}, "strict must be a bool"),
        ({"arrays": "numpy", "inputs": [(np.ones(3),) * 3]}, "inputs must hold q, k and v"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    pytest.importorskip("torch")
    with pytest.raises((ValueError, TypeError), match=message.replace("(", r"\(")):
        check(lambda q, k, v: q, **options)


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "jax", "ml_dtypes"):
        monkeypatch.setitem(sys.modules, name, None)
    for options, name in (
        ({"convention": "torch"}, "torch"),
        ({"convention": "jax"}, "jax"),
        ({"convention": "flash", "dtypes": ("bfloat16",)}, "ml_dtypes"),
    ):
        with pytest.raises(ImportError, match=f"run: pip install {name}"):
            check(sa.as_convention("flash"), **options)


def test_jax_says_how_to_get_doubles() -> None:
    jax = pytest.importorskip("jax")
    if jax.config.jax_enable_x64:
        pytest.skip("jax has doubles here")
    with pytest.raises(ValueError, match="jax_enable_x64"):
        check(jax.nn.dot_product_attention, convention="jax", dtypes=("float64",))


# --- the page -------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "docs" / "checking.md"


def test_the_blocks_of_the_page_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    printed = capsys.readouterr().out
    assert "FAIL: forgetful as attention of flash" in printed
    assert "UNCERTIFIED: attention as attention of sketchattn" in printed


def test_the_table_of_the_page_is_that_of_the_records() -> None:
    text = PAGE.read_text("utf-8")
    table = text.partition("<!-- conventions -->\n")[2].partition("\n<!-- end -->")[0]
    assert table == conventions_table()
