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
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedConfig

from qalora.adapter.saved import SavedAdapter, read_adapter, scaling_of
from qalora.base.checkpoint import (
    Checkpoint,
    Pieces,
    Quantization,
    as_stored,
    is_linear_layer,
    open_checkpoint,
    trained_pieces,
)
from qalora.base.gguf_names import is_permuted
from qalora.base.registry import ModelSource
from qalora.base.tensor_files import PIECE, expected_shapes
from qalora.card_files import keep_users_card, write_card
from qalora.deploy.output import REPORT, check_output, free_disk, one_at_a_time
from qalora.deploy.settings import served_after, write_settings
from qalora.deploy.verification import TOLERANCE, Rounding, Update, as_read, as_trained, compare, fault
from qalora.errors import AnswerNo, InputError
from qalora.files import written_beside
from qalora.progress import Bar
from qalora.results.card import merged_card

Format = Literal["hf", "gguf"]
SAFETENSORS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


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
    adapter.check_fit(maps_of(checkpoint.shapes))
    if quantization is not None:
        quantization = as_stored(checkpoint, quantization)
    elif checkpoint.packed:
        raise InputError(
            f"--model {source.name}: stored in 4 bits, and --base original asks for 16-bit weights; leave it out, or "
            "pass the 16-bit model that it was made from."
        )
    updates = low_rank_updates(adapter)
    served = served_after(source, config, adapter_dir)
    pieces = merged_pieces(checkpoint, updates, quantization)
    shapes = expected_shapes(config)
    stored = gguf_type if format == "gguf" else str(dtype).removeprefix("torch.")
    check_room(output_dir, shapes, stored, config)

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
            write_safetensors(partial, shapes, pieces, dtype, max_shard_size)
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


def maps_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Name → shape of a model's tensors → full module name → (in, out) of every linear map of its blocks."""
    return {
        name.removesuffix(".weight"): (shape[1], shape[0]) for name, shape in shapes.items() if is_linear_layer(name)
    }


def low_rank_updates(adapter: SavedAdapter) -> dict[str, Update]:
    """Full module name → (A (r, in), B (out, r), scaling), in fp32."""
    return {name: (A.float(), B.float(), scaling_of(adapter.config, name)) for name, (A, B) in adapter.pairs.items()}


# ------------------------------------------------------------------------------------------- before anything is written


def check_room(output_dir: Path, shapes: Mapping[str, tuple[int, ...]], stored: str, config: PreTrainedConfig) -> None:
    """
    Raises:
        InputError: too little disk or memory for the merge, with the figures.
    """
    bits = {"float32": 32, "f32": 32, "q8_0": 8.5, "q5_0": 5.5, "q5_1": 6, "q4_0": 4.5, "q4_1": 5}.get(stored, 16)
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    disk, free = int(sum(sizes.values()) * bits / 8), free_disk(output_dir)
    if free < disk:
        raise InputError(f"{output_dir}: the merge takes {disk / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free.")
    # Tensors pass in pieces, but the codes of a map, and what a GGUF file is written from: a whole tensor, and before
    # its rows change places a q or k in fp32.
    in_gguf = not hasattr(torch, stored)
    largest = max(
        int(
            (size * 0.6 if is_linear_layer(name) else 0)
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


# -------------------------------------------------------------------------------------------------------------- writing


def write_safetensors(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], pieces: Pieces, dtype: torch.dtype, max_shard_size: int
) -> None:
    """Writes safetensors shards with their index, piece by piece; the library's own writer wants a shard in memory.

    https://github.com/huggingface/safetensors#format

    Raises:
        InputError: a value beyond the range of `dtype`.
    """
    layout = split_torch_state_dict_into_shards(
        {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in sorted(shapes.items())},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    with Bar("merging", len(shapes)) as bar:
        for file, names in layout.filename_to_tensors.items():
            _write_shard(folder / file, {name: shapes[name] for name in names}, pieces, dtype, bar)
    if layout.is_sharded:
        index = {"metadata": layout.metadata, "weight_map": layout.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(
    file: Path, shapes: Mapping[str, tuple[int, ...]], pieces: Pieces, dtype: torch.dtype, bar: Bar
) -> None:
    """A safetensors file: header size (8 bytes), JSON header, the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            for piece in pieces(name):
                handle.write(rounded(name, piece, dtype).view(torch.uint8).numpy().data)
            bar.advance()
        if handle.tell() != 8 + len(text) + end:
            raise RuntimeError(f"{file.name}: {handle.tell()} bytes written of {8 + len(text) + end}")


def rounded(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """
    Raises:
        InputError: a value that `dtype` cannot hold.
    """
    result = value.to(dtype).contiguous()
    if not torch.isfinite(result).all():
        raise InputError(f"{name}: a merged value is beyond the range of {dtype}; use bfloat16.")
    return result
