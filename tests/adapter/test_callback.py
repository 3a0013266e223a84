"""What a callback remembers of the rounds before it."""

from __future__ import annotations

import json

import pytest
from transformers import TrainerState

from qalora.adapter.allocation import Schedule
from qalora.adapter.callback import AllocationCallback, Start


@pytest.mark.parametrize(("step", "left"), [(3, []), (4, [4]), (5, [4]), (8, [4, 8])])
def test_a_run_continues_with_the_rounds_up_to_its_checkpoint(tmp_path, step, left):
    """A checkpoint of a round's own step was written after the round; what came later never happened."""
    file = tmp_path / "allocation.jsonl"
    file.write_text("".join(json.dumps({"step": number}) + "\n" for number in (4, 8)))
    callback = AllocationCallback(
        Schedule((4, 8), False),
        settings=None,
        batch=(),
        start=Start("kaiming", "even"),
        ladder=None,
        output_dir=tmp_path,
    )
    callback.on_train_begin(None, TrainerState(global_step=step), None)
    assert [record["step"] for record in callback.history] == left
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == left
    assert callback.done() == len(left)
