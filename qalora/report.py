"""`qalora report`: the page of a run, of any age, from the files of its folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qalora.cli import DONE, Parser
from qalora.files import check_writable, write_whole

PAGE = "report.html"


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="qalora report",
        description="Writes a run's report.html: losses, ranks round by round, speed, memory, answers and settings in "
        "one file.",
    )
    parser.add_argument("run", metavar="RUN", help="output folder of a run, finished or not")
    parser.add_argument("--output", metavar="FILE", help="default: RUN/report.html")
    return parser


def main(argv: list[str]) -> int:
    from qalora.results.facts import read_run
    from qalora.results.page import render

    args = parser().parse_args(argv)
    run = Path(args.run).expanduser()
    output = Path(args.output).expanduser() if args.output else run / PAGE
    facts = read_run(run)
    check_writable(output)
    write_whole(output, render(facts))
    print(output)
    return DONE


if __name__ == "__main__":
    from qalora.cli import run

    sys.exit(run(main))
