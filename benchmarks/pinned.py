"""Real training of the demo on gloo ranks, each bound to a core: nobody lends a waiting rank's core to a busy one. Or on GPUs."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

import hbp_tune
from hbp_tune.planning import CostModel, PackingGroup, fit_rates
from hbp_tune.recipes import hbp_full_finetune_distributed as training_recipe
from hbp_tune.recipes.hbp_profile_groups import TYPICAL_LENS, HBPProfileGroupsRecipe, typical_docs
from hbp_tune.training import starting_rates

ROOT = Path(__file__).parents[1]
# Planner settings of one-length packing.
ISF = {"mode": "paper", "fill": False, "sort_by": None, "packer": {"_component_": "hbp_tune.components.ISF"}}


class Recorder:
    """Keeps the busy seconds that the recipe's clock gives, and wall seconds beside them, waiting included."""

    def __init__(self, clock: Any) -> None:
        self._clock = clock
        self._start_s = 0.0
        self.wall_s: list[float] = []
        self.busy_s: list[float] = []

    def start(self) -> None:
        """Begin a micro-step."""
        self._clock.start()
        self._start_s = time.perf_counter()

    def stop(self) -> None:
        """End it."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.wall_s.append(time.perf_counter() - self._start_s)
        self._clock.stop()

    def read_s(self) -> list[float]:
        """Give what is new, and keep everything."""
        new: list[float] = self._clock.read_s()
        self.busy_s += new
        return new


def is_rank() -> bool:
    """Tell whether this process is one of the ranks; if so, and without GPUs, it is bound to its core from now on."""
    if "LOCAL_RANK" not in os.environ:
        return False
    if not torch.cuda.is_available():
        os.sched_setaffinity(0, {int(os.environ["LOCAL_RANK"])})
    return True


def start_ranks(file: str, ranks: int = 2) -> None:
    """Start this script again as ranks of one thread each."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    subprocess.run([*command, file, *sys.argv[1:]], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)


def demo_config(demo: Path, work: Path, settings: Sequence[str]) -> DictConfig:
    """Give the demo's configuration with other folders and settings."""
    folders = [f"demo_dir={demo}", f"output_dir={work}"]
    cfg = OmegaConf.merge(
        OmegaConf.load(ROOT / "configs/demo/tiny_llama_cpu.yaml"), OmegaConf.from_dotlist([*folders, *settings])
    )
    assert isinstance(cfg, DictConfig)
    return cfg


def profile(cfg: DictConfig) -> tuple[HBPProfileGroupsRecipe, list[PackingGroup], CostModel, float]:
    """Profile this machine; give the profiler, what fits, the cost model fitted to it, and the fit's error."""
    profiler = HBPProfileGroupsRecipe(cfg)
    profiler.setup(cfg)
    return profiler, profiler.profile(), *_fitted(profiler)


def profile_of(cfg: DictConfig, groups: Sequence[PackingGroup]) -> tuple[CostModel, float]:
    """Measure these groups alone; give the cost model fitted to them, and the fit's error."""
    profiler = HBPProfileGroupsRecipe(cfg)
    profiler.setup(cfg)
    for group in groups:
        for doc_lens in ((group.pack_len,), *(typical_docs(group.pack_len, doc_len) for doc_len in TYPICAL_LENS)):
            profiler._measure(group, doc_lens)
    return _fitted(profiler)


def _fitted(profiler: HBPProfileGroupsRecipe) -> tuple[CostModel, float]:
    fitted = fit_rates(profiler._shape, profiler._profile.measurements, starting_rates(profiler._device))
    return CostModel(profiler._shape, fitted.rates), fitted.rms_error


def recorded_recipe(cfg: DictConfig) -> tuple[Any, Recorder]:
    """Set a training recipe up that exports nothing, and the recorder of its micro-steps."""
    recorders: list[Recorder] = []
    clock_of = hbp_tune.training.busy_clock

    def recording(*args: Any) -> Recorder:
        recorders.append(Recorder(clock_of(*args)))
        return recorders[-1]

    hbp_tune.training.busy_clock = recording  # type: ignore[assignment]
    try:
        recipe = training_recipe.HBPFullFinetuneRecipeDistributed(cfg)
        recipe.setup(cfg)
    finally:
        hbp_tune.training.busy_clock = clock_of
    recipe.save_checkpoint = lambda epoch: None  # type: ignore[method-assign]
    return recipe, recorders[0]
