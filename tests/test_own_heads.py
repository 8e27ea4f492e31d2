"""Heads as people have them: projections, files, folders, batches, and heads of several lengths."""

from __future__ import annotations

import io
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

import sketchattn as sa
from sketchattn.cli import main, parse_heads
from sketchattn.heads import files
from sketchattn.heads.inputs import as_heads
from sketchattn.heads.stored import StoredProblem
from sketchattn.problem import AttentionProblem

Array = NDArray[Any]


def numbers(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def layer(path: Path, n: int = 6, heads: int = 2, seed: int = 0, **options: Any) -> sa.Heads:
    """Write a file of heads of its own length, whose names are those of any other file."""
    names = [f"head{i}" for i in range(heads)]
    made = sa.Heads(
        *(numbers(heads, n, 4, seed=seed + i) for i in range(3)), names=names, **options
    )
    sa.write_heads(path, made)
    return made


def refused(call: Callable[[], object], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(text)}$"):
        call()


# --- projections --------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [False, True])
def test_projections_are_split_as_a_model_splits_them(batched: bool) -> None:
    q, k, v = numbers(2, 5, 12), numbers(2, 7, 6, seed=1), numbers(2, 7, 4, seed=2)
    mask = np.arange(7) < np.array([[6], [7]])
    x, y, z = (q, k, v) if batched else (q[0], k[0], v[0])
    heads = sa.Heads.from_projections(
        x, y, z, num_heads=4, key_mask=mask if batched else mask[0], scale=0.5, causal="top-left"
    )
    count = 2 if batched else 1
    assert (len(heads), heads.n_q, heads.n_k, heads.d, heads.d_v) == (4 * count, 5, 7, 3, 2)
    assert (heads.scale, heads.causal) == (0.5, "top-left")
    assert heads.names[-1] == ("batch1.head3" if batched else "head3")
    for b in range(count):
        for h in range(4):
            problem, shared = heads[4 * b + h], h // 2  # two query heads to each key head
            assert np.array_equal(problem.q, q[b][:, 3 * h : 3 * h + 3])
            assert np.array_equal(problem.k[mask[b]], k[b][mask[b], 3 * shared : 3 * shared + 3])
            assert np.array_equal(
                problem.values[mask[b]], v[b][mask[b], 2 * shared : 2 * shared + 2]
            )
            assert problem.key_mask is not None
            assert np.array_equal(problem.key_mask, mask[b])


X = np.ones((1, 300, 384), np.float32)


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (
            lambda: sa.Heads.from_projections(X, X, X, 7),
            ValueError,
            "q must have columns for each of num_heads = 7 heads, got 384, which 7 does not "
            "divide; correct num_heads",
        ),
        (
            lambda: sa.Heads.from_projections(X, X[..., :48], X[..., :48], 12),
            ValueError,
            "k must have as many columns as 1 to 12 heads of width 32 do, got 48; correct "
            "num_heads or pass num_kv_heads",
        ),
        (
            lambda: sa.Heads.from_projections(X, X, X, 12, 5),
            ValueError,
            "num_kv_heads must divide num_heads = 12, got 5; each key head serves as many query "
            "heads as the next",
        ),
        (
            lambda: sa.Heads.from_projections(X[0, 0], X, X, 12),
            ValueError,
            "q must have the shape (n, heads * width) or (batch, n, heads * width), got (384,); "
            "heads that are apart already go into Heads(q, k, v)",
        ),
        (
            lambda: sa.Heads.from_projections(X, X[0], X, 12),
            ValueError,
            "k must have the batch of q, got shapes (1, 300, 384) and (300, 384); pass all three "
            "with the same batch",
        ),
        (
            lambda: sa.Heads.from_projections(X, X, X, 0),
            ValueError,
            "num_heads must be at least 1, got 0; give the number of query heads",
        ),
    ],
)
def test_projections_that_do_not_fit(
    call: Callable[[], object], kind: type[Exception], text: str
) -> None:
    refused(call, kind, text)


def test_a_wide_head_without_a_name_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, q=X, k=X, v=X)
    with pytest.warns(RuntimeWarning, match="1 head of width 384; if it is the projections"):
        heads = sa.read_heads(path)
    assert (len(heads), heads.d) == (1, 384)
    np.savez(path, q=X, k=X, v=X, heads='["one"]')  # the file says what it is
    assert sa.read_heads(path).names == ("one",)
    narrow = X[..., :256]
    np.savez(path, q=narrow, k=narrow, v=narrow)
    assert sa.read_heads(path).d == 256


