"""Data at scale: many short chats from JSON lines to the first training steps on two ranks, cold and warm.

    python benchmarks/bench_data.py                    20,000 rows, half a minute
    python benchmarks/bench_data.py --rows 1000000

Makes the rows from the demo's texts, then starts the full recipe under torchrun with the demo's tokenizer and tiny model, once
with no token store (cold) and once more (warm). Printed is a JSON line per run and rank: seconds of importing, of the setup's
parts, and from entering the recipe to the end of the first step; the loader's share of the step time after that; and memory.
``peak_gib`` is the high water of resident memory, file-backed pages included, which are the page cache's and shared; of it
``peak_anonymous_gib`` is the process's own (sampled ten times a second). At last torchtune's ``PackedDataset`` gets the same rows
until it needs more memory than the cold run's rank did, or more time: it does not train meanwhile.
"""

import argparse
import importlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lines import say

STEPS = 20
GIB = 2**30
PACK_LEN = 8192
LONG_EVERY = 500


def memory_gib(field: str) -> float:
    """Read a field of this process's memory: VmHWM, RssAnon, RssFile."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / GIB for line in lines if line.startswith(field))


def write_rows(chats: Path, path: Path, num_rows: int) -> None:
    """Write conversations of about 130 tokens, every 500th of some thousands, from snippets of the demo's texts."""
    draw = random.Random(0)
    texts = [message["content"] for line in chats.open() for message in json.loads(line)["messages"]]
    snippets = [text[i : i + 200] for text in texts for i in range(0, len(text), 200)]
    quoted = [json.dumps(snippet) for snippet in draw.sample(snippets, min(5000, len(snippets)))]
    with path.open("w") as stream:
        for row in range(num_rows):
            user, answer = draw.choice(quoted), draw.choice(quoted)
            if row % LONG_EVERY == LONG_EVERY - 1:
                answer = json.dumps(" ".join(draw.choices(snippets, k=50)))
            stream.write(
                f'{{"id": {row}, "messages": [{{"role": "user", "content": {user}}}, '
                f'{{"role": "assistant", "content": {answer}}}]}}\n'
            )


def chat_node(path: Path) -> dict[str, Any]:
    return {
        "source": "json",
        "data_files": str(path),
        "conversation_column": "messages",
        "conversation_style": "openai",
        "split": "train",
    }


def train(case: str, entered_s: float, import_s: float) -> None:
    """Run the recipe as one rank, and print what it took."""
    from torchtune import config

    from hbp_tune.recipes.hbp_full_finetune_distributed import HBPFullFinetuneRecipeDistributed

    class Measured(HBPFullFinetuneRecipeDistributed):
        def __init__(self, cfg: Any) -> None:
            self.seconds: dict[str, float] = {}
            self.step_ends: list[float] = []
            self.waits: list[float] = []
            super().__init__(cfg)

        def _epoch_batches(self, epoch: int) -> Iterator[Any]:
            batches = super()._epoch_batches(epoch)
            while True:
                start = time.perf_counter()
                batch = next(batches, None)
                self.waits.append(time.perf_counter() - start)
                if batch is None:
                    return
                yield batch

        def _log(self, *args: Any, **kwargs: Any) -> None:
            super()._log(*args, **kwargs)
            self.step_ends.append(time.perf_counter())

    for name in ("_setup_decoder", "_setup_data", "_setup_plan", "_load_weights"):
        setattr(Measured, name, _timed(name, getattr(HBPFullFinetuneRecipeDistributed, name)))

    peak = [0.0]
    threading.Thread(target=_sample_memory, args=(peak,), daemon=True).start()

    @config.parse
    def main(cfg: Any) -> None:
        recipe = Measured(cfg)
        recipe.setup(cfg)
        ready_s = time.perf_counter()
        recipe.train()
        steps_s = recipe.step_ends[-1] - recipe.step_ends[0]
        first_batches = len(recipe.waits) // len(recipe.step_ends)
        line = {
            "case": case,
            "rank": recipe.rank,
            "rows": len(recipe._store),
            "tokens": int(recipe._store.lengths.sum(dtype="int64")),
            "import_s": import_s,
            **recipe.seconds,
            "setup_s": ready_s - entered_s,
            "first_step_s": recipe.step_ends[0] - entered_s,
            "later_step_s": steps_s / (len(recipe.step_ends) - 1),
            "data_wait_ratio": sum(recipe.waits[first_batches:]) / steps_s,
            "peak_gib": memory_gib("VmHWM"),
            "peak_anonymous_gib": peak[0],
            "file_backed_now_gib": memory_gib("RssFile"),
            "peak_of_a_child_gib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / GIB,
        }
        print(
            json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in line.items()}), flush=True
        )
        recipe.cleanup()

    main()


