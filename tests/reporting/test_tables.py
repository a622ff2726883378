import io

import pytest
from rich.console import Console

from hbp_tune.planning.comparison.methods import BASELINE_NAMES
from hbp_tune.planning.comparison.metrics import PlanMetrics
from hbp_tune.reporting.terminal.tables import print_metrics


def metrics(epoch_s: float) -> PlanMetrics:
    return PlanMetrics(
        dbr=0.1,
        pr=0.0005,
        pr_tail=0.0,
        abr=0.25,
        cr=1.0,
        ave_t=16384.0,
        cbr=0.12345,
        idle=0.2,
        p99_imbalance=0.3,
        diversity=12.345,
        epoch_s=epoch_s,
    )


@pytest.mark.parametrize("width", [80, 120])
def test_figures_of_all_packers_stay_whole(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    print_metrics(
        {"HBP": metrics(5400.0)} | {name: metrics(86400.0 * 20) for name in BASELINE_NAMES}, console, ranks=8, machine="H100"
    )
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= width
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert ["HBP", "0.1000", "0.0005", "0.2500", "1.0000", "16,384"] in rows
    assert ["HBP", "0.1235", "0.2000", "0.3000", "12.35", "90.0 min", "1.00"] in rows
    for name in BASELINE_NAMES:
        assert [name, "0.1235", "0.2000", "0.3000", "12.35", "20.0 days", "320.00"] in rows
