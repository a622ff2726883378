"""Every benchmark once, small, on this machine's CPU: one page with tables and pictures, and what each printed.

    make bench                                     # some twenty minutes on two cores; bench_report/index.html
    python benchmarks/bench_all.py --dir DIR --only attention,step

A benchmark that fails is on the page with its last words, and the exit status is 1. The machine should do nothing else: what is
timed is timed once. Not here: ``bench_quality.py`` and ``bench_normalizers.py``, which need data and hours, ``paper_tables.py``
and ``bench_modes.py``, which take as long as all of these, and ``bench_multigpu.py``.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import markdown
import torch

from hbp_tune.reporting.pages.charts import Axis, Chart, group_colour, legend, linear_axis
from hbp_tune.reporting.pages.figures import Picture
from hbp_tune.reporting.pages.page_parts import document, duration, figure, table

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """One script with small settings.

    Args:
        title: what it shows.
        script: in this folder, and its arguments; ``{dir}`` is a folder of its own, ``{demo}`` the demo's.
        bar: figure that is drawn, from lines that have it; nothing for pages in markdown.
        name: keys that name such a line, joined.
    """

    title: str
    script: str
    bar: str | None = None
    name: tuple[str, ...] = ("case",)


BENCHMARKS = {
    "planning": Benchmark(
        title="Seconds to plan 100,000 samples like Tulu 3 + LongCite",
        script="bench_planning.py --num-samples 100000",
        bar="plan_s",
        name=("algorithm",),
    ),
    "data": Benchmark(
        title="Seconds from start to the first step, 5,000 chats on two ranks",
        script="bench_data.py --rows 5000 --dir {dir}",
        bar="first_step_s",
        name=("case", "rank"),
    ),
    "attention": Benchmark(
        title="Milliseconds of attention, forward and backward",
        script="bench_attention.py --pack-lens 1024 --repeats 3",
        bar="both_ms",
        name=("pack", "kernel"),
    ),
    "loss_head": Benchmark(
        title="Peak memory of loss heads in MiB, 4,096 tokens, vocabulary 32,768",
        script="bench_loss_head.py",
        bar="peak_mib",
    ),
    "step": Benchmark(
        title="Seconds of a training step beside torchtune's packed path",
        script="bench_step.py --rounds 3 --steps 2",
        bar="step_s",
    ),
    "replay": Benchmark(
        title="Share of an epoch that eight ranks would wait, from timed packs",
        script="bench_replay.py",
        bar="idle",
        name=("plan",),
    ),
    "end_to_end": Benchmark(
        title="Seconds of an epoch's forwards and backwards, two pinned ranks, samples up to 4,000 tokens",
        script="bench_end_to_end.py --demo {demo} --work {dir} --rounds 1 --layers 2 --short 512 --long 4096",
        bar="wall_epoch_s",
        name=("case", "round"),
    ),
    "profile": Benchmark(
        title="Seconds of an epoch with groups that a profile chose, and with others",
        script="bench_profile.py --demo {demo} --work {dir} --repeats 1 --short 1024 --long 4096 profile.repeats=1",
        bar="epoch_s",
    ),
    "memory": Benchmark(title="GPU memory of Llama 3.1 8B, by the memory model", script="bench_memory.py"),
    "groups": Benchmark(title="The HBP paper's timings and groups beside the cost model's", script="paper_groups.py"),
    "sweep": Benchmark(title="Speed-up over one-length packing, by the cost model", script="bench_sweep.py --small"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a benchmark printed, and how it ended."""

    output: str
    errors: str
    status: int
    seconds: float


def run(name: str, benchmark: Benchmark, directory: Path) -> Outcome:
    """Run a benchmark; what it prints is kept beside the page."""
    work = directory / "work" / name
    work.mkdir(parents=True, exist_ok=True)
    script, *arguments = benchmark.script.format(dir=work, demo=directory / "demo").split()
    on_cpu = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    started_s = time.monotonic()
    result = subprocess.run(command, env=on_cpu, cwd=ROOT, capture_output=True, text=True, check=False)
    (directory / f"{name}.txt").write_text(result.stdout)
    return Outcome(output=result.stdout, errors=result.stderr, status=result.returncode, seconds=time.monotonic() - started_s)


