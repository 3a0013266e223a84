"""What launchers leave in the environment: how many processes there are; the recipe decides how they train. Torch-free.

`torchrun`, `accelerate launch` and MPI say by variables how many processes there are; accelerate takes its precision,
accumulation, compiler and device from variables too, where a program does not insist.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping

from qalora.errors import InputError

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = (
    "RANK", "LOCAL_RANK", "PMI_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK",
)  # fmt: skip
OTHERS = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
TORCHRUN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# Ways to train that part a model over processes.
WAYS = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "SAGEMAKER", "PARALLELISM_CONFIG")
# What accelerate would do otherwise → what decides it here.
DECIDED = {
    "ACCELERATE_MIXED_PRECISION": "quantization.bnb_4bit_compute_dtype",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "training.gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "training.max_grad_norm",
    "ACCELERATE_DYNAMO_BACKEND": "nothing is compiled",
    "ACCELERATE_USE_CPU": "a GPU is used where there is one; CUDA_VISIBLE_DEVICES= hides it",
    "ACCELERATE_TORCH_DEVICE": "a GPU is used where there is one; CUDA_VISIBLE_DEVICES chooses it",
}
HARMLESS = ("ACCELERATE_LOG_LEVEL", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY")
OFF = ("", "0", "no", "false", "none", "off")


def check_launcher(environ: Mapping[str, str] = os.environ) -> int:
    """How many processes `torchrun` or `accelerate launch` started, of which this is one.

    Raises:
        InputError: another launcher, or a launch that does not say all of what it must.
    """
    found = _several(environ)
    if found is None:
        return 1
    if int(environ.get("WORLD_SIZE") or 1) < 2 or not environ.get("RANK", "").strip():
        raise InputError(
            f"{found} in the environment: start several processes with torchrun or accelerate launch, which set RANK, "
            f"WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; for one process, unset {found.partition('=')[0]}."
        )
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]:
        raise InputError(
            f"WORLD_SIZE={environ['WORLD_SIZE']} in the environment, and {missing[0]} is missing: torchrun and "
            "accelerate launch set both; for one process, unset WORLD_SIZE."
        )
    size, rank = int(environ["WORLD_SIZE"]), int(environ["RANK"])
    if not 0 <= rank < size:
        raise InputError(f"RANK={rank} in the environment: WORLD_SIZE={size} has processes 0 to {size - 1}.")
    here, local = int(environ.get("LOCAL_WORLD_SIZE") or size), int(environ.get("LOCAL_RANK") or 0)
    if not 0 <= local < here <= size:
        raise InputError(
            f"LOCAL_RANK={local} in the environment: of WORLD_SIZE={size} processes LOCAL_WORLD_SIZE={here} are on "
            "this machine; torchrun and accelerate launch set all three."
        )
    return size


def check_one_process(environ: Mapping[str, str] = os.environ) -> None:
    """
    Raises:
        InputError: the environment speaks of several processes, or of a way to train that needs them.
    """
    if found := _several(environ):
        raise InputError(
            f"{found} in the environment: this runs in one process on one device (`qalora finetune` alone takes "
            f"several); start it without torchrun, mpirun or accelerate launch, or unset {found.partition('=')[0]}."
        )
    check_ways(environ)


def _several(environ: Mapping[str, str]) -> str | None:
    """The variable that speaks of several processes, with its value. Where torchrun's WORLD_SIZE says how many there
    are, what another launcher left, such as srun's PMI_SIZE, says nothing.

    Raises:
        InputError: a value that is no number.
    """
    launched = bool(environ.get("WORLD_SIZE", "").strip())
    names = TORCHRUN if launched else (*SIZES, *RANKS)
    given = {name: text for name in names if (text := environ.get(name, "").strip())}
    for name, text in given.items():
        if not text.removeprefix("-").isdecimal():
            raise InputError(f"{name}={text} in the environment: no number of processes; unset it.")
    counts = [name for name in given if name != "LOCAL_WORLD_SIZE"]
    return next((f"{name}={given[name]}" for name in counts if int(given[name]) >= (1 if name in RANKS else 2)), None)


def check_ways(environ: Mapping[str, str]) -> None:
    """
    Raises:
        InputError: accelerate was told to part the model or its optimizer over processes.
    """
    for way in WAYS:
        name = f"ACCELERATE_USE_{way}"
        if environ.get(name, "").lower() not in OFF:
            raise InputError(
                f"{name}={environ[name]} in the environment: each process holds the whole base, in 4 bits; start it "
                f"with torchrun, or with accelerate launch without {way}, or unset {name}."
            )


def taken_out(environ: MutableMapping[str, str]) -> dict[str, str]:
    """Takes out of the environment what speaks of several processes, and returns it."""
    return {name: environ.pop(name) for name in (*SIZES, *RANKS, *OTHERS) if name in environ}


def leave_to_the_recipe(environ: MutableMapping[str, str] = os.environ, *, on_gpu: bool = True) -> list[str]:
    """Takes out of the environment what would have the Trainer do other than the recipe says.

    Args:
        on_gpu: training is on a GPU, so that a word for the CPU is not followed.

    Returns:
        A line for each variable that asked for something.
    """
    said = []
    for name, decides in DECIDED.items():
        value = environ.get(name, "")
        followed = name in ("ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE") and not on_gpu
        if value.lower() not in OFF and not followed:
            said.append(f"{name}={value} is not followed: the recipe decides ({decides})")
    for name in list(environ):
        if name in (*SIZES, *RANKS, *OTHERS) or (name.startswith("ACCELERATE_") and name not in HARMLESS):
            del environ[name]
    return said
