"""Rows to tokens: a checkpoint's own template beside torchtune's fixed formats, on the same rows in one run.

    python benchmarks/bench_tokenise.py                       100,000 rows of the demo's texts, a few minutes
    python benchmarks/bench_tokenise.py --chats chats.jsonl --model DIR --tiktoken DIR/original/tokenizer.model

Builds a token store of the rows by each way in turn, in a process of its own, ``--rounds`` times. Printed is a JSON line per
build: seconds of loading the data, of building the store and of both, tokens, and the high water of a process's own memory.
"""

import argparse
import itertools
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lines import say

WAYS = ("torchtune", "template")
GIB = 2**30


def write_rows(sources: list[Path], path: Path, num_rows: int) -> None:
    """Write so many conversations, from the start again where there are fewer."""
    lines = [json.loads(line)["messages"] for source in sources for line in source.open(encoding="utf-8")]
    with path.open("w", encoding="utf-8") as stream:
        for messages in itertools.islice(itertools.cycle(lines), num_rows):
            stream.write(json.dumps({"messages": messages}) + "\n")


def build(way: str, rows: Path, model: Path, ranks: Path, special: str, directory: Path) -> dict[str, Any]:
    """Build a store of the rows by one way."""
    logging.getLogger("torchao").setLevel(logging.ERROR)
    from torchtune.datasets import chat_dataset
    from torchtune.models.llama3 import llama3_tokenizer

    from hbp_tune.data import Builder, ChatDataset, HFTokenizer, open_token_store

    start = time.perf_counter()
    if way == "torchtune":
        tokenizer = llama3_tokenizer(str(ranks), special or None)
        files = {"source": "json", "data_files": str(rows), "split": "train"}
        data = chat_dataset(tokenizer, conversation_column="messages", conversation_style="openai", **files)
    else:
        data = ChatDataset(HFTokenizer(str(model)), data_files=str(rows))
    loaded = time.perf_counter()
    store = open_token_store([data], directory, Builder(num_processes=len(os.sched_getaffinity(0)), show_progress=False))
    built = time.perf_counter()
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "way": way,
        "rows": len(store),
        "tokens": int(store.lengths.sum(dtype="int64")),
        "targets": int(store.num_targets.sum(dtype="int64")),
        "load_s": round(loaded - start, 2),
        "build_s": round(built - loaded, 2),
        "total_s": round(built - start, 2),
        "peak_gib": round(peak * 1024 / GIB, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--chats", type=Path, nargs="+", help="JSON lines of messages; the demo's by default")
    parser.add_argument("--model", type=Path, help="folder of a Llama 3 checkpoint's tokenizer; the demo's by default")
    parser.add_argument("--tiktoken", type=Path, help="the same tokenizer in torchtune's format")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--special", default="", help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(
            json.dumps(
                build(arguments.way, *arguments.chats, arguments.model, arguments.tiktoken, arguments.special, arguments.store)
            )
        )
        return
    with tempfile.TemporaryDirectory() as temporary:
        measure(arguments, Path(temporary))


def measure(arguments: argparse.Namespace, directory: Path) -> None:
    env = os.environ | {"TIKTOKEN_CACHE_DIR": "", "HF_DATASETS_CACHE": str(directory / "cache")}
    demo = directory / "demo"
    subprocess.run([sys.executable, "-m", "hbp_tune.demo", "--dir", str(demo)], env=env, capture_output=True, check=True)
    model, ranks, special = demo / "model", demo / "tokenizer/tokenizer.model", str(demo / "tokenizer/special_tokens.json")
    if arguments.model:
        model, ranks, special = arguments.model, arguments.tiktoken, ""
    rows = directory / "rows.jsonl"
    write_rows(arguments.chats or [demo / "chat.jsonl"], rows, arguments.rows)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for round_number in range(arguments.rounds):
        for way in WAYS:
            store = directory / f"store_{way}_{round_number}"
            command = [sys.executable, __file__, "--way", way, "--chats", str(rows), "--model", str(model)]
            command += ["--tiktoken", str(ranks), "--special", special, "--store", str(store)]
            env["HF_DATASETS_CACHE"] = str(directory / f"cache_{way}_{round_number}")
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr[-4000:])
            line = done.stdout.splitlines()[-1]
            print(line, flush=True)
            seconds[way].append(json.loads(line)["total_s"])
    ratio = statistics.median(seconds["template"]) / statistics.median(seconds["torchtune"])
    say({"template_over_torchtune": round(ratio, 3)})


if __name__ == "__main__":
    main()
