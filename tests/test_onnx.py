"""ONNX's conformance suite of Attention, through the public function and through the loops."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import unittest
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from naive import naive_attention
from numpy.typing import NDArray
from packaging_checks import ROOT

import sketchattn as sa
from sketchattn.cli import main
from sketchattn.operators.reference import round_to

pytest.importorskip("onnx")

from sketchattn.integrations import onnx as room
from sketchattn.integrations.onnx import (
    Backend,
    Call,
    Case,
    attend,
    conformance,
    evaluate,
    load_cases,
    mismatches,
    onnx,
    prepare,
)

Array = NDArray[Any]

CASES = load_cases()


def reference_grade(call: Call) -> Array:
    return attend(call)


def fast(call: Call) -> Array:
    return attend(call, None)


def loops(call: Call) -> Array:
    out = np.empty((*call.q.shape[:3], call.v.shape[3]))
    for b, h in np.ndindex(*call.q.shape[:2]):
        kv = h // call.group
        _, out[b, h], _ = naive_attention(
            call.q[b, h],
            call.k[b, kv],
            call.v[b, kv],
            scale=call.scale,
            first=int(call.offset[b]),
            left=call.left,
            right=call.right,
            softcap=call.softcap,
            key_mask=None if call.key_mask is None else call.key_mask[b],
            mask=call.mask_of(b, h),
        )
    return round_to(out, call.q.dtype)


def test_the_suite_is_complete() -> None:
    assert len(CASES) == 93
    assert Counter(case.opset for case in CASES) == {23: 69, 24: 13, 25: 11}
    kinds = Counter(case.node.inputs["Q"].dtype.name for case in CASES)
    assert kinds == {"float32": 82, "float16": 6, "bfloat16": 5}


@pytest.mark.interpreted
@pytest.mark.parametrize("program", [reference_grade, fast, loops], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_conformance(case: Case, program: Callable[[Call], Array]) -> None:
    assert mismatches(case, evaluate(case.node, program)) == []


def change(**changes: Any) -> Callable[[Call], Call]:
    return lambda call: replace(call, **changes)


MUTANTS: dict[str, Callable[[Call], Call]] = {
    "mean of V": lambda call: replace(call, q=np.zeros_like(call.q)),
    "scale 1/d": lambda call: replace(call, scale=1.0 / call.q.shape[3]),
    "scale +1 %": lambda call: replace(call, scale=1.01 * call.scale),
    "softcap ignored": change(softcap=0.0),
    "causal ignored": change(causal=False),
    "offset always 0": lambda call: replace(call, offset=np.zeros_like(call.offset)),
    "mask ignored": change(attn_mask=None),
    "window ignored": change(window=(-1, -1)),
    "V rolled by one key": lambda call: replace(call, v=np.roll(call.v, 1, axis=2)),
    "kv heads rolled": lambda call: replace(
        call, k=np.roll(call.k, 1, axis=1), v=np.roll(call.v, 1, axis=1)
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_suite_rejects(mutant: str) -> None:
    # Judged on Y alone: a wrong program must not be rejected for an output that is beside it.
    passed = sum(
        "Y" not in mismatches(case, evaluate(case.node, reference_grade, MUTANTS[mutant]))
        for case in CASES
    )
    assert passed < len(CASES)


def test_offsets_and_masks_of_the_cases_are_what_the_operator_says() -> None:
    by_name = {case.name: prepare(case.node) for case in CASES}
    past = by_name["test_attention_4d_causal_with_past_and_present"]
    assert past.offset.tolist() == [3, 3]
    assert past.k.shape[2] == 7
    empty = by_name["test_attention_4d_causal_nonpad_negative_offset_structural_empty"]
    assert empty.offset.tolist() == [-2]
    padded = by_name["test_attention_4d_diff_heads_mask4d_padded_kv"]
    assert padded.attn_mask is not None
    assert padded.attn_mask.shape == (2, 3, 4, 6)
    assert np.all(np.isneginf(padded.attn_mask[..., 4:]))


# --- the report and the command -------------------------------------------------------------------


def test_the_report_counts_every_case_and_says_why_some_are_not_covered() -> None:
    report = conformance()
    assert (len(report.passed), len(report.failed), len(report.not_covered)) == (93, 0, 93)
    assert report.programs == ("float64 reference", "fast path")
    assert all(x.reason == "" and x.dtype for x in report.passed)
    assert all("expanded" in x.name and "other operators" in x.reason for x in report.not_covered)
    assert "93 of 93 cases passed" in str(report)
    assert "not covered: 93" in str(report)
    report.raise_for_failures()


def test_the_report_of_a_wrong_program_says_which_cases_and_outputs() -> None:
    def uncapped(call: Call) -> Array:
        return attend(replace(call, softcap=0.0))

    def refuses(call: Call) -> Array:
        raise ValueError("no\nwindows") if call.window != (-1, -1) else AssertionError

    report = conformance({"right": attend, "uncapped": uncapped})
    wrong = {x.name for x in report.failed}
    assert 0 < len(wrong) < 93
    assert wrong <= {case.name for case in CASES if case.node.attributes.get("softcap")}
    assert {x.reason for x in report.failed} == {"uncapped: Y"}
    assert all(name in str(report) for name in wrong)
    with pytest.raises(AssertionError, match=min(wrong)):
        report.raise_for_failures()
    (reasons,) = conformance({"it": refuses}).render().split("failed: 93\n")[1:]
    assert "it: ValueError: no windows\n" in reasons
    assert "it: TypeError" in reasons or "it: AssertionError" in reasons


def test_the_command_prints_the_counts_and_fails_where_a_case_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["conformance", "onnx"]) == 0
    assert "93 of 93 cases passed" in capsys.readouterr().out
    monkeypatch.setattr(
        room, "PROGRAMS", {"mutant": lambda call: attend(MUTANTS["causal ignored"](call))}
    )
    assert main(["conformance", "onnx", "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["passed"] + printed["failed"] == printed["not_covered"] == 93
    assert printed["failed"] == sum(x["status"] == "failed" for x in printed["cases"]) > 0
    assert main(["conformance", "pytest"]) == 2
    message = "sketchattn: suite must be 'onnx', got 'pytest'; there is no other\n"
    assert capsys.readouterr().err == message


def test_a_missing_package_is_one_line_with_the_command() -> None:
    code = (
        "import sys; sys.modules['onnx'] = None; from sketchattn.cli import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "conformance", "onnx"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "sketchattn: sketchattn.integrations.onnx needs the package onnx, which is not installed; "
        "run: python -m pip install onnx\n"
    )


# --- the backend ----------------------------------------------------------------------------------


def run_by_onnx(monkeypatch: pytest.MonkeyPatch, backend: type) -> unittest.TestResult:
    """Run the cases of the operator as ``onnx.backend.test`` does."""
    import onnx.backend.test.loader as loader
    from onnx.backend.test import BackendTest

    # ONNX would compute the cases of every operator; those of this one are loaded.
    monkeypatch.setattr(loader, "import_recursive", lambda package: None)
    suite = BackendTest(backend, __name__)
    suite.include("^test_attention_.*_cpu$").exclude("expanded")
    cases = suite.test_cases["OnnxBackendNodeModelTest"]
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(cases).run(result)
    return result


def test_the_runner_of_onnx_passes_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_by_onnx(monkeypatch, Backend)
    assert (result.failures, result.errors) == ([], [])
    assert result.testsRun - len(result.skipped) == 93


def test_the_runner_of_onnx_rejects_a_wrong_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_mask(node: Any) -> dict[str, Array]:
        return evaluate(node, mutate=MUTANTS["mask ignored"])

    monkeypatch.setattr(room, "evaluate", without_mask)
    result = run_by_onnx(monkeypatch, Backend)
    assert result.errors == []
    failed = {str(case).partition("_cpu")[0] for case, _ in result.failures}
    assert 0 < len(failed) < 93
    assert failed <= {case.name for case in CASES if "attn_mask" in case.node.inputs}


def model_of(nodes: list[Any], opset: int = 23, **constants: Array) -> Any:
    """Return a model with inputs q, k, v of (2, 3, 5, 4) and the output y."""
    kind, helper = onnx.TensorProto.FLOAT, onnx.helper
    shapes = {"q": (2, 3, 5, 4), "k": (2, 3, 5, 4), "v": (2, 3, 5, 4)}
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info("y", kind, shapes["q"])],
        [onnx.numpy_helper.from_array(x, name) for name, x in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)


X = np.random.default_rng(0).standard_normal((3, 2, 3, 5, 4)).astype(np.float32)


def test_a_model_with_attention_nodes_and_a_constant_runs() -> None:
    mask = np.tri(5, dtype=np.bool_)
    make = onnx.helper.make_node
    nodes = [
        make("Attention", ["q", "k", "v", "mask"], ["x"], scale=0.5),
        make("Attention", ["x", "k", "v"], ["y", "", "", "weights"], qk_matmul_output_mode=3),
    ]
    model = model_of(nodes, mask=mask)
    want = sa.attention(*X, scale=0.5, causal=True, compute_dtype=np.float64)
    want = sa.attention(want, *X[1:], compute_dtype=np.float64)
    for inputs in (list(X), dict(zip("qkv", X, strict=True))):
        (y,) = Backend.run_model(model, inputs)
        assert np.array_equal(y, want)
        assert y.dtype == np.float32
    prepared = Backend.prepare(model)
    with pytest.raises(ValueError, match="3 arrays"):
        prepared.run(list(X[:2]))
    with pytest.raises(ValueError, match="inputs must hold 'v'"):
        prepared.run({"q": X[0], "k": X[1]})


def test_a_node_runs_alone() -> None:
    node = onnx.helper.make_node("Attention", ["q", "k", "v"], ["y"], is_causal=1)
    (y,) = Backend.run_node(node, list(X))
    assert np.array_equal(y, sa.attention(*X, causal=True, compute_dtype=np.float64))
    packed = onnx.helper.make_node(
        "Attention", ["q", "k", "v"], ["y"], q_num_heads=3, kv_num_heads=3
    )
    flat = [x.swapaxes(1, 2).reshape(2, 5, 12) for x in X]
    (y,) = Backend.run_node(packed, flat)
    want = sa.attention(*X, compute_dtype=np.float64)
    assert np.array_equal(y, want.swapaxes(1, 2).reshape(2, 5, 12))
    with pytest.raises(ValueError, match="q_num_heads"):
        Backend.run_node(node, flat)


def test_other_operators_devices_and_opsets_are_refused_in_one_line() -> None:
    make = onnx.helper.make_node
    mixed = model_of([make("Attention", ["q", "k", "v"], ["x"]), make("Relu", ["x"], ["y"])])
    assert not Backend.is_compatible(mixed)
    with pytest.raises(
        ValueError, match=r"^model must consist of the operator Attention, got 'Relu'"
    ):
        Backend.prepare(mixed)
    foreign = make("Attention", ["q", "k", "v"], ["y"], domain="com.microsoft")
    with pytest.raises(ValueError, match="got 'com.microsoft.Attention'"):
        Backend.run_node(foreign, list(X))
    right = model_of([make("Attention", ["q", "k", "v"], ["y"])])
    assert Backend.is_compatible(right)
    assert Backend.supports_device("CPU:0")
    assert not Backend.is_compatible(right, "CUDA")
    with pytest.raises(ValueError, match="device must be 'CPU', got 'CUDA:1'"):
        Backend.prepare(right, "CUDA:1")
    with pytest.raises(ValueError, match="got opset 22"):
        Backend.run_node(right.graph.node[0], list(X), opset_version=22)


def test_the_code_of_the_page_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "onnx.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "text", "python", "python"]
    names: dict[str, Any] = {}
    exec(blocks[0][1], names)
    version = re.compile(r"ONNX [\d.]+")
    assert version.sub("", capsys.readouterr().out) == version.sub("", blocks[1][1])
    exec(blocks[2][1], names)
    assert re.match(r"\d+ cases see a missing causal mask", capsys.readouterr().out)
    exec(blocks[3][1], names)
    assert capsys.readouterr().out == "(1, 2, 5, 4) float32\n"
