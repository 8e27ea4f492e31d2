# The public names of the room, each once; see ``__init__.pyi`` of the package.

from .attention_check import check_attention as check_attention
from .report import AttentionReport as AttentionReport
from .report import CaseRecord as CaseRecord
