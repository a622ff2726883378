"""Chat samples about the modules of the Python standard library.

Two parts, as in real fine-tuning data. The *body*, most of the samples, asks about single functions and classes and keeps the
lengths that those have. The *tail*, a few percent of the samples, puts whole modules into the prompt; its lengths are spread
evenly in log space from ``TAIL_MIN_TOKENS`` to the longest length allowed, so that it holds about half of the tokens.

Every choice is a hash of the seed and of what is chosen: neither the order in which the file system lists files nor
``PYTHONHASHSEED`` changes a byte.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeAlias

from hbp_tune.demo import DemoError
from hbp_tune.demo.stdlib import Class, Function, Module

Message: TypeAlias = dict[str, str]
CountTokens: TypeAlias = Callable[[Sequence[Message]], int]

TAIL_MIN_TOKENS = 1024
# 4.5 percent of the samples at a mean of 3.5K tokens weigh nearly as much as the other 95.5 percent at a mean of 190.
TAIL_SHARE = 0.045
BODY_WEIGHTS = {"explain": 0.36, "docstring": 0.40, "chat": 0.14, "class": 0.10}
# Lengths within this ratio of the target need no second module.
FILL_RATIO = 0.97
MAX_BUNDLE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One conversation.

    Attributes:
        source: its kind: a key of ``BODY_WEIGHTS``, ``module_question``, ``module_summary``, ``conversation`` or ``bundle``.
        messages: ``role`` and ``content``; user and assistant by turns, the user first.
        num_tokens: its tokens in chat format, with begin and end of text.
    """

    source: str
    messages: tuple[Message, ...]
    num_tokens: int = 0

    def row(self) -> dict[str, object]:
        """The JSON object that chat.jsonl holds."""
        return {"source": self.source, "messages": list(self.messages)}


def hash_order(seed: int, *parts: object) -> int:
    """A number that orders or draws among things, the same on every machine."""
    text = "\0".join(str(part) for part in (seed, *parts))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def _pick(options: Sequence[str], seed: int, *parts: object) -> str:
    return options[hash_order(seed, *parts) % len(options)]


def _sample(source: str, *turns: str) -> Sample:
    roles = ("user", "assistant")
    messages = tuple({"role": roles[i % 2], "content": turn.strip()} for i, turn in enumerate(turns))
    assert len(messages) % 2 == 0
    assert all(message["content"] for message in messages)
    return Sample(source=source, messages=messages)


def _fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def _first_paragraph(docstring: str) -> str:
    return docstring.split("\n\n")[0]


def _first_line(docstring: str) -> str:
    return docstring.split("\n")[0]


def _ask(function: Function, seed: int) -> str:
    options = ("What does `{}` do?", "And `{}`?", "Can you tell me what `{}` is for?", "Explain `{}` briefly.")
    return _pick(options, seed, "ask", function.name).format(function.name)


def _some(functions: Iterable[Function], limit: int, seed: int, *parts: object) -> list[Function]:
    """One to ``limit`` functions, in a hashed order; names that come twice are taken once."""
    by_name = {function.name: function for function in functions}
    ordered = sorted(by_name.values(), key=lambda function: hash_order(seed, "some", function.name, *parts))
    return ordered[: 1 + hash_order(seed, "how many", *parts) % limit]


def body_candidates(modules: Iterable[Module], seed: int) -> dict[str, list[Sample]]:
    """Every short sample that the modules give, by kind, each kind in the order in which to draw."""
    found: dict[str, dict[str, Sample]] = {kind: {} for kind in BODY_WEIGHTS}
    for module in modules:
        for function in module.documented:
            found["explain"][function.name] = _explain(function, seed)
            found["docstring"][function.name] = _write_docstring(function, seed)
        for cls in module.classes:
            found["class"][cls.name] = _list_methods(cls)
            if len(cls.methods) > 1:
                found["chat"][cls.name] = _chat(cls.name, cls.docstring, cls.methods, seed)
        if module.docstring and module.functions:
            found["chat"][module.name] = _chat(module.name, module.docstring, module.functions, seed)
    return {
        kind: [by_name[name] for name in sorted(by_name, key=lambda name: (hash_order(seed, kind, name), name))]
        for kind, by_name in found.items()
    }


