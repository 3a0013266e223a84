"""The main job on a tiny random LLaMA in 4 bits: every part of a run, on files that a user would have."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qalora.adapter import callback
from qalora.adapter.model import attach, gated_layers, load_adapter
from qalora.adapter.saved import read_adapter
from qalora.base.loading import load_base, load_tokenizer
from qalora.base.quantized import dequantize, linear_maps
from qalora.base.registry import resolve
from qalora.data import quickstart
from qalora.errors import AnswerNo, InputError
from qalora.finetune import main
from qalora.recipe import load_recipe
from qalora.results.page import render
from qalora.training import trainer
from qalora.training.checkpoints import find_checkpoint
from qalora.training.finish import draw
from qalora.training.rows import load_data
from qalora.training.run_folder import check_output_dir, run_name

WORDS = [
    "red", "green", "blue", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "cat", "dog",
    "bird", "fish", "sun", "moon", "star", "sky",
]  # fmt: skip
WATCHED = ("training.eval_steps=1", "training.save_steps=1")
HALVES = ("training.micro_batch_size=4", "training.gradient_accumulation_steps=2")  # a step in two micro-batches
pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    vocab = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Two to five words, and the same words in reverse."""
    rng = random.Random(0)
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    with file.open("w") as handle:
        for _ in range(96):
            words = rng.sample(WORDS, rng.randint(2, 5))
            handle.write(json.dumps({"prompt": " ".join(words) + " ", "completion": " ".join(reversed(words))}) + "\n")
    return file


def _without(*names: str) -> dict[str, None]:
    """Settings of `train` that are left out."""
    return dict.fromkeys(names)


def train(model_dir: Path, rows: Path, folder: Path, *more: str, settings: dict | None = None) -> int:
    """12 steps, rounds after steps 4 and 8. → the exit code"""
    recipe = folder.parent / "recipe.yaml"
    recipe.write_text("training: {micro_batch_size: 8, gradient_accumulation_steps: 1}\n")
    chosen = {
        "data.train": rows, "data.val_set_size": 24, "data.max_seq_len": 32,
        "lora.r": 2, "lora.alpha": 4,
        "allocation.preset": "paper", "allocation.rounds": 2, "allocation.warmup": 4, "allocation.interval": 4,
        "allocation.val_batch_size": 8,
        "training.max_steps": 12, "training.eval_steps": 3, "training.save_steps": 3, "training.save_total_limit": 12,
        "training.learning_rate": 5e-3,
        "logging.steps": 1, "logging.quiet": "true",
    }  # fmt: skip
    flags = {"--model": model_dir, "--recipe": recipe, "--dtype": "float32", "--output-dir": folder}
    given = [word for word in more if "=" in word and not word.startswith("--")]
    chosen |= {**(settings or {}), **dict(word.split("=", 1) for word in given)}
    return main(
        [
            *(str(word) for flag in flags.items() if flag[0] not in more for word in flag),
            *(f"{key}={value}" for key, value in chosen.items() if value is not None),
            *(word for word in more if word not in given),
        ]
    )


@pytest.fixture
def finetune(model_dir, rows, tmp_path):
    """run(*more settings, output=…) → (exit code, output folder)."""

    def run(*more: str, output: str = "run", settings: dict | None = None) -> tuple[int, Path]:
        return train(model_dir, rows, tmp_path / output, *more, settings=settings), tmp_path / output

    run.folder = tmp_path / "run"

    return run


@pytest.fixture(scope="module")
def default_run(model_dir, rows, tmp_path_factory, undrawn) -> Path:
    """The folder of a run with nothing more set, and with all that a run writes; to be read, and copied to be
    changed."""
    folder = tmp_path_factory.mktemp("default") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qalora.training.finish.draw", draw)
        patch.setattr("qalora.results.finish.render", render)
        assert train(model_dir, rows, folder) == 0
    return folder


@pytest.fixture(scope="module")
def watched_run(model_dir, rows, tmp_path_factory, undrawn) -> Path:
    """The same with a validation (a forward in eval mode) and a checkpoint after every step."""
    folder = tmp_path_factory.mktemp("watched") / "run"
    assert train(model_dir, rows, folder, *WATCHED) == 0
    return folder


def losses(folder: Path, checkpoint: str = "checkpoint-12") -> dict[int, float]:
    return logs(folder, "loss", checkpoint)


