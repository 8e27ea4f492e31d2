"""Journals of studies: nothing that was finished is lost or changed, whenever a study is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import sketchattn as sa
from sketchattn.base.files import append_bytes
from sketchattn.studies import grid, measure
from sketchattn.studies import journal as journal_module

HEADS = sa.make_heads("clustered", n=48, d=4, heads=3, rng=0)


# A whole study first, then one that is killed again and again: in children that find everything
# loaded, so that they are killed while they read, write and compute, not while they load.
SCRIPT = """
import json, os, random, signal, sys, time
from pathlib import Path
import sketchattn as sa

def run(folder):
    heads = sa.make_heads("clustered", n=48, d=4, heads=3, rng=0)
    methods = ["uniform", "column_sampling"]
    return sa.study(heads, methods, seeds=24, out=folder, pictures=False, progress=False)

def journals(folder):
    return {path.name: path.read_bytes() for path in (folder / "cells").glob("*.jsonl")}

def count(folder):
    return sum(x.count(b"\\n") for x in journals(folder).values())

def killed(folder, wanted, seconds):
    child = os.fork()
    if child == 0:
        run(folder)
        os._exit(0)
    deadline = time.monotonic() + 600
    while count(folder) < wanted and time.monotonic() < deadline:
        time.sleep(0.0005)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

whole, folder = Path("whole"), Path("killed")
total, rng, kept, finished = run(whole).computed, random.Random(int(sys.argv[1])), {}, []
for kill in range(20):
    # At any moment: of a cell, after some of what is left, or before the study has begun.
    share = min(1.0, 2 * rng.random() / (20 - kill))
    before = count(folder)
    wanted = before + int(share * max(0, 0.9 * total - before))
    assert killed(folder, wanted, 0.02 * rng.random()) == -signal.SIGKILL
    assert not (folder / "results.csv").exists()
    found = journals(folder)
    for name, lines in kept.items():  # what was whole is there, byte for byte
        assert found[name].startswith(lines[: lines.rfind(b"\\n") + 1]), (kill, name)
    kept = found
    finished.append(count(folder))
last = run(folder)
print(json.dumps([total, finished, last.computed, last.reused, count(folder)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_study_that_is_killed_twenty_times_loses_nothing(
    tmp_path: Path, global_random_seed: int
) -> None:
    root = str(Path(sa.__file__).parents[1])
    paths = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(global_random_seed)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    total, finished, computed, reused, written = json.loads(done.stdout)
    assert total == written == computed + reused
    assert reused == finished[-1] < total
    assert finished == sorted(finished)
    assert len(set(finished)) > 10  # it was killed at many moments
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for name in ("results.csv", "references.csv"):
        one, other = (pd.read_csv(x / name).drop(columns="seconds") for x in (whole, killed))
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    names = [sorted(p.name for p in (x / "cells").iterdir()) for x in (whole, killed)]
    assert names[0] == names[1]


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
