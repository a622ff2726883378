"""What rows of chat data mean: OpenAI's messages, ShareGPT, Alpaca, and prompt with completion, as one kind of conversation."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hbp_tune.errors import DataError

Row = Mapping[str, Any]

# What a turn's author is called, in whatever format, and who that is for a chat template.
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("tool", "function", "ipython", "observation", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
# Fields of a message that are used, and others that decide nothing.
_USED = {"tool_calls", "function_call", "tool_call_id", "name", "weight", *_REASONING}
_HARMLESS = {
    "id",
    "uuid",
    "index",
    "timestamp",
    "created_at",
    "create_time",
    "updated_at",
    "model",
    "lang",
    "language",
    "metadata",
}
_HARMLESS |= {"source", "tokens", "num_tokens", "token_count", "length", "parent", "parent_id", "message_id", "annotations"}
# Columns beside a conversation that say something about its training, which nothing here takes up.
_UNUSED_COLUMNS = {
    "chosen",
    "rejected",
    "label",
    "documents",
    "context",
    "system_prompt",
    "chat_template_kwargs",
    "weight",
    "reward",
    *_REASONING,
}
# Columns that a conversation's formats use, and the others do not.
_OF_TURNS = {
    "tools",
    "functions",
    "system",
    "messages",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "response",
    "answer",
}


@dataclass(slots=True)
class Turns:
    """A row's turns as they are read.

    Attributes:
        messages: as `Conversation` has them.
        may_train: for each, False where the row itself says that it is not a target.
        tools: of the row.
        notes: fields that were not used, with how often.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    may_train: list[bool] = field(default_factory=list)
    tools: list[Row] | None = None
    notes: Counter[str] = field(default_factory=Counter)

    def add(self, role: str, content: str, *, may_train: bool = True, **fields: Any) -> None:
        """Add a message; fields that are None are left out."""
        self.messages.append({"role": role, "content": content, **{k: v for k, v in fields.items() if v is not None}})
        self.may_train.append(may_train)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatFormat:
    """How a data set's rows are written.

    Args:
        name: of the format.
        columns: what stands where: the column (or a message's key) of each of the format's fields.
        roles: what this data set's roles are, before those that are known anyway.
        also_fits: names of other formats that the rows could be read as.
    """

    name: str
    columns: Mapping[str, str]
    roles: Mapping[str, str] = field(default_factory=dict)
    also_fits: tuple[str, ...] = ()

    def unused(self, row: Row) -> Counter[str]:
        """Note the columns that say something about a row's training, which this format does not take up.

        Raises:
            DataError: the row has images or the like.
        """
        for key in _MEDIA:
            if row.get(key):
                raise DataError(f"the row has {key}, which text models do not take; leave the column out if none is meant")
        unused = _UNUSED_COLUMNS | (_OF_TURNS if self.name in ("text", "tokens") else set())
        keys = sorted(unused - set(self.columns.values()))
        return Counter(f"column {key!r} is not used" for key in keys if row.get(key) not in (None, "", [], {}))

    def read(self, row: Row) -> Turns:
        """Read a conversation; one that is none, or holds something that would be lost, is a `DataError`."""
        turns = Turns(notes=self.unused(row))
        turns.tools = _tools(row, self._at("tools"))
        system = row.get(self._at("system"))
        {
            "openai": self._read_messages,
            "sharegpt": self._read_messages,
            "alpaca": self._read_alpaca,
            "prompt_completion": self._read_pair,
        }[self.name](row, turns)
        if system:
            self._add_system(_text(system, self._at("system")), turns)
        return turns

    def _add_system(self, content: str, turns: Turns) -> None:
        """Put a row's system prompt first, unless the messages have their own."""
        own = [message["content"] for message in turns.messages if message["role"] == "system"]
        if not own:
            turns.messages.insert(0, {"role": "system", "content": content})
            turns.may_train.insert(0, True)
        elif content not in own:
            turns.notes[f"column {self._at('system')!r} is not used: the messages have a system turn"] += 1

    def _at(self, name: str) -> str:
        return self.columns.get(name, name)

    def _read_messages(self, row: Row, turns: Turns) -> None:
        self._add_messages(row.get(self._at("messages")), turns)

    def _add_messages(self, messages: Any, turns: Turns, *, may_train: bool = True) -> None:
        """Add a list of messages.

        Raises:
            DataError: it is none.
        """
        if isinstance(messages, str):
            messages = _parsed(messages, "messages")
        if not isinstance(messages, list):
            raise DataError(f"messages are not a list but {'null' if messages is None else type(messages).__name__}")
        if not messages:
            raise DataError("no messages")
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping):
                raise DataError("messages are not objects with a role and content")
            self._add_message(index, message, turns, may_train)

    def _add_message(self, index: int, message: Row, turns: Turns, may_train: bool) -> None:
        """Add one message.

        Raises:
            DataError: its role is unknown, it has no content, or a field of it would be lost.
        """
        role = self._role(message.get(self._at("role")))
        content, reasoning = _content(index, message.get(self._at("content")))
        reasoning = _reasoning(index, message, reasoning)
        calls = _calls(index, message)
        if role == "function_call":
            if calls:
                raise DataError(f"message {index} is a call and has tool_calls besides")
            role, content, calls = "assistant", "", _flat_calls(index, content)
        if content is None:
            if not calls:
                raise DataError("null content")
            content = ""
        if role != "assistant" and (calls or reasoning):
            raise DataError(f"message {index} has {'tool_calls' if calls else 'reasoning'}, which only an assistant's may have")
        weight = message.get("weight")
        if weight not in (None, 0, 1):
            raise DataError(
                f"message {index} has weight={weight!r}; 0 leaves it out of the loss, 1 is usual, others are not supported"
            )
        for key in message.keys() - _USED - _HARMLESS - {self._at("role"), self._at("content")}:
            if key in _MEDIA or key == "refusal":
                if message[key]:
                    raise DataError(f"message {index} has {key}, which is not supported")
            elif message[key] not in (None, "", [], {}):
                turns.notes[f"message field {key!r} is not used"] += 1
        turns.add(
            role,
            content,
            may_train=may_train and weight != 0,
            reasoning_content=reasoning,
            tool_calls=calls,
            tool_call_id=message.get("tool_call_id"),
            name=message.get("name"),
        )

    def _role(self, role: Any) -> str:
        """Say who a role is for a template.

        Raises:
            DataError: nobody knows.
        """
        if isinstance(role, str) and role in self.roles:
            return self.roles[role]
        if not isinstance(role, str) or role not in ROLES:
            known = ", ".join(dict.fromkeys(ROLES.values()))
            raise DataError(f"role {role!r} is unknown; say by roles={{{role}: ...}} whether it is one of {known}")
        return ROLES[role]

    def _read_alpaca(self, row: Row, turns: Turns) -> None:
        """Read an instruction with its input, what was said before, and the output.

        Raises:
            DataError: one is not text.
        """
        history = row.get(self._at("history")) or []
        for pair in history if isinstance(history, list) else [history]:
            if not isinstance(pair, list) or len(pair) != 2:
                raise DataError("history is not a list of pairs of question and answer")
            turns.add("user", _text(pair[0], "history"))
            turns.add("assistant", _text(pair[1], "history"))
        instruction = _text(row.get(self._at("instruction")), "instruction")
        given = row.get(self._at("input")) or ""
        turns.add("user", f"{instruction}\n{_text(given, 'input')}" if given else instruction)
        turns.add("assistant", _text(row.get(self._at("output")), "output"))

    def _read_pair(self, row: Row, turns: Turns) -> None:
        """Read a prompt and its completion, texts or lists of messages; of the latter only the completion's are trained."""
        prompt, completion = row.get(self._at("prompt")), row.get(self._at("completion"))
        if isinstance(prompt, list):
            self._add_messages(prompt, turns, may_train=False)
            self._add_messages(completion, turns)
            return
        turns.add("user", _text(prompt, "prompt"))
        turns.add("assistant", _text(completion, "completion"))


