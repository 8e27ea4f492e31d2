"""Studies on a cluster of Dask: the same rows, whatever happens to workers."""

from __future__ import annotations

import builtins
import os
import re
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

import sketchattn as sa
from sketchattn.base.draws import Draw
from sketchattn.cli.application import app
from sketchattn.operators.base import AttentionOperator
from sketchattn.problem import AttentionProblem
from sketchattn.studies import distributed as ours
from sketchattn.studies import journal as journal_module
from sketchattn.studies.progress import Progress

dask: Any = pytest.importorskip("distributed", reason="dask.distributed is not installed")

RANKS = [2, 4, 8]
HEADS = sa.make_heads("clustered", n=24, d=4, heads=3, rng=0)
# 3 heads x (uniform 3 x 3, svd and topk 3 each, zero, vmean, exact)
CELLS = 3 * 18


def cluster(workers: int = 2, **options: Any) -> Any:
    """Return a cluster of processes of this machine that nobody else can reach."""
    return dask.LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        **options,
    )


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with cluster() as made, dask.Client(made, set_as_default=False) as found:
        yield found


def run(folder: Path | None, **options: Any) -> sa.StudyResult:
    given: dict[str, Any] = {"methods": "uniform", "ranks": RANKS, "seeds": 3, "pictures": False}
    return sa.study(HEADS, out=folder, **(given | options))


def same_rows(a: sa.StudyResult, b: sa.StudyResult) -> bool:
    return all(
        x.drop(columns="seconds").equals(y.drop(columns="seconds"))
        for x, y in ((a.frame, b.frame), (a.references, b.references))
    )


def lines(folder: Path) -> int:
    return sum(f.read_bytes().count(b"\n") for f in (folder / "cells").glob("*.jsonl"))


def slow(seconds: float) -> sa.Method:
    """Return a uniform method that takes its time; workers get its class by value."""

    class Slow(sa.UniformColumns):
        def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
            time.sleep(seconds)
            return super()._approximate(problem, draw)

    return Slow(rank=1)


def when(condition: Callable[[], bool], act: Callable[[], object]) -> threading.Thread:
    """Return a thread, started, that does something as soon as a condition holds."""

    def watch() -> None:
        deadline = time.monotonic() + 600
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


# --- the same rows --------------------------------------------------------------------------------


def test_rows_are_those_of_a_local_study(client: Any) -> None:
    options: dict[str, Any] = {"methods": ["uniform", "jl", "skeinformer"], "seeds": 2}
    one = run(None, **options)
    assert same_rows(run(None, **options, dask=client), one)
    # The comparison sees other seeds.
    assert not same_rows(run(None, **options | {"seeds": [0, 2]}, dask=client), one)


def test_a_journal_serves_both(client: Any, tmp_path: Path) -> None:
    part = run(tmp_path, ranks=[2, 4], dask=client)
    assert (part.computed, part.reused) == (3 * 13, 0)
    whole = run(tmp_path)
    assert (whole.computed, whole.reused) == (CELLS - 3 * 13, 3 * 13)
    again = run(tmp_path, dask=client)
    assert (again.computed, again.reused) == (0, CELLS)
    pd.testing.assert_frame_equal(again.frame, whole.frame, check_exact=True)
    assert lines(tmp_path) == CELLS
    assert same_rows(whole, run(None))
    fresh = run(tmp_path, dask=client, resume=False)
    assert fresh.computed == lines(tmp_path) == CELLS


