"""YaRN: by hand and by law, and the numbers of transformers' own implementation."""

import math
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchtune import training
from torchtune.models.llama3_1 import llama3_1
from torchtune.models.qwen2 import Qwen2RotaryPositionalEmbeddings, qwen2
from torchtune.models.qwen2._convert_weights import qwen2_hf_to_tune, qwen2_tune_to_hf

from hbp_tune.config import build
from hbp_tune.errors import ConfigError
from hbp_tune.models import adapt_decoder, with_yarn
from hbp_tune.models.rope import Yarn, YarnRotaryPositionalEmbeddings

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")

QWEN2_5 = {"dim": 128, "base": 1_000_000.0}
TINY = {"vocab_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 64, "intermediate_dim": 64}
# (head_dim, settings): Qwen2.5's own, a short one whose ramp starts below the first dimension, and one without defaults.
SETTINGS: list[tuple[int, dict[str, Any]]] = [
    (128, {"factor": 4.0, "original_max_position_embeddings": 32768}),
    (16, {"factor": 4.0, "original_max_position_embeddings": 64}),
    (
        64,
        {
            "factor": 2.5,
            "original_max_position_embeddings": 4096,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 1.3,
        },
    ),
]


def hf_config(yarn: Yarn | None, *, head_dim: int = 16, **shape: int) -> Any:
    """Make the Qwen2 configuration of `TINY`, changed by ``shape``, with heads of ``head_dim``."""
    shape = TINY | {"max_seq_len": yarn.max_seq_len if yarn else 2**16} | shape
    return transformers.Qwen2Config(
        vocab_size=shape["vocab_size"],
        hidden_size=head_dim * shape["num_heads"],
        intermediate_size=shape["intermediate_dim"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        max_position_embeddings=shape["max_seq_len"],
        rms_norm_eps=1e-5,
        rope_theta=1_000_000.0,
        rope_scaling=yarn and yarn.hf_rope_scaling(),
        initializer_range=0.2,  # so that attention is far from even, and positions count
    )


def logits_of_both(yarn: Yarn, tokens: Tensor, **shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give one model's logits by torchtune with YaRN, by transformers with YaRN, and by transformers without."""
    torch.manual_seed(0)
    oracle = transformers.Qwen2ForCausalLM(hf_config(yarn, **shape)).eval()
    plain = transformers.Qwen2ForCausalLM(hf_config(None, **shape)).eval()
    plain.load_state_dict(oracle.state_dict())
    shape = TINY | shape
    names = {"num_heads": shape["num_heads"], "num_kv_heads": shape["num_kv_heads"], "dim": shape["embed_dim"]}
    model = with_yarn(
        qwen2(**shape, max_seq_len=yarn.original_max_position_embeddings),
        **{name: getattr(yarn, name) for name in Yarn.__slots__},
    )
    model.load_state_dict(qwen2_hf_to_tune(oracle.state_dict(), **names))
    assert qwen2_tune_to_hf(model.state_dict(), **names).keys() == oracle.state_dict().keys()
    with torch.no_grad():
        return model(tokens), oracle(tokens).logits, plain(tokens).logits


@pytest.mark.parametrize(("head_dim", "settings"), SETTINGS)
def test_angles_cos_and_sin_are_transformers_own(head_dim: int, settings: dict[str, Any]) -> None:
    yarn = Yarn(**settings)
    oracle = transformers.models.qwen2.modeling_qwen2.Qwen2RotaryEmbedding(hf_config(yarn, head_dim=head_dim))
    rope = YarnRotaryPositionalEmbeddings(head_dim, 1_000_000.0, yarn)
    torch.testing.assert_close(rope.theta, oracle.inv_freq, atol=0, rtol=0)
    assert yarn.cos_sin_factor == oracle.attention_scaling
    cos, sin = oracle(torch.zeros(()), torch.arange(yarn.max_seq_len)[None])
    torch.testing.assert_close(rope.cache, torch.cat([cos[0], sin[0]], dim=-1), atol=1e-6, rtol=0)


def test_which_frequencies_are_stretched() -> None:
    plain = Qwen2RotaryPositionalEmbeddings(**QWEN2_5, max_seq_len=8).theta
    yarn = Yarn(factor=4.0, original_max_position_embeddings=32768)
    angles = yarn.inverse_frequencies(**QWEN2_5)
    turns = 32768 * plain / (2 * math.pi)
    # By hand: dimension i turns 32768 / (2 pi * 1e6 ** (i / 64)) times, 32 times at i = 23.6 and once at i = 39.7.
    assert (turns[23] > 32 > turns[24], turns[39] > 1 > turns[40]) == (True, True)
    assert torch.equal(angles[:24], plain[:24])
    torch.testing.assert_close(angles[40:], plain[40:] / 4, atol=0, rtol=1e-6)
    torch.testing.assert_close(angles[30], plain[30] * (1 - 7 / 17 * 3 / 4), atol=0, rtol=1e-6)
    assert ((angles[24:40] < plain[24:40]) & (angles[24:40] > plain[24:40] / 4)).all()
    assert (angles.diff() < 0).all()


def test_logits_are_transformers_own_beyond_the_original_positions() -> None:
    yarn = Yarn(factor=4.0, original_max_position_embeddings=64)
    tokens = torch.randint(0, 64, (2, 256), generator=torch.Generator().manual_seed(0))
    got, want, plain = logits_of_both(yarn, tokens)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert (plain - want)[:, 64:].abs().max() > 0.1, "YaRN makes no difference: the test is blind"


def test_logits_beyond_32k_positions() -> None:
    yarn = Yarn(factor=2.0, original_max_position_embeddings=32768)
    tokens = torch.randint(0, 64, (1, 33_000), generator=torch.Generator().manual_seed(0))
    got, want, plain = logits_of_both(yarn, tokens, num_layers=1, num_heads=1, num_kv_heads=1, embed_dim=16)
    torch.testing.assert_close(got[:, 32768:], want[:, 32768:], atol=1e-4, rtol=0)
    assert (plain - want)[:, 32768:].abs().max() > 0.01, "YaRN makes no difference: the test is blind"


def test_it_is_built_on_the_meta_device_and_keeps_names_and_weights() -> None:
    node = OmegaConf.create(
        {
            "_component_": "hbp_tune.components.with_yarn",
            "model": {"_component_": "torchtune.models.qwen2_5.qwen2_5_7b_instruct"},
            "factor": 4.0,
        }
    )
    with torch.device("meta"):
        plain, model = build("model", node.model), build("model", node)
    assert list(model.state_dict()) == list(plain.state_dict())
    ropes = [module for module in model.modules() if hasattr(module, "rope_init")]
    assert [type(rope) for rope in ropes] == [YarnRotaryPositionalEmbeddings], "one for all layers"
    assert ropes[0].cache.is_meta
    assert {layer.attn.max_seq_len for layer in model.layers} == {model.max_seq_len} == {131072}
    assert adapt_decoder(model).max_seq_len == ropes[0].max_seq_len == 131072
    ropes[0].rope_init()  # as the recipe does on the real device
    assert ropes[0].cache.shape == (131072, 256)
    torch.testing.assert_close(ropes[0].cache[0], (0.1 * math.log(4) + 1) * (torch.arange(256) < 128).float())


def test_original_positions_and_the_attention_factor_can_be_given() -> None:
    model = with_yarn(qwen2(**TINY, max_seq_len=512), 2, original_max_position_embeddings=128, attention_factor=1.0)
    assert model.max_seq_len == model.layers[1].attn.pos_embeddings.max_seq_len == 256
    assert model.layers[0].attn.pos_embeddings.cache[0, 0] == 1.0


def test_angles_stay_exact_where_weights_are_bf16() -> None:
    yarn = Yarn(factor=4.0, original_max_position_embeddings=32768)
    want = YarnRotaryPositionalEmbeddings(16, 1e6, yarn).cache
    with training.set_default_dtype(torch.bfloat16):
        got = YarnRotaryPositionalEmbeddings(16, 1e6, yarn).cache
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": 1.0}, r"YaRN factor=1.0 must be above 1"),
        ({"factor": 0.5}, r"YaRN factor=0.5 must be above 1"),
        ({"original_max_position_embeddings": 0}, r"original_max_position_embeddings=0 must be at least 1"),
        ({"beta_slow": 32.0}, r"beta_slow=32.0 must be above 0 and below beta_fast=32.0"),
        ({"attention_factor": 0.0}, r"attention_factor=0.0 must be above 0"),
    ],
)
def test_values_without_meaning_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_yarn(qwen2(**TINY, max_seq_len=64), **({"factor": 4.0} | change))


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (lambda: llama3_1(**TINY, max_seq_len=64), "Llama3ScaledRoPE"),
        (lambda: with_yarn(qwen2(**TINY, max_seq_len=64), 2.0), "YarnRotaryPositionalEmbeddings"),
    ],
    ids=["llama", "twice"],
)
def test_other_positions_are_refused_by_name(model: Any, found: str) -> None:
    built: nn.Module = model()
    with pytest.raises(
        ConfigError, match=rf"stretches Qwen2RotaryPositionalEmbeddings \(qwen2, qwen2_5\), the model has {found};"
    ):
        with_yarn(built, 2.0)
