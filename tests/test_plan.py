"""`qalora plan`: exit codes, numbers in both outputs, and an answer without torch."""

from __future__ import annotations

import json
import math
import re

import pytest

from qalora.base.registry import MODELS, resolve
from qalora.cli import run
from qalora.fitting import HEADROOM
from qalora.memory import plan_memory
from qalora.plan import main
from qalora.recipe import load_recipe, make_recipe, parse_overrides
from qalora.sizes import MLP_TILE
from qalora.training.planning import planner
from qalora.training.settling import as_stored


def planned(capsys, *arguments: str, model: str = "llama-7b") -> dict:
    assert main(["--model", model, "--json", *arguments]) in (0, 1)
    return json.loads(capsys.readouterr().out)


def test_json_is_the_plan_of_the_recipe(capsys):
    answer = planned(capsys, "--recipe", "sst2", "lora.r=16", "--training.micro_batch_size", "4")
    expected = plan_memory(
        MODELS["llama-7b"][1], ranks=16, micro_batch_size=4, seq_len=256, gradient_checkpointing=True
    )
    assert {key: answer[key] for key in ("terms", "total", "gpu_memory", "fits")} == {
        "terms": expected.terms, "total": expected.total, "gpu_memory": None, "fits": True,
    }  # fmt: skip


def test_targets_quantization_and_dtype_reach_the_plan(capsys):
    answer = planned(capsys, "lora.target_modules=[q_proj, v_proj]", "lora.r=2", "--no-quantize", "--dtype", "float32")
    assert answer["terms"]["adapter"] == 4 * 2 * 32 * 2 * 8192
    assert answer["terms"]["weights"] == 4 * 6_476_005_376
    assert "4-bit weights" not in answer["terms"]


def test_the_exit_code_says_whether_it_fits(capsys):
    least = math.ceil(planned(capsys)["total"] / HEADROOM)
    for card, code in ((least, 0), (least - 1, 1)):
        arguments = ["--model", "llama-7b", "--json", "--gpu-memory", str(card)]
        assert main([*arguments, "training.gradient_checkpointing=true"]) == code
        answer = json.loads(capsys.readouterr().out)
        assert (answer["gpu_memory"], answer["fits"]) == (card, code == 0)


