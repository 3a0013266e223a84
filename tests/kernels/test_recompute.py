"""The second run of a block: what was kept is not computed again, and the next block begins anew."""

from __future__ import annotations

import torch

from qalora.kernels.recompute import both_runs, kept, output_unused


def test_what_maps_put_out_is_given_again_in_order():
    made: list[int] = []

    def compute(value: int):
        def run():
            made.append(value)
            return torch.tensor(float(value), requires_grad=True) * 2, None

        return run

    first, second = both_runs(keep=True)
    with first:
        found = [kept(compute(value)) for value in (1, 2)]
        assert not output_unused()
    with second:
        again = [kept(compute(value)) for value in (1, 2)]
        assert output_unused()
    assert made == [1, 2] and [(float(z), low) for z, low in again] == [(2.0, None), (4.0, None)]
    assert found[0][0].requires_grad and not again[0][0].requires_grad


def test_without_keeping_everything_is_computed_twice_and_outside_once():
    made: list[int] = []
    for context in both_runs(keep=False):
        with context:
            kept(lambda: (made.append(1),))
    kept(lambda: (made.append(2),))
    assert made == [1, 1, 2] and not output_unused()
