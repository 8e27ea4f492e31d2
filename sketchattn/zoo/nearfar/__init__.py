"""Near keys exactly, far clusters by their moments.

Imports what every method may.
"""

from .method import NearFar as NearFar
