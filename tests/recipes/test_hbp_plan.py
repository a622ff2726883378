"""What `hbp_plan` answers, writes and refuses, in one process; and that training trains by its plan."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import DictConfig, OmegaConf

from hbp_tune.config.packaged import packaged_configs
from hbp_tune.errors import ConfigError, DataError, HbpError, PackingError
from hbp_tune.recipes import hbp_plan
from hbp_tune.recipes.hbp_full_finetune_distributed import HBPFullFinetuneRecipeDistributed
from hbp_tune.recipes.hbp_plan import HBPPlanRecipe
from hbp_tune.reporting.files.plan_files import read_plan
from hbp_tune.reporting.report import PlanReport
from tests.helpers import mixed_lengths, recipe_config
from tests.ranks import RankError, RankPool

SHORT, LONG = {"name": "short", "pack_len": 128}, {"name": "long", "pack_len": 512, "cp_degree": 2, "ac_layers": 1}
LENGTHS = mixed_lengths(140, 512, seed=7)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def plan(cfg: DictConfig) -> PlanReport:
    recipe = HBPPlanRecipe(cfg)
    recipe.setup(cfg)
    report = recipe.plan()
    recipe.report(report)
    return report


def config(tmp_path: Path, **changes: Any) -> DictConfig:
    cfg = recipe_config(tmp_path, LENGTHS, changes.pop("groups", [SHORT, LONG]))
    for key, value in changes.items():
        cfg[key] = value
    return cfg


def with_lengths(tmp_path: Path, lengths: list[int], **changes: Any) -> DictConfig:
    """Make a configuration with a file of lengths, in which nothing of the run itself exists."""
    np.save(tmp_path / "lengths.npy", np.array(lengths))
    cfg = config(tmp_path, lengths=str(tmp_path / "lengths.npy"), **changes)
    for key in ("dataset", "tokenizer", "checkpointer", "optimizer", "metric_logger", "device", "dtype"):
        del cfg[key]
    return cfg


def test_the_answer_comes_first_and_everything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = plan(config(tmp_path, world_size=4, baselines=["next_fit", "longalign_sorted"]))
    output = capsys.readouterr().out
    assert output.strip().splitlines()[0] == report.headline
    for text in ("Lengths: the data set's tokens.", "Data: ", "on 4 ranks", "CBR", "next_fit", "longalign_sorted", "GPU hours"):
        assert text in output
    assert output.count("isf") == 2
    for name in ("plan.parquet", "plan.json", "plan.html"):
        assert str(tmp_path / "out" / name) in output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["plan.html", "plan.json", "plan.parquet"]
    assert [written.hash for written in read_plan(tmp_path / "out/plan.parquet")] == [report.plan.hash]
    summary = json.loads((tmp_path / "out/plan.json").read_text())
    assert (summary["headline"], summary["world_size"]) == (report.headline, 4)
    assert list(summary["baselines"]) == ["isf", "next_fit", "longalign_sorted"]
    assert summary["seconds"].keys() == {"read", "plan", "measure", "baselines", "write"}
    assert report.headline in (tmp_path / "out/plan.html").read_text()


def test_a_trace_of_the_first_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan(config(tmp_path, world_size=4, trace=2))
    assert str(tmp_path / "out/trace.json") in capsys.readouterr().out
    events = json.loads((tmp_path / "out/trace.json").read_text())["traceEvents"]
    assert {event["args"].get("step") for event in events if event["ph"] == "X"} == {0, 1}
    with pytest.raises(ConfigError, match=r"trace='all' must be a whole number of optimizer steps, or be left out"):
        plan(config(tmp_path, trace="all"))


def plan_hashes_job(cfg: DictConfig) -> list[str]:
    recipe = HBPFullFinetuneRecipeDistributed(cfg)
    recipe.setup(cfg)
    return recipe._plan_hashes


def test_training_finds_the_store_and_trains_by_the_plan(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    curriculum = {"_component_": "hbp_tune.components.ShortFirst", "steps": 0.1}
    cfg = config(tmp_path, world_size=2, epochs=5, max_steps=30, curriculum=curriculum)
    report = plan(cfg)
    stores = {path: path.stat().st_mtime_ns for path in (tmp_path / "stores").iterdir()}
    assert len(stores) == 1
    hashes = ranks(2).run(plan_hashes_job, cfg)[0]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "stores").iterdir()} == stores
    assert [each.hash for each in report.plans] == hashes
    assert len(hashes) > 1


def test_epochs_and_max_steps_as_in_training(tmp_path: Path) -> None:
    num_steps = plan(config(tmp_path)).plan.num_steps
    assert len(plan(config(tmp_path, epochs=3)).plans) == 3
    assert len(plan(config(tmp_path, epochs=3, max_steps=num_steps)).plans) == 1
    assert len(plan(config(tmp_path, epochs=3, max_steps=num_steps + 1)).plans) == 2


@pytest.mark.parametrize(
    ("cp_degrees", "world_size"), [((1, 1), 8), ((1, 2), 8), ((1, 3), 9), ((2, 3), 12), ((1, 16), 16), ((4, 6), 12)]
)
def test_ranks_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str], cp_degrees: Any, world_size: int) -> None:
    groups = [
        {"name": "short", "pack_len": 192, "cp_degree": cp_degrees[0]},
        {"name": "long", "pack_len": 1536, "cp_degree": cp_degrees[1]},
    ]
    cfg = with_lengths(tmp_path, LENGTHS, groups=groups)
    cfg.model |= {"num_heads": 48, "num_kv_heads": 48, "embed_dim": 96}
    assert plan(cfg).plan.world_size == world_size
    assert f"Planned for {world_size} ranks; set world_size=N for others." in capsys.readouterr().out


def test_lengths_need_neither_data_nor_tokenizer_nor_weights(tmp_path: Path) -> None:
    cfg = with_lengths(tmp_path, LENGTHS)
    report = plan(cfg)
    assert report.lengths.tolist() == LENGTHS
    assert report.lengths_from == cfg.lengths
    assert not (tmp_path / "stores").exists()
    absent = {"_component_": "no.such.component", "path": "nowhere", "data_files": "nowhere.jsonl", "source": "json"}
    again = plan(config(tmp_path, lengths=cfg.lengths, dataset=absent, tokenizer=absent, checkpointer=absent, optimizer=absent))
    assert again.plan.hash == report.plan.hash


def test_classes_of_a_table_count_for_diversity(tmp_path: Path) -> None:
    rows = [f"{i % 7 == 0},{length}" for i, length in enumerate(LENGTHS)]
    (tmp_path / "lengths.csv").write_text("\n".join(["source,count", *rows]))
    cfg = with_lengths(tmp_path, LENGTHS)
    plain = plan(cfg)
    with_classes = plan(OmegaConf.merge(cfg, {"lengths": str(tmp_path / "lengths.csv"), "lengths_column": "count"}))
    assert with_classes.plan.hash == plain.plan.hash
    assert with_classes.metrics.diversity != plain.metrics.diversity
    assert with_classes.metrics.epoch_s == plain.metrics.epoch_s


def test_synthetic_lengths(tmp_path: Path) -> None:
    groups = [{"name": "16K", "pack_len": 16384}, {"name": "128K", "pack_len": 131072, "cp_degree": 4}]
    cfg = with_lengths(tmp_path, LENGTHS, groups=groups, num_samples=3000, planner=None)
    cfg.lengths = "tulu3_longcite"
    cfg.model.max_seq_len = 131072
    report = plan(cfg)
    assert len(report.lengths) == 3000
    assert report.lengths_from == "synthetic lengths, tulu3_longcite"


def test_without_the_tokenizer_s_file_lengths_are_estimated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "chat.jsonl").write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": "Go on. " * i}, {"role": "assistant", "content": "Yes. " * i}]})
            + "\n"
            for i in range(1, 60)
        )
    )
    dataset = {
        "_component_": "torchtune.datasets.chat_dataset",
        "source": "json",
        "data_files": str(tmp_path / "chat.jsonl"),
        "conversation_column": "messages",
        "conversation_style": "openai",
        "split": "train",
        "cache_dir": str(tmp_path / "cache"),
    }
    tokenizer = {"_component_": "torchtune.models.llama3.llama3_tokenizer", "path": "no/tokenizer.model", "max_seq_len": 100}
    report = plan(config(tmp_path, dataset=dataset, tokenizer=tokenizer, bad_rows="drop"))
    assert (
        "Lengths: estimated from the text's bytes, as the tokenizer's no/tokenizer.model does not exist."
        in capsys.readouterr().out
    )
    assert report.lengths[0] == 2 + 2 * 5 + 1 + 1
    assert report.lengths.max() == 100
    assert not (tmp_path / "stores").exists(), "training must not find them"
    # From the 55th on, the question alone has 100 tokens: the answer is cut off.
    assert [line.split(",")[1:4] for line in (tmp_path / "out/bad_rows.csv").read_text().splitlines()[1:]] == [
        [str(tmp_path / "chat.jsonl"), str(row), str(row + 1)] for row in range(54, 59)
    ]
    assert any("5 of 59 rows are not training samples" in warning for warning in report.warnings)


def test_what_planning_warns_of_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curriculum = {"_component_": "hbp_tune.components.Staged", "stages": [{"steps": 500, "max_pack_len": 128}]}
    cfg = with_lengths(tmp_path, [*LENGTHS, 2000], epochs=2, curriculum=curriculum)
    cfg.planner |= {"overlong": "drop"}
    report = plan(cfg)
    output = capsys.readouterr().out
    told = sum("curriculum.stages[0].steps=500" in line for line in report.warnings)
    assert told == 2, "each epoch has its own number of steps"
    assert len(set(report.warnings)) == len(report.warnings)
    assert report.warnings[0].startswith("1 of 159 samples are longer than pack_len=512 of the longest group 'long'")
    for line in report.warnings:
        assert f"warning: {line}" in output
    assert (tmp_path / "out/overlong.csv").read_text().split()[1:] == [f"158,{cfg.lengths},,158,,2000,dropped"]


def test_baselines_pack_what_the_plan_packs(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    cfg.dataset.lengths = [*LENGTHS, 600, 2000]
    cfg.planner.overlong = "truncate_end"
    report = plan(cfg)
    # A third of each sample is masked: 512 tokens of the last hold no target.
    assert (report.plan.truncated.tolist(), report.plan.dropped.tolist()) == ([len(LENGTHS)], [len(LENGTHS) + 1])
    assert sorted(report.naive.sample_ids.tolist()) == sorted(report.plan.sample_ids.tolist())
    said = f"; 1 cut by truncate_end, 1 dropped, as no target of theirs would be left, all listed in {tmp_path}"
    assert any(said in line for line in report.warnings)


def test_a_plan_by_chance_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan(with_lengths(tmp_path, LENGTHS, seed=None))
    assert "No seed is set: this is the plan of seed=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lengths", "warning"),
    [
        ([5], "group 'short' fills 1 packs for 8 replicas"),
        ([100] * 500, None),
        ([512] * 3, "group 'long' fills 3 packs for 4 replicas"),
    ],
)
def test_one_sample_equal_samples_and_few_samples(tmp_path: Path, lengths: list[int], warning: str | None) -> None:
    report = plan(with_lengths(tmp_path, lengths))
    assert len(report.plan.sample_ids) == len(lengths)
    assert report.headline.startswith("HBP will not help") or len(lengths) == 500
    assert any(line.startswith(warning) for line in report.warnings) if warning else True


def test_short_data_are_compared_with_packs_of_the_shortest_group(tmp_path: Path) -> None:
    assert plan(with_lengths(tmp_path, [100, 20] * 50)).naive.groups[0].pack_len == 128
    report = plan(with_lengths(tmp_path, [100, 129] * 50))
    assert [group.pack_len for group in report.naive.groups] == [512]


ERRORS: list[tuple[str, dict[str, Any], type[HbpError], str]] = [
    ("world size", {"world_size": 3}, ConfigError, r"world size 3 is not a multiple of cp_degree=2 of group 'long'"),
    ("no number", {"world_size": "many"}, ConfigError, r"world_size=many must be a whole number of at least 1"),
    ("misspelt", {"world_sizes": 8}, ConfigError, r"unknown key 'world_sizes': did you mean 'world_size'"),
    ("baseline", {"baselines": ["best"]}, ConfigError, r"'best'.*isf"),
    ("no name", {"lengths": "tulu4"}, ConfigError, r"lengths=tulu4 is not a file \(.csv, .*\), and .*'tulu4'.*tulu3_longcite"),
    ("no file", {"lengths": "no/lengths.csv"}, DataError, r"lengths file no/lengths.csv does not exist"),
    ("num_samples of a file", {"num_samples": 5}, ConfigError, r"num_samples=5 is for synthetic lengths; .*, remove it"),
    ("num_samples of data", {"num_samples": 5, "lengths": None}, ConfigError, r"num_samples=5 needs lengths=NAME"),
    ("order", {"groups": [LONG, SHORT]}, ConfigError, r"group 'short' has pack_len=128, not more than 512 .* from short to long"),
    ("equal", {"groups": [SHORT, {**SHORT, "name": "b"}]}, ConfigError, r"group 'b' has pack_len=128, not more than 128"),
    ("ac_layers", {"groups": [{**SHORT, "ac_layers": 4}]}, ConfigError, r"ac_layers=4 is more than the model's 3 layers"),
    (
        "scheme",
        {"context_parallel": "ring"},
        ConfigError,
        r"context_parallel='ring' is not a scheme; choose one of auto, ulysses",
    ),
    ("overlong", {"groups": [SHORT]}, PackingError, r"group 'short' holds 128.*planner.overlong=drop"),
    ("positions", {"model.max_seq_len": 500}, ConfigError, r"has 512 tokens, the model encodes 500 positions"),
    ("stock key", {"batch_size": 2}, ConfigError, r"batch_size=2 .* is not supported here"),
]


@pytest.mark.parametrize(("change", "kind", "message"), [error[1:] for error in ERRORS], ids=[error[0] for error in ERRORS])
def test_what_is_wrong_is_said(tmp_path: Path, change: dict[str, Any], kind: type[HbpError], message: str) -> None:
    np.save(tmp_path / "lengths.npy", np.array(LENGTHS))
    cfg = config(tmp_path, lengths=str(tmp_path / "lengths.npy"), groups=change.get("groups", [SHORT, LONG]))
    for key, value in change.items():
        if key != "groups":
            OmegaConf.update(cfg, key, value)
    with pytest.raises(kind, match=message):
        plan(cfg)
    assert not (tmp_path / "out/plan.json").exists()


def test_under_torchrun_it_explains_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(ConfigError, match=r"hbp_plan is one process; start it by `tune run hbp_plan` and set world_size=N"):
        HBPPlanRecipe(config(tmp_path))


def test_files_are_whole_and_of_one_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan(with_lengths(tmp_path, LENGTHS))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full_disk(report: PlanReport) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hbp_tune.reporting.render_page", full_disk)
    with pytest.raises(ConfigError, match=r"output_dir=\S+out cannot be written: No space left on device"):
        plan(with_lengths(tmp_path, LENGTHS[:-1]))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_one_json_document(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hbp_tune.cli", "plan", "--json", "--config", "demo/tiny_llama_cpu"]
    command += ["lengths=tulu3_longcite", "num_samples=500", "groups=auto", f"output_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == json.loads((tmp_path / "plan.json").read_text())
    assert "Packing groups for 8 H100s" in done.stderr


def test_an_output_directory_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output_dir=\S+ cannot be written: File exists"):
        plan(with_lengths(tmp_path, LENGTHS, output_dir=str(tmp_path / "file")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_tokens\n5\n-1\n", "column 'n_tokens': row 1 is -1, a sample has at least 1 token"),
        ("n_tokens\n5\nNaN\n", "row 1 is blank or NaN"),
        ("a,b\n1,2\n", "it has a, b. Name one by lengths_column"),
    ],
)
def test_a_mistake_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    Path("lengths.csv").write_text(text)
    monkeypatch.setattr(sys, "argv", ["hbp_plan", "--config", "demo/tiny_llama_cpu", "lengths=lengths.csv"])
    with pytest.raises(SystemExit) as caught:
        hbp_plan.main()
    assert caught.value.code == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lengths.csv"]


@pytest.mark.parametrize("name", packaged_configs())
def test_every_packaged_configuration_serves(name: str, tmp_path: Path) -> None:
    cfg = OmegaConf.load(packaged_configs()[name])
    np.save(tmp_path / "lengths.npy", np.tile([500, 30, 7000, 100], 300))
    report = plan(OmegaConf.merge(cfg, {"output_dir": str(tmp_path / "out"), "lengths": str(tmp_path / "lengths.npy")}))
    assert report.plan.world_size == 8


def tune(cwd: Path, *arguments: str) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["tune", "run", "hbp_plan", *arguments],
        check=False,
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_tune_run_from_any_directory(tmp_path: Path) -> None:
    synthetic = ["lengths=tulu3_longcite", "num_samples=20000", "world_size=8"]
    output = tune(tmp_path, "--config", "demo/tiny_llama_cpu", "planner.overlong=drop", *synthetic)
    assert "one-length packing" in output.strip().splitlines()[0].lower()
    (epoch,) = read_plan(tmp_path / "hbp_runs/demo/plan.parquet")
    assert len(epoch.sample_ids) + len(epoch.dropped) == 20000


@pytest.mark.slow
def test_ten_million_samples(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).lognormal(6.0, 1.2, 10**7)
    np.save(tmp_path / "lengths.npy", np.clip(lengths, 1, 131072).astype(np.int32))
    start = time.perf_counter()
    tune(tmp_path, "--config", "llama3_1/8B_hbp_full", "lengths=lengths.npy", "world_size=32", "output_dir=out")
    assert time.perf_counter() - start < 200


def train_job(cfg: DictConfig) -> tuple[list[str], list[dict[str, Any]]]:
    recipe = HBPFullFinetuneRecipeDistributed(cfg)
    recipe.setup(cfg)
    recipe.train()
    return recipe._plan_hashes, recipe._metric_logger.steps if recipe.rank == 0 else []


def test_training_takes_a_saved_plan(tmp_path: Path, ranks: Callable[[int], RankPool]) -> None:
    cfg = config(tmp_path, world_size=2, epochs=2, max_steps=3)
    report = plan(cfg)
    by_itself = ranks(2).run(train_job, cfg)
    # Settings that would plan otherwise no longer count.
    cfg.plan_file = str(tmp_path / "out/plan.parquet")
    cfg.planner.tokens_per_step = 512
    from_file = ranks(2).run(train_job, cfg)
    assert [hashes for hashes, _ in from_file] == [hashes for hashes, _ in by_itself] == [[report.plan.hash]] * 2
    for got, want in zip(from_file[0][1], by_itself[0][1], strict=True):
        names = ("step", "loss", "grad_norm", "lr", "num_tokens", "pack_len", "cp_degree", "abr", "dbr", "pr", "cr")
        assert [got[name] for name in names] == [want[name] for name in names]


def test_a_saved_plan_says_how_samples_are_cut(tmp_path: Path, ranks: Callable[[int], RankPool]) -> None:
    cfg = config(tmp_path, world_size=2, max_steps=3)
    cfg.dataset.lengths = [*LENGTHS[:10], 600, 700]
    cfg.planner.overlong = "truncate_end"
    report = plan(cfg)
    assert len(report.plan.truncated) == 2
    by_itself = ranks(2).run(train_job, cfg)
    cfg.plan_file = str(tmp_path / "out/plan.parquet")
    cfg.planner.overlong = "error"
    from_file = ranks(2).run(train_job, cfg)
    # Weights that count targets of another cut would change losses and gradients.
    for got, want in zip(from_file[0][1], by_itself[0][1], strict=True):
        assert [got[name] for name in ("loss", "grad_norm")] == [want[name] for name in ("loss", "grad_norm")]


def test_a_saved_plan_of_another_run_is_refused_before_training(tmp_path: Path, ranks: Callable[[int], RankPool]) -> None:
    cfg = config(tmp_path, world_size=4)
    plan(cfg)
    cfg.plan_file = str(tmp_path / "out/plan.parquet")
    with pytest.raises(RankError, match=r"rank 1: ConfigError: the saved plan is for 4 ranks, the run has 2; plan again"):
        ranks(2).run(train_job, cfg)
    cfg.plan_file = str(tmp_path / "no/plan.parquet")
    with pytest.raises(RankError, match=r"rank 0: DataError: there is no plan at .*no/plan.parquet; check the path"):
        ranks(2).run(train_job, cfg)


def test_groups_are_chosen_for_data_and_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = mixed_lengths(2000, 60_000, seed=1)
    cfg = with_lengths(tmp_path, lengths, world_size=8, gpu="A100")
    cfg.groups = "auto"
    # The tiny model of the tests fits anywhere: a real one, on the meta device, does not.
    cfg.model = {"_component_": "torchtune.models.llama3_2.llama3_2_3b"}
    report = plan(cfg)
    printed = capsys.readouterr().out
    assert "Packing groups for 8 A100s, 72 GiB of each" in printed
    assert "(chosen)" in printed
    assert "(the paper's rule)" in printed
    assert "Modelled for 8 A100s" in printed
    chosen = report.plan.groups
    assert chosen[-1].pack_len >= 60_000 > chosen[0].pack_len
    # The file trains and plans as the choice did.
    cfg.groups_file = str(tmp_path / "out" / "groups.yaml")
    assert plan(cfg).plan.hash == report.plan.hash
    cfg.pop("groups")
    assert plan(cfg).plan.hash == report.plan.hash


def test_longer_samples_than_fit_may_be_left_out(tmp_path: Path) -> None:
    lengths = mixed_lengths(300, 60_000, seed=1)
    cfg = with_lengths(tmp_path, lengths, world_size=1, memory_gib=20)
    cfg.groups = "auto"
    cfg.model = {"_component_": "torchtune.models.llama3_2.llama3_2_1b"}
    message = (
        r"the longest sample has 60000 tokens, the longest packing group that fits into memory holds \d+, .* set planner.overlong"
    )
    with pytest.raises(ConfigError, match=message):
        plan(cfg)
    cfg.planner.overlong = "drop"
    assert len(plan(cfg).plan.dropped) > 0
    cfg.memory_gib = 8
    with pytest.raises(ConfigError, match=r"no packing group fits into memory \(2K over 1 ranks needs \d+\.\d of 8 GiB\); start"):
        plan(cfg)


def test_a_gpu_that_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gpu='H1000' is not known; choose from H100 PCIe, "):
        HBPPlanRecipe(with_lengths(tmp_path, [10], gpu="H1000"))
