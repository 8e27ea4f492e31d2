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
from sketchattn.kernels._jit import kernel, take

ROOT = Path(sa.__file__).parent.parent
COMPILED = not numba.config.DISABLE_JIT  # type: ignore[attr-defined]  # set at run time
needs_compilation = pytest.mark.skipif(not COMPILED, reason="nothing is compiled")


def run(command: list[str], **environment: str) -> Any:
    """Return what Python prints as JSON on its last line; it must end well and in time."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


# --- what ran before ------------------------------------------------------------------------------

# Functions that kernels of several files call.  A kernel that calls its own copy of one under a
# shared name calls, in truth, the copy that the process loaded first.
CALLS = """
def f(s, top, total, acc, turn):
    for _ in range(len(s)):
        worker = take(turn)
        online_softmax(s[worker], top[worker], total[worker], acc[worker])
        tanh(row_maximum(s[worker, 0]))
        online_softmax(s[worker], top[worker], total[worker], acc[worker])
"""


@needs_compilation
@pytest.mark.parametrize("dealt", [False, True])
def test_machine_code_of_a_kernel_holds_no_function_under_a_shared_name(dealt: bool) -> None:
    space: dict[str, Any] = {"take": take}
    shared = ("online_softmax", "row_maximum", "exp2", "tanh")
    space.update({name: getattr(softmax, name) for name in shared})
    exec(CALLS, space)
    f: Any = kernel(dealt=dealt)(space["f"])
    tile, row = numba.float32[:, :, ::1], numba.float32[:, ::1]
    f.compile((tile, row, row, tile, numba.int64[::1]))
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


def digests(order: str, precisions: str = "float32", **environment: str) -> Any:
    """Return the digests of the results of a process that makes the calls in this order."""
    return run(["-c", DIGESTS, order, precisions], **environment)


@needs_compilation
def test_bits_do_not_depend_on_the_kernels_that_ran_before() -> None:
    alone = digests("output")
    after = digests("combiner,output")
    assert {name: after[name] for name in alone} == alone


@needs_compilation
@pytest.mark.slow
def test_bits_depend_neither_on_the_cache_nor_on_the_order(tmp_path: Path) -> None:
    names = ["output", "combiner", "transposed", "skeinformer", "informer", "performer"]
    precisions = "float32,float64"
    expected = digests(",".join(names), precisions, NUMBA_CACHE_DIR=str(tmp_path))
    for first in names:
        order = [first, *(name for name in reversed(names) if name != first)]
        warm = digests(",".join(order), precisions, NUMBA_CACHE_DIR=str(tmp_path))
        assert warm == expected, first
    # Compiled in another order, and by a process that hashes names differently.
    other = {"NUMBA_CACHE_DIR": str(tmp_path / "other"), "PYTHONHASHSEED": "7"}
    cold = digests(",".join(reversed(names)), "float64,float32", **other)
    assert cold == expected


# --- forks, and other ways to start a process -----------------------------------------------------

# The parent runs kernels on two threads, then children of every kind run them too.
WORKERS = """
import hashlib, json, multiprocessing, sys, threading
from concurrent.futures import ProcessPoolExecutor
import sketchattn as sa
from threadpoolctl import threadpool_info
from sketchattn.kernels import _threads
from sketchattn.kernels._threads import blas_single_thread, limit_threads

_threads.PAYS = 1  # small problems are shared out like large ones
head = sa.make_heads("gaussian", n=96, d=16, rng=0)[0].astype("float32")

def start(kind):
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(kind))

def digest(depth=0):
    fresh = sa.AttentionProblem(head.q, head.k, head.v)
    with limit_threads(2):
        found = [hashlib.sha256(fresh.output.tobytes()).hexdigest()]
    # BLAS has the threads that it had before, not those of a limit that died with its thread.
    found += [x["num_threads"] for x in threadpool_info() if x["user_api"] == "blas"]
    if depth:
        with start("fork") as pool:
            assert pool.submit(digest).result() == found
    return found

if __name__ == "__main__":
    kinds = sys.argv[1].split(",")
    expected = digest()
    inside, done = threading.Event(), threading.Event()

    def hold():  # a thread that is inside a limit, and holds its locks, while others fork
        with blas_single_thread():
            inside.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    inside.wait()
    found = {}
    try:
        for kind in kinds:
            if kind == "loky":
                import joblib
                answer = joblib.Parallel(n_jobs=2)(joblib.delayed(digest)() for _ in range(2))[0]
            elif kind == "loader":
                from torch.utils.data import DataLoader
                class Digests:
                    def __len__(self):
                        return 1
                    def __getitem__(self, index):
                        return digest()
                (answer,) = DataLoader(Digests(), num_workers=1, collate_fn=lambda x: x[0])
            else:
                with start(kind) as pool:
                    answer = pool.submit(digest, int(kind == "fork")).result()
            found[kind] = answer == expected
    finally:
        done.set()
        holder.join()
    found["parent"] = digest() == expected
    print(json.dumps(found))
"""


def workers(tmp_path: Path, *kinds: str, **environment: str) -> dict[str, Any]:
    """Return which kinds of workers gave the bits of their parent."""
    script = tmp_path / "workers.py"  # children that are spawned import it
    script.write_text(WORKERS)
    found: dict[str, Any] = run(
        [str(script), ",".join(kinds)], NUMBA_NUM_THREADS="2", **environment
    )
    return found


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")


@needs_compilation
@needs_fork
def test_a_forked_child_and_its_child_compute_the_bits_of_their_parent(tmp_path: Path) -> None:
    found = workers(tmp_path, "fork")
    assert found == {"fork": True, "parent": True}


@needs_compilation
@needs_fork
@pytest.mark.slow
def test_every_kind_of_worker_gives_one_result(tmp_path: Path) -> None:
    found = workers(tmp_path, "fork", "spawn", "forkserver", "loky")
    assert found == dict.fromkeys(["fork", "spawn", "forkserver", "loky", "parent"], True)


@needs_compilation
@needs_fork
@pytest.mark.slow
def test_loaders_of_torch_fork(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    assert workers(tmp_path, "loader")["loader"]
