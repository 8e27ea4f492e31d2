"""Benchmarks: every one runs on small sizes, and what they print is what they measured."""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby

import numpy as np
import pytest
from naive import naive_attention
from peer_packages import peer

from sketchattn.base.machine import machine
from sketchattn.bench import harness, load, peers, runner, startup


@pytest.mark.slow
@pytest.mark.parametrize("name", runner.BENCHMARKS)
def test_every_benchmark_runs(name: str) -> None:
    if name == "peers":
        for package in peers.PEERS:
            peer(package)
    rows = runner.run([name], quick=True, rounds=1)
    assert rows
    for row in rows:
        assert row["benchmark"] == name
        # Differences of two times may be negative where both are noise.
        assert np.isfinite(row["ratio"])
        assert row["ratio"] >= 0 or name == "import"
        assert row["met"] in (None, True, False)
        assert (row["target"] is None) == (row["met"] is None)
    text = runner.render(rows)
    assert all(row["case"] in text for row in rows)
    assert "threads:" in text


def test_every_family_is_loaded_by_what_runs_them() -> None:
    assert list(runner.BENCHMARKS) == [
        "exact",
        "memory",
        "report",
        "certify",
        "sketch",
        "leverage",
        "linformer",
        "skeinformer",
        "combiner",
        "informer",
        "nystromformer",
        "dba",
        "performer",
        "small",
        "threads",
        "peers",
        "peers_training_free",
        "decode",
        "integrations",
        "import",
    ]


def test_packages_that_are_missing_are_named_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "PEERS", {x: ("no_such_module", "X") for x in peers.PEERS})
    q, k, v = (x[0] for x in harness.normal(1, 8, 4))
    torch = pytest.importorskip("torch")
    with pytest.warns(UserWarning, match=r"is not installed, so it is left out; pip") as caught:
        assert list(peers._peer_calls(torch, q, k, v, 2)) == []
    named = [str(x.message).split()[0] for x in caught]
    assert named == ["nystrom-attention", "performer-pytorch", "linformer"]
    monkeypatch.setattr(peers, "import_torch", lambda: None)
    with pytest.warns(UserWarning, match=r"^torch is not installed, so peers are left out; pip"):
        assert runner.run(["peers"], quick=True) == []


def test_calls_are_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "others", lambda *_: 0.0)  # or disturbed rounds would be repeated
    order: list[str] = []
    calls: dict[str, Callable[[], object]] = {x: partial(order.append, x) for x in "ab"}
    seconds = harness.time_interleaved(calls, 3)
    # Each round starts with another call; brief ones are repeated before the timed one.
    assert "".join(order[:4]) == "aabb"  # to warm up, and to see whether a call is brief
    assert [name for name, _ in groupby(order[4:])] == list("abab")  # a, bb, aa, b
    assert len(order) > 100
    assert {name: len(x) for name, x in seconds.items()} == {"a": 3, "b": 3}
    order.clear()
    monkeypatch.setattr(harness, "BRIEF", 0.0)
    harness.time_interleaved(calls, 3)
    assert "".join(order) == "aabb" + "ab" + "ba" + "ab"  # rotated


def test_disturbed_rounds_are_repeated_and_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "BRIEF", 0.0)
    calls: dict[str, Callable[[], object]] = {"a": lambda: None, "b": lambda: None}

    def loads(values: list[float]) -> harness.Timings:
        given = iter(values)
        monkeypatch.setattr(load, "others", lambda *_: next(given))
        found = harness.time_interleaved(calls, 3)
        assert list(given) == []
        assert {len(x) for x in found.values()} == {3}
        return found

    quiet, busy = load.DISTURBED, load.DISTURBED + 0.1
    found = loads([0.0, quiet, 0.1])
    assert (found.others, found.repeated, found.disturbed) == ([0.0, quiet, 0.1], 0, 0)
    found = loads([busy, 0.0, 0.1, 1.0, 0.0])
    assert (found.others, found.repeated, found.disturbed) == ([0.0, 0.1, 0.0], 2, 0)
    # Three more at most; the least disturbed ones count, in their order.
    found = loads([1.0, 2.0, 0.0, busy, 3.0, 1.5])
    assert (found.others, found.repeated, found.disturbed) == ([1.0, 0.0, busy], 3, 2)
    row = harness.compare("x", "y", found, "a", "b", target=None)
    assert (row["others"], row["disturbed"], row["repeated"]) == (busy, 2, 3)
    assert "~ 2 of 3 rounds" in runner.render([row])
    assert "do not quote them" in runner.render([row])
    found = loads([float("nan")] * 3)  # unknown: nothing to say
    row = harness.compare("x", "y", found, "a", "b", target=None)
    assert (row["others"], row["disturbed"], row["repeated"]) == (None, 0, 0)
    assert "~" not in runner.render([row])


def test_calls_are_timed_on_one_thread_beside_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "BRIEF", 0.0)
    monkeypatch.setattr(load, "others", lambda *_: 0.0)
    threads, seen = [2], []

    @contextmanager
    def on_threads(count: int) -> Iterator[None]:
        threads.append(count)
        yield
        threads.pop()

    # A worker of the tests may have one thread only.
    monkeypatch.setattr(harness, "library_threads", lambda: threads[-1])
    monkeypatch.setattr(harness, "on_threads", on_threads)

    def look() -> None:
        seen.append(threads[-1])

    found = harness.time_both({"a": look}, 2)
    # Twice each to warm up, then in turn.
    assert seen == [2, 2, 1, 1, 2, 1, 1, 2]
    assert {len(x) for x in (found["a"], found.one_thread["a"])} == {2}
    seconds = harness.Timings({"a": [1.0, 1.0], "b": [2.0, 4.0]}, [0.0, 0.0], 0)
    seconds.one_thread = {"a": [3.0, 3.0], "b": [2.0, 6.0]}
    row = harness.compare("x", "y", seconds, "a", "b", factor=2, target=0.2, one_target=0.9)
    assert (row["ratio"], row["theirs"], row["met"]) == (0.1875, 6.0, True)
    one = row["one_thread"]
    assert (one["ratio"], one["theirs"], one["met"]) == (0.5, 8.0, True)
    assert one["ratio_quartiles"] == [0.375, 0.625]
    line = runner.render([row]).splitlines()[1].split()
    assert line[-7:] == ["0.2", "met", "3", "s", "0.500", "0.9", "met"]
    seen.clear()
    with on_threads(1):
        alone = harness.time_both({"a": look}, 1)
    assert set(seen) == {1}
    assert alone.one_thread == {"a": alone["a"]}


