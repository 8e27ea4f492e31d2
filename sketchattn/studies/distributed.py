"""Cells of a study on a cluster of Dask.

The study holds its folder and writes its journals where it was started: workers get heads and
numbers of cells, return values, and need no file system.  A task computes cells of one head for
two seconds and returns what it has; what is left is asked for again where the exact side of the
head is known, or shared out where workers are idle.  So a worker that is lost costs two seconds,
and Dask gives what it was at to another.

Dask is imported on use.
"""

from __future__ import annotations

import math
import pickle
import platform
import queue
import sys
import time
import traceback
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import zip_longest
from typing import Any, NamedTuple

from .. import __version__
from ..base.files import append_bytes
from ..base.floating import without_floating_errors
from ..base.machine import machine
from ..kernels._threads import blas_single_thread, limit_threads
from ..problem import AttentionProblem
from .columns import Key, Values
from .grid import Cell
from .journal import check_held, format_line
from .measure import HeadTask, run_cell

# A task ends with the first cell after so many seconds: what a lost worker costs, and how long
# idle workers wait for their share.
TASK_SECONDS = 2.0
# The cluster holds so many heads at least, and two a thread, however many a study has.
OPEN_HEADS = 8
CONNECT_SECONDS = 10.0
# A nanny starts a worker again, and a queue a job; after so long somebody should know.
PATIENT_SECONDS = 60.0


# --- the cluster ----------------------------------------------------------------------------------


def check_cluster(dask: object) -> Any:
    """Return a client or an address as it is, None for None; refuse anything else."""
    if dask is None:
        return None
    # Who has made a client has loaded what makes them.
    loaded: Any = sys.modules.get("distributed")
    if not isinstance(dask, str) and (loaded is None or not isinstance(dask, loaded.Client)):
        raise TypeError(
            f"dask must be a client of dask.distributed or the address of a scheduler, got "
            f"{type(dask).__name__}; make one with dask.distributed.Client(...)"
        )
    if isinstance(dask, str):
        if not dask.strip():
            raise ValueError(
                f"dask must be the address of a scheduler, got {dask!r}; write it as "
                f"tcp://host:8786, as the scheduler prints it"
            )
        try:
            import distributed  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"dask needs the package dask.distributed, which cannot be imported ({error}); "
                f"run: python -m pip install 'sketchattn[dask]'"
            ) from error
        return dask
    client: Any = dask
    if client.asynchronous or client.status != "running":
        state = "asynchronous" if client.asynchronous else client.status
        raise ValueError(
            f"dask must be a running client that is not asynchronous, got one that is {state}; "
            f"make another with dask.distributed.Client(...)"
        )
    return client


