"""Is the merged model the adapter model? Both run on a few texts in fp32, block by block.

    the base as training loads it  + adapter ─────────────── exact ┐ explains all but the rounding
                                   + adapter, each sum rounded ────┤ must be equal
    the result as a reader that knows nothing of us loads it ──────┘

Neither side takes anything from the merge: files, tied heads, positions and dtypes are what its own loader makes of the
disk.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from qalora.base.checkpoint import Quantization, open_checkpoint
from qalora.base.device import best_device
from qalora.base.families import NAMES, WRAPPED
from qalora.base.loading import load_model
from qalora.base.parts import Part, from_checkpoint
from qalora.base.quantized import dequantize, is_4bit
from qalora.base.registry import ModelSource, resolve
from qalora.base.structure import text_part
from qalora.progress import Bar, in_place_of_transformers
from qalora.quiet import without

Update = tuple[Tensor, Tensor, float]  # A (r, in), B (out, r), scaling
Parts = Callable[[Part], PreTrainedModel]  # loads a part of a model
Rounding = Callable[[str, Tensor], Tensor]  # name, rows of a tensor → what a file holds of them, in fp32

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "Question: What is 17 + 25?\nAnswer:",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Write a short review of a family-friendly restaurant near the river.",
)
# Largest relative difference that rounding weights to the type is taken to explain.
TOLERANCE = {
    "float32": 1e-4, "f32": 1e-4, "float16": 5e-3, "f16": 5e-3, "bfloat16": 4e-2, "bf16": 4e-2,
    "q8_0": 1e-1, "q5_1": 0.5, "q5_0": 0.5, "q4_1": 1.0, "q4_0": 1.0,
}  # fmt: skip
UNEXPLAINED = 1e-3  # largest relative difference from the adapter model with rounded weights: that of the order of sums
ROTATION = 1e-4  # largest relative difference of the frequencies of positions, which a file holds in fp32
ROWS = 1 << 24  # weights of a linear layer that are in fp32 at a time


def as_trained(source: ModelSource, quantization: Quantization | None) -> Parts:
    """The base as training loads it; None: its weights as they are stored."""
    device = str(best_device())
    asked = quantization or Quantization(None, False, torch.float32)
    opened = open_checkpoint(source) if source.gguf_file else None
    return lambda part: load_model(source, asked, device, part, attention="sdpa", gguf=opened)


def as_read(folder: Path, gguf_file: str | None = None) -> Parts:
    """What was written, as transformers loads the folder, or by a GGUF file's own metadata."""
    if gguf_file:
        checkpoint, config = open_checkpoint(resolve(str(folder / gguf_file)))
        return lambda part: from_checkpoint(
            checkpoint, copy.deepcopy(config), part, dtype=torch.float32, device="cpu", attention="sdpa"
        )
    config = text_part(AutoConfig.from_pretrained(folder))
    names = NAMES if hasattr(config, WRAPPED) else None

    def load(part: Part) -> PreTrainedModel:
        loader: Any = part.of(config)
        model, report = loader.from_pretrained(
            folder, config=config, dtype="auto", key_mapping=names, output_loading_info=True
        )
        if report["missing_keys"]:  # transformers makes them up at random
            raise RuntimeError(f"{folder}: lacks {sorted(report['missing_keys'])[:3]}")
        return model  # type: ignore[no-any-return]

    return load


