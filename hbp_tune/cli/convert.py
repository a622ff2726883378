"""``hbp convert``: a stock torchtune configuration to one of ours, its comments kept."""

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hbp_tune.cli.counting import count_memory
from hbp_tune.cli.registry import TRAIN, find
from hbp_tune.config import check_config
from hbp_tune.config.packaged import read_yaml
from hbp_tune.config.stock import REPLACED
from hbp_tune.errors import ConfigError
from hbp_tune.planning import PackingGroup, gpu_named, length_name
from hbp_tune.planning.costs.hardware import Gpu

# Tokens of a rank in packs and in a step: those of the HBP paper's groups.
_LOCAL_LEN = 16_384
_LONGEST = 131_072
# Optimizers that do not take FSDP2's sharded weights, and what is the same for these.
_OPTIMIZERS = {
    "bitsandbytes.optim.PagedAdamW8bit": "torchao.optim.AdamW8bit",
    "bitsandbytes.optim.PagedAdamW": "torch.optim.AdamW",
}


def add_convert(commands: Any) -> None:
    """Add the command's arguments."""
    parser = commands.add_parser(
        "convert",
        prog="hbp convert",
        help="Turn a stock torchtune configuration into one with packing groups.",
        description="Turn a configuration of torchtune's full_finetune_distributed or full_finetune_single_device into one of "
        f"{TRAIN}. Comments stay; what has no place is taken out, and said. The packing groups are a start, by counted "
        "memory: `hbp plan` with groups=auto, or `hbp profile`, choose better ones for your data.",
    )
    parser.add_argument("config", help="path of a YAML file, or the name of a configuration (hbp ls)")
    parser.add_argument("destination", type=Path, help="file to write; it must not exist")
    parser.add_argument("--world-size", type=int, default=8, help="ranks of the run (default: %(default)s)")
    parser.add_argument("--gpu", default="H100", help="whose memory decides what is recomputed (default: %(default)s)")
    parser.add_argument(
        "--longest", type=int, help=f"tokens of the longest packs (default: the model's positions, {_LONGEST:,} at most)"
    )
    parser.set_defaults(func=_run)


