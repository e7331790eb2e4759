"""What a reader can check on checkpoints of their own: symmetry of predictions, and what networks tell apart.

Modules are imported by name: nothing is re-exported here.
"""
