"""`qalora compress` end to end on adapters that vanilla PEFT made, read back by vanilla PEFT."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import qalora.base.loading
from qalora.adapter.provenance import Provenance
from qalora.base.fingerprint import stored_as
from qalora.base.registry import resolve
from qalora.cli import run
from qalora.compress import main, share
from qalora.errors import InputError
from qalora.results.hub import contents

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(save_tiny_llama, tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [{"prompt": f"{i} + {i % 7} is ", "completion": f"{i + i % 7}."} for i in range(60)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def trained(folder, rows, tmp_path_factory):
    """A plain PEFT LoRA of r = 8: two ranks per module, trained by PEFT and torch alone, and six of noise, mixed so
    that each of the eight has a share of all of them."""
    torch.manual_seed(1)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    settings = dict(target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2, lora_alpha=2, **settings))
    texts = [json.loads(line) for line in rows.read_text().splitlines()]
    ids = [tokenizer(text["prompt"] + text["completion"])["input_ids"] for text in texts]
    width = max(map(len, ids))
    batch = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    labels = torch.where(batch == 0, -100, batch)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(25):
        model(input_ids=batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    path = tmp_path_factory.mktemp("adapter") / "trained"
    model.save_pretrained(str(path))
    tensors = tensors_of(path)
    for key in [key for key in tensors if "lora_A" in key]:
        A, B = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        mixed = torch.linalg.qr(torch.randn(8, 8)).Q
        tensors[key] = (mixed @ torch.cat([A, 0.05 * torch.randn(6, A.shape[1])])).contiguous()
        noisy = torch.cat([B, 0.01 * torch.randn(len(B), 6)], dim=1)
        tensors[key.replace("lora_A", "lora_B")] = (noisy @ mixed.T).contiguous()
    LoraConfig(r=8, lora_alpha=8, base_model_name_or_path="folder-of/the-base", **settings).save_pretrained(str(path))
    save_file(tensors, path / WEIGHTS)
    return path


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures take more time than all else."""
    monkeypatch.setattr("qalora.deploy.compressed.draw_compression", lambda *args: Path(args[-1]).touch())


@pytest.fixture
def compress(folder, trained, rows, tmp_path):
    def call(*flags, adapter=trained, data=rows, output=None):
        output = output or tmp_path / "small"
        words = ["--model", folder, "--adapter", adapter, "--output", output, "--dtype", "float32"]
        words += ["--batch-size", "64", *flags]
        words += ["--data", data] if data else []
        assert main([str(word) for word in words]) == 0
        return output, json.loads((output / "compress.json").read_text())

    return call


def tensors_of(path):
    return load_file(path / WEIGHTS)


def of_A(tensors):
    return [tensor for key, tensor in tensors.items() if "lora_A" in key]


