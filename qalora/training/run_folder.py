"""The folder of a run: its name, what of it is the run's, and what may lie there beside. Torch-free."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from qalora.card_files import CARD, clear_but_card
from qalora.errors import InputError
from qalora.files import check_folder, disk_is_full, holds, put_back, unwritable, write_whole, written_beside
from qalora.locking import LOCK
from qalora.training import identity
from qalora.training.checkpoints import PREFIX, SECTIONS, best_beside, checkpoints_in, problem_with, step_of

# What a run has written of itself; a checkpoint holds copies, and can be continued wherever it lies.
RUN_FILES = ("recipe.yaml", identity.FILE, "allocation.jsonl", "metrics.json")
# What else it writes: files, and folders that hold one of these files or nothing.
FILES = (
    "allocation.jsonl",
    "metrics.json",
    "ranks.png",
    "loss.png",
    "compress.json",
    "compression.png",
    "predictions*.jsonl",
    "report.html",
    "log_history.jsonl",
)
CHECKPOINT = ("adapter_config.json", "trainer_state.json", "recipe.yaml", "optimizer.pt")
FOLDERS = {
    "checkpoint-*": CHECKPOINT,
    "damaged-checkpoint-*": CHECKPOINT,
    "adapter": CHECKPOINT[:1],
    "merged": ("merge.json",),
}
# What a killed run was writing.
HALF_WRITTEN = (
    ".drawing-*",
    *(f".{name}.{state}" for name in ("checkpoint-*", "adapter", "merged") for state in ("partial", "replaced")),
)
# Of folders that others may use too, only these files.
SHARED = {"scores": "step-*.json", "runs": "**/events.out.tfevents.*"}
UNMINDED = ("lost+found",)  # and hidden files


def run_name(recipe: str, model: str) -> str:
    """RECIPE-MODEL, of names or paths; the version in a model's name stays (llama3.1-8b)."""
    return f"{Path(recipe).stem}-{Path(model).expanduser().resolve().name.removesuffix('.gguf')}"


def is_run(folder: Path) -> bool:
    """Whether a run was begun here, and not only a file called recipe.yaml put here."""
    with suppress(InputError):
        if identity.read_identity(folder) is not None:
            return True
    # Earlier versions wrote no run.json, but every setting, and a record of the rounds.
    try:
        tree = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(tree, dict) and tree.keys() >= set(SECTIONS) and (folder / "allocation.jsonl").exists()


def is_finished(folder: Path) -> bool:
    return (folder / "adapter" / "adapter_config.json").exists()


def own_entries(folder: Path) -> Iterator[Path]:
    """What a run wrote into its folder, but for recipe.yaml and run.json, which mark it as a run."""
    partial = [f".{name}.partial" for name in (*RUN_FILES, *FILES)]
    for pattern in dict.fromkeys((*FILES, *partial)):
        yield from (path for path in folder.glob(pattern) if path.is_file() or path.is_symlink())
    for pattern in HALF_WRITTEN:
        yield from folder.glob(pattern)
    for pattern, signs in FOLDERS.items():
        for path in folder.glob(pattern):
            named = (
                not pattern.endswith("*") or path.name.rpartition("-")[2].isdecimal()
            )  # checkpoint-best: somebody's copy
            if named and path.is_dir() and (not any(path.iterdir()) or any((path / sign).exists() for sign in signs)):
                yield path
    for name, pattern in SHARED.items():
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            yield from (folder / name).glob(pattern)


def foreign_entries(folder: Path) -> list[str]:
    """Names in a run's folder that no run wrote; hidden ones left out."""
    own = {path.relative_to(folder).parts[0] for path in own_entries(folder)} | {*RUN_FILES, *UNMINDED}
    return sorted(path.name for path in folder.iterdir() if path.name not in own and not path.name.startswith("."))


