"""What several processes must have alike, compared before they train. Torch-free at import.

check_device     where they compute
check_recipes    the settings
check_bases      the base's weights
check_folder     the run's folder, which all of them see
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from qalora import processes
from qalora.errors import InputError
from qalora.training import identity

if TYPE_CHECKING:
    from qalora.recipe import Recipe

# Places, which may be others on another node; what lies there is compared itself.
PLACES = ("model", "output_dir", "data.train", "data.validation", "lora.adapter")
LATE = 60.0  # seconds until a file that another node has written is seen on a network file system


def check_device() -> None:
    """
    Raises:
        InputError: a device that several processes do not train on.
    """
    from qalora.base.device import best_device

    if processes.size() > 1 and (kind := best_device().type) not in ("cpu", "cuda"):
        raise InputError(f"several processes train on CUDA devices or on CPUs, and this one has {kind}; start one.")


def check_recipes(recipe: Recipe) -> None:
    """
    Raises:
        InputError: a setting is another one in another process.
    """
    settings: dict[str, object] = {}
    for name, value in recipe.model_dump(mode="json").items():
        settings |= {f"{name}.{key}": of for key, of in value.items()} if isinstance(value, dict) else {name: value}
    alike = {name: value for name, value in settings.items() if name not in PLACES}
    processes.check_same(alike, "the recipe", "start every process with the same recipe and command line.")


def check_bases(fingerprint: str | None) -> None:
    """
    Args:
        fingerprint: of the base.

    Raises:
        InputError: another process has another base.
    """
    processes.check_same({"the weights": fingerprint}, "the base", "give every node the same files.")


def check_folder(output_dir: Path) -> None:
    """
    Args:
        output_dir: in which process 0 has begun the run.

    Raises:
        InputError: this process does not see it.
    """
    until = time.monotonic() + LATE
    while not (output_dir / identity.FILE).is_file():
        if time.monotonic() > until:
            raise InputError(
                f"output_dir={output_dir}: what process 0 writes there is not there for this process, which is to read "
                "checkpoints; put output_dir on a file system that all nodes share."
            )
        time.sleep(0.1)


def idle(micro_batch_size: int, accumulation: int) -> list[str]:
    """A line where a step has fewer rows than there are processes."""
    rows, size = micro_batch_size * accumulation, processes.size()
    if rows >= size:
        return []
    return [
        f"training.micro_batch_size · gradient_accumulation_steps = {rows}: the rows of a step leave {size - rows} of "
        f"{size} processes without any; raise training.gradient_accumulation_steps, or start fewer"
    ]
