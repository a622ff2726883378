"""``hbp doctor``: what this machine has for hbp-tune, and what is missing."""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from rich.console import Console

from hbp_tune.cli.registry import TRAIN
from hbp_tune.errors import ConfigError
from hbp_tune.parallel import select_attention
from hbp_tune.parallel.attention import has_flash_attention
from hbp_tune.planning.costs.hardware import gpu_of

_GIB = 2**30
# Ranks on one machine hand tensors to each other and to loader workers through it.
_ENOUGH_SHM_GIB = 2


class Finding(NamedTuple):
    """One line of the report; ``mend`` says how where something is wrong, ``is_needed`` whether nothing works without."""

    what: str
    found: str
    mend: str = ""
    is_needed: bool = False


def add_doctor(commands: Any) -> None:
    """Add the command's arguments."""
    parser = commands.add_parser(
        "doctor",
        prog="hbp doctor",
        help="Say what this machine has, and what is missing.",
        description="Look at versions, devices, kernels and limits. The exit status is 1 where nothing would train.",
    )
    parser.set_defaults(func=_run)


def _run(args: argparse.Namespace) -> int:
    console = Console(highlight=False, soft_wrap=True)
    is_ill = False
    for finding in examine():
        sign, style = ("ok", "green") if not finding.mend else ("MISSING", "red") if finding.is_needed else ("note", "yellow")
        is_ill |= bool(finding.mend) and finding.is_needed
        console.print(f"{sign:<8}", style=style, end="")
        console.print(f"{finding.what:<20} {finding.found}", markup=False)
        if finding.mend:
            console.print(f"{'':<29}{finding.mend}", markup=False)
    sys.stdout.write("Training cannot work here.\n" if is_ill else "Ready to train.\n")
    return int(is_ill)


def examine() -> Iterator[Finding]:
    """Look at one thing after the other."""
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from _versions()
    yield from _devices()
    yield from _kernels()
    yield from _ways_to_start()
    yield from _limits()


def _versions() -> Iterator[Finding]:
    yield Finding("hbp-tune", importlib.metadata.version("hbp-tune"))
    wanted = [Requirement(text) for text in importlib.metadata.requires("hbp-tune") or [] if "extra ==" not in text]
    for requirement in wanted:
        if requirement.name not in ("torch", "torchtune", "torchao", "torchdata"):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(requirement.name, "not installed", f"pip install '{requirement}'", is_needed=True)
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        yield Finding(requirement.name, version, "" if fits else f"pip install '{requirement}'", is_needed=True)


def _devices() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding("GPU", "none", "the demo and all tests run on the CPU; training at scale needs NVIDIA or AMD GPUs")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        mend = "" if gpu_of(properties.name) else "its data sheet is not known here: MFU is not shown, hbp plan needs gpu=NAME"
        yield Finding(f"GPU {index}", f"{properties.name}, {properties.total_memory / _GIB:.0f} GiB", mend)
    backends = [name for name in ("nccl", "gloo") if dist.is_backend_available(name)]
    lacks_nccl = torch.cuda.is_available() and "nccl" not in backends
    yield Finding("collectives", ", ".join(backends), "install a torch build with NCCL" if lacks_nccl else "", is_needed=True)


def _kernels() -> Iterator[Finding]:
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    try:
        _, why = select_attention("auto", torch.device(device), dtype)
        yield Finding("attention", why.removeprefix("attention: "))
    except ConfigError as error:
        yield Finding("attention", "no kernel", str(error), is_needed=True)
    for module, extra in (("flash_attn", "flash"), ("liger_kernel", "liger")):
        has = has_flash_attention() if module == "flash_attn" else importlib.util.find_spec(module) is not None
        yield Finding(module, "installed" if has else f"not installed (optional: pip install 'hbp-tune[{extra}]')")
    compiler = shutil.which("g++") or shutil.which("clang++")
    yield Finding("C++ compiler", compiler or "none", "" if compiler else "compile=True needs one on a CPU, and Python's headers")


def _ways_to_start() -> Iterator[Finding]:
    tune = shutil.which("tune")
    yield Finding("tune", tune or "not on PATH", "" if tune else "activate the environment, or use hbp run or torchrun -m")
    found = importlib.util.find_spec(TRAIN) is not None
    mend = "" if found else "tune run NAME does not find our recipes; install the package again: pip install --force-reinstall ."
    yield Finding("tune run NAME", "finds our recipes" if found else "does not find our recipes", mend)


def _limits() -> Iterator[Finding]:
    if os.path.isdir("/dev/shm"):
        free_gib = shutil.disk_usage("/dev/shm").free / _GIB
        small = "" if free_gib >= _ENOUGH_SHM_GIB else "loader workers need it: docker run --shm-size=16g, or num_workers=0"
        yield Finding("/dev/shm", f"{free_gib:.1f} GiB free", small)
    yield Finding("disk", f"{shutil.disk_usage('.').free / _GIB:.0f} GiB free here, for checkpoints and progress")
