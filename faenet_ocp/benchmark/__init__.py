"""How fast FAENet is beside what one would use instead: systems, models, measurement, report."""
