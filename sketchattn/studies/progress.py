"""The bar of a study, which follows its journals."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .measure import now_path


class Progress:
    """Show finished cells and the time left on stderr, by watching journals grow."""

    def __init__(self, journals: Sequence[Path], total: int, done: int, show: bool) -> None:
        self._sizes = {path: path.stat().st_size if path.exists() else 0 for path in journals}
        self._lines = 0
        self._returned = 0
        self._shown = 0
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._bar: Any = None
        self._thread: threading.Thread | None = None
        if show:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=done,
                desc="study",
                unit="cell",
                file=sys.stderr,
                dynamic_ncols=True,
                smoothing=0.05,
            )
            self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Progress:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._bar is not None:
            self._show()
            self._bar.close()

    def returned(self, cells: int) -> None:
        """Count the cells of a finished head, whose journal may be on another machine."""
        with self._lock:
            self._returned += cells

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            self._show()

    def _show(self) -> None:
        for path, size in self._sizes.items():
            try:
                with path.open("rb") as file:
                    file.seek(size)
                    fresh = file.read()
            except FileNotFoundError:
                continue
            self._lines += fresh.count(b"\n")
            self._sizes[path] = size + len(fresh)
        with self._lock:
            done = max(self._lines, self._returned)
        self._bar.set_postfix_str(self._at_work(), refresh=False)
        self._bar.update(done - self._shown)
        self._bar.refresh()
        self._shown = done

    def _at_work(self) -> str:
        """Return the cell that is in work, the one that began last where there are several."""
        found: list[tuple[float, str]] = []
        for journal in self._sizes:
            path = now_path(journal)
            with suppress(OSError):
                found.append((path.stat().st_mtime, path.read_text()))
        return max(found)[1] if found else ""
