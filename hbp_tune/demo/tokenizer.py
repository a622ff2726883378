"""A small tokenizer with Llama 3's special tokens and chat format, trained on the demo's own text.

It is written twice: beside the model as any checkpoint on the hub has it (``tokenizer.json``, ``tokenizer_config.json`` and
``chat_template.jinja``), and as torchtune's ``llama3_tokenizer`` reads it (``tokenizer.model``, the ranks in tiktoken's format,
and ``special_tokens.json``).
"""

import base64
import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hbp_tune.demo import DemoError

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

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


# Llama 3's chat format: a header for each turn, and no system turn of its own but for tools.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- if tools %}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\nCall one by {"name": ..., "parameters": ...}:' }}
    {%- for tool in tools %}
        {{- '\\n' + tool | tojson }}
    {%- endfor %}
    {{- '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {%- set role = 'ipython' if message.role == 'tool' else message.role %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
    {%- if message.reasoning_content %}
        {{- '<think>\\n' + message.reasoning_content | trim + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message.content | trim }}
    {%- for call in message.tool_calls or [] %}
        {{- '{"name": "' + call.function.name + '", "parameters": ' + call.function.arguments | tojson + '}' }}
    {%- endfor %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


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
    from tokenizers import Tokenizer, models, trainers

    from hbp_tune.data.tokenizing.byte_pairs import byte_letters

    num_ranks = vocab_size - len(SPECIAL_TOKENS)
    if num_ranks < 256:
        smallest = 256 + len(SPECIAL_TOKENS)
        raise DemoError(
            f"vocab_size={vocab_size} must be at least {smallest}: 256 bytes and {len(SPECIAL_TOKENS)} special tokens"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = _words()
    trainer = trainers.BpeTrainer(
        vocab_size=num_ranks, initial_alphabet=sorted(byte_letters()), show_progress=False, special_tokens=[]
    )
    bpe.train_from_iterator(texts, trainer)
    alphabet = byte_letters()
    vocab = sorted(bpe.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
    ranks = [bytes(alphabet[letter] for letter in token) for token, _ in vocab]
    if len(ranks) < num_ranks:
        raise DemoError(f"the texts give {len(ranks)} tokens, vocab_size={vocab_size} needs {num_ranks}; give more text")
    assert sorted(ranks[:256]) == [bytes([byte]) for byte in range(256)]
    return ranks


def _words() -> "PreTokenizer":
    """The split that torchtune's tokenizer makes before it merges: a token that crosses it would never be used."""
    from tokenizers import Regex, pre_tokenizers

    from hbp_tune.models.torchtune_seam import CL100K_PATTERN

    split = pre_tokenizers.Split(Regex(CL100K_PATTERN), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def write_hf_tokenizer(directory: Path, ranks: Sequence[bytes]) -> None:
    """Write the tokenizer and its chat template as Hugging Face checkpoints have them."""
    from tokenizers import Tokenizer, decoders, models

    from hbp_tune.data.tokenizing.byte_pairs import byte_letters

    letter_of = {byte: letter for letter, byte in byte_letters().items()}
    vocab = {"".join(letter_of[byte] for byte in token): rank for rank, token in enumerate(ranks)}
    # Every two tokens that make one, in the order of the ranks: what tiktoken joins.
    merges = [
        (token[:cut], token[cut:])
        for token in vocab
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = _words()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    assert tokenizer.token_to_id(SPECIAL_TOKENS[0]) == len(ranks)
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "pad_token": "<|finetune_right_pad_id|>",
        "clean_up_tokenization_spaces": False,
    }
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "chat_template.jinja": CHAT_TEMPLATE,
    }
    for name, text in files.items():
        (directory / name).write_bytes(text.encode())


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
    """Counts a conversation's tokens in chat format; the same number as the chat template gives.

    torchtune's ``encode`` walks through the text letter by letter to guard against long runs without white space. Source code
    has none, and without that walk the modules of a whole standard library are counted in seconds.

    Args:
        ranks: as from ``train_ranks``.
    """

    def __init__(self, ranks: Sequence[bytes]) -> None:
        from tiktoken import Encoding

        from hbp_tune.models.torchtune_seam import CL100K_PATTERN

        mergeable_ranks = {token: rank for rank, token in enumerate(ranks)}
        encoding = Encoding("hbp_demo", pat_str=CL100K_PATTERN, mergeable_ranks=mergeable_ranks, special_tokens={})
        self._encode = encoding.encode_ordinary
        # Start and end of the header, the blank line after it, and the end of the turn.
        self._turn_tokens = {role: 3 + self._count(role) + self._count("\n\n") for role in ("user", "assistant")}

    def _count(self, text: str) -> int:
        return len(self._encode(text))

    def __call__(self, messages: Sequence[dict[str, str]]) -> int:
        """Tokens of one conversation, with the beginning of the text."""
        turns = sum(self._turn_tokens[message["role"]] + self._count(message["content"].strip()) for message in messages)
        return turns + 1
