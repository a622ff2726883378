"""An epoch of real training, packed in several ways, on ranks each bound to one core, or on GPUs: time, waiting, bytes, loss.

    python -m hbp_tune.demo --dir DIR --max-tokens 4000
    python benchmarks/bench_end_to_end.py --demo DIR --work DIR [--rounds 5] [key=value ...]
    python -m hbp_tune.demo --dir DIR --max-tokens 16000 --num-samples 300
    python benchmarks/bench_end_to_end.py --demo DIR --work DIR --width 512 --layers 2 --short 2048 --long 16384 --steps-of 32768

More ranks than cores would hide imbalance: the system lends a waiting rank's core to a busy one. A model of width 128 spends
about as much of its time on attention at 512 and 4,096 tokens as Llama 3.1 8B on an H100 at 16K and 128K, one of width 512 at
2,048 and 16,384 (``double_len`` is printed), where the fixed time of a micro-step takes its share too. So packs of these lengths
stand for the HBP paper's groups. Cases take turns, every round in another order: one-length ISF over several ranks and on each
alone, hierarchical packing without balance, and balance packing in both modes; the same samples, the same base weights, the same
tokens a step. torchtune's own packed path, stock layers under a dense mask of documents (a block mask on CUDA), trains the first
packs of ISF on each rank. On GPUs: ``--ranks 8 --cp 8 device=cuda dtype=bf16`` and sizes to match.

Printed is what the cost model, fitted to a profile of this machine, predicts for each plan, and a JSON line per run: wall seconds
of all forwards and backwards, seconds in which a micro-step is as long as its slowest rank's busy time (CPU seconds), what an
epoch takes at this pace, the share that ranks wait, measured and predicted, and held-out loss. Then a line per plan: elements
that context parallelism (Ulysses) moved, counted over some steps, beside those of the formula; and a summary.
"""

import argparse
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from bench_step import Case, stock_step
from lines import say
from measuring import timed
from omegaconf import DictConfig, OmegaConf
from pinned import ISF, Recorder, demo_config, is_rank, profile_of, recorded_recipe, start_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from hbp_tune.data.batches.made import random_batch
from hbp_tune.demo.model import TinyLlama, write_checkpoint
from hbp_tune.models.torchtune_decoder import decoder_shape
from hbp_tune.planning import CostModel, CpDegrees, EpochPlan, PackingGroup
from hbp_tune.planning.comparison.simulation import PackWork, simulate
from hbp_tune.planning.costs.exchange import moved_heads
from hbp_tune.planning.plans.sharding import padded_len

COMMON = [
    "save_every_n_steps=null",
    "curriculum.steps=0",
    "run_val_every_n_steps=null",
    "context_parallel=ulysses",
    "profile.repeats=3",
]
COUNTED_STEPS = 2


