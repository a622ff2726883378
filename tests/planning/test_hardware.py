from dataclasses import replace

import pytest

from hbp_tune.errors import ConfigError
from hbp_tune.planning.costs.hardware import GPUS, H100, gpu_of, rates_of


def test_gpus_by_device_name() -> None:
    assert gpu_of("NVIDIA H100 80GB HBM3") == GPUS["H100"]
    assert gpu_of("NVIDIA H100 PCIe") == GPUS["H100 PCIe"]
    assert gpu_of("NVIDIA A100-SXM4-80GB") == GPUS["A100"]
    assert gpu_of("NVIDIA GB200") == GPUS["GB200"]
    assert gpu_of("NVIDIA GeForce RTX 4090") is None


def test_a_faster_gpu_is_faster_in_all_but_the_network() -> None:
    b200 = rates_of(GPUS["B200"])
    assert b200.token_flops_per_s / H100.token_flops_per_s == pytest.approx(2250 / 989)
    assert b200.exchange_bytes_per_s == 2 * H100.exchange_bytes_per_s
    assert b200.network_bytes_per_s == H100.network_bytes_per_s
    # Its nodes have cards of 200 Gb/s.
    assert rates_of(GPUS["A100"]).network_bytes_per_s == H100.network_bytes_per_s / 2


def test_rates_are_above_zero() -> None:
    with pytest.raises(ConfigError, match=r"rates: token_flops_per_s=0 must be above 0"):
        replace(H100, token_flops_per_s=0)
    with pytest.raises(ConfigError, match=r"rates: micro_step_tokens=-1 must be above 0"):
        replace(H100, micro_step_tokens=-1)
    assert replace(H100, micro_step_tokens=0.0).micro_step_tokens == 0
