"""Files: Hugging Face sources, EXL2 tensors and directories, measurement.json, shards."""
