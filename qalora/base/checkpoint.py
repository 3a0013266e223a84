"""The weights of a base, one tensor at a time and never a whole model: for merging, and for checking what was merged.

Hub id, folder ─ *.safetensors, *.bin ┐
folder saved in 4 bits ───────────────┼─ Checkpoint ─ pieces(name): blocks of rows │ tensor(name): the whole
*.gguf ───────────────────────────────┘               under the names that transformers gives
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Protocol

import numpy as np
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
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from qalora.base.gguf_config import gguf_config
from qalora.base.gguf_names import gguf_name, is_permuted, unpermuted
from qalora.base.gguf_reader import GGUFReader
from qalora.base.loading import storage_dtype
from qalora.base.registry import ModelSource, check_model_type
from qalora.errors import InputError

Pieces = Callable[[str], Iterator[Tensor]]  # name → consecutive blocks of rows

PIECE = 64 << 20  # bytes of a piece, in the dtype of the file
BLOCK = 64  # weights that share one absmax
STRETCH = 1 << 22  # weights that are quantized or dequantized at a time; whole blocks


class Checkpoint(Protocol):
    """Shapes and values of a model's tensors; `packed` holds those that are stored in 4 bits already."""

    shapes: dict[str, tuple[int, ...]]
    packed: frozenset[str]
    is_gguf: bool

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Consecutive blocks of rows, in the dtype of the file (GGUF types: in fp32)."""

    def tensor(self, name: str) -> Tensor: ...

    def in_4bit(self, name: str) -> tuple[Tensor, QuantState]:
        """A packed weight as bitsandbytes holds it."""


@dataclass(frozen=True)
class Quantization:
    """How the 4-bit weights of a training were made.

    Attributes:
        compute_dtype: weights were quantized from it and dequantized to it.
    """

    quant_type: str
    double_quant: bool
    compute_dtype: torch.dtype


def trained_pieces(checkpoint: Checkpoint, name: str, quantization: Quantization | None) -> Iterator[Tensor]:
    """Consecutive blocks of rows, in fp32, of a frozen map as the training computed with it; None: of an unquantized base.

    The codes of the whole map are in memory, its values only for the block at hand.
    """
    if quantization is None:
        yield from (piece.to(torch.float32, copy=True) for piece in checkpoint.pieces(name))  # the caller adds to it
        return
    device, block = "cuda" if torch.cuda.is_available() else "cpu", BLOCK
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
        codes, absmax = _quantized(_from_storage(checkpoint, name, dtype), quantization, device)
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


def _from_storage(checkpoint: Checkpoint, name: str, compute_dtype: torch.dtype) -> Iterator[Tensor]:
    """Flat parts of whole blocks, in the dtype that the weight was loaded in before it was quantized."""
    whole_blocks = checkpoint.shapes[name][1] % BLOCK == 0
    for piece in checkpoint.pieces(name) if whole_blocks else [checkpoint.tensor(name)]:
        piece = piece.to(storage_dtype(compute_dtype) if checkpoint.is_gguf else compute_dtype)
        yield from piece.reshape(-1).split(STRETCH)


def _quantized(parts: Iterator[Tensor], quantization: Quantization, device: str) -> tuple[Tensor, Tensor]:
    """Flat parts of a map → (4-bit codes, absmax of every block as it is dequantized), bit for bit what bitsandbytes makes
    of the whole.

    Its own call takes some six fp32 copies of the weight at a time. By parts it takes as many of a part; the absmax are
    quantized together, as they would be.
    """
    codes, absmax = [], []
    for part in parts:
        # As one row: bitsandbytes on a CPU lays blocks along rows, but quantizes the flattened matrix.
        data, state = quantize_4bit(
            part.to(device, quantization.compute_dtype).view(1, -1),
            blocksize=BLOCK, compress_statistics=False, quant_type=quantization.quant_type,
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

    Raises:
        InputError: no such model, a file that is missing or damaged, or not a LLaMA-class decoder.
    """
    folder = _downloaded(source) if source.kind == "hub" else Path(source.location)
    return open_folder(folder, source.gguf_file, name=source.name)


