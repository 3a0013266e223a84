"""One table of the forwards that we compute ourselves, and one door through which a model gets them, and gives them
back.

    kernel            in the place of                what it saves
    RMSNorm           every frozen RMSNorm           fp32 copies kept for the backward (norm.py)
    fused SwiGLU      a known gated SiLU MLP         two of four inner tensors (swiglu.py)
    MLP by tiles      any other MLP                  with training.mlp_tile, its inner tensors (tiles.py)
    fused q, k, v     attention of a known family    gradients and rotations of each by itself (attention.py)
    shared prefixes   torch's fused attention        tokens that rows begin with alike, and padding (prefixes.py)

Each gives what the model's own forward gives, to rounding. A module whose forward somebody else has replaced keeps
theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from qalora.kernels import attention, norm, prefixes, swiglu, tiles

Choose = Callable[[nn.Module], Iterator[nn.Module]]
# Name → (the modules of a model that it goes to, its forward).
KERNELS: dict[str, tuple[Choose, Callable[..., Any]]] = {
    "RMSNorm": (norm.replaceable, norm.forward),
    swiglu.NAME: (swiglu.replaceable, swiglu.forward),
    tiles.NAME: (tiles.replaceable, tiles.forward),
    "fused q, k, v": (attention.replaceable, attention.forward),
}
SHARED_PREFIXES = "shared prefixes"


@dataclass
class Installed:
    """What `install` replaced in a model.

    Attributes:
        modules: the modules with a forward of ours, by the kernel's name.
        attention: the model's own attention implementation, where it has been replaced.
    """

    model: Any
    modules: dict[str, list[nn.Module]] = field(default_factory=dict)
    attention: str | None = None

    def remove(self) -> None:
        """Gives the model its own forwards back."""
        for modules in self.modules.values():
            for module in modules:
                for name in ("forward", "extra_repr", "kernel"):
                    module.__dict__.pop(name, None)
        if self.attention is not None:
            self.model.set_attn_implementation(self.attention)
        self.modules, self.attention = {}, None
        self.model.__dict__.pop("kernels", None)

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        if self.attention is not None:  # a model may be unpickled where nothing has been installed yet
            prefixes.register()

    def __str__(self) -> str:
        counts = [f"{name} ({len(modules)})" for name, modules in self.modules.items() if modules]
        return ", ".join([*counts, *([SHARED_PREFIXES] if self.attention else [])]) or "none"


def install(model: nn.Module) -> Installed:
    """Gives a model every kernel that fits it; `print(model)` shows where. A second call adds what the first could not
    reach.

    Args:
        model: a causal LM of transformers, or a PeftModel around one, with frozen norms.
    """
    base = prefixes.causal_lm(model)
    installed: Installed = base.__dict__.setdefault("kernels", Installed(base))
    for name, (choose, forward) in KERNELS.items():
        for module in choose(base):
            if "forward" not in module.__dict__:
                _replace(module, name, forward)
                installed.modules.setdefault(name, []).append(module)
    if installed.attention is None and base.config._attn_implementation == prefixes.OWN:
        prefixes.register()
        installed.attention = prefixes.OWN
        base.set_attn_implementation(prefixes.ATTENTION)
    return installed


def _replace(module: Any, name: str, forward: Callable[..., object]) -> None:
    shown = ", ".join(filter(None, (module.extra_repr(), f"kernel: {name}")))
    module.kernel = name
    # Not as a method: pickle looks a method up by its name, and would find the class's own forward.
    module.forward = partial(forward, module)
    module.extra_repr = partial(str, shown)