def logs(folder: Path, name: str, checkpoint: str = "checkpoint-12") -> dict[int, float]:
    """Step → what was logged of that name."""
    history = json.loads((folder / checkpoint / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[name] for entry in history if name in entry}


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "allocation.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_conventions_promise(default_run):
    folder = default_run
    for name in (
        "recipe.yaml",
        "allocation.jsonl",
        "metrics.json",
        "ranks.png",
        "loss.png",
        "adapter/adapter_config.json",
    ):
        assert (folder / name).is_file(), name
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    assert metrics["before"]["rows"] == metrics["after"]["rows"] == 16  # 24 held back, 8 of them score the ranks
    assert metrics["train"]["steps"] == 12
    assert metrics["train"]["rows"] == 12 * 8
    assert metrics["allocation"]["rounds"] == 2
    state = json.loads((folder / "checkpoint-12" / "trainer_state.json").read_text())
    assert state["best_metric"] == pytest.approx(metrics["after"]["loss"], rel=1e-5)  # the same rows and weights


def test_every_round_stays_within_the_budget_and_moves_ranks(default_run):
    folder = default_run
    rounds = records(folder)
    assert [record["step"] for record in rounds] == [4, 8]
    before = dict.fromkeys(rounds[0]["ranks"], 2) | dict.fromkeys(rounds[0]["pruned"], 2)
    assert sum(before.values()) == 14 * 2
    for record in rounds:
        assert record["total_rank"] == sum(record["ranks"].values()) <= record["budget"] == 28
        # One per module that has ranks; all have two at the start, so that half of all is one per module too.
        assert sum(len(indices) for indices in record["pruned"].values()) == sum(map(bool, before.values()))
        assert not set(record["pruned"]) & set(record["grown"])
        after = {
            name: rank - len(record["pruned"].get(name, ())) + record["grown"].get(name, 0)
            for name, rank in before.items()
        }
        assert {name: rank for name, rank in after.items() if rank} == record["ranks"]
        before = after
        scores = json.loads((folder / record["scores"]).read_text())
        assert scores["drop"].keys() == scores["alone"].keys()
    assert len(set(rounds[-1]["ranks"].values())) > 1


@pytest.mark.parametrize("scoring", ["auto", "certified", "first-order", "exact", "path"])
def test_every_way_to_score_decides_by_its_importance(finetune, scoring):
    short = ("training.max_steps=6", "allocation.rounds=1", "evaluation.before=false", "evaluation.after=false")
    code, folder = finetune(f"allocation.scoring={scoring}", *short)
    assert code == 0
    forwards = {"auto": 6, "first-order": 6, "path": 18}
    for record in records(folder):
        scores = json.loads((folder / record["scores"]).read_text())
        assert scores["method"] == ("first-order" if scoring == "auto" else scoring)  # so short a run allows no more
        assert record["forward_equivalents"] == forwards.get(scoring, record["forward_equivalents"]) > 0
        assert record["exact_evaluations"] == sum(map(sum, scores["exact"].values()))
        assert record["certified"] or scoring not in ("exact",)
        ascending = sorted(
            (score, name, rank) for name, s in scores["importance"].items() for rank, score in enumerate(s)
        )
        pruned = {(name, rank) for name, indices in record["pruned"].items() for rank in indices}
        living = sum(map(bool, scores["importance"].values()))
        assert pruned == {(name, rank) for _, name, rank in ascending[:living]}


def test_best_checkpoint_from_before_a_round_is_loaded_with_its_own_ranks(finetune, monkeypatch):
    worse = itertools.count(1)
    monkeypatch.setattr("qalora.training.trainer.item_losses", lambda *args: [float(next(worse))])
    _, folder = finetune()
    state = json.loads((folder / "checkpoint-12" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 3
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert {tensor.shape[0] for key, tensor in saved.items() if "lora_A" in key} == {2}
    for key, tensor in load_file(folder / "checkpoint-3" / "adapter_model.safetensors").items():
        assert torch.equal(saved[key], tensor)


def test_the_best_weights_are_kept_between_checkpoints_too(finetune, monkeypatch):
    found = iter([5.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr("qalora.training.trainer.item_losses", lambda *args: [next(found)])
    _, folder = finetune("training.save_steps=12")
    assert (folder / "checkpoint-6").is_dir()
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    best = load_file(folder / "checkpoint-6" / "adapter_model.safetensors")
    assert saved.keys() == best.keys() and all(torch.equal(saved[key], best[key]) for key in best)


def test_vanilla_peft_reads_the_adapter_with_equal_logits(finetune, model_dir, vanilla):
    _, folder = finetune("--no-quantize")
    code = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2]).eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(3, 15)[None]).logits, sys.argv[3])
"""
    vanilla(code, model_dir, folder / "adapter", folder / "logits.pt")
    ours = load_adapter(
        load_base(resolve(str(model_dir)), load_in_4bit=False, dtype="float32").model, folder / "adapter"
    ).eval()
    with torch.no_grad():
        logits = ours(input_ids=torch.arange(3, 15)[None]).logits
    torch.testing.assert_close(logits, torch.load(folder / "logits.pt", weights_only=True), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "checkpoint", [3, 6, 9, 11], ids=["before the rounds", "between them", "after an epoch", "within the second"]
)
def test_resumed_equals_straight_exactly(finetune, watched_run, tmp_path, checkpoint):
    """Invariant 9, with the evaluation before training and validations (eval-mode forwards) in between."""
    shutil.copytree(watched_run, tmp_path / "resumed")
    start = tmp_path / "resumed" / f"checkpoint-{checkpoint}"
    with pytest.raises(InputError, match=r"holds checkpoint-1.*, made after it; move them away"):
        finetune(*WATCHED, "--resume-from-checkpoint", str(start), output="resumed")
    for later in range(checkpoint + 1, 13):
        shutil.rmtree(tmp_path / "resumed" / f"checkpoint-{later}")
    _, resumed = finetune(*WATCHED, "--resume-from-checkpoint", str(start), output="resumed")
    assert losses(resumed) == losses(watched_run)
    assert without_seconds(records(resumed)) == without_seconds(records(watched_run))
    assert_same_adapter(resumed, watched_run)


def without_seconds(records: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def assert_same_adapter(*folders: Path) -> None:
    one, other = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in folders)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_checkpoint_continues_wherever_it_lies(finetune, default_run, tmp_path):
    straight = default_run
    copied = tmp_path / "backup" / "best"
    shutil.copytree(straight / "checkpoint-9", copied)
    before = (straight / "metrics.json").read_text()
    code, resumed = finetune("--resume-from-checkpoint", str(copied), output="elsewhere")
    assert code == 0
    assert losses(resumed) == losses(straight)
    assert [record["step"] for record in records(resumed)] == [4, 8]
    metrics = json.loads((resumed / "metrics.json").read_text())
    assert metrics["before"] == json.loads(before)["before"]
    assert metrics["allocation"]["seconds"] == 0  # both rounds were before the checkpoint
    assert metrics["train"]["rows"] == 3 * 8  # counted from there
    with pytest.raises(InputError, match=r"best: output_dir=.*elsewhere holds something else; choose an empty folder"):
        finetune("--resume-from-checkpoint", str(copied), output="elsewhere")
    (copied / "recipe.yaml").unlink()
    with pytest.raises(InputError, match=r"best: no run of qalora began it \(no recipe.yaml\)"):
        finetune("--resume-from-checkpoint", str(copied), output="other")


def test_a_checkpoint_without_the_best_one_beside_it_keeps_the_best_of_what_follows(finetune, tmp_path, monkeypatch):
    """The loss of weights that are gone, 1.0, would beat all that follows, and the last weights would be left."""
    monkeypatch.setattr("qalora.training.trainer.item_losses", lambda *args: [float(next(found))])
    found = iter([1.0, 4.0, 3.0, 2.0, 7.0])
    _, folder = finetune("training.max_steps=6", "allocation.rounds=0")
    shutil.move(folder / "checkpoint-6", tmp_path / "copied")
    shutil.rmtree(folder)
    more = ("training.max_steps=12", "allocation.rounds=0", "--resume-from-checkpoint", str(tmp_path / "copied"))
    found = iter([2.0, 7.0])
    _, resumed = finetune(*more, output="resumed")
    best, saved = (load_file(resumed / name / "adapter_model.safetensors") for name in ("checkpoint-9", "adapter"))
    assert all(torch.equal(saved[key], best[key]) for key in best)


def test_a_resumed_run_takes_its_new_rate_and_decay_and_keeps_what_its_weights_have_in_them(finetune, default_run):
    """12 steps, linear from a warm-up of one step: after 9 steps 3/11 of the rate are left, and 2/11, 1/11."""
    asked = ("training.learning_rate=1e-4", "training.weight_decay=0.5")
    checkpoint = str(default_run / "checkpoint-9")
    _, resumed = finetune(*asked, "--resume-from-checkpoint", checkpoint, output="slower")
    history = json.loads((resumed / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry and entry["step"] > 9]
    assert rates == pytest.approx([3e-4 / 11, 2e-4 / 11, 1e-4 / 11])
    groups = torch.load(resumed / "checkpoint-12" / "optimizer.pt", weights_only=True)["param_groups"]
    assert groups[0]["weight_decay"] == 0.5
    with pytest.raises(
        InputError, match="lr_scheduler_type is greedy, and .* was made with linear: one follows the steps"
    ):
        finetune("training.lr_scheduler_type=greedy", "--resume-from-checkpoint", checkpoint, output="other")
    fixed = (
        "lora.dropout=0.1",
        "training.optim=adamw_8bit",
        "lora.target_modules=q_proj",
        "lora.layers_to_transform=0",
    )
    for setting in fixed:
        name = setting.partition("=")[0]
        with pytest.raises(InputError, match=rf"{name} is .* was made with .*: set {name}="):
            finetune(setting, "--resume-from-checkpoint", checkpoint, output="other")


@pytest.mark.parametrize(
    "settings",
    [
        ("training.optim=adafactor", "training.neftune_noise_alpha=5"),
        ("training.optim=lion_8bit", "lora.r=64", "lora.alpha=128", "training.label_smoothing_factor=0.1"),
        ("training.lr_scheduler_type=greedy", "training.lr_scheduler_kwargs={patience: 0, min_lr: 1e-5, factor: 0.5}"),
    ],
    ids=["adafactor-noise", "lion-smoothing", "greedy"],
)
def test_other_optimizers_and_schedules_resume_exactly(finetune, settings):
    """Across the round after step 8."""
    _, straight = finetune(*settings, output="straight")
    code, resumed = finetune(*settings, "--resume-from-checkpoint", str(straight / "checkpoint-6"), output="resumed")
    assert code == 0
    assert losses(resumed) == losses(straight)
    assert logs(resumed, "learning_rate") == logs(straight, "learning_rate")
    assert_same_adapter(straight, resumed)


def test_a_schedule_that_follows_the_loss_goes_on_from_the_share_it_had_come_to(finetune, monkeypatch):
    """The loss never gets better, so each validation halves the rate: after steps 3, 6 and 9."""
    monkeypatch.setattr(trainer, "item_losses", lambda model, tokenizer, items, *rest: [1.0] * len(items))
    settings = (
        "training.lr_scheduler_type=reduce_lr_on_plateau",
        "training.lr_scheduler_kwargs={patience: 0, factor: 0.5}",
    )
    _, folder = finetune(*settings, "allocation.rounds=0", "training.save_strategy=steps", output="straight")
    rate = 5e-3
    after_the_first = [rate] * 3 + [rate] * 3 + [rate / 2] * 3 + [rate / 4] * 3
    assert list(logs(folder, "learning_rate").values()) == pytest.approx(after_the_first)
    more = ("training.learning_rate=1e-4", "--resume-from-checkpoint", str(folder / "checkpoint-9"))
    _, resumed = finetune(*settings, "allocation.rounds=0", *more, output="slower")
    assert [logs(resumed, "learning_rate")[step] for step in (10, 11, 12)] == pytest.approx([1e-4 / 4] * 3)


def test_validations_and_checkpoints_by_epoch(finetune, monkeypatch):
    """9 steps an epoch; two and a half of them are 23 steps. No validation is better than the first."""
    worse = itertools.count(1)
    monkeypatch.setattr(
        trainer, "item_losses", lambda model, tokenizer, items, *rest: [float(next(worse))] * len(items)
    )
    epochs = (
        "training.max_steps=null",
        "training.num_epochs=2.5",
        "training.eval_strategy=epoch",
        "training.save_strategy=epoch",
    )
    _, folder = finetune(*epochs, "allocation.rounds=0")
    assert sorted(logs(folder, "eval_loss", "checkpoint-23")) == [9, 18, 23]
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-9", "checkpoint-18", "checkpoint-23"}
    assert logs(folder, "epoch", "checkpoint-18")[18] == 2
    best = load_file(folder / "checkpoint-9" / "adapter_model.safetensors")
    assert all(torch.equal(best[k], v) for k, v in load_file(folder / "adapter" / "adapter_model.safetensors").items())


@pytest.mark.parametrize(
    ("setting", "validations", "checkpoints"),
    [
        ("training.eval_strategy=no", 0, {3, 6, 9, 12}),
        ("training.save_strategy=no", 4, set()),
        ("training.save_strategy=best", 4, {3, 12}),
        ("training.save_steps=0.4", 4, {3, 5, 10, 12}),
    ],
)
def test_a_run_without_validations_or_checkpoints_ends_with_its_last_weights(
    finetune, default_run, monkeypatch, setting, validations, checkpoints
):
    worse, plain, last = itertools.count(1), trainer.QaloraTrainer._load_best_model, []
    monkeypatch.setattr(
        trainer, "item_losses", lambda model, tokenizer, items, *rest: [float(next(worse))] * len(items)
    )
    monkeypatch.setattr(trainer.QaloraTrainer, "_load_best_model", lambda self: last.append(plain(self)))
    code, folder = finetune(setting, "allocation.rounds=0", "evaluation.before=false", "evaluation.after=false")
    assert code == 0
    assert (next(worse) - 1, len(last)) == (validations, 0 if setting.endswith("=no") else 1)
    assert {int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*")} == checkpoints
    if setting == "training.eval_strategy=no":
        assert logs(folder, "eval_loss") == {}
        trained = load_file(folder / "checkpoint-12" / "adapter_model.safetensors")
        saved = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert all(torch.equal(saved[key], trained[key]) for key in trained)


def test_the_recipe_decides_whatever_a_launcher_left_in_the_environment(finetune, default_run, monkeypatch, capsys):
    """As `torchrun --nproc-per-node 1` and `accelerate launch --mixed_precision bf16` leave it."""
    left = {
        "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_DYNAMO_BACKEND": "eager", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "SLURM_NTASKS": "4",
    }  # fmt: skip
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    code, folder = finetune("logging.quiet=false")
    assert code == 0
    assert losses(folder) == losses(default_run)
    said = capsys.readouterr().err
    assert (
        "ACCELERATE_MIXED_PRECISION=bf16 is not followed: the recipe decides (quantization.bnb_4bit_compute_dtype)"
        in said
    )


def test_a_launch_that_is_not_torchruns_is_refused_before_anything_is_read(finetune, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="OMPI_COMM_WORLD_SIZE=2 in the environment: start several processes with tor"):
        finetune("data.train=nowhere.jsonl")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["training.lr_scheduler_kwargs={min_lr: 1e-6}"], "linear takes none, and not min_lr"),
        (["lora.target_modules=q|v"], "matches no linear layer"),
        (["lora.layers_to_transform=0,2"], "lora.layers_to_transform=2: the model has blocks 0 to 1"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_weights_load(finetune, monkeypatch, settings, says):
    monkeypatch.setattr("qalora.base.loading.load_base", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(InputError, match=says):
        finetune(*settings)


def test_a_finished_run_that_is_continued_trains_no_further(finetune):
    more = ("training.lr_scheduler_type=constant",)
    _, folder = finetune(*more)
    trained = load_file(folder / "checkpoint-12" / "adapter_model.safetensors")
    code, _ = finetune(*more, "--resume-from-checkpoint", str(folder / "checkpoint-12"))
    assert code == 0
    assert not (folder / "checkpoint-13").exists()
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(saved[key], trained[key]) for key in trained)


def test_a_resumed_run_remembers_how_long_nothing_got_better(finetune, monkeypatch):
    """The first validation, after step 3, is the best; the third is the second that is not."""
    monkeypatch.setattr("qalora.training.trainer.item_losses", lambda *args: [float(next(worse))])
    more = ("training.early_stopping_patience=2",)
    worse = itertools.count(1)
    _, folder = finetune(*more, output="straight")
    state = json.loads((folder / "checkpoint-9" / "trainer_state.json").read_text())
    assert state["global_step"] == 9 and not (folder / "checkpoint-12").exists()
    worse = itertools.count(3)
    finetune(*more, "--resume-from-checkpoint", str(folder / "checkpoint-6"), output="resumed")
    assert (folder.parent / "resumed" / "checkpoint-9").exists()
    assert not (folder.parent / "resumed" / "checkpoint-12").exists()


def test_resumed_with_dropout_and_ranks_cut_to_zero(finetune):
    more = (*HALVES, "lora.dropout=0.2", "allocation.prune_per_round=10", "lora.r=1", "lora.alpha=2")
    _, straight = finetune(*more, output="straight")
    first, second = records(straight)
    assert second["grown"].keys() - first["ranks"].keys(), "the test needs a module that comes back"
    assert len(records(straight)[0]["ranks"]) < 14, "the test needs a module without a rank"
    assert sum(map(len, records(straight)[0]["pruned"].values())) == 7  # half of all
    assert json.loads((straight / "adapter" / "adapter_config.json").read_text())["lora_dropout"] == 0.2
    _, resumed = finetune(*more, "--resume-from-checkpoint", str(straight / "checkpoint-6"), output="resumed")
    assert losses(resumed) == losses(straight)


def test_a_start_along_the_gradient_begins_at_the_base_and_resumes_exactly(finetune):
    _, plain = finetune("allocation.rounds=0")
    _, straight = finetune("lora.init=gradient", "lora.init_rows=8", output="straight")
    assert losses(straight)[1] == pytest.approx(losses(plain)[1], rel=1e-5)  # B is zero: the function is the base's
    assert losses(straight)[3] != losses(plain)[3]  # the first step has a learning rate of zero
    assert sum(records(straight)[0]["grown"].values()) > 0
    _, resumed = finetune(
        "lora.init=gradient", "lora.init_rows=8", "--resume-from-checkpoint", str(straight / "checkpoint-3"),
        output="resumed",
    )  # fmt: skip
    assert losses(resumed) == losses(straight)
    assert_same_adapter(resumed, straight)


def test_a_start_at_the_quantization_error_begins_like_the_16_bit_model_and_resumes_exactly(finetune):
    _, whole = finetune("--no-quantize", "allocation.rounds=0", output="whole")
    _, plain = finetune("allocation.rounds=0", output="plain")
    more = ("lora.init=auto", "lora.r=32", "lora.alpha=64")
    _, straight = finetune(*more, output="straight")
    assert load_recipe(str(straight / "recipe.yaml")).lora.init == "quantization" and records(straight)[0]["grown"]
    error = abs(losses(plain)[1] - losses(whole)[1])
    assert abs(losses(straight)[1] - losses(whole)[1]) < 0.2 * error
    _, resumed = finetune(*more, "--resume-from-checkpoint", str(straight / "checkpoint-3"), output="resumed")
    assert losses(resumed) == losses(straight)
    assert_same_adapter(resumed, straight)


def test_a_resumed_run_keeps_the_dtype_that_was_faster_when_it_began(finetune, monkeypatch):
    more = ("--dtype", "auto", "allocation.rounds=0", "training.max_steps=6", "evaluation.after=false")
    monkeypatch.setattr("qalora.base.loading._faster_on_cpu", lambda: torch.float32)
    _, begun = finetune(*more)
    monkeypatch.setattr("qalora.base.loading._faster_on_cpu", lambda: torch.bfloat16)
    _, resumed = finetune(*more, "--resume-from-checkpoint", str(begun / "checkpoint-3"), output="resumed")
    dtype = load_recipe(str(resumed / "recipe.yaml")).quantization.bnb_4bit_compute_dtype
    assert dtype == "float32"
    assert losses(resumed, "checkpoint-6") == losses(begun, "checkpoint-6")


def test_corrections_kept_by_their_scores_are_recorded_and_resume_exactly(finetune):
    more = ("lora.init=auto", "allocation.start=scores", "allocation.budget=parameters")
    _, even = finetune("allocation.rounds=0", output="even")
    code, straight = finetune(*more, output="straight")
    assert code == 0
    resolved = load_recipe(str(straight / "recipe.yaml"))
    assert (resolved.lora.init, resolved.allocation.start) == ("quantization", "scores")
    first, *rounds = records(straight)
    assert first["step"] == 0 and [record["step"] for record in rounds] == [4, 8]
    assert len(set(first["ranks"].values())) > 1 and first["total_rank"] <= first["budget"]
    parameters = sum(tensor.numel() for tensor in load_file(even / "adapter" / "adapter_model.safetensors").values())
    assert all(record["parameters"] <= parameters for record in (first, *rounds))
    candidates = json.loads((straight / first["scores"]).read_text())["importance"]
    assert {len(values) for values in candidates.values()} == {2 * resolved.lora.r}
    assert candidates.keys() == first["ranks"].keys()
    assert json.loads((straight / "metrics.json").read_text())["allocation"]["rounds"] == 2
    _, resumed = finetune(*more, "--resume-from-checkpoint", str(straight / "checkpoint-3"), output="resumed")
    assert losses(resumed) == losses(straight)
    assert [record["ranks"] for record in records(resumed)] == [record["ranks"] for record in records(straight)]


def test_a_base_stored_in_4_bits_starts_along_the_gradient(finetune, model_dir, tmp_path):
    stored = tmp_path / "stored-4bit"
    source = resolve(str(model_dir))
    tokenizer = load_tokenizer(source)
    load_base(source, tokenizer=tokenizer, dtype="float32").model.save_pretrained(stored)
    tokenizer.save_pretrained(stored)
    open_to_choice = ("--model", str(stored), "lora.init=auto")
    code, folder = finetune(*open_to_choice, "allocation.rounds=null", "training.max_steps=3", output="stored")
    assert code == 0
    resolved = load_recipe(str(folder / "recipe.yaml"))
    assert (resolved.lora.init, resolved.allocation.start) == ("gradient", "even")
    assert not records(folder)  # so short a run has no rounds


def test_damaged_checkpoints_are_passed_over_and_the_run_ends_as_ever(finetune, default_run, tmp_path, capsys):
    folder = shutil.copytree(default_run, tmp_path / "run")
    (folder / "checkpoint-12" / "optimizer.pt").unlink()
    (folder / "checkpoint-9" / "trainer_state.json").write_text("")
    assert finetune("--resume-from-checkpoint", "auto")[0] == 0
    said = capsys.readouterr().err
    assert "checkpoint-12 is damaged and passed over: optimizer.pt is missing" in said
    assert "checkpoint-9 is damaged and passed over: trainer_state.json" in said
    assert losses(folder) == losses(default_run)
    assert_same_adapter(folder, default_run)
    assert {path.name for path in folder.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (3, 6, 9, 12)}


def test_a_moved_run_keeps_its_best_weights_and_takes_no_other_runs(finetune, tmp_path, monkeypatch):
    """The first validation is the best one; at the place where the run was lies another run's checkpoint of that
    step."""
    worse = itertools.count(1)
    monkeypatch.setattr("qalora.training.trainer.item_losses", lambda *args: [float(next(worse))])
    short = ("training.max_steps=6", "allocation.rounds=0", "training.lr_scheduler_type=constant")
    _, first = finetune(*short)
    best = load_file(first / "checkpoint-3" / "adapter_model.safetensors")
    moved = Path(shutil.move(first, tmp_path / "moved"))
    finetune(*short, "training.learning_rate=1e-3")
    longer = ("training.max_steps=9", *short[1:], "--resume-from-checkpoint")
    _, same = finetune(*longer, "auto", output="moved")
    _, elsewhere = finetune(*longer, str(moved / "checkpoint-6"), output="elsewhere")
    for folder in (same, elsewhere):
        saved = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert all(torch.equal(saved[key], best[key]) for key in best)
    shutil.rmtree(moved / "checkpoint-3")
    shutil.copytree(tmp_path / "run" / "checkpoint-3", moved / "checkpoint-3")
    shutil.rmtree(moved / "checkpoint-9")
    finetune(*longer, "auto", output="moved")
    saved = load_file(moved / "adapter" / "adapter_model.safetensors")
    last = load_file(moved / "checkpoint-9" / "adapter_model.safetensors")
    assert all(torch.equal(saved[key], last[key]) for key in last)  # the only one whose loss counts


def test_another_base_is_refused_and_a_copied_one_is_not(finetune, default_run, model_dir, tmp_path):
    copied = shutil.copytree(model_dir, tmp_path / "copied")
    checkpoint = ("--resume-from-checkpoint", str(default_run / "checkpoint-9"))
    assert losses(finetune("--model", str(copied), *checkpoint)[1]) == losses(default_run)
    tensors = load_file(copied / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] += 0.1
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"weights of model .*copied .* are not those of .*tiny-llama.* made with"):
        finetune("--model", str(copied), *checkpoint, output="other")


def test_another_micro_batch_of_as_many_rows_a_step_goes_on_with_the_same_rows(finetune, default_run, capsys):
    checkpoint = ("--resume-from-checkpoint", str(default_run / "checkpoint-6"))
    quarters = ("training.micro_batch_size=2", "training.gradient_accumulation_steps=4")
    _, resumed = finetune(*quarters, *checkpoint)
    assert losses(resumed) == pytest.approx(losses(default_run), rel=2e-4)
    assert "training.micro_batch_size=2 (was 8)" in capsys.readouterr().err
    with pytest.raises(InputError, match="are 16 rows an optimizer step, .* with 8"):
        finetune("training.micro_batch_size=16", *checkpoint, output="other")
    with pytest.raises(InputError, match=r"training\.seed is 7, .* made with 42"):
        finetune("training.seed=7", *checkpoint, output="other")


def rows_seen(monkeypatch) -> list[int]:
    seen, step = [], trainer.QaloraTrainer.training_step

    def watch(self, model, inputs, *args, **kwargs):
        seen.extend(inputs["rows"].tolist())
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer.QaloraTrainer, "training_step", watch)
    return seen


def test_rows_that_were_trained_on_never_validate_and_new_ones_are_trained_on(
    finetune, rows, default_run, tmp_path, monkeypatch, capsys
):
    recipe = load_recipe(str(default_run / "recipe.yaml"))
    data = load_data(recipe, load_tokenizer(resolve(recipe.model)))
    held_back = {item["row"] for part in (data.validation, data.scoring) for item in part.items}
    seen = rows_seen(monkeypatch)
    more = ("training.max_steps=18", "--resume-from-checkpoint", str(default_run / "checkpoint-9"))
    _, folder = finetune("data.val_set_size=0.5", *more)
    assert not held_back & set(seen) and len(set(seen)) == 72
    assert json.loads((folder / "metrics.json").read_text())["before"]["rows"] == 16

    seen.clear()
    longer = tmp_path / "longer.jsonl"
    added = "".join(json.dumps({"prompt": f"{a} {a} ", "completion": b}) + "\n" for a, b in itertools.pairwise(WORDS))
    longer.write_text(rows.read_text() + added)
    capsys.readouterr()
    _, folder = finetune(f"data.train={longer}", "training.max_steps=24", *more[1:], output="longer")
    said = capsys.readouterr().err
    assert "other training rows than before (91, before 72; 19 of them are new)" in said, said
    assert "training.max_steps=24 (was 12)" in said and "other validation rows" not in said
    assert not held_back & set(seen) and set(range(96, 115)) <= set(seen)  # an epoch has 12 steps, and begins anew
    assert len(set(seen)) == 91


def test_the_best_loss_of_other_validation_rows_does_not_count(finetune, rows, default_run, tmp_path, capsys):
    other = tmp_path / "validation.jsonl"
    other.write_text("".join(rows.read_text().splitlines(keepends=True)[:20]))
    more = ("--resume-from-checkpoint", str(default_run / "checkpoint-9"))
    _, folder = finetune(f"data.validation={other}", *more)
    state = json.loads((folder / "checkpoint-12" / "trainer_state.json").read_text())
    last = [entry["eval_loss"] for entry in state["log_history"] if entry.get("eval_loss") and entry["step"] == 12]
    assert state["best_global_step"] == 12 and state["best_metric"] == last[0]
    assert "before" not in json.loads((folder / "metrics.json").read_text())
    assert "other validation rows than before" in capsys.readouterr().err


def test_a_longer_run_makes_no_more_rounds_and_takes_its_own_intervals(finetune, capsys):
    """Warm-up and interval are scaled to a run of 12 steps, and rounds of one of 24 fall on other steps."""
    scaled = ("allocation.warmup=0.6", "allocation.interval=0.3")
    _, folder = finetune(*scaled)
    done = [record["step"] for record in records(folder)]
    assert len(done) == 2
    more = (
        "training.max_steps=24",
        "training.eval_steps=2",
        "training.save_steps=4",
        "training.early_stopping_patience=99",
    )
    assert finetune(*scaled, *more, "--resume-from-checkpoint", "auto")[0] == 0
    assert [record["step"] for record in records(folder)] == done
    state = json.loads((folder / "checkpoint-24" / "trainer_state.json").read_text())
    evaluated = [entry["step"] for entry in state["log_history"] if "eval_loss" in entry and entry["step"] > 12]
    assert set(evaluated) >= {14, 16, 18, 20, 22, 24} and (folder / "checkpoint-16").is_dir()
    assert "training.max_steps=24 (was 12)" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ from an adapter


def save_rslora(model_dir: Path, folder: Path) -> Path:
    """Of PEFT's own making, with B that is not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(
        r=5, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj"],
        rank_pattern={"1.self_attn.q_proj": 3}, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    model.save_pretrained(folder)
    return folder


def peft_loss(model_dir: Path, adapter: Path, items: list[dict]) -> float:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), adapter).eval()
    total = count = 0
    for item in items:
        ids, labels = torch.tensor([item["input_ids"]]), torch.tensor([item["labels"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum").item()
        count += int((labels[0, 1:] != -100).sum())
    return total / count


def test_a_run_from_a_plain_lora_begins_with_its_function_and_keeps_its_budget(finetune, model_dir, tmp_path):
    adapter = save_rslora(model_dir, tmp_path / "theirs")
    more = (
        "--no-quantize",
        "allocation.preset=null",
        "allocation.warmup=4",
        "lora.dropout=0.1",
        f"adapter_name_or_path={adapter}",
    )
    plain = _without("lora.r", "lora.alpha")
    code, folder = finetune(*more, settings=plain)
    assert code == 0
    recipe = load_recipe(str(folder / "recipe.yaml"))
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.init) == (5, 8, "kaiming")
    data = load_data(recipe, load_tokenizer(resolve(str(model_dir))))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["before"]["loss"] == pytest.approx(peft_loss(model_dir, adapter, data.validation.items), rel=1e-5)
    assert metrics["allocation"]["budget"] == 5 + 5 + 3 + 5
    assert [record["step"] for record in records(folder)] == [4, 8]
    after = peft_loss(model_dir, folder / "adapter", data.validation.items)
    assert metrics["after"]["loss"] == pytest.approx(after, rel=1e-5) and after < metrics["before"]["loss"]
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["lora_dropout"] == 0.1
    # Continued, it needs the adapter no more, and the same place may be called otherwise.
    shutil.rmtree(adapter)
    again = (*more[:-1], f"adapter_name_or_path={os.path.relpath(adapter)}")
    _, resumed = finetune(
        *again, "--resume-from-checkpoint", str(folder / "checkpoint-6"), output="resumed", settings=plain
    )
    assert losses(resumed) == losses(folder)
    assert_same_adapter(resumed, folder)


def test_what_contradicts_the_given_adapter_is_refused_before_loading(
    finetune, model_dir, tmp_path, monkeypatch, default_run
):
    adapter = save_rslora(model_dir, tmp_path / "theirs")
    monkeypatch.setattr("qalora.base.loading.load_base", None)
    for setting, message in {
        "lora.r=8": r"lora\.r=8: the adapter in lora\.adapter=.*theirs has 5",
        "lora.alpha=16": r"lora\.alpha=16: .* has 8",
        "lora.target_modules=q_proj": r"lora\.target_modules=q_proj: .* has q_proj,v_proj",
        "lora.layers_to_transform=0,1": r"lora\.layers_to_transform=0,1 chooses blocks .* lora\.adapter=.* brings its "
        r"own",
        "lora.target_modules=.*q_proj": r"lora\.target_modules=.*q_proj: .* has other modules",
        "lora.init=gradient": r"lora\.init=gradient places new ranks, and lora\.adapter=.* brings trained ones",
        f"lora.adapter={default_run}": r"there is no adapter_config\.json; did you mean lora\.adapter=.*run/adapter\?",
    }.items():
        with pytest.raises(InputError, match=message):
            finetune(
                f"lora.adapter={adapter}", "allocation.preset=null", setting, settings=_without("lora.r", "lora.alpha")
            )


def test_resume_auto_takes_the_newest_checkpoint_and_drops_later_rounds(finetune, default_run, tmp_path):
    folder = shutil.copytree(default_run, tmp_path / "run")
    for step in (9, 12):
        shutil.rmtree(folder / f"checkpoint-{step}")
    assert find_checkpoint(folder, "auto") == folder / "checkpoint-6"
    code, _ = finetune("--resume-from-checkpoint", "auto")
    assert code == 0
    assert [record["step"] for record in records(folder)] == [4, 8]


def test_a_run_that_is_done_keeps_its_figures_when_it_is_continued(finetune, default_run, tmp_path, capsys):
    folder = shutil.copytree(default_run, tmp_path / "run")
    before = json.loads((folder / "metrics.json").read_text())
    assert finetune("--resume-from-checkpoint", "auto")[0] == 0
    after = json.loads((folder / "metrics.json").read_text())
    assert before["train"]["rows"] == 96 and before["allocation"]["seconds"] > 0
    assert after == before
    assert "has 12 steps behind it, and the run is to make 12: nothing is left to train" in capsys.readouterr().err


@pytest.mark.parametrize(
    "optim",
    [
        "adamw_torch",
        "paged_adamw_32bit",
        "paged_adamw_8bit",
        "adamw_8bit",
        "adafactor",
        "lion_32bit",
        "paged_lion_8bit",
    ],
)
def test_rounds_work_with_every_optimizer(finetune, optim):
    """At r = 64, where the 8-bit ones hold moments in 8 bits (from 4,096 elements on)."""
    short = ("training.max_steps=8", "allocation.rounds=1", "training.learning_rate=1e-3")
    code, folder = finetune(f"training.optim={optim}", "lora.r=64", "lora.alpha=128", *short)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert code == 0
    assert len(records(folder)) == 1
    assert metrics["after"]["loss"] < metrics["before"]["loss"]


def test_training_settings_reach_the_trainer(tmp_path):
    given = dict(
        learning_rate=3e-3, lr_scheduler_type="cosine", weight_decay=0.07, max_grad_norm=0.3, optim="paged_adamw_8bit",
        seed=7, eval_steps=5, save_steps=10, save_total_limit=3, gradient_accumulation_steps=5,
    )  # fmt: skip
    settings = [(f"training.{name}", value) for name, value in given.items()]
    found = trainer._arguments(load_recipe("alpaca", [("model", "m"), *settings]), 40, torch.float32, tmp_path)
    assert {name: getattr(found, name) for name in given} == given
    assert found.warmup_steps == 3  # 6 % of 40, rounded up


@pytest.mark.parametrize(
    ("rows", "micro", "accumulate", "epochs", "steps", "per_epoch"),
    [(72, 4, 2, 1.5, 14, 9), (73, 4, 2, 1, 10, 10), (5, 8, 4, 3, 3, 1)],
)
def test_steps_of_a_run(rows, micro, accumulate, epochs, steps, per_epoch):
    settings = dict(micro_batch_size=micro, gradient_accumulation_steps=accumulate, num_epochs=epochs)
    recipe = load_recipe("alpaca", [("model", "m"), *((f"training.{name}", v) for name, v in settings.items())])
    assert trainer.steps_of(recipe, rows) == (steps, per_epoch)


def test_an_epoch_is_every_row_once(finetune):
    _, folder = finetune("training.max_steps=null", "training.num_epochs=1", "allocation.rounds=0")
    found = json.loads((folder / "metrics.json").read_text())["train"]
    assert (found["steps"], found["rows"]) == (9, 72)


@pytest.mark.parametrize(
    ("settings", "checkpointing", "tile"),
    [
        (["training.gradient_checkpointing=false"], False, None),
        (["training.gradient_checkpointing=selective"], "selective", None),
        (["training.mlp_tile=4"], False, 4),
        (["training.fit=auto"], False, None),
    ],
    ids=["kept", "selective", "tiled", "fitted"],
)
def test_what_a_step_keeps_changes_no_loss(finetune, default_run, monkeypatch, settings, checkpointing, tile):
    seen = []
    for name in ("set_checkpointing", "set_mlp_tile"):
        plain = getattr(trainer, name)
        monkeypatch.setattr(trainer, name, lambda base, how, plain=plain: (seen.append(how), plain(base, how)))
    _, other = finetune(*settings)
    assert seen == [checkpointing, tile]
    assert losses(other) == pytest.approx(losses(default_run), rel=2e-4)


@pytest.mark.parametrize("init", ["gradient", "quantization"])
def test_a_start_sees_every_token_of_tiled_mlps(finetune, init):
    more = (f"lora.init={init}", "allocation.rounds=0", "training.max_steps=3", "evaluation.after=false")
    _, plain = finetune(*more)
    _, tiled = finetune(*more, "training.mlp_tile=2", output="tiled")
    last = "checkpoint-3"
    assert losses(tiled, last) == pytest.approx(losses(plain, last), rel=2e-4)


def test_fit_keeps_the_rows_of_a_step_and_a_resumed_run_keeps_the_fit(finetune, monkeypatch):
    def chosen(folder):
        training = load_recipe(str(folder / "recipe.yaml")).training
        return training.micro_batch_size, training.gradient_accumulation_steps, training.gradient_checkpointing

    _, folder = finetune("training.fit=auto", "training.max_steps=6", "allocation.rounds=1")
    assert chosen(folder) == (8, 1, False)  # 4 rows · 2 micro-batches, in memory without end
    monkeypatch.setattr("qalora.base.device.available_memory", lambda: 1 << 14)
    finetune("training.fit=auto", "allocation.rounds=1", "--resume-from-checkpoint", "auto")
    assert chosen(folder) == (8, 1, False)
    with pytest.raises(InputError, match=r"training\.fit=auto: one row of 11 tokens .* needs 0\.00 GiB, of 0\.00 GiB"):
        finetune("training.fit=auto", output="other")


def test_a_run_out_of_memory_goes_on_with_the_same_losses(finetune, default_run, monkeypatch):
    """Micro-batches of more than two rows fail from the third step on, in the forward."""
    from qalora.training.trainer import QaloraTrainer

    plain = default_run
    compute_loss = QaloraTrainer.compute_loss

    def failing(self, model, inputs, **kwargs):
        if self.state.global_step >= 2 and len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute_loss(self, model, inputs, **kwargs)

    monkeypatch.setattr(QaloraTrainer, "compute_loss", failing)
    code, other = finetune()
    assert code == 0
    assert losses(other) == pytest.approx(losses(plain), rel=2e-4)
    assert [record["pruned"] for record in records(other)] == [record["pruned"] for record in records(plain)]


def test_a_round_out_of_memory_scores_the_same_ranks_in_pieces(finetune, default_run, monkeypatch):
    from qalora.adapter import allocation_round as rounds

    score_ranks, seen = rounds.score_ranks, []

    def failing(model, batch, *args, **kwargs):
        seen.append(max(len(micro["input_ids"]) for micro in batch))
        if seen[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score_ranks(model, batch, *args, **kwargs)

    monkeypatch.setattr(rounds, "score_ranks", failing)
    code, other = finetune()
    assert code == 0
    assert seen == [8, 4, 2, 2]  # the second round begins where the first one had to go
    assert [record["pruned"] for record in records(other)] == [record["pruned"] for record in records(default_run)]


@pytest.mark.parametrize(
    ("start", "breaks", "at"),
    [
        ("lora.init=gradient", "start.gradient._gradients", 2),
        ("lora.init=quantization", "start.quantization.correction", 2),
        ("allocation.start=scores", "allocation_round.midpoint_shares", 1),
    ],
)
def test_a_start_out_of_memory_is_begun_anew(finetune, monkeypatch, start, breaks, at):
    """It breaks off halfway, when some maps or the number of ranks have changed, and ends as if it never had."""

    def begun(output: str) -> list[torch.Tensor]:
        code, folder = finetune(
            start, "allocation.preset=null", "allocation.rounds=0", "training.micro_batch_size=4", "lora.init_rows=4",
            "training.max_steps=1", "training.learning_rate=1e-9", output=output,
        )  # fmt: skip
        assert code == 0
        saved = load_file(folder / "adapter" / "adapter_model.safetensors")
        pairs = [(A, saved[name.replace("lora_A", "lora_B")]) for name, A in saved.items() if "lora_A" in name]
        return [part for A, B in pairs for part in (A.T @ A, B @ A)]  # the order and the signs of ranks mean nothing

    whole = begun("whole")
    module, _, name = breaks.rpartition(".")
    work, batches = getattr(import_module(f"qalora.adapter.{module}"), name), []

    def failing(*args, **kwargs):
        batches.append(args)
        if len(batches) == at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return work(*args, **kwargs)

    monkeypatch.setattr(f"qalora.adapter.{module}.{name}", failing)
    for again, once in zip(begun("again"), whole, strict=True):
        torch.testing.assert_close(again, once, rtol=1e-3, atol=1e-4)
    assert len(batches) > at


SUFFIXES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("settings", "theirs", "peft"),
    [
        ([], {}, {}),
        (
            ["label_smoothing_factor=0.2", "max_grad_norm=0", "lr_scheduler_type=cosine_with_min_lr", "warmup_steps=3",
             "lr_scheduler_kwargs={min_lr: 1e-3}", "optim=adafactor"],
            dict(label_smoothing_factor=0.2, max_grad_norm=0.0, lr_scheduler_type="cosine_with_min_lr", warmup_steps=3,
                 lr_scheduler_kwargs={"min_lr": 1e-3}, optim="adafactor"),
            {},
        ),
        (
            ["neftune_noise_alpha=5", "optim=lion_32bit", "learning_rate=1e-3", "max_grad_norm=null",
             "lora.target_modules=model.*(q|down)_proj", "lora.layers_to_transform=1"],
            dict(neftune_noise_alpha=5.0, optim="lion_32bit", learning_rate=1e-3, max_grad_norm=0.0),
            dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[1]),
        ),
    ],
    ids=["as-it-is", "smoothing-schedule-adafactor", "neftune-lion-targets"],
)  # fmt: skip
def test_no_rounds_is_plain_lora_as_peft_trains_it(finetune, model_dir, rows, settings, theirs, peft):
    """Invariant 12's twin on 4 bits: the losses of PEFT's own layers under Hugging Face's own Trainer."""
    _, folder = finetune(
        *HALVES,
        "allocation.rounds=0",
        "training.gradient_checkpointing=false",
        "training.group_by_length=false",
        *(setting if "." in setting.partition("=")[0] else f"training.{setting}" for setting in settings),
    )
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments, set_seed

    from qalora.data.batching import Collator

    recipe = load_recipe(str(folder / "recipe.yaml"))
    base = load_base(resolve(str(model_dir)), dtype="float32")
    train = load_data(recipe, base.tokenizer).train.items
    set_seed(42)
    targets = dict(target_modules=recipe.lora.target_modules, layers_to_transform=recipe.lora.layers_to_transform)
    ours = attach(base.model, r=2, alpha=4, seed=42, **targets)
    start = {name: (layer.A.clone(), layer.B.clone()) for name, layer in gated_layers(ours).items()}
    plain = load_base(resolve(str(model_dir)), dtype="float32").model
    config = LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **{"target_modules": SUFFIXES, **peft})
    plain = get_peft_model(plain, config)
    adapted = {
        name.removeprefix("base_model.model.") for name, module in plain.named_modules() if hasattr(module, "lora_A")
    }
    assert adapted == set(read_adapter(folder / "adapter").pairs)
    with torch.no_grad():
        for name in adapted:
            A, B = start[name]
            module = plain.get_submodule("base_model.model." + name)
            module.lora_A.default.weight.copy_(A)
            module.lora_B.default.weight.copy_(B)
    collate = Collator(base.tokenizer.pad_token_id)
    options = dict(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=12,
        learning_rate=5e-3,
        warmup_steps=1,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
        seed=42,
    )
    arguments = TrainingArguments(output_dir=str(folder / "peft"), **{**options, **theirs})
    trainer = Trainer(
        model=plain,
        args=arguments,
        train_dataset=train,
        data_collator=lambda items: {k: v for k, v in collate(items).items() if k != "rows"},
    )
    trainer.train()
    for name in ("loss", "learning_rate"):
        logged = {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}
        assert logs(folder, name) == pytest.approx(logged, abs=2e-4 if name == "loss" else 1e-12)


