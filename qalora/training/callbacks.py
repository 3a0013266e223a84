"""What a run shows while it goes on, and how it is interrupted."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qalora.adapter.callback import AllocationCallback
from qalora.progress import Bar, console


class LastValidation(TrainerCallback):
    """Validates after the last step, else the last weights could not be the best."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step == state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True


class InterruptCallback(TrainerCallback):
    """On SIGINT or SIGTERM: the step under way is finished, a checkpoint is written, training ends."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if threading.current_thread() is not threading.main_thread():  # Python hands signals to the main one alone
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.signal is not None:
            control.should_save = control.should_training_stop = True
            # With a limit of 1 the Trainer ends by removing all checkpoints but the best one.
            args.save_total_limit = None

    def close(self) -> None:
        """Gives the signals back, however the training ended."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
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
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        for record in self.allocator.history[:1]:
            if record["step"] == state.global_step == 0:
                console.print(
                    f"budget shared out before the first step: {min(record['ranks'].values())} to "
                    f"{max(record['ranks'].values())} ranks a module, total {record['total_rank']} of "
                    f"{record['budget']} ({record['seconds']:.1f} s)",
                )
        self.bar = Bar("training", total=state.max_steps, done=state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.bar is not None:
            self.bar.reach(state.global_step)
        history = self.allocator.history
        if history and history[-1]["step"] == state.global_step:
            pruned = sum(len(indices) for indices in history[-1]["pruned"].values())
            console.print(
                f"round {self.allocator.done()}/{len(self.allocator.rounds.steps)} after step {state.global_step}: "
                f"{pruned} ranks pruned, {sum(history[-1]['grown'].values())} grown in {len(history[-1]['grown'])} "
                f"modules, total {history[-1]['total_rank']} of {history[-1]['budget']} ({history[-1]['seconds']:.1f} "
                f"s, {history[-1]['forward_equivalents']:.0f} forwards, "
                f"{'certified' if history[-1]['certified'] else 'estimated'})",
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        logs = logs or {}
        step = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
        if "eval_loss" in logs:
            console.print(f"{step}  validation loss {logs['eval_loss']:.4f}")
        elif "loss" in logs:
            console.print(
                f"{step}  loss {logs['loss']:.4f}  grad norm {logs.get('grad_norm', 0.0):.3f}  lr "
                f"{logs['learning_rate']:.2e}  ranks {logs['total_rank']}  {logs['tokens_per_second']:.0f} tokens/s",
            )

    def close(self) -> None:
        """Takes the bar away and shows the cursor again, however the training ended."""
        if self.bar is not None:
            self.bar.close()
