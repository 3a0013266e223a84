"""Several processes as one run, for real: equality with one process, kills at random moments, two nodes.

    python bench/processes.py equal                      # a tiny model, 40 steps, three rounds: 1, 2 and 3 processes
    python bench/processes.py resume                     # two processes, then three, then one, go on with one run
    python bench/processes.py kills --kills 20           # one of two processes is killed, then the run goes on
    python bench/processes.py nodes                      # torchrun --nnodes 2 in two network namespaces; Linux, as root

With `--data DIR` the first three train SmolLM2 on E2E rows of DIR: fewer steps, and as a rule fewer kills. All of it
runs over gloo on a CPU. The bar: losses, ranks and adapter within 1e-5 of one process; after a kill the
others have ended within 30 seconds, and the run that goes on ends with the bytes of an undisturbed one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from common import environment, table, write_results
from faults import make_model
from safetensors.torch import load_file

ENDED = 30.0  # seconds after a kill
LOOSE = 1e-5
SETTINGS = (
    "data.val_set_size=16", "training.micro_batch_size=3", "training.gradient_accumulation_steps=2",
    "logging.steps=1", "evaluation.before=false", "evaluation.after=false",
    "quantization.bnb_4bit_compute_dtype=float32",
)  # fmt: skip
TINY = (
    "training.max_steps=40", "allocation.rounds=3", "allocation.warmup=5", "allocation.interval=8",
    "training.eval_steps=10", "training.save_steps=5", "training.save_total_limit=20", "allocation.val_batch_size=7",
)  # fmt: skip
KILLED = (
    "training.max_steps=16", "allocation.rounds=3", "allocation.warmup=3", "allocation.interval=4",
    "training.eval_steps=4", "training.save_steps=3", "training.save_total_limit=20", "allocation.val_batch_size=7",
)  # fmt: skip
REAL = (
    "training.max_steps=8", "allocation.rounds=2", "allocation.warmup=2", "allocation.interval=3",
    "training.eval_steps=8", "training.save_steps=2", "allocation.val_batch_size=6", "data.max_rows=120",
)  # fmt: skip
REAL_KILLED = (
    "training.max_steps=4", "allocation.rounds=1", "allocation.warmup=1", "allocation.interval=1",
    "training.eval_steps=4", "training.save_steps=1", "allocation.val_batch_size=2", "data.max_rows=40",
)  # fmt: skip
# A process of a launch: what a launcher sets, and the command.
PROCESS = """
import os, sys
sys.stdout = sys.stderr = open({log!r}, "w", buffering=1)
os.dup2(sys.stderr.fileno(), 2)
os.environ.update({variables!r})
import torch
torch.set_num_threads(1)
from qalora import cli
from qalora.finetune import main
sys.exit(cli.run(main, {words!r}))
"""


def main() -> None:
    args = parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="qalora-processes-") as folder:
        found = args.do(Path(folder), args)
    name = f"processes-{args.what}{'-smollm2' if args.data else ''}"
    write_results(name, {"environment": environment(), "rows": found}, text_of(args.what, found))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("equal", "resume", "kills", "nodes"))
    parser.add_argument("--data", type=Path, help="folder with e2e/train.jsonl: SmolLM2 on its rows")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    cases = {"equal": equal, "resume": resume, "kills": kills, "nodes": nodes}
    parser.set_defaults(do=lambda folder, args: cases[args.what](folder, args))
    return parser


def text_of(what: str, found: Sequence[dict[str, Any]]) -> str:
    return f"# Several processes: {what}\n\n{table(found)}"


# -------------------------------------------------------------------------------------------------------------- cases


def equal(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs of one, two and three processes, compared with that of one."""
    sizes = (1, 2) if args.data else (1, 2, 3)
    to = real_command(args.data) if args.data else tiny_command(folder)
    found = []
    for size in sizes:
        row = {"processes": size, "exit codes": str(launch(folder, size, to(folder / str(size))))}
        found.append(row | differences(folder / str(size), folder / "1"))
    return found


