"""Journals of studies: nothing that was finished is lost or changed, whenever a study is killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import sketchattn as sa
from sketchattn.base.files import append_bytes
from sketchattn.studies import grid, measure
from sketchattn.studies import journal as journal_module

HEADS = sa.make_heads("clustered", n=48, d=4, heads=3, rng=0)
KILLS = 20


def journals(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "cells").glob("*.jsonl")}


def command(heads: Path, folder: Path, jobs: int) -> list[str]:
    options = ["--heads", str(heads), "--methods", "uniform,jl,column_sampling", "--seeds", "24"]
    options += ["--jobs", str(jobs), "--no-pictures", "--out", str(folder)]
    return [sys.executable, "-m", "sketchattn", "study", *options]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_study_that_is_killed_twenty_times_loses_nothing(
    tmp_path: Path, jobs: int, global_random_seed: int
) -> None:
    heads, folder, whole = tmp_path / "three.npz", tmp_path / "killed", tmp_path / "whole"
    sa.write_heads(heads, HEADS)
    root = str(Path(sa.__file__).parents[1])
    paths = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    options: dict[str, Any] = {"env": os.environ | {"PYTHONPATH": paths}, "cwd": tmp_path}
    subprocess.run(
        command(heads, whole, jobs), check=True, stdout=subprocess.DEVNULL, timeout=600, **options
    )
    total = sum(x.count(b"\n") for x in journals(whole).values())
    rng = random.Random(global_random_seed)
    kept: dict[str, bytes] = {}
    for kill in range(KILLS):
        process = subprocess.Popen(command(heads, folder, jobs), **options)
        # At any moment of a cell: some time after a part of what is left has been finished, and
        # at times before the study has begun.
        before = sum(x.count(b"\n") for x in journals(folder).values())
        share = 2 * rng.random() / (KILLS - kill)
        wanted = before + int(min(1.0, share) * max(0, 0.9 * total - before))
        deadline = time.monotonic() + 600
        while sum(x.count(b"\n") for x in journals(folder).values()) < wanted:
            assert process.poll() is None, "the study ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(0.02 * rng.random())
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (folder / "results.csv").exists()
        if jobs > 1:
            time.sleep(1.0)  # workers notice that they have lost their parent
        found = journals(folder)
        for name, lines in kept.items():  # what was whole is there, byte for byte
            assert found[name].startswith(lines[: lines.rfind(b"\n") + 1])
        kept = found
    subprocess.run(
        command(heads, folder, jobs), check=True, stdout=subprocess.DEVNULL, timeout=600, **options
    )
    found = journals(folder)
    assert sum(x.count(b"\n") for x in found.values()) == total
    for name, lines in kept.items():
        assert found[name].startswith(lines[: lines.rfind(b"\n") + 1])
    for name in ("results.csv", "references.csv"):
        one, other = (pd.read_csv(x / name).drop(columns="seconds") for x in (whole, folder))
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    assert sorted(p.name for p in (folder / "cells").iterdir()) == sorted(
        p.name for p in (whole / "cells").iterdir()
    )


def one_task(folder: Path, token: str, seeds: int = 3) -> measure.HeadTask:
    problem = HEADS[0]
    variant = grid.Variant.of("uniform", sa.UniformColumns(rank=2))
    cells = grid.make_cells([variant], [2], list(range(seeds)))
    lock = folder / "cells" / ".lock"
    return measure.HeadTask(problem, cells, folder / "cells" / "one.jsonl", lock, token, 1)


def test_a_power_cut_costs_the_cells_of_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    (tmp_path / "cells").mkdir()
    lock = tmp_path / "cells" / ".lock"
    with journal_module.lock_folder(lock, tmp_path) as token:
        monkeypatch.setattr(measure, "SYNC_SECONDS", 600.0)
        measure.run_head(one_task(tmp_path, token))
        assert synced == []
        monkeypatch.setattr(measure, "SYNC_SECONDS", -1.0)
        task = one_task(tmp_path, token)
        measure.run_head(task)
    lines = task.journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 6
    assert synced == [sum(map(len, lines[: i + 1])) for i in range(3, 6)]
    # What is not on the disk after a power cut may be zeros: those lines are dropped.
    task.journal.write_bytes(b"".join(lines[:2]) + b"\0" * 300)
    found = journal_module.read_journal(task.journal, task.problem.digest)
    assert len(found) == 2
    assert task.journal.read_bytes() == b"".join(lines[:2])


def test_a_worker_that_outlives_its_study_does_not_write_what_it_was_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cells").mkdir()
    lock = tmp_path / "cells" / ".lock"
    plain = measure.measure

    def taken_over(*args: Any, **options: Any) -> Any:
        values = plain(*args, **options)
        journal_module.holder_of(lock).write_text(f"{'f' * 32} elsewhere 1\n")
        return values

    monkeypatch.setattr(measure, "measure", taken_over)
    with journal_module.lock_folder(lock, tmp_path) as token:
        task = one_task(tmp_path, token)
        with pytest.raises(RuntimeError, match="got a lock that is lost"):
            measure.run_head(task)
    assert not task.journal.exists()
    # Nor does the first take the name of the second away when it ends.
    assert journal_module.holder_of(lock).read_text().startswith("ffff")


def test_what_a_killed_study_had_half_written_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / ".new-abcdefgh").write_bytes(b"half")
    (tmp_path / ".new-mine").write_bytes(b"of somebody else")
    sa.study(HEADS[0], "uniform", ranks=[2], seeds=1, out=tmp_path, pictures=False)
    assert list((tmp_path / "cells").glob(".new-*")) == []
    assert (tmp_path / ".new-mine").exists()


def test_appending_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append_bytes(path, b"one\n", sync=True)
    append_bytes(path, b"two\n")
    assert path.read_bytes() == b"one\ntwo\n"