# --- other settings -----------------------------------------------------------------------------


def test_settings_are_replaced() -> None:
    heads = sa.Heads(*(numbers(2, 5, 4, seed=i) for i in range(3)), scale=3.0)
    changed = heads.replace(causal=True, scale=None, names=["a", "b"], description="d")
    assert (changed.causal, changed.scale, changed.names, changed.description) == (
        True, 0.5, ("a", "b"), "d",
    )  # fmt: skip
    assert changed.q is heads.q
    assert np.array_equal(changed[0].output, AttentionProblem(*heads[0].arrays, causal=True).output)
    assert (heads.causal, heads.scale) == (False, 3.0)
    mask = np.arange(5) < 3
    masked = heads.replace(key_mask=mask)
    assert masked.key_mask is not None
    assert masked.replace(key_mask=None).key_mask is None
    q, k, v = (np.array(x) for x in (heads.q, heads.k, heads.v))
    k[:, 4] = np.nan
    refused(
        lambda: sa.Heads(q, k, v, key_mask=mask).replace(key_mask=None),
        ValueError,
        "k must be finite, got nan at index (0, 4, 0); replace it, or hide its key with a mask",
    )
    refused(
        lambda: heads.replace(casual=True),
        TypeError,
        "replace must be given settings of heads, got 'casual'; did you mean 'causal'?",
    )
    refused(
        lambda: heads.replace(q=q),
        TypeError,
        "replace must be given settings, got the array 'q'; make other Heads",
    )


# --- several files ------------------------------------------------------------------------------


@pytest.fixture
def layers(tmp_path: Path) -> Path:
    folder = tmp_path / "layers"
    folder.mkdir()
    layer(folder / "layer2.npz", n=6)
    layer(folder / "layer10.safetensors", n=9, seed=5, causal=True)
    (folder / "notes.txt").write_text("no heads")
    (folder / ".new-half").write_text("a file that is being written")
    return folder


NAMES = ("layer2/head0", "layer2/head1", "layer10/head0", "layer10/head1")


