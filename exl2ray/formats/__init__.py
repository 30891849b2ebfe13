"""Files: Hugging Face sources, EXL2 tensors and directories, GGUF, measurement.json, shards."""
