"""Which keys of torchtune's stock `full_finetune_distributed` carry over, and what replaces those that do not."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from hbp_tune.config.building import find_component, setting
from hbp_tune.config.sources import READS_FOLDERS, check_tokenizer_files, dataset_nodes
from hbp_tune.errors import ConfigError

# Keys with the meaning that they have in torchtune 0.6.1.
_CARRIED = frozenset(
    [
        "output_dir",
        "tokenizer",
        "dataset",
        "seed",
        "model",
        "checkpointer",
        "resume_from_checkpoint",
        "epochs",
        "optimizer",
        "lr_scheduler",
        "loss",
        "clip_grad_norm",
        "device",
        "dtype",
        "metric_logger",
        "log_every_n_steps",
        "log_peak_memory_stats",
        "profiler",
        "custom_sharded_layers",
        "fsdp_cpu_offload",
        "fsdp_reshard_after_forward",
        "cudnn_deterministic_mode",
        "compile",
    ]
)
# Keys of our own.
_OURS = frozenset(
    [
        "groups",
        "groups_file",
        "planner",
        "curriculum",
        "context_parallel",
        "attention",
        "process_group_timeout_s",
        "fsdp_shard_degree",
        "fsdp_sharded_accumulation",
        "loss_head",
        "compute_dtype",
        "max_steps",
        "dataset_val",
        "run_val_every_n_steps",
        "save_every_n_steps",
        "keep_last_n_checkpoints",
        "async_save",
        "max_nonfinite_steps",
        "num_workers",
        "token_store_dir",
        "token_store_timeout_s",
        "bad_rows",
        "plan_file",
    ]
)
# Keys of `hbp_plan`, which training takes no notice of: one file serves both.
_PLAN = frozenset(
    ["lengths", "lengths_column", "num_samples", "world_size", "baselines", "trace", "gpu", "memory_gib", "profile"]
)
# Keys without which there is no training.
REQUIRED = ("output_dir", "tokenizer", "dataset", "model", "checkpointer", "optimizer", "device", "dtype", "epochs")
# Whole numbers, and their least values.
_COUNTS = {
    "epochs": 1,
    "max_steps": 1,
    "run_val_every_n_steps": 1,
    "save_every_n_steps": 1,
    "keep_last_n_checkpoints": 1,
    "max_nonfinite_steps": 0,
    "log_every_n_steps": 1,
    "num_samples": 1,
    "world_size": 1,
    "process_group_timeout_s": 1,
    "fsdp_shard_degree": 1,
    "token_store_timeout_s": 1,
}
# Keys of the stock recipe: the values (no effect) that are fine, and what to use in place of anything else.
REPLACED: dict[str, tuple[tuple[Any, ...], str]] = {
    "batch_size": ((), "a micro-step is one pack per replica: set groups[].pack_len and planner.tokens_per_step"),
    "gradient_accumulation_steps": ((), "accumulation follows from planner.tokens_per_step, per group"),
    "max_steps_per_epoch": ((None,), "use max_steps, which counts over the run"),
    "shuffle": ((None, True), "samples and steps are shuffled by seed and epoch; a curriculum orders the steps"),
    "collate_fn": ((None,), "packs replace batches, so there is nothing to collate"),
    "enable_activation_checkpointing": ((None, False), "set groups[].ac_layers, the recomputed layers of each group"),
    "ac_mode": ((None, "full"), "set groups[].ac_layers and groups[].ac_mode"),
    "ac_option": ((None,), "set groups[].ac_layers"),
    "enable_activation_offloading": ((None, False), "set groups[].ac_layers and groups[].ac_mode=offload, or raise cp_degree"),
    "optimizer_in_bwd": ((None, False), "a step's gradients span micro-steps; save memory by fsdp_cpu_offload instead"),
    "tensor_parallel_dim": ((None, 1), "long packs are split by groups[].cp_degree, weights by FSDP2 over all ranks"),
    "tensor_parallel_plan": ((None,), "long packs are split by groups[].cp_degree, weights by FSDP2 over all ranks"),
    "enable_async_checkpointing": ((None, False), "use save_every_n_steps with async_save=True, which saves exact progress"),
}
# Losses of torchtune's recipes whose meaning is the mean over a step's targets, which is AveTokenLoss.
_STOCK_LOSSES = ("torchtune.modules.loss.CEWithChunkedOutputLoss", "torch.nn.CrossEntropyLoss")

# Of a model's folder, in an error.
_SHOWN_FILES = 5


def check_config(cfg: Mapping[str, Any], required: Sequence[str] = REQUIRED) -> None:
    """Check a recipe's keys before anything is built.

    Args:
        cfg: the whole configuration.
        required: keys that the recipe cannot do without.

    Raises:
        ConfigError: a key is missing, replaced by another one, or looks like a misspelling.
    """
    for key, (harmless, replacement) in REPLACED.items():
        if key in cfg and not any(cfg[key] is value or cfg[key] == value for value in harmless):
            raise ConfigError(f"{key}={cfg[key]} of torchtune's stock recipe is not supported here; remove it: {replacement}")
    known = _CARRIED | _OURS | _PLAN | REPLACED.keys()
    for key in cfg:
        # Keys of the user's own, for interpolation, are fine; a near miss of a known key is a mistake.
        if key not in known and (meant := difflib.get_close_matches(key, known, n=1, cutoff=0.85)):
            raise ConfigError(f"unknown key {key!r}: did you mean {meant[0]!r}? Rename it if it is a value of your own")
    for key in required:
        if cfg.get(key) is None:
            raise ConfigError(f"config key {key!r} is missing")
    plain: Any = OmegaConf.to_container(cfg) if OmegaConf.is_config(cfg) else cfg  # what a key refers to is not asked for yet
    for key, node in plain.items():
        # torchtune's parser reads key={...} as key._component_={...} where the file has a component.
        if isinstance(node, dict) and isinstance(node.get("_component_"), dict):
            name = node["_component_"].get("_component_", "NAME")
            raise ConfigError(
                f"{key}={{...}} cannot replace a component on the command line; write {key}={name} {key}.argument=value ..."
            )
    for key, least in _COUNTS.items():
        value = cfg.get(key)
        if value is not None and (not isinstance(value, int) or value < least):
            raise ConfigError(
                f"{key}={value} must be a whole number of at least {least}" + ("" if key == "epochs" else ", or null")
            )
    if (resume := cfg.get("resume_from_checkpoint")) not in (None, True, False, "auto"):
        raise ConfigError(f"resume_from_checkpoint={resume} must be True, False, or auto: resume where there is saved progress")
    if cfg.get("bad_rows") not in (None, "error", "drop"):
        raise ConfigError(f"bad_rows={cfg['bad_rows']} is not a policy; choose error or drop")
    if not cfg.get("groups") and not cfg.get("groups_file"):
        raise ConfigError(
            "config key 'groups' is missing; the least is groups: "
            "[{_component_: hbp_tune.components.PackingGroup, name: all, pack_len: 8192}]"
        )
    if (cfg.get("optimizer") or {}).get("bf16_stochastic_round"):
        raise ConfigError(
            "optimizer.bf16_stochastic_round=True does not work on sharded weights in torchao before 0.16; remove it, and set "
            "dtype: fp32 with compute_dtype: bf16 so that no small update is lost"
        )
    if cfg.get("run_val_every_n_steps") and not setting(cfg, "dataset_val"):
        raise ConfigError(
            f"run_val_every_n_steps={cfg['run_val_every_n_steps']} needs held-out data: set dataset_val, or "
            f"run_val_every_n_steps=null"
        )
    for key in ("dataset", "dataset_val") if "dataset" in required else ():
        for name, dataset in dataset_nodes(cfg.get(key) or [], key).items():
            if dataset.get("packed"):
                raise ConfigError(f"{name}: packed=True is not supported here; remove it: groups decide how samples are packed")


def is_stock_loss(cfg: Mapping[str, Any]) -> bool:
    """Tell whether the loss is one of torchtune's whose meaning is `AveTokenLoss`, or left out.

    Raises:
        ConfigError: a stock loss with arguments that would change its meaning.
    """
    loss = setting(cfg, "loss")
    if loss is None:
        return True
    if not hasattr(loss, "keys") or loss.get("_component_") not in _STOCK_LOSSES:
        return False
    if extra := [key for key in loss if key not in ("_component_", "num_output_chunks")]:
        raise ConfigError(f"loss.{extra[0]} of {loss['_component_']} is not supported here; use hbp_tune.components.AveTokenLoss")
    return True


def missing_tokenizer_files(cfg: Mapping[str, Any]) -> list[str]:
    """Find what the tokenizer names (by ``path``, ``..._path`` or ``..._file``) of a model that was not downloaded.

    Raises:
        ConfigError: there is no such tokenizer, a file is not in the model's folder, or a folder stands in a file's place.
    """
    tokenizer = cfg["tokenizer"]
    if not hasattr(tokenizer, "keys"):
        return []
    component = str(tokenizer.get("_component_"))
    find_component("tokenizer", component)
    names = {key: tokenizer[key] for key in tokenizer if key == "path" or key.endswith(("_path", "_file"))}
    paths = {f"tokenizer.{key}": Path(name) for key, name in names.items() if isinstance(name, str)}
    check_tokenizer_files(tokenizer)
    missing = {key: path for key, path in paths.items() if not path.exists()}
    if not component.endswith(READS_FOLDERS):
        for key, path in missing.items():
            if inside := _model_files(path.parent):
                near = difflib.get_close_matches(path.name, inside, n=_SHOWN_FILES, cutoff=0.5) or inside[:_SHOWN_FILES]
                raise ConfigError(f"{key}={path} does not exist; the model's folder holds {', '.join(near)}")
    return [str(path) for path in missing.values()]


def _model_files(folder: Path) -> list[str]:
    """List the files of a downloaded model, those of its ``original`` where the folder has that name."""
    for place in (folder, folder.parent) if folder.name == "original" else (folder,):
        files = [path.name for path in place.iterdir() if path.is_file()] if place.is_dir() else []
        if names := sorted(name for name in files if not name.startswith(".")):
            return names
    return []
