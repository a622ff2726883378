"""From chats in files to tokens: reading, a small tokenizer of their own text, and sentences to hide needles in."""

import gzip
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torchtune.data import Message
from torchtune.models.llama3 import Llama3Tokenizer, llama3_tokenizer

from hbp_tune.data.tokenizing.conversation import IGNORE_INDEX
from hbp_tune.demo.tokenizer import train_ranks, write_tokenizer

Messages = list[dict[str, str]]
Row = dict[str, Any]
# Of each long chat, to train the tokenizer on, and to take filler from: the first of hundreds of thousands.
_LONG_CHARACTERS = 20_000


def read_chats(path: Path) -> Iterator[Messages]:
    """Yield the messages of each line of a ``.jsonl.gz`` file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["messages"]


def train_tokenizer(data: Path) -> list[bytes]:
    """Train a tokenizer's ranks on the short chats and the beginnings of the long ones."""
    texts = [message["content"] for chat in read_chats(data / "short.jsonl.gz") for message in chat]
    texts += [chat[0]["content"][:_LONG_CHARACTERS] for chat in read_chats(data / "long.jsonl.gz")]
    return train_ranks(texts)


def open_tokenizer(ranks: Sequence[bytes], directory: Path) -> Llama3Tokenizer:
    """Write a tokenizer and read it as torchtune does."""
    write_tokenizer(directory, ranks)
    return llama3_tokenizer(str(directory / "tokenizer.model"), special_tokens_path=str(directory / "special_tokens.json"))


def tokenize(tokenizer: Llama3Tokenizer, chat: Messages, *, train_on_input: bool = False) -> Row:
    """Give a chat's tokens and labels as the token store takes them; targets are the assistant's turns, or every token."""
    messages = [
        Message(role=message["role"], content=message["content"], masked=not train_on_input and message["role"] != "assistant")
        for message in chat
    ]
    tokens, mask = tokenizer.tokenize_messages(messages)
    return {"tokens": tokens, "labels": np.where(mask, IGNORE_INDEX, tokens).tolist()}


def sentences(data: Path) -> list[str]:
    """Give the sentences of the beginnings of the long chats, in order."""
    text = " ".join(chat[0]["content"][:_LONG_CHARACTERS] for chat in read_chats(data / "long.jsonl.gz"))
    return [" ".join(part.split()) for part in re.findall(r"[A-Z][^.!?]{15,300}[.!?]", text)]
