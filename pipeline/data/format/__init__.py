"""The dataset on disk: ``dataset.json``, webdataset tars and their Arrow indexes."""
