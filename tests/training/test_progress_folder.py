from pathlib import Path

from hbp_tune.training.progress_folder import RECORD, ProgressFolder, set_aside


def save(folder: ProgressFolder, step: int) -> Path:
    folder.begin(step)
    (folder.aside(step) / RECORD).write_text("{}")
    return folder.publish(step)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_last_folders_are_kept_in_the_order_of_steps(tmp_path: Path) -> None:
    folder = ProgressFolder(tmp_path / "progress", keep=2)
    for step in (2, 9, 10, 100):
        assert save(folder, step) == tmp_path / f"progress/step_{step}"
    assert [path.name for path in folder.finished()] == ["step_10", "step_100"]
    assert names(tmp_path / "progress") == ["step_10", "step_100"]


def test_half_written_folders_never_count_and_go_with_the_next_save(tmp_path: Path) -> None:
    folder = ProgressFolder(tmp_path)
    save(folder, 1)
    folder.begin(2)
    (folder.aside(2) / RECORD).write_text("{}")
    (tmp_path / "step_3").mkdir()  # made by other hands: it has no record
    assert [path.name for path in folder.finished()] == ["step_1"]
    save(folder, 4)
    assert names(tmp_path) == ["step_3", "step_4"]


def test_a_step_saved_again_replaces_itself(tmp_path: Path) -> None:
    folder = ProgressFolder(tmp_path)
    (save(folder, 1) / "old").touch()
    assert names(save(folder, 1)) == [RECORD]


def test_older_progress_is_numbered_and_nothing_is_lost(tmp_path: Path) -> None:
    directory = tmp_path / "progress"
    assert set_aside(directory) is None
    for step, aside in ((100, "progress_1"), (2, "progress_2")):
        save(ProgressFolder(directory), step)
        assert set_aside(directory) == tmp_path / aside
        assert names(tmp_path / aside) == [f"step_{step}"]
    assert not directory.exists()


def test_progress_without_a_finished_folder_stays_where_it_is(tmp_path: Path) -> None:
    ProgressFolder(tmp_path / "progress").begin(1)
    assert set_aside(tmp_path / "progress") is None