def _explain(function: Function, seed: int) -> Sample:
    options = ("What does `{}` do?", "In one paragraph: what is `{}` for?", "Explain `{}`.", "When would I call `{}`?")
    return _sample(
        "explain",
        _pick(options, seed, "explain", function.name).format(function.name),
        f"`{function.signature}`\n\n{_first_paragraph(function.docstring)}",
    )


def _write_docstring(function: Function, seed: int) -> Sample:
    options = ("Write a docstring for this function.", "Document this function, please.", "What would this one's docstring say?")
    question = _pick(options, seed, "docstring", function.name)
    return _sample("docstring", f"{question}\n\n{_fenced(function.code)}", function.docstring)


def _list_methods(cls: Class) -> Sample:
    lines = [f"- `{method.name.rpartition('.')[2]}`: {_first_line(method.docstring)}" for method in cls.methods]
    return _sample("class", f"List the documented methods of this class.\n\n{_fenced(cls.code)}", "\n".join(lines))


def _chat(name: str, docstring: str, functions: Sequence[Function], seed: int) -> Sample:
    turns = [f"What is `{name}` for?", _first_paragraph(docstring)] if docstring else []
    for function in _some(functions, 4, seed, "chat", name):
        turns += [_ask(function, seed), _first_paragraph(function.docstring)]
    return _sample("chat", *turns)


def tail_sample(modules: Sequence[Module], seed: int) -> Sample:
    """A sample with one or more whole modules in its prompt; at least one must hold a documented function."""
    if len(modules) > 1:
        return _bundle(modules, seed)
    (module,) = modules
    makers = [_module_question, _conversation]
    if module.docstring:
        makers.append(_module_summary)
    return makers[hash_order(seed, "tail", module.name) % len(makers)](module, seed)


def _answer(function: Function) -> str:
    return f"{_fenced(function.signature)}\n\n{function.docstring}"


def _module_question(module: Module, seed: int) -> Sample:
    function = _some(module.documented, 1, seed, "question", module.name)[0]
    question = f"What is the signature of `{function.name}`, and what does it do?"
    return _sample(
        "module_question", f"This is the module `{module.name}`.\n\n{_fenced(module.code)}\n\n{question}", _answer(function)
    )


def _module_summary(module: Module, seed: int) -> Sample:
    ask = _pick(("Summarise this module.", "What is this module for?", "Write this module's docstring."), seed, module.name)
    return _sample("module_summary", f"{ask}\n\n{_fenced(module.bare_code)}", module.docstring)


def _conversation(module: Module, seed: int) -> Sample:
    first, *others = _some(module.documented, 5, seed, "conversation", module.name)
    turns = [f"{_fenced(module.code)}\n\nAbove is `{module.name}`. What does `{first.name}` do?", first.docstring]
    for function in others:
        turns += [_ask(function, seed), _first_paragraph(function.docstring)]
    return _sample("conversation", *turns)


def _bundle(modules: Sequence[Module], seed: int) -> Sample:
    parts = [f"The module `{module.name}`:\n\n{_fenced(module.code)}" for module in modules]
    names = [module.name for module in modules]
    function = _some((f for module in modules for f in module.documented), 1, seed, "bundle", *names)[0]
    question = f"In which of these modules is `{function.name.rpartition('.')[2]}`, and what does it do?"
    where = next(module.name for module in modules if function in module.documented)
    return _sample("bundle", "\n\n".join([*parts, question]), f"In `{where}`.\n\n{_answer(function)}")


# ---- choosing ----


def choose_samples(
    modules: Sequence[Module], count_tokens: CountTokens, *, num_samples: int, max_tokens: int, seed: int
) -> list[Sample]:
    """Draw body and tail, mix them, and count their tokens.

    Args:
        modules: what to ask about.
        count_tokens: tokens of one conversation in chat format.
        num_samples: rows wanted.
        max_tokens: the longest sample allowed.
        seed: settles every choice.

    Returns:
        ``num_samples`` samples in a hashed order.

    Raises:
        DemoError: the modules do not give that many samples.
    """
    # Below twice the shortest tail length a tail would be no more than an edge of the body.
    tail_share = TAIL_SHARE if max_tokens >= 2 * TAIL_MIN_TOKENS else 0.0
    num_tail = round(num_samples * tail_share)
    num_body = num_samples - num_tail
    body = _choose_body(modules, count_tokens, num_body, min(max_tokens, TAIL_MIN_TOKENS), seed)
    if len(body) < num_body:
        available = int(len(body) / (1 - tail_share))
        raise DemoError(
            f"num_samples={num_samples} is more than the {available} samples that this Python's standard library gives at "
            f"max_tokens={max_tokens}; ask for fewer"
        )
    tail = _choose_tail(modules, count_tokens, num_tail, max_tokens, seed)
    if len(tail) < num_tail:
        raise DemoError(f"the modules give {len(tail)} long samples of the {num_tail} wanted; lower num_samples={num_samples}")
    samples = body + tail
    return [samples[i] for i in sorted(range(num_samples), key=lambda i: hash_order(seed, "mix", i))]


