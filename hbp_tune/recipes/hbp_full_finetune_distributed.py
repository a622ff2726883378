"""Full fine-tuning by Hierarchical Balance Packing (HBP, arXiv 2503.07680) on FSDP2: a whole run in one file, to copy.

Start it with

    tune run --nproc_per_node 8 hbp_full_finetune_distributed --config llama3_1/8B_hbp_full [key=value ...]

or copy this file into your own folder, change it, and start it by its file name.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtune import config, training, utils
from torchtune.recipe_interfaces import FTRecipeInterface

import hbp_tune as hbp

log = utils.get_logger("INFO")


class HBPFullFinetuneRecipeDistributed(FTRecipeInterface):
    """Fine-tune every weight of a torchtune decoder on data that mixes short and long samples.

    A sample's way: the data set component and the tokenizer give its tokens, kept on disk; the planner gives it a group,
    a pack and an optimizer step; the loader makes its pack's tensors on the ranks that the plan names; the group
    decides over how many ranks the pack's sequence is split and how many layers recompute their activations.

    Args:
        cfg: keys as in torchtune's ``full_finetune_distributed``, and ``groups`` or ``groups_file``, ``planner``, ``curriculum``,
            ``loss_head``, ``context_parallel``, ``attention``, ``compute_dtype``, ``max_steps``, ``dataset_val``,
            ``run_val_every_n_steps``, ``save_every_n_steps``, ``keep_last_n_checkpoints``, ``async_save``,
            ``max_nonfinite_steps``, ``num_workers``, ``token_store_dir``, ``token_store_timeout_s``, ``bad_rows``, ``plan_file``,
            ``process_group_timeout_s``, ``fsdp_sharded_accumulation``, ``fsdp_shard_degree``.

    Raises:
        ConfigError: settings that cannot work, alone or together.
    """

    def __init__(self, cfg: DictConfig) -> None:
        hbp.config.check_config(cfg)
        data_keys = [key for key in ("dataset", "dataset_val") if hbp.config.setting(cfg, key)]
        self._data_settings = {key: hbp.config.data_settings(cfg[key], cfg.tokenizer, key) for key in data_keys}
        self._bad_rows = cfg.get("bad_rows") or "error"
        self._device = utils.get_device(device=cfg.device)
        self._dtype = training.get_dtype(cfg.dtype, device=self._device)
        self._compute_dtype = training.get_dtype(cfg.get("compute_dtype") or cfg.dtype, device=self._device)
        if torch.float16 in (self._dtype, self._compute_dtype):
            raise hbp.ConfigError("dtype and compute_dtype must be bf16 or fp32: fp16 needs loss scaling, which is not supported")
        self._cpu_offload = cfg.get("fsdp_cpu_offload", False)
        if self._cpu_offload and self._device.type != "cuda":
            raise hbp.ConfigError(f"fsdp_cpu_offload=True needs device=cuda, device is {self._device.type}; set it to False")
        attention = cfg.get("attention") or "auto"
        self._attention, self._why_attention = hbp.parallel.select_attention(attention, self._device, self._compute_dtype)
        timeout_s = cfg.get("process_group_timeout_s")
        self._timeout = timedelta(seconds=timeout_s) if timeout_s else None
        if not dist.is_initialized():
            if not dist.is_torchelastic_launched():
                raise hbp.ConfigError(
                    "start with torchrun: tune run --nproc_per_node N hbp_full_finetune_distributed --config ..."
                )
            backend = training.get_distributed_backend(self._device.type, offload_ops_to_cpu=self._cpu_offload)
            hbp.parallel.join_process_group(backend, os.environ, self._timeout)
        self.world_size, self.rank = utils.get_world_size_and_rank()
        self._is_rank_zero = self.rank == 0
        self._output_dir = hbp.config.output_folder(cfg.output_dir)
        # Between micro-steps FSDP2 keeps shards of the gradients, or, for a slow network, whole ones on every rank.
        self._sharded_accumulation = cfg.get("fsdp_sharded_accumulation", True)
        self._log_every_n_steps = cfg.get("log_every_n_steps") or 1
        self._log_peak_memory_stats = cfg.get("log_peak_memory_stats", False) and self._device.type == "cuda"
        self._clip_grad_norm = float(cfg.get("clip_grad_norm") or "inf")
        self._run_val_every_n_steps = cfg.get("run_val_every_n_steps")
        self._save_every_n_steps = cfg.get("save_every_n_steps")
        self._plan_file = Path(cfg.plan_file) if cfg.get("plan_file") else None
        self._resume_mode = cfg.get("resume_from_checkpoint") or False
        if not self._resume_mode and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
            self._resume_mode = "auto"  # torchrun starts this run again: what is saved is its own

        self._epochs, self._max_steps = cfg.epochs, cfg.get("max_steps")  # that the curriculum counts by, also after resuming
        self._groups = hbp.config.groups_of(cfg)
        hbp.planning.check_groups(self._groups, self.world_size)
        hbp.parallel.check_offload(self._groups, self._device.type)
        self._planner = hbp.config.build_setting(cfg, "planner", default=hbp.planning.BalancePlanner)
        self._curriculum = hbp.config.build_setting(cfg, "curriculum")
        scheme = hbp.config.build_setting(cfg, "context_parallel", default="auto")
        self._context_parallel = hbp.parallel.select_context_parallel(scheme)
        self._loss = hbp.training.AveTokenLoss() if hbp.config.is_stock_loss(cfg) else hbp.config.build("loss", cfg.loss)
        self._loss_head = hbp.config.build_setting(cfg, "loss_head", default=hbp.parallel.ForwardGradientHead)

        self.seed = training.set_seed(seed=cfg.get("seed"), debug_mode=cfg.get("cudnn_deterministic_mode"))
        self.global_step = 0
        self.epoch = 0
        self.epoch_step = 0  # optimizer steps of this epoch that are done

    def setup(self, cfg: DictConfig) -> None:
        """Set up everything; what can go wrong with the settings or the data goes wrong before weights are loaded."""
        self._tokenizer = hbp.config.build("tokenizer", cfg.tokenizer)
        self._model = self._setup_decoder(cfg)
        progress = self._output_dir / "progress"
        # Before the data are read, which may take long: were a rank to die there, older progress would look like this run's.
        if not self._resume_mode and (older := hbp.parallel.from_rank_zero(partial(hbp.training.set_aside, progress))):
            utils.log_rank_zero(log, f"An older run's progress is now in {older}; to go on from it, name it {progress} again")
        self._checkpointer = self._setup_checkpointer(cfg.checkpointer)
        self._num_workers = cfg.get("num_workers") or 0
        self._data, self._store = self._setup_data(cfg, "dataset")
        # A saved plan may be of another policy than the planner; its samples are cut, and so counted, by its own.
        cut = (
            hbp.parallel.from_rank_zero(lambda: self._saved_plans[0].cut)
            if self._plan_file
            else getattr(self._planner, "overlong", "error")
        )
        self._num_targets = self._store.num_targets_within(self._groups[-1].pack_len, hbp.planning.cut_of(cut))
        self._validator = self._setup_validation(cfg) if "dataset_val" in self._data_settings else None
        self._progress = hbp.training.ProgressSaver(
            progress,
            hbp.training.RunIdentity(world_size=self.world_size, groups=self._groups, store_fingerprint=self._store.fingerprint),
            settings=(settings := hbp.config.flat_settings(cfg)),
            keep=cfg.get("keep_last_n_checkpoints") or 1,
            is_async=cfg.get("async_save") or False,
            log=partial(utils.log_rank_zero, log),
        )
        find = partial(self._progress.latest, is_required=self._resume_mode is True)
        position = hbp.parallel.from_rank_zero(find) if self._resume_mode else None
        if position is not None:
            self._update_recipe_state(position)
        self._steps_per_epoch = self._setup_plan(cfg.epochs, cfg.get("max_steps"))
        if position is not None and position.epoch < len(self._plan_hashes):  # else nothing is left to train
            hbp.training.check_plan_hash(position, self._plan_hashes[position.epoch])
        limit = cfg.get("max_nonfinite_steps")
        self._guard = hbp.training.StepGuard(
            max_nonfinite_steps=3 if limit is None else limit,
            skipped_steps=position.skipped_steps if position else 0,
        )

        self._load_weights()
        self._optimizer = hbp.config.build("optimizer", cfg.optimizer, self._model.parameters())
        self._lr_scheduler = hbp.config.build_setting(
            cfg, "lr_scheduler", self._optimizer, num_training_steps=sum(self._steps_per_epoch)
        )
        if position is not None:
            for line in hbp.config.describe_changes(self._progress.saved_settings(position), settings):
                utils.log_rank_zero(log, line)
            self._resume(position)
        layouts = [x for group in self._groups for x in self._context_parallel.layouts(self._decoder.heads, group.cp_degree)]
        meshes = hbp.parallel.build_cp_meshes(layouts, self._device.type, timeout=self._timeout)
        self._switch = hbp.parallel.GroupSwitch(self._decoder.layers, meshes, self._attention, self._context_parallel)
        self._steps = hbp.planning.StepMetrics.joined(self._planned_steps, self._steps_per_epoch)
        self._telemetry = hbp.training.StepTelemetry(
            self._steps,
            self._groups,
            shape=self._cost.shape,
            device=self._device,
            peak_flops_per_s=hbp.training.peak_flops_per_s(self._device, self._compute_dtype),
            busy=hbp.training.busy_clock(self._device, self._decoder.layers),
        )

        self._profiler = self._setup_profiler(cfg)
        self._metric_logger = hbp.config.build_setting(cfg, "metric_logger") if self._is_rank_zero else None
        if self._metric_logger:
            self._metric_logger.log_config(cfg)

    def _setup_decoder(self, cfg: DictConfig) -> nn.Module:
        """Build the decoder without weights, make it parallel, and check that the groups suit it."""
        with training.set_default_dtype(self._dtype), torch.device("meta"):
            model: nn.Module = hbp.config.build("model", cfg.model)
        self._cost = hbp.planning.CostModel(hbp.models.model_shape(model))
        self._decoder = hbp.models.parallelize_decoder(
            model,
            loss_head=self._loss_head,
            device_type=self._device.type,
            compute_dtype=self._compute_dtype,
            compile_backend=os.environ.get("TORCH_COMPILE_BACKEND", "inductor") if cfg.get("compile") else None,
            separate=cfg.get("custom_sharded_layers") or (),
            reshard_after_forward=cfg.get("fsdp_reshard_after_forward", True),
            cpu_offload=self._cpu_offload,
            shard_degree=cfg.get("fsdp_shard_degree"),
        )
        self._layout = partial(self._context_parallel.layout, self._decoder.heads)
        for line in (
            self._why_attention,
            *hbp.parallel.describe_layouts(self._context_parallel, self._decoder.heads, self._groups),
        ):
            utils.log_rank_zero(log, line)
        hbp.planning.check_ac_layers(self._groups, len(self._decoder.layers))
        return model

    def _setup_checkpointer(self, node: DictConfig) -> Any:
        """Build the checkpointer, and compare the positions of a Hugging Face checkpoint with those of the model."""
        checkpointer = hbp.config.build("checkpointer", node)
        self._hf_config: hbp.models.HFConfig | None = None
        if isinstance(checkpointer, hbp.models.HFCheckpointer):
            checkpointer.check(self._model)
        if isinstance(checkpointer, training.FullModelHFCheckpointer | hbp.models.HFCheckpointer):
            self._hf_config = hbp.models.HFConfig(Path(node.checkpoint_dir), self._model)
            for line in self._hf_config.differences():
                utils.log_rank_zero(log, line, logging.WARNING)
        return checkpointer

    def _setup_data(self, cfg: DictConfig, key: str) -> tuple[hbp.data.LoadedData, hbp.data.TokenStore]:
        """Load and tokenise data sets with all ranks, or open what an earlier run with the same ones left on disk."""
        directory = Path(cfg.get("token_store_dir") or hbp.data.default_store_directory())
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))

        def work(watch: Callable[[int], None]) -> tuple[hbp.data.LoadedData, hbp.data.TokenStore]:
            builder = hbp.data.Builder.of_rank(self.rank, self.world_size, local_world_size, watch)
            data, store = hbp.data.open_data(self._data_settings[key], self._tokenizer, directory, builder)
            path = self._output_dir / ("bad_rows.csv" if key == "dataset" else f"bad_rows_{key}.csv")
            if self._is_rank_zero and (line := hbp.reporting.report_bad_rows(data.bad_rows(), path, self._bad_rows)):
                log.warning(line)
            return data, store

        timeout_s = cfg.get("token_store_timeout_s") or 1800
        data, store = hbp.parallel.together(
            work, name=f"token store of {key}", timeout_s=timeout_s, timeout_key="token_store_timeout_s"
        )
        for line in data.describe() if self._is_rank_zero else ():
            log.info(line)
        if self._is_rank_zero and key == "dataset":
            hbp.reporting.print_sample(hbp.data.view_sample(data, store, self._tokenizer, 0), Console(highlight=False))
        return data, store

    def _setup_validation(self, cfg: DictConfig) -> hbp.training.Validator:
        """Tokenise and plan the held-out data."""
        data, store = self._setup_data(cfg, "dataset_val")
        plan = hbp.parallel.from_rank_zero(
            partial(hbp.training.plan_validation, self._planner, store, self._groups, world_size=self.world_size, cost=self._cost)
        )
        hbp.planning.check_positions(plan, self._decoder.max_seq_len)
        return hbp.training.Validator(
            store, plan, data.labels, rank=self.rank, layout=self._layout, num_workers=self._num_workers
        )

    def _setup_plan(self, epochs: int, max_steps: int | None) -> list[int]:
        """Count the optimizer steps of each epoch, up to ``max_steps``, and show the plan of the first."""
        steps_per_epoch: list[int] = []
        self._plan_hashes: list[str] = []
        self._planned_steps: list[hbp.planning.StepMetrics] = []
        while len(steps_per_epoch) < epochs and (max_steps is None or sum(steps_per_epoch) < max_steps):
            plan = self._plan_epoch(len(steps_per_epoch), first_step=sum(steps_per_epoch))
            if not steps_per_epoch and self._is_rank_zero:
                self._show_plan(plan)
            hbp.planning.check_positions(plan, self._decoder.max_seq_len)
            document_weights = self._loss.document_weights(plan, self._num_targets)
            self._loss_head.check(self._device, document_weights, plan.pack_of_sample)
            left = plan.num_steps if max_steps is None else max_steps - sum(steps_per_epoch)
            steps_per_epoch.append(min(plan.num_steps, left))
            self._plan_hashes.append(plan.hash)
            self._planned_steps.append(hbp.planning.measure_steps(plan, self._cost))
        return steps_per_epoch

    @cached_property
    def _saved_plans(self) -> tuple[hbp.planning.EpochPlan, ...]:
        """Read the saved plan once, on rank 0, which alone asks for it."""
        return hbp.reporting.read_plan(cast(Path, self._plan_file))

    def _plan_epoch(self, epoch: int, *, first_step: int) -> hbp.planning.EpochPlan:
        """Plan an epoch on rank 0, or take it from the saved plan, and hand it to all ranks.

        Raises:
            ConfigError: a rank received another plan than rank 0 made.
        """

        def make() -> tuple[hbp.planning.EpochPlan, str]:
            lengths, sample_ids = self._store.lengths, self._data.draw(seed=self.seed, epoch=epoch)
            if self._plan_file:
                plan = hbp.planning.check_saved_plan(
                    self._saved_plans, epoch, lengths, self._groups, world_size=self.world_size, sample_ids=sample_ids
                )
                hbp.planning.check_targets(plan, self._num_targets)  # lengths alone do not tell them
            else:
                plan = self._planner.plan(
                    lengths,
                    self._num_targets,
                    self._groups,
                    world_size=self.world_size,
                    seed=self.seed,
                    epoch=epoch,
                    curriculum=self._curriculum,
                    first_step=first_step,
                    epochs=self._epochs,
                    max_steps=self._max_steps,
                    cost=self._cost,
                    sample_ids=sample_ids,
                )
            return plan, plan.hash

        plan, plan_hash = hbp.parallel.from_rank_zero(make)
        if plan.hash != plan_hash:
            raise hbp.ConfigError(
                f"rank {self.rank} received plan {plan.hash[:12]} of epoch {epoch}, rank 0 made {plan_hash[:12]}; are the "
                f"versions of numpy and of this package the same on all nodes?"
            )
        return plan

    def _show_plan(self, plan: hbp.planning.EpochPlan) -> None:
        lengths = self._store.lengths
        compared = hbp.planning.plan_comparison(plan, self._planner, seed=self.seed, cost=self._cost)
        hbp.reporting.print_plan(plan, lengths, compared=compared, cost=self._cost)
        if line := hbp.reporting.report_overlong(plan, lengths, self._output_dir, self._data.places):
            log.warning(line)

    def _load_weights(self) -> None:
        start = time.perf_counter()
        if isinstance(self._checkpointer, hbp.models.HFCheckpointer):
            arguments = {"device": self._device, "dtype": self._dtype, "cpu_offload": self._cpu_offload}
            hbp.training.load_weights(self._checkpointer, self._model, **arguments)
        else:
            state_dict = self._checkpointer.load_checkpoint()[training.MODEL_KEY]
            hbp.training.init_positions(self._model, self._device, self._dtype)
            training.load_from_full_model_state_dict(
                self._model, state_dict, self._device, strict=True, cpu_offload=self._cpu_offload
            )
        training.validate_no_params_on_meta_device(self._model)
        utils.log_rank_zero(log, f"Loading weights took {time.perf_counter() - start:.1f} s")

    def _update_recipe_state(self, position: hbp.training.Position) -> None:
        """Take up position, seed and what else the plan depends on."""
        if position.seed != self.seed:
            utils.log_rank_zero(log, f"seed={position.seed} of the saved progress replaces seed={self.seed}")
        self.seed, self._epochs, self._max_steps = position.seed, position.epochs, position.max_steps
        self.global_step, self.epoch, self.epoch_step = position.global_step, position.epoch, position.epoch_step

    def _resume(self, position: hbp.training.Position) -> None:
        """Take up weights, optimizer, schedule and random state where the last completed step left them."""
        configured = hbp.training.optimizer_settings(self._optimizer)
        self._progress.load(position, model=self._model, optimizer=self._optimizer, lr_scheduler=self._lr_scheduler)
        hbp.training.take_up_settings(self._optimizer, self._lr_scheduler, configured)
        total_steps = sum(self._steps_per_epoch)
        if position.total_steps != total_steps:
            utils.log_rank_zero(
                log, f"the run had {position.total_steps} steps and now has {total_steps}; so has its LR schedule"
            )
        utils.log_rank_zero(log, f"Resuming after step {self.global_step} of {total_steps}")

    def _setup_profiler(self, cfg: DictConfig) -> Any:
        node = cfg.get(training.PROFILER_KEY) or OmegaConf.create({"enabled": False})
        if "_component_" not in node:  # added to the node, which knows the file that its interpolations are of
            node = cast(DictConfig, OmegaConf.merge(node, {"_component_": "torchtune.training.setup_torch_profiler"}))
        profiler, _ = hbp.config.build("profiler", node)
        return profiler

    def _epoch_batches(self, epoch: int) -> Iterator[hbp.data.PackBatch]:
        """Load this rank's packs of an epoch, from the first step that is not done."""
        plan = self._plan = self._plan_epoch(epoch, first_step=sum(self._steps_per_epoch[:epoch]))
        weights = self._loss.document_weights(plan, self._num_targets)
        dataset = hbp.data.HierarchicalPackedDataset(self._store, plan, weights, self.rank, self._layout)
        indices = plan.indices_for_rank(self.rank, first_step=self.epoch_step, last_step=self._steps_per_epoch[epoch])
        for batch in hbp.data.pack_loader(dataset, indices, self._num_workers):
            yield batch.to(self._device)

    def train(self) -> None:
        """Train; every optimizer step draws its packs from one group."""
        fsdp = cast(FSDPModule, self._model)
        total_steps = sum(self._steps_per_epoch)
        self._table = hbp.reporting.RunTable(
            self._groups,
            self._steps.group,
            world_size=self.world_size,
            first_step=self.global_step,
            is_shown=self._is_rank_zero,
        )
        self._profiler.start()
        self._stop = hbp.training.StopSignals()
        for epoch in range(self.epoch, len(self._steps_per_epoch)):
            self.epoch = epoch
            for batch in self._telemetry.watch(self._epoch_batches(epoch)):
                pack = self._switch.activate(batch)  # the group's CP mesh and recomputed layers
                fsdp.set_requires_gradient_sync(self._sharded_accumulation or batch.is_last_micro_step)
                fsdp.set_requires_all_reduce(batch.is_last_micro_step)  # over copies of the weights, where there are several
                with hbp.training.explain_out_of_memory(batch, num_layers=len(self._decoder.layers)):
                    loss = self._model(
                        batch.tokens, mask=pack, input_pos=batch.input_pos, labels=batch.labels, loss_weights=batch.loss_weights
                    )
                    (loss * self.world_size).backward()  # FSDP2 averages over ranks; the weights already sum to one step
                self._guard.add(loss)
                if not batch.is_last_micro_step:
                    continue

                # On every rank, also where only rank 0 logs, and before the weights change.
                record = self._telemetry.gather(self._guard.loss_sum(), stop=self._stop.received is not None)
                norm = nn.utils.clip_grad_norm_(self._model.parameters(), max_norm=self._clip_grad_norm)
                grad_norm = cast(DTensor, norm).full_tensor().item()
                if math.isfinite(record.loss) and math.isfinite(grad_norm):
                    self._optimizer.step()
                else:
                    line = self._guard.skip(record.loss, grad_norm, self._plan, self.epoch_step, self._data.places)
                    utils.log_rank_zero(log, f"Step {self.global_step + 1} of the run is skipped: {line}", logging.WARNING)
                self._guard.start_step()
                self._optimizer.zero_grad(set_to_none=True)
                lr = float(training.get_lr(self._optimizer))  # torchao's is a tensor, which the schedule changes in place
                if self._lr_scheduler is not None:
                    self._lr_scheduler.step()
                metrics = self._telemetry.finish(record, self.global_step, lr=lr, grad_norm=grad_norm)
                self.global_step += 1
                self.epoch_step += 1
                metrics["skipped_steps"] = self._guard.skipped_steps
                self._log(metrics)
                self._profiler.step()
                self._validate_when_due()
                is_due = self._save_every_n_steps and self.global_step % self._save_every_n_steps == 0
                if is_due or record.stop:
                    self.save_progress()
                if record.stop:
                    self._end_early(total_steps)
                    return
            self._progress.settle()
            self.save_checkpoint(epoch=epoch)
            self.epoch_step = 0
        self._profiler.stop()
        self._table.close()
        utils.log_rank_zero(
            log, f"Finished step {self.global_step} of {total_steps}; checkpoints are in {self._output_dir.resolve()}"
        )

    def _log(self, metrics: dict[str, Any]) -> None:
        self._table.update(metrics)
        if self._metric_logger is None or self.global_step % self._log_every_n_steps:
            return
        if self._log_peak_memory_stats:
            metrics |= training.get_memory_stats(device=self._device)
        self._metric_logger.log_dict(metrics, step=self.global_step)

    def _validate_when_due(self) -> None:
        """Log the losses on held-out data every ``run_val_every_n_steps``, and at the end of the run."""
        every = self._run_val_every_n_steps or sum(self._steps_per_epoch)
        is_due = self.global_step % every == 0 or self.global_step == sum(self._steps_per_epoch)
        if self._validator is None or not is_due:
            return
        metrics = self._validator.run(self._model, self._switch, self._device)
        self._table.say(hbp.training.describe_validation(self.global_step, metrics))
        if self._metric_logger:
            self._metric_logger.log_dict(metrics, step=self.global_step)

    def _end_early(self, total_steps: int) -> None:
        """End a run that was asked to stop; its progress is saved."""
        self._progress.settle(is_last=True)
        self._profiler.stop()
        self._table.close()
        utils.log_rank_zero(
            log,
            f"Stopped by a signal after step {self.global_step} of {total_steps}; progress is in {self._progress.newest()}. "
            f"Go on with resume_from_checkpoint=True",
        )

    def save_progress(self) -> None:
        """Save what resuming needs; the run goes on from here after a crash."""
        position = hbp.training.Position(
            global_step=self.global_step,
            epoch=self.epoch,
            epoch_step=self.epoch_step,
            seed=self.seed,
            plan_hash=self._plan_hashes[self.epoch],
            total_steps=sum(self._steps_per_epoch),
            epochs=self._epochs,
            max_steps=self._max_steps,
            skipped_steps=self._guard.skipped_steps,
        )
        self._progress.save(position, model=self._model, optimizer=self._optimizer, lr_scheduler=self._lr_scheduler)

    def save_checkpoint(self, epoch: int) -> None:
        """Export the weights in the checkpointer's format (Hugging Face), at the end of an epoch and of the run."""
        folder = self._output_dir / f"epoch_{epoch}"

        def add(folder: Path) -> None:
            if self._hf_config:
                self._hf_config.write(folder)
                if isinstance(self._tokenizer, hbp.data.HFTokenizer):
                    self._tokenizer.export(folder)

        if isinstance(self._checkpointer, hbp.models.HFCheckpointer):
            export = partial(hbp.training.export_rows, self._checkpointer, self._model, folder, add)
            hbp.training.export_weights(export, self._output_dir, sum(p.nbytes for p in self._model.parameters()))
            return
        state_dict = training.gather_cpu_state_dict(self._model, self._is_rank_zero, device=self._device)

        def export_whole() -> None:
            self._checkpointer.save_checkpoint({training.MODEL_KEY: state_dict}, epoch=epoch)
            add(folder)

        # An error on rank 0, such as a full disk, is one on every rank: none waits for it in vain.
        hbp.parallel.from_rank_zero(
            partial(hbp.training.export_weights, export_whole, self._output_dir, hbp.training.num_bytes(state_dict))
        )

    def cleanup(self) -> None:
        """Close the logger, leave the process group, and put signal handlers back."""
        self._stop.restore()
        if self._metric_logger:
            self._metric_logger.close()
        dist.destroy_process_group()


@config.parse  # type: ignore[untyped-decorator]
def recipe_main(cfg: DictConfig) -> None:
    """Fine-tune by the settings in ``cfg``: the YAML file's, overwritten by ``key=value`` from the command line."""
    recipe = HBPFullFinetuneRecipeDistributed(cfg=cfg)
    config.log_config(recipe_name="HBPFullFinetuneRecipeDistributed", cfg=cfg)  # after init, so that only rank 0 prints
    recipe.setup(cfg=cfg)
    recipe.train()
    recipe.cleanup()


def main() -> None:
    """Run from the command line; ``--config`` takes a path or the name of a packaged configuration."""
    hbp.config.run_recipe(recipe_main)


if __name__ == "__main__":
    main()
