"""Several gloo processes on a CPU are one run: the same losses, ranks and adapter as one process, whatever happens."""

from __future__ import annotations

import json
import random
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from qalora import cli, processes
from qalora.errors import EndedElsewhere, InputError
from qalora.finetune import main
from qalora.training.checkpoints import problem_with

STEPS = 20
# Notes the calls and bytes of all sums, and how often adapters were compared.
COUNTED = """
import torch.distributed as dist
from qalora import processes
plain_sum, plain_check = dist.all_reduce, processes.check_same
def counted(tensor, *args, **kwargs):
    print("SUM", tensor.dtype, tensor.numel(), file=sys.stderr)
    return plain_sum(tensor, *args, **kwargs)
def checked(values, what, *how):
    plain_check(values, what, *how)
    print("SAME", what, len(values), file=sys.stderr)
dist.all_reduce, processes.check_same = counted, checked
"""
# Something that befalls a process as step AT begins.
AT = """
from transformers import TrainerCallback
from qalora.training import trainer
class Befalls(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if RANK == {rank} and state.global_step == {step}:
            {what}
plain = trainer.build_trainer
def with_it(*args, **kwargs):
    built = plain(*args, **kwargs)
    built[0].add_callback(Befalls())
    return built
from qalora.training import begin
begin.build_trainer = with_it
"""


# In steps of process 0, and in the round of process 1.
OUT_OF_MEMORY = """
from qalora.adapter import ablation
from qalora.training import trainer
plain_rows, plain_summed = ablation.row_losses, trainer.summed_loss
def losses(model, micro, **kwargs):
    if RANK == 1 and len(micro["labels"]) > 1:
        raise torch.OutOfMemoryError("out of memory in a round")
    return plain_rows(model, micro, **kwargs)
def summed(model, inputs, **kwargs):
    if RANK == 0 and len(inputs["labels"]) > 1:
        raise torch.OutOfMemoryError("out of memory in a step")
    return plain_summed(model, inputs, **kwargs)
ablation.row_losses, trainer.summed_loss = losses, summed
"""
# What `torchrun` runs itself, with processes that it forks: an agent that starts two, and is told to stop.
AGENT = """
import os, sys
sys.stdout = sys.stderr = open({log!r}, "w", buffering=1)
os.dup2(sys.stderr.fileno(), 2)
os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
import torch
torch.set_num_threads(1)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
def work():
    from qalora import cli
    from qalora.finetune import main
    sys.exit(cli.run(main, {words!r}))
where = dict(rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", run_id="one", start_method="fork", max_restarts=0)
elastic_launch(LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, **where), work)()
"""


@pytest.fixture(scope="module")
def command(save_tiny_llama, tmp_path_factory):
    """to(folder, **settings) → the words of a run of 20 steps with three rounds, in fp32, that writes there."""
    folder = tmp_path_factory.mktemp("processes")
    base = save_tiny_llama(folder / "base", max_position_embeddings=64, num_hidden_layers=1)
    rng = random.Random(0)
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": f"{i} ", "completion": "".join(rng.choice("abcd") for _ in range(1 + i % 13))}) + "\n"
            for i in range(80)
        )
    )
    own = {
        "data.train": rows, "data.format": "auto", "data.val_set_size": 16, "training.max_steps": STEPS,
        "training.micro_batch_size": 3, "training.gradient_accumulation_steps": 2,
        "training.eval_steps": 5, "training.save_steps": 5,
        "training.save_total_limit": 10, "allocation.rounds": 3, "allocation.warmup": 3, "allocation.interval": 4,
        "allocation.val_batch_size": 7, "evaluation.before": False, "evaluation.after": False, "logging.steps": 1,
        "quantization.bnb_4bit_compute_dtype": "float32",
    }  # fmt: skip

    def to(output_dir: Path, **settings: object) -> list[str]:
        words = [
            f"{name}={str(value).lower() if isinstance(value, bool) else value}"
            for name, value in (own | settings).items()
        ]
        return ["--model", str(base), "--recipe", "alpaca", "--output-dir", str(output_dir), *words]

    return to


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory, undrawn) -> Path:
    """The folder of the run that one process makes."""
    output_dir = tmp_path_factory.mktemp("alone") / "run"
    assert cli.run(main, command(output_dir)) == 0
    return output_dir


