"""`hbp_profile_groups` on real ranks: what it measures, chooses, saves, takes up again, and refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.distributed.tensor import DTensor

from hbp_tune.config.group_files import groups_of
from hbp_tune.data.batches.batch import PackBatch
from hbp_tune.parallel.parallelize import GroupSwitch, PackContext
from hbp_tune.recipes.hbp_profile_groups import HBPProfileGroupsRecipe, typical_docs
from hbp_tune.training.profiling import GroupMeter
from tests.helpers import mixed_lengths, recipe_config
from tests.ranks import RankError, RankPool

GROUPS = [{"name": "all", "pack_len": 512}]


def profile_job(cfg: DictConfig) -> tuple[list[Any], int]:
    """Profile inside a pool; give the groups that fit, and how many runs of a group were made."""
    runs = 0
    measure = GroupMeter.measure

    def counting(self: GroupMeter, *args: Any) -> Any:
        nonlocal runs
        runs += 1
        return measure(self, *args)

    GroupMeter.measure = counting  # type: ignore[method-assign]
    try:
        recipe = HBPProfileGroupsRecipe(cfg)
        recipe.setup(cfg)
        fitting = recipe.profile()
        recipe.choose(fitting)
    finally:
        GroupMeter.measure = measure  # type: ignore[method-assign]
    return fitting, runs


def config(tmp_path: Path) -> DictConfig:
    np.save(tmp_path / "lengths.npy", np.array(mixed_lengths(200, 900, seed=3)))
    cfg = recipe_config(tmp_path, [1], GROUPS, profile={"shortest": 512, "repeats": 2})
    cfg.lengths = str(tmp_path / "lengths.npy")
    return cfg


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_groups_are_measured_chosen_and_saved(ranks: Callable[[int], RankPool], tmp_path: Path, world_size: int) -> None:
    cfg = config(tmp_path)
    results = ranks(world_size).run(profile_job, cfg)
    fitting, runs = results[0]
    assert all(result == results[0] for result in results), "all ranks agree"
    degrees = {1, 2}  # a rank holds 512 tokens at least
    assert {(group.pack_len, group.cp_degree) for group in fitting} == {(512, 1), *((1024, degree) for degree in degrees)}
    assert {group.ac_layers for group in fitting} == {0}, "there is memory to spare"
    saved = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert len(saved["measurements"]) == runs == 4 * len(fitting), "two memory probes, the choice, and short documents"
    assert saved["machine"]["ranks"] == world_size
    peaks = {
        (m["group"]["pack_len"], m["group"]["cp_degree"], m["group"]["ac_layers"]): m["peak_gib"] for m in saved["measurements"]
    }
    assert peaks[1024, 1, 0] > peaks[1024, 1, 3] > 0, "recomputing saves memory"
    assert peaks[1024, 1, 0] > peaks[512, 1, 0]
    assert peaks[1024, 1, 0] > peaks[1024, 2, 0], "so does sharing"
    cfg.groups_file = str(tmp_path / "out" / "groups.yaml")
    assert groups_of(cfg)[-1].pack_len == 1024


def test_a_profile_goes_on_where_it_stopped(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    cfg, path = config(tmp_path), tmp_path / "out" / "profile.json"
    fitting, runs = ranks(2).run(profile_job, cfg)[0]
    assert ranks(2).run(profile_job, cfg)[0] == (fitting, 0)
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"measurements": saved["measurements"][:4]}))
    assert ranks(2).run(profile_job, cfg)[0] == (fitting, runs - 4)
    cfg.profile.force = True
    assert ranks(2).run(profile_job, cfg)[0] == (fitting, runs)


def test_another_model_is_refused(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    cfg = config(tmp_path)
    ranks(2).run(profile_job, cfg)
    cfg.model.num_layers = 2
    with pytest.raises(RankError, match=r"was measured with model.num_layers=3, this run has 2: .* profile.force=True"):
        ranks(2).run(profile_job, cfg)


def test_memory_decides_the_recomputed_layers(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    cfg = config(tmp_path)
    ranks(2).run(profile_job, cfg)
    saved = json.loads((tmp_path / "out" / "profile.json").read_text())["measurements"]
    peaks = {
        m["group"]["ac_layers"]: m["peak_gib"] for m in saved if m["group"]["pack_len"] == 1024 and m["group"]["cp_degree"] == 1
    }
    cfg.memory_gib = (peaks[1] + peaks[0]) / 2
    fitting, _ = ranks(2).run(profile_job, cfg)[0]
    assert {group.ac_layers for group in fitting if group.pack_len == 1024 and group.cp_degree == 1} == {1}
    cfg.memory_gib = 1e-6
    for overlong in ("error", "drop"):
        cfg.planner = {"_component_": "hbp_tune.components.BalancePlanner", "overlong": overlong}
        with pytest.raises(RankError, match=r"no packing group fits into memory \(\w+ over \d ranks needs [.\d]+ of 1e-06 GiB\)"):
            ranks(2).run(profile_job, cfg)


def short_of_memory_job(cfg: DictConfig, most: int) -> tuple[list[Any], bool]:
    """Profile on ranks whose memory holds so many tokens of kept layers; give what fits, and whether gradients are sharded."""
    with pytest.MonkeyPatch.context() as patch:
        activate, attend = GroupSwitch.activate, PackContext.attend

        def activate_short(self: GroupSwitch, batch: PackBatch) -> PackContext:
            context = activate(self, batch)
            context.runs_out = (3 - batch.group.ac_layers) * batch.tokens.numel() > most  # type: ignore[attr-defined]
            return context

        def run_out(grad: Tensor) -> None:
            raise torch.OutOfMemoryError("made up")

        def attend_once(self: PackContext, *args: Tensor) -> Tensor:
            # In the backward: FSDP2 then has gathered weights and unreduced gradients, and does not mend itself.
            attended = attend(self, *args)
            if self.runs_out:  # type: ignore[attr-defined]
                attended.register_hook(run_out)
            return attended

        patch.setattr(GroupSwitch, "activate", activate_short)
        patch.setattr(PackContext, "attend", attend_once)
        recipe = HBPProfileGroupsRecipe(cfg)
        recipe.setup(cfg)
        fitting = recipe.profile()
    return fitting, all(isinstance(weight.grad, DTensor) for weight in recipe._model.parameters())


def test_running_out_of_memory_is_survived(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    """Packs of 1,024 tokens keep one layer of three, and need not fit with two; what is measured then is sound."""
    cfg = config(tmp_path)
    (fitting, is_sharded), _ = ranks(2).run(short_of_memory_job, cfg, 1600)
    assert {(group.pack_len, group.cp_degree, group.ac_layers) for group in fitting} == {(512, 1, 0), (1024, 1, 2), (1024, 2, 0)}
    saved = json.loads((tmp_path / "out" / "profile.json").read_text())["measurements"]
    out = [one["group"] for one in saved if one["peak_gib"] is None]
    assert [(group["pack_len"], group["cp_degree"], group["ac_layers"]) for group in out] == [(1024, 1, 1)]
    assert is_sharded, "FSDP2 has forgotten the step that it did not end"
    cfg.profile.force = True
    ranks(2).run(short_of_memory_job, cfg, 10**9)
    undisturbed = json.loads((tmp_path / "out" / "profile.json").read_text())["measurements"]
    peaks = {str((one["group"], one["doc_lens"])): one["peak_gib"] for one in undisturbed}
    both = [(one["peak_gib"], peaks.get(str((one["group"], one["doc_lens"])))) for one in saved if one["peak_gib"]]
    assert all(peak == other for peak, other in both if other), both


def test_typical_documents_fill_packs_of_any_length() -> None:
    assert typical_docs(512) == (512,)
    assert typical_docs(2048) == (1024, 1024)
    assert typical_docs(2560) == (1024, 1024, 512)
    assert typical_docs(512, 128) == (128,) * 4
