"""Tokens of a text, and where in it each lies."""

import itertools
import unicodedata
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from hbp_tune.data.tokenizing.byte_pairs import BytePairs
from hbp_tune.errors import DataError


class TokenPlaces:
    """Tokenises texts and places their tokens.

    Tokenizers that work on bytes need not be asked for places: the bytes of their tokens follow each other, which takes a third
    off the time. Where they do not, since a text was normalised, and with all other tokenizers, the library's offsets serve.

    Args:
        backend: without a post-processor, so that its offsets leave nothing out.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend

    def encode(self, text: str, places: Sequence[int]) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.bool_]]:
        """Tokenise a text, and find characters of it among its tokens.

        Args:
            text: with its special tokens.
            places: of characters, ascending.

        Returns:
            ``int32[num_tokens]`` ids; ``int64[len(places)]``, for each place the first token that begins there or behind; and
            ``bool[len(places)]``, whether the token before that one reaches over the place.

        Raises:
            DataError: a part of the text is in no token.
        """  # noqa: DOC502 - the functions called here raise it
        if self._num_bytes is not None:
            ids = self._encode_fast(text)
            starts = np.cumsum(np.concatenate(([0], self._num_bytes[ids])))
            if starts[-1] == (len(text) if text.isascii() else len(text.encode())):
                return ids, *_among(starts, starts, _byte_places(text, places))
        encoding = self._backend.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, dtype=np.int32), *among_offsets(text, encoding.offsets, places)

    def _encode_fast(self, text: str) -> NDArray[np.int32]:
        if self._byte_pairs is not None and (ids := self._byte_pairs.encode(text)) is not None:
            return ids
        return np.array(self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids, dtype=np.int32)

    @cached_property
    def _byte_pairs(self) -> BytePairs | None:
        return BytePairs.of(self._backend)

    @cached_property
    def _num_bytes(self) -> NDArray[np.int64] | None:
        """The bytes that each token stands for; None for a tokenizer that does not work on bytes."""
        if "ByteLevel" not in str(self._backend.pre_tokenizer):
            return None
        vocab = self._backend.get_vocab(with_added_tokens=True)
        added = self._backend.get_added_tokens_decoder()
        num_bytes = np.zeros(max(vocab.values()) + 1, dtype=np.int64)
        for token, i in vocab.items():  # a letter of the vocabulary is a byte, but for added tokens
            num_bytes[i] = len(added[i].content.encode()) if i in added else len(token)
        return num_bytes


def among_offsets(
    text: str, offsets: Sequence[tuple[int, int]], places: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Find characters among tokens by the tokens' offsets; see `TokenPlaces.encode`.

    Raises:
        DataError: characters other than whitespace are in no token: what is trained would not be what was rendered.
    """
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    starts = np.append(starts, len(text))
    reached = np.maximum.accumulate(np.concatenate(([0], ends)))
    for token in np.flatnonzero(starts > reached):
        begin, end = max(int(reached[token]) - 1, 0), int(starts[token])
        lost = text[begin + 1 : end].strip()
        # What composes with the letter before it is in that letter's token.
        if lost and len(unicodedata.normalize("NFC", text[begin:end])) > 1:
            raise DataError(f"the tokenizer has no token for {lost[:20]!r}, which the rendered conversation holds")
    return _among(starts, reached, np.array(places, dtype=np.int64))


def _among(
    starts: NDArray[np.int64], reached: NDArray[np.int64], places: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    tokens = np.searchsorted(starts, places)
    return tokens, reached[tokens] > places


def _byte_places(text: str, places: Sequence[int]) -> NDArray[np.int64]:
    """Count characters in bytes of UTF-8."""
    if text.isascii():
        return np.array(places, dtype=np.int64)
    bounds = [0, *places]
    return np.cumsum([len(text[start:end].encode()) for start, end in itertools.pairwise(bounds)], dtype=np.int64)
