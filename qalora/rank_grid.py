"""Where the modules of an adapter stand in a picture or a table: a row per block, a column per kind. Torch-free."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

KINDS = ("q", "k", "v", "o", "gate", "up", "down")


def grid(names: Mapping[str, int] | Sequence[str]) -> tuple[list[str], list[str], dict[str, tuple[int, int]]]:
    """Row labels, column labels, and each module's (row, column), for full module names.

    `model.layers.3.self_attn.q_proj` is in row `3`, column `q`; a name without a block number gets a row of
    its own. Kinds of a LLaMA block come first and in its order; a leaf name that occurs in two places is
    written out.
    """
    parts = {}
    for name in names:
        match = re.fullmatch(r"(?:.*?\.)?(\d+)\.(.+)", name)
        parts[name] = (match[1], match[2]) if match else (name.rpartition(".")[0], name.rpartition(".")[2])
    suffixes = list(dict.fromkeys(suffix for _, suffix in parts.values()))
    leaves = {suffix: suffix.rpartition(".")[2].removesuffix("_proj") for suffix in suffixes}
    count = Counter(leaves.values())
    labels = {suffix: leaf if count[leaf] == 1 else suffix for suffix, leaf in leaves.items()}
    suffixes.sort(key=lambda suffix: KINDS.index(labels[suffix]) if labels[suffix] in KINDS else len(KINDS))
    rows = list(dict.fromkeys(block for block, _ in parts.values()))
    rows.sort(key=lambda block: (not block.isdigit(), int(block) if block.isdigit() else 0))
    row_of = {row: i for i, row in enumerate(rows)}
    column_of = {suffix: i for i, suffix in enumerate(suffixes)}
    place = {name: (row_of[block], column_of[suffix]) for name, (block, suffix) in parts.items()}
    return rows, [labels[suffix] for suffix in suffixes], place


def signed(change: int) -> str:
    """`+3`, `−2` (a true minus), nothing for 0."""
    return "" if change == 0 else f"{change:+d}".replace("-", "−")
