"""Training: the trainer (read it first), when to allocate, and the label-only loss."""
