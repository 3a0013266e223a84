"""When something is due in a run; how it is done stands elsewhere (adapter/round.py)."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qalora.adapter.ablation import MicroBatch
from qalora.adapter.allocation import Init, Schedule, Share
from qalora.adapter.gradient_start import start_along_gradient
from qalora.adapter.model import ranks
from qalora.adapter.quantization_start import Weights, start_at_quantization_error
from qalora.adapter.round import RoundSettings, allocation_round, keep_best_corrections
from qalora.adapter.scores import RankScores
from qalora.data.batching import on_device
from qalora.files import write_whole
from qalora.progress import Bar, console
from qalora.training.ladder import Ladder


@dataclass(frozen=True)
class Start:
    """What new adapters are before the first step; ranks that point anywhere need nothing of this.

    Attributes:
        init, share: the recipe's lora.init and allocation.start.
        batch: training rows that decide it.
        original: the base's 16-bit weights, for init=quantization.
    """

    init: Init
    share: Share
    batch: Sequence[MicroBatch] = ()
    original: Weights | None = None


class AllocationCallback(TrainerCallback):
    """Gives new adapters their start, runs a round of Algorithm 1 after each step of the schedule and keeps its
    record in allocation.jsonl.

    It acts in on_step_end: gradients are zeroed by then, and the log line, validation and checkpoint of the same step
    already see the new ranks.
    """

    def __init__(
        self,
        rounds: Schedule,
        settings: RoundSettings,
        batch: Sequence[MicroBatch],
        start: Start,
        ladder: Ladder,
        output_dir: Path,
    ):
        self.rounds, self.settings, self.batch, self.start = rounds, settings, batch, start
        self.ladder = ladder
        self.file = output_dir / "allocation.jsonl"
        self.scores_dir = output_dir / "scores"
        self.history = read_history(self.file)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        # A checkpoint's ranks are those of the rounds up to it; what a later, lost part of the run did never happened.
        self.history = [record for record in self.history if record["step"] <= state.global_step]
        self._write()
        if state.global_step == 0 and self.start.init != "kaiming":
            even = ranks(model)
            self.ladder.attempt(
                on_device(self.start.batch, args.device), lambda batch: self._begin(model, optimizer, batch, even)
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if state.global_step == state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True  # else the last weights could not be the best
        if state.global_step not in self.rounds.steps:
            return
        growth = on_device(self.start.batch if self.start.init == "gradient" else (), args.device)
        spent = sum(earlier["forward_equivalents"] for earlier in self.history)

        def round_of(batch: Sequence[MicroBatch]) -> tuple[dict[str, Any], RankScores]:
            # Nothing changes before the scores are there, so a round that ran out of memory can begin anew.
            return allocation_round(
                model, optimizer, batch, self.settings, state.global_step, spent=spent, growth=growth
            )

        record, scores = self.ladder.attempt(on_device(self.batch, args.device), round_of)
        names = ("method", "loss", "base_loss", "drop", "alone", "importance", "stderr", "exact")
        self._keep(record, {name: getattr(scores, name) for name in names})

    def done(self) -> int:
        """Rounds of Algorithm 1 so far; the sharing out before the first step is none."""
        return sum(record["step"] > 0 for record in self.history)

    def _begin(self, model: Any, optimizer: Any, batch: Sequence[MicroBatch], even: Mapping[str, int]) -> None:
        generator = torch.Generator().manual_seed(self.settings.seed)
        if self.start.original is None:
            start_along_gradient(model, batch, generator=generator)
        elif self.start.share == "scores":
            record, importance = keep_best_corrections(
                model, optimizer, batch, self.start.original, self.settings, even
            )
            self._keep(record, {"method": "midpoint", "importance": importance})
        else:
            start_at_quantization_error(model, batch, self.start.original, generator=generator)

    def _keep(self, record: dict[str, Any], scores: dict[str, Any]) -> None:
        scores_file = self.scores_dir / f"step-{record['step']}.json"
        write_whole(scores_file, json.dumps(scores))
        record = {"step": record.pop("step"), "scores": f"scores/{scores_file.name}", **record}
        self.history.append(record)
        self._write()

    def _write(self) -> None:
        write_whole(self.file, "".join(json.dumps(record) + "\n" for record in self.history))


class InterruptCallback(TrainerCallback):
    """On SIGINT or SIGTERM: the step under way is finished, a checkpoint is written, training ends."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.signal is not None:
            control.should_save = control.should_training_stop = True
            # With a limit of 1 the Trainer ends by removing all checkpoints but the best one.
            args.save_total_limit = None

    def close(self) -> None:
        """Gives the signals back, however the training ended."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.signal is not None:  # the second one means now
            raise KeyboardInterrupt
        self.signal = number
        console.print("interrupted: finishing the step and writing a checkpoint (once more to stop at once)")


class ProgressLine(TrainerCallback):
    """A progress bar, and one line for every log entry, validation and round."""

    def __init__(self, allocator: AllocationCallback):
        self.allocator = allocator
        self.bar: Bar | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for record in self.allocator.history[:1]:
            if record["step"] == state.global_step == 0:
                console.print(
                    f"budget shared out before the first step: {min(record['ranks'].values())} to {max(record['ranks'].values())} ranks a "
                    f"module, total {record['total_rank']} of {record['budget']} ({record['seconds']:.1f} s)",
                )
        self.bar = Bar("training", total=state.max_steps, done=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.reach(state.global_step)
        history = self.allocator.history
        if history and history[-1]["step"] == state.global_step:
            pruned = sum(len(indices) for indices in history[-1]["pruned"].values())
            console.print(
                f"round {self.allocator.done()}/{len(self.allocator.rounds.steps)} after step {state.global_step}: {pruned} ranks pruned, "
                f"{sum(history[-1]['grown'].values())} grown in {len(history[-1]['grown'])} modules, "
                f"total {history[-1]['total_rank']} of {history[-1]['budget']} ({history[-1]['seconds']:.1f} s, "
                f"{history[-1]['forward_equivalents']:.0f} forwards, {'certified' if history[-1]['certified'] else 'estimated'})",
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        step = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
        if "eval_loss" in logs:
            console.print(f"{step}  validation loss {logs['eval_loss']:.4f}")
        elif "loss" in logs:
            console.print(
                f"{step}  loss {logs['loss']:.4f}  grad norm {logs.get('grad_norm', 0.0):.3f}  lr {logs['learning_rate']:.2e}  "
                f"ranks {logs['total_rank']}  {logs['tokens_per_second']:.0f} tokens/s",
            )

    def close(self) -> None:
        """Takes the bar away and shows the cursor again, however the training ended."""
        if self.bar is not None:
            self.bar.close()


def read_history(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
