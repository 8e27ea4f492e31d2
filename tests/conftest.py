"""Fixtures of the whole suite."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sketchattn.kernels import _threads
from sketchattn.kernels._threads import cpu_count, limit_threads

ROOT = Path(__file__).parents[1]
# Each precision has kernels of its own, which one process each can compile.
WARM_UP = "import sys; from sketchattn.bench.startup import warmup; warmup(sys.argv[1:])"


@pytest.hookimpl(optionalhook=True)  # pytest-xdist asks
def pytest_xdist_auto_num_workers() -> int:
    """Take a worker a core; one core needs no second process."""
    cores = cpu_count()
    return cores if cores > 1 else 0


class Registered:
    """Takes away the methods, sketches and claims that a test or a docstring's example registers.

    A plugin, since a hook or a fixture of this file would not reach examples in ``sketchattn/``.
    """

    def __init__(self) -> None:
        self.known: list[dict[str, Any]] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        """Compare after the fixtures of the item have put back what they replaced."""
        if not self.known:
            import sketchattn as sa
            from sketchattn.sketches import base as sketches
            from sketchattn.theory.engine import registry as claims
            from sketchattn.zoo import base as methods

            for everything in (sa.methods, sa.sketches.sketches, sa.theory.claims):
                everything()  # imports what registers itself
            self.known = [methods._REGISTRY, sketches._REGISTRY, claims._ENTRIES]
        before = [dict(names) for names in self.known]
        result = yield
        for names, earlier in zip(self.known, before, strict=True):
            if names != earlier:
                names.clear()
                names.update(earlier)
        return result


def pytest_configure(config: pytest.Config) -> None:
    """Choose the threads of this process and its children, and fill the cache for the workers.

    Tests marked ``threads`` need two threads or more, also where there is one core; more than four
    would make processes of many cores for every worker.  Neither library is loaded by now.
    """
    config.pluginmanager.register(Registered())
    threads = str(min(4, max(2, cpu_count())))
    os.environ.setdefault("NUMBA_NUM_THREADS", threads)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", threads)
    # A module of integrations, and with it its examples, needs the package of its name.
    for package in ("jax", "onnx", "torch", "transformers"):
        if find_spec(package) is None:
            module = ROOT / "sketchattn" / "integrations" / f"{package}.py"
            config.option.ignore = [*(config.option.ignore or ()), str(module)]
    # Workers that start with an empty cache would all compile the same kernels.
    controller = bool(getattr(config.option, "tx", None)) and not hasattr(config, "workerinput")
    everything = config.args == config.getini("testpaths") and not config.option.collectonly
    if controller and everything and os.environ.get("NUMBA_DISABLE_JIT", "0") == "0":
        children = [
            subprocess.Popen([sys.executable, "-c", WARM_UP, precision], cwd=ROOT)
            for precision in ("float32", "float64")
        ]
        for child in children:
            child.wait()  # one that fails says so; tests find out why


def chosen_seeds(text: str) -> list[int]:
    """Return the seeds that SKETCHATTN_TEST_SEEDS names: "" is 0, "7", "0-9", "all" is 0-99."""
    if text == "":
        return [0]
    if text == "all":
        return list(range(100))
    first, dash, last = text.partition("-")
    if not (first.isdecimal() and (last.isdecimal() if dash else True)):
        raise pytest.UsageError(
            f"SKETCHATTN_TEST_SEEDS must be a number, a range such as 0-9, or all, got {text!r}"
        )
    return list(range(int(first), int(last if dash else first) + 1))


@pytest.fixture(scope="session", params=chosen_seeds(os.environ.get("SKETCHATTN_TEST_SEEDS", "")))
def global_random_seed(request: pytest.FixtureRequest) -> int:
    """Give a seed; a test that uses it must pass for every one of them."""
    seed: int = request.param
    return seed


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Give fixtures of a module the one thread that its tests have."""
    with limit_threads(1):
        yield


@pytest.fixture(autouse=True)
def one_thread_a_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run on one thread what is not about threads: every core has a worker already."""
    if request.node.get_closest_marker("threads"):
        monkeypatch = request.getfixturevalue("monkeypatch")
        monkeypatch.setattr(_threads, "PAYS", 1)  # small problems are shared out like large ones
        yield
    else:
        with limit_threads(1):
            yield


@pytest.fixture(scope="session", autouse=True)
def floating_point_of_kernels() -> Iterator[None]:
    """Let kernels that run as plain Python overflow and divide by zero without a warning."""
    if os.environ.get("NUMBA_DISABLE_JIT", "0") == "0":
        yield
    else:
        with np.errstate(all="ignore"):
            yield
