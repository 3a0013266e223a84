"""Cross-entropy where a label is, and nowhere else.

A causal LM's own loss runs the head over every position and holds (tokens, vocabulary) logits, in fp32, several times.
Here the head sees only the positions that predict a supervised token, a chunk at a time, and its frozen weight needs
no gradient: d loss / d hidden = (softmax − one-hot) W is formed in the forward, chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from qalora.base.families import FAMILIES, family_of
from qalora.data.rows import targets as supervised
from qalora.errors import InputError
from qalora.kernels.context import Context
from qalora.kernels.fused import liger
from qalora.kernels.layout import Layout
from qalora.kernels.prefixes import causal_lm, final_hidden
from qalora.sizes import LOGITS_CHUNK

Fused = Callable[[Tensor, Tensor, Tensor], Tensor]  # (head, states (n, d), targets (n,)) → summed loss


@dataclass(frozen=True)
class Head:
    """Final hidden states → logits: cap · tanh(scale · (W h + b) / cap), or scale · (W h + b) without a cap.

    Attributes:
        weight: (vocabulary, d), frozen, as `bias` (vocabulary,) is.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    @staticmethod
    def of(model: nn.Module) -> Head:
        """Of a causal LM of transformers, or of a PeftModel around one."""
        base = causal_lm(model)
        config, linear = base.config.get_text_config(), base.get_output_embeddings()
        scale, field = 1.0, family_of(config.model_type).logits
        if field is not None:
            name, how = field
            scale = float(getattr(config, name))
            scale = 1.0 / scale if how == "divided" else scale
        return Head(linear.weight, linear.bias, scale, getattr(config, "final_logit_softcapping", None))

    @property
    def plain(self) -> bool:
        """Whether logits are W h, and nothing more."""
        return self.bias is None and self.scale == 1.0 and self.cap is None

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, d) → (n, vocabulary) in fp32, or in what is wider."""
        logits = F.linear(hidden, self.weight, self.bias)
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def part(self, rows: slice, dtype: torch.dtype) -> Head:
        """Of some tokens of the vocabulary."""
        bias = None if self.bias is None else self.bias[rows].to(dtype)
        return Head(self.weight[rows].to(dtype), bias, self.scale, self.cap)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """That our loss ends as the model does, where no record says so: on a few tokens.

    Raises:
        InputError: it does something to its logits that is not known.
    """
    config = model.config.get_text_config()
    if config.model_type in FAMILIES:
        return
    ids, mode = torch.arange(4, device=model.device)[None] % config.vocab_size, model.training
    own = model.eval()(input_ids=ids, use_cache=False).logits[0].float()
    found = Head.of(model).logits(final_hidden(model, ids, use_cache=False)[0])
    model.train(mode)
    if not (own - found).norm() <= 1e-2 * own.norm():
        raise InputError(
            f"the model is of type {config.model_type}, which does to its logits what is not known here; it "
            "would need a record of that."
        )


def row_losses(model: nn.Module, batch: Mapping[str, Tensor], *, smoothing: float = 0.0) -> Tensor:
    """Summed cross-entropy of each row of a batch, with or without an adapter on the model.

    Args:
        model: a causal LM of transformers, or a PeftModel around one.
        batch: input_ids and labels, (rows, tokens), and what else the decoder takes (attention_mask, position_ids).
        smoothing: see `label_only_loss`.

    Returns:
        (rows,) fp32, nats.
    """
    hidden, labels, head = _before_the_head(model, batch)
    return label_only_loss(hidden, labels, head, smoothing, _known(batch))


def summed_loss(
    model: nn.Module, batch: Mapping[str, Tensor], *, smoothing: float = 0.0, fused: Fused | None = None
) -> Tensor:
    """The sum of `row_losses`, (), in nats: what a training step needs, and `fused` computes where it is given."""
    hidden, labels, head = _before_the_head(model, batch)
    if fused is None or smoothing or not hidden.is_cuda or not head.plain:
        return label_only_loss(hidden, labels, head, smoothing, _known(batch)).sum()
    return fused_loss(hidden, labels, head, fused, _known(batch))


def _before_the_head(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Head]:
    """(final hidden states (rows, tokens, d), labels (rows, tokens), the head)."""
    base = causal_lm(model)
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"}
    return final_hidden(base, **inputs, use_cache=False), batch["labels"], Head.of(base)


def _known(batch: Mapping[str, Any]) -> Layout | None:
    return batch.get("layout")


def label_only_loss(
    hidden: Tensor, labels: Tensor, head: Head | Tensor, smoothing: float = 0.0, layout: Layout | None = None
) -> Tensor:
    """Summed cross-entropy of each row over its supervised tokens.

    Args:
        hidden: (rows, tokens, d), the final hidden states.
        labels: (rows, tokens), −100 where no loss; position t is predicted from position t − 1.
        head: what makes logits of them; a (vocabulary, d) tensor: nothing beside it.
        smoothing: share of every target that all tokens of the vocabulary have alike.
        layout: where the supervised tokens are; None: it is looked for in `labels`.

    Returns:
        (rows,) fp32, nats.
    """
    head = Head(head) if isinstance(head, Tensor) else head
    rows, states, targets = _supervised(hidden, labels, layout)
    if states.dtype == head.weight.dtype or states.requires_grad or smoothing:
        losses = _FrozenHeadCrossEntropy.apply(states, targets, head, smoothing)
    else:
        losses = _cross_entropy_by_vocabulary(states, targets, head)
    return torch.zeros(len(labels), device=losses.device).index_add(0, rows, losses)


def fused_loss(
    hidden: Tensor, labels: Tensor, head: Head | Tensor, fused: Fused, layout: Layout | None = None
) -> Tensor:
    """The sum of `label_only_loss` over the rows, () in nats, as `fused` computes it."""
    _, states, targets = _supervised(hidden, labels, layout)
    return fused(head if isinstance(head, Tensor) else head.weight, states, targets)


def _supervised(hidden: Tensor, labels: Tensor, layout: Layout | None) -> tuple[Tensor, Tensor, Tensor]:
    """(n,) rows, (n, d) states and (n,) targets of the supervised tokens."""
    if layout is not None:
        return layout.rows, hidden[layout.rows, layout.positions], layout.targets
    rows, positions = supervised(labels).nonzero(as_tuple=True)
    return rows, hidden[rows, positions], labels[rows, positions + 1]


def liger_loss() -> Fused | None:
    """Liger-Kernel's head and cross-entropy in one CUDA kernel, where the package is installed; it sums only, so that
    the losses of rows, which scores are made of, stay our own."""
    kernels = liger("transformers")
    return None if kernels is None else kernels.LigerFusedLinearCrossEntropyLoss(reduction="sum")


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    """(n, d), (n,), the head → (n,) fp32 cross-entropies; only a chunk of the (n, V) logits exists at a time.

    Smoothing by ε has targets (1 − ε) one-hot + ε / V, so that loss = log Σ exp(x) − (1 − ε) x_target − ε mean(x).
    """

    @staticmethod
    def forward(ctx: Context, hidden: Tensor, targets: Tensor, head: Head, smoothing: float) -> Tensor:
        weight = head.weight
        losses = torch.empty(len(hidden), device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        chunk = max(1, LOGITS_CHUNK // (4 * len(weight)))
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk):
                part = slice(start, start + chunk)
                logits = head.logits(hidden[part])
                slope = None  # of the soft cap, d logit / d (logit before it)
                if head.cap is not None and grad is not None:
                    slope = logits.div(head.cap).square_().neg_().add_(1.0)
                logits -= logits.amax(-1, keepdim=True)
                chosen = logits.gather(1, targets[part, None])
                if smoothing:
                    chosen = (1 - smoothing) * chosen + smoothing * logits.mean(-1, keepdim=True)
                sums = logits.exp_().sum(-1, keepdim=True)  # in place: the logits are the widest tensor of a step
                losses[part] = (sums.log() - chosen).squeeze(1)
                if grad is not None:
                    probs = logits.div_(sums)
                    if smoothing:
                        probs -= smoothing / len(weight)
                    probs[torch.arange(len(probs), device=probs.device), targets[part]] -= 1 - smoothing
                    if slope is not None:
                        probs.mul_(slope)
                    if head.scale != 1.0:
                        probs.mul_(head.scale)
                    grad[part] = probs.to(weight.dtype) @ weight
                    del probs, slope
                del logits  # before the next chunk's
        if grad is not None:
            ctx.save_for_backward(grad)
        return losses

    @staticmethod
    def backward(ctx: Context, grad_losses: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_losses[:, None].to(grad.dtype), None, None, None


def _cross_entropy_by_vocabulary(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    """(n, d), (n,), the head → (n,) in the dtype of hidden, which the head has not: a slice of it is cast at a time."""
    tokens, width = head.weight.shape
    log_sum = torch.full((len(hidden),), -torch.inf, dtype=hidden.dtype, device=hidden.device)
    chosen = torch.empty_like(log_sum)
    step = max(1, LOGITS_CHUNK // (4 * max(width, len(hidden))))
    for start in range(0, tokens, step):
        logits = head.part(slice(start, start + step), hidden.dtype).logits(hidden)
        log_sum = torch.logaddexp(log_sum, logits.logsumexp(-1))
        here = (targets >= start) & (targets < start + step)
        chosen[here] = logits[here, targets[here] - start]
    return log_sum - chosen
