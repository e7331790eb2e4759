"""From the command line to processes: one machine, a sweep, SLURM."""
