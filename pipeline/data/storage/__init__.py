"""Where the files of datasets and caches are read from: folders, HTTP, object storage, with a cache of shards."""
