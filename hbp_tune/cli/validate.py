"""``hbp validate``: check a configuration as far as that goes without its files, and count its memory."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torchtune import config
from torchtune.config._errors import ConfigError as TorchtuneConfigError
from torchtune.config._errors import InstantiationError

from hbp_tune.cli.counting import count_memory
from hbp_tune.cli.registry import find
from hbp_tune.config import build, check_config, data_settings, groups_of, missing_tokenizer_files, setting
from hbp_tune.config.building import find_component
from hbp_tune.config.packaged import read_mapping
from hbp_tune.data import default_store_directory, load_sources, view_first
from hbp_tune.errors import ConfigError
from hbp_tune.planning import SAFE_SHARE, MemoryModel, PackingGroup, check_ac_layers, check_groups, gpu_named
from hbp_tune.planning.costs.hardware import Gpu
from hbp_tune.reporting import print_sample

# Of a card's memory; a step that takes less leaves some of it unused that would make it faster.
_USED_WELL = 2 / 3


def add_validate(commands: Any) -> None:
    """Add the command's arguments."""
    parser = commands.add_parser(
        "validate",
        prog="hbp validate",
        help="Check a configuration, and say how much memory its packing groups need.",
        description="Check a configuration: keys, components and their arguments, and, where it has packing groups, these "
        "against the ranks, the model and a GPU's memory. Where tokenizer and data are there, the first sample of each data set "
        "is shown as it is trained.",
    )
    parser.add_argument("config", help="name of a configuration (hbp ls), or path of a YAML file")
    parser.add_argument("--world-size", type=int, help="ranks of the run (default: the largest cp_degree, 8 at least)")
    parser.add_argument("--gpu", default="H100", help="whose memory there is (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON document, for scripts, and no sample")
    parser.set_defaults(func=_run)


def _run(args: argparse.Namespace) -> int:
    cfg = read_mapping(find(args.config))
    OmegaConf.resolve(cfg)
    _check_components(cfg)
    counted = _check_groups(cfg, args.world_size, args.gpu) if cfg.get("groups") or cfg.get("groups_file") else None
    if args.json:
        sys.stdout.write(f"{json.dumps({'config': args.config} | (counted.summary() if counted else {}), indent=2)}\n")
    elif counted:
        counted.show()
        _show_data(cfg)
        sys.stdout.write(f"{args.config} is well-formed.\n")
    else:
        sys.stdout.write(f"{args.config} is well-formed. It has no packing groups: it is for a recipe of torchtune's.\n")
    return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Counted:
    """What a configuration's groups need.

    Args:
        groups: from short to long.
        peaks_gib: of each group, on each rank.
        world_size: ranks of the run.
        gpu: that they run on.
        notes: what its owner should know.
    """

    groups: Sequence[PackingGroup]
    peaks_gib: Sequence[float]
    world_size: int
    gpu: Gpu
    notes: Sequence[str]

    def summary(self) -> dict[str, Any]:
        """Give all of it as plain values."""
        groups = [asdict(group) | {"peak_gib": round(gib, 2)} for group, gib in zip(self.groups, self.peaks_gib, strict=True)]
        return {
            "world_size": self.world_size,
            "gpu": self.gpu.name,
            "memory_gib": self.gpu.memory_gib,
            "groups": groups,
            "notes": list(self.notes),
        }

    def show(self) -> None:
        """Show it as a table and lines."""
        table = Table(title=f"Memory of each of {self.world_size} ranks, by count")
        for heading in ("group", "length", "CP", "AC", "GiB", f"of {self.gpu.name}"):
            table.add_column(heading, justify="left" if heading == "group" else "right")
        for group, gib in zip(self.groups, self.peaks_gib, strict=True):
            sizes = (f"{group.pack_len:,}", str(group.cp_degree), str(group.ac_layers))
            table.add_row(group.name, *sizes, f"{gib:.1f}", f"{gib / self.gpu.memory_gib:.0%}")
        Console(highlight=False).print(table)
        for note in self.notes:
            sys.stdout.write(f"{note}\n")


