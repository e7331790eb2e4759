"""How fast FAENet is beside what one would use instead: systems, models, measurement, report.

Every figure is a ratio of two things that were measured in turn, in one run, on the same batches.
"""
