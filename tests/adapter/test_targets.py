"""Which linear layers get an adapter, against PEFT's own reading of the same targets."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model

from qalora.adapter.model import attach, gated_layers, load_adapter, save_adapter
from qalora.adapter.targets import targeted
from qalora.base.quantized import linear_maps
from qalora.errors import InputError

TARGETS = [
    ("all-linear", None),
    ("all-linear", [1]),
    (["q_proj", "v_proj"], None),
    (["q_proj", "v_proj"], [0]),
    (["self_attn.q_proj", "1.mlp.up_proj"], None),
    (["model.layers.1.mlp.down_proj"], None),
    (r".*\.(q|v)_proj", None),
    (r".*layers\.1\.(self_attn\.\w+|mlp\.(gate|up)_proj)", None),
    ("model.*proj", None),
]


@pytest.mark.parametrize(("targets", "layers"), TARGETS)
def test_targets_are_those_of_peft_and_the_saved_config_means_the_same(
    tiny_llama, randomize_B, tmp_path, targets, layers
):
    names = list(linear_maps(tiny_llama()))
    if isinstance(targets, str) and layers is not None:  # PEFT takes these together only in a list
        theirs = LoraConfig(r=2, target_modules=[n for n in names if ".layers.1." in n], task_type="CAUSAL_LM")
    else:
        theirs = LoraConfig(r=2, target_modules=targets, layers_to_transform=layers, task_type="CAUSAL_LM")
    peft = get_peft_model(tiny_llama(), theirs)
    wanted = {n.removeprefix("base_model.model.") for n, m in peft.named_modules() if hasattr(m, "lora_A")}
    assert set(targeted(names, targets, layers)) == wanted
    model = randomize_B(attach(tiny_llama(), r=2, alpha=4, target_modules=targets, layers_to_transform=layers))
    assert set(gated_layers(model)) == wanted
    save_adapter(model, tmp_path / "adapter")
    vanilla = get_peft_model(tiny_llama(), LoraConfig.from_pretrained(str(tmp_path / "adapter")))
    assert {n.removeprefix("base_model.model.") for n, m in vanilla.named_modules() if hasattr(m, "lora_A")} == wanted
    assert set(gated_layers(load_adapter(tiny_llama(), tmp_path / "adapter"))) == wanted


@pytest.mark.parametrize(
    ("targets", "layers", "says"),
    [
        (
            ["q_proj", "c_attn"],
            None,
            "lora.target_modules=c_attn: the model has no such linear layer; it has q_proj, k_proj",
        ),
        (
            "q_proj|v_proj",
            None,
            "matches no linear layer; a regular expression matches whole names, such as "
            "model.layers.0.self_attn.q_proj",
        ),
        ("all-linear", [1, 2, 7], "lora.layers_to_transform=2, 7: the model has blocks 0 to 1"),
        (r".*layers\.0\..*", [1], "matches no linear layer of these blocks"),
    ],
)
def test_targets_that_a_model_has_not(tiny_llama, targets, layers, says):
    with pytest.raises(InputError) as error:
        targeted(linear_maps(tiny_llama()), targets, layers)
    assert says in str(error.value)
