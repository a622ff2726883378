"""Whether the groups that a profile chooses train fastest, and as long as foretold: two ranks, each on a core of its own.

    python -m hbp_tune.demo --dir DIR && python benchmarks/bench_profile.py --demo DIR --work DIR [key=value ...]

Profiles the demo's model on two gloo ranks, each bound to one core, so that nobody lends a waiting rank's core to a busy one.
Then trains the demo's data for an epoch with the chosen groups, with three sets made by hand, and packed to one length by ISF,
in turn, several times. Printed is a JSON line per run: seconds of all forwards and backwards on the slowest rank of each, beside
those that the fitted cost model foretells; and a last line with the medians and the least of each.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

HAND_MADE = {
    "2K alone, 8K over 2": [(2048, 1), (8192, 2)],
    "4K alone, 8K over 2": [(4096, 1), (8192, 2)],
    "2K and 8K alone": [(2048, 1), (8192, 1)],
}
ONE_LENGTH = {"isf, one length over 2": (8192, 2), "isf, one length": (8192, 1)}
TOKENS_PER_STEP = 32_768
COMMON = [
    "dataset_val=null",
    "run_val_every_n_steps=null",
    "save_every_n_steps=null",
    "curriculum.steps=0",
    f"planner.tokens_per_step={TOKENS_PER_STEP}",
]


class WallClock:
    """Seconds of every forward and backward, waiting included: what the slowest rank takes."""

    def __init__(self) -> None:
        self.every_s: list[float] = []
        self._new_s: list[float] = []
        self._start_s = 0.0

    def start(self) -> None:
        """Begin a micro-step."""
        self._start_s = time.perf_counter()

    def stop(self) -> None:
        """End it."""
        self._new_s.append(time.perf_counter() - self._start_s)

    def read_s(self) -> list[float]:
        """Give what is new, and keep everything."""
        new_s, self._new_s = self._new_s, []
        self.every_s += new_s
        return new_s


def rank_main(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Profile, then train every case in this process group."""
    import torch.distributed as dist
    from omegaconf import DictConfig, OmegaConf

    from hbp_tune.components import CostModel, PackingGroup, fit_rates, groups_of, length_name, starting_rates
    from hbp_tune.components.planning.simulation import PackWork, simulate
    from hbp_tune.recipes import hbp_full_finetune_distributed as training_recipe
    from hbp_tune.recipes.hbp_profile_groups import HBPProfileGroupsRecipe

    os.sched_setaffinity(0, {int(os.environ["LOCAL_RANK"])})
    root = Path(__file__).parents[1]
    base = OmegaConf.merge(
        OmegaConf.load(root / "configs/demo/tiny_llama_cpu.yaml"),
        OmegaConf.from_dotlist([f"demo_dir={arguments.demo}", f"output_dir={arguments.work}", *COMMON, *overrides]),
    )
    base = OmegaConf.merge(base, {"dataset_val": None})
    profiler = HBPProfileGroupsRecipe(base)
    profiler.setup(base)
    fitting = profiler.profile()
    profiler.choose(fitting)
    layers = {(group.pack_len, group.cp_degree): group for group in fitting}
    fitted = fit_rates(profiler._shape, profiler._profile.measurements, starting_rates(profiler._device))
    cost = CostModel(profiler._shape, fitted.rates)
    dist.barrier()
    chosen = groups_of(OmegaConf.create({"groups_file": str(arguments.work / "groups.yaml")}))
    cases: dict[str, tuple[tuple[PackingGroup, ...], dict[str, Any]]] = {"chosen": (chosen, {})}
    cases |= {name: (tuple(layers[key] for key in keys), {}) for name, keys in HAND_MADE.items()}
    paper = {"mode": "paper", "fill": False, "sort_by": None, "packer": {"_component_": "hbp_tune.components.ISF"}}
    cases |= {name: ((layers[key],), paper) for name, key in ONE_LENGTH.items()}

    def train(name: str, repeat: int) -> dict[str, Any]:
        groups, planner = cases[name]
        cfg: DictConfig = OmegaConf.merge(base, {"output_dir": str(arguments.work / f"run_{repeat}"), "planner": planner})
        cfg.groups = [{"_component_": "hbp_tune.components.PackingGroup"} | asdict(group) for group in groups]
        cfg.metric_logger = None
        clock = WallClock()
        training_recipe.busy_clock = lambda device, layers: clock  # type: ignore[assignment]
        recipe = training_recipe.HBPFullFinetuneRecipeDistributed(cfg)
        recipe.setup(cfg)
        recipe.save_checkpoint = lambda epoch: None  # type: ignore[method-assign]
        recipe.train()
        plan = recipe._plan_epoch(0, first_step=0)
        warm = int((plan.pack_step[plan.micro_step_starts] < 2).sum())  # the first two steps warm up
        simulated = simulate(PackWork.of_plan(plan), cost)
        line = {
            "case": name,
            "groups": "+".join(f"{length_name(group.pack_len)}/{group.cp_degree}/{group.ac_layers}" for group in groups),
            "micro_steps": len(clock.every_s),
            "measured_s": round(sum(clock.every_s[warm:]), 2),
            "foretold_s": round(float(simulated.micro_step_s[warm:].sum()), 2),
            # Cases differ in the steps that are left out: what an epoch takes at this pace.
            "epoch_s": round(sum(clock.every_s[warm:]) / simulated.micro_step_s[warm:].sum() * simulated.epoch_s, 2),
        }
        if recipe.rank == 0:
            print(json.dumps(line), flush=True)
        return line

    lines = [train(name, repeat) for repeat in range(arguments.repeats) for name in cases]
    if dist.get_rank() == 0:
        every_s = {name: [line["epoch_s"] for line in lines if line["case"] == name] for name in cases}
        errors = [line["foretold_s"] / line["measured_s"] - 1 for line in lines]
        summary = {
            "median_epoch_s": {name: statistics.median(epochs_s) for name, epochs_s in every_s.items()},
            "least_epoch_s": {name: min(epochs_s) for name, epochs_s in every_s.items()},
            "errors": [round(error, 3) for error in errors],
        }
        print(json.dumps(summary | {"fit_rms": round(fitted.rms_error, 4)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="folder that `python -m hbp_tune.demo --dir` made")
    parser.add_argument("--work", type=Path, required=True, help="folder for the profile and the runs")
    parser.add_argument("--repeats", type=int, default=3)
    arguments, overrides = parser.parse_known_args()
    if "LOCAL_RANK" in os.environ:
        rank_main(arguments, overrides)
        return
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, __file__, *sys.argv[1:]], env=env, check=True)


if __name__ == "__main__":
    main()
