"""Choosing options: from measured errors and a bitrate to what every linear is quantised with."""
