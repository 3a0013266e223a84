"""An adapter that a run starts from (`lora.adapter`): its ranks and settings, read without its weights. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qalora.adapter.targets import targeted
from qalora.base.families import BLOCK_MAPS
from qalora.base.fingerprint import tensor_header
from qalora.base.registry import read_fields
from qalora.errors import InputError

PREFIX = "base_model.model."
SUFFIX = ".lora_A.weight"


@dataclass(frozen=True)
class GivenAdapter:
    """
    Attributes:
        path: its folder.
        ranks: full module name → rank.
        r: the largest rank.
        alpha: lora_alpha of its config.
        target_modules: as `lora.target_modules` names them.
    """

    path: Path
    ranks: dict[str, int]
    r: int
    alpha: float
    target_modules: Literal["all-linear"] | list[str]

    def check_settings(self, given: Mapping[str, object]) -> None:
        """
        Args:
            given: those settings of the section `lora` that somebody gave.

        Raises:
            InputError: one of them is another than the adapter has; names both values.
        """
        own: dict[str, Any] = {"r": self.r, "alpha": self.alpha, "target_modules": self.target_modules}
        targets = given.get("target_modules", "all-linear")
        if isinstance(targets, str) and targets != "all-linear":
            own.pop("target_modules")
            if set(targeted(self.ranks, targets)) != set(self.ranks):
                raise InputError(
                    f"lora.target_modules={targets}: the adapter in lora.adapter={self.path} has other modules, and it "
                    "stays as it is; leave lora.target_modules out."
                )
        for name, value in own.items():
            asked = given.get(name, value)
            if _comparable(asked) != _comparable(value):
                raise InputError(
                    f"lora.{name}={_shown(asked)}: the adapter in lora.adapter={self.path} has {_shown(value)}, and it "
                    f"stays as it is; leave lora.{name} out, or set it to {_shown(value)}."
                )


def given_adapter(path: str | Path) -> GivenAdapter:
    """
    Raises:
        InputError: no PEFT LoRA there; where one lies below, names it.
    """
    folder = Path(path).expanduser()
    config = folder / "adapter_config.json"
    if not config.is_file():
        below = sorted(found.parent for found in folder.glob("*/adapter_config.json"))
        best = next((found for found in below if found.name == "adapter"), below[-1] if below else None)
        hint = f"; did you mean lora.adapter={best}?" if best else "; name the folder of a PEFT LoRA."
        raise InputError(f"lora.adapter={path}: there is no adapter_config.json{hint}")
    fields = read_fields(config)
    header = tensor_header(_weights(folder, path))
    ranks = {
        name.removeprefix(PREFIX).removesuffix(SUFFIX): int(entry["shape"][0])
        for name, entry in header.items()
        if name.endswith(SUFFIX)
    }
    if not ranks:
        raise InputError(f"lora.adapter={path}: it holds no LoRA matrices (lora_A).")
    r, alpha = fields.get("r"), fields.get("lora_alpha")
    if not isinstance(r, int) or not isinstance(alpha, (int, float)) or r <= 0 or alpha <= 0:
        raise InputError(f"{config}: r is {r!r} and lora_alpha {alpha!r}, not numbers above 0.")
    found = {name.rpartition(".")[2] for name in ranks}
    every = {name.rpartition(".")[2] for name in BLOCK_MAPS}
    targets: Literal["all-linear"] | list[str] = "all-linear" if found == every else sorted(found)
    return GivenAdapter(folder, ranks, max(ranks.values()), alpha, targets)


def _weights(folder: Path, path: str | Path) -> Path:
    file = folder / "adapter_model.safetensors"
    if file.is_file():
        return file
    old = (folder / "adapter_model.bin").is_file()
    hint = (
        "adapter_model.bin is pickled and not read; save the adapter again with a PEFT of today"
        if old
        else "copy the adapter again"
    )
    raise InputError(f"lora.adapter={path}: there is no adapter_model.safetensors; {hint}.")


def _comparable(value: object) -> object:
    return sorted(value) if isinstance(value, list) else value


def _shown(value: object) -> str:
    return ",".join(value) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)
