"""The only package that imports ray: session, workers, pool, schedule."""
