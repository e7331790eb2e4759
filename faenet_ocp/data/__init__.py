"""From a record in a file to a batch on its way to the model: reading, fields, edges, transforms, loading.

A new data format is one file here that yields the fields of a batch.
"""
