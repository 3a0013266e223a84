"""A base comes back from every source with the right values, in one dtype, frozen; or with one sentence why not."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Params4bit
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, PreTrainedTokenizerFast

from qalora.base import loading
from qalora.base.checkpoint import open_checkpoint
from qalora.base.loading import choose_compute_dtype, give_back_memory, load_base, load_tokenizer
from qalora.base.quantized import dequantize, is_4bit, linear_maps
from qalora.base.registry import resolve
from qalora.errors import InputError

IDS = torch.tensor([[1, 5, 9, 30, 7, 2, 11, 64]])


def word_tokenizer(**specials: str) -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "</s>", "<pad>", *(f"w{i}" for i in range(124))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)


@pytest.fixture
def saved(tiny_llama, tmp_path):
    """saved(dtype, tokenizer, **config) → a folder with a tiny LLaMA and its tokenizer, and the model."""

    def save(dtype=torch.bfloat16, tokenizer=None, **config):
        model = tiny_llama(dtype, **{"intermediate_size": 128, **config})
        model.save_pretrained(tmp_path / "base")
        (tokenizer or word_tokenizer(unk_token="<unk>", eos_token="</s>")).save_pretrained(tmp_path / "base")
        return tmp_path / "base", model

    return save


def load(path, **settings):
    return load_base(resolve(str(path)), device="cpu", **{"dtype": "float32", **settings})


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


# ---------------------------------------------------------------------------------------------------------- load_base


def test_weights_that_the_config_leaves_no_place_for_are_not_left_out_in_silence(saved):
    path, _ = saved(attention_bias=True)
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(fields | {"attention_bias": False}))
    with pytest.raises(
        InputError, match=r"has 8 weights \(model\.layers\.0\.self_attn\.k_proj\.bias, .*mend config.json"
    ):
        load(path)
    with pytest.raises(InputError, match="has 8 weights .*mend config.json"):  # a merge reads headers alone
        open_checkpoint(resolve(str(path)))


def test_weights_of_other_modules_may_stand_beside_the_models(saved):
    path, model = saved()
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["vision.proj.weight"] = torch.ones(2, 2)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert load(path).model.num_parameters() == model.num_parameters()


def test_rows_that_are_no_multiple_of_64_are_refused_on_a_cpu(saved):
    path, _ = saved(intermediate_size=96)
    with pytest.raises(InputError, match=r"mlp\.down_proj has 96 inputs.*no_quantize"):
        load(path)
    assert load(path, load_in_4bit=False).quantized is False


def test_a_4_bit_folder_whose_rows_are_no_whole_blocks_is_refused_on_a_cpu(saved, tmp_path):
    path, _ = saved()
    model = load(path).model
    for linear in linear_maps(model).values():
        weight = Params4bit(dequantize(linear), requires_grad=False, blocksize=128, quant_type="nf4", module=linear)
        linear.weight = weight.to("cpu")
    model.save_pretrained(tmp_path / "4bit")
    word_tokenizer(unk_token="<unk>", eos_token="</s>").save_pretrained(tmp_path / "4bit")
    with pytest.raises(InputError, match=r"q_proj has 64 inputs, and .* no multiple of 128, its block"):
        load(tmp_path / "4bit")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_loads_in_4_bit(saved, dtype, tied):
    path, original = saved(tie_word_embeddings=tied)
    base = load(path, dtype=dtype)
    compute = getattr(torch, dtype)
    assert (base.compute_dtype, base.quantized, base.source.kind) == (compute, True, "folder")
    assert base.model.config.use_cache is False
    maps, plain = linear_maps(base.model), linear_maps(original)
    assert list(maps) == list(plain)
    for name, module in maps.items():
        assert is_4bit(module)
        assert module.compute_dtype == compute
        weight = plain[name].weight.float()
        assert (dequantize(module) - weight).norm() / weight.norm() < 0.12
    for name, parameter in base.model.named_parameters():
        assert not parameter.requires_grad
        if parameter.is_floating_point():
            assert parameter.dtype == compute
            assert torch.equal(parameter.float(), original.get_parameter(name).float())
    assert (base.model.lm_head.weight is base.model.model.embed_tokens.weight) is tied


def test_the_4_bit_model_computes_with_the_dequantized_weights(saved):
    path, original = saved(torch.float32)
    base = load(path)
    for name, module in linear_maps(base.model).items():
        linear_maps(original)[name].weight.data = dequantize(module)
    for name in ("embed_tokens", "norm"):  # stored in fp32, loaded through bf16
        getattr(original.model, name).weight.data = getattr(base.model.model, name).weight.data
    original.lm_head.weight.data = base.model.lm_head.weight.data
    torch.testing.assert_close(logits(base.model.eval()), logits(original.eval()), rtol=1e-3, atol=1e-3)


def test_quantization_off_gives_the_weights_as_they_are(saved):
    path, original = saved(torch.float32)
    base = load(path, load_in_4bit=False)
    assert base.quantized is False
    assert not any(map(is_4bit, base.model.modules()))
    assert torch.equal(logits(base.model.eval()), logits(original.eval()))
    assert {p.dtype for p in load(path, load_in_4bit=False, dtype="bfloat16").model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_4_bit_model_saved_and_loaded_again_gives_equal_logits(saved, tmp_path, double_quant):
    path, _ = saved()
    first = load(path, double_quant=double_quant)
    first.model.save_pretrained(tmp_path / "quantized")
    first.tokenizer.save_pretrained(tmp_path / "quantized")
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization_config"]
    assert (config["load_in_4bit"], config["bnb_4bit_use_double_quant"]) == (True, double_quant)
    again = load(tmp_path / "quantized")
    assert again.quantized
    assert logits(again.model.eval()).dtype == torch.float32
    assert torch.equal(logits(again.model), logits(first.model.eval()))
    for name, module in linear_maps(again.model).items():
        assert torch.equal(dequantize(module), dequantize(linear_maps(first.model)[name]))
        assert module.support_avx512bf16_for_cpu is False
    other = load(tmp_path / "quantized", dtype="bfloat16").model
    assert {m.compute_dtype for m in linear_maps(other).values()} == {torch.bfloat16}
    assert {p.dtype for p in other.parameters() if p.is_floating_point()} == {torch.bfloat16}


def test_4_bit_weights_stored_as_16_bit_numbers_keep_their_values(saved, tmp_path):
    """As FSDP wants them: bnb_4bit_quant_storage is bfloat16."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    path, _ = saved()
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_quant_storage=torch.bfloat16,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    for module in linear_maps(model).values():
        module.support_avx512bf16_for_cpu = False
    model.save_pretrained(tmp_path / "fsdp")
    word_tokenizer(unk_token="<unk>", eos_token="</s>").save_pretrained(tmp_path / "fsdp")
    expected = {name: dequantize(module) for name, module in linear_maps(model).items()}
    for name, module in linear_maps(load(tmp_path / "fsdp").model).items():
        assert torch.equal(dequantize(module), expected[name])


