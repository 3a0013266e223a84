"""What launchers leave in the environment: one process trains, and the recipe decides how. Torch-free.

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
# Ways to train that need several processes.
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


def check_one_process(environ: Mapping[str, str] = os.environ) -> None:
    """
    Raises:
        InputError: the environment speaks of several processes, or of a way to train that needs them.
    """
    for name in (*SIZES, *RANKS):
        least = 1 if name in RANKS else 2
        text = environ.get(name, "").strip()
        if text and not text.lstrip("-").isdecimal():
            raise InputError(f"{name}={text} in the environment: no number of processes; unset it.")
        if text and int(text) >= least:
            raise InputError(
                f"{name}={text} in the environment: qalora trains in one process on one device; start it without "
                f"torchrun, mpirun or several processes of accelerate launch, or unset {name}."
            )
    for way in WAYS:
        name = f"ACCELERATE_USE_{way}"
        if environ.get(name, "").lower() not in OFF:
            raise InputError(
                f"{name}={environ[name]} in the environment: qalora trains in one process on one device; start it "
                f"without accelerate launch, or unset {name}."
            )


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
