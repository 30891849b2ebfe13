"""Calibration rows of tokens, from the built-in text or from the user's own data."""
