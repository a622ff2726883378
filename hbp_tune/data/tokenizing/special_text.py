"""Text that spells a special token: found, and tokenised as the characters that it is where that is asked for."""

import json
import re
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from hbp_tune.data.tokenizing.token_places import among_offsets

# Characters of a private use area: one parts what a message spells, two others stand around what a template writes.
_PART, _OPEN, _CLOSE = "\ue0f2", "\ue0f3", "\ue0f4"


class SpecialText:
    """The special tokens of a tokenizer, and texts that spell them.

    Args:
        backend: the tokenizer.

    Attributes:
        ids: of each special token.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self.ids = {token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        # The longest first, as one may begin like another.
        names = sorted(self.ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(re.escape(name) for name in names) or r"(?!)")

    def spelt_in(self, text: str | None) -> Sequence[str]:
        """Give the special tokens that a text spells, as often as it does."""
        return self._pattern.findall(text) if text else ()

    def broken(self, text: str) -> str:
        """Part what spells a special token, until `encode` puts it together."""
        return self._pattern.sub(lambda found: found[0][0] + _PART + found[0][1:], text)

    def encode(self, text: str, places: Sequence[int]) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.bool_]]:
        """Tokenise a rendered text whose messages were `broken`: special tokens are those that the template wrote.

        The arguments and what is returned are those of `TokenPlaces.encode`.
        """
        pieces: list[str] = []
        origins: list[int] = []  # where each character of the renamed text stands in the text
        last = 0
        for found in re.finditer(f"{self._pattern.pattern}|{_PART}|$", text):
            pieces.append(text[last : found.start()])
            origins += range(last, found.start())
            if found[0] and found[0] != _PART:
                pieces.append(_OPEN + found[0] + _CLOSE)
                origins += [found.start(), *range(found.start(), found.end()), found.end()]
            last = found.end()
        origins.append(len(text))
        encoding = self._renamed.encode("".join(pieces), add_special_tokens=False)
        ids = np.array([self._ids_of_renamed.get(i, i) for i in encoding.ids], dtype=np.int32)
        offsets = [(origins[start], origins[end]) for start, end in encoding.offsets]
        return ids, *among_offsets(text, offsets, places)

    @cached_property
    def _renamed(self) -> Tokenizer:
        """The same tokenizer, in which special tokens are called otherwise: what a message spells is none of them."""
        state = json.loads(self._backend.to_str())
        for token in state["added_tokens"]:
            if token["special"]:
                token["content"] = _OPEN + token["content"] + _CLOSE
        return Tokenizer.from_str(json.dumps(state))

    @cached_property
    def _ids_of_renamed(self) -> dict[int, int]:
        # All added tokens: where special ones take new numbers, those of others may change, too.
        added = self._backend.get_added_tokens_decoder().items()
        names = {_OPEN + token.content + _CLOSE if token.special else token.content: i for i, token in added}
        ids = {self._renamed.token_to_id(name): i for name, i in names.items()}
        return {new: old for new, old in ids.items() if new is not None and new != old}
