"""From a model and a split to numbers, tables, plots and files of predictions.

Facts go to JSON; tables and plots are made from it.
"""
