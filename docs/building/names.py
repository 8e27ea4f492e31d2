"""The public names of the library, and what they are called in code."""

from __future__ import annotations

from functools import cache
from typing import Any

import sketchattn as sa

# What `sa.` and nothing stand for, in the order in which names are looked up.
ROOMS = ("sketchattn", "sketchattn.theory", "sketchattn.testing", "sketchattn.sketches")


@cache
def public_names() -> dict[str, str]:
    """Return what a word in code may be, with the full name that the API documents it by."""
    found: dict[str, str] = {}
    rooms = (*ROOMS, "sketchattn.sampling", "sketchattn.partitions")
    for room in rooms:
        module: Any = sa
        for part in room.split(".")[1:]:
            module = getattr(module, part)
        for name in dir(module):
            value = getattr(module, name, None)
            if name.startswith("_") or not callable(value):
                continue
            full = f"{room}.{name}"
            found.setdefault(full, full)
            found.setdefault(full.replace("sketchattn", "sa", 1), full)
            # Alone a class or a function of two words or more; "check" and "bound" are words.
            if room in ROOMS and (name[0].isupper() or "_" in name):
                found.setdefault(name, full)
    return found
