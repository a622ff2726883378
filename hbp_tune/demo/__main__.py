"""``python -m hbp_tune.demo``: make the demo's files and say what they hold."""

import argparse
import logging
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hbp_tune.demo import DEFAULT_NUM_SAMPLES, MAX_POSITIONS, DemoError, DemoFiles, prepare_demo

DEFAULT_DIR = "hbp_demo"
_RUN = "tune run --nproc_per_node 2 hbp_full_finetune_distributed --config demo/tiny_llama_cpu"
# Upper ends, in tokens, of the rows of the printed table.
_LENGTH_ENDS = (256, 1024, 4096, 8192, 16384, MAX_POSITIONS)


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The command's arguments, under the name that was typed."""
    parser = argparse.ArgumentParser(
        prog=prog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""\
Make a complete fine-tuning demo without a download: chat samples about the Python
standard library, from its sources on this machine; a tokenizer trained on them, in
Llama 3's chat format; and a tiny Llama 3 checkpoint with random weights.

The lengths are those of real mixed data: nineteen samples in twenty are short, and
the few long ones hold about half of the tokens. That is the mix that Hierarchical
Balance Packing balances, and plain packing does not.""",
        epilog=f"""\
examples:
  {prog:<30} {DEFAULT_NUM_SAMPLES} samples of up to 8,000 tokens in {DEFAULT_DIR}/
  {prog + " --max-tokens 32000":<30} a tail of up to 32,000 tokens
  {prog + " --num-samples 200":<30} less to train on

The same arguments under the same Python give the same bytes. A finished demo is not
made twice; other arguments replace it.""",
    )
    parser.add_argument("--dir", type=Path, default=Path(DEFAULT_DIR), help="where to write (default: %(default)s)")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=8000,
        help=f"the longest sample in tokens, up to {MAX_POSITIONS}; the tail grows with it (default: %(default)s)",
    )
    parser.add_argument("--num-samples", type=int, default=DEFAULT_NUM_SAMPLES, help="conversations (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws other samples and other weights (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None, prog: str = "python -m hbp_tune.demo") -> int:
    """Run the command; returns the exit status, 2 for arguments or a directory that cannot serve."""
    args = build_parser(prog).parse_args(argv)
    # torchao says at import which of its kernels it leaves out; the demo uses none.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    console = Console(highlight=False)
    start = time.perf_counter()
    try:
        files = prepare_demo(args.dir, num_samples=args.num_samples, max_tokens=args.max_tokens, seed=args.seed)
    except DemoError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"directory={str(args.dir)!r} cannot be written ({error.strerror or error}); choose another with --dir")
    _report(console, files, time.perf_counter() - start)
    return 0


def _fail(message: str) -> int:
    sys.stderr.write(f"error: {message}\n")
    return 2


def _report(console: Console, files: DemoFiles, wall_s: float) -> None:
    if files.created:
        console.print(f"Made {files.directory} in {wall_s:.1f} s.", markup=False, soft_wrap=True)
    else:
        console.print(f"{files.directory} is up to date; nothing was done.", markup=False, soft_wrap=True)
    console.print(_length_table(files))
    console.print(f"data       {files.data_file}", markup=False, soft_wrap=True)
    console.print(f"held out   {files.held_out_file}", markup=False, soft_wrap=True)
    console.print(f"tokenizer  {files.tokenizer_file.parent}", markup=False, soft_wrap=True)
    console.print(f"model      {files.checkpoint_dir}", markup=False, soft_wrap=True)
    override = "" if files.directory == Path(DEFAULT_DIR) else f" demo_dir={files.directory}"
    console.print(f"\nNext:\n  {_RUN}{override}", markup=False, soft_wrap=True)


def _length_table(files: DemoFiles) -> Table:
    lengths = [length for kind in files.sample_tokens.values() for length in kind]
    table = Table()
    table.add_column("sample length")
    for heading in ("samples", "share", "tokens", "share"):
        table.add_column(heading, justify="right")
    low = 0
    for high in _LENGTH_ENDS:
        held = [length for length in lengths if low < length <= high]
        if held:
            samples_share, tokens_share = len(held) / len(lengths), sum(held) / sum(lengths)
            table.add_row(
                f"{low + 1:,} to {high:,}", f"{len(held):,}", f"{samples_share:.1%}", f"{sum(held):,}", f"{tokens_share:.1%}"
            )
        low = high
    table.add_section()
    table.add_row("all", f"{len(lengths):,}", "", f"{sum(lengths):,}", "")
    return table


if __name__ == "__main__":
    sys.exit(main())
