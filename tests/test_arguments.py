"""Values from Python that no parameter takes: one sentence that names it, before anything is computed."""

from __future__ import annotations

import pytest
import torch

import qalora
from qalora.arguments import whole

ROWS = [{"input_ids": [3, 4, 5, 6], "labels": [-100, 4, 5, 6]}] * 4


@pytest.mark.parametrize("value", [0, -1, 2.0, "2", True, None])
def test_whole(value):
    with pytest.raises(qalora.InputError, match=rf"^n={value!r}: takes an integer from 1 on\.$"):
        whole("n", value)
    whole("n", 1)
    whole("n", None, optional=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, save_tiny_llama):
    return save_tiny_llama(tmp_path_factory.mktemp("arguments") / "tiny")


@pytest.mark.parametrize(
    "given",
    [{"dtype": "fp32"}, {"dtype": torch.int8}, {"quant_type": "int8"}, {"device": "cuda"}, {"device": "gpu"}],
    ids=str,
)
def test_load_base(folder, given, monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(qalora.InputError, match=f"^{next(iter(given))}="):
        qalora.load_base(folder, **given)
    assert capfd.readouterr().err == ""


def test_torchs_own_dtypes_and_devices_are_taken(folder):
    base = qalora.load_base(folder, dtype=torch.float32, device=torch.device("cpu"))
    assert base.compute_dtype == torch.float32
    assert qalora.plan_memory(folder, compute_dtype=torch.float16) == qalora.plan_memory(
        folder, compute_dtype="float16"
    )


@pytest.mark.parametrize(
    "given",
    [{"r": 0}, {"r": 4.0}, {"alpha": 0}, {"alpha": float("nan")}, {"dropout": 1.0}, {"dropout": -0.1}],
    ids=str,
)
def test_attach(tiny_llama, given):
    with pytest.raises(qalora.InputError, match=f"^{next(iter(given))}="):
        qalora.attach(tiny_llama(), **{"r": 4, "alpha": 8} | given)


def test_one_block_is_a_number(tiny_llama):
    assert {
        name.split(".")[2] for name in qalora.ranks(qalora.attach(tiny_llama(), r=2, alpha=4, layers_to_transform=1))
    } == {"1"}


def test_what_load_base_gives_is_no_model(folder):
    base = qalora.load_base(folder, dtype="float32")
    for call in (lambda: qalora.attach(base, r=2, alpha=4), lambda: qalora.load_adapter(base, folder)):
        with pytest.raises(qalora.InputError, match=r"a LoadedBase is none; pass load_base\(…\)\.model"):
            call()


@pytest.mark.parametrize(
    "given", [{"init": "pissa"}, {"share": "evenly"}, {"budget": "flops"}, {"max_rows": 0}, {"batch_size": 0}], ids=str
)
def test_start(tiny_llama, given):
    model = qalora.attach(tiny_llama(), r=2, alpha=4)
    with pytest.raises(qalora.InputError, match=f"^{next(iter(given))}="):
        qalora.start(model, ROWS, **{"init": "gradient"} | given)


def test_a_start_is_for_a_new_adapter(tiny_adapter):
    with pytest.raises(qalora.InputError, match="started or trained already"):
        qalora.start(tiny_adapter(), ROWS, "gradient")


@pytest.mark.parametrize(
    "given",
    [
        {"rounds": -1}, {"scoring": "foo"}, {"budget": "foo"}, {"importance": "foo"}, {"importance": "path"},
        {"prune_per_round": 0}, {"max_rank": 0}, {"min_rank": -1}, {"batch_size": 0}, {"warmup": "x"},
        {"interval": -3},
    ],
    ids=str,
)  # fmt: skip
def test_allocation_callback(given):
    with pytest.raises(qalora.InputError, match=f"^{next(iter(given))}="):
        qalora.AllocationCallback(ROWS, **given)


@pytest.mark.parametrize(
    "given", [{"method": "foo"}, {"importance": "foo"}, {"prune": 0}, {"min_rank": -1}, {"batch_size": 0}], ids=str
)
def test_score_ranks(tiny_adapter, given):
    with pytest.raises(qalora.InputError, match=f"^{next(iter(given))}="):
        qalora.score_ranks(tiny_adapter(), ROWS, **given)


@pytest.mark.parametrize(
    "given",
    [
        {"compute_dtype": "auto"}, {"optim": "sgd"}, {"gradient_checkpointing": "all"}, {"device": "tpu"},
        {"seq_len": 0}, {"seq_len": "512"}, {"micro_batch_size": -1}, {"ranks": 0}, {"mlp_tile": 0},
    ],
    ids=str,
)  # fmt: skip
def test_plan_memory(given):
    with pytest.raises(qalora.InputError, match=f"^{next(iter(given))}="):
        qalora.plan_memory("llama-7b", **given)


@pytest.mark.parametrize("given", [{"batch_size": 0}, {"max_new_tokens": 0}, {"limit": 0}, {"limit": -1}], ids=str)
def test_evaluate_and_generate(folder, given):
    base = qalora.load_base(folder, dtype="float32")
    with pytest.raises(qalora.InputError, match=f"^{next(iter(given))}="):
        qalora.evaluate(base.model, base.tokenizer, [{"prompt": "a", "completion": "b"}], **given)
    if "limit" not in given:
        with pytest.raises(qalora.InputError, match=f"^{next(iter(given))}="):
            qalora.generate(base.model, base.tokenizer, "a", **given)


def test_one_stop_text_is_a_text(folder, monkeypatch):
    base, seen = qalora.load_base(folder, dtype="float32"), []
    monkeypatch.setattr("qalora.answers.generate_answers", lambda *a, taught, **k: seen.append(taught) or ["x"])
    qalora.generate(base.model, base.tokenizer, "a", stop="END")
    qalora.generate(base.model, base.tokenizer, "a", stop=["END", "\n"])
    assert seen == [("END",), ("END", "\n")]


@pytest.mark.parametrize(
    "given",
    [
        {"format": "onnx"}, {"base": "float"}, {"dtype": "fp32"}, {"gguf_type": "f16"}, {"max_shard_size": 0},
        {"max_shard_size": "4GB", "format": "gguf"}, {"dtype": "float32", "format": "gguf"},
        {"gguf_type": "q3", "format": "gguf"},
    ],
    ids=str,
)  # fmt: skip
def test_merge(given, tmp_path):
    with pytest.raises(qalora.InputError, match=f"^{next(iter(given))}="):
        qalora.merge("llama-7b", tmp_path, tmp_path / "out", **given)


def test_export_adapter(tmp_path):
    with pytest.raises(qalora.InputError, match="^format='gguf'"):
        qalora.export_adapter("llama-7b", tmp_path, tmp_path / "out", "gguf")


def test_a_recipe_in_python(tmp_path):
    recipe = qalora.load_recipe("alpaca", {"model": "llama-7b", "data.train": "rows.jsonl", "output_dir": "run"})
    assert recipe.with_settings({"lora.r": 4}).lora.r == 4 != recipe.lora.r
    for given, message in [
        ({"lora.rank": 4}, "lora.rank: no such setting"),
        ({"lora": {"r": 4}}, "lora: no such setting"),
    ]:
        with pytest.raises(qalora.InputError, match=message):
            recipe.with_settings(given)
    with pytest.raises(qalora.InputError, match=r"^recipe: .*lora\.r=0"):
        qalora.finetune(recipe.with_settings({"lora.r": 0}))
