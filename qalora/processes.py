"""Several processes as one run: each does its share of the work, and all hold the same adapter. Torch-free at import.

`torchrun` and `accelerate launch` say by variables which process of how many this is. `joined` takes them out of the
environment while a run lasts: accelerate and the Trainer see one process, so order of rows, schedule, state and resume
are those of one. What is exchanged passes through here; alone, every function is what one process does anyway.

    exchange     a value of each process, in their order
    together     a list of work shared out, and its results gathered
    from_first   what process 0 alone does, and its result
    sum_         a tensor summed in place

A process in trouble says so in the next exchange, where the others wait: memory that ran out is raised in all of them,
so that all try again; an error ends all, and is said once.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from qalora import progress
from qalora.environment import check_launcher, check_ways, taken_out
from qalora.errors import AnswerNo, EndedElsewhere, InputError
from qalora.watch import Watch

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
P = TypeVar("P")
# A process may wait that long for another's share, as of generated answers; one that ends is noticed at once.
PATIENCE = timedelta(hours=4)
MEETING = timedelta(minutes=10)  # in which all have to be there, on all nodes
NOTICE = 3.0  # seconds in which the watch ends a process whose exchange failed, and names the one that is gone


@dataclass(frozen=True)
class Group:
    """
    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        on_this_machine: how many of them share its memory.
    """

    rank: int = 0
    size: int = 1
    on_this_machine: int = 1


_group = Group()
_meetings = count()


class Lost(AnswerNo):
    """Another process is gone."""


def rank() -> int:
    return _group.rank


def size() -> int:
    return _group.size


def is_first() -> bool:
    """Whether this is the process that writes and speaks; alone, it is."""
    return _group.rank == 0


@contextmanager
def joined(environ: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """All processes of a launch are one run while the block lasts; in a block inside another, nothing changes.

    Raises:
        InputError: a launch that cannot be joined, or fewer GPUs than processes.
    """
    global _group
    if size() > 1:
        yield
        return
    if check_launcher(environ) == 1:
        check_ways(environ)
        yield
        return
    _group, variables = _join(environ)
    watch = Watch(rank(), size(), environ["MASTER_ADDR"], lambda value: exchange(value)[0])
    said = False
    try:
        with _one_voice():
            with agreeing():
                check_ways(environ)
                _check_devices()
            yield
        said = True
    except BaseException as error:
        said = _is_said(error) is True
        raise
    finally:
        watch.close(said=said)
        _leave(said)
        _group = Group()
        environ.update(variables)


@contextmanager
def _one_voice() -> Iterator[None]:
    """In the block process 0 speaks, and another one only of its own errors."""
    if is_first():
        yield
        return
    drawn = progress.is_wanted()
    progress.show(False)
    progress.console.quiet = True
    try:
        yield
    except (InputError, AnswerNo) as error:
        text = error.as_typed if isinstance(error, InputError) else str(error)
        error.args = (f"process {rank()} on {socket.gethostname()}: {text}",)
        raise
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError" and _is_said(error):  # process 0 has it too
            raise EndedElsewhere(1) from None
        raise
    finally:
        progress.show(drawn)
        progress.console.quiet = False


def exchange(value: T) -> list[T]:
    """The value that each process gives, in their order.

    Raises:
        EndedElsewhere: another process has said its error.
        Lost: another process is gone.
        torch.OutOfMemoryError: memory ran out in one of them.
    """
    return _exchange(value, None)


def together(parts: Sequence[P], work: Callable[[P], T], track: Callable[[Sequence[P]], Iterable[P]] = iter) -> list[T]:
    """`work` on every part, in the order of the parts; each process does its share of them.

    Args:
        track: how it goes through its share, such as under a bar.

    Raises:
        torch.OutOfMemoryError: in all processes, where memory ran out in one.
    """
    if size() == 1:
        return [work(part) for part in track(parts)]
    shares = _told(lambda: [work(part) for part in track(parts[rank() :: size()])])
    return [shares[index % size()][index // size()] for index in range(len(parts))]


def from_first(work: Callable[[], T]) -> T:
    """What `work` returns in process 0, which alone does it.

    Raises:
        EndedElsewhere: it failed there.
    """
    if size() == 1:
        return work()
    with agreeing_on_errors():
        return _told(lambda: work() if is_first() else None)[0]  # type: ignore[return-value]


def in_step(work: Callable[[], T]) -> T:
    """`work`, which may exchange values; where memory runs out in one process, it does in all.

    Raises:
        torch.OutOfMemoryError: in all processes, where memory ran out in one.
    """
    if size() == 1:
        return work()
    return _told(work, gathered=False)[rank()]


@contextmanager
def agreeing() -> Iterator[None]:
    """An error in the block ends all processes; the lowest that has one raises it.

    Raises:
        EndedElsewhere: in the others.
    """
    if size() == 1:
        yield
        return
    with agreeing_on_errors():
        yield
        _exchange(None, None)


@contextmanager
def agreeing_on_errors() -> Iterator[None]:
    """`agreeing`, of a block that ends with an exchange."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if _is_said(error) is not None:
            raise
        _exchange(None, error)


