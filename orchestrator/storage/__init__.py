"""Where things lie: fsspec, s3fs."""
