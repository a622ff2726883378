"""Checkpoints read and written part by part, beside torchtune's checkpointer and transformers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torchtune.models.llama3 import llama3
from torchtune.models.llama3_2._component_builders import llama3_2
from torchtune.models.qwen2 import qwen2
from torchtune.training import FullModelHFCheckpointer

from hbp_tune.errors import ConfigError
from hbp_tune.models import HFCheckpointer, Qwen3Checkpointer, qwen3
from tests.ranks import RankPool

# Heads of 6, so that shards of rows cut through them; three layers; an odd vocabulary.
SIZES = {"vocab_size": 101, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 24, "intermediate_dim": 52}
HF = {
    "vocab_size": 101,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 24,
    "intermediate_size": 52,
    "max_position_embeddings": 128,
}


def llama(**changes: Any) -> nn.Module:
    return llama3(**SIZES | changes, max_seq_len=128, norm_eps=1e-6)


def tied_llama(**changes: Any) -> nn.Module:
    return llama3_2(**SIZES | changes, max_seq_len=128, norm_eps=1e-6)


def qwen(**changes: Any) -> nn.Module:
    return qwen2(**SIZES | changes, max_seq_len=128, norm_eps=1e-6)


def tied_qwen(**changes: Any) -> nn.Module:
    return qwen(tie_word_embeddings=True, **changes)


def qwen_3(**changes: Any) -> nn.Module:
    return qwen3(**SIZES | changes, head_dim=6, max_seq_len=128)


# As torchtune's Llama 3.2 has it.
SCALED = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED |= {"original_max_position_embeddings": 8192}
LLAMA = HF | {"rope_theta": 500_000.0}
QWEN = HF | {"rope_theta": 1_000_000.0}
FAMILIES: dict[str, tuple[Callable[..., nn.Module], Any, str]] = {
    "llama": (llama, transformers.LlamaConfig(**LLAMA), "LLAMA3"),
    "llama tied": (
        tied_llama,
        transformers.LlamaConfig(**LLAMA, rope_scaling=SCALED, tie_word_embeddings=True),
        "LLAMA3_2",
    ),
    "qwen2": (qwen, transformers.Qwen2Config(**QWEN), "QWEN2"),
    "qwen2 tied": (tied_qwen, transformers.Qwen2Config(**QWEN, tie_word_embeddings=True), "QWEN2"),
    "qwen3": (qwen_3, transformers.Qwen3Config(**QWEN, head_dim=6), "QWEN3"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Write a checkpoint of several files in bf16."""
    family: str = request.param
    folder = tmp_path_factory.mktemp(family.replace(" ", "_")) / "model"
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family][1]).to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter, dtype=torch.float32).to(torch.bfloat16) * 0.3
    model.save_pretrained(folder, max_shard_size="12KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return family, folder


def by_torchtune(family: str, folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    arguments = {"checkpoint_dir": str(folder), "checkpoint_files": files, "output_dir": str(folder.parent / "unused")}
    kind = FAMILIES[family][2]
    checkpointer = Qwen3Checkpointer(**arguments) if kind == "QWEN3" else FullModelHFCheckpointer(**arguments, model_type=kind)
    return dict(checkpointer.load_checkpoint()["model"])


def built(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.device("meta"):
        return FAMILIES[family][0]().to(dtype)


def sharded(family: str, mesh_shape: tuple[int, ...], dtype: torch.dtype) -> nn.Module:
    model = built(family, dtype)
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model.to_empty(device="cpu")


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone() for name, value in model.state_dict().items()
    }


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_one_process_reads_what_torchtune_reads_and_writes_it_back(checkpoint: tuple[str, Path], tmp_path: Path) -> None:
    family, folder = checkpoint
    files = HFCheckpointer(str(folder), str(tmp_path), export_dtype="bf16")
    model = built(family)
    files.check(model)
    model.to_empty(device="cpu")
    read: list[int] = []
    files.load(model, read.append)
    expected = by_torchtune(family, folder)
    assert whole(model).keys() == expected.keys()
    assert all(torch.equal(value, expected[name].float()) for name, value in whole(model).items())
    assert sum(read) == sum(value.numel() * 4 for value in expected.values())
    files.export(model, tmp_path / "epoch_0")
    assert_same_files(folder, tmp_path / "epoch_0")


def assert_same_files(source: Path, export: Path) -> None:
    """Compare names, tensors, index and small files."""
    assert sorted(path.name for path in export.iterdir()) == sorted(path.name for path in source.iterdir())
    before, after = tensors_of(source), tensors_of(export)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype for name, tensor in before.items())
    index = "model.safetensors.index.json"
    maps = [json.loads((folder / index).read_text())["weight_map"] for folder in (source, export)]
    assert maps[0] == maps[1]


def roundtrip_job(family: str, folder: Path, output: Path, mesh_shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    files = HFCheckpointer(str(folder), str(output))
    model = sharded(family, mesh_shape, torch.bfloat16)
    files.check(model)
    files.load(model)
    files.export(model, output / "epoch_0")
    return whole(model)


@pytest.mark.parametrize("mesh_shape", [(2,), (4,), (2, 2)], ids=["2", "4", "replicated 2 x 2"])
def test_ranks_read_and_write_their_own_rows(
    ranks: Callable[[int], RankPool], checkpoint: tuple[str, Path], tmp_path: Path, mesh_shape: tuple[int, ...]
) -> None:
    family, folder = checkpoint
    world_size = 4 if mesh_shape != (2,) else 2
    expected = by_torchtune(family, folder)
    for loaded in ranks(world_size).run(roundtrip_job, family, folder, tmp_path, mesh_shape):
        assert all(torch.equal(value, expected[name]) for name, value in loaded.items())
    assert_same_files(folder, tmp_path / "epoch_0")


def test_transformers_computes_the_model_s_logits_from_an_export(checkpoint: tuple[str, Path], tmp_path: Path) -> None:
    family, folder = checkpoint
    files = HFCheckpointer(str(folder), str(tmp_path), export_dtype="fp32")
    model = FAMILIES[family][0]()
    files.load(model)
    with torch.no_grad():
        for parameter in model.parameters():  # what training would do
            parameter.mul_(1.1)
    files.export(model, tmp_path / "epoch_0")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "epoch_0", dtype=torch.float32)
    tokens = torch.randint(0, 101, (2, 50))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=2e-5, rtol=1e-5)


