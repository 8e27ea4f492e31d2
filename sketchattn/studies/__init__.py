"""Studies: error against rank over heads, methods, ranks and seeds; journal, summary, pictures.

Imports ``theory`` and what is below.
"""
