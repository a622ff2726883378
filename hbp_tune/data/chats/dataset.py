"""The chat data set: whatever files and formats people have, as samples."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torchtune.data import Message

from hbp_tune.config.sources import matching_files, strings
from hbp_tune.data.chats.detection import FORMATS, describe_format, detect
from hbp_tune.data.chats.files import Rows, is_saved, open_rows
from hbp_tune.data.chats.rows import ROLES, ChatFormat, Turns, fault_of
from hbp_tune.data.tokenizing.conversation import IGNORE_INDEX, REASONING, REWRITTEN_TURNS, Conversation, EncodedChat
from hbp_tune.errors import ConfigError, DataError

# So many rows are looked at to find out what the others are.
_LOOKED_AT = 100
# So many are read to find them.
_MOST_READ = 10_000
_TRAIN_ON = ("assistant", "last_assistant", "all")


class ChatDataset:
    """Chats, instructions, texts or token ids, as samples for training.

    Args:
        tokenizer: `HFTokenizer`, which renders all that rows hold, or one of torchtune's.
        data_files: files (JSON lines, JSON, both also ``.gz``, Parquet, Arrow, CSV), folders and patterns of them.
        source: in place of local files, a name on the hub, or a folder written by ``save_to_disk``.
        split: of the rows, such as ``train[:1000]``.
        format: ``openai``, ``sharegpt``, ``alpaca``, ``prompt_completion``, ``text``, ``tokens``, or ``auto``: what the first
            rows look like.
        columns: what stands where if columns, or the keys of messages, have other names: ``{messages: dialog, role: speaker}``.
        roles: who other roles are: ``{speaker_a: user}``.
        train_on: whose turns are targets: ``assistant``, ``last_assistant``, ``all``, or a list of roles. A message with
            ``weight: 0`` is none.
        reasoning: of the assistant: ``train`` it, ``mask`` it, or ``drop`` it.
        rewritten_turns: earlier assistant turns that a template shows otherwise once others follow, such as Qwen3's, which drops
            their reasoning: ``mask`` leaves them out and counts them, ``split`` gives each a sample of its own, in which it is
            the last turn, ``train`` takes them as they are rendered.
        load_dataset: arguments of ``datasets.load_dataset``, such as ``name`` and ``revision``.

    Attributes:
        description: what was decided about the rows, in one phrase.

    Raises:
        ConfigError: an argument is out of range, or nothing of it can be read.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        data_files: str | Sequence[str] | None = None,
        source: str | None = None,
        split: str = "train",
        format: str = "auto",
        columns: Mapping[str, str] | None = None,
        roles: Mapping[str, str] | None = None,
        train_on: str | Sequence[str] = "assistant",
        reasoning: str = "train",
        rewritten_turns: str = "mask",
        **load_dataset: Any,
    ) -> None:
        _check_choice("format", format, ("auto", *FORMATS))
        _check_choice("reasoning", reasoning, REASONING)
        _check_choice("rewritten_turns", rewritten_turns, REWRITTEN_TURNS)
        if isinstance(train_on, str):
            _check_choice("train_on", train_on, (*_TRAIN_ON, "or a list of roles"))
        for role, other in (roles or {}).items():
            _check_choice(f"roles={{{role}: ...}}", other, tuple(dict.fromkeys(ROLES.values())))
        self._tokenizer = tokenizer
        self._train_on = train_on if isinstance(train_on, str) else tuple(train_on)
        self._reasoning = reasoning
        self._rewritten_turns = rewritten_turns
        if isinstance(data_files, str) and is_saved(data_files):
            data_files, source = None, data_files
        names = list(strings(data_files))
        files = [file for name in names for file in matching_files(name)]
        if names and source not in (None, "json", "parquet", "csv", "arrow"):
            raise ConfigError(f"dataset: source={source} and data_files are two sources; set one of them to null")
        if names and not files:
            raise ConfigError(f"dataset: data_files={', '.join(names)}: there is no such file (looked from {Path.cwd()})")
        self._rows = open_rows(files, source, split, load_dataset)
        looked_at = _look_at(self._rows)
        self._format = (
            detect(looked_at, format, columns, roles) if looked_at else ChatFormat(name="text", columns={"text": "text"})
        )
        self.description = describe_format(self._format)
        if self._format.name not in ("text", "tokens"):
            on = f"{train_on} turns" if isinstance(train_on, str) else f"turns of {', '.join(train_on)}"
            self.description += f"; trains on {on.replace('_', ' ')}"
            if hasattr(tokenizer, "template") and tokenizer.template.states_date:
                self.description += f"; the template states the date, which is {tokenizer.date} for every sample"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        """Give the sample of a row: ``tokens`` and ``labels`` (-100 where no target), ``int32[num_tokens]``, and ``notes``.

        A row that gives several samples (``rewritten_turns=split``) gives a list of them.
        """
        samples = [
            {"tokens": chat.tokens, "labels": np.where(chat.is_target, chat.tokens, IGNORE_INDEX), "notes": chat.notes}
            for chat in self.chats(index)
        ]
        return samples if len(samples) > 1 else samples[0]

    def chats(self, index: int) -> Sequence[EncodedChat]:
        """Tokenise a row.

        Raises:
            DataError: it is not a training sample, with the reason.
        """
        row = self._rows[index]
        if self._format.name in ("text", "tokens"):
            notes = self._format.unused(row)
            return [replace(self._text(row) if self._format.name == "text" else self._ids(row), notes=notes)]
        turns = self._format.read(row)
        is_trained = self._is_trained(turns)
        if fault := fault_of(turns.messages, is_trained):
            raise DataError(fault)
        conversation = Conversation(messages=turns.messages, is_trained=is_trained, tools=turns.tools)
        if hasattr(self._tokenizer, "encode_conversation"):
            chats: list[EncodedChat] = self._tokenizer.encode_conversation(
                conversation, reasoning=self._reasoning, rewritten_turns=self._rewritten_turns
            )
        else:
            chats = [_encode_plainly(self._tokenizer, conversation)]
        if turns.notes:
            chats[0] = replace(chats[0], notes=turns.notes + Counter(chats[0].notes))
        return chats

    def _is_trained(self, turns: Turns) -> list[bool]:
        roles = [message["role"] for message in turns.messages]
        if self._train_on == "all":
            return turns.may_train
        wanted = self._train_on if isinstance(self._train_on, tuple) else ("assistant",)
        chosen = [may_train and role in wanted for role, may_train in zip(roles, turns.may_train, strict=True)]
        if self._train_on == "last_assistant" and "assistant" in roles:
            last = len(roles) - 1 - roles[::-1].index("assistant")
            chosen = [one and index == last for index, one in enumerate(chosen)]
        return chosen

    def _text(self, row: Mapping[str, Any]) -> EncodedChat:
        """Tokenise a plain text, all of which is trained.

        Raises:
            DataError: it is none.
        """
        text = row.get(self._format.columns["text"])
        if not isinstance(text, str) or not text:
            raise DataError(f"text is {'empty' if text in ('', None) else f'no text but {type(text).__name__}'}")
        tokens = self._tokenizer.encode(text, add_bos=True, add_eos=True)
        return _one_piece(tokens, [True] * len(tokens))

    def _ids(self, row: Mapping[str, Any]) -> EncodedChat:
        """Take token ids as they are.

        Raises:
            DataError: they are none, or do not go with their labels.
        """
        ids, column = row.get(self._format.columns["input_ids"]), self._format.columns["input_ids"]
        if not isinstance(ids, list) or not ids or not all(isinstance(i, int) for i in ids):
            raise DataError(f"{column} is not a list of token ids")
        most = getattr(self._tokenizer, "vocab_size", None)
        if min(ids) < 0 or (most is not None and max(ids) >= most):
            known = "from 0 on" if most is None else f"of 0 to {most - 1}"
            raise DataError(f"{column} holds {min(ids) if min(ids) < 0 else max(ids)}, the tokenizer has ids {known}")
        attended = row.get("attention_mask")
        if attended is not None and (not isinstance(attended, list) or not all(attended)):
            raise DataError("attention_mask is 0 somewhere: padding is not supported; remove it")
        labels = row.get(self._format.columns.get("labels", "labels"), ids)
        if not isinstance(labels, list) or len(labels) != len(ids):
            raise DataError(f"labels are not a list of as many as {column}: {len(ids)}")
        if any(label not in (IGNORE_INDEX, i) for label, i in zip(labels, ids, strict=True)):
            raise DataError(f"labels must equal {column} or be {IGNORE_INDEX}, not shifted; these are others")
        masked = self._format.columns.get("loss_mask", "loss_mask")
        mask = row.get(masked, [1] * len(ids))
        if not isinstance(mask, list) or len(mask) != len(ids) or not set(mask) <= {0, 1}:
            raise DataError(f"{masked} is not a list of as many as {column}, each 0 or 1")
        return _one_piece(ids, [label != IGNORE_INDEX and bool(kept) for label, kept in zip(labels, mask, strict=True)])


