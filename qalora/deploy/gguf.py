"""What llama.cpp and Ollama read: a merged model or an adapter as GGUF.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; keys, names and number formats are the gguf library's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, TokenType, dequantize, quantize
from gguf.constants import GGML_QUANT_SIZES, Keys, LlamaFileType
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from qalora.base.checkpoint import Pieces
from qalora.base.gguf_config import add_positions, position_tensors
from qalora.base.gguf_fields import metadata
from qalora.base.gguf_names import (
    adapter_from_gguf,
    adapter_to_gguf,
    constant,
    gguf_names,
    gguf_of,
    is_convolution,
    is_permuted,
    to_gguf,
)
from qalora.base.gguf_reader import open_gguf
from qalora.base.registry import ModelSource
from qalora.data.ending import Ending
from qalora.deploy.gguf_limits import check_written
from qalora.errors import InputError
from qalora.progress import track

# The regular expression in tokenizer.json that splits text before BPE → llama.cpp's name for it; where that takes words
# that are tokens as they are, whatever the merges, another name does not.
# https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?%s+|%s| ?[^\s%s\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES = "|".join(rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{a}{_LOWER}{b}%s" for a, b in (("*", "+"), ("+", "*")))
_REST = r"|%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLITS = {
    _WORDS % (r"\p{L}", r"\p{N}{1,3}", r"\p{L}"): ("llama-bpe", "dbrx"),
    _WORDS % (r"\p{L}", r"\p{N}", r"\p{L}"): ("qwen2", "qwen2"),
    _WORDS % (r"[\p{L}\p{M}]", r"\p{N}", r"\p{L}\p{M}"): ("qwen35", "qwen35"),
    _CASES % ("", "") + _REST % r"\p{N}": ("tekken", "tekken"),
    _CASES % (_ENDS, _ENDS) + _REST % r"\p{N}{1,3}": ("gpt-4o", "gpt-4o"),
}
# llama.cpp stops at either, as at eos; a third one it knows by its text.
TURN_ENDS = (Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID)
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


class Writer(GGUFWriter):  # type: ignore[misc]
    """Writes empty arrays too: of a byte-level tokenizer without merges llama.cpp still asks for the list."""

    def _pack_val(self, val: Any, vtype: Any, add_vtype: bool, sub_type: Any = None) -> bytes:
        if vtype != GGUFValueType.ARRAY or len(val):
            return bytes(super()._pack_val(val, vtype, add_vtype, sub_type))
        kinds = [*([vtype] if add_vtype else []), sub_type or GGUFValueType.STRING]
        return b"".join(self._pack("I", kind) for kind in kinds) + self._pack("Q", 0)


def write_model(
    file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    pieces: Pieces,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    gguf_type: str,
    source: ModelSource,
    ending: Ending,
) -> None:
    """Writes a whole model, a tensor at a time.

    Args:
        shapes, pieces: of the tensors under transformers' names, see `Checkpoint`.
        source: a GGUF base hands on its tokenizer as it stands.
        ending: its turns are the end-of-turn tokens.

    Raises:
        InputError: a model or a tokenizer that has no GGUF form here, or a value beyond the range of the type.
    """
    check_written(config, shapes)
    writer = Writer(str(file), gguf_of(config).architecture)
    _add_shape(writer, config, gguf_type)
    _add_constants(writer, shapes, pieces)
    turns = [token for token in ending.turns if token != tokenizer.eos_token_id]
    if source.gguf_file:
        turns += _copy_tokenizer(writer, Path(source.location) / source.gguf_file)
    else:
        _add_tokenizer(writer, tokenizer, config)
    template: Any = tokenizer.chat_template
    if template:
        named = isinstance(template, dict)  # several, of which one is the default
        writer.add_chat_template([dict(name=n, template=t) for n, t in template.items()] if named else template)
    for key, token in zip(TURN_ENDS, dict.fromkeys(turns), strict=False):
        writer.add_uint32(key, token)
    positions = position_tensors(config)
    for name, values in positions.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    tensors = {name: shape for name, shape in shapes.items() if not constant(name)}
    kinds = {name: _kind(name, shape, gguf_type) for name, shape in tensors.items()}
    for name, shape in tensors.items():
        parts = gguf_names(name, config)
        shape = (shape[0] // len(parts), *shape[2 if is_convolution(name) else 1 :])
        for part in parts:
            writer.add_tensor_info(part, shape, np.dtype(np.float32), _bytes(shape, kinds[name]), kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in positions.values():
        writer.write_tensor_data(values)
    for name, shape in track(tensors.items(), "merging"):
        encoded = _encoded(name, shape, pieces(name), kinds[name], config)
        for rows in np.split(encoded, len(gguf_names(name, config))):
            writer.write_tensor_data(rows)
    writer.close()


def narrower(config: PreTrainedConfig) -> str | None:
    """What llama.cpp does otherwise than the model: of many it knows no sliding windows; None: nothing."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    known = gguf_of(config).windows
    if known or not window or window >= config.max_position_embeddings or "sliding_attention" not in kinds:
        return None
    return (
        f"sliding_window={window}: llama.cpp attends to the whole text in {config.model_type} models, so the GGUF file "
        f"answers as trained up to {window} tokens, and otherwise beyond; --format hf keeps the window"
    )


