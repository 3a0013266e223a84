"""Vision models whose text part is trained: tiny random ones as vanilla transformers saves them, read again by vanilla
transformers and PEFT."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, BitsAndBytesConfig

from qalora.adapter.model import load_adapter
from qalora.adapter.saved import read_adapter
from qalora.base.loading import load_base
from qalora.base.registry import resolve, shape_of
from qalora.cli import run
from qalora.finetune import main
from qalora.merge import main as merge

TEXT = dict(
    vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, initializer_range=0.1,
    pad_token_id=0, bos_token_id=None, eos_token_id=1, max_position_embeddings=512,
)  # fmt: skip
LOCAL = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
DELTA_NET = dict(
    model_type="qwen3_5_text", layer_types=["linear_attention", "full_attention"],
    linear_key_head_dim=16, linear_value_head_dim=16,
)  # fmt: skip
QWEN_VISION = dict(
    depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64, num_position_embeddings=16
)
TINY = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2)
PIXTRAL = dict(model_type="pixtral", num_hidden_layers=1, head_dim=16, image_size=28, patch_size=14, **TINY)
# kind → (model_type, fields of the text part, of the vision, of the whole)
KINDS = {
    "qwen3_5": (
        "qwen3_5",
        dict(DELTA_NET, linear_num_key_heads=2, linear_num_value_heads=4),
        QWEN_VISION,
        dict(tie_word_embeddings=False),
    ),
    "qwen3_5 tied": (
        "qwen3_5",
        dict(DELTA_NET, linear_num_key_heads=4, linear_num_value_heads=4),
        QWEN_VISION,
        dict(tie_word_embeddings=True),
    ),
    "gemma3": (
        "gemma3",
        dict(model_type="gemma3_text", **LOCAL),
        dict(model_type="siglip_vision_model", num_hidden_layers=1, image_size=28, patch_size=14, **TINY),
        {},
    ),
    "gemma4": (
        "gemma4",
        dict(
            model_type="gemma4_text", hidden_size_per_layer_input=64, vocab_size_per_layer_input=300,
            num_kv_shared_layers=2, global_head_dim=32, final_logit_softcapping=30.0,
            num_hidden_layers=4, sliding_window=8,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
        dict(num_hidden_layers=1, num_key_value_heads=2, head_dim=16, position_embedding_size=16, **TINY),
        {},
    ),
    "mistral3": ("mistral3", dict(model_type="mistral"), PIXTRAL, dict(tie_word_embeddings=False)),
    "mistral3 of ministral3": ("mistral3", dict(model_type="ministral3"), PIXTRAL, {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory, save_tiny_llama):
    """save(kind) → the folder of such a model, with a tokenizer and what a processor reads."""
    made: dict[str, Path] = {}

    def save(kind: str) -> Path:
        if kind not in made:
            folder = save_tiny_llama(tmp_path_factory.mktemp("wrapper"))
            (folder / "model.safetensors").unlink()
            model_type, text, vision, whole = KINDS[kind]
            torch.manual_seed(0)
            config = AutoConfig.for_model(model_type, text_config=TEXT | text, vision_config=vision, **whole)
            model = AutoModelForImageTextToText.from_config(config)
            for parameter in model.parameters():  # norms that are all ones would hide one that is not read
                if parameter.ndim == 1:
                    parameter.data += 0.1 * torch.randn_like(parameter)
            model.save_pretrained(folder)
            (folder / "preprocessor_config.json").write_text('{"image_processor_type": "SomeImageProcessor"}')
            (folder / "processor_config.json").write_text('{"processor_class": "SomeProcessor"}')
            made[kind] = folder
        return made[kind]

    return save


@pytest.fixture(params=KINDS)
def folder(request, wrapper):
    return wrapper(request.param)


@pytest.fixture(scope="module")
def train(tmp_path_factory, undrawn):
    """train(model, *more) → the folder of an adapter after a few steps in 4 bits, with a round of allocation."""

    def make(model: Path, *more: str) -> Path:
        folder = tmp_path_factory.mktemp("run")
        rows, recipe = folder / "rows.jsonl", folder / "recipe.yaml"
        rows.write_text("\n".join(json.dumps({"prompt": f"{i}+{i}=", "completion": f"{2 * i}"}) for i in range(12)))
        recipe.write_text("training: {micro_batch_size: 4, gradient_accumulation_steps: 1}\n")
        settings = {
            "data.train": rows, "data.val_set_size": 4, "lora.r": 2, "lora.alpha": 4, "training.max_steps": 4,
            "training.learning_rate": 2e-2, "evaluation.before": "false", "allocation.rounds": 1,
            "allocation.warmup": 2, "allocation.interval": 1, "allocation.val_batch_size": 4, "logging.quiet": "true",
        }  # fmt: skip
        given = [word for word in more if "=" in word]
        settings |= dict(word.split("=", 1) for word in given)
        arguments = ["--model", str(model), "--recipe", str(recipe), "--dtype", "float32"]
        flags = [word for word in more if word not in given]
        if "--output-dir" not in flags:
            flags += ["--output-dir", str(folder / "run")]
        assert main([*arguments, *flags, *(f"{key}={value}" for key, value in settings.items())]) == 0
        return Path(flags[flags.index("--output-dir") + 1]) / "adapter"

    return make


@pytest.fixture(scope="module")
def trained(wrapper, train):
    """trained(kind) → (the model, the folder of an adapter)."""
    made: dict[str, Path] = {}

    def make(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            made[kind] = train(wrapper(kind))
        return wrapper(kind), made[kind]

    return make


def vanilla(folder: Path):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model, folder: Path):
    ids = AutoTokenizer.from_pretrained(folder)("What is 3+4? It is, as everybody knows,", return_tensors="pt")[
        "input_ids"
    ]
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def tensors(folder: Path):
    with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def is_vision(name: str) -> bool:
    return any(word in name for word in ("vis", "multi_modal"))


def test_the_text_part_alone_is_loaded_and_computes_what_the_whole_does(folder):
    base = load_base(str(folder), load_in_4bit=False, dtype="float32")
    assert not [name for name, _ in base.model.named_parameters() if is_vision(name)]
    torch.testing.assert_close(logits(base.model.eval(), folder), logits(vanilla(folder), folder))
    copied = copy.deepcopy(base.model)
    assert copied.get_input_embeddings() is copied.model.language_model.embed_tokens
    assert base.model.get_input_embeddings() is base.model.model.embed_tokens


def test_the_shape_is_that_of_the_live_model(folder):
    from qalora.base.quantized import linear_maps
    from qalora.models import parameters

    model, shape = load_base(str(folder), load_in_4bit=False, dtype="float32").model, shape_of(resolve(str(folder)))
    assert shape.linear_maps() == {n: (m.in_features, m.out_features) for n, m in linear_maps(model).items()}
    assert parameters(shape) == sum(parameter.numel() for parameter in model.parameters())
    assert shape.positions in (512, 262144)  # Ministral 3 scales them by default


@pytest.mark.parametrize("kind", KINDS)
def test_plain_peft_puts_the_adapter_on_the_whole(trained, kind):
    model, adapter = trained(kind)
    whole = vanilla(model)
    bare = logits(whole, model)
    adapted = PeftModel.from_pretrained(whole, adapter)
    assert not [name for name, _ in adapted.named_parameters() if "lora_" in name and is_vision(name)]
    ours = load_adapter(load_base(str(model), load_in_4bit=False, dtype="float32").model, adapter).eval()
    expected = logits(adapted.eval(), model)
    assert (expected - bare).abs().max() > 1e-3
    torch.testing.assert_close(logits(ours, model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", ["original", "dequantized"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_is_the_whole_again(trained, kind, base, tmp_path):
    model, adapter = trained(kind)
    arguments = ["--model", str(model), "--adapter", str(adapter), "--output", str(tmp_path / "merged")]
    assert run(merge, [*arguments, "--base", base, "--dtype", "float32"]) == 0
    merged, before, after = tmp_path / "merged", tensors(model), tensors(tmp_path / "merged")
    assert before.keys() == after.keys()
    assert {name: tensor.shape for name, tensor in before.items()} == {
        name: tensor.shape for name, tensor in after.items()
    }
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same >= {name for name in before if is_vision(name)} and len(same) < len(before)
    for name in ("preprocessor_config.json", "processor_config.json", "tokenizer.json"):
        assert (merged / name).read_bytes() == (model / name).read_bytes()
    config = json.loads((merged / "config.json").read_text())
    assert config["vision_config"] == json.loads((model / "config.json").read_text())["vision_config"]
    assert config["architectures"] == json.loads((model / "config.json").read_text())["architectures"]
    live = load_base(str(model), load_in_4bit=base == "dequantized", dtype="float32").model
    expected = logits(load_adapter(live, adapter).eval(), model)
    torch.testing.assert_close(logits(vanilla(merged), model), expected, rtol=1e-4, atol=1e-4)
    again = load_base(str(merged), load_in_4bit=False, dtype="float32")
    torch.testing.assert_close(logits(again.model.eval(), model), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- other forms


@pytest.mark.parametrize("form", ["peft", "peft-uniform"])
def test_an_exported_adapter_is_the_same_on_the_whole(trained, form, tmp_path):
    model, adapter = trained("gemma3")
    arguments = ["--model", str(model), "--adapter", str(adapter), "--output", str(tmp_path / "out"), "--format", form]
    assert run(merge, arguments) == 0
    found, expected = (
        logits(PeftModel.from_pretrained(vanilla(model), folder).eval(), model)
        for folder in (tmp_path / "out", adapter)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_the_text_part_alone_fits_the_whole_and_the_other_way_round(trained, tmp_path):
    """As PEFT names one that was trained on the decoder by itself."""
    model, adapter = trained("gemma3")
    shutil.copytree(adapter, tmp_path / "alone")
    saved = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())

    def own(name):
        return name.replace("model.language_model.", "model.")

    save_file({own(name): tensor for name, tensor in saved.items()}, tmp_path / "alone" / "adapter_model.safetensors")
    for field in ("rank_pattern", "alpha_pattern"):
        config[field] = {own(name): value for name, value in config[field].items()}
    config["target_modules"] = [own(name) for name in config["target_modules"]]
    (tmp_path / "alone" / "adapter_config.json").write_text(json.dumps(config))
    base = load_base(str(model), dtype="float32").model
    expected = logits(load_adapter(copy.deepcopy(base), adapter).eval(), model)
    found = load_adapter(copy.deepcopy(base), tmp_path / "alone")
    torch.testing.assert_close(logits(found.eval(), model), expected)
    for name in (adapter, tmp_path / "alone"):
        arguments = ["--model", str(model), "--adapter", str(name), "--output", str(tmp_path / f"{name.name}-merged")]
        assert run(merge, [*arguments, "--dtype", "float32"]) == 0
    merged = [tensors(tmp_path / f"{name}-merged") for name in (adapter.name, "alone")]
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])
    maps = {own(name): (A.shape[1], len(B)) for name, (A, B) in read_adapter(adapter).pairs.items()}
    assert set(read_adapter(adapter).fitted(maps).pairs) == set(maps)


def test_gguf_has_the_text_part_by_its_own_names(trained, tmp_path):
    """llama.cpp has the text part as a model of its own, and the vision in another file."""
    from gguf import GGUFReader

    model, adapter = trained("mistral3")
    arguments = ["--model", str(model), "--adapter", str(adapter)]
    for form in ("gguf", "gguf-lora"):
        assert run(merge, [*arguments, "--output", str(tmp_path / form), "--format", form]) == 0
    names = [tensor.name for tensor in GGUFReader(str(tmp_path / "gguf-lora" / "adapter.gguf")).tensors]
    assert len(names) == 2 * len(read_adapter(adapter).pairs)
    assert all(name.startswith("blk.") and name.endswith((".lora_a", ".lora_b")) for name in names)
    live = load_adapter(load_base(str(model), dtype="float32").model, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    read = load_base(str(tmp_path / "gguf"), load_in_4bit=False, dtype="float32", tokenizer=tokenizer).model.eval()
    torch.testing.assert_close(logits(read, model), logits(live, model), rtol=1e-2, atol=1e-2)


def test_a_vision_model_stored_in_4_bits_is_trained_and_merged(wrapper, train, tmp_path):
    model = wrapper("gemma3")
    stored = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", "model.vision_tower", "model.multi_modal_projector"],
    )  # fmt: skip
    whole = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32, quantization_config=stored)
    whole.save_pretrained(tmp_path / "4bit")
    for file in model.glob("token*"):
        shutil.copyfile(file, tmp_path / "4bit" / file.name)
    adapter = train(tmp_path / "4bit")
    arguments = ["--model", str(tmp_path / "4bit"), "--adapter", str(adapter), "--output", str(tmp_path / "merged")]
    assert run(merge, [*arguments, "--dtype", "float32"]) == 0
    live = load_adapter(load_base(str(tmp_path / "4bit"), dtype="float32").model, adapter).eval()
    torch.testing.assert_close(logits(vanilla(tmp_path / "merged"), model), logits(live, model), rtol=1e-4, atol=1e-4)
    assert tensors(tmp_path / "merged").keys() == tensors(model).keys()


def test_a_vision_model_in_several_files_is_resumed_and_merged_into_as_many_names(wrapper, train, tmp_path, capsys):
    model = wrapper("mistral3")
    vanilla(model).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    for file in model.glob("token*"):
        shutil.copyfile(file, tmp_path / "sharded" / file.name)
    run_folder = train(
        tmp_path / "sharded", "training.max_steps=3", "training.save_steps=2", "logging.quiet=false"
    ).parent
    line = "a vision model (mistral3): its text part is trained; vision weights are not loaded"
    assert capsys.readouterr().err.count(line) == 1
    again = ["training.max_steps=4", "training.save_steps=2", "--resume-from-checkpoint", "auto"]
    adapter = train(tmp_path / "sharded", *again, "--output-dir", str(run_folder))
    arguments = ["--model", str(tmp_path / "sharded"), "--adapter", str(adapter), "--output", str(tmp_path / "merged")]
    assert run(merge, [*arguments, "--max-shard-size", "100KB", "--dtype", "float32"]) == 0
    before, after = (
        json.loads((tmp_path / folder / "model.safetensors.index.json").read_text())["weight_map"].keys()
        for folder in ("sharded", "merged")
    )
    assert before == after
    live = load_adapter(load_base(str(model), dtype="float32").model, adapter).eval()
    torch.testing.assert_close(logits(vanilla(tmp_path / "merged"), model), logits(live, model), rtol=1e-4, atol=1e-4)