def cases(
    short_len: int, long_len: int, cp_degree: int, ac_layers: int
) -> dict[str, tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Give groups and planner settings of each case; layers recompute in long packs alone, as memory would have it."""
    short = PackingGroup(name="short", pack_len=short_len)
    long = PackingGroup(name="long", pack_len=long_len, cp_degree=cp_degree, ac_layers=ac_layers)
    alone = PackingGroup(name="long", pack_len=long_len, cp_degree=1, ac_layers=ac_layers)
    component = {"_component_": "hbp_tune.components.PackingGroup"}
    return {
        name: ([component | asdict(group) for group in groups], planner)
        for name, groups, planner in (
            (f"isf, cp {cp_degree}", [long], ISF),
            ("isf, cp 1", [alone], ISF),
            ("hierarchical, no balance", [short, long], {"mode": "paper", "sort_by": None}),
            ("hbp, paper mode", [short, long], {"mode": "paper"}),
            ("hbp, cost mode", [short, long], {}),
        )
    }


def rank_main(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Profile this machine, then train every case in this process group."""
    warm_steps = arguments.warm_steps
    sizes = [f"planner.tokens_per_step={arguments.steps_of or 4 * arguments.long}", f"demo_dir={arguments.demo}"]
    base = demo_config(arguments.demo, arguments.work, [*sizes, *model_settings(arguments), *COMMON, *overrides])
    every_case = cases(
        arguments.short, arguments.long, arguments.cp, arguments.layers // 2 if arguments.layers > 2 else arguments.layers
    )
    every_group = {group["name"] + str(group["cp_degree"]): group for groups, _ in every_case.values() for group in groups}
    measured = [PackingGroup(**{k: v for k, v in group.items() if k != "_component_"}) for group in every_group.values()]
    cost, rms_error = profile_of(base, measured)

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
        warm = int((plan.pack_step[plan.micro_step_starts] < warm_steps).sum())
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, (recorder.wall_s[warm:], recorder.busy_s[warm:]))
        wall_s, busy_s = (np.array([each[i] for each in every]) for i in (0, 1))
        simulated = simulate(PackWork.of_plan(plan), cost)
        busy_predicted = np.repeat(simulated.busy_s, plan.cp_degrees).reshape(-1, plan.world_size)[warm:]
        slowest_s = float(busy_s.max(axis=0).sum())
        line = {
            "case": name,
            "round": number,
            "steps": plan.num_steps,
            "micro_steps": int(wall_s.shape[1]),
            "tokens": int(plan.sum_per_pack(plan.lengths)[plan.pack_step >= warm_steps].sum()),
            "wall_s": round(float(wall_s.max(axis=0).sum()), 2),
            "slowest_rank_s": round(slowest_s, 2),
            "predicted_s": round(predicted_s := float(simulated.micro_step_s[warm:].sum()), 2),
            # Cases differ in the steps that are left out: what an epoch takes at this pace.
            "epoch_s": round(slowest_s / predicted_s * simulated.epoch_s, 2),
            "wall_epoch_s": round(float(wall_s.max(axis=0).sum()) / predicted_s * simulated.epoch_s, 2),
            "idle": round(1 - float(busy_s.mean(axis=0).sum()) / slowest_s, 4),
            "idle_predicted": round(1 - float(busy_predicted.mean(axis=1).sum() / busy_predicted.max(axis=1).sum()), 4),
            "total_s": round(total_s, 1),
            "loss": {key: round(float(value), 4) for key, value in losses.items()},
        }
        say(line)
        return line

    for name in every_case:
        plan = build(name, arguments.work / "predicted")[0]._plan_epoch(0, first_step=0)
        simulated = simulate(PackWork.of_plan(plan), cost)
        shares = {part: round(share, 4) for part, share in simulated.shares.items()}
        say({"case": name, "predicted_epoch_s": round(simulated.epoch_s, 2), "shares": shares})
    lines = []
    for number in range(arguments.rounds):
        names = list(every_case)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            lines.append(train(name, number))
    say(stock_packed(*build("isf, cp 1", arguments.work / "stock")))
    for name in every_case:
        say(count_bytes(arguments, name, build(name, arguments.work / "counted", max_steps=COUNTED_STEPS)[0]))
    if lines:
        say(summary(lines, rms_error))


def model_settings(arguments: argparse.Namespace) -> list[str]:
    """Write a checkpoint of the model that is asked for, and give the settings that name it."""
    shape = TinyLlama(num_layers=arguments.layers, embed_dim=arguments.width, intermediate_dim=3 * arguments.width)
    directory = arguments.work / "model"
    if dist.get_node_local_rank() == 0:
        write_checkpoint(directory, shape, seed=0)
    model = [f"model.{key}={getattr(shape, key)}" for key in ("num_layers", "embed_dim", "intermediate_dim")]
    return [*model, f"checkpointer.checkpoint_dir={directory}"]


