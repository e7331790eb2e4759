"""From the command line to processes: one machine, a sweep, SLURM.

Everything is checked before anything starts; what a run does is decided in `training` and `evaluation`.
"""
