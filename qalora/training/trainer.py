"""The wiring of a run: read this first.

A batch: the collator pads rows or packs them → `training_step` → the decoder, its frozen maps and gated adapters
(adapter/layer.py) → the label-only loss (kernels/loss.py) → backward, clip, step (Hugging Face's Trainer) → the
callback (callback.py) decides whether a round of allocation, a log line, a validation or a checkpoint is due.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset, Sampler
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import TrainOutput

from qalora import processes
from qalora.adapter.allocation import Schedule, schedule
from qalora.adapter.callback import AllocationCallback
from qalora.adapter.model import is_finite, ranks, write_adapter
from qalora.adapter.provenance import Provenance
from qalora.adapter.replicas import check_replicas, share_adapter
from qalora.adapter.start.begin import start, starting_rows
from qalora.adapter.surgery import page_again, restore
from qalora.adapter.variable_ranks import VariableRanks
from qalora.base.checkpoint import Weights
from qalora.base.device import best_device, device_module, peak_memory
from qalora.data.batching import Collator, PackingCollator, pack
from qalora.data.rows import Item, Packed, Row, supervised_tokens
from qalora.errors import AnswerNo, InputError
from qalora.files import written_beside
from qalora.kernels.activations import set_checkpointing, set_mlp_tile
from qalora.kernels.layout import prepared
from qalora.kernels.loss import liger_loss, summed_loss
from qalora.metrics import item_losses
from qalora.progress import console
from qalora.recipe import Recipe
from qalora.training.callbacks import InterruptCallback, LastValidation, ProgressLine
from qalora.training.checkpoints import PREFIX, belongs, checkpoints_in, last_good, write_manifest
from qalora.training.ladder import Inputs, Ladder
from qalora.training.rates import check_schedule, warmup_of
from qalora.training.run_folder import RUN_FILES
from qalora.training.sharing import SharedStep


class GroupedByLength(LengthGroupedSampler):
    """Rows of like length together, in an order that seed and epoch decide alone: an epoch that is resumed goes on as
    it began."""

    def __init__(self, *args: Any, seed: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return super().__iter__()


@dataclass
class Throughput:
    """What the training loop has worked through since it started."""

    start: float = field(default_factory=time.perf_counter)
    rows: int = 0
    tokens: int = 0

    def summary(self, steps: int) -> dict[str, float]:
        seconds = time.perf_counter() - self.start
        return {
            "steps": steps,
            "seconds": seconds,
            "rows": self.rows,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens / seconds,
            "peak_memory_bytes": peak_memory(),
        }


class QaloraTrainer(VariableRanks, Trainer):
    """Hugging Face's Trainer with adapters whose ranks change: see the module's docstring for the walk of a batch."""

    model: PeftModel  # type: ignore[assignment]

    def __init__(
        self,
        *,
        validation: Sequence[Row],
        eval_batch_size: int,
        tokenizer: PreTrainedTokenizerBase,
        ladder: Ladder,
        interrupt: InterruptCallback,
        other_validation: bool = False,
        provenance: Provenance | None = None,
        label_smoothing: float = 0.0,
        **kwargs: Any,
    ):
        super().__init__(processing_class=tokenizer, **kwargs)
        self.label_smoothing = label_smoothing  # by our own loss: the Trainer's reads logits
        self.tokenizer, self.validation = tokenizer, validation
        self.eval_batch_size = eval_batch_size
        self.throughput = Throughput()
        self.ladder, self.provenance = ladder, provenance
        self.other_validation = other_validation
        self.shared = SharedStep(interrupt, self.args.seed) if processes.size() > 1 else None
        self._writing_to: Path | None = None
        self.fused_loss = liger_loss() if torch.cuda.is_available() else None
        # The loss is divided by num_items_in_batch here, so the Trainer must not divide it by the micro-batches.
        self.model_accepts_loss_kwargs = True

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        try:
            return super().train(*args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, (InterruptCallback, ProgressLine)):
                    callback.close()

    def get_batch_samples(self, *args: Any) -> tuple[list[Inputs], Tensor | int | None]:
        samples, items = super().get_batch_samples(*args)
        if self.shared is not None:
            self.shared.begin(samples)
        return samples, items

    def training_step(self, model: nn.Module, inputs: Inputs, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """One micro-batch, forward and backward, in pieces where memory has run out (ladder.py). Of several processes
        each computes its share (sharing.py), and the last micro-batch of a step returns the loss of them all.

        Raises:
            AnswerNo: the loss is not finite; names the step and the rows.
        """
        rows = inputs.pop("rows").tolist()
        mask = inputs.get("attention_mask")
        self.throughput.tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        self.throughput.rows += len(rows)
        step, device = super().training_step, self.args.device

        def work(part: Inputs) -> Tensor:
            loss = self.ladder.run(part, lambda piece: step(model, prepared(piece, device), num_items_in_batch))
            self._check_loss(loss, rows)
            return loss

        if self.shared is None:
            return work(inputs)
        self.shared.add(inputs, self.state.global_step, work)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=device)
        return self.shared.end([parameter for parameter in model.parameters() if parameter.requires_grad])

    def _check_loss(self, loss: Tensor, rows: Sequence[int]) -> None:
        """
        Raises:
            AnswerNo: the loss is not finite; names the step and the rows.
        """
        if not torch.isfinite(loss):
            raise AnswerNo(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}, on rows {rows} of data.train; look "
                f"at these rows, lower training.learning_rate (now {self.args.learning_rate:g}) or "
                f"{'lower' if self.args.max_grad_norm else 'set'} training.max_grad_norm; {self._last_checkpoint()}"
            )

    def get_train_dataloader(self) -> Any:
        """Its batches stay on the host, where their values are at hand, until `training_step` takes them away."""
        loader = super().get_train_dataloader()
        loader.device = None
        return loader

    def _get_num_items_in_batch(self, batch_samples: list[Inputs], device: torch.device) -> Tensor | int | None:
        return super()._get_num_items_in_batch(batch_samples, torch.device("cpu"))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """() the micro-batch's share of the mean over all supervised tokens of the optimizer step."""
        summed = summed_loss(self.model, inputs, smoothing=self.label_smoothing, fused=self.fused_loss)
        return summed / cast(Tensor, num_items_in_batch)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Token-weighted loss on the validation rows."""
        losses = item_losses(self.model, self.tokenizer, self.validation, self.eval_batch_size)
        tokens = supervised_tokens(item["labels"] for item in self.validation)
        metrics = {f"{metric_key_prefix}_loss": math.fsum(losses) / tokens}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        best = self.state.best_metric
        if self.args.load_best_model_at_end and (best is None or metrics[f"{metric_key_prefix}_loss"] < best):
            self.control.should_save = True  # the best weights are kept only if a checkpoint holds them
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what is particular to this run: the total rank, and tokens a second."""
        if "loss" in logs:
            logs["total_rank"] = sum(ranks(self.model).values())
            logs["tokens_per_second"] = self.throughput.summary(0)["tokens_per_second"]
        super().log(logs, start_time)

    def _run_epoch(self, *args: object, **kwargs: object) -> None:
        if self.state.global_step < self.state.max_steps:  # a checkpoint of the last step has no step left to make
            super()._run_epoch(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Dataset[Item] | None = None) -> Sampler[int] | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        return GroupedByLength(
            self.args.train_batch_size * self.args.gradient_accumulation_steps,
            dataset=train_dataset or self.train_dataset,
            seed=self.args.seed,
        )

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """Writes a checkpoint, once, of what all processes have alike.

        Raises:
            AnswerNo: a weight is not finite, or another in one process than in the others.
        """
        step = self.state.global_step
        check_replicas(self.model, self.optimizer, f"after step {step}")
        with processes.agreeing():
            if not is_finite(self.model):
                raise AnswerNo(
                    f"a weight of the adapter is not finite after step {step}; lower training.learning_rate (now "
                    f"{self.args.learning_rate:g}) or training.max_grad_norm; {self._last_checkpoint()}"
                )
            if processes.is_first():
                self._write_checkpoint(model, trial)
        self.state.best_model_checkpoint = processes.from_first(lambda: self.state.best_model_checkpoint)

    def _write_checkpoint(self, model: nn.Module, trial: object) -> None:
        """Writes a checkpoint beside its place and moves it there once it is whole and on the disk."""
        with written_beside(self._checkpoint(self.state.global_step)) as partial:
            self._writing_to = partial
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._writing_to = None
            # Hugging Face's wrote into a folder of its own name; the best checkpoint is looked for where they all are.
            written = partial / self._checkpoint(self.state.global_step).name
            for path in written.iterdir():
                path.rename(partial / path.name)
            written.rmdir()
            best = self.state.best_global_step
            self.state.best_model_checkpoint = str(self._checkpoint(best)) if best and self._holds(best) else None
            self.state.save_to_json(str(partial / "trainer_state.json"))
            write_manifest(partial)
        self._rotate()

    def _get_output_dir(self, trial: object) -> str:
        return str(self._writing_to or super()._get_output_dir(trial))

    def _checkpoint(self, step: int) -> Path:
        return Path(str(self.args.output_dir)) / f"{PREFIX}{step}"

    def _holds(self, step: int) -> bool:
        """Whether there is a checkpoint of that step, or will be in a moment."""
        return step == self.state.global_step or self._checkpoint(step).is_dir()

    def _rotate(self) -> None:
        """Removes the oldest checkpoints above `save_total_limit`; the newest and the best one stay."""
        found = checkpoints_in(Path(str(self.args.output_dir)))  # the newest first
        stay = {found[0], self._checkpoint(self.state.best_global_step or -1)} & set(found)
        limit = max(self.args.save_total_limit or len(found), len(stay))
        for path in [path for path in reversed(found) if path not in stay][: max(0, len(found) - limit)]:
            shutil.rmtree(path, ignore_errors=True)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """A checkpoint's adapter, tokenizer and the run's files so far; the Trainer adds optimizer, scheduler, RNG and
        its state."""
        folder = Path(str(output_dir or self.args.output_dir))
        write_adapter(self.model, folder)
        if self.provenance is not None:
            self.provenance.write(folder)
        self.tokenizer.save_pretrained(str(folder))
        for name in RUN_FILES:
            if (file := Path(str(self.args.output_dir)) / name).is_file():
                shutil.copy(file, folder)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> LRScheduler:
        scheduler = super().create_scheduler(*args, **kwargs)
        for group in cast(Any, self.optimizer).param_groups:
            group.setdefault("initial_lr", group["lr"])  # as most schedules leave it; a checkpoint keeps it
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """A checkpoint brings the rate and the decay that it was made with; those of this run's recipe take their
        place."""
        if checkpoint is None:
            return
        optimizer, scheduler = cast(Any, self.optimizer), cast(Any, self.lr_scheduler)
        asked = [{name: group[name] for name in ("initial_lr", "weight_decay")} for group in optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        page_again(optimizer)
        then = optimizer.param_groups[0]["lr"]
        scheduler.base_lrs = [settings["initial_lr"] for settings in asked]
        # A schedule that follows the loss has no curve to be read off: it goes on from the share of the rate that it
        # had come to.
        factors = [factor(scheduler.last_epoch) for factor in getattr(scheduler, "lr_lambdas", ())] or [
            group["lr"] / group["initial_lr"] for group in optimizer.param_groups
        ]
        for group, settings, factor in zip(optimizer.param_groups, asked, factors, strict=True):
            group.update(settings, lr=settings["initial_lr"] * factor)
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # what is logged
        if not math.isclose(then, scheduler._last_lr[0], rel_tol=1e-9, abs_tol=1e-15):
            console.print(
                f"learning rate {scheduler._last_lr[0]:.3g} from here on, by the settings of this command ({then:.3g} "
                "by the checkpoint)",
                highlight=False,
            )

    def _init_training_state(self, max_steps: int, *args: object) -> tuple[int, int]:
        """A checkpoint's state, with the best checkpoint where this folder has it, and this run's own intervals."""
        begun: tuple[int, int] = super()._init_training_state(max_steps, *args)
        state, folder = self.state, Path(str(self.args.output_dir))
        best = state.best_global_step
        if self.other_validation or not best or not belongs(self._checkpoint(best), folder):
            # Of other rows, or of weights that are gone: no loss to compare with.
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        else:
            state.best_model_checkpoint = str(self._checkpoint(best))
        state.compute_steps(self.args, max_steps)
        return begun

    def _load_callback_state(self) -> None:
        """How long nothing got better is the checkpoint's; how long that may last is this run's."""
        patience = {type(cb): cb.early_stopping_patience for cb in self._early_stopping()}
        super()._load_callback_state()
        for callback in self._early_stopping():
            callback.early_stopping_patience = patience[type(callback)]

    def _early_stopping(self) -> list[EarlyStoppingCallback]:
        return [cb for cb in self.callback_handler.callbacks if isinstance(cb, EarlyStoppingCallback)]

    def _load_best_model(self) -> None:
        best = self.state.best_global_step
        if best and best != self.state.global_step:
            restore(self.model, self._checkpoint(best))

    def _last_checkpoint(self) -> str:
        good = last_good(Path(str(self.args.output_dir)))
        return f"the last good checkpoint is {good}" if good else "no good checkpoint had been written yet"


def build_trainer(
    recipe: Recipe,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: Sequence[Row],
    train: Sequence[Item],
    validation: Sequence[Row],
    scoring: Sequence[Row],
    rounds: Schedule,
    total_steps: int,
    compute_dtype: torch.dtype,
    output_dir: Path,
    other_rows: bool = False,
    other_validation: bool = False,
    provenance: Provenance | None = None,
) -> tuple[QaloraTrainer, AllocationCallback, InterruptCallback]:
    """Objects from settings: the trainer, and the callbacks whose state the caller reads afterwards.

    Args:
        rows: tokenized training rows.
        train: the same, or packed sequences of them.
        validation: tokenized rows for the loss during training.
        scoring: B_val, tokenized rows that score the ranks.
        other_rows: than the checkpoint was trained on: the epoch begins anew with them.
        other_validation: rows than those that gave the checkpoint its best loss.
        provenance: written beside the adapter of every checkpoint.
    """
    training, allocation = recipe.training, recipe.allocation
    base = cast(PreTrainedModel, model.get_base_model())
    kept = training.gradient_checkpointing
    set_checkpointing(base, True if kept == "auto" else kept)  # a run has settled it (settling.py)
    set_mlp_tile(base, training.mlp_tile)
    collate = Collator(tokenizer.pad_token_id)
    ladder = Ladder(model, say=processes.tell)
    growth = starting_rows(rows, recipe.lora.init_rows, training.seed) if recipe.lora.init == "gradient" else ()
    allocator = AllocationCallback(
        scoring,
        schedule=rounds,
        prune_per_round=allocation.prune_per_round,
        scoring=allocation.scoring,
        importance=allocation.kind,
        min_rank=allocation.min_rank,
        max_rank=allocation.max_rank,
        budget=allocation.budget,
        growth_rows=growth,
        attempt=ladder.attempt,
    )
    interrupt = InterruptCallback()
    arguments = _arguments(recipe, total_steps, compute_dtype, output_dir, steps_of(recipe, len(train))[1])
    arguments.ignore_data_skip = other_rows
    trainer = QaloraTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=PackingCollator() if recipe.data.packing else collate,
        tokenizer=tokenizer,
        validation=validation,
        eval_batch_size=recipe.evaluation.batch_size,
        ladder=ladder,
        interrupt=interrupt,
        other_validation=other_validation,
        provenance=provenance,
        label_smoothing=training.label_smoothing_factor,
        callbacks=[allocator, LastValidation(), interrupt],
    )
    if training.early_stopping_patience is not None and training.eval_strategy != "no":
        trainer.add_callback(EarlyStoppingCallback(training.early_stopping_patience))
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if processes.is_first() and not recipe.logging.quiet:
        trainer.add_callback(ProgressLine(allocator))
    return trainer, allocator, interrupt


