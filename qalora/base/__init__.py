"""The frozen base: where its weights are, how they are loaded in 4 bits, how it computes (prefixes, norms, loss), what
it costs."""
