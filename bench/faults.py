"""What machines do to runs: kills, full disks, damaged checkpoints, two commands at one place; and what is left then.

    python bench/faults.py      # some minutes on 2 CPU cores; Linux, as root or with user namespaces (full disks)

Every case is an ordinary command on a tiny random model. After a fault the same command is given once more, as a person
or a restart loop would give it (`--resume-from-checkpoint auto`), and its result is compared with that of the
undisturbed one, byte by byte: adapter, rounds, losses; or the merged weights. The bar: no result that had been written
is lost, none differs, nobody sees a traceback.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import mmap
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from common import environment, table, write_results
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import qalora.finetune
import qalora.merge
from qalora import cli
from qalora.training.checkpoints import checkpoints_in, problem_with, step_of
from qalora.training.trainer import QaloraTrainer

WORDS = "red green blue one two three four five six seven eight nine cat dog bird fish sun moon star sky".split()  # noqa: SIM905
STEPS, SAVE_STEPS = 12, 3
# What a kill fell into, by the innermost of these functions.
PHASES = {
    "write_model": "GGUF", "allocation_round": "round", "_save_checkpoint": "checkpoint", "save_adapter": "adapter",
    "merge": "merge", "evaluate": "evaluation", "load_base": "loading", "training_step": "training",
    "train": "training",
}  # fmt: skip
NAMES = ["start", *dict.fromkeys(PHASES.values())]
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def main() -> None:
    args = parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="qalora-faults-") as folder:
        bench = Bench.prepared(Path(folder))
        draw = random.Random(args.seed)
        cases = [
            *kills(bench, args.kills, draw),
            *disks(bench, args.disks, draw),
            *cuts(bench, draw),
            *pairs(args.pairs, draw),
        ]
        draw.shuffle(cases)
        with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("fork")) as pool:
            outcomes = list(pool.map(partial(attempt, bench), range(len(cases)), cases))
    report(outcomes, args)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--disks", type=int, default=20, help="sizes of full disk")
    parser.add_argument("--pairs", type=int, default=8, help="two commands at one place at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    return parser


# ------------------------------------------------------------------------------------------------------------ the cases

Case = dict[str, Any]


def kills(bench: Bench, count: int, draw: random.Random) -> list[Case]:
    """Half of them at a random moment, half at a random write; three of five of `finetune`, the others of `merge`."""
    cases = []
    for i in range(count):
        command = ("finetune", "finetune", "finetune", "hf", "gguf")[i % 5]
        done = bench.undisturbed[command]
        at: Case = {"seconds": draw.uniform(0, done.seconds)} if i % 2 else {"write": draw.randint(1, done.writes)}
        cases.append({"kind": "kill", "command": command, **at})
    return cases


def disks(bench: Bench, count: int, draw: random.Random) -> list[Case]:
    cases = []
    for i in range(count):
        command = ("finetune", "finetune", "finetune", "hf", "gguf")[i % 5]
        size = int(bench.undisturbed[command].bytes * draw.uniform(0.02, 1.0))
        cases.append({"kind": "full disk", "command": command, "size": size})
    return cases


def cuts(bench: Bench, draw: random.Random) -> list[Case]:
    """Every file of a run's newest checkpoint: cut at a random place, emptied, gone."""
    newest = bench.folder / "reference" / f"checkpoint-{STEPS - SAVE_STEPS}"
    files = sorted(path for path in newest.iterdir() if path.is_file())
    return [
        {"kind": "damaged checkpoint", "command": "finetune", "file": path.name, "length": length}
        for path in files
        for length in (draw.randrange(path.stat().st_size), 0, None)
    ]


def pairs(count: int, draw: random.Random) -> list[Case]:
    commands = ("finetune", "hf", "gguf")
    return [
        {"kind": "two at once", "command": commands[i % 3], "delay": draw.uniform(0, 0.5), "overwrite": bool(i % 2)}
        for i in range(count)
    ]


# -------------------------------------------------------------------------------------------------------- what is tried


@dataclass(frozen=True)
class Undisturbed:
    """A command without a fault: its wall time, the writes to its folder, the bytes that it leaves, and its result."""

    seconds: float
    writes: int
    bytes: int
    result: dict[str, str]