def begin_ranks(
    recipe: Recipe,
    trainer: QaloraTrainer,
    allocator: AllocationCallback,
    rows: Sequence[Row],
    original: Weights | None,
) -> None:
    """Points the ranks of a new adapter as `lora.init` and `allocation.start` say.

    Args:
        rows: tokenized training rows.
        original: the base's 16-bit weights, for lora.init=quantization.
    """
    allocation = recipe.allocation
    shared_out = start(
        trainer.model,
        rows,
        recipe.chosen_init(sixteen_bit=original is not None),
        original=original,
        share=allocation.start,
        max_rows=recipe.lora.init_rows,
        batch_size=recipe.training.micro_batch_size,
        min_rank=allocation.min_rank,
        max_rank=allocation.max_rank,
        budget=allocation.budget,
        seed=recipe.training.seed,
        attempt=trainer.ladder.attempt,
    )
    share_adapter(trainer.model)
    if shared_out is not None:
        allocator.record_start(*shared_out)


def training_items(recipe: Recipe, items: Sequence[Row]) -> Sequence[Row] | Sequence[Packed]:
    """The rows as they are batched: each for itself, or packed."""
    return pack(items, recipe.data.max_seq_len) if recipe.data.packing else items


def steps_of(recipe: Recipe, sequences: int) -> tuple[int, int]:
    """(optimizer steps of the run, optimizer steps an epoch), for that many rows or packed sequences."""
    training = recipe.training
    micro_batches = math.ceil(sequences / training.micro_batch_size)
    per_epoch = math.ceil(micro_batches / training.gradient_accumulation_steps)
    return training.max_steps or math.ceil(training.num_epochs * per_epoch), per_epoch


