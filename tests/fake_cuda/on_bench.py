"""bench/gpu.py with tiny shapes on the device without hardware, its cases in this process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gpu
import pytest

KERNELS_OF_A_BLOCK = 345  # a change that launches more is seen here
ABSENT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"gguf", "datasets", "pydantic"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import gpu
"""


@pytest.fixture
def in_this_process(shapes_only, monkeypatch):
    """What workers were asked for; they run here, where the device is."""
    names = []

    def run(name, args, seconds):
        names.append(name)
        return json.loads(json.dumps(gpu.work(name, args.shapes, args.device, seconds)))

    monkeypatch.setattr(gpu, "run", run)
    return names


def test_what_a_killed_bench_measured_stays_and_a_second_start_goes_on(in_this_process, tmp_path, monkeypatch, capsys):
    first, second, third = chosen = ["8b", "7b-fp16-15gb", "8b-longest-24gib"]
    monkeypatch.setattr(gpu, "CASES", {name: gpu.CASES[name] for name in chosen})
    monkeypatch.setattr(gpu, "TINY", gpu.replace(gpu.TINY, num_hidden_layers=2))
    monkeypatch.setattr(gpu, "TRIES", 2)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--shapes", "tiny", "--out", str(tmp_path / "found")])

    def found():
        return json.loads((tmp_path / "found" / "gpu.json").read_text())["cases"]

    work = gpu.work

    def killed(name, *args):
        if name == second:
            raise KeyboardInterrupt
        return work(name, *args)

    with monkeypatch.context() as until, pytest.raises(KeyboardInterrupt):
        until.setattr(gpu, "work", killed)
        gpu.main()
    assert list(found()) == [first] and found()[first]["allocated"] > 0
    in_this_process.clear()
    gpu.main()
    assert in_this_process == ["facts", second, third]
    assert list(found()) == chosen and not [case["error"] for case in found().values() if "error" in case]
    assert found()[second]["losses"] and found()[third]["longest"]
    assert "## Training steps" in (tmp_path / "found" / "gpu.md").read_text()
    in_this_process.clear()
    gpu.main()
    assert in_this_process == ["facts"]


@pytest.mark.parametrize("name", ["8b-hf", "8b-trl"])
def test_rivals_train_too(shapes_only, monkeypatch, name):
    monkeypatch.setattr(gpu, "TINY", gpu.replace(gpu.TINY, vocab_size=512, num_hidden_layers=2))
    found = gpu.work(name, "tiny", "cuda", 600)
    assert len(found["losses"]) == 2 and found["allocated"] > 0


def test_a_rival_that_is_not_installed_says_so(shapes_only):
    with pytest.raises(SystemExit, match="liger_kernel not installed"):
        gpu.work("8b-trl-liger", "tiny", "cuda", 600)


def test_a_block_launches_no_more_kernels_than_counted_nor_than_pefts(shapes_only):
    """At gradient_checkpointing=false: what two blocks launch more than one."""
    counts = {}
    for side in ("qalora", "peft"):
        case = gpu.Case("train", "llama-7b", side=side, kept=False, tokens=64, optim="adamw_torch")
        launched = []
        for blocks in (1, 2):
            shape = gpu.replace(gpu.MODELS["llama-7b"][1], num_hidden_layers=blocks)
            model = gpu.SIDES[side](case, shape, "cuda")
            if side == "peft":
                model.get_base_model().gradient_checkpointing_disable()
            batch = gpu.tokens_of(case, shape, "cuda")
            compute = gpu.stepper(case, model, "cuda")[0]
            compute(batch)
            with shapes_only.counted() as (_, kernels):
                compute(batch)
            launched.append(sum(kernels.values()))
        counts[side] = launched[1] - launched[0]
    print(counts)
    assert counts["qalora"] <= min(KERNELS_OF_A_BLOCK, counts["peft"])


def test_the_bench_is_imported_without_gguf_datasets_and_pydantic():
    folder = Path(gpu.__file__).parent
    done = subprocess.run([sys.executable, "-c", ABSENT], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]


def test_the_commit_is_none_where_there_is_no_git(monkeypatch):
    import common

    monkeypatch.setenv("PATH", "")
    assert common.commit() is None


def test_the_recipes_of_the_quality_grids_have_what_their_methods_set():
    import quality

    for grid in quality.GRIDS.values():
        (task, steps), *_ = grid.steps.items()
        for name, method in grid.methods.items():
            run = quality.Run(task, name, 0, 1e-3, "test", steps, "float32")
            recipe = quality.recipe_of(run, quality.TASKS[task], method, Path())
            for setting, value in method.settings.items():
                section, _, field = setting.partition(".")
                assert getattr(getattr(recipe, section), field) == value, (name, setting)