@dataclass
class Bench:
    folder: Path
    undisturbed: dict[str, Undisturbed]

    @classmethod
    def prepared(cls, folder: Path) -> Bench:
        make_model(folder / "model")
        make_rows(folder / "rows.jsonl")
        (folder / "recipe.yaml").write_text("training: {micro_batch_size: 4, gradient_accumulation_steps: 1}\n")
        bench = cls(folder, {})
        for command in ("finetune", "hf", "gguf"):
            output = folder / ("reference" if command == "finetune" else f"reference-{command}")
            start = time.perf_counter()
            child = Child(bench.call(command, output), folder)
            code, said = child.wait()
            if code:
                raise SystemExit(f"the undisturbed {command} failed ({code}): {said}")
            seconds, size = time.perf_counter() - start, sum(f.stat().st_size for f in output.rglob("*") if f.is_file())
            bench.undisturbed[command] = Undisturbed(
                seconds, child.shared[1] + 256 * child.shared[2], size, result(output)
            )
        return bench

    def call(self, command: str, output: Path, *more: str) -> Callable[[], int]:
        """The command, in this process."""
        if command == "finetune":
            flags = (
                f"--model {self.folder}/model --recipe {self.folder}/recipe.yaml --dtype float32 --output-dir {output}"
            )
            settings = {
                "data.train": self.folder / "rows.jsonl", "data.val_set_size": 16, "data.max_seq_len": 64, "lora.r": 2,
                "lora.alpha": 4, "allocation.preset": "paper", "allocation.rounds": 2, "allocation.warmup": 4,
                "allocation.interval": 4, "allocation.val_batch_size": 8, "training.max_steps": STEPS,
                "training.eval_steps": SAVE_STEPS, "training.save_steps": SAVE_STEPS, "training.learning_rate": 5e-3,
                "training.save_total_limit": 3,
            }  # fmt: skip
            argv = [*flags.split(), *(f"{key}={value}" for key, value in settings.items()), *more]
            return lambda: cli.run(qalora.finetune.main, argv)
        adapter = self.folder / "reference" / "adapter"
        flags = f"--model {self.folder}/model --adapter {adapter} --output {output} --format {command}"
        return lambda: cli.run(qalora.merge.main, [*flags.split(), *more])


def attempt(bench: Bench, number: int, case: Case) -> Case:
    """One case in a folder of its own → the case and its outcome."""
    folder = bench.folder / f"case-{number}"
    folder.mkdir()
    try:
        outcome = {"kill": killed, "full disk": full_disk, "damaged checkpoint": damaged, "two at once": at_once}[
            case["kind"]
        ](bench, folder, case)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{case} → {outcome['outcome']}", file=sys.stderr)
    return {**case, **outcome}


def killed(bench: Bench, folder: Path, case: Case) -> Case:
    command, output = case["command"], folder / "output"
    if command != "finetune":  # an earlier merge lies there
        shutil.copytree(bench.folder / f"reference-{command}", output)
    child = Child(bench.call(command, output), folder, kill_at_write=case.get("write"))
    code, said = child.wait(case.get("seconds"))
    phase = NAMES[child.shared[0]]
    if code != -signal.SIGKILL:
        return {"phase": phase, "outcome": judged(code, said) or "ended before it"}
    saved = child.shared[3]
    if command == "finetune":
        left = steps_left(output)
        if left < saved:
            return {"phase": phase, "outcome": f"lost: step {saved} had been saved, step {left} is left"}
        return {"phase": phase, "outcome": again(bench, command, output, "--resume-from-checkpoint", "auto")}
    if not output.is_dir() or result(output) != bench.undisturbed[command].result:
        return {"phase": phase, "outcome": "lost: the merge that lay there"}
    return {"phase": phase, "outcome": again(bench, command, output)}


def full_disk(bench: Bench, folder: Path, case: Case) -> Case:
    """In a mount namespace of its own: a small file system, the command, more room, the command again."""
    command, report = case["command"], folder / "outcome.json"

    def inside() -> int:
        disk = folder / "disk"
        disk.mkdir()
        mount_tmpfs(disk, case["size"])
        child = Child(bench.call(command, disk / "output"), folder)
        code, said = child.wait()
        saved = child.shared[3]
        outcome = judged(code, said)
        if not outcome and code == cli.DONE:
            outcome = "there was room" if same(bench, command, disk / "output") else "different"
        elif not outcome:
            left = steps_left(disk / "output") if (disk / "output").is_dir() else 0
            half = [path.name for path in disk.rglob("*.partial")]
            mount_tmpfs(disk, 1 << 30, remount=True)
            more = ("--resume-from-checkpoint", "auto") if command == "finetune" else ()
            outcome = (
                f"lost: step {saved} had been saved, step {left} is left" if command == "finetune" and left < saved
                else f"half-written: {half[0]}" if half
                else again(bench, command, disk / "output", *more)
            )  # fmt: skip
        report.write_text(json.dumps({"outcome": outcome, "said": said[-300:]}))
        return 0

    code, said = Child(inside, folder, name="namespace").wait()
    return (
        dict(json.loads(report.read_text())) if report.is_file() else {"outcome": f"not tried ({code}): {said[-200:]}"}
    )


