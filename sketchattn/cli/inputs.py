"""What arguments of the command line stand for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..heads.container import Heads

from .application import one_line

IMPORT_HELP = "A Python file whose methods and claims are used beside the built-in ones."
HEADS_HELP = (
    "Files (.safetensors or .npz), folders of files, patterns such as 'layers/*.npz', the name of "
    "a bundled set (minilm), or made heads such as clustered:n=512,d=64,heads=2,rng=0."
)
HeadsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        help=f"{HEADS_HELP} The bundled set by default.", metavar="[HEADS]...", show_default=False
    ),
]
HeadsOption = Annotated[
    str | None,
    typer.Option("--heads", help="HEADS, as an option.", metavar="HEADS", show_default=False),
]
ImportOption = Annotated[
    list[Path] | None,
    typer.Option("--import", help=IMPORT_HELP, metavar="FILE.py", show_default=False),
]
ProgressOption = Annotated[
    bool | None,
    typer.Option(
        "--progress/--no-progress",
        help="Show a progress bar; by default on terminals.",
        show_default=False,
    ),
]
CASES_HELP = "Names of cases, patterns such as 'exact-*' among them; all by default."


def given_heads(words: Sequence[str] | None, option: str | None, default: str = "minilm") -> Heads:
    """Return the heads that a verb is given, by position or as ``--heads``.

    Raises
    ------
    ValueError
        For both at once, and what `parse_heads` refuses.
    """
    if words and option is not None:
        raise ValueError(
            f"heads must be given once, got {' '.join(words)!r} and --heads {option!r}; leave "
            f"--heads out"
        )
    return parse_heads(words or option or default)


def parse_heads(text: str | Sequence[str]) -> Heads:
    """Return the heads that arguments name: files, a bundled set, or a family to make.

    Parameters
    ----------
    text : str or sequence of str
        ``FILE``, ``FOLDER``, ``PATTERN``, ``NAME``, or
        ``FAMILY:n=N[,d=D][,heads=H][,rng=SEED][,PARAMETER=X]``; the seed is 0 unless given, so that
        the same words are the same heads.

    Raises
    ------
    TypeError, ValueError
        For anything else, with the closest name.

    Examples
    --------
    >>> parse_heads("peaked:n=32,d=8,heads=2").names
    ('peaked/head0', 'peaked/head1')
    """
    from ..base.arguments import closest
    from ..heads.families import FAMILIES, make_heads
    from ..heads.files import BUNDLED, load_heads, read_heads
    from ..heads.inputs import names_files
    from ..heads.stored import joined

    if not isinstance(text, str):
        if all(map(names_files, text)):  # as what one pattern matches, in the order given
            return read_heads(text)
        return joined([(word, parse_heads(word)) for word in text])
    if names_files(text):
        return read_heads(text)
    family, colon, rest = text.partition(":")
    if not colon:
        if text in BUNDLED:
            return load_heads(text)
        if text in FAMILIES:
            raise ValueError(
                f"heads must say how many tokens to make, got {text!r}; write '{text}:n=512'"
            )
        raise ValueError(
            f"heads must be a file, a bundled set or a family, got {text!r}"
            f"{closest(text, [*BUNDLED, *FAMILIES])}"
        )
    parameters: dict[str, Any] = {}
    for part in rest.split(","):
        name, equals, value = (x.strip() for x in part.partition("="))
        if not equals or not name or name in parameters:
            raise ValueError(
                f"heads must be written as family:name=number,..., each name once, got {part!r} "
                f"in {text!r}; for instance '{family}:n=512,d=64'"
            )
        parameters[name] = value if name == "dtype" else _number(name, value)
    if "n" not in parameters:
        raise ValueError(f"heads must say how many tokens to make, got {text!r}; add n=512")
    return make_heads(family, **({"rng": 0} | parameters))


def _number(name: str, text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name} must be a number, got {text!r}; correct it") from None


def split_words(text: str | None) -> list[str] | None:
    """Return the words between commas, None for no text."""
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def split_methods(text: str | None) -> list[str] | None:
    """Return names of methods, ``name(parameter=value,...)`` among them, None for no text."""
    from ..zoo.base import split_outside

    return None if text is None else split_outside(text)


def split_integers(text: str | None, name: str) -> list[int] | None:
    """Return the integers between commas, None for no text."""
    words = split_words(text)
    if words is None:
        return None
    try:
        return [int(word) for word in words]
    except ValueError:
        raise ValueError(
            f"{name} must be integers separated by commas, got {text!r}; for instance 8,16,32"
        ) from None


def split_ranks(text: str | None) -> list[int | float] | None:
    """Return the ranks between commas, those with a point or an exponent as floats."""
    words = split_words(text)
    if words is None:
        return None
    try:
        return [float(x) if any(sign in x for sign in ".eE") else int(x) for x in words]
    except ValueError:
        raise ValueError(
            f"ranks must be integers, or shares such as 0.25, separated by commas, got {text!r}; "
            f"for instance 8,16,32"
        ) from None


def shapes_of(heads: Heads) -> Iterator[tuple[int, int]]:
    """Yield the shape of the output of each head; no head is read for it."""
    from ..heads.stored import MixedHeads

    if isinstance(heads, MixedHeads):
        yield from ((problem.n_q, problem.d_v or 0) for problem in heads.problems)
    else:
        yield from [(heads.n_q, heads.d_v)] * len(heads)


def read_output(path: Path) -> NDArray[Any]:
    """Return the array of an output file: ``.npy``, or ``output`` or the only one of the others.

    Raises
    ------
    ValueError
        For another ending, no such file, a damaged file, or several arrays without ``output``.
    """
    return only_array(read_arrays(path))


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of an output file by name, that of ``.npy`` as ``output``.

    Raises
    ------
    ValueError
        For another ending, no such file or a damaged file.
    """
    import io

    import numpy as np

    path = Path(os.path.expanduser(path))
    if path.suffix not in (".npy", ".npz", ".safetensors"):
        raise ValueError(
            f"output must end in .npy, .npz or .safetensors, got {str(path)!r}; "
            f"write it in one of these formats"
        )
    if not path.is_file():
        raise ValueError(f"output must be an existing file, got {str(path)!r}; check its name")
    raw = path.read_bytes()
    from ..heads.tensors import from_safetensors, refuse_nameless

    if path.suffix == ".safetensors":
        arrays: dict[str, NDArray[Any]] = from_safetensors(raw)[0]
    else:
        try:
            loaded = np.load(io.BytesIO(raw), allow_pickle=False)
            whole = isinstance(loaded, np.ndarray)
            arrays = {"output": loaded} if whole else {name: loaded[name] for name in loaded.files}
        except Exception as error:  # the formats raise many kinds for damaged files
            raise ValueError(
                f"output must be a whole {path.suffix} file, got {str(path)!r}, which is not "
                f"({one_line(error) if str(error) else type(error).__name__}); write it again"
            ) from error
    for name, x in arrays.items():
        refuse_nameless(x, name)
    return arrays


