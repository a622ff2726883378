from pathlib import Path

import numpy as np
import pytest
from torchtune.data import Message
from torchtune.datasets import chat_dataset, instruct_dataset, text_completion_dataset

from hbp_tune.data.store.estimate import BYTES_PER_TOKEN, CharacterEstimate, estimate_lengths
from hbp_tune.data.store.rows import BadRow
from hbp_tune.errors import DataError
from tests.data.sources import CHAT, chat, written
from tests.helpers import RandomTokens

TEN_TOKENS = "x" * round(10 * BYTES_PER_TOKEN)


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
    counts = estimate_lengths(
        [
            chat_dataset(tokenizer, data_files=chats, **CHAT),
            instruct_dataset(tokenizer, source="json", data_files=tasks, split="train"),
            text_completion_dataset(tokenizer, source="json", data_files=texts, split="train"),
        ]
    )
    assert counts.lengths.tolist() == [2 + 15 + 15, 2 + 15 + 25 + 6 + 15, 2 + 15 + 35, 2 + 40]
    assert counts.num_targets.tolist() == [15, 25 + 15, 35, 41]
    assert counts.sources.tolist() == [0, 0, 1, 2]
    assert counts.rows.tolist() == [0, 1, 0, 0]
    assert counts.bad_rows == ()
    dtypes = [array.dtype for array in (counts.lengths, counts.num_targets, counts.sources, counts.rows)]
    assert dtypes == [np.int32, np.int32, np.int16, np.int32]


def test_a_data_set_that_needs_no_tokenizer_is_counted() -> None:
    counts = estimate_lengths([RandomTokens([6, 2], 50, seed=0)])
    assert counts.lengths.tolist() == [6, 2]
    assert counts.num_targets.tolist() == [4, 1], "a third is masked, and the first token is never predicted"


def test_bad_rows_and_no_rows(tmp_path: Path) -> None:
    file = written(tmp_path / "chat.jsonl", chat("Hi.", "Hello."), {"messages": [{"role": "assistant", "content": "Alone."}]})
    bad = chat_dataset(CharacterEstimate(), data_files=file, **CHAT)
    counts = estimate_lengths([RandomTokens([3], 50, seed=0), bad])
    assert counts.bad_rows == (
        BadRow(source=1, row=1, reason="ValueError: Messages must be at least length 2, but got 1 messages"),
    )
    assert (counts.sources.tolist(), counts.rows.tolist()) == ([0, 1], [0, 0])
    with pytest.raises(DataError, match=r"row 0 of dataset\[0\] is not a training sample: no target: .*Check the row"):
        estimate_lengths([RandomTokens([1, 1], 50, seed=0)])
    with pytest.raises(DataError, match=r"the data set is empty: it has no row"):
        estimate_lengths([RandomTokens([], 50, seed=0)])
