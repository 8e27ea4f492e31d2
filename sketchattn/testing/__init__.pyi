# The public names of the room, each once; see ``__init__.pyi`` of the package.

from .attention_check import check_attention as check_attention
from .comparison import Comparison as Comparison
from .comparison import compare as compare
from .comparison import rounding_floor as rounding_floor
from .golden import GoldenRecord as GoldenRecord
from .golden import GoldenReport as GoldenReport
from .golden import check_golden as check_golden
from .golden import read_golden as read_golden
from .ports import MethodReport as MethodReport
from .ports import check_method as check_method
from .report import AttentionReport as AttentionReport
from .report import CaseRecord as CaseRecord
from .settling import write_golden as write_golden
from .vectors import GoldenCase as GoldenCase
