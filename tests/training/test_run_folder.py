"""Runs, folders and checkpoints where nothing is trained: which are whole, what is whose, what a resumed run keeps."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qalora.base.fingerprint import fingerprint, tensor_header
from qalora.base.registry import resolve
from qalora.errors import InputError
from qalora.locking import locked
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
from qalora.training.identity import Identity, Rows, read_identity, row_digests, rows_of
from qalora.training.resume import Continued, changes, check_settings, kept_apart, rounds_left
from qalora.training.run_folder import begin_folder, check_output_dir, is_run, own_entries

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


def test_a_second_writer_is_refused_and_a_killed_one_is_no_obstacle(tmp_path):
    lock = tmp_path / "new" / "folder" / ".lock"
    code = (
        "import sys, time; from pathlib import Path; from qalora.locking import locked\nwith "
        "locked(Path(sys.argv[1]), 'x'):\n  print('in', flush=True); time.sleep(60)"
    )
    root = str(Path(__file__).resolve().parents[2])
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}
    )
    assert holder.stdout.readline() == b"in\n"
    with pytest.raises(InputError, match=rf"run: in use by process {holder.pid} on .* since 20"), locked(lock, "run"):
        pass
    assert json.loads(lock.read_text())["pid"] == holder.pid  # who asked in vain changed nothing
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert lock.exists()
    with locked(lock, "run"), pytest.raises(InputError, match=rf"process {os.getpid()} "), locked(lock, "run"):
        pass
    assert not lock.exists()
    shutil.rmtree(tmp_path / "new")
    with locked(lock, "run"):
        pass
    assert not list(tmp_path.iterdir())  # nor the folders that were made for it


def test_a_lock_of_another_machine_is_said(tmp_path):
    host = "elsewhere" * 50  # longer than what takes its place
    (tmp_path / ".lock").write_text(json.dumps({"pid": 7, "host": host, "since": "yesterday"}))
    said: list[str] = []
    with locked(tmp_path / ".lock", "run", say=said.append):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert said == [f"run: process 7 on {host} left its lock there; if it still runs, stop one of the two"]


def test_a_lock_file_that_its_owner_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """Between the opening and the locking of it; a third process would make a new one, and lock that."""
    lock, flock, calls = tmp_path / ".lock", fcntl.flock, []

    def late(handle, how):
        if not calls:
            lock.unlink()
        calls.append(how)
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(lock, "run"), pytest.raises(InputError, match="in use"), locked(lock, "run"):
        pass


# ---------------------------------------------------------------------------------------------------- what it continues


def test_a_base_is_its_weights_wherever_they_lie(save_tiny_llama, tmp_path):
    folder = save_tiny_llama(tmp_path / "a")
    known = fingerprint(resolve(str(folder)))
    copied = shutil.copytree(folder, tmp_path / "b")
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "transformers_version": "9", "use_cache": True}))
    tensors = load_file(copied / "model.safetensors")
    assert {name: tuple(entry["shape"]) for name, entry in tensor_header(copied / "model.safetensors").items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    (copied / "model.safetensors").unlink()
    names = sorted(tensors)
    for shard in (0, 1):
        save_file({name: tensors[name] for name in names[shard::2]}, copied / f"model-{shard}.safetensors")
    weight_map = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    (copied / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    save_file({"other": tensors[names[0]]}, copied / "consolidated.safetensors")  # which nobody reads
    assert fingerprint(resolve(str(copied))) == known
    tensors[names[3]].view(-1)[-1] += 1e-3
    save_file({name: tensors[name] for name in names[1::2]}, copied / "model-1.safetensors")
    assert fingerprint(resolve(str(copied))) != known
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert fingerprint(resolve(str(folder))) != known


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


def test_a_name_alone_is_looked_for_in_the_folder_of_the_run(tmp_path):
    path = checkpoint(tmp_path / "out", 3)
    with pytest.raises(InputError, match=rf"no checkpoint there .*; did you mean {path}\?$"):
        find_checkpoint(tmp_path / "out", "checkpoint-3")
    with pytest.raises(InputError, match=r"no checkpoint there .*; name its folder, or auto for the newest"):
        find_checkpoint(tmp_path / "out", "true")


def test_what_changes_is_said():
    assert changes(settings(learning_rate=0.2), settings()) == "training.learning_rate=0.2 (was 0.1)"
    assert changes(settings(), settings()) == ""


def test_rows_are_told_apart_by_tokens_and_labels():
    rows = [([1, 2], [-100, 2]), ([1, 2], [1, 2]), ([1, 2, 3], [-100, 2, 3]), ([1, 2], [-100, 2])]
    digests = row_digests([{"input_ids": ids, "labels": labels} for ids, labels in rows])
    assert digests[0] == digests[3] and len(set(digests)) == 3
    items = [{"input_ids": ids, "labels": labels} for ids, labels in rows]
    known = rows_of(items[:1], items[1:2], items[2:])
    assert (known.train, known.held_back) == (digests[:1], digests[1:2])
    assert known.validation == rows_of([], [], items[2:]).validation != rows_of([], [], items[1:]).validation
