"""Is the merged model the adapter model? Both run on a few texts in fp32, their weights read from disk map by map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from qalora.base.checkpoint import Pieces

Update = tuple[Tensor, Tensor, float]  # A (r, in), B (out, r), scaling

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "Question: What is 17 + 25?\nAnswer:",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Write a short review of a family-friendly restaurant near the river.",
)
# Largest relative difference that rounding weights to the type is taken to explain.
TOLERANCE = {
    "float32": 1e-4, "f32": 1e-4, "float16": 5e-3, "f16": 5e-3, "bfloat16": 4e-2, "bf16": 4e-2,
    "q8_0": 1e-1, "q5_1": 0.5, "q5_0": 0.5, "q4_1": 1.0, "q4_0": 1.0,
}  # fmt: skip


def compare(
    config: PreTrainedConfig,
    base: Pieces,
    updates: Mapping[str, Update],
    merged_config: PreTrainedConfig,
    merged: Pieces,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str] = TEXTS,
) -> dict[str, Any]:
    """Distances of the merged model from base + adapter over every position of the texts, in fp32 on the CPU.

    Returns:
        max_logit_difference, mean_logit_difference: absolute.
        relative_difference: root mean square, over that of the logits about their mean.
        kl: nats a token, of the merged model's predictions from the adapter model's.
        greedy_agreement: share of positions with the same likeliest token.
        mean_adapter_effect: mean absolute difference between adapter model and bare base.
    """
    rows = [tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, rows))
    # Padded on the right: under a causal mask nothing before it sees the padding.
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    real = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    both = streamed_logits(config, base, ids.repeat(2, 1), updates, adapted=len(rows))
    adapter, bare = both[: len(rows)][real], both[len(rows) :][real]
    del both
    effect = (adapter - bare).abs().mean().item()
    del bare
    found = streamed_logits(merged_config, merged, ids)[real]
    spread = (adapter - adapter.mean(-1, keepdim=True)).square().mean().sqrt().item()
    kl = F.kl_div(found.log_softmax(-1), adapter.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
    agreement = (found.argmax(-1) == adapter.argmax(-1)).float().mean().item()
    difference = found.sub_(adapter).abs_()
    return {
        "max_logit_difference": difference.max().item(),
        "mean_logit_difference": difference.mean().item(),
        "relative_difference": math.sqrt(difference.square_().mean().item()) / spread,
        "kl": max(0.0, kl.item()),  # its rounding may fall below zero
        "greedy_agreement": agreement,
        "mean_adapter_effect": effect,
    }


@torch.no_grad()
def streamed_logits(
    config: PreTrainedConfig,
    read: Pieces,
    input_ids: Tensor,
    updates: Mapping[str, Update] | None = None,
    adapted: int = 0,
) -> Tensor:
    """(rows, tokens, vocabulary) fp32 logits of a model whose weights are read when their layer is due, and dropped.

    Args:
        updates: low-rank updates, added to the outputs of the first `adapted` rows.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, nn.Linear):
            source = "model.embed_tokens" if name == "lm_head" and config.tie_word_embeddings else name
            update = (updates or {}).get(name)
            setattr(model.get_submodule(parent), child, _Linear(read, source, module.bias is not None, update, adapted))
        elif isinstance(module, nn.Embedding):
            setattr(model.get_submodule(parent), child, _Embedding(read, name, module.embedding_dim))
        elif name.endswith("norm"):
            module.weight = nn.Parameter(_whole(read, f"{name}.weight"), requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()(input_ids=input_ids, use_cache=False).logits


class _Linear(nn.Module):
    def __init__(self, read: Pieces, name: str, bias: bool, update: Update | None, adapted: int):
        super().__init__()
        self.read, self.name, self.bias, self.update, self.adapted = read, name, bias, update, adapted
        self.weight = torch.empty(0)  # transformers asks for its dtype

    def forward(self, x: Tensor) -> Tensor:
        """x: (rows, tokens, in) → (rows, tokens, out)."""
        z = torch.cat([F.linear(x, piece.float()) for piece in self.read(f"{self.name}.weight")], dim=-1)
        if self.bias:
            z += _whole(self.read, f"{self.name}.bias")
        if self.update is not None:
            A, B, s = self.update
            z[: self.adapted] += F.linear(F.linear(x[: self.adapted], A), B).mul_(s)
        return z


class _Embedding(nn.Module):
    def __init__(self, read: Pieces, name: str, width: int):
        super().__init__()
        self.read, self.name, self.width = read, name, width

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (rows, tokens) → (rows, tokens, hidden)."""
        out, start = torch.empty(*ids.shape, self.width), 0
        for piece in self.read(f"{self.name}.weight"):
            here = (ids >= start) & (ids < start + len(piece))
            out[here] = piece[ids[here] - start].float()
            start += len(piece)
        return out


def _whole(read: Pieces, name: str) -> Tensor:
    return torch.cat([piece.float() for piece in read(name)])
