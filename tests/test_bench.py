"""Benchmarks: every one runs on small sizes, and what they print is what they measured."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from itertools import groupby

import numpy as np
import pytest
from naive import naive_attention
from peer_packages import peer

from sketchattn.base.machine import machine
from sketchattn.bench import harness, peers, runner, startup


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
        "peers",
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