def test_a_round_that_changes_nothing_changes_no_loss(finetune, monkeypatch):
    """Invariant 12: the same run with rounds whose plan is empty."""
    import qalora.adapter.allocation_round
    from qalora.adapter.allocation import AllocationPlan

    _, plain = finetune("allocation.rounds=0", output="plain")
    monkeypatch.setattr(qalora.adapter.allocation_round, "plan", lambda *args, **kwargs: AllocationPlan({}, {}))
    _, empty = finetune(output="empty")
    assert [record["pruned"] for record in records(empty)] == [{}, {}]
    assert losses(empty) == losses(plain)


def test_packing_trains(finetune):
    code, folder = finetune("data.packing=true", "data.max_seq_len=48")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert code == 0
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    assert metrics["train"]["rows"] > 3 * 12 * 8  # eight sequences a step, of several rows each


@pytest.mark.parametrize(("kind", "double_quant"), [("nf4", True), ("fp4", False)])
def test_merged_on_request_into_the_weights_that_were_trained_on(finetune, model_dir, kind, double_quant):
    how = (f"quantization.bnb_4bit_quant_type={kind}", f"quantization.bnb_4bit_use_double_quant={double_quant}")
    code, folder = finetune("merge=true", *how)
    assert code == 0
    config = json.loads((folder / "merged" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    base = load_base(resolve(str(model_dir)), dtype="float32", quant_type=kind, double_quant=double_quant).model
    assert {linear.weight.quant_state.quant_type for linear in linear_maps(base).values()} == {kind}
    merged = load_file(folder / "merged" / "model.safetensors")
    for name, layer in gated_layers(load_adapter(base, folder / "adapter")).items():
        wanted = dequantize(layer.base_layer) + layer.s * layer.B.detach() @ layer.A.detach()
        torch.testing.assert_close(merged[f"{name}.weight"].float(), wanted, rtol=2**-8, atol=1e-7)


def test_a_round_gets_its_settings_its_rows_and_what_was_spent(finetune, model_dir, monkeypatch):
    seen, plain = [], callback.allocation_round

    def spy(model, optimizer, batch, settings, step, **more):
        seen.append((batch, settings, more["spent"]))
        return plain(model, optimizer, batch, settings, step, **more)

    monkeypatch.setattr(callback, "allocation_round", spy)
    given = dict(min_rank=1, max_rank=3, importance="drop", prune_per_round=5)
    _, folder = finetune(*(f"allocation.{name}={value}" for name, value in given.items()))
    data = load_data(load_recipe(str(folder / "recipe.yaml")), load_tokenizer(resolve(str(model_dir))))
    (batch, settings, first), (_, _, second) = seen
    assert (settings.min_rank, settings.max_rank, settings.importance, settings.prune) == (1, 3, "drop", 5)
    lengths = [len(item["input_ids"]) for item in data.train.items]
    assert settings.step_tokens == pytest.approx(8 * sum(lengths) / len(lengths))
    scored = [
        ids[mask.bool()].tolist()
        for micro in batch
        for ids, mask in zip(micro["input_ids"], micro["attention_mask"], strict=True)
    ]
    assert sorted(scored) == sorted(item["input_ids"] for item in data.scoring.items)
    assert (first, second) == (0, records(folder)[0]["forward_equivalents"])
    assert all(1 <= rank <= 3 for record in records(folder) for rank in record["ranks"].values())


def test_the_targets_alone_are_adapted(finetune):
    _, folder = finetune("lora.target_modules=q_proj,v_proj", "training.max_steps=3", "allocation.rounds=0")
    modules = {key.rsplit(".", 2)[0] for key in load_file(folder / "adapter" / "adapter_model.safetensors")}
    blocks = "base_model.model.model.layers"
    assert modules == {f"{blocks}.{block}.self_attn.{name}" for block in (0, 1) for name in ("q_proj", "v_proj")}


# ------------------------------------------------------------------------------------------------------- rows


def test_rows_that_train_score_and_measure_are_apart(model_dir, rows):
    settings = [("model", str(model_dir)), ("data.train", str(rows)), ("data.val_set_size", 24)]
    recipe = load_recipe("alpaca", [*settings, ("data.format", "prompt-completion"), ("allocation.val_batch_size", 8)])
    data = load_data(recipe, load_tokenizer(resolve(str(model_dir))))
    parts = [{item["row"] for item in part.items} for part in (data.train, data.scoring, data.validation)]
    assert list(map(len, parts)) == [72, 8, 16]
    assert set.union(*parts) == set(range(96))


def test_validation_rows_of_their_own(model_dir):
    limits = [("data.max_rows", 40), ("evaluation.rows", 50), ("evaluation.metrics", ["loss"])]
    recipe = load_recipe("quickstart", [("model", str(model_dir)), ("data.chat", False), *limits])
    data = load_data(recipe, load_tokenizer(resolve(str(model_dir))))
    scoring, validation = ({item["row"] for item in part.items} for part in (data.scoring, data.validation))
    assert (len(data.train), len(scoring), len(validation)) == (40, recipe.allocation.val_batch_size, 50)
    assert not scoring & validation
    held_back = {row["prompt"] for row in quickstart.rows(0, 132, "validation")}
    rendered = [example.prompt[0].text for part in (data.scoring, data.validation) for example in part.examples]
    assert set(rendered) <= held_back


def test_rows_are_cut_at_the_models_positions_and_it_is_said(finetune, model_dir, tmp_path, capsys):
    long = tmp_path / "long.jsonl"
    words = [" ".join(WORDS[i % len(WORDS)] for i in range(start, start + 200)) for start in range(6)]
    long.write_text("".join(json.dumps({"prompt": "a ", "completion": text}) + "\n" for text in words))
    quick = ["training.max_steps=1", "allocation.rounds=0", "logging.quiet=false", "evaluation.before=false"]
    arguments = [
        "--model",
        str(model_dir),
        "--recipe",
        "alpaca",
        "--output-dir",
        str(tmp_path / "run"),
        "--dtype",
        "float32",
    ]
    arguments += [f"data.train={long}", "data.format=prompt-completion", "data.max_seq_len=65", "data.val_set_size=1"]
    assert main([*arguments, *quick, "evaluation.after=false"]) == 0
    said = capsys.readouterr().err
    assert f"data.max_seq_len=65: {model_dir} has 64 positions; longer rows are cut there" in said
    assert "6 rows cut at data.max_seq_len=64" in said
    assert load_recipe(str(tmp_path / "run" / "recipe.yaml")).data.max_seq_len == 64


def test_validation_rows_that_are_training_rows_are_counted(model_dir, tmp_path):
    train, validation = tmp_path / "train.jsonl", tmp_path / "validation.csv"
    rows = [{"prompt": f"{word} ", "completion": word} for word in WORDS[:4]]
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    validation.write_text(
        f"prompt,completion\n{WORDS[0]} ,{WORDS[0]}\n{WORDS[1]} ,{WORDS[2]}\n{WORDS[3]} ,{WORDS[3]}\n"
    )
    settings = [("model", str(model_dir)), ("data.train", str(train)), ("data.format", "prompt-completion")]
    tokenizer = load_tokenizer(resolve(str(model_dir)))
    said: list[str] = []
    load_data(load_recipe("alpaca", [*settings, ("data.validation", str(validation))]), tokenizer, say=said.append)
    assert any("2 of 3 validation rows are training rows too" in line for line in said)
    said.clear()
    load_data(load_recipe("alpaca", [*settings, ("data.val_set_size", 1)]), tokenizer, say=said.append)
    assert not any("training rows too" in line for line in said)


def test_the_advice_for_one_row_and_for_two_works(finetune, tmp_path):
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"prompt": "a ", "completion": "b"}) + "\n")
    quick = ["training.max_steps=1", "allocation.rounds=0", "data.val_set_size=0.05"]
    with pytest.raises(InputError, match=r"give data\.validation=FILE, which may be the same file"):
        finetune(f"data.train={one}", *quick)
    assert finetune(f"data.train={one}", *quick, f"data.validation={one}")[0] == 0
    two = tmp_path / "two.jsonl"
    two.write_text(one.read_text() * 2)
    with pytest.raises(InputError, match=r"set a share such as data\.val_set_size=0\.1, or"):
        finetune(f"data.train={two}", *quick[:2], "data.val_set_size=2", output="second")
    assert finetune(f"data.train={two}", *quick[:2], "data.val_set_size=0.1", output="second")[0] == 0


