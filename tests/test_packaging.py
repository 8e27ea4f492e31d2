"""What is shipped and how: versions, commands, files, imports; and that every check can fail."""

from __future__ import annotations

import ast
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging_checks import (
    BROUGHT_ALONG,
    PACKAGE,
    ROOT,
    SOURCE_RULES,
    book_imports,
    class_replaced,
    command_problems,
    facade_imports,
    floors,
    full_fastmath,
    global_random,
    import_names,
    large_files,
    numba_config_assigned,
    numba_outside_jit,
    requirements,
    run_commands,
    script_commands,
    sdist_problems,
    stub_names,
    stub_problems,
    tree_problems,
    undeclared_imports,
    unexplained_floors,
    usage_problems,
    version_problems,
    wheel_problems,
)

import sketchattn

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# ``import sketchattn`` loads none of these
HEAVY = (
    "jinja2",
    "joblib",
    "matplotlib",
    "numba",
    "pandas",
    "plotly",
    "safetensors",
    "scipy.stats",
    "sklearn",
    "torch",
    "tqdm",
    "typer",
)

Rule = Callable[[str, str], list[str]]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def pyproject() -> dict[str, Any]:
    return tomllib.loads(read("pyproject.toml"))


# --- versions -------------------------------------------------------------------------------------


def test_the_package_is_the_only_source_of_the_version() -> None:
    configuration = pyproject()
    assert "version" not in configuration["project"]
    assert configuration["project"]["dynamic"] == ["version"]
    assert configuration["tool"]["hatch"]["version"] == {"path": "sketchattn/__init__.py"}


def test_installed_metadata_has_the_version_of_the_package() -> None:
    try:
        installed = metadata.version("sketchattn")
    except metadata.PackageNotFoundError:
        pytest.skip("the package is not installed here; ./run tests installs it")
    assert installed == sketchattn.__version__


def test_citation_and_changelog_have_the_version_of_the_package() -> None:
    citation, changelog = read("CITATION.cff"), read("CHANGELOG.md")
    assert version_problems(sketchattn.__version__, citation, changelog) == []


@pytest.mark.parametrize(
    ("citation", "changelog"),
    [
        ("version: 0.1.1\n", "## [0.1.0] - 2026-11-24\n"),
        ("cff-version: 0.1.0\n", "## [0.1.0] - 2026-11-24\n"),
        ("version: 0.1.0\n", "## [0.2.0] - 2026-11-30\n\n## [0.1.0] - 2026-11-24\n"),
        ("version: 0.1.0\n", "## [Unreleased]\n\n## [0.1.0]\n"),
        ("version: 0.1.0\n", ""),
    ],
)
def test_a_wrong_version_is_reported(citation: str, changelog: str) -> None:
    assert len(version_problems("0.1.0", citation, changelog)) == 1


# --- requirements ---------------------------------------------------------------------------------


def test_every_floor_has_a_reason() -> None:
    assert unexplained_floors(read("pyproject.toml")) == []


@pytest.mark.parametrize(
    "line",
    [
        '"numpy",',
        '"numpy",  # a reason without a floor',
        '"numpy>=2.1",',
        '"numpy<3",  # a ceiling alone',
        '"dask[distributed]>=2024.9",',
        "\"tomli>=2.0; python_version < '3.11'\",",
        "\"tomli; python_version >= '3.11'\",  # a floor for Python alone",
    ],
)
def test_a_floor_without_a_reason_is_reported(line: str) -> None:
    text = (
        '[build-system]\nrequires = ["hatchling>=1.28"]  # a reason\n'
        f"[project]\ndependencies = [\n    {line}\n]\n"
        '[project.optional-dependencies]\ntest = ["pytest>=9"]  # a reason\n'
    )
    assert len(unexplained_floors(text)) == 1


def test_the_rule_for_floors_sees_every_requirement() -> None:
    text = read("pyproject.toml")
    assert len(unexplained_floors(re.sub(r"\s+# .*", "", text))) == len(requirements(text)) > 20


