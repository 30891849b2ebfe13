"""exl2ray: Hugging Face language models to EXL2, on one GPU or on a Ray cluster.

Importing this package imports neither torch nor ray; the rooms below do so when they are needed.
``exl2ray.convert`` tells the whole story on one screen.
"""

__version__ = "0.1.0"
