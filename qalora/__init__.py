"""qalora: 4-bit frozen bases, full-precision ALoRA adapters that move their rank budget to where it pays.

    base = qalora.load_base("smollm2-135m")
    rows = qalora.load_rows("rows.jsonl", base.tokenizer)
    model = qalora.attach(base.model, r=8, alpha=16)
    qalora.start(model, rows, "quantization", original=base.original())
    rounds = qalora.AllocationCallback(rows, rounds=8, warmup=0.3, interval=0.05)

    class Trainer(qalora.VariableRanks, transformers.Trainer): ...

What stands in `__all__` is supported; docs/python-api.md describes it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qalora.adapter.callback import AllocationCallback as AllocationCallback
    from qalora.adapter.model import attach as attach
    from qalora.adapter.model import load_adapter as load_adapter
    from qalora.adapter.model import ranks as ranks
    from qalora.adapter.model import save_adapter as save_adapter
    from qalora.adapter.start.begin import start as start
    from qalora.adapter.variable_ranks import VariableRanks as VariableRanks
    from qalora.api import evaluate as evaluate
    from qalora.api import export_adapter as export_adapter
    from qalora.api import finetune as finetune
    from qalora.api import generate as generate
    from qalora.api import load_rows as load_rows
    from qalora.api import merge as merge
    from qalora.api import plan_memory as plan_memory
    from qalora.api import score_ranks as score_ranks
    from qalora.base.loading import load_base as load_base
    from qalora.errors import AnswerNo as AnswerNo
    from qalora.errors import InputError as InputError
    from qalora.kernels.install import install as install
    from qalora.recipe import Recipe as Recipe
    from qalora.recipe import load_recipe as load_recipe

_HOMES = {
    "AllocationCallback": "qalora.adapter.callback",
    "AnswerNo": "qalora.errors",
    "InputError": "qalora.errors",
    "Recipe": "qalora.recipe",
    "VariableRanks": "qalora.adapter.variable_ranks",
    "attach": "qalora.adapter.model",
    "evaluate": "qalora.api",
    "export_adapter": "qalora.api",
    "finetune": "qalora.api",
    "generate": "qalora.api",
    "install": "qalora.kernels.install",
    "load_adapter": "qalora.adapter.model",
    "load_base": "qalora.base.loading",
    "load_recipe": "qalora.recipe",
    "load_rows": "qalora.api",
    "merge": "qalora.api",
    "plan_memory": "qalora.api",
    "ranks": "qalora.adapter.model",
    "save_adapter": "qalora.adapter.model",
    "score_ranks": "qalora.api",
    "start": "qalora.adapter.start.begin",
}
__all__ = sorted(_HOMES)
# Names of commands too, whose modules are called like the functions (cli.make_callable): whatever is imported first, a
# name is one thing.
_COMMANDS = ("evaluate", "finetune", "generate", "merge")


def __getattr__(name: str) -> Any:
    """Loads a public name on first use, so that `import qalora` stays instant."""
    if name not in _HOMES:
        raise AttributeError(f"module 'qalora' has no attribute {name!r}")
    if name in _COMMANDS:
        return import_module(f"qalora.{name}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
