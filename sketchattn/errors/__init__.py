"""How far Ahat is from A: reports, certificates of outputs and of rows, perturbation of logits.

Imports ``heads``, ``problem``, ``operators`` and what is below.
"""

from . import perturbation as perturbation