def test_splits_of_both_sets_reach_the_reader(model_dir, rows):
    settings = [("model", str(model_dir)), ("data.train", str(rows)), ("data.validation", str(rows))]
    slices = [("data.split", "train[:75%]"), ("data.validation_split", "train[75%:]")]
    recipe = load_recipe("alpaca", [*settings, *slices, ("data.format", "prompt-completion")])
    data = load_data(recipe, load_tokenizer(resolve(str(model_dir))))
    assert len(data.train) == 72
    assert len({item["row"] for part in (data.validation, data.scoring) for item in part.items}) == 24


# ------------------------------------------------------------------------------------------------------- named failures


def test_a_loss_that_is_not_finite_names_step_and_rows(finetune, monkeypatch):
    from qalora.training.trainer import QaloraTrainer

    honest = QaloraTrainer.compute_loss

    def poisoned(self, *args, **kwargs):
        loss = honest(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 6 else loss

    monkeypatch.setattr(QaloraTrainer, "compute_loss", poisoned)
    with pytest.raises(AnswerNo, match=r"the loss is nan at step 7, on rows \[\d+, \d+, \d+, \d+\] .*checkpoint-6"):
        finetune(*HALVES)


def test_a_run_that_never_allocated_is_an_error(finetune):
    with pytest.raises(AnswerNo, match="before its first round of allocation"):
        finetune(
            "training.early_stopping_patience=1",
            "training.learning_rate=1e-30",
            "allocation.warmup=10",
            "allocation.interval=1",
        )


def test_ranks_of_one_a_module_are_halved_by_a_round_and_never_all_pruned(finetune):
    _, folder = finetune("lora.r=1", "lora.alpha=2", "allocation.rounds=1")
    (record,) = records(folder)
    assert sum(map(len, record["pruned"].values())) == 7  # of 14 modules
    assert sum(record["grown"].values()) == 7 and record["total_rank"] == 14


def test_a_round_that_would_prune_all_is_refused_before_loading(finetune, monkeypatch):
    monkeypatch.setattr("qalora.base.loading.load_base", None)
    with pytest.raises(InputError, match=r"prune_per_round=28: the adapter has 28 ranks, .* leaves nothing to train"):
        finetune("allocation.prune_per_round=28")


def test_a_run_too_short_for_a_round_is_refused_before_loading(finetune):
    with pytest.raises(InputError, match=r"a run of 1 optimizer steps has no room for a round"):
        finetune("training.max_steps=1")


def test_a_second_run_of_the_same_folder_is_refused_by_the_first_ones_process(finetune, tmp_path, capsys, monkeypatch):
    def meanwhile(*args):
        for more in ([], ["--overwrite"], ["--resume-from-checkpoint", "auto"]):
            with pytest.raises(
                InputError, match=rf"output_dir=.*run: in use by process {os.getpid()} on .* wait for its end"
            ):
                finetune(*more)
        raise ZeroDivisionError

    monkeypatch.setattr("qalora.base.loading.load_tokenizer", meanwhile)
    with pytest.raises(ZeroDivisionError):
        finetune()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("at", ["adapter_model.safetensors", "optimizer.pt", "files.json"])
def test_a_full_disk_at_a_checkpoint_is_one_sentence_and_leaves_the_earlier_ones(
    finetune, default_run, monkeypatch, capsys, at
):
    """A limit on the size of files (EFBIG) makes each library fail in its own words, as a full disk (ENOSPC) does."""
    sizes = {file.name: file.stat().st_size for file in (default_run / "checkpoint-6").iterdir()}
    plain, before = trainer.QaloraTrainer._save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(self, *args):
        if self.state.global_step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[at] - 10, before[1]))
        try:
            plain(self, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    if at == "files.json":  # smaller than some others: only its own writing fails
        monkeypatch.setattr("qalora.training.trainer.write_manifest", full_disk)
    else:
        monkeypatch.setattr(trainer.QaloraTrainer, "_save_checkpoint", limited)
    said = (
        r"checkpoint-\d+: cannot be written \((File too large|No space left on device)\); nothing was kept\. .* "
        r"make room"
    )
    with pytest.raises(InputError, match=said):
        finetune()
    folder = finetune.folder
    kept = {path.name for path in folder.iterdir() if "checkpoint" in path.name}
    assert kept == ({"checkpoint-3"} if at != "files.json" else set())
    monkeypatch.undo()
    assert finetune("--resume-from-checkpoint", "auto")[0] == 0
    assert losses(folder) == losses(default_run)


def full_disk(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["allocation.jsonl", "step-4.json", "metrics.json", "recipe.yaml", "run.json"])
def test_a_full_disk_elsewhere_is_one_sentence(finetune, monkeypatch, name):
    from qalora import files

    fsync, write = os.fsync, files.write_whole

    def failing(file, text):
        monkeypatch.setattr(os, "fsync", full_disk if Path(file).name == name else fsync)
        write(file, text)

    for module in ("files", "adapter.callback", "training.begin"):
        monkeypatch.setattr(f"qalora.{module}.write_whole", failing)
    with pytest.raises(InputError, match=r"run: cannot be written \(No space left on device\)\. .* make room"):
        finetune()
    left = list(finetune.folder.rglob(f"*{name}*"))
    assert (
        all(path.name == name and path.parent.name.startswith("checkpoint-") for path in left)
        or name == "allocation.jsonl"
    )
    assert not list(finetune.folder.rglob("*.partial"))


def test_a_weight_that_is_not_finite_is_not_saved_and_the_last_good_checkpoint_named(finetune, monkeypatch):
    def poison(self, args, state, control, model=None, **kwargs):
        if state.global_step == 6:
            next(iter(gated_layers(model).values())).B.data[0, 0] = float("nan")

    monkeypatch.setattr(callback.AllocationCallback, "on_step_end", poison)
    with pytest.raises(AnswerNo, match=r"not finite after step 6; .*the last good checkpoint is .*checkpoint-3"):
        finetune("allocation.rounds=0")
    assert {path.name for path in finetune.folder.iterdir() if "checkpoint" in path.name} == {"checkpoint-3"}


def test_an_output_folder_in_use_is_refused(finetune, default_run, tmp_path):
    shutil.copytree(default_run, tmp_path / "run")
    with pytest.raises(InputError, match="holds a run; continue it with resume_from_checkpoint auto"):
        finetune()
    assert finetune("--overwrite")[0] == 0
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").touch()
    with pytest.raises(InputError, match="not empty, and no run of qalora"):
        check_output_dir(other, [], checkpoint=None, overwrite=True)
    assert (other / "cat.jpg").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("data.train=nothing.jsonl", "no such file"),
        ("training.report_to=wandb", "report_to=wandb"),
        ("lora.target_modules=q_prj", "q_prj: the model has no such linear layer"),
    ],
)
def test_a_run_is_overwritten_only_when_the_next_one_begins(finetune, monkeypatch, wrong, message):
    monkeypatch.setitem(sys.modules, "wandb", None)
    _, folder = finetune("training.max_steps=3", "allocation.rounds=0")
    with pytest.raises(InputError, match=message):
        finetune("--overwrite", wrong)
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


