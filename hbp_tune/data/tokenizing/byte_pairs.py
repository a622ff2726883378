"""The same tokens in a third of the time: byte-pair encodings that tiktoken can run, such as Llama 3's.

tiktoken joins any two neighbours whose bytes together are a token, the one of the lowest number first. That is what a
``tokenizer.json`` says, too, where its merges are complete and in the order of its numbers, as those of encodings that were made
for tiktoken are. Every other tokenizer (Qwen's merges are not complete) is left to the library that it is written for.
"""

import itertools
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tokenizers import Tokenizer, pre_tokenizers

# tiktoken's regular expressions run out of stack, or of time, on texts and runs of characters beyond these.
_MOST_CHARS = 400_000
_LONG_RUN = re.compile(r"\S{20000}|\s{20000}")


def byte_letters() -> dict[str, int]:
    """Give the byte that each letter of a byte-level vocabulary stands for: printable bytes are themselves, as in GPT-2."""
    printable = [byte for byte in range(256) if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    assert letters.keys() == set(pre_tokenizers.ByteLevel.alphabet())
    return letters


class BytePairs:
    """Tokenises by tiktoken.

    Args:
        encoding: of tiktoken.
        is_composed: texts must be in NFC, as the tokenizer would make them; those that are not are for the tokenizer.
    """

    def __init__(self, encoding: tiktoken.Encoding, *, is_composed: bool) -> None:
        self._encoding = encoding
        self._is_composed = is_composed
        self._special = encoding.special_tokens_set

    @classmethod
    def of(cls, backend: Tokenizer) -> "BytePairs | None":
        """Take over a tokenizer; None where it is not certain to give the same tokens."""
        state = json.loads(backend.to_str())
        pattern = _split_pattern(state["pre_tokenizer"])
        if pattern is None or state["normalizer"] not in (None, {"type": "NFC"}):
            return None
        ranks = _ranks(state["model"], {token["id"] for token in state["added_tokens"]})
        special = {token["content"]: token["id"] for token in state["added_tokens"]}
        if ranks is None or not _is_found_alike(state["added_tokens"]):
            return None
        try:
            encoding = tiktoken.Encoding("checkpoint", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        except (ValueError, AssertionError):  # a regular expression, or numbers with gaps, that tiktoken does not take
            return None
        return cls(encoding, is_composed=state["normalizer"] is not None)

    def encode(self, text: str) -> NDArray[np.int32] | None:
        """Tokenise a text with its special tokens, ``int32[num_tokens]``; None where the text is for the tokenizer itself."""
        if len(text) > _MOST_CHARS or _LONG_RUN.search(text):
            return None
        if self._is_composed and not unicodedata.is_normalized("NFC", text):
            return None
        ids = self._encoding.encode(text, allowed_special=self._special, disallowed_special=())
        return np.array(ids, dtype=np.int32)


def _split_pattern(pre_tokenizer: Any) -> str | None:
    """Give the one regular expression by which a byte-level tokenizer cuts words; None where it works otherwise."""
    parts = (pre_tokenizer or {}).get("pretokenizers") or []
    if [part["type"] for part in parts] != ["Split", "ByteLevel"]:
        return None
    split, byte_level = parts
    is_plain = split["behavior"] == "Isolated" and not split["invert"]
    if not is_plain or byte_level["add_prefix_space"] or byte_level["use_regex"]:
        return None
    pattern: str | None = split["pattern"].get("Regex")
    return pattern


def _ranks(model: Mapping[str, Any], added: set[int]) -> dict[bytes, int] | None:
    """Give the number of each token by its bytes; None where merges are not complete and in the order of the numbers."""
    if model["type"] != "BPE" or not model.get("ignore_merges") or model.get("dropout") or model.get("byte_fallback"):
        return None
    vocab: dict[str, int] = {token: i for token, i in model["vocab"].items() if i not in added}
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    made = [vocab.get(first + second, -1) for first, second in merges]
    if made != sorted(made) or (made and made[0] < 0):
        return None
    num_splits = sum(token[:cut] in vocab and token[cut:] in vocab for token in vocab for cut in range(1, len(token)))
    letters = byte_letters()
    if num_splits != len({tuple(merge) for merge in merges}) or not letters.keys() <= vocab.keys():
        return None
    return {bytes(letters[letter] for letter in token): i for token, i in vocab.items()}


def _is_found_alike(added: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether added tokens take no space along, and none begins like another."""
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added):
        return False
    names = sorted(token["content"] for token in added)
    return not any(later.startswith(earlier) for earlier, later in itertools.pairwise(names))
