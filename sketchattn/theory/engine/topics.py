"""Topics are found, not listed: every other room of ``sketchattn.theory`` is one."""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module

ENGINE = __package__ or "sketchattn.theory.engine"


@cache
def load() -> None:
    """Import every topic, which registers its claims, instances and curves."""
    theory = ENGINE.rpartition(".")[0]
    for module in pkgutil.iter_modules(import_module(theory).__path__):
        if f"{theory}.{module.name}" != ENGINE:
            import_module(f"{theory}.{module.name}")
