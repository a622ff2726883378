"""Measure packing groups on this machine, and choose those that train the data set fastest.

Start it with

    tune run --nproc_per_node 8 hbp_profile_groups --config llama3_1/8B_hbp_full [key=value ...]

on the ranks that will train. Every configuration of ``hbp_full_finetune_distributed`` serves unchanged. What was measured is
saved after each run of a group, and used again: a profile that was cut off goes on where it stopped.
"""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from omegaconf import DictConfig
from rich.console import Console
from torch import nn
from torch.distributed.tensor import DTensor
from torchtune import config, training, utils
from tqdm import tqdm

import hbp_tune as hbp

log = utils.get_logger("INFO")
# Documents of packs beside the one of full length: what samples of fine-tuning data have, and the many short ones, in which
# attention kernels reach other rates.
TYPICAL_LENS = (1024, 128)
# What seconds and memory depend on, besides the model's shape and what is chosen for the machine.
SETTINGS = (
    *("dtype", "compute_dtype", "compile", "custom_sharded_layers", "loss_head"),
    *("fsdp_reshard_after_forward", "fsdp_cpu_offload", "fsdp_sharded_accumulation", "fsdp_shard_degree"),
)


def typical_docs(pack_len: int, doc_len: int = TYPICAL_LENS[0]) -> tuple[int, ...]:
    """Fill a pack with documents of one length, and a shorter one with what is left."""
    whole, rest = divmod(pack_len, doc_len)
    return (doc_len,) * whole + ((rest,) if rest else ())


