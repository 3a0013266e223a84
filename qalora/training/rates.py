"""The learning rate over a run: transformers' schedules, checked before anything loads."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

from qalora.errors import InputError

OURS = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "verbose")


def warmup_of(total_steps: int, *, ratio: float | None, steps: int | float | None) -> int:
    """Optimizer steps of the warm-up, from a share of the run or a count; a share leaves the last step its full rate,
    for the first step of a warm-up has a rate of zero."""
    share = steps if steps is not None and steps < 1 else ratio
    if steps is not None and steps >= 1:
        return int(steps)
    return min(math.ceil((share or 0) * total_steps), total_steps - 1)


def check_schedule(name: str, settings: Mapping[str, object], *, rate: float, warmup: int, total_steps: int) -> None:
    """
    Args:
        name, settings: the recipe's lr_scheduler_type and lr_scheduler_kwargs.
        rate: the learning rate.
        warmup: optimizer steps of the warm-up.

    Raises:
        InputError: a schedule that this version of transformers has not, or settings that it does not take.
    """
    if name not in [kind.value for kind in SchedulerType]:
        raise InputError(
            f"training.lr_scheduler_type={name}: the installed transformers has no such schedule; upgrade it, or "
            "choose another."
        )
    takes = _settings_of(name)
    if unknown := [key for key in settings if key not in takes]:
        raise InputError(
            f"training.lr_scheduler_kwargs: {name} takes {', '.join(takes) or 'none'}, and not {', '.join(unknown)}; "
            "leave that out."
        )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    try:
        # The rates of a first, a middle and a last step are worked out here, for some settings are read only then.
        scheduler = get_scheduler(name, optimizer, warmup, total_steps, dict(settings))
        for step in (0, total_steps // 2, total_steps):
            for factor in getattr(scheduler, "lr_lambdas", ()):
                float(factor(step))
    except (TypeError, ValueError, ArithmeticError, UnboundLocalError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(
            f"training.lr_scheduler_kwargs={dict(settings)}: {name} takes {', '.join(takes)}; {reason}."
        ) from None


def _settings_of(name: str) -> list[str]:
    kind: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    if name == "reduce_lr_on_plateau":
        kind = ReduceLROnPlateau
    elif name == "greedy":
        from transformers.optimization import GreedyLR

        kind = GreedyLR
    return [key for key in inspect.signature(kind).parameters if key not in OURS]
