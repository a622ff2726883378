"""Host memory and seconds of loading and exporting a checkpoint, by torchtune's checkpointer and part by part.

    python benchmarks/bench_checkpoint.py --dir DIR [--gib 1.1] [--ranks 2]

Writes a Llama of random weights in bf16 as a Hugging Face checkpoint of several files, then loads it into FSDP2 on gloo ranks and
exports it again, each way in processes of its own. Printed is a JSON line for each: seconds, and for every rank its shard and the
most memory above what it had before, both in MiB. The kernel counts the pages of mapped files, too.
"""

import argparse
import gc
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from lines import say
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtune import training
from torchtune.models.llama3 import llama3

from hbp_tune.models.hf_checkpointer import HFCheckpointer
from hbp_tune.models.hf_weights import hf_weights
from hbp_tune.training.weights import init_positions

MIB = 2**20
SIZES = {
    "vocab_size": 32_000,
    "num_heads": 16,
    "num_kv_heads": 4,
    "embed_dim": 2048,
    "intermediate_dim": 5632,
    "max_seq_len": 2048,
}
WAYS = ("torchtune", "part by part")


def num_layers_of(gib: float) -> int:
    """Give the layers of a model of that size in bf16."""
    layer = 2 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 5632)
    return max(2, round((gib * 2**30 - 2 * 2 * 32_000 * 2048) / layer))


def write_checkpoint(folder: Path, num_layers: int, num_files: int = 4) -> None:
    """Write random weights, a part of the layers to a file."""
    folder.mkdir(parents=True)
    with training.set_default_dtype(torch.bfloat16):
        model = llama3(**SIZES, num_layers=num_layers)
    names = {ours: weight.name for ours, weight in hf_weights(model.state_dict(), "llama").items()}
    files: dict[str, dict[str, torch.Tensor]] = {}
    for index, (ours, tensor) in enumerate(model.state_dict().items()):
        file = 1 + index * num_files // len(names)
        files.setdefault(f"model-{file:05}-of-{num_files:05}.safetensors", {})[names[ours]] = tensor
    for file_name, tensors in files.items():
        save_file(tensors, folder / file_name, {"format": "pt"})
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"model_type": "llama", "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128}
    (folder / "config.json").write_text(json.dumps(config))


def memory_mib(key: str) -> float:
    """Read a figure of this process: VmRSS, or VmHWM for the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def measured(work: Callable[[], Any]) -> tuple[float, float]:
    """Give seconds of some work, and the most memory above what there was before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    dist.barrier()
    before, start = memory_mib("VmRSS"), time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - start, memory_mib("VmHWM") - before


def rank_main(rank: int, way: str, directory: Path, num_layers: int, ranks: int) -> None:
    """Load and export one way."""
    os.environ["RANK"] = str(rank)
    torch.set_num_threads(1)
    join = f"file://{directory / ('join_' + way.replace(' ', '_'))}"
    dist.init_process_group("gloo", init_method=join, rank=rank, world_size=ranks)
    on = torch.device("cpu")
    with training.set_default_dtype(torch.bfloat16), torch.device("meta"):
        model: nn.Module = llama3(**SIZES, num_layers=num_layers)
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    source, output = directory / "model", directory / "out"
    load, export = (whole_way if way == "torchtune" else part_way)(model, source, output, on)
    load_s, load_mib = measured(load)
    export_s, export_mib = measured(export)
    shard_mib = sum(parameter.to_local().nbytes for parameter in model.parameters()) / MIB
    every: list[Any] = [None] * ranks
    dist.all_gather_object(every, [round(x) for x in (shard_mib, load_mib, export_mib)])
    figures = {name: [one[i] for one in every] for i, name in enumerate(("shard_mib", "load_peak_mib", "export_peak_mib"))}
    say({"way": way, "load_s": round(load_s, 2), "export_s": round(export_s, 2), **figures})
    dist.destroy_process_group()


def whole_way(model: nn.Module, source: Path, output: Path, on: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Give torchtune's way, as its recipes have it."""
    files = sorted(path.name for path in source.glob("*.safetensors"))
    arguments = {"checkpoint_dir": str(source), "checkpoint_files": files, "output_dir": str(output), "model_type": "LLAMA3"}
    checkpointer = training.FullModelHFCheckpointer(**arguments)

    def load() -> None:
        state_dict = checkpointer.load_checkpoint()[training.MODEL_KEY]
        init_positions(model, on, torch.bfloat16)
        training.load_from_full_model_state_dict(model, state_dict, on, strict=True)

    def export() -> None:
        state_dict = training.gather_cpu_state_dict(model, dist.get_rank() == 0, device=on)
        if dist.get_rank() == 0:
            checkpointer.save_checkpoint({training.MODEL_KEY: state_dict}, epoch=0)

    return load, export


def part_way(model: nn.Module, source: Path, output: Path, on: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Give our way."""
    checkpointer = HFCheckpointer(str(source), str(output))

    def load() -> None:
        model.to_empty(device=on)
        init_positions(model, on, torch.bfloat16)
        checkpointer.load(model)

    return load, lambda: checkpointer.export(model, output / "epoch_0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="folder for the checkpoint and the exports")
    parser.add_argument("--gib", type=float, default=1.1, help="size of the checkpoint (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    num_layers = num_layers_of(arguments.gib)
    torch.multiprocessing.set_start_method("spawn")
    shutil.rmtree(arguments.dir, ignore_errors=True)
    arguments.dir.mkdir(parents=True)
    writer = torch.multiprocessing.Process(target=write_checkpoint, args=(arguments.dir / "model", num_layers))
    writer.start()
    writer.join()
    for way in WAYS:
        torch.multiprocessing.spawn(rank_main, (way, arguments.dir, num_layers, arguments.ranks), nprocs=arguments.ranks)
        shutil.rmtree(arguments.dir / "out", ignore_errors=True)


if __name__ == "__main__":
    main()