def compare(
    reference: Parts,
    updates: Mapping[str, Update],
    result: Parts,
    rounding: Rounding,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str] = TEXTS,
    *,
    longest: int | None = None,
) -> dict[str, object]:
    """Distances of the merged model from base + adapter over every position of the texts, in fp32 on the CPU.

    Args:
        longest: tokens of each text that are compared; None: all.

    Returns:
        max_logit_difference, mean_logit_difference: absolute.
        relative_difference: root mean square, over that of the logits about their mean.
        unexplained_difference: the same, from base + adapter with each weight rounded as the file's type does.
        position_difference: largest, of a frequency that positions are rotated by, or of their factor.
        kl: nats a token, of the merged model's predictions from the adapter model's.
        greedy_agreement: share of positions with the same likeliest token.
        mean_adapter_effect: mean absolute difference between adapter model and bare base.
    """
    rows = [tokenizer(text)["input_ids"][:longest] for text in texts]
    width, n = max(map(len, rows)), len(rows)
    # Padded on the right: under a causal mask nothing before it sees the padding.
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    real = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    with _quiet(), Bar("verifying") as bar:
        left, right = streamed(reference, updates, rounding, n), streamed(result)
        _count_blocks(bar, left, right)
        rotation = rotation_difference(left, right)
        groups = _logits(left, ids.repeat(3, 1))
        adapter, bare, rounded = (groups[k * n : (k + 1) * n][real] for k in range(3))
        del groups, left
        effect = (adapter - bare).abs().mean().item()
        del bare
        found = _logits(right, ids)[real]
    kl = F.kl_div(found.log_softmax(-1), adapter.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
    difference = (found - adapter).abs_()
    return {
        "max_logit_difference": difference.max().item(),
        "mean_logit_difference": difference.mean().item(),
        "relative_difference": _relative(found, adapter),
        "unexplained_difference": _relative(found, rounded),
        "position_difference": rotation,
        "kl": max(0.0, kl.item()),  # its rounding may fall below zero
        "greedy_agreement": (found.argmax(-1) == adapter.argmax(-1)).float().mean().item(),
        "mean_adapter_effect": effect,
    }


def fault(report: Mapping[str, Any], stored: str) -> str | None:
    """What is wrong with a merge by its comparison; None: nothing."""
    limits = {
        "relative_difference": (TOLERANCE[stored], f"of its logits, more than rounding to {stored} explains"),
        "unexplained_difference": (UNEXPLAINED, f"of its logits, beyond the rounding to {stored}"),
        "position_difference": (ROTATION, "in how it rotates positions"),
    }
    for name, (limit, what) in limits.items():
        if not report[name] <= limit:
            if name == "relative_difference" and report["unexplained_difference"] <= UNEXPLAINED:
                return (
                    f"rounding to {stored} alone changes the logits by {report[name]:.2g} ({limit:.2g} at most is "
                    "usual), for small changes of weights grow in this model; keep fp32 (--dtype float32, or "
                    "--gguf-type f32)"
                )
            return f"the merged model differs from base + adapter by {report[name]:.2g} {what} ({limit:.2g})"
    return None


def rotation_difference(left: PreTrainedModel, right: PreTrainedModel) -> float:
    """Of the frequencies and the factor that two models rotate positions with, at the start and the end of their
    context."""
    worst = 0.0
    for length in (2, left.config.max_position_embeddings):
        found = [_rotation(model, length) for model in (left, right)]
        if found[0].shape != found[1].shape:
            return math.inf
        worst = max(worst, ((found[0] - found[1]).abs() / found[0].abs().clamp_min(1e-30)).max().item())
    return worst


def _rotation(model: Any, length: int) -> Tensor:
    """Frequencies and factors, of every kind of layer where kinds differ; some ways of scaling depend on the length."""
    rotary, at = model.model.rotary_emb, torch.tensor([[0, length - 1]])
    if rotary is None:  # what is not rotated has a frequency of 0
        return torch.zeros(1)
    kinds: list[Any] = [{}]
    if isinstance(next(iter((model.config.rope_parameters or {}).values()), None), dict):
        kinds = [{"layer_type": kind} for kind in dict.fromkeys(model.config.layer_types)]
    for kind in kinds:
        rotary(torch.zeros(1), position_ids=at, **kind)
    found = vars(rotary) | dict(rotary.named_buffers())
    # Those in use: some ways of scaling keep others beside them.
    kept = [f"{kind['layer_type']}_" if kind else "" for kind in kinds]
    names = sorted(name for kind in kept for name in (f"{kind}inv_freq", f"{kind}attention_scaling") if name in found)
    return torch.cat([torch.as_tensor(found[name]).float().cpu().flatten() for name in names])


def streamed(
    parts: Parts, updates: Mapping[str, Update] | None = None, rounding: Rounding | None = None, n: int | None = None
) -> PreTrainedModel:
    """A model that computes in fp32 and loads each block when it is due, to drop it again.

    Args:
        n: rows of a group: of three groups in a batch the first has the updates added to the outputs of its linear
            layers, the second none, and the third has them added to the weights, which are rounded then; None: one
            group, as the weights are.
    """
    model: Any = parts(Part((), ends=True))
    wrapped = partial(_wrapped, updates=updates or {}, rounding=rounding, n=n)
    head_is_embeddings = model.lm_head.weight is model.model.embed_tokens.weight
    name = "model.embed_tokens" if head_is_embeddings else "lm_head"
    model.lm_head = wrapped(name, model.lm_head)
    _wrap_all(model.model, "model", wrapped)  # the blocks are not there yet
    model.model.layers = nn.ModuleList(_Block(parts, i, wrapped) for i in range(model.config.num_hidden_layers))
    if model.model.rotary_emb is not None:
        model.model.rotary_emb.cpu()
    return model.eval()  # type: ignore[no-any-return]


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers draws a bar for each part that it loads, and wonders at parts without linear layers."""
    wondering = "You are loading your model using eetq but no linear modules were found"
    with in_place_of_transformers(None), without("transformers.integrations.bitsandbytes", wondering):
        yield


def _count_blocks(bar: Bar, *models: Any) -> None:
    """The bar goes a step on with each block of the models that has been computed."""
    blocks = [block for model in models for block in model.model.layers]
    bar.expect(len(blocks))
    for block in blocks:
        block.register_forward_hook(lambda module, inputs, outputs: bar.advance())


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    """(rows, tokens, vocabulary) in fp32."""
    return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


def _relative(found: Tensor, expected: Tensor) -> float:
    spread = (expected - expected.mean(-1, keepdim=True)).square().mean().sqrt().item()
    return math.sqrt((found - expected).square().mean().item()) / spread


class _Block(nn.Module):
    def __init__(self, parts: Parts, index: int, wrapped: Callable[[str, nn.Module], nn.Module]):
        super().__init__()
        self.load = lambda: parts(Part((index,), ends=False)).model.layers._modules[str(index)]
        self.name, self.wrapped = f"model.layers.{index}", wrapped

    def forward(self, *args: Any, **options: Any) -> object:
        block: Any = self.load()
        _wrap_all(block, self.name, self.wrapped)
        for buffer in block.buffers():
            buffer.data = buffer.data.cpu().float() if buffer.is_floating_point() else buffer.data.cpu()
        return block.eval()(*args, **options)


def _wrap_all(root: nn.Module, prefix: str, wrapped: Callable[[str, nn.Module], nn.Module]) -> None:
    """Wraps every module that has weights; what is inside of others comes before them."""
    for name, module in reversed([*root.named_modules()][1:]):
        if (next(module.parameters(recurse=False), None) is not None and not _read_by_parent(module)) or any(
            map(_read_by_parent, module.children())
        ):
            _replace(root, name, wrapped(f"{prefix}.{name}", module))


def _read_by_parent(module: nn.Module) -> bool:
    """Whether a module's weights are read by the one that has it, past its forward."""
    return isinstance(module, nn.Conv1d)


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)