def test_what_the_next_run_reads_and_a_run_wrote_is_not_overwritten(finetune, monkeypatch):
    short = ("training.max_steps=3", "allocation.rounds=0")
    _, folder = finetune(*short)
    monkeypatch.setenv("HOME", str(folder.parent))
    for name in (folder / "adapter", f"~/{folder.name}/adapter"):
        with pytest.raises(InputError, match=r"adapter, which the run reads, is of the run in .*; choose another"):
            finetune("--overwrite", *short, f"lora.adapter={name}")
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


def test_what_no_run_wrote_stays_and_can_be_read(finetune, rows, capsys):
    short = ("training.max_steps=3", "allocation.rounds=0", "evaluation.before=false", "evaluation.after=false")
    _, folder = finetune(*short)
    shutil.copy(rows, folder / "rows.jsonl")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")
    (folder / "runs" / "of-another-tool").mkdir(parents=True)
    (folder / "scores").mkdir()
    (folder / "scores" / "football.csv").write_text("3:1")
    assert finetune("--overwrite", *short, f"data.train={folder / 'rows.jsonl'}")[0] == 0
    assert "rows.jsonl" in capsys.readouterr().err
    for name in ("rows.jsonl", ".git/HEAD", "runs/of-another-tool", "scores/football.csv"):
        assert (folder / name).exists(), name
    # A run's own recipe is read before it is written anew.
    assert main(["--recipe", str(folder / "recipe.yaml"), "--output-dir", str(folder), "--overwrite"]) == 0


