"""Every command of the README and the documentation is executed, word for word, on a model and data of a CPU's size.

What a command names is there under its name: configurations with the demo's model in place of theirs, chats, lengths. Changed in
the commands are numbers of processes and nodes alone, which are those of this machine.
"""

import gzip
import importlib.util
import json
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import datasets
import pytest
from omegaconf import OmegaConf

from hbp_tune.config.packaged import packaged_configs
from hbp_tune.demo import prepare_demo
from tests.launching import run
from tests.test_docs import commands

pytestmark = pytest.mark.slow


def shrink(path: Path, demo: Path, *, plans_only: bool = False) -> None:
    """Take the demo's tokenizer and data, and, where it trains, the demo's model and smaller groups and steps."""
    cfg: Any = OmegaConf.load(path)
    tiny: Any = OmegaConf.load(packaged_configs()["demo/tiny_llama_cpu"])
    cfg.demo_dir, cfg.tokenizer, cfg.dataset = str(demo), tiny.tokenizer, tiny.dataset
    if not plans_only:
        cfg.model, cfg.optimizer = tiny.model, tiny.optimizer
        cfg.checkpointer = OmegaConf.merge(tiny.checkpointer, {"output_dir": "${output_dir}"})
        for group in cfg.groups:
            group.ac_layers = min(group.ac_layers, 2)
            group.pack_len, group.cp_degree = group.pack_len // 64, min(group.cp_degree, 2)
        cfg.planner.tokens_per_step, cfg.max_steps, cfg.num_workers = 4096, 2, 0
        cfg.device, cfg.dtype = "cpu", "fp32"
    OmegaConf.save(cfg, path)


def on_this_machine(line: str, port: int) -> str:
    """Give a command as many processes as fit here, on one node."""
    for pattern, instead in (
        (r"--nproc_per_node \d+", "--nproc_per_node 2"),
        (r'--nnodes (\d+|"\$SLURM_NNODES")', "--nnodes 1"),
        (r"node001:29500|\"\$HEAD_NODE:29500\"", f"localhost:{port}"),
        (r'"\$SLURM_JOB_ID"', "18"),
    ):
        line = re.sub(pattern, instead, line)
    return line


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
    return port


def test_every_command_of_the_documentation_runs(tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    prepare_demo(demo, num_samples=150, max_tokens=1000)
    shutil.copy(demo / "chat.jsonl", tmp_path / "chats.jsonl")
    (tmp_path / "data").mkdir()
    shutil.copy(demo / "chat.jsonl", tmp_path / "data/train.jsonl")
    chats = [json.loads(line)["messages"] for line in (demo / "chat.jsonl").read_bytes().splitlines()]
    datasets.Dataset.from_list([{"messages": messages} for messages in chats]).to_parquet(tmp_path / "data/chats.parquet")
    names = {"user": "human", "assistant": "gpt"}
    rows = [[{"from": names[turn["role"]], "value": turn["content"]} for turn in messages] for messages in chats]
    (tmp_path / "sharegpt.json").write_text(json.dumps([{"conversations": row} for row in rows]), encoding="utf-8")
    with gzip.open(tmp_path / "lengths.csv.gz", "wt") as file:
        file.write("n_tokens\n" + "\n".join(str(30 + 97 * i % 1900) for i in range(300)))
    for page, line in commands():
        plans_only = "plan" in line
        for name in (word for word in line.split() if word in packaged_configs()):  # a file wins over a packaged name
            (tmp_path / name).parent.mkdir(exist_ok=True)
            shutil.copy(packaged_configs()[name], tmp_path / name)
            shrink(tmp_path / name, demo, plans_only=plans_only)
        if line.startswith(("hbp cp", "hbp convert")):  # they do not write over files
            for name in (name for name in ("my.yaml", "my_recipe.py") if name in line.split()):
                (tmp_path / name).unlink(missing_ok=True)
        if "eleuther_eval --config" in line and importlib.util.find_spec("lm_eval") is None:
            continue  # the harness is the reader's to install; that its configuration is written was seen in the line before
        output = run(["bash", "-c", on_this_machine(line, free_port())], tmp_path)
        assert output, f"{page}: {line}"
        if line.startswith(("hbp cp", "hbp convert")) and "my.yaml" in line.split():
            shrink(tmp_path / "my.yaml", demo)
