"""Tokenizers with chat templates of well-known kinds, made on the spot as folders that transformers loads."""

import itertools
import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from hbp_tune.data.tokenizing.conversation import Conversation

TEMPLATES = Path(__file__).parent / "templates"
_TEXTS = [
    "You are a helpful model. The user asks, and the assistant answers: 1 + 1 is 2, and nothing else is.",
    "system user assistant tool ipython model function name arguments parameters Today Date Cutting Knowledge",
    "Where does the river end? It ends in the sea, where else should it end? Überall, naturellement. 東京 – ☃",
    'def call(name, arguments): return {"name": name, "arguments": arguments}\n\n    for i in range(10):\n\tprint(i)',
    "\n\n".join("abcdefghij"),
] * 3
# For each kind: begin, end, pad, special tokens beside them, and added tokens that are not special.
_QWEN = (None, "<|im_end|>", "<|endoftext|>", ["<|im_start|>"], ["<think>", "</think>", "<tool_call>", "</tool_call>"])
_KINDS = {
    "chatml": _QWEN,
    "chatml_marked": _QWEN,
    "qwen2_5": _QWEN,
    "qwen3": _QWEN,
    "llama3_1": ("<|begin_of_text|>", "<|eot_id|>", "<|pad|>", ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"], []),
    "deepseek": (
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜pad｜>",
        [],
        ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"],
    ),
    "mistral": ("<s>", "</s>", "<pad>", ["[INST]", "[/INST]"], []),
    "gemma": ("<bos>", "<eos>", "<pad>", ["<start_of_turn>", "<end_of_turn>"], []),
}
KINDS = tuple(_KINDS)
# What is a word, as the models of these kinds have it: newlines stay together, whatever follows them.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_OF_SENTENCEPIECE = ("mistral", "gemma")


@cache
def _tokenizer(kind: str) -> str:
    begin, end, pad, special, added = _KINDS[kind]
    special_tokens = [token for token in ("<unk>", begin, end, pad, *special) if token]
    if kind in _OF_SENTENCEPIECE:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Replace(" ", "▁") if kind == "gemma" else None
        if kind == "mistral":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
        replace = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(replace)
        special_tokens += [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special_tokens, show_progress=False, max_token_length=8)
        tokenizer.train_from_iterator(_TEXTS, trainer)
        state = json.loads(tokenizer.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
        return json.dumps(state)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC() if kind.startswith("qwen") else None
    split = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_TEXTS, trainer)
    tokenizer.add_special_tokens(special_tokens[1:])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    return tokenizer.to_str()


def write_model(folder: Path, kind: str) -> Path:
    """Write the tokenizer's files of one kind; gives the folder."""
    begin, end, pad, *_ = _KINDS[kind]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(_tokenizer(kind), encoding="utf-8")
    names = {"bos_token": begin, "eos_token": end, "pad_token": pad}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {key: name for key, name in names.items() if name}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    template = (TEMPLATES / f"{kind}.jinja").read_text(encoding="utf-8").removesuffix("\n")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


CALL = {"id": "1", "type": "function", "function": {"name": "name_river", "arguments": {"where": "東京", "n": 2}}}
TOOL = {
    "type": "function",
    "function": {"name": "name_river", "description": "Names.", "parameters": {"type": "object", "properties": {}}},
}


def user(content):
    return {"role": "user", "content": content}


def system(content):
    return {"role": "system", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def encoded(tokenizer, messages, tools=None, trained=("assistant",), **arguments):
    is_trained = [message["role"] in trained for message in messages]
    return tokenizer.encode_conversation(Conversation(messages=messages, is_trained=is_trained, tools=tools), **arguments)


def reference(folder, messages, tools=None, **variables):
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=False, date_string="26 Jul 2024", **variables
    )


def targets(tokenizer, chat):
    """Give the text of each run of targets."""
    pairs = zip(chat.tokens.tolist(), chat.is_target.tolist(), strict=True)
    runs = [(is_target, [token for token, _ in run]) for is_target, run in itertools.groupby(pairs, key=lambda pair: pair[1])]
    return [tokenizer.decode(run) for is_target, run in runs if is_target]
