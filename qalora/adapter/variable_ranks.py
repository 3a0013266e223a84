"""What transformers' Trainer needs to load an adapter whose ranks are others than those it has now."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qalora.adapter.callback import HISTORY
from qalora.adapter.model import to_fp32, verify_saved
from qalora.adapter.surgery import restore


class VariableRanks:
    """A mixin for `transformers.Trainer` and its subclasses: the best checkpoint is loaded, and a run is resumed,
    across rounds of allocation.

        class Trainer(qalora.VariableRanks, SFTTrainer): ...

    A checkpoint holds a plain PEFT LoRA, read back when it has been written, and the rounds so far (allocation.jsonl).
    """

    model: Any
    args: Any
    state: Any

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        folder = Path(str(output_dir or self.args.output_dir))
        verify_saved(self.model, folder)
        if (history := Path(str(self.args.output_dir)) / HISTORY).is_file() and history.parent != folder:
            shutil.copy(history, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        to_fp32(self.model)  # a trainer's 16 bits would round what the checkpoint holds, and the moments that follow
        restore(self.model, resume_from_checkpoint)
        history, own = Path(resume_from_checkpoint) / HISTORY, Path(str(self.args.output_dir)) / HISTORY
        if history.is_file() and history.resolve() != own.resolve():
            shutil.copy(history, own)

    def _load_best_model(self) -> None:
        restore(self.model, self.state.best_model_checkpoint)
