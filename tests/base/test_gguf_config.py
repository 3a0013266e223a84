"""A GGUF file as base: positions are scaled as in the model that it was made of, or it is refused."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from qalora.adapter.model import attach, write_adapter
from qalora.base import gguf_config as module
from qalora.base.gguf_reader import GGUFReader
from qalora.base.loading import load_base, load_tokenizer
from qalora.base.registry import resolve
from qalora.deploy.merging import merge
from qalora.errors import InputError

LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS = {
    "Llama 3.1": {**LLAMA3, "factor": 8.0},
    "Llama 3.2": {**LLAMA3, "factor": 32.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": YARN,
    "yarn with a factor of its own": {**YARN, "attention_factor": 0.7},
    "none": {"rope_type": "default"},
}


@pytest.fixture
def exported(save_tiny_llama, tmp_path):
    """exported(config …) → (folder of the model, its GGUF file, made by a merge that adds nothing)."""

    def export(rope_parameters=None, **config):
        folder = save_tiny_llama(tmp_path / "model", **config)
        (tmp_path / "adapter").mkdir()
        write_adapter(attach(AutoModelForCausalLM.from_pretrained(folder), r=1, alpha=1), tmp_path / "adapter")
        if rope_parameters is not None:
            text = json.loads((folder / "config.json").read_text()) | {"rope_parameters": rope_parameters}
            (folder / "config.json").write_text(json.dumps(text))
        merge(
            resolve(str(folder)),
            tmp_path / "adapter",
            tmp_path / "gguf",
            quantization=None,
            format="gguf",
            gguf_type="f32",
        )
        return folder, tmp_path / "gguf" / "model.gguf"

    return export


def load(folder, file, **options):
    """With the folder's tokenizer, for transformers cannot read one without merges from GGUF."""
    return load_base(resolve(str(file)), dtype="float32", tokenizer=load_tokenizer(resolve(str(folder))), **options)


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_positions_are_scaled_as_in_the_model(exported, scaling):
    rope = {"rope_theta": 500_000.0, **scaling}
    folder, file = exported(max_position_embeddings=256, rope_parameters=rope)
    ids = torch.randint(3, 40, (1, 200), generator=torch.Generator().manual_seed(0))
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).logits
    base = load(folder, file, load_in_4bit=False)
    found = base.model.config.rope_parameters
    assert found == {key: value if isinstance(value, str) else pytest.approx(value) for key, value in rope.items()}
    torch.testing.assert_close(base.model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_yarn_folds_into_one_factor_is_kept_as_one(exported):
    """mscale and mscale_all_dim have no keys of their own."""
    rope = {"rope_theta": 500_000.0, **YARN, "mscale": 0.5, "mscale_all_dim": 2.0}
    folder, file = exported(max_position_embeddings=256, rope_parameters=rope)
    ids = torch.randint(3, 40, (1, 200), generator=torch.Generator().manual_seed(0))
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).logits
    base = load(folder, file, load_in_4bit=False)
    mscale = (0.1 * 0.5 * math.log(4) + 1) / (0.1 * 2.0 * math.log(4) + 1)
    assert base.model.config.rope_parameters["attention_factor"] == pytest.approx(mscale)
    torch.testing.assert_close(base.model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type=dynamic"),
        ({**YARN, "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}, "rope_type=longrope"),
        ({**YARN, "truncate": False}, "yarn with truncate=False"),
        ({**YARN, "beta_fast": 1.5}, "yarn with beta_fast=1.5"),
        ({**YARN, "beta_slow": 0.3}, "yarn with beta_slow=0.3"),
        ({"rope_type": "spiral"}, "rope_type=spiral: transformers knows no such scaling"),
        ({"rope_type": "llama3", "factor": 8.0}, "Missing required keys .*llama3"),
    ],
    ids=["dynamic", "longrope", "untruncated", "fast", "slow", "unknown", "incomplete"],
)
def test_a_scaling_without_a_form_in_gguf_is_refused_by_name(exported, rope, named):
    with pytest.raises(InputError, match=named):
        exported(max_position_embeddings=256, rope_parameters={"rope_theta": 10_000.0, **rope})


@pytest.mark.parametrize(
    ("key", "value"),
    [("yarn_attn_factor", 0.5), ("yarn_ext_factor", 0.5), ("yarn_beta_fast", 0.5), ("attn_factor", 0.5)],
    ids=str,
)
def test_keys_that_readers_of_gguf_take_in_different_ways_are_refused(tmp_path, key, value):
    """attn_factor without yarn, and keys of llama.cpp's converter that llama.cpp does not read."""
    kind = "linear" if key == "attn_factor" else "yarn"
    fields = {f"llama.rope.scaling.{name}": field for name, field in {"type": kind, "factor": 4.0, key: value}.items()}
    reader = SimpleNamespace(fields={name: SimpleNamespace(contents=lambda v=v: v) for name, v in fields.items()})
    config = SimpleNamespace(model_type="llama", max_position_embeddings=64)
    with pytest.raises(InputError, match=f"{kind} with {key} 0.5"):
        module._scaling(reader, {}, config, tmp_path)


def test_a_factor_without_a_type_is_linear_as_llama_cpp_has_it(tmp_path):
    config = SimpleNamespace(model_type="llama", max_position_embeddings=64)
    for name in ("scaling.factor", "scale_linear"):
        reader = SimpleNamespace(fields={f"llama.rope.{name}": SimpleNamespace(contents=lambda: 4.0)})
        assert module._scaling(reader, {}, config, tmp_path) == {"rope_type": "linear", "factor": 4.0}


def test_frequencies_that_are_divided_in_another_way_are_read_as_they_are(exported, tmp_path):
    """As llama.cpp does, which knows no settings of Llama 3.1 but the divisors that come of them; and written again
    so."""
    rope = {
        "rope_theta": 500_000.0,
        **LLAMA3,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "low_freq_factor": 2.0,
    }
    folder, file = exported(max_position_embeddings=256, rope_parameters=rope)
    ids = torch.randint(3, 40, (1, 250), generator=torch.Generator().manual_seed(0))
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).logits
    base = load(folder, file, load_in_4bit=False)
    torch.testing.assert_close(base.model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    divisors = torch.from_numpy(
        next(tensor.data.copy() for tensor in GGUFReader(str(file)).tensors if tensor.name == module.FREQUENCIES)
    )
    torch.testing.assert_close(torch.from_numpy(module.rope_divisors(base.model.config)), divisors)


@pytest.mark.parametrize("kind", ["attention_bias", "mlp_bias"])
def test_biases_of_a_llama_are_read(exported, kind):
    """Which transformers leaves out, and says nothing."""
    folder, file = exported(**{kind: True})
    assert any(tensor.name.endswith(".bias") for tensor in GGUFReader(str(file)).tensors)
    ids = torch.randint(3, 40, (1, 20), generator=torch.Generator().manual_seed(0))
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(
        load(folder, file, load_in_4bit=False).model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4
    )
