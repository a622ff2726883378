from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchtune.datasets import chat_dataset

from hbp_tune.data.store.estimate import CharacterEstimate
from hbp_tune.data.store.rows import NO_TARGET, BadRow, RowReader, Sample, conversation_fault
from hbp_tune.errors import DataError
from tests.data.sources import CHAT, Rows, chat, written

OPENAI = ("role", "content", ("system", "user", "ipython", "tool", "assistant"))
USER, ASSISTANT, SYSTEM = ({"role": role, "content": "x"} for role in ("user", "assistant", "system"))


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([USER, ASSISTANT], None),
        ([SYSTEM, USER, ASSISTANT], None),
        (None, "messages are not a list but null"),
        ("hello", "messages are not a list but str"),
        ([], "no messages"),
        (["hello"], "messages are not objects with a role and content"),
        ([USER, {"role": "gpt", "content": "x"}], "role 'gpt' is none of system, user, ipython, tool, assistant"),
        ([USER, {"content": "x"}], "role None is none of system, user, ipython, tool, assistant"),
        ([USER, {"role": "assistant", "content": None}], "null content"),
        ([USER, {"role": "assistant"}], "null content"),
        ([SYSTEM], "only system messages"),
        ([SYSTEM, USER], "no assistant turn"),
    ],
)
def test_faults_of_conversations(messages: Any, fault: str | None) -> None:
    assert conversation_fault(messages, *OPENAI) == fault


def test_null_content_is_not_the_message_before(tmp_path: Path) -> None:
    # torchtune would train on "Hi." as the answer.
    row = {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": None}]}
    source = chat_dataset(CharacterEstimate(), data_files=written(tmp_path / "a.jsonl", chat("Hi.", "Yo."), row), **CHAT)
    assert len(source[1]["tokens"]) > 0, "torchtune has mended this: the check can go"
    rows = RowReader([source])
    (sample,) = rows[0]
    assert isinstance(sample, Sample)
    assert rows[1] == BadRow(source=0, row=1, reason="null content")


@pytest.mark.parametrize(
    ("beside", "field"),
    [
        ({"weight": 0}, "weight"),
        ({"reasoning_content": "Well."}, "reasoning_content"),
        ({"thinking": "Well."}, "thinking"),
        ({"tool_calls": [{"function": {"name": "f"}}]}, "tool_calls"),
    ],
)
def test_fields_that_torchtune_would_lose_are_named(tmp_path: Path, beside: dict[str, Any], field: str) -> None:
    row = {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yo.", **beside}]}
    file = written(tmp_path / "a.jsonl", chat("Hi.", "Yo."), row)
    rows = RowReader([chat_dataset(CharacterEstimate(), data_files=file, **CHAT)])
    assert isinstance(rows[0], list)
    told = f"{field} would be lost: torchtune's chat_dataset does not use it, hbp_tune.components.ChatDataset does"
    assert rows[1] == BadRow(source=0, row=1, reason=told)


def test_tools_that_torchtune_would_lose_are_named(tmp_path: Path) -> None:
    row = chat("Hi.", "Yo.") | {"tools": [{"type": "function", "function": {"name": "f"}}]}
    rows = RowReader([chat_dataset(CharacterEstimate(), data_files=written(tmp_path / "a.jsonl", row), **CHAT)])
    bad = rows[0]
    assert isinstance(bad, BadRow)
    assert bad.reason.startswith("tools would be lost")


def test_a_row_may_give_several_samples() -> None:
    class Splitting(Rows):
        def __getitem__(self, index: int) -> Any:
            return [
                {"tokens": [1, 2], "labels": [-100, 2], "notes": {"split": 1}},
                {"tokens": [3, 4, 5], "labels": [-100, -100, 5]},
            ]

    rows = RowReader([Splitting(None)])
    assert [(sample.tokens.tolist(), dict(sample.notes)) for sample in rows[0]] == [([1, 2], {"split": 1}), ([3, 4, 5], {})]


def test_share_gpt(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Yo."}]
    file = written(tmp_path / "a.jsonl", {"conversations": turns}, {"conversations": turns[:1]}, {"conversations": []})
    settings = CHAT | {"conversation_style": "sharegpt", "conversation_column": "conversations"}
    rows = RowReader([chat_dataset(CharacterEstimate(), data_files=file, **settings)])
    (sample,) = rows[0]
    assert isinstance(sample, Sample)
    assert [rows[1], rows[2]] == [
        BadRow(source=0, row=1, reason="no gpt turn"),
        BadRow(source=0, row=2, reason="no messages"),
    ]


def test_samples_are_the_component_s(tmp_path: Path) -> None:
    source = chat_dataset(
        CharacterEstimate(), data_files=written(tmp_path / "a.jsonl", chat("Hi.", "Yo.", "Go on.", "So.")), **CHAT
    )
    (sample,) = RowReader([source])[0]
    assert isinstance(sample, Sample)
    want = source[0]
    assert sample.tokens.tolist() == list(want["tokens"])
    assert sample.is_target.tolist() == [label != -100 for label in want["labels"]]


def test_rows_run_through_all_data_sets() -> None:
    rows = RowReader([Rows(([5, 6], [-100, 6])), Rows(), Rows(([7, 8], [7, 8]), ([9], [9]))])
    assert len(rows) == 3
    (sample,) = rows[1]
    assert isinstance(sample, Sample)
    assert (sample.source, sample.row, sample.num_targets) == (2, 0, 1)
    assert (sample.tokens.dtype, sample.is_target.dtype) == (np.int32, np.bool_)
    assert rows[2] == BadRow(source=2, row=1, reason=NO_TARGET), "nothing comes before the first token"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (KeyError("messages"), "KeyError: 'messages'"),
        (ValueError("two\n lines"), "ValueError: two lines"),
        (([1, 2], [1, 3]), "labels must equal tokens or be -100; this component gives others"),
        (([1, 2], [1]), "labels must equal tokens or be -100; this component gives others"),
        (([1, 2, 3], [1, -100, -100]), NO_TARGET),
    ],
)
def test_whatever_a_component_raises_is_a_reason(row: Any, reason: str) -> None:
    assert RowReader([Rows(row)])[0] == BadRow(source=0, row=0, reason=reason)


def test_no_row_at_all() -> None:
    with pytest.raises(DataError, match=r"the data set is empty: it has no row"):
        RowReader([Rows(), Rows()])