def only_array(arrays: dict[str, NDArray[Any]]) -> NDArray[Any]:
    """Return the array named ``output``, or the only one."""
    if "output" in arrays:
        return arrays["output"]
    if len(arrays) != 1:
        raise ValueError(
            f"output must be an array named 'output' or the only one in its file, got "
            f"{', '.join(sorted(arrays)) or 'none'}; rename it"
        )
    return next(iter(arrays.values()))


def pick(heads: Heads, head: str | None) -> list[int]:
    """Return the positions of the heads that ``--head`` names, all without it."""
    from ..base.arguments import closest

    if head is None:
        return list(range(len(heads)))
    if head in heads.names:
        return [heads.names.index(head)]
    if head.isdecimal():
        if int(head) < len(heads):
            return [int(head)]
        raise ValueError(
            f"head must be a name or a number in 0..{len(heads) - 1}, got {head}; "
            f"numbers start at 0"
        )
    raise ValueError(
        f"head must be a name or a number in 0..{len(heads) - 1}, got {head!r}"
        f"{closest(head, heads.names)}"
    )


def import_files(paths: list[Path] | None) -> None:
    """Run Python files, whose ``register`` and ``claim`` add methods and claims.

    What they define is pickled as it is, not by name: other processes do not have the file.

    Raises
    ------
    ValueError
        For a file that does not exist or does not end in ``.py``.
    RuntimeError
        If it fails: the error, and in which line.
    """
    import importlib.util
    import sys
    from contextlib import suppress

    for given in paths or ():
        path = home(given)
        if path.suffix != ".py" or not path.is_file():
            raise ValueError(f"import must be an existing .py file, got {str(path)!r}; check it")
        name, file = f"_sketchattn_import_{path.stem}", str(path.resolve())
        if getattr(sys.modules.get(name), "__file__", None) == file:
            continue
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise ValueError(f"import must be a Python file, got {str(path)!r}; check it")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise RuntimeError(
                f"{path} could not be imported: {type(error).__name__}: {error}"
                f"{_line_in(error, path)}"
            ) from error
        for pickler in ("cloudpickle", "joblib.externals.cloudpickle"):
            with suppress(ImportError):
                importlib.import_module(pickler).register_pickle_by_value(module)


def _line_in(error: Exception, path: Path) -> str:
    """Return in which line of a file an error was raised."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    lines = [x.lineno for x in frames if Path(x.filename) == path.resolve()]
    return f" (line {lines[-1]})" if lines else ""


def parse_settings(given: list[str] | None) -> dict[str, Any]:
    """Return what ``--set name=value`` says: integers, floats, true, false, none, or words.

    Examples
    --------
    >>> parse_settings(["eps=0.9", "rank=8", "law=optimal"])
    {'eps': 0.9, 'rank': 8, 'law': 'optimal'}
    """
    words: dict[str, Any] = {"true": True, "false": False, "none": None}
    found: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = (x.strip() for x in text.partition("="))
        if not equals or not name or not value or name in found:
            raise ValueError(
                f"set must be written as name=value, each name once, got {text!r}; for instance "
                f"--set eps=0.9"
            )
        if value.lower() in words:
            found[name] = words[value.lower()]
            continue
        try:
            found[name] = _number(name, value)
        except ValueError:
            found[name] = value
    return found


def home(path: Path) -> Path:
    """Return a path in which ``~`` is the home folder."""
    return Path(os.path.expanduser(path))
