"""Rows of data sets as training samples, or why they are none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torchtune.data import OpenAIToMessages, ShareGPTToMessages

from hbp_tune.components.data.batch import IGNORE_INDEX
from hbp_tune.components.planning.errors import DataError

NO_TARGET = "no target: no token counts toward the loss, or tokenizer.max_seq_len cut off those that do"


class SampleSource(Protocol):
    """Any torchtune SFT data set: rows of ``tokens`` and ``labels``, -100 where a token does not count."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sample:
    """A row's tokens.

    Args:
        source: the data set.
        row: in the data set.
        tokens: ``int32[num_tokens]``.
        is_target: ``bool[num_tokens]``, the tokens that count toward the loss.
        num_targets: of them all, without the first token: nothing comes before it that could predict it.
    """

    source: int
    row: int
    tokens: NDArray[np.int32]
    is_target: NDArray[np.bool_]
    num_targets: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """A row that is no training sample, and why."""

    source: int
    row: int
    reason: str


def no_sample(bad_rows: Sequence[BadRow]) -> str:
    """Say that all rows are bad, by the first of them and the settings that decide how rows are read."""
    first = bad_rows[0]
    others = f", nor are the {len(bad_rows) - 1} rows after it" if len(bad_rows) > 1 else ""
    return (
        f"row {first.row} of data set {first.source} is no conversation that its component can read: {first.reason}{others}. "
        "Check the row, conversation_column and conversation_style"
    )


class RowReader:
    """Reads the rows of several data sets, counted through all of them.

    Args:
        sources: one after the other.

    Raises:
        DataError: they have no row.
    """

    def __init__(self, sources: Sequence[SampleSource]) -> None:
        self._sources = sources
        self._conversations = [_conversation_keys(source) for source in sources]
        self._starts = np.concatenate(([0], np.cumsum([len(source) for source in sources])))
        if not len(self):
            raise DataError("the data set is empty: it has no row; check data_files, split and filters")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Sample | BadRow:
        """Read a row; whatever its component raises is the reason why it is bad."""
        source = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = index - int(self._starts[source])
        try:
            if keys := self._conversations[source]:
                sft: Any = self._sources[source]
                raw = sft._data[row]
                if fault := conversation_fault(raw[keys[0]], *keys[1:]):
                    return BadRow(source=source, row=row, reason=fault)
                sample = sft._prepare_sample(raw)
            else:
                sample = self._sources[source][row]
            tokens, is_target = _tokens_and_targets(sample)
        except UnicodeDecodeError as error:  # the JSON loader lets it through: it shows when a row is read
            return BadRow(source=source, row=row, reason=f"broken UTF-8: {error.reason}")
        except Exception as error:
            return BadRow(source=source, row=row, reason=" ".join(f"{type(error).__name__}: {error}".split()))
        num_targets = int(np.count_nonzero(is_target[1:]))
        if not num_targets:
            return BadRow(source=source, row=row, reason=NO_TARGET)
        return Sample(source=source, row=row, tokens=tokens, is_target=is_target, num_targets=num_targets)


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
        return f"messages are no list but {'null' if messages is None else type(messages).__name__}"
    if not messages:
        return "no messages"
    if not all(isinstance(message, dict) for message in messages):
        return "messages are no objects with a role and content"
    for message in messages:
        if message.get(role) not in roles:
            return f"role {message.get(role)!r} is none of {', '.join(roles)}"
        if message.get(content) is None:
            return "null content"
    found = {message[role] for message in messages}
    if found == {"system"}:
        return "only system messages"
    return None if roles[-1] in found else f"no {roles[-1]} turn"


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


def _tokens_and_targets(sample: dict[str, Any]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    tokens = np.asarray(sample["tokens"], dtype=np.int32)
    if isinstance(mask := sample.get("mask"), np.ndarray):  # only our estimate's: labels, a list, would cost more than it did
        return tokens, np.logical_not(mask)
    labels = np.asarray(sample["labels"])
    is_target = labels != IGNORE_INDEX
    if len(labels) != len(tokens) or (labels[is_target] != tokens[is_target]).any():
        raise DataError(f"labels must equal tokens or be {IGNORE_INDEX}; this component gives others")
    return tokens, is_target
