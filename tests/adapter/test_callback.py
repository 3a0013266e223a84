"""What a callback remembers of the rounds before it, and how it wires itself."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerState

from qalora.adapter.allocation import Schedule
from qalora.adapter.callback import AllocationCallback, ranks_at_start, tokenized
from qalora.adapter.model import gated_layers, ranks
from qalora.errors import InputError

ROWS = [{"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}, {"input_ids": [3, 4], "labels": [-100, 4]}]


@pytest.fixture
def arguments(tmp_path):
    return SimpleNamespace(
        output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=3, seed=7, device="cpu"
    )


def record(step: int, **more) -> dict:
    return {"step": step, "ranks": {"a": 2, "b": 3}, "pruned": {"a": [1], "c": [0]}, "grown": {"b": 1}, **more}


@pytest.mark.parametrize(("step", "left"), [(3, []), (4, [4]), (5, [4]), (8, [4, 8])])
def test_a_run_continues_with_the_rounds_up_to_its_checkpoint(tmp_path, arguments, tiny_adapter, step, left):
    """A checkpoint of a round's own step was written after the round; what came later never happened."""
    file = tmp_path / "allocation.jsonl"
    names = list(ranks(model := tiny_adapter()))
    lines = [record(n, ranks=dict.fromkeys(names, 4), pruned={names[0]: [0]}, grown={names[1]: 1}) for n in (4, 8)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    callback = AllocationCallback(ROWS, schedule=Schedule((4, 8), False))
    callback.on_train_begin(arguments, TrainerState(global_step=step), None, model=model)
    assert [line["step"] for line in callback.history] == left
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == left
    assert callback.done() == len(left)


def test_the_budget_is_what_the_run_began_with():
    assert ranks_at_start([record(4), record(8)], {"a": 9}, ["a", "b", "c", "d"]) == {"a": 3, "b": 2, "c": 1}
    assert ranks_at_start([], {"b": 2, "a": 1}, ["a", "b"]) == {"b": 2, "a": 1}


def test_it_wires_itself_from_model_steps_and_arguments(arguments, tiny_adapter):
    model = tiny_adapter(r=4)
    callback = AllocationCallback(ROWS, rounds=3, warmup=0.25, interval=2)
    loader = SimpleNamespace(dataset=[{"input_ids": [1] * 4}, {"input_ids": [1] * 8}])
    state = TrainerState(max_steps=40, num_train_epochs=2)
    callback.on_train_begin(arguments, state, None, model=model, train_dataloader=loader)
    settings = callback.settings
    assert callback.rounds.steps == (10, 12, 14)
    assert (settings.budget, settings.prune, settings.seed, settings.step_tokens) == (4 * 14, 14, 7, 6 * 2 * 3)
    assert settings.parameters == sum(layer.A.numel() + layer.B.numel() for layer in gated_layers(model).values())
    assert [len(micro["labels"]) for micro in callback.batch] == [2]


def test_adapters_in_16_bits_become_fp32_and_a_line_says_so(arguments, tiny_adapter, capsys):
    model = tiny_adapter()
    parameters = [p for layer in gated_layers(model).values() for p in (layer.A, layer.B)]
    for parameter in parameters:
        parameter.data = parameter.data.bfloat16()
    callback = AllocationCallback(ROWS, schedule=Schedule((), False))
    callback.on_train_begin(arguments, TrainerState(), None, model=model)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert all(
        p is q
        for p, q in zip(
            parameters, [p for layer in gated_layers(model).values() for p in (layer.A, layer.B)], strict=True
        )
    )
    assert "trained in fp32" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [[], [{"text": "a"}], [{"input_ids": [1]}]])
def test_rows_that_are_not_tokenized_are_refused_by_the_name_of_the_parameter(rows):
    with pytest.raises(InputError, match=r"^rows: .*qalora\.load_rows"):
        AllocationCallback(rows)


def test_a_completion_mask_says_what_is_learned():
    row = {"input_ids": [3, 4, 5], "completion_mask": [0, 1, 1]}
    assert tokenized([row], "rows")[0]["labels"] == [-100, 4, 5]


def test_a_model_without_an_adapter_is_refused(arguments, tiny_llama):
    with pytest.raises(InputError, match="no adapter of ours"):
        AllocationCallback(ROWS).on_train_begin(arguments, TrainerState(max_steps=9), None, model=tiny_llama())


def test_a_run_too_short_for_a_round_is_refused_at_its_beginning(arguments, tiny_adapter):
    with pytest.raises(InputError, match="no room for a round"):
        AllocationCallback(ROWS).on_train_begin(arguments, TrainerState(max_steps=1), None, model=tiny_adapter())


def test_a_second_callback_and_an_adapter_that_cannot_move_are_refused(arguments, tiny_adapter):
    model, state = tiny_adapter(), TrainerState(max_steps=40, num_train_epochs=2)
    first, second = AllocationCallback(ROWS), AllocationCallback(ROWS)
    for _ in range(2):
        first.on_train_begin(arguments, state, None, model=model)
    with pytest.raises(InputError, match=r"has two.*allocation\.jsonl"):
        second.on_train_begin(arguments, state, None, model=model)
    second.on_train_begin(arguments, TrainerState(max_steps=40, num_train_epochs=2), None, model=model)

    def refused(match: str) -> None:
        with pytest.raises(InputError, match=match):
            AllocationCallback(ROWS).on_train_begin(arguments, TrainerState(max_steps=40), None, model=model)

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    refused("trainable=True")
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    refused("'default', and active is 'other'")
