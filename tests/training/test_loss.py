import numpy as np

from hbp_tune.components import AveTokenLoss, BalancePlanner, PackingGroup

GROUPS = (PackingGroup(name="short", pack_len=64), PackingGroup(name="long", pack_len=256, cp_degree=2))


def test_every_target_of_a_step_weighs_the_same() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, 257, 100).astype(np.int32)
        num_targets = np.maximum(1, lengths // 2).astype(np.int32)
        plan = BalancePlanner(tokens_per_step=512).plan(lengths, num_targets, GROUPS, world_size=4, seed=seed)
        weights = AveTokenLoss().document_weights(plan, num_targets)
        step_of = plan.pack_step[plan.pack_of_sample]
        for step in range(plan.num_steps):
            mine = step_of == step
            targets = num_targets[plan.sample_ids[mine]]
            assert len(np.unique(weights[mine])) == 1
            np.testing.assert_allclose((weights[mine] * targets).sum(), 1.0)


def test_by_hand() -> None:
    lengths = np.array([60, 60, 200], dtype=np.int32)
    num_targets = np.array([10, 30, 50], dtype=np.int32)
    plan = BalancePlanner(mode="paper", fill=False).plan(lengths, num_targets, GROUPS, world_size=2, seed=0)
    weights = dict(zip(plan.sample_ids.tolist(), AveTokenLoss().document_weights(plan, num_targets), strict=True))
    assert weights == {0: 1 / 40, 1: 1 / 40, 2: 1 / 50}
