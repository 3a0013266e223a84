"""Checkpoints on the disk: which are whole, which is the newest, the best and the last good one. Torch-free.

The last file of a checkpoint lists all others with their sizes and hashes, and the folder gets its name after that; so
a checkpoint is whole, or can be told from one. Those of earlier versions have no list, and each of their files is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from qalora.base.fingerprint import tensor_header
from qalora.errors import InputError
from qalora.files import write_json
from qalora.training.identity import read_identity

STATE = "trainer_state.json"
MANIFEST = "files.json"
PREFIX = "checkpoint-"
SECTIONS = (
    "data",
    "quantization",
    "lora",
    "allocation",
    "training",
    "evaluation",
    "logging",
)  # of every resolved recipe


def write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    write_json(folder / MANIFEST, {str(path.relative_to(folder)): _entry(path) for path in files})


def problem_with(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be continued exactly, as "FILE is …"; None: it is whole."""
    if not checkpoint.is_dir():
        return "it is no folder"
    try:
        written = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        manifest = {name: (int(size), str(digest)) for name, (size, digest) in written.items()}
    except FileNotFoundError:
        return _unreadable(checkpoint)
    except (OSError, ValueError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    for name, (size, digest) in manifest.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} is {file.stat().st_size} bytes long, of {size}"
        if _entry(file)[1] != digest:
            return f"{name} is not what was written"
    return None


def checkpoints_in(output_dir: Path) -> list[Path]:
    """The checkpoints of a run's folder, whole or not, the newest first."""
    found = (path for path in output_dir.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal())
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)), reverse=True)


def step_of(checkpoint: Path) -> int:
    """The optimizer steps behind a checkpoint, whatever its folder is called.

    Raises:
        InputError: its trainer_state.json does not say.
    """
    try:
        return int(_state(checkpoint)["global_step"])
    except (OSError, ValueError, LookupError, TypeError):
        raise InputError(f"{checkpoint / STATE}: not the state of a checkpoint; continue from another one.") from None


def find_checkpoint(
    output_dir: Path, asked: str | None, *, anew: bool = False, say: Callable[[str], None] = lambda text: None
) -> Path | None:
    """The checkpoint to continue from: a folder, or for "auto" the newest whole one of the output folder, None where it
    holds none.

    Args:
        anew: begin anew where all checkpoints are damaged.
        say: told which checkpoints are passed over and why, and that "auto" begins a run.

    Raises:
        InputError: there is none, or it is damaged.
    """
    if asked is None:
        return None
    flag = f"--resume-from-checkpoint {asked}"
    if asked != "auto":
        path = Path(asked).expanduser()
        _check_asked(path, flag, output_dir)
        return path
    damaged = []
    for path in checkpoints_in(output_dir):
        problem = problem_with(path)
        if problem is None:
            return path
        damaged.append(f"{path.name}: {problem}")
        say(f"{flag}: {path} is damaged and passed over: {problem}")
    if damaged and not anew:
        raise InputError(
            f"{flag}: every checkpoint of {output_dir} is damaged ({'; '.join(damaged)}); put one back, or begin anew "
            "with --overwrite."
        )
    say(f"{flag}: {output_dir} holds no {'whole ' if damaged else ''}checkpoint; the run begins")
    return None


def best_beside(checkpoint: Path) -> Path | None:
    """The checkpoint of the same run, itself or in the same folder, that had the best validation loss so far; None: it
    is gone."""
    best = _state(checkpoint).get("best_global_step")
    if best == step_of(checkpoint):
        return checkpoint
    found = checkpoint.parent / f"{PREFIX}{best}"
    return found if best and belongs(found, checkpoint) else None


def belongs(one: Path, other: Path) -> bool:
    """Whether `one` is a whole checkpoint at the step of its name, of the same run as the checkpoint or run folder
    `other`."""
    if problem_with(one) is not None or step_of(one) != int(one.name.removeprefix(PREFIX)):
        return False
    runs = [read_identity(folder) for folder in (one, other)]
    return len({identity and identity.run for identity in runs}) == 1


def last_good(output_dir: Path) -> Path | None:
    """The newest whole checkpoint up to whose step every loss was finite."""
    for path in checkpoints_in(output_dir):
        if problem_with(path) is None:
            losses = [
                entry[key] for entry in _state(path)["log_history"] for key in ("loss", "eval_loss") if key in entry
            ]
            if all(isinstance(loss, (int, float)) and math.isfinite(loss) for loss in losses):
                return path
    return None


def _check_asked(path: Path, flag: str, output_dir: Path) -> None:
    """
    Args:
        output_dir: where a name alone may have been looked for.

    Raises:
        InputError: no checkpoint of a run of ours, or a damaged one.
    """
    if not path.is_dir() or not any((path / name).exists() for name in (STATE, MANIFEST, "adapter_config.json")):
        inside = checkpoints_in(path)
        hint = f"its newest one is {inside[0]}." if inside else "name its folder, or auto for the newest of output_dir."
        if (output_dir / path / STATE).is_file():
            hint = f"did you mean {output_dir / path}?"
        raise InputError(f"{flag}: no checkpoint there (no {STATE}); {hint}")
    if not (path / "recipe.yaml").is_file():
        raise InputError(
            f"{flag}: no run of qalora began it (no recipe.yaml); lora.adapter={path} starts a new run from its "
            "adapter."
        )
    problem = problem_with(path)
    if problem is not None:
        raise InputError(f"{flag}: damaged, {problem}; continue from another one, or copy it again.")


def _state(checkpoint: Path) -> dict[str, Any]:
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    if not isinstance(state, dict):
        raise ValueError("no mapping")
    return state


def _entry(file: Path) -> list[object]:
    with file.open("rb") as handle:
        return [file.stat().st_size, hashlib.file_digest(handle, "sha256").hexdigest()]


def _unreadable(checkpoint: Path) -> str | None:
    """`problem_with` by reading each file that a checkpoint needs."""
    for name, read in READERS.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        try:
            read(file)
        except Exception as error:  # whatever a damaged file makes its reader raise
            return f"{name} is damaged ({' '.join(str(error).split())[:100] or type(error).__name__})"
    return None


def _check_state(file: Path) -> None:
    state = _state(file.parent)
    if not isinstance(state["global_step"], int) or not isinstance(state["log_history"], list):
        raise ValueError("no step or no history")


def _check_mapping(file: Path) -> None:
    if not isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict):
        raise ValueError("no mapping")


def _check_recipe(file: Path) -> None:
    tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    if missing := [name for name in SECTIONS if not isinstance(tree.get(name), dict)]:
        raise ValueError(f"no {missing[0]}")


def _check_lines(file: Path) -> None:
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.strip():
            json.loads(line)["step"]


def _check_archive(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        cut = archive.testzip()
    if cut is not None:
        raise ValueError(f"{cut} in it is")


READERS: dict[str, Callable[[Path], Any]] = {
    STATE: _check_state,
    "recipe.yaml": _check_recipe,
    "allocation.jsonl": _check_lines,
    "adapter_config.json": _check_mapping,
    "adapter_model.safetensors": tensor_header,
    "optimizer.pt": _check_archive,
    "scheduler.pt": _check_archive,
    "rng_state.pth": _check_archive,
}
