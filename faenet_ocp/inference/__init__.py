"""A trained model in use: predictions for structures, the ASE calculator, relaxations."""
