"""Forwards that we compute ourselves: read install.py first."""
