"""Small generated data in OC20's formats: adsorbates on slabs with effective-medium-theory labels.

For `make demo` and the tests; the splits are as honest as OC20's.
"""
