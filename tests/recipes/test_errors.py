"""What a user can get wrong, and what the recipe says before any weight is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.helpers import recipe_config, run_recipe_job
from tests.ranks import RankError, RankPool

SHORT, LONG = {"name": "short", "pack_len": 128}, {"name": "long", "pack_len": 512, "cp_degree": 2}
ERRORS: list[tuple[str, dict[str, Any], str]] = [
    (
        "world size",
        {"groups": [SHORT, {**LONG, "pack_len": 504, "cp_degree": 3}]},
        r"world size 2 is not a multiple of cp_degree=3 of group 'long'; start a multiple of 3 ranks",
    ),
    (
        "pack_len",
        {"groups": [{**SHORT, "pack_len": 126, "cp_degree": 2}]},
        r"pack_len=126 must be a multiple of 2 \* cp_degree=4",
    ),
    (
        "unknown group key",
        {"groups": [{**SHORT, "ac_layer": 2}]},
        r"config key 'groups' .*unexpected keyword argument 'ac_layer'",
    ),
    ("ac_layers", {"groups": [{**SHORT, "pack_len": 512, "ac_layers": 4}]}, r"ac_layers=4 is more than the model's 3 layers"),
    (
        "overlong",
        {"dataset.lengths": [10, 600, 20]},
        r"sample 1 has 600 tokens, group 'long' holds 512.*planner.overlong=drop",
    ),
    (
        "positions",
        {"groups": [SHORT, {**LONG, "pack_len": 4096}], "dataset.lengths": [10, 3000], "planner.tokens_per_step": 8192},
        r"3000 tokens, the model encodes 2048",
    ),
    ("empty", {"dataset.lengths": []}, r"the data set is empty: it has no row"),
    (
        "no target",
        {"dataset.lengths": [1, 1]},
        r"row 0 of dataset is not a training sample: no target: .*, nor are the 1 rows after it",
    ),
    ("some without target", {"dataset.lengths": [1, 9]}, r"1 of 2 rows are not training samples \(1 no target: .*bad_rows=drop"),
    ("accumulation", {"gradient_accumulation_steps": 4}, r"gradient_accumulation_steps=4.*planner.tokens_per_step"),
    (
        "component",
        {"planner._component_": "hbp_tune.components.Planner"},
        r"config key 'planner' .*hbp_tune.components has no 'Planner'; did you mean",
    ),
    ("fp16", {"dtype": "fp16"}, r"must be bf16 or fp32"),
    ("cpu offload", {"fsdp_cpu_offload": True}, r"fsdp_cpu_offload=True needs device=cuda"),
    ("dropout", {"model.attn_dropout": 0.1}, r"model.attn_dropout=0.1 must be 0"),
    ("sharded layers", {"custom_sharded_layers": ["embeddings"]}, r"the model has no 'embeddings'; it has tok_embeddings"),
]


@pytest.mark.parametrize(("change", "message"), [error[1:] for error in ERRORS], ids=[error[0] for error in ERRORS])
def test_recipe_says_what_is_wrong(
    ranks: Callable[[int], RankPool], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    cfg = recipe_config(tmp_path, [10, 100, 500], change.get("groups", [SHORT, LONG]))
    for key, value in change.items():
        if key != "groups":
            OmegaConf.update(cfg, key, value)
    with pytest.raises(RankError, match=rf"rank 0: \w+Error: .*{message}"):
        ranks(2).run(run_recipe_job, cfg)


def test_a_scheme_that_cannot_serve_a_group(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    scheme = {"_component_": "hbp_tune.components.UlyssesAllGather", "ulysses_degree": 3}
    cfg = recipe_config(tmp_path, [10, 100], [{"name": "all", "pack_len": 512, "cp_degree": 4}], context_parallel=scheme)
    with pytest.raises(RankError, match=r"cp_degree=4 is not a multiple of ulysses_degree=3"):
        ranks(4).run(run_recipe_job, cfg)
    cfg.context_parallel = "ring"
    with pytest.raises(RankError, match=r"context_parallel='ring' is not a scheme; choose one of auto, ulysses, all_gather"):
        ranks(4).run(run_recipe_job, cfg)


def test_a_kernel_that_cannot_run_here(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    cfg = recipe_config(tmp_path, [10, 100], [SHORT, LONG], attention="varlen")
    with pytest.raises(RankError, match=r"attention='varlen' runs in bf16 on CUDA, not float32 on cpu"):
        ranks(2).run(run_recipe_job, cfg)


def test_dropped_and_truncated_samples_are_listed(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    for overlong in ("drop", "truncate"):
        cfg = recipe_config(tmp_path, [10, 600, 100, 700], [SHORT, LONG])
        cfg.planner.overlong = overlong
        steps = ranks(2).run(run_recipe_job, cfg)[0]
        assert sum(step["num_tokens"] for step in steps) == {"drop": 110, "truncate": 110 + 2 * 512}[overlong]
        rows = (tmp_path / "out/overlong.csv").read_text().split()
        what = {"drop": "dropped", "truncate": "truncate_middle"}[overlong]
        assert rows == [
            "sample_id,dataset,file,row,line,num_tokens,what",
            f"1,random_tokens,,1,,600,{what}",
            f"3,random_tokens,,3,,700,{what}",
        ]


def test_bad_rows_are_left_out_and_listed(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    cfg = recipe_config(tmp_path, [10, 1, 100, 1, 50], [SHORT, LONG])
    message = (
        rf"rank 1: DataError: 2 of 5 rows are not training samples .*, the first: row 1 of random_tokens, .*{tmp_path}.*=drop"
    )
    with pytest.raises(RankError, match=message):
        ranks(2).run(run_recipe_job, cfg)
    assert len((tmp_path / "out/bad_rows.csv").read_text().splitlines()) == 3
    cfg.bad_rows = "drop"
    steps = ranks(2).run(run_recipe_job, cfg)[0]
    assert sum(step["num_tokens"] for step in steps) == 160
    assert [line.split(",")[2] for line in (tmp_path / "out/bad_rows.csv").read_text().splitlines()[1:]] == ["1", "3"]


def test_a_policy_that_does_not_exist(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    cfg = recipe_config(tmp_path, [10, 100], [SHORT, LONG], bad_rows="skip")
    with pytest.raises(RankError, match=r"bad_rows=skip is not a policy; choose error or drop"):
        ranks(2).run(run_recipe_job, cfg)
