"""What this machine could do, and what this process holds of it."""

import resource
import sys

import torch

from hbp_tune.components.planning.hardware import gpu_of

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
