"""The ONNX operator Attention: its conformance cases, and a backend for models made of it.

``conformance()`` runs the cases of the installed ``onnx`` package; ``Backend`` runs models, and is
what ``onnx.backend.test`` tests.  Both compute one application of the operator, a ``Node``:
``prepare`` turns it into one call of attention on unpacked heads, ``evaluate`` packs the answer.

Imports ``functional`` and what is below.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..functional.batched import attention
from ..functional.conventions import onnx_operands
from ..operators.reference import Stage, masked_logits, round_to, softmax_rows, visible

try:
    onnx: Any = importlib.import_module("onnx")  # its types are there only where it is
    base: Any = importlib.import_module("onnx.backend.base")
except ImportError as error:
    raise ImportError(
        "sketchattn.integrations.onnx needs the package onnx, which is not installed; "
        "run: python -m pip install onnx"
    ) from error

Array = NDArray[Any]

INPUTS = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
OUTPUTS = ("Y", "present_key", "present_value", "qk_matmul_output")
STAGES: tuple[Stage, ...] = ("scaled", "capped", "masked")
VERSIONS = (23, 24, 25)  # of the operator: the opsets that changed it


# --- one application of the operator --------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """Hold one application of the operator.

    Attributes
    ----------
    attributes : dict
        Those that are given.
    inputs : dict
        Arrays by the name of their slot, as in ``INPUTS``; absent ones are left out.
    outputs : tuple of str
        The names of the wanted slots, as in ``OUTPUTS``.
    """

    attributes: dict[str, Any]
    inputs: dict[str, Array]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Call:
    """Hold one call of attention: q (B, H, n_q, d), k (B, H_kv, n_k, d), v (B, H_kv, n_k, d_v).

    Query row i of batch element b has position offset[b] + i, for causality and window alike.
    """

    q: Array
    k: Array
    v: Array
    scale: float
    causal: bool
    offset: Array  # (B,) int64
    window: tuple[int, int]
    softcap: float
    key_mask: Array | None  # (B, n_k) bool
    attn_mask: Array | None  # broadcastable to (B, H, n_q, n_k), bool or additive

    @property
    def left(self) -> int | None:
        """Reach of a query to the left, None where it is unbounded."""
        return None if self.window[0] < 0 else self.window[0]

    @property
    def right(self) -> int | None:
        """Reach of a query to the right, None where it is unbounded."""
        sides = [0] * self.causal + [side for side in self.window[1:] if side >= 0]
        return min(sides, default=None)

    @property
    def group(self) -> int:
        """Query head h reads key head ``h // group``."""
        return int(self.q.shape[1] // self.k.shape[1])

    def mask_of(self, b: int, h: int) -> Array | None:
        """Return the mask (n_q, n_k) of one head; numbers are widened to float64."""
        if self.attn_mask is None:
            return None
        shape = (*self.q.shape[:3], self.k.shape[2])
        mask: Array = np.broadcast_to(self.attn_mask, shape)[b, h]
        return mask if mask.dtype == np.bool_ else mask.astype(np.float64)


Attend = Callable[[Call], Array]


def unpack(x: Array, name: str, heads: int | None) -> Array:
    """Return (B, h, n, d) from (B, n, h d), or from (B, h, n, d) as it is."""
    if x.ndim == 4:
        if heads not in (None, x.shape[1]):
            raise ValueError(
                f"{name} must have the {heads} heads of the attributes, got shape {x.shape}; "
                f"leave out q_num_heads and kv_num_heads for four axes"
            )
        return x
    if x.ndim != 3 or not heads or x.shape[2] % heads:
        raise ValueError(
            f"{name} must be (batch, heads, tokens, width), or (batch, tokens, heads * width) "
            f"beside q_num_heads and kv_num_heads, got shape {x.shape} and {heads} heads; "
            f"see the operator Attention of ONNX"
        )
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def prepare(node: Node) -> Call:
    """Return the call of attention that an application of the operator asks for."""
    get, inputs = node.attributes.get, node.inputs
    q = unpack(inputs["Q"], "Q", get("q_num_heads"))
    k, v = (unpack(inputs[x], x, get("kv_num_heads")) for x in ("K", "V"))
    k, v, offset, key_mask, mask = onnx_operands(q, k, v, *map(inputs.get, INPUTS[3:]))
    return Call(
        q=q,
        k=k,
        v=v,
        scale=float(get("scale", q.shape[3] ** -0.5)),
        causal=bool(get("is_causal", 0)),
        offset=offset,
        window=(int(get("left_window_size", -1)), int(get("right_window_size", -1))),
        softcap=float(get("softcap", 0.0)),
        key_mask=key_mask,
        attn_mask=mask,
    )


def attend(call: Call, compute_dtype: Any = np.float64) -> Array:
    """Return Y (B, H, n_q, d_v) by ``sketchattn.attention``, by default in reference grade."""
    positions = call.causal or call.window != (-1, -1)
    return attention(
        call.q,
        call.k,
        call.v,
        scale=call.scale,
        causal="top-left" if call.causal else False,
        offset=call.offset if positions else None,
        window=call.window,
        softcap=call.softcap,
        key_mask=call.key_mask,
        attn_mask=call.attn_mask,
        enable_gqa=True,
        compute_dtype=compute_dtype,
    )


def qk_output(call: Call, mode: int) -> Array:
    """Return qk_matmul_output in float64: logits scaled, capped, masked (0, 1, 2); softmax (3)."""
    batch, heads, n_q, _ = call.q.shape
    n_k = call.k.shape[2]
    result = np.empty((batch, heads, n_q, n_k))
    for b, h in np.ndindex(batch, heads):
        mask = call.mask_of(b, h)
        seen = visible(
            0,
            n_q,
            n_k,
            first=int(call.offset[b]),
            left=call.left,
            right=call.right,
            key_mask=None if call.key_mask is None else call.key_mask[b],
            mask=mask,
        )
        logits = masked_logits(
            call.q[b, h].astype(np.float64),
            call.k[b, h // call.group].astype(np.float64),
            scale=call.scale,
            softcap=call.softcap,
            bias=None if mask is None or mask.dtype == np.bool_ else mask,
            seen=seen,
            stage=STAGES[min(mode, 2)],
        )
        result[b, h] = softmax_rows(logits, seen)[0] if mode == 3 else logits
    return result


def evaluate(
    node: Node, attend: Attend = attend, mutate: Callable[[Call], Call] = lambda call: call
) -> dict[str, Array]:
    """Return the wanted outputs by the name of their slot, where ``attend`` computes Y.

    The attribute softmax_precision asks for a softmax in at least some precision; reference grade
    is double precision, the highest that there is.
    """
    call = mutate(prepare(node))
    y = attend(call)
    if node.inputs["Q"].ndim == 3:
        y = y.swapaxes(1, 2).reshape(y.shape[0], y.shape[2], -1)
    outputs = {"Y": y, "present_key": call.k, "present_value": call.v}
    if "qk_matmul_output" in node.outputs:
        mode = node.attributes.get("qk_matmul_output_mode", 0)
        outputs["qk_matmul_output"] = round_to(qk_output(call, mode), call.q.dtype)
    return {name: outputs[name] for name in node.outputs}


def _by_slot(slots: Sequence[str], names: Iterable[str], arrays: Iterable[Any]) -> dict[str, Array]:
    # Arrays are listed for the slots that have a name; an empty name is an absent argument.
    present = _named(slots, names)
    return {slot: np.asarray(x) for slot, x in zip(present, arrays, strict=True)}


def _named(slots: Sequence[str], names: Iterable[str]) -> tuple[str, ...]:
    return tuple(slot for slot, name in zip(slots, names, strict=False) if name)


def _attributes(node: Any) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


# --- conformance ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Hold one conformance case: what is asked, and the outputs that are expected."""

    name: str
    opset: int
    node: Node
    expected: dict[str, Array]
    rtol: float
    atol: float


@dataclass(frozen=True)
class Outcome:
    """Hold what became of one case.

    Attributes
    ----------
    name : str
        Of the case, in the ``onnx`` package.
    opset : int
        Of its model.
    dtype : str
        Of Q; empty where the case is not covered.
    status : {"passed", "failed", "not covered"}
    reason : str
        Why it failed or is not covered; empty where it passed.
    """

    name: str
    opset: int
    dtype: str
    status: str
    reason: str = ""


@dataclass(frozen=True)
class ConformanceReport:
    """Hold the outcomes of all conformance cases; printed, it says what passed and what did not.

    Attributes
    ----------
    version : str
        Of the ``onnx`` package.
    programs : tuple of str
        The names of the programs that each case was given to; it passes if all of them are right.
    outcomes : tuple of Outcome
        One for each case of the operator, in the order of the package.
    """

    version: str
    programs: tuple[str, ...]
    outcomes: tuple[Outcome, ...]

    @property
    def passed(self) -> tuple[Outcome, ...]:
        """Cases in scope that every program answers as expected."""
        return self._with("passed")

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """Cases in scope that some program answers otherwise, or refuses."""
        return self._with("failed")

    @property
    def not_covered(self) -> tuple[Outcome, ...]:
        """Cases out of scope."""
        return self._with("not covered")

    def _with(self, status: str) -> tuple[Outcome, ...]:
        return tuple(x for x in self.outcomes if x.status == status)

    def as_dict(self) -> dict[str, Any]:
        """Return the counts and the outcomes as JSON can hold them."""
        return {
            "onnx": self.version,
            "programs": list(self.programs),
            "passed": len(self.passed),
            "failed": len(self.failed),
            "not_covered": len(self.not_covered),
            "cases": [vars(x) for x in self.outcomes],
        }

    def render(self) -> str:
        """Return the report as text: a line for the counts, and one for each other outcome."""
        scope = len(self.passed) + len(self.failed)
        lines = [
            f"ONNX {self.version}, operator Attention: {len(self.passed)} of {scope} cases passed "
            f"({' and '.join(self.programs)})",
            *(
                f"  opset {opset}, {dtype}: {sum(x.status == 'passed' for x in same)} of "
                f"{len(same)}"
                for (opset, dtype), same in _grouped(self.passed + self.failed).items()
            ),
            f"failed: {len(self.failed)}",
            *(f"  {x.name}: {x.reason}" for x in self.failed),
            f"not covered: {len(self.not_covered)}",
        ]
        reasons: dict[str, int] = {}
        for x in self.not_covered:
            reasons[x.reason] = reasons.get(x.reason, 0) + 1
        return "\n".join([*lines, *(f"  {count}: {reason}" for reason, count in reasons.items())])

    def __str__(self) -> str:
        """Return `render`."""
        return self.render()

    def raise_for_failures(self) -> None:
        """Raise AssertionError with the report if a case in scope failed."""
        if self.failed:
            raise AssertionError(self.render())


def _grouped(outcomes: Iterable[Outcome]) -> dict[tuple[int, str], list[Outcome]]:
    found: dict[tuple[int, str], list[Outcome]] = {}
    for x in sorted(outcomes, key=lambda x: (x.opset, x.dtype)):
        found.setdefault((x.opset, x.dtype), []).append(x)
    return found


def _fast(call: Call) -> Array:
    return attend(call, None)


PROGRAMS: Mapping[str, Attend] = {"float64 reference": attend, "fast path": _fast}


def conformance(programs: Mapping[str, Attend] | None = None) -> ConformanceReport:
    """Run the conformance cases of the operator Attention that the ``onnx`` package holds.

    Parameters
    ----------
    programs : mapping from names to functions, optional
        What is tested: each takes a ``Call`` and returns Y (B, H, n_q, d_v) in the dtype of q.  By
        default ``sketchattn.attention`` in reference grade, and its fast path.

    Returns
    -------
    ConformanceReport
        A case passes if every program returns all its outputs as ONNX compares them: the dtype,
        the shape, and values to the tolerances of the case, rtol at least 2^-6 in bfloat16.
        Copies of the cases as graphs of other operators are not covered.

    Examples
    --------
    >>> from sketchattn.integrations.onnx import conformance
    >>> report = conformance()
    >>> len(report.failed)
    0
    """
    given = PROGRAMS if programs is None else programs
    outcomes = [x if isinstance(x, Outcome) else _outcome(x, given) for x in _collect()]
    return ConformanceReport(onnx.__version__, tuple(given), tuple(outcomes))


def _outcome(case: Case, programs: Mapping[str, Attend]) -> Outcome:
    reasons = []
    for name, program in programs.items():
        try:
            wrong = mismatches(case, evaluate(case.node, program))
        except Exception as error:  # a program that refuses a case has not passed it
            wrong = [f"{type(error).__name__}: {' '.join(str(error).split())}"]
        if wrong:
            reasons.append(f"{name}: {', '.join(wrong)}")
    dtype = case.node.inputs["Q"].dtype.name
    status = "failed" if reasons else "passed"
    return Outcome(case.name, case.opset, dtype, status, "; ".join(reasons))


def load_cases() -> list[Case]:
    """Return the cases of the operator itself, without their copies as decomposed graphs."""
    return [x for x in _collect() if isinstance(x, Case)]


def _collect() -> list[Case | Outcome]:
    """Return the cases of the package in its order, and the outcome of those out of scope."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # ONNX computes the cases of an operator when the module is imported; its own collector
        # imports those of all operators.
        importlib.import_module("onnx.backend.test.case.node.attention")
        nodes = importlib.import_module("onnx.backend.test.case.node")
    found: list[Case | Outcome] = []
    for case in nodes._NodeTestCases:
        if not case.name.startswith("test_attention"):
            continue
        opset = next(x.version for x in case.model.opset_import if x.domain == "")
        if "expanded" in case.name:
            reason = "the same data as a graph of other operators, without an Attention node"
            found.append(Outcome(case.name, opset, "", "not covered", reason))
            continue
        (node,) = case.model.graph.node
        ((inputs, outputs),) = case.data_sets
        expected = _by_slot(OUTPUTS, node.output, outputs)
        given = _by_slot(INPUTS, node.input, inputs)
        asked = Node(_attributes(node), given, tuple(expected))
        found.append(Case(case.name, opset, asked, expected, case.rtol, case.atol))
    return found


def mismatches(case: Case, outputs: dict[str, Array]) -> list[str]:
    """Name the outputs that differ from the expected ones in dtype, shape or value."""
    wrong = []
    for name, want in case.expected.items():
        got = outputs[name]
        # Expected values of half precisions were computed in that precision; bfloat16 keeps 8 bits.
        rtol = max(case.rtol, 2.0**-6) if want.dtype.name == "bfloat16" else case.rtol
        if (
            got.dtype != want.dtype
            or got.shape != want.shape
            or not np.allclose(
                got.astype(np.float64), want.astype(np.float64), rtol=rtol, atol=case.atol
            )
        ):
            wrong.append(name)
    return wrong


# --- backend --------------------------------------------------------------------------------------


class Backend(base.Backend):  # type: ignore[misc]  # onnx may be absent
    """Run ONNX models whose only operator is Attention, in reference grade on the CPU.

    The interface of ``onnx.backend.base.Backend``, so that ``onnx.backend.test.BackendTest`` and
    tools that take a backend can use it.  Every output is computed in float64 from inputs that
    are widened exactly, and rounded once.

    Examples
    --------
    >>> import numpy as np, onnx
    >>> from sketchattn.integrations.onnx import Backend
    >>> node = onnx.helper.make_node("Attention", ["q", "k", "v"], ["y"], is_causal=1)
    >>> x = np.ones((1, 2, 5, 4), np.float32)
    >>> (y,) = Backend.run_node(node, [x, x, x])
    >>> y.shape
    (1, 2, 5, 4)
    """

    @classmethod
    def is_compatible(cls, model: Any, device: str = "CPU", **options: Any) -> bool:
        """Say whether all nodes of a model are Attention, and the device is the CPU."""
        return cls.supports_device(device) and all(map(_is_attention, model.graph.node))

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """Say whether a device such as "CPU" or "CUDA:1" is the CPU."""
        return device.partition(":")[0] == "CPU"

    @classmethod
    def prepare(cls, model: Any, device: str = "CPU", **options: Any) -> Prepared:
        """Return a model that is checked, and refused if a node has another operator.

        Raises
        ------
        ValueError
            For another device than the CPU, another operator, or an opset that is not known.
        """
        _check_device(cls, device)
        super().prepare(model, device, **options)
        for node in model.graph.node:
            _check_operator(node)
        _check_opset(max((x.version for x in model.opset_import if x.domain == ""), default=1))
        return Prepared(model)

    @classmethod
    def run_node(
        cls,
        node: Any,
        inputs: Any,
        device: str = "CPU",
        outputs_info: Any = None,
        **options: Any,
    ) -> tuple[Array, ...]:
        """Return the outputs of one node; ``inputs`` are listed for the slots that have a name."""
        _check_device(cls, device)
        _check_operator(node)
        _check_opset(options.get("opset_version", onnx.defs.onnx_opset_version()))
        super().run_node(node, inputs, device, outputs_info, **options)
        given = _by_slot(INPUTS, node.input, inputs)
        return _run(node, given)


class Prepared(base.BackendRep):  # type: ignore[misc]  # onnx may be absent
    """Hold a model that can be run many times."""

    def __init__(self, model: Any) -> None:
        self.graph = model.graph
        self.constants = {x.name: onnx.numpy_helper.to_array(x) for x in self.graph.initializer}
        self.names = [x.name for x in self.graph.input if x.name not in self.constants]

    def run(self, inputs: Any, **options: Any) -> tuple[Array, ...]:
        """Return the outputs of the model, in order.

        Parameters
        ----------
        inputs : sequence of arrays, or mapping from names to arrays
            The inputs of the model that have no initializer.
        """
        if not isinstance(inputs, Mapping):
            if len(inputs) != len(self.names):
                raise ValueError(
                    f"inputs must be the {len(self.names)} arrays {self.names}, got {len(inputs)}; "
                    f"list one for each"
                )
            inputs = dict(zip(self.names, inputs, strict=True))
        known = self.constants | {name: np.asarray(x) for name, x in inputs.items()}
        for node in self.graph.node:  # in topological order, as every valid model is
            missing = [name for name in node.input if name and name not in known]
            if missing:
                raise ValueError(f"inputs must hold {missing[0]!r}, got {sorted(known)}; add it")
            given = _by_slot(INPUTS, node.input, (known[name] for name in node.input if name))
            named = (name for name in node.output if name)
            known |= dict(zip(named, _run(node, given), strict=True))
        return tuple(known[x.name] for x in self.graph.output)


def _run(node: Any, inputs: dict[str, Array]) -> tuple[Array, ...]:
    outputs = evaluate(Node(_attributes(node), inputs, _named(OUTPUTS, node.output)))
    return tuple(outputs.values())


def _is_attention(node: Any) -> bool:
    return node.op_type == "Attention" and node.domain in ("", "ai.onnx")


def _check_operator(node: Any) -> None:
    if not _is_attention(node):
        name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        raise ValueError(
            f"model must consist of the operator Attention, got {name!r}; this backend runs no "
            f"other, cut the Attention nodes out with onnx.utils.extract_model"
        )


def _check_opset(opset: int) -> None:
    version = onnx.defs.get_schema("Attention", opset).since_version if opset >= 23 else opset
    if version not in VERSIONS:
        raise ValueError(
            f"opset must have Attention as of version {VERSIONS[0]} to {VERSIONS[-1]}, got opset "
            f"{opset} with version {version}; convert the model with onnx.version_converter"
        )


def _check_device(backend: Any, device: str) -> None:
    if not backend.supports_device(device):
        raise ValueError(f"device must be 'CPU', got {device!r}; there is no other here")


__all__ = [
    "Backend",
    "ConformanceReport",
    "attend",
    "conformance",
    "evaluate",
    "load_cases",
]


def __dir__() -> list[str]:
    return __all__
