"""Speed and quality of planning, one JSON line per algorithm.

    python benchmarks/bench_planning.py                                   # 1M samples like Tulu 3 + LongCite
    python benchmarks/bench_planning.py --num-samples 10000000 --only cost,paper
    python benchmarks/bench_planning.py --lengths lengths.csv.gz --column n_tokens

Every case runs in a process of its own, forked after compilation, so that ``peak_mib`` is what that case alone needed.
``plan_s`` of a baseline is placing samples alone; of the two modes of HBP it is the whole plan, ``measure_s`` its metrics.
torchtune's own ``PackedDataset`` and the first-fit of ``prtpy`` (``pip install prtpy``) run on fewer samples: the first holds
every token as a Python integer, the second looks at every open pack.
"""

import argparse
import dataclasses
import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from lines import say
from numpy.typing import NDArray

from hbp_tune.data.store.lengths import read_lengths
from hbp_tune.planning.comparison.baselines import BASELINES
from hbp_tune.planning.comparison.distributions import synthetic_lengths
from hbp_tune.planning.comparison.metrics import measure
from hbp_tune.planning.costs.cost import CostModel
from hbp_tune.planning.packing.planner import BalancePlanner
from hbp_tune.planning.plans.records import PackingGroup

LONG = PackingGroup(name="long", pack_len=131072, cp_degree=8, ac_layers=29)
GROUPS = (PackingGroup(name="short", pack_len=16384, ac_layers=28), LONG)
FEW_SAMPLES = 20_000
Lengths = NDArray[np.int32]


class _Fixed:
    """Packs that were placed before: planning them in several ways places once."""

    def __init__(self, place: NDArray[np.int64]) -> None:
        self._place = place

    def place(self, lengths: Lengths, pack_len: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
        return self._place


def packer_case(name: str, lengths: Lengths, classes: NDArray[np.int16] | None) -> dict[str, Any]:
    start = time.perf_counter()
    place = BASELINES[name]().place(lengths, LONG.pack_len, seed=0, epoch=0)
    return {"plan_s": round(time.perf_counter() - start, 3), **_quality(place, lengths, classes)}


def _quality(place: NDArray[np.int64], lengths: Lengths, classes: NDArray[np.int16] | None) -> dict[str, Any]:
    num_packs = int(place.max()) + 1
    line: dict[str, Any] = {"fill": round(int(lengths.sum(dtype=np.int64)) / (num_packs * LONG.pack_len), 5)}
    for replicas in (4, 32):
        for when, sort_by in (("before", None), ("after", "attention")):
            planner = BalancePlanner(mode="paper", packer=_Fixed(place), fill=False, sort_by=sort_by)
            plan = planner.plan(lengths, lengths, [LONG], world_size=replicas * LONG.cp_degree, seed=0)
            metrics = measure(plan, CostModel(), classes)
            line[f"abr_{when}_{replicas}"] = round(metrics.abr, 5)
            if (replicas, when) == (4, "before"):
                line |= {key: round(getattr(metrics, key), 5) for key in ("pr", "dbr", "cr")}
    return line


def mode_case(mode: str, world_size: int, lengths: Lengths, classes: NDArray[np.int16] | None) -> dict[str, Any]:
    start = time.perf_counter()
    plan = BalancePlanner(mode=mode).plan(lengths, lengths, GROUPS, world_size=world_size, seed=0)
    planned = time.perf_counter()
    metrics = measure(plan, CostModel(), classes)
    measured = time.perf_counter()
    figures = {key: round(value, 5) for key, value in dataclasses.asdict(metrics).items()}
    return {
        "world_size": world_size,
        "plan_s": round(planned - start, 3),
        "measure_s": round(measured - planned, 3),
        "steps": plan.num_steps,
        **figures,
    }


def torchtune_case(lengths: Lengths, classes: NDArray[np.int16] | None) -> dict[str, Any]:
    from torchtune.datasets import PackedDataset

    class Samples(list[dict[str, list[int]]]):
        """Tokens that are all the same: only their number matters."""

    samples = Samples({"tokens": [1] * int(length), "labels": [1] * int(length)} for length in lengths)
    start = time.perf_counter()
    packs = PackedDataset(samples, max_seq_len=LONG.pack_len).packs
    return {"plan_s": round(time.perf_counter() - start, 3), "fill": round(lengths.sum() / (len(packs) * LONG.pack_len), 5)}


def prtpy_case(lengths: Lengths, classes: NDArray[np.int16] | None) -> dict[str, Any]:
    from prtpy import BinnerKeepingSums
    from prtpy.packing import first_fit

    start = time.perf_counter()
    sums = list(first_fit.online(BinnerKeepingSums(), binsize=LONG.pack_len, items=lengths.tolist()))
    return {"plan_s": round(time.perf_counter() - start, 3), "fill": round(lengths.sum() / (len(sums) * LONG.pack_len), 5)}


def in_own_process(case: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Run a case in a forked process, and add the memory that it took beyond what it began with."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)

    def run() -> None:
        before_kib = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024
        try:
            line = case(*args)
        except ImportError as error:
            line = {"skipped": str(error)}
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sender.send(line | {"peak_mib": round((peak_kib - before_kib) / 1024)})

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    line: dict[str, Any] = receiver.recv()
    process.join()
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixture", default="tulu3_longcite")
    parser.add_argument("--num-samples", type=int, default=1_000_000)
    parser.add_argument("--lengths", type=Path, help="a file of lengths in place of the mixture")
    parser.add_argument("--column", help="of the file")
    parser.add_argument("--only", default="", help="comma-separated algorithms")
    arguments = parser.parse_args()
    if arguments.lengths:
        lengths, classes = read_lengths(arguments.lengths, arguments.column)
        lengths = np.minimum(lengths, LONG.pack_len)
    else:
        lengths, classes = synthetic_lengths(arguments.mixture, arguments.num_samples)
    cases: dict[str, tuple[Any, ...]] = {name: (packer_case, name, lengths, classes) for name in BASELINES}
    for world_size in (32, 256):
        cases |= {f"{mode}@{world_size}": (mode_case, mode, world_size, lengths, classes) for mode in ("paper", "cost")}
    few = lengths[:FEW_SAMPLES]
    cases |= {"torchtune PackedDataset": (torchtune_case, few, None), "prtpy first-fit": (prtpy_case, few, None)}
    cases["first_fit_shuffle, as few"] = (packer_case, "first_fit_shuffle", few, None)
    wanted = arguments.only.split(",") if arguments.only else [""]
    for mode in ("paper", "cost"):  # compiled, or read from the cache, before anything is timed
        BalancePlanner(mode=mode).plan(few, few, GROUPS, world_size=32, seed=0)
    for name, (case, *args) in cases.items():
        if any(name.startswith(each) for each in wanted):
            line = in_own_process(case, *args)
            num_samples = len(next(arg for arg in args if isinstance(arg, np.ndarray)))
            say({"algorithm": name, "samples": num_samples, **line})


if __name__ == "__main__":
    main()
