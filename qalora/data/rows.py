"""What a row is once it is tokenized, and which of its tokens are learned. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NotRequired, TypedDict

if TYPE_CHECKING:
    from torch import Tensor

IGNORE = -100  # the label of a token that is not learned


class Row(TypedDict):
    """A row as it is batched.

    Attributes:
        labels: input_ids where the token is learned, else −100.
        row: its number in its source, for messages.
    """

    input_ids: list[int]
    labels: list[int]
    row: NotRequired[int]


class Tokenized(Row):
    """A row as it leaves the tokenizer.

    Attributes:
        truncated: it was cut at max_seq_len.
        length: tokens before the cut; absent from rows of a data set.
    """

    truncated: bool
    length: NotRequired[int]


class Packed(TypedDict):
    """Several rows in one sequence.

    Attributes:
        position_ids: from 0 on in each of the rows.
        rows: their numbers.
    """

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]
    rows: list[int]


Item = Row | Packed  # what a trainer draws


def targets(labels: Tensor) -> Tensor:
    """Which tokens the loss is taken of: (rows, tokens) → (rows, tokens − 1), for nothing predicts the first."""
    return labels[:, 1:] != IGNORE


def supervised_tokens(labels: Iterable[Sequence[int] | Tensor]) -> int:
    """How many tokens the loss is taken of; the first of a row is never among them.

    Args:
        labels: of rows, each a list, or of micro-batches, each (rows, tokens).
    """
    return sum(
        sum(label != IGNORE for label in each[1:]) if isinstance(each, Sequence) else int(targets(each).sum())
        for each in labels
    )
