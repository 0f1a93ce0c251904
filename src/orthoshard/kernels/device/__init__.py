"""What runs on the device, in Triton's language: Python's syntax with types of its own, which pyright cannot read.

Only these files import Triton; the files above check, choose tiles and launch. Nothing is imported here.
"""