def log_of(output_dir: Path) -> list[dict]:
    entries = [json.loads(line) for line in (output_dir / "log_history.jsonl").read_text().splitlines()]
    return [
        {key: entry[key] for key in ("step", "loss", "eval_loss", "grad_norm", "total_rank") if key in entry}
        for entry in entries
    ]


def assert_same_run(found: Path, wanted: Path) -> None:
    """Equal steps and ranks; losses, norms and weights within 1e-5 of one another."""
    for ours, theirs in zip(log_of(found), log_of(wanted), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    rounds = [
        [
            {key: record[key] for key in ("step", "pruned", "grown", "ranks", "forward_equivalents")}
            for record in map(json.loads, (folder / "allocation.jsonl").read_text().splitlines())
        ]
        for folder in (found, wanted)
    ]
    assert rounds[0] == rounds[1] and len(rounds[0]) == 3
    ours, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (found, wanted))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-7)


def test_two_processes_make_the_run_of_one(alone, command, launch, tmp_path):
    """And a step costs one sum, of the adapter's bytes and three numbers."""
    run = launch(2, *command(tmp_path / "run"), code=COUNTED)
    assert run.codes == [0, 0], run.said
    assert_same_run(tmp_path / "run", alone)
    sums = [line.split() for line in run.said[0].splitlines() if line.startswith("SUM")]
    assert len(sums) == STEPS and {dtype for _, dtype, _ in sums} == {"torch.float32"}
    records = [json.loads(line) for line in (alone / "allocation.jsonl").read_text().splitlines()]
    assert int(sums[-1][2]) == records[-1]["parameters"] + 3
    compared = [line for line in run.said[1].splitlines() if line.startswith("SAME after")]
    assert len(compared) == 3 + len(list((tmp_path / "run").glob("checkpoint-*")))
    assert "step 20/20" in run.said[0] and "step 20/20" not in run.said[1]  # one of them speaks


def test_two_processes_compress_as_one(command, launch, tmp_path):
    few = {"training.max_steps": 4, "training.learning_rate": 0.1, "training.eval_strategy": "no"}
    few |= {"allocation.rounds": 0, "lora.r": 2, "lora.compress": True}
    assert cli.run(main, command(tmp_path / "alone", **few)) == 0
    assert launch(2, *command(tmp_path / "run", **few)).codes == [0, 0]
    alone, run = (json.loads((tmp_path / name / "compress.json").read_text()) for name in ("alone", "run"))
    assert run["ranks"] == alone["ranks"]
    assert run["kept"]["ranks"] < run["whole"]["ranks"]
    assert run["kept"]["loss"] == pytest.approx(alone["kept"]["loss"], abs=1e-5)


def test_a_run_goes_on_in_another_number_of_processes(alone, command, launch, tmp_path):
    """Two, then three with uneven shares, then one; each is interrupted by a signal to one process alone.

    Memory runs out among the three: in a step in one process alone; in a round in one, and all begin it again together.
    """
    words = [*command(tmp_path / "run"), "--resume-from-checkpoint", "auto"]
    for size, rank, step, code in ((2, 1, 5, ""), (3, 0, 12, OUT_OF_MEMORY)):
        interrupt = AT.format(rank=rank, step=step, what="import signal; os.kill(os.getpid(), signal.SIGTERM)")
        run = launch(size, *words, code=interrupt + code)
        assert run.codes == [cli.INTERRUPTED] * size, run.said
        assert (tmp_path / "run" / f"checkpoint-{step + 1}").is_dir()
    assert "micro-batches are worked through in 2 pieces" in run.said[0]
    assert all("micro-batches are worked through in 4 pieces" in text for text in run.said)
    assert cli.run(main, words) == 0
    assert_same_run(tmp_path / "run", alone)


