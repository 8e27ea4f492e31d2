"""Checks of other people's attention: reports of what is wrong with it, and by how much.

``check_attention`` judges a function by derived tolerances and proves, with the same tolerances,
that it would have seen a wrong one.  Imports ``functional`` and what is below.  The public names
stand in ``__init__.pyi`` and are loaded on first use.
"""

from ..base.names import attach

__getattr__, __dir__, __all__ = attach(__name__)
