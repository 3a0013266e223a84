"""A part of a model computes what it computes in the whole."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qalora.base.checkpoint import open_checkpoint
from qalora.base.parts import Part, from_checkpoint, whole
from qalora.base.registry import resolve


@pytest.fixture(scope="module")
def folder(save_tiny_llama, tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("parts") / "tiny")


def test_blocks_and_ends_of_a_part_are_those_of_the_whole(folder):
    config = AutoConfig.from_pretrained(folder)
    assert whole(config) == Part((0, 1), ends=True)
    all_of_it = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    part = Part((1,), ends=False).of(config).from_pretrained(folder)
    found = {name: tensor for name, tensor in part.state_dict().items() if "rotary" not in name}
    assert found and all(name.startswith("model.layers.1.") for name in found)
    assert all(torch.equal(tensor, all_of_it[name]) for name, tensor in found.items())


def test_a_model_from_a_checkpoint_is_transformers_own(folder):
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    checkpoint, config = open_checkpoint(resolve(str(folder)))
    ours = from_checkpoint(checkpoint, config, whole(config), dtype=torch.float32, device="cpu", attention="sdpa")
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
