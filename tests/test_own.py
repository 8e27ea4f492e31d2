"""What users bring: methods of their own, plain functions, and draws that are kept."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.sparse.linalg import aslinearoperator

import sketchattn as sa
from sketchattn.base.content import UnreadableError, function_content
from sketchattn.base.draws import Origin
from sketchattn.cli import main

Array = NDArray[Any]


def head(seed: int = 0, n: int = 32, **options: Any) -> sa.AttentionProblem:
    made = sa.make_heads("gaussian", n=n, d=8, rng=seed)[0]
    return sa.AttentionProblem(made.q, made.k, made.v, **options)


class Few(sa.Method):
    """Softmax over keys that are drawn uniformly, as an array."""

    traits = sa.Traits(row_stochastic=True, nonnegative=True)
    draw_names = ("keys",)

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def _draw(self, problem: sa.AttentionProblem, rng: np.random.Generator) -> Mapping[str, Array]:
        return {"keys": rng.choice(problem.kept_keys, self.rank, replace=False)}

    def _approximate(self, problem: sa.AttentionProblem, draw: sa.Draw) -> Array:
        ahat = np.zeros((problem.n_q, problem.n_k))
        ahat[:, draw["keys"]] = problem.exact.columns(draw["keys"])
        return np.asarray(ahat / ahat.sum(axis=1, keepdims=True))


class Output(sa.Method):
    """A method without a matrix."""

    traits = sa.Traits(matrix=False, randomized=False, uses_rank=False)

    def _attend(self, problem: sa.AttentionProblem, draw: sa.Draw) -> Array:
        return np.asarray(np.tanh(problem.values))


# --- methods ------------------------------------------------------------------------------------


def test_an_array_is_an_approximation() -> None:
    problem = head()
    ahat = Few(4).approximate(problem, 0)
    assert ahat.shape == (32, 32)
    assert ahat.effective_rank is None
    assert np.allclose(ahat.row_sums(), 1)
    assert np.allclose(Few(4).attend(problem, 0), ahat @ problem.values, atol=1e-6)
    assert Few(4).attend(problem, 0).dtype == problem.dtype
    assert np.allclose(sa.attention(problem.q, problem.k, problem.v, Few, rank=4, rng=0),
                       sa.UniformColumns(4).attend(problem, draw={"columns": np.sort(
                           Few(4).draw(problem, 0)["keys"])}), atol=1e-6)  # fmt: skip


def test_a_method_without_a_matrix_attends_and_is_studied() -> None:
    problem = head()
    wanted = np.tanh(problem.values)
    assert np.array_equal(Output().attend(problem), wanted)
    q, k, v = (np.stack([x, x]) for x in (problem.q, problem.k, problem.values))
    out = sa.attention(q, k, v, Output())
    assert np.array_equal(out, np.stack([wanted, wanted]))
    with pytest.raises(ValueError, match="gives outputs only; use attend"):
        Output().approximate(problem)
    frame = sa.study(problem, [Output, Few], ranks=[4], seeds=2).frame
    rows = frame[frame.method == "output"]
    report = sa.error_report(problem, output=wanted)
    assert (rows.output_fro_rel == report.output_fro_rel).all()
    assert rows.matrix_fro_rel.isna().all()


def test_what_a_hook_gives_back_is_looked_at() -> None:
    class Wrong(Output):
        def _attend(self, problem: sa.AttentionProblem, draw: sa.Draw) -> Array:
            return np.zeros((3, 3))

    class Unnamed(Few):
        draw_names: tuple[str, ...] = ()  # type: ignore[assignment]  # narrower in Few

    class Neither(sa.Method):
        traits = sa.Traits(randomized=False, uses_rank=False)

    class Misshapen(Few):
        def _approximate(self, problem: sa.AttentionProblem, draw: sa.Draw) -> Array:
            return np.zeros((2, 2))

    for method, kind, words in (
        (Wrong(), ValueError, "output of Wrong must have shape"),
        (Unnamed(4), TypeError, "draw_names of Unnamed must name what its _draw returns"),
        (Neither(), TypeError, "Neither must define _approximate, or _attend"),
        (Misshapen(4), ValueError, "ahat must have the shape"),
    ):
        with pytest.raises(kind, match=words):
            method.attend(head(), None)


def test_classes_and_their_names_stand_for_methods() -> None:
    problem = head()
    wanted = sa.Skeinformer(4).attend(problem, 0)
    for given in ("skeinformer", "Skeinformer", sa.Skeinformer):
        out = sa.attention(problem.q, problem.k, problem.v, given, rank=4, rng=0)
        assert np.array_equal(out, wanted)
    frames = [sa.study(problem, [x], [4], 1).frame for x in ("Skeinformer", sa.Skeinformer)]
    assert frames[0].drop(columns="seconds").equals(frames[1].drop(columns="seconds"))
    assert sa.attention(problem.q, problem.k, problem.v, sa.Exact).shape == (32, 8)
    with pytest.raises(TypeError, match="got the class dict"):
        sa.attention(problem.q, problem.k, problem.v, dict)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rank must be given"):
        sa.attention(problem.q, problem.k, problem.v, sa.Skeinformer)


def test_parameters_stand_in_brackets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problem = head()
    text = "skeinformer(normalizer=exact, mix=0.5)"
    found = sa.study(problem, [text, "uniform"], [4], 1).frame
    wanted = sa.study(problem, {text: sa.Skeinformer(4, normalizer="exact", mix=0.5)}, [4], 1).frame
    assert list(found.method.unique()) == [text, "uniform"]
    assert found.output_fro_rel[0] == wanted.output_fro_rel[0]
    line = ["study", "--heads", "gaussian:n=16,d=4", "--methods", "uniform,jl(sketch=srht)",
            "--ranks", "2", "--seeds", "1", "--out", str(tmp_path), "--no-pictures"]  # fmt: skip
    assert main(line) == 0
    assert "jl(sketch=srht)" in capsys.readouterr().out
    for text, words in (("jl(sketch", "closing bracket"), ("jl(srht)", "each parameter once"),
                        ("jl(kind=srht)", "kind must be a parameter of method 'jl'")):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=words):
            sa.study(problem, [text], [4], 1)


# --- plain functions ----------------------------------------------------------------------------


def exact(q: Array, k: Array, v: Array) -> Array:
    x = q @ k.T / np.sqrt(q.shape[1])
    x = np.exp(x - x.max(axis=1, keepdims=True))
    return np.asarray(x / x.sum(axis=1, keepdims=True) @ v)


def drawn(problem: sa.AttentionProblem, rank: int, rng: np.random.Generator) -> Array:
    keys = rng.choice(problem.n_k, rank, replace=False)
    return np.asarray(problem.values[keys].mean(axis=0) + np.zeros((problem.n_q, 1)))


def test_functions_are_studied() -> None:
    problem = head()
    given = {"mine": exact, "lambda": lambda q, k, v: 0 * q, "drawn": drawn}
    result = sa.study([problem, head(1)], given, ranks=[4, 8], seeds=2, jobs=2)
    first = result.frame["head"][0]
    worst = result.frame.groupby("method").output_fro_rel.max()
    assert worst["mine"] < 1e-5
    assert worst["lambda"] == 1
    rows = result.frame[(result.frame.method == "drawn") & (result.frame["head"] == first)]
    rows = rows.sort_values(["rank", "seed"])
    rng = np.random.default_rng(0)
    assert len(set(rows.output_fro_rel)) == 4
    method = sa.Function(drawn, 4)
    report = sa.error_report(problem, output=method.attend(problem, 0))
    assert rows.output_fro_rel.iloc[0] == report.output_fro_rel
    draw = method.draw(problem, rng)
    assert np.array_equal(method.attend(problem, draw=draw), method.attend(problem, draw=draw))


def test_a_function_alone_and_in_a_list(tmp_path: Path) -> None:
    problem = head()
    assert set(sa.study(problem, drawn, ranks=[4]).frame.method) == {"drawn"}
    result = sa.study(problem, [drawn, ("other", exact)], [4], 1, out=tmp_path, pictures=False)
    assert list(result.frame.method) == ["drawn", "other"]
    # What a function does cannot be read from it: another process computes its cells anew.
    again = sa.study(problem, [drawn, ("other", exact)], [4], 1, out=tmp_path, pictures=False)
    assert again.frame.drop(columns="seconds").equals(result.frame.drop(columns="seconds"))


def test_functions_are_told_what_they_ask_for() -> None:
    seen: dict[str, Any] = {}

    def asks(
        q: Array, k: Array, v: Array, causal: Any, scale: float, key_mask: Any = None
    ) -> Array:
        seen.update(causal=causal, scale=scale, key_mask=key_mask)
        return np.zeros_like(v)

    mask = np.arange(32) < 20
    problem = head(causal=True, scale=0.25, key_mask=mask)
    sa.Function(asks).attend(problem)
    assert (seen["causal"], seen["scale"]) == (True, 0.25)
    assert np.array_equal(seen["key_mask"], mask)
    operator = sa.Function(lambda problem: aslinearoperator(problem.exact.to_dense()))
    assert np.allclose(operator.attend(problem), problem.output, atol=1e-5)
    with pytest.raises(ValueError, match="causal must be False"):
        sa.Function(exact).attend(head(causal=True))
    with pytest.raises(ValueError, match="key_mask must be None"):
        sa.Function(exact).attend(head(key_mask=mask))


FILE = """
import numpy as np
import sketchattn as sa

