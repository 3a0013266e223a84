"""What a cut adapter's file holds, whatever the one that came in held."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from qalora.adapter.compression import Size
from qalora.adapter.cutting import cut
from qalora.adapter.model import gated_layers, ranks
from qalora.adapter.principal import into_basis
from qalora.adapter.search import Asked
from qalora.deploy.compressed import Rows, cut_model, round_weights, to_one_rank, write_cut


@pytest.fixture
def model(tiny_adapter):
    return tiny_adapter(r=3, alpha=5, targets=["q_proj", "k_proj", "up_proj"]).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(9)[None]).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_file_is_of_the_dtype_and_the_function_the_rounded_one(model, tiny_llama, tmp_path, dtype):
    into_basis(model, "svd")
    q, k, up = list(ranks(model))[:3]
    cut(model, {q: [0, 1], up: [2]})
    round_weights(model, dtype)
    write_cut(model, tmp_path, dtype, "somebody/base")
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter_model.safetensors").values()} == {dtype}
    assert {layer.A.dtype for layer in gated_layers(model).values()} == {torch.float32}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["q_proj", "up_proj"]  # no k_proj is left
    assert k not in config["exclude_modules"]
    assert config["rank_pattern"] == {q: 2, up: 1}
    assert config["base_model_name_or_path"] == "somebody/base"
    vanilla = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(logits(vanilla), logits(model), rtol=0, atol=1e-4)


def test_one_rank_computes_the_same_and_needs_no_patterns(model, tiny_llama, tmp_path):
    into_basis(model, "svd")
    first, second, *_ = ranks(model)
    cut(model, {first: [0, 1], second: [0]})
    before = logits(model)
    to_one_rank(model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    write_cut(model, tmp_path, torch.float32, None)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (2, 2, {}, {})
    vanilla = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(logits(vanilla), before, rtol=0, atol=1e-4)


def test_what_is_measured_is_what_is_written(model, make_batch):
    """After rounding to 8 bits of mantissa, and not before."""
    rows = Rows([make_batch(rows=4, seed=1)], [make_batch(rows=4, seed=2)])
    report = cut_model(model, Asked(orders=("values",)), rows, dtype=torch.bfloat16)
    batch = rows.judging[0]
    with torch.no_grad():
        found = float(model(**batch).loss)
    assert report["kept"]["loss"] == pytest.approx(found, rel=1e-5)
    assert report["ranks"] == ranks(model)
    assert report["kept"]["share"] == sum(ranks(model).values()) / 18
    for layer in gated_layers(model).values():
        assert torch.equal(layer.A, layer.A.bfloat16().float())


@pytest.mark.parametrize("uniform", [False, True])
def test_ranks_that_training_left_are_measured_as_they_are_written(model, make_batch, uniform):
    """Trained on, and in modules of which one has lost a rank in the basis."""
    next(iter(gated_layers(model).values())).B.data[:, 1] = 0
    rows = Rows([make_batch(rows=4, seed=1)], [make_batch(rows=4, seed=2)])
    asked = Asked(Size(max_rank=2), uniform=uniform, orders=("trained",), refit=True, refit_steps=2)
    report = cut_model(model, asked, rows)
    with torch.no_grad():
        found = float(model(**rows.judging[0]).loss)
    assert (report["basis"], report["order"]) == ("trained", "trained")
    assert report["kept"]["loss"] == pytest.approx(found, rel=1e-5)
    assert set(report["ranks"].values()) == {2}


def test_a_single_row_that_judges_has_no_standard_error_in_the_json(model, make_batch):
    rows = Rows([make_batch(rows=2, seed=1)], [make_batch(rows=1, seed=2)])
    report = cut_model(model, Asked(Size(max_rank=1), refit=True, refit_steps=1), rows)
    assert report["kept"]["stderr"] is report["gain_stderr"] is None
    assert {point["stderr"] for points in report["curves"].values() for point in points} == {0.0, None}
    json.dumps(report, allow_nan=False)


def test_ranks_of_the_trained_basis_are_counted_in_it(model, make_batch):
    """Three equal ranks are one in the principal basis: two ranks in every module are as many as all of that, and still
    a cut of those that training left."""
    for layer in list(gated_layers(model).values())[::2]:
        layer.A.data[:], layer.B.data[:] = layer.A.data[:1].clone(), layer.B.data[:, :1].clone()
    rows = Rows([make_batch(rows=4, seed=1)], [make_batch(rows=4, seed=2)])
    asked = Asked(Size(max_rank=2), orders=("trained",), refit=True, refit_steps=2)
    report = cut_model(model, asked, rows)
    assert report["order"] == "trained" and report["refit"] is not None


def test_the_report_says_what_was_read_and_what_it_decides(model, make_batch):
    rows = Rows([make_batch(rows=3, seed=1)], [make_batch(rows=4, seed=2)], "measure the result")
    report = cut_model(model, Asked(Size(ranks=6)), rows)
    assert report["scored_on"]["rows"] == 3 and report["judged_on"]["rows"] == 4
    assert report["judged_on"]["also"] == "measure the result"
    assert report["lowest"]["loss"] == min(point["loss"] for points in report["curves"].values() for point in points)
    errors = [point["stderr"] for points in report["curves"].values() for point in points if point["stderr"]]
    assert report["judged_on"]["least_stderr"] == min(errors)


def test_modules_that_are_filled_up_count_in_the_curves(model, make_batch):
    rows = Rows([make_batch(rows=3, seed=1)], [make_batch(rows=4, seed=2)])
    report = cut_model(model, Asked(Size(max_rank=1), uniform=True), rows)
    taken = [point for point in report["curves"][report["order"]] if point["ranks"] == report["kept"]["ranks"]]
    assert [point["parameters"] for point in taken] == [report["kept"]["parameters"]]


def test_training_on_is_in_the_report_also_where_nothing_left_that_it_could_make_up_for(model, make_batch):
    rows = Rows([make_batch(rows=2, seed=1)], [make_batch(rows=2, seed=2)])
    report = cut_model(model, Asked(Size(max_rank=3), refit=True), rows)
    assert report["refit"] is None and report["order"] is None
    assert report["kept"]["ranks"] == report["whole"]["ranks"]
