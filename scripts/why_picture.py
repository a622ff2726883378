"""Draws docs/images/why.svg: what 32 GPUs do in 60 modelled seconds, packed to one length and by Hierarchical Balance Packing.

python scripts/why_picture.py > docs/images/why.svg
"""

import sys
from html import escape

import numpy as np

from hbp_tune.planning import ISF, BalancePlanner, CostModel, PackingGroup, synthetic_lengths
from hbp_tune.planning.comparison.simulation import PackWork, simulate
from hbp_tune.planning.plans.records import EpochPlan

WORLD_SIZE, WINDOW_S, NUM_SAMPLES = 32, 60.0, 60_000
LEFT, WIDTH, ROW = 24, 712, 5.0
SHORT, LONG, EXCHANGE, IDLE, INK, MUTED = "#2563eb", "#d9540b", "#f2b38d", "#e3e7ee", "#1b2430", "#566173"
LONG_GROUP = PackingGroup(name="128K", pack_len=131072, cp_degree=8, ac_layers=29)
GROUPS = (PackingGroup(name="16K", pack_len=16384, ac_layers=28), LONG_GROUP)


def panel(title: str, plan: EpochPlan, top: float) -> tuple[str, float]:
    """Draw micro-steps from the middle of the epoch on; give the drawing, and tokens a second."""
    cost = CostModel()
    simulated, tokens = simulate(PackWork.of_plan(plan), cost), plan.sum_per_pack(plan.lengths)
    ends = simulated.micro_step_s.cumsum()
    middle_s = float(ends[-1]) / 2
    starts = plan.micro_step_starts
    shapes = []
    for index in np.flatnonzero((ends > middle_s) & (ends - simulated.micro_step_s < middle_s + WINDOW_S)):
        last = starts[index + 1] if index + 1 < len(starts) else plan.num_packs
        begin_s = float(ends[index] - simulated.micro_step_s[index]) - middle_s
        for pack in range(starts[index], last):
            group = plan.groups[plan.pack_group[pack]]
            busy_s, exchange_s = float(simulated.busy_s[pack]), float(simulated.exchange_s[pack])
            colour = LONG if group.cp_degree > 1 else SHORT
            y, height = top + ROW * int(plan.pack_first_rank[pack]), ROW * group.cp_degree
            for from_s, to_s, fill in ((0, busy_s - exchange_s, colour), (busy_s - exchange_s, busy_s, EXCHANGE)):
                low, high = (min(max(begin_s + s, 0.0), WINDOW_S) * WIDTH / WINDOW_S + LEFT for s in (from_s, to_s))
                if high - low > 0.05:
                    shapes.append(
                        f'<rect x="{low:.1f}" y="{y:.1f}" width="{high - low:.1f}" height="{height - 0.6:.1f}" fill="{fill}"/>'
                    )
        line = (begin_s + float(simulated.micro_step_s[index])) * WIDTH / WINDOW_S + LEFT
        if LEFT < line < LEFT + WIDTH:
            shapes.append(f'<path d="M{line:.1f} {top:.0f}v{ROW * WORLD_SIZE:.0f}" stroke="#ffffff" stroke-width="1.2"/>')
    rate = float(tokens.sum()) / simulated.epoch_s
    shares = simulated.shares
    note = f"{rate / 1000:,.0f}K tokens/s; waiting {shares['idle']:.0%}, exchange {shares['exchange']:.0%}, of all time"
    frame = f'<rect x="{LEFT}" y="{top}" width="{WIDTH}" height="{ROW * WORLD_SIZE:.0f}" fill="{IDLE}"/>'
    head = (
        f'<text x="{LEFT}" y="{top - 8:.0f}" font-weight="bold" fill="{INK}">{escape(title)}</text>'
        f'<text x="{LEFT + WIDTH}" y="{top - 8:.0f}" text-anchor="end" fill="{MUTED}">{note}</text>'
    )
    return head + frame + "".join(shapes), rate


def main() -> None:
    """Print the picture."""
    lengths, _ = synthetic_lengths("tulu3_longcite", NUM_SAMPLES)
    cost = CostModel()
    naive = BalancePlanner(mode="paper", fill=False, sort_by=None, packer=ISF()).plan(
        lengths, lengths, (LONG_GROUP,), world_size=WORLD_SIZE, seed=0, cost=cost
    )
    ours = BalancePlanner(tokens_per_step=2**21).plan(lengths, lengths, GROUPS, world_size=WORLD_SIZE, seed=0, cost=cost)
    before, slow = panel("Packed to one length: 128K, each pack over 8 GPUs", naive, 66)
    after, fast = panel("Hierarchical Balance Packing: 16K on one GPU, 128K over 8", ours, 276)
    keys = (
        (SHORT, "16K packs"),
        (LONG, "128K packs"),
        (EXCHANGE, "exchange between GPUs of a pack"),
        (IDLE, "waiting for the slowest"),
    )
    x, legend = LEFT, ""
    for colour, text in keys:
        legend += (
            f'<rect x="{x}" y="450" width="12" height="12" fill="{colour}"/><text x="{x + 18}" y="460" fill="{INK}">{text}</text>'
        )
        x += 34 + 7 * len(text)
    title = f"{WINDOW_S:.0f} modelled seconds of 32 H100s, a row each: {fast / slow:.2f} times as many tokens"
    sys.stdout.write(
        '<svg xmlns="http://www.w3.org/2000/svg" width="760" height="476" viewBox="0 0 760 476" font-family="sans-serif" '
        'font-size="12.5"><rect width="760" height="476" rx="8" fill="#ffffff"/>'
        f'<text x="{LEFT}" y="26" font-size="15" font-weight="bold" fill="{INK}">{title}</text>{before}{after}{legend}</svg>\n'
    )


if __name__ == "__main__":
    main()
