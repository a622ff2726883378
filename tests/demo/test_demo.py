import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from hbp_tune.demo import DemoError, DemoFiles, __main__, prepare_demo
from hbp_tune.demo.samples import BODY_WEIGHTS, TAIL_MIN_TOKENS, choose_held_out, choose_samples, hash_order
from hbp_tune.demo.stdlib import read_modules

NUM_SAMPLES = 200
MAX_TOKENS = 4000
TAIL_KINDS = {"module_question", "module_summary", "conversation", "bundle"}

# torchao, torchdata and transformers announce their own deprecations.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def own_environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def digests(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module", autouse=True)
def _no_tiktoken_cache():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")  # it would serve the file of an earlier run at the same temporary path
        yield


@pytest.fixture(scope="module")
def torchtune_names():
    """Imported here, so that collecting the tests stays fast and the import's warnings stay out of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from torchtune.data import Message
        from torchtune.datasets import chat_dataset
        from torchtune.models.llama3 import llama3_tokenizer
        from torchtune.training import FullModelHFCheckpointer

        from hbp_tune.demo import model, tokenizer
    return SimpleNamespace(
        torch=torch,
        Message=Message,
        chat_dataset=chat_dataset,
        llama3_tokenizer=llama3_tokenizer,
        FullModelHFCheckpointer=FullModelHFCheckpointer,
        model=model,
        tokenizer=tokenizer,
    )


@pytest.fixture(scope="module", autouse=True)
def stdlib(tmp_path_factory):
    """A part of the standard library: parsing all of it takes seconds."""
    whole, part = Path(sysconfig.get_path("stdlib")), tmp_path_factory.mktemp("stdlib")
    for path in [*whole.glob("[a-i]*.py"), *whole.glob("json/*.py"), *whole.glob("asyncio/*.py")]:
        copy = part / path.relative_to(whole)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hbp_tune.demo.stdlib.sysconfig", SimpleNamespace(get_path=lambda name: str(part)))
        yield part


@pytest.fixture(scope="module")
def demo(tmp_path_factory, torchtune_names) -> DemoFiles:
    return prepare_demo(tmp_path_factory.mktemp("demo"), num_samples=NUM_SAMPLES, max_tokens=MAX_TOKENS)


@pytest.fixture(scope="module")
def tokenizer(demo, torchtune_names):
    return torchtune_names.llama3_tokenizer(str(demo.tokenizer_file), str(demo.special_tokens_file))


@pytest.fixture(scope="module")
def hf_tokenizer(demo):
    from hbp_tune.data.tokenizing.hf_tokenizer import HFTokenizer

    return HFTokenizer(str(demo.checkpoint_dir))


@pytest.fixture(scope="module")
def rows(demo) -> list[dict]:
    return [json.loads(line) for line in demo.data_file.read_text(encoding="utf-8").split("\n") if line]


# ---- samples ----


def test_rows_are_conversations(rows):
    assert len(rows) == NUM_SAMPLES
    assert {row["source"] for row in rows} <= {*BODY_WEIGHTS, *TAIL_KINDS}
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert roles
        assert all(message["content"].strip() for message in row["messages"])
    assert max(len(row["messages"]) for row in rows) >= 4


def answers(rows: list[dict]) -> set[str]:
    return {message["content"] for row in rows for message in row["messages"] if message["role"] == "assistant"}


def test_held_out_rows_are_alike_and_share_no_answer(demo, rows):
    held_out = [json.loads(line) for line in demo.held_out_file.read_text().splitlines()]
    assert 15 <= len(held_out) <= max(20, NUM_SAMPLES // 10)
    assert {row["source"] for row in held_out} & BODY_WEIGHTS.keys()
    assert {row["source"] for row in held_out} & TAIL_KINDS
    assert answers(held_out).isdisjoint(answers(rows))


def test_the_record_has_the_lengths_of_the_chat_template(demo, rows, tokenizer, hf_tokenizer, torchtune_names):
    counted: dict[str, list[int]] = {}
    for row in rows:
        messages = [torchtune_names.Message(role=m["role"], content=m["content"]) for m in row["messages"]]
        tokens = hf_tokenizer.tokenize_messages(messages)[0]
        counted.setdefault(row["source"], []).append(len(tokens))
        # torchtune's own tokenizer gives the same, and Llama 3's end of text behind it.
        assert tokenizer.tokenize_messages(messages)[0] == [*tokens, tokenizer.special_tokens["<|end_of_text|>"]]
    assert {kind: sorted(lengths) for kind, lengths in counted.items()} == demo.sample_tokens


def test_lengths_are_mostly_short_with_a_heavy_tail(demo):
    lengths = sorted(length for kind in demo.sample_tokens.values() for length in kind)
    long = [length for length in lengths if length > TAIL_MIN_TOKENS]
    assert lengths[0] < 60
    assert 0.9 * MAX_TOKENS < lengths[-1] <= MAX_TOKENS
    assert 60 < lengths[len(lengths) // 2] < 250
    assert 0.03 <= len(long) / len(lengths) <= 0.05
    assert 0.2 < sum(long) / demo.num_tokens < 0.5  # less than the default's half: this tail ends at 4000


def test_the_same_arguments_give_the_same_bytes(demo, tmp_path, monkeypatch):
    """Even where the file system lists its files in another order."""
    rglob = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: sorted(rglob(self, pattern), reverse=True))
    prepare_demo(tmp_path, num_samples=NUM_SAMPLES, max_tokens=MAX_TOKENS)
    monkeypatch.undo()
    assert digests(tmp_path) == digests(demo.directory)


def test_another_hash_seed_gives_the_same_samples(stdlib):
    code = """
