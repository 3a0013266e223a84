"""The adapter: gated low-rank layers, AB-LoRA scores, allocation of the rank budget, surgery."""
