"""Writes docs/configs.md: every packaged configuration, its groups, and the memory that they need by count.

python scripts/config_table.py            # print it
python scripts/config_table.py --write    # into docs/configs.md
"""

import argparse
import logging
import re
import sys
from pathlib import Path

logging.getLogger("torchao").setLevel(logging.ERROR)

from omegaconf import OmegaConf  # noqa: E402

from hbp_tune.cli.counting import count_memory  # noqa: E402
from hbp_tune.config import groups_of  # noqa: E402
from hbp_tune.config.packaged import packaged_configs  # noqa: E402
from hbp_tune.reporting import describe_set  # noqa: E402

PAGE = Path(__file__).parents[1] / "docs/configs.md"
HEAD = """\
# Configurations

`hbp cp NAME my.yaml` copies one, `hbp validate NAME` checks it, `--config NAME` runs it. Groups are written length / CP degree /
recomputed layers. Memory is what the fullest group needs on each rank, [counted](memory.md), on as many devices as the file
launches in its first lines; nothing here was measured. Groups were chosen for lengths like those of Tulu 3 with LongCite (128K)
or LongWriter (32K) on H100s of 80 GB; those of `llama3_1/8B_hbp_full` are the HBP paper's. For your own data `hbp plan` with
`groups=auto` [chooses](choosing_groups.md), and `hbp profile` [measures](profiling.md).

| configuration | devices | groups | GiB |
|---|---|---|---|
"""
TAIL = """
Written by `scripts/config_table.py` from the files in `configs/`.
"""


def page() -> str:
    """Give the page's text."""
    rows = []
    for name, path in packaged_configs().items():
        text = path.read_text(encoding="utf-8")
        nodes, devices = re.search(r"#   tune run (?:--nnodes (\d+) )?--nproc_per_node (\d+) ", text).groups()
        world_size = int(nodes or 1) * int(devices)
        cfg = OmegaConf.load(path)
        groups = groups_of(cfg)
        memory, _ = count_memory(cfg, world_size)
        most_gib = max(memory.peak(group).gib for group in groups)
        kind = f"{world_size} on CPU" if cfg.device == "cpu" else world_size
        rows.append(f"| `{name}` | {kind} | {describe_set(groups)} | {most_gib:.0f} |\n")
    return HEAD + "".join(rows) + TAIL


def main() -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the page")
    if parser.parse_args().write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())


if __name__ == "__main__":
    main()
