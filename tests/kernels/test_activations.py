"""What a step keeps never changes what it computes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qalora.adapter.model import gated_layers
from qalora.kernels import activations, attention, low_rank, swiglu
from qalora.kernels.activations import checkpointing_of, set_checkpointing, set_mlp_tile


def gradients(model, batch) -> list[torch.Tensor]:
    model.train()
    model.zero_grad()
    model(**batch).loss.backward()
    return [grad.clone() for layer in gated_layers(model).values() for grad in (layer.A.grad, layer.B.grad)]


@pytest.mark.parametrize("four_bit", [False, True], ids=["plain", "4bit"])
@pytest.mark.parametrize("tile", [None, 5], ids=["whole MLP", "tiled MLP"])
@pytest.mark.parametrize("kept", [False, "selective", True, "offload"])
def test_gradients_are_those_of_the_plain_step(tiny_adapter, make_batch, kept, tile, four_bit):
    model, batch = tiny_adapter(four_bit=four_bit), make_batch()
    expected = gradients(model, batch)
    set_checkpointing(model, kept)
    set_mlp_tile(model, tile)
    assert checkpointing_of(model) == kept
    torch.testing.assert_close(gradients(model, batch), expected, rtol=1e-5, atol=1e-6)
    set_checkpointing(model, False)
    set_mlp_tile(model, None)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, batch), expected, strict=True))


def test_selective_runs_no_map_a_second_time(tiny_adapter, make_batch, monkeypatch):
    """Per block: four maps of attention and three of the MLP forward; nothing but norms and attention again."""
    calls = []
    plain = swiglu.map_forward
    for module in (low_rank, attention, swiglu):
        monkeypatch.setattr(module, "map_forward", lambda *args: calls.append(args[1].base) or plain(*args))
    model = tiny_adapter()
    expected = {False: 7, "selective": 7, True: 7 + 6}  # the down map's output is nobody's input
    for kind, per_block in expected.items():
        calls.clear()
        set_checkpointing(model, kind)
        gradients(model, make_batch())
        assert len(calls) == 2 * per_block


def test_selective_lets_go_of_what_it_kept(tiny_adapter, make_batch, monkeypatch):
    queues = []
    plain = activations.both_runs

    def watched(**kwargs):
        contexts = plain(**kwargs)
        queues.append(contexts[0].args[0].kept)
        return contexts

    monkeypatch.setattr(activations, "both_runs", watched)
    model = tiny_adapter()
    set_checkpointing(model, "selective")
    loss = model.train()(**make_batch()).loss
    assert [len(queue) for queue in queues] == [3, 3]  # q with k and v, o, and gate with up
    loss.backward()
    assert [len(queue) for queue in queues] == [0, 0]


def test_offload_hands_the_block_inputs_to_the_store_and_nothing_else(tiny_adapter, make_batch, monkeypatch):
    kept, fetched = [], []

    class Store:
        def keep(self, tensor):
            kept.append(tensor.shape)
            return tensor

        def fetched(self, tensor):
            fetched.append(tensor.shape)
            return tensor

    monkeypatch.setattr(activations, "_HostStore", Store)
    model = tiny_adapter()
    set_checkpointing(model, "offload")
    gradients(model, make_batch(rows=3, tokens=7))
    assert kept == fetched == [(3, 7, 64)] * 2  # one of each block


def test_a_tiled_mlp_works_on_so_many_tokens_at_a_time(tiny_adapter, make_batch):
    model = tiny_adapter()
    seen = []
    down = next(module for name, module in model.named_modules() if name.endswith("layers.0.mlp.down_proj"))
    down.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    set_mlp_tile(model, 5)
    with torch.no_grad():
        model(**make_batch(tokens=12))
    assert seen == [5, 5, 2]


@pytest.mark.parametrize("pins", [True, False], ids=["pinned", "not pinned"])
def test_host_memory_is_as_large_as_it_has_to_be_and_used_again(monkeypatch, pins):
    runtime = SimpleNamespace(cudaHostRegister=lambda *_: 0 if pins else 2, cudaHostUnregister=lambda address: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    memory = activations.HostMemory()
    first = memory.take(torch.ones(3, 5, dtype=torch.bfloat16))
    assert (len(first), first.dtype) == (30, torch.uint8)
    memory.free.append(first)
    assert memory.take(torch.ones(2, 5)[:1]) is first  # 20 bytes
    memory.free.append(first)
    assert len(memory.take(torch.ones(4, 5))) == 80
    assert not memory.free  # a piece too short for what comes now is let go of


def test_a_lack_of_host_memory_is_one_of_memory(monkeypatch):
    def empty(*shape, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    tensor = torch.ones(2)
    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(torch.OutOfMemoryError, match="host memory: DefaultCPUAllocator"):
        activations.HostMemory().take(tensor)
