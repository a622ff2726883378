import dataclasses
import html
import math
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser

import numpy as np
import pytest

from hbp_tune.planning.comparison.metrics import micro_step_s
from hbp_tune.planning.plans.records import EpochPlan, PackingGroup
from hbp_tune.reporting.formats import time_unit, write_count, write_share, write_tokens
from hbp_tune.reporting.pages.charts import Axis, linear_axis
from hbp_tune.reporting.pages.page import render_page
from hbp_tune.reporting.report import PlanReport
from tests.reporting.conftest import GROUPS, assemble


class Structure(HTMLParser):
    """Reads a page and fails where a tag is not closed, or closed by another."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.titles: list[str] = []
        self.counts: dict[str, int] = {}
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == [], "all tags are closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag == "h2":
            self.titles.append("")
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} closes what is open"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data
        if "h2" in self.open:
            self.titles[-1] += data


@pytest.fixture
def rows(by_hand: EpochPlan, report_on: Callable[..., PlanReport]) -> Callable[..., dict[str, list[str]]]:
    """Give the rows of all tables, cells by the first word of the row."""

    def read(report: PlanReport | None = None) -> dict[str, list[str]]:
        page = render_page(report or report_on(by_hand))
        found = {}
        for row in re.findall(r"<tbody>.*?</tbody>", page, re.DOTALL):
            for cells in re.findall(r"<tr>(.*?)</tr>", row):
                texts = [
                    re.sub(r"<[^>]*>", "", re.sub(r"<span>.*?</span>", "", cell)) for cell in re.findall(r"<td.*?</td>", cells)
                ]
                found[html.unescape(texts[0])] = texts[1:]
        return found

    return read


@pytest.mark.parametrize("seed", range(10))
def test_the_page_is_whole(draw_plan: Callable[[int], EpochPlan], report_on: Callable[..., PlanReport], seed: int) -> None:
    plan = draw_plan(seed)
    structure = Structure(render_page(report_on(plan, draw_plan(seed + 1))))
    assert structure.counts["h1"] == structure.counts["main"] == 1
    assert structure.counts["table"] == 2
    assert structure.counts["figure"] == structure.counts["figcaption"] == 6
    used = len(np.unique(plan.pack_group))
    assert structure.counts["svg"] == 1 + used + 2 + 2 + 1 + 1, "fill by group, before and after twice"
    assert "nan" not in structure.text.lower()
    for _, name, value in structure.attributes:
        assert name not in {"src", "href", "onclick"}
        if name in {"d", "style"}:
            assert "nan" not in str(value)
            assert "inf" not in str(value)
    assert "script" not in structure.counts
    assert "http" not in render_page(report_on(plan))


def test_what_a_person_reads_first(by_hand: EpochPlan, report_on: Callable[..., PlanReport]) -> None:
    plan = dataclasses.replace(by_hand, dropped=np.array([7], dtype=np.int32))
    structure = Structure(render_page(report_on(plan, by_hand, warnings=("one group is empty", "no seed"))))
    start = structure.text.index("This plan is 1.50x as fast.")
    facts = "5 samples placed, 1 dropped, 400 tokens, 2 optimizer steps, 2 ranks, the first of 2 epochs. Lengths: made up."
    assert structure.text[start:].startswith(f"This plan is 1.50x as fast.{facts}")
    assert "Before you trainone group is emptyno seed" in structure.text
    assert structure.text.strip().endswith(f"Hash of the plan, equal on every machine that plans the same: {plan.hash}")


def test_no_warnings_no_box(by_hand: EpochPlan, report_on: Callable[..., PlanReport]) -> None:
    assert "Before you train" not in render_page(report_on(by_hand))


def test_titles_state_findings(by_hand: EpochPlan, report_on: Callable[..., PlanReport]) -> None:
    report = report_on(by_hand)
    own = dataclasses.replace(report.metrics, idle=0.0004, abr=0.58, cbr=0.001)
    naive = dataclasses.replace(report.metrics, idle=0.39, abr=0.506, cbr=0.31)
    duration_s = micro_step_s(by_hand, report.cost)
    titles = Structure(render_page(dataclasses.replace(report, metrics=own, baselines={"isf": naive}))).titles
    assert titles[3:] == [
        "20% of the samples have over 64 tokens and hold 62.5% of all tokens",
        "Packs are 89.3% full",  # 400 of 3 * 64 + 256
        "Ranks wait 0.04% of the time, 39% in one-length packing",
        "Attention work is 58% out of balance, the whole work 0.10%; in one-length packing 50.6% and 31%",
        f"'long' takes {duration_s[2] / duration_s.sum():.1%} of the time: 1 of 2 steps, from step 1 on",
        "A step trains 200 tokens on average, between 150 and 250",
    ]


def test_groups_by_hand(rows: Callable[..., dict[str, list[str]]]) -> None:
    assert rows()["short"] == ["64", "1", "0", "4", "3", "1", "2.0", "37.5%", "150 ± 0%"]
    assert rows()["long"] == ["256", "2", "3", "1", "1", "1", "1.0", "62.5%", "250 ± 0%"]


def test_a_mode_of_recomputation_shows(
    by_hand: EpochPlan, report_on: Callable[..., PlanReport], rows: Callable[..., dict[str, list[str]]]
) -> None:
    groups = tuple(dataclasses.replace(group, ac_mode="selective") for group in by_hand.groups)
    found = rows(report_on(dataclasses.replace(by_hand, groups=groups)))
    assert (found["short"][2], found["long"][2]) == ("0", "3 selective")


def test_metrics_stand_beside_the_baselines(
    by_hand: EpochPlan, report_on: Callable[..., PlanReport], rows: Callable[..., dict[str, list[str]]]
) -> None:
    report = report_on(by_hand)
    own = dataclasses.replace(report.metrics, epoch_s=1800.0, abr=0.002, ave_t=12345.6, diversity=math.nan)
    slow = dataclasses.replace(own, epoch_s=10800.0, abr=0.506)
    found = rows(dataclasses.replace(report, metrics=own, baselines={"isf": slow, "ffd": own}))
    assert found["Modelled epoch"] == ["30.0 min", "180 min", "30.0 min"], "in one unit, to compare"
    assert found["ABR"] == ["0.20%", "50.6%", "0.20%"]
    assert found["Ave-T"] == ["12,346", "12,346", "12,346"]
    assert found["Diversity"] == ["-", "-", "-"]
    assert len([name for name in found if name not in {"short", "long"}]) == 11


def test_strings_of_users_are_only_text(by_hand: EpochPlan, report_on: Callable[..., PlanReport]) -> None:
    evil = '<script>alert("1")</script>&$x_1$ 漢字'
    groups = (PackingGroup(name=evil, pack_len=64), PackingGroup(name=f"{evil} 2", pack_len=256, cp_degree=2))
    report = report_on(dataclasses.replace(by_hand, groups=groups), headline=evil, warnings=(evil,), lengths_from=evil)
    report = dataclasses.replace(report, baselines={"isf": report.metrics, evil: report.metrics}, seconds={evil: 1.0})
    page = render_page(report)
    structure = Structure(page)
    assert "script" not in structure.counts
    assert "<script" not in page
    assert structure.text.count(evil) >= 8


@pytest.mark.parametrize(
    "plan",
    [
        assemble(GROUPS[:1], 1, [(0, [[[1]]])]),
        assemble(GROUPS[:2], 2, [(0, [[[], [5]]])]),
        assemble(GROUPS[:2], 2, [(1, [[[256]]])]),
        assemble(GROUPS, 4, [(0, [[[7] * 9] * 4])] * 30),
        assemble(GROUPS, 4, [(2, [[[1]]])]),
        assemble((PackingGroup(name="huge", pack_len=2**20),), 1, [(0, [[[2**20]]])]),
    ],
    ids=["one of all", "an empty rank", "an unused short group", "equal lengths", "an unused long group", "a million tokens"],
)
def test_tiny_plans(plan: EpochPlan, report_on: Callable[..., PlanReport]) -> None:
    structure = Structure(render_page(report_on(plan)))
    assert structure.counts["figure"] == 6
    assert all(structure.titles)


def test_lengths_beyond_the_groups_show(by_hand: EpochPlan, report_on: Callable[..., PlanReport]) -> None:
    page = render_page(report_on(by_hand, lengths=np.array([10, 5000], dtype=np.int32)))
    assert "longest 5,000 tokens" in page
    assert "4,097 to 5,792 tokens: 1 sample, 50% of all, with 99.80% of the tokens" in page


def test_the_page_of_a_long_epoch_stays_small(report_on: Callable[..., PlanReport]) -> None:
    rng = np.random.default_rng(0)
    steps = [
        (
            int(index),
            [[rng.integers(1, 65, 3).tolist() if index else [int(rng.integers(1, 65))] for _ in range(8 // (1 + index))]] * 3,
        )
        for index in rng.integers(0, 2, 3000)
    ]
    report = report_on(assemble(GROUPS[:2], 8, steps), lengths=rng.integers(1, 200_000, 1_000_000).astype(np.int32))
    page = render_page(report)
    Structure(page)
    assert len(page.encode()) < 200_000
    assert "120 micro-steps are shown" in page
    assert "120 equal pieces of time" in page
    assert "in each of 120 bins" in page


def test_short_epochs_show_every_step(report_on: Callable[..., PlanReport]) -> None:
    page = render_page(report_on(assemble(GROUPS[:2], 2, [(0, [[[60], [50]]] * 2), (1, [[[200]]])] * 7)))
    assert "Each block is a micro-step, numbers are optimizer steps." in page
    assert page.count('class="note"') == 14
    longer = render_page(report_on(assemble(GROUPS[:2], 2, [(0, [[[60], [50]]] * 2), (1, [[[200]]])] * 20)))
    assert "Each block is a micro-step, lines part optimizer steps." in longer


def test_shown_micro_steps_do_not_meet_one_group_again_and_again(report_on: Callable[..., PlanReport]) -> None:
    # 360 micro-steps of three alternating groups, every third shown: a regular choice would show one group alone.
    plan = assemble(GROUPS, 4, [(0, [[[60]] * 4]), (1, [[[200]] * 2]), (2, [[[900]]])] * 120)
    page = render_page(report_on(plan, naive=assemble(GROUPS[:1], 4, [(0, [[[1]] * 4])])))
    busy = page[page.index("Ranks wait") : page.index("Attention work is")]
    after = busy[busy.index("After: this plan") :]
    for colour in ("var(--group-0)", "var(--group-1)", "var(--group-2)"):
        (path,) = re.findall(rf'<path d="([^"]*)" stroke="{re.escape(colour)}"', after)
        assert 20 < path.count("M") < 60, colour


def test_a_page_follows_its_reader_s_scheme(by_hand: EpochPlan, report_on: Callable[..., PlanReport]) -> None:
    page = render_page(report_on(by_hand))
    assert "color-scheme:light dark" in page
    light, dark = re.findall(r":root\{([^}]*--page:[^}]*)\}", page)
    names = [dict(re.findall(r"--([\w-]+):(#\w{6})", block)) for block in (light, dark)]
    assert names[0].keys() == names[1].keys() >= set(re.findall(r"var\(--([\w-]+)\)", page))
    body = page.rsplit("</style>", 1)[-1]
    assert not re.findall(r"#[0-9a-f]{3,6}\b", body), "a colour that does not follow"
    for block, card in zip(names, ("#ffffff", "#191f28"), strict=True):
        for name, least in (("ink", 7), ("muted", 4.5), *((f"group-{index}", 3) for index in range(6))):
            assert contrast(block[name], card) >= least, name


def contrast(colour: str, other: str) -> float:
    """Give the contrast of two colours (WCAG 2)."""

    def luminance(text: str) -> float:
        parts = [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    brighter, darker = sorted((luminance(colour), luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def ticks(axis: Axis) -> list[str]:
    return [text for _, text in axis.ticks]


def test_ticks_are_round() -> None:
    assert ticks(linear_axis(0, 10, "")) == ["0", "2", "4", "6", "8", "10"]
    assert ticks(linear_axis(0, 1, "", ticks=4)) == ["0", "0.5", "1.0"]
    assert ticks(linear_axis(0, 3, "", whole=True)) == ["0", "1", "2", "3"]
    assert ticks(linear_axis(0, 0, "")) == ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert ticks(linear_axis(0, 1048576, "")) == ["0", "0.2M", "0.4M", "0.6M", "0.8M", "1.0M"]
    assert ticks(linear_axis(0, 30000, "", ticks=3)) == ["0", "10k", "20k", "30k"]
    assert ticks(linear_axis(0, 2.5e9, "", ticks=5)) == ["0", "0.5G", "1.0G", "1.5G", "2.0G", "2.5G"]
    assert ticks(linear_axis(0.6, 1.0, "", ticks=4, text="{:.0%}".format)) == ["60%", "70%", "80%", "90%", "100%"]


def test_shares_never_round_to_all_or_nothing() -> None:
    shares = (0.0, 0.00001, 0.0005, 0.01, 0.12345, 0.5, 0.995, 0.99999, 1.0, math.nan)
    assert [write_share(share) for share in shares] == [
        *("0%", "under 0.01%", "0.05%", "1%", "12.3%", "50%", "99.50%", "over 99.99%", "100%", "unknown")
    ]


def test_numbers_for_people() -> None:
    assert [write_tokens(num) for num in (0, 1000, 1024, 16384, 1048576)] == ["0", "1,000", "1K", "16K", "1,024K"]
    assert [write_count(num, "rank") for num in (0, 1, 2048)] == ["0 ranks", "1 rank", "2,048 ranks"]
    assert [time_unit(s)[1] for s in (0.9, 1, 119, 120, 7199, 7200, 172799, 172800)] == [
        "ms",
        "s",
        "s",
        "min",
        "min",
        "h",
        "h",
        "days",
    ]


def test_a_page_needs_no_plotting_library() -> None:
    check = "import sys, hbp_tune.reporting.pages.page; sys.exit('matplotlib' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
