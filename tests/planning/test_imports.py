import importlib
import subprocess
import sys

import pytest

import hbp_tune.components


def test_planning_never_imports_torch() -> None:
    code = (
        "import importlib, pkgutil, sys\n"
        "import hbp_tune.components.planning as planning\n"
        "for module in pkgutil.iter_modules(planning.__path__): importlib.import_module(f'{planning.__name__}.{module.name}')\n"
        "from hbp_tune.components import BalancePlanner, PackingGroup\n"
        "print(sorted({'torch', 'torchtune', 'datasets'} & set(sys.modules)))\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


@pytest.mark.parametrize("name", hbp_tune.components.__all__)
def test_public_names_are_there(name: str) -> None:
    value = getattr(hbp_tune.components, name)
    if name.isupper():
        assert value, "a constant does not know where it comes from"
    else:
        assert value.__name__ == name
        assert getattr(importlib.import_module(value.__module__), name) is value


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match=r"module 'hbp_tune.components' has no attribute 'Planner'"):
        _ = hbp_tune.components.Planner
