"""Samples of a token store as text, for people: what is trained, not what was meant to be."""

import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hbp_tune.data.store.rows import RowReader, SampleSource
from hbp_tune.data.store.sources import DataSource, LoadedData
from hbp_tune.data.store.store import TokenStore
from hbp_tune.data.tokenizing.conversation import EncodedChat
from hbp_tune.reporting.samples import Piece, SampleView, TurnView

# Of a run of tokens so many are shown at its beginning, and so many at its end.
SHORT, LONG = (60, 30), (2000, 1000)
# So many rows are read to find one that is a sample.
_LOOKED_AT = 100


def view_sample(
    data: LoadedData, store: TokenStore, tokenizer: Any, sample_id: int, shown: tuple[int, int] = SHORT
) -> SampleView:
    """Show a sample with the tokens and targets that the store has of it.

    Args:
        data: that the store was made of.
        store: of tokens.
        tokenizer: that made them.
        sample_id: which one.
        shown: how many tokens to show of a run of targets, or of others, at its beginning and at its end.
    """
    tokens, is_target = store.read(np.array([sample_id], dtype=np.int32), store.lengths[[sample_id]])
    samples = data.sources[store.sources[sample_id]].samples
    place = str(data.places([sample_id])[0])
    return _view(samples, int(store.rows[sample_id]), place, tokenizer, tokens, is_target, shown)


def view_first(source: DataSource, tokenizer: Any) -> SampleView | None:
    """Show the first sample of a data set without tokenising the others; None where the first rows are all bad."""
    rows = RowReader([source.samples])
    for index in range(min(len(rows), _LOOKED_AT)):
        if isinstance(read := rows[index], list):
            place = str(source.places([index])[0])
            return _view(source.samples, index, place, tokenizer, read[0].tokens, read[0].is_target, SHORT)
    return None


def _view(
    samples: SampleSource,
    row: int,
    place: str,
    tokenizer: Any,
    tokens: NDArray[np.int32],
    is_target: NDArray[np.bool_],
    shown: tuple[int, int],
) -> SampleView:
    chat = _chat_of(samples, row, tokens)
    starts = [0] if chat is None else list(chat.turn_starts)
    roles = [""] if chat is None else list(chat.roles)
    turns = [
        _view_turn(tokenizer, role, tokens[start:end], is_target[start:end], shown)
        for role, start, end in zip(roles, starts, [*starts[1:], len(tokens)], strict=True)
    ]
    return SampleView(
        place=place,
        turns=turns,
        special_tokens=list(getattr(tokenizer, "special_tokens", ())),
        notes=[] if chat is None else list(chat.notes),
    )


def view_samples(data: LoadedData, store: TokenStore, tokenizer: Any) -> list[SampleView]:
    """Show the first sample of each data set."""
    firsts = [int(np.argmax(store.sources == source)) for source in np.unique(store.sources)]
    return [view_sample(data, store, tokenizer, sample_id) for sample_id in firsts]


def _chat_of(samples: Any, row: int, tokens: NDArray[np.int32]) -> EncodedChat | None:
    """Ask a data set that knows them for the turns of a sample; None where it does not."""
    if not hasattr(samples, "chats"):
        return None
    chats: Sequence[EncodedChat] = samples.chats(row)
    return next((chat for chat in chats if np.array_equal(chat.tokens, tokens)), None)


def _view_turn(
    tokenizer: Any, role: str, tokens: NDArray[np.int32], is_target: NDArray[np.bool_], shown: tuple[int, int]
) -> TurnView:
    bounds = [0, *(np.flatnonzero(np.diff(is_target)) + 1).tolist(), len(tokens)]
    pieces = [
        _piece(tokenizer, tokens[start:end], bool(is_target[start]), shown)
        for start, end in itertools.pairwise(bounds)
        if start < end
    ]
    return TurnView(role=role, num_tokens=len(tokens), num_targets=int(is_target.sum()), pieces=pieces)


def _piece(tokenizer: Any, tokens: NDArray[np.int32], is_target: bool, shown: tuple[int, int]) -> Piece:
    head, tail = shown
    if len(tokens) <= head + tail:
        return Piece(text=decode(tokenizer, tokens), is_target=is_target)
    return Piece(
        text=decode(tokenizer, tokens[:head]),
        is_target=is_target,
        num_left_out=len(tokens) - head - tail,
        tail=decode(tokenizer, tokens[-tail:]),
    )


def decode(tokenizer: Any, tokens: NDArray[np.int32]) -> str:
    """Give the text of tokens with its special tokens, by our tokenizer or any of torchtune's; ids where it cannot tell."""
    if not hasattr(tokenizer, "decode"):
        return " ".join(map(str, tokens))
    wanted = {"skip_special_tokens": False, "truncate_at_eos": False}
    known = inspect.signature(tokenizer.decode).parameters
    return str(tokenizer.decode(tokens.tolist(), **{key: value for key, value in wanted.items() if key in known}))
