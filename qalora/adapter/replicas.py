"""The adapter as several processes hold it: begun alike, and compared whenever it might have parted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from qalora import processes
from qalora.adapter.model import gated_layers
from qalora.errors import AnswerNo

PARTED = (
    "they no longer train one adapter, and nothing was written of it. Use GPUs of one kind, and go on from the last "
    "checkpoint with --resume-from-checkpoint auto."
)


def share_adapter(model: PeftModel) -> None:
    """Gives every process the weights that process 0 has; the ranks are the same already."""
    if processes.size() == 1:
        return
    layers = gated_layers(model)
    first = processes.from_first(
        lambda: {name: (layer.A.data.cpu(), layer.B.data.cpu()) for name, layer in layers.items()}
    )
    for name, (A, B) in first.items():
        layers[name].A.data.copy_(A)
        layers[name].B.data.copy_(B)


def check_given(model: PeftModel) -> None:
    """
    Raises:
        InputError: `lora.adapter` holds another one for another process; names the module.
        EndedElsewhere: the same, in the processes that say nothing.
    """
    if processes.size() > 1:
        with processes.agreeing():
            processes.check_same(dict(_digests(model, None)), "lora.adapter", "give every node the same files.")


def check_replicas(model: PeftModel, optimizer: object, when: str) -> None:
    """Compares every adapter's A, B, moments and ranks over all processes.

    Args:
        when: begins the error.

    Raises:
        AnswerNo: two differ; names the module.
        EndedElsewhere: the same, in the processes that say nothing.
    """
    if processes.size() == 1:
        return
    with processes.agreeing():
        digests = dict(_digests(model, getattr(optimizer, "optimizer", optimizer)))
        processes.check_same(digests, when, PARTED, AnswerNo)


def _digests(model: PeftModel, optimizer: Any) -> Iterator[tuple[str, str]]:
    """(what, digest) of every tensor of the adapter, and of what the optimizer keeps of it."""
    for name, layer in gated_layers(model).items():
        yield f"the number of ranks of {name}", str(len(layer.A))
        for matrix, parameter in (("A", layer.A), ("B", layer.B)):
            yield f"{matrix} of {name}", _digest(parameter)
            state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
            for key, value in state.items():
                if isinstance(value, Tensor):
                    yield f"{key} of {matrix} of {name}", _digest(value)


def _digest(tensor: Tensor) -> str:
    values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.blake2b(values.numpy().tobytes(), digest_size=16).hexdigest()
