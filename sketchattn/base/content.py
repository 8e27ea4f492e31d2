"""What a value is, as text: equal for equal content in every process, and never shortened.

A ``repr`` leaves entries of arrays out, names addresses, or shows what its author found worth
showing; a key made of it takes one value for another.
"""

from __future__ import annotations

import copyreg
import enum
import hashlib
import importlib
import sys
import types
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arguments import as_array
from .head import Head

Array = NDArray[Any]

# Longer texts of parameters are replaced by their digest.
_LONGEST = 1000
_PLAIN = (type(None), type(...), type(NotImplemented), bool, int, float, complex, str, range)
# What arrays with labels (pandas, polars, xarray) hold beside their values.
_LABELS = ("name", "names", "dims", "columns", "index", "coords", "categories")


class UnreadableError(TypeError):
    """A value has no content that can be read: ``what`` it is, and the ``remedy``."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"value must have content that can be read, got {what}; {remedy}")
        self.what = what
        self.remedy = remedy


def content(value: object) -> str:
    """Return what a value is, as text.

    Numbers, strings and containers of them look as in Python.  Arrays of any library are told
    apart by dtype, shape and the digest of their bytes; dataclasses, estimators and containers by
    what is in them; functions and classes by the name that they are imported by.

    Parameters
    ----------
    value : object

    Raises
    ------
    UnreadableError
        For what has no content that can be read: an object without a representation of its own,
        a lambda or local function, something that can be read only once, or that holds itself.

    Examples
    --------
    >>> content({"s": 8, "x": [1, 1.0, True]})
    "{'s': 8, 'x': [1, 1.0, True]}"
    >>> content(np.zeros(2))
    'array(<f8, (2,), sha256=374708fff7719dd5979ec875d56cd2286f6d3cf7ec317a3b25632aab28ec37bb)'
    """
    try:
        text = _text(value, ())
    except RecursionError:
        raise UnreadableError(f"{_type_name(type(value))} that is too deep", "flatten it") from None
    if len(text) <= _LONGEST:
        return text
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    return f"{type(value).__name__}(sha256={digest})"


def qualified_name(x: Any) -> str:
    """Return the module and the name in it of a class or a function."""
    return f"{x.__module__}.{x.__qualname__}"


def function_content(function: Any) -> str:
    """Return what a function is, as text: its name and what it computes, in any process.

    The digest is of its compiled code, its defaults, and all that it reads from around it:
    constants, and other functions of its own module with what they read.  Of other modules the
    names stand for their functions.

    Raises
    ------
    UnreadableError
        Where something that it reads has no content that can be read.

    Examples
    --------
    >>> one, two = (lambda x: x + 1), (lambda x: x + 2)
    >>> function_content(one) == function_content(two)
    False
    """
    if not isinstance(function, types.FunctionType):
        return content(function)
    found: dict[str, str] = {}
    _read_function(function, function.__module__, found)
    text = "\n".join(f"{name}={found[name]}" for name in sorted(found))
    digest = _digest(text.encode(errors="surrogatepass"))
    return f"{qualified_name(function)}(sha256={digest})"


def _read_function(function: types.FunctionType, home: str, found: dict[str, str]) -> None:
    """Add a function, and what it reads, to what is found by name."""
    name = qualified_name(function)
    if name in found:
        return
    found[name] = ""  # it may call itself
    codes, names = [function.__code__], list[str]()
    parts = [content((function.__defaults__, function.__kwdefaults__))]
    for code in codes:  # which grows by what is defined inside
        names += code.co_names
        parts += [code.co_code.hex(), repr((code.co_names, code.co_varnames, code.co_freevars))]
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                codes.append(constant)
            else:
                parts.append("..." if constant is ... else content(constant))
    around = {x: function.__globals__[x] for x in names if x in function.__globals__}
    for label, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        around[label] = cell.cell_contents
    for label in sorted(around):
        x = around[label]
        if isinstance(x, types.FunctionType) and x.__module__ == home:
            _read_function(x, home, found)
            parts.append(f"{label} is {x.__qualname__}")
        else:
            parts.append(f"{label} = {content(x)}")
    found[name] = "\n".join(parts)


def _text(x: Any, around: tuple[int, ...]) -> str:
    """Return the content of a value inside others, which are known by their identities."""
    kind = type(x)
    if kind in _PLAIN:
        return repr(x)
    if kind is bytes:
        return repr(x) if len(x) <= 64 else f"bytes({len(x)}, sha256={_digest(x)})"
    if id(x) in around:
        raise UnreadableError(f"{_type_name(kind)} that holds itself", "unroll it")
    if isinstance(x, Iterator):
        raise UnreadableError(f"{_type_name(kind)}, which can be read only once", "make it a list")
    inside = (*around, id(x))
    for read in (_named, _array, _labelled, _container, _object):
        found = read(x, inside)
        if found is not None:
            return found
    raise UnreadableError(
        f"an object of {_type_name(kind)}", "make it a dataclass, or give it __reduce__"
    )


def _digest(x: Any) -> str:
    return hashlib.sha256(x).hexdigest()


def _type_name(kind: type) -> str:
    if kind.__module__ == "builtins":
        return kind.__qualname__
    return qualified_name(kind)


def _all(items: Any, inside: tuple[int, ...]) -> list[str]:
    return [_text(x, inside) for x in items]


# --- what has a name ----------------------------------------------------------------------------


def _named(x: Any, inside: tuple[int, ...]) -> str | None:
    """Return modules, classes and functions by name, members of enumerations by theirs."""
    if isinstance(x, types.ModuleType):
        return f"module {x.__name__}"
    if isinstance(x, enum.Enum):
        return f"{_type_name(type(x))}.{x.name}({_text(x.value, inside)})"
    if isinstance(x, types.GenericAlias):
        return f"{_text(x.__origin__, inside)}[{', '.join(_all(x.__args__, inside))}]"
    if isinstance(x, np.ufunc):
        return f"numpy.{x.__name__}"
    name = getattr(x, "__qualname__", None)
    if not isinstance(name, str):
        return None
    owner = getattr(x, "__self__", None)
    if owner is not None and not isinstance(owner, types.ModuleType):  # a bound method
        return f"{_text(owner, inside)}.{getattr(x, '__name__', name)}"
    module = getattr(x, "__module__", None) or "builtins"
    found: Any = sys.modules.get(module)
    try:
        found = importlib.import_module(module) if found is None else found
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        found = None
    if found is x:
        return name if module == "builtins" else f"{module}.{name}"
    what = "a lambda" if name.endswith("<lambda>") else f"{name!r}, which cannot be imported"
    raise UnreadableError(what, "define it at the top level of a module")


# --- arrays -------------------------------------------------------------------------------------


def _array(x: Any, inside: tuple[int, ...]) -> str | None:
    """Return problems, arrays, numbers of NumPy, buffers and sparse matrices."""
    if isinstance(x, Head):
        return f"{_type_name(type(x))}({x.name!r}, sha256={x.digest})"
    if isinstance(x, np.generic):
        item = x.item()
        if type(item) in _PLAIN:
            return repr(item)
        return f"{type(x).__name__}({_entries(np.asarray(x), inside)})"
    if isinstance(x, np.ma.MaskedArray):
        mask = _entries(np.ma.getmaskarray(x), inside)
        return f"masked({_entries(np.asarray(x.data), inside)}, {mask})"
    if isinstance(x, np.ndarray):
        kind = "array" if type(x) is np.ndarray else _type_name(type(x))
        return f"{kind}({_entries(np.asarray(x), inside)})"
    if isinstance(x, bytearray | memoryview) or _type_name(type(x)) == "array.array":
        return f"{type(x).__name__}({_entries(np.asarray(x), inside)})"
    if _is_sparse(x):
        parts = x.tocoo()
        where = parts.coords if hasattr(parts, "coords") else (parts.row, parts.col)
        arrays = ", ".join(_entries(np.asarray(a), inside) for a in (*where, parts.data))
        return f"{_type_name(type(x))}({x.shape}, {arrays})"
    return None


def _entries(x: Array, inside: tuple[int, ...]) -> str:
    """Return dtype, shape and entries of an array: the digest of its bytes where these are all."""
    if x.dtype.names is not None:  # bytes between the fields mean nothing
        fields = ", ".join(f"{n!r}: {_entries(x[n], inside)}" for n in x.dtype.names)
        return f"{x.shape}, {{{fields}}}"
    if x.dtype.hasobject or x.dtype.kind == "T":  # the bytes are addresses
        listed = ", ".join(_all(x.ravel().tolist(), inside))
        return f"{x.dtype.str}, {x.shape}, [{listed}]"
    # Types of other libraries, such as bfloat16, share "<V2" and "<f1".
    kind = x.dtype.name if x.dtype.kind == "V" or x.dtype.isbuiltin == 2 else x.dtype.str
    return f"{kind}, {x.shape}, sha256={_digest(np.ascontiguousarray(x).tobytes())}"


def _is_sparse(x: object) -> bool:
    sparse = sys.modules.get("scipy.sparse")  # there is none before it is loaded
    return sparse is not None and bool(sparse.issparse(x))


def _labelled(x: Any, inside: tuple[int, ...]) -> str | None:
    """Return arrays of other libraries, with what names their rows and columns."""
    if not (hasattr(x, "__array__") or hasattr(x, "__dlpack__")) or isinstance(x, type):
        return None
    labels = []
    for name in _LABELS:
        label = getattr(x, name, None)
        if label is None or callable(label) or label is x:
            continue
        labels.append(f"{name}={_text(_plain_labels(label), inside)}")
    kinds = getattr(x, "dtypes", None)
    if kinds is not None and hasattr(x, "columns"):  # a table: one precision a column
        labels.append(f"dtypes={[str(kind) for kind in kinds]}")
        columns = [x.iloc[:, i] if hasattr(x, "iloc") else x[c] for i, c in enumerate(x.columns)]
        values = f"[{', '.join(_entries(np.asarray(c), inside) for c in columns)}]"
    else:
        labels.append(f"dtype={getattr(x, 'dtype', None)!s}")
        values = _entries(_values(x), inside)
    return f"{_type_name(type(x))}({', '.join([values, *labels])})"


def _plain_labels(label: Any) -> Any:
    """Return labels that are a mapping of arrays, as of xarray, without what they are part of."""
    if isinstance(label, Mapping):
        return {name: np.asarray(values) for name, values in label.items()}
    return label


def _values(x: Any) -> Array:
    if callable(getattr(x, "detach", None)):  # a tensor with a gradient
        x = x.detach()
    try:
        return as_array(x, "value")
    except (TypeError, ValueError) as error:
        reason = f"{_type_name(type(x))}, which NumPy cannot read ({str(error).split('; ')[0]})"
        raise UnreadableError(reason, "pass an array") from error


# --- containers and objects ---------------------------------------------------------------------


def _container(x: Any, inside: tuple[int, ...]) -> str | None:
    """Return mappings, sequences and sets, subclasses with their name and attributes."""
    kind = type(x)
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        named = zip(x._fields, _all(x, inside), strict=True)
        return f"{_type_name(kind)}({', '.join(f'{name}={text}' for name, text in named)})"
    if _is_dataclass(x):
        return None
    if isinstance(x, Mapping):
        pairs = ((_text(k, inside), _text(v, inside)) for k, v in x.items())
        text = f"{{{', '.join(f'{k}: {v}' for k, v in pairs)}}}"
    elif isinstance(x, Set):
        text = f"{{{', '.join(sorted(_all(x, inside)))}}}"
    elif isinstance(x, list | tuple):
        ends = "[]" if isinstance(x, list) else "()"
        comma = "," if isinstance(x, tuple) and len(x) == 1 else ""
        text = f"{ends[0]}{', '.join(_all(x, inside))}{comma}{ends[1]}"
    elif isinstance(x, Sequence) and not isinstance(x, str | bytes):
        text = f"[{', '.join(_all(x, inside))}]"
    else:
        return None
    if kind in (dict, list, tuple):
        return text
    return f"{_type_name(kind)}({text}{_attributes(x, inside)})"


def _attributes(x: Any, inside: tuple[int, ...]) -> str:
    """Return the attributes of a subclass of a built-in type."""
    built_in = isinstance(x, dict | list | tuple | set | frozenset)
    own = dict(getattr(x, "__dict__", {})) if built_in else {}
    if getattr(x, "default_factory", None) is not None:
        own["default_factory"] = x.default_factory
    return "".join(f", {name}={_text(own[name], inside)}" for name in sorted(own))


def _is_dataclass(x: Any) -> bool:
    return hasattr(type(x), "__dataclass_fields__")


def _object(x: Any, inside: tuple[int, ...]) -> str | None:
    """Return paths, dataclasses, estimators, and what says how it is made again."""
    kind = type(x)
    if isinstance(x, PurePath):
        return f"{kind.__name__}({str(x)!r})"
    if callable(getattr(x, "get_params", None)):
        pairs = sorted(x.get_params(deep=False).items())
        return f"{_type_name(kind)}({', '.join(f'{n}={_text(v, inside)}' for n, v in pairs)})"
    if _is_dataclass(x):
        fields = {name: getattr(x, name) for name in kind.__dataclass_fields__ if hasattr(x, name)}
        listed = ", ".join(f"{name}={_text(v, inside)}" for name, v in fields.items())
        return f"{_type_name(kind)}({listed})"
    methods = ("__reduce_ex__", "__reduce__", "__getstate__")
    default: Any = object
    as_any_object = all(getattr(kind, n, None) is getattr(default, n, None) for n in methods)
    known: Any = copyreg.dispatch_table.get(kind)
    if known is None and as_any_object and kind.__repr__ is default.__repr__:
        return None
    try:
        recipe = x.__reduce_ex__(4) if known is None else known(x)
    except Exception:  # files, locks and the like: each has a kind of its own
        return None
    if isinstance(recipe, str):  # the name of something in a module
        return f"{getattr(x, '__module__', kind.__module__)}.{recipe}"
    # Iterators over items and over pairs stand for these.
    parts = [list(part) if i > 2 and part is not None else part for i, part in enumerate(recipe)]
    return f"{_type_name(kind)}({', '.join(_recipe_text(part, inside) for part in parts)})"


def _recipe_text(part: Any, inside: tuple[int, ...]) -> str:
    if getattr(part, "__module__", None) in ("copyreg", "builtins") and callable(part):
        return str(part.__name__)
    return _text(part, inside)