def test_a_folder_a_pattern_and_a_list_are_the_same_heads(
    layers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two, ten = layers / "layer2.npz", layers / "layer10.safetensors"
    every: list[Any] = [
        layers, str(layers), layers / "layer*", [two, ten], [str(two), two, layers]
    ]  # fmt: skip
    for given in every:
        heads = sa.read_heads(given)
        assert heads.names == NAMES
        assert [p.n_k for p in heads] == [6, 6, 9, 9]
        assert [p.causal for p in heads] == [False, False, True, True]
        assert heads["layer10/head1"].digest == sa.read_heads(ten)[1].digest
    monkeypatch.chdir(layers.parent)
    for text in ("layers", "layers/*", "**/layer*", str(layers)):
        assert parse_heads(text).names == NAMES
        assert [p.name for p in as_heads(text)] == list(NAMES)
    assert parse_heads(["layers/layer10.safetensors", "layers/layer2.npz"]).names[0] == NAMES[2]
    assert [p.name for p in as_heads([str(two), str(ten)])] == list(NAMES)
    mixed = parse_heads(["layers/layer2.npz", "minilm", "peaked:n=8,d=4"])
    assert (len(mixed), mixed.names[0], mixed.names[-1]) == (15, "head0", "peaked/head0")


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        layer(tmp_path / name / "x.npz", heads=1, seed=ord(name))
    assert sa.read_heads(tmp_path / "*" / "x.npz").names == ("a/x/head0", "b/x/head0")


def test_heads_of_several_lengths_are_heads(layers: Path) -> None:
    heads = sa.read_heads(layers)
    assert isinstance(heads, sa.Heads)
    assert heads[1:3].names == NAMES[1:3]
    assert heads[["layer10/head0"]].n_k == 9
    inside: list[object] = ["layer2/head0"]
    assert all(x in heads for x in inside)
    assert (heads.d, heads.scale) == (4, 0.5)
    assert "n_k=6 or 9" in repr(heads)
    assert [p.digest for p in pickle.loads(pickle.dumps(heads))] == [p.digest for p in heads]
    refused(
        lambda: heads.n_k,
        ValueError,
        "heads must share n_k for this, got 6 in 'layer2/head0' and 9 in 'layer10/head0'; ask each "
        "head, heads[i].n_k",
    )
    with pytest.raises(ValueError, match="heads must share n_q for this"):
        _ = heads.q
    assert heads[:2].q.shape == (2, 6, 4)
    assert [p.causal for p in heads.replace(causal=True, scale=2.0)] == [True] * 4
    assert heads.replace(scale=2.0)[3].scale == 2.0


def test_a_study_takes_heads_of_several_lengths(layers: Path) -> None:
    result = sa.study(layers, "uniform", [0.5, 1.0], seeds=1, floors=False)
    ranks = result.frame.groupby("head", sort=False)["rank"].apply(list).to_dict()
    assert ranks == {NAMES[0]: [3, 6], NAMES[1]: [3, 6], NAMES[2]: [5, 9], NAMES[3]: [5, 9]}
    again = sa.study(list(sa.read_heads(layers)), "uniform", [0.5, 1.0], seeds=1, floors=False)
    assert again.frame.drop(columns="seconds").equals(result.frame.drop(columns="seconds"))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("nothing*.npz", "path must match a .safetensors or .npz file, got the pattern "
         "'nothing*.npz', which matches none; check its folder and name"),
        ("empty", "path must be a folder with .safetensors or .npz files, got 'empty', which holds "
         "none; check its name"),
        ("gone.npz", "path must be an existing file, got 'gone.npz'; check its folder and name"),
    ],
)  # fmt: skip
def test_what_is_not_there(
    given: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    refused(lambda: sa.read_heads(given), ValueError, text)
    refused(lambda: parse_heads(given), ValueError, text)


def test_no_file_at_all() -> None:
    refused(
        lambda: sa.read_heads([]),
        ValueError,
        "path must name at least one file, got an empty list; give some",
    )


# --- a batch in a file --------------------------------------------------------------------------


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_a_batch_is_flattened_and_named(
    tmp_path: Path, suffix: str, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(files, "WHOLE_BYTES", 0)
    q, k, v = (numbers(2, 3, 5, 4, seed=i) for i in range(3))
    mask = np.arange(5) < np.array([[4], [5]])
    path = tmp_path / f"x{suffix}"
    stored = {"q": q, "k": k, "v": v, "key_mask": mask}
    if suffix == ".npz":
        np.savez(path, heads='[{"layer": 3}, "own", 2]', **stored)  # type: ignore[arg-type]
    else:
        save_file(stored, path, metadata={"heads": '[{"layer": 3}, "own", 2]'})
    heads = sa.read_heads(path)
    assert heads.names == (
        "x/batch0.layer3", "own/batch0", "x/batch0.head2",
        "x/batch1.layer3", "own/batch1", "x/batch1.head2",
    )  # fmt: skip
    for i, problem in enumerate(heads):
        assert np.array_equal(problem.q, q[i // 3, i % 3])
        assert problem.key_mask is not None
        assert np.array_equal(problem.key_mask, mask[i // 3])
    save_file({"q": q, "k": k, "v": v}, tmp_path / "y.safetensors")
    assert sa.read_heads(tmp_path / "y.safetensors").names[4] == "y/batch1.head1"
    save_file({"q": q, "k": k[:, :1].copy(), "v": v}, tmp_path / "z.safetensors")
    refused(
        lambda: sa.read_heads(tmp_path / "z.safetensors"),
        ValueError,
        "z.safetensors: k must have the batch and the heads of q, (2, 3), got (2, 1); repeat "
        "shared keys and values for each head",
    )


# --- files that stay where they are -------------------------------------------------------------


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read every file a head at a time, however small."""
    monkeypatch.setattr(files, "WHOLE_BYTES", 0)


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize("kind", ["f16", "f32", "f64", "bf16", "npz", "packed", "fortran"])
def test_stored_heads_are_the_heads(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = {"f16": np.float16, "f64": np.float64, "bf16": ml_dtypes.bfloat16}.get(kind, np.float32)
    arrays = {x: numbers(3, 5 + (x != "q"), 4, seed=i, dtype=dtype) for i, x in enumerate("qkv")}
    arrays["key_mask"] = np.arange(18).reshape(3, 6) % 4 > 0
    path = tmp_path / ("x.npz" if kind in ("npz", "packed", "fortran") else "x.safetensors")
    options = {"causal": "bottom-right", "scale": "2.0", "model": "m"}
    if kind == "fortran":
        arrays = {name: np.asfortranarray(x) for name, x in arrays.items()}
    if kind == "packed":
        np.savez_compressed(path, **arrays, **options)  # type: ignore[arg-type]
    elif path.suffix == ".npz":
        np.savez(path, **arrays, **options)  # type: ignore[arg-type]
    else:
        save_file(arrays, path, metadata=options)
    lazy = sa.read_heads(path)
    monkeypatch.setattr(files, "WHOLE_BYTES", 1 << 26)
    eager = sa.read_heads(path)
    assert isinstance(as_heads(lazy, stored=True)[0], StoredProblem)
    assert not isinstance(as_heads(eager, stored=True)[0], StoredProblem)
    assert (lazy.names, lazy.metadata) == (eager.names, eager.metadata)
    for stays, whole in zip(as_heads(lazy, stored=True), eager, strict=True):
        assert repr(stays).replace("Stored", "Attention") == repr(whole)
        assert stays.digest == whole.digest
        assert pickle.loads(pickle.dumps(stays)).digest == whole.digest
    assert [p.digest for p in lazy] == [p.digest for p in eager]
    assert not isinstance(lazy[0], StoredProblem)
    assert lazy.q.tobytes() == np.stack([p.q for p in eager]).tobytes()


@pytest.mark.usefixtures("stored")
def test_a_study_of_stored_heads_is_that_of_heads_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    made = layer(path, n=16)
    lazy = sa.study(path, "uniform", [4], seeds=1)
    eager = sa.study(made, "uniform", [4], seeds=1)
    assert lazy.frame.drop(columns="seconds").equals(eager.frame.drop(columns="seconds"))
    assert lazy.references.drop(columns="seconds").equals(eager.references.drop(columns="seconds"))


@pytest.mark.usefixtures("stored")
def test_a_file_that_changes_is_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    layer(path)
    heads = sa.read_heads(path)
    layer(path, n=7)
    with pytest.raises(ValueError, match="must not change while it is used"):
        _ = heads[0]
    path.unlink()
    with pytest.raises(ValueError, match="must be there while it is used"):
        _ = heads[0]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def not_finite(path: Path) -> None:
    x = numbers(2, 5, 4)
    x[1, 2, 3] = np.nan
    if path.suffix == ".npz":
        np.savez(path, q=x, k=x, v=x)
    else:
        save_file({"q": x, "k": x, "v": x}, path)


def larger_header(path: Path) -> None:
    """Claim ten times the numbers that are there."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<f4", "fortran_order": False, "shape": (20, 5, 4)}
    )
    with zipfile.ZipFile(path, "w") as archive:
        for name in "qkv":
            archive.writestr(f"{name}.npy", buffer.getvalue() + bytes(4 * 2 * 5 * 4))


def objects(path: Path) -> None:
    np.savez(path, q=np.array([[[{}]]]), k=np.zeros((1, 1, 1)), v=np.zeros((1, 1, 1)))


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize(
    ("suffix", "damage", "text"),
    [
        (".safetensors", cut, "the file must be a whole .safetensors file"),
        (".npz", cut, "the file must be a whole .npz file"),
        (".npz", objects, "Object arrays cannot be loaded"),
        (".safetensors", not_finite, "head 'x/head1': q must be finite, got nan at index (2, 3)"),
        (".npz", not_finite, "head 'x/head1': q must be finite, got nan at index (2, 3)"),
        (".npz", larger_header, "q must be whole in its file, got 0 of 80 bytes"),
    ],
)
def test_damaged_files_are_refused_in_one_line(
    tmp_path: Path, suffix: str, damage: Callable[[Path], None], text: str
) -> None:
    path = tmp_path / f"x{suffix}"
    layer(path)
    damage(path)
    with pytest.raises(ValueError, match=re.escape(text)) as found:
        list(sa.read_heads(path))
    assert "\n" not in str(found.value)
    assert "x" in str(found.value).split(":")[0]


PEAK = """
import resource, sys
import sketchattn as sa
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
heads = sa.read_heads(sys.argv[1])
before = peak()
sums = [float(heads[i].values[0, 0]) for i in range(len(heads))]
print(len(sums), peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is counted otherwise")
@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_a_large_file_is_never_in_memory_whole(tmp_path: Path, suffix: str) -> None:
    count, n, d = 12, 16384, 64  # a head is 12.6 MB, the file 151 MB
    path = tmp_path / f"x{suffix}"
    x = np.zeros((count, n, d), np.float32)
    if suffix == ".npz":
        np.savez(path, q=x, k=x, v=x)
    else:
        save_file({"q": x, "k": x, "v": x}, path)
    paths = os.pathsep.join([str(Path(sa.__file__).parents[1]), *sys.path])
    found = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.returncode == 0, found.stderr
    heads, more = map(int, found.stdout.split())
    assert heads == count
    # One head is read, copied, and checked: four times its size is ample, a third of the file.
    assert more < 4 * 3 * n * d * 4


# --- what is measured of many heads -------------------------------------------------------------


def test_certificates_and_reports_of_heads_are_frames(layers: Path) -> None:
    heads = sa.load_heads("minilm")[:2]
    outputs = np.stack([1.25 * p.output for p in heads])
    frame = sa.certify(heads, outputs, rows=32)
    wanted = [sa.certify(p, o, rows=32) for p, o in zip(heads, outputs, strict=True)]
    assert frame["head"].tolist() == list(heads.names)
    for i, certificate in enumerate(wanted):
        row = frame.iloc[i]
        assert {x: row[x] for x in certificate.as_dict()} == certificate.as_dict()
        assert row["width"] == certificate.width
    table = sa.error_report(heads, output=outputs)
    assert list(table.columns[:2]) == ["head", "output_fro_rel"]
    assert table["output_fro_rel"].tolist() == pytest.approx([0.25, 0.25], rel=1e-6)
    several = sa.read_heads(layers)
    ahats = [sa.Zero().approximate(p) for p in several]
    assert sa.error_report(several, ahats)["matrix_fro_rel"].tolist() == [1.0] * 4
    found = sa.certify(layers, [2.0 * p.output for p in several], rows=4)
    assert (found["low"] <= 1.0 + 1e-6).all()
    assert found["head"].tolist() == list(NAMES)
    refused(
        lambda: sa.certify(heads, outputs[0]),
        ValueError,
        "output must have shape (heads, n_q, d_v) for heads, got (512, 32); pass one array for "
        "each head",
    )
    refused(
        lambda: sa.certify(heads, outputs[:1]),
        ValueError,
        "output must have one entry for each of the 2 heads, got 1; pass those of all heads in "
        "their order",
    )
    with pytest.raises(ValueError, match="^head 'minilm/layer0.head0': output must be finite"):
        sa.certify(heads, np.full_like(outputs, np.nan))


# --- the command line ---------------------------------------------------------------------------


def say(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(x) for x in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_heads_are_positional_and_an_option(
    layers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--methods", "uniform", "--ranks", "0.5", "--seeds", 1, "--jobs", 1)
    rest = (*options, "--no-pictures", "--no-floors", "--out", tmp_path / "o")
    two, ten = layers / "layer2.npz", layers / "layer10.safetensors"
    said = say(capsys, "study", two, ten, *rest)
    assert (said[0], said[2]) == (0, "")
    assert said[1].startswith("4 heads, 1 method")
    again = say(capsys, "study", "--heads", layers, *rest, "--json")
    assert (again[0], '"computed": 0' in again[1]) == (0, True)
    for verb in ("study", "validate"):
        code, _, error = say(capsys, verb, two, "--heads", ten)
        assert code == 2
        assert error == (
            f"sketchattn: heads must be given once, got '{two}' and --heads '{ten}'; leave "
            f"--heads out\n"
        )


def test_certify_takes_heads_of_several_shapes(
    layers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = sa.read_heads(layers)
    path = tmp_path / "out.npz"
    np.savez(path, **{str(p.name): p.output for p in heads})  # type: ignore[arg-type]
    code, out, _ = say(capsys, "certify", layers, path, "--rows", 3)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(NAMES)
    one = tmp_path / "one.npy"
    np.save(one, heads[3].output)
    assert say(capsys, "certify", layers, one, "--head", 3)[0] == 0
    code, _, error = say(capsys, "certify", layers, one)
    assert (code, "--head NAME" in error) == (2, True)


def test_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(sa.__file__).parents[1] / "docs" / "heads.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    assert blocks[0].count("\n") <= 15
    exec(compile(blocks[0], "heads.md", "exec"), {})
    assert "batch0.head11" in capsys.readouterr().out
