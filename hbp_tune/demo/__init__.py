"""The embedded demo: chats, a tokenizer and a tiny model, made in seconds without a download.

``prepare_demo`` writes into one directory::

    chat.jsonl                      {"source": kind, "messages": [{"role", "content"}, ...]} per line
    val.jsonl                       held-out samples of the same kinds
    tokenizer/tokenizer.model       ranks in tiktoken's format, for torchtune's own tokenizer
    tokenizer/special_tokens.json   Llama 3's special tokens
    model/config.json               and generation_config.json
    model/tokenizer.json            the same tokenizer in Hugging Face's format, with tokenizer_config.json and
                                    chat_template.jinja
    model/model.safetensors         random weights in Hugging Face's format
    demo.json                       the arguments, and what came out

Importing this package imports neither torch nor torchtune.
"""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hbp_tune.demo.samples import Sample
    from hbp_tune.demo.stdlib import Module

__all__ = ["DEFAULT_NUM_SAMPLES", "MAX_POSITIONS", "DemoError", "DemoFiles", "prepare_demo"]

DEFAULT_NUM_SAMPLES = 700
MIN_SAMPLES = 20
MIN_TOKENS = 256
# The tiny model's positions.
MAX_POSITIONS = 32768
# Raised when the same arguments would give other files.
_FORMAT = 3
# Plenty for two thousand tokens, and trained on in about a second.
_TRAINING_CHARS = 2_500_000


