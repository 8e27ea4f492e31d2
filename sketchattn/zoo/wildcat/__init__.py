"""WildCat: attention over a weighted coreset of keys, chosen by randomly pivoted Cholesky.

Imports what every method may.
"""

from .coreset import Coreset as Coreset
from .coreset import KernelKeys as KernelKeys
from .coreset import kernel_keys as kernel_keys
from .method import WildCat as WildCat