def test_the_floors_are_constraints_for_every_dependency() -> None:
    text = '[project]\ndependencies = ["a-b>=1.2,<3", "c>=4.0.1; python_version < \'3.11\'"]\n'
    assert floors(text) == ["a-b==1.2", "c==4.0.1"]
    ours = floors(read("pyproject.toml"))
    assert len(ours) == len(pyproject()["project"]["dependencies"]) > 8
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", line) for line in ours)


def test_every_import_of_the_library_is_declared() -> None:
    project = pyproject()["project"]
    extras = project["optional-dependencies"]
    declared = import_names(
        [*project["dependencies"], *extras["torch"], *extras["transformers"], *extras["dask"]]
    )
    problems = [
        problem
        for path in sources()
        for problem in undeclared_imports(path.read_text(encoding="utf-8"), path.name, declared)
    ]
    assert problems == []


def test_an_undeclared_import_is_reported() -> None:
    source = "def f():\n    import requests.adapters\n    import os.path, numpy as np\n"
    assert len(undeclared_imports(source, "x.py", {"numpy"})) == 1
    assert len(undeclared_imports(source, "x.py", set())) == 2


@pytest.mark.parametrize("name", sorted(BROUGHT_ALONG))
def test_scikit_learn_brings_what_is_not_declared(name: str) -> None:
    required = metadata.requires("scikit-learn") or []
    assert any(re.match(rf"{name}\b(?!.*extra ==)", line) for line in required)


# --- commands -------------------------------------------------------------------------------------


def test_the_commands_of_the_readme_exist_and_ci_calls_them() -> None:
    assert command_problems(read("README.md"), read("run"), read(".ci/run")) == []


@pytest.mark.parametrize(
    ("readme", "script", "ci"),
    [
        ("./run tests\n", "study)\ntests)\n", "./run tests\n"),
        ("./run study\n./run tests\n./run paint\n", "study)\ntests)\n", "./run tests\n"),
        ("./run study\n./run tests\n", "tests)\n", "./run tests\n"),
        ("./run study\n./run tests\n", "study)\ntests)\n", "./run tests -x\n"),
        ("./run study\n./run tests\n", "study)\ntests)\n", "# ./run tests\n"),
        ("./run study\n./run tests\n", "study | docs)\ntests)\n", "./run tests\n"),
        ("./run study\n./run tests\n./run types\n", "study)\ntests)\ntypes)\n", "./run tests\n"),
    ],
)
def test_a_command_that_does_not_fit_is_reported(readme: str, script: str, ci: str) -> None:
    assert len(command_problems(readme, script, ci)) == 1


def test_a_command_is_found_with_its_options_and_variables() -> None:
    text = "Text with ./run inline\n    ./run study --ranks 8\nX=1 ./run tests\n"
    assert run_commands(text) == ["./run study", "./run tests"]


def test_the_usage_lists_the_commands() -> None:
    script = read("run")
    assert usage_problems(script) == []
    assert {"tests", "lint", "types", "docs", "bench", "validate", "study"} <= set(
        script_commands(script)
    )
    for broken in ("usage='./run a'\na)\nb)\n", "usage='./run a\n./run b'\na | c)\nb)\n"):
        assert len(usage_problems(broken)) == 1
    assert usage_problems("usage='./run a\n ./run b: x'\na | b)\nhelp | -h)\n") == []


