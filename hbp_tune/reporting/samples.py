"""Samples as they are trained, turn by turn, on a terminal and on a page: targets told apart from what is not trained."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from rich.console import Console
from rich.text import Text

# What stands before each line of a target, in colour and without.
_TARGET, _MASKED = "+ ", "  "


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A run of a turn's tokens that are all targets, or are all none.

    Args:
        text: of the tokens, special ones spelt out; where tokens were left out, of those before them.
        is_target: whether the model learns to generate them.
        num_left_out: tokens that are not shown.
        tail: text of the tokens behind these.
    """

    text: str
    is_target: bool
    num_left_out: int = 0
    tail: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnView:
    """One turn of a conversation; a sample that is none has one turn without a role."""

    role: str
    num_tokens: int
    num_targets: int
    pieces: Sequence[Piece]


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleView:
    """A sample as it is trained.

    Args:
        place: where it comes from.
        turns: in order.
        special_tokens: that its text may spell out.
        notes: what was done to its row.
    """

    place: str
    turns: Sequence[TurnView]
    special_tokens: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def headline(self) -> str:
        """Where it comes from and what it holds, in one line."""
        num_tokens = sum(turn.num_tokens for turn in self.turns)
        num_targets = sum(turn.num_targets for turn in self.turns)
        num_turns = f"{len(self.turns)} turns, " if len(self.turns) > 1 else ""
        return f"{self.place}: {num_turns}{num_tokens:,} tokens, {num_targets:,} of them targets"


def print_sample(sample: SampleView, console: Console) -> None:
    """Print a sample: each line of a target begins with ``+``, and special tokens are coloured where there is colour."""
    console.print(Text(sample.headline, style="bold"))
    for note in sample.notes:
        console.print(Text(f"  note: {note}", style="yellow"))
    special = _pattern(sample.special_tokens)
    for turn in sample.turns:
        targets = f", {turn.num_targets:,} targets" if turn.num_targets else ""
        console.print(Text(f"{turn.role or 'text'}, {turn.num_tokens:,} tokens{targets}", style="bold blue"))
        for piece in turn.pieces:
            margin, style = (_TARGET, "green") if piece.is_target else (_MASKED, "")
            for line in _lines(piece):
                text = Text(line.replace("\t", "    "), style=style)
                if special:
                    text.highlight_regex(special, "magenta")
                # Two columns for the margin, in which nothing of the text may stand.
                for part in text.wrap(console, max(console.width - len(margin), 8), tab_size=4) or [Text("")]:
                    console.print(Text(margin, style=style) + part)


def _lines(piece: Piece) -> Iterator[str]:
    # The newline at a piece's end ends its last line, and begins none.
    yield from piece.text.removesuffix("\n").split("\n")
    if piece.num_left_out:
        yield f"[... {piece.num_left_out:,} tokens ...]"
        yield from piece.tail.removesuffix("\n").split("\n")


def render_sample(sample: SampleView) -> str:
    """Render a sample as HTML, of which `SAMPLE_STYLE` is the style."""
    parts = [f"<h3>{escape(sample.headline)}</h3>"]
    parts += [f'<p class="caption">{escape(note)}</p>' for note in sample.notes]
    special = _pattern(sample.special_tokens)
    for turn in sample.turns:
        targets = f", {turn.num_targets:,} targets" if turn.num_targets else ""
        body = "".join(_span(piece, special) for piece in turn.pieces)
        parts.append(
            f'<div class="turn"><p class="caption">{escape(turn.role or "text")}, {turn.num_tokens:,} tokens{targets}</p>'
            f"<pre>{body}</pre></div>"
        )
    return "".join(parts)


def _span(piece: Piece, special: str | None) -> str:
    def marked(text: str) -> str:
        if not special:
            return escape(text)
        parts = re.split(f"({special})", text)
        return "".join(f"<b>{escape(part)}</b>" if index % 2 else escape(part) for index, part in enumerate(parts))

    left_out = f"<i>[... {piece.num_left_out:,} tokens ...]</i>{marked(piece.tail)}" if piece.num_left_out else ""
    return f'<span class="{"target" if piece.is_target else "masked"}">{marked(piece.text)}{left_out}</span>'


def _pattern(special_tokens: Sequence[str]) -> str | None:
    return "|".join(re.escape(token) for token in sorted(special_tokens, key=len, reverse=True)) or None


SAMPLE_STYLE = """
.turn pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.2em 0 .8em;font-size:.85rem;line-height:1.45}
.turn .target{background:var(--mark)}
.turn b{color:var(--special);font-weight:600}
.turn i{color:var(--muted)}
"""
