"""The blocks of docs/datasets.md, each with small rows in its hub data set's columns in place of the hub."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from hbp_tune.config import build, data_settings
from hbp_tune.data import Builder, open_data
from hbp_tune.demo import prepare_demo

ROOT = Path(__file__).parents[2]
TEXTS = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/datasets.md").read_text(), re.DOTALL)
BLOCKS = [block for block in map(yaml.safe_load, TEXTS) if "dataset" in block]
CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because it is so."}]
ROWS: dict[str, dict[str, Any]] = {
    "chats.jsonl": {"messages": CHAT},
    "data/dialogs.parquet": {"dialog": [{"speaker": "customer", "said": "Why?"}, {"speaker": "agent", "said": "So."}], "id": 3},
    "allenai/tulu-3-sft-mixture": {"id": "a", "messages": CHAT, "source": "ai2-adapt-dev/flan"},
    "zai-org/LongCite-45k": {
        "prompt": "[Document Start]<C0>It is.<C1>[Document End] Why?",
        "response": "<statement>So.</statement>",
    },
    "zai-org/LongAlign-10k": {"messages": CHAT, "length": 9000},
    "zai-org/LongWriter-6k": {"messages": CHAT},
    "teknium/OpenHermes-2.5": {
        "conversations": [
            {"from": "system", "value": "Be short."},
            {"from": "human", "value": "Why?"},
            {"from": "gpt", "value": "Because it is so."},
        ],
        "source": "airoboros2.2",
        "category": "orca",
    },
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_demo(tmp_path_factory.mktemp("blocks") / "demo", num_samples=150, max_tokens=1000).directory


def nodes_of(block: dict[str, Any]) -> list[dict[str, Any]]:
    return block["dataset"] if isinstance(block["dataset"], list) else [block["dataset"]]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: str(block["dataset"])[:90])
def test_rows_of_the_hubs_columns_become_samples(demo: Path, tmp_path: Path, block: dict[str, Any]) -> None:
    nodes = []
    for index, node in enumerate(nodes_of(block)):
        rows = tmp_path / f"rows_{index}.jsonl"
        rows.write_text("".join(json.dumps(ROWS[node.get("source") or node["data_files"]]) + "\n" for _ in range(3)))
        nodes.append({**node, "source": None, "data_files": str(rows), "split": "train"})
    cfg = OmegaConf.create(
        {"dataset": nodes, "tokenizer": {"_component_": "hbp_tune.components.HFTokenizer", "path": str(demo / "model")}}
    )
    data = data_settings(cfg.dataset, cfg.tokenizer)
    loaded, store = open_data(data, build("tokenizer", cfg.tokenizer), tmp_path / "store", Builder.alone())
    assert len(loaded.counts.lengths) == 3 * len(nodes)
    assert (store.num_targets > 0).all(), "answers are trained"
    assert (store.num_targets < loaded.counts.lengths - 1).all(), "questions are not"


def test_every_block_has_rows_and_all_are_read() -> None:
    names = {node.get("source") or node["data_files"] for block in BLOCKS for node in nodes_of(block)}
    assert names == ROWS.keys()
    assert len(BLOCKS) == 8
