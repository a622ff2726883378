"""Plan a fine-tuning run without GPU, weights or torchrun: does Hierarchical Balance Packing pay for these data?

Start it with

    tune run hbp_plan --config llama3_1/8B_hbp_full [key=value ...]

or copy this file into your own folder, change it, and start it by its file name. Every configuration of
``hbp_full_finetune_distributed`` serves unchanged, and the plan is the one that such a run trains by.
"""

import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from omegaconf import DictConfig
from rich.console import Console
from torch import nn
from torchtune import config, training

import hbp_tune as hbp

DEFAULT_WORLD_SIZE = 8


class HBPPlanRecipe:
    """Plan all epochs of a run, and compare the first with packing the same samples to one length.

    Args:
        cfg: keys as in ``hbp_full_finetune_distributed``. Those that decide no plan (optimizer, checkpointer ...) are not
            read, so that their files may be missing; without the tokenizer's files, lengths are estimated. And

            - ``world_size``: ranks to plan for; by default 8, or the next number that all CP degrees divide.
            - ``lengths``: replaces dataset and tokenizer: a file (.csv, .csv.gz, .parquet, .npy) or the name of a synthetic
              distribution (``tulu3_longcite`` ...); with it ``lengths_column`` of the file, ``num_samples`` of the
              distribution.
            - ``baselines``: packers to compare with, beside ``isf``.
            - ``trace``: of how many optimizer steps to write a modelled time line of every rank; none by default.
            - ``json``: print ``plan.json``, and all else on the standard error.
            - ``gpu``: whose time is modelled, by default ``H100``.
            - ``groups: auto``: choose the groups for these data, this model and GPU, by the cost model; ``memory_gib`` of each
              GPU, by default 90% of what it has. They are written to ``groups.yaml``, for ``groups_file``.

    Raises:
        ConfigError: settings that cannot work, alone or together.
    """

    def __init__(self, cfg: DictConfig) -> None:
        hbp.config.check_config(cfg, ["output_dir", "model", "epochs", *([] if cfg.get("lengths") else ["dataset", "tokenizer"])])
        if dist.is_torchelastic_launched():
            raise hbp.ConfigError("hbp_plan is one process; start it by `tune run hbp_plan` and set world_size=N instead")
        self._chooses_groups = cfg.get("groups") == "auto" and not cfg.get("groups_file")
        self._groups = () if self._chooses_groups else hbp.config.groups_of(cfg)
        self.world_size = cfg.get("world_size") or self._default_world_size()
        if not self._chooses_groups:
            hbp.planning.check_groups(self._groups, self.world_size)
        self._gpu = hbp.planning.gpu_named(cfg.get("gpu") or "H100")
        self._planner = hbp.config.build_setting(cfg, "planner", default=hbp.planning.BalancePlanner)
        self._curriculum = hbp.config.build_setting(cfg, "curriculum")
        scheme = hbp.config.build_setting(cfg, "context_parallel", default="auto")
        self._context_parallel = hbp.parallel.select_context_parallel(scheme)
        self._baselines = _baseline_names(cfg.get("baselines"))
        self._epochs, self._max_steps = cfg.epochs, cfg.get("max_steps")
        self._trace_steps = cfg.get("trace") or 0
        if not isinstance(self._trace_steps, int) or self._trace_steps < 0:
            raise hbp.ConfigError(f"trace={cfg.trace!r} must be a whole number of optimizer steps, or be left out")
        self._output_dir = Path(cfg.output_dir)
        self._prints_json = cfg.get("json") or False
        self._console = Console(highlight=False, soft_wrap=True, stderr=self._prints_json)
        self._seconds: dict[str, float] = {}
        self._samples: Sequence[hbp.reporting.SampleView] = ()
        self._notes = [] if cfg.get("world_size") else [f"Planned for {self.world_size} ranks; set world_size=N for others."]
        self.seed = training.set_seed(seed=cfg.get("seed"))
        if cfg.get("seed") is None:
            self._notes.append(f"No seed is set: this is the plan of seed={self.seed}, training draws its own.")

    def _default_world_size(self) -> int:
        step = math.lcm(*(group.cp_degree for group in self._groups))
        return -(-DEFAULT_WORLD_SIZE // step) * step

    def setup(self, cfg: DictConfig) -> None:
        """Build the decoder, find the length of every sample, choose groups if asked, and check them against the model.

        Raises:
            ConfigError: ``num_samples`` for data, which have their own number.
        """
        self._setup_decoder(cfg)
        with self._timed("read"):
            if cfg.get("lengths"):
                self._read_lengths(str(cfg.lengths), cfg.get("lengths_column"), cfg.get("num_samples"))
            elif cfg.get("num_samples"):
                raise hbp.ConfigError(
                    f"num_samples={cfg.num_samples} needs lengths=NAME of a distribution; remove it for the data set"
                )
            else:
                self._read_data(cfg)
        if self._chooses_groups:
            with self._timed("choose"):
                self._groups = self._choose_groups(cfg)
        self._num_targets = self._count_targets(self._groups[-1].pack_len)
        self._notes += hbp.parallel.describe_layouts(self._context_parallel, self._decoder.heads, self._groups)
        hbp.planning.check_ac_layers(self._groups, len(self._decoder.layers))

    def _setup_decoder(self, cfg: DictConfig) -> None:
        """Build the decoder without weights, and derive what a token costs."""
        with torch.device("meta"):
            self._model: nn.Module = hbp.config.build("model", cfg.model)
        self._decoder = hbp.models.adapt_decoder(self._model)
        self._cost = hbp.planning.CostModel(hbp.models.model_shape(self._model), hbp.planning.rates_of(self._gpu))

    def _choose_groups(self, cfg: DictConfig) -> tuple[hbp.planning.PackingGroup, ...]:
        """Choose groups by the models of time and memory, say why, and write them to a file."""
        budget_gib = cfg.get("memory_gib") or hbp.planning.SAFE_SHARE * self._gpu.memory_gib
        layout = partial(self._context_parallel.layout, self._decoder.heads)
        memory = hbp.config.memory_model(cfg, hbp.models.decoder_shape(self._model), self.world_size, layout)
        fewest = partial(memory.fewest_ac_layers, budget_gib=budget_gib)
        longest, overlong = int(self._lengths.max()), getattr(self._planner, "overlong", "error")
        longest = longest if overlong == "error" else min(longest, self._decoder.max_seq_len)
        candidates = hbp.planning.candidate_groups(longest, fewest, world_size=self.world_size, ac_modes=("full", "selective"))
        smallest = hbp.planning.candidate_groups(1, lambda group: memory.shape.num_layers, world_size=self.world_size)[-1]
        needed_gib = memory.peak(smallest).gib
        shortage = f"{smallest.name} over {smallest.cp_degree} ranks needs {needed_gib:.1f} of {budget_gib:.3g} GiB"
        hbp.planning.check_candidates(candidates, longest if overlong == "error" else 0, shortage=shortage)
        most = max(group.pack_len for group in candidates)
        lengths = np.minimum(self._lengths, most) if overlong.startswith("truncate") else self._lengths[self._lengths <= most]
        selector = hbp.planning.GroupSelector(
            lengths, planner=self._planner, cost=self._cost, world_size=self.world_size, seed=self.seed
        )
        choice = selector.select(candidates)
        rule = hbp.planning.paper_rule([(group, selector.s_per_token(group)) for group in candidates], fewest)
        where = f"{self.world_size} {self._gpu.name}s, {budget_gib:.3g} GiB of each"
        hbp.reporting.print_choice(choice, (rule, selector.epoch_s(rule)), self._console, where=where)
        path = self._output_dir / "groups.yaml"
        with self._writing():
            data = f"{len(lengths):,} samples, {lengths.sum(dtype=np.int64):,} tokens"
            hbp.config.write_groups(
                path, choice.groups, [f"Chosen for {where}, {data}, by modelled time and memory; nothing was measured."]
            )
        self._notes.append(f"The groups are in {path}; train with groups_file={path}")
        return choice.groups

    def _read_lengths(self, name: str, column: str | None, num_samples: int | None) -> None:
        """Take lengths from a file or a distribution, without data and tokenizer.

        Raises:
            ConfigError: it is neither, or a file's number of samples is given.
        """
        self._classes: NDArray[np.int16] | None
        self._places: hbp.reporting.Places
        self._draw: Callable[[int], NDArray[np.int32]]
        self._count_targets: Callable[[int], NDArray[np.int32]]
        self._warnings: list[str]
        if name.lower().endswith(hbp.data.LENGTH_SUFFIXES) or os.path.sep in name or os.path.exists(name):
            if num_samples is not None:
                raise hbp.ConfigError(f"num_samples={num_samples} is for synthetic lengths; {name} has its own number, remove it")
            self._lengths, self._classes = hbp.data.read_lengths(Path(name), column)
            self._lengths_from = name
        else:
            try:
                self._lengths, self._classes = hbp.planning.synthetic_lengths(name, num_samples)
            except hbp.ConfigError as error:
                raise hbp.ConfigError(
                    f"lengths={name} is not a file ({', '.join(hbp.data.LENGTH_SUFFIXES)}), and {error}"
                ) from error
            self._lengths_from = f"synthetic lengths, {name}"
        self._count_targets = lambda longest: np.ones_like(self._lengths)  # nobody knows them
        self._draw = lambda epoch: np.arange(len(self._lengths), dtype=np.int32)
        self._places = lambda ids: [hbp.reporting.RowPlace(dataset=name, row=int(i)) for i in ids]
        self._warnings = []

    def _read_data(self, cfg: DictConfig) -> None:
        """Tokenise the data set into the store that training reads, or estimate its lengths where there is no tokenizer."""
        data = hbp.config.data_settings(cfg.dataset, cfg.tokenizer)
        directory = Path(cfg.get("token_store_dir") or hbp.data.default_store_directory())
        missing = hbp.config.missing_tokenizer_files(cfg)
        if missing:
            loaded, estimated = hbp.data.estimate_data(data, directory)
            self._count_targets = lambda longest: estimated.num_targets
            self._lengths_from = f"estimated from the text's bytes, as the tokenizer's {missing[0]} does not exist"
        else:
            tokenizer = hbp.config.build("tokenizer", cfg.tokenizer)
            loaded, store = hbp.data.open_data(data, tokenizer, directory, hbp.data.Builder.alone())
            self._samples = hbp.data.view_samples(loaded, store, tokenizer)
            self._count_targets = partial(
                store.num_targets_within, cut=hbp.planning.cut_of(getattr(self._planner, "overlong", "error"))
            )
            self._lengths_from = "the data set's tokens"
        self._lengths, self._places = loaded.counts.lengths, loaded.places
        self._draw = lambda epoch: loaded.draw(seed=self.seed, epoch=epoch)
        self._classes = loaded.counts.sources if len(loaded.sources) > 1 else None
        with self._writing():
            bad_rows = hbp.reporting.report_bad_rows(
                loaded.bad_rows(), self._output_dir / "bad_rows.csv", cfg.get("bad_rows") or "error"
            )
        self._warnings = [bad_rows] if bad_rows else []
        self._notes += loaded.describe()

    def plan(self) -> hbp.reporting.PlanReport:
        """Plan every epoch up to the last step, and compare the first with other ways to pack it."""
        plans: list[hbp.planning.EpochPlan] = []
        num_steps = 0
        with self._timed("plan"), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            while len(plans) < self._epochs and (self._max_steps is None or num_steps < self._max_steps):
                plans.append(self._plan_epoch(len(plans), first_step=num_steps))
                num_steps += plans[-1].num_steps
        hbp.planning.check_positions(plans[0], self._decoder.max_seq_len)
        with self._timed("measure"):
            metrics = hbp.planning.measure(plans[0], self._cost, self._classes)
        with self._timed("baselines"):
            naive, baselines = self._compare(plans[0])
        with self._writing():
            overlong = hbp.reporting.report_overlong(plans[0], self._lengths, self._output_dir, self._places)
        return hbp.reporting.PlanReport(
            lengths=self._lengths,
            lengths_from=self._lengths_from,
            plans=tuple(plans),
            naive=naive,
            cost=self._cost,
            metrics=metrics,
            baselines=baselines,
            headline=hbp.reporting.headline(plans[0], naive, metrics=metrics, naive_metrics=baselines["isf"], cost=self._cost),
            warnings=(
                *self._warnings,
                *([overlong] if overlong else []),
                *dict.fromkeys(str(warning.message) for warning in caught if warning.category is UserWarning),
                *hbp.reporting.plan_warnings(plans[0]),
            ),
            seconds=self._seconds,
            samples=self._samples,
        )

    def _plan_epoch(self, epoch: int, *, first_step: int) -> hbp.planning.EpochPlan:
        plan: hbp.planning.EpochPlan = self._planner.plan(
            self._lengths,
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
            sample_ids=self._draw(epoch),
        )
        return plan

    def _compare(self, plan: hbp.planning.EpochPlan) -> tuple[hbp.planning.EpochPlan, dict[str, hbp.planning.PlanMetrics]]:
        """Pack the plan's samples to one length, by each baseline's packer."""
        naive, metrics = plan, {}
        drawn = self._draw(0)
        for name in self._baselines:
            baseline = hbp.planning.plan_baseline(
                name,
                self._lengths,
                hbp.planning.one_length_group(self._groups, plan.lengths),
                world_size=self.world_size,
                seed=self.seed,
                tokens_per_step=getattr(self._planner, "tokens_per_step", None),  # a planner of the user's may have none
                overlong=plan.cut,
                sample_ids=drawn[~np.isin(drawn, plan.dropped)],
            )
            metrics[name] = hbp.planning.measure(baseline, self._cost, self._classes)
            if name == "isf":
                naive = baseline
        return naive, metrics

    def report(self, report: hbp.reporting.PlanReport) -> None:
        """Say what was found, the answer first, and write the plan, its figures and a page about it."""
        plan = report.plan
        self._console.print(f"\n{report.headline}\n", style="bold", markup=False)
        for note in (f"Lengths: {report.lengths_from}.", *self._notes):
            self._console.print(note, markup=False)
        self._console.print()
        hbp.reporting.print_lengths(report.lengths, self._console)
        hbp.reporting.print_groups(plan, self._console)
        rows = {"HBP": report.metrics} | {name: report.baselines[name] for name in self._baselines}
        hbp.reporting.print_metrics(rows, self._console, ranks=self.world_size, machine=self._cost.rates.machine)
        self._console.print(hbp.reporting.expected_time(report.plans, report.cost, self._max_steps), markup=False)
        for line in report.warnings:
            self._console.print(f"warning: {line}", style="yellow", markup=False)
        written = self._write(report)
        self._console.print(f"Written: {', '.join(str(path) for path in written)}", markup=False)
        self._console.print(f"Training makes the same plan, or takes this one with plan_file={written[0]}", markup=False)
        if self._prints_json:
            sys.stdout.write((self._output_dir / "plan.json").read_text(encoding="utf-8"))

    def _write(self, report: hbp.reporting.PlanReport) -> list[Path]:
        """Write the files aside, and rename them when all are complete: what exists is whole and of one plan."""
        writers: dict[str, Callable[[Path], object]] = {
            "plan.parquet": lambda path: hbp.reporting.write_plan(path, report.plans),
            "plan.html": lambda path: path.write_text(hbp.reporting.render_page(report), encoding="utf-8"),
            "plan.json": lambda path: hbp.reporting.write_summary(path, report),
        }
        if self._trace_steps:
            simulation = hbp.planning.simulate(hbp.planning.PackWork.of_plan(report.plan), report.cost)
            writers["trace.json"] = lambda path: hbp.reporting.write_trace(path, report.plan, simulation, self._trace_steps)
        aside = {self._output_dir / f"{name}.{os.getpid()}.tmp": self._output_dir / name for name in writers}
        try:
            with self._writing():
                for path, write in zip(aside, writers.values(), strict=True):
                    with self._timed("write"):  # each file that shows figures has the time of those before it
                        write(path)
                return [path.replace(final) for path, final in aside.items()]
        finally:
            for path in aside:
                path.unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            self._output_dir.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            raise hbp.ConfigError(f"output_dir={self._output_dir} cannot be written: {error.strerror or error}") from error

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start


def _baseline_names(wanted: Any) -> list[str]:
    """Give ``isf`` and the names in a list, or the one name.

    Raises:
        ConfigError: there is no such baseline; said before anything is planned.
    """
    names = dict.fromkeys(["isf", *([wanted] if isinstance(wanted, str) else wanted or [])])
    for name in names:
        if name not in hbp.planning.BASELINE_NAMES:
            raise hbp.ConfigError(f"baselines: {name!r} is unknown; choose from {', '.join(hbp.planning.BASELINE_NAMES)}")
    return list(names)


@config.parse  # type: ignore[untyped-decorator]
def recipe_main(cfg: DictConfig) -> None:
    """Plan by the settings in ``cfg``: the YAML file's, overwritten by ``key=value`` from the command line."""
    recipe = HBPPlanRecipe(cfg)
    recipe.setup(cfg)
    recipe.report(recipe.plan())


def main() -> None:
    """Run from the command line; ``--config`` takes a path or the name of a packaged configuration."""
    hbp.config.run_recipe(recipe_main)


if __name__ == "__main__":
    main()