def resume(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One run that is interrupted twice and goes on in another number of processes, compared with one that is not."""
    to, steps = (real_command(args.data), 8) if args.data else (tiny_command(folder), 40)
    assert launch(folder, 1, to(folder / "undisturbed")) == [0]
    words = [*to(folder / "resumed"), "--resume-from-checkpoint", "auto"]
    found: list[dict[str, Any]] = []
    for size, until in ((2, steps // 3), (3, 2 * steps // 3), (1, steps)):
        running, logs = started_processes(folder, size, words)
        while until < steps and step_in(logs[0]) < until:
            assert all(process.is_alive() for process in running), [log.read_text() for log in logs]
            time.sleep(0.05)
        if until < steps:
            running[-1].terminate()  # a signal to one is one to all
        codes = [process.join() or process.exitcode for process in running]
        found.append({"processes": size, "exit codes": str(codes), "until step": step_in(logs[0])})
    compared = differences(folder / "resumed", folder / "undisturbed")
    return [*({**row, **dict.fromkeys(compared)} for row in found[:-1]), {**found[-1], **compared}]


def kills(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Kills one of two processes at random moments, and goes on."""
    to = real_command(args.data, REAL_KILLED) if args.data else tiny_command(folder, KILLED)
    draw = random.Random(args.seed)
    running, _ = met_processes(folder, to(folder / "undisturbed"))
    started = time.monotonic()
    assert [process.join() or process.exitcode for process in running] == [0, 0]
    lasts = time.monotonic() - started
    found: list[dict[str, Any]] = []
    for trial in range(2 * args.kills):
        if len(found) == args.kills:
            break
        output_dir, rank, after = folder / f"trial-{trial}", draw.randrange(2), draw.uniform(0, lasts)
        words = [*to(output_dir), "--resume-from-checkpoint", "auto"]
        running, logs = met_processes(folder, words)
        time.sleep(after)
        if not all(process.is_alive() for process in running):
            continue  # it was faster than the undisturbed one
        at = step_in(logs[0])
        running[rank].kill()
        began = time.monotonic()
        for process in running:
            process.join(2 * ENDED)
        seconds = time.monotonic() - began
        late = [process.kill() for process in running if process.is_alive()]
        named = any(f"process {rank} of 2 has ended" in log.read_text() for log in logs)
        goes_on = launch(folder, 2, words)
        row = {"killed": rank, "after step": at, "others ended after s": seconds}
        same = digest(output_dir) == digest(folder / "undisturbed")
        found.append(
            row | {"in time": not late and seconds <= ENDED, "named": named, "goes on": goes_on == [0, 0], "same": same}
        )
        print(found[-1], flush=True)
    return found


def nodes(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """`torchrun --nnodes 2` in two network namespaces, a process in each."""
    to = tiny_command(folder)
    assert launch(folder, 2, to(folder / "one-node")) == [0, 0]
    try:
        for command in (
            "netns add qa0", "netns add qa1", "link add qav0 netns qa0 type veth peer name qav1 netns qa1",
            *(f"-n qa{n} addr add 10.77.0.{n + 1}/24 dev qav{n}" for n in (0, 1)),
            *(f"-n qa{n} link set {device} up" for n in (0, 1) for device in ("lo", f"qav{n}")),
        ):  # fmt: skip
            subprocess.run(["ip", *command.split()], check=True)
        running = [
            subprocess.Popen(
                ["ip", "netns", "exec", f"qa{node}", sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
                 "--nproc_per_node", "1", "--node_rank", str(node), "--master_addr", "10.77.0.1", "--master_port",
                 "29500", "-m", "qalora.finetune", *to(folder / "two-nodes")],
                env={**os.environ, "GLOO_SOCKET_IFNAME": f"qav{node}"},
            )
            for node in (0, 1)
        ]  # fmt: skip
        codes = [process.wait(900) for process in running]
    finally:
        for node in (0, 1):
            subprocess.run(["ip", "netns", "del", f"qa{node}"], check=False)
    return [{"nodes": 2, "exit codes": str(codes), **differences(folder / "two-nodes", folder / "one-node")}]


# ---------------------------------------------------------------------------------------------------------- small parts


def tiny_command(folder: Path, settings: Sequence[str] = TINY) -> Callable[[Path], list[str]]:
    """A run of a tiny random model, and where it writes."""
    model, rows = folder / "base", folder / "rows.jsonl"
    make_model(model)
    draw = random.Random(0)
    words = "red green blue one two three four cat dog".split()  # noqa: SIM905
    lines = [{"prompt": f"{i} ", "completion": " ".join(draw.choices(words, k=1 + i % 7))} for i in range(80)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lambda to: words_of(str(model), "alpaca", rows, to, ("data.format=auto", *settings))


def real_command(data: Path, settings: Sequence[str] = REAL) -> Callable[[Path], list[str]]:
    """A run of SmolLM2 on E2E rows, and where it writes."""
    return lambda to: words_of("smollm2-135m", "e2e", data / "e2e" / "train.jsonl", to, settings)


def words_of(model: str, recipe: str, rows: Path, output_dir: Path, settings: Sequence[str]) -> list[str]:
    own = [f"data.train={rows}", *SETTINGS, *settings]
    return ["--model", model, "--recipe", recipe, "--output-dir", str(output_dir), *own]


def launch(folder: Path, size: int, words: Sequence[str]) -> list[int | None]:
    """Exit codes of a run of so many processes."""
    running, _ = started_processes(folder, size, words)
    for process in running:
        process.join()
    return [process.exitcode for process in running]


def started_processes(folder: Path, size: int, words: Sequence[str]) -> tuple[list[Any], list[Path]]:
    """(processes, what each says); they have imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qalora.training.begin", "qalora.training.finish", "qalora.finetune"])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    running, logs = [], []
    for rank in range(size):
        logs.append(Path(tempfile.mkdtemp(dir=folder)) / "log")
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        said = {name: str(value) for name, value in variables.items()} if size > 1 else {}
        text = PROCESS.format(log=str(logs[-1]), variables=said, words=list(words))
        running.append(context.Process(target=exec, args=(text, {"__name__": "__launched__"})))
        running[-1].start()
    return running, logs


def met_processes(folder: Path, words: Sequence[str]) -> tuple[list[Any], list[Path]]:
    """Two processes that have found each other."""
    running, logs = started_processes(folder, 2, words)
    while not (logs[0].exists() and "rows" in logs[0].read_text()):
        time.sleep(0.05)
    return running, logs


def differences(found: Path, wanted: Path) -> dict[str, Any]:
    """The largest relative differences of two runs."""
    ours, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (found, wanted))
    weights = max(
        float((ours[name] - theirs[name]).norm() / theirs[name].norm())
        if ours[name].shape == theirs[name].shape
        else 1.0
        for name in theirs
    )
    logs = [map(json.loads, (folder / "log_history.jsonl").read_text().splitlines()) for folder in (found, wanted)]
    losses = max(
        abs(own[key] - other[key]) / abs(other[key])
        for own, other in zip(*logs, strict=True)
        for key in ("loss", "eval_loss", "grad_norm")
        if key in other
    )
    ranks = [
        [json.loads(line)["ranks"] for line in (folder / "allocation.jsonl").read_text().splitlines()]
        for folder in (found, wanted)
    ]
    same = ranks[0] == ranks[1]
    return {
        "rounds": len(ranks[0]), "same ranks": same, "adapter differs by": weights, "losses differ by": losses,
        "within 1e-5": same and max(weights, losses) <= LOOSE,
    }  # fmt: skip


def digest(output_dir: Path) -> str:
    """Of the adapter's weights."""
    file = output_dir / "adapter" / "adapter_model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "none"


def step_in(log: Path) -> int:
    """The last step that a log speaks of."""
    lines = log.read_text().splitlines() if log.exists() else []
    steps = [line.split("/")[0].split()[-1] for line in lines if line.startswith("step ")]
    return int(steps[-1]) if steps else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
