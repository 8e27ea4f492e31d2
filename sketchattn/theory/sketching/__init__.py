"""Sketching and sampling: the bounds as plain functions, and (on import) the claims made of them.

The product ``A V`` is approximated by ``A S^T S V`` with a random ``S`` (r, n) and
``E[S^T S] = I``.  For every operator that the library draws the mean square error is known
exactly (``amm_expected_sqerr``); around these equalities stand the published and derived bounds:
Johnson-Lindenstrauss dimensions (``jl_*``), subspace embeddings (``ose_*``), approximate matrix
multiplication (``amm_*``), randomized SVD (``rsvd_*``) and norm estimates after the fact.

In statements about norms and subspaces ``eps`` refers to SQUARED norms,
``| |Sx|^2 - |x|^2 | <= eps |x|^2``; functions about the singular values themselves end in
``_sv``.  Functions broadcast over numbers and arrays and give a number for numbers.  Dimensions are
rounded up: of numbers an ``int`` of any size, or ``inf`` where the formula is beyond all floats; of
arrays int64, or float64 where an entry is 2^63 or more.
"""

from __future__ import annotations

from . import embedding_claims as embedding_claims
from . import leverage_claims as leverage_claims
from . import lowrank_claims as lowrank_claims
from . import moment_claims as moment_claims
from . import product_claims as product_claims
from .embeddings import inner_product_min_dim as inner_product_min_dim
from .embeddings import inner_product_tail as inner_product_tail
from .embeddings import jl_min_dim as jl_min_dim
from .embeddings import jl_min_dim_achlioptas as jl_min_dim_achlioptas
from .embeddings import jl_min_dim_chebyshev as jl_min_dim_chebyshev
from .embeddings import jl_min_dim_dg as jl_min_dim_dg
from .embeddings import jl_min_dim_exact_gaussian as jl_min_dim_exact_gaussian
from .embeddings import jl_sparse_chebyshev as jl_sparse_chebyshev
from .embeddings import jl_tail_gaussian as jl_tail_gaussian
from .embeddings import ose_countsketch as ose_countsketch
from .embeddings import ose_gaussian as ose_gaussian
from .embeddings import ose_gaussian_sv as ose_gaussian_sv
from .embeddings import ose_leverage as ose_leverage
from .embeddings import ose_sjlt as ose_sjlt
from .embeddings import ose_srht as ose_srht
from .embeddings import ose_uniform as ose_uniform
from .lowrank import eckart_young_floor as eckart_young_floor
from .lowrank import hutchinson_fro as hutchinson_fro
from .lowrank import hutchinson_min_dim as hutchinson_min_dim
from .lowrank import hutchinson_tail as hutchinson_tail
from .lowrank import known_spectrum as known_spectrum
from .lowrank import posterior_factor as posterior_factor
from .lowrank import posterior_spectral_bound as posterior_spectral_bound
from .lowrank import power_lower_bound as power_lower_bound
from .lowrank import rsvd_expected as rsvd_expected
from .lowrank import rsvd_tail as rsvd_tail
from .moments import AmmStats as AmmStats
from .moments import amm_expected_sqerr as amm_expected_sqerr
from .moments import amm_stats as amm_stats
from .products import amm_entrywise_min_dim as amm_entrywise_min_dim
from .products import amm_fro_markov as amm_fro_markov
from .products import amm_fro_sampling_tail as amm_fro_sampling_tail
from .products import amm_gaussian_tail as amm_gaussian_tail
from .products import amm_spectral_bernstein as amm_spectral_bernstein
from .products import amm_spectral_expected as amm_spectral_expected
from .products import amm_spectral_min_dim as amm_spectral_min_dim

__all__ = [
    "AmmStats",
    "amm_entrywise_min_dim",
    "amm_expected_sqerr",
    "amm_fro_markov",
    "amm_fro_sampling_tail",
    "amm_gaussian_tail",
    "amm_spectral_bernstein",
    "amm_spectral_expected",
    "amm_spectral_min_dim",
    "amm_stats",
    "eckart_young_floor",
    "hutchinson_fro",
    "hutchinson_min_dim",
    "hutchinson_tail",
    "inner_product_min_dim",
    "inner_product_tail",
    "jl_min_dim",
    "jl_min_dim_achlioptas",
    "jl_min_dim_chebyshev",
    "jl_min_dim_dg",
    "jl_min_dim_exact_gaussian",
    "jl_sparse_chebyshev",
    "jl_tail_gaussian",
    "known_spectrum",
    "ose_countsketch",
    "ose_gaussian",
    "ose_gaussian_sv",
    "ose_leverage",
    "ose_sjlt",
    "ose_srht",
    "ose_uniform",
    "posterior_factor",
    "posterior_spectral_bound",
    "power_lower_bound",
    "rsvd_expected",
    "rsvd_tail",
]


def __dir__() -> list[str]:
    return __all__
