"""The plan's bytes against those of a training step on a CUDA device without hardware (tests/fake_cuda): every
tensor that the step allocates, as torch's allocator rounds it, and the scratch of attention's backward.

    python bench/plan_fake.py                # the table: bytes of a third block stand for those of every further one
    python bench/plan_fake.py --whole        # a few cases through all of their blocks
    python bench/plan_fake.py --only 8B      # some of it, by the beginnings of names

Computed on a machine without a GPU: no GPU gave these figures. The peak is a second optimizer step's, without the CUDA
context and without paged moments.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu
from common import environment, table, write_results

from qalora.base.registry import MODELS, ModelShape
from qalora.kernels.layout import prepared
from qalora.memory import CUDA_CONTEXT, Checkpointing
from qalora.sizes import MLP_TILE

FAKE_CUDA = Path(__file__).resolve().parents[1] / "tests" / "fake_cuda"
SHAPES = {"7B": "llama-7b", "8B": "llama3.1-8b", "13B": "llama-13b", "33B": "llama-30b"}
LEVELS: dict[str, Checkpointing] = {"true": True, "false": False, "selective": "selective", "offload": "offload"}


def case(model: str, **settings: Any) -> gpu.Case:
    size = {"rows": 2, "tokens": 2048} if model == "8B" else {}
    return gpu.Case("train", SHAPES[model], **{**size, **settings})  # type: ignore[arg-type]


LONG = case("8B", rows=1, r=32, kept="offload")
CASES: dict[str, gpu.Case] = {
    **{f"{model} {name}": case(model, kept=kept) for model in SHAPES for name, kept in LEVELS.items()},
    **{f"{model} 8-bit moments": case(model, optim="paged_adamw_8bit", r=64) for model in SHAPES},
    **{f"{model} fp16": case(model, dtype="float16") for model in SHAPES},
    "7B packed": case("7B", tokens=2048, samples=4),
    "7B 8 × 512": case("7B", rows=8),
    "8B packed": case("8B", rows=1, tokens=4096, samples=2),
    "8B packed selective": case("8B", rows=1, tokens=4096, samples=2, kept="selective"),
    "8B 4 × 2048 selective": case("8B", rows=4, kept="selective"),
    "8B 60k tokens": replace(LONG, tokens=60_000, tile=MLP_TILE * 8),
    "8B 60k tokens true": replace(LONG, tokens=60_000, kept=True),
    "8B 145k tokens": replace(LONG, tokens=145_000, tile=MLP_TILE * 16),
    "33B 20k tokens": case("33B", tokens=20_000, kept="offload", tile=MLP_TILE * 4),
}
PADDED = {"7B padded": case("7B", rows=4), "8B padded": case("8B"), "8B padded selective": case("8B", kept="selective")}
CASES |= PADDED
WHOLE = ("7B true", "8B true", "8B selective", "8B false", "33B true")


def main() -> None:
    """Starts anew, with the device there before torch, and measures."""
    sys.path.insert(0, str(FAKE_CUDA))
    import build

    if (why := build.missing()) is not None:
        raise SystemExit(f"not run: {why}")
    paths = os.pathsep.join([str(FAKE_CUDA), str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "FAKE_CUDA_SHIM": str(build.built()), "PYTHONPATH": paths}
    start = "import fake_cuda, plan_fake; plan_fake.measure(fake_cuda)"
    raise SystemExit(subprocess.run([sys.executable, "-c", start, *sys.argv[1:]], env=environment).returncode)


def measure(fake_cuda: Any) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[""])
    parser.add_argument("--whole", action="store_true")
    args = parser.parse_args()
    device = fake_cuda.switch_on()
    device.values = False
    rows = []
    for name in (name for name in (WHOLE if args.whole else CASES) if name.startswith(tuple(args.only))):
        chosen, shape = CASES[name], MODELS[CASES[name].model][1]
        peak, paged = (step_of if args.whole else by_blocks)(device, chosen, shape, name in PADDED)
        planned = planned_bytes(chosen, shape, paged)
        rows.append({
            "case": name, "rows × tokens": f"{chosen.rows} × {chosen.tokens}", "MiB, step": f"{peak / 2**20:,.1f}",
            "MiB, plan": f"{planned / 2**20:,.1f}", "plan": f"{planned / peak - 1:+.1%}",
        })  # fmt: skip
        print(rows[-1], file=sys.stderr)
    name = "plan-fake-whole" if args.whole else "plan-fake"
    facts = {**environment(), "command": " ".join(["python", "bench/plan_fake.py", *sys.argv[1:]])}
    text = (
        f"# {name}\n\nNo GPU gave these figures: the tensors of a training step, counted on a CUDA device without "
        f"hardware. {facts['date']}, commit {facts['commit']}.\n\n    {facts['command']}\n\n{table(rows)}"
    )
    write_results(name, {**facts, "rows": rows}, text)


def step_of(device: Any, case: gpu.Case, shape: ModelShape, padded: bool = False) -> tuple[int, int]:
    """(peak of a second optimizer step, bytes of paged moments); a padded first row lacks its last fiftieth."""
    model = gpu.by_qalora(case, shape, "cuda")
    step, optimizer = gpu.stepper(case, model, "cuda")
    batch = gpu.tokens_of(case, shape, "cpu")
    if padded:
        batch["attention_mask"][0, -case.tokens // 50 :] = 0
        batch["labels"][0, -case.tokens // 50 :] = -100
    there: Any = prepared(batch, model.device)
    step(there)
    gc.collect()
    device.reset_peak()
    step(there)
    return device.peak, gpu.paged_bytes(optimizer)


def by_blocks(device: Any, case: gpu.Case, shape: ModelShape, padded: bool = False) -> tuple[int, int]:
    """`step_of`, where each further block takes what the last of a few takes. Of block inputs that wait on the host two
    are on the device, so there it is the third."""
    fewest = 2 if case.kept == "offload" else 1
    few, more = (step_of(device, case, replace(shape, num_hidden_layers=fewest + n), padded) for n in (0, 1))
    further = shape.num_hidden_layers - fewest
    peak, paged = (low + further * (high - low) for low, high in zip(few, more, strict=True))
    return peak, paged


def planned_bytes(case: gpu.Case, shape: ModelShape, paged: int) -> int:
    return int(gpu.plan_of(case, shape)().total - CUDA_CONTEXT - paged)


if __name__ == "__main__":
    main()
