"""What every room stands on: checks of arguments, one head as data, draws, and files.

It imports nothing of the package.
"""
