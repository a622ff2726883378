"""Real training time of plans, side by side: naive one-length packing, and both modes of the planner.

    python -m hbp_tune.demo && python benchmarks/bench_modes.py
    python benchmarks/bench_modes.py 'dataset.data_files=[short.jsonl.gz,long.jsonl.gz]' planner.overlong=drop

Two gloo ranks with one thread each, so that a waiting rank's core stays idle, as a GPU's would; every pack on one rank, so
that there are two replicas to balance. Each case trains the same samples by ``tune run``, in turn, several times; printed is
a JSON line per run with the seconds of its steps, the first two left out, per million tokens. Arguments override the demo's
configuration.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from lines import say

REPEATS = 3
PLANNER = "planner._component_=hbp_tune.components.BalancePlanner planner.mode={} planner.tokens_per_step=16384"
PAPER = PLANNER.format("paper")
GROUP = "{{_component_: hbp_tune.components.PackingGroup, name: {}, pack_len: {}}}"
ONE_LENGTH = f"groups=[{GROUP.format('all', 8192)}]"
TWO_LENGTHS = f"groups=[{GROUP.format('short', 1024)},{GROUP.format('long', 8192)}]"
CASES = {
    "isf, one length": [*PAPER.split(), "planner.fill=False", "planner.sort_by=null", ONE_LENGTH],
    "paper, attention": [*PAPER.split(), TWO_LENGTHS],
    "paper, cost": [*PAPER.split(), "planner.sort_by=cost", TWO_LENGTHS],
    "cost": [*PLANNER.format("cost").split(), TWO_LENGTHS],
}
# Nothing but training in the timed steps.
COMMON = ["curriculum.steps=0", "save_every_n_steps=null", "log_every_n_steps=1"]


def run(case: str, overrides: list[str]) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as directory:
        arguments = [*COMMON, *CASES[case], *overrides, f"output_dir={directory}"]
        command = ["tune", "run", "--nproc_per_node", "2", "hbp_full_finetune_distributed", "--config", "demo/tiny_llama_cpu"]
        result = subprocess.run(
            [*command, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        if result.returncode:
            sys.exit(next((line for line in result.stderr.splitlines() if line.startswith("error:")), result.stderr[-2000:]))
        log = next(Path(directory, "logs").glob("*.txt")).read_text()
    steps = [
        (int(re.search(r"num_tokens:(\d+)", line)[1]), float(re.search(r"tokens_per_second_per_gpu:([\d.]+)", line)[1]))
        for line in log.splitlines()
        if " num_tokens:" in line
    ]
    seconds = sum(tokens / rate / 2 for tokens, rate in steps[2:])
    tokens = sum(tokens for tokens, _ in steps[2:])
    return {"case": case, "steps": len(steps), "tokens": tokens, "s_per_million_tokens": round(1e6 * seconds / tokens, 1)}


if __name__ == "__main__":
    for _ in range(REPEATS):
        for case in CASES:
            say(run(case, sys.argv[1:]))
