"""Datasets: annotated pages packed into webdataset tars with Arrow indexes, and read in an exact order."""
