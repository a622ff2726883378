"""Settings as a run saves them, and what differs from them when it goes on."""

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

# Keys that say where a run writes, what it prints and how it is started, and those that a resumed run checks by itself.
_OF_A_START = (
    "checkpointer",
    "dataset",
    "dataset_val",
    "device",
    "demo_dir",
    "log_every_n_steps",
    "log_peak_memory_stats",
    "metric_logger",
    "model_dir",
    "num_workers",
    "output_dir",
    "process_group_timeout_s",
    "profiler",
    "resume_from_checkpoint",
    "seed",
    "token_store_dir",
    "token_store_timeout_s",
    "tokenizer",
)


def flat_settings(cfg: DictConfig) -> dict[str, Any]:
    """Give the settings that decide what is trained, each under its full name: ``optimizer.lr``, ``groups[1].ac_layers``."""
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    return {name: value for key in settings if key not in _OF_A_START for name, value in _flat(str(key), settings[key])}


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(f"{name}.{key}", item)
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _flat(f"{name}[{index}]", item)
    else:
        yield name, value


def describe_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Say in a line each which settings of a saved run are others now; what is null and what is left out is the same."""
    names = sorted(saved.keys() | current.keys())
    return [
        f"{name}={current.get(name)} replaces {name}={saved.get(name)} of the saved run"
        for name in names
        if saved.get(name) != current.get(name)
    ]
