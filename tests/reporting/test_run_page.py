import os
from pathlib import Path

import numpy as np
import pytest

from hbp_tune.cli.__main__ import main
from hbp_tune.errors import ConfigError
from hbp_tune.reporting.files.run_log import read_run_log
from hbp_tune.reporting.pages.run_page import render_run_page
from tests.reporting.test_page import Structure


def line(step: int, pack_len: int, cp_degree: int, loss: float, **more: float) -> str:
    figures = {"loss": loss, "pack_len": pack_len, "cp_degree": cp_degree, "step_s": 2.0 * cp_degree, "num_tokens": 1000}
    figures |= {"tokens_per_second_per_gpu": 250 / cp_degree, "idle_ratio": 0.25, "data_wait_ratio": 0.5, "abr": 0.125}
    return f"Step {step} | {' '.join(f'{key}:{value}' for key, value in (figures | more).items())} \n"


def write_log(folder: Path, name: str, text: str, seconds: int) -> None:
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "logs" / name).write_text(text)
    os.utime(folder / "logs" / name, (seconds, seconds))


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    short = "".join(line(step, 1024, 1, 8.0 - step / 10) for step in range(1, 11))
    write_log(tmp_path, "log_1.txt", short + line(11, 8192, 2, 5.0), 100)
    # The run was killed after step 11, and went on after step 9.
    again = line(10, 1024, 1, 6.5) + line(11, 8192, 2, 4.5, peak_memory_gib_long=12.5, skipped_steps=1)
    write_log(tmp_path, "log_2.txt", again + "Step 11 | val_loss:4.25 val_loss_len_1024:4.0 \nnot a step\n", 200)
    return tmp_path


def test_later_files_replace_steps_from_where_they_begin(output_dir: Path) -> None:
    log = read_run_log(output_dir)
    assert log.steps == tuple(range(1, 12))
    assert log.column("loss")[-3:].tolist() == [7.1, 6.5, 4.5]
    assert np.isnan(log.column("val_loss")[:-1]).all()
    assert log.figures[11]["val_loss"] == 4.25, "two lines of one step"
    assert log.keys("val_loss") == ["val_loss", "val_loss_len_1024"]
    assert read_run_log(output_dir / "logs").steps == log.steps


def test_a_shorter_second_run_leaves_nothing_of_the_first_behind(output_dir: Path) -> None:
    write_log(output_dir, "log_3.txt", line(1, 1024, 1, 9.0), 300)
    assert read_run_log(output_dir).steps == (1,)


def test_the_page_says_what_was_logged(output_dir: Path) -> None:
    page = render_run_page(read_run_log(output_dir), "hbp_runs/<demo>")
    seen = Structure(page)
    assert "hbp_runs/<demo>" in seen.text
    assert "11 steps: loss from 7.850 to 5.500" in seen.text, "means of the first two, and of the last two"
    assert "1 step skipped" in seen.text
    assert seen.titles == [
        "By packing group",
        "Loss falls to 5.500",
        "Lowest held-out loss: 4.250, after step 11",
        "229 tokens/s on each GPU",
        "Ranks wait 25% of the busy time",
        "Half of the steps took less than 2.00 s",
    ]
    for text in ("1K, CP 1", "8K, CP 2", "12.5 GiB", "90.9%", "50%", "to 1024"):
        assert text in seen.text
    assert seen.counts["svg"] == 5
    assert not [value for _, name, value in seen.attributes if name in ("src", "href")], "needs no other file"


def test_a_log_of_other_figures_is_drawn_too(tmp_path: Path) -> None:
    write_log(tmp_path, "log_1.txt", "Step 1 | loss:2.0 step_s:1.0 num_tokens:10 tokens_per_second_per_gpu:10 \n", 1)
    seen = Structure(render_run_page(read_run_log(tmp_path), "run"))
    assert "1 step: loss from 2.000 to 2.000" in seen.text
    assert "nan" not in seen.text


def test_nothing_logged_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no log_\*.txt; a report needs what metric_logger .*DiskLogger writes"):
        read_run_log(tmp_path)
    write_log(tmp_path, "log_1.txt", "", 1)
    with pytest.raises(ConfigError, match="holds no logged step yet"):
        read_run_log(tmp_path)


def test_the_command_writes_the_page(output_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(output_dir)]) == 0
    assert capsys.readouterr().out == f"11 steps, to step 11\nWritten: {output_dir}/run.html\n"
    assert (output_dir / "run.html").read_text().startswith("<!DOCTYPE html>")
    assert main(["report", str(output_dir / "nothing")]) == 2
    assert "has no log_*.txt" in capsys.readouterr().err
