"""What is trained on: normalised <-> physical units, losses, references of energies.

The only owners of units.
"""
