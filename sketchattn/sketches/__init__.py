"""Sketches: random matrices S (r, n) with ``E[S^T S] = I``, one immutable object a draw."""

from . import compression as compression
from .base import Sketch as Sketch
from .base import make_sketch as make_sketch
from .base import sketches as sketches
from .dense import DenseSketch as DenseSketch
from .dense import GaussianSketch as GaussianSketch
from .dense import GivenSketch as GivenSketch
from .dense import RademacherSketch as RademacherSketch
from .dense import UniformSketch as UniformSketch
from .dense import check_sketch as check_sketch
from .hashing import CountSketch as CountSketch
from .hashing import OSNAPSketch as OSNAPSketch
from .hashing import SJLTSketch as SJLTSketch
from .orthogonal import DCTSketch as DCTSketch
from .orthogonal import HaarSketch as HaarSketch
from .orthogonal import SRHTSketch as SRHTSketch
from .sparse import LessUniformSketch as LessUniformSketch
from .sparse import SparseSketch as SparseSketch

__all__ = [
    "CountSketch",
    "DCTSketch",
    "DenseSketch",
    "GaussianSketch",
    "GivenSketch",
    "HaarSketch",
    "LessUniformSketch",
    "OSNAPSketch",
    "RademacherSketch",
    "SJLTSketch",
    "SRHTSketch",
    "Sketch",
    "SparseSketch",
    "UniformSketch",
    "check_sketch",
    "compression",
    "make_sketch",
    "sketches",
]


def __dir__() -> list[str]:
    return __all__
