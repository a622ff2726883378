"""The tokenizer of a Hugging Face checkpoint, with its own chat template, in torchtune's place for tokenizers."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date as Date
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from torchtune.data import Message

from hbp_tune.config.sources import strings, tokenizer_files
from hbp_tune.data.tokenizing.chat_template import WRITTEN_REASONING, ChatTemplate, Rendering
from hbp_tune.data.tokenizing.conversation import REASONING, REWRITTEN_TURNS, Conversation, EncodedChat
from hbp_tune.data.tokenizing.special_text import SpecialText
from hbp_tune.data.tokenizing.token_places import TokenPlaces
from hbp_tune.errors import ConfigError, DataError

_POLICIES = ("keep", "plain")
# The date that Llama 3.1's own template states.
_DATE = "2024-07-26"


class HFTokenizer:
    """Tokenises as ``AutoTokenizer`` of transformers does, by the files of a checkpoint.

    Usable wherever torchtune's tokenizers are: it has ``encode``, ``decode``, ``tokenize_messages`` and a call on samples.

    Args:
        path: folder of the checkpoint, or of its tokenizer's files.
        chat_template: a template in place of the checkpoint's: a file, or the template itself.
        template_variables: that the template reads, such as ``enable_thinking``.
        date: year-month-day that a template which states today's date takes for it, at training as on any day.
        special_tokens_in_text: a message that spells a special token, such as ``<|im_end|>``: ``keep`` reads it as that token,
            as transformers does by default, ``plain`` as the characters that it is. Either way such rows are counted.
        max_seq_len: cut samples to so many tokens; null leaves them whole, for ``planner.overlong`` to decide.

    Raises:
        ConfigError: the folder, or a tokenizer that knows the place of its tokens in a text, is not there, or an argument is
            out of range.
    """

    def __init__(
        self,
        path: str,
        *,
        chat_template: str | None = None,
        template_variables: Mapping[str, Any] | None = None,
        date: str = _DATE,
        special_tokens_in_text: str = "keep",
        max_seq_len: int | None = None,
    ) -> None:
        if special_tokens_in_text not in _POLICIES:
            raise ConfigError(
                f"tokenizer.special_tokens_in_text={special_tokens_in_text!r} must be one of {', '.join(_POLICIES)}"
            )
        if max_seq_len is not None and max_seq_len < 1:
            raise ConfigError(f"tokenizer.max_seq_len={max_seq_len} must be at least 1, or null")
        self._path = Path(path)
        self._hf = _load(self._path)
        backend = Tokenizer.from_str(self._hf.backend_tokenizer.to_str())
        # Chat templates write all special tokens themselves; without this, offsets do not leave out spaces, either.
        backend.post_processor = None
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._places = TokenPlaces(backend)
        self._special = SpecialText(backend)
        self._is_plain = special_tokens_in_text == "plain"
        self._own_template = _read_template(chat_template) if chat_template else None
        self._variables = dict(template_variables or {})
        self.date = _parse_date(date)
        self.max_seq_len = max_seq_len
        self.special_tokens: dict[str, int] = dict(self._special.ids)
        self.bos_id: int | None = self._hf.bos_token_id
        self.eos_id: int | None = self._hf.eos_token_id
        self.pad_id: int = self._hf.pad_token_id if self._hf.pad_token_id is not None else 0
        self.stop_tokens: list[int] = [] if self.eos_id is None else [self.eos_id]

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template.

        Raises:
            DataError: the checkpoint has none.
        """
        source = self._own_template or self._hf.chat_template
        if isinstance(source, dict):
            source = source.get("default")
        if not source:
            raise DataError(
                f"the tokenizer in {self._path} has no chat template; take an instruct model's, or set tokenizer.chat_template "
                "to a file that holds one"
            )
        return ChatTemplate(
            self._hf,
            source,
            variables=self._variables,
            today=self.date,
            special_tokens=list(self._special.ids),
            added_tokens=[token.content for token in self._backend.get_added_tokens_decoder().values()],
        )

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Tokenise plain text, between the tokens that begin and end a text where the model has them."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        before = [self.bos_id] if add_bos and self.bos_id is not None else []
        after = [self.eos_id] if add_eos and self.eos_id is not None else []
        return [*before, *ids, *after]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Give the text of tokens."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> dict[str, Any]:
        """Replace the messages of a sample by ``tokens`` and ``mask``; see `tokenize_messages`."""
        tokens, mask = self.tokenize_messages(sample["messages"], add_end_tokens=not inference)
        return {**{key: value for key, value in sample.items() if key != "messages"}, "tokens": tokens, "mask": mask}

    def tokenize_messages(self, messages: Sequence[Message], *, add_end_tokens: bool = True) -> tuple[list[int], list[bool]]:
        """Tokenise torchtune's messages.

        Args:
            messages: of text; ``masked`` ones are not targets.
            add_end_tokens: give the whole conversation; else the prompt for the turn behind it, all of it masked.

        Returns:
            ``num_tokens`` ids, and whether each is not a target.

        Raises:
            DataError: a message holds something else than text.
        """
        if any(message.contains_media for message in messages):
            raise DataError("a message holds an image; this tokenizer takes text")
        rendered = [
            {"role": "tool" if message.role == "ipython" else message.role, "content": message.text_content}
            for message in messages
        ]
        if not add_end_tokens:
            ids = self._backend.encode(self.template.render(rendered, None, is_prompt=True), add_special_tokens=False).ids
            return ids[: self.max_seq_len], [True] * len(ids[: self.max_seq_len])
        conversation = Conversation(messages=rendered, is_trained=[not message.masked for message in messages])
        chat = self.encode_conversation(conversation)[0]
        return chat.tokens.tolist(), np.logical_not(chat.is_target).tolist()

    def encode_conversation(
        self, conversation: Conversation, *, reasoning: str = "train", rewritten_turns: str = "train"
    ) -> list[EncodedChat]:
        """Tokenise a conversation as the checkpoint's template has it, with what the model generates of it as targets.

        Args:
            conversation: with its trained messages.
            reasoning: of the assistant: ``train`` it, ``mask`` it, or ``drop`` it before the template sees it.
            rewritten_turns: see `ChatTemplate.read`.

        Returns:
            One sample; with ``rewritten_turns=split`` perhaps several.
        """
        assert reasoning in REASONING
        assert rewritten_turns in REWRITTEN_TURNS
        notes: Counter[str] = Counter()
        if reasoning == "drop":
            conversation, num_dropped = _without_reasoning(conversation)
            notes += Counter({"turns whose reasoning is left out, as reasoning=drop": num_dropped})
        spelt = Counter(token for text in _texts(conversation) for token in self._special.spelt_in(text))
        for token, count in spelt.items():
            how = "plain text" if self._is_plain else "that token; special_tokens_in_text=plain reads it as text"
            notes[f"spells {token} in its text, read as {how}"] += count
        if spelt and self._is_plain:
            conversation = _with_texts(conversation, self._special.broken)
        roles = [message["role"] for message in conversation.messages]
        renderings = self.template.read(conversation, reasoning=reasoning, rewritten_turns=rewritten_turns)
        chats = [self._encoded(rendering, roles, is_plain=bool(spelt) and self._is_plain) for rendering in renderings]
        chats[0] = replace(chats[0], notes=notes + Counter(chats[0].notes))
        return chats

    def _encoded(self, rendering: Rendering, roles: Sequence[str], *, is_plain: bool) -> EncodedChat:
        """Tokenise a rendering, and map its characters to tokens."""
        places = sorted({0, *rendering.turn_ends, *(place for target in rendering.targets for place in target)})
        ids, tokens, reach_over = (self._special if is_plain else self._places).encode(rendering.text, places)
        token_at = dict(zip(places, tokens.tolist(), strict=True))
        reaches_over = dict(zip(places, reach_over.tolist(), strict=True))
        is_target = np.zeros(len(ids), dtype=np.bool_)
        for start, end in rendering.targets:
            is_target[token_at[start] : token_at[end] - reaches_over[end]] = True
        notes = Counter(rendering.notes)
        if self.max_seq_len is not None and len(ids) > self.max_seq_len:
            notes[f"cut to tokenizer.max_seq_len={self.max_seq_len}"] += 1
        return EncodedChat(
            tokens=ids[: self.max_seq_len],
            is_target=is_target[: self.max_seq_len],
            turn_starts=[token_at[place] for place in (0, *rendering.turn_ends[:-1])],
            roles=roles[: len(rendering.turn_ends)],
            notes=notes,
        )

    def export(self, folder: Path) -> None:
        """Put the tokenizer's files and the template that was trained with into a folder, such as an exported checkpoint's."""
        for source in tokenizer_files(self._path):
            copy = folder / source.relative_to(self._path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if source.resolve() != copy.resolve():
                shutil.copyfile(source, copy)
        if self._own_template:
            (folder / "chat_template.jinja").write_text(self._own_template, encoding="utf-8")


def _load(path: Path) -> Any:
    """Load a tokenizer from a folder; nothing is asked of the hub.

    Raises:
        ConfigError: there is none that transformers can load, or it does not know where in a text its tokens lie.
    """
    if not path.is_dir():
        fault = "is a file; name its folder" if path.exists() else f"does not exist (looked from {Path.cwd()})"
        raise ConfigError(f"tokenizer.path={path} {fault}")
    if not tokenizer_files(path):
        raise ConfigError(
            f"tokenizer.path={path} holds no tokenizer: no tokenizer.json, tokenizer.model or vocab.json; name the checkpoint's "
            "folder"
        )
    from transformers import AutoTokenizer  # takes two seconds, which torchtune's tokenizers do not need

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # transformers raises whatever the files lead to
        raise ConfigError(f"tokenizer.path={path}: transformers cannot load it: {' '.join(str(error).split())}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"tokenizer.path={path}: {type(tokenizer).__name__} has no fast tokenizer, which tells where in a text its tokens "
            "lie; add the checkpoint's tokenizer.json"
        )
    return tokenizer


def _read_template(template: str) -> str:
    """Give a template, itself or a file's.

    Raises:
        ConfigError: it is neither.
    """
    if "{" in template:
        return template
    path = Path(template)
    if not path.is_file():
        raise ConfigError(f"tokenizer.chat_template={template} does not exist (looked from {Path.cwd()})")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        text = json.loads(text)["chat_template"]
    return text


def _parse_date(text: str) -> Date:
    """Read a date.

    Raises:
        ConfigError: it is none.
    """
    try:
        return Date.fromisoformat(str(text))
    except ValueError as error:
        raise ConfigError(f"tokenizer.date={text} must be a date, as {_DATE}") from error


def _without_reasoning(conversation: Conversation) -> tuple[Conversation, int]:
    """Leave out the reasoning of all assistant turns, also what their content holds of it, and count those that had some."""
    messages = []
    num_dropped = 0
    for message in conversation.messages:
        kept = {key: value for key, value in message.items() if key != "reasoning_content"}
        if message["role"] == "assistant" and isinstance(content := message.get("content"), str):
            kept["content"] = WRITTEN_REASONING.sub("", content, count=1) if WRITTEN_REASONING.match(content) else content
        num_dropped += bool(message.get("reasoning_content")) or kept.get("content") != message.get("content")
        messages.append(kept)
    return replace(conversation, messages=messages), num_dropped


# Fields of a message that hold what somebody has written.
_WRITTEN = ("content", "reasoning_content", "tool_calls")


def _texts(conversation: Conversation) -> Iterator[str]:
    """Give all that was written into a conversation, its tools included."""
    for message in conversation.messages:
        yield from strings([message.get(key) for key in _WRITTEN])
    yield from strings(conversation.tools)


def _with_texts(conversation: Conversation, change: Callable[[str], str]) -> Conversation:
    """Change all that was written into a conversation, its tools included."""

    def changed(value: Any) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, Mapping):
            return {key: changed(item) for key, item in value.items()}
        return [changed(item) for item in value] if isinstance(value, list | tuple) else value

    messages = [
        {key: changed(value) if key in _WRITTEN else value for key, value in message.items()} for message in conversation.messages
    ]
    return replace(conversation, messages=messages, tools=changed(conversation.tools))
