"""Sampling of columns: the laws, the draws with their exact weights, and leverage scores."""

from .clustering import Clusters as Clusters
from .clustering import around as around
from .clustering import kmeans as kmeans
from .clustering import nearest as nearest
from .draws import ColumnDraw as ColumnDraw
from .draws import check_probabilities as check_probabilities
from .draws import inclusion_probabilities as inclusion_probabilities
from .draws import sample_columns as sample_columns
from .draws import sample_gumbel as sample_gumbel
from .draws import sample_poisson as sample_poisson
from .draws import sample_uniform as sample_uniform
from .draws import sample_with_replacement as sample_with_replacement
from .draws import self_normalize as self_normalize
from .landmarks import chosen_rows as chosen_rows
from .landmarks import pivoted_rows as pivoted_rows
from .landmarks import segment_labels as segment_labels
from .landmarks import segment_means as segment_means
from .laws import LAWS as LAWS
from .laws import check_unbiased as check_unbiased
from .laws import pilot_rows as pilot_rows
from .laws import probabilities as probabilities
from .leverage import css_relative_error as css_relative_error
from .leverage import fast_sketch_rows as fast_sketch_rows
from .leverage import leverage_approx_factor as leverage_approx_factor
from .leverage import leverage_quality as leverage_quality
from .leverage import leverage_scores as leverage_scores
from .leverage import leverage_scores_fast as leverage_scores_fast
from .ridge import ExponentialKernel as ExponentialKernel
from .ridge import PsdCheck as PsdCheck
from .ridge import RecursiveRidge as RecursiveRidge
from .ridge import d_eff as d_eff
from .ridge import nystrom_factor as nystrom_factor
from .ridge import ridge_leverage as ridge_leverage
from .ridge import ridge_leverage_recursive as ridge_leverage_recursive
from .ridge import ridge_psd_check as ridge_psd_check

__all__ = [
    "Clusters",
    "ColumnDraw",
    "ExponentialKernel",
    "LAWS",
    "PsdCheck",
    "RecursiveRidge",
    "around",
    "check_probabilities",
    "check_unbiased",
    "chosen_rows",
    "css_relative_error",
    "d_eff",
    "fast_sketch_rows",
    "inclusion_probabilities",
    "kmeans",
    "leverage_approx_factor",
    "leverage_quality",
    "leverage_scores",
    "leverage_scores_fast",
    "nearest",
    "nystrom_factor",
    "pilot_rows",
    "pivoted_rows",
    "probabilities",
    "ridge_leverage",
    "ridge_leverage_recursive",
    "ridge_psd_check",
    "sample_columns",
    "sample_gumbel",
    "sample_poisson",
    "sample_uniform",
    "sample_with_replacement",
    "segment_labels",
    "segment_means",
    "self_normalize",
]


def __dir__() -> list[str]:
    return __all__