def test_a_users_project_is_never_a_run(model_dir, tmp_path, monkeypatch):
    """`--recipe recipe.yaml --output-dir . --overwrite`, in a folder with a recipe.yaml of its owner's."""
    project = tmp_path / "project"
    project.mkdir()
    for name in ("recipe.yaml", "notes.txt", "run.json", "metrics.json"):
        (project / name).write_text("{lora: {r: 2}}" if name == "recipe.yaml" else "{}")
    monkeypatch.chdir(project)
    before = {path.name: path.read_text() for path in project.iterdir()}
    for more in ([], ["--overwrite"], ["--resume-from-checkpoint", "auto"]):
        with pytest.raises(
            InputError, match=r"holds a recipe\.yaml that no run wrote: not empty, and no run of qalora"
        ):
            main(["--recipe", "recipe.yaml", "--model", str(model_dir), "data.train=t", "--output-dir", ".", *more])
    assert {path.name: path.read_text() for path in project.iterdir()} == before


@pytest.mark.parametrize(
    ("recipe", "model", "name"),
    [
        ("alpaca", "llama3.2-1b", "alpaca-llama3.2-1b"),
        ("recipes/mine.yaml", "meta-llama/Llama-3.1-8B", "mine-Llama-3.1-8B"),
        ("alpaca", "some/where/model.Q4_0.gguf", "alpaca-model.Q4_0"),
        ("alpaca", "some/where/", "alpaca-where"),
    ],
)
def test_runs_are_named_after_recipe_and_model(recipe, model, name):
    assert run_name(recipe, model) == name