def open_folder(
    folder: Path, gguf_file: str | None = None, *, name: str | None = None, config: PreTrainedConfig | None = None
) -> tuple[Checkpoint, PreTrainedConfig]:
    """`open_checkpoint` of a folder, or of one GGUF file in it.

    Args:
        name: what errors call the model.
        config: of the model, where it is known; None: what the folder, or the file, says.
    """
    name = name or str(folder)
    config = config or _config(str(folder), gguf_file, name)
    wanted = expected_shapes(config)
    if gguf_file:
        checkpoint: Checkpoint = _Gguf(folder / gguf_file, config, wanted)
    elif list(folder.glob("*.safetensors")):
        checkpoint = _Safetensors(folder)
    elif list(folder.glob("pytorch_model*.bin")):
        checkpoint = _TorchFiles(folder)
    else:
        raise InputError(
            f"--model {name}: {folder} holds no weights (*.safetensors, pytorch_model*.bin or a .gguf file)."
        )
    if missing := sorted(set(wanted) - set(checkpoint.shapes)):
        raise InputError(f"--model {name}: {folder} lacks {len(missing)} weights ({', '.join(missing[:3])}).")
    for tensor, shape in wanted.items():
        if checkpoint.shapes[tensor] != shape:
            raise InputError(
                f"--model {name}: {tensor} is {checkpoint.shapes[tensor]} in the file, {shape} by the config."
            )
    return checkpoint, config


def open_config(source: ModelSource) -> PreTrainedConfig:
    """The config of a base; of one on the Hub nothing else is downloaded.

    Raises:
        InputError: no such model, or not a LLaMA-class decoder.
    """
    return _config(source.location, source.gguf_file, source.name)


def _config(location: str, gguf_file: str | None, name: str) -> PreTrainedConfig:
    try:
        config = gguf_config(location, gguf_file) if gguf_file else AutoConfig.from_pretrained(location)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise InputError(f"--model {name}: {location}: no config of a decoder to be had ({_short(error)}).") from None
    check_model_type(config.model_type, f"--model {name}")
    return config


def expected_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor that transformers saves for such a model; a tied head is none of them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }


