import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from torchtune import config

from hbp_tune.config.packaged import find_config, merge_list_overrides, packaged_configs, run_recipe
from hbp_tune.errors import ConfigError, PackingError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    return tmp_path


def command_line(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe", *arguments])


def test_packaged_names_are_files_without_suffix() -> None:
    configs = packaged_configs()
    assert {"demo/tiny_llama_cpu", "llama3_1/8B_hbp_full", "qwen2_5/7B_hbp_full"} <= configs.keys()
    for name, path in configs.items():
        assert path.is_file()
        assert path.as_posix().endswith(f"configs/{name}.yaml")


@pytest.mark.usefixtures("folder")
def test_a_packaged_name_is_found_from_any_folder() -> None:
    assert find_config("demo/tiny_llama_cpu") == packaged_configs()["demo/tiny_llama_cpu"]


def test_an_existing_file_wins(folder: Path) -> None:
    own = folder / "demo" / "tiny_llama_cpu"
    own.parent.mkdir()
    own.write_text("epochs: 1\n")
    assert find_config("demo/tiny_llama_cpu") == Path("demo/tiny_llama_cpu")
    assert find_config(str(own)) == own


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", ["llama3_1/8B_full", "demo", "", "demo/tiny_llama_cpu.yaml"])
def test_an_unknown_name_lists_all_packaged_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^--config {name}: no such file, and no packaged config; packaged are ") as caught:
        find_config(name)
    assert str(caught.value).endswith(", ".join(packaged_configs()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1\n", "is not valid YAML: .*line 2"),
        (b"a: 1\na: 2\n", "is not valid YAML: .*duplicate key a"),
        (b"a: \xff\xfe\n", "is not valid YAML: "),
        (b"5\n", "is not valid YAML: "),
        (b"- a\n- b\n", "must hold a mapping of keys to values"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / "own.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=f"^--config own.yaml {message}") as caught:
        find_config("own.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("folder")
def test_a_packaged_name_reaches_the_recipe_with_its_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[DictConfig] = []
    command_line(monkeypatch, "--config", "demo/tiny_llama_cpu", "epochs=3", "demo_dir=elsewhere")
    with pytest.raises(SystemExit) as caught:
        run_recipe(config.parse(seen.append))
    assert caught.value.code is None
    assert sys.argv[2] == str(packaged_configs()["demo/tiny_llama_cpu"])
    assert (seen[0].epochs, seen[0].checkpointer.checkpoint_dir) == (3, "elsewhere/model")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: --config"),
        (("epochs=3", "--config"), "argument --config: expected one argument"),
    ],
)
def test_without_a_name_the_parser_explains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    command_line(monkeypatch, *arguments)
    with pytest.raises(SystemExit) as caught:
        run_recipe(config.parse(print))
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("rank", [None, "0", "7"])
def test_an_error_is_one_line_from_the_rank_that_has_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str | None
) -> None:
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    command_line(monkeypatch, "--config", "demo/tiny_llama_cpu")

    def main() -> None:
        raise PackingError("sample 1 has 9 tokens, group 'short' holds 8")

    with pytest.raises(SystemExit) as caught:
        run_recipe(main)
    assert caught.value.code == 1
    captured = capsys.readouterr()
    assert captured.err.strip() == "error: sample 1 has 9 tokens, group 'short' holds 8"
    assert captured.out == ""


@pytest.mark.usefixtures("folder")
def test_an_unknown_config_ends_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command_line(monkeypatch, "epochs=3", "--config", "demo/tiny")
    with pytest.raises(SystemExit) as caught:
        run_recipe(lambda: pytest.fail("the recipe must not start"))
    assert caught.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: --config demo/tiny: no such file, and no packaged config; packaged are demo/tiny_llama_cpu")


def test_an_interpolation_that_leads_nowhere_ends_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "own.yaml").write_text("output_dir: ${model_dri}/out\n")
    command_line(monkeypatch, "--config", "own.yaml")
    with pytest.raises(SystemExit) as caught:
        run_recipe(config.parse(lambda cfg: cfg.output_dir))
    assert caught.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert "model_dri" in line
    assert "output_dir" in line


@pytest.mark.usefixtures("folder")
def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    command_line(monkeypatch, "--config", "demo/tiny_llama_cpu")
    with pytest.raises(ZeroDivisionError):
        run_recipe(lambda: 1 / 0)


@pytest.mark.usefixtures("folder")
def test_single_items_of_lists_are_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[DictConfig] = []
    items = ("groups.0.pack_len=512", "groups.1.ac_layers=3", "groups.1.name=a b?c")
    command_line(monkeypatch, "--config", "demo/tiny_llama_cpu", items[0], "epochs=2", *items[1:])
    with pytest.raises(SystemExit):
        run_recipe(config.parse(seen.append))
    groups = seen[0].groups
    assert (groups[0].pack_len, groups[0].name, groups[1].ac_layers, groups[1].name) == (512, "short", 3, "a b?c")
    assert (groups[1].pack_len, seen[0].epochs) == (8192, 2)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("item", ["groups.2.pack_len=8", "group.0.pack_len=8", "planner.0.overlong=drop"])
def test_an_item_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], item: str
) -> None:
    command_line(monkeypatch, "--config", "demo/tiny_llama_cpu", item)
    with pytest.raises(SystemExit) as caught:
        run_recipe(config.parse(lambda cfg: None))
    assert caught.value.code == 1
    assert f"error: {item}: " in capsys.readouterr().err


