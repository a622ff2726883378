"""Generated chats whose answers can only come from their context: codes hidden in text, asked for at the end.

A model of a few million weights learns to find them within minutes because of how they are made: a code is one token, that
occurs nowhere else; each key has codes of its own; and an answer names the key just before the code, so that one look back
by meaning is enough.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from quality.text import Messages

NUM_NEEDLES = 16  # of a long chat: all keys
CODES_PER_KEY = 16
# What asking for a needle and answering take of a chat's tokens, at most, and the format around it all.
_ASK_TOKENS, _FORMAT_TOKENS = 6, 32


def make_codes(keys: Sequence[str], text: str) -> dict[str, list[str]]:
    """Invent as many words of four letters for each key that are not in the text."""
    syllables = [first + second for first in "zvkjbdgp" for second in "aeiou"]
    seen = set(text.lower().split())
    words = ("".join(pair) for pair in itertools.product(syllables, repeat=2))
    unseen = itertools.islice((word for word in words if word not in seen), 0, None, 2)
    return {key: list(itertools.islice(unseen, CODES_PER_KEY)) for key in keys}


class NeedleChats:
    """Makes chats of needles: ``The river is zuva.`` in the text, and ``Codes: river zuva, ...`` as its answer.

    Args:
        codes: that each key can have; a chat has one of each key that it uses.
        filler: sentences to hide the needles in, taken as they follow each other.
        count_tokens: tells how many tokens a text has.
        seed: of everything that is drawn.
    """

    def __init__(
        self, codes: Mapping[str, Sequence[str]], filler: Sequence[str], count_tokens: Callable[[str], int], seed: int
    ) -> None:
        self._codes = codes
        self._filler = filler
        self._count_tokens = count_tokens
        self._rng = np.random.default_rng(seed)

    def chat(self, num_tokens: int, num_needles: int) -> Messages:
        """Make a chat that asks for all of its needles.

        Args:
            num_tokens: at most; filler is added as long as whole sentences fit, and none where there is no room.
            num_needles: at most one a key.
        """
        keys = self._rng.choice(list(self._codes), num_needles, replace=False).tolist()
        pairs = [(key, str(self._rng.choice(self._codes[key]))) for key in keys]
        sentences = [f"The {key} is {code}." for key, code in pairs]
        taken = _FORMAT_TOKENS + sum(self._count_tokens(sentence) + 1 + _ASK_TOKENS for sentence in sentences)
        filler = self._some_filler(num_tokens - taken)
        # Anywhere in the text with the same probability, in short and long chats.
        for place, sentence in sorted(zip(self._rng.random(num_needles), sentences, strict=True), reverse=True):
            filler.insert(int(place * (len(filler) + 1)), sentence)
        asked = [pairs[index] for index in self._rng.permutation(num_needles)]
        question = f"{' '.join(filler)}\n\nCodes of {', '.join(key for key, _ in asked)}?"
        answer = f"Codes: {', '.join(f'{key} {code}' for key, code in asked)}."
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def _some_filler(self, room: int) -> list[str]:
        start, taken = int(self._rng.integers(len(self._filler))), []
        while True:
            sentence = self._filler[(start + len(taken)) % len(self._filler)]
            room -= self._count_tokens(sentence) + 1
            if room < 0:
                return taken
            taken.append(sentence)
