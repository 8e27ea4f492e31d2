"""Checks of the source tree and of the wheel that no linter offers.

Every check takes text or names and returns a list of problems, so that test_packaging.py can
show each of them a broken input.  ``python tests/packaging_checks.py wheel FILE`` checks a wheel,
``floors`` instead of ``wheel FILE`` prints the lowest requirements as constraints for pip.
"""

from __future__ import annotations

import ast
import re
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sketchattn"

# The file that owns Numba's decorators, and what the others may ask Numba for.
JIT_FILE = "kernels/_jit.py"
THREAD_CONTROLS = frozenset(
    {"config", "get_num_threads", "set_num_threads", "threading_layer", "__version__"}
)

# numpy.random names that do not touch the global generator
LOCAL_RANDOM = frozenset(
    {
        "BitGenerator",
        "Generator",
        "MT19937",
        "PCG64",
        "PCG64DXSM",
        "Philox",
        "SFC64",
        "SeedSequence",
        "default_rng",
    }
)

# distribution -> import name, where they differ
# Of Dask the library imports what `dask[distributed]` brings.
IMPORT_NAMES = {"scikit-learn": "sklearn", "lazy-loader": "lazy_loader", "dask": "distributed"}
# scikit-learn requires it
BROUGHT_ALONG = frozenset({"threadpoolctl"})


class Module:
    """A parsed source file; ``dotted`` resolves a name or attribute through the imports."""

    def __init__(self, source: str) -> None:
        self.tree = ast.parse(source)
        self.aliases: dict[str, str] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for name in node.names:
                    if name.asname is None:
                        first = name.name.split(".")[0]
                        self.aliases[first] = first
                    else:
                        self.aliases[name.asname] = name.name
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                for name in node.names:
                    self.aliases[name.asname or name.name] = f"{node.module}.{name.name}"

    def dotted(self, node: ast.AST) -> str | None:
        """Return ``numpy.random.seed`` for ``np.random.seed``; None where nothing is imported."""
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id)
        if isinstance(node, ast.Attribute):
            value = self.dotted(node.value)
            return None if value is None else f"{value}.{node.attr}"
        return None

    def imports(self) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
        """Yield every absolute import as (statement, full name), those inside functions too."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for name in node.names:
                    yield node, name.name
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                for name in node.names:
                    yield node, f"{node.module}.{name.name}"

    def uses(self) -> Iterator[tuple[ast.Name | ast.Attribute, str]]:
        """Yield every name and attribute that comes from an import, as (node, full name)."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Name | ast.Attribute):
                full = self.dotted(node)
                if full is not None:
                    yield node, full


def rooms() -> set[str]:
    """Return the names of what stands directly in the package, without ``__init__``."""
    return {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()} - {
        "__init__",
        "__pycache__",
    }


def _below(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


def book_imports(source: str, path: str) -> list[str]:
    """The folder ``theory/`` is no package: nothing imports it by that top-level name."""
    module = Module(source)
    problems = [
        f"{path}:{node.lineno}: imports {name}; the code of the claims is sketchattn.theory"
        for node, name in module.imports()
        if _below(name, "theory")
    ]
    for node in ast.walk(module.tree):
        if not (isinstance(node, ast.Call) and node.args):
            continue
        called = module.dotted(node.func)
        if isinstance(node.func, ast.Name) and node.func.id == "__import__":
            called = "importlib.import_module"
        argument = node.args[0]
        if (
            called == "importlib.import_module"
            and isinstance(argument, ast.Constant)
            and isinstance(argument.value, str)
            and _below(argument.value, "theory")
        ):
            problems.append(f"{path}:{node.lineno}: imports {argument.value} by name")
    return problems


def facade_imports(source: str, path: str) -> list[str]:
    """Modules import what they use from where it is, never from the package's public names.

    The layers cannot see what a public name stands for; ``__version__`` alone is taken from there.
    """
    module = Module(source)
    depth = len(Path(path).parts)
    problems = [
        f"{path}:{node.lineno}: imports {name}; imports inside the package are relative"
        for node, name in module.imports()
        if _below(name, "sketchattn")
    ]
    problems += [
        f"{path}:{node.lineno}: imports {name.name} from the public names of the package"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ImportFrom) and node.level == depth and node.module is None
        for name in node.names
        if name.name not in {"__version__", *rooms()}
    ]
    return problems


