"""A conversation in the words that chat templates read, and what becomes of it as tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Label of tokens that do not count toward the loss: torch's default for cross_entropy, and torchtune's.
IGNORE_INDEX = -100
# What becomes of assistant turns that a template renders otherwise once others follow, such as those whose reasoning it drops.
REWRITTEN_TURNS = ("mask", "split", "train")
# What becomes of an assistant's reasoning.
REASONING = ("train", "mask", "drop")


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """A row as a chat template takes it.

    Args:
        messages: with ``role``, ``content`` (text, or None beside ``tool_calls``) and, where the row has them, ``tool_calls``,
            ``tool_call_id``, ``name`` and ``reasoning_content``; nothing else that decides tokens or targets.
        is_trained: for each message, whether its tokens are targets.
        tools: JSON schemas of the functions that the assistant may call; None where there are none.
    """

    messages: Sequence[Mapping[str, Any]]
    is_trained: Sequence[bool]
    tools: Sequence[Mapping[str, Any]] | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EncodedChat:
    """A conversation's tokens.

    Args:
        tokens: ``int32[num_tokens]``.
        is_target: ``bool[num_tokens]``, the tokens that the model learns to generate.
        turn_starts: the first token of each message's turn, ascending; the template's own words before the first message belong
            to none.
        roles: of the messages that ``turn_starts`` is about.
        notes: what was done to the row that its owner should know, each with how often; rows are counted by these words.
    """

    tokens: NDArray[np.int32]
    is_target: NDArray[np.bool_]
    turn_starts: Sequence[int]
    roles: Sequence[str]
    notes: Mapping[str, int] = field(default_factory=dict)
