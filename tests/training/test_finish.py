"""The end of a run, from its first step on: what is written, and that it is what the run did."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from qalora.adapter.model import ranks
from qalora.base.loading import load_tokenizer
from qalora.base.registry import resolve, shape_of
from qalora.errors import AnswerNo
from qalora.memory import plan_memory
from qalora.training.begin import begin
from qalora.training.finish import finish, train
from qalora.training.rows import load_data
from qalora.training.run import resolve_run

SETTINGS = {
    "training.max_steps": 4,
    "training.micro_batch_size": 2,
    "training.gradient_accumulation_steps": 1,
    "allocation.rounds": 1,
    "allocation.warmup": 2,
    "allocation.interval": 1,
    "allocation.val_batch_size": 4,
    "quantization.bnb_4bit_compute_dtype": "float32",
    "lora.r": 2,
    "lora.alpha": 4,
    "evaluation.before": False,
}


@pytest.fixture
def session_of(recipe_over, tmp_path):
    """make(**settings) → (its Run, its Session)."""

    def make(**settings):
        recipe = recipe_over(**{**SETTINGS, **settings})
        source = resolve(recipe.model)
        tokenizer = load_tokenizer(source)
        run = resolve_run(recipe, source, tokenizer, load_data(recipe, tokenizer), tmp_path / "run")
        return run, begin(run, print, print)

    return make


def test_what_a_finished_run_leaves(session_of):
    run, session = session_of()
    said: list[str] = []
    assert train(run, session, said.append)
    finish(run, session, said.append, said.append)
    folder = run.output_dir
    for name in (
        "ranks.png",
        "loss.png",
        "report.html",
        "log_history.jsonl",
        "adapter/README.md",
        "adapter/qalora.json",
    ):
        assert (folder / name).is_file(), name
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["train"]["steps"] == 4 and metrics["train"]["rows"] == 8
    assert metrics["allocation"]["rounds"] == 1 and metrics["allocation"]["budget"] == 2 * 14
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    total = sum(tensor.shape[0] for name, tensor in saved.items() if name.endswith("lora_A.weight"))
    assert metrics["allocation"]["total_rank"] == total == sum(ranks(session.model).values())
    assert f"total rank {total} of 28" in said[-1]

    shape = shape_of(run.source)
    assert metrics["plan"]["total"] == plan_memory(
        shape, ranks=session.start, micro_batch_size=2, gradient_accumulation_steps=1, seq_len=run.data.longest,
        load_in_4bit=True, double_quant=True, compute_dtype="float32", optim="adamw_torch",
        gradient_checkpointing=False, mlp_tile=None, dropout=0.0, directions=0, device=metrics["plan"]["device"],
    ).total  # fmt: skip


def test_a_run_that_never_came_to_its_round_is_no_result(session_of):
    run, session = session_of()
    session.trainer.args.max_steps = 1
    with pytest.raises(AnswerNo, match=r"ended after step 1, before its first round of allocation \(step 2\)"):
        train(run, session, print)