def _timed(name: str, method: Any) -> Any:
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = method(self, *args, **kwargs)
        self.seconds[f"{name.strip('_')}_s"] = time.perf_counter() - start
        return result

    return wrapper


def _sample_memory(peak: list[float]) -> None:
    while True:
        peak[0] = max(peak[0], memory_gib("RssAnon"))
        time.sleep(0.1)


class Limited:
    """Rows of a data set until memory or time is used up."""

    def __init__(self, rows: Any, most_gib: float, most_s: float) -> None:
        self.rows, self.most_gib, self.limit_s = rows, most_gib, time.perf_counter() + most_s
        self.num_read, self.stopped_by = 0, "nothing"

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Any]:
        for row in range(len(self.rows)):
            if row % 100 == 0 and memory_gib("RssAnon") > self.most_gib:
                self.stopped_by = "memory"
                return
            if time.perf_counter() > self.limit_s:
                self.stopped_by = "time"
                return
            self.num_read += 1
            yield self.rows[row]


def pack(data: Path, demo: Path, most_gib: float, most_s: float) -> None:
    """Fill torchtune's packed data set, and print how far it came."""
    from torchtune.datasets import PackedDataset, chat_dataset
    from torchtune.models.llama3 import llama3_tokenizer

    tokenizer = llama3_tokenizer(str(demo / "tokenizer/tokenizer.model"), str(demo / "tokenizer/special_tokens.json"))
    start = time.perf_counter()
    rows = Limited(chat_dataset(tokenizer, **chat_node(data)), most_gib, most_s)
    packs = PackedDataset(rows, max_seq_len=PACK_LEN)
    line = {"rows_packed": rows.num_read, "stopped_by": rows.stopped_by, "packs": len(packs)}
    line |= {"pack_s": round(time.perf_counter() - start, 1), "anonymous_gib": round(memory_gib("RssAnon"), 3)}
    say({"case": "PackedDataset", "rank": "each", **line})


def run(command: list[str], env: dict[str, str]) -> list[dict[str, Any]]:
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.stderr[-4000:])
    lines = [line for line in result.stdout.splitlines() if line.startswith('{"case"')]
    print("\n".join(sorted(lines)), flush=True)
    return [json.loads(line) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--dir", type=Path, help="where rows and stores are made, and kept; by default a folder that is removed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure(arguments.rows, arguments.dir or Path(temporary))


def measure(num_rows: int, directory: Path) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(directory / "cache"), "TIKTOKEN_CACHE_DIR": ""}
    demo, data = directory / "demo", directory / "rows.jsonl"
    subprocess.run([sys.executable, "-m", "hbp_tune.demo", "--dir", str(demo)], env=env, capture_output=True, check=True)
    start = time.perf_counter()
    write_rows(demo / "chat.jsonl", data, num_rows)
    say({"case": "rows", "gib": data.stat().st_size / GIB, "write_s": time.perf_counter() - start})
    config = Path(__file__).parents[1] / "configs/demo/tiny_llama_cpu.yaml"
    overrides = [
        f"dataset.data_files={data}",
        *(f"{key}={value}" for key, value in {"demo_dir": demo, "output_dir": directory / "out"}.items()),
        *(f"token_store_dir={directory / 'stores'}", f"max_steps={STEPS}", "save_every_n_steps=null", "num_workers=1"),
        *("dataset_val=null", "run_val_every_n_steps=null"),
    ]
    results = {}
    for case in ("cold", "warm"):
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, "--case", case]
        results[case] = run([sys.executable, *command, "--config", str(config), *overrides], env)
    cold = results["cold"][0]
    limits = [str(cold["peak_anonymous_gib"]), str(cold["setup_data_s"])]
    run([sys.executable, __file__, "--pack", str(data), str(demo), *limits], env)


if __name__ == "__main__":
    if "--case" in sys.argv:
        case = sys.argv.pop(sys.argv.index("--case") + 1)
        sys.argv.remove("--case")
        started_s = time.perf_counter()
        importlib.import_module("hbp_tune.recipes.hbp_full_finetune_distributed")
        now_s = time.perf_counter()
        train(case, entered_s=now_s, import_s=now_s - started_s)
    elif "--pack" in sys.argv:
        pack(Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5]))
    else:
        main()