def test_one_head_is_shared_out(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workers: list[str] = []
    answer: Any = ours._Study._answer

    def note(self: Any, *args: Any) -> Any:
        found: ours.Answer = answer(self, *args)
        workers.append(found.worker)
        return found

    monkeypatch.setattr(ours._Study, "_answer", note)
    options: dict[str, Any] = {"methods": {"slow": slow(0.01)}, "ranks": [2, 4], "seeds": 2}
    one = sa.study(HEADS[0], **options)
    assert same_rows(sa.study(HEADS[0], **options, dask=client), one)
    assert len(workers) == len(set(workers)) == 2
    # What is left after some time is asked for in tasks of its own.
    monkeypatch.setattr(ours, "TASK_SECONDS", 1e-9)
    workers.clear()
    assert same_rows(sa.study(HEADS[0], **options, dask=client), one)
    assert len(workers) == 11  # slow 2 x 2, svd and topk 2 each, zero, vmean, exact: one a task


def test_an_address_will_do_and_the_bar_moves(
    client: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    result = run(tmp_path, dask=client.scheduler.address, progress=True)
    assert same_rows(result, run(None))
    assert f"{CELLS}/{CELLS}" in capsys.readouterr().err
    run(None, dask=client, progress=True)
    assert f"{CELLS}/{CELLS}" in capsys.readouterr().err


def test_the_command_line_takes_an_address(client: Any, tmp_path: Path) -> None:
    sa.write_heads(tmp_path / "three.npz", HEADS)
    done = CliRunner().invoke(
        app,
        [
            "study",
            "--heads",
            str(tmp_path / "three.npz"),
            "--methods",
            "uniform",
            "--ranks",
            "2,4,8",
        ]
        + ["--seeds", "3", "--no-pictures", "--out", str(tmp_path / "out")]
        + ["--dask", client.scheduler.address],
    )
    assert done.exit_code == 0, done.output
    assert lines(tmp_path / "out") == CELLS
    assert run(tmp_path / "out").reused == CELLS


def test_nothing_is_left_on_the_cluster(client: Any) -> None:
    run(None, dask=client)
    deadline = time.monotonic() + 60
    while any(client.has_what().values()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_worker_costs_only_its_cells(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "TASK_SECONDS", 0.2)
    options: dict[str, Any] = {"methods": {"slow": slow(0.03)}}
    pids = client.run(os.getpid)
    killed: list[int] = []

    def kill() -> None:
        killed.append(lines(tmp_path))
        os.kill(next(iter(pids.values())), signal.SIGKILL)

    thread = when(lambda: lines(tmp_path) > 0, kill)
    result = run(tmp_path, **options, dask=client)
    thread.join()
    assert 0 < killed[0] < CELLS
    assert result.computed == lines(tmp_path) == CELLS
    assert same_rows(result, run(None, **options))
    client.wait_for_workers(2)
    assert set(client.run(os.getpid).values()) != set(pids.values())


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_study_goes_on_with_others_where_every_worker_is_lost(tmp_path: Path) -> None:
    options: dict[str, Any] = {"methods": {"slow": slow(0.1)}}
    with cluster(1) as made, dask.Client(made, set_as_default=False) as found:
        pids = list(found.run(os.getpid).values())
        thread = when(lambda: lines(tmp_path) > 0, lambda: os.kill(pids[0], signal.SIGKILL))
        result = run(tmp_path, **options, dask=found)
        thread.join()
        assert list(found.run(os.getpid).values()) != pids
    assert result.computed == lines(tmp_path) == CELLS
    assert same_rows(result, run(None, **options))


def test_what_others_have_finished_is_kept_where_one_fails(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(sa.UniformColumns):
        def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
            if self.rank == 4 and problem.name == HEADS[0].name:
                raise ZeroDivisionError("no luck")
            return super()._approximate(problem, draw)

    # The study looks when all three heads have ended: the one that fails is the first.
    threads: Any = ours._Study.threads

    def late(self: Any) -> Any:
        deadline = time.monotonic() + 60
        while not self.unopened and any(f.status == "pending" for f in self.running):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return threads(self)

    monkeypatch.setattr(ours._Study, "threads", late)
    monkeypatch.setattr(ours, "TASK_SECONDS", 60.0)
    with pytest.raises(RuntimeError, match="no luck"):
        run(tmp_path, methods={"bad": Failing(rank=1)}, dask=client)
    whole = [f for f in (tmp_path / "cells").glob("*.jsonl") if f.read_bytes().count(b"\n") == 18]
    assert len(whole) == 2


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_workers_that_are_killed_all_the_time(tmp_path: Path) -> None:
    options: dict[str, Any] = {"methods": {"slow": slow(0.03), "jl": "jl"}, "seeds": 12}
    whole = run(None, **options)
    over = threading.Event()
    deaths = 0

    def kill(found: Any) -> None:
        nonlocal deaths
        while not over.wait(1.5):
            pids = list(found.run(os.getpid, on_error="ignore").values())
            if len(pids) > 1:
                os.kill(pids[deaths % len(pids)], signal.SIGKILL)
                deaths += 1

    with cluster(3) as made, dask.Client(made, set_as_default=False) as found:
        thread = threading.Thread(target=kill, args=(found,), daemon=True)
        thread.start()
        try:
            result = run(tmp_path, **options, dask=made.scheduler_address)
        finally:
            over.set()
            thread.join()
    assert deaths >= 2
    assert result.computed == lines(tmp_path)
    assert same_rows(result, whole)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_cell_that_ends_its_workers_is_named(tmp_path: Path) -> None:
    class Deadly(sa.UniformColumns):
        def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
            if self.rank == 4:
                time.sleep(1.0)  # a nanny restarts what has lived for a while
                os.kill(os.getpid(), signal.SIGKILL)
            return super()._approximate(problem, draw)

    # One worker: nothing else is computed, and lost, beside the cell that ends it.
    with cluster(1) as made, dask.Client(made, set_as_default=False) as found:
        made.scheduler.allowed_failures = 0
        message = (
            r"^workers of dask ended again and again with method 'deadly' on head "
            r"'clustered/head0', rank 4, seed 0 \(tcp://[0-9.:]+ was the last\); finished cells "
            r"are in the folder; give workers more memory, or look into their logs$"
        )
        with pytest.raises(RuntimeError, match=message):
            sa.study(
                HEADS[0],
                methods={"deadly": Deadly(rank=1)},
                ranks=RANKS,
                seeds=3,
                out=tmp_path,
                dask=found,
                pictures=False,
            )
    assert lines(tmp_path) == 9 + 3  # the references and rank 2


def test_a_failing_method_is_named_and_finished_cells_stay(client: Any, tmp_path: Path) -> None:
    class Failing(sa.UniformColumns):
        def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
            if self.rank == 4:
                raise ZeroDivisionError("no luck")
            return super()._approximate(problem, draw)

    # Which of the seeds is first depends on the parts that workers get.
    message = (
        r"^method 'bad' failed on head 'clustered/head0', rank 4, seed \d: "
        r"ZeroDivisionError: no luck$"
    )
    options: dict[str, Any] = {"methods": {"bad": Failing(rank=1)}, "ranks": RANKS, "seeds": 3}
    with pytest.raises(RuntimeError, match=message):
        sa.study(HEADS[0], **options)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message) as failed:
            sa.study(HEADS[0], **options, out=tmp_path, dask=client)
        assert "in _approximate" in str(failed.value.__cause__)
    # Rank 2 comes before, in the same part; the other part is finished, or not.
    assert 3 <= lines(tmp_path) <= 9 + 3 + 3


def test_an_interruption_leaves_the_journal_and_frees_the_cluster(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"methods": {"slow": slow(0.03)}}

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ours, "TASK_SECONDS", 0.1)
        patched.setattr(Progress, "returned", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, **options, dask=client)
    left = lines(tmp_path)
    assert 0 < left < CELLS
    deadline = time.monotonic() + 60
    while any(client.processing().values()) or any(client.has_what().values()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert lines(tmp_path) == left
    again = run(tmp_path, **options, dask=client)
    assert (again.computed, again.reused) == (CELLS - left, left)
    assert same_rows(again, run(None, **options))


def test_a_folder_that_is_taken_over_is_left_alone(client: Any, tmp_path: Path) -> None:
    lock = tmp_path / "cells" / ".lock"

    def take() -> None:
        journal_module.holder_of(lock).write_text(f"{'f' * 32} elsewhere 1\n")

    thread = when(journal_module.holder_of(lock).exists, take)
    with pytest.raises(RuntimeError, match=r"^study must hold its folder .* lock that is lost; "):
        run(tmp_path, methods={"slow": slow(0.03)}, dask=client)
    thread.join()
    assert lines(tmp_path) == 0
    # It belongs to the other study now.
    assert journal_module.holder_of(lock).read_text().startswith("ffff")


def test_two_studies_do_not_write_one_folder(client: Any, tmp_path: Path) -> None:
    refused: list[BaseException] = []

    def second() -> None:
        try:
            run(tmp_path)
        except ValueError as error:
            refused.append(error)

    thread = when(journal_module.holder_of(tmp_path / "cells" / ".lock").exists, second)
    result = run(tmp_path, methods={"slow": slow(0.05)}, dask=client)
    thread.join()
    assert "that no other study writes to" in str(refused[0])
    assert lines(tmp_path) == result.computed == CELLS


def test_clusters_without_workers_and_schedulers_that_end_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ours, "PATIENT_SECONDS", -1.0)
    with cluster(0) as made, dask.Client(made, set_as_default=False) as found:
        thread = when(
            lambda: any(x.status == "pending" for x in found.futures.values()), made.close
        )
        with (
            pytest.warns(RuntimeWarning, match=r"^dask has no workers yet; the study waits for"),
            pytest.warns(
                RuntimeWarning, match=r"^dask has had no workers for -1 seconds; the study"
            ),
            pytest.raises(RuntimeError, match=r"^dask has lost the work of this study"),
        ):
            run(None, dask=found)
        thread.join()


# --- workers that do not fit ----------------------------------------------------------------------


def test_other_versions_are_refused_before_any_work(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ours.versions()
    monkeypatch.setattr(ours, "versions", lambda: own | {"numpy": "0.1", "numba": "0.2"})
    message = (
        rf"^dask must have workers with the versions of this process, got numpy {own['numpy']}, "
        rf"numba {own['numba']} on tcp://127\.0\.0\.1:\d+ and numpy 0\.1, numba 0\.2 here; install "
        r"the same on all$"
    )
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", dask=client)
    assert not (tmp_path / "out").exists()
    # Those that come later are found out when they are asked to compute.
    monkeypatch.setattr(ours, "_check_workers", lambda _: None)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", dask=client)
    assert lines(tmp_path / "out") == 0


def answering(found: dict[str, Any]) -> Any:
    """Return what looks like a client whose workers answer so."""
    return types.SimpleNamespace(run=lambda *_, **__: found)


def test_workers_without_the_package_or_with_another_processor() -> None:
    missing = {"tcp://a:1": ModuleNotFoundError("No module named 'sketchattn'")}
    message = (
        f"dask must have workers that can import sketchattn {sa.__version__}, got "
        f"ModuleNotFoundError: No module named 'sketchattn' on tcp://a:1; install it on the "
        f"scheduler and on all workers"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ours._check_workers(answering(missing))
    own, blas = ours._worker()
    ours._check_workers(answering({"tcp://a:1": (own, blas)}))
    warning = (
        f"1 of 2 workers of dask have another BLAS or processor (other 1.0 (Zen) on tcp://b:1, "
        f"{', '.join(blas)} here): rows may differ from those of a local study in their last digits"
    )
    with pytest.warns(RuntimeWarning, match=f"^{re.escape(warning)}$"):
        ours._check_workers(
            answering({"tcp://a:1": (own, blas), "tcp://b:1": (own, ["other 1.0 (Zen)"])})
        )
    with pytest.warns(RuntimeWarning, match="^dask has no workers yet; the study waits for them$"):
        ours._check_workers(answering({}))


# --- what is refused ------------------------------------------------------------------------------


def test_what_is_no_cluster_is_refused(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for given in (3, True, ["tcp://127.0.0.1:1"], client.cluster):
        message = (
            f"dask must be a client of dask.distributed or the address of a scheduler, got "
            f"{type(given).__name__}; make one with dask.distributed.Client(...)"
        )
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            run(None, dask=given)
    with pytest.raises(ValueError, match=r"^dask must be the address of a scheduler, got ' '; "):
        run(None, dask=" ")
    closed = dask.Client(client.scheduler.address, set_as_default=False)
    closed.close()
    with pytest.raises(ValueError, match=r"not asynchronous, got one that is closed; make another"):
        run(None, dask=closed)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "http://127.0.0.1:1"])
def test_an_address_without_a_scheduler_is_refused(
    address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ours, "CONNECT_SECONDS", 0.5)
    message = (
        rf"^dask must be the address of a scheduler that answers, got '{re.escape(address)}' "
        r"\([^\n]+\); start one with: dask scheduler$"
    )
    with pytest.raises(OSError, match=message):
        run(tmp_path / "out", dask=address)
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def refuse(name: str, *args: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "distributed" and not args[3:4] == (1,):
            raise ModuleNotFoundError("No module named 'distributed'")
        return plain(name, *args, **options)

    monkeypatch.delitem(sys.modules, "distributed")
    monkeypatch.setattr(builtins, "__import__", refuse)
    message = (
        "dask needs the package dask.distributed, which cannot be imported (No module named "
        "'distributed'); run: python -m pip install 'sketchattn[dask]'"
    )
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        run(None, dask="127.0.0.1:8786")