def _check_components(cfg: DictConfig) -> None:
    """Check that every component exists, and takes the arguments that it is given.

    Raises:
        ConfigError: one does not.
    """
    for key, value in cfg.items():
        name = str(key)
        nodes = {f"{name}[{index}]": node for index, node in enumerate(value)} if OmegaConf.is_list(value) else {name: value}
        for where, node in nodes.items():
            if OmegaConf.is_dict(node) and isinstance(component := node.get("_component_"), str):
                find_component(where, component)
            try:
                config.validate(OmegaConf.create({"node": node}))
            except (TorchtuneConfigError, InstantiationError, TypeError, ValueError) as error:  # it raises all of them
                raise ConfigError(f"{where}: {' '.join(str(error).split())}") from error


def _check_groups(cfg: DictConfig, world_size: int | None, gpu_name: str) -> _Counted:
    """Check the groups against ranks and model, and count the memory that they need."""
    check_config(cfg)
    groups, gpu = groups_of(cfg), gpu_named(gpu_name)
    world_size = world_size or max(8, *(group.cp_degree for group in groups))
    check_groups(groups, world_size)
    for key in ("planner", "curriculum", "loss_head"):
        if hasattr(node := setting(cfg, key), "keys"):
            build(key, node)
    memory, decoder = count_memory(cfg, world_size)
    check_ac_layers(groups, len(decoder.layers))
    notes = []
    if (longest := groups[-1].pack_len) > decoder.max_seq_len:
        notes.append(f"Packs hold {longest:,} tokens, the model encodes {decoder.max_seq_len:,} positions: no sample is longer.")
    peaks_gib = [memory.peak(group).gib for group in groups]
    if (most := max(peaks_gib)) > gpu.memory_gib:
        notes.append(
            f"warning: {most:.1f} GiB are needed, an {gpu.name} has {gpu.memory_gib:g}; raise ac_layers or cp_degree, or take "
            f"more ranks (--world-size)"
        )
    elif most < _USED_WELL * gpu.memory_gib and cfg.get("device") != "cpu":
        notes.append(_unused(memory, groups, most, gpu))
    return _Counted(groups=groups, peaks_gib=peaks_gib, world_size=world_size, gpu=gpu, notes=notes)


def _unused(memory: MemoryModel, groups: Sequence[PackingGroup], most_gib: float, gpu: Gpu) -> str:
    """Say what would use memory that no step takes."""
    fewer = []
    for group in groups:
        ac_layers = memory.fewest_ac_layers(group, SAFE_SHARE * gpu.memory_gib)
        if ac_layers is not None and ac_layers < group.ac_layers:
            fewer.append(f"ac_layers={ac_layers} for {group.name!r}")
    way = f"{' and '.join(fewer)} would fit, and recompute less" if fewer else "longer packs or a smaller cp_degree would use it"
    return (
        f"note: over a third of an {gpu.name} stays unused, a step takes {most_gib:.1f} of {gpu.memory_gib:g} GiB; {way}. "
        f"`hbp plan` with groups=auto chooses for your data"
    )


def _show_data(cfg: DictConfig) -> None:
    """Show the first sample of each local data set as it is trained, or say what is not there for it."""
    try:
        missing = missing_tokenizer_files(cfg)
        settings = data_settings(cfg.dataset, cfg.tokenizer)
    except ConfigError as error:
        sys.stdout.write(f"The data are not shown: {error}\n")
        return
    if missing or not any(one.files for one in settings.datasets):
        reason = f"{missing[0]} does not exist yet" if missing else "they are not on this disk"
        sys.stdout.write(f"The data are not shown: {reason}.\n")
        return
    console = Console(highlight=False)
    tokenizer = build("tokenizer", cfg.tokenizer)
    for source in load_sources(settings, tokenizer, Path(cfg.get("token_store_dir") or default_store_directory())):
        if view := view_first(source, tokenizer):
            print_sample(view, console)
