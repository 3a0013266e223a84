"""What a run that is continued keeps, what it may change, and what it says of that. Torch-free.

Settings are compared as the plain trees of two recipes: the one of the checkpoint, and the one that continues it.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qalora.errors import InputError
from qalora.training.checkpoints import step_of
from qalora.training.identity import Identity, Rows, read_identity

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Continued:
    """
    Attributes:
        step: the optimizer steps behind it.
        settings: its recipe.
        identity: what its run is made of; None: of an earlier version, which did not say.
    """

    checkpoint: Path
    step: int
    settings: Settings
    identity: Identity | None

    @staticmethod
    def at(checkpoint: Path) -> Continued:
        settings = yaml.safe_load((checkpoint / "recipe.yaml").read_text(encoding="utf-8"))
        return Continued(checkpoint, step_of(checkpoint), settings, read_identity(checkpoint))

    def rounds_done(self) -> list[int]:
        """The steps of the rounds before the checkpoint."""
        lines = (self.checkpoint / "allocation.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [int(json.loads(line)["step"]) for line in lines if line.strip()]
        return [step for step in steps if 0 < step <= self.step]


# What weights, moments and the position among the rows have in them.
FIXED = (
    "lora.r", "lora.alpha", "lora.dropout", "lora.target_modules", "lora.layers_to_transform",
    "quantization.load_in_4bit", "quantization.bnb_4bit_quant_type", "quantization.bnb_4bit_use_double_quant",
    "training.optim", "training.seed", "training.group_by_length", "data.packing",
)  # fmt: skip
# Decided when the run began, or said elsewhere.
UNSAID = (
    "output_dir", "model", "merge", "push_to_hub", "hub_model_id", "hub_private_repo", "lora.init", "allocation.start",
    "training.fit", "training.mlp_tile",
)  # fmt: skip


def check_settings(now: Settings, begun: Settings, checkpoint: Path) -> None:
    """
    Raises:
        InputError: a setting that would make it another run; names both values.
    """
    given, first = _get(now, "lora.adapter"), _get(begun, "lora.adapter")
    if first is not MISSING and given != first:
        raise InputError(
            f"--resume-from-checkpoint: lora.adapter={given} begins a new run, and {checkpoint} continues one that "
            f"began {'without one' if first is None else f'from {first}'}: leave lora.adapter out, or start anew."
        )
    for key in FIXED:
        new, old = _get(now, key), _get(begun, key)
        if old is not MISSING and new != old:
            raise _another(key, new, old, checkpoint)
    if _get(now, "data.validation") is None and _get(begun, "data.validation") not in (None, MISSING):
        raise _another("data.validation", None, _get(begun, "data.validation"), checkpoint)
    rows_now, rows_then = (_rows_a_step(settings) for settings in (now, begun))
    if rows_now != rows_then:
        raise InputError(
            f"--resume-from-checkpoint: training.micro_batch_size={_get(now, 'training.micro_batch_size')} with "
            f"training.gradient_accumulation_steps={_get(now, 'training.gradient_accumulation_steps')} are {rows_now} "
            f"rows an optimizer step, and {checkpoint} was made with {rows_then} "
            f"({_get(begun, 'training.micro_batch_size')} · {_get(begun, 'training.gradient_accumulation_steps')}): "
            "rows would be skipped or repeated; keep the product, or start anew."
        )
    if _get(now, "data.packing") and _get(now, "data.max_seq_len") != _get(begun, "data.max_seq_len"):
        raise _another("data.max_seq_len", _get(now, "data.max_seq_len"), _get(begun, "data.max_seq_len"), checkpoint)


def check_base(now: str | None, model: str, begun: Identity | None, checkpoint: Path) -> None:
    """
    Args:
        now: fingerprint of the base that continues; None: not known yet.

    Raises:
        InputError: it is another one than the checkpoint was made with.
    """
    if now is not None and begun is not None and begun.base not in (None, now):
        raise InputError(
            f"--resume-from-checkpoint: the weights of --model {model} ({now[:12]}) are not those of {begun.model} "
            f"({str(begun.base)[:12]}) that {checkpoint} was made with; continue over that model, or start anew."
        )


def check_rows(now: Settings, begun: Settings, reading: Iterable[str], checkpoint: Path) -> None:
    """Of a run whose rows are not those of the checkpoint.

    Args:
        reading: the settings that decide how a row becomes tokens.

    Raises:
        InputError: they are read in another way.
    """
    for key in reading:
        new, old = _get(now, key), _get(begun, key)
        if old is not MISSING and new != old:
            raise _another(key, new, old, checkpoint)


def changes(now: Settings, begun: Settings) -> str:
    """What is another setting now, as a line; empty where nothing is. One that was left open is as the run began."""
    both = dict(_flat(now)), dict(_flat(begun))
    changed = [
        f"{key}={_short(value)} (was {_short(both[1][key])})"
        for key, value in both[0].items()
        if key in both[1] and value != both[1][key] and key not in UNSAID and not key.startswith("logging.")
        if (key, value) != ("allocation.rounds", None)
    ]
    return ", ".join(changed)


def kept_apart(rows: Sequence[bytes], known: Rows, size: int | float, seed: int) -> list[int]:
    """Which rows of a changed training set are held back for validation, so that none of them was ever trained on.

    Those that the run held back already, where there are any; else the share `size`, drawn of the rows that are new.

    Args:
        rows: digests.
        size: rows (an integer) or a share (below 1) of all.

    Raises:
        InputError: every row was trained on.
    """
    left = Counter(known.held_back)
    kept = []
    for index, row in enumerate(rows):
        if left[row] > 0:
            left[row] -= 1
            kept.append(index)
    if kept:
        return kept
    trained = set(known.train)
    unseen = [index for index, row in enumerate(rows) if row not in trained]
    if not unseen:
        raise InputError(
            "--resume-from-checkpoint: data.train holds nothing but rows that the run was trained on, and none of "
            "those that it held back; set data.validation to other rows, or give it the file that it began with."
        )
    count = min(len(unseen), max(1, round(size * len(rows))) if size < 1 else int(size))
    return sorted(random.Random(seed).sample(unseen, count))


def rounds_left(planned: Sequence[int], done: Sequence[int], step: int, rounds: int) -> tuple[int, ...]:
    """The steps of all rounds of a continued run: those behind it, and of those planned after `step` the first, up to
    N_A in all."""
    rest = [at for at in planned if at > step]
    return (*done, *rest[: max(0, rounds - len(done))])


MISSING = object()


def _get(settings: Settings, key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return MISSING
        value = value[part]
    return value


def _rows_a_step(settings: Settings) -> int:
    names = ("training.micro_batch_size", "training.gradient_accumulation_steps")
    micro, accumulate = (_get(settings, name) for name in names)
    return int(micro) * int(accumulate)


def _another(key: str, new: object, old: object, checkpoint: Path) -> InputError:
    return InputError(
        f"--resume-from-checkpoint: {key} is {_short(new)}, and {checkpoint} was made with {_short(old)}; a run that "
        f"is continued keeps it: set {key}={_short(old)}, or start anew (lora.adapter={checkpoint} from its adapter)."
    )


def _flat(settings: Settings, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and prefix == "":
            yield from _flat(value, f"{key}.")
        else:
            yield f"{prefix}{key}", value


def _short(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "null" if value is None else str(value)[:80]
