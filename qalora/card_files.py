"""README.md of an adapter or a merged folder: whose words it holds, and how a user's outlive what is written around
them. Torch-free.

A card that this package wrote ends with a digest of the text above it; a text without one, or that was changed, is a
user's.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

from qalora.files import write_whole, written_beside

CARD = "README.md"
SEAL = re.compile(r"\n<!-- qalora card ([0-9a-f]{16}) -->\n\Z")
# What PEFT adds to the empty template that it saves with every adapter.
PEFTS_LINES = re.compile(
    r"### Framework versions|- PEFT \S+|## Training procedure|The following `bitsandbytes` .*|- \w+: .*"
)


def sealed(text: str) -> str:
    """The text with the digest that tells it from a user's."""
    text = text.rstrip("\n") + "\n"
    return f"{text}\n<!-- qalora card {_digest(text)} -->\n"


def is_ours(text: str) -> bool:
    """Whether a card is as this package wrote it."""
    found = SEAL.search(text)
    return found is not None and _digest(text[: found.start()]) == found[1]


def unsealed(text: str) -> str:
    """A card without its digest."""
    return SEAL.sub("", text)


def is_users(file: Path) -> bool:
    """Whether a README.md holds what a user wrote: it is neither a card of ours nor PEFT's empty template."""
    if not file.is_file():
        return False
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return True
    return is_users_text(text)


def is_users_text(text: str) -> bool:
    """Whether a card is neither ours, as it was written, nor PEFT's empty template."""
    return not is_ours(text) and not _is_empty_template(text)


def keep_users_card(old: Path, new: Path) -> bool:
    """Copies a user's README.md from a folder into the one that is about to take its place, and says whether there was
    one."""
    kept = is_users(old / CARD)
    if kept:
        shutil.copyfile(old / CARD, new / CARD)
    return kept


def clear_but_card(folder: Path) -> bool:
    """Removes a folder, all but a user's README.md, and says whether there was one."""
    kept = is_users(folder / CARD)
    if kept:
        with written_beside(folder) as partial:
            keep_users_card(folder, partial)
    else:
        shutil.rmtree(folder)
    return kept


def write_card(folder: Path, text: str) -> bool:
    """Writes a card, and says whether it did: a user's README.md stays."""
    if is_users(folder / CARD):
        return False
    write_whole(folder / CARD, sealed(text))
    return True


def _digest(text: str) -> str:
    return hashlib.sha256(text.rstrip("\n").encode()).hexdigest()[:16]


def _is_empty_template(text: str) -> bool:
    if "[More Information Needed]" not in text:
        return False
    from huggingface_hub import ModelCard, ModelCardData

    template = set(ModelCard.from_template(ModelCardData()).text.splitlines())
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL).splitlines()
    return all(line in template or PEFTS_LINES.fullmatch(line.strip()) for line in body if line.strip())
