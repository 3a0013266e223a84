"""The private names of other libraries that this project leans on: an upgrade that takes one away fails here first, by
its name."""

from __future__ import annotations

import inspect

import bitsandbytes as bnb
import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from gguf import GGUFWriter
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import get_pattern_key
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, Trainer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama import modeling_llama
from transformers.trainer_pt_utils import LengthGroupedSampler

# What training/trainer.py and adapter/variable_ranks.py override, and the parameters that they count on.
TRAINER = {
    "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
    "training_step": ["model", "inputs", "num_items_in_batch"],
    "_save": ["output_dir", "state_dict"],
    "_save_checkpoint": ["model", "trial"],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_load_best_model": [],
    "_get_output_dir": ["trial"],
    "_get_train_sampler": ["train_dataset"],
    "_load_optimizer_and_scheduler": ["checkpoint"],
    "_load_callback_state": [],
    "_init_training_state": ["max_steps"],
    "_run_epoch": [],
    "create_scheduler": ["num_training_steps"],
    "log": ["logs", "start_time"],
}


@pytest.mark.parametrize("name", TRAINER)
def test_the_trainer_has_what_is_overridden(name):
    found = list(inspect.signature(getattr(Trainer, name)).parameters)
    assert found[1 : 1 + len(TRAINER[name])] == TRAINER[name]


def test_a_block_asks_for_its_checkpointing_where_it_is_set(tiny_llama):
    """kernels/activations.py sets these two, and every block calls the function in train mode alone."""
    model, calls = tiny_llama().train(), []
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert len(blocks) == 2
    for block in blocks:
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = lambda forward, *inputs: calls.append(forward) or forward(*inputs)
    ids = torch.tensor([[1, 2, 3]])
    model(ids)
    assert len(calls) == 2
    model.eval()(ids)
    assert len(calls) == 2


def test_the_parts_of_a_llama_block_that_kernels_take_the_place_of():
    attention = inspect.signature(modeling_llama.LlamaAttention.forward).parameters
    assert (
        list(attention)[1:4] == ["hidden_states", "position_embeddings", "attention_mask"]
        and "past_key_values" in attention
    )
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling", "attention_dropout"} <= vars(
        modeling_llama.LlamaAttention(modeling_llama.LlamaConfig(num_hidden_layers=1), 0)
    ).keys() | dict(
        modeling_llama.LlamaAttention(modeling_llama.LlamaConfig(num_hidden_layers=1), 0).named_children()
    ).keys()
    norm = modeling_llama.LlamaRMSNorm(8)
    assert hasattr(norm, "variance_epsilon") and list(inspect.signature(norm.forward).parameters) == ["hidden_states"]
    assert list(inspect.signature(modeling_llama.LlamaMLP.forward).parameters) == ["self", "x"]


def test_attention_is_chosen_by_its_name(tiny_llama):
    model: PreTrainedModel = tiny_llama()
    assert model.config._attn_implementation == "sdpa"
    assert callable(AttentionInterface.register) and callable(AttentionMaskInterface.register)
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


def test_the_grouped_sampler_draws_with_its_own_generator():
    assert "generator" in inspect.signature(LengthGroupedSampler.__init__).parameters


def test_peft_takes_layers_of_ours_and_says_what_they_hold():
    config = LoraConfig(r=2, target_modules=["q_proj"], rank_pattern={"a.q_proj": 1}, exclude_modules=["b.q_proj"])
    assert callable(config._register_custom_module)
    assert get_pattern_key(config.rank_pattern.keys(), "a.q_proj") == "a.q_proj"
    assert check_target_module_exists(config, "a.q_proj") and not check_target_module_exists(config, "b.q_proj")
    for name in ("update_layer", "scaling", "merge", "unmerge", "merged", "active_adapters", "disable_adapters"):
        assert hasattr(LoraLayer, name) or hasattr(BaseTunerLayer, name) or name in inspect.getsource(LoraLayer)


def test_bitsandbytes_keeps_its_state_where_surgery_looks_for_it(tiny_llama):
    parameter = torch.nn.Parameter(torch.ones(64, 64))
    parameter.grad = torch.ones_like(parameter)
    optimizer = bnb.optim.AdamW8bit([parameter], min_8bit_size=0)
    optimizer.step()
    state = optimizer.state[parameter]
    assert {"state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"} <= state.keys()
    assert callable(optimizer.get_state_buffer) and isinstance(optimizer.page_mng.paged_tensors, list)
    layer = next(module for module in tiny_llama(four_bit=True).modules() if isinstance(module, Linear4bit))
    assert {"absmax", "shape", "dtype", "blocksize", "quant_type"} <= vars(layer.weight.quant_state).keys()
    assert hasattr(layer, "support_avx512bf16_for_cpu") and hasattr(layer, "compute_type_is_set")


def test_gguf_packs_values_where_ours_writes_empty_lists():
    assert list(inspect.signature(GGUFWriter._pack_val).parameters)[1:] == ["val", "vtype", "add_vtype", "sub_type"]


def test_transformers_reports_what_a_folder_lacks(tmp_path, tiny_llama):
    tiny_llama().save_pretrained(tmp_path)
    _, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert list(report["missing_keys"]) == []