def class_replaced(source: str, path: str) -> list[str]:
    """No object changes its class: a module that does can no longer be pickled by reference."""
    return [
        f"{path}:{node.lineno}: assigns __class__"
        for node in ast.walk(ast.parse(source))
        if (
            isinstance(node, ast.Attribute)
            and node.attr == "__class__"
            and isinstance(node.ctx, ast.Store | ast.Del)
        )
        or (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "setattr"
            and any(isinstance(x, ast.Constant) and x.value == "__class__" for x in node.args)
        )
    ]


def numba_outside_jit(source: str, path: str) -> list[str]:
    """Numba's decorators are imported by kernels/_jit.py alone.

    Other files may ``import numba`` inside a function, for its thread controls and its version:
    what is imported at module level is paid for by whoever imports the module.
    """
    if path == JIT_FILE:
        return []
    module = Module(source)
    lazy = {
        id(inner)
        for outer in ast.walk(module.tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(outer)
    }
    problems = [
        f"{path}:{node.lineno}: imports {name} other than inside a function as a whole"
        for node, name in module.imports()
        if _below(name, "numba") and (name != "numba" or id(node) not in lazy)
    ]
    problems += [
        f"{path}:{node.lineno}: uses {name}; decorators are in {JIT_FILE}"
        for node, name in module.uses()
        if isinstance(node, ast.Attribute)
        and len(parts := name.split(".")) == 2
        and parts[0] == "numba"
        and parts[1] not in THREAD_CONTROLS
    ]
    return problems


def numba_config_assigned(source: str, path: str) -> list[str]:
    """``numba.config`` belongs to the user's process: it is read, never assigned."""
    module = Module(source)
    problems = []

    def is_config(name: str | None) -> bool:
        return name is not None and (
            _below(name, "numba.config") or _below(name, "numba.core.config")
        )

    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            if is_config(module.dotted(node)):
                problems.append(f"{path}:{node.lineno}: assigns {module.dotted(node)}")
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in {"setattr", "delattr", "vars"}
            and node.args
            and is_config(module.dotted(node.args[0]))
        ):
            problems.append(f"{path}:{node.lineno}: {node.func.id} on numba.config")
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "reload_config"
        ):
            problems.append(f"{path}:{node.lineno}: reloads numba.config")
    return problems


def full_fastmath(source: str, path: str) -> list[str]:
    """``fastmath=True`` implies nnan and ninf: NaN and infinity lose their meaning."""
    problems = []

    def is_bad(value: ast.expr) -> bool:
        if isinstance(value, ast.Constant):
            return value.value is True or value.value in {"fast", "nnan", "ninf"}
        return any(
            isinstance(inner, ast.Constant) and inner.value in {"fast", "nnan", "ninf"}
            for inner in ast.walk(value)
        )

    for node in ast.walk(ast.parse(source)):
        values: list[ast.expr] = []
        if isinstance(node, ast.keyword) and node.arg == "fastmath":
            values = [node.value]
        elif isinstance(node, ast.Dict):
            values = [
                value
                for key, value in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant) and key.value == "fastmath"
            ]
        elif isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id.lower() == "fastmath"
            for target in node.targets
        ):
            values = [node.value]
        problems += [
            f"{path}:{value.lineno}: fast-math with nnan or ninf"
            for value in values
            if is_bad(value)
        ]
    return problems


def global_random(source: str, path: str) -> list[str]:
    """Only ``numpy.random.Generator`` draws; the global state is never read or seeded."""
    module = Module(source)
    named = [(node.lineno, name) for node, name in module.imports()]
    used = [(node.lineno, name) for node, name in module.uses() if isinstance(node, ast.Attribute)]
    return [
        f"{path}:{line}: {name} is global random state; use numpy.random.Generator"
        for line, name in [*named, *used]
        if len(parts := name.split(".")) == 3
        and parts[:2] == ["numpy", "random"]
        and parts[2] not in LOCAL_RANDOM
    ]


