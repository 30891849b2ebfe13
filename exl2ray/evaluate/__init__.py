"""Perplexity, KL divergence and top-k agreement of fp16 and EXL2 directories."""