def damaged(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "model")
    return tmp_path / "model"


def test_damage_is_found_before_anything_is_read(checkpoint: tuple[str, Path], tmp_path: Path) -> None:
    family, source = checkpoint
    folder = damaged(source, tmp_path)
    first = sorted(folder.glob("*.safetensors"))[0]
    size, content = first.stat().st_size, first.read_bytes()

    def fault() -> str:
        with pytest.raises(ConfigError) as caught:
            HFCheckpointer(str(folder), str(tmp_path)).check(built(family))
        return str(caught.value)

    first.write_bytes(content[:-100])
    assert fault() == f"{first} is cut off: it has {size - 100:,} of {size:,} bytes; download it again"
    first.write_bytes(content[:20])
    assert f"{first} is not a file of safetensors, or is cut off" in fault()
    first.unlink()
    assert f"model.safetensors.index.json names {first.name}, which {folder} does not hold; download" in fault()
    tensors = load_file(source / first.name)
    name = min(tensors)
    save_file({other: tensor for other, tensor in tensors.items() if other != name}, first)
    assert f"says that {name} is in {first.name}, which does not have it; download the checkpoint again" in fault()
    save_file(tensors | {name: torch.zeros(3, 5)}, first)
    assert f"{name} in {first} has the shape [3, 5], the model's " in fault()
    first.write_bytes(content)
    save_file({"adapter.weight": torch.zeros(2)}, folder / "adapter_model.safetensors")
    save_file({"all": torch.zeros(2)}, folder / "consolidated.safetensors")
    HFCheckpointer(str(folder), str(tmp_path)).check(built(family))  # others' files do not count
    (folder / "model.safetensors.index.json").write_text("{")
    assert "is not an index of weights" in fault()
    (folder / "model.safetensors.index.json").unlink()
    assert (
        f"{folder} has neither model.safetensors nor model.safetensors.index.json, it holds adapter_model.safetensors" in fault()
    )


def test_a_model_of_another_size_or_family_is_named(checkpoint: tuple[str, Path], tmp_path: Path) -> None:
    family, folder = checkpoint
    files = HFCheckpointer(str(folder), str(tmp_path))
    with torch.device("meta"):
        deeper, shallower = (FAMILIES[family][0](num_layers=num_layers) for num_layers in (4, 2))
    told = r"has no tensor model\.layers\.3\.\S+, from which the model's layers\.3\.\S+ is read; take the builder"
    with pytest.raises(ConfigError, match=told):
        files.check(deeper)
    with pytest.raises(ConfigError, match=r"model\.layers\.2\.\S+ in \S+ and \d+ more tensors are not in the model; take the"):
        files.check(shallower)
    config = json.loads((folder / "config.json").read_text())
    other = damaged(folder, tmp_path)
    (other / "config.json").write_text(json.dumps(config | {"model_type": "phi3"}))
    with pytest.raises(
        ConfigError, match=r"has model_type=phi3, this checkpointer knows llama, mistral, qwen2, qwen3; take torchtune"
    ):
        HFCheckpointer(str(other), str(tmp_path))
    with pytest.raises(ConfigError, match=r"export_dtype=fp8 must be bf16 or fp32"):
        HFCheckpointer(str(folder), str(tmp_path), export_dtype="fp8")
    with pytest.raises(ConfigError, match=r"checkpoint_dir=nowhere is not a folder \(looked from"):
        HFCheckpointer("nowhere", str(tmp_path))
