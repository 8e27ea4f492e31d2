"""What A and Ahat are: the exact matrix, and the few kinds of approximations.

Each is a ``scipy.sparse.linalg.LinearOperator`` of shape (n_q, n_k): ``ahat @ v`` and
``ahat.T @ y`` cost what the structure costs, and nothing of size n_q x n_k is formed unless
``to_dense`` is asked for.  Imports ``partitions``, ``base`` and ``kernels``.
"""
