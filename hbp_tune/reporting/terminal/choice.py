"""The choice of packing groups as a table on a terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from hbp_tune.planning.comparison.selection import GroupChoice
from hbp_tune.planning.plans.records import PackingGroup
from hbp_tune.reporting.formats import time_unit


def describe_set(groups: Sequence[PackingGroup]) -> str:
    """Write a set of groups in one line: length, CP degree and recomputed layers of each, ``8K/1/0 + 128K/8/13``."""
    return " + ".join(f"{group.name}/{group.cp_degree}/{group.describe_ac()}" for group in groups)


def print_choice(choice: GroupChoice, rule: tuple[Sequence[PackingGroup], float], console: Console, *, where: str) -> None:
    """Print the chosen groups, what each brings, and what else was looked at.

    Args:
        choice: that was made.
        rule: groups by the HBP paper's rule, and the seconds of an epoch with them.
        console: where to print.
        where: ranks and machine, for people.
    """
    scale, unit, _ = time_unit(choice.epoch_s)
    table = Table(title=f"Packing groups for {where}: length / CP / recomputed layers")
    for name in ("groups", "epoch", "x"):
        table.add_column(name, justify="left" if name == "groups" else "right")

    def row(name: str, seconds: float) -> None:
        table.add_row(name, f"{seconds / scale:,.1f} {unit}", f"{seconds / choice.epoch_s:.3f}")

    row(f"{describe_set(choice.groups)}  (chosen)", choice.epoch_s)
    for group, seconds in zip(choice.groups, choice.without_s, strict=True):
        if seconds is not None:
            row(f"  without {group.name}", seconds)
    for groups, seconds in choice.others:
        row(describe_set(groups), seconds)
    row(f"{describe_set(rule[0])}  (the paper's rule)", rule[1])
    console.print(table)
    console.print("  x: time over the chosen groups'\n", highlight=False)
    if len(choice.groups) == 1:
        is_only = all(len(groups) == 1 for groups, _ in choice.others)
        why = "there is no shorter length to choose" if is_only else "more would not bring a hundredth of the time"
        console.print(f"One group, as {why}: all samples share its CP degree and recomputation.\n", highlight=False)
