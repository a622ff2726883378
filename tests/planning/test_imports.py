import importlib
import subprocess
import sys

import pytest

import hbp_tune


def test_planning_never_imports_torch() -> None:
    code = (
        "import importlib, pkgutil, sys\n"
        "from hbp_tune import planning\n"
        "for module in pkgutil.walk_packages(planning.__path__, 'hbp_tune.planning.'): importlib.import_module(module.name)\n"
        "from hbp_tune.components import BalancePlanner, PackingGroup\n"
        "print(sorted({'torch', 'torchtune', 'datasets'} & set(sys.modules)))\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


PACKAGES = ("components", "config", "data", "models", "parallel", "planning", "reporting", "training")


@pytest.mark.parametrize(("package", "name"), [(p, name) for p in PACKAGES for name in getattr(hbp_tune, p).__all__])
def test_public_names_are_there(package: str, name: str) -> None:
    value = getattr(getattr(hbp_tune, package), name)
    if name.isupper():
        assert value, "a constant does not know where it comes from"
    else:
        assert value.__name__ == name
        assert getattr(importlib.import_module(value.__module__), name) is value
        assert value.__module__.startswith("hbp_tune.")


def test_every_package_is_a_name_of_the_whole() -> None:
    assert set(hbp_tune.__all__) == {*PACKAGES, "ConfigError", "DataError", "Plan", "plan"}
    assert {"__version__", *PACKAGES} <= set(dir(hbp_tune)) | {"__version__"}


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match=r"module 'hbp_tune.components' has no attribute 'Planner'"):
        _ = hbp_tune.components.Planner