@contextmanager
def in_sums() -> Iterator[None]:
    """A block in which the others may be summing, where no error can be said: one that nobody knows of ends this
    process, and by that all."""
    try:
        yield
    except Exception as error:
        if _is_said(error) is None:
            error.said = False  # type: ignore[attr-defined]
        raise


def sum_(tensor: Tensor) -> None:
    """Adds the tensors of all processes up, in place.

    Raises:
        Lost: another process is gone.
    """
    if size() > 1:
        import torch.distributed as dist

        with _noticed():
            dist.all_reduce(tensor)


def least(number: int) -> int:
    """The least of the processes' numbers."""
    return min(exchange(number))


def any_of(flag: bool) -> bool:
    """Whether one of the processes says so."""
    return any(exchange(flag))


def on_this_machine() -> int:
    """How many of the processes share the memory of this machine."""
    return _group.on_this_machine


def check_same(
    values: Mapping[str, object], what: str, advice: str, wrong: type[InputError] | type[AnswerNo] = InputError
) -> None:
    """
    Args:
        values: name → what all processes are to have alike, such as a digest.
        what: begins the error.
        advice: ends it.
        wrong: the error.

    Raises:
        InputError, AnswerNo: they have not; names the first that differs, and the process.
    """
    for other, theirs in enumerate(exchange(dict(values))):
        if differing := [name for name in {**values, **theirs} if values.get(name) != theirs.get(name)]:
            raise wrong(
                f"{what}: process {rank()} and process {other} differ in {differing[0]}"
                + (f" and {len(differing) - 1} more" if len(differing) > 1 else "")
                + f"; {advice}"
            )


def see_one_gpu(environ: MutableMapping[str, str], place: int) -> None:
    """Has this process see one GPU of the machine, before CUDA starts: all else is then as where there is one.

    A process that is shown a single GPU already, as SLURM can do it, keeps that.

    Args:
        place: of the GPU among those that are visible.
    """
    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        environ["CUDA_VISIBLE_DEVICES"] = str(place)
        return
    visible = [name for name in named.split(",") if name.strip()]
    if len(visible) > 1:
        environ["CUDA_VISIBLE_DEVICES"] = visible[place] if place < len(visible) else ""


