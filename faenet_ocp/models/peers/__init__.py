"""The networks that the paper compares FAENet with, each in its own file, as their papers describe them."""
