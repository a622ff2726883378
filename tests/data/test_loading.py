"""Data sets through torchtune's components: formats, bad rows of every kind, and where they come from."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hbp_tune.config.sources import DataSettings, data_settings
from hbp_tune.data.store.estimate import CharacterEstimate
from hbp_tune.data.store.loading import estimate_data, open_data
from hbp_tune.data.store.sources import LoadedData
from hbp_tune.data.store.store import Builder, TokenStore
from hbp_tune.errors import ConfigError, DataError
from hbp_tune.reporting.terminal.bad_rows import report_bad_rows
from tests.data.sources import CHAT, chat, written


class Letters:
    """A tokenizer whose tokens are letters; everything but the user's words counts."""

    def __call__(self, sample: Any, inference: bool = False) -> dict[str, Any]:
        texts = [(message.text_content, message.masked) for message in sample["messages"]]
        tokens = np.concatenate([np.frombuffer(text.encode(), dtype=np.uint8) for text, _ in texts]).astype(np.int32)
        return {"tokens": tokens, "mask": np.repeat([masked for _, masked in texts], [len(text.encode()) for text, _ in texts])}


def settings(*data_files: Any, **changes: Any) -> DataSettings:
    nodes = [{"_component_": "torchtune.datasets.chat_dataset", **CHAT, "data_files": files, **changes} for files in data_files]
    return data_settings(nodes, {"_component_": "letters"})


def opened(data: DataSettings, tmp_path: Path) -> tuple[LoadedData, TokenStore]:
    return open_data(data, Letters(), tmp_path / "stores", Builder(num_processes=1, show_progress=False))


def bad_lines(loaded: LoadedData) -> dict[str, str]:
    return {str(place): reason for place, reason in loaded.bad_rows().listed}


def texts(store: TokenStore) -> list[str]:
    ids = range(len(store))
    return [bytes(store.read(np.array([i]), store.lengths[[i]])[0].astype(np.uint8)).decode() for i in ids]


ROWS = [chat("Hi.", "Yo."), chat("How?", "So.")]


def write(path: Path, rows: list[Any]) -> str:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.name.startswith("array"):
        path.write_text(json.dumps(rows))
    else:
        path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet", "array.json"])
def test_formats_of_local_files(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name, [*ROWS, chat("Only this.")])
    source = {"source": "parquet"} if name.endswith("parquet") else {}
    loaded, store = opened(settings(file, **source), tmp_path)
    assert texts(store) == ["Hi.Yo.", "How?So."]
    place = {"a.parquet": f"row 2 of {file}", "array.json": "row 2 of array"}.get(name, f"{file}:3")
    assert bad_lines(loaded) == {place: "no assistant turn"}


