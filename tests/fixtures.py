"""Tiny random LLaMAs, plain or in 4 bit, with and without adapters; batches; and Python in a process of its own.

Tests are imported by path (importmode=importlib), so helpers are fixtures that return functions.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from qalora.adapter.model import attach, gated_layers
from qalora.base.quantized import quantize_
from qalora.kernels import prefixes

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(2)

VOCAB = 128
hypothesis.settings.register_profile("untimed", deadline=None, max_examples=50)
hypothesis.settings.load_profile("untimed")
prefixes.register()  # tests set the attention by its name


@pytest.fixture
def tiny_llama():
    """make(dtype, four_bit, seed, **config) → a random LLaMA: hidden 64, 2 blocks, 4 heads over 2 kv heads."""
    return build_llama


def build_llama(
    dtype: torch.dtype = torch.float32,
    *,
    four_bit: bool = False,
    seed: int = 0,
    **config,
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,  # far from uniform predictions, so that losses and scores differ
        use_cache=False,
    )
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **config})).to(dtype).requires_grad_(False)
    if four_bit:
        quantize_(model, compute_dtype=dtype)
        model.is_loaded_in_4bit = True  # what transformers says of such a model, and PEFT asks for
    return model


@pytest.fixture(scope="session")
def save_tiny_llama():
    """save(path, **config) → path: a tiny random LLaMA in fp32 on disk, with a tokenizer of bytes and a chat
    template."""

    def save(path: Path, **config) -> Path:
        torch.manual_seed(0)
        tokenizer = byte_tokenizer()
        settings = dict(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.1,
        )
        LlamaForCausalLM(LlamaConfig(**(settings | config))).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return save


@pytest.fixture(scope="session")
def save_tiny():
    """save(path, model_type, **config) → path: a tiny random model of any family in fp32, with a tokenizer of bytes."""

    def save(path: Path, model_type: str, **config) -> Path:
        torch.manual_seed(0)
        tokenizer = byte_tokenizer()
        settings = dict(vocab_size=len(tokenizer) + 2, pad_token_id=0, bos_token_id=None, eos_token_id=1)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings | config))
        for (
            name,
            parameter,
        ) in model.named_parameters():  # norms of ones, and conv weights of nothing, would hide errors
            if parameter.ndim == 1 and not name.endswith("A_log"):
                parameter.data.add_(0.2 * torch.randn_like(parameter)).copy_(parameter.bfloat16())
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return save


def byte_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return tokenizer


@pytest.fixture
def tiny_adapter(tiny_llama, randomize_B):
    """make(r, alpha, dropout, targets, **tiny_llama's) → a PeftModel whose B is random: every rank matters."""

    def make(r: int = 4, alpha: int | None = None, dropout: float = 0.0, targets="all-linear", **base):
        model = attach(tiny_llama(**base), r=r, alpha=alpha or 2 * r, dropout=dropout, target_modules=targets, seed=1)
        return randomize_B(model)

    return make


@pytest.fixture
def adapted_module(tiny_adapter):
    """make(name, four_bit, dtype, …) → (a PeftModel that trains, that module of its base)."""

    def make(name: str, four_bit: bool = False, dtype: torch.dtype = torch.float32, **kwargs):
        model = tiny_adapter(four_bit=four_bit, dtype=dtype, **kwargs).train()
        return model, model.get_base_model().get_submodule(name)

    return make


@pytest.fixture
def inputs():
    """make(dtype, rows, tokens) → (rows, tokens, 64) random hidden states that need a gradient."""

    def make(dtype: torch.dtype = torch.float32, rows: int = 3, tokens: int = 7) -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)
        return torch.randn(rows, tokens, 64, generator=generator).to(dtype).requires_grad_()

    return make


@pytest.fixture
def gradients():
    """of(z, leaves) → the leaves' gradients of a weighted sum of z."""

    def of(z: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
        weights = torch.linspace(-1, 1, z.numel()).view(z.shape)
        return list(torch.autograd.grad((z.float() * weights).sum(), leaves))

    return of


@pytest.fixture
def randomize_B():
    """Gives every B (zero at birth) random values, in place."""

    def randomize(model, seed: int = 2, std: float = 0.05):
        generator = torch.Generator().manual_seed(seed)
        for layer in gated_layers(model).values():
            layer.B.data.copy_(torch.randn(layer.B.shape, generator=generator) * std)
        return model

    return randomize


@pytest.fixture
def make_batch():
    """make(rows, tokens, seed) → dict of input_ids, attention_mask, labels; prompts of different lengths carry no
    label."""

    def make(rows: int = 4, tokens: int = 12, seed: int = 3) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        input_ids = torch.randint(0, VOCAB, (rows, tokens), generator=generator)
        labels = input_ids.clone()
        for row in range(rows):
            labels[row, : 2 + row % 5] = -100
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}

    return make


