"""Whether a base is quantized when it is loaded, and the line that says so where it was rounded before. Torch-free."""

from __future__ import annotations

from pathlib import Path

from qalora.base.registry import ModelSource

MERGED = "merge.json"  # what `qalora merge` writes beside the weights
UNROUNDED = ("ALL_F32", "MOSTLY_F16", "MOSTLY_BF16")


def is_merged(source: ModelSource) -> bool:
    """Whether `qalora merge` wrote the folder, or the GGUF file."""
    return source.kind != "hub" and (Path(source.location) / MERGED).is_file()


def loaded_in_4bit(source: ModelSource, asked: bool, *, trained_on: bool) -> tuple[bool, str | None]:
    """Whether to load a base in 4 bits, and a line about it where the user would not expect it.

    Args:
        asked: by the recipe, or by default.
        trained_on: an adapter is, or was, trained on it: then its weights are those of the training. Otherwise a merged
            model is taken as it is, for its weights are what was trained.
    """
    if not asked:
        return False, None
    if is_merged(source) and not trained_on:
        return False, f"--model {source.name}: a merged model, taken as it is: not quantized again"
    rounded = "merged" if is_merged(source) else _gguf_type(source)
    if rounded is None:
        return True, None
    return True, (
        f"--model {source.name}: its weights ({rounded}) are quantized again, to 4 bits, which changes them; "
        "--no-quantize takes them as they are"
    )


def _gguf_type(source: ModelSource) -> str | None:
    """Of a GGUF file with quantized weights, what they are; None of any other base."""
    if source.gguf_file is None:
        return None
    from gguf.constants import Keys, LlamaFileType

    from qalora.base.gguf_reader import open_gguf

    field = open_gguf(Path(source.location) / source.gguf_file).fields.get(Keys.General.FILE_TYPE)
    try:
        name = LlamaFileType(int(field.contents())).name if field else UNROUNDED[0]
    except ValueError:  # a newer type
        return "quantized GGUF"
    return None if name in UNROUNDED else name.removeprefix("MOSTLY_")