def tell(text: str) -> None:
    """A line for the user, from whichever process; the first one's as ever."""
    if is_first():
        progress.console.print(text)
    else:
        print(f"process {rank()}: {text}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------- small parts


def _is_said(error: BaseException) -> bool | None:
    """Whether all processes know of the error, or of the one that it gives as its cause; None: it can be said yet."""
    if isinstance(error, (EndedElsewhere, Lost)):
        return True
    said: bool | None = getattr(error, "said", None)
    return _is_said(error.__cause__) if said is None and error.__cause__ is not None else said


def _told(work: Callable[[], Any], *, gathered: bool = True) -> list[Any]:
    """What `work` returned in each process.

    Args:
        gathered: the others need this process' result.
    """
    import torch

    try:
        result = work()
    except torch.OutOfMemoryError as error:
        if _is_said(error) is None:
            _exchange(None, error)
        raise
    if gathered:
        return exchange(result)
    exchange(None)
    return [result] * size()


def _exchange(value: T, trouble: BaseException | None) -> list[T]:
    if size() == 1:
        if trouble is not None:
            raise trouble
        return [value]
    import torch
    import torch.distributed as dist

    found: list[Any] = [None] * size()
    with _noticed():
        dist.all_gather_object(found, (_kind(trouble), value))
    kinds = [kind for kind, _ in found]
    errors = [index for index, kind in enumerate(kinds) if isinstance(kind, int)]
    if errors:
        if trouble is not None and errors[0] == rank():
            trouble.said = True  # type: ignore[attr-defined]
            raise trouble
        raise EndedElsewhere(kinds[errors[0]])
    if "memory" in kinds:
        error = trouble or torch.OutOfMemoryError(f"memory ran out in process {kinds.index('memory')}")
        error.said = True  # type: ignore[attr-defined]
        raise error
    return [value for _, value in found]


def _kind(trouble: BaseException | None) -> object:
    """Of trouble, what the others are told: the exit code of an error, or that memory ran out."""
    if trouble is None:
        return None
    if type(trouble).__name__ == "OutOfMemoryError":
        return "memory"
    if isinstance(trouble, SystemExit):
        return trouble.code if isinstance(trouble.code, int) else 1
    return 2 if isinstance(trouble, InputError) else 1


@contextmanager
def _noticed() -> Iterator[None]:
    """
    Raises:
        Lost: the exchange in the block failed, which it does where a process is gone.
    """
    try:
        yield
    except RuntimeError as error:
        time.sleep(NOTICE)
        raise Lost(
            f"another of the {size()} processes has ended, and this one with it ({str(error).splitlines()[0][:200]}); "
            "continue with the same command and --resume-from-checkpoint auto."
        ) from error


def _join(environ: MutableMapping[str, str]) -> tuple[Group, dict[str, str]]:
    """(this process among the others, the variables that said so).

    Raises:
        InputError: the processes cannot meet, or a script was quicker to use what a run sets up.
    """
    own = {name: int(environ.get(name) or 0) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    local = int(environ.get("LOCAL_WORLD_SIZE") or own["WORLD_SIZE"])
    see_one_gpu(environ, own["LOCAL_RANK"])

    import torch
    import torch.distributed as dist

    if dist.is_initialized() or (torch.cuda.is_initialized() and torch.cuda.device_count() > 1):
        begun = "torch.distributed" if dist.is_initialized() else "CUDA"
        raise InputError(
            f"{begun} was begun before the run, which does that itself where there are several processes: call "
            "qalora.finetune first, before init_process_group, Accelerator() or anything on a GPU."
        )
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=dist.PrefixStore(f"qalora-{next(_meetings)}", _meeting_place()),
            rank=own["RANK"],
            world_size=own["WORLD_SIZE"],
            timeout=PATIENCE,
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the {own['WORLD_SIZE']} processes of the launch did not find each other "
            f"({str(error).splitlines()[0][:200]}); check MASTER_ADDR and MASTER_PORT, and that each node can reach "
            "them."
        ) from None
    return Group(own["RANK"], own["WORLD_SIZE"], local), taken_out(environ)


@cache
def _meeting_place() -> Any:
    """The store through which the processes of a launch find each other, for as many runs as a script makes."""
    import torch.distributed as dist

    store, _, _ = next(dist.rendezvous("env://", timeout=MEETING))
    store.set_timeout(MEETING)
    return store


def _check_devices() -> None:
    """
    Raises:
        InputError: some processes have a GPU and others none, or two have the same.
    """
    import torch

    device = str(torch.cuda.get_device_properties(0).uuid) if torch.cuda.is_available() else None
    found = exchange((socket.gethostname(), device))
    with_gpu = [place for place in found if place[1] is not None]
    if with_gpu and len(set(with_gpu)) < len(found):
        raise InputError(
            f"{len(found)} processes were started on {len(set(with_gpu))} GPUs: each needs one of its own; lower "
            "--nproc_per_node (torchrun) or --num_processes (accelerate launch); CUDA_VISIBLE_DEVICES may hide some."
        )


def _leave(said: bool) -> None:
    """
    Args:
        said: the others know that this process ends, and do so too.
    """
    import torch.distributed as dist

    if said or "nccl" not in dist.get_backend():  # whose end waits for the others
        dist.destroy_process_group()
