"""What arguments of the command line stand for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..heads.container import Heads

from .application import one_line

HEADS_HELP = (
    "A .safetensors or .npz file, the name of a bundled set (minilm), or made heads such as "
    "clustered:n=512,d=64,heads=2,rng=0."
)
CASES_HELP = "Names of cases, patterns such as 'exact-*' among them; all by default."


def parse_heads(text: str) -> Heads:
    """Return the heads that an argument names: a file, a bundled set, or a family to make.

    Parameters
    ----------
    text : str
        ``FILE``, ``NAME``, or ``FAMILY:n=N[,d=D][,heads=H][,rng=SEED][,PARAMETER=X]``; the seed is
        0 unless given, so that the same words are the same heads.

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

    path = Path(os.path.expanduser(text))
    if path.suffix in (".safetensors", ".npz") or path.is_file():
        return read_heads(path)
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


def read_output(path: Path) -> NDArray[Any]:
    """Return the array of an output file: ``.npy``, or ``output`` or the only one of the others.

    Raises
    ------
    ValueError
        For another ending, no such file, a damaged file, or several arrays without ``output``.
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
    from ..heads.files import from_safetensors, refuse_nameless

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


def home(path: Path) -> Path:
    """Return a path in which ``~`` is the home folder."""
    return Path(os.path.expanduser(path))