def test_a_4_bit_folder_is_not_loaded_as_if_it_were_16_bit(saved, tmp_path):
    path, _ = saved()
    base = load(path)
    base.model.save_pretrained(tmp_path / "quantized")
    base.tokenizer.save_pretrained(tmp_path / "quantized")
    with pytest.raises(InputError, match=r"stored in 4 bits"):
        load(tmp_path / "quantized", load_in_4bit=False)


# ------------------------------------------------------------------------------------------------------- its failures


def test_another_quantization_is_named(saved):
    path, _ = saved()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(
        InputError, match=r"stored with gptq quantization; use the 16-bit model, or one saved in bitsandbytes'"
    ):
        load(path)


def test_a_model_without_linear_layers_in_its_place_is_named(tmp_path):
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=128, n_positions=32)
    config.save_pretrained(tmp_path)  # and no weights: they are not looked for
    word_tokenizer(unk_token="<unk>", eos_token="</s>").save_pretrained(tmp_path)
    message = (
        f"model {tmp_path}: the model is of type gpt2, whose blocks are not at model.layers; it would need a record of "
        "where they are."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        load(tmp_path)


def cut_config(path):
    (path / "config.json").write_text("{")


def remove_weights(path):
    (path / "model.safetensors").unlink()


def cut_weights(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def remove_one_weight(path):
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def remove_tokenizer(path):
    for file in path.glob("*token*"):
        file.unlink()


@pytest.mark.parametrize("damage", [cut_config, remove_weights, cut_weights, remove_one_weight, remove_tokenizer])
def test_a_damaged_folder_is_an_input_error_that_names_it(saved, damage):
    path, _ = saved()
    damage(path)
    with pytest.raises(InputError, match=re.escape(str(path))):
        load(path)


def test_a_hub_model_that_is_not_there_is_named_with_what_to_check():
    message = r"^model nobody/nothing: nobody/nothing cannot be loaded; check the name, HF_TOKEN .* HF_HUB_OFFLINE"
    with pytest.raises(InputError, match=message):
        load("nobody/nothing")


def test_what_is_no_gguf_file_is_named(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"text" * 99)
    with pytest.raises(InputError, match=r"m\.gguf: not a GGUF file of a LLaMA-class model"):
        load(tmp_path / "m.gguf")


# ------------------------------------------------------------------------------------------------------ load_tokenizer


@pytest.mark.parametrize(
    ("specials", "pad"),
    [
        (dict(unk_token="<unk>", eos_token="</s>", pad_token="<pad>"), "<pad>"),
        (dict(unk_token="<unk>", eos_token="</s>"), "<unk>"),
        (dict(eos_token="</s>"), "</s>"),
    ],
    ids=["its own", "unknown", "end"],
)
def test_the_pad_token_is_one_that_the_vocabulary_has(saved, specials, pad):
    path, _ = saved(tokenizer=word_tokenizer(**specials, padding_side="left"))
    tokenizer = load_tokenizer(resolve(str(path)))
    assert (tokenizer.pad_token, len(tokenizer), tokenizer.padding_side) == (pad, 128, "right")


# ------------------------------------------------------------------------------------------------ choose_compute_dtype


@pytest.fixture
def card(monkeypatch):
    """card(major, minor): a CUDA device of that capability."""

    def pretend(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"Card sm{capability[0]}{capability[1]}")

    return pretend


@pytest.mark.parametrize(
    ("capability", "requested", "dtype"),
    [
        ((7, 5), "auto", torch.float16),
        ((7, 0), "auto", torch.float16),
        ((8, 0), "auto", torch.bfloat16),
        ((9, 0), "auto", torch.bfloat16),
        ((7, 5), "float16", torch.float16),
        ((7, 5), "float32", torch.float32),
        ((8, 6), "bfloat16", torch.bfloat16),
        ((8, 6), "float16", torch.float16),
    ],
)
def test_the_compute_dtype_of_a_card(card, capability, requested, dtype):
    card(*capability)
    assert choose_compute_dtype(requested, "cuda") == dtype
    assert choose_compute_dtype(requested, "cuda:0") == dtype


def test_bfloat16_before_ampere_is_refused(card):
    card(7, 5)
    message = "dtype bfloat16: Card sm75 has no bf16 arithmetic (it came with Ampere); use float16 or auto."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        choose_compute_dtype("bfloat16", "cuda")


def test_float16_on_a_cpu_is_refused():
    message = "dtype float16: a CPU computes fp16 about 100 times slower; use bfloat16, float32 or auto."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        choose_compute_dtype("float16", "cpu")


@pytest.mark.parametrize("fast", [torch.float32, torch.bfloat16], ids=str)
def test_a_cpu_gets_what_is_faster_on_it(monkeypatch, fast):
    clock = [0.0]

    def linear(x, weight):
        clock[0] += 1.0 if x.dtype == fast else 2.0

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    monkeypatch.setattr(loading.time, "perf_counter", lambda: clock[0])
    loading._faster_on_cpu.cache_clear()  # a process measures once
    try:
        assert choose_compute_dtype("auto", "cpu") == fast
    finally:
        loading._faster_on_cpu.cache_clear()
    assert choose_compute_dtype("bfloat16", "cpu") == torch.bfloat16


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps other things")
def test_memory_between_what_is_held_goes_back_to_the_system():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    pieces = [b"x" * 100_000 for _ in range(1000)]  # small enough for the heap
    held = pieces[::100]
    before = resident()
    del pieces
    give_back_memory()
    assert before - resident() > 80_000_000
    assert len(held) == 10
