"""A file of every format trains from the command line, by the packaged demo and one override."""

import csv
import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from hbp_tune.demo import prepare_demo
from tests.launching import losses, run, tune

pytestmark = pytest.mark.slow

NUM_ROWS = 150  # some hundred tokens each: an epoch of a few steps
WORDS = "The river ends in the sea, where else should it end, and what does the function return then? " * 3
CALL = {"id": "1", "type": "function", "function": {"name": "name_river", "arguments": {"where": "north", "n": 2}}}
SCHEMA = {"type": "object", "properties": {"n": {"type": "number"}}}
TOOL = {"type": "function", "function": {"name": "name_river", "parameters": SCHEMA}}
OPENAI = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": WORDS}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "A call serves."},
        {"role": "tool", "content": '{"river": "Sumida"}', "tool_call_id": "1"},
        {"role": "assistant", "content": WORDS},
    ],
    "tools": [TOOL],
}
# Arrow takes one type a field: contents are texts there.
OPENAI_AS_TEXT = {**OPENAI, "messages": [{**m, "content": WORDS} for m in OPENAI["messages"]]}
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": WORDS},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "Sumida"},
        {"from": "gpt", "value": WORDS},
    ],
    "tools": json.dumps([TOOL]),
}
PAIR = {"prompt": WORDS, "completion": WORDS}


def lines(path: Path, row: dict[str, Any]) -> Path:
    path.write_text(NUM_ROWS * (json.dumps(row) + "\n"))
    return path


def packed(path: Path, row: dict[str, Any]) -> Path:
    path.write_bytes(gzip.compress(NUM_ROWS * (json.dumps(row) + "\n").encode()))
    return path


def array(path: Path, row: dict[str, Any]) -> Path:
    path.write_text(json.dumps(NUM_ROWS * [row]))
    return path


def table(path: Path, row: dict[str, Any]) -> Path:
    datasets.Dataset.from_list(NUM_ROWS * [row]).to_parquet(path)
    return path


def saved(path: Path, row: dict[str, Any]) -> Path:
    datasets.Dataset.from_list(NUM_ROWS * [row]).save_to_disk(path)
    return path


def sheet(path: Path, row: dict[str, Any]) -> Path:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([list(row), *(NUM_ROWS * [list(row.values())])])
    return path


def folder(path: Path, row: dict[str, Any]) -> Path:
    path.mkdir()
    lines(path / "a.jsonl", row)
    lines(path / "b.jsonl", row)
    return path


FILES = {
    "openai.jsonl": (lines, OPENAI),
    "openai.parquet": (table, OPENAI_AS_TEXT),
    "sharegpt.json": (array, SHAREGPT),
    "alpaca.jsonl.gz": (packed, {"instruction": WORDS, "input": "So?", "output": WORDS}),
    "pairs.csv": (sheet, PAIR),
    "pairs of messages.jsonl": (
        lines,
        {key: [{"role": role, "content": WORDS}] for key, role in zip(PAIR, ("user", "assistant"), strict=True)},
    ),
    "texts": (folder, {"text": WORDS * 2}),
    "saved": (saved, PAIR),
    "tokens.jsonl": (lines, {"input_ids": list(range(1, 120)), "labels": [-100] * 60 + list(range(61, 120))}),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("formats")
    prepare_demo(root / "hbp_demo", num_samples=150, max_tokens=1000)
    return root


@pytest.mark.parametrize("name", FILES)
def test_a_file_trains_by_one_override(home: Path, tmp_path: Path, name: str) -> None:
    os.symlink(home / "hbp_demo", tmp_path / "hbp_demo")
    write, row = FILES[name]
    path = write(tmp_path / name, row)
    output = run(tune("--config", "demo/tiny_llama_cpu", f"dataset.data_files={path.name}"), tmp_path)
    assert len(losses(tmp_path / "hbp_runs/demo")) >= 2, output[-2000:]
