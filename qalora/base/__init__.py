"""The frozen base: where its weights are, how they are loaded in 4 bits, what they cost."""
