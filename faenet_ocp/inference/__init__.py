"""A trained model in use: predictions for structures, the ASE calculator, relaxations.

The numbers are those of `--mode validate`.
"""