def damaged(bench: Bench, folder: Path, case: Case) -> Case:
    """A run that ended after its last but one checkpoint, of which one file is cut (length None: gone)."""
    output = folder / "output"
    shutil.copytree(bench.folder / "reference", output)
    for path in [output / "adapter", output / f"checkpoint-{STEPS}"]:
        shutil.rmtree(path)
    file = output / f"checkpoint-{STEPS - SAVE_STEPS}" / case["file"]
    if case["length"] is None:
        file.unlink()
    else:
        os.truncate(file, case["length"])
    return {"outcome": again(bench, "finetune", output, "--resume-from-checkpoint", "auto")}


def at_once(bench: Bench, folder: Path, case: Case) -> Case:
    """The second one is refused, or waits for the first to end; either way each that ends well has its whole result."""
    command, output = case["command"], folder / "output"
    more = ("--overwrite",) if case["overwrite"] else ()
    first = Child(bench.call(command, output, *more), folder, name="first")
    time.sleep(case["delay"] * bench.undisturbed[command].seconds)
    second = Child(bench.call(command, output, *more), folder, name="second")
    ends = [first.wait(), second.wait()]
    if outcome := next(filter(None, (judged(*end) for end in ends)), None):
        return {"outcome": outcome}
    if cli.DONE not in [code for code, _ in ends]:
        return {"outcome": "both refused"}
    return {"outcome": "equal" if same(bench, command, output) else "different"}


def again(bench: Bench, command: str, output: Path, *more: str) -> str:
    """The same command once more → "equal", or what went wrong."""
    code, said = Child(bench.call(command, output, *more), output.parent, name="again").wait()
    if outcome := judged(code, said):
        return outcome
    if code:
        return f"refused ({code}): {said[-300:]}"
    rest = [path.name for path in output.parent.iterdir() if path.name.endswith((".partial", ".replaced"))]
    if rest:
        return f"half-written: {rest[0]}"
    return "equal" if same(bench, command, output) else "different"


def judged(code: int, said: str) -> str | None:
    """What no command may do, whatever happens; None: it did not."""
    if "Traceback" in said:
        return f"traceback: {said.strip().splitlines()[-1][:200]}"
    if code not in (cli.DONE, cli.NO, cli.BAD_INPUT, cli.INTERRUPTED):
        return f"exit code {code}"
    if code and "error: " not in said:
        return f"exit code {code} without a sentence"
    return None


def same(bench: Bench, command: str, output: Path) -> bool:
    return result(output) == bench.undisturbed[command].result


def result(output: Path) -> dict[str, str]:
    """What a command leaves, without seconds and memory: file → digest, of weights or of figures."""
    found = {}
    for name in ("adapter/adapter_model.safetensors", "model.safetensors", "model.gguf"):
        if (output / name).is_file():
            found[name] = hashlib.sha256((output / name).read_bytes()).hexdigest()
    if (output / "adapter" / "adapter_config.json").is_file():
        config = json.loads((output / "adapter" / "adapter_config.json").read_text())
        found["config"] = json.dumps({**config, "target_modules": sorted(config["target_modules"])}, sort_keys=True)
    if (output / "allocation.jsonl").is_file():
        rounds = [json.loads(line) for line in (output / "allocation.jsonl").read_text().splitlines()]
        found["rounds"] = json.dumps([{k: v for k, v in record.items() if k != "seconds"} for record in rounds])
    if (output / "metrics.json").is_file():
        metrics = json.loads((output / "metrics.json").read_text())
        found["metrics"] = json.dumps([metrics.get(name) for name in ("before", "after")])
    return found


# -------------------------------------------------------------------------------------------------------- the machinery


def steps_left(output: Path) -> int:
    """The steps of the newest whole checkpoint; 0: there is none."""
    return max((step_of(path) for path in checkpoints_in(output) if problem_with(path) is None), default=0)


