"""What people's files mean: each format by hand, what is refused, and which of a conversation is trained."""

import csv
import gzip
import json

import datasets
import numpy as np
import pytest
from torchtune.data import Message

from hbp_tune.data.chats.dataset import ChatDataset
from hbp_tune.data.store.estimate import CharacterEstimate
from hbp_tune.data.tokenizing.conversation import EncodedChat
from hbp_tune.data.tokenizing.hf_tokenizer import HFTokenizer
from hbp_tune.errors import ConfigError, DataError
from tests.data.chat_models import write_model


class Recorder:
    """A tokenizer that keeps the conversations it is given."""

    vocab_size = 100

    def __init__(self):
        self.conversations = []

    def encode_conversation(self, conversation, *, reasoning, rewritten_turns):
        self.conversations.append(conversation)
        self.arguments = (reasoning, rewritten_turns)
        is_target = np.array([False, *conversation.is_trained])
        return [
            EncodedChat(tokens=np.arange(len(is_target), dtype=np.int32), is_target=is_target, turn_starts=[0], roles=["user"])
        ]

    def encode(self, text, add_bos, add_eos):
        assert add_bos
        assert add_eos
        return [1, *range(10, 10 + len(text)), 2]


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path, *rows, **arguments):
    """Give the conversations of rows, and the data set."""
    tokenizer = Recorder()
    dataset = ChatDataset(tokenizer, data_files=lines(path, *rows), **arguments)
    for index in range(len(dataset)):
        dataset[index]
    return tokenizer.conversations, dataset


def fault(path, row, good=None, **arguments):
    """Give what is wrong with a row, which a good one stands before."""
    good = good or {"messages": [user("a"), assistant("b")]}
    dataset = ChatDataset(Recorder(), data_files=lines(path, good, row), **arguments)
    with pytest.raises(DataError) as caught:
        dataset[1]
    return str(caught.value)


def user(content, **fields):
    return {"role": "user", "content": content, **fields}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"default": None}}}}}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "rows.jsonl"


def test_openai_messages(file):
    row = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            user([{"type": "text", "text": "1 + "}, {"type": "text", "text": "2?"}]),
            assistant(None, tool_calls=[CALL | {"function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}], thinking="Add."),
            {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"},
            assistant("3", weight=1, id="m7"),
        ],
        "tools": [TOOL],
        "source": "here",
    }
    (conversation,), dataset = read(file, row)
    assert conversation.messages == [
        {"role": "system", "content": "Be brief."},
        user("1 + 2?"),
        assistant("", reasoning_content="Add.", tool_calls=[CALL]),
        {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"},
        assistant("3"),
    ]
    assert conversation.is_trained == [False, False, True, False, True]
    assert conversation.tools == [TOOL]  # with its null, as the file has it
    assert dataset.description == "OpenAI messages in column 'messages' with 'tools'; trains on assistant turns"


def test_older_function_calls(file):
    row = {
        "messages": [
            user("1 + 2?"),
            assistant(None, function_call={"name": "add", "arguments": '{"a": 1, "b": 2}'}),
            {"role": "function", "content": "3", "name": "add"},
            assistant("3"),
        ],
        "functions": json.dumps([TOOL["function"]]),
    }
    (conversation,), _ = read(file, row)
    assert conversation.messages[1]["tool_calls"] == [{"type": "function", "function": CALL["function"]}]
    assert conversation.messages[2]["role"] == "tool"
    assert conversation.tools == [TOOL]


def test_sharegpt(file):
    row = {
        "conversations": [
            {"from": "human", "value": "1 + 2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": 2}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "3", "weight": 0},
            {"from": "human", "value": "Thanks."},
            {"from": "gpt", "value": "No."},
        ],
        "system": "Be brief.",
        "tools": json.dumps([TOOL]),
    }
    (conversation,), dataset = read(file, row)
    assert conversation.messages == [
        {"role": "system", "content": "Be brief."},
        user("1 + 2?"),
        assistant("", tool_calls=[{"type": "function", "function": CALL["function"]}]),
        {"role": "tool", "content": "3"},
        assistant("3"),
        user("Thanks."),
        assistant("No."),
    ]
    assert conversation.is_trained == [False, False, True, False, False, False, True]
    assert dataset.description.startswith("ShareGPT conversations in column 'conversations' with 'tools', 'system'")


def test_alpaca(file):
    rows = [
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"instruction": "Go on.", "input": "", "output": "4", "system": "Be brief.", "history": [["a", "b"]]},
    ]
    (first, second), dataset = read(file, *rows)
    assert first.messages == [user("Add.\n1, 2"), assistant("3")]
    assert second.messages == [
        {"role": "system", "content": "Be brief."},
        user("a"),
        assistant("b"),
        user("Go on."),
        assistant("4"),
    ]
    assert second.is_trained == [False, False, True, False, True]
    assert dataset.description.startswith("Alpaca instructions in column 'instruction'")


@pytest.mark.parametrize(
    "columns", [("prompt", "completion"), ("question", "answer"), ("query", "response"), ("input", "output")]
)
def test_prompts_and_completions(file, columns):
    (conversation,), _ = read(file, dict(zip(columns, ("1 + 2?", "3"), strict=True)))
    assert conversation.messages == [user("1 + 2?"), assistant("3")]


def test_prompts_and_completions_of_messages(file):
    row = {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]}
    (conversation,), _ = read(file, row)
    assert [message["content"] for message in conversation.messages] == ["a", "b", "c", "d"]
    assert conversation.is_trained == [False, False, False, True]