def schedule_of(recipe: Recipe, total_steps: int, steps_per_epoch: int) -> Schedule:
    """When the rounds of allocation are due.

    Raises:
        InputError: the run is too short for any.
    """
    allocation = recipe.allocation
    rounds = schedule(
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        rounds=allocation.rounds_in(total_steps),
        warmup=allocation.warmup,
        interval=allocation.interval,
    )
    if allocation.rounds and not rounds.steps:
        raise InputError(
            f"allocation.rounds={allocation.rounds}: a run of {total_steps} optimizer steps has no room for a round; "
            "train longer (training.max_steps, training.num_epochs), or set allocation.rounds=0 for plain LoRA."
        )
    return rounds


def check_rates(recipe: Recipe, total_steps: int) -> None:
    """
    Raises:
        InputError: settings that the schedule of the learning rate does not take.
    """
    training = recipe.training
    check_schedule(
        training.lr_scheduler_type,
        training.lr_scheduler_kwargs,
        rate=training.learning_rate,
        warmup=warmup_of(total_steps, ratio=training.warmup_ratio, steps=training.warmup_steps),
        total_steps=total_steps,
    )


def steps_between(strategy: str, steps: int | float, total_steps: int, steps_per_epoch: int) -> int:
    """Optimizer steps from one validation, or one checkpoint, to the next; as many as the run has where only its end is
    left.

    Args:
        strategy: steps, epoch, or another, which has no regular ones.
        steps: a count, or below 1 a share of the run.
    """
    if strategy == "epoch":
        return steps_per_epoch
    if strategy != "steps":
        return total_steps
    return math.ceil(steps * total_steps) if steps < 1 else int(steps)


