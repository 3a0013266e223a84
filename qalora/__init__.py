"""qalora: 4-bit frozen bases, full-precision ALoRA adapters that move their rank budget to where it pays."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "InputError": "qalora.errors",
    "Recipe": "qalora.recipe",
    "attach": "qalora.adapter.model",
    "load_adapter": "qalora.adapter.model",
    "load_base": "qalora.base.loading",
    "load_recipe": "qalora.recipe",
    "resolve": "qalora.base.registry",
    "save_adapter": "qalora.adapter.model",
    "score_ranks": "qalora.adapter.scoring",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Loads a public name on first use, so that `import qalora` stays instant."""
    if name not in _HOMES:
        raise AttributeError(f"module 'qalora' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
