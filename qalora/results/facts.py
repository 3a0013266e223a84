"""A run's folder → what it says of the run, for its page and its model card. Torch-free.

Nothing is computed that the files do not hold, and a file of an earlier version that lacks something leaves it out.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qalora.adapter.given import given_adapter
from qalora.errors import InputError
from qalora.files import write_json_lines
from qalora.training.checkpoints import STATE, checkpoints_in
from qalora.training.identity import read_identity
from qalora.training.run_folder import is_run

LOG = "log_history.jsonl"
HEADING = "# qalora finetune "
# What concerns one attempt: where it writes, from where it goes on, where its result is sent. Those of `BARE` have no
# value.
ATTEMPT = (
    "overwrite",
    "resume_from_checkpoint",
    "output_dir",
    "dry_run",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
)
BARE = ("overwrite", "dry_run")


@dataclass(frozen=True)
class RunFacts:
    """
    Attributes:
        name: of the run's folder.
        recipe: the resolved settings.
        command: the words of the command after `qalora finetune`, without those that concern one attempt; None: not
            known.
        metrics: what metrics.json holds.
        start: full module name → rank at the start, whose sum is the budget.
        rounds: the records of allocation.jsonl.
        final: full module name → rank in the saved adapter; None: not saved yet.
        log: the Trainer's log history.
        before, after: what predictions-before.jsonl and predictions-after.jsonl hold, a record per row.
        train_rows, held_back_rows: None: not known.
    """

    name: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    command: Sequence[str] | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    start: Mapping[str, int] = field(default_factory=dict)
    rounds: Sequence[Mapping[str, Any]] = ()
    final: Mapping[str, int] | None = None
    log: Sequence[Mapping[str, Any]] = ()
    before: Sequence[Mapping[str, Any]] = ()
    after: Sequence[Mapping[str, Any]] = ()
    train_rows: int | None = None
    held_back_rows: int | None = None

    @property
    def recipe_name(self) -> str | None:
        words = list(self.command or ())
        if "--recipe" in words[:-1]:
            return Path(words[words.index("--recipe") + 1]).stem
        return None

    @property
    def states(self) -> list[tuple[str, dict[str, int]]]:
        """(label, full module name → rank) at the start, after each round, and of the saved adapter where it has
        others."""
        found = [("start", dict(self.start))] if self.start else []
        for record in self.rounds:
            ranks = {name: int(record["ranks"].get(name, 0)) for name in self.start or record["ranks"]}
            label = f"step {record['step']}" if record["step"] else "start, by scores"
            found.append((label, ranks))
        if self.final is not None:
            last = {name: self.final.get(name, 0) for name in self.start or self.final}
            if not found or last != found[-1][1]:
                found.append(("saved adapter", last))
        return found


def read_run(folder: str | Path) -> RunFacts:
    """
    Raises:
        InputError: no run there, or a file of it is damaged.
    """
    run = Path(folder).expanduser()
    if not is_run(run):
        raise InputError(f"{folder}: no run of qalora (no run.json); pass the output folder of a `qalora finetune`.")
    identity = read_identity(run)
    adapter = run / "adapter"
    try:
        text = (run / "recipe.yaml").read_text(encoding="utf-8")
        return RunFacts(
            name=run.resolve().name,
            recipe=yaml.safe_load(text) or {},
            command=read_command(text),
            metrics=_json(run / "metrics.json"),
            start=identity.ranks if identity else {},
            rounds=_lines(run / "allocation.jsonl"),
            final=given_adapter(adapter).ranks if (adapter / "adapter_config.json").is_file() else None,
            log=_log(run),
            before=_lines(run / "predictions-before.jsonl"),
            after=_lines(run / "predictions-after.jsonl"),
            train_rows=len(identity.rows.train) if identity else None,
            held_back_rows=len(identity.rows.held_back) if identity else None,
        )
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(
            f"{folder}: a file of the run cannot be read ({' '.join(str(error).split())[:200]})."
        ) from None


def run_of(adapter: str | Path) -> RunFacts | None:
    """The run whose result lies in this folder; None of any other adapter."""
    folder = Path(adapter).resolve()
    if folder.name != "adapter" or not is_run(folder.parent):
        return None
    try:
        return read_run(folder.parent)
    except InputError:
        return None


def write_log(folder: Path, history: Sequence[Mapping[str, object]]) -> None:
    """The Trainer's log history, a record per line."""
    write_json_lines(folder / LOG, history)


def with_command(recipe: str, words: Sequence[str] | None) -> str:
    """The text of a recipe.yaml, headed by the command that made it.

    Args:
        words: of the command line, after `qalora finetune`.
    """
    return recipe if words is None else f"{HEADING}{shlex.join(lasting(words))}\n{recipe}"


def read_command(recipe: str) -> list[str] | None:
    """The words that `with_command` wrote; None where there are none."""
    first = recipe.partition("\n")[0]
    try:
        return shlex.split(first.removeprefix(HEADING)) if first.startswith(HEADING) else None
    except ValueError:
        return None


def lasting(words: Sequence[str]) -> list[str]:
    """A command line without what concerns one attempt, by flags or by settings."""
    kept: list[str] = []
    left_out = ""  # the flag before, whose value may follow
    for word in words:
        name, equals, _ = word.removeprefix("--").replace("-", "_").partition("=")
        if left_out and not word.startswith("--") and "=" not in word:
            left_out = ""
        elif name in ATTEMPT and (equals or word.startswith("--")):
            left_out = "" if equals or name in BARE else name
        else:
            left_out = ""
            kept.append(" ".join(word.split("\n")))
    return kept


def without_paths(word: str) -> str:
    """A path, several with commas between them, or a setting with one (key=/home/me/rows.jsonl), reduced to last names.

    Ids of the Hub, relative names and all other texts stay.
    """
    key, equals, value = word.partition("=")
    if not equals or "/" in key:
        key, equals, value = "", "", word
    return key + equals + ",".join(_last_name(part) for part in value.split(","))


def _last_name(part: str) -> str:
    found = re.fullmatch(r"""([\s\["']*)((?:/|~|\.{1,2}/)[^\n]*?)([\s\]"']*)""", part)
    if found is None:
        return part
    before, path, after = found.groups()
    is_path = path.count("/") > 1 or not path.startswith("/") or Path(path).exists()
    return f"{before}{Path(path).name}{after}" if is_path and Path(path).name else part


def hub_ids(source: str | Sequence[str] | None) -> list[str]:
    """The data sets of the Hub among the sources of rows."""
    names = [source] if isinstance(source, str) else list(source or ())
    parts = [part.strip() for name in names for part in name.split(",")]
    return [name for name in parts if is_hub_id(name) and not re.search(r"\.(jsonl?|csv|tsv|parquet|arrow)\b", name)]


def is_hub_id(name: str) -> bool:
    """Whether a name is OWNER/NAME, and nothing here is called so."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not name.endswith(".gguf") and not Path(name).exists()


def _json(file: Path) -> dict[str, Any]:
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not isinstance(found, dict):
        raise ValueError(f"{file.name} holds no mapping")
    return found


def _lines(file: Path) -> list[dict[str, object]]:
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _log(run: Path) -> list[dict[str, Any]]:
    """The log history of the whole run, or as far as its newest checkpoint knows it."""
    if (run / LOG).is_file():
        return _lines(run / LOG)
    for checkpoint in checkpoints_in(run):
        if (checkpoint / STATE).is_file():
            return list(_json(checkpoint / STATE).get("log_history", []))
    return []
