from dataclasses import replace

import numpy as np

from hbp_tune.planning.comparison.metrics import PlanMetrics, measure
from hbp_tune.planning.comparison.simulation import PackWork, simulate
from hbp_tune.planning.costs.cost import CostModel, ModelShape
from hbp_tune.planning.plans.records import EpochPlan, PackingGroup
from hbp_tune.reporting.formats import write_share
from hbp_tune.reporting.terminal.advice import expected_time, headline, plan_warnings

SHORT = PackingGroup(name="short", pack_len=4096)
LONG = PackingGroup(name="long", pack_len=32768, cp_degree=4, ac_layers=8)
# Attention costs a document as much as all else does at 22,127 tokens: 2% of documents of 500 and 400, 15% of 4,000.
COST = CostModel(ModelShape(num_layers=16, linear_params=1_000_000_000, attention_dim=2048))
METRICS = PlanMetrics(
    dbr=0.0,
    pr=0.0,
    pr_tail=0.0,
    abr=0.0,
    cr=0.0,
    ave_t=0.0,
    cbr=0.0,
    idle=0.02,
    p99_imbalance=0.0,
    diversity=1.0,
    epoch_s=100.0,
)


def planned(*packs: tuple[int, list[int]], groups: tuple[PackingGroup, ...] = (SHORT, LONG), world_size: int = 4) -> EpochPlan:
    """Make a plan of packs, each a group and its documents; a full micro-step is a step."""
    num_docs = [len(lengths) for _, lengths in packs]
    step, first_rank = [0], [0]
    for group, _ in packs:
        full = first_rank[-1] + groups[group].cp_degree
        step.append(step[-1] + full // world_size)
        first_rank.append(full % world_size)
    return EpochPlan(
        groups=groups,
        world_size=world_size,
        sample_ids=np.arange(sum(num_docs), dtype=np.int32),
        lengths=np.array([length for _, lengths in packs for length in lengths], dtype=np.int32),
        pack_offsets=np.cumsum([0, *num_docs]),
        pack_group=np.array([group for group, _ in packs], dtype=np.int16),
        pack_step=np.array(step[:-1], dtype=np.int32),
        pack_micro_step=np.zeros(len(packs), dtype=np.int16),
        pack_first_rank=np.array(first_rank[:-1], dtype=np.int32),
        dropped=np.empty(0, dtype=np.int32),
        truncated=np.empty(0, dtype=np.int32),
    )


# As many tokens as the other, half of them in the long group.
MIXED = planned(*[(0, [4000])] * 8, (1, [32000]))
NAIVE = planned((0, [32000]), (0, [4000] * 8), groups=(LONG,))


def sentence(plan: EpochPlan = MIXED, naive: EpochPlan = NAIVE, *, epoch_s: float, **ours_and_theirs: tuple[float, float]) -> str:
    """Give the headline for metrics of which only these differ; ``epoch_s`` is the other plan's, ours takes 100 s."""
    ours = replace(METRICS, **{name: values[0] for name, values in ours_and_theirs.items()})
    theirs = replace(METRICS, epoch_s=epoch_s, **{name: values[1] for name, values in ours_and_theirs.items()})
    text = headline(plan, naive, metrics=ours, naive_metrics=theirs, cost=COST)
    assert text.endswith(".")
    assert "\n" not in text
    return text


def test_what_one_length_packing_would_waste() -> None:
    same = replace(LONG, ac_layers=0)
    less = planned(*[(0, [4000])] * 8, (1, [32000]), groups=(SHORT, same))
    assert sentence(less, planned((0, [32000]), (0, [4000] * 8), groups=(same,)), epoch_s=160, idle=(0.02, 0.34)) == (
        "One-length packing would idle 34%, this plan 2%: HBP is modelled 1.60x as fast."
    )
    # Half of the layers recompute for all tokens, or for half of them.
    assert sentence(epoch_s=140, cr=(0.5, 1.0), idle=(0.0012, 0.335)) == (
        "One-length packing would idle 33.5% (this plan 0.12%), split 100% of the tokens over ranks (this plan 50%) and "
        "recompute 50% of the layers (this plan 25%): HBP is modelled 1.40x as fast."
    )
    assert sentence(NAIVE, NAIVE, epoch_s=105) == "HBP is modelled 1.05x as fast as one-length packing."


def test_short_data_need_no_hbp() -> None:
    plan = planned(*[(0, [500, 400])] * 8)
    assert sentence(plan, plan, epoch_s=101) == (
        "HBP will not help with these data and groups (modelled 1.01x): all samples fit the shortest group (the longest has "
        "500 of 4,096 tokens), and attention is only 2% of their cost."
    )
    plan = planned(*[(0, [4000])] * 8)
    assert sentence(plan, plan, epoch_s=101.9, idle=(0.0, 0.01)).endswith(
        "(the longest has 4,000 of 4,096 tokens), and one-length packing idles 1%, this plan 0%."
    )


def test_other_reasons_why_it_does_not_help() -> None:
    few = planned((0, [4000]), (0, []), (0, []), (0, []))
    assert sentence(few, few, epoch_s=100).endswith("(modelled 1.00x): 1 sample fills 1 of 4 replicas.")
    assert sentence(epoch_s=100, cr=(0.8, 0.9), idle=(0.0, 0.01)).endswith(
        "80% of the tokens are split over ranks in any case, and one-length packing idles 1%, this plan 0%."
    )
    assert sentence(epoch_s=100, cr=(0.1, 0.1), idle=(0.0, 0.01)).endswith(
        "(modelled 1.00x): one-length packing idles 1%, this plan 0%."
    )


def test_a_plan_that_is_slower_says_so() -> None:
    assert sentence(epoch_s=90, idle=(0.3, 0.1), cr=(0.5, 0.5)).startswith(
        "HBP would cost time with these data and groups (modelled 0.90x): "
    )


def test_groups_without_use_are_named() -> None:
    assert plan_warnings(planned((0, [4000]), (0, [9]), (0, [9]), (0, [9]), (1, [30000]))) == []
    assert plan_warnings(planned(*[(0, [4000])] * 4)) == [
        "group 'long' stays empty: no sample has more than 4,096 and at most 32,768 tokens; remove it"
    ]
    assert plan_warnings(planned((1, [30000])))[0] == ("group 'short' stays empty: no sample has at most 4,096 tokens; remove it")


def test_fewer_packs_than_replicas() -> None:
    plan = planned((0, [4000, 90]), (0, [4000]), (0, []), (0, []), (1, [30000]))
    assert plan_warnings(plan) == [
        "group 'short' fills 2 packs for 4 replicas, the others idle meanwhile: its 3 samples are too few; add some, raise its "
        "cp_degree, or train on fewer ranks"
    ]


def test_a_split_that_no_sample_needs() -> None:
    short = [(0, [4000])] * 4
    assert plan_warnings(planned(*short, (1, [8192, 8000, 200]))) == [
        "group 'long': no sample needs cp_degree=4, the longest has 8,192 tokens; pack_len=8192, cp_degree=1 holds it with as "
        "many tokens a rank and less exchange"
    ]
    (line,) = plan_warnings(planned(*short, (1, [8193])))
    assert "pack_len=16384, cp_degree=2 holds it" in line
    assert plan_warnings(planned(*short, (1, [16385]))) == []
    # What cost mode may send there: heavy samples of the shorter group.
    assert plan_warnings(planned(*short, (1, [4000] * 8))) == [
        "group 'long': no sample needs cp_degree=4, the longest has 4,000 tokens and fits group 'short'; try without the group"
    ]


def test_the_proposed_group_is_valid_and_holds_the_sample() -> None:
    for cp_degree in (2, 3, 6, 8):
        group = PackingGroup(name="long", pack_len=1200 * cp_degree, cp_degree=cp_degree)
        for longest in range(400, group.pack_len + 1, 400):
            lines = plan_warnings(planned((0, [longest]), groups=(group,), world_size=cp_degree))
            for line in lines:
                values = dict(part.split("=") for part in line.split("; ")[1].split(" holds")[0].split(", "))
                proposed = PackingGroup(name="new", **{key: int(value) for key, value in values.items()})
                assert proposed.pack_len >= longest
                assert proposed.pack_len // proposed.cp_degree == 1200
                assert proposed.cp_degree < cp_degree


def test_time_and_gpu_hours_of_epoch_and_run() -> None:
    epoch_s = measure(MIXED, COST).epoch_s
    many = [MIXED] * 3000
    assert MIXED.num_steps == 3
    assert expected_time([MIXED], COST) == (
        f"Modelled for 4 H100s: {1000 * epoch_s:.1f} milliseconds an epoch of 3 steps, {1000 * epoch_s:.1f} milliseconds or "
        f"{4 * epoch_s / 3600:.1f} GPU hours the run of 3 steps. Of all ranks' time: {shares(MIXED)}."
    )
    assert f", {50 * epoch_s:.1f} minutes or {4 * 3000 * epoch_s / 3600:.1f} GPU hours the run of 9,000 steps." in expected_time(
        many, COST
    )
    short_s = measure(planned(*[(0, [4000])] * 4), COST).epoch_s
    assert f"3 steps, {1000 * (epoch_s + short_s):.1f} milliseconds or" in expected_time(many[:2], COST, max_steps=4)
    assert " the run of 1 steps. Of all" in expected_time(many[:1], COST, max_steps=1)


def shares(plan: EpochPlan) -> str:
    spent = simulate(PackWork.of_plan(plan), COST).shares
    return ", ".join(f"{write_share(share)} {name}" for name, share in spent.items() if share >= 0.005)
