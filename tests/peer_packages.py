"""Packages of other authors that compute what methods of ours compute; only tests use them."""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest

from sketchattn.bench import peers


def peer(package: str) -> Any:
    """Return the attention class of a package; skip without it, but fail where CI=true."""
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the benchmark's, that it is left out
        found = peers._peer(package)
    if found is None:
        reason = f"{package} is not installed; ./run tests installs it"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    assert issubclass(found, torch.nn.Module)
    return found
