"""Golden vectors: small cases with inputs, draws and float64 results, the same bytes everywhere.

One file a case, and a manifest with the digest of every file and array.  What is written depends
on the names of the cases alone; ``settling`` makes the results, ``lattice`` says how.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.arguments import closest
from ..functional.batched import attention
from ..problem import AttentionProblem
from ..zoo.base import Method, make_method, methods
from .dense import Parts
from .inputs import DTYPES
from .lattice import CONDITIONS, STEPS, bits, normals

Array = NDArray[Any]

# Of the files and of the manifest.
SCHEMA = 1
# Raised when the result of some case changes.
FORMULAS = 1

# Sizes (heads, key heads, n_q, n_k) unless a case says otherwise; d = 16, d_v = 8, r = 8.
ONE_HEAD = (1, 1, 33, 48)
WIDTH, VALUE_WIDTH, RANK = 16, 8, 8

# Methods that need a parameter to honour an option, or are shown with others than the defaults.
# For cases of some dozen keys: others would be exact, or hash with hundreds of tables.
SMALL_PARAMETERS: dict[str, dict[str, Any]] = {
    "causal_tree": {"leaf": 8},
    "hyperattention": {"leaf": 8},
    "kdeformer": {"leaf": 8},
    "magicpig": {"bits": 4},
    "stream_halving": {"block": 8},
}
CAUSAL_PARAMETERS: dict[str, dict[str, Any]] = {"skeinformer": {"causal_form": "corrected"}}


@dataclass(frozen=True)
class Spec:
    """Say what a case is, before its inputs are made.

    Attributes
    ----------
    name : str
        ``method-option``.
    method : str
    parameters : mapping
        Of the method.
    sizes : (int, int, int, int)
        Query heads, key heads, n_q, n_k.
    options : mapping
        Fields of `GoldenCase` that are numbers.
    masks : tuple of str
        Masks that are made: "key_mask", "mask", "empty_rows", "bias", "sink".
    spread : int
        Twice the deviation of queries and keys.
    matrix : bool
        Whether the matrix is written too.
    """

    name: str
    method: str = "exact"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    sizes: tuple[int, int, int, int] = ONE_HEAD
    options: Mapping[str, Any] = field(default_factory=dict)
    masks: tuple[str, ...] = ()
    spread: int = 3
    matrix: bool = False


@dataclass(frozen=True)
class GoldenCase:
    """Hold one case: what goes in, what comes out, and how far off an answer may be.

    Attributes
    ----------
    name, method : str
    parameters : mapping
        Of the method.
    q, k, v : float32 array (H, n_q, d), (H_kv, n_k, d), (H_kv, n_k, d_v)
        Exact in bfloat16 and float16.  Query head h reads key head ``h // (H / H_kv)``.
    scale, softcap : float
        A softcap of 0 is off.
    causal : bool
        Query i sees the keys ``j <= i + first``.
    first : int
        Position of query 0 among the keys, for ``causal`` and ``window``.
    window : (int, int)
        Query i sees ``i + first - left <= j <= i + first + right``; -1 is unbounded.
    key_mask : bool array (n_k,) or None
        True for the keys to keep.
    mask : bool array (n_q, n_k) or None
        True for the visible entries.
    bias : float32 array (n_q, n_k) or None
        Added to the logits after the softcap; -inf hides.
    sink : float32 array (H,) or None
        An extra logit a head.
    draws : tuple of mappings from names to arrays
        What the method drew, one entry a head; floating point is exact in float32.
    out : float64 array (H, n_q, d_v)
        A multiple of ``step``.
    lse : float64 array (H, n_q) or None
        Logsumexp of exact attention, -inf for a row without keys.
    matrix : float64 array (H, n_q, n_k) or None
        ``Ahat``.
    step : float
    tolerance, lse_tolerance : mapping from dtype to float
        Of the largest error of an entry.
    not_judged : mapping from dtype to str
        Precisions in which a wrong answer would pass, and which.
    """

    name: str
    method: str
    parameters: Mapping[str, Any]
    q: Array
    k: Array
    v: Array
    scale: float
    softcap: float
    causal: bool
    first: int
    window: tuple[int, int]
    key_mask: Array | None
    mask: Array | None
    bias: Array | None
    sink: Array | None
    draws: tuple[Mapping[str, Array], ...] = ()
    out: Array = field(default_factory=lambda: np.zeros(0))
    lse: Array | None = None
    matrix: Array | None = None
    step: float = STEPS[0]
    tolerance: Mapping[str, float] = field(default_factory=dict)
    lse_tolerance: Mapping[str, float] = field(default_factory=dict)
    not_judged: Mapping[str, str] = field(default_factory=dict)

    @property
    def group(self) -> int:
        """Query heads a key head."""
        return int(self.q.shape[0] // self.k.shape[0])

    def options(self) -> dict[str, Any]:
        """Return the options of ``sketchattn.attention`` with method "exact"."""
        return {
            "scale": self.scale,
            "causal": self.causal,
            "offset": self.first,
            "window": self.window,
            "softcap": self.softcap,
            "key_mask": self.key_mask,
            "attn_mask": self.mask if self.bias is None else self.bias,
            "sink": self.sink,
            "enable_gqa": self.group > 1,
        }

    def problems(self, dtype: Any = np.float64) -> list[AttentionProblem]:
        """Return the heads as problems, for the methods that are not exact."""
        return [
            AttentionProblem(
                self.q[h].astype(dtype),
                self.k[h // self.group].astype(dtype),
                self.v[h // self.group].astype(dtype),
                scale=self.scale,
                causal=self.causal,
                key_mask=self.key_mask,
            )
            for h in range(len(self.q))
        ]

    def parts(self) -> Parts:
        """Return what exact attention is made of."""
        n_q, n_k = self.q.shape[1], self.k.shape[1]
        position, key = self.first + np.arange(n_q)[:, None], np.arange(n_k)
        left, right = self.window
        seen = np.ones((1, len(self.q), n_q, n_k), bool)
        seen &= (key <= position) | (not self.causal)
        seen &= (key >= position - left) | (left < 0)
        seen &= (key <= position + right) | (right < 0)
        for visible in (self.key_mask, self.mask):
            if visible is not None:
                seen &= visible
        bias = None
        if self.bias is not None:
            seen &= self.bias != -np.inf
            bias = np.where(self.bias == -np.inf, 0.0, self.bias).astype(np.float64)
        k, v = (np.repeat(x, self.group, axis=0)[None].astype(np.float64) for x in (self.k, self.v))
        return Parts(
            q=self.q[None].astype(np.float64),
            k=k,
            v=v,
            scale=self.scale,
            softcap=self.softcap,
            bias=bias,
            seen=seen,
            sink=None if self.sink is None else self.sink.astype(np.float64),
            empty_row="zero",
        )

    def exact(self) -> tuple[Array, Array]:
        """Return output and logsumexp of exact attention, in float64."""
        q, k, v = (x.astype(np.float64) for x in (self.q, self.k, self.v))
        return attention(q, k, v, compute_dtype=np.float64, return_lse=True, **self.options())


# --- which cases there are ------------------------------------------------------------------------


def exact_specs() -> list[Spec]:
    """Return the cases of exact attention."""
    square, tall = (1, 1, 33, 33), (1, 1, 48, 33)
    heads = (6, 2, 17, 24)
    return [
        Spec("exact-plain", matrix=True),
        Spec("exact-scale", options={"scale": 0.375}),
        Spec("exact-one-key", sizes=(1, 1, 33, 1)),
        Spec("exact-one-query", sizes=(1, 1, 1, 48), options={"causal": True, "first": 47}),
        Spec("exact-causal", sizes=square, options={"causal": True}),
        Spec("exact-causal-top-left", options={"causal": True}),
        Spec("exact-causal-bottom-right", options={"causal": True, "first": 15}),
        # More queries than keys: the first 15 rows see none.
        Spec("exact-causal-empty-rows", sizes=tall, options={"causal": True, "first": -15}),
        Spec("exact-key_mask", masks=("key_mask",)),
        Spec("exact-mask", masks=("mask",)),
        Spec("exact-empty-rows", masks=("mask", "empty_rows")),
        Spec("exact-bias", masks=("bias",)),
        Spec("exact-window", options={"window": (5, 3), "first": 8}),
        Spec("exact-window-causal", sizes=square, options={"window": (5, -1), "causal": True}),
        Spec("exact-softcap", options={"softcap": 2.5}),
        Spec("exact-softcap-bias", options={"softcap": 2.5}, masks=("bias",)),
        Spec("exact-gqa", sizes=heads),
        Spec("exact-gqa-causal", sizes=heads, options={"causal": True, "first": 7}),
        Spec("exact-sink", sizes=heads, masks=("sink",)),
        # With a sink a row without keys has the sink as its logsumexp.
        Spec("exact-sink-empty-rows", masks=("sink", "mask", "empty_rows")),
        Spec(
            "exact-everything",
            sizes=heads,
            options={"causal": True, "first": 7, "window": (12, -1), "softcap": 4.0},
            masks=("sink", "bias", "key_mask"),
        ),
    ]


def golden_method(name: str, causal: bool = False) -> Method:
    """Return a registered method with rank 8, parameters for few keys, and its other defaults."""
    known = inspect.signature(methods()[name]).parameters
    parameters: dict[str, Any] = {"rank": RANK} if "rank" in known else {}
    parameters |= SMALL_PARAMETERS.get(name, {})
    if causal:
        parameters |= CAUSAL_PARAMETERS.get(name, {})
    return make_method(name, parameters)


def method_specs(name: str) -> list[Spec]:
    """Return the cases of an approximate method: those that its traits allow."""
    method = golden_method(name)
    own = {"rank", *SMALL_PARAMETERS.get(name, {})}
    given = {p: x for p, x in method.get_params(deep=False).items() if p in own}
    traits = method.traits
    sizes = ONE_HEAD if traits.rectangular else (1, 1, 48, 48)
    heads = (4, 2, 17, 24) if traits.rectangular else (4, 2, 24, 24)
    made = [
        Spec(f"{name}-plain", name, given, sizes, spread=2, matrix=traits.matrix),
        Spec(f"{name}-gqa", name, given, heads, spread=2),
    ]
    causal = golden_method(name, causal=True)
    if causal.traits.causal or traits.oracle:
        more = given | CAUSAL_PARAMETERS.get(name, {})
        options = {"causal": True}
        made.append(Spec(f"{name}-causal", name, more, (1, 1, 33, 33), options, spread=2))
    if traits.key_mask:
        made.append(Spec(f"{name}-key_mask", name, given, sizes, {}, ("key_mask",), spread=2))
    return made


def specs() -> list[Spec]:
    """Return all cases: of exact attention, and of every registered method."""
    found = exact_specs()
    for name in methods():
        if name != "exact":
            found += method_specs(name)
    return found


# --- making a case --------------------------------------------------------------------------------


def make_inputs(spec: Spec, attempt: int) -> GoldenCase:
    """Return a case without results; its inputs depend on its name and the attempt alone."""
    heads, kv_heads, n_q, n_k = spec.sizes
    seed = f"sketchattn golden {spec.name} {attempt}"
    options = dict(spec.options)
    key_mask = mask = bias = sink = None
    if "key_mask" in spec.masks:
        key_mask = bits(f"{seed}/key_mask", (n_k,), 0.75)
    if "mask" in spec.masks:
        mask = bits(f"{seed}/mask", (n_q, n_k), 0.625)
        mask[np.arange(n_q), np.arange(n_q) % n_k] = True
    if mask is not None and "empty_rows" in spec.masks:
        mask[[0, n_q // 2, n_q - 1]] = False
    if "bias" in spec.masks:
        shown = bits(f"{seed}/shown", (n_q, n_k), 0.75)
        bias = np.where(shown, normals(f"{seed}/bias", (n_q, n_k)), -np.inf).astype(np.float32)
    if "sink" in spec.masks:
        sink = normals(f"{seed}/sink", (heads,)).astype(np.float32)
    return GoldenCase(
        name=spec.name,
        method=spec.method,
        parameters=dict(spec.parameters),
        q=normals(f"{seed}/q", (heads, n_q, WIDTH), spec.spread).astype(np.float32),
        k=normals(f"{seed}/k", (kv_heads, n_k, WIDTH), spec.spread).astype(np.float32),
        v=normals(f"{seed}/v", (kv_heads, n_k, VALUE_WIDTH)).astype(np.float32),
        scale=float(options.get("scale", WIDTH**-0.5)),
        softcap=float(options.get("softcap", 0.0)),
        causal=bool(options.get("causal", False)),
        first=int(options.get("first", 0)),
        window=options.get("window", (-1, -1)),
        key_mask=key_mask,
        mask=mask,
        bias=bias,
        sink=sink,
    )


def storable(draw: Mapping[str, Array]) -> dict[str, Array]:
    """Return a draw whose floating-point numbers are exact in float32."""
    return {
        name: x.astype(np.float32).astype(np.float64)
        if np.issubdtype(x.dtype, np.floating)
        else np.array(x)
        for name, x in draw.items()
    }


# --- as files -------------------------------------------------------------------------------------


def case_tensors(case: GoldenCase) -> dict[str, Array]:
    """Return everything in a case as arrays: the contents of its file."""
    tensors: dict[str, Array] = {
        "q": case.q,
        "k": case.k,
        "v": case.v,
        "scale": np.array([case.scale]),
        "softcap": np.array([case.softcap]),
        "causal": np.array([case.causal], np.int64),
        "first": np.array([case.first], np.int64),
        "window": np.array(case.window, np.int64),
        "step": np.array([case.step]),
        "out": case.out,
        "tolerance": np.array([case.tolerance[dtype] for dtype in DTYPES]),
    }
    if case.lse is not None:
        tensors["lse_tolerance"] = np.array([case.lse_tolerance[dtype] for dtype in DTYPES])
    for name in ("key_mask", "mask", "bias", "sink", "lse", "matrix"):
        x = getattr(case, name)
        if x is not None:
            tensors[name] = x
    for h, draw in enumerate(case.draws):
        tensors |= {f"draw.{h}.{name}": x for name, x in draw.items()}
    return {name: np.ascontiguousarray(x) for name, x in sorted(tensors.items())}


def case_words(case: GoldenCase) -> dict[str, Any]:
    """Return what a case is in words, as JSON can hold it."""
    return {
        "name": case.name,
        "method": case.method,
        "parameters": dict(case.parameters),
        "dtypes": list(DTYPES),
        "not_judged": dict(case.not_judged),
        "condition_at_most": 2 * CONDITIONS[STEPS.index(case.step)],
        "schema": SCHEMA,
        "formulas": FORMULAS,
    }


def case_bytes(case: GoldenCase) -> bytes:
    """Return the file of a case; the metadata are one entry, as the order of several is random."""
    from safetensors.numpy import save

    text = json.dumps(case_words(case), sort_keys=True)
    return save(case_tensors(case), metadata={"case": text})


def array_digest(x: Array) -> str:
    """Return the SHA-256 of the bytes of an array, little end first."""
    ordered = x.astype(x.dtype.newbyteorder("<"), copy=False)
    return hashlib.sha256(np.ascontiguousarray(ordered).tobytes()).hexdigest()


def pick(names: list[str], cases: str | None) -> list[str]:
    """Return the names that patterns separated by commas match."""
    from fnmatch import fnmatchcase

    if cases is None:
        return names
    patterns = [x.strip() for x in cases.split(",") if x.strip()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"cases must match the name of a case, got {pattern!r}{closest(pattern, names)}"
            )
    return [name for name in names if any(fnmatchcase(name, x) for x in patterns)]


def versions() -> dict[str, str]:
    """Return the versions of what makes inputs, draws and results."""
    from importlib.metadata import version

    from .. import __version__

    return {"sketchattn": __version__} | {
        name: version(name) for name in ("numba", "numpy", "scikit-learn", "scipy")
    }
