from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from hbp_tune.config.sources import data_settings, dataset_settings
from hbp_tune.errors import ConfigError


def data(*names: Any, source: str = "json") -> dict[str, Any]:
    return {"_component_": "d", "source": source, "data_files": names[0] if len(names) == 1 else list(names)}


def test_local_files_are_data_files_then_the_tokenizer_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "a.jsonl", "vocab.json", "deep/er/c.jsonl"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("{}")
    tokenizer = {
        "_component_": "t",
        "path": "vocab.json",
        "max_seq_len": None,
        "prompt_template": {"system": ["long " * 100, ""]},
    }

    def found(*datasets: dict[str, Any]) -> list[str]:
        settings = data_settings(list(datasets), tokenizer)
        return [str(path) for path in (*(file for one in settings.datasets for file in one.files), *settings.tokenizer_files)]

    assert found(data("*.jsonl")) == ["a.jsonl", "b.jsonl", "vocab.json"]
    assert found(data("**/*.jsonl")) == ["a.jsonl", "b.jsonl", "deep/er/c.jsonl", "vocab.json"]
    assert found(data("b.jsonl", "a.jsonl"), data({"train": "deep/er/c.jsonl"})) == [
        "b.jsonl",
        "a.jsonl",
        "deep/er/c.jsonl",
        "vocab.json",
    ]
    assert found(data("https://example.org/a.jsonl", "hf://datasets/x/y.jsonl")) == ["vocab.json"]
    assert found({"_component_": "d", "source": "hub/name"}, data("train.jsonl", source="hub/name")) == ["vocab.json"]


def test_a_missing_data_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match=rf"dataset\[1\]: data file no/such.jsonl does not exist \(looked from {tmp_path}\)$"):
        dataset_settings([data("here.jsonl"), data("here.jsonl", "no/such.jsonl")])
    with pytest.raises(ConfigError, match=r"data file x/\*.jsonl does not exist"):
        dataset_settings(data("x/*.jsonl"))
    with pytest.raises(
        ConfigError, match=r"hbp_demo/chat.jsonl does not exist .*; `python -m hbp_tune.demo` makes the demo's data"
    ):
        dataset_settings(data("hbp_demo/chat.jsonl"))


def test_weights_and_labels_are_taken_out() -> None:
    nodes = [{"_component_": "d", "source": "hub/name", "weight": 2, "label": "chat"}, {"_component_": "d", "source": "hub/name"}]
    first, second = dataset_settings(OmegaConf.create(nodes))
    assert first.node == second.node == {"_component_": "d", "source": "hub/name"}
    assert (first.label, first.weight, first.key) == ("chat", 2.0, "dataset[0]")
    assert (second.label, second.weight, second.key) == ("hub/name", 1.0, "dataset[1]")


def test_labels_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("chat.jsonl.gz", "more/chat.jsonl"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("{}")
    nodes = [
        data("chat.jsonl.gz"),
        data("more/chat.jsonl"),
        {"_component_": "some.module.rows"},
        {"_component_": "d", "source": "x/y", "label": "rows_2"},
        {"_component_": "some.module.rows"},
    ]
    assert tuple(one.label for one in data_settings(nodes, {}).datasets) == ("chat", "chat_2", "rows", "rows_2", "rows_3")


def test_one_data_set_needs_no_list() -> None:
    settings = data_settings({"_component_": "d", "source": "x/y", "weight": 0.5}, {"_component_": "t"})
    assert tuple(one.weight for one in settings.datasets) == (0.5,)
    assert (settings.tokenizer, settings.tokenizer_files) == ({"_component_": "t"}, ())


@pytest.mark.parametrize("weight", [0, -1.0, float("inf"), float("nan"), True, "2"])
def test_weights_that_cannot_be(weight: Any) -> None:
    with pytest.raises(ConfigError, match=rf"dataset\[1\]: weight={weight} must be a number above 0; remove the data set"):
        dataset_settings([{"_component_": "d"}, {"_component_": "d", "weight": weight}])


@pytest.mark.parametrize("label", ["", 5])
def test_labels_that_cannot_be(label: Any) -> None:
    with pytest.raises(ConfigError, match=rf"dataset: label={label!r} must be a text that no other data set has"):
        dataset_settings([{"_component_": "d", "label": label}])


def test_the_same_label_twice() -> None:
    with pytest.raises(ConfigError, match=r"dataset: label='chat' must be a text that no other data set has"):
        dataset_settings([{"_component_": "d", "label": "chat"}, {"_component_": "e", "label": "chat"}])


def test_a_list_of_one_is_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^dataset_val: data file {tmp_path}/no.jsonl does not exist"):
        dataset_settings([data(f"{tmp_path}/no.jsonl")], "dataset_val")


CHATS = "hbp_tune.components.ChatDataset"


def test_folders_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("data/b.jsonl", "data/a/c.JSON.gz", "data/notes.md", "data/d.parquet", "empty/README"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("{}")
    (one,) = dataset_settings({"_component_": CHATS, "data_files": "data"})
    assert [str(file) for file in one.files] == ["data/a/c.JSON.gz", "data/b.jsonl", "data/d.parquet"]
    with pytest.raises(ConfigError, match=r"^dataset: data_files=empty is a folder without a data file \(\.jsonl, "):
        dataset_settings({"_component_": CHATS, "data_files": "empty"})
    with pytest.raises(ConfigError, match=r"^dataset: data_files=data is a folder; name its files, such as data/\*\.jsonl"):
        dataset_settings(data("data"))
    assert dataset_settings(data("data", source="hub/name"))[0].key == "dataset", "a folder of that name on the hub"
    with pytest.raises(ConfigError, match=r"^dataset: data file dta does not exist"):
        dataset_settings({"_component_": CHATS, "data_files": "dta"})


def test_a_folder_of_a_tokenizer(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "model.safetensors", "chat_template.jinja", "additional_chat_templates/rag.jinja"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    settings = data_settings({"_component_": "d"}, {"_component_": "hbp_tune.components.HFTokenizer", "path": str(tmp_path)})
    assert [str(file.relative_to(tmp_path)) for file in settings.tokenizer_files] == [
        "additional_chat_templates/rag.jinja",
        "chat_template.jinja",
        "tokenizer.json",
    ]
    message = (
        rf"^tokenizer.path={tmp_path} is a folder; t.llama names a file there \(rag.jinja, chat_template.jinja, tokenizer.json\)"
    )
    with pytest.raises(ConfigError, match=message):
        data_settings({"_component_": "d"}, {"_component_": "t.llama", "path": str(tmp_path)})
