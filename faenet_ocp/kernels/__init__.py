"""Faster modules in place of a model's own, with the same state dict and the same numbers.

Nothing in `models` knows of it.
"""