def test_one_thread_is_one_of_kernels_and_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Torch:
        count = 3

        def get_num_threads(self) -> int:
            return self.count

        def set_num_threads(self, count: int) -> None:
            self.count = count

    torch = Torch()
    monkeypatch.setitem(sys.modules, "torch", torch)
    before = harness.library_threads()
    with harness.on_threads(1):
        assert (harness.library_threads(), torch.count) == (1, 1)
    assert (harness.library_threads(), torch.count) == (before, 3)


def test_others_are_what_is_busy_and_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    two = sorted({0, 1})
    monkeypatch.setattr(load, "_cpus", lambda: two)
    tick = 1 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.01
    before = load.Reading(10.0, 100.0, 5.0, None)
    # Two seconds in which the CPUs worked for 3.5, 2 of them for us; a tick for each CPU is noise.
    found = load.others(before, load.Reading(12.0, 103.5, 7.0, None))
    assert found == pytest.approx(0.75 - tick)
    assert load.others(before, load.Reading(12.0, 102.0, 7.0, None)) == 0.0
    # Where the system gives an average only: what it has beyond our own part.
    before = load.Reading(10.0, None, 5.0, 0.0)
    assert load.others(before, load.Reading(12.0, None, 7.0, 2.5)) == pytest.approx(1.5)
    assert math.isnan(load.others(before, load.Reading(12.0, None, 7.0, None)))


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="reads the clocks of Linux")
def test_clocks_of_the_machine_run() -> None:
    before = load.reading()
    assert before.busy is not None
    assert before.busy > 0
    deadline = time.monotonic() + 60
    while load.reading().busy == before.busy:
        assert time.monotonic() < deadline, "busy here, and no CPU counts it"
    after = load.reading()
    assert after.own > before.own
    assert after.wall > before.wall


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="looks at processes of Linux")
def test_busy_processes_are_busy_ours_and_end() -> None:
    with load.busy_processes(2) as found:
        assert len(set(found)) == 2
        assert all(map(_runs, found))
        deadline = time.monotonic() + 60
        while not all(load._of_process(pid) > 0 for pid in found):
            assert time.monotonic() < deadline, "they use no time"
        inside = load.reading().own
    assert not any(map(_runs, found))
    # What they used stays among ours when they are gone; both clocks of it tick at 1/100 s.
    assert load.reading().own >= inside - 0.05
    with pytest.raises(KeyError), load.busy_processes(1) as found:
        raise KeyError
    assert not _runs(found[0])
    assert load._busy == []


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="looks at processes of Linux")
def test_busy_processes_end_with_whoever_started_them() -> None:
    script = (
        "import os\n"
        "from sketchattn.bench.load import busy_processes\n"
        "with busy_processes(1) as found:\n"
        "    print(found[0], flush=True)\n"
        "    os._exit(0)\n"
    )
    pid = int(harness.child(script))
    deadline = time.monotonic() + 60
    while _runs(pid):
        assert time.monotonic() < deadline, "still there"
        time.sleep(0.05)


def test_ratios_are_paired_and_targets_are_upper_bounds() -> None:
    theirs = [2.0, 2.0, 2.0]
    row = harness.make_row("x", "y", [1.0, 8.0, 3.0], against="z", theirs=theirs, target=1.5)
    assert row["ratio"] == 1.5
    assert row["met"] is True
    missed = harness.make_row("x", "y", [4.0], against="z", theirs=[2.0], target=1.5)
    assert missed["met"] is False
    assert "MISSED" in runner.render([missed])


def test_refusals() -> None:
    text = "name must be a benchmark, got 'exat'; did you mean 'exact'?"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        runner.run(["exat"])
    text = "rounds must be at least 1, got 0; 7 is the default"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        runner.run(["exact"], rounds=0)


def test_a_measuring_process_that_fails_is_reported() -> None:
    assert harness.child("import sys; print(sys.argv[1:])", "a", "b") == "['a', 'b']"
    text = "a measuring process must succeed, got: ValueError: no; run it by hand"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        harness.child("raise ValueError('no')")
    text = "a measuring process must succeed, got: no message; run it by hand"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        harness.child("raise SystemExit(3)")


def test_plain_numpy_is_the_formula() -> None:
    q, k, v = harness.normal(2, 9, 4)
    expected = [
        naive_attention(*(x[h] for x in (q, k, v)), scale=0.5)[1].astype(np.float32)
        for h in range(2)
    ]
    # Float32 throughout: 4 products, 9 exponentials, sums and products, each 6e-8.
    assert np.allclose(harness.plain_numpy(q, k, v), expected, rtol=0, atol=1e-5)


def test_facts_of_the_machine_are_known() -> None:
    facts = machine()
    assert facts["threads"] >= 1
    assert facts["cpus"] >= 1
    assert facts["blas"]
    assert {"cpu", "threads", "python", "numpy", "scipy", "numba", "torch"} <= set(facts)
    assert startup.warmup() > 0