def undeclared_imports(source: str, path: str, declared: Iterable[str]) -> list[str]:
    """What the library imports is the standard library or declared in pyproject.toml."""
    known = {*sys.stdlib_module_names, *declared, "sketchattn"}
    return [
        f"{path}:{node.lineno}: imports {name}, which pyproject.toml does not declare"
        for node, name in Module(source).imports()
        if name.split(".")[0] not in known
    ]


SOURCE_RULES: tuple[Callable[[str, str], list[str]], ...] = (
    book_imports,
    facade_imports,
    class_replaced,
    numba_outside_jit,
    numba_config_assigned,
    full_fastmath,
    global_random,
)


def stub_names(source: str) -> dict[str, str]:
    """Return the names that a stub gives, with the module each is from ("" for a submodule)."""
    return {
        name.asname or name.name: node.module or ""
        for node in ast.parse(source).body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }


def stub_problems(source: str) -> list[str]:
    """A stub is a list of ``from .module import Name as Name``, each name once."""
    problems, seen = [], set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign):  # __version__
            continue
        if not (isinstance(node, ast.ImportFrom) and node.level == 1):
            problems.append(f"line {node.lineno}: not an import from a module of the room")
            continue
        for name in node.names:
            if name.asname != name.name:
                problems.append(f"line {node.lineno}: {name.name} must be given as itself")
            if name.name in seen:
                problems.append(f"line {node.lineno}: {name.name} is written twice")
            seen.add(name.name)
    return problems


def distribution(requirement: str) -> str:
    """Return the name in a requirement: ``dask`` for ``dask[distributed]>=2024.9``."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None, requirement
    return match.group()


def import_names(requirements: Iterable[str]) -> set[str]:
    """Return the names under which the required distributions are imported."""
    names = map(distribution, requirements)
    return {IMPORT_NAMES.get(name, name) for name in names} | BROUGHT_ALONG


def requirements(pyproject: str) -> list[str]:
    """Return what the package, its extras and its build require."""
    configuration = tomllib.loads(pyproject)
    project = configuration["project"]
    required: list[str] = [*configuration["build-system"]["requires"], *project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        required += extra
    return required


def unexplained_floors(pyproject: str) -> list[str]:
    """Every requirement has a lower bound and, on its line, a comment with the reason."""
    return [
        f"no floor with a reason: {required}"
        for required in requirements(pyproject)
        if ">=" not in required.split(";")[0]
        or re.search(rf'"{re.escape(required)}"[\],]*\s*# \S', pyproject) is None
    ]


def large_files(paths: Iterable[Path], limit: int = 2_000_000) -> list[str]:
    """A file in the repository has at most ``limit`` bytes."""
    return [
        f"{path.name} has {path.stat().st_size} bytes, the limit is {limit}"
        for path in paths
        if path.is_file() and path.stat().st_size > limit
    ]


def version_problems(version: str, citation: str, changelog: str) -> list[str]:
    """CITATION.cff and the newest release of CHANGELOG.md name the version of the package."""
    problems = []
    cited = re.findall(r"^version: *[\"']?([^\"'\s]+)", citation, flags=re.MULTILINE)
    if cited != [version]:
        problems.append(f"CITATION.cff says {cited}, the package says {version}")
    entries = re.findall(r"^## \[(\d\S*)\] - \d{4}-\d\d-\d\d$", changelog, flags=re.MULTILINE)
    if entries[:1] != [version]:
        problems.append(f"CHANGELOG.md starts with {entries[:1]}, the package says {version}")
    return problems


def run_commands(text: str) -> list[str]:
    """Return the ``./run NAME`` commands that are lines of their own, without their options."""
    return re.findall(r"^ *(?:\S+=\S+ )*(\./run \w+)(?= |$)", text, flags=re.MULTILINE)


def script_commands(script: str) -> list[str]:
    """Return the commands that ``run`` knows: the labels of its ``case``, without ``help``."""
    labels = re.findall(r"^(\w+(?: \| \w+)*)\)$", script, flags=re.MULTILINE)
    return [name for label in labels for name in label.split(" | ")]


def command_problems(readme: str, script: str, ci: str) -> list[str]:
    """The README's commands are commands of ``run``, and CI calls those that check the tree."""
    commands = run_commands(readme)
    problems = [
        f"README.md does not show {wanted}"
        for wanted in ("./run study", "./run tests")
        if wanted not in commands
    ]
    known = script_commands(script)
    problems += [
        f"README.md shows {command}, which run does not know"
        for command in commands
        if command.split()[1] not in known
    ]
    if "./run tests" not in ci.splitlines():
        problems.append(".ci/run does not call ./run tests as the README shows it")
    called = run_commands(ci)
    problems += [
        f".ci/run does not call {wanted}"
        for wanted in ("./run lint", "./run types", "./run docs")
        if wanted.split()[1] in known and wanted not in called
    ]
    return problems


