"""Submission to SLURM, the program of each rank, and its first lines."""
