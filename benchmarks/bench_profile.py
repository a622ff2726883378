"""Whether the groups that a profile chooses train fastest, and as long as predicted: two ranks, each on a core of its own.

    python -m hbp_tune.demo --dir DIR && python benchmarks/bench_profile.py --demo DIR --work DIR [key=value ...]

Profiles the demo's model on two gloo ranks, each bound to one core, so that nobody lends a waiting rank's core to a busy one.
Then trains the demo's data for an epoch with the chosen groups, with three sets made by hand, and packed to one length by ISF,
in turn, several times. Printed is a JSON line per run: seconds of all forwards and backwards on the slowest rank of each, beside
those that the fitted cost model predicts; and a last line with the medians and the least of each.
"""

import argparse
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lines import say
from omegaconf import DictConfig, OmegaConf
from pinned import ISF, demo_config, is_rank, profile, recorded_recipe, start_ranks

from hbp_tune.config import groups_of
from hbp_tune.planning import PackingGroup, length_name
from hbp_tune.planning.comparison.simulation import PackWork, simulate

COMMON = [
    "dataset_val=null",
    "run_val_every_n_steps=null",
    "save_every_n_steps=null",
    "curriculum.steps=0",
]


def hand_made(short: int, long: int) -> dict[str, list[tuple[int, int]]]:
    """Name sets of pack lengths and CP degrees: short ones alone, long ones over both ranks or alone."""
    names = [length_name(length) for length in (short, 2 * short, long)]
    return {
        f"{names[0]} alone, {names[2]} over 2": [(short, 1), (long, 2)],
        f"{names[1]} alone, {names[2]} over 2": [(2 * short, 1), (long, 2)],
        f"{names[0]} and {names[2]} alone": [(short, 1), (long, 1)],
    }


def rank_main(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Profile, then train every case in this process group."""
    sizes = [f"planner.tokens_per_step={4 * arguments.long}", f"profile.shortest={arguments.short}"]
    base = demo_config(arguments.demo, arguments.work, [*COMMON, *sizes, *overrides])
    one_length = {"isf, one length over 2": (arguments.long, 2), "isf, one length": (arguments.long, 1)}
    base.dataset_val = None
    profiler, fitting, cost, rms_error = profile(base)
    profiler.choose(fitting)
    layers = {(group.pack_len, group.cp_degree): group for group in fitting}
    dist.barrier()
    chosen = groups_of(OmegaConf.create({"groups_file": str(arguments.work / "groups.yaml")}))
    cases: dict[str, tuple[tuple[PackingGroup, ...], dict[str, Any]]] = {"chosen": (chosen, {})}
    cases |= {name: (tuple(layers[key] for key in keys), {}) for name, keys in hand_made(arguments.short, arguments.long).items()}
    cases |= {name: ((layers[key],), ISF) for name, key in one_length.items()}

    def train(name: str, repeat: int) -> dict[str, Any]:
        groups, planner = cases[name]
        cfg: DictConfig = OmegaConf.merge(base, {"output_dir": str(arguments.work / f"run_{repeat}"), "planner": planner})
        cfg.groups = [{"_component_": "hbp_tune.components.PackingGroup"} | asdict(group) for group in groups]
        cfg.metric_logger = None
        recipe, recorder = recorded_recipe(cfg)
        recipe.train()
        plan = recipe._plan_epoch(0, first_step=0)
        warm = int((plan.pack_step[plan.micro_step_starts] < 2).sum())  # the first two steps warm up
        simulated = simulate(PackWork.of_plan(plan), cost)
        line = {
            "case": name,
            "groups": "+".join(f"{length_name(group.pack_len)}/{group.cp_degree}/{group.ac_layers}" for group in groups),
            "micro_steps": len(recorder.wall_s),
            "measured_s": round(sum(recorder.wall_s[warm:]), 2),
            "predicted_s": round(float(simulated.micro_step_s[warm:].sum()), 2),
            # Cases differ in the steps that are left out: what an epoch takes at this pace.
            "epoch_s": round(sum(recorder.wall_s[warm:]) / simulated.micro_step_s[warm:].sum() * simulated.epoch_s, 2),
        }
        say(line)
        return line

    lines = [train(name, repeat) for repeat in range(arguments.repeats) for name in cases]
    if dist.get_rank() == 0:
        every_s = {name: [line["epoch_s"] for line in lines if line["case"] == name] for name in cases}
        errors = [line["predicted_s"] / line["measured_s"] - 1 for line in lines]
        summary = {
            "median_epoch_s": {name: statistics.median(epochs_s) for name, epochs_s in every_s.items()},
            "least_epoch_s": {name: min(epochs_s) for name, epochs_s in every_s.items()},
            "errors": [round(error, 3) for error in errors],
        }
        say(summary | {"fit_rms": round(rms_error, 4)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="folder that `python -m hbp_tune.demo --dir` made")
    parser.add_argument("--work", type=Path, required=True, help="folder for the profile and the runs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--short", type=int, default=2048, help="tokens of the shortest packs (default: %(default)s)")
    parser.add_argument("--long", type=int, default=8192, help="tokens of packs that hold every sample (default: %(default)s)")
    arguments, overrides = parser.parse_known_args()
    if is_rank():
        rank_main(arguments, overrides)
    else:
        start_ranks(__file__)


if __name__ == "__main__":
    main()