class Child:
    """A function in a process of its own, with all that this one has imported.

    Shared with it: the phase that it is in, the writes that it made (two bytes), and the last step whose checkpoint was
    saved.
    """

    def __init__(self, run: Callable[[], int], folder: Path, *, name: str = "child", kill_at_write: int | None = None):
        self.shared = mmap.mmap(-1, 4)
        self.log = folder / f"{name}.log"
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(log, 1), os.dup2(log, 2)
                self._watch(kill_at_write)
                code = run()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)

    def _watch(self, kill_at_write: int | None) -> None:
        main_thread = threading.get_ident()
        own = str(self.log)

        def on_event(event: str, arguments: tuple[Any, ...]) -> None:
            written = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
            if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
                written = isinstance(arguments[0], str) and arguments[0].startswith("/tmp") and arguments[0] != own
            if written:
                count = self.shared[1] + 256 * self.shared[2] + 1
                self.shared[1], self.shared[2] = count % 256, count // 256
                if count == kill_at_write:
                    self.shared[0] = phase_of(sys._getframe())
                    os.kill(os.getpid(), signal.SIGKILL)

        def sample() -> None:
            while True:
                self.shared[0] = phase_of(sys._current_frames()[main_thread])
                time.sleep(0.01)

        save = QaloraTrainer._save_checkpoint

        def saved(trainer: Any, *args: Any, **kwargs: Any) -> None:
            save(trainer, *args, **kwargs)
            self.shared[3] = trainer.state.global_step

        QaloraTrainer._save_checkpoint = saved  # type: ignore[method-assign]
        sys.addaudithook(on_event)
        threading.Thread(target=sample, daemon=True).start()

    def wait(self, kill_after: float | None = None) -> tuple[int, str]:
        """(exit code, or minus the signal; what it said)."""
        if kill_after is not None:
            end = time.monotonic() + kill_after
            while time.monotonic() < end:
                if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    break
                time.sleep(0.002)
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status), self.log.read_text(errors="replace")


def phase_of(frame: Any) -> int:
    while frame is not None:
        if frame.f_code.co_name in PHASES and "qalora" in frame.f_code.co_filename:
            return NAMES.index(PHASES[frame.f_code.co_name])
        frame = frame.f_back
    return 0


def mount_tmpfs(folder: Path, size: int, *, remount: bool = False) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    MS_REMOUNT, MS_REC, MS_PRIVATE = 32, 16384, 1 << 18
    if not remount:
        if libc.unshare(CLONE_NEWNS | (0 if os.getuid() == 0 else CLONE_NEWUSER)):
            raise OSError(ctypes.get_errno(), "unshare: no mount namespace to be had")
        libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", MS_REMOUNT if remount else 0, f"size={size}".encode()):
        raise OSError(ctypes.get_errno(), f"mount of {folder} failed")


def make_model(folder: Path) -> None:
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)


def make_rows(file: Path) -> None:
    draw = random.Random(0)
    lines = []
    for _ in range(64):
        words = draw.sample(WORDS, draw.randint(2, 4))
        lines.append(json.dumps({"prompt": " ".join(words) + " ", "completion": " ".join(reversed(words))}))
    file.write_text("\n".join(lines) + "\n")


def report(outcomes: Sequence[Case], args: argparse.Namespace) -> None:
    good = ("equal", "ended before it", "there was room")
    kinds: dict[str, Counter[str]] = {}
    for case in outcomes:
        label = case["kind"] + (f", {case['phase']}" if "phase" in case else f", {case['command']}")
        word = case["outcome"] if case["outcome"] in good else case["outcome"].partition(":")[0].partition(" (")[0]
        kinds.setdefault(label, Counter())[word] += 1
    columns = [*good, *sorted({word for counts in kinds.values() for word in counts} - set(good))]
    rows = [{"fault": label, **{column: kinds[label][column] for column in columns}} for label in sorted(kinds)]
    bad = [case for case in outcomes if case["outcome"] not in good]
    lines = [
        "# Faults",
        "",
        table(rows),
        f"{len(outcomes)} cases, {len(bad)} that ended otherwise than they should.",
        "",
    ]
    lines += [f"- {json.dumps(case)}" for case in bad]
    ran = environment()
    lines += ["", f"{ran['device']}, torch {ran['torch']}, {ran['date']}: `{ran['command']}`", ""]
    write_results("faults", {"environment": ran, "outcomes": list(outcomes)}, "\n".join(lines))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
