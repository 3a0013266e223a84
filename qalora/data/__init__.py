"""Data: rows become examples, examples become tokens and labels, tokens become batches."""
