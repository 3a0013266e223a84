"""Checkpoints where nothing is trained: which are whole, the newest, the best and the last good one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from qalora.errors import InputError
from qalora.training.checkpoints import (
    MANIFEST,
    SECTIONS,
    belongs,
    best_beside,
    find_checkpoint,
    last_good,
    problem_with,
    write_manifest,
)
from qalora.training.identity import Identity, Rows

FILES = (
    "trainer_state.json", "recipe.yaml", "run.json", "allocation.jsonl", "adapter_config.json",
    "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
)  # fmt: skip


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


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "of an earlier version"])
@pytest.mark.parametrize("how", ["missing", "empty", "cut"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_newest_checkpoint_is_passed_over_and_named(tmp_path, name, how, listed):
    older, newest = checkpoint(tmp_path, 3), checkpoint(tmp_path, 12)
    if not listed:
        if name == "run.json" or (name, how) == ("allocation.jsonl", "empty"):
            pytest.skip("earlier versions had none, or an empty one before the first round")
        for path in (older, newest):
            (path / MANIFEST).unlink()
    assert find_checkpoint(tmp_path, "auto") == newest
    content = (newest / name).read_bytes()
    (newest / name).unlink()
    if how != "missing":
        (newest / name).write_bytes(content[: len(content) // 2 if how == "cut" else 0])
    said: list[str] = []
    assert find_checkpoint(tmp_path, "auto", say=said.append) == older
    assert len(said) == 1 and "checkpoint-12 is damaged" in said[0] and name in said[0]
    with pytest.raises(InputError, match=name.replace(".", r"\.") + "|no recipe.yaml"):
        find_checkpoint(tmp_path, str(newest))
    shutil.rmtree(older)
    with pytest.raises(InputError, match=r"every checkpoint of .* is damaged \(checkpoint-12: .*overwrite"):
        find_checkpoint(tmp_path, "auto")
    assert find_checkpoint(tmp_path, "auto", anew=True) is None


def test_a_changed_byte_is_seen(tmp_path):
    path = checkpoint(tmp_path, 3)
    content = bytearray((path / "optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "optimizer.pt").write_bytes(content)
    assert problem_with(path) == "optimizer.pt is not what was written"


def test_the_best_checkpoint_is_that_of_its_step_beside_and_of_the_same_run(tmp_path):
    newest, best = checkpoint(tmp_path / "a", 9, best=3), checkpoint(tmp_path / "a", 3)
    assert best_beside(newest) == best
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert best_beside(tmp_path / "b" / "checkpoint-9") == tmp_path / "b" / "checkpoint-3"
    shutil.rmtree(tmp_path / "b" / "checkpoint-3")
    checkpoint(tmp_path / "b", 3, run="another")
    assert best_beside(tmp_path / "b" / "checkpoint-9") is None
    shutil.rmtree(tmp_path / "b" / "checkpoint-3")
    checkpoint(tmp_path / "b", 6).rename(tmp_path / "b" / "checkpoint-3")
    assert not belongs(tmp_path / "b" / "checkpoint-3", tmp_path / "b" / "checkpoint-9")


def test_the_last_good_checkpoint_is_whole_and_had_finite_losses(tmp_path):
    good = checkpoint(tmp_path, 3)
    checkpoint(tmp_path, 6, losses=(1.0, float("nan")))
    checkpoint(tmp_path, 7, losses=(1.0, float("inf")), kind="eval_loss")
    (checkpoint(tmp_path, 9) / "optimizer.pt").unlink()
    os.utime(good, (0, 0))
    assert last_good(tmp_path) == good


def test_a_name_alone_is_looked_for_in_the_folder_of_the_run(tmp_path):
    path = checkpoint(tmp_path / "out", 3)
    with pytest.raises(InputError, match=rf"no checkpoint there .*; did you mean {path}\?$"):
        find_checkpoint(tmp_path / "out", "checkpoint-3")
    with pytest.raises(InputError, match=r"no checkpoint there .*; name its folder, or auto for the newest"):
        find_checkpoint(tmp_path / "out", "true")
