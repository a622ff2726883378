"""``hbp eval``: a configuration of torchtune's own ``eleuther_eval`` for what a run has exported."""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hbp_tune.cli.registry import find
from hbp_tune.config.packaged import read_mapping
from hbp_tune.errors import ConfigError


def add_eval(commands: Any) -> None:
    """Add the command's arguments."""
    parser = commands.add_parser(
        "eval",
        prog="hbp eval",
        usage="hbp eval CONFIG [--checkpoint DIR] [--to FILE] [key=value ...]",
        help="Write a configuration that evaluates a run's checkpoint by torchtune's eleuther_eval.",
        description="Write a configuration of torchtune's recipe eleuther_eval (EleutherAI's evaluation harness: pip install "
        "lm-eval) for the checkpoint that a run has exported, from the configuration that trained it.",
        epilog="example: hbp eval my.yaml 'tasks=[hellaswag]'; tune run eleuther_eval --config hbp_runs/mine/eleuther_eval.yaml",
    )
    parser.add_argument("config", help="that trained: a file or a name")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of training, or of the evaluation: tasks, limit ...")
    parser.add_argument("--checkpoint", type=Path, help="folder of the weights (default: the newest epoch in output_dir)")
    parser.add_argument("--to", type=Path, help="file to write (default: eleuther_eval.yaml in output_dir)")
    parser.set_defaults(func=_run)


def _run(args: argparse.Namespace) -> int:
    if wrong := next((override for override in args.overrides if "=" not in override), None):
        raise ConfigError(f"{wrong!r} is not an override; write key=value")
    cfg = OmegaConf.merge(read_mapping(find(args.config)), OmegaConf.from_dotlist(list(args.overrides)))
    assert isinstance(cfg, DictConfig)
    OmegaConf.resolve(cfg)
    checkpoint = args.checkpoint or newest_export(Path(cfg.output_dir))
    path: Path = args.to or Path(cfg.output_dir) / "eleuther_eval.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(OmegaConf.to_yaml(evaluation_of(cfg, checkpoint)), encoding="utf-8")
    sys.stdout.write(f"Written: {path}, for {checkpoint}; run it by\n  tune run eleuther_eval --config {path}\n")
    return 0


def newest_export(output_dir: Path) -> Path:
    """Find the checkpoint of the last epoch that a run has exported.

    Raises:
        ConfigError: there is none.
    """
    found = {int(match[1]): path for path in output_dir.glob("epoch_*") if (match := re.fullmatch(r"epoch_(\d+)", path.name))}
    if not found:
        raise ConfigError(f"{output_dir} has no epoch_N, which a run exports at its end; name a folder with --checkpoint")
    return found[max(found)]


def evaluation_of(cfg: DictConfig, checkpoint: Path) -> DictConfig:
    """Make the evaluation's configuration from that of the training.

    Args:
        cfg: of the training, interpolations resolved; ``tasks``, ``limit``, ``batch_size``,
            ``max_seq_length``, ``enable_kv_cache`` and ``include_path`` are taken over.
        checkpoint: folder with the weights.

    Raises:
        ConfigError: it holds no weights.
    """
    files = sorted(path.name for path in checkpoint.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{checkpoint} holds no *.safetensors")
    source = {"checkpoint_dir": str(checkpoint), "checkpoint_files": files, "recipe_checkpoint": None}
    settings = {
        "output_dir": str(cfg.output_dir),
        "model": cfg.model,
        "checkpointer": OmegaConf.merge(cfg.checkpointer, source, {"output_dir": str(cfg.output_dir)}),
        "tokenizer": cfg.tokenizer,
        "device": cfg.device,
        "dtype": cfg.get("compute_dtype") or cfg.dtype,
        "seed": 1234,  # the harness's own
        "tasks": cfg.get("tasks", ["truthfulqa_mc2"]),
        "limit": cfg.get("limit"),
        "max_seq_length": cfg.get("max_seq_length", 4096),
        "batch_size": cfg.get("batch_size", 8),
        "enable_kv_cache": cfg.get("enable_kv_cache", True),
        "quantizer": None,
    }
    if "include_path" in cfg:
        settings["include_path"] = cfg.include_path
    return OmegaConf.create(settings)
