"""What every room stands on: checks of arguments, one head as data, draws, and files.

It imports `kernels` only, and that to name the machine.
"""
