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
from typing import Any, NamedTuple

import numpy as np

from hbp_tune.data.tokenizing.conversation import Conversation
from hbp_tune.errors import DataError

_NOW = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_MARK = re.compile(r"{%(-?)\s*(end)?generation\s*(-?)%}")
# Characters of a private use area, which no template and no text has for a purpose; see `_marked`.
_MARKS = "\ue0f0\ue0f1"
# What templates put before an answer without reasoning, or what is left of it where the prompt has its beginning.
_EMPTY_REASONING = re.compile(r"\s*(?:<(think(?:ing)?)>\s*</\1>|</think(?:ing)?>)\n*")
# Reasoning that a content holds, and what opens reasoning.
WRITTEN_REASONING = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)
_OPENING_TAG = re.compile(r"(?:<\w+>|\[THINK\])\s*$")
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


class _Whole(NamedTuple):
    """A whole conversation's text, and where in it each message was found."""

    text: str
    contents: list[Span]


class ChatTemplate:
    """Renders conversations by one template.

    Args:
        tokenizer: of transformers, which renders.
        source: the template, in Jinja.
        variables: that the template reads, beside messages and tools.
        today: what a template that states the date takes for today.
        special_tokens: that end turns; whitespace behind them is the template's, not the model's.
        added_tokens: all that are never cut, special ones among them.
    """

    def __init__(
        self,
        tokenizer: Any,
        source: str,
        *,
        variables: Mapping[str, Any],
        today: date,
        special_tokens: Sequence[str],
        added_tokens: Sequence[str],
    ) -> None:
        self._tokenizer = tokenizer
        # A literal date: what is trained must not depend on the day, and ranks must agree around midnight.
        self._source = _NOW.sub(lambda call: json.dumps(today.strftime(call[2])), source)
        self._marked_source = _marked(self._source) if _MARK.search(source) else None
        self._variables = variables
        self._special = _any_of(special_tokens)
        self._added = _any_of(added_tokens)
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
        whole = _Whole(text, _find_contents(text, messages, tools))
        ends = self._turn_ends(whole)
        marks = self._generation_marks(conversation, text)
        targets: list[Span] = []
        notes: Counter[str] = Counter()
        rewritten: list[int] = []
        for index in np.flatnonzero(conversation.is_trained).tolist():
            span = self._turn(conversation, index, whole, notes)
            if span is not None:
                span = (marks or {}).get(index, span)
                ends[index] = span[1]
                targets.append((self._answer_start(conversation, index, text, span, reasoning), span[1]))
                continue
            rewritten.append(index)
            if rewritten_turns == "train":
                targets.append(self._as_rendered(conversation, index, whole))
        if rewritten and rewritten_turns == "mask":
            notes[_MASKED] += len(rewritten)
        if targets or not rewritten or rewritten_turns != "split":
            yield Rendering(text=text, targets=targets, turn_ends=np.maximum.accumulate(ends).tolist(), notes=notes)
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

    def _turn(self, conversation: Conversation, index: int, whole: _Whole, notes: Counter[str]) -> Span | None:
        """Find what is learnt of one message; see `_generated` of an assistant's."""
        if conversation.messages[index]["role"] != "assistant":
            return self._whole_turn(conversation, index, whole)
        if index == 0:  # nothing comes before that could be a prompt
            start, end = self._whole_turn(conversation, index, whole)
            thought = self._reasoning(conversation, index, whole.text)
            return min(start, _opening(whole.text, thought[0])) if thought else start, end
        span = self._generated(conversation, index, whole, notes)
        if span is None and index == len(conversation.messages) - 1:  # nothing follows that could have changed it
            notes["last turns that the template shows otherwise than behind their own prompt; trained as rendered"] += 1
            return self._as_rendered(conversation, index, whole)
        return span

    def _as_rendered(self, conversation: Conversation, index: int, whole: _Whole) -> Span:
        """Find an assistant's turn as the whole conversation shows it, behind its prompt where that is shown."""
        prompt = self.render(conversation.messages[:index], conversation.tools, is_prompt=True)
        start, end = self._whole_turn(conversation, index, whole)
        return len(prompt) if whole.text.startswith(prompt) else start, end

    def _generated(self, conversation: Conversation, index: int, whole: _Whole, notes: Counter[str]) -> Span | None:
        """Find what the model generates of one assistant turn; None where the whole conversation shows something else."""
        text, before, tools = whole.text, conversation.messages[:index], conversation.tools
        prompt = self.render(before, tools, is_prompt=True)
        start = len(prompt)
        if not text.startswith(prompt):
            start = _num_common(prompt, text)
            if start < len(self.render(before, tools)):
                return None
            # The answer itself may begin as what the prompt ends with does: "<b>" behind "<think>".
            start = _outside(self._added, text, min(start, self._whole_turn(conversation, index, whole)[0]))
            notes["turns rendered without what their prompt ends with; trained as rendered"] += 1
        if index == len(conversation.messages) - 1:
            return start, self._trimmed(text, start, len(text))
        alone = self.render(conversation.messages[: index + 1], tools)
        end = _outside(self._added, alone, _num_common(alone, text))
        # A template may close the last turn of a conversation by a token that other turns do not have.
        if self._special.sub("", alone[end:]).strip():
            return None
        return start, self._trimmed(text, start, end)

    def _answer_start(self, conversation: Conversation, index: int, text: str, span: Span, reasoning: str) -> int:
        """Leave out an empty place for reasoning, and reasoning that is not trained."""
        start, end = span
        message = conversation.messages[index]
        if message["role"] != "assistant":
            return start
        thought = self._reasoning(conversation, index, text)
        if thought is None:
            is_open = text[:start].rstrip().endswith("<think>")
            empty = _EMPTY_REASONING.match(text, start, end) if "think" in self._source else None
            if empty and (empty[1] or is_open):
                return empty.end()
            written = WRITTEN_REASONING.match(text, _opening(text, start), end)
            return written.end() if written and reasoning == "mask" else start
        if reasoning == "train":
            return start
        closing = _CLOSING_TAG.match(text, thought[1], end)
        return closing.end() if closing else thought[1]

    def _reasoning(self, conversation: Conversation, index: int, text: str) -> Span | None:
        """Find a message's reasoning; None where it has none.

        Raises:
            DataError: the template leaves it out.
        """
        thought = (conversation.messages[index].get("reasoning_content") or "").strip()
        if not thought:
            return None
        place = self._stand_in(conversation, index, text, "reasoning_content")
        if place is None:
            raise DataError("the chat template does not render reasoning_content; set reasoning=drop to leave it out")
        return place

    def _stand_in(self, conversation: Conversation, index: int, text: str, field: str) -> Span | None:
        """Find where a message's field is rendered, by another text in its place; None where it makes a difference elsewhere."""
        messages = list(conversation.messages)
        messages[index] = {**messages[index], field: _STAND_IN}
        other = self.render(messages, conversation.tools)
        place = other.find(_STAND_IN)
        behind = other[place + len(_STAND_IN) :]
        if place < 0 or text[:place] != other[:place] or not text.endswith(behind):
            return None
        return place, len(text) - len(behind)

    def _turn_ends(self, whole: _Whole) -> list[int]:
        """Give the end of the first special token between each message and the next one, or the message's own end."""
        ends = []
        limit = len(whole.text)
        for start, end in reversed(whole.contents):
            # Nothing of an empty message is there to be found.
            token = self._special.search(whole.text, end, max(end, limit)) if start < end else None
            ends.append(token.end() if token else end)
            limit = start if start < end else limit
        return ends[::-1]

    def _whole_turn(self, conversation: Conversation, index: int, whole: _Whole) -> Span:
        """Find a message as it is rendered, up to the token that ends its turn before the next message begins."""
        start, end = self._content(conversation, index, whole)
        later = (i for i in range(index + 1, len(whole.contents)) if whole.contents[i][0] < whole.contents[i][1])
        limit = next((self._content(conversation, i, whole)[0] for i in later), len(whole.text))
        token = self._special.search(whole.text, end, max(end, limit))
        return start, token.end() if token else end

    def _content(self, conversation: Conversation, index: int, whole: _Whole) -> Span:
        """Find a message's content, its calls included.

        A short one, such as "user", may have been found in a header: another text in its place shows where it really is.
        """
        found = whole.contents[index]
        start, end = self._stand_in(conversation, index, whole.text, "content") or found
        return start, max(end, found[1]) if conversation.messages[index].get("tool_calls") else end

    def _trimmed(self, text: str, start: int, end: int) -> int:
        """Give a turn's end without the whitespace behind its last token, which the template puts there once it has ended."""
        stripped = text[start:end].rstrip()
        tokens = list(self._special.finditer(stripped))
        return start + len(stripped) if tokens and tokens[-1].end() == len(stripped) else end


def _any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    # The longest first, as one may begin like another.
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or r"(?!)")


def _opening(text: str, place: int) -> int:
    """Give the beginning of the tag that opens reasoning just before a place, or the place."""
    first = max(0, place - 40)
    opening = _OPENING_TAG.search(text[first:place])
    return first + opening.start() if opening else place


def _outside(tokens: re.Pattern[str], text: str, place: int) -> int:
    """Move a place inside a token to the token's beginning."""
    longest = 100  # of a token's name
    around = tokens.finditer(text, max(0, place - longest), place + longest)
    return next((token.start() for token in around if token.start() < place < token.end()), place)


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
