"""What known GPUs reach: figures of data sheets, times the efficiencies that one published set of timings shows."""

import re
from dataclasses import dataclass, fields

from hbp_tune.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What one rank reaches; modelled for a known GPU, or fitted to measurements.

    Args:
        machine: what the rates are of, for people.
        token_flops_per_s: operations outside attention.
        square_flops_per_s: operations of attention.
        exchange_bytes_per_s: received by context parallelism from ranks of the same node.
        network_bytes_per_s: received by context parallelism from other nodes.
        gather_bytes_per_s: weights and gradients moved by FSDP inside one node.
        gather_network_bytes_per_s: the same over several nodes.
        ranks_per_node: GPUs of a node.
        micro_step_tokens: what every forward and backward takes besides, in tokens that could be trained outside attention.

    Raises:
        ConfigError: a rate is not above 0, or ``micro_step_tokens`` is below 0.
    """

    machine: str
    token_flops_per_s: float
    square_flops_per_s: float
    exchange_bytes_per_s: float
    network_bytes_per_s: float
    gather_bytes_per_s: float
    gather_network_bytes_per_s: float
    ranks_per_node: int = 8
    micro_step_tokens: float = 0.0

    def __post_init__(self) -> None:
        for field in (field.name for field in fields(self) if field.name != "machine"):
            value = getattr(self, field)
            if not (value > 0 or (field == "micro_step_tokens" and value == 0)):
                raise ConfigError(f"rates: {field}={value} must be above 0")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU by its vendor's data sheet.

    Args:
        name: as it is part of the device's name.
        flops_per_s: dense bf16.
        memory_gib: of the usual variant.
        link_bytes_per_s: one way to the other GPUs of its node: NVLink, Infinity Fabric, or PCIe where there is neither.
        network_bytes_per_s: one way of the network card that each GPU has in its vendor's systems.
    """

    name: str
    flops_per_s: float
    memory_gib: float
    link_bytes_per_s: float
    network_bytes_per_s: float


# InfiniBand HDR and NDR, 200 and 400 Gb/s: what DGX A100, and DGX H100, H200 and B200 have for each GPU.
_HDR, _NDR = 25e9, 50e9
# First match first: variants before the plain name.
_GPUS = (
    Gpu("H100 PCIe", 756e12, 80, 64e9, _NDR),
    Gpu("H100 NVL", 835e12, 94, 300e9, _NDR),
    Gpu("H200 NVL", 835e12, 141, 450e9, _NDR),
    Gpu("GB200", 2500e12, 186, 900e9, _NDR),
    Gpu("B200", 2250e12, 180, 900e9, _NDR),
    Gpu("GH200", 989e12, 96, 450e9, _NDR),
    Gpu("H200", 989e12, 141, 450e9, _NDR),
    Gpu("H100", 989e12, 80, 450e9, _NDR),
    Gpu("H800", 989e12, 80, 200e9, _NDR),
    Gpu("A100", 312e12, 80, 300e9, _HDR),
    Gpu("A800", 312e12, 80, 200e9, _HDR),
    Gpu("L40S", 362e12, 48, 32e9, _HDR),
    Gpu("L4", 121e12, 24, 32e9, _HDR),
    Gpu("MI300X", 1307e12, 192, 448e9, _NDR),
)
GPUS = {gpu.name: gpu for gpu in _GPUS}
# What Llama 3.1 8B reached on H100 nodes in the HBP paper: a fit to all twelve timings (benchmarks/paper_groups.py; rms 1%, as
# rounded here within 3%). Of other GPUs it is an assumption that they reach the same shares of their data sheets.
_TOKEN_SHARE, _SQUARE_SHARE, _EXCHANGE_SHARE, _NETWORK_SHARE = 0.4, 0.3, 0.15, 0.33
# Fitted with them: what a micro-step takes however short its packs are, 0.08 s. One model cannot tell whether it grows with
# layers, weights or neither; in tokens it is the same share of every model's time.
_MICRO_STEP_TOKENS = 700
# All-gathers and reduce-scatters inside a node: an assumption. Over nodes, all cards of a node together: with this share the
# paper's run without packing (one sample for each of four replicas) takes 7.3 times as long as its ISF, as 38.3 is to 5.22 GPU
# days. Days by themselves would say less than half of it: they are 2.2 times what the paper's own timings make of one epoch.
_GATHER_SHARE, _GATHER_NETWORK_SHARE = 0.7, 0.66


def gpu_of(device_name: str) -> Gpu | None:
    """Give the data sheet of a device by its name, such as ``NVIDIA H100 80GB HBM3``; None where it is not known."""
    return next((gpu for gpu in _GPUS if re.search(rf"\b{gpu.name}\b", device_name)), None)


def gpu_named(name: str) -> Gpu:
    """Give the data sheet of a GPU by its name.

    Raises:
        ConfigError: it is not known.
    """
    if name not in GPUS:
        raise ConfigError(f"gpu={name!r} is not known; choose from {', '.join(GPUS)}")
    return GPUS[name]


def rates_of(gpu: Gpu, ranks_per_node: int = 8) -> Rates:
    """Model what a GPU reaches, in nodes of so many.

    Args:
        gpu: by its data sheet.
        ranks_per_node: GPUs of a node, each with its network card.
    """
    return Rates(
        machine=gpu.name,
        token_flops_per_s=_TOKEN_SHARE * gpu.flops_per_s,
        square_flops_per_s=_SQUARE_SHARE * gpu.flops_per_s,
        exchange_bytes_per_s=_EXCHANGE_SHARE * gpu.link_bytes_per_s,
        network_bytes_per_s=_NETWORK_SHARE * gpu.network_bytes_per_s,
        gather_bytes_per_s=_GATHER_SHARE * gpu.link_bytes_per_s,
        gather_network_bytes_per_s=_GATHER_NETWORK_SHARE * gpu.network_bytes_per_s * ranks_per_node,
        ranks_per_node=ranks_per_node,
        micro_step_tokens=_MICRO_STEP_TOKENS,
    )


H100 = rates_of(GPUS["H100"])
