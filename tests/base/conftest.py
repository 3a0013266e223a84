"""Models of transformers without weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM


@pytest.fixture
def meta_model():
    """make(fields of a config.json) → the causal LM that transformers makes of them."""

    def make(fields):
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))

    return make


@pytest.fixture
def linear_layers():
    """of(model, prefix) → (in, out) of the linear layers of its blocks, by their names, which begin with `prefix`."""

    def of(model, prefix: str = "model."):
        return {
            name.replace("model.", prefix, 1): (module.in_features, module.out_features)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and ".layers." in name
        }

    return of
