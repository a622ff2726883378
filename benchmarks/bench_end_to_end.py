"""An epoch of real training, packed in four ways, two ranks each bound to one core: time, waiting, bytes, loss.

    python -m hbp_tune.demo --dir DIR --max-tokens 4000
    python benchmarks/bench_end_to_end.py --demo DIR --work DIR [--rounds 5] [key=value ...]

More ranks than cores would hide imbalance: the system lends a waiting rank's core to a busy one. The demo's model spends about as
much of its time on attention at 512 and 4,096 tokens as Llama 3.1 8B on an H100 at 16K and 128K (``double_len`` of both is
printed), so that packs of these lengths stand for the HBP paper's groups. Cases take turns, every round in another order:
one-length ISF over both ranks and on each alone, hierarchical packing without balance, and balance packing in both modes; the
same samples, the same base weights, the same tokens a step.

Printed is a JSON line per run: wall seconds of all forwards and backwards, seconds in which a micro-step is as long as its
slowest rank's busy time (CPU seconds), the share that ranks wait, measured and foretold by the cost model fitted to a profile of
this machine, and held-out loss. Then a line per plan: elements that context parallelism (Ulysses) moved, counted over some
steps, beside those of the formula; and a summary.
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from pinned import ISF, Recorder, demo_config, is_rank, profile, recorded_recipe, start_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from hbp_tune.components import CostModel, CpDegrees, PackingGroup
from hbp_tune.components.planning.exchange import moved_heads
from hbp_tune.components.planning.sharding import padded_len
from hbp_tune.components.planning.simulation import PackWork, simulate

COMMON = [
    "save_every_n_steps=null",
    "curriculum.steps=0",
    "run_val_every_n_steps=null",
    "context_parallel=ulysses",
    "profile.repeats=3",
]
# Steps that warm up, left out of all times.
WARM_STEPS = 2
COUNTED_STEPS = 4


def cases(short_len: int, long_len: int) -> dict[str, tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Give groups and planner settings of each case; layers recompute in long packs alone, as memory would have it."""
    short = PackingGroup(name="short", pack_len=short_len)
    long = PackingGroup(name="long", pack_len=long_len, cp_degree=2, ac_layers=2)
    alone = PackingGroup(name="long", pack_len=long_len, cp_degree=1, ac_layers=2)
    component = {"_component_": "hbp_tune.components.PackingGroup"}
    return {
        name: ([component | asdict(group) for group in groups], planner)
        for name, groups, planner in (
            ("isf, cp 2", [long], ISF),
            ("isf, cp 1", [alone], ISF),
            ("hierarchical, no balance", [short, long], {"mode": "paper", "sort_by": None}),
            ("hbp, paper mode", [short, long], {"mode": "paper"}),
            ("hbp, cost mode", [short, long], {}),
        )
    }


