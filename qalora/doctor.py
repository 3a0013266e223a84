"""`qalora doctor`: this machine, what would fail or be slow on it, and what to do. Works where a package is broken or
missing."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qalora.cli import DONE, NO, Parser
from qalora.environment import check_launcher, check_ways, leave_to_the_recipe
from qalora.errors import InputError
from qalora.flags import add

GIB = 2**30
LEAST_DISK = 1 * GIB  # checkpoints, adapters and figures of a small run
LEAST_CACHE = 15 * GIB  # llama-7b in 16 bits is 13.5 GB
LEAST_MEMORY = 4 * GIB  # what the quickstart needs
INSTALL = "pip install --upgrade qalora"


@dataclass(frozen=True)
class Finding:
    """
    Attributes:
        level: fails: a command would; slow: it would work, and slower than it could; note: what a reader of figures
            should know.
        what: the fact; do: what to do about it.
    """

    level: Literal["fails", "slow", "note"]
    what: str
    do: str


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="qalora doctor",
        description="Says what this machine has for a run, what would fail or be slow on it, and what to do. Exit code "
        "1 when something would fail.",
    )
    add(parser, "--json", more="print all of it as JSON, for a bug report; no tokens are in it")
    return parser


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)

    from qalora.machine import examine

    facts = examine()
    findings = [*of_packages(facts), *of_devices(facts), *of_room(facts), *of_environment(facts)]
    if args.json:
        print(json.dumps({**facts, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        print("\n".join([*described(facts), "", *advice(findings)]))
    return NO if any(finding.level == "fails" for finding in findings) else DONE


# ------------------------------------------------------------------------------------------- what the facts mean (pure)


def of_packages(facts: Mapping[str, Any]) -> Iterator[Finding]:
    broken = facts["broken"]
    torchless = "torch" in broken
    for name, error in broken.items():
        if torchless and name != "torch":
            continue  # most of them need it
        missing = facts["versions"].get(name) is None
        what = (
            f"{name} is not installed" if missing else f"{name} {facts['versions'][name]} cannot be imported: {error}"
        )
        yield Finding("fails", what, f"pip install {'' if missing else '--force-reinstall '}{name}")
    for requirement in facts["unsatisfied"]:
        name = requirement.split(" (")[0]
        if not requirement.endswith("(not installed)"):
            yield Finding("fails", f"qalora needs {requirement}", f'pip install "{name}"')
    if facts["qalora_error"] and not broken:
        yield Finding(
            "fails",
            f"qalora cannot be loaded with these packages: {facts['qalora_error']}",
            f"{INSTALL} in a fresh environment",
        )


def of_devices(facts: Mapping[str, Any]) -> Iterator[Finding]:
    compute, where = facts["compute"], facts["platform"]
    if compute and compute["error"]:
        yield Finding(
            "fails",
            f"4 bits do not work on {compute['device']}: {compute['error']}",
            "install the bitsandbytes that goes with torch's CUDA or ROCm (pip install --upgrade bitsandbytes), or "
            "pass --no-quantize",
        )
    for device in facts["devices"]:
        if "error" in device:
            yield Finding(
                "fails",
                f"{device['device']} cannot be used: {device['error']}",
                "see the driver, or hide it: CUDA_VISIBLE_DEVICES",
            )
        elif device.get("free", 1) < 0.5 * device.get("total", 0):
            yield Finding(
                "note",
                f"{device['device']}: {device['free'] / GIB:.1f} of {device['total'] / GIB:.1f} GiB are free, other "
                "processes have the rest",
                "end them, or let training.fit=auto plan with what is free",
            )
    if len(facts["devices"]) > 1:
        yield Finding("note", f"{len(facts['devices'])} GPUs, and a run uses one", "CUDA_VISIBLE_DEVICES chooses which")
    if facts["devices"]:
        if compute and compute["dtype"] == "float16":
            yield Finding(
                "slow",
                "this GPU has no bf16 arithmetic (it came with Ampere): fp16 is computed in",
                "--profile t4 is made for it",
            )
        return
    if facts["driver_without_torch"]:
        yield Finding(
            "slow",
            f"a GPU's driver is here, and torch cannot use it: {facts['driver_without_torch']}",
            "install the torch build of your CUDA or ROCm version (pytorch.org), or a newer driver",
        )
    elif compute:
        yield from _of_cpu(where)


def _of_cpu(where: Mapping[str, Any]) -> Iterator[Finding]:
    yield Finding(
        "slow",
        "no GPU: a run computes on the CPU, where there is no fast 4-bit path: each forward dequantizes every layer",
        "small models such as smollm2-135m, --profile cpu; --no-quantize where memory allows",
    )
    flags = where["cpu_flags"]
    if flags is None:
        return
    if "avx512f" not in flags:
        yield Finding(
            "slow",
            "this CPU has no AVX-512, which bitsandbytes dequantizes fastest with",
            "--no-quantize where memory allows",
        )
    if "avx512_bf16" not in flags and "amx_bf16" not in flags:
        yield Finding(
            "slow",
            "this CPU has no bf16 arithmetic (AVX512_BF16, AMX)",
            "dtype auto measures which is faster, bf16 or fp32",
        )


def of_room(facts: Mapping[str, Any]) -> Iterator[Finding]:
    disk, memory = facts["disk"], facts["memory"]
    needed = {"working folder": LEAST_DISK, "temporary files": LEAST_DISK // 4}
    for name, least in needed.items():
        place = disk[name]
        if not place["writable"]:
            yield Finding(
                "fails", f"{name} {place['path']} cannot be written to", "go to another folder, or pass --output-dir"
            )
        elif place["free"] < least:
            yield Finding(
                "fails",
                f"{place['free'] / GIB:.1f} GiB free for {name} ({place['path']})",
                "make room, or pass --output-dir",
            )
    cache = disk["Hugging Face cache"]
    if facts["hub"]["offline"]:
        yield Finding(
            "note",
            "HF_HUB_OFFLINE: models and rows are taken from the cache, nothing is downloaded",
            "unset it to download",
        )
    elif not cache["writable"]:
        yield Finding(
            "fails", f"the Hugging Face cache {cache['path']} cannot be written to", "set HF_HOME to a folder that can"
        )
    elif cache["free"] < LEAST_CACHE:
        yield Finding(
            "note",
            f"{cache['free'] / GIB:.1f} GiB free for the Hugging Face cache ({cache['path']}); llama-7b is a download "
            "of 13.5 GB",
            "set HF_HOME to a larger disk",
        )
    if memory and memory["available"] < LEAST_MEMORY:
        yield Finding(
            "slow",
            f"{memory['available'] / GIB:.1f} GiB of memory are available; the quickstart takes up to 4",
            "close other programs",
        )
    where = facts["platform"]
    if where["wsl"] and disk["working folder"]["path"].startswith("/mnt/"):
        yield Finding(
            "slow", "a Windows disk under WSL, which is read and written slowly", "work below your Linux home"
        )
    if where["system"].startswith("Windows"):
        yield Finding("fails", "Windows: qalora needs a POSIX system", "use WSL")


def of_environment(facts: Mapping[str, Any]) -> Iterator[Finding]:
    environ = dict(facts["environment"])
    try:
        check_launcher(environ)
        check_ways(environ)
    except InputError as error:
        what, _, do = str(error).rpartition("; ")
        yield Finding("fails", what, do.rstrip("."))
    for line in leave_to_the_recipe(environ, on_gpu=bool(facts["devices"])):
        yield Finding("note", line, "unset it")
    cores, threads = facts["platform"]["cores"] or 1, environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and int(threads) < cores and not facts["devices"]:
        yield Finding(
            "slow",
            f"OMP_NUM_THREADS={threads}, of {cores} cores",
            f"unset it, or OMP_NUM_THREADS={cores}, for one run at a time",
        )
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        if environ.get(name, "0").strip() in ("", "-1"):
            yield Finding("note", f"{name}={environ[name]} hides every GPU", "unset it to use one")
    if "BNB_CUDA_VERSION" in environ:
        yield Finding(
            "note",
            f"BNB_CUDA_VERSION={environ['BNB_CUDA_VERSION']} chooses bitsandbytes' library",
            "unset it if 4 bits fail",
        )


# ----------------------------------------------------------------------------------------------------------- for people


def described(facts: Mapping[str, Any]) -> Iterator[str]:
    """The facts in lines."""
    versions, where = facts["versions"], facts["platform"]
    names = [f"{name} {version or 'missing'}" for name, version in versions.items() if name not in ("qalora", "python")]
    yield (
        f"qalora      {versions['qalora']}, Python {versions['python']}, "
        f"{where['system']}{' (WSL)' if where['wsl'] else ''}"
    )
    yield from _wrapped("packages", names)
    yield _line("CPU", f"{where['cpu']}, {where['cores']} cores{_flags(where['cpu_flags'])}")
    for device in facts["devices"]:
        yield _line("GPU", _gpu(device))
    if not facts["devices"]:
        yield _line("GPU", "none")
    if compute := facts["compute"]:
        yield _line(
            "computes in", f"{compute['dtype']}: {why(compute, facts)}" if compute["dtype"] else "nothing: see below"
        )
        yield _line("4 bits", compute["error"] or f"work on {compute['device']}")
    if memory := facts["memory"]:
        yield _line("memory", f"{memory['available'] / GIB:.1f} of {memory['total'] / GIB:.1f} GiB available")
    for name, place in facts["disk"].items():
        yield _line("disk", f"{place['free'] / GIB:.1f} GiB free for {name} ({place['path']})")
    yield _line("Hub", f"HF_TOKEN {facts['hub']['token']}, {'offline' if facts['hub']['offline'] else 'online'}")
    yield from _wrapped("variables", [f"{name}={value}" for name, value in facts["environment"].items()])


def why(compute: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Why 4-bit weights are dequantized to that dtype here."""
    if facts["devices"]:
        device = facts["devices"][0]
        reason = (
            "bf16 arithmetic"
            if compute["dtype"] == "bfloat16"
            else "no bf16 arithmetic; adapters stay in fp32, losses are scaled"
        )
        return f"{_capability(device) or device['kind']} has {reason}"
    return "measured to be the faster one of bfloat16 and float32 on this CPU"


