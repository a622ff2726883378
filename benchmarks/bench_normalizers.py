"""What the loss normaliser and the curriculum change: loss and gradient norm in training, held-out loss and retrieval after it.

    python benchmarks/bench_normalizers.py --data DIR --work DIR --plots DIR

Four normalisers, each without a curriculum and with two, of HBP in cost mode. Data, base model, folders and the other arguments
are those of ``bench_quality.py``, with which it may share ``--work``; ``--plots`` gets the curves as SVG files.
"""

from pathlib import Path

from bench_quality import make_parser, prepare
from quality.report import by_setting, curriculum_curves, gradients_table, normalizer_curves, normalizers_table
from quality.runs import CURRICULA, NORMALIZERS, Run, train_missing


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--plots", type=Path, required=True, help="folder for the curves")
    arguments = parser.parse_args()
    corpus = prepare(arguments)
    runs = [
        Run(method="hbp_cost", normalizer=normalizer, curriculum=curriculum, seed=seed)
        for seed in range(arguments.seeds)
        for curriculum in CURRICULA
        for normalizer in NORMALIZERS
    ]
    finished = by_setting(train_missing(runs, corpus, arguments.work))
    print(normalizers_table(finished))
    print(gradients_table(finished))
    arguments.plots.mkdir(parents=True, exist_ok=True)
    for curriculum in CURRICULA:
        (arguments.plots / f"normalizers_{curriculum}.svg").write_text(normalizer_curves(finished, curriculum))
    (arguments.plots / "curricula.svg").write_text(curriculum_curves(finished))


if __name__ == "__main__":
    main()
