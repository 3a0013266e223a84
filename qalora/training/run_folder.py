"""The folder of a run: its name, what may lie in it, and where to go on. Torch-free."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from qalora.errors import InputError
from qalora.files import check_folder, holds

# What a run has written of itself; a checkpoint holds copies, and can be continued wherever it lies.
RUN_FILES = ("recipe.yaml", "allocation.jsonl", "metrics.json")


def run_name(recipe: str, model: str) -> str:
    """RECIPE-MODEL, of names or paths; the version in a model's name stays (llama3.1-8b)."""
    return f"{Path(recipe).stem}-{Path(model).expanduser().resolve().name.removesuffix('.gguf')}"


def check_output_dir(output_dir: Path, reads: list[Path], *, checkpoint: Path | None, overwrite: bool) -> None:
    """Keeps an earlier run from being lost or mixed with this one; nothing is deleted yet.

    Args:
        reads: what the run reads; some may be no paths.
        checkpoint: what it continues.

    Raises:
        InputError: the folder is in use, by another run or by a later part of this one, or would be emptied of what the run reads.
    """
    check_folder(output_dir, f"output_dir={output_dir}", replaced=False)
    if not output_dir.is_dir() or not any(output_dir.iterdir()):
        return
    if checkpoint is not None:
        _check_continued(output_dir, checkpoint)
        return
    if not (output_dir / "recipe.yaml").is_file():
        raise InputError(f"output_dir={output_dir}: not empty, and no run of qalora; choose another folder.")
    if not overwrite:
        raise InputError(
            f"output_dir={output_dir}: holds a run; continue it with --resume-from-checkpoint auto, replace it with --overwrite, "
            "or choose another --output-dir."
        )
    for path in reads:
        own = path.resolve() == (output_dir / "recipe.yaml").resolve()  # read already, and written anew
        if not own and path.exists() and holds(output_dir, path):
            raise InputError(
                f"--overwrite: {output_dir} holds {path}, which the run reads; choose another --output-dir."
            )


def _check_continued(output_dir: Path, checkpoint: Path) -> None:
    if checkpoint.resolve().parent != output_dir.resolve():
        raise InputError(
            f"--resume-from-checkpoint {checkpoint}: output_dir={output_dir} holds something else; choose an empty folder, or "
            "continue what is there with --resume-from-checkpoint auto."
        )
    later = [path.name for path in checkpoints_in(output_dir) if step_of(path) > step_of(checkpoint)]
    if later:
        raise InputError(
            f"--resume-from-checkpoint {checkpoint}: {output_dir} holds {', '.join(sorted(later))}, made after it; move them away, "
            "or continue from this one into an empty --output-dir."
        )


def begin_folder(output_dir: Path, checkpoint: Path | None) -> None:
    """Empties the folder, or puts back what the run had written of itself when the checkpoint was made."""
    output_dir.mkdir(parents=True, exist_ok=True)
    if checkpoint is None:
        for path in output_dir.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return
    for name in RUN_FILES:
        if (checkpoint / name).is_file():
            shutil.copy(checkpoint / name, output_dir)


def find_checkpoint(output_dir: Path, asked: str | None) -> Path | None:
    """The checkpoint to continue from: a folder, or the newest whole one of the output folder for "auto".

    Raises:
        InputError: there is none.
    """
    if asked is None:
        return None
    if asked == "auto":
        found = checkpoints_in(output_dir)
        if not found:
            raise InputError(
                f"--resume-from-checkpoint auto: {output_dir} holds no checkpoint; leave the option out to start anew."
            )
        return max(found, key=step_of)
    path = Path(asked)
    if not (path / "trainer_state.json").is_file():
        raise InputError(f"--resume-from-checkpoint {asked}: no checkpoint there (no trainer_state.json).")
    if not (path / "recipe.yaml").is_file():
        raise InputError(f"--resume-from-checkpoint {asked}: no run of qalora began it (no recipe.yaml).")
    step_of(path)
    return path


def checkpoints_in(output_dir: Path) -> list[Path]:
    """The whole checkpoints of a run's folder."""
    folders = (path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal())
    return [path for path in folders if (path / "trainer_state.json").is_file()]


def step_of(checkpoint: Path) -> int:
    """The optimizer steps behind a checkpoint, whatever its folder is called.

    Raises:
        InputError: its trainer_state.json does not say.
    """
    file = checkpoint / "trainer_state.json"
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["global_step"])
    except (ValueError, LookupError, TypeError):
        raise InputError(f"{file}: not the state of a checkpoint; continue from another one.") from None
