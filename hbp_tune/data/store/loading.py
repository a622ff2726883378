"""From the configuration's data sets to a token store: load them, name the store by all that decides it, open it."""

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf

from hbp_tune.config.building import build
from hbp_tune.config.folders import writing_token_store
from hbp_tune.config.sources import DatasetSettings, DataSettings, matching_files
from hbp_tune.data.chats.json_lines import CleanFile, clean, clean_folder, is_json_lines
from hbp_tune.data.store.estimate import CharacterEstimate, SampleCounts, estimate_lengths
from hbp_tune.data.store.sources import DataSource, LoadedData
from hbp_tune.data.store.store import Builder, TokenStore, digest_files, no_watch, open_token_store, store_key
from hbp_tune.errors import ConfigError, DataError

# What a disk, or its owner, has against writing.
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT)


def open_data(settings: DataSettings, tokenizer: Any, directory: Path, builder: Builder) -> tuple[LoadedData, TokenStore]:
    """Load a run's data sets and open their token store, made first where it is not there.

    Args:
        settings: of the data sets and the tokenizer.
        tokenizer: built.
        directory: of all token stores.
        builder: what this process does for the store.
    """
    digests = digest_files([*(file for one in settings.datasets for file in one.files), *settings.tokenizer_files])
    sources = load_sources(settings, tokenizer, directory, digests, builder.watch)
    samples = [source.samples for source in sources]
    # Weights and labels are not among them: they decide no token.
    parts = [*(one.node for one in settings.datasets), settings.tokenizer, [len(rows) for rows in samples]]
    names = [one.key for one in settings.datasets]
    with writing_token_store(directory):
        store = open_token_store(samples, directory / store_key(parts, digests), builder, names)
    return LoadedData(sources=sources, counts=store), store


def estimate_data(settings: DataSettings, directory: Path) -> tuple[LoadedData, SampleCounts]:
    """Load a run's data sets, and estimate the lengths of their samples without the tokenizer; see `estimate_lengths`."""
    digests = digest_files([file for one in settings.datasets for file in one.files])
    tokenizer = CharacterEstimate((settings.tokenizer or {}).get("max_seq_len"))
    sources = load_sources(settings, tokenizer, directory, digests)
    counts = estimate_lengths([source.samples for source in sources], [one.key for one in settings.datasets])
    return LoadedData(sources=sources, counts=counts), counts


def load_sources(
    settings: DataSettings,
    tokenizer: Any,
    directory: Path,
    digests: Mapping[Path, str] | None = None,
    watch: Callable[[int], None] = no_watch,
) -> tuple[DataSource, ...]:
    """Load a run's data sets, untokenised; see `load_source`."""
    if digests is None:
        digests = digest_files([file for one in settings.datasets for file in one.files])
    return tuple(load_source(one, tokenizer, directory, digests, watch) for one in settings.datasets)


def load_source(
    settings: DatasetSettings, tokenizer: Any, directory: Path, digests: Mapping[Path, str], watch: Callable[[int], None]
) -> DataSource:
    """Load a data set by its component; where files of JSON lines cannot be loaded, without their bad lines.

    Args:
        settings: of the data set.
        tokenizer: or whatever its component takes in its place.
        directory: for copies of files without their bad lines.
        digests: of its files.
        watch: called with a growing number.

    Returns:
        The data set; one that cannot be loaded even so is the `ConfigError` of the first attempt.
    """
    error: ConfigError | None = None
    for same_types in _attempts(settings, directory, digests):
        files = []
        if same_types is not None:
            with writing_token_store(directory):
                files = [clean(file, digests[file], directory, same_types=same_types, watch=watch) for file in settings.files]
        if files and not any(file.bad_rows for file in files):
            continue
        try:
            return _load(settings, tokenizer, files)
        except ConfigError as failure:
            error = error or failure
    if error is None:  # there were copies of files that need none: another version of the loader made them
        return _load(settings, tokenizer, [])
    raise error


def _attempts(settings: DatasetSettings, directory: Path, digests: Mapping[Path, str]) -> Sequence[bool | None]:
    """Say what to leave out: nothing, what cannot be parsed (the loader can mix some types), what has other types, too.

    Once a data set needed copies, later runs begin with them rather than by failing again.
    """
    # Our own data set reads line by line: its bad lines are bad rows, and a split counts them.
    reads_lines = str(settings.node.get("_component_")).endswith("ChatDataset")
    if reads_lines or not settings.files or not all(is_json_lines(file) for file in settings.files):
        return (None,)
    for same_types, attempts in ((True, (True,)), (False, (False, True))):
        if all(clean_folder(digests[file], directory, same_types).exists() for file in settings.files):
            return attempts
    return (None, False, True)


def _load(settings: DatasetSettings, tokenizer: Any, files: Sequence[CleanFile]) -> DataSource:
    node = OmegaConf.create(settings.node)
    if not files:
        return DataSource(settings=settings, samples=_build(settings.key, node, tokenizer))
    copies = {original: file.path for original, file in zip(settings.files, files, strict=True) if len(file.rows)}
    node.data_files = _replaced(settings.node["data_files"], copies)
    samples = _build(settings.key, node, tokenizer)
    rows, bad_rows = _joined(files)
    # A split or a filter may have taken part of the rows: then no row's place is known, but bad lines are still counted.
    return DataSource(settings=settings, samples=samples, rows=rows if len(samples) == len(rows) else None, bad_rows=bad_rows)


def _build(key: str, node: DictConfig, tokenizer: Any) -> Any:
    """Build a data set's component.

    Raises:
        DataError: Hugging Face's cache, where it keeps what it has read, cannot be written.
        ConfigError: anything else is wrong.
    """
    try:
        return build(key, node, tokenizer)
    except ConfigError as error:
        cause = error.__cause__
        while cause:
            if isinstance(cause, OSError) and cause.errno in _REFUSED and _is_in_cache(cause.filename):
                raise DataError(
                    f"{key}: Hugging Face's cache cannot be written: {cause.filename or datasets.config.HF_DATASETS_CACHE}: "
                    f"{cause.strerror}; set the environment's HF_HOME or HF_DATASETS_CACHE to a folder that can"
                ) from error
            cause = cause.__cause__ or cause.__context__
        raise


def _is_in_cache(name: str | bytes | None) -> bool:
    caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.HF_CACHE_HOME)
    return name is None or any(Path(os.fsdecode(name)).is_relative_to(cache) for cache in caches)


def _replaced(data_files: Any, copies: Mapping[Path, Path]) -> Any:
    """Put copies of files in their place; a file without one, as no line of it is good, goes."""
    if isinstance(data_files, Mapping):
        return {split: _replaced(names, copies) for split, names in data_files.items()}
    names = [data_files] if isinstance(data_files, str) else data_files
    return [str(copies[file]) for name in names for file in matching_files(name) if file in copies]


def _joined(files: Sequence[CleanFile]) -> tuple[NDArray[np.int32], dict[int, str]]:
    """Count rows through all files."""
    rows: list[NDArray[np.int32]] = []
    bad_rows: dict[int, str] = {}
    start = 0
    for file in files:
        rows.append(file.rows + np.int32(start))
        bad_rows |= {start + row: reason for row, reason in file.bad_rows.items()}
        start += len(file.rows) + len(file.bad_rows)
    return np.concatenate(rows), bad_rows
