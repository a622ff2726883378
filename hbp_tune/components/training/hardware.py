"""What this machine could do, and what this process holds of it."""

import re
import resource
import sys

import torch

# Dense bf16 operations per second by the vendors' data sheets, first match first: variants before the plain name.
_PEAK_FLOPS_PER_S = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "MI300X": 1307e12,
}
_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # what getrusage counts in


def peak_flops_per_s(device: torch.device, compute_dtype: torch.dtype) -> float | None:
    """Give the dense peak of a device, or None where it is not known: any dtype but bf16, a CPU, any other GPU.

    Args:
        device: of this rank.
        compute_dtype: of the matrix products.
    """
    if device.type != "cuda" or compute_dtype != torch.bfloat16:
        return None
    return dense_bf16_peak(torch.cuda.get_device_name(device))


def dense_bf16_peak(device_name: str) -> float | None:
    """Give the operations per second of a device by its name, such as ``NVIDIA H100 80GB HBM3``; None where it is not known."""
    return next((peak for name, peak in _PEAK_FLOPS_PER_S.items() if re.search(rf"\b{name}\b", device_name)), None)


def host_memory_gib() -> float:
    """Give the most host memory that this process has held, memory-mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES / 2**30
