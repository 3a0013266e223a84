"""What a continued run keeps, what it may change, and what is held back from its training."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from qalora.errors import InputError
from qalora.training.checkpoints import (
    SECTIONS,
    write_manifest,
)
from qalora.training.identity import Identity, Rows
from qalora.training.resume import Continued, changes, check_settings, kept_apart, rounds_left

IDENTITY = Identity("m", "f", 12, 2, {"a": 2}, Rows((b"12345678",), (b"abcdefgh",), "v"), run="one")


def checkpoint(
    folder: Path, step: int, best: int | None = None, losses=(1.0,), run: str = "one", kind: str = "loss"
) -> Path:
    """What `Trainer` and this package write, with tensors of no meaning."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    history = [{"step": i, kind: loss} for i, loss in enumerate(losses)]
    state = {"global_step": step, "log_history": history, "best_global_step": best}
    (path / "trainer_state.json").write_text(json.dumps(state))
    (path / "recipe.yaml").write_text(yaml.safe_dump({name: {"a": 1} for name in SECTIONS}))
    (path / "allocation.jsonl").write_text('{"step": 2, "ranks": {}}\n')
    (path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"A": torch.ones(4, 8)}, path / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"a": torch.ones(50)}, path / name)
    Identity(**{**IDENTITY.__dict__, "run": run}).write(path)
    write_manifest(path)
    return path


@given(
    old=st.lists(st.integers(0, 20), min_size=2, max_size=30),
    cut=st.integers(1, 29),
    new=st.lists(st.integers(0, 40), min_size=1, max_size=60),
    size=st.one_of(st.integers(1, 40), st.floats(0.01, 0.99)),
    seed=st.integers(0, 5),
)
def test_no_row_that_was_trained_on_is_ever_held_back(old, cut, new, size, seed):
    digest = [value.to_bytes(8, "little") for value in range(41)]
    cut = min(cut, len(old) - 1)
    known = Rows(tuple(digest[v] for v in old[cut:]), tuple(digest[v] for v in old[:cut]))
    rows = [digest[v] for v in new]
    try:
        kept = kept_apart(rows, known, size, seed)
    except InputError:
        assert set(rows) <= set(known.train) - set(known.held_back)
        return
    held, before = Counter(rows[i] for i in kept), Counter(known.held_back)
    assert kept == sorted(set(kept)) and kept
    # A row that lies in both was in both before, and as often.
    assert all(row not in known.train or held[row] <= before[row] for row in held)


@given(
    planned=st.sets(st.integers(1, 30), max_size=8),
    done=st.sets(st.integers(1, 12), max_size=4),
    rounds=st.integers(0, 8),
)
def test_a_longer_run_makes_no_more_rounds_than_it_was_to(planned, done, rounds):
    steps = rounds_left(sorted(planned), sorted(done), 12, rounds)
    assert steps[: len(done)] == tuple(sorted(done))
    assert len(steps) <= max(rounds, len(done))
    assert all(step > 12 and step in planned for step in steps[len(done) :])


def test_a_round_of_the_checkpoints_own_step_is_behind_it(tmp_path):
    path = checkpoint(tmp_path, 4)
    (path / "allocation.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in (0, 2, 4, 6)))
    assert Continued.at(path).rounds_done() == [2, 4]


def settings(**training):
    tree = {
        "training": {
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "seed": 1,
            "optim": "a",
            "learning_rate": 0.1,
        },
        "lora": {"r": 2},
        "data": {"packing": False, "max_seq_len": 8, "validation": None},
    }
    tree["training"].update(training)
    return tree


def test_what_would_be_another_run_is_refused_with_both_values():
    begun, at = settings(), Path("checkpoint-6")
    check_settings(settings(micro_batch_size=8, gradient_accumulation_steps=1), begun, at)
    check_settings(settings(learning_rate=0.2, max_steps=24), begun, at)
    with pytest.raises(InputError, match=r"are 8 rows an optimizer step, .* with 16"):
        check_settings(begun, settings(micro_batch_size=8), at)
    with pytest.raises(
        InputError, match=r"training\.seed is 1, and checkpoint-6 was made with 3; .* set training\.seed=3"
    ):
        check_settings(begun, settings(seed=3), at)
    packed, longer = settings(), settings()
    packed["data"] = {"packing": True, "max_seq_len": 8, "validation": None}
    longer["data"] = {"packing": True, "max_seq_len": 16, "validation": None}
    with pytest.raises(InputError, match=r"data\.packing is False, .* made with True"):
        check_settings(begun, packed, at)
    with pytest.raises(InputError, match=r"data\.max_seq_len is 8, .* made with 16"):
        check_settings(packed, longer, at)
    apart = settings()
    apart["data"] = {**begun["data"], "validation": "v.jsonl"}
    with pytest.raises(InputError, match=r"data\.validation is null, .* made with v\.jsonl"):
        check_settings(begun, apart, at)


def test_an_adapter_to_start_from_is_no_setting_of_a_run_that_goes_on():
    given, none = settings(), settings()
    given["lora"] = {"r": 2, "adapter": "a"}
    none["lora"] = {"r": 2, "adapter": None}
    check_settings(given, given, Path("checkpoint-6"))
    other = {**given, "lora": {"r": 2, "adapter": "b"}}
    for begun, said in ((given, "from a"), (none, "without one")):
        with pytest.raises(InputError, match=rf"lora\.adapter=b begins a new run, .* {said}: leave lora\.adapter out"):
            check_settings(other, begun, Path("checkpoint-6"))


def test_what_changes_is_said():
    assert changes(settings(learning_rate=0.2), settings()) == "training.learning_rate=0.2 (was 0.1)"
    assert changes(settings(), settings()) == ""
