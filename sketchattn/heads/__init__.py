"""Heads as people have them: files, made families, and how hard a head is; bundled data beside.

Imports ``problem``, ``operators`` and what is below.
"""
