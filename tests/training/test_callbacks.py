"""What a run shows, and how it is interrupted."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from qalora.training.callbacks import InterruptCallback, LastValidation, ProgressLine


@pytest.fixture
def arguments(tmp_path):
    def make(**more):
        return TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **more)

    return make


def test_the_last_step_is_validated_where_there_is_validation(arguments):
    for strategy, step, asked in (("steps", 4, True), ("steps", 3, False), ("no", 4, False)):
        control = TrainerControl()
        state = TrainerState(global_step=step, max_steps=4)
        LastValidation().on_step_end(arguments(eval_strategy=strategy, eval_steps=9), state, control)
        assert control.should_evaluate == asked


def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint_and_a_second_one_at_once(arguments, capsys):
    interrupt, control = InterruptCallback(), TrainerControl()
    before, args = signal.getsignal(signal.SIGTERM), arguments(save_total_limit=1)
    interrupt.on_train_begin(args, TrainerState(), control)
    try:
        interrupt.on_step_end(args, TrainerState(), control)
        assert not control.should_training_stop
        os.kill(os.getpid(), signal.SIGTERM)
        interrupt.on_step_end(args, TrainerState(), control)
        assert control.should_save and control.should_training_stop and args.save_total_limit is None
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        interrupt.close()
    assert signal.getsignal(signal.SIGTERM) == before


class Allocator:
    history = [
        {"step": 4, "pruned": {"a": [0, 2]}, "grown": {"b": 2}, "total_rank": 8, "budget": 8, "seconds": 1.5,
         "forward_equivalents": 12.0, "certified": True},
    ]  # fmt: skip
    rounds = type("Rounds", (), {"steps": (4, 8)})()

    def done(self) -> int:
        return 1


def test_a_round_and_a_log_entry_are_a_line_each(arguments, capsys):
    line, state, args = ProgressLine(Allocator()), TrainerState(global_step=4, max_steps=10), arguments()
    line.on_train_begin(args, state, TrainerControl())
    line.on_step_end(args, state, TrainerControl())
    line.on_log(args, state, TrainerControl(), {"loss": 1.25, "grad_norm": 0.5, "learning_rate": 1e-4, "total_rank": 8,
                                                "tokens_per_second": 99.6})  # fmt: skip
    line.on_log(args, state, TrainerControl(), {"eval_loss": 2.0})
    line.close()
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "round 1/2 after step 4: 2 ranks pruned, 2 grown in 1 modules, total 8 of 8 (1.5 s, 12 forwards, certified)",
        "step  4/10  loss 1.2500  grad norm 0.500  lr 1.00e-04  ranks 8  100 tokens/s",
        "step  4/10  validation loss 2.0000",
    ]


def test_a_run_in_a_thread_leaves_the_signals_alone(arguments):
    interrupt, control, errors = InterruptCallback(), TrainerControl(), []

    def begin():
        try:
            interrupt.on_train_begin(arguments(), TrainerState(), control)
            interrupt.on_step_end(arguments(), TrainerState(), control)
            interrupt.close()
        except ValueError as error:
            errors.append(error)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    assert not errors and not control.should_training_stop
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