def test_one_adapter_that_differs_is_found_named_and_not_written(command, launch, tmp_path):
    planted = "next(p for n, p in model.named_parameters() if 'layers.0.mlp.up_proj.lora_B' in n).data[0, 0] += 1e-3"
    words = command(tmp_path / "run", **{"training.save_steps": 4, "allocation.warmup": 6})
    run = launch(2, *words, code=AT.format(rank=1, step=2, what=planted))
    assert run.codes == [1, 1]
    assert "after step 4: process 0 and process 1 differ in B of model.layers.0.mlp.up_proj" in run.said[0]
    assert "error" not in run.said[1]
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_process_that_is_killed_ends_the_others_and_is_named(command, launch, tmp_path):
    """Between exchanges too: the other one sleeps. test_watch.py does it with any of three."""
    killed = AT.format(rank=0, step=3, what="import signal; os.kill(os.getpid(), signal.SIGKILL)")
    asleep = """
import time
plain_begin = Befalls.on_step_begin
def also(self, args, state, control, model=None, **kwargs):
    if RANK == 1 and state.global_step == 3:
        time.sleep(100)
    plain_begin(self, args, state, control, model=model, **kwargs)
Befalls.on_step_begin = also
"""
    run = launch(2, *command(tmp_path / "run", **{"training.save_steps": 2}), code=killed + asleep, timeout=200)
    assert run.codes == [-9, 1]
    assert "error: process 0 of 2 has ended" in run.said[1] and "".join(run.said).count("error:") == 1
    assert (tmp_path / "run" / "checkpoint-2").is_dir()


OTHER_ROWS = """
if RANK == 1:
    from qalora.training import rows
    plain = rows.scoring_apart
    rows.scoring_apart = lambda rows, wanted, seed: plain(rows, wanted, seed + 1)
"""


@pytest.mark.parametrize(
    ("settings", "code", "exit_code", "says"),
    [
        ({"data.train": "/nowhere.jsonl"}, "", 2, "/nowhere.jsonl"),
        ({"--dtype": "int3"}, "", 2, "error: argument --dtype: invalid choice: 'int3'"),
        ({}, "import os; os.environ['ACCELERATE_USE_FSDP'] = 'true'", 2, "ACCELERATE_USE_FSDP=true in the env"),
        ({"training.learning_rat": 1}, "", 2, "learning_rat"),
        ({}, OTHER_ROWS, 2, "the rows: process 0 and process 1 differ in"),
    ],
)
def test_an_error_is_said_once_and_ends_all(command, launch, tmp_path, settings, code, exit_code, says):
    run = launch(2, *command(tmp_path / "run", **settings), code=code)
    assert run.codes == [exit_code] * 2
    assert sum(text.count("error:") for text in run.said) == 1
    assert says in run.said[0]
    assert not (tmp_path / "run").exists()


def test_an_error_of_one_process_names_it(command, launch, tmp_path):
    """Its tokenizer is not to be read, say; the others have nothing to say."""
    code = (
        "if RANK == 1:\n    from qalora.base import loading\n    from qalora.errors import InputError\n    def "
        "broken(*args):\n        raise InputError('no tokenizer here.')\n    loading.load_tokenizer = broken"
    )
    run = launch(3, *command(tmp_path / "run"), code=code)
    assert run.codes == [2, 2, 2]
    assert [text.count("error:") for text in run.said] == [0, 1, 0]
    assert "error: process 1 on " in run.said[1] and "no tokenizer here." in run.said[1]


def test_a_loss_that_is_not_finite_in_one_process_is_said_once(command, launch, tmp_path):
    what = "model.get_base_model().model.embed_tokens.weight.data.fill_(float('nan'))"
    words = command(tmp_path / "run", **{"training.save_steps": 2})
    run = launch(2, *words, code=AT.format(rank=1, step=3, what=what))
    assert run.codes == [1, 1]
    assert sum(text.count("error:") for text in run.said) == 1
    assert "the loss is nan at step 4, on rows [" in run.said[1] and "checkpoint-2" in run.said[1]