def test_weights_and_labels_decide_no_token(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", ROWS)
    _, plain = opened(settings(file), tmp_path)
    _, weighted = opened(settings(file, weight=3.0, label="chat"), tmp_path)
    assert weighted.fingerprint == plain.fingerprint
    assert len(list((tmp_path / "stores").iterdir())) == 1


def test_what_each_data_set_holds(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", [*ROWS, chat("Only this.")])]
    loaded, _ = opened(settings(*files, weight=0.5), tmp_path)
    assert loaded.describe() == [
        "Data set a: 2 rows, 0 of them bad, 13 tokens, 6 targets; weight 0.5",
        "Data set b: 3 rows, 1 of them bad, 13 tokens, 6 targets; weight 0.5",
    ]


BROKEN: list[tuple[bytes, str]] = [
    (b'{"messages": []}', "no messages"),
    (b'{"messages": [{"role": "system", "content": "Be."}]}', "only system messages"),
    (b'{"messages": [{"role": "system", "content": "Be."}, {"role": "user", "content": "Hi."}]}', "no assistant turn"),
    (b'{"messages": [{"role": "assistant", "content": "Yo."}, {"role": "user", "content": "Hi."}]}', "Assistant message before"),
    (b'{"messages": [{"role": "human", "content": "Hi."}, {"role": "gpt", "content": "Yo."}]}', "role 'human' is none of"),
    (b'{"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": null}]}', "null content"),
    (b'{"messages": null}', "messages are not a list but null"),
    (b'{"messages": [{"role": "user", "content": "\xff"}, {"role": "assistant", "content": "Yo."}]}', "broken UTF-8"),
    (b'{"messages": [{"role": "user", "con', "broken JSON"),
    (b'"messages"', "not a JSON object but text"),
    (b'{"messages": "Hi."}', ""),
    (b'{"messages": [{"role": "user", "content": 5}, {"role": "assistant", "content": "Yo."}]}', ""),
]


@pytest.mark.parametrize(("line", "reason"), BROKEN)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_bad_lines_are_named_and_the_others_read(tmp_path: Path, line: bytes, reason: str, suffix: str) -> None:
    good = [json.dumps(row).encode() for row in ROWS]
    content = b"\n".join([good[0], b"", line, good[1], b""])
    file = tmp_path / f"a{suffix}"
    file.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    other = write(tmp_path / "b.jsonl", ROWS[:1])
    data = settings([str(file), other])
    loaded, store = opened(data, tmp_path)
    assert texts(store) == ["Hi.Yo.", "How?So.", "Hi.Yo."]
    (found,) = bad_lines(loaded).items()
    assert found[0] == f"{file}:3"
    assert reason in found[1]
    assert [str(place) for place in loaded.places([2, 0, 1])] == [f"{other}:1", f"{file}:1", f"{file}:4"]
    loaded_again, again = opened(data, tmp_path)
    assert again.fingerprint == store.fingerprint
    assert bad_lines(loaded_again) == dict([found])


def test_bad_lines_of_both_kinds_in_one_list(tmp_path: Path) -> None:
    lines = [json.dumps(ROWS[0]).encode(), b"{", json.dumps(chat("Alone.")).encode(), b"[1]", json.dumps(ROWS[1]).encode()]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    loaded, _ = opened(settings(str(tmp_path / "a.jsonl"), label="chat"), tmp_path)
    bad_rows = loaded.bad_rows()
    assert bad_rows.num_rows == 5
    file, listed = tmp_path / "a.jsonl", tmp_path / "out/bad_rows.csv"
    line = report_bad_rows(bad_rows, listed, "drop")
    assert line is not None
    assert line.startswith("3 of 5 rows are not training samples (1 broken JSON: ")
    assert line.endswith(f"the first: {file}:2, {file}:4, {file}:3; left out, all are listed in {listed}")
    with listed.open(newline="") as stream:
        rows = list(csv.reader(stream))
    assert rows[0] == ["dataset", "file", "row", "line", "reason"]
    assert [row[:4] for row in rows[1:]] == [["chat", str(file), str(i), str(i + 1)] for i in (1, 3, 2)]
    with pytest.raises(DataError, match=r"3 of 5 rows are not training samples .*mend them, or set bad_rows=drop to leave them"):
        report_bad_rows(bad_rows, listed, "error")
    good = opened(settings(write(tmp_path / "b.jsonl", ROWS)), tmp_path)[0].bad_rows()
    assert report_bad_rows(good, listed, "error") is None
    assert not listed.exists(), "it was an earlier run's"


def test_rows_of_a_split_have_no_known_file(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [*ROWS, chat("Alone."), *ROWS, *ROWS])
    loaded, _ = opened(settings(file, split="train[1:4]"), tmp_path)
    assert bad_lines(loaded) == {"row 1 of a": "no assistant turn"}


def test_lines_that_cannot_be_loaded_count_beside_a_split_too(tmp_path: Path) -> None:
    lines = [json.dumps(ROWS[0]), "{", json.dumps(ROWS[1]), json.dumps(ROWS[0])]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    loaded, store = opened(settings(str(tmp_path / "a.jsonl"), split="train[:2]"), tmp_path)
    assert texts(store) == ["Hi.Yo.", "How?So."]
    assert list(bad_lines(loaded)) == ["row 1 of a"]


def test_bad_lines_of_our_own_data_set_are_rows_of_a_split(tmp_path: Path) -> None:
    """A line that cannot be read takes a row's place, however often the data are loaded, and whatever was kept before."""
    lines = [json.dumps(ROWS[0]), "{", json.dumps(ROWS[1]), json.dumps(ROWS[0])]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    node = {"_component_": "hbp_tune.components.ChatDataset", "data_files": str(tmp_path / "a.jsonl")}
    opened(settings(node["data_files"]), tmp_path)  # by torchtune's data set, whose loader needs a copy without them
    for split, lengths in (("train[:2]", [13]), ("train[1:]", [13, 13])):
        loaded, store = open_data(
            data_settings([node | {"split": split}], {"_component_": "estimate"}),
            CharacterEstimate(),
            tmp_path / "stores",
            Builder(num_processes=1, show_progress=False),
        )
        assert store.lengths.tolist() == lengths
        assert [reason.split(":")[0] for reason in bad_lines(loaded).values()] == ["broken JSON"]


def test_a_file_without_one_good_line_is_the_loader_s_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("no\njson\n")
    with pytest.raises(ConfigError, match=r"config key 'dataset' .*cannot be built: DatasetGenerationError"):
        opened(settings(str(tmp_path / "a.jsonl")), tmp_path)


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(DataError, match=r"row 0 of dataset is not a training sample: KeyError: 'turns'"):
        opened(settings(file, conversation_column="turns"), tmp_path)


def test_an_estimate_needs_no_store(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", *ROWS)
    loaded, counts = estimate_data(settings(file), tmp_path / "stores")
    assert loaded.counts is counts
    assert len(counts.lengths) == 2
    assert not (tmp_path / "stores").exists()


@pytest.mark.slow
def test_a_line_of_50_mb(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [ROWS[0], chat("Hi.", "word " * 10_000_000), ROWS[1]])
    loaded, store = opened(settings(file), tmp_path)
    assert store.lengths.tolist() == [6, 50_000_003, 7]
    assert store.num_targets_within(8192).tolist() == [3, 8189, 3]
    assert bad_lines(loaded) == {}


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    good = settings(write(tmp_path / "good.jsonl", ROWS))
    builder = Builder(num_processes=1, show_progress=False)
    message = rf"^token store folder {file}/stores cannot be written: Not a directory; set token_store_dir"
    with pytest.raises(DataError, match=message):
        open_data(good, Letters(), file / "stores", builder)
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(ROWS[0]) + "\n{\n")
    with pytest.raises(DataError, match=message):
        open_data(settings(str(broken)), Letters(), file / "stores", builder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", file / "cache")
    message = (
        rf"^dataset: Hugging Face's cache cannot be written: {file}/cache.*: Not a directory; set .*HF_HOME or HF_DATASETS_CACHE"
    )
    with pytest.raises(DataError, match=message):
        opened(settings(write(tmp_path / "other.jsonl", ROWS)), tmp_path)
