from collections.abc import Callable

import pytest
import torch
from torch import nn
from torchtune.models import gemma2, llama2, llama3, llama3_1, llama3_2, llama3_3, qwen2, qwen2_5

from hbp_tune.demo.model import build
from hbp_tune.errors import ConfigError
from hbp_tune.models import adapt_decoder, torchtune_seam
from hbp_tune.models.torchtune_decoder import decoder_shape, model_shape, separate_units
from hbp_tune.parallel import AutoContextParallel, describe_layouts
from hbp_tune.planning import AttentionHeads, PackingGroup
from hbp_tune.planning.costs.cost import LLAMA3_1_8B, ModelShape
from hbp_tune.planning.costs.memory import LLAMA3_1_8B_DECODER
from tests.helpers import SHAPE

TINY = {"vocab_size": 32, "num_layers": 2, "num_heads": 4, "embed_dim": 16, "max_seq_len": 64, "intermediate_dim": 32}


def test_parts_and_untouched_names() -> None:
    model = build(SHAPE)
    names = list(model.state_dict())
    parts = adapt_decoder(model)
    assert (len(parts.layers), parts.heads, parts.max_seq_len) == (3, AttentionHeads(query=4, kv=2), 2048)
    assert list(model.state_dict()) == names


# Llama 2 to 3.3 and Qwen2/2.5 in every size that torchtune builds, by query and KV heads.
SIZES = {
    (32, 32): (llama2.llama2_7b,),
    (40, 40): (llama2.llama2_13b,),
    (32, 8): (llama3.llama3_8b, llama3_1.llama3_1_8b, llama3_2.llama3_2_1b),
    (24, 8): (llama3_2.llama3_2_3b,),
    (64, 8): (llama2.llama2_70b, llama3.llama3_70b, llama3_1.llama3_1_70b, llama3_3.llama3_3_70b, qwen2_5.qwen2_5_72b_base),
    (128, 8): (llama3_1.llama3_1_405b,),
    (14, 2): (qwen2.qwen2_0_5b, qwen2_5.qwen2_5_0_5b),
    (12, 2): (qwen2.qwen2_1_5b, qwen2_5.qwen2_5_1_5b_base),
    (16, 2): (qwen2_5.qwen2_5_3b,),
    (28, 4): (qwen2.qwen2_7b, qwen2_5.qwen2_5_7b_base, qwen2_5.qwen2_5_7b_instruct),
    (40, 8): (qwen2_5.qwen2_5_14b_base, qwen2_5.qwen2_5_32b_base),
}


@pytest.mark.parametrize(("heads", "builder"), [(heads, builder) for heads, some in SIZES.items() for builder in some])
def test_real_models_on_the_meta_device(heads: tuple[int, int], builder: Callable[[], nn.Module]) -> None:
    with torch.device("meta"):
        parts = adapt_decoder(builder())
    assert parts.heads == AttentionHeads(query=heads[0], kv=heads[1])
    groups = [PackingGroup(name="long", pack_len=parts.max_seq_len, cp_degree=8)]
    assert len(describe_layouts(AutoContextParallel(), parts.heads, groups)) == 1


def test_a_model_that_cannot_attend_inside_packs_is_refused() -> None:
    with torch.device("meta"):
        gemma = gemma2.gemma2(**TINY, head_dim=4, num_kv_heads=2)
    with pytest.raises(ConfigError, match=r"(model Gemma2|layer 0 of the model|model \w+ is not supported)"):
        adapt_decoder(gemma)
    with pytest.raises(ConfigError, match=r"model Linear is not supported: hbp-tune trains torchtune.modules.TransformerDecoder"):
        adapt_decoder(torch.nn.Linear(2, 2))


def test_dropout_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.attn_dropout=0.5 must be 0"):
        adapt_decoder(llama3_1.llama3_1(**TINY, num_kv_heads=2, attn_dropout=0.5))


def test_another_torchtune_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama3_1.llama3_1(**TINY, num_kv_heads=2)
    attention = model.layers[0].attn
    del attention._attention_call
    with pytest.raises(ConfigError, match=r"no _attention_call to replace; install one of 0.6.1"):
        torchtune_seam.replace_attention_call(attention, print)


def test_separate_units() -> None:
    untied = llama3_1.llama3_1(**TINY, num_kv_heads=2)
    assert separate_units(untied, ["tok_embeddings", "output"]) == [untied.tok_embeddings, untied.output]
    with pytest.raises(
        ConfigError, match=r"custom_sharded_layers: the model has no 'head'; it has tok_embeddings, layers, norm, output"
    ):
        separate_units(untied, ["head"])
    tied = qwen2.qwen2(**TINY, num_kv_heads=2, tie_word_embeddings=True)
    assert separate_units(tied, ["tok_embeddings", "output"]) == []


def test_what_decides_the_memory_of_a_model() -> None:
    with torch.device("meta"):
        model = llama3_1.llama3_1_8b()
        assert decoder_shape(model) == LLAMA3_1_8B_DECODER
        adapt_decoder(model)
        assert decoder_shape(model) == LLAMA3_1_8B_DECODER
        tied = decoder_shape(llama3_2.llama3_2_1b())
    assert (tied.tied, tied.num_params) == (True, 1_235_814_400)
    plain = llama3_1.llama3_1(**TINY, num_kv_heads=2)
    plain.layers[0].mlp.w3 = None
    with pytest.raises(ConfigError, match=r"the memory of a FeedForward is not modelled, only that of gated feed-forwards"):
        decoder_shape(plain)


def test_what_decides_the_cost_of_a_model() -> None:
    # Two layers of 16 x (16 + 16 query and output, 8 + 8 key and value, 3 x 32) and two norms each, one norm, one head.
    layers_and_norm = 2 * (16 * 144 + 2 * 16) + 16
    by_hand = ModelShape(
        num_layers=2,
        linear_params=layers_and_norm + 16 * 32,
        attention_dim=16,
        heads=AttentionHeads(query=4, kv=2),
        head_params=16 * 32,
        gathered_params=layers_and_norm + 2 * 16 * 32,
    )
    untied = llama3_1.llama3_1(**TINY, num_kv_heads=2)
    assert model_shape(untied) == by_hand
    adapt_decoder(untied)
    assert model_shape(untied) == by_hand
    with torch.device("meta"):
        assert model_shape(llama3_1.llama3_1_8b()) == LLAMA3_1_8B
        assert model_shape(llama3_2.llama3_2_1b()) == ModelShape(
            num_layers=16,
            linear_params=1_235_814_400,
            attention_dim=2048,
            heads=AttentionHeads(query=32, kv=8),
            head_params=128_256 * 2048,
            gathered_params=1_235_814_400,
        ), "tied"
