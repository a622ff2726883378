"""Which format rows have, found by looking at the first of them."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from hbp_tune.data.chats.rows import ChatFormat
from hbp_tune.errors import ConfigError

FORMATS = ("openai", "sharegpt", "alpaca", "prompt_completion", "text", "tokens")
# The fields of each format, those that it cannot do without first, and the columns that usually hold them.
_USUAL: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "openai": {
        "messages": ("messages", "conversations", "conversation", "chat", "dialog", "dialogue", "turns"),
        "role": ("role",),
        "content": ("content",),
    },
    "sharegpt": {
        "messages": ("conversations", "conversation", "messages", "chat", "dialog", "dialogue", "turns"),
        "role": ("from",),
        "content": ("value",),
    },
    "tokens": {"input_ids": ("input_ids", "tokens", "token_ids")},
    "alpaca": {"instruction": ("instruction",), "output": ("output", "response")},
    "prompt_completion": {
        "prompt": ("prompt", "question", "query", "input"),
        "completion": ("completion", "answer", "response", "output"),
    },
    "text": {"text": ("text", "content")},
}
_BESIDE_TURNS = {"tools": ("tools", "functions"), "system": ("system", "system_prompt")}
_CONVERSATIONS = ("openai", "sharegpt")
# What each format may have beside, and the columns that usually hold it.
_OPTIONAL: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "openai": _BESIDE_TURNS,
    "sharegpt": _BESIDE_TURNS,
    "alpaca": {**_BESIDE_TURNS, "input": ("input", "context"), "history": ("history",)},
    "prompt_completion": _BESIDE_TURNS,
    "text": {},
    "tokens": {"labels": ("labels",), "loss_mask": ("loss_mask", "assistant_masks", "assistant_mask")},
}
# Keys of messages, which are not columns; a prompt and its completion may be messages, too.
_KEYS = ("role", "content")
# Answers of which one is better than another: nothing says which of them to train, but a mapping does.
_PREFERENCES = ("chosen", "rejected")
_NAMES = {
    "openai": "OpenAI messages",
    "sharegpt": "ShareGPT conversations",
    "alpaca": "Alpaca instructions",
    "prompt_completion": "prompts and completions",
    "text": "plain text",
    "tokens": "token ids",
}
_EXAMPLE = "columns={messages: NAME}, {prompt: NAME, completion: NAME}, {instruction: NAME, output: NAME} or {text: NAME}"


def detect(
    rows: Sequence[Mapping[str, Any]], format: str, columns: Mapping[str, str] | None, roles: Mapping[str, str] | None
) -> ChatFormat:
    """Find out how rows are written.

    Args:
        rows: some of them.
        format: one of `FORMATS`, or ``auto``.
        columns: what stands where, if not in the usual columns.
        roles: see `ChatFormat`.

    Raises:
        ConfigError: no format, or not the one that is asked for, suits their columns.
    """
    found = list(dict.fromkeys(key for row in rows for key, value in row.items() if value is not None))
    given = dict(columns or {})
    names = FORMATS if format == "auto" else (format,)
    fields = list(dict.fromkeys(field for name in names for field in _fields(name)))
    for field, column in given.items():
        if field not in fields:
            raise ConfigError(f"columns={{{field}: {column}}}: there is no field {field}; the fields are {', '.join(fields)}")
        if field not in _KEYS and column not in found:
            raise ConfigError(f"columns={{{field}: {column}}}: the rows have no such column; they have {', '.join(found)}")
    fitting = {name: mapping for name in names if (mapping := _mapping(name, rows, found, given)) is not None}
    if not fitting:
        wanted = "any format" if format == "auto" else f"format={format}"
        raise ConfigError(
            f"the rows do not fit {wanted}: they have the columns {', '.join(found) or 'none'}; say what they hold by {_EXAMPLE}"
        )
    name, mapping = next(iter(fitting.items()))
    optional = {field: _first(found, usual) for field, usual in _OPTIONAL[name].items() if field not in mapping}
    mapping |= {field: column for field, column in optional.items() if column}
    # Only of conversations: an instruction with its input and output could always be a prompt and completion, too.
    also_fits = tuple(other for other in fitting if other not in _CONVERSATIONS) if name in _CONVERSATIONS else ()
    return ChatFormat(name=name, columns=mapping, roles=dict(roles or {}), also_fits=also_fits)


def describe_format(format: ChatFormat) -> str:
    """Say what was found, in a phrase."""
    first = next(iter(_USUAL[format.name]))
    beside = [column for field, column in format.columns.items() if field not in (*_KEYS, first)]
    others = f" with {', '.join(map(repr, beside))}" if beside else ""
    also = f", not format={' or '.join(format.also_fits)}, which would fit, too" if format.also_fits else ""
    return f"{_NAMES[format.name]} in column {format.columns[first]!r}{others}{also}"


def _fields(name: str) -> tuple[str, ...]:
    """Give all fields of a format that a mapping may name."""
    keys = _KEYS if name == "prompt_completion" else ()
    return (*_USUAL[name], *_OPTIONAL[name], *keys)


def _mapping(
    name: str, rows: Sequence[Mapping[str, Any]], found: Sequence[str], given: Mapping[str, str]
) -> dict[str, str] | None:
    """Map a format's fields to columns; None where these rows are not of that format."""
    fields = _USUAL[name]
    if not given.keys() <= set(_fields(name)):
        return None
    beside = {field: column for field, column in given.items() if field not in fields}
    if name in _CONVERSATIONS:
        # Conversations show by what their messages hold, whatever their column is called.
        keys = {field: given.get(field, fields[field][0]) for field in ("role", "content")}
        # A prompt may be a list of messages, too.
        pairs = {*_PREFERENCES, *(column for usual in _USUAL["prompt_completion"].values() for column in usual)}
        others = [column for column in found if column not in pairs]
        wanted = [given["messages"]] if "messages" in given else [*fields["messages"], *others]
        column = next((column for column in wanted if column in found and _holds(rows, column, keys["role"])), None)
        return None if column is None else {"messages": column, **keys, **beside}
    mapping = {field: given.get(field) or _first(found, usual) for field, usual in fields.items()}
    if not all(mapping.values()) or (name == "tokens" and not _holds_numbers(rows, mapping["input_ids"])):
        return None
    return {field: str(column) for field, column in mapping.items()} | beside


def _first(found: Sequence[str], usual: Sequence[str]) -> str | None:
    return next((column for column in usual if column in found), None)


def _holds(rows: Sequence[Mapping[str, Any]], column: str, role: str) -> bool:
    """Tell whether a column holds lists of objects with a role."""
    lists = [_as_list(row.get(column)) for row in rows]
    return any(isinstance(message, Mapping) and role in message for messages in lists for message in messages)


def _as_list(value: Any) -> list[Any]:
    """Give a list, which tables of text hold as JSON; an empty one where it is something else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    return value if isinstance(value, list) else []


def _holds_numbers(rows: Sequence[Mapping[str, Any]], column: str | None) -> bool:
    lists = [row[column] for row in rows if column and isinstance(row.get(column), list)]
    return any(isinstance(value, int) for values in lists for value in values[:1])