def stock_packed(recipe: Any, _: Recorder) -> dict[str, Any]:
    """Time one step of torchtune's packed path on the pack of each rank that an ISF plan begins with."""
    plan: EpochPlan = recipe._plan_epoch(0, first_step=0)
    (group,) = plan.groups
    pack = int(np.flatnonzero(plan.pack_first_rank == dist.get_rank())[0])
    doc_lens = plan.lengths[plan.pack_of_sample == pack].tolist()
    shape = decoder_shape(recipe._model)
    padding = [group.pack_len - sum(doc_lens)] if sum(doc_lens) < group.pack_len else []  # torchtune pads its packs too
    on: torch.device = recipe._device
    batch = random_batch([*doc_lens, *padding], group, shape.vocab_size).to(on)
    step = stock_step(Case(ours=False, ac_layers=group.ac_layers), shape, batch, on)
    dist.barrier()
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    timed(step, on)
    mine = (time.process_time() - start_cpu_s, time.perf_counter() - start_s, sum(doc_lens))
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    busy_s, wall_s, tokens = zip(*every, strict=True)
    return {"case": "torchtune, packed", "tokens": sum(tokens), "wall_s": round(max(wall_s), 2), "busy_s": list(busy_s)}


def count_bytes(arguments: argparse.Namespace, name: str, recipe: Any) -> dict[str, Any]:
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
                self.received += args[0].numel() * (1 - 1 / arguments.cp)
            return out

    recipe._validator = None  # its forwards exchange too, outside the plan
    with Counter() as counter:
        recipe.train()
    plan = recipe._plan_epoch(0, first_step=0)
    heads, layers = recipe._decoder.heads, len(recipe._decoder.layers)
    head_dim = recipe._decoder.layers[0].attn.head_dim
    tokens = plan.sum_per_pack(plan.lengths)
    predicted = 0.0
    for pack in np.flatnonzero(plan.pack_step < COUNTED_STEPS):
        group = plan.groups[plan.pack_group[pack]]
        if group.cp_degree > 1:
            padded = padded_len(int(tokens[pack]), group.cp_degree, group.pack_len)
            once = moved_heads(heads, CpDegrees(ulysses=group.cp_degree), padded, 0)
            # Forward, backward, and again in layers that recompute.
            predicted += head_dim * once * (2 * layers + group.ac_layers)
    ratio = round(counter.received / predicted, 4) if predicted else None
    return {"case": name, "received": counter.received, "predicted": predicted, "ratio": ratio}


def summary(lines: list[dict[str, Any]], rms_error: float) -> dict[str, Any]:
    """Compare medians over the rounds with the first case's."""
    names = list(dict.fromkeys(line["case"] for line in lines))

    def of(name: str, key: str) -> list[float]:
        return [line[key] for line in lines if line["case"] == name]

    busy, wall = ({name: of(name, key) for name in names} for key in ("epoch_s", "wall_epoch_s"))
    base, wall_base = statistics.median(busy[names[0]]), statistics.median(wall[names[0]])
    return {
        "speed_up_busy": {name: round(base / statistics.median(values), 3) for name, values in busy.items()},
        "speed_up_wall": {name: round(wall_base / statistics.median(values), 3) for name, values in wall.items()},
        "spread_wall": {name: round(max(values) / min(values) - 1, 3) for name, values in wall.items()},
        "idle_error": {name: round(statistics.median(of(name, "idle")) - of(name, "idle_predicted")[0], 4) for name in names},
        "fit_rms": round(rms_error, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="folder that `python -m hbp_tune.demo --dir` made")
    parser.add_argument("--work", type=Path, required=True, help="folder for the profile and the runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2, help="GPUs or cores (default: %(default)s)")
    parser.add_argument("--cp", type=int, default=2, help="CP degree of long packs (default: %(default)s)")
    parser.add_argument("--width", type=int, default=128, help="of the model (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of the model (default: %(default)s)")
    parser.add_argument("--steps-of", type=int, help="tokens of a step (default: four long packs)")
    parser.add_argument("--warm-steps", type=int, default=1, help="left out of all times (default: %(default)s)")
    parser.add_argument("--short", type=int, default=512, help="tokens of short packs (default: %(default)s)")
    parser.add_argument(
        "--long", type=int, default=4096, help="tokens of long packs, which hold every sample (default: %(default)s)"
    )
    arguments, overrides = parser.parse_known_args()
    if is_rank():
        rank_main(arguments, overrides)
    else:
        start_ranks(__file__, arguments.ranks)


if __name__ == "__main__":
    main()
