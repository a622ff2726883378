import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SITE_PACKAGES = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
PROBE = """
import hbp_full_finetune_distributed as launcher
import hbp_tune
from hbp_tune.components import BalancePlanner
from hbp_tune.config.packaged import packaged_configs

print(launcher.__file__, hbp_tune.__file__, *(f"{name}={path}" for name, path in packaged_configs().items()), sep="\\n")
"""

# By metadata: find_spec("pip") makes setuptools leave the stdlib distutils alone, which breaks Inductor in this process.
INSTALLED = {str(found.metadata["Name"]).lower() for found in importlib.metadata.distributions()}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("pip" not in INSTALLED, reason="needs pip in this environment"),
    pytest.mark.skipif("hatchling" not in INSTALLED, reason="needs hatchling, the build backend: pip install hatchling"),
]


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--no-deps", "--no-index", "--disable-pip-version-check", "-q"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def probe(cwd: Path, *paths: Path, before: str = "") -> list[str]:
    """Import from another folder, and from these paths alone: without site, no editable install of this environment is seen."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, paths), *SITE_PACKAGES])}
    command = [sys.executable, "-S", "-W", "ignore", "-c", before + PROBE]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--wheel-dir", folder, ROOT)
    (path,) = folder.glob("hbp_tune-*.whl")
    return path


def shipped_configs() -> list[str]:
    return sorted(path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml"))


def test_the_wheel_holds_the_package_the_configs_and_one_module_a_recipe(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {path.relative_to(ROOT).as_posix() for pattern in ("*.py", "*.pyi") for path in (ROOT / "hbp_tune").rglob(pattern)}
    wanted |= {f"hbp_tune/configs/{name}" for name in shipped_configs()}
    wanted |= {path.name for path in (ROOT / "launch").glob("*.py")}
    assert {"hbp_full_finetune_distributed.py", "hbp_tune/components/__init__.pyi"} <= wanted
    assert names == wanted | {"hbp_tune/py.typed"}


def test_an_installed_wheel_works_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    pip("install", "--target", target, wheel)
    launcher, package, *configs = probe(tmp_path, target)
    assert Path(launcher) == target / "hbp_full_finetune_distributed.py"
    assert Path(package) == target / "hbp_tune" / "__init__.py"
    folder = target / "hbp_tune" / "configs"
    assert configs == [f"{name.removesuffix('.yaml')}={folder / name}" for name in shipped_configs()]


def test_an_editable_install_works_from_any_folder(tmp_path: Path) -> None:
    target = tmp_path / "installed"
    pip("install", "--no-build-isolation", "--target", target, "--editable", ROOT)
    launcher, package, *configs = probe(tmp_path, before=f"import site; site.addsitedir({str(target)!r})\n")
    assert Path(launcher) == ROOT / "launch" / "hbp_full_finetune_distributed.py"
    assert Path(package) == ROOT / "hbp_tune" / "__init__.py"
    assert configs == [f"{name.removesuffix('.yaml')}={ROOT / 'configs' / name}" for name in shipped_configs()]
