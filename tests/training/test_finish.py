"""The end of a run, from its first step on: what is written, and that it is what the run did."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from qalora.adapter.cutting import losses
from qalora.adapter.model import gated_layers, ranks
from qalora.adapter.saved import read_adapter, scaling_of
from qalora.base.loading import load_tokenizer
from qalora.base.registry import resolve, shape_of
from qalora.data.batching import Collator, micro_batches
from qalora.errors import AnswerNo
from qalora.memory import plan_memory
from qalora.training.begin import begin
from qalora.training.checkpoints import best_beside, find_checkpoint
from qalora.training.finish import finish, rows_to_compress_by, train
from qalora.training.resume import Continued
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


def test_compressed_at_the_end(session_of):
    """adapter/ is the small one, its checkpoint the whole, metrics.json has both; continued once finished, the same."""
    run, session = session_of(**{"lora.compress": True, "allocation.rounds": 0, "lora.r": 4})
    assert train(run, session, print)
    before = {name: layer.get_delta_weight("default").clone() for name, layer in gated_layers(session.model).items()}
    said: list[str] = []
    finish(run, session, said.append, said.append)
    metrics = json.loads((run.output_dir / "metrics.json").read_text())
    whole, kept = (metrics["compression"][name] for name in ("whole", "kept"))
    saved = read_adapter(run.output_dir / "adapter")
    assert whole["ranks"] == 4 * len(before)
    assert kept["ranks"] == saved.total_rank == sum(ranks(session.model).values()) < whole["ranks"]
    assert kept["difference"] <= kept["stderr"]
    checkpoint = read_adapter(best_beside(find_checkpoint(run.output_dir, "auto")))
    for name, (A, B) in checkpoint.pairs.items():
        torch.testing.assert_close(B @ A * scaling_of(checkpoint.config, name), before[name])
    assert metrics["after"]["loss"] == pytest.approx(
        sum(losses(session.model, [run_batch(run)]).rows) / metrics["after"]["supervised_tokens"], rel=1e-4
    )
    assert any(str(kept["ranks"]) in line and "ranks" in line for line in said)
    assert {"compress.json", "compression.png"} <= {path.name for path in run.output_dir.iterdir()}
    assert "## Compression" in (run.output_dir / "adapter" / "README.md").read_text()

    written = load_file(run.output_dir / "adapter" / "adapter_model.safetensors")
    continued = Continued.at(find_checkpoint(run.output_dir, "auto"))
    again = resolve_run(run.recipe, run.source, run.tokenizer, run.data, run.output_dir, continued)
    session = begin(again, print, print)
    assert train(again, session, print)
    finish(again, session, print, print)
    found = load_file(run.output_dir / "adapter" / "adapter_model.safetensors")
    assert found.keys() == written.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, written[name])


def run_batch(run):
    (batch,) = micro_batches(run.data.validation.items, 99, Collator(run.tokenizer.pad_token_id))
    return {key: value for key, value in batch.items() if key != "rows"}


def test_rows_that_chose_the_weights_judge_only_where_there_are_no_others(recipe_over, monkeypatch):
    recipe = recipe_over(**SETTINGS)
    data = load_data(recipe, load_tokenizer(resolve(recipe.model)))
    held_back = [*data.validation.items, *data.apart.items]
    scoring, judging, also = rows_to_compress_by(data, True)
    assert sorted(map(id, [*scoring, *judging])) == sorted(map(id, held_back))
    assert also == "chose the weights and measure the result"
    assert rows_to_compress_by(data, False)[2] == "measure the result"
    monkeypatch.setattr("qalora.training.finish.ENOUGH_APART", 8)
    others = data.train.subset(range(8))
    scoring, judging, also = rows_to_compress_by(replace(data, apart=others), True)
    assert {id(item) for item in [*scoring, *judging]} == {id(item) for item in others.items}
    assert not also


def test_rows_apart_are_what_is_held_back_and_not_measured(recipe_over):
    settings = {**SETTINGS, "data.val_set_size": 12, "allocation.val_batch_size": 4, "evaluation.rows": 3}
    recipe = recipe_over(**settings)
    data = load_data(recipe, load_tokenizer(resolve(recipe.model)))
    assert (len(data.validation), len(data.scoring), len(data.apart)) == (3, 4, 9)
    measured = {item["row"] for item in data.validation.items}
    assert {item["row"] for item in data.scoring.items} <= {item["row"] for item in data.apart.items}
    assert not measured & {item["row"] for item in data.apart.items}
