"""How fast FAENet is beside what one would use instead: systems, models, measurement, report.

Raw times go to JSON; tables and pictures are made from it.
"""
