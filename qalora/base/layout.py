"""How the files of one model lie: those that belong together, and what must not lie beside them. Torch-free."""

from __future__ import annotations

import re
from pathlib import Path

from qalora.errors import InputError


def shards_of(file: Path) -> list[Path]:
    """All files of a GGUF model that is split (NAME-00001-of-00003.gguf), the first of them first; else the file alone.

    Args:
        file: any of them.

    Raises:
        InputError: one of them is not there.
    """
    numbered = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.gguf", file.name)
    if numbered is None:
        return [file]
    stem, _, count = numbered.groups()
    shards = [file.with_name(f"{stem}-{i:05d}-of-{count}.gguf") for i in range(1, int(count) + 1)]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise InputError(
            f"--model {file}: one of {int(count)} files of a split model, of which {len(missing)} are not there "
            f"({', '.join(missing[:3])}); put them beside it."
        )
    return shards


def refuse_adapter_beside(folder: Path, name: str) -> None:
    """
    Raises:
        InputError: the folder of a whole model holds an adapter too, which transformers would add to it in silence.
    """
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"--model {name}: {folder} holds a whole model and an adapter (adapter_config.json), and transformers "
            "would add the one to the other in silence; move the adapter_* files to a folder of their own, and pass "
            "that as --adapter where it is wanted."
        )