def test_a_run_of_one_step_learns(finetune):
    code, folder = finetune("training.max_steps=1", "allocation.rounds=0")
    assert code == 0
    assert any(
        tensor.any()
        for key, tensor in load_file(folder / "adapter" / "adapter_model.safetensors").items()
        if "lora_B" in key
    )


def test_auto_begins_where_there_is_no_checkpoint_and_a_path_is_refused(finetune, tmp_path, capsys):
    short = ("training.max_steps=3", "allocation.rounds=0", "--resume-from-checkpoint", "auto")
    (tmp_path / "run" / "lost+found").mkdir(parents=True)  # of a mounted volume
    code, folder = finetune(*short)
    assert code == 0 and "run holds no checkpoint; the run begins" in capsys.readouterr().err
    # Killed before its first checkpoint, and started again by a loop.
    shutil.rmtree(folder / "checkpoint-3")
    shutil.rmtree(folder / "adapter")
    assert finetune(*short)[0] == 0 and (folder / "adapter").is_dir()
    # A result is no failed attempt.
    shutil.rmtree(folder / "checkpoint-3")
    with pytest.raises(InputError, match="holds a run; continue it"):
        finetune(*short)
    with pytest.raises(InputError, match=r"no checkpoint there"):
        finetune("--resume-from-checkpoint", str(tmp_path), output="nothing")


