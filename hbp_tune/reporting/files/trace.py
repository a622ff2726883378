"""The first steps of a plan as a trace, for Perfetto (ui.perfetto.dev) or Chrome's chrome://tracing."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hbp_tune.planning.comparison.simulation import Simulation
from hbp_tune.planning.plans.records import EpochPlan


def write_trace(path: Path, plan: EpochPlan, simulation: Simulation, num_steps: int) -> None:
    """Write what every rank does in the first optimizer steps: a row for each rank, a block for each thing it does.

    In a micro-step a rank computes, exchanges tokens with its pack's other ranks, waits for the slowest rank (``idle``) and, if
    it takes longer still, for weights (``gather``). How long each takes is modelled, the order inside a micro-step is not.

    Args:
        path: of the file: JSON in Chrome's trace event format, times in microseconds.
        plan: that was simulated.
        simulation: of it.
        num_steps: optimizer steps to write, from the first on.
    """
    ranks = range(plan.world_size)
    names = [{"name": "thread_name", "ph": "M", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}} for rank in ranks]
    path.write_text(json.dumps({"traceEvents": [*names, *_blocks(plan, simulation, num_steps)]}), encoding="utf-8")


def _blocks(plan: EpochPlan, simulation: Simulation, num_steps: int) -> Iterator[dict[str, Any]]:
    starts, ends = plan.micro_step_starts, simulation.micro_step_s.cumsum()
    tokens = plan.sum_per_pack(plan.lengths)
    borders = itertools.pairwise([*starts.tolist(), plan.num_packs])
    for (first, after), end_s, micro_step_s in zip(borders, ends.tolist(), simulation.micro_step_s.tolist(), strict=True):
        if plan.pack_step[first] >= num_steps:
            return
        group, slowest_s = plan.groups[plan.pack_group[first]], float(simulation.busy_s[first:after].max())
        for pack in range(first, after):
            busy_s, exchange_s = float(simulation.busy_s[pack]), float(simulation.exchange_s[pack])
            lasts = {
                "compute": busy_s - exchange_s,
                "exchange": exchange_s,
                "idle": slowest_s - busy_s,
                "gather": micro_step_s - slowest_s,
            }
            args = {"step": int(plan.pack_step[pack]), "group": group.name, "tokens": int(tokens[pack])}
            first_rank = (pack - first) * group.cp_degree
            for rank in range(first_rank, first_rank + group.cp_degree):
                start_s = end_s - micro_step_s
                for name, last_s in lasts.items():
                    if last_s > 0:
                        block = {"name": name, "ph": "X", "pid": 0, "tid": rank, "ts": 1e6 * start_s, "dur": 1e6 * last_s}
                        yield block | {"args": args}
                    start_s += last_s
