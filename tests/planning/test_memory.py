from dataclasses import replace

import pytest

from hbp_tune.errors import ConfigError
from hbp_tune.planning.costs.memory import (
    BF16_ADAMW_8BIT,
    FP32_ADAMW,
    GIB,
    LLAMA3_1_8B_DECODER,
    RESERVE_BYTES,
    DecoderShape,
    MemoryModel,
    layer_activations,
)
from hbp_tune.planning.plans.records import PackingGroup
from hbp_tune.planning.plans.sharding import CpDegrees

TINY = DecoderShape(
    num_layers=4, embed_dim=8, num_heads=4, num_kv_heads=2, head_dim=2, intermediate_dim=16, vocab_size=32, tied=False
)
GROUP = PackingGroup(name="all", pack_len=16384)


def test_llama_has_its_published_number_of_weights() -> None:
    assert LLAMA3_1_8B_DECODER.num_params == 8_030_261_248


def test_activations_by_hand() -> None:
    layer = layer_activations(TINY, GROUP)
    norm = 32 + 32 + 4 + 16  # input and normalised in fp32, scale, output in bf16
    rope = 8 * 2
    qkv, out, softmax = 2 * 2 * (4 + 2 + 2), 2 * 2 * 4, 4 * 4
    assert layer.attention == norm + rope + qkv + out + softmax
    assert layer.mlp == norm + 4 * 2 * 16
    assert layer.recomputed == 16
    assert layer.exchange == 0


@pytest.mark.parametrize(("mode", "kept"), [("full", 16), ("offload", 0), ("selective", 16 + 16 + 16)])
def test_a_recomputed_layer_keeps_what_its_mode_says(mode: str, kept: int) -> None:
    assert layer_activations(TINY, replace(GROUP, ac_mode=mode)).recomputed == kept


def test_ulysses_keeps_as_many_heads_and_the_output_twice() -> None:
    alone, shared = layer_activations(TINY, GROUP), layer_activations(TINY, replace(GROUP, cp_degree=2))
    assert shared.attention - alone.attention == 2 * 2 * 4
    repeated = layer_activations(TINY, replace(GROUP, cp_degree=4))  # the two KV heads become four
    assert repeated.attention - shared.attention == 2 * 2 * 2 * 2


def test_gathered_keys_grow_with_the_degree() -> None:
    group = replace(GROUP, cp_degree=8)
    gathered = [layer_activations(TINY, replace(group, cp_degree=n), CpDegrees(gather=n)).attention for n in (2, 4, 8)]
    # The first rank's tail run needs all keys, n times its own rows, and its head run those of its own half.
    alone = layer_activations(TINY, GROUP).attention
    keys = 2 * 2 * 2 * 2
    assert [g - alone for g in gathered] == pytest.approx([keys * (n + 0.5 - 1) for n in (2, 4, 8)])


def test_all_states_on_one_rank_by_hand() -> None:
    for states, per_weight in ((FP32_ADAMW, 4 + 4 + 8), (BF16_ADAMW_8BIT, 2 + 2 + 2.03125)):
        model = MemoryModel(LLAMA3_1_8B_DECODER, world_size=1, states=states)
        optimizer = next(m for m in model._moments(GROUP, None) if m.name == "optimizer")
        rope = 4 * 128 * GROUP.pack_len
        assert optimizer.gib * GIB == pytest.approx(8_030_261_248 * per_weight + rope + RESERVE_BYTES)


@pytest.mark.parametrize("mode", ["full", "selective", "offload"])
@pytest.mark.parametrize("cp_degree", [1, 8])
def test_more_recomputed_layers_never_need_more(mode: str, cp_degree: int) -> None:
    model = MemoryModel(LLAMA3_1_8B_DECODER, world_size=32)
    groups = [PackingGroup(name="g", pack_len=131072, cp_degree=cp_degree, ac_layers=n, ac_mode=mode) for n in range(33)]
    peaks = [model.peak(group).gib for group in groups]
    # Up to the last but one: the last layer runs again at once, so recomputing it frees nothing, and its input is kept.
    assert peaks[:-1] == sorted(peaks[:-1], reverse=True)
    assert peaks[0] > peaks[-1] + 10
    assert peaks[-1] - peaks[-2] < (8192 + 25 * 1024) * 131072 / cp_degree / GIB


