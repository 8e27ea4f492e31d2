"""Attention as matrix approximation: study, validate, and serve as the CPU reference.

Softmax attention is a row-stochastic matrix ``A = rowsoftmax(scale Q K^T)`` and its output is
``O = A V``; every efficient attention replaces ``A`` by a cheaper ``Ahat``.  Names are loaded on
first use, so that importing the package costs no more than importing NumPy.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import compression as compression
    from . import partitions as partitions
    from . import perturbation as perturbation
    from . import sampling as sampling
    from . import sketches as sketches
    from . import theory as theory
    from .attention import attention as attention
    from .draws import Draw as Draw
    from .heads import Heads as Heads
    from .heads import describe as describe
    from .heads import load_heads as load_heads
    from .heads import make_heads as make_heads
    from .heads import read_heads as read_heads
    from .heads import write_heads as write_heads
    from .methods import DBA as DBA
    from .methods import JL as JL
    from .methods import Clustered as Clustered
    from .methods import ColumnSampling as ColumnSampling
    from .methods import Combiner as Combiner
    from .methods import Compressed as Compressed
    from .methods import DBABlockWeights as DBABlockWeights
    from .methods import DBAResult as DBAResult
    from .methods import DBAWeights as DBAWeights
    from .methods import Exact as Exact
    from .methods import Informer as Informer
    from .methods import Linformer as Linformer
    from .methods import LinformerFit as LinformerFit
    from .methods import Method as Method
    from .methods import Nystromformer as Nystromformer
    from .methods import Performer as Performer
    from .methods import SelectionRegret as SelectionRegret
    from .methods import Skeinformer as Skeinformer
    from .methods import SVDFloor as SVDFloor
    from .methods import TopK as TopK
    from .methods import Traits as Traits
    from .methods import UniformColumns as UniformColumns
    from .methods import VMean as VMean
    from .methods import Zero as Zero
    from .methods import dba_block as dba_block
    from .methods import dba_layer as dba_layer
    from .methods import fit_linformer as fit_linformer
    from .methods import linformer_projections as linformer_projections
    from .methods import methods as methods
    from .methods import row_statistic as row_statistic
    from .methods import selection_regret as selection_regret
    from .metrics import ErrorCertificate as ErrorCertificate
    from .metrics import ErrorReport as ErrorReport
    from .metrics import certify as certify
    from .metrics import error_report as error_report
    from .operators import AttentionOperator as AttentionOperator
    from .operators import FactoredAttention as FactoredAttention
    from .operators import ProductSketch as ProductSketch
    from .operators import SampledAttention as SampledAttention
    from .operators import SoftmaxAttention as SoftmaxAttention
    from .partitioned import PartitionedAttention as PartitionedAttention
    from .problem import AttentionProblem as AttentionProblem
    from .row_certificates import certify_rows as certify_rows
    from .study import StudyResult as StudyResult
    from .study import study as study

# name -> module that defines it
_LAZY = {
    "AttentionOperator": "operators",
    "AttentionProblem": "problem",
    "Clustered": "methods",
    "ColumnSampling": "methods",
    "Combiner": "methods",
    "Compressed": "methods",
    "DBA": "methods",
    "DBABlockWeights": "methods",
    "DBAResult": "methods",
    "DBAWeights": "methods",
    "Draw": "draws",
    "ErrorCertificate": "metrics",
    "ErrorReport": "metrics",
    "Exact": "methods",
    "FactoredAttention": "operators",
    "Heads": "heads",
    "Informer": "methods",
    "JL": "methods",
    "Linformer": "methods",
    "LinformerFit": "methods",
    "Method": "methods",
    "Nystromformer": "methods",
    "PartitionedAttention": "partitioned",
    "Performer": "methods",
    "ProductSketch": "operators",
    "SVDFloor": "methods",
    "SampledAttention": "operators",
    "SelectionRegret": "methods",
    "Skeinformer": "methods",
    "SoftmaxAttention": "operators",
    "StudyResult": "study",
    "TopK": "methods",
    "Traits": "methods",
    "UniformColumns": "methods",
    "VMean": "methods",
    "Zero": "methods",
    "attention": "attention",
    "certify": "metrics",
    "certify_rows": "row_certificates",
    "dba_block": "methods",
    "dba_layer": "methods",
    "describe": "heads",
    "error_report": "metrics",
    "fit_linformer": "methods",
    "linformer_projections": "methods",
    "load_heads": "heads",
    "make_heads": "heads",
    "methods": "methods",
    "read_heads": "heads",
    "row_statistic": "methods",
    "selection_regret": "methods",
    "study": "study",
    "write_heads": "heads",
}


__all__ = [
    "AttentionOperator",
    "AttentionProblem",
    "Clustered",
    "ColumnSampling",
    "Combiner",
    "Compressed",
    "DBA",
    "DBABlockWeights",
    "DBAResult",
    "DBAWeights",
    "Draw",
    "ErrorCertificate",
    "ErrorReport",
    "Exact",
    "FactoredAttention",
    "Heads",
    "Informer",
    "JL",
    "Linformer",
    "LinformerFit",
    "Method",
    "Nystromformer",
    "PartitionedAttention",
    "Performer",
    "ProductSketch",
    "SVDFloor",
    "SampledAttention",
    "SelectionRegret",
    "Skeinformer",
    "SoftmaxAttention",
    "StudyResult",
    "TopK",
    "Traits",
    "UniformColumns",
    "VMean",
    "Zero",
    "__version__",
    "attention",
    "certify",
    "certify_rows",
    "dba_block",
    "dba_layer",
    "describe",
    "error_report",
    "fit_linformer",
    "linformer_projections",
    "load_heads",
    "make_heads",
    "methods",
    "read_heads",
    "row_statistic",
    "selection_regret",
    "study",
    "write_heads",
]


class _Package(ModuleType):
    """The package object: a promised name is never shadowed by the module that defines it.

    ``attention``, ``methods`` and ``study`` are functions and live in modules of the same name;
    the import system binds a submodule to its package under its own name.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, ModuleType) and name in _LAZY:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


# Packages and modules that are reached as attributes.
_PACKAGES = ("compression", "partitions", "perturbation", "sampling", "sketches", "theory")


def __getattr__(name: str) -> object:
    if name in _PACKAGES:
        return import_module(f".{name}", __name__)
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, *_PACKAGES]
