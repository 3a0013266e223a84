"""Attach adapters to a frozen base, list and count them, keep PEFT's config in step, save and load.

What reaches the disk is a plain PEFT LoRA: vanilla PEFT reads it without this package.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel

from qalora.adapter.layer import GatedLinear
from qalora.adapter.provenance import Provenance
from qalora.adapter.saved import PREFIX, rank_of, read_adapter, scaling_of, whole
from qalora.adapter.targets import EVERY, targeted
from qalora.arguments import whole as check_whole
from qalora.base.families import TEXT
from qalora.base.quantized import guard_cpu_packing, linear_maps
from qalora.card_files import keep_users_card
from qalora.errors import AnswerNo, InputError
from qalora.files import written_beside
from qalora.kernels.install import install
from qalora.kernels.loss import check_head
from qalora.progress import console

ADAPTER = "default"


def attach(
    model: PreTrainedModel,
    *,
    r: int,
    alpha: int,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = EVERY,
    layers_to_transform: int | Sequence[int] | None = None,
    seed: int = 0,
) -> PeftModel:
    """Puts an adapter of ours on every targeted linear layer, and the kernels of ours into the model, which
    `print(model)` shows.

    A layer computes z = W x + alpha / r · B A x (arXiv 2403.16187, §3.2): rows of A Kaiming-uniform as in PEFT, B zero,
    both fp32, and fp32 again when training begins where a trainer has cast them.

    Args:
        model: a causal LM of transformers in 4, 16 or 32 bits, from `load_base` or loaded by transformers; it is
            frozen. An adapter of ours that is on it already is taken off.
        r: ranks per module; the budget of a run is r times the modules.
        alpha: the scaling is alpha / r, and stays so whatever the ranks become.
        dropout: of the adapter's inputs while training.
        target_modules: all-linear; names or their ends (["q_proj", "v_proj"]); or a regular expression that matches
            whole names.
        layers_to_transform: the block or the blocks that get adapters, from 0; None: all.
        seed: of A.

    Returns:
        A PeftModel, with whatever PEFT offers for one; `save_pretrained` writes a plain PEFT LoRA.

    Raises:
        InputError: a target or a block that the model has not, a value out of range, or a PeftModel in the place of its
            base.
    """
    _check_model(model)
    check_whole("r", r)
    if not (isinstance(alpha, (int, float)) and 0 < alpha < math.inf):
        raise InputError(f"alpha={alpha!r}: takes a number above 0; the scaling is alpha / r.")
    if not (isinstance(dropout, (int, float)) and 0 <= dropout < 1):
        raise InputError(f"dropout={dropout!r}: takes a share from 0 to below 1.")
    names = list(linear_maps(model))
    blocks = [layers_to_transform] if isinstance(layers_to_transform, int) else layers_to_transform
    try:
        chosen = targeted(names, target_modules, blocks)
    except InputError as error:  # in a recipe they are settings of `lora`
        raise InputError(error.as_typed.removeprefix("lora.")) from None
    # The ends of names where they say it all, for that is the form which every reader of adapters knows.
    ends = {name.rpartition(".")[2] for name in chosen}
    all_of_them = [name for name in names if name.rpartition(".")[2] in ends]
    targets: Any = sorted(ends) if len(all_of_them) == len(chosen) else chosen
    if targets is not chosen and any(f".{TEXT}." in name for name in chosen):  # vision has layers of the same names
        targets = rf".*\.{TEXT}\..*\.({'|'.join(targets)})"
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _with_gated_layers(model, config)


def load_adapter(
    model: PreTrainedModel, path: str | Path, *, trainable: bool = False, dropout: float | None = None
) -> PeftModel:
    """Puts a saved plain PEFT LoRA, ours or any other, on a base, with weights in fp32.

    Args:
        model: its base, see `attach`.
        path: its folder.
        trainable: to train it further; else it is frozen.
        dropout: of the adapter's inputs while training; None: what its config says.

    Raises:
        InputError: not an adapter, not a plain LoRA, made for another model, or with a weight that is not finite.
    """
    _check_model(model)
    saved = read_adapter(path).fitted({name: (m.in_features, m.out_features) for name, m in linear_maps(model).items()})
    config = saved.config
    config.inference_mode = not trainable
    if dropout is not None:
        config.lora_dropout = dropout
    config.init_lora_weights = True  # the start is overwritten below, and some need more than a config (EVA)
    peft_model = _with_gated_layers(model, config)
    layers = gated_layers(peft_model)
    if missing := sorted(set(layers) - set(saved.pairs)):
        raise InputError(f"{path}: the config targets {missing[0]} but the file has no weights for it.")
    with torch.no_grad():
        for name, (A, B) in saved.pairs.items():
            layers[name].A.copy_(A)
            layers[name].B.copy_(B)
    return peft_model


def save_adapter(model: PeftModel, path: str | Path, provenance: Provenance | None = None) -> None:
    """Writes the adapter as a plain PEFT LoRA, beside its place and moved there once it has been read back equal. A
    README.md that a user wrote there stays.

    Args:
        model: from `attach` or `load_adapter`.
        path: a folder, which it takes the place of.
        provenance: what is known of its base, written into the same folder as qalora.json: `LoadedBase.provenance()`.

    Raises:
        AnswerNo: the adapter is empty, not finite or untrained (every B zero).
        InputError: the model has none, or another one is active.
        RuntimeError: the file does not read back equal.
    """
    if not isinstance(model, PeftModel):
        check_adapted(model, "save_adapter")
    check_own(model, "save_adapter")
    layers = gated_layers(model)
    if not layers:
        raise AnswerNo("every rank was pruned: there is no adapter to save; set allocation.min_rank=1.")
    if not is_finite(model):
        raise AnswerNo(
            "the adapter holds weights that are not finite, and is not saved; lower training.learning_rate, or "
            "continue an earlier checkpoint."
        )
    if not any(bool(layer.B.any()) for layer in layers.values()):
        raise AnswerNo("the adapter is untrained (every B is zero), and is not saved; train for more steps.")
    with written_beside(path) as partial:
        write_adapter(model, partial)
        keep_users_card(Path(path), partial)
        if provenance is not None:
            provenance.write(partial)


def is_finite(model: PeftModel) -> bool:
    """Whether every weight of the adapter is a number."""
    return all(
        bool(torch.isfinite(layer.A).all() & torch.isfinite(layer.B).all()) for layer in gated_layers(model).values()
    )


def write_adapter(model: PeftModel, path: str | Path) -> None:
    """Writes the adapter into a folder and reads it back.

    Raises:
        RuntimeError: the file does not read back equal.
    """
    # Left to itself, PEFT asks the Hub at every save whether the vocabulary has grown.
    model.save_pretrained(str(path), save_embedding_layers=False)
    verify_saved(model, path)


def verify_saved(model: PeftModel, path: str | Path) -> None:
    """Compares a saved adapter with the live one: every tensor, and every rank and scaling that PEFT will derive.

    Raises:
        RuntimeError: any difference.
    """
    saved, layers = read_adapter(path), gated_layers(model)
    if saved.pairs.keys() != layers.keys():
        others = sorted(saved.pairs.keys() ^ layers.keys())[:3]
        raise RuntimeError(f"{path}: holds other modules than the model: {others}")
    for name, layer in layers.items():
        A, B = saved.pairs[name]
        if not (torch.equal(A, layer.A.detach().cpu()) and torch.equal(B, layer.B.detach().cpu())):
            raise RuntimeError(f"{path}: the weights of {name} do not read back equal")
        if (rank_of(saved.config, name), scaling_of(saved.config, name)) != (len(A), layer.s):
            raise RuntimeError(f"{path}: the config gives {name} another rank or scaling than it has")


def check_adapted(model: nn.Module, caller: str) -> None:
    """
    Args:
        caller: the public name that needs an adapter.

    Raises:
        InputError: the model has none of ours, or it does not count now.
    """
    layers = gated_layers(model).values() if isinstance(model, PeftModel) else ()
    if not layers:
        raise InputError(f"{caller}: the model has no adapter of ours; make it with attach or load_adapter.")
    if any(layer.disable_adapters for layer in layers):
        raise InputError(f"{caller}: the adapter is switched off; leave `with model.disable_adapter()` first.")
    if any(layer.merged for layer in layers):
        raise InputError(f"{caller}: the adapter is merged into the base; call `model.unmerge_adapter()` first.")


def check_own(model: PeftModel, caller: str) -> None:
    """
    Raises:
        InputError: another adapter than the one that `attach` and `load_adapter` make is active, or several are.
    """
    if model.active_adapters != [ADAPTER]:
        active = ", ".join(map(repr, model.active_adapters))
        raise InputError(
            f"{caller}: it works on the adapter {ADAPTER!r}, and active is {active}; "
            f"call `model.set_adapter({ADAPTER!r})` first."
        )


def gated_layers(model: PeftModel) -> dict[str, GatedLinear]:
    """Full module name, as rank_pattern writes it → layer, in the model's order."""
    return {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, GatedLinear) and module.adapters
    }


