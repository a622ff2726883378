"""Training time of plans from real packs: each pack's forward and backward, timed by itself, put together as ranks would wait.

    python benchmarks/bench_replay.py

A machine with few cores cannot run many ranks side by side without noise that is larger than what balance brings. So every pack
of every plan runs once in this process on one thread, in CPU time, interleaved between plans; a micro-step then takes as long as
its slowest pack, with nothing else counted. Prints a JSON line per plan: seconds of the epoch, and the share that ranks wait.
"""

import time

import numpy as np
import torch
from lines import say
from numpy.typing import NDArray

from hbp_tune.data import HierarchicalPackedDataset
from hbp_tune.demo.model import TinyLlama, build
from hbp_tune.models import adapt_decoder, model_shape
from hbp_tune.parallel import GroupSwitch, Ulysses
from hbp_tune.parallel.activation_checkpoint import make_checkpointable
from hbp_tune.parallel.attention import sdpa_per_document
from hbp_tune.parallel.mesh import CpMesh
from hbp_tune.planning import CostModel, CpDegrees
from hbp_tune.planning.comparison.methods import plan_baseline
from hbp_tune.planning.packing.planner import BalancePlanner
from hbp_tune.planning.plans.hashing import hashed_order
from hbp_tune.planning.plans.records import EpochPlan, PackingGroup

RANKS = 8
GROUPS = (PackingGroup(name="short", pack_len=1024), PackingGroup(name="long", pack_len=8192))
NUM_SHORT, NUM_LONG = 300, 16


class RandomStore:
    """Tokens that are random, all of them targets."""

    def read(self, sample_ids: NDArray[np.int32], lengths: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Give as many tokens as the samples have."""
        tokens = np.random.default_rng(0).integers(0, 2048, int(lengths.sum())).astype(np.int32)
        return tokens, np.ones(len(tokens), dtype=np.bool_)


def main() -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    short, long = rng.lognormal(5, 0.9, NUM_SHORT), np.exp(rng.uniform(np.log(1024), np.log(8192), NUM_LONG))
    lengths = np.clip(np.concatenate((short, long)), 30, 8192).astype(np.int32)
    model = build(TinyLlama(max_position_embeddings=8192))
    cost = CostModel(model_shape(model))
    decoder = adapt_decoder(model)
    make_checkpointable(decoder.layers)
    switch = GroupSwitch(decoder.layers, {CpDegrees(): CpMesh(None, None)}, sdpa_per_document, Ulysses())

    def planned(**settings: str | None) -> EpochPlan:
        return BalancePlanner(**settings).plan(lengths, lengths, GROUPS, world_size=RANKS, seed=0, cost=cost)

    plans = {
        "isf, one length": plan_baseline("isf", lengths, GROUPS[1], world_size=RANKS, seed=0),
        "paper, unsorted": planned(mode="paper", sort_by=None),
        "paper, by attention": planned(mode="paper"),
        "paper, by cost": planned(mode="paper", sort_by="cost"),
        "cost": planned(mode="cost"),
    }
    datasets = {
        name: [HierarchicalPackedDataset(RandomStore(), plan, np.ones(len(plan.sample_ids)), rank) for rank in range(RANKS)]
        for name, plan in plans.items()
    }
    pack_s = {name: np.zeros(plan.num_packs) for name, plan in plans.items()}
    jobs = [(name, index) for name, plan in plans.items() for index in range(plan.num_packs)]
    for job in (0, 1, 2, *hashed_order(len(jobs), seed=0, epoch=0, stream="replay")):  # the first three warm up
        name, index = jobs[job]
        batch = datasets[name][int(plans[name].pack_first_rank[index])][index]
        start = time.process_time()
        loss = model(
            batch.tokens,
            mask=switch.activate(batch),
            input_pos=batch.input_pos,
            labels=batch.labels,
            loss_weights=batch.loss_weights,
        )
        loss.backward()
        pack_s[name][index] = time.process_time() - start
        model.zero_grad(set_to_none=True)
    for name, plan in plans.items():
        starts = np.flatnonzero(plan.pack_first_rank == 0)
        epoch_s = np.maximum.reduceat(pack_s[name], starts).sum()
        idle = 1 - pack_s[name].sum() / (epoch_s * RANKS)
        line = {"plan": name, "micro_steps": len(starts), "epoch_s": round(float(epoch_s), 2), "idle": round(float(idle), 4)}
        say(line | {"all_packs_s": round(float(pack_s[name].sum()), 1)})


if __name__ == "__main__":
    main()