def test_plain_text(file):
    dataset = ChatDataset(Recorder(), data_files=lines(file, {"text": "abc"}, {"text": ""}))
    assert dataset[0]["tokens"].tolist() == dataset[0]["labels"].tolist() == [1, 10, 11, 12, 2]
    assert dataset.description == "plain text in column 'text'"
    with pytest.raises(DataError, match="text is empty"):
        dataset[1]


def test_token_ids(file):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [5, 6], "attention_mask": [1, 1]}]
    dataset = ChatDataset(Recorder(), data_files=lines(file, *rows))
    assert [(dataset[i]["tokens"].tolist(), dataset[i]["labels"].tolist()) for i in range(2)] == [
        ([5, 6, 7], [-100, 6, 7]),
        ([5, 6], [5, 6]),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input_ids": [5, 100]}, "input_ids holds 100, the tokenizer has ids of 0 to 99"),
        ({"input_ids": [5, -1]}, "input_ids holds -1, the tokenizer has ids of 0 to 99"),
        ({"input_ids": [5, 6], "labels": [6, -100]}, "labels must equal input_ids or be -100, not shifted; these are others"),
        ({"input_ids": [5, 6], "labels": [6]}, "labels are not a list of as many as input_ids: 2"),
        ({"input_ids": [5, 6], "attention_mask": [1, 0]}, "attention_mask is 0 somewhere: padding is not supported; remove it"),
        ({"input_ids": []}, "input_ids is not a list of token ids"),
        ({"input_ids": [5, 6], "attention_mask": 1}, "attention_mask is 0 somewhere: padding is not supported; remove it"),
    ],
)
def test_token_ids_that_do_not_fit(file, row, reason):
    assert fault(file, row, good={"input_ids": [1], "labels": [1]}) == reason


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (
            [user("a"), assistant("b", weight=0.5)],
            "message 1 has weight=0.5; 0 leaves it out of the loss, 1 is usual, others are not",
        ),
        ([user("a"), assistant("b", weight=0)], "no turn is trained: train_on and the messages' weight leave out all"),
        ([user("a")], "no assistant turn"),
        ([{"role": "system", "content": "a"}], "only system messages"),
        ([], "no messages"),
        (None, "messages are not a list but null"),
        (["a"], "messages are not objects with a role and content"),
        ([user("a"), assistant(None)], "null content"),
        (
            [user("a"), {"role": "narrator", "content": "b"}],
            "role 'narrator' is unknown; say by roles={narrator: ...} whether it is one of system, user",
        ),
        (
            [user([{"type": "image_url"}]), assistant("b")],
            "message 0 holds a part of type 'image_url', which text models do not take",
        ),
        ([user("a", images=["x"]), assistant("b")], "message 0 has images, which is not supported"),
        ([user("a", tool_calls=[CALL]), assistant("b")], "message 0 has tool_calls, which only an assistant's may have"),
        ([user("a"), assistant("b", reasoning="c", thinking="d")], "message 1 has several fields of reasoning that differ"),
        (
            [user("a"), assistant("", tool_calls=[{"function": {"name": "f", "arguments": "{"}}])],
            "message 1: a call's arguments is no",
        ),
        ([user("a"), assistant("", tool_calls=[{"function": {}}])], "message 1: a call has no name"),
        ([{"role": ["user"], "content": "a"}, assistant("b")], "role ['user'] is unknown"),
        ([user([{"type": ["text"], "text": "a"}]), assistant("b")], "message 0 holds a part of type ['text'], which text"),
        (
            [user("a"), {"role": "function_call", "content": '{"name": "f", "arguments": {}}', "tool_calls": [CALL]}],
            "message 1 is a call and has tool_calls besides",
        ),
    ],
)
def test_rows_that_would_lose_something_are_refused(file, messages, reason):
    assert reason in fault(file, {"messages": messages})