def _text(value: Any, name: str) -> str:
    """Give a text.

    Raises:
        DataError: it is none.
    """
    if value is None:
        raise DataError(f"null {name}")
    if not isinstance(value, str):
        raise DataError(f"{name} is not text but {type(value).__name__}")
    return value


def _parsed(text: str, name: str) -> Any:
    """Parse what is JSON inside a text.

    Raises:
        DataError: it is not.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{name} is not JSON: {error}") from error


def _content(index: int, content: Any) -> tuple[str | None, str | None]:
    """Join a content's parts: its text, and reasoning among them.

    Raises:
        DataError: a part is neither.
    """
    if content is None or isinstance(content, str):
        return content, None
    if not isinstance(content, list):
        raise DataError(f"message {index}: content is not text but {type(content).__name__}")
    texts: dict[str, list[str]] = {"text": [], "thinking": []}
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        kind = "thinking" if kind == "reasoning" else kind
        if not isinstance(kind, str) or kind not in texts:
            raise DataError(f"message {index} holds a part of type {kind!r}, which text models do not take")
        text = part if isinstance(part, str) else part.get("text", part.get(kind)) if isinstance(part, Mapping) else None
        texts[kind].append(_text(text, f"message {index}: a part's text"))
    return "".join(texts["text"]), "".join(texts["thinking"]) or None


def _reasoning(index: int, message: Row, in_parts: str | None) -> str | None:
    """Give a message's reasoning, by whatever name.

    Raises:
        DataError: it has two, or one that is not text.
    """
    found = {_text(message[key], key) for key in _REASONING if message.get(key)} | ({in_parts} if in_parts else set())
    if len(found) > 1:
        raise DataError(f"message {index} has several fields of reasoning that differ: {', '.join(_REASONING)}")
    return found.pop() if found else None


def _calls(index: int, message: Row) -> list[dict[str, Any]] | None:
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else None)
    return _flat_calls(index, calls) if calls else None


def _flat_calls(index: int, calls: Any) -> list[dict[str, Any]]:
    """Write calls as OpenAI's, with their arguments as an object, which templates expect.

    Raises:
        DataError: one is not a call.
    """
    where = f"message {index}: a call"
    calls = _parsed(calls, where) if isinstance(calls, str) else calls
    written = []
    for call in calls if isinstance(calls, list) else [calls]:
        call = _parsed(call, where) if isinstance(call, str) else call
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"{where} has no name")
        arguments = function.get("arguments", function.get("parameters"))
        arguments = _parsed(arguments, f"{where}'s arguments") if isinstance(arguments, str) and arguments else arguments
        if not isinstance(arguments or {}, Mapping):
            raise DataError(f"{where}'s arguments are not an object but {type(arguments).__name__}")
        named = {"id": call["id"]} if call.get("id") else {}
        written.append({**named, "type": "function", "function": {"name": function["name"], "arguments": arguments or {}}})
    return written


def _tools(row: Row, column: str) -> list[Row] | None:
    """Give a row's tools; the older ``functions`` are tools, too.

    Raises:
        DataError: they are not schemas.
    """
    tools = row.get(column) or row.get("functions")
    tools = (_parsed(tools, column) if tools.strip() else None) if isinstance(tools, str) else tools
    if not tools:
        return None
    if not isinstance(tools, list):
        raise DataError(f"{column} is not a list but {type(tools).__name__}")
    schemas = [_parsed(tool, column) if isinstance(tool, str) else tool for tool in tools]
    wrapped = [
        tool if not isinstance(tool, Mapping) or "function" in tool else {"type": "function", "function": tool}
        for tool in schemas
    ]
    functions = [tool.get("function") if isinstance(tool, Mapping) else None for tool in wrapped]
    if not all(isinstance(function, Mapping) and isinstance(function.get("name"), str) for function in functions):
        raise DataError(f"{column} holds something else than functions with a name")
    return wrapped


def fault_of(messages: Sequence[Row], is_trained: Sequence[bool]) -> str | None:
    """Say why a conversation gives nothing to learn, or nothing."""
    roles = {message["role"] for message in messages}
    if roles == {"system"}:
        return "only system messages"
    if "assistant" not in roles and not any(is_trained):
        return "no assistant turn"
    return None if any(is_trained) else "no turn is trained: train_on and the messages' weight leave out all"