def products(folder, path):
    """Module → s · B A, as vanilla PEFT computes it."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), path)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and len(module.lora_A)
    }


@pytest.mark.usefixtures("undrawn")
def test_a_quarter_is_the_best_quarter_of_the_singular_values(compress, folder, trained):
    """Without rows: against full SVDs of what PEFT adds."""
    output, report = compress("--keep", "25%", "--no-data", data=None)
    whole, small = products(folder, trained), products(folder, output)
    pieces = {name: torch.linalg.svd(update.double(), full_matrices=False) for name, update in whole.items()}
    ordered = sorted(((float(S[k]), name) for name, (_, S, _) in pieces.items() for k in range(8)), reverse=True)
    ranks = {name: sum(other == name for _, other in ordered[:12]) for name in whole}
    assert report["ranks"] == {name: rank for name, rank in ranks.items() if rank}
    assert report["kept"]["ranks"] == 12 == sum(len(t) for key, t in tensors_of(output).items() if "lora_A" in key)
    for name, rank in report["ranks"].items():
        U, S, Vh = pieces[name]
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        torch.testing.assert_close(small[name].double(), best, rtol=0, atol=1e-6)
    assert "loss" not in report["kept"]
    assert report["order"] == "values"


def test_the_smallest_that_costs_nothing(compress, folder, trained, capsys):
    output, report = compress("--no-quantize")
    kept, curve = report["kept"], report["curves"][report["order"]]
    assert kept["difference"] <= 1e-6
    assert 0 < kept["ranks"] <= 12  # no more than were trained
    below = [point for points in report["curves"].values() for point in points if point["ranks"] < kept["ranks"]]
    assert all(point["difference"] > 0 for point in below)
    assert curve[0]["share"] == 1.0
    assert set(report["curves"]) == {"path", "values", "shrunk", "trained"}
    assert {path.name for path in output.iterdir()} == {
        "adapter_config.json", WEIGHTS, "compress.json", "compression.png", "README.md",
    }  # fmt: skip
    assert f"- {kept['ranks']} of 48 ranks" in (output / "README.md").read_text()
    uploaded = contents(output, "me/small").files
    assert {"compress.json", "compression.png"} <= set(uploaded)
    assert str(trained) not in bytes(uploaded["compress.json"]).decode()
    said = capsys.readouterr().out
    assert f"{kept['ranks']} of 48 ranks" in said
    assert report["verified"]["relative_difference"] < 1e-5
    looser = compress("--no-quantize", "--tolerance", "0.5")[1]
    assert looser["kept"]["parameters"] < kept["parameters"]


@pytest.mark.usefixtures("undrawn")
def test_its_losses_are_those_of_vanilla_peft_on_the_same_rows(compress, folder, rows, trained):
    output, report = compress("--keep", "50%", "--no-quantize", "--rows", "20")
    assert report["kept"]["ranks"] == 24
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    from qalora.adapter.compression import scoring_rows
    from qalora.data.tokenization import load_dataset

    items = load_dataset(str(rows), tokenizer, limit=20).items
    _, judging = scoring_rows([sum(label != -100 for label in item["labels"]) for item in items])
    assert report["judged_on"]["rows"] == len(judging) == 10

    def each(path):
        base = AutoModelForCausalLM.from_pretrained(folder)
        model = PeftModel.from_pretrained(base, path) if path else base
        losses, tokens = [], []
        for item in (items[i] for i in judging):
            ids, labels = torch.tensor([item["input_ids"]]), torch.tensor(item["labels"])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0]
            losses.append(float(F.cross_entropy(logits[:-1], labels[1:], reduction="sum")))
            tokens.append(int((labels[1:] != -100).sum()))
        return np.array(losses), np.array(tokens)

    (small, tokens), (whole, _), (base, _) = each(output), each(trained), each(None)
    assert report["kept"]["loss"] == pytest.approx(small.sum() / tokens.sum(), rel=1e-5)
    assert report["whole"]["loss"] == pytest.approx(whole.sum() / tokens.sum(), rel=1e-5)
    assert report["base_loss"] == pytest.approx(base.sum() / tokens.sum(), rel=1e-5)
    assert report["kept"]["difference"] == pytest.approx((small - whole).sum() / tokens.sum(), abs=1e-6)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("flags", "check"),
    [
        (("--parameters", "2000"), lambda tensors: 0 < sum(t.numel() for t in tensors.values()) <= 2000),
        (("--max-rank", "2"), lambda tensors: max(map(len, of_A(tensors))) == 2),
        (("--keep", "0.125", "--basis", "svd-act"), lambda tensors: sum(map(len, of_A(tensors))) == 6),
    ],
)  # fmt: skip
def test_sizes(compress, flags, check):
    output, _ = compress(*flags, "--rows", "12")
    assert check(tensors_of(output))


@pytest.mark.usefixtures("undrawn")
def test_one_rank_for_servers_that_know_one(compress, folder, trained):
    output, report = compress("--uniform", "--keep", "40%", "--rows", "12")
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (3, 3, {})  # 3 of 8 is 37.5 %
    assert {len(t) for key, t in tensors_of(output).items() if "lora_A" in key} == {3}
    assert report["kept"]["ranks"] == 18
    assert {int(torch.linalg.matrix_rank(small.double(), tol=1e-6)) for small in products(folder, output).values()} == {
        3
    }
    assert compress("--uniform", "--rows", "12", "--overwrite")[1]["kept"]["ranks"] % 6 == 0


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "kind", ["rank patterns and rslora", "r 64", "fp16", "zero B", "a regular expression", "excluded"]
)
def test_adapters_of_any_origin(compress, folder, tmp_path, kind):
    torch.manual_seed(2)
    settings = {
        "rank patterns and rslora": dict(r=3, lora_alpha=5, use_rslora=True, rank_pattern={"0.self_attn.q_proj": 5}),
        "r 64": dict(r=64, lora_alpha=16),
        "fp16": dict(r=4, lora_alpha=8, layers_to_transform=[1], exclude_modules=["layers.1.self_attn.k_proj"]),
        "zero B": dict(r=4, lora_alpha=8),
        "a regular expression": dict(r=4, lora_alpha=7),
        "excluded": dict(r=4, lora_alpha=8, exclude_modules=["lm_head"]),
    }[kind]
    patterns = {"a regular expression": r".*\.1\..*(q|k)_proj", "excluded": r".*(q_proj|lm_head)"}
    targets = patterns.get(kind, ["q_proj", "k_proj"])
    config = LoraConfig(target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    if kind == "zero B":
        model.get_submodule("base_model.model.model.layers.1.self_attn.k_proj").lora_B.default.weight.data.zero_()
    model.save_pretrained(str(tmp_path / "given"))
    if kind == "fp16":
        halves = {key: tensor.half() for key, tensor in tensors_of(tmp_path / "given").items()}
        save_file(halves, tmp_path / "given" / WEIGHTS)
    output, report = compress("--keep", "100%", "--rows", "8", adapter=tmp_path / "given", output=tmp_path / "all")
    before, after = products(folder, tmp_path / "given"), products(folder, output)
    assert set(after) == {name for name, update in before.items() if update.any()}
    close = 2e-3 if kind == "fp16" else 1e-5
    for name, update in after.items():
        torch.testing.assert_close(update, before[name], rtol=0, atol=close * float(before[name].abs().max()))
    assert {t.dtype for t in tensors_of(output).values()} == {torch.float16 if kind == "fp16" else torch.float32}
    assert abs(report["kept"]["difference"]) < 1e-3
    for points in report["curves"].values():
        assert len({each["ranks"] for each in points}) == len(points)
    if kind == "r 64":  # of k's 32 outputs no more than 32 ranks say anything
        assert report["kept"]["ranks"] == 2 * 64 + 2 * 32


@pytest.mark.usefixtures("undrawn")
def test_an_adapter_that_hurts_is_said_to(compress, trained, tmp_path, capsys):
    harmful = {key: -t if "lora_B" in key else t for key, t in tensors_of(trained).items()}
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "adapter_config.json").write_bytes((trained / "adapter_config.json").read_bytes())
    save_file(harmful, bad / WEIGHTS)
    _, report = compress(adapter=bad)
    assert report["whole_hurts"]
    assert report["whole"]["loss"] > report["base_loss"]
    assert "the whole adapter hurts on these rows" in capsys.readouterr().out


@pytest.mark.usefixtures("undrawn")
def test_what_stays_is_trained_on_where_that_helps(compress):
    _, plain = compress("--keep", "10%", "--no-quantize")
    _, report = compress("--keep", "10%", "--no-quantize", "--refit")
    _, fewer = compress("--keep", "10%", "--no-quantize", "--refit-steps", "3")
    assert "refit" not in plain
    for found in (report, fewer):
        refit = found["refit"]
        assert refit["loss_before"] == pytest.approx(plain["kept"]["loss"], rel=1e-5)
        assert refit["helped"] and refit["loss_after"] < refit["loss_before"]
        assert found["kept"]["loss"] == pytest.approx(refit["loss_after"], rel=1e-5)
        assert found["ranks"] == plain["ranks"]
    assert fewer["refit"]["loss_after"] != report["refit"]["loss_after"]


def test_shares():
    assert [share(text) for text in ("25%", "25 %", "0.25", "1.0", "100%", ".5")] == [0.25, 0.25, 0.25, 1, 1, 0.5]
    for text in ("25", "0", "-1", "120%", "nan", "half", ""):
        with pytest.raises(InputError, match=re.escape(f"keep {text}: takes a share")):
            share(text)
    with pytest.raises(InputError, match="keep 1: is that 1 per cent, or all"):
        share("1")


def test_bad_input_is_named_before_weights_load(compress, folder, trained, rows, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(qalora.base.loading, "load_base", never)
    cases = {
        ("--keep", "25%", "--max-rank", "2"): "--keep and --max-rank: both say a size",
        ("--keep", "25%", "--tolerance", "0.1"): "--tolerance: of the smallest size",
        ("--tolerance", "-1"): "--tolerance -1.0",
        ("--parameters", "5"): "leaves none of the adapter's 48 ranks, of which the smallest has 96",
        ("--keep", "1%"): "--keep 1%: leaves none",
        ("--uniform", "--keep", "5%"): "a rank in each of 6 modules",
        ("--rows", "1"): "at least 2",
        ("--max-rank", "0"): "--max-rank 0",
        ("--no-data",): "--data: goes with rows|--no-data: no row says",
    }
    for flags, message in cases.items():
        with pytest.raises(InputError) as error:
            compress(*flags)
        assert re.search(message, error.value.as_typed), error.value.as_typed
    with pytest.raises(InputError, match="data is missing"):
        compress("--keep", "25%", data=None)
    for flags in (
        ["--refit"], ["--rows", "7"], ["--split", "test"], ["--data-format", "alpaca"], ["--max-seq-len", "64"],
        ["data.max_seq_len=64"],
    ):  # fmt: skip
        with pytest.raises(InputError, match="no_data reads none") as error:
            compress("--no-data", *flags, "--keep", "25%", data=None)
        assert error.value.as_typed.startswith(flags[0])
    with pytest.raises(InputError, match="holds .*trained, which the compression reads"):
        compress(output=trained)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="not a compression of"):
        compress(output=tmp_path / "mine")
    one = tmp_path / "one.jsonl"
    one.write_text(rows.read_text().splitlines()[0] + "\n")
    with pytest.raises(InputError, match="1 row is left"):
        compress(data=one)
    for flag in ("use_dora", "modules_to_save", "lora_bias"):
        odd = tmp_path / flag
        odd.mkdir()
        fields = json.loads((trained / "adapter_config.json").read_text())
        (odd / "adapter_config.json").write_text(json.dumps({**fields, flag: ["lm_head"] if "save" in flag else True}))
        (odd / WEIGHTS).write_bytes((trained / WEIGHTS).read_bytes())
        with pytest.raises(InputError, match=f"{flag} is set"):
            compress(adapter=odd)
    zero = tmp_path / "zero"
    zero.mkdir()
    (zero / "adapter_config.json").write_bytes((trained / "adapter_config.json").read_bytes())
    save_file({key: t * ("lora_B" not in key) for key, t in tensors_of(trained).items()}, zero / WEIGHTS)
    with pytest.raises(InputError, match="untrained"):
        compress(adapter=zero)
    other = tmp_path / "other"
    other.mkdir()
    for file in ("adapter_config.json", WEIGHTS):
        (other / file).write_bytes((trained / file).read_bytes())
    Provenance("mine", "nf4", True, "float32", base="0" * 64, stored_as=stored_as(resolve(str(folder)))).write(other)
    with pytest.raises(InputError, match="has other weights"):
        compress(adapter=other)
    assert not (tmp_path / "small").exists()


@pytest.mark.usefixtures("undrawn")
def test_interrupted_it_leaves_nothing(compress, tmp_path, monkeypatch, folder, trained, rows):
    """And what it had written before stays."""
    output, first = compress("--keep", "50%", "--rows", "8")
    before = {path.name: path.read_bytes() for path in output.iterdir()}

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("qalora.deploy.compressed.compare_with_peft", interrupted)
    words = ["--model", folder, "--adapter", trained, "--data", rows, "--output", output, "--rows", "8"]
    assert run(main, [*map(str, words), "--keep", "25%", "--dtype", "float32"]) == 130
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".") and path.is_dir()] == []
    assert math.isfinite(first["seconds"])