def test_images_beside_the_conversation_are_refused(file):
    row = {"messages": [user("a"), assistant("b")], "images": ["x.png"]}
    assert fault(file, row) == "the row has images, which text models do not take; leave the column out if none is meant"


@pytest.mark.parametrize("tools", [[{"name": 3}], [{"function": "add"}], [{"function": {"name": ["add"]}}], [3], ["3"]])
def test_tools_that_are_no_functions_are_refused(file, tools):
    row = {"messages": [user("a"), assistant("b")], "tools": tools}
    assert fault(file, row) == "tools holds something else than functions with a name"


def test_an_empty_text_is_no_tool(file):
    (conversation,), _ = read(file, {"messages": [user("a"), assistant("b")], "tools": "  "})
    assert conversation.tools is None


def test_a_history_that_is_none_is_refused(file):
    good = {"instruction": "a", "input": "", "output": "b"}
    assert fault(file, good | {"history": 5}, good=good) == "history is not a list of pairs of question and answer"


def test_alpaca_s_input_is_called_context_too(file):
    row = {"instruction": "Which river?", "context": "Tokyo", "response": "Sumida", "category": "qa"}
    (conversation,), _ = read(file, row)
    assert conversation.messages == [user("Which river?\nTokyo"), assistant("Sumida")]


def test_a_context_beside_the_messages_is_counted(file):
    _, dataset = read(file, {"messages": [user("a"), assistant("b")], "context": "Tokyo"})
    assert dict(dataset[0]["notes"]) == {"column 'context' is not used": 1}


def test_fields_that_are_not_used_are_counted(file):
    row = {"messages": [user("a", mood="glad"), assistant("b", mood=None)], "chat_template_kwargs": {"x": 1}}
    _, dataset = read(file, row)
    assert dict(dataset[0]["notes"]) == {"column 'chat_template_kwargs' is not used": 1, "message field 'mood' is not used": 1}


@pytest.mark.parametrize("column", ["loss_mask", "assistant_masks"])
def test_token_ids_with_a_mask(file, column):
    rows = [{"input_ids": [5, 6, 7], column: [0, 1, 1]}, {"input_ids": [5, 6, 7], "labels": [5, 6, -100], column: [0, 1, 1]}]
    dataset = ChatDataset(Recorder(), data_files=lines(file, *rows))
    assert [dataset[i]["labels"].tolist() for i in range(2)] == [[-100, 6, 7], [-100, 6, -100]]
    wrong = fault(file, {"input_ids": [5, 6], column: [1]}, good=rows[0])
    assert wrong == f"{column} is not a list of as many as input_ids, each 0 or 1"


