"""`qalora push`: an adapter or a merged folder to the Hub, with its card, and nothing that is not theirs."""

from __future__ import annotations

import argparse
import sys

from qalora.cli import DONE, Parser, say
from qalora.flags import add


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="qalora push",
        description="Commits an adapter or a merged folder to a model repository on the Hub: weights, settings, "
        "tokenizer and card; never checkpoints or optimizer states.",
    )
    parser.add_argument(
        "folder", metavar="DIR", help="adapter/ or merged/ of a run, any plain PEFT LoRA, or a run's folder"
    )
    parser.add_argument("repo", metavar="REPO", help="OWNER/NAME; made where it is missing")
    parser.add_argument("--private", action="store_true", help="a new repository is private")
    parser.add_argument("--revision", metavar="BRANCH", help="made where it is missing (default: main)")
    add(parser, "--dry-run", more="print what would be pushed, and exit")
    return parser


def main(argv: list[str]) -> int:
    from qalora.results.hub import check_access, contents, push

    args = parser().parse_args(argv)
    upload = contents(args.folder, args.repo)
    if upload.left_out:
        say(f"{upload.folder}: left out: {', '.join(upload.left_out)}")
    if args.dry_run:
        for name in sorted(upload.files):
            print(f"{upload.size(name):>14,}  {name}")
        return DONE
    check_access(args.repo)
    url, said = push(upload, args.repo, private=args.private, revision=args.revision)
    for line in said:
        say(line)
    print(url)
    return DONE


if __name__ == "__main__":
    from qalora.cli import run

    sys.exit(run(main))
