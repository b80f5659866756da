"""Datasets: COCO annotations packed into webdataset tars, indexed, and read in an exact order."""
