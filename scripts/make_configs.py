"""Makes configs/ and docs/configs.md from one table of models and hardware, one template, and the groups that were chosen.

python scripts/make_configs.py            # write them
python scripts/make_configs.py --check    # say which files are not what would be written
python scripts/make_configs.py --choose   # choose the groups of all of them anew, some ten minutes, and write them
"""

import argparse
import logging
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

logging.getLogger("torchao").setLevel(logging.ERROR)

import numpy as np  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402

import hbp_tune as hbp  # noqa: E402
from hbp_tune.cli.counting import count_memory  # noqa: E402
from hbp_tune.recipes.hbp_plan import HBPPlanRecipe  # noqa: E402

ROOT = Path(__file__).parents[1]
TEMPLATE = ROOT / "scripts/config_template.yaml"
GROUPS = ROOT / "scripts/config_groups.yaml"
PAGE = ROOT / "docs/configs.md"
# What each length of context is chosen for.
DATA = {131072: ("tulu3_longcite", "Tulu 3 + LongCite's"), 32768: ("tulu3_longwriter", "Tulu 3 + LongWriter's")}
NUM_SAMPLES = 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What the models of a family have in common.

    Args:
        title: its name.
        repository: on the hub, with ``{size}``.
        builder: of the model, with ``{size}``.
        positions: that it encodes.
        about_yarn: what its configurations of 128K say about positions.
        yarn_suffix: of their names; None where 128K needs no YaRN.
        ignore: files of the repository that are not downloaded.
    """

    title: str
    repository: str
    builder: str
    positions: int
    about_yarn: str = ""
    yarn_suffix: str | None = None
    ignore: str | None = None


@dataclass(frozen=True, kw_only=True)
class Config:
    """A configuration.

    Args:
        name: ``family/size_...``.
        family: of the model.
        title: of the model.
        repository: on the hub.
        builder: of the model.
        has_yarn: whether positions are stretched to 128K.
        about: what the comment above the model says.
        num_nodes: of 8 cards; 0 for a single card.
        gpu: the card.
        positions: that the model encodes, YaRN included.
    """

    name: str
    family: Family
    title: str
    repository: str
    builder: str
    has_yarn: bool = False
    about: str = ""
    num_nodes: int = 1
    gpu: str = "H100"
    positions: int

    @property
    def path(self) -> Path:
        """Give its file."""
        return ROOT / "configs" / f"{self.name}.yaml"

    @property
    def world_size(self) -> int:
        """Give the number of cards."""
        return 8 * self.num_nodes or 1

    @cached_property
    def budget_gib(self) -> float:
        """Give the memory of a card that a step may take."""
        return hbp.planning.SAFE_SHARE * hbp.planning.gpu_named(self.gpu).memory_gib


LLAMA = Family(
    title="Llama3.1 {size} Instruct",
    repository="meta-llama/Meta-Llama-3.1-{size}-Instruct",
    builder="torchtune.models.llama3_1.llama3_1_{size}",
    positions=131072,
    ignore="original/consolidated*",
)
LLAMA_3_2 = replace(
    LLAMA,
    title="Llama3.2 {size} Instruct",
    repository="meta-llama/Llama-3.2-{size}-Instruct",
    builder="torchtune.models.llama3_2.llama3_2_{size}",
)
LLAMA_3_3 = replace(
    LLAMA,
    title="Llama3.3 {size} Instruct",
    repository="meta-llama/Llama-3.3-{size}-Instruct",
    builder="torchtune.models.llama3_3.llama3_3_{size}",
)
QWEN2_5 = Family(
    title="Qwen2.5 {size} Instruct",
    repository="Qwen/Qwen2.5-{size}-Instruct",
    builder="torchtune.models.qwen2_5.qwen2_5_{size}_instruct",
    positions=32768,
    about_yarn="the instruct model encodes 32768 positions, and four times as many by YaRN (arXiv 2309.00071).",
    yarn_suffix="_instruct_128K",
)
QWEN3 = Family(
    title="Qwen3 {size}",
    repository="Qwen/Qwen3-{size}",
    builder="hbp_tune.components.qwen3_{size}",
    positions=32768,
    about_yarn="Qwen3 is trained on 32768 positions, and four times as many by YaRN (arXiv 2309.00071).",
    yarn_suffix="_128K",
)
# Folder, family, then for each size the nodes to train it on.
TABLE = (
    ("llama3_1", LLAMA, {"8B": 1, "70B": 4}),
    ("llama3_2", LLAMA_3_2, {"1B": 1, "3B": 1}),
    ("llama3_3", LLAMA_3_3, {"70B": 4}),
    ("qwen2_5", QWEN2_5, {"0.5B": 1, "1.5B": 1, "3B": 1, "7B": 1, "14B": 1, "32B": 1, "72B": 4}),
    ("qwen3", QWEN3, {"0.6B": 1, "1.7B": 1, "4B": 1, "8B": 1, "14B": 1, "32B": 1}),
)


def configs() -> Iterator[Config]:
    """Give every configuration of the table."""
    for folder, family, sizes in TABLE:
        for size, num_nodes in sizes.items():
            config = Config(
                name=f"{folder}/{size}_hbp_full",
                family=family,
                title=family.title.format(size=size),
                repository=family.repository.format(size=size),
                builder=_builder(family, size),
                num_nodes=num_nodes,
                positions=family.positions,
            )
            yield from _variants(config, size)


def _builder(family: Family, size: str) -> str:
    name = family.builder.format(size=size.lower().replace(".", "_"))
    # torchtune has these two without a suffix.
    return name.removesuffix("_instruct") if size in ("0.5B", "3B") else name


def _variants(config: Config, size: str) -> Iterator[Config]:
    """Give a configuration and what differs from it in hardware or positions."""
    if config.name == "qwen2_5/7B_hbp_full":  # the one base model: it encodes 128K positions by itself
        base = {"title": "Qwen2.5 7B", "repository": "Qwen/Qwen2.5-7B", "builder": "torchtune.models.qwen2_5.qwen2_5_7b_base"}
        about = "the base model encodes 131072 positions, qwen2_5_7b_instruct only 32768"
        yield replace(config, **base, positions=131072, about=about)
    else:
        yield config
    if config.name == "llama3_1/8B_hbp_full":
        yield replace(config, name=f"{config.name}_4_nodes", num_nodes=4)
        yield replace(config, name=f"{config.name}_single_device", num_nodes=0, gpu="H200")
    if suffix := config.family.yarn_suffix:
        name = config.name.replace(f"{size}_hbp_full", f"{size}{suffix}_hbp_full")
        yield replace(config, name=name, has_yarn=True, positions=131072, about=config.family.about_yarn)


def render(config: Config, groups: list[dict[str, Any]], peak_gib: float) -> str:
    """Write a configuration by the template."""
    values = _header(config) | _model(config) | _groups(config, groups, peak_gib)
    text = TEMPLATE.read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace(f"<<{key}>>", value)
    left = re.findall(r"<<\w+>>", text)
    assert not left, left
    return text


def _header(config: Config) -> dict[str, str]:
    on_nodes = config.num_nodes > 1
    launch = "--nproc_per_node 1" if config.num_nodes == 0 else "--nproc_per_node 8"
    devices = "one H200" if config.num_nodes == 0 else f"{config.world_size} devices"
    number = "The number of devices must be a multiple of the largest cp_degree below."
    if config.num_nodes == 0:
        number = "Start it with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, which keeps memory in one piece."
    rendezvous = "\n# on every node, with torchrun's --rdzv_id, --rdzv_backend c10d and --rdzv_endpoint HOST:PORT"
    return {
        "title": config.title,
        "for_long": ", with YaRN for\n# documents of up to 128K tokens" if config.has_yarn else "",
        "repository": config.repository,
        "model_dir": f"/tmp/{config.repository.rpartition('/')[2]}",
        "ignore": f' --ignore-patterns "{config.family.ignore}"' if config.family.ignore else "",
        "devices": f"{devices}, {config.num_nodes} nodes of 8" if on_nodes else devices,
        "where": "" if on_nodes else " from any folder",
        "launch": f"--nnodes {config.num_nodes} {launch}" if on_nodes else launch,
        "name": config.name,
        "rendezvous": rendezvous if on_nodes else "",
        "number": number,
        "run": config.name.replace("/", "_").replace("_hbp_full", ""),
    }


def _model(config: Config) -> dict[str, str]:
    about = f": {config.about}" if config.about else ""
    model = f"  _component_: {config.builder}"
    if config.has_yarn:
        about += (
            "\n# YaRN stretches the positions of short documents too: where none has more than 32K tokens, leave it out."
            "\n# The exported config.json says rope_scaling and max_position_embeddings, so that it loads as it was trained."
        )
        model = (
            f"  _component_: hbp_tune.components.with_yarn\n  model:\n    _component_: {config.builder}\n"
            f"  factor: 4.0\n  original_max_position_embeddings: 32768"
        )
    return {
        "about_model": about,
        "model": model,
        "optimizer": "  _component_: torch.optim.AdamW\n  fused: True"
        if config.num_nodes
        else "  _component_: torchao.optim.AdamW8bit  # 15 GiB less than torch.optim.AdamW in bf16",
    }


def _groups(config: Config, groups: list[dict[str, Any]], peak_gib: float) -> dict[str, str]:
    gpu = hbp.planning.gpu_named(config.gpu)
    lines = []
    for group in groups:
        settings = ", ".join(f"{key}: {value}" for key, value in group.items())
        lines.append(f"  - {{_component_: hbp_tune.components.PackingGroup, {settings}}}")
    curriculum = "curriculum:\n  _component_: hbp_tune.components.Interleave"
    if len(groups) > 1:
        curriculum = (
            "curriculum:\n  _component_: hbp_tune.components.ShortFirst\n"
            "  steps: 0.05  # Of the run: only steps of groups up to max_pack_len at first, then all mixed\n"
            f"  max_pack_len: {groups[-2]['pack_len']}"
        )
    number = f"{config.world_size} {gpu.name}{'s' if config.world_size > 1 else ''}"
    return {
        "cards": f"{number} of {gpu.memory_gib:g} GB",
        "data": DATA[config.positions][1],
        "peak": f"{peak_gib:.0f}",
        "groups": "\n".join(lines),
        "longest": f"{config.positions // 1024}K",
        "curriculum": curriculum,
    }


def choose(config: Config) -> list[dict[str, Any]]:
    """Choose the groups of a configuration as ``hbp plan groups=auto`` does."""
    lengths, _ = hbp.planning.synthetic_lengths(DATA[config.positions][0], NUM_SAMPLES)
    with tempfile.TemporaryDirectory() as folder:
        np.save(
            Path(folder) / "lengths.npy", np.append(lengths, config.positions)
        )  # so that the longest group is for all lengths
        cfg = OmegaConf.create(render(config, [{"name": "any", "pack_len": config.positions}], 0.0))
        assert isinstance(cfg, DictConfig)
        cfg.merge_with({"output_dir": folder, "lengths": f"{folder}/lengths.npy", "world_size": config.world_size})
        cfg.merge_with({"gpu": config.gpu, "memory_gib": config.budget_gib})
        cfg.groups = "auto"
        HBPPlanRecipe(cfg).setup(cfg)
        chosen: Any = OmegaConf.to_container(OmegaConf.load(Path(folder) / "groups.yaml"))
    usual = {"_component_": "hbp_tune.components.PackingGroup", "ac_mode": "full"}
    return [{key: value for key, value in group.items() if usual.get(key) != value} for group in chosen["groups"]]


def peak_gib(config: Config, groups: list[dict[str, Any]]) -> float:
    """Count the memory that the fullest group needs on each card."""
    cfg = OmegaConf.create(render(config, groups, 0.0))
    assert isinstance(cfg, DictConfig)
    memory, _ = count_memory(cfg, config.world_size)
    return max(memory.peak(group).gib for group in hbp.config.groups_of(cfg))


HEAD = """\
# Configurations

