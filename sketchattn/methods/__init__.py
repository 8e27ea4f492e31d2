"""Methods: one file each, registered once, all with the same interface."""

from ._base import Method as Method
from ._base import Traits as Traits
from ._base import make_method as make_method
from ._base import methods as methods
from .baselines import Exact as Exact
from .baselines import SVDFloor as SVDFloor
from .baselines import TopK as TopK
from .baselines import UniformColumns as UniformColumns
from .baselines import VMean as VMean
from .baselines import Zero as Zero
from .column_sampling import ColumnSampling as ColumnSampling
from .informer import Informer as Informer
from .informer import SelectionRegret as SelectionRegret
from .informer import lazy_errors as lazy_errors
from .informer import row_statistic as row_statistic
from .informer import selection_regret as selection_regret
from .jl import JL as JL
from .linformer import Linformer as Linformer
from .linformer import LinformerFit as LinformerFit
from .linformer import fit_linformer as fit_linformer
from .linformer import linformer_projections as linformer_projections
from .nystromformer import Nystromformer as Nystromformer
from .performer import Performer as Performer
from .skeinformer import Skeinformer as Skeinformer
