"""Rows of data sets as training samples, or why they are none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torchtune.data import OpenAIToMessages, ShareGPTToMessages

from hbp_tune.data.tokenizing.conversation import IGNORE_INDEX
from hbp_tune.errors import DataError, HbpError

NO_TARGET = "no target: no token counts toward the loss, or tokenizer.max_seq_len cut off those that do"


class SampleSource(Protocol):
    """Any torchtune SFT data set: rows of ``tokens`` and ``labels``, -100 where a token does not count.

    A row may give a list of such samples, and each may have ``notes``: what was done to it, with how often.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sample:
    """A row's tokens.

    Args:
        source: the data set.
        row: in the data set.
        tokens: ``int32[num_tokens]``.
        is_target: ``bool[num_tokens]``, the tokens that count toward the loss.
        num_targets: of them all, without the first token: nothing comes before it that could predict it.
        notes: what was done to it that its owner should know, with how often.
    """

    source: int
    row: int
    tokens: NDArray[np.int32]
    is_target: NDArray[np.bool_]
    num_targets: int
    notes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """A row that is not a training sample, and why."""

    source: int
    row: int
    reason: str


def no_sample(bad_rows: Sequence[BadRow], names: Sequence[str]) -> str:
    """Say that all rows are bad, by the first of them and the settings that decide how rows are read.

    Args:
        bad_rows: all rows.
        names: the data sets' keys in the configuration.
    """
    first = bad_rows[0]
    others = f", nor are the {len(bad_rows) - 1} rows after it" if len(bad_rows) > 1 else ""
    return (
        f"row {first.row} of {names[first.source]} is not a training sample: {first.reason}{others}. "
        "Check the row, and the arguments that say how rows are read"
    )


class RowReader:
    """Reads the rows of several data sets, counted through all of them.

    Args:
        sources: one after the other.
        names: their keys in the configuration, for errors.

    Raises:
        DataError: they have no row.
    """

    def __init__(self, sources: Sequence[SampleSource], names: Sequence[str] | None = None) -> None:
        self._sources = sources
        self.names = names or [f"dataset[{i}]" for i in range(len(sources))]
        self._conversations = [_conversation_keys(source) for source in sources]
        self._starts = np.concatenate(([0], np.cumsum([len(source) for source in sources])))
        if not len(self):
            raise DataError("the data set is empty: it has no row; check data_files, split and filters")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> list[Sample] | BadRow:
        """Read a row, which may give several samples; whatever its component raises is the reason why it is bad."""
        source = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = index - int(self._starts[source])
        try:
            if keys := self._conversations[source]:
                sft: Any = self._sources[source]
                raw = sft._data[row]
                if fault := conversation_fault(raw[keys[0]], *keys[1:]) or unused_fault(raw, raw[keys[0]]):
                    return BadRow(source=source, row=row, reason=fault)
                read = sft._prepare_sample(raw)
            else:
                read = self._sources[source][row]
            samples = [_sample(source, row, one) for one in (read if isinstance(read, list) else [read])]
        except UnicodeDecodeError as error:  # the JSON loader lets it through: it shows when a row is read
            return BadRow(source=source, row=row, reason=f"broken UTF-8: {error.reason}")
        except HbpError as error:
            return BadRow(source=source, row=row, reason=" ".join(str(error).split()))
        except Exception as error:
            return BadRow(source=source, row=row, reason=" ".join(f"{type(error).__name__}: {error}".split()))
        trained = [sample for sample in samples if sample.num_targets]
        return trained or BadRow(source=source, row=row, reason=NO_TARGET)


def conversation_fault(messages: Any, role: str, content: str, roles: Sequence[str]) -> str | None:
    """Say what is wrong with a raw conversation, as torchtune says it in the words of its own code, or not at all.

    Null content is the worst of it: torchtune 0.6.1 repeats the message before in its place.

    Args:
        messages: whatever the row has in their place.
        role: key of a message's role.
        content: key of a message's content.
        roles: that a message may have; the last one's turns are trained on.
    """
    if not isinstance(messages, list):
        return f"messages are not a list but {'null' if messages is None else type(messages).__name__}"
    if not messages:
        return "no messages"
    if not all(isinstance(message, dict) for message in messages):
        return "messages are not objects with a role and content"
    for message in messages:
        if message.get(role) not in roles:
            return f"role {message.get(role)!r} is none of {', '.join(roles)}"
        if message.get(content) is None:
            return "null content"
    found = {message[role] for message in messages}
    if found == {"system"}:
        return "only system messages"
    return None if roles[-1] in found else f"no {roles[-1]} turn"


# Fields with a meaning for training that torchtune's components do not look at.
_UNUSED = ("tool_calls", "reasoning_content", "reasoning", "thinking")


def unused_fault(row: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> str | None:
    """Say which field of a raw conversation torchtune's component would lose without a word, or nothing.

    Args:
        row: with all its columns.
        messages: the conversation's, sound ones.
    """
    lost = [key for message in messages for key in _UNUSED if message.get(key)]
    lost += ["weight" for message in messages if message.get("weight") not in (None, 1)]
    lost += ["tools"] if row.get("tools") else []
    if not lost:
        return None
    return f"{lost[0]} would be lost: torchtune's chat_dataset does not use it, hbp_tune.components.ChatDataset does"


def _sample(source: int, row: int, sample: Mapping[str, Any]) -> Sample:
    tokens, is_target = _tokens_and_targets(sample)
    num_targets = int(np.count_nonzero(is_target[1:]))
    notes = sample.get("notes") or {}
    return Sample(source=source, row=row, tokens=tokens, is_target=is_target, num_targets=num_targets, notes=notes)


def _conversation_keys(source: SampleSource) -> tuple[str, str, str, tuple[str, ...]] | None:
    """Find how a chat data set's raw conversations are written: column, keys of role and content, roles; None for others.

    By private names of torchtune 0.6.1, the only version that is allowed; tests fail where they are gone.
    """
    transform = getattr(source, "_message_transform", None)
    if isinstance(transform, OpenAIToMessages):
        return transform._column_map["messages"], "role", "content", ("system", "user", "ipython", "tool", "assistant")
    if isinstance(transform, ShareGPTToMessages):
        return transform._column_map["conversations"], "from", "value", ("system", "human", "gpt")
    return None


def _tokens_and_targets(sample: Mapping[str, Any]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    tokens = np.asarray(sample["tokens"], dtype=np.int32)
    if isinstance(mask := sample.get("mask"), np.ndarray):  # only our estimate's: labels, a list, would cost more than it did
        return tokens, np.logical_not(mask)
    labels = np.asarray(sample["labels"])
    is_target = labels != IGNORE_INDEX
    if len(labels) != len(tokens) or (labels[is_target] != tokens[is_target]).any():
        raise DataError(f"labels must equal tokens or be {IGNORE_INDEX}; this component gives others")
    return tokens, is_target
