import errno
import os
from pathlib import Path

import pytest

from hbp_tune.config.folders import output_folder, writing_token_store
from hbp_tune.errors import ConfigError, DataError


def test_a_folder_of_results_is_made() -> None:
    assert output_folder(".") == Path()


def test_a_folder_that_cannot_be_made_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert output_folder(tmp_path / "a/b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=rf"^output_dir={tmp_path}/file cannot be written: it is a file; name another folder$"):
        output_folder(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"^output_dir=.*/file/out cannot be written: Not a directory"):
        output_folder(tmp_path / "file/out")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=r"^output_dir=.* cannot be written: no permission, or a read-only disk"):
        output_folder(tmp_path)


def test_only_what_is_written_is_the_token_stores(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=rf"^token store folder {tmp_path} cannot be written: No space left on device; set token_"),
        writing_token_store(tmp_path),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(PermissionError), writing_token_store(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied", "data.jsonl")
