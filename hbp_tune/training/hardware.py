"""What this machine could do, and what this process holds of it."""

import importlib.metadata
import os
import platform
import resource
import sys
from dataclasses import replace

import torch

from hbp_tune.planning.costs.hardware import H100, Rates, gpu_of, rates_of

_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # what getrusage counts in


def peak_flops_per_s(device: torch.device, compute_dtype: torch.dtype) -> float | None:
    """Give the dense peak of a device, or None where it is not known: any dtype but bf16, a CPU, any other GPU.

    Args:
        device: of this rank.
        compute_dtype: of the matrix products.
    """
    if device.type != "cuda" or compute_dtype != torch.bfloat16:
        return None
    gpu = gpu_of(torch.cuda.get_device_name(device))
    return gpu.flops_per_s if gpu else None


def host_memory_gib() -> float:
    """Give the most host memory that this process has held, memory-mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES / 2**30


def device_name(device: torch.device) -> str:
    """Name a device for people and for comparison: a GPU by its vendor's name, a CPU by its architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"


def device_memory_gib(device: torch.device) -> float:
    """Give a device's memory; of a CPU the host's, shared by all its ranks."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def starting_rates(device: torch.device) -> Rates:
    """Give rates to begin a fit with: a known GPU's, an H100's elsewhere, by the device's own name."""
    gpu = gpu_of(device_name(device))
    return replace(rates_of(gpu) if gpu else H100, machine=device_name(device))


def versions() -> dict[str, str]:
    """Give the versions of the software that decides how fast a step is."""
    return {name: importlib.metadata.version(name) for name in ("torch", "torchtune", "hbp-tune")}