def test_the_fewest_recomputed_layers_fit_and_one_less_does_not() -> None:
    model = MemoryModel(LLAMA3_1_8B_DECODER, world_size=32)
    group = PackingGroup(name="long", pack_len=131072, cp_degree=8)
    fewest = model.fewest_ac_layers(group, 80)
    assert fewest is not None
    assert 0 < fewest < 32
    assert model.peak(replace(group, ac_layers=fewest)).gib <= 80 < model.peak(replace(group, ac_layers=fewest - 1)).gib


def test_nothing_fits_a_budget_below_the_states() -> None:
    assert MemoryModel(LLAMA3_1_8B_DECODER, world_size=1).fewest_ac_layers(GROUP, 50) is None


def test_what_lies_between_micro_steps() -> None:
    group = replace(GROUP, ac_layers=32)
    none, sharded, whole = (
        MemoryModel(LLAMA3_1_8B_DECODER, world_size=32, accumulation=kind).peak(group) for kind in ("none", "sharded", "whole")
    )
    gradients = 2 * 8_030_261_248 / GIB
    assert whole.parts["unsharded_gradients"] / GIB == pytest.approx(gradients)
    assert gradients - 2 < whole.gib - none.gib < gradients
    assert sharded.parts["gradients"] / GIB == pytest.approx(gradients / 32)
    assert none.gib <= sharded.gib <= none.gib + gradients / 32
    with pytest.raises(ConfigError, match=r"accumulation='half' must be none, sharded or whole"):
        MemoryModel(LLAMA3_1_8B_DECODER, world_size=1, accumulation="half")


def test_copies_of_the_weights_take_the_memory_of_their_own() -> None:
    over_all, copies, of_eight = (
        MemoryModel(LLAMA3_1_8B_DECODER, world_size=world_size, shard_degree=degree, accumulation="sharded").peak(GROUP).parts
        for world_size, degree in ((32, None), (32, 8), (8, None))
    )
    assert copies == of_eight
    assert [copies[part] for part in ("weights", "optimizer")] == [4 * over_all[part] for part in ("weights", "optimizer")]


def test_a_tied_embedding_is_one_weight_that_stays_gathered() -> None:
    tied = replace(LLAMA3_1_8B_DECODER, tied=True)
    assert LLAMA3_1_8B_DECODER.num_params - tied.num_params == 128256 * 4096
    group = PackingGroup(name="long", pack_len=131072, ac_layers=32)
    peaks = [MemoryModel(shape, world_size=8).peak(group) for shape in (LLAMA3_1_8B_DECODER, tied)]
    gathered = [peak.parts["gathered_weights"] for peak in peaks]
    assert {peak.name for peak in peaks} == {"feed-forward of layer 31"}
    assert gathered[1] - gathered[0] == 2 * 128256 * 4096


def test_wrong_values_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"decoder shape: head_dim=0 must be at least 1"):
        replace(TINY, head_dim=0)
    with pytest.raises(ConfigError, match=r"world_size=0 must be at least 1"):
        MemoryModel(TINY, world_size=0)
    with pytest.raises(ConfigError, match=r"world size 8 is not a multiple of cp_degree=16"):
        MemoryModel(TINY, world_size=8).peak(replace(GROUP, cp_degree=16))
    with pytest.raises(ConfigError, match=r"ac_layers=5 is more than the model's 4 layers"):
        MemoryModel(TINY, world_size=8).peak(replace(GROUP, ac_layers=5))
