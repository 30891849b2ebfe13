"""Calibration rows of tokens, from the built-in text or from a Parquet file."""
