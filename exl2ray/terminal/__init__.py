"""What people type and see: flags, messages, events on a screen or as lines of JSON, and how the program ends."""
