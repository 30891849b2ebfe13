"""Kernels: Numba CUDA for GPUs, Numba njit for CPUs. Each has a plain torch reference in ``exl2ray.quant``."""
