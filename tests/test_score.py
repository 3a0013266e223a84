from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import qalora.base.loading
from qalora.data.tokenization import load_dataset
from qalora.errors import InputError
from qalora.score import main

FIELDS = {
    "method", "basis", "rows", "supervised_tokens", "loss", "base_loss", "seconds", "forward_equivalents", "certified",
    "exact_evaluations", "prune", "pruned", "scores",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(save_tiny_llama, tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture
def adapter(folder, tmp_path):
    """A plain PEFT LoRA, with a rank of its own for one module."""
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        LoraConfig(
            r=2,
            lora_alpha=2,
            rank_pattern={"model.layers.0.mlp.up_proj": 3},
            target_modules=["q_proj", "up_proj"],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        ),
    )
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"{i} and {i + 1} is ", "completion": f"{2 * i + 1}, of course"} for i in range(6)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture
def score(folder, adapter, rows, tmp_path):
    def run(*flags, **replaced):
        options = {"model": folder, "adapter": adapter, "data": rows, "output": tmp_path / "scores.json", **replaced}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        assert main([*words, "--dtype", "float32", *flags]) == 0
        return json.loads((tmp_path / "scores.json").read_text())

    return run


@pytest.mark.parametrize("method", ["exact", "first-order", "certified", "path"])
def test_every_rank_is_scored(score, method):
    result = score("--method", method, "--prune", "3", "--rows", "5", "--batch-size", "2")
    assert result.keys() >= FIELDS
    assert (result["method"], result["rows"], result["prune"], len(result["pruned"])) == (method, 5, 3, 3)
    names = [(entry["module"], entry["rank"]) for entry in result["scores"]]
    assert len(set(names)) == len(names) == 2 + 3 + 2 + 2
    assert ("model.layers.0.mlp.up_proj", 2) in names
    lowest = sorted(result["scores"], key=lambda entry: entry["importance"])[:3]
    assert sorted(map(tuple, result["pruned"])) == sorted((entry["module"], entry["rank"]) for entry in lowest)
    assert sum(entry["exact"] for entry in result["scores"]) == result["exact_evaluations"]
    assert all((entry["stderr"] is None) == (method == "exact") for entry in result["scores"])
    assert result["certified"] == (method in ("exact", "certified"))  # 9 ranks: the sample of 24 is all of them
    assert (result["residual"] is not None) == (method == "certified")
    if method == "path":
        assert result["quadrature_error"] <= 0.01
    else:
        assert all(entry["importance"] == entry["drop"] + entry["alone"] for entry in result["scores"])


def test_what_decides_can_be_chosen(score):
    result = score("--method", "first-order", "--importance", "alone")
    assert all(entry["importance"] == entry["alone"] for entry in result["scores"])
    assert result["prune"] == len(result["pruned"]) == 4  # one a module


def test_drop_and_alone_are_those_of_files_without_the_rank_and_with_it_alone(score, folder, adapter, rows):
    """The rank deleted from the saved file by hand, no gates anywhere; a 16-bit base, which PEFT alone can load."""
    from qalora.adapter.model import load_adapter
    from qalora.data.batching import Collator

    result = score("--method", "exact", "--no-quantize")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    batch = Collator(tokenizer.pad_token_id)(load_dataset(str(rows), tokenizer).items)
    batch.pop("rows")

    def loss():
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            return float(load_adapter(model, adapter)(**batch).loss)

    assert loss() == pytest.approx(result["loss"], abs=1e-6)
    bare = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert float(bare(**batch).loss) == pytest.approx(result["base_loss"], abs=1e-6)
    tensors = load_file(adapter / "adapter_model.safetensors")
    saved = {key: value.clone() for key, value in tensors.items()}
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"][1] = 0
    save_file(tensors, adapter / "adapter_model.safetensors")
    entry = next(e for e in result["scores"] if (e["module"], e["rank"]) == ("model.layers.1.self_attn.q_proj", 1))
    assert loss() - result["loss"] == pytest.approx(entry["drop"], abs=1e-6)
    kept = saved["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"].clone()
    kept[:, 0] = 0
    alone = {key: torch.zeros_like(value) if "lora_B" in key else value for key, value in saved.items()}
    alone["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"] = kept
    save_file(alone, adapter / "adapter_model.safetensors")
    assert result["base_loss"] - loss() == pytest.approx(entry["alone"], abs=1e-6)


def test_bad_input_is_named_before_weights_load(score, folder, adapter, rows, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(qalora.base.loading, "load_base", never)
    with pytest.raises(InputError, match="at least 1"):
        score("--rows", "0")
    with pytest.raises(InputError, match=r"importance drop: method path has a measure of its own"):
        score("--method", "path", "--importance", "drop")
    ranks = sum(len(t) for key, t in load_file(adapter / "adapter_model.safetensors").items() if "lora_A" in key)
    with pytest.raises(InputError, match=rf"prune {ranks}: the adapter has {ranks} ranks"):
        score("--prune", str(ranks))
    with pytest.raises(InputError, match=r"not an adapter"):
        score(adapter=tmp_path)
    unsupervised = tmp_path / "long.jsonl"
    unsupervised.write_text(json.dumps({"prompt": "word " * 50, "completion": "x"}) + "\n")
    with pytest.raises(InputError, match="max_seq_len"):
        score("--max-seq-len", "16", data=unsupervised)
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = next(iter(tensors))
    tensors[key][0, 0] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match="not finite"):
        score()
    assert not (tmp_path / "scores.json").exists()


