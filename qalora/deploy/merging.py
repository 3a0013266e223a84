"""Adapter + frozen base → one model for deployment, a tensor at a time.

    W_merged = round( W + s · B A )  per linear layer: W as the training computed with it, the sum in fp32, one rounding

    checkpoint ─ trained_pieces ─ + s·B A ─ round ─┐
               └ embeddings, head, norms, biases ──┴─ pieces ─ safetensors shards, or a GGUF file
                                                               └ compared (verification.py)

While writing, no more than some rows of one tensor are in memory at a time, and of a linear layer its 4-bit codes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from qalora.adapter.saved import SavedAdapter, read_adapter, scaling_of
from qalora.base.checkpoint import (
    Checkpoint,
    Pieces,
    Quantization,
    as_stored,
    open_checkpoint,
    trained_pieces,
)
from qalora.base.families import in_decoder
from qalora.base.gguf_names import is_permuted
from qalora.base.registry import ModelSource
from qalora.base.structure import HEAD, Structure
from qalora.base.tensor_files import PIECE
from qalora.card_files import keep_users_card, write_card
from qalora.deploy.output import REPORT, check_output, free_disk, one_at_a_time
from qalora.deploy.safetensors_files import Written, copied, rounded, write_safetensors
from qalora.deploy.settings import served_after, write_settings
from qalora.deploy.verification import TOLERANCE, Rounding, Update, as_read, as_trained, compare, fault
from qalora.errors import AnswerNo, InputError
from qalora.files import written_beside
from qalora.results.card import merged_card

Format = Literal["hf", "gguf"]


@one_at_a_time
def merge(
    source: ModelSource,
    adapter_dir: str | Path,
    output_dir: str | Path,
    *,
    quantization: Quantization | None,
    dtype: torch.dtype = torch.bfloat16,
    format: Format = "hf",
    gguf_type: str = "f16",
    max_shard_size: int = 4 * 10**9,
    overwrite: bool = False,
    verify: bool = True,
) -> dict[str, Any]:
    """Merges any plain PEFT LoRA into its base and writes a Hugging Face model folder, or one with a GGUF file.

    The folder is written beside its place and moved there once it is whole and verified. A previous merge of the same
    model and adapter is replaced, but for a README.md that a user wrote; any other content is refused.

    Args:
        quantization: how the training had the base; None: its 16- or 32-bit weights as they are stored.
        dtype: of the saved weights, for format hf.
        gguf_type: of the saved weights, for format gguf.
        verify: read the result back and compare it with base + adapter, in fp32, on a few texts.

    Returns:
        What `merge.json` in the folder holds.

    Raises:
        InputError: an adapter that is no plain LoRA or is made for another model, a folder that holds something else,
            too little disk or memory, or a sum that `dtype` cannot hold. Nothing is left of the merge then.
        AnswerNo: the result is further from base + adapter than the type's rounding explains. Nothing is left either.
    """
    output_dir, adapter_dir = Path(output_dir), Path(adapter_dir)
    check_output(output_dir, model=source.name, adapter=adapter_dir, overwrite=overwrite)
    adapter = read_adapter(adapter_dir)
    checkpoint, config = open_checkpoint(source)
    adapter = adapter.fitted(checkpoint.structure.adapted)
    if quantization is not None:
        quantization = as_stored(checkpoint, quantization)
    elif checkpoint.packed:
        raise InputError(
            f"--model {source.name}: stored in 4 bits, and --base original asks for 16-bit weights; leave it out, or "
            "pass the 16-bit model that it was made from."
        )
    updates = {in_decoder(name): update for name, update in low_rank_updates(adapter).items()}
    served = served_after(source, config, adapter_dir)
    pieces = merged_pieces(checkpoint, updates, quantization)
    shapes = checkpoint.structure.shapes
    stored = gguf_type if format == "gguf" else str(dtype).removeprefix("torch.")
    beside = sum(torch.Size(checkpoint.shapes[name]).numel() for name in beside_decoder(checkpoint))
    check_room(output_dir, checkpoint.structure, stored, config, beside=4 * beside)

    caveat = None
    with written_beside(output_dir) as partial:
        if format == "gguf":
            from qalora.deploy.gguf import narrower, write_model
            from qalora.deploy.modelfile import write_modelfile

            write_model(
                partial / "model.gguf", shapes, pieces, config, served.tokenizer, gguf_type, source, served.ending
            )
            write_modelfile(partial, served)
            caveat = narrower(config)
        else:
            write_safetensors(partial, to_write(checkpoint, pieces, dtype), max_shard_size)
            write_settings(partial, source, config, dtype, served)
        report: dict[str, Any] = {
            "model": source.name,
            "adapter": str(adapter_dir.resolve()),
            "base": "dequantized" if quantization and quantization.quant_type else "original",
            "quantization": quantization and {**asdict(quantization), "compute_dtype": quantization.name},
            "base_files": [file.name for file in checkpoint.files],
            "format": format,
            "dtype": stored,
            "modules": len(updates),
            "caveat": caveat,
            "bytes": sum(file.stat().st_size for file in partial.iterdir() if file.suffix in (".safetensors", ".gguf")),
        }
        if verify:
            report |= compare(
                as_trained(source, quantization),
                updates,
                as_read(partial, "model.gguf" if format == "gguf" else None),
                rounding(format, dtype, gguf_type),
                served.tokenizer,
                longest=config.sliding_window if caveat else None,  # beyond it the file is another model
            )
            report["tolerance"] = TOLERANCE[stored]
        (partial / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if not keep_users_card(output_dir, partial):
            write_card(partial, merged_card(partial, adapter_dir, output_dir.resolve().name))
        if verify and (wrong := fault(report, stored)):
            raise AnswerNo(f"{wrong}{f' ({caveat})' if caveat else ''}; nothing was kept. --no-verify keeps it.")
    return report


def rounding(format: Format, dtype: torch.dtype, gguf_type: str) -> Rounding:
    """What a file of the format holds of a tensor's rows."""
    if format == "gguf":
        from qalora.deploy import gguf

        return lambda name, value: gguf.stored(name, value, gguf_type)
    return lambda name, value: value.to(dtype).float()