GOOD, BAD = [assistant("good")], [assistant("bad")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "rejected": "bad", "chosen": "good"},
        {"prompt": [user("a")], "rejected": BAD, "chosen": GOOD},
        {"rejected": [user("a"), *BAD], "chosen": [user("a"), *GOOD]},
    ],
)
def test_no_answer_of_a_preference_is_trained_unless_it_is_named(file, row):
    with pytest.raises(ConfigError, match=r"the rows do not fit any format: they have the columns .*rejected, chosen; say what"):
        ChatDataset(Recorder(), data_files=lines(file, row))
    columns = {"prompt": "prompt", "completion": "chosen"} if "prompt" in row else {"messages": "chosen"}
    (conversation,), dataset = read(file, row, columns=columns)
    assert conversation.messages == [user("a"), *GOOD]
    assert dict(dataset[0]["notes"]) == {"column 'rejected' is not used": 1}


def test_an_answer_s_label_is_counted(file):
    _, dataset = read(file, {"prompt": "a", "completion": "b", "label": False})
    assert dict(dataset[0]["notes"]) == {"column 'label' is not used": 1}


def test_columns_beside_a_plain_text(file):
    dataset = ChatDataset(Recorder(), data_files=lines(file, {"text": "abc", "tools": [TOOL], "id": 3}))
    assert dataset.description == "plain text in column 'text'"
    assert dict(dataset[0]["notes"]) == {"column 'tools' is not used": 1}
    assert fault(file, {"text": "abc", "images": ["x.png"]}, good={"text": "abc"}).startswith("the row has images, which text")


def test_a_conversation_is_preferred_to_other_formats(file):
    row = {"prompt": "x", "completion": "y", "messages": [user("a"), assistant("b")], "text": "z"}
    (conversation,), dataset = read(file, row)
    assert conversation.messages == row["messages"]
    assert dataset.description == (
        "OpenAI messages in column 'messages', not format=prompt_completion or text, which would fit, too; "
        "trains on assistant turns"
    )
    (conversation,), dataset = read(file, row, columns={"prompt": "prompt", "completion": "completion"})
    assert conversation.messages == [user("x"), assistant("y")]


@pytest.mark.parametrize(
    ("own", "notes"), [("s", {}), ("t", {"column 'system' is not used: the messages have a system turn": 1})]
)
def test_a_system_turn_of_the_messages_stands_before_the_row_s(file, own, notes):
    messages = [user("a"), {"role": "system", "content": own}, assistant("b")]
    (conversation,), dataset = read(file, {"messages": messages, "system": "s"})
    assert conversation.messages == messages
    assert dataset[0]["notes"] == notes
    assert fault(file, {"messages": messages, "system": {"x": 1}}) == "system is not text but dict"


