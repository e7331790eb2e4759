"""The networks that the paper compares FAENet with, each in its own file.

A file reads like the network's own paper; options are OCP's where OCP had a configuration for OC20.
"""
