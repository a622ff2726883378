"""``hbp data``: the data of a run as they are trained."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torchtune import config

from hbp_tune.config import build, check_config, data_settings, groups_of, run_recipe, setting
from hbp_tune.data import Builder, LoadedData, TokenStore, default_store_directory, open_data, view_sample, view_samples
from hbp_tune.data.store.views import LONG
from hbp_tune.errors import ConfigError
from hbp_tune.reporting import SampleView, print_sample
from hbp_tune.reporting.formats import write_count
from hbp_tune.reporting.pages.page_parts import document
from hbp_tune.reporting.samples import SAMPLE_STYLE, render_sample

_REQUIRED = ("output_dir", "tokenizer", "dataset")


def add_data(commands: Any) -> None:
    """Add the command's arguments."""
    parser = commands.add_parser(
        "data",
        prog="hbp data",
        usage="hbp data --config CONFIG [--row N ...] [--page FILE] [--validation] [key=value ...]",
        help="Show the data as they are trained: turns, targets, special tokens, and what is left out.",
        description="Tokenise the data of a configuration as a run does, say what they hold, and show samples turn by turn: "
        "lines that begin with + are targets, which the model learns to generate. Every key can be overridden.",
    )
    parser.add_argument("--config", required=True, help="name of a configuration (hbp ls), or path of a YAML file")
    parser.add_argument(
        "--row", action="append", default=[], metavar="N", help="show row N (LABEL:N of one of several data sets)"
    )
    parser.add_argument("--page", type=Path, help="write what is shown as a page, too")
    parser.add_argument("--validation", action="store_true", help="take dataset_val")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=argparse.SUPPRESS)
    parser.set_defaults(func=_run)


def _run(args: argparse.Namespace) -> int:
    sys.argv = ["hbp data", "--config", args.config, *args.overrides]

    @config.parse  # type: ignore[untyped-decorator]
    def show(cfg: DictConfig) -> None:
        _show(cfg, args.row, args.page, "dataset_val" if args.validation else "dataset")

    try:
        run_recipe(show)
    except SystemExit as ended:  # as torchtune's parser ends every recipe
        return int(ended.code or 0)
    return 0


def _show(cfg: DictConfig, rows: Sequence[str], page: Path | None, key: str) -> None:
    check_config(cfg, _REQUIRED)
    if not setting(cfg, key):
        raise ConfigError(f"config key {key!r} is missing: there are no such data to show")
    tokenizer = build("tokenizer", cfg.tokenizer)
    directory = Path(cfg.get("token_store_dir") or default_store_directory())
    data, store = open_data(data_settings(cfg[key], cfg.tokenizer, key), tokenizer, directory, Builder.alone())
    console = Console(highlight=False, record=False)
    if rows:
        ids = [sample_id for row in rows for sample_id in _samples_of_row(data, store, row)]
        views = [view_sample(data, store, tokenizer, sample_id, LONG) for sample_id in ids]
    else:
        _print_counts(data, store, cfg, console)
        views = view_samples(data, store, tokenizer)
    for view in views:
        console.print()
        print_sample(view, console)
    if not rows:
        console.print("\nOthers: --row N, as the tables above name them.", markup=False)
    if page:
        _write_page(page, views)
        console.print(f"Written: {page}", markup=False)


def _samples_of_row(data: LoadedData, store: TokenStore, row: str) -> list[int]:
    """Find the samples that a row gave.

    Raises:
        ConfigError: there is no such row, or it is not a sample.
    """
    label, _, number = row.rpartition(":")
    labels = list(data.labels)
    if not number.isdecimal() or (label and label not in labels):
        raise ConfigError(f"--row {row} must be a row's number, or LABEL:number; labels are {', '.join(labels)}")
    source = labels.index(label) if label else 0
    index = int(number)
    of_source = data.sources[source]
    if index >= of_source.num_rows:
        raise ConfigError(f"--row {row}: {labels[source]} has {of_source.num_rows} rows, counted from 0")
    # Rows that could not be loaded have no number among those that were.
    loaded = index if of_source.rows is None else int(np.searchsorted(of_source.rows, index))
    bad = {bad_row.row: bad_row.reason for bad_row in store.bad_rows if bad_row.source == source}
    if index in of_source.bad_rows or loaded in bad:
        raise ConfigError(f"--row {row} is not a training sample: {of_source.bad_rows.get(index) or bad[loaded]}")
    return [int(i) for i in np.flatnonzero((store.sources == source) & (store.rows == loaded))]


def _print_counts(data: LoadedData, store: TokenStore, cfg: DictConfig, console: Console) -> None:
    """Say what the data hold, what is left out of them, and which samples stand out."""
    for line in data.describe():
        console.print(line, markup=False)
    bad = data.bad_rows()
    for place, reason in list(bad.listed)[:3]:
        console.print(f"  {place}: {reason}", markup=False)
    if len(bad.listed) > 3:
        console.print(f"  and {len(bad.listed) - 3:,} more", markup=False)
    for line in _describe_cut(store, cfg):
        console.print(line, markup=False)
    share = store.num_targets / np.maximum(store.lengths - 1, 1)
    table = Table(title="Samples that stand out", title_justify="left")
    table.add_column("what")
    table.add_column("row", overflow="fold")
    for heading in ("tokens", "targets"):
        table.add_column(heading, justify="right")
    for what, order in (
        ("longest", np.argsort(-store.lengths, kind="stable")),
        ("fewest targets for the length", np.argsort(share, kind="stable")),
        ("most targets for the length", np.argsort(-share, kind="stable")),
    ):
        for rank, i in enumerate(order[:3]):
            cells = (f"{store.lengths[i]:,}", f"{store.num_targets[i]:,}")
            table.add_row(what if rank == 0 else "", _row_name(data, store, int(i)), *cells)
    console.print(table)


def _describe_cut(store: TokenStore, cfg: DictConfig) -> list[str]:
    """Say what the longest group cuts or leaves out."""
    if cfg.get("groups") == "auto" or not (cfg.get("groups") or cfg.get("groups_file")):
        return []
    longest = groups_of(cfg)[-1]
    num_over = int(np.count_nonzero(store.lengths > longest.pack_len))
    if not num_over:
        return [f"All samples fit into group {longest.name!r} of {longest.pack_len:,} tokens."]
    policy = (setting(cfg, "planner") or {}).get("overlong", "error")
    fault = f"{write_count(num_over, 'sample')} over the length of group {longest.name!r} of {longest.pack_len:,} tokens"
    return [f"{fault}; planner.overlong is {policy}."]


def _row_name(data: LoadedData, store: TokenStore, sample_id: int) -> str:
    """Name a sample's row as ``--row`` takes it."""
    source, row = data.sources[store.sources[sample_id]], int(store.rows[sample_id])
    row = row if source.rows is None else int(source.rows[row])
    return f"{source.settings.label}:{row}" if len(data.sources) > 1 else str(row)


def _write_page(path: Path, views: Sequence[SampleView]) -> None:
    """Write samples as a page.

    Raises:
        ConfigError: the file cannot be written.
    """
    sections = [f"<section>{render_sample(view)}</section>" for view in views]
    intro = (
        "<header><h1>Samples as they are trained</h1><p>What is marked green is a target, which the model learns to generate."
        "</p></header>"
    )
    try:
        path.write_text(document("Samples", [f"<style>{SAMPLE_STYLE}</style>", intro, *sections]), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {os.strerror(error.errno or 0)}") from error
