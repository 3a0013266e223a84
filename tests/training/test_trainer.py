"""The order of rows: of like length together, the same for a seed and an epoch, whatever else was drawn before."""

from __future__ import annotations

import torch

from qalora.training.trainer import GroupedByLength

LENGTHS = [int(n) for n in torch.randint(3, 90, (67,), generator=torch.Generator().manual_seed(0))]


def order(seed: int, epoch: int) -> list[int]:
    sampler = GroupedByLength(8, lengths=LENGTHS, seed=seed)
    sampler.set_epoch(epoch)
    torch.rand(3)  # the global generator decides nothing
    return list(sampler)


def test_seed_and_epoch_decide_the_order():
    assert sorted(order(1, 0)) == list(range(len(LENGTHS)))
    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6


def test_rows_of_a_batch_are_of_like_length():
    lengths = [LENGTHS[i] for i in order(0, 1)]
    within = [max(lengths[i : i + 8]) - min(lengths[i : i + 8]) for i in range(8, 56, 8)]
    assert sum(within) / len(within) < (max(LENGTHS) - min(LENGTHS)) / 2
