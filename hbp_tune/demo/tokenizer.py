"""A small tokenizer with Llama 3's special tokens and chat format, trained on the demo's own text.

Two files, as ``torchtune.models.llama3.llama3_tokenizer`` reads them: ``tokenizer.model``, the ranks in tiktoken's format, and
``special_tokens.json``, the special tokens with their ids.
"""

import base64
import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from hbp_tune.demo import DemoError

VOCAB_SIZE = 2048
# The names, and their order, of the real Llama 3 vocabulary; their ids are the last ones of ours.
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)


def special_token_ids(vocab_size: int = VOCAB_SIZE) -> dict[str, int]:
    """The special tokens' ids: the last ``len(SPECIAL_TOKENS)`` of the vocabulary."""
    first = vocab_size - len(SPECIAL_TOKENS)
    return {token: first + i for i, token in enumerate(SPECIAL_TOKENS)}


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """The letter that stands for each byte in Hugging Face's byte-level vocabularies (GPT-2's table), to the byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def train_ranks(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> list[bytes]:
    """Train a byte-level BPE.

    Args:
        texts: what to train on.
        vocab_size: tokens in all, the special ones included.

    Returns:
        ``vocab_size - len(SPECIAL_TOKENS)`` tokens as raw bytes; the position is the rank and the id. The first 256 are the
        single bytes, so that tiktoken can encode any text.

    Raises:
        DemoError: the vocabulary is too small for the bytes, or the texts are too few for the vocabulary.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    from hbp_tune.components.models.torchtune_seam import CL100K_PATTERN

    num_ranks = vocab_size - len(SPECIAL_TOKENS)
    if num_ranks < 256:
        smallest = 256 + len(SPECIAL_TOKENS)
        raise DemoError(
            f"vocab_size={vocab_size} must be at least {smallest}: 256 bytes and {len(SPECIAL_TOKENS)} special tokens"
        )
    bpe = Tokenizer(models.BPE())
    # The split that torchtune's tokenizer makes before it merges: a token that crosses it would never be used.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CL100K_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=num_ranks, initial_alphabet=sorted(byte_alphabet()), show_progress=False, special_tokens=[]
    )
    bpe.train_from_iterator(texts, trainer)
    alphabet = byte_alphabet()
    vocab = sorted(bpe.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
    ranks = [bytes(alphabet[letter] for letter in token) for token, _ in vocab]
    if len(ranks) < num_ranks:
        raise DemoError(f"the texts give {len(ranks)} tokens, vocab_size={vocab_size} needs {num_ranks}; give more text")
    assert sorted(ranks[:256]) == [bytes([byte]) for byte in range(256)]
    return ranks


def write_tokenizer(directory: Path, ranks: Sequence[bytes]) -> None:
    """Write ``tokenizer.model`` and ``special_tokens.json``; the special tokens' ids follow the ranks."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks))
    (directory / "tokenizer.model").write_bytes("".join(lines).encode())
    forget_cached(directory / "tokenizer.model")
    ids = special_token_ids(len(ranks) + len(SPECIAL_TOKENS))
    added = {"added_tokens": [{"id": token_id, "content": token} for token, token_id in ids.items()]}
    (directory / "special_tokens.json").write_bytes((json.dumps(added, indent=2) + "\n").encode())


def forget_cached(path: Path) -> None:
    """Drop tiktoken's copies of an older file at this path.

    tiktoken keeps what it once read under the hash of the path's text, and never looks at the file again: without this, a demo
    that replaces another in the same place would be encoded with the other's ranks.
    """
    cache_dir = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    if cache_dir is None:
        cache_dir = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    if not cache_dir:  # tiktoken's way to say: no cache
        return
    for text in {str(path), str(path.absolute()), str(path.resolve())}:
        with contextlib.suppress(OSError):
            os.remove(os.path.join(cache_dir, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()))


class ChatCounter:
    """Counts a conversation's tokens in chat format; the same number as torchtune's ``tokenize_messages`` gives.

    torchtune's ``encode`` walks through the text letter by letter to guard against long runs without white space. Source code
    has none, and without that walk the modules of a whole standard library are counted in seconds.

    Args:
        ranks: as from ``train_ranks``.
    """

    def __init__(self, ranks: Sequence[bytes]) -> None:
        from tiktoken import Encoding

        from hbp_tune.components.models.torchtune_seam import CL100K_PATTERN

        mergeable_ranks = {token: rank for rank, token in enumerate(ranks)}
        encoding = Encoding("hbp_demo", pat_str=CL100K_PATTERN, mergeable_ranks=mergeable_ranks, special_tokens={})
        self._encode = encoding.encode_ordinary
        # Start and end of the header, the blank line after it, and the end of the turn.
        self._turn_tokens = {role: 3 + self._count(role) + self._count("\n\n") for role in ("user", "assistant")}

    def _count(self, text: str) -> int:
        return len(self._encode(text))

    def __call__(self, messages: Sequence[dict[str, str]]) -> int:
        """Tokens of one conversation, with begin and end of text."""
        turns = sum(self._turn_tokens[message["role"]] + self._count(message["content"].strip()) for message in messages)
        return turns + 2
