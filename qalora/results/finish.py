"""The end of a run: its log, its adapter's card and its page, from what the run's folder holds by then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qalora.card_files import CARD, write_card
from qalora.errors import AnswerNo
from qalora.files import write_whole
from qalora.results.card import adapter_card
from qalora.results.facts import read_run, write_log
from qalora.results.page import render


def write_results(output_dir: Path, log_history: Sequence[Mapping[str, object]], say: Callable[[str], None]) -> None:
    """Writes log_history.jsonl, adapter/README.md and report.html, once metrics.json and adapter/ are written.

    Args:
        say: told what stays as a user wrote it.
    """
    write_log(output_dir, log_history)
    run = read_run(output_dir)
    adapter = output_dir / "adapter"
    if not write_card(adapter, adapter_card(adapter, run)):
        say(f"{adapter / CARD}: written by somebody, and stays")
    write_whole(output_dir / "report.html", render(run))


def push_run(output_dir: Path, repo: str, private: bool, say: Callable[[str], None]) -> None:
    """Pushes a finished run's adapter.

    Raises:
        AnswerNo: it was not pushed; the run is whole.
    """
    from qalora.results.hub import contents, push

    try:
        url, said = push(contents(output_dir / "adapter", repo), repo, private=private)
    except AnswerNo as error:
        raise AnswerNo(f"{error} (the run is whole: {output_dir})") from error
    for line in said:
        say(line)
    say(f"{repo}: pushed, {url}")
