"""The steps of a conversion, over one work directory and one set of workers. `exl2ray.convert` calls them in order."""

from exl2ray.steps.job import Job, rows_hash

__all__ = ["Job", "rows_hash"]