def _arguments(
    recipe: Recipe, total_steps: int, compute_dtype: torch.dtype, output_dir: Path, steps_per_epoch: int | None = None
) -> TrainingArguments:
    training = recipe.training
    per_epoch = steps_per_epoch or total_steps
    validated, saved = (strategy != "no" for strategy in (training.eval_strategy, training.save_strategy))
    eval_steps = steps_between(training.eval_strategy, training.eval_steps, total_steps, per_epoch)
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        max_steps=total_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        lr_scheduler_kwargs=training.lr_scheduler_kwargs,
        warmup_steps=warmup_of(total_steps, ratio=training.warmup_ratio, steps=training.warmup_steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm or 0.0,
        optim=training.optim,
        neftune_noise_alpha=training.neftune_noise_alpha or None,
        seed=training.seed,
        train_sampling_strategy="group_by_length" if training.group_by_length and not recipe.data.packing else "random",
        eval_strategy="steps" if validated else "no",
        eval_steps=eval_steps,
        save_strategy="steps" if saved else "no",
        save_steps=eval_steps,  # the Trainer asks for a multiple of it; what is meant is set below
        save_total_limit=training.save_total_limit if processes.is_first() else None,
        load_best_model_at_end=validated and saved,
        restore_callback_states_from_checkpoint=True,  # how often early stopping has seen no gain
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=recipe.logging.steps,
        logging_nan_inf_filter=False,
        report_to=(list(training.report_to) if processes.is_first() else []) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device_module() is not None,
        # fp16 needs a GradScaler, which the Trainer brings with fp16; a bf16 or fp32 base computes in its own dtype.
        fp16=compute_dtype == torch.float16,
        use_cpu=best_device().type == "cpu",
    )
    # The best weights are written whenever they are found, so checkpoints need not fall on validations.
    arguments.save_steps = steps_between(training.save_strategy, training.save_steps, total_steps, per_epoch)
    if arguments.device.type == "cuda":
        # One GPU is trained on; where the Trainer sees several, it gives this one all their rows and multiplies the
        # loss.
        arguments._n_gpu = 1
    return arguments
