"""Small generated data in OC20's formats: adsorbates on slabs with effective-medium-theory labels."""