import pathlib, sys
from hbp_tune.demo.samples import choose_samples
from hbp_tune.demo.stdlib import read_modules
def count(messages): return sum(len(message["content"]) for message in messages) // 3
print(choose_samples(read_modules(pathlib.Path(sys.argv[1])), count, num_samples=200, max_tokens=4000, seed=0))
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code, stdlib],
            check=True,
            capture_output=True,
            env=own_environment() | {"PYTHONHASHSEED": hash_seed},
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_a_finished_demo_is_left_alone(demo):
    before = {path: path.stat().st_mtime_ns for path in demo.directory.rglob("*")}
    again = prepare_demo(demo.directory, num_samples=NUM_SAMPLES, max_tokens=MAX_TOKENS)
    assert not again.created
    assert again.sample_tokens == demo.sample_tokens
    assert {path: path.stat().st_mtime_ns for path in demo.directory.rglob("*")} == before


@pytest.fixture
def small_parts(monkeypatch):
    """Replace the slow parts, to test what is made when."""
    made = []

    def write_data(directory: Path, **arguments: int) -> list:
        made.append(arguments)
        for name in (
            "chat.jsonl",
            "val.jsonl",
            "tokenizer/tokenizer.model",
            "tokenizer/special_tokens.json",
            "model/tokenizer.json",
        ):
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text("")
        return []

    monkeypatch.setattr("hbp_tune.demo._write_data", write_data)
    return made


def test_other_arguments_or_a_killed_run_or_a_lost_file_redo_the_demo(small_parts, tmp_path, torchtune_names):
    def record() -> dict:
        return json.loads((tmp_path / "demo.json").read_text())

    prepare_demo(tmp_path)
    prepare_demo(tmp_path)
    assert len(small_parts) == 1
    prepare_demo(tmp_path, seed=1)
    assert [arguments["seed"] for arguments in small_parts] == [0, 1]
    assert record()["finished"]
    (tmp_path / "demo.json").write_text(json.dumps(record() | {"finished": False}))
    assert prepare_demo(tmp_path, seed=1).created
    (tmp_path / "chat.jsonl").unlink()
    assert prepare_demo(tmp_path, seed=1).created


