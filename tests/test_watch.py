"""A connection that the kernel closes when its process dies. tests/test_processes.py kills processes of a run."""

from __future__ import annotations

import pytest

# Three processes share what the first says through a file; then each does as it is told.
WATCHED = """
import os, sys, time
from pathlib import Path
from qalora.watch import Watch
rank, file, does = {rank}, Path({file!r}), {does!r}
def first_says(value):
    if rank == 0:
        file.with_suffix(".part").write_text(repr(value))
        os.rename(file.with_suffix(".part"), file)
    while not file.exists():
        time.sleep(0.01)
    return eval(file.read_text())
sys.stderr = open(f"{{file}}.{{rank}}", "w", buffering=1)
watch = Watch(rank, 3, "127.0.0.1", first_says)
time.sleep(0.5)
if does == "dies":
    os.kill(os.getpid(), 9)
if does == "ends":
    watch.close(said=True)
    os._exit(0)
time.sleep(60)
"""


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_who_dies_ends_the_others_and_one_says_it(forkserver, tmp_path, gone):
    codes = watched(forkserver, tmp_path, {gone: "dies"})
    assert codes == [-9 if rank == gone else 1 for rank in range(3)]
    said = [(tmp_path / f"said.{rank}").read_text() for rank in range(3)]
    speaks = 0 if gone else 1
    assert [bool(text) for text in said] == [rank == speaks for rank in range(3)]
    assert f"error: process {gone} of 3 has ended" in said[speaks]


def test_who_ends_well_ends_nobody(forkserver, tmp_path):
    assert watched(forkserver, tmp_path, dict.fromkeys(range(3), "ends")) == [0, 0, 0]
    assert watched(forkserver, tmp_path / "again", {0: "ends", 1: "ends"}, seconds=3) == [0, 0, None]


def watched(forkserver, folder, does, seconds=30) -> list[int | None]:
    """Exit codes; None: still running after so many seconds."""
    folder.mkdir(exist_ok=True)
    texts = [WATCHED.format(rank=rank, file=str(folder / "said"), does=does.get(rank)) for rank in range(3)]
    running = [forkserver.Process(target=exec, args=(text, {})) for text in texts]
    for process in running:
        process.start()
    for process in running:
        process.join(seconds)
    codes = [process.exitcode for process in running]
    for process in running:
        process.kill()
    return codes