def _wrapped(
    name: str, module: Any, *, updates: Mapping[str, Update], rounding: Rounding | None, n: int | None
) -> nn.Module:
    if isinstance(module, nn.Linear):
        return _Linear(name, module, updates.get(name), rounding, n)
    if isinstance(module, nn.Embedding):
        return _Embedding(name, module, rounding, n)
    if next(module.children(), None) is not None:
        return _Composed(name, module, rounding, n)
    return _Other(name, module, rounding, n)


class _Groups(nn.Module):
    """Three groups of n rows each, of which the third meets rounded weights; n = None: one group, and weights as they
    are."""

    only: Literal["exact", "rounded"] | None = None  # the groups that a forward has now; None: all

    def __init__(self, name: str, rounding: Rounding | None, n: int | None):
        super().__init__()
        self.name, self.rounding, self.n = name, rounding, n

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that meet exact weights, and those that meet rounded ones."""
        if self.n is None or self.only == "exact":
            return x, x[:0]
        return (x[:0], x) if self.only == "rounded" else (x[: 2 * self.n], x[2 * self.n :])

    def rounded(self, kind: str, value: Tensor) -> Tensor:
        return value if self.rounding is None else self.rounding(f"{self.name}.{kind}", value)


def _joined(parts: Sequence[Any]) -> Any:
    """Outputs for several groups of rows as one: tensors in a row, tuples of them part by part; and of what is no
    tensor the first."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    if isinstance(parts[0], tuple):
        return tuple(map(_joined, zip(*parts, strict=True)))
    return parts[0]


