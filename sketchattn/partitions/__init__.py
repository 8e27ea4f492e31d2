"""Plans: which keys a row reads itself and which through regions, and the patterns that make them.

Imports ``base``.
"""

from .patterns import PATTERNS as PATTERNS
from .patterns import block_of_rank as block_of_rank
from .patterns import check_block as check_block
from .patterns import check_labels as check_labels
from .patterns import default_block as default_block
from .patterns import label_plan as label_plan
from .patterns import make_plan as make_plan
from .plans import Plan as Plan
from .ragged import Ragged as Ragged

__all__ = [
    "PATTERNS",
    "Plan",
    "Ragged",
    "block_of_rank",
    "check_block",
    "check_labels",
    "default_block",
    "label_plan",
    "make_plan",
]


def __dir__() -> list[str]:
    return __all__
