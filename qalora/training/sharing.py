"""An optimizer step that several processes make together: each computes its rows, and the gradients meet once.

Every process goes through all micro-batches of the step, as a single one would, and computes those rows that are its
own; so the rows of a step, and what the loss is divided by, need no word between them:

    micro-batches   [0 1 2] [3 4 5] [6 7]        8 rows, 3 processes
    process 0        0 1 2                       forward and backward
    process 1                3 4 5
    process 2                        6 7         then one flat sum of all gradients, loss and flags in it
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qalora import processes
from qalora.base.device import best_device
from qalora.errors import AnswerNo
from qalora.training.callbacks import InterruptCallback
from qalora.training.ladder import Inputs

Part = tuple[int, int]  # from … up to …: rows of a micro-batch, or tokens of packed samples


class SharedStep:
    """What this process computes of a step, and how the step comes together.

    Args:
        interrupt: whose signal is for all processes.
        seed: of the run.
    """

    def __init__(self, interrupt: InterruptCallback, seed: int):
        self.interrupt, self.seed = interrupt, seed
        interrupt.agreed = False
        self.parts: list[Part | None] = []
        self.place = 0
        self.loss: Tensor | None = None
        self.trouble: AnswerNo | None = None

    def begin(self, micro_batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Takes up the micro-batches of the next step."""
        units = [units_of(inputs) for inputs in micro_batches]
        self.parts = own_parts(units, processes.rank(), processes.size())
        self.place, self.loss = 0, None

    def add(self, inputs: Inputs, step: int, work: Callable[[Inputs], Tensor]) -> None:
        """The next micro-batch: `work` on what of it is this process'. An error waits for the end of the step.

        Args:
            step: optimizer steps so far.
        """
        part, place = self.parts[self.place], self.place
        self.place += 1
        if part is None or self.trouble is not None:
            return
        with randomness_of(self.seed, step, place, processes.rank()):
            try:
                loss = work(cut(inputs, part))
            except AnswerNo as error:
                self.trouble = error
            else:
                self.loss = loss if self.loss is None else self.loss + loss

    def end(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """() the loss of the whole step; every parameter has the gradient of it.

        Raises:
            AnswerNo: what befell a process in its part.
            EndedElsewhere: it was another one's.
        """
        device = parameters[0].device
        loss = torch.zeros((), device=device) if self.loss is None else self.loss.detach()
        flags = torch.tensor([self.interrupt.signal is not None, self.trouble is not None], device=device)
        total, stop, trouble = sum_gradients(parameters, [loss.view(1), flags])
        if trouble:
            with processes.agreeing():
                if self.trouble is not None:
                    raise self.trouble
        self.interrupt.agreed = bool(stop)
        return total


def sum_gradients(parameters: Sequence[nn.Parameter], further: Sequence[Tensor]) -> Tensor:
    """Gives every parameter the sum of all processes' gradients, which travel as one flat fp32 tensor.

    Args:
        further: (n,) tensors that travel along.

    Returns:
        The sums of these, end to end.
    """
    sizes = [parameter.numel() for parameter in parameters]
    flat = [
        parameter.new_zeros(size) if parameter.grad is None else parameter.grad.flatten()
        for parameter, size in zip(parameters, sizes, strict=True)
    ]
    bucket = torch.cat([part.float() for part in (*flat, *further)])
    processes.sum_(bucket)
    *sums, rest = bucket.split([*sizes, bucket.numel() - sum(sizes)])
    for parameter, gradient in zip(parameters, sums, strict=True):
        parameter.grad = gradient.view_as(parameter)
    return rest


def units_of(inputs: Mapping[str, Tensor]) -> list[int]:
    """What of a micro-batch can be parted: 1 for each row, or the tokens of each packed sample."""
    if "position_ids" not in inputs:
        return [1] * len(inputs["input_ids"])
    starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
    ends = [*starts[1:], inputs["input_ids"].shape[1]]
    return [end - start for start, end in zip(starts, ends, strict=True)]


def own_parts(units: Sequence[Sequence[int]], rank: int, size: int) -> list[Part | None]:
    """What a process computes of each micro-batch: of all units end to end, its `size`-th part, whole units each.

    Args:
        units: the sizes of each micro-batch's units.

    Returns:
        For each micro-batch from where up to where, in sizes; None: nothing of it.
    """
    total = sum(map(sum, units))
    parts: list[Part | None] = []
    before = 0
    for micro in units:
        start = end = offset = 0
        for unit in micro:
            if before * size // total == rank:
                start = offset if start == end else start
                end = offset + unit
            before += unit
            offset += unit
        parts.append((start, end) if end > start else None)
    return parts


def cut(inputs: Inputs, part: Part) -> Inputs:
    """A part of a micro-batch: rows, or packed samples."""
    own = slice(*part)
    if "position_ids" in inputs:
        return {name: value[:, own] for name, value in inputs.items()}
    return {name: value[own] for name, value in inputs.items()}


@contextmanager
def randomness_of(*numbers: int) -> Iterator[None]:
    """In the block torch draws by these numbers alone: dropout of each process is its own, and what all processes draw
    alike stays so."""
    seed = int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest())
    device = best_device()
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed)
        yield
