"""Tuning a finished EXL2 model on the end loss: integers, norm weights and biases, against what the source model says.

Trained is what the format stores anyway; scales, groups, permutations and widths stay as they are, so the result has the size
of the start and loads wherever the start loads. `run.py` is the story, `module.py` one module with what is trained of it,
`training.py` a step, forward and backward module by module.
"""
