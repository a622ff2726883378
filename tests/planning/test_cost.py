from dataclasses import replace

import numpy as np
import pytest

from hbp_tune.errors import ConfigError
from hbp_tune.planning.costs.cost import LLAMA3_1_8B, CostModel, ModelShape
from hbp_tune.planning.costs.exchange import AttentionHeads
from hbp_tune.planning.costs.hardware import Rates

RATES = Rates(
    machine="made up",
    token_flops_per_s=1e3,
    square_flops_per_s=1e5,
    exchange_bytes_per_s=100,
    network_bytes_per_s=10,
    gather_bytes_per_s=1e3,
    gather_network_bytes_per_s=1e2,
    ranks_per_node=2,
)


def pack_s(cost: CostModel, length: int, cp_degree: int = 1, ac_layers: int = 0, keeps_attention: bool = False) -> float:
    """Seconds of a pack of one document."""
    lengths, kept = np.array([length]), np.array([keeps_attention])
    return float(cost.pack_seconds(lengths, lengths**2, np.array([cp_degree]), np.array([ac_layers]), kept).total[0])


def test_operations_by_hand() -> None:
    shape = ModelShape(num_layers=2, linear_params=1000, attention_dim=64)
    assert shape.token_flops == 6_000
    # Q K^T and P V, 2 * 64 operations each, forward once and backward twice, half of it under the causal mask.
    assert shape.square_flops == 2 * (2 * 2 * 64 * 3) // 2


def test_llama_as_published() -> None:
    # All of its 8,030,261,248 parameters but the embedding.
    assert LLAMA3_1_8B.linear_params == 8_030_261_248 - 128_256 * 4096
    assert LLAMA3_1_8B.gathered_params == 8_030_261_248
    assert LLAMA3_1_8B.exchanged_bytes(1) == 0
    # Queries, keys, values and output in bf16, but what a rank keeps; over 16 ranks every KV head goes to two.
    assert LLAMA3_1_8B.exchanged_bytes(8) == 32 * 2 * 128 * (32 + 8 + 8 + 32) * 7 / 8
    assert LLAMA3_1_8B.exchanged_bytes(16) == 32 * 2 * 128 * (32 + 16 + 16 + 32) * 15 / 16
    cost = CostModel()
    assert cost.token_s == pytest.approx(113.8e-6, rel=1e-3)
    assert cost.square_s == pytest.approx(2.65e-9, rel=1e-3)
    assert cost.double_len == 41_516


def test_costs_are_whole_numbers_by_hand() -> None:
    cost = CostModel(ModelShape(num_layers=1, linear_params=1, attention_dim=1_000_000))
    assert cost.double_len == 1, "attention alone would leave ties between samples that differ"
    cost = CostModel()
    assert cost.sample_cost(np.array([1, 2, 41_516], dtype=np.int32)).tolist() == [41_517, 2 * 41_518, 2 * 41_516**2]
    assert cost.pack_cost(np.array([5]), np.array([13])).tolist() == [5 * 41_516 + 13]


@pytest.mark.parametrize("seed", range(20))
def test_a_pack_costs_as_much_as_its_samples(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 2**17, 50).astype(np.int32)
    wide = lengths.astype(np.int64)
    cost = CostModel()
    assert cost.pack_cost(wide.sum(keepdims=True), (wide**2).sum(keepdims=True)) == cost.sample_cost(lengths).sum()


def test_documents_of_a_million_tokens_do_not_overflow() -> None:
    cost = CostModel()
    costs = cost.sample_cost(np.full(4096, 2**20, dtype=np.int32))
    assert costs.sum() == 4096 * 2**20 * (2**20 + 41_516)
    assert costs.dtype == np.int64