@pytest.mark.parametrize(
    ("train_on", "is_trained"),
    [
        ("assistant", [False, False, True, False, True]),
        ("last_assistant", [False, False, False, False, True]),
        ("all", [True, True, True, True, True]),
        (["user"], [False, True, False, True, False]),
        (["user", "assistant"], [False, True, True, True, True]),
    ],
)
def test_whose_turns_are_trained(file, train_on, is_trained):
    messages = [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c"), assistant("d")]
    (conversation,), _ = read(file, {"messages": messages}, train_on=train_on)
    assert conversation.is_trained == is_trained
    messages[-1]["weight"] = 0
    if train_on == "all":
        (conversation,), _ = read(file, {"messages": messages}, train_on=train_on)
        assert conversation.is_trained == [True, True, True, True, False]


def test_other_names_by_a_mapping(file):
    row = {"dialog": [{"speaker": "a", "said": "x"}, {"speaker": "b", "said": "y"}], "can": [TOOL]}
    columns = {"messages": "dialog", "role": "speaker", "content": "said", "tools": "can"}
    (conversation,), _ = read(file, row, columns=columns, roles={"a": "user", "b": "assistant"})
    assert (conversation.messages, conversation.tools) == ([user("x"), assistant("y")], [TOOL])
    (conversation,), _ = read(file, {"ask": "x", "reply": "y"}, columns={"prompt": "ask", "completion": "reply"})
    assert conversation.messages == [user("x"), assistant("y")]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"columns": {"messages": "chat"}}, r"columns={messages: chat}: the rows have no such column; they have a, b"),
        ({"columns": {"message": "a"}}, r"columns={message: a}: there is no field message; the fields are messages, role"),
        ({"train_on_input": True}, "ChatDataset has no argument train_on_input, nor does reading JSON take any"),
        ({}, r"the rows do not fit any format: they have the columns a, b; say what they hold by columns={messages: NAME}"),
        ({"format": "alpaca"}, "the rows do not fit format=alpaca"),
        ({"format": "xml"}, "dataset: format=xml must be one of auto, openai"),
        ({"train_on": "me"}, "dataset: train_on=me must be one of assistant, last_assistant, all, or a list of roles"),
        ({"reasoning": "no"}, "dataset: reasoning=no must be one of train, mask, drop"),
        ({"rewritten_turns": "no"}, "dataset: rewritten_turns=no must be one of mask, split, train"),
        ({"source": "some/name"}, "source=some/name and data_files are two sources; set one of them to null"),
        ({"roles": {"bot": "model"}}, r"dataset: roles={bot: ...}=model must be one of system, user, assistant, "),
        ({"split": "train[x]"}, r"dataset: split=train\[x\] is not a part of 1 rows"),
        ({"split": "test"}, "dataset: split=test: local files of JSON have the split 'train' alone"),
    ],
)
def test_settings_that_cannot_work(file, arguments, reason):
    with pytest.raises(ConfigError, match=reason):
        ChatDataset(Recorder(), data_files=lines(file, {"a": 1, "b": 2}), **arguments)


def test_bad_lines_are_bad_rows(file):
    good = json.dumps({"messages": [user("a"), assistant("b")]}).encode()
    file.write_bytes(b"\n".join([good, b'{"messages": [', b"", b"[1]", b'{"messages": "\xff"}', good, b""]))
    dataset = ChatDataset(Recorder(), data_files=str(file))
    assert len(dataset) == 5
    reasons = []
    for index in (1, 2, 3):
        with pytest.raises(DataError) as caught:
            dataset[index]
        reasons.append(str(caught.value))
    assert [reason.split(":")[0] for reason in reasons] == ["broken JSON", "not a JSON object but a list", "broken UTF-8"]
    assert len(dataset[4]["tokens"]) == 3


def test_bad_lines_before_the_first_good_one(file):
    file.write_text("broken\n" * 200 + json.dumps({"messages": [user("a"), assistant("b")]}) + "\n")
    dataset = ChatDataset(Recorder(), data_files=str(file))
    assert dataset.description.startswith("OpenAI messages")
    assert len(dataset[200]["tokens"]) == 3
    file.write_text("broken\n" * 200)
    with pytest.raises(ConfigError, match="none of the first 200 rows of dataset can be read: broken JSON"):
        ChatDataset(Recorder(), data_files=str(file))


@pytest.mark.parametrize("split", ["train", "train[1:]"])
def test_bad_rows_of_an_array(tmp_path, split):
    good = json.dumps({"messages": [user("a"), assistant("b")]})
    path = tmp_path / "rows.json"
    path.write_text(f'[{good}, [1], {{"messages": [{{"role": "user", "content": "\\ud800"}}]}}, {good}]')
    dataset = ChatDataset(Recorder(), data_files=str(path), split=split)
    reasons = []
    for index in range(len(dataset) - 3, len(dataset) - 1):
        with pytest.raises(DataError) as caught:
            dataset[index]
        reasons.append(str(caught.value))
    assert reasons == ["not a JSON object but a list", "broken Unicode escape"]


