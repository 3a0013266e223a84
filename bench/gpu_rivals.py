"""What gpu.py measures qalora against: PEFT under Hugging Face's Trainer and under TRL's SFTTrainer, as their users
run them."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class Clock(TrainerCallback):
    """Seconds of every optimizer step."""

    def __init__(self, wait: Callable[[], None]):
        self.wait, self.times, self.start = wait, list[float](), 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.wait()
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.wait()
        self.times.append(time.perf_counter() - self.start)


def tokenizer_of(size: int) -> PreTrainedTokenizerFast:
    """One that the trainers can ask for a padding token; rows come tokenized."""
    words = Tokenizer(models.WordLevel({str(number): number for number in range(min(size, 64))}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1", unk_token="0")


def lora(r: int) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", task_type="CAUSAL_LM")


def trained_by(
    side: str,
    base: nn.Module,
    ids: torch.Tensor,
    *,
    r: int,
    optim: str,
    steps: int,
    device: str,
    wait: Callable[[], None],
) -> tuple[list[float], list[float], Any]:
    """(seconds of each step, losses, the optimizer) of a run over the same rows at every step.

    Args:
        side: hf, trl or trl-liger.
        ids: (rows, tokens), all of them learned.
    """
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids.tolist()] * steps)
    clock = Clock(wait)
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = dict(
            output_dir=folder, per_device_train_batch_size=len(ids), max_steps=steps, learning_rate=2e-4, optim=optim,
            lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=device == "cpu", bf16=True, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )  # fmt: skip
        tokenizer = tokenizer_of(int(ids.max()) + 1)
        trainer: Any
        if side == "hf":
            model = get_peft_model(prepare_model_for_kbit_training(base), lora(r))
            collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
            trainer = Trainer(
                model=model, args=TrainingArguments(**common, train_sampling_strategy="sequential"), train_dataset=rows,
                data_collator=collate, callbacks=[clock],
            )  # fmt: skip
        else:
            from trl import SFTConfig, SFTTrainer

            settings = SFTConfig(**common, max_length=None, use_liger_kernel=side == "trl-liger")
            trainer = SFTTrainer(
                model=base, args=settings, train_dataset=rows.remove_columns("labels"), processing_class=tokenizer,
                peft_config=lora(r), callbacks=[clock],
            )  # fmt: skip
        trainer.train()
    return clock.times, [line["loss"] for line in trainer.state.log_history if "loss" in line], trainer.optimizer


def missing(side: str) -> str | None:
    """What is not installed for it."""
    needs = {"trl": ["trl"], "trl-liger": ["trl", "liger_kernel"]}.get(side, [])
    absent = [name for name in needs if importlib.util.find_spec(name) is None]
    return f"not run: {', '.join(absent)} not installed" if absent else None
