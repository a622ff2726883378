import io

import pytest
from rich.console import Console

from hbp_tune.planning.comparison.selection import GroupChoice
from hbp_tune.planning.plans.records import PackingGroup
from hbp_tune.reporting.terminal.choice import print_choice

SHORT, LONG = PackingGroup(name="8K", pack_len=8192), PackingGroup(name="128K", pack_len=131_072, cp_degree=8, ac_layers=13)


def printed(choice: GroupChoice) -> str:
    console = Console(file=io.StringIO(), width=130)
    print_choice(choice, ((SHORT, LONG), 3900.0), console, where="32 H100s")
    return console.file.getvalue()  # type: ignore[attr-defined]


def choice(
    *groups: PackingGroup, without_s: tuple[float | None, ...], others: tuple[tuple[PackingGroup, ...], ...]
) -> GroupChoice:
    return GroupChoice(
        groups=groups,
        epoch_s=3600.0,
        without_s=without_s,
        others=tuple((other, 4500.0) for other in others),
        one_length=(LONG, 4500.0),
    )


def test_what_each_group_brings_is_a_row() -> None:
    text = printed(choice(SHORT, LONG, without_s=(4500.0, None), others=((LONG,),)))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert rows == [
        ["8K/1/0 + 128K/8/13  (chosen)", "60.0 min", "1.000"],
        ["without 8K", "75.0 min", "1.250"],
        ["128K/8/13", "75.0 min", "1.250"],
        ["8K/1/0 + 128K/8/13  (the paper's rule)", "65.0 min", "1.083"],
    ]
    assert "One group" not in text


@pytest.mark.parametrize(
    ("others", "why"),
    [((), "there is no shorter length to choose"), (((SHORT, LONG),), "more would not bring a hundredth of the time")],
)
def test_a_single_group_is_explained(others: tuple[tuple[PackingGroup, ...], ...], why: str) -> None:
    text = printed(choice(LONG, without_s=(None,), others=others))
    assert f"One group, as {why}: all samples share its CP degree and recomputation." in text
