"""Whether balanced packing trains as well as one-length packing: held-out loss and retrieval by length, over seeds.

    python benchmarks/bench_quality.py --data DIR --work DIR                       # hours; goes on where it was cut off
    python benchmarks/bench_quality.py --data DIR --work DIR --small        # a minute: to see that it runs

``--data`` has ``short.jsonl.gz`` and ``long.jsonl.gz``: chats as ``{"messages": [{"role", "content"}, ...]}``. ``--work`` keeps
tokens, the base model and one JSON line per run; several processes may share it, each with its own runs. One process trains
what the plan gives to 4 ranks, pack after pack, with the weights of the whole step: the gradient of the distributed run.

Every method starts from the same base model, which has seen 512 tokens at most and finds what it is asked for in them, and
trains on the same samples once: real chats to 8K tokens, and chats with codes hidden in 1K to 8K tokens of text.
"""

import argparse
from pathlib import Path

import torch
from quality.corpus import FULL, SMALL, Corpus
from quality.report import by_setting, methods_table, verdicts_table
from quality.runs import METHODS, default_run, train_missing


def make_parser(about: str | None) -> argparse.ArgumentParser:
    """Make the parser of what this benchmark and ``bench_normalizers.py`` have in common."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of short.jsonl.gz and long.jsonl.gz")
    parser.add_argument("--work", type=Path, required=True, help="folder for tokens, base model and finished runs")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting")
    parser.add_argument("--small", action="store_true", help="a few samples of each kind, to see that it runs")
    parser.add_argument("--threads", type=int, default=1)
    return parser


def prepare(arguments: argparse.Namespace) -> Corpus:
    """Make or open the data that the arguments ask for."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    return Corpus(arguments.data, arguments.work, SMALL if arguments.small else FULL)


def main() -> None:
    arguments = make_parser(__doc__).parse_args()
    corpus = prepare(arguments)
    runs = [default_run(method, seed) for seed in range(arguments.seeds) for method in METHODS]
    finished = by_setting(train_missing(runs, corpus, arguments.work))
    print(methods_table(finished))
    print(verdicts_table(finished))


if __name__ == "__main__":
    main()
