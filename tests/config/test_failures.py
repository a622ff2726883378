import json
import signal
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from hbp_tune.config import failures
from hbp_tune.config.failures import end_after_cause, end_in_one_line, is_lost_contact, record_for_torchrun


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Stand in for torchrun: its store, and where it looks for errors."""
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=10))
    values = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    values |= {"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    yield tmp_path / "error.json"
    del store


def said(error: Exception, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit, match="1"):
        end_in_one_line(error)
    return capsys.readouterr().err.strip()


@pytest.mark.usefixtures("torchrun")
def test_of_ranks_with_the_same_error_one_speaks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(ValueError("pack_len=3 is\nodd"), capsys) == "error: pack_len=3 is odd"
    assert said(ValueError("pack_len=3 is\nodd"), capsys) == ""
    assert said(ValueError("rank 3 has another"), capsys) == "error: rank 3 has another"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert said(ValueError("pack_len=3 is\nodd"), capsys) == "error: pack_len=3 is odd"


def test_without_torchruns_store_each_rank_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(ValueError("odd"), capsys) == said(ValueError("odd"), capsys) == "error: odd"


def test_torchrun_finds_a_line_where_a_user_can_mend_it_and_a_traceback_elsewhere(
    torchrun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        raise ValueError("pack_len=3 is odd") from KeyError("inner")
    except ValueError as error:
        said(error, capsys)
    record = json.loads(torchrun.read_text())["message"]
    assert record["message"] == "ValueError: pack_len=3 is odd"
    assert record["extraInfo"]["py_callstack"].strip() == "ValueError: pack_len=3 is odd"
    torchrun.unlink()
    try:
        raise KeyError("a bug")
    except KeyError as error:
        record_for_torchrun(error)
    assert "Traceback" in json.loads(torchrun.read_text())["message"]["extraInfo"]["py_callstack"]


LOST = [
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1234",
    "NCCL error: remote process exited or there was a network error",
]


@pytest.mark.parametrize("text", LOST)
def test_what_only_says_that_a_peer_is_gone_waits_for_the_cause(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    monkeypatch.setattr(failures, "_WAIT_FOR_CAUSE_S", 0.0)
    monkeypatch.setenv("RANK", "1")
    before = signal.getsignal(signal.SIGTERM)
    assert is_lost_contact(RuntimeError(text))
    try:
        with pytest.raises(SystemExit, match="1"):
            end_after_cause(RuntimeError(text))
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "torchrun ends a rank that waits at once"
    finally:
        signal.signal(signal.SIGTERM, before)
    line = capsys.readouterr().err.strip()
    assert line == f"rank 1 lost contact with another rank; its error stands above, if it could tell. ({text})"


@pytest.mark.parametrize("text", ["Timed out waiting 1800000ms for recv operation to complete", "CUDA error", ""])
def test_other_errors_are_their_own_cause(text: str) -> None:
    assert not is_lost_contact(RuntimeError(text))
