"""Processes: the same bits whatever ran before, in another process, and after a fork."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import pytest

import sketchattn as sa
from sketchattn.kernels import softmax
from sketchattn.kernels._jit import kernel, prange

ROOT = Path(sa.__file__).parent.parent
COMPILED = not numba.config.DISABLE_JIT  # type: ignore[attr-defined]  # set at run time
needs_compilation = pytest.mark.skipif(not COMPILED, reason="nothing is compiled")


def run(script: str, *arguments: str, seconds: float = 300.0, **environment: str) -> Any:
    """Return what a script prints as JSON on its last line; it must end well and in time."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


# --- what ran before ------------------------------------------------------------------------------

# Functions that kernels of several files call.  A kernel that calls its own copy of one under a
# shared name calls, in truth, the copy that the process loaded first.
CALLS = """
def f(s, top, total, acc, threads):
    for worker in prange(threads):
        online_softmax(s[worker], top[worker], total[worker], acc[worker])
        tanh(row_maximum(s[worker, 0]))
        online_softmax(s[worker], top[worker], total[worker], acc[worker])
"""


@needs_compilation
@pytest.mark.parametrize("parallel", [False, True])
def test_machine_code_of_a_kernel_holds_no_function_under_a_shared_name(parallel: bool) -> None:
    space: dict[str, Any] = {"prange": prange if parallel else range}
    shared = ("online_softmax", "row_maximum", "exp2", "tanh")
    space.update({name: getattr(softmax, name) for name in shared})
    exec(CALLS, space)
    f: Any = kernel(parallel=parallel)(space["f"])
    tile, row = numba.float32[:, :, ::1], numba.float32[:, ::1]
    f.compile((tile, row, row, tile, numba.int64))
    (code,) = f.inspect_llvm().values()
    defined = re.findall(r"^define .*?@(\S+?)\(", code, re.MULTILINE)
    assert any("6kernels" not in name for name in defined)  # its own, the text was understood
    assert [name for name in defined if "sketchattn" in name] == []


# Every method first, then the others: what a kernel computes does not follow from who called it.
DIGESTS = """
import hashlib, json, sys
import numpy as np
import sketchattn as sa
from sketchattn.kernels._threads import limit_threads

def digest(x):
    return hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()

def problem(dtype):
    return sa.make_heads("gaussian", n=96, d=16, rng=0)[0].astype(dtype)

def combiner(head):
    return sa.Combiner(block=8).attend(head)

calls = {
    "output": lambda head: head.output,
    "combiner": combiner,
    "transposed": lambda head: head.exact.T @ head.v,
    "skeinformer": lambda head: sa.Skeinformer(rank=16).attend(head, rng=0),
    "informer": lambda head: sa.Informer(rank=16).attend(head, rng=0),
    "performer": lambda head: sa.Performer(rank=16).attend(head, rng=0),
}
order, precisions = (x.split(",") for x in sys.argv[1:])
found = {}
with limit_threads(1):
    for dtype in precisions:
        for name in order:
            found[f"{name} {dtype}"] = digest(calls[name](problem(dtype)))
print(json.dumps(found))
"""


@needs_compilation
def test_bits_do_not_depend_on_the_kernels_that_ran_before() -> None:
    alone = run(DIGESTS, "output", "float32")
    after = run(DIGESTS, "combiner,output", "float32")
    assert {name: after[name] for name in alone} == alone


@needs_compilation
@pytest.mark.slow
def test_bits_depend_neither_on_the_cache_nor_on_the_order(tmp_path: Path) -> None:
    names = ["output", "combiner", "transposed", "skeinformer", "informer", "performer"]
    precisions = "float32,float64"
    expected = run(
        DIGESTS, ",".join(names), precisions, seconds=1200, NUMBA_CACHE_DIR=str(tmp_path)
    )
    for first in names:
        order = [first, *(name for name in reversed(names) if name != first)]
        warm = run(DIGESTS, ",".join(order), precisions, NUMBA_CACHE_DIR=str(tmp_path))
        assert warm == expected, first
    # Compiled in another order, and by a process that hashes names differently.
    cold = run(
        DIGESTS,
        ",".join(reversed(names)),
        "float64,float32",
        seconds=1200,
        NUMBA_CACHE_DIR=str(tmp_path / "other"),
        PYTHONHASHSEED="7",
    )
    assert cold == expected
