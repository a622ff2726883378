"""What the model generates under templates and conversations that are out of the common."""

import unicodedata

import pytest
from tokenizers import Tokenizer

from hbp_tune.data.tokenizing.conversation import Conversation
from hbp_tune.data.tokenizing.hf_tokenizer import HFTokenizer
from hbp_tune.errors import DataError
from tests.data.chat_models import CALL, KINDS, TOOL, assistant, encoded, reference, system, targets, user, write_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat_models")
    return {kind: write_model(root / kind, kind) for kind in KINDS}


def tokenizer(folders, kind, **arguments):
    return HFTokenizer(str(folders[kind]), **arguments)


# The conversation ends with a token that no turn has, as in Phi 3.
CLOSED = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% else %}<|endoftext|>{% endif %}"""


@pytest.mark.parametrize("kind", KINDS)
def test_letters_that_compose_are_one_token_place(folders, kind):
    messages = [user(unicodedata.normalize("NFD", "Überall?")), assistant(unicodedata.normalize("NFD", "Où est l'été, 각?"))]
    (chat,) = encoded(tokenizer(folders, kind), messages)
    assert chat.tokens.tolist() == reference(folders[kind], messages)
    (composed,) = targets(tokenizer(folders, kind), chat)
    # Qwen's kind reads what composes as one letter, others keep the two.
    expected = "Où est l'été, 각?" if kind.startswith("qwen") else messages[1]["content"]
    assert expected in composed


def test_a_token_that_only_ends_the_conversation(folders):
    messages = [user("Where?"), assistant("In the sea."), user("Else?"), assistant("Nowhere.")]
    chosen = tokenizer(folders, "chatml", chat_template=CLOSED)
    (chat,) = encoded(chosen, messages, rewritten_turns="mask")
    assert chat.tokens.tolist() == reference(folders["chatml"], messages, chat_template=CLOSED)
    assert targets(chosen, chat) == ["In the sea.<|im_end|>", "Nowhere.<|im_end|>\n<|endoftext|>"]
    assert not chat.notes


def test_a_turn_without_an_end_does_not_reach_into_the_next(folders):
    chosen = tokenizer(folders, "deepseek")  # where only the assistant's turns end with a token
    messages = [system("Be brief."), user("Where?"), assistant("In the sea.")]
    assert targets(chosen, encoded(chosen, messages, trained=("user",))[0]) == ["Where?"]
    assert targets(chosen, encoded(chosen, messages, trained=("system",))[0]) == ["Be brief."]


@pytest.mark.parametrize("answer", ["<b>In the sea.</b>", "<think", "<", "", "In the sea."])
def test_an_answer_that_begins_as_its_prompt_ends(folders, answer):
    chosen = tokenizer(folders, "deepseek")  # its prompt ends with <think>, which no rendered turn shows
    (chat,) = encoded(chosen, [user("Where?"), assistant(answer)])
    assert targets(chosen, chat) == [f"{answer}<｜end▁of▁sentence｜>"]


def test_the_same_words_in_reasoning_and_elsewhere(folders):
    chosen = tokenizer(folders, "qwen3")
    messages = [user("Is 4 the answer?"), assistant("4", reasoning_content="4")]
    (chat,) = encoded(chosen, messages, reasoning="mask")
    assert targets(chosen, chat) == ["4<|im_end|>"]
    messages = [system("assistant"), user("Where?"), assistant("user", reasoning_content="assistant")]
    assert targets(chosen, encoded(chosen, messages)[0]) == ["<think>\nassistant\n</think>\n\nuser<|im_end|>"]
    assert targets(chosen, encoded(chosen, messages, reasoning="mask")[0]) == ["user<|im_end|>"]


def test_reasoning_that_the_template_drops_is_not_taken_for_the_same_words(folders):
    messages = [user("Easy now?"), assistant("Easy now. 3", reasoning_content="Easy now.")]
    with pytest.raises(DataError, match="does not render reasoning_content; set reasoning=drop"):
        encoded(tokenizer(folders, "chatml"), messages)


@pytest.mark.parametrize("kind", ["chatml", "qwen3"])
def test_reasoning_that_a_content_holds_can_be_masked_or_dropped(folders, kind):
    chosen = tokenizer(folders, kind)
    messages = [user("And?"), assistant("<think>\nEasy now.\n</think>\n\n3")]
    assert targets(chosen, encoded(chosen, messages)[0]) == ["<think>\nEasy now.\n</think>\n\n3<|im_end|>"]
    (masked,) = encoded(chosen, messages, reasoning="mask")
    assert masked.tokens.tolist() == reference(folders[kind], messages)
    assert targets(chosen, masked) == ["3<|im_end|>"]
    (dropped,) = encoded(chosen, messages, reasoning="drop")
    assert dropped.tokens.tolist() == reference(folders[kind], [messages[0], assistant("3")])
    assert dict(dropped.notes) == {"turns whose reasoning is left out, as reasoning=drop": 1}
    # A question that speaks of it is nobody's reasoning.
    asked = [user("<think>a</think> What is this?"), assistant("A tag.")]
    assert "a</think> What" in chosen.decode(encoded(chosen, asked, reasoning="drop")[0].tokens.tolist())


def test_other_tags_that_are_empty_are_the_answers_own(folders):
    chosen = tokenizer(folders, "qwen3")
    (chat,) = encoded(chosen, [user("And?"), assistant("<b></b>3", reasoning_content="Easy.")])
    assert targets(chosen, chat) == ["<think>\nEasy.\n</think>\n\n<b></b>3<|im_end|>"]
    source = (folders["chatml"] / "chat_template.jinja").read_text() + "{# think #}"
    chosen = tokenizer(folders, "chatml", chat_template=source)
    assert targets(chosen, encoded(chosen, [user("And?"), assistant("<b></b>3")])[0]) == ["<b></b>3<|im_end|>"]


def test_marks_beside_turns_that_are_rewritten(folders):
    """A marked turn whose prompt no longer stands before it is rewritten all the same."""
    source = """{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}{% generation %}
{%- if message.reasoning_content and loop.last %}<think>{{ message.reasoning_content }}</think>{% endif -%}
{{ message.content }}<|im_end|>{% endgeneration %}{% else %}{{ message.content }}<|im_end|>{% endif %}
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
    chosen = tokenizer(folders, "qwen3", chat_template=source)
    messages = [user("1?"), assistant("2", reasoning_content="See."), user("And?"), assistant("3", reasoning_content="Easy.")]
    (masked,) = encoded(chosen, messages, rewritten_turns="mask")
    assert targets(chosen, masked) == ["<think>Easy.</think>3<|im_end|>"]
    assert sum(masked.notes.values()) == 1
    split = encoded(chosen, messages, rewritten_turns="split")
    assert [targets(chosen, chat) for chat in split] == [
        ["<think>Easy.</think>3<|im_end|>"],
        ["<think>See.</think>2<|im_end|>"],
    ]


