"""The report of a study as one page of HTML: words, interactive curves, tables.

Imports what the studies measure and what is below; nothing here computes an error.
"""