class _Safetensors:
    """A folder of safetensors, 16- or 32-bit, or in bitsandbytes' 4 bits.

    The file is opened anew for each read: pages of a mapping that stays open would add up to the whole model.
    """

    is_gguf = False

    def __init__(self, folder: Path):
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        index = folder / "model.safetensors.index.json"
        try:
            names = (
                sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
                if index.is_file()
                else [file.name for file in sorted(folder.glob("*.safetensors"))]
            )
        except (ValueError, LookupError, TypeError, AttributeError):
            raise InputError(f"{index}: not the index of a checkpoint; download the model again.") from None
        for file in (folder / name for name in names):
            try:
                with safe_open(str(file), framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 (no mapping)
                        self.files[name] = file
                        self.shapes[name] = tuple(opened.get_slice(name).get_shape())
            except Exception as error:  # safetensors raises its own class, which older versions do not export
                raise InputError(f"{file}: not a safetensors file ({_short(error)}).") from None
        states = {name: name.rpartition(".quant_state.")[0] for name in self.files if ".quant_state." in name}
        self.packed = frozenset(states.values())
        for weight in self.packed:
            self.shapes[weight] = tuple(self._state(weight).shape)

    def pieces(self, name: str) -> Iterator[Tensor]:
        shape, start = self.shapes[name], 0
        while start < shape[0]:
            with safe_open(str(self.files[name]), framework="pt") as opened:
                rows = opened.get_slice(name)
                one = rows[start : start + 1]
                stop = start + max(1, PIECE // (one.nbytes or 1))
                yield rows[start:stop].clone()
            start = stop

    def tensor(self, name: str) -> Tensor:
        with safe_open(str(self.files[name]), framework="pt") as opened:
            return opened.get_tensor(name)

    def in_4bit(self, name: str) -> tuple[Tensor, QuantState]:
        return self.tensor(name), self._state(name)

    def _state(self, name: str) -> QuantState:
        parts = {part: self.tensor(part) for part in self.files if part.startswith(f"{name}.")}
        return QuantState.from_dict(parts, device=torch.device("cpu"))


class _TorchFiles:
    """A folder of pytorch_model*.bin, read without unpickling anything but tensors, and mapped."""

    packed: frozenset[str] = frozenset()
    is_gguf = False

    def __init__(self, folder: Path):
        self.tensors: dict[str, Tensor] = {}
        for file in sorted(folder.glob("pytorch_model*.bin")):
            try:
                self.tensors |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:
                raise InputError(f"{file}: cannot be read as tensors ({_short(error)}).") from None
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def pieces(self, name: str) -> Iterator[Tensor]:
        tensor = self.tensors[name]
        yield from tensor.split(max(1, PIECE * len(tensor) // tensor.nbytes))

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def in_4bit(self, name: str) -> tuple[Tensor, QuantState]:
        raise KeyError(name)


class _Gguf:
    """A GGUF file of any type that the gguf library dequantizes, read with plain file reads."""

    packed: frozenset[str] = frozenset()
    is_gguf = True

    def __init__(self, file: Path, config: PreTrainedConfig, wanted: Mapping[str, tuple[int, ...]]):
        try:
            infos = {tensor.name: tensor for tensor in GGUFReader(str(file)).tensors}
        except Exception as error:  # the library raises whatever numpy does
            raise InputError(f"{file}: not a GGUF file ({_short(error)}).") from None
        self.file, self.config = file, config
        self.infos = {
            name: (int(info.data_offset), tuple(info.data.shape), info.data.dtype, info.tensor_type)
            for name in wanted
            if (info := infos.get(gguf_name(name, config)))
        }
        self.shapes = {
            name: tuple(int(n) for n in reversed(infos[gguf_name(name, config)].shape)) for name in self.infos
        }

    def pieces(self, name: str) -> Iterator[Tensor]:
        if is_permuted(name, self.config):
            yield self.tensor(name)
            return
        rows, fp32_row = self.shapes[name][0], 4 * int(np.prod(self.shapes[name][1:]))
        step = max(1, PIECE // fp32_row)
        for start in range(0, rows, step):
            yield self._rows(name, start, min(rows, start + step))

    def tensor(self, name: str) -> Tensor:
        return unpermuted(name, self._rows(name, 0, self.shapes[name][0]), self.config)

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        from gguf import dequantize

        offset, shape, dtype, kind = self.infos[name]
        per_row = int(np.prod(shape[1:]))
        data = np.fromfile(
            self.file, dtype=dtype, count=(stop - start) * per_row, offset=offset + start * per_row * dtype.itemsize
        )
        return torch.from_numpy(np.array(dequantize(data.reshape(stop - start, *shape[1:]), kind), dtype=np.float32))

    def in_4bit(self, name: str) -> tuple[Tensor, QuantState]:
        raise KeyError(name)


def _downloaded(source: ModelSource) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [
        "*.json",
        "*.model",
        "model*.safetensors",
        "*.jinja",
    ]  # not a second copy of the weights in another layout
    try:
        folder = Path(snapshot_download(source.location, allow_patterns=patterns))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(source.location, allow_patterns=[*patterns, "pytorch_model*.bin"]))
    except Exception as error:  # offline, gated and unknown models each raise a class of their own
        raise InputError(
            f"--model {source.name}: {source.location} cannot be had; check the name, HF_TOKEN for gated models, and "
            f"HF_HUB_OFFLINE if it should be downloaded. ({_short(error)})"
        ) from None
    return folder


def _short(error: Any) -> str:
    return " ".join(str(error).split())[:200]
