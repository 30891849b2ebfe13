"""The work directory: atomic commits, immutable records, resume scan, events."""