def section(benchmark: Benchmark, outcome: Outcome) -> str:
    """Put a benchmark on the page."""
    command = f'<p class="caption"><code>python benchmarks/{escape(benchmark.script)}</code>, {duration(outcome.seconds)}</p>'
    if outcome.status:
        last = "\n".join(outcome.errors.strip().splitlines()[-5:])
        body = f"<p><b>It failed</b> with exit status {outcome.status}.</p><pre>{escape(last)}</pre>"
        return f"<section><h2>{escape(benchmark.title)}</h2>{command}{body}</section>\n"
    if benchmark.bar is None:
        page = markdown.markdown(outcome.output, extensions=["tables"])
        page = page.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")
        return f"<section><details><summary>{escape(benchmark.title)}</summary>{command}{page}</details></section>\n"
    lines = [json.loads(line) for line in outcome.output.splitlines() if line.startswith("{")]
    return picture(benchmark, lines) + f"<section>{command}{''.join(tables(lines))}</section>\n"


def picture(benchmark: Benchmark, lines: Sequence[dict[str, Any]]) -> str:
    """Draw a bar a line; names stand in the legend."""
    assert benchmark.bar is not None
    shown = [line for line in lines if isinstance(line.get(benchmark.bar), int | float)]
    values = [line[benchmark.bar] for line in shown]
    names = [", ".join(str(line[key]) for key in benchmark.name if key in line) for line in shown]
    x = Axis(low=0.0, high=float(len(shown)), ticks=[(i + 0.5, str(i + 1)) for i in range(len(shown))], label="")
    chart = Chart(x, linear_axis(0.0, max(values, default=1.0), benchmark.bar), label=benchmark.title, height_px=180)
    for index, value in enumerate(values):
        colour = group_colour(index)
        chart.bars(index + 0.15, index + 0.85, 0.0, value, colour, tips=[f"{names[index]}: {value:g}"])
    entries = [(group_colour(index), f"{index + 1} {name}") for index, name in enumerate(names)]
    caption = "Measured once, on whatever else this machine did meanwhile."
    return figure(Picture(title=benchmark.title, body=legend(entries) + chart.html(), caption=caption))


def tables(lines: Iterable[dict[str, Any]]) -> list[str]:
    """Make a table of lines with the same figures, in the order in which they came first."""
    by_keys: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for line in lines:
        by_keys.setdefault(tuple(line), []).append(line)
    return [
        table(
            (f"<th{_kind(same[0][key])}>{escape(key)}</th>" for key in keys),
            (
                "<tr>" + "".join(f"<td{_kind(line[key])}>{escape(_write(line[key]))}</td>" for key in keys) + "</tr>"
                for line in same
            ),
        )
        for keys, same in by_keys.items()
    ]


def _kind(value: Any) -> str:
    return ' class="text"' if isinstance(value, str) else ""


def _write(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key} {_write(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_write, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def render(sections: Sequence[str]) -> str:
    """Put the page together."""
    where = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    when = time.strftime("%Y-%m-%d")
    head = f'<p class="eyebrow">hbp-tune, {escape(where)}, {when}</p><h1>Benchmarks, small, on a CPU</h1>'
    note = (
        "<p>These sizes show that everything runs, and what it costs here; <code>benchmarks/results/</code> has the findings.</p>"
    )
    return document("hbp-tune: benchmarks", [head, note, *sections])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("bench_report"), help="where the page goes (default: %(default)s)")
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(BENCHMARKS)}")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(BENCHMARKS)
    if unknown := [name for name in names if name not in BENCHMARKS]:
        parser.error(f"--only {unknown[0]}: there is {', '.join(BENCHMARKS)}")
    directory = arguments.dir.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    if any("{demo}" in BENCHMARKS[name].script for name in names):
        demo = [sys.executable, "-m", "hbp_tune.demo", "--dir", str(directory / "demo"), "--max-tokens", "4000"]
        subprocess.run(demo, check=True, stdout=subprocess.DEVNULL)
    sections, failed = [], []
    for name in names:
        print(f"{name} ...", end=" ", flush=True)
        outcome = run(name, BENCHMARKS[name], directory)
        print("failed" if outcome.status else "done", f"after {outcome.seconds:.0f} s", flush=True)
        failed += [name] if outcome.status else []
        sections.append(section(BENCHMARKS[name], outcome))
        (directory / "index.html").write_text(render(sections))  # what is there so far
    print(f"The page is {directory / 'index.html'}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