def _look_at(rows: Rows) -> list[Mapping[str, Any]]:
    """Read the first rows that can be read.

    Raises:
        ConfigError: none can.
    """
    good: list[Mapping[str, Any]] = []
    first_fault = None
    num_read = min(len(rows), _MOST_READ)
    for index in range(num_read):
        try:
            good.append(rows[index])
        except DataError as error:
            first_fault = first_fault or error
        if len(good) == _LOOKED_AT:
            break
    if first_fault and not good:
        raise ConfigError(f"none of the first {num_read} rows of dataset can be read: {first_fault}")
    return good


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Check an argument that is one of some words.

    Raises:
        ConfigError: it is another one.
    """
    if value not in choices:
        raise ConfigError(f"dataset: {name}={value} must be one of {', '.join(choices)}")


def _one_piece(tokens: Sequence[int], is_target: Sequence[bool]) -> EncodedChat:
    ids: NDArray[np.int32] = np.array(tokens, dtype=np.int32)
    return EncodedChat(tokens=ids, is_target=np.array(is_target, dtype=np.bool_), turn_starts=[0], roles=[""])


def _encode_plainly(tokenizer: Any, conversation: Conversation) -> EncodedChat:
    """Tokenise by one of torchtune's tokenizers, which know text turns alone.

    Raises:
        DataError: there is more.
    """
    beside = {key for message in conversation.messages for key in ("tool_calls", "reasoning_content") if message.get(key)}
    if conversation.tools:
        beside.add("tools")
    if beside:
        raise DataError(
            f"{type(tokenizer).__name__} does not know {', '.join(sorted(beside))}; take hbp_tune.components.HFTokenizer"
        )
    messages = [
        Message(
            role="ipython" if message["role"] == "tool" else message["role"], content=message["content"], masked=not is_trained
        )
        for message, is_trained in zip(conversation.messages, conversation.is_trained, strict=True)
    ]
    tokens, mask = tokenizer.tokenize_messages(messages)
    return _one_piece(tokens, np.logical_not(mask))
