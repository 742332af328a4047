"""Measurements against other implementations: same weights, same type, same threads, one run."""