KEPT = {kept}

def helper(x):
    return x[:KEPT]

@sa.register("first")
def of_the_first(q, k, v, rank):
    \"\"\"Return a mean.\"\"\"
    return np.repeat(helper(v[:rank]).mean(0)[None], len(q), axis=0)
"""


def test_a_function_has_a_name_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "first.py", tmp_path / "out"
    command = [sys.executable, "-m", "sketchattn", "study", "--import", str(file)]
    heads = sa.make_heads("gaussian", n=32, d=4, heads=1, rng=0)
    sa.write_heads(tmp_path / "heads.npz", heads)
    command += [str(tmp_path / "heads.npz"), "--methods", "first", "--ranks", "4,8", "--seeds", "1"]

    def lines(kept: int) -> int:
        file.write_text(FILE.format(kept=kept))
        done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "first" in done.stdout
        return sum(len(f.read_text().splitlines()) for f in (out / "cells").glob("*.jsonl"))

    first = lines(4)
    # Another process knows the same function again, and one that reads another constant apart.
    assert lines(4) == first
    assert lines(3) == first + 2


def test_what_is_registered() -> None:
    def mean(q: Array, k: Array, v: Array) -> Array:
        return np.repeat(v.mean(0)[None], len(q), axis=0)

    assert sa.register("own_mean")(mean) is mean
    assert sa.register("own_few")(Few) is Few
    problem = head()
    out = sa.attention(problem.q, problem.k, problem.v, "own_mean")
    assert np.array_equal(out, mean(problem.q, problem.k, problem.values))
    assert sa.study(problem, "own_mean", ranks=[4], seeds=1).frame.method.unique() == ["own_mean"]
    sa.register("own_mean")(mean)  # a cell of a notebook that runs again
    with pytest.raises(ValueError, match="'own_few' must be unique"):
        sa.register("own_few")(mean)
    for wrong in (Few(4), 3, int):
        with pytest.raises(TypeError, match="must be a class derived from sketchattn.Method or a"):
            sa.register("own_wrong")(wrong)  # type: ignore[type-var]


def test_functions_are_told_apart_by_what_they_compute() -> None:
    def make(x: float, body: str) -> Any:
        scope: dict[str, Any] = {"x": x, "__name__": "made"}
        exec(f"def g(t):\n    return t + x\ndef f(t, a=1):\n    return {body}", scope)
        return scope["f"]

    same = function_content(make(1.0, "g(t)"))
    assert function_content(make(1.0, "g(t)")) == same
    others = [make(2.0, "g(t)"), make(1.0, "g(t) + 1"), make(1.0, "g(g(t))"), make(1.0, "t")]
    assert len({same, *map(function_content, others)}) == 5
    default = make(1.0, "g(t)")
    default.__defaults__ = (2,)
    assert function_content(default) != same
    with pytest.raises(UnreadableError):
        function_content(make(object(), "g(t)"))  # type: ignore[arg-type]


def test_what_is_missing_is_said() -> None:
    problem = head()
    causal = sa.AttentionProblem(problem.q, problem.k, problem.v, causal=True)
    method = sa.Function(lambda q, k, v: v)
    with pytest.raises(ValueError, match="has no parameter causal.*give it the parameter"):
        method.attend(causal)

    class Lost(Few):
        def __init__(self, rank: int, width: int = 3) -> None:
            self.rank = rank

    with pytest.raises(AttributeError, match="write self.width = width in __init__"):
        sa.study(problem, [Lost(4)], ranks=[4], seeds=1)
    with pytest.raises(TypeError, match="shares of n_k"):
        sa.study(problem, "uniform", ranks=["10%"], seeds=1)  # type: ignore[list-item]
    with pytest.raises(FileNotFoundError, match="'nowhere', which does not exist"):
        sa.read_heads("nowhere")
    with pytest.raises(ValueError, match="Heads.from_projections"):
        sa.AttentionProblem(np.ones((4, 8)), np.ones((4, 2)), np.ones((4, 2)))


def test_functions_of_other_arguments_are_refused() -> None:
    for wrong in (lambda x: x, lambda q, k, v, temperature: v, lambda q, k: q):
        with pytest.raises(TypeError, match=r"function must be f\(q, k, v\)"):
            sa.study(head(), {"wrong": wrong}, [4])
    with pytest.raises(TypeError, match="rank must be given"):
        sa.Function(drawn).attend(head())
    with pytest.raises(TypeError, match="function must be callable"):
        sa.Function(3).attend(head())  # type: ignore[arg-type]


# --- draws --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_a_draw_is_written_as_its_ending_says(tmp_path: Path, suffix: str) -> None:
    problem = head()
    method = sa.Skeinformer(4)
    draw = method.draw(problem, 7)
    path = tmp_path / f"draw{suffix}"
    draw.save(path)
    back = sa.Draw.load(path)
    assert set(back) == set(draw)
    assert all(np.array_equal(back[x], draw[x]) and back[x].dtype == draw[x].dtype for x in draw)
    assert isinstance(back.origin, Origin)
    assert (back.origin.seed, back.origin.problem) == (7, problem.digest)
    assert back.origin.method.startswith("skeinformer(rank=4")
    assert np.array_equal(method.attend(problem, draw=back), method.attend(problem, 7))
    if suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            assert "columns" in file.files
    else:
        assert path.read_bytes()[8:9] == b"{"


def test_other_endings_and_damaged_files_are_refused(tmp_path: Path) -> None:
    draw = sa.UniformColumns(4).draw(head(), 0)
    for call in (draw.save, sa.Draw.load):
        with pytest.raises(ValueError, match=r"path must end in .safetensors or .npz"):
            call(tmp_path / "draw.txt")
    with pytest.raises(ValueError, match="existing file"):
        sa.Draw.load(tmp_path / "none.npz")
    for suffix in (".npz", ".safetensors"):
        path = tmp_path / f"bad{suffix}"
        path.write_bytes(b"no such thing")
        with pytest.raises(ValueError, match=r"file that Draw.save wrote"):
            sa.Draw.load(path)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_files_that_are_no_draws_are_refused(tmp_path: Path, suffix: str) -> None:
    from safetensors.numpy import save_file

    sa.write_heads(tmp_path / f"heads{suffix}", sa.make_heads("gaussian", n=8, d=4, rng=0))
    x: dict[str, Any] = {"columns": np.arange(4)}
    if suffix == ".npz":
        np.savez(tmp_path / "plain.npz", **x)
    else:
        save_file(x, tmp_path / "plain.safetensors")
    for name, held in (("heads", "q, k, v"), ("plain", "columns")):
        with pytest.raises(ValueError, match="does not say what drew its arrays") as said:
            sa.Draw.load(tmp_path / f"{name}{suffix}")
        assert all(part in str(said.value) for part in held.split(", "))
        assert "read_heads" in str(said.value)
    # What was saved without an origin is a draw, still without one.
    for draw in (sa.Draw(x), sa.UniformColumns(4).draw(head(), 0).detach(), sa.Draw()):
        draw.save(tmp_path / f"mine{suffix}")
        back = sa.Draw.load(tmp_path / f"mine{suffix}")
        assert back.origin is None
        assert set(back) == set(draw)


def test_a_file_of_a_draw_that_was_not_read_as_one(tmp_path: Path) -> None:
    draw = sa.UniformColumns(4).draw(head(), 0)
    draw.save(tmp_path / "draw.npz")
    given = head()
    with np.load(tmp_path / "draw.npz") as file:
        for wrong in (dict(file), file):
            with pytest.raises(ValueError, match=r"text 'origin'.*sketchattn.Draw.load"):
                sa.UniformColumns(4).attend(given, draw=wrong)
            with pytest.raises(ValueError, match=r"text 'origin'.*sketchattn.Draw.load"):
                sa.attention(given.q, given.k, given.v, "uniform", rank=4, draw=wrong)


def test_a_draw_of_another_problem_is_refused_unless_it_is_meant(tmp_path: Path) -> None:
    problem, other = head(0), head(1)
    method = sa.UniformColumns(4)
    draw = method.draw(problem, 0)
    draw.save(tmp_path / "d.npz")
    for foreign in (draw, sa.Draw.load(tmp_path / "d.npz"), pickle.loads(pickle.dumps(draw))):
        for call in (method.attend, method.approximate, method.attend_with_lse):
            with pytest.raises(ValueError, match=r"draw must be of this problem.*draw.detach"):
                call(other, draw=foreign)
        with pytest.raises(ValueError, match="draw must be of this problem"):
            sa.attention(other.q, other.k, other.v, "uniform", rank=4, draw=foreign)
        assert method.attend(other, draw=foreign.detach()).shape == (32, 8)
        assert method.attend(other, draw=dict(foreign)).shape == (32, 8)
        # A copy is as much of that problem as the draw.
        copies = (foreign.copy(), foreign | {}, {} | foreign, sa.Draw(foreign), copy.copy(foreign))
        changed = foreign | {"columns": np.arange(4)}
        for copied in (*copies, changed, foreign.detach() | foreign):
            assert isinstance(copied, sa.Draw)
            with pytest.raises(ValueError, match="draw must be of this problem"):
                method.attend(other, draw=copied)
            assert method.attend(problem, draw=copied).shape == (32, 8)
        assert list(changed["columns"]) == [0, 1, 2, 3]
        with pytest.raises(TypeError):
            foreign | 3
    # The same problem again, in the other precision, and copies of the draw are all the same.
    again = sa.AttentionProblem(problem.q, problem.k, problem.v)
    for same in (again, problem.astype(np.float64)):
        assert method.attend(same, draw=draw).shape == (32, 8)
    wide = problem.astype(np.float64)
    assert method.attend(problem, draw=method.draw(wide, 0)).shape == (32, 8)
    assert copy.deepcopy(draw).origin is not None
    # Derivatives at a fixed draw move the inputs a little, and other values are no other head.
    moved = sa.AttentionProblem(1.001 * problem.q, problem.k + 1e-3, 1 + problem.values)
    assert method.attend(moved, draw=draw).shape == (32, 8)
    with pytest.raises(ValueError, match="draw must be of this problem"):
        method.attend(moved, draw=sa.Draw.load(tmp_path / "d.npz"))


def test_draws_of_a_batch() -> None:
    heads = sa.make_heads("gaussian", n=16, d=4, heads=3, rng=0)
    given = (heads.q, heads.k, heads.v)
    wanted = sa.attention(*given, "skeinformer", rank=4, rng=5)
    draws = sa.Skeinformer(4).draw_heads(heads, 5)
    assert np.array_equal(sa.attention(*given, "skeinformer", rank=4, draw=draws), wanted)
    out, made = sa.attention(*given, "skeinformer", rank=4, rng=5, return_draws=True)
    assert np.array_equal(out, wanted)
    assert all(np.array_equal(a[x], b[x]) for a, b in zip(draws, made, strict=True) for x in a)
    assert [draw.origin.problem for draw in made] == [head.digest for head in heads]
    assert [origin_of(draw).seed for draw in draws + made] == 6 * [5]
    assert [origin_of(draw).head for draw in draws + made] == 2 * [(0, 0), (0, 1), (0, 2)]
    problems = [head for head in heads]
    assert np.array_equal(sa.Skeinformer(4).attend_heads(problems, [None] * 3, draw=made), wanted)
    with pytest.raises(ValueError, match="one for each of 3"):
        sa.attention(*given, "skeinformer", rank=4, draw=draws[:2])
    with pytest.raises(ValueError, match="draw must be of this problem"):
        sa.attention(*given, "skeinformer", rank=4, draw=draws[::-1])
    # One draw for all heads is meant for all of them.
    assert sa.attention(*given, "uniform", rank=4, draw=sa.UniformColumns(4).draw(heads[0])).shape
    q, k, v = (np.stack([x, x]) for x in given)
    out, lse, made = sa.attention(q, k, v, return_lse=True, return_draws=True)
    assert (out.shape, lse.shape, len(made)) == ((2, 3, 16, 4), (2, 3, 16), 6)
    out, lse, made = sa.attention(
        q, k, v, "wildcat", rank=4, rng=1, return_lse=True, return_draws=True
    )
    assert (lse.shape, len(made)) == ((2, 3, 16), 6)
    again = sa.attention(q, k, v, "wildcat", rank=4, draw=made, return_lse=True)
    assert np.array_equal(again[0], out)
    assert np.array_equal(again[1], lse)


def origin_of(draw: sa.Draw) -> Origin:
    assert isinstance(draw.origin, Origin)
    return draw.origin


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_draw_of_a_batch_says_what_draws_it_again(tmp_path: Path, suffix: str) -> None:
    heads = sa.make_heads("gaussian", n=16, d=4, heads=6, rng=0)
    q, k, v = (x.reshape(2, 3, 16, 4) for x in (heads.q, heads.k, heads.v))
    method = sa.UniformColumns(4)
    _, draws = sa.attention(q, k, v, method, rng=np.int64(5), return_draws=True)
    for i, draw in enumerate(draws):
        draw.save(tmp_path / f"d{suffix}")
        for back in (sa.Draw.load(tmp_path / f"d{suffix}"), pickle.loads(pickle.dumps(draw))):
            origin = origin_of(back)
            assert (origin.seed, origin.head) == (5, divmod(i, 3))
            assert origin.problem == heads[i].digest
            assert f"head={divmod(i, 3)}" in str(origin)
        stream = np.random.SeedSequence(5, spawn_key=divmod(i, 3))
        again = method.draw(heads[i], np.random.default_rng(stream))
        assert np.array_equal(again["columns"], draw["columns"])
    # One head alone has the stream of the seed itself, and a generator is no number.
    _, (one,) = sa.attention(q[0, 0], k[0, 0], v[0, 0], method, rng=5, return_draws=True)
    assert (one.origin.seed, one.origin.head) == (5, None)
    assert origin_of(method.draw(heads[0], np.int64(5))).seed == 5
    for rng in (None, np.random.default_rng(5)):
        (draw,) = method.draw_heads([heads[0]], rng)
        assert (origin_of(draw).seed, origin_of(draw).head) == (None, (0, 0))
