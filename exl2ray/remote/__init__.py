"""Models that are not on this disk: ``hf://owner/name[@revision][/folder]``, ``s3://bucket/prefix``, ``gs://bucket/prefix``."""