`hbp cp NAME my.yaml` copies one, `hbp validate NAME` checks it, `--config NAME` runs it. Groups are written length / CP degree /
recomputed layers. Memory is what the fullest group needs on each rank, [counted](memory.md); nothing was measured. Groups were
chosen by modelled time for lengths like those of Tulu 3 with LongCite (128K) or LongWriter (32K), on H100s of 80 GB (the single
device: an H200), of which a step takes at most 90% by count. For your own data `hbp plan` with `groups=auto`
[chooses](choosing_groups.md), and `hbp profile` [measures](profiling.md).

| configuration | devices | groups | GiB |
|---|---|---|---|
| `demo/tiny_llama_cpu` | 2 on CPU | short/1/0 + long/2/2 | 2 |
"""
TAIL = """
Written by `scripts/make_configs.py`, as the files in `configs/` are.
"""


def chosen_groups() -> dict[str, Any]:
    """Give the groups of each configuration, as they were chosen, and their peak in GiB."""
    chosen: Any = OmegaConf.to_container(OmegaConf.load(GROUPS))
    return dict(chosen)


def written() -> dict[Path, str]:
    """Give every file with its text."""
    chosen = chosen_groups()
    texts, rows = {}, {}
    for config in configs():
        entry = chosen[config.name]
        texts[config.path] = render(config, entry["groups"], entry["peak_gib"])
        groups = [hbp.planning.PackingGroup(**group) for group in entry["groups"]]
        described = hbp.reporting.describe_set(groups)
        rows[config.name] = f"| `{config.name}` | {config.world_size} | {described} | {entry['peak_gib']:.0f} |\n"
    texts[PAGE] = HEAD + "".join(rows[name] for name in sorted(rows)) + TAIL
    return texts


def main() -> int:
    """Write the files, check them, or choose their groups first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where a file differs")
    parser.add_argument("--choose", nargs="*", metavar="NAME", help="choose the groups of these, or of all, first")
    arguments = parser.parse_args()
    if arguments.choose is not None:
        entries = chosen_groups() if GROUPS.exists() else {}
        for config in configs():
            if not arguments.choose or config.name in arguments.choose:
                groups = choose(config)
                entries[config.name] = {"groups": groups, "peak_gib": round(peak_gib(config, groups), 1)}
                GROUPS.write_text(OmegaConf.to_yaml(OmegaConf.create(entries)), encoding="utf-8")
    differing = [path for path, text in written().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if arguments.check:
        for path in differing:
            sys.stderr.write(f"{path.relative_to(ROOT)} is not what scripts/make_configs.py writes; run it\n")
        return bool(differing)
    for path in differing:
        path.write_text(written()[path], encoding="utf-8")
        sys.stdout.write(f"{path.relative_to(ROOT)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
