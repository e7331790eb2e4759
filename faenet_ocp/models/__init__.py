"""Networks, as in the papers, and frame averaging around any of them.

A model takes tensors and gives tensors; speed is put in from outside (`kernels`).
"""