def test_dry_run_prints_recipe_and_plan_and_writes_nothing(finetune, capsys):
    code, folder = finetune("--dry-run")
    printed = capsys.readouterr().out
    assert code == 0
    assert "rounds: 2" in printed
    assert "4-bit weights" in printed
    assert not folder.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_finishes_the_step_and_the_run_can_be_continued(default_run, launch, tmp_path, number):
    """Also where it ended the reader of the messages, as Ctrl-C ends `| tee`, and where one checkpoint is kept, the
    best one, which is not the newest."""
    recipe = yaml.safe_load((default_run / "recipe.yaml").read_text()) | {"output_dir": str(tmp_path / "stopped")}
    recipe["training"]["save_total_limit"] = 1 if number == signal.SIGTERM else 12
    (tmp_path / "stopped.yaml").write_text(yaml.safe_dump(recipe))
    # The run sends the signal to itself after its seventh step, at a point that is the same each time.
    code = f"""
from qalora.training import trainer
sent, step = [], trainer.QaloraTrainer.training_step
def training_step(self, *args, **kwargs):
    if self.state.global_step == 7 and not sent:
        sent.append(True)
        if {number == signal.SIGINT}:
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, 2)
            sys.stderr = os.fdopen(2, "w", buffering=1)
        os.kill(os.getpid(), {int(number)})
    return step(self, *args, **kwargs)
trainer.QaloraTrainer.training_step = training_step
"""
    run = launch(1, "--recipe", tmp_path / "stopped.yaml", code=code)
    assert run.codes == [130], run.said
    stopped = tmp_path / "stopped"
    assert (stopped / "checkpoint-8" / "trainer_state.json").is_file()
    assert not (stopped / "adapter").exists()
    assert main(["--recipe", str(tmp_path / "stopped.yaml"), "--resume-from-checkpoint", "auto"]) == 0
    assert losses(stopped) == losses(default_run)


def test_checkpoints_are_plain_peft_without_pickled_settings(default_run, model_dir):
    folder = default_run
    config = json.loads((folder / "checkpoint-9" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model_dir)
    assert config["rank_pattern"] == records(folder)[-1]["ranks"]
    assert config["alpha_pattern"] == {name: 2 * rank for name, rank in config["rank_pattern"].items()}
    assert not (folder / "checkpoint-9" / "training_args.bin").exists()


def test_every_adapter_of_a_run_says_what_it_was_trained_on_and_taught(default_run, model_dir):
    for folder in (default_run / "adapter", default_run / "checkpoint-3", default_run / "checkpoint-12"):
        said = json.loads((folder / "qalora.json").read_text())
        assert len(said.pop("base")) == 64  # see test_its_base
        assert said == {
            "stored_as": "F32",
            "model": str(model_dir),
            "quant_type": "nf4",
            "double_quant": True,
            "compute_dtype": "float32",
            "stop_tokens": ["</s>"],
            "chat_template": None,
            "prompt": "{prompt}",
        }