def ranks(model: PeftModel) -> dict[str, int]:
    """The present rank of every module that has any.

    Returns:
        Full module name, as PEFT's rank_pattern writes it → rank.
    """
    return {name: len(layer.A) for name, layer in gated_layers(model).items()}


def rank_parameters(model: PeftModel, names: Iterable[str]) -> dict[str, int]:
    """Full module name → parameters of one rank: a row of A and a column of B."""
    base: Any = model.get_base_model()
    maps = {name: base.get_submodule(name) for name in names}
    return {name: module.in_features + module.out_features for name, module in maps.items()}


def sync_config(model: PeftModel) -> None:
    """Writes the present ranks into the LoraConfig, so that whatever PEFT saves can be loaded again.

    Every module has a full-name entry in rank_pattern and in alpha_pattern (alpha = scaling · rank). Modules without a
    layer that the targets name, those that lost all ranks or never had any, are listed in exclude_modules, for PEFT
    refuses a rank of 0.
    """
    config = cast(LoraConfig, model.peft_config[ADAPTER])
    layers = gated_layers(model)
    if not layers:
        return
    s = next(iter(layers.values())).s
    config.r = max(ranks(model).values())
    config.lora_alpha = whole(s * config.r)
    config.rank_pattern = ranks(model)
    config.alpha_pattern = {name: whole(layer.s * len(layer.A)) for name, layer in layers.items()}
    config.use_rslora = False  # its scaling would follow the rank; the patterns hold whatever scaling it gave
    config.exclude_modules = None
    config.exclude_modules = _bare_targets(model, config, layers) or None


