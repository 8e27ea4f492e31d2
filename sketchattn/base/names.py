"""Public names stand once, in the stub of their package, and are loaded on first use."""

from __future__ import annotations

import ast
import pkgutil
from collections.abc import Callable
from typing import Any

import lazy_loader


def attach(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` of a package from its ``__init__.pyi``.

    What ``lazy_loader.attach_stub`` does, also where the package is inside a zip file.

    Parameters
    ----------
    package : str
        Its full name; the stub holds lines ``from .module import Name as Name``, or
        ``from . import module as module`` for a module that is reached as an attribute.
    """
    names: dict[str, list[str]] = {}
    for node in ast.parse(pkgutil.get_data(package, "__init__.pyi") or b"").body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names.setdefault(node.module or "", []).extend(x.name for x in node.names)
    modules = names.pop("", [])
    loaded: tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]
    loaded = lazy_loader.attach(package, modules, names)
    return loaded
