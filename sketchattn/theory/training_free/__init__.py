"""Training-free competitors: what is promised of them with constants, and what is not so.

Weighted coresets (WildCat), sorted blocks beside a sample (HyperAttention, KDEformer), thinning
(Thinformer), and keys drawn with known probabilities (MagicPIG, vAttention).
"""

from . import sampled_claims as sampled_claims
from .sampled import composed_error as composed_error
from .sampled import floor_mean as floor_mean
from .sampled import joint_probability as joint_probability
from .sampled import magicpig_variance as magicpig_variance
from .sampled import merged_mean as merged_mean
from .sampled import row_statistics as row_statistics