class DemoError(ValueError):
    """An argument that the demo cannot serve; the message gives the value, the bound and the way out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoFiles:
    """Where a demo lies and what it holds.

    Attributes:
        directory: the demo's own folder.
        created: False when a finished demo of the same arguments was there already.
        sample_tokens: for each kind of sample, every sample's tokens in chat format, ascending.
    """

    directory: Path
    created: bool
    sample_tokens: dict[str, list[int]]

    @property
    def data_file(self) -> Path:
        """The conversations to train on."""
        return self.directory / "chat.jsonl"

    @property
    def held_out_file(self) -> Path:
        """The conversations to validate on."""
        return self.directory / "val.jsonl"

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer's ranks."""
        return self.directory / "tokenizer" / "tokenizer.model"

    @property
    def special_tokens_file(self) -> Path:
        """The tokenizer's special tokens."""
        return self.directory / "tokenizer" / "special_tokens.json"

    @property
    def checkpoint_dir(self) -> Path:
        """The folder with ``config.json``, ``model.safetensors`` and the tokenizer."""
        return self.directory / "model"

    @property
    def num_samples(self) -> int:
        """Rows of ``data_file``."""
        return sum(len(lengths) for lengths in self.sample_tokens.values())

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples in chat format."""
        return sum(sum(lengths) for lengths in self.sample_tokens.values())


def prepare_demo(directory: Path, *, num_samples: int = DEFAULT_NUM_SAMPLES, max_tokens: int = 8000, seed: int = 0) -> DemoFiles:
    """Make the demo's data, tokenizer and model, unless they are there.

    The files depend on the arguments and on the Python version, whose standard library the samples are about. ``demo.json``
    says so, first as unfinished and at the very end as finished: a run that was killed is done again.

    Args:
        directory: where to write; made if missing.
        num_samples: conversations, at least ``MIN_SAMPLES``.
        max_tokens: the longest conversation in tokens, ``MIN_TOKENS`` to ``MAX_POSITIONS``.
        seed: settles which samples are drawn and the model's weights.

    Returns:
        The files, with ``created=False`` if nothing had to be done.

    Raises:
        DemoError: an argument is out of bounds, or the directory holds files of another origin.
        OSError: the directory cannot be written.
    """  # noqa: DOC502 - the functions called here raise them
    _check_arguments(num_samples, max_tokens, seed)
    wanted = {
        "format": _FORMAT,
        "python": platform.python_version(),
        "num_samples": num_samples,
        "max_tokens": max_tokens,
        "seed": seed,
    }
    found = _read_record(directory)
    if found is not None and found.get("finished") and found.get("arguments") == wanted:
        files = DemoFiles(directory=directory, created=False, sample_tokens=found["sample_tokens"])
        if all(path.is_file() for path in _written(files)):
            return files
    if found is None:
        _refuse_foreign_files(directory)

    directory.mkdir(parents=True, exist_ok=True)
    _write_record(directory, {"finished": False, "arguments": wanted})
    samples = _write_data(directory, num_samples=num_samples, max_tokens=max_tokens, seed=seed)
    sample_tokens: dict[str, list[int]] = {}
    for sample in sorted(samples, key=lambda sample: (sample.source, sample.num_tokens)):
        sample_tokens.setdefault(sample.source, []).append(sample.num_tokens)

    from hbp_tune.demo.model import TinyLlama, write_checkpoint

    write_checkpoint(directory / "model", TinyLlama(max_position_embeddings=MAX_POSITIONS), seed)
    _write_record(directory, {"finished": True, "arguments": wanted, "sample_tokens": sample_tokens})
    return DemoFiles(directory=directory, created=True, sample_tokens=sample_tokens)


def _check_arguments(num_samples: int, max_tokens: int, seed: int) -> None:
    """Check what ``prepare_demo`` was given.

    Raises:
        DemoError: an argument is out of bounds.
    """
    if num_samples < MIN_SAMPLES:
        raise DemoError(f"num_samples={num_samples} must be at least {MIN_SAMPLES}; the default is {DEFAULT_NUM_SAMPLES}")
    if not MIN_TOKENS <= max_tokens <= MAX_POSITIONS:
        raise DemoError(
            f"max_tokens={max_tokens} must lie between {MIN_TOKENS} and {MAX_POSITIONS}, the tiny model's positions; "
            "try 8000, or 32000 for a longer tail"
        )
    if not 0 <= seed < 2**63:
        raise DemoError(f"seed={seed} must lie between 0 and 2**63 - 1; the default is 0")


def _written(files: DemoFiles) -> list[Path]:
    model = [
        files.checkpoint_dir / name for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
    ]
    return [files.data_file, files.held_out_file, files.tokenizer_file, files.special_tokens_file, *model]


def _refuse_foreign_files(directory: Path) -> None:
    """Without a ``demo.json`` a data, tokenizer or model folder is somebody else's work.

    Raises:
        DemoError: there is one.
    """
    for name in ("chat.jsonl", "val.jsonl", "tokenizer", "model", "demo.json"):
        if (directory / name).exists():
            raise DemoError(f"directory={str(directory)!r} has a {name!r} that the demo did not write; choose another directory")


def _read_record(directory: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((directory / "demo.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return record if isinstance(record, dict) and "arguments" in record else None


def _write_record(directory: Path, record: dict[str, Any]) -> None:
    temporary = directory / "demo.json.tmp"
    temporary.write_bytes((json.dumps(record) + "\n").encode())
    os.replace(temporary, directory / "demo.json")


def _write_data(directory: Path, *, num_samples: int, max_tokens: int, seed: int) -> "list[Sample]":
    from hbp_tune.demo.samples import choose_held_out, choose_samples
    from hbp_tune.demo.stdlib import read_modules
    from hbp_tune.demo.tokenizer import ChatCounter, train_ranks, write_hf_tokenizer, write_tokenizer

    modules = read_modules()
    ranks = train_ranks(_training_texts(modules))
    write_tokenizer(directory / "tokenizer", ranks)
    write_hf_tokenizer(directory / "model", ranks)
    count_tokens = ChatCounter(ranks)
    samples = choose_samples(modules, count_tokens, num_samples=num_samples, max_tokens=max_tokens, seed=seed)
    num_held_out = max(MIN_SAMPLES, num_samples // 10)
    held_out = choose_held_out(samples, modules, count_tokens, num_samples=num_held_out, max_tokens=max_tokens, seed=seed + 1)
    for name, rows in (("chat.jsonl", samples), ("val.jsonl", held_out)):
        lines = (json.dumps(sample.row(), ensure_ascii=False) + "\n" for sample in rows)
        (directory / name).write_bytes("".join(lines).encode())
    return samples


def _training_texts(modules: "Sequence[Module]") -> list[str]:
    """The same texts whatever the arguments: one Python version has one tokenizer."""
    from hbp_tune.demo.samples import hash_order

    texts: list[str] = []
    num_chars = 0
    for module in sorted(modules, key=lambda module: hash_order(0, "tokenizer", module.name)):
        if num_chars >= _TRAINING_CHARS:
            break
        texts.append(module.code)
        num_chars += len(module.code)
    return texts
