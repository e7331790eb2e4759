"""The registered trainer: what a run owns, what a step does, what is logged.

fairchem's unit and torchtnt's loop are extended here, not copied.
"""