def test_the_table_shows_every_term_and_the_verdict(capsys):
    plan = planner(load_recipe("alpaca", [("model", "llama-7b")]), MODELS["llama-7b"][1])()
    arguments = ["--model", "llama-7b", "--recipe", "alpaca", "--gpu-memory", "1GiB"]
    assert main([*arguments, "training.gradient_checkpointing=true"]) == 1
    out = capsys.readouterr().out
    for term, size in {**plan.terms, "total": plan.total}.items():
        assert re.search(rf"{re.escape(term)}\W+{size / 2**20:,.1f}\b", out), term
    assert f"does not fit 1GiB: {plan.total / 2**30:.2f} of 0.92 GiB (8% are left to the allocator)" in out
    assert main(["--model", "llama-7b", "--gpu-memory", "80 GB"]) == 0
    assert re.search(r"^fits 80 GB: \d+\.\d\d of 68\.55 GiB", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "lama-7b"], "error: --model lama-7b: no such file or folder"),
        (["--model", "llama-7b", "--gpu-memory", "big"], "error: --gpu-memory big: give a size such as 24GiB"),
        (["--model", "llama-7b", "--recipe", "alpacca"], "alpaca"),
        (["--model", "llama-7b", "lora.rr=8"], "lora.rr"),
        (["--model", "nobody/nothing"], "error: --model nobody/nothing: no config.json to be had"),
    ],
    ids=["model", "size", "recipe", "key", "hub"],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, message, capsys):
    assert run(main, arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers=0; takes a number of at least 1"),
        ({"head_dim": 0}, "head_dim=0; takes a number of at least 1"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is no multiple of num_key_value_heads=3"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "stored with gptq quantization"),
    ],
    ids=["blocks", "head", "shared-heads", "gptq"],
)
def test_what_cannot_be_trained_is_not_planned(save_tiny_llama, tmp_path, capsys, fields, message):
    save_tiny_llama(tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    assert run(main, ["--model", str(tmp_path / "base"), "--recipe", "alpaca"]) == 2
    assert message in capsys.readouterr().err


def test_a_registered_model_is_planned_by_its_hub_id_without_the_hub(capsys):
    by_name = planned(capsys, model="qwen3-8b")
    assert planned(capsys, model="Qwen/Qwen3-8B") == by_name


def test_where_no_row_fits_it_is_said(capsys):
    assert main(["--model", "llama-7b", "--profile", "t4", "--gpu-memory", "4GiB"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("no row fits, however short (")


def test_rows_are_planned_no_longer_than_the_models_positions(capsys):
    longest = planned(capsys, "data.max_seq_len=2048")
    assert main(["--model", "llama-7b", "--json", "data.max_seq_len=2049"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == longest
    assert captured.err == "data.max_seq_len=2049: llama-7b has 2048 positions; longer rows are cut there\n"


def test_fit_chooses_settings_for_the_card_and_says_the_limits(capsys):
    answer = planned(capsys, "--profile", "24gb", "--gpu-memory", "24GiB", "data.max_seq_len=2048")
    chosen = answer["training"]
    assert chosen["micro_batch_size"] * chosen["gradient_accumulation_steps"] == 16
    assert answer["fits"]
    shape = MODELS["llama-7b"][1]
    settings = dict(chosen)
    assert answer["total"] == plan_memory(shape, seq_len=2048, **settings).total
    rows = answer["largest_micro_batch_size"]
    totals = [plan_memory(shape, seq_len=2048, **{**settings, "micro_batch_size": n}).total for n in (rows, rows + 1)]
    assert totals[0] <= HEADROOM * 24 * 2**30 < totals[1]
    length = answer["longest_context"]
    frugal = {**settings, "micro_batch_size": 1, "gradient_checkpointing": "offload", "mlp_tile": MLP_TILE}
    totals = [plan_memory(shape, seq_len=n, **frugal).total for n in (length, length + 1)]
    assert totals[0] <= HEADROOM * 24 * 2**30 < totals[1]


def test_where_no_setting_fits_the_most_frugal_one_is_planned(capsys):
    arguments = ["--model", "llama-7b", "--profile", "t4", "--gpu-memory", "4GiB", "--json"]
    assert main(arguments) == 1
    answer = json.loads(capsys.readouterr().out)
    assert not answer["fits"]
    settings = {"micro_batch_size": 1, "gradient_checkpointing": "offload", "mlp_tile": MLP_TILE}
    assert {key: answer["training"][key] for key in settings} == settings
    assert answer["longest_context"] == 0


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ([], None),
        (["quantization.bnb_4bit_quant_type=nf4"], "quantization.bnb_4bit_quant_type=nf4 (stored: fp4)"),
        (
            ["quantization.bnb_4bit_use_double_quant=true"],
            "quantization.bnb_4bit_use_double_quant=true (stored: false)",
        ),
        (["quantization.bnb_4bit_quant_type=fp4"], None),
    ],
)
def test_a_base_that_is_stored_in_4_bits_keeps_its_form(save_tiny_llama, tmp_path, asked, said):
    folder = save_tiny_llama(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    stored = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    recipe = make_recipe([("model", str(folder)), ("data.train", "x"), *parse_overrides(asked)], origin="a test")
    recipe, notes = as_stored(recipe, resolve(recipe.model))
    settings = recipe.quantization
    assert (settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant) == ("fp4", False)
    assert notes == [] if said is None else said in notes[0] and str(folder) in notes[0]


def test_it_answers_without_torch(run_python):
    code = (
        "import sys, json; from qalora.plan import main\n"
        "assert main(['--model', 'llama-7b', '--gpu-memory', '1GiB', '--json']) == 1\n"
        "print(json.dumps(sorted({'torch', 'transformers', 'bitsandbytes', 'peft', 'datasets'} & set(sys.modules))))"
    )
    assert run_python(code).splitlines()[-1] == "[]"


def test_gpus_share_the_rows_of_a_step(capsys):
    """16 rows on 4 GPUs are 4 on each, whose plan is that of a micro-batch of 4 and the sum of the gradients."""
    settings = ("training.micro_batch_size=16", "training.gradient_accumulation_steps=1")
    answer = planned(capsys, "--gpus", "4", *settings)
    one = planned(capsys, "training.micro_batch_size=4", "training.gradient_accumulation_steps=1")
    further = {"gradients to sum over processes": one["terms"]["adapter"]}
    assert answer["gpus"] == 4 and answer["terms"] == {**one["terms"], **further}
    assert run(main, ["--model", "llama-7b", "--gpus", "0"]) == 2


@pytest.mark.parametrize("gpus", [1, 2, 3, 8])
def test_a_fit_keeps_the_rows_of_a_step_on_any_number_of_gpus(capsys, gpus):
    settings = ("training.micro_batch_size=4", "training.gradient_accumulation_steps=4", "training.fit=auto")
    chosen = planned(capsys, "--gpus", str(gpus), "--gpu-memory", "80GiB", "data.max_seq_len=64", *settings)["training"]
    assert chosen["micro_batch_size"] * chosen["gradient_accumulation_steps"] == 16
    assert chosen["micro_batch_size"] == {1: 16, 2: 8, 3: 4, 8: 2}[gpus]


@pytest.mark.parametrize(
    ("memory", "checkpointing", "host"),
    [("80GiB", False, 0), ("11GiB", "selective", 0), ("7GiB", True, 0), ("5.5GiB", "offload", 32 * 4 * 512 * 4096 * 2)],
)
def test_a_card_decides_what_a_step_keeps_and_host_memory_is_said(capsys, memory, checkpointing, host):
    arguments = ["--model", "llama-7b", "--json", "--gpu-memory", memory]
    main([*arguments, "data.max_seq_len=512", "training.micro_batch_size=4"])
    answer = json.loads(capsys.readouterr().out)
    assert (answer["training"]["gradient_checkpointing"], answer["host"]) == (checkpointing, host)
    assert answer["training"]["micro_batch_size"] == 4
