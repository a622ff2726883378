"""Tokens as transformers gives them, and targets beside a plain second way to find them."""

import itertools
import json
import random
from datetime import date

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from torchtune.data import Message
from transformers import AutoTokenizer

from hbp_tune.data.tokenizing.byte_pairs import BytePairs
from hbp_tune.data.tokenizing.conversation import Conversation
from hbp_tune.data.tokenizing.hf_tokenizer import HFTokenizer
from hbp_tune.data.tokenizing.token_places import TokenPlaces, among_offsets
from hbp_tune.errors import ConfigError, DataError
from tests.data.chat_models import CALL, KINDS, TOOL, assistant, encoded, reference, system, targets, user, write_model

HAS_SYSTEM = tuple(kind for kind in KINDS if kind not in ("mistral", "gemma"))
HAS_TOOLS = ("qwen2_5", "qwen3", "llama3_1")
PLAIN = {
    "one turn": [user("Where does the river end?"), assistant("In the sea.")],
    "turns": [user("Where?"), assistant("In the sea."), user("Else?"), assistant("Nowhere."), user("So?"), assistant("So.")],
    "unicode": [user("Überall, 東京 – ☃?"), assistant("👩‍👩‍👧 naïvement… ４２")],
    "spaces": [user("  Where\n\n"), assistant("\n In the sea. \n")],
    "code": [user("Loop."), assistant("    for i in range(10):\n\tprint(i)\n\n")],
    "ends with a question": [user("Where?"), assistant("In the sea."), user("Else?")],
}
WITH_SYSTEM = {
    "system": [system("You are brief."), user("1 + 1?"), assistant("2")],
    "empty system": [system(""), user("1 + 1?"), assistant("2")],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat_models")
    return {kind: write_model(root / kind, kind) for kind in KINDS}


def tokenizer(folders, kind, **arguments):
    return HFTokenizer(str(folders[kind]), **arguments)


def targets_by_prompts(folder, tokenizer, messages, tools, end):
    """Mark what stands behind each prompt, as tokens, up to the token that ends the turn: the plain way."""
    whole = reference(folder, messages, tools)
    is_target = [False] * len(whole)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = reference(folder, messages[:index], tools, add_generation_prompt=True)
        assert whole[: len(prompt)] == prompt
        stop = whole.index(tokenizer.special_tokens[end], len(prompt)) + 1
        is_target[len(prompt) : stop] = [True] * (stop - len(prompt))
    return is_target


@pytest.mark.parametrize(
    ("kind", "name"),
    [*itertools.product(KINDS, PLAIN), *itertools.product(HAS_SYSTEM, WITH_SYSTEM)],  # the others' refusals are tested below
)
def test_the_tokens_are_those_of_transformers(folders, kind, name):
    messages = (PLAIN | WITH_SYSTEM)[name]
    assert encoded(tokenizer(folders, kind), messages)[0].tokens.tolist() == reference(folders[kind], messages)


@pytest.mark.parametrize("kind", HAS_TOOLS)
def test_tools_and_calls_are_those_of_transformers(folders, kind):
    messages = [
        user("Which river?"),
        assistant(None, tool_calls=[CALL]),
        {"role": "tool", "content": '{"river": "Sumida"}'},
        assistant("The Sumida."),
    ]
    chat = encoded(tokenizer(folders, kind), messages, [TOOL])[0]
    assert chat.tokens.tolist() == reference(folders[kind], messages, [TOOL])
    call, answer = targets(tokenizer(folders, kind), chat)
    assert '"name_river"' in call
    assert "The Sumida." in answer
    assert 'river": "Sumida' not in call + answer
    assert list(chat.roles) == ["user", "assistant", "tool", "assistant"]


ENDS = {"chatml": "<|im_end|>", "chatml_marked": "<|im_end|>", "qwen2_5": "<|im_end|>", "llama3_1": "<|eot_id|>"}
ENDS |= {"mistral": "</s>", "gemma": "<end_of_turn>"}


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize("name", [name for name in PLAIN if name != "spaces"])
def test_targets_are_what_stands_behind_the_prompts(folders, kind, name):
    chosen = tokenizer(folders, kind)
    chat = encoded(chosen, PLAIN[name])[0]
    assert chat.is_target.tolist() == targets_by_prompts(folders[kind], chosen, PLAIN[name], None, ENDS[kind])


def test_a_token_that_joins_prompt_and_answer_is_not_a_target(folders):
    chosen = tokenizer(folders, "chatml")
    (chat,) = encoded(chosen, PLAIN["spaces"])  # the prompt ends in a newline, the answer begins with one: one token
    assert targets(chosen, chat) == [" In the sea. \n<|im_end|>"]
    assert "assistant\n\n In" in chosen.decode(chat.tokens.tolist())


def test_what_the_template_supplies_is_never_a_target(folders):
    for kind, end in ENDS.items():
        chosen = tokenizer(folders, kind)
        space = " " if kind == "mistral" else ""  # its template puts one before an answer, which the model generates
        expected = [f"{space}In the sea.{end}", f"{space}Nowhere.{end}", f"{space}So.{end}"]
        assert targets(chosen, encoded(chosen, PLAIN["turns"])[0]) == expected


def test_an_empty_place_for_reasoning_is_not_a_target(folders):
    chosen = tokenizer(folders, "qwen3")
    chat = encoded(chosen, PLAIN["one turn"])[0]
    assert "<think>\n\n</think>\n\n" in chosen.decode(chat.tokens.tolist())
    assert targets(chosen, chat) == ["In the sea.<|im_end|>"]
    # Just what a model that is told not to think goes on from.
    prompt = reference(folders["qwen3"], PLAIN["one turn"][:1], add_generation_prompt=True, enable_thinking=False)
    assert chat.tokens.tolist()[: len(prompt)] == prompt
    assert chat.is_target.tolist()[: len(prompt)] == [False] * len(prompt)
    assert chat.is_target[len(prompt)]


THOUGHTS = [
    user("1?"),
    assistant("2", reasoning_content="Let me see."),
    user("And?"),
    assistant("3", reasoning_content="Easy now."),
]


def test_reasoning_is_rendered_and_trained_and_its_tokens_are_single_ids(folders):
    chosen = tokenizer(folders, "qwen3")
    (chat,) = encoded(chosen, THOUGHTS[2:])
    assert chat.tokens.tolist() == reference(folders["qwen3"], THOUGHTS[2:])
    assert targets(chosen, chat) == ["<think>\nEasy now.\n</think>\n\n3<|im_end|>"]
    ids = [chosen.encode(token, add_bos=False, add_eos=False) for token in ("<think>", "</think>")]
    assert [len(one) for one in ids] == [1, 1]
    assert [chat.tokens.tolist().count(one[0]) for one in ids] == [1, 1]


def test_reasoning_can_be_masked_or_dropped(folders):
    chosen = tokenizer(folders, "qwen3")
    (masked,) = encoded(chosen, THOUGHTS[2:], reasoning="mask")
    assert masked.tokens.tolist() == reference(folders["qwen3"], THOUGHTS[2:])
    assert targets(chosen, masked) == ["3<|im_end|>"]
    (dropped,) = encoded(chosen, THOUGHTS[2:], reasoning="drop")
    assert dropped.tokens.tolist() == reference(folders["qwen3"], [THOUGHTS[2], assistant("3")])
    assert targets(chosen, dropped) == ["3<|im_end|>"]
    assert dict(dropped.notes) == {"turns whose reasoning is left out, as reasoning=drop": 1}


def test_reasoning_written_in_the_content_is_trained_as_it_is_rendered(folders):
    chosen = tokenizer(folders, "qwen3")
    messages = [user("And?"), assistant("<think>\nEasy now.\n</think>\n\n3")]
    (chat,) = encoded(chosen, messages)
    assert targets(chosen, chat) == ["<think>\nEasy now.\n</think>\n\n3<|im_end|>"]


def test_turns_that_the_template_rewrites_are_masked_and_counted(folders):
    chosen = tokenizer(folders, "qwen3")
    (chat,) = encoded(chosen, THOUGHTS, rewritten_turns="mask")
    assert chat.tokens.tolist() == reference(folders["qwen3"], THOUGHTS)
    assert "Let me see." not in chosen.decode(chat.tokens.tolist())
    assert targets(chosen, chat) == ["<think>\nEasy now.\n</think>\n\n3<|im_end|>"]
    assert dict(chat.notes) == {
        "turns that the template rewrites once others follow; not trained, rewritten_turns=split trains each": 1
    }


def test_turns_that_the_template_rewrites_become_samples_of_their_own(folders):
    chosen = tokenizer(folders, "qwen3")
    chats = encoded(chosen, THOUGHTS, rewritten_turns="split")
    assert [chat.tokens.tolist() for chat in chats] == [
        reference(folders["qwen3"], THOUGHTS),
        reference(folders["qwen3"], THOUGHTS[:2]),
    ]
    assert [targets(chosen, chat) for chat in chats] == [
        ["<think>\nEasy now.\n</think>\n\n3<|im_end|>"],
        ["<think>\nLet me see.\n</think>\n\n2<|im_end|>"],
    ]
    # Where only such turns are trained, the whole conversation is not a sample.
    only_first = Conversation(messages=THOUGHTS, is_trained=[False, True, False, False])
    (chat,) = chosen.encode_conversation(only_first, rewritten_turns="split")
    assert targets(chosen, chat) == ["<think>\nLet me see.\n</think>\n\n2<|im_end|>"]


def test_turns_that_the_template_rewrites_can_be_trained_as_they_are_rendered(folders):
    chosen = tokenizer(folders, "qwen3")
    (chat,) = encoded(chosen, THOUGHTS, rewritten_turns="train")
    assert targets(chosen, chat) == ["2<|im_end|>", "<think>\nEasy now.\n</think>\n\n3<|im_end|>"]


def test_a_prompt_that_opens_reasoning_supplies_what_it_opens_with(folders, tmp_path):
    source = (folders["qwen3"] / "chat_template.jinja").read_text()
    start = "{{- '<|im_start|>assistant\\n' }}"
    head, tail = source.rsplit(start, 1)
    (tmp_path / "thinking.jinja").write_text(head + "{{- '<|im_start|>assistant\\n<think>\\n' }}" + tail)
    chosen = tokenizer(folders, "qwen3", chat_template=str(tmp_path / "thinking.jinja"))
    (chat,) = encoded(chosen, THOUGHTS[2:])
    assert targets(chosen, chat) == ["Easy now.\n</think>\n\n3<|im_end|>"]
    (chat,) = encoded(chosen, PLAIN["one turn"])
    assert targets(chosen, chat) == ["In the sea.<|im_end|>"]


def test_a_template_without_place_for_reasoning_is_named(folders):
    with pytest.raises(DataError, match=r"does not render reasoning_content; set reasoning=drop to leave it out"):
        encoded(tokenizer(folders, "chatml"), THOUGHTS)
    # DeepSeek-R1's kind: the prompt opens reasoning, which no rendered turn shows.
    chosen = tokenizer(folders, "deepseek")
    (chat,) = encoded(chosen, PLAIN["one turn"])
    assert targets(chosen, chat) == ["In the sea.<｜end▁of▁sentence｜>"]
    assert dict(chat.notes) == {"turns rendered without what their prompt ends with; trained as rendered": 1}


def test_marks_of_the_template_decide(folders, tmp_path):
    source = (folders["chatml_marked"] / "chat_template.jinja").read_text()
    (tmp_path / "no_end.jinja").write_text(
        source.replace("message.content + '<|im_end|>'", "message.content").replace(
            "{{- '\\n' }}\n    {%- else", "{{- '<|im_end|>\\n' }}\n    {%- else"
        )
    )
    chosen = tokenizer(folders, "chatml_marked", chat_template=str(tmp_path / "no_end.jinja"))
    (chat,) = encoded(chosen, PLAIN["turns"])
    assert chat.tokens.tolist() == reference(folders["chatml"], PLAIN["turns"])
    assert targets(chosen, chat) == ["In the sea.", "Nowhere.", "So."]


def test_only_trained_messages_are_targets(folders):
    chosen = tokenizer(folders, "chatml")
    is_trained = [False, True, False, False, False, True]
    chat = chosen.encode_conversation(Conversation(messages=PLAIN["turns"], is_trained=is_trained))[0]
    assert targets(chosen, chat) == ["In the sea.<|im_end|>", "So.<|im_end|>"]
    (chat,) = encoded(chosen, PLAIN["one turn"], trained=("user",))
    assert targets(chosen, chat) == ["Where does the river end?<|im_end|>"]


@pytest.mark.parametrize(
    ("kind", "messages", "fault"),
    [
        ("mistral", WITH_SYSTEM["system"], "the chat template refuses it: This model has no system turn"),
        ("mistral", [user("a"), user("b"), assistant("c")], "roles must alternate"),
        ("gemma", WITH_SYSTEM["system"], "the chat template refuses it: System role not supported"),
        ("llama3_1", [user("a"), assistant("Let me see.", tool_calls=[CALL])], "does not render the content of message 1"),
        ("chatml", [user("a"), assistant("b", tool_calls=[CALL])], "does not render the call of name_river in message 1"),
    ],
)
def test_what_a_template_does_not_take_is_said(folders, kind, messages, fault):
    with pytest.raises(DataError, match=fault):
        encoded(tokenizer(folders, kind), messages)


def test_tools_that_a_template_ignores_are_said(folders):
    with pytest.raises(DataError, match="does not render the tool name_river"):
        encoded(tokenizer(folders, "chatml"), PLAIN["one turn"], [TOOL])


@pytest.mark.parametrize(("kind", "end"), ENDS.items())
def test_text_that_spells_a_special_token_is_counted_and_can_be_plain(folders, kind, end):
    messages = [user(f"What is {end} for? 東{end}"), assistant("It ends turns.")]
    kept = tokenizer(folders, kind)
    (chat,) = encoded(kept, messages)
    assert chat.tokens.tolist() == reference(folders[kind], messages)
    told = "that token; special_tokens_in_text=plain reads it as text"
    assert dict(chat.notes) == {f"spells {end} in its text, read as {told}": 2}
    plain = tokenizer(folders, kind, special_tokens_in_text="plain")
    (chat,) = encoded(plain, messages)
    of_template = encoded(plain, [user("What is it for?"), assistant("It ends turns.")])[0].tokens.tolist()
    assert chat.tokens.tolist().count(plain.special_tokens[end]) == of_template.count(plain.special_tokens[end])
    assert messages[0]["content"] in plain.decode(chat.tokens.tolist())
    assert [text.strip() for text in targets(plain, chat)] == [f"It ends turns.{end}"]


@pytest.mark.parametrize("kind", KINDS)
def test_plain_text_is_read_by_the_same_tokenizer(folders, kind):
    chosen = tokenizer(folders, kind)
    text = chosen.template.render(PLAIN["unicode"], None)
    places = list(range(len(text) + 1))
    as_tokens, as_text = chosen._places.encode(text, places), chosen._special.encode(text, places)
    assert [values.tolist() for values in as_tokens] == [values.tolist() for values in as_text]


def test_a_date_does_not_depend_on_the_day(folders):
    chosen = tokenizer(folders, "llama3_1", date="2026-02-03")
    assert "Today Date: 03 Feb 2026" in chosen.decode(encoded(chosen, PLAIN["one turn"])[0].tokens.tolist())
    today = AutoTokenizer.from_pretrained(folders["llama3_1"]).apply_chat_template(PLAIN["one turn"], tokenize=False)
    assert f"Today Date: {date.today():%d %b %Y}" in today  # so transformers has it, day by day
    with pytest.raises(ConfigError, match=r"tokenizer.date=3.2.2026 must be a date, as 2024-07-26"):
        tokenizer(folders, "llama3_1", date="3.2.2026")


def test_variables_reach_the_template(folders):
    chosen = tokenizer(folders, "llama3_1", template_variables={"date_string": "1 May 2025"})
    assert "Today Date: 1 May 2025" in chosen.decode(encoded(chosen, PLAIN["one turn"])[0].tokens.tolist())


def test_torchtunes_messages_give_the_same_tokens(folders):
    chosen = tokenizer(folders, "qwen2_5")
    messages = [
        Message(role="user", content="Where?", masked=True),
        Message(role="assistant", content="In the sea.", masked=True),
        Message(role="user", content="Else?", masked=True),
        Message(role="assistant", content="Nowhere."),
    ]
    tokens, mask = chosen.tokenize_messages(messages)
    assert tokens == reference(folders["qwen2_5"], PLAIN["turns"][:4])
    assert chosen.decode([token for token, masked in zip(tokens, mask, strict=True) if not masked]) == "Nowhere.<|im_end|>"
    sample = chosen({"messages": messages, "id": 3})
    assert (sample["tokens"], sample["mask"], sample["id"]) == (tokens, mask, 3)
    prompt = chosen({"messages": messages[:3]}, inference=True)
    assert prompt["tokens"] == reference(folders["qwen2_5"], PLAIN["turns"][:3], add_generation_prompt=True)
    assert all(prompt["mask"])


def test_plain_text_begins_and_ends_as_the_model_has_it(folders):
    llama = tokenizer(folders, "llama3_1")
    ids = llama.encode("In the sea.")
    assert llama.decode(ids) == "<|begin_of_text|>In the sea.<|eot_id|>"
    assert llama.encode("In the sea.", add_bos=False, add_eos=False) == ids[1:-1]
    qwen = tokenizer(folders, "qwen3")
    assert qwen.decode(qwen.encode("In the sea.")) == "In the sea.<|im_end|>"


def test_max_seq_len_cuts_and_says_so(folders):
    (chat,) = encoded(tokenizer(folders, "qwen2_5", max_seq_len=7), PLAIN["turns"])
    assert len(chat.tokens) == len(chat.is_target) == 7
    assert dict(chat.notes) == {"cut to tokenizer.max_seq_len=7": 1}


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"path": "nowhere"}, r"tokenizer.path=nowhere does not exist \(looked from"),
        ({"special_tokens_in_text": "drop"}, "special_tokens_in_text='drop' must be one of keep, plain"),
        ({"max_seq_len": 0}, "max_seq_len=0 must be at least 1, or null"),
        ({"chat_template": "no_such.jinja"}, "tokenizer.chat_template=no_such.jinja does not exist"),
    ],
)
def test_settings_that_cannot_work_are_said(folders, arguments, fault):
    with pytest.raises(ConfigError, match=fault):
        HFTokenizer(**{"path": str(folders["qwen3"])} | arguments)


