"""Exact parameter importances for continual learning in JAX."""
