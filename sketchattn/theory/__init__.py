"""Claims about attention as matrix approximation, and the engine that checks them.

A claim is a published or derived statement with its constants, assumptions and source; checking
it on a problem gives a verdict: holds, violated, vacuous, not applicable or inconclusive.
``claims()`` lists them, ``check(id, problem)`` checks one, ``validate()`` checks many.  The bounds
themselves are plain functions in ``sketchattn.theory.sketching``.
"""

from ._curves import ErrorBound as ErrorBound
from ._curves import error_bounds as error_bounds
from ._engine import Assumption as Assumption
from ._engine import Context as Context
from ._engine import bound as bound
from ._engine import check as check
from ._engine import claim as claim
from ._engine import claims as claims
from ._engine import default_factory as default_factory
from ._instances import Instance as Instance
from ._instances import instance as instance
from ._instances import instances as instances
from ._instances import spiked_attention as spiked_attention
from ._records import Claim as Claim
from ._records import Observations as Observations
from ._records import Series as Series
from ._records import Verdict as Verdict
from ._validate import ValidationResult as ValidationResult
from ._validate import validate as validate
