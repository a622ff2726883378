"""The HBP paper's timings, recomputed layers and speed-ups beside the cost model's, as markdown.

    python benchmarks/paper_groups.py > groups.md

Nothing here is measured by us: the paper's figures are of H100 GPUs with its authors' software, ours are modelled.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from paper_tables import COST, GROUPS, LONG, Lengths, head, plan, row

from hbp_tune.components.planning.comparison import plan_baseline
from hbp_tune.components.planning.cost import LLAMA3_1_8B, CostModel, ModelShape
from hbp_tune.components.planning.distributions import synthetic_lengths
from hbp_tune.components.planning.exchange import AttentionHeads
from hbp_tune.components.planning.fitting import FittedRates, MemoryLine, fit_rates, predict_s
from hbp_tune.components.planning.hardware import H100
from hbp_tune.components.planning.measurements import Measurement
from hbp_tune.components.planning.memory import LLAMA3_1_8B_DECODER, MemoryModel
from hbp_tune.components.planning.metrics import micro_step_s
from hbp_tune.components.planning.records import EpochPlan, PackingGroup
from hbp_tune.components.planning.simulation import PackWork, simulate

TOKENS_PER_RANK = 16_384
WORLD_SIZE = 32
BUDGET_GIB = 79.0
# Length, CP degree, recomputed layers, seconds an iteration. Full-length documents, then "at equal tokens per device".
FULL = [
    (32, 2, 28, 4.45),
    (32, 4, 23, 4.35),
    (32, 8, 8, 4.12),
    (64, 4, 28, 6.3),
    (64, 8, 24, 6.2),
    (128, 8, 29, 10.2),
    (128, 16, 23, 10.5),
]
MIXED = [(8, 2, 8, 2.69), (16, 1, 28, 2.65), (32, 8, 8, 2.83), (64, 4, 28, 3.01), (128, 8, 28, 3.05)]
# Both of the paper's rows that ran out of memory, with all 32 layers recomputed.
OUT_OF_MEMORY = [(64, 2), (128, 4)]
# Weights that one token uses; latent attention, run as 128 heads of 192 (queries, keys) and 128 (values), which Ulysses sends.
# Routed experts stay where they are (expert parallelism, whose own exchange is left out): 13 of 236 billion weights are gathered.
DEEPSEEK_V2 = ModelShape(
    num_layers=60,
    linear_params=21_000_000_000,
    attention_dim=128 * 160,
    heads=AttentionHeads(query=128, kv=128),
    head_params=102_400 * 5120,
    gathered_params=13_000_000_000,
)
LLAMA3_1_70B = ModelShape(
    num_layers=80,
    linear_params=70_553_706_496 - 128_256 * 8192,
    attention_dim=8192,
    heads=AttentionHeads(query=64, kv=8),
    head_params=128_256 * 8192,
    gathered_params=70_553_706_496,
)


def main() -> None:
    lengths, _ = synthetic_lengths("tulu3_longcite")
    timings(lengths)
    layers()
    speed_ups(lengths)
    deepseek()


def measurement(case: tuple[int, int, int, float], doc_len: int) -> Measurement:
    """Turn an iteration of 16K tokens a rank into one pack of equal documents."""
    length, cp_degree, ac_layers, iteration_s = case
    pack_len = 1024 * length
    doc_lens = (doc_len,) * (pack_len // doc_len)
    share = sum(doc_lens) / (cp_degree * TOKENS_PER_RANK)
    group = PackingGroup(name=f"{length}K", pack_len=pack_len, cp_degree=cp_degree, ac_layers=ac_layers)
    seconds = iteration_s * share
    return Measurement(group=group, world_size=WORLD_SIZE, doc_lens=doc_lens, micro_step_s=seconds, peak_gib=BUDGET_GIB)


def effective_len(lengths: Lengths) -> int:
    """Length of equal documents with as much attention for their tokens: ``sum(len ** 2) / sum(len)``."""
    wide = lengths.astype(np.int64)
    return int((wide**2).sum() // wide.sum())


def timings(lengths: Lengths) -> None:
    full = [measurement(case, 1024 * case[0]) for case in FULL]
    mixed = [measurement(case, effective_len(lengths[lengths <= 1024 * case[0]])) for case in MIXED]
    measured = full + mixed
    default = CostModel()
    fits = {
        "all rows": fit_rates(LLAMA3_1_8B, measured, H100),
        "odd rows": fit_rates(LLAMA3_1_8B, measured[::2], H100),
        "even rows": fit_rates(LLAMA3_1_8B, measured[1::2], H100),
    }
    print("## Seconds of an iteration, Llama 3.1 8B, 16K tokens a rank (H100; paper, and modelled with its error)\n")
    head("row", "length", "CP", "AC", "documents", "paper", "default rates", *(f"fitted to {name}" for name in fits))
    for index, (case, one) in enumerate(zip(FULL + MIXED, measured, strict=True)):
        documents = "full length" if index < len(FULL) else f"{one.doc_lens[0]:,} tokens"
        models = [default, *(CostModel(LLAMA3_1_8B, fit.rates) for fit in fits.values())]
        row(index + 1, f"{case[0]}K", case[1], case[2], documents, case[3], *(_error(model, one, case[3]) for model in models))
    print()
    head(
        "fitted to",
        "linear TFLOP/s",
        "attention TFLOP/s",
        "exchange GB/s",
        "across nodes GB/s",
        "fixed s",
        "largest error on the other half",
    )
    for name, fit in fits.items():
        other = {"all rows": measured, "odd rows": measured[1::2], "even rows": measured[::2]}[name]
        row(name, *_rates(fit), f"{_largest(fit, other):.1%}")
    print()


def _error(model: CostModel, one: Measurement, iteration_s: float) -> str:
    ratio = predict(model, one) / (one.micro_step_s or 1)
    return f"{ratio * iteration_s:.2f} ({ratio - 1:+.1%})"


def predict(model: CostModel, one: Measurement) -> float:
    """Model the seconds of a pack."""
    # Gathering is left out: the paper's iterations of several packs gather once or several times, it does not say.
    return predict_s(CostModel(model.shape, replace(model.rates, gather_network_bytes_per_s=1e30)), one)


def _rates(fit: FittedRates) -> list[str]:
    rates = fit.rates
    flops = (rates.token_flops_per_s, rates.square_flops_per_s)
    moved = (rates.exchange_bytes_per_s, rates.network_bytes_per_s)
    return [*(f"{x / 1e12:.0f}" for x in flops), *(f"{x / 1e9:.1f}" for x in moved), f"{rates.micro_step_s:.3f}"]


def _largest(fit: FittedRates, measured: Sequence[Measurement]) -> float:
    model = CostModel(LLAMA3_1_8B, fit.rates)
    return max(abs(predict(model, one) / (one.micro_step_s or 1) - 1) for one in measured)


def layers() -> None:
    counted = MemoryModel(LLAMA3_1_8B_DECODER, world_size=WORLD_SIZE, accumulation="sharded")
    lines = {"all rows": fit_line(FULL), "odd rows": fit_line(FULL[::2]), "even rows": fit_line(FULL[1::2])}
    print(f"## Fewest recomputed layers of 32 that fit {BUDGET_GIB:g} GiB\n")
    head("length", "CP", "paper", "counted model of this package", *(f"line fitted to {name}" for name in lines))
    for length, cp_degree, ac_layers in (*((*case[:3],) for case in FULL), *((*case, "over memory") for case in OUT_OF_MEMORY)):
        group = PackingGroup(name="g", pack_len=1024 * int(length), cp_degree=int(cp_degree))
        models: list[Any] = [counted, *lines.values()]
        fewest = [model.fewest_ac_layers(group, BUDGET_GIB) for model in models]
        row(f"{length}K", cp_degree, ac_layers, *("over memory" if layers is None else layers for layers in fewest))
    print()
    head("line fitted to", "fixed GiB", "KiB per token of a kept layer", "of a recomputed layer")
    for name, line in lines.items():
        row(name, f"{line.fixed_gib:.0f}", f"{line.kept_gib * 2**20:.0f}", f"{line.recomputed_gib * 2**20:.0f}")
    print()


def fit_line(cases: Sequence[tuple[int, int, int, float]]) -> MemoryLine:
    """Find the memory line whose fewest layers are nearest to the paper's, and that has no room for what ran out of memory.

    Every row's peak is the same budget, so that least squares of peaks would find a constant: layers are compared instead, on
    a grid; of equal lines the one with the least for recomputed layers, which keep 8 KiB of inputs at least.
    """
    axes = (np.arange(8, 41) / 2**20, np.arange(5.0, 76), np.arange(100, 401, 5) / 2**20)
    recomputed, fixed, kept = np.meshgrid(*axes, indexing="ij")
    miss = np.zeros_like(fixed)
    for length, cp_degree, ac_layers, _ in cases:
        tokens = 1024 * length / cp_degree
        fewest = np.ceil((fixed + 32 * tokens * kept - BUDGET_GIB) / (tokens * (kept - recomputed)))
        miss += np.abs(np.clip(fewest, 0, 33) - ac_layers)
    for length, cp_degree in OUT_OF_MEMORY:
        miss += np.where(fixed + 32 * 1024 * length / cp_degree * recomputed <= BUDGET_GIB, 100.0, 0.0)
    best = np.unravel_index(int(np.argmin(miss)), miss.shape)
    values = [float(grid[best]) for grid in (fixed, kept, recomputed)]
    return MemoryLine(num_layers=32, fixed_gib=values[0], kept_gib=values[1], recomputed_gib=values[2])


def speed_ups(lengths: Lengths) -> None:
    manual = (PackingGroup(name="short", pack_len=32_768, cp_degree=2, ac_layers=28), LONG)
    print("## Speed-ups, 32 GPUs: modelled, paper's in brackets\n")
    head("plan", "8B", "8B, parts: linear, attention, recompute, exchange, idle", "70B")
    plans = {
        "naive (isf to 128K)": (plan_baseline("isf", lengths, LONG, world_size=WORLD_SIZE, seed=0), "1.00", "1.00"),
        "hierarchical": (plan(lengths, WORLD_SIZE, mode="paper", sort_by=None), "1.16", "1.33"),
        "+ balance": (plan(lengths, WORLD_SIZE, mode="paper"), "1.40", "1.43"),
        "+ balance, manual groups": (plan(lengths, WORLD_SIZE, groups=manual, mode="paper"), "1.23", "-"),
        "cost mode": (plan(lengths, WORLD_SIZE, mode="cost"), "-", "-"),
        "longalign_packing": (plan_baseline("longalign_packing", lengths, LONG, world_size=WORLD_SIZE, seed=0), "0.97", "-"),
        "longalign_sorted": (plan_baseline("longalign_sorted", lengths, LONG, world_size=WORLD_SIZE, seed=0), "0.16", "-"),
    }
    large = CostModel(LLAMA3_1_70B)
    seconds = {name: _seconds(planned, large) for name, (planned, *_) in plans.items()}
    base = next(iter(seconds.values()))
    for name, (planned, *papers) in plans.items():
        ratios = [first / mine for first, mine in zip(base, seconds[name], strict=True)]
        small, deep = (f"{ratio:.2f} ({paper})" for ratio, paper in zip(ratios, papers, strict=True))
        row(name, small, _parts(planned), deep)
    print()


def _seconds(planned: EpochPlan, large: CostModel) -> tuple[float, float]:
    """Seconds of the plan with the 8B model, and with the 70B model, of which the same share of layers recomputes."""
    groups = tuple(replace(group, ac_layers=round(group.ac_layers / 32 * 80)) for group in planned.groups)
    deep = replace(planned, groups=groups)
    return float(micro_step_s(planned, COST).sum()), float(micro_step_s(deep, large).sum())


def _parts(planned: EpochPlan) -> str:
    """Shares of all ranks' modelled seconds."""
    spent = simulate(PackWork.of_plan(planned), COST).shares
    return ", ".join(f"{spent[name]:.0%}" for name in ("linear", "attention", "recompute", "exchange", "idle"))


def deepseek() -> None:
    lengths, _ = synthetic_lengths("tulu3")
    cost = CostModel(DEEPSEEK_V2)
    naive = plan_baseline(
        "isf", lengths, PackingGroup(name="long", pack_len=32_768, cp_degree=8, ac_layers=60), world_size=256, seed=0
    )
    print("## DeepSeek-V2 on 256 H100 at 32K, Tulu 3, from the cost model alone (paper: 2.4)\n")
    head("short group", "speed-up")
    for pack_len in (2048, 4096, 8192):
        short = PackingGroup(name="short", pack_len=pack_len, ac_layers=60)
        long = PackingGroup(name="long", pack_len=32_768, cp_degree=8, ac_layers=60)
        balanced = plan(lengths, 256, groups=(short, long), mode="paper")
        seconds = [float(micro_step_s(planned, cost).sum()) for planned in (naive, balanced)]
        row(f"{pack_len // 1024}K, CP 1", f"{seconds[0] / seconds[1]:.2f}")
    print()


if __name__ == "__main__":
    assert GROUPS[1] is LONG
    main()
