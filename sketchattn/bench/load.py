"""How busy a machine is with other programs, and programs that keep it busy on purpose."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

# More CPUs than this, kept busy by other programs, disturb: a call that wants all of them would
# have to wait for a tenth of its time on a machine of two.
DISTURBED = 0.2
PAUSE = 0.5  # seconds over which the load is taken before and after the benchmarks

# Busy processes that were started here and run: what they use is no one else's.
_busy: list[int] = []

# Works until it is told to end, or who started it is gone.
_SPIN = """
import os, sys
parent = int(sys.argv[1])
print("ready", flush=True)
while os.getppid() == parent:
    for _ in range(100000):
        pass
"""


class Reading(NamedTuple):
    """Hold three clocks, in seconds: of the wall, of all CPUs' work, and of our own.

    ``busy`` is None where only an average of a minute can be had, which ``queue`` is then (None:
    that cannot be had either).
    """

    wall: float
    busy: float | None
    own: float
    queue: float | None


def reading() -> Reading:
    """Return where the clocks stand now."""
    own = time.process_time() + _of_children() + sum(_of_process(pid) for pid in _busy)
    busy = _busy_seconds()
    queue = None
    if busy is None and hasattr(os, "getloadavg"):
        queue = os.getloadavg()[0]
    return Reading(time.perf_counter(), busy, own, queue)


def others(before: Reading, after: Reading) -> float:
    """Return how many CPUs other programs kept busy between two readings, NaN where unknown.

    The kernel looks once a tick who runs on a CPU, and our own time is measured exactly: a tick
    for each CPU is not held against others.
    """
    wall = max(after.wall - before.wall, 1e-9)
    own = (after.own - before.own) / wall
    if before.busy is not None and after.busy is not None:
        ticks = len(_cpus()) / os.sysconf("SC_CLK_TCK")
        return max(0.0, (after.busy - before.busy - ticks) / wall - own)
    return float("nan") if after.queue is None else max(0.0, after.queue - own)


def measure() -> float:
    """Return how many CPUs other programs keep busy now: this one sleeps meanwhile."""
    before = reading()
    time.sleep(PAUSE)
    return others(before, reading())


@contextmanager
def busy_processes(count: int) -> Iterator[list[int]]:
    """Keep ``count`` processes busy with nothing while inside, and end them; yield their numbers.

    They end themselves too if this process is killed.
    """
    started: list[subprocess.Popen[str]] = []
    try:
        for _ in range(count):
            process = subprocess.Popen(
                [sys.executable, "-S", "-E", "-c", _SPIN, str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                text=True,
            )
            started.append(process)
            _busy.append(process.pid)
        for process in started:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("a busy process ended at once; is Python allowed to start one?")
        yield [process.pid for process in started]
    finally:
        for process in started:
            process.kill()
            process.communicate()  # waits, so that its time counts among that of our children
            _busy.remove(process.pid)


def _cpus() -> list[int]:
    """Return the CPUs that this process may use, where the system says which."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _busy_seconds() -> float | None:
    """Return for how long the CPUs that we may use have worked, None where that is not told."""
    wanted = {f"cpu{x}" for x in _cpus()}
    try:
        with open("/proc/stat", encoding="ascii") as file:
            rows = [line.split() for line in file if line.startswith("cpu")]
    except (OSError, ValueError):
        return None
    # user, nice, system, idle, iowait, irq, softirq, and what a host took away.
    fields = [[int(x) for x in row[1:9]] for row in rows if row[0] in wanted]
    total = sum(sum(x[:3]) + sum(x[5:]) for x in fields)
    return total / os.sysconf("SC_CLK_TCK") if total else None


def _of_children() -> float:
    """Return the CPU seconds of children that have ended."""
    try:
        import resource
    except ImportError:
        return 0.0
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _of_process(pid: int) -> float:
    """Return the CPU seconds of a process that runs, where the system tells."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            fields = file.read().rpartition(")")[2].split()  # a name may have spaces
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0