def test_seconds_by_hand() -> None:
    shape = ModelShape(num_layers=4, linear_params=600, attention_dim=16, heads=AttentionHeads(query=8, kv=4), head_params=150)
    cost = CostModel(shape, RATES)
    linear, attention = 100 * 6 * 600 / 1e3, 100**2 * 6 * 4 * 16 / 1e5
    assert pack_s(cost, 100) == pytest.approx(linear + attention)
    # Three quarters of the linear work is in layers; a forward is a third of it, and two sevenths of attention's.
    repeated = linear * 3 / 4 / 3 + attention * 2 / 7
    assert pack_s(cost, 100, ac_layers=4) == pytest.approx(linear + attention + repeated)
    assert pack_s(cost, 100, ac_layers=1) == pytest.approx(linear + attention + repeated / 4)
    # Keeping what attention gave, only the linear part runs again.
    assert pack_s(cost, 100, ac_layers=4, keeps_attention=True) == pytest.approx(linear + attention + linear * 3 / 4 / 3)
    assert pack_s(cost, 100, keeps_attention=True) == pytest.approx(linear + attention)
    # Twice, forward and backward, a rank's share of 2 bytes of queries, keys, values and output of four layers.
    sent = 100 * 4 * 2 * 2 * (8 + 4 + 4 + 8)
    assert pack_s(cost, 100, cp_degree=2) == pytest.approx((linear + attention + 2 * sent / 2 / 100) / 2)
    # Once more in recomputing, unless what it gave is kept.
    recomputed = pack_s(cost, 100, cp_degree=2, ac_layers=4) - pack_s(cost, 100, ac_layers=4) / 2
    assert recomputed == pytest.approx(3 * sent / 2 / 100 / 2)
    kept = pack_s(cost, 100, cp_degree=2, ac_layers=4, keeps_attention=True)
    assert kept == pytest.approx((linear + attention + linear * 3 / 4 / 3 + 2 * sent / 2 / 100) / 2)
    # Of eight ranks in nodes of two, each gets an eighth from its node and six eighths from others; KV heads are there twice.
    across = 2 * sent * 32 / 24 * (1 / 8 / 100 + 6 / 8 / 10)
    assert pack_s(cost, 100, cp_degree=8) == pytest.approx((linear + attention + across) / 8)
    assert pack_s(cost, 0) == 0


@pytest.mark.parametrize(
    ("length", "cp_degree", "ac_layers", "iteration_s"),
    [
        (32, 2, 28, 4.45),
        (32, 4, 23, 4.35),
        (32, 8, 8, 4.12),
        (64, 4, 28, 6.3),
        (64, 8, 24, 6.2),
        (128, 8, 29, 10.2),
        (128, 16, 23, 10.5),
    ],
)
def test_timings_of_the_paper(length: int, cp_degree: int, ac_layers: int, iteration_s: float) -> None:
    # HBP paper, minimum of recomputed layers that fit: a rank takes 16K tokens an iteration, in full-length documents.
    packs, cost = 16 * cp_degree / length, CostModel()
    pack_of_one_s = pack_s(cost, 1024 * length, cp_degree, ac_layers) + cost.micro_step_s
    assert packs * pack_of_one_s == pytest.approx(iteration_s, rel=0.035)


def test_larger_models_take_longer_in_proportion() -> None:
    head_params, linear_params = 2 * LLAMA3_1_8B.head_params, 2 * LLAMA3_1_8B.linear_params
    shape = replace(LLAMA3_1_8B, num_layers=64, linear_params=linear_params, head_params=head_params)
    assert CostModel(shape).double_len == CostModel().double_len
    assert pack_s(CostModel(shape), 32_768, 8, 64) == pytest.approx(2 * pack_s(CostModel(), 32_768, 8, 32))


def test_gathering_weights_by_hand() -> None:
    cost = CostModel()
    assert cost.gather_s(1) == 0, "there is nobody to gather from"
    # Weights twice and gradients once, two bytes each, 31 of 32 parts over eight cards of 400 Gb/s.
    assert cost.gather_s(32) == pytest.approx(6 * 8_030_261_248 * 31 / 32 / (0.66 * 8 * 50e9))
    assert cost.gather_s(2) < cost.gather_s(8) < cost.gather_s(1024)


def test_a_head_is_among_the_weights() -> None:
    with pytest.raises(ConfigError, match="head_params=5 must be at least 0 and below linear_params=5"):
        ModelShape(num_layers=1, linear_params=5, attention_dim=1, head_params=5)


@pytest.mark.parametrize("field", ["num_layers", "linear_params", "attention_dim", "gathered_params"])
def test_a_shape_that_cannot_work(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model shape: {field}=0 must be at least 1$"):
        ModelShape(**({"num_layers": 1, "linear_params": 1, "attention_dim": 1} | {field: 0}))
