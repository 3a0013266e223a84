"""What a step does when memory runs out: smaller pieces of the micro-batch first, then less kept, never another result.

halve the micro-batch, and again      the same rows an optimizer step, the same loss
keep of a block what its maps put out, then its input alone, then that in host memory
take every MLP a stretch of tokens at a time
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qalora import processes
from qalora.base.device import free_unused
from qalora.errors import AnswerNo
from qalora.fitting import LEVELS, lower
from qalora.kernels.activations import checkpointing_of, forget_kept, set_checkpointing, set_mlp_tile

Inputs = dict[str, Any]
T = TypeVar("T")


class Ladder:
    """Runs micro-batches, and climbs a rung each time that memory runs out; the rungs stay for the rest of the run.

    Args:
        say: told of every rung.
    """

    def __init__(self, model: nn.Module, say: Callable[[str], None]):
        self.model, self.say = model, say
        self.halvings = 0
        self.tiled = False

    def run(self, inputs: Inputs, work: Callable[[Inputs], Tensor]) -> Tensor:
        """Summed loss of `work`, a forward and backward, on the micro-batch or on its pieces.

        Gradients that earlier micro-batches left are kept; those of a broken attempt are not.

        Raises:
            AnswerNo: memory ran out on the last rung.
        """
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        before = [parameter.grad for parameter in parameters]

        def forget() -> None:
            for parameter in parameters:
                parameter.grad = None

        def summed(parts: Sequence[Inputs]) -> Tensor:
            try:
                return torch.stack([work(piece) for piece in parts]).sum()
            except torch.OutOfMemoryError:
                forget()
                raise

        forget()
        loss = self._until_it_fits([inputs], summed)
        for parameter, grad in zip(parameters, before, strict=True):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        return loss

    def attempt(self, batch: Sequence[Inputs], work: Callable[[Sequence[Inputs]], T]) -> T:
        """`work` on micro-batches, or on their pieces; it is begun anew where memory runs out, so it leaves nothing
        behind then. Several processes begin on the same rung, and climb together.

        Raises:
            AnswerNo: memory ran out on the last rung.
        """
        self._join_the_others()
        return self._until_it_fits(batch, lambda parts: processes.in_step(lambda: work(parts)))

    def _join_the_others(self) -> None:
        """Takes the highest rung that one of the processes has come to in its steps."""
        if processes.size() == 1:
            return
        order = [level.checkpointing for level in LEVELS]
        reached = processes.exchange((self.halvings, order.index(checkpointing_of(self.model)), self.tiled))
        halvings, kept, tiled = (max(values) for values in zip(*reached, strict=True))
        self.halvings = halvings
        if order[kept] != checkpointing_of(self.model):
            set_checkpointing(self.model, order[kept])
        if tiled and not self.tiled:
            set_mlp_tile(self.model, LEVELS[-1].mlp_tile)
            self.tiled = True

    def _until_it_fits(self, batch: Sequence[Inputs], work: Callable[[Sequence[Inputs]], T]) -> T:
        while True:
            try:
                return work([piece for inputs in batch for piece in pieces(inputs, self.halvings)])
            except torch.OutOfMemoryError:
                pass  # climbing waits until the error's frames have let go of their tensors
            forget_kept(self.model)
            free_unused()
            self.say(f"out of memory: {self._climb(batch)}")

    def _climb(self, batch: Sequence[Inputs]) -> str:
        """Takes the next rung, and says which it is."""
        if any(_halves(piece) for inputs in batch for piece in pieces(inputs, self.halvings)):
            self.halvings += 1
            return f"micro-batches are worked through in {2**self.halvings} pieces from now on, with the same result"
        level = lower(checkpointing_of(self.model), self.tiled)
        if level is not None and level.mlp_tile is None:
            set_checkpointing(self.model, level.checkpointing)
            return f"{level.what} from now on (training.gradient_checkpointing={str(level.checkpointing).lower()})"
        if level is not None:
            set_mlp_tile(self.model, level.mlp_tile)
            self.tiled = True
            return f"{level.what} from now on (training.mlp_tile={level.mlp_tile})"
        tokens = max(inputs["input_ids"].shape[1] for inputs in batch)
        raise AnswerNo(
            f"out of memory with one row of {tokens} tokens, its block inputs in host memory and its MLPs in tiles; "
            "lower data.max_seq_len or lora.r, keep training.optim=paged_adamw_8bit, or take a smaller model "
            "(`qalora plan` says what fits)."
        )


def pieces(inputs: Inputs, halvings: int) -> Iterator[Inputs]:
    """The micro-batch halved that often, as far as it has rows, or packed samples, to part."""
    parts = _halves(inputs) if halvings else None
    if parts is None:
        yield inputs
    else:
        for part in parts:
            yield from pieces(part, halvings - 1)


def _halves(inputs: Inputs) -> tuple[Inputs, Inputs] | None:
    """Two micro-batches of about the same size; None for a single row."""
    rows, tokens = inputs["input_ids"].shape
    if rows > 1:
        middle = rows // 2
        return {k: v[:middle] for k, v in inputs.items()}, {k: v[middle:] for k, v in inputs.items()}
    if "position_ids" not in inputs:
        return None
    # Packed samples lie end to end in one row: part it where a sample begins, nearest the middle.
    starts = (inputs["position_ids"][0, 1:] == 0).nonzero().flatten() + 1
    if not len(starts):
        return None
    middle = int(starts[(starts - tokens / 2).abs().argmin()])
    return {k: v[:, :middle] for k, v in inputs.items()}, {k: v[:, middle:] for k, v in inputs.items()}
