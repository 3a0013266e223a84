"""One door for all kernels: what goes in comes out again, and nobody's forward is replaced twice."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import qalora
from qalora.kernels import install as kernels
from qalora.kernels import prefixes

ROWS = [{"prompt": f"Say {word}", "completion": f" {word} {word}"} for word in ("red", "blue", "green", "grey") * 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, save_tiny_llama) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("api") / "tiny")


@pytest.fixture
def base(folder):
    return qalora.load_base(str(folder), dtype="float32")


@pytest.fixture
def rows(base):
    return qalora.load_rows(ROWS, base.tokenizer)


def test_kernels_are_taken_back(folder, rows):
    ids = torch.tensor([rows[0]["input_ids"]])
    plain, model = (AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False) for _ in range(2))
    installed = qalora.install(model)
    assert {name: len(found) for name, found in installed.modules.items()} == {
        "RMSNorm": 5, "fused SwiGLU": 2, "fused q, k, v": 2
    }  # fmt: skip
    assert str(installed) == "RMSNorm (5), fused SwiGLU (2), fused q, k, v (2), shared prefixes"
    assert qalora.install(model) is installed and len(installed.modules["RMSNorm"]) == 5
    installed.remove()
    assert repr(model) == repr(plain) and not any("forward" in vars(module) for module in model.modules())
    assert model.config._attn_implementation == plain.config._attn_implementation
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert str(kernels.Installed(model)) == "none"


def test_a_forward_that_somebody_replaced_stays(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    theirs = model.model.norm.forward
    model.model.norm.forward = theirs
    installed = qalora.install(model)
    assert len(installed.modules["RMSNorm"]) == 4 and model.model.norm.forward is theirs


@pytest.mark.parametrize("four_bit", [False, True])
def test_a_model_can_be_copied_and_pickled_with_its_kernels(tiny_adapter, make_batch, four_bit, monkeypatch):
    model, batch = tiny_adapter(four_bit=four_bit).eval(), make_batch()
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    expected = model(**batch).logits
    for module in model.modules():  # a copy that shared anything would change too
        if hasattr(module, "A"):
            module.B.data.zero_()
    for copied in copies:
        assert repr(copied) == repr(model)
        assert torch.equal(copied(**batch).logits, expected)
        replaced = [module for module in copied.modules() if "forward" in vars(module)]
        assert len(replaced) == 9 and all(module.forward.args == (module,) for module in replaced)
        copied.get_base_model().kernels.remove()
        assert not any("forward" in vars(module) for module in copied.modules())
        torch.testing.assert_close(copied(**batch).logits, expected)
    registered = []
    monkeypatch.setattr(prefixes, "register", lambda: registered.append(True))
    pickle.loads(pickle.dumps(model))  # as in a process where nothing was installed
    assert registered