@pytest.mark.parametrize("how", ["keep", "plain"])
def test_special_tokens_are_looked_for_in_all_that_was_written(folders, how):
    token = "<|im_end|>"
    call = CALL | {"function": {"name": "name_river", "arguments": {"where": f"1{token}"}}}
    tool = {"type": "function", "function": TOOL["function"] | {"description": f"Names.{token}"}}
    messages = [
        system(f"Brief.{token}"),
        user("Which?"),
        assistant(f"So{token}", tool_calls=[call], reasoning_content=f"Hm.{token}"),
    ]
    chosen = tokenizer(folders, "qwen3", special_tokens_in_text=how)
    (chat,) = encoded(chosen, messages, [tool])
    of_template = 3  # the turns' own
    count = chat.tokens.tolist().count(chosen.special_tokens[token])
    assert count == of_template + (5 if how == "keep" else 0)
    assert [number for note, number in chat.notes.items() if token in note] == [5]
    assert chosen.decode(chat.tokens.tolist()) == chosen.decode(reference(folders["qwen3"], messages, [tool]))


def test_added_tokens_keep_their_numbers_where_special_ones_are_plain_text(tmp_path):
    folder = write_model(tmp_path / "mistral", "mistral")  # whose special tokens are in the vocabulary
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens(["<cite>", "</cite>"])
    backend.save(str(folder / "tokenizer.json"))
    chosen = HFTokenizer(str(folder), special_tokens_in_text="plain")
    messages = [user("What is </s>?"), assistant("<cite>An end</cite>")]
    (chat,) = encoded(chosen, messages)
    for token in ("<cite>", "</cite>", "</s>"):
        assert chat.tokens.tolist().count(backend.token_to_id(token)) == 1
    (answer,) = targets(chosen, chat)
    assert answer.strip() == "<cite>An end</cite></s>"


def test_the_last_of_two_answers_is_trained_as_rendered(folders):
    chosen = tokenizer(folders, "qwen3")
    messages = [user("Where?"), assistant("Wait."), assistant("In the sea.")]
    (chat,) = encoded(chosen, messages, rewritten_turns="mask")  # the first one alone has an empty place for reasoning
    assert chat.tokens.tolist() == reference(folders["qwen3"], messages)
    assert targets(chosen, chat) == ["In the sea.<|im_end|>"]
    told = "last turns that the template shows otherwise than behind their own prompt; trained as rendered"
    assert chat.notes[told] == 1


@pytest.mark.parametrize("reasoning", ["train", "mask"])
def test_an_assistant_that_begins_with_reasoning(folders, reasoning):
    source = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
    chosen = tokenizer(folders, "qwen3", chat_template=source)
    messages = [assistant("Hello.", reasoning_content="Be kind.")]
    (chat,) = encoded(chosen, messages, reasoning=reasoning)
    thought = "<think>\nBe kind.\n</think>\n\n" if reasoning == "train" else ""
    assert targets(chosen, chat) == [f"{thought}Hello.<|im_end|>"]


def test_turns_begin_in_order_wherever_their_words_are_found(folders):
    # The template shows the system turn behind the question, inside the user's turn.
    source = """{% for message in messages if message.role != 'system' %}<|im_start|>{{ message.role }}
{{ message.content }}{% if loop.first and messages[0].role == 'system' %} ({{ messages[0].content }}){% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
    chosen = tokenizer(folders, "chatml", chat_template=source)
    (chat,) = encoded(chosen, [system("Be brief."), user("Where?"), assistant("In the sea.")])
    assert list(chat.turn_starts) == sorted(chat.turn_starts)
    assert targets(chosen, chat) == ["In the sea.<|im_end|>"]


def test_all_turns_are_trained_where_messages_repeat(folders):
    chosen = tokenizer(folders, "chatml")
    messages = [user("a"), assistant("a"), user("a"), assistant("a")]
    is_trained = [True, False, True, True]
    (chat,) = chosen.encode_conversation(Conversation(messages=messages, is_trained=is_trained))
    assert targets(chosen, chat) == ["a<|im_end|>", "a<|im_end|>", "a<|im_end|>"]
