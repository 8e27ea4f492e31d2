"""One attention problem: a head whose exact matrix and output are computed once.

Operators are imported on use: who reads or makes heads waits for NumPy only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from .base.head import Head
from .base.quiet import quiet

if TYPE_CHECKING:
    from .operators.softmax import SoftmaxAttention

Array = NDArray[Any]


class AttentionProblem(Head):
    """Hold one head of attention: Q, K, V, scale and what each query may see.

    ``A = rowsoftmax(scale Q K^T)`` over the visible keys, ``O = A V``.

    Parameters
    ----------
    q : array of shape (n_q, d)
        Queries; float16, bfloat16, float32 or float64, or anything with ``__array__`` or
        ``__dlpack__`` on the CPU.  Half precisions are computed in float32.
    k : array of shape (n_k, d)
        Keys, of the dtype of ``q``.
    v : array of shape (n_k, d_v), optional
        Values, of the dtype of ``q``.  Without them there is a matrix but no output.
    scale : float, optional
        Factor of the logits; ``None`` is ``1/sqrt(d)``, 0 is legal (uniform attention).
    causal : bool or {"top-left", "bottom-right"}, default False
        Query i sees the keys j <= i + offset.  ``True`` needs ``n_q = n_k``; otherwise the
        alignment is named: offset 0, or ``n_k - n_q``.
    key_mask : bool array of shape (n_k,), optional
        True for the keys that exist.  Masked keys are never read: they may hold NaN.
    name : str, optional
        Label used in studies and error messages.

    Attributes
    ----------
    q, k, v : ndarray
        Read-only arrays in the computing precision; ``v`` may be None.
    scale, causal, key_mask, name, offset, n_q, n_k, d, d_v, dtype
        As validated; ``key_mask`` is None or a read-only array, ``d_v`` is None without values.

    Raises
    ------
    TypeError
        For dtypes that are not floating point, mixed dtypes, gradients, GPU memory, or a mask
        that is not boolean.
    ValueError
        For shapes that do not fit, non-finite visible entries, a scale that is not finite, or
        ``causal=True`` with ``n_q != n_k``.

    Notes
    -----
    Unpacks like the triple that it holds: ``q, k, v = problem``.  Exact quantities are computed
    on first use and kept; pickling leaves them behind.  They have the precision of the problem: as
    the truth for another program take ``problem.astype(np.float64).output``, which widens the
    inputs exactly.

    Examples
    --------
    >>> import numpy as np, sketchattn as sa
    >>> problem = sa.AttentionProblem(np.zeros((2, 4)), np.ones((3, 4)), np.eye(3))
    >>> problem.output
    array([[0.33333333, 0.33333333, 0.33333333],
           [0.33333333, 0.33333333, 0.33333333]])
    """

    @property
    def exact(self) -> SoftmaxAttention:
        """The exact softmax matrix as an operator, never n_q x n_k in memory."""
        from .operators.softmax import exact_of

        return exact_of(self)

    @property
    def _solution(self) -> tuple[Array, Array]:
        from .operators.solve import solution

        return solution(self)

    @property
    def output(self) -> Array:
        """Exact output ``A V`` (n_q, d_v), read-only; rows that see no key are zero.

        Raises ValueError without values, and for logits that overflow the computing precision.
        """
        _ = self.values
        return self._solution[0]

    @property
    def logsumexp(self) -> Array:
        """Natural logarithm of the row sums of ``exp(L)`` (n_q,), -inf for an empty row."""
        return self._solution[1]


quiet(AttentionProblem, "_solution")