def rank_main(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Profile this machine, then train every case in this process group."""
    sizes = [f"profile.shortest={arguments.short}", f"planner.tokens_per_step={4 * arguments.long}"]
    base = demo_config(arguments.demo, arguments.work, [*sizes, *COMMON, *overrides])
    every_case = cases(arguments.short, arguments.long)
    _, _, cost, rms_error = profile(base)

    def say(line: dict[str, Any]) -> None:
        if dist.get_rank() == 0:
            print(json.dumps(line), flush=True)

    here, there = cost.token_s / cost.square_s, CostModel().token_s / CostModel().square_s
    say({"double_len": round(here), "double_len_8b_h100": round(there), "long_as_8b": round(arguments.long * there / here)})

    def build(name: str, output_dir: Path, **more: Any) -> tuple[Any, Recorder]:
        groups, planner = every_case[name]
        cfg: DictConfig = OmegaConf.merge(base, {"output_dir": str(output_dir), "planner": planner, **more})
        cfg.groups, cfg.metric_logger = groups, None
        return recorded_recipe(cfg)

    def train(name: str, number: int) -> dict[str, Any]:
        recipe, recorder = build(name, arguments.work / f"round_{number}")
        losses: dict[str, float] = {}
        validate = recipe._validator.run
        recipe._validator.run = lambda *args: losses.update(found := validate(*args)) or found
        start_s = time.perf_counter()
        recipe.train()
        total_s = time.perf_counter() - start_s
        plan = recipe._plan_epoch(0, first_step=0)
        warm = int((plan.pack_step[plan.micro_step_starts] < WARM_STEPS).sum())
        every: list[Any] = [None, None]
        dist.all_gather_object(every, (recorder.wall_s[warm:], recorder.busy_s[warm:]))
        wall_s, busy_s = (np.array([each[i] for each in every]) for i in (0, 1))
        simulated = simulate(PackWork.of_plan(plan), cost)
        busy_foretold = np.repeat(simulated.busy_s, plan.cp_degrees).reshape(-1, plan.world_size)[warm:]
        slowest_s = float(busy_s.max(axis=0).sum())
        line = {
            "case": name,
            "round": number,
            "steps": plan.num_steps,
            "micro_steps": int(wall_s.shape[1]),
            "tokens": int(plan.sum_per_pack(plan.lengths)[plan.pack_step >= WARM_STEPS].sum()),
            "wall_s": round(float(wall_s.max(axis=0).sum()), 2),
            "slowest_rank_s": round(slowest_s, 2),
            "foretold_s": round(float(simulated.micro_step_s[warm:].sum()), 2),
            "idle": round(1 - float(busy_s.mean(axis=0).sum()) / slowest_s, 4),
            "idle_foretold": round(1 - float(busy_foretold.mean(axis=1).sum() / busy_foretold.max(axis=1).sum()), 4),
            "total_s": round(total_s, 1),
            "loss": {key: round(float(value), 4) for key, value in losses.items()},
        }
        say(line)
        return line

    lines = []
    for number in range(arguments.rounds):
        names = list(every_case)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            lines.append(train(name, number))
    for name in every_case:
        say(count_bytes(name, build(name, arguments.work / "counted", max_steps=COUNTED_STEPS)[0]))
    say(summary(lines, rms_error))


def count_bytes(name: str, recipe: Any) -> dict[str, Any]:
    """Count the elements that a rank receives in the exchange of some steps, beside the formula's."""

    class Counter(TorchDispatchMode):
        received = 0.0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            namespace, operator = func.name().partition(".")[0].split("::")
            if namespace == "_c10d_functional" and operator == "all_gather_into_tensor":
                # On a CPU shards are traded by gathering all and keeping a part: of what comes, one rank's share is needed.
                self.received += (out.numel() - args[0].numel()) / (out.numel() // args[0].numel())
            elif namespace == "_dtensor" and operator == "shard_dim_alltoall":
                self.received += args[0].numel() / 2
            return out

    recipe._validator = None  # its forwards exchange too, outside the plan
    with Counter() as counter:
        recipe.train()
    plan = recipe._plan_epoch(0, first_step=0)
    heads, layers = recipe._decoder.heads, len(recipe._decoder.layers)
    head_dim = recipe._decoder.layers[0].attn.head_dim
    tokens = plan.sum_per_pack(plan.lengths)
    foretold = 0.0
    for pack in np.flatnonzero(plan.pack_step < COUNTED_STEPS):
        group = plan.groups[plan.pack_group[pack]]
        if group.cp_degree > 1:
            padded = padded_len(int(tokens[pack]), group.cp_degree, group.pack_len)
            once = moved_heads(heads, CpDegrees(ulysses=group.cp_degree), padded, 0)
            # Forward, backward, and again in layers that recompute.
            foretold += head_dim * once * (2 * layers + group.ac_layers)
    ratio = round(counter.received / foretold, 4) if foretold else None
    return {"case": name, "received": counter.received, "foretold": foretold, "ratio": ratio}


def summary(lines: list[dict[str, Any]], rms_error: float) -> dict[str, Any]:
    """Compare medians over the rounds with the first case's."""
    names = list(dict.fromkeys(line["case"] for line in lines))

    def of(name: str, key: str) -> list[float]:
        return [line[key] for line in lines if line["case"] == name]

    # Cases differ in the steps that are left out: seconds for each token count.
    per_token = {name: [a / b for a, b in zip(of(name, "slowest_rank_s"), of(name, "tokens"), strict=True)] for name in names}
    wall = {name: [a / b for a, b in zip(of(name, "wall_s"), of(name, "tokens"), strict=True)] for name in names}
    base, wall_base = statistics.median(per_token[names[0]]), statistics.median(wall[names[0]])
    return {
        "speed_up_busy": {name: round(base / statistics.median(values), 3) for name, values in per_token.items()},
        "speed_up_wall": {name: round(wall_base / statistics.median(values), 3) for name, values in wall.items()},
        "spread_wall": {name: round(max(values) / min(values) - 1, 3) for name, values in wall.items()},
        "idle_error": {name: round(statistics.median(of(name, "idle")) - of(name, "idle_foretold")[0], 4) for name in names},
        "fit_rms": round(rms_error, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="folder that `python -m hbp_tune.demo --dir` made")
    parser.add_argument("--work", type=Path, required=True, help="folder for the profile and the runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--short", type=int, default=512, help="tokens of short packs (default: %(default)s)")
    parser.add_argument(
        "--long", type=int, default=4096, help="tokens of long packs, which hold every sample (default: %(default)s)"
    )
    arguments, overrides = parser.parse_known_args()
    if is_rank():
        rank_main(arguments, overrides)
    else:
        start_ranks(__file__)


if __name__ == "__main__":
    main()