def _bare_targets(model: PeftModel, config: LoraConfig, layers: Collection[str]) -> list[str]:
    """Modules of any kind that the config's targets name, and that carry no layer."""
    within = tuple(f"{name}." for name in layers)
    return [
        name
        for name, _ in model.get_base_model().named_modules()
        if name and name not in layers and check_target_module_exists(config, name) and not name.startswith(within)
    ]


def add_layer(model: PeftModel, name: str) -> GatedLinear:
    """Puts a gated layer that has no ranks yet in the place of a frozen map, and returns it; PEFT's config stays."""
    config = cast(LoraConfig, model.peft_config[ADAPTER])
    parent, _, child = (PREFIX + name).rpartition(".")
    owner = model.get_submodule(parent)
    base: Any = getattr(owner, child)
    with torch.random.fork_rng(devices=[]):  # PEFT draws rows of A, and has no layer with fewer than one
        layer = GatedLinear(base, ADAPTER, config, r=1, lora_alpha=1)
    layer.scaling[ADAPTER] = scaling_of(config, name)
    device = base.weight.device
    layer.A.data = torch.empty(0, base.in_features, device=device)
    layer.B.data = torch.empty(base.out_features, 0, device=device)
    setattr(owner, child, layer.train(owner.training))
    return layer


def settle_scalings(model: PeftModel) -> None:
    """Gives each module a scaling that alpha over rank is exactly, whatever its rank becomes; the function stays the
    same.

    rsLoRA's alpha / √r, for one, may not be: the nearest power of two takes its place, and B the factor between them.
    """
    config = cast(LoraConfig, model.peft_config[ADAPTER])
    for layer in gated_layers(model).values():
        s = layer.s
        if config.use_rslora or any((s * r) / r != s for r in range(1, 1025)):
            settled = 2.0 ** round(math.log2(s))
            layer.B.data.mul_(s / settled)
            layer.scaling[ADAPTER], layer.lora_alpha[ADAPTER] = settled, settled * len(layer.A)
    sync_config(model)


def remove_layer(model: PeftModel, name: str) -> None:
    """Puts the frozen map back in the place of its gated layer."""
    parent, _, child = (PREFIX + name).rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, child, getattr(owner, child).base_layer)


def _take_off(model: PreTrainedModel) -> None:
    """Puts the frozen maps back in the place of gated layers, whose PeftModel nobody unloaded."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, GatedLinear)]
    for name, layer in layers:
        if layer.merged:
            layer.unmerge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base_layer)
    if layers:
        model.__dict__.pop("peft_config", None)  # else PEFT warns of a second adapter


def _with_gated_layers(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    from bitsandbytes.nn import Linear4bit

    if isinstance(model, PeftModel):
        raise InputError("model: it has an adapter already; pass its base, which `model.unload()` gives back.")
    _take_off(model)
    guard_cpu_packing(model)
    check_head(model)
    config._register_custom_module({Linear4bit: GatedLinear, nn.Linear: GatedLinear})
    peft_model = get_peft_model(model, config, adapter_name=ADAPTER)
    for layer in gated_layers(peft_model).values():
        layer.A.data, layer.B.data = layer.A.data.float(), layer.B.data.float()
    install(peft_model)
    peft_model.__dict__["train"] = partial(_train_in_fp32, peft_model)
    return peft_model


def _train_in_fp32(model: PeftModel, mode: bool = True) -> PeftModel:
    """`model.train`. Trainers cast an adapter before that: TRL's to bf16, wherever the base is in 4 bits."""
    if mode:
        to_fp32(model)
    return cast(PeftModel, type(model).train(model, mode))


def to_fp32(model: PeftModel) -> None:
    """Adapters of 16 bits, as some trainers make them, become fp32, and a line says so: small updates round away in
    16."""
    found = [
        parameter
        for layer in gated_layers(model).values()
        for parameter in (layer.A, layer.B)
        if parameter.dtype != torch.float32
    ]
    for parameter in found:
        parameter.data = parameter.data.float()
        parameter.grad = None
    if found:
        console.print("the adapter's weights had been cast to 16 bits: they are trained in fp32")


def _check_model(model: object) -> None:
    """
    Raises:
        InputError: no model.
    """
    if not isinstance(model, nn.Module):
        hint = "load_base(…).model" if hasattr(model, "model") else "a causal LM of transformers"
        raise InputError(f"model: a {type(model).__name__} is none; pass {hint}.")
