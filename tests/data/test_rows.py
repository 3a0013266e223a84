"""Which tokens the loss is taken of, counted from labels of any shape."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from qalora.data.rows import IGNORE, supervised_tokens, targets

ROWS = st.lists(st.lists(st.sampled_from([IGNORE, 0, 7]), min_size=3, max_size=3), min_size=1, max_size=5)


def test_the_first_token_is_never_learned_whatever_its_label():
    assert supervised_tokens([[5, 6, IGNORE], [IGNORE, IGNORE, 7], [8], []]) == 2


def test_targets_are_the_labels_that_a_position_before_them_predicts():
    labels = torch.tensor([[5, 6, -100], [-100, -100, 7]])
    assert targets(labels).tolist() == [[True, False], [False, True]]


@given(ROWS)
def test_lists_and_micro_batches_of_the_same_labels_count_alike_as_torch_ignores_them(rows):
    logits = torch.zeros(len(rows), 2, 8)
    labels = torch.tensor(rows)
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
    assert supervised_tokens(rows) == supervised_tokens([labels]) == int((each > 0).sum())
