"""Submission to SLURM, the program of each rank, and its first lines.

docs/slurm.md says which traps it avoids.
"""
