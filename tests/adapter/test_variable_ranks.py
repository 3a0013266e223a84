"""Under any trainer: the best checkpoint, and resuming, across rounds of allocation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import Trainer, TrainingArguments

import qalora
from qalora.adapter.model import gated_layers
from qalora.data.batching import Collator

ROWS = [{"prompt": f"Say {word}", "completion": f" {word} {word}"} for word in ("red", "blue", "green", "grey") * 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, save_tiny_llama) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("api") / "tiny")


@pytest.fixture
def base(folder):
    return qalora.load_base(str(folder), dtype="float32")


@pytest.fixture
def rows(base):
    return qalora.load_rows(ROWS, base.tokenizer)


def arguments(folder: Path, **more) -> dict:
    steps = dict(
        max_steps=8, per_device_train_batch_size=2, logging_steps=1, learning_rate=3e-3, use_cpu=True, report_to="none"
    )
    return dict(output_dir=str(folder), disable_tqdm=True, seed=1, remove_unused_columns=False) | steps | more


class VariableTrainer(qalora.VariableRanks, Trainer):
    pass


def trained(model, rows, folder: Path, callback, *, resume=None, kind=VariableTrainer, **more):
    trainer = kind(
        model=model,
        args=TrainingArguments(**arguments(folder, **more)),
        train_dataset=rows,
        eval_dataset=rows[:4] if more.get("eval_strategy") else None,
        data_collator=lambda items: {k: v for k, v in Collator(0)(items).items() if k != "rows"},
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_the_best_checkpoint_is_loaded_across_a_round(base, rows, tmp_path):
    model = qalora.attach(base.model, r=4, alpha=8)
    rounds = qalora.AllocationCallback(rows[:8], rounds=1, warmup=4, interval=2)
    trainer = trained(
        model, rows, tmp_path, rounds, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, learning_rate=1e-9, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    best = Path(trainer.state.best_model_checkpoint)
    saved = json.loads((best / "adapter_config.json").read_text())
    now = qalora.ranks(trainer.model)
    if best.name == "checkpoint-2":  # before the round, whose ranks are back
        assert set(now.values()) == {4}
    assert now == (saved["rank_pattern"] or dict.fromkeys(now, 4))


def test_a_run_is_resumed_across_a_round_as_if_it_had_not_stopped(folder, rows, tmp_path):
    def run(place: Path, steps: int, resume=None):
        model = qalora.attach(qalora.load_base(str(folder), dtype="float32").model, r=4, alpha=8, seed=1)
        rounds = qalora.AllocationCallback(rows[:8], rounds=2, warmup=2, interval=2)
        settings = dict(save_strategy="steps", save_steps=4, max_steps=8, lr_scheduler_type="constant")
        if steps < 8:

            class Stop(transformers.TrainerCallback):
                def on_step_end(self, args, state, control, **kwargs):
                    control.should_training_stop = state.global_step >= steps

            rounds_and_stop = [rounds, Stop()]
        else:
            rounds_and_stop = [rounds]
        trainer = VariableTrainer(
            model=model, args=TrainingArguments(**arguments(place, **settings)), train_dataset=rows,
            data_collator=lambda items: {k: v for k, v in Collator(0)(items).items() if k != "rows"},
            callbacks=rounds_and_stop,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run(tmp_path / "whole", 8)
    run(tmp_path / "parts", 4)
    resumed = run(tmp_path / "parts", 8, resume=str(tmp_path / "parts" / "checkpoint-4"))
    assert qalora.ranks(resumed) == qalora.ranks(whole) != dict.fromkeys(qalora.ranks(whole), 4)
    for name, layer in gated_layers(whole).items():
        assert torch.equal(layer.A, gated_layers(resumed)[name].A) and torch.equal(
            layer.B, gated_layers(resumed)[name].B
        )


def test_under_trl_a_run_is_resumed_as_if_it_had_not_stopped(folder, tmp_path):
    """TRL casts the adapters of a 4-bit base to bf16 when the trainer is made, before the checkpoint is read."""
    trl = pytest.importorskip("trl")

    class Sft(qalora.VariableRanks, trl.SFTTrainer):
        pass

    def run(place: Path, resume=None):
        base = qalora.load_base(folder, dtype="float32")
        model = qalora.attach(base.model, r=4, alpha=8, seed=1)
        rounds = qalora.AllocationCallback(qalora.load_rows(ROWS[:8], base.tokenizer), rounds=2, warmup=2, interval=2)
        config = trl.SFTConfig(
            **arguments(place, max_steps=6, save_strategy="steps", save_steps=3, optim="adamw_torch_fused")
            | dict(remove_unused_columns=True, bf16=False, max_length=64)
        )
        data = Dataset.from_list(ROWS)
        trainer = Sft(model, args=config, train_dataset=data, processing_class=base.tokenizer, callbacks=[rounds])
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run(tmp_path / "run")
    resumed = run(tmp_path / "run", str(tmp_path / "run" / "checkpoint-3"))
    assert qalora.ranks(resumed) == qalora.ranks(whole) != dict.fromkeys(qalora.ranks(whole), 4)
    for name, layer in gated_layers(whole).items():
        assert torch.equal(layer.A, gated_layers(resumed)[name].A)
        assert torch.equal(layer.B, gated_layers(resumed)[name].B)
