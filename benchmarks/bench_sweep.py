"""What balance packing brings by model, data, GPUs, share of long data and context length: modelled, nothing is measured.

    python benchmarks/bench_sweep.py --plots DIR > sweep.md       # some minutes on one core
    python benchmarks/bench_sweep.py --small                      # half a minute: fewer samples and settings

For every setting the groups are chosen by modelled time and memory (80 GB, H100), as ``hbp_plan groups=auto`` does; beside them
are one-length ISF in the strategy that is fastest for it, LongAlign's two ways, and systems that mix CP degrees within a step. A
step has 16K tokens a rank. The ideal is perfect balance, no communication, and the least recomputation of all candidates.
``mixing`` is what steps that mix CP degrees, planned over the whole epoch, would bring beyond HBP; and, in brackets, the most
that any such plan with the recomputation of HBP's groups could.
"""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from paper_tables import head, row
from quality.plots import Panel, draw

from hbp_tune.errors import ConfigError
from hbp_tune.planning.comparison.assignments import assign_epoch, dynamic_cp, flexsp, least_mixed_s
from hbp_tune.planning.comparison.distributions import synthetic_lengths
from hbp_tune.planning.comparison.methods import plan_baseline
from hbp_tune.planning.comparison.mixing import assign_mixed
from hbp_tune.planning.comparison.selection import GroupSelector, candidate_groups
from hbp_tune.planning.comparison.simulation import PackWork, Simulation, ideal_s, simulate
from hbp_tune.planning.costs.cost import CostModel, ModelShape
from hbp_tune.planning.costs.exchange import AttentionHeads
from hbp_tune.planning.costs.memory import LLAMA3_1_8B_DECODER, DecoderShape, MemoryModel
from hbp_tune.planning.packing.planner import BalancePlanner
from hbp_tune.planning.plans.records import PackingGroup
from hbp_tune.reporting.terminal.choice import describe_set

Lengths = NDArray[np.int32]
BUDGET_GIB = 79.0
LOCAL_TOKENS = 16_384
QWEN2_5_32B = DecoderShape(
    num_layers=64, embed_dim=5120, num_heads=40, num_kv_heads=8, head_dim=128, intermediate_dim=27_648, vocab_size=152_064
)
LLAMA3_1_70B = DecoderShape(
    num_layers=80, embed_dim=8192, num_heads=64, num_kv_heads=8, head_dim=128, intermediate_dim=28_672, vocab_size=128_256
)
MODELS = {"Llama 3.1 8B": LLAMA3_1_8B_DECODER, "Qwen2.5 32B": QWEN2_5_32B, "Llama 3.1 70B": LLAMA3_1_70B}
MIXTURES = ("tulu3_longcite", "openhermes_longcite", "tulu3_longwriter")
NEEDED_SHARE = 0.9