@pytest.fixture(params=[1, 128 * 2**20], ids=["token by token", "at once"])
def stretch(request, monkeypatch):
    """fp32 temporaries of a single token, and of all of them: loops over stretches take many turns, and one."""
    monkeypatch.setattr("qalora.kernels.stretches.FP32_TEMPORARY", request.param)


@pytest.fixture(scope="module")
def undrawn():
    """Runs of this module draw no pictures, their page is empty, and PEFT writes no card at each save: nearly half of
    the time of a short run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peft.PeftModel.create_or_update_model_card", lambda *_: None)
        patch.setattr("qalora.training.finish.draw", lambda *_: None)
        patch.setattr("qalora.results.finish.render", lambda *_: "")
        yield


@pytest.fixture
def run_python():
    """run(code, *arguments) → standard output of a fresh interpreter; fails with its standard error."""

    def run(code: str, *arguments: object) -> str:
        root = Path(__file__).resolve().parents[1]
        path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=1200,
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


# Forks itself for each job: imports that every job would make are made once.
VANILLA = """
import json, os, sys, traceback
import bitsandbytes, torch
from transformers.models.auto import modeling_auto, tokenization_auto
from transformers.models.llama import modeling_llama
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        for number, file in enumerate(job["files"], 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv, failed = ["-c", *job["arguments"]], 1
        try:
            exec(job["code"], {"__name__": "__main__"})
            assert not any(name.partition(".")[0] == "qalora" for name in sys.modules)
            failed = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(failed)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="session")
def vanilla(tmp_path_factory):
    """run(code, *arguments) → standard output of a process with torch, transformers and bitsandbytes, which never heard
    of qalora; fails with its standard error."""
    folder = tmp_path_factory.mktemp("vanilla")
    with subprocess.Popen(
        [sys.executable, "-c", VANILLA], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder
    ) as forking:

        def run(code: str, *arguments: object) -> str:
            files = [folder / "said", folder / "errors"]
            job = {"code": code, "arguments": list(map(str, arguments)), "files": list(map(str, files))}
            print(json.dumps(job), file=forking.stdin, flush=True)
            assert forking.stdout.readline() == "0\n", files[1].read_text()
            return files[0].read_text()

        yield run
        forking.stdin.close()


# What `launch` runs in each process: some code of a test first, then a command.
LAUNCHED = """
import os, sys
sys.stdout = sys.stderr = open({log!r}, "w", buffering=1)
os.dup2(sys.stderr.fileno(), 2)
os.environ.update({variables!r})
import gc, torch
gc.freeze()
torch.set_num_threads(1)
from qalora import cli
from qalora.finetune import main
import qalora.results.finish, qalora.training.finish
qalora.training.finish.draw = lambda *_: None
qalora.results.finish.render = lambda *_: ""
RANK, SIZE = {rank}, {size}
{code}
sys.exit(cli.run(main, {argv!r}))
"""


@dataclass
class Launch:
    """Attributes: codes: exit codes; said: what each process printed; seconds: until the last one ended."""

    codes: list[int]
    said: list[str]
    seconds: float


@pytest.fixture(scope="session")
def forkserver():
    """Starts processes that have imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qalora.training.begin", "qalora.training.finish", "qalora.finetune"])
    return context


@pytest.fixture(scope="session")
def launch(forkserver, tmp_path_factory):
    """run(size, *argv, code) → `qalora finetune` in that many gloo processes, each with `code` before it, where RANK
    and SIZE are known; they draw nothing."""

    def run(size: int, *argv: object, code: str = "", timeout: float = 240) -> Launch:
        folder = tmp_path_factory.mktemp("launch")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        logs = [folder / f"{rank}.log" for rank in range(size)]
        started = time.monotonic()
        running = []
        for rank, log in enumerate(logs):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            text = LAUNCHED.format(
                log=str(log),
                variables={name: str(value) for name, value in variables.items()},
                rank=rank,
                size=size,
                code=code,
                argv=list(map(str, argv)),
            )
            running.append(forkserver.Process(target=exec, args=(text, {"__name__": "__launched__"})))
            running[-1].start()
        for process in running:
            process.join(max(0.0, timeout - (time.monotonic() - started)))
        late = [process for process in running if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        said = [log.read_text() if log.exists() else "" for log in logs]
        assert not late, f"still running after {timeout} s: {said}"
        return Launch([process.exitcode for process in running], said, time.monotonic() - started)

    return run


@pytest.fixture(scope="session")
def live_bytes():
    """live_bytes() → a context that counts the bytes alive in it (`.peak`)."""
    return LiveBytes


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations have made and nobody has let go of yet, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        existing = {t.untyped_storage()._cdata for t in tensors_of((*args, *kwargs.values()))} - self.alive.keys()
        out = function(*args, **kwargs)
        for tensor in tensors_of(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in existing and storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata)
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def tensors_of(value):
    """The tensors in what an operation takes or gives: a tensor, or sequences of them."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_of(part)
