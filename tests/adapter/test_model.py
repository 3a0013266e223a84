from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from qalora.adapter.allocation import AllocationPlan
from qalora.adapter.model import (
    attach,
    gated_layers,
    load_adapter,
    ranks,
    save_adapter,
    sync_config,
    verify_saved,
)
from qalora.adapter.saved import check_adapter, rank_of, read_config, scaling_of
from qalora.adapter.surgery import apply_plan
from qalora.base.registry import resolve
from qalora.errors import AnswerNo, InputError

Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.1.self_attn.v_proj"
DOWN = "model.layers.1.mlp.down_proj"
UNEVEN = AllocationPlan({Q: (0, 1, 2, 3), V: (1,)}, {DOWN: 3, "model.layers.0.mlp.up_proj": 2})

# Plain PEFT. Arguments: base folder, adapter folder, output, 4bit | 16bit.
VANILLA = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, output, kind = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
if kind == "4bit":
    from bitsandbytes.nn import Linear4bit, Params4bit
    for name, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear) and ".layers." in name:
            sizes = linear.in_features, linear.out_features
            new = Linear4bit(*sizes, bias=False, compute_dtype=torch.float32, quant_type="nf4")
            new.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=new).to("cpu")
            new.support_avx512bf16_for_cpu = False
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
    model.is_loaded_in_4bit = True
model = PeftModel.from_pretrained(model, adapter).eval()
tokens = torch.arange(24).view(2, 12)
with torch.no_grad():
    found = {"adapter": model(tokens).logits}
    if kind == "16bit":
        found["merged"] = model.merge_and_unload()(tokens).logits
