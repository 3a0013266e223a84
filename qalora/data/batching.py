"""Tokenized rows → batches: padded, or packed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from qalora.data.rows import IGNORE, Packed, Row


class Collator:
    """Rows, padded on the right to the longest of them."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, items: Sequence[Row]) -> dict[str, Tensor]:
        """items with input_ids, labels, row → input_ids, attention_mask, labels: (rows, longest); rows: (rows,)."""
        width = max(len(item["input_ids"]) for item in items)

        def padded(values: Iterable[Sequence[int]], value: int) -> Tensor:
            return torch.tensor([[*each, *[value] * (width - len(each))] for each in values])

        lengths = torch.tensor([len(item["input_ids"]) for item in items])
        return {
            "input_ids": padded((item["input_ids"] for item in items), self.pad_token_id),
            "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
            "labels": padded((item["labels"] for item in items), IGNORE),
            "rows": torch.tensor([item["row"] for item in items]),
        }


def micro_batches(items: Sequence[Row], size: int, collate: Collator) -> list[dict[str, Tensor]]:
    """The rows, shortest first so that little is padded, `size` of them to a batch."""
    ordered = sorted(items, key=lambda item: len(item["input_ids"]))
    return [collate(ordered[i : i + size]) for i in range(0, len(ordered), size)]


def on_device(batch: Sequence[Mapping[str, Tensor]], device: torch.device | str) -> list[dict[str, Tensor]]:
    """What a model takes of the micro-batches of a collator, which number their rows."""
    return [{key: value.to(device) for key, value in micro.items() if key != "rows"} for micro in batch]


def pack(items: Sequence[Row], max_seq_len: int) -> list[Packed]:
    """Several rows in one sequence of at most `max_seq_len` tokens: the longest row first, each into the first
    sequence that has room for it (first-fit decreasing).

        rows           a a a a a    b b b    c c         max_seq_len 8
        input_ids      a a a a a b b b   |   c c
        position_ids   0 1 2 3 4 0 1 2   |   0 1         restart: no row attends to another
        labels         − a a a a − b b   |   − c         the first token of a row is predicted by nothing

    Returns:
        sequences with input_ids, labels, position_ids and rows (the row numbers), lists.
    """
    ordered = sorted(items, key=lambda item: -len(item["input_ids"]))
    places = first_fit([len(item["input_ids"]) for item in ordered], max_seq_len)
    sequences: list[list[Row]] = [[] for _ in range(max(places, default=-1) + 1)]
    for item, place in zip(ordered, places, strict=True):
        sequences[place].append(item)
    return [
        {
            "input_ids": [token for item in sequence for token in item["input_ids"]],
            "labels": [label for item in sequence for label in (IGNORE, *item["labels"][1:])],
            "position_ids": [position for item in sequence for position in range(len(item["input_ids"]))],
            "rows": [item["row"] for item in sequence],
        }
        for sequence in sequences
    ]


def first_fit(lengths: Sequence[int], capacity: int) -> list[int]:
    """Puts each length into the first bin that has room for it, in O(n log n).

    A tree over as many bins as there are lengths knows the most room in each of its halves, so the first bin with room
    is found on one way down:

               8                 node i: the larger of nodes 2i and 2i + 1
           3       8             leaves: the room of each bin; a length of 5 goes down to the third
         0   3   8   8

    Args:
        lengths: none above the capacity.

    Returns:
        the bin of each length; bins are numbered in the order in which they are opened.
    """
    leaves = 1 << max(0, len(lengths) - 1).bit_length()
    room = [capacity] * (2 * leaves)
    bins = []
    for length in lengths:
        node = 1
        while node < leaves:
            node *= 2
            node += room[node] < length
        bins.append(node - leaves)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins


class PackingCollator:
    """Packed sequences, laid end to end in one row.

    There is no attention_mask: with one, transformers takes the row for a single text and the samples see each other;
    without, it derives the borders from where position_ids restart.
    """

    def __call__(self, sequences: Sequence[Packed]) -> dict[str, Tensor]:
        """→ input_ids, labels, position_ids: (1, tokens); rows: (rows,)."""
        names: tuple[Literal["input_ids", "labels", "position_ids"], ...] = ("input_ids", "labels", "position_ids")
        joined: dict[str, Tensor] = {
            name: torch.tensor([[value for sequence in sequences for value in sequence[name]]]) for name in names
        }
        return {**joined, "rows": torch.tensor([row for sequence in sequences for row in sequence["rows"]])}