def usage_problems(script: str) -> list[str]:
    """Every command of ``run`` is in its usage text, and the usage text names no other."""
    (usage,) = re.findall(r"^usage='(.*?)'$", script, flags=re.MULTILINE | re.DOTALL)
    shown, known = re.findall(r"\./run (\w+)", usage), script_commands(script)
    return [
        f"{name} is in {where} alone"
        for where, names, others in (("the usage", shown, known), ("the script", known, shown))
        for name in names
        if name not in others
    ]


def wheel_problems(names: Iterable[str], version: str) -> list[str]:
    """A wheel holds ``sketchattn/`` and its metadata, with the type marker, licence and heads."""
    names = list(names)
    info = f"sketchattn-{version}.dist-info"
    problems = [
        f"{name} does not belong in the wheel"
        for name in names
        if name.split("/")[0] not in {"sketchattn", info}
        or "__pycache__" in name
        or name.endswith((".pyc", ".nbi", ".nbc"))
    ]
    expected = ("sketchattn/py.typed", f"{info}/licenses/LICENSE", f"{info}/entry_points.txt")
    problems += [f"{name} is missing" for name in expected if name not in names]
    for ending in ("safetensors", "md"):  # the heads, and where they are from
        if not any(re.fullmatch(rf"sketchattn/heads/data/[^/]+\.{ending}", name) for name in names):
            problems.append(f"sketchattn/heads/data/*.{ending} is missing")
    return problems


def tree_problems(names: Iterable[str], package: Path = PACKAGE) -> list[str]:
    """Every source file of the package is in the wheel, with the stubs and templates it reads."""
    missing = {
        f"{package.name}/{path.relative_to(package).as_posix()}"
        for pattern in ("*.py", "*.pyi", "templates/*")
        for path in package.rglob(pattern)
    } - set(names)
    return [f"{name} is missing" for name in sorted(missing)]


def sdist_problems(names: Iterable[str], folder: str, root: Path = ROOT) -> list[str]:
    """A source distribution holds all that the checks of a checkout read."""
    found = {name.removeprefix(f"{folder}/") for name in names}
    patterns = ("*.md", "*.cff", "pyproject.toml", "run", "LICENSE", ".gitignore", ".ci/run")
    folders = ("sketchattn", "tests", "theory", "examples", "docs")
    wanted = {
        path.relative_to(root).as_posix()
        for pattern in (*patterns, *(f"{name}/**/*" for name in folders))
        for path in root.glob(pattern)
        if path.is_file()
        and "__pycache__" not in path.parts
        and path.parent not in (root / "docs" / "generated", root / "docs" / "pictures" / "methods")
    }
    return [f"{name} is missing" for name in sorted(wanted - found)]


def floors(pyproject: str) -> list[str]:
    """Return constraints that pin what the library itself requires to its lowest releases."""
    required: list[str] = tomllib.loads(pyproject)["project"]["dependencies"]
    return [re.sub(r">=([^,;]+).*", r"==\1", each) for each in required]


def main(task: str, *arguments: str) -> int:
    """``wheel FILE`` and ``sdist FILE`` print problems, ``floors`` prints the constraints."""
    if task == "floors":
        print(*floors((ROOT / "pyproject.toml").read_text(encoding="utf-8")), sep="\n")
        return 0
    import sketchattn

    (path,) = arguments
    if task == "sdist":
        with tarfile.open(path) as packed:
            problems = sdist_problems(packed.getnames(), f"sketchattn-{sketchattn.__version__}")
    else:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        problems = wheel_problems(names, sketchattn.__version__) + tree_problems(names)
    for problem in problems:
        print(f"{Path(path).name}: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
