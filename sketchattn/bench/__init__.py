"""Benchmarks against the real competitor: a harness, a file a family, and what runs them all.

Imports everything but ``studies`` and the command line.  Methods and competitors are imported
where they are measured, so that listing the benchmarks is quick.
"""
