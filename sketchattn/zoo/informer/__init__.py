"""Informer: few queries exact, chosen by a statistic, the others filled.

Imports what every method may.
"""

from .lazy import lazy_errors as lazy_errors
from .method import Informer as Informer
from .selection import SelectionRegret as SelectionRegret
from .selection import selection_regret as selection_regret
from .statistics import row_statistic as row_statistic
