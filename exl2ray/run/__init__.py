"""Running EXL2 models where others run them: one quantised linear as a torch module, and the plugins built on it.

Works for every EXL2 file, whatever wrote it; knows nothing of converting.
"""
