"""Edges: their vectors (differentiated, for models) and neighbour lists with whole shells (for data and calculators).

edge_index[0] is the neighbour j, edge_index[1] the centre i.
"""
