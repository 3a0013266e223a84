"""Deployment: merging an adapter into the dequantized base."""