@contextmanager
def connected(dask: Any) -> Iterator[Any]:
    """Yield the client of a cluster whose workers can do a study, None for None.

    A client that was made here for an address is closed at the end.
    """
    if not isinstance(dask, str):
        if dask is not None:
            _check_workers(dask)
        yield dask
        return
    from distributed import Client

    try:
        client = Client(dask, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise OSError(
            f"dask must be the address of a scheduler that answers, got {dask!r} ({reason}); "
            f"start one with: dask scheduler"
        ) from error
    with client:
        _check_workers(client)
        yield client


def versions() -> dict[str, str]:
    """Return what decides the bits of a cell beside its code, and whether it can be sent at all."""
    import numba
    import numpy
    import scipy

    return {
        "sketchattn": __version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        "numba": numba.__version__,
    }


def _worker() -> tuple[dict[str, str], list[str]]:
    """Return the versions of a worker, and its BLAS with the processor that it is made for."""
    return versions(), machine()["blas"]


def _check_workers(client: Any) -> None:
    """Refuse workers with other versions; say if there are none, or other processors."""
    own, blas = _worker()
    try:
        found = client.run(_worker, on_error="return")
    except Exception as error:
        raise ValueError(_unfit("its workers", error)) from error
    others = []
    for address, answer in found.items():
        if isinstance(answer, BaseException):
            raise ValueError(_unfit(address, answer)) from answer
        if answer[0] != own:
            raise ValueError(_other_versions(address, answer[0], own))
        if answer[1] != blas:
            others.append((address, answer[1]))
    if not found:
        warnings.warn("dask has no workers yet; the study waits for them", RuntimeWarning, 4)
    if others:
        address, theirs = others[0]
        warnings.warn(
            f"{len(others)} of {len(found)} workers of dask have another BLAS or processor "
            f"({', '.join(theirs)} on {address}, {', '.join(blas)} here): rows may differ from "
            f"those of a local study in their last digits",
            RuntimeWarning,
            4,
        )


def _unfit(address: str, error: BaseException) -> str:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return (
        f"dask must have workers that can import sketchattn {__version__}, got {reason} on "
        f"{address}; install it on the scheduler and on all workers"
    )


def _other_versions(address: str, theirs: dict[str, str], own: dict[str, str]) -> str:
    differing = [name for name in own if theirs.get(name) != own[name]]
    return (
        f"dask must have workers with the versions of this process, got "
        f"{', '.join(f'{name} {theirs.get(name)}' for name in differing)} on {address} and "
        f"{', '.join(f'{name} {own[name]}' for name in differing)} here; install the same on all"
    )


# --- what a worker does ---------------------------------------------------------------------------


class _Ready(NamedTuple):
    """Hold a head with the exact quantities that are known, and the labels that have run."""

    problem: AttentionProblem
    cells: list[Cell]
    warmed: set[str]


class SentHead:
    """Hold a head and its cells as a worker got them, unpacked for as long as it has them.

    The bytes are opaque to the scheduler, which needs no module of a method of yours.
    """

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.free: list[_Ready] = []  # a thread that computes takes one, and puts it back

    def __reduce__(self) -> tuple[Any, ...]:
        return SentHead, (self.raw,)

    def __sizeof__(self) -> int:
        return len(self.raw)

    def __del__(self) -> None:
        for ready in self.free:
            ready.problem.forget()

    def take(self) -> _Ready:
        """Return what another task has left, or a new one: no two threads share it."""
        try:
            return self.free.pop()
        except IndexError:
            problem, cells = pickle.loads(self.raw)
            return _Ready(problem, cells, set())


class Answer(NamedTuple):
    """Hold what a task returns.

    ``failure`` is the message of a cell that failed and the traceback behind it, ``theirs`` the
    versions of a worker that has others.
    """

    worker: str
    found: list[tuple[int, Values]]
    seconds: float
    failure: tuple[str, str] | None = None
    theirs: dict[str, str] | None = None


@without_floating_errors
def run_cells(head: SentHead, cells: Sequence[int], seconds: float, own: dict[str, str]) -> Answer:
    """Compute cells of a head, one at least, until ``seconds`` are over."""
    from distributed import get_worker

    start, address = time.perf_counter(), str(get_worker().address)
    theirs = versions()
    if theirs != own:  # a worker that came later
        return Answer(address, [], 0.0, theirs=theirs)
    ready, found = head.take(), []
    failure = None
    # A thread of a worker is its share of the machine.
    with limit_threads(1), blas_single_thread():
        for i in cells:
            try:
                found.append((i, run_cell(ready.problem, ready.cells[i], ready.warmed)))
            except RuntimeError as error:
                failure = str(error), traceback.format_exc()
                break
            if time.perf_counter() - start >= seconds:
                break
    head.free.append(ready)
    return Answer(address, found, time.perf_counter() - start, failure)


# --- what the study does --------------------------------------------------------------------------


class RemoteError(Exception):
    """Carry the traceback of a worker, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class _Part(NamedTuple):
    """Name cells of a head that one task is at, and the worker that it is meant for.

    ``alone``: it ends with the first of them.
    """

    head: int
    cells: list[int]
    worker: str | None = None
    alone: bool = False


class _Open(NamedTuple):
    """Hold a head that the cluster has, and the worker that it is meant for."""

    task: HeadTask
    sent: Any
    worker: str | None


def run_on(
    client: Any, tasks: Iterator[HeadTask], count: int
) -> Generator[tuple[str, dict[Key, Values]], None, None]:
    """Yield names of heads and cells of theirs as they are finished and in their journals.

    Parameters
    ----------
    client : distributed.Client
    tasks : iterator of HeadTask
        Taken one by one, as the cluster has room for heads.
    count : int
        How many there are.
    """
    study = _Study(client, tasks, count)
    try:
        yield from study.run()
    finally:
        study.cancel()


class _Study:
    """Keep account of the cells that a cluster is at."""

    def __init__(self, client: Any, tasks: Iterator[HeadTask], count: int) -> None:
        self.client = client
        self.own = versions()
        self.tasks = tasks
        self.unopened = count
        self.opened = 0
        self.heads: dict[int, _Open] = {}
        self.running: dict[Any, _Part] = {}  # by the future of its task
        self.ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._threads: dict[str, int] = {}
        self._last: set[str] = set()  # the workers when there were some
        self._asked = -math.inf
        self._manned = time.monotonic()  # when there was a worker, never if nobody need be told

    def run(self) -> Iterator[tuple[str, dict[Key, Values]]]:
        while True:
            while self.unopened and len(self.heads) < max(OPEN_HEADS, 2 * len(self.threads())):
                self._open()
            if not self.running:
                return
            with suppress(queue.Empty):
                self.ended.get(timeout=1.0)
            self.threads()
            failure: Exception | None = None
            for future in [x for x in self.running if x.status != "pending"]:
                part = self.running.pop(future)
                task = self.heads[part.head].task
                try:
                    answer = self._answer(future, part, task)
                except (RuntimeError, ValueError) as error:
                    failure = failure or error  # first what the others have finished
                    continue
                if answer is None:  # asked for once more
                    continue
                fresh = [(task.cells[i], values) for i, values in answer.found]
                if task.kept and fresh:
                    check_held(task.lock, task.token)
                    lines = [format_line(task.problem.digest, *pair) for pair in fresh]
                    append_bytes(task.journal, b"".join(lines), sync=True)
                if answer.failure is None:
                    self._continue(part, answer)
                elif failure is None:
                    message, trace = answer.failure
                    failure = RuntimeError(message)
                    failure.__cause__ = RemoteError(trace)
                yield str(task.problem.name), {cell.key: values for cell, values in fresh}
            if failure is not None:
                raise failure

    def threads(self) -> list[str]:
        """Return the workers of the cluster, each once a thread, as they were a second ago."""
        if time.monotonic() - self._asked > 1.0:
            self._asked = time.monotonic()
            with suppress(OSError):  # a scheduler that is gone takes its tasks along, see below
                self._threads = self.client.nthreads()
            if self._threads:
                self._manned = self._asked
                last, self._last = self._last, set(self._threads)
                if last and last.isdisjoint(self._last):
                    self._ask_again()
            elif self._asked - self._manned > PATIENT_SECONDS:
                self._manned = math.inf
                warnings.warn(
                    f"dask has had no workers for {PATIENT_SECONDS:.0f} seconds; the study waits "
                    f"for some",
                    RuntimeWarning,
                    2,
                )
        return [worker for worker, count in self._threads.items() for _ in range(count)]

    def idle(self) -> list[str]:
        """Return the workers that nothing is meant for, each once a thread."""
        free = self.threads()
        for part in self.running.values():
            if part.worker in free:
                free.remove(part.worker)
        # Of what is meant for any worker nobody knows where it is.
        return free[: max(0, len(self.threads()) - len(self.running))]

    def _open(self) -> None:
        """Send a head, and ask for all its cells: in several parts where threads are idle."""
        task, i = next(self.tasks), self.opened
        self.opened += 1
        self.unopened -= 1
        idle = self.idle()
        idle = idle[: max(1, len(idle) // (self.unopened + 1))]
        parts = [_Part(i, cells) for cells in _pieces(range(len(task.cells)), len(idle))]
        self._send(i, task, idle[0] if idle else None)
        self._ask(parts, idle)

    def _send(self, i: int, task: HeadTask, worker: str | None) -> None:
        """Send a head as the argument of a task: what a lost worker had can be made again."""
        from distributed.protocol.pickle import dumps

        raw = dumps((task.problem, task.cells))
        self.heads[i] = _Open(task, self._submit(_Part(i, [], worker), SentHead, raw), worker)

    def _ask(self, parts: Sequence[_Part], workers: Sequence[str]) -> None:
        """Have parts computed by these workers, by any where there are no more of them."""
        for part, worker in zip_longest(parts, workers):
            if part is not None:
                part = part._replace(worker=worker)
                seconds = 0.0 if part.alone else TASK_SECONDS
                sent = self.heads[part.head].sent
                future = self._submit(part, run_cells, sent, part.cells, seconds, self.own)
                self.running[future] = part
                future.add_done_callback(self.ended.put)

    def _ask_again(self) -> None:
        """Ask for what was meant for workers once more, of any, as those of before are lost.

        Dask lets a task with a worker of its own go to another one when that is lost, but not to
        one that comes when there is none: such a task would wait for good.
        """
        bound = [i for i, head in self.heads.items() if head.worker is not None]
        again = {
            future: part
            for future, part in self.running.items()
            if future.status == "pending" and (part.worker is not None or part.head in bound)
        }
        # Heads are let go, not cancelled: answers that nobody has fetched may need them again.
        self.client.cancel(list(again))
        for i in bound:
            self._send(i, self.heads[i].task, None)
        for future, part in again.items():
            del self.running[future]
            self._ask([part], [])

    def _submit(self, part: _Part, function: Any, *args: Any) -> Any:
        """Submit a task of a part: what is there first is done first."""
        options: dict[str, Any] = {"pure": False, "priority": -part.head}
        if part.worker is not None:  # another will do where that one is lost
            options |= {"workers": [part.worker], "allow_other_workers": True}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*large graph", UserWarning)  # a long head is
            return self.client.submit(function, *args, **options)

    def _continue(self, part: _Part, answer: Answer) -> None:
        """Ask for what a task has left, in several parts where threads are idle."""
        done = {i for i, _ in answer.found}
        left = [i for i in part.cells if i not in done]
        if not left:
            if all(other.head != part.head for other in self.running.values()):
                del self.heads[part.head]
            return
        home, idle = answer.worker, self.idle()
        count = 1
        if not (part.alone or self.unopened):
            expected = len(left) * answer.seconds / max(1, len(done))
            count = min(len(idle), math.ceil(expected / TASK_SECONDS))
        if home in idle or not idle:  # where the exact side is; there others may be in line
            idle = [home, *(worker for worker in idle if worker != home)]
        self._ask([part._replace(cells=cells) for cells in _pieces(left, count)], idle)

    def _answer(self, future: Any, part: _Part, task: HeadTask) -> Answer | None:
        """Return what a task has returned, None if its cells are asked for again, or raise."""
        from distributed import KilledWorker

        folder = "" if not task.kept else "; finished cells are in the folder"
        if future.status not in ("finished", "error"):
            raise RuntimeError(
                f"dask has lost the work of this study: its scheduler was restarted, or does not "
                f"answer{folder}, start the study again to continue"
            )
        error = future.exception()
        if isinstance(error, KilledWorker):
            if not part.alone:  # one cell at a time: the others are finished, or this one is named
                self._ask([part._replace(alone=True)], [])
                return None
            raise RuntimeError(
                f"workers of dask ended again and again with {_named(task, part.cells[0])} "
                f"({error.last_worker.address} was the last){folder}; give workers more memory, or "
                f"look into their logs"
            ) from error
        if error is not None:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise RuntimeError(
                f"dask could not run {_named(task, part.cells[0])} ({reason}); scheduler and "
                f"workers need sketchattn, and workers the modules of your methods"
            ) from error
        answer: Answer = future.result()
        if answer.theirs is not None:
            raise ValueError(_other_versions(answer.worker, answer.theirs, self.own))
        return answer

    def cancel(self) -> None:
        """Take back what the cluster has not begun; what it is at ends with its cell."""
        left = [*self.running, *(head.sent for head in self.heads.values())]
        with suppress(Exception):  # as the cluster is gone
            if left and self.client.status == "running":
                self.client.cancel(left)


def _named(task: HeadTask, i: int) -> str:
    cell = task.cells[i]
    at = "" if cell.rank is None else f", rank {cell.rank}"
    return f"method {cell.label!r} on head {task.problem.name!r}{at}, seed {cell.seed}"


def _pieces(cells: Sequence[int], count: int) -> list[list[int]]:
    """Return cells in so many pieces, one at least and none empty, each of neighbours."""
    count = max(1, min(count, len(cells)))
    cuts = [round(k * len(cells) / count) for k in range(count + 1)]
    return [list(cells[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