def merged_pieces(checkpoint: Checkpoint, updates: Mapping[str, Update], quantization: Quantization | None) -> Pieces:
    """Name → the tensor to save in blocks of rows, before its rounding."""

    def pieces(name: str) -> Iterator[Tensor]:
        update = updates.get(name.removesuffix(".weight"))
        if update is None:
            yield from trained_pieces(checkpoint, name, quantization)
            return
        A, B, s = update
        row = 0
        for piece in trained_pieces(checkpoint, name, quantization):
            yield piece.addmm_(B[row : row + len(piece)], A, alpha=s)
            row += len(piece)

    return pieces


def to_write(checkpoint: Checkpoint, pieces: Pieces, dtype: torch.dtype) -> dict[str, Written]:
    """Name in the files → what is written: the merged tensors, and of a vision model, under the names that its files
    have, all else as it is stored.

    Raises:
        InputError: weights of the vision are stored in 4 bits, which nothing here merges.
    """

    def merged(name: str) -> Written:
        return Written(shapes[name], dtype, lambda: (rounded(name, piece, dtype) for piece in pieces(name)))

    shapes = checkpoint.structure.shapes
    if not checkpoint.structure.wrapped:
        return {name: merged(name) for name in shapes}
    return {checkpoint.stored[name]: merged(name) for name in shapes} | {
        checkpoint.stored[name]: copied(checkpoint, name) for name in beside_decoder(checkpoint)
    }


def beside_decoder(checkpoint: Checkpoint) -> list[str]:
    """Names of what a vision model's files hold beside the decoder; a head that is the embeddings too is none of it.

    Raises:
        InputError: some of it is stored in 4 bits.
    """
    if not checkpoint.structure.wrapped:
        return []
    decoder = checkpoint.structure.shapes
    if packed := sorted(checkpoint.packed - decoder.keys()):
        raise InputError(
            f"{checkpoint.files[0].parent}: weights beside the text part are stored in 4 bits ({packed[0]}); "
            "merge into the 16-bit model that it was made from."
        )
    inside = tuple(f"{name}." for name in decoder if name in checkpoint.packed)  # scales and codes of 4-bit weights
    return [
        name
        for name in checkpoint.shapes
        if name not in decoder and name != HEAD and not name.startswith(inside or ("\0",))
    ]


def low_rank_updates(adapter: SavedAdapter) -> dict[str, Update]:
    """Full module name → (A (r, in), B (out, r), scaling), in fp32."""
    return {name: (A.float(), B.float(), scaling_of(adapter.config, name)) for name, (A, B) in adapter.pairs.items()}


# ------------------------------------------------------------------------------------------- before anything is written


def check_room(
    output_dir: Path, structure: Structure, stored: str, config: PreTrainedConfig, *, beside: int = 0
) -> None:
    """
    Args:
        beside: bytes that are copied as they are, at most.

    Raises:
        InputError: too little disk or memory for the merge, with the figures.
    """
    bits = {"float32": 32, "f32": 32, "q8_0": 8.5, "q5_0": 5.5, "q5_1": 6, "q4_0": 4.5, "q4_1": 5}.get(stored, 16)
    sizes = {name: torch.Size(shape).numel() for name, shape in structure.shapes.items()}
    disk, free = int(sum(sizes.values()) * bits / 8) + beside, free_disk(output_dir)
    if free < disk:
        raise InputError(f"{output_dir}: the merge takes {disk / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free.")
    # Tensors pass in pieces, but the codes of a map, and what a GGUF file is written from: a whole tensor, and before
    # its rows change places a q or k in fp32.
    in_gguf = not hasattr(torch, stored)
    largest = max(
        int(
            (size * 0.6 if structure.is_linear(name) else 0)
            + (size * bits / 8 if in_gguf else 0)
            + (size * 8 if in_gguf and is_permuted(name, config) else 0)
        )
        for name, size in sizes.items()
    )
    # The comparison has embeddings and head whole, of both sides one after the other, and a block of weights.
    ends = sum(size for name, size in sizes.items() if ".layers." not in name)
    block = sum(size for name, size in sizes.items() if ".layers.0." in name)
    compared = 4 * max(ends, block) + 2 * (ends + block)
    memory, available = max(largest, compared) + 4 * PIECE + (200 << 20), psutil.virtual_memory().available
    if available < memory:
        raise InputError(
            f"--model: the merge takes {memory / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available; close "
            "other programs, or use a machine with more."
        )
