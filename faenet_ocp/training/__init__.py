"""The registered trainer: what a run owns, what a step does, what is logged."""
