"""The frozen weights as a training computed with them, a tensor at a time and never a whole model: for loading, and for
merging.

    files ─ Checkpoint ─ quantized and dequantized, or cast, as the training did ─ pieces of rows in fp32

Which files these are, and whether the head is tied, is decided here for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from math import ceil

import torch
from bitsandbytes.functional import (
    QuantState,
    dequantize_4bit,
    dequantize_blockwise,
    get_4bit_type,
    quantize_4bit,
    quantize_blockwise,
)
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qalora.base.device import best_device
from qalora.base.families import in_decoder
from qalora.base.registry import ModelSource, check_family
from qalora.base.structure import EMBEDDINGS, HEAD, structure_of, text_part
from qalora.base.tensor_files import Checkpoint, open_files
from qalora.base.weight_files import base_folder, weight_files
from qalora.errors import InputError, short
from qalora.sizes import QUANT_BLOCK

Pieces = Callable[[str], Iterator[Tensor]]  # name → consecutive blocks of rows
Weights = Callable[[str], Tensor]  # name of a linear layer → its (out, in) weight before quantization

STRETCH = 1 << 22  # weights that are quantized or dequantized at a time; whole blocks


@dataclass(frozen=True)
class Quantization:
    """How a training had the frozen weights.

    Attributes:
        quant_type: nf4 or fp4, of the linear layers of the blocks; None: they were not quantized.
        compute_dtype: all weights were cast to it; those in 4 bits were quantized from it and dequantized to it.
    """

    quant_type: str | None
    double_quant: bool
    compute_dtype: torch.dtype

    @property
    def name(self) -> str:
        """bfloat16, float16 or float32."""
        return str(self.compute_dtype).removeprefix("torch.")


def storage_dtype(quantization: Quantization, *, is_gguf: bool) -> torch.dtype:
    """What tensors are read into before they are quantized or computed with."""
    if is_gguf and quantization.quant_type and quantization.compute_dtype == torch.float32:
        return torch.bfloat16  # fp32 would double the peak for weights that a GGUF file has in fewer bits anyway
    return quantization.compute_dtype


def as_stored(checkpoint: Checkpoint, quantization: Quantization) -> Quantization:
    """The same, with the 4-bit form that the weights of a base have already where it is stored so."""
    if not checkpoint.packed:
        return quantization
    _, state = checkpoint.in_4bit(min(checkpoint.packed))
    return replace(quantization, quant_type=state.quant_type, double_quant=state.nested)


def trained_pieces(checkpoint: Checkpoint, name: str, quantization: Quantization | None) -> Iterator[Tensor]:
    """Consecutive blocks of rows, in fp32, of a frozen tensor as the training computed with it.

    The codes of a whole matrix are in memory, its values only for the block at hand.

    Args:
        quantization: of the training; None: the tensor as it is stored.
    """
    if quantization is None:
        yield from (piece.to(torch.float32, copy=True) for piece in checkpoint.pieces(name))  # the caller adds to it
    elif name in checkpoint.packed or (quantization.quant_type and checkpoint.structure.is_linear(name)):
        yield from _dequantized_pieces(checkpoint, name, quantization)
    else:
        stored = storage_dtype(quantization, is_gguf=checkpoint.is_gguf)
        for piece in checkpoint.pieces(name):
            yield piece.to(stored).to(quantization.compute_dtype).to(torch.float32, copy=True)


def _dequantized_pieces(checkpoint: Checkpoint, name: str, quantization: Quantization) -> Iterator[Tensor]:
    device, block = str(best_device()), QUANT_BLOCK
    (fan_out, fan_in), dtype, quant_type = checkpoint.shapes[name], quantization.compute_dtype, quantization.quant_type
    if name in checkpoint.packed:
        data, state = checkpoint.in_4bit(name)
        # Codes may be stored under another dtype (bnb_4bit_quant_storage).
        codes, quant_type, block = data.to(device).reshape(-1).view(torch.uint8), state.quant_type, state.blocksize
        state.to(device)
        absmax = state.absmax
        if state.nested:
            absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
    else:
        codes, absmax = _quantized(_from_storage(checkpoint, name, quantization), quantization, device)
    code = get_4bit_type(quant_type, device=device)
    step = block * max(1, STRETCH // (block * fan_in))  # rows that hold whole blocks, however wide they are
    for row in range(0, fan_out, step):
        start, stop = row * fan_in, min(row + step, fan_out) * fan_in
        part = QuantState(
            absmax=absmax[start // block : ceil(stop / block)].float().contiguous(),
            shape=torch.Size((1, stop - start)), code=code, blocksize=block, quant_type=quant_type, dtype=dtype,
        )  # fmt: skip
        packed = codes[start // 2 : (stop + 1) // 2].view(-1, 1)
        yield dequantize_4bit(packed, part).view(-1, fan_in).to("cpu", torch.float32)


def _from_storage(checkpoint: Checkpoint, name: str, quantization: Quantization) -> Iterator[Tensor]:
    """Flat parts of whole blocks, in the dtype that the weight was loaded in before it was quantized."""
    whole_blocks = checkpoint.shapes[name][1] % QUANT_BLOCK == 0
    for piece in checkpoint.pieces(name) if whole_blocks else [checkpoint.tensor(name)]:
        piece = piece.to(storage_dtype(quantization, is_gguf=checkpoint.is_gguf))
        yield from piece.reshape(-1).split(STRETCH)


def _quantized(parts: Iterator[Tensor], quantization: Quantization, device: str) -> tuple[Tensor, Tensor]:
    """Flat parts of a map → (4-bit codes, absmax of every block as it is dequantized), bit for bit what bitsandbytes
    makes of the whole.

    Its own call takes some six fp32 copies of the weight at a time. By parts it takes as many of a part; the absmax are
    quantized together, as they would be.
    """
    codes, absmax = [], []
    for part in parts:
        # As one row: bitsandbytes on a CPU lays blocks along rows, but quantizes the flattened matrix.
        data, state = quantize_4bit(
            part.to(device, quantization.compute_dtype).view(1, -1),
            blocksize=QUANT_BLOCK, compress_statistics=False, quant_type=quantization.quant_type,
        )  # fmt: skip
        codes.append(data.view(-1))
        absmax.append(state.absmax.view(-1))
    scales = torch.cat(absmax)
    if quantization.double_quant:
        offset = scales.mean()
        nested, state = quantize_blockwise(scales - offset, blocksize=256)
        scales = dequantize_blockwise(nested, state) + offset
    return torch.cat(codes), scales


def open_checkpoint(source: ModelSource) -> tuple[Checkpoint, PreTrainedConfig]:
    """The weights and the config of a base, with nothing but headers read.

    Returns:
        The config says whether the head is tied as the files decide it: see `_decide_tying`.

    Raises:
        InputError: no such model, a file that is missing or damaged, or not a decoder that can be trained.
    """
    folder, name = base_folder(source), source.name
    config = _config(str(folder), source.gguf_file, name)
    found = weight_files(folder, source.gguf_file, name=name)
    checkpoint = open_files(found, config)
    _decide_tying(checkpoint, config)
    checkpoint.structure = structure_of(config)
    wanted = checkpoint.structure.shapes
    if missing := sorted(set(wanted) - set(checkpoint.shapes)):
        why = " (config.json says tie_word_embeddings: false)" if missing == [HEAD] else ""
        raise InputError(
            f"--model {name}: {found.files[0].name} and the files with it in {folder} lack {len(missing)} weights "
            f"({', '.join(missing[:3])}){why}."
        )
    for tensor, shape in wanted.items():
        if checkpoint.shapes[tensor] != shape:
            raise InputError(
                f"--model {name}: {tensor} is {checkpoint.shapes[tensor]} in the file, {shape} by the config."
            )
    check_left_out(checkpoint.shapes, wanted, f"--model {name}: {folder}")
    return checkpoint, config


def check_left_out(names: Iterable[str], wanted: Iterable[str], where: str) -> None:
    """
    Args:
        names: of weights in files.
        wanted: the model's own.

    Raises:
        InputError: files have a weight or a bias of a module of the model that its config leaves out.
    """
    own = set(wanted)
    modules = {name.rpartition(".")[0] for name in own}
    left = sorted(
        name
        for name in set(names) - own
        for module, _, kind in [name.rpartition(".")]
        if kind in ("weight", "bias") and module in modules
    )
    if left:
        raise InputError(
            f"{where} has {len(left)} weights ({', '.join(left[:3])}) for which its config.json leaves no place, such "
            "as by attention_bias=false; mend config.json, or take them out."
        )


def _decide_tying(checkpoint: Checkpoint, config: PreTrainedConfig) -> None:
    """Sets `config.tie_word_embeddings` to what transformers makes of config and files.

    Only what the config ties is tied, and of that nothing whose two matrices are both in the files and differ; where
    the head alone is there, it is the embeddings too.
    """
    if not config.tie_word_embeddings:
        return
    there = [name in checkpoint.shapes for name in (EMBEDDINGS, HEAD)]
    if there == [False, True]:
        checkpoint.stored[EMBEDDINGS], checkpoint.shapes[EMBEDDINGS] = checkpoint.stored[HEAD], checkpoint.shapes[HEAD]
    elif all(there):
        config.tie_word_embeddings = _equal(checkpoint, EMBEDDINGS, HEAD)


def _equal(checkpoint: Checkpoint, left: str, right: str) -> bool:
    if checkpoint.shapes[left] != checkpoint.shapes[right]:
        return False
    pairs = zip(checkpoint.pieces(left), checkpoint.pieces(right), strict=False)
    return all(one.shape == other.shape and torch.equal(one, other.to(one.dtype)) for one, other in pairs)


def open_config(source: ModelSource) -> PreTrainedConfig:
    """The config of a base; of one on the Hub nothing else is downloaded.

    Raises:
        InputError: no such model, not a decoder that can be trained, or positions that nobody can compute.
    """
    return _config(source.location, source.gguf_file, source.name)


def _config(location: str, gguf_file: str | None, name: str) -> PreTrainedConfig:
    try:
        if gguf_file:
            from qalora.base.gguf_config import gguf_config

            config = gguf_config(location, gguf_file)
        else:
            config = AutoConfig.from_pretrained(location)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise InputError(f"--model {name}: {location}: no config of a decoder to be had ({short(error)}).") from None
    config = text_part(config)
    check_family(config.to_dict(), f"--model {name}")
    check_positions(config, f"--model {name}")
    check_padding(config, f"--model {name}")
    return config


def check_positions(config: PreTrainedConfig, where: str) -> None:
    """
    Raises:
        InputError: a scaling of positions that transformers does not know, or that lacks what it needs.
    """
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind == "default":
        return
    if kind not in ROPE_INIT_FUNCTIONS:
        known = ", ".join(["default", *sorted(ROPE_INIT_FUNCTIONS)])
        raise InputError(f"{where}: rope_type={kind}: transformers knows no such scaling of positions ({known}).")
    try:
        ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    except (KeyError, TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise InputError(
            f"{where}: rope_type={kind}: its settings are not such that positions can be computed "
            f"({type(error).__name__}: {short(error)})."
        ) from None


def check_padding(config: PreTrainedConfig, where: str) -> None:
    """
    Raises:
        InputError: a pad token that has no embedding, for which transformers builds no model.
    """
    pad, tokens = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    if isinstance(pad, int) and isinstance(tokens, int) and pad >= tokens:
        raise InputError(
            f"{where}: config.json has pad_token_id {pad}, and vocab_size {tokens}; make it null there, for the "
            "tokenizer says what pads."
        )


def original_weights(checkpoint: Checkpoint, model: str) -> Weights:
    """The 16-bit weights of a base, read a map at a time.

    Raises:
        InputError: the base is stored in 4 bits, and its 16-bit weights are not there; names it by `model`.
    """
    if checkpoint.packed:
        raise InputError(
            f"lora.init=quantization gives back what 4 bits took, and --model {model} is stored in 4 bits: use the "
            "16-bit model that it was made from, or another lora.init."
        )
    return lambda name: checkpoint.tensor(f"{in_decoder(name)}.weight")
