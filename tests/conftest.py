"""Fixtures of the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from sketchattn.kernels._threads import limit_threads


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
    """Small products do not wait for a second thread, which a busy machine may not have."""
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
