"""What launchers leave in the environment, as `torchrun`, `accelerate launch` and MPI set it."""

from __future__ import annotations

import pytest

from qalora.environment import check_launcher, check_one_process, leave_to_the_recipe, taken_out
from qalora.errors import InputError

# accelerate launch --num_processes 1, of a script that is to run in fp32.
LAUNCHED = {
    "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_USE_CPU": "False", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False", "OMP_NUM_THREADS": "1",
}  # fmt: skip
TORCHRUN = {
    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip
# A task of srun that runs torchrun for itself.
IN_SRUN = TORCHRUN | {"PMI_SIZE": "2", "PMI_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
SLURM = {"SLURM_NTASKS": "8", "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_JOB_NUM_NODES": "2"}


@pytest.mark.parametrize("environ", [{}, LAUNCHED, TORCHRUN, IN_SRUN, SLURM, {"LOCAL_RANK": "-1", "WORLD_SIZE": ""}])
def test_one_process_is_one_whoever_started_it(environ):
    check_one_process(environ)
    assert check_launcher(environ) == 1
    left = dict(environ)
    assert leave_to_the_recipe(left) == []
    kept = {"OMP_NUM_THREADS", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", *SLURM}
    assert left == {name: value for name, value in environ.items() if name in kept}


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2"),
        (TORCHRUN | {"WORLD_SIZE": "4", "RANK": "3"}, "WORLD_SIZE=4"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2"),
        ({"PMI_SIZE": "16"}, "PMI_SIZE=16"),
        ({"ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP=true"),
        ({"ACCELERATE_USE_DEEPSPEED": "True"}, "ACCELERATE_USE_DEEPSPEED=True"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
    ],
)
def test_several_processes_are_refused_by_the_variable_that_says_so(environ, name):
    with pytest.raises(InputError) as error:
        check_one_process(environ)
    assert str(error.value).startswith(f"{name} in the environment: ")


def test_what_accelerate_would_do_otherwise_is_said_and_not_done():
    asked = {
        "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_USE_CPU": "True",
    }  # fmt: skip
    environ = dict(asked)
    said = leave_to_the_recipe(environ)
    assert environ == {}
    assert [line.partition(" ")[0] for line in said] == [f"{name}={value}" for name, value in asked.items()]
    assert said[0].endswith("the recipe decides (quantization.bnb_4bit_compute_dtype)")
    assert len(leave_to_the_recipe(dict(asked), on_gpu=False)) == 3  # a word for the CPU is followed there


SEVERAL = TORCHRUN | {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def test_a_launch_of_torchrun_or_accelerate_is_joined_and_taken_out_of_the_environment():
    assert check_launcher(SEVERAL) == 4
    assert check_launcher(SEVERAL | {"ACCELERATE_MIXED_PRECISION": "no", "OMPI_COMM_WORLD_SIZE": "4"}) == 4
    environ = dict(SEVERAL)
    assert taken_out(environ) == {
        name: SEVERAL[name] for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    }
    assert check_launcher(environ) == 1 and environ["MASTER_PORT"] == "29500"


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2 in the environment: start several processes with tor"),
        ({"PMI_SIZE": "16", "PMI_RANK": "3"}, "PMI_SIZE=16 in the environment: start several processes with torchrun"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 in the environment: start several"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1 in the environment: start several"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 in the environment, and MASTER_ADDR is missing"),
        (SEVERAL | {"RANK": "4"}, "RANK=4 in the environment: WORLD_SIZE=4 has processes 0 to 3"),
        (SEVERAL | {"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment: no number"),
        (SEVERAL | {"RANK": "one"}, "RANK=one in the environment: no number"),
        (SEVERAL | {"LOCAL_RANK": "0.0"}, "LOCAL_RANK=0.0 in the environment: no number"),
        (SEVERAL | {"LOCAL_WORLD_SIZE": "all"}, "LOCAL_WORLD_SIZE=all in the environment: no number"),
        (SEVERAL | {"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1 in the environment: of WORLD_SIZE=4 processes"),
        (SEVERAL | {"LOCAL_RANK": "2"}, "LOCAL_RANK=2 in the environment: of WORLD_SIZE=4 processes LOCAL_WORLD"),
        (SEVERAL | {"LOCAL_WORLD_SIZE": "8"}, "LOCAL_RANK=1 in the environment: of WORLD_SIZE=4 processes LOCAL_WORLD"),
    ],
)  # fmt: skip
def test_a_launch_that_cannot_be_joined_is_refused_by_the_variable_that_says_so(environ, says):
    with pytest.raises(InputError) as error:
        check_launcher(environ)
    assert str(error.value).startswith(says)