def _run(args: argparse.Namespace) -> int:
    if args.destination.exists():
        raise ConfigError(f"{args.destination} exists; remove it, or choose another file")
    path, gpu = find(args.config), gpu_named(args.gpu)
    cfg = stock_config(read_yaml(path), args.config)
    groups = start_groups(cfg, args.world_size, gpu, args.longest)
    text = path.read_text(encoding="utf-8")
    where = f"{args.world_size} {gpu.name}s"
    converted, notes = convert(text, cfg, groups, name=str(args.destination), world_size=args.world_size, where=where)
    try:
        args.destination.write_text(converted, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{args.destination} cannot be written: {error.strerror or error}") from error
    for note in notes:
        sys.stdout.write(f"{note}\n")
    sys.stdout.write(
        f"Written: {args.destination}\nNext:    hbp plan --config {args.destination} world_size={args.world_size}\n"
        f"         tune run --nproc_per_node {args.world_size} {TRAIN} --config {args.destination}\n"
    )
    return 0


def stock_config(cfg: Any, name: str) -> DictConfig:
    """Take a configuration of a stock recipe for full fine-tuning.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(cfg, DictConfig) or not {"model", "dataset", "checkpointer"} <= set(cfg):
        raise ConfigError(
            f"{name} is not a configuration of torchtune's full_finetune recipes: it has no model, dataset or checkpointer"
        )
    if cfg.get("groups") or cfg.get("groups_file"):
        raise ConfigError(f"{name} has packing groups: there is nothing to convert")
    if "lora" in (component := str(cfg.model.get("_component_"))):
        raise ConfigError(f"{name}: {component} trains adapters, and hbp-tune all weights; convert a full_finetune configuration")
    return cfg


def start_groups(cfg: DictConfig, world_size: int, gpu: Gpu, longest: int | None) -> tuple[PackingGroup, ...]:
    """Give packs of one rank, and, where the model encodes more, of as many ranks as the longest need.

    Args:
        cfg: of the model.
        world_size: ranks of the run.
        gpu: of each.
        longest: tokens of the longest packs; by default the model's positions, 128K at most.

    Raises:
        ConfigError: they do not fit, with all layers recomputed neither.
    """
    memory, decoder = count_memory(cfg, world_size)
    longest = longest or min(decoder.max_seq_len, _LONGEST)
    most_ranks = world_size & -world_size  # the largest power of two that divides it
    wanted = 1 << (-(-longest // _LOCAL_LEN) - 1).bit_length()
    sizes = [(min(longest, _LOCAL_LEN), 1), *([(longest, min(wanted, most_ranks))] if longest > _LOCAL_LEN else [])]
    groups = []
    for pack_len, cp_degree in sizes:
        group = PackingGroup(name=length_name(pack_len), pack_len=pack_len, cp_degree=cp_degree)
        if (ac_layers := memory.fewest_ac_layers(group, gpu.memory_gib)) is None:
            needs_gib = memory.peak(replace(group, ac_layers=len(decoder.layers))).gib
            raise ConfigError(
                f"packs of {pack_len} tokens over {cp_degree} of {world_size} ranks need {needs_gib:.0f} GiB with all layers "
                f"recomputed, an {gpu.name} has {gpu.memory_gib:g}; give more ranks (--world-size) or less --longest"
            )
        groups.append(replace(group, ac_layers=ac_layers))
    return tuple(groups)


@dataclass
class _Block:
    """A top-level key with all of its lines, and the comments before it."""

    key: str | None
    before: list[str]
    lines: list[str]


def _blocks(text: str) -> Iterator[_Block]:
    before: list[str] = []
    block: _Block | None = None
    for line in text.splitlines(keepends=True):
        if match := re.match(r"([A-Za-z_]\w*):", line):
            if block:
                yield block
            block, before = _Block(match[1], before, [line]), []
        elif not line.strip() or line.startswith("#"):
            before.append(line)
        else:  # of a key's value; comments and blank lines in it too
            assert block is not None, "YAML mappings begin with a key"
            block.lines += [*before, line]
            before = []
    if block:
        yield block
    yield _Block(None, before, [])


def convert(
    text: str, cfg: DictConfig, groups: tuple[PackingGroup, ...], *, name: str, world_size: int, where: str
) -> tuple[str, list[str]]:
    """Convert a configuration's text.

    Args:
        text: YAML of a stock recipe.
        cfg: the same, read.
        groups: to put in.
        name: of the result, for the comments that say how to launch it.
        world_size: ranks, for these comments too.
        where: the machine that the groups are for.

    Returns:
        The new text, and a line for each thing that is not as it was.
    """
    blocks, notes, is_placed = [], [], False
    for block in _blocks(text):
        if block.key in REPLACED:
            harmless, reason = REPLACED[block.key]
            value = cfg[block.key]
            if not any(value is one or value == one for one in harmless):
                notes.append(f"{block.key}={value} is out: {reason}")
            block.lines = []
            if block.key == "max_steps_per_epoch" and value is not None:
                block.lines = [f"max_steps: {value * cfg.get('epochs', 1)}\n"]
            elif block.key in ("batch_size", "gradient_accumulation_steps") and not is_placed:
                block.lines, is_placed = _packing(groups, world_size, where), True
        elif block.key in ("dataset", "tokenizer", "optimizer"):
            block.lines = [line for line in map(_mended, block.lines) if line]
            notes += _notes_on(block.key, cfg)
        block.before = [_relaunch(line, name, world_size) for line in block.before]
        blocks.append(block)
    if not is_placed:
        blocks[-1].lines = ["\n", *_packing(groups, world_size, where)]
    converted = "".join(line for block in blocks for line in (*block.before, *block.lines))
    result = OmegaConf.create(converted)
    assert isinstance(result, DictConfig)
    check_config(result)
    return converted, notes


def _packing(groups: tuple[PackingGroup, ...], world_size: int, where: str) -> list[str]:
    """Write groups and planner."""
    component = "{_component_: hbp_tune.components."
    return [
        f"# Fewest recomputed layers that fit {where}, by counted memory; `hbp profile` measures\n",
        "groups:\n",
        *(
            f"  - {component}PackingGroup, name: {group.name}, pack_len: {group.pack_len}, cp_degree: {group.cp_degree}, "
            f"ac_layers: {group.ac_layers}}}\n"
            for group in groups
        ),
        f"planner: {component}BalancePlanner, tokens_per_step: {_LOCAL_LEN * world_size}}}  # Over all ranks\n",
    ]


def _mended(line: str) -> str:
    """Mend a line of a data set, tokenizer or optimizer; empty where it goes."""
    if re.match(r"\s+packed:", line):
        return ""
    line = re.sub(r"^(\s+max_seq_len:)\s*\d+", r"\1 null", line)
    for theirs, ours in _OPTIMIZERS.items():
        line = re.sub(rf"{re.escape(theirs)}\b", ours, line)
    return line


def _notes_on(key: str, cfg: DictConfig) -> Iterator[str]:
    node: Any = cfg[key]
    if key == "tokenizer" and (cut := node.get("max_seq_len")):
        yield f"tokenizer.max_seq_len={cut} is null, as it cuts samples; planner.overlong says what becomes of long ones"
    if key == "optimizer" and (component := node.get("_component_")) in _OPTIMIZERS:
        yield f"optimizer {component} is {_OPTIMIZERS[component]}: bitsandbytes does not take sharded weights"


def _relaunch(line: str, name: str, world_size: int) -> str:
    """Name our recipe in a comment that names torchtune's."""
    stock = r"full_finetune_(?:distributed|single_device)"
    line = re.sub(
        rf"tune run (?:--nproc_per_node \d+ )?{stock}(?: --config \S+)?",
        lambda match: f"tune run --nproc_per_node {world_size} {TRAIN} --config {name}",
        line,
    )
    return re.sub(rf"(?<!hbp_){stock}", TRAIN, line)
