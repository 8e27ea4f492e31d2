"""The methods: one file each, a folder where one is large, all behind one interface.

Imports ``errors``, ``sampling``, ``sketches``, ``problem``, ``operators`` and what is below; a
method may import another.  Every module of this room is loaded with it, which registers its
methods: a new one needs a file here and nothing else in this room.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