def choose_held_out(
    training: Sequence[Sample], modules: Sequence[Module], count_tokens: CountTokens, **bounds: int
) -> list[Sample]:
    """Draw samples like the training samples, no answer of which is among theirs.

    Args:
        training: what `choose_samples` gave.
        modules: what to ask about.
        count_tokens: tokens of one conversation in chat format.
        bounds: ``num_samples``, some less where answers coincide, ``max_tokens`` and ``seed``, as of `choose_samples`.

    Raises:
        DemoError: every answer is among the training samples'.
    """
    seen = {answer for sample in training for answer in _answers(sample)}
    held_out = [x for x in choose_samples(modules, count_tokens, **bounds) if seen.isdisjoint(_answers(x))]
    if not held_out:
        raise DemoError(f"num_samples={len(training)} leaves no sample to hold out; ask for fewer")
    return held_out


def _answers(sample: Sample) -> list[str]:
    return [message["content"] for message in sample.messages if message["role"] == "assistant"]


def _counted(sample: Sample, count_tokens: CountTokens) -> Sample:
    return Sample(source=sample.source, messages=sample.messages, num_tokens=count_tokens(sample.messages))


def _choose_body(
    modules: Sequence[Module], count_tokens: CountTokens, num_samples: int, max_tokens: int, seed: int
) -> list[Sample]:
    queues = {
        kind: (sample for raw in samples if (sample := _counted(raw, count_tokens)).num_tokens <= max_tokens)
        for kind, samples in body_candidates(modules, seed).items()
    }
    chosen: list[Sample] = []
    taken: Counter[str] = Counter()
    while len(chosen) < num_samples and queues:
        # The kind furthest behind its share comes next; a kind with no candidates left leaves its share to the others.
        kind = min(queues, key=lambda kind: (taken[kind] + 1) / BODY_WEIGHTS[kind])
        following = next(queues[kind], None)
        if following is None:
            del queues[kind]
            continue
        taken[kind] += 1
        chosen.append(following)
    return chosen


def _choose_tail(
    modules: Sequence[Module], count_tokens: CountTokens, num_samples: int, max_tokens: int, seed: int
) -> list[Sample]:
    documented = [module for module in modules if module.documented] if num_samples else []
    sizes = {module.name: count_tokens([{"role": "user", "content": module.code}]) for module in documented}
    used: Counter[str] = Counter()
    chosen: list[Sample] = []
    for i in range(num_samples, 0, -1):  # the longest first: they have the fewest modules to choose from
        target = round(TAIL_MIN_TOKENS * (max_tokens / TAIL_MIN_TOKENS) ** (i / num_samples))
        order = sorted(documented, key=lambda module: (used[module.name], hash_order(seed, "module", i, module.name)))
        for budget in (target * share // 100 for share in range(98, 48, -2)):  # the question and the answer need room too
            picked = _fill(order, sizes, budget)
            sample = _counted(tail_sample(picked, seed), count_tokens) if picked else None
            if sample is not None and sample.num_tokens <= max_tokens:
                chosen.append(sample)
                used.update(module.name for module in picked)
                break
    return chosen


def _fill(order: Sequence[Module], sizes: dict[str, int], budget: int) -> list[Module]:
    """Modules of ``FILL_RATIO * budget`` to ``budget`` tokens in all: one if one fits so, else a few; the first in order win."""
    picked: list[Module] = []
    left = budget
    while left > (1 - FILL_RATIO) * budget and len(picked) < MAX_BUNDLE:
        fitting = [module for module in order if sizes[module.name] <= left and module not in picked]
        closing = (module for module in fitting if sizes[module.name] >= left - (1 - FILL_RATIO) * budget)
        large = (module for module in fitting if sizes[module.name] >= left / 3)
        module = next(closing, None) or next(large, None)
        if module is None:
            break
        picked.append(module)
        left -= sizes[module.name]
    return picked
