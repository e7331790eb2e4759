"""What happens before training, once: download, text to LMDB, packing.

Behind `scripts/`; nothing of it runs in training.
"""
