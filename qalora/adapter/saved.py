"""A plain PEFT LoRA as it lies on the disk, ours or any other: read, and checked against the model it is put on."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor

from qalora.base.families import in_decoder
from qalora.base.registry import ModelSource, read_fields, shape_of
from qalora.errors import InputError

PREFIX = "base_model.model."  # of every name in the file
MERGED_BY_PEFT = (
    "; what works: merge it into the 16-bit base with PEFT (PeftModel.from_pretrained(base, DIR).merge_and_unload()), "
    "save that model with its tokenizer, and pass its folder as --model"
)
# PEFT merges into the one weight that a tied head and the embeddings share.
UNTIED = f"{MERGED_BY_PEFT} (where head and embeddings are tied, PEFT merges them wrongly: train without them)"
# Fields of adapter_config.json that make another function of the adapter: what they stand for, and what to do.
VARIANTS = {
    "use_dora": ("magnitudes (DoRA)", MERGED_BY_PEFT),
    "use_qalora": ("pooled inputs (PEFT's QALoRA)", ""),
    "use_bdlora": ("block-diagonal matrices (BD-LoRA)", ""),
    "arrow_config": ("a router (Arrow)", ""),
    "kasa_config": ("singular values of the base (KaSA)", ""),
    "monteclora_config": ("random matrices (MonteCLoRA)", ""),
    "velora_config": ("compressed activations (VeLoRA)", ""),
    "alora_invocation_tokens": ("tokens that switch it on (activated LoRA)", ""),
    "modules_to_save": ("whole copies of other layers", UNTIED),
    "lora_bias": ("biases", MERGED_BY_PEFT),
    "layer_replication": ("replicated blocks", ""),
    "trainable_token_indices": ("rows of the embeddings", UNTIED),
    "target_parameters": ("updates of bare parameters", MERGED_BY_PEFT),
}


@dataclass(frozen=True)
class SavedAdapter:
    """
    Attributes:
        path: its folder.
        pairs: full module name → (A (r, in), B (out, r)), on the CPU, in the dtype of the file; fp32 of one of 8 bits.
    """

    path: Path
    config: LoraConfig
    pairs: dict[str, tuple[Tensor, Tensor]]

    @property
    def total_rank(self) -> int:
        return sum(len(A) for A, _ in self.pairs.values())

    def fitted(self, maps: Mapping[str, tuple[int, int]]) -> SavedAdapter:
        """The same under the names that a model has for its modules: those of a decoder alone and of one inside of a
        vision model differ.

        Args:
            maps: as of `check_fit`.

        Raises:
            InputError: as `check_fit`.
        """
        theirs = {in_decoder(name): name for name in maps}
        names = {name: theirs.get(in_decoder(name), name) for name in self.pairs}
        if all(old == new for old, new in names.items()):
            self.check_fit(maps)
            return self
        config = copy.deepcopy(self.config)
        config.target_modules, config.exclude_modules = sorted(names.values()), None
        config.rank_pattern = {names[name]: len(A) for name, (A, _) in self.pairs.items()}
        config.alpha_pattern = {
            new: scaling_of(self.config, name) * (len(A) ** 0.5 if config.use_rslora else len(A))
            for (name, (A, _)), new in zip(self.pairs.items(), names.values(), strict=True)
        }
        fitted = SavedAdapter(self.path, config, {names[name]: pair for name, pair in self.pairs.items()})
        fitted.check_fit(maps)
        return fitted

    def check_fit(self, maps: Mapping[str, tuple[int, int]]) -> None:
        """
        Args:
            maps: full module name → (in, out) of every linear map of the model's blocks.

        Raises:
            InputError: the adapter has a module that the model lacks, or another shape for it, or a rank that is
                another by its config.
        """
        for name, (A, B) in self.pairs.items():
            if name not in maps:
                raise InputError(
                    f"{self.path}: the adapter has weights for {name}, which the model lacks; it was made for another "
                    "model."
                )
            if (A.shape[1], B.shape[0]) != maps[name]:
                raise InputError(
                    f"{self.path}: {name} is {(B.shape[0], A.shape[1])} in the adapter and {maps[name][::-1]} in the "
                    "model (out, in); it was made for another model."
                )
            if len(A) != rank_of(self.config, name):
                raise InputError(
                    f"{self.path}: {name} has rank {len(A)} in the file and {rank_of(self.config, name)} by the config."
                )


def read_adapter(path: str | Path) -> SavedAdapter:
    """
    Raises:
        InputError: no adapter there, a variant of LoRA whose function is not s · B A x, or a weight that is not finite.
    """
    return SavedAdapter(Path(path), read_config(path), _paired(_read_tensors(path), path))


def check_adapter(path: str | Path, source: ModelSource) -> SavedAdapter:
    """Reads an adapter, and refuses, before the base is loaded, one that could not be put on it.

    Raises:
        InputError: as `read_adapter`, or the adapter was made for another model.
    """
    return read_adapter(path).fitted(shape_of(source).linear_maps())


def read_config(path: str | Path) -> LoraConfig:
    """The LoraConfig of a saved adapter.

    Raises:
        InputError: no adapter there, or a variant of LoRA whose function is not s · B A x.
    """
    file = Path(path) / "adapter_config.json"
    if not file.is_file():
        raise InputError(f"{path}: not an adapter, {_what_is_there(Path(path))}")
    fields = read_fields(file)
    if fields.get("peft_type") != "LORA":
        kind = fields.get("peft_type") or "missing"
        raise InputError(f"{file}: peft_type is not LORA (it is {kind}); only plain LoRA adapters work.")
    for variant, (what, advice) in VARIANTS.items():
        if fields.get(variant):
            raise InputError(
                f"{file}: {variant} is set; only plain LoRA adapters work, and this one has {what}{advice}."
            )
    start = str(fields.get("init_lora_weights")).lower()
    if start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise InputError(
            f"{file}: init_lora_weights={start} took weights out of the base, and the adapter only fits what it left; "
            "save it with PEFT's path_initial_model_for_weight_conversion, or set it to true if --model is the base "
            "that was left."
        )
    _check_numbers(fields, file)
    return LoraConfig.from_pretrained(str(path))


def _what_is_there(path: Path) -> str:
    """The rest of a sentence on a path without an adapter_config.json: what it is, and what to pass instead."""
    if path.suffix == ".gguf" or (path / "adapter.gguf").is_file():
        return "but one in GGUF, which llama.cpp reads; pass the PEFT adapter that it was made from."
    if path.is_file():
        return f"but a file; pass the folder of an adapter, such as {path.parent}."
    if not path.is_dir():
        on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.parent.exists()
        hint = f"; of one on the Hub, `hf download {path} --local-dir DIR` makes one" if on_hub else ""
        return f"there is no such folder{hint}."
    below = _adapters_below(path)
    if (path / "recipe.yaml").is_file() and not (path / "trainer_state.json").is_file() and below:
        return f"but the folder of a run; pass the adapter in it: --adapter {below[0]}"
    if below:
        more = f" (and {len(below) - 3} more)" if len(below) > 3 else ""
        return f"but a folder that holds some; pass one of them: {', '.join(map(str, below[:3]))}{more}"
    if (path / "config.json").is_file():
        return f"but a whole model; pass it as --model {path}, without --adapter."
    if any(path.glob("adapter_model.*")):
        return "there is no adapter_config.json beside its weights; copy that file along."
    return "there is no adapter_config.json."


def _adapters_below(path: Path) -> list[Path]:
    """Folders of adapters at most two levels down: finished ones first, then checkpoints, the newest first."""

    def order(folder: Path) -> tuple[Any, ...]:
        step = folder.name.removeprefix("checkpoint-")
        return (True, -int(step), folder) if step.isdecimal() else (False, folder.name != "adapter", folder)

    found = {file.parent for depth in ("*", "*/*") for file in path.glob(f"{depth}/adapter_config.json")}
    return sorted(found, key=order)


def _check_numbers(fields: Mapping[str, Any], file: Path) -> None:
    patterns = {name: fields.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for name, pattern in patterns.items():
        if not isinstance(pattern, dict):
            raise InputError(f"{file}: {name} is {type(pattern).__name__}, not numbers by module.")
        for key in pattern:
            try:
                re.compile(key)
            except re.error:
                raise InputError(f"{file}: {name} has {key!r}, which is no regular expression.") from None
    numbers = {name: fields[name] for name in ("r", "lora_alpha") if name in fields}
    numbers |= {f"{name} of {key}": value for name, pattern in patterns.items() for key, value in pattern.items()}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise InputError(f"{file}: {name} is {value!r}, not a number above 0.")


def rank_of(config: LoraConfig, name: str) -> int:
    """The rank that PEFT gives the module; every entry of the pattern that we write is a full name."""
    return int(_first_match(config.rank_pattern or {}, name, config.r))


def scaling_of(config: LoraConfig, name: str) -> float:
    """The scaling that PEFT derives for the module: alpha / r, or alpha / √r for rsLoRA."""
    rank, alpha = rank_of(config, name), _first_match(config.alpha_pattern or {}, name, config.lora_alpha)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def whole(alpha: float) -> Any:
    """An alpha as PEFT's config declares it: an integer where it is one."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of adapter_model.safetensors, or of an older adapter_model.bin, on the CPU.

    Raises:
        InputError: no such file, one that holds more than tensors, or a weight that is no floating-point number or not
            finite.
    """
    file = Path(path) / "adapter_model.safetensors"
    pickled = file.with_suffix(".bin")
    if file.is_file():
        try:
            tensors = load_file(str(file))
        except Exception as error:  # safetensors raises its own class, which older versions do not export
            raise InputError(f"{file}: not a safetensors file ({error}).") from None
    elif pickled.is_file():
        tensors, file = _unpickled(pickled), pickled
    else:
        raise InputError(f"{path}: there is no adapter_model.safetensors.")
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise InputError(
                f"{file}: {_module_of(key)} holds {tensor.dtype}, and a LoRA's weights are floating-point."
            )
        if tensor.element_size() == 1:  # torch does little with 8-bit numbers, and PEFT computes with none
            tensors[key] = tensor = tensor.float()
        if not torch.isfinite(tensor).all():
            raise InputError(f"{file}: {_module_of(key)} holds a value that is not finite (NaN or infinite).")
    return tensors


def _unpickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, read without running anything in it."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise TypeError("other values than tensors")
    except Exception as error:  # of pickle, zipfile or torch
        raise InputError(f"{file}: cannot be read as tensors ({' '.join(str(error).split())[:160]}).") from None
    return dict(tensors)


def _paired(tensors: Mapping[str, Tensor], path: str | Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Full module name → (A, B) of the tensors of a saved adapter.

    Raises:
        InputError: a tensor that is neither an A nor a B of a linear layer of a block, or lacks its partner.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    strays: list[tuple[str, str]] = []
    if not tensors:
        raise InputError(f"{path}: the file of its weights is empty; save the adapter again.")
    for key, tensor in tensors.items():
        if named := re.search(
            r"\.lora_[AB]\.(\w+)\.weight$", key
        ):  # a state dict, which PEFT too would read nothing of
            raise InputError(
                f"{path}: {key} has the name of the adapter in it ({named[1]}), as a model's state dict has; save with "
                "PEFT's save_pretrained, or take the name out of the keys."
            )
        module, kind = _module_of(key), key.removesuffix(".weight").rpartition(".")[2]
        if kind not in ("lora_A", "lora_B") or tensor.ndim != 2 or module.endswith("lm_head"):
            strays.append((module, kind))
        else:
            pairs.setdefault(module, {})[kind] = tensor
    if strays:  # PEFT saves whole weights too beside LoRA on the head or the embeddings
        raise InputError(f"{path}: {_no_pair(*min(strays, key=lambda stray: not stray[1].startswith('lora_')))}.")
    for module, pair in pairs.items():
        if len(pair) != 2 or pair["lora_A"].shape[0] != pair["lora_B"].shape[1]:
            raise InputError(f"{path}: lora_A and lora_B of {module} do not belong together.")
    return {module: (pair["lora_A"], pair["lora_B"]) for module, pair in pairs.items()}


def _module_of(key: str) -> str:
    """base_model.model.model.layers.0.mlp.up_proj.lora_A.weight → model.layers.0.mlp.up_proj"""
    return re.split(r"\.(?:lora_|modules_to_save|base_layer|token_adapter|weight$|bias$)", key.removeprefix(PREFIX))[0]


def _no_pair(module: str, kind: str) -> str:
    """What a tensor is that is no LoRA matrix of a block's linear layer."""
    only = "only plain LoRA adapters of the blocks' linear layers work"
    name = module.rpartition(".")[2]
    if kind == "lora_magnitude_vector":
        return f"{only}, and this one is a DoRA{MERGED_BY_PEFT}"
    if kind in ("lora_A", "lora_B") and name == "lm_head":
        return f"{only}, and this one adapts the output head (lm_head) too{UNTIED}"
    if kind in ("lora_embedding_A", "lora_embedding_B"):
        return f"{only}, and this one adapts the embeddings ({name}) too{UNTIED}"
    if not kind.startswith("lora_"):
        return f"{only}, and this one brings whole weights of {module} along{UNTIED}"
    return f"{only}, and the weights of {module} are no LoRA matrices of one"


def _first_match(pattern: Mapping[str, float], name: str, default: float) -> float:
    return pattern.get(get_pattern_key(list(pattern), name), default)
