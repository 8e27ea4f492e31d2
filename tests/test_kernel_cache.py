"""The cache of compiled kernels: damaged, stale, or in a folder that cannot be written."""

from __future__ import annotations

import errno
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

from sketchattn.kernels import _jit, softmax

COMPILED = not numba.config.DISABLE_JIT  # type: ignore[attr-defined]  # set at run time
pytestmark = pytest.mark.skipif(not COMPILED, reason="nothing is compiled")

COLD = {"compiled": 1, "loaded": 0, "said": [], "failure": None}
WARM = {"compiled": 0, "loaded": 1, "said": [], "failure": None}


def call(folder: Path) -> dict[str, Any]:
    """Return what a process sees that calls one small kernel with its cache in ``folder``."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as said:
        patch.setattr(numba.config, "CACHE_DIR", str(folder))
        patch.setattr(_jit, "CACHE", True)
        patch.setattr(_jit, "failure", None)
        warnings.simplefilter("always")
        any_key: Any = _jit.kernel()(softmax._any_key.py_func)  # type: ignore[attr-defined]
        keys = np.array([[False, True]])
        assert any_key(keys, 0, 0, 2)
        assert not any_key(keys, 0, 0, 1)
        return {
            "compiled": sum(any_key.stats.cache_misses.values()),
            "loaded": sum(any_key.stats.cache_hits.values()),
            "said": [str(x.message) for x in said],
            "failure": _jit.failure,
        }


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(b"\x80not a pickle" * 100)


def one_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def other_release(path: Path) -> None:
    path.write_bytes(pickle.dumps("0.1") + b"of another layout")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that holds the compiled kernel."""
    folder = tmp_path_factory.mktemp("cache")
    assert call(folder) == COLD
    assert call(folder) == WARM
    return folder


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".nbi", cut),
        (".nbi", garbage),
        (".nbi", other_release),
        (".nbc", empty),
        (".nbc", cut),
        (".nbc", one_byte),
    ],
)
def test_a_damaged_file_is_compiled_again_and_repaired(
    warm: Path, suffix: str, damage: Callable[[Path], None]
) -> None:
    (path,) = warm.rglob(f"softmax._any_key*{suffix}")
    damage(path)
    assert call(warm) == COLD
    assert call(warm) == WARM


def test_a_file_that_cannot_be_replaced_is_said_once(tmp_path: Path) -> None:
    assert call(tmp_path) == COLD
    (path,) = tmp_path.rglob("softmax._any_key*.nbi")
    a_folder(path)
    found = call(tmp_path)
    assert (found["compiled"], found["loaded"]) == (1, 0)
    assert str(path.parent) in found["failure"]
    (said,) = found["said"]
    assert said.startswith(f"Compiled kernels cannot be kept in {path.parent}")
    assert "NUMBA_CACHE_DIR" in said


def test_a_folder_that_can_only_be_read_serves_what_it_holds(
    warm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As where a file system is mounted read-only: permissions do not stop root.
    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(_jit.KernelCache, "flush", refuse)
    monkeypatch.setattr(_jit._CheckedFile, "_open_for_write", refuse)
    assert call(warm) == WARM
    found = call(tmp_path)
    assert (found["compiled"], found["loaded"], len(found["said"])) == (1, 0, 1)
    assert str(tmp_path) in found["failure"]
    assert os.strerror(errno.EROFS) in found["failure"]


def test_code_of_another_source_is_not_served(warm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel's own file is the same; a function that it may call is not.
    with monkeypatch.context() as patch:
        patch.setattr(_jit, "SOURCE", "edited")
        assert call(warm) == COLD
    assert call(warm) == COLD
    assert call(warm) == WARM
