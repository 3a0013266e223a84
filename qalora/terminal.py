"""The console that lines of a run go to: standard error."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

from rich.console import Console


class _Console(Console):
    def on_broken_pipe(self) -> None:
        # Ctrl-C ends the reader of a pipe too (`| tee log`), and the run still has its checkpoint to write.
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for the rest of the process)

    def print(self, *objects: Any, **options: Any) -> None:
        """A line stays a line where there is no terminal whose width it should fit, and brackets in it are no markup."""
        settings = {"soft_wrap": not self.is_terminal, "markup": False, "highlight": False, **options}
        with suppress(OSError):  # a log on a full disk is no reason to end a run
            super().print(*objects, **settings)


console = _Console(stderr=True)
