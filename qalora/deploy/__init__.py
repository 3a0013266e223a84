"""Deployment: merging an adapter into its base, exporting it, GGUF, and checking the result."""
