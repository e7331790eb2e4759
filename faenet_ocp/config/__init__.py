"""YAML to a validated, typed configuration: the schema, merging of files and flags, messages that name the key.

Nothing here builds anything or imports torch.
"""