FULL_DISK = """
import errno
from qalora.training import trainer
def full(model, folder):
    raise OSError(errno.ENOSPC, "No space left on device", str(folder))
trainer.write_adapter = full
"""


def test_a_disk_that_is_full_is_said_once_and_by_its_cause(command, launch, tmp_path):
    words = command(tmp_path / "run", **{"training.save_steps": 1})
    run = launch(2, *words, code=FULL_DISK)
    assert run.codes == [2, 2], run.said
    assert "No space left on device" in run.said[0] and "Earlier checkpoints are untouched" in run.said[0]
    assert "".join(run.said).count("error:") == 1


@pytest.mark.parametrize(("rank", "ends"), [(0, torch.OutOfMemoryError), (1, EndedElsewhere)])
def test_memory_that_ran_out_in_one_process_for_good_is_said_by_process_0(monkeypatch, rank, ends):
    """Outside the steps, as in a validation, where nothing smaller is tried."""
    monkeypatch.setattr(processes, "_group", processes.Group(rank, 2))

    def gathered(found, value):
        found[:] = [(None, None), ("memory", None)]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gathered)
    with pytest.raises(ends) as error, processes._one_voice():
        processes.exchange(None)
    assert "in process 1" in str(error.value) if rank == 0 else error.value.code == cli.NO


def test_a_signal_to_the_launcher_leaves_a_checkpoint(command, forkserver, tmp_path):
    """Its word on precision is not the recipe's."""
    log = tmp_path / "log"
    words = command(tmp_path / "run", **{"training.max_steps": 4000})
    launcher = forkserver.Process(target=exec, args=(AGENT.format(log=str(log), words=words), {"__name__": "agent"}))
    launcher.start()
    waited = time.monotonic()
    while not (log.exists() and "step    3/4000" in log.read_text()):
        assert launcher.is_alive() and time.monotonic() - waited < 240, log.read_text()
        time.sleep(0.1)
    launcher.terminate()
    launcher.join(60)
    text = log.read_text()
    assert text.count("ACCELERATE_MIXED_PRECISION=bf16 is not followed") == 1
    assert text.count("interrupted after step") == 1
    *_, checkpoint = sorted((tmp_path / "run").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert problem_with(checkpoint) is None
    assert f"interrupted after step {checkpoint.name.removeprefix('checkpoint-')};" in text


@pytest.mark.parametrize(
    ("visible", "place", "seen"),
    [(None, 2, "2"), ("0,1", 1, "1"), ("GPU-a,GPU-b", 0, "GPU-a"), ("3", 2, "3"), ("0,1", 5, ""), ("", 1, "")],
)
def test_a_process_sees_one_gpu(visible, place, seen):
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    processes.see_one_gpu(environ, place)
    assert environ == {"CUDA_VISIBLE_DEVICES": seen}


LAUNCHED = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


def test_a_script_that_began_torch_distributed_itself_is_told_so(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    launched = LAUNCHED | {"MASTER_PORT": "1"}
    with pytest.raises(InputError, match="torch.distributed was begun before the run"), processes.joined(launched):
        pass


def test_a_port_that_is_taken_is_said():
    with socket.create_server(("", 0)) as taken:
        launched = LAUNCHED | {"MASTER_PORT": str(taken.getsockname()[1])}
        said = r"the 2 processes of the launch did not find each other \(.*\); check MASTER_ADDR and MASTER_PORT"
        with pytest.raises(InputError, match=said), processes.joined(launched):
            pass
    assert processes.size() == 1


def test_two_processes_on_one_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="a"))
    monkeypatch.setattr(processes, "exchange", lambda value: [value, value])
    with pytest.raises(InputError, match="2 processes were started on 1 GPUs"):
        processes._check_devices()
    monkeypatch.setattr(processes, "exchange", lambda value: [value, ("other", "b")])
    processes._check_devices()
