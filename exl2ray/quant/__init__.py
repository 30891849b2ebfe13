"""Pure numerics of EXL2 quantisation: functions from arrays to arrays, no files, no Ray, no progress.

Weight orientation, stated once: a linear layer's weight is ``w``, shape (K, N) = (in_features, out_features), so
``y = x @ w + bias``: the transpose of PyTorch's ``nn.Linear.weight``. "Row" of a weight means one input feature.
Rows in *act-order* are sorted by falling Hessian diagonal; ``perm[k]`` is the input feature in act-order row k.
Groups are consecutive runs of act-order rows that share a bit width and one set of scales.

Results depend on shapes and a device's total memory, never on what is free at the moment; sums have a fixed order and no
atomics. Two runs on one kind of device give the same bytes, whatever the number of workers.
"""