class _Linear(_Groups):
    """Rows of the weight a stretch at a time, whatever it is stored in."""

    def __init__(self, name: str, linear: Any, update: Update | None, rounding: Rounding | None, n: int | None):
        super().__init__(name, rounding, n)
        self.linear, self.update = linear, update
        self.weight = torch.empty(0)  # transformers asks for its dtype

    def forward(self, x: Tensor) -> Tensor:
        """x: (rows, tokens, in) → (rows, tokens, out)."""
        out, start = [], 0
        exact, last = self.split(x)
        for weight in self._stretches():
            stop = start + len(weight)
            bias = None if self.linear.bias is None else self.linear.bias[start:stop].float().cpu()
            z = F.linear(exact, weight, bias)
            if self.update is not None:
                A, B, s = self.update
                z[: self.n] += F.linear(F.linear(exact[: self.n], A), B[start:stop]).mul_(s)
            if len(last):
                if self.update is not None:
                    weight = torch.addmm(weight, B[start:stop], A, alpha=s)
                bias = None if bias is None else self.rounded("bias", bias)
                z = torch.cat([z, F.linear(last, self.rounded("weight", weight), bias)])
            out.append(z)
            start = stop
        return torch.cat(out, dim=-1)

    def _stretches(self) -> Iterator[Tensor]:
        linear = self.linear
        weight = dequantize(linear, linear.compute_dtype) if is_4bit(linear) else linear.weight
        for rows in weight.split(max(1, ROWS // weight.shape[1])):
            yield rows.cpu().float()


class _Embedding(_Groups):
    """The rows of its matrix that are asked for, through its own forward, which may scale them."""

    def __init__(self, name: str, embedding: nn.Embedding, rounding: Rounding | None, n: int | None):
        super().__init__(name, rounding, n)
        self.rows, self.own = embedding.weight, embedding
        self.weight = torch.empty(0)
        embedding.padding_idx = None
        for buffer in embedding.buffers():
            buffer.data = buffer.data.cpu()

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (rows, tokens) → (rows, tokens, hidden)."""
        tokens, places = ids.unique(return_inverse=True)
        table = self.rows[tokens.to(self.rows.device)].cpu().float()
        exact, last = self.split(places)
        return torch.cat([self._of(exact, table), self._of(last, self.rounded("weight", table))])

    def _of(self, places: Tensor, table: Tensor) -> Tensor:
        self.own.weight = nn.Parameter(table, requires_grad=False)
        return self.own(places)  # type: ignore[no-any-return]


class _Other(_Groups):
    """A norm, or another module with small weights."""

    def __init__(self, name: str, module: nn.Module, rounding: Rounding | None, n: int | None):
        super().__init__(name, rounding, n)
        self.exact = module.cpu().float()
        self.last = copy.deepcopy(self.exact)
        for kind, parameter in self.last.named_parameters():
            parameter.data = self.rounded(kind, parameter.data)

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        groups = zip(*map(self.split, (x, *others)), strict=True)
        return torch.cat([own(*group) for own, group in zip((self.exact, self.last), groups, strict=True)])


class _Composed(_Groups):
    """A module with small weights of its own and others inside, such as a gated delta net or a short convolution: it
    runs for the exact groups and for the rounded one by themselves."""

    def __init__(self, name: str, module: nn.Module, rounding: Rounding | None, n: int | None):
        super().__init__(name, rounding, n)
        self.inside = [m for m in module.modules() if isinstance(m, _Groups)]
        self.exact = module
        skipped = {id(p) for m in self.inside for p in m.parameters()}
        for parameter in (p for p in module.parameters() if id(p) not in skipped):
            parameter.data = parameter.data.cpu().float()
        self.last = copy.copy(module)
        self.last._parameters, self.last._modules = dict(module._parameters), dict(module._modules)
        for kind, value in module.named_parameters(recurse=False):
            self.last._parameters[kind] = nn.Parameter(self.rounded(kind, value.data), requires_grad=False)
        for child, inner in module.named_children():
            if _read_by_parent(inner):
                self.last._modules[child] = again = copy.deepcopy(inner)
                for kind, value in again.named_parameters():
                    value.data = self.rounded(f"{child}.{kind}", value.data)

    def forward(self, *args: Any, **options: Any) -> Any:
        if self.n is None:
            return self.exact(*args, **options)
        out = []
        for last, own in ((False, self.exact), (True, self.last)):
            for module in self.inside:
                module.only = "rounded" if last else "exact"
            chosen = partial(self._chosen, last)
            out.append(own(*map(chosen, args), **{name: chosen(value) for name, value in options.items()}))
        return _joined(out)

    def _chosen(self, last: bool, value: Any) -> Any:
        rows = isinstance(value, Tensor) and value.ndim > 1 and self.n is not None and len(value) == 3 * self.n
        return self.split(value)[last] if rows else value