ROWS = [{"messages": [user(f"a{i}"), assistant(f"b{i}")]} for i in range(6)]


def contents(dataset, tokenizer):
    for index in range(len(dataset)):
        dataset[index]
    return [conversation.messages[0]["content"] for conversation in tokenizer.conversations]


JSON = {
    "json of an array": lambda rows: json.dumps(rows, indent=1),
    "json of an object": lambda rows: json.dumps({"data": rows}, indent=1),
    "json of an array in one line": json.dumps,
    "json of an object in one line": lambda rows: json.dumps({"data": rows}),
    "json with a byte order mark": lambda rows: "\ufeff" + json.dumps(rows, indent=1),
    "json of lines": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
}


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", *JSON, "parquet", "arrow", "saved"])
def test_kinds_of_files(tmp_path, kind):
    path = tmp_path / f"rows.{kind.split(' ')[0]}"
    if kind == "jsonl":
        lines(path, *ROWS)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    elif kind in JSON:
        path.write_text(JSON[kind](ROWS), encoding="utf-8")
    elif kind == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    else:
        datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
        path = next((tmp_path / "saved").glob("*.arrow")) if kind == "arrow" else tmp_path / "saved"
    tokenizer = Recorder()
    assert contents(ChatDataset(tokenizer, data_files=str(path)), tokenizer) == [f"a{i}" for i in range(6)]
    if kind.startswith("json"):
        tokenizer = Recorder()
        dataset = ChatDataset(tokenizer, data_files=str(path), split="train[1:3]+train[5:]")
        assert contents(dataset, tokenizer) == ["a1", "a2", "a5"]


