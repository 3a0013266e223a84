"""An adapter on the disk as vanilla PEFT reads it, against the live one: every A, B and scaling, and the logits.

PEFT's own layers run over the base's own forwards, so the comparison takes nothing from ours. Weights must be equal;
logits as far as the dtype of the base lets two orders of sums agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qalora.adapter.model import ADAPTER, gated_layers
from qalora.adapter.saved import PREFIX
from qalora.answers import inference
from qalora.deploy.verification import TEXTS, TOLERANCE, Update
from qalora.errors import AnswerNo
from qalora.kernels.prefixes import causal_lm


def compare_with_peft(
    model: PeftModel, folder: Path, tokenizer: PreTrainedTokenizerBase, computed_in: torch.dtype
) -> dict[str, float]:
    """Compares over every position of a few texts; the base is left without adapters, and with its own forwards.

    Args:
        model: the live adapter on its base.
        folder: of the saved one.
        computed_in: dtype of the base.

    Returns:
        max_logit_difference, mean_logit_difference: absolute.
        relative_difference: root mean square, over that of the logits about their mean.
        mean_adapter_effect: mean absolute difference between adapter model and bare base.

    Raises:
        AnswerNo: logits are not finite.
        RuntimeError: another function than the live one.
    """
    live = {name: (layer.A.detach(), layer.B.detach(), layer.s) for name, layer in gated_layers(model).items()}
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    ours = _logits(model, rows)
    if not ours.isfinite().all():
        raise AnswerNo("The logits are not finite with this adapter: it has diverged, and no cut can mend that.")
    with model.disable_adapter():
        bare = _logits(model, rows)
    base: Any = model.unload()
    if kernels := causal_lm(base).__dict__.get("kernels"):
        kernels.remove()
    vanilla = PeftModel.from_pretrained(base, str(folder))
    _check_equal(live, vanilla, folder)
    theirs = _logits(vanilla, rows)
    vanilla.unload()
    difference = (theirs - ours).abs()
    relative = (difference.norm() / (ours - ours.mean(-1, keepdim=True)).norm()).item()
    if not relative <= TOLERANCE[str(computed_in).removeprefix("torch.")]:
        raise RuntimeError(f"{folder}: PEFT's logits differ by {relative:.1e}, more than {computed_in} explains")
    return {
        "max_logit_difference": difference.max().item(),
        "mean_logit_difference": difference.mean().item(),
        "relative_difference": relative,
        "mean_adapter_effect": (ours - bare).abs().mean().item(),
    }


def _check_equal(live: Mapping[str, Update], vanilla: PeftModel, folder: Path) -> None:
    found: dict[str, Any] = {
        name.removeprefix(PREFIX): module
        for name, module in vanilla.named_modules()
        if ADAPTER in getattr(module, "lora_A", ())
    }
    if found.keys() != live.keys():
        raise RuntimeError(f"{folder}: PEFT puts ranks on other modules: {sorted(found.keys() ^ live.keys())[:3]}")
    for name, (A, B, s) in live.items():
        module = found[name]
        theirs = [part[ADAPTER].weight.to(A) for part in (module.lora_A, module.lora_B)]
        if not (torch.equal(theirs[0], A) and torch.equal(theirs[1], B) and module.scaling[ADAPTER] == s):
            raise RuntimeError(f"{folder}: PEFT reads other ranks of {name}, or another scaling")


def _logits(model: nn.Module, rows: Sequence[Sequence[int]]) -> Tensor:
    """(positions of all rows, vocabulary) fp32, on the CPU."""
    device = causal_lm(model).device
    with inference(model):
        found = [model(input_ids=torch.tensor([list(row)], device=device)).logits[0].float().cpu() for row in rows]
    return torch.cat(found)
