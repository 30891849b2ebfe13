"""What runs on workers: the passes, and how several workers share one. Knows nothing of Ray."""
