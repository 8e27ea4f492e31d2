"""Compiled kernels: they take prepared arrays, never validate, never raise, never draw.

Results are the same bits for any number of threads, in any process, whatever ran before.  Kernels
may run in a process that was forked after its parent had run some (``multiprocessing`` with
"fork", data loaders): there they use one thread, under every threading layer of Numba.  Where that
cannot be had (processors other than x86-64 and ARM64), the child raises a RuntimeError that names
the start method "spawn".  A thread of the parent that compiles while another forks leaves Numba's
lock shut in the child: fork before, or after the first call.
"""
