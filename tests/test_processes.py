"""Several gloo processes on a CPU are one run: the same losses, ranks and adapter as one process, whatever happens."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qalora import cli
from qalora.finetune import main

STEPS = 40
# Notes the calls and bytes of all sums, and how often adapters were compared.
COUNTED = """
import torch.distributed as dist
from qalora import processes
plain_sum, plain_check = dist.all_reduce, processes.check_same
def counted(tensor, *args, **kwargs):
    print("SUM", tensor.dtype, tensor.numel(), file=sys.stderr)
    return plain_sum(tensor, *args, **kwargs)
def checked(values, what, advice):
    plain_check(values, what, advice)
    print("SAME", what, len(values), file=sys.stderr)
dist.all_reduce, processes.check_same = counted, checked
"""
# Something that befalls a process as step AT begins.
AT = """
from transformers import TrainerCallback
from qalora.training import trainer
class Befalls(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if RANK == {rank} and state.global_step == {step}:
            {what}
plain = trainer.build_trainer
def with_it(*args, **kwargs):
    built = plain(*args, **kwargs)
    built[0].add_callback(Befalls())
    return built
from qalora.training import begin
begin.build_trainer = with_it
"""


@pytest.fixture(scope="module")
def command(save_tiny_llama, tmp_path_factory):
    """to(folder, **settings) → the words of a run of 40 steps with three rounds, in fp32, that writes there."""
    folder = tmp_path_factory.mktemp("processes")
    base = save_tiny_llama(folder / "base", max_position_embeddings=64)
    rng = random.Random(0)
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": f"{i} ", "completion": "".join(rng.choice("abcd") for _ in range(1 + i % 13))}) + "\n"
            for i in range(80)
        )
    )
    own = {
        "data.train": rows, "data.format": "auto", "data.val_set_size": 16, "training.max_steps": STEPS, "training.micro_batch_size": 3,
        "training.gradient_accumulation_steps": 2, "training.eval_steps": 10, "training.save_steps": 10,
        "training.save_total_limit": 10, "allocation.rounds": 3, "allocation.warmup": 5, "allocation.interval": 8,
        "allocation.val_batch_size": 7, "evaluation.before": False, "evaluation.after": False, "logging.steps": 1,
        "quantization.bnb_4bit_compute_dtype": "float32",
    }  # fmt: skip

    def to(output_dir: Path, **settings: object) -> list[str]:
        words = [f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in (own | settings).items()]
        return ["--model", str(base), "--recipe", "alpaca", "--output-dir", str(output_dir), *words]

    return to


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory) -> Path:
    """The folder of the run that one process makes."""
    output_dir = tmp_path_factory.mktemp("alone") / "run"
    assert cli.run(main, command(output_dir)) == 0
    return output_dir


def log_of(output_dir: Path) -> list[dict]:
    entries = [json.loads(line) for line in (output_dir / "log_history.jsonl").read_text().splitlines()]
    return [{key: entry[key] for key in ("step", "loss", "eval_loss", "grad_norm", "total_rank") if key in entry} for entry in entries]


def assert_same_run(found: Path, wanted: Path) -> None:
    """Equal steps and ranks; losses, norms and weights within 1e-5 of one another."""
    for ours, theirs in zip(log_of(found), log_of(wanted), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    rounds = [
        [
            {key: record[key] for key in ("step", "pruned", "grown", "ranks", "forward_equivalents")}
            for record in map(json.loads, (folder / "allocation.jsonl").read_text().splitlines())
        ]
        for folder in (found, wanted)
    ]
    assert rounds[0] == rounds[1] and len(rounds[0]) == 3
    ours, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (found, wanted))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-7)


def test_two_processes_make_the_run_of_one(alone, command, launch, tmp_path):
    """And a step costs one sum, of the adapter's bytes and three numbers."""
    run = launch(2, *command(tmp_path / "run"), code=COUNTED)
    assert run.codes == [0, 0], run.said
    assert_same_run(tmp_path / "run", alone)
    sums = [line.split() for line in run.said[0].splitlines() if line.startswith("SUM")]
    assert len(sums) == STEPS and {dtype for _, dtype, _ in sums} == {"torch.float32"}
    records = [json.loads(line) for line in (alone / "allocation.jsonl").read_text().splitlines()]
    assert int(sums[-1][2]) == records[-1]["parameters"] + 3
    compared = [line for line in run.said[1].splitlines() if line.startswith("SAME after")]
    assert len(compared) == 3 + len(list((tmp_path / "run").glob("checkpoint-*")))
    assert "step 40/40" in run.said[0] and "step 40/40" not in run.said[1]  # one of them speaks