@pytest.mark.parametrize("arguments", [[], ["paint"]])
def test_run_refuses_what_it_does_not_know(arguments: list[str]) -> None:
    done = subprocess.run(
        ["sh", str(ROOT / "run"), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("usage: ./run study")


def test_run_says_what_to_do_without_a_python() -> None:
    done = subprocess.run(
        ["sh", str(ROOT / "run"), "study"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHON": "no-such-python"},
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "run: Python must be 3.10 or newer and have its venv module, found none among: "
        "no-such-python; install one (Debian and Ubuntu: the package python3-venv too) "
        "or set PYTHON=/path/to/python3.\n"
    )


def fake_python(folder: Path) -> Path:
    """Write a Python that records its calls; ``-m venv`` makes a folder with the same Python."""
    python = folder / "fake-python"
    python.write_text(
        "#!/bin/sh\n"
        f'echo "$*" >>"{folder}/calls"\n'
        'case "$*" in\n'
        "*print*) echo Python 3.10.0 ;;\n"
        '"-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python";'
        " for name in sketchattn lint-imports; do"
        ' printf \'#!/bin/sh\\necho "ran: ${0##*/} $*"\\n\' >"$3/bin/$name";'
        ' chmod +x "$3/bin/$name"; done ;;\n'
        f'*torch==*) [ ! -e "{folder}/no-torch" ] ;;\n'
        f'*peers,models]*) [ ! -e "{folder}/no-peers" ] ;;\n'
        f'*"pip install"*) [ ! -e "{folder}/no-index" ] ;;\n'
        f'"-m ruff"*) echo "ran: $*"; [ ! -e "{folder}/no-style" ] ;;\n'
        '"-m pytest"*|"-m mypy"*|"-m sphinx"*|docs/*) echo "ran: $*" ;;\n'
        "esac\n",
        encoding="utf-8",
    )
    python.chmod(0o755)
    return python


class Checkout:
    """A copy of what ``run`` reads, in a folder whose name has a space, with a fake Python."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "check out"
        (self.root / "sketchattn").mkdir(parents=True)
        for name in ("run", "pyproject.toml", "sketchattn/__init__.py"):
            (self.root / name).write_text(read(name), encoding="utf-8")
        self.python = fake_python(folder)

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        (self.folder / "calls").write_text("", encoding="utf-8")
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(self.python), **variables}
        return subprocess.run(
            ["sh", str(self.root / "run"), *arguments],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            cwd=self.folder,
        )

    def installs(self) -> list[str]:
        calls = (self.folder / "calls").read_text(encoding="utf-8").splitlines()
        return [call.split()[-1] for call in calls if "pip install" in call]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_a_second_run_installs_nothing(checkout: Checkout) -> None:
    first = checkout.run("study", "--ranks", "4")
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1] == "ran: sketchattn study --ranks 4"
    assert checkout.installs() == ["pip>=21.3", "out"]  # the last word of ".../check out"
    second = checkout.run("study")
    assert second.stdout == "ran: sketchattn study\n"
    assert checkout.installs() == []


# What "./run tests" runs before the options that are given: a worker a core.
WHOLE = "ran: -m pytest -n auto --dist worksteal"


def test_the_tests_have_torch_and_an_environment_of_their_own(checkout: Checkout) -> None:
    checkout.run("study")
    first = checkout.run("tests", "-k", "shape")
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1] == f"{WHOLE} -k shape"
    assert checkout.installs() == [
        "pip>=21.3",
        "out[test]",
        "torch==2.13.0",
        "out[test,peers,models]",
    ]
    quick = checkout.run("tests", "--quick", "-k", "jl or svd")
    assert quick.stdout == (
        "ran: -m pytest -n 0 --dist worksteal -m quick tests/test_quick.py -k jl or svd\n"
    )
    assert checkout.installs() == []
    checkout.run("tests", SKETCHATTN_TORCH="0")
    assert checkout.installs() == ["pip>=21.3", "out[test]"]


def test_study_validate_and_bench_are_commands_of_one_environment(checkout: Checkout) -> None:
    checkout.run("study")
    for name in ("validate", "bench"):
        done = checkout.run(name, "--quick", "a b")
        assert (done.returncode, done.stdout) == (0, f"ran: sketchattn {name} --quick a b\n")
        assert checkout.installs() == []


def test_lint_and_types_use_the_environment_of_the_tests(checkout: Checkout) -> None:
    checkout.run("tests", SKETCHATTN_TORCH="0")
    lint = checkout.run("lint", SKETCHATTN_TORCH="0")
    assert lint.returncode == 0, lint.stderr
    assert lint.stdout == "ran: -m ruff check --no-cache .\nran: lint-imports --no-cache\n"
    types = checkout.run("types", "--cache-dir", "x", SKETCHATTN_TORCH="0")
    assert (types.returncode, types.stdout) == (0, "ran: -m mypy --cache-dir x\n")
    assert checkout.installs() == []


def test_lint_stops_at_the_first_failure_and_takes_no_options(checkout: Checkout) -> None:
    checkout.run("tests")
    (checkout.folder / "no-style").touch()
    failed = checkout.run("lint")
    assert failed.returncode == 1
    assert "lint-imports" not in failed.stdout
    refused = checkout.run("lint", "--fix")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == "run: lint takes no options, got: --fix\n"


def test_docs_are_built_strictly_in_an_environment_of_their_own(checkout: Checkout) -> None:
    done = checkout.run("docs")
    assert done.returncode == 0, done.stderr
    assert checkout.installs() == ["pip>=21.3", "out[docs]"]
    built, looked = done.stdout.splitlines()[-2:]
    assert built.startswith("ran: -m sphinx --fresh-env --fail-on-warning ")
    assert built.endswith(" . build/docs")
    assert looked == "ran: docs/check.py build/docs"
    again = checkout.run("docs", "--refresh", "study", "readme")
    assert again.stdout == "ran: docs/refresh.py study readme\n"


@pytest.mark.parametrize("name", ["pyproject.toml", "sketchattn/__init__.py"])
def test_a_changed_project_is_installed_again(checkout: Checkout, name: str) -> None:
    checkout.run("study")
    path = checkout.root / name
    text = path.read_text(encoding="utf-8")
    path.write_text(f'{text}\n__version__ = "9"\n', encoding="utf-8")
    checkout.run("study")
    assert checkout.installs() == ["pip>=21.3", "out"]


def test_an_installation_that_failed_is_made_again(checkout: Checkout) -> None:
    (checkout.folder / "no-index").touch()
    failed = checkout.run("study")
    assert failed.returncode == 1
    assert "run: the installation failed" in failed.stderr
    assert "ran:" not in failed.stdout
    (checkout.folder / "no-index").unlink()
    assert checkout.run("study").stdout.endswith("ran: sketchattn study\n")
    assert checkout.installs() == ["pip>=21.3", "out"]


def test_without_torch_the_tests_run_but_not_in_ci(checkout: Checkout) -> None:
    (checkout.folder / "no-torch").touch()
    failed = checkout.run("tests", CI="true")
    assert failed.returncode == 1
    assert failed.stderr.endswith("run: PyTorch 2.13.0 must be installable where CI=true.\n")
    done = checkout.run("tests")
    assert done.returncode == 0
    assert "run: PyTorch 2.13.0 cannot be had here" in done.stdout
    assert done.stdout.endswith(f"{WHOLE}\n")


def test_without_other_packages_the_tests_run_but_not_in_ci(checkout: Checkout) -> None:
    (checkout.folder / "no-peers").touch()
    failed = checkout.run("tests", CI="true")
    assert failed.returncode == 1
    assert failed.stderr.endswith(
        "run: other packages of attention must be installable where CI=true.\n"
    )
    done = checkout.run("tests")
    assert done.returncode == 0
    assert "run: other packages of attention cannot be had here" in done.stdout
    assert done.stdout.endswith(f"{WHOLE}\n")
    assert done.stdout != ""


# --- files ----------------------------------------------------------------------------------------


def repository_files() -> list[Path]:
    """Return what is tracked or about to be; in an unpacked archive, everything."""
    if not (ROOT / ".git").exists():
        return list(ROOT.rglob("*"))
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def test_no_file_is_large() -> None:
    files = repository_files()
    assert ROOT / "pyproject.toml" in files
    assert large_files(files) == []


def test_a_large_file_is_reported(tmp_path: Path) -> None:
    for name, size in (("fits", 2_000_000), ("large", 2_000_001)):
        (tmp_path / name).write_bytes(b"\0" * size)
    assert large_files(tmp_path.iterdir()) == ["large has 2000001 bytes, the limit is 2000000"]


WHEEL = (
    "sketchattn/__init__.py",
    "sketchattn/py.typed",
    "sketchattn/heads/data/README.md",
    "sketchattn/heads/data/heads.safetensors",
    "sketchattn-0.1.0.dist-info/METADATA",
    "sketchattn-0.1.0.dist-info/entry_points.txt",
    "sketchattn-0.1.0.dist-info/licenses/LICENSE",
)


def test_a_right_wheel_has_no_problems() -> None:
    assert wheel_problems(WHEEL, "0.1.0") == []


@pytest.mark.parametrize("name", [name for name in WHEEL[1:] if not name.endswith("METADATA")])
def test_a_wheel_that_lacks_a_file_is_reported(name: str) -> None:
    assert len(wheel_problems([other for other in WHEEL if other != name], "0.1.0")) == 1


@pytest.mark.parametrize(
    "name",
    ["tests/naive.py", "theory/x.md", "sketchattn/kernels/__pycache__/softmax.nbi", "run"],
)
def test_a_wheel_with_another_file_is_reported(name: str) -> None:
    assert len(wheel_problems([*WHEEL, name], "0.1.0")) == 1


def test_a_wheel_that_lacks_a_module_is_reported() -> None:
    files = [*sources(), *sorted(PACKAGE.rglob("*.pyi")), *sorted(PACKAGE.rglob("templates/*"))]
    names = [f"sketchattn/{path.relative_to(PACKAGE).as_posix()}" for path in files]
    assert tree_problems(names) == []
    assert tree_problems(names[1:]) == [f"{names[0]} is missing"]
    assert tree_problems(names[:-1]) == [f"{names[-1]} is missing"]


def test_a_source_distribution_that_lacks_a_file_is_reported() -> None:
    files = [path for path in ROOT.rglob("*") if path.is_file() and ".git" not in path.parts]
    names = [f"x-1/{path.relative_to(ROOT).as_posix()}" for path in files]
    assert sdist_problems(names, "x-1") == []
    for lost in ("tests/naive.py", "docs/data/claims.json", "run", "theory/linformer.md"):
        assert sdist_problems([x for x in names if x != f"x-1/{lost}"], "x-1") == [
            f"{lost} is missing"
        ]


# --- source rules ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", SOURCE_RULES, ids=lambda rule: rule.__name__)
def test_the_library_keeps_the_rule(rule: Rule) -> None:
    problems = [
        problem
        for path in sources()
        for problem in rule(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE).as_posix())
    ]
    assert problems == []


BROKEN: list[tuple[Rule, str, str]] = [
    (book_imports, "x.py", "import theory"),
    (book_imports, "x.py", "import numpy, theory.linformer as t"),
    (book_imports, "x.py", "def f():\n    from theory import verify"),
    (book_imports, "x.py", "import importlib\nimportlib.import_module('theory.x')"),
    (book_imports, "x.py", "from importlib import import_module\nimport_module('theory')"),
    (book_imports, "x.py", "__import__('theory')"),
    (facade_imports, "x.py", "from . import attention"),
    (facade_imports, "cli.py", "def f():\n    from . import cli, study"),
    (facade_imports, "zoo/x.py", "from .. import Method"),
    (facade_imports, "theory/dba/x.py", "from ... import theory, __version__, methods"),
    (facade_imports, "zoo/x.py", "import sketchattn as sa"),
    (facade_imports, "zoo/x.py", "from sketchattn.zoo.base import Method"),
    (class_replaced, "x.py", "import sys\nsys.modules[__name__].__class__ = type"),
    (class_replaced, "x.py", "def f(m):\n    setattr(m, '__class__', type)"),
    (numba_outside_jit, "x.py", "import numba"),
    (numba_outside_jit, "kernels/x.py", "from numba import njit"),
    (numba_outside_jit, "x.py", "def f():\n    import numba.core"),
    (numba_outside_jit, "x.py", "def f():\n    from numba import prange"),
    (numba_outside_jit, "x.py", "def f():\n    import numba as nb\n    return nb.njit(f)"),
    (numba_config_assigned, "x.py", "import numba\nnumba.config.THREADING_LAYER = 'omp'"),
    (numba_config_assigned, "x.py", "import numba as nb\nnb.config.NUM += 1"),
    (numba_config_assigned, "x.py", "from numba import config\nconfig.A, b = 1, 2"),
    (numba_config_assigned, "x.py", "from numba.core import config as c\nsetattr(c, 'A', 1)"),
    (numba_config_assigned, "x.py", "import numba\nnumba.config = None"),
    (numba_config_assigned, "x.py", "import numba\nnumba.config.reload_config()"),
    (full_fastmath, "x.py", "kernel(fastmath=True)"),
    (full_fastmath, "x.py", "options = {'parallel': True, 'fastmath': True}"),
    (full_fastmath, "x.py", "FASTMATH = frozenset({'nsz', 'nnan'})"),
    (full_fastmath, "x.py", "kernel(fastmath={'ninf'})"),
    (full_fastmath, "x.py", "kernel(fastmath='fast')"),
    (global_random, "x.py", "import numpy as np\nnp.random.seed(0)"),
    (global_random, "x.py", "import numpy\nx = numpy.random.rand"),
    (global_random, "x.py", "from numpy import random as r\nr.shuffle([])"),
    (global_random, "x.py", "from numpy.random import normal"),
    (global_random, "x.py", "import numpy.random as r\nr.get_state()"),
]


@pytest.mark.parametrize(("rule", "path", "source"), BROKEN)
def test_a_broken_rule_is_reported(rule: Rule, path: str, source: str) -> None:
    problems = rule(source, path)
    assert len(problems) == 1
    assert problems[0].startswith(f"{path}:{len(source.splitlines())}: ")


def test_every_rule_has_a_broken_input() -> None:
    assert {rule for rule, _, _ in BROKEN} == set(SOURCE_RULES)


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (book_imports, "x.py", "from sketchattn.theory import claims\nfrom .theory import check"),
        (book_imports, "x.py", "from . import theory\nimport theoryx"),
        (facade_imports, "zoo/x.py", "from . import attention\nfrom .. import kernels"),
        (facade_imports, "x.py", "from . import __version__, theory, problem"),
        (class_replaced, "x.py", "def f(x):\n    return x.__class__.__name__"),
        (numba_outside_jit, "kernels/_jit.py", "import numba\nf = numba.njit"),
        (numba_outside_jit, "kernels/x.py", "from ._jit import kernel, take"),
        (
            numba_outside_jit,
            "x.py",
            "def f():\n    import numba\n    return numba.config.NUMBA_NUM_THREADS",
        ),
        (numba_config_assigned, "x.py", "import numba\nx = numba.config.NUMBA_NUM_THREADS"),
        (numba_config_assigned, "x.py", "config = object()\nconfig.A = 1"),
        (full_fastmath, "x.py", "kernel(fastmath={'nsz', 'reassoc'})\nkernel(fastmath=False)"),
        (global_random, "x.py", "import numpy as np\nnp.random.default_rng(0).random()"),
        (global_random, "x.py", "from numpy.random import Generator, SeedSequence"),
    ],
)
def test_a_kept_rule_is_not_reported(rule: Rule, path: str, source: str) -> None:
    assert rule(source, path) == []


# --- import ---------------------------------------------------------------------------------------


def python(code: str, cwd: Path, **variables: str) -> str:
    """Return what a fresh Python prints that runs ``code`` in an empty folder."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(statement: str, cwd: Path) -> set[str]:
    """Return what a fresh Python that has NumPy loads by ``statement``, beside what is Python's."""
    code = (
        f"import sys, numpy\nbefore = set(sys.modules)\n{statement}\n"
        "print(*[name for name in set(sys.modules) - before"
        " if name.split('.')[0] not in sys.stdlib_module_names])"
    )
    return set(python(code, cwd).split())


def test_importing_the_package_loads_nothing_else(tmp_path: Path) -> None:
    # So it costs next to nothing on every machine; "sketchattn bench import" has the time.
    facade = {"sketchattn", "sketchattn.base", "sketchattn.base.names", "lazy_loader"}
    assert loaded("import sketchattn", tmp_path) == facade
    assert loaded("import sketchattn.theory", tmp_path) == facade | {"sketchattn.theory"}


def test_using_the_first_names_loads_nothing_heavy(tmp_path: Path) -> None:
    found = loaded("import sketchattn as sa\nsa.AttentionProblem", tmp_path)
    assert found.isdisjoint(HEAVY)
    assert "sketchattn.problem" in found


def test_a_heavy_import_is_reported(tmp_path: Path) -> None:
    found = loaded("import sketchattn, numba, scipy.stats", tmp_path)
    assert found >= {"numba", "scipy.stats"}


# --- public names ---------------------------------------------------------------------------------

STUBS = ("sketchattn", "sketchattn.testing", "sketchattn.theory")


def stub(name: str) -> str:
    return read(f"{name.replace('.', '/')}/__init__.pyi")


@pytest.mark.parametrize("name", STUBS)
def test_every_public_name_is_written_once(name: str) -> None:
    assert stub_problems(stub(name)) == []


@pytest.mark.parametrize(
    "line",
    [
        "from .a import x as x",
        "from . import x as x",
        "from .a import y",
        "from .a import y as z",
        "from ..a import y as y",
        "from a import y as y",
        "import a",
        "y = 1",
    ],
)
def test_a_stub_that_is_more_than_names_is_reported(line: str) -> None:
    assert stub_problems("from .b import x as x\n__version__: str\n") == []
    assert len(stub_problems(f"from .b import x as x\n{line}\n")) == 1


@pytest.mark.parametrize("name", STUBS)
def test_dir_is_what_the_stub_says(name: str, tmp_path: Path) -> None:
    code = f"import {name} as m\nprint(*dir(m))\nprint(*m.__all__)"
    for line in python(code, tmp_path).splitlines():
        assert line.split() == sorted(stub_names(stub(name)))


def test_every_method_is_a_public_name() -> None:
    found = [getattr(sketchattn, name) for name in stub_names(stub("sketchattn"))]
    public = {x for x in found if isinstance(x, type)}
    ours = {cls for cls in sketchattn.methods().values() if cls.__module__.startswith("sketchattn")}
    assert len(ours) > 10
    assert ours <= public


def public_names(path: str) -> list[str]:
    """Return the names of a module: what it imports as itself, or what it defines."""
    tree = ast.parse(read(path))
    names = [
        name.asname
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
        if name.asname == name.name
    ]
    defined = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    return [name for name in names or defined if name is not None]


@pytest.mark.parametrize(
    ("namespace", "path"),
    [
        ("sa", "sketchattn/__init__.pyi"),
        ("sa.theory", "sketchattn/theory/__init__.pyi"),
        ("sa.sketches", "sketchattn/sketches/__init__.py"),
        ("sa.sampling", "sketchattn/sampling/__init__.py"),
        ("sa.partitions", "sketchattn/partitions/__init__.py"),
        ("sa.perturbation", "sketchattn/errors/perturbation.py"),
        ("sa.compression", "sketchattn/sketches/compression.py"),
    ],
)
def test_promised_paths_need_no_further_import(namespace: str, path: str, tmp_path: Path) -> None:
    names = public_names(path)
    assert len(names) > 2
    code = f"import sketchattn as sa\nfor name in {names}:\n    getattr({namespace}, name)\n"
    python(code, tmp_path)


def test_all_names_can_be_loaded_at_once(tmp_path: Path) -> None:
    # What lazy-loader does where EAGER_IMPORT is set, to show errors of imports early.
    python("import sketchattn as sa\nsa.theory.claims", tmp_path, EAGER_IMPORT="1")


WALK = """
import importlib, inspect, pkgutil, sys
import sketchattn as sa

def walk():
    for module in pkgutil.walk_packages(sa.__path__, "sketchattn."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)

def check():
    for facade, names in ((sa, {names}), (sa.theory, {theory})):
        for name, module in names.items():
            found = getattr(facade, name)
            home = importlib.import_module(facade.__name__ + "." * bool(module) + module)
            if module == "":
                assert found is sys.modules[facade.__name__ + "." + name], name
            else:
                assert found is getattr(home, name), name
    for function in (sa.attention, sa.methods, sa.study, sa.theory.claim, sa.theory.instance):
        assert inspect.isfunction(function), function
    assert type(sa) is type(sa.theory) is type(sys)

for step in ({order}):
    step()
print(len(sys.modules))
"""


@pytest.mark.parametrize("order", ["walk, check", "check, walk, check"])
def test_no_submodule_takes_the_place_of_a_public_name(order: str, tmp_path: Path) -> None:
    code = WALK.replace("{order}", order)
    for key, name in (("{names}", "sketchattn"), ("{theory}", "sketchattn.theory")):
        code = code.replace(key, repr(stub_names(stub(name))))
    python(code, tmp_path)


def test_functions_that_use_the_package_go_to_other_processes(tmp_path: Path) -> None:
    # A module pickles by reference only while its class is that of modules.
    script = tmp_path / "script.py"
    script.write_text(
        "import joblib\n"
        "import sketchattn as sa\n"
        "from sketchattn import theory\n"
        "def work(seed):\n"
        "    problem = sa.make_heads('gaussian', n=8, d=4, rng=seed)[0]\n"
        "    return problem.n_k, type(theory).__name__\n"
        "if __name__ == '__main__':\n"
        "    print(joblib.Parallel(n_jobs=2, backend='loky')(joblib.delayed(work)(i)"
        " for i in range(2)))\n",
        encoding="utf-8",
    )
    code = f"import runpy\nrunpy.run_path({str(script)!r}, run_name='__main__')"
    assert python(code, tmp_path) == "[(8, 'module'), (8, 'module')]\n"


def shadowed(room: ModuleType, modules: Iterable[str]) -> list[str]:
    """Return promised names of a room that the import of a module would replace by the module."""
    promised = {
        f"{room.__name__}.{name}"
        for name in room.__all__
        if not isinstance(getattr(room, name), ModuleType)
    }
    return sorted(promised & set(modules))


def all_modules() -> list[str]:
    return [x.name for x in pkgutil.walk_packages(sketchattn.__path__, "sketchattn.")]


@pytest.mark.parametrize("room", [sketchattn, sketchattn.theory], ids=lambda x: x.__name__)
def test_no_module_has_the_name_of_a_promised_function(room: ModuleType) -> None:
    modules = all_modules()
    assert "sketchattn.theory.engine.checking" in modules
    assert shadowed(room, modules) == []


def test_a_module_with_the_name_of_a_function_is_reported() -> None:
    assert shadowed(sketchattn, [*all_modules(), "sketchattn.methods"]) == ["sketchattn.methods"]
    assert shadowed(sketchattn.theory, ["sketchattn.theory.check"]) == ["sketchattn.theory.check"]
