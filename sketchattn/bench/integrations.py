"""Functions in the form of other libraries: what they cost beside ours, and beside their own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..functional.batched import attention
from ..functional.vjp import attention_vjp
from .harness import (
    Row,
    benchmark,
    child,
    compare,
    import_torch,
    make_row,
    normal,
    sdpa,
    time_both,
)

Array = NDArray[Any]

# Peak memory of a forward and a backward pass beyond the tensors, the output and the gradients.
_MEMORY = """
import re, sys
import torch
from sketchattn.integrations.torch import scaled_dot_product_attention
def peak():
    with open("/proc/self/status") as file:
        return int(re.search(r"VmHWM:\\s*(\\d+)", file.read()).group(1)) * 1024
def run(n):
    q, k, v = torch.randn(3, 1, n, 64).unbind()
    for x in (q, k, v):
        x.requires_grad_()
    before = peak()
    scaled_dot_product_attention(q, k, v).square().sum().backward()
    return peak() - before - 5 * q.numel() * 4
run(2048)
print(run(int(sys.argv[1])))
"""


@benchmark("integrations", "PyTorch's function: against ours on arrays, and against torch's own")
def _integrations(quick: bool, rounds: int) -> Iterator[Row]:
    torch = import_torch()
    if torch is None:
        return
    # A room beside this one: reached by its name, as a user's program does.
    module: Any = importlib.import_module("sketchattn.integrations.torch")
    function = module.scaled_dot_product_attention
    n = 512 if quick else 4096
    for heads in (1, 8):
        case = f"{heads} head{'s' * (heads > 1)}, n={n}, d=64"
        yield from _rows(torch, function, case, normal(heads, n, 64), rounds)
    yield _error_row(torch, function, 256 if quick else 1024)
    yield make_row(
        "integrations",
        f"forward + backward, 1 head, n={2 * n}: memory beyond tensors and gradients",
        [max(0.0, float(child(_MEMORY, str(2 * n))) / 2**20)],
        against="limit",
        theirs=[64.0],
        target=1.0,
        unit="MB",
    )


def _rows(
    torch: Any, function: Callable[..., Any], case: str, arrays: Sequence[Array], rounds: int
) -> Iterator[Row]:
    """Return the lines of one size: forward, and forward and backward."""
    forward: dict[str, Callable[[], object]] = {
        "tensors": partial(function, *(torch.from_numpy(x)[None] for x in arrays)),
        "arrays": partial(attention, *(x[None] for x in arrays)),
        "torch": sdpa(torch, arrays),
    }
    seconds = time_both(forward, rounds)
    for name, target in (("arrays", 1.05), ("torch", None)):
        yield compare(
            "integrations",
            f"forward, {case}",
            seconds,
            "tensors",
            name,
            against={"arrays": "ours on arrays", "torch": "torch SDPA"}[name],
            target=target,
            one_target=target,
        )
    own = torch.nn.functional.scaled_dot_product_attention
    both: dict[str, Callable[[], object]] = {
        "ours": partial(_gradients, torch, function, arrays),
        "torch": partial(_gradients, torch, own, arrays),
    }
    seconds = time_both(both, rounds)
    yield compare(
        "integrations",
        f"forward + backward, {case}",
        seconds,
        "ours",
        "torch",
        against="torch SDPA",
        target=1.5,
        one_target=1.5,
    )


def _gradients(torch: Any, function: Callable[..., Any], arrays: Sequence[Array]) -> list[Array]:
    """Return the gradients by q, k and v of the sum of the output times a fixed cotangent."""
    tensors = [torch.from_numpy(x)[None].requires_grad_() for x in arrays]
    cotangent = torch.from_numpy(np.ascontiguousarray(arrays[2][:, ::-1]))[None]
    found = torch.autograd.grad(function(*tensors), tensors, cotangent)
    return [x[0].numpy() for x in found]


def _error_row(torch: Any, function: Callable[..., Any], n: int) -> Row:
    """Return the line of the largest relative error of the three gradients against float64."""
    arrays = normal(2, n, 64)
    q, k, v = (x.astype(np.float64) for x in arrays)
    exact = attention_vjp(q, k, v, v[:, ::-1], compute_dtype=np.float64)
    errors = [
        max(
            float(np.linalg.norm(x - y) / np.linalg.norm(y))
            for x, y in zip(_gradients(torch, f, arrays), exact, strict=True)
        )
        for f in (function, torch.nn.functional.scaled_dot_product_attention)
    ]
    return make_row(
        "integrations",
        f"gradients, 2 heads, n={n}, d=64: error against float64",
        [errors[0]],
        against="torch SDPA",
        theirs=[errors[1]],
        target=2.0,
        unit="rel",
    )
