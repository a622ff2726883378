"""What a chat template makes of a conversation, and which characters of it the model generates.

A template says how a conversation looks as a whole, and how its beginning looks to a model that is to go on: the prompt. What
stands behind a turn's prompt, up to the end of the turn, is what the model generates there, whatever the template is like.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any

import numpy as np

from hbp_tune.components.data.conversation import Conversation
from hbp_tune.components.planning.errors import DataError

_NOW = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_MARK = re.compile(r"{%(-?)\s*(end)?generation\s*(-?)%}")
# Characters of a private use area, which no template and no text has for a purpose; see `_marked`.
_MARKS = "\ue0f0\ue0f1"
# What templates put before an answer without reasoning, or what is left of it where the prompt has its beginning.
_EMPTY_REASONING = re.compile(r"\s*(?:<(\w+)>\s*</\1>|</think(?:ing)?>)\n*")
_CLOSING_TAG = re.compile(r"\s*</\w+>\s*|\s*\[/THINK\]\s*")
# Another character of that area, in a message's place.
_STAND_IN = "\ue0f5"
_MASKED = "turns that the template rewrites once others follow; not trained, rewritten_turns=split trains each"
# So much of a message's end is looked for where a template renders the message in part.
_TAIL = 32

Message = Mapping[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendering:
    """A conversation as text.

    Args:
        text: all of it.
        targets: the characters that the model generates, of trained messages.
        turn_ends: where each message's turn ends.
        notes: see `EncodedChat`.
    """

    text: str
    targets: list[Span]
    turn_ends: list[int]
    notes: Counter[str] = field(default_factory=Counter)


class ChatTemplate:
    """Renders conversations by one template.

    Args:
        tokenizer: of transformers, which renders.
        source: the template, in Jinja.
        variables: that the template reads, beside messages and tools.
        today: what a template that states the date takes for today.
        special_tokens: that end turns; whitespace behind them is the template's, not the model's.
    """

    def __init__(
        self, tokenizer: Any, source: str, *, variables: Mapping[str, Any], today: date, special_tokens: Sequence[str]
    ) -> None:
        self._tokenizer = tokenizer
        # A literal date: what is trained must not depend on the day, and ranks must agree around midnight.
        self._source = _NOW.sub(lambda call: json.dumps(today.strftime(call[2])), source)
        self._marked_source = _marked(self._source) if _MARK.search(source) else None
        self._variables = variables
        self._special = re.compile("|".join(re.escape(token) for token in special_tokens) or r"(?!)")
        self.states_date = self._source != source

    def render(self, messages: Sequence[Message], tools: Sequence[Message] | None, *, is_prompt: bool = False) -> str:
        """Render messages, with the beginning of an assistant's turn behind them where they are a prompt."""
        return self._rendered(self._source, messages, tools, is_prompt)

    def read(self, conversation: Conversation, *, reasoning: str, rewritten_turns: str) -> Iterator[Rendering]:
        """Render a conversation, and find what the model generates of it.

        Args:
            conversation: with its trained messages.
            reasoning: ``train`` or ``mask``: whether the assistant's reasoning is a target.
            rewritten_turns: what becomes of trained assistant turns that the whole conversation shows otherwise than their own
                prompts and ends do: ``mask`` leaves them out, ``train`` takes them as they are there, ``split`` gives a
                rendering of the conversation up to each, in which it is the last turn.

        Returns:
            One rendering, or with ``split`` one for each rewritten turn behind it.

        Raises:
            DataError: the template refuses the conversation, or leaves out a part of it.
        """  # noqa: DOC502 - the functions called here raise them
        messages, tools = conversation.messages, conversation.tools
        text = self.render(messages, tools)
        contents = _find_contents(text, messages, tools)
        ends = self._turn_ends(text, contents)
        marks = self._generation_marks(conversation, text)
        targets: list[Span] = []
        notes: Counter[str] = Counter()
        rewritten: list[int] = []
        for index in np.flatnonzero(conversation.is_trained).tolist():
            if marks and messages[index]["role"] == "assistant":
                span: Span | None = marks[index]
            else:
                span = self._turn(conversation, index, text, contents[index], notes)
            if span is not None:
                ends[index] = span[1]
                targets.append((self._answer_start(messages[index], text, span, reasoning), span[1]))
                continue
            rewritten.append(index)
            if rewritten_turns == "train":
                targets.append(self._as_rendered(conversation, index, text, contents[index]))
        if rewritten and rewritten_turns == "mask":
            notes[_MASKED] += len(rewritten)
        if targets or not rewritten or rewritten_turns != "split":
            yield Rendering(text=text, targets=targets, turn_ends=ends, notes=notes)
        if rewritten_turns != "split":
            return
        for index in rewritten:
            only_this = [i == index for i in range(index + 1)]
            part = replace(conversation, messages=messages[: index + 1], is_trained=only_this)
            yield from self.read(part, reasoning=reasoning, rewritten_turns="mask")

    def _rendered(self, source: str, messages: Sequence[Message], tools: Sequence[Message] | None, is_prompt: bool) -> str:
        """Render by one form of the template.

        Raises:
            DataError: the template refuses the messages.
        """
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=source,
                add_generation_prompt=is_prompt,
                tokenize=False,
                **self._variables,
            )
        except Exception as error:  # a template is a program, which may fail in any way
            raise DataError(f"the chat template refuses it: {' '.join(str(error).split())}") from error
        return text

    def _generation_marks(self, conversation: Conversation, text: str) -> dict[int, Span] | None:
        """Give what the template itself marks as generated, a span for each assistant message; None where it does not."""
        if self._marked_source is None:
            return None
        marked = self._rendered(self._marked_source, conversation.messages, conversation.tools, False)
        spans, start = [], 0
        for num_before, mark in enumerate(re.finditer(f"[{_MARKS}]", marked)):
            place = mark.start() - num_before
            if mark[0] == _MARKS[0]:
                start = place
            else:
                spans.append((start, place))
        indices = [index for index, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        if re.sub(f"[{_MARKS}]", "", marked) != text or len(spans) != len(indices):
            return None
        return dict(zip(indices, spans, strict=True))

    def _turn(self, conversation: Conversation, index: int, text: str, found: Span, notes: Counter[str]) -> Span | None:
        """Find what is learnt of one message; see `_generated` of an assistant's."""
        if conversation.messages[index]["role"] != "assistant" or index == 0:  # nothing comes before that could be a prompt
            return self._whole_turn(conversation, index, text, found)
        return self._generated(conversation, index, text, notes)

    def _as_rendered(self, conversation: Conversation, index: int, text: str, found: Span) -> Span:
        """Find an assistant's turn as the whole conversation shows it, behind its prompt where that is shown."""
        prompt = self.render(conversation.messages[:index], conversation.tools, is_prompt=True)
        start, end = self._whole_turn(conversation, index, text, found)
        return len(prompt) if text.startswith(prompt) else start, end

    def _generated(self, conversation: Conversation, index: int, text: str, notes: Counter[str]) -> Span | None:
        """Find what the model generates of one assistant turn; None where the whole conversation shows something else.

        Raises:
            DataError: so it is in the last turn, which nothing follows that could change it.
        """
        before, tools = conversation.messages[:index], conversation.tools
        is_last = index == len(conversation.messages) - 1
        prompt = self.render(before, tools, is_prompt=True)
        start = len(prompt)
        if not text.startswith(prompt):
            history = self.render(before, tools)
            start = _num_common(prompt, text)
            if start < len(history):
                if is_last:
                    raise DataError("the chat template shows the last turn otherwise than behind its own prompt")
                return None
            notes["turns rendered without what their prompt ends with; trained as rendered"] += 1
        if is_last:
            return start, self._trimmed(text, start, len(text))
        whole = self.render(conversation.messages[: index + 1], tools)
        end = _num_common(whole, text)
        # A template may close the last turn of a conversation by a token that other turns do not have.
        if self._special.sub("", whole[end:]).strip():
            return None
        return start, self._trimmed(text, start, end)

    def _answer_start(self, message: Message, text: str, span: Span, reasoning: str) -> int:
        """Leave out an empty place for reasoning, and reasoning that is not trained.

        Raises:
            DataError: the template leaves out the reasoning.
        """
        start, end = span
        if message["role"] != "assistant":
            return start
        thought = message.get("reasoning_content")
        if thought is None or not thought.strip():
            empty = _EMPTY_REASONING.match(text, start, end) if "think" in self._source else None
            return empty.end() if empty and (empty[1] or text[:start].rstrip().endswith("<think>")) else start
        place = text.find(thought.strip(), start, end)
        if place < 0:
            raise DataError("the chat template does not render reasoning_content; set reasoning=drop to leave it out")
        if reasoning == "train":
            return start
        stop = place + len(thought.strip())
        closing = _CLOSING_TAG.match(text, stop, end)
        return closing.end() if closing else stop

    def _turn_ends(self, text: str, contents: Sequence[Span]) -> list[int]:
        """Give the end of the first special token between each message and the next one, or the message's own end."""
        ends = []
        limit = len(text)
        for start, end in reversed(contents):
            # Nothing of an empty message is there to be found.
            token = self._special.search(text, end, max(end, limit)) if start < end else None
            ends.append(token.end() if token else end)
            limit = start if start < end else limit
        return ends[::-1]

    def _whole_turn(self, conversation: Conversation, index: int, text: str, found: Span) -> Span:
        """Find a message as it is rendered, up to the token that ends its turn.

        A short one, such as "user", may have been found in a header: another text in its place shows where it really is.
        """
        start, end = found
        messages = list(conversation.messages)
        messages[index] = {**messages[index], "content": _STAND_IN}
        other = self.render(messages, conversation.tools)
        place = other.find(_STAND_IN)
        num_behind = len(other) - place - len(_STAND_IN)
        if place >= 0 and text[:place] == other[:place] and text.endswith(other[len(other) - num_behind :]):
            start, end = place, len(text) - num_behind
        token = self._special.search(text, max(end, found[1]))
        return start, token.end() if token else end

    def _trimmed(self, text: str, start: int, end: int) -> int:
        """Give a turn's end without the whitespace behind its last token, which the template puts there once it has ended."""
        stripped = text[start:end].rstrip()
        tokens = list(self._special.finditer(stripped))
        return start + len(stripped) if tokens and tokens[-1].end() == len(stripped) else end


def _marked(source: str) -> str:
    """Let a template write a character where ``{% generation %}`` begins, and another where it ends."""

    def block(tag: re.Match[str]) -> str:
        mark = _MARKS[1 if tag[2] else 0]
        # In an if block, which takes the newline behind it along as any block does.
        return f'{{%{tag[1]} if true %}}{{{{ "{mark}" }}}}{{% endif {tag[3]}%}}'

    return _MARK.sub(block, source)


def _num_common(first: str, second: str) -> int:
    """Count the characters that two texts begin with alike, by halves: a loop over characters takes a hundred times as long."""
    if second.startswith(first):
        return len(first)
    common, differs = 0, min(len(first), len(second)) + 1
    while differs - common > 1:
        middle = (common + differs) // 2
        if first[common:middle] == second[common:middle]:
            common = middle
        else:
            differs = middle
    return common


def _find_contents(text: str, messages: Sequence[Message], tools: Sequence[Message] | None) -> list[Span]:
    """Find each message in a conversation's text, one behind the other where the template keeps their order.

    Raises:
        DataError: a message, a call or the tools are not there: the template does not render them.
    """
    spans: list[Span] = []
    place = 0
    for index, message in enumerate(messages):
        content = (message.get("content") or "").strip()
        span = _find(text, content, place) if content else (place, place)
        if span is None:
            raise DataError(f"the chat template does not render the content of message {index} ({message['role']})")
        for number, call in enumerate(message.get("tool_calls") or ()):
            name = call["function"]["name"]
            if (found := text.find(name, span[1])) < 0:
                raise DataError(f"the chat template does not render the call of {name} in message {index}")
            span = (span[0] if content or number else found, found + len(name))
        spans.append(span)
        place = span[1]
    for tool in tools or ():
        name = tool.get("function", tool).get("name", "")
        if name not in text:
            raise DataError(f"the chat template does not render the tool {name}; leave tools out of the rows if none is meant")
    return spans


def _find(text: str, content: str, place: int) -> Span | None:
    """Find a content from a place on, or anywhere; as it is, as JSON, or its end alone."""
    tail = content[-_TAIL:]
    answer = content.rsplit("</think>", 1)[-1].strip() or content  # what templates leave of reasoning that a content holds
    for form in (content, json.dumps(content, ensure_ascii=False)[1:-1], tail, json.dumps(tail)[1:-1], answer):
        for start in (place, 0):
            if (found := text.find(form, start)) >= 0:
                return found, found + len(form)
    return None
