"""The benchmark's data: real chats by length, held-out ones among them, and generated needles, each tokenised once."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from quality.needles import CODES_PER_KEY, NUM_NEEDLES, NeedleChats, make_codes
from quality.text import Messages, Row, open_tokenizer, read_chats, sentences, tokenize, train_tokenizer
from torchtune.models.llama3 import Llama3Tokenizer

from hbp_tune.data import Builder, TokenStore, open_token_store
from hbp_tune.data.store.shards import cut_shards
from hbp_tune.data.tokenizing.conversation import IGNORE_INDEX
from hbp_tune.demo.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE

MAX_LEN = 8192
# Upper ends of the length buckets that held-out losses are told for.
BUCKETS = (512, 1024, 2048, 4096, 8192)
RETRIEVAL_LENS = (1024, 2048, 4096, 8192)
# Codes are the tokenizer's last ranks; special tokens follow.
CODES = range(VOCAB_SIZE - len(SPECIAL_TOKENS), VOCAB_SIZE - len(SPECIAL_TOKENS) + NUM_NEEDLES * CODES_PER_KEY)
_NUM_ROWS = "num_rows.txt"  # beside a store that is complete: how many rows it was made of
_DATA_SEED = 20261125
_MOST_BYTES = 5 * MAX_LEN  # of a chat that can have as few tokens as MAX_LEN; longer ones are not worth tokenising


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many chats there are of what.

    Args:
        train: real ones to fine-tune on, by bucket.
        held_out: real ones to measure on, by bucket.
        train_needles: generated ones to fine-tune on, from 1K to 8K tokens.
        held_out_needles: generated ones to measure on, per length.
        codes: generated ones of a hundred tokens or so, that the base model begins with.
        base_needles: generated ones of at most 512 tokens, that it goes on with.
        base_real: most of the real ones of at most 512 tokens beside these: what the others leave.
    """

    train: Mapping[int, int]
    held_out: Mapping[int, int]
    train_needles: int
    held_out_needles: int
    codes: int
    base_needles: int
    base_real: int


FULL = Sizes(
    train={512: 600, 1024: 60, 2048: 28, 4096: 12, 8192: 6},
    held_out={512: 64, 1024: 24, 2048: 16, 4096: 12, 8192: 8},
    train_needles=24,
    held_out_needles=6,
    codes=2200,
    base_needles=1000,
    base_real=2500,
)
SMALL = Sizes(
    train=dict.fromkeys(BUCKETS, 2),
    held_out=dict.fromkeys(BUCKETS, 1),
    train_needles=2,
    held_out_needles=1,
    codes=8,
    base_needles=8,
    base_real=8,
)


class Corpus:
    """Token stores of one set of data, made where they are missing.

    Args:
        data: folder of ``short.jsonl.gz`` and ``long.jsonl.gz``.
        work: folder to keep the tokenizer and the stores in.
        sizes: how many chats of what.

    Attributes:
        codes: chats of needles without filler, whose codes alone are targets, for the base model to begin with.
        base: short chats for it to go on with: real ones, whose every token is a target, and needles, whose codes are.
        train: chats to fine-tune on.
        held_out: real chats to measure on.
        needles: generated chats to measure on, `RETRIEVAL_LENS` after each other.
    """

    def __init__(self, data: Path, work: Path, sizes: Sizes) -> None:
        stores = {name: work / "stores" / name for name in ("codes", "base", "train", "held_out", "needles")}
        rows = {} if all((path / _NUM_ROWS).exists() for path in stores.values()) else _make_rows(data, work, sizes)
        self.codes, self.base, self.train, self.held_out, self.needles = (
            _open(path, rows.get(name)) for name, path in stores.items()
        )


def _open(path: Path, rows: list[Row] | None) -> TokenStore:
    if rows is not None:
        open_token_store([rows], path, Builder(num_processes=1, show_progress=False))
        (path / _NUM_ROWS).write_text(str(len(rows)))
    return TokenStore(cut_shards(int((path / _NUM_ROWS).read_text()), path), ["dataset"])


def _make_rows(data: Path, work: Path, sizes: Sizes) -> dict[str, list[Row]]:
    rng = np.random.default_rng(_DATA_SEED)
    ranks, filler = train_tokenizer(data), sentences(data)
    # Keys are one token each, behind a space.
    names = [rank[1:].decode() for rank in ranks if len(rank) > 4 and rank[:1] == b" " and rank[1:].isalpha() and rank.islower()]
    codes = make_codes(rng.choice(sorted(names), NUM_NEEDLES, replace=False).tolist(), " ".join(filler))
    # A word that has a rank is one token, whatever tokens its letters would merge to.
    ranks += [f" {code}".encode() for some in codes.values() for code in some]
    tokenizer = open_tokenizer(ranks, work / "tokenizer")

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_bos=False, add_eos=False))

    # No filler is shared between what the base model, fine-tuning and measuring see.
    makers = [
        NeedleChats(codes, part.tolist(), count_tokens, _DATA_SEED + index)
        for index, part in enumerate(np.array_split(np.array(filler, dtype=object), 3))
    ]
    lens = np.exp(rng.uniform(np.log(RETRIEVAL_LENS[0]), np.log(MAX_LEN), sizes.train_needles))
    asked = [length for length in RETRIEVAL_LENS for _ in range(sizes.held_out_needles)]
    rows: dict[str, list[Row]] = {
        "codes": [_only_codes(tokenize(tokenizer, makers[0].chat(0, 8 + index % 9))) for index in range(sizes.codes)],
        "base": [
            _only_codes(tokenize(tokenizer, makers[0].chat(index % 2 * BUCKETS[0], 8 + index // 2 % 9)))
            for index in range(sizes.base_needles)
        ],
        "train": [tokenize(tokenizer, makers[1].chat(int(length), NUM_NEEDLES)) for length in lens],
        "held_out": [],
        "needles": [tokenize(tokenizer, makers[2].chat(length, NUM_NEEDLES)) for length in asked],
    }
    for bucket, chats in _by_bucket(tokenizer, data, rng).items():
        held_out, trained = sizes.held_out[bucket], sizes.held_out[bucket] + sizes.train[bucket]
        rows["held_out"] += [tokenize(tokenizer, chat) for chat in chats[:held_out]]
        rows["train"] += [tokenize(tokenizer, chat) for chat in chats[held_out:trained]]
        if bucket == BUCKETS[0]:
            left = chats[trained : trained + sizes.base_real]
            rows["base"] += [tokenize(tokenizer, chat, train_on_input=True) for chat in left]
    return rows


def _by_bucket(tokenizer: Llama3Tokenizer, data: Path, rng: np.random.Generator) -> dict[int, list[Messages]]:
    """Sort the real chats that are short enough into buckets, in random order."""
    chats = [chat for name in ("short", "long") for chat in read_chats(data / f"{name}.jsonl.gz")]
    buckets: dict[int, list[Messages]] = {bucket: [] for bucket in BUCKETS}
    for index in rng.permutation(len(chats)):
        if sum(len(message["content"].encode()) for message in chats[index]) > _MOST_BYTES:
            continue
        length = len(tokenize(tokenizer, chats[index])["tokens"])
        if length <= MAX_LEN:
            buckets[next(bucket for bucket in BUCKETS if length <= bucket)].append(chats[index])
    return buckets


def _only_codes(row: Row) -> Row:
    """Make codes the only targets: among all the others they would be learned many times later."""
    return row | {"labels": [label if label in CODES else IGNORE_INDEX for label in row["labels"]]}