def advice(findings: list[Finding]) -> Iterator[str]:
    """The findings in lines, the worst first."""
    if not findings:
        yield "nothing here would fail or be slow"
    for level in ("fails", "slow", "note"):
        for finding in findings:
            if finding.level == level:
                yield f"{level + ':':7}{finding.what}"
                yield f"{'':7}→ {finding.do}"


def _line(name: str, text: str) -> str:
    return f"{name:<12}{text}"


def _wrapped(name: str, parts: list[str]) -> Iterator[str]:
    """Parts with commas between them, in lines that begin alike."""
    line = ""
    for part in parts:
        if line and len(line) + len(part) > 100:
            yield _line(name, f"{line},")
            name, line = "", ""
        line = f"{line}, {part}" if line else part
    if line:
        yield _line(name, line)


def _flags(flags: list[str] | None) -> str:
    return "" if flags is None else f", {' '.join(flags) or 'no AVX2'}"


def _gpu(device: Mapping[str, Any]) -> str:
    if "error" in device:
        return f"{device['device']}: {device['error']}"
    kind = ", ".join(filter(None, (device["kind"], _capability(device))))
    free = (
        f"{device['free'] / GIB:.1f} of {device['total'] / GIB:.1f} GiB free"
        if "free" in device
        else "memory is the machine's"
    )
    return f"{device['device']} {device['name']} ({kind}), {free}"


def _capability(device: Mapping[str, Any]) -> str:
    """What CUDA calls its generations by; nothing for other kinds."""
    return "compute capability {}.{}".format(*device["capability"]) if "capability" in device else ""


if __name__ == "__main__":
    from qalora.cli import run

    sys.exit(run(main))
