"""Runs, folders and checkpoints where nothing is trained: which are whole, what is whose, what a resumed run keeps."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from qalora.training.checkpoints import (
    SECTIONS,
    write_manifest,
)
from qalora.training.identity import Identity, Rows, read_identity
from qalora.training.run_folder import begin_folder, check_output_dir, is_run, own_entries

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


def test_what_continues_sets_damaged_checkpoints_aside(tmp_path):
    older, newest = checkpoint(tmp_path, 3), checkpoint(tmp_path, 6)
    (newest / "optimizer.pt").unlink()
    check_output_dir(tmp_path, [], checkpoint=older, overwrite=False)
    begin_folder(tmp_path, older)
    assert not newest.exists() and (tmp_path / "damaged-checkpoint-6" / "scheduler.pt").is_file()
    assert read_identity(tmp_path) == IDENTITY


# ------------------------------------------------------------------------------------------------------- whose it is


def test_only_what_a_run_writes_is_its_own(tmp_path):
    checkpoint(tmp_path, 3)
    IDENTITY.write(tmp_path)
    mine = {
        "adapter/adapter_config.json", "merged/merge.json", "ranks.png", "scores/step-4.json",
        "predictions-after.jsonl", "runs/Nov28/events.out.tfevents.1", ".checkpoint-6.partial/optimizer.pt",
        ".metrics.json.partial",
    }  # fmt: skip
    others = {
        "notes.txt", "src/merged/main.py", "scores/season.csv", "runs/yolo/weights.pt", ".git/HEAD",
        "checkpoint-x/adapter_config.json", "data/rows.jsonl", ".env", "checkpoint-7/of-another-tool.txt", "plot.png",
    }  # fmt: skip
    for name in mine | others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    outside = tmp_path.parent / "outside"
    outside.mkdir()
    (outside / "adapter_config.json").touch()
    (tmp_path / "checkpoint-9").symlink_to(outside)
    (tmp_path / "recipe.yaml").symlink_to(outside / "recipe.yaml")
    (outside / "recipe.yaml").write_text("mine")
    (outside / "link").symlink_to(tmp_path)
    said: list[str] = []
    begin_folder(outside / "link", None, said.append)  # the folder itself may be a link
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == others | {"run.json"}
    assert (outside / "adapter_config.json").exists() and (outside / "recipe.yaml").read_text() == "mine"
    assert not (tmp_path / "recipe.yaml").is_symlink() and not (tmp_path / "runs" / "Nov28").exists()
    assert "notes.txt" in said[0] and ".git" not in said[0]


def test_a_recipe_and_the_metrics_of_another_tool_are_no_run(tmp_path):
    (tmp_path / "recipe.yaml").write_text("data: {}\nquantization: {}\nlora: {}\nallocation: {}\ntraining: {}\n")
    (tmp_path / "metrics.json").write_text("{}")
    (tmp_path / "run.json").write_text('{"id": 7}')
    assert not is_run(tmp_path)
    begin_folder(tmp_path, None)
    assert len(list(tmp_path.iterdir())) == 3
    assert list(own_entries(tmp_path)) == [tmp_path / "metrics.json"]


# ------------------------------------------------------------------------------------------------------- locks


# ---------------------------------------------------------------------------------------------------- what it continues