def test_an_adapter_of_another_model_is_refused(score, adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    moved = {key.replace("layers.1", "layers.7"): tensor for key, tensor in tensors.items()}
    save_file(moved, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"layers\.7.*another model"):
        score()


def test_a_recipe_reads_the_rows(score, rows, tmp_path):
    """Its columns, templates and labels, as in a run whose recipe.yaml it is; the same rows give the same scores."""
    plain = score("--method", "first-order")
    other = tmp_path / "other.jsonl"
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    other.write_text("".join(json.dumps({"q": line["prompt"], "a": line["completion"]}) + "\n" for line in lines))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data: {train: x, format: prompt-completion, prompt_template: '{question}', completion_template: '{a}', "
        "columns: {q: question}}"
    )
    found = score("--method", "first-order", "--recipe", str(recipe), data=other)
    assert found["scores"] == plain["scores"]
    assert (
        score("--method", "first-order", "data.columns={q: prompt, a: completion}", data=other)["scores"]
        == plain["scores"]
    )
    with pytest.raises(InputError, match="prompt"):
        score("--method", "first-order", data=other)


@pytest.fixture
def turned_by_hand(folder, adapter, rows, tmp_path):
    """A basis → the folder of the same adapter, with factors from the decompositions of full matrices."""
    ending = ".lora_A.weight"

    def outputs():
        """Module → (tokens, out) of what its adapter adds to the rows, one at a time, in vanilla PEFT."""
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter)
        seen: dict[str, list[torch.Tensor]] = {}
        for name, module in model.named_modules():
            if hasattr(module, "lora_A"):
                module.register_forward_pre_hook(
                    lambda module, args, name=name: seen.setdefault(name, []).append(
                        args[0][0] @ (module.lora_B["default"].weight @ module.lora_A["default"].weight).T
                    )
                )
        with torch.no_grad():
            for item in load_dataset(str(rows), tokenizer).items:
                model(input_ids=torch.tensor([item["input_ids"]]))
        return {name: torch.cat(of) for name, of in seen.items()}

    def turned(basis):
        tensors = load_file(adapter / "adapter_model.safetensors")
        found = outputs() if basis == "svd-act" else {}
        for name in [key.removesuffix(ending) for key in tensors if key.endswith(ending)]:
            A, B = tensors[f"{name}.lora_A.weight"].double(), tensors[f"{name}.lora_B.weight"].double()
            U = torch.linalg.svd(found[name].double().T if found else B @ A)[0][:, : len(A)]
            length = (U.T @ B @ A).norm(dim=1).sqrt()
            tensors[f"{name}.lora_A.weight"] = (U.T @ B @ A / length[:, None]).float()
            tensors[f"{name}.lora_B.weight"] = (U * length).float().contiguous()
        (tmp_path / basis).mkdir()
        save_file(tensors, tmp_path / basis / "adapter_model.safetensors")
        shutil.copy(adapter / "adapter_config.json", tmp_path / basis)
        return tmp_path / basis

    return turned


@pytest.mark.parametrize(("basis", "methods"), [("svd", ("certified", "path")), ("svd-act", ("exact",))])
def test_ranks_of_a_principal_basis_are_scored(score, turned_by_hand, basis, methods):
    by_hand = turned_by_hand(basis)
    common = ("--no-quantize", "--batch-size", "1")
    for method in methods:
        result = score("--basis", basis, "--method", method, *common)
        expected = score("--method", method, *common, adapter=by_hand)
        assert (result["basis"], expected["basis"]) == (basis, "trained")
        assert result["certified"] == (method != "path")
        assert result["loss"] == pytest.approx(expected["loss"], abs=1e-6)
        for entry, other in zip(result["scores"], expected["scores"], strict=True):
            assert (entry["module"], entry["rank"]) == (other["module"], other["rank"])
            for field in ("drop", "alone", "importance", "stderr"):
                wanted = other[field] if other[field] is None else pytest.approx(other[field], abs=2e-6)
                assert entry[field] == wanted, (method, entry)


def test_a_rank_without_energy_is_none_of_a_principal_basis(score, adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj"
    tensors[f"{name}.lora_A.weight"][1] = 2 * tensors[f"{name}.lora_A.weight"][0]
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"].zero_()
    save_file(tensors, adapter / "adapter_model.safetensors")
    result = score("--basis", "svd", "--method", "first-order", "--prune", "5")
    kept = [(entry["module"].removeprefix("model.layers."), entry["rank"]) for entry in result["scores"]]
    assert sorted(kept) == [
        ("0.mlp.up_proj", 0), ("0.mlp.up_proj", 1), ("0.mlp.up_proj", 2), ("0.self_attn.q_proj", 0),
        ("0.self_attn.q_proj", 1), ("1.self_attn.q_proj", 0),
    ]  # fmt: skip
    with pytest.raises(InputError, match="prune 6: the adapter has 6 ranks in the basis svd; name fewer"):
        score("--basis", "svd", "--method", "first-order", "--prune", "6")
