"""`hbp data`: what the data hold, and rows as they are trained."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hbp_tune.cli.__main__ import main
from hbp_tune.demo.tokenizer import train_ranks, write_hf_tokenizer

WORDS = "The river ends in the sea, where else should it end, and what does the function return then? "


def chat(*turns: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(turns)]
    messages[-1] |= fields
    return {"messages": messages}


ROWS = [
    chat("Where?", "In the sea."),
    chat(WORDS * 200, "It ends."),
    chat("Spell <|eot_id|>.", "So."),
    chat("Why?", "No.", weight=0),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_hf_tokenizer(folder, train_ranks([WORDS + "def function(value): return value"], vocab_size=280))
    return folder


@pytest.fixture
def arguments(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "argv", ["hbp"])
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    overrides = [f"tokenizer.path={model}", f"dataset.data_files={tmp_path / 'chats.jsonl'}", f"output_dir={tmp_path / 'out'}"]
    return ["data", "--config", "demo/tiny_llama_cpu", *overrides]


def shown(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_counts_and_the_first_sample(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    output = shown(arguments, capsys)
    flat = " ".join(output.split())
    assert "Data set chats: 4 rows, 1 of them bad" in flat
    assert "OpenAI messages in column 'messages'; trains on assistant turns" in flat
    assert "1 sample: spells <|eot_id|> in its text, read as that token" in flat
    told = "chats.jsonl:4: no turn is trained: train_on and the messages' weight leave out all"
    assert told.replace(" ", "") in "".join(output.split()), "wherever the folder's name is broken"
    assert "1 sample over the length of group 'long' of 8,192 tokens; planner.overlong is error." in flat
    assert "+ In the sea.<|eot_id|>" in output.splitlines()
    assert "  Where?<|eot_id|>" in output.splitlines()
    assert all(len(line) <= 80 for line in output.splitlines())


def test_a_long_row_shows_where_it_begins_and_ends(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "row.html"
    output = shown([*arguments, "--row", "1", "--page", str(page)], capsys)
    assert "chats.jsonl:2:2turns" in "".join(output.split()), "wherever the folder's name is broken"
    assert " tokens ...]" in output
    assert "+ It ends.<|eot_id|>" in output.splitlines()
    text = page.read_text()
    assert '<span class="target">It ends.<b>&lt;|eot_id|&gt;</b></span>' in text
    assert "<script" not in text


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("3", "--row 3 is not a training sample: no turn is trained"),
        ("4", "--row 4: chats has 4 rows, counted from 0"),
        ("x", "--row x must be a row's number, or LABEL:number; labels are chats"),
        ("²", "--row ² must be a row's number, or LABEL:number"),
        ("other:1", "--row other:1 must be a row's number, or LABEL:number"),
    ],
)
def test_rows_that_cannot_be_shown(arguments: list[str], row: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--row", row]) == 1
    assert f"error: {reason}" in capsys.readouterr().err


def test_held_out_data(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "val.jsonl").write_text(json.dumps(chat("Held?", "Out.")) + "\n")
    output = shown([*arguments, "--validation", f"dataset_val.data_files={tmp_path / 'val.jsonl'}"], capsys)
    assert "+ Out.<|eot_id|>" in output.splitlines()
    assert main([*arguments, "--validation", "dataset_val=null", "run_val_every_n_steps=null"]) == 1
    assert "config key 'dataset_val' is missing" in capsys.readouterr().err
