import importlib.metadata

import pytest

from hbp_tune.cli import doctor
from hbp_tune.cli.__main__ import main


def test_a_machine_that_runs_the_tests_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "Ready to train." in out
    assert "MISSING" not in out
    for what in ("torch ", "torchtune", "torchao", "collectives", "attention", "tune run NAME", "disk"):
        assert what in out
    assert "0.6.1" in out


def test_versions_that_do_not_fit_are_named_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "torchdata":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.17.0" if name == "torchao" else real(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "pip install 'torchao<0.16,>=0.13'" in out
    assert "pip install 'torchdata<0.12,>=0.11'" in out
    assert "Training cannot work here." in out