def test_equal_signs_and_none_survive_the_rewriting(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("dataset:\n- {url: 'https://x/y?a=b', n: 1}\n- {url: z, n: 1}\n")
    merged = merge_list_overrides(["recipe", "dataset.0.n=2e-5", "dataset.1.n=None"], path)
    assert len(merged) == 2
    assert merged[1].count("=") == 1
    assert OmegaConf.from_dotlist(merged[1:]).dataset == [{"url": "https://x/y?a=b", "n": 2e-5}, {"url": "z", "n": None}]


MEANT = [
    ("x=a b", "a b"),
    ("x=a=b", "a=b"),
    ("x=data/day=1/*.jsonl", "data/day=1/*.jsonl"),
    ("x=it's", "it's"),
    ("x='a=b'", "a=b"),
    ('x="a: b"', "a: b"),
    ("x=[1, a=b]", [1, "a=b"]),
    ("x={a: 'é=😀'}", {"a": "é=😀"}),
    ("x=日本 語😀", "日本 語😀"),
    ("x=https://a:8/b#c?d=e", "https://a:8/b#c?d=e"),
    ("x=2e-5", 2e-5),
    ("x=!!str 5", "5"),
    ("x=None", None),
    ("x=", None),
]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("argument", "value"), MEANT)
def test_values_are_what_they_look_like(monkeypatch: pytest.MonkeyPatch, argument: str, value: Any) -> None:
    seen: list[DictConfig] = []
    command_line(monkeypatch, argument, "--config", "demo/tiny_llama_cpu", argument.replace("x=", "groups.0.name=", 1))
    with pytest.raises(SystemExit) as caught:
        run_recipe(config.parse(seen.append))
    assert caught.value.code is None
    assert seen[0].x == seen[0].groups[0].name == value


MISTAKEN = [
    ("x=#abc", "YAML reads the value as a comment, which is nothing; if it is text, quote it: 'x=\"#abc\"'"),
    ("x=a #b", "YAML reads the value as 'a'; if it is text"),
    ("x='abc", "YAML reads the value as an error (found unexpected end of stream); if it is text"),
    ("x=a: b", "YAML reads the value as a mapping; if it is text, quote it: 'x=\"a: b\"'"),
    ("groups.0.name=- a", "YAML reads the value as a list"),
    ("x=&a b", "YAML reads the value as 'b'"),
    ("x=a\nb", "YAML reads the value as 'a b'"),
    ("epochs", "'epochs' on the command line is not an override; write key=value"),
    ("=", "'=' on the command line is not an override"),
    ("--epochs=3", "'--epochs=3' on the command line is not an override"),
    ("~epoch", "Could not find key epoch"),
    ("x=${", "no viable alternative"),
]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("argument", "message"), MISTAKEN)
def test_what_yaml_would_misread_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argument: str, message: str
) -> None:
    command_line(monkeypatch, "--config", "demo/tiny_llama_cpu", argument)
    with pytest.raises(SystemExit) as caught:
        run_recipe(lambda: pytest.fail("the recipe must not start"))
    assert caught.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.usefixtures("folder")
def test_ctrl_c_needs_no_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command_line(monkeypatch, "--config", "demo/tiny_llama_cpu")

    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        run_recipe(main)
    assert caught.value.code == 130
    assert capsys.readouterr().err == ""
