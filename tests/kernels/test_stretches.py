"""fp32 copies of activations, as long as the plan counts them."""

from __future__ import annotations

from qalora.sizes import FP32_TEMPORARY, LOGITS_CHUNK


def test_stretches_are_as_long_as_the_fp32_copy_that_the_plan_counts():
    import torch

    from qalora.kernels.stretches import stretches

    width = FP32_TEMPORARY // 4 // 2  # two tokens fill one copy
    cuts = [cut[-2] for cut in stretches(torch.empty(1, 5, 1), width)]
    assert cuts == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert LOGITS_CHUNK == 2 * 4 * 8 * 2**20  # two rows of 8 Mi words in fp32
