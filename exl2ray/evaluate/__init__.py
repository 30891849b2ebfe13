"""Models run and compared: perplexity, KL divergence and agreement of fp16 and EXL2 directories and GGUF files; answers."""
