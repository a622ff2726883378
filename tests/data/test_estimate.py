import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchtune.data import Message
from torchtune.datasets import chat_dataset, instruct_dataset, text_completion_dataset

from hbp_tune.components.data.estimate import BYTES_PER_TOKEN, CharacterEstimate, estimate_lengths
from hbp_tune.components.planning.errors import DataError
from tests.helpers import RandomTokens

CHAT = {"source": "json", "split": "train", "conversation_column": "messages", "conversation_style": "openai"}
TEN_TOKENS = "x" * round(10 * BYTES_PER_TOKEN)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def written(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(*turns: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]}


def test_tokens_and_mask_by_hand() -> None:
    messages = [Message(role="user", content=f" {TEN_TOKENS}\n", masked=True), Message(role="assistant", content="Yes.")]
    sample = CharacterEstimate()({"messages": messages, "row": 7})
    assert sample.keys() == {"tokens", "mask", "row"}
    # Begin; 5 of format and 10 of text; 5 of format and 1 of text; end.
    assert len(sample["tokens"]) == 23
    assert sample["mask"].tolist() == [True] * 16 + [False] * 6 + [True]
    assert len(CharacterEstimate()({"messages": messages}, inference=True)["tokens"]) == 22


def test_other_scripts_have_more_bytes_and_images_one_token() -> None:
    text, mask = CharacterEstimate().tokenize_messages([Message(role="user", content="語" * 10)])
    assert len(text) == len(mask) == 7 + round(30 / BYTES_PER_TOKEN)
    content = [{"type": "text", "content": TEN_TOKENS}, {"type": "image", "content": None}]
    assert len(CharacterEstimate().tokenize_messages([Message(role="user", content=content)])[0]) == 7 + 10 + 1


def test_samples_are_cut_as_the_tokenizer_would_cut_them() -> None:
    messages = [Message(role="user", content=TEN_TOKENS, masked=True), Message(role="assistant", content=TEN_TOKENS * 9)]
    tokens, mask = CharacterEstimate(max_seq_len=50).tokenize_messages(messages)
    assert len(tokens) == 50
    assert mask.tolist() == [True] * 16 + [False] * 33 + [True]


def test_data_sets_of_torchtune(tmp_path: Path) -> None:
    tokenizer = CharacterEstimate()
    chats = written(tmp_path / "chat.jsonl", chat(TEN_TOKENS, TEN_TOKENS), chat(TEN_TOKENS, TEN_TOKENS * 2, "Go on.", TEN_TOKENS))
    tasks = written(tmp_path / "tasks.jsonl", {"input": TEN_TOKENS, "output": TEN_TOKENS * 3})
    texts = written(tmp_path / "texts.jsonl", {"text": TEN_TOKENS * 4})
    lengths, num_targets, classes = estimate_lengths(
        [
            chat_dataset(tokenizer, data_files=chats, **CHAT),
            instruct_dataset(tokenizer, source="json", data_files=tasks, split="train"),
            text_completion_dataset(tokenizer, source="json", data_files=texts, split="train"),
        ]
    )
    assert lengths.tolist() == [2 + 15 + 15, 2 + 15 + 25 + 6 + 15, 2 + 15 + 35, 2 + 40]
    assert num_targets.tolist() == [15, 25 + 15, 35, 41]
    assert classes.tolist() == [0, 0, 1, 2]
    assert (lengths.dtype, num_targets.dtype, classes.dtype) == (np.int32, np.int32, np.int16)


def test_a_data_set_that_needs_no_tokenizer_is_counted() -> None:
    lengths, num_targets, _ = estimate_lengths([RandomTokens([6, 1], 50, seed=0)])
    assert lengths.tolist() == [6, 1]
    assert num_targets.tolist() == [4, 0], "a third is masked, and the first token is never predicted"


def test_bad_rows_and_no_rows(tmp_path: Path) -> None:
    file = written(tmp_path / "chat.jsonl", chat("Hi.", "Hello."), {"messages": [{"role": "assistant", "content": "Alone."}]})
    bad = chat_dataset(CharacterEstimate(), data_files=file, **CHAT)
    with pytest.raises(DataError, match=r"row 1 of data set 1 is no conversation .*ValueError: .*Check the row"):
        estimate_lengths([RandomTokens([3], 50, seed=0), bad])
    with pytest.raises(DataError, match=r"the data set is empty: it has no row"):
        estimate_lengths([RandomTokens([], 50, seed=0)])
