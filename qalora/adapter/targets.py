"""Which linear layers get an adapter, by their names alone. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from qalora.errors import InputError

EVERY = "all-linear"


def check_expression(targets: str) -> str:
    """The text again, "all-linear" or a regular expression.

    Raises:
        ValueError: neither.
    """
    try:
        re.compile(targets)
    except re.error as error:
        raise ValueError(f"no regular expression ({error}); write one, a list of names, or {EVERY}") from None
    return targets


def targeted(
    names: Iterable[str], targets: str | Sequence[str] = EVERY, layers: Sequence[int] | None = None
) -> list[str]:
    """Those of a model's linear layers that `targets` means, as PEFT reads it, in the blocks `layers`.

    Args:
        names: full names of the linear layers, such as model.layers.0.self_attn.q_proj.
        targets: all-linear; a regular expression that matches whole names; or whole names and their ends after a dot.
        layers: numbers of blocks; None: every block.

    Raises:
        InputError: a target, or a block, that the model has not, or no linear layer at all.
    """
    names = list(names)
    blocks = {name: _block_of(name) for name in names}
    if missing := sorted(set(layers or ()) - set(blocks.values())):
        raise InputError(
            f"lora.layers_to_transform={', '.join(map(str, missing))}: the model has blocks 0 to "
            f"{max(blocks.values())}."
        )
    if isinstance(targets, str):
        chosen = [name for name in names if targets == EVERY or re.fullmatch(targets, name)]
    else:
        ends = {target: [name for name in names if f".{name}".endswith(f".{target}")] for target in targets}
        if unknown := sorted(target for target, found in ends.items() if not found):
            raise InputError(
                f"lora.target_modules={', '.join(unknown)}: the model has no such linear layer; "
                f"it has {', '.join(dict.fromkeys(name.rpartition('.')[2] for name in names))}."
            )
        wanted = {name for found in ends.values() for name in found}
        chosen = [name for name in names if name in wanted]
    chosen = [name for name in chosen if layers is None or blocks[name] in layers]
    if not chosen:
        raise InputError(
            f"lora.target_modules={targets if isinstance(targets, str) else ', '.join(targets)}: matches no linear "
            f"layer{'' if layers is None else ' of these blocks'}; a regular expression matches whole names, such as "
            f"{names[0]}."
        )
    return chosen


def _block_of(name: str) -> int:
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1
