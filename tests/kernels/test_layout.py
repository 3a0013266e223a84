"""A layout that was found on the host, against the same batch without one."""

from __future__ import annotations

import pytest
import torch

from qalora.data.batching import Collator, PackingCollator, pack
from qalora.kernels.layout import layout_of, prepared
from qalora.kernels.loss import row_losses

LENGTHS = {"full": [9, 9, 9], "padded": [9, 7, 4], "hardly padded": [40, 40, 39], "alike": [9, 9, 8]}


def rows_of(lengths, alike=False):
    generator = torch.Generator().manual_seed(1)
    draw = torch.randint(2, 128, (max(lengths),), generator=generator).tolist()
    for number, length in enumerate(lengths):
        ids = draw[:length] if alike else torch.randint(2, 128, (length,), generator=generator).tolist()
        yield {"input_ids": ids, "labels": [-100, -100, *ids[2:]], "row": number}


@pytest.mark.parametrize("kind", [*LENGTHS, "packed", "packed alone"])
def test_losses_are_those_without_a_layout_to_the_bit(tiny_adapter, kind):
    if kind.startswith("packed"):
        rows = list(rows_of([5, 7, 4] if kind == "packed" else [7]))
        batch = PackingCollator()(pack(rows, 16))
    else:
        batch = Collator(0)(list(rows_of(LENGTHS[kind], alike=kind == "alike")))
    del batch["rows"]
    model = tiny_adapter().train()
    assert torch.equal(row_losses(model, prepared(batch, torch.device("cpu"))), row_losses(model, batch))


def test_what_a_layout_says_of_padding_and_of_texts():
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    for mask, padding in (
        ([[1, 1, 1, 1], [1, 1, 1, 1]], "none"),
        ([[1, 1, 1, 0], [1, 1, 1, 1]], "right"),
        ([[0, 1, 1, 1], [1, 1, 1, 1]], "elsewhere"),
        ([[1, 0, 1, 1], [1, 1, 1, 1]], "elsewhere"),
    ):
        found = layout_of({"input_ids": ids, "labels": ids, "attention_mask": torch.tensor(mask)})
        assert (found.padding, found.packed) == (padding, False)
    positions = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
    labels = torch.tensor([[-100, 6, -100, 8], [9, -100, -100, 12]])  # the first token of a row is predicted by nothing
    found = layout_of({"input_ids": ids, "labels": labels, "position_ids": positions})
    assert found.packed and found.shared is None
    assert list(zip(found.rows, found.positions, found.targets, strict=True)) == [(0, 0, 6), (0, 2, 8), (1, 2, 12)]
