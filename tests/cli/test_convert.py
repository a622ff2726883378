from pathlib import Path

import pytest
import torchtune
from omegaconf import OmegaConf
from torchtune import config
from torchtune._recipe_registry import get_all_recipes

from hbp_tune.cli.__main__ import main
from hbp_tune.config import check_config

STOCK = Path(torchtune.__file__).parents[1] / "recipes" / "configs"
# Images have no place in a decoder of text, nor has Gemma 2's attention in packs.
NAMES = sorted(
    {
        known.name: known.file_path
        for recipe in get_all_recipes()
        if recipe.name in ("full_finetune_distributed", "full_finetune_single_device")
        for known in recipe.configs
        if "vision" not in known.name.lower() and "gemma2" not in known.name
    }.items()
)


def convert(name: str, destination: Path, *options: str) -> int:
    return main(["convert", name, str(destination), *options])


def test_a_configuration_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("llama3_1/8B_full", tmp_path / "my.yaml") == 0
    stock, mine = OmegaConf.load(STOCK / "llama3_1/8B_full.yaml"), OmegaConf.load(tmp_path / "my.yaml")
    assert [(group.pack_len, group.cp_degree) for group in mine.groups] == [(16_384, 1), (131_072, 8)]
    assert mine.planner.tokens_per_step == 8 * 16_384
    gone = set(stock) - set(mine)
    assert {"batch_size", "gradient_accumulation_steps", "enable_activation_checkpointing"} <= gone
    same = set(stock) & set(mine) - {"dataset"}
    assert {key: stock[key] for key in same} == {key: mine[key] for key in same}
    text, out = (tmp_path / "my.yaml").read_text(), capsys.readouterr().out
    assert f"tune run --nproc_per_node 8 hbp_full_finetune_distributed --config {tmp_path / 'my.yaml'}" in text
    assert " full_finetune" not in text, "comments name our recipe"
    assert "# Reduced precision" in text
    assert "batch_size=2 is out: a micro-step is one pack per replica" in out
    assert "enable_activation_checkpointing=True is out: set groups[].ac_layers" in out
    assert "optimizer_in_bwd" not in out, "what had no effect is not mentioned"


@pytest.mark.filterwarnings("ignore:The import path 'torchtune.modules.tokenizers' is deprecated:DeprecationWarning")  # Phi 4's
@pytest.mark.parametrize(("name", "path"), NAMES)
def test_every_stock_configuration_converts(tmp_path: Path, name: str, path: str) -> None:
    source, destination = STOCK / path, tmp_path / "my.yaml"
    many = ("--world-size", "64") if "70B" in name or "72B" in name or "405B" in name else ()
    status = convert(name, destination, *many, "--gpu", "H200")
    assert status == 0
    cfg = OmegaConf.load(destination)
    check_config(cfg)
    OmegaConf.resolve(cfg)
    if "bitsandbytes" not in source.read_text():  # its optimizers are replaced
        config.validate(cfg)
    assert not cfg.dataset.get("packed")
    # Comments that say something about a key stay beside it.
    kept = [line for line in source.read_text().splitlines() if line.startswith("# ") and "full_finetune" not in line]
    text = destination.read_text()
    assert all(line in text for line in kept)


def test_what_changes_meaning_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (STOCK / "llama3_1/8B_full_single_device.yaml").read_text()
    text = text.replace("max_seq_len: null", "max_seq_len: 8192  # as packed").replace("packed: False", "packed: True")
    text = text.replace("max_steps_per_epoch: null", "max_steps_per_epoch: 50").replace("epochs: 1", "epochs: 2")
    (tmp_path / "stock.yaml").write_text(text)
    assert convert(str(tmp_path / "stock.yaml"), tmp_path / "my.yaml", "--world-size", "1", "--longest", "16384") == 0
    cfg, out = OmegaConf.load(tmp_path / "my.yaml"), capsys.readouterr().out
    assert cfg.max_steps == 100, "over the run"
    assert cfg.tokenizer.max_seq_len is None
    assert "tokenizer.max_seq_len=8192 is null, as it cuts samples" in out
    assert "packed" not in cfg.dataset
    assert cfg.optimizer._component_ == "torchao.optim.AdamW8bit"
    assert "bitsandbytes does not take sharded weights" in out
    assert [group.pack_len for group in cfg.groups] == [16_384]


def test_what_cannot_be_converted_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(name: str, *options: str) -> str:
        assert convert(name, tmp_path / "my.yaml", *options) == 2
        return capsys.readouterr().err

    assert "only TransformerSelfAttentionLayer with MultiHeadAttention can attend inside packs" in error("gemma2/2B_full")
    assert "trains adapters, and hbp-tune all weights" in error("llama3_1/8B_lora")
    assert "has packing groups: there is nothing to convert" in error("llama3_1/8B_hbp_full")
    assert "GiB with all layers recomputed, an L4 has 24; give more ranks" in error(
        "llama3_1/8B_full", "--gpu", "L4", "--world-size", "1"
    )
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "is not a configuration of torchtune's full_finetune recipes" in error(str(tmp_path / "list.yaml"))
    (tmp_path / "my.yaml").write_text("")
    assert "exists; remove it, or choose another file" in error("llama3_1/8B_full")
