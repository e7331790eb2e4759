"""What every other package may use: checks of options, atomic files, worker processes, compiled functions, elements.

It imports nothing of this project.
"""