torch.save(found, output)
"""


@pytest.fixture
def uneven(tiny_adapter, randomize_B):
    """make(**) → an adapter after a round: one module without ranks, two that grew."""

    def make(**base):
        model = tiny_adapter(r=4, **base)
        apply_plan(model, UNEVEN, generator=torch.Generator().manual_seed(0))
        return randomize_B(model)

    return make


@pytest.fixture
def saved(uneven, tmp_path):
    """A saved adapter, for a base that tiny_llama() builds again."""
    save_adapter(uneven(), tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(path, **fields):
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def edit_tensors(path, change):
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


# ----------------------------------------------------------------------------------------------------- invariant 8


@pytest.mark.parametrize("kind", ["16bit", "4bit"])
def test_plain_peft_reads_what_was_saved(tiny_llama, uneven, tmp_path, vanilla, kind):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = uneven(four_bit=kind == "4bit").eval()
    save_adapter(model, tmp_path / "adapter")
    vanilla(VANILLA, tmp_path / "base", tmp_path / "adapter", tmp_path / "out.pt", kind)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    with torch.no_grad():
        ours = model(torch.arange(24).view(2, 12)).logits
        with model.disable_adapter():
            base = model(torch.arange(24).view(2, 12)).logits
    torch.testing.assert_close(found["adapter"], ours, rtol=5e-6, atol=5e-6)  # thin products sum in another order
    assert (ours - base).abs().max() > 0.1  # the adapter is no whisper
    if kind == "16bit":
        torch.testing.assert_close(found["merged"], ours, rtol=1e-4, atol=1e-4)


def test_nothing_of_ours_reaches_the_disk(saved):
    assert sorted(file.name for file in saved.iterdir() if file.name != "README.md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert {key.rsplit(".", 2)[1] for key in load_file(saved / "adapter_model.safetensors")} == {
        "lora_A",
        "lora_B",
    }
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config.keys() <= LoraConfig().to_dict().keys() | {"task_type", "peft_version"}
    assert (config["peft_type"], config["modules_to_save"], config["use_rslora"]) == ("LORA", None, False)


@pytest.mark.parametrize("four_bit", [False, True], ids=["plain", "4bit"])
def test_saved_and_loaded_is_the_same(tiny_llama, uneven, tmp_path, make_batch, four_bit):
    model = uneven(four_bit=four_bit)
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(tiny_llama(four_bit=four_bit), tmp_path / "adapter")
    tokens = make_batch()["input_ids"]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert ranks(loaded) == ranks(model)
    assert {layer.s for layer in gated_layers(loaded).values()} == {2.0}


@pytest.mark.parametrize("trainable", [False, True])
def test_a_loaded_adapter_trains_only_when_asked(tiny_llama, saved, trainable):
    model = load_adapter(tiny_llama(), saved, trainable=trainable)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == ({name for name, _ in model.named_parameters() if ".lora_" in name} if trainable else set())
    assert all(layer.A.dtype == torch.float32 for layer in gated_layers(model).values())


def test_an_ordinary_peft_adapter(tiny_llama, tmp_path, make_batch):
    """rsLoRA, patterns that match several modules, some blocks only."""
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 3},
        alpha_pattern={"0.self_attn.q_proj": 10},
        use_rslora=True,
        init_lora_weights=False,
    )
    plain = get_peft_model(tiny_llama(), config)
    plain.save_pretrained(tmp_path)
    ours = load_adapter(tiny_llama(), tmp_path)
    tokens = make_batch()["input_ids"]
    torch.testing.assert_close(ours(tokens).logits, plain(tokens).logits, rtol=2e-5, atol=2e-5)
    read = read_config(tmp_path)
    for name, layer in gated_layers(ours).items():
        assert (rank_of(read, name), scaling_of(read, name)) == (len(layer.A), layer.s)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_a_start_that_changed_the_base_is_refused(saved, init):
    file = saved / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": init}))
    with pytest.raises(InputError, match=f"init_lora_weights={init} took weights out of the base"):
        read_config(saved)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_a_start_that_left_the_base_alone_is_read(saved, init):
    file = saved / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": init}))
    assert read_config(saved).init_lora_weights == init


def test_an_adapter_of_another_model_is_refused_before_any_weights_are_there(saved, save_tiny_llama, tmp_path):
    for name, config, message in (
        ("narrow", dict(intermediate_size=64), r"in the adapter and \(64, 64\) in the model \(out, in\)"),
        ("short", dict(intermediate_size=192, num_hidden_layers=1), r"the adapter has weights for model\.layers\.1\."),
    ):
        folder = save_tiny_llama(tmp_path / name, **config)
        (folder / "model.safetensors").unlink()
        with pytest.raises(InputError, match=message):
            check_adapter(saved, resolve(str(folder)))
    folder = save_tiny_llama(tmp_path / "same", intermediate_size=192)
    (folder / "model.safetensors").unlink()
    check_adapter(saved, resolve(str(folder)))


def test_a_bf16_adapter_computes_in_fp32(tiny_llama, saved):
    edit_tensors(saved, lambda t: t.update({key: value.bfloat16() for key, value in t.items()}))
    layers = gated_layers(load_adapter(tiny_llama(), saved))
    assert {layer.A.dtype for layer in layers.values()} == {torch.float32}


@pytest.mark.parametrize("targets", [".*_proj", [Q, V, DOWN]], ids=["regex", "full-names"])
def test_a_foreign_adapter_may_lose_a_module(tiny_llama, tmp_path, make_batch, targets):
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "foreign")
    model = load_adapter(tiny_llama(), tmp_path / "foreign", trainable=True)
    apply_plan(model, AllocationPlan({Q: (0, 1)}, {}))
    save_adapter(model, tmp_path / "ours")
    loaded = load_adapter(tiny_llama(), tmp_path / "ours")
    assert ranks(loaded) == ranks(model)
    tokens = make_batch()["input_ids"]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_a_foreign_adapter_keeps_its_scalings(tiny_llama, tmp_path):
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj"],
        alpha_pattern={"v_proj": 10},
        use_rslora=True,
        init_lora_weights=False,
    )
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "foreign")
    model = load_adapter(tiny_llama(), tmp_path / "foreign", trainable=True)
    apply_plan(model, AllocationPlan({Q: (0,)}, {V: 1}))
    assert [gated_layers(model)[name].s for name in (Q, V)] == [3.0, 5.0]
    save_adapter(model, tmp_path / "ours")
    assert [gated_layers(load_adapter(tiny_llama(), tmp_path / "ours"))[name].s for name in (Q, V)] == [
        3.0,
        5.0,
    ]


# ---------------------------------------------------------------------------------------------------------- attach


def test_a_new_adapter_changes_nothing(tiny_llama, make_batch):
    tokens = make_batch()["input_ids"]
    model = attach(tiny_llama(), r=3, alpha=6)
    assert ranks(model) == dict.fromkeys(ranks(model), 3) and len(ranks(model)) == 14
    assert torch.equal(model(tokens).logits, tiny_llama()(tokens).logits)


def test_the_seed_decides_A_and_the_global_generator_is_left(tiny_llama):
    state = torch.random.get_rng_state()
    base = [tiny_llama() for _ in range(3)]
    torch.random.set_rng_state(state)
    starts = [gated_layers(attach(b, r=2, alpha=4, seed=seed))[Q].A for b, seed in zip(base, (0, 0, 1), strict=True)]
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_targets(tiny_llama):
    model = attach(tiny_llama(), r=2, alpha=4, target_modules=["q_proj", "v_proj"])
    assert {name.rsplit(".", 1)[-1] for name in ranks(model)} == {"q_proj", "v_proj"}
    with pytest.raises(
        InputError, match="target_modules=w_proj: the model has no such linear layer; it has q_proj, k_proj"
    ):
        attach(tiny_llama(), r=2, alpha=4, target_modules=["q_proj", "w_proj"])


# ----------------------------------------------------------------------------------------------------- sync_config


def test_config_follows_the_ranks(uneven):
    model = uneven()
    config = model.peft_config["default"]
    now = ranks(model)
    assert Q not in now and config.exclude_modules == [Q]
    assert config.rank_pattern == now and config.alpha_pattern == {name: 2 * r for name, r in now.items()}
    assert (config.r, config.lora_alpha) == (7, 14)
    for name, layer in gated_layers(model).items():
        assert (rank_of(config, name), scaling_of(config, name)) == (len(layer.A), layer.s)


def test_sync_is_idempotent(uneven):
    model = uneven()
    before = model.peft_config["default"].to_dict()
    sync_config(model)
    assert model.peft_config["default"].to_dict() == before


# ------------------------------------------------------------------------------------------------- save_adapter refuses


def test_an_untrained_adapter_is_not_saved(tiny_llama, tmp_path):
    with pytest.raises(AnswerNo, match="untrained"):
        save_adapter(attach(tiny_llama(), r=2, alpha=4), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_not_saved(tiny_adapter, tmp_path, value):
    model = tiny_adapter()
    gated_layers(model)[V].A.data[0, 0] = value
    with pytest.raises(AnswerNo, match="not finite"):
        save_adapter(model, tmp_path / "adapter")


def test_an_empty_adapter_is_not_saved(tiny_adapter, tmp_path):
    model = tiny_adapter(r=1, targets=["q_proj"])
    apply_plan(model, AllocationPlan(dict.fromkeys(ranks(model), (0,)), {}))
    with pytest.raises(AnswerNo, match=r"every rank was pruned.*min_rank=1"):
        save_adapter(model, tmp_path / "adapter")


def test_saving_again_replaces(tiny_adapter, uneven, tmp_path):
    save_adapter(tiny_adapter(), tmp_path / "adapter")
    model = uneven()
    save_adapter(model, tmp_path / "adapter")
    verify_saved(model, tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_verify_sees_another_weight_or_scaling(uneven, tmp_path):
    model = uneven()
    save_adapter(model, tmp_path / "adapter")
    gated_layers(model)[V].A.data[0, 0] += 1e-3
    with pytest.raises(RuntimeError, match=f"weights of {V}"):
        verify_saved(model, tmp_path / "adapter")
    save_adapter(model, tmp_path / "adapter")
    edit_config(tmp_path / "adapter", lora_alpha=1, alpha_pattern={})
    with pytest.raises(RuntimeError, match="another rank or scaling"):
        verify_saved(model, tmp_path / "adapter")


# ------------------------------------------------------------------------------------------------- load_adapter refuses


def first_key(tensors, part):
    return next(key for key in sorted(tensors) if part in key)


def drop_module(tensors):
    for key in [key for key in tensors if DOWN in key]:
        del tensors[key]


def set_nan(tensors):
    tensors[first_key(tensors, "lora_A")][0, 0] = float("nan")


def rename_block(tensors):
    for key in [key for key in tensors if ".layers.1." in key]:
        tensors[key.replace(".layers.1.", ".layers.9.")] = tensors.pop(key)


def widen(tensors):
    key = first_key(tensors, f"{V}.lora_A")
    tensors[key] = torch.zeros(len(tensors[key]), 65)


def cut_to(rank):
    def change(tensors):
        a, b = (first_key(tensors, f"{V}.{kind}") for kind in ("lora_A", "lora_B"))
        tensors[a], tensors[b] = tensors[a][:rank].clone(), tensors[b][:, :rank].clone()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(set_nan, r"_proj holds a value that is not finite", id="nan"),
        pytest.param(drop_module, f"the config targets {DOWN} but the file has no weights", id="module-missing"),
        pytest.param(rename_block, r"weights for model\.layers\.9.*, which the model lacks", id="other-depth"),
        pytest.param(widen, rf"{V} is \(32, 65\) in the adapter and \(32, 64\) in the model", id="other-width"),
        pytest.param(cut_to(2), rf"{V} has rank 2 .* 3", id="rank-2-of-3"),
        pytest.param(cut_to(1), rf"{V} has rank 1 .* 3", id="rank-1-of-3"),
        pytest.param(lambda t: t.pop(first_key(t, f"{V}.lora_B")), f"{V} do not belong together", id="no-partner"),
        pytest.param(
            lambda t: t.update(extra=torch.zeros(2)), "brings whole weights of extra along", id="stray-tensor"
        ),
    ],
)
def test_weights_that_are_refused(tiny_llama, saved, change, message):
    edit_tensors(saved, change)
    with pytest.raises(InputError, match=message):
        load_adapter(tiny_llama(), saved)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is not LORA"),
        ({"use_dora": True}, "use_dora is set; only plain LoRA"),
        ({"use_qalora": True}, "use_qalora is set"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"lora_bias": True}, "lora_bias is set"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is set"),
        ({"trainable_token_indices": [0]}, "trainable_token_indices is set"),
        ({"target_parameters": ["x"]}, "target_parameters is set"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config is set"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora is set"),
        ({"kasa_config": {"beta": 0.1}}, "kasa_config is set"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configs_that_are_refused(tiny_llama, saved, fields, message):
    edit_config(saved, **fields)
    with pytest.raises(InputError, match=message):
        load_adapter(tiny_llama(), saved)


def test_files_that_are_refused(tiny_llama, saved):
    with pytest.raises(InputError, match=r"not an adapter, there is no such folder\."):
        load_adapter(tiny_llama(), saved / "nowhere")
    (saved / "adapter_model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(InputError, match="not a safetensors file"):
        load_adapter(tiny_llama(), saved)
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    with pytest.raises(InputError, match="adapter_model.bin: cannot be read as tensors"):
        load_adapter(tiny_llama(), saved)
    (saved / "adapter_model.bin").unlink()
    with pytest.raises(InputError, match="there is no adapter_model.safetensors"):
        load_adapter(tiny_llama(), saved)
    (saved / "adapter_config.json").write_text("[")
    with pytest.raises(InputError, match="not valid JSON"):
        load_adapter(tiny_llama(), saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": "four"}, "r is 'four', not a number above 0"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern of q_proj is 0, not a number above 0"),
        ({"rank_pattern": {"(": 4}}, r"rank_pattern has '\(', which is no regular expression"),
        ({"rank_pattern": [4]}, "rank_pattern is list, not numbers by module"),
    ],
)
def test_numbers_of_a_saved_adapter_that_are_none_are_named(saved, change, message):
    file = saved / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=rf"adapter_config\.json: {message}"):
        read_config(saved)
