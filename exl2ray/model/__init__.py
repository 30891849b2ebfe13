"""Models: the architecture table, module lists, and the block forward passes that calibration needs."""
