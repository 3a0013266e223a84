"""Training: the trainer (read it first), when to allocate, what a step keeps, and the folder of a run."""