class HBPProfileGroupsRecipe:
    """Measure candidates of groups on all ranks, fit the cost model, and choose the set whose plan takes the least time.

    Args:
        cfg: keys as in ``hbp_full_finetune_distributed``; the checkpoint is not read, weights are random. And

            - ``memory_gib``: of each rank; by default what it has, less 2 GiB.
            - ``lengths``: replaces dataset and tokenizer, as in ``hbp_plan``.
            - ``profile.shortest`` (2048): tokens of the shortest packs; lengths double from there on.
            - ``profile.max_cp_degree``: largest CP degree to try; all ranks by default.
            - ``profile.repeats`` (5): micro-steps whose median counts.
            - ``profile.file`` (``output_dir/profile.json``): where measurements are kept and found.
            - ``profile.force`` (False): measure anew what another machine, model or setting gave.

    Raises:
        ConfigError: settings that cannot work, alone or together.
    """

    def __init__(self, cfg: DictConfig) -> None:
        hbp.config.check_config(cfg, ["output_dir", "model", "optimizer", "device", "dtype"])
        self._device = utils.get_device(device=cfg.device)
        self._dtype = training.get_dtype(cfg.dtype, device=self._device)
        self._compute_dtype = training.get_dtype(cfg.get("compute_dtype") or cfg.dtype, device=self._device)
        attention = cfg.get("attention") or "auto"
        self._attention, self._why_attention = hbp.parallel.select_attention(attention, self._device, self._compute_dtype)
        timeout_s = cfg.get("process_group_timeout_s")
        self._timeout = timedelta(seconds=timeout_s) if timeout_s else None
        if not dist.is_initialized():
            if not dist.is_torchelastic_launched():
                raise hbp.ConfigError("start with torchrun: tune run --nproc_per_node N hbp_profile_groups --config ...")
            hbp.parallel.join_process_group(training.get_distributed_backend(self._device.type), os.environ, self._timeout)
        self.world_size, self.rank = utils.get_world_size_and_rank()
        self._output_dir = hbp.config.output_folder(cfg.output_dir)
        self._planner = hbp.config.build_setting(cfg, "planner", default=hbp.planning.BalancePlanner)
        scheme = hbp.config.build_setting(cfg, "context_parallel", default="auto")
        self._context_parallel = hbp.parallel.select_context_parallel(scheme)
        settings = cfg.get("profile") or {}
        self._shortest = settings.get("shortest") or 2048
        self._max_cp_degree = settings.get("max_cp_degree")
        self._repeats = settings.get("repeats") or 5
        self._path = Path(settings.get("file") or self._output_dir / "profile.json")
        self._is_forced = bool(settings.get("force"))
        self._memory_gib = cfg.get("memory_gib") or hbp.training.device_memory_gib(self._device) - 2.0
        training.set_seed(seed=cfg.get("seed") or 0)

    def setup(self, cfg: DictConfig) -> None:
        """Find the lengths of the data, build the model as training does, and take up an earlier profile."""
        self._lengths = self._read_lengths(cfg)
        self._build_model(cfg)
        self._candidates = self._list_candidates()
        degrees = {group.cp_degree for group in self._candidates}
        layouts = [x for degree in sorted(degrees) for x in self._context_parallel.layouts(self._decoder.heads, degree)]
        self._meshes = hbp.parallel.build_cp_meshes(layouts, self._device.type, timeout=self._timeout)
        self._meter = self._make_meter()
        self._renew_meter = partial(self._renew, cfg)
        self._profile = self._open_profile(cfg)

    def _build_model(self, cfg: DictConfig) -> None:
        """Build model and optimizer with every parallel technique, and all that stays in memory through a run."""
        with training.set_default_dtype(self._dtype), torch.device("meta"):
            model: nn.Module = hbp.config.build("model", cfg.model)
        self._shape = hbp.models.model_shape(model)
        self._vocab_size = cast(nn.Embedding, model.tok_embeddings).num_embeddings
        self._decoder = hbp.models.parallelize_decoder(
            model,
            loss_head=hbp.config.build_setting(cfg, "loss_head", default=hbp.parallel.ForwardGradientHead),
            device_type=self._device.type,
            compute_dtype=self._compute_dtype,
            compile_backend=os.environ.get("TORCH_COMPILE_BACKEND", "inductor") if cfg.get("compile") else None,
            separate=cfg.get("custom_sharded_layers") or (),
            reshard_after_forward=cfg.get("fsdp_reshard_after_forward", True),
            cpu_offload=cfg.get("fsdp_cpu_offload", False),
            shard_degree=cfg.get("fsdp_shard_degree"),
        )
        self._init_weights(model)
        optimizer = hbp.config.build("optimizer", cfg.optimizer, model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # its states are there from now on, as in training
        model.set_requires_gradient_sync(cfg.get("fsdp_sharded_accumulation", True))  # type: ignore[operator]
        self._model, self._optimizer = model, optimizer

    def _make_meter(self) -> hbp.training.GroupMeter:
        return hbp.training.GroupMeter(
            self._model,
            self._decoder.layers,
            hbp.parallel.GroupSwitch(self._decoder.layers, self._meshes, self._attention, self._context_parallel),
            partial(self._context_parallel.layout, self._decoder.heads),
            vocab_size=self._vocab_size,
            device=self._device,
            repeats=self._repeats,
            states_gib=hbp.training.states_gib(self._model, self._optimizer),
        )

    def _renew(self, cfg: DictConfig) -> None:
        """Build all anew after a rank ran out of memory, which leaves FSDP2 in the middle of a backward."""
        del self._meter, self._decoder, self._model, self._optimizer
        gc.collect()  # modules under FSDP2 refer to each other
        torch.cuda.empty_cache()
        self._build_model(cfg)
        self._meter = self._make_meter()

    def _read_lengths(self, cfg: DictConfig) -> NDArray[np.int32]:
        """Read lengths from a file, a distribution, or the data set's tokens."""
        if name := cfg.get("lengths"):
            read: Callable[[], tuple[Any, Any]] = partial(hbp.data.read_lengths, Path(name), cfg.get("lengths_column"))
            if not Path(name).exists():
                read = partial(hbp.planning.synthetic_lengths, name, cfg.get("num_samples"))
            lengths: NDArray[np.int32] = hbp.parallel.from_rank_zero(lambda: read()[0])
            return lengths
        hbp.config.check_config(cfg)
        settings, tokenizer = hbp.config.data_settings(cfg.dataset, cfg.tokenizer), hbp.config.build("tokenizer", cfg.tokenizer)
        directory = Path(cfg.get("token_store_dir") or hbp.data.default_store_directory())
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))

        def work(watch: Callable[[int], None]) -> NDArray[np.int32]:
            builder = hbp.data.Builder.of_rank(self.rank, self.world_size, local_world_size, watch)
            return hbp.data.open_data(settings, tokenizer, directory, builder)[1].lengths

        timeout_s = cfg.get("token_store_timeout_s") or 1800
        return hbp.parallel.together(
            work, name="token store of dataset", timeout_s=timeout_s, timeout_key="token_store_timeout_s"
        )

    def _init_weights(self, model: nn.Module) -> None:
        """Fill sharded weights with small random numbers: what they are changes neither time nor memory."""
        model.to_empty(device=torch.device("cpu") if next(model.parameters()).device.type == "cpu" else self._device)
        with training.set_default_dtype(self._dtype), self._device, torch.no_grad():
            for module in model.modules():
                if hasattr(module, "rope_init"):
                    module.rope_init()  # type: ignore[operator]
            for parameter in model.parameters():
                cast(DTensor, parameter).to_local().normal_(std=0.02)

    def _list_candidates(self) -> tuple[hbp.planning.PackingGroup, ...]:
        """List all lengths and CP degrees; which fit is measured.

        Raises:
            ConfigError: the longest sample is longer than the model's positions.
        """
        longest = int(self._lengths.max())
        if longest > self._decoder.max_seq_len:
            if getattr(self._planner, "overlong", "error") == "error":
                raise hbp.ConfigError(
                    f"the longest sample has {longest} tokens, the model encodes {self._decoder.max_seq_len} positions; set "
                    f"planner.overlong, or use a model builder with a larger max_seq_len"
                )
            longest = self._decoder.max_seq_len
        every = hbp.planning.candidate_groups(
            longest,
            lambda group: 0,
            world_size=self.world_size,
            shortest=self._shortest,
            max_cp_degree=self._max_cp_degree,
        )
        return tuple(sorted(every, key=lambda group: (group.cp_degree, group.pack_len)))

    def _open_profile(self, cfg: DictConfig) -> hbp.reporting.Profile:
        """Take up what was measured before with the same machine, model and settings."""
        now = hbp.reporting.Profile(
            machine={
                "device": hbp.training.device_name(self._device),
                "ranks": self.world_size,
                "threads": torch.get_num_threads(),
            },
            model=asdict(self._shape)
            | {key: str(cfg.get(key)) for key in SETTINGS}
            | {"attention": self._why_attention, "context_parallel": type(self._context_parallel).__name__}
            | {"optimizer": str(cfg.optimizer.get("_component_"))},
            versions=hbp.training.versions(),
        )

        def read() -> hbp.reporting.Profile | None:
            saved = hbp.reporting.read_profile(self._path)
            if saved is None or self._is_forced:
                return None
            hbp.reporting.check_same(saved, now, self._path)
            return saved

        saved = hbp.parallel.from_rank_zero(read)
        if saved is None:
            return now
        utils.log_rank_zero(log, f"{len(saved.measurements)} measurements of {self._path} are used again")
        for name, version in saved.versions.items():
            if now.versions.get(name) != version:
                utils.log_rank_zero(log, f"they were taken with {name} {version}, this run has {now.versions.get(name)}")
        return replace(now, measurements=saved.measurements)

    def _measure(self, group: hbp.planning.PackingGroup, doc_lens: Sequence[int]) -> hbp.planning.Measurement:
        """Run a group, or find what an earlier run gave; save what is new."""
        # No document may be longer than the positions that the model encodes.
        most = self._decoder.max_seq_len
        cut = [piece for n in doc_lens for piece in (*([most] * (n // most)), *([n % most] if n % most else []))]
        if (found := self._profile.find(group, cut)) is not None:
            return found
        measured = self._meter.measure(group, cut)
        if not measured.fits:
            self._renew_meter()
        self._profile = replace(self._profile, measurements=(*self._profile.measurements, measured))
        hbp.parallel.from_rank_zero(
            partial(hbp.reporting.write_profile, self._path, self._profile) if self.rank == 0 else lambda: None
        )
        return measured

    def profile(self) -> list[hbp.planning.PackingGroup]:
        """Measure all candidates: what fits with how many recomputed layers, and how fast it is.

        Returns:
            Groups that fit.
        """
        fitting: list[hbp.planning.PackingGroup] = []
        too_long: set[int] = set()  # CP degrees whose packs have become too long for memory
        for group in self._candidates_with_bar():
            if group.cp_degree in too_long:
                continue
            fitted = hbp.training.fit_group(
                group, self._measure, num_layers=len(self._decoder.layers), budget_gib=self._memory_gib
            )
            if fitted is None:
                too_long.add(group.cp_degree)
                continue
            for doc_len in TYPICAL_LENS:
                self._measure(fitted, typical_docs(group.pack_len, doc_len))
            fitting.append(fitted)
        return fitting

    def _candidates_with_bar(self) -> Iterator[hbp.planning.PackingGroup]:
        """Give the candidates, and show the time left: by modelled seconds, for the longest packs take most of it."""
        lengths = np.array([group.pack_len for group in self._candidates], dtype=np.int64)
        degrees = np.array([group.cp_degree for group in self._candidates], dtype=np.int64)
        cost = hbp.planning.CostModel(self._shape, hbp.training.starting_rates(self._device))
        work_s = cost.pack_seconds(lengths, lengths**2, degrees, np.zeros_like(degrees)).total
        form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        with tqdm(total=float(work_s.sum()), desc="Measuring", bar_format=form, disable=self.rank != 0) as bar:
            for group, done_s in zip(self._candidates, work_s.tolist(), strict=True):
                bar.set_postfix_str(hbp.reporting.describe_set([group]))
                yield group
                bar.update(done_s)

    def choose(self, fitting: Sequence[hbp.planning.PackingGroup]) -> None:
        """Fit the cost model to what was measured, choose groups, say why, and write them."""
        overlong = getattr(self._planner, "overlong", "error")
        longest = int(self._lengths.max()) if overlong == "error" else 0
        hbp.planning.check_candidates(fitting, longest, shortage=self._shortage())
        fitted = hbp.planning.fit_rates(self._shape, self._profile.measurements, hbp.training.starting_rates(self._device))
        cost = hbp.planning.CostModel(self._shape, fitted.rates)
        most = max(group.pack_len for group in fitting)
        lengths = np.minimum(self._lengths, most) if overlong.startswith("truncate") else self._lengths
        lengths = lengths[lengths <= most] if overlong == "drop" else lengths
        selector = hbp.planning.GroupSelector(lengths, planner=self._planner, cost=cost, world_size=self.world_size)
        choice = selector.select(fitting)
        layers = {(group.pack_len, group.cp_degree): group.ac_layers for group in fitting}
        rule = hbp.planning.paper_rule(
            [(group, self._measure(group, typical_docs(group.pack_len)).s_per_token) for group in fitting],
            lambda group: layers.get((group.pack_len, group.cp_degree)),
        )
        if self.rank == 0:
            console = Console(highlight=False, soft_wrap=True)
            where = f"{self.world_size} ranks of {self._profile.machine['device']}"
            hbp.reporting.print_choice(choice, (rule, selector.epoch_s(rule)), console, where=where)
            worst = float(np.abs(fitted.errors).max())
            quality = f"{len(fitted.errors)} measurements, the model meets them within {worst:.1%} (rms {fitted.rms_error:.1%})"
            console.print(f"{quality}; they are in {self._path}", markup=False)
            path = self._output_dir / "groups.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            hbp.config.write_groups(path, choice.groups, [f"Chosen for {where} of {self._memory_gib:.1f} GiB by {quality}."])
            console.print(f"Written: {path}; train with groups_file={path}", markup=False)

    def _shortage(self) -> str:
        """Say what the smallest run needed, of what there is."""
        runs = [one for one in self._profile.measurements if one.peak_gib is not None]
        if not runs:
            return f"the smallest ran out of memory, {self._memory_gib:.3g} GiB are given"
        least = min(runs, key=lambda one: one.peak_gib or 0.0)
        group = least.group
        return f"{group.name} over {group.cp_degree} ranks needs {least.peak_gib:.3g} of {self._memory_gib:.3g} GiB"

    def cleanup(self) -> None:
        """Leave the process group."""
        dist.destroy_process_group()


@config.parse  # type: ignore[untyped-decorator]
def recipe_main(cfg: DictConfig) -> None:
    """Profile by the settings in ``cfg``: the YAML file's, overwritten by ``key=value`` from the command line."""
    recipe = HBPProfileGroupsRecipe(cfg)
    recipe.setup(cfg)
    recipe.choose(recipe.profile())
    recipe.cleanup()


def main() -> None:
    """Run from the command line; ``--config`` takes a path or the name of a packaged configuration."""
    hbp.config.run_recipe(recipe_main)


if __name__ == "__main__":
    main()
