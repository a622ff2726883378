"""The benchmarks run from end to end on a CPU, and their arithmetic is right."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_all
from benchmarks.measuring import attention_flops, mixed_doc_lens, step_flops
from hbp_tune.planning import CostModel
from hbp_tune.planning.costs.memory import LLAMA3_1_8B_DECODER

ROOT = Path(__file__).parents[1]


def run(*command: str) -> str:
    on_cpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # small and quick, also where there is a GPU
    result = subprocess.run([sys.executable, *command], cwd=ROOT, env=on_cpu, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def json_lines(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def test_flops_by_hand() -> None:
    assert attention_flops([4, 2], heads=3, head_dim=5) == 4 * 3 * 5 * (16 + 4) / 2
    lengths = [16384, 100]
    shape = CostModel().shape
    want = shape.token_flops * sum(lengths) + shape.square_flops * sum(n * n for n in lengths)
    assert step_flops(LLAMA3_1_8B_DECODER, lengths) == want
    # A step's attention is three times its forward: twice for the backward, nothing for what is run again.
    attention = 3 * 32 * attention_flops(lengths, heads=32, head_dim=128)
    assert shape.square_flops * sum(n * n for n in lengths) == attention


def test_mixed_lengths_fill_a_pack(tmp_path: Path) -> None:
    assert sum(mixed_doc_lens(16384)) == 16384
    (tmp_path / "lengths.csv").write_text("num_tokens\n300\n900\n500\n400\n")
    assert mixed_doc_lens(800, tmp_path / "lengths.csv") == [300, 500]
    assert mixed_doc_lens(1000, tmp_path / "lengths.csv") == [300, 700]
    with pytest.raises(SystemExit, match="up to 3000 tokens add up to 2100"):
        mixed_doc_lens(3000, tmp_path / "lengths.csv")


@pytest.mark.slow
def test_the_kept_table_of_memory_is_the_models() -> None:
    kept = (ROOT / "benchmarks/results/memory_model_202611.md").read_text()
    assert run("benchmarks/bench_memory.py").startswith(kept)


@pytest.mark.slow
def test_attention_of_every_pack() -> None:
    about, *lines = json_lines(run("benchmarks/bench_attention.py", "--pack-lens", "512", "--repeats", "1"))
    assert about["torch"] == torch.__version__
    assert {line["pack"] for line in lines} == {"one document", "mixed", "short"}
    assert all(line["forward_error"] < 1e-2 and line["backward_error"] < 2e-2 for line in lines if "failed" not in line)


@pytest.mark.slow
def test_steps_beside_torchtunes() -> None:
    arguments = ("--pack-len", "512", "--layers", "1", "--rounds", "1", "--steps", "1", "--no-compile")
    _, ours, stock, _ = json_lines(run("benchmarks/bench_step.py", *arguments))
    assert (ours["case"], stock["case"]) == ("hbp-tune", "torchtune")
    assert ours["tokens_per_s"] > 0
    assert stock["of_matmul"] > 0


@pytest.mark.slow
def test_several_ranks_give_one_row() -> None:
    output = run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "benchmarks/bench_multigpu.py")
    lines = json_lines(output)
    assert [line["scheme"] for line in lines if "scheme" in line] == ["ulysses", "all_gather", "auto"]
    assert [line["cp"] for line in lines if "step_s" in line] == [1, 2]
    row = output.splitlines()[-1]
    assert row.startswith("| 2 x ")
    assert row.count("|") == 5


@pytest.mark.slow
def test_data_at_a_small_scale(tmp_path: Path) -> None:
    lines = json_lines(run("benchmarks/bench_data.py", "--rows", "2000", "--dir", str(tmp_path)))
    assert [line["case"] for line in lines] == ["rows", "cold", "cold", "warm", "warm", "PackedDataset"]
    assert [line["rows"] for line in lines[1:5]] == [2000] * 4
    assert lines[3]["setup_data_s"] < lines[1]["setup_data_s"]
    assert all(0 < line["data_wait_ratio"] < 1 for line in lines[1:5])


@pytest.mark.slow
def test_one_page_of_benchmarks(tmp_path: Path) -> None:
    output = run("benchmarks/bench_all.py", "--dir", str(tmp_path), "--only", "attention,memory")
    assert "attention ... done" in output
    page = (tmp_path / "index.html").read_text()
    assert page.count("<table>") > 5
    assert "both_ms" in page
    assert "sdpa per document" in (tmp_path / "attention.txt").read_text()


def test_a_benchmark_that_fails_is_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = bench_all.Benchmark(title="Nothing", script="bench_planning.py --lengths missing.csv", bar="plan_s")
    monkeypatch.setitem(bench_all.BENCHMARKS, "broken", broken)
    monkeypatch.setattr(sys, "argv", ["bench_all.py", "--dir", str(tmp_path), "--only", "broken"])
    with pytest.raises(SystemExit, match="failed: broken"):
        bench_all.main()
    assert "It failed" in (tmp_path / "index.html").read_text()


def test_lines_with_the_same_figures_share_a_table() -> None:
    lines = [{"case": "a", "s": 0.12345}, {"case": "b", "s": 12345.6}, {"other": {"x": 1, "y": [2, 3]}}]
    first, second = bench_all.tables(lines)
    assert "0.1235" in first
    assert "12,346" in first
    assert "x 1; y 2, 3" in second