def cost_of(shape: DecoderShape) -> CostModel:
    """Make the cost model of a decoder on H100s."""
    return CostModel(
        ModelShape(
            num_layers=shape.num_layers,
            linear_params=shape.num_params - (0 if shape.tied else shape.vocab_params),
            attention_dim=shape.num_heads * shape.head_dim,
            heads=AttentionHeads(query=shape.num_heads, kv=shape.num_kv_heads),
            head_params=shape.vocab_params,
            gathered_params=shape.num_params,
        )
    )


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One cell of the sweep, its groups chosen.

    Args:
        lengths: ``int32[num_samples]``.
        shape: of the model.
        world_size: GPUs.

    Raises:
        ConfigError: nothing fits, from the choice of candidates.
    """

    lengths: Lengths
    shape: DecoderShape
    world_size: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step over all ranks."""
        return LOCAL_TOKENS * self.world_size

    def run(self, *, others: bool = False) -> "Result":
        """Choose groups, plan, and simulate; ``others`` adds the other systems."""
        cost = cost_of(self.shape)
        memory = MemoryModel(self.shape, world_size=self.world_size, accumulation="sharded")
        fewest = partial(memory.fewest_ac_layers, budget_gib=BUDGET_GIB)
        candidates = candidate_groups(
            int(self.lengths.max()), fewest, world_size=self.world_size, max_cp_degree=64, ac_modes=("full", "selective")
        )
        planner = BalancePlanner(self.tokens_per_step)
        choice = GroupSelector(self.lengths, planner=planner, cost=cost, world_size=self.world_size).select(candidates)
        baseline = partial(
            plan_baseline, lengths=self.lengths, world_size=self.world_size, seed=0, tokens_per_step=self.tokens_per_step
        )
        # One-length packing in the strategy that is fastest for it.
        strategies = [group for group in candidates if group.pack_len == choice.groups[-1].pack_len]
        strategies = [group for group in strategies if group.pack_len // group.cp_degree <= LOCAL_TOKENS] or strategies
        isf = {group: PackWork.of_plan(baseline("isf", group=group)) for group in strategies}
        single = min(isf, key=lambda group: simulate(isf[group], cost).epoch_s)
        works = {"isf": isf[single]}
        for name, plan_with in (("hbp", planner), ("paper mode", BalancePlanner(self.tokens_per_step, mode="paper"))):
            ones = np.ones_like(self.lengths)
            plan = plan_with.plan(self.lengths, ones, choice.groups, world_size=self.world_size, seed=0, cost=cost)
            works[name] = PackWork.of_plan(plan)
        if others:
            works |= {name: PackWork.of_plan(baseline(name, group=single)) for name in ("longalign_packing", "longalign_sorted")}
            assign = partial(
                assign_epoch, self.lengths, tokens_per_step=self.tokens_per_step, world_size=self.world_size, cost=cost
            )
            works |= {"flexsp": assign(flexsp(single)), "dynamic cp": assign(dynamic_cp(single))}
        return Result(
            groups=choice.groups,
            one_length=single,
            runs={name: simulate(work, cost) for name, work in works.items()},
            ideal_s=min(ideal_s(self.lengths, cost, group, self.world_size) for group in candidates),
            least_mixed_s=least_mixed_s(self.lengths, choice.groups, world_size=self.world_size, cost=cost),
            mixed_s=min(self._mixed_s(ladder, cost) for ladder in _ladders(choice.groups, int(self.lengths.max()))),
        )

    def _mixed_s(self, ladder: Sequence[PackingGroup], cost: CostModel) -> float:
        if ladder[-1].cp_degree > self.world_size:
            return float("inf")
        return simulate(assign_mixed(self.lengths, ladder, world_size=self.world_size, cost=cost), cost).epoch_s


def _ladders(groups: Sequence[PackingGroup], longest: int) -> list[list[PackingGroup]]:
    """Give packs of every CP degree: with as many tokens a rank as the shortest group's, or the groups themselves if any."""
    by_degree = {group.cp_degree: group for group in groups}
    short = groups[0]
    plain, own = [short], [by_degree[short.cp_degree]]
    while plain[-1].pack_len < longest:
        degree, pack_len = 2 * plain[-1].cp_degree, 2 * plain[-1].pack_len
        plain.append(replace(short, name=f"cp{degree}", cp_degree=degree, pack_len=pack_len))
        if own[-1].pack_len < longest:
            own.append(by_degree.get(degree, plain[-1]))
    return [plain, own] if all(a.pack_len < b.pack_len for a, b in itertools.pairwise(own)) else [plain]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a setting gave."""

    groups: tuple[PackingGroup, ...]
    one_length: PackingGroup
    runs: dict[str, Simulation]
    ideal_s: float
    least_mixed_s: float
    mixed_s: float

    def speed_up(self, name: str = "hbp") -> float:
        """Compare with ISF at one length."""
        return self.runs["isf"].epoch_s / self.runs[name].epoch_s

    @property
    def ideal_speed_up(self) -> float:
        """Give the bound of all speed-ups."""
        return self.runs["isf"].epoch_s / self.ideal_s

    @property
    def of_ideal(self) -> float:
        """Give the share of the bound that HBP reaches."""
        return self.ideal_s / self.runs["hbp"].epoch_s

    def where_it_goes(self) -> str:
        """Say what keeps the plan from the ideal: shares of its time."""
        shares = self.runs["hbp"].shares
        lost = {name: shares[name] for name in ("idle", "exchange", "recompute", "gather", "fixed")}
        return ", ".join(f"{name} {share:.0%}" for name, share in lost.items() if share >= 0.005) or "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="fewer samples and settings")
    parser.add_argument("--plots", type=Path, help="folder for the curves")
    arguments = parser.parse_args()
    num_samples = 40_000 if arguments.small else None
    worlds = (8, 32) if arguments.small else (8, 64, 256, 1024)
    pictures = {
        "gpus": by_gpus(num_samples, worlds),
        "long_share": by_long_share(20_000 if arguments.small else 300_000, 32),
        "context": by_context(20_000 if arguments.small else 300_000, 64),
    }
    if arguments.plots:
        arguments.plots.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            (arguments.plots / f"sweep_{name}.svg").write_text(picture)


def _line(result: Result) -> list[Any]:
    cells = [f"{result.speed_up():.2f}", f"{result.speed_up('paper mode'):.2f}", f"{result.ideal_speed_up:.2f}"]
    hbp_s = result.runs["hbp"].epoch_s
    mixed = f"{hbp_s / result.mixed_s - 1:.1%}" if np.isfinite(result.mixed_s) else "-"
    share = f"{result.of_ideal:.1%}" if result.of_ideal >= NEEDED_SHARE else f"_{result.of_ideal:.1%}_"
    return [
        describe_set(result.groups),
        describe_set([result.one_length]),
        *cells,
        share,
        result.where_it_goes(),
        f"{mixed} ({hbp_s / result.least_mixed_s - 1:.1%})",
    ]


_COLUMNS = ("groups", "one length", "HBP", "paper mode", "ideal", "of the ideal", "the rest", "mixing")


def by_gpus(num_samples: int | None, worlds: Sequence[int]) -> str:
    print("## By model, data and GPUs: speed-up over ISF at one length\n")
    head("model", "data", "GPUs", *_COLUMNS)
    others: list[tuple[str, Result]] = []
    panels = []
    for mixture in MIXTURES:
        lengths, _ = synthetic_lengths(mixture, num_samples)
        curves: dict[str, list[float]] = {}
        for name, shape in MODELS.items():
            for world_size in worlds:
                with_others = name == "Llama 3.1 8B" and world_size == worlds[1]
                try:
                    result = Setting(lengths=lengths, shape=shape, world_size=world_size).run(others=with_others)
                except ConfigError:
                    row(name, mixture, world_size, "does not fit", *[None] * 7)
                    curves.setdefault(name, []).append(float("nan"))  # a gap in the picture
                    continue
                row(name, mixture, world_size, *_line(result))
                curves.setdefault(name, []).append(result.speed_up())
                if with_others:
                    others.append((f"{mixture}, {world_size} GPUs", result))
        drawn = {name: np.array([values]) for name, values in curves.items()}
        panels.append(Panel(title=mixture, y_label="speed-up", curves=drawn, x_label="GPUs", x_names=[str(n) for n in worlds]))
    print()
    other_systems(others)
    return draw(panels)


def other_systems(results: Sequence[tuple[str, Result]]) -> None:
    names = list(results[0][1].runs)
    print("## Other systems, Llama 3.1 8B: speed-up over ISF at one length, idle share in brackets\n")
    head("data", *names)
    for name, result in results:
        row(name, *(f"{result.speed_up(run):.2f} ({result.runs[run].shares['idle']:.1%})" for run in names))
    print()


def by_long_share(num_short: int, world_size: int) -> str:
    print(f"## By share of long data: Llama 3.1 8B, {world_size} GPUs, Tulu 3 with LongCite\n")
    head("long samples", "share of tokens over 16K", *_COLUMNS)
    lengths, sources = synthetic_lengths("tulu3_longcite")
    short, long = lengths[sources == 0][:num_short], np.tile(lengths[sources == 1], 100)
    results, names = [], []
    for share in (0.0001, 0.001, 0.003, 0.01, 0.03, 0.1):
        mixed = np.concatenate((short, long[: max(8, int(share * num_short))]))
        results.append(Setting(lengths=mixed, shape=LLAMA3_1_8B_DECODER, world_size=world_size).run())
        over = mixed[mixed > 16_384].sum(dtype=np.int64) / mixed.sum(dtype=np.int64)
        names.append(f"{over:.0%}")
        row(f"{share:.2%}", f"{over:.1%}", *_line(results[-1]))
    print()
    return _picture("Tulu 3 and LongCite", results, "share of tokens in samples over 16K", names)


def by_context(num_short: int, world_size: int) -> str:
    print(f"## By context length: Llama 3.1 8B, {world_size} GPUs, Tulu 3 to 16K, LongCite stretched to the length\n")
    head("context", *_COLUMNS)
    lengths, sources = synthetic_lengths("tulu3_longcite")
    short, long = lengths[sources == 0][:num_short], lengths[sources == 1]
    results, names = [], []
    for context in (32_768, 65_536, 131_072, 262_144, 524_288, 1_048_576):
        stretched = np.maximum(1, long.astype(np.int64) * context // 131_072).astype(np.int32)
        # As many tokens of long samples in each, so that only their length differs.
        kept = stretched[: max(8, int(len(long) * num_short / 939_343 * 131_072 / context))]
        mixed = np.concatenate((np.minimum(short, 16_384), np.resize(kept, max(8, len(kept)))))
        names.append(f"{context // 1024}K")
        try:
            results.append(Setting(lengths=mixed, shape=LLAMA3_1_8B_DECODER, world_size=world_size).run())
        except ConfigError as error:
            row(names.pop(), str(error), *[None] * 7)
            continue
        row(names[-1], *_line(results[-1]))
    print()
    return _picture("Tulu 3 with samples as long as the context", results, "context", names)


def _picture(title: str, results: Sequence[Result], x_label: str, names: Sequence[str]) -> str:
    curves = {
        "HBP": np.array([[result.speed_up() for result in results]]),
        "paper mode": np.array([[result.speed_up("paper mode") for result in results]]),
        "ideal": np.array([[result.ideal_speed_up for result in results]]),
    }
    return draw([Panel(title=title, y_label="speed-up over ISF at one length", curves=curves, x_label=x_label, x_names=names)])


if __name__ == "__main__":
    main()