def test_a_failing_run_leaves_an_unfinished_record(monkeypatch, tmp_path):
    def fail(*args: object, **kwargs: object) -> list:
        raise KeyboardInterrupt

    monkeypatch.setattr("hbp_tune.demo._write_data", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare_demo(tmp_path)
    assert not json.loads((tmp_path / "demo.json").read_text())["finished"]


@pytest.mark.parametrize("name", ["chat.jsonl", "val.jsonl", "demo.json"])
def test_files_of_another_origin_are_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(DemoError, match=rf"has a '{name}' that the demo did not write; choose another directory"):
        prepare_demo(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


MODULE = '''"""Tools.

More.
"""
import re

@re.cache
def first(x,
          y=1):
    """Add.

    Both.
    """
    return x + y

def only():
    """Nothing else."""

def plain(): return 1

class Box:
    """Holds."""
    async def get(self):
        """Take out."""
        await self
    def surrogate(self):
        "\\ud800"
'''


def test_modules_are_read_by_hand_made_rules(tmp_path):
    for name in ("pkg/__init__.py", "test/kept_out.py", "site-packages/x.py", "_sysconfigdata_x.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(MODULE)
    (tmp_path / "broken.py").write_text(MODULE + "def:")
    (tmp_path / "short.py").write_text('"""Too short to ask about."""')
    (module,) = read_modules(tmp_path)
    assert (module.name, module.docstring) == ("pkg", "Tools.\n\nMore.")
    assert module.bare_code.startswith("import re")
    first, only = module.functions
    assert (first.name, first.signature, first.docstring) == ("pkg.first", "def first(x,\n          y=1):", "Add.\n\nBoth.")
    assert first.code == "@re.cache\ndef first(x,\n          y=1):\n    return x + y"
    assert only.code == "def only():\n    ..."
    (box,) = module.classes
    assert [(method.name, method.code) for method in box.methods] == [
        ("pkg.Box.get", "async def get(self):\n    await self"),
    ]
    with pytest.raises(DemoError, match="holds 0 modules that parse"):
        read_modules(tmp_path / "nowhere")


def test_too_many_samples_says_how_many_there_are(tmp_path):
    (tmp_path / "pkg.py").write_text(MODULE)
    modules = read_modules(tmp_path)

    def count_letters(messages):
        return sum(len(message["content"]) for message in messages)

    arguments = {"count_tokens": count_letters, "max_tokens": 1000, "seed": 0}
    with pytest.raises(DemoError, match=r"num_samples=1000 is more than the \d+ samples") as error:
        choose_samples(modules, num_samples=1000, **arguments)
    available = int(str(error.value).split("more than the ")[1].split()[0])
    every = choose_samples(modules, num_samples=available, **arguments)
    assert len(every) == available
    with pytest.raises(DemoError, match=rf"num_samples={available} leaves no sample to hold out; ask for fewer"):
        choose_held_out(every, modules, num_samples=available, **arguments)


def test_hash_order_is_the_same_everywhere():
    assert hash_order(0, "module", "json") == int.from_bytes(hashlib.blake2b(b"0\0module\0json", digest_size=8).digest(), "big")


# ---- tokenizer ----

ODD_TEXTS = [
    "",
    " ",
    "\t\tif x:\r\n\t\t\treturn\r\n",
    "naïve façade — “quotes” … ½",
    "👩‍👩‍👧‍👦🇺🇳 🏳️‍🌈",
    "漢字かな한글 العربية עברית",
    "\x00\x01\x7f\x85\u2028\ufeff\u200b",
    "<|eot_id|><|begin_of_text|> is text here",
    "a" * 3000,
    "\n" * 50 + " " * 50,
    "12345678901234567890",
    "".join(map(chr, range(0x20, 0x250))),
]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_any_text_makes_the_round_trip(tokenizer, torchtune_names, text):
    tokens = tokenizer.encode(text, add_bos=False, add_eos=False)
    assert tokenizer.decode(tokens, truncate_at_eos=False, skip_special_tokens=False) == text
    assert all(token < tokenizer.base_vocab_size for token in tokens)


def test_random_text_makes_the_round_trip(tokenizer):
    for i in range(200):
        points = [hash_order(i, j) % (0x3000 if j % 3 else 0x110000) for j in range(20)]
        text = "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)
        tokens = tokenizer.encode(text, add_bos=False, add_eos=False)
        assert tokenizer.decode(tokens, truncate_at_eos=False, skip_special_tokens=False) == text


def test_the_vocabulary_fits_the_model(demo, tokenizer, torchtune_names):
    special = tokenizer.special_tokens
    assert tokenizer.vocab_size == torchtune_names.tokenizer.VOCAB_SIZE == 2048
    assert tokenizer.base_vocab_size + len(special) == 2048
    assert sorted(special.values()) == list(range(2048 - len(special), 2048))
    config = json.loads((demo.checkpoint_dir / "config.json").read_text())
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (2048, tokenizer.bos_id, tokenizer.eos_id)
    # It has learnt something: source code takes far fewer tokens than bytes.
    code = "def __init__(self, name, value=None):\n        return self.name"
    assert len(tokenizer.encode(code, add_bos=False, add_eos=False)) < len(code) / 2


def test_byte_alphabet_is_the_published_one():
    from tokenizers.pre_tokenizers import ByteLevel

    from hbp_tune.data.tokenizing.byte_pairs import byte_letters

    alphabet = byte_letters()
    assert sorted(alphabet) == sorted(ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))
    assert {alphabet[letter] for letter in "Aé"} == {0x41, 0xE9}
    assert (alphabet["Ġ"], alphabet["Ċ"]) == (0x20, 0x0A)


def test_training_says_what_is_too_small(torchtune_names):
    train_ranks = torchtune_names.tokenizer.train_ranks
    with pytest.raises(DemoError, match="vocab_size=200 must be at least 266"):
        train_ranks(["text"], vocab_size=200)
    with pytest.raises(DemoError, match=r"the texts give \d+ tokens, vocab_size=2048 needs 2038; give more text"):
        train_ranks(["text"])


def test_a_new_file_is_not_hidden_by_tiktokens_copy_of_the_old(tmp_path, monkeypatch, torchtune_names):
    from tiktoken.load import load_tiktoken_bpe

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    alphabet = [bytes([byte]) for byte in range(256)]
    for tokens in ([*alphabet, b"ab"], [*alphabet, b"cd"]):
        torchtune_names.tokenizer.write_tokenizer(Path("tok"), tokens)
        for path in ("tok/tokenizer.model", str(tmp_path / "tok" / "tokenizer.model")):
            assert tokens[-1] in load_tiktoken_bpe(path)


# ---- data set and model ----


def test_chat_dataset_reads_the_rows(demo, rows, tokenizer, torchtune_names, tmp_path):
    dataset = torchtune_names.chat_dataset(
        tokenizer,
        source="json",
        data_files=str(demo.data_file),
        split="train",
        conversation_column="messages",
        conversation_style="openai",
        cache_dir=str(tmp_path),
    )
    assert len(dataset) == len(rows)
    sample = dataset[0]
    targets = [label for label in sample["labels"] if label != -100]
    assert len(sample["tokens"]) == len(sample["labels"])
    assert tokenizer.decode(targets) == "".join(m["content"] for m in rows[0]["messages"] if m["role"] == "assistant")
    assert sample["tokens"][0] == tokenizer.bos_id


def test_checkpointer_loads_the_model(demo, tmp_path, torchtune_names):
    checkpointer = torchtune_names.FullModelHFCheckpointer(
        checkpoint_dir=str(demo.checkpoint_dir),
        checkpoint_files=["model.safetensors"],
        model_type="LLAMA3",
        output_dir=str(tmp_path),
    )
    decoder = torchtune_names.model.build(torchtune_names.model.TinyLlama())
    weights = checkpointer.load_checkpoint()["model"]
    decoder.load_state_dict(weights, strict=True)
    assert weights["layers.0.attn.q_proj.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert weights["norm.scale"].unique().tolist() == [1.0]


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_computes_the_same(tied, tmp_path, torchtune_names):
    torch, model = torchtune_names.torch, torchtune_names.model
    from transformers import AutoModelForCausalLM

    shape = model.TinyLlama(
        vocab_size=320,
        num_layers=2,
        embed_dim=64,
        num_heads=4,
        num_kv_heads=2,
        intermediate_dim=96,
        max_position_embeddings=16384,
        tied=tied,
        rope_factor=32.0 if tied else 8.0,
    )
    model.write_checkpoint(tmp_path / "model", shape, seed=3)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert theirs.dtype == torch.float32
    ours = model.build(shape)
    weights = model.random_state_dict(shape, seed=3)
    assert ("output.weight" in weights) is not tied
    # Larger weights than the initial ones, so that attention and RoPE show in the logits.
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    ours.load_state_dict({name: weight * (8 if weight.ndim > 1 else 1) for name, weight in weights.items()})
    tokens = torch.randint(0, shape.vocab_size, (1, 600), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(600)[None] * 20  # far apart, so that the scaled low frequencies turn
    with torch.no_grad():
        expected = theirs.eval()(tokens, position_ids=positions).logits
        got = ours.eval()(tokens, input_pos=positions)
    assert expected.abs().max() > 1
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_weights_leave_the_global_generator_alone(torchtune_names):
    torch, model = torchtune_names.torch, torchtune_names.model
    shape = model.TinyLlama(num_layers=1)
    before = torch.get_rng_state()
    one, two = model.random_state_dict(shape, 0), model.random_state_dict(shape, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(one["tok_embeddings.weight"], two["tok_embeddings.weight"])


def test_impossible_shapes_are_refused(torchtune_names):
    TinyLlama = torchtune_names.model.TinyLlama
    with pytest.raises(DemoError, match=r"embed_dim=100 must be a multiple of 2 \* num_heads=16"):
        TinyLlama(embed_dim=100)
    with pytest.raises(DemoError, match="num_heads=8 must be a multiple of num_kv_heads=3"):
        TinyLlama(num_kv_heads=3)
    with pytest.raises(DemoError, match="vocab_size=5 must be above 10"):
        TinyLlama(vocab_size=5)


# ---- the command ----


def test_importing_the_package_does_not_import_torch():
    code = (
        "import sys, hbp_tune.demo, hbp_tune.demo.__main__; assert not {'torch', 'torchtune', 'tokenizers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=own_environment())


def test_the_command_says_what_was_made_and_what_comes_next(demo, capsys):
    arguments = ["--dir", str(demo.directory), "--num-samples", str(NUM_SAMPLES), "--max-tokens", str(MAX_TOKENS)]
    assert __main__.main(arguments) == 0
    out = capsys.readouterr().out
    assert "up to date; nothing was done" in out
    assert f"{demo.num_tokens:,}" in out
    assert out.endswith(
        f"tune run --nproc_per_node 2 hbp_full_finetune_distributed --config demo/tiny_llama_cpu demo_dir={demo.directory}\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-samples", "3"], "num_samples=3 must be at least 20; the default is 700"),
        (["--max-tokens", "40000"], "max_tokens=40000 must lie between 256 and 32768, the tiny model's positions; try 8000"),
        (["--seed", "-1"], "seed=-1 must lie between 0 and 2**63 - 1"),
    ],
)
def test_nonsense_arguments_end_in_one_line(arguments, message, capsys, tmp_path):
    assert __main__.main(["--dir", str(tmp_path / "demo"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "demo").exists()


def test_an_unwritable_directory_ends_in_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert __main__.main(["--dir", str(tmp_path / "file" / "demo")]) == 2
    assert "cannot be written (Not a directory); choose another with --dir" in capsys.readouterr().err


@pytest.fixture
def whole_stdlib(monkeypatch):
    monkeypatch.setattr("hbp_tune.demo.stdlib.sysconfig", sysconfig)


@pytest.mark.slow
def test_a_longer_tail_is_one_argument_away(tmp_path, torchtune_names, whole_stdlib):
    files = prepare_demo(tmp_path, max_tokens=32000)
    longest = max(max(lengths) for lengths in files.sample_tokens.values())
    assert 30_000 < longest <= 32_000
    assert files.sample_tokens.keys() >= {"module_question", "module_summary", "conversation"}


@pytest.mark.slow
def test_the_default_has_the_promised_size(tmp_path, torchtune_names, whole_stdlib):
    files = prepare_demo(tmp_path)
    lengths = [length for kind in files.sample_tokens.values() for length in kind]
    long = [length for length in lengths if length > 1000]
    assert 200_000 < files.num_tokens < 300_000
    assert len(long) / len(lengths) < 0.055
    assert 0.4 < sum(long) / files.num_tokens < 0.6
    assert 7000 < max(lengths) <= 8000
