"""Claims about attention as matrix approximation, and the engine that checks them.

A claim is a published or derived statement with its constants, assumptions and source; checking
it on a problem gives a verdict: holds, violated, vacuous, not applicable or inconclusive.
``claims()`` lists them, ``check(id, problem)`` checks one, ``validate()`` checks many.  The bounds
themselves are plain functions of the topics, for instance ``sketchattn.theory.sketching``.  The
public names stand in ``__init__.pyi`` and are loaded on first use.

One room for the engine, and one for each topic, named like its chapter of the book.  Imports
``zoo`` and what is below.
"""

from ..base.names import attach

__getattr__, __dir__, __all__ = attach(__name__)
