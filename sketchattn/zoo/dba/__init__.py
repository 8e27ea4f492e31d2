"""DBA: bilinear factorisation by landmarks, without training, and the published layer.

Imports what every method may.
"""

from .method import DBA as DBA
from .official import DBABlockWeights as DBABlockWeights
from .official import DBAResult as DBAResult
from .official import DBAWeights as DBAWeights
from .official import dba_block as dba_block
from .official import dba_layer as dba_layer
