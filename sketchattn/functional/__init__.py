"""``attention``: many heads, batches, grouped keys and masks in, one output out.

Imports ``zoo`` and what is below.
"""
