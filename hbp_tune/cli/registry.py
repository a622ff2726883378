"""Makes our recipes and configurations known to torchtune's commands, in this process alone."""

from pathlib import Path

import torchtune
from torchtune import _recipe_registry
from torchtune._recipe_registry import Config, Recipe

from hbp_tune import recipes
from hbp_tune.config.packaged import packaged_configs
from hbp_tune.errors import ConfigError

_RECIPES = Path(recipes.__file__).parent
_TORCHTUNE_CONFIGS = Path(torchtune.__file__).parents[1] / "recipes" / "configs"
TRAIN, PROFILE, PLAN = "hbp_full_finetune_distributed", "hbp_profile_groups", "hbp_plan"


def register() -> None:
    """Put our recipes before torchtune's. Once is enough; more do no harm.

    torchtune joins the paths with its own folder, which leaves absolute ones as they are.
    """
    known = {recipe.name for recipe in _recipe_registry.get_all_recipes()}
    configs = [Config(name=name, file_path=str(path)) for name, path in packaged_configs().items()]
    # Listed under the recipe that trains; planning and profiling take the same ones.
    ours = [
        Recipe(
            name=name,
            file_path=str(_RECIPES / f"{name}.py"),
            configs=configs if name == TRAIN else [],
            supports_distributed=name != PLAN,
        )
        for name in (TRAIN, PROFILE, PLAN)
        if name not in known
    ]
    _recipe_registry.get_all_recipes()[:0] = ours


def find(name: str) -> Path:
    """Find a configuration: an existing file wins, then a name of ours or torchtune's.

    Raises:
        ConfigError: it is none of these.
    """
    known = {config.name: config.file_path for recipe in _recipe_registry.get_all_recipes() for config in recipe.configs}
    path = Path(name)
    if not path.is_file() and name in known:
        path = _TORCHTUNE_CONFIGS / known[name]
    if not path.is_file():
        raise ConfigError(f"{name}: no such file, and no configuration; `hbp ls` lists them")
    return path
