"""``hbp``, or ``python -m hbp_tune.cli``."""

import argparse
import logging
import os
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

# torchao says at import which of its kernels it leaves out; no command here has a use for them.
logging.getLogger("torchao").setLevel(logging.ERROR)

from torchtune._cli.cat import Cat  # noqa: E402
from torchtune._cli.cp import Copy  # noqa: E402
from torchtune._cli.download import Download  # noqa: E402
from torchtune._cli.ls import List  # noqa: E402
from torchtune._cli.run import Run  # noqa: E402

from hbp_tune.cli.convert import add_convert  # noqa: E402
from hbp_tune.cli.data import add_data  # noqa: E402
from hbp_tune.cli.doctor import add_doctor  # noqa: E402
from hbp_tune.cli.evaluate import add_eval  # noqa: E402
from hbp_tune.cli.launch import launch  # noqa: E402
from hbp_tune.cli.registry import PLAN, PROFILE, TRAIN, register  # noqa: E402
from hbp_tune.cli.report import add_report  # noqa: E402
from hbp_tune.cli.validate import add_validate  # noqa: E402
from hbp_tune.config.failures import print_anywhere  # noqa: E402
from hbp_tune.demo.__main__ import main as demo_main  # noqa: E402
from hbp_tune.errors import HbpError  # noqa: E402

_DESCRIPTION = f"""\
Fine-tune Llama and Qwen models on mixed short and long data, by Hierarchical
Balance Packing. All that torchtune's `tune` does, for its recipes and ours.

From nothing to a trained model:

  hbp doctor                             is everything there?
  hbp ls                                 recipes and configurations
  hbp download meta-llama/Llama-3.2-1B-Instruct ...
  hbp plan --config NAME world_size=8    what a run would do and gain; no GPU
  hbp data --config NAME                 the data as they are trained
  hbp profile --nproc_per_node 8 --config NAME
                                         measure, and choose packing groups
  hbp run --nproc_per_node 8 {TRAIN} --config NAME
  hbp report OUTPUT_DIR                  a page about a run
  hbp eval NAME                          evaluate its checkpoint (lm-eval)

To change a recipe or configuration, copy it. Copies run with plain `tune run`:

  hbp cp {TRAIN} my_recipe.py
  hbp cp llama3_1/8B_hbp_full my.yaml
  tune run --nproc_per_node 8 my_recipe --config my.yaml"""
# Commands that are a recipe's.
_SHORT_FOR = {"plan": PLAN, "profile": PROFILE}


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments: torchtune's subcommands, and ours."""
    parser = argparse.ArgumentParser(prog="hbp", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(func=lambda args: parser.print_help())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for torchtune_command in (Download, List, Copy, Cat, Run):
        torchtune_command.create(commands)
    for command in commands.choices.values():
        _speak_of_hbp(command)
    add_validate(commands)
    _add_plan(commands)
    _add_profile(commands)
    add_data(commands)
    add_report(commands)
    add_eval(commands)
    commands.add_parser("demo", prog="hbp demo", help="Make a small data set, tokenizer and model to try things on.")
    add_convert(commands)
    add_doctor(commands)
    return parser


def _speak_of_hbp(command: argparse.ArgumentParser) -> None:
    """Let torchtune's help name the command that was typed."""
    for field in ("prog", "usage", "description", "epilog"):
        if text := getattr(command, field):
            setattr(command, field, text.replace("tune ", "hbp "))
    for action in command._actions:
        if action.help:
            action.help = action.help.replace("`tune ", "`hbp ")


def _add_plan(commands: Any) -> None:
    commands.add_parser(
        "plan",
        prog="hbp plan",
        usage="hbp plan [--json] --config CONFIG [key=value ...]",
        help="Say what a run would do, how long it would take and what it gains; no GPU, no weights.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=textwrap.dedent(
            f"""\
            Plan a run in one process, and compare it with packing to one length: short for
            `hbp run {PLAN}`. Every key of the configuration can be overridden.

            examples:
              hbp plan --config llama3_1/8B_hbp_full world_size=32 dataset.data_files=chats.jsonl
              hbp plan --config llama3_1/8B_hbp_full lengths=lengths.csv groups=auto gpu=H100

            world_size=N  ranks to plan for            lengths=FILE  token lengths in place of data
            groups=auto   choose the packing groups    gpu=NAME      whose time is modelled
            trace=N       time line of N steps         baselines=[..] other packings beside it
            --json        print one JSON document, the figures of plan.json, and nothing else"""
        ),
    )


def _add_profile(commands: Any) -> None:
    commands.add_parser(
        "profile",
        prog="hbp profile",
        usage="hbp profile [TORCHRUN-OPTIONS] --config CONFIG [key=value ...]",
        help="Measure packing groups on the ranks that will train, and choose the fastest set.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=textwrap.dedent(
            f"""\
            Measure packing groups, and write the set that trains the data fastest: short for
            `hbp run ... {PROFILE}`. What was measured is kept and used again.

            example:
              hbp profile --nproc_per_node 8 --config llama3_1/8B_hbp_full dataset.data_files=chats.jsonl
              hbp run --nproc_per_node 8 {TRAIN} \\
                --config llama3_1/8B_hbp_full groups_file=hbp_runs/llama3_1_8B/groups.yaml"""
        ),
    )


def expand(arguments: Sequence[str]) -> list[str]:
    """Write commands that are short for a recipe in full; others, and calls for help, stay as they are."""
    command, *rest = arguments
    if command == "data":  # overrides may stand between options, where argparse takes no list
        return [command, *sorted(rest, key=lambda word: "=" in word and not word.startswith("-"))]
    if command not in _SHORT_FOR or {"-h", "--help"} & set(rest):
        return list(arguments)
    if command == "plan" and "--json" in rest:
        rest = [*(word for word in rest if word != "--json"), "json=True"]
    start = rest.index("--config") if "--config" in rest else len(rest)
    return ["run", *rest[:start], _SHORT_FOR[command], *rest[start:]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for what the user can mend."""
    print_anywhere()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["demo"]:
        return demo_main(given[1:], prog="hbp demo")
    register()
    given = expand(given) if given else given
    sys.argv = ["hbp", *given]  # torchtune tells by it whether there are torchrun's options
    args = build_parser().parse_args(given)
    try:
        status = launch(lambda: args.func(args), several_nodes=getattr(args, "nnodes", "1:1") not in ("1", "1:1"))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `hbp ls | head`: nobody reads on, and Python would say so once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except HbpError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
