"""See where BLAS would start threads: OpenBLAS hands its pieces of work to a function of ours."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from threadpoolctl import ThreadpoolController

JOB = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
START = ctypes.CFUNCTYPE(
    None, ctypes.c_int, JOB, ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
)
# As OpenBLAS, and the builds of it that NumPy and SciPy bring, spell it; releases before 0.3.28
# have none.
SETTERS = [
    f"{prefix}openblas_set_threads_callback_function{suffix}"
    for prefix in ("", "scipy_")
    for suffix in ("", "64_")
]


def setters() -> list[Any]:
    """Return the function of each BLAS library that takes ours; fewer where it has none."""
    found = []
    for library in ThreadpoolController().lib_controllers:
        if library.user_api == "blas":
            known = (getattr(library.dynlib, name, None) for name in SETTERS)
            found += [setter for setter in known if setter is not None][:1]
    return found


def can_watch() -> bool:
    """Say whether every BLAS library of the process can be watched."""
    return len(setters()) == len(ThreadpoolController().select(user_api="blas").lib_controllers)


def line_of_package() -> str:
    """Return the innermost line of the package that is being run by this thread."""
    frame = sys._getframe(1)
    while frame.f_back is not None and "/sketchattn/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


@contextmanager
def watched() -> Iterator[list[str]]:
    """Yield a list that grows by a line for every call that BLAS splits over threads."""
    lines: list[str] = []

    def start(sync: int, job: Any, count: int, size: int, data: int, extra: int) -> None:
        lines.append(line_of_package())
        # Pieces of one product wait for each other: they need a thread each.
        pieces = [
            threading.Thread(target=job, args=(i, data + i * size, extra)) for i in range(count)
        ]
        for piece in pieces:
            piece.start()
        for piece in pieces:
            piece.join()

    callback = START(start)
    places = setters()
    for place in places:
        place.argtypes, place.restype = [ctypes.c_void_p], None
        place(ctypes.cast(callback, ctypes.c_void_p))
    try:
        yield lines
    finally:
        for place in places:
            place(None)