def write_adapter(file: Path, updates: Mapping[str, tuple[Tensor, Tensor, float]], config: PreTrainedConfig) -> None:
    """Writes a LoRA of one rank as a GGUF adapter (`llama-cli --lora FILE`), in fp32.

    llama.cpp scales by alpha over the tensor's own rank, so every module needs the same rank and scaling.
    """
    ranks = {len(A) for A, _, _ in updates.values()}
    scalings = {s for _, _, s in updates.values()}
    if len(ranks) != 1 or len(scalings) != 1:
        raise ValueError(f"ranks {ranks} and scalings {scalings}: an adapter in GGUF has one of each")
    writer = GGUFWriter(str(file), gguf_of(config).architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(scalings.pop() * ranks.pop()))
    for name, (A, B, _) in updates.items():
        parts = gguf_names(f"{name}.weight", config)
        A, B = adapter_to_gguf(name, A, B, config)
        for part, rows in zip(parts, B.chunk(len(parts)), strict=True):
            writer.add_tensor(f"{part}.lora_a", A.contiguous().numpy())
            writer.add_tensor(f"{part}.lora_b", rows.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_adapter(file: Path, names: list[str], config: PreTrainedConfig) -> dict[str, tuple[Tensor, Tensor, float]]:
    """What llama.cpp reads: module → (A, B, alpha over the tensor's own rank)."""
    reader = open_gguf(file)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    found = {}
    for name in names:
        parts = gguf_names(f"{name}.weight", config)
        B = torch.cat([tensors[f"{part}.lora_b"] for part in parts])
        A, B = adapter_from_gguf(name, tensors[f"{parts[0]}.lora_a"], B, config)
        found[name] = (A, B, alpha / len(A))
    return found


# -------------------------------------------------------------------------------------------------------------- tensors


def _kind(name: str, shape: tuple[int, ...], gguf_type: str) -> GGMLQuantizationType:
    """Vectors, norms and convolutions stay fp32, as llama.cpp wants them; embeddings and head keep 8 bits where the
    maps have fewer."""
    if len(shape) != 2 or "norm" in name:
        return GGMLQuantizationType.F32
    wanted = GGMLQuantizationType[gguf_type.upper()]
    block, size = GGML_QUANT_SIZES[wanted]
    if ".layers." not in name and size / block < GGML_QUANT_SIZES[GGMLQuantizationType.Q8_0][1] / 32:
        wanted = GGMLQuantizationType.Q8_0
    return wanted if shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else GGMLQuantizationType.F16


def stored(name: str, value: Tensor, gguf_type: str) -> Tensor:
    """(rows, in) or (out,): what a reader of the file finds for such values, in fp32."""
    kind = _kind(name, tuple(value.shape), gguf_type)
    return torch.from_numpy(dequantize(quantize(value.float().contiguous().numpy(), kind), kind)).view(value.shape)


def _bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * size


def _encoded(
    name: str, shape: tuple[int, ...], pieces: Iterator[Tensor], kind: GGMLQuantizationType, config: PreTrainedConfig
) -> Any:
    """The tensor's bytes; rows are quantized as their piece arrives, but for a tensor whose rows change places."""
    out = np.empty(_bytes(shape, kind), dtype=np.uint8)
    at = 0
    for piece in [torch.cat(list(pieces))] if is_permuted(name, config) else pieces:
        rows = to_gguf(name, piece, config).float().contiguous().numpy()
        if kind == GGMLQuantizationType.F16 and np.abs(rows).max(initial=0.0) > np.finfo(np.float16).max:
            raise InputError(f"{name}: a merged value is beyond the range of f16; pass --gguf-type bf16.")
        data = quantize(rows, kind).view(np.uint8).reshape(-1)
        out[at : at + data.size] = data
        at += data.size
    return out


# ------------------------------------------------------------------------------------------------------------- metadata


def _add_shape(writer: GGUFWriter, config: PreTrainedConfig, gguf_type: str) -> None:
    writer.add_type("model")
    writer.add_file_type(LlamaFileType[{"f32": "ALL_F32"}.get(gguf_type, f"MOSTLY_{gguf_type.upper()}")])
    writer.add_quantization_version(2)
    architecture = gguf_of(config).architecture
    for key, value in metadata(config).items():
        _add(writer, f"{architecture}.{key}", value)
    add_positions(writer, config)


def _add_constants(writer: GGUFWriter, shapes: Mapping[str, tuple[int, ...]], pieces: Pieces) -> None:
    found: dict[str, list[float]] = {}
    for name in shapes:
        if key := constant(name):
            found.setdefault(key, []).append(float(torch.cat([piece.reshape(-1) for piece in pieces(name)])))
    for key, values in found.items():
        _add(writer, key, values)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
    if isinstance(value, list):
        writer.add_key_value(key, value, GGUFValueType.ARRAY, sub_type=kinds[type(value[0])])
    else:
        writer.add_key_value(key, value, kinds[type(value)])


def _copy_tokenizer(writer: GGUFWriter, file: Path) -> list[int]:
    """Copies all of the file's tokenizer but its chat template and its end-of-turn tokens, which it returns."""
    fields = open_gguf(file).fields
    for key, field in fields.items():
        if key.startswith("tokenizer.") and key not in (*TURN_ENDS, Keys.Tokenizer.CHAT_TEMPLATE):
            kinds = field.types
            value = field.contents()
            writer.add_key_value(key, value, kinds[0], sub_type=kinds[1] if len(kinds) > 1 else None)
    return [int(fields[key].contents()) for key in TURN_ENDS if key in fields]


def _add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """From tokenizer.json: byte-level BPE (gpt2 in GGUF), or SentencePiece's BPE with byte fallback (llama, which goes
    by scores; or gemma4, which goes by merges)."""
    vocab_size = config.vocab_size
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise InputError(f"the tokenizer is a {model['type']} model; GGUF is written for BPE and SentencePiece ones.")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    ids = [(i, token) for token, i in model["vocab"].items()]
    last, name = max(ids + [(added["id"], added["content"]) for added in backend["added_tokens"]])
    if last >= vocab_size:
        raise InputError(
            f"the tokenizer has more tokens (the last is {name!r}, {last}) than the model has embeddings "
            f"({vocab_size}), which GGUF cannot hold; use --format hf."
        )
    for i, token in ids:
        tokens[i], types[i] = token, TokenType.NORMAL
    for added in backend["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if model.get("byte_fallback"):
        for byte in range(256):
            types[model["vocab"][f"<0x{byte:02X}>"]] = TokenType.BYTE
        if tokenizer.unk_token_id is not None:
            types[tokenizer.unk_token_id] = TokenType.UNKNOWN
        by_merges = gguf_of(config).architecture == "gemma4"
        writer.add_tokenizer_model("gemma4" if by_merges else "llama")
        writer.add_tokenizer_pre("gemma4" if by_merges else "default")
        writer.add_token_list(tokens)
        if by_merges:
            writer.add_token_merges(merges)
        writer.add_token_scores(_scores(tokens, model["merges"]))
        writer.add_add_space_prefix(tokenizer.backend_tokenizer.encode("x", add_special_tokens=False).tokens != ["x"])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(backend))
        writer.add_token_list(tokens)
        writer.add_key_value(Keys.Tokenizer.MERGES, merges, GGUFValueType.ARRAY, sub_type=GGUFValueType.STRING)
    writer.add_token_types(types)
    for name in ("bos", "eos", "unk", "pad"):
        if (i := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(i)
    ids = tokenizer("x")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)


def _scores(tokens: list[str], merges: Sequence[str | Sequence[str]]) -> list[float]:
    """SentencePiece merges what scores highest first, a merge list what comes first: score = −rank of the merge."""
    made: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        made.setdefault(left + right, -float(rank))
    return [made.get(token, -1e6) for token in tokens]


def _pre_tokenizer(backend: Mapping[str, Any]) -> str:
    """llama.cpp's name for how text is split before BPE; a name that does not fit would split it differently, and say
    nothing.

    Raises:
        InputError: a way that has no name here.
    """
    whole = backend["pre_tokenizer"] or {"type": None}
    steps = whole.get("pretokenizers", [whole])
    name = None
    match steps:  # a ByteLevel with use_regex splits by GPT-2's expression, and by none without
        case [
            {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
        ]:
            whole_words, merged = SPLITS.get(words, (None, None))
            name = whole_words if backend["model"].get("ignore_merges") else merged
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False},
        ]:
            name = "smollm"
        case [{"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            name = "gpt-2"
    if name is None:
        raise InputError(
            f"the tokenizer splits text in a way that has no GGUF name here ({json.dumps(whole)[:200]}); use --format "
            "hf and llama.cpp's own converter."
        )
    return name