def test_a_table_of_text(tmp_path):
    with (tmp_path / "rows.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("prompt", "completion"), ("a, b", 'c "d"')])
    tokenizer = Recorder()
    ChatDataset(tokenizer, data_files=str(tmp_path / "rows.csv"))[0]
    assert tokenizer.conversations[0].messages == [user("a, b"), assistant('c "d"')]
    with (tmp_path / "chats.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("messages",), (json.dumps(ROWS[0]["messages"]),)])
    ChatDataset(tokenizer, data_files=str(tmp_path / "chats.csv"))[0]
    assert tokenizer.conversations[1].messages == ROWS[0]["messages"]


def test_folders_patterns_and_several_files(tmp_path):
    (tmp_path / "more").mkdir()
    lines(tmp_path / "0.jsonl", *ROWS[:2])
    lines(tmp_path / "1.jsonl", *ROWS[2:3])
    lines(tmp_path / "more" / "2.jsonl", *ROWS[3:])
    (tmp_path / "more" / "3.jsonl").write_text("")
    (tmp_path / "notes.txt").write_text("not data")
    arrays = [tmp_path / "arrays" / f"{i}.json" for i in range(3)]
    arrays[0].parent.mkdir()
    for path, content in zip(arrays, (json.dumps(ROWS[:2]), "", json.dumps({"rows": ROWS[2:]})), strict=True):
        path.write_text(content)
    of_lines = [f"{tmp_path}/?.jsonl", f"{tmp_path}/more"]
    for data_files in (f"{tmp_path}/**/*.jsonl", of_lines, str(tmp_path / "arrays")):
        tokenizer = Recorder()
        assert contents(ChatDataset(tokenizer, data_files=data_files), tokenizer) == [f"a{i}" for i in range(6)]
    with pytest.raises(ConfigError, match="some data_files are JSON lines and others arrays; make a list of data sets of them"):
        ChatDataset(Recorder(), data_files=str(tmp_path))
    with pytest.raises(ConfigError, match=r"notes.txt must end in .jsonl, .json, .parquet, .arrow, .csv"):
        ChatDataset(Recorder(), data_files=str(tmp_path / "notes.txt"))
    with pytest.raises(ConfigError, match=r"data_files=nothing.jsonl: there is no such file \(looked from "):
        ChatDataset(Recorder(), data_files="nothing.jsonl")
    with pytest.raises(ConfigError, match=r"source=some/name and data_files are two sources; set one of them to null"):
        ChatDataset(Recorder(), data_files="nothing.jsonl", source="some/name")
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "3.parquet")
    with pytest.raises(ConfigError, match=r"of several kinds \(json, parquet\); make a list of data sets"):
        ChatDataset(Recorder(), data_files=str(tmp_path))


def test_what_arrow_fills_in_is_taken_out_again(tmp_path):
    other = {
        "type": "function",
        "function": {"name": "sub", "parameters": {"type": "object", "properties": {"z": {"type": "string"}}}},
    }
    mine = {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}},
    }
    rows = [
        {"messages": [user("a"), assistant(None, tool_calls=[CALL])], "tools": [mine]},
        {"messages": [user("b"), assistant("c", reasoning_content="d")], "tools": [other]},
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    tokenizer = Recorder()
    dataset = ChatDataset(tokenizer, data_files=str(tmp_path / "rows.parquet"))
    assert dataset[0]["notes"] == {}
    dataset[1]
    first, second = tokenizer.conversations
    assert (first.tools, second.tools) == ([mine], [other])
    assert first.messages == [user("a"), assistant("", tool_calls=[CALL])]
    assert second.messages == [user("b"), assistant("c", reasoning_content="d")]


class OfTorchtune:
    """A tokenizer that knows torchtune's messages alone."""

    def tokenize_messages(self, messages: list[Message]):
        self.messages = [(message.role, message.text_content, message.masked) for message in messages]
        return [1, 2, 3], [True, True, False]


def test_tokenizers_of_torchtune_take_text_turns(file):
    rows = [
        {"messages": [user("a"), assistant("b"), {"role": "tool", "content": "c"}, assistant("d")]},
        {"messages": [user("a"), assistant("b", reasoning_content="c")]},
        {"messages": [user("a"), assistant("b")], "tools": [TOOL]},
    ]
    tokenizer = OfTorchtune()
    dataset = ChatDataset(tokenizer, data_files=lines(file, *rows))
    assert dataset[0]["labels"].tolist() == [-100, -100, 3]
    assert tokenizer.messages == [
        ("user", "a", True),
        ("assistant", "b", False),
        ("ipython", "c", True),
        ("assistant", "d", False),
    ]
    for index, what in ((1, "reasoning_content"), (2, "tools")):
        with pytest.raises(DataError, match=rf"OfTorchtune does not know {what}; take hbp_tune.components.HFTokenizer"):
            dataset[index]


def test_an_estimate_counts_all_that_will_be_rendered(file):
    rows = [
        {"messages": [user("a" * 400), assistant("b" * 40)]},
        {"messages": [user("a" * 400), assistant("b" * 40, reasoning_content="c" * 400)], "tools": [TOOL]},
    ]
    dataset = ChatDataset(CharacterEstimate(), data_files=lines(file, *rows))
    plain, full = (len(dataset[i]["tokens"]) for i in range(2))
    assert 100 < plain < 130
    assert full > plain + 100


def test_a_date_that_the_template_states_is_told(file, tmp_path):
    descriptions = {}
    for kind in ("llama3_1", "qwen3"):
        tokenizer = HFTokenizer(str(write_model(tmp_path / kind, kind)), date="2025-05-01")
        descriptions[kind] = ChatDataset(tokenizer, data_files=lines(file, ROWS[0])).description
    assert descriptions["llama3_1"].endswith("; the template states the date, which is 2025-05-01 for every sample")
    assert descriptions["qwen3"].endswith("; trains on assistant turns")


def test_arguments_reach_the_tokenizer(file):
    tokenizer = Recorder()
    ChatDataset(tokenizer, data_files=lines(file, ROWS[0]), reasoning="mask", rewritten_turns="split")[0]
    assert tokenizer.arguments == ("mask", "split")
