"""Performer: the exponential kernel by random features, in logarithms from end to end.

Imports what every method may.
"""

from .features import FEATURES as FEATURES
from .features import feature_mse as feature_mse
from .features import gaussian_directions as gaussian_directions
from .method import Performer as Performer
from .prefix import PrefixAttention as PrefixAttention
