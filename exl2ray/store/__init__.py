"""The work directory: atomic commits, immutable records, resume scan, events.

Durable before acknowledged: a worker writes the files of an item, then its record, then returns. ``workdir.py`` is the
way in for the driver; workers get a ``Store`` (``fs.py``) and use ``Records`` (``records.py``) and ``tensors.py``.
"""