def check_output_dir(output_dir: Path, reads: list[Path], *, checkpoint: Path | None, overwrite: bool) -> None:
    """Keeps an earlier run from being lost or mixed with this one, and all else in the folder from being touched;
    nothing is deleted yet.

    Args:
        reads: what the run reads; some may be no paths.
        checkpoint: what it continues.

    Raises:
        InputError: the folder is in use, by another run or by a later part of this one, holds what is no run's, or
            would lose what the run reads.
    """
    check_folder(output_dir, f"output_dir={output_dir}", replaced=False)
    if not output_dir.is_dir() or _is_free(output_dir):
        return
    if checkpoint is not None:
        _check_continued(output_dir, checkpoint)
        return
    if not is_run(output_dir):
        held = "holds a recipe.yaml that no run wrote: " if (output_dir / "recipe.yaml").exists() else ""
        raise InputError(f"output_dir={output_dir}: {held}not empty, and no run of qalora; choose another folder.")
    if not overwrite:
        raise InputError(
            f"output_dir={output_dir}: holds a run; continue it with --resume-from-checkpoint auto, replace it with "
            "--overwrite, or choose another --output-dir."
        )
    removed = list(own_entries(output_dir))
    for path in reads:
        if path.exists() and any(holds(own, path) for own in removed):
            raise InputError(
                f"--overwrite: {path}, which the run reads, is of the run in {output_dir}; choose another --output-dir."
            )


def _is_free(output_dir: Path) -> bool:
    return all(path.name.startswith(".") or path.name in UNMINDED for path in output_dir.iterdir())


def _check_continued(output_dir: Path, checkpoint: Path) -> None:
    if checkpoint.resolve().parent != output_dir.resolve():
        raise InputError(
            f"--resume-from-checkpoint {checkpoint}: output_dir={output_dir} holds something else; choose an empty "
            "folder, or continue what is there with --resume-from-checkpoint auto."
        )
    later = [path.name for path in _later(output_dir, checkpoint) if problem_with(path) is None]
    if later:
        raise InputError(
            f"--resume-from-checkpoint {checkpoint}: {output_dir} holds {', '.join(sorted(later))}, made after it; "
            "move them away, or continue from this one into an empty --output-dir."
        )


def _later(output_dir: Path, checkpoint: Path) -> list[Path]:
    step = step_of(checkpoint)
    return [path for path in checkpoints_in(output_dir) if int(path.name.rpartition("-")[2]) > step]


def begin_folder(output_dir: Path, checkpoint: Path | None, say: Callable[[str], None] = lambda text: None) -> None:
    """Removes what an earlier run wrote, or puts back what the run had written of itself when the checkpoint was made,
    and its best checkpoint.

    Args:
        say: told what is not the run's and stays, and which damaged checkpoints are set aside.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in RUN_FILES:
        if (output_dir / name).is_symlink():  # its target is somebody else's
            (output_dir / name).unlink()
    for name in ("adapter", "merged"):
        put_back(output_dir / name)
    for pattern in HALF_WRITTEN:
        for path in output_dir.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    if checkpoint is None:
        _clear(output_dir, say)
        return
    for damaged in _later(output_dir, checkpoint):
        aside = damaged.with_name(f"damaged-{damaged.name}")
        shutil.rmtree(aside, ignore_errors=True)
        damaged.rename(aside)
        say(f"{damaged} is damaged, and was renamed to {aside.name}")
    for name in RUN_FILES:
        if (checkpoint / name).is_file():
            write_whole(output_dir / name, (checkpoint / name).read_text(encoding="utf-8"))
    best = best_beside(checkpoint)
    if best is not None and checkpoint.resolve().parent != output_dir.resolve():
        with written_beside(output_dir / f"{PREFIX}{step_of(best)}") as partial:
            shutil.copytree(best, partial, dirs_exist_ok=True)


def _clear(output_dir: Path, say: Callable[[str], None]) -> None:
    if not is_run(output_dir):
        return
    for path in list(own_entries(output_dir)):
        if path.is_dir() and not path.is_symlink():
            if clear_but_card(path):
                say(f"{path / CARD}: written by somebody, and stays")
            continue
        path.unlink()
        for folder in path.parents:
            if folder == output_dir or any(folder.iterdir()):
                break
            folder.rmdir()
    if stays := foreign_entries(output_dir):
        say(f"{output_dir}: {', '.join(stays[:5])}{' …' if len(stays) > 5 else ''} are no run's, and stay")


def lock_of(output_dir: Path) -> Path:
    return output_dir / LOCK


@contextmanager
def full_disk_named(output_dir: Path) -> Iterator[None]:
    """
    Raises:
        InputError: whatever was written in the block found no room; what had been written whole is still there.
    """
    try:
        yield
    except Exception as error:
        cause = error if disk_is_full(error) else error.__cause__
        if cause is None or not disk_is_full(cause):
            raise
        what = (
            error.as_typed
            if isinstance(error, InputError)
            else f"{output_dir}: cannot be written ({unwritable(cause)})."
        )
        raise InputError(
            f"{what} Earlier checkpoints are untouched: make room, and go on with the same command and "
            "--resume-from-checkpoint auto."
        ) from error
