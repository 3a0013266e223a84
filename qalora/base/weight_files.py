"""Which files of a base are read, for training and for merging alike, and as transformers decides it. Torch-free.

    model.safetensors  >  model.safetensors.index.json  >  pytorch_model.bin  >  pytorch_model.bin.index.json

Whatever else lies beside them, an older index or an adapter's weights, is not read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qalora.base.layout import refuse_adapter_beside, shards_of
from qalora.base.registry import ModelSource, hub_hint, read_fields
from qalora.errors import InputError, short

# A whole model in one file, and the index of one in several, in the order in which they are looked for.
LAYOUTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
SETTINGS = ["*.json", "*.model", "*.jinja"]  # all that a base on the Hub has beside its weights


@dataclass(frozen=True)
class WeightFiles:
    """
    Attributes:
        files: in the order in which they are read; of a tensor that two of them hold, the later one counts.
    """

    kind: Literal["safetensors", "torch", "gguf"]
    files: tuple[Path, ...]


def weight_files(folder: Path, gguf_file: str | None = None, *, name: str) -> WeightFiles:
    """The files of a base in a folder, each of them there.

    Args:
        name: what errors call the model.

    Raises:
        InputError: no weights, an index that is none, or a file that the index names and the folder lacks.
    """
    if gguf_file:
        return WeightFiles("gguf", tuple(shards_of(folder / gguf_file)))
    asked = read_fields(folder / "config.json").get("transformers_weights")
    layouts = ((str(asked), str(asked)),) if asked else LAYOUTS
    for single, index in layouts:
        if (folder / single).is_file() and not single.endswith(".index.json"):
            return WeightFiles(_kind(single), (folder / single,))
        if (folder / index).is_file():
            files = tuple(folder / shard for shard in shards_in(folder / index))
            if missing := [file.name for file in files if not file.is_file()]:
                raise InputError(
                    f"--model {name}: {folder / index} names {len(files)} files, of which {len(missing)} are not there "
                    f"({', '.join(missing[:3])}); download the model again."
                )
            return WeightFiles(_kind(files[0].name), files)
    wanted = asked or "model.safetensors, pytorch_model.bin or the index of one of them, or a .gguf file"
    others = ", ".join(sorted(file.name for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))[:3])
    raise InputError(
        f"--model {name}: {folder} holds no weights that are read ({wanted})"
        + (f"; it has {others}." if others else ".")
    )


def shards_in(index: Path) -> list[str]:
    """Names of the files that an index speaks of.

    Raises:
        InputError: not the index of a checkpoint.
    """
    try:
        fields = json.loads(index.read_text(encoding="utf-8"))
        names = sorted(set(fields["weight_map"].values()))
        if not names or not all(isinstance(name, str) for name in names):
            raise TypeError
    except (ValueError, LookupError, TypeError, AttributeError):
        raise InputError(f"{index}: not the index of a checkpoint; download the model again.") from None
    if "metadata" not in fields:
        raise InputError(
            f'{index}: lacks "metadata", without which transformers reads no index; add "metadata": {{}} to it.'
        )
    return names


def base_folder(source: ModelSource) -> Path:
    """Where the files of a base lie; those of one on the Hub are downloaded first, in the layout that is read and in no
    other.

    Raises:
        InputError: no such model, or it cannot be downloaded.
    """
    if source.kind != "hub":
        if source.kind == "folder":
            refuse_adapter_beside(Path(source.location), source.name)
        return Path(source.location)

    from huggingface_hub import snapshot_download

    def download(*patterns: str) -> Path:
        return Path(snapshot_download(source.location, allow_patterns=[*SETTINGS, *patterns]))

    try:
        for single, index in LAYOUTS:
            folder = download(single)
            if (folder / single).is_file():
                break
            if (folder / index).is_file():
                folder = download(*shards_in(folder / index))
                break
    except InputError:
        raise
    except Exception as error:  # offline, gated and unknown models each raise a class of their own
        raise InputError(
            f"--model {source.name}: {source.location} cannot be loaded; {hub_hint(source)}. ({short(error)})"
        ) from None
    refuse_adapter_beside(folder, source.name)
    return folder


def _kind(file: str) -> Literal["safetensors", "torch"]:
    return "safetensors" if file.endswith(".safetensors") else "torch"