def test_folders_without_a_tokenizer_are_said(folders, tmp_path):
    with pytest.raises(ConfigError, match=r"holds no tokenizer: no tokenizer\.json"):
        HFTokenizer(str(tmp_path))
    with pytest.raises(ConfigError, match="is a file; name its folder"):
        HFTokenizer(str(folders["qwen3"] / "tokenizer.json"))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="transformers cannot load it"):
        HFTokenizer(str(tmp_path))


def test_a_checkpoint_without_template_is_said(folders, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folders["qwen3"] / name).read_bytes())
    with pytest.raises(DataError, match=r"has no chat template; take an instruct model's, or set tokenizer.chat_template"):
        encoded(HFTokenizer(str(tmp_path)), PLAIN["one turn"])


def test_the_export_loads_in_transformers_with_the_template_that_was_trained(folders, tmp_path):
    template = (folders["chatml"] / "chat_template.jinja").read_text()
    chosen = tokenizer(folders, "qwen3", chat_template=template)
    chosen.export(tmp_path)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    assert exported.chat_template == template
    ids = exported.apply_chat_template(PLAIN["turns"], tokenize=True, return_dict=False)
    assert ids == encoded(chosen, PLAIN["turns"])[0].tokens.tolist()


def complete_bytes(words):
    """Make a byte-level tokenizer whose merges are complete and in the order of its numbers, as Llama 3's."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)}
    for word in sorted(words, key=len):
        for end in range(2, len(word) + 1):
            vocab.setdefault(word[:end], len(vocab))
    merges = [
        (token[:cut], token[cut:])
        for token in vocab
        for cut in range(1, len(token))
        if {token[:cut], token[cut:]} <= vocab.keys()
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(__import__("tokenizers").Regex(r" ?\w+| ?[^\s\w]+|\s+(?!\S)|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def test_tiktoken_gives_the_same_tokens_where_it_serves():
    backend = complete_bytes(["Ġthe", "Ġriver", "aaaa", "====", "ĠĠĠĠ", "there"])
    fast = BytePairs.of(backend)
    assert fast is not None
    generator = random.Random(0)
    letters = ["a", "=", " ", "the", " river", "\n", "東", "é", "<|end|>", "☃", "re"]
    for _ in range(500):
        text = "".join(generator.choices(letters, k=generator.randint(0, 40)))
        assert fast.encode(text).tolist() == backend.encode(text, add_special_tokens=False).ids
    assert fast.encode("a" * 20_000) is None  # left to the tokenizer itself
    assert TokenPlaces(backend).encode("a" * 20_001, [0])[0].tolist() == backend.encode("a" * 20_001).ids


def test_tiktoken_does_not_serve_where_merges_are_not_complete(folders):
    for kind in KINDS:
        assert BytePairs.of(tokenizer(folders, kind)._backend) is None
    backend = complete_bytes(["there"])
    assert BytePairs.of(backend) is not None
    backend.add_special_tokens(["<|end|>s"])  # begins like another one
    assert BytePairs.of(backend) is None


@pytest.mark.parametrize("kind", ["chatml", "qwen3", "llama3_1", "deepseek"])
def test_places_by_bytes_are_those_by_offsets(folders, kind):
    chosen = tokenizer(folders, kind)
    for messages in PLAIN.values():
        text = chosen.template.render(messages, None)
        places = list(range(len(text) + 1))
        offsets = chosen._backend.encode(text, add_special_tokens=False).offsets
        boundaries = sorted({start for start, _ in offsets} | {len(text)})
        _, tokens, reach_over = chosen._places.encode(text, places)
        expected, expected_over = among_offsets(text, offsets, places)
        assert tokens[boundaries].tolist() == expected[boundaries].tolist()
        assert reach_over.tolist() == expected_over.tolist()


def test_text_that_tokens_leave_out_is_a_bad_row():
    with pytest.raises(DataError, match="the tokenizer has no token for 'lost'"):
        among_offsets("a lost b", [(0, 1), (7, 8)], [0])


@pytest.mark.parametrize("kind", ["chatml", "llama3_1"])
def test_turns_begin_where_the_one_before_has_ended(folders, kind):
    chosen = tokenizer(folders, kind)
    messages = [user("user"), assistant("Why?"), user("a"), assistant("assistant")]
    (chat,) = encoded(chosen, messages, trained=("user", "assistant"))
    end = ENDS[kind]
    assert targets(chosen, chat) == [f"user{end}", f"Why?{end}", f"a{end}", f"assistant{end}"]
    bounds = [*chat.turn_starts, len(chat.tokens)]
    assert len(bounds) == 5
    assert bounds == sorted(bounds)


def test_a_turn_that_only_calls_begins_behind_the_question(folders):
    chosen = tokenizer(folders, "llama3_1")
    messages = [user("Which river?"), assistant(None, tool_calls=[CALL])]
    (chat,) = encoded(chosen, messages, [TOOL])
    question = chosen.decode(chat.tokens[: chat.turn_starts[1]].tolist())
    assert question.endswith("Which river?<|eot_id|>")


@pytest.mark.parametrize("kind", ["chatml", "qwen3", "llama3_1"])
def test_an_assistant_may_begin(folders, kind):
    chosen = tokenizer(folders, kind)
    messages = [assistant("Hello."), user("Why?"), assistant("So.")]
    (chat,) = encoded(chosen, messages)
    assert chat.tokens.tolist() == reference(folders[kind], messages)
    end = "<|eot_id|>" if kind == "llama3_1" else "<|im_end|>"
    assert targets(chosen, chat) == [f"Hello.{end}", f"So.{end}"]


def test_an_empty_think_block_is_the_answers_own_where_the_template_knows_none(folders):
    messages = [user("And?"), assistant("<think></think>\n\n3")]
    chosen = tokenizer(folders, "chatml")
    assert targets(chosen, encoded(chosen, messages)[0]) == ["<think></think>\n\n3<|im_end|>"]
    chosen = tokenizer(folders, "qwen3")
    (chat,) = encoded(chosen, messages)
    assert chat.tokens.tolist() == reference(folders["qwen3"], messages)
    assert targets(chosen, chat) == ["3<|im_end|>"]


@pytest.mark.parametrize(
    "messages",
    [
        [user("a"), assistant("")],
        [user(""), assistant("yes")],
        [user("yes"), assistant("yes"), user("yes"), assistant("yes")],
        [user("a\r\nb"), assistant("c\r\nd\r\n")],
        [user("In the sea"), assistant("In the sea.")],
        [user('say "hi" \\ {"a": 1}'), assistant('{"a": "b"}')],
    ],
)
@pytest.mark.parametrize("kind", ["chatml", "llama3_1", "mistral", "gemma"])
def test_odd_conversations(folders, kind, messages):
    chosen = tokenizer(folders, kind)
    (chat,) = encoded(chosen, messages)
    assert chat.tokens.tolist() == reference(folders[kind], messages)
    assert chat.is_target.tolist() == targets_by_prompts(folders[kind], chosen, messages, None, ENDS[kind])


def test_it_stands_where_torchtunes_tokenizers_do(folders, tmp_path, monkeypatch):
    from torchtune.datasets import chat_dataset, instruct_dataset, preference_dataset, text_completion_dataset

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    chosen = tokenizer(folders, "qwen2_5")
    question, good, bad = user("Where?"), assistant("In the sea."), assistant("Nowhere.")
    rows = {
        "chat": {"messages": [question, good]},
        "instruct": {"input": "Where?", "output": "In the sea."},
        "preference": {"chosen": [question, good], "rejected": [question, bad]},
        "text": {"text": "In the sea."},
    }
    files = {}
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        files[name] = {"source": "json", "data_files": str(tmp_path / f"{name}.jsonl"), "split": "train"}
    expected = reference(folders["qwen2_5"], [question, good])
    chat = chat_dataset(chosen, conversation_column="messages", conversation_style="openai", **files["chat"])[0]
    instruct = instruct_dataset(chosen, **files["instruct"])[0]
    for sample in (chat, instruct):
        assert list(sample["tokens"]) == expected
        kept = [token for token, label in zip(sample["tokens"], sample["labels"], strict=True) if label != -100]
        assert chosen.decode(kept) == "In the sea.<|im_end|>"
    pair = preference_dataset(chosen, **files["preference"])[0]
    assert list(pair["chosen_input_ids"]) == expected
    assert list(pair["rejected_input_ids"]) == reference(folders["qwen2_5"], [question, bad])
    text = text_completion_dataset(chosen, **files["text"])[0]
    assert chosen.decode(text["tokens"]) == "In the sea.<|im_end|>"
