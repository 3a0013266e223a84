"""Padding and packing: every row once, and in a pack no row sees another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qalora.data.batching import Collator, PackingCollator, first_fit, pack
from qalora.kernels.prefixes import ATTENTION


def item(row: int, ids: list[int], prompt: int = 1) -> dict:
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "row": row}


def test_collator_pads_on_the_right_to_the_longest_row():
    batch = Collator(pad_token_id=9)([item(4, [1, 2, 3], prompt=2), item(7, [5])])
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[1, 2, 3], [5, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, -100, 3], [-100, -100, -100]],
        "rows": [4, 7],
    }


def test_a_pad_token_inside_a_row_is_attended_to():
    batch = Collator(pad_token_id=2)([item(0, [1, 2, 2]), item(1, [1])])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 2], [-100, -100, -100]]


def test_pack_is_the_picture_in_its_docstring():
    a, b, c = item(0, [10, 11, 12, 13, 14]), item(1, [20, 21, 22], prompt=0), item(2, [30, 31])
    assert pack([c, b, a], max_seq_len=8) == [
        {
            "input_ids": [10, 11, 12, 13, 14, 20, 21, 22],
            "labels": [-100, 11, 12, 13, 14, -100, 21, 22],
            "position_ids": [0, 1, 2, 3, 4, 0, 1, 2],
            "rows": [0, 1],
        },
        {"input_ids": [30, 31], "labels": [-100, 31], "position_ids": [0, 1], "rows": [2]},
    ]


@given(lengths=st.lists(st.integers(1, 12), max_size=40), max_seq_len=st.integers(12, 30))
def test_packing_keeps_every_row_whole_and_once(lengths, max_seq_len):
    items = [item(row, [row * 100 + t for t in range(length)], prompt=0) for row, length in enumerate(lengths)]
    sequences = pack(items, max_seq_len)
    assert sorted(row for sequence in sequences for row in sequence["rows"]) == list(range(len(lengths)))
    assert sequences == pack(items, max_seq_len)
    for sequence in sequences:
        ids, labels, positions = sequence["input_ids"], sequence["labels"], sequence["position_ids"]
        assert len(ids) == len(labels) == len(positions) <= max_seq_len
        start = 0
        for row in sequence["rows"]:
            end = start + lengths[row]
            assert ids[start:end] == items[row]["input_ids"]
            assert labels[start:end] == [-100, *items[row]["labels"][1:]]
            assert positions[start:end] == list(range(lengths[row]))
            start = end
        assert start == len(ids)
    if len(sequences) > 1:  # first fit: no two sequences could have been one
        short, next_short = sorted(len(sequence["input_ids"]) for sequence in sequences)[:2]
        assert short + next_short > max_seq_len


@given(lengths=st.lists(st.integers(1, 30), max_size=60), capacity=st.integers(30, 50))
def test_first_fit_is_the_first_that_fits(lengths, capacity):
    room: list[int] = []
    expected = []
    for length in lengths:
        fits = [i for i, left in enumerate(room) if left >= length]
        if not fits:
            fits = [len(room)]
            room.append(capacity)
        room[fits[0]] -= length
        expected.append(fits[0])
    assert first_fit(lengths, capacity) == expected


def test_first_fit_looks_at_few_bins():
    """A length of its own class, so that each is compared with what the search looks at."""

    class Counted(int):
        comparisons = 0

        def __gt__(self, other):  # room[node] < length asks the right side, of the subclass, first
            Counted.comparisons += 1
            return int(self) > int(other)

    lengths = [Counted(7 + i % 5) for i in range(1024)]
    first_fit(lengths, 16)
    assert Counted.comparisons == 1024 * 10


def test_packing_collator_lays_sequences_end_to_end_without_a_mask():
    batch = PackingCollator()(pack([item(0, [1, 2, 3]), item(1, [4, 5]), item(2, [6])], max_seq_len=4))
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[1, 2, 3, 6, 4, 5]],
        "labels": [[-100, 2, 3, -100, -100, 5]],
        "position_ids": [[0, 1, 2, 0, 0, 1]],
        "rows": [0, 2, 1],
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager", ATTENTION])
def test_packed_logits_are_unpacked_logits(tiny_llama, attention):
    model = tiny_llama(attn_implementation=attention).eval()
    rng = torch.Generator().manual_seed(0)
    lengths = (9, 5, 12, 1, 7, 3)
    items = [item(row, torch.randint(0, 128, (n,), generator=rng).tolist()) for row, n in enumerate(lengths)]
    sequences = pack(items, max_seq_len=16)
    assert any(len(sequence["rows"]) > 1 for sequence in sequences)
    batch = PackingCollator()(sequences)
    with torch.no_grad():
        packed = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        start = 0
        for row in batch["rows"].tolist():
            alone = model(torch.tensor([items[row]["input_ids"]]), use_cache=False).logits[0]
            torch.testing.assert_close(packed[start : start + lengths[row]], alone, rtol=1e-4, atol=1e-4)
            start += lengths[row]


def test_packed_gradients_are_padded_gradients(tiny_adapter):
    """Through the nodes, the attention and the loss of a run."""
    model, found = tiny_adapter(attn_implementation=ATTENTION).train(), []
    items = [item(row, list(range(3 + row, 3 + row + n))) for row, n in enumerate((9, 5, 12, 3))]
    for batch in (Collator(0)(items), PackingCollator()(pack(items, 16))):
        batch.pop("rows")
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_a_sample_would_be_seen_by_the_next_with_an_attention_mask(tiny_llama):
    """Why the packing collator gives none."""
    model = tiny_llama().eval()
    batch = PackingCollator()(pack([item(0, [1, 2, 3, 4]), item(1, [5, 6, 7])], max_seq_len=8))
    inputs = {"position_ids": batch["position_ids"], "use_cache": False}
    with torch.no_grad():
        alone = model(torch.tensor([[5, 6, 7]]), use_cache=False).logits[0]
        masked = model(batch["input_ids"], attention_mask=torch.ones(1, 7, dtype=torch.long), **inputs).logits[0, 4:]
    assert (masked - alone).abs().max() > 0.01
